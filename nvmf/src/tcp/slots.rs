//! Command slots of one queue pair, and the way from a CID to its slot.
//!
//! Slots are handed out last-in first-out, which keeps the ones in use in the cache. A chained hash of the CIDs costs
//! one probe for hosts that number their commands from 0 up to the queue depth.

use crate::spec::{Sqe, Status};
use reactor::buffer::Buffers;
use zerocopy::FromZeros;

const NONE: u16 = u16::MAX;

/// The other half of a fused operation (Base 3.4.2): the two are delivered one right behind the other, whichever has its
/// data first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mate {
    /// The command stands alone.
    None,
    /// It is a first half, and the next command on the queue is still to come.
    Awaited,
    /// The slot of the other half.
    Slot(u16),
}

/// Where a command stands.
///
/// ```text
///          accept                     data complete            poll_event               complete
///  Free ---------> Waiting ---------> Receiving ------> Ready -----------> Executing ----------> Free
///            |       memory there        ^                ^
///            |       (no data to come: --|----------------+)
///            +---------------------------+  (in-capsule data: memory is asked for at once)
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotState {
    /// Not in use.
    Free,
    /// In line for memory.
    Waiting,
    /// In-capsule data is arriving.
    InCapsule,
    /// An R2T is out; H2CData is arriving.
    Transfer,
    /// In the event queue, or kept back for the other half of a fused operation.
    Ready,
    /// Delivered, not completed.
    Executing,
}

/// What a command's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// There is none.
    None,
    /// In the capsule: `len` bytes after `offset`.
    InCapsule { offset: u32, len: u32 },
    /// To be asked for with R2T.
    FromHost { len: u32 },
    /// To be sent in C2HData.
    ToHost { len: u32 },
}

#[derive(Debug)]
pub(super) struct Slot {
    pub state: SlotState,
    pub plan: Plan,
    pub cid: u16,
    /// Next slot with the same hash, or next free slot.
    next: u16,
    /// Bytes of host data received.
    pub received: u32,
    /// Running number of the command on its queue.
    pub seq: u32,
    pub mate: Mate,
    /// Success, or what the command will be rejected with once its data has passed.
    pub verdict: Status,
    pub sqe: Sqe,
    pub data: Buffers,
}

#[derive(Debug)]
pub(super) struct Slots {
    slots: Box<[Slot]>,
    buckets: Box<[u16]>,
    free: u16,
    used: u16,
}

impl Slots {
    /// Bytes that `count` slots take.
    pub const fn memory_bytes(count: usize) -> usize {
        count * size_of::<Slot>() + count.next_power_of_two() * size_of::<u16>()
    }

    /// `count` is 1 to 65535.
    pub fn new(count: u16) -> Self {
        assert!(count > 0, "a queue has slots");
        let slots = (0..count)
            .map(|i| Slot {
                state: SlotState::Free,
                plan: Plan::None,
                cid: 0,
                next: if i + 1 == count { NONE } else { i + 1 },
                received: 0,
                seq: 0,
                mate: Mate::None,
                verdict: Status::SUCCESS,
                sqe: Sqe::new_zeroed(),
                data: Buffers::new(),
            })
            .collect();
        let buckets = vec![NONE; usize::from(count).next_power_of_two()].into_boxed_slice();
        Self { slots, buckets, free: 0, used: 0 }
    }

    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Slots in use.
    pub fn used(&self) -> usize {
        usize::from(self.used)
    }

    fn bucket(&self, cid: u16) -> usize {
        usize::from(cid) & (self.buckets.len() - 1)
    }

    /// Takes a free slot for a command; `None` if all are in use.
    #[inline]
    pub fn take(&mut self, sqe: &Sqe, seq: u32) -> Option<u16> {
        let index = self.free;
        let bucket = self.bucket(sqe.cid.get());
        let slot = self.slots.get_mut(usize::from(index))?;
        debug_assert_eq!(slot.state, SlotState::Free);
        self.free = slot.next;
        slot.sqe = *sqe;
        slot.cid = sqe.cid.get();
        slot.seq = seq;
        slot.mate = Mate::None;
        slot.received = 0;
        slot.verdict = Status::SUCCESS;
        slot.next = self.buckets[bucket];
        self.buckets[bucket] = index;
        self.used += 1;
        Some(index)
    }

    /// Gives a slot back.
    #[inline]
    pub fn release(&mut self, index: u16) {
        let i = usize::from(index);
        let next = self.slots[i].next;
        let bucket = self.bucket(self.slots[i].cid);
        if self.buckets[bucket] == index {
            self.buckets[bucket] = next;
        } else {
            let mut at = self.buckets[bucket];
            while self.slots[usize::from(at)].next != index {
                at = self.slots[usize::from(at)].next;
            }
            self.slots[usize::from(at)].next = next;
        }
        self.slots[i].state = SlotState::Free;
        self.slots[i].next = self.free;
        self.free = index;
        self.used -= 1;
    }

    /// The slot in use by `cid`.
    #[inline]
    pub fn find(&self, cid: u16) -> Option<u16> {
        let mut at = self.buckets[self.bucket(cid)];
        while let Some(slot) = self.slots.get(usize::from(at)) {
            if slot.cid == cid {
                return Some(at);
            }
            at = slot.next;
        }
        None
    }

    pub fn get(&self, index: u16) -> Option<&Slot> {
        self.slots.get(usize::from(index))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Slot> {
        self.slots.iter_mut()
    }
}

impl std::ops::Index<u16> for Slots {
    type Output = Slot;
    #[inline]
    fn index(&self, index: u16) -> &Slot {
        &self.slots[usize::from(index)]
    }
}

impl std::ops::IndexMut<u16> for Slots {
    #[inline]
    fn index_mut(&mut self, index: u16) -> &mut Slot {
        &mut self.slots[usize::from(index)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn cids_are_found_in_any_order_of_release() {
        let mut slots = Slots::new(5);
        let mut model = HashMap::new();
        let mut sqe = Sqe::new_zeroed();
        let mut state = 1u32;
        for _ in 0..2000 {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let cid = (state >> 24) as u16 % 24 * 8;
            if let Some(index) = model.remove(&cid) {
                assert_eq!(slots.find(cid), Some(index));
                slots.release(index);
            } else {
                sqe.cid.set(cid);
                match slots.take(&sqe, 0) {
                    Some(index) => assert_eq!(model.insert(cid, index), None),
                    None => assert_eq!(model.len(), 5),
                }
            }
            assert_eq!(slots.used(), model.len());
            for cid in 0..200 {
                assert_eq!(slots.find(cid), model.get(&cid).copied());
            }
        }
    }
}
