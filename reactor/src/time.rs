//! Time as the reactors see it: nanoseconds on a monotonic clock whose origin is the platform's.

use std::ops::{Add, Sub};
use std::time::Duration;

/// A point on the platform's monotonic clock, in nanoseconds since its origin.
///
/// The statistics of the control plane call these nanoseconds *ticks* and report [`TICK_RATE`] of them a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Instant(pub u64);

/// Ticks a second in every reported statistic: a tick is a nanosecond.
pub const TICK_RATE: u64 = 1_000_000_000;

impl Instant {
    /// Nanoseconds since the clock's origin.
    pub fn as_nanos(self) -> u64 {
        self.0
    }

    /// Time passed since `earlier`; zero when `earlier` is later.
    pub fn since(self, earlier: Instant) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// Nanoseconds passed since `earlier`; zero when `earlier` is later.
    pub fn nanos_since(self, earlier: Instant) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, rhs: Duration) -> Instant {
        Instant(self.0.saturating_add(u64::try_from(rhs.as_nanos()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Duration> for Instant {
    type Output = Instant;
    fn sub(self, rhs: Duration) -> Instant {
        Instant(self.0.saturating_sub(u64::try_from(rhs.as_nanos()).unwrap_or(u64::MAX)))
    }
}

/// The clock seam.
pub trait Clock: Send + Sync {
    /// The present instant. Never goes backwards.
    fn now(&self) -> Instant;

    /// What the machine's own monotonic clock, which all its processes share, showed at this clock's origin, in
    /// nanoseconds: what is added to an [`Instant`] to tell it to another process. 0 when this clock is the machine's.
    fn origin_ns(&self) -> u64 {
        0
    }
}

/// The operating system's monotonic clock, with its origin at construction.
#[derive(Debug)]
pub struct OsClock {
    origin_ns: u64,
}

fn machine_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Monotonic time begins at zero when the machine starts.
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl Default for OsClock {
    fn default() -> Self {
        // One nanosecond before, so that `Instant(0)` stays free to mean "never" in counters.
        OsClock { origin_ns: machine_ns().saturating_sub(1) }
    }
}

impl Clock for OsClock {
    #[inline]
    fn now(&self) -> Instant {
        Instant(machine_ns().saturating_sub(self.origin_ns))
    }

    fn origin_ns(&self) -> u64 {
        self.origin_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_of_different_origin_agree_on_the_machines_time() {
        let (a, b) = (OsClock::default(), OsClock::default());
        let machine = |clock: &OsClock| clock.now().0 + clock.origin_ns();
        let times = [machine(&a), machine(&b), machine(&a), machine(&b)];
        assert!(times.is_sorted(), "{times:?}");
        assert!(a.now() > Instant(0));
    }
}
