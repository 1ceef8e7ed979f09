//! Submission queue entries that a host sends. CID, PSDT and data pointer are left to the transport.

use crate::spec::command::{CopyRange, DsmRange};
use crate::spec::fabrics::Property;
use crate::spec::opcode::{self, admin, fabrics, io};
use crate::spec::{Sqe, Status};
use zerocopy::little_endian::U32;
use zerocopy::{FromZeros, IntoBytes};

/// Most ranges of one Dataset Management (NVM 3.2.3).
pub const MAX_DSM_RANGES: usize = 256;
/// FUSE: the first and the second half.
const FUSE_FIRST: u8 = 1;
const FUSE_SECOND: u8 = 2;
/// Force Unit Access, in dword 12.
const FUA: u32 = 1 << 30;
/// Deallocate, in dword 12 of Write Zeroes.
const DEAC: u32 = 1 << 25;
/// Deallocate, in dword 11 of Dataset Management.
const AD: u32 = 1 << 2;

/// A command with nothing but its opcode and namespace.
pub fn plain(opcode: u8, nsid: u32) -> Sqe {
    let mut sqe = Sqe::new_zeroed();
    (sqe.opcode, sqe.nsid) = (opcode, U32::new(nsid));
    sqe
}

/// A command on a range of blocks.
///
/// # Panics
/// If `blocks` is not 1 to 65536.
#[inline]
pub fn blocks(opcode: u8, nsid: u32, slba: u64, blocks: u32) -> Sqe {
    assert!((1..=65536).contains(&blocks), "{blocks} blocks in one command");
    let mut sqe = plain(opcode, nsid);
    sqe.cdw10 = U32::new(slba as u32);
    sqe.cdw11 = U32::new((slba >> 32) as u32);
    sqe.cdw12 = U32::new(blocks - 1);
    sqe
}

/// The same command, durable when it completes (FUA).
#[must_use]
pub fn with_fua(mut sqe: Sqe, fua: bool) -> Sqe {
    if fua {
        sqe.cdw12 = U32::new(sqe.cdw12.get() | FUA);
    }
    sqe
}

/// Write Zeroes; `may_deallocate` sets DEAC.
pub fn write_zeroes(nsid: u32, slba: u64, count: u32, may_deallocate: bool) -> Sqe {
    let mut sqe = blocks(io::WRITE_ZEROES, nsid, slba, count);
    if may_deallocate {
        sqe.cdw12 = U32::new(sqe.cdw12.get() | DEAC);
    }
    sqe
}

/// The halves of a fused Compare and Write (NVM 3.3).
pub fn compare_and_write(nsid: u32, slba: u64, count: u32) -> (Sqe, Sqe) {
    let (mut compare, mut write) = (blocks(io::COMPARE, nsid, slba, count), blocks(io::WRITE, nsid, slba, count));
    compare.flags |= FUSE_FIRST;
    write.flags |= FUSE_SECOND;
    (compare, write)
}

/// Dataset Management that deallocates ranges given as first block and count, and its data.
///
/// # Panics
/// If there are not 1 to 256 ranges.
pub fn deallocate(nsid: u32, ranges: &[(u64, u32)]) -> (Sqe, Vec<u8>) {
    assert!((1..=MAX_DSM_RANGES).contains(&ranges.len()), "{} ranges in one command", ranges.len());
    let mut sqe = plain(io::DATASET_MANAGEMENT, nsid);
    sqe.cdw10 = U32::new(ranges.len() as u32 - 1);
    sqe.cdw11 = U32::new(AD);
    let mut data = Vec::with_capacity(size_of_val(ranges));
    for &(slba, blocks) in ranges {
        data.extend_from_slice(&dsm_range(slba, blocks));
    }
    (sqe, data)
}

/// The same for one range.
pub fn deallocate_one(nsid: u32, slba: u64, blocks: u32) -> (Sqe, [u8; size_of::<DsmRange>()]) {
    let mut sqe = plain(io::DATASET_MANAGEMENT, nsid);
    sqe.cdw11 = U32::new(AD);
    (sqe, dsm_range(slba, blocks))
}

fn dsm_range(slba: u64, blocks: u32) -> [u8; size_of::<DsmRange>()] {
    zerocopy::transmute!(DsmRange { attributes: 0.into(), blocks: blocks.into(), slba: slba.into() })
}

/// Copy of ranges given as first block and count (1 to 65536) to `to`, descriptor format 0, and its data.
///
/// # Panics
/// If there are not 1 to 256 ranges.
pub fn copy(nsid: u32, to: u64, ranges: &[(u64, u32)]) -> (Sqe, Vec<u8>) {
    assert!((1..=256).contains(&ranges.len()), "{} source ranges in one command", ranges.len());
    let mut sqe = plain(io::COPY, nsid);
    sqe.cdw10 = U32::new(to as u32);
    sqe.cdw11 = U32::new((to >> 32) as u32);
    sqe.cdw12 = U32::new(ranges.len() as u32 - 1);
    let mut data = Vec::new();
    for &(slba, blocks) in ranges {
        data.extend_from_slice(CopyRange::new(slba, blocks).as_bytes());
    }
    (sqe, data)
}

/// The same for one range.
pub fn copy_one(nsid: u32, to: u64, slba: u64, blocks: u32) -> (Sqe, [u8; size_of::<CopyRange>()]) {
    let mut sqe = plain(io::COPY, nsid);
    sqe.cdw10 = U32::new(to as u32);
    sqe.cdw11 = U32::new((to >> 32) as u32);
    (sqe, zerocopy::transmute!(CopyRange::new(slba, blocks)))
}

/// Identify (Base 5.1.13).
pub fn identify(cns: u8, nsid: u32) -> Sqe {
    let mut sqe = plain(admin::IDENTIFY, nsid);
    sqe.cdw10 = U32::new(cns.into());
    sqe
}

/// Get Log Page (Base 5.1.12) of `len` bytes from `offset` on; `retain` keeps the event that is about it.
///
/// # Panics
/// If `len` is not a multiple of 4 above 0, or `offset` is not a multiple of 4.
pub fn get_log_page(lid: u8, lsp: u8, offset: u64, len: u32, retain: bool) -> Sqe {
    assert!(len > 0 && len.is_multiple_of(4) && offset.is_multiple_of(4), "logs are read in dwords");
    let dwords = len / 4 - 1;
    let mut sqe = plain(admin::GET_LOG_PAGE, crate::spec::command::NSID_ALL);
    sqe.cdw10 = U32::new(u32::from(lid) | u32::from(lsp) << 8 | u32::from(retain) << 15 | dwords << 16);
    sqe.cdw11 = U32::new(dwords >> 16);
    sqe.cdw12 = U32::new(offset as u32);
    sqe.cdw13 = U32::new((offset >> 32) as u32);
    sqe
}

/// Set Features without data (Base 5.1.25).
pub fn set_features(fid: u8, value: u32) -> Sqe {
    let mut sqe = plain(admin::SET_FEATURES, 0);
    (sqe.cdw10, sqe.cdw11) = (U32::new(fid.into()), U32::new(value));
    sqe
}

/// Abort (Base 5.1.1) of command `cid` of queue `sqid`.
pub fn abort(sqid: u16, cid: u16) -> Sqe {
    let mut sqe = plain(admin::ABORT, 0);
    sqe.cdw10 = U32::new(u32::from(cid) << 16 | u32::from(sqid));
    sqe
}

/// Property Get (Base 6.5).
pub fn property_get(property: Property) -> Sqe {
    property_command(fabrics::PROPERTY_GET, property)
}

/// Property Set of a property of 4 bytes (Base 6.6).
pub fn property_set(property: Property, value: u32) -> Sqe {
    let mut sqe = property_command(fabrics::PROPERTY_SET, property);
    sqe.cdw12 = U32::new(value);
    sqe
}

fn property_command(fctype: u8, property: Property) -> Sqe {
    let mut sqe = plain(opcode::FABRICS, fctype.into());
    sqe.cdw10 = U32::new(u32::from(property.size_bytes() == 8));
    sqe.cdw11 = U32::new(property.offset());
    sqe
}

/// Connect (Base 6.3) of queue `qid` with so many entries. I/O queues go without SQ flow control: their slots bound
/// them, and successful reads need no response then.
pub fn connect(qid: u16, entries: u16, kato_ms: u32) -> Sqe {
    let mut sqe = plain(opcode::FABRICS, fabrics::CONNECT.into());
    sqe.cdw10 = U32::new(u32::from(qid) << 16);
    let cattr = if qid == 0 { 0 } else { 4 << 16 };
    sqe.cdw11 = U32::new(u32::from(entries - 1) | cattr);
    sqe.cdw12 = U32::new(kato_ms);
    sqe
}

/// Whether a command that completed like this can succeed if it is sent again, as far as the status says.
pub fn may_retry(status: Status) -> bool {
    !status.is_success() && !status.is_dnr()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::command::{AdminCommand, LogOffset};
    use crate::spec::{FabricsCommand, IoCommand};

    /// What the target makes of them: its parser wants PSDT.
    fn sgl(mut sqe: Sqe) -> Sqe {
        sqe.flags |= 1 << 6;
        sqe
    }

    #[test]
    fn the_target_reads_what_was_meant() {
        let IoCommand::Write { range, fused: false } =
            IoCommand::parse(&sgl(with_fua(blocks(io::WRITE, 3, 1 << 40, 65536), true))).unwrap()
        else {
            panic!()
        };
        assert_eq!((range.slba, range.blocks, range.fua), (1 << 40, 65536, true));
        let IoCommand::WriteZeroes { range, deallocate: true } =
            IoCommand::parse(&sgl(write_zeroes(1, 9, 7, true))).unwrap()
        else {
            panic!()
        };
        assert_eq!((range.slba, range.blocks), (9, 7));
        let (first, second) = compare_and_write(1, 5, 2);
        assert!(matches!(IoCommand::parse(&sgl(first)), Ok(IoCommand::Compare { fused: true, .. })));
        assert!(matches!(IoCommand::parse(&sgl(second)), Ok(IoCommand::Write { fused: true, .. })));
        let (sqe, data) = deallocate(1, &[(1, 2), (3, 4)]);
        let IoCommand::DatasetManagement(dsm) = IoCommand::parse(&sgl(sqe)).unwrap() else { panic!() };
        assert!(dsm.deallocate && dsm.ranges == 2 && data.len() == 32);
        let (sqe, data) = copy(1, 1 << 33, &[(1, 65536)]);
        let IoCommand::Copy(parsed) = IoCommand::parse(&sgl(sqe)).unwrap() else { panic!() };
        assert_eq!((parsed.sdlba, parsed.ranges, data.len()), (1 << 33, 1, 32));
        let (one, range) = copy_one(1, 1 << 33, 1, 65536);
        assert_eq!((one.as_bytes(), &range[..]), (copy(1, 1 << 33, &[(1, 65536)]).0.as_bytes(), &data[..]));
        let (one, range) = deallocate_one(1, 3, 4);
        let (list, data) = deallocate(1, &[(3, 4)]);
        assert_eq!((one.as_bytes(), &range[..]), (list.as_bytes(), &data[..]));
        let AdminCommand::GetLogPage(get) =
            AdminCommand::parse(&sgl(get_log_page(0x70, 0, 5 << 32, 1 << 20, true))).unwrap()
        else {
            panic!()
        };
        assert_eq!((get.lid, get.len_bytes, get.rae, get.offset), (0x70, 1 << 20, true, LogOffset::Bytes(5 << 32)));
        let FabricsCommand::Connect(connect) = FabricsCommand::parse(&sgl(connect(3, 128, 0))).unwrap() else {
            panic!()
        };
        assert_eq!((connect.qid, connect.disable_sq_flow_control), (3, true));
        assert!(may_retry(Status::INTERNAL_ERROR) && !may_retry(Status::INVALID_FIELD.dnr()));
    }
}
