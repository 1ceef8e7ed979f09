//! A reactor's way to the external process: what a channel of the device gives its requests to.
//!
//! A [`Lane`] holds every body that was given to it until the process has answered, and only then hands it back: the
//! payload stays the target's own memory and is copied, so whatever the process does, or leaves undone, the request can
//! still be answered, or given to the next process.
//!
//! # What the process can do to it
//! All that is read from shared memory is one completion at a time, copied once. Its slot must be one that exists and its
//! id that of the request that is outstanding there; its status must be one there is; its length that of the payload.
//! What does not fit is counted and said in the log, and changes nothing (id, slot) or fails that request (status,
//! length). A process that answers before it has done anything, or writes into the payload of others, falsifies its own
//! data and nothing else. In one call at most `max` completions are looked at, and no ring is always the first.
//!
//! The instants at which the process says that it took and completed a request must lie in that order between the
//! request's submission and now. Otherwise the whole time counts as spent in the handler, and that is counted.
//!
//! # When the process goes
//! With [`OnDisconnect::Fail`] what is outstanding fails, and so does what comes, until a process is there. With
//! [`OnDisconnect::Park`] it waits, at most until its deadline, and the next process gets it: what was outstanding first,
//! in the order in which it was submitted, then what came since. The process before may have done some of that already;
//! doing it again is harmless because none of it was answered, so nothing that depends on it has been submitted.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use reactor::Instant;
use reactor::park::Waker;

use super::memory::SharedWords;
use super::ring::{Words, announce, must_ring, retract};
use super::session::{Ends, Session};
use super::target::{Inner, OnDisconnect, Target};
use crate::abi;
use crate::layout::{ABORTS_POSTED, Completed, NO_TIMEOUT, RESET_BEFORE, RESETS_POSTED, Submission, TARGET_SLEEPS};
use crate::placement::Placer;
use crate::request::{Body, Fault, NO_DEADLINE, RequestId};
use crate::types::{IoStatus, Op};

/// A request that the process has.
struct Held {
    body: Box<Body>,
    /// The worker that it was given to.
    worker: usize,
    /// Requests are submitted in this order.
    order: u64,
    /// The device wants it back.
    aborted: bool,
}

struct Attached {
    session: Arc<Session>,
    heads: SharedWords,
    words: SharedWords,
    /// By worker.
    ends: Vec<Ends>,
}

/// One reactor's end. Lives on the reactor.
pub struct Lane {
    target: Arc<Inner>,
    index: u32,
    /// By the slot of the body, which is also the slot of its payload.
    slots: Vec<Option<Held>>,
    outstanding: usize,
    /// For a process; in order. Only while there is none.
    waiting: VecDeque<Box<Body>>,
    /// Ended without the process; to be handed out.
    ended: VecDeque<Box<Body>>,
    attached: Option<Attached>,
    placer: Placer,
    /// The worker whose answers are looked at first.
    first: usize,
    order: u64,
    /// Workers that were told something since their doorbells were last considered, a bit each.
    unrung: u64,
    /// Requests submitted to each since then.
    fresh: Vec<u64>,
    announced: bool,
}

impl Lane {
    /// Opens the lane `index` of `target` on the reactor behind `waker`.
    ///
    /// # Errors
    /// When there is no such lane, or it is open already.
    pub fn open(target: &Target, index: u32, waker: Waker) -> io::Result<Lane> {
        let target = Arc::clone(target.inner());
        if index >= target.shape().lanes() || !target.open_lane(index, waker) {
            return Err(io::Error::other(format!("lane {index} of '{}' is not to be had", target.bdev())));
        }
        let slots = (0..target.shape().depth()).map(|_| None).collect();
        let (placer, fresh) = (target.placer(index), vec![0; target.shape().workers() as usize]);
        Ok(Lane {
            target,
            index,
            slots,
            outstanding: 0,
            waiting: VecDeque::new(),
            ended: VecDeque::new(),
            attached: None,
            placer,
            first: 0,
            order: 0,
            unrung: 0,
            fresh,
            announced: false,
        })
    }

    /// Takes a request. It comes back through [`Lane::drain`].
    pub fn send(&mut self, body: Box<Body>, now: Instant) {
        if self.attached.is_none() && self.target.lane(self.index).has_changed() {
            // The channel has just been opened, and there was a process before it.
            self.change(now);
        }
        if self.attached.is_some() {
            return self.submit(body, now);
        }
        match self.target.policy() {
            OnDisconnect::Park => self.waiting.push_back(body),
            OnDisconnect::Fail => self.end(body, IoStatus::Failed),
        }
    }

    fn end(&mut self, mut body: Box<Body>, status: IoStatus) {
        body.status = status;
        self.ended.push_back(body);
    }

    /// Gives a request to the process.
    fn submit(&mut self, body: Box<Body>, now: Instant) {
        let attached = self.attached.as_mut().expect("requests are submitted to a process that is there");
        let shape = *attached.words.memory().shape();
        let fits = self.slots.get(body.slot as usize).is_some_and(Option::is_none)
            && body.payload_bytes as usize == body.bufs.len()
            && body.payload_bytes <= shape.slot_bytes();
        if !fits {
            let (slot, bytes) = (body.slot, body.payload_bytes);
            tracing::error!(bdev = self.target.bdev(), slot, bytes, "{body:?} does not fit its slot; it fails");
            return self.end(body, IoStatus::Failed);
        }
        if matches!(body.op, Op::Write { .. } | Op::Compare | Op::CompareAndWrite { .. }) {
            attached.words.memory().copy_in(self.index, body.slot, body.bufs.segments());
        }
        let (op, flags, source_lba) = abi::encode_op(body.op);
        let timeout_ns = match body.deadline {
            NO_DEADLINE => NO_TIMEOUT,
            deadline => deadline.nanos_since(now),
        };
        let submission = Submission {
            id: body.id.0,
            op,
            flags,
            slot: body.slot as u16,
            bytes: body.payload_bytes,
            lba: body.lba,
            blocks: body.blocks,
            timeout_ns,
            source_lba,
            measured: body.sampled,
        };
        let worker = self.placer.place(body.lba);
        attached.ends[worker].submissions.push(&attached.words, submission.encode());
        self.order += 1;
        self.outstanding += 1;
        self.unrung |= 1 << worker;
        self.fresh[worker] += 1;
        let slot = body.slot as usize;
        self.slots[slot] = Some(Held { body, worker, order: self.order, aborted: false });
    }

    /// Wakes those workers of the process that something was submitted to since, and that sleep. Call once a poll.
    #[inline]
    pub fn flush(&mut self) {
        let mut unrung = std::mem::take(&mut self.unrung);
        let Some(attached) = &self.attached else { return };
        while unrung != 0 {
            let worker = unrung.trailing_zeros();
            unrung &= unrung - 1;
            self.target.count_requests(worker as usize, std::mem::take(&mut self.fresh[worker as usize]));
            if must_ring(&attached.heads, self.target.shape().worker_sleeps(worker)) {
                attached.session.ring(worker as usize);
            }
        }
    }

    /// Hands requests that have ended to `take`, with their status in them; at most `max` answers of the process. Returns
    /// how many.
    pub fn drain(&mut self, now: Instant, max: usize, mut take: impl FnMut(Box<Body>)) -> usize {
        if self.target.lane(self.index).has_changed() {
            self.change(now);
        }
        let mut count = 0;
        while let Some(body) = self.ended.pop_front() {
            take(body);
            count += 1;
        }
        let (workers, mut left) = (self.workers(), max);
        for n in 0..workers {
            let worker = (self.first + n) % workers;
            while left > 0
                && let Some(done) = self.pop(worker)
            {
                left -= 1;
                if let Some(body) = self.completed(done, now) {
                    take(body);
                    count += 1;
                }
            }
        }
        if left < max {
            self.first = (self.first + 1) % workers;
        }
        count
    }

    fn workers(&self) -> usize {
        self.target.shape().workers() as usize
    }

    fn pop(&mut self, worker: usize) -> Option<Completed> {
        let attached = self.attached.as_mut()?;
        attached.ends[worker].completions.pop(&attached.words).map(Completed::decode)
    }

    /// The request that `done` answers, if it answers one.
    fn completed(&mut self, done: Completed, now: Instant) -> Option<Box<Body>> {
        let slot = self.slots.get_mut(usize::from(done.slot));
        let Some(held) = slot.and_then(|slot| slot.take_if(|held| held.body.id.0 == done.id)) else {
            self.target
                .lied(now, || format!("answered request {} in slot {}, which is not outstanding", done.id, done.slot));
            return None;
        };
        self.outstanding -= 1;
        let mut body = held.body;
        body.status = match abi::decode_status(done.status) {
            Some(status) => status,
            None => {
                self.target.lied(now, || format!("answered {body:?} with status {}, which there is not", done.status));
                IoStatus::Failed
            }
        };
        if body.sampled {
            self.stamp(&mut body, &done);
        }
        if body.status.is_success() && done.bytes != body.payload_bytes {
            body.fixed.home.report(&body, Fault::WrongLength { said_bytes: done.bytes.into() });
            self.target.count_lie();
            body.status = IoStatus::Failed;
        }
        if body.status.is_success() && body.op == Op::Read {
            let attached = self.attached.as_ref().expect("answers come from a process that is there");
            attached.words.memory().copy_out(self.index, u32::from(done.slot), body.bufs.segments_mut());
        }
        Some(body)
    }

    /// Takes over when the process says that it had a request, if that can be.
    fn stamp(&self, body: &mut Body, done: &Completed) {
        let attached = self.attached.as_ref().expect("answers come from a process that is there");
        let picked_word = attached.words.memory().shape().picked_word(done.slot.into());
        let picked_ns = attached.words.load(picked_word, Ordering::Relaxed);
        // Later than the poll's instant: the answer may have come after that.
        let (now, origin_ns) = (self.target.now(), self.target.origin_ns());
        let instant = |ns: u64| ns.checked_sub(origin_ns).map(Instant);
        match (instant(picked_ns), instant(done.done_ns)) {
            (Some(picked), Some(done)) if body.fixed.sent <= picked && picked <= done && done <= now => {
                (body.fixed.picked, body.fixed.done) = (picked, done);
            }
            _ => {
                (body.fixed.picked, body.fixed.done) = (body.fixed.sent, now);
                self.target.refuse_stamps(now, body);
            }
        }
    }

    /// A process has come or gone.
    #[cold]
    fn change(&mut self, now: Instant) {
        let next = self.target.lane(self.index).session();
        let same = match (&self.attached, &next) {
            (Some(attached), Some(next)) => Arc::ptr_eq(&attached.session, next),
            (None, None) => true,
            _ => false,
        };
        if same {
            return;
        }
        // What it answered before its end counts.
        for worker in 0..self.workers() {
            for _ in 0..self.slots.len() {
                let Some(done) = self.pop(worker) else { break };
                let answered = self.completed(done, now);
                self.ended.extend(answered);
            }
        }
        if self.attached.take().is_some() {
            self.take_back(now);
        }
        let Some(session) = next else { return };
        // A session that another channel of this lane still has is that channel's until it closes.
        let Some(ends) = session.take_ends(self.index) else { return };
        let (heads, words) = (session.memory.heads(), session.memory.lane(self.index));
        self.attached = Some(Attached { session, heads, words, ends });
        for body in std::mem::take(&mut self.waiting) {
            if body.deadline <= now {
                self.end(body, IoStatus::TimedOut);
            } else {
                self.target.count_replayed();
                self.submit(body, now);
            }
        }
        self.flush();
    }

    /// Takes what the process that is gone had, in the order of its submission.
    fn take_back(&mut self, now: Instant) {
        let mut held: Vec<_> = self.slots.iter_mut().filter_map(Option::take).collect();
        held.sort_unstable_by_key(|held| held.order);
        self.outstanding = 0;
        debug_assert!(self.waiting.is_empty(), "nothing waits while a process is there");
        for Held { body, aborted, .. } in held {
            if aborted {
                self.end(body, IoStatus::Aborted);
            } else if body.deadline <= now {
                self.end(body, IoStatus::TimedOut);
            } else {
                match self.target.policy() {
                    OnDisconnect::Park => self.waiting.push_back(body),
                    OnDisconnect::Fail => self.end(body, IoStatus::Failed),
                }
            }
        }
    }

    /// Wants the request in `slot` back early. It comes through [`Lane::drain`]: at once when no process has it.
    pub fn abort(&mut self, id: RequestId) {
        if let Some(index) = self.waiting.iter().position(|body| body.id == id) {
            let body = self.waiting.remove(index).expect("the index was just found");
            return self.end(body, IoStatus::Aborted);
        }
        let Some(attached) = &self.attached else { return };
        let found = self.slots.iter_mut().enumerate().find_map(|(slot, held)| {
            let held = held.as_mut().filter(|held| held.body.id == id)?;
            Some((slot, held))
        });
        if let Some((slot, held)) = found {
            held.aborted = true;
            let word = attached.words.memory().shape().abort_word(slot as u32);
            attached.words.store(word, id.0, Ordering::Release);
            attached.words.add(ABORTS_POSTED, 1, Ordering::Release);
            self.unrung |= 1 << held.worker;
        }
    }

    /// The device is being reset or removed: of the requests with ids below `before`, what waits for a process ends, and the
    /// process is told to end what it can.
    pub fn reset(&mut self, before: RequestId) {
        for body in std::mem::take(&mut self.waiting) {
            if body.id < before {
                self.end(body, IoStatus::Aborted);
            } else {
                self.waiting.push_back(body);
            }
        }
        for held in self.slots.iter_mut().flatten() {
            held.aborted |= held.body.id < before;
        }
        if let Some(attached) = &self.attached {
            attached.words.store(RESET_BEFORE, before.0, Ordering::Release);
            attached.words.add(RESETS_POSTED, 1, Ordering::Release);
            self.unrung = u64::MAX >> (u64::BITS as usize - self.workers());
        }
    }

    /// Requests that are here.
    pub fn len(&self) -> usize {
        self.outstanding + self.waiting.len() + self.ended.len()
    }

    /// Whether no request is here.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a process is there.
    pub fn is_attached(&self) -> bool {
        self.attached.is_some()
    }

    /// The reactor is about to sleep: asks the process to ring, and looks once more. `false`: there is work.
    pub fn may_sleep(&mut self) -> bool {
        if self.target.lane(self.index).has_changed() || !self.ended.is_empty() || self.unrung != 0 {
            return false;
        }
        match &self.attached {
            Some(attached) => {
                announce(&attached.words, TARGET_SLEEPS);
                self.announced = true;
                attached.ends.iter().all(|ends| ends.completions.is_empty(&attached.words))
            }
            None => true,
        }
    }

    /// The reactor is awake: the process need not ring.
    #[inline]
    pub fn awake(&mut self) {
        if std::mem::take(&mut self.announced)
            && let Some(attached) = &self.attached
        {
            retract(&attached.words, TARGET_SLEEPS);
        }
    }

    /// The channel closes. What is still here is handed to `take`. When the process has requests that it has not answered,
    /// its session ends: it must not find their slots in use by others.
    pub fn close(mut self, mut take: impl FnMut(Box<Body>)) {
        self.target.lane(self.index).close();
        if let Some(attached) = self.attached.take() {
            if self.outstanding == 0 {
                attached.session.put_ends(self.index, attached.ends);
            } else {
                tracing::warn!(
                    bdev = self.target.bdev(),
                    outstanding = self.outstanding,
                    "the external process is cut off: it has not answered what its device no longer waits for"
                );
                attached.session.end();
            }
        }
        self.reset(RequestId(u64::MAX));
        let held = self.slots.iter_mut().filter_map(Option::take).map(|held| held.body);
        for mut body in held.chain(std::mem::take(&mut self.ended)) {
            body.status = IoStatus::Aborted;
            take(body);
        }
    }
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lane")
            .field("index", &self.index)
            .field("outstanding", &self.outstanding)
            .field("waiting", &self.waiting.len())
            .field("attached", &self.attached.is_some())
            .finish_non_exhaustive()
    }
}
