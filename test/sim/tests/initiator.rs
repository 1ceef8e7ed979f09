//! The production host against the production target over a network with faults.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bdev::modules::malloc;
use nvmf::host::{Options, ReconnectPolicy};
use nvmf::target::model::{NewListener, NewNamespace};
use nvmf::target::view::{TransportKind, TransportOptions};
use reactor::buffer::PoolConfig;
use ringstone_sim::initiator::{Initiator, InitiatorConfig, Shared};
use ringstone_sim::seeds;
use ringstone_sim::target::{NQN, Target, address, listen_on};
use ringstone_sim::{Model, Rng, Sim, World, WorldConfig};

/// Seeds that once failed, each with what was wrong.
mod regressions {
    /// 391: a controller whose queues were refused connected in a circle, without a pause.
    pub const FAULTS: &[u64] = &[391];
}

const BLOCK: u32 = 4096;
/// The namespace that comes, changes and goes.
const FLEETING: u32 = 9;

struct Stage {
    kind: TransportKind,
    sim: Arc<Sim>,
    world: World,
    target: Target,
    shared: Rc<RefCell<Shared>>,
    names: Vec<String>,
    rng: Rng,
}

fn memory(blocks: u64) -> malloc::MallocOptions {
    malloc::MallocOptions { block_size: BLOCK, num_blocks: blocks, physical_block_size: 0, optimal_io_boundary: 0 }
}

impl Stage {
    fn new(kind: TransportKind, seed: u64) -> Stage {
        let mut rng = Rng::new(seed);
        let sim = Sim::new(seed);
        sim.net(|rules| {
            rules.delay_ns = (1_000, 10_000 + rng.below(500_000));
            rules.segment = (1, 100 + rng.below(100_000));
            rules.buffer = (500 + rng.below(5_000), 6_000 + rng.below(400_000));
        });
        let config = WorldConfig {
            reactors: 1 + rng.below(3) as usize,
            io_pool: 256,
            buffers: PoolConfig { small: 128, medium: 32, large: 16 },
            sleeps: !rng.one_in(4),
            ..WorldConfig::default()
        };
        let mut world = World::new(&sim, config, rng.next_u64());
        let mut shared = Shared::default();
        let mut names = Vec::new();
        for nsid in 1..=1 + rng.below(3) as u32 {
            let (name, blocks) = (format!("vol{nsid}"), 16 + rng.below(200));
            let (system, made) = (Arc::clone(world.system()), name.clone());
            let made = async move { malloc::create(&system, &made, None, memory(blocks)).await };
            world.block_on("the volume", made).expect("the name is free");
            shared.models.insert(nsid, Model::new(blocks, BLOCK, false));
            names.push(name);
        }
        let options = TransportOptions {
            in_capsule_data_size: 8192,
            c2h_success: rng.one_in(2),
            max_io_size: 131_072,
            ..TransportOptions::default()
        };
        let target = Target::install_over(&mut world, kind, options);
        target.serve(&mut world, &names);
        Stage { kind, sim, world, target, shared: Rc::new(RefCell::new(shared)), names, rng }
    }

    fn add_initiators(&mut self, commands: u64) -> usize {
        let count = 1 + self.rng.below(2) as usize;
        for number in 0..count {
            let rng = &mut self.rng;
            let config = InitiatorConfig {
                addr: address(),
                kind: self.kind,
                options: Options {
                    subnqn: NQN.into(),
                    hostnqn: format!("nqn.2026-11.io.ringstone:initiator{number}"),
                    hostid: [number as u8 + 1; 16],
                    io_queues: 1 + rng.below(4) as u16,
                    io_depth: 2 + rng.below(40) as u16,
                    step_timeout: Duration::from_secs(2),
                    io_timeout: Duration::from_secs(4),
                    kato_ms: 5_000,
                    reconnect: ReconnectPolicy::from_seconds(-1, 1, 0).expect("a policy"),
                    ..Options::default()
                },
                digests: (rng.one_in(2), rng.one_in(2)),
                commands,
                depth: 1 + rng.below(64) as usize,
            };
            let (reactor, seed) = (rng.below(self.world.reactor_count() as u64) as usize, rng.next_u64());
            Initiator::start(&mut self.world, reactor, &self.shared, config, seed);
        }
        count
    }

    fn finish(mut self, count: usize) {
        self.shared.borrow_mut().may_end = true;
        let shared = Rc::clone(&self.shared);
        self.world.run_until("the initiators to end", |_| shared.borrow().ended == count);
        let sizes: BTreeMap<u32, u64> =
            shared.borrow().models.iter().map(|(nsid, model)| (*nsid, model.len())).collect();
        for known in &shared.borrow().known {
            assert_eq!(*known, sizes, "what an initiator knows is what there is");
        }
        self.target.shut_down(&mut self.world);
        for name in std::mem::take(&mut self.names) {
            let system = Arc::clone(self.world.system());
            let removed = async move { system.remove(&name).await };
            self.world.block_on("the removal", removed).expect("nobody has it open");
        }
        self.world.assert_clean();
        let sim = Arc::clone(&self.sim);
        self.world.run_until("sockets to be closed", |_| sim.open_sockets() == 0);
    }

    /// Changes what the target serves beside the namespaces that stay, and puts it back.
    fn change_namespaces(&mut self) {
        let (nvmf, bdevs) = (Arc::clone(&self.target.nvmf), Arc::clone(self.world.system()));
        let mut rng = Rng::new(self.rng.next_u64());
        let changed = async move {
            malloc::create(&bdevs, "fleeting", None, memory(64)).await.expect("the name is free");
            let new = NewNamespace { nsid: Some(FLEETING), ..NewNamespace::default() };
            nvmf.add_namespace(NQN, new, "fleeting").await.expect("the NSID is free");
            bdevs.executor().sleep(Duration::from_nanos(rng.below(20_000_000))).await;
            malloc::resize(&bdevs, "fleeting", 65 + rng.below(100)).await.expect("it can be resized");
            bdevs.executor().sleep(Duration::from_nanos(rng.below(20_000_000))).await;
            bdevs.remove("fleeting").await.expect("its namespace lets go of it");
        };
        self.world.block_on("the changes", changed);
    }

    /// The target does not listen for a while.
    fn refuse_for_a_while(&mut self) {
        let (nvmf, bdevs) = (Arc::clone(&self.target.nvmf), Arc::clone(self.world.system()));
        let wait = Duration::from_nanos(self.rng.below(5_000_000_000));
        let kind = self.kind;
        let refused = async move {
            nvmf.remove_listener(NQN, listen_on(kind, address())).await.expect("it listens");
            bdevs.executor().sleep(wait).await;
            let new = NewListener { address: listen_on(kind, address()), ana_state: None, sock_impl: None };
            nvmf.add_listener(NQN, new).await.expect("the port is free");
        };
        self.world.block_on("the listener to come back", refused);
    }
}

/// Nothing goes wrong but that namespaces come and go.
fn serves(kind: TransportKind, seed: u64) {
    let mut stage = Stage::new(kind, seed);
    let count = stage.add_initiators(150);
    for _ in 0..stage.rng.below(3) {
        stage.change_namespaces();
    }
    let shared = Rc::clone(&stage.shared);
    stage.world.run_until("some commands", |_| shared.borrow().succeeded > 100);
    // Events are told at once, but take their way.
    stage.world.run_for(Duration::from_secs(1));
    stage.finish(count);
}

#[test]
fn initiator_is_served() {
    seeds::each("initiator_is_served", 20, &[], |seed| serves(TransportKind::Tcp, seed));
}

#[test]
fn initiator_is_served_rdma() {
    seeds::each("initiator_is_served_rdma", 20, &[], |seed| serves(TransportKind::Rdma, seed));
}

/// The target dies, hangs, refuses, restarts and changes, under load.
fn faults(kind: TransportKind, seed: u64) {
    let mut stage = Stage::new(kind, seed);
    let count = stage.add_initiators(120);
    let resets = stage.rng.one_in(3);
    stage.sim.net(|rules| rules.reset_one_in = if resets { 500 } else { 0 });
    stage.sim.rdma(|rules| rules.break_one_in = if resets { 500 } else { 0 });
    for _ in 0..1 + stage.rng.below(6) {
        let wait = Duration::from_nanos(stage.rng.below(20_000_000));
        stage.world.run_for(wait);
        let sim = Arc::clone(&stage.sim);
        match stage.rng.below(5) {
            0 => drop(sim.break_connections(1 + stage.rng.below(5) as usize)),
            1 => drop(sim.silence_some()),
            2 => stage.refuse_for_a_while(),
            3 => stage.change_namespaces(),
            _ => {
                sim.break_connections(100);
                stage.refuse_for_a_while();
            }
        }
    }
    stage.sim.net(|rules| rules.reset_one_in = 0);
    stage.sim.rdma(|rules| rules.break_one_in = 0);
    // Who is silent is noticed by then, and who was lost is back.
    stage.world.run_for(Duration::from_secs(15));
    stage.finish(count);
}

#[test]
fn initiator_survives_faults() {
    seeds::each("initiator_survives_faults", 40, regressions::FAULTS, |seed| faults(TransportKind::Tcp, seed));
}

#[test]
fn initiator_survives_faults_rdma() {
    seeds::each("initiator_survives_faults_rdma", 40, &[], |seed| faults(TransportKind::Rdma, seed));
}

#[test]
fn a_seed_decides_everything() {
    for kind in [TransportKind::Tcp, TransportKind::Rdma] {
        let run = |seed| seeds::run_once("faults", seed, |seed| faults(kind, seed));
        let first = run(5);
        assert!(first.1 > 100, "a run does something");
        assert_eq!(first, run(5));
        assert_ne!(first, run(6));
    }
}
