//! Which reactor a new connection goes to.
//!
//! [`choose`] decides, and nothing else does: by the load of reactors as they measured it (see [`ReactorHandle::load`]), and
//! between reactors that are about as busy by what they have. A load is measured only some time after its connection came, so
//! each connection that came lately counts as [`GUESS`] until then; else a host's queues, which come together, would all go to the
//! reactor that was idle a moment ago.
//!
//! [`ReactorHandle::load`]: crate::ReactorHandle::load

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::reactor::{LOAD_WINDOW, ReactorId};
use crate::time::Instant;

/// Loads that are no further apart count as equal, in permille of a reactor.
pub const TIE: u32 = 100;
/// What a connection is taken to need whose load is not in the measured one yet, in permille of a reactor.
pub const GUESS: u32 = 100;
/// How long a connection's load is taken to be missing: its first window may have begun before it did.
pub const UNSEEN: Duration = Duration::from_millis(2 * LOAD_WINDOW.as_millis() as u64);

/// A reactor as [`choose`] sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Candidate {
    /// Its measured load, in permille.
    pub load: u32,
    /// Connections that came too lately to be in it.
    pub unseen: u32,
    /// Connections.
    pub connections: u32,
    /// Connections of the same owner.
    pub of_owner: u32,
    /// It may have no more.
    pub is_full: bool,
}

/// The index of the reactor to take: one that is not full, of these one that is at most [`TIE`] busier than the least busy, of
/// these the one with the fewest connections of the owner, then the fewest at all, then the first.
///
/// # Panics
/// If there are none.
pub fn choose(reactors: &[Candidate]) -> usize {
    let expected = |reactor: &Candidate| reactor.load.saturating_add(reactor.unseen.saturating_mul(GUESS));
    let all_full = reactors.iter().all(|reactor| reactor.is_full);
    let open = |reactor: &&Candidate| all_full || !reactor.is_full;
    let least = reactors.iter().filter(open).map(expected).min().expect("there is a reactor");
    let near = reactors.iter().enumerate().filter(|(_, reactor)| open(reactor) && expected(reactor) < least + TIE);
    let chosen = near.min_by_key(|(index, reactor)| (reactor.of_owner, reactor.connections, *index));
    chosen.map_or(0, |(index, _)| index)
}

struct Seat<O> {
    connections: u32,
    /// By owner; without those that have none.
    owners: BTreeMap<O, u32>,
    /// When those came that are not in the measured load yet.
    unseen: VecDeque<Instant>,
}

impl<O: Ord> Seat<O> {
    fn forget_seen(&mut self, now: Instant) {
        while self.unseen.front().is_some_and(|came| now.since(*came) >= UNSEEN) {
            self.unseen.pop_front();
        }
    }

    fn add(&mut self, owner: O, now: Instant) {
        self.connections += 1;
        *self.owners.entry(owner).or_default() += 1;
        self.unseen.push_back(now);
    }
}

/// Connections of one kind on all reactors. `O` tells whose they are.
pub struct Placement<O> {
    seats: Mutex<Vec<Seat<O>>>,
    limit: u32,
}

impl<O: Ord> Placement<O> {
    /// None yet, on any of `reactors` reactors, each of which may have `limit`.
    pub fn new(reactors: usize, limit: usize) -> Placement<O> {
        let seat = || Seat { connections: 0, owners: BTreeMap::new(), unseen: VecDeque::new() };
        let seats = (0..reactors.max(1)).map(|_| seat()).collect();
        Placement { seats: Mutex::new(seats), limit: u32::try_from(limit).unwrap_or(u32::MAX) }
    }

    fn seats(&self) -> MutexGuard<'_, Vec<Seat<O>>> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The reactor for a connection of `owner`, which counts there from now on. `load` tells a reactor's measured load.
    pub fn place(&self, now: Instant, load: impl Fn(ReactorId) -> u32, owner: O) -> ReactorId {
        let mut seats = self.seats();
        let candidate = |(index, seat): (usize, &mut Seat<O>)| {
            seat.forget_seen(now);
            Candidate {
                load: load(ReactorId(index as u32)),
                unseen: seat.unseen.len() as u32,
                connections: seat.connections,
                of_owner: seat.owners.get(&owner).copied().unwrap_or(0),
                is_full: seat.connections >= self.limit,
            }
        };
        let candidates: Vec<Candidate> = seats.iter_mut().enumerate().map(candidate).collect();
        let index = choose(&candidates);
        seats[index].add(owner, now);
        ReactorId(index as u32)
    }

    /// Counts a connection of `owner` that is about to move to `reactor`, where it counts from now on as well; false when the
    /// reactor may have no more.
    pub fn reserve(&self, now: Instant, reactor: ReactorId, owner: O) -> bool {
        let mut seats = self.seats();
        let seat = &mut seats[reactor.0 as usize];
        let has_room = seat.connections < self.limit;
        if has_room {
            seat.forget_seen(now);
            seat.add(owner, now);
        }
        has_room
    }

    /// A connection of `owner` that counted on `reactor` is gone from there.
    ///
    /// # Panics
    /// If none counted.
    pub fn release(&self, reactor: ReactorId, owner: &O) {
        let mut seats = self.seats();
        let seat = &mut seats[reactor.0 as usize];
        seat.connections = seat.connections.checked_sub(1).expect("only what counts is released");
        let of_owner = seat.owners.get_mut(owner).expect("only what counts is released");
        *of_owner -= 1;
        if *of_owner == 0 {
            seat.owners.remove(owner);
        }
        // Which came last is not known, nor whether it was this one; what counts twice does so for a moment.
        let most = seat.connections as usize;
        while seat.unseen.len() > most {
            seat.unseen.pop_back();
        }
    }

    /// Connections on each reactor.
    pub fn connections(&self) -> Vec<u32> {
        self.seats().iter().map(|seat| seat.connections).collect()
    }
}

impl<O: Ord> fmt::Debug for Placement<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Placement").field("connections", &self.connections()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loads(loads: &[u32]) -> Vec<Candidate> {
        loads.iter().map(|&load| Candidate { load, ..Candidate::default() }).collect()
    }

    #[test]
    fn the_least_busy_is_taken() {
        assert_eq!(choose(&loads(&[700, 200, 450])), 1);
        // Connections do not outweigh load.
        let mut reactors = loads(&[700, 200]);
        reactors[1].connections = 1000;
        reactors[1].of_owner = 1000;
        assert_eq!(choose(&reactors), 1);
    }

    #[test]
    fn about_as_busy_is_a_tie_that_the_owners_queues_and_then_all_decide() {
        let mut reactors = loads(&[250, 201, 299]);
        assert_eq!(choose(&reactors), 0);
        (reactors[0].connections, reactors[1].connections, reactors[2].connections) = (3, 2, 1);
        assert_eq!(choose(&reactors), 2);
        (reactors[0].of_owner, reactors[1].of_owner, reactors[2].of_owner) = (0, 1, 1);
        assert_eq!(choose(&reactors), 0);
        // One more than a tie.
        reactors[0].load = 301;
        assert_eq!(choose(&reactors), 2);
    }

    #[test]
    fn a_full_reactor_is_taken_only_where_all_are() {
        let mut reactors = loads(&[0, 900]);
        reactors[0].is_full = true;
        assert_eq!(choose(&reactors), 1);
        reactors[1].is_full = true;
        assert_eq!(choose(&reactors), 0);
    }

    #[test]
    fn queues_that_come_together_are_spread_although_no_load_is_seen_yet() {
        let placement = Placement::new(2, 100);
        let place = |load: [u32; 2]| placement.place(Instant(0), |id| load[id.0 as usize], 'a').0;
        // Reactor 0 is busy: it gets its share when the other is expected to be as busy.
        let placed: Vec<u32> = (0..6).map(|_| place([300, 0])).collect();
        assert_eq!(placed, [1, 1, 1, 0, 1, 0]);
        let idle = Placement::new(3, 100);
        let placed: Vec<u32> = (0..7).map(|_| idle.place(Instant(0), |_| 0, 'a').0).collect();
        assert_eq!(placed, [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn what_was_seen_counts_no_longer_as_a_guess() {
        let placement = Placement::new(2, 100);
        let later = Instant(0) + UNSEEN;
        assert_eq!(placement.place(Instant(0), |_| 0, 'a'), ReactorId(0));
        assert_eq!(placement.place(Instant(1), |_| 0, 'a'), ReactorId(1));
        assert_eq!(placement.place(Instant(2), |_| 0, 'b'), ReactorId(0));
        // The first of reactor 0 turned out to do nothing, and the one of reactor 1 much.
        assert_eq!(placement.place(later, |id| 500 * id.0, 'b'), ReactorId(0));
    }

    #[test]
    fn counts_follow_moves_and_ends() {
        let placement = Placement::new(2, 2);
        let at = Instant(0);
        assert_eq!(placement.place(at, |_| 0, 'a'), ReactorId(0));
        assert!(placement.reserve(at, ReactorId(1), 'a'));
        placement.release(ReactorId(0), &'a');
        assert_eq!(placement.connections(), [0, 1]);
        assert!(placement.reserve(at, ReactorId(1), 'b'));
        assert!(!placement.reserve(at, ReactorId(1), 'c'), "it has all that it may have");
        placement.release(ReactorId(1), &'a');
        placement.release(ReactorId(1), &'b');
        assert_eq!(placement.connections(), [0, 0]);
    }
}
