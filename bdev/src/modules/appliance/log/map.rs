//! Where each block's payload is: a table in two levels, made where it is used.
//!
//! ```text
//! top[262144 blocks each] -> chunk[256 blocks] = packed location + CRC-32C of the payload
//! ```
//! 12 bytes for each block of a chunk that maps any. A block that is not mapped reads as zeroes.
//!
//! # Packed location (64 bits)
//! Bits 0..17 are the bytes of the payload, bits 17..64 its place on the base in units of 8 bytes. 0 is "not mapped" and 1 is
//! "lost": what was there cannot be read, and neither can the block until it is written again. Neither can be a place, since
//! the first bytes of the base belong to the superblock.

/// Blocks that a chunk maps.
pub const CHUNK_BLOCKS: usize = 256;
const MIDDLE: usize = 1024;

const LEN_BITS: u32 = 17;

/// A packed location.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loc(u64);

impl Loc {
    /// Not mapped.
    pub const NONE: Loc = Loc(0);
    /// The contents are lost.
    pub const LOST: Loc = Loc(1);

    /// `len` bytes at `offset`, a multiple of 8.
    pub fn new(offset: u64, len: u32) -> Loc {
        debug_assert!(offset.is_multiple_of(8) && offset >> 3 < 1 << (64 - LEN_BITS) && len < 1 << LEN_BITS);
        Loc((offset >> 3) << LEN_BITS | u64::from(len))
    }

    /// As it stands on the base.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// What stands on the base, unchecked.
    pub fn from_raw(raw: u64) -> Loc {
        Loc(raw)
    }

    /// First byte on the base.
    #[inline]
    pub fn offset(self) -> u64 {
        (self.0 >> LEN_BITS) << 3
    }

    /// Bytes of the payload.
    #[inline]
    pub fn bytes(self) -> u32 {
        (self.0 & ((1 << LEN_BITS) - 1)) as u32
    }

    /// Whether it is [`Loc::NONE`].
    #[inline]
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Whether it is [`Loc::LOST`].
    #[inline]
    pub fn is_lost(self) -> bool {
        self.0 == 1
    }

    /// Whether it names bytes on the base.
    #[inline]
    pub fn is_place(self) -> bool {
        self.0 > 1
    }
}

/// What is known of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Where its payload is.
    pub loc: Loc,
    /// CRC-32C of the payload.
    pub crc: u32,
}

struct Chunk {
    locs: [Loc; CHUNK_BLOCKS],
    crcs: [u32; CHUNK_BLOCKS],
    mapped: u16,
}

type Middle = Box<[Option<Box<Chunk>>]>;

/// The table.
#[derive(Default)]
pub struct Map {
    top: Vec<Option<Middle>>,
    chunks: u64,
    entries: u64,
}

impl Map {
    /// Blocks that are mapped.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Chunks that map any.
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    fn chunk(&self, number: u64) -> Option<&Chunk> {
        let middle = self.top.get(usize::try_from(number).ok()? / MIDDLE)?.as_ref()?;
        middle[number as usize % MIDDLE].as_deref()
    }

    /// What is known of a block.
    #[inline]
    pub fn get(&self, lba: u64) -> Entry {
        let index = lba as usize % CHUNK_BLOCKS;
        match self.chunk(lba / CHUNK_BLOCKS as u64) {
            Some(chunk) => Entry { loc: chunk.locs[index], crc: chunk.crcs[index] },
            None => Entry::default(),
        }
    }

    /// Maps a block, and returns what was known of it. The caller bounds `lba`: memory for the top level grows with it.
    pub fn set(&mut self, lba: u64, entry: Entry) -> Entry {
        if entry.loc.is_none() {
            let mut old = Entry::default();
            self.remove(lba, 1, |_, was| old = was);
            return old;
        }
        let number = (lba / CHUNK_BLOCKS as u64) as usize;
        if self.top.len() <= number / MIDDLE {
            self.top.resize_with(number / MIDDLE + 1, || None);
        }
        let middle = self.top[number / MIDDLE].get_or_insert_with(|| (0..MIDDLE).map(|_| None).collect());
        let slot = &mut middle[number % MIDDLE];
        if slot.is_none() {
            self.chunks += 1;
        }
        let chunk = slot.get_or_insert_with(|| {
            Box::new(Chunk { locs: [Loc::NONE; CHUNK_BLOCKS], crcs: [0; CHUNK_BLOCKS], mapped: 0 })
        });
        let index = lba as usize % CHUNK_BLOCKS;
        let old = Entry { loc: chunk.locs[index], crc: chunk.crcs[index] };
        if old.loc.is_none() {
            chunk.mapped += 1;
            self.entries += 1;
        }
        chunk.locs[index] = entry.loc;
        chunk.crcs[index] = entry.crc;
        old
    }

    /// Unmaps `lba..lba + blocks` and tells what was mapped.
    pub fn remove(&mut self, lba: u64, blocks: u64, mut removed: impl FnMut(u64, Entry)) {
        let end = lba.saturating_add(blocks);
        let mut at = lba;
        while at < end {
            let Some(number) = self.next_chunk(at / CHUNK_BLOCKS as u64) else { break };
            let first = number * CHUNK_BLOCKS as u64;
            let (from, to) = (at.max(first), end.min(first + CHUNK_BLOCKS as u64));
            let slot = self.top[number as usize / MIDDLE].as_mut().map(|middle| &mut middle[number as usize % MIDDLE]);
            if let Some(slot) = slot
                && let Some(chunk) = slot.as_mut()
            {
                for block in from..to {
                    let index = (block - first) as usize;
                    let (loc, crc) = (std::mem::take(&mut chunk.locs[index]), std::mem::take(&mut chunk.crcs[index]));
                    if !loc.is_none() {
                        chunk.mapped -= 1;
                        self.entries -= 1;
                        removed(block, Entry { loc, crc });
                    }
                }
                if chunk.mapped == 0 {
                    *slot = None;
                    self.chunks -= 1;
                }
            }
            at = first + CHUNK_BLOCKS as u64;
        }
    }

    /// The first chunk from `number` on that maps anything.
    pub fn next_chunk(&self, number: u64) -> Option<u64> {
        let mut number = usize::try_from(number).ok()?;
        while number / MIDDLE < self.top.len() {
            if let Some(middle) = &self.top[number / MIDDLE] {
                let found = middle[number % MIDDLE..].iter().position(Option::is_some);
                if let Some(found) = found {
                    return Some((number + found) as u64);
                }
            }
            number = (number / MIDDLE + 1) * MIDDLE;
        }
        None
    }

    /// The mapped blocks of a chunk by their place in it.
    pub fn chunk_entries(&self, number: u64) -> impl Iterator<Item = (usize, Entry)> + '_ {
        self.chunk(number).into_iter().flat_map(|chunk| {
            let all = chunk.locs.iter().zip(&chunk.crcs).enumerate();
            all.filter(|(_, (loc, _))| !loc.is_none()).map(|(index, (&loc, &crc))| (index, Entry { loc, crc }))
        })
    }

    /// Every mapped block, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, Entry)> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let number = self.next_chunk(next)?;
            next = number + 1;
            Some(number)
        })
        .flat_map(|number| {
            self.chunk_entries(number).map(move |(index, entry)| (number * CHUNK_BLOCKS as u64 + index as u64, entry))
        })
    }

    /// The highest mapped block.
    pub fn last(&self) -> Option<u64> {
        let (top, middle) = self.top.iter().enumerate().rev().find_map(|(top, middle)| {
            let middle = middle.as_ref()?.iter().rposition(Option::is_some)?;
            Some((top, middle))
        })?;
        let number = (top * MIDDLE + middle) as u64;
        self.chunk_entries(number).last().map(|(index, _)| number * CHUNK_BLOCKS as u64 + index as u64)
    }
}

impl std::fmt::Debug for Map {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Map({} blocks in {} chunks)", self.entries, self.chunks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::Rng;
    use std::collections::BTreeMap;

    #[test]
    fn does_what_a_tree_does() {
        let mut rng = Rng::new(7);
        let (mut map, mut model) = (Map::default(), BTreeMap::new());
        for step in 0..20_000u64 {
            let lba = rng.below(4) * 300_000 + rng.below(700);
            if rng.one_in(40) {
                let blocks = rng.below(600_000);
                let mut gone = Vec::new();
                map.remove(lba, blocks, |block, entry| gone.push((block, entry)));
                let expected: Vec<(u64, Entry)> = model.range(lba..lba + blocks).map(|(&k, &v)| (k, v)).collect();
                assert_eq!(gone, expected);
                model.retain(|&k, _| k < lba || k >= lba + blocks);
            } else {
                let entry = Entry { loc: Loc::new(131_072 + 8 * step, 1 + rng.below(65536) as u32), crc: step as u32 };
                assert_eq!(map.set(lba, entry), model.insert(lba, entry).unwrap_or_default());
            }
            assert_eq!(map.entries(), model.len() as u64);
            assert_eq!(map.get(lba), model.get(&lba).copied().unwrap_or_default());
        }
        assert!(map.iter().eq(model.iter().map(|(&k, &v)| (k, v))));
        assert_eq!(map.last(), model.keys().last().copied());
        map.remove(0, u64::MAX, |_, _| {});
        assert_eq!((map.entries(), map.chunks(), map.last()), (0, 0, None));
    }

    #[test]
    fn locations_keep_their_parts() {
        for (offset, len) in [(131_072, 1), (131_080, 65536), ((1 << 50) - 8, 4096)] {
            let loc = Loc::new(offset, len);
            assert_eq!((loc.offset(), loc.bytes(), loc.is_place()), (offset, len, true));
            assert_eq!(Loc::from_raw(loc.raw()), loc);
        }
        assert!(!Loc::NONE.is_place() && !Loc::LOST.is_place());
    }
}
