//! A handler around another whose workers panic now and then, between any two calls.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use appliance::{Batch, Capabilities, Geometry, Handler, RequestId, Worker, WorkerCx};
use reactor::{Instant, Progress};
use serde_json::Value;

use super::rng::Rng;

/// The handler.
pub struct Panicky {
    inner: Arc<dyn Handler>,
    shared: Arc<Shared>,
}

struct Shared {
    one_in: AtomicU64,
    left: AtomicU64,
    rng: Mutex<Rng>,
}

impl Shared {
    fn habit(&self) {
        let (one_in, left) = (self.one_in.load(Ordering::Relaxed), self.left.load(Ordering::Relaxed));
        let may = one_in > 0 && left > 0;
        if may && self.rng.lock().unwrap_or_else(PoisonError::into_inner).one_in(one_in) {
            self.left.store(left - 1, Ordering::Relaxed);
            panic!("a habit");
        }
    }
}

impl Panicky {
    /// One around `inner` that behaves, until it is told otherwise. `seed` decides when it panics.
    pub fn new(inner: Arc<dyn Handler>, seed: u64) -> Arc<Panicky> {
        let rng = Mutex::new(Rng::new(seed));
        let shared = Shared { one_in: AtomicU64::new(0), left: AtomicU64::new(0), rng };
        Arc::new(Panicky { inner, shared: Arc::new(shared) })
    }

    /// From now on it panics `times` times, once in so many calls that have something to do.
    pub fn panic(&self, times: u64, one_in: u64) {
        self.shared.left.store(times, Ordering::Relaxed);
        self.shared.one_in.store(one_in, Ordering::Relaxed);
    }

    /// How often it still will.
    pub fn left(&self) -> u64 {
        self.shared.left.load(Ordering::Relaxed)
    }
}

impl Handler for Panicky {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn capabilities(&self, geometry: &Geometry) -> Capabilities {
        self.inner.capabilities(geometry)
    }

    fn worker(&self, cx: WorkerCx) -> io::Result<Box<dyn Worker>> {
        Ok(Box::new(PanickyWorker { inner: self.inner.worker(cx)?, shared: Arc::clone(&self.shared) }))
    }

    fn resize(&self, num_blocks: u64) -> io::Result<()> {
        self.inner.resize(num_blocks)
    }

    fn stats(&self) -> Value {
        self.inner.stats()
    }

    fn stop(&self) {
        self.inner.stop();
    }
}

struct PanickyWorker {
    inner: Box<dyn Worker>,
    shared: Arc<Shared>,
}

impl Worker for PanickyWorker {
    fn submit(&mut self, batch: &mut Batch) {
        self.shared.habit();
        self.inner.submit(batch);
        self.shared.habit();
    }

    fn poll(&mut self, now: Instant) -> Progress {
        let progress = self.inner.poll(now);
        if progress.is_busy() {
            self.shared.habit();
        }
        progress
    }

    fn deadline(&self) -> Option<Instant> {
        self.inner.deadline()
    }

    fn may_sleep(&mut self) -> bool {
        self.inner.may_sleep()
    }

    fn abort(&mut self, request: RequestId) {
        self.inner.abort(request);
        self.shared.habit();
    }

    fn reset(&mut self) {
        self.inner.reset();
        self.shared.habit();
    }

    fn resized(&mut self) -> Option<io::Result<()>> {
        self.shared.habit();
        self.inner.resized()
    }
}
