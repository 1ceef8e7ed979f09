//! Reading: each block from where the map says, neighbours in the log together.

use lz4_flex::block::decompress_into;
use reactor::Buffers;
use smallvec::SmallVec;

use super::engine::{Engine, Kind, MAX_READS};
use super::format::{payload_crc, round_up};
use super::map::{Entry, Loc};
use super::recovery::BaseOp;
use crate::core::IoStatus;

/// The most bytes that are read at once for blocks that are neighbours in the log.
const RUN_BYTES: usize = 256 * 1024;
/// Reads up to this length have buffers of their own kind.
const SMALL_BYTES: usize = 16 * 1024;

/// A read of the base for a request.
pub(super) struct ReadIo {
    job: usize,
    start: u64,
    segment: u32,
    /// Which block of the request, and where it is in what is read.
    blocks: SmallVec<[(u32, Entry); 4]>,
    is_small: bool,
}

/// The bytes of `loc` as the base can read them: first and length.
pub(super) fn aligned(loc: Loc, align: u32) -> (u64, usize) {
    let align = u64::from(align);
    let start = loc.offset() / align * align;
    let end = (loc.offset() + u64::from(loc.bytes())).div_ceil(align) * align;
    (start, (end - start) as usize)
}

impl Engine {
    /// Asks the base for what reads wait for, in order.
    pub(super) fn process_reads(&mut self) {
        while let Some(&index) = self.read_queue.front() {
            if !self.read_job(index) {
                break;
            }
            self.read_queue.pop_front();
            if self.jobs[index].pending == 0 {
                self.end(index);
            }
        }
    }

    /// Asks for as much of a request as it may; whether that is all.
    fn read_job(&mut self, index: usize) -> bool {
        let block = self.layout.block_size as usize;
        while self.jobs[index].cursor < self.jobs[index].blocks {
            let (lba, cursor) = (self.jobs[index].lba, self.jobs[index].cursor);
            let entry = self.map.get(lba + cursor);
            if entry.loc.is_none() {
                zero(&mut self.jobs[index].bufs, cursor as usize * block, block);
                self.jobs[index].cursor += 1;
            } else if entry.loc.is_lost() {
                self.blame(index, IoStatus::ReadError);
                self.jobs[index].cursor += 1;
            } else if self.reads.len() >= MAX_READS {
                return false;
            } else {
                self.read_run(index, entry);
            }
        }
        true
    }

    /// Asks for a block and those behind it that are its neighbours in the log.
    fn read_run(&mut self, index: usize, first: Entry) {
        let align = self.layout.align;
        let (start, mut len) = aligned(first.loc, align);
        let Some(segment) = self.layout.segment_of(first.loc.offset()) else {
            // The map holds places in segments only.
            self.blame(index, IoStatus::ReadError);
            self.jobs[index].cursor += 1;
            return;
        };
        let segment_end = self.layout.start_of(segment) + u64::from(self.layout.segment_bytes);
        let job = &self.jobs[index];
        let mut blocks: SmallVec<[(u32, Entry); 4]> = SmallVec::new();
        blocks.push((job.cursor as u32, first));
        let mut cursor = job.cursor + 1;
        while cursor < job.blocks {
            let entry = self.map.get(job.lba + cursor);
            let (from, more) = aligned(entry.loc, align);
            let end = from + more as u64;
            let joins = entry.loc.is_place()
                && from >= start
                && from <= start + len as u64
                && end <= segment_end
                && end - start <= RUN_BYTES as u64;
            if !joins {
                break;
            }
            len = len.max((end - start) as usize);
            blocks.push((cursor as u32, entry));
            cursor += 1;
        }
        let is_small = len <= self.small_bytes();
        let mut bufs = self.take_read_bufs(is_small);
        bufs.truncate(len);
        self.space.pin(segment);
        let job = &mut self.jobs[index];
        job.cursor = cursor;
        job.pending += 1;
        let read = self.reads.insert(ReadIo { job: index, start, segment, blocks, is_small });
        self.ask(Kind::Read, read as u64, BaseOp::Read, start, bufs);
    }

    pub(super) fn small_bytes(&self) -> usize {
        let layout = &self.layout;
        round_up(SMALL_BYTES.max((layout.block_size + 2 * layout.align) as usize), layout.align as usize)
    }

    fn take_read_bufs(&mut self, is_small: bool) -> Buffers {
        let small = self.small_bytes();
        let (free, len) =
            if is_small { (&mut self.small_bufs, small) } else { (&mut self.large_bufs, small.max(RUN_BYTES)) };
        free.pop().unwrap_or_else(|| Buffers::heap(len))
    }

    pub(super) fn read_done(&mut self, read: usize, mut bufs: Buffers, result: Result<(), IoStatus>) {
        let read = self.reads.remove(read);
        match result {
            Ok(()) => self.deliver(&read, bufs.slice_at(0)),
            Err(status) => self.blame(read.job, status),
        }
        bufs.widen();
        if !bufs.is_empty() {
            if read.is_small { &mut self.small_bufs } else { &mut self.large_bufs }.push(bufs);
        }
        self.space.unpin(read.segment);
        self.space.reap(self.durable, self.gc.victim());
        let job = &mut self.jobs[read.job];
        job.pending -= 1;
        if job.pending == 0 && job.cursor == job.blocks {
            self.end(read.job);
        }
    }

    fn deliver(&mut self, read: &ReadIo, bytes: &[u8]) {
        let block = self.layout.block_size as usize;
        for &(cursor, entry) in &read.blocks {
            let from = (entry.loc.offset() - read.start) as usize;
            let payload = &bytes[from..from + entry.loc.bytes() as usize];
            let at = cursor as usize * block;
            let job = &mut self.jobs[read.job];
            let is_good = payload_crc(payload) == entry.crc
                && if payload.len() == block {
                    job.bufs.write_at(at, payload);
                    true
                } else {
                    unpack(payload, &mut job.bufs, at, &mut self.scratch)
                };
            if !is_good {
                self.counters.bad_blocks += 1;
                let lba = job.lba + u64::from(cursor);
                tracing::error!(lba, byte = entry.loc.offset(), "log store: a block does not fit its checksum");
                self.blame(read.job, IoStatus::ReadError);
            }
        }
        // A block that waits for a batch with room may have been in there.
        self.prepared = None;
    }
}

/// Decompresses a block to `at` of a payload; `false` when it does not give a whole block.
fn unpack(packed: &[u8], bufs: &mut Buffers, at: usize, scratch: &mut [u8]) -> bool {
    let block = scratch.len();
    let target = bufs.slice_at_mut(at);
    if target.len() >= block {
        return decompress_into(packed, &mut target[..block]).is_ok_and(|len| len == block);
    }
    let whole = decompress_into(packed, scratch).is_ok_and(|len| len == block);
    bufs.write_at(at, scratch);
    whole
}

fn zero(bufs: &mut Buffers, mut at: usize, len: usize) {
    let end = at + len;
    while at < end {
        let piece = bufs.slice_at_mut(at);
        let n = piece.len().min(end - at);
        piece[..n].fill(0);
        at += n;
    }
}
