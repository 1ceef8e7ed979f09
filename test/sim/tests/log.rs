//! The log store, as a whole device over a simulated disk: it delays, reorders, fails, tears and loses what was not
//! flushed; workers panic; the base goes; the size changes. Whatever happens, a read finds the last acknowledged write or one
//! that was under way, and what was acknowledged as durable is there afterwards.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bdev::conformance::panicky::Panicky;
use bdev::core::{BdevError, BdevSystem};
use bdev::modules::appliance::builtin::{self, Maker};
use bdev::modules::appliance::settings::Settings;
use bdev::modules::{appliance, uring};
use reactor::buffer::PoolConfig;
use ringstone_sim::load::{Device, Faults, Load, LoadConfig, SharedDevice};
use ringstone_sim::seeds;
use ringstone_sim::{Model, Rng, Sim, World, WorldConfig};
use serde_json::json;

/// Seeds of a scenario that once failed, each with what was wrong.
mod regressions {
    pub const SERVES: &[u64] = &[];
    pub const POWER: &[u64] = &[];
    pub const PANICS: &[u64] = &[];
    pub const DISK_FAULTS: &[u64] = &[];
    /// 2685: the base refuses a read before the store hears that it goes.
    pub const BASE_REMOVED: &[u64] = &[2685];
}

const FILE: &str = "/volumes/base.img";
const SEGMENT: u64 = 65_536;

fn random_world(rng: &mut Rng) -> WorldConfig {
    let mut config = WorldConfig {
        reactors: 1 + rng.below(3) as usize,
        sleeps: !rng.one_in(4),
        rounds: 20_000_000,
        ..WorldConfig::default()
    };
    if rng.one_in(2) {
        config.io_pool = 2 << rng.below(4);
    }
    if rng.one_in(3) {
        // So little that everything waits for memory.
        config.buffers = PoolConfig { small: rng.below(6) as usize, medium: 1 + rng.below(2) as usize, large: 0 };
    }
    config
}

/// A store and the device that it is on.
#[derive(Clone, Copy)]
struct Store {
    block_size: u32,
    blocks: u64,
    base_block: u32,
    segments: u64,
    compress: bool,
    /// Not all of it fits.
    tight: bool,
    depth: usize,
}

impl Store {
    fn draw(rng: &mut Rng) -> Store {
        let block_size = if rng.one_in(2) { 512 } else { 4096 };
        let blocks = 16 + rng.below(300);
        let compress = rng.one_in(2);
        // What a block takes at most, beside what the store keeps for itself.
        let bytes = blocks * (u64::from(block_size) + 40);
        let tight = rng.one_in(5);
        let segments = if tight { 12 + rng.below(4) } else { 16 + bytes * 9 / (7 * 32_000) + rng.below(8) };
        let base_block = if rng.one_in(3) { 4096 } else { 512 };
        Store { block_size, blocks, base_block, segments, compress, tight, depth: 1 + rng.below(40) as usize }
    }

    fn create_file(&self, world: &World) {
        let bytes = 131_072 + self.segments * SEGMENT;
        world.sim().disk(|rules| rules.sector = self.base_block as usize);
        world.platform().files().create(Path::new(FILE), bytes).expect("a new file");
    }

    fn settings(&self) -> Settings {
        let mut settings = Settings::new("log", self.block_size, self.blocks);
        settings.queue_depth = self.depth;
        settings.spin = Duration::ZERO;
        let compression = if self.compress { "lz4" } else { "none" };
        settings.options = json!({ "base_bdev": "base", "compression": compression });
        settings
    }

    async fn create_base(self, system: Arc<BdevSystem>) -> Result<(), BdevError> {
        let options = uring::FileOptions {
            flavor: uring::Flavor::Uring,
            path: FILE.into(),
            block_size: Some(self.base_block),
            read_only: false,
            fallocate: None,
        };
        uring::create(&system, "base", None, options).await.map(drop)
    }

    async fn create(self, system: Arc<BdevSystem>) -> Result<(), BdevError> {
        self.create_base(Arc::clone(&system)).await?;
        appliance::create(&system, "log", None, self.settings()).await.map(drop)
    }

    /// As [`Store::create`], with workers that panic.
    async fn create_panicky(self, system: Arc<BdevSystem>, seed: u64) -> Result<Arc<Panicky>, BdevError> {
        self.create_base(Arc::clone(&system)).await?;
        let settings = self.settings();
        let maker = Maker { system: Arc::clone(&system), bdev: "log".into(), settings: settings.clone() };
        let panicky = Panicky::new(builtin::make(maker).await?, seed);
        appliance::create_with(&system, "log", None, settings, Arc::clone(&panicky) as _).await?;
        Ok(panicky)
    }
}

/// One machine from its start to the next power failure.
struct Scene {
    world: World,
    system: Arc<BdevSystem>,
    config: WorldConfig,
    device: SharedDevice,
    store: Store,
}

impl Scene {
    fn new(sim: &Arc<Sim>, seed: u64, rng: &mut Rng, store: Store, model: Option<Model>) -> Scene {
        let (world, config) = begin(sim, seed, rng, &store, model.is_none());
        Scene::with(world, config, store, model)
    }

    fn with(mut world: World, config: WorldConfig, store: Store, model: Option<Model>) -> Scene {
        let system = Arc::clone(world.system());
        world.block_on("the store to be made", store.create(Arc::clone(&system))).expect("the store can be made");
        let device = open(&system, &store, model);
        Scene { world, system, config, device, store }
    }

    fn start_loads(&mut self, rng: &mut Rng, beyond: u64) {
        let fits = (self.config.buffers.bytes() / self.store.block_size as usize).max(1) as u64;
        let mut aborts = false;
        for n in 0..1 + rng.below(4) as usize {
            let load = LoadConfig {
                operations: 60 + rng.below(200),
                depth: 1 + rng.below(16) as usize,
                max_blocks: (1 + rng.below(100)).min(fits),
                resets: rng.one_in(3),
                aborts: rng.one_in(2),
                beyond,
                ..LoadConfig::default()
            };
            aborts |= load.resets || load.aborts;
            Load::start(&mut self.world, n % self.config.reactors, &self.device, load, rng.next_u64());
        }
        self.device.borrow_mut().faults.aborts = aborts;
    }

    fn finish_loads(&mut self) {
        let device = self.device.clone();
        self.world.run_until("the loads to end", |_| device.borrow().loads == 0);
    }

    fn resize(&mut self, blocks: u64) {
        let system = Arc::clone(&self.system);
        let resized = async move { appliance::resize(&system, "log", blocks).await };
        self.world.block_on("a resize", resized).expect("the size can be changed");
    }

    /// Opens the device again for other loads, with the model that it has.
    fn again(&mut self) {
        let faults = self.device.borrow().faults;
        let model = std::mem::replace(&mut self.device.borrow_mut().model, Model::new(1, 512, true));
        self.device = Device::open(&self.system, "log", 0, false);
        (self.device.borrow_mut().model, self.device.borrow_mut().faults) = (model, faults);
    }

    fn sweep(&mut self, rng: &mut Rng) {
        self.device.borrow_mut().model.settled();
        self.again();
        self.device.borrow_mut().faults = Faults::default();
        let blocks = (self.config.buffers.bytes() / self.store.block_size as usize).clamp(1, 32) as u64;
        let load =
            LoadConfig { operations: u64::MAX, depth: 4, max_blocks: blocks, sweep: true, ..LoadConfig::default() };
        let reactor = rng.below(self.config.reactors as u64) as usize;
        Load::start(&mut self.world, reactor, &self.device, load, rng.next_u64());
        self.finish_loads();
    }

    fn delete(&mut self) {
        let system = Arc::clone(&self.system);
        let deleting = async move {
            appliance::delete(&system, "log").await?;
            system.remove("base").await
        };
        self.world.block_on("the deletes", deleting).expect("nobody has it open");
    }

    fn close(mut self, rng: &mut Rng) {
        self.sweep(rng);
        self.delete();
        self.world.assert_clean();
    }

    /// Lets the power fail; what is left of the disk and of what is known of it.
    fn power_cycle(self, rng: &mut Rng) -> (Arc<Sim>, Model) {
        let Scene { world, system, device, .. } = self;
        let model = std::mem::replace(&mut device.borrow_mut().model, Model::new(1, 512, true));
        drop(device);
        drop(system);
        (world.power_cycle(rng.next_u64()), model)
    }
}

fn begin(sim: &Arc<Sim>, seed: u64, rng: &mut Rng, store: &Store, is_new: bool) -> (World, WorldConfig) {
    let config = random_world(rng);
    let world = World::new(sim, config, seed);
    if is_new {
        store.create_file(&world);
    }
    (world, config)
}

fn open(system: &Arc<BdevSystem>, store: &Store, model: Option<Model>) -> SharedDevice {
    let device = match model {
        Some(model) => Device::reopen(system, "log", model),
        None => Device::open(system, "log", store.blocks, false),
    };
    device.borrow_mut().faults.full = store.tight;
    device
}

fn draw_disk(sim: &Sim, rng: &mut Rng) {
    sim.disk(|rules| {
        rules.volatile_cache = !rng.one_in(4);
        rules.direct = !rng.one_in(4);
        rules.queue_depth = 1 << rng.below(6);
        rules.slow_one_in = 40 * rng.below(2);
    });
}

/// Nothing goes wrong, but for sizes that change behind the model's blocks.
fn serves(seed: u64) {
    let mut rng = Rng::new(seed);
    let sim = Sim::new(seed);
    draw_disk(&sim, &mut rng);
    let mut store = Store::draw(&mut rng);
    let most = store.blocks;
    let resizes = rng.one_in(2);
    let kept = if resizes { most / 2 } else { most };
    let (world, config) = begin(&sim, seed, &mut rng, &store, true);
    let mut scene = Scene::with(world, config, store, None);
    scene.device.borrow_mut().model.set_len(kept);
    for round in 0..1 + rng.below(3) {
        if round > 0 {
            scene.again();
        }
        scene.start_loads(&mut rng, most - kept);
        while resizes && scene.device.borrow().loads > 0 {
            scene.world.run_for(Duration::from_nanos(rng.below(4_000_000)));
            store.blocks = kept + rng.below(most - kept + 1);
            scene.resize(store.blocks);
        }
        scene.finish_loads();
    }
    scene.close(&mut rng);
}

#[test]
fn log_serves() {
    seeds::each("log_serves", 40, regressions::SERVES, serves);
}

/// The power fails again and again under load, also while the store is made, and right after its size was changed; the device
/// is made again with the size that was last acknowledged.
fn power(seed: u64) {
    let mut rng = Rng::new(seed);
    let mut sim = Sim::new(seed);
    draw_disk(&sim, &mut rng);
    let mut store = Store::draw(&mut rng);
    let mut model = None;
    let mut is_new = true;
    for life in 0..5 {
        let (mut world, config) = begin(&sim, seed ^ life, &mut rng, &store, std::mem::take(&mut is_new));
        if life < 4 && rng.one_in(5) {
            let system = Arc::clone(world.system());
            let made = world.spawn(store.create(system));
            world.run_for(Duration::from_nanos(rng.below(3_000_000)));
            made.take().into_iter().for_each(|made| made.expect("the store can be made"));
            sim = world.power_cycle(rng.next_u64());
            continue;
        }
        let mut scene = Scene::with(world, config, store, model.take());
        scene.start_loads(&mut rng, 0);
        if life == 4 {
            scene.finish_loads();
            return scene.close(&mut rng);
        }
        if rng.one_in(2) {
            scene.finish_loads();
            if resize_for_good(&mut scene, &mut rng, &mut store) && rng.one_in(2) {
                scene.again();
                scene.start_loads(&mut rng, 0);
            }
        }
        scene.world.run_for(Duration::from_nanos(rng.below(8_000_000)));
        let (next, known) = scene.power_cycle(&mut rng);
        (sim, model) = (next, Some(known));
    }
}

/// Changes the size with what is there; whether it was acknowledged.
fn resize_for_good(scene: &mut Scene, rng: &mut Rng, store: &mut Store) -> bool {
    let old = store.blocks;
    let new = 1 + rng.below(old + 20);
    if new < old && rng.one_in(3) {
        // Nobody will know whether it was done.
        scene.again();
        let mut device = scene.device.borrow_mut();
        let token = device.model.write(0, new, old - new);
        device.model.lost(token, new, old - new);
        drop(device);
        let system = Arc::clone(&scene.system);
        let _ = scene.world.spawn(async move { appliance::resize(&system, "log", new).await });
        scene.world.run_for(Duration::from_nanos(rng.below(2_000_000)));
        return false;
    }
    scene.resize(new);
    scene.device.borrow_mut().model.set_len(new);
    store.blocks = new;
    true
}

#[test]
fn log_power_failure() {
    seeds::each("log_power_failure", 60, regressions::POWER, power);
}

/// Workers panic, between any two things that they do, and the power fails too.
fn panics(seed: u64) {
    let mut rng = Rng::new(seed);
    let mut sim = Sim::new(seed);
    draw_disk(&sim, &mut rng);
    let mut store = Store::draw(&mut rng);
    let mut model: Option<Model> = None;
    for life in 0..3 {
        let (mut world, config) = begin(&sim, seed ^ life, &mut rng, &store, life == 0);
        let system = Arc::clone(world.system());
        let make = store.create_panicky(Arc::clone(&system), rng.next_u64());
        let panicky = world.block_on("the store to be made", make).expect("the store can be made");
        let device = open(&system, &store, model.take());
        let mut scene = Scene { world, system, config, device, store };
        scene.start_loads(&mut rng, 0);
        // It grows, and may not fit any more.
        (scene.device.borrow_mut().faults.rogue, scene.device.borrow_mut().faults.full) = (true, true);
        let lives_on = life == 2;
        let end = Duration::from_millis(rng.below(4_000));
        let began = scene.world.sim().uptime();
        while scene.device.borrow().loads > 0 && (lives_on || scene.world.sim().uptime() - began < end) {
            if panicky.left() == 0 && rng.one_in(3) {
                panicky.panic(1 + rng.below(4), 1 + rng.below(300));
            }
            scene.world.run_for(Duration::from_nanos(rng.below(300_000_000)));
            if rng.one_in(4) && store.blocks < 2000 {
                // More, so that there may be data that a smaller store would be refused for.
                store.blocks += rng.below(20);
                scene.resize(store.blocks);
                scene.device.borrow_mut().model.set_len(store.blocks);
            }
        }
        if lives_on {
            panicky.panic(0, 0);
            // The last worker may still have to be made again.
            scene.world.run_for(Duration::from_secs(3));
            scene.finish_loads();
            assert_eq!(Arc::strong_count(&panicky), 3, "the handler is kept by its device, its worker and this");
            drop(panicky);
            return scene.close(&mut rng);
        }
        drop(panicky);
        let (next, known) = scene.power_cycle(&mut rng);
        (sim, model) = (next, Some(known));
    }
}

#[test]
fn log_panics() {
    seeds::each("log_panics", 40, regressions::PANICS, panics);
}

/// The disk fails. A store that does not know any more what is durable refuses writes until it is made again; then what was
/// acknowledged is there.
fn disk_faults(seed: u64) {
    let mut rng = Rng::new(seed);
    let sim = Sim::new(seed);
    draw_disk(&sim, &mut rng);
    let store = Store::draw(&mut rng);
    let mut scene = Scene::new(&sim, seed, &mut rng, store, None);
    sim.disk(|rules| {
        rules.read_error_one_in = [0, 20, 200][rng.below(3) as usize];
        rules.write_error_one_in = [0, 20, 200][rng.below(3) as usize];
        rules.sync_error_one_in = [0, 5, 100][rng.below(3) as usize];
    });
    (scene.device.borrow_mut().faults.media, scene.device.borrow_mut().faults.full) = (true, true);
    scene.start_loads(&mut rng, 0);
    scene.finish_loads();
    sim.disk(|rules| (rules.read_error_one_in, rules.write_error_one_in, rules.sync_error_one_in) = (0, 0, 0));
    scene.delete();
    let (system, store) = (Arc::clone(&scene.system), scene.store);
    let make = store.create(Arc::clone(&system));
    scene.world.block_on("the store to be made again", make).expect("what is there can be opened");
    scene.again();
    (scene.device.borrow_mut().faults.media, scene.device.borrow_mut().faults.full) = (false, store.tight);
    scene.start_loads(&mut rng, 0);
    scene.finish_loads();
    scene.close(&mut rng);
}

#[test]
fn log_disk_faults() {
    seeds::each("log_disk_faults", 40, regressions::DISK_FAULTS, disk_faults);
}

/// The base is removed under load, and the store goes with it; both come back.
fn base_removed(seed: u64) {
    let mut rng = Rng::new(seed);
    let sim = Sim::new(seed);
    draw_disk(&sim, &mut rng);
    let store = Store::draw(&mut rng);
    let mut scene = Scene::new(&sim, seed, &mut rng, store, None);
    for _ in 0..3 {
        scene.start_loads(&mut rng, 0);
        scene.world.run_for(Duration::from_nanos(rng.below(6_000_000)));
        let system = Arc::clone(&scene.system);
        if rng.one_in(3) {
            scene
                .world
                .block_on("the delete", async move { appliance::delete(&system, "log").await })
                .expect("it goes");
        }
        scene.device.borrow_mut().faults.base_goes = true;
        let system = Arc::clone(&scene.system);
        scene.world.block_on("the removal", async move { system.remove("base").await }).expect("it goes");
        assert!(scene.system.get("log").is_err(), "the store has gone before its base");
        scene.finish_loads();
        let make = store.create(Arc::clone(&scene.system));
        scene.world.block_on("the store to be made again", make).expect("what is there can be opened");
        // Nothing of before is under way any more.
        scene.device.borrow_mut().model.settled();
        scene.device.borrow_mut().faults.base_goes = false;
        scene.again();
    }
    scene.start_loads(&mut rng, 0);
    scene.finish_loads();
    scene.close(&mut rng);
}

#[test]
fn log_base_removed_under_load() {
    seeds::each("log_base_removed_under_load", 30, regressions::BASE_REMOVED, base_removed);
}

#[test]
fn a_seed_decides_everything() {
    for seed in 1..4 {
        for (name, scenario) in [
            ("serves", serves as fn(u64)),
            ("power", power),
            ("panics", panics),
            ("disk_faults", disk_faults),
            ("base_removed", base_removed),
        ] {
            // Log lines name requests, whose numbers are the process's: what happens is compared by how much it is.
            let (_, first) = seeds::run_once(name, seed, scenario);
            assert!(first > 100, "{name}: a run does something");
            assert_eq!(first, seeds::run_once(name, seed, scenario).1, "{name}, seed {seed}");
            assert_ne!(first, seeds::run_once(name, seed + 1000, scenario).1, "{name}, seed {seed}");
        }
    }
}
