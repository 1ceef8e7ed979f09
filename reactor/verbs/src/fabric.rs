//! Devices as the seam [`reactor::rdma`].
//!
//! A hub has one descriptor to be watched: an epoll set of its completion channel, its connections' event channel and the
//! device's asynchronous events. A set that is watched by another reports what becomes ready in it, edge by edge.
//!
//! The device's asynchronous events have one reader for all hubs on it, whichever comes first; what others have to know is
//! in a [`DeviceState`] that all share, and which costs one load a poll.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use reactor::park::Source;
use reactor::rdma::{
    ConnectParams, Connecting, DeviceInfo, Done, Doorbells, EndpointId, ExposedId, Fabric, HubConfig, HubEvent, Limits,
    Link, LinkEvent, Listener, Post, QueueDepths, Refused, Remote, Request,
};
use reactor::{Buffer, BufferPool, Buffers};
use rustix::event::epoll;
use slab::Slab;
use smallvec::SmallVec;

use crate::cm::{CmId, EventChannel, EventKind};
use crate::device::{AsyncEvent, Context};
use crate::error::Error;
use crate::hub::Hub;
use crate::memory::{Access, MemoryRegion};

const REMOVED: &str = "the RDMA device was removed";
/// Failures of queue pairs that are kept for hubs which have not looked yet.
const MAX_FAILURES: usize = 256;

/// What all hubs on a device have to know of it.
#[derive(Default)]
struct DeviceState {
    /// Counts what is in `news`, so that nobody locks it for nothing.
    epoch: AtomicU64,
    news: Mutex<News>,
}

#[derive(Default)]
struct News {
    lost: Option<String>,
    /// Numbers of queue pairs that failed, why, and the epoch of that.
    failures: VecDeque<(u64, u32, String)>,
}

impl DeviceState {
    fn news(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, change: impl FnOnce(&mut News, u64)) {
        let mut news = self.news();
        let epoch = self.epoch.load(Ordering::Relaxed) + 1;
        change(&mut news, epoch);
        self.epoch.store(epoch, Ordering::Release);
    }
}

struct Device {
    context: Weak<Context>,
    state: Arc<DeviceState>,
}

/// The devices that connections are on. Nothing here keeps one that goes.
#[derive(Default)]
struct Devices(Mutex<Vec<Device>>);

impl Devices {
    /// The device of an identifier that knows it.
    fn of(&self, id: &CmId) -> io::Result<(Arc<Context>, Arc<DeviceState>)> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|device| device.context.strong_count() > 0);
        for device in known.iter() {
            if let Some(context) = device.context.upgrade().filter(|context| id.is_on(context)) {
                return if context.is_removed() { Err(removed()) } else { Ok((context, Arc::clone(&device.state))) };
            }
        }
        let (context, state) = (id.context()?, Arc::<DeviceState>::default());
        known.push(Device { context: Arc::downgrade(&context), state: Arc::clone(&state) });
        Ok((context, state))
    }
}

fn removed() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, REMOVED)
}

/// RDMA devices of this machine, through libibverbs and librdmacm.
#[derive(Clone, Default)]
pub struct VerbsFabric {
    devices: Arc<Devices>,
}

impl VerbsFabric {
    /// Access to the devices. Nothing is opened before it is used.
    pub fn new() -> VerbsFabric {
        VerbsFabric::default()
    }
}

impl Fabric for VerbsFabric {
    fn devices(&self) -> io::Result<Vec<DeviceInfo>> {
        // The connection manager's device file is asked for as well.
        EventChannel::new()?;
        Ok(crate::device::devices()?)
    }

    fn listen(&self, addr: SocketAddr, backlog: u32) -> io::Result<Box<dyn Listener>> {
        let channel = EventChannel::new()?;
        let id = CmId::listen(&channel, addr, backlog)?;
        Ok(Box::new(VerbsListener { id, channel, devices: Arc::clone(&self.devices) }))
    }

    fn connect(&self, addr: SocketAddr, timeout_ms: u32) -> io::Result<Box<dyn Connecting>> {
        let channel = EventChannel::new()?;
        let mut id = CmId::new(&channel)?;
        id.resolve_address(addr, timeout_ms)?;
        Ok(Box::new(VerbsConnecting { id: Some(id), channel, devices: Arc::clone(&self.devices), timeout_ms }))
    }
}

struct VerbsListener {
    // Ends before the channel.
    id: CmId,
    channel: Arc<EventChannel>,
    devices: Arc<Devices>,
}

impl Listener for VerbsListener {
    fn next(&mut self) -> io::Result<Option<Request>> {
        while let Some(event) = self.channel.next()? {
            match event.kind {
                EventKind::ConnectRequest { id, params, private_data } => {
                    let link = VerbsLink::new(id, &self.devices)?;
                    return Ok(Some(Request { link: Box::new(link), params, private_data }));
                }
                EventKind::DeviceRemoval if event.key == self.id.key() => {
                    return Err(removed());
                }
                // Of connections that are on their way to a reactor: those learn it when they are accepted.
                _ => {}
            }
        }
        Ok(None)
    }

    fn local_addr(&self) -> SocketAddr {
        self.id.local_addr()
    }

    fn source(&self) -> Source {
        Source::Fd(self.channel.fd())
    }
}

struct VerbsConnecting {
    // Ends before the channel. `None` once it was handed out.
    id: Option<CmId>,
    channel: Arc<EventChannel>,
    devices: Arc<Devices>,
    timeout_ms: u32,
}

impl Connecting for VerbsConnecting {
    fn poll(&mut self) -> io::Result<Option<Box<dyn Link>>> {
        while let Some(event) = self.channel.next()? {
            let Some(id) = &mut self.id else { break };
            match event.kind {
                EventKind::AddressResolved => id.resolve_route(self.timeout_ms)?,
                EventKind::RouteResolved => {
                    let id = self.id.take().expect("it was just there");
                    return Ok(Some(Box::new(VerbsLink::new(id, &self.devices)?)));
                }
                EventKind::Failed { what } => {
                    let cause = io::Error::from_raw_os_error(event.status.saturating_abs());
                    return Err(io::Error::new(cause.kind(), format!("{what}: {cause}")));
                }
                EventKind::DeviceRemoval => {
                    return Err(removed());
                }
                _ => {}
            }
        }
        Ok(None)
    }

    fn source(&self) -> Source {
        Source::Fd(self.channel.fd())
    }
}

struct VerbsLink {
    id: CmId,
    context: Arc<Context>,
    state: Arc<DeviceState>,
}

impl VerbsLink {
    fn new(id: CmId, devices: &Devices) -> io::Result<VerbsLink> {
        let (context, state) = devices.of(&id)?;
        Ok(VerbsLink { id, context, state })
    }
}

impl Link for VerbsLink {
    fn device(&self) -> DeviceInfo {
        self.context.info().clone()
    }

    fn limits(&self) -> Limits {
        *self.context.limits()
    }

    fn local_addr(&self) -> SocketAddr {
        self.id.local_addr()
    }

    fn peer_addr(&self) -> SocketAddr {
        self.id.peer_addr()
    }

    fn hub(&self, config: HubConfig) -> io::Result<Box<dyn reactor::rdma::Hub>> {
        Ok(Box::new(VerbsHub::new(&self.context, &self.state, config)?))
    }

    fn reject(self: Box<Self>, private_data: &[u8]) -> io::Result<()> {
        Ok(self.id.reject(private_data)?)
    }
}

/// Memory that peers may reach.
struct Exposure {
    // End before the memory is given back.
    regions: SmallVec<[MemoryRegion; 1]>,
    remotes: SmallVec<[Remote; 2]>,
    data: Buffers,
}

/// A [`Hub`] with its connections' events.
struct VerbsHub {
    exposed: Slab<Exposure>,
    hub: Hub,
    cm: Arc<EventChannel>,
    epoll: OwnedFd,
    context: Arc<Context>,
    state: Arc<DeviceState>,
    /// What of the device's state was seen.
    seen: u64,
}

fn add_to(epoll: &OwnedFd, fd: RawFd) -> io::Result<()> {
    // SAFETY: the hub keeps the descriptor's owner, and drops the set with it.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(epoll::add(epoll, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN | epoll::EventFlags::ET)?)
}

impl VerbsHub {
    fn new(context: &Arc<Context>, state: &Arc<DeviceState>, config: HubConfig) -> io::Result<VerbsHub> {
        let hub = Hub::new(context, config)?;
        let cm = EventChannel::new()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for fd in [cm.fd(), context.event_fd()] {
            add_to(&epoll, fd)?;
        }
        if config.announce {
            add_to(&epoll, hub.fd())?;
        }
        let seen = state.epoch.load(Ordering::Acquire);
        let (context, state) = (Arc::clone(context), Arc::clone(state));
        Ok(VerbsHub { exposed: Slab::new(), hub, cm, epoll, context, state, seen })
    }

    /// Reads the device's events for everybody.
    fn read_device(&mut self, out: &mut Vec<HubEvent>) -> io::Result<()> {
        while let Some(event) = self.context.next_event()? {
            match event {
                AsyncEvent::DeviceFatal => {
                    self.state.tell(|news, _| news.lost = Some("the RDMA device has failed".into()));
                }
                AsyncEvent::CqError | AsyncEvent::SrqError => {
                    let lost = Some("a queue of the RDMA device has failed".into());
                    self.state.tell(|news, _| news.lost = lost);
                }
                AsyncEvent::QpFailed(number, why) => self.state.tell(|news, epoch| {
                    if news.failures.len() == MAX_FAILURES {
                        news.failures.pop_front();
                    }
                    news.failures.push_back((epoch, number, why));
                }),
                AsyncEvent::PortActive(port) => out.push(HubEvent::Port { port, active: true }),
                AsyncEvent::PortError(port) => out.push(HubEvent::Port { port, active: false }),
                AsyncEvent::QpLastWqeReached(_) | AsyncEvent::SrqLimitReached | AsyncEvent::Other(_) => {}
            }
        }
        Ok(())
    }

    /// What this hub has not seen of what was read.
    fn see_news(&mut self, out: &mut Vec<HubEvent>) {
        let epoch = self.state.epoch.load(Ordering::Acquire);
        if epoch == self.seen {
            return;
        }
        let news = self.state.news();
        for (_, number, why) in news.failures.iter().filter(|(at, _, _)| *at > self.seen) {
            if let Some(endpoint) = self.hub.numbered(*number) {
                out.push(HubEvent::Failed(endpoint, why.clone()));
            }
        }
        if let Some(why) = &news.lost {
            out.push(HubEvent::DeviceLost(why.clone()));
        }
        self.seen = epoch;
    }
}

fn link_event(kind: EventKind) -> Option<LinkEvent> {
    Some(match kind {
        EventKind::Established { params, private_data } => LinkEvent::Established { params, private_data },
        EventKind::Rejected { reason, private_data } => LinkEvent::Rejected { reason, private_data },
        EventKind::Failed { what } => LinkEvent::Failed { what },
        EventKind::Disconnected => LinkEvent::Disconnected,
        EventKind::DeviceRemoval => LinkEvent::DeviceRemoved,
        EventKind::AddressResolved
        | EventKind::RouteResolved
        | EventKind::ConnectRequest { .. }
        | EventKind::AddressChange
        | EventKind::TimewaitExit
        | EventKind::Other(_) => return None,
    })
}

impl reactor::rdma::Hub for VerbsHub {
    fn limits(&self) -> &Limits {
        self.context.limits()
    }

    fn device(&self) -> &DeviceInfo {
        self.context.info()
    }

    fn is_on(&self, link: &dyn Link) -> bool {
        let link: &dyn Any = link;
        link.downcast_ref::<VerbsLink>().is_some_and(|link| link.id.is_on(&self.context))
    }

    fn register(&mut self, pool: &BufferPool, remote: bool) -> io::Result<()> {
        Ok(self.hub.register_for(pool, if remote { Access::Remote } else { Access::Local })?)
    }

    fn messages(&mut self, count: usize, bytes: usize) -> io::Result<Vec<Buffer>> {
        Ok(self.hub.messages(count, bytes)?)
    }

    fn attach(&mut self, link: Box<dyn Link>, depths: QueueDepths) -> io::Result<EndpointId> {
        let link: Box<dyn Any> = link;
        let mut link = link.downcast::<VerbsLink>().expect("a link of the same fabric");
        link.id.migrate(&self.cm)?;
        Ok(self.hub.attach(link.id, depths)?)
    }

    fn connect(&mut self, endpoint: EndpointId, params: ConnectParams, private_data: &[u8]) -> io::Result<()> {
        Ok(self.hub.connect(endpoint, params, private_data)?)
    }

    fn accept(&mut self, endpoint: EndpointId, params: ConnectParams, private_data: &[u8]) -> io::Result<()> {
        Ok(self.hub.accept(endpoint, params, private_data)?)
    }

    fn disconnect(&mut self, endpoint: EndpointId) {
        self.hub.disconnect(endpoint);
    }

    fn detach(&mut self, endpoint: EndpointId, back: &mut dyn FnMut(Done)) {
        self.hub.detach(endpoint, back);
    }

    fn local_addr(&self, endpoint: EndpointId) -> SocketAddr {
        self.hub.id(endpoint).local_addr()
    }

    fn peer_addr(&self, endpoint: EndpointId) -> SocketAddr {
        self.hub.id(endpoint).peer_addr()
    }

    fn has_shared_receives(&self) -> bool {
        self.hub.has_shared_receives()
    }

    fn post_receive(&mut self, endpoint: Option<EndpointId>, buffer: Buffer) -> Result<(), (Buffer, io::Error)> {
        self.hub.post_receive(endpoint, buffer);
        Ok(())
    }

    fn room(&self, endpoint: EndpointId) -> u32 {
        self.hub.room(endpoint)
    }

    fn post(&mut self, endpoint: EndpointId, post: Post) -> Result<(), Box<Refused>> {
        self.hub.enqueue(endpoint, post)
    }

    fn flush(&mut self) {
        self.hub.flush();
    }

    fn doorbells(&self) -> Doorbells {
        self.hub.doorbells()
    }

    fn poll(&mut self, out: &mut Vec<Done>) -> io::Result<usize> {
        Ok(self.hub.poll(out)?)
    }

    fn events(&mut self, out: &mut Vec<HubEvent>) -> io::Result<()> {
        let mut gone = self.context.is_removed();
        while let Some(event) = self.cm.next()? {
            gone |= matches!(event.kind, EventKind::DeviceRemoval);
            let found = self.hub.find(event.key);
            if let (Some(endpoint), Some(event)) = (found, link_event(event.kind)) {
                out.push(HubEvent::Link(endpoint, event));
            }
        }
        if gone {
            // Hubs without a connection hear of it from those with one, or look by themselves.
            self.context.set_removed();
            if self.state.news().lost.is_none() {
                self.state.tell(|news, _| news.lost = Some(REMOVED.into()));
            }
        } else {
            self.read_device(out)?;
        }
        self.see_news(out);
        Ok(())
    }

    fn arm(&mut self) -> io::Result<()> {
        Ok(self.hub.arm()?)
    }

    fn source(&self) -> Source {
        Source::Fd(self.epoll.as_raw_fd())
    }

    fn expose(&mut self, mut data: Buffers) -> Result<ExposedId, (Buffers, io::Error)> {
        let (mut regions, mut remotes) = (SmallVec::new(), SmallVec::new());
        let mut failed = None;
        for buffer in data.buffers_mut().iter_mut().filter(|buffer| !buffer.is_empty()) {
            if let Some(remote) = self.hub.remote(buffer) {
                remotes.push(remote);
                continue;
            }
            let (base, bytes) = (buffer.as_mut_ptr() as usize, buffer.len());
            // SAFETY: the memory is kept beside the registration, and given back after it has ended; nobody refers to it
            // before that.
            match unsafe { MemoryRegion::register(self.hub.domain(), base, bytes, Access::Remote, Arc::new(())) } {
                Ok(region) => {
                    remotes.push(Remote { address: base as u64, bytes: bytes as u32, key: region.rkey() });
                    regions.push(region);
                }
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        match failed {
            None => Ok(ExposedId(self.exposed.insert(Exposure { regions, remotes, data }))),
            Some(error) => {
                drop(regions);
                Err((data, Error::into(error)))
            }
        }
    }

    fn exposed(&self, id: ExposedId) -> &[Remote] {
        &self.exposed[id.0].remotes
    }

    fn reclaim(&mut self, id: ExposedId) -> Buffers {
        let Exposure { regions, data, .. } = self.exposed.remove(id.0);
        drop(regions);
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine with a device it can be listened on; on one without, the error says what is missing.
    #[test]
    fn what_is_missing_is_named() {
        let fabric = VerbsFabric::new();
        let listening = fabric.listen("127.0.0.1:0".parse().unwrap(), 8);
        match (fabric.devices(), listening) {
            (Ok(devices), _) => assert!(!devices.is_empty()),
            (Err(_), Ok(_)) => panic!("listening without a device"),
            (Err(error), Err(other)) => {
                assert_eq!(error.to_string(), other.to_string());
                assert!(fabric.connect("127.0.0.1:4420".parse().unwrap(), 1000).is_err());
            }
        }
    }

    #[test]
    fn failures_reach_hubs_that_have_not_looked_and_are_bounded() {
        let state = DeviceState::default();
        for number in 0..2 * MAX_FAILURES as u32 {
            state.tell(|news, epoch| {
                if news.failures.len() == MAX_FAILURES {
                    news.failures.pop_front();
                }
                news.failures.push_back((epoch, number, "gone".into()));
            });
        }
        let news = state.news();
        assert_eq!(news.failures.len(), MAX_FAILURES);
        assert_eq!(state.epoch.load(Ordering::Relaxed), 2 * MAX_FAILURES as u64);
        assert!(news.failures.iter().all(|(epoch, number, _)| *epoch == u64::from(*number) + 1));
    }
}
