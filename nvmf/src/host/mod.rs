//! The host's side: controllers of remote subsystems, and their queue pairs, whatever the transport.
//!
//! - [`transport`]: what a transport gives: queue pairs that take commands and give completions.
//! - [`controller`]: Connect, enable, identify, I/O queues, keep-alive.
//! - [`queue`]: I/O commands on one queue pair.
//!
//! Everything is polled and none of it blocks, sleeps or reads a clock: the caller says what time it is. A caller on a
//! reactor polls from one of its pollers.

pub mod controller;
pub mod queue;
pub mod transport;

pub use controller::{Controller, Namespace, Options};
pub use queue::IoQueue;
pub use transport::{Completion, Connector, Payload, Qpair};

use crate::spec::Status;
use std::fmt;

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
            Error::Refused { what, status } => write!(f, "{what}: {}", status.name()),
            Error::Timeout { what } => write!(f, "{what}: the controller does not answer"),
            Error::Nonsense(what) => write!(f, "the controller says what cannot be: {what}"),
        }
    }
}

impl std::error::Error for Error {}
