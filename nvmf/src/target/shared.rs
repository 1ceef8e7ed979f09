//! What the queues of one controller share across reactors, and the table in which an I/O queue finds its controller.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use reactor::{Instant, ReactorId};

use super::controller::{ErrorLog, ErrorRecord};
use super::view::ListenAddress;

/// A controller as its I/O queues see it. The admin queue's reactor owns the rest.
#[derive(Debug)]
pub struct ControllerShared {
    /// Its identifier within the subsystem.
    pub cntlid: u16,
    /// NQN of its subsystem, or of the discovery service.
    pub subnqn: String,
    /// [`SubsystemView::incarnation`](super::view::SubsystemView) of its subsystem; 0 for discovery.
    pub incarnation: u64,
    /// The host that it was made for.
    pub hostnqn: String,
    /// That host's identifier.
    pub hostid: [u8; 16],
    /// The reactor of its admin queue.
    pub admin_reactor: ReactorId,
    /// Where the host came in.
    pub listener: ListenAddress,
    /// I/O queues that may be connected; set by the Number of Queues feature.
    pub max_io_queues: AtomicU32,
    /// CC.EN = 1 and CSTS.RDY = 1: I/O commands are executed.
    pub ready: AtomicBool,
    /// The association is over: every queue closes.
    pub dead: AtomicBool,
    /// Since when, as an [`Instant`].
    pub dead_since: AtomicU64,
    /// Traffic since the keep alive timer was last looked at (TBKAS, Base 3.9.4.1).
    pub traffic: AtomicBool,
    /// Connected I/O queues by QID, and the reactor of each; those that have closed, too, while commands of theirs that
    /// write have not ended.
    pub io_queues: Mutex<BTreeMap<u16, ReactorId>>,
    /// What its I/O queues did.
    pub counters: IoCounters,
    /// What failed on any of its queues. Locked when a command fails and when the log is read.
    pub errors: Mutex<ErrorLog>,
}

/// Counters of the SMART log (Base 5.1.12.1.3), added to once a poll.
#[derive(Debug, Default)]
pub struct IoCounters {
    /// Bytes read by the host.
    pub bytes_read: AtomicU64,
    /// Bytes written by the host.
    pub bytes_written: AtomicU64,
    /// Read commands (with Compare and Verify).
    pub read_commands: AtomicU64,
    /// Write commands.
    pub write_commands: AtomicU64,
    /// Commands that failed for the medium's sake.
    pub media_errors: AtomicU64,
}

impl ControllerShared {
    /// Adds to the Error Information log, from any reactor. The host is told, where the specification says so, when the
    /// controller's timer is looked at next.
    pub fn record_error(&self, record: ErrorRecord) {
        self.errors().add(record, self.listener.trtype);
    }

    /// The Error Information log.
    pub fn errors(&self) -> MutexGuard<'_, ErrorLog> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connected I/O queues.
    pub fn io_queues(&self) -> MutexGuard<'_, BTreeMap<u16, ReactorId>> {
        self.io_queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All controllers of the target, by subsystem NQN and identifier. Locked when queues connect and end, never for a command.
#[derive(Debug, Default)]
pub struct ControllerTable(Mutex<Controllers>);

#[derive(Debug, Default)]
struct Controllers {
    by_id: BTreeMap<(String, u16), Arc<ControllerShared>>,
    /// Last identifier given out for each subsystem, so that a dead controller's is not soon reused.
    last: BTreeMap<String, u16>,
}

impl ControllerTable {
    fn lock(&self) -> MutexGuard<'_, Controllers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives out a free identifier between `min` and `max` and enters the controller that `build` makes of it. `None` when
    /// all are in use.
    pub fn add(
        &self,
        subnqn: &str,
        min: u16,
        max: u16,
        build: impl FnOnce(u16) -> ControllerShared,
    ) -> Option<Arc<ControllerShared>> {
        let mut table = self.lock();
        let last = table.last.get(subnqn).copied().filter(|last| (min..max).contains(last));
        let first = last.map_or(min, |last| last + 1);
        let cntlid =
            (first..=max).chain(min..first).find(|id| !table.by_id.contains_key(&(subnqn.to_string(), *id)))?;
        let shared = Arc::new(build(cntlid));
        table.by_id.insert((subnqn.to_string(), cntlid), Arc::clone(&shared));
        table.last.insert(subnqn.to_string(), cntlid);
        Some(shared)
    }

    /// The controller that an I/O queue wants to join.
    pub fn get(&self, subnqn: &str, cntlid: u16) -> Option<Arc<ControllerShared>> {
        self.lock().by_id.get(&(subnqn.to_string(), cntlid)).map(Arc::clone)
    }

    /// The controllers of a subsystem, by identifier.
    pub fn of(&self, subnqn: &str) -> Vec<Arc<ControllerShared>> {
        self.lock().by_id.values().filter(|controller| controller.subnqn == subnqn).map(Arc::clone).collect()
    }

    /// Since when an association of this host is over of which commands that write are still executing: the latest, if
    /// there are several. A write of the old could land behind one of a new one (Base 9.6).
    pub fn draining_since(&self, subnqn: &str, hostid: &[u8; 16]) -> Option<Instant> {
        let table = self.lock();
        let controllers = table.by_id.values().filter(|c| c.subnqn == subnqn && c.hostid == *hostid);
        let draining = controllers.filter(|controller| controller.is_dead() && !controller.io_queues().is_empty());
        draining.map(|controller| Instant(controller.dead_since.load(Ordering::Relaxed))).max()
    }

    /// Takes a controller out when its last queue has closed.
    pub fn remove(&self, controller: &ControllerShared) {
        self.lock().by_id.remove(&(controller.subnqn.clone(), controller.cntlid));
    }

    /// Controllers there are.
    pub fn len(&self) -> usize {
        self.lock().by_id.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl ControllerShared {
    /// Ends the association: its queues close as their reactors notice.
    pub fn kill(&self, now: Instant) {
        self.dead_since.store(now.0, Ordering::Relaxed);
        self.dead.store(true, Ordering::Release);
        self.ready.store(false, Ordering::Release);
    }

    /// Whether the association is over.
    #[inline]
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }
}
