//! Readiness and sleeping: what a reactor watches, how it sleeps and how others wake it.
//!
//! The wake-up protocol has two sides. A sleeper announces itself in [`Waker::announce`], looks at all of its queues
//! once more, and only then blocks. A producer publishes its value and then calls [`Waker::wake`], which costs one
//! load when the reactor is awake. Both the announcement and the publication are sequentially consistent, so at least
//! one of the two sees the other; a wake-up is never lost, and nobody is woken who is already awake.

use std::fmt;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering, fence};

use rustix::event::{EventfdFlags, epoll, eventfd};

/// What can be watched for readiness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// A file descriptor of this process, owned by the object that reports it.
    Fd(RawFd),
    /// A socket of a simulated world.
    Virtual(u64),
}

/// Readiness of one source since it was last reported. Edge-triggered: after a report, read (or write) until
/// `WouldBlock` or a short count; a short count is no end of reading once [`ended`](Self::ended) was reported, because
/// the end of the stream that follows it is not reported again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// The token given to [`Parker::watch`].
    pub token: u64,
    /// Bytes, an end of stream, an error or a connection to accept may be there.
    pub readable: bool,
    /// Room to send may be there.
    pub writable: bool,
    /// The peer has ended its side of the stream, or the stream has failed.
    pub ended: bool,
}

/// One reactor's readiness set and the place where it sleeps.
pub trait Parker {
    /// Reports edges of `source` under `token` from now on. An edge that is already there is reported.
    ///
    /// # Errors
    /// When the operating system refuses (out of memory or of watches).
    fn watch(&mut self, source: Source, token: u64) -> io::Result<()>;

    /// Stops reporting. Must be called before the source is closed.
    fn unwatch(&mut self, source: Source);

    /// Appends what is ready to `out`, blocking up to `timeout` (`None`: until woken) while nothing is.
    ///
    /// # Errors
    /// Only for faults of the host; interruption by a signal is not one.
    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Ready>) -> io::Result<()>;

    /// Gives the processor away for `time`, whatever becomes ready meanwhile.
    fn pause(&mut self, time: Duration);

    /// What ends a `wait` from another thread.
    fn unparker(&self) -> Arc<dyn Unpark>;
}

/// Ends a [`Parker::wait`] that blocks, or the next one.
pub trait Unpark: Send + Sync {
    /// Wakes the sleeper.
    fn unpark(&self);
}

/// Wakes one reactor, if it sleeps.
#[derive(Clone)]
pub struct Waker {
    inner: Arc<WakerInner>,
}

/// Alone in its cache line: everybody who publishes something looks at it.
#[repr(align(64))]
struct WakerInner {
    sleeping: AtomicBool,
    unparker: Arc<dyn Unpark>,
}

impl Waker {
    /// A waker for the sleeper behind `unparker`.
    pub fn new(unparker: Arc<dyn Unpark>) -> Waker {
        Waker { inner: Arc::new(WakerInner { sleeping: AtomicBool::new(false), unparker }) }
    }

    /// Wakes the reactor if it sleeps. Call after publishing what it is to find.
    #[inline]
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.inner.sleeping.load(Ordering::Relaxed) {
            self.wake_slow();
        }
    }

    /// As [`Waker::wake`], for callers whose publication was itself a sequentially consistent read-modify-write (such
    /// as a push into a [`ring`](crate::ring)).
    #[inline]
    pub fn wake_after_rmw(&self) {
        // The model checker takes sequentially consistent accesses for weaker ones; only a fence is one to it.
        #[cfg(loom)]
        fence(Ordering::SeqCst);
        if self.inner.sleeping.load(Ordering::SeqCst) {
            self.wake_slow();
        }
    }

    #[cold]
    fn wake_slow(&self) {
        // Whoever clears the flag makes the system call; the others leave it.
        if self.inner.sleeping.swap(false, Ordering::SeqCst) {
            self.inner.unparker.unpark();
        }
    }

    /// The sleeper says that it is about to block. It must look at its queues once more after this.
    pub fn announce(&self) {
        // An exchange rather than a store, so that it is ordered after every earlier exchange by a waker; on most
        // machines they are the same instruction.
        self.inner.sleeping.swap(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The sleeper is awake again.
    pub fn retract(&self) {
        self.inner.sleeping.store(false, Ordering::Relaxed);
    }
}

impl fmt::Debug for Waker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waker").field("sleeping", &self.inner.sleeping).finish()
    }
}

const WAKE_TOKEN: u64 = u64::MAX;
const EVENTS_PER_WAIT: usize = 128;

struct EventFd(OwnedFd);

impl Unpark for EventFd {
    fn unpark(&self) {
        // The counter cannot overflow: the sleeper resets it each time. Nothing else can fail on an open eventfd.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// The epoll implementation: sockets, the io_uring descriptor and an eventfd in one edge-triggered set.
pub struct EpollParker {
    epoll: OwnedFd,
    wake: Arc<EventFd>,
    events: Vec<epoll::Event>,
    /// The host was asked to keep this thread's timers to the point.
    exact: bool,
}

impl EpollParker {
    /// An empty set.
    ///
    /// # Errors
    /// When the process is out of descriptors or memory.
    pub fn new() -> io::Result<EpollParker> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE_TOKEN), flags)?;
        Ok(EpollParker {
            epoll,
            wake: Arc::new(EventFd(wake)),
            events: Vec::with_capacity(EVENTS_PER_WAIT),
            exact: false,
        })
    }

    /// Borrows a descriptor that its owner reported as a [`Source`].
    fn borrow(source: Source) -> io::Result<BorrowedFd<'static>> {
        match source {
            // SAFETY: the contract of `watch`/`unwatch` is that the source's owner keeps it open between the two; the
            // borrow ends within the system call.
            Source::Fd(fd) if fd >= 0 => Ok(unsafe { BorrowedFd::borrow_raw(fd) }),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "not a descriptor of this process")),
        }
    }
}

impl Parker for EpollParker {
    fn watch(&mut self, source: Source, token: u64) -> io::Result<()> {
        let fd = EpollParker::borrow(source)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), flags)?)
    }

    fn unwatch(&mut self, source: Source) {
        if let Ok(fd) = EpollParker::borrow(source) {
            // Not being in the set is what was asked for.
            let _ = epoll::delete(&self.epoll, fd);
        }
    }

    fn wait(&mut self, timeout: Option<Duration>, out: &mut Vec<Ready>) -> io::Result<()> {
        let timespec = timeout.map(|t| rustix::event::Timespec {
            tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: t.subsec_nanos().into(),
        });
        self.events.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.events), timespec.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
        for event in &self.events {
            let (data, flags) = (event.data, event.flags);
            if data.u64() == WAKE_TOKEN {
                let mut count = [0; 8];
                let _ = rustix::io::read(self.wake.0.as_fd(), &mut count);
                continue;
            }
            let gone = flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
            out.push(Ready {
                token: data.u64(),
                readable: gone || flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::RDHUP),
                writable: gone || flags.contains(epoll::EventFlags::OUT),
                ended: gone || flags.contains(epoll::EventFlags::RDHUP),
            });
        }
        Ok(())
    }

    fn pause(&mut self, time: Duration) {
        if !self.exact {
            self.exact = true;
            // The host adds 50 us to each pause otherwise; where it refuses, pauses are that much longer.
            let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        }
        std::thread::sleep(time);
    }

    fn unparker(&self) -> Arc<dyn Unpark> {
        Arc::clone(&self.wake) as Arc<dyn Unpark>
    }
}

impl fmt::Debug for EpollParker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EpollParker").field("fd", &self.epoll.as_raw_fd()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn an_unpark_before_the_wait_is_not_lost() {
        let mut parker = EpollParker::new().unwrap();
        parker.unparker().unpark();
        let mut out = Vec::new();
        parker.wait(None, &mut out).unwrap();
        assert!(out.is_empty());
    }

    #[test]
    fn edges_are_reported_once_with_their_token() {
        let mut parker = EpollParker::new().unwrap();
        let (mut a, b) = UnixStream::pair().unwrap();
        parker.watch(Source::Fd(b.as_raw_fd()), 42).unwrap();
        let mut out = Vec::new();
        parker.wait(Some(Duration::ZERO), &mut out).unwrap();
        assert_eq!(out, [Ready { token: 42, readable: false, writable: true, ended: false }]);
        a.write_all(b"x").unwrap();
        out.clear();
        parker.wait(None, &mut out).unwrap();
        assert!(out[0].readable && !out[0].ended);
        out.clear();
        parker.wait(Some(Duration::ZERO), &mut out).unwrap();
        assert!(out.is_empty());
        parker.unwatch(Source::Fd(b.as_raw_fd()));
        a.write_all(b"y").unwrap();
        parker.wait(Some(Duration::ZERO), &mut out).unwrap();
        assert!(out.is_empty());
    }

    #[test]
    fn an_end_behind_bytes_is_reported_with_them() {
        let mut parker = EpollParker::new().unwrap();
        let (mut a, b) = UnixStream::pair().unwrap();
        parker.watch(Source::Fd(b.as_raw_fd()), 42).unwrap();
        a.write_all(b"x").unwrap();
        a.shutdown(std::net::Shutdown::Write).unwrap();
        let mut out = Vec::new();
        parker.wait(None, &mut out).unwrap();
        assert!(out[0].readable && out[0].ended);
    }

    #[test]
    fn a_virtual_source_is_refused() {
        assert!(EpollParker::new().unwrap().watch(Source::Virtual(1), 0).is_err());
    }

    #[test]
    fn only_a_sleeper_is_woken() {
        struct Count(std::sync::atomic::AtomicU32);
        impl Unpark for Count {
            fn unpark(&self) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let count = Arc::new(Count(Default::default()));
        let waker = Waker::new(Arc::clone(&count) as Arc<dyn Unpark>);
        waker.wake();
        assert_eq!(count.0.load(Ordering::Relaxed), 0);
        waker.announce();
        waker.wake();
        waker.wake_after_rmw();
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
    }
}
