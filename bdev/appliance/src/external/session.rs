//! One process's time as the server of a device: its memory, its doorbells, its end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, socketpair};

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

/// The target's end of a worker's doorbell.
#[derive(Debug)]
struct Bell(OwnedFd);

/// A process, its memory, its lanes and its workers.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) memory: Arc<Memory>,
    /// By lane, and in it by worker; `None` while the reactor's channel has them.
    lanes: Vec<Mutex<Option<Vec<Ends>>>>,
    /// By worker.
    bells: Vec<Bell>,
    socket: OwnedFd,
    ended: AtomicBool,
}

impl Session {
    /// Makes the memory and doorbells of a session and passes them to the process at `socket`, with `welcome`.
    ///
    /// # Errors
    /// When the host is out of descriptors or memory, or the process does not take what it is sent.
    pub(super) fn open(socket: OwnedFd, welcome: Welcome, target_bells: &[OwnedFd]) -> io::Result<Session> {
        let shape = welcome.shape;
        let (memory, file) = Memory::create(shape)?;
        wire::send(&socket, &Message::Welcome(welcome), &[file.as_fd()])?;
        let fds: Vec<_> = target_bells.iter().map(AsFd::as_fd).collect();
        wire::send(&socket, &Message::Lanes { count: shape.lanes() }, &fds)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = |_| socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let (bells, theirs): (Vec<_>, Vec<_>) =
            (0..shape.workers()).map(pair).collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        let fds: Vec<_> = theirs.iter().map(AsFd::as_fd).collect();
        wire::send(&socket, &Message::Workers { count: shape.workers() }, &fds)?;
        let ends = |_| Mutex::new(Some((0..shape.workers()).map(|worker| Ends::new(&shape, worker)).collect()));
        Ok(Session {
            memory: Arc::new(memory),
            lanes: (0..shape.lanes()).map(ends).collect(),
            bells: bells.into_iter().map(Bell).collect(),
            socket,
            ended: AtomicBool::new(false),
        })
    }

    /// Wakes a worker of the process. One whose doorbell is full of rings will wake anyway.
    pub(super) fn ring(&self, worker: usize) {
        let _ = rustix::net::send(&self.bells[worker].0, &[1], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }

    /// Where messages go.
    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Ends the session from any thread: the connection is cut, which whoever watches it notices.
    pub(super) fn end(&self) {
        if !self.ended.swap(true, Ordering::AcqRel) {
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
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
