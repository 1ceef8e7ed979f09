//! I/O commands on one queue pair.
//!
//! ```text
//!  connect --> Connecting --transport ready--> Joining --Connect succeeded--> Live
//! ```
//! A queue belongs to the controller whose [`QueueParams`] it was made with, and may live on another thread than it.
//! Any failure, and any command that does not complete in time, gives the queue up as a whole: what is outstanding then
//! comes out of [`IoQueue::close`], its fate unknown. The transport sees to it that nothing completes twice.

use super::commands;
use super::transport::{Completion, Connector, Link, Payload, QueueName, Watches};
use super::{Error, OnTimeout, fabrics_connect};
use crate::spec::opcode::io;
use crate::spec::{Sqe, Status};
use reactor::park::Ready;
use reactor::{Buffers, Instant};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use zerocopy::little_endian::U16;

/// A command's age is looked at so many times within its timeout.
const LOOKS: u32 = 8;

/// All that it takes to connect an I/O queue of a live controller, from any thread.
#[derive(Clone)]
pub struct QueueParams {
    pub(super) connector: Arc<dyn Connector>,
    pub(super) subnqn: Arc<str>,
    pub(super) hostnqn: Arc<str>,
    pub(super) hostid: [u8; 16],
    /// The controller.
    pub cntlid: u16,
    /// The queue, from 1.
    pub qid: u16,
    /// Commands outstanding at once.
    pub slots: u16,
    /// Data that fit into a capsule, bytes.
    pub in_capsule_bytes: u32,
    /// Data descriptors that the controller takes in one command; 0 if it does not say.
    pub descriptors: u8,
    /// How long each step of connecting may take.
    pub step_timeout: Duration,
    /// How long the transport may take to set the connection up.
    pub connect_timeout: Duration,
    /// How long a command may take.
    pub io_timeout: Duration,
    /// What happens when it takes longer.
    pub on_timeout: OnTimeout,
}

impl fmt::Debug for QueueParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let QueueParams { cntlid, qid, slots, .. } = self;
        write!(f, "QueueParams(controller {cntlid}, queue {qid}, {slots} slots)")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Connecting,
    Joining,
    Live,
}

/// A command that is outstanding.
#[derive(Clone, Copy, Debug)]
struct Entry {
    user: u64,
    since: Instant,
    busy: bool,
    /// The owner was told that it takes too long.
    told: bool,
}

/// An I/O queue.
pub struct IoQueue {
    link: Link,
    params: QueueParams,
    state: State,
    deadline: Instant,
    entries: Box<[Entry]>,
    free: Vec<u16>,
    /// Commands that take too long and that the owner is to be told of.
    overdue: Vec<u64>,
    /// When ages are looked at next.
    look: Instant,
}

impl fmt::Debug for IoQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoQueue({}, {:?}, {} outstanding)", self.params.qid, self.state, self.outstanding())
    }
}

impl IoQueue {
    /// Starts to connect a queue. It is watched under `key`.
    ///
    /// # Errors
    /// The host refuses at once.
    pub fn connect(params: QueueParams, key: u64, now: Instant) -> Result<IoQueue, Error> {
        let name = QueueName { qid: params.qid, cntlid: params.cntlid };
        let qpair = params.connector.connect(params.slots, name).map_err(|e| Error::Transport(e.to_string()))?;
        let entry = Entry { user: 0, since: now, busy: false, told: false };
        Ok(IoQueue {
            link: Link::new(qpair, key),
            state: State::Connecting,
            deadline: now + params.connect_timeout,
            entries: vec![entry; params.slots.into()].into(),
            free: (0..params.slots).rev().collect(),
            overdue: Vec::new(),
            look: now,
            params,
        })
    }

    /// Whether it takes commands.
    pub fn is_live(&self) -> bool {
        self.state == State::Live
    }

    /// What it was made with.
    pub fn params(&self) -> &QueueParams {
        &self.params
    }

    /// Whether a command will be taken.
    #[inline]
    pub fn can_submit(&self) -> bool {
        self.state == State::Live && !self.free.is_empty() && self.link.can_submit()
    }

    /// Whether [`compare_and_write`](Self::compare_and_write) will be taken.
    pub fn can_submit_pair(&self) -> bool {
        self.state == State::Live && self.free.len() >= 2 && self.link.can_submit_pair()
    }

    /// Commands that have not completed.
    pub fn outstanding(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Any command, sent at `now`. What it says of CID, PSDT and the data pointer does not matter.
    ///
    /// # Panics
    /// If [`can_submit`](Self::can_submit) is false, or `data` is not as long as `payload` says.
    #[inline]
    pub fn submit(&mut self, user: u64, sqe: Sqe, payload: Payload, data: Buffers, now: Instant) {
        assert!(self.state == State::Live, "a command was submitted to a queue that is not live");
        if self.outstanding() == 0 {
            self.look = now + self.params.io_timeout / LOOKS;
        }
        let index = self.free.pop().expect("a command was submitted without asking for room");
        self.entries[usize::from(index)] = Entry { user, since: now, busy: true, told: false };
        self.link.submit(index.into(), sqe, payload, data);
    }

    /// Reads `blocks` blocks (1 to 65536) from block `slba` into all of `data`.
    #[inline]
    pub fn read(&mut self, user: u64, nsid: u32, slba: u64, blocks: u32, data: Buffers, now: Instant) {
        let payload = Payload::ToHost(data.len() as u32);
        self.submit(user, commands::blocks(io::READ, nsid, slba, blocks), payload, data, now);
    }

    /// Writes all of `data` to `blocks` blocks (1 to 65536) from block `slba` on.
    #[inline]
    pub fn write(&mut self, user: u64, nsid: u32, slba: u64, blocks: u32, data: Buffers, now: Instant) {
        let payload = Payload::ToController(data.len() as u32);
        self.submit(user, commands::blocks(io::WRITE, nsid, slba, blocks), payload, data, now);
    }

    /// Compares `blocks` blocks (1 to 65536) from block `slba` on with all of `data`.
    pub fn compare(&mut self, user: u64, nsid: u32, slba: u64, blocks: u32, data: Buffers, now: Instant) {
        let payload = Payload::ToController(data.len() as u32);
        self.submit(user, commands::blocks(io::COMPARE, nsid, slba, blocks), payload, data, now);
    }

    /// A fused Compare and Write of the blocks from `slba` on: as many as `commands` were made for. Both halves complete.
    ///
    /// # Panics
    /// If [`can_submit_pair`](Self::can_submit_pair) is false.
    pub fn compare_and_write(
        &mut self,
        (compare_user, expected): (u64, Buffers),
        (write_user, data): (u64, Buffers),
        (compare, write): (Sqe, Sqe),
        now: Instant,
    ) {
        assert!(self.can_submit_pair(), "a fused operation was submitted without asking for room");
        let (first, second) = (expected.len() as u32, data.len() as u32);
        self.submit(compare_user, compare, Payload::ToController(first), expected, now);
        self.submit(write_user, write, Payload::ToController(second), data, now);
    }

    /// Zeroes `blocks` blocks (1 to 65536) from block `slba` on; they may be deallocated by that.
    pub fn write_zeroes(&mut self, user: u64, nsid: u32, slba: u64, blocks: u32, now: Instant) {
        let sqe = commands::write_zeroes(nsid, slba, blocks, true);
        self.submit(user, sqe, Payload::None, Buffers::new(), now);
    }

    /// Deallocates ranges (1 to 256), given as first block and count.
    pub fn deallocate(&mut self, user: u64, nsid: u32, ranges: &[(u64, u32)], now: Instant) {
        let (sqe, list) = commands::deallocate(nsid, ranges);
        self.submit(user, sqe, Payload::ToController(list.len() as u32), Buffers::from(&list[..]), now);
    }

    /// Copies ranges (1 to 256), given as first block and count, one behind the other to `to`.
    pub fn copy(&mut self, user: u64, nsid: u32, to: u64, ranges: &[(u64, u32)], now: Instant) {
        let (sqe, list) = commands::copy(nsid, to, ranges);
        self.submit(user, sqe, Payload::ToController(list.len() as u32), Buffers::from(&list[..]), now);
    }

    /// Makes everything that was acknowledged before durable.
    pub fn flush_cache(&mut self, user: u64, nsid: u32, now: Instant) {
        self.submit(user, commands::plain(io::FLUSH, nsid), Payload::None, Buffers::new(), now);
    }

    /// Sends what waits, in one call as far as it fits.
    ///
    /// # Errors
    /// [`Error::Transport`]: the queue is of no use any more.
    #[inline]
    pub fn send(&mut self) -> Result<(), Error> {
        self.link.flush().map_err(Error::Transport)
    }

    /// Receives once and appends what has completed; whether anything came. A command that read less than its payload and
    /// was called successful completes as Data Transfer Error.
    ///
    /// # Errors
    /// The queue is of no use any more; [`close`](Self::close) gives the commands back.
    pub fn poll(&mut self, now: Instant, watches: &mut dyn Watches, done: &mut Vec<Completion>) -> Result<bool, Error> {
        let before = done.len();
        let received = self.link.poll(watches, done).map_err(Error::Transport)?;
        if self.state != State::Live {
            let completion = if done.len() > before { done.pop() } else { None };
            return Ok(self.set_up(now, completion)? || received);
        }
        for completion in &mut done[before..] {
            if completion.cqe.status().is_success() && (completion.transferred_bytes as usize) < completion.data.len() {
                completion.cqe.status_field = U16::new(Status::DATA_TRANSFER_ERROR.to_field());
            }
            let index = completion.user as u16;
            let entry = &mut self.entries[usize::from(index)];
            completion.user = entry.user;
            entry.busy = false;
            self.free.push(index);
        }
        if self.outstanding() > 0 && now >= self.look {
            self.look = now + self.params.io_timeout / LOOKS;
            self.look_at_ages(now)?;
        }
        Ok(received)
    }

    fn look_at_ages(&mut self, now: Instant) -> Result<(), Error> {
        let QueueParams { io_timeout, on_timeout, .. } = self.params;
        let is_old = |entry: &&mut Entry| entry.busy && now.since(entry.since) > io_timeout;
        for entry in self.entries.iter_mut().filter(is_old) {
            if on_timeout == OnTimeout::GiveUp || entry.told && on_timeout == OnTimeout::Tell {
                return Err(Error::Timeout { what: "an I/O command" });
            }
            if !entry.told {
                tracing::warn!(qid = self.params.qid, "an I/O command takes longer than it may");
                (entry.told, entry.since) = (true, now);
                if on_timeout == OnTimeout::Tell {
                    self.overdue.push(entry.user);
                }
            }
        }
        Ok(())
    }

    /// A command that takes longer than it may, each once.
    #[inline]
    pub fn take_overdue(&mut self) -> Option<u64> {
        self.overdue.pop()
    }

    /// The identifier that an outstanding command has at the controller.
    pub fn cid_of(&self, user: u64) -> Option<u16> {
        let index = self.entries.iter().position(|entry| entry.busy && entry.user == user)?;
        self.link.cid_of(index as u64)
    }

    /// Connects. The only command meanwhile is Connect.
    fn set_up(&mut self, now: Instant, completion: Option<Completion>) -> Result<bool, Error> {
        const WHAT: &str = "Connect of an I/O queue";
        let mut busy = false;
        match (self.state, completion) {
            (State::Joining, Some(completion)) => {
                fabrics_connect::check(WHAT, &completion.cqe)?;
                self.link.set_in_capsule_bytes(self.params.in_capsule_bytes);
                self.link.set_descriptors(self.params.descriptors);
                self.state = State::Live;
                return Ok(true);
            }
            (State::Connecting, _) if self.link.is_ready() => {
                let QueueParams { subnqn, hostnqn, hostid, cntlid, .. } = &self.params;
                let data = fabrics_connect::data(subnqn, hostnqn, *hostid, *cntlid);
                let sqe = commands::connect(self.params.qid, self.params.slots + 1, 0);
                self.link.set_in_capsule_bytes(self.params.connector.admin_in_capsule_bytes());
                self.link.submit(0, sqe, Payload::ToController(data.len() as u32), data);
                self.state = State::Joining;
                self.deadline = now + self.params.step_timeout;
                busy = true;
            }
            _ if now > self.deadline => {
                let what = if self.state == State::Connecting { "setting up a connection" } else { WHAT };
                return Err(Error::Timeout { what });
            }
            _ => {}
        }
        self.send()?;
        Ok(busy)
    }

    /// Something was announced under the queue's key.
    pub fn ready(&mut self, ready: Ready) {
        self.link.ready(ready);
    }

    /// Whether polling or sending now can do something. Otherwise there is nothing to do before the next
    /// [`ready`](Self::ready) or [`deadline`](Self::deadline).
    pub fn has_work(&self) -> bool {
        self.link.has_work() || self.state == State::Connecting && self.link.is_ready()
    }

    /// When it wants to be polled even if nothing was announced.
    pub fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Live => (self.outstanding() > 0).then_some(self.look),
            // Deadlines are passed a nanosecond later.
            _ => Some(self.deadline + Duration::from_nanos(1)),
        }
    }

    /// Ends the queue: gives back the commands that have not completed, whose fate is unknown.
    pub fn close(&mut self, watches: &mut dyn Watches, lost: &mut dyn FnMut(u64, Buffers)) {
        let (entries, live) = (&mut self.entries, self.state == State::Live);
        self.link.close(watches, &mut |index, data| {
            let entry = &mut entries[index as usize];
            if live && entry.busy {
                entry.busy = false;
                lost(entry.user, data);
            }
        });
        self.free = (0..self.params.slots).rev().collect();
        self.overdue.clear();
        self.state = State::Connecting;
    }
}
