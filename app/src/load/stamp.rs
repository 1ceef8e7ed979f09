//! Blocks that say what they are: which run wrote them, where, the how-manieth write of the place, and a checksum.
//!
//! ```text
//! byte 0       8      16       24     32           36        40
//! +----------+------+--------+------+------------+---------+------------------------------+
//! | "RSLOAD1"| run  | volume | LBA  | generation | CRC-32C | words made of what is before |
//! +----------+------+--------+------+------------+---------+------------------------------+
//! ```
//! All little-endian. The checksum is of the whole block with zeroes in its own place. A run knows the generation of every
//! place that it wrote, so a write that was lost, torn, misplaced or overtaken by an older one is told apart from the right
//! one.

use crc_fast::CrcAlgorithm::Crc32Iscsi;
use crc_fast::Digest;

const MAGIC: [u8; 8] = *b"RSLOAD1\0";
const HEADER: usize = 40;
const CRC: std::ops::Range<usize> = 36..40;

/// What a block is to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Number of the run.
    pub run: u64,
    /// The namespace's or device's number.
    pub volume: u64,
    /// The block.
    pub lba: u64,
    /// How often its place was written in this run, from 1.
    pub generation: u32,
}

impl Stamp {
    /// Writes the stamp over a block of at least 512 bytes.
    pub fn fill(&self, block: &mut [u8]) {
        let seed = self.run ^ self.volume.rotate_left(48) ^ self.lba.rotate_left(24) ^ u64::from(self.generation) << 8;
        let mut word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for chunk in block[HEADER..].chunks_mut(8) {
            word = word.wrapping_mul(0xd129_1a2d_8e5f_3c35).rotate_left(23);
            chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
        }
        block[..8].copy_from_slice(&MAGIC);
        block[8..16].copy_from_slice(&self.run.to_le_bytes());
        block[16..24].copy_from_slice(&self.volume.to_le_bytes());
        block[24..32].copy_from_slice(&self.lba.to_le_bytes());
        block[32..36].copy_from_slice(&self.generation.to_le_bytes());
        block[CRC].fill(0);
        let crc = crc(block);
        block[CRC].copy_from_slice(&crc.to_le_bytes());
    }

    /// Checks that a block is what was written.
    ///
    /// # Errors
    /// What it is instead, for people.
    pub fn check(&self, block: &mut [u8]) -> Result<(), String> {
        let field = |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().expect("eight bytes"));
        let generation = u32::from_le_bytes(block[32..36].try_into().expect("four bytes"));
        let said = u32::from_le_bytes(block[CRC].try_into().expect("four bytes"));
        let found = Stamp { run: field(8), volume: field(16), lba: field(24), generation };
        let place = format!("volume {} block {}, write {} of its place", self.volume, self.lba, self.generation);
        if block[..8] != MAGIC {
            let zeroes = if block.iter().all(|byte| *byte == 0) { "zeroes" } else { "data of somebody else" };
            return Err(format!("{place}: there are {zeroes}"));
        }
        block[CRC].fill(0);
        let really = crc(block);
        block[CRC].copy_from_slice(&said.to_le_bytes());
        if really != said {
            return Err(format!("{place}: the block is damaged: checksum {really:08x} where it says {said:08x}"));
        }
        if found == *self {
            return Ok(());
        }
        Err(match found {
            Stamp { run, .. } if run != self.run => format!("{place}: the block is of another run"),
            Stamp { volume, lba, .. } if (volume, lba) != (self.volume, self.lba) => {
                format!("{place}: the block belongs to volume {volume} block {lba}")
            }
            Stamp { generation, .. } => format!("{place}: the block is of write {generation}"),
        })
    }
}

fn crc(block: &[u8]) -> u32 {
    let mut digest = Digest::new(Crc32Iscsi);
    digest.update(block);
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIGHT: Stamp = Stamp { run: 7, volume: 1, lba: 99, generation: 3 };

    #[test]
    fn every_way_to_be_wrong_is_told_apart() {
        let filled = |stamp: Stamp| {
            let mut block = vec![0xaa; 512];
            stamp.fill(&mut block);
            block
        };
        assert_eq!(RIGHT.check(&mut filled(RIGHT)), Ok(()));
        for (found, says) in [
            (Stamp { generation: 2, ..RIGHT }, "the block is of write 2"),
            (Stamp { lba: 100, ..RIGHT }, "belongs to volume 1 block 100"),
            (Stamp { volume: 2, ..RIGHT }, "belongs to volume 2 block 99"),
            (Stamp { run: 8, ..RIGHT }, "of another run"),
        ] {
            let why = RIGHT.check(&mut filled(found)).unwrap_err();
            assert!(why.contains(says), "{why}");
        }
        assert!(RIGHT.check(&mut vec![0; 512]).unwrap_err().contains("zeroes"));
        assert!(RIGHT.check(&mut vec![1; 512]).unwrap_err().contains("somebody else"));
        for at in 8..512 {
            let mut block = filled(RIGHT);
            block[at] ^= 0x10;
            let why = RIGHT.check(&mut block).unwrap_err();
            assert!(why.contains("damaged"), "byte {at}: {why}");
        }
        // Half of it is of an older write.
        let mut torn = filled(RIGHT);
        torn[256..].copy_from_slice(&filled(Stamp { generation: 2, ..RIGHT })[256..]);
        assert!(RIGHT.check(&mut torn).unwrap_err().contains("damaged"));
    }
}
