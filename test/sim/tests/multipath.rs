//! Remote namespaces over two paths whose connections break and fall silent at seeded moments, over a disk that is now and
//! then a thousand times slower than usual: a write of a lost connection is still on its way to the medium when its
//! successor on the other path could already have been acknowledged. The loads' model says of every block that is read
//! whether it is the last acknowledged write, or one that was in flight, and that no write takes effect twice. Each
//! namespace has one client, whose operations overlap: only writes on one reactor have an order.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bdev::modules::malloc::{self, MallocOptions};
use bdev::modules::uring;
use initiator::path::{Address, Site};
use initiator::policy::Mode;
use initiator::system::{Attach, Multipath};
use initiator::{InitiatorSystem, Part};
use nvmf::host::ReconnectPolicy;
use nvmf::target::model::{NewListener, NewNamespace};
use nvmf::target::view::{AnaState, ListenAddress, TransportKind, TransportOptions};
use reactor::buffer::PoolConfig;
use ringstone_sim::load::{Device, Load, LoadConfig, SharedDevice};
use ringstone_sim::seeds;
use ringstone_sim::target::{NQN, Target, address, host_transports, listen_on};
use ringstone_sim::{Rng, Sim, World, WorldConfig};

const BLOCK: u32 = 4096;
/// The namespace that comes and goes.
const FLEETING: u32 = 20;

/// Seeds of a scenario that show something, each with what.
mod regressions {
    /// 45, 52, 178: writes that are sent again before the old association is fenced come to light.
    /// 356, 685, 988, 1015, 1079, 1492, 1785: a write that is sent twice has another one that overlaps between the two.
    pub const PATHS: &[u64] = &[45, 52, 178, 356, 685, 988, 1015, 1079, 1492, 1785];
}

/// Host and target on the same reactors, with I/Os and memory enough for both.
fn config(rng: &mut Rng) -> WorldConfig {
    WorldConfig {
        reactors: 1 + rng.below(3) as usize,
        io_pool: 1024,
        buffers: PoolConfig { small: 512, medium: 128, large: 64 },
        sleeps: !rng.one_in(4),
        rounds: 6_000_000,
    }
}

fn second_address() -> SocketAddr {
    SocketAddr::new(address().ip(), address().port() + 1)
}

/// The transports of the two paths.
type Kinds = [TransportKind; 2];

const TCP: Kinds = [TransportKind::Tcp; 2];
const RDMA: Kinds = [TransportKind::Rdma; 2];
const BOTH: Kinds = [TransportKind::Rdma, TransportKind::Tcp];

fn path(site: Site, mode: Mode) -> Attach {
    Attach {
        name: "Nvme0".into(),
        address: Address { site, subnqn: NQN.into(), hostnqn: "nqn.2026-11.io.ringstone:sim-host".into() },
        digests: (false, false),
        multipath: Multipath::Multipath,
        reconnect: ReconnectPolicy::from_seconds(-1, 1, 0).expect("a policy"),
        step_timeout: None,
        mode: Some(mode),
        max_bdevs: 8,
        owner: None,
        params: serde_json::Value::Null,
    }
}

fn at(site: Site) -> ListenAddress {
    listen_on(site.trtype, site.socket)
}

struct Stage {
    sites: [Site; 2],
    world: World,
    target: Target,
    initiator: Arc<InitiatorSystem>,
    rng: Rng,
    volumes: Vec<String>,
}

impl Stage {
    fn new(sim: &Arc<Sim>, [first, second]: Kinds, mut rng: Rng) -> Stage {
        let config = config(&mut rng);
        let mut world = World::new(sim, config, rng.next_u64());
        let volumes: Vec<String> = (1..=1 + rng.below(6)).map(|n| format!("vol{n}")).collect();
        for name in &volumes {
            let path = PathBuf::from(format!("/volumes/{name}.img"));
            let blocks = 8 + rng.below(40);
            world.platform().files().create(&path, blocks * u64::from(BLOCK)).expect("a new file");
            let flavor = uring::Flavor::Uring;
            let options =
                uring::FileOptions { flavor, path, block_size: Some(BLOCK), read_only: false, fallocate: None };
            let (system, name) = (Arc::clone(world.system()), name.clone());
            let made = async move { uring::create(&system, &name, None, options).await.map(drop) };
            world.block_on("the volume", made).expect("the volume can be made");
        }
        let sites = [Site { trtype: first, socket: address() }, Site { trtype: second, socket: second_address() }];
        let options = TransportOptions { max_io_size: 131_072, ..TransportOptions::default() };
        let target = Target::install_over(&mut world, first, options.clone());
        if second != first {
            target.add_transport(&mut world, second, options);
        }
        target.serve(&mut world, &volumes);
        let nvmf = Arc::clone(&target.nvmf);
        let listener = NewListener { address: at(sites[1]), ana_state: None, sock_impl: None };
        world
            .block_on("the second listener", async move { nvmf.add_listener(NQN, listener).await })
            .expect("it listens");
        for n in 0..world.reactor_count() {
            Part::install(world.context(n));
        }
        let initiator = InitiatorSystem::new(world.system(), host_transports(&world));
        let mode = match rng.below(3) {
            0 => Mode::ActivePassive,
            1 => Mode::RoundRobin { min_io: 1 + rng.below(3) as u32 },
            _ => Mode::QueueDepth,
        };
        let mut stage = Stage { sites, world, target, initiator, rng, volumes };
        for site in sites {
            let initiator = Arc::clone(&stage.initiator);
            let attached = stage.world.block_on("a path", async move { initiator.attach(path(site, mode)).await });
            assert_eq!(attached.expect("it can be attached").len(), stage.volumes.len());
        }
        stage
    }

    fn set_access(&mut self, site: Site, state: AnaState) {
        let nvmf = Arc::clone(&self.target.nvmf);
        let set = async move { nvmf.set_ana_state(NQN, at(site), state, None).await };
        self.world.block_on("the access state", set).expect("it listens");
    }

    /// One path gets another access state. One of them stays usable, or I/O would fail after the transition time.
    fn change_access(&mut self) {
        let states = [AnaState::Optimized, AnaState::NonOptimized, AnaState::Inaccessible];
        let state = states[self.rng.below(3) as usize];
        let (one, other) = match self.rng.one_in(2) {
            true => (self.sites[0], self.sites[1]),
            false => (self.sites[1], self.sites[0]),
        };
        let usable = states[self.rng.below(2) as usize];
        self.set_access(other, usable);
        self.set_access(one, state);
    }

    /// A namespace comes, is a bdev, and goes.
    fn change_namespaces(&mut self) {
        let (nvmf, bdevs) = (Arc::clone(&self.target.nvmf), Arc::clone(self.world.system()));
        let wait = Duration::from_micros(self.rng.below(50_000));
        let changed = async move {
            malloc::create(&bdevs, "fleeting", None, MallocOptions::new(BLOCK, 64)).await.expect("the name is free");
            let new = NewNamespace { nsid: Some(FLEETING), ..NewNamespace::default() };
            nvmf.add_namespace(NQN, new, "fleeting").await.expect("the NSID is free");
            bdevs.executor().sleep(wait).await;
            bdevs.remove("fleeting").await.expect("its namespace lets go of it");
        };
        self.world.block_on("the changes", changed);
    }

    /// The target does not listen at one of its ports for a while.
    fn refuse(&mut self) {
        let site = self.sites[usize::from(self.rng.one_in(2))];
        let (nvmf, bdevs) = (Arc::clone(&self.target.nvmf), Arc::clone(self.world.system()));
        let wait = Duration::from_micros(self.rng.below(3_000_000));
        let refused = async move {
            nvmf.remove_listener(NQN, at(site)).await.expect("it listens");
            bdevs.executor().sleep(wait).await;
            let listener = NewListener { address: at(site), ana_state: None, sock_impl: None };
            nvmf.add_listener(NQN, listener).await.expect("the port is free");
        };
        self.world.block_on("the listener to come back", refused);
    }

    /// A load on each namespace.
    fn loads(&mut self, copies: bool) -> Vec<SharedDevice> {
        let system = Arc::clone(self.world.system());
        let mut devices = Vec::new();
        for n in 1..=self.volumes.len() {
            let name = format!("Nvme0n{n}");
            let blocks = system.get(&name).expect("it is there").device().geometry().num_blocks;
            let device = Device::open(&system, &name, blocks, false);
            // A compare-and-write of unknown fate is not done a second time.
            device.borrow_mut().faults.aborts = true;
            let (operations, max_blocks) = (100 + self.rng.below(200), 1 + self.rng.below(8));
            let depth = 1 + self.rng.below(8) as usize;
            let load = LoadConfig { operations, depth, max_blocks, copies, ..LoadConfig::default() };
            let reactor = self.rng.below(self.world.reactor_count() as u64) as usize;
            Load::start(&mut self.world, reactor, &device, load, self.rng.next_u64());
            devices.push(device);
        }
        devices
    }

    fn await_loads(&mut self, devices: &[SharedDevice]) {
        self.world.run_until("the loads to end", |_| devices.iter().all(|device| device.borrow().loads == 0));
    }

    /// Reads all there is, and takes everything down.
    fn finish(mut self, devices: Vec<SharedDevice>) {
        self.await_loads(&devices);
        // A load takes its descriptor along when it ends.
        let mut sweeps = Vec::new();
        for (n, device) in devices.iter().enumerate() {
            let reopened = Device::open(self.world.system(), &format!("Nvme0n{}", n + 1), 0, false);
            device.borrow_mut().model.settled();
            std::mem::swap(&mut device.borrow_mut().model, &mut reopened.borrow_mut().model);
            let sweep =
                LoadConfig { operations: u64::MAX, depth: 1, max_blocks: 8, sweep: true, ..LoadConfig::default() };
            Load::start(&mut self.world, 0, &reopened, sweep, self.rng.next_u64());
            sweeps.push(reopened);
        }
        self.await_loads(&sweeps);
        let initiator = Arc::clone(&self.initiator);
        let detached =
            self.world.block_on("the controller to go", async move { initiator.detach("Nvme0", |_| true).await });
        detached.expect("nobody holds it");
        assert!(self.initiator.groups().is_empty() && self.world.system().get("Nvme0n1").is_err());
        self.target.shut_down(&mut self.world);
        for name in self.volumes {
            let system = Arc::clone(self.world.system());
            self.world.block_on("a volume to go", async move { system.remove(&name).await }).expect("nobody holds it");
        }
        self.world.assert_clean();
    }
}

fn faults(kinds: Kinds, seed: u64, copies: bool) {
    let sim = Sim::new(seed);
    // Whole blocks, so that a read beside a write sees one or the other.
    sim.disk(|rules| rules.sector = BLOCK as usize);
    let mut stage = Stage::new(&sim, kinds, Rng::new(seed));
    sim.disk(|rules| rules.slow_one_in = 5 + stage.rng.below(30));
    let devices = stage.loads(copies);
    let mut rounds = 0;
    while devices.iter().any(|device| device.borrow().loads > 0) && rounds < 200 {
        rounds += 1;
        let pause = match stage.rng.below(3) {
            0 => Duration::from_micros(stage.rng.below(2_000)),
            1 => Duration::from_millis(stage.rng.below(300)),
            _ => Duration::from_millis(stage.rng.below(8_000)),
        };
        stage.world.run_for(pause);
        match stage.rng.below(9) {
            6 => stage.change_access(),
            7 => stage.change_namespaces(),
            8 => stage.refuse(),
            0 | 1 => drop(sim.break_connections(1 + stage.rng.below(4) as usize)),
            2 => drop(sim.silence_some()),
            3 => drop(sim.break_connections(100)),
            4 => {
                sim.net(|rules| rules.reset_one_in = 2_000);
                sim.rdma(|rules| rules.break_one_in = 2_000);
            }
            _ => {
                sim.net(|rules| rules.reset_one_in = 0);
                sim.rdma(|rules| rules.break_one_in = 0);
            }
        }
    }
    sim.net(|rules| rules.reset_one_in = 0);
    sim.rdma(|rules| rules.break_one_in = 0);
    sim.disk(|rules| rules.slow_one_in = 0);
    stage.set_access(stage.sites[0], AnaState::Optimized);
    stage.set_access(stage.sites[1], AnaState::Optimized);
    stage.finish(devices);
}

#[test]
fn a_write_never_lands_behind_a_newer_one() {
    seeds::each("a_write_never_lands_behind_a_newer_one", 40, regressions::PATHS, |seed| faults(TCP, seed, false));
}

#[test]
fn a_write_never_lands_behind_a_newer_one_rdma() {
    seeds::each("a_write_never_lands_behind_a_newer_one_rdma", 40, &[], |seed| faults(RDMA, seed, false));
}

#[test]
fn a_write_never_lands_behind_a_newer_one_on_both_transports() {
    let name = "a_write_never_lands_behind_a_newer_one_on_both_transports";
    seeds::each(name, 40, &[], |seed| faults(BOTH, seed, false));
}

#[test]
fn nor_does_a_copy() {
    seeds::each("nor_does_a_copy", 40, &[], |seed| faults(TCP, seed, true));
}

#[test]
fn nor_does_a_copy_rdma() {
    seeds::each("nor_does_a_copy_rdma", 40, &[], |seed| faults(RDMA, seed, true));
}
