//! Checkpoints: the map, written out, so that what came before need not be replayed.
//!
//! A checkpoint is written while requests go on. It starts by noting where the replay will start: at the first batch that is not
//! in the map. Then chunk after chunk of the map is written as it is at that moment, which may include later batches; replaying
//! these again ends in the same map, since every record says what a block is and not what changes. When all pages are
//! written they are made durable, together with every batch that may show in them; then a superblock names the checkpoint, and
//! when that is durable too, the segments of the one before and those that were only kept for the replay are free.

use super::engine::{Engine, Kind, Mode};
use super::format::{CHUNK_BYTES, LogPos, NONE, PAGE_HEADER, PageHeader, Superblock, put_chunk, round_up, seal_page};
use super::recovery::{BaseOp, slot_of, super_len};
use crate::core::IoStatus;
use reactor::Buffers;

/// Bytes of log after which there is a checkpoint, at least.
const INTERVAL_BYTES: u64 = 64 << 20;
/// Log after which there is a checkpoint, in sizes of the checkpoint.
const INTERVAL_TIMES: u64 = 8;
/// Failures in a row after which the store gives up.
const MAX_FAILURES: u32 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Pages,
    /// Waits for the flush of this number.
    Settle(u64),
    Super,
    SettleSuper(u64),
}

struct Running {
    stage: Stage,
    id: u64,
    /// Where the replay starts, and the ordinal of the segment.
    log: LogPos,
    ordinal: u64,
    segments: Vec<u32>,
    offset: u32,
    cursor: u64,
    pages: u32,
    entries: u64,
    /// A page or a superblock is being written.
    flying: bool,
    superblock: Option<Superblock>,
    /// The log goes on at `log` when it is done.
    restarts: bool,
}

/// The checkpoint that counts and the one that is being written.
pub(super) struct Checkpointer {
    running: Option<Running>,
    next_id: u64,
    segments: Vec<u32>,
    wanted: bool,
    failures: u32,
    /// Bytes of log since the last was started.
    log_bytes_at: u64,
    /// Segments freed when one was last made to make room.
    pub(super) forced_at: Option<u64>,
}

impl Checkpointer {
    pub(super) fn new(id: u64, segments: Vec<u32>) -> Checkpointer {
        Checkpointer {
            running: None,
            next_id: id + 1,
            segments,
            wanted: false,
            failures: 0,
            log_bytes_at: 0,
            forced_at: None,
        }
    }

    /// Asks for one.
    pub(super) fn want(&mut self) {
        self.wanted = true;
    }

    pub(super) fn is_idle(&self) -> bool {
        self.running.is_none() && !self.wanted
    }

    pub(super) fn give_up(&mut self) {
        self.running = None;
        self.wanted = false;
    }
}

impl Engine {
    /// Segments that nobody else may take now.
    pub(super) fn checkpoint_reserve(&self) -> usize {
        let need = self.space.checkpoint_need(&self.map);
        match &self.checkpointer.running {
            Some(running) => need.saturating_sub(running.segments.len()).max(1),
            None => need,
        }
    }

    fn is_checkpoint_due(&self) -> bool {
        let since = self.counters.log_bytes - self.checkpointer.log_bytes_at;
        let size = self.map.chunks() * 40 + self.map.entries() * 12;
        let share = (u64::from(self.layout.segments) / 8).max(2);
        self.checkpointer.wanted
            || since >= INTERVAL_BYTES.max(INTERVAL_TIMES * size)
            || (self.space.chain_len() > share && since > 0)
    }

    pub(super) fn step_checkpoint(&mut self) {
        if self.checkpointer.running.is_none() {
            let start = match self.mode {
                Mode::Running => self.is_checkpoint_due(),
                Mode::Restarting => self.flying.is_empty(),
                Mode::Failed(_) => false,
            };
            if !start || !self.begin_checkpoint() {
                return;
            }
        }
        let Some(running) = &self.checkpointer.running else { return };
        if running.flying {
            return;
        }
        match running.stage {
            Stage::Pages => self.write_page(),
            Stage::Super => self.write_super(),
            Stage::Settle(_) | Stage::SettleSuper(_) => {}
        }
    }

    fn begin_checkpoint(&mut self) -> bool {
        let restarts = self.mode == Mode::Restarting;
        if restarts {
            let left = self.head.segment;
            let Some(segment) = self.space.take_head() else {
                self.fail("no segment is left to go on in", IoStatus::NoSpace);
                return false;
            };
            self.space.close_head(left, self.head.seq - 1);
            // A link that no batch has: nothing that was written before can follow on it.
            self.head = LogPos { segment, offset: 0, seq: self.head.seq, link: self.checkpointer.next_id ^ u64::MAX };
            self.unapplied = self.head;
        }
        let id = self.checkpointer.next_id;
        self.checkpointer.next_id += 1;
        self.checkpointer.wanted = false;
        self.checkpointer.log_bytes_at = self.counters.log_bytes;
        self.checkpointer.running = Some(Running {
            stage: Stage::Pages,
            id,
            log: self.unapplied,
            ordinal: self.space.get(self.unapplied.segment).ordinal,
            segments: Vec::new(),
            offset: 0,
            cursor: 0,
            pages: 0,
            entries: 0,
            flying: false,
            superblock: None,
            restarts,
        });
        true
    }

    fn write_page(&mut self) {
        let layout = self.layout;
        let Some(mut running) = self.checkpointer.running.take() else { return };
        let Some(first) = self.map.next_chunk(running.cursor) else {
            // All of it, or there is nothing at all.
            running.stage = Stage::Settle(self.want_flush());
            self.checkpointer.running = Some(running);
            return;
        };
        if running.segments.is_empty() {
            match self.space.take_page() {
                Some(segment) => running.segments.push(segment),
                None => {
                    self.checkpointer.running = Some(running);
                    return self.checkpoint_failed(IoStatus::NoSpace);
                }
            }
        }
        let segment = *running.segments.last().expect("one was just taken");
        let room = layout.batch_bytes.min(layout.segment_bytes - running.offset) as usize;
        let mut bufs = self.batch_bufs.pop().unwrap_or_else(|| Buffers::heap(layout.batch_bytes as usize));
        let bytes = bufs.slice_at_mut(0);
        let (mut used, mut chunks, mut next_chunk) = (PAGE_HEADER, 0, Some(first));
        while let Some(number) = next_chunk
            && used + CHUNK_BYTES <= room
        {
            let entries = self.map.chunk_entries(number).inspect(|_| running.entries += 1);
            used = put_chunk(bytes, used, number as u32, entries);
            chunks += 1;
            running.cursor = number + 1;
            next_chunk = self.map.next_chunk(running.cursor);
        }
        let len = round_up(used, layout.align as usize);
        let offset = layout.start_of(segment) + u64::from(running.offset);
        running.offset += len as u32;
        let mut next = NONE;
        if next_chunk.is_some() && layout.segment_bytes - running.offset < layout.batch_bytes {
            match self.space.take_page() {
                Some(segment) => next = segment,
                None => {
                    self.keep_batch_bufs(bufs);
                    self.checkpointer.running = Some(running);
                    return self.checkpoint_failed(IoStatus::NoSpace);
                }
            }
            running.segments.push(next);
            running.offset = 0;
        }
        bufs.truncate(len);
        let header = PageHeader {
            checkpoint: running.id,
            index: running.pages,
            len: len as u32,
            used: used as u32,
            next,
            chunks,
        };
        seal_page(bufs.slice_at_mut(0), &self.superblock.store, &header);
        running.pages += 1;
        running.flying = true;
        self.counters.checkpoint_bytes += len as u64;
        self.checkpointer.running = Some(running);
        self.ask(Kind::Page, 0, BaseOp::Write, offset, bufs);
    }

    pub(super) fn page_done(&mut self, bufs: Buffers, result: Result<(), IoStatus>) {
        self.keep_batch_bufs(bufs);
        let Some(running) = &mut self.checkpointer.running else { return };
        running.flying = false;
        if let Err(status) = result {
            for &segment in &running.segments {
                self.space.spoil(segment);
            }
            self.checkpoint_failed(status);
        }
    }

    /// A flush has ended.
    pub(super) fn checkpoint_settled(&mut self) {
        let finished = self.flusher.finished;
        let Some(running) = &mut self.checkpointer.running else { return };
        match running.stage {
            Stage::Settle(ticket) if ticket <= finished => running.stage = Stage::Super,
            Stage::SettleSuper(ticket) if ticket <= finished => self.commit(),
            _ => {}
        }
    }

    fn write_super(&mut self) {
        let Some(running) = &mut self.checkpointer.running else { return };
        let superblock = Superblock {
            generation: self.superblock.generation + 1,
            bound: self.superblock.bound.max(self.most_blocks),
            checkpoint: running.id,
            checkpoint_segment: running.segments.first().copied().unwrap_or(NONE),
            checkpoint_pages: running.pages,
            checkpoint_entries: running.entries,
            log: running.log,
            log_epoch: self.superblock.epoch,
            ..self.superblock
        };
        // An empty checkpoint has no segment, which a reader must not be sent to.
        let superblock =
            if running.pages == 0 { Superblock { checkpoint_segment: 0, ..superblock } } else { superblock };
        running.superblock = Some(superblock);
        running.flying = true;
        let mut bufs = Buffers::heap(super_len(self.config.base_block));
        superblock.encode(bufs.slice_at_mut(0));
        self.ask(Kind::Super, 0, BaseOp::Write, slot_of(superblock.generation), bufs);
    }

    pub(super) fn super_done(&mut self, result: Result<(), IoStatus>) {
        let ticket = match result {
            Ok(()) => self.want_flush(),
            Err(_) => 0,
        };
        let Some(running) = &mut self.checkpointer.running else { return };
        running.flying = false;
        match result {
            Ok(()) => running.stage = Stage::SettleSuper(ticket),
            Err(status) => {
                // It may be there all the same: it is written again to the same place, until it is or the store gives up.
                self.checkpointer.failures += 1;
                if self.checkpointer.failures >= MAX_FAILURES || status == IoStatus::NoDevice {
                    self.fail("its superblock cannot be written", status);
                }
            }
        }
    }

    fn commit(&mut self) {
        let Some(running) = self.checkpointer.running.take() else { return };
        if let Some(superblock) = running.superblock {
            self.superblock = superblock;
        }
        for segment in std::mem::replace(&mut self.checkpointer.segments, running.segments) {
            self.space.give_page(segment);
        }
        self.checkpointer.failures = 0;
        self.counters.checkpoints += 1;
        self.space.set_chain(running.ordinal);
        self.space.reap(self.durable, self.gc.victim());
        if running.restarts && self.mode == Mode::Restarting {
            self.durable = self.durable.max(self.head.seq - 1);
            self.mode = Mode::Running;
        }
    }

    /// Nothing of it counts; it is tried again elsewhere.
    fn checkpoint_failed(&mut self, status: IoStatus) {
        let Some(running) = self.checkpointer.running.take() else { return };
        for segment in running.segments {
            self.space.give_page(segment);
        }
        self.checkpointer.wanted = true;
        self.checkpointer.failures += 1;
        if self.checkpointer.failures >= MAX_FAILURES || status == IoStatus::NoDevice {
            self.fail("checkpoints cannot be written", status);
        }
    }

    /// When nothing can go on that a request waits for: a checkpoint may free what is kept for the replay; if it did not, the request
    /// ends.
    pub(super) fn give_up_if_stuck(&mut self) {
        let waits = !self.queue.is_empty() && self.mode == Mode::Running;
        let busy = !self.flying.is_empty()
            || self.building.is_some()
            || !self.out.is_empty()
            || self.flusher.flying
            || self.flusher.wanted > self.flusher.started
            || !self.checkpointer.is_idle()
            || !(self.gc.is_idle() || self.gc.is_blocked());
        if !waits || busy {
            return;
        }
        let freed = self.space.freed;
        if self.space.would_free(self.durable) {
            self.want_flush();
        } else if self.checkpointer.forced_at == Some(freed) {
            self.refuse_front();
        } else {
            self.checkpointer.forced_at = Some(freed);
            self.checkpointer.want();
            self.step_checkpoint();
        }
    }
}
