//! The whole target on simulated reactors, network and disks, with hosts that check what they are told.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bdev::core::BdevSystem;
use bdev::modules::malloc;
use futures_util::future::join_all;
use nvmf::spec::rdma::Reject;
use nvmf::target::model::{NewListener, NewNamespace, NewSubsystem};
use nvmf::target::system::NvmfSystem;
use nvmf::target::view::{ListenAddress, TransportKind, TransportOptions};
use reactor::ReactorId;
use ringstone_sim::host::{Allowed, Host, HostConfig, Namespaces, SharedNamespaces, host_nqn};
use ringstone_sim::rdma_vandal::{Deed, Gang};
use ringstone_sim::seeds;
use ringstone_sim::target::{NQN, Target, address, listen_address};
use ringstone_sim::vandal::Vandal;
use ringstone_sim::volume::Volume;
use ringstone_sim::world::WorldView;
use ringstone_sim::{Model, Rng, Sim, World, WorldConfig};

/// Seeds of a scenario that once failed, each with what was wrong.
mod regressions {
    /// 7, 12, 34, 36: the halves of fused operations held memory and waited for each other's; 2, 3: they came up in the
    /// wrong order.
    /// 1058, 1206: memory that was dropped elsewhere did not count as free, and writes waited for it for ever.
    pub const SERVES: &[u64] = &[34, 36, 1058, 1206];
    /// 9: as the first above, with a host that is thrown out meanwhile.
    pub const CHURN: &[u64] = &[9];
    /// 1: a first command that is not Connect ended the target; 11, 17: nobody accepted again after descriptors ran out.
    pub const NETWORK: &[u64] = &[39, 48];
    /// 19: a queue pair was closed that was already gone.
    /// 1077: as 1058 above.
    pub const DISKS: &[u64] = &[19, 1077];
    /// 1143: two vandals drew the same host identifier; 1953: hosts came again that were still there.
    pub const VANDALS: &[u64] = &[1143, 1953];
    pub const POWER: &[u64] = &[];
    pub const SHUTDOWN: &[u64] = &[];
}

type Scenario = fn(TransportKind, u64);

fn over_tcp(scenario: Scenario) -> impl Fn(u64) {
    move |seed| scenario(TransportKind::Tcp, seed)
}

fn over_rdma(scenario: Scenario) -> impl Fn(u64) {
    move |seed| scenario(TransportKind::Rdma, seed)
}

/// The namespace that comes and goes.
const FLEETING: u32 = 20;

fn transport(kind: TransportKind, rng: &mut Rng) -> TransportOptions {
    let mut options = TransportOptions {
        in_capsule_data_size: 8192,
        c2h_success: rng.one_in(2),
        max_io_size: 131_072,
        ..TransportOptions::default()
    };
    if kind == TransportKind::Rdma {
        options.max_queue_depth = 4096;
        let extra = [
            ("no_srq", rng.one_in(3).into()),
            ("max_srq_depth", (16 + rng.below(200)).into()),
            ("send_with_invalidate", rng.one_in(2).into()),
        ];
        options.extra = extra.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    }
    options
}

/// A target with volumes and hosts.
struct Stage {
    kind: TransportKind,
    world: World,
    target: Target,
    volumes: Vec<Volume>,
    shared: SharedNamespaces,
    hosts: Vec<Rc<RefCell<Host>>>,
    rng: Rng,
}

impl Stage {
    fn new(sim: &Arc<Sim>, kind: TransportKind, rng: Rng, volumes: Vec<Volume>, models: Option<Vec<Model>>) -> Stage {
        Stage::with_reactors(sim, kind, rng, volumes, models, 1)
    }

    /// With so many reactors at least.
    fn with_reactors(
        sim: &Arc<Sim>,
        kind: TransportKind,
        mut rng: Rng,
        volumes: Vec<Volume>,
        models: Option<Vec<Model>>,
        reactors: usize,
    ) -> Stage {
        let mut config = WorldConfig::drawn(&mut rng, |rng| 2 + rng.below(2) as usize);
        config.reactors = config.reactors.max(reactors);
        let mut world = World::new(sim, config, rng.next_u64());
        for volume in &volumes {
            if volume.file && models.is_none() {
                let bytes = volume.blocks * u64::from(volume.block_size);
                world.platform().files().create(&volume.path(), bytes).expect("a new file");
            }
            let create = volume.clone().create(Arc::clone(world.system()));
            world.block_on("the volume", create);
        }
        let target = Target::install_over(&mut world, kind, transport(kind, &mut rng));
        let names: Vec<String> = volumes.iter().map(|volume| volume.name.clone()).collect();
        target.serve(&mut world, &names);
        let fresh = || {
            let model = |volume: &Volume| {
                let bdev = world.system().get(&volume.name).expect("it was just made");
                Model::new(volume.blocks, volume.block_size, bdev.device().geometry().volatile_cache)
            };
            volumes.iter().map(model).collect()
        };
        let models: Vec<Model> = models.unwrap_or_else(fresh);
        let models = (1..).zip(models).collect();
        let shared = Rc::new(RefCell::new(Namespaces { models, ..Namespaces::default() }));
        Stage { kind, world, target, volumes, shared, hosts: Vec::new(), rng }
    }

    fn add_hosts(&mut self, commands: u64, vanishes: u32) {
        let view = WorldView { sim: Arc::clone(self.world.sim()) };
        for number in 0..1 + self.rng.below(3) as u32 {
            let rng = &mut self.rng;
            let config = HostConfig {
                number,
                subnqn: NQN.into(),
                transport: self.kind,
                addr: address(),
                queues: 1 + rng.below(4) as u16,
                entries: 4 + rng.below(40) as u16,
                commands: commands / 2 + rng.below(commands),
                vanishes,
                max_bytes: if rng.one_in(2) { 131_072 } else { 16_384 },
                digests: (rng.one_in(2), rng.one_in(2)),
                stalls: rng.one_in(4),
                dribbles: rng.one_in(8),
                aborts: rng.one_in(3),
            };
            let host = Host::new(&view, config, &self.shared, rng.next_u64());
            self.world.add_actor(host.clone());
            self.hosts.push(host);
        }
    }

    fn wait_for_hosts(&mut self) {
        self.hosts_end();
        let succeeded = self.shared.borrow().succeeded;
        assert!(succeeded > 0, "nothing succeeded");
    }

    fn hosts_end(&mut self) {
        let hosts = self.hosts.clone();
        self.world.run_until("the hosts to end", |_| hosts.iter().all(|host| host.borrow().is_done()));
    }

    /// Everything goes, and nothing may be left.
    fn close(mut self) {
        self.world.clear_actors();
        self.hosts.clear();
        self.target.shut_down(&mut self.world);
        for volume in self.volumes {
            let system = Arc::clone(self.world.system());
            let removed = async move { system.remove(&volume.name).await };
            self.world.block_on("the removal", removed).expect("nobody has it open");
        }
        self.world.assert_clean();
        let sim = Arc::clone(self.world.sim());
        self.world.run_until("sockets to be closed", |_| sim.open_sockets() == 0);
    }
}

fn volumes(rng: &mut Rng) -> Vec<Volume> {
    (1..2 + rng.below(3) as usize).map(|n| Volume::draw(rng, n)).collect()
}

fn machine(seed: u64, rng: &mut Rng) -> Arc<Sim> {
    let sim = Sim::new(seed);
    sim.disk(|rules| {
        rules.sector = 4096;
        rules.volatile_cache = rng.one_in(2);
        rules.queue_depth = 1 << rng.below(6);
    });
    let longest = 10_000 + Rng::new(seed ^ 0x7d3a).below(200_000);
    sim.rdma(|rules| {
        rules.delay_ns = (500, longest);
        rules.limits.initiator_depth = 1 + (seed % 16) as u8;
        rules.limits.sge = 1 + (seed % 7) as u32;
        rules.limits.mem_mgt_extensions = !seed.is_multiple_of(3);
    });
    sim.net(|rules| {
        rules.delay_ns = (1_000, 10_000 + rng.below(500_000));
        rules.segment = (1, 100 + rng.below(100_000));
        rules.buffer = (500 + rng.below(5_000), 6_000 + rng.below(400_000));
    });
    sim
}

/// Nothing goes wrong.
fn serves(kind: TransportKind, seed: u64) {
    let mut rng = Rng::new(seed);
    let sim = machine(seed, &mut rng);
    let volumes = volumes(&mut rng);
    let mut stage = Stage::new(&sim, kind, rng, volumes, None);
    stage.add_hosts(120, 0);
    stage.wait_for_hosts();
    stage.close();
}

#[test]
fn target_serves_hosts_rdma() {
    seeds::each("target_serves_hosts_rdma", 25, &[], over_rdma(serves));
}

#[test]
fn target_serves_hosts() {
    seeds::each("target_serves_hosts", 25, regressions::SERVES, over_tcp(serves));
}

/// Connections break, go silent, are half closed and full of nonsense; hosts vanish and come back.
fn network_faults(kind: TransportKind, seed: u64) {
    let mut rng = Rng::new(seed);
    let sim = machine(seed, &mut rng);
    let volumes = volumes(&mut rng);
    let mut stage = Stage::new(&sim, kind, rng, volumes, None);
    stage.shared.borrow_mut().allowed.disconnects = true;
    let vanishes = stage.rng.below(4) as u32;
    stage.add_hosts(80, vanishes);
    let view = WorldView { sim: Arc::clone(&sim) };
    let vandals: Vec<_> = (0..if kind == TransportKind::Tcp { stage.rng.below(3) } else { 0 })
        .map(|_| Vandal::new(&view, address(), 6, stage.rng.next_u64()))
        .collect();
    for vandal in &vandals {
        stage.world.add_actor(vandal.clone());
    }
    let (resets, descriptors) = (stage.rng.one_in(2), stage.rng.one_in(2));
    sim.net(|rules| {
        rules.reset_one_in = if resets { 400 } else { 0 };
        rules.out_of_descriptors_one_in = if descriptors { 3 } else { 0 };
    });
    sim.rdma(|rules| rules.break_one_in = if resets { 400 } else { 0 });
    for _ in 0..stage.rng.below(6) {
        let wait = Duration::from_nanos(stage.rng.below(10_000_000));
        stage.world.run_for(wait);
        if stage.rng.one_in(3) {
            vandals.iter().for_each(|vandal| vandal.borrow_mut().goes_deaf());
            sim.silence_some();
        } else {
            sim.break_connections(1 + stage.rng.below(3) as usize);
        }
    }
    sim.net(|rules| (rules.reset_one_in, rules.out_of_descriptors_one_in) = (0, 0));
    sim.rdma(|rules| rules.break_one_in = 0);
    stage.wait_for_hosts();
    stage.world.run_until("the vandals to end", |_| vandals.iter().all(|vandal| vandal.borrow().is_done()));
    stage.close();
}

#[test]
fn target_network_faults_rdma() {
    seeds::each("target_network_faults_rdma", 25, &[], over_rdma(network_faults));
}

#[test]
fn target_network_faults() {
    seeds::each("target_network_faults", 25, regressions::NETWORK, over_tcp(network_faults));
}

/// Hosts over RDMA break every rule that there is, beside others that must not notice.
fn vandals_over_rdma(seed: u64) {
    let mut rng = Rng::new(seed);
    let sim = machine(seed, &mut rng);
    let (pads, answers_reads) = (!rng.one_in(4), !rng.one_in(4));
    sim.rdma(|rules| {
        rules.pads = pads;
        // Small enough for one queue to be too long.
        rules.limits.cqe = 3_000;
        if !answers_reads {
            rules.limits.responder_resources = 0;
        }
    });
    let volumes = volumes(&mut rng);
    let mut stage = Stage::new(&sim, TransportKind::Rdma, rng, volumes, None);
    stage.add_hosts(60, 0);
    let view = WorldView { sim: Arc::clone(&sim) };
    let possible = |deed: &Deed| match deed {
        Deed::Refused(Reject::PrivateDataLength) => !pads,
        Deed::Refused(Reject::Ord) => !answers_reads,
        _ => true,
    };
    let deeds: Vec<Deed> = Deed::all().into_iter().filter(possible).collect();
    let gangs: Vec<_> = (0..1 + stage.rng.below(3))
        .map(|_| {
            let count = 4 + stage.rng.below(16) as u32;
            Gang::new(&view, address(), NQN, deeds.clone(), count, stage.rng.next_u64())
        })
        .collect();
    for gang in &gangs {
        stage.world.add_actor(gang.clone());
    }
    stage.world.run_until("the vandals to end", |_| gangs.iter().all(|gang| gang.borrow().is_done()));
    // Whoever comes then is served. They are the first ones again, which have to have ended.
    stage.hosts_end();
    stage.add_hosts(20, 0);
    stage.wait_for_hosts();
    stage.close();
}

#[test]
fn target_survives_vandals_over_rdma() {
    seeds::each("target_survives_vandals_over_rdma", 30, regressions::VANDALS, vandals_over_rdma);
}

/// Reads, writes and flushes fail, disks are slow and full.
fn disk_faults(kind: TransportKind, seed: u64) {
    let mut rng = Rng::new(seed);
    let sim = machine(seed, &mut rng);
    let volumes: Vec<Volume> = volumes(&mut rng).into_iter().map(|volume| Volume { file: true, ..volume }).collect();
    let mut stage = Stage::new(&sim, kind, rng, volumes, None);
    let full = stage.rng.one_in(2);
    stage.shared.borrow_mut().allowed = Allowed { media: true, full, ..Allowed::default() };
    let rng = &mut stage.rng;
    sim.disk(|rules| {
        rules.read_error_one_in = 5 + rng.below(60);
        rules.write_error_one_in = 5 + rng.below(60);
        rules.sync_error_one_in = 2 + rng.below(10);
        rules.slow_one_in = 40 * rng.below(2);
        if full {
            rules.capacity_sectors = rng.below(200) as usize;
        }
    });
    stage.add_hosts(80, 0);
    stage.wait_for_hosts();
    stage.close();
}

#[test]
fn target_disk_faults_rdma() {
    seeds::each("target_disk_faults_rdma", 15, &[], over_rdma(disk_faults));
}

#[test]
fn target_disk_faults() {
    seeds::each("target_disk_faults", 15, regressions::DISKS, over_tcp(disk_faults));
}

/// The power fails under load, again and again.
fn power(kind: TransportKind, seed: u64) {
    let mut rng = Rng::new(seed);
    let mut sim = machine(seed, &mut rng);
    let volumes: Vec<Volume> = volumes(&mut rng).into_iter().map(|volume| Volume { file: true, ..volume }).collect();
    let mut models = None;
    for life in 0..3 {
        let mut stage = Stage::new(&sim, kind, Rng::new(rng.next_u64()), volumes.clone(), models.take());
        stage.add_hosts(60, 0);
        if life == 2 {
            stage.wait_for_hosts();
            return stage.close();
        }
        let wait = Duration::from_nanos(rng.below(30_000_000));
        stage.world.run_for(wait);
        let mut kept = Vec::new();
        for (_, mut model) in std::mem::take(&mut stage.shared.borrow_mut().models) {
            model.crashed();
            kept.push(model);
        }
        models = Some(kept);
        let Stage { world, target, hosts, .. } = stage;
        sim.power_off();
        drop((hosts, target));
        sim = world.power_cycle(rng.next_u64());
    }
}

#[test]
fn target_power_failure_rdma() {
    seeds::each("target_power_failure_rdma", 15, &[], over_rdma(power));
}

#[test]
fn target_power_failure() {
    seeds::each("target_power_failure", 15, regressions::POWER, over_tcp(power));
}

/// What an administrator does while hosts work.
async fn churn(
    kind: TransportKind,
    nvmf: Arc<NvmfSystem>,
    bdevs: Arc<BdevSystem>,
    mut rng: Rng,
    shared: SharedNamespaces,
) {
    let other: SocketAddr = "10.0.0.2:4421".parse().expect("an address");
    let other = ListenAddress { trtype: kind, ..listen_address(other) };
    let second = "nqn.2026-11.io.ringstone:other";
    for _ in 0..6 + rng.below(10) {
        bdevs.executor().sleep(Duration::from_nanos(rng.below(4_000_000))).await;
        match rng.below(6) {
            0..3 => {
                // A namespace that comes, changes its size and goes with its device or before it.
                let options = malloc::MallocOptions {
                    block_size: 4096,
                    num_blocks: 64,
                    physical_block_size: 0,
                    optimal_io_boundary: 0,
                };
                malloc::create(&bdevs, "fleeting", None, options).await.expect("the name is free");
                let new = NewNamespace { nsid: Some(FLEETING), ..NewNamespace::default() };
                nvmf.add_namespace(NQN, new, "fleeting").await.expect("the NSID is free");
                bdevs.executor().sleep(Duration::from_nanos(rng.below(6_000_000))).await;
                malloc::resize(&bdevs, "fleeting", 1 + rng.below(100)).await.expect("it can be resized");
                bdevs.executor().sleep(Duration::from_nanos(rng.below(2_000_000))).await;
                if rng.one_in(2) {
                    nvmf.remove_namespace(NQN, FLEETING).await.expect("it is there");
                }
                bdevs.remove("fleeting").await.expect("its namespace lets go of it");
            }
            3 => {
                let new = NewListener { address: other.clone(), ana_state: None, sock_impl: None };
                nvmf.add_listener(NQN, new).await.expect("the port is free");
                bdevs.executor().sleep(Duration::from_nanos(rng.below(3_000_000))).await;
                nvmf.remove_listener(NQN, other.clone()).await.expect("it listens");
            }
            4 => {
                let new = NewSubsystem { nqn: second.into(), allow_any_host: true, ..NewSubsystem::default() };
                nvmf.create_subsystem(new).await.expect("the NQN is free");
                bdevs.executor().sleep(Duration::from_nanos(rng.below(3_000_000))).await;
                nvmf.delete_subsystem(second).await.expect("it is there");
            }
            _ => {
                // Host 0 is thrown out for a while.
                shared.borrow_mut().allowed = Allowed { disconnects: true, refusals: true, ..Allowed::default() };
                let keep: Vec<String> = (1..4).map(host_nqn).collect();
                for host in &keep {
                    nvmf.add_host(NQN, host).await.expect("it is not listed yet");
                }
                nvmf.allow_any_host(NQN, false).await.expect("hosts drain");
                bdevs.executor().sleep(Duration::from_nanos(rng.below(5_000_000))).await;
                nvmf.allow_any_host(NQN, true).await.expect("it ends nothing");
                for host in &keep {
                    nvmf.remove_host(NQN, host, Duration::from_secs(10)).await.expect("it stays as any host");
                }
            }
        }
    }
}

fn churns(kind: TransportKind, seed: u64) {
    let mut rng = Rng::new(seed);
    let sim = machine(seed, &mut rng);
    let volumes = volumes(&mut rng);
    let mut stage = Stage::new(&sim, kind, rng, volumes, None);
    stage.shared.borrow_mut().fleeting = vec![FLEETING];
    stage.add_hosts(120, 0);
    let (nvmf, bdevs) = (Arc::clone(&stage.target.nvmf), Arc::clone(stage.world.system()));
    let changing = churn(kind, nvmf, bdevs, Rng::new(stage.rng.next_u64()), Rc::clone(&stage.shared));
    let changing = stage.world.spawn(changing);
    stage.world.run_until("the changes to end", |_| changing.take().is_some());
    stage.wait_for_hosts();
    stage.close();
}

#[test]
fn target_changes_under_load_rdma() {
    seeds::each("target_changes_under_load_rdma", 20, &[], over_rdma(churns));
}

#[test]
fn target_changes_under_load() {
    seeds::each("target_changes_under_load", 20, regressions::CHURN, over_tcp(churns));
}

/// The target is shut down under load.
fn shutdown(kind: TransportKind, seed: u64) {
    let mut rng = Rng::new(seed);
    let sim = machine(seed, &mut rng);
    let volumes = volumes(&mut rng);
    let mut stage = Stage::new(&sim, kind, rng, volumes, None);
    stage.shared.borrow_mut().allowed = Allowed { disconnects: true, refusals: true, ..Allowed::default() };
    stage.add_hosts(1_000, 0);
    let wait = Duration::from_nanos(stage.rng.below(30_000_000));
    stage.world.run_for(wait);
    let system = Arc::clone(&stage.target.nvmf);
    stage.world.block_on("the target to shut down", async move { system.shut_down().await });
    stage.shared.borrow_mut().stop = true;
    let hosts = stage.hosts.clone();
    stage.world.run_until("the hosts to end", |_| hosts.iter().all(|host| host.borrow().is_done()));
    stage.close();
}

#[test]
fn target_shutdown_under_load_rdma() {
    seeds::each("target_shutdown_under_load_rdma", 15, &[], over_rdma(shutdown));
}

#[test]
fn target_shutdown_under_load() {
    seeds::each("target_shutdown_under_load", 15, regressions::SHUTDOWN, over_tcp(shutdown));
}

/// Queues that moved, and attempts of which nothing came, over all seeds of a process.
static MOVED: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

/// Moves queues from reactor to reactor, any at any moment, several at once.
async fn move_about(nvmf: Arc<NvmfSystem>, bdevs: Arc<BdevSystem>, mut rng: Rng, reactors: u64, stop: Rc<Cell<bool>>) {
    let longest = 1 + rng.below(3_000_000);
    for round in 0.. {
        // Hosts whose connections fell silent wait for minutes: then it is enough to move now and then.
        let slower = if round < 400 { 1 } else { 1000 };
        bdevs.executor().sleep(Duration::from_nanos(rng.below(longest) * slower)).await;
        if stop.get() {
            return;
        }
        let queues: Vec<_> = nvmf.reactors().qpairs().await.expect("the reactors run");
        let moves = (0..1 + rng.below(4)).filter_map(|_| {
            let queue = queues.get(rng.below(queues.len().max(1) as u64) as usize)?;
            // Sometimes where it is, or where there is none.
            let beyond = u64::from(rng.one_in(20));
            let to = ReactorId(rng.below(reactors + beyond) as u32);
            let from = if rng.one_in(20) { ReactorId(rng.below(reactors) as u32) } else { queue.reactor };
            Some((queue.qid, nvmf.reactors().move_qpair(queue.name(), from, to)))
        });
        let (qids, moves): (Vec<u16>, Vec<_>) = moves.unzip();
        for (qid, moved) in qids.into_iter().zip(join_all(moves).await) {
            let moved = moved.expect("the reactors run");
            assert!(qid > 0 || moved.is_err(), "an admin queue moved");
            MOVED[usize::from(moved.is_err())].fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Connections move between reactors all the time, while what else happens, happens.
fn moves(what: fn(&mut Stage), disconnects: bool, seed: u64) {
    let mut rng = Rng::new(seed);
    let sim = machine(seed, &mut rng);
    let volumes = volumes(&mut rng);
    let mut stage = Stage::with_reactors(&sim, TransportKind::Tcp, rng, volumes, None, 2);
    stage.shared.borrow_mut().allowed.disconnects = disconnects;
    let vanishes = if disconnects { stage.rng.below(4) as u32 } else { 0 };
    stage.add_hosts(120, vanishes);
    let (nvmf, bdevs) = (Arc::clone(&stage.target.nvmf), Arc::clone(stage.world.system()));
    let (stop, rng) = (Rc::new(Cell::new(false)), Rng::new(stage.rng.next_u64()));
    let reactors = stage.world.reactor_count() as u64;
    let moving = stage.world.spawn(move_about(nvmf, bdevs, rng, reactors, Rc::clone(&stop)));
    what(&mut stage);
    stage.hosts_end();
    stop.set(true);
    stage.world.run_until("the moves to end", |_| moving.take().is_some());
    stage.close();
}

#[test]
fn target_moves_connections() {
    seeds::each("target_moves_connections", 40, &[], |seed| moves(|_| (), false, seed));
    let [moved, failed] = [0, 1].map(|n| MOVED[n].load(Ordering::Relaxed));
    // Those that did not were admin queues, were gone or moving already, or were looked for where they were not.
    assert!(moved > failed / 4, "{moved} queues moved, {failed} did not");
}

#[test]
fn target_moves_connections_that_break() {
    let breaks = |stage: &mut Stage| {
        let sim = Arc::clone(stage.world.sim());
        let resets = stage.rng.one_in(2);
        sim.net(|rules| rules.reset_one_in = if resets { 400 } else { 0 });
        for _ in 0..stage.rng.below(6) {
            let wait = Duration::from_nanos(stage.rng.below(10_000_000));
            stage.world.run_for(wait);
            if stage.rng.one_in(3) {
                sim.silence_some();
            } else {
                sim.break_connections(1 + stage.rng.below(3) as usize);
            }
        }
        sim.net(|rules| rules.reset_one_in = 0);
    };
    seeds::each("target_moves_connections_that_break", 30, &[], |seed| moves(breaks, true, seed));
}

#[test]
fn target_moves_connections_while_it_changes() {
    let changes = |stage: &mut Stage| {
        stage.shared.borrow_mut().fleeting = vec![FLEETING];
        let (nvmf, bdevs) = (Arc::clone(&stage.target.nvmf), Arc::clone(stage.world.system()));
        let rng = Rng::new(stage.rng.next_u64());
        let changing = churn(TransportKind::Tcp, nvmf, bdevs, rng, Rc::clone(&stage.shared));
        let changing = stage.world.spawn(changing);
        stage.world.run_until("the changes to end", |_| changing.take().is_some());
    };
    seeds::each("target_moves_connections_while_it_changes", 30, &[], |seed| moves(changes, false, seed));
}

#[test]
fn target_moves_connections_while_it_shuts_down() {
    let ends = |stage: &mut Stage| {
        stage.shared.borrow_mut().allowed = Allowed { disconnects: true, refusals: true, ..Allowed::default() };
        let wait = Duration::from_nanos(stage.rng.below(30_000_000));
        stage.world.run_for(wait);
        let system = Arc::clone(&stage.target.nvmf);
        stage.world.block_on("the target to shut down", async move { system.shut_down().await });
        stage.shared.borrow_mut().stop = true;
    };
    seeds::each("target_moves_connections_while_it_shuts_down", 20, &[], |seed| moves(ends, false, seed));
}

/// The machine's RDMA device goes away with all connections, again and again, and comes back.
fn device_loss(seed: u64) {
    let mut rng = Rng::new(seed);
    let sim = machine(seed, &mut rng);
    let volumes = volumes(&mut rng);
    let mut stage = Stage::new(&sim, TransportKind::Rdma, rng, volumes, None);
    stage.shared.borrow_mut().allowed = Allowed { disconnects: true, refusals: true, ..Allowed::default() };
    stage.add_hosts(80, 0);
    for _ in 0..2 {
        let wait = Duration::from_nanos(stage.rng.below(20_000_000));
        stage.world.run_for(wait);
        sim.lose_rdma_device(true);
        let wait = Duration::from_nanos(stage.rng.below(20_000_000));
        stage.world.run_for(wait);
        sim.lose_rdma_device(false);
        // Listening is tried again with the timer.
        stage.world.run_for(Duration::from_secs(1));
    }
    stage.wait_for_hosts();
    stage.close();
}

#[test]
fn target_survives_the_loss_of_its_device() {
    seeds::each("target_survives_the_loss_of_its_device", 15, &[], device_loss);
}

#[test]
fn a_seed_decides_everything() {
    let scenarios: [(&str, Scenario); 3] = [("serves", serves), ("network", network_faults), ("power", power)];
    for (kind, (name, scenario)) in
        [TransportKind::Tcp, TransportKind::Rdma].into_iter().flat_map(|kind| scenarios.map(|one| (kind, one)))
    {
        let scenario = |seed| scenario(kind, seed);
        let first = seeds::run_once(name, 7, scenario);
        assert!(first.1 > 100, "{name}: a run does something");
        assert_eq!(first, seeds::run_once(name, 7, scenario), "{name}");
        assert_ne!(first, seeds::run_once(name, 8, scenario), "{name}");
    }
}
