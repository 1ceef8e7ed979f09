//! Moving queues from reactors that have too much to do to others that have little.
//!
//! [`Balancer::decide`] is all of the policy, and pure: numbers in, at most one move out. [`run`] asks it once a period and does
//! what it says. A queue moves only when
//! - its reactor has had work in [`Options::core_limit`] percent of its time at two looks in a row, and is the busiest at both;
//! - another is less busy by [`Options::load_limit`] percent of a reactor, and would not become busier than
//!   [`Options::core_busy`] percent with it;
//! - the busier of the two would then be less busy than the busiest is now, by half a percent at least;
//! - it has not moved during the last [`REST_PERIODS`] periods.
//!
//! So nothing moves while nobody is short of time, a queue that alone fills its reactor stays, and no queue goes to and fro. What a
//! queue loads its reactor with is its share of the work that the reactor's queues were given in the last period.
//!
//! Looking wakes no reactor: queues are asked for only when one is too busy.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use reactor::ReactorId;
use reactor::reactor::FULL_LOAD;

use super::system::{NvmfSystem, QpairInfo, QueueName};

/// Periods for which a queue that was moved stays.
pub const REST_PERIODS: u64 = 10;
/// What a move has to gain at least, in permille of a reactor.
const GAIN: u32 = 5;
/// How long a change of the options is not seen at most.
const SHORTEST_PERIOD: Duration = Duration::from_millis(10);

/// `framework_set_scheduler`: whether queues are moved, and when. Percentages are of a reactor's time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Queues are moved ("dynamic"); otherwise they stay where they were accepted ("static").
    pub dynamic: bool,
    /// Time between two looks, in microseconds.
    pub period_us: u64,
    /// How much less busy the other reactor has to be, in percent.
    pub load_limit: u8,
    /// From which load on a reactor gives queues away, in percent.
    pub core_limit: u8,
    /// Up to which load a reactor takes queues, in percent.
    pub core_busy: u8,
}

impl Default for Options {
    fn default() -> Options {
        Options { dynamic: true, period_us: 1_000_000, load_limit: 20, core_limit: 80, core_busy: 95 }
    }
}

impl Options {
    /// Time between two looks.
    pub fn period(&self) -> Duration {
        Duration::from_micros(self.period_us).max(SHORTEST_PERIOD)
    }

    /// The name of the policy.
    pub fn name(&self) -> &'static str {
        if self.dynamic { "dynamic" } else { "static" }
    }
}

fn permille(percent: u8) -> u32 {
    u32::from(percent) * FULL_LOAD / 100
}

/// A queue as the decision sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    /// Its name.
    pub name: QueueName,
    /// Where it is.
    pub reactor: ReactorId,
    /// Whether it can move.
    pub is_movable: bool,
    /// Work that it has been since it was connected.
    pub units: u64,
}

impl From<QpairInfo> for Queue {
    fn from(info: QpairInfo) -> Queue {
        Queue { name: info.name(), reactor: info.reactor, is_movable: info.is_movable, units: info.units }
    }
}

/// What is to be moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// Which queue.
    pub name: QueueName,
    /// Where it is.
    pub from: ReactorId,
    /// Where it shall be.
    pub to: ReactorId,
}

/// What is remembered from one look to the next.
#[derive(Debug, Default)]
pub struct Balancer {
    /// Looks so far.
    looks: u64,
    /// The reactor that was too busy at the last look.
    hot: Option<ReactorId>,
    /// Units of each queue at the last look at queues.
    units: BTreeMap<QueueName, u64>,
    /// When queues were moved that may not move again yet, in looks.
    moved: BTreeMap<QueueName, u64>,
}

impl Balancer {
    /// Counts a look at loads, in permille by reactor. True when the queues have to be looked at, too.
    pub fn look(&mut self, options: &Options, loads: &[u32]) -> bool {
        self.looks += 1;
        let is_hot = options.dynamic && busiest(options, loads).is_some();
        if !is_hot {
            self.hot = None;
            self.units.clear();
        }
        is_hot
    }

    /// After a look that asked for them: decides by the loads and the queues. The first time it only takes note.
    pub fn decide(&mut self, options: &Options, loads: &[u32], queues: &[Queue]) -> Option<Move> {
        let hot = busiest(options, loads)?;
        let was_hot = self.hot.replace(hot) == Some(hot);
        let before = std::mem::take(&mut self.units);
        self.units = queues.iter().map(|queue| (queue.name.clone(), queue.units)).collect();
        let looks = self.looks;
        self.moved.retain(|_, at| looks - *at < REST_PERIODS);
        if !was_hot {
            return None;
        }
        let (cold, least) = loads.iter().enumerate().min_by_key(|(_, load)| **load)?;
        let (cold, most) = (ReactorId(cold as u32), loads[hot.0 as usize]);
        if most - *least < permille(options.load_limit) {
            return None;
        }
        // A queue that was not there at the last look has done all of its work since.
        let done = |queue: &Queue| queue.units.saturating_sub(before.get(&queue.name).copied().unwrap_or(0));
        let here = || queues.iter().filter(|queue| queue.reactor == hot);
        let all: u64 = here().map(done).sum();
        let may = |queue: &&Queue| queue.is_movable && !self.moved.contains_key(&queue.name);
        let options_of = here().filter(may).filter_map(|queue| {
            let share = u128::from(done(queue)) * u128::from(most) / u128::from(all.max(1));
            let share = share as u32;
            let (stays, comes) = (most - share, least + share);
            let good = comes <= permille(options.core_busy) && stays.max(comes) + GAIN <= most;
            good.then_some((stays.max(comes), queue))
        });
        // Of those that are as good, always the same one.
        let (_, queue) = options_of.min_by(|(one, a), (two, b)| one.cmp(two).then_with(|| a.name.cmp(&b.name)))?;
        self.moved.insert(queue.name.clone(), looks);
        // What is left has to be seen to be too much, twice.
        self.hot = None;
        Some(Move { name: queue.name.clone(), from: hot, to: cold })
    }
}

/// The reactor that gives queues away, if any has too many.
fn busiest(options: &Options, loads: &[u32]) -> Option<ReactorId> {
    let (index, most) = loads.iter().enumerate().rev().max_by_key(|(_, load)| **load)?;
    (loads.len() > 1 && *most >= permille(options.core_limit)).then_some(ReactorId(index as u32))
}

/// Moves queues as the system's options say, until the system is gone or its reactors stop.
pub async fn run(system: Weak<NvmfSystem>) {
    let mut balancer = Balancer::default();
    loop {
        let Some(wait) = system.upgrade().map(|system| system.pause_between_looks()) else { return };
        wait.await;
        let Some(system) = system.upgrade() else { return };
        if round(&system, &mut balancer).await.is_none() {
            return;
        }
    }
}

/// One look and what follows from it. `None` when the reactors stop.
async fn round(system: &Arc<NvmfSystem>, balancer: &mut Balancer) -> Option<()> {
    let options = system.scheduler();
    let loads = system.loads();
    if !balancer.look(&options, &loads) {
        return Some(());
    }
    let queues: Vec<Queue> = system.reactors().qpairs().await.ok()?.into_iter().map(Queue::from).collect();
    let Some(Move { name, from, to }) = balancer.decide(&options, &loads, &queues) else { return Some(()) };
    let QueueName { subnqn, cntlid, qid } = &name;
    let (subsystem, cntlid, qid) = (subnqn.clone(), *cntlid, *qid);
    match system.reactors().move_qpair(name, from, to).await.ok()? {
        Ok(()) => {
            tracing::info!(
                subsystem,
                cntlid,
                qid,
                from = from.0,
                to = to.0,
                ?loads,
                "a queue was moved to a reactor that is less busy"
            );
        }
        Err(why) => {
            tracing::info!(subsystem, cntlid, qid, from = from.0, to = to.0, %why, "a queue was not moved");
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(qid: u16) -> QueueName {
        QueueName { subnqn: "nqn".into(), cntlid: 1, qid }
    }

    /// Queues 1 and up on reactors, with units.
    fn queues(of: &[(u32, u64)]) -> Vec<Queue> {
        let queue = |(qid, &(reactor, units)): (u16, &(u32, u64))| Queue {
            name: name(qid),
            reactor: ReactorId(reactor),
            is_movable: true,
            units,
        };
        (1..).zip(of).map(queue).collect()
    }

    /// Loads, and queues as [`queues`] takes them.
    type Look<'a> = (&'a [u32], &'a [(u32, u64)]);

    /// What is decided at each of the looks.
    fn decisions(balancer: &mut Balancer, options: &Options, looks: &[Look<'_>]) -> Vec<Option<u16>> {
        let mut decide = |loads: &[u32], of: &[(u32, u64)]| {
            let asks = balancer.look(options, loads);
            asks.then(|| balancer.decide(options, loads, &queues(of))).flatten().map(|moved| moved.name.qid)
        };
        looks.iter().map(|(loads, of)| decide(loads, of)).collect()
    }

    #[test]
    fn the_queue_that_evens_it_out_best_goes_to_the_least_busy() {
        let options = Options::default();
        let mut balancer = Balancer::default();
        let (before, after) = ([(0, 0), (0, 0), (0, 0), (1, 0)], [(0, 600), (0, 300), (0, 100), (1, 50)]);
        let loads = [1000, 300, 200];
        assert_eq!(balancer.decide(&options, &loads, &queues(&before)), None);
        let moved = balancer.decide(&options, &loads, &queues(&after)).unwrap();
        // 700 and 500; the first would make 400 and 800.
        assert_eq!(moved, Move { name: name(2), from: ReactorId(0), to: ReactorId(2) });
    }

    #[test]
    fn one_look_is_not_enough_and_a_pause_begins_anew() {
        let (a, b) = ([(0, 0), (0, 0)], [(0, 10), (0, 10)]);
        let busy: &[u32] = &[900, 0];
        let looks: &[Look<'_>] = &[(busy, &a), (&[500, 0], &a), (busy, &a), (&[0, 900], &a), (busy, &a), (busy, &b)];
        let found = decisions(&mut Balancer::default(), &Options::default(), looks);
        assert_eq!(found, [None, None, None, None, None, Some(1)]);
    }

    #[test]
    fn what_gains_nothing_stays() {
        let options = Options::default();
        let twice = |loads: &[u32], of: &[(u32, u64)]| {
            let start: Vec<_> = of.iter().map(|(reactor, _)| (*reactor, 0)).collect();
            decisions(&mut Balancer::default(), &options, &[(loads, &start), (loads, of)])[1]
        };
        // Nobody is short of time.
        assert_eq!(twice(&[799, 0], &[(0, 10), (0, 10)]), None);
        // All are.
        assert_eq!(twice(&[1000, 900], &[(0, 10), (0, 10)]), None);
        // One queue that fills a reactor would fill the other; one beside it that does nothing is no use.
        assert_eq!(twice(&[1000, 0], &[(0, 10)]), None);
        assert_eq!(twice(&[1000, 0], &[(0, 1000), (0, 0)]), None);
        assert_eq!(twice(&[1000, 0], &[(0, 990), (0, 10)]), Some(2));
        // It would become too busy there.
        assert_eq!(twice(&[1000, 780], &[(0, 800), (0, 200)]), None);
        // One reactor has nobody beside it.
        assert_eq!(twice(&[1000], &[(0, 10), (0, 10)]), None);
    }

    #[test]
    fn a_queue_that_moved_rests_and_others_do_not() {
        let options = Options::default();
        let mut balancer = Balancer::default();
        let loads: &[u32] = &[1000, 0];
        let mut units = 0;
        let mut moved = Vec::new();
        // However often it comes back, as if the loads had not changed at all.
        for _ in 0..2 * REST_PERIODS {
            units += 100;
            balancer.look(&options, loads);
            let of = [(0, units), (0, units)];
            moved.extend(balancer.decide(&options, loads, &queues(&of)).map(|moved| (balancer.looks, moved.name.qid)));
        }
        assert_eq!(moved, [(2, 1), (4, 2), (12, 1), (14, 2)]);
    }

    #[test]
    fn static_moves_nothing_and_what_cannot_move_stays() {
        let fixed = Options { dynamic: false, ..Options::default() };
        let (loads, of): Look<'_> = (&[1000, 0], &[(0, 1), (0, 1)]);
        assert_eq!(decisions(&mut Balancer::default(), &fixed, &[(loads, of); 3]), [None, None, None]);
        let options = Options::default();
        let (mut balancer, mut rdma) = (Balancer::default(), queues(&[(0, 5), (0, 5)]));
        rdma.iter_mut().for_each(|queue| queue.is_movable = false);
        for _ in 0..3 {
            balancer.look(&options, &[1000, 0]);
            assert_eq!(balancer.decide(&options, &[1000, 0], &rdma), None);
        }
    }
}
