//! RDMA devices: the seam [`reactor::rdma`] over a seeded world.
//!
//! There are two devices, that of the hosts (who connect) and that of the machine (which listens). A queue pair does its chains
//! in order, each after a random delay; those of different queue pairs in any order. A peer's memory is reached by keys that
//! are checked; a message needs a receive, and is tried again without one. What breaks a rule that the seam gives its users
//! ends the test: more READs than were agreed, more work than a queue has, too many pieces, memory that nobody registered, a
//! completion queue that overruns.
//!
//! Faults: connections that break, with flushed work on both ends; peers that fall silent, so that work fails after a time;
//! a machine's device that is lost with all that is on it, and comes back.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bdev::conformance::Rng;
use reactor::buffer::Region;
use reactor::park::Source;
use reactor::rdma::{
    ConnectParams, Connecting, DeviceInfo, Done, Doorbells, EndpointId, ExposedId, Fabric, Hub, HubConfig, HubEvent,
    Limits, Link, LinkEvent, Listener, Operation, Post, PrivateData, QueueDepths, Refused, Remote, Request, WorkStatus,
};
use reactor::{Buffer, BufferPool, Buffers};

use crate::park::Parks;
use crate::sim::{Agenda, Event, Sim, State};
use crate::trace;

mod fabric;
mod hub;

pub use fabric::SimFabric;
use fabric::SimLink;
use hub::SimHub;

/// Time after which a peer that does not answer counts as gone, in nanoseconds.
const RETRIES_NS: u64 = 600_000_000;

/// One buffer of another length; `None`: as long as it can be.
pub(crate) fn with_len(buffer: Buffer, len: Option<usize>) -> Buffer {
    let mut list = Buffers::new();
    list.push(buffer);
    match len {
        Some(len) => list.truncate(len),
        None => list.widen(),
    }
    list.drain().next().expect("there is one")
}

/// How devices behave.
#[derive(Clone, Copy, Debug)]
pub struct RdmaRules {
    /// Delay of a chain, of its completion and of a connection's events in nanoseconds, from and to.
    pub delay_ns: (u64, u64),
    /// Time until a message is tried again that found no receive, in nanoseconds.
    pub rnr_ns: u64,
    /// One chain in so many breaks its connection; 0: none.
    pub break_one_in: u64,
    /// Private data arrives padded, as over RoCE and InfiniBand.
    pub pads: bool,
    /// What devices can do.
    pub limits: Limits,
}

impl Default for RdmaRules {
    fn default() -> RdmaRules {
        let limits = Limits {
            qp_wr: 4096,
            sge: 16,
            cqe: 65_536,
            srq_wr: 4096,
            responder_resources: 16,
            initiator_depth: 16,
            ports: 1,
            mem_mgt_extensions: true,
        };
        RdmaRules { delay_ns: (1_000, 200_000), rnr_ns: 300_000, break_one_in: 0, pads: true, limits }
    }
}

#[allow(clippy::large_enum_variant)]
pub(crate) enum RdmaEvent {
    /// The way to an address is known.
    Resolved { connecting: u64 },
    /// A connection request reaches the listener.
    Asked { qp: u64, to: SocketAddr, params: ConnectParams, private_data: PrivateData },
    /// Something happens to one end.
    Told { qp: u64, event: LinkEvent },
    /// The first chain of a queue pair is due.
    Execute { qp: u64 },
    /// Work of a queue pair has ended.
    Complete { hub: u64, qp: u64, work: Work },
    /// Chains that nobody answers.
    TimedOut { qp: u64 },
}

#[allow(clippy::large_enum_variant)]
pub(crate) enum Work {
    Received { buffer: Buffer, bytes: u32, invalidated: Option<u32>, status: WorkStatus },
    Posted { post: Post, status: WorkStatus },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Fresh,
    Connected,
    Failed,
}

struct Qp {
    hub: Option<u64>,
    endpoint: EndpointId,
    peer: u64,
    device: usize,
    local: SocketAddr,
    remote: SocketAddr,
    life: Life,
    /// Nothing from this end arrives, and nothing reaches it.
    silent: bool,
    /// The other end has been told that this one is gone, or never knew of it.
    parted: bool,
    depths: QueueDepths,
    own_receives: VecDeque<Buffer>,
    receives_out: u32,
    /// Posted, and the device was not told yet.
    staged: VecDeque<Post>,
    staged_receives: VecDeque<Buffer>,
    chains: VecDeque<Post>,
    /// An `Execute` is under way.
    busy: bool,
    requests_out: u32,
    reads_out: u32,
    initiator_depth: u32,
    last: u64,
}

struct HubState {
    device: usize,
    config: HubConfig,
    pools: Vec<(Region, bool)>,
    messages: BTreeSet<usize>,
    shared: VecDeque<Buffer>,
    staged: VecDeque<Buffer>,
    shared_out: u32,
    doorbells: Doorbells,
    cq: VecDeque<(u64, Work)>,
    events: VecDeque<HubEvent>,
    armed: bool,
    signalled: bool,
    endpoints: Vec<Option<u64>>,
}

struct Exposed {
    hub: u64,
    data: Buffers,
    keys: Vec<u32>,
}

struct Listening {
    addr: SocketAddr,
    backlog: usize,
    queue: VecDeque<(u64, ConnectParams, PrivateData)>,
    removed: bool,
}

struct Resolving {
    ready: bool,
}

/// All devices.
#[derive(Default)]
pub(crate) struct Rdma {
    pub(crate) rules: RdmaRules,
    next: u64,
    next_key: u32,
    qps: BTreeMap<u64, Qp>,
    hubs: BTreeMap<u64, HubState>,
    listeners: BTreeMap<u64, Listening>,
    resolving: BTreeMap<u64, Resolving>,
    exposed: BTreeMap<usize, Exposed>,
    /// Of each key: what is exposed, the offset in it, and its bytes.
    keys: BTreeMap<u32, (usize, u32, u32)>,
    /// The machine's device is away.
    lost: bool,
}

const HOSTS: usize = 0;
const MACHINE: usize = 1;
/// Sources of the devices begin here, so that they are no sockets'.
const FIRST_SOURCE: u64 = 1 << 40;

fn device(index: usize) -> DeviceInfo {
    DeviceInfo { name: ["sim-hosts", "sim-machine"][index].to_owned(), iwarp: false }
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the RDMA device was removed")
}

impl Rdma {
    fn draw(&mut self) -> u64 {
        self.next += 1;
        FIRST_SOURCE + self.next
    }

    pub(crate) fn open_ends(&self) -> usize {
        // An owner may keep a hub for queue pairs to come.
        self.qps.len() + self.listeners.len()
    }

    pub(crate) fn is_ready(&self, source: u64) -> bool {
        if let Some(hub) = self.hubs.get(&source) {
            return hub.signalled || !hub.events.is_empty();
        }
        if let Some(listening) = self.listeners.get(&source) {
            return !listening.queue.is_empty() || listening.removed;
        }
        self.resolving.get(&source).is_some_and(|resolving| resolving.ready)
    }

    fn tell(&mut self, qp: u64, event: LinkEvent, parks: &mut Parks) {
        let Some(at) = self.qps.get(&qp) else { return };
        let (Some(hub), endpoint) = (at.hub, at.endpoint) else { return };
        let state = self.hubs.get_mut(&hub).expect("a queue pair is on a hub that there is");
        state.events.push_back(HubEvent::Link(endpoint, event));
        parks.edge(hub);
    }

    fn later(&mut self, qp: u64, rng: &mut Rng, agenda: &Agenda) -> u64 {
        let delay = State::skewed(rng, self.rules.delay_ns);
        let Some(at) = self.qps.get_mut(&qp) else { return agenda.now + delay };
        at.last = at.last.max(agenda.now + delay);
        at.last
    }

    fn complete_later(&mut self, qp: u64, work: Work, rng: &mut Rng, agenda: &mut Agenda) {
        let at = self.later(qp, rng, agenda);
        if let Some(hub) = self.qps.get(&qp).and_then(|qp| qp.hub) {
            agenda.at(at, Event::Rdma(RdmaEvent::Complete { hub, qp, work }));
        }
    }

    /// A queue pair fails: what it has completes as flushed.
    fn fail(&mut self, qp: u64, rng: &mut Rng, agenda: &mut Agenda) {
        let Some(at) = self.qps.get_mut(&qp) else { return };
        at.life = Life::Failed;
        let (chains, receives) = (std::mem::take(&mut at.chains), std::mem::take(&mut at.own_receives));
        for post in chains {
            self.complete_later(qp, Work::Posted { post, status: WorkStatus::Flushed }, rng, agenda);
        }
        for buffer in receives {
            let work = Work::Received { buffer, bytes: 0, invalidated: None, status: WorkStatus::Flushed };
            self.complete_later(qp, work, rng, agenda);
        }
    }

    /// This end is over; the other one learns it, unless nothing reaches it.
    fn part(&mut self, qp: u64, rng: &mut Rng, agenda: &mut Agenda) {
        let Some(at) = self.qps.get_mut(&qp) else { return };
        if std::mem::replace(&mut at.parted, true) || at.silent {
            return;
        }
        let peer = at.peer;
        if self.qps.get(&peer).is_some_and(|peer| peer.peer == qp && !peer.silent) {
            let delay = State::skewed(rng, self.rules.delay_ns);
            agenda.after(delay, Event::Rdma(RdmaEvent::Told { qp: peer, event: LinkEvent::Disconnected }));
        }
    }

    pub(crate) fn happen(&mut self, event: RdmaEvent, rng: &mut Rng, agenda: &mut Agenda, parks: &mut Parks) {
        match event {
            RdmaEvent::Resolved { connecting } => {
                if let Some(resolving) = self.resolving.get_mut(&connecting) {
                    resolving.ready = true;
                    parks.edge(connecting);
                }
            }
            RdmaEvent::Asked { qp, to, params, private_data } => {
                self.asked(qp, to, params, private_data, rng, agenda, parks);
            }
            RdmaEvent::Told { qp, event } => {
                let Some(at) = self.qps.get_mut(&qp) else { return };
                match &event {
                    LinkEvent::Established { params, .. } if at.life == Life::Fresh => {
                        at.life = Life::Connected;
                        at.initiator_depth = params.initiator_depth.into();
                    }
                    LinkEvent::Established { .. } if at.life == Life::Failed => return,
                    LinkEvent::Established { .. } => {}
                    // Its queue pair fails with this, as the connection manager's does.
                    _ => self.fail(qp, rng, agenda),
                }
                self.tell(qp, event, parks);
            }
            RdmaEvent::Execute { qp } => self.execute(qp, rng, agenda),
            RdmaEvent::TimedOut { qp } => {
                let Some(at) = self.qps.get_mut(&qp).filter(|at| at.life == Life::Connected) else { return };
                if let Some(post) = at.chains.pop_front() {
                    self.complete_later(qp, Work::Posted { post, status: WorkStatus::PeerGone }, rng, agenda);
                }
                self.fail(qp, rng, agenda);
            }
            RdmaEvent::Complete { hub, qp, work } => {
                if !self.qps.contains_key(&qp) || !self.hubs.contains_key(&hub) {
                    // It was detached meanwhile; a receive of the shared queue comes back all the same.
                    if let (Some(state), Work::Received { buffer, .. }) = (self.hubs.get_mut(&hub), work)
                        && state.config.shared_receives > 0
                    {
                        let status = WorkStatus::Flushed;
                        state.cq.push_back((0, Work::Received { buffer, bytes: 0, invalidated: None, status }));
                    }
                    return;
                }
                let state = self.hubs.get_mut(&hub).expect("it was just seen");
                state.cq.push_back((qp, work));
                assert!(state.cq.len() <= state.config.completions as usize, "a completion queue overran");
                if std::mem::take(&mut state.armed) {
                    state.signalled = true;
                    parks.edge(hub);
                }
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "an event and the world that it happens to")]
    fn asked(
        &mut self,
        qp: u64,
        to: SocketAddr,
        params: ConnectParams,
        private_data: PrivateData,
        rng: &mut Rng,
        agenda: &mut Agenda,
        parks: &mut Parks,
    ) {
        let delay = State::skewed(rng, self.rules.delay_ns);
        let Some(asking) = self.qps.get(&qp) else { return };
        let (local, remote) = (asking.local, asking.remote);
        let reaches =
            |addr: SocketAddr| addr.port() == to.port() && (addr.ip() == to.ip() || addr.ip().is_unspecified());
        let found = self.listeners.iter().find(|(_, listening)| reaches(listening.addr) && !listening.removed);
        let Some(listener) = found.map(|(id, _)| *id).filter(|_| !self.lost) else {
            let event = LinkEvent::Rejected { reason: 8, private_data: PrivateData::new() };
            return agenda.after(delay, Event::Rdma(RdmaEvent::Told { qp, event }));
        };
        if self.listeners[&listener].queue.len() >= self.listeners[&listener].backlog {
            let event = LinkEvent::Failed { what: "the peer cannot be reached" };
            return agenda.after(RETRIES_NS, Event::Rdma(RdmaEvent::Told { qp, event }));
        }
        let passive = self.draw();
        self.qps.insert(passive, Qp::new(qp, MACHINE, remote, local));
        self.qps.get_mut(&qp).expect("it was just seen").peer = passive;
        // What one side asks, the other answers.
        let seen = ConnectParams {
            responder_resources: params.initiator_depth,
            initiator_depth: params.responder_resources,
            rnr_retry_count: params.rnr_retry_count,
        };
        let mut private_data = private_data;
        if self.rules.pads {
            private_data.resize(private_data.len().max(56), 0);
        }
        trace::event("rdma request", qp, passive, 0);
        self.listeners.get_mut(&listener).expect("it was just found").queue.push_back((passive, seen, private_data));
        parks.edge(listener);
    }

    fn execute(&mut self, qp: u64, rng: &mut Rng, agenda: &mut Agenda) {
        let rules = self.rules;
        let Some(at) = self.qps.get_mut(&qp) else { return };
        at.busy = false;
        if at.life != Life::Connected || at.chains.is_empty() {
            return;
        }
        let peer = at.peer;
        let silent = at.silent;
        let answers = self.qps.get(&peer).is_some_and(|p| p.peer == qp && p.life == Life::Connected && !p.silent);
        if silent || !answers {
            return agenda.after(RETRIES_NS, Event::Rdma(RdmaEvent::TimedOut { qp }));
        }
        if rules.break_one_in > 0 && rng.one_in(rules.break_one_in) {
            return self.break_pair(qp, rng, agenda);
        }
        // Without a receive for its message, all of the chain is tried again.
        let needs_receive = self.qps[&qp].chains[0].message.is_some();
        if needs_receive && !self.has_receive(peer) {
            trace::event("rnr", qp, peer, 0);
            self.qps.get_mut(&qp).expect("it is there").busy = true;
            return agenda.after(rules.rnr_ns, Event::Rdma(RdmaEvent::Execute { qp }));
        }
        let mut post = self.qps.get_mut(&qp).and_then(|at| at.chains.pop_front()).expect("there is a chain");
        let status = self.perform(&mut post, peer, rng, agenda);
        trace::event("rdma chain", qp, u64::from(post.requests()), u64::from(status == WorkStatus::Success));
        self.complete_later(qp, Work::Posted { post, status }, rng, agenda);
        if status == WorkStatus::Success {
            self.start(qp, rng, agenda);
        } else {
            // A device that refuses an access fails its own queue pair, too.
            self.fail(qp, rng, agenda);
            self.fail(peer, rng, agenda);
        }
    }

    /// The device learns of what was posted to a hub: receives, and (`all`) chains.
    fn ring(&mut self, hub: u64, all: bool, rng: &mut Rng, agenda: &mut Agenda) {
        let state = self.hubs.get_mut(&hub).expect("it is held");
        let mut doorbells = state.doorbells;
        doorbells.receives += u64::from(!state.staged.is_empty());
        let staged = std::mem::take(&mut state.staged);
        state.shared.extend(staged);
        let endpoints: Vec<u64> = state.endpoints.iter().flatten().copied().collect();
        for qp in endpoints {
            let at = self.qps.get_mut(&qp).expect("endpoints are queue pairs");
            let failed = at.life == Life::Failed;
            let receives = std::mem::take(&mut at.staged_receives);
            doorbells.receives += u64::from(!receives.is_empty());
            let chains = if all { std::mem::take(&mut at.staged) } else { VecDeque::new() };
            doorbells.sends += u64::from(!chains.is_empty());
            if !failed {
                at.own_receives.extend(receives);
                if !chains.is_empty() {
                    assert_eq!(at.life, Life::Connected, "work is posted on a connection that is not up");
                    at.chains.extend(chains);
                    self.start(qp, rng, agenda);
                }
                continue;
            }
            let status = WorkStatus::Flushed;
            for buffer in receives {
                let work = Work::Received { buffer, bytes: 0, invalidated: None, status };
                self.complete_later(qp, work, rng, agenda);
            }
            for post in chains {
                self.complete_later(qp, Work::Posted { post, status }, rng, agenda);
            }
        }
        self.hubs.get_mut(&hub).expect("it is held").doorbells = doorbells;
    }

    fn has_receive(&self, qp: u64) -> bool {
        let Some(at) = self.qps.get(&qp) else { return false };
        let shared = at.hub.and_then(|hub| self.hubs.get(&hub)).is_some_and(|hub| !hub.shared.is_empty());
        !at.own_receives.is_empty() || shared
    }

    fn start(&mut self, qp: u64, rng: &mut Rng, agenda: &mut Agenda) {
        let delay = State::skewed(rng, self.rules.delay_ns);
        let Some(at) = self.qps.get_mut(&qp) else { return };
        if !at.busy && !at.chains.is_empty() {
            at.busy = true;
            agenda.after(delay, Event::Rdma(RdmaEvent::Execute { qp }));
        }
    }

    /// The range of exposed memory that a key and an address name, if `peer` may be asked for it.
    fn range(&self, address: u64, rkey: u32, bytes: u32, peer: u64) -> Option<(usize, usize)> {
        let &(id, offset, len) = self.keys.get(&rkey)?;
        let within = address.checked_sub(base_of(rkey))?;
        let fits = within.checked_add(bytes.into())? <= len.into();
        let same = Some(self.exposed.get(&id)?.hub) == self.qps.get(&peer)?.hub;
        (fits && same).then_some((id, offset as usize + within as usize))
    }

    /// Moves the data of a chain and delivers its message.
    fn perform(&mut self, post: &mut Post, peer: u64, rng: &mut Rng, agenda: &mut Agenda) -> WorkStatus {
        let mut at = post.start as usize;
        for transfer in &post.transfers {
            let len = transfer.bytes as usize;
            let mut bytes = vec![0; len];
            let done = match transfer.operation {
                Operation::Write { address, rkey } => {
                    self.range(address, rkey, transfer.bytes, peer).map(|(id, there)| {
                        post.data.read_at(at, &mut bytes);
                        self.exposed.get_mut(&id).expect("it was just found").data.write_at(there, &bytes);
                    })
                }
                Operation::Read { address, rkey } => {
                    self.range(address, rkey, transfer.bytes, peer).map(|(id, there)| {
                        self.exposed[&id].data.read_at(there, &mut bytes);
                        post.data.write_at(at, &bytes);
                    })
                }
                Operation::Send | Operation::SendInvalidate { .. } => panic!("a transfer that is a message"),
            };
            if done.is_none() {
                return WorkStatus::RemoteAccess;
            }
            at += len;
        }
        let Some(message) = &post.message else { return WorkStatus::Success };
        let invalidated = match message.operation {
            Operation::SendInvalidate { rkey } => Some(rkey),
            _ => None,
        };
        if let Some(key) = invalidated
            && self.range(base_of(key), key, 0, peer).is_none()
        {
            return WorkStatus::RemoteAccess;
        }
        let mut bytes = message.head.to_vec();
        if message.with_data {
            let mut tail = vec![0; post.data.len() - at];
            post.data.read_at(at, &mut tail);
            bytes.extend(tail);
        }
        let to = self.qps.get_mut(&peer).expect("the peer was just seen");
        let hub = to.hub.expect("a connected queue pair is on a hub");
        let own = to.own_receives.pop_front();
        let shared = || self.hubs.get_mut(&hub).and_then(|hub| hub.shared.pop_front());
        let mut buffer = own.or_else(shared).expect("a receive was just seen");
        if buffer.len() < bytes.len() {
            let work = Work::Received { buffer, bytes: 0, invalidated: None, status: WorkStatus::Length };
            self.complete_later(peer, work, rng, agenda);
            return WorkStatus::RemoteAccess;
        }
        buffer[..bytes.len()].copy_from_slice(&bytes);
        if let Some(key) = invalidated {
            self.keys.remove(&key);
        }
        let work = Work::Received { buffer, bytes: bytes.len() as u32, invalidated, status: WorkStatus::Success };
        self.complete_later(peer, work, rng, agenda);
        WorkStatus::Success
    }

    /// A connection breaks: both ends fail and are told, at different times.
    fn break_pair(&mut self, qp: u64, rng: &mut Rng, agenda: &mut Agenda) {
        let Some(peer) = self.qps.get(&qp).map(|at| at.peer) else { return };
        for end in [qp, peer] {
            let delay = State::skewed(rng, self.rules.delay_ns);
            agenda.after(delay, Event::Rdma(RdmaEvent::Told { qp: end, event: LinkEvent::Disconnected }));
            if let Some(at) = self.qps.get_mut(&end) {
                at.parted = true;
            }
        }
    }

    /// Connections that are up, each by one end.
    fn connected(&self) -> Vec<u64> {
        let up = |(id, at): (&u64, &Qp)| (at.life == Life::Connected && at.device == MACHINE).then_some(*id);
        self.qps.iter().filter_map(up).collect()
    }

    pub(crate) fn break_some(&mut self, count: usize, rng: &mut Rng, agenda: &mut Agenda) {
        let mut up = self.connected();
        for _ in 0..count.min(up.len()) {
            let qp = up.swap_remove(rng.below(up.len() as u64) as usize);
            self.break_pair(qp, rng, agenda);
        }
    }

    /// The connection of the host with this address falls silent; whether there is one.
    pub(crate) fn silence(&mut self, addr: SocketAddr) -> bool {
        let Some((&qp, at)) = self.qps.iter().find(|(_, at)| at.device == HOSTS && at.local == addr) else {
            return false;
        };
        let peer = at.peer;
        for end in [qp, peer] {
            self.qps.get_mut(&end).into_iter().for_each(|at| at.silent = true);
        }
        true
    }

    pub(crate) fn silence_some(&mut self, rng: &mut Rng) {
        for qp in self.connected() {
            if rng.one_in(2) {
                let peer = self.qps[&qp].peer;
                for end in [qp, peer] {
                    if let Some(at) = self.qps.get_mut(&end) {
                        at.silent = true;
                    }
                }
            }
        }
    }

    /// The machine's device goes away with all that is on it, or comes back.
    pub(crate) fn set_lost(&mut self, lost: bool, rng: &mut Rng, agenda: &mut Agenda, parks: &mut Parks) {
        self.lost = lost;
        if !lost {
            return;
        }
        let on: Vec<u64> = self.qps.iter().filter(|(_, at)| at.device == MACHINE).map(|(id, _)| *id).collect();
        for qp in on {
            self.part(qp, rng, agenda);
            self.fail(qp, rng, agenda);
            self.tell(qp, LinkEvent::DeviceRemoved, parks);
        }
        for (id, hub) in &mut self.hubs {
            if hub.device == MACHINE {
                hub.events.push_back(HubEvent::DeviceLost("the device was removed".into()));
                parks.edge(*id);
            }
        }
        for (id, listening) in &mut self.listeners {
            listening.removed = true;
            parks.edge(*id);
        }
    }

    fn forget_qp(&mut self, id: u64, rng: &mut Rng, agenda: &mut Agenda) -> Option<Qp> {
        self.part(id, rng, agenda);
        self.qps.remove(&id)
    }
}

impl Qp {
    fn new(peer: u64, device: usize, local: SocketAddr, remote: SocketAddr) -> Qp {
        Qp {
            hub: None,
            endpoint: EndpointId(0),
            peer,
            device,
            local,
            remote,
            life: Life::Fresh,
            silent: false,
            parted: false,
            depths: QueueDepths { send: 0, receive: 0, send_pieces: 0 },
            own_receives: VecDeque::new(),
            receives_out: 0,
            staged: VecDeque::new(),
            staged_receives: VecDeque::new(),
            chains: VecDeque::new(),
            busy: false,
            requests_out: 0,
            reads_out: 0,
            initiator_depth: 0,
            last: 0,
        }
    }
}

fn base_of(key: u32) -> u64 {
    u64::from(key) << 32
}

fn reads(post: &Post) -> u32 {
    post.transfers.iter().filter(|transfer| matches!(transfer.operation, Operation::Read { .. })).count() as u32
}
