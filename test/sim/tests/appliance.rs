//! Appliance devices whose handlers misbehave at seeded moments: whatever they do, every operation of a host ends, what
//! succeeded is there, and everything lent comes back.

use std::sync::Arc;
use std::time::Duration;

use bdev::conformance::rogue::{Habits, Rogue};
use bdev::core::BdevSystem;
use bdev::modules::appliance;
use bdev::modules::appliance::settings::{Placement, Settings};
use reactor::buffer::PoolConfig;
use ringstone_sim::load::{Device, Faults, Load, LoadConfig, SharedDevice};
use ringstone_sim::seeds;
use ringstone_sim::{Rng, Sim, World, WorldConfig};

/// Seeds of a scenario that once failed, each with what was wrong.
mod regressions {
    pub const ROGUE: &[u64] = &[];
    pub const REMOVAL: &[u64] = &[];
}

fn random_world(rng: &mut Rng) -> WorldConfig {
    let mut config =
        WorldConfig { reactors: 1 + rng.below(3) as usize, sleeps: !rng.one_in(4), ..WorldConfig::default() };
    if rng.one_in(2) {
        config.io_pool = 2 << rng.below(4);
    }
    if rng.one_in(3) {
        // So little that everything waits for memory.
        config.buffers = PoolConfig { small: rng.below(6) as usize, medium: 1 + rng.below(2) as usize, large: 0 };
    }
    config
}

fn random_habits(rng: &mut Rng) -> Habits {
    let mut habit = |one_in: u64| if rng.one_in(2) { 0 } else { 2 + rng.below(one_in) };
    let mut habits = Habits {
        hold: habit(4),
        lose: habit(40),
        leak: habit(40),
        panic: habit(80),
        wrong_length: habit(40),
        truncate: habit(40),
        fail: habit(20),
        refuse: habit(6),
        ..Habits::default()
    };
    habits.hold_ns = 1 + rng.below(3_000_000);
    habits.deaf = rng.one_in(3);
    habits.seed = rng.next_u64();
    habits
}

fn random_settings(rng: &mut Rng, block_size: u32, blocks: u64) -> Settings {
    let mut settings = Settings::new("rogue", block_size, blocks);
    settings.workers = 1 + rng.below(3) as usize;
    settings.queue_depth = 1 + rng.below(20) as usize;
    settings.placement = [Placement::LbaRange, Placement::Queue, Placement::RoundRobin][rng.below(3) as usize];
    settings.spin = Duration::ZERO;
    // Without a deadline a lost request would never end.
    settings.timeout = Some(Duration::from_micros(500 + rng.below(20_000)));
    settings.latency_sample = rng.below(4) as u32;
    settings
}

struct Scene {
    world: World,
    system: Arc<BdevSystem>,
    config: WorldConfig,
    rogue: Arc<Rogue>,
    device: SharedDevice,
    blocks: u64,
    block_size: u32,
}

impl Scene {
    fn new(seed: u64, rng: &mut Rng, name: &str) -> Scene {
        let config = random_world(rng);
        let sim = Sim::new(seed);
        let mut world = World::new(&sim, config, seed);
        let system = Arc::clone(world.system());
        let block_size = if rng.one_in(3) { 4096 } else { 512 };
        let blocks = 64 + rng.below(500);
        let (rogue, device) = make(&mut world, rng, name, block_size, blocks);
        Scene { world, system, config, rogue, device, blocks, block_size }
    }

    fn start_loads(&mut self, rng: &mut Rng, beyond: u64) {
        let fits = (self.config.buffers.bytes() / self.block_size as usize).max(1) as u64;
        for n in 0..1 + rng.below(4) as usize {
            let load = LoadConfig {
                operations: 40 + rng.below(120),
                depth: 1 + rng.below(16) as usize,
                max_blocks: (1 + rng.below(100)).min(fits),
                resets: rng.one_in(2),
                aborts: rng.one_in(2),
                beyond,
                ..LoadConfig::default()
            };
            Load::start(&mut self.world, n % self.config.reactors, &self.device, load, rng.next_u64());
        }
    }
}

fn make(world: &mut World, rng: &mut Rng, name: &str, block_size: u32, blocks: u64) -> (Arc<Rogue>, SharedDevice) {
    let rogue = Rogue::new(block_size, blocks, random_habits(rng)).expect("there is memory");
    let settings = random_settings(rng, block_size, blocks);
    let system = Arc::clone(world.system());
    let (handler, name) = (Arc::clone(&rogue), name.to_string());
    let (making, made) = (Arc::clone(&system), name.clone());
    let create = async move { appliance::create_with(&making, &made, None, settings, handler).await.map(drop) };
    world.block_on("the device to be made", create).expect("the device can be made");
    let device = Device::open(&system, &name, blocks, false);
    device.borrow_mut().faults = Faults { rogue: true, ..Faults::default() };
    (rogue, device)
}

/// Everything goes wrong for a while; then the handler behaves, and what the model knows must be there.
fn rogue(seed: u64) {
    let mut rng = Rng::new(seed);
    let mut scene = Scene::new(seed, &mut rng, "app");
    scene.start_loads(&mut rng, 0);
    while scene.device.borrow().loads > 0 {
        let pause = Duration::from_nanos(rng.below(4_000_000));
        scene.world.run_for(pause);
        match rng.below(8) {
            0 => scene.world.stall_lone(Duration::from_nanos(rng.below(60_000_000))),
            1 => drop(scene.rogue.release()),
            2 => scene.rogue.set_habits(random_habits(&mut rng)),
            3 => {
                // The same size: everybody is told, and nothing changes.
                let (system, blocks) = (Arc::clone(&scene.system), scene.blocks);
                let resized = async move { appliance::resize(&system, "app", blocks).await };
                scene.world.block_on("a resize", resized).expect("its size can be what it is");
            }
            _ => {}
        }
    }
    // It comes to its senses.
    scene.rogue.set_habits(Habits::default());
    scene.world.run_for(Duration::from_secs(3));
    scene.rogue.release();
    let system = Arc::clone(&scene.system);
    scene.world.run_until("all requests to come home", |_| {
        let stats = appliance::stats(&system, "app").expect("it is there");
        stats["overdue"] == 0 && stats["with_handler"] == 0 && stats["waiting"] == 0
    });
    // Deadlines may be shorter than the host's other business, but not every time.
    while !sweep(&mut scene, &mut rng) {}
    end(scene);
}

/// Reads everything; whether any of it could be read.
fn sweep(scene: &mut Scene, rng: &mut Rng) -> bool {
    let reopened = Device::open(&scene.system, "app", 0, false);
    {
        let mut inner = scene.device.borrow_mut();
        inner.model.settled();
        std::mem::swap(&mut inner.model, &mut reopened.borrow_mut().model);
    }
    reopened.borrow_mut().faults.rogue = true;
    let blocks = (scene.config.buffers.bytes() / scene.block_size as usize).clamp(1, 32) as u64;
    let load = LoadConfig { operations: u64::MAX, depth: 4, max_blocks: blocks, sweep: true, ..LoadConfig::default() };
    Load::start(&mut scene.world, 0, &reopened, load, rng.next_u64());
    scene.world.run_until("the sweep to end", |_| reopened.borrow().loads == 0);
    scene.device = reopened;
    scene.device.borrow().succeeded > 0
}

fn end(mut scene: Scene) {
    let system = Arc::clone(&scene.system);
    let deleting = async move { appliance::delete(&system, "app").await };
    scene.world.block_on("the delete", deleting).expect("nobody has it open");
    scene.rogue.release();
    let told = scene.rogue.told();
    scene.world.assert_clean();
    assert!(told.stopped.load(std::sync::atomic::Ordering::Acquire), "the handler was not stopped");
    assert_eq!(Arc::strong_count(&scene.rogue), 1, "somebody keeps the handler");
}

#[test]
fn appliance_rogue() {
    seeds::each("appliance_rogue", 60, regressions::ROGUE, rogue);
}

/// Devices are deleted under load, with handlers that hang, and made again under the same name.
fn removal(seed: u64) {
    let mut rng = Rng::new(seed);
    let mut scene = Scene::new(seed, &mut rng, "app");
    for _ in 0..3 {
        scene.start_loads(&mut rng, 0);
        scene.world.run_for(Duration::from_nanos(rng.below(10_000_000)));
        let hangs = rng.one_in(3);
        if hangs {
            scene.world.stall_lone(Duration::from_secs(3));
        }
        let began = scene.world.sim().uptime();
        let system = Arc::clone(&scene.system);
        let deleting = async move { appliance::delete(&system, "app").await };
        scene.world.block_on("the delete", deleting).expect("the loads let go of it");
        let took = scene.world.sim().uptime() - began;
        assert!(took < Duration::from_secs(1), "a delete took {took:?} of virtual time");
        assert!(scene.system.get("app").is_err(), "it is gone");
        assert_eq!(scene.device.borrow().loads, 0, "no load has it open");
        let before = std::mem::replace(&mut scene.rogue, {
            let (rogue, device) = make(&mut scene.world, &mut rng, "app", scene.block_size, scene.blocks);
            scene.device = device;
            rogue
        });
        // What is lost of the old one comes home while the new one has its name.
        before.release();
    }
    scene.start_loads(&mut rng, 0);
    let device = scene.device.clone();
    scene.world.run_until("the loads to end", |_| device.borrow().loads == 0);
    end(scene);
}

#[test]
fn appliance_removal() {
    seeds::each("appliance_removal", 40, regressions::REMOVAL, removal);
}
