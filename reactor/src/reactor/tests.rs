use super::*;
use crate::buffer::Region;
use crate::file::{FileEngine, Files};
use crate::net::{Network, OsNetwork};
use crate::park::EpollParker;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The host's parker and sockets under a clock that a test sets.
#[derive(Default)]
struct TestPlatform {
    clock: Arc<TestClock>,
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
        Ok(Box::new(EpollParker::new()?))
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

    for policy in [PollPolicy::Sleep, PollPolicy::Busy, PollPolicy::default()] {
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
