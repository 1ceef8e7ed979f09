//! The process's end: runs any handler for a device of a target elsewhere.
//!
//! [`serve`] connects, makes the handler once it knows the device, and serves until it is told to stop. When the
//! connection ends, because the target was restarted, or has cut the process off, it lets the handler finish with what it
//! holds and connects again; the handler stays. One thread a worker, and the caller's for the connection. How many
//! workers there are, on which cores, and how long they spin, the target says: they are parameters of the device.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use reactor::file::EngineChoice;
use reactor::platform::OsPlatform;
use reactor::reactor::{LoneReactor, PollPolicy, ReactorHandle};
use reactor::{Context, Platform};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::Value;

use super::link::Bell;
use super::memory::Memory;
use super::wire::{self, Message, Received, Refusal, VERSION, Welcome};
use super::worker::{Hung, NewLane, Post, Shell};
use crate::handler::{Capabilities, Handler, Making};
use crate::types::{Geometry, OpKind};

/// How a handler is served. The threads are not here: the target says how many workers the device has.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Ends with the first device: when it is deleted, or its target ends. Otherwise [`serve`] waits for the next target.
    pub until_gone: bool,
    /// The handler's own options: an object.
    pub options: Value,
}

impl Default for ServeOptions {
    fn default() -> Self {
        ServeOptions { until_gone: false, options: Value::Object(serde_json::Map::new()) }
    }
}

/// Ends [`serve`] from another thread.
#[derive(Clone, Debug)]
pub struct Stop(Arc<(AtomicBool, OwnedFd)>);

impl Stop {
    /// One that has not been told yet.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Stop> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Stop(Arc::new((AtomicBool::new(false), fd))))
    }

    /// Ends it.
    pub fn stop(&self) {
        self.0.0.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.0.1, &1u64.to_ne_bytes());
    }

    fn is_set(&self) -> bool {
        self.0.0.load(Ordering::Acquire)
    }
}

/// Between two tries to connect.
const RETRY: Duration = Duration::from_millis(50);
/// How long the end waits for workers whose handler hangs.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// Makes the handler for a device, once it is known.
pub type MakeHandler<'a> = dyn FnMut(&Making<'_>) -> io::Result<Arc<dyn Handler>> + 'a;

/// Serves the device behind the socket at `path` until `stop`. While nobody listens there it waits. The handler is made
/// when the target has said what the device is, and kept for every later connection. [`Handler::resize`] is called on the
/// calling thread.
///
/// # Errors
/// When the socket cannot be used, the target refuses for good, the handler cannot be made, or cannot do what the device
/// promises; each says what to do.
pub fn serve(path: &Path, make: &mut MakeHandler<'_>, options: &ServeOptions, stop: &Stop) -> io::Result<()> {
    let mut server = Server { path, options, stop, team: None };
    let result = server.run(make);
    server.end();
    result
}

/// What a device asks of the threads of its process.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Terms {
    workers: u32,
    cores: Vec<u32>,
    spin: Duration,
}

impl Terms {
    fn of(welcome: &Welcome) -> Terms {
        let spin = Duration::from_nanos(welcome.spin_ns);
        Terms { workers: welcome.shape.workers(), cores: welcome.cores.clone(), spin }
    }
}

/// The handler and its threads.
struct Team {
    handler: Arc<dyn Handler>,
    bdev: Arc<str>,
    block_size: u32,
    num_blocks: u64,
    terms: Terms,
    workers: Vec<(ReactorHandle, JoinHandle<()>)>,
}

struct Server<'a> {
    path: &'a Path,
    options: &'a ServeOptions,
    stop: &'a Stop,
    team: Option<Team>,
}

/// What a target that was asked for a session said.
enum Greeting {
    Session(OwnedFd, Welcome, Vec<Post>),
    Again(String),
}

/// Whether something else is at `path`.
fn is_no_socket(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|found| !found.file_type().is_socket())
}

fn other(text: impl Into<String>) -> io::Error {
    io::Error::other(text.into())
}

impl Server<'_> {
    fn run(&mut self, make: &mut MakeHandler<'_>) -> io::Result<()> {
        let mut said = String::new();
        while !self.stop.is_set() {
            let again = match self.connect()? {
                Ok(socket) => match self.greet(socket)? {
                    Greeting::Session(socket, welcome, posts) => {
                        said.clear();
                        let gone = self.session(&socket, &welcome, posts, make)?;
                        drop(socket);
                        self.drain();
                        if gone && self.options.until_gone {
                            return Ok(());
                        }
                        continue;
                    }
                    Greeting::Again(why) => why,
                },
                Err(why) => why,
            };
            if again != said {
                tracing::info!(socket = %self.path.display(), "waiting for the target: {again}");
                said = again;
            }
            self.wait(None, Some(RETRY))?;
        }
        Ok(())
    }

    /// A connection; or why there is none yet.
    fn connect(&self) -> io::Result<Result<OwnedFd, String>> {
        let address = SocketAddrUnix::new(self.path).map_err(|errno| {
            other(format!("{}: {errno}; a socket's path has at most 107 bytes", self.path.display()))
        })?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        match connect(&socket, &address) {
            Ok(()) => Ok(Ok(socket)),
            Err(Errno::CONNREFUSED) if is_no_socket(self.path) => {
                let text = "is no socket; give the path that bdev_appliance_create was given behind 'unix:'";
                Err(other(format!("{} {text}", self.path.display())))
            }
            Err(Errno::NOENT | Errno::CONNREFUSED) => Ok(Err("nobody listens there".into())),
            Err(Errno::AGAIN | Errno::INTR) => Ok(Err("others are before this".into())),
            Err(Errno::ACCESS) => {
                Err(other(format!("{}: no permission; run this as the user that runs the target", self.path.display())))
            }
            Err(Errno::PROTOTYPE) => Err(other(format!(
                "{} is another program's socket; give the path that bdev_appliance_create was given behind 'unix:'",
                self.path.display()
            ))),
            Err(errno) => Err(other(format!("connecting to {}: {errno}", self.path.display()))),
        }
    }

    /// Sleeps until `socket` says something, `stop` is told, or `timeout` has passed.
    fn wait(&self, socket: Option<&OwnedFd>, timeout: Option<Duration>) -> io::Result<()> {
        let mut fds = vec![PollFd::new(&self.stop.0.1, PollFlags::IN)];
        fds.extend(socket.map(|socket| PollFd::new(socket, PollFlags::IN)));
        let timeout = timeout.map(|t| Timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The next message; `None` at the end of the connection or when told to stop.
    fn next(&self, socket: &OwnedFd) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
        loop {
            if self.stop.is_set() {
                return Ok(None);
            }
            match wire::receive(socket, true)? {
                Received::Message(message, fds) => return Ok(Some((message, fds))),
                Received::End => return Ok(None),
                Received::Nothing => self.wait(Some(socket), None)?,
            }
        }
    }

    /// Asks for a session, and takes what belongs to it.
    fn greet(&self, socket: OwnedFd) -> io::Result<Greeting> {
        let again = |why: &str| Ok(Greeting::Again(why.to_string()));
        if wire::send(&socket, &Message::Hello { version: VERSION }, &[]).is_err() {
            return again("it closed the connection");
        }
        let (welcome, memory) = match self.next(&socket)? {
            None => return again("it closed the connection"),
            Some((Message::Refused { why: Refusal::Version, text }, _)) => {
                return Err(other(format!("the target at {} refuses: {text}", self.path.display())));
            }
            Some((Message::Refused { text, .. }, _)) => return again(&text),
            Some((Message::Welcome(welcome), fds)) => {
                let [file] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| other("the target sent no memory"))?;
                let memory = Memory::open(&file, welcome.shape)?;
                (welcome, Arc::new(memory))
            }
            Some((message, _)) => return Err(other(format!("the target answered {message:?} instead of a welcome"))),
        };
        let shape = welcome.shape;
        let (Some(lane_bells), Some(bells)) = (
            self.bells(&socket, &Message::Lanes { count: shape.lanes() }, shape.lanes())?,
            self.bells(&socket, &Message::Workers { count: shape.workers() }, shape.workers())?,
        ) else {
            return again("it closed the connection");
        };
        let bdev: Arc<str> = Arc::from(welcome.bdev.as_str());
        let lane = |(bell, index)| {
            let (words, bell) = (memory.lane(index), Bell::Event(Arc::new(bell)));
            NewLane { index, words, bell, block_size: welcome.block_size, bdev: Arc::clone(&bdev) }
        };
        let lanes: Vec<_> = lane_bells.into_iter().zip(0..).map(lane).collect();
        let post =
            |(bell, worker)| Post { worker, lanes: lanes.clone(), heads: memory.heads(), bell: Hung::Socket(bell) };
        let posts = bells.into_iter().zip(0..).map(post).collect();
        Ok(Greeting::Session(socket, welcome, posts))
    }

    /// The descriptors that come with `expected`; `None` when the connection ends instead.
    fn bells(&self, socket: &OwnedFd, expected: &Message, count: u32) -> io::Result<Option<Vec<OwnedFd>>> {
        let Some((message, fds)) = self.next(socket)? else { return Ok(None) };
        if message != *expected || fds.len() != count as usize {
            let hint = "is the limit of open files (ulimit -n) of this process high enough?";
            let got = fds.len();
            return Err(other(format!(
                "instead of {count} descriptors with {expected:?} {got} came with {message:?}; {hint}"
            )));
        }
        Ok(Some(fds))
    }

    /// Serves one session until its end. Whether the device is gone with it.
    fn session(
        &mut self,
        socket: &OwnedFd,
        welcome: &Welcome,
        posts: Vec<Post>,
        make: &mut MakeHandler<'_>,
    ) -> io::Result<bool> {
        if let Err(error) = self.prepare(welcome, make) {
            let _ = wire::send(socket, &Message::Unable { text: error.to_string() }, &[]);
            return Err(error);
        }
        let team = self.team.as_mut().expect("it was just prepared");
        for ((worker, _), post) in team.workers.iter().zip(posts) {
            // One whose handler hangs takes its lanes on when it goes on: the target waits for it, by deadline.
            let attach = move |cx: &mut Context| {
                let shell = Shell::of(cx);
                if let Err(error) = shell.borrow_mut().attach(cx, post) {
                    tracing::error!("a worker cannot be woken: {error}; its requests will time out");
                }
            };
            let mut message: reactor::mailbox::Message = Box::new(attach);
            while let Err(reactor::mailbox::Full(back)) = worker.send(message) {
                message = back;
                std::thread::yield_now();
            }
        }
        // Should that fail, the reason is in what the target has said before.
        let _ = wire::send(socket, &Message::Ready, &[]);
        tracing::info!(bdev = &*team.bdev, handler = team.handler.name(), "serving");
        loop {
            let heard = self.next(socket);
            let team = self.team.as_mut().expect("it was just prepared");
            match heard {
                Ok(Some((Message::Resize { ticket, num_blocks }, _))) => {
                    let text = team.resize(num_blocks).err().map(|error| error.to_string()).unwrap_or_default();
                    if wire::send(socket, &Message::Resized { ticket, text }, &[]).is_err() {
                        return Ok(false);
                    }
                }
                Ok(Some((Message::Gone, _))) => {
                    tracing::info!(bdev = &*team.bdev, "the device was deleted, or its target ended");
                    return Ok(true);
                }
                Ok(Some((Message::Refused { text, .. }, _))) => {
                    tracing::error!(bdev = &*team.bdev, "the target has cut the connection: {text}");
                    return Ok(false);
                }
                Ok(Some((message, _))) => {
                    tracing::error!(bdev = &*team.bdev, "the target said {message:?} out of turn");
                    return Ok(false);
                }
                Ok(None) => {
                    if !self.stop.is_set() {
                        tracing::warn!(bdev = &*team.bdev, "the connection to the target has ended");
                    }
                    return Ok(false);
                }
                Err(error) => {
                    tracing::warn!(bdev = &*team.bdev, "the connection to the target failed: {error}");
                    return Ok(false);
                }
            }
        }
    }

    /// Sees to it that there is a handler that can do what the device promises, of the device's size.
    fn prepare(&mut self, welcome: &Welcome, make: &mut MakeHandler<'_>) -> io::Result<()> {
        if let Some(team) = &mut self.team {
            if (&*team.bdev, team.block_size) != (welcome.bdev.as_str(), welcome.block_size) {
                return Err(other(format!(
                    "the socket now belongs to '{}' with blocks of {} bytes, and this process serves '{}' with {}: \
                     restart it",
                    welcome.bdev, welcome.block_size, team.bdev, team.block_size
                )));
            }
            let terms = Terms::of(welcome);
            if team.terms != terms {
                let (had, has) = (&team.terms, &terms);
                return Err(other(format!(
                    "the device now wants {has:?} of its process, which has {had:?}: restart it"
                )));
            }
            check(&team.handler.capabilities(&geometry(welcome)), welcome)?;
            return team.resize(welcome.num_blocks);
        }
        let geometry = geometry(welcome);
        let workers = welcome.shape.workers() as usize;
        let making = Making { bdev: &welcome.bdev, geometry, options: &self.options.options, workers };
        let handler = make(&making)?;
        check(&handler.capabilities(&geometry), welcome)?;
        self.team = Some(Team::start(handler, welcome)?);
        Ok(())
    }

    /// Waits until the handler has let go of the last session's requests.
    fn drain(&mut self) {
        let Some(team) = &self.team else { return };
        let (drained, is_drained) = mpsc::channel::<()>();
        for (worker, _) in &team.workers {
            let drained = drained.clone();
            let mut message: reactor::mailbox::Message = Box::new(move |cx: &mut Context| {
                let shell = Shell::of(cx);
                shell.borrow_mut().detach(cx, drained);
            });
            while let Err(reactor::mailbox::Full(back)) = worker.send(message) {
                message = back;
                std::thread::yield_now();
            }
        }
        drop(drained);
        let mut left = team.workers.len();
        let mut said = false;
        let mut waited = Duration::ZERO;
        while left > 0 && !(self.stop.is_set() && waited >= END_PATIENCE) {
            match is_drained.recv_timeout(RETRY) {
                Ok(()) => left -= 1,
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    waited += RETRY;
                    if waited > Duration::from_secs(1) && !std::mem::replace(&mut said, true) {
                        tracing::warn!(
                            bdev = &*team.bdev,
                            handler = team.handler.name(),
                            "waiting for the handler to end the requests of the last connection"
                        );
                    }
                }
            }
        }
    }

    /// Ends the workers and the handler.
    fn end(&mut self) {
        let Some(team) = self.team.take() else { return };
        for (worker, _) in &team.workers {
            let _ = worker.send(Box::new(|cx: &mut Context| {
                Shell::of(cx).borrow_mut().end();
                cx.stop();
            }));
        }
        let threads = team.workers.into_iter().map(|(_, thread)| thread);
        let (ended, has_ended) = mpsc::channel::<()>();
        let handler = team.handler;
        // Joined elsewhere, because a handler that hangs must not keep the process from its end.
        let joiner = std::thread::Builder::new().name("appliance_end".into()).spawn(move || {
            threads.for_each(|thread| drop(thread.join()));
            handler.stop();
            drop(ended);
        });
        if joiner.is_ok() && has_ended.recv_timeout(END_PATIENCE) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("the handler has not ended within {} s; it is left behind", END_PATIENCE.as_secs());
        }
    }
}

pub(super) fn geometry(welcome: &Welcome) -> Geometry {
    let mut geometry = Geometry::new(welcome.block_size, welcome.num_blocks);
    geometry.volatile_cache = welcome.volatile_cache;
    geometry.unmap_zeroes = welcome.unmap_zeroes;
    geometry
}

/// Whether a handler keeps what the device promises its hosts.
pub(super) fn check(capabilities: &Capabilities, welcome: &Welcome) -> io::Result<()> {
    let promised = OpKind::ALL.into_iter().filter(|&kind| welcome.ops & 1 << kind as u32 != 0);
    let missing: Vec<_> = promised.filter(|&kind| !capabilities.ops.contains(kind)).map(OpKind::name).collect();
    if !missing.is_empty() {
        return Err(other(format!(
            "the handler does not do {} by itself: leave that out of 'ops' in the options of bdev_appliance_create",
            missing.join(", ")
        )));
    }
    if capabilities.volatile_cache && !welcome.volatile_cache {
        return Err(other(
            "the handler may lose writes before a flush, and the device promises not to: create it without \
             'volatile_cache': false",
        ));
    }
    if welcome.unmap_zeroes && !capabilities.unmap_zeroes {
        return Err(other(
            "unmapped blocks of the handler need not read as zeroes, and the device promises that they do: create it \
             without 'unmap_zeroes'",
        ));
    }
    let blocks = welcome.shape.slot_bytes() / welcome.block_size.max(1);
    if capabilities.max_rw_blocks != 0 && blocks > capabilities.max_rw_blocks {
        return Err(other(format!(
            "the handler moves at most {} blocks at once, and the device {blocks}: create it with 'io_bytes' {}",
            capabilities.max_rw_blocks,
            u64::from(capabilities.max_rw_blocks) * u64::from(welcome.block_size)
        )));
    }
    Ok(())
}

impl Team {
    fn start(handler: Arc<dyn Handler>, welcome: &Welcome) -> io::Result<Team> {
        let platform: Arc<dyn Platform> = Arc::new(OsPlatform::new(EngineChoice::Auto));
        let terms = Terms::of(welcome);
        let count = terms.workers as usize;
        let mut team = Team {
            handler,
            bdev: Arc::from(welcome.bdev.as_str()),
            block_size: welcome.block_size,
            num_blocks: welcome.num_blocks,
            terms,
            workers: Vec::new(),
        };
        for index in 0..count {
            let (begun, has_begun) = mpsc::channel::<io::Result<ReactorHandle>>();
            let handler = Arc::clone(&team.handler);
            let lone = LoneReactor {
                name: format!("worker_{index}"),
                core: team.terms.cores.get(index % team.terms.cores.len().max(1)).map(|&core| core as usize),
                policy: PollPolicy::Adaptive { spin: team.terms.spin },
                begin: Box::new(move |cx: io::Result<&mut Context>| {
                    let made = cx.and_then(|cx| {
                        Shell::install(cx, handler, index, count, None)?;
                        Ok(cx.handle())
                    });
                    let _ = begun.send(made);
                }),
            };
            let platform = Arc::clone(&platform);
            let thread = std::thread::Builder::new().name(lone.name.clone()).spawn(move || {
                if let Some(mut reactor) = lone.build(&platform)
                    && reactor.context().get::<std::cell::RefCell<Shell>>().is_some()
                {
                    // It was pinned when it was built, and nothing else of running it fails.
                    let _ = reactor.run();
                }
            })?;
            let handle = has_begun.recv().unwrap_or_else(|_| Err(other("its thread ended")));
            match handle {
                Ok(handle) => team.workers.push((handle, thread)),
                Err(error) => {
                    team.workers.iter().for_each(|(worker, _)| worker.stop());
                    return Err(io::Error::new(error.kind(), format!("worker {index} cannot be made: {error}")));
                }
            }
        }
        Ok(team)
    }

    fn resize(&mut self, num_blocks: u64) -> io::Result<()> {
        if num_blocks == self.num_blocks {
            return Ok(());
        }
        let handler = &self.handler;
        let resized = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| handler.resize(num_blocks)));
        resized.unwrap_or_else(|_| Err(other("the handler panicked")))?;
        self.num_blocks = num_blocks;
        Ok(())
    }
}
