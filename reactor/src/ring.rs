//! Bounded multi-producer single-consumer completion ring.
//!
//! Every I/O that finishes on another thread comes home through the ring of its reactor. The ring cannot overflow by
//! construction: whoever starts an operation that may complete through a ring holds one of its slots (the I/O pool of
//! a reactor is exactly as large as its ring), so a push needs neither a retry nor an error. A push beyond that is a
//! bug and panics.
//!
//! Producers claim a slot with one fetch-and-add and publish it with one swap of the slot's sequence number; the
//! consumer reads sequence numbers in order and takes as many as are published. The design is Vyukov's bounded queue
//! with the consumer's compare-and-swap removed, since there is one consumer.
//!
//! ```text
//! slot.sequence == position                empty, may be claimed by the producer that drew `position`
//! slot.sequence == position + 1            full, may be taken by the consumer
//! slot.sequence == position + capacity     empty again, one lap later
//! ```
//!
//! The ring, the [`Bell`] and the wake-up protocol of [`Waker`](crate::park::Waker) are checked by exploring the
//! interleavings of their memory accesses, in a target folder of their own because that replaces the atomics:
//!
//! ```text
//! RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test -p ringstone-reactor --release ring::loom
//! ```

#[cfg(loom)]
use loom::{
    cell::UnsafeCell,
    sync::Arc,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};
#[cfg(not(loom))]
use std::{
    sync::Arc,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use crate::buffer::prefetch_for_write;
use crossbeam_utils::CachePadded;
use std::fmt;
use std::mem::MaybeUninit;

/// The standard cell behind loom's closure interface.
#[cfg(not(loom))]
struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    fn new(value: T) -> Self {
        UnsafeCell(std::cell::UnsafeCell::new(value))
    }
    #[inline(always)]
    fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        f(self.0.get())
    }
}

struct Slot<T> {
    sequence: AtomicUsize,
    value: UnsafeCell<MaybeUninit<T>>,
}

struct Shared<T> {
    tail: CachePadded<AtomicUsize>,
    slots: Box<[Slot<T>]>,
    mask: usize,
}

// SAFETY: a value moves from the producer that stored it to the consumer that takes it; the sequence number's
// release/acquire pair orders the two, and between them nobody touches the cell.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // What was pushed after the consumer went.
        for (index, slot) in self.slots.iter().enumerate() {
            // Relaxed: nobody else has this any more.
            let is_full = slot.sequence.load(Ordering::Relaxed) & self.mask == (index + 1) & self.mask;
            if is_full {
                // SAFETY: a sequence number of position + 1 says that the cell was written and not taken.
                slot.value.with_mut(|cell| unsafe { (*cell).assume_init_drop() });
            }
        }
    }
}

/// The producing end: any number of clones, on any threads.
pub struct Producer<T> {
    shared: Arc<Shared<T>>,
}

/// The consuming end: one, on the reactor.
pub struct Consumer<T> {
    shared: Arc<Shared<T>>,
    head: usize,
}

/// A ring with room for at least `capacity` values (rounded up to a power of two).
///
/// # Panics
/// If `capacity` is zero or too large to round up.
pub fn ring<T: Send>(capacity: usize) -> (Producer<T>, Consumer<T>) {
    assert!(capacity > 0, "a ring holds something");
    // At least two slots: with one, "full at position p" and "empty one lap later" would be the same number.
    let capacity = capacity.max(2).next_power_of_two();
    let slots =
        (0..capacity).map(|i| Slot { sequence: AtomicUsize::new(i), value: UnsafeCell::new(MaybeUninit::uninit()) });
    let shared =
        Arc::new(Shared { tail: CachePadded::new(AtomicUsize::new(0)), slots: slots.collect(), mask: capacity - 1 });
    (Producer { shared: Arc::clone(&shared) }, Consumer { shared, head: 0 })
}

impl<T: Send> Producer<T> {
    /// Puts `value` into the ring. Publication is sequentially consistent, so that a producer may afterwards look
    /// whether the consumer sleeps without a fence of its own.
    ///
    /// # Panics
    /// If more values are in the ring than its capacity: somebody completed an operation that held no slot.
    #[inline]
    pub fn push(&self, value: T) {
        // Relaxed: the position is only a name; the slot's own sequence number orders the memory.
        let position = self.shared.tail.fetch_add(1, Ordering::Relaxed);
        let slot = &self.shared.slots[position & self.shared.mask];
        assert!(
            slot.sequence.load(Ordering::Acquire) == position,
            "completion ring overflow: an operation completed that held no slot"
        );
        // SAFETY: the slot is empty and its position was drawn by this call alone, so nobody else touches the cell
        // until the sequence number below says that it is full.
        slot.value.with_mut(|cell| unsafe { (*cell).write(value) });
        slot.sequence.swap(position.wrapping_add(1), Ordering::SeqCst);
    }

    /// Puts all of `values` into the ring, one behind the other, and leaves the vector empty. They are published together: with
    /// two exchanges, however many there are. As to memory it is one [`Producer::push`], of the first.
    ///
    /// # Panics
    /// As [`Producer::push`].
    #[inline]
    pub fn push_all(&self, values: &mut Vec<T>) {
        let count = values.len();
        if count == 0 {
            return;
        }
        // Relaxed: as in `push`.
        let first = self.shared.tail.fetch_add(count, Ordering::Relaxed);
        let mask = self.shared.mask;
        for n in (0..count).step_by((64 / size_of::<Slot<T>>()).max(1)) {
            prefetch_for_write(&self.shared.slots[first.wrapping_add(n) & mask].sequence);
        }
        for (n, value) in values.drain(..).enumerate() {
            let position = first.wrapping_add(n);
            let slot = &self.shared.slots[position & mask];
            assert!(
                slot.sequence.load(Ordering::Acquire) == position,
                "completion ring overflow: an operation completed that held no slot"
            );
            // SAFETY: as in `push`; the position is one of those that this call alone drew.
            slot.value.with_mut(|cell| unsafe { (*cell).write(value) });
            if n > 0 {
                // The consumer does not get here before the first is there, and finds these then.
                slot.sequence.store(position.wrapping_add(1), Ordering::Release);
            }
        }
        self.shared.slots[first & mask].sequence.swap(first.wrapping_add(1), Ordering::SeqCst);
    }

    /// Number of values the ring can hold.
    pub fn capacity(&self) -> usize {
        self.shared.mask + 1
    }
}

impl<T> Clone for Producer<T> {
    fn clone(&self) -> Self {
        Producer { shared: Arc::clone(&self.shared) }
    }
}

impl<T: Send> Consumer<T> {
    /// Takes the oldest value, if one is published.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        let slot = &self.shared.slots[self.head & self.shared.mask];
        if slot.sequence.load(Ordering::Acquire) != self.head.wrapping_add(1) {
            return None;
        }
        // SAFETY: the sequence number says that the slot is full, and this is the only consumer.
        let value = slot.value.with_mut(|cell| unsafe { (*cell).assume_init_read() });
        slot.sequence.store(self.head.wrapping_add(self.shared.mask + 1), Ordering::Release);
        self.head = self.head.wrapping_add(1);
        Some(value)
    }

    /// Hands up to `max` published values to `take`, oldest first, and returns how many there were.
    #[inline]
    pub fn pop_batch(&mut self, max: usize, mut take: impl FnMut(T)) -> usize {
        let mut n = 0;
        while n < max {
            let Some(value) = self.pop() else { break };
            take(value);
            n += 1;
        }
        n
    }

    /// Whether nothing is published. Sequentially consistent, for the last look before sleeping.
    pub fn is_empty(&self) -> bool {
        let slot = &self.shared.slots[self.head & self.shared.mask];
        slot.sequence.load(Ordering::SeqCst) != self.head.wrapping_add(1)
    }
}

impl<T> Drop for Consumer<T> {
    fn drop(&mut self) {
        loop {
            let slot = &self.shared.slots[self.head & self.shared.mask];
            if slot.sequence.load(Ordering::Acquire) != self.head.wrapping_add(1) {
                break;
            }
            // SAFETY: as in `pop`.
            slot.value.with_mut(|cell| unsafe { (*cell).assume_init_drop() });
            slot.sequence.store(self.head.wrapping_add(self.shared.mask + 1), Ordering::Release);
            self.head = self.head.wrapping_add(1);
        }
    }
}

impl<T> fmt::Debug for Producer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer").field("capacity", &(self.shared.mask + 1)).finish()
    }
}

impl<T> fmt::Debug for Consumer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("capacity", &(self.shared.mask + 1)).field("head", &self.head).finish()
    }
}

/// Whether a consumer that sleeps elsewhere (in a readiness set) was told of what was pushed: it is told at most once
/// until it answers.
#[derive(Debug)]
pub struct Bell {
    rung: AtomicBool,
}

impl Default for Bell {
    fn default() -> Self {
        Bell { rung: AtomicBool::new(false) }
    }
}

impl Bell {
    /// Call after a push; `notify` makes the consumer look, and is called unless it is about to look anyway.
    #[inline]
    pub fn ring(&self, notify: impl FnOnce()) {
        if !self.rung.swap(true, Ordering::SeqCst) {
            notify();
        }
    }

    /// The consumer calls this before it looks.
    #[inline]
    pub fn answer(&self) {
        // Having been notified comes with having seen the flag, so a stale look here only puts the answer off.
        if self.rung.load(Ordering::Relaxed) {
            // What was pushed by everyone who found the bell rung is visible after this.
            self.rung.swap(false, Ordering::SeqCst);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn values_come_out_in_order_over_many_laps() {
        let (tx, mut rx) = ring(4);
        for lap in 0..100 {
            for i in 0..4 {
                tx.push(lap * 4 + i);
            }
            let mut got = Vec::new();
            assert_eq!(rx.pop_batch(3, |v| got.push(v)), 3);
            assert_eq!(rx.pop_batch(9, |v| got.push(v)), 1);
            assert_eq!(got, (lap * 4..lap * 4 + 4).collect::<Vec<_>>());
            assert!(rx.is_empty());
        }
    }

    #[test]
    fn what_is_pushed_together_comes_in_order_between_what_is_not() {
        let (tx, mut rx) = ring(8);
        let mut next = 0;
        for lap in 0..200 {
            let mut values: Vec<usize> = (next..next + lap % 7).collect();
            let count = values.len();
            tx.push_all(&mut values);
            assert!(values.is_empty());
            tx.push(next + count);
            let mut got = Vec::new();
            assert_eq!(rx.pop_batch(9, |value| got.push(value)), count + 1);
            assert_eq!(got, (next..=next + count).collect::<Vec<_>>());
            next += count + 1;
        }
    }

    #[test]
    #[should_panic(expected = "completion ring overflow")]
    fn more_pushed_together_than_there_are_slots_is_a_bug() {
        let (tx, _rx) = ring(2);
        tx.push_all(&mut vec![1, 2, 3]);
    }

    #[test]
    #[should_panic(expected = "completion ring overflow")]
    fn a_push_without_a_slot_is_a_bug() {
        let (tx, _rx) = ring(2);
        (0..3).for_each(|i| tx.push(i));
    }

    #[test]
    fn values_left_in_the_ring_are_dropped_with_it() {
        let probe = std::sync::Arc::new(());
        let (tx, rx) = ring(4);
        (0..3).for_each(|_| tx.push(std::sync::Arc::clone(&probe)));
        drop(rx);
        // Also what comes when nobody takes it any more.
        tx.push(std::sync::Arc::clone(&probe));
        drop(tx);
        assert_eq!(std::sync::Arc::strong_count(&probe), 1);
    }

    #[test]
    fn four_producers_lose_nothing_and_keep_their_order() {
        const EACH: usize = 20_000;
        let (tx, mut rx) = ring::<(usize, usize)>(64);
        // Slots are handed out by credit, as the I/O pool does.
        let credits = std::sync::Arc::new(std::sync::Mutex::new(64usize));
        let threads: Vec<_> = (0..4)
            .map(|p| {
                let (tx, credits) = (tx.clone(), std::sync::Arc::clone(&credits));
                std::thread::spawn(move || {
                    for i in 0..EACH {
                        loop {
                            let mut left = credits.lock().unwrap();
                            if *left > 0 {
                                *left -= 1;
                                break;
                            }
                            drop(left);
                            std::thread::yield_now();
                        }
                        tx.push((p, i));
                    }
                })
            })
            .collect();
        let mut next = [0; 4];
        let mut total = 0;
        while total < 4 * EACH {
            let n = rx.pop_batch(16, |(p, i)| {
                assert_eq!(i, next[p]);
                next[p] += 1;
            });
            *credits.lock().unwrap() += n;
            total += n;
            if n == 0 {
                std::thread::yield_now();
            }
        }
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert!(rx.pop().is_none());
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::park::{Unpark, Waker};
    use loom::sync::{Condvar, Mutex};
    use loom::thread;

    #[test]
    fn two_producers_publish_everything_in_their_order() {
        publish_everything(|tx, p| {
            tx.push((p, 0));
            tx.push((p, 1));
        });
    }

    #[test]
    fn two_producers_that_push_together_publish_everything_in_their_order() {
        publish_everything(|tx, p| tx.push_all(&mut vec![(p, 0), (p, 1)]));
    }

    fn publish_everything(push: fn(&Producer<(u8, u8)>, u8)) {
        explore(move || {
            let (tx, mut rx) = ring::<(u8, u8)>(4);
            let threads: Vec<_> = (0..2)
                .map(|p| {
                    let tx = tx.clone();
                    thread::spawn(move || push(&tx, p))
                })
                .collect();
            let mut next = [0; 2];
            let mut total = 0;
            while total < 4 {
                match rx.pop() {
                    Some((p, i)) => {
                        assert_eq!(i, next[p as usize]);
                        next[p as usize] += 1;
                        total += 1;
                    }
                    None => thread::yield_now(),
                }
            }
            threads.into_iter().for_each(|t| t.join().unwrap());
            assert!(rx.is_empty());
        });
    }

    /// A place to sleep that counts what woke it; one that sleeps for ever is a deadlock to the model.
    #[derive(Default)]
    struct Bed {
        woken: Mutex<usize>,
        changed: Condvar,
    }

    impl Bed {
        fn sleep(&self) {
            let mut woken = self.woken.lock().unwrap();
            while *woken == 0 {
                woken = self.changed.wait(woken).unwrap();
            }
            *woken = 0;
        }
    }

    impl Unpark for Bed {
        fn unpark(&self) {
            *self.woken.lock().unwrap() += 1;
            self.changed.notify_one();
        }
    }

    /// Explores with a bound on involuntary switches, beyond which practically nothing new is found.
    fn explore(model: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(model);
    }

    /// Two producers push `each` values and wake the consumer, which sleeps whenever it finds nothing.
    fn nobody_sleeps_through_a_push(each: u8, wake: fn(&Waker)) {
        explore(move || {
            let bed = std::sync::Arc::new(Bed::default());
            let waker = Waker::new(std::sync::Arc::clone(&bed) as std::sync::Arc<dyn Unpark>);
            let all = 2 * usize::from(each);
            let (tx, mut rx) = ring::<u8>(all);
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    let (tx, waker) = (tx.clone(), waker.clone());
                    thread::spawn(move || {
                        if each == 1 {
                            tx.push(0);
                        } else {
                            tx.push_all(&mut (0..each).collect());
                        }
                        wake(&waker);
                    })
                })
                .collect();
            let mut total = 0;
            while total < all {
                total += rx.pop_batch(all, drop);
                if total < all {
                    waker.announce();
                    if rx.is_empty() {
                        bed.sleep();
                    }
                    waker.retract();
                }
            }
            threads.into_iter().for_each(|t| t.join().unwrap());
        });
    }

    #[test]
    fn a_sleeper_is_woken_by_a_fenced_wake() {
        nobody_sleeps_through_a_push(1, Waker::wake);
    }

    #[test]
    fn a_sleeper_is_woken_by_a_wake_after_a_push() {
        nobody_sleeps_through_a_push(1, Waker::wake_after_rmw);
    }

    #[test]
    fn a_sleeper_is_woken_by_a_wake_after_several_were_pushed_together() {
        nobody_sleeps_through_a_push(2, Waker::wake_after_rmw);
    }

    #[test]
    fn a_bell_is_heard() {
        explore(|| {
            let bed = Arc::new(Bed::default());
            let bell = Arc::new(Bell::default());
            let (tx, mut rx) = ring::<u8>(2);
            let threads: Vec<_> = (0..2)
                .map(|p| {
                    let (tx, bell, bed) = (tx.clone(), Arc::clone(&bell), Arc::clone(&bed));
                    thread::spawn(move || {
                        tx.push(p);
                        bell.ring(|| bed.unpark());
                    })
                })
                .collect();
            let mut total = 0;
            loop {
                bell.answer();
                total += rx.pop_batch(2, drop);
                if total == 2 {
                    break;
                }
                bed.sleep();
            }
            threads.into_iter().for_each(|t| t.join().unwrap());
        });
    }

    #[test]
    fn a_slot_is_reused_only_after_it_was_taken() {
        explore(|| {
            let (tx, mut rx) = ring::<Box<u8>>(2);
            tx.push(Box::new(0));
            tx.push(Box::new(1));
            assert_eq!(*rx.pop().unwrap(), 0);
            // The taken slot is the credit for this push.
            let producer = thread::spawn(move || tx.push(Box::new(2)));
            assert_eq!(*rx.pop().unwrap(), 1);
            loop {
                match rx.pop() {
                    Some(value) => break assert_eq!(*value, 2),
                    None => thread::yield_now(),
                }
            }
            producer.join().unwrap();
        });
    }
}
