//! The bytes of an NVMe/TCP load without the protocol: what this machine's loopback can carry between two cores.
//!
//! A pair of loops that spin on one TCP connection and move what reads and writes of a given size would move. Nothing is
//! parsed, looked up or checked, so no target can be faster on the same sockets.
//!
//! ```text
//! read:   72 bytes (capsule command)           ->    <- 24 bytes (C2HData header, success flag) + data
//! write:  72 bytes (capsule command) + data    ->    <- 24 bytes (capsule response)
//! ```
//! The answering side takes what one receive brings and answers up to `--batch` requests with one send. The asking side
//! sends as many requests as one receive brought answers, in one send.
//!
//! With `--distance` nothing is sent: it tells how long a cache line takes from one core to the other and back. A virtual
//! machine's cores may be of one cache or of two, and what is measured between them depends on it.
//!
//! With `--rate` the answering side sleeps in its receive until a request comes, of which there is one at a time, that often: how
//! long a request takes that finds its target asleep.

#![forbid(unsafe_code)]

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use rustix::net::{AddressFamily, SocketType, sockopt};
use serde_json::json;

/// A capsule of a command: common header and submission queue entry.
const REQUEST_BYTES: usize = 8 + 64;
/// A C2HData header or a response capsule.
const REPLY_BYTES: usize = 24;
/// How a stream ends whose other side is gone.
const ENDS: [ErrorKind; 3] = [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
const RECEIVE_BYTES: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    Read,
    Write,
}

/// Measures what the loopback can carry.
#[derive(Clone, Debug, Parser)]
struct Options {
    /// Which way the data goes.
    #[arg(long, value_enum, default_value_t = Mode::Read)]
    mode: Mode,
    /// Bytes of data in each request or reply.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=16 << 20))]
    bs: u32,
    /// Requests outstanding.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=4096))]
    qd: u32,
    /// Requests answered with one send at most.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=256))]
    batch: u32,
    /// MiB of memory that the data of reads comes from, and that of writes is copied to; 0: one block that stays in the cache.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=4096))]
    memory: u32,
    /// Requests a second, one at a time, to an answering side that sleeps; so --qd and --batch mean nothing.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: Option<u32>,
    /// Measure only how far the two cores are apart.
    #[arg(long)]
    distance: bool,
    /// Seconds.
    #[arg(long, default_value_t = 1.0)]
    time: f64,
    /// Core that answers.
    #[arg(long, default_value_t = 0)]
    target_core: usize,
    /// Core that asks.
    #[arg(long, default_value_t = 1)]
    load_core: usize,
}

fn pin(core: usize) -> io::Result<()> {
    use rustix::thread::{CpuSet, sched_setaffinity};
    let mut set = CpuSet::new();
    if core >= CpuSet::MAX_CPU {
        return Err(io::Error::other(format!("there is no core {core}")));
    }
    set.set(core);
    sched_setaffinity(None, &set).map_err(|errno| io::Error::other(format!("core {core} cannot be used: {errno}")))
}

/// `Ok(0)` where nothing is there, an error where the stream has ended.
fn receive(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    match stream.read(buffer) {
        Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        other => other,
    }
}

/// Sends everything, spinning where there is no room.
fn send(stream: &mut TcpStream, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    while !slices.is_empty() {
        match stream.write_vectored(slices) {
            Ok(sent) => IoSlice::advance_slices(&mut slices, sent),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                std::hint::spin_loop();
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Where the data comes from and goes to.
struct Memory {
    bytes: Vec<u8>,
    bs: usize,
    seed: u64,
}

impl Memory {
    fn new(options: &Options) -> Memory {
        let bs = options.bs as usize;
        // Written, so that every page is there.
        Memory { bytes: vec![0xa5; (options.memory as usize * (1 << 20)).max(bs)], bs, seed: 0x9e37_79b9_7f4a_7c15 }
    }

    /// A block drawn at random (xorshift).
    fn next(&mut self) -> usize {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        (self.seed % (self.bytes.len() / self.bs) as u64) as usize * self.bs
    }
}

/// Answers until the stream ends.
fn answer(mut stream: TcpStream, options: &Options, memory: &mut Memory) -> io::Result<()> {
    let data = if options.mode == Mode::Write { options.bs as usize } else { 0 };
    let request = REQUEST_BYTES + data;
    let mut buffer = vec![0; RECEIVE_BYTES];
    let mut pending = 0;
    let header = [0; REPLY_BYTES];
    loop {
        let received = match receive(&mut stream, &mut buffer) {
            Ok(received) => received,
            Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if received == 0 {
            std::hint::spin_loop();
            continue;
        }
        if data > 0 && options.memory > 0 {
            // As a device in memory would: the data moves once more.
            for chunk in buffer[..received].chunks(options.bs as usize) {
                let at = memory.next();
                memory.bytes[at..at + chunk.len()].copy_from_slice(chunk);
            }
        }
        pending += received;
        while pending >= request {
            let n = (pending / request).min(options.batch as usize);
            pending -= n * request;
            let places: Vec<_> = (0..n).map(|_| memory.next()).collect();
            let mut slices = Vec::with_capacity(2 * n);
            for at in places {
                slices.push(IoSlice::new(&header));
                if options.mode == Mode::Read {
                    slices.push(IoSlice::new(&memory.bytes[at..at + options.bs as usize]));
                }
            }
            send(&mut stream, &mut slices)?;
        }
    }
}

/// What the asking side found.
#[derive(Debug)]
struct Found {
    answers: u64,
    seconds: f64,
    /// The median of the time to an answer, where one request was asked at a time.
    median: Option<Duration>,
}

/// Asks `rate` times a second, one at a time.
fn ask_now_and_then(mut stream: TcpStream, options: &Options, rate: u32, stop: &AtomicBool) -> io::Result<Found> {
    let bs = options.bs as usize;
    let (out, reply) = match options.mode {
        Mode::Read => (REQUEST_BYTES, REPLY_BYTES + bs),
        Mode::Write => (REQUEST_BYTES + bs, REPLY_BYTES),
    };
    let (one, mut buffer) = (vec![0; out], vec![0; RECEIVE_BYTES]);
    let start = Instant::now();
    let mut due = start;
    let mut took = Vec::new();
    while took.is_empty() || !stop.load(Ordering::Relaxed) {
        due += Duration::from_secs(1) / rate;
        while Instant::now() < due {
            std::hint::spin_loop();
        }
        let asked = Instant::now();
        send(&mut stream, &mut [IoSlice::new(&one)])?;
        let mut received = 0;
        while received < reply {
            received += receive(&mut stream, &mut buffer)?;
        }
        took.push(asked.elapsed());
    }
    let seconds = start.elapsed().as_secs_f64();
    took.sort_unstable();
    Ok(Found { answers: took.len() as u64, seconds, median: Some(took[took.len() / 2]) })
}

/// Asks for the time given.
fn ask(mut stream: TcpStream, options: &Options, stop: &AtomicBool) -> io::Result<Found> {
    let bs = options.bs as usize;
    let (out, reply) = match options.mode {
        Mode::Read => (REQUEST_BYTES, REPLY_BYTES + bs),
        Mode::Write => (REQUEST_BYTES + bs, REPLY_BYTES),
    };
    let one = vec![0; out];
    let mut buffer = vec![0; RECEIVE_BYTES];
    let mut pending = 0;
    let mut asks = options.qd as usize;
    let start = Instant::now();
    let mut done = 0;
    loop {
        // At most as many slices as one call takes.
        while asks > 0 {
            let n = asks.min(256);
            asks -= n;
            let mut slices: Vec<_> = (0..n).map(|_| IoSlice::new(&one)).collect();
            send(&mut stream, &mut slices)?;
        }
        pending += receive(&mut stream, &mut buffer)?;
        asks = pending / reply;
        pending %= reply;
        done += asks as u64;
        if asks > 0 && stop.load(Ordering::Relaxed) {
            return Ok(Found { answers: done, seconds: start.elapsed().as_secs_f64(), median: None });
        }
        if asks == 0 {
            std::hint::spin_loop();
        }
    }
}

fn run(options: &Options) -> io::Result<Found> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    // As Ringstone's own within a machine, before there is a connection: a sender that paces itself would be no ceiling.
    let _ = sockopt::set_tcp_congestion(&listener, "reno");
    let asking = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    let _ = sockopt::set_tcp_congestion(&asking, "reno");
    rustix::net::connect(&asking, &listener.local_addr()?)?;
    let asking = TcpStream::from(asking);
    let (answering, _) = listener.accept()?;
    for stream in [&asking, &answering] {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
    }
    if options.rate.is_some() {
        answering.set_nonblocking(false)?;
    }
    let stop = AtomicBool::new(false);
    // Filled before the time starts.
    let mut memory = Memory::new(options);
    thread::scope(|scope| {
        let target = scope.spawn(|| {
            pin(options.target_core)?;
            match answer(answering, options, &mut memory) {
                // The other side has what it wanted, and left.
                Err(error) if ENDS.contains(&error.kind()) => Ok(()),
                other => other,
            }
        });
        let load = scope.spawn(|| {
            pin(options.load_core)?;
            match options.rate {
                Some(rate) => ask_now_and_then(asking, options, rate, &stop),
                None => ask(asking, options, &stop),
            }
        });
        thread::sleep(Duration::from_secs_f64(options.time.clamp(0.01, 3600.0)));
        stop.store(true, Ordering::Relaxed);
        let result = load.join().expect("the asking loop does not panic");
        let answered = target.join().expect("the answering loop does not panic");
        answered.and(result)
    })
}

/// How long a cache line takes from one core to the other and back: the least of some hundred rounds' means, since what
/// interrupts a round is no distance.
fn distance(options: &Options) -> io::Result<Duration> {
    const ROUNDS: u32 = 200;
    const ROUND: u32 = 50;
    /// Says that the other side could not begin.
    const GIVEN_UP: u32 = u32::MAX;
    let line = AtomicU32::new(0);
    let wait_for = |value: u32| loop {
        match line.load(Ordering::Acquire) {
            GIVEN_UP => return false,
            found if found == value => return true,
            _ => std::hint::spin_loop(),
        }
    };
    thread::scope(|scope| {
        let other = scope.spawn(|| {
            pin(options.load_core).inspect_err(|_| line.store(GIVEN_UP, Ordering::Release))?;
            for step in 0..ROUNDS * ROUND {
                if !wait_for(2 * step + 1) {
                    break;
                }
                line.store(2 * step + 2, Ordering::Release);
            }
            Ok(())
        });
        let mine = scope.spawn(|| {
            pin(options.target_core).inspect_err(|_| line.store(GIVEN_UP, Ordering::Release))?;
            let mut least = Duration::MAX;
            for round in 0..ROUNDS {
                let start = Instant::now();
                for step in round * ROUND..(round + 1) * ROUND {
                    // Not over the other's word that it cannot begin.
                    let told = line.compare_exchange(2 * step, 2 * step + 1, Ordering::AcqRel, Ordering::Relaxed);
                    if told.is_err() || !wait_for(2 * step + 2) {
                        return Ok(least);
                    }
                }
                least = least.min(start.elapsed() / ROUND);
            }
            Ok(least)
        });
        let least = mine.join().expect("the loop does not panic");
        other.join().expect("the loop does not panic").and(least)
    })
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.distance {
        return match distance(&options) {
            Ok(distance) => {
                println!("{}", json!({ "distance_ns": distance.as_nanos() as u64 }));
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("the distance cannot be measured: {error}");
                ExitCode::FAILURE
            }
        };
    }
    match run(&options) {
        Ok(found) => {
            let iops = found.answers as f64 / found.seconds;
            let median_us = found.median.map(|median| median.as_secs_f64() * 1e6);
            println!(
                "{}",
                json!({ "iops": iops, "bytes_per_s": iops * f64::from(options.bs), "median_us": median_us })
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("the ceiling cannot be measured: {error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carries(words: &[&str]) {
        let base = ["ceiling", "--time", "0.05", "--target-core", "0", "--load-core", "0"];
        let mut options = Options::parse_from(base.iter().chain(words));
        loop {
            let found = run(&options).unwrap();
            assert!(found.seconds > 0.0 && found.median.is_some() == options.rate.is_some(), "{words:?}");
            if found.answers >= u64::from(options.qd) || options.rate.is_some() {
                return;
            }
            // Others had the processor meanwhile.
            assert!(options.time < 10.0, "{words:?}: {}", found.answers);
            options.time *= 2.0;
        }
    }

    #[test]
    fn every_kind_of_load_is_carried() {
        for mode in ["read", "write"] {
            carries(&["--mode", mode]);
            carries(&["--mode", mode, "--qd", "1", "--batch", "1"]);
            carries(&["--mode", mode, "--bs", "131072", "--qd", "4", "--memory", "4"]);
            carries(&["--mode", mode, "--rate", "100"]);
        }
    }

    #[test]
    fn two_cores_are_some_way_apart() {
        // On one core the threads would wait for each other's time slices.
        if thread::available_parallelism().is_ok_and(|cores| cores.get() > 1) {
            let options = Options::parse_from(["ceiling", "--distance"]);
            assert!(distance(&options).unwrap() > Duration::ZERO);
        }
        for core in ["--load-core", "--target-core"] {
            let options = Options::parse_from(["ceiling", "--distance", core, "100000"]);
            assert!(distance(&options).unwrap_err().to_string().contains("100000"));
        }
    }

    #[test]
    fn a_core_that_there_is_not() {
        let options = Options::parse_from(["ceiling", "--time", "0.01", "--load-core", "100000"]);
        assert!(run(&options).unwrap_err().to_string().contains("100000"));
    }
}
