//! What a transport is to the target.
//!
//! A transport moves capsules and data; it knows nothing of subsystems. A command comes up when everything that it needs
//! is there: data from the host has arrived, memory for data to the host is held. Memory that is short is waited for in
//! order, inside the transport. A completion goes down with the data that belongs to it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use reactor::park::Ready;
use reactor::{BufferPool, Buffers, Context, Instant, PollerId};

use super::view::{ListenAddress, TransportKind, TransportOptions};
use crate::spec::{Cqe, Sqe, Status};

/// What happened on a queue pair.
#[derive(Debug)]
pub enum Event {
    /// A command that can be executed now. `slot` names it until it is completed; slots are below the queue's size.
    Command {
        /// The transport's name for the command.
        slot: u16,
        /// Running number of the command on its queue; neighbours differ by one (fused operations).
        seq: u32,
        /// The command.
        sqe: Sqe,
        /// Data from the host, or memory for data to it: exactly the length that the command's SGL names.
        data: Buffers,
    },
    /// A command that the transport could not bring up, for a fault of its own transfer; complete it with `status`.
    Rejected {
        /// The transport's name for the command.
        slot: u16,
        /// Running number of the command on its queue.
        seq: u32,
        /// The command.
        sqe: Sqe,
        /// Why.
        status: Status,
    },
}

/// Whether a queue pair goes on.
#[derive(Debug, PartialEq, Eq)]
pub enum Life {
    /// It does.
    Alive,
    /// The connection has ended, or must; for the log: why.
    Ended(String),
}

/// What became of [`Qpair::abort`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbortOutcome {
    /// No such command is outstanding.
    NotFound,
    /// It was not delivered, and will come up as [`Event::Rejected`] with Command Abort Requested.
    Undelivered,
    /// It was delivered in this slot, and is the caller's to abort.
    Executing(u16),
}

/// One queue pair, on one reactor.
pub trait Qpair {
    /// Takes in what has arrived and appends what came of it to `events`.
    fn receive(&mut self, pool: &mut BufferPool, events: &mut Vec<Event>) -> Life;
    /// Something is known to be waiting, also if only for memory.
    fn has_input(&self) -> bool;
    /// The peer owes something without which nothing goes on (its greeting, the rest of a message, data that it was asked
    /// for), and time for it runs.
    fn peer_is_due(&self) -> bool;
    /// Looks for a command to abort, by its identifier.
    fn abort(&mut self, cid: u16) -> AbortOutcome;
    /// Completes a command. `data` goes to the host before the completion does.
    fn complete(&mut self, slot: u16, cqe: Cqe, data: Option<Buffers>);
    /// Sends what was completed, as much as goes; memory of what has left goes back to `pool`.
    fn flush(&mut self, pool: &mut BufferPool) -> Life;
    /// There are completions that `flush` has not yet sent.
    fn has_output(&self) -> bool;
    /// The connection's source became ready.
    fn ready(&mut self, ready: Ready);
    /// The queue was connected: commands may now be this many at once; `io` tells an I/O queue (whose capsules may carry
    /// data of the I/O size) from an admin queue.
    fn connected(&mut self, queue_entries: u32, sq_flow_control_disabled: bool, io: bool);
    /// Starts reporting readiness to `poller` under `key`.
    ///
    /// # Errors
    /// When the host refuses.
    fn watch(&mut self, cx: &mut Context, poller: PollerId, key: u64) -> io::Result<()>;
    /// Ends the connection: what can be sent at once is sent, nothing is received any more. Memory goes back to `pool`.
    fn close(&mut self, cx: &mut Context, pool: &mut BufferPool);
    /// Where the host came from.
    fn peer_addr(&self) -> SocketAddr;
    /// Where the host came in.
    fn local_addr(&self) -> SocketAddr;
    /// Whether it can go to another reactor: false where it is bound to what its reactor has of a device.
    fn is_movable(&self) -> bool {
        false
    }
    /// Whether it could [`leave`](Qpair::leave) now: nothing waits to be sent, and it is not about to end. What has been received
    /// and not been taken goes along.
    fn may_leave(&self) -> bool {
        false
    }
    /// Takes it off its reactor. No readiness is reported any more, and no memory of `pool` goes along: what it holds is copied.
    ///
    /// # Errors
    /// The queue pair as it was, when it cannot move.
    fn leave(self: Box<Self>, cx: &mut Context, pool: &mut BufferPool) -> Result<Box<dyn Incoming>, Box<dyn Qpair>>;
}

/// The same bytes in memory of their own, for what leaves the reactor of `pool`.
pub fn off_pool(data: Buffers, pool: &mut BufferPool) -> Buffers {
    if data.is_empty() {
        pool.put(data);
        return Buffers::new();
    }
    let mut copy = Buffers::heap(data.len());
    let mut at = 0;
    for segment in data.segments() {
        copy.write_at(at, segment);
        at += segment.len();
    }
    pool.put(data);
    copy
}

/// A connection on its way from the reactor that accepted it, or that it leaves, to the one that will own it.
pub trait Incoming: Send {
    /// Makes the queue pair, on its reactor.
    ///
    /// # Errors
    /// When the host or the device cannot give what it needs; the peer was told, where the transport can.
    fn into_qpair(self: Box<Self>, place: &mut Place<'_>) -> io::Result<Box<dyn Qpair>>;
    /// Where the host came from.
    fn peer_addr(&self) -> SocketAddr;
    /// Ends it because there is no room for it, and says so where the transport can.
    fn turn_away(self: Box<Self>) {}
}

/// Where a queue pair is made: a reactor's poll group.
pub struct Place<'a> {
    /// The reactor.
    pub cx: &'a mut Context,
    /// The poll group's poller.
    pub poller: PollerId,
    /// The reactor's memory.
    pub pool: &'a mut BufferPool,
    /// What queue pairs share there. A transport that needs a group adds one with its first queue pair.
    pub groups: &'a mut Vec<Box<dyn Group>>,
}

impl Place<'_> {
    /// The key under which the next group to be added may watch sources; [`Group::ready`] is told of them.
    pub fn next_group_key(&self) -> u64 {
        group_key(self.groups.len())
    }
}

/// Keys of a poll group's watches: the lowest two bits tell what is watched.
pub(super) const KEY_QPAIR: u64 = 0;
pub(super) const KEY_LISTENER: u64 = 1;
pub(super) const KEY_GROUP: u64 = 2;

fn group_key(index: usize) -> u64 {
    (index as u64) << 2 | KEY_GROUP
}

/// What the queue pairs that one transport has on one reactor share: a completion queue of a device, say. Transports whose
/// queue pairs share nothing have none. Polled once a step, before its queue pairs; a group stays as long as its reactor.
pub trait Group {
    /// Takes in what has arrived for its queue pairs, and appends the keys of those that have input now; whether there was
    /// anything. Also what is left of queue pairs that were closed comes to its end here.
    fn poll(&mut self, cx: &mut Context, pool: &mut BufferPool, woken: &mut Vec<u64>) -> bool;
    /// A source that it watches became ready.
    fn ready(&mut self, ready: Ready);
    /// The reactor wants to sleep: true if there is nothing, and what comes will be announced.
    fn may_sleep(&mut self) -> bool;
    /// When it has to be polled at the latest.
    fn deadline(&self) -> Option<Instant>;
    /// What it has done.
    fn stats(&self) -> GroupStats;
}

/// What a group has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupStats {
    /// Commands that wait for payload memory now.
    pub pending_data_buffer: u64,
    /// The devices that it uses.
    pub devices: Vec<DeviceStats>,
}

/// What a group has done on one device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// Its name.
    pub name: String,
    /// Looks at completion queues, and those that found nothing.
    pub polls: u64,
    /// Of these, those that found nothing.
    pub idle_polls: u64,
    /// Completions found.
    pub completions: u64,
    /// Commands.
    pub requests: u64,
    /// Time of all commands together, until their responses have arrived, nanoseconds; as exact as the reactor's steps are short.
    pub request_latency_ns: u64,
    /// Commands that wait for something of the transport's own to be free, now.
    pub pending_free_request: u64,
    /// Commands that wait for READs, now.
    pub pending_rdma_read: u64,
    /// Responses with data that wait for the send queue, now.
    pub pending_rdma_write: u64,
    /// Responses without data that do, now.
    pub pending_rdma_send: u64,
    /// Work requests that were posted to send queues.
    pub total_send_wrs: u64,
    /// How often the device was told of such.
    pub send_doorbell_updates: u64,
    /// Receives that were posted.
    pub total_recv_wrs: u64,
    /// How often the device was told of such.
    pub recv_doorbell_updates: u64,
}

/// A listening address, on the reactor that accepts for it.
pub trait Acceptor: Send {
    /// Connections that came since the last call, at most `max`.
    fn accept(&mut self, cx: &mut Context, max: usize) -> Vec<Box<dyn Incoming>>;
    /// Connections may be waiting that the host could not hand over (it was out of descriptors or memory), and nothing will
    /// announce them again: call `accept` once more after a while.
    fn wants_retry(&self) -> bool {
        false
    }
    /// Starts reporting readiness to `poller` under `key`.
    ///
    /// # Errors
    /// When the host refuses.
    fn watch(&mut self, cx: &mut Context, poller: PollerId, key: u64) -> io::Result<()>;
    /// Ends it.
    fn close(&mut self, cx: &mut Context);
}

/// A kind of transport.
pub trait Transport: Send + Sync {
    /// Which.
    fn kind(&self) -> TransportKind;
    /// Checks whether it can be had here with these options, before it is created.
    ///
    /// # Errors
    /// What is missing, and how to get it.
    fn check(&self, _options: &TransportOptions) -> io::Result<()> {
        Ok(())
    }
    /// Starts to listen.
    ///
    /// # Errors
    /// As the host says: the address is in use, is not this host's, needs a privilege.
    fn listen(&self, address: &ListenAddress, options: &TransportOptions) -> io::Result<Box<dyn Acceptor>>;
}

/// The transports that a program was built with.
pub type Transports = Vec<Arc<dyn Transport>>;
