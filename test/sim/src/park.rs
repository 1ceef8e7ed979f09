//! Readiness of simulated sources, edge-triggered as epoll reports it, and a sleep that never blocks.
//!
//! An edge puts a source on its reactor's list; [`SimParker::wait`] takes the list, in an order and in portions that the
//! seed decides, and reports what each source is at that moment, as epoll does. Sleeping itself is the
//! [`World`](crate::world::World)'s: it does not step a reactor that sleeps until its [`SleepFlags`] say that something
//! would have woken it.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bdev::conformance::Rng;
use reactor::park::{Parker, Ready, Source, Unpark};

use crate::sim::Sim;

/// Sources that one call of `wait` reports at most; epoll's caller has a limit too.
const BATCH: u64 = 16;

/// What ends a reactor's sleep.
#[derive(Debug, Default)]
pub(crate) struct SleepFlags {
    unparked: AtomicBool,
    edges: AtomicBool,
    engine: AtomicBool,
}

impl SleepFlags {
    /// Whether something has happened that wakes the sleeper.
    pub(crate) fn is_woken(&self) -> bool {
        self.unparked.load(Ordering::Acquire)
            || self.edges.load(Ordering::Acquire)
            || self.engine.load(Ordering::Acquire)
    }

    /// The sleeper has woken: it looks at its queues now.
    pub(crate) fn clear_wakes(&self) {
        self.unparked.store(false, Ordering::Release);
        self.engine.store(false, Ordering::Release);
    }

    /// A file operation has ended.
    pub(crate) fn engine_done(&self) {
        self.engine.store(true, Ordering::Release);
    }
}

impl Unpark for SleepFlags {
    fn unpark(&self) {
        self.unparked.store(true, Ordering::Release);
    }
}

#[derive(Default)]
struct Park {
    flags: Arc<SleepFlags>,
    /// Sources with an edge that was not reported.
    ready: Vec<u64>,
}

/// All reactors' readiness sets.
#[derive(Default)]
pub(crate) struct Parks {
    parks: Vec<Park>,
    watches: BTreeMap<u64, (usize, u64)>,
}

impl Parks {
    /// Something happened to a source.
    pub(crate) fn edge(&mut self, source: u64) {
        let Some(&(park, _)) = self.watches.get(&source) else { return };
        let park = &mut self.parks[park];
        if !park.ready.contains(&source) {
            park.ready.push(source);
        }
        park.flags.edges.store(true, Ordering::Release);
    }

    pub(crate) fn len(&self) -> usize {
        self.parks.len()
    }

    pub(crate) fn is_watched(&self, source: u64) -> bool {
        self.watches.contains_key(&source)
    }

    pub(crate) fn flags(&self, parker: usize) -> &Arc<SleepFlags> {
        &self.parks[parker].flags
    }

    pub(crate) fn forget(&mut self, source: u64) {
        if let Some((park, _)) = self.watches.remove(&source) {
            self.parks[park].ready.retain(|&ready| ready != source);
        }
    }

    /// Takes some of the ready sources in random order, with their tokens.
    fn take(&mut self, park: usize, rng: &mut Rng) -> Vec<(u64, u64)> {
        let Park { flags, ready } = &mut self.parks[park];
        let mut out = Vec::new();
        let limit = 1 + rng.below(BATCH);
        while !ready.is_empty() && (out.len() as u64) < limit {
            let source = ready.swap_remove(rng.below(ready.len() as u64) as usize);
            out.push((source, self.watches[&source].1));
        }
        flags.edges.store(!ready.is_empty(), Ordering::Release);
        out
    }
}

/// One reactor's readiness set.
pub(crate) struct SimParker {
    sim: Arc<Sim>,
    index: usize,
}

impl SimParker {
    pub(crate) fn new(sim: &Arc<Sim>) -> SimParker {
        let mut state = sim.lock();
        state.parks.parks.push(Park::default());
        SimParker { sim: Arc::clone(sim), index: state.parks.parks.len() - 1 }
    }
}

impl Parker for SimParker {
    fn watch(&mut self, source: Source, token: u64) -> io::Result<()> {
        let Source::Virtual(id) = source else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the simulator has no descriptors"));
        };
        let mut state = self.sim.lock();
        if state.parks.is_watched(id) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "this source is watched already"));
        }
        state.parks.watches.insert(id, (self.index, token));
        let (readable, writable, _) = state.net.readiness(id);
        if readable || writable || state.rdma.is_ready(id) {
            state.parks.edge(id);
        }
        Ok(())
    }

    fn unwatch(&mut self, source: Source) {
        let Source::Virtual(id) = source else { return };
        let mut state = self.sim.lock();
        assert!(self.sim.is_off() || state.parks.is_watched(id), "source {id} is not watched");
        state.parks.forget(id);
    }

    fn wait(&mut self, _: Option<Duration>, out: &mut Vec<Ready>) -> io::Result<()> {
        let mut state = self.sim.lock();
        let state = &mut *state;
        for (source, token) in state.parks.take(self.index, &mut state.rng) {
            let (mut readable, writable, ended) = state.net.readiness(source);
            readable |= state.rdma.is_ready(source);
            if readable || writable {
                out.push(Ready { token, readable, writable, ended });
            }
        }
        Ok(())
    }

    fn pause(&mut self, _: Duration) {
        unreachable!("the simulator steps its reactors itself, and none of them runs");
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        let state = self.sim.lock();
        Arc::clone(state.parks.flags(self.index)) as Arc<dyn Unpark>
    }
}
