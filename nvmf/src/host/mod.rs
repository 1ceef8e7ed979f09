//! The host's side: controllers of remote subsystems, and their queue pairs, whatever the transport.
//!
//! - [`transport`]: what a transport gives: queue pairs that take commands and give completions; and how they are
//!   watched.
//! - [`controller`]: a controller with its losses and returns. Inside: one association at a time, which connects, identifies,
//!   keeps alive and follows events.
//! - [`inventory`]: what is known of a subsystem: namespaces, access states, discovery log.
//! - [`queue`]: I/O commands on one queue pair, on the controller's thread or any other.
//! - [`recovery`]: when to connect again and when to give up.
//! - [`log_reader`]: log pages that change while they are read.
//! - [`discovery`]: a walk over discovery services and their referrals.
//! - [`commands`]: submission queue entries.
//!
//! Everything is polled and none of it blocks, sleeps or reads a clock: the caller says what time it is. A caller on a
//! reactor polls from one of its pollers, has the connections watched ([`transport::Watching`]) and lets the reactor sleep
//! when nothing `has_work` before the next `deadline`.
//!
//! Nothing that a controller says is believed: lists have to rise, sizes have to be powers of two, counts are bounded
//! before memory is taken, and a response to no command ends the connection.

mod association;
pub mod commands;
pub mod controller;
pub mod discovery;
mod fabrics_connect;
pub mod inventory;
pub mod log_reader;
pub mod queue;
pub mod recovery;
pub mod transport;

#[cfg(test)]
mod tests;

pub use controller::{AdminDone, Controller, State};
pub use inventory::{Identity, Inventory, Namespace};
pub use queue::{IoQueue, QueueParams};
pub use recovery::ReconnectPolicy;
pub use transport::{
    Completion, Connector, Payload, PayloadMemory, Polled, Qpair, QueueName, Transport, Transports, Watches, Watching,
};

use crate::spec::Status;
use std::fmt;
use std::time::Duration;

/// What happens to a queue with an I/O command that takes longer than it may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// It is given up.
    #[default]
    GiveUp,
    /// The owner is told, who may have the command aborted; if it takes as long again, the queue is given up.
    Tell,
    /// Nothing: the command is waited for as long as there is a connection.
    Nothing,
}

/// What to connect to, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// NQN of the subsystem.
    pub subnqn: String,
    /// NQN of this host.
    pub hostnqn: String,
    /// Identifier of this host.
    pub hostid: [u8; 16],
    /// It is a discovery subsystem: there are no namespaces and no I/O queues, but a discovery log.
    pub discovery: bool,
    /// I/O queues to ask for, at least 1. Fewer may be granted.
    pub io_queues: u16,
    /// Commands outstanding at once on an I/O queue, at least 1. Lowered to what the controller can.
    pub io_depth: u16,
    /// How long each step of the set-up, and an admin command, may take.
    pub step_timeout: Duration,
    /// How long the transport may take to set a connection up; `None`: as long as any other step.
    pub connect_timeout: Option<Duration>,
    /// How long an I/O command may take.
    pub io_timeout: Duration,
    /// What happens when it takes longer.
    pub on_timeout: OnTimeout,
    /// Keep-alive timeout, milliseconds; 0 for none.
    pub kato_ms: u32,
    /// What happens when the controller is lost.
    pub reconnect: ReconnectPolicy,
    /// In-capsule data of Connect and admin commands; the transport's, set by [`Controller::new`].
    pub admin_in_capsule_bytes: u32,
}

impl Default for Options {
    /// One queue of 128 commands; five seconds for a step, thirty for I/O, a keep-alive of fifteen; lost for good when lost.
    fn default() -> Options {
        Options {
            subnqn: String::new(),
            hostnqn: String::new(),
            hostid: [0; 16],
            discovery: false,
            io_queues: 1,
            io_depth: 128,
            step_timeout: Duration::from_secs(5),
            connect_timeout: None,
            io_timeout: Duration::from_secs(30),
            on_timeout: OnTimeout::GiveUp,
            kato_ms: 15_000,
            reconnect: ReconnectPolicy::NEVER,
            admin_in_capsule_bytes: 0,
        }
    }
}

/// Why a controller or a queue is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The stream under a queue pair has failed or ended, or the protocol was broken.
    Transport(String),
    /// The controller refused something without which there is no going on.
    Refused {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        status: Status,
        /// What that means and what to do; may be empty.
        hint: &'static str,
    },
    /// The controller did not answer in time.
    Timeout {
        /// What was asked of it.
        what: &'static str,
    },
    /// What the controller says of itself cannot be.
    Nonsense(&'static str),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Transport(why) => f.write_str(why),
            Error::Refused { what, status, hint: "" } => write!(f, "{what}: {}", status.name()),
            Error::Refused { what, status, hint } => write!(f, "{what}: {}: {hint}", status.name()),
            Error::Timeout { what } => write!(f, "{what}: the controller does not answer"),
            Error::Nonsense(what) => write!(f, "the controller says what cannot be: {what}"),
        }
    }
}

impl std::error::Error for Error {}
