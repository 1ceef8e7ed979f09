//! Threads that close what blocks while it closes.
//!
//! Every socket that needs it holds a [`Permit`] from its opening on, which is a place in the queue; so closing never waits
//! and never fails, and the number of permits bounds the sockets.
//!
//! One thread closes them one after the other. A close that takes longer than [`PATIENCE`] is left to its thread, and another
//! one goes on with the rest: librdmacm waits without an end for a peer that died while it was connected to.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long one close may keep the others waiting.
pub const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Default)]
struct State {
    queue: VecDeque<Box<dyn Send>>,
    /// Permits given out, the ones of what is in the queue and of what is being closed included.
    out: usize,
    /// Closes that have begun so far.
    begun: u64,
    /// When the last of them began, if it has not ended.
    last: Option<Instant>,
    /// Threads that wait for something to do, or will when they begin.
    idle: usize,
    abandoned: bool,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    limit: usize,
    patience: Duration,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more thread, which counts as idle.
    fn spawn(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let shared = Arc::clone(self);
        std::thread::Builder::new().name("channel-closer".into()).spawn(move || shared.run())?;
        state.idle += 1;
        Ok(())
    }

    fn run(self: &Arc<Self>) {
        let mut state = self.lock();
        state.idle -= 1;
        loop {
            let now = Instant::now();
            let held_up = state.last.map(|began| (began + self.patience).saturating_duration_since(now));
            if held_up.is_none_or(|left| left.is_zero())
                && let Some(what) = state.queue.pop_front()
            {
                state.begun += 1;
                let number = state.begun;
                state.last = Some(now);
                if state.idle == 0 {
                    // Without it, the rest waits for this close to end.
                    let _ = self.spawn(&mut state);
                }
                drop(state);
                drop(what);
                state = self.lock();
                state.out -= 1;
                if state.begun == number {
                    state.last = None;
                }
                self.changed.notify_all();
                // This one and another are enough: whoever was stuck has been replaced meanwhile.
                if state.idle > 1 {
                    return;
                }
            } else if state.abandoned && state.out == 0 {
                return;
            } else {
                state.idle += 1;
                state = match held_up.filter(|_| !state.queue.is_empty()) {
                    Some(left) => self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
                    None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                };
                state.idle -= 1;
            }
        }
    }
}

/// The threads and their queue. When this is dropped, they end with the last permit.
pub struct Closer {
    shared: Arc<Shared>,
}

/// Leave to have one socket open.
pub struct Permit {
    shared: Arc<Shared>,
    used: bool,
}

impl Closer {
    /// For at most `limit` sockets, which is also how many threads may be closing at most; two may wait.
    ///
    /// # Errors
    /// When the host refuses the first thread.
    pub fn new(limit: usize) -> io::Result<Closer> {
        Closer::with_patience(limit, PATIENCE)
    }

    fn with_patience(limit: usize, patience: Duration) -> io::Result<Closer> {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), limit, patience });
        shared.spawn(&mut shared.lock())?;
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

    /// Waits until nothing is open or being closed any more, or `limit` is over; how many still are.
    pub fn wait_idle(&self, limit: Duration) -> usize {
        let state = self.shared.lock();
        let waited = self.shared.changed.wait_timeout_while(state, limit, |state| state.out > 0);
        waited.unwrap_or_else(PoisonError::into_inner).0.out
    }
}

impl Permit {
    /// Drops `what` on a thread of the closer. Does not wait.
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

    /// Longer than any test.
    const LONG: Duration = Duration::from_secs(3600);

    /// Says that it was dropped.
    struct Noted(usize, Arc<Mutex<Vec<usize>>>);

    impl Drop for Noted {
        fn drop(&mut self) {
            self.1.lock().unwrap().push(self.0);
        }
    }

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
        assert_eq!(closer.wait_idle(Duration::ZERO), 2);
        let_go.send(()).unwrap();
        assert_ne!(closed.recv().unwrap(), std::thread::current().id());
        drop(third);
        assert_eq!(closer.wait_idle(LONG), 0);
    }

    #[test]
    fn one_that_takes_too_long_does_not_keep_the_others() {
        let closer = Closer::with_patience(3, Duration::ZERO).unwrap();
        let (done, closed) = mpsc::channel();
        let gates: Vec<_> = (0..3)
            .map(|_| {
                let (let_go, gate) = mpsc::channel();
                closer.permit().unwrap().close(Box::new(Slow(gate, done.clone())));
                let_go
            })
            .collect();
        // The last one ends while the two before it are stuck, and its place is free again.
        gates[2].send(()).unwrap();
        closed.recv().unwrap();
        while closer.shared.lock().out == 3 {
            std::thread::yield_now();
        }
        drop(closer.permit().unwrap());
        assert_eq!(closer.wait_idle(Duration::ZERO), 2);
        drop(gates);
        assert_eq!(closer.wait_idle(LONG), 0);
    }

    #[test]
    fn while_patience_lasts_one_thread_closes_in_order() {
        let closer = Closer::with_patience(8, LONG).unwrap();
        let (let_go, gate) = mpsc::channel();
        let (done, closed) = mpsc::channel();
        closer.permit().unwrap().close(Box::new(Slow(gate, done)));
        let order = Arc::<Mutex<Vec<usize>>>::default();
        for number in 0..7 {
            closer.permit().unwrap().close(Box::new(Noted(number, Arc::clone(&order))));
        }
        assert_eq!(closer.wait_idle(Duration::ZERO), 8);
        let_go.send(()).unwrap();
        closed.recv().unwrap();
        assert_eq!(closer.wait_idle(LONG), 0);
        assert_eq!(*order.lock().unwrap(), [0, 1, 2, 3, 4, 5, 6]);
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
