//! Every byte that raid1 keeps on a leg besides the data.
//!
//! ```text
//! unit = the larger of 4096 bytes and a block
//!
//! unit 0, 1            superblock, slots A and B: the one with the higher sequence number counts
//! unit 2 ..            log of regions, one block of it a unit
//! 1 MiB                data; what is left at the end of a larger leg is not used
//!
//! superblock (4096 bytes, little-endian)          block of the log (a unit)
//!    0  8 "RSTRAID1"                                 0  8 "RSTRLOG1"
//!    8  4 version                                    8  4 CRC32C of the unit, this field zero
//!   12  4 CRC32C, this field zero                   12  4 which block of the log
//!   16  8 sequence                                  16 16 UUID of the array
//!   24 16 UUID of the array                         32  . a byte a region:
//!   40  8 events                                          bit 7: may be written at this moment
//!   48 16 epoch                                           bit n: leg n lacks what was written here
//!   64  4 bytes in a block
//!   68  1 legs, 69 1 which of them this is, 70 1 bytes in the name, 71 1 earlier epochs
//!   72  8 blocks of the array
//!   80  8 first block of the data
//!   88  8 blocks in a region
//!   96 64 name
//!  160  7 x 32 legs: UUID 16, event of its last change 8, state 1, zero 7
//!  384 32 x 24 earlier epochs: UUID 16, last event 8
//! 1152    zero
//! ```
//!
//! # Torn writes
//! A superblock is written to the slot that does not count. A block of the log is written in place: where its checksum does not
//! hold, all of its regions count as written and as lacking, which costs time and nothing else.
//!
//! # Epochs
//! Events count what happens to the array. Whenever it goes on with fewer legs than before, a random epoch begins. So a leg was
//! left behind by this history only if its epoch is one of it and its events are not more than that epoch had; a leg with any
//! other epoch has a history of its own.

use crc_fast::{CrcAlgorithm, checksum};
use uuid::Uuid;

/// The version written.
pub const VERSION: u32 = 1;
/// Legs of an array.
pub const MAX_LEGS: usize = 7;
/// Where the data begins, in bytes.
pub const DATA_OFFSET: u64 = 1 << 20;
/// Regions of an array.
pub const MAX_REGIONS: u64 = 1 << 16;
/// Bytes of a region at the least, unless asked for.
pub const MIN_REGION: u64 = 1 << 20;
/// Bytes in the name of an array with superblocks.
pub const MAX_NAME: usize = 64;
/// Earlier epochs that are remembered.
pub const MAX_HISTORY: usize = 32;
/// Bytes of a superblock.
pub const SUPER_BYTES: usize = 4096;

const MAGIC: &[u8; 8] = b"RSTRAID1";
const LOG_MAGIC: &[u8; 8] = b"RSTRLOG1";
const LOG_HEADER: usize = 32;
const NAME_AT: usize = 96;
const LEGS_AT: usize = 160;
const LEG_BYTES: usize = 32;
const HISTORY_AT: usize = 384;
const EPOCH_BYTES: usize = 24;

/// Where things lie on each leg, in blocks of the legs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes in a block.
    pub block_size: u32,
    /// Blocks of the array.
    pub num_blocks: u64,
    /// First block of the data; 0 without superblocks.
    pub data_offset: u64,
    /// Blocks in a region.
    pub region_blocks: u64,
}

impl Layout {
    /// The layout on legs of at least `leg_blocks` blocks; regions of `region_bytes`, or as many bytes as make sense. `None` when
    /// there is no room for data.
    pub fn new(block_size: u32, leg_blocks: u64, superblock: bool, region_bytes: Option<u64>) -> Option<Layout> {
        let block = u64::from(block_size);
        let data_offset = if superblock { DATA_OFFSET / block } else { 0 };
        let num_blocks = leg_blocks.checked_sub(data_offset).filter(|&blocks| blocks > 0)?;
        let least = (num_blocks.div_ceil(MAX_REGIONS)).next_power_of_two();
        let wanted = (region_bytes.unwrap_or(MIN_REGION) / block).max(1).next_power_of_two();
        Some(Layout { block_size, num_blocks, data_offset, region_blocks: wanted.max(least) })
    }

    /// Bytes in a unit.
    pub fn unit(&self) -> usize {
        (self.block_size as usize).max(SUPER_BYTES)
    }

    /// Blocks in a unit.
    pub fn unit_blocks(&self) -> u64 {
        (self.unit() / self.block_size as usize) as u64
    }

    /// Regions.
    pub fn regions(&self) -> usize {
        self.num_blocks.div_ceil(self.region_blocks) as usize
    }

    /// Regions in a block of the log.
    pub fn regions_per_log_block(&self) -> usize {
        self.unit() - LOG_HEADER
    }

    /// Blocks of the log.
    pub fn log_blocks(&self) -> usize {
        self.regions().div_ceil(self.regions_per_log_block())
    }

    /// First block of superblock slot `slot`.
    pub fn super_lba(&self, slot: u64) -> u64 {
        slot * self.unit_blocks()
    }

    /// First block of block `index` of the log.
    pub fn log_lba(&self, index: usize) -> u64 {
        (2 + index as u64) * self.unit_blocks()
    }

    /// The region of a block of the array.
    #[inline]
    pub fn region_of(&self, lba: u64) -> usize {
        // A power of two.
        (lba >> self.region_blocks.trailing_zeros()) as usize
    }

    /// First block and blocks of a region, in the array.
    pub fn range_of(&self, region: usize) -> (u64, u64) {
        let first = region as u64 * self.region_blocks;
        (first, self.region_blocks.min(self.num_blocks - first))
    }

    fn check(&self) -> Result<(), String> {
        let size = self.block_size;
        if !size.is_power_of_two() || !(512..=65536).contains(&size) {
            return Err(format!("blocks of {size} bytes"));
        }
        if self.data_offset != DATA_OFFSET / u64::from(size) {
            return Err(format!("data from block {}", self.data_offset));
        }
        let sane = self.num_blocks.checked_add(self.data_offset).and_then(|n| n.checked_mul(size.into()));
        if self.num_blocks == 0 || sane.is_none_or(|bytes| bytes > i64::MAX as u64) {
            return Err(format!("{} blocks", self.num_blocks));
        }
        if !self.region_blocks.is_power_of_two() || self.num_blocks.div_ceil(self.region_blocks) > MAX_REGIONS {
            return Err(format!("regions of {} blocks", self.region_blocks));
        }
        Ok(())
    }
}

/// What the array says about a leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LegState {
    /// It has every write that was acknowledged.
    InSync,
    /// It gets every write, and lacks what the log says.
    Rebuilding,
    /// It gets nothing; it lacks what the log says.
    Out,
    /// There is no leg: it was taken out for good.
    Empty,
}

/// A leg as all superblocks tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    /// Its identity, drawn when it was added.
    pub id: Uuid,
    /// Its state.
    pub state: LegState,
    /// The event that made it so.
    pub since: u64,
}

/// An epoch that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Epoch {
    /// Which.
    pub id: Uuid,
    /// The last event in it.
    pub last: u64,
}

/// A superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The array.
    pub array: Uuid,
    /// Its name.
    pub name: String,
    /// Where things lie.
    pub layout: Layout,
    /// Grows with each superblock written to this leg.
    pub sequence: u64,
    /// What has happened to the array.
    pub events: u64,
    /// The epoch it is in.
    pub epoch: Uuid,
    /// Earlier ones, the latest last.
    pub history: Vec<Epoch>,
    /// The legs.
    pub legs: Vec<Leg>,
    /// Which of them has this superblock.
    pub me: usize,
}

impl Superblock {
    /// Whether this history has left a leg behind at `epoch` and `events`.
    pub fn remembers(&self, epoch: Uuid, events: u64) -> bool {
        epoch == self.epoch && events <= self.events
            || self.history.iter().any(|old| old.id == epoch && events <= old.last)
    }

    /// Begins an epoch.
    pub fn begin_epoch(&mut self, id: Uuid) {
        self.history.push(Epoch { id: self.epoch, last: self.events });
        if self.history.len() > MAX_HISTORY {
            self.history.remove(0);
        }
        self.epoch = id;
    }

    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.layout.unit()];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(16, &self.sequence.to_le_bytes());
        put(24, self.array.as_bytes());
        put(40, &self.events.to_le_bytes());
        put(48, self.epoch.as_bytes());
        put(64, &self.layout.block_size.to_le_bytes());
        put(68, &[self.legs.len() as u8, self.me as u8, self.name.len() as u8, self.history.len() as u8]);
        put(72, &self.layout.num_blocks.to_le_bytes());
        put(80, &self.layout.data_offset.to_le_bytes());
        put(88, &self.layout.region_blocks.to_le_bytes());
        put(NAME_AT, self.name.as_bytes());
        for (n, leg) in self.legs.iter().enumerate() {
            let at = LEGS_AT + n * LEG_BYTES;
            put(at, leg.id.as_bytes());
            put(at + 16, &leg.since.to_le_bytes());
            put(at + 24, &[state_byte(leg.state)]);
        }
        for (n, epoch) in self.history.iter().enumerate() {
            let at = HISTORY_AT + n * EPOCH_BYTES;
            put(at, epoch.id.as_bytes());
            put(at + 16, &epoch.last.to_le_bytes());
        }
        let crc = crc_with_hole(&bytes[..SUPER_BYTES], 12);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// The superblock in `bytes`; `None` when there is none.
    ///
    /// # Errors
    /// In words, when there is one that cannot be used.
    pub fn decode(bytes: &[u8]) -> Result<Option<Superblock>, String> {
        if bytes.len() < SUPER_BYTES || bytes[..8] != MAGIC[..] {
            return Ok(None);
        }
        let bytes = &bytes[..SUPER_BYTES];
        let version = u32_at(bytes, 8);
        if version != VERSION {
            return Err(format!("a raid superblock of version {version}, of which this server knows only {VERSION}"));
        }
        if crc_with_hole(bytes, 12) != u32_at(bytes, 12) {
            return Err("a raid superblock whose checksum is wrong".to_string());
        }
        let layout = Layout {
            block_size: u32_at(bytes, 64),
            num_blocks: u64_at(bytes, 72),
            data_offset: u64_at(bytes, 80),
            region_blocks: u64_at(bytes, 88),
        };
        let insane = |what: String| format!("a raid superblock that makes no sense: {what}");
        layout.check().map_err(insane)?;
        let [legs, me, name, history] = [68, 69, 70, 71].map(|at| usize::from(bytes[at]));
        if legs == 0 || legs > MAX_LEGS || me >= legs || name == 0 || name > MAX_NAME || history > MAX_HISTORY {
            return Err(insane(format!("leg {me} of {legs}, a name of {name} bytes, {history} epochs")));
        }
        let name = std::str::from_utf8(&bytes[NAME_AT..NAME_AT + name]).map_err(|_| insane("its name".to_string()))?;
        let mut read = Vec::with_capacity(legs);
        for n in 0..legs {
            let at = LEGS_AT + n * LEG_BYTES;
            let state = state_of(bytes[at + 24]).ok_or_else(|| insane(format!("leg state {}", bytes[at + 24])))?;
            read.push(Leg { id: uuid_at(bytes, at), state, since: u64_at(bytes, at + 16) });
        }
        let epoch = |n| {
            let at = HISTORY_AT + n * EPOCH_BYTES;
            Epoch { id: uuid_at(bytes, at), last: u64_at(bytes, at + 16) }
        };
        Ok(Some(Superblock {
            array: uuid_at(bytes, 24),
            name: name.to_string(),
            layout,
            sequence: u64_at(bytes, 16),
            events: u64_at(bytes, 40),
            epoch: uuid_at(bytes, 48),
            history: (0..history).map(epoch).collect(),
            legs: read,
            me,
        }))
    }

    /// Of the two slots, the one that counts.
    ///
    /// # Errors
    /// As [`Superblock::decode`], when neither can be used and one is there.
    pub fn newer(a: &[u8], b: &[u8]) -> Result<Option<Superblock>, String> {
        match (Superblock::decode(a), Superblock::decode(b)) {
            (Ok(Some(a)), Ok(Some(b))) => Ok(Some(if a.sequence >= b.sequence { a } else { b })),
            (Ok(Some(one)), _) | (_, Ok(Some(one))) => Ok(Some(one)),
            (Err(why), _) | (_, Err(why)) => Err(why),
            (Ok(None), Ok(None)) => Ok(None),
        }
    }
}

/// Block `index` of the log of `array`; `regions` are its bytes.
pub fn encode_log(layout: &Layout, array: Uuid, index: usize, regions: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; layout.unit()];
    bytes[..8].copy_from_slice(LOG_MAGIC);
    bytes[12..16].copy_from_slice(&(index as u32).to_le_bytes());
    bytes[16..32].copy_from_slice(array.as_bytes());
    bytes[LOG_HEADER..LOG_HEADER + regions.len()].copy_from_slice(regions);
    let crc = crc_with_hole(&bytes, 8);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// The bytes of the regions in block `index` of the log, if it is whole and of this array.
pub fn decode_log<'a>(layout: &Layout, array: Uuid, index: usize, bytes: &'a [u8]) -> Option<&'a [u8]> {
    let whole = bytes.len() == layout.unit()
        && bytes[..8] == LOG_MAGIC[..]
        && crc_with_hole(bytes, 8) == u32_at(bytes, 8)
        && u32_at(bytes, 12) as usize == index
        && uuid_at(bytes, 16) == array;
    whole.then(|| &bytes[LOG_HEADER..])
}

fn state_byte(state: LegState) -> u8 {
    match state {
        LegState::InSync => 1,
        LegState::Rebuilding => 2,
        LegState::Out => 3,
        LegState::Empty => 4,
    }
}

fn state_of(byte: u8) -> Option<LegState> {
    [LegState::InSync, LegState::Rebuilding, LegState::Out, LegState::Empty]
        .into_iter()
        .find(|&s| state_byte(s) == byte)
}

/// CRC32C of `bytes` with the four at `hole` taken as zero.
fn crc_with_hole(bytes: &[u8], hole: usize) -> u32 {
    let mut copy = bytes.to_vec();
    copy[hole..hole + 4].fill(0);
    checksum(CrcAlgorithm::Crc32Iscsi, &copy) as u32
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn uuid_at(bytes: &[u8], at: usize) -> Uuid {
    Uuid::from_bytes(bytes[at..at + 16].try_into().expect("sixteen bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::Rng;

    fn draw(rng: &mut Rng) -> Superblock {
        let mut uuid = || {
            let mut bytes = [0; 16];
            rng.fill(&mut bytes);
            Uuid::from_bytes(bytes)
        };
        let (array, epoch, old) = (uuid(), uuid(), uuid());
        let legs: Vec<Uuid> = (0..3).map(|_| uuid()).collect();
        let block_size = 512 << rng.below(8);
        let layout = Layout::new(block_size, 1 << (13 + rng.below(20)), true, None).unwrap();
        let states = [LegState::InSync, LegState::Rebuilding, LegState::Out, LegState::Empty];
        let leg = |id: Uuid| Leg { id, state: states[id.as_bytes()[0] as usize % 4], since: 3 };
        Superblock {
            array,
            name: "mirror".to_string(),
            layout,
            sequence: rng.next_u64(),
            events: rng.next_u64(),
            epoch,
            history: vec![Epoch { id: old, last: 7 }],
            legs: legs.into_iter().map(leg).collect(),
            me: rng.below(3) as usize,
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let mut rng = Rng::new(1);
        for _ in 0..200 {
            let one = draw(&mut rng);
            assert_eq!(Superblock::decode(&one.encode()), Ok(Some(one)));
        }
    }

    #[test]
    fn no_byte_can_change_unseen() {
        let one = draw(&mut Rng::new(2));
        let bytes = one.encode();
        for at in 0..SUPER_BYTES {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            assert_ne!(Superblock::decode(&damaged), Ok(Some(one.clone())), "byte {at}");
        }
        let mut newer = bytes.clone();
        newer[8] = 9;
        assert!(Superblock::decode(&newer).unwrap_err().contains("version 9"));
    }

    /// Any bytes behind a checksum that holds: refused or taken, and what is taken can be written again.
    #[test]
    fn numbers_are_checked() {
        let mut rng = Rng::new(3);
        let mut taken = 0;
        for _ in 0..20_000 {
            let mut bytes = draw(&mut rng).encode();
            for _ in 0..1 + rng.below(4) {
                let at = 16 + rng.below(400) as usize;
                bytes[at] = rng.next_u64() as u8;
            }
            let crc = crc_with_hole(&bytes[..SUPER_BYTES], 12);
            bytes[12..16].copy_from_slice(&crc.to_le_bytes());
            if let Ok(Some(one)) = Superblock::decode(&bytes) {
                taken += 1;
                assert!(one.layout.regions() as u64 <= MAX_REGIONS && one.me < one.legs.len());
                let end = one.layout.log_lba(one.layout.log_blocks());
                assert!(end <= one.layout.data_offset, "the log passes into the data");
                assert_eq!(Superblock::decode(&one.encode()), Ok(Some(one)));
            }
        }
        assert!(taken > 100);
    }

    #[test]
    fn the_newer_whole_slot_counts() {
        let mut old = draw(&mut Rng::new(4));
        old.sequence = 8;
        let new = Superblock { sequence: 9, events: 77, ..old.clone() };
        let (a, b) = (old.encode(), new.encode());
        assert_eq!(Superblock::newer(&a, &b).unwrap().unwrap().events, 77);
        assert_eq!(Superblock::newer(&b, &a).unwrap().unwrap().events, 77);
        let mut torn = b;
        torn[128..512].fill(0xaa);
        assert_eq!(Superblock::newer(&a, &torn).unwrap().unwrap(), old);
        assert!(Superblock::newer(&torn, &torn).is_err());
        assert_eq!(Superblock::newer(&[0; 4096], &[0; 4096]), Ok(None));
    }

    #[test]
    fn layouts_have_room_for_their_log() {
        for block_size in [512, 4096, 65536] {
            for blocks in [DATA_OFFSET / u64::from(block_size) + 1, 1 << 16, 1 << 33] {
                let Some(layout) = Layout::new(block_size, blocks, true, None) else { continue };
                layout.check().unwrap();
                assert!(layout.log_lba(layout.log_blocks()) <= layout.data_offset);
                let (first, count) = layout.range_of(layout.regions() - 1);
                assert_eq!(first + count, layout.num_blocks);
            }
        }
        assert_eq!(Layout::new(512, 2048, true, None), None);
    }
}
