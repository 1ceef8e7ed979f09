//! `ringstone appliance-bench`: what the way to a handler costs, through the bdev layer, without a network.
//!
//! One reactor carries the load, on the first core that this process may use; workers run on the second. The handler is `null`,
//! which fills reads with zeroes and does nothing else, as the null bdev does on the reactor.
//!
//! What is compared is measured side by side: each run is cut into slices that take turns, in an order that turns round, so that
//! what else the machine does meets all of them alike. Ratios are of the sums of one run; reported are the median of the runs
//! and their range. A slice begins when its load has run for a moment.

mod external;
mod log;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use appliance::home::ReturnRing;
use appliance::{Batch, Capabilities, Geometry, Handler, Worker, WorkerCx};
use bdev::core::runtime::SharedRuntime;
use bdev::core::{
    BdevEvent, BdevSystem, ChannelId, ClientId, Completion, Descriptor, IoRequest, IoRuntime, Op, RuntimeConfig,
};
use bdev::modules::appliance::settings::Settings;
use bdev::modules::{appliance as device, null};
use reactor::file::EngineChoice;
use reactor::park::{Unpark, Waker};
use reactor::platform::OsPlatform;
use reactor::reactor::{PollPolicy, ReactorConfig, ReactorThreads};
use reactor::ring::ring;
use reactor::{Buffers, Context, Instant, Platform, Poller, PollerId, Progress, ReactorId, Schedule};
use serde_json::{Value, json};

use crate::executor::TokioExecutor;
use crate::say::say;

/// Options of `ringstone appliance-bench`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 1.0)]
    time: f64,
    /// Turns of each comparison.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Devices created and deleted under load.
    #[arg(long, default_value_t = 1000)]
    cycles: u32,
    /// Measure the handler `log` instead, over memory and over a file, against the bare bdev below it.
    #[arg(long)]
    log: bool,
    /// Where --log makes its file [default: the folder for temporary files].
    #[arg(long, value_name = "PATH")]
    folder: Option<std::path::PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Slices of a run, for each of those that are compared.
const SLICES: usize = 8;
/// Seconds that a load runs before a slice of it is measured.
const WARM_UP: f64 = 0.03;

const BLOCK: u32 = 4096;
const BLOCKS: u64 = 1 << 20;

/// Runs the command.
pub fn main(options: &Options) -> ExitCode {
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringstone: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    let mut report = Report { json: options.json, results: Vec::new() };
    if options.log {
        runtime.block_on(log::measure(options, &mut report))?;
        report.finish();
        return Ok(());
    }
    runtime.block_on(async {
        let busy = Rig::start(PollPolicy::Busy, EngineChoice::Threads)?;
        round_trip(&busy, options, &mut report).await?;
        throughput(&busy, options, &mut report).await?;
        neighbour(&busy, options, &mut report).await?;
        let outside = external::round_trips(&busy, options, &mut report).await?;
        busy.stop().await?;
        external::nbd(outside, options, &mut report)?;
        completions(options, &mut report);
        let adaptive = Rig::start(PollPolicy::default(), EngineChoice::Threads)?;
        idle(&adaptive, options, &mut report).await?;
        cycles(&adaptive, options, &mut report).await?;
        adaptive.stop().await
    })?;
    // A handler that hangs has its thread left behind: there is nothing to wait for.
    runtime.shutdown_background();
    report.finish();
    Ok(())
}

/// What came out, as lines of text or one JSON object.
struct Report {
    json: bool,
    results: Vec<Value>,
}

impl Report {
    fn add(&mut self, name: &str, unit: &str, values: &mut [f64], target: &str) {
        let [low, median, high] = spread(values);
        if !self.json {
            say!("{name:<58} {median:>12.2} {unit:<14} {low:.2} .. {high:.2}   {target}");
        }
        self.results
            .push(json!({ "name": name, "unit": unit, "median": median, "low": low, "high": high, "target": target }));
    }

    fn finish(self) {
        if self.json {
            say!("{}", json!({ "results": self.results }));
        }
    }
}

/// Least, median and greatest.
fn spread(values: &mut [f64]) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(0.0);
    [at(0), at(values.len() / 2), at(values.len().saturating_sub(1))]
}

/// The cores of the reactor and of the workers.
fn cores() -> (usize, usize) {
    use rustix::thread::{CpuSet, sched_getaffinity};
    let set = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
    let mut allowed = (0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core));
    let first = allowed.next().unwrap_or(0);
    (first, allowed.next().unwrap_or(first))
}

/// One reactor with the bdev layer on it.
struct Rig {
    threads: ReactorThreads,
    system: Arc<BdevSystem>,
    worker_core: usize,
}

impl Rig {
    fn start(policy: PollPolicy, files: EngineChoice) -> Result<Rig, String> {
        let platform: Arc<dyn Platform> = Arc::new(OsPlatform::new(files));
        let (core, worker_core) = cores();
        let config = ReactorConfig { id: ReactorId(0), core: Some(core), policy };
        let install = |cx: &mut Context| IoRuntime::install(cx, RuntimeConfig::default()).map(drop);
        let threads = ReactorThreads::start(&platform, &[config], install).map_err(|e| e.to_string())?;
        let system = BdevSystem::new(threads.handles().to_vec(), platform, Arc::new(TokioExecutor::current()));
        Ok(Rig { threads, system, worker_core })
    }

    fn settings(&self, spin: Duration) -> Settings {
        let mut settings = Settings::new("null", BLOCK, BLOCKS);
        (settings.cores, settings.spin) = (vec![self.worker_core], spin);
        settings
    }

    async fn appliance(&self, name: &str, spin: Duration) -> Result<(), String> {
        device::create(&self.system, name, None, self.settings(spin)).await.map(drop).map_err(|e| e.to_string())
    }

    async fn null(&self, name: &str) -> Result<(), String> {
        let options = null::NullOptions { block_size: BLOCK, num_blocks: BLOCKS, physical_block_size: 0 };
        null::create(&self.system, name, None, options).await.map(drop).map_err(|e| e.to_string())
    }

    async fn delete(&self, name: &str) -> Result<(), String> {
        self.system.remove(name).await.map_err(|e| e.to_string())
    }

    async fn stop(self) -> Result<(), String> {
        self.threads.stop().map_err(|e| e.to_string())
    }

    /// Starts reads of one block at `depth`.
    async fn load(&self, name: &str, depth: usize, timed: bool) -> Result<Load, String> {
        self.start_load(name, Shape { depth, timed, ..Shape::default() }).await
    }

    /// Starts a load.
    async fn start_load(&self, name: &str, shape: Shape) -> Result<Load, String> {
        let shared = Arc::new(Shared::default());
        let hear = Arc::clone(&shared);
        let reactor = self.system.reactors()[0].clone();
        let wake = reactor.clone();
        let on_event = move |event| {
            if event == BdevEvent::Removing {
                hear.stop.store(true, Ordering::Release);
                // It may be asleep; a full mailbox wakes it too.
                let _ = wake.send(Box::new(|_: &mut Context| {}));
            }
        };
        let descriptor =
            self.system.open(name, true, "the benchmark", Arc::new(on_event)).map_err(|e| e.to_string())?;
        let told = Arc::clone(&shared);
        let begin = move |cx: &mut Context| -> Result<(), String> {
            let runtime = IoRuntime::of(cx);
            let channel = runtime.borrow_mut().get_channel(descriptor.bdev()).map_err(|e| e.to_string())?;
            let client = runtime.borrow_mut().add_client();
            let me = cx.reserve_poller();
            let free = (0..shape.depth).map(|n| shape.payload(n as u64 + 1)).collect();
            let descriptor = Some(descriptor);
            let load = LoadPoller {
                me,
                runtime,
                channel,
                client,
                descriptor,
                shared: told,
                shape,
                free,
                next: 1,
                at: 0,
                done: Vec::new(),
            };
            cx.add_reserved_poller(me, "load", Schedule::Active, Box::new(load));
            Ok(())
        };
        reactor.call(begin).await.map_err(|e| e.to_string())??;
        Ok(Load { shared })
    }
}

/// What a load does.
#[derive(Clone, Copy)]
struct Shape {
    op: Op,
    /// Blocks of an operation.
    blocks: u64,
    /// Operations at once.
    depth: usize,
    /// Blocks of the device that it uses.
    span: u64,
    /// One behind the other, and at the end of the span it is done; else anywhere.
    once: bool,
    /// Bytes of each written block that cannot be compressed; the others are zeroes.
    random_bytes: usize,
    timed: bool,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape { op: Op::Read, blocks: 1, depth: 1, span: BLOCKS, once: false, random_bytes: 0, timed: false }
    }
}

impl Shape {
    fn bytes(&self) -> usize {
        self.blocks as usize * BLOCK as usize
    }

    fn payload(&self, seed: u64) -> Buffers {
        let mut bufs = Buffers::heap(self.bytes());
        // Also of reads, so that the host has given the memory before anything is measured.
        bufs.fill(0);
        let mut word = seed;
        for block in 0..self.blocks as usize {
            for at in (0..self.random_bytes).step_by(8) {
                word = advance(word);
                // The upper bits: the lower ones repeat.
                bufs.write_at(block * BLOCK as usize + at, &(word ^ (word >> 32)).to_le_bytes());
            }
        }
        bufs
    }
}

fn advance(word: u64) -> u64 {
    word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f)
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    ended: AtomicBool,
    submitted: AtomicU64,
    completed: AtomicU64,
    failed: AtomicBool,
    /// Nanoseconds of each operation, where they are timed.
    latencies: Mutex<Vec<u32>>,
}

/// A load that runs.
struct Load {
    shared: Arc<Shared>,
}

impl Load {
    /// Lets it run, and returns operations a second.
    async fn rate(&self, seconds: f64) -> f64 {
        tokio::time::sleep(Duration::from_secs_f64(WARM_UP)).await;
        let (began, before) = (std::time::Instant::now(), self.shared.completed.load(Ordering::Relaxed));
        tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
        let done = self.shared.completed.load(Ordering::Relaxed) - before;
        done as f64 / began.elapsed().as_secs_f64()
    }

    /// Stops it when nothing is outstanding any more; its latencies in order.
    async fn stop(self) -> Vec<u32> {
        self.shared.stop.store(true, Ordering::Release);
        self.ended().await;
        let mut latencies = std::mem::take(&mut *self.shared.latencies.lock().unwrap_or_else(PoisonError::into_inner));
        latencies.sort_unstable();
        latencies
    }

    async fn ended(&self) {
        while !self.shared.ended.load(Ordering::Acquire) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

struct LoadPoller {
    me: PollerId,
    runtime: SharedRuntime,
    channel: ChannelId,
    client: ClientId,
    descriptor: Option<Descriptor>,
    shared: Arc<Shared>,
    shape: Shape,
    free: Vec<Buffers>,
    next: u64,
    /// Where a load that goes through the device is.
    at: u64,
    done: Vec<Completion>,
}

/// Latencies kept of one load.
const MAX_LATENCIES: usize = 4_000_000;

impl Poller for LoadPoller {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        if self.descriptor.is_none() {
            return Progress::Idle;
        }
        let mut runtime = self.runtime.borrow_mut();
        runtime.set_now(cx.now());
        runtime.take_completions(self.client, &mut self.done);
        let mut busy = !self.done.is_empty();
        self.shared
            .completed
            .store(self.shared.completed.load(Ordering::Relaxed) + self.done.len() as u64, Ordering::Relaxed);
        if self.shape.timed && busy {
            let now = cx.read_clock();
            let mut latencies = self.shared.latencies.lock().unwrap_or_else(PoisonError::into_inner);
            let room = MAX_LATENCIES - latencies.len();
            latencies.extend(self.done.iter().take(room).map(|done| now.nanos_since(Instant(done.user())) as u32));
        }
        for mut completion in self.done.drain(..) {
            let bufs = completion.take_bufs();
            // What a handler still has at its end is not there any more.
            self.free.push(if bufs.len() == self.shape.bytes() { bufs } else { self.shape.payload(1) });
            if !completion.status().is_success() {
                self.shared.failed.store(true, Ordering::Relaxed);
            }
            runtime.recycle(completion);
        }
        let Shape { op, blocks, span, once, .. } = self.shape;
        let stop = self.shared.stop.load(Ordering::Acquire) || (once && self.at + blocks > span);
        if !stop && !self.free.is_empty() {
            let at = if self.shape.timed { cx.read_clock() } else { cx.now() };
            let mut count = 0;
            while !(once && self.at + blocks > span)
                && let Some(bufs) = self.free.pop()
            {
                self.next = advance(self.next);
                let lba = if once { self.at } else { (self.next >> 33) % (span / blocks) * blocks };
                self.at = lba + blocks;
                count += 1;
                runtime.submit(self.channel, self.client, IoRequest { op, lba, blocks, bufs, user: at.0 });
            }
            self.shared.submitted.store(self.shared.submitted.load(Ordering::Relaxed) + count, Ordering::Relaxed);
            busy = true;
        }
        if busy {
            runtime.run();
            runtime.flush();
        }
        if stop && self.free.len() == self.shape.depth {
            runtime.put_channel(self.channel);
            runtime.remove_client(self.client);
            self.descriptor = None;
            cx.remove_poller(self.me);
            self.shared.ended.store(true, Ordering::Release);
        }
        Progress::from_busy(busy)
    }
}

fn percentile(sorted: &[u32], percent: f64) -> f64 {
    let index = ((sorted.len() as f64 * percent / 100.0) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(index).map_or(0.0, |&ns| f64::from(ns) / 1000.0)
}

fn percentile_of(mut latencies: Vec<u32>, percent: f64) -> f64 {
    latencies.sort_unstable();
    percentile(&latencies, percent)
}

/// One request at a time, both sides spinning.
async fn round_trip(rig: &Rig, options: &Options, report: &mut Report) -> Result<(), String> {
    rig.null("null").await?;
    rig.appliance("app", Duration::from_secs(1)).await?;
    let (mut nulls, mut apps, mut more) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.runs {
        let mut latencies = [Vec::new(), Vec::new()];
        for slice in 0..SLICES {
            for turn in 0..2 {
                let which = (slice + turn) % 2;
                let load = rig.load(["null", "app"][which], 1, true).await?;
                load.rate(options.time / SLICES as f64).await;
                latencies[which].extend(load.stop().await);
            }
        }
        let medians = latencies.map(|latencies| percentile_of(latencies, 50.0));
        nulls.push(medians[0]);
        apps.push(medians[1]);
        more.push(medians[1] - medians[0]);
    }
    report.add("null bdev, round trip", "us (p50)", &mut nulls, "");
    report.add("null handler, 1 worker, round trip, spinning", "us (p50)", &mut apps, "");
    report.add("  more than the null bdev", "us", &mut more, "(at most 2)");
    Ok(())
}

async fn throughput(rig: &Rig, options: &Options, report: &mut Report) -> Result<(), String> {
    let mut inline = rig.settings(Duration::ZERO);
    inline.workers = 0;
    device::create(&rig.system, "inline", None, inline).await.map_err(|e| e.to_string())?;
    let (mut rates, mut part) = ([Vec::new(), Vec::new(), Vec::new()], Vec::new());
    for _ in 0..options.runs {
        let mut sums = [0.0; 3];
        for slice in 0..SLICES {
            for turn in 0..3 {
                let which = (slice + turn) % 3;
                let load = rig.load(["null", "app", "inline"][which], 128, false).await?;
                sums[which] += load.rate(options.time / SLICES as f64).await / SLICES as f64;
                load.stop().await;
            }
        }
        rates.iter_mut().zip(sums).for_each(|(rates, sum)| rates.push(sum / 1000.0));
        part.push(sums[1] / sums[0]);
    }
    report.add("null bdev, depth 128", "kIOPS", &mut rates[0], "");
    report.add("null handler, 1 worker, depth 128", "kIOPS", &mut rates[1], "");
    report.add("null handler, inline, depth 128", "kIOPS", &mut rates[2], "");
    report.add("  1 worker, part of the null bdev's", "", &mut part, "(at least 0.7)");
    for name in ["null", "app", "inline"] {
        rig.delete(name).await?;
    }
    Ok(())
}

/// A handler whose threads sleep for ever with whatever they are given.
struct Stuck;

impl Handler for Stuck {
    fn name(&self) -> &str {
        "stuck"
    }
    fn capabilities(&self, _: &Geometry) -> Capabilities {
        Capabilities::BASIC
    }
    fn worker(&self, _: WorkerCx) -> std::io::Result<Box<dyn Worker>> {
        Ok(Box::new(Stuck))
    }
    fn resize(&self, _: u64) -> std::io::Result<()> {
        Ok(())
    }
}

impl Worker for Stuck {
    fn submit(&mut self, _: &mut Batch) {
        loop {
            std::thread::park();
        }
    }
}

/// The latency of one device while the handler of another hangs.
async fn neighbour(rig: &Rig, options: &Options, report: &mut Report) -> Result<(), String> {
    rig.appliance("app", Duration::from_secs(1)).await?;
    let (mut alone, mut with_stuck, mut part) = (Vec::new(), Vec::new(), Vec::new());
    let mut stuck = 0;
    for _ in 0..options.runs {
        let mut latencies = [Vec::new(), Vec::new()];
        // Alone, beside, beside, alone: each is first as often as the other. Every stuck handler leaves a thread behind.
        for beside in [false, true, true, false] {
            stuck += 1;
            let name = format!("stuck{stuck}");
            let mut hanging = None;
            if beside {
                let settings = rig.settings(Duration::ZERO);
                let created = device::create_with(&rig.system, &name, None, settings, Arc::new(Stuck)).await;
                created.map_err(|e| e.to_string())?;
                hanging = Some(rig.load(&name, 32, false).await?);
            }
            let load = rig.load("app", 8, true).await?;
            load.rate(options.time / 2.0).await;
            latencies[usize::from(beside)].extend(load.stop().await);
            if let Some(hanging) = hanging {
                rig.delete(&name).await?;
                hanging.ended().await;
            }
        }
        let p99 = latencies.map(|latencies| percentile_of(latencies, 99.0));
        alone.push(p99[0]);
        with_stuck.push(p99[1]);
        part.push(p99[1] / p99[0]);
    }
    report.add("null handler, depth 8, alone", "us (p99)", &mut alone, "");
    report.add("  with another handler stuck", "us (p99)", &mut with_stuck, "");
    report.add("  ratio", "", &mut part, "(at most 1.2)");
    rig.delete("app").await
}

/// Values a second through one ring from four threads that get them back by credit.
fn completions(options: &Options, report: &mut Report) {
    struct Awake;
    impl Unpark for Awake {
        fn unpark(&self) {}
    }
    const PRODUCERS: usize = 4;
    const EACH: usize = 256;
    let mut rates = Vec::new();
    for _ in 0..options.runs {
        let (home, mut consumer) = ReturnRing::<Box<(usize, u64)>>::new(PRODUCERS * EACH, Waker::new(Arc::new(Awake)));
        let home = Arc::new(home);
        let (stop, running) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(PRODUCERS)));
        let mut back = Vec::new();
        let mut threads = Vec::new();
        for producer in 0..PRODUCERS {
            let (tx, mut rx) = ring(EACH);
            (0..EACH).for_each(|n| tx.push(Box::new((producer, n as u64))));
            back.push(tx);
            let (home, stop, running) = (Arc::clone(&home), Arc::clone(&stop), Arc::clone(&running));
            threads.push(std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    // As a worker does: what came in one batch is completed one by one.
                    let count = rx.pop_batch(64, |value| drop(home.send(value)));
                    if count == 0 {
                        // There may be fewer cores than threads.
                        std::thread::yield_now();
                    }
                }
                running.fetch_sub(1, Ordering::Release);
            }));
        }
        let began = std::time::Instant::now();
        let mut total = 0u64;
        let end = Duration::from_secs_f64(options.time);
        let mut elapsed = began.elapsed();
        while elapsed < end {
            for _ in 0..64 {
                let count = consumer.pop_batch(256, |value| back[value.0].push(value));
                total += count as u64;
                if count == 0 {
                    std::thread::yield_now();
                }
            }
            elapsed = began.elapsed();
        }
        stop.store(true, Ordering::Relaxed);
        while running.load(Ordering::Acquire) > 0 {
            consumer.pop_batch(usize::MAX, |value| back[value.0].push(value));
            std::thread::yield_now();
        }
        threads.into_iter().for_each(|thread| drop(thread.join()));
        rates.push(total as f64 / elapsed.as_secs_f64() / 1e6);
    }
    report.add("completions through one ring from 4 threads", "million/s", &mut rates, "(at least 1)");
}

/// Seconds of processor time that this process has had.
fn processor_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Eight devices that are open and have nothing to do.
async fn idle(rig: &Rig, options: &Options, report: &mut Report) -> Result<(), String> {
    let mut loads = Vec::new();
    for n in 0..8 {
        let name = format!("idle{n}");
        device::create(&rig.system, &name, None, Settings::new("null", BLOCK, BLOCKS))
            .await
            .map_err(|e| e.to_string())?;
        let load = rig.load(&name, 4, false).await?;
        load.rate(0.01).await;
        loads.push(load);
    }
    // Their channels stay open under descriptors of their own; only the loads stop.
    let mut kept = Vec::new();
    for n in 0..8 {
        let name = format!("idle{n}");
        kept.push(rig.system.open(&name, false, "the benchmark", Arc::new(|_| {})).map_err(|e| e.to_string())?);
    }
    let bdevs: Vec<_> = kept.iter().map(|descriptor| Arc::clone(descriptor.bdev())).collect();
    let open = move |cx: &mut Context| {
        let runtime = IoRuntime::of(cx);
        let mut runtime = runtime.borrow_mut();
        bdevs.iter().filter_map(|bdev| runtime.get_channel(bdev).ok()).collect::<Vec<_>>()
    };
    let channels = rig.system.reactors()[0].call(open).await.map_err(|e| e.to_string())?;
    for load in loads {
        load.stop().await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut parts = Vec::new();
    for _ in 0..options.runs {
        let (began, before) = (std::time::Instant::now(), processor_seconds());
        tokio::time::sleep(Duration::from_secs_f64(options.time.max(1.0))).await;
        parts.push(100.0 * (processor_seconds() - before) / began.elapsed().as_secs_f64());
    }
    report.add("processor, 8 devices open and idle", "% of a core", &mut parts, "(at most 1)");
    let close = move |cx: &mut Context| {
        let runtime = IoRuntime::of(cx);
        channels.into_iter().for_each(|channel| runtime.borrow_mut().put_channel(channel));
    };
    rig.system.reactors()[0].call(close).await.map_err(|e| e.to_string())?;
    drop(kept);
    for n in 0..8 {
        rig.delete(&format!("idle{n}")).await?;
    }
    Ok(())
}

/// Pages of memory and descriptors that this process has.
fn holdings() -> (f64, f64) {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: f64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0.0);
    let fds = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    (pages * 4.0, fds as f64)
}

/// Devices that come and go under load.
async fn cycles(rig: &Rig, options: &Options, report: &mut Report) -> Result<(), String> {
    // The first ones make the allocator and the host's tables as large as they need to be.
    let warm = (options.cycles / 10).clamp(1, 100);
    let (mut deletes, mut lost) = (Vec::new(), 0);
    let mut before = holdings();
    for cycle in 0..warm + options.cycles {
        if cycle == warm {
            before = holdings();
            deletes.clear();
        }
        device::create(&rig.system, "cycle", None, rig.settings(Duration::from_micros(50)))
            .await
            .map_err(|e| e.to_string())?;
        let load = rig.load("cycle", 32, false).await?;
        while load.shared.completed.load(Ordering::Relaxed) < 100 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let began = std::time::Instant::now();
        device::delete(&rig.system, "cycle").await.map_err(|e| e.to_string())?;
        deletes.push(began.elapsed().as_secs_f64() * 1000.0);
        load.ended().await;
        lost += load.shared.submitted.load(Ordering::Relaxed) - load.shared.completed.load(Ordering::Relaxed);
    }
    let after = holdings();
    let name = format!("delete under load, {} cycles", options.cycles);
    report.add(&name, "ms", &mut deletes, "(each at most 1000)");
    report.add("  completions lost", "", &mut [lost as f64], "(none)");
    report.add("  memory grown", "KiB", &mut [after.0 - before.0], "(no leak)");
    report.add("  descriptors grown", "", &mut [after.1 - before.1], "(none)");
    Ok(())
}
