use super::*;
use crate::buffer::Region;
use crate::file::{FileEngine, Files};
use crate::net::{Network, OsNetwork};
use crate::park::{EpollParker, Unpark};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The host's parker and sockets under a clock that a test sets.
#[derive(Default)]
struct TestPlatform {
    clock: Arc<TestClock>,
    /// The parker, in place of the host's.
    journal: Mutex<Option<Journal>>,
}

#[derive(Default)]
struct TestClock(AtomicU64);

impl Clock for TestClock {
    fn now(&self) -> Instant {
        Instant(self.0.load(Ordering::Relaxed))
    }
}

impl Platform for TestPlatform {
    fn clock(&self) -> Arc<dyn Clock> {
        Arc::clone(&self.clock) as Arc<dyn Clock>
    }
    fn network(&self) -> Arc<dyn Network> {
        Arc::new(OsNetwork)
    }
    fn files(&self) -> Arc<dyn Files> {
        unreachable!("these tests open no files")
    }
    fn parker(&self) -> io::Result<Box<dyn Parker>> {
        match self.journal.lock().unwrap().take() {
            Some(journal) => Ok(Box::new(journal)),
            None => Ok(Box::new(EpollParker::new()?)),
        }
    }
    fn file_engine(&self, _: Region, _: &mut dyn Parker) -> io::Result<Box<dyn FileEngine>> {
        unreachable!("these tests open no files")
    }
    fn random(&self, bytes: &mut [u8]) {
        bytes.fill(4);
    }
    fn pin(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
}

fn config(id: u32, policy: PollPolicy) -> ReactorConfig {
    ReactorConfig { id: ReactorId(id), core: None, policy }
}

fn single() -> (Reactor, Arc<TestClock>) {
    let platform = TestPlatform::default();
    let clock = Arc::clone(&platform.clock);
    let mut reactor = Reactor::new(config(0, PollPolicy::default()), Arc::new(platform)).unwrap();
    let group = vec![reactor.handle()];
    reactor.join_group(group);
    (reactor, clock)
}

/// A parker whose pauses and sleeps take the clock on, and are written down.
struct Journal {
    clock: Arc<TestClock>,
    pauses_us: Arc<Mutex<Vec<u64>>>,
    asleep: Arc<AtomicBool>,
}

impl Parker for Journal {
    fn watch(&mut self, _: Source, _: u64) -> io::Result<()> {
        unreachable!("nothing is watched")
    }
    fn unwatch(&mut self, _: Source) {}
    fn wait(&mut self, timeout: Option<Duration>, _: &mut Vec<Ready>) -> io::Result<()> {
        self.asleep.fetch_or(timeout != Some(Duration::ZERO), Ordering::Relaxed);
        Ok(())
    }
    fn pause(&mut self, time: Duration) {
        self.clock.0.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
        self.pauses_us.lock().unwrap().push(time.as_micros() as u64);
    }
    fn unparker(&self) -> Arc<dyn Unpark> {
        Arc::new(NobodyParks)
    }
}

struct NobodyParks;

impl Unpark for NobodyParks {
    fn unpark(&self) {}
}

/// Works for a number of steps, and ends the reactor once it has slept.
struct UntilAsleep(Countdown, Arc<AtomicBool>);

impl Poller for UntilAsleep {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        if self.1.load(Ordering::Relaxed) {
            cx.stop();
        }
        self.0.poll(cx)
    }
}

#[test]
fn a_reactor_that_coalesces_pauses_between_looks_and_sleeps_when_nothing_comes_any_more() {
    let clock = Arc::new(TestClock::default());
    let (pauses_us, asleep) = (Arc::<Mutex<Vec<u64>>>::default(), Arc::<AtomicBool>::default());
    let journal = Journal { clock: Arc::clone(&clock), pauses_us: Arc::clone(&pauses_us), asleep: Arc::clone(&asleep) };
    let platform = TestPlatform { clock, journal: Mutex::new(Some(journal)) };
    let policy = PollPolicy::Coalesce { gap: Duration::from_micros(300) };
    let mut reactor = Reactor::new(config(0, policy), Arc::new(platform)).unwrap();
    let group = vec![reactor.handle()];
    reactor.join_group(group);
    let cx = reactor.context();
    cx.add_poller("timed", Schedule::Every(Duration::from_micros(400)), Box::new(Countdown(0)));
    cx.add_poller("work", Schedule::Active, Box::new(UntilAsleep(Countdown(3), asleep)));
    reactor.run().unwrap();
    // The pollers work from 300 us on. No pause passes the timed one's turn, and a millisecond after the last work there are
    // no more of them.
    assert_eq!(*pauses_us.lock().unwrap(), [300, 100, 300, 100, 300, 100, 300]);
    assert_eq!(reactor.context().stats().sleeps, 1);
}

struct Countdown(u32);

impl Poller for Countdown {
    fn poll(&mut self, _: &mut Context) -> Progress {
        let busy = self.0 > 0;
        self.0 = self.0.saturating_sub(1);
        Progress::from_busy(busy)
    }
    fn may_sleep(&mut self, _: &mut Context) -> bool {
        self.0 == 0
    }
}

#[test]
fn pollers_report_busy_and_idle() {
    let (mut reactor, _) = single();
    let id = reactor.context().add_poller("count", Schedule::Active, Box::new(Countdown(2)));
    assert_eq!(reactor.step(), Progress::Idle);
    assert!(!reactor.may_sleep());
    assert_eq!(reactor.step(), Progress::Busy);
    assert_eq!(reactor.step(), Progress::Busy);
    assert_eq!(reactor.step(), Progress::Idle);
    assert!(reactor.may_sleep());
    let stats = reactor.context().stats();
    assert_eq!((stats.pollers[0].run_count, stats.pollers[0].busy_count), (3, 2));
    reactor.context().remove_poller(id);
    reactor.step();
    assert!(reactor.context().stats().pollers.is_empty());
}

#[test]
fn timed_pollers_run_once_a_period_and_bound_the_sleep() {
    let (mut reactor, clock) = single();
    let period = Duration::from_millis(5);
    reactor.context().add_poller("timed", Schedule::Every(period), Box::new(Countdown(9)));
    reactor.step();
    assert_eq!(reactor.next_deadline(), Some(Instant(5_000_000)));
    assert_eq!(reactor.step(), Progress::Idle);
    clock.0.store(5_000_000, Ordering::Relaxed);
    assert_eq!(reactor.step(), Progress::Busy);
    assert_eq!(reactor.step(), Progress::Idle);
    assert_eq!(reactor.next_deadline(), Some(Instant(10_000_000)));
}

#[test]
fn messages_run_on_the_reactor_and_answer() {
    let (mut reactor, _) = single();
    assert_eq!(current(), None);
    let handle = reactor.handle();
    let call = std::thread::spawn(move || futures_executor(handle.call(|cx| (cx.id(), current()))));
    while !call.is_finished() {
        reactor.step();
    }
    assert_eq!(call.join().unwrap(), Ok((ReactorId(0), Some(ReactorId(0)))));
}

#[test]
fn a_stopped_reactor_answers_gone() {
    let (reactor, _) = single();
    let call = reactor.handle().call(|_| ());
    let waiting = std::thread::spawn(move || futures_executor(call));
    while reactor.handle().mailbox.is_empty() {
        std::thread::yield_now();
    }
    let handle = reactor.handle();
    drop(reactor);
    assert_eq!(waiting.join().unwrap(), Err(Gone));
    // So does one that is asked only now.
    assert_eq!(futures_executor(handle.call(|_| ())), Err(Gone));
}

#[test]
fn a_full_mailbox_refuses_and_returns_the_message() {
    let (reactor, _) = single();
    let handle = reactor.handle();
    for _ in 0..crate::mailbox::CAPACITY {
        handle.send(Box::new(|_| ())).unwrap();
    }
    assert!(handle.send(Box::new(|_| ())).is_err());
}

/// Runs a future on this thread, parking it in between.
fn futures_executor<T>(mut future: BoxFuture<T>) -> T {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::task::Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        match future.as_mut().poll(&mut std::task::Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}

#[test]
fn sleepers_wake_for_messages_sockets_and_deadlines() {
    struct Echo {
        stream: Box<dyn crate::net::Stream>,
        readable: bool,
        echoed: Arc<AtomicBool>,
    }
    impl Poller for Echo {
        fn poll(&mut self, _: &mut Context) -> Progress {
            let mut byte = [0];
            if std::mem::take(&mut self.readable)
                && self.stream.recv(&mut [std::io::IoSliceMut::new(&mut byte)]).is_ok_and(|n| n == 1)
            {
                self.echoed.store(true, Ordering::Release);
                self.stream.send(&[std::io::IoSlice::new(&byte)]).unwrap();
                return Progress::Busy;
            }
            Progress::Idle
        }
        fn ready(&mut self, key: u64, ready: Ready) {
            assert_eq!(key, 7);
            self.readable |= ready.readable;
        }
    }

    let coalesce = PollPolicy::Coalesce { gap: Duration::from_micros(50) };
    for policy in [PollPolicy::Sleep, PollPolicy::Busy, PollPolicy::default(), coalesce] {
        let platform: Arc<dyn Platform> = Arc::new(TestPlatform::default());
        let reactors = ReactorThreads::start(&platform, &[config(0, policy), config(1, policy)], |_| Ok(())).unwrap();
        let mut listener = OsNetwork.listen("127.0.0.1:0".parse().unwrap(), 4).unwrap();
        let mut client = std::net::TcpStream::connect(listener.local_addr().ip().unwrap()).unwrap();
        let stream = loop {
            match listener.accept() {
                Ok(stream) => break stream,
                Err(_) => std::thread::yield_now(),
            }
        };
        let echoed = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&echoed);
        let setup = reactors.handles()[1].call(move |cx| {
            let id = cx.reserve_poller();
            let source = stream.source();
            let echo = Echo { stream, readable: false, echoed: flag };
            cx.add_reserved_poller(id, "echo", Schedule::Active, Box::new(echo));
            cx.watch(id, source, 7).unwrap();
        });
        futures_executor(setup).unwrap();
        for _ in 0..3 {
            use std::io::{Read, Write};
            client.write_all(b"x").unwrap();
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            assert!(echoed.swap(false, Ordering::Acquire));
        }
        assert_eq!(futures_executor(reactors.handles()[0].call(|cx| cx.group().len())), Ok(2));
        reactors.stop().unwrap();
    }
}
