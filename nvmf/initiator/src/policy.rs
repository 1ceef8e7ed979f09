//! Which path an I/O takes: arithmetic over what a head knows of its paths, nothing else.
//!
//! Optimized paths come before non-optimized ones, always. Among the best:
//! - active-passive stays on one path for as long as it is among them; the preferred path, where there is one, wins;
//! - active-active, round robin, goes on to the next path after `rr_min_io` I/Os;
//! - active-active, queue depth, takes the one with the fewest commands outstanding.

/// Which of several paths are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// One at a time.
    #[default]
    ActivePassive,
    /// All of the best, in turns.
    RoundRobin {
        /// I/Os before it is the next one's turn, at least 1.
        min_io: u32,
    },
    /// All of the best, the least loaded first.
    QueueDepth,
}

/// What is known of one path for one namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// 0 for optimized, 1 for non-optimized; `None` for one that cannot be used.
    pub rank: Option<u8>,
    /// It takes a command now.
    pub room: bool,
    /// Commands outstanding.
    pub load: usize,
    /// The user prefers it.
    pub preferred: bool,
}

/// What is remembered from one choice to the next.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    current: usize,
    count: u32,
}

/// The outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// This one.
    Path(usize),
    /// There is one, and it is full: it takes the next command when one of its own has completed.
    Full,
    /// There is none.
    None,
}

/// The one path of active-passive, if it is among the best.
fn passive(current: usize, count: usize, best: u8, candidate: &impl Fn(usize) -> Candidate) -> usize {
    let is_best = |index: usize| candidate(index).rank == Some(best);
    let preferred = (0..count).find(|&index| is_best(index) && candidate(index).preferred);
    let stay = Some(current).filter(|&index| index < count && is_best(index));
    let chosen = preferred.or(stay).or_else(|| (0..count).find(|&index| is_best(index)));
    chosen.expect("there is a best one")
}

/// Which of `count` paths are in use: those that [`choose`] would take now, if they had room.
pub fn in_use(mode: Mode, memory: Memory, count: usize, candidate: impl Fn(usize) -> Candidate) -> Vec<bool> {
    let Some(best) = (0..count).filter_map(|index| candidate(index).rank).min() else { return vec![false; count] };
    let only = (mode == Mode::ActivePassive).then(|| passive(memory.current, count, best, &candidate));
    (0..count).map(|index| only.is_none_or(|only| only == index) && candidate(index).rank == Some(best)).collect()
}

/// Chooses among `count` paths.
#[inline]
pub fn choose(mode: Mode, memory: &mut Memory, count: usize, candidate: impl Fn(usize) -> Candidate) -> Choice {
    if count == 1 {
        let only = candidate(0);
        return match only.rank {
            None => Choice::None,
            Some(_) if only.room => Choice::Path(0),
            Some(_) => Choice::Full,
        };
    }
    let Some(best) = (0..count).filter_map(|index| candidate(index).rank).min() else { return Choice::None };
    let is_best = |index: usize| candidate(index).rank == Some(best);
    match mode {
        Mode::ActivePassive => {
            let chosen = passive(memory.current, count, best, &candidate);
            memory.current = chosen;
            if candidate(chosen).room { Choice::Path(chosen) } else { Choice::Full }
        }
        Mode::RoundRobin { min_io } => {
            let stay = memory.count < min_io && memory.current < count;
            let first = if stay { memory.current } else { memory.current + 1 };
            let turn = (0..count).map(|n| (first + n) % count);
            let Some(chosen) = turn.into_iter().find(|&index| is_best(index) && candidate(index).room) else {
                return Choice::Full;
            };
            memory.count = if stay && chosen == memory.current { memory.count + 1 } else { 1 };
            memory.current = chosen;
            Choice::Path(chosen)
        }
        Mode::QueueDepth => {
            let open = (0..count).filter(|&index| is_best(index) && candidate(index).room);
            open.min_by_key(|&index| candidate(index).load).map_or(Choice::Full, Choice::Path)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(rank: Option<u8>) -> Candidate {
        Candidate { rank, room: true, load: 0, preferred: false }
    }

    fn run(mode: Mode, memory: &mut Memory, paths: &[Candidate]) -> Choice {
        choose(mode, memory, paths.len(), |index| paths[index])
    }

    #[test]
    fn active_passive_stays_fails_over_and_comes_back_only_to_what_is_better() {
        let (mode, mut memory) = (Mode::ActivePassive, Memory::default());
        let mut paths = [path(Some(0)), path(Some(0)), path(Some(1))];
        assert_eq!(run(mode, &mut memory, &paths), Choice::Path(0));
        paths[0].rank = None;
        assert_eq!(run(mode, &mut memory, &paths), Choice::Path(1));
        paths[0].rank = Some(0);
        assert_eq!(run(mode, &mut memory, &paths), Choice::Path(1), "it stays where it is");
        paths[0].preferred = true;
        assert_eq!(run(mode, &mut memory, &paths), Choice::Path(0));
        paths = [path(None), path(None), path(Some(1))];
        assert_eq!(run(mode, &mut memory, &paths), Choice::Path(2));
        paths[2].room = false;
        assert_eq!(run(mode, &mut memory, &paths), Choice::Full);
        paths[1].rank = Some(0);
        assert_eq!(run(mode, &mut memory, &paths), Choice::Path(1), "an optimized one is better");
        assert_eq!(run(mode, &mut memory, &[path(None), path(None)]), Choice::None);
    }

    #[test]
    fn round_robin_takes_turns() {
        let (mode, mut memory) = (Mode::RoundRobin { min_io: 2 }, Memory::default());
        let mut paths = [path(Some(0)), path(Some(1)), path(Some(0))];
        let turns: Vec<Choice> = (0..8).map(|_| run(mode, &mut memory, &paths)).collect();
        assert_eq!(turns, [0, 0, 2, 2, 0, 0, 2, 2].map(Choice::Path));
        paths[0].room = false;
        assert!((0..4).all(|_| run(mode, &mut memory, &paths) == Choice::Path(2)));
        paths[2].room = false;
        assert_eq!(run(mode, &mut memory, &paths), Choice::Full, "a worse path is no way round a full one");
    }

    #[test]
    fn queue_depth_takes_the_least_loaded() {
        let (mode, mut memory) = (Mode::QueueDepth, Memory::default());
        let loaded = |load, rank| Candidate { load, ..path(rank) };
        let paths = [loaded(5, Some(0)), loaded(3, Some(0)), loaded(0, Some(1)), loaded(0, None)];
        assert_eq!(run(mode, &mut memory, &paths), Choice::Path(1));
    }

    #[test]
    fn what_is_in_use_is_what_would_be_chosen() {
        let paths = [path(Some(1)), path(Some(0)), path(None), path(Some(0))];
        let used = |mode, memory| in_use(mode, memory, 4, |index| paths[index]);
        assert_eq!(used(Mode::QueueDepth, Memory::default()), [false, true, false, true]);
        let mut memory = Memory::default();
        assert_eq!(used(Mode::ActivePassive, memory), [false, true, false, false]);
        memory.current = 3;
        assert_eq!(used(Mode::ActivePassive, memory), [false, false, false, true]);
        assert_eq!(in_use(Mode::ActivePassive, memory, 1, |_| path(None)), [false]);
    }

    #[test]
    fn one_path_is_the_one() {
        for mode in [Mode::ActivePassive, Mode::RoundRobin { min_io: 1 }, Mode::QueueDepth] {
            assert_eq!(run(mode, &mut Memory::default(), &[path(Some(1))]), Choice::Path(0));
            assert_eq!(run(mode, &mut Memory::default(), &[path(None)]), Choice::None);
        }
    }
}
