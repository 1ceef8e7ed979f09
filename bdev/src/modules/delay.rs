//! A device that is slow on purpose.
//!
//! An operation goes on to the base at once and is held back when it has come home: one in a hundred for the 99th
//! percentile's latency, the others for the average. Latencies can be changed under load and hold for what comes home
//! from then on.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use reactor::{Instant, Progress};
use schema::{ConfigEntry, Errno, Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};
use uuid::Uuid;

use super::common::{device_as, rpc_delete, take_uuid};
use super::layer::Base;
use super::{Module, layer, malloc};
use crate::conformance::{Rng, Spec, Subject};
use crate::core::{
    Bdev, BdevError, BdevInfo, BdevSystem, ChannelCx, ChannelId, Geometry, Io, IoChannel, IoCx, IoStatus, IoTag,
    NewBdev, Op, OpSet,
};

/// The module.
pub const MODULE: Module = Module { name: "delay", methods: METHODS, subjects: &[SUBJECT], examine: None };

const PRODUCT: &str = "delay";
const TYPES: &[&str] = &["avg_read", "p99_read", "avg_write", "p99_write"];
/// The longest latency: an hour.
const MAX_US: i128 = 3_600_000_000;

/// Latencies in microseconds, in the order of [`TYPES`].
#[derive(Debug, Default)]
struct Latencies([AtomicU64; 4]);

impl Latencies {
    fn of(&self, write: bool, rare: bool) -> Duration {
        let index = usize::from(write) * 2 + usize::from(rare);
        Duration::from_micros(self.0[index].load(Ordering::Relaxed))
    }

    fn all(&self) -> [u64; 4] {
        [0, 1, 2, 3].map(|index| self.0[index].load(Ordering::Relaxed))
    }
}

struct Delay {
    base: Base,
    latencies: Arc<Latencies>,
}

impl Delay {
    fn params(&self) -> Value {
        let [avg_read, p99_read, avg_write, p99_write] = self.latencies.all();
        json!({
            "base_bdev_name": self.base.bdev().name(),
            "avg_read_latency": avg_read,
            "p99_read_latency": p99_read,
            "avg_write_latency": avg_write,
            "p99_write_latency": p99_write,
        })
    }
}

impl Bdev for Delay {
    fn product_name(&self) -> &'static str {
        PRODUCT
    }

    fn geometry(&self) -> Geometry {
        self.base.bdev().device().geometry()
    }

    fn native_ops(&self) -> OpSet {
        layer::ops_of(self.base.bdev())
    }

    fn open_channel(&self, cx: &mut ChannelCx<'_>) -> io::Result<Box<dyn IoChannel>> {
        let base = cx.get_channel(self.base.bdev())?;
        Ok(Box::new(DelayChannel {
            base,
            latencies: Arc::clone(&self.latencies),
            rng: Rng::new(u64::from(cx.reactor().0)),
            held: BinaryHeap::new(),
            next: 0,
        }))
    }

    fn driver_specific(&self) -> Value {
        json!({ "delay": self.params() })
    }

    fn removed(&self) {
        self.base.release();
    }

    fn config(&self, info: &BdevInfo) -> Vec<ConfigEntry> {
        let mut params = self.params();
        params["name"] = json!(info.name());
        params["uuid"] = json!(info.uuid().to_string());
        vec![ConfigEntry::new("bdev_delay_create", params)]
    }

    fn base_bdevs(&self) -> Vec<String> {
        vec![self.base.bdev().name().to_string()]
    }
}

/// An operation that is held back; ordered by its turn.
struct Held {
    turn: (Instant, u64),
    io: Io,
}

impl PartialEq for Held {
    fn eq(&self, other: &Held) -> bool {
        self.turn == other.turn
    }
}

impl Eq for Held {}

impl PartialOrd for Held {
    fn partial_cmp(&self, other: &Held) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Held {
    fn cmp(&self, other: &Held) -> std::cmp::Ordering {
        self.turn.cmp(&other.turn)
    }
}

struct DelayChannel {
    base: ChannelId,
    latencies: Arc<Latencies>,
    rng: Rng,
    /// Bounded by the I/Os that the reactor's pool has.
    held: BinaryHeap<Reverse<Held>>,
    next: u64,
}

impl IoChannel for DelayChannel {
    fn submit(&mut self, io: Io, cx: &mut IoCx<'_>) {
        cx.forward(self.base, io);
    }

    fn completed(&mut self, io: Io, cx: &mut IoCx<'_>) {
        let write = match io.op() {
            Op::Read | Op::Compare => false,
            Op::Write { .. } | Op::Unmap | Op::WriteZeroes { .. } | Op::CompareAndWrite { .. } | Op::Copy { .. } => {
                true
            }
            Op::Flush | Op::Reset => return self.pass(io, cx),
        };
        let latency = self.latencies.of(write, self.rng.one_in(100));
        if latency.is_zero() || !io.status().is_success() {
            return self.pass(io, cx);
        }
        self.next += 1;
        self.held.push(Reverse(Held { turn: (cx.now() + latency, self.next), io }));
    }

    fn wants_poll(&self) -> bool {
        true
    }

    fn poll(&mut self, cx: &mut IoCx<'_>) -> Progress {
        let mut busy = false;
        while self.held.peek().is_some_and(|Reverse(first)| first.turn.0 <= cx.now()) {
            let Some(Reverse(Held { io, .. })) = self.held.pop() else { break };
            self.pass(io, cx);
            busy = true;
        }
        Progress::from_busy(busy)
    }

    fn deadline(&self) -> Option<Instant> {
        self.held.peek().map(|Reverse(first)| first.turn.0)
    }

    fn base_channels(&self) -> &[ChannelId] {
        std::slice::from_ref(&self.base)
    }

    fn abort(&mut self, tag: IoTag, cx: &mut IoCx<'_>) -> bool {
        if !self.held.iter().any(|Reverse(held)| held.io.tag() == tag) {
            return false;
        }
        let (found, kept): (Vec<_>, Vec<_>) = self.held.drain().partition(|Reverse(held)| held.io.tag() == tag);
        self.held = kept.into();
        for Reverse(held) in found {
            cx.complete(held.io, IoStatus::Aborted);
        }
        true
    }

    fn abort_all(&mut self, cx: &mut IoCx<'_>) {
        for Reverse(held) in self.held.drain() {
            cx.complete(held.io, IoStatus::Aborted);
        }
        cx.abort_all(self.base);
    }

    fn close(&mut self, cx: &mut ChannelCx<'_>) {
        cx.put_channel(self.base);
    }
}

impl DelayChannel {
    fn pass(&self, io: Io, cx: &mut IoCx<'_>) {
        let status = io.status();
        cx.complete(io, status);
    }
}

/// Creates and registers a slow device on `base`, which it claims. Latencies are microseconds: average read, 99th
/// percentile read, average write, 99th percentile write.
///
/// # Errors
/// As [`BdevSystem::open`] of the base, claiming it, and [`BdevSystem::register`].
pub async fn create(
    system: &Arc<BdevSystem>,
    name: &str,
    uuid: Option<Uuid>,
    base: &str,
    latencies_us: [u64; 4],
) -> Result<Arc<BdevInfo>, BdevError> {
    let base = layer::claim_base(system, name, base, PRODUCT)?;
    let below = Arc::clone(base.bdev());
    let latencies = Arc::new(Latencies(latencies_us.map(AtomicU64::new)));
    let device = Arc::new(Delay { base, latencies });
    layer::register(system, NewBdev { name: name.to_string(), uuid, aliases: Vec::new(), device }, below).await
}

const fn latency(name: &'static str, help: &'static str) -> Param {
    Param::required(name, Kind::U64, help).at_most(MAX_US)
}

const METHODS: &[Method<BdevSystem>] = &[
    Method::new("bdev_delay_create", "Create a bdev that is slower than its base.", |s, p| Box::pin(rpc_create(s, p)))
        .params(&[
            Param::required("name", Kind::Str, "Name of the bdev").at_least(1),
            Param::required("base_bdev_name", Kind::Str, "Name of the bdev to slow down; it must not be in use"),
            latency("avg_read_latency", "Microseconds that reads take longer"),
            latency("p99_read_latency", "Microseconds that one read in a hundred takes longer"),
            latency("avg_write_latency", "Microseconds that writes take longer"),
            latency("p99_write_latency", "Microseconds that one write in a hundred takes longer"),
            Param::optional("uuid", Kind::Uuid, "UUID of the bdev; drawn at random when left out"),
        ])
        .mutates()
        .refuses_with(code::INTERNAL_ERROR)
        .result("name of the bdev"),
    Method::new("bdev_delay_update_latency", "Change a latency of a delay bdev.", |s, p| Box::pin(rpc_update(s, p)))
        .params(&[
            Param::required("delay_bdev_name", Kind::Str, "Name of the bdev"),
            Param::required("latency_type", Kind::Enum(TYPES), "Which latency"),
            latency("latency_us", "Microseconds"),
        ])
        .mutates()
        .refuses_with(code::INTERNAL_ERROR),
    Method::new("bdev_delay_delete", "Delete a delay bdev; its base stays.", |s, p| {
        Box::pin(rpc_delete(s, p, PRODUCT))
    })
    .params(&[Param::required("name", Kind::Str, "Name of the bdev")])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR),
];

async fn rpc_create(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let mut latencies = [0; 4];
    for (latency, name) in latencies.iter_mut().zip(TYPES) {
        *latency = params.u64(&format!("{name}_latency"))?;
    }
    for (kind, [avg, p99]) in [("read", [latencies[0], latencies[1]]), ("write", [latencies[2], latencies[3]])] {
        if avg > p99 {
            let error = RpcError::errno(Errno::INVAL, format!("the average of {avg} us is more than that"));
            let error = error.fix("make it at least as large as the average");
            return Err(params.blame(&format!("p99_{kind}_latency"), error));
        }
    }
    let uuid = take_uuid(&params)?;
    let created = create(&system, params.str("name")?, uuid, params.str("base_bdev_name")?, latencies).await;
    let info = created.map_err(|error| layer::blame_base(&params, "base_bdev_name", error))?;
    Ok(json!(info.name()))
}

async fn rpc_update(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let info = system.get(params.str("delay_bdev_name")?)?;
    let delay = device_as::<Delay>(&info, PRODUCT)?;
    let word = params.str("latency_type")?;
    let index = TYPES.iter().position(|name| *name == word).ok_or_else(|| params.invalid("latency_type", "unknown"))?;
    delay.latencies.0[index].store(params.u64("latency_us")?, Ordering::Relaxed);
    Ok(json!(true))
}

const SUBJECT: Subject = Subject {
    label: "delay",
    block_sizes: &[512],
    forgets: false,
    make: conformance_make,
    resize: Some(|system, spec, blocks| {
        Box::pin(async move { malloc::resize(&system, &format!("{}-base", spec.name), blocks).await })
    }),
};

fn conformance_make(system: Arc<BdevSystem>, spec: Spec) -> BoxFuture<'static, Result<Vec<String>, BdevError>> {
    Box::pin(async move {
        let base = format!("{}-base", spec.name);
        malloc::create(&system, &base, None, malloc::MallocOptions::new(spec.block_size, spec.num_blocks)).await?;
        create(&system, &spec.name, None, &base, [3, 9, 5, 14]).await?;
        Ok(vec![spec.name, base])
    })
}
