//! When to connect again, and when to give up: arithmetic on instants, nothing else.
//!
//! ```text
//!  lost_at        + fast_io_fail_timeout            + ctrlr_loss_timeout
//!     |---- I/O waits ----|---- I/O fails, attempts go on ----|---- given up
//!     try, wait reconnect_delay, try, wait twice that (up to reconnect_delay_max), try ...
//! ```

use reactor::Instant;
use std::time::Duration;

/// What is to happen after a controller is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReconnectPolicy {
    /// How long to try; `None` for ever. Zero: one attempt at once, and no other.
    pub ctrlr_loss_timeout: Option<Duration>,
    /// Between the first attempts.
    pub reconnect_delay: Duration,
    /// The delay doubles with every attempt up to this. The same as `reconnect_delay` for a steady one.
    pub reconnect_delay_max: Duration,
    /// How long I/O waits for the controller to come back; `None`: as long as there are attempts.
    pub fast_io_fail_timeout: Option<Duration>,
    /// Whether there is any attempt.
    pub reconnect: bool,
}

impl ReconnectPolicy {
    /// A controller that is lost stays lost.
    pub const NEVER: ReconnectPolicy = ReconnectPolicy {
        ctrlr_loss_timeout: Some(Duration::ZERO),
        reconnect_delay: Duration::ZERO,
        reconnect_delay_max: Duration::ZERO,
        fast_io_fail_timeout: None,
        reconnect: false,
    };

    /// From the three parameters of RPCs, seconds: `ctrlr_loss` is -1 for ever and 0 for one attempt, `fast_io_fail` is 0
    /// for none.
    ///
    /// # Errors
    /// The rule that they break, naming the parameter.
    pub fn from_seconds(ctrlr_loss: i64, reconnect_delay: u64, fast_io_fail: u64) -> Result<Self, &'static str> {
        if ctrlr_loss < -1 {
            return Err("ctrlr_loss_timeout_sec is -1 (try for ever), 0 (do not), or seconds");
        }
        if ctrlr_loss == 0 && (reconnect_delay != 0 || fast_io_fail != 0) {
            return Err(
                "reconnect_delay_sec and fast_io_fail_timeout_sec mean nothing while ctrlr_loss_timeout_sec is 0",
            );
        }
        if ctrlr_loss != 0 && reconnect_delay == 0 {
            return Err("reconnect_delay_sec has to be 1 or more if ctrlr_loss_timeout_sec is not 0");
        }
        if fast_io_fail != 0 && fast_io_fail < reconnect_delay {
            return Err("fast_io_fail_timeout_sec has to be as long as reconnect_delay_sec, or 0");
        }
        if ctrlr_loss > 0 && reconnect_delay > ctrlr_loss.unsigned_abs() {
            return Err("reconnect_delay_sec has to be shorter than ctrlr_loss_timeout_sec");
        }
        if ctrlr_loss > 0 && fast_io_fail > ctrlr_loss.unsigned_abs() {
            return Err("fast_io_fail_timeout_sec has to be shorter than ctrlr_loss_timeout_sec");
        }
        let delay = Duration::from_secs(reconnect_delay);
        Ok(ReconnectPolicy {
            ctrlr_loss_timeout: (ctrlr_loss >= 0).then_some(Duration::from_secs(ctrlr_loss.unsigned_abs())),
            reconnect_delay: delay,
            reconnect_delay_max: delay,
            fast_io_fail_timeout: (fast_io_fail > 0).then_some(Duration::from_secs(fast_io_fail)),
            reconnect: true,
        })
    }
}

/// What to do now that an attempt has failed, or the controller was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Connect at this instant.
    TryAt(Instant),
    /// Never again.
    GiveUp,
}

/// A policy at work.
#[derive(Clone, Copy, Debug)]
pub struct Recovery {
    policy: ReconnectPolicy,
    lost_at: Option<Instant>,
    /// When it came back last.
    back_at: Option<Instant>,
    attempts: u32,
    gave_up: bool,
}

impl Recovery {
    /// Nothing is lost yet.
    pub fn new(policy: ReconnectPolicy) -> Recovery {
        Recovery { policy, lost_at: None, back_at: None, attempts: 0, gave_up: false }
    }

    /// The controller was lost, or an attempt to have it back has failed.
    pub fn failed(&mut self, now: Instant) -> Next {
        let next = self.next(now);
        self.gave_up |= next == Next::GiveUp;
        next
    }

    fn next(&mut self, now: Instant) -> Next {
        let first = self.lost_at.is_none();
        self.lost_at.get_or_insert(now);
        let only_once = self.policy.ctrlr_loss_timeout == Some(Duration::ZERO);
        if !self.policy.reconnect || !first && (only_once || self.has_given_up(now)) {
            return Next::GiveUp;
        }
        self.attempts = self.attempts.saturating_add(1);
        if first {
            // One that is lost as soon as it is back must not be connected in a circle.
            let soonest = self.back_at.map_or(now, |back_at| back_at + self.policy.reconnect_delay);
            return Next::TryAt(now.max(soonest));
        }
        let doubled = self.policy.reconnect_delay.saturating_mul(1 << (self.attempts - 2).min(16));
        // It may come to be given up before.
        Next::TryAt(now + doubled.min(self.policy.reconnect_delay_max.max(self.policy.reconnect_delay)))
    }

    /// The controller is back.
    pub fn recovered(&mut self, now: Instant) {
        (self.lost_at, self.back_at, self.attempts, self.gave_up) = (None, Some(now), 0, false);
    }

    /// When it was lost.
    pub fn lost_at(&self) -> Option<Instant> {
        self.lost_at
    }

    /// Whether I/O fails instead of waiting.
    pub fn fails_io(&self, now: Instant) -> bool {
        let since = |timeout: Duration| self.lost_at.is_some_and(|lost_at| now >= lost_at + timeout);
        self.policy.fast_io_fail_timeout.is_some_and(since) || self.has_given_up(now)
    }

    /// Whether there is no more time for attempts.
    pub fn has_given_up(&self, now: Instant) -> bool {
        // The one attempt of a timeout of zero takes the time that it takes.
        let passed = match (self.lost_at, self.policy.ctrlr_loss_timeout) {
            (Some(lost_at), Some(timeout)) if timeout > Duration::ZERO => now >= lost_at + timeout,
            _ => false,
        };
        self.gave_up || passed
    }

    /// When the answers of the two above change next.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let lost_at = self.lost_at?;
        let timeouts = [self.policy.fast_io_fail_timeout, self.policy.ctrlr_loss_timeout];
        timeouts.into_iter().flatten().map(|timeout| lost_at + timeout).filter(|at| *at > now).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn at(seconds: u64) -> Instant {
        Instant(seconds * S)
    }

    #[test]
    fn attempts_follow_the_delay_until_the_loss_timeout() {
        let mut recovery = Recovery::new(ReconnectPolicy::from_seconds(10, 3, 4).unwrap());
        assert!(!recovery.fails_io(at(1_000)));
        assert_eq!(recovery.failed(at(100)), Next::TryAt(at(100)));
        assert_eq!(recovery.failed(at(101)), Next::TryAt(at(104)));
        assert!(!recovery.fails_io(at(103)) && recovery.fails_io(at(104)));
        assert_eq!(recovery.deadline(at(101)), Some(at(104)));
        assert_eq!(recovery.deadline(at(104)), Some(at(110)));
        assert_eq!(recovery.failed(at(105)), Next::TryAt(at(108)));
        assert_eq!(recovery.failed(at(108)), Next::TryAt(at(111)));
        assert!(!recovery.has_given_up(at(109)) && recovery.has_given_up(at(110)));
        assert_eq!(recovery.failed(at(110)), Next::GiveUp);
        recovery.recovered(at(198));
        assert!(!recovery.fails_io(at(200)));
        assert_eq!(recovery.failed(at(199)), Next::TryAt(at(201)));
        recovery.recovered(at(150));
        assert_eq!(recovery.failed(at(200)), Next::TryAt(at(200)));
    }

    #[test]
    fn delays_double_up_to_their_limit_and_for_ever_is_for_ever() {
        let seconds = Duration::from_secs;
        let policy =
            ReconnectPolicy { reconnect_delay_max: seconds(5), ..ReconnectPolicy::from_seconds(-1, 1, 0).unwrap() };
        let mut recovery = Recovery::new(policy);
        let mut now = at(1);
        let mut delays = Vec::new();
        for _ in 0..100 {
            let Next::TryAt(next) = recovery.failed(now) else { panic!("given up") };
            delays.push(next.nanos_since(now) / S);
            now = next;
        }
        assert_eq!(delays[..6], [0, 1, 2, 4, 5, 5]);
        assert!(!recovery.fails_io(now));
    }

    #[test]
    fn no_timeout_is_one_attempt_and_never_is_none() {
        let mut once = Recovery::new(ReconnectPolicy::from_seconds(0, 0, 0).unwrap());
        assert_eq!(once.failed(at(1)), Next::TryAt(at(1)));
        assert!(!once.fails_io(at(3)));
        assert_eq!(once.failed(at(4)), Next::GiveUp);
        assert!(once.fails_io(at(4)));
        assert_eq!(Recovery::new(ReconnectPolicy::NEVER).failed(at(1)), Next::GiveUp);
    }

    #[test]
    fn parameters_that_make_no_sense_are_named() {
        for (loss, delay, fail, named) in [
            (-2, 1, 0, "ctrlr_loss_timeout_sec"),
            (0, 1, 0, "reconnect_delay_sec"),
            (0, 0, 1, "fast_io_fail_timeout_sec"),
            (5, 0, 0, "reconnect_delay_sec"),
            (-1, 0, 0, "reconnect_delay_sec"),
            (5, 6, 0, "reconnect_delay_sec"),
            (9, 4, 3, "fast_io_fail_timeout_sec"),
            (9, 4, 10, "fast_io_fail_timeout_sec"),
        ] {
            let why = ReconnectPolicy::from_seconds(loss, delay, fail).unwrap_err();
            assert!(why.contains(named), "{loss} {delay} {fail}: {why}");
        }
        assert!(ReconnectPolicy::from_seconds(9, 4, 9).is_ok() && ReconnectPolicy::from_seconds(-1, 4, 900).is_ok());
    }
}
