//! Command capsules: where a command's data is (NVMe RDMA Transport Specification 1.1, section 3.3).
//!
//! ```text
//! | SQE, 64 bytes | ICDOFF units of 16 bytes | data in the capsule, or a list of descriptors |
//! ```
//! ICDOFF is 0 here, so that what follows the entry begins at byte 64. Descriptor 1 of the entry is one of
//! - a keyed data block: all of the data, in the host's memory;
//! - a data block with an offset: the data is in the capsule, as far behind its entry as the offset says;
//! - a last segment with an offset: a list of at most [`MAX_BLOCKS`] keyed data blocks is there.

use smallvec::SmallVec;
use zerocopy::{FromBytes, IntoBytes};

use crate::spec::sqe::{Sgl, SglDescriptor};
use crate::spec::{Sqe, Status};

/// Bytes of a submission queue entry.
pub const SQE_BYTES: usize = 64;
/// Bytes of a response capsule, which is a completion queue entry.
pub const RESPONSE_BYTES: usize = 16;
/// Data block descriptors of one command, at most (MSDBD).
pub const MAX_BLOCKS: usize = 16;
/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: usize = 16;

/// A stretch of the host's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its address at the host.
    pub address: u64,
    /// Its bytes, at least one.
    pub len: u32,
    /// The host's key for it.
    pub key: u32,
}

/// The stretches of one command. In place, so that no command costs an allocation.
pub type Blocks = SmallVec<[Block; MAX_BLOCKS]>;

/// Where a command's data is.
#[derive(Clone, Debug, PartialEq, Eq)]
// In place, so that no command costs an allocation.
#[allow(clippy::large_enum_variant)]
pub enum DataAt {
    /// There is none.
    Nowhere,
    /// In the capsule, `len` bytes at `start` from the capsule's first byte.
    Capsule {
        /// Offset in the capsule, in bytes.
        start: usize,
        /// Bytes.
        len: u32,
    },
    /// In the host's memory.
    Host {
        /// The stretches, in order.
        blocks: Blocks,
        /// Bytes of all of them together.
        len: u32,
        /// The key that the host wants invalidated with the response.
        invalidate: Option<u32>,
    },
}

/// A capsule that was understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capsule {
    /// The command.
    pub sqe: Sqe,
    /// Its data; or the status that it is refused with, because its descriptors are wrong.
    pub data: Result<DataAt, Status>,
}

/// The peer sent what is no capsule at all: the connection has to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoCapsule {
    /// Bytes of the message.
    pub len: usize,
}

/// Takes a message apart. `max_io_bytes` bounds the data of one command.
///
/// # Errors
/// [`NoCapsule`] if there is not even a command.
pub fn parse(message: &[u8], max_io_bytes: u32) -> Result<Capsule, NoCapsule> {
    let (sqe, behind) = Sqe::read_from_prefix(message).map_err(|_| NoCapsule { len: message.len() })?;
    let data = data_at(&sqe, behind, max_io_bytes);
    Ok(Capsule { sqe, data })
}

fn data_at(sqe: &Sqe, behind: &[u8], max_io_bytes: u32) -> Result<DataAt, Status> {
    let sgl = sqe.dptr.parse()?;
    let data = match sgl {
        // Commands without data have a descriptor all the same, of whichever type, that names no bytes.
        sgl if sgl.is_empty() => DataAt::Nowhere,
        Sgl::Keyed { address, len, key, invalidate } => DataAt::Host {
            blocks: SmallVec::from_iter([Block { address, len, key }]),
            len,
            invalidate: invalidate.then_some(key),
        },
        Sgl::InCapsule { offset, len } => {
            within(offset, len, behind, Status::SGL_OFFSET_INVALID)?;
            // The offset is below the capsule's length, which is a few KiB.
            DataAt::Capsule { start: SQE_BYTES + offset as usize, len }
        }
        Sgl::LastSegment { address, len, in_capsule: true } => list(address, len, behind)?,
        _ => return Err(Status::SGL_TYPE_INVALID.dnr()),
    };
    match &data {
        DataAt::Host { len, .. } | DataAt::Capsule { len, .. } if *len > max_io_bytes => {
            Err(Status::DATA_SGL_LENGTH_INVALID.dnr())
        }
        _ => Ok(data),
    }
}

/// Checks that a range lies in the part of the capsule behind its entry.
fn within(offset: u64, len: u32, behind: &[u8], otherwise: Status) -> Result<(), Status> {
    match offset.checked_add(len.into()) {
        Some(end) if end <= behind.len() as u64 => Ok(()),
        _ => Err(otherwise.dnr()),
    }
}

/// A list of keyed data blocks.
fn list(offset: u64, len: u32, behind: &[u8]) -> Result<DataAt, Status> {
    within(offset, len, behind, Status::INVALID_SGL_SEGMENT)?;
    let bytes = &behind[offset as usize..][..len as usize];
    if !bytes.len().is_multiple_of(DESCRIPTOR_BYTES) {
        return Err(Status::INVALID_SGL_SEGMENT.dnr());
    }
    if bytes.len() / DESCRIPTOR_BYTES > MAX_BLOCKS {
        return Err(Status::INVALID_SGL_COUNT.dnr());
    }
    let (mut blocks, mut total, mut invalidated) = (SmallVec::new(), 0u32, None);
    for descriptor in bytes.chunks_exact(DESCRIPTOR_BYTES) {
        let descriptor = SglDescriptor::read_from_bytes(descriptor).expect("chunks have a descriptor's length");
        let Sgl::Keyed { address, len, key, invalidate } = descriptor.parse()? else {
            return Err(Status::SGL_TYPE_INVALID.dnr());
        };
        if invalidate {
            invalidated = Some(key);
        }
        if len > 0 {
            blocks.push(Block { address, len, key });
        }
        // Sixteen times less than 2^24 is no overflow.
        total += len;
    }
    Ok(match total {
        0 => DataAt::Nowhere,
        len => DataAt::Host { blocks, len, invalidate: invalidated },
    })
}

/// Writes a capsule whose data is in the host's memory, as an initiator sends it; how many bytes it has.
///
/// # Panics
/// If there are more than [`MAX_BLOCKS`] blocks, or `out` is too short.
pub fn write(mut sqe: Sqe, blocks: &[Block], out: &mut [u8]) -> usize {
    assert!(blocks.len() <= MAX_BLOCKS);
    let keyed = |block: &Block| {
        SglDescriptor::from(Sgl::Keyed { address: block.address, len: block.len, key: block.key, invalidate: false })
    };
    let listed = match blocks {
        [] => {
            sqe.dptr = keyed(&Block { address: 0, len: 0, key: 0 });
            &[]
        }
        [one] => {
            sqe.dptr = keyed(one);
            &[]
        }
        several => {
            let len = (several.len() * DESCRIPTOR_BYTES) as u32;
            sqe.dptr = SglDescriptor::from(Sgl::LastSegment { address: 0, len, in_capsule: true });
            several
        }
    };
    out[..SQE_BYTES].copy_from_slice(sqe.as_bytes());
    let room = out[SQE_BYTES..].chunks_exact_mut(DESCRIPTOR_BYTES);
    for (block, room) in listed.iter().zip(room) {
        room.copy_from_slice(keyed(block).as_bytes());
    }
    let len = SQE_BYTES + listed.len() * DESCRIPTOR_BYTES;
    assert!(len <= out.len());
    len
}

/// Writes the entry of a capsule behind which `len` bytes of data follow; how many bytes the entry has.
///
/// # Panics
/// If `out` is too short.
pub fn write_with_data(mut sqe: Sqe, len: u32, out: &mut [u8]) -> usize {
    sqe.dptr = SglDescriptor::from(Sgl::InCapsule { offset: 0, len });
    out[..SQE_BYTES].copy_from_slice(sqe.as_bytes());
    SQE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::FromZeros;

    const MAX: u32 = 1 << 20;

    fn message(dptr: SglDescriptor, behind: &[u8]) -> Vec<u8> {
        let mut sqe = Sqe::new_zeroed();
        sqe.dptr = dptr;
        [sqe.as_bytes(), behind].concat()
    }

    fn parsed(dptr: impl Into<SglDescriptor>, behind: &[u8]) -> Result<DataAt, Status> {
        parse(&message(dptr.into(), behind), MAX).unwrap().data
    }

    fn blocks(count: usize) -> Vec<Block> {
        (0..count).map(|n| Block { address: (n as u64) << 33, len: 1 + n as u32, key: n as u32 * 7 }).collect()
    }

    #[test]
    fn blocks_survive_the_wire_one_or_many() {
        for count in [0, 1, 2, MAX_BLOCKS] {
            let mut out = [0; SQE_BYTES + MAX_BLOCKS * DESCRIPTOR_BYTES];
            let len = write(Sqe::new_zeroed(), &blocks(count), &mut out);
            match parse(&out[..len], MAX).unwrap().data.unwrap() {
                DataAt::Nowhere => assert_eq!(count, 0),
                DataAt::Host { blocks: found, len, invalidate } => {
                    assert_eq!(found.to_vec(), blocks(count));
                    assert_eq!((len as usize, invalidate), ((1..=count).sum(), None));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn data_in_the_capsule_lies_behind_the_entry() {
        let at = |offset, len| parsed(Sgl::InCapsule { offset, len }, &[0; 4096]);
        assert_eq!(at(0, 4096), Ok(DataAt::Capsule { start: 64, len: 4096 }));
        assert_eq!(at(96, 4000), Ok(DataAt::Capsule { start: 160, len: 4000 }));
        for (offset, len) in [(1, 4096), (4097, 1), (u64::MAX, 2), (0, u32::MAX)] {
            assert_eq!(at(offset, len), Err(Status::SGL_OFFSET_INVALID.dnr()), "{offset} {len}");
        }
    }

    #[test]
    fn data_that_goes_with_the_capsule_is_found_behind_it() {
        let mut out = [0; SQE_BYTES + 512];
        let len = write_with_data(Sqe::new_zeroed(), 512, &mut out);
        assert_eq!(parse(&out, MAX).unwrap().data, Ok(DataAt::Capsule { start: len, len: 512 }));
        assert_eq!(parse(&out[..len + 511], MAX).unwrap().data, Err(Status::SGL_OFFSET_INVALID.dnr()));
    }

    #[test]
    fn lists_that_lie_are_refused() {
        let list = |len| Sgl::LastSegment { address: 0, len, in_capsule: true };
        let one = SglDescriptor::from(Sgl::Keyed { address: 1, len: 2, key: 3, invalidate: true });
        let two = [one.as_bytes(), one.as_bytes()].concat();
        let found = parsed(list(32), &two);
        assert!(matches!(found, Ok(DataAt::Host { len: 4, invalidate: Some(3), .. })), "{found:?}");
        assert_eq!(parsed(list(48), &two), Err(Status::INVALID_SGL_SEGMENT.dnr()));
        assert_eq!(parsed(list(20), &two), Err(Status::INVALID_SGL_SEGMENT.dnr()));
        let many = one.as_bytes().repeat(MAX_BLOCKS + 1);
        assert_eq!(parsed(list(many.len() as u32), &many), Err(Status::INVALID_SGL_COUNT.dnr()));
        let inner = SglDescriptor::from(list(16));
        assert_eq!(parsed(list(16), inner.as_bytes()), Err(Status::SGL_TYPE_INVALID.dnr()));
    }

    #[test]
    fn what_moves_data_in_other_ways_is_refused() {
        for sgl in [
            Sgl::Transport { len: 512 },
            Sgl::DataBlock { address: 0, len: 512 },
            Sgl::Segment { address: 0, len: 16, in_capsule: true },
            Sgl::LastSegment { address: 0, len: 16, in_capsule: false },
        ] {
            assert_eq!(parsed(sgl, &[0; 64]), Err(Status::SGL_TYPE_INVALID.dnr()), "{sgl:?}");
        }
        let long = Sgl::Keyed { address: 0, len: MAX + 1, key: 0, invalidate: false };
        assert_eq!(parsed(long, &[]), Err(Status::DATA_SGL_LENGTH_INVALID.dnr()));
    }

    proptest! {
        /// Whatever arrives: no panic, and nothing outside of the message or above the bound is named.
        #[test]
        fn any_message_is_survived(bytes in proptest::collection::vec(any::<u8>(), 0..400), id in any::<u8>(), len in 0u32..400) {
            let mut bytes = bytes;
            if bytes.len() >= SQE_BYTES {
                // Descriptors that are nearly right.
                bytes[24..40].copy_from_slice(SglDescriptor::raw(u64::from(id) / 2, len, id).as_bytes());
            }
            match parse(&bytes, 300) {
                Err(NoCapsule { len }) => prop_assert!(len < SQE_BYTES),
                Ok(capsule) => match capsule.data {
                    Ok(DataAt::Capsule { start, len }) => prop_assert!(start + len as usize <= bytes.len() && len <= 300),
                    Ok(DataAt::Host { blocks, len, .. }) => {
                        prop_assert!(len <= 300 && blocks.len() <= MAX_BLOCKS);
                        prop_assert_eq!(blocks.iter().map(|block| block.len).sum::<u32>(), len);
                    }
                    Ok(DataAt::Nowhere) | Err(_) => {}
                },
            }
        }
    }
}
