//! The rings and the wake-up protocol in shared memory, over an abstraction of that memory.
//!
//! An entry is published by storing its sequence (its position plus one) after its other words, and taken once its
//! sequence is the one that the consumer waits for; see [`layout`](crate::layout). Positions are private to each side:
//! whatever the other side writes, a consumer reads each entry at most once a lap, takes one entry at a time, and looks
//! at no memory but that of the ring.
//!
//! The wake-up protocol is that of [`reactor::park`]: the sleeper raises a flag, then looks at its ring once more, and
//! only then sleeps; the producer publishes, then looks at the flag, and whoever takes the flag down rings. Both sides put
//! a sequentially consistent fence between their two steps, so at least one of them sees the other.
//!
//! Both are checked by exploring the interleavings of their memory accesses:
//!
//! ```text
//! RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test -p ringstone-appliance --release external::ring::loom
//! ```

#[cfg(loom)]
use loom::sync::atomic::{Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{Ordering, fence};

/// Shared words, reached by their index. Both sides may access any of them at any time.
pub(crate) trait Words {
    /// Reads one.
    fn load(&self, word: usize, order: Ordering) -> u64;
    /// Writes one.
    fn store(&self, word: usize, value: u64, order: Ordering);
    /// Exchanges one.
    fn swap(&self, word: usize, value: u64, order: Ordering) -> u64;
    /// Adds to one.
    fn add(&self, word: usize, value: u64, order: Ordering) -> u64;
}

/// Where the entry at `position` begins. `N` is the number of words behind the sequence.
fn entry<const N: usize>(base: usize, entries: u64, position: u64) -> usize {
    base + (position & (entries - 1)) as usize * (N + 1)
}

/// The writing end of a ring of entries of `N` words and a sequence.
#[derive(Debug)]
pub(crate) struct Producer<const N: usize> {
    base: usize,
    entries: u64,
    next: u64,
}

impl<const N: usize> Producer<N> {
    /// For a ring of zeroes whose first word is `base`, of `entries` entries: a power of two.
    pub(crate) fn new(base: usize, entries: u32) -> Self {
        assert!(entries.is_power_of_two());
        Producer { base, entries: entries.into(), next: 0 }
    }

    /// Publishes an entry. The caller knows that the one a lap before has been taken.
    #[inline]
    pub(crate) fn push(&mut self, memory: &impl Words, words: [u64; N]) {
        let at = entry::<N>(self.base, self.entries, self.next);
        for (i, word) in words.into_iter().enumerate() {
            memory.store(at + 1 + i, word, Ordering::Relaxed);
        }
        self.next = self.next.wrapping_add(1);
        memory.store(at, self.next, Ordering::Release);
    }
}

/// The reading end of a ring of entries of `N` words and a sequence.
#[derive(Debug)]
pub(crate) struct Consumer<const N: usize> {
    base: usize,
    entries: u64,
    next: u64,
}

impl<const N: usize> Consumer<N> {
    /// As [`Producer::new`].
    pub(crate) fn new(base: usize, entries: u32) -> Self {
        assert!(entries.is_power_of_two());
        Consumer { base, entries: entries.into(), next: 0 }
    }

    /// Takes the next entry if it is there: a copy, which nobody can change any more.
    #[inline]
    pub(crate) fn pop(&mut self, memory: &impl Words) -> Option<[u64; N]> {
        let at = entry::<N>(self.base, self.entries, self.next);
        let sequence = self.next.wrapping_add(1);
        if memory.load(at, Ordering::Acquire) != sequence {
            return None;
        }
        self.next = sequence;
        Some(std::array::from_fn(|i| memory.load(at + 1 + i, Ordering::Relaxed)))
    }

    /// Whether no entry is there.
    #[inline]
    pub(crate) fn is_empty(&self, memory: &impl Words) -> bool {
        memory.load(entry::<N>(self.base, self.entries, self.next), Ordering::Acquire) != self.next.wrapping_add(1)
    }
}

/// The sleeper says that it is about to sleep. It must look at its ring once more after this.
#[inline]
pub(crate) fn announce(memory: &impl Words, flag: usize) {
    memory.swap(flag, 1, Ordering::SeqCst);
    fence(Ordering::SeqCst);
}

/// The sleeper is awake again.
#[inline]
pub(crate) fn retract(memory: &impl Words, flag: usize) {
    memory.store(flag, 0, Ordering::Relaxed);
}

/// After publishing: whether the other side sleeps and this side is the one to ring for it.
#[inline]
pub(crate) fn must_ring(memory: &impl Words, flag: usize) -> bool {
    fence(Ordering::SeqCst);
    memory.load(flag, Ordering::Relaxed) != 0 && memory.swap(flag, 0, Ordering::SeqCst) != 0
}

#[cfg(test)]
pub(crate) mod heap {
    //! Words that are not shared with anybody.

    use super::{Ordering, Words};
    #[cfg(loom)]
    use loom::sync::atomic::AtomicU64;
    #[cfg(not(loom))]
    use std::sync::atomic::AtomicU64;

    pub(crate) struct Heap(Vec<AtomicU64>);

    impl Heap {
        pub(crate) fn new(words: usize) -> Heap {
            Heap((0..words).map(|_| AtomicU64::new(0)).collect())
        }
    }

    impl Words for Heap {
        fn load(&self, word: usize, order: Ordering) -> u64 {
            self.0[word].load(order)
        }
        fn store(&self, word: usize, value: u64, order: Ordering) {
            self.0[word].store(value, order);
        }
        fn swap(&self, word: usize, value: u64, order: Ordering) -> u64 {
            self.0[word].swap(value, order)
        }
        fn add(&self, word: usize, value: u64, order: Ordering) -> u64 {
            self.0[word].fetch_add(value, order)
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::heap::Heap;
    use super::*;

    #[test]
    fn entries_come_out_in_order_over_many_laps() {
        let memory = Heap::new(2 + 4 * 3);
        let (mut tx, mut rx) = (Producer::<2>::new(2, 4), Consumer::<2>::new(2, 4));
        for lap in 0..100 {
            for i in 0..4 {
                tx.push(&memory, [lap, i]);
            }
            assert!(!rx.is_empty(&memory));
            for i in 0..4 {
                assert_eq!(rx.pop(&memory), Some([lap, i]));
            }
            assert!(rx.is_empty(&memory));
            assert_eq!(rx.pop(&memory), None);
        }
    }

    #[test]
    fn garbage_in_the_ring_is_no_entry_and_a_lap_bounds_what_is_read() {
        let memory = Heap::new(4 * 3);
        let mut rx = Consumer::<2>::new(0, 4);
        for word in 0..12 {
            memory.store(word, u64::MAX - word as u64, Ordering::Relaxed);
        }
        assert_eq!(rx.pop(&memory), None);
        // All sequences of a lap at once: what a producer that lies about everything can do.
        for i in 0..4 {
            memory.store(i * 3, i as u64 + 1, Ordering::Relaxed);
        }
        assert_eq!((0..100).filter_map(|_| rx.pop(&memory)).count(), 4);
    }

    #[test]
    fn only_a_sleeper_is_rung_for_and_once() {
        let memory = Heap::new(1);
        assert!(!must_ring(&memory, 0));
        announce(&memory, 0);
        assert!(must_ring(&memory, 0));
        assert!(!must_ring(&memory, 0));
        announce(&memory, 0);
        retract(&memory, 0);
        assert!(!must_ring(&memory, 0));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::heap::Heap;
    use super::*;
    use loom::sync::{Arc, Condvar, Mutex};
    use loom::thread;

    /// The other side's doorbell. One that sleeps for ever is a deadlock to the model.
    #[derive(Default)]
    struct Bell {
        rung: Mutex<bool>,
        changed: Condvar,
    }

    impl Bell {
        fn ring(&self) {
            *self.rung.lock().unwrap() = true;
            self.changed.notify_one();
        }

        fn sleep(&self) {
            let mut rung = self.rung.lock().unwrap();
            while !*rung {
                rung = self.changed.wait(rung).unwrap();
            }
            *rung = false;
        }
    }

    fn explore(model: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(model);
    }

    const FLAG: usize = 0;
    const BACK_FLAG: usize = 1;
    const RING: usize = 2;
    const BACK: usize = RING + 2 * 3;

    /// Takes one entry, sleeping whenever there is none.
    fn take(memory: &Heap, rx: &mut Consumer<2>, flag: usize, bell: &Bell) -> [u64; 2] {
        loop {
            if let Some(words) = rx.pop(memory) {
                return words;
            }
            announce(memory, flag);
            if rx.is_empty(memory) {
                bell.sleep();
            }
            retract(memory, flag);
        }
    }

    #[test]
    fn a_published_entry_is_whole_and_nobody_sleeps_through_it() {
        explore(|| {
            let (memory, bell) = (Arc::new(Heap::new(BACK)), Arc::new(Bell::default()));
            let producer = {
                let (memory, bell) = (Arc::clone(&memory), Arc::clone(&bell));
                thread::spawn(move || {
                    let mut tx = Producer::<2>::new(RING, 2);
                    for i in 1..=2 {
                        tx.push(&*memory, [i, 10 * i]);
                        if must_ring(&*memory, FLAG) {
                            bell.ring();
                        }
                    }
                })
            };
            let mut rx = Consumer::<2>::new(RING, 2);
            for i in 1..=2 {
                assert_eq!(take(&memory, &mut rx, FLAG, &bell), [i, 10 * i]);
            }
            producer.join().unwrap();
        });
    }

    /// Two rings with a producer each and one sleeper for both: a worker with a ring from each reactor, or a reactor with a
    /// ring from each worker. Only one of the two may ring, and the sleeper then finds what both have published.
    #[test]
    fn nobody_sleeps_through_either_of_two_rings() {
        explore(|| {
            let (memory, bell) = (Arc::new(Heap::new(BACK + 3)), Arc::new(Bell::default()));
            let producers = [RING, BACK].map(|base| {
                let (memory, bell) = (Arc::clone(&memory), Arc::clone(&bell));
                thread::spawn(move || {
                    Producer::<2>::new(base, 1).push(&*memory, [base as u64, 7]);
                    if must_ring(&*memory, FLAG) {
                        bell.ring();
                    }
                })
            });
            let mut rings = [RING, BACK].map(|base| (base, Consumer::<2>::new(base, 1)));
            let mut seen = 0;
            while seen < 2 {
                for (base, ring) in &mut rings {
                    if let Some(words) = ring.pop(&*memory) {
                        assert_eq!(words, [*base as u64, 7]);
                        seen += 1;
                    }
                }
                if seen == 2 {
                    break;
                }
                announce(&*memory, FLAG);
                if rings.iter().all(|(_, ring)| ring.is_empty(&*memory)) {
                    bell.sleep();
                }
                retract(&*memory, FLAG);
            }
            producers.into_iter().for_each(|producer| producer.join().unwrap());
        });
    }

    /// Requests one way and answers the other; the answer is what allows the next request into the same entry.
    #[test]
    fn an_entry_is_written_again_only_after_it_was_answered() {
        explore(|| {
            let memory = Arc::new(Heap::new(BACK + 2 * 3));
            let (there, back) = (Arc::new(Bell::default()), Arc::new(Bell::default()));
            let process = {
                let (memory, there, back) = (Arc::clone(&memory), Arc::clone(&there), Arc::clone(&back));
                thread::spawn(move || {
                    let (mut rx, mut tx) = (Consumer::<2>::new(RING, 1), Producer::<2>::new(BACK, 1));
                    for _ in 0..2 {
                        let [id, payload] = take(&memory, &mut rx, FLAG, &there);
                        tx.push(&*memory, [id, payload + 1]);
                        if must_ring(&*memory, BACK_FLAG) {
                            back.ring();
                        }
                    }
                })
            };
            let (mut tx, mut rx) = (Producer::<2>::new(RING, 1), Consumer::<2>::new(BACK, 1));
            for id in 1..=2 {
                tx.push(&*memory, [id, 100 * id]);
                if must_ring(&*memory, FLAG) {
                    there.ring();
                }
                assert_eq!(take(&memory, &mut rx, BACK_FLAG, &back), [id, 100 * id + 1]);
            }
            process.join().unwrap();
        });
    }
}
