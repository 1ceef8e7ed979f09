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
    ConnectParams, Connecting, DeviceInfo, Done, EndpointId, ExposedId, Fabric, Hub, HubConfig, HubEvent, Limits, Link,
    LinkEvent, Listener, Operation, Post, PrivateData, QueueDepths, Refused, Remote, Request, WorkStatus,
};
use reactor::{Buffer, BufferPool, Buffers};

use crate::park::Parks;
use crate::sim::{Agenda, Event, Sim, State};
use crate::trace;

/// Time after which a peer that does not answer counts as gone, in nanoseconds.
const RETRIES_NS: u64 = 600_000_000;

/// How devices behave.
#[derive(Clone, Copy, Debug)]
pub struct RdmaRules {
    /// Delay of a chain, of its completion and of a connection's events in nanoseconds, from and to.
    pub delay_ns: (u64, u64),
    /// Time until a message is tried again that found no receive, in nanoseconds.
    pub rnr_ns: u64,
    /// One chain in so many breaks its connection; 0: none.
    pub break_one_in: u64,
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
        RdmaRules { delay_ns: (1_000, 200_000), rnr_ns: 300_000, break_one_in: 0, limits }
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
    shared_out: u32,
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
        private_data.resize(private_data.len().max(56), 0);
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

/// The fabric of a simulated machine.
#[derive(Clone, Debug)]
pub struct SimFabric(Arc<Sim>);

impl SimFabric {
    /// The fabric of `sim`.
    pub fn new(sim: &Arc<Sim>) -> SimFabric {
        SimFabric(Arc::clone(sim))
    }
}

impl Fabric for SimFabric {
    fn devices(&self) -> io::Result<Vec<DeviceInfo>> {
        if self.0.lock().rdma.lost { Err(gone()) } else { Ok(vec![device(HOSTS), device(MACHINE)]) }
    }

    fn listen(&self, addr: SocketAddr, backlog: u32) -> io::Result<Box<dyn Listener>> {
        let mut state = self.0.lock();
        let rdma = &mut state.rdma;
        if rdma.lost {
            return Err(gone());
        }
        if rdma.listeners.values().any(|listening| listening.addr == addr && !listening.removed) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let id = rdma.draw();
        let backlog = backlog.max(1) as usize;
        rdma.listeners.insert(id, Listening { addr, backlog, queue: VecDeque::new(), removed: false });
        Ok(Box::new(SimListener { sim: Arc::clone(&self.0), id, addr }))
    }

    fn connect(&self, addr: SocketAddr, _: u32) -> io::Result<Box<dyn Connecting>> {
        let mut state = self.0.lock();
        let state = &mut *state;
        let id = state.rdma.draw();
        state.rdma.resolving.insert(id, Resolving { ready: false });
        let delay = State::skewed(&mut state.rng, state.rdma.rules.delay_ns);
        state.agenda.after(delay, Event::Rdma(RdmaEvent::Resolved { connecting: id }));
        Ok(Box::new(SimConnecting { sim: Arc::clone(&self.0), id, addr }))
    }
}

struct SimListener {
    sim: Arc<Sim>,
    id: u64,
    addr: SocketAddr,
}

impl Listener for SimListener {
    fn next(&mut self) -> io::Result<Option<Request>> {
        let mut state = self.sim.lock();
        let listening = state.rdma.listeners.get_mut(&self.id).expect("it is held");
        if listening.removed {
            return Err(gone());
        }
        let Some((qp, params, private_data)) = listening.queue.pop_front() else { return Ok(None) };
        drop(state);
        let link = SimLink { sim: Arc::clone(&self.sim), qp, undecided: true };
        Ok(Some(Request { link: Box::new(link), params, private_data }))
    }

    fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    fn source(&self) -> Source {
        Source::Virtual(self.id)
    }
}

impl Drop for SimListener {
    fn drop(&mut self) {
        let queue = {
            let mut state = self.sim.lock();
            state.rdma.listeners.remove(&self.id).map(|listening| listening.queue)
        };
        for (qp, ..) in queue.into_iter().flatten() {
            drop(SimLink { sim: Arc::clone(&self.sim), qp, undecided: true });
        }
    }
}

struct SimConnecting {
    sim: Arc<Sim>,
    id: u64,
    addr: SocketAddr,
}

impl Connecting for SimConnecting {
    fn poll(&mut self) -> io::Result<Option<Box<dyn Link>>> {
        let mut state = self.sim.lock();
        let rdma = &mut state.rdma;
        if !rdma.resolving[&self.id].ready {
            return Ok(None);
        }
        let qp = rdma.draw();
        let local = SocketAddr::new(IpAddr::from([10, 0, 0, 1]), 10_000 + (qp % 50_000) as u16);
        rdma.qps.insert(qp, Qp::new(0, HOSTS, local, self.addr));
        drop(state);
        Ok(Some(Box::new(SimLink { sim: Arc::clone(&self.sim), qp, undecided: false })))
    }

    fn source(&self) -> Source {
        Source::Virtual(self.id)
    }
}

impl Drop for SimConnecting {
    fn drop(&mut self) {
        self.sim.lock().rdma.resolving.remove(&self.id);
    }
}

struct SimLink {
    sim: Arc<Sim>,
    /// 0 once it was attached or refused.
    qp: u64,
    undecided: bool,
}

impl SimLink {
    fn refuse(&mut self, private_data: &[u8]) {
        let qp = std::mem::take(&mut self.qp);
        let mut state = self.sim.lock();
        let state = &mut *state;
        let Some(mut at) = state.rdma.qps.remove(&qp) else { return };
        at.parted = true;
        if std::mem::take(&mut self.undecided) {
            let delay = State::skewed(&mut state.rng, state.rdma.rules.delay_ns);
            let mut data = PrivateData::from_slice(private_data);
            data.resize(148, 0);
            let event = LinkEvent::Rejected { reason: 28, private_data: data };
            state.agenda.after(delay, Event::Rdma(RdmaEvent::Told { qp: at.peer, event }));
        }
    }
}

impl Link for SimLink {
    fn device(&self) -> DeviceInfo {
        device(self.sim.lock().rdma.qps[&self.qp].device)
    }

    fn limits(&self) -> Limits {
        self.sim.lock().rdma.rules.limits
    }

    fn local_addr(&self) -> SocketAddr {
        self.sim.lock().rdma.qps[&self.qp].local
    }

    fn peer_addr(&self) -> SocketAddr {
        self.sim.lock().rdma.qps[&self.qp].remote
    }

    fn hub(&self, config: HubConfig) -> io::Result<Box<dyn Hub>> {
        let mut state = self.sim.lock();
        let rdma = &mut state.rdma;
        let on = rdma.qps[&self.qp].device;
        let limits = rdma.rules.limits;
        if on == MACHINE && rdma.lost {
            return Err(gone());
        }
        if config.completions > limits.cqe || config.shared_receives > limits.srq_wr {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let id = rdma.draw();
        rdma.hubs.insert(
            id,
            HubState {
                device: on,
                config,
                pools: Vec::new(),
                messages: BTreeSet::new(),
                shared: VecDeque::new(),
                shared_out: 0,
                cq: VecDeque::new(),
                events: VecDeque::new(),
                armed: false,
                signalled: false,
                endpoints: Vec::new(),
            },
        );
        Ok(Box::new(SimHub { sim: Arc::clone(&self.sim), id, limits, info: device(on), lists: BTreeMap::new() }))
    }

    fn reject(mut self: Box<Self>, private_data: &[u8]) -> io::Result<()> {
        assert!(private_data.len() <= 148, "a reject carries at most 148 bytes");
        self.refuse(private_data);
        Ok(())
    }
}

impl Drop for SimLink {
    fn drop(&mut self) {
        if self.qp != 0 {
            self.refuse(&[]);
        }
    }
}

struct SimHub {
    sim: Arc<Sim>,
    id: u64,
    limits: Limits,
    info: DeviceInfo,
    /// What is exposed, as peers are told.
    lists: BTreeMap<usize, Vec<Remote>>,
}

impl HubState {
    fn check_known(&self, buffer: &mut Buffer) {
        let address = buffer.as_mut_ptr() as usize;
        let known = self.pools.iter().any(|(region, _)| buffer.in_region(region)) || self.messages.contains(&address);
        assert!(known, "memory was posted that is not registered");
    }
}

impl SimHub {
    fn qp(&self, state: &State, endpoint: EndpointId) -> u64 {
        state.rdma.hubs[&self.id].endpoints[endpoint.0].expect("the endpoint was detached")
    }

    /// What the owner is told of the end of work.
    fn done(&self, state: &mut State, qp: u64, work: Work) -> Done {
        let shared = state.rdma.hubs[&self.id].config.shared_receives > 0;
        match work {
            Work::Received { buffer, bytes, invalidated, status } => {
                let hub = state.rdma.hubs.get_mut(&self.id).expect("it is held");
                if shared {
                    hub.shared_out -= 1;
                } else if let Some(at) = state.rdma.qps.get_mut(&qp) {
                    at.receives_out -= 1;
                }
                let endpoint = state.rdma.qps.get(&qp).map(|at| at.endpoint);
                Done::Received { endpoint, buffer, bytes, invalidated, status }
            }
            Work::Posted { post, status } => {
                let at = state.rdma.qps.get_mut(&qp).expect("chains end with their queue pair");
                at.requests_out -= post.requests();
                at.reads_out -= reads(&post);
                let head = post.message.map(|message| message.head);
                Done::Posted { endpoint: at.endpoint, user: post.user, data: post.data, head, status }
            }
        }
    }
}

impl Hub for SimHub {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn is_on(&self, link: &dyn Link) -> bool {
        link.device() == self.info
    }

    fn register(&mut self, pool: &BufferPool, remote: bool) -> io::Result<()> {
        self.sim.lock().rdma.hubs.get_mut(&self.id).expect("it is held").pools.push((pool.region(), remote));
        Ok(())
    }

    fn messages(&mut self, count: usize, bytes: usize) -> io::Result<Vec<Buffer>> {
        let mut made: Vec<Buffer> = (0..count).map(|_| Buffer::heap(bytes)).collect();
        let mut state = self.sim.lock();
        let hub = state.rdma.hubs.get_mut(&self.id).expect("it is held");
        hub.messages.extend(made.iter_mut().map(|buffer| buffer.as_mut_ptr() as usize));
        Ok(made)
    }

    fn attach(&mut self, link: Box<dyn Link>, depths: QueueDepths) -> io::Result<EndpointId> {
        let link: Box<dyn Any> = link;
        let mut link = link.downcast::<SimLink>().expect("a link of the same fabric");
        let mut state = self.sim.lock();
        let rdma = &mut state.rdma;
        let hub = rdma.hubs.get_mut(&self.id).expect("it is held");
        let refused = if hub.device == MACHINE && rdma.lost { Some(gone()) } else { None };
        let too_deep = depths.send > self.limits.qp_wr || depths.send_pieces > self.limits.sge;
        if let Some(error) = refused.or_else(|| too_deep.then(|| io::ErrorKind::OutOfMemory.into())) {
            drop(state);
            return Err(error);
        }
        let free = hub.endpoints.iter().position(Option::is_none);
        let endpoint = EndpointId(free.unwrap_or(hub.endpoints.len()));
        if free.is_none() {
            hub.endpoints.push(None);
        }
        hub.endpoints[endpoint.0] = Some(link.qp);
        let at = rdma.qps.get_mut(&link.qp).expect("it is held");
        at.hub = Some(self.id);
        at.endpoint = endpoint;
        at.depths = depths;
        link.qp = 0;
        drop(state);
        Ok(endpoint)
    }

    fn connect(&mut self, endpoint: EndpointId, params: ConnectParams, private_data: &[u8]) -> io::Result<()> {
        assert!(private_data.len() <= reactor::rdma::CONNECT_PRIVATE_BYTES);
        let mut state = self.sim.lock();
        let qp = self.qp(&state, endpoint);
        let state = &mut *state;
        let to = state.rdma.qps[&qp].remote;
        let delay = State::skewed(&mut state.rng, state.rdma.rules.delay_ns);
        let private_data = PrivateData::from_slice(private_data);
        state.agenda.after(delay, Event::Rdma(RdmaEvent::Asked { qp, to, params, private_data }));
        Ok(())
    }

    fn accept(&mut self, endpoint: EndpointId, params: ConnectParams, private_data: &[u8]) -> io::Result<()> {
        let mut state = self.sim.lock();
        let qp = self.qp(&state, endpoint);
        let state = &mut *state;
        let at = state.rdma.qps.get_mut(&qp).expect("it is attached");
        if at.life == Life::Failed {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        at.life = Life::Connected;
        at.initiator_depth = params.initiator_depth.into();
        let peer = at.peer;
        let mut data = PrivateData::from_slice(private_data);
        data.resize(data.len().max(196), 0);
        let there = ConnectParams {
            responder_resources: params.initiator_depth,
            initiator_depth: params.responder_resources,
            rnr_retry_count: params.rnr_retry_count,
        };
        let delay = State::skewed(&mut state.rng, state.rdma.rules.delay_ns);
        let event = LinkEvent::Established { params: there, private_data: data };
        state.agenda.after(delay, Event::Rdma(RdmaEvent::Told { qp: peer, event }));
        let event = LinkEvent::Established { params, private_data: PrivateData::new() };
        state.agenda.after(2 * delay, Event::Rdma(RdmaEvent::Told { qp, event }));
        Ok(())
    }

    fn disconnect(&mut self, endpoint: EndpointId) {
        let mut state = self.sim.lock();
        let qp = self.qp(&state, endpoint);
        let state = &mut *state;
        state.rdma.part(qp, &mut state.rng, &mut state.agenda);
        state.rdma.fail(qp, &mut state.rng, &mut state.agenda);
    }

    fn detach(&mut self, endpoint: EndpointId, back: &mut dyn FnMut(Done)) {
        let mut returned = Vec::new();
        {
            let mut state = self.sim.lock();
            let qp = self.qp(&state, endpoint);
            let state = &mut *state;
            let hub = state.rdma.hubs.get_mut(&self.id).expect("it is held");
            let shared = hub.config.shared_receives > 0;
            let (mine, others): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut hub.cq)
                .into_iter()
                .partition(|(of, work)| *of == qp && (!shared || matches!(work, Work::Posted { .. })));
            hub.cq = others;
            hub.endpoints[endpoint.0] = None;
            hub.events.retain(|event| !matches!(event, HubEvent::Link(at, _) if *at == endpoint));
            returned.extend(mine.into_iter().map(|(_, work)| work));
            let pending = state.agenda.take_rdma_work(qp, shared);
            returned.extend(pending);
            let at = state.rdma.forget_qp(qp, &mut state.rng, &mut state.agenda).expect("it is attached");
            let status = WorkStatus::Flushed;
            returned.extend(at.chains.into_iter().map(|post| Work::Posted { post, status }));
            let received = |buffer| Work::Received { buffer, bytes: 0, invalidated: None, status };
            returned.extend(at.own_receives.into_iter().map(received));
        }
        for work in returned {
            back(match work {
                Work::Received { buffer, bytes, invalidated, status } => {
                    Done::Received { endpoint: Some(endpoint), buffer, bytes, invalidated, status }
                }
                Work::Posted { post, status } => {
                    let head = post.message.map(|message| message.head);
                    Done::Posted { endpoint, user: post.user, data: post.data, head, status }
                }
            });
        }
    }

    fn local_addr(&self, endpoint: EndpointId) -> SocketAddr {
        let state = self.sim.lock();
        state.rdma.qps[&self.qp(&state, endpoint)].local
    }

    fn peer_addr(&self, endpoint: EndpointId) -> SocketAddr {
        let state = self.sim.lock();
        state.rdma.qps[&self.qp(&state, endpoint)].remote
    }

    fn has_shared_receives(&self) -> bool {
        self.sim.lock().rdma.hubs[&self.id].config.shared_receives > 0
    }

    fn post_receive(&mut self, endpoint: Option<EndpointId>, mut buffer: Buffer) -> Result<(), (Buffer, io::Error)> {
        let mut state = self.sim.lock();
        let qp = endpoint.map(|endpoint| self.qp(&state, endpoint));
        let state = &mut *state;
        let hub = state.rdma.hubs.get_mut(&self.id).expect("it is held");
        hub.check_known(&mut buffer);
        let shared = hub.config.shared_receives;
        let Some(qp) = qp else {
            assert!(shared > 0, "there is no shared queue");
            if hub.shared_out == shared {
                return Err((buffer, io::ErrorKind::OutOfMemory.into()));
            }
            hub.shared_out += 1;
            hub.shared.push_back(buffer);
            return Ok(());
        };
        assert_eq!(shared, 0, "receives are posted to the shared queue");
        let at = state.rdma.qps.get_mut(&qp).expect("it is attached");
        if at.receives_out == at.depths.receive {
            return Err((buffer, io::ErrorKind::OutOfMemory.into()));
        }
        at.receives_out += 1;
        if at.life == Life::Failed {
            let work = Work::Received { buffer, bytes: 0, invalidated: None, status: WorkStatus::Flushed };
            state.rdma.complete_later(qp, work, &mut state.rng, &mut state.agenda);
        } else {
            at.own_receives.push_back(buffer);
        }
        Ok(())
    }

    fn room(&self, endpoint: EndpointId) -> u32 {
        let state = self.sim.lock();
        let at = &state.rdma.qps[&self.qp(&state, endpoint)];
        at.depths.send - at.requests_out
    }

    fn post(&mut self, endpoint: EndpointId, mut post: Post) -> Result<(), Box<Refused>> {
        let mut state = self.sim.lock();
        let qp = self.qp(&state, endpoint);
        let state = &mut *state;
        let hub = &state.rdma.hubs[&self.id];
        assert!(post.requests() > 0, "a post does something");
        post.data.buffers_mut().iter_mut().for_each(|buffer| hub.check_known(buffer));
        if let Some(message) = &mut post.message {
            assert!(!message.head.is_empty(), "a message has a head");
            hub.check_known(&mut message.head);
        }
        let at = state.rdma.qps.get_mut(&qp).expect("it is attached");
        check_pieces(&post, at.depths.send_pieces);
        if at.requests_out + post.requests() > at.depths.send {
            return Err(Box::new(Refused { post, error: None }));
        }
        at.requests_out += post.requests();
        at.reads_out += reads(&post);
        assert!(at.reads_out <= at.initiator_depth || at.life == Life::Failed, "more READs than were agreed");
        if at.life == Life::Failed {
            let work = Work::Posted { post, status: WorkStatus::Flushed };
            state.rdma.complete_later(qp, work, &mut state.rng, &mut state.agenda);
        } else {
            assert_eq!(at.life, Life::Connected, "work is posted on a connection that is not up");
            at.chains.push_back(post);
            state.rdma.start(qp, &mut state.rng, &mut state.agenda);
        }
        Ok(())
    }

    fn flush(&mut self) {}

    fn poll(&mut self, out: &mut Vec<Done>) -> io::Result<usize> {
        let mut state = self.sim.lock();
        let state = &mut *state;
        let most = 1 + state.rng.below(32) as usize;
        let mut count = 0;
        while count < most
            && let Some((qp, work)) = state.rdma.hubs.get_mut(&self.id).and_then(|hub| hub.cq.pop_front())
        {
            out.push(self.done(state, qp, work));
            count += 1;
        }
        Ok(count)
    }

    fn events(&mut self, out: &mut Vec<HubEvent>) -> io::Result<()> {
        let mut state = self.sim.lock();
        out.extend(state.rdma.hubs.get_mut(&self.id).expect("it is held").events.drain(..));
        Ok(())
    }

    fn arm(&mut self) -> io::Result<()> {
        let mut state = self.sim.lock();
        let hub = state.rdma.hubs.get_mut(&self.id).expect("it is held");
        assert!(hub.config.announce, "a hub that does not announce");
        hub.signalled = false;
        hub.armed = true;
        Ok(())
    }

    fn source(&self) -> Source {
        Source::Virtual(self.id)
    }

    fn expose(&mut self, data: Buffers) -> Result<ExposedId, (Buffers, io::Error)> {
        let mut state = self.sim.lock();
        let rdma = &mut state.rdma;
        let id = rdma.exposed.last_key_value().map_or(0, |(id, _)| id + 1);
        let (mut offset, mut remotes) = (0, Vec::new());
        for segment in data.segments().filter(|segment| !segment.is_empty()) {
            rdma.next_key += 1;
            let (key, bytes) = (rdma.next_key, segment.len() as u32);
            rdma.keys.insert(key, (id, offset, bytes));
            remotes.push(Remote { address: base_of(key), bytes, key });
            offset += bytes;
        }
        let keys = remotes.iter().map(|remote| remote.key).collect();
        rdma.exposed.insert(id, Exposed { hub: self.id, data, keys });
        self.lists.insert(id, remotes);
        Ok(ExposedId(id))
    }

    fn exposed(&self, id: ExposedId) -> &[Remote] {
        &self.lists[&id.0]
    }

    fn reclaim(&mut self, id: ExposedId) -> Buffers {
        self.lists.remove(&id.0);
        let mut state = self.sim.lock();
        let exposed = state.rdma.exposed.remove(&id.0).expect("it was reclaimed");
        for key in exposed.keys {
            state.rdma.keys.remove(&key);
        }
        exposed.data
    }
}

/// No request of the chain has more pieces than a request may have.
fn check_pieces(post: &Post, most: u32) {
    let mut at = post.start as usize;
    for transfer in &post.transfers {
        assert!(transfer.bytes > 0, "a transfer moves something");
        let (end, mut pieces) = (at + transfer.bytes as usize, 0);
        assert!(end <= post.data.len(), "transfers are longer than the data");
        while at < end {
            at += post.data.slice_at(at).len().min(end - at);
            pieces += 1;
        }
        assert!(pieces <= most, "{pieces} pieces in one request");
    }
}

impl Drop for SimHub {
    fn drop(&mut self) {
        let endpoints: Vec<usize> = {
            let state = self.sim.lock();
            let of = &state.rdma.hubs[&self.id].endpoints;
            of.iter().enumerate().filter_map(|(n, qp)| qp.map(|_| n)).collect()
        };
        for endpoint in endpoints {
            self.detach(EndpointId(endpoint), &mut drop);
        }
        let mut state = self.sim.lock();
        state.parks.forget(self.id);
        let hub = state.rdma.hubs.remove(&self.id);
        let (mine, others): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut state.rdma.exposed).into_iter().partition(|(_, exposed)| exposed.hub == self.id);
        state.rdma.exposed = others;
        for key in mine.values().flat_map(|exposed| &exposed.keys) {
            state.rdma.keys.remove(key);
        }
        drop(state);
        drop((hub, mine));
    }
}
