//! A path's control state machine: one association after the other, on one reactor.
//!
//! ```text
//!  Connecting --live, KATO known--> Live --reset, disable, detach, a queue broke--> Draining --> ShuttingDown
//!      ^   |                          |                                                            |
//!      |   | lost                     | lost                            reconnect | disable | detach
//!      |   v                          v                                           v         v        v
//!     Waiting <-----------------------+-----------------------------------> Waiting   Disabled   Down
//! ```
//! A path may have several ports, of which one is used. When it fails, the others are tried, each once, before the policy
//! counts a failed attempt; what works is used until it fails.
//!
//! An association that takes no more commands is kept on a list until it is fenced (see the crate's documentation): its
//! queues have closed on every reactor, and its controller has acknowledged the end or had the time to notice it.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nvmf::host::recovery::{Next, Recovery};
use nvmf::host::{AdminDone, Connector, Controller, Options, Payload, ReconnectPolicy, State, Watches, commands};
use nvmf::spec::feature::fid;
use nvmf::spec::opcode::admin;
use reactor::park::Ready;
use reactor::reactor::Reply;
use reactor::{Buffers, Instant};

use crate::path::{Association, Path, PathState, Site};

/// How long commands may take to end before an association is ended anyway.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);
/// An association that was lost sooner than this is not replaced at once.
const SHORT_LIFE: Duration = Duration::from_secs(1);
/// Quiesce time of controllers that report none (CQT = 0).
const DEFAULT_QUIESCE: Duration = Duration::from_secs(2);
/// Number of the Get Features command.
const GET_KATO: u64 = 1;
/// Numbers of Abort commands, from here on.
const ABORT: u64 = 2;
/// Abort commands that are outstanding at once, if the controller takes so many (ACL).
const MAX_ABORTS: u64 = 8;

/// What came of a request to a path.
pub type Outcome = Result<(), Denial>;

/// Why a path does not do what it was asked to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denial {
    /// It is doing something else, and will have done that soon.
    Busy(&'static str),
    /// It is so already.
    Already(&'static str),
    /// It is gone, or on its way.
    Gone(&'static str),
    /// It was tried, and failed.
    Failed(String),
}

impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Denial::Busy(why) | Denial::Already(why) | Denial::Gone(why) => f.write_str(why),
            Denial::Failed(why) => f.write_str(why),
        }
    }
}

/// What comes after the end of an association.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// The next one.
    Reconnect,
    /// Nothing, until the path is enabled.
    Disable,
    /// Nothing.
    Detach,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Connecting,
    Live,
    Draining { until: Instant, then: Then },
    ShuttingDown { then: Then },
    Waiting(Instant),
    Disabled,
    Down,
}

/// An association that has ended here.
struct Ending {
    association: Arc<Association>,
    acknowledged: bool,
    /// How long its controller may need to notice.
    wait: Duration,
    /// When all of its queues had closed.
    closed: Option<Instant>,
}

/// A port of a path's controller.
pub struct Port {
    /// Where it is.
    pub site: Site,
    /// What connects to it.
    pub connector: Arc<dyn Connector>,
}

/// The state machine.
pub struct Home {
    path: Arc<Path>,
    /// The ports at which the path can be had.
    ports: Vec<Port>,
    /// The one that is used, or tried.
    port: usize,
    /// Ports that were tried since the policy was asked last.
    tried: usize,
    options: Options,
    key: u64,
    phase: Phase,
    controller: Option<Controller>,
    recovery: Recovery,
    association: Option<Arc<Association>>,
    last_number: u64,
    /// The controller's own idea of the keep-alive timeout, once it is asked.
    kato: Option<Duration>,
    live_since: Instant,
    ending: VecDeque<Ending>,
    /// Abort commands that were sent to the controller, and that it has answered.
    aborts: (u64, u64),
    fails_io: bool,
    first: Option<Reply<Outcome>>,
    waiters: Vec<Reply<Outcome>>,
}

impl Home {
    /// A path that begins to connect; `first` is told how that went. Its admin queue is watched under `key`.
    pub fn new(path: Arc<Path>, port: Port, options: Options, key: u64, first: Reply<Outcome>, now: Instant) -> Home {
        let recovery = Recovery::new(options.reconnect);
        let options = Options { reconnect: ReconnectPolicy::NEVER, ..options };
        let mut home = Home {
            path,
            ports: vec![port],
            port: 0,
            tried: 0,
            options,
            key,
            phase: Phase::Connecting,
            controller: None,
            recovery,
            association: None,
            last_number: 0,
            kato: None,
            live_since: now,
            ending: VecDeque::new(),
            aborts: (0, 0),
            fails_io: false,
            first: Some(first),
            waiters: Vec::new(),
        };
        home.connect(now);
        home
    }

    /// The path.
    pub fn path(&self) -> &Arc<Path> {
        &self.path
    }

    /// Whether it has ended and nothing of it is left.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Down && self.ending.is_empty() && self.first.is_none()
    }

    fn connect(&mut self, now: Instant) {
        self.kato = None;
        self.phase = Phase::Connecting;
        let port = &self.ports[self.port];
        if self.path.view().site != Some(port.site) {
            self.path.publish(|view| view.site = Some(port.site));
        }
        self.controller = Some(Controller::new(Arc::clone(&port.connector), self.options.clone(), self.key, now));
    }

    /// Another port, for when the one that is used fails.
    pub fn add_port(&mut self, port: Port) {
        self.path.add_port(port.site);
        self.ports.push(port);
    }

    /// A port is not to be used any more; if it is being used, another one is.
    pub fn remove_port(&mut self, site: Site, reply: Reply<Outcome>, now: Instant, watches: &mut dyn Watches) {
        let Some(at) = self.ports.iter().position(|port| port.site == site) else { return reply.send(Ok(())) };
        if self.ports.len() == 1 {
            return reply.send(Err(Denial::Busy("it is the only port that the path has")));
        }
        self.ports.remove(at);
        self.path.remove_port(site);
        self.tried = 0;
        if at != self.port {
            self.port -= usize::from(at < self.port);
            return reply.send(Ok(()));
        }
        self.port %= self.ports.len();
        match self.phase {
            Phase::Live => {
                self.waiters.push(reply);
                self.begin_end(Then::Reconnect, now);
            }
            Phase::Connecting => {
                self.end_association(false, watches);
                self.phase = Phase::Waiting(now);
                reply.send(Ok(()));
            }
            _ => reply.send(Ok(())),
        }
    }

    /// The port that was used has failed: it is the next one's turn. Whether that is to be tried before the policy counts a
    /// failure.
    fn next_port(&mut self) -> bool {
        self.port = (self.port + 1) % self.ports.len();
        self.tried += 1;
        self.recovery.lost_at().is_some() && self.tried < self.ports.len()
    }

    /// Does what there is to do; whether that was anything.
    pub fn poll(&mut self, now: Instant, watches: &mut dyn Watches) -> bool {
        let mut busy = self.fence(now);
        if let Some(controller) = &mut self.controller {
            busy |= controller.poll(now, watches);
        }
        let before = self.phase;
        match self.phase {
            Phase::Connecting => self.poll_connecting(now, watches),
            Phase::Live => self.poll_live(now, watches),
            Phase::Draining { until, then } => self.poll_draining(now, until, then, watches),
            Phase::ShuttingDown { then } => self.poll_shutting_down(now, then, watches),
            Phase::Waiting(_) if self.recovery.has_given_up(now) => self.give_up(),
            Phase::Waiting(at) if now >= at => self.connect(now),
            Phase::Waiting(_) | Phase::Disabled | Phase::Down => {}
        }
        self.publish_patience(now);
        busy || before != self.phase
    }

    /// Fails I/O that waits, or lets it wait again, as the policy says.
    fn publish_patience(&mut self, now: Instant) {
        let fails = match self.phase {
            Phase::Down => true,
            Phase::Disabled => false,
            _ => self.recovery.fails_io(now),
        };
        if fails != self.fails_io {
            self.fails_io = fails;
            self.path.publish(|view| view.fails_io = fails);
        }
    }

    fn poll_connecting(&mut self, now: Instant, watches: &mut dyn Watches) {
        let Some(controller) = &mut self.controller else { return };
        match controller.state() {
            State::Live => {}
            State::Down => {
                let error = controller.error().map_or_else(|| "it went away".into(), ToString::to_string);
                return self.lost(error, now, watches);
            }
            _ => return,
        }
        // The controller may round the timeout up, and writes are fenced by its idea of it.
        match (self.kato, controller.take_admin()) {
            (None, None) => {
                self.kato = Some(Duration::from_millis(self.options.kato_ms.into()));
                let mut sqe = commands::plain(admin::GET_FEATURES, 0);
                sqe.cdw10 = u32::from(fid::KEEP_ALIVE_TIMER).into();
                if !controller.submit_admin(GET_KATO, sqe, Payload::None, Buffers::new(), now) {
                    self.lost("it takes no admin command".into(), now, watches);
                }
            }
            (Some(asked), Some(AdminDone::Completed(done))) => {
                let said = Duration::from_millis(done.cqe.dw0.get().into());
                if done.cqe.status().is_success() {
                    self.kato = Some(asked.max(said));
                }
                self.go_live(now);
            }
            _ => {}
        }
    }

    fn go_live(&mut self, now: Instant) {
        let Some(controller) = &mut self.controller else { return };
        self.last_number += 1;
        let queues = (1..=controller.io_queues()).filter_map(|qid| controller.queue_params(qid)).collect();
        let association = Arc::new(Association {
            number: self.last_number,
            cntlid: controller.cntlid().unwrap_or_default(),
            queues,
            open: AtomicU32::new(0),
        });
        self.association = Some(Arc::clone(&association));
        let identity = controller.identity().map(|identity| Arc::new(*identity));
        let max_io_bytes = controller.max_io_bytes();
        self.recovery.recovered(now);
        self.live_since = now;
        self.aborts = (0, 0);
        self.phase = Phase::Live;
        self.fails_io = false;
        let path = Arc::clone(&self.path);
        tracing::info!(path = %path.address, cntlid = association.cntlid, "a path is up");
        let inventory = controller.inventory_mut();
        inventory.take_changes();
        path.publish(|view| {
            view.state = PathState::Enabled;
            view.association = Some(association);
            view.drains = None;
            view.fails_io = false;
            view.error = None;
            view.max_io_bytes = max_io_bytes;
            view.anatt_s = identity.as_ref().map_or(0, |identity| identity.anatt);
            view.identity = identity;
            publish_inventory(view, inventory);
        });
        if let Some(first) = self.first.take() {
            first.send(Ok(()));
        }
        self.answer(&Ok(()));
    }

    fn poll_live(&mut self, now: Instant, watches: &mut dyn Watches) {
        let Some(controller) = &mut self.controller else { return };
        if !controller.is_live() {
            let error = controller.error().map_or_else(|| "it went away".into(), ToString::to_string);
            return self.lost(error, now, watches);
        }
        self.poll_aborts(now);
        let Some(controller) = &mut self.controller else { return };
        let inventory = controller.inventory_mut();
        let changes = inventory.take_changes();
        if changes.namespaces || changes.ana {
            self.path.publish(|view| publish_inventory(view, inventory));
        }
        if self.path.broken.load(Ordering::Acquire) >= self.last_number {
            tracing::warn!(path = %self.path.address, "an I/O queue broke: the path is connected again");
            self.begin_end(Then::Reconnect, now);
        }
    }

    /// Whether the controller takes one more Abort.
    fn may_abort(&self) -> bool {
        let acl = self.controller.as_ref().and_then(Controller::identity).map_or(0, |identity| identity.acl);
        self.aborts.0 - self.aborts.1 < MAX_ABORTS.min(u64::from(acl) + 1)
    }

    /// Sends Abort for what reactors want to be aborted. Whether a command was is told by its own completion.
    fn poll_aborts(&mut self, now: Instant) {
        while let Some(done) = self.controller.as_mut().and_then(Controller::take_admin) {
            self.aborts.1 += 1;
            let AdminDone::Completed(done) = done else { continue };
            if !done.cqe.status().is_success() {
                tracing::warn!(path = %self.path.address, status = %done.cqe.status(), "Abort failed: the path is reset");
                self.path.broken.fetch_max(self.last_number, Ordering::AcqRel);
            }
        }
        while self.may_abort() {
            let Some(request) = self.path.next_abort() else { return };
            if request.number != self.last_number {
                continue;
            }
            let sqe = commands::abort(request.qid, request.cid);
            let user = ABORT + self.aborts.0;
            let controller = self.controller.as_mut().expect("a path that works has a controller");
            if !controller.submit_admin(user, sqe, Payload::None, Buffers::new(), now) {
                // It is lost, or its admin queue is full: a command that hangs is found again by its age.
                return;
            }
            self.aborts.0 += 1;
        }
    }

    /// Stops the flow of commands; what comes then comes when they have ended.
    fn begin_end(&mut self, then: Then, now: Instant) {
        let number = self.last_number;
        self.phase = Phase::Draining { until: now + DRAIN_PATIENCE, then };
        let state = if then == Then::Detach { PathState::Failed } else { PathState::Resetting };
        self.path.publish(|view| {
            view.state = state;
            view.association = None;
            view.drains = Some(number);
        });
    }

    fn poll_draining(&mut self, now: Instant, until: Instant, then: Then, watches: &mut dyn Watches) {
        let drained = self.association.as_ref().is_none_or(|a| a.open.load(Ordering::Acquire) == 0);
        let Some(controller) = &mut self.controller else { return };
        if !controller.is_live() {
            self.end_association(false, watches);
            self.go_on(then, now);
        } else if drained {
            controller.shut_down();
            self.phase = Phase::ShuttingDown { then };
        } else if now >= until && self.path.view().drains.is_some() {
            // Commands that hang are given up: every reactor closes its queue.
            self.path.publish(|view| view.drains = None);
        }
    }

    fn poll_shutting_down(&mut self, now: Instant, then: Then, watches: &mut dyn Watches) {
        let Some(controller) = &self.controller else { return };
        if controller.state() == State::Down {
            let acknowledged = controller.error().is_none();
            self.end_association(acknowledged, watches);
            self.go_on(then, now);
        }
    }

    fn go_on(&mut self, then: Then, now: Instant) {
        match then {
            Then::Reconnect => self.try_again(None, now),
            Then::Disable => {
                self.phase = Phase::Disabled;
                self.path.publish(|view| view.state = PathState::Disabled);
                self.answer(&Ok(()));
            }
            Then::Detach => {
                self.phase = Phase::Down;
                self.path.publish(|view| view.state = PathState::Failed);
                self.answer(&Ok(()));
            }
        }
    }

    /// Closes the connection. The association is fenced later.
    fn end_association(&mut self, acknowledged: bool, watches: &mut dyn Watches) {
        let cqt = self.controller.as_ref().and_then(Controller::identity).map_or(0, |identity| identity.cqt.get());
        if let Some(mut controller) = self.controller.take() {
            controller.close(watches);
        }
        if let Some(association) = self.association.take() {
            let quiesce = if cqt == 0 { DEFAULT_QUIESCE } else { Duration::from_millis(cqt.into()) };
            let wait = self.kato.unwrap_or_default() * 2 + quiesce;
            self.ending.push_back(Ending { association, acknowledged, wait, closed: None });
        }
    }

    /// The controller is lost, or an attempt to have it has failed.
    fn lost(&mut self, error: String, now: Instant, watches: &mut dyn Watches) {
        let live = self.association.is_some();
        self.end_association(false, watches);
        if live {
            tracing::warn!(path = %self.path.address, error, "a path is lost");
        }
        if let Some(first) = self.first.take() {
            self.phase = Phase::Down;
            self.path.publish(|view| view.state = PathState::Failed);
            first.send(Err(Denial::Failed(error)));
            return;
        }
        self.try_again(Some(error), now);
    }

    fn try_again(&mut self, error: Option<String>, now: Instant) {
        if error.is_some() && self.next_port() {
            self.phase = Phase::Waiting(now);
            return self.path.publish(|view| view.error = error);
        }
        self.tried = 0;
        match self.recovery.failed(now) {
            Next::TryAt(at) => {
                if let Some(error) = &error {
                    // Whoever waits is told how the first attempt went; there may be no end of them.
                    let why = format!("the controller does not come back yet, and is tried again: {error}");
                    self.answer(&Err(Denial::Failed(why)));
                }
                let short = self.recovery.lost_at() == Some(now) && now.since(self.live_since) < SHORT_LIFE;
                let at = if short && error.is_some() { at.max(now + SHORT_LIFE) } else { at };
                self.phase = Phase::Waiting(at);
                self.path.publish(|view| {
                    view.state = PathState::Reconnecting;
                    view.association = None;
                    view.drains = None;
                    view.error = error.or(view.error.take());
                });
            }
            Next::GiveUp => {
                self.path.publish(|view| view.error = error.or(view.error.take()));
                self.give_up();
            }
        }
    }

    fn give_up(&mut self) {
        tracing::error!(path = %self.path.address, "a path is given up");
        self.phase = Phase::Down;
        self.fails_io = true;
        self.path.publish(|view| {
            view.state = PathState::Failed;
            view.association = None;
            view.drains = None;
            view.fails_io = true;
        });
        let why = self.path.view().error.clone().unwrap_or_default();
        self.answer(&Err(Denial::Failed(format!("the controller cannot be had again: {why}"))));
    }

    fn answer(&mut self, result: &Outcome) {
        for waiter in self.waiters.drain(..) {
            waiter.send(result.clone());
        }
    }

    /// Fences what can be: in order, so that one number says which are.
    fn fence(&mut self, now: Instant) -> bool {
        let mut any = false;
        while let Some(ending) = self.ending.front_mut() {
            if ending.association.open.load(Ordering::Acquire) > 0 {
                break;
            }
            let closed = *ending.closed.get_or_insert(now);
            if !ending.acknowledged && now < closed + ending.wait {
                break;
            }
            let number = ending.association.number;
            self.ending.pop_front();
            self.path.publish(|view| view.fenced = number);
            any = true;
        }
        any
    }

    /// Ends the association in good order and then does what `then` says; `reply` is told how that went.
    pub fn end(&mut self, then: Then, reply: Reply<Outcome>, now: Instant, watches: &mut dyn Watches) {
        match (self.phase, then) {
            (Phase::Down, Then::Detach) => return reply.send(Ok(())),
            (Phase::Disabled, Then::Disable) => {
                return reply.send(Err(Denial::Already("the controller is disabled already")));
            }
            (Phase::Down, _) => return reply.send(Err(Denial::Gone("the path is given up or being detached"))),
            (Phase::Draining { .. } | Phase::ShuttingDown { .. }, Then::Reconnect | Then::Disable) => {
                return reply.send(Err(Denial::Busy("the controller is being reset already")));
            }
            (Phase::Disabled, Then::Reconnect) => {
                return reply.send(Err(Denial::Already("the controller is disabled: enable it first")));
            }
            _ => {}
        }
        match self.phase {
            Phase::Live => {
                self.waiters.push(reply);
                self.begin_end(then, now);
            }
            Phase::Draining { until, .. } => {
                self.answer(&Err(Denial::Gone("the controller is being detached")));
                self.waiters.push(reply);
                self.phase = Phase::Draining { until, then };
            }
            Phase::ShuttingDown { .. } => {
                self.answer(&Err(Denial::Gone("the controller is being detached")));
                self.waiters.push(reply);
                self.phase = Phase::ShuttingDown { then };
            }
            Phase::Waiting(_) if then == Then::Reconnect => {
                self.phase = Phase::Waiting(now);
                self.waiters.push(reply);
            }
            Phase::Connecting if then == Then::Reconnect => self.waiters.push(reply),
            _ => {
                self.answer(&Err(Denial::Gone("the controller is being disabled or detached")));
                self.end_association(false, watches);
                self.waiters.push(reply);
                self.go_on(then, now);
            }
        }
    }

    /// Connects a path that was disabled.
    pub fn enable(&mut self, reply: Reply<Outcome>, now: Instant) {
        if self.phase != Phase::Disabled {
            let denial = match self.phase {
                Phase::Down => Denial::Gone("the path is given up or being detached"),
                Phase::Draining { .. } | Phase::ShuttingDown { .. } => Denial::Busy("the controller is being reset"),
                _ => Denial::Already("the controller is not disabled"),
            };
            return reply.send(Err(denial));
        }
        self.waiters.push(reply);
        self.recovery.recovered(now);
        self.recovery.failed(now);
        self.path.publish(|view| view.state = PathState::Reconnecting);
        self.connect(now);
    }

    /// Something was announced under the home's key.
    pub fn ready(&mut self, ready: Ready) {
        if let Some(controller) = &mut self.controller {
            controller.ready(ready);
        }
    }

    /// Whether polling now can do something.
    pub fn has_work(&self) -> bool {
        let fencing = self
            .ending
            .front()
            .is_some_and(|e| e.association.open.load(Ordering::Acquire) == 0 && (e.closed.is_none() || e.acknowledged));
        let broken = self.phase == Phase::Live && self.path.broken.load(Ordering::Acquire) >= self.last_number;
        let drained = matches!(self.phase, Phase::Draining { .. })
            && self.association.as_ref().is_none_or(|a| a.open.load(Ordering::Acquire) == 0);
        let aborts = self.phase == Phase::Live && self.path.has_aborts() && self.may_abort();
        fencing || aborts || broken || drained || self.controller.as_ref().is_some_and(Controller::has_work)
    }

    /// When it wants to be polled even if nothing was announced.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let phase = match self.phase {
            Phase::Draining { until, .. } if self.path.view().drains.is_some() => Some(until),
            Phase::Waiting(at) => Some(at),
            _ => None,
        };
        let fence = self.ending.front().and_then(|e| e.closed.map(|closed| closed + e.wait));
        let controller = self.controller.as_ref().and_then(|controller| controller.deadline(now));
        let recovery = if self.phase == Phase::Down { None } else { self.recovery.deadline(now) };
        phase.into_iter().chain(fence).chain(controller).chain(recovery).min()
    }
}

fn publish_inventory(view: &mut crate::path::View, inventory: &nvmf::host::Inventory) {
    view.namespaces.clone_from(inventory.namespaces());
    view.ana = inventory.namespaces().values().map(|ns| (ns.nsid, inventory.ana_state(ns))).collect();
}
