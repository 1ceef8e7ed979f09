//! One reactor's channel: slots, the queue before them, deadlines, and what becomes of requests that do not come home.
//!
//! # Where an I/O is
//! ```text
//! submit -> waiting (in order) -> slot + body out -> home: completed
//!              |                    |  deadline, or given up: ended, the slot is empty, the body is still out ("overdue")
//!              +- deadline, abort   +----> comes home later: counted as late, its payload goes back to the pool
//! ```
//! The I/O itself never leaves the reactor. Its payload travels in the body of its slot, so memory that a handler may
//! still touch belongs to nobody else. There is one body a slot, made when the channel opens; one that never comes home
//! makes the channel narrower by one, for good. When none is left everything waits until its deadline.
//!
//! # Payload that is not the I/O's own
//! A view (see [`Buffers::view`]) is lent by a saga for the length of the I/O, which may end before the handler is done.
//! Such payloads are copied through memory of the pool; one buffer kept in reserve guarantees that the first of those that
//! wait for memory goes on.
//!
//! # Deadlines
//! All have the same length, so the I/Os that are out are listed in the order of their submission, and only the first is
//! looked at.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use appliance::RequestId;
use appliance::home::{Limiter, RingHome};
use appliance::request::{Body, Fault, Home, NO_DEADLINE};
use reactor::buffer::prefetch_for_write;
use reactor::ring::Consumer;
use reactor::{Buffers, Instant, Progress};

use super::Device;
use super::port::{Port, PortCx};
use super::stats::ChannelStats;
use crate::core::{Bdev, ChannelCx, Geometry, Io, IoChannel, IoCx, IoStatus, IoTag, Op};

/// How long a handler has to end its requests when the device is reset or removed.
const GRACE: Duration = Duration::from_millis(500);

/// Bytes of the payload memory kept in reserve: the largest piece of an emulated operation.
const RESERVE_BYTES: usize = 128 * 1024;

/// Request identifiers that a channel draws at once.
const IDS: u64 = 1 << 20;

/// The first identifier that no channel has drawn.
static NEXT_IDS: AtomicU64 = AtomicU64::new(1);

const NONE: u32 = u32::MAX;

/// Whose memory the payload of a request is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Lent {
    /// The I/O's own.
    #[default]
    Own,
    /// A copy, in memory of the pool.
    Copy,
    /// A copy, in the reserve.
    Reserve,
}

#[derive(Default)]
struct Slot {
    /// The I/O that waits for this slot's body; `None` with the body out: it has ended without it.
    io: Option<Io>,
    deadline: Instant,
    id: u64,
    lent: Lent,
    previous: u32,
    next: u32,
}

struct Waiting {
    io: Io,
    deadline: Instant,
}

/// One reactor's channel of an appliance device.
pub(super) struct ApplianceChannel {
    device: Arc<Device>,
    port: Option<Box<dyn Port>>,
    home: Arc<RingHome>,
    ring: Option<Consumer<Box<Body>>>,
    /// Bodies that have just come home.
    // Boxed because bodies travel by pointer, and the same box goes out again and again.
    #[allow(clippy::vec_box)]
    came: Vec<Box<Body>>,
    slots: Vec<Slot>,
    /// Bodies that are at home.
    #[allow(clippy::vec_box)]
    free: Vec<Box<Body>>,
    /// Bounded by the I/Os of the reactor's pool.
    waiting: VecDeque<Waiting>,
    /// The slots whose I/Os are out, in the order of their submission.
    oldest: u32,
    newest: u32,
    with_handler: u64,
    next_id: u64,
    ids_end: u64,
    /// When what is out is given up: set by a reset or a removal.
    give_up_at: Option<Instant>,
    reserve: Option<Buffers>,
    until_sample: u32,
    /// The port was given something and not flushed.
    unflushed: bool,
    stats: Arc<ChannelStats>,
    log: Limiter,
}

impl ApplianceChannel {
    /// Opens a channel.
    ///
    /// # Errors
    /// As the backend says.
    pub(super) fn open(device: &Arc<Device>, cx: &mut ChannelCx<'_>) -> io::Result<ApplianceChannel> {
        let depth = device.settings.queue_depth;
        let clock = Arc::clone(&device.clock);
        let names = (Arc::clone(&device.name), device.backend.handler_name());
        let (home, ring) = RingHome::new(depth, cx.waker(), clock, names.0, names.1);
        let geometry = device.geometry();
        let port_cx = PortCx {
            reactor: cx.reactor(),
            handle: cx.handle(),
            waker: cx.waker(),
            queue_depth: depth,
            home: Arc::clone(&home) as Arc<dyn Home>,
            geometry,
        };
        let port = device.backend.open_port(&port_cx)?;
        let body = |slot| Body::blank(slot, port_cx.reactor, geometry.block_size, Arc::clone(&port_cx.home));
        Ok(ApplianceChannel {
            device: Arc::clone(device),
            port: Some(port),
            home,
            ring: Some(ring),
            came: Vec::with_capacity(depth),
            slots: (0..depth).map(|_| Slot::default()).collect(),
            // The first to go out is that of slot 0.
            free: (0..depth as u32).rev().map(body).collect(),
            waiting: VecDeque::new(),
            oldest: NONE,
            newest: NONE,
            with_handler: 0,
            next_id: 0,
            ids_end: 0,
            give_up_at: None,
            reserve: Some(Buffers::heap(RESERVE_BYTES)),
            until_sample: device.settings.latency_sample.min(1),
            unflushed: false,
            stats: device.stats.channel(),
            log: Limiter::default(),
        })
    }

    #[inline]
    fn draw_id(&mut self) -> u64 {
        if self.next_id == self.ids_end {
            self.next_id = NEXT_IDS.fetch_add(IDS, Ordering::Relaxed);
            self.ids_end = self.next_id + IDS;
        }
        self.next_id += 1;
        self.next_id - 1
    }

    /// Sends an I/O to the handler; it comes back when there is no body, no memory, or no room.
    #[inline]
    fn start(&mut self, mut io: Io, deadline: Instant, cx: &mut IoCx<'_>) -> Result<(), Io> {
        let Some(mut body) = self.free.pop() else { return Err(io) };
        let mut lent = Lent::Own;
        if io.bufs().has_views() {
            match self.copy_of(&io, cx) {
                Some((bufs, how)) => (body.bufs, lent) = (bufs, how),
                None => {
                    self.free.push(body);
                    return Err(io);
                }
            }
        } else {
            body.bufs = std::mem::take(io.bufs_mut());
        }
        let id = self.draw_id();
        body.id = RequestId(id);
        (body.op, body.lba, body.blocks) = (io.op(), io.lba(), io.blocks());
        body.payload_bytes = body.bufs.len() as u32;
        body.deadline = deadline;
        body.sampled = self.until_sample == 1;
        self.until_sample = match self.until_sample {
            0 | 1 => self.device.settings.latency_sample,
            n => n - 1,
        };
        if body.sampled {
            body.fixed.sent = cx.now();
        }
        let index = body.slot;
        let Some(port) = &mut self.port else { unreachable!("a closed channel gets no I/O") };
        if let Err(mut body) = port.send(body, cx.now()) {
            let bufs = std::mem::take(&mut body.bufs);
            match lent {
                Lent::Own => *io.bufs_mut() = bufs,
                Lent::Copy | Lent::Reserve => self.give_back(bufs, lent, cx),
            }
            self.free.push(body);
            return Err(io);
        }
        let slot = &mut self.slots[index as usize];
        (slot.io, slot.deadline, slot.id, slot.lent) = (Some(io), deadline, id, lent);
        self.link(index);
        if !self.unflushed {
            self.unflushed = true;
            cx.poll_soon();
        }
        Ok(())
    }

    /// Payload memory of the channel's own in place of views, with what the operation brings.
    fn copy_of(&mut self, io: &Io, cx: &mut IoCx<'_>) -> Option<(Buffers, Lent)> {
        let len = io.bufs().len();
        let (mut copy, lent) = match cx.pool().alloc(len) {
            Some(copy) => (copy, Lent::Copy),
            None if len <= RESERVE_BYTES => {
                let mut reserve = self.reserve.take()?;
                reserve.truncate(len);
                (reserve, Lent::Reserve)
            }
            // More than there will ever be: rather slow than never.
            None if len > cx.pool().max_payload() => (Buffers::heap(len), Lent::Copy),
            None => return None,
        };
        if io.op() != Op::Read {
            let mut offset = 0;
            for segment in io.bufs().segments() {
                copy.write_at(offset, segment);
                offset += segment.len();
            }
        }
        Some((copy, lent))
    }

    /// Gives payload memory of the channel's own back.
    fn give_back(&mut self, mut bufs: Buffers, lent: Lent, cx: &mut IoCx<'_>) {
        match lent {
            Lent::Reserve => {
                bufs.widen();
                // A handler with a bug may have put something else in its place.
                let whole = bufs.len() == RESERVE_BYTES && bufs.segment_count() == 1;
                self.reserve = Some(if whole { bufs } else { Buffers::heap(RESERVE_BYTES) });
            }
            Lent::Own | Lent::Copy => cx.pool().put(bufs),
        }
    }

    #[inline]
    fn link(&mut self, index: u32) {
        let previous = std::mem::replace(&mut self.newest, index);
        match self.slots.get_mut(previous as usize) {
            Some(slot) => slot.next = index,
            None => self.oldest = index,
        }
        let slot = &mut self.slots[index as usize];
        (slot.previous, slot.next) = (previous, NONE);
        self.with_handler += 1;
    }

    /// Takes the I/O out of a slot and out of the list.
    #[inline]
    fn unlink(&mut self, index: u32) -> Option<Io> {
        let slot = &mut self.slots[index as usize];
        let io = slot.io.take()?;
        let (previous, next) = (slot.previous, slot.next);
        match self.slots.get_mut(previous as usize) {
            Some(slot) => slot.next = next,
            None => self.oldest = next,
        }
        match self.slots.get_mut(next as usize) {
            Some(slot) => slot.previous = previous,
            None => self.newest = previous,
        }
        self.with_handler -= 1;
        Some(io)
    }

    /// A body has come home.
    #[inline]
    fn finish(&mut self, mut body: Box<Body>, cx: &mut IoCx<'_>) {
        let index = body.slot;
        let bufs = std::mem::take(&mut body.bufs);
        let lent = std::mem::take(&mut self.slots[index as usize].lent);
        let Some(mut io) = self.unlink(index) else {
            self.came_late(&body, cx.now());
            self.give_back(bufs, lent, cx);
            self.free.push(body);
            return;
        };
        let mut status = body.status;
        if bufs.len() != body.payload_bytes as usize {
            body.fixed.home.report(&body, Fault::WrongLength { said_bytes: bufs.len() as u64 });
            status = IoStatus::Failed;
            self.give_back(bufs, lent, cx);
        } else if lent == Lent::Own {
            *io.bufs_mut() = bufs;
        } else {
            if io.op() == Op::Read && status.is_success() {
                let mut offset = 0;
                for segment in bufs.segments() {
                    io.bufs_mut().write_at(offset, segment);
                    offset += segment.len();
                }
            }
            self.give_back(bufs, lent, cx);
        }
        if body.sampled {
            self.stats.in_ring.record(body.fixed.picked.nanos_since(body.fixed.sent));
            self.stats.in_handler.record(body.fixed.done.nanos_since(body.fixed.picked));
            self.stats.going_home.record(cx.now().nanos_since(body.fixed.done));
        }
        self.stats.completed.add(1);
        self.free.push(body);
        cx.complete(io, status);
    }

    #[cold]
    fn came_late(&mut self, body: &Body, now: Instant) {
        self.stats.late.add(1);
        if let Some(unsaid) = self.log.admit(now) {
            tracing::warn!(
                bdev = &*self.device.name,
                handler = &*self.device.backend.handler_name(),
                request = body.id.0,
                op = body.op.kind().name(),
                lba = body.lba,
                blocks = body.blocks,
                unsaid,
                "a handler completed a request that had ended without it"
            );
        }
    }

    /// Ends an I/O whose request is still with the handler.
    fn give_up(&mut self, index: u32, status: IoStatus, cx: &mut IoCx<'_>) {
        let id = self.slots[index as usize].id;
        let Some(io) = self.unlink(index) else { return };
        match status {
            IoStatus::TimedOut => self.stats.timed_out.add(1),
            _ => self.stats.aborted.add(1),
        }
        if let Some(unsaid) = self.log.admit(cx.now()) {
            tracing::error!(
                bdev = &*self.device.name,
                handler = &*self.device.backend.handler_name(),
                request = id,
                op = io.op().kind().name(),
                lba = io.lba(),
                blocks = io.blocks(),
                status = status.name(),
                unsaid,
                "a handler has not completed a request in time: it ends without it"
            );
        }
        if let Some(port) = &mut self.port {
            port.abort(RequestId(id));
        }
        cx.complete(io, status);
    }

    /// Ends whatever has run out of time.
    fn end_overdue(&mut self, cx: &mut IoCx<'_>) -> bool {
        let now = cx.now();
        let mut any = false;
        while let Some(slot) = self.slots.get(self.oldest as usize).filter(|slot| slot.deadline <= now) {
            debug_assert!(slot.io.is_some());
            self.give_up(self.oldest, IoStatus::TimedOut, cx);
            any = true;
        }
        while self.waiting.front().is_some_and(|first| first.deadline <= now) {
            let Some(Waiting { io, .. }) = self.waiting.pop_front() else { break };
            self.stats.timed_out.add(1);
            cx.complete(io, IoStatus::TimedOut);
            any = true;
        }
        if self.give_up_at.is_some_and(|at| at <= now) {
            while self.oldest != NONE {
                self.give_up(self.oldest, IoStatus::Aborted, cx);
            }
            any = true;
        }
        if self.oldest == NONE {
            // What comes from now on is no business of a reset that has drained.
            self.give_up_at = None;
        }
        any
    }

    fn drain(&mut self, cx: &mut IoCx<'_>) -> bool {
        let mut came = std::mem::take(&mut self.came);
        let room = self.slots.len();
        if let Some(ring) = &mut self.ring {
            ring.pop_batch(room, |body| {
                // The handler's thread had it last; it is looked at, emptied and filled again when all have been taken.
                prefetch_for_write(&body.id);
                prefetch_for_write(&body.bufs);
                came.push(body);
            });
        }
        if let Some(port) = &mut self.port {
            port.drain(cx.now(), room, &mut |body| came.push(body));
        }
        let any = !came.is_empty();
        for body in came.drain(..) {
            self.finish(body, cx);
        }
        self.came = came;
        any
    }

    fn start_waiting(&mut self, cx: &mut IoCx<'_>) -> bool {
        let mut any = false;
        while let Some(Waiting { io, deadline }) = self.waiting.pop_front() {
            if let Err(io) = self.start(io, deadline, cx) {
                self.waiting.push_front(Waiting { io, deadline });
                break;
            }
            any = true;
        }
        any
    }

    /// Bodies that are with the handler although nobody waits for them.
    fn overdue(&self) -> u64 {
        self.slots.len() as u64 - self.free.len() as u64 - self.with_handler
    }

    fn show(&self) {
        self.stats.waiting.set(self.waiting.len() as u64);
        self.stats.with_handler.set(self.with_handler);
        self.stats.overdue.set(self.overdue());
        self.stats.faults.set(self.home.faults());
    }
}

impl IoChannel for ApplianceChannel {
    #[inline]
    fn submit(&mut self, io: Io, cx: &mut IoCx<'_>) {
        self.stats.submitted.add(1);
        let deadline = self.device.settings.timeout.map_or(NO_DEADLINE, |timeout| cx.now() + timeout);
        let kept = if self.waiting.is_empty() { self.start(io, deadline, cx) } else { Err(io) };
        if let Err(io) = kept {
            self.waiting.push_back(Waiting { io, deadline });
            self.stats.waiting.set(self.waiting.len() as u64);
        }
    }

    fn wants_poll(&self) -> bool {
        true
    }

    #[inline]
    fn poll(&mut self, cx: &mut IoCx<'_>) -> Progress {
        let mut busy = self.drain(cx);
        if !self.waiting.is_empty() {
            busy |= self.start_waiting(cx);
        }
        if self.oldest != NONE || !self.waiting.is_empty() {
            busy |= self.end_overdue(cx);
        }
        if self.unflushed {
            self.unflushed = false;
            if let Some(port) = &mut self.port {
                port.flush();
            }
            busy = true;
        }
        if busy {
            self.show();
        }
        Progress::from_busy(busy)
    }

    fn may_sleep(&mut self) -> bool {
        let ring = self.ring.as_ref().is_none_or(Consumer::is_empty);
        let port = self.port.as_mut().is_none_or(|port| port.may_sleep());
        ring && port && !self.unflushed
    }

    fn deadline(&self) -> Option<Instant> {
        let oldest = self.slots.get(self.oldest as usize).map(|slot| slot.deadline);
        let first = self.waiting.front().map(|first| first.deadline);
        // With nothing to send or to wait for, the port needs no time either.
        let port = self.port.as_ref().and_then(|port| port.deadline());
        let port = port.filter(|_| oldest.is_some() || first.is_some());
        let all = [oldest, first, port, self.give_up_at.filter(|_| oldest.is_some())];
        all.into_iter().flatten().filter(|&at| at != NO_DEADLINE).min()
    }

    fn abort(&mut self, tag: IoTag, cx: &mut IoCx<'_>) -> bool {
        if let Some(index) = self.waiting.iter().position(|waiting| waiting.io.tag() == tag)
            && let Some(Waiting { io, .. }) = self.waiting.remove(index)
        {
            self.stats.aborted.add(1);
            cx.complete(io, IoStatus::Aborted);
            return true;
        }
        let is_wanted = |slot: &&Slot| slot.io.as_ref().is_some_and(|io| io.tag() == tag);
        if let Some(slot) = self.slots.iter().find(is_wanted)
            && let Some(port) = &mut self.port
        {
            port.abort(RequestId(slot.id));
        }
        // Whether the handler gives it up is seen when it comes home.
        false
    }

    fn abort_all(&mut self, cx: &mut IoCx<'_>) {
        for Waiting { io, .. } in self.waiting.drain(..) {
            self.stats.aborted.add(1);
            cx.complete(io, IoStatus::Aborted);
        }
        if let Some(port) = &mut self.port {
            port.reset(RequestId(self.next_id));
        }
        if self.oldest != NONE && self.give_up_at.is_none() {
            self.give_up_at = Some(cx.now() + GRACE);
        }
    }

    fn resized(&mut self, geometry: &Geometry) {
        if let Some(port) = &mut self.port {
            port.resized(geometry);
        }
    }

    fn close(&mut self, _: &mut ChannelCx<'_>) {
        if let Some(port) = self.port.take() {
            port.close();
        }
        if let Some(ring) = self.ring.take() {
            // Bodies that are still out find the ring closed, and are dropped by whoever completes them.
            let late = self.home.close(ring);
            self.stats.late.add(late as u64);
        }
        self.stats.abandoned.set(self.overdue());
        self.show();
        self.device.stats.close(&self.stats);
    }
}
