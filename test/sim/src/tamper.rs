//! A target that lies over RDMA: the production target over the simulated devices, with what reaches the host changed on the way.
//! Nothing is told of the lie to either side, so the host has to find out by itself.

use std::any::Any;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bdev::conformance::Rng;
use reactor::park::Source;
use reactor::rdma::{
    ConnectParams, Connecting, DeviceInfo, Done, Doorbells, EndpointId, ExposedId, Fabric, Hub, HubConfig, HubEvent,
    Limits, Link, LinkEvent, Listener, Post, PrivateData, QueueDepths, Refused, Remote, WorkStatus,
};
use reactor::{Buffer, BufferPool, Buffers};

use crate::rdma::SimFabric;

/// What is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tampering {
    /// A response is to a command that is not outstanding.
    UnknownCid,
    /// A response comes with the invalidation of a key that nobody asked for.
    Invalidates,
    /// A response is too short, down to nothing.
    Short,
    /// A response claims to be longer than its receive.
    Long,
    /// A response is noise.
    Noise,
    /// A receive fails.
    Fails,
    /// A queue pair is accepted with private data of another kind.
    AcceptKind,
    /// A queue pair is accepted without receives for commands.
    NoReceives,
    /// A queue pair is accepted without private data.
    NoAcceptData,
    /// A queue pair is rejected with noise for a reason.
    RejectNoise,
    /// A queue pair is rejected without a reason.
    RejectNothing,
}

impl Tampering {
    /// With what happens on a queue pair that works.
    pub const WORK: [Tampering; 6] = [
        Tampering::UnknownCid,
        Tampering::Invalidates,
        Tampering::Short,
        Tampering::Long,
        Tampering::Noise,
        Tampering::Fails,
    ];
    /// With what happens while it is connected, and what the host says of that.
    pub const SETUP: [(Tampering, &'static str); 5] = [
        (Tampering::AcceptKind, "private data of another kind"),
        (Tampering::NoReceives, "no receives for commands"),
        (Tampering::NoAcceptData, "private data of another kind"),
        (Tampering::RejectNoise, "refuses the queue pair"),
        (Tampering::RejectNothing, "refuses the queue pair, reason 28"),
    ];
}

struct State {
    rng: Rng,
    lie: Option<Tampering>,
    left: u64,
    told: u64,
}

/// Says what is changed, and knows what was.
#[derive(Clone)]
pub struct Tamperer(Arc<Mutex<State>>);

impl Tamperer {
    /// Changes nothing yet.
    pub fn new(seed: u64) -> Tamperer {
        Tamperer(Arc::new(Mutex::new(State { rng: Rng::new(seed), lie: None, left: 0, told: 0 })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lies like this the next so many times.
    pub fn lie(&self, lie: Tampering, times: u64) {
        let mut state = self.state();
        (state.lie, state.left) = (Some(lie), times);
    }

    /// Lies that were told.
    pub fn told(&self) -> u64 {
        self.state().told
    }

    /// `fabric`, as this changes it.
    pub fn over(&self, fabric: SimFabric) -> TamperedFabric {
        TamperedFabric { fabric, by: self.clone() }
    }

    /// Whether one of `lies` is to be told now.
    fn next(&self, wanted: impl Fn(Tampering) -> bool) -> Option<(Tampering, u64)> {
        let mut state = self.state();
        let lie = state.lie.filter(|lie| state.left > 0 && wanted(*lie))?;
        state.left -= 1;
        state.told += 1;
        Some((lie, state.rng.next_u64()))
    }

    fn work(&self, done: Done) -> Done {
        let Done::Received { endpoint, mut buffer, mut bytes, mut invalidated, mut status } = done else { return done };
        if status == WorkStatus::Success
            && let Some((lie, random)) = self.next(|lie| Tampering::WORK.contains(&lie))
        {
            match lie {
                // The high bits of a CID count the uses of its slot.
                Tampering::UnknownCid => buffer[13] ^= 0x80,
                Tampering::Invalidates => invalidated = Some(random as u32),
                Tampering::Short => bytes = (random % 16) as u32,
                Tampering::Long => bytes = [17, 64, u32::MAX][random as usize % 3],
                Tampering::Noise => {
                    let cid = [buffer[12], buffer[13]];
                    Rng::new(random).fill(&mut buffer[..16]);
                    // Of a command that is outstanding, a host could not know better.
                    buffer[12..14].copy_from_slice(&[cid[0], cid[1] ^ 0x55]);
                    bytes = 16 + (random % 2) as u32;
                }
                _ => status = WorkStatus::Failed(4),
            }
        }
        Done::Received { endpoint, buffer, bytes, invalidated, status }
    }

    fn event(&self, event: HubEvent) -> HubEvent {
        let HubEvent::Link(endpoint, LinkEvent::Established { params, mut private_data }) = event else { return event };
        let is_setup = |lie| Tampering::SETUP.iter().any(|(of, _)| *of == lie);
        let Some((lie, random)) = self.next(is_setup) else {
            return HubEvent::Link(endpoint, LinkEvent::Established { params, private_data });
        };
        let rejected = |private_data| HubEvent::Link(endpoint, LinkEvent::Rejected { reason: 28, private_data });
        match lie {
            Tampering::AcceptKind => private_data[0] ^= 1 + (random % 255) as u8,
            Tampering::NoReceives => private_data[2..4].fill(0),
            Tampering::NoAcceptData => private_data.clear(),
            Tampering::RejectNoise => {
                let mut noise = [0; 148];
                Rng::new(random).fill(&mut noise);
                return rejected(PrivateData::from_slice(&noise));
            }
            _ => return rejected(PrivateData::new()),
        }
        HubEvent::Link(endpoint, LinkEvent::Established { params, private_data })
    }
}

/// A fabric whose peers lie.
pub struct TamperedFabric {
    fabric: SimFabric,
    by: Tamperer,
}

impl Fabric for TamperedFabric {
    fn devices(&self) -> io::Result<Vec<DeviceInfo>> {
        self.fabric.devices()
    }

    fn listen(&self, addr: SocketAddr, backlog: u32) -> io::Result<Box<dyn Listener>> {
        self.fabric.listen(addr, backlog)
    }

    fn connect(&self, addr: SocketAddr, timeout_ms: u32) -> io::Result<Box<dyn Connecting>> {
        Ok(Box::new(Way { way: self.fabric.connect(addr, timeout_ms)?, by: self.by.clone() }))
    }
}

struct Way {
    way: Box<dyn Connecting>,
    by: Tamperer,
}

impl Connecting for Way {
    fn poll(&mut self) -> io::Result<Option<Box<dyn Link>>> {
        let link = self.way.poll()?;
        Ok(link.map(|link| Box::new(TamperedLink { link, by: self.by.clone() }) as Box<dyn Link>))
    }

    fn source(&self) -> Source {
        self.way.source()
    }
}

struct TamperedLink {
    link: Box<dyn Link>,
    by: Tamperer,
}

impl Link for TamperedLink {
    fn device(&self) -> DeviceInfo {
        self.link.device()
    }

    fn limits(&self) -> Limits {
        self.link.limits()
    }

    fn local_addr(&self) -> SocketAddr {
        self.link.local_addr()
    }

    fn peer_addr(&self) -> SocketAddr {
        self.link.peer_addr()
    }

    fn hub(&self, config: HubConfig) -> io::Result<Box<dyn Hub>> {
        Ok(Box::new(TamperedHub { hub: self.link.hub(config)?, by: self.by.clone(), fresh: Vec::new() }))
    }

    fn reject(self: Box<Self>, private_data: &[u8]) -> io::Result<()> {
        self.link.reject(private_data)
    }
}

struct TamperedHub {
    hub: Box<dyn Hub>,
    by: Tamperer,
    fresh: Vec<Done>,
}

impl Hub for TamperedHub {
    fn limits(&self) -> &Limits {
        self.hub.limits()
    }

    fn device(&self) -> &DeviceInfo {
        self.hub.device()
    }

    fn is_on(&self, link: &dyn Link) -> bool {
        let any: &dyn Any = link;
        any.downcast_ref::<TamperedLink>().is_some_and(|link| self.hub.is_on(&*link.link))
    }

    fn register(&mut self, pool: &BufferPool, remote: bool) -> io::Result<()> {
        self.hub.register(pool, remote)
    }

    fn messages(&mut self, count: usize, bytes: usize) -> io::Result<Vec<Buffer>> {
        self.hub.messages(count, bytes)
    }

    fn attach(&mut self, link: Box<dyn Link>, depths: QueueDepths) -> io::Result<EndpointId> {
        let any: Box<dyn Any> = link;
        self.hub.attach(any.downcast::<TamperedLink>().expect("a link of the same fabric").link, depths)
    }

    fn connect(&mut self, endpoint: EndpointId, params: ConnectParams, private_data: &[u8]) -> io::Result<()> {
        self.hub.connect(endpoint, params, private_data)
    }

    fn accept(&mut self, endpoint: EndpointId, params: ConnectParams, private_data: &[u8]) -> io::Result<()> {
        self.hub.accept(endpoint, params, private_data)
    }

    fn disconnect(&mut self, endpoint: EndpointId) {
        self.hub.disconnect(endpoint);
    }

    fn detach(&mut self, endpoint: EndpointId, back: &mut dyn FnMut(Done)) {
        self.hub.detach(endpoint, back);
    }

    fn local_addr(&self, endpoint: EndpointId) -> SocketAddr {
        self.hub.local_addr(endpoint)
    }

    fn peer_addr(&self, endpoint: EndpointId) -> SocketAddr {
        self.hub.peer_addr(endpoint)
    }

    fn has_shared_receives(&self) -> bool {
        self.hub.has_shared_receives()
    }

    fn post_receive(&mut self, endpoint: Option<EndpointId>, buffer: Buffer) -> Result<(), (Buffer, io::Error)> {
        self.hub.post_receive(endpoint, buffer)
    }

    fn room(&self, endpoint: EndpointId) -> u32 {
        self.hub.room(endpoint)
    }

    fn post(&mut self, endpoint: EndpointId, post: Post) -> Result<(), Box<Refused>> {
        self.hub.post(endpoint, post)
    }

    fn flush(&mut self) {
        self.hub.flush();
    }

    fn doorbells(&self) -> Doorbells {
        self.hub.doorbells()
    }

    fn poll(&mut self, out: &mut Vec<Done>) -> io::Result<usize> {
        let count = self.hub.poll(&mut self.fresh)?;
        out.extend(self.fresh.drain(..).map(|done| self.by.work(done)));
        Ok(count)
    }

    fn events(&mut self, out: &mut Vec<HubEvent>) -> io::Result<()> {
        let mut fresh = Vec::new();
        self.hub.events(&mut fresh)?;
        out.extend(fresh.into_iter().map(|event| self.by.event(event)));
        Ok(())
    }

    fn arm(&mut self) -> io::Result<()> {
        self.hub.arm()
    }

    fn source(&self) -> Source {
        self.hub.source()
    }

    fn expose(&mut self, data: Buffers) -> Result<ExposedId, (Buffers, io::Error)> {
        self.hub.expose(data)
    }

    fn exposed(&self, id: ExposedId) -> &[Remote] {
        self.hub.exposed(id)
    }

    fn reclaim(&mut self, id: ExposedId) -> Buffers {
        self.hub.reclaim(id)
    }
}
