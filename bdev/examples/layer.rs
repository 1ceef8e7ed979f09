//! What the bdev layer costs: I/O per second of devices without media, on one core at queue depth 128.
//!
//! `cargo run --release -p ringstone-bdev --example layer [-- CORE]`
//!
//! The loop is a production reactor with one client poller beside the layer's own, so that every I/O pays for the pool,
//! the checks, the channel, the statistics, the inbox and its share of a step. Payload memory is drawn from the pool once
//! and goes round. Each line is the median of five runs, with their spread. Time is the thread's time on its core where the
//! host tells it, so that other programs disturb the numbers less; on a core of its own it is the time that passes.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use reactor::file::EngineChoice;
use reactor::platform::OsPlatform;
use reactor::reactor::{PollPolicy, ReactorConfig};
use reactor::{Buffers, Context, Platform, Poller, Progress, Reactor, ReactorId, Schedule};
use ringstone_bdev::conformance::Rng;
use ringstone_bdev::core::runtime::SharedRuntime;
use ringstone_bdev::core::system::Executor;
use ringstone_bdev::core::{
    BdevInfo, BdevSystem, ChannelId, ClientId, Completion, IoRequest, IoRuntime, Op, RuntimeConfig,
};
use ringstone_bdev::modules::{malloc, null, passthru};

static ONLY: OnceLock<String> = OnceLock::new();

const DEPTH: u64 = 128;
const RUNS: usize = 5;
const RUN: Duration = Duration::from_millis(300);

/// Control-plane tasks here end without waiting for anything but the reactor, which is stepped between their polls.
struct NoExecutor;

impl Executor for NoExecutor {
    fn spawn(&self, _: BoxFuture<'static, ()>) {
        unreachable!("nothing is removed here");
    }
    fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
        Box::pin(std::future::pending())
    }
}

struct Load {
    runtime: SharedRuntime,
    channel: ChannelId,
    client: ClientId,
    op: Op,
    blocks: u64,
    slots: u64,
    random: bool,
    rng: Rng,
    next: u64,
    idle: Vec<Buffers>,
    done: Vec<Completion>,
    completed: Rc<Cell<u64>>,
}

impl Poller for Load {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        let mut runtime = self.runtime.borrow_mut();
        runtime.set_now(cx.now());
        runtime.take_completions(self.client, &mut self.done);
        self.completed.set(self.completed.get() + self.done.len() as u64);
        for mut completion in self.done.drain(..) {
            assert!(completion.status().is_success());
            let bufs = completion.take_bufs();
            runtime.recycle(completion);
            self.idle.push(bufs);
        }
        for bufs in self.idle.drain(..) {
            self.next += 1;
            let slot = if self.random { self.rng.below(self.slots) } else { self.next % self.slots };
            let request =
                IoRequest { op: self.op, lba: slot * self.blocks, blocks: self.blocks, bufs, user: self.next };
            runtime.submit(self.channel, self.client, request);
        }
        Progress::Busy
    }
}

fn block_on<R>(reactor: &RefCell<Reactor>, future: impl Future<Output = R>) -> R {
    let mut future = std::pin::pin!(future);
    let mut task = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(result) = future.as_mut().poll(&mut task) {
            return result;
        }
        reactor.borrow_mut().step();
    }
}

/// Time that this thread has spent on its core; the time that passed where the host does not tell.
fn on_core() -> Duration {
    static BEGAN: OnceLock<Instant> = OnceLock::new();
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanos = text.and_then(|text| text.split(' ').next()?.parse().ok());
    nanos.map_or_else(|| BEGAN.get_or_init(Instant::now).elapsed(), Duration::from_nanos)
}

fn measure(reactor: &RefCell<Reactor>, name: &str, bdev: &Arc<BdevInfo>, op: Op, bytes: u64, random: bool) {
    if !name.starts_with(ONLY.get().map_or("", String::as_str)) {
        return;
    }
    let geometry = bdev.device().geometry();
    let mut reactor = reactor.borrow_mut();
    let runtime = IoRuntime::of(reactor.context());
    let (channel, client, idle) = {
        let mut runtime = runtime.borrow_mut();
        let channel = runtime.get_channel(bdev).expect("the channel opens");
        let len = op.payload_bytes(bytes / u64::from(geometry.block_size), geometry.block_size) as usize;
        let idle: Vec<Buffers> =
            (0..DEPTH).map(|_| runtime.pool().alloc(len).expect("the pool is large enough")).collect();
        (channel, runtime.add_client(), idle)
    };
    let completed = Rc::new(Cell::new(0));
    let blocks = bytes / u64::from(geometry.block_size);
    let load = Load {
        runtime,
        channel,
        client,
        op,
        blocks,
        slots: geometry.num_blocks / blocks,
        random,
        rng: Rng::new(7),
        next: 0,
        idle,
        done: Vec::new(),
        completed: Rc::clone(&completed),
    };
    let poller = reactor.context().add_poller("load", Schedule::Active, Box::new(load));
    let run = |reactor: &mut Reactor, time: Duration| {
        let (began, before) = (on_core(), completed.get());
        while on_core() - began < time {
            for _ in 0..1024 {
                reactor.step();
            }
        }
        (completed.get() - before) as f64 / (on_core() - began).as_secs_f64()
    };
    run(&mut reactor, RUN / 3);
    let mut rates: Vec<f64> = (0..RUNS).map(|_| run(&mut reactor, RUN)).collect();
    rates.sort_by(f64::total_cmp);
    let median = rates[RUNS / 2];
    let spread = (rates[RUNS - 1] - rates[0]) / median * 100.0;
    println!("{name:<34} {:>8.2} M IOPS  {:>7.1} ns per I/O  spread {spread:.1} %", median / 1e6, 1e9 / median);
    reactor.context().remove_poller(poller);
    reactor.step();
}

/// Writes all of a device once.
fn fill(reactor: &RefCell<Reactor>, bdev: &Arc<BdevInfo>) {
    const BYTES: u64 = 128 * 1024;
    let geometry = bdev.device().geometry();
    let blocks = BYTES / u64::from(geometry.block_size);
    let runtime = IoRuntime::of(reactor.borrow_mut().context());
    let mut runtime = runtime.borrow_mut();
    let (channel, client) = (runtime.get_channel(bdev).expect("the channel opens"), runtime.add_client());
    let mut done = Vec::new();
    for n in 0..geometry.num_blocks / blocks {
        let bufs = Buffers::heap(BYTES as usize);
        let op = Op::Write { fua: false };
        runtime.submit(channel, client, IoRequest { op, lba: n * blocks, blocks, bufs, user: n });
        runtime.run();
        runtime.take_completions(client, &mut done);
        done.drain(..).for_each(|completion| runtime.recycle(completion));
    }
    runtime.put_channel(channel);
    runtime.remove_client(client);
}

fn main() {
    let core = std::env::args().nth(1).and_then(|text| text.parse().ok());
    // The second argument chooses lines by their beginning.
    ONLY.get_or_init(|| std::env::args().nth(2).unwrap_or_default());
    let platform: Arc<dyn Platform> = Arc::new(OsPlatform::new(EngineChoice::Auto));
    if let Some(core) = core {
        platform.pin(core).expect("the core can be used");
    }
    let config = ReactorConfig { id: ReactorId(0), core, policy: PollPolicy::Busy };
    let mut reactor = Reactor::new(config, Arc::clone(&platform)).expect("a reactor can be made");
    let group = vec![reactor.handle()];
    reactor.join_group(group.clone());
    IoRuntime::install(reactor.context(), RuntimeConfig::default()).expect("the layer can be installed");
    let reactor = RefCell::new(reactor);
    let system = BdevSystem::new(group, platform, Arc::new(NoExecutor));
    let read = Op::Read;
    let write = Op::Write { fua: false };

    let options = null::NullOptions { block_size: 512, num_blocks: 1 << 21, physical_block_size: 0 };
    let null = block_on(&reactor, null::create(&system, "null", None, options)).expect("it can be made");
    measure(&reactor, "null, write 4 KiB", &null, write, 4096, false);
    measure(&reactor, "null, flush", &null, Op::Flush, 512, false);
    measure(&reactor, "null, read 512 B (zeroed)", &null, read, 512, false);
    measure(&reactor, "null, read 4 KiB (zeroed)", &null, read, 4096, false);
    let through = block_on(&reactor, passthru::create(&system, "through", None, "null")).expect("it can be made");
    measure(&reactor, "passthru on null, write 4 KiB", &through, write, 4096, false);
    measure(&reactor, "passthru on null, read 512 B", &through, read, 512, false);

    let options = malloc::MallocOptions::new(512, 1 << 21);
    let malloc = block_on(&reactor, malloc::create(&system, "malloc", None, options)).expect("it can be made");
    // Reads of what was never written would touch no memory.
    fill(&reactor, &malloc);
    measure(&reactor, "malloc (1 GiB), write 128 KiB", &malloc, write, 128 * 1024, false);
    measure(&reactor, "malloc (1 GiB), read 4 KiB random", &malloc, read, 4096, true);
    measure(&reactor, "malloc (1 GiB), write 4 KiB random", &malloc, write, 4096, true);
}
