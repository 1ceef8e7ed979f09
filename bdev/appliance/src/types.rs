//! Operations, statuses and geometry.

use std::fmt;

/// What an I/O does. LBAs and lengths of the operation itself are in the [`Request`](crate::Request); in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Fills the payload.
    Read,
    /// Writes the payload; with `fua` it is on stable media before the completion.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Everything completed before is on stable media. The range is advisory.
    Flush,
    /// The blocks' contents may be forgotten. What they read as afterwards is the device's to say.
    Unmap,
    /// The blocks read as zeroes afterwards.
    WriteZeroes {
        /// Force unit access.
        fua: bool,
        /// Whether the space may be deallocated.
        may_unmap: bool,
    },
    /// Compares the payload with the blocks: success, or [`IoStatus::CompareFailed`].
    Compare,
    /// The first half of the payload is compared with the blocks; where it is equal the second half is written. Nothing
    /// else that was submitted to the device changes the blocks in between.
    CompareAndWrite {
        /// Force unit access of the write.
        fua: bool,
    },
    /// Copies the blocks from `source_lba` of the same device.
    Copy {
        /// First block to copy from.
        source_lba: u64,
    },
    /// Everything outstanding on the device has ended, one way or another; it works again afterwards.
    Reset,
}

/// An [`Op`] without its details; an index into statistics and sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum OpKind {
    /// [`Op::Read`].
    Read,
    /// [`Op::Write`].
    Write,
    /// [`Op::Flush`].
    Flush,
    /// [`Op::Unmap`].
    Unmap,
    /// [`Op::WriteZeroes`].
    WriteZeroes,
    /// [`Op::Compare`].
    Compare,
    /// [`Op::CompareAndWrite`].
    CompareAndWrite,
    /// [`Op::Copy`].
    Copy,
    /// [`Op::Reset`].
    Reset,
}

impl OpKind {
    /// Every kind, by index.
    pub const ALL: [OpKind; 9] = [
        OpKind::Read,
        OpKind::Write,
        OpKind::Flush,
        OpKind::Unmap,
        OpKind::WriteZeroes,
        OpKind::Compare,
        OpKind::CompareAndWrite,
        OpKind::Copy,
        OpKind::Reset,
    ];

    /// The name that RPCs use.
    pub fn name(self) -> &'static str {
        match self {
            OpKind::Read => "read",
            OpKind::Write => "write",
            OpKind::Flush => "flush",
            OpKind::Unmap => "unmap",
            OpKind::WriteZeroes => "write_zeroes",
            OpKind::Compare => "compare",
            OpKind::CompareAndWrite => "compare_and_write",
            OpKind::Copy => "copy",
            OpKind::Reset => "reset",
        }
    }
}

impl Op {
    /// Which kind this is.
    #[inline]
    pub fn kind(self) -> OpKind {
        match self {
            Op::Read => OpKind::Read,
            Op::Write { .. } => OpKind::Write,
            Op::Flush => OpKind::Flush,
            Op::Unmap => OpKind::Unmap,
            Op::WriteZeroes { .. } => OpKind::WriteZeroes,
            Op::Compare => OpKind::Compare,
            Op::CompareAndWrite { .. } => OpKind::CompareAndWrite,
            Op::Copy { .. } => OpKind::Copy,
            Op::Reset => OpKind::Reset,
        }
    }

    /// Whether blocks may change.
    #[inline]
    pub fn modifies(self) -> bool {
        matches!(
            self,
            Op::Write { .. } | Op::Unmap | Op::WriteZeroes { .. } | Op::CompareAndWrite { .. } | Op::Copy { .. }
        )
    }

    /// Payload bytes that `blocks` blocks of `block_size` bytes need with this operation.
    #[inline]
    pub fn payload_bytes(self, blocks: u64, block_size: u32) -> u64 {
        match self {
            Op::Read | Op::Write { .. } | Op::Compare => blocks.saturating_mul(block_size.into()),
            Op::CompareAndWrite { .. } => blocks.saturating_mul(block_size.into()).saturating_mul(2),
            Op::Flush | Op::Unmap | Op::WriteZeroes { .. } | Op::Copy { .. } | Op::Reset => 0,
        }
    }
}

/// A set of operation kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpSet(u16);

impl OpSet {
    /// The set of `kinds`.
    pub const fn of(kinds: &[OpKind]) -> OpSet {
        let mut bits = 0;
        let mut i = 0;
        while i < kinds.len() {
            bits |= 1 << kinds[i] as u16;
            i += 1;
        }
        OpSet(bits)
    }

    /// Whether `kind` is in it.
    #[inline]
    pub const fn contains(self, kind: OpKind) -> bool {
        self.0 & (1 << kind as u16) != 0
    }

    /// The set with `kind` in it.
    pub const fn with(self, kind: OpKind) -> OpSet {
        OpSet(self.0 | (1 << kind as u16))
    }

    /// The set without `kind`.
    pub const fn without(self, kind: OpKind) -> OpSet {
        OpSet(self.0 & !(1 << kind as u16))
    }
}

/// How an I/O ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoStatus {
    /// Done.
    #[default]
    Success,
    /// The device failed without saying more.
    Failed,
    /// The range passes the end of the device.
    OutOfRange,
    /// The request makes no sense: no blocks, or a payload that does not fit them.
    Invalid,
    /// The device cannot do this.
    NotSupported,
    /// The device is being removed or is gone.
    NoDevice,
    /// Cancelled by an abort, a reset or a removal.
    Aborted,
    /// Not done before its deadline.
    TimedOut,
    /// The medium cannot be read.
    ReadError,
    /// The medium cannot be written.
    WriteError,
    /// The blocks differ from the payload.
    CompareFailed,
    /// The device refuses writes.
    ReadOnly,
    /// The device has no room left.
    NoSpace,
    /// An NVMe status from a device that speaks NVMe, passed on as it is.
    Nvme {
        /// Status code type.
        sct: u8,
        /// Status code.
        sc: u8,
        /// Do not retry.
        dnr: bool,
    },
}

impl IoStatus {
    /// Whether it is [`IoStatus::Success`].
    #[inline]
    pub fn is_success(self) -> bool {
        self == IoStatus::Success
    }

    /// The status for a host's error number on an operation of `kind`.
    pub fn from_errno(errno: i32, kind: OpKind) -> IoStatus {
        const ENOSPC: i32 = 28;
        const EROFS: i32 = 30;
        const EBADF: i32 = 9;
        const EOPNOTSUPP: i32 = 95;
        const ENODEV: i32 = 19;
        const ENXIO: i32 = 6;
        const ECANCELED: i32 = 125;
        const EFBIG: i32 = 27;
        const EDQUOT: i32 = 122;
        match errno {
            ENOSPC | EDQUOT => IoStatus::NoSpace,
            EFBIG => IoStatus::OutOfRange,
            EROFS | EBADF => IoStatus::ReadOnly,
            EOPNOTSUPP => IoStatus::NotSupported,
            ENODEV | ENXIO => IoStatus::NoDevice,
            ECANCELED => IoStatus::Aborted,
            _ if kind == OpKind::Read || kind == OpKind::Compare => IoStatus::ReadError,
            _ => IoStatus::WriteError,
        }
    }

    /// A short name for reports, in the field's words.
    pub fn name(self) -> &'static str {
        match self {
            IoStatus::Success => "success",
            IoStatus::Failed => "failed",
            IoStatus::OutOfRange => "out_of_range",
            IoStatus::Invalid => "invalid",
            IoStatus::NotSupported => "not_supported",
            IoStatus::NoDevice => "no_device",
            IoStatus::Aborted => "aborted",
            IoStatus::TimedOut => "timed_out",
            IoStatus::ReadError => "read_error",
            IoStatus::WriteError => "write_error",
            IoStatus::CompareFailed => "compare_failed",
            IoStatus::ReadOnly => "read_only",
            IoStatus::NoSpace => "no_space",
            IoStatus::Nvme { .. } => "nvme_error",
        }
    }
}

impl fmt::Display for IoStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IoStatus::Nvme { sct, sc, .. } => write!(f, "NVMe status {sct:x}h/{sc:02x}h"),
            other => f.write_str(other.name()),
        }
    }
}

/// Size, units and limits of a device. Limits of zero mean "none".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes in a logical block; a power of two from 512 to 65536.
    pub block_size: u32,
    /// Blocks.
    pub num_blocks: u64,
    /// Bytes in a physical block: writes of less are slower.
    pub physical_block_size: u32,
    /// Blocks after which an I/O should not go on into the next group; larger ones are split there.
    pub optimal_io_boundary: u32,
    /// Blocks that one read or write may move; larger ones are split.
    pub max_rw_blocks: u32,
    /// Payload segments that one read or write may have; more are split.
    pub max_segments: u32,
    /// Blocks that one unmap may name.
    pub max_unmap_blocks: u32,
    /// Blocks that one native write-zeroes may name.
    pub max_write_zeroes_blocks: u32,
    /// Blocks that one native copy may name.
    pub max_copy_blocks: u32,
    /// Largest compare-and-write that a device that has it does by itself, blocks; longer ones are done under a lock of this
    /// layer, which other users of a shared device do not see. 0 for no limit.
    pub max_compare_and_write_blocks: u32,
    /// Preferred granularity of unmaps, in blocks; 0 when there is none.
    pub unmap_granularity: u32,
    /// Completed writes may be lost by a power failure before the next flush.
    pub volatile_cache: bool,
    /// Unmapped blocks read as zeroes.
    pub unmap_zeroes: bool,
    /// Writes are refused.
    pub read_only: bool,
}

impl Geometry {
    /// A device without limits, cache or preferences.
    pub fn new(block_size: u32, num_blocks: u64) -> Geometry {
        Geometry {
            block_size,
            num_blocks,
            physical_block_size: block_size,
            optimal_io_boundary: 0,
            max_rw_blocks: 0,
            max_segments: 0,
            max_unmap_blocks: 0,
            max_write_zeroes_blocks: 0,
            max_copy_blocks: 0,
            max_compare_and_write_blocks: 0,
            unmap_granularity: 0,
            volatile_cache: false,
            unmap_zeroes: false,
            read_only: false,
        }
    }

    /// Whether `block_size` can be served.
    pub fn is_valid_block_size(block_size: u32) -> bool {
        block_size.is_power_of_two() && (512..=65536).contains(&block_size)
    }

    /// Whether `lba..lba + blocks` lies on the device.
    #[inline]
    pub fn contains(&self, lba: u64, blocks: u64) -> bool {
        lba.checked_add(blocks).is_some_and(|end| end <= self.num_blocks)
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.num_blocks.saturating_mul(self.block_size.into())
    }
}
