//! NBD exports on simulated reactors, network and disks, with clients that check what they are told.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use nbd::group::{Loads, NbdGroup};
use nbd::system::NbdSystem;
use ringstone_sim::nbd::{Manner, NbdClient, Shared, SharedExport};
use ringstone_sim::world::WorldView;
use ringstone_sim::{Model, Rng, Sim, World, WorldConfig, seeds};

/// Seeds of a scenario that once failed, each with what was wrong.
mod regressions {
    pub const SERVES: &[u64] = &[];
    pub const ENDS: &[u64] = &[];
    pub const POWER: &[u64] = &[];
}

const BDEV: &str = "vol";

fn socket() -> PathBuf {
    PathBuf::from("/run/vol.sock")
}

/// An export, and clients of it.
struct Stage {
    world: World,
    nbd: Arc<NbdSystem>,
    shared: SharedExport,
    clients: Vec<Rc<RefCell<NbdClient>>>,
    rng: Rng,
}

/// The volume.
#[derive(Clone, Copy)]
struct Volume {
    file: bool,
    block_size: u32,
    blocks: u64,
}

impl Volume {
    fn draw(rng: &mut Rng) -> Volume {
        let block_size = if rng.one_in(2) { 4096 } else { 512 };
        Volume { file: rng.one_in(2), block_size, blocks: 100 + rng.below(300) }
    }
}

fn machine(seed: u64, rng: &mut Rng, volume: Volume) -> Arc<Sim> {
    let sim = Sim::new(seed);
    sim.disk(|rules| {
        rules.sector = volume.block_size as usize;
        rules.volatile_cache = rng.one_in(2);
        rules.queue_depth = 1 << rng.below(6);
    });
    sim.net(|rules| {
        rules.delay_ns = (1_000, 10_000 + rng.below(500_000));
        rules.segment = (1, 100 + rng.below(100_000));
        rules.buffer = (500 + rng.below(5_000), 6_000 + rng.below(400_000));
    });
    sim
}

impl Stage {
    fn start(seed: u64) -> Stage {
        let mut rng = Rng::new(seed);
        let volume = Volume::draw(&mut rng);
        let sim = machine(seed, &mut rng, volume);
        Stage::new(&sim, rng, volume, None)
    }

    /// `model` is of a volume that was there before.
    fn new(sim: &Arc<Sim>, mut rng: Rng, volume: Volume, model: Option<Model>) -> Stage {
        let Volume { file, block_size, blocks } = volume;
        let config = WorldConfig::drawn(&mut rng, |rng| 4 + rng.below(3) as usize);
        let mut world = World::new(sim, config, rng.next_u64());
        if file && model.is_none() {
            let bytes = blocks * u64::from(block_size);
            world.platform().files().create(Path::new("/volumes/vol.img"), bytes).expect("a new file");
        }
        let volume = ringstone_sim::volume::Volume { name: BDEV.into(), file, block_size, blocks };
        let made = volume.create(Arc::clone(world.system()));
        world.block_on("the volume", made);
        let loads = Arc::new(Loads::new(world.reactor_count()));
        for n in 0..world.reactor_count() {
            NbdGroup::install(world.context(n), Arc::clone(&loads));
        }
        let nbd = NbdSystem::new(Arc::clone(world.system()));
        let bdev = world.system().get(BDEV).expect("it was just made");
        let volatile = bdev.device().geometry().volatile_cache;
        let model = model.unwrap_or_else(|| Model::new(blocks, block_size, volatile));
        let shared = Rc::new(RefCell::new(Shared { model, succeeded: 0, ends: false }));
        let mut stage = Stage { world, nbd, shared, clients: Vec::new(), rng };
        stage.export();
        stage
    }

    fn export(&mut self) {
        let nbd = Arc::clone(&self.nbd);
        let added = async move { nbd.add(BDEV, &socket(), false).await };
        self.world.block_on("the export", added).expect("it can be exported");
    }

    fn add_clients(&mut self, requests: u64) {
        let view = WorldView { sim: Arc::clone(self.world.sim()) };
        let works = 1 + self.rng.below(4);
        let others = [Manner::Silent, Manner::Stops, Manner::Deaf];
        let manners: Vec<Manner> =
            (0..works).map(|_| Manner::Works).chain(others.into_iter().filter(|_| self.rng.one_in(3))).collect();
        for manner in manners {
            let requests = 1 + requests / 2 + self.rng.below(requests);
            let seed = self.rng.next_u64();
            let client = NbdClient::new(&view, &socket(), &self.shared, manner, requests, seed);
            self.world.add_actor(client.clone());
            self.clients.push(client);
        }
    }

    fn wait_for_clients(&mut self) {
        let clients = self.clients.clone();
        self.world.run_until("the clients to end", |_| clients.iter().all(|client| client.borrow().is_done()));
        assert!(self.shared.borrow().succeeded > 0, "nothing succeeded");
    }

    /// Everything goes, and nothing may be left.
    fn close(mut self) {
        self.world.clear_actors();
        self.clients.clear();
        let nbd = Arc::clone(&self.nbd);
        self.world.block_on("the end of the exports", async move { nbd.shut_down().await });
        let system = Arc::clone(self.world.system());
        let removed = async move { system.remove(BDEV).await };
        self.world.block_on("the removal", removed).expect("nobody has it open");
        self.world.assert_clean();
        let sim = Arc::clone(self.world.sim());
        self.world.run_until("sockets to be closed", |_| sim.open_sockets() == 0);
    }
}

/// Clients that work are served to the end, whatever others do.
fn serves(seed: u64) {
    let mut stage = Stage::start(seed);
    stage.add_clients(120);
    stage.wait_for_clients();
    stage.close();
}

#[test]
fn nbd_serves_clients() {
    seeds::each("nbd_serves_clients", 25, regressions::SERVES, serves);
}

/// The export is removed and added again and again while clients work; connections break.
fn ends(seed: u64) {
    let mut stage = Stage::start(seed);
    stage.shared.borrow_mut().ends = true;
    stage.add_clients(150);
    for _ in 0..1 + stage.rng.below(5) {
        let wait = Duration::from_nanos(stage.rng.below(10_000_000));
        stage.world.run_for(wait);
        if stage.rng.one_in(3) {
            let sim = Arc::clone(stage.world.sim());
            sim.break_connections(1 + stage.rng.below(3) as usize);
            continue;
        }
        let nbd = Arc::clone(&stage.nbd);
        let removed = async move { nbd.remove(&socket()).await };
        stage.world.block_on("the removal of the export", removed).expect("it ends in time");
        stage.export();
    }
    stage.wait_for_clients();
    stage.close();
}

#[test]
fn nbd_exports_end_under_load() {
    seeds::each("nbd_exports_end_under_load", 25, regressions::ENDS, ends);
}

/// The power fails while clients work; what was flushed, or written with FUA, is there afterwards.
fn power(seed: u64) {
    let mut rng = Rng::new(seed);
    let volume = Volume { file: true, ..Volume::draw(&mut rng) };
    let mut sim = machine(seed, &mut rng, volume);
    let mut model = None;
    for life in 0..3 {
        let mut stage = Stage::new(&sim, Rng::new(rng.next_u64()), volume, model.take());
        stage.add_clients(100);
        if life == 2 {
            stage.wait_for_clients();
            return stage.close();
        }
        let wait = Duration::from_nanos(rng.below(30_000_000));
        stage.world.run_for(wait);
        let Stage { world, nbd, shared, clients, .. } = stage;
        sim.power_off();
        drop((clients, nbd));
        // The world's actors hold it too.
        let mut kept = std::mem::replace(&mut shared.borrow_mut().model, Model::new(1, 512, false));
        kept.crashed();
        model = Some(kept);
        sim = world.power_cycle(rng.next_u64());
    }
}

#[test]
fn nbd_power_failure() {
    seeds::each("nbd_power_failure", 15, regressions::POWER, power);
}
