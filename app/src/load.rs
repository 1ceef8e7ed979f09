//! A load on block devices, shared by `perf` (over NVMe-oF) and `bdevperf` (in this process): its options, its engine and
//! its report.

pub mod crew;
pub mod engine;
mod histogram;
mod ledger;
pub mod report;
mod stamp;

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use crew::Crew;
use report::Report;

use crate::cores::{self, Cores};

/// Seconds to measure if nothing else is said.
const DEFAULT_TIME: f64 = 10.0;

/// Options of a load.
#[derive(Clone, Debug, clap::Args)]
pub struct LoadOptions {
    /// What to do.
    #[arg(long, value_enum)]
    pub rw: Mode,
    /// Reads of --rw randrw, per cent [default: 50].
    #[arg(long, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub rwmixread: Option<u8>,
    /// Bytes of a command, as in 4096, 4k or 1m.
    #[arg(long, value_name = "BYTES", default_value = "4096", value_parser = parse_bs)]
    pub bs: u32,
    /// Commands outstanding on each queue.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub qd: u16,
    /// Seconds to measure [default: 10, or as long as --count takes].
    #[arg(long, allow_negative_numbers = true)]
    pub time: Option<f64>,
    /// Commands to measure, without a warm-up.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Seconds of load before measuring.
    #[arg(long, allow_negative_numbers = true, default_value_t = 1.0)]
    pub warmup: f64,
    /// Commands a second: each is due at its time, and its latency counts from then, so that what a stall holds up shows
    /// (open loop). Without it, commands follow those that complete (closed loop).
    #[arg(long, allow_negative_numbers = true)]
    pub rate: Option<f64>,
    /// Use only the first bytes of each volume, as in 1g.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub size: Option<u64>,
    /// Write everything once before the load, so that reads find data that was written. What was there before is lost.
    #[arg(long)]
    pub fill: bool,
    /// Stamp every block written with its place, generation and checksum; check every block read that this run has written,
    /// and read all of them again at the end. What was there before is lost.
    #[arg(long)]
    pub verify: bool,
    /// Seconds that a command may take before the run ends as failed.
    #[arg(long, allow_negative_numbers = true, default_value_t = 30.0)]
    pub io_timeout: f64,
    /// Cores to run on, as in 0,2-3: a reactor on each, which the queues are spread over. Each has its part of the volumes
    /// when it goes through them in order or verifies [default: one, wherever].
    #[arg(long, value_name = "LIST", value_parser = cores::parse)]
    pub core: Option<Cores>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Show how it goes on standard error also where that is no terminal, or where JSON goes to a program.
    #[arg(long)]
    pub progress: bool,
}

/// Kinds of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Reads in order.
    Read,
    /// Writes in order.
    Write,
    /// Reads anywhere.
    Randread,
    /// Writes anywhere.
    Randwrite,
    /// Both, anywhere.
    Randrw,
}

/// Reads a number of bytes with a unit.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no number of bytes; write for example 4096, 4k, 1m or 2g");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = number.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

fn parse_bs(text: &str) -> Result<u32, String> {
    let bytes = parse_bytes(text)?;
    let fits = u32::try_from(bytes).ok().filter(|bytes| (512..=16 << 20).contains(bytes));
    fits.ok_or_else(|| format!("a command has 512 to 16m bytes, and not {text}"))
}

impl LoadOptions {
    /// Whether it writes.
    pub fn writes(&self) -> bool {
        self.fill || !matches!(self.rw, Mode::Read | Mode::Randread)
    }

    /// The cores of its reactors; `None` is wherever.
    ///
    /// # Errors
    /// One of them may not be used.
    pub fn cores(&self) -> Result<Vec<Option<usize>>, String> {
        match &self.core {
            None => Ok(vec![None]),
            Some(cores) => Ok(cores.checked("--core")?.into_iter().map(Some).collect()),
        }
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
        // Below a millisecond nothing is measured, and nothing is answered in time.
        let least = [
            ("--time", self.time, 1e-3),
            ("--warmup", Some(self.warmup), 0.0),
            ("--io-timeout", Some(self.io_timeout), 1e-3),
        ];
        for (name, value, least) in least {
            if value.is_some_and(|value| !(least..=1e7).contains(&value)) {
                return Err(format!("{name}: give seconds, {least} to 10000000"));
            }
        }
        if self.rwmixread.is_some() && self.rw != Mode::Randrw {
            return Err("--rwmixread is the share of reads in --rw randrw; leave it out, or give that".into());
        }
        if self.rate.is_some_and(|rate| !(0.001..=1e9).contains(&rate)) {
            return Err("--rate: give commands a second, 0.001 to 1000000000".into());
        }
        if self.verify && !self.writes() {
            return Err(
                "--verify checks what this run writes; use it with --rw write, randwrite or randrw, or with --fill"
                    .into(),
            );
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

/// Waits for the reports of all members, and meanwhile shows how it goes if somebody looks. `None`: the run ended without
/// any.
pub fn wait(options: &LoadOptions, reports: &Receiver<Report>, crew: &Crew) -> Option<Report> {
    let mut line = ProgressLine::new(options);
    let mut found = Vec::with_capacity(crew.size());
    while found.len() < crew.size() {
        match reports.recv_timeout(Duration::from_millis(500)) {
            Ok(report) => found.push(report),
            Err(RecvTimeoutError::Timeout) => line.show(crew),
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    line.clear();
    Report::of(found)
}

/// How a run goes, on standard error: a line that is overwritten on a terminal, and one line after the other elsewhere.
struct ProgressLine {
    shown: bool,
    in_place: bool,
    bs: u32,
    last: u64,
    at: Instant,
}

impl ProgressLine {
    fn new(options: &LoadOptions) -> ProgressLine {
        let in_place = std::io::stderr().is_terminal();
        // JSON that goes to a program is for programs: whoever wants the line beside it says so.
        let for_programs = options.json && !std::io::stdout().is_terminal();
        let shown = options.progress || in_place && !for_programs;
        ProgressLine { shown, in_place, bs: options.bs, last: 0, at: Instant::now() }
    }

    fn show(&mut self, crew: &Crew) {
        if !self.shown {
            return;
        }
        let (doing, completed, errors) = crew.progress();
        let iops = completed.saturating_sub(self.last) as f64 / self.at.elapsed().as_secs_f64();
        (self.last, self.at) = (completed, Instant::now());
        let mib = iops * f64::from(self.bs) / f64::from(1 << 20);
        let (before, after) = if self.in_place { ("\r", "   ") } else { ("", "\n") };
        let word = doing.word();
        let text =
            format!("{before}{word:<10}  {completed} commands  {iops:.0} IOPS  {mib:.1} MiB/s  {errors} errors{after}");
        // Nobody is harmed by a progress line that does not appear.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }

    fn clear(&self) {
        if self.shown && self.in_place {
            let _ = std::io::stderr().write_all(b"\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in
            [("512", 512), ("4k", 4096), ("4K", 4096), ("1KiB", 1024), ("2m", 2 << 20), ("3G", 3 << 30)]
        {
            assert_eq!(parse_bytes(text), Ok(bytes));
        }
        for bad in ["", "k", "4 x", "-1", "1.5k", "99999999999999999999", "20000000000g"] {
            assert!(parse_bytes(bad).unwrap_err().contains("4096, 4k"), "{bad}");
        }
        assert_eq!(parse_bs("128k"), Ok(131_072));
        assert!(parse_bs("17m").unwrap_err().contains("512 to 16m") && parse_bs("511").is_err());
    }
}
