//! A load on block devices, shared by `perf` (over NVMe-oF) and `bdevperf` (in this process): its options, its engine and
//! its report.

pub mod engine;
mod histogram;
mod ledger;
mod stamp;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use engine::{Live, Report};
use serde_json::{Value, json};

/// What is reported, in per cent.
const PERCENTILES: [f64; 8] = [50.0, 90.0, 95.0, 99.0, 99.9, 99.99, 99.999, 100.0];
/// Seconds to measure if nothing else is said.
const DEFAULT_TIME: f64 = 10.0;

/// Options of a load.
#[derive(Clone, Debug, clap::Args)]
pub struct LoadOptions {
    /// What to do.
    #[arg(long, value_enum)]
    pub rw: Mode,
    /// Reads among random reads and writes, per cent.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub rwmixread: u8,
    /// Bytes of a command.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(512..=16 << 20))]
    pub bs: u32,
    /// Commands outstanding on each queue.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub qd: u16,
    /// Seconds to measure [default: 10, or as long as --count takes].
    #[arg(long)]
    pub time: Option<f64>,
    /// Commands to measure, without a warm-up.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Seconds of load before measuring.
    #[arg(long, default_value_t = 1.0)]
    pub warmup: f64,
    /// Commands a second: each is due at its time, and its latency counts from then, so that what a stall holds up shows
    /// (open loop). Without it, commands follow those that complete (closed loop).
    #[arg(long)]
    pub rate: Option<f64>,
    /// Use only the first bytes of each volume.
    #[arg(long, value_name = "BYTES")]
    pub size: Option<u64>,
    /// Stamp every block written with its place, generation and checksum; check every block read that this run has written,
    /// and read all of them again at the end. What was there before is lost.
    #[arg(long)]
    pub verify: bool,
    /// Seconds that a command may take before the run ends as failed.
    #[arg(long, default_value_t = 30.0)]
    pub io_timeout: f64,
    /// Core to run on [default: wherever].
    #[arg(long)]
    pub core: Option<usize>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Kinds of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Reads, one behind the other.
    Read,
    /// Writes, one behind the other.
    Write,
    /// Reads anywhere.
    Randread,
    /// Writes anywhere.
    Randwrite,
    /// Both, anywhere.
    Randrw,
}

impl LoadOptions {
    /// Whether it writes.
    pub fn writes(&self) -> bool {
        !matches!(self.rw, Mode::Read | Mode::Randread)
    }

    /// How long a command may take.
    pub fn patience(&self) -> Duration {
        Duration::from_secs_f64(self.io_timeout)
    }

    /// Checks what the parser cannot.
    ///
    /// # Errors
    /// Which option is wrong, and what it may be.
    pub fn check(&self) -> Result<(), String> {
        let seconds = [("--time", self.time), ("--warmup", Some(self.warmup)), ("--io-timeout", Some(self.io_timeout))];
        for (name, value) in seconds {
            if value.is_some_and(|value| !(0.0..=1e7).contains(&value)) {
                return Err(format!("{name}: give seconds, up to 10000000"));
            }
        }
        if self.rate.is_some_and(|rate| !(0.001..=1e9).contains(&rate)) {
            return Err("--rate: give commands a second, 0.001 to 1000000000".into());
        }
        if self.verify && !self.writes() {
            return Err("--verify checks what this run writes; use it with --rw write, randwrite or randrw".into());
        }
        Ok(())
    }
}

/// Sets a flag at SIGINT and SIGTERM. What it ends takes moments, so that a second one, as some programs that pass signals
/// on send it, means nothing.
///
/// # Errors
/// As the host says.
pub fn stop_flag() -> Result<Arc<AtomicBool>, String> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(|e| format!("cannot watch for signals: {e}"))?;
    }
    Ok(stop)
}

/// Waits for the report, and meanwhile shows how it goes if somebody looks. `None`: the run ended without one.
pub fn wait(reports: &Receiver<Report>, live: &Live, bs: u32) -> Option<Report> {
    let shown = std::io::stderr().is_terminal();
    let (mut last, mut at) = (0, Instant::now());
    let report = loop {
        match reports.recv_timeout(Duration::from_millis(500)) {
            Ok(report) => break Some(report),
            Err(RecvTimeoutError::Disconnected) => break None,
            Err(RecvTimeoutError::Timeout) if !shown => {}
            Err(RecvTimeoutError::Timeout) => {
                let completed = live.completed.load(Ordering::Relaxed);
                let iops = completed.saturating_sub(last) as f64 / at.elapsed().as_secs_f64();
                (last, at) = (completed, Instant::now());
                let phase = match () {
                    () if live.checking.load(Ordering::Relaxed) => "checking ",
                    () if live.measuring.load(Ordering::Relaxed) => "measuring",
                    () => "warming up",
                };
                let mib = iops * f64::from(bs) / f64::from(1 << 20);
                let errors = live.errors.load(Ordering::Relaxed);
                eprint!("\r{phase}  {completed} commands  {iops:.0} IOPS  {mib:.1} MiB/s  {errors} errors   ");
                // Nobody is harmed by a progress line that does not appear.
                let _ = std::io::stderr().flush();
            }
        }
    };
    if shown {
        eprint!("\r\x1b[K");
    }
    report
}

fn as_json(options: &LoadOptions, report: &Report) -> Value {
    let histogram = &report.histogram;
    let us = |ns: u64| ns as f64 / 1e3;
    let percentiles: serde_json::Map<_, _> =
        PERCENTILES.iter().map(|p| (p.to_string(), json!(us(histogram.percentile_ns(*p))))).collect();
    let iops = iops(report);
    let mut value = json!({
        "iops": iops,
        "bytes_per_s": iops * f64::from(options.bs),
        "mean_us": histogram.mean_ns() / 1e3,
        "percentiles_us": percentiles,
        "latency_from": latency_from(options),
        "cpu_s": report.cpu_s,
        "busy": report.busy,
        "errors": report.errors,
        "seconds": report.seconds,
        "commands": report.completed,
        "reads": report.reads,
        "writes": report.completed - report.reads,
        "interrupted": report.interrupted,
    });
    if options.rate.is_some() {
        value["late"] = json!(report.late);
    }
    if !report.kinds.is_empty() {
        value["errors_by_kind"] = report.kinds.iter().map(|(kind, count)| (kind.clone(), json!(count))).collect();
    }
    if let Some(verified) = &report.verified {
        value["verify"] = json!({
            "checked_blocks": verified.checked_blocks,
            "mismatches": verified.mismatches,
            "complete": verified.complete,
        });
    }
    if let Some(failure) = &report.failure {
        value["failure"] = json!(failure);
    }
    value
}

fn latency_from(options: &LoadOptions) -> &'static str {
    if options.rate.is_some() { "schedule" } else { "submission" }
}

fn iops(report: &Report) -> f64 {
    if report.seconds > 0.0 { report.completed as f64 / report.seconds } else { 0.0 }
}

/// Prints the report, and what was wrong to standard error; what the process ends with.
pub fn print(options: &LoadOptions, report: &Report) -> ExitCode {
    let mismatches = report.verified.as_ref().map_or(0, |verified| verified.mismatches);
    if options.json {
        println!("{}", as_json(options, report));
    } else if report.seconds > 0.0 {
        print_text(options, report);
    }
    if let Some(verified) = &report.verified {
        verified.described.iter().for_each(|why| eprintln!("verify: {why}"));
        if mismatches > 0 {
            eprintln!("verify: {mismatches} blocks are not what was written");
        } else if report.interrupted || report.failure.is_some() {
            eprintln!("verify: what was written was not read again, as the run ended early");
        }
    }
    report.kinds.iter().for_each(|(kind, count)| eprintln!("{count} commands failed: {kind}"));
    if let Some(why) = &report.failure {
        eprintln!("{why}");
    }
    let bad = report.failure.is_some() || report.errors > 0 || mismatches > 0;
    if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn print_text(options: &LoadOptions, report: &Report) {
    let (histogram, iops) = (&report.histogram, iops(report));
    let mib = iops * f64::from(options.bs) / f64::from(1 << 20);
    let early = if report.interrupted { ", interrupted" } else { "" };
    println!("{iops:.0} IOPS, {mib:.1} MiB/s over {:.2} s{early}", report.seconds);
    println!("mean {:.1} us, CPU {:.2} s, errors {}", histogram.mean_ns() / 1e3, report.cpu_s, report.errors);
    if let Some(rate) = options.rate {
        println!(
            "open loop at {rate} a second: latency counts from when a command was due; {} came too late to be sent",
            report.late
        );
    }
    for percent in PERCENTILES {
        println!("  {percent:>7} %  {:>10.1} us", histogram.percentile_ns(percent) as f64 / 1e3);
    }
    if let Some(verified) = &report.verified {
        println!("verified {} blocks, {} wrong", verified.checked_blocks, verified.mismatches);
    }
}
