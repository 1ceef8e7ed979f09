//! A network of stream sockets: delay, segments, finite buffers, resets, ends of stream, silence.
//!
//! What is sent arrives in order, in segments of random length after random delays. Each direction holds at most `buffer`
//! bytes that the receiver has not read; a sender beyond that gets a short count or `WouldBlock`, and an edge once there
//! is room again, as on Linux. An end that is closed with unread bytes, or that gets bytes after it was closed, resets the
//! connection.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use bdev::conformance::Rng;
use reactor::net::{Address, Listener, Network, Stream};
use reactor::park::Source;

use crate::park::Parks;
use crate::sim::{Agenda, Event, Sim, State};
use crate::trace;

const ECONNRESET: i32 = 104;
const EPIPE: i32 = 32;
const ECONNREFUSED: i32 = 111;
const EMFILE: i32 = 24;
const EADDRINUSE: i32 = 98;

/// How the network behaves.
#[derive(Clone, Copy, Debug)]
pub struct NetRules {
    /// Delay of a segment in nanoseconds, from and to.
    pub delay_ns: (u64, u64),
    /// Bytes in a segment, from and to.
    pub segment: (u64, u64),
    /// Bytes that one direction holds, from and to; drawn once a connection.
    pub buffer: (u64, u64),
    /// One segment in so many resets its connection; 0: none.
    pub reset_one_in: u64,
    /// One accept in so many finds the process out of descriptors; 0: none.
    pub out_of_descriptors_one_in: u64,
}

impl Default for NetRules {
    fn default() -> NetRules {
        NetRules {
            delay_ns: (2_000, 400_000),
            segment: (1, 70_000),
            buffer: (2_000, 300_000),
            reset_one_in: 0,
            out_of_descriptors_one_in: 0,
        }
    }
}

pub(crate) enum NetEvent {
    /// A connection request reaches the listener.
    Syn {
        client: u64,
    },
    /// The listener's answer reaches the client.
    Connected {
        client: u64,
    },
    Arrive {
        end: u64,
        bytes: Vec<u8>,
    },
    Fin {
        end: u64,
    },
    Failed {
        end: u64,
        errno: i32,
    },
    Room {
        end: u64,
    },
}

struct End {
    peer: u64,
    local: Address,
    remote: Address,
    /// Bytes that the direction towards this end holds at most.
    capacity: usize,
    unread: VecDeque<u8>,
    /// Bytes on their way to this end.
    in_flight: usize,
    last_arrival: u64,
    connected: bool,
    eof: bool,
    errno: Option<i32>,
    /// This end was refused room, and is to be told of it.
    wants_room: bool,
    shut: bool,
    /// Nothing sent from this end arrives any more.
    silent: bool,
    /// Somebody holds it.
    open: bool,
    /// It waits in a listener's queue.
    queued: bool,
}

struct Listening {
    addr: Address,
    backlog: usize,
    queue: VecDeque<u64>,
}

#[derive(Default)]
pub(crate) struct Net {
    pub(crate) rules: NetRules,
    next: u64,
    next_port: u16,
    ends: BTreeMap<u64, End>,
    listeners: BTreeMap<u64, Listening>,
    /// Connections that were attempted, and when.
    pub(crate) attempts: Vec<(u64, Address)>,
}

impl Net {
    fn draw(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn delay(&self, rng: &mut Rng) -> u64 {
        State::skewed(rng, self.rules.delay_ns)
    }

    pub(crate) fn open_ends(&self) -> usize {
        self.ends.values().filter(|end| end.open).count() + self.listeners.len()
    }

    /// Readable, writable and ended, as epoll would say.
    pub(crate) fn readiness(&self, source: u64) -> (bool, bool, bool) {
        if let Some(listening) = self.listeners.get(&source) {
            return (!listening.queue.is_empty(), false, false);
        }
        let Some(end) = self.ends.get(&source) else { return (false, false, false) };
        let failed = end.errno.is_some();
        let readable = !end.unread.is_empty() || end.eof || failed;
        let writable = failed || end.connected && !end.shut && self.room_towards(end.peer) > 0;
        (readable, writable, failed || end.eof)
    }

    fn room_towards(&self, end: u64) -> usize {
        // A peer that is gone takes everything, and answers with a reset.
        self.ends.get(&end).map_or(usize::MAX, |e| e.capacity.saturating_sub(e.unread.len() + e.in_flight))
    }

    pub(crate) fn happen(&mut self, event: NetEvent, rng: &mut Rng, agenda: &mut Agenda, parks: &mut Parks) {
        match event {
            NetEvent::Syn { client } => self.syn(client, rng, agenda, parks),
            NetEvent::Connected { client } => {
                if let Some(end) = self.ends.get_mut(&client) {
                    end.connected = true;
                    parks.edge(client);
                }
            }
            NetEvent::Arrive { end, bytes } => self.arrive(end, bytes, rng, agenda, parks),
            NetEvent::Fin { end } => {
                trace::event("fin", end, 0, 0);
                if let Some(at) = self.ends.get_mut(&end) {
                    at.eof = true;
                    parks.edge(end);
                }
                self.forget_pair(end);
            }
            NetEvent::Failed { end, errno } => {
                trace::event("reset", end, errno as u64, 0);
                if let Some(at) = self.ends.get_mut(&end) {
                    at.errno.get_or_insert(errno);
                    at.unread.clear();
                    parks.edge(end);
                }
                self.forget_pair(end);
            }
            NetEvent::Room { end } => parks.edge(end),
        }
    }

    fn arrive(&mut self, end: u64, bytes: Vec<u8>, rng: &mut Rng, agenda: &mut Agenda, parks: &mut Parks) {
        let reset = self.rules.reset_one_in > 0 && rng.one_in(self.rules.reset_one_in);
        let delay = self.delay(rng);
        let Some(at) = self.ends.get_mut(&end) else { return };
        at.in_flight -= bytes.len();
        let peer = at.peer;
        if at.errno.is_some() {
            return;
        }
        if !at.open && !at.queued {
            // It was closed: the sender is told.
            agenda.after(delay, Event::Net(NetEvent::Failed { end: peer, errno: ECONNRESET }));
            return;
        }
        trace::event("arrive", end, bytes.len() as u64, 0);
        at.unread.extend(bytes);
        parks.edge(end);
        if reset {
            self.break_pair(end, rng, agenda);
        }
    }

    fn syn(&mut self, client: u64, rng: &mut Rng, agenda: &mut Agenda, parks: &mut Parks) {
        let Some(ends) = self.ends.get(&client).map(|end| (end.remote.clone(), end.local.clone())) else { return };
        let (wanted, from) = ends;
        let reaches = |addr: &Address| match (addr, &wanted) {
            (Address::Ip(addr), Address::Ip(wanted)) => {
                addr.port() == wanted.port() && (addr.ip() == wanted.ip() || addr.ip().is_unspecified())
            }
            (addr, wanted) => addr == wanted,
        };
        let found = self.listeners.iter().find(|(_, listening)| reaches(&listening.addr)).map(|(id, _)| *id);
        let delay = self.delay(rng);
        let Some(listener) = found.filter(|id| self.listeners[id].queue.len() < self.listeners[id].backlog) else {
            agenda.after(delay, Event::Net(NetEvent::Failed { end: client, errno: ECONNREFUSED }));
            return;
        };
        let server = self.draw();
        let capacity = State::skewed(rng, self.rules.buffer) as usize;
        let end = End { connected: true, queued: true, open: false, ..End::new(client, wanted, from, capacity) };
        self.ends.insert(server, end);
        self.ends.get_mut(&client).expect("it was just seen").peer = server;
        self.listeners.get_mut(&listener).expect("it was just found").queue.push_back(server);
        trace::event("connect", client, server, 0);
        parks.edge(listener);
        agenda.after(delay, Event::Net(NetEvent::Connected { client }));
    }

    /// Both ends of a connection fail; what is on its way is lost.
    fn break_pair(&mut self, end: u64, rng: &mut Rng, agenda: &mut Agenda) {
        let Some(peer) = self.ends.get(&end).map(|e| e.peer) else { return };
        for end in [end, peer] {
            agenda.after(rng.below(1_000_000), Event::Net(NetEvent::Failed { end, errno: ECONNRESET }));
        }
    }

    fn established(&self) -> Vec<u64> {
        let up = |(id, end): (&u64, &End)| (end.connected && end.errno.is_none() && *id < end.peer).then_some(*id);
        self.ends.iter().filter_map(up).collect()
    }

    pub(crate) fn break_some(&mut self, count: usize, rng: &mut Rng, agenda: &mut Agenda) -> usize {
        let mut up = self.established();
        let count = count.min(up.len());
        for _ in 0..count {
            let end = up.swap_remove(rng.below(up.len() as u64) as usize);
            self.break_pair(end, rng, agenda);
        }
        count
    }

    pub(crate) fn silence_some(&mut self, rng: &mut Rng) -> usize {
        let mut count = 0;
        for end in self.established() {
            if rng.one_in(2) {
                let peer = self.ends[&end].peer;
                for id in [end, peer] {
                    if let Some(at) = self.ends.get_mut(&id) {
                        at.silent = true;
                    }
                }
                trace::event("silence", end, peer, 0);
                count += 1;
            }
        }
        count
    }

    /// Forgets a connection that nobody holds any more.
    fn forget_pair(&mut self, end: u64) {
        let Some(peer) = self.ends.get(&end).map(|e| e.peer) else { return };
        let unused = |id| self.ends.get(&id).is_none_or(|e: &End| !e.open && !e.queued && e.in_flight == 0);
        if unused(end) && unused(peer) {
            self.ends.remove(&end);
            self.ends.remove(&peer);
        }
    }

    fn send(&mut self, id: u64, bufs: &[IoSlice<'_>], rng: &mut Rng, agenda: &mut Agenda) -> io::Result<usize> {
        let end = self.ends.get(&id).expect("it is held");
        if let Some(errno) = end.errno {
            return Err(io::Error::from_raw_os_error(errno));
        }
        if end.shut {
            return Err(io::Error::from_raw_os_error(EPIPE));
        }
        if !end.connected {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let (peer, silent) = (end.peer, end.silent);
        let total: usize = bufs.iter().map(|buf| buf.len()).sum();
        let count = total.min(self.room_towards(peer));
        if count < total {
            self.ends.get_mut(&id).expect("it is held").wants_room = true;
        }
        if count == 0 && total > 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut bytes = Vec::with_capacity(count);
        for buf in bufs {
            bytes.extend_from_slice(&buf[..buf.len().min(count - bytes.len())]);
        }
        trace::event("send", id, count as u64, total as u64);
        while !bytes.is_empty() {
            let segment = (State::skewed(rng, self.rules.segment) as usize).clamp(1, bytes.len());
            let rest = bytes.split_off(segment);
            let arrival = agenda.now + self.delay(rng);
            let Some(to) = self.ends.get_mut(&peer) else { break };
            to.in_flight += segment;
            to.last_arrival = to.last_arrival.max(arrival);
            if !silent {
                agenda.at(to.last_arrival, Event::Net(NetEvent::Arrive { end: peer, bytes }));
            }
            bytes = rest;
        }
        Ok(count)
    }

    fn recv(&mut self, id: u64, bufs: &mut [IoSliceMut<'_>], rng: &mut Rng, agenda: &mut Agenda) -> io::Result<usize> {
        let delay = self.delay(rng);
        let end = self.ends.get_mut(&id).expect("it is held");
        let mut count = 0;
        for buf in bufs.iter_mut() {
            let n = buf.len().min(end.unread.len());
            for (to, from) in buf.iter_mut().zip(end.unread.drain(..n)) {
                *to = from;
            }
            count += n;
        }
        if count == 0 && bufs.iter().any(|buf| !buf.is_empty()) {
            if let Some(errno) = end.errno {
                return Err(io::Error::from_raw_os_error(errno));
            }
            if !end.eof {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            return Ok(0);
        }
        trace::event("recv", id, count as u64, end.unread.len() as u64);
        let (peer, room) = (end.peer, end.capacity.saturating_sub(end.unread.len() + end.in_flight));
        let enough = room >= end.capacity / 3;
        if let Some(sender) = self.ends.get_mut(&peer)
            && sender.wants_room
            && enough
        {
            sender.wants_room = false;
            agenda.after(delay, Event::Net(NetEvent::Room { end: peer }));
        }
        Ok(count)
    }

    /// What this end sends is over.
    fn finish(&mut self, id: u64, event: NetEvent, rng: &mut Rng, agenda: &mut Agenda) {
        let Some(end) = self.ends.get_mut(&id) else { return };
        if std::mem::replace(&mut end.shut, true) && matches!(event, NetEvent::Fin { .. }) || end.silent {
            return;
        }
        let peer = end.peer;
        let arrival = agenda.now + self.delay(rng);
        if let Some(to) = self.ends.get_mut(&peer) {
            to.last_arrival = to.last_arrival.max(arrival);
            agenda.at(to.last_arrival, Event::Net(event));
        }
    }

    fn close(&mut self, id: u64, rng: &mut Rng, agenda: &mut Agenda) {
        let Some(end) = self.ends.get_mut(&id) else { return };
        trace::event("close", id, end.unread.len() as u64, 0);
        end.open = false;
        end.queued = false;
        let peer = end.peer;
        let event = if std::mem::take(&mut end.unread).is_empty() {
            NetEvent::Fin { end: peer }
        } else {
            NetEvent::Failed { end: peer, errno: ECONNRESET }
        };
        self.finish(id, event, rng, agenda);
        self.forget_pair(id);
    }
}

impl End {
    fn new(peer: u64, local: Address, remote: Address, capacity: usize) -> End {
        End {
            peer,
            local,
            remote,
            capacity: capacity.max(1),
            unread: VecDeque::new(),
            in_flight: 0,
            last_arrival: 0,
            connected: false,
            eof: false,
            errno: None,
            wants_room: false,
            shut: false,
            silent: false,
            open: true,
            queued: false,
        }
    }
}

/// Sockets of a simulated machine. Hosts are on the same network, under other addresses.
#[derive(Clone, Debug)]
pub struct SimNetwork(Arc<Sim>);

impl SimNetwork {
    /// The network of `sim`.
    pub fn new(sim: &Arc<Sim>) -> SimNetwork {
        SimNetwork(Arc::clone(sim))
    }
}

impl Network for SimNetwork {
    fn listen_at(&self, at: &Address, backlog: u32) -> io::Result<Box<dyn Listener>> {
        let mut state = self.0.lock();
        let net = &mut state.net;
        let mut addr = at.clone();
        if let Address::Ip(addr) = &mut addr
            && addr.port() == 0
        {
            net.next_port += 1;
            addr.set_port(40_000 + net.next_port);
        }
        let covers = |a: IpAddr, b: IpAddr| a == b || a.is_unspecified() && a.is_ipv4() == b.is_ipv4();
        let clash = |other: &Address| match (other, &addr) {
            (Address::Ip(other), Address::Ip(addr)) => {
                other.port() == addr.port() && (covers(other.ip(), addr.ip()) || covers(addr.ip(), other.ip()))
            }
            (other, addr) => other == addr,
        };
        if net.listeners.values().any(|listening| clash(&listening.addr)) {
            return Err(io::Error::from_raw_os_error(EADDRINUSE));
        }
        let id = net.draw();
        trace::event("listen", id, addr.ip().map_or(0, |addr| addr.port()).into(), 0);
        let listening = Listening { addr: addr.clone(), backlog: backlog.max(1) as usize, queue: VecDeque::new() };
        net.listeners.insert(id, listening);
        Ok(Box::new(SimListener { sim: Arc::clone(&self.0), id, addr }))
    }

    fn connect_to(&self, to: &Address) -> io::Result<Box<dyn Stream>> {
        let mut state = self.0.lock();
        let state = &mut *state;
        let id = state.net.draw();
        let local = match to {
            Address::Ip(_) => SocketAddr::new(IpAddr::from([10, 0, 0, 1]), 10_000 + (id % 50_000) as u16).into(),
            Address::Unix(_) => Address::Unix(PathBuf::new()),
        };
        let capacity = State::skewed(&mut state.rng, state.net.rules.buffer) as usize;
        state.net.ends.insert(id, End::new(0, local.clone(), to.clone(), capacity));
        state.net.attempts.push((state.agenda.now, to.clone()));
        let delay = state.net.delay(&mut state.rng);
        state.agenda.after(delay, Event::Net(NetEvent::Syn { client: id }));
        Ok(Box::new(SimStream { sim: Arc::clone(&self.0), id, local, remote: to.clone() }))
    }
}

struct SimListener {
    sim: Arc<Sim>,
    id: u64,
    addr: Address,
}

impl Listener for SimListener {
    fn accept(&mut self) -> io::Result<Box<dyn Stream>> {
        let mut state = self.sim.lock();
        let state = &mut *state;
        let one_in = state.net.rules.out_of_descriptors_one_in;
        let listening = state.net.listeners.get_mut(&self.id).expect("it is held");
        if listening.queue.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if one_in > 0 && state.rng.one_in(one_in) {
            trace::event("out of descriptors", self.id, 0, 0);
            return Err(io::Error::from_raw_os_error(EMFILE));
        }
        let id = listening.queue.pop_front().expect("it was just seen");
        trace::event("accept", self.id, id, 0);
        let end = state.net.ends.get_mut(&id).expect("queued connections are kept");
        end.open = true;
        end.queued = false;
        let (local, remote) = (end.local.clone(), end.remote.clone());
        Ok(Box::new(SimStream { sim: Arc::clone(&self.sim), id, local, remote }))
    }

    fn local_addr(&self) -> Address {
        self.addr.clone()
    }

    fn source(&self) -> Source {
        Source::Virtual(self.id)
    }
}

/// A source must not be watched any more when it is closed.
fn check_unwatched(sim: &Sim, state: &mut State, id: u64) {
    let watched = state.parks.is_watched(id);
    state.parks.forget(id);
    assert!(sim.is_off() || std::thread::panicking() || !watched, "source {id} is closed while it is watched");
}

impl Drop for SimListener {
    fn drop(&mut self) {
        let mut state = self.sim.lock();
        let state = &mut *state;
        check_unwatched(&self.sim, state, self.id);
        trace::event("unlisten", self.id, 0, 0);
        let Some(listening) = state.net.listeners.remove(&self.id) else { return };
        for id in listening.queue {
            if let Some(end) = state.net.ends.get_mut(&id) {
                // A queued connection is refused with a reset, whatever it has sent.
                end.unread.push_back(0);
            }
            state.net.close(id, &mut state.rng, &mut state.agenda);
        }
    }
}

struct SimStream {
    sim: Arc<Sim>,
    id: u64,
    local: Address,
    remote: Address,
}

impl Stream for SimStream {
    fn recv(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut state = self.sim.lock();
        let state = &mut *state;
        state.net.recv(self.id, bufs, &mut state.rng, &mut state.agenda)
    }

    fn send(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut state = self.sim.lock();
        let state = &mut *state;
        state.net.send(self.id, bufs, &mut state.rng, &mut state.agenda)
    }

    fn source(&self) -> Source {
        Source::Virtual(self.id)
    }

    fn peer_addr(&self) -> Address {
        self.remote.clone()
    }

    fn local_addr(&self) -> Address {
        self.local.clone()
    }

    fn shutdown_write(&mut self) {
        let mut state = self.sim.lock();
        let state = &mut *state;
        let Some(peer) = state.net.ends.get(&self.id).map(|end| end.peer) else { return };
        state.net.finish(self.id, NetEvent::Fin { end: peer }, &mut state.rng, &mut state.agenda);
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        let mut state = self.sim.lock();
        let state = &mut *state;
        check_unwatched(&self.sim, state, self.id);
        state.net.close(self.id, &mut state.rng, &mut state.agenda);
    }
}
