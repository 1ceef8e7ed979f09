//! Header and data digests: CRC32C as in iSCSI, least significant byte first (TCP 3.3.1.1).

use crate::spec::pdu::DIGEST_BYTES;
use crc_fast::{CrcAlgorithm, Digest, checksum};

/// The digest of `bytes` as it goes on the wire.
#[inline]
pub fn crc32c(bytes: &[u8]) -> [u8; DIGEST_BYTES] {
    // The calculator works in 64 bits for all algorithms; a 32-bit CRC is in the low half.
    (checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32).to_le_bytes()
}

/// A digest over bytes that come in pieces; used again for every PDU.
pub struct Crc32c(Digest);

impl Crc32c {
    /// Over no bytes yet.
    pub fn new() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc32Iscsi))
    }

    /// Adds the next bytes.
    #[inline]
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest as it goes on the wire; starts over.
    pub fn finish(&mut self) -> [u8; DIGEST_BYTES] {
        (self.0.finalize_reset() as u32).to_le_bytes()
    }
}

impl Default for Crc32c {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Crc32c {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Crc32c({:08x})", self.0.finalize() as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors() {
        // RFC 3720 B.4: the digests of 32 bytes of zeroes, of ones, and of 0 to 31, in wire order.
        assert_eq!(crc32c(&[0; 32]), [0xaa, 0x36, 0x91, 0x8a]);
        assert_eq!(crc32c(&[0xff; 32]), [0x43, 0xab, 0xa8, 0x62]);
        let rising: [u8; 32] = std::array::from_fn(|i| i as u8);
        assert_eq!(crc32c(&rising), [0x4e, 0x79, 0xdd, 0x46]);
    }

    #[test]
    fn pieces_make_the_whole_and_it_starts_over() {
        let bytes: Vec<u8> = (0..5000u32).map(|i| (i * 7) as u8).collect();
        let mut crc = Crc32c::new();
        for _ in 0..2 {
            for piece in bytes.chunks(37) {
                crc.update(piece);
            }
            assert_eq!(crc.finish(), crc32c(&bytes));
        }
    }
}
