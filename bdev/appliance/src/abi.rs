//! Codes of operations and statuses, as they lie in shared memory and cross the C ABI.

use crate::types::{IoStatus, Op, OpKind};

/// Flag: the data is on stable media before the completion.
pub const FLAG_FUA: u8 = 1;
/// Flag: the space of the zeroes may be deallocated.
pub const FLAG_MAY_UNMAP: u8 = 2;

/// The statuses other than NVMe's own, in the order of their codes: the first is 0.
const STATUSES: [IoStatus; 13] = [
    IoStatus::Success,
    IoStatus::Failed,
    IoStatus::OutOfRange,
    IoStatus::Invalid,
    IoStatus::NotSupported,
    IoStatus::NoDevice,
    IoStatus::Aborted,
    IoStatus::TimedOut,
    IoStatus::ReadError,
    IoStatus::WriteError,
    IoStatus::CompareFailed,
    IoStatus::ReadOnly,
    IoStatus::NoSpace,
];

/// Bit of a status that is NVMe's own: bits 0-7 are the status code, 8-10 its type, 11 says not to retry.
const NVME: u16 = 0x8000;

/// The code of an operation: code, flags, first block to copy from.
pub fn encode_op(op: Op) -> (u8, u8, u64) {
    let fua = |fua: bool| if fua { FLAG_FUA } else { 0 };
    let (flags, source_lba) = match op {
        Op::Write { fua: on } | Op::CompareAndWrite { fua: on } => (fua(on), 0),
        Op::WriteZeroes { fua: on, may_unmap } => (fua(on) | if may_unmap { FLAG_MAY_UNMAP } else { 0 }, 0),
        Op::Copy { source_lba } => (0, source_lba),
        Op::Read | Op::Flush | Op::Unmap | Op::Compare | Op::Reset => (0, 0),
    };
    (op.kind() as u8, flags, source_lba)
}

/// The operation of a code; `None` when there is none, or flags that nobody knows.
pub fn decode_op(code: u8, flags: u8, source_lba: u64) -> Option<Op> {
    if flags & !(FLAG_FUA | FLAG_MAY_UNMAP) != 0 {
        return None;
    }
    let fua = flags & FLAG_FUA != 0;
    Some(match *OpKind::ALL.get(usize::from(code))? {
        OpKind::Read => Op::Read,
        OpKind::Write => Op::Write { fua },
        OpKind::Flush => Op::Flush,
        OpKind::Unmap => Op::Unmap,
        OpKind::WriteZeroes => Op::WriteZeroes { fua, may_unmap: flags & FLAG_MAY_UNMAP != 0 },
        OpKind::Compare => Op::Compare,
        OpKind::CompareAndWrite => Op::CompareAndWrite { fua },
        OpKind::Copy => Op::Copy { source_lba },
        OpKind::Reset => Op::Reset,
    })
}

/// The code of a status.
pub fn encode_status(status: IoStatus) -> u16 {
    match status {
        IoStatus::Nvme { sct, sc, dnr } => {
            NVME | u16::from(sc) | (u16::from(sct) & 7) << 8 | if dnr { 1 << 11 } else { 0 }
        }
        other => STATUSES.iter().position(|&status| status == other).unwrap_or(1) as u16,
    }
}

/// The status of a code; `None` when there is none.
pub fn decode_status(code: u16) -> Option<IoStatus> {
    if code & NVME == 0 {
        return STATUSES.get(usize::from(code)).copied();
    }
    let status = IoStatus::Nvme { sct: (code >> 8) as u8 & 7, sc: code as u8, dnr: code & 1 << 11 != 0 };
    // An NVMe success, or bits that mean nothing, are no way to say that something failed.
    (code & 0x7000 == 0 && code & 0x7ff != 0).then_some(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_survive_their_codes() {
        let ops = [
            Op::Read,
            Op::Write { fua: true },
            Op::Write { fua: false },
            Op::Flush,
            Op::Unmap,
            Op::WriteZeroes { fua: true, may_unmap: false },
            Op::WriteZeroes { fua: false, may_unmap: true },
            Op::Compare,
            Op::CompareAndWrite { fua: true },
            Op::Copy { source_lba: 1 << 40 },
            Op::Reset,
        ];
        for op in ops {
            let (code, flags, source_lba) = encode_op(op);
            assert_eq!(decode_op(code, flags, source_lba), Some(op));
        }
        assert_eq!(decode_op(9, 0, 0), None);
        assert_eq!(decode_op(1, 4, 0), None);
    }

    #[test]
    fn every_code_is_one_status_or_none() {
        let mut known = 0;
        for code in 0..=u16::MAX {
            if let Some(status) = decode_status(code) {
                assert_eq!(encode_status(status), code);
                known += 1;
            }
        }
        assert_eq!(known, STATUSES.len() + 2 * (8 * 256 - 1));
        assert_eq!(decode_status(0), Some(IoStatus::Success));
    }
}
