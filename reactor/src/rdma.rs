//! RDMA: the seam that transports see, and its vocabulary. The implementation over devices is the crate `verbs`; the
//! simulator has another.
//!
//! ```text
//! passive   Fabric::listen -> Listener::next -> Request { link, .. } -> Hub::attach -> Hub::accept   \
//!                                                                   \-> Link::reject                  > HubEvent::Link
//! active    Fabric::connect -> Connecting::poll -> Link -> Hub::attach -> Hub::connect               /
//! ```
//! A [`Link`] is one end of a connection that has no queue pair yet. A [`Hub`] is the queue pairs that one owner on one
//! reactor has on one device: they share completions, registered memory and, where the device can, receives. All that
//! happens to them comes out of the hub, from [`Hub::poll`] (work) and [`Hub::events`] (connections and the device).
//!
//! # Memory
//! Whoever posts work gives its memory away, and gets it back when the work is done; memory that a peer may reach by a key is
//! given away for as long ([`Hub::expose`]). So nobody touches what a device uses, and none of this needs unsafe code of its
//! users. Only memory that the hub knows can be posted: that of a pool after [`Hub::register`], and that of
//! [`Hub::messages`].
//!
//! # Order
//! A post is a chain: transfers (RDMA READs or WRITEs) over its data in order, and a message after them. A message arrives
//! after the WRITEs before it; a READ's data is here when the chain has completed. Chains of one endpoint start in the order
//! in which they were posted, and complete once, in that order, when all of them is done. A request that fails makes all that
//! is behind it on its endpoint complete as flushed. There is no order between endpoints.
//!
//! # Limits that the owner has to keep
//! - work requests on an endpoint's send queue: each transfer is one, a message is one ([`Hub::room`]);
//! - pieces of memory in one request: [`QueueDepths::send_pieces`];
//! - READs outstanding on an endpoint: the initiator depth that was agreed;
//! - posted receives: those of [`QueueDepths`] or [`HubConfig`];
//! - completions outstanding: [`HubConfig::completions`].

use std::any::Any;
use std::fmt;
use std::io;
use std::net::SocketAddr;

use smallvec::SmallVec;

use crate::buffer::{Buffer, BufferPool, Buffers};
use crate::park::Source;

/// Private data of connection events. What comes up may be longer than what was sent, padded with zeroes.
pub type PrivateData = SmallVec<[u8; 64]>;

/// Private data that a connect or an accept can carry over RoCE and InfiniBand, in bytes: the connection manager takes 36 of
/// the 92 that a request has.
pub const CONNECT_PRIVATE_BYTES: usize = 56;

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The kernel's name of it, such as `rxe0` or `mlx5_0`.
    pub name: String,
    /// Whether it speaks iWARP rather than InfiniBand or RoCE.
    pub iwarp: bool,
}

/// What a device can do, at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Work requests of one queue.
    pub qp_wr: u32,
    /// Scatter/gather entries of one work request.
    pub sge: u32,
    /// Entries of one completion queue.
    pub cqe: u32,
    /// Work requests of one shared receive queue; 0 where there are none.
    pub srq_wr: u32,
    /// RDMA READs that a queue pair answers at once.
    pub responder_resources: u8,
    /// RDMA READs that a queue pair asks at once.
    pub initiator_depth: u8,
    /// Ports, which are numbered from 1.
    pub ports: u8,
    /// Memory management extensions, which send-with-invalidate belongs to.
    pub mem_mgt_extensions: bool,
}

/// What the two sides of a connection tell each other's devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectParams {
    /// RDMA READs of the peer that this side answers at once. Of a request: as many does the peer want to ask.
    pub responder_resources: u8,
    /// RDMA READs that this side asks at once. Of a request: as many does the peer answer.
    pub initiator_depth: u8,
    /// How often a send is tried again when the peer has no receive posted; 7 is for ever.
    pub rnr_retry_count: u8,
}

/// How large a hub is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HubConfig {
    /// Completions that may be outstanding: at least all posted chains, all requests that can fail, and all receives.
    pub completions: u32,
    /// Receives in the shared queue; 0 for none, then each queue pair has its own.
    pub shared_receives: u32,
    /// Whether completions can be waited for through [`Hub::source`].
    pub announce: bool,
}

/// How large a queue pair is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueDepths {
    /// Work requests of the send queue.
    pub send: u32,
    /// Receives, if the queue pair has a receive queue of its own.
    pub receive: u32,
    /// Pieces of memory of one send.
    pub send_pieces: u32,
}

/// Names a queue pair of a hub, until it is detached; names are used again then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointId(pub usize);

/// Names memory that is exposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExposedId(pub usize);

/// A stretch of memory as a peer names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    /// Its address at its owner.
    pub address: u64,
    /// Its bytes.
    pub bytes: u32,
    /// The owner's key for it.
    pub key: u32,
}

/// What a work request of the send queue does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Sends a message.
    Send,
    /// Sends a message and makes the peer's device forget this key of its own.
    SendInvalidate {
        /// The peer's key.
        rkey: u32,
    },
    /// Writes to the peer's memory.
    Write {
        /// Where, in the peer's addresses.
        address: u64,
        /// The peer's key for it.
        rkey: u32,
    },
    /// Reads the peer's memory.
    Read {
        /// Where, in the peer's addresses.
        address: u64,
        /// The peer's key for it.
        rkey: u32,
    },
}

/// A read or write of the peer's memory, over the next bytes of a post's data. It is one work request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// [`Operation::Read`] or [`Operation::Write`].
    pub operation: Operation,
    /// Bytes, at least one, in at most [`QueueDepths::send_pieces`] segments of the data.
    pub bytes: u32,
}

/// A message at the end of a post.
#[derive(Debug)]
pub struct Message {
    /// [`Operation::Send`] or [`Operation::SendInvalidate`].
    pub operation: Operation,
    /// Its first bytes: all of the buffer's present length, at least one.
    pub head: Buffer,
    /// Whether the data that no transfer covers follows in it.
    pub with_data: bool,
}

/// One chain of work.
#[derive(Debug, Default)]
pub struct Post {
    /// Comes back with the completion.
    pub user: u64,
    /// Memory of the transfers and of the message's tail.
    pub data: Buffers,
    /// Bytes of the data in front of what the first transfer covers.
    pub start: u32,
    /// Reads and writes, in order.
    pub transfers: SmallVec<[Transfer; 4]>,
    /// What is sent after them.
    pub message: Option<Message>,
}

impl Post {
    /// Work requests that it takes on the send queue.
    pub fn requests(&self) -> u32 {
        self.transfers.len() as u32 + u32::from(self.message.is_some())
    }
}

/// How often a device was told of work, since its hub was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Doorbells {
    /// Of work on send queues.
    pub sends: u64,
    /// Of receives.
    pub receives: u64,
}

/// Why a post was not taken. Nothing of it was posted.
#[derive(Debug)]
pub struct Refused {
    /// What was to be posted.
    pub post: Post,
    /// `None`: the send queue is full, and will have room after completions.
    pub error: Option<io::Error>,
}

/// How a work request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkStatus {
    /// Well.
    Success,
    /// It was not done, since its queue pair had failed or ended.
    Flushed,
    /// The peer does not answer, or has no receive posted for too long.
    PeerGone,
    /// The peer refused the access: a wrong key, a length beyond what the key covers.
    RemoteAccess,
    /// A message was longer than the receive, or the peer's than what was posted.
    Length,
    /// Anything else, by its number in `enum ibv_wc_status`.
    Failed(u32),
}

impl fmt::Display for WorkStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WorkStatus::Success => f.write_str("done"),
            WorkStatus::Flushed => f.write_str("the queue pair had ended"),
            WorkStatus::PeerGone => f.write_str("the peer does not answer"),
            WorkStatus::RemoteAccess => f.write_str("the peer refused the access"),
            WorkStatus::Length => f.write_str("the message is longer than the receive"),
            WorkStatus::Failed(number) => write!(f, "the device reports work completion status {number}"),
        }
    }
}

/// The end of work.
#[derive(Debug)]
pub enum Done {
    /// A receive.
    Received {
        /// Where, if the queue pair is still there.
        endpoint: Option<EndpointId>,
        /// The receive's memory, as long as it was posted; the message is its first `bytes` bytes.
        buffer: Buffer,
        /// Bytes of the message.
        bytes: u32,
        /// The key of this side that the peer invalidated with it.
        invalidated: Option<u32>,
        /// How it ended; there is a message only after success.
        status: WorkStatus,
    },
    /// A post.
    Posted {
        /// Where.
        endpoint: EndpointId,
        /// What it was posted with.
        user: u64,
        /// Its data.
        data: Buffers,
        /// Its message's head.
        head: Option<Buffer>,
        /// How it ended; of a chain, the first failure.
        status: WorkStatus,
    },
}

/// What can happen to a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// It is connected.
    Established {
        /// What was agreed, on the side that connected.
        params: ConnectParams,
        /// What the side that accepted said.
        private_data: PrivateData,
    },
    /// The peer refused.
    Rejected {
        /// InfiniBand's reason; 28 is the consumer's own refusal, with private data; 8 means that nobody listens.
        reason: i32,
        /// What the peer said.
        private_data: PrivateData,
    },
    /// It came to nothing.
    Failed {
        /// In which way.
        what: &'static str,
    },
    /// It has ended.
    Disconnected,
    /// Its device goes away: it has to be detached.
    DeviceRemoved,
}

/// What can happen to a hub besides the end of work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HubEvent {
    /// Something happened to a connection.
    Link(EndpointId, LinkEvent),
    /// A queue pair failed, for this reason; it has to be detached.
    Failed(EndpointId, String),
    /// All of the device is lost: every endpoint has to be detached, and the hub dropped.
    DeviceLost(String),
    /// A port can be used again, or cannot be used; connections over it fail by themselves.
    Port {
        /// From 1.
        port: u8,
        /// Whether it can be used.
        active: bool,
    },
}

/// A kind of access to RDMA devices.
pub trait Fabric: Send + Sync {
    /// The devices that can be used, at least one.
    ///
    /// # Errors
    /// What is missing (a library, a driver, a device), and how to get it.
    fn devices(&self) -> io::Result<Vec<DeviceInfo>>;

    /// Listens on an address, or on all of a family's. Port 0 chooses a free one.
    ///
    /// # Errors
    /// What is missing; or as the host says: the address is in use, belongs to no device.
    fn listen(&self, addr: SocketAddr, backlog: u32) -> io::Result<Box<dyn Listener>>;

    /// Starts to look for the device and the route that lead to `addr`.
    ///
    /// # Errors
    /// What is missing; or that no device can.
    fn connect(&self, addr: SocketAddr, timeout_ms: u32) -> io::Result<Box<dyn Connecting>>;
}

/// Where connections arrive.
pub trait Listener: Send {
    /// The next connection request; `None` when there is none. A request that is dropped is rejected.
    ///
    /// # Errors
    /// When the connection manager fails, or the device is gone.
    fn next(&mut self) -> io::Result<Option<Request>>;
    /// The address listened on, with the port that was chosen.
    fn local_addr(&self) -> SocketAddr;
    /// What to watch.
    fn source(&self) -> Source;
}

/// A peer wants to connect.
pub struct Request {
    /// The connection to be.
    pub link: Box<dyn Link>,
    /// What the peer asks for, seen from this side.
    pub params: ConnectParams,
    /// What the peer said.
    pub private_data: PrivateData,
}

/// A connection on its way to a device.
pub trait Connecting: Send {
    /// The connection, once device and route are known; then this is of no use any more.
    ///
    /// # Errors
    /// When there is no way to the address, or looking for it took too long.
    fn poll(&mut self) -> io::Result<Option<Box<dyn Link>>>;
    /// What to watch until then.
    fn source(&self) -> Source;
}

/// One end of a connection whose device is known and which has no queue pair yet. May go to any thread.
pub trait Link: Any + Send {
    /// Its device.
    fn device(&self) -> DeviceInfo;
    /// What its device can do.
    fn limits(&self) -> Limits;
    /// This end's address.
    fn local_addr(&self) -> SocketAddr;
    /// The other end's address.
    fn peer_addr(&self) -> SocketAddr;
    /// A hub on its device.
    ///
    /// # Errors
    /// When the device cannot have queues so deep, or is gone.
    fn hub(&self, config: HubConfig) -> io::Result<Box<dyn Hub>>;
    /// Refuses a request, and says why in at most 148 bytes.
    ///
    /// # Errors
    /// When the peer or the device is gone.
    fn reject(self: Box<Self>, private_data: &[u8]) -> io::Result<()>;
}

/// All queue pairs that one owner on one reactor has on one device. Functions that take an [`EndpointId`] panic if it was
/// detached. Dropping a hub ends all there is on it.
pub trait Hub: Send {
    /// What its device can do.
    fn limits(&self) -> &Limits;
    /// Its device.
    fn device(&self) -> &DeviceInfo;
    /// Whether `link` is on its device.
    fn is_on(&self, link: &dyn Link) -> bool;

    /// Makes a pool's memory known, so that its buffers can be posted, and exposed if `remote`. `remote` memory is
    /// reachable through one key as long as the hub lives, by any peer that was ever told it.
    ///
    /// # Errors
    /// When the memlock limit forbids it, or the device cannot have so much.
    fn register(&mut self, pool: &BufferPool, remote: bool) -> io::Result<()>;

    /// `count` buffers of `bytes` bytes each for messages, of memory of the hub's own that is never exposed. They are to be
    /// used again and again: their memory is freed with the hub and the last of them.
    ///
    /// # Errors
    /// As [`Hub::register`].
    fn messages(&mut self, count: usize, bytes: usize) -> io::Result<Vec<Buffer>>;

    /// Makes the queue pair of a connection, whose events come out of [`Hub::events`] from now on.
    ///
    /// # Errors
    /// When the device cannot have one so deep; the connection is gone then.
    ///
    /// # Panics
    /// If the link is of another fabric.
    fn attach(&mut self, link: Box<dyn Link>, depths: QueueDepths) -> io::Result<EndpointId>;

    /// Starts to connect. [`LinkEvent::Established`] or what went wrong is told later.
    ///
    /// # Errors
    /// When the host refuses at once.
    ///
    /// # Panics
    /// If the private data is longer than [`CONNECT_PRIVATE_BYTES`].
    fn connect(&mut self, endpoint: EndpointId, params: ConnectParams, private_data: &[u8]) -> io::Result<()>;

    /// Accepts a request. Work may be posted from now on, and the peer's may arrive before [`LinkEvent::Established`].
    ///
    /// # Errors
    /// When the peer or the device is gone.
    ///
    /// # Panics
    /// As [`Hub::connect`].
    fn accept(&mut self, endpoint: EndpointId, params: ConnectParams, private_data: &[u8]) -> io::Result<()>;

    /// Ends a connection: the peer is told, and all work of the endpoint completes, if only as flushed. What was not
    /// connected just fails.
    fn disconnect(&mut self, endpoint: EndpointId);

    /// Ends a queue pair, and gives back what was posted there and has not completed.
    fn detach(&mut self, endpoint: EndpointId, back: &mut dyn FnMut(Done));

    /// This end's address.
    fn local_addr(&self, endpoint: EndpointId) -> SocketAddr;
    /// The other end's address.
    fn peer_addr(&self, endpoint: EndpointId) -> SocketAddr;

    /// Whether receives are posted to a shared queue.
    fn has_shared_receives(&self) -> bool;

    /// Posts a receive as long as the buffer: to the endpoint's own queue, or (`None`) to the shared one. It is there after the
    /// next [`Hub::flush`], [`Hub::poll`], [`Hub::connect`] or [`Hub::accept`].
    ///
    /// # Errors
    /// When the queue is full; the buffer comes back. What a device refuses later fails the queue pair, or all of the hub.
    ///
    /// # Panics
    /// If the buffer is of no known memory, or the queue that is named does not exist.
    fn post_receive(&mut self, endpoint: Option<EndpointId>, buffer: Buffer) -> Result<(), (Buffer, io::Error)>;

    /// Room in an endpoint's send queue, in work requests.
    fn room(&self, endpoint: EndpointId) -> u32;

    /// Posts a chain. It starts with [`Hub::flush`] at the latest.
    ///
    /// # Errors
    /// [`Refused`]; it takes more than [`Hub::room`], or the device refuses.
    ///
    /// # Panics
    /// If the chain is empty, its transfers are longer than its data, or memory is not known.
    fn post(&mut self, endpoint: EndpointId, post: Post) -> Result<(), Box<Refused>>;

    /// Starts what was posted, receives first: for each queue, the device is told once of all that follows each other. What
    /// it refuses here fails its queue pair.
    fn flush(&mut self);

    /// How often the device was told of work.
    fn doorbells(&self) -> Doorbells;

    /// Takes completions of some work; how many work requests that were. 0: there is none now.
    ///
    /// # Errors
    /// When the completion queue or the shared receive queue has failed: everything on it is lost.
    fn poll(&mut self, out: &mut Vec<Done>) -> io::Result<usize>;

    /// Takes what else has happened. To be called when [`Hub::source`] was ready, and after that until nothing comes.
    ///
    /// # Errors
    /// When the connection manager or the device fails: the hub is of no use any more.
    fn events(&mut self, out: &mut Vec<HubEvent>) -> io::Result<()>;

    /// Announces the next completion. Poll once more after this and before sleeping.
    ///
    /// # Errors
    /// When the device is gone.
    fn arm(&mut self) -> io::Result<()>;

    /// What to watch: ready when there is an event, or a completion after [`Hub::arm`].
    fn source(&self) -> Source;

    /// Lets peers that are told the keys read and write `data` until it is reclaimed. Memory of no pool that was registered
    /// as remote is registered for the time, which is slow.
    ///
    /// # Errors
    /// As [`Hub::register`], and the data.
    fn expose(&mut self, data: Buffers) -> Result<ExposedId, (Buffers, io::Error)>;

    /// What peers have to be told, one for each segment that is not empty, in order.
    ///
    /// # Panics
    /// If it was reclaimed.
    fn exposed(&self, id: ExposedId) -> &[Remote];

    /// Takes exposed memory back. Only after the peer has said that it is done with it, or the endpoint was detached, are its
    /// contents what they seem.
    ///
    /// # Panics
    /// If it was reclaimed.
    fn reclaim(&mut self, id: ExposedId) -> Buffers;
}
