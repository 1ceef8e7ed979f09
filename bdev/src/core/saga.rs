//! Split and emulated operations: one I/O, rewritten piece by piece.
//!
//! | operation | when | pieces |
//! |---|---|---|
//! | read, write | over the device's size, segment or boundary limits | views of the payload |
//! | unmap | over the device's limit | ranges |
//! | write zeroes | not native | writes of a zeroed bounce buffer |
//! | write zeroes | over the device's limit | ranges |
//! | compare | not native | reads into a bounce buffer, compared |
//! | copy | not native | read and write of a bounce buffer; backwards where the ranges overlap upwards |
//! | copy | over the device's limit | ranges; backwards where they overlap upwards |
//! | compare and write | not native | range lock, compare as above, writes of the second half, unlock |
//! | flush | not native, no volatile cache | nothing to do |
//! | reset | always | lock of the whole device, abort what can be, drain, unlock |
//!
//! The pieces run one after another on the I/O that came in, so a saga needs no second I/O and cannot starve half way.
//! A piece goes straight to the module: it has passed the channel's gates as a whole.

use reactor::Buffers;

use super::io::{Io, NO_SAGA};
use super::locks::{Scope, Ticket};
use super::runtime::{BOUNCE_BYTES, Channel, ChannelId, IoRuntime};
use super::types::{Geometry, IoStatus, Op, OpKind};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Split,
    ZeroByWrite,
    CompareByRead,
    CopyByReadWrite,
    CompareAndWrite,
    Reset,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The only phase of sagas that do one thing; the first of those that do two.
    First,
    /// The write of a copy or of a compare-and-write.
    Second,
}

/// The index into `in_flight` of I/Os that hold a lock, and so are not waited for by gates.
const LOCKED: u8 = 2;

pub(super) struct Saga {
    kind: Kind,
    phase: Phase,
    channel: ChannelId,
    op: Op,
    lba: u64,
    blocks: u64,
    /// Blocks that are finished in this phase.
    done: u64,
    /// Blocks under way.
    piece: u64,
    /// The payload of the whole operation.
    bufs: Buffers,
    bounce: Buffers,
    bounce_is_reserve: bool,
    ticket: Option<Ticket>,
    pub(super) acks_left: usize,
    /// The I/O while the saga waits for a lock or for memory.
    io: Option<Io>,
}

impl Drop for Saga {
    fn drop(&mut self) {
        if self.io.is_none() && !(self.bufs.is_empty() && self.bounce.is_empty()) {
            // Its runtime ended while a piece was out: a module may still hold views of this memory.
            std::mem::forget(std::mem::take(&mut self.bufs));
            std::mem::forget(std::mem::take(&mut self.bounce));
        }
    }
}

/// Whether a read or write has to be split, and the same test that the pieces have to pass.
#[inline]
fn exceeds_limits(geometry: &Geometry, lba: u64, blocks: u64, segments: usize) -> bool {
    let boundary = u64::from(geometry.optimal_io_boundary);
    geometry.max_rw_blocks != 0 && blocks > geometry.max_rw_blocks.into()
        || boundary != 0 && lba % boundary + blocks > boundary
        || geometry.max_segments != 0 && segments > geometry.max_segments as usize
}

impl Saga {
    /// Whether an I/O cannot go to the module as it is.
    #[inline(always)]
    pub(super) fn is_needed(slot: &Channel, io: &Io) -> bool {
        let geometry = &slot.geometry;
        let op = io.op();
        let limit = match op {
            Op::Read | Op::Write { .. } => {
                return exceeds_limits(geometry, io.lba(), io.blocks(), io.bufs().segment_count())
                    || !slot.native.contains(op.kind());
            }
            Op::Unmap => geometry.max_unmap_blocks,
            Op::WriteZeroes { .. } => geometry.max_write_zeroes_blocks,
            Op::Copy { .. } => geometry.max_copy_blocks,
            Op::Compare | Op::CompareAndWrite { .. } => {
                let most = geometry.max_compare_and_write_blocks;
                let is_long = op != Op::Compare && most != 0 && io.blocks() > most.into();
                return is_long
                    || !slot.native.contains(op.kind())
                    || exceeds_limits(geometry, io.lba(), io.blocks(), io.bufs().segment_count());
            }
            Op::Flush => 0,
            Op::Reset => return true,
        };
        !slot.native.contains(op.kind()) || limit != 0 && io.blocks() > limit.into()
    }

    /// Whether an I/O, when its turn comes, takes a lock: one that the device does by itself does not.
    pub(super) fn takes_lock(slot: &Channel, io: &Io) -> bool {
        match io.op() {
            Op::Reset => true,
            Op::CompareAndWrite { .. } => Saga::is_needed(slot, io),
            _ => false,
        }
    }

    /// What has to be done about an operation for which [`Saga::is_needed`] said yes; `Err` is its end.
    fn plan(slot: &Channel, op: Op) -> Result<Kind, IoStatus> {
        let native = slot.native.contains(op.kind());
        let writes = slot.native.contains(OpKind::Write);
        match op {
            Op::Reset => Ok(Kind::Reset),
            Op::Flush if !slot.geometry.volatile_cache => Err(IoStatus::Success),
            Op::Compare if !native => Ok(Kind::CompareByRead),
            Op::CompareAndWrite { .. } if writes => Ok(Kind::CompareAndWrite),
            Op::Copy { .. } if !native && writes => Ok(Kind::CopyByReadWrite),
            Op::WriteZeroes { .. } if !native && writes => Ok(Kind::ZeroByWrite),
            _ if native => Ok(Kind::Split),
            _ => Err(IoStatus::NotSupported),
        }
    }

    fn needs_bounce(&self) -> bool {
        match self.kind {
            Kind::ZeroByWrite | Kind::CompareByRead | Kind::CopyByReadWrite => true,
            Kind::CompareAndWrite => self.phase == Phase::First,
            Kind::Split | Kind::Reset => false,
        }
    }

    /// Whether a copy has to run from its end to its start, so that it does not read what it has written.
    fn runs_backwards(&self) -> bool {
        matches!(self.op, Op::Copy { source_lba } if self.lba > source_lba && self.lba - source_lba < self.blocks)
    }

    /// Offset of the piece under way from the operation's first block.
    fn offset(&self) -> u64 {
        if self.runs_backwards() { self.blocks - self.done - self.piece } else { self.done }
    }

    /// The size of the next piece under the device's limits, with what it will be rewritten to.
    fn size_next_piece(&mut self, slot: &Channel) {
        let geometry = &slot.geometry;
        let left = self.blocks - self.done;
        let limit = match (self.kind, self.op) {
            (Kind::Split, Op::Unmap) => u64::from(geometry.max_unmap_blocks),
            (Kind::Split, Op::WriteZeroes { .. }) => geometry.max_write_zeroes_blocks.into(),
            (Kind::Split, Op::Copy { .. }) => geometry.max_copy_blocks.into(),
            _ => return self.size_rw_piece(geometry, left),
        };
        self.piece = if limit == 0 { left } else { left.min(limit) };
    }

    fn size_rw_piece(&mut self, geometry: &Geometry, left: u64) {
        let block = u64::from(geometry.block_size);
        let mut piece = left;
        if geometry.max_rw_blocks != 0 {
            piece = piece.min(geometry.max_rw_blocks.into());
        }
        if self.needs_bounce() {
            piece = piece.min(self.bounce.len() as u64 / block);
        }
        let boundary = u64::from(geometry.optimal_io_boundary);
        if boundary != 0 {
            piece = piece.min(self.room_before_boundary(self.lba, boundary));
            if let Op::Copy { source_lba } = self.op {
                piece = piece.min(self.room_before_boundary(source_lba, boundary));
            }
        }
        if geometry.max_segments != 0 {
            let (list, start) = match self.needs_bounce() {
                true => (&self.bounce, 0),
                false => (&self.bufs, self.payload_offset(geometry) as usize),
            };
            let mut bytes = 0;
            for _ in 0..geometry.max_segments {
                bytes += list.slice_at(start + bytes).len();
            }
            piece = piece.min(bytes as u64 / block);
        }
        self.piece = piece;
    }

    /// Blocks that the next piece of the range at `first` may have until it meets a multiple of `boundary`.
    fn room_before_boundary(&self, first: u64, boundary: u64) -> u64 {
        if self.runs_backwards() {
            (first + self.blocks - self.done - 1) % boundary + 1
        } else {
            boundary - (first + self.done) % boundary
        }
    }

    /// Where the payload of the piece under way starts, in bytes.
    fn payload_offset(&self, geometry: &Geometry) -> u64 {
        let half = if self.kind == Kind::CompareAndWrite && self.phase == Phase::Second { self.blocks } else { 0 };
        (half + self.done) * u64::from(geometry.block_size)
    }
}

impl IoRuntime {
    /// Starts the saga that an I/O needs.
    pub(super) fn begin_saga(&mut self, channel: ChannelId, mut io: Io) {
        let slot = &mut self.channels[channel.0 as usize];
        let plan = Saga::plan(slot, io.op());
        let locked = matches!(plan, Ok(Kind::CompareAndWrite | Kind::Reset));
        let epoch = if locked { LOCKED } else { slot.epoch };
        slot.in_flight[epoch as usize] += 1;
        io.body_mut().frames.top().expect("its frame was just pushed").epoch = epoch;
        let kind = match plan {
            Ok(kind) => kind,
            Err(status) => {
                io.body_mut().status = status;
                self.inner.queue.complete(io);
                return;
            }
        };
        let index = self.sagas.vacant_key() as u32;
        let body = io.body_mut();
        body.frames.top().expect("its frame was just pushed").saga = index;
        let saga = Saga {
            kind,
            phase: Phase::First,
            channel,
            op: body.op,
            lba: body.lba,
            blocks: body.blocks,
            done: 0,
            piece: 0,
            bufs: std::mem::take(&mut body.bufs),
            bounce: Buffers::new(),
            bounce_is_reserve: false,
            ticket: None,
            // Set when the lock is admitted and its gates start to close.
            acks_left: usize::MAX,
            io: Some(io),
        };
        let scope = match saga.kind {
            Kind::CompareAndWrite => Some(Scope::Writes { lba: saga.lba, blocks: saga.blocks }),
            Kind::Reset => Some(Scope::All),
            _ => None,
        };
        self.sagas.insert(saga);
        match scope {
            None => self.prepare_bounce(index),
            Some(scope) => {
                let bdev = std::sync::Arc::clone(&self.channels[channel.0 as usize].bdev);
                // The acknowledgements may all come within this call, before the ticket is known here.
                let ticket = self.lock_for_saga(index, &bdev, scope);
                self.sagas[index as usize].ticket = Some(ticket);
                self.saga_ready(index);
            }
        }
    }

    /// Every gate is closed.
    pub(super) fn saga_locked(&mut self, index: u32) {
        self.saga_ready(index);
    }

    /// Goes on once the ticket is known and every gate is closed, whichever comes last.
    fn saga_ready(&mut self, index: u32) {
        let saga = &self.sagas[index as usize];
        if saga.ticket.is_none() || saga.acks_left > 0 {
            return;
        }
        match saga.kind {
            Kind::Reset => {
                let io = self.sagas[index as usize].io.take().expect("a waiting saga holds its I/O");
                self.end_saga(index, io, IoStatus::Success);
            }
            _ => self.prepare_bounce(index),
        }
    }

    /// Gets bounce memory, or waits for it.
    fn prepare_bounce(&mut self, index: u32) {
        let in_turn = self.bounce_waiters.is_empty() || !self.sagas[index as usize].needs_bounce();
        if !in_turn || !self.try_bounce(index) {
            self.bounce_waiters.push_back(index);
        }
    }

    fn try_bounce(&mut self, index: u32) -> bool {
        let saga = &mut self.sagas[index as usize];
        if saga.needs_bounce() && saga.bounce.is_empty() {
            let block_size = self.channels[saga.channel.0 as usize].geometry.block_size;
            let bytes = saga.blocks.saturating_mul(block_size.into()).min(BOUNCE_BYTES as u64) as usize;
            match self.inner.pool.alloc(bytes) {
                Some(bounce) => saga.bounce = bounce,
                None => match self.reserve.take() {
                    Some(reserve) => {
                        saga.bounce = reserve;
                        saga.bounce_is_reserve = true;
                    }
                    None => return false,
                },
            }
            if saga.kind == Kind::ZeroByWrite {
                saga.bounce.fill(0);
            }
        }
        let io = saga.io.take().expect("a waiting saga holds its I/O");
        self.next_piece(index, io);
        true
    }

    /// Retries sagas that wait for memory; whether any went on.
    pub(super) fn feed_bounce_waiters(&mut self) -> bool {
        let mut any = false;
        while let Some(&index) = self.bounce_waiters.front() {
            if !self.try_bounce(index) {
                break;
            }
            self.bounce_waiters.pop_front();
            any = true;
        }
        any
    }

    /// Rewrites the I/O to the next piece and gives it to the module.
    fn next_piece(&mut self, index: u32, mut io: Io) {
        let saga = &mut self.sagas[index as usize];
        let slot = &self.channels[saga.channel.0 as usize];
        let copying_back = saga.kind == Kind::CopyByReadWrite && saga.phase == Phase::Second;
        if !copying_back {
            saga.size_next_piece(slot);
        }
        if saga.piece == 0 {
            // Payload segments shorter than a block under a segment limit: nothing that could be sent.
            return self.end_saga(index, io, IoStatus::Invalid);
        }
        let bytes = (saga.piece * u64::from(slot.geometry.block_size)) as usize;
        let at = saga.payload_offset(&slot.geometry) as usize;
        let offset = saga.offset();
        let body = io.body_mut();
        body.blocks = saga.piece;
        body.lba = saga.lba + offset;
        body.status = IoStatus::Success;
        body.op = match (saga.kind, saga.phase, saga.op) {
            (Kind::ZeroByWrite, _, Op::WriteZeroes { fua, .. }) => Op::Write { fua },
            (Kind::CompareAndWrite, Phase::Second, Op::CompareAndWrite { fua }) => Op::Write { fua },
            (Kind::CompareByRead | Kind::CompareAndWrite, ..) => Op::Read,
            (Kind::CopyByReadWrite, Phase::First, Op::Copy { source_lba }) => {
                body.lba = source_lba + offset;
                Op::Read
            }
            (Kind::CopyByReadWrite, ..) => Op::Write { fua: false },
            (Kind::Split, _, Op::Copy { source_lba }) => Op::Copy { source_lba: source_lba + offset },
            (_, _, op) => op,
        };
        let from_bounce = saga.needs_bounce();
        if body.op.payload_bytes(1, 1) > 0 {
            let (list, at) = if from_bounce { (&mut saga.bounce, 0) } else { (&mut saga.bufs, at) };
            // SAFETY: the list stays in the saga, untouched, until this I/O has come back and its view is dropped in
            // `continue_saga`; should the runtime end before that, `Saga::drop` leaks the memory. Only one piece, so
            // only one view, is out at a time.
            body.bufs = unsafe { list.view(at, bytes) };
        }
        let channel = saga.channel;
        self.give_to_module(channel, io);
    }

    /// A piece has come back.
    pub(super) fn continue_saga(&mut self, index: u32, mut io: Io) {
        io.body_mut().bufs = Buffers::new();
        let status = io.status();
        let saga = &mut self.sagas[index as usize];
        if !status.is_success() {
            return self.end_saga(index, io, status);
        }
        let block_size = self.channels[saga.channel.0 as usize].geometry.block_size;
        match (saga.kind, saga.phase) {
            (Kind::CompareByRead | Kind::CompareAndWrite, Phase::First) => {
                let bytes = (saga.piece * u64::from(block_size)) as usize;
                let at = (saga.done * u64::from(block_size)) as usize;
                if !is_equal(&saga.bufs, at, &saga.bounce, bytes) {
                    return self.end_saga(index, io, IoStatus::CompareFailed);
                }
            }
            (Kind::CopyByReadWrite, Phase::First) => {
                saga.phase = Phase::Second;
                return self.next_piece(index, io);
            }
            (Kind::CopyByReadWrite, Phase::Second) => saga.phase = Phase::First,
            _ => {}
        }
        saga.done += saga.piece;
        if saga.done == saga.blocks {
            if saga.kind != Kind::CompareAndWrite || saga.phase == Phase::Second {
                return self.end_saga(index, io, IoStatus::Success);
            }
            saga.phase = Phase::Second;
            saga.done = 0;
        }
        self.next_piece(index, io);
    }

    /// The operation is over: everything borrowed goes back, and the I/O leaves as it came.
    fn end_saga(&mut self, index: u32, mut io: Io, status: IoStatus) {
        let mut saga = self.sagas.remove(index as usize);
        let bounce = std::mem::take(&mut saga.bounce);
        if saga.bounce_is_reserve {
            self.reserve = Some(bounce);
        } else {
            self.inner.pool.put(bounce);
        }
        let body = io.body_mut();
        body.bufs = std::mem::take(&mut saga.bufs);
        (body.op, body.lba, body.blocks, body.status) = (saga.op, saga.lba, saga.blocks, status);
        let frame = body.frames.top().expect("a saga's I/O has its frame");
        frame.saga = NO_SAGA;
        let frame = *frame;
        if let Some(ticket) = saga.ticket {
            let bdev = std::sync::Arc::clone(&self.channels[saga.channel.0 as usize].bdev);
            self.unlock(&bdev, ticket);
        }
        self.leave(frame, io);
    }
}

/// Whether `bytes` bytes of `payload` from `at` equal the first of `read`.
fn is_equal(payload: &Buffers, at: usize, read: &Buffers, bytes: usize) -> bool {
    let mut done = 0;
    while done < bytes {
        let a = payload.slice_at(at + done);
        let b = read.slice_at(done);
        let n = a.len().min(b.len()).min(bytes - done);
        if a[..n] != b[..n] {
            return false;
        }
        done += n;
    }
    true
}
