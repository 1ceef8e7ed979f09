//! `ringstone channel-bench`: what channels between processes cost, over TCP, rsockets and native verbs.
//!
//! In one process, two threads are the two ends: one serves, the other measures. With `--listen` and `--connect` the ends are
//! two processes, and what is done is to move checked data both ways over several channels.
//!
//! What a client asks of a server, at the front of each channel: three little-endian numbers of 8 bytes.
//! ```text
//! 1 echo:  size, 0       every message of `size` bytes comes back
//! 2 sink:  0, 0          after the end of the stream, its length comes back
//! 3 check: 0, total      both send the same `total` bytes, and check what they get
//! ```

mod native;

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use channel::{Channel, ChannelListener, Received, RsocketWires, SessionConfig, TcpWires, Wires};
use reactor::net::OsNetwork;
use reactor::time::OsClock;
use reactor::{Clock, Instant};
use serde_json::{Value, json};

use crate::say::say;

/// Options of `ringstone channel-bench`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// What to compare; everything that this machine has, unless given.
    #[arg(long = "transport", value_delimiter = ',', value_enum)]
    transports: Vec<Kind>,
    /// An address of this machine. For rsockets and verbs, one of a network interface with an RDMA device.
    #[arg(long, default_value = "127.0.0.1")]
    address: IpAddr,
    /// Message sizes in bytes.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 4096, 65536, 1 << 20],
        value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    sizes: Vec<u32>,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 1.0)]
    time: f64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Serve channels at this address until killed, for --connect in another process.
    #[arg(long, conflicts_with = "connect")]
    listen: Option<SocketAddr>,
    /// Move checked data both ways over channels to a process that listens here.
    #[arg(long)]
    connect: Option<SocketAddr>,
    /// With --connect: channels at once.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    channels: u16,
    /// With --connect: bytes each way, over all channels together.
    #[arg(long, default_value_t = 1 << 30)]
    bytes: u64,
    /// Silence of the other end after which it counts as dead, in milliseconds; with --listen and --connect.
    #[arg(long, default_value_t = 900)]
    silence_ms: u64,
}

/// What carries the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// TCP sockets.
    Tcp,
    /// rsockets, over an RDMA device.
    Rsocket,
    /// Verbs without a stream in between: RDMA WRITE for throughput, SEND for round trips.
    Verbs,
}

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
    let silence = Duration::from_millis(options.silence_ms);
    // Where so long a silence means nothing, so long a greeting does not either.
    let handshake = SessionConfig::default().handshake.max(silence);
    let config = SessionConfig { silence, handshake, ..SessionConfig::default() };
    match (options.listen, options.connect) {
        (Some(addr), _) => {
            let wires = wires(*options.transports.first().unwrap_or(&Kind::Tcp))?;
            let listener = ChannelListener::listen(&*wires, addr, 64, config).map_err(|e| format!("{addr}: {e}"))?;
            say!("listening on {}", listener.local_addr());
            let _ = std::io::stdout().flush();
            serve(listener, &AtomicBool::new(false), true)
        }
        (_, Some(addr)) => check(options, addr, config),
        _ => compare(options),
    }
}

fn wires(kind: Kind) -> Result<Box<dyn Wires>, String> {
    match kind {
        Kind::Tcp => Ok(Box::new(TcpWires::new(Arc::new(OsNetwork)))),
        Kind::Rsocket => Ok(Box::new(RsocketWires::new(verbs::RsocketOptions::default()).map_err(|e| e.to_string())?)),
        Kind::Verbs => Err("verbs is no stream: --listen and --connect take tcp or rsocket".into()),
    }
}

/// Waits, when it is dropped, for what was dropped before it to be closed.
struct Closing<'a>(&'a dyn Wires);

/// How long what was dropped may take to be closed: longer than a device tries to reach a peer that is gone.
const CLOSING: Duration = Duration::from_secs(30);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let left = self.0.wait_closed(CLOSING);
        if left > 0 {
            eprintln!(
                "ringstone: closing did not end within {CLOSING:?} for {left} of the connections, whose peers are gone: \
                 left to the kernel"
            );
        }
    }
}

/// What a side does when nothing has moved.
#[derive(Debug, Default)]
struct Idle {
    /// Rounds without anything, one after the other.
    rounds: u32,
    /// Whether it is about time spent, and not about the other end's: nobody else is given the processor for long.
    measured: bool,
}

impl Idle {
    /// Rounds after which a side that is not measured sleeps: software devices need a processor to move data.
    const PATIENCE: u32 = 20;
    const NAP: Duration = Duration::from_micros(50);

    fn measured() -> Idle {
        Idle { rounds: 0, measured: true }
    }

    /// After a round in which something moved, or nothing.
    fn after(&mut self, busy: bool) {
        self.rounds = if busy { 0 } else { self.rounds.saturating_add(1) };
        match self.rounds {
            0 => {}
            rounds if self.measured || rounds < Idle::PATIENCE => std::thread::yield_now(),
            _ => std::thread::sleep(Idle::NAP),
        }
    }
}

/// Byte `at` of the stream that a check sends.
fn pattern(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8
}

const REQUEST_BYTES: usize = 24;
const CHUNK_BYTES: usize = 64 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Echo { size: u64 },
    Sink,
    Check { total: u64 },
}

impl Request {
    fn bytes(self) -> [u8; REQUEST_BYTES] {
        let (kind, size, total) = match self {
            Request::Echo { size } => (1u64, size, 0),
            Request::Sink => (2, 0, 0),
            Request::Check { total } => (3, 0, total),
        };
        let mut bytes = [0; REQUEST_BYTES];
        for (chunk, number) in bytes.chunks_mut(8).zip([kind, size, total]) {
            chunk.copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    fn parse(bytes: &[u8; REQUEST_BYTES]) -> Option<Request> {
        let number = |n: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[8 * n + i]));
        match (number(0), number(1), number(2)) {
            (1, size, 0) if (1..=1 << 20).contains(&size) => Some(Request::Echo { size }),
            (2, 0, 0) => Some(Request::Sink),
            (3, 0, total) => Some(Request::Check { total }),
            _ => None,
        }
    }
}

/// Data of a check, on its way over one channel.
#[derive(Debug, Default)]
struct Duplex {
    total: u64,
    sent: u64,
    got: u64,
    ended: bool,
    chunk: Vec<u8>,
}

impl Duplex {
    fn new(total: u64) -> Duplex {
        Duplex { total, chunk: vec![0; CHUNK_BYTES], ..Duplex::default() }
    }

    /// Sends and takes what goes; whether anything moved. One direction may end long before the other.
    fn step(&mut self, channel: &mut Channel, now: Instant) -> Result<bool, String> {
        let gave = self.give(channel, now);
        Ok(self.take(channel, now)? || gave)
    }

    /// Sends what there is room for; whether anything moved.
    fn give(&mut self, channel: &mut Channel, now: Instant) -> bool {
        let before = self.sent;
        while self.sent < self.total {
            let n = (self.total - self.sent).min(CHUNK_BYTES as u64).min(channel.room() as u64) as usize;
            if n == 0 {
                break;
            }
            for (offset, byte) in self.chunk[..n].iter_mut().enumerate() {
                *byte = pattern(self.sent + offset as u64);
            }
            self.sent += channel.send(&self.chunk[..n], now) as u64;
        }
        if self.sent == self.total {
            channel.finish();
        }
        before != self.sent
    }

    /// Takes what is there, and compares it; whether anything moved.
    fn take(&mut self, channel: &mut Channel, now: Instant) -> Result<bool, String> {
        if self.ended {
            return Ok(false);
        }
        match channel.recv(&mut self.chunk, now).map_err(|e| e.to_string())? {
            Received::Bytes(n) => {
                let wrong = (0..n).find(|&offset| self.chunk[offset] != pattern(self.got + offset as u64));
                if let Some(offset) = wrong {
                    return Err(format!("byte {} is not what was sent", self.got + offset as u64));
                }
                self.got += n as u64;
                Ok(true)
            }
            Received::End if self.got == self.total => {
                self.ended = true;
                Ok(false)
            }
            Received::End => Err(format!("the stream ended after {} of {} bytes", self.got, self.total)),
            Received::Nothing => Ok(false),
        }
    }
}

/// One channel at the server.
struct Served {
    channel: Channel,
    request: Option<Request>,
    head: Vec<u8>,
    /// Echo: what came and has not been sent back.
    held: Vec<u8>,
    /// Echo: bytes of it that were. Sink: bytes that came.
    counted: u64,
    /// Sink: the count was sent.
    answered: bool,
    duplex: Duplex,
    buffer: Vec<u8>,
}

impl Served {
    fn new(channel: Channel) -> Served {
        Served {
            channel,
            request: None,
            head: Vec::new(),
            held: Vec::new(),
            counted: 0,
            answered: false,
            duplex: Duplex::default(),
            buffer: vec![0; 1 << 20],
        }
    }

    /// Whether anything moved; `None` once it is over.
    fn step(&mut self, now: Instant) -> Result<Option<bool>, String> {
        let mut busy = self.channel.poll(now).map_err(|e| e.to_string())?;
        if self.channel.is_done() {
            return Ok(None);
        }
        let Some(request) = self.request else {
            let mut bytes = [0; REQUEST_BYTES];
            let wanted = REQUEST_BYTES - self.head.len();
            match self.channel.recv(&mut bytes[..wanted], now).map_err(|e| e.to_string())? {
                Received::Bytes(n) => self.head.extend(&bytes[..n]),
                Received::Nothing => return Ok(Some(busy)),
                Received::End => return Err("the channel ended before it asked for anything".into()),
            }
            if let Some(head) = self.head.first_chunk() {
                let request = Request::parse(head).ok_or("an unknown request")?;
                if let Request::Check { total } = request {
                    self.duplex = Duplex::new(total);
                }
                self.request = Some(request);
            }
            return Ok(Some(true));
        };
        busy |= match request {
            Request::Check { .. } => self.duplex.step(&mut self.channel, now)?,
            Request::Echo { size } => self.echo(size as usize, now)?,
            Request::Sink => self.sink(now)?,
        };
        Ok(Some(busy))
    }

    fn echo(&mut self, size: usize, now: Instant) -> Result<bool, String> {
        let mut busy = false;
        if self.held.len() < size {
            let wanted = size - self.held.len();
            match self.channel.recv(&mut self.buffer[..wanted], now).map_err(|e| e.to_string())? {
                Received::Bytes(n) => {
                    self.held.extend_from_slice(&self.buffer[..n]);
                    busy = true;
                }
                Received::Nothing => {}
                Received::End => self.channel.finish(),
            }
        }
        if self.held.len() == size {
            // The last part of a message may have to wait for room.
            let sent = self.counted as usize;
            self.counted += self.channel.send(&self.held[sent..], now) as u64;
            busy |= self.counted as usize > sent;
            if self.counted as usize == size {
                self.held.clear();
                self.counted = 0;
            }
            self.channel.poll(now).map_err(|e| e.to_string())?;
        }
        Ok(busy)
    }

    fn sink(&mut self, now: Instant) -> Result<bool, String> {
        match self.channel.recv(&mut self.buffer, now).map_err(|e| e.to_string())? {
            Received::Bytes(n) => {
                self.counted += n as u64;
                Ok(true)
            }
            Received::Nothing => Ok(false),
            Received::End => {
                if !self.answered {
                    self.answered = true;
                    self.channel.send(&self.counted.to_le_bytes(), now);
                    self.channel.finish();
                }
                Ok(false)
            }
        }
    }
}

/// Serves until `stop`. A channel that fails is told of; if not `patient`, it is the end.
fn serve(mut listener: ChannelListener, stop: &AtomicBool, patient: bool) -> Result<(), String> {
    let clock = OsClock::default();
    let mut served: Vec<Served> = Vec::new();
    let mut idle = if patient { Idle::default() } else { Idle::measured() };
    while !stop.load(Ordering::Acquire) {
        let now = clock.now();
        let mut busy = false;
        match listener.accept(now) {
            Ok(Some(channel)) => {
                served.push(Served::new(channel));
                busy = true;
            }
            Ok(None) => {}
            Err(error) if patient => eprintln!("ringstone: a channel cannot be accepted: {error}"),
            Err(error) => return Err(error.to_string()),
        }
        let mut failed = None;
        served.retain_mut(|one| match one.step(now) {
            Ok(Some(moved)) => {
                busy |= moved;
                true
            }
            Ok(None) => false,
            Err(error) => {
                failed = Some(error);
                false
            }
        });
        match failed {
            Some(error) if patient => eprintln!("ringstone: a channel ended: {error}"),
            Some(error) => return Err(error),
            None => {}
        }
        idle.after(busy);
    }
    Ok(())
}

/// Moves checked data both ways.
fn check(options: &Options, addr: SocketAddr, config: SessionConfig) -> Result<(), String> {
    let kind = *options.transports.first().unwrap_or(&Kind::Tcp);
    let wires = wires(kind)?;
    let _closing = Closing(&*wires);
    let clock = OsClock::default();
    let began = clock.now();
    let count = u64::from(options.channels);
    let mut idle = Idle::default();
    let mut channels = Vec::new();
    for n in 0..count {
        let total = options.bytes / count + u64::from(n < options.bytes % count);
        let mut channel = Channel::connect(&*wires, addr, config, began).map_err(|e| format!("{addr}: {e}"))?;
        channel.send(&Request::Check { total }.bytes(), began);
        channels.push((channel, Duplex::new(total)));
    }
    let mut told = options.json;
    while !channels.iter().all(|(channel, duplex)| duplex.ended && channel.is_done()) {
        let now = clock.now();
        let mut busy = false;
        if !told && channels.iter().all(|(channel, _)| channel.is_open()) {
            told = true;
            say!("{count} channels are open");
            let _ = std::io::stdout().flush();
        }
        for (n, (channel, duplex)) in channels.iter_mut().enumerate() {
            if duplex.ended && channel.is_done() {
                continue;
            }
            busy |= channel.poll(now).map_err(|e| format!("channel {n}: {e}"))?;
            busy |= duplex.step(channel, now).map_err(|e| format!("channel {n}: {e}"))?;
        }
        idle.after(busy);
    }
    let got: u64 = channels.iter().map(|(_, duplex)| duplex.got).sum();
    let seconds = clock.now().since(began).as_secs_f64();
    if options.json {
        say!("{}", json!({ "transport": wires.name(), "channels": count, "checked_bytes": got, "seconds": seconds }));
    } else {
        say!("{}: {got} bytes each way over {count} channels, all right, in {seconds:.2} s", wires.name());
    }
    Ok(())
}

/// One size over one transport.
#[derive(Debug)]
struct Figures {
    size: u32,
    bytes_per_second: f64,
    /// `None` where one message cannot be so long.
    round_trip_us: Option<f64>,
}

fn compare(options: &Options) -> Result<(), String> {
    let asked = !options.transports.is_empty();
    let all = [Kind::Tcp, Kind::Rsocket, Kind::Verbs];
    let kinds = if asked { options.transports.clone() } else { all.to_vec() };
    let mut results: Vec<Value> = Vec::new();
    if !options.json {
        say!("{:<10} {:>10} {:>14} {:>16}", "", "bytes", "MiB/s", "round trip, us");
    }
    for kind in kinds {
        let name = format!("{kind:?}").to_lowercase();
        let figures = match kind {
            Kind::Verbs => native::measure(options),
            kind => wires(kind).and_then(|wires| streams(&*wires, options)),
        };
        match figures {
            Ok(figures) => {
                for one in figures {
                    let mib = one.bytes_per_second / f64::from(1 << 20);
                    if !options.json {
                        let round_trip = one.round_trip_us.map_or_else(|| "-".to_owned(), |us| format!("{us:.1}"));
                        say!("{name:<10} {:>10} {mib:>14.1} {round_trip:>16}", one.size);
                    }
                    results.push(json!({ "transport": name, "message_bytes": one.size,
                        "bytes_per_second": one.bytes_per_second, "round_trip_us": one.round_trip_us }));
                }
            }
            Err(error) if asked => return Err(format!("{name}: {error}")),
            Err(error) => {
                if !options.json {
                    say!("{name:<10} not measured: {error}");
                }
                results.push(json!({ "transport": name, "missing": error }));
            }
        }
    }
    if options.json {
        say!("{}", json!({ "results": results }));
    }
    Ok(())
}

/// Stops the other thread when this ends, in whatever way.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A stream transport, all sizes.
fn streams(wires: &dyn Wires, options: &Options) -> Result<Vec<Figures>, String> {
    // Two threads that both spin, on a machine that may be busy: nobody is dead only because it had no turn.
    let config =
        SessionConfig { silence: Duration::from_secs(60), handshake: Duration::from_secs(60), ..Default::default() };
    let any = SocketAddr::new(options.address, 0);
    let _closing = Closing(wires);
    let listener = ChannelListener::listen(wires, any, 16, config).map_err(|e| format!("{}: {e}", options.address))?;
    let addr = listener.local_addr();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(listener, &stop, false));
        let measured = (|| {
            let _stop = StopOnDrop(&stop);
            let connect = |now| Channel::connect(wires, addr, config, now).map_err(|e| e.to_string());
            let mut figures = Vec::new();
            for &size in &options.sizes {
                let round_trip_us = Some(round_trip(connect, size, options.time)?);
                let bytes_per_second = throughput(connect, size, options.time)?;
                figures.push(Figures { size, bytes_per_second, round_trip_us });
            }
            Ok(figures)
        })();
        // What the other side found is the cause of what this side saw.
        server.join().expect("the serving thread does not panic")?;
        measured
    })
}

/// Sends all of `bytes`, polling meanwhile.
fn send_all(channel: &mut Channel, clock: &OsClock, bytes: &[u8]) -> Result<(), String> {
    let mut sent = 0;
    while sent < bytes.len() {
        let now = clock.now();
        let n = channel.send(&bytes[sent..], now);
        sent += n;
        if !channel.poll(now).map_err(|e| e.to_string())? && n == 0 {
            std::thread::yield_now();
        }
    }
    Ok(())
}

/// Receives all of `bytes`, polling meanwhile.
fn recv_all(channel: &mut Channel, clock: &OsClock, bytes: &mut [u8]) -> Result<(), String> {
    let mut got = 0;
    while got < bytes.len() {
        let now = clock.now();
        let moved = channel.poll(now).map_err(|e| e.to_string())?;
        match channel.recv(&mut bytes[got..], now).map_err(|e| e.to_string())? {
            Received::Bytes(n) => got += n,
            Received::End => return Err("the channel ended too early".into()),
            Received::Nothing if moved => {}
            Received::Nothing => std::thread::yield_now(),
        }
    }
    Ok(())
}

/// Ends a channel in order: both sides say so.
fn finish(mut channel: Channel, clock: &OsClock) -> Result<(), String> {
    channel.finish();
    while !channel.is_done() {
        let now = clock.now();
        channel.poll(now).map_err(|e| e.to_string())?;
        if let Received::Bytes(n) = channel.recv(&mut [0; 64], now).map_err(|e| e.to_string())? {
            return Err(format!("{n} bytes came that nobody asked for"));
        }
        std::thread::yield_now();
    }
    Ok(())
}

/// Median time of a message there and back, in microseconds.
fn round_trip(connect: impl Fn(Instant) -> Result<Channel, String>, size: u32, seconds: f64) -> Result<f64, String> {
    let clock = OsClock::default();
    let mut channel = connect(clock.now())?;
    send_all(&mut channel, &clock, &Request::Echo { size: size.into() }.bytes())?;
    let mut message = vec![7; size as usize];
    let mut times: Vec<u64> = Vec::new();
    let began = clock.now();
    while times.is_empty() || clock.now().since(began).as_secs_f64() < seconds {
        let start = clock.now();
        send_all(&mut channel, &clock, &message)?;
        recv_all(&mut channel, &clock, &mut message)?;
        times.push(clock.now().nanos_since(start));
    }
    finish(channel, &clock)?;
    times.sort_unstable();
    Ok(times[times.len() / 2] as f64 / 1e3)
}

/// Bytes a second in one direction.
fn throughput(connect: impl Fn(Instant) -> Result<Channel, String>, size: u32, seconds: f64) -> Result<f64, String> {
    let clock = OsClock::default();
    let mut channel = connect(clock.now())?;
    send_all(&mut channel, &clock, &Request::Sink.bytes())?;
    let message = vec![7; size as usize];
    let (began, mut sent) = (clock.now(), 0u64);
    while clock.now().since(began).as_secs_f64() < seconds {
        send_all(&mut channel, &clock, &message)?;
        sent += u64::from(size);
    }
    channel.finish();
    let mut counted = [0; 8];
    recv_all(&mut channel, &clock, &mut counted)?;
    let elapsed = clock.now().since(began).as_secs_f64();
    finish(channel, &clock)?;
    match u64::from_le_bytes(counted) {
        counted if counted == sent => Ok(sent as f64 / elapsed),
        counted => Err(format!("{sent} bytes were sent and {counted} arrived")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_way() {
        for request in [Request::Echo { size: 64 }, Request::Sink, Request::Check { total: 1 << 40 }] {
            assert_eq!(Request::parse(&request.bytes()), Some(request));
        }
        assert_eq!(Request::parse(&[0; REQUEST_BYTES]), None);
        assert_eq!(Request::parse(&Request::Echo { size: 1 << 50 }.bytes()), None);
    }

    fn options() -> Options {
        Options {
            transports: vec![Kind::Tcp],
            address: IpAddr::from([127, 0, 0, 1]),
            sizes: vec![64, 100_000],
            time: 0.01,
            json: true,
            listen: None,
            connect: None,
            channels: 5,
            bytes: 3_000_001,
            silence_ms: 300_000,
        }
    }

    #[test]
    fn tcp_is_measured_everywhere() {
        let figures = streams(&*wires(Kind::Tcp).unwrap(), &options()).unwrap();
        assert_eq!(figures.len(), 2);
        assert!(figures.iter().all(|one| one.bytes_per_second > 0.0 && one.round_trip_us > Some(0.0)), "{figures:?}");
    }

    #[test]
    fn checked_data_goes_both_ways_over_several_channels() {
        let wires = wires(Kind::Tcp).unwrap();
        let config = SessionConfig { silence: Duration::from_secs(300), ..SessionConfig::default() };
        let listener = ChannelListener::listen(&*wires, "127.0.0.1:0".parse().unwrap(), 16, config).unwrap();
        let addr = listener.local_addr();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let server = scope.spawn(|| serve(listener, &stop, false));
            let checked = {
                let _stop = StopOnDrop(&stop);
                check(&options(), addr, config)
            };
            // The last acknowledgements may be on their way when this side is done: only then may the other one see an end.
            let _ = server.join().unwrap();
            checked.unwrap();
        });
    }

    #[test]
    fn what_is_left_of_one_direction_is_sent_when_the_other_has_ended() {
        let wires = wires(Kind::Tcp).unwrap();
        let config = SessionConfig { silence: Duration::from_secs(300), ..SessionConfig::default() };
        let mut listener = ChannelListener::listen(&*wires, "127.0.0.1:0".parse().unwrap(), 1, config).unwrap();
        let clock = OsClock::default();
        let mut near = Channel::connect(&*wires, listener.local_addr(), config, clock.now()).unwrap();
        // More than the channels and the host's sockets hold together.
        let total = 32 << 20;
        near.send(&Request::Check { total }.bytes(), clock.now());
        let mut from_near = Duplex::new(total);
        let mut far = loop {
            if let Some(channel) = listener.accept(clock.now()).unwrap() {
                break Served::new(channel);
            }
        };
        // The far end takes everything and gives nothing.
        while !far.duplex.ended {
            let now = clock.now();
            near.poll(now).unwrap();
            from_near.give(&mut near, now);
            if far.request.is_none() {
                far.step(now).unwrap();
            } else {
                far.channel.poll(now).unwrap();
                far.duplex.take(&mut far.channel, now).unwrap();
            }
        }
        assert_eq!((far.duplex.got, far.duplex.sent), (total, 0));
        let mut over = false;
        while !(over && from_near.ended && near.is_done()) {
            let now = clock.now();
            over = over || far.step(now).unwrap().is_none();
            if !near.is_done() {
                near.poll(now).unwrap();
            }
            from_near.step(&mut near, now).unwrap();
        }
        assert_eq!(from_near.got, total);
    }

    #[test]
    fn what_is_not_there_is_asked_for_in_words() {
        if verbs::devices().is_ok() {
            eprintln!("skipped: there is an RDMA device");
            return;
        }
        for kind in [Kind::Rsocket, Kind::Verbs] {
            let error = compare(&Options { transports: vec![kind], ..options() }).unwrap_err();
            assert!(error.contains("rdma link add") || error.contains("install the package"), "{error}");
        }
    }
}
