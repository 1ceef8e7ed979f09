//! Counters of a device on one reactor, and their sums.

use reactor::Instant;

use super::types::{IoStatus, OpKind};

/// What was done of one kind. Latencies are nanoseconds, measured in whole steps of the reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpStats {
    /// Operations that succeeded.
    pub ops: u64,
    /// Bytes that they named.
    pub bytes: u64,
    /// Sum of their latencies.
    pub latency_ns: u64,
    /// Longest latency.
    pub max_latency_ns: u64,
    /// Shortest latency; `u64::MAX` while there was none. See [`OpStats::shortest_ns`].
    pub min_latency_ns: u64,
    /// Operations that failed.
    pub errors: u64,
}

impl Default for OpStats {
    fn default() -> Self {
        OpStats { ops: 0, bytes: 0, latency_ns: 0, max_latency_ns: 0, min_latency_ns: u64::MAX, errors: 0 }
    }
}

impl OpStats {
    /// Shortest latency as it is shown: 0 while there was none.
    pub fn shortest_ns(&self) -> u64 {
        if self.min_latency_ns == u64::MAX { 0 } else { self.min_latency_ns }
    }
}

/// Names of the statuses counted in [`IoStats::errors`], by index.
pub const ERROR_NAMES: [&str; 13] = [
    "failed",
    "out_of_range",
    "invalid",
    "not_supported",
    "no_device",
    "aborted",
    "timed_out",
    "read_error",
    "write_error",
    "compare_failed",
    "read_only",
    "no_space",
    "nvme_error",
];

/// What a device did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoStats {
    /// By [`OpKind`].
    pub by_op: [OpStats; OpKind::ALL.len()],
    /// Failures by status, named by [`ERROR_NAMES`].
    pub errors: [u64; ERROR_NAMES.len()],
}

/// What [`IoStats::reset`] forgets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatsReset {
    /// Everything.
    All,
    /// Longest and shortest latencies.
    MaxMin,
    /// Errors.
    Error,
    /// Nothing.
    None,
}

fn error_index(status: IoStatus) -> Option<usize> {
    Some(match status {
        IoStatus::Success => return None,
        IoStatus::Failed => 0,
        IoStatus::OutOfRange => 1,
        IoStatus::Invalid => 2,
        IoStatus::NotSupported => 3,
        IoStatus::NoDevice => 4,
        IoStatus::Aborted => 5,
        IoStatus::TimedOut => 6,
        IoStatus::ReadError => 7,
        IoStatus::WriteError => 8,
        IoStatus::CompareFailed => 9,
        IoStatus::ReadOnly => 10,
        IoStatus::NoSpace => 11,
        IoStatus::Nvme { .. } => 12,
    })
}

impl IoStats {
    /// Counts one operation.
    #[inline]
    pub fn record(&mut self, kind: OpKind, bytes: u64, started: Instant, now: Instant, status: IoStatus) {
        let entry = &mut self.by_op[kind as usize];
        match error_index(status) {
            None => {
                let latency = now.nanos_since(started);
                entry.max_latency_ns = entry.max_latency_ns.max(latency);
                entry.min_latency_ns = entry.min_latency_ns.min(latency);
                entry.ops += 1;
                entry.bytes += bytes;
                entry.latency_ns += latency;
            }
            Some(index) => {
                entry.errors += 1;
                self.errors[index] += 1;
            }
        }
    }

    /// The counters of `kind`.
    pub fn of(&self, kind: OpKind) -> &OpStats {
        &self.by_op[kind as usize]
    }

    /// Adds another reactor's counters.
    pub fn add(&mut self, other: &IoStats) {
        for (mine, theirs) in self.by_op.iter_mut().zip(&other.by_op) {
            mine.min_latency_ns = mine.min_latency_ns.min(theirs.min_latency_ns);
            mine.max_latency_ns = mine.max_latency_ns.max(theirs.max_latency_ns);
            mine.ops += theirs.ops;
            mine.bytes += theirs.bytes;
            mine.latency_ns += theirs.latency_ns;
            mine.errors += theirs.errors;
        }
        for (mine, theirs) in self.errors.iter_mut().zip(&other.errors) {
            *mine += theirs;
        }
    }

    /// Forgets what `mode` says.
    pub fn reset(&mut self, mode: StatsReset) {
        match mode {
            StatsReset::All => *self = IoStats::default(),
            StatsReset::MaxMin => {
                for entry in &mut self.by_op {
                    entry.max_latency_ns = 0;
                    entry.min_latency_ns = u64::MAX;
                }
            }
            StatsReset::Error => {
                self.errors = Default::default();
                self.by_op.iter_mut().for_each(|entry| entry.errors = 0);
            }
            StatsReset::None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_keep_the_extremes_of_those_that_worked() {
        let mut a = IoStats::default();
        a.record(OpKind::Read, 4096, Instant(10), Instant(40), IoStatus::Success);
        let mut b = IoStats::default();
        b.record(OpKind::Read, 512, Instant(10), Instant(15), IoStatus::Success);
        b.record(OpKind::Read, 512, Instant(10), Instant(99), IoStatus::ReadError);
        a.add(&b);
        a.add(&IoStats::default());
        let read = a.of(OpKind::Read);
        assert_eq!((read.ops, read.bytes, read.latency_ns), (2, 4608, 35));
        assert_eq!((read.min_latency_ns, read.max_latency_ns, read.errors), (5, 30, 1));
        assert_eq!(ERROR_NAMES[a.errors.iter().position(|&n| n == 1).unwrap()], "read_error");
        a.reset(StatsReset::MaxMin);
        assert_eq!(a.of(OpKind::Read).shortest_ns(), 0);
        a.record(OpKind::Read, 512, Instant(10), Instant(17), IoStatus::Success);
        assert_eq!((a.of(OpKind::Read).shortest_ns(), a.of(OpKind::Read).max_latency_ns), (7, 7));
        a.reset(StatsReset::Error);
        assert_eq!(a.errors, [0; ERROR_NAMES.len()]);
        a.reset(StatsReset::All);
        assert_eq!(a, IoStats::default());
    }

    #[test]
    fn error_names_match_the_statuses() {
        for status in [IoStatus::Failed, IoStatus::Aborted, IoStatus::NoSpace, IoStatus::CompareFailed] {
            assert_eq!(ERROR_NAMES[error_index(status).unwrap()], status.name());
        }
    }
}
