//! What the host asks of a transport, and of a reactor: queue pairs that can be polled always, or only when a socket says
//! that there is something.

use crate::spec::{Cqe, Sqe};
use crate::target::view::TransportKind;
use reactor::park::{Ready, Source};
use reactor::reactor::WatchId;
use reactor::{BufferPool, Buffers, Context, PollerId};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

/// Which way the payload of a command goes, and its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// None: the buffers are empty.
    None,
    /// To the controller; in the capsule if it fits.
    ToController(u32),
    /// To the host: the buffers are room for it.
    ToHost(u32),
}

/// The end of a command.
#[derive(Debug)]
pub struct Completion {
    /// What the command was submitted with.
    pub user: u64,
    /// The entry; its CID means nothing to the caller.
    pub cqe: Cqe,
    /// The payload that came with the command.
    pub data: Buffers,
    /// Bytes of payload that went over the wire.
    pub transferred_bytes: u32,
}

/// One queue pair of a transport. Commands that are submitted leave together with the next [`flush`](Self::flush).
pub trait Qpair {
    /// Whether the transport is set up, so that commands can be submitted. Never becomes false again.
    fn is_ready(&self) -> bool;

    /// Whether a command will be taken.
    fn can_submit(&self) -> bool;

    /// Whether two commands will be taken that have to follow each other, as the halves of a fused operation do.
    fn can_submit_pair(&self) -> bool;

    /// Takes a command. CID, PSDT and data pointer of `sqe` are the transport's.
    ///
    /// # Panics
    /// If [`can_submit`](Self::can_submit) is false, or `data` is not as long as `payload` says.
    fn submit(&mut self, user: u64, sqe: Sqe, payload: Payload, data: Buffers);

    /// To be called before [`poll`](Self::poll) while it is not ready, with the reactor that it is on, if it is on one.
    ///
    /// # Errors
    /// As [`poll`](Self::poll).
    fn prepare(&mut self, _reactor: Option<&mut Context>) -> Result<(), String> {
        Ok(())
    }

    /// Receives once and appends what has completed; whether anything came.
    ///
    /// # Errors
    /// The queue pair is of no use any more, for the reason given.
    fn poll(&mut self, done: &mut Vec<Completion>) -> Result<bool, String>;

    /// Sends what waits, as much as there is room for.
    ///
    /// # Errors
    /// As [`poll`](Self::poll).
    fn flush(&mut self) -> Result<(), String>;

    /// Commands that have not completed.
    fn outstanding(&self) -> usize;

    /// The identifier that the outstanding command `user` has at the controller, which Abort needs.
    fn cid_of(&self, user: u64) -> Option<u16>;

    /// How much data commands may carry in their capsules from now on, bytes.
    fn set_in_capsule_bytes(&mut self, bytes: u32);

    /// How many data descriptors of one command the controller takes (MSDBD of Identify Controller; 0: it does not say).
    fn set_descriptors(&mut self, _most: u8) {}

    /// Ends the queue pair: gives back the commands that have not completed, whose fate is unknown.
    fn close(&mut self, lost: &mut dyn FnMut(u64, Buffers));

    /// Whether [`source`](Self::source) stays the same from now on. Until then the queue pair is polled.
    fn is_watchable(&self) -> bool {
        true
    }

    /// Whether its reactor hears of what there is to do without watching [`source`](Self::source).
    fn is_announced(&self) -> bool {
        false
    }

    /// What tells that there is something to do.
    fn source(&self) -> Source;

    /// From now on [`source`](Self::source) is watched: nothing is looked for that was not announced.
    fn set_watched(&mut self);

    /// The source, which is watched, has announced something.
    fn ready(&mut self, ready: Ready);

    /// Whether polling or flushing now can do something. Always true for a queue pair that is not watched and waits for
    /// something.
    fn has_work(&self) -> bool;
}

/// Where queue pairs that come and go are watched.
pub trait Watches {
    /// Watches `source` under `key`, or does not want to (`None`): then the queue pair is polled.
    ///
    /// # Errors
    /// As [`Context::watch`].
    fn watch(&mut self, source: Source, key: u64) -> io::Result<Option<WatchId>>;

    /// Ends a watch, before its source is closed.
    fn unwatch(&mut self, watch: WatchId);

    /// The reactor, if this is on one.
    fn context(&mut self) -> Option<&mut Context> {
        None
    }
}

/// Reaches the pool that most payloads on a reactor come from, for transports that make memory known to devices. It is put on
/// the reactor with [`Context::insert`], by whoever has the pool.
pub struct PayloadMemory(Box<Reach>);

type Reach = dyn Fn(&mut dyn FnMut(&BufferPool));

impl PayloadMemory {
    /// The pool that `reach` calls with.
    pub fn new(reach: impl Fn(&mut dyn FnMut(&BufferPool)) + 'static) -> PayloadMemory {
        PayloadMemory(Box::new(reach))
    }

    /// Calls `use_it` with the pool.
    pub fn with(&self, use_it: &mut dyn FnMut(&BufferPool)) {
        (self.0)(use_it);
    }
}

/// Which queue pair of which controller is to be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueName {
    /// Queue identifier; 0 is the admin queue.
    pub qid: u16,
    /// The controller, of an I/O queue.
    pub cntlid: u16,
}

/// Watches nothing: for pollers that never sleep.
#[derive(Clone, Copy, Debug, Default)]
pub struct Polled;

impl Watches for Polled {
    fn watch(&mut self, _source: Source, _key: u64) -> io::Result<Option<WatchId>> {
        Ok(None)
    }

    fn unwatch(&mut self, _watch: WatchId) {}
}

/// Watches for one poller of a reactor, which passes on what it is told.
#[derive(Debug)]
pub struct Watching<'a> {
    /// The reactor.
    pub cx: &'a mut Context,
    /// The poller.
    pub poller: PollerId,
}

impl Watches for Watching<'_> {
    fn watch(&mut self, source: Source, key: u64) -> io::Result<Option<WatchId>> {
        self.cx.watch(self.poller, source, key).map(Some)
    }

    fn unwatch(&mut self, watch: WatchId) {
        self.cx.unwatch(watch);
    }

    fn context(&mut self) -> Option<&mut Context> {
        Some(self.cx)
    }
}

/// A queue pair and its watch.
pub(super) struct Link {
    qpair: Box<dyn Qpair>,
    key: u64,
    offered: bool,
    watch: Option<WatchId>,
}

impl Link {
    /// Over a queue pair that is offered to be watched under `key` when it is polled first.
    pub fn new(qpair: Box<dyn Qpair>, key: u64) -> Link {
        Link { qpair, key, offered: false, watch: None }
    }

    /// As [`Qpair::poll`], and watches the queue pair if it is new.
    pub fn poll(&mut self, watches: &mut dyn Watches, done: &mut Vec<Completion>) -> Result<bool, String> {
        if !self.qpair.is_ready() {
            self.qpair.prepare(watches.context())?;
        }
        if self.qpair.is_announced() {
            self.offered = true;
        }
        if !self.offered && self.qpair.is_watchable() {
            self.offered = true;
            let watched = watches.watch(self.qpair.source(), self.key);
            self.watch = watched.map_err(|error| format!("the connection cannot be watched: {error}"))?;
            if self.watch.is_some() {
                self.qpair.set_watched();
            }
        }
        self.qpair.poll(done)
    }

    /// As [`Qpair::close`], and ends the watch.
    pub fn close(&mut self, watches: &mut dyn Watches, lost: &mut dyn FnMut(u64, Buffers)) {
        if let Some(watch) = self.watch.take() {
            watches.unwatch(watch);
        }
        self.qpair.close(lost);
    }

    /// Whether polling it can do something.
    pub fn has_work(&self) -> bool {
        !self.offered || self.qpair.has_work()
    }
}

impl std::ops::Deref for Link {
    type Target = dyn Qpair;
    fn deref(&self) -> &Self::Target {
        &*self.qpair
    }
}

impl std::ops::DerefMut for Link {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut *self.qpair
    }
}

/// A kind of transport, as the host uses it.
pub trait Transport: Send + Sync {
    /// Which.
    fn kind(&self) -> TransportKind;

    /// Whether this machine has what it takes.
    ///
    /// # Errors
    /// What is missing, and how to get it.
    fn check(&self) -> io::Result<()> {
        Ok(())
    }

    /// What connects to `address`, with digests of headers and of data where the transport has them.
    fn connector(&self, address: SocketAddr, digests: (bool, bool)) -> Arc<dyn Connector>;
}

/// The transports that a host has.
pub type Transports = Vec<Arc<dyn Transport>>;

/// Makes queue pairs to one controller, on any thread.
pub trait Connector: Send + Sync {
    /// Starts to set a queue pair up, which is `queue`, that can have `slots` commands outstanding.
    ///
    /// # Errors
    /// When the host refuses at once.
    fn connect(&self, slots: u16, queue: QueueName) -> io::Result<Box<dyn Qpair>>;

    /// In-capsule data that Connect and admin commands may carry, bytes.
    fn admin_in_capsule_bytes(&self) -> u32;
}
