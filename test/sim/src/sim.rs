//! The simulated machine: clock, events, random numbers, and what its network and disks hold.
//!
//! Everything that happens by itself (a segment arrives, a disk operation ends, a timer fires) is an [`Event`] in one
//! queue ordered by time and then by number, so a run is decided by its seed alone. Locks are there because the seams ask
//! for `Send + Sync`; one thread takes them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;

use bdev::conformance::Rng;
use reactor::net::Address;
use reactor::{Clock, Instant};

use crate::disk::{DiskEvent, Disks};
use crate::net::{Net, NetEvent};
use crate::park::Parks;
use crate::rdma::{Rdma, RdmaEvent, Work};
use crate::trace;

/// Something that will happen.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Event {
    Net(NetEvent),
    Rdma(RdmaEvent),
    Disk(DiskEvent),
    Timer(u64),
}

struct Entry {
    at: u64,
    number: u64,
    event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        self.number == other.number
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Entry) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Entry) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// What is to happen, in order.
#[derive(Default)]
pub(crate) struct Agenda {
    pub(crate) now: u64,
    next: u64,
    entries: BinaryHeap<Reverse<Entry>>,
}

impl Agenda {
    pub(crate) fn at(&mut self, at: u64, event: Event) {
        self.next += 1;
        self.entries.push(Reverse(Entry { at: at.max(self.now), number: self.next, event }));
    }

    /// Takes out the ends of work of a queue pair that have not come; of receives of a shared queue, none.
    pub(crate) fn take_rdma_work(&mut self, of: u64, shared: bool) -> Vec<Work> {
        let is_its = |event: &Event| match event {
            Event::Rdma(RdmaEvent::Complete { qp, work, .. }) => {
                *qp == of && (!shared || matches!(work, Work::Posted { .. }))
            }
            _ => false,
        };
        let (mut taken, mut kept) = (Vec::new(), Vec::new());
        for Reverse(entry) in std::mem::take(&mut self.entries) {
            if is_its(&entry.event) { taken.push(entry) } else { kept.push(Reverse(entry)) }
        }
        self.entries = kept.into();
        taken.sort_by_key(|entry| (entry.at, entry.number));
        let work = taken.into_iter().filter_map(|entry| match entry.event {
            Event::Rdma(RdmaEvent::Complete { work, .. }) => Some(work),
            _ => None,
        });
        work.collect()
    }

    pub(crate) fn after(&mut self, delay_ns: u64, event: Event) {
        self.at(self.now.saturating_add(delay_ns), event);
    }
}

/// What the seams share.
pub(crate) struct State {
    pub(crate) rng: Rng,
    pub(crate) agenda: Agenda,
    pub(crate) net: Net,
    pub(crate) rdma: Rdma,
    pub(crate) disks: Disks,
    pub(crate) parks: Parks,
    timers: BTreeMap<u64, Waker>,
    next_timer: u64,
}

impl State {
    /// A number from `range.0` to `range.1`, mostly near the lower end.
    pub(crate) fn skewed(rng: &mut Rng, range: (u64, u64)) -> u64 {
        let span = range.1.saturating_sub(range.0) + 1;
        let top = match rng.below(8) {
            0 => span,
            1 | 2 => span.div_ceil(4),
            _ => span.div_ceil(16),
        };
        range.0 + rng.below(top)
    }
}

/// The simulated machine.
pub struct Sim {
    now: AtomicU64,
    state: Mutex<State>,
    /// The power is off: nothing that is still dropped has to keep any rule.
    off: AtomicBool,
}

impl Sim {
    /// A machine with empty disks.
    pub fn new(seed: u64) -> Arc<Sim> {
        Sim::with_disks(seed, 1_000_000, Disks::default())
    }

    fn with_disks(seed: u64, now: u64, disks: Disks) -> Arc<Sim> {
        let state = State {
            rng: Rng::new(seed ^ 0x5eed_0f51),
            agenda: Agenda { now, ..Agenda::default() },
            net: Net::default(),
            rdma: Rdma::default(),
            disks,
            parks: Parks::default(),
            timers: BTreeMap::new(),
            next_timer: 0,
        };
        trace::set_now(now);
        Arc::new(Sim { now: AtomicU64::new(now), state: Mutex::new(state), off: AtomicBool::new(false) })
    }

    /// Cuts the power: whatever is called on this machine afterwards has no effect. Returns the same machine switched on
    /// again, with what its disks kept.
    pub fn power_cycle(self: &Arc<Sim>, seed: u64) -> Arc<Sim> {
        self.off.store(true, Ordering::Release);
        let mut state = self.lock();
        let state = &mut *state;
        let disks = state.disks.crash(&mut state.rng);
        trace::event("power cycle", seed, 0, 0);
        Sim::with_disks(seed, self.now.load(Ordering::Acquire) + 1_000_000_000, disks)
    }

    /// Everything that is dropped from here on need not keep the rules of teardown.
    pub fn power_off(&self) {
        self.off.store(true, Ordering::Release);
    }

    pub(crate) fn is_off(&self) -> bool {
        self.off.load(Ordering::Acquire)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `change` at the network's rules.
    pub fn net<R>(&self, change: impl FnOnce(&mut crate::net::NetRules) -> R) -> R {
        change(&mut self.lock().net.rules)
    }

    /// Lets `change` at the rules of RDMA devices.
    pub fn rdma<R>(&self, change: impl FnOnce(&mut crate::rdma::RdmaRules) -> R) -> R {
        change(&mut self.lock().rdma.rules)
    }

    /// The machine's RDMA device goes away with everything on it, or comes back.
    pub fn lose_rdma_device(&self, lost: bool) {
        let mut state = self.lock();
        let state = &mut *state;
        state.rdma.set_lost(lost, &mut state.rng, &mut state.agenda, &mut state.parks);
    }

    /// The RDMA connection of the host with this address falls silent; whether there is one.
    pub fn silence_rdma(&self, addr: SocketAddr) -> bool {
        self.lock().rdma.silence(addr)
    }

    /// Lets `change` at the disks' rules.
    pub fn disk<R>(&self, change: impl FnOnce(&mut crate::disk::DiskRules) -> R) -> R {
        change(&mut self.lock().disks.rules)
    }

    /// Breaks up to `count` connections that are up, chosen by the seed; returns how many broke.
    pub fn break_connections(&self, count: usize) -> usize {
        let mut state = self.lock();
        let state = &mut *state;
        state.rdma.break_some(count, &mut state.rng, &mut state.agenda);
        state.net.break_some(count, &mut state.rng, &mut state.agenda)
    }

    /// Connections from now on and half of those that are up lose everything silently.
    pub fn silence_some(&self) -> usize {
        let mut state = self.lock();
        let state = &mut *state;
        state.rdma.silence_some(&mut state.rng);
        state.net.silence_some(&mut state.rng)
    }

    /// Ends of connections that somebody holds.
    pub fn open_sockets(&self) -> usize {
        {
            let state = self.lock();
            state.net.open_ends() + state.rdma.open_ends()
        }
    }

    /// When connections to `addr` were attempted.
    pub fn attempts(&self, addr: SocketAddr) -> Vec<Instant> {
        let to = Address::from(addr);
        let state = self.lock();
        state.net.attempts.iter().filter(|(_, address)| *address == to).map(|(at, _)| Instant(*at)).collect()
    }

    /// A random number of this machine.
    pub fn random(&self) -> u64 {
        self.lock().rng.next_u64()
    }

    /// Moves the clock forward by `by_ns` and lets everything happen that is due; returns how much that was.
    pub(crate) fn advance(&self, by_ns: u64) -> usize {
        let now = self.now.fetch_add(by_ns, Ordering::AcqRel) + by_ns;
        trace::set_now(now);
        let mut fired = Vec::new();
        let mut count = 0;
        {
            let mut state = self.lock();
            let state = &mut *state;
            state.agenda.now = now;
            while state.agenda.entries.peek().is_some_and(|entry| entry.0.at <= now) {
                let Some(Reverse(entry)) = state.agenda.entries.pop() else { break };
                count += 1;
                match entry.event {
                    Event::Net(event) => state.net.happen(event, &mut state.rng, &mut state.agenda, &mut state.parks),
                    Event::Rdma(event) => state.rdma.happen(event, &mut state.rng, &mut state.agenda, &mut state.parks),
                    Event::Disk(event) => {
                        state.disks.happen(event, &mut state.rng, &mut state.agenda, &mut state.parks)
                    }
                    Event::Timer(timer) => fired.extend(state.timers.remove(&timer)),
                }
            }
        }
        fired.into_iter().for_each(Waker::wake);
        count
    }

    /// When the next thing happens by itself.
    pub(crate) fn next_event(&self) -> Option<Instant> {
        self.lock().agenda.entries.peek().map(|entry| Instant(entry.0.at))
    }

    pub(crate) fn timer(&self, at: Instant, waker: Waker) -> u64 {
        let mut state = self.lock();
        state.next_timer += 1;
        let timer = state.next_timer;
        state.timers.insert(timer, waker);
        state.agenda.at(at.0, Event::Timer(timer));
        timer
    }

    /// Time since the machine's origin.
    pub fn uptime(&self) -> Duration {
        Duration::from_nanos(self.now.load(Ordering::Acquire))
    }
}

impl Clock for Sim {
    fn now(&self) -> Instant {
        Instant(self.now.load(Ordering::Acquire))
    }
}

impl std::fmt::Debug for Sim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sim").field("now", &self.now).finish_non_exhaustive()
    }
}
