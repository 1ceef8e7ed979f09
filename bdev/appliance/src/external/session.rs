//! One process's time as the server of a device: its memory, its doorbells, its end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, socketpair};

use super::memory::Memory;
use super::ring::{Consumer, Producer};
use super::wire::{self, Message, Welcome};
use crate::layout::{COMPLETION_WORDS, SUBMISSION_WORDS, Shape};

/// The target's ends of a lane's rings. Their positions go on when the reactor closes and opens its channel.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) submissions: Producer<{ SUBMISSION_WORDS - 1 }>,
    pub(super) completions: Consumer<{ COMPLETION_WORDS - 1 }>,
}

impl Ends {
    fn new(shape: &Shape) -> Ends {
        Ends {
            submissions: Producer::new(shape.submissions(), shape.depth()),
            completions: Consumer::new(shape.completions(), shape.depth()),
        }
    }
}

#[derive(Debug)]
pub(super) struct SessionLane {
    /// The target's end of the process's doorbell.
    bell: OwnedFd,
    /// `None` while the reactor's channel has them.
    pub(super) ends: Mutex<Option<Ends>>,
}

impl SessionLane {
    /// Wakes the process. One whose doorbell is full of rings will wake anyway.
    pub(super) fn ring(&self) {
        let _ = rustix::net::send(&self.bell, &[1], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}

/// A process, its memory and its lanes.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) memory: Arc<Memory>,
    pub(super) lanes: Vec<SessionLane>,
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
        let mut lanes = Vec::new();
        for (index, target_bell) in target_bells.iter().enumerate() {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let (bell, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            let message = Message::Lane { index: index as u32 };
            wire::send(&socket, &message, &[target_bell.as_fd(), theirs.as_fd()])?;
            lanes.push(SessionLane { bell, ends: Mutex::new(Some(Ends::new(&shape))) });
        }
        Ok(Session { memory: Arc::new(memory), lanes, socket, ended: AtomicBool::new(false) })
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

    /// Takes the ends of a lane; `None` when a channel has them already.
    pub(super) fn take_ends(&self, lane: u32) -> Option<Ends> {
        self.lanes[lane as usize].ends.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Gives them back.
    pub(super) fn put_ends(&self, lane: u32, ends: Ends) {
        *self.lanes[lane as usize].ends.lock().unwrap_or_else(PoisonError::into_inner) = Some(ends);
    }
}
