//! Bounded message queue into a reactor: closures from the control plane and from other reactors.
//!
//! Not a data path: a message allocates. It may come from any thread; it runs on the reactor, between polls.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use crossbeam_queue::ArrayQueue;

use crate::park::Waker;
use crate::reactor::Context;

/// A closure to run on a reactor.
pub type Message = Box<dyn FnOnce(&mut Context) + Send>;

/// Messages that may wait in one mailbox.
pub const CAPACITY: usize = 4096;

/// The mailbox has no room; the message comes back.
pub struct Full(pub Message);

impl std::fmt::Debug for Full {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Full")
    }
}

/// The queue and the waker of the reactor behind it.
#[derive(Clone)]
pub struct Mailbox {
    queue: Arc<ArrayQueue<Message>>,
    closed: Arc<AtomicBool>,
    waker: Waker,
}

impl Mailbox {
    /// An empty mailbox of [`CAPACITY`] messages.
    pub fn new(waker: Waker) -> Mailbox {
        Mailbox { queue: Arc::new(ArrayQueue::new(CAPACITY)), closed: Arc::default(), waker }
    }

    /// Queues `message` and wakes the reactor if it sleeps. When the reactor is gone the message is dropped, which
    /// answers whoever waits for it.
    ///
    /// # Errors
    /// [`Full`] with the message when the reactor has not kept up.
    pub fn send(&self, message: Message) -> Result<(), Full> {
        self.queue.push(message).map_err(Full)?;
        // Either this sees that the reactor is gone, or `close` comes later and sees the message.
        fence(Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) {
            self.drain();
        }
        self.waker.wake();
        Ok(())
    }

    /// The reactor goes: drops what waits and whatever comes from now on.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.drain();
    }

    fn drain(&self) {
        while let Some(message) = self.pop() {
            drop(message);
        }
    }

    pub(crate) fn pop(&self) -> Option<Message> {
        self.queue.pop()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

impl std::fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mailbox").field("waiting", &self.queue.len()).finish()
    }
}
