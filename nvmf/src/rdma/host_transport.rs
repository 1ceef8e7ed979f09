//! NVMe/RDMA as the host's transport: the sans-IO [`HostQueue`] over the seam [`reactor::rdma`].
//!
//! ```text
//! Resolving --device and route known--> Connecting --accepted--> Live --anything that ends it--> Ended
//! ```
//! The queue pairs of one reactor share the hubs of its devices ([`super::host_group`]).
//!
//! Memory that the controller reads and writes is exposed for the time of a command. The payload memory of the reactor is
//! registered once, so that costs nothing. Other payloads, and those in more stretches than the controller takes descriptors, are
//! copied through memory of the hub's own while it has some in one stretch; beyond that memory is registered for the command.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use reactor::park::{Ready, Source};
use reactor::rdma::{
    ConnectParams, Connecting, Done, ExposedId, Fabric, Link, LinkEvent, Message, Operation, Post, Refused, Remote,
    WorkStatus,
};
use reactor::{Buffer, Buffers, Context};
use smallvec::SmallVec;
use zerocopy::IntoBytes;

use super::capsule::{self, Block, MAX_BLOCKS, SQE_BYTES};
use super::host::{Carry, HostFault, HostQueue, Outgoing};
use super::host_group::{Admission, At, HostGroup, SharedGroup};
use crate::host::transport::{Completion, Connector, Payload, Qpair, QueueName, Transport};
use crate::spec::Sqe;
use crate::spec::rdma::{AcceptData, ConnectRequest, Reject};
use crate::target::view::TransportKind;

/// Bytes of a message that is sent: a command and as many descriptors as there can be.
pub(super) const CAPSULE_BYTES: usize = SQE_BYTES + MAX_BLOCKS * 16;
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
        // What a hub may have for it at once.
        let most = 2 * usize::from(slots) + 1;
        Ok(Box::new(RdmaQpair {
            address: self.address,
            name: queue,
            slots,
            stage: Stage::Resolving(Way::Own(connecting)),
            group: None,
            at: None,
            machine: HostQueue::new(slots),
            exposures: (0..slots).map(|_| None).collect(),
            heads: Vec::new(),
            inbox: VecDeque::with_capacity(most),
            events: VecDeque::with_capacity(4),
            send_pieces: 1,
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

/// How the device and the route are looked for.
enum Way {
    /// By the queue pair alone.
    Own(Box<dyn Connecting>),
    /// Watched by the group, under this number.
    Watched(usize),
}

enum Stage {
    Resolving(Way),
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

struct RdmaQpair {
    address: SocketAddr,
    name: QueueName,
    slots: u16,
    stage: Stage,
    /// What the reactor's queue pairs share, once it was looked for.
    group: Option<SharedGroup>,
    at: Option<At>,
    machine: HostQueue,
    exposures: Box<[Option<Exposure>]>,
    /// Memory for capsules that are not on their way.
    heads: Vec<Buffer>,
    /// Empty between calls, as the next.
    inbox: VecDeque<Done>,
    events: VecDeque<LinkEvent>,
    send_pieces: u32,
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
pub(super) fn widened(head: Buffer) -> Buffer {
    let mut list = Buffers::new();
    list.push(head);
    list.widen();
    list.drain().next().expect("it is still there")
}

impl RdmaQpair {
    /// Makes the queue pair on the device that leads to the controller, and asks to connect.
    fn attach(&mut self, group: &SharedGroup, cx: Option<&mut Context>, link: Box<dyn Link>) -> io::Result<()> {
        let limits = link.limits();
        let entries = u32::from(self.slots) + 1;
        self.send_pieces = limits.sge.min(MAX_SEND_PIECES);
        let request = ConnectRequest {
            qid: self.name.qid,
            send_entries: entries,
            receive_entries: entries,
            cntlid: (self.name.qid != 0).then_some(self.name.cntlid),
        };
        let params = ConnectParams {
            responder_resources: limits.responder_resources.min(MAX_READS),
            initiator_depth: 0,
            rnr_retry_count: 7,
        };
        let data = request.data();
        let private_data = data.as_bytes();
        let admission = Admission { slots: self.slots, send_pieces: self.send_pieces, params, private_data };
        let (at, heads) = group.borrow_mut().admit(cx, link, &admission)?;
        (self.at, self.heads, self.stage) = (Some(at), heads, Stage::Connecting);
        Ok(())
    }

    fn on_event(&mut self, event: LinkEvent) -> Result<(), String> {
        match event {
            LinkEvent::Established { private_data, .. } => {
                let receives = AcceptData::parse(&private_data).ok_or_else(|| HostFault::AcceptData.to_string())?;
                self.machine.established(receives).map_err(|fault| fault.to_string())?;
                self.stage = Stage::Live;
                Ok(())
            }
            LinkEvent::Rejected { reason, private_data } => Err(rejected(reason, &private_data)),
            LinkEvent::Failed { what } => Err(format!("cannot connect: {what}")),
            LinkEvent::Disconnected => Err("the controller closed the connection".into()),
            LinkEvent::DeviceRemoved => Err("the RDMA device was removed".into()),
        }
    }

    /// Takes in what the hub had for it: all of it, also when some of it is the end. The first reason for that, which of events
    /// is a better one than of work that failed.
    fn take_in(&mut self) -> Result<bool, String> {
        let mut outcome = Ok(!self.events.is_empty() || !self.inbox.is_empty());
        while let Some(event) = self.events.pop_front() {
            let heard = self.on_event(event);
            outcome = outcome.and_then(|busy| heard.map(|()| busy));
        }
        while let Some(done) = self.inbox.pop_front() {
            let heard = self.on_done(done);
            outcome = outcome.and_then(|busy| heard.map(|()| busy));
        }
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
                let heard = match buffer.get(..bytes as usize) {
                    _ if status != WorkStatus::Success => Err(format!("receiving a response failed: {status}")),
                    None => Err(HostFault::NoResponse(bytes as usize).to_string()),
                    Some(message) => self.machine.received(message, invalidated).map_err(|fault| fault.to_string()),
                };
                if let Ok(slot) = heard {
                    self.reclaim(slot);
                }
                let (Some(group), Some(at)) = (&self.group, self.at) else { return Ok(()) };
                let mut group = group.borrow_mut();
                match heard {
                    Ok(_) => group.post_receive(at, buffer),
                    Err(why) => {
                        group.keep_receive(at, buffer);
                        Err(why)
                    }
                }
            }
        }
    }

    /// Takes the memory of a command back that the controller could reach.
    fn reclaim(&mut self, slot: u16) {
        let Some(exposure) = self.exposures[usize::from(slot)].take() else { return };
        let (Some(group), Some(at)) = (&self.group, self.at) else { return };
        let mut group = group.borrow_mut();
        let exposed = group.hub(at).0.reclaim(exposure.id);
        let data = match exposure.own {
            Some(mut own) => {
                if !exposure.to_controller {
                    own.write_at(0, exposed.slice_at(0));
                }
                group.put_spare(at, exposed);
                own
            }
            None => exposed,
        };
        self.machine.data_back(slot, data);
    }

    /// Exposes the data of a command and writes its capsule, of which it says the bytes.
    fn write_keyed(
        &mut self,
        (group, at): (&mut HostGroup, At),
        slot: u16,
        sqe: Sqe,
        to_controller: bool,
        mut data: Buffers,
        head: &mut Buffer,
    ) -> Result<usize, String> {
        let most = self.machine.max_blocks();
        let scattered = data.segment_count() > most && !contiguous(&data, most);
        let mut own = None;
        if scattered || !group.knows(at, &mut data) {
            let spare = group.spare(at, data.len());
            if let Some(mut whole) = spare.or_else(|| scattered.then(|| Buffers::heap(data.len()))) {
                let mut offset = 0;
                for segment in data.segments().filter(|_| to_controller) {
                    whole.write_at(offset, segment);
                    offset += segment.len();
                }
                own = Some(std::mem::replace(&mut data, whole));
            }
        }
        let hub = group.hub(at).0;
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
                match own {
                    Some(own) => {
                        group.put_spare(at, data);
                        self.machine.data_back(slot, own);
                    }
                    None => self.machine.data_back(slot, data),
                }
                Err(format!("memory cannot be exposed to the controller: {error}; raise the memlock limit (ulimit -l)"))
            }
        }
    }

    fn post(&mut self, group: &mut HostGroup, at: At, outgoing: Outgoing, mut head: Buffer) -> Result<(), String> {
        let Outgoing { slot, sqe, carry, mut data } = outgoing;
        let mut in_capsule = Buffers::new();
        let written = match carry {
            Carry::Nothing => Ok(capsule::write(sqe, &[], &mut head)),
            // The device gathers a message from so many pieces, and not more.
            Carry::InCapsule if data.segment_count() < self.send_pieces as usize && group.knows(at, &mut data) => {
                let len = capsule::write_with_data(sqe, data.len() as u32, &mut head);
                in_capsule = data;
                Ok(len)
            }
            Carry::InCapsule => self.write_keyed((group, at), slot, sqe, true, data, &mut head),
            Carry::Keyed { to_controller } => self.write_keyed((group, at), slot, sqe, to_controller, data, &mut head),
        };
        let len = match written {
            Ok(len) => len,
            Err(why) => {
                self.heads.push(head);
                return Err(why);
            }
        };
        let with_data = !in_capsule.is_empty();
        let message = Message { operation: Operation::Send, head: shortened(head, len), with_data };
        let post = Post { user: slot.into(), data: in_capsule, message: Some(message), ..Post::default() };
        let (hub, endpoint) = group.hub(at);
        match hub.post(endpoint, post) {
            Ok(()) => Ok(()),
            Err(refused) => {
                let Refused { post, error } = *refused;
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

    /// Goes on with finding the device.
    fn find(&mut self, group: &SharedGroup, mut cx: Option<&mut Context>) -> Result<(), String> {
        let address = self.address;
        let no_way = |error: io::Error| format!("no way to {address} over RDMA: {error}");
        let mut found = None;
        match std::mem::replace(&mut self.stage, Stage::Ended) {
            Stage::Resolving(way) => {
                let way = match (way, cx.as_deref_mut()) {
                    (Way::Own(connecting), Some(cx)) if group.borrow().is_watched() => {
                        Way::Watched(group.borrow_mut().resolve(cx, connecting).map_err(no_way)?)
                    }
                    (way, _) => way,
                };
                let polled = match way {
                    Way::Own(mut connecting) => {
                        let polled = connecting.poll();
                        self.stage = Stage::Resolving(Way::Own(connecting));
                        polled
                    }
                    Way::Watched(index) => {
                        let polled = group.borrow_mut().way(index);
                        self.stage = Stage::Resolving(Way::Watched(index));
                        polled
                    }
                };
                found = polled.map_err(no_way)?;
            }
            stage => self.stage = stage,
        }
        let Some(link) = found else { return Ok(()) };
        self.let_go_of_the_way(group);
        let made = self.attach(group, cx, link);
        made.map_err(|error| format!("a queue pair to {address} cannot be made: {error}"))
    }

    /// Nothing is looked for any more.
    fn let_go_of_the_way(&mut self, group: &SharedGroup) {
        if let Stage::Resolving(Way::Watched(index)) = std::mem::replace(&mut self.stage, Stage::Ended) {
            group.borrow_mut().abandon(index);
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

    fn prepare(&mut self, mut cx: Option<&mut Context>) -> Result<(), String> {
        let group = self.group.get_or_insert_with(|| HostGroup::of(cx.as_deref_mut())).clone();
        self.find(&group, cx)
    }

    fn poll(&mut self, done: &mut Vec<Completion>) -> Result<bool, String> {
        if matches!(self.stage, Stage::Ended) {
            return Err("the queue pair has ended".into());
        }
        // What is not made yet is made by `prepare`, which is told of the reactor.
        let (Some(group), Some(at)) = (self.group.clone(), self.at) else { return Ok(false) };
        let ready = self.is_ready();
        let lives = group.borrow_mut().poll(at, !ready, &mut self.inbox, &mut self.events);
        let mut heard = self.take_in();
        if heard.is_err() {
            // The reason why work fails is an event, as a rule, and that may come after it.
            let _ = group.borrow_mut().poll(at, true, &mut self.inbox, &mut self.events);
            heard = self.take_in().and(heard);
        }
        let mut busy = heard?;
        lives?;
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
        let (Some(group), Some(at)) = (self.group.clone(), self.at) else { return Ok(()) };
        let mut group = group.borrow_mut();
        let mut outcome = Ok(());
        while outcome.is_ok() {
            // There is memory for a capsule whenever there is a slot, and room too; nothing is lost should that not be so.
            let (hub, endpoint) = group.hub(at);
            if hub.room(endpoint) == 0 || self.heads.is_empty() {
                break;
            }
            let Some(outgoing) = self.machine.next_command() else { break };
            let head = self.heads.pop().expect("there is one");
            outcome = self.post(&mut group, at, outgoing, head);
        }
        group.hub(at).0.flush();
        outcome
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
        if let Some(group) = self.group.clone() {
            self.let_go_of_the_way(&group);
        }
        self.stage = Stage::Ended;
        debug_assert!(self.inbox.is_empty(), "all that came was taken in");
        if let (Some(group), Some(at)) = (&self.group, self.at) {
            let (machine, heads) = (&mut self.machine, std::mem::take(&mut self.heads));
            group.borrow_mut().close(at, heads, &mut |user, data| machine.data_back(user as u16, data));
            // Nothing reaches the memory any more.
            for slot in 0..self.slots {
                self.reclaim(slot);
            }
        }
        (self.at, self.group) = (None, None);
        self.machine.drain(lost);
    }

    fn is_watchable(&self) -> bool {
        false
    }

    fn is_announced(&self) -> bool {
        self.group.as_ref().is_some_and(|group| group.borrow().is_watched())
    }

    fn source(&self) -> Source {
        panic!("the group of its reactor is watched instead")
    }

    fn set_watched(&mut self) {}

    fn ready(&mut self, _ready: Ready) {}

    #[inline]
    fn has_work(&self) -> bool {
        let (Some(group), at) = (&self.group, self.at) else { return true };
        match (&self.stage, at) {
            (Stage::Resolving(Way::Watched(index)), _) => group.borrow().has_way(*index),
            (_, Some(at)) => self.machine.wants_output() || group.borrow().has_input(at),
            _ => true,
        }
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
