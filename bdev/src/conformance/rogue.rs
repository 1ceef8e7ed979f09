//! A handler of appliance devices that does everything wrong, as often as it is told to.
//!
//! It keeps blocks in memory, and does what a request asks for when it takes it, so that what it remembers can be
//! checked; what it does wrong is how it ends requests: later, out of order, never, by forgetting them, with another
//! length, with a panic. It also leaves requests where they are, and turns a deaf ear to aborts.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use appliance::memory::Memory;
use appliance::{Batch, Capabilities, Handler, IoStatus, Making, Request, RequestId, Worker, WorkerCx};
use reactor::{Instant, Progress};
use serde_json::Value;

use super::rng::Rng;

/// How often it does what: once in so many requests; 0: never.
#[derive(Clone, Copy, Debug, Default)]
pub struct Habits {
    /// Ends it later, in any order.
    pub hold: u64,
    /// The longest that it holds a request, in nanoseconds.
    pub hold_ns: u64,
    /// Keeps it for ever, or until [`Rogue::release`].
    pub lose: u64,
    /// Drops it.
    pub leak: u64,
    /// Panics with it in hand.
    pub panic: u64,
    /// Says another length than it has.
    pub wrong_length: u64,
    /// Makes its payload shorter.
    pub truncate: u64,
    /// Fails it.
    pub fail: u64,
    /// Leaves it, and what comes after it, for the next round.
    pub refuse: u64,
    /// Takes no notice of aborts and resets.
    pub deaf: bool,
    /// Decides all this.
    pub seed: u64,
}

/// What it was told, and what became of it.
#[derive(Debug, Default)]
pub struct Told {
    /// Workers made.
    pub made: AtomicU64,
    /// Aborts.
    pub aborts: AtomicU64,
    /// Resets.
    pub resets: AtomicU64,
    /// Whether it was stopped.
    pub stopped: AtomicBool,
    /// Requests that it took.
    pub taken: AtomicU64,
}

/// The handler.
pub struct Rogue {
    mine: Arc<Mine>,
}

struct Mine {
    memory: Memory,
    habits: Mutex<Habits>,
    lost: Mutex<Vec<(Request, IoStatus)>>,
    told: Arc<Told>,
}

impl Rogue {
    /// One with these habits.
    ///
    /// # Errors
    /// As the handler `memory`.
    pub fn new(block_size: u32, num_blocks: u64, habits: Habits) -> io::Result<Arc<Rogue>> {
        let geometry = appliance::Geometry::new(block_size, num_blocks);
        let making = Making { bdev: "rogue", geometry, options: &Value::Null, workers: 1 };
        let mine = Mine {
            memory: Memory::new(&making)?,
            habits: Mutex::new(habits),
            lost: Mutex::default(),
            told: Arc::default(),
        };
        Ok(Arc::new(Rogue { mine: Arc::new(mine) }))
    }

    /// From now on it has these habits.
    pub fn set_habits(&self, habits: Habits) {
        *lock(&self.mine.habits) = habits;
    }

    /// What it was told. Outlives it.
    pub fn told(&self) -> Arc<Told> {
        Arc::clone(&self.mine.told)
    }

    /// Requests that it has lost.
    pub fn lost(&self) -> usize {
        lock(&self.mine.lost).len()
    }

    /// Completes what it has lost; returns how many there were.
    pub fn release(&self) -> usize {
        let lost = std::mem::take(&mut *lock(&self.mine.lost));
        let count = lost.len();
        lost.into_iter().for_each(|(request, status)| request.complete(status));
        count
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Handler for Rogue {
    fn name(&self) -> &str {
        "rogue"
    }

    fn capabilities(&self, geometry: &appliance::Geometry) -> Capabilities {
        self.mine.memory.capabilities(geometry)
    }

    fn worker(&self, cx: WorkerCx) -> io::Result<Box<dyn Worker>> {
        let made = self.mine.told.made.fetch_add(1, Ordering::Relaxed);
        let seed = lock(&self.mine.habits).seed;
        Ok(Box::new(RogueWorker {
            mine: Arc::clone(&self.mine),
            rng: Rng::new(seed ^ (cx.index as u64) << 32 ^ made),
            held: Vec::new(),
        }))
    }

    fn resize(&self, num_blocks: u64) -> io::Result<()> {
        self.mine.memory.resize(num_blocks)
    }

    fn stop(&self) {
        self.mine.told.stopped.store(true, Ordering::Release);
    }
}

struct RogueWorker {
    mine: Arc<Mine>,
    rng: Rng,
    /// What it holds, with its status, until then.
    held: Vec<(Instant, Request, IoStatus)>,
}

impl RogueWorker {
    fn take(&mut self, mut request: Request, habits: &Habits, now: Instant) {
        let rng = &mut self.rng;
        let mut does = |one_in: u64| one_in > 0 && rng.one_in(one_in);
        let status = self.mine.memory.apply(&mut request);
        if does(habits.panic) {
            panic!("a habit");
        }
        if does(habits.lose) {
            return lock(&self.mine.lost).push((request, status));
        }
        if does(habits.leak) {
            return drop(request);
        }
        if does(habits.wrong_length) {
            let bytes = request.bufs().len() as u64 + 1;
            return request.complete_with(IoStatus::Success, bytes);
        }
        if does(habits.truncate) && request.bufs().len() > 1 {
            request.bufs_mut().truncate(1);
            return request.complete(IoStatus::Success);
        }
        if does(habits.fail) {
            return request.complete(IoStatus::Failed);
        }
        if does(habits.hold) {
            let until = now + Duration::from_nanos(self.rng.below(habits.hold_ns.max(1)));
            return self.held.push((until, request, status));
        }
        request.complete(status);
    }
}

impl Worker for RogueWorker {
    fn submit(&mut self, batch: &mut Batch) {
        let habits = *lock(&self.mine.habits);
        let now = batch.now();
        while !batch.is_empty() {
            if habits.refuse > 0 && self.rng.one_in(habits.refuse) {
                return;
            }
            let Some(request) = batch.next() else { return };
            self.mine.told.taken.fetch_add(1, Ordering::Relaxed);
            self.take(request, &habits, now);
        }
    }

    fn poll(&mut self, now: Instant) -> Progress {
        let due = self.held.iter().filter(|(until, ..)| *until <= now).count();
        for _ in 0..due {
            let due: Vec<usize> = (0..self.held.len()).filter(|&n| self.held[n].0 <= now).collect();
            let (_, request, status) = self.held.swap_remove(due[self.rng.below(due.len() as u64) as usize]);
            request.complete(status);
        }
        Progress::from_busy(due > 0)
    }

    fn deadline(&self) -> Option<Instant> {
        self.held.iter().map(|(until, ..)| *until).min()
    }

    fn abort(&mut self, request: RequestId) {
        self.mine.told.aborts.fetch_add(1, Ordering::Relaxed);
        if lock(&self.mine.habits).deaf {
            return;
        }
        if let Some(index) = self.held.iter().position(|(_, held, _)| held.id() == request) {
            self.held.swap_remove(index).1.complete(IoStatus::Aborted);
        }
    }

    fn reset(&mut self) {
        self.mine.told.resets.fetch_add(1, Ordering::Relaxed);
        if lock(&self.mine.habits).deaf {
            return;
        }
        for (_, request, _) in self.held.drain(..) {
            request.complete(IoStatus::Aborted);
        }
    }
}
