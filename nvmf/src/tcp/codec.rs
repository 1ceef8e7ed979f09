//! Framing that both ends share: where header, digests, padding and data of a PDU lie, and what may be wrong with it.
//!
//! ```text
//! 0            HLEN     +4          PDO                         PLEN
//! +------------+--------+-----------+-----------------+--------+
//! |   header   | HDGST? |  padding  |      data       | DDGST? |
//! +------------+--------+-----------+-----------------+--------+
//! |<-- header_bytes --->|<-- pad -->|<- data_bytes -->|
//! ```

use crate::spec::pdu::{CommonHeader, DIGEST_BYTES, Fes, MAX_PDA, PduType, alignment_bytes, data_offset, flags};
use std::fmt;
use zerocopy::little_endian::U32;

/// A mistake of the peer after which the connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fatal {
    /// Kind of error.
    pub fes: Fes,
    /// Fatal error information: the offset of the field, or the digest that was received.
    pub fei: u32,
    /// What was wrong, for the log.
    pub what: &'static str,
}

impl Fatal {
    /// A field of the PDU at byte `offset` has a value that it may not have.
    pub const fn field(offset: u32, what: &'static str) -> Self {
        Self { fes: Fes::InvalidHeaderField, fei: offset, what }
    }

    /// A PDU that may not come now.
    pub const fn sequence(what: &'static str) -> Self {
        Self { fes: Fes::PduSequenceError, fei: 0, what }
    }
}

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?}, FEI {:#x})", self.what, self.fes, self.fei)
    }
}

/// How the PDUs of one direction are framed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Framing {
    /// Headers are followed by a digest.
    pub header_digest: bool,
    /// Data is followed by a digest.
    pub data_digest: bool,
    /// CPDA or HPDA of the direction: alignment of the data in dwords, 0's-based, up to 31.
    pub pda: u8,
}

/// Where the parts of a PDU lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Header and its digest.
    pub header_bytes: usize,
    /// Padding between header and data.
    pub pad_bytes: usize,
    /// Data; 0 means that there is none, and no data digest.
    pub data_bytes: u32,
    /// A data digest follows the data.
    pub data_digest: bool,
}

impl Framing {
    /// Bytes of a header of this type with its digest.
    pub const fn header_bytes(&self, pdu_type: PduType) -> usize {
        let digest = self.header_digest && pdu_type.may_have_digest();
        pdu_type.header_bytes() + if digest { DIGEST_BYTES } else { 0 }
    }

    /// The common header and the layout of a PDU to be sent. `data_bytes` must leave PLEN below 2^32.
    pub fn header(&self, pdu_type: PduType, pdu_flags: u8, data_bytes: u32) -> (CommonHeader, Layout) {
        debug_assert!(self.pda <= MAX_PDA && (data_bytes == 0 || pdu_type.may_have_data()));
        let header_digest = self.header_digest && pdu_type.may_have_digest();
        let header_bytes = self.header_bytes(pdu_type);
        let data_digest = self.data_digest && data_bytes != 0;
        let mut ch = CommonHeader::bare(pdu_type);
        ch.flags =
            pdu_flags | if header_digest { flags::HDGST } else { 0 } | if data_digest { flags::DDGST } else { 0 };
        let mut plen = header_bytes as u32;
        let mut pad_bytes = 0;
        if data_bytes != 0 {
            let pdo = data_offset(pdu_type.header_bytes(), header_digest, alignment_bytes(self.pda));
            ch.pdo = pdo as u8;
            pad_bytes = pdo - header_bytes;
            plen = pdo as u32 + data_bytes + if data_digest { DIGEST_BYTES as u32 } else { 0 };
        }
        ch.plen = U32::new(plen);
        (ch, Layout { header_bytes, pad_bytes, data_bytes, data_digest })
    }

    /// What can be said of a PDU from its common header before the rest of the header is there: whether waiting for
    /// the rest makes sense.
    ///
    /// # Errors
    /// HLEN is not that of the type, or PLEN is too short for the header.
    pub fn check_early(&self, ch: &CommonHeader, pdu_type: PduType) -> Result<(), Fatal> {
        if usize::from(ch.hlen) != pdu_type.header_bytes() {
            return Err(Fatal::field(CommonHeader::OFFSET_HLEN, "HLEN is not that of the PDU type"));
        }
        if (ch.plen.get() as usize) < self.header_bytes(pdu_type) {
            return Err(Fatal::field(CommonHeader::OFFSET_PLEN, "PLEN is shorter than the header"));
        }
        Ok(())
    }

    /// Checks the common header of a PDU that was received; [`check_early`](Self::check_early) and the header digest
    /// have been checked before.
    ///
    /// # Errors
    /// Invalid Header Field for the first of FLAGS, PLEN, PDO that is wrong.
    #[inline]
    pub fn check(&self, ch: &CommonHeader, pdu_type: PduType) -> Result<Layout, Fatal> {
        debug_assert!(self.check_early(ch, pdu_type).is_ok());
        let header_bytes = self.header_bytes(pdu_type);
        let header_digest = self.header_digest && pdu_type.may_have_digest();
        if (ch.flags & flags::HDGST != 0) != header_digest && pdu_type.may_have_digest() {
            return Err(Fatal::field(CommonHeader::OFFSET_FLAGS, "HDGSTF is not as negotiated"));
        }
        let plen = ch.plen.get();
        let mut layout = Layout { header_bytes, pad_bytes: 0, data_bytes: 0, data_digest: false };
        if plen as usize == header_bytes {
            return Ok(layout);
        }
        if !pdu_type.may_have_data() {
            return Err(Fatal::field(
                CommonHeader::OFFSET_PLEN,
                "PLEN is longer than the header of a PDU without data",
            ));
        }
        if (ch.flags & flags::DDGST != 0) != self.data_digest {
            return Err(Fatal::field(CommonHeader::OFFSET_FLAGS, "DDGSTF is not as negotiated"));
        }
        let pdo = usize::from(ch.pdo);
        if pdo < header_bytes || !pdo.is_multiple_of(alignment_bytes(self.pda)) {
            return Err(Fatal::field(CommonHeader::OFFSET_PDO, "PDO lies in the header or is not aligned"));
        }
        let digest_bytes = if self.data_digest { DIGEST_BYTES as u32 } else { 0 };
        match plen.checked_sub(pdo as u32 + digest_bytes) {
            None | Some(0) => Err(Fatal::field(CommonHeader::OFFSET_PLEN, "PLEN leaves no room for data")),
            Some(data_bytes) => {
                layout.pad_bytes = pdo - header_bytes;
                layout.data_bytes = data_bytes;
                layout.data_digest = self.data_digest;
                Ok(layout)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: Framing = Framing { header_digest: true, data_digest: true, pda: 0 };

    #[test]
    fn what_is_sent_is_accepted() {
        for pda in 0..=MAX_PDA {
            for bits in 0..4 {
                let framing = Framing { header_digest: bits & 1 != 0, data_digest: bits & 2 != 0, pda };
                for pdu_type in [PduType::CapsuleCmd, PduType::H2cData, PduType::C2hData] {
                    for data in [0, 1, 4096, 1 << 20] {
                        let (ch, layout) = framing.header(pdu_type, 0, data);
                        assert_eq!(framing.check(&ch, pdu_type), Ok(layout));
                        assert_eq!(layout.data_bytes, data);
                    }
                }
                for pdu_type in [PduType::IcReq, PduType::IcResp, PduType::R2t, PduType::CapsuleResp] {
                    let (ch, layout) = framing.header(pdu_type, 0, 0);
                    assert_eq!(framing.check(&ch, pdu_type), Ok(layout));
                }
            }
        }
    }

    #[test]
    fn layout_of_a_capsule_with_everything() {
        let framing = Framing { pda: 7, ..BOTH };
        let (ch, layout) = framing.header(PduType::CapsuleCmd, 0, 512);
        assert_eq!((ch.hlen, ch.pdo, ch.flags, ch.plen.get()), (72, 96, 3, 96 + 512 + 4));
        assert_eq!((layout.header_bytes, layout.pad_bytes), (76, 20));
    }

    #[track_caller]
    fn refused(framing: Framing, pdu_type: PduType, data: u32, fei: u32, spoil: impl FnOnce(&mut CommonHeader)) {
        let (mut ch, _) = framing.header(pdu_type, 0, data);
        spoil(&mut ch);
        let checked = framing.check_early(&ch, pdu_type).and_then(|()| framing.check(&ch, pdu_type));
        let fatal = checked.expect_err("accepted");
        assert_eq!((fatal.fes, fatal.fei), (Fes::InvalidHeaderField, fei), "{fatal}");
    }

    #[test]
    fn each_field_is_checked() {
        let none = Framing::default();
        refused(none, PduType::CapsuleCmd, 0, 2, |ch| ch.hlen = 71);
        refused(none, PduType::CapsuleCmd, 0, 4, |ch| ch.plen.set(71));
        refused(none, PduType::CapsuleCmd, 0, 4, |ch| ch.plen.set(0));
        refused(BOTH, PduType::CapsuleCmd, 0, 4, |ch| ch.plen.set(75));
        refused(none, PduType::CapsuleCmd, 0, 1, |ch| ch.flags = flags::HDGST);
        refused(BOTH, PduType::CapsuleCmd, 0, 1, |ch| ch.flags = 0);
        refused(none, PduType::CapsuleCmd, 8, 1, |ch| ch.flags = flags::DDGST);
        refused(BOTH, PduType::H2cData, 8, 1, |ch| ch.flags = flags::HDGST);
        refused(none, PduType::H2cData, 8, 3, |ch| ch.pdo = 23);
        refused(none, PduType::H2cData, 8, 3, |ch| ch.pdo = 26);
        refused(none, PduType::H2cData, 8, 4, |ch| ch.pdo = 32);
        refused(none, PduType::H2cData, 8, 4, |ch| ch.pdo = 36);
        refused(BOTH, PduType::H2cData, 8, 4, |ch| ch.plen.set(28 + 4));
        refused(none, PduType::R2t, 0, 4, |ch| ch.plen.set(25));
        refused(none, PduType::IcReq, 0, 4, |ch| ch.plen.set(129));
        let aligned = Framing { pda: 1, ..none };
        refused(aligned, PduType::H2cData, 8, 3, |ch| ch.pdo = 28);
    }
}
