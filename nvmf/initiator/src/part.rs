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

mod outgoing;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bdev::core::{Io, IoRuntime, IoStatus, IoTag, Op};
use nvmf::host::{Completion, Connector, IoQueue, Options, PayloadMemory, Polled, Watches, Watching, commands};
use nvmf::spec::Status;
use reactor::park::Ready;
use reactor::reactor::Reply;
use reactor::{Buffers, Context, Instant, Poller, PollerId, Progress, ReactorHandle, ReactorId, Schedule};
use slab::Slab;

use crate::disk::Disk;
use crate::head::{Head, Held, NO_PATH, ShownRoute, Tries, Waiting};
use crate::home::{Denial, Home, Outcome, Port, Then};
use crate::path::{AbortRequest, Association, Path, Site, View};
use crate::policy::Choice;
use crate::scout::{Post, Scout};
use outgoing::{CopyPiece, Scratch, give_back, send, to_io_status};

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

    /// Names the path.
    pub fn id(&self) -> u64 {
        self.path.id
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
    tries: Tries,
    /// Its claim, if it writes.
    claim: Option<usize>,
    /// Commands that have not come back: two for a fused operation.
    left: u8,
    lost: bool,
    /// Its client wants it to end: it is not sent again.
    ends: bool,
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
    scratch: Scratch,
    done: Vec<Completion>,
    turn: u64,
    /// The instant of the last poll.
    now: Instant,
}

/// Status code type of statuses that are about the path: the command was not executed.
const PATH_RELATED: u8 = 3;
/// How long commands that are to be aborted may take to end before their path is reset.
const ABORT_PATIENCE: Duration = Duration::from_secs(5);

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
            scratch: Scratch::default(),
            done: Vec::new(),
            turn: 0,
            now: cx.now(),
        };
        let shared: SharedPart = Rc::new(RefCell::new(part));
        let runtime = IoRuntime::of(cx);
        cx.insert(PayloadMemory::new(move |use_it| use_it(runtime.borrow_mut().pool())));
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
    pub fn add_home(&mut self, path: Arc<Path>, port: Port, options: Options, first: Reply<Outcome>, now: Instant) {
        let entry = self.homes.vacant_entry();
        let key = watch_key(entry.key(), HOME);
        entry.insert(Home::new(path, port, options, key, first, now));
    }

    fn home(&mut self, id: u64) -> Option<&mut Home> {
        self.homes.iter_mut().map(|(_, home)| home).find(|home| home.path().id == id)
    }

    /// Ends the association of a path; see [`Home::end`].
    pub fn end(&mut self, cx: &mut Context, id: u64, then: Then, reply: Reply<Outcome>) {
        let (now, poller) = (cx.now(), self.poller);
        match self.home(id) {
            Some(home) => home.end(then, reply, now, &mut Watching { cx, poller }),
            None if then == Then::Detach => reply.send(Ok(())),
            None => reply.send(Err(Denial::Gone("the path is gone"))),
        }
        self.wake_others();
    }

    /// Adds a port to a path; whether the path is there.
    pub fn add_port(&mut self, id: u64, port: Port) -> bool {
        self.home(id).map(|home| home.add_port(port)).is_some()
    }

    /// Takes a port from a path; see [`Home::remove_port`].
    pub fn remove_port(&mut self, cx: &mut Context, id: u64, site: Site, reply: Reply<Outcome>) {
        let (now, poller) = (cx.now(), self.poller);
        match self.home(id) {
            Some(home) => home.remove_port(site, reply, now, &mut Watching { cx, poller }),
            None => reply.send(Ok(())),
        }
        self.wake_others();
    }

    /// Enables a path that was disabled.
    pub fn enable(&mut self, id: u64, reply: Reply<Outcome>, now: Instant) {
        match self.home(id) {
            Some(home) => home.enable(reply, now),
            None => reply.send(Err(Denial::Gone("the path is gone"))),
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

    /// The routes of a disk as this reactor uses them; `None` if it does not use the disk.
    pub(crate) fn shown(&self, disk: &Arc<Disk>) -> Option<Vec<ShownRoute>> {
        let mut heads = self.heads.iter().map(|(_, head)| head);
        heads.find(|head| Arc::ptr_eq(&head.disk, disk)).map(|head| head.shown(&self.paths))
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
        let waiting = Waiting { io, tries: Tries::default(), claim: None };
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
        let Waiting { mut io, tries, claim } = waiting;
        let claim = head.claim(&io, claim);
        let left = send(&mut local.queue, &mut self.scratch, (user, nsid), &mut io, now);
        let (number, turn) = (local.association.number, self.turn);
        let status = Status::SUCCESS;
        entry.insert(Flight {
            io,
            head: key,
            path: place,
            number,
            turn,
            tries,
            claim,
            left,
            lost: false,
            ends: false,
            status,
        });
        Ok(())
    }

    /// Sends what waits, or ends it.
    fn pump(&mut self, key: usize, now: Instant, sink: Sink<'_>) {
        self.end_aborts(key, now);
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

    /// Takes an I/O out that waits; asks the controller to abort one that is outstanding. Either way it is not sent again.
    pub(crate) fn abort(&mut self, key: usize, tag: IoTag) -> Aborted {
        if let Some(io) = self.heads[key].take(tag) {
            return Aborted::Out(io);
        }
        if self.heads[key].end_held(tag) {
            return Aborted::Asked;
        }
        let is_it = |(_, flight): &(usize, &Flight)| flight.head == key && flight.io.tag() == tag && !flight.lost;
        match self.flights.iter().find(is_it).map(|(at, _)| at) {
            Some(at) if self.ask_abort(at) => {
                self.flights[at].ends = true;
                Aborted::Asked
            }
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
        let asked = local.path.ask_abort(request);
        wake(&self.group, local.path.home);
        asked
    }

    /// The device is reset or goes: takes all I/O out that waits, and has the rest end. Controllers are asked to abort what
    /// is outstanding; a path on which some of that is left after [`ABORT_PATIENCE`] is reset, which ends it: what reads at
    /// once, what writes when its association is fenced.
    pub(crate) fn abort_all(&mut self, key: usize, now: Instant) -> Vec<Io> {
        let outstanding: Vec<usize> =
            self.flights.iter().filter(|(_, flight)| flight.head == key && !flight.ends).map(|(at, _)| at).collect();
        for at in outstanding {
            self.flights[at].ends = true;
            self.ask_abort(at);
            self.heads[key].abort_until = Some(now + ABORT_PATIENCE);
        }
        self.heads[key].take_all()
    }

    /// Resets the paths on which something has not ended that was to.
    fn end_aborts(&mut self, key: usize, now: Instant) {
        let Some(until) = self.heads[key].abort_until else { return };
        let is_left = |flight: &Flight| flight.head == key && flight.ends && !flight.lost;
        let left: Vec<usize> =
            self.flights.iter().filter(|(_, flight)| is_left(flight)).map(|(_, flight)| flight.path).collect();
        if !left.is_empty() && now < until {
            return;
        }
        self.heads[key].abort_until = None;
        for place in left {
            let path = &self.paths[place].path.address;
            tracing::warn!(%path, reactor = self.reactor.0, "commands do not end that were to be aborted: the path is reset");
            self.broke(place);
        }
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
        give_back(&mut flight.io, completion.data, &mut self.scratch);
        flight.left -= 1;
        if flight.left > 0 {
            return;
        }
        let flight = self.flights.remove(key);
        let status = flight.status;
        // With this status the controller ends; what it has done by then it does not say.
        if flight.lost || status.same_code(Status::ABORTED_SQ_DELETION) {
            return self.lost(flight, sink);
        }
        let Flight { mut io, head, path, tries, claim, ends, .. } = flight;
        let head = &mut self.heads[head];
        let is_compare = matches!(io.op(), Op::Compare) && status.same_code(Status::COMPARE_FAILURE);
        if status.same_code(Status::ABORT_REQUESTED) || ends && !status.is_success() && !is_compare {
            // Whether it was done is not known, but it is over.
            head.end_claim(claim);
            return sink(io, IoStatus::Aborted);
        }
        let on_path = status.sct() == PATH_RELATED || status.same_code(Status::COMMAND_SEQUENCE_ERROR);
        if on_path || commands::may_retry(status) && !status.same_code(Status::COMPARE_FAILURE) {
            let waiting = Waiting { io, tries, claim };
            let given_up = if on_path { head.path_error(path, waiting, now) } else { head.try_again(waiting) };
            let Some(Waiting { io, .. }) = given_up else { return };
            head.end_claim(claim);
            return sink(io, to_io_status(status));
        }
        if let (Op::Copy { source_lba }, true) = (io.op(), status.is_success())
            && let Some((lba, source_lba, blocks)) = CopyPiece::first(io.lba(), source_lba, io.blocks()).rest
        {
            if ends {
                head.end_claim(claim);
                return sink(io, IoStatus::Aborted);
            }
            io.set_range(lba, blocks);
            io.set_op(Op::Copy { source_lba });
            head.waiting.push_front(Waiting { io, tries: Tries::default(), claim });
            return;
        }
        head.end_claim(claim);
        sink(io, to_io_status(status));
    }

    /// A command's connection is gone and its fate unknown.
    fn lost(&mut self, flight: Flight, sink: Sink<'_>) {
        let head = &mut self.heads[flight.head];
        if flight.io.op().modifies() {
            self.paths[flight.path].refs += 1;
            let Flight { io, path, number, turn, claim, ends, .. } = flight;
            head.hold(Held { io, path, number, turn, claim, ends });
        } else if flight.ends {
            sink(flight.io, IoStatus::Aborted);
        } else if head.disk.retries == Some(0) {
            sink(flight.io, NO_PATH);
        } else {
            head.waiting.push_front(Waiting { io: flight.io, tries: flight.tries, claim: None });
        }
    }

    fn close_queue(&mut self, place: usize, watches: &mut dyn Watches, sink: Sink<'_>) {
        let Some(mut local) = self.paths[place].queue.take() else { return };
        let mut gone: Vec<(u64, Buffers)> = Vec::new();
        local.queue.close(watches, &mut |user, data| gone.push((user, data)));
        // The last first: what is sent again goes to the front.
        let turn = |flights: &Slab<Flight>, user: u64| flights[(user >> 1) as usize].turn;
        gone.sort_by_key(|(user, _)| std::cmp::Reverse(turn(&self.flights, *user)));
        for (user, data) in gone {
            let key = (user >> 1) as usize;
            let flight = &mut self.flights[key];
            give_back(&mut flight.io, data, &mut self.scratch);
            flight.lost = true;
            flight.left -= 1;
            if flight.left == 0 {
                let flight = self.flights.remove(key);
                self.lost(flight, sink);
            }
        }
        local.association.open.fetch_sub(1, Ordering::AcqRel);
        wake(&self.group, self.paths[place].path.home);
    }

    /// Brings this reactor's queue of a path in line with what was published. Whether something has changed.
    fn refresh(&mut self, place: usize, now: Instant, watches: &mut dyn Watches, sink: Sink<'_>) -> bool {
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
                self.close_queue(place, watches, sink);
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
            let mut changed = self.refresh(place, now, watches, sink);
            busy |= self.poll_queue(place, now, watches, sink);
            changed |= self.paths[place].takes_commands() != was_live;
            if changed {
                busy = true;
                let local = &self.paths[place];
                self.heads.iter_mut().for_each(|(_, head)| head.path_changed(place, local));
            }
        }
        for key in 0..self.heads.capacity() {
            if self.heads.get(key).is_some_and(|head| !head.is_idle() || head.abort_until.is_some()) {
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
