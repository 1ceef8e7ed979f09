//! One reactor's part of the target: its queue pairs, and the commands on them.
//!
//! # One poll
//! ```text
//! accept -> for each queue pair with input: receive -> commands -> bdev channel
//!        -> bdev runtime runs -> completions -> for each queue pair with output: one gathered send
//! ```
//!
//! # Rooms
//! | module | concern |
//! |---|---|
//! | [`connect`] | from a new connection to a queue of a controller |
//! | [`commands`] | executing and completing commands |
//! | [`apply`] | moving to a new view; draining what is gone |
//! | [`moving`] | moving a queue to another reactor |
//! | [`groups`] | the poll groups of all reactors, as the control plane reaches them |
//!
//! # Invariants
//! - A queue pair's place in `qpairs` is kept until its last command has come back from the bdev layer, so a completion
//!   always finds its queue, and never another's.
//! - `outstanding` of a namespace counts the operations that hold its channel; the channel is given back when the
//!   namespace is gone from the view and the count is zero.

mod apply;
mod commands;
mod connect;
pub mod groups;
pub mod moving;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bdev::core::runtime::SharedRuntime;
use bdev::core::{ChannelId, ClientId, Completion, IoRuntime};
use reactor::park::Ready;
use reactor::placement::Placement;
use reactor::{Buffers, Context, Instant, Poller, PollerId, Progress, ReactorId, Schedule};
use slab::Slab;

use super::controller::Controller;
use super::shared::{ControllerShared, ControllerTable};
use super::system::PollGroupStats;
use super::transport::{Acceptor, Event, Group, Incoming, KEY_GROUP, KEY_LISTENER, KEY_QPAIR, Life, Qpair};
use super::view::{ListenAddress, ListenerView, NamespaceView, TargetView};
use crate::spec::{IoCommand, Status};

use apply::Applying;
use moving::{Departure, Parcel};

/// Connections that one reactor serves at once; more are turned away.
pub const MAX_QPAIRS: usize = 4096;
/// Connections taken from one listener in one poll.
const ACCEPT_BATCH: usize = 32;
/// Time for a new connection to be connected to a controller, and for a peer to deliver what is due.
const PEER_PATIENCE: Duration = Duration::from_secs(30);
/// Payload that takes about as long as everything else about a command; a command of this size counts as two units.
const UNIT_BYTES: u64 = 8192;
/// How often timers of connections are looked at.
const TIMER_PERIOD: Duration = Duration::from_millis(500);

fn qpair_key(index: usize) -> u64 {
    (index as u64) << 2 | KEY_QPAIR
}

fn listener_key(index: usize) -> u64 {
    (index as u64) << 2 | KEY_LISTENER
}

/// Queue pairs on each reactor, for placing new ones. The address that they come from stands for the host: nothing else is known
/// of one when its connection is accepted.
#[derive(Debug)]
pub struct Loads(Placement<IpAddr>);

impl Loads {
    /// No load on any of `reactors` reactors.
    pub fn new(reactors: usize) -> Loads {
        Loads(Placement::new(reactors, MAX_QPAIRS))
    }

    /// The reactor for a connection from `owner`, counting one more there.
    fn place(&self, cx: &Context, owner: IpAddr) -> ReactorId {
        self.0.place(cx.now(), |id| cx.group()[id.0 as usize].load(cx.now()), owner)
    }

    fn reserve(&self, now: Instant, reactor: ReactorId, owner: IpAddr) -> bool {
        self.0.reserve(now, reactor, owner)
    }

    fn release(&self, reactor: ReactorId, owner: IpAddr) {
        self.0.release(reactor, &owner);
    }
}

/// What a queue pair is.
// Nearly all are I/O queues, whose state is looked at with every command: no pointer to it.
#[allow(clippy::large_enum_variant)]
enum Role {
    /// Nothing yet: only Connect is taken.
    New,
    /// The admin queue of a controller.
    Admin(Box<AdminQueue>),
    /// An I/O queue.
    Io(IoQueue),
}

struct AdminQueue {
    controller: Controller,
    shared: Arc<ControllerShared>,
}

struct IoQueue {
    shared: Arc<ControllerShared>,
    qid: u16,
    /// It is in its controller's list of I/O queues.
    listed: bool,
    /// Key of the subsystem in [`PollGroup::subsystems`].
    subsystem: usize,
    /// The first half of a fused operation, waiting for the second.
    fused: Option<HeldFused>,
    /// What it did in this poll, to be added to the controller's counters at its end.
    tally: Tally,
    /// Work that it has been, for telling which queues load a reactor; see [`UNIT_BYTES`].
    units: u64,
}

#[derive(Default)]
struct Tally {
    bytes_read: u64,
    bytes_written: u64,
    reads: u64,
    writes: u64,
    /// Commands that the SMART log does not count; they keep the association alive all the same.
    others: u64,
    media_errors: u64,
}

struct HeldFused {
    /// Slot and running number.
    at: (u16, u32),
    nsid: u32,
    command: IoCommand,
    data: Buffers,
}

/// What a slot of a queue pair is doing.
#[derive(Clone, Copy, Debug)]
enum Work {
    /// Nothing in the bdev layer.
    None,
    /// Operations of the bdev layer.
    Io {
        /// Key of the namespace in [`PollGroup::namespaces`].
        namespace: usize,
        /// Operations that have not come back.
        left: u32,
        /// The first failure.
        status: Status,
        /// The payload goes to the host.
        to_host: bool,
        /// The slot of the first half of a fused operation, completed together with this one.
        fused_with: Option<u16>,
        /// The command, for the error log.
        origin: Origin,
    },
}

/// What the error log says of a command.
#[derive(Clone, Copy, Debug)]
struct Origin {
    cid: u16,
    opcode: u8,
    nsid: u32,
    lba: u64,
}

struct Qp {
    qpair: Box<dyn Qpair>,
    role: Role,
    /// Tells this queue pair's completions from those of an earlier one in the same place.
    generation: u32,
    work: Vec<Work>,
    /// Operations in the bdev layer.
    outstanding: u32,
    /// In [`PollGroup::runnable`].
    queued: bool,
    /// In [`PollGroup::flushing`].
    flushing: bool,
    closed: bool,
    /// Where the host came in, as the listener's address says (which may be a wildcard).
    listener: ListenAddress,
    /// That listener as it is in the view, of an I/O queue; `None` when its subsystem does not have it any more.
    entrance: Option<Arc<ListenerView>>,
    since: Instant,
    /// Since when the peer has been due without anything having arrived.
    due_since: Option<Instant>,
}

/// Memory of one queue pair in its poll group, beside its transport's, with queues of `depth` entries at most.
pub(super) const fn queue_pair_bytes(depth: usize) -> usize {
    size_of::<Qp>() + (depth + 1) * size_of::<Work>()
}

/// A subsystem as this reactor uses it.
struct LocalSubsystem {
    nqn: String,
    incarnation: u64,
    /// Keys into [`PollGroup::namespaces`] by NSID minus one.
    table: Vec<Option<usize>>,
    ana_reporting: bool,
    /// I/O queues of it on this reactor.
    queues: u32,
    gone: bool,
}

struct LocalNamespace {
    view: Arc<NamespaceView>,
    channel: Option<ChannelId>,
    outstanding: u32,
    gone: bool,
}

/// One reactor's part of the target.
pub struct PollGroup {
    reactor: ReactorId,
    poller: PollerId,
    runtime: SharedRuntime,
    client: ClientId,
    view: Arc<TargetView>,
    table: Arc<ControllerTable>,
    loads: Arc<Loads>,
    qpairs: Slab<Qp>,
    /// What queue pairs of a transport share; see [`Group`].
    groups: Vec<Box<dyn Group>>,
    /// Keys of queue pairs that a group has woken.
    woken: Vec<u64>,
    next_generation: u32,
    runnable: VecDeque<usize>,
    flushing: Vec<usize>,
    listeners: Slab<(ListenAddress, Box<dyn Acceptor>)>,
    accepting: bool,
    /// Connections wait that could not be accepted: look again with the next timer.
    accept_later: bool,
    subsystems: Slab<LocalSubsystem>,
    subsystem_by_nqn: HashMap<String, usize>,
    namespaces: Slab<LocalNamespace>,
    applying: Vec<Applying>,
    /// Queues that are to go to other reactors. Each has its place reserved there.
    departures: Vec<Departure>,
    /// Queues from other reactors that wait for the view which they have left.
    arrivals: Vec<Parcel>,
    events: Vec<Event>,
    completions: Vec<Completion>,
    /// Queue pairs that ended and wait to be closed, with the reason.
    ended: Vec<(usize, String)>,
    /// Admin queues whose controllers wait for their I/O queues to be gone, with their generations.
    disabling: Vec<(usize, u32)>,
    /// When the target started.
    started: Instant,
    next_timer: Instant,
    pending_io: u64,
    stats: Counts,
}

#[derive(Default)]
struct Counts {
    admin_qpairs: u32,
    io_qpairs: u32,
    completed: u64,
    moved_in: u64,
    moved_out: u64,
}

/// The poll group as others on the reactor hold it.
pub type SharedGroup = Rc<RefCell<PollGroup>>;

struct GroupSlot(SharedGroup);

impl PollGroup {
    /// Builds the poll group of a reactor on which the bdev layer is installed.
    pub fn install(cx: &mut Context, table: Arc<ControllerTable>, loads: Arc<Loads>) -> SharedGroup {
        let runtime = IoRuntime::of(cx);
        let client = runtime.borrow_mut().add_client();
        let poller = cx.reserve_poller();
        let group = PollGroup {
            reactor: cx.id(),
            poller,
            runtime,
            client,
            view: Arc::default(),
            table,
            loads,
            qpairs: Slab::new(),
            groups: Vec::new(),
            woken: Vec::new(),
            next_generation: 0,
            runnable: VecDeque::new(),
            flushing: Vec::new(),
            listeners: Slab::new(),
            accepting: false,
            accept_later: false,
            subsystems: Slab::new(),
            subsystem_by_nqn: HashMap::new(),
            namespaces: Slab::new(),
            applying: Vec::new(),
            departures: Vec::new(),
            arrivals: Vec::new(),
            events: Vec::new(),
            completions: Vec::new(),
            ended: Vec::new(),
            disabling: Vec::new(),
            started: cx.now(),
            next_timer: cx.now() + TIMER_PERIOD,
            pending_io: 0,
            stats: Counts::default(),
        };
        let shared: SharedGroup = Rc::new(RefCell::new(group));
        cx.insert(GroupSlot(Rc::clone(&shared)));
        let name = super::system::poll_group_name(cx.id());
        cx.add_reserved_poller(poller, name, Schedule::Active, Box::new(GroupPoller(Rc::clone(&shared))));
        shared
    }

    /// The poll group of the reactor behind `cx`.
    ///
    /// # Panics
    /// If it was not installed.
    pub fn of(cx: &Context) -> SharedGroup {
        let slot = cx.get::<GroupSlot>().expect("a poll group is installed on every reactor");
        Rc::clone(&slot.0)
    }

    fn poll(&mut self, cx: &mut Context) -> Progress {
        let mut busy = false;
        if std::mem::take(&mut self.accepting) {
            busy |= self.accept(cx);
        }
        let runtime = Rc::clone(&self.runtime);
        {
            let mut runtime = runtime.borrow_mut();
            runtime.set_now(cx.now());
            busy |= self.poll_groups(cx, &mut runtime);
            busy |= self.receive_all(cx, &mut runtime);
            runtime.run();
            busy |= self.complete_all(&mut runtime);
            // Completions may have let waiting commands go on, whose operations have to be run in turn.
            runtime.run();
            runtime.flush();
            busy |= self.flush_all(&mut runtime);
        }
        if cx.now() >= self.next_timer {
            self.run_timers(cx.now());
        }
        busy |= !self.ended.is_empty();
        self.close_ended(cx);
        if !self.departures.is_empty() {
            self.leave_when_quiet(cx);
        }
        self.finish_disabling(cx.now());
        self.finish_applying();
        Progress::from_busy(busy)
    }

    fn poll_groups(&mut self, cx: &mut Context, runtime: &mut IoRuntime) -> bool {
        let mut busy = false;
        for group in &mut self.groups {
            busy |= group.poll(cx, runtime.pool(), &mut self.woken);
        }
        while let Some(key) = self.woken.pop() {
            let index = (key >> 2) as usize;
            if let Some(qp) = self.qpairs.get_mut(index)
                && !qp.queued
            {
                qp.queued = true;
                self.runnable.push_back(index);
            }
        }
        busy
    }

    fn receive_all(&mut self, cx: &Context, runtime: &mut IoRuntime) -> bool {
        let mut busy = false;
        let mut events = std::mem::take(&mut self.events);
        // Once round: what becomes runnable meanwhile has its turn in the next poll.
        for _ in 0..self.runnable.len() {
            let Some(index) = self.runnable.pop_front() else { break };
            let Some(qp) = self.qpairs.get_mut(index) else { continue };
            qp.queued = false;
            if qp.closed {
                continue;
            }
            let life = qp.qpair.receive(runtime.pool(), &mut events);
            busy |= !events.is_empty();
            if !events.is_empty() {
                qp.due_since = None;
            }
            for event in events.drain(..) {
                self.handle(cx, runtime, index, event);
            }
            if let Some(qp) = self.qpairs.get_mut(index) {
                add_tally(qp);
                if qp.qpair.has_input() && !qp.queued {
                    qp.queued = true;
                    self.runnable.push_back(index);
                }
            }
            self.want_flush(index);
            if let Life::Ended(why) = life {
                self.ended.push((index, why));
            }
        }
        self.events = events;
        busy
    }

    fn complete_all(&mut self, runtime: &mut IoRuntime) -> bool {
        let mut completions = std::mem::take(&mut self.completions);
        runtime.take_completions(self.client, &mut completions);
        let busy = !completions.is_empty();
        for completion in completions.drain(..) {
            self.completed(runtime, completion);
        }
        self.completions = completions;
        busy
    }

    fn want_flush(&mut self, index: usize) {
        if let Some(qp) = self.qpairs.get_mut(index)
            && !qp.flushing
            && !qp.closed
            && qp.qpair.has_output()
        {
            qp.flushing = true;
            self.flushing.push(index);
        }
    }

    fn flush_all(&mut self, runtime: &mut IoRuntime) -> bool {
        let busy = !self.flushing.is_empty();
        // Drained in place: it keeps its memory from one poll to the next.
        for index in self.flushing.drain(..) {
            let Some(qp) = self.qpairs.get_mut(index) else { continue };
            qp.flushing = false;
            add_tally(qp);
            if qp.closed {
                continue;
            }
            if let Life::Ended(why) = qp.qpair.flush(runtime.pool()) {
                self.ended.push((index, why));
            } else if qp.qpair.has_input() && !qp.queued {
                // What was sent may have made room for input that waits.
                qp.queued = true;
                self.runnable.push_back(index);
            }
        }
        busy
    }

    fn accept(&mut self, cx: &mut Context) -> bool {
        let mut arrived: Vec<(ListenAddress, Box<dyn Incoming>)> = Vec::new();
        for (_, (address, acceptor)) in &mut self.listeners {
            let batch = acceptor.accept(cx, ACCEPT_BATCH);
            // A full batch may have left some behind: the next poll looks again.
            self.accepting |= batch.len() == ACCEPT_BATCH;
            self.accept_later |= acceptor.wants_retry();
            arrived.extend(batch.into_iter().map(|incoming| (address.clone(), incoming)));
        }
        let busy = !arrived.is_empty();
        for (address, incoming) in arrived {
            self.place(cx, address, incoming);
        }
        busy
    }

    fn run_timers(&mut self, now: Instant) {
        self.next_timer = now + TIMER_PERIOD;
        self.accepting |= std::mem::take(&mut self.accept_later);
        for (index, qp) in &mut self.qpairs {
            if qp.closed {
                continue;
            }
            if matches!(qp.role, Role::New) && now.since(qp.since) >= PEER_PATIENCE {
                self.ended.push((index, "no Connect command came".into()));
                continue;
            }
            if !qp.qpair.peer_is_due() {
                qp.due_since = None;
            } else if now.since(*qp.due_since.get_or_insert(now)) >= PEER_PATIENCE {
                self.ended.push((index, "the host did not deliver what it owed".into()));
                continue;
            }
            match &mut qp.role {
                Role::Admin(admin) => {
                    if !admin.controller.check_keep_alive(now) {
                        self.ended.push((index, "the keep alive timer expired".into()));
                    } else if admin.shared.is_dead() {
                        self.ended.push((index, "the controller has ended".into()));
                    }
                }
                Role::Io(io) if io.shared.is_dead() => self.ended.push((index, "the controller has ended".into())),
                _ => {}
            }
        }
        // Errors of I/O queues may be news for their hosts.
        let admins: Vec<usize> = self.admin_queues().collect();
        admins.into_iter().for_each(|index| self.send_events(index));
    }

    fn admin_queues(&self) -> impl Iterator<Item = usize> {
        self.qpairs.iter().filter(|(_, qp)| !qp.closed && matches!(qp.role, Role::Admin(_))).map(|(index, _)| index)
    }

    /// Tells controllers that were disabled once their I/O queues are gone, on whichever reactors those were.
    fn finish_disabling(&mut self, now: Instant) {
        if self.disabling.is_empty() {
            return;
        }
        let qpairs = &mut self.qpairs;
        self.disabling.retain(|&(index, generation)| {
            let Some(qp) = qpairs.get_mut(index).filter(|qp| qp.generation == generation) else { return false };
            let Role::Admin(admin) = &mut qp.role else { return false };
            let wait = !admin.shared.io_queues().is_empty();
            if !wait {
                admin.controller.queues_deleted(now);
            }
            wait
        });
    }

    fn deadline(&self) -> Option<Instant> {
        let timer = (!self.qpairs.is_empty() || self.accept_later).then_some(self.next_timer);
        self.groups.iter().filter_map(|group| group.deadline()).chain(timer).min()
    }

    fn ready(&mut self, key: u64, ready: Ready) {
        let index = (key >> 2) as usize;
        match key & 3 {
            KEY_LISTENER => {
                self.accepting |= ready.readable;
                return;
            }
            KEY_GROUP => return self.groups[index].ready(ready),
            _ => {}
        }
        let Some(qp) = self.qpairs.get_mut(index) else { return };
        qp.qpair.ready(ready);
        if !qp.queued && qp.qpair.has_input() {
            qp.queued = true;
            self.runnable.push_back(index);
        }
        if ready.writable {
            self.want_flush(index);
        }
    }

    /// What it has done.
    pub fn stats(&self) -> PollGroupStats {
        let count =
            |is: fn(&Role) -> bool| self.qpairs.iter().filter(|(_, qp)| !qp.closed && is(&qp.role)).count() as u32;
        PollGroupStats {
            reactor: self.reactor,
            admin_qpairs: self.stats.admin_qpairs,
            io_qpairs: self.stats.io_qpairs,
            current_admin_qpairs: count(|role| matches!(role, Role::Admin(_))),
            current_io_qpairs: count(|role| matches!(role, Role::Io(_))),
            current_unassociated_qpairs: count(|role| matches!(role, Role::New)),
            pending_bdev_io: self.pending_io,
            completed_nvme_io: self.stats.completed,
            moved_in: self.stats.moved_in,
            moved_out: self.stats.moved_out,
            transports: self.view.transports.keys().copied().collect(),
            groups: self.groups.iter().map(|group| group.stats()).collect(),
        }
    }
}

fn add_tally(qp: &mut Qp) {
    let Role::Io(io) = &mut qp.role else { return };
    let tally = std::mem::take(&mut io.tally);
    let counters = &io.shared.counters;
    let add = |counter: &std::sync::atomic::AtomicU64, n: u64| {
        if n > 0 {
            counter.fetch_add(n, Ordering::Relaxed);
        }
    };
    if tally.reads + tally.writes + tally.others > 0 && !io.shared.traffic.load(Ordering::Relaxed) {
        io.shared.traffic.store(true, Ordering::Relaxed);
    }
    io.units += tally.reads + tally.writes + tally.others + (tally.bytes_read + tally.bytes_written) / UNIT_BYTES;
    add(&counters.bytes_read, tally.bytes_read);
    add(&counters.bytes_written, tally.bytes_written);
    add(&counters.read_commands, tally.reads);
    add(&counters.write_commands, tally.writes);
    add(&counters.media_errors, tally.media_errors);
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
        let mut group = self.0.borrow_mut();
        !group.accepting
            && group.disabling.is_empty()
            && group.ended.is_empty()
            && group.runnable.is_empty()
            && group.flushing.is_empty()
            // Last, since it makes devices announce what comes.
            && group.groups.iter_mut().all(|group| group.may_sleep())
    }
}

impl std::fmt::Debug for PollGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PollGroup")
            .field("reactor", &self.reactor)
            .field("qpairs", &self.qpairs.len())
            .finish_non_exhaustive()
    }
}
