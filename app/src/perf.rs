//! `ringstone perf`: a load over NVMe-oF from one reactor that never sleeps.
//!
//! Every queue keeps its depth of commands outstanding. All completions that one receive brings are answered with new
//! commands that leave in one send. The clock is read once for all completions of a poll, so a latency is the time
//! from the send that a command left with to the receive that found its completion.
//!
//! Latencies go into log-linear buckets: 64 to an octave, so a percentile is off by less than 1.6 %.

use std::net::{SocketAddr, ToSocketAddrs};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use nvmf::host::{Completion, Controller, IoQueue, Options as HostOptions, Polled, State};
use nvmf::tcp::host_transport::TcpConnector;
use reactor::file::EngineChoice;
use reactor::platform::OsPlatform;
use reactor::reactor::{PollPolicy, ReactorConfig, ReactorThreads};
use reactor::{Buffers, Context, Instant, Platform, Poller, Progress, ReactorId, Schedule};
use serde_json::json;

/// What is reported, in per cent.
const PERCENTILES: [f64; 8] = [50.0, 90.0, 95.0, 99.0, 99.9, 99.99, 99.999, 100.0];
/// Every step of the set-up, and the wait for the last completions.
const PATIENCE: Duration = Duration::from_secs(5);
/// A queue that completes nothing for so long is given up.
const IO_TIMEOUT: Duration = Duration::from_secs(30);
const KATO_MS: u32 = 30_000;
/// The most memory for payloads.
const MAX_PAYLOAD_BYTES: u64 = 4 << 30;

/// Options of `ringstone perf`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Transport.
    #[arg(long, value_enum, default_value_t = Trtype::Tcp)]
    trtype: Trtype,
    /// Address of the target.
    #[arg(long)]
    traddr: String,
    /// Port of the target.
    #[arg(long, default_value_t = 4420)]
    trsvcid: u16,
    /// NQN of the subsystem.
    #[arg(long)]
    subnqn: String,
    /// NQN that this host goes by.
    #[arg(long, default_value = "nqn.2014-08.org.nvmexpress:uuid:7d5c6f1e-53a0-4d5b-9c3a-0f6f4f1d2b11")]
    hostnqn: String,
    /// Namespace [default: the first that is active].
    #[arg(long)]
    nsid: Option<u32>,
    /// What to do.
    #[arg(long, value_enum)]
    rw: Mode,
    /// Reads among random reads and writes, per cent.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    rwmixread: u8,
    /// Bytes of a command.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=16 << 20))]
    bs: u32,
    /// Commands outstanding on each queue.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=4096))]
    qd: u16,
    /// I/O queues.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,
    /// Seconds to measure.
    #[arg(long, default_value_t = 10.0)]
    time: f64,
    /// Seconds of load before measuring.
    #[arg(long, default_value_t = 1.0)]
    warmup: f64,
    /// Core to run on [default: wherever].
    #[arg(long)]
    core: Option<usize>,
    /// Ask for header digests.
    #[arg(long)]
    hdr_digest: bool,
    /// Ask for data digests.
    #[arg(long)]
    data_digest: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Trtype {
    Tcp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    Read,
    Write,
    Randread,
    Randwrite,
    Randrw,
}

/// Counts of latencies in log-linear buckets.
struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum_ns: u128,
    max_ns: u64,
}

const SUB: usize = 64;

impl Histogram {
    fn new() -> Self {
        Self { buckets: vec![0; SUB * 60], count: 0, sum_ns: 0, max_ns: 0 }
    }

    /// Values below 64 have a bucket each; above, each octave has 64.
    fn bucket(ns: u64) -> usize {
        let octave = (64 - (ns | 1).leading_zeros() as usize).saturating_sub(7);
        octave * SUB + (ns >> octave) as usize
    }

    /// The highest value of a bucket.
    fn upper(bucket: usize) -> u64 {
        if bucket < 2 * SUB {
            return bucket as u64;
        }
        let octave = bucket / SUB - 1;
        (((bucket - octave * SUB) as u64 + 1) << octave) - 1
    }

    #[inline]
    fn add(&mut self, ns: u64) {
        self.buckets[Self::bucket(ns)] += 1;
        self.count += 1;
        self.sum_ns += u128::from(ns);
        self.max_ns = self.max_ns.max(ns);
    }

    fn percentile_ns(&self, percent: f64) -> u64 {
        let rank = ((self.count as f64 * percent / 100.0).ceil() as u64).clamp(1, self.count.max(1));
        let mut seen = 0;
        for (bucket, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Self::upper(bucket).min(self.max_ns);
            }
        }
        self.max_ns
    }

    fn mean_ns(&self) -> f64 {
        self.sum_ns as f64 / self.count.max(1) as f64
    }
}

/// What came of it.
struct Report {
    histogram: Histogram,
    errors: u64,
    seconds: f64,
    cpu_s: f64,
    /// Why it ended early.
    failure: Option<String>,
}

/// CPU time of this process, user and system, seconds.
fn cpu_seconds() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    SetUp,
    WarmUp,
    Measure,
    WindDown,
}

/// A namespace, as far as I/O has to know it.
#[derive(Clone, Copy)]
struct Namespace {
    nsid: u32,
    blocks: u64,
    block_bytes: u32,
}

struct Load {
    options: Options,
    controller: Controller,
    queues: Vec<IoQueue>,
    namespace: Namespace,
    blocks_per_io: u32,
    ios: u64,
    next: u64,
    random: u64,
    /// Where each tag's command was sent; a tag is the queue's number times the depth plus its own.
    sent_at: Vec<Instant>,
    payloads: Vec<Buffers>,
    done: Vec<Completion>,
    phase: Phase,
    phase_ends: Instant,
    measured_from: Instant,
    cpu_from: f64,
    report: Report,
    interrupted: Arc<AtomicBool>,
    out: mpsc::Sender<Report>,
}

impl Load {
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn submit(&mut self, queue: usize, tag: u64, data: Buffers, now: Instant) {
        let mode = self.options.rw;
        let place = match mode {
            Mode::Read | Mode::Write => {
                self.next = if self.next + 1 >= self.ios { 0 } else { self.next + 1 };
                self.next
            }
            _ => ((u128::from(self.random()) * u128::from(self.ios)) >> 64) as u64,
        };
        let reads = match mode {
            Mode::Read | Mode::Randread => true,
            Mode::Write | Mode::Randwrite => false,
            Mode::Randrw => (self.random() >> 32) % 100 < u64::from(self.options.rwmixread),
        };
        let (nsid, blocks) = (self.namespace.nsid, self.blocks_per_io);
        let slba = place * u64::from(blocks);
        self.sent_at[tag as usize] = now;
        let queue = &mut self.queues[queue];
        if reads {
            queue.read(tag, nsid, slba, blocks, data, now);
        } else {
            queue.write(tag, nsid, slba, blocks, data, now);
        }
    }

    /// The controller is live: connects the queues; whether all are.
    fn connect_queues(&mut self, now: Instant) -> Result<bool, String> {
        if self.queues.is_empty() {
            for qid in 1..=self.controller.io_queues() {
                let params = self.controller.queue_params(qid).ok_or("the controller has no I/O queue")?;
                self.queues.push(IoQueue::connect(params, qid.into(), now).map_err(|e| e.to_string())?);
            }
        }
        for queue in &mut self.queues {
            queue.poll(now, &mut Polled, &mut self.done).map_err(|e| e.to_string())?;
        }
        Ok(self.queues.iter().all(IoQueue::is_live))
    }

    /// All queues are live: checks the sizes and fills them.
    fn begin(&mut self, now: Instant) -> Result<(), String> {
        let known = self.controller.inventory().namespaces();
        let found = match self.options.nsid {
            Some(nsid) => known.get(&nsid).ok_or(format!("the subsystem has no namespace {nsid} for this host"))?,
            None => known.values().next().ok_or("the subsystem has no namespace for this host")?,
        };
        self.namespace = Namespace { nsid: found.nsid, blocks: found.blocks, block_bytes: found.block_bytes };
        let (bs, block) = (self.options.bs, self.namespace.block_bytes);
        if bs % block != 0 || bs / block > 65536 {
            return Err(format!("--bs {bs} is not 1 to 65536 blocks of {block} bytes"));
        }
        if let Some(max) = self.controller.max_io_bytes().filter(|max| u64::from(bs) > *max) {
            return Err(format!("--bs {bs} is above the controller's limit of {max}"));
        }
        self.blocks_per_io = bs / block;
        self.ios = self.namespace.blocks / u64::from(self.blocks_per_io);
        if self.ios == 0 {
            return Err("the namespace is smaller than one command".into());
        }
        let depth = usize::from(self.options.qd);
        let count = self.queues.len() * depth;
        if count as u64 * u64::from(bs) > MAX_PAYLOAD_BYTES {
            return Err(format!("--queues, --qd and --bs take more than {} GiB of memory", MAX_PAYLOAD_BYTES >> 30));
        }
        self.sent_at = vec![now; count];
        self.done = Vec::with_capacity(depth);
        for queue in 0..self.queues.len() {
            for tag in queue * depth..(queue + 1) * depth {
                if !self.queues[queue].can_submit() {
                    break;
                }
                let mut data = Buffers::heap(bs as usize);
                data.fill(tag as u8);
                self.submit(queue, tag as u64, data, now);
            }
            self.queues[queue].send().map_err(|e| e.to_string())?;
        }
        self.phase = Phase::WarmUp;
        self.phase_ends = now + Duration::from_secs_f64(self.options.warmup);
        Ok(())
    }

    /// One receive and one send a queue.
    fn turn(&mut self, cx: &Context) -> Result<bool, String> {
        let mut busy = false;
        for index in 0..self.queues.len() {
            let mut done = std::mem::take(&mut self.done);
            busy |= self.queues[index].poll(cx.now(), &mut Polled, &mut done).map_err(|e| e.to_string())?;
            if !done.is_empty() {
                let now = cx.read_clock();
                for completion in done.drain(..) {
                    self.count(&completion, now);
                    if self.phase == Phase::WindDown {
                        self.payloads.push(completion.data);
                    } else {
                        self.submit(index, completion.user, completion.data, now);
                    }
                }
            }
            self.done = done;
            self.queues[index].send().map_err(|e| e.to_string())?;
        }
        Ok(busy)
    }

    #[inline]
    fn count(&mut self, completion: &Completion, now: Instant) {
        if self.phase != Phase::Measure {
            return;
        }
        if completion.cqe.status().is_success() {
            self.report.histogram.add(now.nanos_since(self.sent_at[completion.user as usize]));
        } else {
            self.report.errors += 1;
        }
    }

    fn outstanding(&self) -> usize {
        self.queues.iter().map(IoQueue::outstanding).sum()
    }

    fn step(&mut self, cx: &Context) -> Result<bool, String> {
        let now = cx.now();
        let mut busy = self.controller.poll(now, &mut Polled);
        if self.controller.state() == State::Down {
            return Err(self.controller.error().map_or("the controller is down".into(), ToString::to_string));
        }
        let stop = self.interrupted.load(Ordering::Relaxed);
        match self.phase {
            Phase::SetUp if stop => return Err("interrupted before the load began".into()),
            Phase::SetUp if self.controller.is_live() => {
                if self.connect_queues(now)? {
                    self.begin(now)?;
                }
                return Ok(true);
            }
            Phase::SetUp => return Ok(busy),
            Phase::WarmUp if stop || now >= self.phase_ends => {
                self.phase = Phase::Measure;
                (self.measured_from, self.cpu_from) = (now, cpu_seconds());
                self.phase_ends = now + Duration::from_secs_f64(self.options.time);
            }
            Phase::Measure if stop || now >= self.phase_ends => {
                self.stop_measuring(now);
                self.phase = Phase::WindDown;
                self.phase_ends = now + PATIENCE;
            }
            Phase::WindDown if self.outstanding() == 0 || now >= self.phase_ends => {
                self.controller.shut_down();
                self.controller.poll(now, &mut Polled);
                self.finish();
                return Ok(true);
            }
            _ => {}
        }
        busy |= self.turn(cx)?;
        Ok(busy)
    }

    fn stop_measuring(&mut self, now: Instant) {
        self.report.seconds = now.since(self.measured_from).as_secs_f64();
        self.report.cpu_s = cpu_seconds() - self.cpu_from;
    }

    fn finish(&mut self) {
        let empty = Report { histogram: Histogram::new(), errors: 0, seconds: 0.0, cpu_s: 0.0, failure: None };
        // The main thread waits for this until it comes; there is nobody to tell if it is gone.
        let _ = self.out.send(std::mem::replace(&mut self.report, empty));
        self.queues.clear();
    }
}

/// The load as a poller; ends itself after its report.
struct LoadPoller(Option<Load>);

impl Poller for LoadPoller {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        let Some(load) = &mut self.0 else { return Progress::Idle };
        match load.step(cx) {
            Ok(busy) => Progress::from_busy(busy),
            Err(why) => {
                load.report.failure = Some(why);
                // Commands whose fate is unknown count as errors.
                load.report.errors += load.outstanding() as u64;
                if load.phase == Phase::Measure {
                    load.stop_measuring(cx.now());
                }
                load.finish();
                self.0 = None;
                Progress::Busy
            }
        }
    }
}

/// Runs the command.
pub fn main(options: &Options) -> ExitCode {
    match run(options) {
        Ok(report) => {
            print(options, &report);
            if let Some(why) = &report.failure {
                eprintln!("{why}");
            }
            if report.failure.is_some() || report.errors > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn address(options: &Options) -> Result<SocketAddr, String> {
    let Trtype::Tcp = options.trtype;
    let found = (options.traddr.as_str(), options.trsvcid).to_socket_addrs();
    found.map_err(|e| format!("{}: {e}", options.traddr))?.next().ok_or(format!("{}: no address", options.traddr))
}

fn run(options: &Options) -> Result<Report, String> {
    for (name, seconds) in [("--time", options.time), ("--warmup", options.warmup)] {
        if !(0.0..=1e7).contains(&seconds) {
            return Err(format!("{name} {seconds}: seconds, up to 10000000"));
        }
    }
    let address = address(options)?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted)).map_err(|e| format!("signals: {e}"))?;
    }
    let platform: Arc<dyn Platform> = Arc::new(OsPlatform::new(EngineChoice::Threads));
    let (out, reports) = mpsc::channel();
    let config = ReactorConfig { id: ReactorId(0), core: options.core, policy: PollPolicy::Busy };
    let setup = {
        let options = options.clone();
        move |cx: &mut Context| {
            let load = load(cx, &options, address, &interrupted, &out).map_err(std::io::Error::other)?;
            cx.add_poller("perf", Schedule::Active, Box::new(LoadPoller(Some(load))));
            Ok(())
        }
    };
    let reactors = ReactorThreads::start(&platform, &[config], setup).map_err(|e| format!("cannot start: {e}"))?;
    let report = reports.recv();
    let stopped = reactors.stop();
    report.map_err(|_| match stopped {
        Err(error) => error.to_string(),
        Ok(()) => "the load ended without a result".to_owned(),
    })
}

fn load(
    cx: &Context,
    options: &Options,
    address: SocketAddr,
    interrupted: &Arc<AtomicBool>,
    out: &mpsc::Sender<Report>,
) -> Result<Load, String> {
    let (now, platform) = (cx.read_clock(), cx.platform());
    let connector = TcpConnector {
        network: platform.network(),
        address,
        header_digest: options.hdr_digest,
        data_digest: options.data_digest,
    };
    let mut hostid = [0; 16];
    platform.random(&mut hostid);
    let host_options = HostOptions {
        subnqn: options.subnqn.clone(),
        hostnqn: options.hostnqn.clone(),
        hostid,
        io_queues: options.queues,
        io_depth: options.qd,
        step_timeout: PATIENCE,
        io_timeout: IO_TIMEOUT,
        kato_ms: KATO_MS,
        ..HostOptions::default()
    };
    let controller = Controller::new(Arc::new(connector), host_options, 0, now);
    Ok(Load {
        options: options.clone(),
        controller,
        queues: Vec::new(),
        namespace: Namespace { nsid: 0, blocks: 0, block_bytes: 1 },
        blocks_per_io: 0,
        ios: 0,
        next: 0,
        random: platform.random_u64() | 1,
        sent_at: Vec::new(),
        payloads: Vec::new(),
        done: Vec::new(),
        phase: Phase::SetUp,
        phase_ends: now,
        measured_from: now,
        cpu_from: 0.0,
        report: Report { histogram: Histogram::new(), errors: 0, seconds: 0.0, cpu_s: 0.0, failure: None },
        interrupted: Arc::clone(interrupted),
        out: out.clone(),
    })
}

fn print(options: &Options, report: &Report) {
    let histogram = &report.histogram;
    let iops = if report.seconds > 0.0 { histogram.count as f64 / report.seconds } else { 0.0 };
    let bytes_per_s = iops * f64::from(options.bs);
    let us = |ns: u64| ns as f64 / 1e3;
    if options.json {
        let percentiles: serde_json::Map<_, _> =
            PERCENTILES.iter().map(|p| (p.to_string(), json!(us(histogram.percentile_ns(*p))))).collect();
        let report = json!({
            "iops": iops,
            "bytes_per_s": bytes_per_s,
            "mean_us": histogram.mean_ns() / 1e3,
            "percentiles_us": percentiles,
            "cpu_s": report.cpu_s,
            "errors": report.errors,
            "seconds": report.seconds,
        });
        println!("{report}");
        return;
    }
    println!("{iops:.0} IOPS, {:.1} MiB/s over {:.2} s", bytes_per_s / f64::from(1 << 20), report.seconds);
    println!("mean {:.1} us, CPU {:.2} s, errors {}", histogram.mean_ns() / 1e3, report.cpu_s, report.errors);
    for percent in PERCENTILES {
        println!("  {percent:>7} %  {:>10.1} us", us(histogram.percentile_ns(percent)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_follow_each_other_and_hold_their_values() {
        let holds = |ns: u64| {
            let bucket = Histogram::bucket(ns);
            let upper = Histogram::upper(bucket);
            assert!(upper >= ns && upper - ns <= ns / 64, "{ns} in a bucket up to {upper}");
            bucket
        };
        let mut last = 0;
        for bucket in (0..200_000).map(holds) {
            assert!(bucket == last || bucket == last + 1, "{last} is followed by {bucket}");
            last = bucket;
        }
        for ns in (1..57).map(|shift| 127 << shift).chain([u64::MAX >> 1]) {
            assert!(holds(ns) < Histogram::new().buckets.len());
        }
    }

    #[test]
    fn percentiles_of_a_known_spread() {
        let mut histogram = Histogram::new();
        (1..=100_000).for_each(|us| histogram.add(us * 1000));
        for (percent, want) in [(50.0, 50_000_000.0), (99.0, 99_000_000.0), (99.999, 99_999_000.0)] {
            let got = histogram.percentile_ns(percent) as f64;
            assert!((got / want - 1.0).abs() < 1.0 / 64.0, "{percent}: {got}");
        }
        assert_eq!(histogram.percentile_ns(100.0), 100_000_000);
        assert_eq!(histogram.mean_ns(), 50_000_500.0);
    }
}
