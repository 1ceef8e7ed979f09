//! The brain of one controller: properties, admin commands, asynchronous events, keep alive.
//!
//! A state machine without sockets, threads or clock: what happened comes in with the time that it happened at, what is
//! to be done comes back. It lives on the reactor of the admin queue, whose owner (the poll group) moves the data.
//!
//! # What the owner does
//! - After each call: [`Controller::pop_event`] until it is `None`; each is a completion of a command that was
//!   [`Admin::Parked`].
//! - [`Effect::Disabled`] and [`Effect::ShutDown`]: close the controller's I/O queues on all reactors, then call
//!   [`Controller::queues_deleted`]; CSTS shows the end of it only then.
//! - [`Admin::Abort`]: look for the command on the I/O queue, then complete with [`Controller::abort_done`].
//! - At [`Controller::keep_alive_deadline`]: [`Controller::check_keep_alive`]; `false` ends the association.
//! - When the view changes: [`Controller::target_changed`]; with no subsystem left the association ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use reactor::{Buffers, Instant};

use super::shared::ControllerShared;
use super::view::{ListenAddress, SubsystemView, TargetView, TransportOptions};
use crate::spec::{Cqe, FabricsCommand, Sqe, Status};

/// What a controller is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Namespaces of a subsystem.
    Io,
    /// The discovery service.
    Discovery,
}

/// What a controller is made of.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// What for.
    pub kind: Kind,
    /// What its I/O queues see of it.
    pub shared: Arc<ControllerShared>,
    /// Its subsystem; `None` for discovery.
    pub subsystem: Option<Arc<SubsystemView>>,
    /// The whole target.
    pub target: Arc<TargetView>,
    /// The transport's options.
    pub transport: TransportOptions,
    /// The listener that the host came in through.
    pub listener: ListenAddress,
    /// The address of this side of the admin queue's connection: what a listener on a wildcard address is reached at.
    pub local_addr: SocketAddr,
    /// Keep alive timeout of the Connect command, in milliseconds; 0 for none.
    pub kato_ms: u32,
    /// Entries of the admin queue.
    pub admin_queue_entries: u32,
}

/// What admin commands need besides.
#[derive(Clone, Copy, Debug)]
pub struct AdminEnv {
    /// When the target started: power on.
    pub started: Instant,
}

/// What the owner must do after a property was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// I/O queues may be connected now.
    Enabled,
    /// CC.EN went from 1 to 0: delete the I/O queues, then call [`Controller::queues_deleted`].
    Disabled,
    /// CC.SHN asked for a shutdown: delete the I/O queues, then call [`Controller::queues_deleted`].
    ShutDown,
}

/// The end of a Property Get or Set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FabricsOutcome {
    /// The value read (0 for a set), or the status to complete with.
    pub result: Result<u64, Status>,
    /// What to do besides completing.
    pub effect: Effect,
}

impl FabricsOutcome {
    /// The completion.
    pub fn cqe(&self, cid: u16) -> Cqe {
        match self.result {
            Ok(value) => Cqe::success(cid).with_result(value),
            Err(status) => Cqe::new(cid, status),
        }
    }
}

/// What became of an admin command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admin {
    /// It is done.
    Complete {
        /// The completion.
        cqe: Cqe,
        /// The data goes to the host.
        send: bool,
    },
    /// An Asynchronous Event Request: kept, with its slot, until [`Controller::pop_event`] gives it back.
    Parked,
    /// A command of an I/O queue is to be aborted; complete with [`Controller::abort_done`].
    Abort {
        /// The Abort command itself.
        cid_of_abort: u16,
        /// Queue of the command to abort, not 0.
        sqid: u16,
        /// The command to abort.
        cid: u16,
    },
}

/// One error for the Error Information log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorRecord {
    /// Queue of the command.
    pub sqid: u16,
    /// The command.
    pub cid: u16,
    /// Its status.
    pub status: Status,
    /// Its opcode.
    pub opcode: u8,
    /// Its namespace; 0 if none.
    pub nsid: u32,
    /// First logical block with the error; 0 if none.
    pub lba: u64,
    /// Byte and bit of the submission queue entry that was wrong, as PEL; FFFFh if none in particular.
    pub pel: u16,
}

/// The brain of one controller.
#[derive(Debug)]
pub struct Controller {
    config: ControllerConfig,
}

impl Controller {
    /// After a successful Connect of the admin queue.
    pub fn new(config: ControllerConfig, now: Instant) -> Controller {
        let _ = now;
        Controller { config }
    }

    /// Executes a Property Get or Property Set. Connect is not for here, nor authentication.
    pub fn fabrics(&mut self, cmd: &FabricsCommand, now: Instant) -> FabricsOutcome {
        let _ = (cmd, now);
        FabricsOutcome { result: Err(Status::INVALID_OPCODE.dnr()), effect: Effect::None }
    }

    /// Executes an admin command that came in `slot`. `data` is as long as the command's SGL says: data from the host, or
    /// memory for data to it.
    pub fn execute(&mut self, slot: u16, sqe: &Sqe, data: &mut Buffers, env: &AdminEnv, now: Instant) -> Admin {
        let _ = (slot, data, env, now);
        Admin::Complete { cqe: Cqe::new(sqe.cid.get(), Status::INVALID_OPCODE.dnr()), send: false }
    }

    /// A parked command to complete now: its slot and completion.
    pub fn pop_event(&mut self) -> Option<(u16, Cqe)> {
        None
    }

    /// The I/O queues of a disabled or shut down controller are gone.
    pub fn queues_deleted(&mut self, now: Instant) {
        let _ = now;
    }

    /// The search for a command to abort has ended: the completion of the Abort command.
    pub fn abort_done(&mut self, cid_of_abort: u16, aborted: bool) -> Cqe {
        Cqe::success(cid_of_abort).with_dw0(u32::from(!aborted))
    }

    /// Takes all parked commands out: slot and cid of each.
    pub fn parked_slots(&mut self) -> Vec<(u16, u16)> {
        Vec::new()
    }

    /// Takes the parked command `cid` out: its slot.
    pub fn abort_parked(&mut self, cid: u16) -> Option<u16> {
        let _ = cid;
        None
    }

    /// The target has changed: from now on the new view is what the host sees, and it is told of what it wants to be
    /// told. The subsystem is gone if [`Controller::subsystem`] is `None` afterwards (of a controller that is not for
    /// discovery).
    pub fn target_changed(&mut self, new: Arc<TargetView>) {
        self.config.target = new;
    }

    /// The controller's subsystem; `None` for discovery, and when it was deleted.
    pub fn subsystem(&self) -> Option<&Arc<SubsystemView>> {
        self.config.subsystem.as_ref()
    }

    /// Adds to the Error Information log.
    pub fn record_error(&mut self, entry: ErrorRecord) {
        let _ = entry;
    }

    /// When [`Controller::check_keep_alive`] is to be called next.
    pub fn keep_alive_deadline(&self) -> Option<Instant> {
        None
    }

    /// Whether the association goes on.
    pub fn check_keep_alive(&mut self, now: Instant) -> bool {
        let _ = now;
        true
    }

    /// CC.EN = 1 and CSTS.RDY = 1.
    pub fn is_enabled(&self) -> bool {
        self.config.shared.ready.load(Ordering::Relaxed)
    }
}
