//! The target's end: listening for the process, making its session, noticing its end.
//!
//! One thread a device, which sleeps in `poll` unless a process comes, goes or answers. It is the only one that makes and
//! ends sessions; lanes look at what it says when their reactor polls.
//!
//! ```text
//! listening --connect--> greeting --Hello--> making --Ready--> serving
//!     ^ <---- end of the connection, nonsense, or no Hello in time ----+
//! ```
//!
//! One process at a time: another one is told to try again. The socket's file is readable and writable by its owner only
//! from the moment it exists.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use reactor::park::{Source, Waker};
use reactor::{Clock, Instant};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, acceptfrom_with, bind, connect, listen, socket_with,
};
use serde_json::{Value, json};

use super::link::{Bell, Link, Relay};
use super::session::Session;
use super::wire::{Message, Received, Refusal, VERSION, Welcome};
use crate::home::Limiter;
use crate::layout::Shape;
use crate::placement::{Placement, Placer};
use crate::request::Body;
use crate::types::{OpKind, OpSet};

/// What becomes of I/O while no process is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnDisconnect {
    /// What was with it fails, and what comes fails until another process connects.
    #[default]
    Fail,
    /// It waits for another process, until its deadline.
    Park,
}

impl OnDisconnect {
    /// The words that RPCs use.
    pub const NAMES: &[&str] = &["fail", "park"];

    /// The word that RPCs use.
    pub fn name(self) -> &'static str {
        OnDisconnect::NAMES[self as usize]
    }

    /// From that word.
    pub fn from_name(name: &str) -> Option<OnDisconnect> {
        [OnDisconnect::Fail, OnDisconnect::Park].into_iter().find(|each| each.name() == name)
    }
}

/// How to make a target's end.
#[derive(Clone, Debug)]
pub struct TargetOptions {
    /// Where to listen: an absolute path of at most 107 bytes.
    pub path: PathBuf,
    /// Name of the device.
    pub bdev: String,
    /// Bytes in a block.
    pub block_size: u32,
    /// Blocks.
    pub num_blocks: u64,
    /// Measures of the shared memory: a lane for each reactor, and the process's workers.
    pub shape: Shape,
    /// Which worker gets a request.
    pub placement: Placement,
    /// How long a worker of the process looks for more work before it sleeps.
    pub spin: Duration,
    /// The cores for the process's workers, in turn; empty: wherever the host runs them.
    pub cores: Vec<u32>,
    /// While no process is there.
    pub policy: OnDisconnect,
    /// What the host was told that the device does by itself.
    pub ops: OpSet,
    /// Whether the host was told that unmapped blocks read as zeroes.
    pub unmap_zeroes: bool,
    /// Whether the host was told that writes may be lost before the next flush.
    pub volatile_cache: bool,
}

/// How long a process that has connected may take to say what it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a process may take to change its size.
const RESIZE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the control thread and one reactor's lane share.
#[derive(Debug, Default)]
pub(super) struct LaneState {
    session: Mutex<Option<Arc<Session>>>,
    changed: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl LaneState {
    /// Whether the lane was free.
    pub(super) fn open(&self, waker: Waker) -> bool {
        let mut there = lock(&self.waker);
        if there.is_some() {
            return false;
        }
        *there = Some(waker);
        self.changed.store(true, Ordering::SeqCst);
        true
    }

    pub(super) fn close(&self) {
        *lock(&self.waker) = None;
    }

    /// Whether [`LaneState::session`] should be asked.
    #[inline]
    pub(super) fn has_changed(&self) -> bool {
        self.changed.load(Ordering::SeqCst)
    }

    pub(super) fn session(&self) -> Option<Arc<Session>> {
        self.changed.store(false, Ordering::SeqCst);
        lock(&self.session).clone()
    }

    fn set(&self, session: Option<Arc<Session>>) {
        *lock(&self.session) = session;
        self.changed.store(true, Ordering::SeqCst);
        if let Some(waker) = &*lock(&self.waker) {
            waker.wake();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A change of size under way.
#[derive(Debug, Default)]
struct Resizing {
    ticket: u64,
    /// The process's word on `ticket`: empty when it did it.
    answer: Option<String>,
}

#[derive(Debug, Default)]
struct Counters {
    sessions: AtomicU64,
    refused: AtomicU64,
    lies: AtomicU64,
    replayed: AtomicU64,
    stamps_refused: AtomicU64,
    /// By worker.
    requests: Vec<AtomicU64>,
}

/// What all threads share.
pub(super) struct Inner {
    options: TargetOptions,
    num_blocks: AtomicU64,
    lanes: Vec<LaneState>,
    /// What the process rings, by lane. They live as long as the device; a process that is gone can at most wake a
    /// reactor in vain.
    bells: Vec<Bell>,
    serving: Mutex<Option<Arc<Session>>>,
    resizing: Mutex<Resizing>,
    resized: Condvar,
    one_resize: Mutex<()>,
    stop: OwnedFd,
    stopping: AtomicBool,
    /// Identity of the socket's file, so that no other's is removed at the end; `None`: there is none.
    file: Option<(u64, u64)>,
    clock: Arc<dyn Clock>,
    counters: Counters,
    log: Limiter,
}

impl Inner {
    fn new(
        options: TargetOptions,
        clock: Arc<dyn Clock>,
        bells: Vec<Bell>,
        file: Option<(u64, u64)>,
    ) -> io::Result<Inner> {
        Ok(Inner {
            num_blocks: AtomicU64::new(options.num_blocks),
            lanes: (0..options.shape.lanes()).map(|_| LaneState::default()).collect(),
            bells,
            serving: Mutex::default(),
            resizing: Mutex::default(),
            resized: Condvar::new(),
            one_resize: Mutex::default(),
            stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            file,
            stopping: AtomicBool::new(false),
            clock,
            counters: Counters {
                requests: (0..options.shape.workers()).map(|_| AtomicU64::new(0)).collect(),
                ..Counters::default()
            },
            log: Limiter::default(),
            options,
        })
    }

    /// Opens a lane on the reactor behind `waker`; whether it was free.
    pub(super) fn open_lane(&self, index: u32, waker: Waker) -> bool {
        if !self.lane(index).open(waker.clone()) {
            return false;
        }
        if let Bell::Relay(relay) = &self.bells[index as usize] {
            relay.set(Some(waker));
        }
        true
    }

    pub(super) fn lane(&self, index: u32) -> &LaneState {
        &self.lanes[index as usize]
    }

    pub(super) fn shape(&self) -> &Shape {
        &self.options.shape
    }

    pub(super) fn policy(&self) -> OnDisconnect {
        self.options.policy
    }

    pub(super) fn bdev(&self) -> &str {
        &self.options.bdev
    }

    pub(super) fn count_lie(&self) {
        self.counters.lies.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn now(&self) -> Instant {
        self.clock.now()
    }

    pub(super) fn origin_ns(&self) -> u64 {
        self.clock.origin_ns()
    }

    /// The rule of placement for one lane.
    pub(super) fn placer(&self, lane: u32) -> Placer {
        let options = &self.options;
        Placer::new(options.placement, options.shape.workers() as usize, options.num_blocks, lane)
    }

    #[inline]
    pub(super) fn count_requests(&self, worker: usize, count: u64) {
        self.counters.requests[worker].fetch_add(count, Ordering::Relaxed);
    }

    /// The process says that it had a request when it cannot have had it.
    #[cold]
    pub(super) fn refuse_stamps(&self, now: Instant, body: &Body) {
        self.counters.stamps_refused.fetch_add(1, Ordering::Relaxed);
        if let Some(unsaid) = self.log.admit(now) {
            tracing::error!(
                bdev = self.bdev(),
                unsaid,
                "the external process says that it had {body:?} before it was submitted or after it was answered: it has \
                 a bug, or its clock is not this machine's; the whole time counts as spent in the handler"
            );
        }
    }

    pub(super) fn count_replayed(&self) {
        self.counters.replayed.fetch_add(1, Ordering::Relaxed);
    }

    /// The process said something that cannot be.
    #[cold]
    pub(super) fn lied(&self, now: Instant, what: impl FnOnce() -> String) {
        self.count_lie();
        if let Some(unsaid) = self.log.admit(now) {
            tracing::error!(bdev = self.bdev(), unsaid, "the external process {}: it has a bug; ignored", what());
        }
    }

    /// Says something that a process which connects again and again could have said as often.
    fn complain(&self, text: std::fmt::Arguments<'_>) {
        if let Some(unsaid) = self.log.admit(self.clock.now()) {
            tracing::error!(bdev = self.bdev(), unsaid, "{text}");
        }
    }

    fn welcome(&self) -> Welcome {
        let ops = OpKind::ALL.into_iter().filter(|&kind| self.options.ops.contains(kind));
        Welcome {
            shape: self.options.shape,
            block_size: self.options.block_size,
            num_blocks: self.num_blocks.load(Ordering::Acquire),
            ops: ops.map(|kind| 1 << kind as u32).sum(),
            unmap_zeroes: self.options.unmap_zeroes,
            volatile_cache: self.options.volatile_cache,
            spin_ns: u64::try_from(self.options.spin.as_nanos()).unwrap_or(u64::MAX),
            cores: self.options.cores.clone(),
            bdev: self.options.bdev.clone(),
        }
    }

    fn set_session(&self, session: Option<&Arc<Session>>) {
        *lock(&self.serving) = session.cloned();
        for lane in &self.lanes {
            lane.set(session.cloned());
        }
        if session.is_none() {
            // Whoever waits for its answer waits in vain; the next process is told the size when it comes.
            let mut resizing = lock(&self.resizing);
            resizing.answer.get_or_insert_with(String::new);
            self.resized.notify_all();
        }
    }
}

/// The target's end of a device whose handler is another process.
pub struct Target {
    inner: Arc<Inner>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// What the thread has otherwise.
    control: Option<Arc<Mutex<Control>>>,
}

impl Target {
    /// Listens at the path, and serves whichever process connects.
    ///
    /// # Errors
    /// When the path cannot be listened at: each error says what to do.
    pub fn listen(options: TargetOptions, clock: Arc<dyn Clock>) -> io::Result<Target> {
        let (listener, file) = listen_at(&options.path)?;
        let event = |_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bells = (0..options.shape.lanes()).map(event).collect::<Result<Vec<_>, _>>()?;
        let bells = bells.into_iter().map(|fd| Bell::Event(Arc::new(fd))).collect();
        let inner = Arc::new(Inner::new(options, clock, bells, Some(file))?);
        let listening = Listening { control: Control::new(&inner), listener };
        let thread = std::thread::Builder::new().name("appliance".into()).spawn(move || listening.run())?;
        Ok(Target { inner, thread: Mutex::new(Some(thread)), control: None })
    }

    /// A target for processes that are in this one: they come through its [`Dock`](super::dock::Dock). It has no thread.
    ///
    /// # Errors
    /// When the host is out of descriptors.
    pub fn docked(options: TargetOptions, clock: Arc<dyn Clock>) -> io::Result<Target> {
        let bells = (0..options.shape.lanes()).map(|_| Bell::Relay(Arc::new(Relay::default()))).collect();
        let inner = Arc::new(Inner::new(options, clock, bells, None)?);
        let control = Arc::new(Mutex::new(Control::new(&inner)));
        Ok(Target { inner, thread: Mutex::default(), control: Some(control) })
    }

    /// Where processes inside this one connect; `None` for a target that listens at a socket.
    pub(super) fn control(&self) -> Option<&Arc<Mutex<Control>>> {
        self.control.as_ref()
    }

    pub(super) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.inner.options.path
    }

    /// Whether a process is there.
    pub fn is_connected(&self) -> bool {
        lock(&self.inner.serving).is_some()
    }

    /// What wakes the reactor of a lane: an edge means that the process has answered something. `None`: its waker does.
    pub fn source(&self, lane: u32) -> Option<Source> {
        match &self.inner.bells[lane as usize] {
            Bell::Event(fd) | Bell::Socket(fd) => Some(Source::Fd(fd.as_raw_fd())),
            Bell::Relay(_) => None,
        }
    }

    /// Tells the process the new size and waits until it has taken it on; for at most a few seconds. Without a process, the
    /// next one is told.
    ///
    /// # Errors
    /// When the process refuses, or does not answer; the size is then the one before.
    pub fn resize(&self, num_blocks: u64) -> io::Result<()> {
        let inner = &self.inner;
        let _one = lock(&inner.one_resize);
        let before = inner.num_blocks.swap(num_blocks, Ordering::AcqRel);
        let Some(session) = lock(&inner.serving).clone() else { return Ok(()) };
        let undo = |error: io::Error| {
            inner.num_blocks.store(before, Ordering::Release);
            Err(error)
        };
        let mut resizing = lock(&inner.resizing);
        resizing.ticket += 1;
        resizing.answer = None;
        let message = Message::Resize { ticket: resizing.ticket, num_blocks };
        if let Err(error) = session.link().send(message) {
            return match error.kind() {
                io::ErrorKind::WouldBlock => {
                    undo(io::Error::other("the external process does not read what it is told"))
                }
                // It is gone.
                _ => Ok(()),
            };
        }
        let waited = inner.resized.wait_timeout_while(resizing, RESIZE_TIMEOUT, |resizing| resizing.answer.is_none());
        let (mut resizing, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match resizing.answer.take() {
            Some(text) if text.is_empty() => Ok(()),
            Some(text) => undo(io::Error::other(format!("the external process refuses the size: {text}"))),
            None => undo(io::Error::new(
                io::ErrorKind::TimedOut,
                "the external process has not answered within 5 s; see what it does, or restart it",
            )),
        }
    }

    /// Numbers for reports.
    pub fn stats(&self) -> Value {
        let counters = &self.inner.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "connected": self.is_connected(),
            "sessions": get(&counters.sessions),
            "refused": get(&counters.refused),
            "faults": get(&counters.lies),
            "replayed": get(&counters.replayed),
            "stamps_refused": get(&counters.stamps_refused),
            "workers": counters.requests.iter().map(|count| json!({ "requests": get(count) })).collect::<Vec<_>>(),
        })
    }

    /// Begins to end: the path is free at once, the rest follows; see [`Target::close`], which also waits.
    pub fn stop(&self) {
        // Once: a file made since may well have the identity of the one that was removed.
        if self.inner.stopping.swap(true, Ordering::AcqRel) {
            return;
        }
        let path = &self.inner.options.path;
        if std::fs::symlink_metadata(path).is_ok_and(|now| Some((now.dev(), now.ino())) == self.inner.file) {
            let _ = std::fs::remove_file(path);
        }
        if let Some(control) = &self.control {
            lock(control).finish();
        }
        // The counter of an eventfd of this process's own has room for this.
        let _ = rustix::io::write(&self.inner.stop, &1u64.to_ne_bytes());
    }

    /// Ends the session, tells the process that the device is gone, and takes the socket away. Idempotent.
    pub fn close(&self) {
        self.stop();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!(bdev = self.inner.bdev(), "the thread that watches the external process panicked");
        }
    }
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("options", &self.inner.options).finish_non_exhaustive()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.close();
    }
}

/// Listens at `path`; also the identity of the file, so that no other's is removed at the end.
fn listen_at(path: &Path) -> io::Result<(OwnedFd, (u64, u64))> {
    let say = |what: &str, error: io::Error, fix: &str| {
        io::Error::new(error.kind(), format!("{what} {}: {error}; {fix}", path.display()))
    };
    if !path.is_absolute() {
        let error = io::Error::new(io::ErrorKind::InvalidInput, "the path is not absolute");
        return Err(say("listening at", error, "give the whole path, as in unix:/run/my.sock"));
    }
    let address = SocketAddrUnix::new(path).map_err(|errno| {
        let error = io::Error::new(io::ErrorKind::InvalidInput, io::Error::from(errno));
        say("listening at", error, "choose a path of at most 107 bytes")
    })?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let open = || socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            let error = io::Error::new(io::ErrorKind::AlreadyExists, "something that is no socket is there");
            return Err(say("listening at", error, "choose another path, or remove it"));
        }
        Ok(_) => match connect(&open()?, &address) {
            // Left by a target that is gone.
            Err(Errno::CONNREFUSED) => {
                std::fs::remove_file(path).map_err(|e| say("replacing", e, "remove the file"))?;
            }
            _ => {
                let error = io::Error::new(io::ErrorKind::AddrInUse, "another program listens there");
                return Err(say("listening at", error, "choose another path, or delete the bdev that uses it"));
            }
        },
        Err(_) => {}
    }
    let listener = open()?;
    // The file gets these rights when it is made: there is no moment in which others could connect.
    rustix::fs::fchmod(&listener, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)?;
    bind(&listener, &address).map_err(|e| say("listening at", e.into(), "make the folder, or choose another path"))?;
    let file = std::fs::symlink_metadata(path)?;
    listen(&listener, 4)?;
    Ok((listener, (file.dev(), file.ino())))
}

/// A process that has connected.
enum Peer {
    Greeting { link: Link, until: Instant },
    Making { session: Arc<Session>, num_blocks: u64 },
    Serving(Arc<Session>),
}

impl Peer {
    fn link(&self) -> &Link {
        match self {
            Peer::Greeting { link, .. } => link,
            Peer::Making { session, .. } | Peer::Serving(session) => session.link(),
        }
    }
}

/// The machine: what becomes of processes that connect, and of what they say. Whoever runs it brings connections and says
/// when there is something to hear.
pub(super) struct Control {
    inner: Arc<Inner>,
    peer: Option<Peer>,
    ticket: u64,
}

/// The thread.
struct Listening {
    control: Control,
    listener: OwnedFd,
}

impl Listening {
    fn run(mut self) {
        while !self.control.inner.stopping.load(Ordering::Acquire) {
            if let Err(error) = self.wait() {
                tracing::error!(bdev = self.control.inner.bdev(), "watching for an external process failed: {error}");
                break;
            }
            // What the present process has to say first: it may be its end, which makes room for the next.
            self.control.hear();
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            while let Ok((socket, _)) = acceptfrom_with(&self.listener, flags) {
                self.control.connected(Link::Socket(socket));
            }
        }
        self.control.finish();
    }

    /// Sleeps until something is there.
    fn wait(&mut self) -> io::Result<()> {
        let control = &self.control;
        let timeout = match &control.peer {
            Some(Peer::Greeting { until, .. }) => {
                let left = until.nanos_since(control.inner.clock.now());
                Some(Timespec { tv_sec: (left / 1_000_000_000) as i64, tv_nsec: (left % 1_000_000_000) as i64 })
            }
            _ => None,
        };
        let mut fds = vec![PollFd::new(&control.inner.stop, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
        if let Some(Link::Socket(socket)) = control.peer.as_ref().map(Peer::link) {
            fds.push(PollFd::new(socket, PollFlags::IN));
        }
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Control {
    fn new(inner: &Arc<Inner>) -> Control {
        Control { inner: Arc::clone(inner), peer: None, ticket: 0 }
    }

    /// The device is gone.
    fn finish(&mut self) {
        if let Some(peer) = &self.peer {
            let _ = peer.link().send(Message::Gone);
        }
        self.drop_peer();
    }

    /// Takes in what the process has said.
    pub(super) fn hear(&mut self) {
        while let Some(peer) = &self.peer {
            match peer.link().receive() {
                Ok(Received::Nothing) => {
                    if let Peer::Greeting { until, .. } = peer
                        && *until <= self.inner.clock.now()
                    {
                        self.turn_away(Refusal::Version, "it has not said what it is within 5 s");
                    }
                    return;
                }
                Ok(Received::End) => {
                    match peer {
                        Peer::Serving(_) => {
                            let policy = self.inner.policy().name();
                            tracing::warn!(bdev = self.inner.bdev(), policy, "the external process is gone");
                        }
                        _ => tracing::info!(bdev = self.inner.bdev(), "a process left before it was ready"),
                    }
                    self.drop_peer();
                }
                Ok(Received::Message(message, _)) => self.handle(message),
                Err(error) => {
                    self.inner.count_lie();
                    self.turn_away(Refusal::Version, &format!("it sent {error}"));
                }
            }
        }
    }

    fn handle(&mut self, message: Message) {
        match (self.peer.take(), message) {
            (Some(Peer::Greeting { link, .. }), Message::Hello { version }) => self.greet(link, version),
            (Some(Peer::Making { session, num_blocks }), Message::Ready) => {
                tracing::info!(bdev = self.inner.bdev(), "an external process serves it");
                self.inner.counters.sessions.fetch_add(1, Ordering::Relaxed);
                self.inner.set_session(Some(&session));
                let now = self.inner.num_blocks.load(Ordering::Acquire);
                if now != num_blocks {
                    // The size was changed meanwhile.
                    let _ = session.link().send(Message::Resize { ticket: 0, num_blocks: now });
                }
                self.peer = Some(Peer::Serving(session));
            }
            (Some(Peer::Making { session, .. }), Message::Unable { text }) => {
                self.inner.complain(format_args!("the external process cannot serve it: {text}"));
                self.inner.counters.refused.fetch_add(1, Ordering::Relaxed);
                drop(session);
            }
            (Some(Peer::Serving(session)), Message::Resized { ticket, text }) => {
                self.peer = Some(Peer::Serving(session));
                let mut resizing = lock(&self.inner.resizing);
                if resizing.ticket == ticket && ticket > self.ticket {
                    self.ticket = ticket;
                    resizing.answer = Some(text);
                    self.inner.resized.notify_all();
                } else if !text.is_empty() {
                    self.inner.complain(format_args!("the external process refuses its size: {text}"));
                }
            }
            (peer, message) => {
                self.peer = peer;
                self.inner.count_lie();
                self.turn_away(Refusal::Version, &format!("it said {message:?} out of turn"));
            }
        }
    }

    /// Answers a process that has said what it is.
    fn greet(&mut self, link: Link, version: u32) {
        if version != VERSION {
            self.peer = Some(Peer::Greeting { link, until: Instant(0) });
            let text =
                format!("it speaks version {version}, and this is version {VERSION}: use the same release for both");
            return self.turn_away(Refusal::Version, &text);
        }
        let welcome = self.inner.welcome();
        let num_blocks = welcome.num_blocks;
        match Session::open(link, welcome, &self.inner.bells) {
            Ok(session) => self.peer = Some(Peer::Making { session: Arc::new(session), num_blocks }),
            Err(error) => self.inner.complain(format_args!("no session for an external process: {error}")),
        }
    }

    fn turn_away(&mut self, why: Refusal, text: &str) {
        self.inner.complain(format_args!("a process is turned away: {text}"));
        self.inner.counters.refused.fetch_add(1, Ordering::Relaxed);
        if let Some(peer) = &self.peer {
            let _ = peer.link().send(Message::Refused { why, text: text.into() });
        }
        self.drop_peer();
    }

    fn drop_peer(&mut self) {
        match self.peer.take() {
            Some(Peer::Serving(session)) => {
                session.end();
                self.inner.set_session(None);
            }
            Some(Peer::Making { session, .. }) => session.end(),
            Some(Peer::Greeting { .. }) | None => {}
        }
    }

    /// Takes a process that has connected, or tells it that there is one.
    pub(super) fn connected(&mut self, link: Link) {
        if self.peer.is_some() {
            // Its end may have come after it was last looked at.
            self.hear();
        }
        if self.inner.stopping.load(Ordering::Acquire) {
            let _ = link.send(Message::Gone);
            return;
        }
        if self.peer.is_some() {
            let text = format!("another process serves '{}'", self.inner.bdev());
            let _ = link.send(Message::Refused { why: Refusal::Busy, text });
            return;
        }
        let until = self.inner.clock.now() + HELLO_TIMEOUT;
        self.peer = Some(Peer::Greeting { link, until });
        self.hear();
    }
}

#[cfg(test)]
mod tests;
