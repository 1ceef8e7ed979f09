//! The connection manager: identifiers, their events, private data, rejects.
//!
//! ```text
//! active   new -> resolve_address -> AddressResolved -> resolve_route -> RouteResolved -> create_queue_pair -> connect
//!              -> Established | Rejected(private data) | Unreachable | Failed
//! passive  listen -> ConnectRequest(id, private data) -> create_queue_pair -> accept -> Established
//!                                                     \-> reject(private data)
//! ```
//!
//! An event is copied and acknowledged as it is read, so that nothing waits for its reader when an identifier ends.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use reactor::rdma::{ConnectParams, PrivateData, QueueDepths};

use crate::device::{Context, set_nonblocking};
use crate::error::{Error, Result};
use crate::library::{Libraries, libraries};
use crate::memory::ProtectionDomain;
use crate::queue::{CompletionQueue, QueuePair, SharedReceiveQueue};
use crate::raw;

/// Which identifier an event belongs to. Unique while the identifier lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CmKey(usize);

/// A socket address as C has it.
pub(crate) fn to_c(addr: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: all zeroes is a value of it.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let room: *mut libc::sockaddr_storage = &mut storage;
    let len = match addr {
        SocketAddr::V4(v4) => {
            // SAFETY: a sockaddr_in fits into the storage, which is aligned for it.
            let sin = unsafe { &mut *room.cast::<libc::sockaddr_in>() };
            sin.sin_family = libc::AF_INET as libc::sa_family_t;
            sin.sin_port = v4.port().to_be();
            sin.sin_addr.s_addr = u32::from_ne_bytes(v4.ip().octets());
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(v6) => {
            // SAFETY: a sockaddr_in6 fits into the storage, which is aligned for it.
            let sin6 = unsafe { &mut *room.cast::<libc::sockaddr_in6>() };
            sin6.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            sin6.sin6_port = v6.port().to_be();
            sin6.sin6_addr.s6_addr = v6.ip().octets();
            sin6.sin6_flowinfo = v6.flowinfo();
            sin6.sin6_scope_id = v6.scope_id();
            size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, len as libc::socklen_t)
}

/// The address in a C structure; unspecified if it is of another family.
pub(crate) fn from_c(storage: &libc::sockaddr_storage) -> SocketAddr {
    let room: *const libc::sockaddr_storage = storage;
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says which structure it is, and the storage is large enough and aligned.
            let sin = unsafe { &*room.cast::<libc::sockaddr_in>() };
            let ip = Ipv4Addr::from(sin.sin_addr.s_addr.to_ne_bytes());
            SocketAddr::V4(SocketAddrV4::new(ip, u16::from_be(sin.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let sin6 = unsafe { &*room.cast::<libc::sockaddr_in6>() };
            let ip = Ipv6Addr::from(sin6.sin6_addr.s6_addr);
            SocketAddr::V6(SocketAddrV6::new(ip, u16::from_be(sin6.sin6_port), sin6.sin6_flowinfo, sin6.sin6_scope_id))
        }
        _ => SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
    }
}

/// Where events of identifiers arrive.
pub struct EventChannel {
    libraries: &'static Libraries,
    raw: NonNull<raw::rdma_event_channel>,
}

// SAFETY: librdmacm is safe for use from several threads; identifiers on a channel hold it.
unsafe impl Send for EventChannel {}
// SAFETY: as above.
unsafe impl Sync for EventChannel {}

impl EventChannel {
    /// A new one, whose descriptor does not block.
    ///
    /// # Errors
    /// What is missing: a library, a device, the kernel's connection manager.
    pub fn new() -> Result<Arc<EventChannel>> {
        let libraries = libraries()?;
        // Without a device the library would print to standard error; this says it better.
        crate::device::devices()?;
        // SAFETY: no arguments.
        let raw = unsafe { (libraries.cm.rdma_create_event_channel)() };
        let raw = NonNull::new(raw).ok_or_else(|| match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) => {
                Error::NoConnectionManager(error)
            }
            _ => Error::last("rdma_create_event_channel"),
        })?;
        let channel = EventChannel { libraries, raw };
        set_nonblocking(channel.fd()).map_err(|error| Error::Call { call: "fcntl", error, hint: "" })?;
        Ok(Arc::new(channel))
    }

    /// Readable when there is an event.
    pub fn fd(&self) -> RawFd {
        // SAFETY: the channel is open.
        unsafe { self.raw.as_ref().fd }
    }

    /// The next event; `None` when there is none. A connection request that is dropped is rejected.
    ///
    /// # Errors
    /// When the connection manager fails.
    pub fn next(self: &Arc<EventChannel>) -> Result<Option<Event>> {
        let mut event = ptr::null_mut();
        // SAFETY: the channel is open and does not block.
        if unsafe { (self.libraries.cm.rdma_get_cm_event)(self.raw.as_ptr(), &mut event) } != 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(Error::Call { call: "rdma_get_cm_event", error, hint: "" }),
            };
        }
        // SAFETY: the call succeeded; the event lives until it is acknowledged below.
        let read = unsafe { self.read(&*event) };
        // SAFETY: acknowledged once, after everything was copied.
        unsafe { (self.libraries.cm.rdma_ack_cm_event)(event) };
        Ok(Some(read))
    }

    /// # Safety
    /// The event came from this channel and was not acknowledged.
    unsafe fn read(self: &Arc<EventChannel>, event: &raw::rdma_cm_event) -> Event {
        // SAFETY: of a connected port space, parameters are those of a connection.
        let param = unsafe { &event.param.conn };
        let private_data = || match param.private_data.is_null() {
            true => PrivateData::new(),
            // SAFETY: the event has this many bytes there.
            false => PrivateData::from_slice(unsafe {
                std::slice::from_raw_parts(param.private_data.cast(), param.private_data_len.into())
            }),
        };
        let conn = || ConnectParams {
            responder_resources: param.responder_resources,
            initiator_depth: param.initiator_depth,
            rnr_retry_count: param.rnr_retry_count,
        };
        let mut key = CmKey(event.id as usize);
        let kind = match event.event {
            raw::RDMA_CM_EVENT_ADDR_RESOLVED => EventKind::AddressResolved,
            raw::RDMA_CM_EVENT_ROUTE_RESOLVED => EventKind::RouteResolved,
            raw::RDMA_CM_EVENT_CONNECT_REQUEST => {
                key = CmKey(event.listen_id as usize);
                let raw = NonNull::new(event.id).expect("a connection request has an identifier");
                let id = CmId { channel: Arc::clone(self), raw, qp: None, undecided: true };
                EventKind::ConnectRequest { id, params: conn(), private_data: private_data() }
            }
            raw::RDMA_CM_EVENT_ESTABLISHED => EventKind::Established { params: conn(), private_data: private_data() },
            raw::RDMA_CM_EVENT_REJECTED => EventKind::Rejected { reason: event.status, private_data: private_data() },
            raw::RDMA_CM_EVENT_UNREACHABLE => EventKind::Failed { what: "the peer cannot be reached" },
            raw::RDMA_CM_EVENT_ADDR_ERROR => EventKind::Failed { what: "no RDMA device leads to the address" },
            raw::RDMA_CM_EVENT_ROUTE_ERROR => EventKind::Failed { what: "there is no route to the address" },
            raw::RDMA_CM_EVENT_CONNECT_ERROR => EventKind::Failed { what: "the connection was not set up" },
            raw::RDMA_CM_EVENT_DISCONNECTED => EventKind::Disconnected,
            raw::RDMA_CM_EVENT_DEVICE_REMOVAL => EventKind::DeviceRemoval,
            raw::RDMA_CM_EVENT_ADDR_CHANGE => EventKind::AddressChange,
            raw::RDMA_CM_EVENT_TIMEWAIT_EXIT => EventKind::TimewaitExit,
            other => EventKind::Other(other),
        };
        Event { key, status: event.status, kind }
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: made by `new`, ended once, after the identifiers on it.
        unsafe { (self.libraries.cm.rdma_destroy_event_channel)(self.raw.as_ptr()) };
    }
}

impl fmt::Debug for EventChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventChannel").field("fd", &self.fd()).finish()
    }
}

/// Something that happened to an identifier.
#[derive(Debug)]
pub struct Event {
    /// The identifier; the listening one of a connection request.
    pub key: CmKey,
    /// The connection manager's status: 0, a negative error number, or a reason of a reject.
    pub status: i32,
    /// What.
    pub kind: EventKind,
}

/// What can happen to an identifier.
#[derive(Debug)]
pub enum EventKind {
    /// Its device is known now.
    AddressResolved,
    /// It can connect now.
    RouteResolved,
    /// A peer wants to connect.
    ConnectRequest {
        /// The connection to be, on the listener's channel.
        id: CmId,
        /// What the peer asks for, seen from this side.
        params: ConnectParams,
        /// What the peer said.
        private_data: PrivateData,
    },
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
    /// The connection has ended.
    Disconnected,
    /// The device goes away: everything on it has to be ended.
    DeviceRemoval,
    /// The network interface's address has changed.
    AddressChange,
    /// The last trace of the connection is gone.
    TimewaitExit,
    /// Something else, by its number in `enum rdma_cm_event_type`.
    Other(u32),
}

/// How often a lost packet is sent again before the peer counts as gone.
const RETRY_COUNT: u8 = 7;

/// With private data that has to live while the result is used.
fn to_conn_param(params: ConnectParams, private_data: &[u8]) -> raw::rdma_conn_param {
    raw::rdma_conn_param {
        private_data: if private_data.is_empty() { ptr::null() } else { private_data.as_ptr().cast() },
        private_data_len: u8::try_from(private_data.len()).expect("private data is short"),
        responder_resources: params.responder_resources,
        initiator_depth: params.initiator_depth,
        flow_control: 1,
        retry_count: RETRY_COUNT,
        rnr_retry_count: params.rnr_retry_count,
        srq: 0,
        qp_num: 0,
    }
}

/// One end of a connection, or a listener; with its queue pair, once it has one.
pub struct CmId {
    channel: Arc<EventChannel>,
    raw: NonNull<raw::rdma_cm_id>,
    qp: Option<QueuePair>,
    /// A peer waits for an accept or a reject.
    undecided: bool,
}

// SAFETY: librdmacm is safe for use from several threads; what changes an identifier takes it exclusively.
unsafe impl Send for CmId {}
// SAFETY: as above; what takes it shared only reads, or posts work, which verbs allow from any thread.
unsafe impl Sync for CmId {}

impl CmId {
    /// A new one, whose events arrive on `channel`.
    ///
    /// # Errors
    /// When the process is out of descriptors or memory.
    pub fn new(channel: &Arc<EventChannel>) -> Result<CmId> {
        let mut raw = ptr::null_mut();
        let cm = &channel.libraries.cm;
        // SAFETY: the channel is open, and held by what is made.
        match unsafe { (cm.rdma_create_id)(channel.raw.as_ptr(), &mut raw, ptr::null_mut(), raw::RDMA_PS_TCP) } {
            0 => {
                let raw = NonNull::new(raw).expect("an identifier was made");
                Ok(CmId { channel: Arc::clone(channel), raw, qp: None, undecided: false })
            }
            code => Err(Error::code("rdma_create_id", code)),
        }
    }

    /// A listener on an address. Port 0 chooses a free one.
    ///
    /// # Errors
    /// When the address is in use or belongs to no device.
    pub fn listen(channel: &Arc<EventChannel>, addr: SocketAddr, backlog: u32) -> Result<CmId> {
        let id = CmId::new(channel)?;
        let cm = &channel.libraries.cm;
        for option in [raw::RDMA_OPTION_ID_REUSEADDR, raw::RDMA_OPTION_ID_AFONLY] {
            let mut on: libc::c_int = 1;
            if option == raw::RDMA_OPTION_ID_AFONLY && addr.is_ipv4() {
                continue;
            }
            let (level, option) = (raw::RDMA_OPTION_ID.cast_signed(), option.cast_signed());
            // SAFETY: the identifier lives; the option is an int.
            let code = unsafe {
                (cm.rdma_set_option)(id.raw.as_ptr(), level, option, (&raw mut on).cast(), size_of::<libc::c_int>())
            };
            if code != 0 {
                return Err(Error::code("rdma_set_option", code));
            }
        }
        let (mut storage, _) = to_c(addr);
        // SAFETY: the identifier lives; the address is read before the call returns.
        match unsafe { (cm.rdma_bind_addr)(id.raw.as_ptr(), (&raw mut storage).cast()) } {
            0 => {}
            code => return Err(Error::code("rdma_bind_addr", code)),
        }
        // SAFETY: the identifier lives.
        match unsafe { (cm.rdma_listen)(id.raw.as_ptr(), i32::try_from(backlog).unwrap_or(i32::MAX)) } {
            0 => Ok(id),
            code => Err(Error::code("rdma_listen", code)),
        }
    }

    /// Names it in events.
    pub fn key(&self) -> CmKey {
        CmKey(self.raw.as_ptr() as usize)
    }

    /// Starts to look for the device that leads to `to`.
    ///
    /// # Errors
    /// When no device can.
    pub fn resolve_address(&mut self, to: SocketAddr, timeout_ms: u32) -> Result<()> {
        let (mut storage, _) = to_c(to);
        let timeout = i32::try_from(timeout_ms).unwrap_or(i32::MAX);
        let resolve = self.channel.libraries.cm.rdma_resolve_addr;
        // SAFETY: the identifier lives; the address is read before the call returns; no source is demanded.
        match unsafe { resolve(self.raw.as_ptr(), ptr::null_mut(), (&raw mut storage).cast(), timeout) } {
            0 => Ok(()),
            code => Err(Error::code("rdma_resolve_addr", code)),
        }
    }

    /// Starts to look for the route.
    ///
    /// # Errors
    /// When there is none.
    pub fn resolve_route(&mut self, timeout_ms: u32) -> Result<()> {
        let timeout = i32::try_from(timeout_ms).unwrap_or(i32::MAX);
        // SAFETY: the identifier lives.
        match unsafe { (self.channel.libraries.cm.rdma_resolve_route)(self.raw.as_ptr(), timeout) } {
            0 => Ok(()),
            code => Err(Error::code("rdma_resolve_route", code)),
        }
    }

    /// The device, once it is known: of an incoming connection, or after the address was resolved.
    ///
    /// # Errors
    /// When it is not known, or gone.
    pub fn context(&self) -> Result<Arc<Context>> {
        // SAFETY: the identifier lives; the field is set before the event that says so was read.
        let verbs = unsafe { self.raw.as_ref().verbs };
        if verbs.is_null() {
            return Err(Error::NoDevice);
        }
        Context::at(verbs)
    }

    /// Whether this connection is on `context`.
    pub fn is_on(&self, context: &Context) -> bool {
        // SAFETY: as for `context`.
        ptr::eq(unsafe { self.raw.as_ref().verbs }, context.as_ptr())
    }

    /// The port of the device that it uses, from 1; 0 while it is not known.
    pub fn port(&self) -> u8 {
        // SAFETY: as for `context`.
        unsafe { self.raw.as_ref().port_num }
    }

    /// Makes its queue pair.
    ///
    /// # Errors
    /// When the device cannot have one so deep.
    ///
    /// # Panics
    /// If it has one already.
    pub fn create_queue_pair(
        &mut self,
        domain: &Arc<ProtectionDomain>,
        cq: &Arc<CompletionQueue>,
        srq: Option<&Arc<SharedReceiveQueue>>,
        depths: QueueDepths,
    ) -> Result<&QueuePair> {
        assert!(self.qp.is_none(), "a connection has one queue pair");
        let mut attr = raw::ibv_qp_init_attr {
            qp_context: ptr::null_mut(),
            send_cq: cq.as_ptr(),
            recv_cq: cq.as_ptr(),
            srq: srq.map_or(ptr::null_mut(), |srq| srq.as_ptr()),
            cap: raw::ibv_qp_cap {
                max_send_wr: depths.send,
                max_recv_wr: if srq.is_some() { 0 } else { depths.receive },
                max_send_sge: depths.send_pieces,
                max_recv_sge: u32::from(srq.is_none()),
                max_inline_data: 0,
            },
            qp_type: raw::IBV_QPT_RC,
            sq_sig_all: 0,
        };
        let create = self.channel.libraries.cm.rdma_create_qp;
        // SAFETY: everything that the attributes name lives, and is held by the pair that is made.
        match unsafe { create(self.raw.as_ptr(), domain.as_ptr(), &mut attr) } {
            0 => {}
            code => return Err(Error::code("rdma_create_qp", code)),
        }
        // SAFETY: the call has set it.
        let raw = NonNull::new(unsafe { self.raw.as_ref().qp }).expect("a queue pair was made");
        let depths = QueueDepths {
            send: attr.cap.max_send_wr.max(depths.send),
            receive: depths.receive,
            send_pieces: attr.cap.max_send_sge.max(depths.send_pieces),
        };
        Ok(self.qp.insert(QueuePair {
            raw,
            domain: Arc::clone(domain),
            _send_cq: Arc::clone(cq),
            _receive_cq: Arc::clone(cq),
            srq: srq.cloned(),
            depths,
        }))
    }

    /// Its queue pair.
    pub fn queue_pair(&self) -> Option<&QueuePair> {
        self.qp.as_ref()
    }

    /// Ends its queue pair. Work that was posted and has not completed never will; the device no longer uses its memory.
    pub fn destroy_queue_pair(&mut self) {
        if self.qp.is_some() {
            // SAFETY: the pair was made by `rdma_create_qp` of this identifier, and is ended once, before what it holds.
            unsafe { (self.channel.libraries.cm.rdma_destroy_qp)(self.raw.as_ptr()) };
            self.qp = None;
        }
    }

    /// Starts to connect.
    ///
    /// # Errors
    /// When the host refuses at once.
    ///
    /// # Panics
    /// If the private data is longer than 255 bytes; the host refuses more than
    /// [`CONNECT_PRIVATE_BYTES`](reactor::rdma::CONNECT_PRIVATE_BYTES).
    pub fn connect(&mut self, params: ConnectParams, private_data: &[u8]) -> Result<()> {
        let mut param = to_conn_param(params, private_data);
        // SAFETY: the identifier lives; parameters and private data are read before the call returns.
        match unsafe { (self.channel.libraries.cm.rdma_connect)(self.raw.as_ptr(), &mut param) } {
            0 => Ok(()),
            code => Err(Error::code("rdma_connect", code)),
        }
    }

    /// Accepts a connection request.
    ///
    /// # Errors
    /// When the peer or the device is gone.
    ///
    /// # Panics
    /// As [`CmId::connect`].
    pub fn accept(&mut self, params: ConnectParams, private_data: &[u8]) -> Result<()> {
        let mut param = to_conn_param(params, private_data);
        // SAFETY: as for `connect`.
        match unsafe { (self.channel.libraries.cm.rdma_accept)(self.raw.as_ptr(), &mut param) } {
            0 => {
                self.undecided = false;
                Ok(())
            }
            code => Err(Error::code("rdma_accept", code)),
        }
    }

    /// Refuses a connection request, and says why.
    ///
    /// # Errors
    /// When the peer or the device is gone.
    ///
    /// # Panics
    /// As [`CmId::connect`].
    pub fn reject(mut self, private_data: &[u8]) -> Result<()> {
        self.undecided = false;
        self.send_reject(private_data)
    }

    fn send_reject(&self, private_data: &[u8]) -> Result<()> {
        let len = u8::try_from(private_data.len()).expect("private data is short");
        let data = if len == 0 { ptr::null() } else { private_data.as_ptr().cast() };
        // SAFETY: the identifier lives; the data is read before the call returns.
        match unsafe { (self.channel.libraries.cm.rdma_reject)(self.raw.as_ptr(), data, len) } {
            0 => Ok(()),
            code => Err(Error::code("rdma_reject", code)),
        }
    }

    /// Ends the connection: the queue pair fails, so that all of its work completes, and the peer is told.
    ///
    /// # Errors
    /// When it was not connected, or the device is gone.
    pub fn disconnect(&self) -> Result<()> {
        // SAFETY: the identifier lives.
        match unsafe { (self.channel.libraries.cm.rdma_disconnect)(self.raw.as_ptr()) } {
            0 => Ok(()),
            code => Err(Error::code("rdma_disconnect", code)),
        }
    }

    /// Lets its events arrive on another channel from now on.
    ///
    /// # Errors
    /// When the connection manager fails.
    pub fn migrate(&mut self, channel: &Arc<EventChannel>) -> Result<()> {
        // SAFETY: both live. All events of the old channel were acknowledged as they were read, so this does not wait.
        match unsafe { (self.channel.libraries.cm.rdma_migrate_id)(self.raw.as_ptr(), channel.raw.as_ptr()) } {
            0 => {
                self.channel = Arc::clone(channel);
                Ok(())
            }
            code => Err(Error::code("rdma_migrate_id", code)),
        }
    }

    /// The channel on which its events arrive.
    pub fn channel(&self) -> &Arc<EventChannel> {
        &self.channel
    }

    /// This end's address, with the port that was chosen.
    pub fn local_addr(&self) -> SocketAddr {
        // SAFETY: the identifier lives; its addresses change only in calls that take it exclusively.
        from_c(unsafe { &(*self.raw.as_ptr()).route.addr.src_storage })
    }

    /// The other end's address.
    pub fn peer_addr(&self) -> SocketAddr {
        // SAFETY: as above.
        from_c(unsafe { &(*self.raw.as_ptr()).route.addr.dst_storage })
    }
}

impl Drop for CmId {
    fn drop(&mut self) {
        if self.undecided {
            // The peer learns it now instead of by a timeout; it may be gone already.
            let _ = self.send_reject(&[]);
        }
        self.destroy_queue_pair();
        // SAFETY: made by `new` or by an event, ended once, after its queue pair; its events were acknowledged as they were
        // read, so this does not wait for anybody.
        unsafe { (self.channel.libraries.cm.rdma_destroy_id)(self.raw.as_ptr()) };
    }
}

impl fmt::Debug for CmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CmId")
            .field("local", &self.local_addr())
            .field("peer", &self.peer_addr())
            .field("queue_pair", &self.qp)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_c() {
        for text in ["10.0.2.15:4420", "[fe80::1%3]:1", "[2001:db8::7]:65535", "0.0.0.0:0"] {
            let addr: SocketAddr = text.parse().unwrap();
            let (storage, len) = to_c(addr);
            assert_eq!(from_c(&storage), addr);
            assert_eq!(len, if addr.is_ipv4() { 16 } else { 28 });
        }
    }

    #[test]
    fn private_data_and_parameters_reach_c() {
        let params = ConnectParams { responder_resources: 3, initiator_depth: 4, rnr_retry_count: 7 };
        let data = [1, 2, 3];
        let c = to_conn_param(params, &data);
        assert_eq!((c.private_data, c.private_data_len), (data.as_ptr().cast(), 3));
        assert_eq!((c.responder_resources, c.initiator_depth, c.rnr_retry_count), (3, 4, 7));
        assert!(to_conn_param(params, &[]).private_data.is_null());
    }
}
