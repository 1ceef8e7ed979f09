//! I/O commands: from the wire to the bdev layer and back. Pure: the [`poll_group`](super::poll_group) submits.

use bdev::core::{Geometry, IoStatus, Op};
use reactor::Buffers;
use smallvec::SmallVec;
use zerocopy::FromBytes;

use crate::spec::command::{BlockRange, Copy, CopyRange, DatasetManagement, DsmRange};
use crate::spec::{IoCommand, Status};
use crate::target::admin::copy_limits;

/// One operation of the bdev layer that a command comes to.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) op: Op,
    pub(super) lba: u64,
    pub(super) blocks: u64,
}

/// What a command comes to.
#[derive(Debug)]
pub(super) enum Plan {
    /// One operation with the command's payload.
    One(Piece),
    /// Several, without payload; the command succeeds when all do.
    Many(Pieces),
    /// Nothing to do.
    Done,
}

/// Operations of one command: those of a few ranges need no memory of their own.
pub(super) type Pieces = SmallVec<[Piece; 4]>;

/// Largest number of ranges in one Copy that is reported (MSRC, a count).
pub const MAX_COPY_RANGES: u16 = 16;

/// Blocks of a fused Compare and Write, as Identify Controller reports them (ACWU, a count).
const FUSED_BLOCKS: u32 = 1;

/// Turns a command into operations on a device of this geometry. Shortens `data` where the SGL names more than the
/// command moves.
///
/// # Errors
/// The status that the command completes with.
pub(super) fn plan(command: &IoCommand, geometry: &Geometry, data: &mut Buffers) -> Result<Plan, Status> {
    let read_only = || if geometry.read_only { Err(Status::NAMESPACE_WRITE_PROTECTED.dnr()) } else { Ok(()) };
    match command {
        IoCommand::Read(range) => {
            fit(range, geometry, data)?;
            one(Op::Read, range)
        }
        IoCommand::Write { range, .. } => {
            fit(range, geometry, data)?;
            read_only()?;
            one(Op::Write { fua: range.fua }, range)
        }
        IoCommand::Compare { range, .. } => {
            fit(range, geometry, data)?;
            one(Op::Compare, range)
        }
        IoCommand::WriteZeroes { range, deallocate } => {
            within(range.slba, range.blocks.into(), geometry)?;
            read_only()?;
            one(Op::WriteZeroes { fua: range.fua, may_unmap: *deallocate }, range)
        }
        IoCommand::Flush => Ok(Plan::One(Piece { op: Op::Flush, lba: 0, blocks: 0 })),
        IoCommand::DatasetManagement(dsm) => deallocate(dsm, geometry, data).and_then(|plan| match plan {
            Plan::Done => Ok(plan),
            _ => read_only().map(|()| plan),
        }),
        IoCommand::Copy(copy) => {
            read_only()?;
            copy_ranges(copy, geometry, data)
        }
        IoCommand::WriteUncorrectable(_)
        | IoCommand::Verify(_)
        | IoCommand::ReservationRegister(_)
        | IoCommand::ReservationAcquire(_)
        | IoCommand::ReservationRelease(_)
        | IoCommand::ReservationReport { .. } => Err(Status::INVALID_OPCODE.dnr()),
    }
}

fn one(op: Op, range: &BlockRange) -> Result<Plan, Status> {
    Ok(Plan::One(Piece { op, lba: range.slba, blocks: range.blocks.into() }))
}

fn within(slba: u64, blocks: u64, geometry: &Geometry) -> Result<(), Status> {
    if geometry.contains(slba, blocks) { Ok(()) } else { Err(Status::LBA_OUT_OF_RANGE.dnr()) }
}

/// Checks a range against the device, and the data against the range.
#[inline]
fn fit(range: &BlockRange, geometry: &Geometry, data: &mut Buffers) -> Result<(), Status> {
    within(range.slba, range.blocks.into(), geometry)?;
    let bytes = range.len_bytes(geometry.block_size);
    if (data.len() as u64) < bytes {
        return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
    }
    if data.len() as u64 > bytes {
        data.truncate(bytes as usize);
    }
    Ok(())
}

/// Dataset management: only deallocation does anything; the other attributes are hints (NVM 3.2.3).
fn deallocate(dsm: &DatasetManagement, geometry: &Geometry, data: &Buffers) -> Result<Plan, Status> {
    let count = usize::from(dsm.ranges);
    if data.len() < count * size_of::<DsmRange>() {
        return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
    }
    let mut pieces = Pieces::with_capacity(count);
    for index in 0..count {
        let mut bytes = [0; size_of::<DsmRange>()];
        data.read_at(index * size_of::<DsmRange>(), &mut bytes);
        let range = DsmRange::read_from_bytes(&bytes).map_err(|_| Status::INTERNAL_ERROR)?;
        let (slba, blocks) = (range.slba.get(), u64::from(range.blocks.get()));
        within(slba, blocks, geometry)?;
        if blocks > 0 && dsm.deallocate {
            pieces.push(Piece { op: Op::Unmap, lba: slba, blocks });
        }
    }
    Ok(if pieces.is_empty() { Plan::Done } else { Plan::Many(pieces) })
}

/// Copy, descriptor format 0: the sources are written one behind the other from SDLBA on (NVM 3.2.2).
fn copy_ranges(copy: &Copy, geometry: &Geometry, data: &Buffers) -> Result<Plan, Status> {
    if copy.format != 0 {
        return Err(Status::INVALID_FIELD.dnr());
    }
    let limits = copy_limits(geometry);
    if copy.ranges > limits.ranges {
        return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED.dnr());
    }
    let count = usize::from(copy.ranges);
    if data.len() < count * size_of::<CopyRange>() {
        return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
    }
    let mut pieces = Pieces::with_capacity(count);
    let mut to = copy.sdlba;
    for index in 0..count {
        let mut bytes = [0; size_of::<CopyRange>()];
        data.read_at(index * size_of::<CopyRange>(), &mut bytes);
        let range = CopyRange::read_from_bytes(&bytes).map_err(|_| Status::INTERNAL_ERROR)?;
        let (from, blocks) = (range.slba.get(), u64::from(range.blocks()));
        within(from, blocks, geometry)?;
        within(to, blocks, geometry)?;
        if blocks > limits.range_blocks.into() || to + blocks - copy.sdlba > limits.total_blocks.into() {
            return Err(Status::COMMAND_SIZE_LIMIT_EXCEEDED.dnr());
        }
        pieces.push(Piece { op: Op::Copy { source_lba: from }, lba: to, blocks });
        to += blocks;
    }
    let overlaps = pieces.iter().any(|piece| match piece.op {
        Op::Copy { source_lba } => source_lba < to && copy.sdlba < source_lba + piece.blocks,
        _ => false,
    });
    if overlaps {
        // The pieces run at the same time, so one would read what another has written; and the specification lets a
        // controller refuse this.
        return Err(Status::OVERLAPPING_RANGE.dnr());
    }
    Ok(Plan::Many(pieces))
}

/// The NVMe status of an operation that ended.
pub(super) fn status_of(status: IoStatus) -> Status {
    match status {
        IoStatus::Success => Status::SUCCESS,
        IoStatus::Failed => Status::INTERNAL_ERROR,
        IoStatus::OutOfRange => Status::LBA_OUT_OF_RANGE.dnr(),
        IoStatus::Invalid => Status::INVALID_FIELD.dnr(),
        IoStatus::NotSupported => Status::INVALID_OPCODE.dnr(),
        IoStatus::NoDevice => Status::INVALID_NAMESPACE_OR_FORMAT.dnr(),
        IoStatus::Aborted => Status::ABORT_REQUESTED,
        IoStatus::TimedOut => Status::COMMAND_INTERRUPTED,
        IoStatus::ReadError => Status::UNRECOVERED_READ_ERROR,
        IoStatus::WriteError => Status::WRITE_FAULT,
        IoStatus::CompareFailed => Status::COMPARE_FAILURE.dnr(),
        IoStatus::ReadOnly => Status::NAMESPACE_WRITE_PROTECTED.dnr(),
        IoStatus::NoSpace => Status::CAPACITY_EXCEEDED.dnr(),
        IoStatus::Nvme { sct, sc, dnr } => {
            let status = Status::new(sct, sc);
            if dnr { status.dnr() } else { status }
        }
    }
}

/// Joins a fused Compare and Write, whose data are `compare` and `write`, into one payload.
///
/// # Errors
/// The status of the second command; the first is aborted with it.
pub(super) fn fuse(first: &IoCommand, second: &IoCommand, geometry: &Geometry) -> Result<Piece, Status> {
    let (IoCommand::Compare { range: compare, .. }, IoCommand::Write { range: write, .. }) = (first, second) else {
        return Err(Status::INVALID_FIELD.dnr());
    };
    if (compare.slba, compare.blocks) != (write.slba, write.blocks) {
        return Err(Status::INVALID_FIELD.dnr());
    }
    if write.blocks > FUSED_BLOCKS {
        return Err(Status::ATOMIC_WRITE_UNIT_EXCEEDED.dnr());
    }
    if geometry.read_only {
        return Err(Status::NAMESPACE_WRITE_PROTECTED.dnr());
    }
    Ok(Piece { op: Op::CompareAndWrite { fua: write.fua }, lba: write.slba, blocks: write.blocks.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    fn geometry() -> Geometry {
        Geometry::new(512, 1000)
    }

    fn range(slba: u64, blocks: u32) -> BlockRange {
        BlockRange {
            slba,
            blocks,
            fua: true,
            limited_retry: false,
            prinfo: 0,
            dtype: 0,
            dspec: 0,
            dsm: 0,
            reference_tag: 0,
            app_tag: 0,
            app_mask: 0,
        }
    }

    #[test]
    fn data_is_cut_to_the_range_or_refused() {
        let mut data = Buffers::heap(2048);
        let plan = plan(&IoCommand::Read(range(998, 2)), &geometry(), &mut data).unwrap();
        assert!(matches!(plan, Plan::One(Piece { op: Op::Read, lba: 998, blocks: 2 })));
        assert_eq!(data.len(), 1024);
        let write = IoCommand::Write { range: range(0, 3), fused: false };
        assert_eq!(super::plan(&write, &geometry(), &mut data).unwrap_err(), Status::DATA_SGL_LENGTH_INVALID.dnr());
        let past = IoCommand::Read(range(999, 2));
        assert_eq!(super::plan(&past, &geometry(), &mut data).unwrap_err(), Status::LBA_OUT_OF_RANGE.dnr());
        let wrapping = IoCommand::Read(range(u64::MAX, 2));
        assert_eq!(super::plan(&wrapping, &geometry(), &mut data).unwrap_err(), Status::LBA_OUT_OF_RANGE.dnr());
    }

    fn dsm(ranges: &[(u64, u32)], deallocate: bool) -> (IoCommand, Buffers) {
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|&(slba, blocks)| {
                let range = DsmRange { attributes: 0.into(), blocks: blocks.into(), slba: slba.into() };
                range.as_bytes().to_vec()
            })
            .collect();
        let command =
            DatasetManagement { ranges: ranges.len() as u16, integral_read: false, integral_write: false, deallocate };
        (IoCommand::DatasetManagement(command), Buffers::from(&bytes[..]))
    }

    #[test]
    fn deallocation_checks_every_range_before_it_starts() {
        let (command, mut data) = dsm(&[(0, 8), (100, 0), (992, 8)], true);
        let Plan::Many(pieces) = plan(&command, &geometry(), &mut data).unwrap() else { panic!("two unmaps") };
        assert_eq!(pieces.iter().map(|p| (p.lba, p.blocks)).collect::<Vec<_>>(), [(0, 8), (992, 8)]);
        let (command, mut data) = dsm(&[(0, 8), (993, 8)], true);
        assert_eq!(plan(&command, &geometry(), &mut data).unwrap_err(), Status::LBA_OUT_OF_RANGE.dnr());
        let (command, mut data) = dsm(&[(0, 8)], false);
        assert!(matches!(plan(&command, &geometry(), &mut data), Ok(Plan::Done)));
        let (command, _) = dsm(&[(0, 8), (1, 1)], true);
        let mut short = Buffers::heap(16);
        assert_eq!(plan(&command, &geometry(), &mut short).unwrap_err(), Status::DATA_SGL_LENGTH_INVALID.dnr());
    }

    #[test]
    fn a_fused_pair_must_match() {
        let compare = |r| IoCommand::Compare { range: r, fused: true };
        let write = |r| IoCommand::Write { range: r, fused: true };
        let piece = fuse(&compare(range(5, 1)), &write(range(5, 1)), &geometry()).unwrap();
        assert_eq!((piece.op, piece.lba, piece.blocks), (Op::CompareAndWrite { fua: true }, 5, 1));
        assert!(fuse(&compare(range(5, 1)), &write(range(6, 1)), &geometry()).is_err());
        assert!(fuse(&write(range(5, 1)), &write(range(5, 1)), &geometry()).is_err());
        let two = fuse(&compare(range(5, 2)), &write(range(5, 2)), &geometry());
        assert_eq!(two.unwrap_err(), Status::ATOMIC_WRITE_UNIT_EXCEEDED.dnr());
    }

    #[test]
    fn read_only_devices_refuse_what_changes_them() {
        let geometry = Geometry { read_only: true, ..geometry() };
        let zeroes = IoCommand::WriteZeroes { range: range(0, 1), deallocate: true };
        let refused = Status::NAMESPACE_WRITE_PROTECTED.dnr();
        assert_eq!(plan(&zeroes, &geometry, &mut Buffers::new()).unwrap_err(), refused);
        let (command, mut data) = dsm(&[(0, 8)], true);
        assert_eq!(plan(&command, &geometry, &mut data).unwrap_err(), refused);
        assert!(plan(&IoCommand::Flush, &geometry, &mut Buffers::new()).is_ok());
    }
}
