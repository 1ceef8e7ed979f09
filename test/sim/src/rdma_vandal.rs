//! Hosts over RDMA that misbehave: each does one deed on connections of its own, and knows how the target has to take it.
//!
//! They are written against the seam [`reactor::rdma`] alone, as scripts that wait: in the simulator a [`Gang`] of them
//! works beside honest hosts; the example `rdma_vandal` does the same deeds over real devices.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bdev::conformance::Rng;
use nvmf::rdma::capsule::{MAX_BLOCKS, RESPONSE_BYTES, SQE_BYTES};
use nvmf::spec::fabrics::ConnectData;
use nvmf::spec::opcode::admin;
use nvmf::spec::rdma::{ConnectRequest, Reject, RequestData};
use nvmf::spec::sqe::{Sgl, SglDescriptor};
use nvmf::spec::{Cqe, Sqe, Status};
use nvmf::tcp::wire_client::{self, with_descriptor};
use reactor::rdma::{
    ConnectParams, Done, EndpointId, ExposedId, Fabric, Hub, HubConfig, HubEvent, LinkEvent, Message, Operation, Post,
    QueueDepths, Remote, WorkStatus,
};
use reactor::{Buffer, Buffers, Clock, Instant, Progress};
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::host::host_nqn;
use crate::rdma::{SimFabric, with_len};
use crate::trace;
use crate::world::{Actor, WorldView};

/// Time that the target may take to answer, or to end what it has to end.
const PATIENCE: Duration = Duration::from_secs(180);
const ENTRIES: u16 = 32;
/// Longer than what any target posts.
const CAPSULE_BYTES: usize = 32 * 1024;
/// Longest data of one command.
const DATA_BYTES: usize = 64 * 1024;
const CC: u32 = 0x14;
const CSTS: u32 = 0x1c;
const CC_ENABLE: u32 = 0x0046_0001;
/// A key that nobody made: devices give keys out one after another, or at random.
const NO_KEY: u32 = 0xdead_0bad;
/// No namespace has as many blocks.
const NOWHERE: u64 = 1 << 60;

/// One thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// Asks for what is refused with this reason.
    Refused(Reject),
    /// Is gone before the target has answered the connection request.
    GoesWhileConnecting,
    /// Is gone after it was accepted.
    GoesWhenConnected,
    /// Says nothing, until the target has enough of it.
    Silence,
    /// A message that is shorter than a command.
    NoCommand,
    /// A message that is longer than the target's receives.
    TooLong,
    /// Another command than Connect is the first.
    CommandFirst,
    /// Is gone while its Connect is under way, the data of which has to be fetched.
    GoesDuringConnect,
    /// Data for the target behind a key that is none.
    WrongKeyToRead,
    /// Data for the target, more than the key is for.
    ShortRegionToRead,
    /// Data in the capsule, behind the capsule's end.
    OffsetBeyond,
    /// A list of descriptors behind the capsule's end.
    ListBeyond,
    /// More descriptors than there may be.
    TooManyBlocks,
    /// A list that is no whole number of descriptors.
    UnevenList,
    /// A descriptor that no transport of messages knows.
    WrongType,
    /// A command that needs data and names none.
    NoData,
    /// Two commands with the same identifier.
    SameTwice,
    /// Wants data behind a key that is none.
    WrongKeyToWrite,
    /// Wants more data than the key is for.
    ShortRegionToWrite,
    /// Wants a key invalidated that is none.
    WrongKeyToInvalidate,
    /// Commands without an end, and no receive for a response.
    NoReceives,
    /// Is gone while the target reads its memory for more commands than it may read for at once.
    GoesDuringReads,
    /// Is gone while the target writes its memory.
    GoesDuringWrites,
}

impl Deed {
    /// All of them.
    pub fn all() -> Vec<Deed> {
        let others = [
            Deed::GoesWhileConnecting,
            Deed::GoesWhenConnected,
            Deed::Silence,
            Deed::NoCommand,
            Deed::TooLong,
            Deed::CommandFirst,
            Deed::GoesDuringConnect,
            Deed::WrongKeyToRead,
            Deed::ShortRegionToRead,
            Deed::OffsetBeyond,
            Deed::ListBeyond,
            Deed::TooManyBlocks,
            Deed::UnevenList,
            Deed::WrongType,
            Deed::NoData,
            Deed::SameTwice,
            Deed::WrongKeyToWrite,
            Deed::ShortRegionToWrite,
            Deed::WrongKeyToInvalidate,
            Deed::NoReceives,
            Deed::GoesDuringReads,
            Deed::GoesDuringWrites,
        ];
        Reject::ALL.into_iter().map(Deed::Refused).chain(others).collect()
    }
}

/// Where a vandal is.
pub struct Place {
    /// How it reaches devices.
    pub fabric: Arc<dyn Fabric>,
    /// The target's address.
    pub addr: SocketAddr,
    /// The target's subsystem.
    pub subnqn: String,
    /// Time.
    pub now: Box<dyn Fn() -> Instant>,
    /// Makes the connection with this local address silent, if that can be done here.
    pub silence: Box<dyn Fn(SocketAddr) -> bool>,
    /// How long it stays at most before it is gone, nanoseconds.
    pub stay_ns: u64,
    /// What is drawn.
    pub rng: RefCell<Rng>,
    /// Something happened since it was last asked.
    pub busy: Cell<bool>,
    /// When it wants to be asked at the latest.
    pub deadline: Cell<Option<Instant>>,
}

impl Place {
    fn below(&self, bound: u64) -> u64 {
        self.rng.borrow_mut().below(bound)
    }

    /// Waits until `look` finds something.
    async fn until<T>(&self, what: &str, mut look: impl FnMut() -> Result<Option<T>, String>) -> Result<T, String> {
        let end = (self.now)() + PATIENCE;
        poll_fn(|_| {
            let late = || Err(format!("{what}: nothing has come"));
            Poll::Ready(match look() {
                Ok(Some(found)) => Ok(found),
                Err(why) => Err(why),
                Ok(None) if (self.now)() >= end => late(),
                Ok(None) => {
                    self.deadline.set(Some(end));
                    return Poll::Pending;
                }
            })
        })
        .await
        .inspect(|_| self.busy.set(true))
    }

    async fn stay(&self, ns: u64) {
        let end = (self.now)() + Duration::from_nanos(ns);
        poll_fn(|_| {
            self.deadline.set(Some(end));
            if (self.now)() >= end { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        self.busy.set(true);
    }
}

/// How a connection has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Refused(Option<Reject>),
    Other(String),
}

/// One connection.
struct Peer<'a> {
    place: &'a Place,
    hub: Box<dyn Hub>,
    endpoint: EndpointId,
    capsules: Vec<Buffer>,
    responses: VecDeque<Cqe>,
    exposed: Vec<ExposedId>,
    receives: bool,
    up: bool,
    end: Option<End>,
    cid: u16,
}

fn request(qid: u16, entries: u16) -> RequestData {
    let entries = u32::from(entries);
    ConnectRequest { qid, send_entries: entries, receive_entries: entries, cntlid: None }.data()
}

const PARAMS: ConnectParams = ConnectParams { responder_resources: 2, initiator_depth: 0, rnr_retry_count: 7 };

impl<'a> Peer<'a> {
    /// Asks for a connection.
    async fn ask(place: &'a Place, said: &[u8], params: ConnectParams, receives: bool) -> Result<Peer<'a>, String> {
        let text = |error: std::io::Error| error.to_string();
        let mut connecting = place.fabric.connect(place.addr, 5000).map_err(text)?;
        let link = place.until("the way", || connecting.poll().map_err(text)).await?;
        drop(connecting);
        let depth = 4 * u32::from(ENTRIES);
        let config = HubConfig { completions: 4 * depth, shared_receives: 0, announce: false };
        let mut hub = link.hub(config).map_err(text)?;
        let endpoint = hub.attach(link, QueueDepths { send: depth, receive: depth, send_pieces: 1 }).map_err(text)?;
        if receives {
            for buffer in hub.messages(depth as usize, RESPONSE_BYTES).map_err(text)? {
                hub.post_receive(Some(endpoint), buffer).map_err(|(_, error)| text(error))?;
            }
        }
        let capsules = hub.messages(depth as usize, CAPSULE_BYTES).map_err(text)?;
        hub.connect(endpoint, params, said).map_err(text)?;
        place.busy.set(true);
        let (responses, exposed) = (VecDeque::new(), Vec::new());
        Ok(Peer { place, hub, endpoint, capsules, responses, exposed, receives, up: false, end: None, cid: 0 })
    }

    /// A connection that is up.
    async fn connected(place: &'a Place, qid: u16, receives: bool) -> Result<Peer<'a>, String> {
        let mut peer = Peer::ask(place, request(qid, ENTRIES).as_bytes(), PARAMS, receives).await?;
        let place = peer.place;
        place.until("an answer to the request", || peer.look().map(|peer| peer.up.then_some(()))).await?;
        Ok(peer)
    }

    /// Takes in what has come; an error if that was the end.
    fn look(&mut self) -> Result<&mut Self, String> {
        self.take_in();
        match &self.end {
            Some(end) => Err(format!("the connection has ended: {end:?}")),
            None => Ok(self),
        }
    }

    fn take_in(&mut self) {
        let (mut done, mut events) = (Vec::new(), Vec::new());
        if let Err(error) = self.hub.poll(&mut done).and_then(|_| self.hub.events(&mut events)) {
            self.end.get_or_insert(End::Other(error.to_string()));
        }
        if !done.is_empty() || !events.is_empty() {
            self.place.busy.set(true);
        }
        // Events first: they say more about an end than flushed work does.
        for event in events {
            match event {
                HubEvent::Link(_, LinkEvent::Established { .. }) => self.up = true,
                HubEvent::Link(_, LinkEvent::Rejected { private_data, .. }) => {
                    self.end.get_or_insert(End::Refused(Reject::parse(&private_data)));
                }
                HubEvent::Port { .. } => {}
                other => drop(self.end.get_or_insert(End::Other(format!("{other:?}")))),
            }
        }
        for done in done {
            let status = match done {
                Done::Posted { head, status, .. } => {
                    self.capsules.extend(head.map(|head| with_len(head, None)));
                    status
                }
                Done::Received { buffer, bytes, status, .. } => {
                    if status == WorkStatus::Success {
                        assert_eq!(bytes as usize, RESPONSE_BYTES, "a response's length");
                        self.responses.push_back(Cqe::read_from_bytes(&buffer).expect("it has a response's length"));
                        if self.receives {
                            drop(self.hub.post_receive(Some(self.endpoint), buffer));
                        }
                    }
                    status
                }
            };
            if status != WorkStatus::Success {
                self.end.get_or_insert(End::Other(status.to_string()));
            }
        }
    }

    /// Sends a message, once there is room for it.
    async fn send(&mut self, bytes: &[u8]) -> Result<(), String> {
        let place = self.place;
        let room = |peer: &Peer<'_>| !peer.capsules.is_empty() && peer.hub.room(peer.endpoint) > 0;
        place.until("room to send", || self.look().map(|peer| room(peer).then_some(()))).await?;
        let mut head = with_len(self.capsules.pop().expect("it was just looked"), Some(bytes.len()));
        head.copy_from_slice(bytes);
        let message = Some(Message { operation: Operation::Send, head, with_data: false });
        let posted = self.hub.post(self.endpoint, Post { message, ..Post::default() });
        self.hub.flush();
        posted.map_err(|refused| refused.error.map_or("the send queue is full".into(), |error| error.to_string()))
    }

    /// Sends a command with this behind it; its identifier.
    async fn command(&mut self, mut sqe: Sqe, behind: &[u8]) -> Result<u16, String> {
        self.cid = (self.cid + 1) % 0x7fff;
        sqe.cid = U16::new(self.cid);
        let capsule = [sqe.as_bytes(), behind].concat();
        self.send(&capsule).await?;
        Ok(self.cid)
    }

    /// The response to a command. Those to others are dropped.
    async fn response(&mut self, cid: u16) -> Result<Cqe, String> {
        let place = self.place;
        let find = |peer: &mut Peer<'_>| std::iter::from_fn(|| peer.responses.pop_front()).find(|c| c.cid.get() == cid);
        // What has come before the end counts.
        let look = || {
            self.take_in();
            let found = find(self);
            if found.is_some() { Ok(found) } else { self.look().map(|_| None) }
        };
        place.until("a response", look).await
    }

    async fn status_of(&mut self, sqe: Sqe, behind: &[u8]) -> Result<Status, String> {
        let cid = self.command(sqe, behind).await?;
        Ok(self.response(cid).await?.status())
    }

    /// The target has to end the connection.
    async fn must_end(&mut self) -> Result<(), String> {
        let place = self.place;
        let look = || {
            self.take_in();
            Ok(self.end.clone())
        };
        match place.until("the end of the connection", look).await? {
            End::Refused(Some(_)) => Err("the connection was refused".into()),
            // A target that ends a connection before the host's last word of its making has come rejects it without a reason.
            End::Refused(None) | End::Other(_) => Ok(()),
        }
    }

    fn expose(&mut self, bytes: usize) -> Result<Remote, String> {
        let mut list = Buffers::new();
        list.push(Buffer::heap(bytes));
        let id = self.hub.expose(list).map_err(|(_, error)| error.to_string())?;
        self.exposed.push(id);
        Ok(self.hub.exposed(id)[0])
    }

    fn connect_command(&self, qid: u16, cntlid: u16) -> (Sqe, Vec<u8>) {
        let mut data = ConnectData::new_zeroed();
        // All of it is drawn: a host that comes with the identifier of another one ends that one's controller.
        let drawn = || self.place.rng.borrow_mut().next_u64().to_le_bytes();
        data.hostid[..8].copy_from_slice(&drawn());
        data.hostid[8..].copy_from_slice(&drawn());
        data.cntlid = U16::new(cntlid);
        data.subnqn[..self.place.subnqn.len()].copy_from_slice(self.place.subnqn.as_bytes());
        let hostnqn = host_nqn(1000 + self.place.below(1 << 31) as u32);
        data.hostnqn[..hostnqn.len()].copy_from_slice(hostnqn.as_bytes());
        let kato_ms = if qid == 0 { 15_000 } else { 0 };
        (wire_client::connect(0, qid, ENTRIES, kato_ms, false), data.as_bytes().to_vec())
    }

    /// Connects to a controller; its identifier. `from` is that of an I/O queue's controller, with its host.
    async fn join(&mut self, qid: u16, from: Option<(u16, &[u8])>) -> Result<(u16, Vec<u8>), String> {
        let (sqe, mut data) = self.connect_command(qid, 0xffff);
        if let Some((cntlid, as_host)) = from {
            data = as_host.to_vec();
            data[16..18].copy_from_slice(&cntlid.to_le_bytes());
        }
        let cid = self.command(sqe, &data).await?;
        let cqe = self.response(cid).await?;
        match cqe.status() {
            Status::SUCCESS => Ok((cqe.result() as u16, data)),
            status => Err(format!("Connect to queue {qid}: {status:?}")),
        }
    }

    /// Ends it in one of the ways in which hosts go.
    fn go(mut self) {
        match self.place.below(3) {
            0 => self.hub.disconnect(self.endpoint),
            1 => drop((self.place.silence)(self.hub.local_addr(self.endpoint))),
            _ => {}
        }
    }
}

fn keyed(remote: Remote, len: usize, invalidate: bool) -> SglDescriptor {
    Sgl::Keyed { address: remote.address, len: len as u32, key: remote.key, invalidate }.into()
}

/// The admin queue of an enabled controller; the controller's identifier, and what its Connect said.
async fn enabled(place: &Place) -> Result<(Peer<'_>, u16, Vec<u8>), String> {
    let mut admin = Peer::connected(place, 0, true).await?;
    let (cntlid, data) = admin.join(0, None).await?;
    let status = admin.status_of(wire_client::property_set(0, CC, CC_ENABLE), &[]).await?;
    expect(status, Status::SUCCESS)?;
    loop {
        let cid = admin.command(wire_client::property_get(0, CSTS, 4), &[]).await?;
        if admin.response(cid).await?.result() & 1 == 1 {
            return Ok((admin, cntlid, data));
        }
    }
}

/// An admin queue, and an I/O queue of its controller.
async fn controller(place: &Place) -> Result<(Peer<'_>, Peer<'_>), String> {
    let (admin, cntlid, data) = enabled(place).await?;
    let mut io = Peer::connected(place, 1, true).await?;
    io.join(1, Some((cntlid, &data))).await?;
    Ok((admin, io))
}

fn expect<T: PartialEq + std::fmt::Debug>(found: T, wanted: T) -> Result<(), String> {
    if found == wanted { Ok(()) } else { Err(format!("found {found:?} instead of {wanted:?}")) }
}

async fn refused(place: &Place, reject: Reject) -> Result<(), String> {
    let mut data = request(0, ENTRIES);
    let mut params = PARAMS;
    let mut len = data.as_bytes().len();
    match reject {
        Reject::PrivateDataLength => len = 1 + place.below(len as u64 - 1) as usize,
        Reject::Recfmt => data.recfmt = U16::new(1 + place.below(0xffff) as u16),
        Reject::Qid => data.qid = U16::new(60_000),
        Reject::Hsqsize => (data.hsqsize, data.hrqsize) = (U16::new(65_534), U16::new(65_535)),
        Reject::Hrqsize => data.hrqsize = U16::new(place.below(u64::from(ENTRIES) - 1) as u16),
        Reject::Resources => (data.qid, data.hsqsize, data.hrqsize) = (U16::new(1), U16::new(3999), U16::new(4000)),
        Reject::Ird => params.responder_resources = 0,
        Reject::Ord => params.initiator_depth = 1,
    }
    let mut peer = Peer::ask(place, &data.as_bytes()[..len], params, true).await?;
    let look = || {
        peer.take_in();
        if peer.up {
            return Err("it was accepted".into());
        }
        Ok(peer.end.clone())
    };
    match place.until("a reject", look).await? {
        End::Refused(found) => expect(found, Some(reject)),
        other => Err(format!("found {other:?} instead of {reject:?}")),
    }
}

/// What is wrong with a Connect, and with what it is answered.
async fn spoiled(place: &Place, deed: Deed) -> Result<(), String> {
    let mut peer = Peer::connected(place, 0, true).await?;
    let (sqe, mut data) = peer.connect_command(0, 0xffff);
    let len = data.len() as u32;
    let list = |address: u64, len: u32| Sgl::LastSegment { address, len, in_capsule: true };
    let one = SglDescriptor::from(Sgl::Keyed { address: 0, len: 16, key: NO_KEY, invalidate: false });
    let (dptr, wanted) = match deed {
        Deed::OffsetBeyond => {
            let offset = [1, 1 << 20, u64::MAX][place.below(3) as usize];
            (Sgl::InCapsule { offset, len }, Status::SGL_OFFSET_INVALID)
        }
        Deed::ListBeyond => (list(0, 16 * (1 + len / 16)), Status::INVALID_SGL_SEGMENT),
        Deed::TooManyBlocks => {
            data = one.as_bytes().repeat(MAX_BLOCKS + 1);
            (list(0, data.len() as u32), Status::INVALID_SGL_COUNT)
        }
        Deed::UnevenList => (list(0, 17), Status::INVALID_SGL_SEGMENT),
        Deed::WrongType => (Sgl::DataBlock { address: 0x1000, len }, Status::SGL_TYPE_INVALID),
        _ => (Sgl::Keyed { address: 0, len: 0, key: 0, invalidate: false }, Status::DATA_SGL_LENGTH_INVALID),
    };
    let status = peer.status_of(with_descriptor(sqe, dptr.into()), &data).await?;
    expect(status, wanted.dnr())?;
    peer.go();
    Ok(())
}

/// A transfer that the vandal's own device refuses.
async fn misled(place: &Place, deed: Deed) -> Result<(), String> {
    let reads = matches!(deed, Deed::WrongKeyToRead | Deed::ShortRegionToRead);
    let mut peer = if reads { Peer::connected(place, 0, true).await? } else { enabled(place).await?.0 };
    let len = if reads { 1024 } else { 4096 };
    let mut remote = peer.expose(if deed == Deed::WrongKeyToInvalidate { len } else { 512 })?;
    if matches!(deed, Deed::WrongKeyToRead | Deed::WrongKeyToWrite) {
        remote.key = NO_KEY;
    }
    let mut sqe = match reads {
        true => peer.connect_command(0, 0xffff).0,
        false => wire_client::command(admin::IDENTIFY, 0, 0),
    };
    if !reads {
        // CNS 1: the controller.
        sqe.cdw10 = zerocopy::little_endian::U32::new(1);
    }
    if deed == Deed::WrongKeyToInvalidate {
        // A list, of which one stretch is right and another has no bytes and a key that is none.
        let none = Sgl::Keyed { address: 0, len: 0, key: NO_KEY, invalidate: true };
        let behind = [keyed(remote, len, false).as_bytes(), SglDescriptor::from(none).as_bytes()].concat();
        let list = Sgl::LastSegment { address: 0, len: behind.len() as u32, in_capsule: true };
        let cid = peer.command(with_descriptor(sqe, list.into()), &behind).await?;
        // A device that does not invalidate answers.
        return match peer.response(cid).await {
            Ok(_) => Ok(()),
            Err(_) => peer.must_end().await,
        };
    }
    peer.command(with_descriptor(sqe, keyed(remote, len, false)), &[]).await?;
    peer.must_end().await
}

/// Commands without an end, of which no response can arrive.
async fn floods(place: &Place) -> Result<(), String> {
    let mut peer = Peer::connected(place, 0, false).await?;
    let (sqe, data) = peer.connect_command(0, 0xffff);
    let mut sent = peer.command(sqe, &data).await.map(|_| 1);
    while let Ok(count) = sent {
        if count > 100_000 {
            return Err("the target takes commands without an end".into());
        }
        sent = peer.command(wire_client::property_get(0, CSTS, 4), &[]).await.map(|_| count + 1);
    }
    peer.must_end().await
}

/// More transfers of the I/O queue than fit, and gone among them.
async fn leaves_work(place: &Place, deed: Deed) -> Result<(), String> {
    let (admin, mut io) = controller(place).await?;
    let remote = io.expose(DATA_BYTES)?;
    for n in 0..ENTRIES - 1 {
        let sqe = match deed {
            Deed::GoesDuringReads => wire_client::write(n, 1, NOWHERE, 16, DATA_BYTES as u32),
            _ => wire_client::read(n, 1, 0, 1, DATA_BYTES as u32),
        };
        io.command(with_descriptor(sqe, keyed(remote, DATA_BYTES, false)), &[]).await?;
    }
    place.stay(place.below(place.stay_ns)).await;
    if place.below(2) == 0 {
        admin.go();
        io.go();
    } else {
        io.go();
        admin.go();
    }
    Ok(())
}

/// Does a deed; an error if the target took it in another way than it has to.
async fn act(place: &Place, deed: Deed) -> Result<(), String> {
    match deed {
        Deed::Refused(reject) => refused(place, reject).await,
        Deed::GoesWhileConnecting => {
            let peer = Peer::ask(place, request(0, ENTRIES).as_bytes(), PARAMS, true).await?;
            place.stay(place.below(place.stay_ns)).await;
            peer.go();
            Ok(())
        }
        Deed::GoesWhenConnected => {
            let peer = Peer::connected(place, 0, true).await?;
            place.stay(place.below(place.stay_ns)).await;
            peer.go();
            Ok(())
        }
        Deed::Silence => Peer::connected(place, 0, true).await?.must_end().await,
        Deed::NoCommand | Deed::TooLong => {
            let mut peer = Peer::connected(place, 0, true).await?;
            let short = 1 + place.below(SQE_BYTES as u64 - 1) as usize;
            peer.send(&vec![0; if deed == Deed::NoCommand { short } else { CAPSULE_BYTES }]).await?;
            peer.must_end().await
        }
        Deed::CommandFirst => {
            let mut peer = Peer::connected(place, 0, true).await?;
            let status = peer.status_of(wire_client::property_get(0, CSTS, 4), &[]).await?;
            expect(status, Status::COMMAND_SEQUENCE_ERROR.dnr())?;
            peer.go();
            Ok(())
        }
        Deed::GoesDuringConnect => {
            let mut peer = Peer::connected(place, 0, true).await?;
            let remote = peer.expose(1024)?;
            let sqe = peer.connect_command(0, 0xffff).0;
            peer.command(with_descriptor(sqe, keyed(remote, 1024, place.below(2) == 0)), &[]).await?;
            place.stay(place.below(place.stay_ns)).await;
            peer.go();
            Ok(())
        }
        Deed::WrongKeyToRead
        | Deed::ShortRegionToRead
        | Deed::WrongKeyToWrite
        | Deed::ShortRegionToWrite
        | Deed::WrongKeyToInvalidate => misled(place, deed).await,
        Deed::OffsetBeyond
        | Deed::ListBeyond
        | Deed::TooManyBlocks
        | Deed::UnevenList
        | Deed::WrongType
        | Deed::NoData => spoiled(place, deed).await,
        Deed::SameTwice => {
            let (mut peer, ..) = enabled(place).await?;
            // Event requests stay outstanding.
            let cid = peer.command(wire_client::command(admin::ASYNC_EVENT_REQUEST, 0, 0), &[]).await?;
            peer.cid = cid - 1;
            let status = peer.status_of(wire_client::command(admin::ASYNC_EVENT_REQUEST, 0, 0), &[]).await?;
            expect(status, Status::CID_CONFLICT.dnr())?;
            peer.go();
            Ok(())
        }
        Deed::NoReceives => floods(place).await,
        Deed::GoesDuringReads | Deed::GoesDuringWrites => leaves_work(place, deed).await,
    }
}

/// A deed under way.
pub type Script = Pin<Box<dyn Future<Output = Result<(), String>>>>;

/// Begins a deed. It is polled with any waker, over and over; what it says at the end is how the target failed.
pub fn begin(place: &Rc<Place>, deed: Deed) -> Script {
    let place = Rc::clone(place);
    Box::pin(async move { act(&place, deed).await })
}

/// Vandals of the simulator, one after another.
pub struct Gang {
    place: Rc<Place>,
    deeds: Vec<Deed>,
    left: u32,
    deed: Deed,
    script: Option<Script>,
    again: Instant,
    /// Connections may end by themselves, so that nothing can be expected.
    careless: bool,
}

impl Gang {
    /// One that does `count` of `deeds`, drawn, against the target at `addr`.
    pub fn new(
        view: &WorldView,
        addr: SocketAddr,
        subnqn: &str,
        deeds: Vec<Deed>,
        count: u32,
        seed: u64,
    ) -> Rc<RefCell<Gang>> {
        let (now, silence) = (Arc::clone(&view.sim), Arc::clone(&view.sim));
        let place = Place {
            fabric: Arc::new(SimFabric::new(&view.sim)),
            addr,
            subnqn: subnqn.to_owned(),
            now: Box::new(move || now.now()),
            silence: Box::new(move |local| silence.silence_rdma(local)),
            stay_ns: 600_000,
            rng: RefCell::new(Rng::new(seed)),
            busy: Cell::new(false),
            deadline: Cell::new(None),
        };
        let (place, deed, again) = (Rc::new(place), Deed::Silence, Instant(0));
        Rc::new(RefCell::new(Gang { place, deeds, left: count, deed, script: None, again, careless: false }))
    }

    /// From here on connections may end by themselves.
    pub fn expects_nothing(&mut self) {
        self.careless = true;
    }

    /// Whether it has done everything.
    pub fn is_done(&self) -> bool {
        self.left == 0 && self.script.is_none()
    }
}

impl Actor for Gang {
    fn act(&mut self, world: &WorldView) -> Progress {
        let now = world.sim.now();
        let Some(script) = &mut self.script else {
            if self.left == 0 || now < self.again {
                return Progress::Idle;
            }
            self.left -= 1;
            self.deed = self.deeds[self.place.below(self.deeds.len() as u64) as usize];
            trace::text(format!("vandal over RDMA: {:?}", self.deed));
            self.script = Some(begin(&self.place, self.deed));
            return Progress::Busy;
        };
        self.place.busy.set(false);
        self.place.deadline.set(None);
        if let Poll::Ready(outcome) = script.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            self.script = None;
            self.again = now + Duration::from_nanos(self.place.below(300_000));
            trace::text(format!("vandal over RDMA: {:?}: {outcome:?}", self.deed));
            assert!(outcome.is_ok() || self.careless, "{:?}: {outcome:?}", self.deed);
            return Progress::Busy;
        }
        Progress::from_busy(self.place.busy.get())
    }

    fn deadline(&self) -> Option<Instant> {
        match self.script {
            Some(_) => self.place.deadline.get(),
            None => (self.left > 0).then_some(self.again),
        }
    }

    fn describe(&self) -> String {
        format!("vandal over RDMA: {:?}, {} deeds left, at it {}", self.deed, self.left, self.script.is_some())
    }
}

impl std::fmt::Debug for Gang {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}
