//! The running store: requests in, operations on the base out, no I/O of its own.
//!
//! Whoever owns an [`Engine`] submits requests, does each operation that [`Engine::next_io`] names, hands the results back in any
//! order, and collects what has ended. There is no thread, no clock and no lock in here: the same code runs on a worker thread and
//! in tests that lose power between any two operations.
//!
//! # A write
//! Its blocks are compressed and packed, behind those of other writes, into a batch, and batches go to the log one after
//! the other, up to [`MAX_FLYING`] at once. When a batch *and all before it* have been written its records are entered into the
//! map; then the write has ended. So the map only ever names what recovery would find too, and what recovery finds is always
//! a beginning of what was submitted.
//!
//! # A flush
//! Ends when a flush of the base has ended that was started after it: what had ended before it was in the map, all of which was
//! written to the base. A base without a volatile cache needs none.
//!
//! # Bounds
//! Requests: what the owner submits, and keeps in order. Memory: [`MAX_FLYING`] + 2 batches, [`MAX_READS`] reads, one window of
//! the garbage collector, and the map.
//!
//! # When the base fails
//! A batch that cannot be written fails its requests; the log then goes on in another segment, by way of a checkpoint. A flush that
//! fails leaves unknown what is durable, and so does a superblock that cannot be written: the store then refuses writes until
//! it is opened again, and goes on reading.

use std::collections::VecDeque;

use lz4_flex::block::{CompressTable, get_maximum_output_size};
use reactor::Buffers;
use slab::Slab;

use super::append::{Building, Flying, Prepared};
use super::checkpoint::Checkpointer;
use super::format::{Layout, LogPos, Superblock};
use super::gc::Collector;
use super::map::Map;
use super::read::ReadIo;
use super::recovery::{BaseIo, BaseOp, Config, Opened};
use super::space::Space;
use crate::core::IoStatus;

/// Batches that are written at once.
pub const MAX_FLYING: usize = 8;
/// Reads of the base for requests at once.
pub const MAX_READS: usize = 64;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogOp {
    /// Fill the payload.
    Read,
    /// Write the payload; with `fua` it is durable at the end.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// The blocks read as zeroes and take no room.
    Zeroes {
        /// Force unit access.
        fua: bool,
    },
    /// All that has ended is durable.
    Flush,
}

/// A request.
#[derive(Debug)]
pub struct Request {
    /// Comes back with the end.
    pub tag: u64,
    /// What to do.
    pub op: LogOp,
    /// First block.
    pub lba: u64,
    /// Blocks.
    pub blocks: u64,
    /// Payload of a read or a write; comes back with the end.
    pub bufs: Buffers,
}

/// A request's end.
#[derive(Debug)]
pub struct Done {
    /// Of the request.
    pub tag: u64,
    /// How it ended.
    pub status: IoStatus,
    /// Its payload.
    pub bufs: Buffers,
}

/// A request on its way.
pub(super) struct Job {
    pub(super) tag: u64,
    pub(super) op: LogOp,
    pub(super) lba: u64,
    pub(super) blocks: u64,
    /// Blocks that have been put into batches, or asked of the base.
    pub(super) cursor: u64,
    /// Batches or reads of the base that it waits for.
    pub(super) pending: u32,
    pub(super) status: IoStatus,
    pub(super) bufs: Buffers,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Running,
    /// The log moves to another segment; writes wait.
    Restarting,
    /// Writes end with this status.
    Failed(IoStatus),
}

/// Which operation of the base ended: the upper byte of its tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Batch = 1,
    Read,
    Flush,
    Page,
    Super,
    Gc,
}

/// Counters of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes of blocks that were written.
    pub written_bytes: u64,
    /// Bytes that they took.
    pub stored_bytes: u64,
    /// Bytes written to the log, with everything.
    pub log_bytes: u64,
    /// Bytes written to checkpoints.
    pub checkpoint_bytes: u64,
    /// Checkpoints.
    pub checkpoints: u64,
    /// Bytes of payload that the garbage collector moved.
    pub moved_bytes: u64,
    /// Segments that it emptied.
    pub collected_segments: u64,
    /// Blocks whose contents did not fit their checksum.
    pub bad_blocks: u64,
    /// Writes that found no room.
    pub no_space: u64,
    /// Times the log moved on after a failed write.
    pub restarts: u64,
}

#[derive(Default)]
pub(super) struct Flusher {
    pub(super) flying: bool,
    /// Number of the last that was started; one in flight at most.
    pub(super) started: u64,
    pub(super) finished: u64,
    pub(super) wanted: u64,
    /// What it makes durable.
    covers: u64,
    /// Requests that wait, each for the flush of that number or a later one.
    waiters: VecDeque<(u64, usize)>,
}

/// The store; see the [module](self).
pub struct Engine {
    pub(super) config: Config,
    pub(super) superblock: Superblock,
    pub(super) layout: Layout,
    pub(super) map: Map,
    pub(super) space: Space,
    pub(super) mode: Mode,
    /// Where the next batch goes. `seq` and `link` are those of the next batch.
    pub(super) head: LogPos,
    /// The first batch that is not in the map yet.
    pub(super) unapplied: LogPos,
    /// Highest sequence number that is known to be durable.
    pub(super) durable: u64,
    pub(super) building: Option<Building>,
    pub(super) flying: VecDeque<Flying>,
    /// Cost of the writes that are in batches and not in the map.
    pub(super) pending_cost: u64,
    /// The most blocks that there were since the store was opened.
    pub(super) most_blocks: u64,
    pub(super) jobs: Slab<Job>,
    /// Writes that are not wholly in batches yet, in order.
    pub(super) queue: VecDeque<usize>,
    /// Reads that have not asked the base for everything yet, in order.
    pub(super) read_queue: VecDeque<usize>,
    pub(super) reads: Slab<ReadIo>,
    pub(super) prepared: Option<Prepared>,
    pub(super) flusher: Flusher,
    pub(super) checkpointer: Checkpointer,
    pub(super) gc: Collector,
    pub(super) out: VecDeque<BaseIo>,
    done: VecDeque<Done>,
    pub(super) batch_bufs: Vec<Buffers>,
    pub(super) small_bufs: Vec<Buffers>,
    pub(super) large_bufs: Vec<Buffers>,
    pub(super) scratch: Vec<u8>,
    pub(super) packed: Vec<u8>,
    pub(super) table: CompressTable,
    pub(super) counters: Counters,
}

impl Engine {
    /// Goes on where the recovery ended.
    pub fn new(config: Config, opened: Opened) -> Engine {
        let layout = opened.superblock.layout;
        let block = layout.block_size as usize;
        let space = Space::new(layout, &opened);
        let mut engine = Engine {
            superblock: opened.superblock,
            layout,
            map: opened.map,
            space,
            mode: Mode::Running,
            head: opened.head,
            unapplied: opened.head,
            durable: opened.head.seq - 1,
            building: None,
            flying: VecDeque::new(),
            pending_cost: 0,
            most_blocks: config.num_blocks,
            jobs: Slab::new(),
            queue: VecDeque::new(),
            read_queue: VecDeque::new(),
            reads: Slab::new(),
            prepared: None,
            flusher: Flusher::default(),
            checkpointer: Checkpointer::new(opened.superblock.checkpoint, opened.checkpoint),
            gc: Collector::default(),
            out: VecDeque::new(),
            done: VecDeque::new(),
            batch_bufs: Vec::new(),
            small_bufs: Vec::new(),
            large_bufs: Vec::new(),
            scratch: vec![0; block],
            packed: vec![0; get_maximum_output_size(block)],
            table: if block < 65535 { CompressTable::small() } else { CompressTable::large() },
            counters: Counters::default(),
            config,
        };
        if opened.start_afresh {
            engine.mode = Mode::Restarting;
        }
        engine
    }

    /// Takes a request. Blocks are bounded by the size, and the payload by them; what does not fit ends as refused.
    pub fn submit(&mut self, request: Request) {
        let Request { tag, op, lba, blocks, bufs } = request;
        let mut job = Job { tag, op, lba, blocks, cursor: 0, pending: 0, status: IoStatus::Success, bufs };
        if op != LogOp::Flush {
            let fits = blocks > 0 && lba.checked_add(blocks).is_some_and(|end| end <= self.config.num_blocks);
            let payload = match op {
                LogOp::Read | LogOp::Write { .. } => blocks.saturating_mul(self.layout.block_size.into()),
                LogOp::Zeroes { .. } | LogOp::Flush => 0,
            };
            if !fits || job.bufs.len() as u64 != payload {
                job.status = if fits { IoStatus::Invalid } else { IoStatus::OutOfRange };
                self.ended(job);
                return;
            }
        }
        let index = self.jobs.insert(job);
        match op {
            LogOp::Read => self.read_queue.push_back(index),
            LogOp::Write { .. } | LogOp::Zeroes { .. } => self.queue.push_back(index),
            LogOp::Flush => self.wait_for_flush(index),
        }
    }

    /// Ends a request early that has not been begun; whether it was.
    pub fn abort(&mut self, tag: u64) -> bool {
        let jobs = &self.jobs;
        let idle = |index: &usize| jobs[*index].tag == tag && jobs[*index].cursor == 0 && jobs[*index].pending == 0;
        let found = match self.queue.iter().position(idle) {
            Some(at) => self.queue.remove(at),
            None => self.read_queue.iter().position(idle).and_then(|at| self.read_queue.remove(at)),
        };
        let Some(index) = found else { return false };
        self.prepared = None;
        self.jobs[index].status = IoStatus::Aborted;
        self.end(index);
        true
    }

    /// The next operation for the base; `None` when there is nothing to do before a result or a request comes.
    pub fn next_io(&mut self) -> Option<BaseIo> {
        if self.out.is_empty() {
            self.pump();
        }
        self.out.pop_front()
    }

    /// The next request that has ended.
    pub fn take_done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }

    /// An operation has ended. Its payload comes back whatever the result.
    pub fn on_io_done(&mut self, tag: u64, bufs: Buffers, result: Result<(), IoStatus>) {
        let low = tag & ((1 << 56) - 1);
        match tag >> 56 {
            kind if kind == Kind::Batch as u64 => self.batch_done(low, bufs, result),
            kind if kind == Kind::Read as u64 => self.read_done(low as usize, bufs, result),
            kind if kind == Kind::Flush as u64 => self.flush_done(result),
            kind if kind == Kind::Page as u64 => self.page_done(bufs, result),
            kind if kind == Kind::Super as u64 => self.super_done(result),
            kind if kind == Kind::Gc as u64 => self.gc_read_done(bufs, result),
            _ => debug_assert!(false, "an operation that was not asked for has ended"),
        }
    }

    pub(super) fn ask(&mut self, kind: Kind, low: u64, op: BaseOp, offset: u64, bufs: Buffers) {
        self.out.push_back(BaseIo { tag: (kind as u64) << 56 | low, op, offset, bufs });
    }

    fn pump(&mut self) {
        // A flush of a base without a cache ends at once, and others may go on then; as when a request was refused.
        loop {
            let before = (self.flusher.finished, self.counters.no_space);
            self.pump_once();
            if !self.out.is_empty() || before == (self.flusher.finished, self.counters.no_space) {
                break;
            }
        }
    }

    fn pump_once(&mut self) {
        self.process_reads();
        self.process_queue();
        self.collect();
        // What the collector made room for, or what it filled.
        self.process_queue();
        self.seal_if_due();
        self.step_checkpoint();
        self.give_up_if_stuck();
        self.step_flush();
    }

    /// Changes the number of blocks. What is beyond the new end is forgotten, for good once a flush that is submitted after this has
    /// ended.
    pub fn resize(&mut self, num_blocks: u64, tag: u64) {
        let old = std::mem::replace(&mut self.config.num_blocks, num_blocks);
        self.most_blocks = self.most_blocks.max(num_blocks);
        if num_blocks < old {
            let (lba, blocks) = (num_blocks, old - num_blocks);
            let op = LogOp::Zeroes { fua: true };
            let job =
                Job { tag, op, lba, blocks, cursor: 0, pending: 0, status: IoStatus::Success, bufs: Buffers::new() };
            let index = self.jobs.insert(job);
            self.queue.push_back(index);
        } else {
            self.ended(Job {
                tag,
                op: LogOp::Flush,
                lba: 0,
                blocks: 0,
                cursor: 0,
                pending: 0,
                status: IoStatus::Success,
                bufs: Buffers::new(),
            });
        }
    }

    /// A change to fewer blocks has failed: they are there as before.
    pub fn unresize(&mut self, num_blocks: u64) {
        self.config.num_blocks = num_blocks;
    }

    /// Gives up every request, and returns their payloads: nothing that is still asked of the base has to do with these.
    pub fn abandon(&mut self) -> impl Iterator<Item = (u64, Buffers)> {
        let ended = std::mem::take(&mut self.done).into_iter().map(|done| (done.tag, done.bufs));
        ended.chain(std::mem::take(&mut self.jobs).into_iter().map(|(_, job)| (job.tag, job.bufs)))
    }

    /// Whether nothing is asked of the base, and no request is left.
    pub fn is_quiet(&self) -> bool {
        self.jobs.is_empty()
            && self.out.is_empty()
            && self.nothing_flies()
            && self.gc.is_idle()
            && self.checkpointer.is_idle()
    }

    pub(super) fn nothing_flies(&self) -> bool {
        self.flying.is_empty() && self.reads.is_empty() && !self.flusher.flying
    }

    /// Counters.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Bytes of payload that are mapped, with what each costs beside it.
    pub fn live_bytes(&self) -> u64 {
        self.space.live()
    }

    /// Blocks that are mapped.
    pub fn mapped_blocks(&self) -> u64 {
        self.map.entries()
    }

    /// Bytes that [`Engine::live_bytes`] may reach.
    pub fn room_bytes(&self) -> u64 {
        self.space.limit(&self.map)
    }

    /// Segments that are free, and all of them.
    pub fn segments(&self) -> (usize, u32) {
        (self.space.free_count(), self.layout.segments)
    }

    /// The status with which writes are refused, once they are.
    pub fn failed(&self) -> Option<IoStatus> {
        if let Mode::Failed(status) = self.mode { Some(status) } else { None }
    }

    /// Blocks of the device.
    pub fn num_blocks(&self) -> u64 {
        self.config.num_blocks
    }

    /// Compares what is counted with what is mapped.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let mut live = vec![0; self.layout.segments as usize];
        for (_, entry) in self.map.iter().filter(|(_, entry)| entry.loc.is_place()) {
            let segment = self.layout.segment_of(entry.loc.offset()).expect("inside of a segment");
            live[segment as usize] += super::space::cost(entry.loc.bytes());
        }
        if self.counters.restarts == 0 && self.failed().is_none() {
            let need = self.checkpoint_reserve();
            assert!(self.space.free_count() > need, "the collector has no room: {need} and {self:?}");
        }
        for (index, live) in live.iter().enumerate() {
            let segment = self.space.get(index as u32);
            assert_eq!(segment.live, *live, "segment {index}: {segment:?}");
            let may_hold = matches!(segment.state, super::space::State::Head | super::space::State::Closed);
            assert!(*live == 0 || may_hold, "segment {index}: {segment:?}");
        }
    }

    // ---- ends ------------------------------------------------------------------------------------------------------

    fn ended(&mut self, job: Job) {
        self.done.push_back(Done { tag: job.tag, status: job.status, bufs: job.bufs });
    }

    pub(super) fn end(&mut self, index: usize) {
        let job = self.jobs.remove(index);
        self.ended(job);
    }

    /// All batches of a write are in the map, or never will be.
    pub(super) fn end_write(&mut self, index: usize) {
        let job = &self.jobs[index];
        let fua = matches!(job.op, LogOp::Write { fua: true } | LogOp::Zeroes { fua: true });
        if fua && job.status.is_success() {
            self.wait_for_flush(index);
        } else {
            self.end(index);
        }
    }

    /// Fails a job with the first error it meets.
    pub(super) fn blame(&mut self, index: usize, status: IoStatus) {
        let job = &mut self.jobs[index];
        if job.status.is_success() {
            job.status = status;
        }
    }

    // ---- flushes ---------------------------------------------------------------------------------------------------

    /// The number of a flush that starts after now.
    pub(super) fn want_flush(&mut self) -> u64 {
        self.flusher.wanted = self.flusher.started + 1;
        self.flusher.wanted
    }

    fn wait_for_flush(&mut self, index: usize) {
        if let Mode::Failed(status) = self.mode {
            self.blame(index, status);
            self.end(index);
        } else if self.durable + 1 == self.unapplied.seq {
            // Everything that has ended is durable already.
            self.end(index);
        } else {
            let ticket = self.want_flush();
            self.flusher.waiters.push_back((ticket, index));
        }
    }

    fn step_flush(&mut self) {
        while !self.flusher.flying && self.flusher.wanted > self.flusher.started {
            self.flusher.started += 1;
            self.flusher.covers = self.unapplied.seq - 1;
            if self.config.base_volatile {
                self.flusher.flying = true;
                self.ask(Kind::Flush, 0, BaseOp::Flush, 0, Buffers::new());
            } else {
                self.flushed();
            }
        }
    }

    fn flush_done(&mut self, result: Result<(), IoStatus>) {
        self.flusher.flying = false;
        match result {
            Ok(()) => self.flushed(),
            Err(status) => self.fail("a flush of the base bdev failed", status),
        }
    }

    fn flushed(&mut self) {
        if matches!(self.mode, Mode::Failed(_)) {
            return;
        }
        self.flusher.finished = self.flusher.started;
        self.durable = self.durable.max(self.flusher.covers);
        while let Some(&(ticket, index)) = self.flusher.waiters.front()
            && ticket <= self.flusher.finished
        {
            self.flusher.waiters.pop_front();
            self.end(index);
        }
        self.space.reap(self.durable, self.gc.victim());
        self.checkpoint_settled();
    }

    /// Refuses writes from here on.
    pub(super) fn fail(&mut self, why: &str, status: IoStatus) {
        if matches!(self.mode, Mode::Failed(_)) {
            return;
        }
        let answer = if status == IoStatus::NoDevice { IoStatus::NoDevice } else { IoStatus::WriteError };
        tracing::error!(%status, "log store: {why}; writes are refused until it is created again, reads go on");
        self.mode = Mode::Failed(answer);
        self.prepared = None;
        for (_, index) in std::mem::take(&mut self.flusher.waiters) {
            self.blame(index, answer);
            self.end(index);
        }
        self.drop_building(answer);
        self.checkpointer.give_up();
        self.gc.give_up();
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("head", &self.head)
            .field("mode", &self.mode)
            .field("map", &self.map)
            .field("space", &self.space)
            .field("gc", &self.gc)
            .field("durable", &self.durable)
            .field("flights", &(self.flying.len(), self.reads.len(), self.flusher.flying, self.checkpointer.is_idle()))
            .finish_non_exhaustive()
    }
}
