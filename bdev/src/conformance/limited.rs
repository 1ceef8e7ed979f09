//! Test devices on top of others: limits, missing operations, delays, completions from elsewhere, lost I/Os.
//!
//! They exist to make the layer do what a device without quirks never asks of it, and they check what the layer promises
//! to modules: an operation that a [`Limited`](LimitedOptions) device gets within its limits, or the check panics.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::BoxFuture;
use reactor::Progress;
use schema::ConfigEntry;

use super::rng::Rng;
use super::{Spec, Subject};
use crate::core::{
    Bdev, BdevError, BdevInfo, BdevSystem, ChannelCx, ChannelId, Geometry, Io, IoChannel, IoCx, IoStatus, IoTag,
    NewBdev, Op, OpKind, OpSet,
};
use crate::modules::layer::Base;
use crate::modules::{layer, malloc};

/// What a limited device puts between the layer and its base.
#[derive(Clone, Copy, Debug)]
pub struct LimitedOptions {
    /// Replaces the base's limits and flags; size and block size stay the base's.
    pub geometry: Geometry,
    /// What it says it does by itself.
    pub native: OpSet,
    /// Steps for which an operation may be held back before or after its base does it; they overtake each other.
    pub delay_steps: u64,
    /// Decides who is held back for how long.
    pub seed: u64,
}

impl LimitedOptions {
    /// No limits and no delays, reads and writes only.
    pub fn new(seed: u64) -> LimitedOptions {
        let native = OpSet::of(&[OpKind::Read, OpKind::Write]);
        LimitedOptions { geometry: Geometry::new(512, 1), native, delay_steps: 0, seed }
    }
}

struct Limited {
    base: Base,
    options: LimitedOptions,
}

impl Limited {
    fn geometry_now(&self) -> Geometry {
        let base = self.base.bdev().device().geometry();
        Geometry {
            block_size: base.block_size,
            num_blocks: base.num_blocks,
            physical_block_size: base.physical_block_size,
            unmap_zeroes: base.unmap_zeroes,
            ..self.options.geometry
        }
    }
}

impl Bdev for Limited {
    fn product_name(&self) -> &'static str {
        "limited"
    }

    fn geometry(&self) -> Geometry {
        self.geometry_now()
    }

    fn native_ops(&self) -> OpSet {
        self.options.native
    }

    fn open_channel(&self, cx: &mut ChannelCx<'_>) -> io::Result<Box<dyn IoChannel>> {
        let seed = self.options.seed ^ u64::from(cx.reactor().0) << 32;
        Ok(Box::new(LimitedChannel {
            base: cx.get_channel(self.base.bdev())?,
            geometry: self.geometry_now(),
            options: self.options,
            rng: Rng::new(seed),
            before: Vec::new(),
            after: Vec::new(),
        }))
    }

    fn removed(&self) {
        self.base.release();
    }

    fn config(&self, _: &BdevInfo) -> Vec<ConfigEntry> {
        Vec::new()
    }
}

struct LimitedChannel {
    base: ChannelId,
    geometry: Geometry,
    options: LimitedOptions,
    rng: Rng,
    /// Held back before the base has seen them, with steps left.
    before: Vec<(Io, u64)>,
    /// Held back after the base has done them.
    after: Vec<(Io, u64)>,
}

impl LimitedChannel {
    /// What the layer promises to modules.
    fn check(&self, io: &Io) {
        let (op, lba, blocks) = (io.op(), io.lba(), io.blocks());
        assert!(self.options.native.contains(op.kind()), "{io:?} is none of the device's operations");
        if matches!(op, Op::Flush | Op::Reset) {
            return;
        }
        let geometry = &self.geometry;
        assert_eq!(io.bufs().len() as u64, op.payload_bytes(blocks, geometry.block_size), "payload of {io:?}");
        let limit = match op {
            Op::Unmap => geometry.max_unmap_blocks,
            Op::WriteZeroes { .. } => geometry.max_write_zeroes_blocks,
            Op::Copy { .. } => geometry.max_copy_blocks,
            _ => {
                let segments = io.bufs().segment_count() as u32;
                assert!(geometry.max_segments == 0 || segments <= geometry.max_segments, "segments of {io:?}");
                let boundary = u64::from(geometry.optimal_io_boundary);
                assert!(boundary == 0 || lba / boundary == (lba + blocks - 1) / boundary, "{io:?} passes a boundary");
                geometry.max_rw_blocks
            }
        };
        assert!(limit == 0 || blocks <= limit.into(), "{io:?} is larger than the device's {limit} blocks");
        assert!(!geometry.read_only || !op.modifies(), "{io:?} reached a read-only device");
    }

    fn steps(&mut self) -> u64 {
        self.rng.below(self.options.delay_steps + 1)
    }

    /// Counts down and takes out one by one, in random order, what is due.
    fn due(rng: &mut Rng, held: &mut Vec<(Io, u64)>) -> Vec<Io> {
        held.iter_mut().for_each(|(_, steps)| *steps = steps.saturating_sub(1));
        let mut due = Vec::new();
        while let Some(count) = Some(held.iter().filter(|(_, steps)| *steps == 0).count()).filter(|&count| count > 0) {
            let nth = rng.below(count as u64) as usize;
            let at = held.iter().enumerate().filter(|(_, (_, steps))| *steps == 0).nth(nth);
            let at = at.expect("there are that many").0;
            due.push(held.swap_remove(at).0);
        }
        due
    }
}

impl IoChannel for LimitedChannel {
    fn submit(&mut self, io: Io, cx: &mut IoCx<'_>) {
        self.check(&io);
        if self.options.delay_steps > 0 && self.rng.one_in(2) {
            let steps = self.steps();
            self.before.push((io, steps));
        } else {
            cx.forward(self.base, io);
        }
    }

    fn completed(&mut self, io: Io, cx: &mut IoCx<'_>) {
        if self.options.delay_steps > 0 && self.rng.one_in(2) {
            let steps = self.steps();
            self.after.push((io, steps));
        } else {
            let status = io.status();
            cx.complete(io, status);
        }
    }

    fn wants_poll(&self) -> bool {
        self.options.delay_steps > 0
    }

    fn poll(&mut self, cx: &mut IoCx<'_>) -> Progress {
        let busy = !self.before.is_empty() || !self.after.is_empty();
        for io in LimitedChannel::due(&mut self.rng, &mut self.before) {
            cx.forward(self.base, io);
        }
        for io in LimitedChannel::due(&mut self.rng, &mut self.after) {
            let status = io.status();
            cx.complete(io, status);
        }
        Progress::from_busy(busy)
    }

    fn base_channels(&self) -> &[ChannelId] {
        std::slice::from_ref(&self.base)
    }

    fn abort(&mut self, tag: IoTag, cx: &mut IoCx<'_>) -> bool {
        for held in [&mut self.before, &mut self.after] {
            if let Some(at) = held.iter().position(|(io, _)| io.tag() == tag) {
                cx.complete(held.swap_remove(at).0, IoStatus::Aborted);
                return true;
            }
        }
        false
    }

    fn abort_all(&mut self, cx: &mut IoCx<'_>) {
        for (io, _) in self.before.drain(..).chain(self.after.drain(..)) {
            cx.complete(io, IoStatus::Aborted);
        }
        cx.abort_all(self.base);
    }

    fn resized(&mut self, geometry: &Geometry) {
        self.geometry = *geometry;
    }

    fn close(&mut self, cx: &mut ChannelCx<'_>) {
        assert!(self.before.is_empty() && self.after.is_empty(), "a channel closes with operations in it");
        cx.put_channel(self.base);
    }
}

/// Puts a limited device on `base`.
///
/// # Errors
/// As claiming the base and registering.
pub async fn limited(
    system: &Arc<BdevSystem>,
    name: &str,
    base: &str,
    options: LimitedOptions,
) -> Result<Arc<BdevInfo>, BdevError> {
    let base = layer::claim_base(system, name, base, "limited")?;
    let below = Arc::clone(base.bdev());
    let device = Arc::new(Limited { base, options });
    layer::register(system, NewBdev { name: name.to_string(), uuid: None, aliases: Vec::new(), device }, below).await
}

/// A RAM disk whose operations end on a thread of its own.
struct Elsewhere {
    block_size: u32,
    num_blocks: u64,
    thread: Sender<Io>,
}

impl Bdev for Elsewhere {
    fn product_name(&self) -> &'static str {
        "elsewhere"
    }

    fn geometry(&self) -> Geometry {
        Geometry::new(self.block_size, self.num_blocks)
    }

    fn native_ops(&self) -> OpSet {
        OpSet::of(&[OpKind::Read, OpKind::Write])
    }

    fn open_channel(&self, _: &mut ChannelCx<'_>) -> io::Result<Box<dyn IoChannel>> {
        Ok(Box::new(ElsewhereChannel(self.thread.clone())))
    }

    fn config(&self, _: &BdevInfo) -> Vec<ConfigEntry> {
        Vec::new()
    }
}

struct ElsewhereChannel(Sender<Io>);

impl IoChannel for ElsewhereChannel {
    fn submit(&mut self, io: Io, _: &mut IoCx<'_>) {
        self.0.send(io).expect("the thread runs while a channel is open");
    }
}

/// Makes a RAM disk whose operations end on a thread of its own; the thread ends with it.
///
/// # Errors
/// As registering.
pub async fn elsewhere(
    system: &BdevSystem,
    name: &str,
    block_size: u32,
    num_blocks: u64,
) -> Result<Arc<BdevInfo>, BdevError> {
    let (thread, work) = channel::<Io>();
    let mut bytes = vec![0u8; num_blocks as usize * block_size as usize];
    std::thread::spawn(move || {
        for mut io in work {
            let at = io.lba() as usize * block_size as usize;
            let len = io.bufs().len();
            match io.op() {
                Op::Read => io.bufs_mut().write_at(0, &bytes[at..at + len]),
                _ => io.bufs().read_at(0, &mut bytes[at..at + len]),
            }
            io.complete(IoStatus::Success);
        }
    });
    let device = Arc::new(Elsewhere { block_size, num_blocks, thread });
    system.register(NewBdev { name: name.to_string(), uuid: None, aliases: Vec::new(), device }).await
}

/// A device with the bug of losing its operations: it drops every other one.
struct Lossy {
    dropped: Arc<Mutex<u64>>,
}

impl Bdev for Lossy {
    fn product_name(&self) -> &'static str {
        "lossy"
    }

    fn geometry(&self) -> Geometry {
        Geometry::new(512, 1024)
    }

    fn native_ops(&self) -> OpSet {
        OpSet::of(&[OpKind::Read, OpKind::Write])
    }

    fn open_channel(&self, _: &mut ChannelCx<'_>) -> io::Result<Box<dyn IoChannel>> {
        Ok(Box::new(LossyChannel { dropped: Arc::clone(&self.dropped), count: 0 }))
    }

    fn config(&self, _: &BdevInfo) -> Vec<ConfigEntry> {
        Vec::new()
    }
}

struct LossyChannel {
    dropped: Arc<Mutex<u64>>,
    count: u64,
}

impl IoChannel for LossyChannel {
    fn submit(&mut self, io: Io, cx: &mut IoCx<'_>) {
        self.count += 1;
        if self.count.is_multiple_of(2) {
            *self.dropped.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            drop(io);
        } else {
            cx.complete(io, IoStatus::Success);
        }
    }
}

/// Makes a device that drops every other operation; counts them.
///
/// # Errors
/// As registering.
pub async fn lossy(system: &BdevSystem, name: &str) -> Result<Arc<Mutex<u64>>, BdevError> {
    let dropped = Arc::default();
    let device = Arc::new(Lossy { dropped: Arc::clone(&dropped) });
    system.register(NewBdev { name: name.to_string(), uuid: None, aliases: Vec::new(), device }).await?;
    Ok(dropped)
}

fn make_limited(
    system: Arc<BdevSystem>,
    spec: Spec,
    options: LimitedOptions,
) -> BoxFuture<'static, Result<Vec<String>, BdevError>> {
    Box::pin(async move {
        let base = format!("{}-base", spec.name);
        malloc::create(&system, &base, None, malloc::MallocOptions::new(spec.block_size, spec.num_blocks)).await?;
        limited(&system, &spec.name, &base, options).await?;
        Ok(vec![spec.name, base])
    })
}

const RESIZE: super::Resize = |system, spec, blocks| {
    Box::pin(async move { malloc::resize(&system, &format!("{}-base", spec.name), blocks).await })
};

/// Devices that make the layer split and emulate whatever can be.
pub const SUBJECTS: &[Subject] = &[
    Subject {
        label: "reads-and-writes-only",
        block_sizes: &[512, 4096],
        forgets: false,
        make: |system, spec| make_limited(system, spec, LimitedOptions::new(1)),
        resize: Some(RESIZE),
    },
    Subject {
        label: "slow-and-out-of-order",
        block_sizes: &[512],
        forgets: false,
        make: |system, spec| make_limited(system, spec, LimitedOptions { delay_steps: 7, ..LimitedOptions::new(2) }),
        resize: Some(RESIZE),
    },
    Subject {
        label: "tight",
        block_sizes: &[512, 4096],
        forgets: false,
        make: |system, spec| {
            let mut options = LimitedOptions { delay_steps: 3, ..LimitedOptions::new(3) };
            options.geometry.max_rw_blocks = 21;
            options.geometry.max_segments = 1;
            options.geometry.optimal_io_boundary = 16;
            make_limited(system, spec, options)
        },
        resize: Some(RESIZE),
    },
    Subject {
        label: "native-but-small",
        block_sizes: &[512],
        forgets: false,
        make: |system, spec| {
            let mut options = LimitedOptions { delay_steps: 2, ..LimitedOptions::new(4) };
            options.native = OpSet::of(&OpKind::ALL);
            options.geometry.max_rw_blocks = 5;
            options.geometry.max_segments = 2;
            options.geometry.max_unmap_blocks = 7;
            options.geometry.max_write_zeroes_blocks = 9;
            options.geometry.max_copy_blocks = 3;
            make_limited(system, spec, options)
        },
        resize: Some(RESIZE),
    },
    Subject {
        label: "elsewhere",
        block_sizes: &[512],
        forgets: false,
        make: |system, spec| {
            Box::pin(async move {
                elsewhere(&system, &spec.name, spec.block_size, spec.num_blocks).await?;
                Ok(vec![spec.name])
            })
        },
        resize: None,
    },
];
