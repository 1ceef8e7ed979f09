//! Submission queue entry and SGL descriptors: Base 4.1, 4.3.2; TCP 3.3.2.1.2.
//!
//! ```text
//! byte 0     1       2      4       8      12     16     24      40          60
//! +-------+-------+------+-------+------+------+------+-------+-------+ .. +-------+
//! |  OPC  | flags |  CID | NSID  | CDW2 | CDW3 | MPTR | DPTR  | CDW10 |    | CDW15 |
//! +-------+-------+------+-------+------+------+------+-------+-------+ .. +-------+
//! flags: 1:0 FUSE, 7:6 PSDT.        DPTR: one 16-byte SGL descriptor on fabrics.
//! ```

use super::status::Status;
use zerocopy::little_endian::{U32, U64};

wire! {
    /// A 64-byte submission queue entry.
    pub struct Sqe: 64 {
        /// Opcode.
        pub opcode: u8,
        /// FUSE in bits 1:0, PSDT in bits 7:6.
        pub flags: u8,
        /// Command identifier.
        pub cid: zerocopy::little_endian::U16,
        /// Namespace identifier; for Fabrics commands the low byte is FCTYPE.
        pub nsid: U32,
        /// Command dword 2.
        pub cdw2: U32,
        /// Command dword 3.
        pub cdw3: U32,
        /// Metadata pointer.
        pub mptr: U64,
        /// Data pointer: SGL entry 1.
        pub dptr: SglDescriptor,
        /// Command dword 10.
        pub cdw10: U32,
        /// Command dword 11.
        pub cdw11: U32,
        /// Command dword 12.
        pub cdw12: U32,
        /// Command dword 13.
        pub cdw13: U32,
        /// Command dword 14.
        pub cdw14: U32,
        /// Command dword 15.
        pub cdw15: U32,
    }
}

/// Fused operation (FUSE): Base 4.1.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fuse {
    /// 00b: normal operation.
    None,
    /// 01b: first command of a fused operation.
    First,
    /// 10b: second command of a fused operation.
    Second,
    /// 11b.
    Reserved,
}

impl Sqe {
    /// Fused operation.
    pub fn fuse(&self) -> Fuse {
        match self.flags & 3 {
            0 => Fuse::None,
            1 => Fuse::First,
            2 => Fuse::Second,
            _ => Fuse::Reserved,
        }
    }

    /// PRP or SGL for Data Transfer: 0 PRP, 1 SGL with a contiguous metadata
    /// buffer, 2 SGL with a metadata SGL, 3 reserved.
    pub fn psdt(&self) -> u8 {
        self.flags >> 6
    }

    /// Fabrics command type: the low byte of the NSID field (Base 6.1).
    pub fn fctype(&self) -> u8 {
        self.nsid.get() as u8
    }
}

wire! {
    /// A 16-byte SGL descriptor as it lies on the wire: Base 4.3.2.
    ///
    /// ```text
    /// byte 0         8        12          15
    /// +-----------+--------+-----------+----------------+
    /// |  ADDRESS  | LENGTH |  reserved | TYPE | SUBTYPE |   keyed (4h): 3 bytes of
    /// +-----------+--------+-----------+----------------+   length, 4 of key
    /// ```
    pub struct SglDescriptor: 16 {
        address: U64,
        body: [u8; 7],
        id: u8,
    }
}

const TYPE_DATA_BLOCK: u8 = 0;
const TYPE_BIT_BUCKET: u8 = 1;
const TYPE_SEGMENT: u8 = 2;
const TYPE_LAST_SEGMENT: u8 = 3;
const TYPE_KEYED: u8 = 4;
const TYPE_TRANSPORT: u8 = 5;
const SUB_ADDRESS: u8 = 0;
const SUB_OFFSET: u8 = 1;
const SUB_TRANSPORT: u8 = 0xa;
const SUB_INVALIDATE_KEY: u8 = 0xf;

/// A parsed SGL descriptor. Lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sgl {
    /// Data Block, Address: host memory, reached only by memory-based transports.
    DataBlock {
        /// Host address.
        address: u64,
        /// Bytes.
        len: u32,
    },
    /// Data Block, Offset: data in this capsule, `offset` bytes behind ICDOFF.
    InCapsule {
        /// Bytes from the start of the in-capsule data.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Bit Bucket: read data that the host does not want.
    BitBucket {
        /// Bytes.
        len: u32,
    },
    /// Segment: a list of descriptors of which the last points on.
    Segment {
        /// Address, or offset in the capsule.
        address: u64,
        /// Bytes, a multiple of 16.
        len: u32,
        /// True if `address` is an offset in the capsule.
        in_capsule: bool,
    },
    /// Last Segment: the final list of descriptors.
    LastSegment {
        /// Address, or offset in the capsule.
        address: u64,
        /// Bytes, a multiple of 16.
        len: u32,
        /// True if `address` is an offset in the capsule.
        in_capsule: bool,
    },
    /// Keyed Data Block: host memory through a remote key (RDMA).
    Keyed {
        /// Remote address.
        address: u64,
        /// Bytes, below 2^24.
        len: u32,
        /// Remote key.
        key: u32,
        /// The key is to be invalidated when the response is sent.
        invalidate: bool,
    },
    /// Transport Data Block: the transport moves the data by its own means (TCP).
    Transport {
        /// Bytes.
        len: u32,
    },
}

impl Sgl {
    /// Bytes of data that the descriptor names, or of list for segments.
    pub fn len(&self) -> u32 {
        match *self {
            Sgl::DataBlock { len, .. }
            | Sgl::InCapsule { len, .. }
            | Sgl::BitBucket { len }
            | Sgl::Segment { len, .. }
            | Sgl::LastSegment { len, .. }
            | Sgl::Keyed { len, .. }
            | Sgl::Transport { len } => len,
        }
    }

    /// True if no bytes are named.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl SglDescriptor {
    /// Bytes 8 to 11: the length of all types but keyed.
    pub fn len(&self) -> u32 {
        u32::from_le_bytes([self.body[0], self.body[1], self.body[2], self.body[3]])
    }

    /// True if the length is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Type in bits 7:4, subtype in bits 3:0.
    pub fn id(&self) -> u8 {
        self.id
    }

    /// The typed descriptor.
    ///
    /// # Errors
    /// SGL Descriptor Type Invalid for a type or a combination with a subtype
    /// that the specification does not define (Base 4.3.2).
    pub fn parse(&self) -> Result<Sgl, Status> {
        let address = self.address.get();
        let len = self.len();
        Ok(match (self.id >> 4, self.id & 0xf) {
            (TYPE_TRANSPORT, SUB_TRANSPORT) => Sgl::Transport { len },
            (TYPE_DATA_BLOCK, SUB_OFFSET) => Sgl::InCapsule { offset: address, len },
            (TYPE_DATA_BLOCK, SUB_ADDRESS) => Sgl::DataBlock { address, len },
            (TYPE_BIT_BUCKET, SUB_ADDRESS) => Sgl::BitBucket { len },
            (TYPE_SEGMENT, sub @ (SUB_ADDRESS | SUB_OFFSET)) => {
                Sgl::Segment { address, len, in_capsule: sub == SUB_OFFSET }
            }
            (TYPE_LAST_SEGMENT, sub @ (SUB_ADDRESS | SUB_OFFSET)) => {
                Sgl::LastSegment { address, len, in_capsule: sub == SUB_OFFSET }
            }
            (TYPE_KEYED, sub @ (SUB_ADDRESS | SUB_INVALIDATE_KEY)) => Sgl::Keyed {
                address,
                len: len & 0xff_ffff,
                key: u32::from_le_bytes([self.body[3], self.body[4], self.body[5], self.body[6]]),
                invalidate: sub == SUB_INVALIDATE_KEY,
            },
            _ => return Err(Status::SGL_TYPE_INVALID.dnr()),
        })
    }

    /// A descriptor with a raw type and subtype byte, for building odd ones.
    pub fn raw(address: u64, len: u32, id: u8) -> Self {
        let mut body = [0; 7];
        body[..4].copy_from_slice(&len.to_le_bytes());
        Self { address: U64::new(address), body, id }
    }
}

impl From<Sgl> for SglDescriptor {
    fn from(sgl: Sgl) -> Self {
        let list = |kind: u8, in_capsule: bool| kind << 4 | if in_capsule { SUB_OFFSET } else { SUB_ADDRESS };
        match sgl {
            Sgl::DataBlock { address, len } => Self::raw(address, len, TYPE_DATA_BLOCK << 4),
            Sgl::InCapsule { offset, len } => Self::raw(offset, len, TYPE_DATA_BLOCK << 4 | SUB_OFFSET),
            Sgl::BitBucket { len } => Self::raw(0, len, TYPE_BIT_BUCKET << 4),
            Sgl::Segment { address, len, in_capsule } => Self::raw(address, len, list(TYPE_SEGMENT, in_capsule)),
            Sgl::LastSegment { address, len, in_capsule } => {
                Self::raw(address, len, list(TYPE_LAST_SEGMENT, in_capsule))
            }
            Sgl::Keyed { address, len, key, invalidate } => {
                let sub = if invalidate { SUB_INVALIDATE_KEY } else { SUB_ADDRESS };
                let mut sgl = Self::raw(address, len & 0xff_ffff, TYPE_KEYED << 4 | sub);
                sgl.body[3..].copy_from_slice(&key.to_le_bytes());
                sgl
            }
            Sgl::Transport { len } => Self::raw(0, len, TYPE_TRANSPORT << 4 | SUB_TRANSPORT),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::{FromBytes, IntoBytes};

    #[test]
    fn sqe_fields_lie_at_their_offsets() {
        let bytes: [u8; 64] = std::array::from_fn(|i| i as u8);
        let sqe = Sqe::read_from_bytes(&bytes).unwrap();
        assert_eq!((sqe.opcode, sqe.flags), (0, 1));
        assert_eq!(sqe.cid.get(), 0x0302);
        assert_eq!(sqe.nsid.get(), 0x0706_0504);
        assert_eq!(sqe.fctype(), 4);
        assert_eq!(sqe.mptr.get(), 0x1716_1514_1312_1110);
        assert_eq!(sqe.dptr.as_bytes(), &bytes[24..40]);
        assert_eq!(sqe.cdw10.get(), 0x2b2a_2928);
        assert_eq!(sqe.cdw15.get(), 0x3f3e_3d3c);
    }

    #[test]
    fn flags() {
        let mut sqe = Sqe::read_from_bytes(&[0; 64]).unwrap();
        for (bits, fuse) in [(0, Fuse::None), (1, Fuse::First), (2, Fuse::Second), (3, Fuse::Reserved)] {
            sqe.flags = 0x40 | bits;
            assert_eq!((sqe.fuse(), sqe.psdt()), (fuse, 1));
        }
    }

    #[test]
    fn every_descriptor_survives_the_wire() {
        for sgl in [
            Sgl::DataBlock { address: 7, len: 9 },
            Sgl::InCapsule { offset: 8, len: 4096 },
            Sgl::BitBucket { len: 512 },
            Sgl::Segment { address: 1, len: 32, in_capsule: false },
            Sgl::LastSegment { address: 2, len: 16, in_capsule: true },
            Sgl::Keyed { address: u64::MAX, len: 0xff_ffff, key: 0xdead_beef, invalidate: true },
            Sgl::Keyed { address: 3, len: 1, key: 1, invalidate: false },
            Sgl::Transport { len: u32::MAX },
        ] {
            assert_eq!(SglDescriptor::from(sgl).parse(), Ok(sgl));
        }
    }

    #[test]
    fn descriptor_bytes() {
        let tcp = SglDescriptor::from(Sgl::Transport { len: 0x2000 });
        assert_eq!(tcp.as_bytes(), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0x5a]);
        let keyed =
            SglDescriptor::from(Sgl::Keyed { address: 0x1000, len: 0x01_0203, key: 0x0a0b_0c0d, invalidate: true });
        assert_eq!(keyed.as_bytes(), [0, 0x10, 0, 0, 0, 0, 0, 0, 3, 2, 1, 0x0d, 0x0c, 0x0b, 0x0a, 0x4f]);
    }

    #[test]
    fn undefined_descriptors_are_refused() {
        let defined = [0x00, 0x01, 0x10, 0x20, 0x21, 0x30, 0x31, 0x40, 0x4f, 0x5a];
        for id in 0..=255u8 {
            let parsed = SglDescriptor::raw(0, 0, id).parse();
            assert_eq!(parsed.is_ok(), defined.contains(&id), "{id:02x}");
        }
    }
}
