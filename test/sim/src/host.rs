//! Hosts: actors that speak NVMe/TCP or NVMe/RDMA as a host does, and check what they are told.
//!
//! ```text
//! Away -> admin queue: ICReq, Connect, CC.EN, CSTS.RDY, Identify, features, events -> I/O queues -> Running -> Done
//!   ^------------------------- the connection ends, or the host leaves ----------------------------'
//! ```
//! All hosts of a world share one [`Namespaces`]: the models of the namespaces, and what may go wrong at present. Whatever
//! of a host is outstanding when its connection ends is lost to the models: it may have had its effect, or have it later.

mod io;
mod rdma;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io::{IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bdev::conformance::Rng;
use nvmf::spec::fabrics::{CONNECT_DATA_BYTES, ConnectData};
use nvmf::spec::opcode::admin;
use nvmf::spec::{Cqe, Sqe, Status};
use nvmf::target::view::TransportKind;
use nvmf::tcp::wire_client::{self, TargetPdu, WireClient};
use reactor::net::{Network, Stream};
use reactor::{Clock, Instant, Progress};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromZeros, IntoBytes};

use crate::model::{Model, ReadToken, Stamp, WriteToken};
use crate::net::SimNetwork;
use crate::rdma::SimFabric;
use crate::trace;
use crate::world::{Actor, WorldView};

/// Time that a command may take on a connection that is up.
const COMMAND_PATIENCE: Duration = Duration::from_secs(120);
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(4);
/// KATO of hosts, in milliseconds.
const KATO_MS: u32 = 15_000;
const CC: u32 = 0x14;
const CSTS: u32 = 0x1c;
const CC_ENABLE: u32 = 0x0046_0001;
const CC_SHUT_DOWN: u32 = 0x0046_4001;

/// What may go wrong for hosts without being the target's fault.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowed {
    /// Connections end.
    pub disconnects: bool,
    /// Media fail.
    pub media: bool,
    /// There is no room.
    pub full: bool,
    /// Connects are refused.
    pub refusals: bool,
}

/// The namespaces of a target as its hosts know them.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// The models of those that stay, by NSID.
    pub models: BTreeMap<u32, Model>,
    /// Those that come and go: any status is accepted, and no contents are checked.
    pub fleeting: Vec<u32>,
    /// What may go wrong.
    pub allowed: Allowed,
    /// Commands that have succeeded.
    pub succeeded: u64,
    /// Hosts leave at once.
    pub stop: bool,
}

/// The namespaces as hosts hold them.
pub type SharedNamespaces = Rc<RefCell<Namespaces>>;

/// What a host does.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Its name in messages and in its NQN.
    pub number: u32,
    /// NQN of the subsystem.
    pub subnqn: String,
    /// How it connects.
    pub transport: TransportKind,
    /// Where the target listens.
    pub addr: SocketAddr,
    /// I/O queues.
    pub queues: u16,
    /// Entries of each.
    pub entries: u16,
    /// I/O commands in all.
    pub commands: u64,
    /// How often it leaves without a word and comes back.
    pub vanishes: u32,
    /// Largest transfer in bytes.
    pub max_bytes: u64,
    /// Header and data digests.
    pub digests: (bool, bool),
    /// It stops reading now and then.
    pub stalls: bool,
    /// It sends a few bytes at a time.
    pub dribbles: bool,
    /// It aborts commands.
    pub aborts: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Connect,
    Enable,
    AwaitReady,
    Identify,
    Features,
    Event,
    Log,
    KeepAlive,
    Abort,
    ShutDown,
    Io(Io),
    /// The halves of a compare-and-write name each other.
    FusedCompare {
        other: u16,
    },
    FusedWrite {
        other: u16,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Io {
    Read,
    Write,
    Flush,
    WriteZeroes,
    Deallocate,
    Compare,
}

struct Command {
    kind: Kind,
    nsid: u32,
    lba: u64,
    blocks: u64,
    stamp: Stamp,
    durable: bool,
    read: Option<ReadToken>,
    write: Option<WriteToken>,
    flush: u64,
    /// To the target.
    payload: Vec<u8>,
    /// From the target.
    data: Vec<u8>,
    expects: usize,
    aborted: bool,
    since: Instant,
    /// Of a fused half that has ended before the other.
    ended: Option<Status>,
}

impl Command {
    fn new(kind: Kind, now: Instant) -> Command {
        Command {
            kind,
            nsid: 0,
            lba: 0,
            blocks: 0,
            stamp: 0,
            durable: false,
            read: None,
            write: None,
            flush: 0,
            payload: Vec::new(),
            data: Vec::new(),
            expects: 0,
            aborted: false,
            since: now,
            ended: None,
        }
    }
}

/// How a queue is connected.
enum Line {
    Tcp { stream: Box<dyn Stream>, wire: Box<WireClient>, out: VecDeque<u8> },
    Rdma(Box<rdma::Line>),
}

struct Queue {
    qid: u16,
    line: Line,
    /// ICResp has come.
    up: bool,
    /// Connect has succeeded.
    connected: bool,
    entries: usize,
    commands: BTreeMap<u16, Command>,
    next_cid: u16,
    since: Instant,
    stalled_until: Instant,
}

impl Queue {
    fn cid(&mut self) -> u16 {
        loop {
            self.next_cid = (self.next_cid + 1) % 0x7fff;
            if !self.commands.contains_key(&self.next_cid) {
                return self.next_cid;
            }
        }
    }

    fn room(&self) -> usize {
        // A submission queue is full with one entry free.
        (self.entries - 1).saturating_sub(self.commands.len())
    }

    fn submit(&mut self, mut sqe: Sqe, in_capsule: &[u8], command: Command) -> u16 {
        let cid = self.cid();
        sqe.cid = U16::new(cid);
        trace::event("command", u64::from(self.qid) << 32 | u64::from(cid), sqe.opcode.into(), command.stamp);
        match &mut self.line {
            Line::Tcp { wire, out, .. } => out.extend(wire.capsule(&sqe, in_capsule)),
            Line::Rdma(line) => {
                let data = if in_capsule.is_empty() { &command.payload } else { in_capsule };
                line.submit(sqe, !in_capsule.is_empty(), data, command.expects);
            }
        }
        self.commands.insert(cid, command);
        cid
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Away { until: Instant },
    Admin,
    Io,
    Running,
    Leaving,
    Done,
}

/// One host.
pub struct Host {
    config: HostConfig,
    shared: SharedNamespaces,
    network: SimNetwork,
    fabric: SimFabric,
    rng: Rng,
    phase: Phase,
    queues: Vec<Queue>,
    cntlid: u16,
    left: u64,
    vanishes: u32,
    next_keep_alive: Instant,
    vanish_at: Option<Instant>,
    pause_until: Instant,
    refused: u32,
    /// When it last looked at the clock.
    now: Instant,
}

/// Why a connection is over.
enum End {
    /// It ended under the host.
    Lost(String),
    /// The target will not have this host now.
    Refused(Status),
}

impl Host {
    /// A host that connects at once.
    pub fn new(view: &WorldView, config: HostConfig, shared: &SharedNamespaces, seed: u64) -> Rc<RefCell<Host>> {
        let network = SimNetwork::new(&view.sim);
        Rc::new(RefCell::new(Host {
            shared: Rc::clone(shared),
            network,
            fabric: SimFabric::new(&view.sim),
            rng: Rng::new(seed),
            phase: Phase::Away { until: Instant(0) },
            queues: Vec::new(),
            cntlid: 0,
            left: config.commands,
            vanishes: config.vanishes,
            next_keep_alive: Instant(0),
            vanish_at: None,
            pause_until: Instant(0),
            refused: 0,
            now: Instant(0),
            config,
        }))
    }

    /// Whether it has done everything and is gone.
    pub fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }

    fn open_queue(&mut self, qid: u16, now: Instant) {
        let entries = if qid == 0 { 32 } else { usize::from(self.config.entries) };
        let line = match self.config.transport {
            TransportKind::Tcp => {
                let stream = self.network.connect(self.config.addr).expect("the network takes connections");
                let mut wire = Box::new(WireClient::new());
                let (header, data) = self.config.digests;
                let out = wire.icreq(header, data, self.rng.below(4) as u8, self.rng.below(4) as u32).into();
                Line::Tcp { stream, wire, out }
            }
            TransportKind::Rdma => Line::Rdma(Box::new(rdma::Line::new(&self.fabric, self.config.addr, qid, entries))),
        };
        self.queues.push(Queue {
            qid,
            line,
            up: false,
            connected: false,
            entries,
            commands: BTreeMap::new(),
            next_cid: self.rng.below(0x7fff) as u16,
            since: now,
            stalled_until: now,
        });
    }

    fn connect_command(&mut self, index: usize, now: Instant) {
        let mut data = ConnectData::new_zeroed();
        data.hostid = [self.config.number as u8 + 1; 16];
        data.cntlid = U16::new(if self.queues[index].qid == 0 { 0xffff } else { self.cntlid });
        data.subnqn[..self.config.subnqn.len()].copy_from_slice(self.config.subnqn.as_bytes());
        let hostnqn = host_nqn(self.config.number);
        data.hostnqn[..hostnqn.len()].copy_from_slice(hostnqn.as_bytes());
        let queue = &mut self.queues[index];
        let kato = if queue.qid == 0 { KATO_MS } else { 0 };
        let sqe = wire_client::connect(0, queue.qid, queue.entries as u16, kato, self.config.number.is_multiple_of(2));
        assert_eq!(data.as_bytes().len(), CONNECT_DATA_BYTES as usize);
        queue.submit(sqe, data.as_bytes(), Command::new(Kind::Connect, now));
    }

    /// Everything of this host is over on its side.
    fn drop_connections(&mut self) {
        let mut shared = self.shared.borrow_mut();
        for queue in self.queues.drain(..) {
            for (_, command) in queue.commands {
                io::lose(&mut shared, &command);
            }
        }
        self.vanish_at = None;
    }

    fn come_back(&mut self, now: Instant) {
        self.drop_connections();
        let until = now + Duration::from_nanos(self.rng.below(40_000_000));
        let over = self.shared.borrow().stop || self.left == 0;
        self.phase = if over { Phase::Done } else { Phase::Away { until } };
    }

    fn ended(&mut self, end: End, now: Instant) {
        let allowed = self.shared.borrow().allowed;
        match end {
            End::Lost(why) => {
                trace::text(format!("host {}: the connection ended: {why}", self.config.number));
                assert!(allowed.disconnects, "host {}: the target ended a connection: {why}", self.config.number);
            }
            End::Refused(status) => {
                trace::text(format!("host {}: refused: {status:?}", self.config.number));
                assert!(
                    allowed.refusals || allowed.disconnects,
                    "host {}: a connect was refused: {status:?}",
                    self.config.number
                );
                self.refused += 1;
                assert!(self.refused < 5000, "host {}: refused again and again: {status:?}", self.config.number);
            }
        }
        self.come_back(now);
    }

    /// Moves bytes and handles what has come; whether anything did.
    fn transfer(&mut self, index: usize, now: Instant) -> Result<bool, End> {
        let queue = &mut self.queues[index];
        let mut busy = false;
        let (stream, wire, out) = match &mut queue.line {
            Line::Tcp { stream, wire, out } => (stream, wire, out),
            Line::Rdma(_) => return self.transfer_rdma(index, now),
        };
        while !out.is_empty() {
            let (first, _) = out.as_slices();
            let limit = if self.config.dribbles { 1 + self.rng.below(200) as usize } else { usize::MAX };
            let piece = &first[..first.len().min(limit)];
            match stream.send(&[IoSlice::new(piece)]) {
                Ok(sent) => {
                    out.drain(..sent);
                    busy = true;
                    if self.config.dribbles {
                        break;
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(End::Lost(format!("send: {error}"))),
            }
        }
        if now < queue.stalled_until {
            return Ok(busy);
        }
        if self.config.stalls && self.rng.one_in(64) {
            queue.stalled_until = now + Duration::from_nanos(self.rng.below(20_000_000));
            return Ok(busy);
        }
        let mut bytes = vec![0; 1 + self.rng.below(65536) as usize];
        let count = match stream.recv(&mut [IoSliceMut::new(&mut bytes)]) {
            Ok(0) => return Err(End::Lost("end of stream".into())),
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(busy),
            Err(error) => return Err(End::Lost(format!("receive: {error}"))),
        };
        let pdus = wire.receive(&bytes[..count]);
        let pdus = pdus.unwrap_or_else(|why| panic!("host {}: the target broke a rule: {why}", self.config.number));
        for pdu in pdus {
            self.handle(index, pdu, now)?;
        }
        Ok(true)
    }

    /// The same over RDMA, where what moves are whole capsules.
    fn transfer_rdma(&mut self, index: usize, now: Instant) -> Result<bool, End> {
        let queue = &mut self.queues[index];
        let Line::Rdma(line) = &mut queue.line else { unreachable!("the caller looked") };
        if now < queue.stalled_until {
            return Ok(false);
        }
        if self.config.stalls && self.rng.one_in(64) {
            queue.stalled_until = now + Duration::from_nanos(self.rng.below(20_000_000));
            return Ok(false);
        }
        let mut came = Vec::new();
        // What came before the end counts.
        let stepped = line.step(&mut self.rng, &mut came);
        for came in came {
            match came {
                rdma::Came::Up => {
                    self.queues[index].up = true;
                    self.connect_command(index, now);
                }
                rdma::Came::Response(cqe, data) => {
                    if let Some(command) = self.queues[index].commands.get_mut(&cqe.cid.get()) {
                        command.data = data;
                    }
                    self.complete(index, cqe, now)?;
                }
            }
        }
        stepped.map_err(End::Lost)
    }

    fn handle(&mut self, index: usize, pdu: TargetPdu, now: Instant) -> Result<(), End> {
        let number = self.config.number;
        let queue = &mut self.queues[index];
        match pdu {
            TargetPdu::IcResp(_) => {
                assert!(!std::mem::replace(&mut queue.up, true), "host {number}: ICResp came twice");
                self.connect_command(index, now);
            }
            TargetPdu::R2t { cid, ttag, offset, len } => {
                let command = queue.commands.get(&cid);
                let command = command.unwrap_or_else(|| panic!("host {number}: R2T for {cid}, which is not there"));
                assert!(
                    (offset + len) as usize <= command.payload.len() && len > 0,
                    "host {number}: R2T for bytes {offset}+{len} of {}",
                    command.payload.len()
                );
                let piece = 1 + self.rng.below(70_000) as u32;
                let piece = piece.next_multiple_of(4);
                let Line::Tcp { wire, out, .. } = &mut queue.line else { unreachable!("R2Ts are TCP's") };
                out.extend(wire.answer_r2t(cid, ttag, offset, len, &command.payload, piece));
            }
            TargetPdu::Data { cid, offset, data, last, success } => {
                let command = queue.commands.get_mut(&cid);
                let command = command.unwrap_or_else(|| panic!("host {number}: data for {cid}, which is not there"));
                assert_eq!(command.data.len(), offset as usize, "host {number}: data out of order");
                command.data.extend(data);
                assert!(command.data.len() <= command.expects, "host {number}: more data than asked for");
                if success {
                    assert!(last, "host {number}: SUCCESS before the last data");
                    return self.complete(index, Cqe::success(cid), now);
                }
            }
            TargetPdu::Response(cqe) => return self.complete(index, cqe, now),
            TargetPdu::TermReq { fes, fei, header } => {
                panic!("host {number}: C2HTermReq {fes} {fei} for {header:02x?}")
            }
        }
        Ok(())
    }

    fn complete(&mut self, index: usize, cqe: Cqe, now: Instant) -> Result<(), End> {
        let (cid, status) = (cqe.cid.get(), cqe.status());
        let number = self.config.number;
        let queue = &mut self.queues[index];
        let command = queue.commands.remove(&cid);
        let command = command.unwrap_or_else(|| panic!("host {number}: {cid} completed, which is not there"));
        trace::event("response", u64::from(queue.qid) << 32 | u64::from(cid), status.to_field().into(), 0);
        let qid = queue.qid;
        match command.kind {
            Kind::Connect if !status.is_success() => return Err(End::Refused(status)),
            Kind::Connect => {
                queue.connected = true;
                if qid == 0 {
                    self.cntlid = cqe.dw0.get() as u16;
                    let sqe = wire_client::property_set(0, CC, CC_ENABLE);
                    self.queues[0].submit(sqe, &[], Command::new(Kind::Enable, now));
                }
            }
            Kind::Enable => {
                assert!(status.is_success(), "host {number}: enabling: {status:?}");
                let sqe = wire_client::property_get(0, CSTS, 4);
                queue.submit(sqe, &[], Command::new(Kind::AwaitReady, now));
            }
            Kind::AwaitReady => {
                assert!(status.is_success(), "host {number}: CSTS: {status:?}");
                let csts = cqe.dw0.get();
                assert_eq!(csts & 2, 0, "host {number}: CSTS.CFS is set");
                if csts & 1 == 0 {
                    let sqe = wire_client::property_get(0, CSTS, 4);
                    queue.submit(sqe, &[], Command::new(Kind::AwaitReady, now));
                } else {
                    self.introduce(now);
                }
            }
            Kind::Identify | Kind::Features | Kind::Log | Kind::KeepAlive => {
                let fleeting = !self.shared.borrow().fleeting.is_empty();
                assert!(status.is_success() || fleeting, "host {number}: {:?}: {status:?}", command.kind);
                assert!(
                    !status.is_success() || command.data.len() == command.expects,
                    "host {number}: data is missing"
                );
                let waits = |c: &Command| matches!(c.kind, Kind::Identify | Kind::Features);
                if self.phase == Phase::Admin && !self.queues[0].commands.values().any(waits) {
                    self.phase = Phase::Io;
                    for qid in 1..=self.config.queues {
                        self.open_queue(qid, now);
                    }
                }
            }
            Kind::Event => {
                assert!(status.is_success(), "host {number}: an event ended with {status:?}");
                let sqe = wire_client::command(admin::ASYNC_EVENT_REQUEST, 0, 0);
                queue.submit(sqe, &[], Command::new(Kind::Event, now));
                let log = cqe.dw0.get() >> 16 & 0xff;
                let mut sqe =
                    wire_client::with_transfer(wire_client::command(admin::GET_LOG_PAGE, 0, 0xffff_ffff), 4096);
                sqe.cdw10 = U32::new(log | 1023 << 16);
                queue.submit(sqe, &[], Command { expects: 4096, ..Command::new(Kind::Log, now) });
            }
            Kind::Abort => assert!(
                status.is_success() || status.same_code(Status::ABORT_LIMIT_EXCEEDED),
                "host {number}: Abort: {status:?}"
            ),
            Kind::ShutDown => {
                self.drop_connections();
                self.phase = Phase::Done;
                return Err(End::Lost(String::new()));
            }
            Kind::FusedCompare { other } | Kind::FusedWrite { other } => {
                let is_compare = matches!(command.kind, Kind::FusedCompare { .. });
                let ended = queue.commands.get(&other).is_none_or(|half| half.ended.is_some());
                if ended {
                    let half = queue.commands.remove(&other).expect("an ended half stays until both have");
                    let other_status = half.ended.expect("it was just seen");
                    let (compare, write) = if is_compare {
                        ((command, status), (half, other_status))
                    } else {
                        ((half, other_status), (command, status))
                    };
                    self.fused_done(compare, write);
                } else {
                    queue.commands.insert(cid, Command { ended: Some(status), ..command });
                }
            }
            Kind::Io(_) => self.io_done(command, status),
        }
        Ok(())
    }

    /// What a host asks of a controller that is ready.
    fn introduce(&mut self, now: Instant) {
        let nsids: Vec<u32> = {
            let shared = self.shared.borrow();
            shared.models.keys().chain(&shared.fleeting).copied().collect()
        };
        let queues = u32::from(self.config.queues);
        let admin_queue = &mut self.queues[0];
        let identify = |cns: u32, nsid| {
            let mut sqe = wire_client::with_transfer(wire_client::command(admin::IDENTIFY, 0, nsid), 4096);
            sqe.cdw10 = U32::new(cns);
            sqe
        };
        for (cns, nsid) in [(1, 0), (2, 0)].into_iter().chain(nsids.into_iter().map(|nsid| (0, nsid))) {
            admin_queue.submit(
                identify(cns, nsid),
                &[],
                Command { expects: 4096, ..Command::new(Kind::Identify, now) },
            );
        }
        let mut sqe = wire_client::command(admin::SET_FEATURES, 0, 0);
        sqe.cdw10 = U32::new(7);
        sqe.cdw11 = U32::new((queues - 1) << 16 | (queues - 1));
        admin_queue.submit(sqe, &[], Command::new(Kind::Features, now));
        let mut sqe = wire_client::command(admin::SET_FEATURES, 0, 0);
        sqe.cdw10 = U32::new(0x0b);
        sqe.cdw11 = U32::new(0x100);
        admin_queue.submit(sqe, &[], Command::new(Kind::Features, now));
        let sqe = wire_client::command(admin::ASYNC_EVENT_REQUEST, 0, 0);
        admin_queue.submit(sqe, &[], Command::new(Kind::Event, now));
        self.next_keep_alive = now + KEEP_ALIVE_EVERY;
    }

    fn run(&mut self, now: Instant) -> bool {
        let mut busy = false;
        if self.vanishes > 0 && self.vanish_at.is_none() {
            self.vanish_at = Some(now + Duration::from_nanos(self.rng.below(8_000_000)));
        }
        if self.phase == Phase::Running && now >= self.pause_until {
            for _ in 0..1 + self.rng.below(6) {
                if self.left == 0 || !self.submit_one(now) {
                    break;
                }
                self.left -= 1;
                busy = true;
            }
            self.pause_until = now + Duration::from_nanos(self.rng.below(200_000));
        }
        if self.config.aborts && self.rng.one_in(256) {
            self.abort_something(now);
        }
        if self.phase == Phase::Running {
            let stop = self.shared.borrow().stop;
            if self.left == 0 && self.queues[1..].iter().all(|queue| queue.commands.is_empty()) || stop {
                self.phase = Phase::Leaving;
                if stop || self.rng.one_in(2) {
                    // Without a word.
                    self.drop_connections();
                    self.phase = Phase::Done;
                } else {
                    let sqe = wire_client::property_set(0, CC, CC_SHUT_DOWN);
                    self.queues[0].submit(sqe, &[], Command::new(Kind::ShutDown, now));
                }
                return true;
            }
        }
        busy
    }

    fn check_patience(&mut self, now: Instant) -> Result<(), End> {
        let number = self.config.number;
        for queue in &self.queues {
            if !queue.up && now.since(queue.since) >= COMMAND_PATIENCE {
                let what = format!("queue {}: no ICResp has come", queue.qid);
                assert!(self.shared.borrow().allowed.disconnects, "host {number}: {what}");
                return Err(End::Lost(what));
            }
            let late = queue.commands.iter().find(|(_, command)| {
                !matches!(command.kind, Kind::Event)
                    && command.ended.is_none()
                    && now.since(command.since) > COMMAND_PATIENCE
            });
            if let Some((cid, command)) = late {
                let what = format!("queue {}: {:?} ({cid}) has not ended", queue.qid, command.kind);
                assert!(self.shared.borrow().allowed.disconnects, "host {number}: {what}");
                return Err(End::Lost(what));
            }
        }
        Ok(())
    }

    fn step(&mut self, now: Instant) -> Result<bool, End> {
        let mut busy = false;
        for index in 0..self.queues.len() {
            busy |= self.transfer(index, now)?;
        }
        self.check_patience(now)?;
        if self.phase == Phase::Io && self.queues.iter().all(|queue| queue.connected) {
            self.phase = Phase::Running;
        }
        if self.vanish_at.is_some_and(|at| now >= at) {
            self.vanishes -= 1;
            trace::text(format!("host {} vanishes", self.config.number));
            self.come_back(now);
            return Ok(true);
        }
        busy |= self.run(now);
        if matches!(self.phase, Phase::Running | Phase::Io) && now >= self.next_keep_alive && self.queues[0].room() > 0
        {
            self.next_keep_alive = now + KEEP_ALIVE_EVERY;
            let sqe = wire_client::command(admin::KEEP_ALIVE, 0, 0);
            self.queues[0].submit(sqe, &[], Command::new(Kind::KeepAlive, now));
            busy = true;
        }
        Ok(busy)
    }
}

/// NQN of the host of that number.
pub fn host_nqn(number: u32) -> String {
    format!("nqn.2014-08.org.nvmexpress:uuid:00000000-0000-4000-8000-{number:012}")
}

impl Actor for Host {
    fn act(&mut self, world: &WorldView) -> Progress {
        let now = world.sim.now();
        self.now = now;
        match self.phase {
            Phase::Done => return Progress::Idle,
            Phase::Away { until } => {
                if self.shared.borrow().stop {
                    self.phase = Phase::Done;
                    return Progress::Busy;
                }
                if now < until {
                    return Progress::Idle;
                }
                self.open_queue(0, now);
                self.phase = Phase::Admin;
                return Progress::Busy;
            }
            _ => {}
        }
        match self.step(now) {
            Ok(busy) => Progress::from_busy(busy),
            Err(_) if self.phase == Phase::Done => Progress::Busy,
            Err(_) if self.phase == Phase::Leaving => {
                // It had nothing left to say.
                self.drop_connections();
                self.phase = Phase::Done;
                Progress::Busy
            }
            Err(end) => {
                self.ended(end, now);
                Progress::Busy
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Done => return None,
            Phase::Away { until } => return Some(until),
            _ => {}
        }
        let running = self.phase == Phase::Running;
        let wants = running && self.left > 0 && (1..self.queues.len()).any(|n| self.queues[n].room() >= 2);
        let keep_alive = (running || self.phase == Phase::Io).then_some(self.next_keep_alive);
        let own = [keep_alive, self.vanish_at, wants.then_some(self.pause_until)];
        let connect = |queue: &Queue| (!queue.up).then(|| queue.since + COMMAND_PATIENCE);
        let oldest = |queue: &Queue| {
            let counts = |command: &&Command| command.kind != Kind::Event && command.ended.is_none();
            let since = queue.commands.values().filter(counts).map(|command| command.since).min();
            since.map(|since| since + COMMAND_PATIENCE + Duration::from_nanos(1))
        };
        let queues = self.queues.iter().flat_map(|queue| [Some(queue.stalled_until), connect(queue), oldest(queue)]);
        // What has passed has been seen, and there was nothing to do.
        own.into_iter().chain(queues).flatten().filter(|&at| at > self.now).min()
    }

    fn describe(&self) -> String {
        let queue = |queue: &Queue| {
            let kinds: Vec<String> =
                queue.commands.iter().map(|(cid, command)| format!("{cid} {:?}", command.kind)).collect();
            let out = match &queue.line {
                Line::Tcp { out, .. } => out.len(),
                Line::Rdma(line) => line.waiting(),
            };
            format!("\n    queue {}: up {}, out {out}, {kinds:?}", queue.qid, queue.up)
        };
        let queues: String = self.queues.iter().map(queue).collect();
        format!("host {}: {:?}, {} commands left{queues}", self.config.number, self.phase, self.left)
    }
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}
