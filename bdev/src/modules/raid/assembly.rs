//! Which legs make the array: from their superblocks alone.
//!
//! # Rules
//! 1. The most events win. What they say about a leg counts, not what the leg says about itself.
//! 2. A leg whose history the winner does not remember has one of its own. Then there is no array until somebody says which
//!    legs to start with.
//! 3. An array starts by itself only with every leg that the winner calls in sync: one that is not there might know more.
//! 4. Started by order without some of them, it begins an epoch, so that these are known for what they are when they turn up.

use super::format::{LegState, Superblock};

/// What becomes of a leg that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It has everything.
    InSync,
    /// It is of this array and lacks what the log says.
    Behind,
    /// It is no leg of this array any more.
    Stranger,
}

/// What can be done with the legs that were found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Start, by the superblock at this index, with these roles.
    Start {
        /// Index of the winner.
        newest: usize,
        /// A role for each that was found.
        roles: Vec<Role>,
    },
    /// Wait for these legs (their numbers).
    Wait {
        /// Index of the winner.
        newest: usize,
        /// Who is not there.
        missing: Vec<usize>,
    },
    /// These two have different histories (indices).
    Diverged {
        /// The winner.
        newest: usize,
        /// The other.
        other: usize,
    },
    /// There is no leg among them that has everything.
    NothingInSync {
        /// Index of the winner.
        newest: usize,
    },
}

/// See the [module](self). `ordered`: start also without legs that might know more.
///
/// # Panics
/// When nothing was found.
pub fn assemble(found: &[Superblock], ordered: bool) -> Verdict {
    let newest = (0..found.len()).max_by_key(|&n| (found[n].events, usize::MAX - n)).expect("something was found");
    let winner = &found[newest];
    let mut roles = Vec::with_capacity(found.len());
    for (n, leg) in found.iter().enumerate() {
        let known = winner.legs.get(leg.me).filter(|known| known.id == leg.legs[leg.me].id);
        let role = match known.map(|known| known.state) {
            None | Some(LegState::Empty) => Role::Stranger,
            _ if !winner.remembers(leg.epoch, leg.events) => return Verdict::Diverged { newest, other: n },
            Some(LegState::InSync) => Role::InSync,
            Some(LegState::Rebuilding | LegState::Out) => Role::Behind,
        };
        // The same leg by two ways is one leg.
        let twice = found[..n].iter().zip(&roles).any(|(other, r)| other.me == leg.me && *r != Role::Stranger);
        roles.push(if twice { Role::Stranger } else { role });
    }
    let here = |me: usize| found.iter().zip(&roles).any(|(leg, role)| leg.me == me && *role == Role::InSync);
    let in_sync = winner.legs.iter().enumerate().filter(|(_, leg)| leg.state == LegState::InSync).map(|(me, _)| me);
    let missing: Vec<usize> = in_sync.filter(|&me| !here(me)).collect();
    if !missing.is_empty() && !ordered {
        return Verdict::Wait { newest, missing };
    }
    if !roles.contains(&Role::InSync) {
        return Verdict::NothingInSync { newest };
    }
    Verdict::Start { newest, roles }
}

#[cfg(test)]
mod tests {
    use super::super::format::{Epoch, Layout, Leg};
    use super::*;
    use uuid::Uuid;

    const IN: LegState = LegState::InSync;
    const OUT: LegState = LegState::Out;

    fn leg(me: usize, events: u64, epoch: u128, states: &[LegState]) -> Superblock {
        let leg = |(n, &state): (usize, &LegState)| Leg { id: Uuid::from_u128(100 + n as u128), state, since: 1 };
        Superblock {
            array: Uuid::from_u128(1),
            name: "m".to_string(),
            layout: Layout::new(512, 1 << 14, true, None).unwrap(),
            sequence: 1,
            events,
            epoch: Uuid::from_u128(epoch),
            history: Vec::new(),
            legs: states.iter().enumerate().map(leg).collect(),
            me,
        }
    }

    fn after(mut one: Superblock, old: u128, last: u64) -> Superblock {
        one.history.push(Epoch { id: Uuid::from_u128(old), last });
        one
    }

    #[test]
    fn all_in_sync_start_in_any_order() {
        let (a, b) = (leg(0, 5, 1, &[IN, IN]), leg(1, 5, 1, &[IN, IN]));
        for found in [[a.clone(), b.clone()], [b, a]] {
            assert_eq!(assemble(&found, false), Verdict::Start { newest: 0, roles: vec![Role::InSync; 2] });
        }
    }

    /// A change was under way when the power failed: one has it, the other has not.
    #[test]
    fn one_event_behind_is_in_sync_when_the_newest_says_so() {
        let found = [leg(0, 5, 1, &[IN, IN]), leg(1, 6, 1, &[IN, IN])];
        assert_eq!(assemble(&found, false), Verdict::Start { newest: 1, roles: vec![Role::InSync; 2] });
    }

    #[test]
    fn a_stale_leg_alone_waits_and_with_the_newest_is_behind() {
        let stale = leg(1, 5, 1, &[IN, IN]);
        let newest = after(leg(0, 6, 2, &[IN, OUT]), 1, 5);
        assert_eq!(assemble(std::slice::from_ref(&stale), false), Verdict::Wait { newest: 0, missing: vec![0] });
        assert!(matches!(assemble(std::slice::from_ref(&newest), false), Verdict::Start { .. }));
        let roles = vec![Role::Behind, Role::InSync];
        assert_eq!(assemble(&[stale, newest], false), Verdict::Start { newest: 1, roles });
    }

    /// Each ran alone: equal counts, unequal counts, and a count that is low enough to look like one left behind.
    #[test]
    fn two_histories_are_not_mixed() {
        for (a_events, b_events) in [(6, 6), (60, 6), (6, 60), (9, 5)] {
            let a = after(leg(0, a_events, 2, &[IN, OUT]), 1, a_events - 1);
            let b = after(leg(1, b_events, 3, &[OUT, IN]), 1, b_events - 1);
            for ordered in [false, true] {
                assert!(matches!(assemble(&[a.clone(), b.clone()], ordered), Verdict::Diverged { .. }));
            }
            assert!(matches!(assemble(&[b], true), Verdict::Start { .. }), "one alone can be chosen");
        }
    }

    #[test]
    fn an_order_starts_without_those_that_might_know_more() {
        let only = leg(1, 5, 1, &[IN, IN]);
        assert!(matches!(assemble(std::slice::from_ref(&only), true), Verdict::Start { .. }));
        let out = leg(1, 9, 1, &[IN, OUT]);
        assert_eq!(assemble(std::slice::from_ref(&out), true), Verdict::NothingInSync { newest: 0 });
    }

    #[test]
    fn who_was_replaced_is_a_stranger() {
        let newest = leg(0, 9, 1, &[IN, IN]);
        let second = leg(1, 9, 1, &[IN, IN]);
        let mut replaced = leg(1, 4, 1, &[IN, IN]);
        replaced.legs[1].id = Uuid::from_u128(77);
        let Verdict::Start { roles, .. } = assemble(&[newest, replaced, second.clone(), second], false) else {
            panic!()
        };
        assert_eq!(roles, [Role::InSync, Role::Stranger, Role::InSync, Role::Stranger]);
    }
}
