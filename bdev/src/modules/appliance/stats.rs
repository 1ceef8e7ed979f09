//! Counters and histograms of channels, readable from anywhere.
//!
//! Each channel writes its own, as the only writer, with relaxed loads and stores; the control plane reads them at any
//! time. When a channel closes its numbers are added to its device's.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

/// Buckets below this many nanoseconds are one nanosecond wide.
const LINEAR: u64 = 16;
/// Buckets for each power of two above.
const PER_OCTAVE: usize = 8;
/// Powers of two above [`LINEAR`]: the last bucket begins at 64 s.
const OCTAVES: usize = 33;
const BUCKETS: usize = LINEAR as usize + OCTAVES * PER_OCTAVE;

/// A number with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it; by its only writer.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Sets it; by its only writer.
    #[inline]
    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A log-linear histogram of nanoseconds with one writer: buckets are at most an eighth as wide as their values.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[Counter]>,
    count: Counter,
    sum_ns: Counter,
    max_ns: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            buckets: (0..BUCKETS).map(|_| Counter::default()).collect(),
            count: Counter::default(),
            sum_ns: Counter::default(),
            max_ns: Counter::default(),
        }
    }
}

fn bucket_of(ns: u64) -> usize {
    if ns < LINEAR {
        return ns as usize;
    }
    let octave = ns.ilog2() as usize;
    let part = (ns >> (octave - 3)) as usize & (PER_OCTAVE - 1);
    (LINEAR as usize + (octave - 4) * PER_OCTAVE + part).min(BUCKETS - 1)
}

/// The largest value that belongs to a bucket.
fn upper_ns(bucket: usize) -> u64 {
    let Some(above) = bucket.checked_sub(LINEAR as usize) else { return bucket as u64 };
    let (octave, part) = (4 + above / PER_OCTAVE, (above % PER_OCTAVE) as u64);
    ((PER_OCTAVE as u64 + part + 1) << (octave - 3)) - 1
}

impl Histogram {
    /// Counts a value; by its only writer.
    pub fn record(&self, ns: u64) {
        self.buckets[bucket_of(ns)].add(1);
        self.count.add(1);
        self.sum_ns.add(ns);
        self.max_ns.set(self.max_ns.get().max(ns));
    }

    /// Adds another's values.
    fn add(&self, other: &Histogram) {
        self.buckets.iter().zip(&other.buckets).for_each(|(mine, theirs)| mine.add(theirs.get()));
        self.count.add(other.count.get());
        self.sum_ns.add(other.sum_ns.get());
        self.max_ns.set(self.max_ns.get().max(other.max_ns.get()));
    }

    /// The value that `percent` of all do not exceed, to an eighth.
    pub fn percentile(&self, percent: f64) -> u64 {
        let rank = (self.count.get() as f64 * percent / 100.0).ceil() as u64;
        let mut below = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            below += count.get();
            if below >= rank.max(1) {
                return upper_ns(bucket).min(self.max_ns.get());
            }
        }
        0
    }

    fn to_json(&self) -> Value {
        let count = self.count.get();
        let buckets = self.buckets.iter().enumerate().filter(|(_, count)| count.get() > 0);
        json!({
            "count": count,
            "mean_ns": self.sum_ns.get().checked_div(count).unwrap_or(0),
            "p50_ns": self.percentile(50.0),
            "p90_ns": self.percentile(90.0),
            "p99_ns": self.percentile(99.0),
            "p99_9_ns": self.percentile(99.9),
            "max_ns": self.max_ns.get(),
            "buckets": buckets.map(|(bucket, count)| json!([upper_ns(bucket), count.get()])).collect::<Vec<_>>(),
        })
    }
}

/// Numbers of one channel, or of all that a device had.
#[derive(Debug, Default)]
pub struct ChannelStats {
    /// I/Os that came.
    pub submitted: Counter,
    /// I/Os that ended as the handler said.
    pub completed: Counter,
    /// I/Os that ended at their deadline.
    pub timed_out: Counter,
    /// I/Os that were given up in a reset or a removal, or aborted before the handler had them.
    pub aborted: Counter,
    /// Requests that came home after their I/O had ended.
    pub late: Counter,
    /// What the handler did wrong with requests.
    pub faults: Counter,
    /// I/Os that wait for a place.
    pub waiting: Counter,
    /// I/Os that are with the handler.
    pub with_handler: Counter,
    /// Requests that are with the handler although their I/O has ended.
    pub overdue: Counter,
    /// Requests that were with the handler when their channel closed.
    pub abandoned: Counter,
    /// From submission until the handler's side took the request.
    pub in_ring: Histogram,
    /// From there until the handler completed it.
    pub in_handler: Histogram,
    /// From there until its reactor saw that.
    pub going_home: Histogram,
}

impl ChannelStats {
    fn add(&self, other: &ChannelStats) {
        let counters = |stats: &ChannelStats| {
            let all =
                [&stats.submitted, &stats.completed, &stats.timed_out, &stats.aborted, &stats.late, &stats.faults];
            all.map(Counter::get)
        };
        let [submitted, completed, timed_out, aborted, late, faults] = counters(other);
        self.submitted.add(submitted);
        self.completed.add(completed);
        self.timed_out.add(timed_out);
        self.aborted.add(aborted);
        self.late.add(late);
        self.faults.add(faults);
        self.abandoned.add(other.abandoned.get());
        self.in_ring.add(&other.in_ring);
        self.in_handler.add(&other.in_handler);
        self.going_home.add(&other.going_home);
    }
}

/// Numbers of a device.
#[derive(Debug, Default)]
pub struct DeviceStats {
    open: Mutex<Vec<Arc<ChannelStats>>>,
    closed: ChannelStats,
}

impl DeviceStats {
    fn open(&self) -> MutexGuard<'_, Vec<Arc<ChannelStats>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Numbers for a channel that opens.
    pub fn channel(&self) -> Arc<ChannelStats> {
        let stats = Arc::new(ChannelStats::default());
        self.open().push(Arc::clone(&stats));
        stats
    }

    /// The channel of `stats` closes.
    pub fn close(&self, stats: &Arc<ChannelStats>) {
        let mut open = self.open();
        open.retain(|other| !Arc::ptr_eq(other, stats));
        // Under the lock, so that there is one writer.
        self.closed.add(stats);
    }

    /// All of it together.
    pub fn sum(&self) -> ChannelStats {
        let open = self.open();
        let sum = ChannelStats::default();
        sum.add(&self.closed);
        for stats in open.iter() {
            sum.add(stats);
            sum.waiting.add(stats.waiting.get());
            sum.with_handler.add(stats.with_handler.get());
            sum.overdue.add(stats.overdue.get());
        }
        sum
    }

    /// As RPCs show it.
    pub fn to_json(&self) -> Value {
        let sum = self.sum();
        json!({
            "submitted": sum.submitted.get(),
            "completed": sum.completed.get(),
            "timed_out": sum.timed_out.get(),
            "aborted": sum.aborted.get(),
            "late": sum.late.get(),
            "faults": sum.faults.get(),
            "waiting": sum.waiting.get(),
            "with_handler": sum.with_handler.get(),
            "overdue": sum.overdue.get(),
            "abandoned": sum.abandoned.get(),
            "latency": {
                "in_ring": sum.in_ring.to_json(),
                "in_handler": sum.in_handler.to_json(),
                "going_home": sum.going_home.to_json(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_hold_what_they_say() {
        let mut last = 0;
        for ns in (0..5000).chain((13..37).flat_map(|shift| [(1 << shift) - 1, 1 << shift, 3 << (shift - 1)])) {
            let bucket = bucket_of(ns);
            assert!(ns <= upper_ns(bucket), "{ns}");
            assert!(bucket == 0 || ns > upper_ns(bucket - 1), "{ns}");
            assert!(upper_ns(bucket) - ns <= ns / 8 + 1, "{ns}");
            last = last.max(bucket);
        }
        assert!(last < BUCKETS);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_and_sums() {
        let device = DeviceStats::default();
        let (a, b) = (device.channel(), device.channel());
        (1..=99).for_each(|_| a.in_handler.record(1000));
        b.in_handler.record(1_000_000);
        b.submitted.add(3);
        assert_eq!(device.sum().in_handler.percentile(50.0), upper_ns(bucket_of(1000)));
        assert_eq!(device.sum().in_handler.percentile(99.9), 1_000_000);
        b.waiting.set(7);
        assert_eq!(device.sum().waiting.get(), 7);
        device.close(&b);
        let sum = device.sum();
        assert_eq!((sum.submitted.get(), sum.waiting.get(), sum.in_handler.count.get()), (3, 0, 100));
        assert_eq!(sum.in_handler.percentile(100.0), 1_000_000);
        assert_eq!(Histogram::default().percentile(99.0), 0);
    }
}
