//! File I/O on a small pool of blocking threads, for hosts that refuse io_uring and for the few calls that it lacks.
//!
//! Requests are handed over in batches under one lock; results come home through a [`ring`](crate::ring). The ring has
//! as many slots as operations may be with the threads at once, and what exceeds that waits in front of the lock, in
//! order, so a completion always finds room. A [`Doorbell`] wakes the reactor: one system call a batch, none while the
//! last one has not been answered.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use slab::Slab;

use super::transfer::{self, Target};
use super::{ENGINE_TOKEN, Errno, File, FileDone, FileEngine, FileRequest, FileSlot};
use crate::park::{Parker, Source};
use crate::ring::{Bell, Consumer, Producer, ring};

/// Threads of one pool: enough for a disk to see some depth, few enough to have one a reactor.
pub const THREADS: usize = 4;
/// Operations that may be with the threads of one pool.
const DEPTH: usize = 1024;
/// How long a pool that is dropped waits for system calls that do not return.
pub(super) const DRAIN_TIME: Duration = Duration::from_secs(10);

/// Wakes a reactor that watches it under [`ENGINE_TOKEN`], at most once until it is answered.
pub(super) struct Doorbell {
    fd: OwnedFd,
    bell: Bell,
}

impl Doorbell {
    pub(super) fn new(parker: &mut dyn Parker) -> io::Result<Arc<Doorbell>> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        // The set is edge-triggered and each write is an edge, so the counter is never read; it would take centuries
        // to overflow.
        parker.watch(Source::Fd(fd.as_raw_fd()), ENGINE_TOKEN)?;
        Ok(Arc::new(Doorbell { fd, bell: Bell::default() }))
    }

    /// Call after publishing what the reactor is to find.
    pub(super) fn ring(&self) {
        self.bell.ring(|| {
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        });
    }

    /// Call before looking at what was published.
    pub(super) fn answer(&self) {
        self.bell.answer();
    }

    pub(super) fn raw_fd(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}

struct Job {
    target: Target,
    request: FileRequest,
}

/// A finished operation with the slot that it ran on.
pub(super) struct Finished {
    pub slot: FileSlot,
    pub done: FileDone,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    running: usize,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
    idle: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, home: &Producer<Finished>, doorbell: &Doorbell) {
        let mut iovecs = Vec::new();
        let mut queue = self.lock();
        loop {
            let Some(Job { target, mut request }) = queue.jobs.pop_front() else {
                if queue.closed {
                    return;
                }
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            queue.running += 1;
            drop(queue);
            let result = transfer::perform(&target, &mut request, &mut iovecs);
            // The file is let go of before the completion is seen: who detaches it then may close it at once.
            drop(target);
            let FileRequest { slot, payload, token, .. } = request;
            home.push(Finished { slot, done: FileDone { token, payload, result } });
            doorbell.ring();
            queue = self.lock();
            queue.running -= 1;
            if queue.closed && queue.running == 0 {
                self.idle.notify_all();
            }
        }
    }
}

/// The threads, the way to them and the way home.
pub(super) struct Workers {
    shared: Arc<Shared>,
    home: Consumer<Finished>,
    doorbell: Arc<Doorbell>,
    threads: Vec<JoinHandle<()>>,
    waiting: VecDeque<Job>,
    with_threads: usize,
}

impl Workers {
    pub(super) fn start(doorbell: Arc<Doorbell>) -> io::Result<Workers> {
        let shared =
            Arc::new(Shared { queue: Mutex::default(), changed: Condvar::default(), idle: Condvar::default() });
        let (producer, home) = ring(DEPTH);
        let mut workers =
            Workers { shared, home, doorbell, threads: Vec::new(), waiting: VecDeque::new(), with_threads: 0 };
        for n in 0..THREADS {
            let (shared, producer, doorbell) =
                (Arc::clone(&workers.shared), producer.clone(), Arc::clone(&workers.doorbell));
            let body = move || shared.work(&producer, &doorbell);
            workers.threads.push(std::thread::Builder::new().name(format!("file_io_{n}")).spawn(body)?);
        }
        Ok(workers)
    }

    pub(super) fn submit(&mut self, target: &Target, request: FileRequest) {
        self.waiting.push_back(Job { target: target.clone(), request });
    }

    pub(super) fn flush(&mut self) {
        let n = self.waiting.len().min(DEPTH - self.with_threads);
        if n == 0 {
            return;
        }
        self.with_threads += n;
        self.shared.lock().jobs.extend(self.waiting.drain(..n));
        if n == 1 { self.shared.changed.notify_one() } else { self.shared.changed.notify_all() }
    }

    pub(super) fn reap(&mut self, mut take: impl FnMut(Finished)) -> usize {
        let n = self.home.pop_batch(usize::MAX, &mut take);
        self.with_threads -= n;
        if n > 0 {
            self.flush();
        }
        n
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let abandoned = {
            let mut queue = self.shared.lock();
            queue.closed = true;
            std::mem::take(&mut queue.jobs)
        };
        self.shared.changed.notify_all();
        drop(abandoned);
        let queue = self.shared.lock();
        let waited = self.shared.idle.wait_timeout_while(queue, DRAIN_TIME, |queue| queue.running > 0);
        let (queue, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            // The threads own what they work on, so leaving them behind is safe.
            let count = queue.running;
            tracing::error!(count, "file operations did not return; their threads are left behind");
            return;
        }
        drop(queue);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// An engine's files, and how many operations each has under way.
#[derive(Default)]
pub(super) struct Attached {
    slots: Slab<(Target, usize)>,
}

impl Attached {
    pub(super) fn insert(&mut self, target: Target) -> FileSlot {
        FileSlot(u32::try_from(self.slots.insert((target, 0))).expect("fewer than 2^32 files are attached"))
    }

    pub(super) fn remove(&mut self, slot: FileSlot) -> Target {
        let (target, under_way) = &self.slots[slot.0 as usize];
        assert_eq!(*under_way, 0, "{}: detached with operations under way", target.file.path().display());
        self.slots.remove(slot.0 as usize).0
    }

    pub(super) fn begin(&mut self, slot: FileSlot) -> &Target {
        let (target, under_way) = &mut self.slots[slot.0 as usize];
        *under_way += 1;
        target
    }

    pub(super) fn get(&self, slot: FileSlot) -> &Target {
        &self.slots[slot.0 as usize].0
    }

    pub(super) fn end(&mut self, slot: FileSlot) {
        self.slots[slot.0 as usize].1 -= 1;
    }
}

/// A [`FileEngine`] of blocking threads.
pub struct ThreadEngine {
    workers: Workers,
    doorbell: Arc<Doorbell>,
    files: Attached,
    in_flight: usize,
}

impl ThreadEngine {
    /// Starts the threads; `parker` will report their completions under [`ENGINE_TOKEN`].
    ///
    /// # Errors
    /// When the host is out of threads or descriptors.
    pub fn new(parker: &mut dyn Parker) -> io::Result<ThreadEngine> {
        let doorbell = Doorbell::new(parker)?;
        let workers = Workers::start(Arc::clone(&doorbell))?;
        Ok(ThreadEngine { workers, doorbell, files: Attached::default(), in_flight: 0 })
    }
}

impl FileEngine for ThreadEngine {
    fn mode(&self) -> String {
        format!("{THREADS} threads")
    }

    fn attach(&mut self, file: Arc<dyn File>) -> io::Result<FileSlot> {
        Ok(self.files.insert(Target::new(file)?))
    }

    fn detach(&mut self, slot: FileSlot) {
        self.files.remove(slot);
    }

    fn submit(&mut self, request: FileRequest) {
        self.in_flight += 1;
        self.workers.submit(self.files.begin(request.slot), request);
    }

    fn flush(&mut self) {
        self.workers.flush();
    }

    fn reap(&mut self, out: &mut Vec<FileDone>) -> usize {
        self.doorbell.answer();
        let files = &mut self.files;
        let n = self.workers.reap(|finished| {
            files.end(finished.slot);
            out.push(finished.done);
        });
        self.in_flight -= n;
        n
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl fmt::Debug for ThreadEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadEngine").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

/// An operation that ends without the host having been asked.
pub(super) fn ended(request: FileRequest, result: Result<(), Errno>) -> FileDone {
    FileDone { token: request.token, payload: request.payload, result }
}
