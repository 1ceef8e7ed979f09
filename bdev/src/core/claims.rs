//! The blocks that are being changed: by commands that were sent and have not completed, whether they are outstanding, held
//! or wait to be sent again.
//!
//! A command that may be sent twice must not have another one between its two executions that changes the same blocks: what
//! was acknowledged, and read, would change back. Nor may two that overlap be outstanding on the legs of a mirror, which may
//! execute them in different orders and would differ from then on. So what overlaps a claim and writes, or reads as the source of a copy what
//! is being written, waits. Nearly nothing ever does, and is to be found out cheaply: blocks are hashed to counters, and only
//! where these say so the claims are looked through.

use slab::Slab;

use super::{Io, Op};

/// Counters; a power of two.
const COUNTERS: usize = 4096;
/// Claims on more blocks than these are not counted one by one.
const COUNTED_BLOCKS: u64 = 32;

/// What an operation changes, and what it reads, if that matters: first block and count.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    target: (u64, u64),
    source: Option<(u64, u64)>,
}

fn overlap(a: (u64, u64), b: (u64, u64)) -> bool {
    a.0 < b.0.saturating_add(b.1) && b.0 < a.0.saturating_add(a.1)
}

impl Extent {
    /// That of `io`, which writes.
    #[inline]
    pub fn of(io: &Io) -> Extent {
        let source = match io.op() {
            Op::Copy { source_lba } => Some((source_lba, io.blocks())),
            _ => None,
        };
        Extent { target: (io.lba(), io.blocks()), source }
    }

    /// Whether one changes what the other reads or writes.
    pub fn conflicts(&self, other: &Extent) -> bool {
        let meets = |source: Option<(u64, u64)>, target| source.is_some_and(|source| overlap(source, target));
        overlap(self.target, other.target) || meets(self.source, other.target) || meets(other.source, self.target)
    }

    /// Whether its blocks are counted one by one.
    #[inline]
    fn is_counted(&self) -> bool {
        self.source.is_none() && self.target.1 <= COUNTED_BLOCKS
    }

    #[inline]
    fn counters(&self) -> impl Iterator<Item = usize> {
        let (first, blocks) = self.target;
        (0..blocks).map(move |n| first.wrapping_add(n) as usize & (COUNTERS - 1))
    }
}

/// The claims of one reactor on one device.
pub struct Claims {
    extents: Slab<Extent>,
    /// Claims on blocks of each hash. There are no more claims than I/Os, whose number fits.
    counts: Box<[u16]>,
    /// Claims that are not counted.
    others: usize,
}

impl Default for Claims {
    fn default() -> Claims {
        Claims { extents: Slab::new(), counts: vec![0; COUNTERS].into(), others: 0 }
    }
}

impl Claims {
    /// Whether `extent` conflicts with a claim.
    #[inline]
    pub fn conflict(&self, extent: &Extent) -> bool {
        let is_free = self.others == 0 && extent.is_counted() && extent.counters().all(|at| self.counts[at] == 0);
        !is_free && self.extents.iter().any(|(_, claimed)| claimed.conflicts(extent))
    }

    /// Claims `extent`; the claim is ended with what this returns.
    #[inline]
    pub fn add(&mut self, extent: Extent) -> usize {
        if extent.is_counted() {
            extent.counters().for_each(|at| self.counts[at] += 1);
        } else {
            self.others += 1;
        }
        self.extents.insert(extent)
    }

    /// Ends a claim.
    #[inline]
    pub fn end(&mut self, claim: usize) {
        let extent = self.extents.remove(claim);
        if extent.is_counted() {
            extent.counters().for_each(|at| self.counts[at] -= 1);
        } else {
            self.others -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(lba: u64, blocks: u64) -> Extent {
        Extent { target: (lba, blocks), source: None }
    }

    #[test]
    fn overlap_is_found_whatever_the_hashes_say() {
        let mut claims = Claims::default();
        assert!(!claims.conflict(&extent(0, u64::MAX)));
        let first = claims.add(extent(10, 4));
        assert!(claims.conflict(&extent(13, 1)) && claims.conflict(&extent(0, 11)) && claims.conflict(&extent(0, 100)));
        assert!(!claims.conflict(&extent(14, 1)) && !claims.conflict(&extent(9, 1)));
        assert!(!claims.conflict(&extent(10 + COUNTERS as u64, 1)), "the same hash is not the same block");
        let wide = claims.add(extent(100, 1000));
        assert!(claims.conflict(&extent(1099, 1)) && !claims.conflict(&extent(1100, 1)));
        claims.end(first);
        assert!(!claims.conflict(&extent(10, 4)) && claims.conflict(&extent(500, 4)));
        claims.end(wide);
        let copy = claims.add(Extent { target: (0, 8), source: Some((50, 8)) });
        assert!(claims.conflict(&extent(57, 1)) && claims.conflict(&extent(7, 1)) && !claims.conflict(&extent(8, 42)));
        claims.end(copy);
        assert!(claims.extents.is_empty() && claims.others == 0 && claims.counts.iter().all(|count| *count == 0));
        let last = claims.add(extent(u64::MAX - 1, 1));
        assert!(claims.conflict(&extent(u64::MAX - 1, 1)));
        claims.end(last);
    }
}
