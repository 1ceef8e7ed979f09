//! A device that fails when it is told to.
//!
//! Errors are armed by kind of operation and for a number of operations, on all reactors together. An operation for which
//! none is armed costs one load.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::BoxFuture;
use reactor::Progress;
use schema::{ConfigEntry, Errno, Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};
use uuid::Uuid;

use super::common::{device_as, rpc_delete, take_uuid};
use super::layer::Base;
use super::{Module, layer, malloc};
use crate::conformance::{Spec, Subject};
use crate::core::{
    Bdev, BdevError, BdevInfo, BdevSystem, ChannelCx, ChannelId, Geometry, Io, IoChannel, IoCx, IoStatus, IoTag,
    NewBdev, OpKind, OpSet,
};

/// The module.
pub const MODULE: Module = Module { name: "error", methods: METHODS, subjects: &[SUBJECT], examine: None };

const PRODUCT: &str = "Error Injection Disk";
const IO_TYPES: &[&str] = &["clear", "read", "write", "unmap", "flush", "all"];
const ERROR_TYPES: &[&str] = &["failure", "pending", "corrupt_data", "nomem", "nvme_failure"];
const KINDS: usize = OpKind::ALL.len();

/// How an operation is to go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails.
    Failure,
    /// It never ends by itself: a reset, an abort or the removal ends it.
    Pending,
    /// A byte of its payload is changed.
    Corrupt {
        /// Which byte.
        offset: u64,
        /// What its value is combined with, by exclusive or.
        value: u8,
    },
    /// It is put off as if memory had run out, and goes on with the next step.
    NoMemory,
    /// It fails with an NVMe status.
    Nvme {
        /// Status code type.
        sct: u8,
        /// Status code.
        sc: u8,
    },
}

#[derive(Clone, Copy, Debug)]
struct Armed {
    fault: Fault,
    /// Operations that must be outstanding on the channel for the error to happen.
    queue_depth: u64,
}

/// What is armed, by kind of operation.
#[derive(Debug, Default)]
struct Faults {
    left: [AtomicU32; KINDS],
    armed: Mutex<[Option<Armed>; KINDS]>,
}

impl Faults {
    fn arm(&self, kind: OpKind, armed: Armed, count: u32) {
        let mut table = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        table[kind as usize] = Some(armed);
        self.left[kind as usize].store(count, Ordering::Release);
    }

    fn clear(&self) {
        let mut table = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        *table = [None; KINDS];
        self.left.iter().for_each(|left| left.store(0, Ordering::Release));
    }

    /// Draws the fault for an operation, with `outstanding` on its channel, if one that `fits` is armed.
    #[inline]
    fn draw(&self, kind: OpKind, outstanding: u64, fits: impl Fn(Fault) -> bool) -> Option<Fault> {
        if self.left[kind as usize].load(Ordering::Acquire) == 0 {
            return None;
        }
        let table = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        let armed = table[kind as usize].filter(|armed| outstanding >= armed.queue_depth && fits(armed.fault))?;
        let left = &self.left[kind as usize];
        left.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1)).ok()?;
        Some(armed.fault)
    }
}

struct ErrorBdev {
    base: Base,
    faults: Arc<Faults>,
}

impl Bdev for ErrorBdev {
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
        let faults = Arc::clone(&self.faults);
        Ok(Box::new(ErrorChannel { base, faults, pending: Vec::new(), put_off: Vec::new(), outstanding: 0 }))
    }

    fn driver_specific(&self) -> Value {
        json!({ "error_disk": { "base_bdev": self.base.bdev().name() } })
    }

    fn removed(&self) {
        self.base.release();
    }

    fn config(&self, info: &BdevInfo) -> Vec<ConfigEntry> {
        let params = json!({ "base_name": self.base.bdev().name(), "uuid": info.uuid().to_string() });
        vec![ConfigEntry::new("bdev_error_create", params)]
    }

    fn base_bdevs(&self) -> Vec<String> {
        vec![self.base.bdev().name().to_string()]
    }
}

struct ErrorChannel {
    base: ChannelId,
    faults: Arc<Faults>,
    /// Never end by themselves. Both lists are bounded by the I/Os that the reactor's pool has.
    pending: Vec<Io>,
    /// Go on at the next poll.
    put_off: Vec<Io>,
    outstanding: u64,
}

impl ErrorChannel {
    fn end(&mut self, io: Io, status: IoStatus, cx: &mut IoCx<'_>) {
        self.outstanding -= 1;
        cx.complete(io, status);
    }
}

/// Changes a byte of the payload; none when it is shorter.
fn corrupt(io: &mut Io, offset: u64, value: u8) {
    let byte = usize::try_from(offset).ok().and_then(|offset| io.bufs_mut().slice_at_mut(offset).first_mut());
    if let Some(byte) = byte {
        *byte ^= value;
    }
}

impl IoChannel for ErrorChannel {
    fn submit(&mut self, mut io: Io, cx: &mut IoCx<'_>) {
        self.outstanding += 1;
        let kind = io.op().kind();
        // What a read brings is spoiled when it comes home.
        let fits = |fault| kind != OpKind::Read || !matches!(fault, Fault::Corrupt { .. });
        match self.faults.draw(kind, self.outstanding, fits) {
            None => cx.forward(self.base, io),
            Some(Fault::Failure) => self.end(io, IoStatus::Failed, cx),
            Some(Fault::Nvme { sct, sc }) => self.end(io, IoStatus::Nvme { sct, sc, dnr: false }, cx),
            Some(Fault::Pending) => self.pending.push(io),
            Some(Fault::NoMemory) => self.put_off.push(io),
            Some(Fault::Corrupt { offset, value }) => {
                corrupt(&mut io, offset, value);
                cx.forward(self.base, io);
            }
        }
    }

    fn completed(&mut self, mut io: Io, cx: &mut IoCx<'_>) {
        let status = io.status();
        if io.op().kind() == OpKind::Read && status.is_success() {
            let fits = |fault| matches!(fault, Fault::Corrupt { .. });
            if let Some(Fault::Corrupt { offset, value }) = self.faults.draw(OpKind::Read, self.outstanding, fits) {
                corrupt(&mut io, offset, value);
            }
        }
        self.end(io, status, cx);
    }

    fn wants_poll(&self) -> bool {
        true
    }

    fn poll(&mut self, cx: &mut IoCx<'_>) -> Progress {
        let busy = !self.put_off.is_empty();
        for io in self.put_off.drain(..) {
            cx.forward(self.base, io);
        }
        Progress::from_busy(busy)
    }

    fn base_channels(&self) -> &[ChannelId] {
        std::slice::from_ref(&self.base)
    }

    fn abort(&mut self, tag: IoTag, cx: &mut IoCx<'_>) -> bool {
        let find = |list: &mut Vec<Io>| list.iter().position(|io| io.tag() == tag).map(|at| list.swap_remove(at));
        let Some(io) = find(&mut self.pending).or_else(|| find(&mut self.put_off)) else { return false };
        self.end(io, IoStatus::Aborted, cx);
        true
    }

    fn abort_all(&mut self, cx: &mut IoCx<'_>) {
        let held: Vec<Io> = self.pending.drain(..).chain(self.put_off.drain(..)).collect();
        for io in held {
            self.end(io, IoStatus::Aborted, cx);
        }
        cx.abort_all(self.base);
    }

    fn close(&mut self, cx: &mut ChannelCx<'_>) {
        cx.put_channel(self.base);
    }
}

/// The name of the error device on `base`.
pub fn name_on(base: &str) -> String {
    format!("EE_{base}")
}

/// Creates and registers an error device on `base`, which it claims; see [`name_on`].
///
/// # Errors
/// As [`BdevSystem::open`] of the base, claiming it, and [`BdevSystem::register`].
pub async fn create(system: &Arc<BdevSystem>, uuid: Option<Uuid>, base: &str) -> Result<Arc<BdevInfo>, BdevError> {
    // Under the base's own name, whatever it was called by.
    let name = name_on(system.get(base)?.name());
    let base = layer::claim_base(system, &name, base, PRODUCT)?;
    let below = Arc::clone(base.bdev());
    let device = Arc::new(ErrorBdev { base, faults: Arc::default() });
    layer::register(system, NewBdev { name, uuid, aliases: Vec::new(), device }, below).await
}

/// Arms `fault` for the next `count` operations of each of `kinds`; no kinds disarm all.
///
/// # Errors
/// [`BdevError::NotFound`], [`BdevError::WrongKind`].
pub fn inject(
    system: &BdevSystem,
    name: &str,
    kinds: &[OpKind],
    fault: Fault,
    count: u32,
    queue_depth: u64,
) -> Result<(), BdevError> {
    let device = device_as::<ErrorBdev>(&system.get(name)?, PRODUCT)?;
    if kinds.is_empty() {
        device.faults.clear();
    }
    for &kind in kinds {
        device.faults.arm(kind, Armed { fault, queue_depth }, count);
    }
    Ok(())
}

const METHODS: &[Method<BdevSystem>] = &[
    Method::new(
        "bdev_error_create",
        "Create a bdev, EE_ and its base's name, that fails when it is told to.",
        |s, p| Box::pin(rpc_create(s, p)),
    )
    .params(&[
        Param::required("base_name", Kind::Str, "Name of the bdev to put it on; it must not be in use"),
        Param::optional("uuid", Kind::Uuid, "UUID of the bdev; drawn at random when left out"),
    ])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR),
    Method::new("bdev_error_inject_error", "Make the next operations of an error bdev go wrong.", |s, p| {
        Box::pin(rpc_inject(s, p))
    })
    .params(&[
        Param::required("name", Kind::Str, "Name of the error bdev"),
        Param::required("io_type", Kind::Enum(IO_TYPES), "Which operations; clear disarms all"),
        Param::required("error_type", Kind::Enum(ERROR_TYPES), "What happens to them"),
        Param::optional("nvme_sct", Kind::U32, "Status code type of nvme_failure").at_most(7),
        Param::optional("nvme_sc", Kind::U32, "Status code of nvme_failure").at_most(255),
        Param::optional("num", Kind::U32, "How many operations of each kind; 1 when left out").at_least(1),
        Param::optional("queue_depth", Kind::U64, "Only while that many are outstanding on a reactor"),
        Param::optional("corrupt_offset", Kind::U64, "Byte of the payload that corrupt_data changes"),
        Param::optional("corrupt_value", Kind::U8, "What corrupt_data combines it with, by exclusive or").at_least(1),
    ])
    .refuses_with(code::INTERNAL_ERROR),
    Method::new("bdev_error_delete", "Delete an error bdev; its base stays.", |s, p| {
        Box::pin(rpc_delete(s, p, PRODUCT))
    })
    .params(&[Param::required("name", Kind::Str, "Name of the bdev")])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR),
];

async fn rpc_create(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let created = create(&system, take_uuid(&params)?, params.str("base_name")?).await;
    created.map_err(|error| layer::blame_base(&params, "base_name", error))?;
    Ok(json!(true))
}

async fn rpc_inject(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let kinds: &[OpKind] = match params.str("io_type")? {
        "read" => &[OpKind::Read],
        "write" => &[OpKind::Write],
        "unmap" => &[OpKind::Unmap],
        "flush" => &[OpKind::Flush],
        "all" => &OpKind::ALL,
        _ => &[],
    };
    let needed = |field: &str| {
        let error = RpcError::errno(Errno::INVAL, "needed with this error_type");
        params.opt_u64(field).ok_or_else(|| params.blame(field, error))
    };
    let fault = match params.str("error_type")? {
        "pending" => Fault::Pending,
        "nomem" => Fault::NoMemory,
        "corrupt_data" => {
            let value = u8::try_from(needed("corrupt_value")?).unwrap_or(u8::MAX);
            Fault::Corrupt { offset: params.opt_u64("corrupt_offset").unwrap_or(0), value }
        }
        "nvme_failure" => {
            let (sct, sc) = (needed("nvme_sct")?, needed("nvme_sc")?);
            Fault::Nvme { sct: u8::try_from(sct).unwrap_or(7), sc: u8::try_from(sc).unwrap_or(u8::MAX) }
        }
        _ => Fault::Failure,
    };
    let count = params.opt_u32("num").unwrap_or(1);
    inject(&system, params.str("name")?, kinds, fault, count, params.opt_u64("queue_depth").unwrap_or(0))?;
    Ok(json!(true))
}

const SUBJECT: Subject =
    Subject { label: "error", block_sizes: &[512], forgets: false, make: conformance_make, resize: None };

fn conformance_make(system: Arc<BdevSystem>, spec: Spec) -> BoxFuture<'static, Result<Vec<String>, BdevError>> {
    Box::pin(async move {
        // The name of an error device follows from its base's.
        let base = format!("{}-base", spec.name);
        malloc::create(&system, &base, None, malloc::MallocOptions::new(spec.block_size, spec.num_blocks)).await?;
        let error = create(&system, None, &base).await?;
        Ok(vec![error.name().to_string(), base])
    })
}
