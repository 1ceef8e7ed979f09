//! How busy a reactor was of late, for whoever places work on reactors.
//!
//! The reactor writes one word when a window of its steps is over; anybody reads it, without waking it. A reactor that sleeps writes
//! nothing, and every moment since its last window counts as idle.
//!
//! ```text
//! word: | end of the window, ms on the clock: 48 bits | busy share, permille: 16 bits |
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::time::Instant;

/// How long a window is at least: until it is over, a change of the load is not seen.
pub const LOAD_WINDOW: Duration = Duration::from_millis(500);

const WINDOW_NS: u64 = LOAD_WINDOW.as_nanos() as u64;
const SHARE_BITS: u32 = 16;
/// The share of a reactor that had work in all of its steps.
pub const FULL_LOAD: u32 = 1000;

/// The reader's end.
#[derive(Clone, Debug, Default)]
pub(super) struct Load(Arc<AtomicU64>);

impl Load {
    /// The share of time with work, in permille: of the last window, and of what has passed since as idle when that is longer
    /// than a window.
    pub(super) fn share(&self, now: Instant) -> u32 {
        let word = self.0.load(Ordering::Relaxed);
        let (end_ms, share) = (word >> SHARE_BITS, word & ((1 << SHARE_BITS) - 1));
        let age_ms = (now.as_nanos() / 1_000_000).saturating_sub(end_ms);
        let window_ms = WINDOW_NS / 1_000_000;
        if age_ms <= window_ms { share as u32 } else { (share * window_ms / age_ms) as u32 }
    }
}

/// The reactor's end.
#[derive(Debug)]
pub(super) struct Gauge {
    load: Load,
    start: Instant,
    busy_ns: u64,
}

impl Gauge {
    pub(super) fn new(now: Instant) -> Gauge {
        Gauge { load: Load::default(), start: now, busy_ns: 0 }
    }

    pub(super) fn reader(&self) -> Load {
        self.load.clone()
    }

    /// At the begin of a step: `busy_ns` is the time with work so far.
    #[inline]
    pub(super) fn observe(&mut self, now: Instant, busy_ns: u64) {
        if now.nanos_since(self.start) >= WINDOW_NS {
            self.publish(now, busy_ns);
        }
    }

    #[cold]
    fn publish(&mut self, now: Instant, busy_ns: u64) {
        let passed = now.nanos_since(self.start).max(1);
        let busy = u128::from(busy_ns - self.busy_ns) * u128::from(FULL_LOAD) / u128::from(passed);
        let share = (busy as u64).min(FULL_LOAD.into());
        self.load.0.store((now.as_nanos() / 1_000_000) << SHARE_BITS | share, Ordering::Relaxed);
        (self.start, self.busy_ns) = (now, busy_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_ms(ms: u64) -> Instant {
        Instant(ms * 1_000_000)
    }

    #[test]
    fn the_share_is_that_of_the_last_window_and_fades_when_nothing_more_is_written() {
        let mut gauge = Gauge::new(at_ms(1000));
        let load = gauge.reader();
        assert_eq!(load.share(at_ms(1000)), 0);
        // Not over yet.
        gauge.observe(at_ms(1499), 499_000_000);
        assert_eq!(load.share(at_ms(1499)), 0);
        gauge.observe(at_ms(1500), 400_000_000);
        assert_eq!(load.share(at_ms(1600)), 800);
        // Asleep ever since.
        assert_eq!(load.share(at_ms(3500)), 200);
        assert_eq!(load.share(at_ms(1_001_500)), 0);
        // The long sleep counts once, then the present does.
        gauge.observe(at_ms(1_001_500), 400_000_000);
        gauge.observe(at_ms(1_002_000), 900_000_000);
        assert_eq!(load.share(at_ms(1_002_001)), FULL_LOAD);
    }

    #[test]
    fn more_than_everything_is_everything() {
        let mut gauge = Gauge::new(at_ms(0));
        gauge.observe(at_ms(500), 10_000_000_000);
        assert_eq!(gauge.reader().share(at_ms(500)), FULL_LOAD);
    }
}
