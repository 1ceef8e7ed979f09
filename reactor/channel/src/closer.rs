//! One thread that closes what blocks while it closes.
//!
//! Every socket that needs it holds a [`Permit`] from its opening on, which is a place in the queue; so closing never waits
//! and never fails, and the number of permits bounds the sockets.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Default)]
struct State {
    queue: VecDeque<Box<dyn Send>>,
    /// Permits given out, the ones of what is in the queue included.
    out: usize,
    abandoned: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    limit: usize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.lock();
        loop {
            if let Some(what) = state.queue.pop_front() {
                drop(state);
                drop(what);
                state = self.lock();
                state.out -= 1;
                self.changed.notify_all();
            } else if state.abandoned && state.out == 0 {
                return;
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// The thread and its queue. When this is dropped, the thread ends with the last permit.
pub struct Closer {
    shared: Arc<Shared>,
}

/// Leave to have one socket open.
pub struct Permit {
    shared: Arc<Shared>,
    used: bool,
}

impl Closer {
    /// A thread for at most `limit` sockets.
    ///
    /// # Errors
    /// When the host refuses the thread.
    pub fn new(limit: usize) -> io::Result<Closer> {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), limit });
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new().name("channel-closer".into()).spawn(move || of_thread.run())?;
        Ok(Closer { shared })
    }

    /// Leave for one more socket; `None` while all are out.
    pub fn permit(&self) -> Option<Permit> {
        let mut state = self.shared.lock();
        if state.out == self.shared.limit {
            return None;
        }
        state.out += 1;
        Some(Permit { shared: Arc::clone(&self.shared), used: false })
    }

    /// Waits until nothing is open or being closed any more.
    pub fn wait_idle(&self) {
        let mut state = self.shared.lock();
        while state.out > 0 {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Permit {
    /// Drops `what` on the thread. Does not wait.
    pub fn close(mut self, what: Box<dyn Send>) {
        self.used = true;
        self.shared.lock().queue.push_back(what);
        self.shared.changed.notify_all();
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if !self.used {
            self.shared.lock().out -= 1;
            self.shared.changed.notify_all();
        }
    }
}

impl Drop for Closer {
    fn drop(&mut self) {
        self.shared.lock().abandoned = true;
        self.shared.changed.notify_all();
    }
}

impl fmt::Debug for Closer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Closer").field("open", &self.shared.lock().out).field("limit", &self.shared.limit).finish()
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Permit")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// Blocks while it is dropped, as closing an rsocket does, until it is let go.
    struct Slow(mpsc::Receiver<()>, mpsc::Sender<std::thread::ThreadId>);

    impl Drop for Slow {
        fn drop(&mut self) {
            let _ = self.0.recv();
            let _ = self.1.send(std::thread::current().id());
        }
    }

    #[test]
    fn closing_does_not_wait_and_happens_elsewhere() {
        let closer = Closer::new(2).unwrap();
        let (let_go, gate) = mpsc::channel();
        let (done, closed) = mpsc::channel();
        closer.permit().unwrap().close(Box::new(Slow(gate, done)));
        // The one being closed still counts.
        let second = closer.permit().unwrap();
        assert!(closer.permit().is_none());
        drop(second);
        let third = closer.permit().unwrap();
        let_go.send(()).unwrap();
        assert_ne!(closed.recv().unwrap(), std::thread::current().id());
        drop(third);
        closer.wait_idle();
    }

    #[test]
    fn what_is_open_is_closed_after_the_closer_is_gone() {
        let closer = Closer::new(1).unwrap();
        let permit = closer.permit().unwrap();
        drop(closer);
        let (let_go, gate) = mpsc::channel();
        let (done, closed) = mpsc::channel();
        permit.close(Box::new(Slow(gate, done)));
        let_go.send(()).unwrap();
        closed.recv().unwrap();
    }
}
