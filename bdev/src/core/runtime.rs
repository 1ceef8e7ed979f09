//! One reactor's part of the bdev layer: channels, the routing of I/Os between them, the pool, file I/O.
//!
//! # Invariants
//! - Every I/O drawn from the pool is in exactly one place: a queue of this runtime, a module, a file engine, the
//!   completion ring, a saga, or a client's inbox.
//! - Ring capacity = pool size and [spares](super::spares): a completion from another thread always finds a slot.
//! - A channel closes when nobody refers to it and nothing is outstanding on it, whichever comes last.
//! - Calls into modules never nest: what a module completes or forwards goes through `queue`.
//!
//! # Waiting
//! Requests beyond the pool wait in `waiting`, in order, across all clients; the clients bound them (a queue pair has
//! its depth). Sagas that need bounce memory wait in `bounce_waiters`; one reserved buffer guarantees that the first of
//! them goes on.

mod channels;

use std::any::{Any, TypeId};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reactor::buffer::{ClassStats, PoolConfig, Region};
use reactor::file::{FileDone, FileEngine};
use reactor::mailbox::{Full, Message};
use reactor::park::Waker;
use reactor::ring::{Consumer, ring};
use reactor::{BufferPool, Buffers, Context, Instant, Poller, Progress, ReactorHandle, ReactorId, Schedule};
use slab::Slab;
use smallvec::SmallVec;

use super::channel::IoChannel;
use super::cx::IoCx;
use super::io::{Completion, Frame, Home, HomeInner, Io, IoBody, IoRequest, IoTag, NO_SAGA, arrayvec};
use super::locks::{Gate, Hold};
use super::registry::{BdevId, BdevInfo};
use super::saga::Saga;
use super::spares::MAX_SPARES;
use super::stats::IoStats;
use super::steps::{Step, Steps};
use super::types::{Geometry, IoStatus, Op, OpSet};

/// Names one reactor's channel to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChannelId(pub(super) u32);

/// Names one inbox of a runtime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientId(pub(super) u32);

/// Sizes of one reactor's part of the bdev layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuntimeConfig {
    /// I/Os that may be outstanding at once; further ones wait. Rounded up to a power of two.
    pub io_pool: usize,
    /// Payload memory.
    pub buffers: PoolConfig,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        RuntimeConfig { io_pool: 8192, buffers: PoolConfig::default() }
    }
}

/// Bytes of the reserved bounce buffer, and the most that an emulated operation moves at once.
pub(super) const BOUNCE_BYTES: usize = 128 * 1024;

/// Completions taken from the ring in one poll.
const RING_BATCH: usize = 256;

/// The parts that modules may touch while a channel is borrowed.
pub(super) struct Inner {
    pub(super) queue: Steps,
    pub(super) engine: Box<dyn FileEngine>,
    pub(super) pool: BufferPool,
    pub(super) now: Instant,
    // Boxed because I/Os travel by pointer, and the same box goes out again and again.
    #[allow(clippy::vec_box)]
    pub(super) free: Vec<Box<IoBody>>,
}

pub(super) struct Channel {
    pub(super) bdev: Arc<BdevInfo>,
    /// `None` once the device is gone; the channel then only refuses.
    pub(super) module: Option<Box<dyn IoChannel>>,
    pub(super) geometry: Geometry,
    pub(super) native: OpSet,
    refs: u32,
    /// Layers from the lowest device up to this one: the frames that an I/O needs from here on.
    pub(super) height: usize,
    removing: bool,
    removed: Vec<Box<dyn FnOnce()>>,
    /// I/Os in the module, by epoch; the third counts those that hold a range lock.
    pub(super) in_flight: [u32; 3],
    pub(super) epoch: u8,
    pub(super) gates: Vec<Gate>,
    /// I/Os that wait for a gate to open, in order.
    pub(super) parked: VecDeque<Io>,
    /// Requests of this channel that wait for the pool.
    waiting: u32,
    stats: IoStats,
}

impl Channel {
    /// Whether it closes once nothing is outstanding.
    fn is_ending(&self) -> bool {
        self.removing || self.refs == 0
    }

    fn outstanding(&self) -> u32 {
        self.in_flight.iter().sum::<u32>() + self.parked.len() as u32 + self.waiting
    }
}

#[derive(Default)]
struct Client {
    inbox: Vec<Completion>,
}

/// One reactor's part of the bdev layer. Lives in an `Rc<RefCell<_>>` among the reactor's extensions.
pub struct IoRuntime {
    config: RuntimeConfig,
    pub(super) reactor: ReactorId,
    pub(super) group: Vec<ReactorHandle>,
    pub(super) inner: Inner,
    pub(super) channels: Slab<Channel>,
    by_bdev: HashMap<BdevId, ChannelId>,
    polled: Vec<ChannelId>,
    clients: Slab<Client>,
    /// I/Os lent as spares.
    pub(super) spares: usize,
    pub(super) waiting: VecDeque<(ChannelId, ClientId, IoRequest)>,
    ring: Consumer<Box<IoBody>>,
    pub(super) home: Home,
    files_done: Vec<FileDone>,
    pub(super) sagas: Slab<Saga>,
    /// Ranges that are held for others than sagas.
    pub(super) holds: Slab<Hold>,
    pub(super) bounce_waiters: VecDeque<u32>,
    pub(super) reserve: Option<Buffers>,
    outbox: VecDeque<(ReactorId, Message)>,
    closing: Vec<ChannelId>,
    /// What modules have on this reactor besides their channels.
    attached: HashMap<TypeId, Rc<dyn Any>>,
}

/// The runtime as others on the reactor hold it.
pub type SharedRuntime = Rc<RefCell<IoRuntime>>;

impl IoRuntime {
    /// Builds the runtime of a reactor, adds its poller, and puts it among the reactor's extensions.
    ///
    /// # Errors
    /// When payload memory or a file engine cannot be had.
    pub fn install(cx: &mut Context, config: RuntimeConfig) -> io::Result<SharedRuntime> {
        let shared: SharedRuntime = Rc::new(RefCell::new(IoRuntime::build(cx, config)?));
        cx.insert(RuntimeSlot(Rc::clone(&shared)));
        cx.add_poller("bdev", Schedule::Active, Box::new(RuntimePoller(Rc::clone(&shared))));
        Ok(shared)
    }

    /// Reactors of the group.
    pub fn reactors(&self) -> usize {
        self.group.len()
    }

    /// The sizes it was built with.
    pub fn config(&self) -> RuntimeConfig {
        self.config
    }

    /// Changes its sizes, before it is used.
    ///
    /// # Errors
    /// `ResourceBusy` when channels are open or memory is lent; else as [`IoRuntime::install`].
    pub fn reconfigure(&mut self, cx: &mut Context, config: RuntimeConfig) -> io::Result<()> {
        if !self.channels.is_empty() || !self.is_quiet() || !self.inner.pool.is_whole() {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "bdevs are in use"));
        }
        let mut built = IoRuntime::build(cx, config)?;
        built.clients = std::mem::take(&mut self.clients);
        built.attached = std::mem::take(&mut self.attached);
        *self = built;
        Ok(())
    }

    fn build(cx: &mut Context, config: RuntimeConfig) -> io::Result<IoRuntime> {
        let pool = BufferPool::new(config.buffers)?;
        let region: Region = pool.region();
        let platform = Arc::clone(cx.platform());
        let engine = platform.file_engine(region, cx.parker())?;
        let pooled = pool_size(config.io_pool);
        let (producer, consumer) = ring(pooled + MAX_SPARES);
        let home =
            Home { inner: Arc::new(HomeInner { ring: producer, waker: cx.waker(), closed: AtomicBool::new(false) }) };
        let free = (0..pooled).map(|_| IoRuntime::blank(&home)).collect();
        Ok(IoRuntime {
            config,
            reactor: cx.id(),
            group: cx.group().to_vec(),
            inner: Inner { queue: Steps::default(), engine, pool, now: cx.now(), free },
            channels: Slab::new(),
            by_bdev: HashMap::new(),
            polled: Vec::new(),
            clients: Slab::new(),
            spares: 0,
            waiting: VecDeque::new(),
            ring: consumer,
            home,
            files_done: Vec::new(),
            sagas: Slab::new(),
            holds: Slab::new(),
            bounce_waiters: VecDeque::new(),
            reserve: Some(Buffers::heap(BOUNCE_BYTES)),
            outbox: VecDeque::new(),
            closing: Vec::new(),
            attached: HashMap::new(),
        })
    }

    /// The runtime of the reactor behind `cx`.
    ///
    /// # Panics
    /// If it was not installed.
    pub fn of(cx: &Context) -> SharedRuntime {
        let slot = cx.get::<RuntimeSlot>().expect("the bdev layer is installed on every reactor");
        Rc::clone(&slot.0)
    }

    /// As [`IoRuntime::of`], before it may have been installed.
    pub fn try_of(cx: &Context) -> Option<SharedRuntime> {
        cx.get::<RuntimeSlot>().map(|slot| Rc::clone(&slot.0))
    }

    /// Keeps what a module has on this reactor besides its channels, for
    /// [`ChannelCx::attached`](super::ChannelCx::attached): one value of each type.
    pub fn attach<T: 'static>(&mut self, value: Rc<T>) {
        self.attached.insert(TypeId::of::<T>(), value);
    }

    /// What was kept by [`IoRuntime::attach`].
    pub fn attached<T: 'static>(&self) -> Option<Rc<T>> {
        self.attached.get(&TypeId::of::<T>()).and_then(|value| Rc::clone(value).downcast().ok())
    }

    pub(super) fn blank(home: &Home) -> Box<IoBody> {
        Box::new(IoBody {
            op: Op::Flush,
            lba: 0,
            blocks: 0,
            bufs: Buffers::new(),
            status: IoStatus::Success,
            tag: IoTag { client: ClientId(u32::MAX), user: 0 },
            frames: arrayvec::Frames::default(),
            home: home.clone(),
            spare: false,
            children: 0,
            uncounted: false,
            child: false,
            shared: false,
        })
    }

    // ---- clients ---------------------------------------------------------------------------------------------------

    /// Opens an inbox.
    pub fn add_client(&mut self) -> ClientId {
        ClientId(self.clients.insert(Client::default()) as u32)
    }

    /// Closes an inbox. The client must have got back everything that it submitted.
    pub fn remove_client(&mut self, client: ClientId) {
        self.clients.remove(client.0 as usize);
    }

    /// Submits an operation. Its completion comes to `client`'s inbox, at the earliest in the next [`IoRuntime::run`].
    #[inline]
    pub fn submit(&mut self, channel: ChannelId, client: ClientId, request: IoRequest) {
        // In parts, which stay in registers: only the path that is hardly ever taken puts them together.
        let IoRequest { op, lba, blocks, bufs, user } = request;
        if !self.waiting.is_empty() || self.inner.free.is_empty() {
            return self.wait(channel, client, IoRequest { op, lba, blocks, bufs, user });
        }
        self.start(channel, client, IoRequest { op, lba, blocks, bufs, user });
    }

    #[cold]
    fn wait(&mut self, channel: ChannelId, client: ClientId, request: IoRequest) {
        self.channels[channel.0 as usize].waiting += 1;
        self.waiting.push_back((channel, client, request));
    }

    #[inline(always)]
    fn start(&mut self, channel: ChannelId, client: ClientId, request: IoRequest) {
        let body = self.inner.free.pop().expect("the caller saw a free I/O");
        self.start_with(body, channel, client, request);
    }

    #[inline(always)]
    pub(super) fn start_with(
        &mut self,
        mut body: Box<IoBody>,
        channel: ChannelId,
        client: ClientId,
        request: IoRequest,
    ) {
        body.op = request.op;
        body.lba = request.lba;
        body.blocks = request.blocks;
        body.bufs = request.bufs;
        body.status = IoStatus::Success;
        body.tag = IoTag { client, user: request.user };
        self.enter(channel, Io::from_body(body));
    }

    /// Moves `client`'s completions to `out`.
    #[inline]
    pub fn take_completions(&mut self, client: ClientId, out: &mut Vec<Completion>) {
        out.append(&mut self.clients[client.0 as usize].inbox);
    }

    /// Gives a completion's I/O back to the pool, and its payload if it was not taken.
    #[inline]
    pub fn recycle(&mut self, mut completion: Completion) {
        if !completion.body.bufs.is_empty() {
            self.inner.pool.put(completion.take_bufs());
        }
        if !completion.body.spare {
            self.inner.free.push(completion.body);
        }
    }

    /// Tries to end an operation early. `true`: it will complete with [`IoStatus::Aborted`] (or just has otherwise).
    pub fn abort(&mut self, channel: ChannelId, tag: IoTag) -> bool {
        let found =
            self.waiting.iter().position(|(_, client, request)| *client == tag.client && request.user == tag.user);
        if let Some(index) = found {
            let (channel, client, request) = self.waiting.remove(index).expect("the index was just found");
            let slot = &mut self.channels[channel.0 as usize];
            slot.waiting -= 1;
            if slot.is_ending() {
                self.closing.push(channel);
            }
            // It never drew an I/O from the pool: the one that carries it home is made here and ends in `recycle`.
            let mut body = IoRuntime::blank(&self.home);
            body.spare = true;
            body.bufs = request.bufs;
            body.tag = IoTag { client, user: request.user };
            body.status = IoStatus::Aborted;
            self.clients[client.0 as usize].inbox.push(Completion { body });
            return true;
        }
        let slot = &mut self.channels[channel.0 as usize];
        if let Some(index) = slot.parked.iter().position(|io| io.tag() == tag) {
            let mut io = slot.parked.remove(index).expect("the index was just found");
            if slot.is_ending() {
                self.closing.push(channel);
            }
            io.body_mut().frames.pop();
            io.body_mut().status = IoStatus::Aborted;
            self.inner.queue.complete(io);
            return true;
        }
        let Some(module) = slot.module.as_mut() else { return false };
        if module.abort(tag, &mut IoCx { inner: &mut self.inner, channel }) {
            return true;
        }
        let bases: SmallVec<[ChannelId; 8]> = module.base_channels().into();
        bases.into_iter().any(|base| self.abort(base, tag))
    }

    /// Ends what waits for a gate to open.
    pub(super) fn end_parked(&mut self, channel: ChannelId, status: IoStatus) {
        for mut io in std::mem::take(&mut self.channels[channel.0 as usize].parked) {
            io.body_mut().frames.pop();
            io.body_mut().status = status;
            self.inner.queue.complete(io);
        }
    }

    fn poll_channel(&mut self, channel: ChannelId) {
        // What it asked to be polled for may have been aborted, and the channel be closed.
        let module = self.channels.get_mut(channel.0 as usize).and_then(|slot| slot.module.as_mut());
        if let Some(module) = module {
            module.poll(&mut IoCx { inner: &mut self.inner, channel });
        }
    }

    pub(super) fn abort_all(&mut self, channel: ChannelId) {
        // The layer above holds it open for as long as it may name it, but its device may be gone.
        if let Some(module) = self.channels[channel.0 as usize].module.as_mut() {
            module.abort_all(&mut IoCx { inner: &mut self.inner, channel });
        }
    }

    /// Payload memory of this reactor.
    #[inline]
    pub fn pool(&mut self) -> &mut BufferPool {
        &mut self.inner.pool
    }

    /// State of the payload memory, by class.
    pub fn pool_stats(&mut self) -> [ClassStats; 3] {
        self.inner.pool.stats()
    }

    /// What wakes this reactor.
    pub(super) fn waker(&self) -> Waker {
        self.home.inner.waker.clone()
    }

    /// What file I/O is done with.
    pub fn file_mode(&self) -> String {
        self.inner.engine.mode()
    }

    /// Sets the instant that new I/Os start at; each poller that submits calls it once a poll.
    #[inline]
    pub fn set_now(&mut self, now: Instant) {
        self.inner.now = now;
    }

    // ---- the way down ----------------------------------------------------------------------------------------------

    /// Brings an I/O to a channel: checks, gates, then the module or a saga.
    pub(super) fn enter(&mut self, channel: ChannelId, mut io: Io) {
        let slot = &mut self.channels[channel.0 as usize];
        let body = io.body_mut();
        let (op, lba, blocks) = (body.op, body.lba, body.blocks);
        let (saga, epoch, started) = (NO_SAGA, slot.epoch, self.inner.now);
        let frame =
            Frame { channel, saga, forwarded: false, epoch, op, blocks, given: (lba, blocks), started, mark: 0 };
        let status = check(slot, op, lba, blocks, body.bufs.len());
        if status != IoStatus::Success {
            body.status = status;
            slot.stats.record(op.kind(), 0, self.inner.now, self.inner.now, status);
            self.inner.queue.complete(io);
            return;
        }
        body.frames.push(frame);
        if slot.is_gated(&io) {
            slot.parked.push_back(io);
            return;
        }
        self.dispatch(channel, io);
    }

    /// Gives an I/O that passed its channel's gates to the module, or to a saga.
    #[inline(always)]
    pub(super) fn dispatch(&mut self, channel: ChannelId, mut io: Io) {
        let slot = &mut self.channels[channel.0 as usize];
        if Saga::is_needed(slot, &io) {
            return self.begin_saga(channel, io);
        }
        let epoch = slot.epoch;
        slot.in_flight[epoch as usize] += 1;
        io.body_mut().frames.top().expect("its frame was just pushed").epoch = epoch;
        self.give_to_module(channel, io);
    }

    #[inline(always)]
    pub(super) fn give_to_module(&mut self, channel: ChannelId, mut io: Io) {
        let slot = &mut self.channels[channel.0 as usize];
        let body = io.body_mut();
        let given = (body.lba, body.blocks);
        body.frames.top().expect("its frame was pushed when it came").given = given;
        match slot.module.as_mut() {
            // A piece of an emulated operation would come behind the abort of everything, and nothing would end it.
            Some(module) if !slot.removing => module.submit(io, &mut IoCx { inner: &mut self.inner, channel }),
            _ => IoCx { inner: &mut self.inner, channel }.complete(io, IoStatus::NoDevice),
        }
    }

    // ---- the way up ------------------------------------------------------------------------------------------------

    /// Routes a completed I/O one layer up.
    #[inline]
    fn finish(&mut self, mut io: Io) {
        let Some(frame) = io.body_mut().frames.top().copied() else {
            let client = io.body().tag.client;
            self.clients[client.0 as usize].inbox.push(Completion { body: io.into_body() });
            return;
        };
        let channel = frame.channel;
        if frame.forwarded {
            io.body_mut().frames.top().expect("it was just seen").forwarded = false;
            let slot = &mut self.channels[channel.0 as usize];
            match slot.module.as_mut() {
                Some(module) => module.completed(io, &mut IoCx { inner: &mut self.inner, channel }),
                None => self.inner.queue.complete(io),
            }
            return;
        }
        if frame.saga != NO_SAGA {
            return self.continue_saga(frame.saga, io);
        }
        self.leave(frame, io);
    }

    /// An I/O leaves a channel for good.
    #[inline(always)]
    pub(super) fn leave(&mut self, frame: Frame, mut io: Io) {
        io.body_mut().frames.pop();
        let channel = frame.channel;
        let slot = &mut self.channels[channel.0 as usize];
        let bytes = frame.blocks.saturating_mul(slot.geometry.block_size.into());
        if !io.body().uncounted {
            slot.stats.record(frame.op.kind(), bytes, frame.started, self.inner.now, io.body().status);
        }
        let count = &mut slot.in_flight[frame.epoch as usize];
        *count -= 1;
        let drained = *count == 0;
        let ending = slot.is_ending();
        let gated = !slot.gates.is_empty();
        self.inner.queue.complete(io);
        if drained && gated {
            self.gates_progress(channel);
        }
        if drained && ending {
            // Not at once: the I/O on the queue may still belong to a client that is about to let go of the channel.
            self.closing.push(channel);
        }
    }

    /// Runs until no I/O is on its way between layers. Whether what had waited for an I/O or for memory has gone on.
    pub fn run(&mut self) -> bool {
        let mut went_on = false;
        loop {
            while let Some(step) = self.inner.queue.pop() {
                match step {
                    Step::Submit(channel, io) => self.enter(channel, io),
                    Step::Complete(io) => self.finish(io),
                    Step::AbortAll(channel) => self.abort_all(channel),
                    Step::Poll(channel) => self.poll_channel(channel),
                }
            }
            if !self.admit_waiting() && !self.feed_bounce_waiters() {
                break;
            }
            went_on = true;
        }
        while let Some(channel) = self.closing.pop() {
            if self.channels.contains(channel.0 as usize) {
                self.close_if_done(channel);
            }
        }
        went_on
    }

    fn admit_waiting(&mut self) -> bool {
        let mut any = false;
        while !self.inner.free.is_empty() {
            let Some((channel, client, request)) = self.waiting.pop_front() else { break };
            let slot = &mut self.channels[channel.0 as usize];
            slot.waiting -= 1;
            if slot.is_ending() {
                // It may be refused without ever being counted, and the channel waits for it.
                self.closing.push(channel);
            }
            self.start(channel, client, request);
            any = true;
        }
        any
    }

    /// Hands file operations submitted since the last call to the host, and messages to other reactors.
    pub fn flush(&mut self) {
        self.inner.engine.flush();
        while let Some((reactor, message)) = self.outbox.pop_front() {
            if let Err(Full(message)) = self.group[reactor.0 as usize].send(message) {
                self.outbox.push_front((reactor, message));
                break;
            }
        }
    }

    /// Sends a message to another reactor with the next [`IoRuntime::flush`]; it waits in the outbox while that reactor's
    /// mailbox is full. For messages that must arrive, whose number something else bounds.
    pub fn post(&mut self, reactor: ReactorId, message: Message) {
        self.outbox.push_back((reactor, message));
    }

    /// Sends a message to another reactor's runtime; waits in the outbox while that reactor's mailbox is full. Bounded by
    /// the range locks and resets under way.
    pub(super) fn send_to(&mut self, reactor: ReactorId, work: impl FnOnce(&mut IoRuntime) + Send + 'static) {
        let message: Message = Box::new(move |cx: &mut Context| {
            let runtime = IoRuntime::of(cx);
            let mut runtime = runtime.borrow_mut();
            runtime.set_now(cx.now());
            work(&mut runtime);
            runtime.run();
            runtime.flush();
        });
        self.post(reactor, message);
    }

    fn poll(&mut self, now: Instant) -> Progress {
        self.set_now(now);
        let queue = &mut self.inner.queue;
        let mut busy = self.ring.pop_batch(RING_BATCH, |body| queue.complete(Io::from_body(body))) > 0;
        busy |= self.inner.engine.reap(&mut self.files_done) > 0;
        let mut done = std::mem::take(&mut self.files_done);
        for FileDone { token, payload, result } in done.drain(..) {
            let body = payload.into_any().downcast::<IoBody>().expect("this runtime submits only its own I/Os");
            let channel = ChannelId(token as u32);
            let io = Io::from_body(body);
            let slot = &mut self.channels[channel.0 as usize];
            let mut cx = IoCx { inner: &mut self.inner, channel };
            match slot.module.as_mut() {
                Some(module) => module.file_done(io, result, &mut cx),
                None => cx.complete(io, IoStatus::NoDevice),
            }
        }
        self.files_done = done;
        for index in 0..self.polled.len() {
            let channel = self.polled[index];
            let slot = &mut self.channels[channel.0 as usize];
            if let Some(module) = slot.module.as_mut() {
                busy |= module.poll(&mut IoCx { inner: &mut self.inner, channel }).is_busy();
            }
        }
        busy |= !self.inner.queue.is_empty() || !self.outbox.is_empty();
        busy |= self.run();
        self.flush();
        Progress::from_busy(busy)
    }

    /// Checks that nothing is lent: every I/O is in the pool, no saga is left, and the reserved buffer is home.
    ///
    /// # Panics
    /// When something is still out.
    pub fn assert_whole(&self) {
        assert_eq!(self.inner.free.len(), pool_size(self.config.io_pool), "I/Os are missing from the pool");
        assert!(self.sagas.is_empty(), "{} sagas are left", self.sagas.len());
        assert!(self.holds.is_empty(), "{} ranges are held", self.holds.len());
        assert_eq!(self.spares, 0, "spare I/Os are lent");
        assert!(self.bounce_waiters.is_empty() && self.reserve.is_some(), "bounce memory is out");
    }

    /// Whether nothing is outstanding anywhere on this reactor.
    pub fn is_quiet(&self) -> bool {
        self.inner.queue.is_empty()
            && self.waiting.is_empty()
            && self.inner.engine.in_flight() == 0
            && self.channels.iter().all(|(_, slot)| slot.outstanding() == 0)
    }
}

impl Drop for IoRuntime {
    fn drop(&mut self) {
        // What is still on its way ends with the reactor; nobody will read the ring again.
        self.home.inner.closed.store(true, Ordering::Release);
    }
}

impl std::fmt::Debug for IoRuntime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoRuntime")
            .field("reactor", &self.reactor)
            .field("channels", &self.channels.len())
            .field("free", &self.inner.free.len())
            .finish_non_exhaustive()
    }
}

/// I/Os in a pool of at least `wanted`.
fn pool_size(wanted: usize) -> usize {
    wanted.max(2).next_power_of_two()
}

#[inline]
fn check(slot: &Channel, op: Op, lba: u64, blocks: u64, payload: usize) -> IoStatus {
    if slot.removing || slot.module.is_none() {
        return IoStatus::NoDevice;
    }
    if matches!(op, Op::Flush | Op::Reset) {
        return IoStatus::Success;
    }
    if blocks == 0 || payload as u64 != op.payload_bytes(blocks, slot.geometry.block_size) {
        return IoStatus::Invalid;
    }
    if !slot.geometry.contains(lba, blocks) {
        return IoStatus::OutOfRange;
    }
    if op.modifies() && slot.geometry.read_only {
        return IoStatus::ReadOnly;
    }
    match op {
        Op::Copy { source_lba } if !slot.geometry.contains(source_lba, blocks) => IoStatus::OutOfRange,
        _ => IoStatus::Success,
    }
}

/// The extension under which a reactor keeps its runtime.
struct RuntimeSlot(SharedRuntime);

struct RuntimePoller(SharedRuntime);

impl Poller for RuntimePoller {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        self.0.borrow_mut().poll(cx.now())
    }

    fn deadline(&self) -> Option<Instant> {
        let runtime = self.0.borrow();
        let modules = runtime.polled.iter().filter_map(|id| runtime.channels[id.0 as usize].module.as_ref());
        modules.filter_map(|module| module.deadline()).min()
    }

    fn may_sleep(&mut self, _: &mut Context) -> bool {
        let mut runtime = self.0.borrow_mut();
        let runtime = &mut *runtime;
        // Every channel is asked, also after one has refused: asking is what arms it.
        let mut may = true;
        for id in &runtime.polled {
            if let Some(module) = runtime.channels[id.0 as usize].module.as_mut() {
                may &= module.may_sleep();
            }
        }
        may && runtime.ring.is_empty()
            && runtime.inner.queue.is_empty()
            && runtime.outbox.is_empty()
            && runtime.clients.iter().all(|(_, client)| client.inbox.is_empty())
    }
}
