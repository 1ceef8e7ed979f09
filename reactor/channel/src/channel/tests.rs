//! Channels over a stream made of two queues that give and take odd amounts, and over the loopback interface.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use reactor::net::OsNetwork;
use reactor::{Clock, time::OsClock};

use super::*;
use crate::wire::TcpWires;

/// One direction.
#[derive(Default)]
struct Pipe {
    bytes: VecDeque<u8>,
    closed: bool,
}

const PIPE_BYTES: usize = 10_000;

/// A stream whose amounts come from a sequence, and which refuses now and then.
struct TestWire {
    out: Arc<Mutex<Pipe>>,
    back: Arc<Mutex<Pipe>>,
    draws: u32,
}

impl TestWire {
    fn pair(seed: u32) -> (Channel, Channel) {
        TestWire::pair_with(seed, SessionConfig::default(), SessionConfig::default())
    }

    fn pair_with(seed: u32, a: SessionConfig, b: SessionConfig) -> (Channel, Channel) {
        let (x, y) = (Arc::<Mutex<Pipe>>::default(), Arc::<Mutex<Pipe>>::default());
        let one = TestWire { out: Arc::clone(&x), back: Arc::clone(&y), draws: seed };
        let two = TestWire { out: y, back: x, draws: !seed };
        (Channel::over(Box::new(one), a, Instant(0)), Channel::over(Box::new(two), b, Instant(0)))
    }

    fn draw(&mut self, max: usize) -> io::Result<usize> {
        self.draws = self.draws.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        match (self.draws >> 16) as usize % (max + 1) {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            n => Ok(n),
        }
    }
}

impl Wire for TestWire {
    fn poll(&mut self, _write: bool) -> io::Result<()> {
        Ok(())
    }
    fn is_connected(&self) -> bool {
        true
    }
    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let (len, closed) = {
            let pipe = self.back.lock().unwrap();
            (pipe.bytes.len(), pipe.closed)
        };
        if len == 0 {
            return if closed { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
        }
        let n = self.draw(len.min(bytes.len()))?;
        for (byte, from) in bytes.iter_mut().zip(self.back.lock().unwrap().bytes.drain(..n)) {
            *byte = from;
        }
        Ok(n)
    }
    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = PIPE_BYTES - self.out.lock().unwrap().bytes.len();
        let n = self.draw(room.min(bytes.len()))?;
        self.out.lock().unwrap().bytes.extend(&bytes[..n]);
        Ok(n)
    }
    fn source(&self) -> Option<Source> {
        None
    }
    fn ready(&mut self, _ready: Ready) {}
    fn set_watched(&mut self) {}
    fn has_input(&self) -> bool {
        true
    }
    fn has_room(&self) -> bool {
        true
    }
    fn peer_addr(&self) -> SocketAddr {
        SocketAddr::from(([0; 4], 1))
    }
    fn local_addr(&self) -> SocketAddr {
        SocketAddr::from(([0; 4], 2))
    }
}

impl Drop for TestWire {
    fn drop(&mut self) {
        self.out.lock().unwrap().closed = true;
    }
}

/// Byte `at` of a stream.
fn pattern(at: usize) -> u8 {
    (at.wrapping_mul(0x9e37_79b1) >> 11) as u8
}

/// One side of a test: sends `total` bytes of the pattern and checks what comes.
struct Side {
    channel: Channel,
    total: usize,
    sent: usize,
    got: usize,
    ended: bool,
}

impl Side {
    fn new(channel: Channel, total: usize) -> Side {
        Side { channel, total, sent: 0, got: 0, ended: false }
    }

    fn step(&mut self, chunk: usize, now: Instant) {
        let bytes: Vec<u8> = (self.sent..self.total.min(self.sent + chunk)).map(pattern).collect();
        self.sent += self.channel.send(&bytes, now);
        assert!(self.channel.unsent_bytes() <= OUTBOX_BYTES);
        if self.sent == self.total {
            self.channel.finish();
        }
        self.channel.poll(now).unwrap();
        let mut bytes = vec![0; chunk];
        match self.channel.recv(&mut bytes, now).unwrap() {
            Received::Bytes(n) => {
                for (offset, byte) in bytes[..n].iter().enumerate() {
                    assert_eq!(*byte, pattern(self.got + offset), "byte {}", self.got + offset);
                }
                self.got += n;
            }
            Received::End => self.ended = true,
            Received::Nothing => {}
        }
    }

    fn done(&self) -> bool {
        self.ended && self.channel.is_done()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    /// Whatever amounts the stream and the owners choose, the same bytes arrive in order, and then the end.
    #[test]
    fn bytes_arrive_in_order(
        seed in any::<u32>(), a in 0usize..60_000, b in 0usize..60_000, chunk in 1usize..9000, other in 1usize..9000,
    ) {
        let (one, two) = TestWire::pair(seed);
        let (mut one, mut two) = (Side::new(one, a), Side::new(two, b));
        let mut now = Instant(0);
        while !(one.done() && two.done()) {
            now = now + Duration::from_millis(10);
            one.step(chunk, now);
            two.step(other, now);
        }
        prop_assert_eq!((one.got, two.got), (b, a));
    }
}

/// Polls both until a condition holds, a millisecond of virtual time each.
fn run(now: &mut Instant, one: &mut Channel, two: &mut Channel, mut until: impl FnMut(&Channel, &Channel) -> bool) {
    while !until(one, two) {
        *now = *now + Duration::from_millis(1);
        one.poll(*now).unwrap();
        two.poll(*now).unwrap();
    }
}

#[test]
fn a_full_outbox_takes_no_more_and_a_slow_owner_is_not_a_dead_peer() {
    let (mut one, mut two) = TestWire::pair(7);
    let mut now = Instant(0);
    let bytes = vec![1; 64 * 1024];
    let mut taken = 0;
    let started = now;
    // Nobody takes what arrives, for much longer than the silence that is allowed.
    while now.since(started) < Duration::from_secs(10) {
        taken += one.send(&bytes, now);
        now = now + Duration::from_millis(1);
        one.poll(now).unwrap();
        two.poll(now).unwrap();
        assert!(one.unsent_bytes() <= OUTBOX_BYTES);
    }
    assert!(taken <= OUTBOX_BYTES + INBOX_BYTES + PIPE_BYTES, "{taken} bytes vanished into no buffer");
    assert!(one.room() < HEADER_BYTES);
    // Once somebody does, all of it arrives.
    let (mut got, mut out) = (0, vec![0; 100_000]);
    one.finish();
    loop {
        now = now + Duration::from_millis(1);
        one.poll(now).unwrap();
        two.poll(now).unwrap();
        match two.recv(&mut out, now).unwrap() {
            Received::Bytes(n) => got += n,
            Received::Nothing => {}
            Received::End => break,
        }
    }
    assert_eq!(got, taken);
}

#[test]
fn idle_channels_live_and_a_peer_that_stops_is_dead_within_a_second() {
    let (mut one, mut two) = TestWire::pair(11);
    let mut now = Instant(0);
    run(&mut now, &mut one, &mut two, |one, two| one.is_open() && two.is_open());
    let until = now + Duration::from_secs(60);
    while now < until {
        now = now + Duration::from_millis(50);
        one.poll(now).unwrap();
        two.poll(now).unwrap();
    }
    let stopped = now;
    let fault = loop {
        now = now + Duration::from_millis(10);
        if let Err(fault) = one.poll(now) {
            break fault;
        }
    };
    assert!(matches!(fault, Fault::Silent(_)), "{fault}");
    assert!(now.since(stopped) <= Duration::from_secs(1), "{:?}", now.since(stopped));
}

#[test]
fn a_peer_that_stops_inside_a_header_is_dead_within_a_second() {
    for cut in 1..HEADER_BYTES {
        let (out, back) = (Arc::<Mutex<Pipe>>::default(), Arc::<Mutex<Pipe>>::default());
        let wire = TestWire { out, back: Arc::clone(&back), draws: 5 };
        let mut one = Channel::over(Box::new(wire), SessionConfig::default(), Instant(0));
        let mut peer = Session::new(SessionConfig::default(), Instant(0));
        let header = peer.data_header(10, Instant(0));
        let said = [&peer.hello()[..], &header, b"last words", &header[..cut]].concat();
        back.lock().unwrap().bytes.extend(said);
        let (mut now, mut got) = (Instant(0), Vec::new());
        let fault = loop {
            now = now + Duration::from_millis(10);
            assert!(now < Instant(0) + Duration::from_secs(2), "{cut} bytes of a header are taken for life");
            if let Err(fault) = one.poll(now) {
                break fault;
            }
            let mut out = [0; 64];
            if let Received::Bytes(n) = one.recv(&mut out, now).unwrap() {
                got.extend_from_slice(&out[..n]);
            }
        };
        assert!(matches!(fault, Fault::Silent(_)), "{fault}");
        assert_eq!(got, b"last words");
    }
}

#[test]
fn a_peer_that_vanishes_in_the_middle_is_no_end() {
    let (mut one, mut two) = TestWire::pair(3);
    let mut now = Instant(0);
    run(&mut now, &mut one, &mut two, |one, two| one.is_open() && two.is_open());
    two.send(b"last words", now);
    run(&mut now, &mut one, &mut two, |_, two| two.unsent_bytes() == 0);
    drop(two);
    let mut out = [0; 64];
    let mut got = Vec::new();
    let fault = loop {
        now = now + Duration::from_millis(1);
        let _ = one.poll(now);
        match one.recv(&mut out, now) {
            Ok(Received::Bytes(n)) => got.extend_from_slice(&out[..n]),
            Ok(Received::Nothing) => {}
            Ok(Received::End) => panic!("nobody said so"),
            Err(fault) => break fault,
        }
    };
    assert_eq!((got.as_slice(), fault), (&b"last words"[..], Fault::Vanished));
}

/// The stream's end is seen long before the owner has taken what came before it.
#[test]
fn an_end_behind_unread_bytes_is_no_fault() {
    for owed in [0, 4, 1000] {
        let (mut one, mut two) = TestWire::pair(13);
        let mut now = Instant(0);
        run(&mut now, &mut one, &mut two, |one, two| one.is_open() && two.is_open());
        two.send(&vec![5; owed], now);
        two.finish();
        one.finish();
        run(&mut now, &mut one, &mut two, |_, two| two.is_done());
        drop(two);
        for _ in 0..3000 {
            now = now + Duration::from_millis(1);
            one.poll(now).unwrap();
        }
        let (mut got, mut out) = (0, [0; 300]);
        loop {
            match one.recv(&mut out, now).unwrap() {
                Received::Bytes(n) => got += n,
                Received::End => break,
                Received::Nothing => panic!("all of it is there"),
            }
        }
        assert_eq!(got, owed);
        assert!(one.is_done());
    }
}

#[test]
fn versions_without_an_overlap_are_named_by_both() {
    let with = |versions| SessionConfig { versions, ..SessionConfig::default() };
    let (mut one, mut two) = TestWire::pair_with(5, with((1, 1)), with((2, 4)));
    let mut faults = [None, None];
    let mut now = Instant(0);
    while faults.iter().any(Option::is_none) {
        now = now + Duration::from_millis(1);
        for (fault, channel) in faults.iter_mut().zip([&mut one, &mut two]) {
            *fault = channel.poll(now).err().or(fault.take());
        }
    }
    assert_eq!(faults[0], Some(Fault::Version { ours: (1, 1), theirs: (2, 4) }));
    assert_eq!(faults[1], Some(Fault::Version { ours: (2, 4), theirs: (1, 1) }));
}

/// The same over the loopback interface, several channels at once.
#[test]
fn channels_over_tcp_carry_data_both_ways() {
    let clock = OsClock::default();
    let wires = TcpWires::new(Arc::new(OsNetwork));
    // A loaded machine may leave this thread alone for long.
    let config =
        SessionConfig { silence: Duration::from_secs(300), handshake: Duration::from_secs(300), ..Default::default() };
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let mut listener = ChannelListener::listen(&wires, any, 16, config).unwrap();
    let addr = listener.local_addr();
    let mut sides: Vec<Side> = (0..4)
        .map(|i| Side::new(Channel::connect(&wires, addr, config, clock.now()).unwrap(), 3_000_000 + i))
        .collect();
    while sides.len() < 8 {
        if let Some(channel) = listener.accept(clock.now()).unwrap() {
            sides.push(Side::new(channel, 2_000_000));
        }
    }
    while !sides.iter().all(Side::done) {
        for side in &mut sides {
            side.step(100_000, clock.now());
        }
    }
    assert!(sides[..4].iter().all(|side| side.got == 2_000_000));
    assert_eq!(sides[4..].iter().map(|side| side.got).sum::<usize>(), 12_000_006);
}

#[test]
fn what_is_missing_for_rsockets_is_said() {
    match crate::wire::RsocketWires::new(verbs::RsocketOptions::default()) {
        Ok(_) => eprintln!("skipped: there is an RDMA device"),
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("rdma link add") || text.contains("install the package"), "{text}");
        }
    }
}
