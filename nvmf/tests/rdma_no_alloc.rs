//! The target over RDMA, on a device that does all work at once: no memory is taken for an I/O once it runs, from the capsule to
//! the response, and what is answered in one poll is one list of work for the device.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use bdev::conformance::{World, WorldConfig};
use bdev::modules::malloc::{self, MallocOptions};
use reactor::buffer::PoolConfig;
use reactor::file::EngineChoice;
use reactor::park::Source;
use reactor::rdma::*;
use reactor::{Buffer, BufferPool, Buffers};
use ringstone_nvmf::rdma::capsule::SQE_BYTES;
use ringstone_nvmf::rdma::transport::RdmaTransport;
use ringstone_nvmf::spec::fabrics::ConnectData;
use ringstone_nvmf::spec::opcode;
use ringstone_nvmf::spec::rdma::ConnectRequest;
use ringstone_nvmf::spec::sqe::Sgl;
use ringstone_nvmf::spec::{Cqe, Sqe};
use ringstone_nvmf::target::model::{NewListener, NewNamespace, NewSubsystem};
use ringstone_nvmf::target::poll_group::groups::PollGroups;
use ringstone_nvmf::target::poll_group::{Loads, PollGroup};
use ringstone_nvmf::target::shared::ControllerTable;
use ringstone_nvmf::target::system::NvmfSystem;
use ringstone_nvmf::target::view::{ListenAddress, TransportKind, TransportOptions};
use ringstone_nvmf::tcp::wire_client::{self, with_descriptor};
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

const NQN: &str = "nqn.2026-11.io.ringstone:test";
const DEPTH: u16 = 32;
const BLOCK: u32 = 4096;
const LIMITS: Limits = Limits {
    qp_wr: 4096,
    sge: 16,
    cqe: 65_536,
    srq_wr: 4096,
    responder_resources: 16,
    initiator_depth: 64,
    ports: 1,
    mem_mgt_extensions: true,
};

/// A capsule on its way: to which endpoint, its entry, and the bytes behind it.
type Capsule = (usize, Sqe, usize);

/// The device, with the host's memory. Nothing here takes memory once its lists have grown.
struct Device {
    requests: VecDeque<ConnectRequest>,
    endpoints: usize,
    staged_receives: usize,
    receives: VecDeque<Buffer>,
    staged: VecDeque<(EndpointId, Post)>,
    done: VecDeque<Done>,
    capsules: VecDeque<Capsule>,
    responses: Vec<(usize, Cqe)>,
    memory: Vec<u8>,
    doorbells: Doorbells,
    chains: u64,
}

impl Device {
    fn perform(&mut self, endpoint: EndpointId, mut post: Post) {
        let mut at = post.start as usize;
        for transfer in &post.transfers {
            let bytes = transfer.bytes as usize;
            match transfer.operation {
                Operation::Write { address, .. } => {
                    post.data.read_at(at, &mut self.memory[address as usize..][..bytes]);
                }
                Operation::Read { address, .. } => post.data.write_at(at, &self.memory[address as usize..][..bytes]),
                other => panic!("{other:?}"),
            }
            at += bytes;
        }
        let head = post.message.map(|message| {
            self.responses.push((endpoint.0, Cqe::read_from_bytes(&message.head).expect("a response")));
            message.head
        });
        let status = WorkStatus::Success;
        self.done.push_back(Done::Posted { endpoint, user: post.user, data: post.data, head, status });
    }
}

#[derive(Clone)]
struct Loop(Arc<Mutex<Device>>, Arc<(UnixStream, UnixStream)>);

impl Loop {
    fn new() -> Loop {
        let many = 4 * usize::from(DEPTH);
        let device = Device {
            requests: VecDeque::new(),
            endpoints: 0,
            staged_receives: 0,
            receives: VecDeque::with_capacity(many),
            staged: VecDeque::with_capacity(many),
            done: VecDeque::with_capacity(many),
            capsules: VecDeque::with_capacity(many),
            responses: Vec::with_capacity(many),
            memory: vec![7; 8 << 20],
            doorbells: Doorbells::default(),
            chains: 0,
        };
        Loop(Arc::new(Mutex::new(device)), Arc::new(UnixStream::pair().expect("two sockets")))
    }

    fn device(&self) -> MutexGuard<'_, Device> {
        self.0.lock().expect("nobody panicked")
    }
}

impl Fabric for Loop {
    fn devices(&self) -> io::Result<Vec<DeviceInfo>> {
        Ok(vec![self.clone().device_info()])
    }

    fn listen(&self, _: SocketAddr, _: u32) -> io::Result<Box<dyn Listener>> {
        Ok(Box::new(self.clone()))
    }

    fn connect(&self, _: SocketAddr, _: u32) -> io::Result<Box<dyn Connecting>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Loop {
    fn device_info(&self) -> DeviceInfo {
        DeviceInfo { name: "loop".into(), iwarp: false }
    }
}

impl Listener for Loop {
    fn next(&mut self) -> io::Result<Option<Request>> {
        let params = ConnectParams { responder_resources: 0, initiator_depth: 64, rnr_retry_count: 7 };
        let asked = self.device().requests.pop_front();
        Ok(asked.map(|asked| Request {
            link: Box::new(self.clone()),
            params,
            private_data: PrivateData::from_slice(asked.data().as_bytes()),
        }))
    }

    fn local_addr(&self) -> SocketAddr {
        "127.0.0.1:4420".parse().expect("an address")
    }

    fn source(&self) -> Source {
        Source::Fd(self.1.0.as_raw_fd())
    }
}

impl Link for Loop {
    fn device(&self) -> DeviceInfo {
        self.device_info()
    }

    fn limits(&self) -> Limits {
        LIMITS
    }

    fn local_addr(&self) -> SocketAddr {
        Listener::local_addr(self)
    }

    fn peer_addr(&self) -> SocketAddr {
        Listener::local_addr(self)
    }

    fn hub(&self, _: HubConfig) -> io::Result<Box<dyn Hub>> {
        let sockets = UnixStream::pair()?;
        Ok(Box::new(LoopHub { on: self.clone(), info: self.device_info(), sockets }))
    }

    fn reject(self: Box<Self>, private_data: &[u8]) -> io::Result<()> {
        panic!("a connection was refused: {private_data:?}")
    }
}

struct LoopHub {
    on: Loop,
    info: DeviceInfo,
    sockets: (UnixStream, UnixStream),
}

impl LoopHub {
    fn ring_receives(&self) {
        let mut device = self.on.device();
        if std::mem::take(&mut device.staged_receives) > 0 {
            device.doorbells.receives += 1;
        }
    }
}

impl Hub for LoopHub {
    fn limits(&self) -> &Limits {
        &LIMITS
    }

    fn device(&self) -> &DeviceInfo {
        &self.info
    }

    fn is_on(&self, _: &dyn Link) -> bool {
        true
    }

    fn register(&mut self, _: &BufferPool, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn messages(&mut self, count: usize, bytes: usize) -> io::Result<Vec<Buffer>> {
        Ok((0..count).map(|_| Buffer::heap(bytes)).collect())
    }

    fn attach(&mut self, _: Box<dyn Link>, _: QueueDepths) -> io::Result<EndpointId> {
        let mut device = self.on.device();
        device.endpoints += 1;
        Ok(EndpointId(device.endpoints - 1))
    }

    fn connect(&mut self, _: EndpointId, _: ConnectParams, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn accept(&mut self, _: EndpointId, _: ConnectParams, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn disconnect(&mut self, _: EndpointId) {}

    fn detach(&mut self, _: EndpointId, _: &mut dyn FnMut(Done)) {}

    fn local_addr(&self, _: EndpointId) -> SocketAddr {
        Listener::local_addr(&self.on)
    }

    fn peer_addr(&self, _: EndpointId) -> SocketAddr {
        Listener::local_addr(&self.on)
    }

    fn has_shared_receives(&self) -> bool {
        true
    }

    fn post_receive(&mut self, _: Option<EndpointId>, buffer: Buffer) -> Result<(), (Buffer, io::Error)> {
        let mut device = self.on.device();
        device.receives.push_back(buffer);
        device.staged_receives += 1;
        Ok(())
    }

    fn room(&self, _: EndpointId) -> u32 {
        LIMITS.qp_wr
    }

    fn post(&mut self, endpoint: EndpointId, post: Post) -> Result<(), Box<Refused>> {
        self.on.device().staged.push_back((endpoint, post));
        Ok(())
    }

    fn flush(&mut self) {
        self.ring_receives();
        let mut device = self.on.device();
        device.doorbells.sends += u64::from(!device.staged.is_empty());
        while let Some((endpoint, post)) = device.staged.pop_front() {
            device.chains += 1;
            device.perform(endpoint, post);
        }
    }

    fn doorbells(&self) -> Doorbells {
        self.on.device().doorbells
    }

    fn poll(&mut self, out: &mut Vec<Done>) -> io::Result<usize> {
        self.ring_receives();
        let mut device = self.on.device();
        let mut found = device.done.len();
        out.extend(device.done.drain(..));
        while let Some((endpoint, sqe, behind)) = device.capsules.pop_front() {
            let mut buffer = device.receives.pop_front().expect("a receive for each entry of a queue");
            buffer[..SQE_BYTES].copy_from_slice(sqe.as_bytes());
            let endpoint = Some(EndpointId(endpoint));
            let bytes = (SQE_BYTES + behind) as u32;
            buffer[SQE_BYTES..bytes as usize].copy_from_slice(&device.memory[..behind]);
            let status = WorkStatus::Success;
            out.push(Done::Received { endpoint, buffer, bytes, invalidated: None, status });
            found += 1;
        }
        Ok(found)
    }

    fn events(&mut self, _: &mut Vec<HubEvent>) -> io::Result<()> {
        Ok(())
    }

    fn arm(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn source(&self) -> Source {
        Source::Fd(self.sockets.0.as_raw_fd())
    }

    fn expose(&mut self, data: Buffers) -> Result<ExposedId, (Buffers, io::Error)> {
        Err((data, io::ErrorKind::Unsupported.into()))
    }

    fn exposed(&self, _: ExposedId) -> &[Remote] {
        &[]
    }

    fn reclaim(&mut self, _: ExposedId) -> Buffers {
        Buffers::new()
    }
}

/// A target with one namespace, and a host's admin and I/O queue.
struct Stage {
    world: World,
    device: Loop,
    _nvmf: Arc<NvmfSystem>,
}

fn keyed(sqe: Sqe, address: u64, len: u32) -> Sqe {
    with_descriptor(sqe, Sgl::Keyed { address, len, key: 1, invalidate: true }.into())
}

impl Stage {
    fn new() -> Stage {
        let buffers = PoolConfig { small: 256, medium: 64, large: 64 };
        let config = WorldConfig { reactors: 1, io_pool: 256, buffers, ..WorldConfig::default() };
        let mut world = World::on_host(EngineChoice::Threads, config);
        let device = Loop::new();
        let controllers = Arc::new(ControllerTable::default());
        PollGroup::install(world.context(0), Arc::clone(&controllers), Arc::new(Loads::new(1)));
        let bdevs = Arc::clone(world.system());
        let transports = vec![Arc::new(RdmaTransport::new(Arc::new(device.clone()))) as _];
        let groups = Arc::new(PollGroups::new(bdevs.reactors().to_vec()));
        let nvmf = NvmfSystem::new(Arc::clone(&bdevs), controllers, transports, groups);
        world.block_on(async {
            malloc::create(&bdevs, "disk", None, MallocOptions::new(BLOCK, 4096)).await.expect("a bdev");
            nvmf.create_transport(TransportKind::Rdma, TransportOptions::default()).await.expect("a device");
            let new = NewSubsystem { nqn: NQN.into(), allow_any_host: true, ..NewSubsystem::default() };
            nvmf.create_subsystem(new).await.expect("a subsystem");
            nvmf.add_namespace(NQN, NewNamespace::default(), "disk").await.expect("a namespace");
            let at = Listener::local_addr(&device);
            let address = ListenAddress { trtype: TransportKind::Rdma, traddr: at.ip(), trsvcid: at.port() };
            nvmf.add_listener(NQN, NewListener { address, ana_state: None, sock_impl: None }).await.expect("listening");
        });
        let mut stage = Stage { world, device, _nvmf: nvmf };
        let cntlid = stage.join(0, 0xffff);
        stage.run(0, &[(wire_client::property_set(1, 0x14, 0x0046_0001), 0)]);
        stage.join(1, cntlid);
        stage
    }

    fn join(&mut self, qid: u16, cntlid: u16) -> u16 {
        let entries = DEPTH + 1;
        let asked = ConnectRequest { qid, send_entries: entries.into(), receive_entries: entries.into(), cntlid: None };
        let mut data = ConnectData::new_zeroed();
        data.hostid = [3; 16];
        data.cntlid = U16::new(cntlid);
        data.subnqn[..NQN.len()].copy_from_slice(NQN.as_bytes());
        data.hostnqn[..NQN.len()].copy_from_slice(NQN.as_bytes());
        let device = self.device.clone();
        let before = device.device().endpoints;
        device.device().memory[..1024].copy_from_slice(data.as_bytes());
        device.device().requests.push_back(asked);
        (&device.1.1).write_all(&[1]).expect("the listener is there");
        self.world.step_until("the connection", |_| device.device().endpoints > before);
        let sqe = wire_client::connect(1, qid, entries, 0, false);
        self.run(before, &[(sqe, 1024)])[0].result() as u16
    }

    /// Delivers these commands at once, and steps the target until all are answered.
    fn run(&mut self, endpoint: usize, commands: &[(Sqe, usize)]) -> Vec<Cqe> {
        self.measured(endpoint, commands);
        let mut device = self.device.device();
        let responses: Vec<Cqe> = device.responses.drain(..).map(|(_, cqe)| cqe).collect();
        for cqe in &responses {
            assert!(cqe.status().is_success(), "{:?}", cqe.status());
        }
        responses
    }

    /// The same; how much memory the target took meanwhile.
    fn measured(&mut self, endpoint: usize, commands: &[(Sqe, usize)]) -> u64 {
        self.device.device().capsules.extend(commands.iter().map(|(sqe, behind)| (endpoint, *sqe, *behind)));
        let before = allocations::count();
        let mut steps = 0;
        while self.device.device().responses.len() < commands.len() {
            self.world.step();
            steps += 1;
            assert!(steps < 1_000_000, "the target does not answer");
        }
        allocations::count() - before
    }
}

#[test]
fn io_over_rdma_takes_no_memory_and_few_doorbells() {
    let mut stage = Stage::new();
    let memory = |n: u16| u64::from(n) << 14;
    let commands = |make: &dyn Fn(u16) -> (Sqe, usize)| (0..DEPTH).map(make).collect::<Vec<_>>();
    // What it is; how many lists of work the device gets for all of it; how many chains each command is.
    let batches = [
        ("reads", commands(&|n| (keyed(wire_client::read(n, 1, n.into(), 1, BLOCK), memory(n), BLOCK), 0)), 1, 1),
        (
            "long reads",
            commands(&|n| (keyed(wire_client::read(n, 1, n.into(), 4, 4 * BLOCK), memory(n), 4 * BLOCK), 0)),
            1,
            1,
        ),
        ("writes", commands(&|n| (keyed(wire_client::write(n, 1, n.into(), 1, BLOCK), memory(n), BLOCK), 0)), 2, 2),
        (
            "writes in capsules",
            commands(&|n| (wire_client::write_in_capsule(n, 1, n.into(), 1, BLOCK), BLOCK as usize)),
            1,
            1,
        ),
        ("flushes", commands(&|n| (wire_client::command(opcode::io::FLUSH, n, 1), 0)), 1, 1),
    ];
    let (mut rounds, mut quiet, mut most) = (0, 0, 0);
    for turn in 0..40 {
        for (name, batch, lists, chains) in &batches {
            let before = {
                let device = stage.device.device();
                (device.doorbells, device.chains)
            };
            let allocations = stage.measured(1, batch);
            // The ends of the last chains come back.
            stage.world.step();
            {
                let mut device = stage.device.device();
                assert!(device.responses.drain(..).all(|(at, cqe)| at == 1 && cqe.status().is_success()), "{name}");
                assert_eq!(device.chains - before.1, chains * u64::from(DEPTH), "{name}");
                assert_eq!(device.doorbells.sends - before.0.sends, *lists, "{name}: lists of work");
                assert_eq!(device.doorbells.receives - before.0.receives, 1, "{name}: lists of receives");
            }
            // Queues grow to their working size in the first rounds.
            if turn >= 10 {
                rounds += 1;
                quiet += u32::from(allocations == 0);
                most = most.max(allocations);
            }
        }
    }
    // What comes by time is no matter of I/O.
    assert!(quiet * 10 > rounds * 9 && most < 8, "{quiet} of {rounds} rounds without, at most {most} in a round");
}
