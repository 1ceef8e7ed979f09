//! NVMe/RDMA as the target's transport: the machine [`Queue`] on a [`Fabric`].
//!
//! Connection requests are read where the listener is; those that the specification has a reject for get it there. The others
//! go to the reactor that will own them, get a place on its hub, and are accepted.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use reactor::park::Ready;
use reactor::rdma::{ConnectParams, Done, Fabric, Limits, Link, Listener, Request, WorkStatus};
use reactor::reactor::WatchId;
use reactor::{BufferPool, Buffers, Context, Instant, PollerId};
use zerocopy::IntoBytes;

use super::capsule::{MAX_BLOCKS, SQE_BYTES};
use super::group::{Admission, At, HubOptions, RdmaGroup, SharedGroup};
use super::queue::{Config, Queue};
use crate::spec::Cqe;
use crate::spec::rdma::{AcceptData, ConnectRequest, Reject};
use crate::target::transport::{AbortOutcome, Acceptor, Event, Incoming, Life, Place, Qpair, Transport};
use crate::target::view::{ListenAddress, TransportKind, TransportOptions};

/// Connections that may wait to be accepted, unless `acceptor_backlog` says otherwise.
const BACKLOG: u32 = 100;
/// Segments of memory in one work request, where the device can have as many.
const SEND_PIECES: u32 = 16;
/// How often a response is sent again to a host without a receive: 7 is for ever, until the connection ends.
const RNR_RETRY_COUNT: u8 = 7;
/// The smallest buffer of a pool: what payload memory is cut into in the worst case.
const SMALLEST_SEGMENT_BYTES: u32 = 4096;

/// NVMe/RDMA over a fabric.
pub struct RdmaTransport {
    fabric: Arc<dyn Fabric>,
}

impl RdmaTransport {
    /// NVMe/RDMA over `fabric`.
    pub fn new(fabric: Arc<dyn Fabric>) -> RdmaTransport {
        RdmaTransport { fabric }
    }
}

/// What the options mean here.
#[derive(Clone, Copy, Debug)]
struct Settings {
    max_queue_depth: u32,
    max_aq_depth: u32,
    max_io_queues: u16,
    max_io_bytes: u32,
    invalidate: bool,
    backlog: u32,
    hub: HubOptions,
}

impl Settings {
    fn of(options: &TransportOptions) -> Settings {
        let number = |name: &str| options.extra.get(name).and_then(serde_json::Value::as_u64);
        let flag = |name: &str| options.extra.get(name).and_then(serde_json::Value::as_bool);
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        let shared = small(number("max_srq_depth").unwrap_or(4096));
        // Behind its entry, a capsule has data or a list of descriptors.
        let behind = (options.in_capsule_data_size).max(MAX_BLOCKS as u32 * 16);
        Settings {
            max_queue_depth: options.max_queue_depth.min(65534),
            max_aq_depth: options.max_aq_depth.min(65534),
            max_io_queues: options.max_io_qpairs_per_ctrlr,
            max_io_bytes: options.max_io_size,
            invalidate: flag("send_with_invalidate").unwrap_or(true),
            backlog: number("acceptor_backlog").map_or(BACKLOG, small),
            hub: HubOptions {
                completions: small(number("num_cqe").unwrap_or(4096)),
                shared_receives: if flag("no_srq").unwrap_or(false) { 0 } else { shared },
                receive_bytes: SQE_BYTES as u32 + behind,
            },
        }
    }

    /// Whether a host gets what it asks for.
    fn check(&self, request: &Request) -> Result<ConnectRequest, Reject> {
        let asked = ConnectRequest::parse(&request.private_data)?;
        if asked.qid > self.max_io_queues {
            return Err(Reject::Qid);
        }
        let most = if asked.qid == 0 { self.max_aq_depth } else { self.max_queue_depth };
        if asked.send_entries > most {
            return Err(Reject::Hsqsize);
        }
        let limits = request.link.limits();
        // Data of the host that is not in capsules is fetched with READs, which it has to answer.
        if request.params.initiator_depth == 0 || limits.initiator_depth == 0 {
            return Err(Reject::Ird);
        }
        // READs of the target's memory have no use; a device that could not answer any cannot promise them.
        if request.params.responder_resources > 0 && limits.responder_resources == 0 {
            return Err(Reject::Ord);
        }
        Ok(asked)
    }
}

/// Work requests that one command can take at most, its response included.
fn requests_of_one(max_io_bytes: u32, pieces: u32) -> u32 {
    MAX_BLOCKS as u32 + max_io_bytes.div_ceil(SMALLEST_SEGMENT_BYTES * pieces) + 1
}

impl Transport for RdmaTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Rdma
    }

    fn check(&self, _: &TransportOptions) -> io::Result<()> {
        self.fabric.devices().map(|_| ())
    }

    fn listen(&self, address: &ListenAddress, options: &TransportOptions) -> io::Result<Box<dyn Acceptor>> {
        let settings = Settings::of(options);
        let fabric = Arc::clone(&self.fabric);
        let listener = fabric.listen(address.socket_addr(), settings.backlog)?;
        let address = listener.local_addr();
        Ok(Box::new(RdmaAcceptor { fabric, listener: Some(listener), address, settings, watcher: None, watch: None }))
    }
}

struct RdmaAcceptor {
    fabric: Arc<dyn Fabric>,
    /// `None` while the device is away.
    listener: Option<Box<dyn Listener>>,
    address: SocketAddr,
    settings: Settings,
    /// Who watches, under which key.
    watcher: Option<(PollerId, u64)>,
    watch: Option<WatchId>,
}

impl RdmaAcceptor {
    /// A request that may become a queue pair; others are refused.
    fn consider(&self, request: Request) -> Option<Box<dyn Incoming>> {
        let peer = request.link.peer_addr();
        match self.settings.check(&request) {
            Ok(asked) => {
                let Request { link, params, .. } = request;
                Some(Box::new(RdmaIncoming { link, params, asked, settings: self.settings }))
            }
            Err(reject) => {
                tracing::warn!(%peer, why = reject.text(), "an RDMA connection was refused");
                refuse(request.link, reject);
                None
            }
        }
    }
}

fn refuse(link: Box<dyn Link>, reject: Reject) {
    // The host may have given up by itself.
    let _ = link.reject(reject.data().as_bytes());
}

impl Acceptor for RdmaAcceptor {
    fn accept(&mut self, cx: &mut Context, max: usize) -> Vec<Box<dyn Incoming>> {
        let mut arrived = Vec::new();
        if self.listener.is_none() {
            // The device is away still, or this was the last try.
            let Ok(listener) = self.fabric.listen(self.address, self.settings.backlog) else { return arrived };
            self.listener = Some(listener);
            if let Some((poller, key)) = self.watcher
                && let Err(error) = self.watch(cx, poller, key)
            {
                tracing::warn!(address = %self.address, %error, "the RDMA device is back and cannot be watched");
                self.listener = None;
                return arrived;
            }
            tracing::info!(address = %self.address, "listening over RDMA again");
        }
        while arrived.len() < max
            && let Some(listener) = &mut self.listener
        {
            match listener.next() {
                Ok(Some(request)) => arrived.extend(self.consider(request)),
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(address = %self.address, %error, "no connections over RDMA until the device is back");
                    self.close(cx);
                    self.listener = None;
                }
            }
        }
        arrived
    }

    fn wants_retry(&self) -> bool {
        self.listener.is_none()
    }

    fn watch(&mut self, cx: &mut Context, poller: PollerId, key: u64) -> io::Result<()> {
        self.watcher = Some((poller, key));
        if let Some(listener) = &self.listener {
            self.watch = Some(cx.watch(poller, listener.source(), key)?);
        }
        Ok(())
    }

    fn close(&mut self, cx: &mut Context) {
        if let Some(watch) = self.watch.take() {
            cx.unwatch(watch);
        }
    }
}

struct RdmaIncoming {
    link: Box<dyn Link>,
    params: ConnectParams,
    asked: ConnectRequest,
    settings: Settings,
}

impl RdmaIncoming {
    fn config(&self, limits: &Limits) -> io::Result<Config> {
        let Settings { max_io_bytes, invalidate, .. } = self.settings;
        let slots = u16::try_from(self.asked.send_entries).map_err(io::Error::other)?;
        let send_pieces = SEND_PIECES.min(limits.sge);
        if send_pieces == 0 || limits.qp_wr < 2 {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the RDMA device has no send queues of any use"));
        }
        let send_depth = 2 * u32::from(slots) + requests_of_one(max_io_bytes, send_pieces);
        Ok(Config {
            slots,
            max_io_bytes,
            send_depth: send_depth.min(limits.qp_wr),
            read_depth: self.params.initiator_depth.min(limits.initiator_depth).into(),
            send_pieces,
            invalidate: invalidate && limits.mem_mgt_extensions,
        })
    }
}

impl Incoming for RdmaIncoming {
    fn into_qpair(self: Box<Self>, place: &mut Place<'_>) -> io::Result<Box<dyn Qpair>> {
        let limits = self.link.limits();
        let (peer_addr, local_addr) = (self.link.peer_addr(), self.link.local_addr());
        let config = match self.config(&limits) {
            Ok(config) => config,
            Err(error) => {
                refuse(self.link, Reject::Resources);
                return Err(error);
            }
        };
        let admission = Admission {
            send_depth: config.send_depth,
            send_pieces: config.send_pieces,
            receives: config.slots.into(),
            heads: 2 * u32::from(config.slots),
            params: ConnectParams {
                responder_resources: self.params.responder_resources.min(limits.responder_resources),
                initiator_depth: config.read_depth as u8,
                rnr_retry_count: RNR_RETRY_COUNT,
            },
        };
        let accept = AcceptData::new(config.slots);
        let group = RdmaGroup::of(place);
        let admitted =
            group.borrow_mut().admit(place.cx, place.pool, self.link, self.settings.hub, admission, accept.as_bytes());
        let admitted = match admitted {
            Ok(admitted) => admitted,
            Err((link, error)) => {
                if let Some(link) = link {
                    refuse(link, Reject::Resources);
                }
                return Err(error);
            }
        };
        Ok(Box::new(RdmaQpair {
            at: admitted.at,
            queue: Queue::new(config, admitted.heads),
            group,
            inbox: VecDeque::new(),
            arrived: vec![Instant(0); config.slots.into()],
            answering: VecDeque::new(),
            blocked: false,
            ended: None,
            closed: false,
            peer_addr,
            local_addr,
        }))
    }

    fn peer_addr(&self) -> SocketAddr {
        self.link.peer_addr()
    }

    fn turn_away(self: Box<Self>) {
        refuse(self.link, Reject::Resources);
    }
}

struct RdmaQpair {
    group: Rc<RefCell<RdmaGroup>>,
    at: At,
    queue: Queue,
    inbox: VecDeque<Done>,
    /// When the command in each slot came.
    arrived: Vec<Instant>,
    /// When those came whose responses are on the way, which arrive in this order.
    answering: VecDeque<Instant>,
    /// What is to be posted waits for something to come back.
    blocked: bool,
    ended: Option<String>,
    closed: bool,
    peer_addr: SocketAddr,
    local_addr: SocketAddr,
}

impl RdmaQpair {
    fn take_in(&mut self, done: Done, pool: &mut BufferPool) {
        let fault = match done {
            // A receive that failed ends its queue pair in the group.
            Done::Received { buffer, bytes, status: WorkStatus::Success, .. } => {
                self.queue.receive(buffer, bytes, pool)
            }
            Done::Received { .. } => Ok(()),
            Done::Posted { user, data, head, status, .. } => {
                self.blocked = false;
                if head.is_some()
                    && let Some(arrived) = self.answering.pop_front()
                {
                    self.group.borrow_mut().count_request(self.at, arrived);
                }
                self.queue.done(user, data, head, status, pool)
            }
        };
        if let Err(fault) = fault {
            self.ended.get_or_insert_with(|| fault.to_string());
        }
    }

    fn return_spent(&mut self, group: &SharedGroup) {
        while let Some(buffer) = self.queue.take_spent() {
            group.borrow_mut().give_receive(self.at, buffer);
        }
    }
}

impl Qpair for RdmaQpair {
    fn receive(&mut self, pool: &mut BufferPool, events: &mut Vec<Event>) -> Life {
        let group = Rc::clone(&self.group);
        let (over, now) = {
            let mut group = group.borrow_mut();
            (group.take_inbox(self.at, &mut self.inbox), group.now())
        };
        let mut inbox = std::mem::take(&mut self.inbox);
        for done in inbox.drain(..) {
            self.take_in(done, pool);
        }
        self.inbox = inbox;
        self.queue.retry(pool);
        self.return_spent(&group);
        while let Some(event) = self.queue.poll_event(pool) {
            let (Event::Command { slot, .. } | Event::Rejected { slot, .. }) = &event;
            self.arrived[usize::from(*slot)] = now;
            events.push(event);
        }
        // What the host did wrong is told rather than that the connection has ended with it.
        match self.ended.clone().or(over) {
            Some(why) => Life::Ended(why),
            None => Life::Alive,
        }
    }

    #[inline]
    fn has_input(&self) -> bool {
        self.queue.stalled() || self.group.borrow().has_input(self.at)
    }

    fn peer_is_due(&self) -> bool {
        self.queue.reads_out() > 0
    }

    fn abort(&mut self, cid: u16) -> AbortOutcome {
        self.queue.abort(cid)
    }

    #[inline]
    fn complete(&mut self, slot: u16, cqe: Cqe, data: Option<Buffers>) {
        if self.closed {
            return;
        }
        self.answering.push_back(self.arrived[usize::from(slot)]);
        self.queue.complete(slot, cqe, data);
    }

    fn flush(&mut self, _: &mut BufferPool) -> Life {
        let mut group = self.group.borrow_mut();
        let mut posted = false;
        let life = loop {
            let Some(post) = self.queue.poll_post() else {
                // What is left waits for something to come back; what is completed later need not wait for that.
                self.blocked = self.queue.has_work();
                break Life::Alive;
            };
            match group.post(self.at, post) {
                Ok(()) => posted = true,
                Err(refused) => {
                    self.queue.put_back(refused.post);
                    self.blocked = true;
                    match refused.error {
                        // The device counts in another way; it has room when something has come back.
                        None => break Life::Alive,
                        Some(error) => break Life::Ended(format!("work cannot be posted: {error}")),
                    }
                }
            }
        };
        if posted {
            group.flush(self.at);
        }
        group.set_pending(self.at, self.queue.pending());
        life
    }

    #[inline]
    fn has_output(&self) -> bool {
        !self.blocked && self.queue.has_work()
    }

    fn ready(&mut self, _: Ready) {}

    fn connected(&mut self, queue_entries: u32, sq_flow_control_disabled: bool, io: bool) {
        self.queue.set_queue(queue_entries, !sq_flow_control_disabled, io);
    }

    fn watch(&mut self, _: &mut Context, _: PollerId, key: u64) -> io::Result<()> {
        self.group.borrow_mut().set_key(self.at, key);
        Ok(())
    }

    fn close(&mut self, _: &mut Context, pool: &mut BufferPool) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        self.queue.close(pool);
        let group = Rc::clone(&self.group);
        self.return_spent(&group);
        group.borrow_mut().close(self.at, self.queue.take_heads());
    }

    fn peer_addr(&self) -> SocketAddr {
        self.peer_addr
    }

    fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    fn leave(self: Box<Self>, _: &mut Context, _: &mut BufferPool) -> Result<Box<dyn Incoming>, Box<dyn Qpair>> {
        // It is bound to its hub's completion queue and receives, which are its reactor's.
        Err(self)
    }
}

impl Drop for RdmaQpair {
    fn drop(&mut self) {
        // A queue pair that never got as far as being closed: it could not be watched.
        if !self.closed
            && let Ok(mut group) = self.group.try_borrow_mut()
        {
            group.close(self.at, self.queue.take_heads());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_command_takes_fits_the_send_queue() {
        // 16 blocks of 8 KiB each, over segments of 4 KiB: two segments a request.
        assert!(requests_of_one(128 * 1024, 16) > 16 + 1);
        assert_eq!(requests_of_one(128 * 1024, 16), 16 + 2 + 1);
        assert_eq!(requests_of_one(1 << 20, 1), 16 + 256 + 1);
    }

    #[test]
    fn options_of_the_transport_are_taken_as_they_are_shown() {
        let mut options = TransportOptions { in_capsule_data_size: 0, ..TransportOptions::default() };
        let settings = Settings::of(&options);
        assert_eq!(settings.hub.receive_bytes, 64 + 256);
        assert_eq!((settings.hub.shared_receives, settings.invalidate, settings.backlog), (4096, true, BACKLOG));
        options.in_capsule_data_size = 4096;
        options.extra = [
            ("no_srq".to_owned(), true.into()),
            ("num_cqe".to_owned(), 100.into()),
            ("acceptor_backlog".to_owned(), 7.into()),
            ("send_with_invalidate".to_owned(), false.into()),
        ]
        .into();
        let settings = Settings::of(&options);
        assert_eq!(settings.hub, HubOptions { completions: 100, shared_receives: 0, receive_bytes: 64 + 4096 });
        assert_eq!((settings.invalidate, settings.backlog), (false, 7));
    }
}
