//! A controller of a remote subsystem over all of its connections.
//!
//! ```text
//!            set-up complete                    shut_down()
//!  Connecting -----------------> Live ------------------------> ShuttingDown --> Down
//!      ^   |                       | failure, reset()                            ^
//!      |   | failure               v                                             |
//!      |   +-------------------> Waiting --(no more time, or never was live)-----+
//!      +--------(it is time)-------+
//! ```
//! The owner polls it, looks at its [`State`] and its [`epoch`](Controller::epoch), and makes I/O queues with
//! [`queue_params`](Controller::queue_params) while it is live. When the epoch has changed, or the controller is not live,
//! the queues that were made before are to be closed: the controller that they belonged to is gone.

use super::association::{ADMIN_ENTRIES, Association, Stage};
use super::inventory::Inventory;
use super::queue::QueueParams;
use super::recovery::{Next, Recovery};
use super::transport::{Completion, Connector, Link, Payload, QueueName, Watches};
use super::{Error, Options};
use crate::spec::Sqe;
use crate::spec::identify::IdentifyController;
use reactor::park::Ready;
use reactor::{Buffers, Instant};
use std::fmt;
use std::sync::Arc;

/// What a controller is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is being connected and identified.
    Connecting,
    /// It works.
    Live,
    /// It is lost; the next attempt is made then.
    Waiting(Instant),
    /// It is told that the host leaves.
    ShuttingDown,
    /// It is lost and not coming back, or was shut down.
    Down,
}

/// The end of an admin command of the owner's.
#[derive(Debug)]
pub enum AdminDone {
    /// It completed.
    Completed(Completion),
    /// The connection was lost first, and its fate is unknown.
    Lost(u64),
}

/// A controller.
pub struct Controller {
    connector: Arc<dyn Connector>,
    options: Arc<Options>,
    key: u64,
    state: State,
    association: Option<Association>,
    recovery: Recovery,
    was_live: bool,
    epoch: u64,
    inventory: Inventory,
    identity: Option<Box<IdentifyController>>,
    error: Option<Error>,
    lost: Vec<u64>,
    /// The association is to be given up with the next poll: for this reason, and at once or as after any loss.
    resets: Option<(Error, bool)>,
}

impl fmt::Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Controller({}, {:?}, epoch {}, {:?})", self.options.subnqn, self.state, self.epoch, self.error)
    }
}

impl Controller {
    /// A controller that is not connected yet. Its admin queue is watched under `key`.
    ///
    /// # Panics
    /// If the options ask for no I/O queues or no depth.
    pub fn new(connector: Arc<dyn Connector>, options: Options, key: u64, now: Instant) -> Controller {
        assert!(options.io_queues > 0 && options.io_depth > 0, "a controller has I/O queues");
        let recovery = Recovery::new(options.reconnect);
        let options = Options { admin_in_capsule_bytes: connector.admin_in_capsule_bytes(), ..options };
        Controller {
            connector,
            options: Arc::new(options),
            key,
            state: State::Waiting(now),
            association: None,
            recovery,
            was_live: false,
            epoch: 0,
            inventory: Inventory::default(),
            identity: None,
            error: None,
            lost: Vec::new(),
            resets: None,
        }
    }

    /// What it is doing.
    pub fn state(&self) -> State {
        self.state
    }

    /// Whether it works.
    pub fn is_live(&self) -> bool {
        self.state == State::Live
    }

    /// Why it was lost last, or is down.
    pub fn error(&self) -> Option<&Error> {
        self.error.as_ref()
    }

    /// Counts how often it came up.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What it was made with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// What is known of the subsystem; true while the controller is live, and as of its last life otherwise.
    pub fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// The same, for taking the changes.
    pub fn inventory_mut(&mut self) -> &mut Inventory {
        &mut self.inventory
    }

    /// Identify Controller, as it was said last.
    pub fn identity(&self) -> Option<&IdentifyController> {
        self.identity.as_deref()
    }

    /// The controller's identifier, while it is live.
    pub fn cntlid(&self) -> Option<u16> {
        self.live().map(|association| association.cntlid)
    }

    /// I/O queues that it has for this host, while it is live.
    pub fn io_queues(&self) -> u16 {
        self.live().map_or(0, |association| association.io_queues)
    }

    /// The longest payload of one command, bytes; `None` for no limit (MDTS).
    pub fn max_io_bytes(&self) -> Option<u64> {
        self.live().and_then(|association| association.max_io_bytes)
    }

    /// Whether I/O that has no way to go fails now instead of waiting for the controller to come back.
    pub fn fails_io(&self, now: Instant) -> bool {
        self.state == State::Down || self.recovery.fails_io(now)
    }

    fn live(&self) -> Option<&Association> {
        self.association.as_ref().filter(|_| self.state == State::Live)
    }

    /// What it takes to connect I/O queue `qid`, 1 to [`io_queues`](Self::io_queues); `None` while it is not live.
    pub fn queue_params(&self, qid: u16) -> Option<QueueParams> {
        let association = self.live()?;
        if qid == 0 || qid > association.io_queues {
            return None;
        }
        // One entry of a queue always stays free: MQES, which is 0's-based, is the number that can be used.
        let mut slots = self.options.io_depth.min(association.cap.mqes() as u16);
        let maxcmd = association.identity.as_ref().map_or(0, |identity| identity.maxcmd.get());
        if maxcmd > 0 {
            slots = slots.min(maxcmd);
        }
        Some(QueueParams {
            connector: Arc::clone(&self.connector),
            subnqn: self.options.subnqn.as_str().into(),
            hostnqn: self.options.hostnqn.as_str().into(),
            hostid: self.options.hostid,
            cntlid: association.cntlid,
            qid,
            slots: slots.clamp(1, 1 << 15),
            in_capsule_bytes: association.in_capsule_bytes,
            descriptors: association.identity.as_ref().map_or(1, |identity| identity.msdbd),
            step_timeout: self.options.step_timeout,
            connect_timeout: self.options.connect_timeout.unwrap_or(self.options.step_timeout),
            io_timeout: self.options.io_timeout,
            on_timeout: self.options.on_timeout,
        })
    }

    /// Does what there is to do; whether that was anything. Failures are told by [`state`](Self::state) and
    /// [`error`](Self::error).
    pub fn poll(&mut self, now: Instant, watches: &mut dyn Watches) -> bool {
        if let Some((error, at_once)) = self.resets.take() {
            self.lose(error, now, watches);
            if at_once && matches!(self.state, State::Waiting(_)) {
                self.state = State::Waiting(now);
            }
            return true;
        }
        match self.state {
            State::Down => false,
            State::Waiting(_) if self.was_live && self.recovery.has_given_up(now) => {
                self.state = State::Down;
                true
            }
            State::Waiting(at) if now < at => false,
            State::Waiting(_) => {
                self.connect(now, watches);
                true
            }
            State::Connecting | State::Live | State::ShuttingDown => self.poll_association(now, watches),
        }
    }

    fn connect(&mut self, now: Instant, watches: &mut dyn Watches) {
        match self.connector.connect(ADMIN_ENTRIES - 1, QueueName::default()) {
            Ok(qpair) => {
                let link = Link::new(qpair, self.key);
                self.association = Some(Association::new(link, Arc::clone(&self.options), now));
                self.state = State::Connecting;
            }
            Err(error) => self.lose(Error::Transport(error.to_string()), now, watches),
        }
    }

    fn poll_association(&mut self, now: Instant, watches: &mut dyn Watches) -> bool {
        let association = self.association.as_mut().expect("these states have an association");
        let busy = match association.poll(now, watches, &mut self.inventory) {
            Ok(busy) => busy,
            Err(error) => {
                self.lose(error, now, watches);
                return true;
            }
        };
        match association.stage() {
            Stage::Live if self.state == State::Connecting => {
                self.state = State::Live;
                self.identity.clone_from(&association.identity);
                self.recovery.recovered(now);
                self.was_live = true;
                self.error = None;
                self.epoch += 1;
                tracing::debug!(subnqn = self.options.subnqn, cntlid = association.cntlid, "a controller is live");
            }
            Stage::Over => {
                self.drop_association(watches);
                self.state = State::Down;
            }
            _ if self.was_live && self.state == State::Connecting && self.recovery.has_given_up(now) => {
                self.drop_association(watches);
                self.state = State::Down;
            }
            _ => {}
        }
        busy
    }

    fn lose(&mut self, error: Error, now: Instant, watches: &mut dyn Watches) {
        let leaving = self.state == State::ShuttingDown;
        self.drop_association(watches);
        tracing::debug!(subnqn = self.options.subnqn, %error, "a controller is lost");
        self.error = Some(error);
        self.state = match () {
            // The first connection is the caller's to try again.
            () if leaving || !self.was_live => State::Down,
            () => match self.recovery.failed(now) {
                Next::TryAt(at) => State::Waiting(at),
                Next::GiveUp => State::Down,
            },
        };
    }

    fn drop_association(&mut self, watches: &mut dyn Watches) {
        let Some(mut association) = self.association.take() else { return };
        let lost = &mut self.lost;
        for completion in association.admin_done.drain(..) {
            lost.push(completion.user);
        }
        association.close(watches, &mut |user, _| lost.push(user));
    }

    /// An I/O queue has failed: the controller is given up, and comes back as after any other loss.
    pub fn fail(&mut self, error: Error) {
        if self.state == State::Live && self.resets.is_none() {
            self.resets = Some((error, false));
        }
    }

    /// Gives the connection up and makes a new one at once, if the options allow it.
    pub fn reset(&mut self) {
        if matches!(self.state, State::Live | State::Connecting) {
            self.resets = Some((Error::Transport("the controller was reset".into()), true));
        }
        if let State::Waiting(at) = &mut self.state {
            *at = Instant(0);
        }
    }

    /// Tells the controller that the host leaves; [`State::Down`] once it knows, or cannot be told.
    pub fn shut_down(&mut self) {
        match (self.state, &mut self.association) {
            (State::Live, Some(association)) => {
                association.shut_down();
                self.state = State::ShuttingDown;
            }
            (State::ShuttingDown | State::Down, _) => {}
            // There is nobody to tell. What there is of a connection is closed by `close`, or when it is dropped.
            _ => self.state = State::Down,
        }
    }

    /// Sends an admin command under a number of the caller's below 2^63, if the controller is live and takes one more.
    ///
    /// # Panics
    /// If a command with that number is outstanding.
    pub fn submit_admin(&mut self, user: u64, sqe: Sqe, payload: Payload, data: Buffers, now: Instant) -> bool {
        match (self.state, &mut self.association) {
            (State::Live, Some(association)) => association.submit_admin(user, sqe, payload, data, now),
            _ => false,
        }
    }

    /// An admin command that has ended.
    pub fn take_admin(&mut self) -> Option<AdminDone> {
        let completed = self.association.as_mut().and_then(|association| association.admin_done.pop());
        completed.map(AdminDone::Completed).or_else(|| self.lost.pop().map(AdminDone::Lost))
    }

    /// Something was announced under the controller's key.
    pub fn ready(&mut self, ready: Ready) {
        if let Some(association) = &mut self.association {
            association.ready(ready);
        }
    }

    /// Whether polling now can do something. Otherwise there is nothing to do before the next [`ready`](Self::ready) or
    /// [`deadline`](Self::deadline).
    pub fn has_work(&self) -> bool {
        self.resets.is_some()
            || self.association.as_ref().is_some_and(Association::has_work) && self.state != State::Down
    }

    /// When it wants to be polled even if nothing was announced.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let own = match self.state {
            State::Down => return None,
            State::Waiting(at) => Some(at),
            _ => self.association.as_ref().and_then(Association::deadline),
        };
        own.into_iter().chain(self.recovery.deadline(now)).min()
    }

    /// Ends it at once.
    pub fn close(&mut self, watches: &mut dyn Watches) {
        self.drop_association(watches);
        self.state = State::Down;
    }
}
