//! Reactors, control plane and clock on one thread.
//!
//! [`World::step`] steps every reactor once, in an order drawn from the seed, polls the control plane's tasks, and lets
//! the clock advance. Nothing happens between steps, so a check may look at anything.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context as Task, Poll, Waker};
use std::time::Duration;

use futures_util::future::BoxFuture;
use reactor::buffer::{PoolConfig, Region};
use reactor::file::{EngineChoice, FileEngine, Files};
use reactor::net::Network;
use reactor::park::Parker;
use reactor::platform::OsPlatform;
use reactor::reactor::{LoneReactor, PollPolicy, ReactorConfig};
use reactor::{Clock, Context, Instant, Platform, Reactor, ReactorId};

use super::rng::Rng;
use crate::core::runtime::SharedRuntime;
use crate::core::system::Executor;
use crate::core::{BdevSystem, IoRuntime, RuntimeConfig};

/// How long the host may take before a world that waits for it gives up.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a world is made of.
#[derive(Clone, Copy, Debug)]
pub struct WorldConfig {
    /// Reactors.
    pub reactors: usize,
    /// I/Os in each reactor's pool.
    pub io_pool: usize,
    /// Payload memory of each reactor.
    pub buffers: PoolConfig,
    /// Decides everything random.
    pub seed: u64,
}

impl Default for WorldConfig {
    fn default() -> Self {
        let buffers = PoolConfig { small: 64, medium: 16, large: 16 };
        WorldConfig { reactors: 2, io_pool: 64, buffers, seed: 0 }
    }
}

/// A clock that stands still until it is advanced.
#[derive(Debug)]
pub struct VirtualClock(AtomicU64);

impl Default for VirtualClock {
    fn default() -> Self {
        VirtualClock(AtomicU64::new(1))
    }
}

impl VirtualClock {
    /// Advances it.
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(u64::try_from(by.as_nanos()).unwrap_or(u64::MAX), Ordering::AcqRel);
    }
}

impl Clock for VirtualClock {
    fn now(&self) -> Instant {
        Instant(self.0.load(Ordering::Acquire))
    }
}

/// The host's files and threads under a virtual clock and seeded random numbers.
struct HostUnderVirtualClock {
    host: OsPlatform,
    clock: Arc<VirtualClock>,
    rng: Mutex<Rng>,
}

impl Platform for HostUnderVirtualClock {
    fn clock(&self) -> Arc<dyn Clock> {
        Arc::clone(&self.clock) as Arc<dyn Clock>
    }

    fn network(&self) -> Arc<dyn Network> {
        self.host.network()
    }

    fn files(&self) -> Arc<dyn Files> {
        self.host.files()
    }

    fn parker(&self) -> io::Result<Box<dyn Parker>> {
        self.host.parker()
    }

    fn file_engine(&self, region: Region, parker: &mut dyn Parker) -> io::Result<Box<dyn FileEngine>> {
        self.host.file_engine(region, parker)
    }

    fn random(&self, bytes: &mut [u8]) {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner).fill(bytes);
    }

    fn pin(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
}

/// Tasks of the control plane, polled between steps.
struct Tasks {
    clock: Arc<dyn Clock>,
    spawned: Mutex<Vec<BoxFuture<'static, ()>>>,
    /// Reactors beside the group that have not begun.
    starting: Mutex<Vec<LoneReactor>>,
}

impl Executor for Tasks {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        self.spawned.lock().unwrap_or_else(PoisonError::into_inner).push(task);
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let clock = Arc::clone(&self.clock);
        let until = clock.now() + duration;
        // Tasks are polled at every step, so nobody needs to be woken.
        Box::pin(std::future::poll_fn(move |_| if clock.now() >= until { Poll::Ready(()) } else { Poll::Pending }))
    }

    fn start_reactor(&self, reactor: LoneReactor, _: &Arc<dyn Platform>) -> io::Result<()> {
        self.starting.lock().unwrap_or_else(PoisonError::into_inner).push(reactor);
        Ok(())
    }
}

/// A task of the control plane that was started.
#[derive(Debug)]
pub struct Started<R>(Arc<Mutex<Option<R>>>);

impl<R> Started<R> {
    /// Whether it has not ended.
    pub fn is_pending(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Its result, if it has ended.
    pub fn take(&self) -> Option<R> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Reactors, control plane and clock on one thread.
pub struct World {
    reactors: Vec<Reactor>,
    /// Reactors beside the group.
    lone: Vec<Reactor>,
    system: Arc<BdevSystem>,
    tasks: Arc<Tasks>,
    running: Vec<BoxFuture<'static, ()>>,
    rng: Rng,
    /// Called after each step with whether anything was done in it.
    after_step: Box<dyn FnMut(bool)>,
    /// The clock, where it is this world's own.
    clock: Option<Arc<VirtualClock>>,
}

impl World {
    /// A world on `platform`, whose clock `after_step` advances; it is told whether the step found work.
    ///
    /// # Panics
    /// When the platform has no memory or engine for the reactors.
    pub fn new(platform: Arc<dyn Platform>, config: WorldConfig, after_step: Box<dyn FnMut(bool)>) -> World {
        let mut reactors: Vec<Reactor> = (0..config.reactors as u32)
            .map(|id| {
                let config = ReactorConfig { id: ReactorId(id), core: None, policy: PollPolicy::Busy };
                Reactor::new(config, Arc::clone(&platform)).expect("a reactor can be made")
            })
            .collect();
        let group: Vec<_> = reactors.iter().map(Reactor::handle).collect();
        let runtime = RuntimeConfig { io_pool: config.io_pool, buffers: config.buffers };
        for reactor in &mut reactors {
            reactor.join_group(group.clone());
            IoRuntime::install(reactor.context(), runtime).expect("the bdev layer can be installed");
        }
        let tasks = Arc::new(Tasks { clock: platform.clock(), spawned: Mutex::default(), starting: Mutex::default() });
        let system = BdevSystem::new(group, platform, Arc::clone(&tasks) as Arc<dyn Executor>);
        World {
            reactors,
            lone: Vec::new(),
            system,
            tasks,
            running: Vec::new(),
            rng: Rng::new(config.seed ^ 0x5afe),
            after_step,
            clock: None,
        }
    }

    /// A world with a virtual clock and the host's files, done by `engine`. Each step takes a microsecond.
    pub fn on_host(engine: EngineChoice, config: WorldConfig) -> World {
        let clock = Arc::new(VirtualClock::default());
        let platform = HostUnderVirtualClock {
            host: OsPlatform::new(engine),
            clock: Arc::clone(&clock),
            rng: Mutex::new(Rng::new(config.seed)),
        };
        let own = Arc::clone(&clock);
        let after_step = move |busy: bool| {
            clock.advance(Duration::from_micros(1));
            if !busy {
                std::thread::yield_now();
            }
        };
        let world = World::new(Arc::new(platform), config, Box::new(after_step));
        World { clock: Some(own), ..world }
    }

    /// Advances the clock of a world made by [`World::on_host`].
    ///
    /// # Panics
    /// If the clock is somebody else's.
    pub fn pass_time(&mut self, time: Duration) {
        self.clock.as_ref().expect("the clock is this world's own").advance(time);
    }

    /// The bdev layer's control plane.
    pub fn system(&self) -> &Arc<BdevSystem> {
        &self.system
    }

    /// Number of reactors.
    pub fn reactor_count(&self) -> usize {
        self.reactors.len()
    }

    /// A reactor's context, between steps.
    pub fn context(&mut self, reactor: usize) -> &mut Context {
        self.reactors[reactor].context()
    }

    /// A reactor's part of the bdev layer.
    pub fn runtime(&mut self, reactor: usize) -> SharedRuntime {
        IoRuntime::of(self.context(reactor))
    }

    /// Steps every reactor once, in random order, and the control plane.
    pub fn step(&mut self) {
        let first = self.rng.below(self.reactors.len() as u64) as usize;
        let mut busy = false;
        for n in 0..self.reactors.len() {
            let index = (first + n) % self.reactors.len();
            busy |= self.reactors[index].step().is_busy();
        }
        busy |= self.step_lone();
        self.running.append(&mut self.tasks.spawned.lock().unwrap_or_else(PoisonError::into_inner));
        let mut task = Task::from_waker(Waker::noop());
        self.running.retain_mut(|running| running.as_mut().poll(&mut task).is_pending());
        (self.after_step)(busy);
    }

    /// Begins and steps the reactors beside the group; about one in four is passed over, as its thread might be.
    fn step_lone(&mut self) -> bool {
        let starting = std::mem::take(&mut *self.tasks.starting.lock().unwrap_or_else(PoisonError::into_inner));
        let mut busy = !starting.is_empty();
        self.lone.extend(starting.into_iter().filter_map(|lone| lone.build(self.system.platform())));
        for reactor in &mut self.lone {
            if !self.rng.one_in(4) {
                busy |= reactor.step().is_busy();
            }
        }
        self.lone.retain(|reactor| !reactor.is_stopping());
        busy
    }

    /// Reactors beside the group that have not stopped.
    pub fn lone_reactors(&self) -> usize {
        self.lone.len()
    }

    /// Steps until `is_done`.
    ///
    /// # Panics
    /// When that has not happened after the host was given two minutes.
    pub fn step_until(&mut self, what: &str, mut is_done: impl FnMut(&mut World) -> bool) {
        let began = std::time::Instant::now();
        while !is_done(self) {
            self.step();
            assert!(began.elapsed() < PATIENCE, "still waiting: {what}");
        }
    }

    /// Runs a task of the control plane to its end.
    ///
    /// # Panics
    /// As [`World::step_until`].
    pub fn block_on<R>(&mut self, future: impl Future<Output = R>) -> R {
        let mut future = pin!(future);
        let mut result = None;
        self.step_until("a task of the control plane", |_| {
            let mut task = Task::from_waker(Waker::noop());
            match future.as_mut().poll(&mut task) {
                Poll::Ready(value) => result = Some(value),
                Poll::Pending => {}
            }
            result.is_some()
        });
        result.expect("it has just been set")
    }

    /// Starts a task of the control plane, which goes on at every step.
    pub fn start<R: Send + 'static>(&mut self, task: impl Future<Output = R> + Send + 'static) -> Started<R> {
        let result = Arc::new(Mutex::new(None));
        let started = Started(Arc::clone(&result));
        self.tasks.spawn(Box::pin(async move {
            let value = task.await;
            *result.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
        }));
        started
    }

    /// Steps until nothing is outstanding anywhere.
    pub fn settle(&mut self) {
        self.step_until("I/O to end", |world| (0..world.reactors.len()).all(|n| world.runtime(n).borrow().is_quiet()));
    }

    /// Checks that everything lent has come back: no channel, no I/O, no buffer is out, and no task or reactor beside the
    /// group is left.
    ///
    /// # Panics
    /// When something is still out.
    pub fn assert_clean(&mut self) {
        self.step_until("messages between reactors and tasks to end", |world| {
            let quiet = (0..world.reactors.len()).all(|n| !world.reactors[n].step().is_busy());
            quiet && world.running.is_empty() && world.lone.is_empty()
        });
        for n in 0..self.reactors.len() {
            let runtime = self.runtime(n);
            let mut runtime = runtime.borrow_mut();
            assert!(runtime.is_quiet(), "reactor {n}: I/O is outstanding");
            let refs = runtime.channel_refs();
            assert!(refs.is_empty(), "reactor {n}: channels are open: {refs:?}");
            assert!(runtime.pool().is_whole(), "reactor {n}: buffers are out: {:?}", runtime.pool());
            runtime.assert_whole();
        }
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").field("reactors", &self.reactors.len()).finish_non_exhaustive()
    }
}
