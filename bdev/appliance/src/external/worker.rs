//! One worker thread of an external process: takes requests out of shared memory, has them done, puts answers in.
//!
//! The thread is a reactor of its own with one poller. Requests are the same as in the target's process, and so is the way
//! home: a completion ring, which this thread empties into the shared one. So the shared ring has one producer, whatever
//! thread a request is completed on.
//!
//! A worker has rings of its own on every lane, and one doorbell, which all of the target's reactors ring.
//!
//! When the connection ends, lanes *drain*: the handler is told to give up what it has, answers are thrown away, and only
//! when every request has come home is the process ready for the next session. Otherwise a write of the last session could
//! overtake one of the next.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use reactor::park::Source;
use reactor::{Clock, Context, Instant, Poller, Progress, ReactorId, Schedule};
use rustix::net::RecvFlags;

use super::link::{Bell, Relay};
use super::memory::SharedWords;
use super::ring::{Consumer, Producer, Words, announce, must_ring, retract};
use crate::abi;
use crate::handler::{Batch, Handler, Worker, WorkerCx};
use crate::home::RingHome;
use crate::layout::{
    ABORTS_POSTED, COMPLETION_WORDS, Completed, NO_TIMEOUT, RESET_BEFORE, RESETS_POSTED, SUBMISSION_WORDS, Submission,
    TARGET_SLEEPS,
};
use crate::request::{Body, Fault, Home, NO_DEADLINE, Request, RequestId, lend_home, take_home};
use crate::types::{IoStatus, Op};

/// Until a worker that panicked is made again.
const REBIRTH: Duration = Duration::from_secs(1);

/// A lane as it comes from the target.
#[derive(Clone)]
pub(super) struct NewLane {
    pub(super) index: u32,
    pub(super) words: SharedWords,
    /// What wakes the target's reactor.
    pub(super) bell: Bell,
    pub(super) block_size: u32,
    pub(super) bdev: Arc<str>,
}

/// What a worker has in a session: its rings on all lanes, and what wakes it.
pub(super) struct Post {
    pub(super) worker: u32,
    pub(super) lanes: Vec<NewLane>,
    pub(super) heads: SharedWords,
    pub(super) bell: Hung,
}

/// What wakes a worker, where it hangs.
pub(super) enum Hung {
    /// One end of a pair of stream sockets.
    Socket(OwnedFd),
    /// Inside one process.
    Relay(Arc<Relay>),
}

/// What says that the worker sleeps, and what wakes it.
struct Ear {
    heads: SharedWords,
    flag: usize,
    bell: Hung,
    announced: bool,
    /// How often it was announced that the worker sleeps since the bell was emptied: each time it may have been rung once.
    announcements: u32,
}

/// Rings that a bell holds at most. A socket takes some more before it takes none, and one that takes none wakes nobody; what
/// is in it need not be read for the next ring to be heard.
const RINGS: u32 = 64;

impl Ear {
    fn new(cx: &mut Context, heads: SharedWords, flag: usize, bell: Hung) -> io::Result<Ear> {
        match &bell {
            Hung::Socket(fd) => cx.wake_by(Source::Fd(fd.as_raw_fd()))?,
            Hung::Relay(relay) => relay.set(Some(cx.waker())),
        }
        Ok(Ear { heads, flag, bell, announced: false, announcements: 0 })
    }

    fn close(self, cx: &mut Context) {
        match &self.bell {
            Hung::Socket(fd) => cx.unwake_by(Source::Fd(fd.as_raw_fd())),
            Hung::Relay(relay) => relay.set(None),
        }
    }

    fn empty(&self) {
        let Hung::Socket(fd) = &self.bell else { return };
        let mut bytes = [0u8; 2 * RINGS as usize];
        let len = bytes.len();
        while matches!(rustix::net::recv(fd, &mut bytes, RecvFlags::DONTWAIT), Ok((_, got)) if got == len) {}
    }

    fn announce(&mut self) {
        if self.announcements == RINGS {
            self.announcements = 0;
            self.empty();
        }
        self.announcements += 1;
        announce(&self.heads, self.flag);
        self.announced = true;
    }

    fn awake(&mut self) {
        if std::mem::take(&mut self.announced) {
            retract(&self.heads, self.flag);
        }
    }
}

/// A worker's part of a lane that is served, or that drains.
struct Lane {
    new: NewLane,
    submissions: Consumer<{ SUBMISSION_WORDS - 1 }>,
    completions: Producer<{ COMPLETION_WORDS - 1 }>,
    home: Arc<RingHome>,
    ended: reactor::ring::Consumer<Box<Body>>,
    /// Bodies that are not out, by slot; made when a slot is first used.
    bodies: Vec<Option<Box<Body>>>,
    /// Ids of the requests that are out, by slot; 0: none.
    out: Vec<u64>,
    count: usize,
    home_lane: u32,
    clock: Arc<dyn Clock>,
    draining: bool,
    aborts_seen: u64,
    resets_seen: u64,
}

impl Lane {
    fn new(new: NewLane, worker: u32, handler: &str, cx: &mut Context) -> Lane {
        let shape = *new.words.memory().shape();
        let depth = shape.depth();
        let clock = cx.platform().clock();
        let names = (Arc::clone(&new.bdev), Arc::from(handler));
        let (home, ended) = RingHome::new(depth as usize, cx.waker(), Arc::clone(&clock), names.0, names.1);
        let dynamic: Arc<dyn Home> = Arc::clone(&home) as _;
        Lane {
            submissions: Consumer::new(shape.submissions(worker), depth),
            completions: Producer::new(shape.completions(worker), depth),
            bodies: (0..depth).map(|_| None).collect(),
            out: vec![0; depth as usize],
            count: 0,
            home,
            ended,
            home_lane: lend_home(&dynamic),
            clock,
            draining: false,
            aborts_seen: 0,
            resets_seen: 0,
            new,
        }
    }

    /// Takes what the target has submitted.
    fn take(&mut self, now: Instant, batch: &mut Batch) -> bool {
        let mut busy = false;
        for _ in 0..self.bodies.len() {
            let Some(words) = self.submissions.pop(&self.new.words) else { break };
            busy = true;
            let submission = Submission::decode(words);
            match self.request(&submission, now) {
                Some(request) => batch.push(request),
                None => tracing::error!(bdev = &*self.new.bdev, "the target sent what is no request: {submission:?}"),
            }
        }
        busy
    }

    fn request(&mut self, submission: &Submission, now: Instant) -> Option<Request> {
        let op = abi::decode_op(submission.op, submission.flags, submission.source_lba)?;
        let memory = self.new.words.memory();
        if submission.bytes > memory.shape().slot_bytes() {
            return None;
        }
        let slot = usize::from(submission.slot);
        if *self.out.get(slot)? != 0 {
            return None;
        }
        let mut body = self.bodies[slot].take().unwrap_or_else(|| self.blank(submission.slot));
        body.id = RequestId(submission.id);
        body.op = op;
        body.lba = submission.lba;
        body.blocks = submission.blocks;
        body.payload_bytes = submission.bytes;
        body.status = IoStatus::Success;
        body.sampled = submission.measured;
        if body.sampled {
            // By the clock: this round may have begun before the request was submitted.
            body.fixed.picked = self.clock.now();
            let picked_word = memory.shape().picked_word(submission.slot.into());
            self.new.words.store(picked_word, self.clock.origin_ns() + body.fixed.picked.0, Ordering::Relaxed);
        }
        body.deadline = match submission.timeout_ns {
            NO_TIMEOUT => NO_DEADLINE,
            timeout_ns => Instant(now.0.saturating_add(timeout_ns).min(NO_DEADLINE.0 - 1)),
        };
        if submission.bytes > 0 {
            body.bufs.push(memory.lend(self.new.index, submission.slot.into(), submission.bytes as usize));
        }
        self.out[slot] = submission.id;
        self.count += 1;
        Some(Request::from_body(body))
    }

    #[cold]
    fn blank(&self, slot: u16) -> Box<Body> {
        let home: Arc<dyn Home> = Arc::clone(&self.home) as _;
        let mut body = Body::blank(slot.into(), ReactorId(self.new.index), self.new.block_size, home);
        body.lane = self.home_lane;
        body
    }

    /// Answers what has come home.
    fn answer(&mut self) -> bool {
        let mut busy = false;
        while let Some(mut body) = self.ended.pop() {
            busy = true;
            self.count -= 1;
            let slot = body.slot;
            if !self.draining {
                self.publish(&mut body);
            }
            body.bufs = reactor::Buffers::new();
            self.out[slot as usize] = 0;
            self.bodies[slot as usize] = Some(body);
        }
        if busy && !self.draining && must_ring(&self.new.words, TARGET_SLEEPS) {
            self.new.bell.ring();
        }
        busy
    }

    fn publish(&mut self, body: &mut Body) {
        let len = body.bufs.len();
        if body.status.is_success() && len != body.payload_bytes as usize {
            self.home.report(body, Fault::WrongLength { said_bytes: len as u64 });
            body.status = IoStatus::Failed;
        }
        if body.status.is_success() && body.op == Op::Read {
            // A handler may have put another buffer in the place of the one that was lent.
            let memory = self.new.words.memory();
            let lent = memory.lend(self.new.index, body.slot, len);
            if body.bufs.segment_count() != 1 || body.bufs.slice_at(0).as_ptr() != lent.as_ptr() {
                memory.copy_in(self.new.index, body.slot, body.bufs.segments());
            }
        }
        let completed = Completed {
            id: body.id.0,
            slot: body.slot as u16,
            status: abi::encode_status(body.status),
            bytes: body.payload_bytes,
            done_ns: if body.sampled { self.clock.origin_ns() + body.fixed.done.0 } else { 0 },
        };
        self.completions.push(&self.new.words, completed.encode());
    }

    /// Requests that are out and that the target wants back.
    fn aborted(&self) -> Vec<RequestId> {
        let shape = *self.new.words.memory().shape();
        let wanted = |slot: u32| self.new.words.load(shape.abort_word(slot), Ordering::Acquire);
        let out = (0..shape.depth()).filter(|&slot| self.out[slot as usize] != 0);
        out.filter(|&slot| wanted(slot) == self.out[slot as usize])
            .map(|slot| RequestId(self.out[slot as usize]))
            .collect()
    }

    /// Whether there is nothing to do for it. While the lane is served, asked after the worker has announced its sleep.
    fn may_sleep(&self) -> bool {
        self.ended.is_empty()
            && (self.draining
                || self.submissions.is_empty(&self.new.words)
                    && self.new.words.load(ABORTS_POSTED, Ordering::Acquire) == self.aborts_seen
                    && self.new.words.load(RESETS_POSTED, Ordering::Acquire) == self.resets_seen)
    }
}

/// What a worker's thread holds.
pub(super) struct Shell {
    handler: Arc<dyn Handler>,
    cx: WorkerCx,
    worker: Option<Box<dyn Worker>>,
    reborn_at: Option<Instant>,
    ear: Option<Ear>,
    lanes: Vec<Lane>,
    batch: Batch,
    /// Told when the last draining lane is empty.
    drained: Option<Sender<()>>,
    /// Set when it has to stop where it is, as one whose process is killed; only inside one process.
    killed: Option<Arc<AtomicBool>>,
}

impl Shell {
    /// Makes the worker on this reactor, and the poller that runs it: until `killed`, if there is such a thing.
    pub(super) fn install(
        cx: &mut Context,
        handler: Arc<dyn Handler>,
        index: usize,
        workers: usize,
        killed: Option<Arc<AtomicBool>>,
    ) -> io::Result<()> {
        let worker_cx = WorkerCx { index, workers, waker: cx.waker(), clock: cx.platform().clock() };
        let worker = guarded(|| handler.worker(worker_cx.clone()))
            .unwrap_or_else(|| Err(io::Error::other("the handler panicked while it made its worker")))?;
        let shell = Shell {
            handler,
            cx: worker_cx,
            worker: Some(worker),
            reborn_at: None,
            ear: None,
            lanes: Vec::new(),
            batch: Batch::with_capacity(crate::layout::MAX_DEPTH as usize),
            drained: None,
            killed,
        };
        let shell = cx.insert(RefCell::new(shell));
        cx.add_poller(format!("worker {index}"), Schedule::Active, Box::new(ShellPoller(shell)));
        Ok(())
    }

    /// The shell on this reactor.
    pub(super) fn of(cx: &mut Context) -> Rc<RefCell<Shell>> {
        cx.get::<RefCell<Shell>>().expect("a worker's reactor has its shell")
    }

    /// Takes its post in a session.
    pub(super) fn attach(&mut self, cx: &mut Context, post: Post) -> io::Result<()> {
        let flag = post.heads.memory().shape().worker_sleeps(post.worker);
        self.ear = Some(Ear::new(cx, post.heads, flag, post.bell)?);
        for new in post.lanes {
            self.lanes.push(Lane::new(new, post.worker, self.handler.name(), cx));
        }
        Ok(())
    }

    /// The session has ended: nothing is taken or answered any more. `drained` is told when the handler has let go of all
    /// requests.
    pub(super) fn detach(&mut self, cx: &mut Context, drained: Sender<()>) {
        if let Some(ear) = self.ear.take() {
            ear.close(cx);
        }
        for lane in &mut self.lanes {
            lane.draining = true;
        }
        self.batch.complete_all(IoStatus::Aborted);
        self.run(|worker, _| worker.reset());
        self.drained = Some(drained);
        self.finish_draining();
    }

    fn finish_draining(&mut self) {
        if self.drained.is_none() {
            return;
        }
        for lane in &mut self.lanes {
            lane.answer();
        }
        if self.lanes.iter().any(|lane| lane.count > 0) {
            return;
        }
        for lane in self.lanes.drain(..) {
            take_home(lane.home_lane);
            lane.home.close(lane.ended);
        }
        if let Some(drained) = self.drained.take() {
            let _ = drained.send(());
        }
    }

    /// Calls the worker, if there is one. A panic ends it.
    fn run<R>(&mut self, call: impl FnOnce(&mut dyn Worker, &mut Batch) -> R) -> Option<R> {
        let worker = self.worker.as_mut()?;
        let batch = &mut self.batch;
        let result = guarded(|| call(&mut **worker, batch));
        if result.is_none() {
            tracing::error!(
                handler = self.handler.name(),
                "a worker panicked: what it held fails; it is made again in 1 s"
            );
            let worker = self.worker.take();
            // What its own end does is its own matter as long as it stays there.
            guarded(|| drop(worker));
            self.reborn_at = Some(self.cx.clock.now() + REBIRTH);
        }
        result
    }

    fn revive(&mut self, now: Instant) {
        if self.reborn_at.is_none_or(|at| at > now) {
            return;
        }
        self.reborn_at = None;
        match guarded(|| self.handler.worker(self.cx.clone())) {
            Some(Ok(worker)) => self.worker = Some(worker),
            Some(Err(error)) => {
                tracing::error!(
                    handler = self.handler.name(),
                    "a worker cannot be made again: {error}; tried again in 1 s"
                );
                self.reborn_at = Some(now + REBIRTH);
            }
            None => self.reborn_at = Some(now + REBIRTH),
        }
    }

    fn poll(&mut self, now: Instant) -> bool {
        self.revive(now);
        let mut busy = false;
        if let Some(ear) = &mut self.ear {
            ear.awake();
        }
        for index in 0..self.lanes.len() {
            let lane = &mut self.lanes[index];
            if lane.draining {
                continue;
            }
            // Read before the submissions, so that a request is there when its abort is.
            let aborts = lane.new.words.load(ABORTS_POSTED, Ordering::Acquire);
            let resets = lane.new.words.load(RESETS_POSTED, Ordering::Acquire);
            busy |= lane.take(now, &mut self.batch);
            if aborts != lane.aborts_seen {
                lane.aborts_seen = aborts;
                let wanted = lane.aborted();
                busy = true;
                wanted.into_iter().for_each(|id| self.abort(id));
            }
            let lane = &mut self.lanes[index];
            if resets != lane.resets_seen {
                lane.resets_seen = resets;
                busy = true;
                let before = lane.new.words.load(RESET_BEFORE, Ordering::Acquire);
                let ids: Vec<_> = lane.out.iter().copied().filter(|&id| id != 0 && id < before).collect();
                for request in ids.into_iter().filter_map(|id| self.batch.remove(RequestId(id))) {
                    request.complete(IoStatus::Aborted);
                }
                self.run(|worker, _| worker.reset());
            }
        }
        if !self.batch.is_empty() {
            self.batch.begin(now);
            self.run(|worker, batch| worker.submit(batch));
        }
        busy |= self.run(|worker, _| worker.poll(now)).is_some_and(Progress::is_busy);
        for lane in &mut self.lanes {
            busy |= lane.answer();
        }
        self.finish_draining();
        busy
    }

    fn abort(&mut self, id: RequestId) {
        match self.batch.remove(id) {
            Some(request) => request.complete(IoStatus::Aborted),
            None => {
                self.run(|worker, _| worker.abort(id));
            }
        }
    }

    fn is_killed(&self) -> bool {
        self.killed.as_ref().is_some_and(|killed| killed.load(Ordering::Acquire))
    }

    /// Ends the worker. Requests that it held are reported as lost.
    pub(super) fn end(&mut self) {
        let worker = self.worker.take();
        guarded(|| drop(worker));
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        self.end();
        self.batch.complete_all(IoStatus::Aborted);
        for lane in self.lanes.drain(..) {
            take_home(lane.home_lane);
            lane.home.close(lane.ended);
        }
    }
}

/// Calls user code; `None` when it panicked. The panic itself has been reported by the panic hook.
fn guarded<R>(call: impl FnOnce() -> R) -> Option<R> {
    catch_unwind(AssertUnwindSafe(call)).ok()
}

struct ShellPoller(Rc<RefCell<Shell>>);

impl Poller for ShellPoller {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        if self.0.borrow().is_killed() {
            cx.stop();
            return Progress::Busy;
        }
        Progress::from_busy(self.0.borrow_mut().poll(cx.now()))
    }

    fn deadline(&self) -> Option<Instant> {
        let shell = self.0.borrow();
        let worker = shell.worker.as_ref().and_then(|worker| worker.deadline());
        worker.into_iter().chain(shell.reborn_at).min()
    }

    fn may_sleep(&mut self, _: &mut Context) -> bool {
        let shell = &mut *self.0.borrow_mut();
        if shell.is_killed() {
            return false;
        }
        if let Some(ear) = &mut shell.ear {
            ear.announce();
        }
        shell.lanes.iter().all(Lane::may_sleep) && shell.run(|worker, _| worker.may_sleep()).unwrap_or(true)
    }
}
