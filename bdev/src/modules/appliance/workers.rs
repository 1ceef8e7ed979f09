//! Handlers on threads of their own.
//!
//! Each worker is a reactor beside the group, with one poller: it takes requests from the submission rings of all
//! reactors, gives them to its [`Worker`] in batches, and sleeps when there are none. Completions need no part of this:
//! they go home from whatever thread they happen on.
//!
//! ```text
//! reactor 0 --ring--+                    +--ring-- reactor 0        one ring a reactor and worker, with room for
//! reactor 1 --ring--+--> worker 0   worker 1 <--+-- reactor 1       everything that reactor may have out
//! ```
//!
//! # What ends a request without its handler
//! - It was picked up after its deadline: timed out; or from before a reset or the end of its channel: aborted.
//! - The handler panicked with it in hand: failed, by being dropped.
//!
//! # A panic
//! costs the worker object. It is made again, at most once a second; meanwhile requests wait in the ring for their
//! deadlines. What was offered but not taken is offered to the next.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use appliance::placement::Placer;
use appliance::request::{Body, Home, NO_LANE, drop_after_panic, lend_home, take_home};
use appliance::{Batch, Capabilities, Handler, IoStatus, Request, RequestId, Worker, WorkerCx};
use crossbeam_utils::CachePadded;
use futures_channel::oneshot;
use futures_util::future::{BoxFuture, Either, select};
use reactor::buffer::{prefetch_for_write, prefetch_value};
use reactor::park::Waker;
use reactor::reactor::{LoneReactor, PollPolicy};
use reactor::ring::{Consumer, Producer, ring};
use reactor::{Context, Instant, Poller, Progress, Schedule};
use serde_json::{Value, json};

use super::port::{Backend, Port, PortCx};
use super::settings::{Placement, Settings};
use crate::core::system::Executor;
use crate::core::{BdevError, BdevSystem};

/// How long a handler may take to make a worker, or to take note of a change of size.
const PATIENCE: Duration = Duration::from_secs(60);

/// The least time between two makings of a worker.
const RESTART_AFTER: Duration = Duration::from_secs(1);

/// Requests taken from one ring in one round.
const ROUND: usize = 64;

/// Requests to abort that may wait for a worker; more are not passed on.
const MAX_ABORTS: usize = 4096;

/// What the control plane and the channels want of a worker. Locked by nobody on the way of a request.
#[derive(Default)]
struct Control {
    connect: Vec<Link>,
    aborts: Vec<RequestId>,
    reset: bool,
    resize: Vec<(u64, oneshot::Sender<io::Result<()>>)>,
    stop: bool,
}

/// One worker as others see it.
#[derive(Default)]
struct Shared {
    /// Set before anybody else sees the worker.
    waker: OnceLock<Waker>,
    control: Mutex<Control>,
    /// There is something in `control`.
    called: AtomicBool,
    /// Its thread is gone.
    dead: AtomicBool,
    // The channels look at the above for each request, and the worker writes these in each round.
    counts: CachePadded<Counts>,
}

#[derive(Default)]
struct Counts {
    requests: AtomicU64,
    batches: AtomicU64,
    panics: AtomicU64,
}

impl Shared {
    /// Changes what is wanted of the worker, and has it look.
    fn call(&self, change: impl FnOnce(&mut Control)) {
        change(&mut self.control());
        self.called.store(true, Ordering::SeqCst);
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a channel and a worker share about the ring between them.
#[derive(Default)]
struct Tie {
    /// The channel is closed: nobody waits for what is in the ring.
    closed: AtomicBool,
    /// Requests below this were given up, or are about to be.
    cancelled_below: AtomicU64,
}

/// The worker's end of a ring.
struct Link {
    ring: Consumer<Request>,
    tie: Arc<Tie>,
    home: Arc<dyn Home>,
    lane: u32,
}

/// Counts the workers that are left, and tells those who wait for the last.
struct Ended {
    left: AtomicUsize,
    waiters: Mutex<Vec<oneshot::Sender<()>>>,
}

impl Ended {
    fn lock(&self) -> MutexGuard<'_, Vec<oneshot::Sender<()>>> {
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Names for messages.
#[derive(Clone)]
struct Names {
    bdev: Arc<str>,
    handler: Arc<str>,
}

/// A handler and its threads.
pub struct Workers {
    names: Names,
    capabilities: Capabilities,
    /// Taken when the device is gone: the last worker drops the handler.
    handler: Mutex<Option<Arc<dyn Handler>>>,
    workers: Vec<Arc<Shared>>,
    placement: Placement,
    /// Blocks that the device was made with.
    num_blocks: u64,
    ended: Arc<Ended>,
    // Not the whole bdev layer, which holds this through its device.
    executor: Arc<dyn Executor>,
}

impl Workers {
    /// Starts the workers of `handler`.
    ///
    /// # Errors
    /// [`BdevError::Host`] when a thread or a worker cannot be made, or takes a minute to.
    pub async fn start(
        system: &Arc<BdevSystem>,
        bdev: &str,
        handler: Arc<dyn Handler>,
        settings: &Settings,
    ) -> Result<Arc<Workers>, BdevError> {
        let count = settings.workers;
        let names = Names { bdev: bdev.into(), handler: handler.name().into() };
        let backend = Arc::new(Workers {
            names: names.clone(),
            capabilities: handler.capabilities(&settings.geometry),
            handler: Mutex::new(Some(Arc::clone(&handler))),
            workers: (0..count).map(|_| Arc::default()).collect(),
            placement: settings.placement,
            num_blocks: settings.geometry.num_blocks,
            ended: Arc::new(Ended { left: AtomicUsize::new(count), waiters: Mutex::default() }),
            executor: Arc::clone(system.executor()),
        });
        let mut ready = Vec::new();
        for (index, shared) in backend.workers.iter().enumerate() {
            let (tell, told) = oneshot::channel();
            let start = Start {
                names: names.clone(),
                handler: Arc::clone(&handler),
                shared: Arc::clone(shared),
                ended: Arc::clone(&backend.ended),
                index,
                count,
                tell,
            };
            let lone = LoneReactor {
                name: format!("app_{index}_{bdev}").chars().take(15).collect(),
                core: settings.cores.get(index % settings.cores.len().max(1)).copied(),
                policy: PollPolicy::Adaptive { spin: settings.spin },
                begin: Box::new(move |cx| start.run(cx)),
            };
            // One that was not started tells so by dropping its end.
            if let Err(error) = system.executor().start_reactor(lone, system.platform()) {
                tracing::error!(bdev, worker = index, %error, "no thread for a worker");
            }
            ready.push(told);
        }
        drop(handler);
        let all = futures_util::future::join_all(ready);
        let mut failure = None;
        match select(all, system.executor().sleep(PATIENCE)).await {
            Either::Left((results, _)) => {
                for result in results {
                    let gone = || Err(io::Error::other("the host has no thread for it"));
                    failure = failure.or(result.unwrap_or_else(|_| gone()).err());
                }
            }
            Either::Right(_) => {
                let text = format!("a worker was not made within {} s", PATIENCE.as_secs());
                failure = Some(io::Error::new(io::ErrorKind::TimedOut, text));
            }
        }
        match failure {
            None => Ok(backend),
            Some(error) => {
                backend.stop();
                Err(BdevError::host(format!("starting the workers of '{}' for '{bdev}'", names.handler), error))
            }
        }
    }

    fn handler(&self) -> Option<Arc<dyn Handler>> {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Backend for Workers {
    fn handler_name(&self) -> Arc<str> {
        Arc::clone(&self.names.handler)
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn open_port(&self, cx: &PortCx) -> io::Result<Box<dyn Port>> {
        let mut lanes = Vec::new();
        for shared in &self.workers {
            let waker = shared.waker.get().ok_or_else(|| io::Error::other("a worker is not running"))?.clone();
            let (producer, consumer) = ring(cx.queue_depth);
            let tie = Arc::new(Tie::default());
            let link = Link { ring: consumer, tie: Arc::clone(&tie), home: Arc::clone(&cx.home), lane: NO_LANE };
            shared.call(|control| control.connect.push(link));
            let staged = Vec::with_capacity(cx.queue_depth);
            lanes.push(Lane { ring: producer, tie, waker, shared: Arc::clone(shared), staged });
        }
        let placer = Placer::new(self.placement, lanes.len(), self.num_blocks, cx.reactor.0);
        Ok(Box::new(WorkersPort { lanes, placer }))
    }

    fn resize(&self, num_blocks: u64) -> BoxFuture<'static, Result<(), BdevError>> {
        let (tell, told) = oneshot::channel();
        self.workers[0].call(|control| control.resize.push((num_blocks, tell)));
        let sleep = self.executor.sleep(PATIENCE);
        let doing = format!("telling the handler '{}' of '{}' of its size", self.names.handler, self.names.bdev);
        Box::pin(async move {
            let result = match select(told, sleep).await {
                Either::Left((Ok(result), _)) => result,
                Either::Left((Err(_), _)) => Err(io::Error::other("its worker has stopped")),
                Either::Right(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "it does not answer")),
            };
            result.map_err(|error| match error.kind() {
                io::ErrorKind::InvalidInput => BdevError::invalid("num_blocks", num_blocks, error.to_string()),
                _ => BdevError::host(doing, error),
            })
        })
    }

    fn stats(&self) -> Value {
        let worker = |shared: &Arc<Shared>| {
            json!({
                "requests": shared.counts.requests.load(Ordering::Relaxed),
                "batches": shared.counts.batches.load(Ordering::Relaxed),
                "panics": shared.counts.panics.load(Ordering::Relaxed),
                "running": !shared.dead.load(Ordering::Relaxed),
            })
        };
        let own = self.handler().and_then(|handler| catch_unwind(AssertUnwindSafe(|| handler.stats())).ok());
        json!({ "workers": self.workers.iter().map(worker).collect::<Vec<_>>(), "handler": own })
    }

    fn stop(&self) {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.workers.iter().for_each(|shared| shared.call(|control| control.stop = true));
    }

    fn stopped(&self) -> BoxFuture<'static, ()> {
        let (tell, told) = oneshot::channel();
        let mut waiters = self.ended.lock();
        if self.ended.left.load(Ordering::Acquire) > 0 {
            waiters.push(tell);
        }
        Box::pin(async move {
            let _ = told.await;
        })
    }
}

/// One channel's rings to all workers.
struct WorkersPort {
    lanes: Vec<Lane>,
    placer: Placer,
}

/// The reactor's end of a ring.
struct Lane {
    ring: Producer<Request>,
    tie: Arc<Tie>,
    waker: Waker,
    shared: Arc<Shared>,
    /// Sent in this poll: they go into the ring one right behind the other, so that the two sides do not pull its memory
    /// back and forth for each.
    staged: Vec<Request>,
}

impl Port for WorkersPort {
    #[inline]
    fn send(&mut self, body: Box<Body>, _: Instant) -> Result<(), Box<Body>> {
        let index = self.placer.place(body.lba);
        let lane = &mut self.lanes[index];
        let request = Request::from_body(body);
        if lane.shared.dead.load(Ordering::Acquire) {
            // Said in the log when its thread ended.
            request.complete(IoStatus::Failed);
            return Ok(());
        }
        lane.staged.push(request);
        Ok(())
    }

    #[inline]
    fn flush(&mut self) {
        for lane in &mut self.lanes {
            if !lane.staged.is_empty() {
                // The ring has a place for every body of the channel.
                lane.ring.push_all(&mut lane.staged);
                lane.waker.wake_after_rmw();
            }
        }
    }

    fn abort(&mut self, request: RequestId) {
        // Which worker has it is not kept; the others find nothing.
        for lane in &self.lanes {
            lane.shared.call(|control| {
                if control.aborts.len() < MAX_ABORTS {
                    control.aborts.push(request);
                }
            });
        }
    }

    fn reset(&mut self, before: RequestId) {
        for lane in &self.lanes {
            lane.tie.cancelled_below.store(before.0, Ordering::Release);
            lane.shared.call(|control| control.reset = true);
        }
    }

    fn close(mut self: Box<Self>) {
        self.flush();
        for lane in self.lanes {
            lane.tie.closed.store(true, Ordering::Release);
            lane.shared.call(|_| {});
        }
    }
}

/// What a worker's thread begins with.
struct Start {
    names: Names,
    handler: Arc<dyn Handler>,
    shared: Arc<Shared>,
    ended: Arc<Ended>,
    index: usize,
    count: usize,
    tell: oneshot::Sender<io::Result<()>>,
}

impl Start {
    fn run(self, cx: io::Result<&mut Context>) {
        let cx = match cx {
            Ok(cx) => cx,
            Err(error) => {
                let _ = self.tell.send(Err(error));
                return self.shared.dead.store(true, Ordering::Release);
            }
        };
        let waker = cx.waker();
        let clock = cx.platform().clock();
        let worker_cx = WorkerCx { index: self.index, workers: self.count, waker: waker.clone(), clock };
        let mut poller = WorkerPoller {
            names: self.names,
            handler: Some(self.handler),
            shared: Arc::clone(&self.shared),
            ended: self.ended,
            cx: worker_cx,
            worker: None,
            restart_at: Instant(0),
            links: Vec::new(),
            picked: Vec::with_capacity(ROUND),
            batch: Batch::with_capacity(ROUND),
            resizes: VecDeque::new(),
            resizing: false,
        };
        let made = poller.make_worker(cx.now());
        // The other order would let a channel find the worker before it can be woken.
        let _ = self.shared.waker.set(waker);
        match &made {
            Ok(()) => drop(cx.add_poller("handler", Schedule::Active, Box::new(poller))),
            Err(_) => {
                poller.stop();
                cx.stop();
            }
        }
        // Whoever asked may have lost patience; it has asked the worker to stop then.
        let _ = self.tell.send(made);
    }
}

/// The loop of a worker.
struct WorkerPoller {
    names: Names,
    /// Until the worker is stopped.
    handler: Option<Arc<dyn Handler>>,
    shared: Arc<Shared>,
    ended: Arc<Ended>,
    cx: WorkerCx,
    worker: Option<Box<dyn Worker>>,
    /// When a worker that is gone may be made again.
    restart_at: Instant,
    links: Vec<Link>,
    /// Taken from a ring in this round and not looked at.
    picked: Vec<Request>,
    batch: Batch,
    /// Changes of size, in order. The handler has accepted the first, if `resizing`.
    resizes: VecDeque<(u64, oneshot::Sender<io::Result<()>>)>,
    resizing: bool,
}

impl WorkerPoller {
    fn make_worker(&mut self, now: Instant) -> io::Result<()> {
        self.restart_at = now + RESTART_AFTER;
        let Some(handler) = &self.handler else { return Err(io::Error::other("it was stopped")) };
        let cx = self.cx.clone();
        match catch_unwind(AssertUnwindSafe(|| handler.worker(cx))) {
            Ok(made) => self.worker = Some(made?),
            Err(panic) => return Err(io::Error::other(format!("the handler panicked: {}", message(&*panic)))),
        }
        Ok(())
    }

    /// The handler's code has panicked: its worker goes, and with it the requests that it holds.
    fn panicked(&mut self, panic: &(dyn Any + Send)) {
        self.shared.counts.panics.fetch_add(1, Ordering::Relaxed);
        tracing::error!(
            bdev = &*self.names.bdev,
            handler = &*self.names.handler,
            worker = self.cx.index,
            panic = message(panic),
            "a handler panicked: the requests in its hands fail, and its worker is made again"
        );
        let worker = self.worker.take();
        self.let_go(|| drop_after_panic(worker));
    }

    fn drop_worker(&mut self) {
        let worker = self.worker.take();
        self.let_go(|| drop(worker));
    }

    fn let_go(&self, of_worker: impl FnOnce()) {
        if catch_unwind(AssertUnwindSafe(of_worker)).is_err() {
            tracing::error!(bdev = &*self.names.bdev, handler = &*self.names.handler, "a handler panicked at its end");
        }
    }

    fn heed_control(&mut self, cx: &mut Context) {
        self.shared.called.store(false, Ordering::SeqCst);
        let Control { connect, aborts, reset, resize, stop } = std::mem::take(&mut *self.shared.control());
        for mut link in connect {
            link.lane = lend_home(&link.home);
            self.links.push(link);
        }
        if reset || !aborts.is_empty() {
            self.end_early(cx.now(), &aborts, reset);
        }
        // Whoever asks a handler that was stopped is told by the end of what it waits for.
        self.resizes.extend(resize);
        let mut index = 0;
        while index < self.links.len() {
            if stop || self.links[index].tie.closed.load(Ordering::Acquire) {
                let link = self.links.swap_remove(index);
                self.disconnect(link);
            } else {
                index += 1;
            }
        }
        if stop {
            self.stop();
            cx.stop();
        }
    }

    /// Goes on with changes of size; whether there was anything to do.
    fn step_resizes(&mut self) -> bool {
        let mut any = false;
        while let Some(&(num_blocks, _)) = self.resizes.front() {
            let (Some(handler), Some(worker)) = (&self.handler, &mut self.worker) else { break };
            let mut result = None;
            if !std::mem::replace(&mut self.resizing, true) {
                result = match catch_unwind(AssertUnwindSafe(|| handler.resize(num_blocks))) {
                    Ok(result) => result.err().map(Err),
                    Err(panic) => Some(Err(io::Error::other(format!("it panicked: {}", message(&*panic))))),
                };
            }
            if result.is_none() {
                match catch_unwind(AssertUnwindSafe(|| worker.resized())) {
                    Ok(ended) => result = ended,
                    // The next worker says how it has ended.
                    Err(panic) => self.panicked(&*panic),
                }
            }
            let Some(result) = result else { break };
            any = true;
            self.resizing = false;
            if let Some((_, tell)) = self.resizes.pop_front() {
                // Whoever lost patience has dropped the other end.
                let _ = tell.send(result);
            }
        }
        any
    }

    /// Ends what was offered and not taken, and asks the worker to end what it holds.
    fn end_early(&mut self, now: Instant, aborts: &[RequestId], reset: bool) {
        self.pick_up(now, usize::MAX);
        for request in aborts.iter().filter_map(|&id| self.batch.remove(id)) {
            request.complete(IoStatus::Aborted);
        }
        let links = &self.links;
        let is_cancelled = |body: &Body| {
            let link = links.iter().find(|link| link.lane == body.lane);
            link.is_some_and(|link| body.id.0 < link.tie.cancelled_below.load(Ordering::Acquire))
        };
        if reset {
            for request in self.batch.take_if(is_cancelled) {
                request.complete(IoStatus::Aborted);
            }
        }
        let Some(worker) = &mut self.worker else { return };
        let result = catch_unwind(AssertUnwindSafe(|| {
            aborts.iter().for_each(|&id| worker.abort(id));
            if reset {
                worker.reset();
            }
        }));
        if let Err(panic) = result {
            self.panicked(&*panic);
        }
    }

    /// Forgets a channel that is closed. Nobody waits for what is in its ring or was offered from it.
    fn disconnect(&mut self, mut link: Link) {
        while let Some(request) = link.ring.pop() {
            request.complete(IoStatus::Aborted);
        }
        for request in self.batch.take_if(|body| body.lane == link.lane) {
            request.complete(IoStatus::Aborted);
        }
        take_home(link.lane);
    }

    /// Takes requests from the rings, up to `round` from each.
    #[inline]
    fn pick_up(&mut self, now: Instant, round: usize) -> usize {
        let mut count = 0;
        let batch = &mut self.batch;
        for link in &mut self.links {
            let lane = link.lane;
            let cancelled_below = link.tie.cancelled_below.load(Ordering::Acquire);
            count += link.ring.pop_batch(round, |request| {
                // The reactor had it last; it is looked at when all have been taken.
                let body = request.body();
                prefetch_for_write(&body.id);
                prefetch_value(&body.bufs);
                self.picked.push(request);
            });
            for request in self.picked.drain(..) {
                let mut body = request.into_body();
                body.lane = lane;
                if body.sampled {
                    body.fixed.picked = now;
                }
                let (id, deadline) = (body.id, body.deadline);
                let request = Request::from_body(body);
                if id.0 < cancelled_below {
                    request.complete(IoStatus::Aborted);
                } else if deadline <= now {
                    request.complete(IoStatus::TimedOut);
                } else {
                    batch.push(request);
                }
            }
        }
        count
    }

    /// Lets go of the handler. The last worker ends it.
    fn stop(&mut self) {
        let Some(handler) = self.handler.take() else { return };
        self.resizes.clear();
        self.drop_worker();
        self.shared.dead.store(true, Ordering::Release);
        let links = std::mem::take(&mut self.links);
        links.into_iter().for_each(|link| self.disconnect(link));
        // What connected meanwhile is of a channel that will close; who waits for a change of size is told by the end of it.
        let Control { connect, .. } = std::mem::take(&mut *self.shared.control());
        connect.into_iter().for_each(|link| self.disconnect(link));
        let is_last = self.ended.left.fetch_sub(1, Ordering::AcqRel) == 1;
        if is_last && catch_unwind(AssertUnwindSafe(|| handler.stop())).is_err() {
            tracing::error!(
                bdev = &*self.names.bdev,
                handler = &*self.names.handler,
                "a handler panicked when stopped"
            );
        }
        if catch_unwind(AssertUnwindSafe(|| drop(handler))).is_err() {
            tracing::error!(bdev = &*self.names.bdev, handler = &*self.names.handler, "a handler panicked at its end");
        }
        if is_last {
            for waiter in self.ended.lock().drain(..) {
                // Whoever has lost patience is not there any more.
                let _ = waiter.send(());
            }
        }
    }
}

impl Poller for WorkerPoller {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        let now = cx.now();
        let mut busy = false;
        if self.shared.called.load(Ordering::Acquire) {
            self.heed_control(cx);
            busy = true;
        }
        if self.worker.is_none() {
            if self.handler.is_none() || now < self.restart_at {
                return Progress::from_busy(busy);
            }
            if let Err(error) = self.make_worker(now) {
                tracing::error!(
                    bdev = &*self.names.bdev,
                    handler = &*self.names.handler,
                    worker = self.cx.index,
                    %error,
                    "a worker cannot be made again; I/O waits for the next attempt, a second from now"
                );
                return Progress::Busy;
            }
        }
        if !self.resizes.is_empty() {
            // Before requests from behind the change.
            busy |= self.step_resizes();
        }
        if !self.batch.is_empty() {
            // The worker left these; their time may be up.
            for request in self.batch.take_if(|body| body.deadline <= now) {
                request.complete(IoStatus::TimedOut);
            }
        }
        let count = self.pick_up(now, ROUND);
        let Some(worker) = &mut self.worker else { return Progress::Busy };
        let batch = &mut self.batch;
        let offered = batch.len();
        batch.begin(now);
        let result = catch_unwind(AssertUnwindSafe(|| {
            if offered > 0 {
                worker.submit(batch);
            }
            worker.poll(now).is_busy()
        }));
        busy |= count > 0 || self.batch.len() < offered;
        if count > 0 {
            self.shared.counts.requests.fetch_add(count as u64, Ordering::Relaxed);
            self.shared.counts.batches.fetch_add(1, Ordering::Relaxed);
        }
        match result {
            Ok(polled) => busy |= polled,
            Err(panic) => self.panicked(&*panic),
        }
        Progress::from_busy(busy)
    }

    fn deadline(&self) -> Option<Instant> {
        match &self.worker {
            Some(worker) => worker.deadline(),
            None => self.handler.is_some().then_some(self.restart_at),
        }
    }

    fn may_sleep(&mut self, _: &mut Context) -> bool {
        let mut may = !self.shared.called.load(Ordering::SeqCst);
        // Without a worker what is in the rings waits for one.
        if let Some(worker) = &mut self.worker {
            may &= worker.may_sleep();
            may &= self.links.iter().all(|link| link.ring.is_empty());
        }
        may
    }
}

impl Drop for WorkerPoller {
    fn drop(&mut self) {
        if self.handler.is_none() {
            return;
        }
        if std::thread::panicking() {
            tracing::error!(
                bdev = &*self.names.bdev,
                handler = &*self.names.handler,
                worker = self.cx.index,
                "the thread of a worker has ended: its requests fail until the bdev is made again"
            );
        }
        self.stop();
    }
}

/// What a panic said.
pub(super) fn message(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "(no message)",
    }
}
