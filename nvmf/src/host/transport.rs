//! What the host asks of a transport.

use crate::spec::{Cqe, Sqe};
use reactor::Buffers;
use std::io;

/// Which way the payload of a command goes, and its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// None: the buffers are empty.
    None,
    /// To the controller; in the capsule if it fits.
    ToController(u32),
    /// To the host: the buffers are room for it.
    ToHost(u32),
}

/// The end of a command.
#[derive(Debug)]
pub struct Completion {
    /// What the command was submitted with.
    pub user: u64,
    /// The entry; its CID means nothing to the caller.
    pub cqe: Cqe,
    /// The payload that came with the command.
    pub data: Buffers,
    /// Bytes of payload that went over the wire.
    pub transferred_bytes: u32,
}

/// One queue pair of a transport. Commands that are submitted leave together with the next [`flush`](Self::flush).
pub trait Qpair {
    /// Whether the transport is set up, so that commands can be submitted. Never becomes false again.
    fn is_ready(&self) -> bool;

    /// Whether a command will be taken.
    fn can_submit(&self) -> bool;

    /// Takes a command. CID, PSDT and data pointer of `sqe` are the transport's.
    ///
    /// # Panics
    /// If [`can_submit`](Self::can_submit) is false, or `data` is not as long as `payload` says.
    fn submit(&mut self, user: u64, sqe: Sqe, payload: Payload, data: Buffers);

    /// Receives once and appends what has completed; whether anything came.
    ///
    /// # Errors
    /// The queue pair is of no use any more, for the reason given.
    fn poll(&mut self, done: &mut Vec<Completion>) -> Result<bool, String>;

    /// Sends what waits, as much as there is room for.
    ///
    /// # Errors
    /// As [`poll`](Self::poll).
    fn flush(&mut self) -> Result<(), String>;

    /// Commands that have not completed.
    fn outstanding(&self) -> usize;

    /// How much data commands may carry in their capsules from now on, bytes.
    fn set_in_capsule_bytes(&mut self, bytes: u32);

    /// Ends the queue pair: gives back the commands that have not completed, whose fate is unknown.
    fn close(&mut self, lost: &mut dyn FnMut(u64, Buffers));
}

/// Makes queue pairs to one controller.
pub trait Connector {
    /// Starts to set a queue pair up that can have `slots` commands outstanding.
    ///
    /// # Errors
    /// When the host refuses at once.
    fn connect(&self, slots: u16) -> io::Result<Box<dyn Qpair>>;

    /// In-capsule data that Connect and admin commands may carry, bytes.
    fn admin_in_capsule_bytes(&self) -> u32;
}
