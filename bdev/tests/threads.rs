//! The layer on real threads: reactors that sleep, completions that wake them, removal under load.

use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::task::{Context as Task, Poll, Wake, Waker};
use std::time::Duration;

use ::appliance::{Batch, Capabilities, Handler, Worker, WorkerCx};
use futures_util::future::BoxFuture;
use reactor::file::EngineChoice;
use reactor::platform::OsPlatform;
use reactor::reactor::{PollPolicy, ReactorConfig, ReactorThreads};
use reactor::{Buffers, Context, Platform, Poller, PollerId, Progress, ReactorId, Schedule};
use ringstone_bdev::conformance::limited;
use ringstone_bdev::core::runtime::SharedRuntime;
use ringstone_bdev::core::system::Executor;
use ringstone_bdev::core::{
    BdevEvent, BdevSystem, ChannelId, ClientId, Descriptor, IoRequest, IoRuntime, IoStatus, Op, RuntimeConfig,
};
use ringstone_bdev::modules::appliance::settings::{Placement, Settings};
use ringstone_bdev::modules::{appliance, delay, malloc, uring};

/// How long anything here may take before the test gives up.
const PATIENCE: Duration = Duration::from_secs(120);

struct Unpark(std::thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<R>(future: impl Future<Output = R>) -> R {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        if let Poll::Ready(result) = future.as_mut().poll(&mut Task::from_waker(&waker)) {
            return result;
        }
        std::thread::park_timeout(PATIENCE);
    }
}

/// A thread for each task; sleeping is waiting for what never comes.
struct Threads;

impl Executor for Threads {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        std::thread::spawn(move || block_on(task));
    }
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let (ended, has_ended) = futures_channel::oneshot::channel();
        std::thread::spawn(move || {
            let (_never, nothing) = mpsc::channel::<()>();
            let _ = nothing.recv_timeout(duration);
            let _ = ended.send(());
        });
        Box::pin(async move {
            let _ = has_ended.await;
        })
    }
}

/// Keeps `DEPTH` operations going until it is told to let go.
struct Load {
    me: PollerId,
    runtime: SharedRuntime,
    channel: ChannelId,
    client: ClientId,
    descriptor: Option<Descriptor>,
    let_go: Arc<AtomicBool>,
    completed: Arc<AtomicU64>,
    outstanding: usize,
    next: u64,
    ended: mpsc::Sender<()>,
}

const DEPTH: usize = 16;

impl Load {
    fn submit(&mut self) {
        self.next += 1;
        let (op, lba) = match self.next % 5 {
            0 => (Op::Write { fua: false }, self.next % 200),
            1 => (Op::CompareAndWrite { fua: false }, 3),
            2 => (Op::Flush, 0),
            _ => (Op::Read, self.next % 200),
        };
        let bufs = Buffers::heap(op.payload_bytes(1, 512) as usize);
        let request = IoRequest { op, lba, blocks: 1, bufs, user: self.next };
        self.runtime.borrow_mut().submit(self.channel, self.client, request);
        self.outstanding += 1;
    }
}

impl Poller for Load {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        let mut done = Vec::new();
        {
            let mut runtime = self.runtime.borrow_mut();
            runtime.set_now(cx.now());
            runtime.take_completions(self.client, &mut done);
        }
        let mut busy = !done.is_empty();
        for completion in done {
            let status = completion.status();
            assert!(
                matches!(status, IoStatus::Success | IoStatus::CompareFailed | IoStatus::NoDevice | IoStatus::Aborted),
                "{status}"
            );
            self.outstanding -= 1;
            self.completed.fetch_add(1, Ordering::Relaxed);
            self.runtime.borrow_mut().recycle(completion);
        }
        let let_go = self.let_go.load(Ordering::Acquire);
        while !let_go && self.outstanding < DEPTH {
            self.submit();
            busy = true;
        }
        if let_go && self.outstanding == 0 && self.descriptor.is_some() {
            let mut runtime = self.runtime.borrow_mut();
            runtime.put_channel(self.channel);
            runtime.remove_client(self.client);
            self.descriptor = None;
            cx.remove_poller(self.me);
            let _ = self.ended.send(());
        }
        Progress::from_busy(busy)
    }
}

struct Server {
    threads: ReactorThreads,
    system: Arc<BdevSystem>,
}

impl Server {
    fn start(policy: PollPolicy, engine: EngineChoice) -> Server {
        let platform: Arc<dyn Platform> = Arc::new(OsPlatform::new(engine));
        let configs = [0, 1].map(|id| ReactorConfig { id: ReactorId(id), core: None, policy });
        let install = |cx: &mut Context| {
            let config = RuntimeConfig { io_pool: 64, ..RuntimeConfig::default() };
            IoRuntime::install(cx, config).map(drop)
        };
        let threads = ReactorThreads::start(&platform, &configs, install).unwrap();
        let system = BdevSystem::new(threads.handles().to_vec(), platform, Arc::new(Threads));
        Server { threads, system }
    }

    /// A load on every reactor, until the device is removed.
    fn load(&self, name: &str, completed: &Arc<AtomicU64>) -> Receiver<()> {
        let (ended, has_ended) = channel();
        for reactor in self.system.reactors() {
            let let_go = Arc::new(AtomicBool::new(false));
            let (hear, mine) = (Arc::clone(&let_go), reactor.clone());
            let on_event = move |event| {
                if event == BdevEvent::Removing {
                    hear.store(true, Ordering::Release);
                    // It may be asleep.
                    let _ = mine.send(Box::new(|_: &mut Context| {}));
                }
            };
            let descriptor = self.system.open(name, true, "a load", Arc::new(on_event)).unwrap();
            let (completed, ended) = (Arc::clone(completed), ended.clone());
            let begin = move |cx: &mut Context| {
                let runtime = IoRuntime::of(cx);
                let channel = runtime.borrow_mut().get_channel(descriptor.bdev()).unwrap();
                let client = runtime.borrow_mut().add_client();
                let me = cx.reserve_poller();
                let load = Load {
                    me,
                    runtime,
                    channel,
                    client,
                    descriptor: Some(descriptor),
                    let_go,
                    completed,
                    outstanding: 0,
                    next: 0,
                    ended,
                };
                cx.add_reserved_poller(me, "load", Schedule::Active, Box::new(load));
            };
            block_on(reactor.call(begin)).unwrap();
        }
        has_ended
    }

    /// Runs a load on `name`, removes the device under it, and checks that all has come home.
    fn check_others(&self, name: &str) {
        let completed = Arc::new(AtomicU64::new(0));
        let has_ended = self.load(name, &completed);
        let began = std::time::Instant::now();
        while completed.load(Ordering::Relaxed) < 3000 {
            assert!(began.elapsed() < PATIENCE, "{name}: only {completed:?} operations");
            match has_ended.recv_timeout(Duration::from_millis(1)) {
                Err(RecvTimeoutError::Timeout) => {}
                other => panic!("{name}: a load ended early: {other:?}"),
            }
        }
        block_on(self.system.remove(name)).unwrap();
        (0..2).for_each(|_| has_ended.recv_timeout(PATIENCE).unwrap());
    }

    /// As [`Server::check_others`], and then nothing at all is out.
    fn check(&self, name: &str) {
        self.check_others(name);
        self.assert_clean(name);
    }

    fn assert_clean(&self, name: &str) {
        for reactor in self.system.reactors() {
            let is_clean = move |cx: &mut Context| {
                let runtime = IoRuntime::of(cx);
                let mut runtime = runtime.borrow_mut();
                runtime.assert_whole();
                runtime.is_quiet() && runtime.channel_refs().is_empty() && runtime.pool().is_whole()
            };
            assert!(block_on(reactor.call(is_clean)).unwrap(), "{name}: something is left");
        }
    }
}

fn everything(policy: PollPolicy, engine: EngineChoice, tag: &str) {
    let path: PathBuf = std::env::temp_dir().join(format!("ringstone-threads-{tag}-{}", std::process::id()));
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let server = Server::start(policy, engine);
    let system = &server.system;
    block_on(malloc::create(system, "malloc", None, malloc::MallocOptions::new(512, 2048))).unwrap();
    server.check("malloc");
    block_on(limited::elsewhere(system, "elsewhere", 512, 2048)).unwrap();
    server.check("elsewhere");
    block_on(malloc::create(system, "base", None, malloc::MallocOptions::new(512, 2048))).unwrap();
    block_on(delay::create(system, "slow", None, "base", [50, 300, 80, 400])).unwrap();
    server.check("slow");
    for (workers, placement) in [(1, Placement::LbaRange), (2, Placement::RoundRobin), (0, Placement::Queue)] {
        let mut settings = Settings::new("memory", 512, 2048);
        (settings.workers, settings.placement, settings.queue_depth) = (workers, placement, 8);
        settings.spin = Duration::from_micros(if policy == PollPolicy::Sleep { 0 } else { 20 });
        block_on(appliance::create(system, "app", None, settings)).unwrap();
        server.check("app");
    }
    let options = uring::FileOptions {
        flavor: uring::Flavor::Uring,
        path: path.clone(),
        block_size: None,
        read_only: false,
        fallocate: None,
    };
    block_on(uring::create(system, "file", None, options)).unwrap();
    server.check("file");
    std::fs::remove_file(&path).unwrap();
    server.threads.stop().unwrap();
}

#[test]
fn reactors_that_always_sleep_are_always_woken() {
    everything(PollPolicy::Sleep, EngineChoice::Auto, "sleep");
}

#[test]
fn adaptive_reactors_with_file_threads() {
    everything(PollPolicy::Adaptive { spin: Duration::from_micros(20) }, EngineChoice::Threads, "adaptive");
}

/// A handler whose thread hangs in it until it is let go.
#[derive(Default)]
struct Hangs {
    let_go: Mutex<bool>,
    changed: Condvar,
    hanging: AtomicU64,
}

struct HangsHere(Arc<Hangs>);

impl Handler for HangsHere {
    fn name(&self) -> &str {
        "hangs"
    }
    fn capabilities(&self, _: &::appliance::Geometry) -> Capabilities {
        Capabilities::BASIC
    }
    fn worker(&self, _: WorkerCx) -> std::io::Result<Box<dyn Worker>> {
        Ok(Box::new(HangsHere(Arc::clone(&self.0))))
    }
    fn resize(&self, _: u64) -> std::io::Result<()> {
        Ok(())
    }
}

impl Worker for HangsHere {
    fn submit(&mut self, batch: &mut Batch) {
        self.0.hanging.fetch_add(1, Ordering::Release);
        let mut let_go = self.0.let_go.lock().unwrap();
        while !*let_go {
            let_go = self.0.changed.wait(let_go).unwrap();
        }
        batch.complete_all(IoStatus::Success);
    }
}

/// A thread that hangs in a handler costs its own device; that is deleted all the same, and another may have its name.
#[test]
fn a_thread_that_hangs_is_left_behind() {
    let server = Server::start(PollPolicy::default(), EngineChoice::Threads);
    let system = &server.system;
    let hangs = Arc::new(Hangs::default());
    let mut settings = Settings::new("hangs", 512, 2048);
    (settings.queue_depth, settings.timeout) = (8, None);
    let handler = Arc::new(HangsHere(Arc::clone(&hangs)));
    block_on(appliance::create_with(system, "app", None, settings.clone(), handler)).unwrap();
    let completed = Arc::new(AtomicU64::new(0));
    let has_ended = server.load("app", &completed);
    let began = std::time::Instant::now();
    while hangs.hanging.load(Ordering::Acquire) == 0 {
        assert!(began.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    // Others are served meanwhile.
    block_on(malloc::create(system, "malloc", None, malloc::MallocOptions::new(512, 2048))).unwrap();
    server.check_others("malloc");
    block_on(appliance::delete(system, "app")).unwrap();
    (0..2).for_each(|_| has_ended.recv_timeout(PATIENCE).unwrap());
    assert_eq!(Arc::strong_count(&hangs), 3, "the thread is still in there");
    settings.handler = "memory".to_string();
    block_on(appliance::create(system, "app", None, settings)).unwrap();
    server.check_others("app");
    // At last it comes back: what it completes is nobody's, and it ends.
    *hangs.let_go.lock().unwrap() = true;
    hangs.changed.notify_all();
    while Arc::strong_count(&hangs) > 1 {
        assert!(began.elapsed() < PATIENCE, "the thread does not end");
        std::thread::yield_now();
    }
    server.assert_clean("everything");
    server.threads.stop().unwrap();
}
