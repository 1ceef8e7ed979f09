//! One reactor's part: the homes of paths, this reactor's queues of all paths in use, and the I/O on them.
//!
//! # One step
//! The reactor's bdev poller comes first and calls the channels: they receive, complete, and send what was submitted. This
//! part's own poller comes later in the step: it runs the homes, connects and closes queues, and looks at timeouts.
//!
//! # Invariants
//! - Every I/O is in exactly one place: a flight (with the queue of its path), or waiting, behind or held in its head.
//! - A queue counts as open in its association from before it is connected until it is closed.
//! - A local path is kept as long as a head has it among its routes, or an I/O is held because of it.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bdev::core::{Io, IoRuntime, IoStatus, IoTag, Op};
use nvmf::host::{Completion, Connector, IoQueue, Options, Payload, Polled, Watches, Watching, commands};
use nvmf::spec::Status;
use nvmf::spec::opcode::io as opcode;
use reactor::park::Ready;
use reactor::reactor::Reply;
use reactor::{Buffers, Context, Instant, Poller, PollerId, Progress, ReactorHandle, ReactorId, Schedule};
use slab::Slab;

use crate::disk::Disk;
use crate::head::{Head, Held, Waiting};
use crate::home::{Home, Port, Then};
use crate::path::{AbortRequest, Association, Path, View};
use crate::policy::Choice;
use crate::scout::{Post, Scout};

/// The part as its poller and its channels hold it.
pub type SharedPart = Rc<RefCell<Part>>;

/// Where ended I/O goes.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(Io, IoStatus);

struct LocalQueue {
    queue: IoQueue,
    association: Arc<Association>,
    /// It takes no more commands: its association ends.
    drains: bool,
    failed: bool,
}

/// A path as this reactor uses it.
pub(crate) struct LocalPath {
    path: Arc<Path>,
    /// Routes, and held I/O.
    pub refs: usize,
    seen: u64,
    pub view: Arc<View>,
    queue: Option<LocalQueue>,
    reactor: ReactorId,
}

impl LocalPath {
    #[inline]
    pub fn takes_commands(&self) -> bool {
        self.queue.as_ref().is_some_and(|local| !local.drains && !local.failed && local.queue.is_live())
    }

    /// Whether a command, or two that belong together, will be taken; and how many are outstanding.
    #[inline]
    pub fn room(&self, pair: bool) -> (bool, usize) {
        let Some(local) = &self.queue else { return (false, 0) };
        let room = if pair { local.queue.can_submit_pair() } else { local.queue.can_submit() };
        (room, local.queue.outstanding())
    }

    /// Whether the controller has no queue for this reactor.
    pub fn lacks_queue(&self) -> bool {
        let lacks = |association: &Arc<Association>| association.queues.len() <= self.reactor.0 as usize;
        self.view.association.as_ref().is_some_and(lacks)
    }
}

/// A command that is outstanding.
struct Flight {
    io: Io,
    head: usize,
    path: usize,
    number: u64,
    turn: u64,
    retries: u8,
    /// Its claim, if it writes.
    claim: Option<usize>,
    /// Commands that have not come back: two for a fused operation.
    left: u8,
    lost: bool,
    /// It is to be aborted.
    aborting: bool,
    status: Status,
}

/// What came of an abort.
pub(crate) enum Aborted {
    /// It had not been sent: here it is.
    Out(Io),
    /// It was: the controller is asked, and it ends by itself.
    Asked,
    /// It is not here, or only the end of its association decides what comes of it.
    No,
}

/// One reactor's part.
pub struct Part {
    reactor: ReactorId,
    poller: PollerId,
    group: Vec<ReactorHandle>,
    homes: Slab<Home>,
    scouts: Slab<Scout>,
    paths: Slab<LocalPath>,
    heads: Slab<Head>,
    flights: Slab<Flight>,
    done: Vec<Completion>,
    turn: u64,
    /// The instant of the last poll.
    now: Instant,
}

/// Status code type of statuses that are about the path: the command was not executed.
const PATH_RELATED: u8 = 3;

/// Keys of watches: the lowest bits say of what.
const KEY_BITS: u32 = 2;
const HOME: u64 = 0;
const QUEUE: u64 = 1;
const SCOUT: u64 = 2;

fn watch_key(index: usize, of: u64) -> u64 {
    (index as u64) << KEY_BITS | of
}

fn wake(group: &[ReactorHandle], reactor: ReactorId) {
    // A reactor whose mailbox is full is awake.
    let _ = group[reactor.0 as usize].send(Box::new(|_| {}));
}

impl Part {
    /// Puts a part on a reactor on which the bdev layer is installed.
    pub fn install(cx: &mut Context) -> SharedPart {
        let poller = cx.reserve_poller();
        let part = Part {
            reactor: cx.id(),
            poller,
            group: cx.group().to_vec(),
            homes: Slab::new(),
            scouts: Slab::new(),
            paths: Slab::new(),
            heads: Slab::new(),
            flights: Slab::new(),
            done: Vec::new(),
            turn: 0,
            now: cx.now(),
        };
        let shared: SharedPart = Rc::new(RefCell::new(part));
        IoRuntime::of(cx).borrow_mut().attach(Rc::clone(&shared));
        cx.add_reserved_poller(poller, "bdev_nvme", Schedule::Active, Box::new(PartPoller(Rc::clone(&shared))));
        shared
    }

    /// The part of the reactor behind `cx`.
    ///
    /// # Panics
    /// If it was not installed.
    pub fn of(cx: &Context) -> SharedPart {
        IoRuntime::of(cx).borrow().attached().expect("the initiator is installed on every reactor")
    }

    // ---- homes -----------------------------------------------------------------------------------------------------

    /// Makes this the home of a path, which begins to connect.
    pub fn add_home(
        &mut self,
        path: Arc<Path>,
        port: Port,
        options: Options,
        first: Reply<Result<(), String>>,
        now: Instant,
    ) {
        let entry = self.homes.vacant_entry();
        let key = watch_key(entry.key(), HOME);
        entry.insert(Home::new(path, port, options, key, first, now));
    }

    fn home(&mut self, id: u64) -> Option<&mut Home> {
        self.homes.iter_mut().map(|(_, home)| home).find(|home| home.path().id == id)
    }

    /// Ends the association of a path; see [`Home::end`].
    pub fn end(&mut self, cx: &mut Context, id: u64, then: Then, reply: Reply<Result<(), String>>) {
        let (now, poller) = (cx.now(), self.poller);
        match self.home(id) {
            Some(home) => home.end(then, reply, now, &mut Watching { cx, poller }),
            None if then == Then::Detach => reply.send(Ok(())),
            None => reply.send(Err("the path is gone".into())),
        }
        self.wake_others();
    }

    /// Adds a port to a path; whether the path is there.
    pub fn add_port(&mut self, id: u64, port: Port) -> bool {
        self.home(id).map(|home| home.add_port(port)).is_some()
    }

    /// Takes a port from a path; see [`Home::remove_port`].
    pub fn remove_port(&mut self, cx: &mut Context, id: u64, socket: SocketAddr, reply: Reply<Result<(), String>>) {
        let (now, poller) = (cx.now(), self.poller);
        match self.home(id) {
            Some(home) => home.remove_port(socket, reply, now, &mut Watching { cx, poller }),
            None => reply.send(Ok(())),
        }
        self.wake_others();
    }

    /// Enables a path that was disabled.
    pub fn enable(&mut self, id: u64, reply: Reply<Result<(), String>>, now: Instant) {
        match self.home(id) {
            Some(home) => home.enable(reply, now),
            None => reply.send(Err("the path is gone".into())),
        }
    }

    /// Makes this the reactor of a discovery controller, which begins to connect.
    pub fn add_scout(&mut self, post: Arc<Post>, connector: Arc<dyn Connector>, options: Options, now: Instant) {
        let entry = self.scouts.vacant_entry();
        let key = watch_key(entry.key(), SCOUT);
        entry.insert(Scout::new(post, connector, options, key, now));
    }

    /// Ends a discovery controller's connection in good order.
    pub fn end_scout(&mut self, id: u64, reply: Reply<()>) {
        match self.scouts.iter_mut().map(|(_, scout)| scout).find(|scout| scout.post().id == id) {
            Some(scout) => scout.end(reply),
            None => reply.send(()),
        }
    }

    fn wake_others(&self) {
        let others = self.group.iter().map(ReactorHandle::id).filter(|id| *id != self.reactor);
        others.for_each(|id| wake(&self.group, id));
    }

    /// Whether the home of a path is here and has not ended.
    pub fn has_home(&self, id: u64) -> bool {
        self.homes.iter().any(|(_, home)| home.path().id == id)
    }

    // ---- heads -----------------------------------------------------------------------------------------------------

    /// This reactor's way into a disk.
    pub(crate) fn open(&mut self, disk: &Arc<Disk>) -> usize {
        let key = self.heads.insert(Head::new(Arc::clone(disk)));
        self.take_routes(key);
        key
    }

    /// Ends it. No I/O is outstanding.
    pub(crate) fn close(&mut self, head: usize) {
        let head = self.heads.remove(head);
        debug_assert!(head.is_idle());
        head.routes.iter().for_each(|route| self.paths[route.path].refs -= 1);
    }

    /// Takes the disk's present paths and policy.
    fn take_routes(&mut self, key: usize) {
        let head = &mut self.heads[key];
        let (generation, list, mode) = head.disk.routes();
        head.seen = generation;
        let old: Vec<usize> = head.routes.iter().map(|route| route.path).collect();
        let mut routes = Vec::with_capacity(list.len());
        for (path, nsid, preferred) in list {
            let place = self.paths.iter().find(|(_, local)| Arc::ptr_eq(&local.path, &path)).map(|(key, _)| key);
            let place = place.unwrap_or_else(|| {
                let (seen, view) = (u64::MAX, path.view());
                self.paths.insert(LocalPath { path, refs: 0, seen, view, queue: None, reactor: self.reactor })
            });
            self.paths[place].refs += 1;
            routes.push(Head::route(place, nsid, preferred));
        }
        head.set_routes(routes, mode);
        for (place, local) in &self.paths {
            head.path_changed(place, local);
        }
        old.into_iter().for_each(|place| self.paths[place].refs -= 1);
    }

    /// Takes an operation. `true`: the channel is to be called soon.
    #[inline]
    pub(crate) fn submit(&mut self, key: usize, io: Io, now: Instant) -> bool {
        let head = &mut self.heads[key];
        let waiting = Waiting { io, retries: 0, claim: None };
        if head.must_queue(&waiting.io) {
            head.queue(waiting);
        } else if let Err(waiting) = self.start(key, waiting, now) {
            self.heads[key].queue(waiting);
        }
        !std::mem::replace(&mut self.heads[key].called, true)
    }

    /// Sends a command, if there is a path for it.
    #[inline]
    fn start(&mut self, key: usize, waiting: Waiting, now: Instant) -> Result<(), Waiting> {
        let head = &mut self.heads[key];
        let pair = matches!(waiting.io.op(), Op::CompareAndWrite { .. });
        let Choice::Path(index) = head.choose(&self.paths, now, pair) else { return Err(waiting) };
        head.unblocked();
        let (place, nsid) = (head.routes[index].path, head.routes[index].nsid);
        let local = self.paths[place].queue.as_mut().expect("a path that is chosen has a queue");
        self.turn += 1;
        let entry = self.flights.vacant_entry();
        let user = (entry.key() as u64) << 1;
        let Waiting { mut io, retries, claim } = waiting;
        let claim = head.claim(&io, claim);
        let left = send(&mut local.queue, user, nsid, &mut io, now);
        let (number, turn) = (local.association.number, self.turn);
        let status = Status::SUCCESS;
        entry.insert(Flight {
            io,
            head: key,
            path: place,
            number,
            turn,
            retries,
            claim,
            left,
            lost: false,
            aborting: false,
            status,
        });
        Ok(())
    }

    /// Sends what waits, or ends it.
    fn pump(&mut self, key: usize, now: Instant, sink: Sink<'_>) {
        let head = &mut self.heads[key];
        head.release(&mut self.paths, sink);
        while let Some(waiting) = self.heads[key].waiting.pop_front() {
            // What it overlaps may have been lost while it waited.
            let Some(waiting) = self.heads[key].keep_behind(waiting) else { continue };
            let pair = matches!(waiting.io.op(), Op::CompareAndWrite { .. });
            if let Err(waiting) = self.start(key, waiting, now) {
                let head = &mut self.heads[key];
                head.waiting.push_front(waiting);
                if head.choose(&self.paths, now, pair) == Choice::None {
                    head.no_path(&self.paths, now, sink);
                }
                break;
            }
        }
    }

    /// Called for a channel: receives, completes, sends.
    pub(crate) fn poll_head(&mut self, key: usize, now: Instant, sink: Sink<'_>) -> bool {
        let mut busy = false;
        for index in 0..self.heads[key].routes.len() {
            let place = self.heads[key].routes[index].path;
            if self.paths[place].takes_commands() {
                busy |= self.poll_queue(place, now, &mut Polled, sink);
            }
        }
        let head = &mut self.heads[key];
        head.called = false;
        if !head.is_idle() {
            self.pump(key, now, sink);
        }
        for index in 0..self.heads[key].routes.len() {
            self.send_queue(self.heads[key].routes[index].path);
        }
        busy
    }

    /// Takes an I/O out that waits; asks the controller to abort one that is outstanding.
    pub(crate) fn abort(&mut self, key: usize, tag: IoTag) -> Aborted {
        if let Some(io) = self.heads[key].take(tag) {
            return Aborted::Out(io);
        }
        let is_it = |(_, flight): &(usize, &Flight)| flight.head == key && flight.io.tag() == tag && !flight.lost;
        match self.flights.iter().find(is_it).map(|(at, _)| at) {
            Some(at) if self.ask_abort(at) => Aborted::Asked,
            _ => Aborted::No,
        }
    }

    /// Has the path's home send Abort for a command; whether that will be tried.
    fn ask_abort(&mut self, at: usize) -> bool {
        let flight = &mut self.flights[at];
        let local = &self.paths[flight.path];
        let Some(queue) = local.queue.as_ref().filter(|queue| queue.association.number == flight.number) else {
            return false;
        };
        let user = (at as u64) << 1;
        // Of a fused operation the first half takes the second along.
        let Some(cid) = queue.queue.cid_of(user).or_else(|| queue.queue.cid_of(user | 1)) else { return false };
        let request = AbortRequest { number: flight.number, qid: queue.queue.params().qid, cid };
        flight.aborting = local.path.ask_abort(request);
        wake(&self.group, local.path.home);
        flight.aborting
    }

    /// Takes all I/O out that waits.
    pub(crate) fn abort_all(&mut self, key: usize) -> Vec<Io> {
        self.heads[key].take_all()
    }

    // ---- queues ----------------------------------------------------------------------------------------------------

    fn poll_queue(&mut self, place: usize, now: Instant, watches: &mut dyn Watches, sink: Sink<'_>) -> bool {
        let local = &mut self.paths[place];
        let Some(queue) = local.queue.as_mut().filter(|queue| !queue.failed) else { return false };
        if !queue.queue.has_work() && queue.queue.deadline().is_none_or(|at| now < at) {
            return false;
        }
        let mut done = std::mem::take(&mut self.done);
        let polled = queue.queue.poll(now, watches, &mut done);
        while let Some(user) = self.paths[place].queue.as_mut().and_then(|queue| queue.queue.take_overdue()) {
            self.ask_abort((user >> 1) as usize);
        }
        let local = &mut self.paths[place];
        if let Err(error) = &polled {
            tracing::warn!(path = %local.path.address, reactor = self.reactor.0, %error, "an I/O queue is lost");
            self.broke(place);
        }
        for completion in done.drain(..) {
            self.completed(completion, now, sink);
        }
        self.done = done;
        polled.unwrap_or(true)
    }

    fn send_queue(&mut self, place: usize) {
        let Some(queue) = self.paths[place].queue.as_mut().filter(|queue| !queue.failed) else { return };
        if queue.queue.send().is_err() {
            self.broke(place);
        }
    }

    /// A queue is of no use any more: its path's home is told, and the poller closes it.
    fn broke(&mut self, place: usize) {
        let local = &mut self.paths[place];
        let Some(queue) = &mut local.queue else { return };
        queue.failed = true;
        local.path.broken.fetch_max(queue.association.number, Ordering::AcqRel);
        wake(&self.group, local.path.home);
    }

    fn completed(&mut self, completion: Completion, now: Instant, sink: Sink<'_>) {
        let key = (completion.user >> 1) as usize;
        let flight = &mut self.flights[key];
        let status = completion.cqe.status();
        // The first failure counts: of a fused operation the second half's is only that the first failed.
        if flight.status.is_success() || completion.user & 1 == 0 && !status.is_success() {
            flight.status = status;
        }
        give_back(&mut flight.io, completion.data);
        flight.left -= 1;
        if flight.left > 0 {
            return;
        }
        let flight = self.flights.remove(key);
        if flight.lost {
            return self.lost(flight);
        }
        let status = flight.status;
        if status.same_code(Status::ABORTED_SQ_DELETION) {
            // The controller ends; what it has done by then it does not say.
            return self.lost(flight);
        }
        let Flight { mut io, head, path, retries, claim, .. } = flight;
        let head = &mut self.heads[head];
        if status.same_code(Status::ABORT_REQUESTED) {
            // Whether it was done is not known, but it is over.
            head.end_claim(claim);
            return sink(io, IoStatus::Aborted);
        }
        if status.sct() == PATH_RELATED || status.same_code(Status::COMMAND_SEQUENCE_ERROR) {
            let Some(Waiting { io, .. }) = head.path_error(path, Waiting { io, retries, claim }, now) else { return };
            head.end_claim(claim);
            return sink(io, to_io_status(status));
        }
        if let (Op::Copy { source_lba }, true) = (io.op(), status.is_success())
            && let Some((lba, source_lba, blocks)) = CopyPiece::first(io.lba(), source_lba, io.blocks()).rest
        {
            io.set_range(lba, blocks);
            io.set_op(Op::Copy { source_lba });
            head.waiting.push_front(Waiting { io, retries: 0, claim });
            return;
        }
        head.end_claim(claim);
        sink(io, to_io_status(status));
    }

    /// A command's connection is gone and its fate unknown.
    fn lost(&mut self, flight: Flight) {
        let head = &mut self.heads[flight.head];
        if flight.io.op().modifies() {
            self.paths[flight.path].refs += 1;
            let Flight { io, path, number, turn, claim, .. } = flight;
            head.hold(Held { io, path, number, turn, claim });
        } else {
            head.waiting.push_front(Waiting { io: flight.io, retries: flight.retries, claim: None });
        }
    }

    fn close_queue(&mut self, place: usize, watches: &mut dyn Watches) {
        let Some(mut local) = self.paths[place].queue.take() else { return };
        let mut gone: Vec<(u64, Buffers)> = Vec::new();
        local.queue.close(watches, &mut |user, data| gone.push((user, data)));
        // The last first: what is sent again goes to the front.
        let turn = |flights: &Slab<Flight>, user: u64| flights[(user >> 1) as usize].turn;
        gone.sort_by_key(|(user, _)| std::cmp::Reverse(turn(&self.flights, *user)));
        for (user, data) in gone {
            let key = (user >> 1) as usize;
            let flight = &mut self.flights[key];
            give_back(&mut flight.io, data);
            flight.lost = true;
            flight.left -= 1;
            if flight.left == 0 {
                let flight = self.flights.remove(key);
                self.lost(flight);
            }
        }
        local.association.open.fetch_sub(1, Ordering::AcqRel);
        wake(&self.group, self.paths[place].path.home);
    }

    /// Brings this reactor's queue of a path in line with what was published. Whether something has changed.
    fn refresh(&mut self, place: usize, now: Instant, watches: &mut dyn Watches) -> bool {
        let local = &mut self.paths[place];
        let generation = local.path.generation();
        let mut changed = generation != local.seen;
        if changed {
            local.view = local.path.view();
            local.seen = generation;
        }
        if let Some(queue) = &mut local.queue {
            let number = queue.association.number;
            let current = local.view.association.as_ref().is_some_and(|published| published.number == number);
            queue.drains = !current;
            let stays = current || local.view.drains == Some(number) && queue.queue.outstanding() > 0;
            if queue.failed || !stays || local.refs == 0 {
                self.close_queue(place, watches);
                changed = true;
            }
        }
        changed | self.connect(place, now)
    }

    fn connect(&mut self, place: usize, now: Instant) -> bool {
        let local = &mut self.paths[place];
        let wanted =
            local.queue.is_none() && local.refs > 0 && local.view.association.is_some() && !local.lacks_queue();
        let broken = local.path.broken.load(Ordering::Acquire);
        if !wanted || local.view.association.as_ref().is_some_and(|published| published.number <= broken) {
            return false;
        }
        let Some(association) = local.path.open_queue() else { return false };
        let Some(params) = association.queues.get(self.reactor.0 as usize).cloned() else {
            association.open.fetch_sub(1, Ordering::AcqRel);
            return false;
        };
        match IoQueue::connect(params, watch_key(place, QUEUE), now) {
            Ok(queue) => {
                local.queue = Some(LocalQueue { queue, association, drains: false, failed: false });
                true
            }
            Err(error) => {
                tracing::warn!(path = %local.path.address, %error, "an I/O queue cannot be connected");
                association.open.fetch_sub(1, Ordering::AcqRel);
                local.path.broken.fetch_max(association.number, Ordering::AcqRel);
                wake(&self.group, local.path.home);
                false
            }
        }
    }

    // ---- the poller ------------------------------------------------------------------------------------------------

    fn poll(&mut self, cx: &mut Context) -> Progress {
        let (now, poller) = (cx.now(), self.poller);
        self.now = now;
        let mut watches = Watching { cx, poller };
        let busy = self.poll_homes(now, &mut watches);
        Progress::from_busy(self.poll_paths(now, &mut watches) | busy)
    }

    fn poll_homes(&mut self, now: Instant, watches: &mut dyn Watches) -> bool {
        let (mut busy, mut published) = (false, false);
        for (_, home) in &mut self.homes {
            let before = home.path().generation();
            busy |= home.poll(now, watches);
            published |= home.path().generation() != before;
        }
        if published {
            self.wake_others();
        }
        self.homes.retain(|_, home| !home.is_over());
        for (_, scout) in &mut self.scouts {
            busy |= scout.poll(now, watches);
        }
        self.scouts.retain(|_, scout| !scout.is_over());
        busy
    }

    fn poll_paths(&mut self, now: Instant, watches: &mut dyn Watches) -> bool {
        let sink: Sink<'_> = &mut |io: Io, status| io.complete(status);
        let mut busy = false;
        for key in 0..self.heads.capacity() {
            if self.heads.get(key).is_some_and(|head| head.disk.generation() != head.seen) {
                self.take_routes(key);
                busy = true;
            }
        }
        for place in 0..self.paths.capacity() {
            if !self.paths.contains(place) {
                continue;
            }
            let was_live = self.paths[place].takes_commands();
            let mut changed = self.refresh(place, now, watches);
            busy |= self.poll_queue(place, now, watches, sink);
            changed |= self.paths[place].takes_commands() != was_live;
            if changed {
                busy = true;
                let local = &self.paths[place];
                self.heads.iter_mut().for_each(|(_, head)| head.path_changed(place, local));
            }
        }
        for key in 0..self.heads.capacity() {
            if self.heads.get(key).is_some_and(|head| !head.is_idle()) {
                self.pump(key, now, sink);
            }
        }
        for place in 0..self.paths.capacity() {
            if self.paths.contains(place) {
                self.send_queue(place);
            }
        }
        self.paths.retain(|_, local| local.refs > 0 || local.queue.is_some());
        busy
    }

    fn ready(&mut self, key: u64, ready: Ready) {
        let place = (key >> KEY_BITS) as usize;
        match key & ((1 << KEY_BITS) - 1) {
            HOME => self.homes.get_mut(place).into_iter().for_each(|home| home.ready(ready)),
            SCOUT => self.scouts.get_mut(place).into_iter().for_each(|scout| scout.ready(ready)),
            _ => {
                let queue = self.paths.get_mut(place).and_then(|path| path.queue.as_mut());
                queue.into_iter().for_each(|local| local.queue.ready(ready));
            }
        }
    }

    fn deadline(&self, now: Instant) -> Option<Instant> {
        let homes = self.homes.iter().filter_map(|(_, home)| home.deadline(now));
        let queues = self.paths.iter().filter_map(|(_, path)| path.queue.as_ref()?.queue.deadline());
        let heads = self.heads.iter().filter_map(|(_, head)| head.deadline(&self.paths));
        let scouts = self.scouts.iter().filter_map(|(_, scout)| scout.deadline(now));
        homes.chain(scouts).chain(queues).chain(heads).min()
    }

    fn may_sleep(&self) -> bool {
        let homes = self.homes.iter().all(|(_, home)| !home.has_work())
            && self.scouts.iter().all(|(_, scout)| !scout.has_work());
        let paths = self.paths.iter().all(|(_, local)| {
            let idle = |queue: &LocalQueue| !queue.failed && !queue.queue.has_work();
            local.path.generation() == local.seen && local.queue.as_ref().is_none_or(idle)
        });
        homes && paths && self.heads.iter().all(|(_, head)| head.disk.generation() == head.seen)
    }
}

impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (homes, paths, heads) = (self.homes.len(), self.paths.len(), self.heads.len());
        write!(
            f,
            "Part({:?}: {homes} homes, {paths} paths, {heads} heads, {} outstanding)",
            self.reactor,
            self.flights.len()
        )
    }
}

struct PartPoller(SharedPart);

impl Poller for PartPoller {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        self.0.borrow_mut().poll(cx)
    }

    fn ready(&mut self, key: u64, ready: Ready) {
        self.0.borrow_mut().ready(key, ready);
    }

    fn deadline(&self) -> Option<Instant> {
        let part = self.0.borrow();
        part.deadline(part.now)
    }

    fn may_sleep(&mut self, _: &mut Context) -> bool {
        self.0.borrow().may_sleep()
    }
}

/// Sends the command, or the two, of an operation; how many.
#[inline]
fn send(queue: &mut IoQueue, user: u64, nsid: u32, io: &mut Io, now: Instant) -> u8 {
    let (lba, blocks) = (io.lba(), io.blocks() as u32);
    let len = io.bufs().len() as u32;
    let (sqe, payload, data) = match io.op() {
        Op::Read => (commands::blocks(opcode::READ, nsid, lba, blocks), Payload::ToHost(len), take(io)),
        Op::Write { fua } => {
            let sqe = commands::with_fua(commands::blocks(opcode::WRITE, nsid, lba, blocks), fua);
            (sqe, Payload::ToController(len), take(io))
        }
        Op::Compare => (commands::blocks(opcode::COMPARE, nsid, lba, blocks), Payload::ToController(len), take(io)),
        Op::Flush | Op::Reset => (commands::plain(opcode::FLUSH, nsid), Payload::None, Buffers::new()),
        Op::WriteZeroes { fua, may_unmap } => {
            let sqe = commands::with_fua(commands::write_zeroes(nsid, lba, blocks, may_unmap), fua);
            (sqe, Payload::None, Buffers::new())
        }
        Op::Unmap => list(commands::deallocate(nsid, &[(lba, blocks)])),
        Op::Copy { source_lba } => {
            let piece = CopyPiece::first(lba, source_lba, io.blocks());
            list(commands::copy(nsid, piece.lba, &[(piece.source_lba, piece.blocks as u32)]))
        }
        Op::CompareAndWrite { fua } => {
            let bytes = io.bufs().to_vec();
            let (expected, data) = bytes.split_at(bytes.len() / 2);
            let (compare, write) = commands::compare_and_write(nsid, lba, blocks);
            let write = commands::with_fua(write, fua);
            let halves = ((user, Buffers::from(expected)), (user | 1, Buffers::from(data)));
            queue.compare_and_write(halves.0, halves.1, (compare, write), now);
            return 2;
        }
    };
    queue.submit(user, sqe, payload, data, now);
    1
}

/// What of a copy is one command: a controller copies no range onto itself, so ranges that overlap are copied in pieces as
/// long as they are apart; from the end where the copy goes upwards, so that nothing is overwritten before it is read.
struct CopyPiece {
    lba: u64,
    source_lba: u64,
    blocks: u64,
    /// The ranges of what is left behind it: destination, source and length.
    rest: Option<(u64, u64, u64)>,
}

impl CopyPiece {
    fn first(lba: u64, source_lba: u64, blocks: u64) -> CopyPiece {
        let apart = lba.abs_diff(source_lba);
        if apart == 0 || apart >= blocks {
            return CopyPiece { lba, source_lba, blocks, rest: None };
        }
        let left = blocks - apart;
        if lba < source_lba {
            let rest = Some((lba + apart, source_lba + apart, left));
            return CopyPiece { lba, source_lba, blocks: apart, rest };
        }
        CopyPiece { lba: lba + left, source_lba: source_lba + left, blocks: apart, rest: Some((lba, source_lba, left)) }
    }
}

fn take(io: &mut Io) -> Buffers {
    std::mem::take(io.bufs_mut())
}

fn list((sqe, bytes): (nvmf::spec::Sqe, Vec<u8>)) -> (nvmf::spec::Sqe, Payload, Buffers) {
    (sqe, Payload::ToController(bytes.len() as u32), Buffers::from(&bytes[..]))
}

/// Gives an I/O its payload back. The payload of commands that have another one never left it.
fn give_back(io: &mut Io, data: Buffers) {
    if matches!(io.op(), Op::Read | Op::Write { .. } | Op::Compare) {
        *io.bufs_mut() = data;
    }
}

fn to_io_status(status: Status) -> IoStatus {
    if status.is_success() {
        return IoStatus::Success;
    }
    if status.same_code(Status::COMPARE_FAILURE) {
        return IoStatus::CompareFailed;
    }
    IoStatus::Nvme { sct: status.sct(), sc: status.sc(), dnr: status.is_dnr() }
}
