//! Clients of the bdev layer: pollers on the reactors that read, write and check.
//!
//! Any number of [`Load`]s on any reactors share one [`Device`]: its [`Model`], and what may go wrong with it at present.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bdev::conformance::Rng;
use bdev::core::runtime::SharedRuntime;
use bdev::core::{
    BdevEvent, BdevInfo, BdevSystem, ChannelId, ClientId, Completion, Descriptor, IoRequest, IoStatus, IoTag, Op,
    OpKind,
};
use reactor::{Buffers, Context, Instant, Poller, PollerId, Progress, Schedule};

use crate::model::{self, Model, ReadToken, Stamp, WriteToken};
use crate::trace;
use crate::world::World;

/// What may go wrong with a device without being the product's fault.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// The medium fails.
    pub media: bool,
    /// There is no room left.
    pub full: bool,
    /// Operations are aborted, by abort, reset or removal.
    pub aborts: bool,
    /// Whoever does the I/O does anything wrong: operations fail, or run out of time.
    pub rogue: bool,
    /// The device below is about to be removed: it refuses I/O before this one hears of it.
    pub base_goes: bool,
    /// The same of a remote namespace, in NVMe's words.
    pub unknown_namespace: bool,
}

/// A device under test, shared by its loads.
pub struct Device {
    /// What it may answer.
    pub model: Model,
    /// What may go wrong.
    pub faults: Faults,
    /// What is written is forgotten.
    pub forgets: bool,
    /// Operations that have succeeded.
    pub succeeded: u64,
    /// Loads that have not ended.
    pub loads: usize,
    /// Loads stop and go away.
    pub stop: bool,
    removing: Arc<AtomicBool>,
    descriptor: Option<Descriptor>,
    bdev: Arc<BdevInfo>,
}

/// A device as its loads hold it.
pub type SharedDevice = Rc<RefCell<Device>>;

impl Device {
    /// Opens the bdev `name`; the model has its first `blocks` blocks, which must read as zeroes.
    ///
    /// # Panics
    /// When it cannot be opened.
    pub fn open(system: &Arc<BdevSystem>, name: &str, blocks: u64, forgets: bool) -> SharedDevice {
        let removing = Arc::new(AtomicBool::new(false));
        let (flag, reactors) = (Arc::clone(&removing), system.reactors().to_vec());
        let on_event = move |event| {
            if event == BdevEvent::Removing {
                flag.store(true, Ordering::Release);
                for reactor in &reactors {
                    // A full mailbox wakes its reactor too.
                    let _ = reactor.send(Box::new(|_| {}));
                }
            }
        };
        let descriptor = system.open(name, true, "a load", Arc::new(on_event)).expect("the device can be opened");
        let bdev = Arc::clone(descriptor.bdev());
        let geometry = bdev.device().geometry();
        Rc::new(RefCell::new(Device {
            model: Model::new(blocks, geometry.block_size, geometry.volatile_cache),
            faults: Faults::default(),
            forgets,
            succeeded: 0,
            loads: 0,
            stop: false,
            removing,
            descriptor: Some(descriptor),
            bdev,
        }))
    }

    /// A device that came back after a power failure, with the model that it had.
    ///
    /// # Panics
    /// As [`Device::open`].
    pub fn reopen(system: &Arc<BdevSystem>, name: &str, mut model: Model) -> SharedDevice {
        model.crashed();
        let device = Device::open(system, name, model.len(), false);
        device.borrow_mut().model = model;
        device
    }

    fn is_ending(&self) -> bool {
        self.stop || self.removing.load(Ordering::Acquire)
    }

    /// Whether its removal has begun.
    pub fn is_removing(&self) -> bool {
        self.removing.load(Ordering::Acquire)
    }

    fn tolerates(&self, status: IoStatus) -> bool {
        match status {
            IoStatus::Success => true,
            IoStatus::NoDevice => self.faults.base_goes || self.is_removing() || self.bdev.is_removing(),
            IoStatus::Failed | IoStatus::TimedOut | IoStatus::Aborted if self.faults.rogue => true,
            IoStatus::Aborted => self.faults.aborts || self.bdev.is_removing(),
            IoStatus::ReadError | IoStatus::WriteError => self.faults.media,
            IoStatus::NoSpace => self.faults.full,
            IoStatus::Nvme { sct: 0, sc: 0x0b, .. } => self.faults.unknown_namespace,
            _ => false,
        }
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("loads", &self.loads).field("succeeded", &self.succeeded).finish_non_exhaustive()
    }
}

/// What a load does.
#[derive(Clone, Copy, Debug)]
pub struct LoadConfig {
    /// Operations in all.
    pub operations: u64,
    /// Operations at once.
    pub depth: usize,
    /// Blocks of one operation at most.
    pub max_blocks: u64,
    /// It only reads, each block once, in order.
    pub sweep: bool,
    /// Resets the device now and then.
    pub resets: bool,
    /// Aborts operations now and then.
    pub aborts: bool,
    /// Copies blocks, too; what is being copied is not written meanwhile.
    pub copies: bool,
    /// Reads, and writes zeroes to, blocks beyond the model's, which may be there or not.
    pub beyond: u64,
}

impl Default for LoadConfig {
    fn default() -> LoadConfig {
        LoadConfig {
            operations: 100,
            depth: 8,
            max_blocks: 64,
            sweep: false,
            resets: false,
            aborts: false,
            copies: false,
            beyond: 0,
        }
    }
}

struct Pending {
    op: Op,
    lba: u64,
    blocks: u64,
    stamp: Stamp,
    write: Option<WriteToken>,
    read: Option<ReadToken>,
    expected: Vec<u8>,
    flush: u64,
    beyond: bool,
    aborted: bool,
    since: Instant,
}

/// A client of one device on one reactor.
pub struct Load {
    device: SharedDevice,
    config: LoadConfig,
    runtime: SharedRuntime,
    client: ClientId,
    channel: Option<ChannelId>,
    poller: PollerId,
    rng: Rng,
    pending: BTreeMap<u64, Pending>,
    next: u64,
    left: u64,
    /// Where a sweep is.
    at: u64,
    pause_until: Instant,
    completions: Vec<Completion>,
}

impl Load {
    /// Puts a load on a reactor.
    ///
    /// # Panics
    /// When the device has no channel for that reactor.
    pub fn start(world: &mut World, reactor: usize, device: &SharedDevice, config: LoadConfig, seed: u64) {
        let runtime = world.runtime(reactor);
        let bdev = Arc::clone(&device.borrow().bdev);
        let (client, channel) = {
            let mut runtime = runtime.borrow_mut();
            let channel = runtime.get_channel(&bdev).expect("the device has a channel");
            (runtime.add_client(), channel)
        };
        device.borrow_mut().loads += 1;
        let cx = world.context(reactor);
        let poller = cx.reserve_poller();
        let load = Load {
            device: Rc::clone(device),
            config,
            runtime,
            client,
            channel: Some(channel),
            poller,
            rng: Rng::new(seed),
            pending: BTreeMap::new(),
            next: 0,
            left: config.operations,
            at: 0,
            pause_until: Instant(0),
            completions: Vec::new(),
        };
        cx.add_reserved_poller(poller, "load", Schedule::Active, Box::new(load));
    }

    fn choose_op(&mut self, device: &Device, beyond: bool) -> Op {
        let geometry = device.bdev.device().geometry();
        let fua = self.rng.one_in(3);
        let op = match self.rng.below(20) {
            0..6 => Op::Read,
            6..12 => Op::Write { fua },
            12 => Op::Flush,
            13 => Op::WriteZeroes { fua, may_unmap: self.rng.one_in(2) },
            14 if geometry.unmap_zeroes => Op::Unmap,
            15 | 16 => Op::Compare,
            17 | 18 => Op::CompareAndWrite { fua },
            _ if self.config.resets && self.rng.one_in(6) => Op::Reset,
            _ => Op::Read,
        };
        let usable = device.bdev.supports(op.kind()) && !(beyond && matches!(op, Op::Reset | Op::Flush));
        if usable { op } else { Op::Read }
    }

    fn choose_range(&mut self, device: &Device, beyond: bool) -> (u64, u64) {
        let top = match self.rng.below(8) {
            0 => self.config.max_blocks,
            1..4 => self.config.max_blocks.min(9),
            _ => 1,
        };
        let blocks = 1 + self.rng.below(top);
        let (from, len) = if beyond { (device.model.len(), self.config.beyond) } else { (0, device.model.len()) };
        let blocks = blocks.min(len);
        // Half of all operations meet on a few blocks.
        let span = if self.rng.one_in(2) { len.min(blocks + 6) } else { len };
        (from + self.rng.below(span - blocks + 1), blocks)
    }

    /// Makes some operations copies, of blocks whose contents are known, and lets none write what is being copied.
    fn with_copies(&mut self, device: &Device, op: Op, (lba, blocks): (u64, u64), beyond: bool) -> (Op, (u64, u64)) {
        if !self.config.copies || beyond {
            return (op, (lba, blocks));
        }
        let mut op = op;
        if op.modifies() && self.rng.one_in(3) && device.bdev.supports(OpKind::Copy) {
            let source_lba = self.rng.below(device.model.len() - blocks + 1);
            // As for requests of hosts: nothing is copied onto itself.
            if device.model.is_known(source_lba, blocks) && source_lba.abs_diff(lba) >= blocks {
                op = Op::Copy { source_lba };
            }
        }
        let is_source = |pending: &Pending| match pending.op {
            Op::Copy { source_lba } => source_lba < lba + blocks && lba < source_lba + pending.blocks,
            _ => false,
        };
        if op.modifies() && self.pending.values().any(is_source) {
            op = Op::Read;
        }
        (op, (lba, blocks))
    }

    /// Submits one operation; `false` when there is no memory for it now.
    fn submit_one(&mut self, now: Instant) -> bool {
        let shared = Rc::clone(&self.device);
        let mut device = shared.borrow_mut();
        let block_size = device.model.block_size();
        let beyond = self.config.beyond > 0 && self.rng.one_in(8);
        let (op, (lba, blocks)) = if self.config.sweep {
            (Op::Read, (self.at, self.config.max_blocks.min(device.model.len() - self.at)))
        } else {
            let mut op = self.choose_op(&device, beyond);
            let (lba, mut blocks) = self.choose_range(&device, beyond);
            if op.payload_bytes(blocks, 1) > self.config.max_blocks {
                // Both halves of the payload have to fit the pool.
                blocks = (blocks / 2).max(1);
                if self.config.max_blocks < 2 {
                    op = Op::Read;
                }
            }
            self.with_copies(&device, op, (lba, blocks), beyond)
        };
        let channel = self.channel.expect("it submits only while it has one");
        let mut runtime = self.runtime.borrow_mut();
        let bytes = op.payload_bytes(blocks, block_size as u32) as usize;
        let Some(mut bufs) = runtime.pool().alloc(bytes) else { return false };
        let pending = prepare(&mut device, &mut self.rng, op, lba, blocks, &mut bufs, beyond, now);
        self.next += 1;
        trace::event(op.kind().name(), lba, blocks, pending.stamp);
        let (lba, blocks) = if matches!(op, Op::Flush | Op::Reset) { (0, 0) } else { (lba, blocks) };
        runtime.submit(channel, self.client, IoRequest { op, lba, blocks, bufs, user: self.next });
        self.pending.insert(self.next, pending);
        self.at += blocks;
        true
    }

    fn finish(&mut self, completion: Completion) {
        let status = completion.status();
        let pending = self.pending.remove(&completion.user()).expect("an operation completes once");
        trace::event("done", pending.lba, pending.blocks, u64::from(status.is_success()));
        let mut device = self.device.borrow_mut();
        let forgiven = device.tolerates(status)
            || pending.aborted && status == IoStatus::Aborted
            || pending.beyond && status == IoStatus::OutOfRange
            || status == IoStatus::CompareFailed && matches!(pending.op, Op::Compare | Op::CompareAndWrite { .. });
        assert!(
            forgiven,
            "{:?} of {} blocks at {} ended with {status}; {:?}",
            pending.op, pending.blocks, pending.lba, device.faults
        );
        device.succeeded += u64::from(status.is_success());
        let checked = settle(&mut device, &pending, status, completion.payload());
        if let Err(why) = checked {
            panic!("{:?} of {} blocks at {}: {why}", pending.op, pending.blocks, pending.lba);
        }
        drop(device);
        self.runtime.borrow_mut().recycle(completion);
    }

    fn is_finished(&self) -> bool {
        let device = self.device.borrow();
        let swept = self.config.sweep && self.at >= device.model.len();
        device.is_ending() || self.left == 0 || swept
    }

    fn end(&mut self, cx: &mut Context) {
        let Some(channel) = self.channel.take() else { return };
        let mut runtime = self.runtime.borrow_mut();
        runtime.put_channel(channel);
        runtime.remove_client(self.client);
        let mut device = self.device.borrow_mut();
        device.loads -= 1;
        if device.loads == 0 {
            device.descriptor = None;
        }
        cx.remove_poller(self.poller);
    }
}

#[allow(clippy::too_many_arguments)]
fn prepare(
    device: &mut Device,
    rng: &mut Rng,
    op: Op,
    lba: u64,
    blocks: u64,
    bufs: &mut Buffers,
    beyond: bool,
    now: Instant,
) -> Pending {
    let block_size = device.model.block_size();
    let forgets = device.forgets || beyond;
    let mut pending = Pending {
        op,
        lba,
        blocks,
        stamp: 0,
        write: None,
        read: None,
        expected: Vec::new(),
        flush: 0,
        beyond,
        aborted: false,
        since: now,
    };
    let writes_stamp = matches!(op, Op::Write { .. } | Op::CompareAndWrite { .. });
    if writes_stamp && !beyond {
        pending.stamp = device.model.stamp();
    }
    let data = model::payload(pending.stamp, lba, blocks, block_size);
    // Not zeroes: a device that leaves the payload alone must not pass.
    bufs.fill(0xa5);
    match op {
        Op::Write { .. } => bufs.write_at(0, &data),
        Op::Compare | Op::CompareAndWrite { .. } => {
            let mut expected = vec![0; data.len()];
            if !forgets {
                for (n, block) in expected.chunks_mut(block_size).enumerate() {
                    let at = lba + n as u64;
                    device.model.image(device.model.guess(at), at, block);
                }
            }
            if rng.one_in(8) {
                expected[0] ^= 1;
            }
            bufs.write_at(0, &expected);
            if matches!(op, Op::CompareAndWrite { .. }) {
                bufs.write_at(expected.len(), &data);
            }
            pending.expected = expected;
        }
        _ => {}
    }
    if beyond {
        return pending;
    }
    if matches!(op, Op::Read | Op::Compare | Op::CompareAndWrite { .. }) {
        pending.read = Some(device.model.read());
    }
    if op.modifies() {
        let stamp = if forgets { 0 } else { pending.stamp };
        pending.write = Some(match op {
            Op::Copy { source_lba } => device.model.copy(source_lba, lba, blocks),
            _ => device.model.write(stamp, lba, blocks),
        });
    }
    if op == Op::Flush {
        pending.flush = device.model.flush();
    }
    pending
}

/// Tells the model how an operation has ended.
fn settle(device: &mut Device, pending: &Pending, status: IoStatus, payload: &Buffers) -> Result<(), String> {
    let &Pending { op, lba, blocks, stamp, write, read, .. } = pending;
    let model = &mut device.model;
    if pending.beyond {
        let zero = op != Op::Read || !status.is_success() || payload.to_vec().iter().all(|&byte| byte == 0);
        return if zero { Ok(()) } else { Err("blocks that nobody wrote are not zeroes".into()) };
    }
    if status == IoStatus::CompareFailed {
        let read = read.ok_or("it compares nothing")?;
        if let Some(write) = write {
            model.refused(write, lba, blocks);
        }
        return model.was_different(read, lba, &pending.expected);
    }
    if !status.is_success() {
        read.into_iter().for_each(|read| model.read_lost(read));
        write.into_iter().for_each(|write| model.lost(write, lba, blocks));
        return Ok(());
    }
    let durable =
        matches!(op, Op::Write { fua: true } | Op::WriteZeroes { fua: true, .. } | Op::CompareAndWrite { fua: true });
    match (op, read, write) {
        (Op::Read, Some(read), _) => model.was_read(read, lba, &payload.to_vec()),
        (Op::Compare, Some(read), _) => model.was_equal(read, lba, &pending.expected),
        (Op::CompareAndWrite { .. }, Some(read), Some(write)) => {
            model.replaced(read, write, lba, &pending.expected, stamp, durable)
        }
        (Op::Flush, ..) => {
            model.flushed(pending.flush);
            Ok(())
        }
        (_, _, Some(write)) => {
            model.wrote(write, lba, blocks, durable);
            Ok(())
        }
        _ => Ok(()),
    }
}

impl Poller for Load {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        if self.channel.is_none() {
            return Progress::Idle;
        }
        let mut completions = std::mem::take(&mut self.completions);
        self.runtime.borrow_mut().take_completions(self.client, &mut completions);
        let mut busy = !completions.is_empty();
        completions.drain(..).for_each(|completion| self.finish(completion));
        self.completions = completions;
        if self.is_finished() {
            if self.pending.is_empty() {
                self.end(cx);
                busy = true;
            }
            return Progress::from_busy(busy);
        }
        self.runtime.borrow_mut().set_now(cx.now());
        while self.left > 0 && self.pending.len() < self.config.depth && cx.now() >= self.pause_until {
            if self.is_finished() {
                break;
            }
            if !self.submit_one(cx.now()) {
                self.pause_until = cx.now() + Duration::from_micros(50);
                break;
            }
            busy = true;
            self.left -= 1;
            if self.rng.one_in(16) {
                self.pause_until = cx.now() + Duration::from_nanos(self.rng.below(3_000_000));
            }
        }
        if self.config.aborts && self.rng.one_in(16) && !self.pending.is_empty() {
            let nth = self.rng.below(self.pending.len() as u64) as usize;
            let (&mark, pending) = self.pending.iter_mut().nth(nth).expect("it is below the length");
            let channel = self.channel.expect("it was just checked");
            // Whether it is found or not: it ends, with its own status or as aborted.
            let found = self.runtime.borrow_mut().abort(channel, IoTag { client: self.client, user: mark });
            pending.aborted |= found;
            // What it ended is on its way through the layer.
            busy |= found;
            trace::event("abort", mark, found.into(), 0);
        }
        if busy {
            let mut runtime = self.runtime.borrow_mut();
            runtime.run();
            runtime.flush();
        }
        Progress::from_busy(busy)
    }

    fn deadline(&self) -> Option<Instant> {
        let waits = self.channel.is_some() && !self.is_finished() && self.pending.len() < self.config.depth;
        waits.then_some(self.pause_until)
    }
}

impl std::fmt::Debug for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let oldest = self.pending.values().map(|pending| pending.since).min();
        f.debug_struct("Load").field("pending", &self.pending.len()).field("oldest", &oldest).finish_non_exhaustive()
    }
}
