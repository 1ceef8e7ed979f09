//! Reactors, control plane and actors over one simulated machine, on one thread.
//!
//! # One round
//! ```text
//! due events -> reactors that are awake, in random order -> tasks of the control plane that were woken -> actors
//! nothing did anything: the clock jumps to the next event, deadline or timer
//! ```
//! A reactor goes to sleep as [`Reactor::run`] does: it announces that, asks every poller once more, and then is not
//! stepped until something wakes it. So a wake-up that the code under test forgets is seen as work that never ends.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as Task, Poll, Wake, Waker};
use std::time::Duration;

use bdev::conformance::Rng;
use bdev::core::runtime::SharedRuntime;
use bdev::core::system::Executor;
use bdev::core::{BdevSystem, IoRuntime, RuntimeConfig};
use futures_util::future::BoxFuture;
use reactor::buffer::PoolConfig;
use reactor::reactor::{LoneReactor, PollPolicy, ReactorConfig};
use reactor::{Clock, Context, Instant, Platform, Progress, Reactor, ReactorId};

use crate::park::SleepFlags;
use crate::platform::SimPlatform;
use crate::sim::Sim;
use crate::trace;

/// What a world is made of.
#[derive(Clone, Copy, Debug)]
pub struct WorldConfig {
    /// Reactors.
    pub reactors: usize,
    /// I/Os in each reactor's pool.
    pub io_pool: usize,
    /// Payload memory of each reactor.
    pub buffers: PoolConfig,
    /// Reactors sleep when they have nothing to do; otherwise they poll.
    pub sleeps: bool,
    /// Rounds after which a run counts as hanging.
    pub rounds: u64,
}

impl Default for WorldConfig {
    fn default() -> WorldConfig {
        let buffers = PoolConfig { small: 64, medium: 16, large: 16 };
        WorldConfig { reactors: 2, io_pool: 64, buffers, sleeps: true, rounds: 3_000_000 }
    }
}

impl WorldConfig {
    /// One of many: every second is so small that everything has to wait, with as many large buffers as `large` says.
    pub fn drawn(rng: &mut Rng, large: impl FnOnce(&mut Rng) -> usize) -> WorldConfig {
        let mut config = WorldConfig {
            reactors: 1 + rng.below(3) as usize,
            io_pool: 256,
            buffers: PoolConfig { small: 128, medium: 32, large: 16 },
            sleeps: !rng.one_in(4),
            ..WorldConfig::default()
        };
        if rng.one_in(2) {
            // So few that everything waits.
            config.io_pool = 2 << rng.below(3);
            let (small, medium) = (rng.below(8) as usize, rng.below(3) as usize);
            config.buffers = PoolConfig { small, medium, large: large(rng) };
        }
        config
    }
}

/// Something outside of the product that acts on the world: a host, whoever calls the control plane, a fault.
pub trait Actor {
    /// Does what there is to do.
    fn act(&mut self, world: &WorldView) -> Progress;
    /// When it wants to act even if nothing happens.
    fn deadline(&self) -> Option<Instant>;
    /// What it is doing, for the report of a hang.
    fn describe(&self) -> String;
}

/// What an actor sees of the world.
#[derive(Clone, Debug)]
pub struct WorldView {
    /// The machine.
    pub sim: Arc<Sim>,
}

struct Slot {
    reactor: Reactor,
    flags: Arc<SleepFlags>,
    asleep: Option<Option<Instant>>,
    /// The host does not run its thread until then.
    stalled_until: Instant,
}

struct Running {
    future: Pin<Box<dyn Future<Output = ()>>>,
    woken: Arc<Woken>,
}

struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
    fn wake_by_ref(self: &Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// The control plane's executor, over virtual time.
struct Tasks {
    sim: Arc<Sim>,
    spawned: Mutex<Vec<BoxFuture<'static, ()>>>,
    /// Reactors beside the group that have not begun.
    starting: Mutex<Vec<LoneReactor>>,
}

impl Executor for Tasks {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.spawned.lock().unwrap_or_else(PoisonError::into_inner).push(task);
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let sim = Arc::clone(&self.sim);
        let until = sim.now() + duration;
        let mut armed = false;
        Box::pin(std::future::poll_fn(move |task| {
            if sim.now() >= until {
                return Poll::Ready(());
            }
            // Moved tasks would need a new waker; tasks here keep theirs.
            if !std::mem::replace(&mut armed, true) {
                sim.timer(until, task.waker().clone());
            }
            Poll::Pending
        }))
    }

    fn start_reactor(&self, reactor: LoneReactor, _: &Arc<dyn Platform>) -> io::Result<()> {
        self.starting.lock().unwrap_or_else(PoisonError::into_inner).push(reactor);
        Ok(())
    }
}

/// The result of a task that was started with [`World::spawn`].
pub struct Outcome<R>(Rc<Cell<Option<R>>>);

impl<R> Outcome<R> {
    /// Takes the result, once it is there.
    pub fn take(&self) -> Option<R> {
        self.0.take()
    }
}

impl<R> std::fmt::Debug for Outcome<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Outcome")
    }
}

/// Reactors, control plane and actors over one simulated machine.
pub struct World {
    view: WorldView,
    /// The group's first, then those beside it.
    reactors: Vec<Slot>,
    platform: Arc<SimPlatform>,
    system: Arc<BdevSystem>,
    tasks: Arc<Tasks>,
    running: BTreeMap<u64, Running>,
    next_task: u64,
    actors: Vec<Rc<RefCell<dyn Actor>>>,
    rng: Rng,
    config: WorldConfig,
    rounds: u64,
    idle: bool,
    /// Rounds in a row in which reactors found nothing to do and would not sleep either.
    spins: u32,
    spinning: bool,
}

impl World {
    /// A world on `sim`; `seed` decides the order in which things run.
    ///
    /// # Panics
    /// When the host has no memory for the reactors' pools.
    pub fn new(sim: &Arc<Sim>, config: WorldConfig, seed: u64) -> World {
        let platform = SimPlatform::new(sim);
        let policy = if config.sleeps { PollPolicy::Sleep } else { PollPolicy::Busy };
        let mut reactors: Vec<Reactor> = (0..config.reactors as u32)
            .map(|id| {
                let config = ReactorConfig { id: ReactorId(id), core: None, policy };
                Reactor::new(config, Arc::clone(&platform) as Arc<dyn Platform>).expect("a reactor can be made")
            })
            .collect();
        let group: Vec<_> = reactors.iter().map(Reactor::handle).collect();
        let runtime = RuntimeConfig { io_pool: config.io_pool, buffers: config.buffers };
        for reactor in &mut reactors {
            reactor.join_group(group.clone());
            IoRuntime::install(reactor.context(), runtime).expect("the bdev layer can be installed");
        }
        let tasks = Arc::new(Tasks { sim: Arc::clone(sim), spawned: Mutex::default(), starting: Mutex::default() });
        let executor = Arc::clone(&tasks) as Arc<dyn Executor>;
        let system = BdevSystem::new(group, Arc::clone(&platform) as Arc<dyn Platform>, executor);
        let slot = |(index, reactor)| Slot {
            reactor,
            flags: Arc::clone(sim.lock().parks.flags(index)),
            asleep: None,
            stalled_until: Instant(0),
        };
        World {
            view: WorldView { sim: Arc::clone(sim) },
            reactors: reactors.into_iter().enumerate().map(slot).collect(),
            platform,
            system,
            tasks,
            running: BTreeMap::new(),
            next_task: 0,
            actors: Vec::new(),
            rng: Rng::new(seed ^ 0x0a11_0c8d),
            config,
            rounds: 0,
            idle: false,
            spins: 0,
            spinning: false,
        }
    }

    /// The machine.
    pub fn sim(&self) -> &Arc<Sim> {
        &self.view.sim
    }

    /// The machine's seams.
    pub fn platform(&self) -> Arc<dyn Platform> {
        Arc::clone(&self.platform) as Arc<dyn Platform>
    }

    /// The bdev layer's control plane.
    pub fn system(&self) -> &Arc<BdevSystem> {
        &self.system
    }

    /// The control plane's executor.
    pub fn executor(&self) -> Arc<dyn Executor> {
        Arc::clone(&self.tasks) as Arc<dyn Executor>
    }

    /// Number of reactors.
    pub fn reactor_count(&self) -> usize {
        self.config.reactors
    }

    /// Reactors beside the group that have not stopped.
    pub fn lone_reactors(&self) -> usize {
        self.reactors.len() - self.config.reactors
    }

    /// A reactor's context, between steps.
    pub fn context(&mut self, reactor: usize) -> &mut Context {
        self.wake(reactor);
        self.reactors[reactor].reactor.context()
    }

    /// A reactor's part of the bdev layer. Whoever submits through it from outside of the reactor calls
    /// [`World::wake`] too, as production code never does that.
    pub fn runtime(&mut self, reactor: usize) -> SharedRuntime {
        IoRuntime::of(self.reactors[reactor].reactor.context())
    }

    /// Ends a reactor's sleep.
    pub fn wake(&mut self, reactor: usize) {
        let slot = &mut self.reactors[reactor];
        if slot.asleep.take().is_some() {
            slot.reactor.context().waker().retract();
        }
    }

    /// Adds an actor.
    pub fn add_actor(&mut self, actor: Rc<RefCell<dyn Actor>>) {
        self.actors.push(actor);
    }

    /// Takes all actors out.
    pub fn clear_actors(&mut self) {
        self.actors.clear();
    }

    /// Starts a task of the control plane.
    pub fn spawn<R: 'static>(&mut self, future: impl Future<Output = R> + 'static) -> Outcome<R> {
        let outcome = Rc::new(Cell::new(None));
        let result = Rc::clone(&outcome);
        self.start_task(Box::pin(async move { result.set(Some(future.await)) }));
        Outcome(outcome)
    }

    fn start_task(&mut self, future: Pin<Box<dyn Future<Output = ()>>>) {
        self.next_task += 1;
        let woken = Arc::new(Woken(AtomicBool::new(true)));
        self.running.insert(self.next_task, Running { future, woken });
    }

    /// Whether the last round found nothing to do now or later.
    pub fn is_idle(&self) -> bool {
        self.idle
    }

    /// The host does not run the threads of reactors beside the group for a while: to the others they hang.
    pub fn stall_lone(&mut self, time: Duration) {
        let until = self.view.sim.now() + time;
        for slot in &mut self.reactors[self.config.reactors..] {
            slot.stalled_until = slot.stalled_until.max(until);
        }
    }

    /// One round of everything.
    ///
    /// # Panics
    /// When the run has had more rounds than it may have: something spins or never ends.
    pub fn round(&mut self) {
        self.rounds += 1;
        assert!(self.rounds < self.config.rounds, "the run does not end: {}", self.describe());
        // A round takes time, or pollers that wait for a deadline would never see it.
        let mut busy = self.view.sim.advance(100 + self.rng.below(2_000)) > 0;
        busy |= self.start_lone();
        busy |= self.step_reactors();
        let stays = |slot: &Slot| !slot.reactor.is_stopping();
        let mut index = 0;
        self.reactors.retain(|slot| {
            index += 1;
            index <= self.config.reactors || stays(slot)
        });
        busy |= self.run_tasks();
        for n in 0..self.actors.len() {
            let actor = Rc::clone(&self.actors[n]);
            busy |= actor.borrow_mut().act(&self.view).is_busy();
        }
        self.idle = false;
        // Somebody may have been woken by a reactor that says it did nothing: time does not pass over that.
        let now = self.view.sim.now();
        let woken = |slot: &Slot| slot.asleep.is_some() && slot.stalled_until <= now && slot.flags.is_woken();
        busy |= self.reactors.iter().any(woken);
        if busy {
            self.spins = 0;
        } else {
            self.jump();
        }
    }

    /// Begins reactors beside the group.
    fn start_lone(&mut self) -> bool {
        let starting = std::mem::take(&mut *self.tasks.starting.lock().unwrap_or_else(PoisonError::into_inner));
        let platform = self.platform();
        let mut busy = false;
        for lone in starting {
            busy = true;
            let Some(reactor) = lone.build(&platform) else { continue };
            let flags = {
                let state = self.view.sim.lock();
                // Its parker is the newest.
                Arc::clone(state.parks.flags(state.parks.len() - 1))
            };
            self.reactors.push(Slot { reactor, flags, asleep: None, stalled_until: Instant(0) });
        }
        busy
    }

    fn step_reactors(&mut self) -> bool {
        let now = self.view.sim.now();
        let mut order: Vec<usize> = (0..self.reactors.len()).collect();
        for n in (1..order.len()).rev() {
            order.swap(n, self.rng.below(n as u64 + 1) as usize);
        }
        let mut busy = false;
        self.spinning = false;
        for index in order {
            let slow = self.rng.below(4096);
            let slot = &mut self.reactors[index];
            if slow == 0 {
                // The host runs something else on this core.
                slot.stalled_until = now + Duration::from_nanos(self.rng.below(8_000_000));
                trace::event("stall", index as u64, slot.stalled_until.0, 0);
            }
            if slot.stalled_until > now {
                continue;
            }
            if let Some(deadline) = slot.asleep {
                if !slot.flags.is_woken() && deadline.is_none_or(|deadline| deadline > now) {
                    continue;
                }
                slot.asleep = None;
                slot.reactor.context().waker().retract();
                slot.flags.clear_wakes();
            }
            if slow % 8 == 1 {
                // The others are faster.
                self.spinning = true;
                continue;
            }
            if slot.reactor.step().is_busy() {
                busy = true;
            } else if self.config.sleeps {
                self.spinning |= !slot.fall_asleep(now);
            }
        }
        busy
    }

    fn run_tasks(&mut self) -> bool {
        let spawned = std::mem::take(&mut *self.tasks.spawned.lock().unwrap_or_else(PoisonError::into_inner));
        spawned.into_iter().for_each(|task| self.start_task(task));
        let mut busy = false;
        let woken = |running: &Running| running.woken.0.swap(false, Ordering::AcqRel);
        let due: Vec<u64> = self.running.iter().filter(|(_, running)| woken(running)).map(|(id, _)| *id).collect();
        for id in due {
            busy = true;
            let Some(mut running) = self.running.remove(&id) else { continue };
            let waker = Waker::from(Arc::clone(&running.woken));
            if running.future.as_mut().poll(&mut Task::from_waker(&waker)).is_pending() {
                self.running.insert(id, running);
            }
        }
        busy
    }

    /// Nothing is left to do at this instant: the clock jumps to the next.
    fn jump(&mut self) {
        let now = self.view.sim.now();
        let sleepers = self.reactors.iter().filter_map(|slot| match slot.asleep {
            // Whatever has happened meanwhile, it is seen then.
            _ if slot.stalled_until > now => Some(slot.stalled_until),
            Some(deadline) => deadline,
            None => slot.reactor.next_deadline(),
        });
        // One that has passed has been seen: there was nothing to do.
        let actors = self.actors.iter().filter_map(|actor| actor.borrow().deadline()).filter(|&at| at > now);
        let next = sleepers.chain(actors).chain(self.view.sim.next_event()).min();
        if self.spinning {
            // It may find something at any moment, so time goes by in steps; but ever longer ones.
            self.spins += 1;
            let step = 1_000 << (self.spins / 64).min(14);
            let step = next.map_or(step, |next| step.min(next.nanos_since(now)));
            self.view.sim.advance(step);
            return;
        }
        match next {
            Some(next) if next > now => {
                self.view.sim.advance(next.0 - now.0);
            }
            Some(_) => {}
            None => self.idle = true,
        }
    }

    /// Runs until `is_done`.
    ///
    /// # Panics
    /// When nothing will ever happen any more and it is not, or it takes too long.
    pub fn run_until(&mut self, what: &str, mut is_done: impl FnMut(&mut World) -> bool) {
        let began = self.rounds;
        while !is_done(self) {
            self.round();
            assert!(!self.idle || is_done(self), "nothing will ever end this: {what}; {}", self.describe());
            assert!(
                self.rounds - began < self.config.rounds / 2,
                "still waiting after {} rounds: {what}; {}",
                self.rounds - began,
                self.describe()
            );
        }
    }

    /// Runs a task of the control plane to its end.
    ///
    /// # Panics
    /// As [`World::run_until`].
    pub fn block_on<R: 'static>(&mut self, what: &str, future: impl Future<Output = R> + 'static) -> R {
        let outcome = self.spawn(future);
        let mut result = None;
        self.run_until(what, |_| {
            result = outcome.take();
            result.is_some()
        });
        result.expect("it has just been set")
    }

    /// Lets time pass.
    pub fn run_for(&mut self, duration: Duration) {
        let until = self.view.sim.now() + duration;
        self.view.sim.timer(until, Waker::noop().clone());
        self.run_until("time to pass", |world| world.view.sim.now() >= until);
    }

    /// Checks that everything lent has come back: no I/O, channel, buffer or task is out.
    ///
    /// # Panics
    /// When something is still out.
    pub fn assert_clean(&mut self) {
        self.run_until("everything to come to rest", |world| {
            world.running.is_empty()
                && world.lone_reactors() == 0
                && (0..world.config.reactors).all(|n| {
                    let runtime = world.runtime(n);
                    let mut runtime = runtime.borrow_mut();
                    runtime.is_quiet() && runtime.pool().is_whole() && runtime.channel_refs().is_empty()
                })
        });
        for n in 0..self.config.reactors {
            self.runtime(n).borrow().assert_whole();
        }
    }

    /// What everybody is doing.
    pub fn describe(&mut self) -> String {
        let now = self.view.sim.now();
        let mut out = format!("{} rounds, {} tasks of the control plane", self.rounds, self.running.len());
        for n in 0..self.reactors.len() {
            let slot = &self.reactors[n];
            let state = match slot.asleep {
                Some(None) => "asleep".to_string(),
                Some(Some(until)) => format!("asleep for {} ns", until.nanos_since(now)),
                None if slot.stalled_until > now => "stalled".to_string(),
                None => "awake".to_string(),
            };
            if n >= self.config.reactors {
                out.push_str(&format!("\n  reactor beside the group: {state}"));
                continue;
            }
            let runtime = self.runtime(n);
            let mut runtime = runtime.borrow_mut();
            let (quiet, refs) = (runtime.is_quiet(), runtime.channel_refs());
            out.push_str(&format!("\n  reactor {n}: {state}, quiet {quiet}, channels {refs:?}, {:?}", runtime.pool()));
        }
        for actor in &self.actors {
            match actor.try_borrow() {
                Ok(actor) => out.push_str(&format!("\n  {}", actor.describe())),
                Err(_) => out.push_str("\n  (an actor that is acting)"),
            }
        }
        out
    }

    /// Switches the machine off without any farewell and on again: everything is dropped where it stands, and the disks
    /// keep what they keep.
    pub fn power_cycle(self, seed: u64) -> Arc<Sim> {
        let next = self.view.sim.power_cycle(seed);
        drop(self);
        next
    }
}

impl Slot {
    /// As a reactor that runs on its own thread does it; whether it sleeps now.
    fn fall_asleep(&mut self, now: Instant) -> bool {
        let deadline = self.reactor.next_deadline();
        if deadline.is_some_and(|deadline| deadline <= now) {
            return false;
        }
        let waker = self.reactor.context().waker();
        waker.announce();
        if self.reactor.may_sleep() {
            self.asleep = Some(deadline);
            return true;
        }
        waker.retract();
        false
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").field("reactors", &self.reactors.len()).finish_non_exhaustive()
    }
}
