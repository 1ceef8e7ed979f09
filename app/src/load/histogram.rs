//! Counts of latencies in log-linear buckets: 64 to an octave, so a percentile is off by less than 1.6 %.

/// The latencies of a run.
#[derive(Debug)]
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum_ns: u128,
    max_ns: u64,
}

const SUB: usize = 64;

impl Histogram {
    /// Without a value.
    pub fn new() -> Self {
        Self { buckets: vec![0; SUB * 60], count: 0, sum_ns: 0, max_ns: 0 }
    }

    /// Values below 64 have a bucket each; above, each octave has 64.
    fn bucket(ns: u64) -> usize {
        let octave = (64 - (ns | 1).leading_zeros() as usize).saturating_sub(7);
        octave * SUB + (ns >> octave) as usize
    }

    /// The highest value of a bucket.
    fn upper(bucket: usize) -> u64 {
        if bucket < 2 * SUB {
            return bucket as u64;
        }
        let octave = bucket / SUB - 1;
        (((bucket - octave * SUB) as u64 + 1) << octave) - 1
    }

    /// Counts one latency, nanoseconds.
    #[inline]
    pub fn add(&mut self, ns: u64) {
        self.buckets[Self::bucket(ns)] += 1;
        self.count += 1;
        self.sum_ns += u128::from(ns);
        self.max_ns = self.max_ns.max(ns);
    }

    /// Counts all latencies of another run.
    pub fn add_all(&mut self, other: &Histogram) {
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(mine, others)| *mine += others);
        self.count += other.count;
        self.sum_ns += other.sum_ns;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// The value that so many per cent do not exceed, nanoseconds; 0 without values.
    pub fn percentile_ns(&self, percent: f64) -> u64 {
        let rank = ((self.count as f64 * percent / 100.0).ceil() as u64).clamp(1, self.count.max(1));
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Self::upper(bucket).min(self.max_ns);
            }
        }
        self.max_ns
    }

    /// The mean, nanoseconds; 0 without values.
    pub fn mean_ns(&self) -> f64 {
        self.sum_ns as f64 / self.count.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_and_hold_their_values() {
        let holds = |ns: u64| {
            let bucket = Histogram::bucket(ns);
            let upper = Histogram::upper(bucket);
            assert!(upper >= ns && upper - ns <= ns / 64, "{ns} in a bucket up to {upper}");
            bucket
        };
        let mut last = 0;
        for bucket in (0..200_000).map(holds) {
            assert!(bucket == last || bucket == last + 1, "{last} is followed by {bucket}");
            last = bucket;
        }
        for ns in (1..57).map(|shift| 127 << shift).chain([u64::MAX >> 1]) {
            assert!(holds(ns) < Histogram::new().buckets.len());
        }
    }

    #[test]
    fn percentiles_of_a_known_spread() {
        let mut histogram = Histogram::new();
        (1..=100_000).for_each(|us| histogram.add(us * 1000));
        for (percent, want) in [(50.0, 50_000_000.0), (99.0, 99_000_000.0), (99.999, 99_999_000.0)] {
            let got = histogram.percentile_ns(percent) as f64;
            assert!((got / want - 1.0).abs() < 1.0 / 64.0, "{percent}: {got}");
        }
        assert_eq!(histogram.percentile_ns(100.0), 100_000_000);
        assert_eq!(histogram.mean_ns(), 50_000_500.0);
    }
}
