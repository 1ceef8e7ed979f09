//! What the engines of one run share, one on each reactor: they begin together once all are ready, stop when one fails, and
//! leave together, so that no queue loses its controller to a member that was done before.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};

/// What a member does, as people see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Doing {
    /// It sets its device up.
    Connecting,
    /// It writes everything once.
    Filling,
    /// It loads and does not measure yet.
    WarmingUp,
    /// It measures.
    Measuring,
    /// It waits for the last completions, its own or those of others.
    Finishing,
    /// It reads everything again.
    Checking,
}

impl Doing {
    const ALL: [Doing; 6] =
        [Doing::Connecting, Doing::Filling, Doing::WarmingUp, Doing::Measuring, Doing::Finishing, Doing::Checking];

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Doing::Connecting => "connecting",
            Doing::Filling => "filling",
            Doing::WarmingUp => "warming up",
            Doing::Measuring => "measuring",
            Doing::Finishing => "finishing",
            Doing::Checking => "checking",
        }
    }
}

/// What can be seen of one member while it runs; on cache lines of its own, since it writes there at every step.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Member {
    completed: AtomicU64,
    errors: AtomicU64,
    doing: AtomicU8,
}

impl Member {
    /// Shows commands that have succeeded and failed so far.
    pub fn show(&self, completed: u64, errors: u64) {
        self.completed.store(completed, Ordering::Relaxed);
        self.errors.store(errors, Ordering::Relaxed);
    }

    /// Shows what it does.
    pub fn does(&self, doing: Doing) {
        self.doing.store(doing as u8, Ordering::Relaxed);
    }
}

/// The members of a run.
#[derive(Debug)]
pub struct Crew {
    members: Box<[Member]>,
    ready: AtomicUsize,
    done: AtomicUsize,
    failed: AtomicBool,
    stop: Arc<AtomicBool>,
}

impl Crew {
    /// Of so many members; `stop` is set by whoever wants the run to end.
    pub fn new(size: usize, stop: Arc<AtomicBool>) -> Arc<Crew> {
        Arc::new(Crew {
            members: (0..size).map(|_| Member::default()).collect(),
            ready: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            stop,
        })
    }

    /// Members.
    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// One of them.
    pub fn member(&self, index: usize) -> &Member {
        &self.members[index]
    }

    /// Somebody wants the run to end.
    pub fn is_interrupted(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The run is to end, as somebody wants it or as a member has failed.
    pub fn must_stop(&self) -> bool {
        self.is_interrupted() || self.failed.load(Ordering::Relaxed)
    }

    /// A member has failed: the others stop.
    pub fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// One more member is ready for the load.
    pub fn is_ready(&self) {
        self.ready.fetch_add(1, Ordering::Release);
    }

    /// Whether all are.
    pub fn are_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire) >= self.members.len()
    }

    /// One more member has nothing outstanding and sends nothing any more.
    pub fn is_done(&self) {
        self.done.fetch_add(1, Ordering::Release);
    }

    /// Whether all are.
    pub fn are_done(&self) -> bool {
        self.done.load(Ordering::Acquire) >= self.members.len()
    }

    /// What the one does that is furthest behind, commands that have succeeded, and those that have failed.
    pub fn progress(&self) -> (Doing, u64, u64) {
        let doing = |member: &Member| Doing::ALL[usize::from(member.doing.load(Ordering::Relaxed))];
        let sum = |of: fn(&Member) -> &AtomicU64| self.members.iter().map(|m| of(m).load(Ordering::Relaxed)).sum();
        let behind = self.members.iter().map(doing).min().unwrap_or(Doing::Connecting);
        (behind, sum(|member| &member.completed), sum(|member| &member.errors))
    }
}
