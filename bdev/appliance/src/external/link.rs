//! What joins target and process: a connection and doorbells, of the operating system or inside one process.
//!
//! The second kind has no descriptors: its memory is on the heap, and a doorbell is the waker of the reactor behind it.
//! With it the same lanes, rings, workers and sessions run in a simulator; see [`dock`](super::dock).

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use reactor::park::Waker;
use rustix::net::{SendFlags, Shutdown};

use super::memory::Memory;
use super::wire::{self, Message, Received};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A doorbell inside one process: whoever is behind it says what wakes it.
#[derive(Debug, Default)]
pub(crate) struct Relay(Mutex<Option<Waker>>);

impl Relay {
    /// From now on rings wake whoever is behind `waker`; `None`: nobody.
    pub(crate) fn set(&self, waker: Option<Waker>) {
        *lock(&self.0) = waker;
    }
}

/// Wakes the other side. One that is gone, or has been rung very often, is not woken, which harms nobody.
#[derive(Clone, Debug)]
pub(crate) enum Bell {
    /// An eventfd.
    Event(Arc<OwnedFd>),
    /// One end of a pair of stream sockets.
    Socket(Arc<OwnedFd>),
    Relay(Arc<Relay>),
}

impl Bell {
    /// Rings. Never blocks, whatever the other side does to its end: see [`wire`].
    pub(crate) fn ring(&self) {
        match self {
            Bell::Event(fd) => drop(rustix::io::write(&**fd, &1u64.to_ne_bytes())),
            Bell::Socket(fd) => drop(rustix::net::send(&**fd, &[1], SendFlags::DONTWAIT | SendFlags::NOSIGNAL)),
            Bell::Relay(relay) => {
                if let Some(waker) = &*lock(&relay.0) {
                    waker.wake();
                }
            }
        }
    }
}

/// What travels with a message inside one process, where descriptors would otherwise.
#[derive(Debug)]
pub(crate) enum Gift {
    Nothing,
    Memory(Arc<Memory>),
    Bells(Vec<Arc<Relay>>),
}

/// Messages that an end of a [`pipe`] holds at most.
const PIPE_MESSAGES: usize = 64;

#[derive(Debug, Default)]
struct Pipe {
    /// What the end of this index has not received.
    queues: [VecDeque<(Message, Gift)>; 2],
    closed: bool,
}

/// One end of a connection inside one process.
#[derive(Debug)]
pub(crate) struct PipeEnd {
    pipe: Arc<Mutex<Pipe>>,
    side: usize,
}

/// Both ends of a connection inside one process.
pub(crate) fn pipe() -> [PipeEnd; 2] {
    let pipe = Arc::new(Mutex::new(Pipe::default()));
    [0, 1].map(|side| PipeEnd { pipe: Arc::clone(&pipe), side })
}

impl PipeEnd {
    /// As [`wire::send`].
    pub(crate) fn send(&self, message: Message, gift: Gift) -> io::Result<()> {
        let mut pipe = lock(&self.pipe);
        if pipe.closed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let queue = &mut pipe.queues[1 - self.side];
        if queue.len() == PIPE_MESSAGES {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // What goes over a socket goes through its encoding here too.
        let message = Message::decode(&message.encode()).expect("a message survives its encoding");
        queue.push_back((message, gift));
        Ok(())
    }

    /// The next message; `Err`: the connection has ended; `Ok(None)`: nothing yet.
    pub(crate) fn receive(&self) -> Result<Option<(Message, Gift)>, ()> {
        let mut pipe = lock(&self.pipe);
        match pipe.queues[self.side].pop_front() {
            Some(received) => Ok(Some(received)),
            None if pipe.closed => Err(()),
            None => Ok(None),
        }
    }

    fn close(&self) {
        lock(&self.pipe).closed = true;
    }
}

impl Drop for PipeEnd {
    fn drop(&mut self) {
        self.close();
    }
}

/// The target's end of the connection with a process.
#[derive(Debug)]
pub(crate) enum Link {
    Socket(OwnedFd),
    Pipe(PipeEnd),
}

impl Link {
    /// Sends a message without anything else. Never waits.
    ///
    /// # Errors
    /// As [`wire::send`].
    pub(crate) fn send(&self, message: Message) -> io::Result<()> {
        match self {
            Link::Socket(socket) => wire::send(socket, &message, &[]),
            Link::Pipe(end) => end.send(message, Gift::Nothing),
        }
    }

    /// The next message; what comes with it is let go.
    ///
    /// # Errors
    /// As [`wire::receive`].
    pub(crate) fn receive(&self) -> io::Result<Received> {
        match self {
            Link::Socket(socket) => wire::receive(socket, false),
            Link::Pipe(end) => Ok(match end.receive() {
                Ok(Some((message, _))) => Received::Message(message, Vec::new()),
                Ok(None) => Received::Nothing,
                Err(()) => Received::End,
            }),
        }
    }

    /// Ends the connection, both ways.
    pub(crate) fn end(&self) {
        match self {
            Link::Socket(socket) => drop(rustix::net::shutdown(socket, Shutdown::Both)),
            Link::Pipe(end) => end.close(),
        }
    }
}
