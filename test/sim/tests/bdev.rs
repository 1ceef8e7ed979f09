//! The bdev layer and its modules on simulated reactors and disks.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bdev::core::system::REMOVE_PATIENCE;
use bdev::core::{BdevError, BdevSystem};
use bdev::modules::{malloc, null, uring};
use reactor::buffer::PoolConfig;
use ringstone_sim::load::{Device, Faults, Load, LoadConfig, SharedDevice};
use ringstone_sim::seeds;
use ringstone_sim::{Rng, Sim, World, WorldConfig};

/// Seeds of a scenario that once failed, each with what was wrong.
mod regressions {
    pub const LAYER: &[u64] = &[];
    pub const DISK_FAULTS: &[u64] = &[];
    pub const POWER: &[u64] = &[];
    pub const REMOVAL: &[u64] = &[];
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Null,
    Malloc,
    File,
}

const FILE: &str = "/volumes/disk.img";

fn random_config(rng: &mut Rng) -> WorldConfig {
    let mut config =
        WorldConfig { reactors: 1 + rng.below(3) as usize, sleeps: !rng.one_in(4), ..WorldConfig::default() };
    if rng.one_in(2) {
        // So few that everything waits.
        config.io_pool = 2 << rng.below(3);
        let (small, medium) = (rng.below(6) as usize, rng.below(3) as usize);
        config.buffers = PoolConfig { small, medium, large: rng.below(2) as usize };
        if config.buffers.bytes() < 16_384 {
            config.buffers.medium = 1;
        }
    }
    config
}

struct Made {
    kind: Kind,
    block_size: u32,
    blocks: u64,
}

impl Made {
    fn draw(rng: &mut Rng, kind: Kind) -> Made {
        let block_size = if rng.one_in(3) { 4096 } else { 512 };
        Made { kind, block_size, blocks: 64 + rng.below(600) }
    }

    /// Registers the device `name`.
    async fn create(self, system: Arc<BdevSystem>, name: &str) -> Result<(), BdevError> {
        let Made { kind, block_size, blocks } = self;
        match kind {
            Kind::Null => {
                let options = null::NullOptions { block_size, num_blocks: blocks, physical_block_size: 0 };
                null::create(&system, name, None, options).await.map(drop)
            }
            Kind::Malloc => {
                let options = malloc::MallocOptions {
                    block_size,
                    num_blocks: blocks,
                    physical_block_size: 0,
                    optimal_io_boundary: 0,
                };
                malloc::create(&system, name, None, options).await.map(drop)
            }
            Kind::File => {
                let options = uring::FileOptions {
                    flavor: uring::Flavor::Uring,
                    path: FILE.into(),
                    block_size: Some(block_size),
                    read_only: false,
                    fallocate: None,
                };
                uring::create(&system, name, None, options).await.map(drop)
            }
        }
    }
}

fn load_config(rng: &mut Rng, world: WorldConfig, made_block: u32) -> LoadConfig {
    // Both halves of the largest payload must fit the pool at once.
    let fits = (world.buffers.bytes() / made_block as usize).max(1) as u64;
    LoadConfig {
        operations: 60 + rng.below(120),
        depth: 1 + rng.below(16) as usize,
        max_blocks: (1 + rng.below(400)).min(fits),
        resets: rng.one_in(2),
        aborts: rng.one_in(2),
        ..LoadConfig::default()
    }
}

fn start_loads(world: &mut World, rng: &mut Rng, device: &SharedDevice, config: WorldConfig, beyond: u64) {
    let block_size = device.borrow().model.block_size() as u32;
    let mut resets = false;
    for n in 0..1 + rng.below(4) as usize {
        let mut load = load_config(rng, config, block_size);
        load.beyond = beyond;
        resets |= load.resets;
        Load::start(world, n % config.reactors, device, load, rng.next_u64());
    }
    device.borrow_mut().faults.aborts = resets;
}

fn finish_loads(world: &mut World, device: &SharedDevice) {
    let device = device.clone();
    world.run_until("the loads to end", |_| device.borrow().loads == 0);
}

fn sweep(world: &mut World, rng: &mut Rng, system: &Arc<BdevSystem>, device: SharedDevice, config: WorldConfig) {
    let name = "disk";
    let reopened = Device::open(system, name, 0, false);
    let mut inner = device.borrow_mut();
    inner.model.settled();
    let blocks = (config.buffers.bytes() / inner.model.block_size()).clamp(1, 32) as u64;
    std::mem::swap(&mut inner.model, &mut reopened.borrow_mut().model);
    reopened.borrow_mut().forgets = inner.forgets;
    drop(inner);
    let load = LoadConfig { operations: u64::MAX, depth: 4, max_blocks: blocks, sweep: true, ..LoadConfig::default() };
    Load::start(world, rng.below(config.reactors as u64) as usize, &reopened, load, rng.next_u64());
    finish_loads(world, &reopened);
}

fn layer(seed: u64) {
    let mut rng = Rng::new(seed);
    let config = random_config(&mut rng);
    let sim = Sim::new(seed);
    sim.disk(|rules| {
        rules.volatile_cache = rng.one_in(2);
        rules.direct = !rng.one_in(4);
        rules.discard = !rng.one_in(4);
        rules.queue_depth = 1 << rng.below(6);
    });
    let mut world = World::new(&sim, config, seed);
    let kind = [Kind::Null, Kind::Malloc, Kind::File, Kind::File][rng.below(4) as usize];
    let made = Made::draw(&mut rng, kind);
    let (blocks, block_size) = (made.blocks, made.block_size);
    sim.disk(|rules| rules.sector = block_size as usize);
    world.platform().files().create(Path::new(FILE), blocks * u64::from(block_size)).expect("a new file");
    let system = Arc::clone(world.system());
    let create = made.create(Arc::clone(&system), "disk");
    world.block_on("the device to be made", create).expect("the device can be made");
    // Resizes move the end about behind the model's blocks.
    let resizes = rng.one_in(2);
    let kept = if resizes { blocks / 2 } else { blocks };
    let device = Device::open(&system, "disk", kept, kind == Kind::Null);
    start_loads(&mut world, &mut rng, &device, config, blocks - kept);
    if resizes {
        let resizing = resize_often(&world, Rng::new(rng.next_u64()), device.clone(), (kind, block_size), kept, blocks);
        let resizing = world.spawn(resizing);
        finish_loads(&mut world, &device);
        world.run_until("the resizing to end", |_| resizing.take().is_some());
        return close(world, &mut rng, &system, device, config);
    }
    finish_loads(&mut world, &device);
    close(world, &mut rng, &system, device, config);
}

/// Moves the end of the device about between `least` and `most` blocks as long as there are loads.
fn resize_often(
    world: &World,
    mut rng: Rng,
    device: SharedDevice,
    (kind, block_size): (Kind, u32),
    least: u64,
    most: u64,
) -> impl Future<Output = ()> + use<> {
    let system = Arc::clone(world.system());
    async move {
        while device.borrow().loads > 0 {
            system.executor().sleep(Duration::from_nanos(rng.below(4_000_000))).await;
            let to = least + rng.below(most - least + 1);
            let result = match kind {
                Kind::Null => null::resize(&system, "disk", to).await,
                Kind::Malloc => malloc::resize(&system, "disk", to).await,
                Kind::File => {
                    let files = system.platform().files();
                    files.set_len(Path::new(FILE), to * u64::from(block_size)).expect("the file has a size");
                    uring::rescan(&system, "disk", uring::Flavor::Uring).await
                }
            };
            result.expect("it can be resized");
        }
    }
}

fn close(mut world: World, rng: &mut Rng, system: &Arc<BdevSystem>, device: SharedDevice, config: WorldConfig) {
    sweep(&mut world, rng, system, device, config);
    let system = Arc::clone(system);
    world.block_on("the removal", async move { system.remove("disk").await }).expect("nobody has it open");
    world.assert_clean();
}

#[test]
fn bdev_layer() {
    seeds::each("bdev_layer", 60, regressions::LAYER, layer);
}

fn disk_faults(seed: u64) {
    let mut rng = Rng::new(seed);
    let config = random_config(&mut rng);
    let sim = Sim::new(seed);
    let made = Made::draw(&mut rng, Kind::File);
    let (blocks, block_size) = (made.blocks, made.block_size);
    let full = rng.one_in(2);
    sim.disk(|rules| {
        rules.read_error_one_in = 5 + rng.below(100);
        rules.write_error_one_in = 5 + rng.below(100);
        rules.sync_error_one_in = 2 + rng.below(10);
        rules.slow_one_in = 50 * rng.below(2);
        rules.discard = !rng.one_in(4);
        if full {
            rules.capacity_sectors = rng.below(blocks) as usize;
        }
    });
    let mut world = World::new(&sim, config, seed);
    sim.disk(|rules| rules.sector = block_size as usize);
    world.platform().files().create(Path::new(FILE), blocks * u64::from(block_size)).expect("a new file");
    let system = Arc::clone(world.system());
    let create = made.create(Arc::clone(&system), "disk");
    world.block_on("the device to be made", create).expect("the device can be made");
    let device = Device::open(&system, "disk", blocks, false);
    start_loads(&mut world, &mut rng, &device, config, 0);
    let aborts = device.borrow().faults.aborts;
    device.borrow_mut().faults = Faults { media: true, full, aborts, ..Faults::default() };
    finish_loads(&mut world, &device);
    sim.disk(|rules| {
        (rules.read_error_one_in, rules.write_error_one_in, rules.sync_error_one_in) = (0, 0, 0);
    });
    close(world, &mut rng, &system, device, config);
}

#[test]
fn bdev_disk_faults() {
    seeds::each("bdev_disk_faults", 30, regressions::DISK_FAULTS, disk_faults);
}

/// The power fails again and again under load; what was flushed is there each time.
fn power(seed: u64) {
    let mut rng = Rng::new(seed);
    let mut sim = Sim::new(seed);
    let block_size = if rng.one_in(3) { 4096 } else { 512 };
    let blocks = 32 + rng.below(300);
    sim.disk(|rules| {
        rules.sector = block_size as usize;
        rules.volatile_cache = !rng.one_in(4);
        rules.discard = !rng.one_in(4);
    });
    let mut model = None;
    for life in 0..4 {
        let config = random_config(&mut rng);
        let mut world = World::new(&sim, config, seed ^ life);
        if life == 0 {
            sim.disk(|rules| rules.sector = block_size as usize);
            world.platform().files().create(Path::new(FILE), blocks * u64::from(block_size)).expect("a new file");
        }
        let system = Arc::clone(world.system());
        let create = Made { kind: Kind::File, block_size, blocks }.create(Arc::clone(&system), "disk");
        world.block_on("the device to be made", create).expect("the device can be made");
        let device = match model.take() {
            Some(model) => Device::reopen(&system, "disk", model),
            None => Device::open(&system, "disk", blocks, false),
        };
        start_loads(&mut world, &mut rng, &device, config, 0);
        if life == 3 {
            finish_loads(&mut world, &device);
            return close(world, &mut rng, &system, device, config);
        }
        world.run_for(Duration::from_nanos(rng.below(6_000_000)));
        model = Some(std::mem::replace(&mut device.borrow_mut().model, ringstone_sim::Model::new(1, 512, true)));
        drop(device);
        drop(system);
        sim = world.power_cycle(rng.next_u64());
    }
}

#[test]
fn bdev_power_failure() {
    seeds::each("bdev_power_failure", 40, regressions::POWER, power);
}

/// Devices are removed under load, and made again under the same name.
fn removal(seed: u64) {
    let mut rng = Rng::new(seed);
    let config = random_config(&mut rng);
    let sim = Sim::new(seed);
    let mut world = World::new(&sim, config, seed);
    let system = Arc::clone(world.system());
    for round in 0..4 {
        let kind = [Kind::Null, Kind::Malloc, Kind::File][rng.below(3) as usize];
        let made = Made { block_size: if kind == Kind::File { 512 } else { 4096 }, ..Made::draw(&mut rng, kind) };
        let blocks = made.blocks;
        let (files, bytes) = (world.platform().files(), blocks * u64::from(made.block_size));
        if round == 0 {
            sim.disk(|rules| rules.sector = 512);
            files.create(Path::new(FILE), bytes).expect("a new file");
        }
        files.set_len(Path::new(FILE), 0).and_then(|()| files.set_len(Path::new(FILE), bytes)).expect("an old file");
        let create = made.create(Arc::clone(&system), "disk");
        world.block_on("the device to be made", create).expect("the device can be made");
        let device = Device::open(&system, "disk", blocks, kind == Kind::Null);
        start_loads(&mut world, &mut rng, &device, config, 0);
        world.run_for(Duration::from_nanos(rng.below(5_000_000)));
        let began = sim.uptime();
        let removing = Arc::clone(&system);
        world.block_on("the removal", async move { removing.remove("disk").await }).expect("the loads let go of it");
        assert!(sim.uptime() - began < REMOVE_PATIENCE);
        assert!(system.get("disk").is_err(), "it is gone");
        assert_eq!(device.borrow().loads, 0, "no load has it open");
    }
    world.assert_clean();
}

#[test]
fn bdev_removal_under_load() {
    seeds::each("bdev_removal_under_load", 40, regressions::REMOVAL, removal);
}

#[test]
fn a_seed_decides_everything() {
    for seed in 1..6 {
        for (name, scenario) in
            [("layer", layer as fn(u64)), ("faults", disk_faults), ("power", power), ("removal", removal)]
        {
            let first = seeds::run_once(name, seed, scenario);
            assert!(first.1 > 100, "{name}: a run does something");
            assert_eq!(first, seeds::run_once(name, seed, scenario), "{name}, seed {seed}");
            assert_ne!(first, seeds::run_once(name, seed + 1000, scenario), "{name}, seed {seed}");
        }
    }
}
