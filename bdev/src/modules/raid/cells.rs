//! Claims across reactors, for regions that several of them write.
//!
//! Two writes of the same blocks that are on the legs at once may be executed in different orders there, and the legs would differ
//! from then on, although each write has ended well and no log says so. On one reactor they wait for each other
//! ([`claims`](crate::core::claims)). Regions that one reactor alone may write need no more than that, and do not come here. A write
//! to a region that several may write takes the cells of its blocks first, on which all reactors meet.
//!
//! # A cell
//! ```text
//!  63        62          47..61          32..46         0..31
//! | - | somebody waits | is for reactor | belongs to | its writes |       reactors count from 1; 0: nobody
//! ```
//! Blocks are hashed to cells, by units of at least 4 KiB. A cell belongs to one reactor at a time, which may have several writes in
//! it: these either do not overlap or know of each other. Who finds it taken is the next, and until then its reactor adds no more.
//!
//! # Invariants
//! - A write takes its cells in the order of their indices and keeps them while it waits for the next. So whoever waits waits for
//!   somebody further on, and never in a circle.
//! - A cell that becomes free while somebody waits is announced ([`Cells::leave`] says so). Nobody spins.

use std::sync::atomic::{AtomicU64, Ordering};

use super::format::Layout;

/// The most cells; a power of two.
const MAX_CELLS: u64 = 32 * 1024;
/// Bytes of a unit at least.
const UNIT: u64 = 4096;

const COUNT: u64 = u32::MAX as u64;
const REACTOR: u64 = 0x7fff;
const OWNER: u32 = 32;
const NEXT: u32 = 47;
const WAITING: u64 = 1 << 62;

fn owner(cell: u64) -> u64 {
    cell >> OWNER & REACTOR
}

fn next(cell: u64) -> u64 {
    cell >> NEXT & REACTOR
}

/// The cells of one write: first index and count, around the end of the table if need be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    first: u64,
    count: u64,
    cells: u64,
}

impl Span {
    pub(super) fn len(&self) -> u32 {
        self.count as u32
    }

    /// The `n`th of them by index.
    fn nth(&self, n: u32) -> usize {
        let n = u64::from(n);
        let around = (self.first + self.count).saturating_sub(self.cells);
        (if n < around { n } else { self.first + n - around }) as usize
    }
}

/// See the [module](self).
pub(super) struct Cells {
    cells: Box<[AtomicU64]>,
    unit_blocks: u64,
}

impl Cells {
    pub(super) fn new(layout: &Layout) -> Cells {
        let unit_blocks = (UNIT / u64::from(layout.block_size)).max(1);
        let count = layout.num_blocks.div_ceil(unit_blocks).next_power_of_two().min(MAX_CELLS);
        Cells { cells: (0..count).map(|_| AtomicU64::new(0)).collect(), unit_blocks }
    }

    /// The cells of these blocks; there are some.
    pub(super) fn span(&self, lba: u64, blocks: u64) -> Span {
        let (first, last) = (lba / self.unit_blocks, (lba + blocks - 1) / self.unit_blocks);
        let cells = self.cells.len() as u64;
        Span { first: first & (cells - 1), count: (last - first + 1).min(cells), cells }
    }

    /// Takes the `n`th cell of a span for a write of reactor `me`. `false`: it is announced when it may be free.
    pub(super) fn take(&self, span: &Span, n: u32, me: u32) -> bool {
        let (cell, me) = (&self.cells[span.nth(n)], u64::from(me) + 1);
        let mut now = cell.load(Ordering::Acquire);
        loop {
            let free = owner(now) == 0 && (next(now) == 0 || next(now) == me);
            let mine = owner(now) == me && next(now) == 0 && now & WAITING == 0 && now & COUNT < COUNT;
            let then = if free {
                now & WAITING | me << OWNER | 1
            } else if mine {
                now + 1
            } else if next(now) == 0 && owner(now) != me {
                now | me << NEXT
            } else if next(now) == me {
                now
            } else {
                now | WAITING
            };
            match cell.compare_exchange_weak(now, then, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return free || mine,
                Err(found) => now = found,
            }
        }
    }

    /// Gives back the first `taken` cells of a span, and the wish for the one after them. Whether somebody waits for one of them.
    pub(super) fn leave(&self, span: &Span, taken: u32, me: u32) -> bool {
        let mut waits = false;
        for n in 0..taken {
            let _ = self.cells[span.nth(n)].fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
                let last = now & COUNT == 1;
                waits |= last && now & (WAITING | REACTOR << NEXT) != 0;
                Some(if last { now & REACTOR << NEXT } else { now - 1 })
            });
        }
        if taken < span.len() {
            let me = u64::from(me) + 1;
            let _ = self.cells[span.nth(taken)].fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| {
                // Others of this reactor may have counted on the same wish.
                let mine = next(now) == me;
                waits |= mine;
                mine.then_some(now & !(REACTOR << NEXT))
            });
        }
        waits
    }

    #[cfg(test)]
    fn are_free(&self) -> bool {
        self.cells.iter().all(|cell| cell.load(Ordering::Acquire) == 0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::atomic::AtomicU32;

    use super::super::format::DATA_OFFSET;
    use super::*;
    use crate::conformance::Rng;

    fn cells(blocks: u64) -> Cells {
        Cells::new(&Layout::new(4096, DATA_OFFSET / 4096 + blocks, true, None).unwrap())
    }

    #[test]
    fn spans_go_by_index_also_around_the_end() {
        let cells = cells(16);
        assert_eq!(cells.cells.len(), 16);
        let indices = |lba, blocks| {
            let span = cells.span(lba, blocks);
            (0..span.len()).map(|n| span.nth(n)).collect::<Vec<_>>()
        };
        assert_eq!(indices(3, 4), [3, 4, 5, 6]);
        assert_eq!(indices(14, 2), [14, 15]);
        assert_eq!(indices(14, 5), [0, 1, 2, 14, 15]);
        assert_eq!(indices(5, 16), (0..16).collect::<Vec<_>>());
        assert_eq!(indices(5, 1000).len(), 16);
        let small = Cells::new(&Layout::new(512, 4096, true, None).unwrap());
        assert_eq!((small.span(7, 1).len(), small.span(7, 2).len(), small.span(8, 8).len()), (1, 2, 1));
    }

    #[test]
    fn who_waits_is_next_and_hears_of_it() {
        let cells = cells(8);
        let one = cells.span(5, 1);
        assert!(cells.take(&one, 0, 0) && cells.take(&one, 0, 0), "a reactor's writes know of each other");
        assert!(!cells.take(&one, 0, 1));
        assert!(!cells.take(&one, 0, 0), "another waits");
        assert!(!cells.take(&one, 0, 2));
        assert!(!cells.leave(&one, 1, 0), "one is still there");
        assert!(cells.leave(&one, 1, 0));
        assert!(!cells.take(&one, 0, 2) && !cells.take(&one, 0, 0), "it is for the second");
        assert!(cells.take(&one, 0, 1));
        assert!(!cells.take(&one, 0, 1), "others wait");
        assert!(cells.leave(&one, 1, 1));
        assert!(cells.take(&one, 0, 2) && !cells.leave(&one, 1, 2));
        // Who gives up is no longer waited for, and whoever waits for that hears of it.
        assert!(cells.take(&one, 0, 0) && !cells.take(&one, 0, 1) && !cells.take(&one, 0, 2));
        assert!(cells.leave(&one, 1, 0));
        assert!(!cells.take(&one, 0, 2));
        assert!(cells.leave(&one, 0, 1));
        assert!(cells.take(&one, 0, 2));
        // What was noted for somebody while it was free goes with the last.
        cells.leave(&one, 1, 2);
        assert!(cells.are_free());
    }

    /// Reactors in any order: nobody is where another is, everybody gets on, and only announcements lead to another try.
    #[test]
    fn nobody_meets_nobody_starves_and_no_announcement_is_missed() {
        for seed in 0..3000 {
            let mut rng = Rng::new(seed);
            let cells = cells(8);
            // By reactor: writes not begun, what waits for an announcement, what is on the legs.
            let mut left = [12u32; 3];
            let mut waiting: [VecDeque<(Span, u32)>; 3] = Default::default();
            let mut busy: [Vec<Span>; 3] = Default::default();
            let mut used = [[0u32; 8]; 3];
            let mut announced = [false; 3];
            let mut steps = 0;
            while left.iter().any(|left| *left > 0) || (0..3).any(|r| !waiting[r].is_empty() || !busy[r].is_empty()) {
                steps += 1;
                assert!(steps < 20_000, "seed {seed}: somebody waits for ever: {waiting:?} {busy:?}");
                let me = rng.below(3) as usize;
                let mut tries = VecDeque::new();
                match rng.below(3) {
                    0 if left[me] > 0 => {
                        left[me] -= 1;
                        tries.push_back((cells.span(rng.below(8), 1 + rng.below(5)), 0));
                    }
                    1 if !busy[me].is_empty() => {
                        let at = rng.below(busy[me].len() as u64) as usize;
                        let span = busy[me].swap_remove(at);
                        (0..span.len()).for_each(|n| used[me][span.nth(n)] -= 1);
                        if cells.leave(&span, span.len(), me as u32) {
                            announced = [true; 3];
                        }
                    }
                    2 if std::mem::take(&mut announced[me]) => tries = std::mem::take(&mut waiting[me]),
                    _ => {}
                }
                for (span, mut taken) in tries {
                    while taken < span.len() && cells.take(&span, taken, me as u32) {
                        let at = span.nth(taken);
                        used[me][at] += 1;
                        assert!((0..3).all(|other| other == me || used[other][at] == 0), "seed {seed}: two at {at}");
                        taken += 1;
                    }
                    if taken == span.len() {
                        busy[me].push(span);
                    } else if rng.one_in(20) {
                        // It ends without having been there.
                        (0..taken).for_each(|n| used[me][span.nth(n)] -= 1);
                        if cells.leave(&span, taken, me as u32) {
                            announced = [true; 3];
                        }
                    } else {
                        waiting[me].push_back((span, taken));
                    }
                }
            }
            for cell in &cells.cells {
                assert_eq!(cell.load(Ordering::Acquire) & !(WAITING | REACTOR << NEXT), 0);
            }
        }
    }

    #[test]
    fn threads_exclude_each_other() {
        let cells = cells(4);
        let inside: [AtomicU32; 4] = Default::default();
        std::thread::scope(|scope| {
            for me in 0..3u32 {
                let (cells, inside) = (&cells, &inside);
                scope.spawn(move || {
                    let mut rng = Rng::new(u64::from(me));
                    for _ in 0..2000 {
                        let span = cells.span(rng.below(4), 1 + rng.below(3));
                        for n in 0..span.len() {
                            while !cells.take(&span, n, me) {
                                std::thread::yield_now();
                            }
                            assert_eq!(inside[span.nth(n)].fetch_add(1, Ordering::AcqRel), 0);
                        }
                        for n in 0..span.len() {
                            inside[span.nth(n)].fetch_sub(1, Ordering::AcqRel);
                        }
                        cells.leave(&span, span.len(), me);
                    }
                });
            }
        });
    }
}
