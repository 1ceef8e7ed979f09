//! What the author of a handler implements, and what the handler is lent.
//!
//! ```text
//! Handler::worker  --once a thread-->  Worker      submit -> poll -> may_sleep? -> sleep -> submit ...
//! Handler::inline  --once a reactor--> Inline      handle, on the reactor itself
//! ```
//!
//! A [`Handler`] is shared by all threads; a [`Worker`] belongs to one thread and is never moved. A panic in either costs
//! the requests that were in it (they fail) and the worker object (it is made again, at most once a second), and nothing
//! else.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::Arc;

use reactor::park::Waker;
use reactor::{Clock, Instant, Progress, ReactorId};
use serde_json::Value;

use crate::request::{Body, Request, RequestId};
use crate::types::{Geometry, OpKind, OpSet};

/// What a handler is told when it is made.
#[derive(Clone, Copy, Debug)]
pub struct Making<'a> {
    /// Name of the device.
    pub bdev: &'a str,
    /// Size and block size as they were asked for.
    pub geometry: Geometry,
    /// The handler's own options, as the RPC's caller gave them; an empty object when it gave none.
    pub options: &'a Value,
    /// Worker threads that will be started; 0: it is used inline.
    pub workers: usize,
}

/// What a handler can do by itself. What is missing is emulated where it can be, and refused where it cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Operations that reach the handler. Reads are never emulated. Without writes the device is read-only in effect.
    /// Compare, copy and write-zeroes are emulated by reads and writes; compare-and-write too, under a lock of its range
    /// across all reactors. A flush is answered without the handler when it is missing here, which is only allowed
    /// without a volatile cache. Resets never reach a handler as requests: see [`Worker::reset`].
    pub ops: OpSet,
    /// Completed writes may be lost before the next flush.
    pub volatile_cache: bool,
    /// Unmapped blocks read as zeroes.
    pub unmap_zeroes: bool,
    /// Blocks that one read or write may move; larger ones are split. 0: no limit.
    pub max_rw_blocks: u32,
}

impl Capabilities {
    /// Reads, writes and flushes, nothing else, with a volatile cache: what every store can do.
    pub const BASIC: Capabilities = Capabilities {
        ops: OpSet::of(&[OpKind::Read, OpKind::Write, OpKind::Flush]),
        volatile_cache: true,
        unmap_zeroes: false,
        max_rw_blocks: 0,
    };
}

/// Storage logic behind a device. Shared by all threads.
pub trait Handler: Send + Sync {
    /// What it is called in messages.
    fn name(&self) -> &str;

    /// What it does by itself on a device of this geometry. Asked once, when the device is made.
    fn capabilities(&self, geometry: &Geometry) -> Capabilities;

    /// Makes the part of it that lives on one worker thread. Called on that thread, and again after a panic.
    ///
    /// # Errors
    /// What the caller of `bdev_appliance_create` is told; after a panic it is logged, and tried again a second later.
    fn worker(&self, cx: WorkerCx) -> io::Result<Box<dyn Worker>>;

    /// Makes the part of it that runs on one reactor itself, for handlers that never block; `None`: it has no such form.
    /// Used when a device is made with `workers` 0.
    ///
    /// # Errors
    /// As [`Handler::worker`].
    fn inline(&self, reactor: ReactorId) -> Option<io::Result<Box<dyn Inline>>> {
        let _ = reactor;
        None
    }

    /// The device is to have `num_blocks` blocks. Called on a worker's thread (inline: on a thread of the control plane),
    /// while requests go on; it may block, but not for seconds. Growing: blocks from the old end on read as zeroes.
    /// Shrinking: what lay behind the new end is forgotten; requests from before may still reach behind it, and end as
    /// [`IoStatus::OutOfRange`](crate::IoStatus::OutOfRange). A store that keeps its data also keeps this: see
    /// [`Worker::resized`].
    ///
    /// # Errors
    /// The size stays, and the caller of `bdev_appliance_resize` is told.
    fn resize(&self, num_blocks: u64) -> io::Result<()>;

    /// Numbers of its own for `bdev_appliance_get_stats`. Called on any thread; must not block.
    fn stats(&self) -> Value {
        Value::Null
    }

    /// The device is gone and every [`Worker`] has been dropped: let go of files and devices. Called on the last worker's
    /// thread, before the handler itself is dropped.
    fn stop(&self) {}
}

/// The part of a handler that lives on one thread.
pub trait Worker {
    /// Takes requests. Those that are not taken from `batch` stay in it, in order, and are offered again in the next
    /// round.
    fn submit(&mut self, batch: &mut Batch);

    /// Does whatever else there is to do, without blocking. Called at every round of the thread's loop.
    fn poll(&mut self, now: Instant) -> Progress {
        let _ = now;
        Progress::Idle
    }

    /// When [`Worker::poll`] is to be called even if nothing wakes the thread.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// The thread is about to sleep; `false`: there is work. Whoever makes work for it from another thread publishes it and
    /// then calls [`Waker::wake`] of [`WorkerCx::waker`].
    fn may_sleep(&mut self) -> bool {
        true
    }

    /// A host wants `request` to end early, or its time is up. If it is held here, complete it as
    /// [`IoStatus::Aborted`](crate::IoStatus::Aborted); otherwise do nothing.
    fn abort(&mut self, request: RequestId) {
        let _ = request;
    }

    /// The device is being reset or removed: end early what can be ended. What has not come home 500 ms later is given
    /// up, and must not change the device's contents any more.
    fn reset(&mut self) {}

    /// For handlers that cannot change their size within [`Handler::resize`]: how the change that it has accepted has ended,
    /// once; `None`: it is under way. Worker 0 is asked in every round until it says, and only then does the caller of
    /// `bdev_appliance_resize` hear of it, and next comes another change. A worker that was made again after a panic is asked
    /// for what the one before it had not ended.
    fn resized(&mut self) -> Option<io::Result<()>> {
        Some(Ok(()))
    }
}

/// The part of a handler that runs on one reactor.
pub trait Inline {
    /// Does the request and completes it before returning. Must neither block nor keep the request: the reactor serves
    /// other devices and hosts too.
    fn handle(&mut self, request: Request);
}

/// Where a worker runs.
#[derive(Clone)]
pub struct WorkerCx {
    /// Which of the device's workers this is, from zero.
    pub index: usize,
    /// How many there are.
    pub workers: usize,
    /// Wakes the worker's thread.
    pub waker: Waker,
    /// The clock of deadlines.
    pub clock: Arc<dyn Clock>,
}

impl fmt::Debug for WorkerCx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerCx").field("index", &self.index).field("workers", &self.workers).finish_non_exhaustive()
    }
}

/// Requests offered to a worker, in the order of their submission. An iterator: what it yields is taken.
#[derive(Debug, Default)]
pub struct Batch {
    requests: VecDeque<Request>,
    now: Instant,
}

impl Batch {
    /// An empty batch with room for `capacity` requests.
    pub fn with_capacity(capacity: usize) -> Batch {
        Batch { requests: VecDeque::with_capacity(capacity), now: Instant(0) }
    }

    /// The instant at which this round began. Reading it costs nothing.
    #[inline]
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Requests in it.
    #[inline]
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// The next request, left where it is.
    pub fn peek(&self) -> Option<&Request> {
        self.requests.front()
    }

    /// Ends all of them with the same status.
    pub fn complete_all(&mut self, status: crate::IoStatus) {
        self.for_each(|request| request.complete(status));
    }

    /// Sets the instant of the round, for those who carry requests about.
    #[inline]
    pub fn begin(&mut self, now: Instant) {
        self.now = now;
    }

    /// Adds a request behind the others, for those who carry requests about.
    #[inline]
    pub fn push(&mut self, request: Request) {
        self.requests.push_back(request);
    }

    /// Takes out every request whose body `is_wanted`, for those who carry requests about.
    pub fn take_if(&mut self, is_wanted: impl Fn(&Body) -> bool) -> Vec<Request> {
        let mut taken = Vec::new();
        for _ in 0..self.requests.len() {
            match self.requests.pop_front() {
                Some(request) if is_wanted(request.body()) => taken.push(request),
                Some(request) => self.requests.push_back(request),
                None => break,
            }
        }
        taken
    }

    /// Takes the request of `id` out, wherever it is.
    pub fn remove(&mut self, id: RequestId) -> Option<Request> {
        let index = self.requests.iter().position(|request| request.id() == id)?;
        self.requests.remove(index)
    }
}

impl Iterator for Batch {
    type Item = Request;

    #[inline]
    fn next(&mut self) -> Option<Request> {
        self.requests.pop_front()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.requests.len(), Some(self.requests.len()))
    }
}
