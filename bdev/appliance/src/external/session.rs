//! One process's time as the server of a device: its memory, its doorbells, its end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::link::{Bell, Gift, Link, PipeEnd, Relay};
use super::memory::Memory;
use super::ring::{Consumer, Producer};
use super::wire::{self, Message, Welcome};
use crate::layout::{COMPLETION_WORDS, SUBMISSION_WORDS, Shape};

/// The target's ends of the rings between a lane and a worker. Their positions go on when the reactor closes and opens its
/// channel.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) submissions: Producer<{ SUBMISSION_WORDS - 1 }>,
    pub(super) completions: Consumer<{ COMPLETION_WORDS - 1 }>,
}

impl Ends {
    fn new(shape: &Shape, worker: u32) -> Ends {
        Ends {
            submissions: Producer::new(shape.submissions(worker), shape.depth()),
            completions: Consumer::new(shape.completions(worker), shape.depth()),
        }
    }
}

/// A process, its memory, its lanes and its workers.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) memory: Arc<Memory>,
    /// By lane, and in it by worker; `None` while the reactor's channel has them.
    lanes: Vec<Mutex<Option<Vec<Ends>>>>,
    /// By worker.
    bells: Vec<Bell>,
    link: Link,
    ended: AtomicBool,
}

impl Session {
    /// Makes the memory and doorbells of a session and passes them to the process at `link`, with `welcome`.
    ///
    /// # Errors
    /// When the host is out of descriptors or memory, or the process does not take what it is sent.
    pub(super) fn open(link: Link, welcome: Welcome, target_bells: &[Bell]) -> io::Result<Session> {
        let shape = welcome.shape;
        let (memory, bells) = match &link {
            Link::Socket(socket) => Session::over_socket(socket, welcome, target_bells)?,
            Link::Pipe(end) => Session::over_pipe(end, welcome, target_bells)?,
        };
        let ends = |_| Mutex::new(Some((0..shape.workers()).map(|worker| Ends::new(&shape, worker)).collect()));
        let lanes = (0..shape.lanes()).map(ends).collect();
        Ok(Session { memory, lanes, bells, link, ended: AtomicBool::new(false) })
    }

    fn over_socket(socket: &OwnedFd, welcome: Welcome, target_bells: &[Bell]) -> io::Result<(Arc<Memory>, Vec<Bell>)> {
        let shape = welcome.shape;
        let (memory, file) = Memory::create(shape)?;
        wire::send(socket, &Message::Welcome(welcome), &[file.as_fd()])?;
        let fd = |bell: &Bell| match bell {
            Bell::Event(fd) | Bell::Socket(fd) => Arc::clone(fd),
            Bell::Relay(_) => unreachable!("a target that listens at a socket has descriptors for doorbells"),
        };
        let events: Vec<_> = target_bells.iter().map(fd).collect();
        let fds: Vec<_> = events.iter().map(|fd| fd.as_fd()).collect();
        wire::send(socket, &Message::Lanes { count: shape.lanes() }, &fds)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = |_| socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let (ours, theirs): (Vec<_>, Vec<_>) =
            (0..shape.workers()).map(pair).collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        let fds: Vec<_> = theirs.iter().map(AsFd::as_fd).collect();
        wire::send(socket, &Message::Workers { count: shape.workers() }, &fds)?;
        Ok((Arc::new(memory), ours.into_iter().map(|fd| Bell::Socket(Arc::new(fd))).collect()))
    }

    fn over_pipe(end: &PipeEnd, welcome: Welcome, target_bells: &[Bell]) -> io::Result<(Arc<Memory>, Vec<Bell>)> {
        let shape = welcome.shape;
        let memory = Arc::new(Memory::heap(shape));
        end.send(Message::Welcome(welcome), Gift::Memory(Arc::clone(&memory)))?;
        let relay = |bell: &Bell| match bell {
            Bell::Relay(relay) => Arc::clone(relay),
            Bell::Event(_) | Bell::Socket(_) => unreachable!("a target inside this process has no descriptors"),
        };
        let relays = target_bells.iter().map(relay).collect();
        end.send(Message::Lanes { count: shape.lanes() }, Gift::Bells(relays))?;
        let relays: Vec<_> = (0..shape.workers()).map(|_| Arc::new(Relay::default())).collect();
        let bells = relays.iter().map(|relay| Bell::Relay(Arc::clone(relay))).collect();
        end.send(Message::Workers { count: shape.workers() }, Gift::Bells(relays))?;
        Ok((memory, bells))
    }

    /// Wakes a worker of the process. One whose doorbell is full of rings will wake anyway.
    pub(super) fn ring(&self, worker: usize) {
        self.bells[worker].ring();
    }

    /// Where messages go.
    pub(super) fn link(&self) -> &Link {
        &self.link
    }

    /// Ends the session from any thread: the connection is cut, which whoever watches it notices.
    pub(super) fn end(&self) {
        if !self.ended.swap(true, Ordering::AcqRel) {
            self.link.end();
        }
    }

    fn lane(&self, lane: u32) -> MutexGuard<'_, Option<Vec<Ends>>> {
        self.lanes[lane as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the ends of a lane, by worker; `None` when a channel has them already.
    pub(super) fn take_ends(&self, lane: u32) -> Option<Vec<Ends>> {
        self.lane(lane).take()
    }

    /// Gives them back.
    pub(super) fn put_ends(&self, lane: u32, ends: Vec<Ends>) {
        *self.lane(lane) = Some(ends);
    }
}
