//! What an operation of the bdev layer is on the wire: commands, and memory for payloads that are not the operation's own.

use bdev::core::{Io, IoStatus, Op};
use nvmf::host::{IoQueue, Payload, commands};
use nvmf::spec::Status;
use nvmf::spec::opcode::io as opcode;
use reactor::{Buffers, Instant};

/// Sends the command, or the two, of an operation; how many.
#[inline]
pub(super) fn send(
    queue: &mut IoQueue,
    scratch: &mut Scratch,
    (user, nsid): (u64, u32),
    io: &mut Io,
    now: Instant,
) -> u8 {
    let (lba, blocks) = (io.lba(), io.blocks() as u32);
    let len = io.bufs().len() as u32;
    let (sqe, payload, data) = match io.op() {
        Op::Read => (commands::blocks(opcode::READ, nsid, lba, blocks), Payload::ToHost(len), take(io)),
        Op::Write { fua } => {
            let sqe = commands::with_fua(commands::blocks(opcode::WRITE, nsid, lba, blocks), fua);
            (sqe, Payload::ToController(len), take(io))
        }
        Op::Compare => (commands::blocks(opcode::COMPARE, nsid, lba, blocks), Payload::ToController(len), take(io)),
        Op::Flush | Op::Reset => (commands::plain(opcode::FLUSH, nsid), Payload::None, Buffers::new()),
        Op::WriteZeroes { fua, may_unmap } => {
            let sqe = commands::with_fua(commands::write_zeroes(nsid, lba, blocks, may_unmap), fua);
            (sqe, Payload::None, Buffers::new())
        }
        Op::Unmap => {
            let (sqe, range) = commands::deallocate_one(nsid, lba, blocks);
            (
                sqe,
                Payload::ToController(range.len() as u32),
                scratch.filled(range.len(), |out| out.copy_from_slice(&range)),
            )
        }
        Op::Copy { source_lba } => {
            let piece = CopyPiece::first(lba, source_lba, io.blocks());
            let (sqe, range) = commands::copy_one(nsid, piece.lba, piece.source_lba, piece.blocks as u32);
            (
                sqe,
                Payload::ToController(range.len() as u32),
                scratch.filled(range.len(), |out| out.copy_from_slice(&range)),
            )
        }
        Op::CompareAndWrite { fua } => {
            let half = io.bufs().len() / 2;
            let expected = scratch.filled(half, |out| io.bufs().read_at(0, out));
            let data = scratch.filled(half, |out| io.bufs().read_at(half, out));
            let (compare, write) = commands::compare_and_write(nsid, lba, blocks);
            let write = commands::with_fua(write, fua);
            queue.compare_and_write((user, expected), (user | 1, data), (compare, write), now);
            return 2;
        }
    };
    queue.submit(user, sqe, payload, data, now);
    1
}

/// What of a copy is one command: a controller copies no range onto itself, so ranges that overlap are copied in pieces as
/// long as they are apart; from the end where the copy goes upwards, so that nothing is overwritten before it is read.
pub(super) struct CopyPiece {
    lba: u64,
    source_lba: u64,
    blocks: u64,
    /// The ranges of what is left behind it: destination, source and length.
    pub rest: Option<(u64, u64, u64)>,
}

impl CopyPiece {
    pub fn first(lba: u64, source_lba: u64, blocks: u64) -> CopyPiece {
        let apart = lba.abs_diff(source_lba);
        if apart == 0 || apart >= blocks {
            return CopyPiece { lba, source_lba, blocks, rest: None };
        }
        let left = blocks - apart;
        if lba < source_lba {
            let rest = Some((lba + apart, source_lba + apart, left));
            return CopyPiece { lba, source_lba, blocks: apart, rest };
        }
        CopyPiece { lba: lba + left, source_lba: source_lba + left, blocks: apart, rest: Some((lba, source_lba, left)) }
    }
}

fn take(io: &mut Io) -> Buffers {
    std::mem::take(io.bufs_mut())
}

/// Gives an I/O its payload back. The payload of commands that have another one never left it.
pub(super) fn give_back(io: &mut Io, data: Buffers, scratch: &mut Scratch) {
    if matches!(io.op(), Op::Read | Op::Write { .. } | Op::Compare) {
        *io.bufs_mut() = data;
    } else {
        scratch.put(data);
    }
}

/// Memory for payloads that are not the I/O's own: lists of ranges, and the halves of fused operations. What was used is kept
/// for the next.
#[derive(Default)]
pub(super) struct Scratch(Vec<Buffers>);

impl Scratch {
    /// Pieces that are kept, and the longest of them, bytes.
    const KEPT: usize = 64;
    const KEPT_BYTES: usize = 64 * 1024;

    /// `len` bytes, filled by `fill`.
    fn filled(&mut self, len: usize, fill: impl FnOnce(&mut [u8])) -> Buffers {
        // The one that was put back last fits, where commands are alike.
        let kept = self.0.iter().rposition(|kept| kept.len() >= len);
        let mut list = kept.map_or_else(|| Buffers::heap(len), |at| self.0.swap_remove(at));
        list.truncate(len);
        if let Some(only) = list.segments_mut().next() {
            fill(only);
        }
        list
    }

    pub fn put(&mut self, mut list: Buffers) {
        if list.segment_count() == 1 && self.0.len() < Scratch::KEPT {
            list.widen();
            if list.len() <= Scratch::KEPT_BYTES {
                self.0.push(list);
            }
        }
    }
}

pub(super) fn to_io_status(status: Status) -> IoStatus {
    if status.is_success() {
        return IoStatus::Success;
    }
    if status.same_code(Status::COMPARE_FAILURE) {
        return IoStatus::CompareFailed;
    }
    IoStatus::Nvme { sct: status.sct(), sc: status.sc(), dnr: status.is_dnr() }
}
