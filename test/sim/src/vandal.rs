//! Hosts that misbehave: each breaks one rule, on one connection, and then expects to be thrown out.

use std::cell::RefCell;
use std::io::{IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bdev::conformance::Rng;
use nvmf::tcp::wire_client::{self, WireClient};
use reactor::net::{Network, Stream};
use reactor::{Clock, Instant, Progress};

use crate::net::SimNetwork;
use crate::trace;
use crate::world::{Actor, WorldView};

/// Time that the target may take to close such a connection.
const PATIENCE: Duration = Duration::from_secs(180);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    /// Bytes without sense from the start.
    Garbage,
    /// Nothing at all.
    Silence,
    /// Half an ICReq, and then nothing.
    HalfIcReq,
    /// After ICReq bytes without sense.
    GarbageAfterIcReq,
    /// After ICReq nothing.
    SilenceAfterIcReq,
    /// A command before Connect.
    CommandFirst,
    /// Half a Connect.
    HalfConnect,
    /// A Connect that announces more data than fits, in a PDU of any length.
    SpoiledConnect,
    /// The end of the stream, at any moment.
    HalfClose,
}

const DEEDS: [Deed; 9] = [
    Deed::Garbage,
    Deed::Silence,
    Deed::HalfIcReq,
    Deed::GarbageAfterIcReq,
    Deed::SilenceAfterIcReq,
    Deed::CommandFirst,
    Deed::HalfConnect,
    Deed::SpoiledConnect,
    Deed::HalfClose,
];

/// A host that does nothing but mischief.
pub struct Vandal {
    network: SimNetwork,
    addr: SocketAddr,
    rng: Rng,
    left: u32,
    deed: Deed,
    stream: Option<Box<dyn Stream>>,
    out: Vec<u8>,
    since: Instant,
    leaves_at: Option<Instant>,
    shut: bool,
    /// The network may swallow the end of a connection.
    deaf: bool,
}

impl Vandal {
    /// One that does `count` deeds against the target at `addr`, one after another.
    pub fn new(view: &WorldView, addr: SocketAddr, count: u32, seed: u64) -> Rc<RefCell<Vandal>> {
        Rc::new(RefCell::new(Vandal {
            network: SimNetwork::new(&view.sim),
            addr,
            rng: Rng::new(seed),
            left: count,
            deed: Deed::Silence,
            stream: None,
            out: Vec::new(),
            since: Instant(0),
            leaves_at: None,
            shut: false,
            deaf: false,
        }))
    }

    /// From here on the network may swallow the end of a connection.
    pub fn goes_deaf(&mut self) {
        self.deaf = true;
    }

    /// Whether it has done everything.
    pub fn is_done(&self) -> bool {
        self.left == 0 && self.stream.is_none()
    }

    fn begin(&mut self, now: Instant) {
        self.left -= 1;
        self.deed = DEEDS[self.rng.below(DEEDS.len() as u64) as usize];
        self.since = now;
        self.shut = false;
        // Some wait to be thrown out, others are gone before.
        let leaves = self.rng.one_in(2).then(|| now + Duration::from_nanos(self.rng.below(3_000_000)));
        self.leaves_at = leaves;
        self.stream = Some(self.network.connect(self.addr).expect("the network takes connections"));
        trace::text(format!("vandal: {:?}", self.deed));
        let mut wire = WireClient::new();
        let icreq = wire.icreq(false, false, 0, 0);
        let connect = wire.capsule(&wire_client::connect(1, 0, 32, 0, false), &[0x41; 1024]);
        let mut noise = vec![0; 1 + self.rng.below(4000) as usize];
        self.rng.fill(&mut noise);
        self.out = match self.deed {
            Deed::Garbage => noise,
            Deed::Silence => Vec::new(),
            Deed::HalfIcReq => icreq[..1 + self.rng.below(127) as usize].to_vec(),
            Deed::GarbageAfterIcReq => [icreq, noise].concat(),
            Deed::SilenceAfterIcReq => icreq,
            Deed::CommandFirst => {
                let read = wire.capsule(&wire_client::read(1, 1, 0, 1, 4096), &[]);
                [icreq, read].concat()
            }
            Deed::HalfConnect => {
                let cut = 1 + self.rng.below(connect.len() as u64 - 1) as usize;
                [icreq, connect[..cut].to_vec()].concat()
            }
            Deed::SpoiledConnect => {
                let mut connect = connect;
                for _ in 0..1 + self.rng.below(6) {
                    let at = self.rng.below(80) as usize;
                    connect[at] = self.rng.next_u64() as u8;
                }
                [icreq, connect].concat()
            }
            Deed::HalfClose => [icreq, connect].concat()[..self.rng.below(1200) as usize].to_vec(),
        };
    }

    /// Whether the connection is over.
    fn push(&mut self, now: Instant) -> (bool, bool) {
        let Some(stream) = &mut self.stream else { return (false, false) };
        let mut busy = false;
        if !self.out.is_empty() {
            match stream.send(&[IoSlice::new(&self.out)]) {
                Ok(count) => {
                    self.out.drain(..count);
                    busy = true;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(_) => return (true, true),
            }
        } else if self.deed == Deed::HalfClose && !std::mem::replace(&mut self.shut, true) {
            stream.shutdown_write();
        }
        let mut bytes = [0; 4096];
        match stream.recv(&mut [IoSliceMut::new(&mut bytes)]) {
            Ok(0) => return (true, true),
            Ok(_) => busy = true,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return (true, true),
        }
        if now.since(self.since) >= PATIENCE {
            assert!(self.deaf, "the target bears {:?} for ever", self.deed);
            return (true, true);
        }
        (busy, self.leaves_at.is_some_and(|at| now >= at))
    }
}

impl Actor for Vandal {
    fn act(&mut self, world: &WorldView) -> Progress {
        let now = world.sim.now();
        if self.stream.is_none() {
            if self.left == 0 || now < self.since + Duration::from_micros(300) {
                return Progress::Idle;
            }
            self.begin(now);
            return Progress::Busy;
        }
        let (busy, over) = self.push(now);
        if over {
            self.stream = None;
            self.since = now;
        }
        Progress::from_busy(busy || over)
    }

    fn deadline(&self) -> Option<Instant> {
        if self.stream.is_some() {
            return Some(self.leaves_at.unwrap_or(self.since + PATIENCE));
        }
        (self.left > 0).then(|| self.since + Duration::from_micros(300))
    }

    fn describe(&self) -> String {
        format!("vandal: {:?}, {} deeds left, connected {}", self.deed, self.left, self.stream.is_some())
    }
}

impl std::fmt::Debug for Vandal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}
