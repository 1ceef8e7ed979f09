//! A host and a target, each with reactors of its own, on one thread and one virtual clock, with sockets between them.
#![allow(dead_code)] // Each test uses its part.

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bdev::conformance::world::{Started, VirtualClock};
use bdev::conformance::{World, WorldConfig};
use bdev::core::BdevSystem;
use initiator::path::{Address, Site};
use initiator::system::{Attach, Multipath};
use initiator::{InitiatorSystem, Part};
use nvmf::host::ReconnectPolicy;
use nvmf::target::model::{NewListener, NewSubsystem};
use nvmf::target::poll_group::groups::PollGroups;
use nvmf::target::poll_group::{Loads, PollGroup};
use nvmf::target::shared::ControllerTable;
use nvmf::target::system::NvmfSystem;
use nvmf::target::view::{ListenAddress, TransportKind, TransportOptions};
use nvmf::tcp::host_transport::TcpHost;
use nvmf::tcp::transport::TcpTransport;
use reactor::buffer::Region;
use reactor::file::{EngineChoice, FileEngine, Files};
use reactor::net::Network;
use reactor::park::Parker;
use reactor::platform::OsPlatform;
use reactor::{Clock, Platform};
use serde_json::Value;

pub const NQN: &str = "nqn.2026-11.io.ringstone:test";
pub const HOST: &str = "nqn.2026-11.io.ringstone:host";

/// The machine under a virtual clock that both sides share.
struct Machine {
    host: OsPlatform,
    clock: Arc<VirtualClock>,
}

impl Platform for Machine {
    fn clock(&self) -> Arc<dyn Clock> {
        Arc::clone(&self.clock) as Arc<dyn Clock>
    }

    fn network(&self) -> Arc<dyn Network> {
        self.host.network()
    }

    fn files(&self) -> Arc<dyn Files> {
        self.host.files()
    }

    fn parker(&self) -> io::Result<Box<dyn Parker>> {
        self.host.parker()
    }

    fn file_engine(&self, region: Region, parker: &mut dyn Parker) -> io::Result<Box<dyn FileEngine>> {
        self.host.file_engine(region, parker)
    }

    fn random(&self, bytes: &mut [u8]) {
        self.host.random(bytes);
    }

    fn pin(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
}

/// A target on reactors of its own.
pub struct Target {
    pub world: World,
    pub nvmf: Arc<NvmfSystem>,
    pub bdevs: Arc<BdevSystem>,
}

impl Target {
    fn new(platform: &Arc<Machine>, seed: u64) -> Target {
        let config = WorldConfig { io_pool: 1024, seed, ..WorldConfig::default() };
        let config =
            WorldConfig { buffers: reactor::buffer::PoolConfig { small: 512, medium: 128, large: 64 }, ..config };
        let mut world = World::new(Arc::clone(platform) as _, config, Box::new(|_| {}));
        let controllers = Arc::new(ControllerTable::default());
        let loads = Arc::new(Loads::new(world.reactor_count()));
        for n in 0..world.reactor_count() {
            PollGroup::install(world.context(n), Arc::clone(&controllers), Arc::clone(&loads));
        }
        let bdevs = Arc::clone(world.system());
        let transports = vec![Arc::new(TcpTransport::new(platform.network())) as _];
        let groups = Arc::new(PollGroups::new(bdevs.reactors().to_vec()));
        let nvmf = NvmfSystem::new(Arc::clone(&bdevs), controllers, transports, groups);
        world.block_on(nvmf.create_transport(TransportKind::Tcp, TransportOptions::default())).expect("there is TCP");
        let new =
            NewSubsystem { nqn: NQN.into(), allow_any_host: true, ana_reporting: true, ..NewSubsystem::default() };
        world.block_on(nvmf.create_subsystem(new)).expect("a subsystem");
        Target { world, nvmf, bdevs }
    }

    /// Listens on a free port, and says on which.
    pub fn listen(&mut self) -> SocketAddr {
        self.listen_for(NQN)
    }

    /// The same, for another subsystem.
    pub fn listen_for(&mut self, nqn: &str) -> SocketAddr {
        let ip = IpAddr::V4(Ipv4Addr::LOCALHOST);
        for _ in 0..100 {
            // Free a moment ago.
            let port = std::net::TcpListener::bind((ip, 0)).and_then(|l| l.local_addr()).expect("a port").port();
            let address = ListenAddress { trtype: TransportKind::Tcp, traddr: ip, trsvcid: port };
            let new = NewListener { address, ana_state: None, sock_impl: None };
            if self.world.block_on(self.nvmf.add_listener(nqn, new)).is_ok() {
                return SocketAddr::new(ip, port);
            }
        }
        panic!("no port is free");
    }
}

/// Both sides.
pub struct Pair {
    pub host: World,
    pub initiator: Arc<InitiatorSystem>,
    pub target: Rc<RefCell<Target>>,
}

impl Pair {
    pub fn new(config: WorldConfig) -> Pair {
        let clock = Arc::new(VirtualClock::default());
        let machine = Arc::new(Machine { host: OsPlatform::new(EngineChoice::Threads), clock: Arc::clone(&clock) });
        let target = Rc::new(RefCell::new(Target::new(&machine, config.seed)));
        let (stepped, ticking) = (Rc::clone(&target), Arc::clone(&clock));
        let after_step = Box::new(move |busy: bool| {
            ticking.advance(Duration::from_micros(1));
            if let Ok(mut target) = stepped.try_borrow_mut() {
                target.world.step();
            }
            if !busy {
                std::thread::yield_now();
            }
        });
        let network = machine.network();
        let mut host = World::new(machine, config, after_step);
        for n in 0..host.reactor_count() {
            Part::install(host.context(n));
        }
        let initiator = InitiatorSystem::new(host.system(), vec![Arc::new(TcpHost { network })]);
        Pair { host, initiator, target }
    }
}

/// Starts a task of the target's control plane from a task of the host's, and waits for it.
pub async fn on_target<R: Send + 'static>(started: Started<R>) -> R {
    std::future::poll_fn(move |_| started.take().map_or(Poll::Pending, Poll::Ready)).await
}

pub fn attach(name: &str, socket: SocketAddr) -> Attach {
    Attach {
        name: name.into(),
        address: Address { site: Site::tcp(socket), subnqn: NQN.into(), hostnqn: HOST.into() },
        digests: (false, false),
        multipath: Multipath::Multipath,
        reconnect: ReconnectPolicy::from_seconds(60, 1, 0).expect("a policy"),
        step_timeout: None,
        mode: None,
        max_bdevs: 128,
        owner: None,
        params: Value::Null,
    }
}
