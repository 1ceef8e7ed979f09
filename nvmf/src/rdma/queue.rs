//! One queue pair of the target as a machine without I/O: in go received capsules, ends of posts and memory, out come commands
//! to execute and chains of work to post.
//!
//! ```text
//!                  mate there            memory              read credit, room           all READs done
//! capsule -> Parked ---------> Waiting ---------> Fetching --------------------> (READs) ----------------> Ready -> Executing
//!                                |  in-capsule data, data to the host, no data                               ^        |
//!                                +---------------------------------------------------------------------------+   complete
//!                                                                                                                     v
//!                                                              free <- (WRITEs, SEND) <- room, a head <- Response, in order
//! ```
//! What is short is waited for in order, and nothing fails for want of it: payload memory, READs that may be outstanding (the
//! host's and the device's limit), work requests on the send queue, memory for response capsules.
//!
//! # Invariants
//! - A slot that came out as an event is completed once; a response's slot is free at once, since the host may use its
//!   entry again before this side learns that the response has arrived.
//! - Memory of a chain is the device's until the chain has come back.
//! - READs of one command are as many chains as credits ask for; WRITEs and their response are one chain where the send queue
//!   is long enough for it at all.
//! - First halves of fused operations wait for the second ones without holding payload memory, and both get theirs at once:
//!   queues that hold memory and wait for more of it could wait for each other.

use std::collections::VecDeque;
use std::fmt;

use reactor::rdma::{Message, Operation, Post, Transfer, WorkStatus};
use reactor::{Buffer, BufferPool, Buffers};
use slab::Slab;
use smallvec::SmallVec;
use zerocopy::little_endian::U16;
use zerocopy::{FromZeros, IntoBytes};

use super::capsule::{self, Blocks, DataAt, RESPONSE_BYTES};
use crate::spec::opcode::{self, Direction};
use crate::spec::sqe::Fuse;
use crate::spec::{Cqe, Sqe, Status};
use crate::target::transport::{AbortOutcome, Event};

mod plan;

use plan::{plan, rewound, transfers};

/// Limits of one queue pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Commands outstanding at once, 1 to 65534.
    pub slots: u16,
    /// Longest data of one command, bytes, below 16 MiB.
    pub max_io_bytes: u32,
    /// Work requests of the send queue, at least 2.
    pub send_depth: u32,
    /// READs outstanding at once, at least 1.
    pub read_depth: u32,
    /// Segments of memory in one work request, at least 1.
    pub send_pieces: u32,
    /// Invalidate the host's keys with responses when it asks for that.
    pub invalidate: bool,
}

/// Why the queue pair cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A message that is no capsule; its bytes.
    NoCapsule(usize),
    /// More commands than the queue has entries.
    TooManyCommands,
    /// Work failed.
    Work(WorkStatus),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::NoCapsule(len) => write!(f, "the host sent {len} bytes, which are no command capsule"),
            Fault::TooManyCommands => f.write_str("the host has more commands outstanding than the queue has entries"),
            Fault::Work(WorkStatus::Flushed) => f.write_str("the connection ended with work outstanding"),
            Fault::Work(status) => write!(f, "a transfer failed: {status}"),
        }
    }
}

impl std::error::Error for Fault {}

const NONE: u16 = u16::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// A first half without its second.
    Parked,
    /// In line for memory; of a fused pair both halves are while the first is in line.
    Waiting,
    /// In line for READs, or these are on their way.
    Fetching,
    /// In the event queue, or kept back for its mate.
    Ready,
    Executing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mate {
    None,
    Awaited,
    Slot(u16),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    None,
    InCapsule { start: usize, len: u32 },
    FromHost { len: u32 },
    ToHost { len: u32 },
}

impl Plan {
    fn memory_bytes(self) -> usize {
        match self {
            Plan::None => 0,
            Plan::InCapsule { len, .. } | Plan::FromHost { len } | Plan::ToHost { len } => len as usize,
        }
    }
}

/// How far the transfers of a command have come.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    block: usize,
    /// Bytes of that block that are behind.
    in_block: u32,
    /// Bytes of the data that are behind.
    at: u32,
}

struct Slot {
    state: State,
    cid: u16,
    seq: u32,
    sqe: Sqe,
    plan: Plan,
    verdict: Status,
    mate: Mate,
    data: Buffers,
    blocks: Blocks,
    invalidate: Option<u32>,
    /// The message, while data in it waits for memory.
    capsule: Option<Buffer>,
    cursor: Cursor,
    /// READs of it that are on their way.
    reads: u32,
    /// Next slot with the same hash of its CID.
    next: u16,
}

/// A completion on its way to the host.
struct Response {
    cqe: Cqe,
    data: Buffers,
    len: u32,
    blocks: Blocks,
    invalidate: Option<u32>,
    cursor: Cursor,
    requests: u32,
    /// The last chain, with the message, is on its way.
    last: bool,
}

/// What waits for room on the send queue, in order.
#[derive(Clone, Copy, Debug)]
enum Work {
    Fetch(u16),
    Respond(usize),
}

/// Counters, for whoever wants to know what a queue pair waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Commands in line for memory.
    pub memory: usize,
    /// Commands in line for READs.
    pub reads: usize,
    /// Responses with data in line for the send queue.
    pub data_responses: usize,
    /// Responses without.
    pub responses: usize,
}

/// The machine.
pub struct Queue {
    config: Config,
    slots: Box<[Slot]>,
    free: Vec<u16>,
    buckets: Box<[u16]>,
    ready: VecDeque<u16>,
    waiting: VecDeque<u16>,
    /// Came to the front without a READ credit; goes first when there is one.
    short_of_reads: VecDeque<u16>,
    work: VecDeque<Work>,
    responses: Slab<Response>,
    heads: Vec<Buffer>,
    /// Receives that can be posted again.
    spent: Vec<Buffer>,
    reads_out: u32,
    requests_out: u32,
    /// Responses in line, with data and without.
    queued: (usize, usize),
    seq: u32,
    fused_first: Option<u16>,
    sq_head: u32,
    sq_entries: u32,
    sq_flow_control: bool,
    is_io_queue: bool,
}

impl Queue {
    /// A queue pair on which nothing has been received. `heads` is memory for response capsules, 16 bytes each: as many
    /// responses are on their way at once.
    ///
    /// # Panics
    /// If the configuration breaks a rule that [`Config`] states, or there is no head.
    pub fn new(config: Config, heads: Vec<Buffer>) -> Queue {
        assert!(config.slots > 0 && config.slots < NONE, "slots: 1 to 65534");
        assert!(config.send_depth >= 2 && config.read_depth >= 1 && config.send_pieces >= 1);
        assert!(config.max_io_bytes > 0 && config.max_io_bytes <= 1 << 24);
        assert!(!heads.is_empty() && heads.iter().all(|head| head.len() == RESPONSE_BYTES));
        let depth = usize::from(config.slots);
        let slot = || Slot {
            state: State::Free,
            cid: 0,
            seq: 0,
            sqe: Sqe::new_zeroed(),
            plan: Plan::None,
            verdict: Status::SUCCESS,
            mate: Mate::None,
            data: Buffers::new(),
            blocks: Blocks::new(),
            invalidate: None,
            capsule: None,
            cursor: Cursor::default(),
            reads: 0,
            next: NONE,
        };
        Queue {
            config,
            slots: std::iter::repeat_with(slot).take(depth).collect(),
            free: (0..config.slots).rev().collect(),
            buckets: vec![NONE; depth.next_power_of_two()].into(),
            ready: VecDeque::with_capacity(depth),
            waiting: VecDeque::with_capacity(depth),
            short_of_reads: VecDeque::with_capacity(depth),
            work: VecDeque::with_capacity(2 * depth),
            responses: Slab::with_capacity(depth),
            heads,
            spent: Vec::new(),
            reads_out: 0,
            requests_out: 0,
            queued: (0, 0),
            seq: 0,
            fused_first: None,
            sq_head: 0,
            sq_entries: u32::from(config.slots),
            sq_flow_control: true,
            is_io_queue: false,
        }
    }

    /// Tells the machine what Connect settled; to be called before the Connect command is completed. `entries` is the size
    /// of the submission queue (a count), where SQHD wraps.
    pub fn set_queue(&mut self, entries: u32, sq_flow_control: bool, is_io_queue: bool) {
        assert!(entries > 0, "a queue has entries");
        self.sq_entries = entries;
        self.sq_head %= entries;
        self.sq_flow_control = sq_flow_control;
        self.is_io_queue = is_io_queue;
    }

    // ---- commands in ---------------------------------------------------------------------------------------------------

    /// Takes a message of `bytes` bytes at the front of `buffer`, whose memory comes back through [`Queue::take_spent`].
    ///
    /// # Errors
    /// The connection has to end.
    pub fn receive(&mut self, buffer: Buffer, bytes: u32, pool: &mut BufferPool) -> Result<(), Fault> {
        let message = &buffer[..bytes as usize];
        let parsed = match capsule::parse(message, self.config.max_io_bytes) {
            Ok(parsed) => parsed,
            Err(no) => {
                self.spent.push(buffer);
                return Err(Fault::NoCapsule(no.len));
            }
        };
        let sqe = parsed.sqe;
        let plan = match self.find(sqe.cid.get()) {
            None => plan(&sqe, parsed.data),
            Some(_) => Err(Status::CID_CONFLICT.dnr()),
        };
        // A host whose responses it cannot have got yet still owes their entries; so what waits to be posted is bounded, too.
        let unanswered = self.outstanding() + self.queued.0 + self.queued.1;
        let index = if unanswered < self.slots.len() { self.take(&sqe) } else { None };
        let Some(index) = index else {
            self.spent.push(buffer);
            return Err(Fault::TooManyCommands);
        };
        let slot = &mut self.slots[usize::from(index)];
        match plan {
            Ok((plan, blocks, invalidate)) => {
                slot.plan = plan;
                slot.blocks = blocks;
                slot.invalidate = invalidate;
            }
            Err(status) => slot.verdict = status,
        }
        match slot.plan {
            Plan::InCapsule { .. } => slot.capsule = Some(buffer),
            _ => self.spent.push(buffer),
        }
        self.join_fused(index, sqe.fuse());
        self.retry(pool);
        Ok(())
    }

    /// Gives memory to what waits for it, in order.
    pub fn retry(&mut self, pool: &mut BufferPool) {
        while let Some(&index) = self.waiting.front() {
            if !self.give_memory(index, pool) {
                break;
            }
            self.waiting.pop_front();
        }
    }

    /// Whether commands wait for memory; see [`Queue::retry`].
    #[inline]
    pub fn stalled(&self) -> bool {
        !self.waiting.is_empty()
    }

    fn take(&mut self, sqe: &Sqe) -> Option<u16> {
        let index = self.free.pop()?;
        let cid = sqe.cid.get();
        let bucket = usize::from(cid) & (self.buckets.len() - 1);
        let slot = &mut self.slots[usize::from(index)];
        slot.state = State::Waiting;
        slot.cid = cid;
        slot.seq = self.seq;
        slot.sqe = *sqe;
        slot.plan = Plan::None;
        slot.verdict = Status::SUCCESS;
        slot.mate = Mate::None;
        slot.blocks.clear();
        slot.invalidate = None;
        slot.cursor = Cursor::default();
        slot.next = std::mem::replace(&mut self.buckets[bucket], index);
        self.seq = self.seq.wrapping_add(1);
        Some(index)
    }

    fn find(&self, cid: u16) -> Option<u16> {
        let mut index = self.buckets[usize::from(cid) & (self.buckets.len() - 1)];
        while index != NONE {
            let slot = &self.slots[usize::from(index)];
            if slot.cid == cid {
                return Some(index);
            }
            index = slot.next;
        }
        None
    }

    fn release(&mut self, index: u16) {
        let (cid, next) = {
            let slot = &mut self.slots[usize::from(index)];
            slot.state = State::Free;
            slot.data = Buffers::new();
            (slot.cid, slot.next)
        };
        let bucket = usize::from(cid) & (self.buckets.len() - 1);
        if self.buckets[bucket] == index {
            self.buckets[bucket] = next;
        } else {
            let mut at = self.buckets[bucket];
            while self.slots[usize::from(at)].next != index {
                at = self.slots[usize::from(at)].next;
            }
            self.slots[usize::from(at)].next = next;
        }
        self.free.push(index);
    }

    /// Joins a command that has just come with the one before it, if they are the halves of a fused operation, and lets on
    /// its way what has not to wait for a second half.
    fn join_fused(&mut self, index: u16, fuse: Fuse) {
        if let Some(first) = self.fused_first.take() {
            if fuse == Fuse::Second {
                self.slots[usize::from(first)].mate = Mate::Slot(index);
                self.slots[usize::from(index)].mate = Mate::Slot(first);
                self.slots[usize::from(first)].state = State::Waiting;
                return self.waiting.push_back(first);
            }
            // It stays alone, and will be answered so.
            self.slots[usize::from(first)].mate = Mate::None;
            self.slots[usize::from(first)].state = State::Waiting;
            self.waiting.push_back(first);
        }
        if fuse == Fuse::First && self.is_io_queue {
            self.slots[usize::from(index)].mate = Mate::Awaited;
            self.slots[usize::from(index)].state = State::Parked;
            self.fused_first = Some(index);
        } else {
            self.waiting.push_back(index);
        }
    }

    /// Memory for a command, and for its second half with it. False if there is too little for both.
    fn give_memory(&mut self, index: u16, pool: &mut BufferPool) -> bool {
        let second = match self.slots[usize::from(index)].mate {
            Mate::Slot(second) => Some(second),
            _ => None,
        };
        let mut memory: SmallVec<[(u16, Buffers); 2]> = SmallVec::new();
        for member in std::iter::once(index).chain(second) {
            let bytes = self.slots[usize::from(member)].plan.memory_bytes();
            let got = if bytes == 0 { Some(Buffers::new()) } else { pool.alloc(bytes) };
            match got {
                Some(data) => memory.push((member, data)),
                None => {
                    memory.into_iter().for_each(|(_, data)| pool.put(data));
                    return false;
                }
            }
        }
        for (member, mut data) in memory {
            let slot = &mut self.slots[usize::from(member)];
            match slot.plan {
                Plan::FromHost { .. } => {
                    slot.data = data;
                    slot.state = State::Fetching;
                    self.work.push_back(Work::Fetch(member));
                    continue;
                }
                Plan::InCapsule { start, len } => {
                    let capsule = slot.capsule.take().expect("data in a capsule has one");
                    data.write_at(0, &capsule[start..start + len as usize]);
                    self.spent.push(capsule);
                }
                Plan::ToHost { .. } | Plan::None => {}
            }
            self.slots[usize::from(member)].data = data;
            self.make_ready(member);
        }
        true
    }

    fn make_ready(&mut self, index: u16) {
        self.slots[usize::from(index)].state = State::Ready;
        match self.slots[usize::from(index)].mate {
            Mate::Slot(other) if self.slots[usize::from(other)].state == State::Ready => {
                let (a, b) = (self.slots[usize::from(index)].seq, self.slots[usize::from(other)].seq);
                self.ready.extend(if a.wrapping_add(1) == b { [index, other] } else { [other, index] });
            }
            Mate::Slot(_) => {}
            Mate::None | Mate::Awaited => self.ready.push_back(index),
        }
    }

    /// The next command. `None` if there is none now.
    #[inline]
    pub fn poll_event(&mut self, pool: &mut BufferPool) -> Option<Event> {
        let index = self.ready.pop_front()?;
        let slot = &mut self.slots[usize::from(index)];
        debug_assert_eq!(slot.state, State::Ready);
        slot.state = State::Executing;
        let (seq, sqe, data) = (slot.seq, slot.sqe, std::mem::take(&mut slot.data));
        Some(if slot.verdict == Status::SUCCESS {
            Event::Command { slot: index, seq, sqe, data }
        } else {
            pool.put(data);
            Event::Rejected { slot: index, seq, sqe, status: slot.verdict }
        })
    }

    /// Looks for a command to abort (Base 5.1.1).
    pub fn abort(&mut self, cid: u16) -> AbortOutcome {
        let Some(index) = self.find(cid) else { return AbortOutcome::NotFound };
        let slot = &mut self.slots[usize::from(index)];
        match slot.state {
            State::Executing => return AbortOutcome::Executing(index),
            State::Free => return AbortOutcome::NotFound,
            State::Parked => {
                // Nothing has to come behind it any more.
                slot.mate = Mate::None;
                slot.state = State::Waiting;
                self.fused_first = None;
                self.waiting.push_back(index);
            }
            State::Waiting | State::Fetching | State::Ready => {}
        }
        let slot = &mut self.slots[usize::from(index)];
        slot.verdict = Status::ABORT_REQUESTED;
        if slot.state == State::Waiting {
            // It needs no memory any more; its place in line it keeps, which its mate may need.
            slot.plan = Plan::None;
            self.spent.extend(slot.capsule.take());
            if slot.mate == Mate::None
                && let Some(place) = self.waiting.iter().position(|&waiting| waiting == index)
            {
                self.waiting.remove(place);
                self.make_ready(index);
            }
        }
        AbortOutcome::Undelivered
    }

    // ---- completions out -----------------------------------------------------------------------------------------------

    /// Completes a delivered command. CID and (with SQ flow control) SQHD of `cqe` are filled in here. `data` goes to the host
    /// only with a successful status, and is not longer than the memory that came with the command.
    ///
    /// # Panics
    /// If the slot has no delivered command, or the data is too long or goes the wrong way.
    pub fn complete(&mut self, index: u16, mut cqe: Cqe, data: Option<Buffers>) {
        let slot = &mut self.slots[usize::from(index)];
        assert_eq!(slot.state, State::Executing, "slot {index} has no delivered command");
        let room = match slot.plan {
            Plan::ToHost { len } if slot.verdict == Status::SUCCESS => len as usize,
            _ => 0,
        };
        cqe.cid = U16::new(slot.cid);
        let data = data.unwrap_or_default();
        let len = if cqe.status().is_success() { data.len() } else { 0 };
        assert!(len <= room, "{len} bytes for a host that expects {room}");
        let data = if len > 0 { data } else { Buffers::new() };
        let (blocks, invalidate) = (std::mem::take(&mut slot.blocks), slot.invalidate.take());
        self.release(index);
        self.sq_head = (self.sq_head + 1) % self.sq_entries;
        if self.sq_flow_control {
            cqe.sqhd = U16::new(self.sq_head as u16);
        }
        let invalidate = invalidate.filter(|_| self.config.invalidate);
        let (len, cursor) = (len as u32, Cursor::default());
        let response = Response { cqe, data, len, blocks, invalidate, cursor, requests: 0, last: false };
        let key = self.responses.insert(response);
        self.work.push_back(Work::Respond(key));
        self.count(key, 1);
    }

    /// Keeps count of responses in line.
    fn count(&mut self, key: usize, by: isize) {
        let counter = if self.responses[key].len > 0 { &mut self.queued.0 } else { &mut self.queued.1 };
        *counter = counter.wrapping_add_signed(by);
    }

    /// Whether something could be posted if there is room.
    #[inline]
    pub fn has_work(&self) -> bool {
        !self.work.is_empty() || !self.short_of_reads.is_empty() && self.reads_out < self.config.read_depth
    }

    /// The next chain to post. `None`: there is nothing, or it has to wait until something else has come back.
    pub fn poll_post(&mut self) -> Option<Post> {
        if let Some(&index) = self.short_of_reads.front()
            && self.reads_out < self.config.read_depth
        {
            let post = self.fetch(index)?;
            self.short_of_reads.pop_front();
            return Some(post);
        }
        loop {
            match *self.work.front()? {
                Work::Fetch(index) => {
                    if self.reads_out >= self.config.read_depth || !self.short_of_reads.is_empty() {
                        self.work.pop_front();
                        self.short_of_reads.push_back(index);
                        continue;
                    }
                    let post = self.fetch(index)?;
                    self.work.pop_front();
                    return Some(post);
                }
                Work::Respond(key) => {
                    let post = self.respond(key)?;
                    self.work.pop_front();
                    self.count(key, -1);
                    return Some(post);
                }
            }
        }
    }

    fn room(&self) -> u32 {
        self.config.send_depth - self.requests_out
    }

    /// READs of a command, as many as credits allow.
    fn fetch(&mut self, index: u16) -> Option<Post> {
        let limit = (self.config.read_depth - self.reads_out).min(self.room());
        let slot = &mut self.slots[usize::from(index)];
        let Plan::FromHost { len } = slot.plan else { unreachable!("only data of the host is fetched") };
        if limit == 0 {
            return None;
        }
        let start = slot.cursor.at;
        let read = |address, rkey| Operation::Read { address, rkey };
        let transfers =
            transfers(&slot.data, &slot.blocks, len, &mut slot.cursor, limit, self.config.send_pieces, read);
        slot.reads = transfers.len() as u32;
        self.reads_out += slot.reads;
        self.requests_out += slot.reads;
        let data = std::mem::take(&mut slot.data);
        Some(Post { user: u64::from(index) << 1, data, start, transfers, message: None })
    }

    /// WRITEs of a response and the response itself; or as many of the former as the send queue can have at all.
    fn respond(&mut self, key: usize) -> Option<Post> {
        let (room, depth, pieces) = (self.room(), self.config.send_depth, self.config.send_pieces);
        let response = &mut self.responses[key];
        let mut cursor = response.cursor;
        let start = cursor.at;
        let write = |address, rkey| Operation::Write { address, rkey };
        let transfers =
            transfers(&response.data, &response.blocks, response.len, &mut cursor, depth - 1, pieces, write);
        let last = cursor.at == response.len;
        let requests = transfers.len() as u32 + u32::from(last);
        if requests > room || last && self.heads.is_empty() {
            return None;
        }
        let message = last.then(|| {
            let mut head = self.heads.pop().expect("there is one");
            head.copy_from_slice(response.cqe.as_bytes());
            let operation = match response.invalidate {
                Some(rkey) => Operation::SendInvalidate { rkey },
                None => Operation::Send,
            };
            Message { operation, head, with_data: false }
        });
        response.cursor = cursor;
        response.requests = requests;
        response.last = last;
        self.requests_out += requests;
        let data = std::mem::take(&mut response.data);
        Some(Post { user: (key as u64) << 1 | 1, data, start, transfers, message })
    }

    /// A chain that could not be posted after all is put back, to be posted first.
    pub fn put_back(&mut self, post: Post) {
        let (key, is_response) = (post.user >> 1, post.user & 1 == 1);
        if is_response {
            let response = &mut self.responses[key as usize];
            self.requests_out -= response.requests;
            response.data = post.data;
            response.cursor = rewound(&response.blocks, post.start);
            self.heads.extend(post.message.map(|message| message.head));
            self.work.push_front(Work::Respond(key as usize));
            self.count(key as usize, 1);
        } else {
            let slot = &mut self.slots[key as usize];
            self.requests_out -= slot.reads;
            self.reads_out -= slot.reads;
            slot.data = post.data;
            slot.cursor = rewound(&slot.blocks, post.start);
            self.short_of_reads.push_front(key as u16);
        }
    }

    /// A chain has come back.
    ///
    /// # Errors
    /// It failed: the connection has to end.
    pub fn done(
        &mut self,
        user: u64,
        data: Buffers,
        head: Option<Buffer>,
        status: WorkStatus,
        pool: &mut BufferPool,
    ) -> Result<(), Fault> {
        let (key, is_response) = (user >> 1, user & 1 == 1);
        self.heads.extend(head);
        if is_response {
            let response = &mut self.responses[key as usize];
            self.requests_out -= response.requests;
            if response.last || status != WorkStatus::Success {
                self.responses.remove(key as usize);
                pool.put(data);
            } else {
                response.data = data;
                self.work.push_front(Work::Respond(key as usize));
                self.count(key as usize, 1);
            }
        } else {
            let index = key as u16;
            let slot = &mut self.slots[usize::from(index)];
            let Plan::FromHost { len } = slot.plan else { unreachable!("only data of the host is fetched") };
            self.requests_out -= slot.reads;
            self.reads_out -= slot.reads;
            slot.data = data;
            if status != WorkStatus::Success {
                pool.put(std::mem::take(&mut slot.data));
            } else if slot.cursor.at == len {
                self.make_ready(index);
            } else {
                self.short_of_reads.push_front(index);
            }
        }
        if status == WorkStatus::Success { Ok(()) } else { Err(Fault::Work(status)) }
    }

    /// A receive that can be posted again.
    pub fn take_spent(&mut self) -> Option<Buffer> {
        self.spent.pop()
    }

    /// READs that the host's device owes.
    pub fn reads_out(&self) -> u32 {
        self.reads_out
    }

    /// Commands that came and are not completed.
    pub fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// What is waited for.
    pub fn pending(&self) -> Pending {
        Pending {
            memory: self.waiting.len(),
            reads: self.short_of_reads.len(),
            data_responses: self.queued.0,
            responses: self.queued.1,
        }
    }

    /// The connection is over: forgets what was not delivered and what was not posted; their memory goes back. Nothing
    /// but [`Queue::take_spent`] and [`Queue::take_heads`] is to be called after this.
    pub fn close(&mut self, pool: &mut BufferPool) {
        self.ready.clear();
        self.waiting.clear();
        self.short_of_reads.clear();
        self.work.clear();
        self.fused_first = None;
        for slot in &mut self.slots {
            pool.put(std::mem::take(&mut slot.data));
            self.spent.extend(slot.capsule.take());
        }
        for (_, response) in &mut self.responses {
            pool.put(std::mem::take(&mut response.data));
        }
    }

    /// The memory for response capsules, as far as it is here.
    pub fn take_heads(&mut self) -> Vec<Buffer> {
        std::mem::take(&mut self.heads)
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("outstanding", &self.outstanding())
            .field("pending", &self.pending())
            .field("reads_out", &self.reads_out)
            .field("requests_out", &self.requests_out)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
