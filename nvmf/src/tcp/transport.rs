//! NVMe/TCP as the target's transport: the sans-IO [`Connection`] on a stream of the reactor.
//!
//! One receive a poll and queue pair: into the place that the machine wants its data in, and behind that into a scratch
//! area that all connections of a thread share. What the machine cannot take yet (it waits for memory, or for output to
//! leave) is kept in the queue pair's own stash, and nothing more is received until that is gone; so the stash is never
//! longer than the scratch area.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::sync::Arc;

use reactor::net::{Address, Listener, Network, Stream};
use reactor::park::Ready;
use reactor::reactor::WatchId;
use reactor::{BufferPool, Buffers, Context, PollerId};

use super::connection::{self, ADMIN_IN_CAPSULE_BYTES, AbortOutcome as Found, Connection, Fault, Need, PeerDue};
use crate::spec::Cqe;
use crate::target::transport::{AbortOutcome, Acceptor, Event, Incoming, Life, Place, Qpair, Transport, off_pool};
use crate::target::view::{ListenAddress, TransportKind, TransportOptions};

/// Bytes that one receive takes at most, besides data that lands in its place.
pub(crate) const SCRATCH_BYTES: usize = 512 * 1024;
/// Slices gathered into one send.
const SEND_SLICES: usize = 512;
/// The same for sends of at most [`SMALL_SEND_BYTES`].
const SMALL_SEND_SLICES: usize = 16;
const SMALL_SEND_BYTES: usize = 16 * 1024;
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 512;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH_BYTES]);
}

/// The address of a socket of this transport, which opens none but those of TCP.
fn of_tcp(address: &Address) -> SocketAddr {
    address.ip().expect("a TCP socket has an address and a port")
}

/// NVMe/TCP over a platform's sockets.
pub struct TcpTransport {
    network: Arc<dyn Network>,
}

impl TcpTransport {
    /// NVMe/TCP over `network`.
    pub fn new(network: Arc<dyn Network>) -> TcpTransport {
        TcpTransport { network }
    }
}

impl Transport for TcpTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn listen(&self, address: &ListenAddress, options: &TransportOptions) -> io::Result<Box<dyn Acceptor>> {
        let listener = self.network.listen(address.socket_addr(), BACKLOG)?;
        let config = config(options);
        Ok(Box::new(TcpAcceptor { listener, config, failed: false, watch: None }))
    }
}

fn config(options: &TransportOptions) -> connection::Config {
    let slots = options.max_queue_depth.max(options.max_aq_depth);
    connection::Config {
        slots: u16::try_from(slots).unwrap_or(u16::MAX - 1).min(u16::MAX - 1),
        max_io_bytes: options.max_io_size,
        in_capsule_bytes: options.in_capsule_data_size,
        maxh2cdata: options.max_io_size.max(4096),
        ..connection::Config::default()
    }
}

/// The most memory that one queue pair holds, beside payloads and what it has received and not taken.
pub(crate) fn queue_bytes(options: &TransportOptions) -> usize {
    size_of::<TcpQpair>() + config(options).memory_bytes()
}

struct TcpAcceptor {
    listener: Box<dyn Listener>,
    config: connection::Config,
    /// The last connection could not be accepted and still waits.
    failed: bool,
    watch: Option<WatchId>,
}

impl Acceptor for TcpAcceptor {
    fn accept(&mut self, _: &mut Context, max: usize) -> Vec<Box<dyn Incoming>> {
        self.failed = false;
        let mut arrived: Vec<Box<dyn Incoming>> = Vec::new();
        while arrived.len() < max {
            match self.listener.accept() {
                Ok(stream) => arrived.push(Box::new(TcpIncoming { stream, config: self.config })),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    tracing::warn!(address = %self.listener.local_addr(), %error, "a connection cannot be accepted");
                    self.failed = true;
                    break;
                }
            }
        }
        arrived
    }

    fn wants_retry(&self) -> bool {
        self.failed
    }

    fn watch(&mut self, cx: &mut Context, poller: PollerId, key: u64) -> io::Result<()> {
        self.watch = Some(cx.watch(poller, self.listener.source(), key)?);
        Ok(())
    }

    fn close(&mut self, cx: &mut Context) {
        if let Some(watch) = self.watch.take() {
            cx.unwatch(watch);
        }
    }
}

struct TcpIncoming {
    stream: Box<dyn Stream>,
    config: connection::Config,
}

impl Incoming for TcpIncoming {
    fn into_qpair(self: Box<Self>, _: &mut Place<'_>) -> io::Result<Box<dyn Qpair>> {
        Ok(Box::new(TcpQpair {
            stream: self.stream,
            connection: Connection::new(self.config),
            in_capsule_bytes: self.config.in_capsule_bytes.max(ADMIN_IN_CAPSULE_BYTES) as usize,
            stash: VecDeque::new(),
            readable: true,
            ended: false,
            writable: true,
            fault: None,
            terminated: false,
            said_farewell: false,
            watch: None,
        }))
    }

    fn peer_addr(&self) -> SocketAddr {
        of_tcp(&self.stream.peer_addr())
    }
}

/// A queue pair between two reactors: watched by none, without memory of either's.
struct TcpMoving(TcpQpair);

impl Incoming for TcpMoving {
    fn into_qpair(self: Box<Self>, _: &mut Place<'_>) -> io::Result<Box<dyn Qpair>> {
        // What was announced to the other reactor, or to nobody since, has to be looked for.
        Ok(Box::new(TcpQpair { readable: true, writable: true, ..self.0 }))
    }

    fn peer_addr(&self) -> SocketAddr {
        self.0.peer_addr()
    }
}

struct TcpQpair {
    stream: Box<dyn Stream>,
    connection: Connection,
    in_capsule_bytes: usize,
    /// Received and not yet taken by the machine.
    stash: VecDeque<u8>,
    readable: bool,
    /// The end of the host's stream has been announced, which happens once.
    ended: bool,
    writable: bool,
    /// The connection is over once the host has closed it: what is sent now is the last, what is received is discarded.
    /// Closing with unread input would reset the connection, and the host might never read why.
    fault: Option<String>,
    /// The host ended it: there is nothing to tell it, and nothing to wait for.
    terminated: bool,
    /// The farewell has left and this side's end of the stream is closed.
    said_farewell: bool,
    watch: Option<WatchId>,
}

/// Memory for the machine, keeping one capsule's worth back where [`Need`] says so.
fn alloc(pool: &mut BufferPool, len: u32, need: Need, keep: usize) -> Option<Buffers> {
    let list = pool.alloc(len as usize)?;
    if need == Need::HostData && !pool.has_free(keep) {
        pool.put(list);
        return None;
    }
    Some(list)
}

impl TcpQpair {
    /// Gives `bytes` to the machine; returns how many it took.
    fn feed(&mut self, bytes: &[u8], pool: &mut BufferPool) -> usize {
        let keep = self.in_capsule_bytes;
        match self.connection.handle_input(bytes, &mut |len, need| alloc(pool, len, need, keep)) {
            Ok(taken) => taken,
            Err(fault) => {
                tracing::warn!(peer = %self.stream.peer_addr(), %fault, "a connection ends");
                self.terminated |= matches!(fault, Fault::Host { .. });
                self.fault = Some(fault.to_string());
                bytes.len()
            }
        }
    }

    fn feed_stash(&mut self, pool: &mut BufferPool) {
        let mut stash = std::mem::take(&mut self.stash);
        let taken = self.feed(stash.make_contiguous(), pool);
        stash.drain(..taken);
        if stash.is_empty() {
            // Memory for what could not be taken is only held while there is something.
            stash = VecDeque::new();
        }
        self.stash = stash;
    }

    /// One receive. `Err` ends the connection.
    fn receive_once(&mut self, scratch: &mut [u8], pool: &mut BufferPool) -> Result<(), String> {
        let direct = self.connection.read_target();
        let direct_len = direct.as_ref().map_or(0, |target| target.len());
        let asked = direct_len + scratch.len();
        let received = match direct {
            Some(target) => self.stream.recv(&mut [IoSliceMut::new(target), IoSliceMut::new(scratch)]),
            None => self.stream.recv(&mut [IoSliceMut::new(scratch)]),
        };
        let n = match received {
            Ok(0) => return Err("the host closed the connection".into()),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return Ok(());
            }
            Err(error) => return Err(format!("receiving failed: {error}")),
        };
        // A short count means that the socket is empty, and the next bytes will be announced; but the end behind these
        // bytes may have been announced with them.
        self.readable = n == asked || self.ended;
        let direct_taken = n.min(direct_len);
        if direct_taken > 0 {
            self.connection.read_done(direct_taken);
        }
        let rest = &scratch[..n - direct_taken];
        let taken = if rest.is_empty() { 0 } else { self.feed(rest, pool) };
        self.stash.extend(&rest[taken..]);
        Ok(())
    }

    /// One gathered send of at most `N` slices.
    fn send_once<const N: usize>(&mut self, pool: &mut BufferPool) -> io::Result<()> {
        let mut slices = [IoSlice::new(&[]); N];
        let count = self.connection.poll_output(&mut slices);
        let offered: usize = slices[..count].iter().map(|slice| slice.len()).sum();
        match self.stream.send(&slices[..count]) {
            Ok(n) => {
                self.writable = n == offered;
                self.connection.sent(n, &mut |list| pool.put(list));
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.writable = false;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn collect(&mut self, events: &mut Vec<Event>) {
        while let Some(event) = self.connection.poll_event() {
            events.push(match event {
                connection::Event::Command { slot, seq, sqe, data } => Event::Command { slot, seq, sqe, data },
                connection::Event::Rejected { slot, seq, sqe, status } => Event::Rejected { slot, seq, sqe, status },
            });
        }
    }
}

impl Qpair for TcpQpair {
    fn receive(&mut self, pool: &mut BufferPool, events: &mut Vec<Event>) -> Life {
        if self.connection.stalled() {
            let keep = self.in_capsule_bytes;
            self.connection.retry_alloc(&mut |len, need| alloc(pool, len, need, keep));
        }
        if !self.stash.is_empty() && self.connection.wants_input() {
            self.feed_stash(pool);
        }
        let mut life = Life::Alive;
        if self.stash.is_empty() && self.readable && self.connection.wants_input() {
            let received = SCRATCH.with_borrow_mut(|scratch| self.receive_once(scratch, pool));
            if let Err(why) = received {
                life = Life::Ended(self.fault.clone().unwrap_or(why));
            }
        }
        self.collect(events);
        match &self.fault {
            Some(why) if self.terminated => Life::Ended(why.clone()),
            _ => life,
        }
    }

    #[inline]
    fn has_input(&self) -> bool {
        self.readable && self.connection.wants_input() || !self.stash.is_empty() || self.connection.stalled()
    }

    fn peer_is_due(&self) -> bool {
        self.connection.peer_due() != PeerDue::Nothing
    }

    fn abort(&mut self, cid: u16) -> AbortOutcome {
        match self.connection.abort(cid) {
            Found::NotFound => AbortOutcome::NotFound,
            Found::Undelivered => AbortOutcome::Undelivered,
            Found::Executing(slot) => AbortOutcome::Executing(slot),
        }
    }

    #[inline]
    fn complete(&mut self, slot: u16, cqe: Cqe, data: Option<Buffers>) {
        self.connection.complete(slot, cqe, data);
    }

    fn flush(&mut self, pool: &mut BufferPool) -> Life {
        while self.writable && self.connection.wants_output() {
            // The array is cleared each time: a short one for what a shallow queue sends.
            let sent = match self.connection.pending_output_bytes() <= SMALL_SEND_BYTES {
                true => self.send_once::<SMALL_SEND_SLICES>(pool),
                false => self.send_once::<SEND_SLICES>(pool),
            };
            if let Err(error) = sent {
                return Life::Ended(format!("sending failed: {error}"));
            }
        }
        if self.fault.is_some() && !self.connection.wants_output() && !self.said_farewell {
            self.said_farewell = true;
            self.stream.shutdown_write();
        }
        Life::Alive
    }

    #[inline]
    fn has_output(&self) -> bool {
        self.writable && (self.connection.wants_output() || self.fault.is_some() && !self.said_farewell)
    }

    fn ready(&mut self, ready: Ready) {
        self.readable |= ready.readable;
        self.writable |= ready.writable;
        self.ended |= ready.ended;
    }

    fn connected(&mut self, queue_entries: u32, sq_flow_control_disabled: bool, io: bool) {
        self.connection.set_queue(queue_entries, !sq_flow_control_disabled, io);
    }

    fn watch(&mut self, cx: &mut Context, poller: PollerId, key: u64) -> io::Result<()> {
        self.watch = Some(cx.watch(poller, self.stream.source(), key)?);
        Ok(())
    }

    fn close(&mut self, cx: &mut Context, pool: &mut BufferPool) {
        if let Some(watch) = self.watch.take() {
            cx.unwatch(watch);
        }
        self.connection.close(&mut |list| pool.put(list));
        self.stash = VecDeque::new();
        self.stream.shutdown_write();
    }

    fn peer_addr(&self) -> SocketAddr {
        of_tcp(&self.stream.peer_addr())
    }

    fn local_addr(&self) -> SocketAddr {
        of_tcp(&self.stream.local_addr())
    }

    fn is_movable(&self) -> bool {
        true
    }

    fn may_leave(&self) -> bool {
        self.fault.is_none() && !self.connection.wants_output()
    }

    fn leave(
        mut self: Box<Self>,
        cx: &mut Context,
        pool: &mut BufferPool,
    ) -> Result<Box<dyn Incoming>, Box<dyn Qpair>> {
        if !self.may_leave() {
            return Err(self);
        }
        if let Some(watch) = self.watch.take() {
            cx.unwatch(watch);
        }
        self.connection.replace_memory(&mut |data| off_pool(data, pool));
        Ok(Box::new(TcpMoving(*self)))
    }
}
