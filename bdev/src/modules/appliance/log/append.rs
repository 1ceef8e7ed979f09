//! Writing: blocks into batches, batches into the log, the log into the map.

use lz4_flex::block::compress_into_with_table;
use reactor::Buffers;

use super::engine::{Engine, Kind, LogOp, MAX_FLYING, Mode};
use super::format::{
    BATCH_HEADER, BatchHeader, LogPos, NONE, RECORD_BYTES, Record, RecordKind, is_zero, payload_crc, round_up,
    seal_batch,
};
use super::map::{Entry, Loc};
use super::recovery::{BaseOp, apply_record};
use super::space::{HOST_RESERVE, cost};
use crate::core::IoStatus;

/// A batch that is being filled.
pub(super) struct Building {
    /// As long as the largest batch.
    bufs: Buffers,
    /// Bytes that it may have, with everything.
    room: usize,
    /// Bytes of header and payloads.
    used: usize,
    records: Vec<Record>,
    /// Requests with a record in it, each once.
    jobs: Vec<usize>,
}

/// A batch on its way to the base.
pub(super) struct Flying {
    at: LogPos,
    len: u32,
    check: u64,
    next: u32,
    records: Vec<Record>,
    jobs: Vec<usize>,
    result: Option<Result<(), IoStatus>>,
}

/// A block that is ready for a batch, in `packed` or `scratch`, for when there is one with room.
#[derive(Clone, Copy)]
pub(super) struct Prepared {
    job: usize,
    cursor: u64,
    what: Packed,
}

#[derive(Clone, Copy)]
enum Packed {
    Zero,
    Lz4(usize, u32),
    Raw(u32),
}

/// Whether something can be appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    Ready,
    /// When a batch has been written.
    Later,
    /// When a segment is free.
    NoSegment,
    /// Never, as things are.
    NoSpace,
}

impl Engine {
    // ---- requests --------------------------------------------------------------------------------------------------

    /// Puts what waits into batches, in order.
    pub(super) fn process_queue(&mut self) {
        while let Some(&index) = self.queue.front() {
            let room = match self.mode {
                Mode::Running => self.append_job(index),
                Mode::Restarting => Room::Later,
                Mode::Failed(status) => {
                    self.blame(index, status);
                    self.jobs[index].cursor = self.jobs[index].blocks;
                    Room::Ready
                }
            };
            match room {
                Room::Ready => {
                    self.queue.pop_front();
                    if self.jobs[index].pending == 0 {
                        self.end_write(index);
                    }
                }
                Room::NoSpace => self.refuse_front(),
                Room::Later | Room::NoSegment => break,
            }
        }
    }

    /// The first that waits finds no room and ends.
    pub(super) fn refuse_front(&mut self) {
        let Some(index) = self.queue.pop_front() else { return };
        self.prepared = None;
        self.counters.no_space += 1;
        self.blame(index, IoStatus::NoSpace);
        self.jobs[index].cursor = self.jobs[index].blocks;
        if self.jobs[index].pending == 0 {
            self.end_write(index);
        }
    }

    fn append_job(&mut self, index: usize) -> Room {
        let end = self.jobs[index].lba + self.jobs[index].blocks;
        if end > self.superblock.bound {
            // A block number beyond what the superblock says would look like damage.
            if self.checkpointer.is_idle() {
                self.checkpointer.want();
            }
            return Room::Later;
        }
        if !matches!(self.jobs[index].op, LogOp::Write { .. }) {
            let (lba, blocks) = (self.jobs[index].lba, self.jobs[index].blocks);
            let room = self.append_zeroes(index, lba, blocks);
            if room == Room::Ready {
                self.jobs[index].cursor = blocks;
            }
            return room;
        }
        while self.jobs[index].cursor < self.jobs[index].blocks {
            let room = self.append_block(index);
            if room != Room::Ready {
                return room;
            }
            self.jobs[index].cursor += 1;
        }
        Room::Ready
    }

    fn append_block(&mut self, index: usize) -> Room {
        let job = &self.jobs[index];
        let (lba, cursor) = (job.lba + job.cursor, job.cursor);
        let what = match self.prepared {
            Some(prepared) if prepared.job == index && prepared.cursor == cursor => prepared.what,
            _ => self.prepare(index),
        };
        self.prepared = Some(Prepared { job: index, cursor, what });
        let block = u64::from(self.layout.block_size);
        let room = match what {
            Packed::Zero => self.append_zeroes(index, lba, 1),
            Packed::Lz4(..) | Packed::Raw(_) => {
                let (len, crc) = match what {
                    Packed::Lz4(len, crc) => (len as u32, crc),
                    Packed::Raw(crc) => (self.layout.block_size, crc),
                    Packed::Zero => (0, 0),
                };
                match self.admit(lba, len) {
                    Room::Ready => {
                        let packed = std::mem::take(&mut self.packed);
                        let scratch = std::mem::take(&mut self.scratch);
                        let bytes = if let Packed::Lz4(..) = what { &packed[..len as usize] } else { &scratch[..] };
                        let room = self.append(Some(index), lba, RecordKind::Write, bytes, crc);
                        (self.packed, self.scratch) = (packed, scratch);
                        if room == Room::Ready {
                            self.counters.stored_bytes += u64::from(len);
                        }
                        room
                    }
                    other => other,
                }
            }
        };
        if room == Room::Ready {
            self.counters.written_bytes += block;
            self.prepared = None;
        }
        room
    }

    /// Brings a block into the form in which it is stored.
    fn prepare(&mut self, index: usize) -> Packed {
        let block = self.layout.block_size as usize;
        let job = &self.jobs[index];
        job.bufs.read_at(job.cursor as usize * block, &mut self.scratch);
        if is_zero(&self.scratch) {
            return Packed::Zero;
        }
        if self.config.compress
            && let Ok(len) = compress_into_with_table(&self.scratch, &mut self.packed, &mut self.table)
            && len <= block - block / 16
        {
            return Packed::Lz4(len, payload_crc(&self.packed[..len]));
        }
        Packed::Raw(payload_crc(&self.scratch))
    }

    /// Whether the store may take `len` more bytes for a block.
    fn admit(&mut self, lba: u64, len: u32) -> Room {
        let limit = self.space.limit(&self.map);
        let live = self.space.live();
        if live + self.pending_cost + cost(len) <= limit {
            return Room::Ready;
        }
        if self.pending_cost > 0 {
            // What it replaces is known when these are in the map.
            return Room::Later;
        }
        let old = self.map.get(lba).loc;
        let replaced = if old.is_place() { cost(old.bytes()) } else { 0 };
        if live - replaced + cost(len) <= limit || cost(len) <= replaced { Room::Ready } else { Room::NoSpace }
    }

    // ---- batches ---------------------------------------------------------------------------------------------------

    fn append_zeroes(&mut self, job: usize, lba: u64, blocks: u64) -> Room {
        if let Some(building) = &mut self.building
            && let Some(last) = building.records.last_mut()
            && let RecordKind::Zeroes(before) = last.kind
            && last.lba + before == lba
            && building.jobs.last() == Some(&job)
        {
            last.kind = RecordKind::Zeroes(before + blocks);
            return Room::Ready;
        }
        self.append(Some(job), lba, RecordKind::Zeroes(blocks), &[], 0)
    }

    /// Appends a record with its payload. Records of the collector have no job.
    pub(super) fn append(&mut self, job: Option<usize>, lba: u64, kind: RecordKind, bytes: &[u8], crc: u32) -> Room {
        let needed = round_up(bytes.len(), 8);
        let room = self.make_room(needed, job.is_some());
        if room != Room::Ready {
            return room;
        }
        let building = self.building.as_mut().expect("there is room in it");
        let offset = building.used;
        let target = building.bufs.slice_at_mut(offset);
        target[..bytes.len()].copy_from_slice(bytes);
        target[bytes.len()..needed].fill(0);
        building.used += needed;
        building.records.push(Record { lba, kind, offset: offset as u32, len: bytes.len() as u32, crc });
        if kind == RecordKind::Write {
            self.pending_cost += cost(bytes.len() as u32);
        }
        if let Some(job) = job
            && building.jobs.last() != Some(&job)
        {
            building.jobs.push(job);
            self.jobs[job].pending += 1;
        }
        Room::Ready
    }

    /// Sees to it that a record with a payload of `needed` bytes fits into the batch that is being filled.
    fn make_room(&mut self, needed: usize, host: bool) -> Room {
        loop {
            if self.mode != Mode::Running {
                return Room::Later;
            }
            // A segment that the collector began is not for requests to fill.
            if host && self.space.free_count() < self.checkpoint_reserve() + HOST_RESERVE {
                return Room::NoSegment;
            }
            if let Some(building) = &self.building {
                if building.used + needed + (building.records.len() + 1) * RECORD_BYTES <= building.room {
                    return Room::Ready;
                }
                if self.flying.len() >= MAX_FLYING {
                    return Room::Later;
                }
                self.seal(NONE);
                continue;
            }
            if self.flying.len() >= MAX_FLYING {
                return Room::Later;
            }
            // The last unit of a segment is left for the batch that names the next one.
            let left = (self.layout.segment_bytes - self.head.offset - self.layout.align) as usize;
            let room = left.min(self.layout.batch_bytes as usize);
            if room >= BATCH_HEADER + needed + RECORD_BYTES {
                self.open(room);
            } else if !self.next_segment(host) {
                return Room::NoSegment;
            }
        }
    }

    fn open(&mut self, room: usize) {
        let len = self.layout.batch_bytes as usize;
        let bufs = self.batch_bufs.pop().unwrap_or_else(|| Buffers::heap(len));
        self.building = Some(Building { bufs, room, used: BATCH_HEADER, records: Vec::new(), jobs: Vec::new() });
    }

    /// Moves the head to a free segment, if one may be taken.
    fn next_segment(&mut self, host: bool) -> bool {
        let kept = self.checkpoint_reserve() + if host { HOST_RESERVE } else { 0 };
        if self.space.free_count() <= kept {
            return false;
        }
        let Some(next) = self.space.take_head() else { return false };
        let left = self.head.segment;
        self.open(self.layout.align as usize);
        self.seal(next);
        self.space.close_head(left, self.head.seq - 1);
        (self.head.segment, self.head.offset) = (next, 0);
        true
    }

    /// Sends off the batch that is being filled, unless it may wait for more.
    pub(super) fn seal_if_due(&mut self) {
        let Some(building) = &self.building else { return };
        let due = !building.jobs.is_empty() || !self.gc.is_moving();
        if due && self.flying.len() < MAX_FLYING {
            self.seal(NONE);
        }
    }

    fn seal(&mut self, next: u32) {
        let Some(mut building) = self.building.take() else { return };
        let len = round_up(building.used + building.records.len() * RECORD_BYTES, self.layout.align as usize);
        building.bufs.truncate(len);
        let header = BatchHeader {
            seq: self.head.seq,
            epoch: self.superblock.epoch,
            durable: self.durable,
            link: self.head.link,
            len: len as u32,
            next,
            check: 0,
        };
        let bytes = building.bufs.slice_at_mut(0);
        let check = seal_batch(bytes, building.used, &self.superblock.store, &header, &building.records);
        let offset = self.layout.start_of(self.head.segment) + u64::from(self.head.offset);
        self.counters.log_bytes += len as u64;
        self.ask(Kind::Batch, self.head.seq, BaseOp::Write, offset, building.bufs);
        self.flying.push_back(Flying {
            at: self.head,
            len: len as u32,
            check,
            next,
            records: building.records,
            jobs: building.jobs,
            result: None,
        });
        self.head.seq += 1;
        self.head.link = check;
        self.head.offset += len as u32;
    }

    // ---- what was written ------------------------------------------------------------------------------------------

    pub(super) fn batch_done(&mut self, seq: u64, bufs: Buffers, result: Result<(), IoStatus>) {
        self.keep_batch_bufs(bufs);
        if let Some(batch) = self.flying.iter_mut().find(|batch| batch.at.seq == seq) {
            batch.result = Some(result);
        }
        while let Some(Some(result)) = self.flying.front().map(|batch| batch.result) {
            let batch = self.flying.pop_front().expect("just seen");
            match (result, self.mode) {
                (Ok(()), Mode::Running) => self.enter(batch),
                // Behind one that failed: the log does not reach it.
                (Ok(()), Mode::Restarting) => self.forsake(batch, IoStatus::WriteError),
                (Ok(()), Mode::Failed(status)) => self.forsake(batch, status),
                (Err(status), _) => {
                    self.space.spoil(batch.at.segment);
                    self.batch_failed(status);
                    self.forsake(batch, status);
                }
            }
        }
    }

    fn batch_failed(&mut self, status: IoStatus) {
        if self.mode != Mode::Running {
            return;
        }
        if status == IoStatus::NoDevice {
            self.fail("the base bdev is gone", status);
            return;
        }
        tracing::warn!(%status, at = ?self.unapplied, "log store: a write failed; the log goes on in another segment");
        self.mode = Mode::Restarting;
        self.counters.restarts += 1;
        self.gc.give_up();
        self.drop_building(status);
    }

    /// Enters a batch, all of whose predecessors are in the map.
    fn enter(&mut self, batch: Flying) {
        let seq = batch.at.seq;
        self.pending_cost -= records_cost(&batch.records);
        let start = self.layout.start_of(batch.at.segment) + u64::from(batch.at.offset);
        for record in &batch.records {
            let entry = Entry { loc: Loc::new(start + u64::from(record.offset), record.len), crc: record.crc };
            if record.has_payload() {
                self.space.add(entry.loc);
            }
            let space = &mut self.space;
            apply_record(&mut self.map, record, entry, |dead| space.remove(dead, seq));
        }
        let next = if batch.next == NONE { (batch.at.segment, batch.at.offset + batch.len) } else { (batch.next, 0) };
        self.unapplied = LogPos { segment: next.0, offset: next.1, seq: seq + 1, link: batch.check };
        if !self.config.base_volatile {
            self.durable = seq;
            self.space.reap(self.durable, self.gc.victim());
        }
        self.let_go(&batch.jobs, IoStatus::Success);
    }

    fn forsake(&mut self, batch: Flying, status: IoStatus) {
        self.pending_cost -= records_cost(&batch.records);
        self.let_go(&batch.jobs, status);
    }

    fn let_go(&mut self, jobs: &[usize], status: IoStatus) {
        for &index in jobs {
            if !status.is_success() {
                self.blame(index, status);
            }
            let job = &mut self.jobs[index];
            job.pending -= 1;
            if job.pending == 0 && job.cursor == job.blocks && self.queue.front() != Some(&index) {
                self.end_write(index);
            }
        }
    }

    /// Gives up what is being filled.
    pub(super) fn drop_building(&mut self, status: IoStatus) {
        if let Some(building) = self.building.take() {
            self.pending_cost -= records_cost(&building.records);
            self.keep_batch_bufs(building.bufs);
            self.let_go(&building.jobs, status);
        }
    }

    pub(super) fn keep_batch_bufs(&mut self, mut bufs: Buffers) {
        bufs.widen();
        if bufs.len() == self.layout.batch_bytes as usize {
            self.batch_bufs.push(bufs);
        }
    }
}

fn records_cost(records: &[Record]) -> u64 {
    records.iter().filter(|record| record.kind == RecordKind::Write).map(|record| cost(record.len)).sum()
}
