//! The loop: one thread, its pollers, its mailbox, its sleep.
//!
//! ```text
//! step:  readiness -> messages -> pollers -> (adds and removes)      never blocks
//! run:   step; nothing to do for `spin`? -> announce, look again, sleep until woken or the next deadline
//! ```
//!
//! A reactor is *busy* in a step when any poller says so or a message ran. Under [`PollPolicy::Adaptive`] it keeps
//! stepping for a bounded time after the last busy step and then sleeps; `Busy` never sleeps; `Sleep` sleeps at the
//! first idle step. The simulator calls [`Reactor::step`] itself and asks [`Reactor::next_deadline`] how far it may
//! advance the clock.

mod load;
mod threads;

use std::any::{Any, TypeId};
use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use slab::Slab;

use crate::file::ENGINE_TOKEN;
use crate::mailbox::{Full, Mailbox, Message};
use crate::park::{Parker, Ready, Source, Waker};
use crate::platform::Platform;
use crate::time::{Clock, Instant};

pub use load::{FULL_LOAD, LOAD_WINDOW};
use load::{Gauge, Load};
pub use threads::{Begin, LoneReactor, ReactorThreads};

/// Index of a reactor in its group, from zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReactorId(pub u32);

thread_local! {
    static CURRENT: Cell<u32> = const { Cell::new(u32::MAX) };
}

/// The reactor that is stepping on this thread, if any.
#[inline]
pub fn current() -> Option<ReactorId> {
    let id = CURRENT.get();
    (id != u32::MAX).then_some(ReactorId(id))
}

/// Marks the thread as running a reactor for the length of a step.
struct Entered(u32);

impl Entered {
    fn new(id: ReactorId) -> Entered {
        Entered(CURRENT.replace(id.0))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

/// Whether a poll found work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Something was done.
    Busy,
    /// There was nothing to do.
    Idle,
}

impl Progress {
    /// `Busy` if `busy`.
    pub fn from_busy(busy: bool) -> Progress {
        if busy { Progress::Busy } else { Progress::Idle }
    }

    /// Whether something was done.
    pub fn is_busy(self) -> bool {
        self == Progress::Busy
    }
}

/// When a poller runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// At every step.
    Active,
    /// Once a period.
    Every(Duration),
}

/// Work that a reactor does again and again.
pub trait Poller {
    /// Does what there is to do, without blocking.
    fn poll(&mut self, cx: &mut Context) -> Progress;

    /// A source watched by this poller under `key` became ready. Called before `poll` in the same step; it should only
    /// take note.
    fn ready(&mut self, key: u64, ready: Ready) {
        let _ = (key, ready);
    }

    /// The instant at which this poller wants to run even if nothing wakes the reactor.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// The reactor is about to sleep. Look once more for work that no watched source announces (rings), arm what has to
    /// be armed; `false` means that there is work and the reactor must not sleep.
    fn may_sleep(&mut self, cx: &mut Context) -> bool {
        let _ = cx;
        true
    }
}

/// Names one poller of one reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PollerId(pub u64);

/// Names one watch of one reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchId(usize);

/// When a reactor spins and when it sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollPolicy {
    /// Spins for `spin` after the last work, then sleeps.
    Adaptive {
        /// How long.
        spin: Duration,
    },
    /// Never sleeps.
    Busy,
    /// Sleeps whenever there is nothing to do.
    Sleep,
    /// Looks for work every `gap` and does what has come together, which costs far less processor time a piece than doing each
    /// when it comes, and makes it wait for `gap` at most (and what the host's timer adds). Sleeps when nothing has come for
    /// [`LINGER`].
    Coalesce {
        /// How long.
        gap: Duration,
    },
}

/// How long a reactor that coalesces goes on looking after its last work.
pub const LINGER: Duration = Duration::from_millis(1);

impl Default for PollPolicy {
    /// Adaptive: 200 µs covers the turn-around of a depth-one load over a local network.
    fn default() -> Self {
        PollPolicy::Adaptive { spin: Duration::from_micros(200) }
    }
}

/// How to build one reactor.
#[derive(Clone, Copy, Debug)]
pub struct ReactorConfig {
    /// Index in the group.
    pub id: ReactorId,
    /// The core to pin to; `None` leaves the thread where it is.
    pub core: Option<usize>,
    /// Spinning and sleeping.
    pub policy: PollPolicy,
}

/// A future that may be awaited on any thread.
pub type BoxFuture<T> = std::pin::Pin<Box<dyn Future<Output = T> + Send>>;

/// Reaches one reactor from any thread.
#[derive(Clone, Debug)]
pub struct ReactorHandle {
    id: ReactorId,
    core: Option<usize>,
    mailbox: Mailbox,
    load: Load,
}

/// A reactor went away before it answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the reactor has stopped")
    }
}

impl std::error::Error for Gone {}

impl ReactorHandle {
    /// Which reactor this reaches.
    pub fn id(&self) -> ReactorId {
        self.id
    }

    /// The core it is pinned to.
    pub fn core(&self) -> Option<usize> {
        self.core
    }

    /// How busy it was of late: the share of the last [`LOAD_WINDOW`] in which its steps found work, up to [`FULL_LOAD`]. Does not
    /// wake it.
    pub fn load(&self, now: Instant) -> u32 {
        self.load.share(now)
    }

    /// Queues `message` to run on the reactor.
    ///
    /// # Errors
    /// [`Full`], with the message, when the mailbox has no room.
    pub fn send(&self, message: Message) -> Result<(), Full> {
        self.mailbox.send(message)
    }

    /// Runs `work` on the reactor and returns its result. Waits while the mailbox is full. Must not be awaited on the
    /// reactor itself.
    ///
    /// # Errors
    /// [`Gone`] when the reactor stopped before it ran `work`.
    pub fn call<R, F>(&self, work: F) -> BoxFuture<Result<R, Gone>>
    where
        R: Send + 'static,
        F: FnOnce(&mut Context) -> R + Send + 'static,
    {
        self.call_deferred(move |cx, reply| reply.send(work(cx)))
    }

    /// As [`ReactorHandle::call`], for work that answers later: `work` gets the reply slot and keeps it until then.
    pub fn call_deferred<R, F>(&self, work: F) -> BoxFuture<Result<R, Gone>>
    where
        R: Send + 'static,
        F: FnOnce(&mut Context, Reply<R>) + Send + 'static,
    {
        let (sender, receiver) = futures_channel::oneshot::channel();
        let mut pending: Option<Message> = Some(Box::new(move |cx: &mut Context| work(cx, Reply(sender))));
        let mailbox = self.mailbox.clone();
        Box::pin(async move {
            std::future::poll_fn(move |task| match pending.take().map(|message| mailbox.send(message)) {
                Some(Err(Full(message))) => {
                    pending = Some(message);
                    task.waker().wake_by_ref();
                    Poll::Pending
                }
                _ => Poll::Ready(()),
            })
            .await;
            receiver.await.map_err(|_| Gone)
        })
    }

    /// Asks the reactor to stop after its present step.
    pub fn stop(&self) {
        let mut message: Message = Box::new(|cx: &mut Context| cx.stopping = true);
        while let Err(Full(back)) = self.mailbox.send(message) {
            message = back;
            std::thread::yield_now();
        }
    }
}

/// Where deferred work puts its answer. Dropping it unanswered tells the caller [`Gone`].
#[derive(Debug)]
pub struct Reply<R>(futures_channel::oneshot::Sender<R>);

impl<R> Reply<R> {
    /// Answers. A caller who no longer waits is not an error.
    pub fn send(self, value: R) {
        let _ = self.0.send(value);
    }
}

/// What the work on a reactor can reach.
pub struct Context {
    id: ReactorId,
    now: Instant,
    clock: Arc<dyn Clock>,
    platform: Arc<dyn Platform>,
    parker: Box<dyn Parker>,
    waker: Waker,
    mailbox: Mailbox,
    group: Arc<OnceLock<Vec<ReactorHandle>>>,
    watches: Slab<(PollerId, u64, Source)>,
    extensions: HashMap<TypeId, Rc<dyn Any>>,
    added: Vec<PollerEntry>,
    removed: Vec<PollerId>,
    next_poller: u64,
    stopping: bool,
    counters: Counters,
    poller_stats: Vec<PollerStats>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    busy_ns: u64,
    idle_ns: u64,
    asleep_ns: u64,
    sleeps: u64,
    messages: u64,
}

impl Context {
    /// The reactor that this is.
    pub fn id(&self) -> ReactorId {
        self.id
    }

    /// The instant at which this step began. Reading it costs nothing.
    #[inline]
    pub fn now(&self) -> Instant {
        self.now
    }

    /// Reads the clock.
    pub fn read_clock(&self) -> Instant {
        self.clock.now()
    }

    /// The outside world.
    pub fn platform(&self) -> &Arc<dyn Platform> {
        &self.platform
    }

    /// What wakes this reactor.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// What reaches this reactor.
    pub fn handle(&self) -> ReactorHandle {
        self.group()[self.id.0 as usize].clone()
    }

    /// All reactors of the group, by index.
    ///
    /// # Panics
    /// If the group has not been formed yet (before [`form_group`]).
    pub fn group(&self) -> &[ReactorHandle] {
        self.group.get().expect("the group of reactors is formed before they run")
    }

    /// The readiness set, for engines that bring descriptors of their own.
    pub fn parker(&mut self) -> &mut dyn Parker {
        &mut *self.parker
    }

    /// Has the reactor stop after its present step.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Reports readiness of `source` to `poller` under `key`.
    ///
    /// # Errors
    /// As [`Parker::watch`].
    pub fn watch(&mut self, poller: PollerId, source: Source, key: u64) -> io::Result<WatchId> {
        let index = self.watches.insert((poller, key, source));
        match self.parker.watch(source, index as u64) {
            Ok(()) => Ok(WatchId(index)),
            Err(error) => {
                self.watches.remove(index);
                Err(error)
            }
        }
    }

    /// Ends a watch. Must happen before the source is closed.
    pub fn unwatch(&mut self, watch: WatchId) {
        let (_, _, source) = self.watches.remove(watch.0);
        self.parker.unwatch(source);
    }

    /// Has edges of `source` end this reactor's sleep, and nothing else: no poller is told of them, and while the reactor
    /// is awake the host is not asked for them. For doorbells, whose news lie in memory that pollers look at anyway.
    ///
    /// # Errors
    /// As [`Parker::watch`].
    pub fn wake_by(&mut self, source: Source) -> io::Result<()> {
        self.parker.watch(source, DOORBELL_TOKEN)
    }

    /// Ends what [`Context::wake_by`] began. Must happen before the source is closed.
    pub fn unwake_by(&mut self, source: Source) {
        self.parker.unwatch(source);
    }

    /// Adds a poller; it first runs in the next step.
    pub fn add_poller(&mut self, name: impl Into<String>, schedule: Schedule, poller: Box<dyn Poller>) -> PollerId {
        let id = self.reserve_poller();
        self.add_reserved_poller(id, name, schedule, poller);
        id
    }

    /// Draws an identifier for a poller that has to know it before it is added.
    pub fn reserve_poller(&mut self) -> PollerId {
        self.next_poller += 1;
        PollerId(self.next_poller)
    }

    /// Adds a poller under an identifier from [`Context::reserve_poller`].
    pub fn add_reserved_poller(
        &mut self,
        id: PollerId,
        name: impl Into<String>,
        schedule: Schedule,
        poller: Box<dyn Poller>,
    ) {
        let due = match schedule {
            Schedule::Active => None,
            Schedule::Every(period) => Some(self.now + period),
        };
        let stats = PollerStats { id, name: name.into(), schedule, run_count: 0, busy_count: 0 };
        self.added.push(PollerEntry { poller, due, stats });
    }

    /// Removes a poller after this step. It is dropped on this reactor.
    pub fn remove_poller(&mut self, id: PollerId) {
        self.removed.push(id);
    }

    /// Puts a value where later work on this reactor finds it by its type.
    pub fn insert<T: 'static>(&mut self, value: T) -> Rc<T> {
        let value = Rc::new(value);
        self.extensions.insert(TypeId::of::<T>(), Rc::clone(&value) as Rc<dyn Any>);
        value
    }

    /// The value of type `T` that was inserted.
    pub fn get<T: 'static>(&self) -> Option<Rc<T>> {
        self.extensions.get(&TypeId::of::<T>()).and_then(|value| Rc::clone(value).downcast().ok())
    }

    /// Removes the value of type `T`.
    pub fn take<T: 'static>(&mut self) -> Option<Rc<T>> {
        self.extensions.remove(&TypeId::of::<T>()).and_then(|value| value.downcast().ok())
    }

    /// True numbers of this reactor as of the end of its last step.
    pub fn stats(&self) -> ReactorStats {
        ReactorStats {
            id: self.id,
            core: self.group.get().and_then(|g| g[self.id.0 as usize].core),
            busy_ns: self.counters.busy_ns,
            idle_ns: self.counters.idle_ns,
            asleep_ns: self.counters.asleep_ns,
            sleeps: self.counters.sleeps,
            messages: self.counters.messages,
            os_thread_id: u64::from(rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs()),
            pollers: self.poller_stats.clone(),
        }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("id", &self.id).field("now", &self.now).finish_non_exhaustive()
    }
}

/// What one poller has done.
#[derive(Clone, Debug)]
pub struct PollerStats {
    /// Its identifier.
    pub id: PollerId,
    /// Its name.
    pub name: String,
    /// When it runs.
    pub schedule: Schedule,
    /// How often it ran.
    pub run_count: u64,
    /// How often it found work.
    pub busy_count: u64,
}

/// What one reactor has done. Times are nanoseconds; sleeping counts as idle too.
#[derive(Clone, Debug)]
pub struct ReactorStats {
    /// Which reactor.
    pub id: ReactorId,
    /// Its core.
    pub core: Option<usize>,
    /// Time in steps that found work.
    pub busy_ns: u64,
    /// Time in steps that found none, and asleep.
    pub idle_ns: u64,
    /// Time asleep.
    pub asleep_ns: u64,
    /// How often it slept.
    pub sleeps: u64,
    /// Messages run.
    pub messages: u64,
    /// The host's identifier of its thread.
    pub os_thread_id: u64,
    /// Its pollers.
    pub pollers: Vec<PollerStats>,
}

struct PollerEntry {
    poller: Box<dyn Poller>,
    due: Option<Instant>,
    stats: PollerStats,
}

/// What [`Context::wake_by`] watches under.
const DOORBELL_TOKEN: u64 = ENGINE_TOKEN - 1;
/// Messages run in one step at most, so that a flood of them cannot starve I/O.
const MESSAGES_PER_STEP: usize = 64;
/// Steps between copies of the pollers' counters to where messages can read them.
const STATS_EVERY: u32 = 1024;

/// One reactor. Lives on its thread.
pub struct Reactor {
    cx: Context,
    pollers: Vec<PollerEntry>,
    ready: Vec<Ready>,
    policy: PollPolicy,
    core: Option<usize>,
    last_busy: Instant,
    was_busy: bool,
    /// What is ready was seen at the end of the sleep that this step follows.
    looked: bool,
    steps: u32,
    gauge: Gauge,
}

impl Reactor {
    /// Builds a reactor on the calling thread.
    ///
    /// # Errors
    /// When the platform cannot give it a place to sleep.
    pub fn new(config: ReactorConfig, platform: Arc<dyn Platform>) -> io::Result<Reactor> {
        let clock = platform.clock();
        let parker = platform.parker()?;
        let waker = Waker::new(parker.unparker());
        let now = clock.now();
        let cx = Context {
            id: config.id,
            now,
            clock,
            platform,
            parker,
            mailbox: Mailbox::new(waker.clone()),
            waker,
            group: Arc::default(),
            watches: Slab::new(),
            extensions: HashMap::new(),
            added: Vec::new(),
            removed: Vec::new(),
            next_poller: 0,
            stopping: false,
            counters: Counters::default(),
            poller_stats: Vec::new(),
        };
        Ok(Reactor {
            cx,
            pollers: Vec::new(),
            ready: Vec::new(),
            policy: config.policy,
            core: config.core,
            last_busy: now,
            was_busy: false,
            looked: false,
            steps: 0,
            gauge: Gauge::new(now),
        })
    }

    /// What reaches this reactor.
    pub fn handle(&self) -> ReactorHandle {
        ReactorHandle { id: self.cx.id, core: self.core, mailbox: self.cx.mailbox.clone(), load: self.gauge.reader() }
    }

    /// Tells this reactor of its group.
    ///
    /// # Panics
    /// If it was told before, or is not at its own index.
    pub fn join_group(&mut self, group: Vec<ReactorHandle>) {
        assert_eq!(group[self.cx.id.0 as usize].id, self.cx.id, "reactors are listed by index");
        assert!(self.cx.group.set(group).is_ok(), "a reactor joins one group");
    }

    /// The reactor's context, for setting it up before it runs.
    pub fn context(&mut self) -> &mut Context {
        &mut self.cx
    }

    /// Whether it was asked to stop.
    pub fn is_stopping(&self) -> bool {
        self.cx.stopping
    }

    /// One round of everything. Never blocks. Returns whether there was work.
    pub fn step(&mut self) -> Progress {
        let _entered = Entered::new(self.cx.id);
        let now = self.cx.clock.now();
        let passed = now.nanos_since(self.cx.now);
        let counter = if self.was_busy { &mut self.cx.counters.busy_ns } else { &mut self.cx.counters.idle_ns };
        *counter += passed;
        self.cx.now = now;
        self.gauge.observe(now, self.cx.counters.busy_ns);
        if !std::mem::take(&mut self.looked) && !self.cx.watches.is_empty() {
            self.look(Some(Duration::ZERO));
        }
        let mut busy = self.run_messages();
        busy |= self.run_pollers();
        self.apply_changes();
        self.steps = self.steps.wrapping_add(1);
        if self.steps.is_multiple_of(STATS_EVERY) || !busy && self.was_busy {
            self.publish_stats();
        }
        self.was_busy = busy;
        if busy {
            self.last_busy = now;
        }
        Progress::from_busy(busy)
    }

    fn look(&mut self, timeout: Option<Duration>) {
        debug_assert!(self.ready.is_empty());
        if let Err(error) = self.cx.parker.wait(timeout, &mut self.ready) {
            // Only a broken descriptor table can do this; without readiness the reactor would hang unnoticed.
            panic!("reactor {}: waiting for readiness failed: {error}", self.cx.id.0);
        }
        for ready in self.ready.drain(..) {
            if ready.token == ENGINE_TOKEN || ready.token == DOORBELL_TOKEN {
                continue;
            }
            // A watch that ended within this batch leaves a stale report behind.
            let Some(&(poller, key, _)) = self.cx.watches.get(ready.token as usize) else {
                continue;
            };
            if let Some(entry) = self.pollers.iter_mut().find(|entry| entry.stats.id == poller) {
                entry.poller.ready(key, ready);
            } else if let Some(entry) = self.cx.added.iter_mut().find(|entry| entry.stats.id == poller) {
                entry.poller.ready(key, ready);
            }
        }
    }

    fn run_messages(&mut self) -> bool {
        for n in 0..MESSAGES_PER_STEP {
            let Some(message) = self.cx.mailbox.pop() else {
                return n > 0;
            };
            self.publish_stats();
            self.cx.counters.messages += 1;
            message(&mut self.cx);
        }
        true
    }

    fn run_pollers(&mut self) -> bool {
        let mut busy = false;
        for entry in &mut self.pollers {
            if let (Some(due), Schedule::Every(period)) = (entry.due, entry.stats.schedule) {
                if due > self.cx.now {
                    continue;
                }
                entry.due = Some(self.cx.now + period);
            }
            entry.stats.run_count += 1;
            if entry.poller.poll(&mut self.cx).is_busy() {
                entry.stats.busy_count += 1;
                busy = true;
            }
        }
        busy
    }

    fn apply_changes(&mut self) {
        if self.cx.added.is_empty() && self.cx.removed.is_empty() {
            return;
        }
        self.pollers.append(&mut self.cx.added);
        for id in std::mem::take(&mut self.cx.removed) {
            self.pollers.retain(|entry| entry.stats.id != id);
        }
        self.publish_stats();
    }

    /// Done each time that there is nothing to do any more, so names are copied only when pollers have come or gone.
    fn publish_stats(&mut self) {
        let published = &mut self.cx.poller_stats;
        let same = published.len() == self.pollers.len()
            && published.iter().zip(&self.pollers).all(|(published, entry)| published.id == entry.stats.id);
        if same {
            for (published, PollerEntry { stats, .. }) in published.iter_mut().zip(&self.pollers) {
                (published.run_count, published.busy_count) = (stats.run_count, stats.busy_count);
            }
            return;
        }
        self.cx.poller_stats.clear();
        self.cx.poller_stats.extend(self.pollers.iter().map(|entry| entry.stats.clone()));
    }

    /// The earliest instant at which a poller wants to run without being woken.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.pollers.iter().filter_map(|entry| entry.due.into_iter().chain(entry.poller.deadline()).min()).min()
    }

    /// Whether nothing is waiting that a step would do. Part of going to sleep.
    pub fn may_sleep(&mut self) -> bool {
        let _entered = Entered::new(self.cx.id);
        if !self.cx.mailbox.is_empty() || !self.cx.added.is_empty() || self.cx.stopping {
            return false;
        }
        // Every poller is asked, also after one has refused: asking is what arms it.
        let mut may = true;
        for entry in &mut self.pollers {
            may &= entry.poller.may_sleep(&mut self.cx);
        }
        may
    }

    fn sleep(&mut self) {
        let now = self.cx.clock.now();
        let timeout = match self.next_deadline() {
            Some(deadline) if deadline <= now => return,
            deadline => deadline.map(|deadline| deadline.since(now)),
        };
        self.cx.waker.announce();
        if self.may_sleep() {
            self.cx.counters.sleeps += 1;
            self.look(timeout);
            self.looked = true;
        }
        self.cx.waker.retract();
        let slept = self.cx.clock.now();
        self.cx.counters.asleep_ns += slept.nanos_since(now);
        self.last_busy = slept;
    }

    /// Lets work come together for `gap`, or until the next deadline.
    fn pause(&mut self, gap: Duration) {
        let now = self.cx.clock.now();
        let gap = self.next_deadline().map_or(gap, |deadline| deadline.since(now).min(gap));
        self.cx.parker.pause(gap);
        self.cx.counters.asleep_ns += self.cx.clock.now().nanos_since(now);
    }

    /// Runs until stopped. Pinning and sleeping follow the configuration.
    ///
    /// # Errors
    /// When the core cannot be pinned to.
    pub fn run(&mut self) -> io::Result<()> {
        if let Some(core) = self.core {
            self.cx.platform.pin(core)?;
        }
        while !self.cx.stopping {
            if self.step().is_busy() || self.cx.stopping {
                continue;
            }
            match self.policy {
                PollPolicy::Busy => std::hint::spin_loop(),
                PollPolicy::Sleep => self.sleep(),
                PollPolicy::Coalesce { gap } => {
                    if self.cx.now.since(self.last_busy) >= LINGER {
                        self.sleep();
                    } else {
                        self.pause(gap);
                    }
                }
                PollPolicy::Adaptive { spin } => {
                    if self.cx.now.since(self.last_busy) >= spin {
                        self.sleep();
                    } else {
                        std::hint::spin_loop();
                    }
                }
            }
        }
        Ok(())
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        let _entered = Entered::new(self.cx.id);
        // Messages that came too late answer `Gone` by being dropped; pollers go before what they point into.
        self.cx.mailbox.close();
        self.pollers.clear();
        self.cx.added.clear();
        self.cx.extensions.clear();
    }
}

impl fmt::Debug for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor").field("id", &self.cx.id).field("pollers", &self.pollers.len()).finish()
    }
}

#[cfg(test)]
mod tests;
