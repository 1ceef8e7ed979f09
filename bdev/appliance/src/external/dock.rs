//! Target and process in one process, for simulators: the same lanes, rings, workers, sessions and messages, over memory on
//! the heap and without threads.
//!
//! A [`Guest`] stands for the process. It takes one step of its conversation at a time, when it is told to, so that
//! whoever drives it decides between which two messages, or during which requests, it dies. Its workers are reactors that
//! the driver runs; when it is killed they stop where they are: what they had finished and not answered is never answered.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use reactor::Context;
use reactor::park::Waker;
use reactor::reactor::{LoneReactor, PollPolicy};

use super::link::{Bell, Gift, Link, PipeEnd, Relay, pipe};
use super::memory::Memory;
use super::process::{check, geometry};
use super::target::{Control, Target};
use super::wire::{Message, VERSION, Welcome};
use super::worker::{Hung, NewLane, Post, Shell};
use crate::handler::Handler;

/// Where guests of a target come to; see [`Target::docked`].
#[derive(Clone)]
pub struct Dock(Arc<Mutex<Control>>);

impl Dock {
    /// That of `target`; `None` when it listens at a socket.
    pub fn of(target: &Target) -> Option<Dock> {
        target.control().map(|control| Dock(Arc::clone(control)))
    }

    /// Has the target look at what it was told.
    fn poke(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).hear();
    }

    fn connect(&self) -> PipeEnd {
        let [theirs, ours] = pipe();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).connected(Link::Pipe(theirs));
        ours
    }
}

impl std::fmt::Debug for Dock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dock").finish_non_exhaustive()
    }
}

/// What the workers of a guest share with it.
#[derive(Default)]
struct Crew {
    killed: Arc<AtomicBool>,
    begun: AtomicUsize,
    failed: AtomicBool,
    wakers: Mutex<Vec<Waker>>,
}

/// What a guest has heard so far.
enum Phase {
    Connected,
    Welcomed { memory: Arc<Memory>, welcome: Welcome },
    Laned { memory: Arc<Memory>, welcome: Welcome, lanes: Vec<Arc<Relay>> },
    Starting { workers: usize },
    Serving,
    Over,
}

/// A process without a process.
pub struct Guest {
    dock: Dock,
    end: Option<PipeEnd>,
    handler: Arc<dyn Handler>,
    phase: Phase,
    crew: Arc<Crew>,
}

impl Guest {
    /// Connects, and has said nothing yet.
    pub fn connect(dock: &Dock, handler: Arc<dyn Handler>) -> Guest {
        let end = Some(dock.connect());
        Guest { dock: dock.clone(), end, handler, phase: Phase::Connected, crew: Arc::default() }
    }

    /// Says what it is.
    pub fn greet(&self) {
        self.say(Message::Hello { version: VERSION });
    }

    fn say(&self, message: Message) {
        if let Some(end) = &self.end {
            // Where nobody listens any more, that is seen when it listens itself.
            let _ = end.send(message, Gift::Nothing);
        }
        self.dock.poke();
    }

    /// Whether it serves the device.
    pub fn is_serving(&self) -> bool {
        matches!(self.phase, Phase::Serving)
    }

    /// Whether its connection has ended, or it could not do what was asked of it.
    pub fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over)
    }

    /// Takes one step: reads one message and does what it says, or says that it is ready. `start` runs its workers.
    pub fn step(&mut self, start: &mut dyn FnMut(LoneReactor)) {
        if let Phase::Starting { workers } = self.phase {
            if self.crew.failed.load(Ordering::Acquire) {
                self.say(Message::Unable { text: "a worker cannot be made".into() });
                return self.kill();
            }
            if self.crew.begun.load(Ordering::Acquire) == workers {
                self.phase = Phase::Serving;
                self.say(Message::Ready);
            }
            return;
        }
        let Some(end) = &self.end else { return };
        match end.receive() {
            Ok(None) => {}
            Ok(Some((message, gift))) => self.heard(message, gift, start),
            Err(()) => self.kill(),
        }
    }

    fn heard(&mut self, message: Message, gift: Gift, start: &mut dyn FnMut(LoneReactor)) {
        let phase = std::mem::replace(&mut self.phase, Phase::Over);
        self.phase = match (phase, message, gift) {
            (Phase::Connected, Message::Welcome(welcome), Gift::Memory(memory)) => {
                if let Err(error) = self.prepare(&welcome) {
                    self.say(Message::Unable { text: error.to_string() });
                    return self.kill();
                }
                Phase::Welcomed { memory, welcome }
            }
            (Phase::Welcomed { memory, welcome }, Message::Lanes { .. }, Gift::Bells(lanes)) => {
                Phase::Laned { memory, welcome, lanes }
            }
            (Phase::Laned { memory, welcome, lanes }, Message::Workers { .. }, Gift::Bells(bells)) => {
                let workers = bells.len();
                self.start(&memory, &welcome, &lanes, bells, start);
                Phase::Starting { workers }
            }
            (Phase::Serving, Message::Resize { ticket, num_blocks }, _) => {
                let text = self.handler.resize(num_blocks).err().map(|error| error.to_string()).unwrap_or_default();
                self.say(Message::Resized { ticket, text });
                Phase::Serving
            }
            // It was refused, the device is gone, or the target has a bug.
            _ => return self.kill(),
        };
    }

    fn prepare(&self, welcome: &Welcome) -> io::Result<()> {
        check(&self.handler.capabilities(&geometry(welcome)), welcome)?;
        self.handler.resize(welcome.num_blocks)
    }

    fn start(
        &self,
        memory: &Arc<Memory>,
        welcome: &Welcome,
        lanes: &[Arc<Relay>],
        bells: Vec<Arc<Relay>>,
        start: &mut dyn FnMut(LoneReactor),
    ) {
        let bdev: Arc<str> = Arc::from(welcome.bdev.as_str());
        let lane = |(relay, index): (&Arc<Relay>, u32)| NewLane {
            index,
            words: memory.lane(index),
            bell: Bell::Relay(Arc::clone(relay)),
            block_size: welcome.block_size,
            bdev: Arc::clone(&bdev),
        };
        let lanes: Vec<_> = lanes.iter().zip(0..).map(lane).collect();
        let workers = bells.len();
        for (relay, worker) in bells.into_iter().zip(0..) {
            let post = Post { worker, lanes: lanes.clone(), heads: memory.heads(), bell: Hung::Relay(relay) };
            let (crew, handler) = (Arc::clone(&self.crew), Arc::clone(&self.handler));
            let begin = move |cx: io::Result<&mut Context>| {
                let begun = cx.and_then(|cx| {
                    crew.wakers.lock().unwrap_or_else(PoisonError::into_inner).push(cx.waker());
                    let killed = Some(Arc::clone(&crew.killed));
                    Shell::install(cx, handler, worker as usize, workers, killed)?;
                    Shell::of(cx).borrow_mut().attach(cx, post)
                });
                match begun {
                    Ok(()) => drop(crew.begun.fetch_add(1, Ordering::AcqRel)),
                    Err(_) => crew.failed.store(true, Ordering::Release),
                }
            };
            start(LoneReactor {
                name: format!("guest_{worker}"),
                core: None,
                policy: PollPolicy::Sleep,
                begin: Box::new(begin),
            });
        }
    }

    /// It dies, where it is.
    pub fn kill(&mut self) {
        self.phase = Phase::Over;
        self.crew.killed.store(true, Ordering::Release);
        for waker in &*self.crew.wakers.lock().unwrap_or_else(PoisonError::into_inner) {
            waker.wake();
        }
        if self.end.take().is_some() {
            self.dock.poke();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.kill();
    }
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("serving", &self.is_serving()).finish_non_exhaustive()
    }
}
