//! NVMe/TCP PDUs: TCP 3.6.
//!
//! ```text
//! byte 0      1       2      3      4        8
//! +------+-------+------+-----+--------+------------------+
//! | type | flags | HLEN | PDO |  PLEN  | PDU specific ... |
//! +------+-------+------+-----+--------+------------------+
//! | header (HLEN) | HDGST (4)? | pad to PDO | data | DDGST (4)? |
//! |<------------------------- PLEN ------------------------------>|
//! ```
//!
//! HLEN is fixed by the type and does not include HDGST. PDO is the offset of
//! the data from the start of the PDU, 0 without data. PLEN counts everything.

use super::cqe::Cqe;
use super::sqe::Sqe;
use zerocopy::little_endian::{U16, U32};

/// Bytes of the common header.
pub const COMMON_HEADER_BYTES: usize = 8;
/// Bytes of a header or data digest.
pub const DIGEST_BYTES: usize = 4;
/// Bytes of the longest header with its digest.
pub const MAX_HEADER_BYTES: usize = 128;
/// Bytes of PDU header that a termination request may carry (TCP 3.6.2.3).
pub const MAX_TERM_DATA_BYTES: usize = 128;
/// Bytes of the longest termination request.
pub const MAX_TERM_BYTES: usize = size_of::<TermReq>() + MAX_TERM_DATA_BYTES;
/// Highest value of CPDA and HPDA: alignment to 128 bytes.
pub const MAX_PDA: u8 = 31;
/// Smallest MAXH2CDATA that may be announced (TCP 3.6.2.2).
pub const MIN_MAXH2CDATA: u32 = 4096;

/// PDU types: TCP 3.6.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PduType {
    /// Initialize Connection Request.
    IcReq = 0x00,
    /// Initialize Connection Response.
    IcResp = 0x01,
    /// Host to Controller Terminate Connection Request.
    H2cTermReq = 0x02,
    /// Controller to Host Terminate Connection Request.
    C2hTermReq = 0x03,
    /// Command Capsule.
    CapsuleCmd = 0x04,
    /// Response Capsule.
    CapsuleResp = 0x05,
    /// Host to Controller Data Transfer.
    H2cData = 0x06,
    /// Controller to Host Data Transfer.
    C2hData = 0x07,
    /// Ready to Transfer.
    R2t = 0x09,
}

impl PduType {
    /// From the first byte of a PDU.
    pub const fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0x00 => PduType::IcReq,
            0x01 => PduType::IcResp,
            0x02 => PduType::H2cTermReq,
            0x03 => PduType::C2hTermReq,
            0x04 => PduType::CapsuleCmd,
            0x05 => PduType::CapsuleResp,
            0x06 => PduType::H2cData,
            0x07 => PduType::C2hData,
            0x09 => PduType::R2t,
            _ => return None,
        })
    }

    /// The only HLEN that the type may have.
    pub const fn header_bytes(self) -> usize {
        match self {
            PduType::IcReq => size_of::<IcReq>(),
            PduType::IcResp => size_of::<IcResp>(),
            PduType::H2cTermReq | PduType::C2hTermReq => size_of::<TermReq>(),
            PduType::CapsuleCmd => size_of::<CapsuleCmd>(),
            PduType::CapsuleResp => size_of::<CapsuleResp>(),
            PduType::H2cData | PduType::C2hData => size_of::<DataPdu>(),
            PduType::R2t => size_of::<R2t>(),
        }
    }

    /// True if a header digest follows the header when one was negotiated.
    ///
    /// Connection set-up and termination never have one.
    pub const fn may_have_digest(self) -> bool {
        !matches!(self, PduType::IcReq | PduType::IcResp | PduType::H2cTermReq | PduType::C2hTermReq)
    }

    /// True if data may follow the header.
    pub const fn may_have_data(self) -> bool {
        matches!(self, PduType::CapsuleCmd | PduType::H2cData | PduType::C2hData)
    }

    /// True if the host sends it.
    pub const fn is_from_host(self) -> bool {
        matches!(self, PduType::IcReq | PduType::H2cTermReq | PduType::CapsuleCmd | PduType::H2cData)
    }
}

/// Bits of the FLAGS byte of the common header.
pub mod flags {
    /// HDGSTF: a header digest follows the header.
    pub const HDGST: u8 = 1 << 0;
    /// DDGSTF: a data digest follows the data.
    pub const DDGST: u8 = 1 << 1;
    /// LAST_PDU: the last data PDU of the transfer.
    pub const LAST_PDU: u8 = 1 << 2;
    /// SUCCESS: the command succeeded and no response capsule follows.
    pub const SUCCESS: u8 = 1 << 3;
}

wire! {
    /// The first eight bytes of every PDU: TCP 3.6.1.
    pub struct CommonHeader: 8 {
        /// 0: a [`PduType`].
        pub pdu_type: u8,
        /// 1: see [`flags`].
        pub flags: u8,
        /// 2: bytes of the header without digest.
        pub hlen: u8,
        /// 3: offset of the data.
        pub pdo: u8,
        /// 4: bytes of the whole PDU.
        pub plen: U32,
    }
}

impl CommonHeader {
    /// Byte offset of the type, for a fatal error's FEI.
    pub const OFFSET_TYPE: u32 = 0;
    /// Byte offset of FLAGS.
    pub const OFFSET_FLAGS: u32 = 1;
    /// Byte offset of HLEN.
    pub const OFFSET_HLEN: u32 = 2;
    /// Byte offset of PDO.
    pub const OFFSET_PDO: u32 = 3;
    /// Byte offset of PLEN.
    pub const OFFSET_PLEN: u32 = 4;

    /// For a PDU with the header of its type and nothing else.
    pub const fn bare(pdu_type: PduType) -> Self {
        Self {
            pdu_type: pdu_type as u8,
            flags: 0,
            hlen: pdu_type.header_bytes() as u8,
            pdo: 0,
            plen: U32::new(pdu_type.header_bytes() as u32),
        }
    }
}

/// Bits of DGST in ICReq and ICResp.
pub mod dgst {
    /// Header digest.
    pub const HEADER: u8 = 1 << 0;
    /// Data digest.
    pub const DATA: u8 = 1 << 1;
}

wire! {
    /// Initialize Connection Request: TCP 3.6.2.1.
    pub struct IcReq: 128 {
        /// 0: common header.
        pub ch: CommonHeader,
        /// 8: PDU format version, 0.
        pub pfv: U16,
        /// 10: host PDU data alignment, in 4 bytes, 0's-based; for controller to host data.
        pub hpda: u8,
        /// 11: digests wanted; see [`dgst`].
        pub dgst: u8,
        /// 12: outstanding R2Ts per command, 0's-based.
        pub maxr2t: U32,
        reserved16: [u8; 112],
    }
}

wire! {
    /// Initialize Connection Response: TCP 3.6.2.2.
    pub struct IcResp: 128 {
        /// 0: common header.
        pub ch: CommonHeader,
        /// 8: PDU format version, 0.
        pub pfv: U16,
        /// 10: controller PDU data alignment, in 4 bytes, 0's-based; for host to controller data.
        pub cpda: u8,
        /// 11: digests in use; see [`dgst`].
        pub dgst: u8,
        /// 12: bytes of data in one H2CData at most, a multiple of 4.
        pub maxh2cdata: U32,
        reserved16: [u8; 112],
    }
}

wire! {
    /// Header of a Terminate Connection Request of either side: TCP 3.6.2.3, 3.6.2.4.
    ///
    /// Behind it come up to 128 bytes of the PDU header that was at fault.
    pub struct TermReq: 24 {
        /// 0: common header.
        pub ch: CommonHeader,
        /// 8: see [`Fes`].
        pub fes: U16,
        /// 10: fatal error information.
        pub fei: U32,
        reserved14: [u8; 10],
    }
}

/// Fatal Error Status: TCP 3.6.2.3, 3.6.2.4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Fes {
    /// FEI: byte offset of the field in the PDU.
    InvalidHeaderField = 0x01,
    /// A PDU that may not come at this point.
    PduSequenceError = 0x02,
    /// FEI: the digest that was received.
    HeaderDigestError = 0x03,
    /// Data outside of what was asked for.
    DataTransferOutOfRange = 0x04,
    /// More data than the limit; to the controller: more R2Ts than MAXR2T.
    DataTransferLimitExceeded = 0x05,
    /// FEI: byte offset of the field in the PDU.
    UnsupportedParameter = 0x06,
}

impl Fes {
    /// From the field of a termination request.
    pub const fn from_wire(fes: u16) -> Option<Self> {
        Some(match fes {
            0x01 => Fes::InvalidHeaderField,
            0x02 => Fes::PduSequenceError,
            0x03 => Fes::HeaderDigestError,
            0x04 => Fes::DataTransferOutOfRange,
            0x05 => Fes::DataTransferLimitExceeded,
            0x06 => Fes::UnsupportedParameter,
            _ => return None,
        })
    }
}

wire! {
    /// Header of a Command Capsule: TCP 3.6.2.5.
    pub struct CapsuleCmd: 72 {
        /// 0: common header.
        pub ch: CommonHeader,
        /// 8: submission queue entry.
        pub sqe: Sqe,
    }
}

wire! {
    /// Response Capsule: TCP 3.6.2.6.
    pub struct CapsuleResp: 24 {
        /// 0: common header.
        pub ch: CommonHeader,
        /// 8: completion queue entry.
        pub cqe: Cqe,
    }
}

wire! {
    /// Header of H2CData and C2HData: TCP 3.6.2.7, 3.6.2.8.
    pub struct DataPdu: 24 {
        /// 0: common header.
        pub ch: CommonHeader,
        /// 8: command identifier (CCCID).
        pub cccid: U16,
        /// 10: transfer tag of the R2T that is answered; reserved in C2HData.
        pub ttag: U16,
        /// 12: offset of this data in the command's data, bytes.
        pub datao: U32,
        /// 16: bytes of this data.
        pub datal: U32,
        reserved20: [u8; 4],
    }
}

impl DataPdu {
    /// Byte offset of CCCID.
    pub const OFFSET_CCCID: u32 = 8;
    /// Byte offset of TTAG.
    pub const OFFSET_TTAG: u32 = 10;
    /// Byte offset of DATAO.
    pub const OFFSET_DATAO: u32 = 12;
    /// Byte offset of DATAL.
    pub const OFFSET_DATAL: u32 = 16;

    /// A header with reserved bytes zero.
    pub fn new(ch: CommonHeader, cccid: u16, ttag: u16, datao: u32, datal: u32) -> Self {
        Self {
            ch,
            cccid: U16::new(cccid),
            ttag: U16::new(ttag),
            datao: U32::new(datao),
            datal: U32::new(datal),
            reserved20: [0; 4],
        }
    }
}

wire! {
    /// Ready to Transfer: TCP 3.6.2.9.
    pub struct R2t: 24 {
        /// 0: common header.
        pub ch: CommonHeader,
        /// 8: command identifier (CCCID).
        pub cccid: U16,
        /// 10: transfer tag, to be repeated in H2CData.
        pub ttag: U16,
        /// 12: offset in the command's data, bytes.
        pub r2to: U32,
        /// 16: bytes asked for.
        pub r2tl: U32,
        reserved20: [u8; 4],
    }
}

impl R2t {
    /// A header with reserved bytes zero.
    pub fn new(ch: CommonHeader, cccid: u16, ttag: u16, r2to: u32, r2tl: u32) -> Self {
        Self {
            ch,
            cccid: U16::new(cccid),
            ttag: U16::new(ttag),
            r2to: U32::new(r2to),
            r2tl: U32::new(r2tl),
            reserved20: [0; 4],
        }
    }
}

/// PDU data alignment in bytes from its 0's-based dwords (CPDA, HPDA): 4 to 128.
pub const fn alignment_bytes(pda: u8) -> usize {
    (pda as usize + 1) * 4
}

/// Where the data of a PDU starts (PDO): behind the header and its digest, rounded
/// up to the alignment.
///
/// The result fits the PDO byte for every header and every alignment up to 128.
pub const fn data_offset(header_bytes: usize, header_digest: bool, alignment_bytes: usize) -> usize {
    let end = header_bytes + if header_digest { DIGEST_BYTES } else { 0 };
    end.div_ceil(alignment_bytes) * alignment_bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;
    use zerocopy::IntoBytes;

    #[test]
    fn offsets() {
        assert_eq!(offset_of!(IcReq, maxr2t), 12);
        assert_eq!(offset_of!(IcResp, maxh2cdata), 12);
        assert_eq!(offset_of!(TermReq, fei), 10);
        assert_eq!(offset_of!(CapsuleCmd, sqe), 8);
        assert_eq!(offset_of!(DataPdu, datal), 16);
        assert_eq!(offset_of!(R2t, r2tl), 16);
    }

    #[test]
    fn types() {
        let known: Vec<u8> = (0..=255).filter(|b| PduType::from_byte(*b).is_some()).collect();
        assert_eq!(known, [0, 1, 2, 3, 4, 5, 6, 7, 9]);
        for byte in known {
            let pdu_type = PduType::from_byte(byte).unwrap();
            assert_eq!(pdu_type as u8, byte);
            assert_eq!(CommonHeader::bare(pdu_type).plen.get() as usize, pdu_type.header_bytes());
            assert!(pdu_type.header_bytes() <= MAX_HEADER_BYTES);
        }
        for fes in 0..=7 {
            assert_eq!(Fes::from_wire(fes).map(|f| f as u16), (1..=6).contains(&fes).then_some(fes));
        }
    }

    #[test]
    fn padding() {
        assert_eq!(data_offset(24, false, 4), 24);
        assert_eq!(data_offset(24, true, 4), 28);
        assert_eq!(data_offset(24, true, 8), 32);
        assert_eq!(data_offset(72, false, 128), 128);
        assert_eq!(data_offset(72, true, 12), 84);
        for pda in 0..=MAX_PDA {
            for digest in [false, true] {
                for header in [24, 72] {
                    let pdo = data_offset(header, digest, alignment_bytes(pda));
                    assert!(pdo <= 255 && pdo.is_multiple_of(alignment_bytes(pda)) && pdo >= header);
                }
            }
        }
    }

    #[test]
    fn r2t_bytes() {
        let r2t = R2t::new(CommonHeader::bare(PduType::R2t), 0x1122, 0x3344, 0x2000, 0x1000);
        assert_eq!(
            r2t.as_bytes(),
            [9, 0, 24, 0, 24, 0, 0, 0, 0x22, 0x11, 0x44, 0x33, 0, 0x20, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]
        );
    }
}
