//! Range locks and quiescing across reactors.
//!
//! A compare-and-write must see no other write to its blocks between its two halves, from any reactor; a reset must see
//! the whole device at rest. Both take a lock in the device's `LockTable` and then close a `Gate` in every reactor's
//! channel:
//!
//! ```text
//! origin                                  every reactor (the origin too)
//!   LockTable::acquire (FIFO on overlap)
//!   close_gates  ---- gate(ticket) ---->  new I/O in scope is parked; flip the epoch,
//!                                         wait until the old epoch's I/O has drained
//!   gate_acked   <--- ack ------------
//!   ... all acked: work ...
//!   unlock       ---- ungate(ticket) -->  parked I/O goes on, in order
//! ```
//! Draining uses two epochs a channel, so that a gate waits for exactly the I/O that was there before it, not for what
//! comes after. One flip is under way at a time; further gates queue.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use reactor::ReactorId;

use super::io::Io;
use super::registry::{BdevId, BdevInfo};
use super::runtime::{Channel, ChannelId, IoRuntime};
use super::saga::Saga;
use super::types::{IoStatus, Op};

/// What a lock keeps out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// Operations that modify these blocks.
    Writes { lba: u64, blocks: u64 },
    /// Everything.
    All,
}

impl Scope {
    fn overlaps(&self, other: &Scope) -> bool {
        match (self, other) {
            (Scope::Writes { lba: a, blocks: n }, Scope::Writes { lba: b, blocks: m }) => {
                *a < b.saturating_add(*m) && *b < a.saturating_add(*n)
            }
            _ => true,
        }
    }
}

/// Names one lock of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket(u64);

/// Who waits for a gate to close.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asker {
    reactor: ReactorId,
    who: Who,
}

/// On its reactor: a saga, or the holder of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Saga(u32),
    Hold(u32),
}

/// Names a range that is held on one reactor, see [`IoRuntime::hold_range`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldId(u32);

/// A range that is held, or waited for.
pub(super) struct Hold {
    bdev: Arc<BdevInfo>,
    ticket: Option<Ticket>,
    acks_left: usize,
    held: Option<Box<dyn FnOnce()>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GateState {
    /// Waits for its turn to flip the epoch.
    Queued,
    /// Waits for this epoch's I/O.
    Draining(u8),
    /// Nothing in scope is in flight.
    Closed,
}

/// One lock as one channel sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gate {
    ticket: Ticket,
    scope: Scope,
    state: GateState,
    asker: Option<Asker>,
}

impl Gate {
    /// Whether an operation that takes no lock of its own has to wait.
    #[inline]
    fn blocks(&self, op: Op, lba: u64, blocks: u64) -> bool {
        match self.scope {
            Scope::All => true,
            scope => op.modifies() && scope.overlaps(&Scope::Writes { lba, blocks }),
        }
    }
}

impl Channel {
    /// Whether an I/O has to wait for a gate to open. Operations that take locks are ordered by the table instead.
    #[inline]
    pub(super) fn is_gated(&self, io: &Io) -> bool {
        !self.gates.is_empty()
            && !Saga::takes_lock(self, io)
            && self.gates.iter().any(|gate| gate.blocks(io.op(), io.lba(), io.blocks()))
    }
}

struct Waiter {
    ticket: Ticket,
    scope: Scope,
    asker: Asker,
}

#[derive(Default)]
struct Table {
    next: u64,
    held: Vec<(Ticket, Scope)>,
    waiting: VecDeque<Waiter>,
}

/// The locks of one device, shared by all reactors. Touched only by the operations that lock.
#[derive(Default)]
pub(super) struct LockTable(Mutex<Table>);

impl LockTable {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the lock is held at once; otherwise it waits behind those that it overlaps.
    fn acquire(&self, scope: Scope, asker: Asker) -> (Ticket, bool) {
        let mut table = self.table();
        table.next += 1;
        let ticket = Ticket(table.next);
        let free = !table.held.iter().any(|(_, held)| held.overlaps(&scope))
            && !table.waiting.iter().any(|waiter| waiter.scope.overlaps(&scope));
        if free {
            table.held.push((ticket, scope));
        } else {
            table.waiting.push_back(Waiter { ticket, scope, asker });
        }
        (ticket, free)
    }

    /// Lets go of a lock and returns those that are held in its place.
    fn release(&self, ticket: Ticket) -> Vec<Waiter> {
        let mut table = self.table();
        table.held.retain(|(held, _)| *held != ticket);
        let mut admitted = Vec::new();
        let mut still = VecDeque::new();
        while let Some(waiter) = table.waiting.pop_front() {
            let blocked = table.held.iter().any(|(_, held)| held.overlaps(&waiter.scope))
                || still.iter().any(|earlier: &Waiter| earlier.scope.overlaps(&waiter.scope));
            if blocked {
                still.push_back(waiter);
            } else {
                table.held.push((waiter.ticket, waiter.scope));
                admitted.push(waiter);
            }
        }
        table.waiting = still;
        admitted
    }

    /// The gates that a channel opened now starts with: it has nothing in flight, so they are closed.
    pub(super) fn gates_for_new_channel(&self) -> Vec<Gate> {
        let gate = |&(ticket, scope): &(Ticket, Scope)| Gate { ticket, scope, state: GateState::Closed, asker: None };
        self.table().held.iter().map(gate).collect()
    }
}

impl IoRuntime {
    /// Takes a lock for a saga of this reactor; `saga_locked` goes on when every gate is closed.
    pub(super) fn lock_for_saga(&mut self, saga: u32, bdev: &Arc<BdevInfo>, scope: Scope) -> Ticket {
        self.lock(Who::Saga(saga), bdev, scope)
    }

    /// Keeps operations that modify these blocks out of `bdev` on all reactors. `held` is called, on this reactor, when those that
    /// were there before have ended. Operations below the device are not kept out: that is for the device's own.
    pub fn hold_range(&mut self, bdev: &Arc<BdevInfo>, lba: u64, blocks: u64, held: Box<dyn FnOnce()>) -> HoldId {
        let hold = Hold { bdev: Arc::clone(bdev), ticket: None, acks_left: usize::MAX, held: Some(held) };
        let index = self.holds.insert(hold) as u32;
        // The acknowledgements may all come within this call, before the ticket is known here.
        let ticket = self.lock(Who::Hold(index), bdev, Scope::Writes { lba, blocks });
        self.holds[index as usize].ticket = Some(ticket);
        self.hold_ready(index);
        HoldId(index)
    }

    /// Lets go of a range that is held: what waited goes on.
    pub fn release_range(&mut self, hold: HoldId) {
        let hold = self.holds.remove(hold.0 as usize);
        debug_assert!(hold.held.is_none(), "it is not held yet");
        self.unlock(&hold.bdev, hold.ticket.expect("what is held has its ticket"));
    }

    fn hold_ready(&mut self, index: u32) {
        let hold = &mut self.holds[index as usize];
        if hold.ticket.is_some()
            && hold.acks_left == 0
            && let Some(held) = hold.held.take()
        {
            held();
        }
    }

    fn lock(&mut self, who: Who, bdev: &Arc<BdevInfo>, scope: Scope) -> Ticket {
        let asker = Asker { reactor: self.reactor, who };
        let (ticket, held) = bdev.locks().acquire(scope, asker);
        if held {
            self.close_gates(bdev.id(), ticket, scope, asker);
        }
        ticket
    }

    fn close_gates(&mut self, bdev: BdevId, ticket: Ticket, scope: Scope, asker: Asker) {
        match asker.who {
            Who::Saga(saga) => self.sagas[saga as usize].acks_left = self.group.len(),
            Who::Hold(hold) => self.holds[hold as usize].acks_left = self.group.len(),
        }
        for index in 0..self.group.len() {
            let to = self.group[index].id();
            if to == self.reactor {
                self.gate(bdev, ticket, scope, asker);
            } else {
                self.send_to(to, move |runtime| runtime.gate(bdev, ticket, scope, asker));
            }
        }
    }

    fn gate(&mut self, bdev: BdevId, ticket: Ticket, scope: Scope, asker: Asker) {
        let Some(channel) = self.channel_of(bdev) else { return self.ack(asker) };
        let slot = &mut self.channels[channel.0 as usize];
        if let Some(gate) = slot.gates.iter().find(|gate| gate.ticket == ticket) {
            // The channel was opened after the lock was taken.
            debug_assert_eq!(gate.state, GateState::Closed);
            return self.ack(asker);
        }
        slot.gates.push(Gate { ticket, scope, state: GateState::Queued, asker: Some(asker) });
        if scope == Scope::All {
            // What is parked here was there before this gate, so it is to have ended when the gate is closed.
            self.end_parked(channel, IoStatus::Aborted);
            self.abort_all(channel);
        }
        self.gates_progress(channel);
    }

    /// Moves a channel's gates on after I/O has drained or a gate was added.
    pub(super) fn gates_progress(&mut self, channel: ChannelId) {
        loop {
            let slot = &mut self.channels[channel.0 as usize];
            let [even, odd, _] = slot.in_flight;
            let draining = slot.gates.iter_mut().find(|gate| matches!(gate.state, GateState::Draining(_)));
            let closed = match draining {
                Some(gate) => {
                    let GateState::Draining(epoch) = gate.state else { return };
                    if slot.in_flight[epoch as usize] > 0 {
                        return;
                    }
                    gate
                }
                None => {
                    let Some(gate) = slot.gates.iter_mut().find(|gate| gate.state == GateState::Queued) else { return };
                    if even + odd > 0 {
                        // The other epoch drained before the last flip ended, so it is empty now.
                        gate.state = GateState::Draining(slot.epoch);
                        slot.epoch ^= 1;
                        continue;
                    }
                    gate
                }
            };
            closed.state = GateState::Closed;
            let asker = closed.asker.take();
            if let Some(asker) = asker {
                self.ack(asker);
            }
        }
    }

    fn ack(&mut self, asker: Asker) {
        if asker.reactor == self.reactor {
            self.gate_acked(asker.who);
        } else {
            self.send_to(asker.reactor, move |runtime| runtime.gate_acked(asker.who));
        }
    }

    fn gate_acked(&mut self, who: Who) {
        let saga = match who {
            Who::Saga(saga) => saga,
            Who::Hold(hold) => {
                self.holds[hold as usize].acks_left -= 1;
                return self.hold_ready(hold);
            }
        };
        let waiting = &mut self.sagas[saga as usize];
        waiting.acks_left -= 1;
        if waiting.acks_left == 0 {
            self.saga_locked(saga);
        }
    }

    /// Lets go of a lock: whoever waits for it takes it, and parked I/O goes on.
    pub(super) fn unlock(&mut self, bdev: &Arc<BdevInfo>, ticket: Ticket) {
        let id = bdev.id();
        for Waiter { ticket, scope, asker } in bdev.locks().release(ticket) {
            if asker.reactor == self.reactor {
                self.close_gates(id, ticket, scope, asker);
            } else {
                self.send_to(asker.reactor, move |runtime| runtime.close_gates(id, ticket, scope, asker));
            }
        }
        for index in 0..self.group.len() {
            let to = self.group[index].id();
            if to == self.reactor {
                self.ungate(id, ticket);
            } else {
                self.send_to(to, move |runtime| runtime.ungate(id, ticket));
            }
        }
    }

    fn ungate(&mut self, bdev: BdevId, ticket: Ticket) {
        let Some(channel) = self.channel_of(bdev) else { return };
        let slot = &mut self.channels[channel.0 as usize];
        slot.gates.retain(|gate| gate.ticket != ticket);
        for io in std::mem::take(&mut slot.parked) {
            let slot = &mut self.channels[channel.0 as usize];
            if slot.is_gated(&io) {
                slot.parked.push_back(io);
            } else {
                self.dispatch(channel, io);
            }
        }
        self.gates_progress(channel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asker(saga: u32) -> Asker {
        Asker { reactor: ReactorId(0), who: Who::Saga(saga) }
    }

    #[test]
    fn overlapping_locks_are_granted_in_order() {
        let table = LockTable::default();
        let range = |lba, blocks| Scope::Writes { lba, blocks };
        let (first, held) = table.acquire(range(0, 8), asker(0));
        assert!(held);
        let (_, held) = table.acquire(range(8, 8), asker(1));
        assert!(held, "disjoint ranges do not wait");
        assert!(!table.acquire(range(4, 8), asker(2)).1);
        // It overlaps only the one that waits, and must not overtake it.
        assert!(!table.acquire(range(2, 1), asker(3)).1);
        assert!(!table.acquire(Scope::All, asker(4)).1);
        let admitted: Vec<Who> = table.release(first).iter().map(|w| w.asker.who).collect();
        assert_eq!(admitted, [Who::Saga(3)], "the second still overlaps blocks 8 to 11");
        assert_eq!(table.gates_for_new_channel().len(), 2);
    }

    #[test]
    fn gates_keep_out_what_is_in_scope() {
        let gate = |scope| Gate { ticket: Ticket(1), scope, state: GateState::Closed, asker: None };
        let range = gate(Scope::Writes { lba: 10, blocks: 10 });
        assert!(range.blocks(Op::Write { fua: false }, 5, 6));
        assert!(!range.blocks(Op::Write { fua: false }, 5, 5));
        assert!(!range.blocks(Op::Read, 10, 1));
        assert!(gate(Scope::All).blocks(Op::Read, 0, 1));
        assert!(gate(Scope::All).blocks(Op::Flush, 0, 0));
    }
}
