//! Which reactors may write a region: one, which then meets nobody there, or several, which meet on [`cells`](super::cells).
//!
//! ```text
//!            a reactor asks            another asks: the first is told to share
//!  Nobody ------------------> One ---------------------------------------------> Asked
//!     ^                        |                                                    | what it wrote there by itself has ended
//!     |                        |  nobody has it in a round of revoking              v
//!     '------------------------+-------------------------------------------------- Several
//! ```
//! # Invariants
//! - While a reactor has a write in a region without its cells, no other has one there.
//! - After the array was offline it is not known who still has writes where: all are asked.

use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    Nobody,
    One(u32),
    /// This one was told to share, or everybody was.
    Asked(Option<u32>),
    Several,
    Unknown,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Act {
    /// `to` may write these regions; whether it shares them.
    Grant { to: u32, regions: Vec<(usize, bool)> },
    /// `of` is to share these regions; when it does, [`Sharing::shared`] with `ask`.
    Share { ask: u64, of: u32, regions: Vec<usize> },
}

#[derive(Debug)]
struct Pending {
    ask: u64,
    left: usize,
    to: u32,
    regions: Vec<usize>,
}

/// See the [module](self). There are at most two grants under way for each reactor: each asks once at a time, and may have asked just
/// before it heard that the array was offline.
#[derive(Debug)]
pub(super) struct Sharing {
    reactors: u32,
    holders: Vec<Holder>,
    /// Granted, or about to be, since the last round of revoking began.
    recent: Vec<bool>,
    pending: Vec<Pending>,
    next: u64,
}

impl Sharing {
    pub(super) fn new(reactors: u32, regions: usize) -> Sharing {
        let (holders, recent) = (vec![Holder::Nobody; regions], vec![false; regions]);
        Sharing { reactors, holders, recent, pending: Vec::new(), next: 0 }
    }

    /// `to` is to have these regions.
    pub(super) fn grant(&mut self, to: u32, regions: Vec<usize>) -> Vec<Act> {
        let mut asked: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for &region in &regions {
            self.recent[region] = true;
            let (holder, of) = match self.holders[region] {
                Holder::Nobody => (Holder::One(to), None),
                Holder::One(of) if of == to => (Holder::One(to), None),
                Holder::One(of) => (Holder::Asked(Some(of)), Some(of..of + 1)),
                Holder::Asked(Some(of)) if of == to => (Holder::Asked(Some(of)), None),
                // Whether it shares by now is not known here; it is asked again.
                Holder::Asked(Some(of)) => (Holder::Asked(Some(of)), Some(of..of + 1)),
                Holder::Asked(None) | Holder::Unknown => (Holder::Asked(None), Some(0..self.reactors)),
                Holder::Several => (Holder::Several, None),
            };
            self.holders[region] = holder;
            of.into_iter().flatten().for_each(|of| asked.entry(of).or_default().push(region));
        }
        if asked.is_empty() {
            return vec![self.granted(to, regions)];
        }
        self.next += 1;
        let ask = self.next;
        self.pending.push(Pending { ask, left: asked.len(), to, regions });
        asked.into_iter().map(|(of, regions)| Act::Share { ask, of, regions }).collect()
    }

    /// Whether they are shared is as of now: while a grant waited for one region, another may have asked for the next.
    fn granted(&self, to: u32, regions: Vec<usize>) -> Act {
        let shared = |region: usize| self.holders[region] != Holder::One(to);
        Act::Grant { to, regions: regions.into_iter().map(|region| (region, shared(region))).collect() }
    }

    /// One that was asked shares.
    pub(super) fn shared(&mut self, ask: u64) -> Option<Act> {
        let at = self.pending.iter().position(|pending| pending.ask == ask)?;
        self.pending[at].left -= 1;
        if self.pending[at].left > 0 {
            return None;
        }
        let Pending { to, regions, .. } = self.pending.swap_remove(at);
        for &region in &regions {
            if let Holder::Asked(of) = self.holders[region]
                && of != Some(to)
            {
                self.holders[region] = Holder::Several;
            }
        }
        Some(self.granted(to, regions))
    }

    /// Reactors are asked what they still use.
    pub(super) fn revoke(&mut self) {
        self.recent.fill(false);
        for &region in self.pending.iter().flat_map(|pending| &pending.regions) {
            self.recent[region] = true;
        }
    }

    /// They have all answered: `held` is what some of them keep. What was granted meanwhile is added to it.
    pub(super) fn revoked(&mut self, held: &mut [bool]) {
        for (region, held) in held.iter_mut().enumerate() {
            *held |= self.recent[region];
            if !*held && self.holders[region] != Holder::Unknown {
                self.holders[region] = Holder::Nobody;
            }
        }
    }

    /// All grants end; what is on the legs does not.
    pub(super) fn offline(&mut self) {
        self.pending.clear();
        self.holders.fill(Holder::Unknown);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::conformance::Rng;

    const REACTORS: usize = 3;
    const REGIONS: usize = 3;

    /// What is on its way to a reactor, in order.
    enum Letter {
        Grant(Vec<(usize, bool)>),
        Share(u64, Vec<usize>),
        Revoke,
        Offline,
    }

    /// A reactor as its channel is: regions, writes by region and whether they have their cells, questions not answered.
    #[derive(Default)]
    struct Reactor {
        letters: VecDeque<Letter>,
        granted: [Option<bool>; REGIONS],
        used: [bool; REGIONS],
        writes: Vec<(usize, bool)>,
        shares: Vec<(u64, Vec<usize>)>,
        asking: bool,
    }

    struct World {
        rng: Rng,
        sharing: Sharing,
        reactors: Vec<Reactor>,
        answers: VecDeque<u64>,
        /// Reactors that have not answered, what is held.
        round: Option<(usize, Vec<bool>)>,
    }

    impl World {
        fn act(&mut self, act: Act) {
            match act {
                Act::Grant { to, regions } => {
                    self.reactors[to as usize].letters.push_back(Letter::Grant(regions));
                }
                Act::Share { ask, of, regions } => {
                    self.reactors[of as usize].letters.push_back(Letter::Share(ask, regions));
                }
            }
        }

        fn answer(&mut self, me: usize) {
            let reactor = &mut self.reactors[me];
            let (writes, answers) = (&reactor.writes, &mut self.answers);
            reactor.shares.retain(|(ask, regions)| {
                let alone = writes.iter().any(|(region, cells)| !cells && regions.contains(region));
                if !alone {
                    answers.push_back(*ask);
                }
                alone
            });
        }

        fn read_letter(&mut self, me: usize) {
            let reactor = &mut self.reactors[me];
            match reactor.letters.pop_front() {
                None => {}
                Some(Letter::Grant(regions)) => {
                    regions.into_iter().for_each(|(region, shared)| reactor.granted[region] = Some(shared));
                    reactor.asking = false;
                }
                Some(Letter::Share(ask, regions)) => {
                    for &region in &regions {
                        if let Some(shared) = &mut reactor.granted[region] {
                            *shared = true;
                        }
                    }
                    reactor.shares.push((ask, regions));
                    self.answer(me);
                }
                Some(Letter::Revoke) => {
                    // Also what was granted before the array was offline.
                    reactor.writes.iter().for_each(|(region, _)| reactor.used[*region] = true);
                    let (left, held) = self.round.as_mut().expect("a round is under way");
                    for (region, held) in held.iter_mut().enumerate() {
                        if std::mem::take(&mut reactor.used[region]) {
                            *held = true;
                        } else {
                            reactor.granted[region] = None;
                        }
                    }
                    *left -= 1;
                    if *left == 0 {
                        let (_, mut held) = self.round.take().unwrap();
                        self.sharing.revoked(&mut held);
                        for (region, held) in held.into_iter().enumerate() {
                            let has = |reactor: &Reactor| reactor.granted[region].is_some();
                            assert!(held || !self.reactors.iter().any(has), "its bit would be cleared");
                        }
                    }
                }
                Some(Letter::Offline) => {
                    (reactor.granted, reactor.asking) = ([None; REGIONS], false);
                }
            }
        }

        fn is_told_of_an_end(&self) -> bool {
            let unread = |reactor: &Reactor| reactor.letters.iter().any(|letter| matches!(letter, Letter::Offline));
            self.reactors.iter().any(unread)
        }

        fn write(&mut self, me: usize) {
            let region = self.rng.below(REGIONS as u64) as usize;
            let reactor = &mut self.reactors[me];
            let Some(shared) = reactor.granted[region] else {
                if !std::mem::replace(&mut reactor.asking, true) {
                    let mut regions = vec![region];
                    let next = (region + 1) % REGIONS;
                    if reactor.granted[next].is_none() && self.rng.one_in(2) {
                        regions.push(next);
                    }
                    for act in self.sharing.grant(me as u32, regions) {
                        self.act(act);
                    }
                }
                return;
            };
            reactor.used[region] = true;
            reactor.writes.push((region, shared));
            for (other, reactor) in self.reactors.iter().enumerate() {
                let meets = reactor.writes.iter().any(|(of, cells)| *of == region && !(*cells && shared));
                assert!(other == me || !meets, "two write a region, and one without cells");
            }
        }
    }

    #[test]
    fn who_writes_without_cells_is_alone() {
        for seed in 0..2000 {
            let sharing = Sharing::new(REACTORS as u32, REGIONS);
            let reactors = (0..REACTORS).map(|_| Reactor::default()).collect();
            let mut world = World { rng: Rng::new(seed), sharing, reactors, answers: VecDeque::new(), round: None };
            for _ in 0..400 {
                let me = world.rng.below(REACTORS as u64) as usize;
                match world.rng.below(16) {
                    0..5 => world.write(me),
                    5..8 if !world.reactors[me].writes.is_empty() => {
                        let at = world.rng.below(world.reactors[me].writes.len() as u64) as usize;
                        world.reactors[me].writes.swap_remove(at);
                        world.answer(me);
                    }
                    8..12 => world.read_letter(me),
                    12..14 => {
                        if let Some(act) = world.answers.pop_front().and_then(|ask| world.sharing.shared(ask)) {
                            world.act(act);
                        }
                    }
                    14 if world.round.is_none() => {
                        world.sharing.revoke();
                        world.round = Some((REACTORS, vec![false; REGIONS]));
                        world.reactors.iter_mut().for_each(|reactor| reactor.letters.push_back(Letter::Revoke));
                    }
                    // All are told before anything else happens.
                    15 if world.rng.one_in(20) && !world.is_told_of_an_end() => {
                        world.sharing.offline();
                        world.reactors.iter_mut().for_each(|reactor| reactor.letters.push_back(Letter::Offline));
                    }
                    _ => {}
                }
            }
            assert!(world.sharing.pending.len() <= 2 * REACTORS);
        }
    }
}
