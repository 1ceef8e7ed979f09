//! NVMe/RDMA as the host's transport: the sans-IO [`HostQueue`] over the seam [`reactor::rdma`].
//!
//! ```text
//! Resolving --device and route known--> Connecting --accepted--> Live --anything that ends it--> Ended
//! ```
//! Each queue pair has a hub of its own, so that it can be watched on its own and ends with all that belongs to it.
//!
//! Memory that the controller reads and writes is exposed for the time of a command. That of a pool which was registered when
//! the queue pair was made ([`Qpair::prepare`]) costs nothing then; other memory is registered for the time. A payload in more
//! stretches than the controller takes descriptors goes through memory in one stretch, which is a copy.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use reactor::buffer::Region;
use reactor::park::{Ready, Source};
use reactor::rdma::{
    ConnectParams, Connecting, Done, EndpointId, ExposedId, Fabric, Hub, HubConfig, HubEvent, Link, LinkEvent, Message,
    Operation, Post, QueueDepths, Remote, WorkStatus,
};
use reactor::{Buffer, BufferPool, Buffers};
use smallvec::SmallVec;
use zerocopy::IntoBytes;

use super::capsule::{self, Block, MAX_BLOCKS, RESPONSE_BYTES, SQE_BYTES};
use super::host::{Carry, HostFault, HostQueue, Outgoing};
use crate::host::transport::{Completion, Connector, Payload, Qpair, QueueName, Transport};
use crate::spec::Sqe;
use crate::spec::rdma::{AcceptData, ConnectRequest, Reject};
use crate::target::view::TransportKind;

/// Bytes of a message that is sent: a command and as many descriptors as there can be.
const CAPSULE_BYTES: usize = SQE_BYTES + MAX_BLOCKS * 16;
/// READs of the controller that this side answers at once, if the device can.
const MAX_READS: u8 = 16;
/// Time for each of resolving the address and the route, in milliseconds.
const RESOLVE_MS: u32 = 3000;
/// InfiniBand's reason of a reject when nobody listens.
const INVALID_SERVICE_ID: i32 = 8;
/// Pieces of memory in one message: the entry, and data in the capsule.
const MAX_SEND_PIECES: u32 = 4;

/// NVMe/RDMA over the devices of a machine.
pub struct RdmaHost {
    /// Where devices are.
    pub fabric: Arc<dyn Fabric>,
}

impl Transport for RdmaHost {
    fn kind(&self) -> TransportKind {
        TransportKind::Rdma
    }

    fn check(&self) -> io::Result<()> {
        self.fabric.devices().map(|_| ())
    }

    fn connector(&self, address: SocketAddr, _: (bool, bool)) -> Arc<dyn Connector> {
        Arc::new(RdmaConnector { fabric: Arc::clone(&self.fabric), address })
    }
}

/// Makes NVMe/RDMA queue pairs to one address.
pub struct RdmaConnector {
    /// Where devices are.
    pub fabric: Arc<dyn Fabric>,
    /// The controller's address.
    pub address: SocketAddr,
}

impl Connector for RdmaConnector {
    fn connect(&self, slots: u16, queue: QueueName) -> io::Result<Box<dyn Qpair>> {
        let connecting = self.fabric.connect(self.address, RESOLVE_MS)?;
        Ok(Box::new(RdmaQpair {
            address: self.address,
            name: queue,
            slots,
            stage: Stage::Resolving(connecting),
            hub: None,
            machine: HostQueue::new(slots),
            exposures: (0..slots).map(|_| None).collect(),
            heads: Vec::new(),
            work: Vec::new(),
            events: Vec::new(),
            send_pieces: 1,
            pool: None,
            watched: false,
            announced: true,
            looks: 0,
        }))
    }

    fn admin_in_capsule_bytes(&self) -> u32 {
        // The capsules of the admin queue are as long as an entry (RDMA 3.3.1).
        0
    }
}

impl fmt::Debug for RdmaConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RdmaConnector({})", self.address)
    }
}

enum Stage {
    Resolving(Box<dyn Connecting>),
    Connecting,
    Live,
    Ended,
}

/// Memory of a command that the controller can reach.
struct Exposure {
    id: ExposedId,
    /// The command's own data, if what is exposed stands in for it.
    own: Option<Buffers>,
    to_controller: bool,
}

struct Attached {
    hub: Box<dyn Hub>,
    endpoint: EndpointId,
}

struct RdmaQpair {
    address: SocketAddr,
    name: QueueName,
    slots: u16,
    stage: Stage,
    hub: Option<Attached>,
    machine: HostQueue,
    exposures: Box<[Option<Exposure>]>,
    /// Memory for capsules that are not on their way.
    heads: Vec<Buffer>,
    work: Vec<Done>,
    events: Vec<HubEvent>,
    send_pieces: u32,
    /// Memory that the hub knows, so that it may be part of a message.
    pool: Option<Region>,
    watched: bool,
    /// Something was announced, or nothing has to be: there may be work. False only while a completion is armed for.
    announced: bool,
    /// Polls since events were looked for, of a live queue pair that is not watched.
    looks: u8,
}

/// What a reject means.
fn rejected(reason: i32, private_data: &[u8]) -> String {
    match (Reject::parse(private_data), reason) {
        (_, INVALID_SERVICE_ID) => "connection refused: no NVMe/RDMA controller listens there".into(),
        (Some(reject), _) => format!("the controller refuses the queue pair: {}", reject.text()),
        (None, reason) => format!("the controller refuses the queue pair, reason {reason}"),
    }
}

/// Stretches in order, with neighbours made one.
fn blocks(remotes: &[Remote]) -> SmallVec<[Block; MAX_BLOCKS]> {
    let mut out: SmallVec<[Block; MAX_BLOCKS]> = SmallVec::new();
    for remote in remotes {
        match out.last_mut() {
            Some(last) if last.key == remote.key && last.address + u64::from(last.len) == remote.address => {
                last.len += remote.bytes;
            }
            _ => out.push(Block { address: remote.address, len: remote.bytes, key: remote.key }),
        }
    }
    out
}

/// The first `len` bytes of a buffer for one message.
fn shortened(head: Buffer, len: usize) -> Buffer {
    let mut list = Buffers::new();
    list.push(head);
    list.truncate(len);
    list.drain().next().expect("it is still there")
}

/// All of a buffer again.
fn widened(head: Buffer) -> Buffer {
    let mut list = Buffers::new();
    list.push(head);
    list.widen();
    list.drain().next().expect("it is still there")
}

impl RdmaQpair {
    /// Makes the queue pair on the device that leads to the controller, and asks to connect.
    fn attach(&mut self, link: Box<dyn Link>, pool: Option<&BufferPool>) -> io::Result<()> {
        let limits = link.limits();
        let slots = u32::from(self.slots);
        // One more than can be outstanding, as a queue has one entry more than commands.
        let receives = slots + 1;
        let config = HubConfig { completions: 2 * receives, shared_receives: 0, announce: true };
        let mut hub = link.hub(config)?;
        if let Some(pool) = pool {
            hub.register(pool, true)?;
            self.pool = Some(pool.region());
        }
        self.heads = hub.messages(self.slots.into(), CAPSULE_BYTES)?;
        let responses = hub.messages(receives as usize, RESPONSE_BYTES)?;
        self.send_pieces = limits.sge.min(MAX_SEND_PIECES);
        let depths = QueueDepths { send: slots, receive: receives, send_pieces: self.send_pieces };
        let endpoint = hub.attach(link, depths)?;
        // From here on the endpoint has to be detached, whatever happens.
        self.hub = Some(Attached { hub, endpoint });
        let Attached { hub, .. } = self.hub.as_mut().expect("it was just put there");
        for response in responses {
            hub.post_receive(Some(endpoint), response).map_err(|(_, error)| error)?;
        }
        let request = ConnectRequest {
            qid: self.name.qid,
            send_entries: receives,
            receive_entries: receives,
            cntlid: (self.name.qid != 0).then_some(self.name.cntlid),
        };
        let params = ConnectParams {
            responder_resources: limits.responder_resources.min(MAX_READS),
            initiator_depth: 0,
            rnr_retry_count: 7,
        };
        hub.connect(endpoint, params, request.data().as_bytes())?;
        self.stage = Stage::Connecting;
        Ok(())
    }

    /// Events cost calls of the kernel: where nobody announces them, a live queue pair looks seldom.
    fn is_time_for_events(&mut self) -> bool {
        self.looks = self.looks.wrapping_add(1);
        self.announced && (self.watched || !self.is_ready() || self.looks == 0)
    }

    fn take_events(&mut self) -> Result<bool, String> {
        let Some(Attached { hub, .. }) = &mut self.hub else { return Ok(false) };
        let mut events = std::mem::take(&mut self.events);
        let result = hub.events(&mut events).map_err(|error| format!("the RDMA device fails: {error}"));
        let mut outcome = result.map(|()| !events.is_empty());
        for event in events.drain(..) {
            let heard = self.on_event(event);
            if outcome.is_ok()
                && let Err(why) = heard
            {
                outcome = Err(why);
            }
        }
        self.events = events;
        outcome
    }

    fn on_event(&mut self, event: HubEvent) -> Result<(), String> {
        match event {
            HubEvent::Link(_, LinkEvent::Established { private_data, .. }) => {
                let receives = AcceptData::parse(&private_data).ok_or_else(|| HostFault::AcceptData.to_string())?;
                self.machine.established(receives).map_err(|fault| fault.to_string())?;
                self.stage = Stage::Live;
                Ok(())
            }
            HubEvent::Link(_, LinkEvent::Rejected { reason, private_data }) => Err(rejected(reason, &private_data)),
            HubEvent::Link(_, LinkEvent::Failed { what }) => Err(format!("cannot connect: {what}")),
            HubEvent::Link(_, LinkEvent::Disconnected) => Err("the controller closed the connection".into()),
            HubEvent::Link(_, LinkEvent::DeviceRemoved) => Err("the RDMA device was removed".into()),
            HubEvent::Failed(_, why) => Err(format!("the queue pair failed: {why}")),
            HubEvent::DeviceLost(why) => Err(why),
            HubEvent::Port { port, active } => {
                tracing::info!(port, active, "a port of the RDMA device changed");
                Ok(())
            }
        }
    }

    /// Looks at the device's work once; whether anything was done.
    fn take_work(&mut self) -> Result<bool, String> {
        let Some(Attached { hub, .. }) = &mut self.hub else { return Ok(false) };
        let mut work = std::mem::take(&mut self.work);
        let polled = hub.poll(&mut work).map_err(|error| format!("the RDMA device fails: {error}"));
        let mut outcome = polled.map(|count| count > 0);
        for done in work.drain(..) {
            let heard = self.on_done(done);
            if outcome.is_ok()
                && let Err(why) = heard
            {
                outcome = Err(why);
            }
        }
        self.work = work;
        outcome
    }

    fn on_done(&mut self, done: Done) -> Result<(), String> {
        match done {
            Done::Posted { user, data, head, status, .. } => {
                let slot = user as u16;
                self.heads.extend(head.map(widened));
                if !data.is_empty() {
                    self.machine.data_back(slot, data);
                }
                if status != WorkStatus::Success {
                    return Err(format!("sending a command failed: {status}"));
                }
                self.machine.sent(slot);
                Ok(())
            }
            Done::Received { buffer, bytes, invalidated, status, .. } => {
                if status != WorkStatus::Success {
                    return Err(format!("receiving a response failed: {status}"));
                }
                let Some(message) = buffer.get(..bytes as usize) else {
                    return Err(HostFault::NoResponse(bytes as usize).to_string());
                };
                let slot = self.machine.received(message, invalidated).map_err(|fault| fault.to_string())?;
                self.reclaim(slot);
                let Some(Attached { hub, endpoint }) = &mut self.hub else { return Ok(()) };
                let posted = hub.post_receive(Some(*endpoint), buffer);
                posted.map_err(|(_, error)| format!("a receive cannot be posted: {error}"))
            }
        }
    }

    /// Takes the memory of a command back that the controller could reach.
    fn reclaim(&mut self, slot: u16) {
        let Some(exposure) = self.exposures[usize::from(slot)].take() else { return };
        let Some(Attached { hub, .. }) = &mut self.hub else { return };
        let exposed = hub.reclaim(exposure.id);
        let data = match exposure.own {
            Some(mut own) => {
                if !exposure.to_controller {
                    own.write_at(0, exposed.slice_at(0));
                }
                own
            }
            None => exposed,
        };
        self.machine.data_back(slot, data);
    }

    /// Exposes the data of a command and writes its capsule, of which it says the bytes.
    fn write_keyed(
        &mut self,
        slot: u16,
        sqe: Sqe,
        to_controller: bool,
        mut data: Buffers,
        head: &mut Buffer,
    ) -> Result<usize, String> {
        let most = self.machine.max_blocks();
        let attached = self.hub.as_mut().expect("commands are posted on a queue pair");
        let hub = &mut attached.hub;
        let mut own = None;
        if data.segment_count() > most && !contiguous(&data, most) {
            let mut whole = Buffers::heap(data.len());
            if to_controller {
                let mut at = 0;
                for segment in data.segments() {
                    whole.write_at(at, segment);
                    at += segment.len();
                }
            }
            own = Some(std::mem::replace(&mut data, whole));
        }
        match hub.expose(data) {
            Ok(id) => {
                let blocks = blocks(hub.exposed(id));
                self.exposures[usize::from(slot)] = Some(Exposure { id, own, to_controller });
                if blocks.len() > most {
                    // Neighbours in memory under different keys: that does not happen with memory of one pool.
                    return Err("the memory of a command is in more stretches than the controller takes".into());
                }
                Ok(capsule::write(sqe, &blocks, head))
            }
            Err((data, error)) => {
                self.machine.data_back(slot, own.unwrap_or(data));
                Err(format!("memory cannot be exposed to the controller: {error}; raise the memlock limit (ulimit -l)"))
            }
        }
    }

    /// Whether this may be part of a message, and need not be exposed.
    fn knows(&self, data: &mut Buffers) -> bool {
        self.pool.is_some_and(|pool| data.buffers_mut().iter().all(|buffer| buffer.in_region(&pool)))
    }

    fn post(&mut self, outgoing: Outgoing, head: Buffer) -> Result<(), String> {
        let Outgoing { slot, sqe, carry, mut data } = outgoing;
        let mut head = head;
        let mut in_capsule = Buffers::new();
        let len = match carry {
            Carry::Nothing => capsule::write(sqe, &[], &mut head),
            // The device gathers a message from so many pieces, and not more.
            Carry::InCapsule if data.segment_count() < self.send_pieces as usize && self.knows(&mut data) => {
                let len = capsule::write_with_data(sqe, data.len() as u32, &mut head);
                in_capsule = data;
                len
            }
            Carry::InCapsule => self.write_keyed(slot, sqe, true, data, &mut head)?,
            Carry::Keyed { to_controller } => self.write_keyed(slot, sqe, to_controller, data, &mut head)?,
        };
        let with_data = !in_capsule.is_empty();
        let message = Message { operation: Operation::Send, head: shortened(head, len), with_data };
        let post = Post { user: slot.into(), data: in_capsule, message: Some(message), ..Post::default() };
        let Attached { hub, endpoint } = self.hub.as_mut().expect("commands are posted on a queue pair");
        match hub.post(*endpoint, post) {
            Ok(()) => Ok(()),
            Err(refused) => {
                let reactor::rdma::Refused { post, error } = *refused;
                self.heads.extend(post.message.map(|message| widened(message.head)));
                if !post.data.is_empty() {
                    self.machine.data_back(slot, post.data);
                }
                Err(error.map_or_else(
                    || "the send queue is full".into(),
                    |error| format!("a command cannot be sent: {error}"),
                ))
            }
        }
    }

    fn set_up(&mut self, pool: Option<&BufferPool>) -> Result<bool, String> {
        let Stage::Resolving(connecting) = &mut self.stage else { return Ok(false) };
        match connecting.poll() {
            Ok(None) => Ok(false),
            Ok(Some(link)) => {
                let address = self.address;
                self.attach(link, pool)
                    .map_err(|error| format!("a queue pair to {address} cannot be made: {error}"))?;
                Ok(true)
            }
            Err(error) => Err(format!("no way to {} over RDMA: {error}", self.address)),
        }
    }
}

/// Whether the segments are at most `most` stretches of memory.
fn contiguous(data: &Buffers, most: usize) -> bool {
    let (mut stretches, mut end) = (0, std::ptr::null());
    for segment in data.segments() {
        let range = segment.as_ptr_range();
        stretches += usize::from(range.start != end);
        end = range.end;
    }
    stretches <= most
}

impl Qpair for RdmaQpair {
    fn is_ready(&self) -> bool {
        self.machine.is_ready()
    }

    #[inline]
    fn can_submit(&self) -> bool {
        self.machine.can_submit()
    }

    fn can_submit_pair(&self) -> bool {
        self.machine.can_submit_pair()
    }

    #[inline]
    fn submit(&mut self, user: u64, sqe: Sqe, payload: Payload, data: Buffers) {
        self.machine.submit(user, sqe, payload, data);
    }

    fn prepare(&mut self, pool: Option<&BufferPool>) -> Result<(), String> {
        self.set_up(pool).map(|_| ())
    }

    fn poll(&mut self, done: &mut Vec<Completion>) -> Result<bool, String> {
        if matches!(self.stage, Stage::Ended) {
            return Err("the queue pair has ended".into());
        }
        // What is not made yet is made by `prepare`, which is told of the memory.
        let mut busy = false;
        if self.is_time_for_events() {
            busy |= self.take_events()?;
        }
        let worked = self.take_work();
        if worked.is_err() {
            // The reason why work fails is an event, as a rule.
            self.take_events()?;
        }
        busy |= worked?;
        if busy || !self.watched {
            self.announced = true;
        } else if self.announced
            && let Some(Attached { hub, .. }) = &mut self.hub
        {
            hub.arm().map_err(|error| format!("the RDMA device fails: {error}"))?;
            // What came before that is not announced.
            self.announced = self.take_work()?;
            busy |= self.announced;
        }
        while let Some(completion) = self.machine.poll_completion() {
            busy = true;
            done.push(completion);
        }
        Ok(busy)
    }

    fn flush(&mut self) -> Result<(), String> {
        if !self.machine.wants_output() {
            return Ok(());
        }
        while let Some(Attached { hub, endpoint }) = &self.hub {
            // There is memory for a capsule whenever there is a slot, and room too; nothing is lost should that not be so.
            if hub.room(*endpoint) == 0 || self.heads.is_empty() {
                break;
            }
            let Some(outgoing) = self.machine.next_command() else { break };
            let head = self.heads.pop().expect("there is one");
            self.post(outgoing, head)?;
        }
        if let Some(Attached { hub, .. }) = &mut self.hub {
            hub.flush();
        }
        Ok(())
    }

    fn outstanding(&self) -> usize {
        self.machine.outstanding()
    }

    fn cid_of(&self, user: u64) -> Option<u16> {
        self.machine.cid_of(user)
    }

    fn set_in_capsule_bytes(&mut self, bytes: u32) {
        self.machine.set_in_capsule_bytes(bytes);
    }

    fn set_descriptors(&mut self, most: u8) {
        self.machine.set_descriptors(most);
    }

    fn close(&mut self, lost: &mut dyn FnMut(u64, Buffers)) {
        self.stage = Stage::Ended;
        if let Some(Attached { hub, endpoint }) = &mut self.hub {
            let machine = &mut self.machine;
            hub.disconnect(*endpoint);
            hub.detach(*endpoint, &mut |done| {
                if let Done::Posted { user, data, .. } = done
                    && !data.is_empty()
                {
                    machine.data_back(user as u16, data);
                }
            });
        }
        for slot in 0..self.slots {
            self.reclaim(slot);
        }
        self.hub = None;
        self.heads.clear();
        self.machine.drain(lost);
    }

    fn is_watchable(&self) -> bool {
        self.hub.is_some()
    }

    fn source(&self) -> Source {
        match (&self.hub, &self.stage) {
            (Some(attached), _) => attached.hub.source(),
            (None, Stage::Resolving(connecting)) => connecting.source(),
            _ => panic!("a queue pair that has ended is not watched"),
        }
    }

    fn set_watched(&mut self) {
        self.watched = true;
    }

    fn ready(&mut self, _ready: Ready) {
        self.announced = true;
    }

    #[inline]
    fn has_work(&self) -> bool {
        self.announced || self.machine.wants_output()
    }
}

impl Drop for RdmaQpair {
    fn drop(&mut self) {
        self.close(&mut |_, _| {});
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_in_words() {
        for reject in Reject::ALL {
            let told = rejected(28, reject.data().as_bytes());
            assert!(told.contains(reject.text()), "{told}");
        }
        assert!(rejected(INVALID_SERVICE_ID, &[]).contains("refused"));
        assert!(rejected(28, &[9; 3]).contains("reason 28"));
    }

    #[test]
    fn neighbours_under_one_key_are_one_stretch() {
        let remote = |address, bytes, key| Remote { address, bytes, key };
        let found =
            blocks(&[remote(0x1000, 0x1000, 1), remote(0x2000, 512, 1), remote(0x2200, 512, 2), remote(0x9000, 1, 2)]);
        let block = |address, len, key| Block { address, len, key };
        assert_eq!(found.to_vec(), [block(0x1000, 0x1200, 1), block(0x2200, 512, 2), block(0x9000, 1, 2)]);
        assert!(blocks(&[]).is_empty());
    }

    #[test]
    fn memory_of_capsules_is_as_long_as_before_after_its_use() {
        let head = shortened(Buffer::heap(CAPSULE_BYTES), SQE_BYTES);
        assert_eq!(head.len(), SQE_BYTES);
        assert_eq!(widened(head).len(), CAPSULE_BYTES);
    }

    #[test]
    fn stretches_of_memory_are_counted_as_they_lie() {
        let mut apart = Buffers::heap(4096);
        apart.push(Buffer::heap(4096));
        apart.push(Buffer::heap(4096));
        assert!(contiguous(&apart, 3) && contiguous(&Buffers::heap(9), 1) && contiguous(&Buffers::new(), 0));
        let whole = apart.segments().zip(apart.segments().skip(1)).all(|(a, b)| a.as_ptr_range().end == b.as_ptr());
        assert_eq!(contiguous(&apart, 1), whole);
    }
}
