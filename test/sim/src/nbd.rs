//! NBD clients: they write stamps, read them back and check; they vanish, stop reading, say half of what they began.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bdev::conformance::Rng;
use nbd::wire::{self, Reader, Request, chunk, command, command_flag};
use reactor::net::{Address, Network, Stream};
use reactor::{Clock, Instant, Progress};

use crate::model::{self, Model, ReadToken, Stamp, WriteToken};
use crate::net::SimNetwork;
use crate::trace;
use crate::world::{Actor, WorldView};

/// Time that the server may take to close a connection that stalls.
const PATIENCE: Duration = Duration::from_secs(180);
/// Time until a client that was turned away comes again.
const COMES_AGAIN: Duration = Duration::from_millis(2);

/// What clients of one export share.
#[derive(Debug)]
pub struct Shared {
    /// What a read may find.
    pub model: Model,
    /// Requests that have succeeded.
    pub succeeded: u64,
    /// Connections end, and requests are refused, without its being anybody's fault.
    pub ends: bool,
}

/// As the clients hold it.
pub type SharedExport = Rc<RefCell<Shared>>;

/// How a client is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Works until it has done its part, and says goodbye.
    Works,
    /// Connects and says nothing.
    Silent,
    /// Stops in the middle of a request.
    Stops,
    /// Asks for much, and reads nothing.
    Deaf,
}

#[derive(Clone, Copy, Debug)]
enum Asked {
    Write { token: WriteToken, lba: u64, blocks: u64, fua: bool },
    Read { token: ReadToken, lba: u64 },
    Flush { began: u64 },
    Other,
}

struct Outstanding {
    asked: Asked,
    data: Vec<u8>,
    error: Option<u32>,
}

/// One client, on one connection at a time.
pub struct NbdClient {
    network: SimNetwork,
    socket: PathBuf,
    shared: SharedExport,
    rng: Rng,
    manner: Manner,
    /// Requests that it will still make.
    left: u64,
    depth: usize,
    structured: bool,
    stream: Option<Box<dyn Stream>>,
    ready: bool,
    out: Vec<u8>,
    input: Vec<u8>,
    next_cookie: u64,
    outstanding: BTreeMap<u64, Outstanding>,
    said_goodbye: bool,
    stalled: bool,
    since: Instant,
    connected: bool,
}

impl NbdClient {
    /// A client of the export at `socket` that makes `requests` requests.
    pub fn new(
        view: &WorldView,
        socket: &Path,
        shared: &SharedExport,
        manner: Manner,
        requests: u64,
        seed: u64,
    ) -> Rc<RefCell<NbdClient>> {
        let mut rng = Rng::new(seed);
        Rc::new(RefCell::new(NbdClient {
            network: SimNetwork::new(&view.sim),
            socket: socket.to_owned(),
            shared: Rc::clone(shared),
            manner,
            left: requests,
            depth: 1 + rng.below(40) as usize,
            structured: !rng.one_in(3),
            rng,
            stream: None,
            ready: false,
            out: Vec::new(),
            input: Vec::new(),
            next_cookie: 0,
            outstanding: BTreeMap::new(),
            said_goodbye: false,
            stalled: false,
            since: Instant(0),
            connected: false,
        }))
    }

    /// Whether it has done its part and is gone.
    pub fn is_done(&self) -> bool {
        self.left == 0 && self.stream.is_none()
    }

    fn connect(&mut self, now: Instant) {
        self.stream = self.network.connect_to(&Address::Unix(self.socket.clone())).ok();
        (self.ready, self.said_goodbye, self.stalled, self.since) = (false, false, false, now);
        self.input.clear();
        self.out.clear();
        if self.manner == Manner::Silent {
            return;
        }
        self.out.extend(3u32.to_be_bytes());
        if self.structured {
            self.option(wire::option::STRUCTURED_REPLY, &[]);
        }
        self.option(wire::option::GO, b"\0\0\0\0\0\x01\0\x03");
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        self.out.extend(wire::IHAVEOPT.to_be_bytes());
        self.out.extend(option.to_be_bytes());
        self.out.extend((data.len() as u32).to_be_bytes());
        self.out.extend(data);
    }

    /// The connection is over: what becomes of what was asked, nobody will ever know.
    fn disconnect(&mut self, now: Instant) {
        if self.manner == Manner::Works && self.ready {
            let excused = self.shared.borrow().ends || self.said_goodbye && self.outstanding.is_empty();
            assert!(excused, "a client that works is thrown out");
        }
        let mut shared = self.shared.borrow_mut();
        for (_, Outstanding { asked, .. }) in std::mem::take(&mut self.outstanding) {
            match asked {
                Asked::Write { token, lba, blocks, .. } => shared.model.lost(token, lba, blocks),
                Asked::Read { token, .. } => shared.model.read_lost(token),
                Asked::Flush { .. } | Asked::Other => {}
            }
        }
        trace::text(format!("nbd client: over, {} left", self.left));
        self.stream = None;
        self.since = now;
        if self.said_goodbye || self.manner != Manner::Works {
            self.left = 0;
        }
    }

    fn ask(&mut self) {
        let mut shared = self.shared.borrow_mut();
        let model = &mut shared.model;
        let block = model.block_size() as u64;
        let most = if self.rng.one_in(4) { 300_000 / block } else { 8 }.min(model.len());
        let blocks = 1 + self.rng.below(most);
        let lba = self.rng.below(model.len() - blocks + 1);
        let fua = self.rng.one_in(4);
        let flag = if fua { command_flag::FUA } else { 0 };
        let mut data = Vec::new();
        let (command, flags, asked) = match self.rng.below(10) {
            0..=3 => {
                let stamp: Stamp = model.stamp();
                data = model::payload(stamp, lba, blocks, block as usize);
                (command::WRITE, flag, Asked::Write { token: model.write(stamp, lba, blocks), lba, blocks, fua })
            }
            4 => {
                let token = model.write(0, lba, blocks);
                (command::WRITE_ZEROES, flag, Asked::Write { token, lba, blocks, fua })
            }
            5 => (command::FLUSH, 0, Asked::Flush { began: model.flush() }),
            6 if self.rng.one_in(3) => (99, 0, Asked::Other),
            _ => {
                let whole = self.structured && self.rng.one_in(4);
                let flags = if whole { command_flag::DF } else { 0 };
                (command::READ, flags, Asked::Read { token: model.read(), lba })
            }
        };
        let (offset, length) = if command == command::FLUSH { (0, 0) } else { (lba * block, (blocks * block) as u32) };
        self.next_cookie += 1;
        let request = Request { flags, command, cookie: self.next_cookie, offset, length };
        self.out.extend(request.to_bytes());
        self.out.extend(data);
        self.outstanding.insert(self.next_cookie, Outstanding { asked, data: vec![0; length as usize], error: None });
        self.left -= 1;
    }

    /// Takes one whole reply off the input; `None` when it is not there.
    fn reply(&mut self) -> Option<()> {
        let input = std::mem::take(&mut self.input);
        let mut reader = Reader(&input);
        let whole = self.parse(&mut reader);
        let taken = if whole.is_some() { input.len() - reader.0.len() } else { 0 };
        self.input = input;
        self.input.drain(..taken);
        whole
    }

    fn parse(&mut self, reader: &mut Reader<'_>) -> Option<()> {
        if !self.ready {
            if reader.0.starts_with(b"NBDM") {
                return reader.take(18).map(drop);
            }
            let (_, option, kind) = (reader.u64()?, reader.u32()?, reader.u32()?);
            reader.string()?;
            assert!(kind < 1 << 31, "option {option} is refused: {kind:#x}");
            self.ready = option == wire::option::GO && kind == wire::reply::ACK;
            return Some(());
        }
        if reader.u32()? == wire::SIMPLE_REPLY_MAGIC {
            let (error, cookie) = (reader.u32()?, reader.u64()?);
            let waits = self.outstanding.get_mut(&cookie).expect("a reply is to a request");
            if error != 0 {
                waits.error = Some(error);
            } else if matches!(waits.asked, Asked::Read { .. }) {
                let len = waits.data.len();
                waits.data.copy_from_slice(reader.take(len)?);
            }
            self.answered(cookie);
            return Some(());
        }
        let (flags, kind, cookie) = (reader.u16()?, reader.u16()?, reader.u64()?);
        let mut payload = Reader(reader.string()?);
        let block = self.shared.borrow().model.block_size() as u64;
        let waits = self.outstanding.get_mut(&cookie).expect("a chunk is of a reply to a request");
        match kind {
            chunk::OFFSET_DATA => {
                let Asked::Read { lba, .. } = waits.asked else { panic!("data for no read") };
                let at = (payload.u64()? - lba * block) as usize;
                waits.data[at..at + payload.0.len()].copy_from_slice(payload.0);
            }
            chunk::ERROR | chunk::ERROR_OFFSET => waits.error = payload.u32(),
            _ => {}
        }
        if flags & chunk::DONE != 0 {
            self.answered(cookie);
        }
        Some(())
    }

    fn answered(&mut self, cookie: u64) {
        let Outstanding { asked, data, error } = self.outstanding.remove(&cookie).expect("it was just seen");
        let mut shared = self.shared.borrow_mut();
        if matches!(asked, Asked::Other) {
            assert!(matches!(error, Some(22 | 108)), "nobody knows such a request: {error:?}");
            return;
        }
        if let Some(error) = error {
            assert!(shared.ends && (error == 108 || error == 5), "{asked:?} failed: {error}");
            match asked {
                Asked::Write { token, lba, blocks, .. } => shared.model.lost(token, lba, blocks),
                Asked::Read { token, .. } => shared.model.read_lost(token),
                _ => {}
            }
            return;
        }
        shared.succeeded += 1;
        match asked {
            Asked::Write { token, lba, blocks, fua } => shared.model.wrote(token, lba, blocks, fua),
            Asked::Read { token, lba, .. } => {
                shared.model.was_read(token, lba, &data).unwrap_or_else(|what| panic!("{what}"));
            }
            Asked::Flush { began } => shared.model.flushed(began),
            Asked::Other => {}
        }
    }

    /// Makes requests as its manner is.
    fn work(&mut self) {
        match self.manner {
            Manner::Works => {
                while self.left > 0 && self.outstanding.len() < self.depth && self.out.len() < 400_000 {
                    self.ask();
                }
                if self.left == 0 && self.outstanding.is_empty() && !self.said_goodbye {
                    let goodbye = Request { flags: 0, command: command::DISC, cookie: 0, offset: 0, length: 0 };
                    self.out.extend(goodbye.to_bytes());
                    self.said_goodbye = true;
                }
            }
            Manner::Silent => {}
            Manner::Stops if !self.stalled => {
                self.stalled = true;
                let request = Request { flags: 0, command: command::WRITE, cookie: 1, offset: 0, length: 1 << 20 };
                // Never whole, so nothing of the last piece may be written; the pieces before it may.
                let cut = self.rng.below(28) as usize;
                self.out.extend(&request.to_bytes()[..cut + 1]);
            }
            Manner::Deaf if !self.stalled => {
                self.stalled = true;
                let length =
                    (self.shared.borrow().model.len() as u32).min(64) * self.shared.borrow().model.block_size() as u32;
                for cookie in 0..100 {
                    let request = Request { flags: 0, command: command::READ, cookie, offset: 0, length };
                    self.out.extend(request.to_bytes());
                }
            }
            Manner::Stops | Manner::Deaf => {}
        }
    }

    /// Sends and receives; whether something moved, and whether the connection is over.
    fn exchange(&mut self, now: Instant) -> (bool, bool) {
        let Some(stream) = &mut self.stream else { return (false, false) };
        let mut busy = false;
        if !self.out.is_empty() {
            let most = self.out.len().min(1 + self.rng.below(100_000) as usize);
            match stream.send(&[IoSlice::new(&self.out[..most])]) {
                Ok(count) => {
                    self.out.drain(..count);
                    busy = true;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return (true, true),
            }
        }
        if !(self.manner == Manner::Deaf && self.stalled) {
            let mut bytes = [0; 16_384];
            match stream.recv(&mut [IoSliceMut::new(&mut bytes)]) {
                Ok(0) => return (true, true),
                Ok(count) => {
                    self.input.extend(&bytes[..count]);
                    busy = true;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return (true, true),
            }
        }
        if self.manner == Manner::Deaf && self.stalled && now.since(self.since) >= PATIENCE / 2 {
            // It has no other way to see that it was thrown out.
            let gone = stream.send(&[IoSlice::new(&[0])]).is_err_and(|error| error.kind() != ErrorKind::WouldBlock);
            assert!(gone || now.since(self.since) < PATIENCE, "a client that reads nothing is borne for ever");
            return (false, gone);
        }
        let waits_long = self.manner != Manner::Works && now.since(self.since) >= PATIENCE;
        assert!(!waits_long, "a client that is {:?} is borne for ever", self.manner);
        (busy, false)
    }
}

impl Actor for NbdClient {
    fn act(&mut self, world: &WorldView) -> Progress {
        let now = world.sim.now();
        if self.stream.is_none() {
            if self.left == 0 || self.connected && now < self.since + COMES_AGAIN {
                return Progress::Idle;
            }
            self.connected = true;
            self.connect(now);
            return Progress::Busy;
        }
        let (mut busy, over) = self.exchange(now);
        while self.reply().is_some() {
            busy = true;
        }
        if over {
            self.disconnect(now);
            return Progress::Busy;
        }
        if self.ready && self.out.is_empty() {
            let before = (self.out.len(), self.outstanding.len());
            self.work();
            busy |= before != (self.out.len(), self.outstanding.len());
        }
        Progress::from_busy(busy)
    }

    fn deadline(&self) -> Option<Instant> {
        if self.stream.is_none() {
            return (self.left > 0).then(|| self.since + COMES_AGAIN);
        }
        match self.manner {
            Manner::Works => None,
            Manner::Deaf if self.stalled => Some(self.since + PATIENCE / 2),
            _ => Some(self.since + PATIENCE),
        }
    }

    fn describe(&self) -> String {
        format!(
            "nbd client: {:?}, {} left, {} outstanding, connected {}, ready {}, {} bytes to send",
            self.manner,
            self.left,
            self.outstanding.len(),
            self.stream.is_some(),
            self.ready,
            self.out.len()
        )
    }
}

impl std::fmt::Debug for NbdClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}
