//! The way home: one completion ring, any number of producers, one reactor.
//!
//! The ring has a place for every body of its channel, so a completion never waits and never fails. A channel may close
//! while bodies are still out: in a handler that hangs, or whose deadline has passed. They come home to nobody:
//! [`RingHome::close`] leaves the consuming end here, and whoever pushes afterwards empties the ring itself, which
//! gives payload memory back to its pool and frees the body.
//!
//! ```text
//! producer:  push (sequentially consistent)  ->  closed?  -> empty the ring
//! channel:   closed = true (likewise)        ->  empty the ring
//! ```
//! At least one of the two sees the other, so nothing stays behind. This is checked by exploring the interleavings:
//!
//! ```text
//! RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test -p ringstone-appliance --release loom
//! ```

use std::sync::Arc;

#[cfg(loom)]
use loom::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering, fence},
};
#[cfg(not(loom))]
use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering},
};

use reactor::park::Waker;
use reactor::ring::{Consumer, Producer, ring};

/// A completion ring that may lose its consumer.
pub struct ReturnRing<T> {
    ring: Producer<T>,
    waker: Waker,
    closed: AtomicBool,
    orphan: Mutex<Option<Consumer<T>>>,
}

impl<T: Send> ReturnRing<T> {
    /// A ring for `capacity` values and its consuming end; `waker` wakes the consumer.
    pub fn new(capacity: usize, waker: Waker) -> (ReturnRing<T>, Consumer<T>) {
        let (ring, consumer) = ring(capacity);
        (ReturnRing { ring, waker, closed: AtomicBool::new(false), orphan: Mutex::new(None) }, consumer)
    }

    /// Sends a value home. Returns what is nobody's any more, for the caller to drop.
    ///
    /// # Panics
    /// If more values are out than the ring has places: a bug of the channel.
    #[inline]
    pub fn send(&self, value: T) -> Vec<T> {
        self.ring.push(value);
        self.published()
    }

    /// As [`ReturnRing::send`], for several at once: one publication, one wake. `values` is empty afterwards.
    ///
    /// # Panics
    /// As [`ReturnRing::send`].
    #[inline]
    pub fn send_all(&self, values: &mut Vec<T>) -> Vec<T> {
        if values.is_empty() {
            return Vec::new();
        }
        self.ring.push_all(values);
        self.published()
    }

    /// Something is in the ring: wakes the consumer, or empties it for one that is gone.
    #[inline]
    fn published(&self) -> Vec<T> {
        // The model checker takes sequentially consistent accesses for weaker ones; only a fence is one to it.
        #[cfg(loom)]
        fence(Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) {
            return self.empty();
        }
        self.waker.wake_after_rmw();
        Vec::new()
    }

    /// The consumer goes: values that are in the ring, or come later, are nobody's. Returns those that are there.
    pub fn close(&self, consumer: Consumer<T>) -> Vec<T> {
        *self.lock() = Some(consumer);
        self.closed.swap(true, Ordering::SeqCst);
        #[cfg(loom)]
        fence(Ordering::SeqCst);
        self.empty()
    }

    fn lock(&self) -> impl std::ops::DerefMut<Target = Option<Consumer<T>>> {
        self.orphan.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    #[cold]
    fn empty(&self) -> Vec<T> {
        let mut orphan = self.lock();
        let mut out = Vec::new();
        if let Some(consumer) = orphan.as_mut() {
            consumer.pop_batch(usize::MAX, |value| out.push(value));
        }
        // Dropped by the caller, after the lock: a value may hold the last reference to this.
        out
    }
}

impl<T> std::fmt::Debug for ReturnRing<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReturnRing").finish_non_exhaustive()
    }
}

#[cfg(not(loom))]
pub use of_reactor::RingHome;

#[cfg(not(loom))]
mod of_reactor {
    use super::*;
    use crate::request::{Body, Fault, Home};
    use crossbeam_utils::CachePadded;
    use reactor::{Clock, Instant};
    use std::sync::atomic::AtomicU64;

    /// The home of the requests of one reactor's channel.
    pub struct RingHome {
        ring: ReturnRing<Box<Body>>,
        clock: Arc<dyn Clock>,
        bdev: Arc<str>,
        handler: Arc<str>,
        // The reactor looks at these in each round, and workers count references to the rest.
        faults: CachePadded<AtomicU64>,
        log: Limiter,
    }

    impl RingHome {
        /// A home for `capacity` bodies on the reactor behind `waker`. The names are for messages.
        pub fn new(
            capacity: usize,
            waker: Waker,
            clock: Arc<dyn Clock>,
            bdev: Arc<str>,
            handler: Arc<str>,
        ) -> (Arc<RingHome>, Consumer<Box<Body>>) {
            let (ring, consumer) = ReturnRing::new(capacity, waker);
            let home = RingHome { ring, clock, bdev, handler, faults: CachePadded::default(), log: Limiter::default() };
            (Arc::new(home), consumer)
        }

        /// The channel closes: what is in the ring, or comes later, is dropped. Returns how many bodies were there.
        pub fn close(&self, consumer: Consumer<Box<Body>>) -> usize {
            self.ring.close(consumer).len()
        }

        /// How often the handler did something wrong with a request.
        pub fn faults(&self) -> u64 {
            self.faults.load(Ordering::Relaxed)
        }
    }

    impl Home for RingHome {
        #[inline]
        fn send(&self, body: Box<Body>) {
            drop(self.ring.send(body));
        }

        #[inline]
        fn send_all(&self, bodies: &mut Vec<Box<Body>>) {
            drop(self.ring.send_all(bodies));
        }

        fn now(&self) -> Instant {
            self.clock.now()
        }

        fn report(&self, body: &Body, fault: Fault) {
            self.faults.fetch_add(1, Ordering::Relaxed);
            if let Some(unsaid) = self.log.admit(self.clock.now()) {
                tracing::error!(
                    bdev = &*self.bdev,
                    handler = &*self.handler,
                    request = body.id.0,
                    op = body.op.kind().name(),
                    lba = body.lba,
                    blocks = body.blocks,
                    payload_bytes = body.payload_bytes,
                    unsaid,
                    "a request {fault}: its handler has a bug; the request fails"
                );
            }
        }
    }

    impl std::fmt::Debug for RingHome {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("RingHome").field("bdev", &self.bdev).field("handler", &self.handler).finish_non_exhaustive()
        }
    }

    /// Lets a few messages a second through, so that a handler gone mad does not fill the log.
    #[derive(Debug, Default)]
    pub struct Limiter {
        /// Second of the last message, and messages in it, in the upper and the lower half.
        window: AtomicU64,
        unsaid: AtomicU64,
    }

    /// Messages a second.
    const MESSAGES: u64 = 8;

    impl Limiter {
        /// Whether a message may be said at `now`; if so, how many were not said since the last.
        pub fn admit(&self, now: Instant) -> Option<u64> {
            let second = (now.0 / 1_000_000_000) & 0xffff_ffff;
            let next = |window: u64| match (window >> 32, window & 0xffff_ffff) {
                (at, count) if at == second => (count < MESSAGES).then(|| (at << 32) | (count + 1)),
                _ => Some((second << 32) | 1),
            };
            match self.window.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) {
                Ok(_) => Some(self.unsaid.swap(0, Ordering::Relaxed)),
                Err(_) => {
                    self.unsaid.fetch_add(1, Ordering::Relaxed);
                    None
                }
            }
        }
    }
}

#[cfg(not(loom))]
pub use of_reactor::Limiter;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use reactor::park::Unpark;

    struct Awake;

    impl Unpark for Awake {
        fn unpark(&self) {}
    }

    #[test]
    fn what_comes_after_the_end_is_dropped_by_whoever_brings_it() {
        let probe = Arc::new(());
        let (home, mut consumer) = ReturnRing::new(4, Waker::new(Arc::new(Awake)));
        assert!(home.send(Arc::clone(&probe)).is_empty());
        assert!(consumer.pop().is_some());
        assert!(home.send(Arc::clone(&probe)).is_empty());
        assert_eq!(home.close(consumer).len(), 1);
        assert_eq!(home.send(Arc::clone(&probe)).len(), 1);
        assert_eq!(home.send_all(&mut vec![Arc::clone(&probe), Arc::clone(&probe)]).len(), 2);
        assert_eq!(Arc::strong_count(&probe), 1);
    }

    #[test]
    fn a_limiter_counts_what_it_keeps_back() {
        let limiter = Limiter::default();
        let at = |ms: u64| reactor::Instant(ms * 1_000_000);
        let said = (0..20).filter(|n| limiter.admit(at(5000 + n)).is_some()).count();
        assert_eq!(said, 8);
        assert_eq!(limiter.admit(at(6000)), Some(12));
        assert_eq!(limiter.admit(at(6001)), Some(0));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::atomic::AtomicUsize;
    use loom::thread;
    use reactor::park::Unpark;

    struct Awake;

    impl Unpark for Awake {
        fn unpark(&self) {}
    }

    /// Two threads bring a value each while the channel closes: each value is seen by the channel, or dropped by somebody,
    /// and none stays in the ring.
    #[test]
    fn nothing_stays_behind_when_the_channel_closes() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(|| {
            let (home, mut consumer) = ReturnRing::<u8>::new(2, Waker::new(Arc::new(Awake)));
            let home = loom::sync::Arc::new(home);
            let dropped = loom::sync::Arc::new(AtomicUsize::new(0));
            let threads: Vec<_> = (0..2)
                .map(|value| {
                    let (home, dropped) = (home.clone(), dropped.clone());
                    thread::spawn(move || {
                        dropped.fetch_add(home.send(value).len(), Ordering::Relaxed);
                    })
                })
                .collect();
            let seen = usize::from(consumer.pop().is_some());
            let at_close = home.close(consumer).len();
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert_eq!(seen + at_close + dropped.load(Ordering::Relaxed), 2);
        });
    }
}
