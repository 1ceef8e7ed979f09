//! One reactor's NBD connections.
//!
//! # One poll
//! ```text
//! accept -> for each connection with input: receive -> operations -> bdev channel
//!        -> bdev runtime runs -> completions -> for each connection with output: gathered sends
//! ```
//!
//! # Invariants
//! - A connection's place in `conns` is kept until its last operation has come back, so a completion always finds its
//!   connection, and never another's.
//! - Payload memory that is short goes to the connections in the order in which they found it short: whoever waits stands in
//!   `memory_queue`, and while anybody does, only the first is served.
//! - A connection holds its export's channel for as long as it has its place.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use bdev::core::runtime::SharedRuntime;
use bdev::core::{BdevInfo, ChannelId, ClientId, Completion, IoRequest, IoRuntime, OpKind};
use reactor::net::{Listener, Stream};
use reactor::park::Ready;
use reactor::reactor::{Reply, WatchId};
use reactor::{Context, Instant, Poller, PollerId, Progress, ReactorId, Schedule};
use slab::Slab;

use crate::connection::{Connection, MAX_REQUEST_BYTES, Operation};
use crate::negotiation::Facts;

/// Connections that one reactor serves at once; more are turned away.
pub const MAX_CONNECTIONS: usize = 1024;
/// Connections taken from one listener in one poll.
const ACCEPT_BATCH: usize = 32;
/// Time for the handshake, and for a client to deliver what it began or to read what it asked for.
const PEER_PATIENCE: Duration = Duration::from_secs(30);
/// Time for clients of an export that ends to read their last answers.
const END_PATIENCE: Duration = Duration::from_secs(5);
/// How often timers of connections are looked at.
const TIMER_PERIOD: Duration = Duration::from_millis(500);
/// How soon a reactor that has nothing else to do looks for memory that came back from another thread.
const MEMORY_PERIOD: Duration = Duration::from_millis(1);
/// Bytes that one receive takes at most, besides data that lands in its place.
const SCRATCH_BYTES: usize = 256 * 1024;
/// Slices gathered into one send.
const SEND_SLICES: usize = 128;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH_BYTES]);
}

/// An export, as reactors see it.
#[derive(Debug)]
pub struct Export {
    /// Its identity.
    pub id: u64,
    /// The bdev.
    pub bdev: Arc<BdevInfo>,
    /// Its socket.
    pub socket: PathBuf,
    /// Clients may only read.
    pub read_only: bool,
    /// Connections that are open.
    pub connections: AtomicU32,
    /// It takes no new ones.
    pub ended: AtomicBool,
}

/// Connections on each reactor, for placing new ones.
#[derive(Debug)]
pub struct Loads(Vec<AtomicU32>);

impl Loads {
    /// No load on any of `reactors` reactors.
    pub fn new(reactors: usize) -> Loads {
        Loads((0..reactors).map(|_| AtomicU32::new(0)).collect())
    }

    /// The reactor with the fewest connections, counting one more there.
    fn place(&self) -> ReactorId {
        let least = self.0.iter().enumerate().min_by_key(|(_, load)| load.load(Ordering::Relaxed));
        let index = least.map_or(0, |(index, _)| index);
        self.0[index].fetch_add(1, Ordering::Relaxed);
        ReactorId(index as u32)
    }

    fn release(&self, reactor: ReactorId) {
        self.0[reactor.0 as usize].fetch_sub(1, Ordering::Relaxed);
    }
}

/// Keys of watches: connections have even ones, listeners odd ones.
fn conn_key(index: usize) -> u64 {
    (index as u64) << 1
}

fn listener_key(index: usize) -> u64 {
    (index as u64) << 1 | 1
}

/// An operation's mark: whose it is, and which.
fn mark(index: usize, tag: u32) -> u64 {
    (index as u64) << 32 | u64::from(tag)
}

struct Conn {
    stream: Box<dyn Stream>,
    connection: Connection,
    export: Arc<Export>,
    channel: ChannelId,
    /// Received and not yet taken by the machine.
    stash: VecDeque<u8>,
    /// Operations in the bdev layer.
    outstanding: u32,
    readable: bool,
    /// The end of the client's stream has been announced, which happens once.
    ended: bool,
    writable: bool,
    closed: bool,
    /// In [`NbdGroup::runnable`].
    queued: bool,
    /// In [`NbdGroup::flushing`].
    flushing: bool,
    /// In [`NbdGroup::memory_queue`].
    waits_for_memory: bool,
    watch: WatchId,
    since: Instant,
    /// Since when the client has owed something, and how far it was then.
    owes_since: Option<(Instant, u64)>,
}

impl Conn {
    /// Whether receiving, or going on with what was received, may get somewhere.
    fn can_run(&self) -> bool {
        if self.closed || self.waits_for_memory {
            return false;
        }
        let has_bytes = self.readable || !self.stash.is_empty();
        self.connection.wants_memory().is_some() || has_bytes && self.connection.wants_input()
    }
}

/// An export that ends here, and who is told when it has.
struct Ending {
    export: u64,
    deadline: Instant,
    reply: Option<Reply<()>>,
}

/// One reactor's part of the server.
pub struct NbdGroup {
    reactor: ReactorId,
    poller: PollerId,
    runtime: SharedRuntime,
    client: ClientId,
    loads: Arc<Loads>,
    conns: Slab<Conn>,
    listeners: Slab<(Arc<Export>, Box<dyn Listener>, WatchId)>,
    runnable: VecDeque<usize>,
    flushing: Vec<usize>,
    memory_queue: VecDeque<usize>,
    /// Connections that are over, with the reason.
    over: Vec<(usize, String)>,
    completions: Vec<Completion>,
    endings: Vec<Ending>,
    accepting: bool,
    /// Connections wait that could not be accepted: look again with the next timer.
    accept_later: bool,
    now: Instant,
    next_timer: Instant,
}

/// The group as others on the reactor hold it.
pub type SharedGroup = Rc<RefCell<NbdGroup>>;

struct GroupSlot(SharedGroup);

impl NbdGroup {
    /// Builds the group of a reactor on which the bdev layer is installed.
    pub fn install(cx: &mut Context, loads: Arc<Loads>) -> SharedGroup {
        let runtime = IoRuntime::of(cx);
        let client = runtime.borrow_mut().add_client();
        let poller = cx.reserve_poller();
        let group = NbdGroup {
            reactor: cx.id(),
            poller,
            runtime,
            client,
            loads,
            conns: Slab::new(),
            listeners: Slab::new(),
            runnable: VecDeque::new(),
            flushing: Vec::new(),
            memory_queue: VecDeque::new(),
            over: Vec::new(),
            completions: Vec::new(),
            endings: Vec::new(),
            accepting: false,
            accept_later: false,
            now: cx.now(),
            next_timer: cx.now() + TIMER_PERIOD,
        };
        let shared: SharedGroup = Rc::new(RefCell::new(group));
        cx.insert(GroupSlot(Rc::clone(&shared)));
        let name = format!("nbd_{:03}", cx.id().0);
        cx.add_reserved_poller(poller, name, Schedule::Active, Box::new(GroupPoller(Rc::clone(&shared))));
        shared
    }

    /// The group of the reactor behind `cx`.
    ///
    /// # Panics
    /// If it was not installed.
    pub fn of(cx: &Context) -> SharedGroup {
        let slot = cx.get::<GroupSlot>().expect("an NBD group is installed on every reactor");
        Rc::clone(&slot.0)
    }

    fn poll(&mut self, cx: &mut Context) -> Progress {
        self.now = cx.now();
        let mut busy = false;
        if std::mem::take(&mut self.accepting) {
            busy |= self.accept(cx);
        }
        if !self.conns.is_empty() {
            let runtime = Rc::clone(&self.runtime);
            let mut runtime = runtime.borrow_mut();
            runtime.set_now(cx.now());
            busy |= self.feed_memory_queue(&mut runtime);
            busy |= self.receive_all(&mut runtime);
            runtime.run();
            busy |= self.complete_all(&mut runtime);
            // Completions may have brought operations of their own.
            runtime.run();
            runtime.flush();
            busy |= self.flush_all(&mut runtime);
            if cx.now() >= self.next_timer {
                self.run_timers();
            }
        }
        if self.accept_later && cx.now() >= self.next_timer {
            self.next_timer = cx.now() + TIMER_PERIOD;
            self.accept_later = false;
            self.accepting = true;
        }
        busy |= !self.over.is_empty();
        self.close_over(cx);
        self.finish_endings();
        Progress::from_busy(busy)
    }

    // ---- connections come ------------------------------------------------------------------------------------------

    fn accept(&mut self, cx: &mut Context) -> bool {
        let mut arrived = Vec::new();
        for (_, (export, listener, _)) in &mut self.listeners {
            for taken in 0.. {
                if taken == ACCEPT_BATCH {
                    // There may be more: the next poll looks again.
                    self.accepting = true;
                    break;
                }
                match listener.accept() {
                    Ok(stream) => arrived.push((Arc::clone(export), stream)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => {
                        tracing::warn!(socket = %export.socket.display(), %error, "a connection cannot be accepted");
                        self.accept_later = true;
                        break;
                    }
                }
            }
        }
        let busy = !arrived.is_empty();
        for (export, stream) in arrived {
            self.place(cx, export, stream);
        }
        busy
    }

    /// Finds a reactor for a new connection and brings it there.
    fn place(&mut self, cx: &mut Context, export: Arc<Export>, stream: Box<dyn Stream>) {
        let reactor = self.loads.place();
        if reactor == self.reactor {
            return self.adopt(cx, export, stream);
        }
        let socket = export.socket.clone();
        let message = Box::new(move |cx: &mut Context| {
            let group = NbdGroup::of(cx);
            group.borrow_mut().adopt(cx, export, stream);
        });
        if cx.group()[reactor.0 as usize].send(message).is_err() {
            self.loads.release(reactor);
            tracing::warn!(socket = %socket.display(), reactor = reactor.0, "a connection was turned away: its reactor does not keep up");
        }
    }

    /// Takes a connection in on this reactor. Its load has been counted.
    fn adopt(&mut self, cx: &mut Context, export: Arc<Export>, stream: Box<dyn Stream>) {
        if let Err(why) = self.try_adopt(cx, &export, stream) {
            self.loads.release(self.reactor);
            tracing::warn!(socket = %export.socket.display(), why, "a connection was turned away");
        }
    }

    fn try_adopt(&mut self, cx: &mut Context, export: &Arc<Export>, stream: Box<dyn Stream>) -> Result<(), String> {
        if export.ended.load(Ordering::Acquire) {
            return Err("the export ends".into());
        }
        if self.conns.len() >= MAX_CONNECTIONS {
            return Err(format!("the reactor has all of the {MAX_CONNECTIONS} that it may have"));
        }
        let runtime = Rc::clone(&self.runtime);
        let mut runtime = runtime.borrow_mut();
        let channel = runtime.get_channel(&export.bdev).map_err(|error| format!("no channel: {error}"))?;
        let key = conn_key(self.conns.vacant_key());
        let watch = match cx.watch(self.poller, stream.source(), key) {
            Ok(watch) => watch,
            Err(error) => {
                runtime.put_channel(channel);
                return Err(format!("it cannot be watched: {error}"));
            }
        };
        let facts = facts(export, &mut runtime, channel);
        export.connections.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(socket = %export.socket.display(), reactor = self.reactor.0, "NBD client connected");
        let index = self.conns.insert(Conn {
            stream,
            connection: Connection::new(facts),
            export: Arc::clone(export),
            channel,
            stash: VecDeque::new(),
            outstanding: 0,
            readable: true,
            ended: false,
            writable: true,
            closed: false,
            queued: false,
            flushing: false,
            waits_for_memory: false,
            watch,
            since: cx.now(),
            owes_since: None,
        });
        self.want_flush(index);
        Ok(())
    }

    // ---- the way in ------------------------------------------------------------------------------------------------

    fn want_run(&mut self, index: usize) {
        if let Some(conn) = self.conns.get_mut(index)
            && !conn.queued
            && conn.can_run()
        {
            conn.queued = true;
            self.runnable.push_back(index);
        }
    }

    fn want_flush(&mut self, index: usize) {
        if let Some(conn) = self.conns.get_mut(index)
            && !conn.flushing
            && !conn.closed
            && (conn.writable && conn.connection.wants_output() || conn.connection.is_over())
        {
            conn.flushing = true;
            self.flushing.push(index);
        }
    }

    /// Serves those that wait for memory, in their order, as far as there is some.
    fn feed_memory_queue(&mut self, runtime: &mut IoRuntime) -> bool {
        let mut busy = false;
        while let Some(&index) = self.memory_queue.front() {
            let Some(conn) = self.conns.get_mut(index).filter(|conn| !conn.closed && conn.waits_for_memory) else {
                self.memory_queue.pop_front();
                continue;
            };
            if let Some(wanted) = conn.connection.wants_memory()
                && !runtime.pool().has_free(wanted)
            {
                break;
            }
            conn.waits_for_memory = false;
            self.memory_queue.pop_front();
            self.run_one(runtime, index, true);
            if self.conns.get(index).is_some_and(|conn| conn.waits_for_memory) {
                // Scattered as it was, it did not do: back to the front.
                if self.memory_queue.back() == Some(&index) {
                    self.memory_queue.pop_back();
                    self.memory_queue.push_front(index);
                }
                break;
            }
            busy = true;
        }
        busy
    }

    fn receive_all(&mut self, runtime: &mut IoRuntime) -> bool {
        let mut busy = false;
        // Once round: what becomes runnable meanwhile has its turn in the next poll.
        for _ in 0..self.runnable.len() {
            let Some(index) = self.runnable.pop_front() else { break };
            let Some(conn) = self.conns.get_mut(index) else { continue };
            conn.queued = false;
            if conn.can_run() {
                busy = true;
                self.run_one(runtime, index, false);
            }
        }
        busy
    }

    /// Lets a connection go on with what it has received, or receive more, and submits what comes of it.
    fn run_one(&mut self, runtime: &mut IoRuntime, index: usize, first_in_line: bool) {
        let others_wait = !first_in_line && !self.memory_queue.is_empty();
        let Some(conn) = self.conns.get_mut(index) else { return };
        let size = runtime.geometry(conn.channel).bytes();
        conn.connection.set_size(size);
        let mut short = false;
        let ran = conn.run(runtime, others_wait, &mut short);
        conn.submit(runtime, self.client, index);
        match ran {
            Err(why) => self.over.push((index, why)),
            Ok(()) => {
                if short && !conn.waits_for_memory {
                    conn.waits_for_memory = true;
                    self.memory_queue.push_back(index);
                }
            }
        }
        self.want_run(index);
        self.want_flush(index);
    }

    // ---- the way out -----------------------------------------------------------------------------------------------

    fn complete_all(&mut self, runtime: &mut IoRuntime) -> bool {
        let mut completions = std::mem::take(&mut self.completions);
        runtime.take_completions(self.client, &mut completions);
        let busy = !completions.is_empty();
        for mut completion in completions.drain(..) {
            let (index, tag) = ((completion.user() >> 32) as usize, completion.user() as u32);
            let conn = self.conns.get_mut(index).expect("a connection keeps its place while it has operations");
            conn.outstanding -= 1;
            if conn.closed {
                runtime.recycle(completion);
                self.forget_if_done(runtime, index);
                continue;
            }
            let (status, bufs) = (completion.status(), completion.take_bufs());
            runtime.recycle(completion);
            conn.connection.complete(tag, status, bufs, &mut |bufs| runtime.pool().put(bufs));
            conn.submit(runtime, self.client, index);
            self.want_flush(index);
            self.want_run(index);
        }
        self.completions = completions;
        busy
    }

    fn flush_all(&mut self, runtime: &mut IoRuntime) -> bool {
        let busy = !self.flushing.is_empty();
        for at in 0..self.flushing.len() {
            let index = self.flushing[at];
            let Some(conn) = self.conns.get_mut(index) else { continue };
            conn.flushing = false;
            if conn.closed {
                continue;
            }
            if let Err(error) = conn.send_all(runtime) {
                self.over.push((index, format!("sending failed: {error}")));
            } else if conn.connection.is_over() {
                self.over.push((index, "it is done".into()));
            } else {
                // What was sent may have made room for more requests.
                self.want_run(index);
            }
        }
        self.flushing.clear();
        busy
    }

    // ---- the end ---------------------------------------------------------------------------------------------------

    fn run_timers(&mut self) {
        let now = self.now;
        self.next_timer = now + TIMER_PERIOD;
        self.accepting |= std::mem::take(&mut self.accept_later);
        for (index, conn) in &mut self.conns {
            if conn.closed {
                continue;
            }
            if conn.connection.is_negotiating() {
                if now.since(conn.since) >= PEER_PATIENCE {
                    self.over.push((index, "it chose no export in time".into()));
                }
                continue;
            }
            if !conn.connection.peer_owes() {
                conn.owes_since = None;
                continue;
            }
            let progress = conn.connection.progress();
            let (since, then) = *conn.owes_since.get_or_insert((now, progress));
            if then != progress {
                conn.owes_since = Some((now, progress));
            } else if now.since(since) >= PEER_PATIENCE {
                self.over.push((index, "it neither sends the rest of its request nor reads its replies".into()));
            }
        }
        for ending in self.endings.iter().filter(|ending| now >= ending.deadline) {
            // An operation that is still in the device is waited for all the same.
            for (index, _) in self.conns.iter().filter(|(_, conn)| !conn.closed && conn.export.id == ending.export) {
                self.over.push((index, "it did not read its last replies in time".into()));
            }
        }
    }

    fn close_over(&mut self, cx: &mut Context) {
        let runtime = Rc::clone(&self.runtime);
        for (index, why) in std::mem::take(&mut self.over) {
            let Some(conn) = self.conns.get_mut(index).filter(|conn| !conn.closed) else { continue };
            tracing::debug!(socket = %conn.export.socket.display(), why, "NBD connection closes");
            let mut runtime = runtime.borrow_mut();
            conn.closed = true;
            cx.unwatch(conn.watch);
            conn.connection.close(&mut |bufs| runtime.pool().put(bufs));
            conn.stash = VecDeque::new();
            conn.stream.shutdown_write();
            self.forget_if_done(&mut runtime, index);
        }
    }

    /// A closed connection whose last operation has come back gives up its place.
    fn forget_if_done(&mut self, runtime: &mut IoRuntime, index: usize) {
        let conn = &self.conns[index];
        if !conn.closed || conn.outstanding > 0 {
            return;
        }
        let conn = self.conns.remove(index);
        runtime.put_channel(conn.channel);
        conn.export.connections.fetch_sub(1, Ordering::Relaxed);
        self.loads.release(self.reactor);
    }

    /// Starts to end an export here; `reply` is answered when nothing of it is left.
    pub fn end_export(&mut self, cx: &Context, export: u64, reply: Reply<()>) {
        let runtime = Rc::clone(&self.runtime);
        let of_it: Vec<usize> =
            self.conns.iter().filter(|(_, conn)| conn.export.id == export).map(|(index, _)| index).collect();
        for index in of_it {
            let mut runtime = runtime.borrow_mut();
            let conn = &mut self.conns[index];
            if conn.closed {
                continue;
            }
            conn.connection.shut_down(&mut |bufs| runtime.pool().put(bufs));
            // A request that the client has sent already is read once more, and refused.
            self.want_run(index);
            self.want_flush(index);
        }
        self.endings.push(Ending { export, deadline: cx.now() + END_PATIENCE, reply: Some(reply) });
    }

    fn finish_endings(&mut self) {
        if self.endings.is_empty() {
            return;
        }
        let conns = &self.conns;
        self.endings.retain_mut(|ending| {
            let left = conns.iter().any(|(_, conn)| conn.export.id == ending.export);
            if !left && let Some(reply) = ending.reply.take() {
                reply.send(());
            }
            left
        });
    }

    // ---- listeners -------------------------------------------------------------------------------------------------

    /// Accepts connections to `export` on this reactor; they are spread from here.
    ///
    /// # Errors
    /// When the listener cannot be watched.
    pub fn add_listener(
        &mut self,
        cx: &mut Context,
        export: Arc<Export>,
        listener: Box<dyn Listener>,
    ) -> io::Result<()> {
        let key = listener_key(self.listeners.vacant_key());
        let watch = cx.watch(self.poller, listener.source(), key)?;
        self.listeners.insert((export, listener, watch));
        self.accepting = true;
        Ok(())
    }

    /// Accepts no more connections to an export. The listener is for the caller to drop.
    pub fn remove_listener(&mut self, cx: &mut Context, export: u64) -> Option<Box<dyn Listener>> {
        let key = self.listeners.iter().find(|(_, (known, ..))| known.id == export).map(|(key, _)| key)?;
        let (_, listener, watch) = self.listeners.remove(key);
        cx.unwatch(watch);
        Some(listener)
    }

    fn ready(&mut self, key: u64, ready: Ready) {
        let index = (key >> 1) as usize;
        if key & 1 == 1 {
            self.accepting = true;
            return;
        }
        let Some(conn) = self.conns.get_mut(index) else { return };
        conn.readable |= ready.readable;
        conn.writable |= ready.writable;
        conn.ended |= ready.ended;
        self.want_run(index);
        self.want_flush(index);
    }

    fn deadline(&self) -> Option<Instant> {
        let timer = (!self.conns.is_empty() || self.accept_later).then_some(self.next_timer);
        let memory = (!self.memory_queue.is_empty()).then(|| self.now + MEMORY_PERIOD);
        timer.into_iter().chain(memory).min()
    }

    fn is_idle(&self) -> bool {
        !self.accepting && self.over.is_empty() && self.runnable.is_empty() && self.flushing.is_empty()
    }
}

/// What clients of an export are told, on this reactor.
fn facts(export: &Export, runtime: &mut IoRuntime, channel: ChannelId) -> Facts {
    let most = runtime.pool().max_payload() as u32;
    let geometry = runtime.geometry(channel);
    let bdev = &export.bdev;
    let block_size = geometry.block_size;
    // The whole of a request has to fit the memory that there is.
    let max_request = MAX_REQUEST_BYTES.min(most.checked_ilog2().map_or(0, |bits| 1 << bits)).max(block_size);
    let preferred = geometry.physical_block_size.max(block_size).max(4096);
    Facts {
        name: bdev.name().into(),
        description: bdev.device().product_name().into(),
        size: geometry.bytes(),
        block_size,
        preferred: preferred.checked_next_power_of_two().map_or(max_request, |bytes| bytes.min(max_request)),
        max_request,
        read_only: export.read_only || geometry.read_only,
        flush: bdev.supports(OpKind::Flush),
        trim: bdev.supports(OpKind::Unmap),
        write_zeroes: bdev.supports(OpKind::WriteZeroes),
    }
}

impl Conn {
    /// Hands the machine's operations to the bdev layer.
    #[inline]
    fn submit(&mut self, runtime: &mut IoRuntime, client: ClientId, index: usize) {
        while let Some(Operation { tag, op, lba, blocks, bufs }) = self.connection.poll_operation() {
            self.outstanding += 1;
            runtime.submit(self.channel, client, IoRequest { op, lba, blocks, bufs, user: mark(index, tag) });
        }
    }

    /// Goes on with what was received, and receives once if that is used up. `short` tells that memory was not to be had.
    fn run(&mut self, runtime: &mut IoRuntime, others_wait: bool, short: &mut bool) -> Result<(), String> {
        let pool = runtime.pool();
        let mut alloc = |len: usize| {
            let bufs = if others_wait { None } else { pool.alloc(len) };
            *short |= bufs.is_none();
            bufs
        };
        if self.stash.is_empty() {
            self.connection.handle_input(&[], &mut alloc).map_err(|fault| fault.to_string())?;
        } else {
            let taken = self.connection.handle_input(self.stash.make_contiguous(), &mut alloc);
            self.stash.drain(..taken.map_err(|fault| fault.to_string())?);
            if self.stash.is_empty() {
                // Memory for what could not be taken is only held while there is something.
                self.stash = VecDeque::new();
            }
        }
        if !(self.stash.is_empty() && self.readable && self.connection.wants_input()) {
            return Ok(());
        }
        let more = SCRATCH.with_borrow_mut(|scratch| self.receive(scratch, &mut alloc))?;
        if !more {
            self.connection.end_of_input(&mut |bufs| runtime.pool().put(bufs));
        }
        Ok(())
    }

    /// One receive; `false` at the end of the client's stream.
    fn receive(
        &mut self,
        scratch: &mut [u8],
        alloc: &mut dyn FnMut(usize) -> Option<reactor::Buffers>,
    ) -> Result<bool, String> {
        let direct = self.connection.read_target();
        let direct_len = direct.as_ref().map_or(0, |target| target.len());
        let asked = direct_len + scratch.len();
        let received = match direct {
            Some(target) => self.stream.recv(&mut [IoSliceMut::new(target), IoSliceMut::new(scratch)]),
            None => self.stream.recv(&mut [IoSliceMut::new(scratch)]),
        };
        let n = match received {
            Ok(0) => return Ok(false),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return Ok(true);
            }
            Err(error) => return Err(format!("receiving failed: {error}")),
        };
        // A short count means that the socket is empty, and the next bytes will be announced; but the end behind these
        // bytes may have been announced with them.
        self.readable = n == asked || self.ended;
        let direct_taken = n.min(direct_len);
        if direct_taken > 0 {
            self.connection.read_done(direct_taken);
        }
        let rest = &scratch[..n - direct_taken];
        let taken = self.connection.handle_input(rest, alloc).map_err(|fault| fault.to_string())?;
        self.stash.extend(&rest[taken..]);
        Ok(true)
    }

    fn send_all(&mut self, runtime: &mut IoRuntime) -> io::Result<()> {
        while self.writable && self.connection.wants_output() {
            let mut slices = [IoSlice::new(&[]); SEND_SLICES];
            let count = self.connection.poll_output(&mut slices);
            let offered: usize = slices[..count].iter().map(|slice| slice.len()).sum();
            match self.stream.send(&slices[..count]) {
                Ok(n) => {
                    self.writable = n == offered;
                    self.connection.sent(n, &mut |bufs| runtime.pool().put(bufs));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

struct GroupPoller(SharedGroup);

impl Poller for GroupPoller {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        self.0.borrow_mut().poll(cx)
    }

    fn ready(&mut self, key: u64, ready: Ready) {
        self.0.borrow_mut().ready(key, ready);
    }

    fn deadline(&self) -> Option<Instant> {
        self.0.borrow().deadline()
    }

    fn may_sleep(&mut self, _: &mut Context) -> bool {
        self.0.borrow().is_idle()
    }
}

impl std::fmt::Debug for NbdGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdGroup")
            .field("reactor", &self.reactor)
            .field("conns", &self.conns.len())
            .finish_non_exhaustive()
    }
}
