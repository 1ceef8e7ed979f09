//! The log of regions in memory: which may be written at this moment, and which leg lacks what.
//!
//! # Invariants
//! - A region that may be written has its bit on every leg of the array before the first write to it starts.
//! - Where a region may be written, every leg that does not get writes counts as lacking it, whether its bit is set or not: after a
//!   crash [`Regions::settle`] sets them. So a leg that goes out needs no write of the log before acknowledgements go on.

use uuid::Uuid;

use super::format::{self, Layout};

/// The region may be written.
pub const ACTIVE: u8 = 0x80;

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct Regions {
    layout: Layout,
    bytes: Vec<u8>,
    /// Blocks of the log that differ from what was last taken to be written.
    changed: Vec<bool>,
}

impl Regions {
    /// Regions that nobody writes and nobody lacks.
    pub fn new(layout: Layout) -> Regions {
        Regions { layout, bytes: vec![0; layout.regions()], changed: vec![false; layout.log_blocks()] }
    }

    fn change(&mut self, region: usize, to: u8) {
        if self.bytes[region] != to {
            self.bytes[region] = to;
            self.changed[region / self.layout.regions_per_log_block()] = true;
        }
    }

    /// Regions.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there are none, which cannot be.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The byte of a region.
    pub fn byte(&self, region: usize) -> u8 {
        self.bytes[region]
    }

    /// Sets bits of a region.
    pub fn set(&mut self, region: usize, bits: u8) {
        self.change(region, self.bytes[region] | bits);
    }

    /// Clears bits of a region.
    pub fn clear(&mut self, region: usize, bits: u8) {
        self.change(region, self.bytes[region] & !bits);
    }

    /// Whether a region may be written.
    pub fn is_active(&self, region: usize) -> bool {
        self.bytes[region] & ACTIVE != 0
    }

    /// Whether any may be.
    pub fn any_active(&self) -> bool {
        self.bytes.iter().any(|byte| byte & ACTIVE != 0)
    }

    /// The legs in `legs` lack every region that may be written.
    pub fn settle(&mut self, legs: u8) {
        for region in 0..self.bytes.len() {
            if self.is_active(region) {
                self.set(region, legs & !ACTIVE);
            }
        }
    }

    /// The legs in `legs` lack everything.
    pub fn lack_all(&mut self, legs: u8) {
        (0..self.bytes.len()).for_each(|region| self.set(region, legs & !ACTIVE));
    }

    /// The legs in `legs` lack nothing.
    pub fn lack_none(&mut self, legs: u8) {
        (0..self.bytes.len()).for_each(|region| self.clear(region, legs & !ACTIVE));
    }

    /// The regions that a leg lacks.
    pub fn lacking(&self, leg: usize) -> impl Iterator<Item = usize> + '_ {
        self.bytes.iter().enumerate().filter(move |(_, byte)| **byte & 1 << leg != 0).map(|(region, _)| region)
    }

    /// Takes the list of changed blocks of the log.
    pub fn take_changed(&mut self) -> Vec<usize> {
        let changed = (0..self.changed.len()).filter(|&index| self.changed[index]).collect();
        self.changed.fill(false);
        changed
    }

    /// Whether blocks of the log have changed.
    pub fn is_changed(&self) -> bool {
        self.changed.iter().any(|&changed| changed)
    }

    fn span(&self, index: usize) -> std::ops::Range<usize> {
        let per = self.layout.regions_per_log_block();
        index * per..((index + 1) * per).min(self.bytes.len())
    }

    /// Block `index` of the log, as bytes.
    pub fn encode(&self, array: Uuid, index: usize) -> Vec<u8> {
        format::encode_log(&self.layout, array, index, &self.bytes[self.span(index)])
    }

    /// Adds what a leg has in block `index` of its log; where that is damaged, everything counts as written and as lacking.
    /// Whether it was whole.
    pub fn add(&mut self, array: Uuid, index: usize, block: &[u8]) -> bool {
        let span = self.span(index);
        let found = format::decode_log(&self.layout, array, index, block);
        for (n, region) in span.enumerate() {
            self.set(region, found.map_or(0xff, |bytes| bytes[n]));
        }
        found.is_some()
    }
}
