//! The host's side of NVMe/RDMA takes no memory for a command once it runs, and registers none: what is in the reactor's pool goes
//! by the key of the pool, what is not through memory of the hub's. One hub serves all queue pairs of a reactor on a device.
//!
//! The device is simulated as far as a host sees it, and takes no memory either.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use reactor::buffer::{PoolConfig, Region};
use reactor::file::EngineChoice;
use reactor::park::Source;
use reactor::platform::OsPlatform;
use reactor::rdma::{
    ConnectParams, Connecting, DeviceInfo, Done, Doorbells, EndpointId, ExposedId, Fabric, Hub, HubConfig, HubEvent,
    Limits, Link, LinkEvent, Listener, Post, PrivateData, QueueDepths, Refused, Remote, WorkStatus,
};
use reactor::reactor::{PollPolicy, Reactor, ReactorConfig};
use reactor::{Buffer, BufferPool, Buffers, ReactorId};
use ringstone_nvmf::host::transport::PayloadMemory;
use ringstone_nvmf::host::{Completion, Connector, Payload, Qpair, QueueName, commands};
use ringstone_nvmf::rdma::host_transport::RdmaConnector;
use ringstone_nvmf::spec::opcode::io as opcode;
use ringstone_nvmf::spec::rdma::AcceptData;
use ringstone_nvmf::spec::sqe::Sgl;
use ringstone_nvmf::spec::{Cqe, Sqe};
use zerocopy::{FromBytes, IntoBytes};

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

const SLOTS: u16 = 32;
const IN_CAPSULE: u32 = 4096;

/// What the device was asked for.
#[derive(Default)]
struct Counts {
    hubs: AtomicUsize,
    pools: AtomicUsize,
    /// Memory that was registered for a command.
    commands: AtomicUsize,
    in_capsule: AtomicUsize,
}

struct Device(Arc<Counts>);

impl Fabric for Device {
    fn devices(&self) -> io::Result<Vec<DeviceInfo>> {
        Ok(vec![info()])
    }

    fn listen(&self, _: SocketAddr, _: u32) -> io::Result<Box<dyn Listener>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn connect(&self, addr: SocketAddr, _: u32) -> io::Result<Box<dyn Connecting>> {
        Ok(Box::new(Way { counts: Arc::clone(&self.0), addr, fd: UnixStream::pair()?.0 }))
    }
}

fn info() -> DeviceInfo {
    DeviceInfo { name: "none0".into(), iwarp: false }
}

fn limits() -> Limits {
    Limits { qp_wr: 4096, sge: 16, cqe: 65536, responder_resources: 16, ports: 1, ..Limits::default() }
}

struct Way {
    counts: Arc<Counts>,
    addr: SocketAddr,
    fd: UnixStream,
}

impl Connecting for Way {
    fn poll(&mut self) -> io::Result<Option<Box<dyn Link>>> {
        Ok(Some(Box::new(End { counts: Arc::clone(&self.counts), addr: self.addr })))
    }

    fn source(&self) -> Source {
        Source::Fd(self.fd.as_raw_fd())
    }
}

struct End {
    counts: Arc<Counts>,
    addr: SocketAddr,
}

impl Link for End {
    fn device(&self) -> DeviceInfo {
        info()
    }

    fn limits(&self) -> Limits {
        limits()
    }

    fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    fn peer_addr(&self) -> SocketAddr {
        self.addr
    }

    fn hub(&self, config: HubConfig) -> io::Result<Box<dyn Hub>> {
        self.counts.hubs.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(Queues {
            counts: Arc::clone(&self.counts),
            limits: limits(),
            info: info(),
            addr: self.addr,
            fds: UnixStream::pair()?,
            pools: Vec::new(),
            receives: Vec::new(),
            rooms: Vec::new(),
            done: VecDeque::with_capacity(config.completions as usize),
            events: Vec::new(),
            exposed: (0..256).map(|_| None).collect(),
        }))
    }

    fn reject(self: Box<Self>, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

/// A hub whose peers answer at once: reads give bytes that say where they are from, writes are counted.
struct Queues {
    counts: Arc<Counts>,
    limits: Limits,
    info: DeviceInfo,
    addr: SocketAddr,
    /// What is watched, and its other end: a byte there is an event.
    fds: (UnixStream, UnixStream),
    pools: Vec<Region>,
    receives: Vec<VecDeque<Buffer>>,
    rooms: Vec<u32>,
    done: VecDeque<Done>,
    events: Vec<HubEvent>,
    exposed: Vec<Option<(Buffers, Remote)>>,
}

impl Queues {
    fn knows(&self, data: &mut Buffers) -> bool {
        data.buffers_mut().iter().all(|buffer| self.pools.iter().any(|pool| buffer.in_region(pool)))
    }

    fn answer(&mut self, endpoint: EndpointId, head: &Buffer, mut tail: Option<&mut Buffers>) {
        let sqe = Sqe::read_from_prefix(head).expect("a capsule begins with an entry").0;
        match sqe.dptr.parse().expect("a descriptor") {
            Sgl::Keyed { address, len, .. } => {
                let at = self.exposed.iter_mut().flatten().find(|(_, remote)| remote.address == address);
                let (data, remote) = at.expect("what is named is exposed");
                assert_eq!(remote.bytes, len);
                if sqe.opcode == opcode::READ {
                    data.fill(sqe.cdw10.get() as u8);
                }
            }
            _ => {
                let tail = tail.take().expect("its data is in the capsule");
                assert!(self.knows(tail), "a device sends what it knows");
                self.counts.in_capsule.fetch_add(1, Ordering::Relaxed);
            }
        }
        let mut buffer = self.receives[endpoint.0].pop_front().expect("a receive for each response");
        let cqe = Cqe::success(sqe.cid.get());
        buffer[..size_of::<Cqe>()].copy_from_slice(cqe.as_bytes());
        let (bytes, status) = (size_of::<Cqe>() as u32, WorkStatus::Success);
        self.done.push_back(Done::Received { endpoint: Some(endpoint), buffer, bytes, invalidated: None, status });
    }
}

impl Hub for Queues {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn is_on(&self, _: &dyn Link) -> bool {
        true
    }

    fn register(&mut self, pool: &BufferPool, _: bool) -> io::Result<()> {
        self.counts.pools.fetch_add(1, Ordering::Relaxed);
        self.pools.push(pool.region());
        Ok(())
    }

    fn messages(&mut self, count: usize, bytes: usize) -> io::Result<Vec<Buffer>> {
        Ok((0..count).map(|_| Buffer::heap(bytes)).collect())
    }

    fn attach(&mut self, _: Box<dyn Link>, depths: QueueDepths) -> io::Result<EndpointId> {
        self.receives.push(VecDeque::with_capacity(depths.receive as usize));
        self.rooms.push(depths.send);
        Ok(EndpointId(self.receives.len() - 1))
    }

    fn connect(&mut self, endpoint: EndpointId, params: ConnectParams, _: &[u8]) -> io::Result<()> {
        let private_data = PrivateData::from_slice(AcceptData::new(SLOTS + 1).as_bytes());
        self.events.push(HubEvent::Link(endpoint, LinkEvent::Established { params, private_data }));
        self.fds.1.write_all(&[0])
    }

    fn accept(&mut self, _: EndpointId, _: ConnectParams, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn disconnect(&mut self, _: EndpointId) {}

    fn detach(&mut self, endpoint: EndpointId, back: &mut dyn FnMut(Done)) {
        for buffer in self.receives[endpoint.0].drain(..) {
            let (bytes, status) = (0, WorkStatus::Flushed);
            back(Done::Received { endpoint: Some(endpoint), buffer, bytes, invalidated: None, status });
        }
    }

    fn local_addr(&self, _: EndpointId) -> SocketAddr {
        self.addr
    }

    fn peer_addr(&self, _: EndpointId) -> SocketAddr {
        self.addr
    }

    fn has_shared_receives(&self) -> bool {
        false
    }

    fn post_receive(&mut self, endpoint: Option<EndpointId>, buffer: Buffer) -> Result<(), (Buffer, io::Error)> {
        self.receives[endpoint.expect("none are shared").0].push_back(buffer);
        Ok(())
    }

    fn room(&self, endpoint: EndpointId) -> u32 {
        self.rooms[endpoint.0]
    }

    fn post(&mut self, endpoint: EndpointId, post: Post) -> Result<(), Box<Refused>> {
        let Post { user, mut data, message, .. } = post;
        let message = message.expect("hosts send messages");
        self.answer(endpoint, &message.head, message.with_data.then_some(&mut data));
        let (head, status) = (Some(message.head), WorkStatus::Success);
        self.done.push_back(Done::Posted { endpoint, user, data, head, status });
        Ok(())
    }

    fn flush(&mut self) {}

    fn doorbells(&self) -> Doorbells {
        Doorbells::default()
    }

    fn poll(&mut self, out: &mut Vec<Done>) -> io::Result<usize> {
        let count = self.done.len().min(16);
        out.extend(self.done.drain(..count));
        Ok(count)
    }

    fn events(&mut self, out: &mut Vec<HubEvent>) -> io::Result<()> {
        out.append(&mut self.events);
        Ok(())
    }

    fn arm(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn source(&self) -> Source {
        Source::Fd(self.fds.0.as_raw_fd())
    }

    fn expose(&mut self, mut data: Buffers) -> Result<ExposedId, (Buffers, io::Error)> {
        if !self.knows(&mut data) {
            self.counts.commands.fetch_add(1, Ordering::Relaxed);
        }
        assert_eq!(data.segment_count(), 1, "these are payloads of one buffer");
        let address = data.slice_at(0).as_ptr() as u64;
        let remote = Remote { address, bytes: data.len() as u32, key: 7 };
        let free = self.exposed.iter().position(Option::is_none).expect("fewer commands than that");
        self.exposed[free] = Some((data, remote));
        Ok(ExposedId(free))
    }

    fn exposed(&self, id: ExposedId) -> &[Remote] {
        std::slice::from_ref(&self.exposed[id.0].as_ref().expect("it is exposed").1)
    }

    fn reclaim(&mut self, id: ExposedId) -> Buffers {
        self.exposed[id.0].take().expect("it is exposed").0
    }
}

/// Where payloads are from.
#[derive(Clone, Copy)]
enum Memory {
    Pool,
    Elsewhere,
}

struct Host {
    reactor: Reactor,
    pool: Rc<RefCell<BufferPool>>,
    qpairs: Vec<Box<dyn Qpair>>,
    elsewhere: Vec<Buffers>,
    done: Vec<Completion>,
}

impl Host {
    fn new(counts: &Arc<Counts>, qpairs: u16) -> Host {
        let platform = Arc::new(OsPlatform::new(EngineChoice::Threads));
        let config = ReactorConfig { id: ReactorId(0), core: None, policy: PollPolicy::Busy };
        let mut reactor = Reactor::new(config, platform).expect("a reactor");
        let pool = PoolConfig { small: 256, medium: 64, large: 64 };
        let pool = Rc::new(RefCell::new(BufferPool::new(pool).expect("memory")));
        let reached = Rc::clone(&pool);
        reactor.context().insert(PayloadMemory::new(move |use_it| use_it(&reached.borrow())));
        let fabric = Arc::new(Device(Arc::clone(counts)));
        let connector = RdmaConnector { fabric, address: "192.0.2.1:4420".parse().expect("an address") };
        let made = (0..qpairs).map(|qid| connector.connect(SLOTS, QueueName { qid, cntlid: 1 }).expect("it begins"));
        let mut host = Host {
            qpairs: made.collect(),
            reactor,
            pool,
            elsewhere: (0..SLOTS).map(|_| Buffers::heap(4096)).collect(),
            done: Vec::with_capacity(2 * usize::from(SLOTS)),
        };
        for qpair in &mut host.qpairs {
            while !qpair.is_ready() {
                host.reactor.step();
                qpair.prepare(Some(host.reactor.context())).expect("there is a way");
                qpair.poll(&mut host.done).expect("it connects");
            }
            qpair.set_in_capsule_bytes(IN_CAPSULE);
            qpair.set_descriptors(1);
        }
        host
    }

    fn round(&mut self, opcode: u8, bytes: u32, memory: Memory) {
        for at in 0..self.qpairs.len() {
            for user in 0..u64::from(SLOTS) {
                let data = match memory {
                    Memory::Pool => self.pool.borrow_mut().alloc(bytes as usize).expect("there is memory"),
                    Memory::Elsewhere => self.elsewhere.pop().expect("there is some for each"),
                };
                let sqe = commands::blocks(opcode, 1, user, bytes / 512);
                let payload =
                    if opcode == opcode::READ { Payload::ToHost(bytes) } else { Payload::ToController(bytes) };
                self.qpairs[at].submit(user, sqe, payload, data);
            }
            self.qpairs[at].flush().expect("it sends");
            let mut left = SLOTS;
            while left > 0 {
                self.qpairs[at].poll(&mut self.done).expect("it lives");
                for completion in self.done.drain(..) {
                    left -= 1;
                    assert!(completion.cqe.status().is_success());
                    assert_eq!((completion.data.len(), completion.transferred_bytes), (bytes as usize, bytes));
                    if opcode == opcode::READ {
                        assert!(completion.data.segments().flatten().all(|byte| u64::from(*byte) == completion.user));
                    }
                    match memory {
                        Memory::Pool => self.pool.borrow_mut().put(completion.data),
                        Memory::Elsewhere => self.elsewhere.push(completion.data),
                    }
                }
            }
        }
    }
}

#[test]
fn a_command_takes_no_memory_and_registers_none() {
    let counts = Arc::<Counts>::default();
    let mut host = Host::new(&counts, 3);
    let kinds = [
        (opcode::READ, 4096, Memory::Pool),
        (opcode::WRITE, 4096, Memory::Pool),
        (opcode::WRITE, 16 * 1024, Memory::Pool),
        (opcode::READ, 128 * 1024, Memory::Pool),
        (opcode::READ, 4096, Memory::Elsewhere),
        (opcode::WRITE, 4096, Memory::Elsewhere),
    ];
    for (opcode, bytes, memory) in kinds {
        (0..4).for_each(|_| host.round(opcode, bytes, memory));
        let before = allocations::count();
        (0..50).for_each(|_| host.round(opcode, bytes, memory));
        assert_eq!(allocations::count() - before, 0, "opcode {opcode}, {bytes} bytes");
    }
    let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
    assert_eq!(count(&counts.hubs), 1, "all queue pairs of a reactor on one device share a hub");
    // The reactor's, and the hub's own for what is not in it.
    assert_eq!(count(&counts.pools), 2);
    assert_eq!(count(&counts.commands), 0, "memory was registered for a command");
    assert_eq!(count(&counts.in_capsule), 54 * 3 * usize::from(SLOTS), "small writes go in their capsule");
}
