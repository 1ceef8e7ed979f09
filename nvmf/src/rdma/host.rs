//! The machine of one NVMe/RDMA queue pair on the host's side: commands, their identifiers, credits and memory (NVMe RDMA
//! Transport Specification 1.1, sections 3.2 and 3.3).
//!
//! [`HostQueue`] does no I/O, has no clock and knows no device. Its owner posts what [`HostQueue::next_command`] gives, and says what
//! has been sent, what was received and which memory is back.
//!
//! A command's way through its slot:
//! ```text
//!  Free --submit--> Queued --next--> Posted --sent, answered, its memory back: in any order--> Done --poll_completion--> Free
//!                     ^                |
//!                     +---- put_back --+
//! ```
//!
//! The rules that hold throughout:
//! - Not more commands are outstanding than the controller has receives for (CRQSIZE), nor than there are slots.
//! - A slot is not free before its capsule has left: until then the device uses its memory, whatever was answered.
//! - The payload of a command belongs to its slot until the completion comes out, and goes back with it. While a device or the
//!   controller may reach it, it is *away*; the owner keeps it then.
//! - Nothing of the controller is believed: a response has to be 16 bytes long and to name a command that was posted in this
//!   very use of its slot (the high bits of a CID count the uses) and has no response yet. What does not ends the queue pair,
//!   and the commands then come out of [`HostQueue::drain`] with their fate unknown.

use std::collections::VecDeque;
use std::fmt;

use reactor::Buffers;
use zerocopy::FromBytes;
use zerocopy::little_endian::U16;

use super::capsule::{MAX_BLOCKS, RESPONSE_BYTES};
use crate::host::transport::{Completion, Payload};
use crate::spec::{Cqe, Sqe};

/// PSDT 01b: an SGL, and metadata in one piece.
const PSDT_SGL: u8 = 1 << 6;
/// Bytes of a keyed descriptor in a capsule.
const DESCRIPTOR_BYTES: u32 = 16;
/// Most bytes that a keyed descriptor can name.
const MAX_KEYED_BYTES: u32 = (1 << 24) - 1;

/// Why a queue pair ends: the controller broke the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostFault {
    /// A message that is no response capsule, of so many bytes.
    NoResponse(usize),
    /// A response to no command that is outstanding, or a second one.
    UnknownCid(u16),
    /// It made a key invalid that it was not asked to.
    Invalidated(u32),
    /// It has no receives for commands.
    NoReceives,
    /// What it said when it accepted is not of this protocol.
    AcceptData,
}

impl fmt::Display for HostFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("protocol error of the target: ")?;
        match self {
            HostFault::NoResponse(bytes) => write!(f, "a message of {bytes} bytes, which is no response"),
            HostFault::UnknownCid(cid) => write!(f, "a response to command {cid:#06x}, which is not outstanding"),
            HostFault::Invalidated(key) => write!(f, "it invalidated key {key:#x}, which it was not asked to"),
            HostFault::NoReceives => f.write_str("it accepts the queue pair, and has no receives for commands"),
            HostFault::AcceptData => f.write_str("it accepts the queue pair with private data of another kind"),
        }
    }
}

impl std::error::Error for HostFault {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Queued,
    Posted,
    Done,
}

#[derive(Debug)]
struct Slot {
    state: State,
    /// The command's identifier: index in the low bits, number of the use above.
    cid: u16,
    user: u64,
    sqe: Sqe,
    payload: Payload,
    data: Buffers,
    /// Its capsule has left.
    sent: bool,
    /// The data is with the owner.
    away: bool,
    cqe: Option<Cqe>,
}

/// How a command's data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carry {
    /// It has none.
    Nothing,
    /// All of it in the capsule.
    InCapsule,
    /// The controller reads or writes it, by at most [`HostQueue::max_blocks`] descriptors.
    Keyed {
        /// Whether it reads.
        to_controller: bool,
    },
}

/// A command to be posted.
#[derive(Debug)]
pub struct Outgoing {
    /// Its slot.
    pub slot: u16,
    /// The entry, all but its data pointer.
    pub sqe: Sqe,
    /// How its data goes.
    pub carry: Carry,
    /// The data.
    pub data: Buffers,
}

/// One NVMe/RDMA queue pair on the host's side. See the [module](self) for its rules.
pub struct HostQueue {
    slots: Box<[Slot]>,
    free: Vec<u16>,
    queued: VecDeque<u16>,
    done: VecDeque<u16>,
    index_mask: u16,
    /// Commands that may be outstanding; 0 until the controller has said so.
    credits: u16,
    outstanding: u16,
    in_capsule_bytes: u32,
    /// Descriptors of one command that the controller takes.
    descriptors: u8,
}

impl fmt::Debug for HostQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostQueue")
            .field("slots", &self.slots.len())
            .field("credits", &self.credits)
            .field("outstanding", &self.outstanding)
            .field("queued", &self.queued.len())
            .finish_non_exhaustive()
    }
}

impl HostQueue {
    /// A queue pair of `slots` commands that is not connected.
    ///
    /// # Panics
    /// If that is 0 or above 32768.
    pub fn new(slots: u16) -> HostQueue {
        assert!(slots > 0 && slots <= 1 << 15, "slots: 1 to 32768");
        let slot = |index| Slot {
            state: State::Free,
            cid: index,
            user: 0,
            sqe: Sqe::read_from_bytes(&[0; size_of::<Sqe>()]).expect("it is as long"),
            payload: Payload::None,
            data: Buffers::new(),
            sent: false,
            away: false,
            cqe: None,
        };
        let count = usize::from(slots);
        HostQueue {
            slots: (0..slots).map(slot).collect(),
            free: (0..slots).rev().collect(),
            queued: VecDeque::with_capacity(count),
            done: VecDeque::with_capacity(count),
            index_mask: (count.next_power_of_two() - 1) as u16,
            credits: 0,
            outstanding: 0,
            in_capsule_bytes: 0,
            descriptors: 1,
        }
    }

    /// The controller accepts, and has `receives` for commands.
    ///
    /// # Errors
    /// [`HostFault::NoReceives`].
    pub fn established(&mut self, receives: u16) -> Result<(), HostFault> {
        self.credits = receives.min(self.slots.len() as u16);
        if self.credits == 0 { Err(HostFault::NoReceives) } else { Ok(()) }
    }

    /// True once the controller has accepted.
    #[inline]
    pub fn is_ready(&self) -> bool {
        self.credits > 0
    }

    /// Sets how much data commands to the controller may carry in their capsules.
    pub fn set_in_capsule_bytes(&mut self, bytes: u32) {
        self.in_capsule_bytes = bytes;
    }

    /// Sets how many data descriptors of one command the controller takes (MSDBD); 0 means that it does not say.
    pub fn set_descriptors(&mut self, most: u8) {
        self.descriptors = most;
    }

    /// Stretches of memory that one command may name: several are listed in the capsule, and have to fit there.
    pub fn max_blocks(&self) -> usize {
        let listed = (self.in_capsule_bytes / DESCRIPTOR_BYTES) as usize;
        let taken = if self.descriptors == 0 { MAX_BLOCKS } else { self.descriptors.into() };
        taken.min(listed).clamp(1, MAX_BLOCKS)
    }

    /// Whether [`submit`](Self::submit) will take a command.
    #[inline]
    pub fn can_submit(&self) -> bool {
        self.outstanding < self.credits && !self.free.is_empty()
    }

    /// Whether two commands will be taken.
    pub fn can_submit_pair(&self) -> bool {
        self.credits.saturating_sub(self.outstanding) >= 2 && self.free.len() >= 2
    }

    /// Commands that have not completed.
    pub fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Queues a command. CID and PSDT of `sqe` are filled in here.
    ///
    /// # Panics
    /// If [`can_submit`](Self::can_submit) is false, or `data` is not as long as `payload` says, or 16 MiB and more.
    #[inline]
    pub fn submit(&mut self, user: u64, mut sqe: Sqe, payload: Payload, data: Buffers) {
        assert!(self.can_submit(), "a command without a credit");
        let len = match payload {
            Payload::None => 0,
            Payload::ToController(len) | Payload::ToHost(len) => len,
        };
        assert!(data.len() == len as usize && len <= MAX_KEYED_BYTES, "a payload of another length");
        let index = self.free.pop().expect("a slot is free");
        let mask = self.index_mask;
        let slot = &mut self.slots[usize::from(index)];
        // One more use: with all bits in the index there is one slot number per CID, and no count.
        slot.cid = slot.cid.wrapping_add(mask.wrapping_add(1)) & !mask | index;
        // FFFFh is left unused, as hosts are asked to (Base 3.3.1.1).
        if slot.cid == u16::MAX {
            slot.cid = index;
        }
        sqe.cid = U16::new(slot.cid);
        sqe.flags = sqe.flags & 0x3f | PSDT_SGL;
        slot.state = State::Queued;
        (slot.user, slot.sqe, slot.payload, slot.data) = (user, sqe, payload, data);
        (slot.sent, slot.away, slot.cqe) = (false, false, None);
        self.outstanding += 1;
        self.queued.push_back(index);
    }

    /// Whether a command waits to be posted.
    #[inline]
    pub fn wants_output(&self) -> bool {
        !self.queued.is_empty()
    }

    /// The next command to be posted. Its data is away from now on.
    #[inline]
    pub fn next_command(&mut self) -> Option<Outgoing> {
        let index = self.queued.pop_front()?;
        let in_capsule_bytes = self.in_capsule_bytes;
        let slot = &mut self.slots[usize::from(index)];
        slot.state = State::Posted;
        let carry = match slot.payload {
            Payload::None | Payload::ToController(0) | Payload::ToHost(0) => Carry::Nothing,
            Payload::ToController(len) if len <= in_capsule_bytes => Carry::InCapsule,
            Payload::ToController(_) => Carry::Keyed { to_controller: true },
            Payload::ToHost(_) => Carry::Keyed { to_controller: false },
        };
        slot.away = carry != Carry::Nothing;
        Some(Outgoing { slot: index, sqe: slot.sqe, carry, data: std::mem::take(&mut slot.data) })
    }

    /// There was no room for a command: it is the next one again.
    pub fn put_back(&mut self, outgoing: Outgoing) {
        let slot = &mut self.slots[usize::from(outgoing.slot)];
        debug_assert_eq!(slot.state, State::Posted);
        (slot.state, slot.data, slot.away) = (State::Queued, outgoing.data, false);
        self.queued.push_front(outgoing.slot);
    }

    /// The capsule of a slot has left, successfully.
    pub fn sent(&mut self, index: u16) {
        self.slots[usize::from(index)].sent = true;
        self.settle(index);
    }

    /// A command's data is back.
    pub fn data_back(&mut self, index: u16, data: Buffers) {
        let slot = &mut self.slots[usize::from(index)];
        (slot.data, slot.away) = (data, false);
        self.settle(index);
    }

    /// A message of the controller; the slot whose command it answers. What is away of its data by key may be taken back.
    ///
    /// # Errors
    /// It is not the answer to a command.
    #[inline]
    pub fn received(&mut self, message: &[u8], invalidated: Option<u32>) -> Result<u16, HostFault> {
        if let Some(key) = invalidated {
            return Err(HostFault::Invalidated(key));
        }
        let cqe = Cqe::read_from_bytes(message).map_err(|_| HostFault::NoResponse(message.len()))?;
        const { assert!(size_of::<Cqe>() == RESPONSE_BYTES) }
        let cid = cqe.cid.get();
        let index = cid & self.index_mask;
        match self.slots.get_mut(usize::from(index)) {
            Some(slot) if slot.state == State::Posted && slot.cid == cid && slot.cqe.is_none() => {
                slot.cqe = Some(cqe);
                // The controller has taken the command from its receive, and posted it again or not: CRQSIZE is its promise.
                self.outstanding -= 1;
                self.settle(index);
                Ok(index)
            }
            _ => Err(HostFault::UnknownCid(cid)),
        }
    }

    fn settle(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        if slot.state == State::Posted && slot.sent && !slot.away && slot.cqe.is_some() {
            slot.state = State::Done;
            self.done.push_back(index);
        }
    }

    /// A command that has completed.
    #[inline]
    pub fn poll_completion(&mut self) -> Option<Completion> {
        let index = self.done.pop_front()?;
        let slot = &mut self.slots[usize::from(index)];
        slot.state = State::Free;
        self.free.push(index);
        let cqe = slot.cqe.take().expect("what is done was answered");
        // What moves by key is not seen here; a controller that says success has moved it.
        let transferred_bytes = match slot.payload {
            Payload::ToController(len) | Payload::ToHost(len) if cqe.status().is_success() => len,
            _ => 0,
        };
        Some(Completion { user: slot.user, cqe, data: std::mem::take(&mut slot.data), transferred_bytes })
    }

    /// The identifier that the outstanding command `user` has at the controller.
    pub fn cid_of(&self, user: u64) -> Option<u16> {
        let at_controller = |slot: &&Slot| slot.state == State::Posted && slot.cqe.is_none() && slot.user == user;
        self.slots.iter().find(at_controller).map(|slot| slot.cid)
    }

    /// Ends everything: gives the commands that have not completed, whose fate is unknown. Data that is away is the owner's to
    /// bring back before.
    pub fn drain(&mut self, lost: &mut dyn FnMut(u64, Buffers)) {
        self.queued.clear();
        self.done.clear();
        self.outstanding = 0;
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if slot.state != State::Free {
                slot.state = State::Free;
                self.free.push(index as u16);
                lost(slot.user, std::mem::take(&mut slot.data));
            }
        }
    }
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
