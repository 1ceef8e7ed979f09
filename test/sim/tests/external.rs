//! Appliance devices whose handler is another process, which connects, dies in the middle of anything, and is followed by the
//! next: every operation of a host ends once, and what was acknowledged is there, since the process keeps its data durably.
//!
//! Lanes, rings, sessions, messages and workers are those of production, over memory on the heap; see `appliance::external::dock`.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use appliance::external::dock::{Dock, Guest};
use appliance::{Batch, Capabilities, Geometry, Handler, IoStatus, Op, Request, RequestId, Worker, WorkerCx};
use bdev::core::BdevSystem;
use bdev::modules::appliance as device;
use bdev::modules::appliance::settings::{OnDisconnect, Placement, Settings};
use reactor::{Instant, Progress};
use ringstone_sim::load::{Device, Faults, Load, LoadConfig, SharedDevice};
use ringstone_sim::seeds;
use ringstone_sim::{Rng, Sim, World, WorldConfig};

/// Seeds that once failed, each with what was wrong.
mod regressions {
    pub const TAKEOVER: &[u64] = &[];
}

const NAME: &str = "app";

/// What outlives every process.
struct Disk {
    blocks: Mutex<Vec<u8>>,
    block_size: usize,
    seed: Mutex<Rng>,
}

/// The handler of one process: it acknowledges what is on the disk, sometimes late.
struct Keeper(Arc<Disk>);

impl Handler for Keeper {
    fn name(&self) -> &str {
        "keeper"
    }
    fn capabilities(&self, _: &Geometry) -> Capabilities {
        Capabilities { volatile_cache: false, ..Capabilities::BASIC }
    }
    fn worker(&self, _: WorkerCx) -> std::io::Result<Box<dyn Worker>> {
        let rng = Rng::new(self.0.seed.lock().unwrap().next_u64());
        Ok(Box::new(KeepingWorker { disk: Arc::clone(&self.0), rng, held: Vec::new(), now: Instant(0) }))
    }
    fn resize(&self, _: u64) -> std::io::Result<()> {
        Ok(())
    }
}

struct Held {
    request: Request,
    /// It is done, and not said so.
    done: bool,
    due: Instant,
}

struct KeepingWorker {
    disk: Arc<Disk>,
    rng: Rng,
    held: Vec<Held>,
    now: Instant,
}

impl KeepingWorker {
    fn later(&mut self) -> Instant {
        let pause = if self.rng.one_in(10) { 2_000_000 } else { 20_000 };
        self.now + Duration::from_nanos(self.rng.below(pause))
    }

    fn perform(&self, request: &mut Request) {
        let (from, len) = (request.lba() as usize * self.disk.block_size, request.len_bytes() as usize);
        let mut blocks = self.disk.blocks.lock().unwrap();
        let (mut at, op) = (from, request.op());
        for segment in request.bufs_mut().segments_mut() {
            match op {
                Op::Read => segment.copy_from_slice(&blocks[at..at + segment.len()]),
                Op::Write { .. } => blocks[at..at + segment.len()].copy_from_slice(segment),
                other => panic!("{other:?} was not promised"),
            }
            at += segment.len();
        }
        assert!(matches!(op, Op::Flush) || at == from + len, "the payload is as long as the blocks");
    }
}

impl Worker for KeepingWorker {
    fn submit(&mut self, batch: &mut Batch) {
        for mut request in batch.by_ref() {
            if self.rng.one_in(3) {
                self.perform(&mut request);
                request.complete(IoStatus::Success);
                continue;
            }
            let due = self.later();
            self.held.push(Held { request, done: false, due });
            if self.rng.one_in(8) {
                // What is left is offered again.
                return;
            }
        }
    }

    fn poll(&mut self, now: Instant) -> Progress {
        self.now = now;
        let (due, later): (Vec<_>, Vec<_>) = self.held.drain(..).partition(|held| held.due <= now);
        self.held = later;
        let busy = !due.is_empty();
        for mut held in due {
            if held.done {
                held.request.complete(IoStatus::Success);
                continue;
            }
            self.perform(&mut held.request);
            let due = self.later();
            self.held.push(Held { done: true, due, ..held });
        }
        Progress::from_busy(busy)
    }

    fn deadline(&self) -> Option<Instant> {
        self.held.iter().map(|held| held.due).min()
    }

    fn abort(&mut self, id: RequestId) {
        if let Some(index) = self.held.iter().position(|held| held.request.id() == id) {
            self.held.swap_remove(index).request.complete(IoStatus::Aborted);
        }
    }

    fn reset(&mut self) {
        self.held.drain(..).for_each(|held| held.request.complete(IoStatus::Aborted));
    }
}

struct Scene {
    world: World,
    system: Arc<BdevSystem>,
    config: WorldConfig,
    disk: Arc<Disk>,
    dock: Dock,
    device: SharedDevice,
    policy: OnDisconnect,
    guest: Option<Guest>,
    greeted: bool,
    served: u64,
}

impl Scene {
    fn new(seed: u64, rng: &mut Rng) -> Scene {
        let config = WorldConfig::drawn(rng, |rng| 1 + rng.below(2) as usize);
        let mut world = World::new(&Sim::new(seed), config, seed);
        let system = Arc::clone(world.system());
        let block_size = if rng.one_in(3) { 4096 } else { 512 };
        let blocks = 64 + rng.below(500);
        let policy = if rng.one_in(3) { OnDisconnect::Fail } else { OnDisconnect::Park };
        let settings = random_settings(rng, block_size, blocks, policy);
        let making = Arc::clone(&system);
        let create = async move { device::create_docked(&making, NAME, settings).await };
        let (info, dock) = world.block_on("the device to be made", create).expect("the device can be made");
        drop(info);
        let disk = Disk {
            blocks: Mutex::new(vec![0; blocks as usize * block_size as usize]),
            block_size: block_size as usize,
            seed: Mutex::new(Rng::new(rng.next_u64())),
        };
        let device = Device::open(&system, NAME, blocks, false);
        device.borrow_mut().faults = Faults { rogue: true, ..Faults::default() };
        if policy == OnDisconnect::Park {
            // The next process does again what the last one may have done.
            device.borrow_mut().model.allow_repeats();
        }
        let disk = Arc::new(disk);
        Scene { world, system, config, disk, dock, device, policy, guest: None, greeted: false, served: 0 }
    }

    /// The process does the next thing that it does: connects, or takes a step of its conversation.
    fn advance(&mut self) {
        if self.guest.as_ref().is_some_and(Guest::is_over) {
            self.guest = None;
        }
        let Some(guest) = &mut self.guest else {
            self.guest = Some(Guest::connect(&self.dock, Arc::new(Keeper(Arc::clone(&self.disk)))));
            self.greeted = false;
            return;
        };
        if !std::mem::replace(&mut self.greeted, true) {
            return guest.greet();
        }
        let was_serving = guest.is_serving();
        let (executor, platform) = (self.world.executor(), self.world.platform());
        guest.step(&mut |lone| executor.start_reactor(lone, &platform).expect("the simulator has room"));
        self.served += u64::from(!was_serving && guest.is_serving());
    }

    fn stats(&self) -> serde_json::Value {
        device::stats(&self.system, NAME).expect("it is there")
    }

    /// A process comes, and is not disturbed.
    fn settle(&mut self) {
        while !self.guest.as_ref().is_some_and(Guest::is_serving) {
            self.advance();
            self.world.run_for(Duration::from_micros(20));
        }
    }
}

fn random_settings(rng: &mut Rng, block_size: u32, blocks: u64, policy: OnDisconnect) -> Settings {
    let mut settings = Settings::new("unix:/simulated", block_size, blocks);
    settings.workers = 1 + rng.below(3) as usize;
    settings.queue_depth = 1 + rng.below(20) as usize;
    settings.placement = [Placement::LbaRange, Placement::Queue, Placement::RoundRobin][rng.below(3) as usize];
    let ms = if rng.one_in(2) { 1 + rng.below(20) } else { 5_000 };
    settings.timeout = Some(Duration::from_millis(ms));
    settings.on_disconnect = policy;
    settings.latency_sample = rng.below(3) as u32;
    settings.options = serde_json::json!({ "volatile_cache": false, "io_bytes": 16384 });
    settings
}

/// Processes come, die and hang at seeded moments while loads run; the last one stays, and everything that was acknowledged
/// must be there.
fn takeover(seed: u64) {
    let mut rng = Rng::new(seed);
    let mut scene = Scene::new(seed, &mut rng);
    let fits = (scene.config.buffers.bytes() / scene.disk.block_size).max(1) as u64;
    for n in 0..1 + rng.below(3) as usize {
        let load = LoadConfig {
            operations: 40 + rng.below(120),
            depth: 1 + rng.below(16) as usize,
            max_blocks: (1 + rng.below(100)).min(fits),
            resets: rng.one_in(3),
            aborts: rng.one_in(2),
            ..LoadConfig::default()
        };
        Load::start(&mut scene.world, n % scene.config.reactors, &scene.device, load, rng.next_u64());
    }
    let deaths = 2 + rng.below(30);
    while scene.device.borrow().loads > 0 {
        scene.world.run_for(Duration::from_nanos(rng.below(200_000)));
        match rng.below(8 + deaths) {
            0..3 => {
                if let Some(mut guest) = scene.guest.take() {
                    guest.kill();
                }
            }
            3 => scene.world.stall_lone(Duration::from_nanos(rng.below(30_000_000))),
            4 => {
                // Another one knocks, and is turned away or takes its place.
                let mut other = Guest::connect(&scene.dock, Arc::new(Keeper(Arc::clone(&scene.disk))));
                other.greet();
                other.step(&mut |_| panic!("it has not come so far"));
            }
            _ => scene.advance(),
        }
    }
    scene.settle();
    scene.world.run_for(Duration::from_secs(1));
    let stats = scene.stats();
    for left in ["overdue", "with_handler", "waiting"] {
        assert_eq!(stats[left], 0, "{left}: {stats}");
    }
    for fault in ["faults", "stamps_refused"] {
        assert_eq!(stats["backend"][fault], 0, "{fault}: {stats}");
    }
    if scene.policy == OnDisconnect::Fail {
        assert_eq!(stats["backend"]["replayed"], 0, "{stats}");
    }
    assert_eq!(stats["backend"]["sessions"], scene.served);
    while !sweep(&mut scene, &mut rng) {}
    end(scene);
}

/// Reads everything; whether any of it could be read.
fn sweep(scene: &mut Scene, rng: &mut Rng) -> bool {
    let reopened = Device::open(&scene.system, NAME, 0, false);
    {
        let mut inner = scene.device.borrow_mut();
        inner.model.settled();
        std::mem::swap(&mut inner.model, &mut reopened.borrow_mut().model);
    }
    reopened.borrow_mut().faults.rogue = true;
    let blocks = (scene.config.buffers.bytes() / scene.disk.block_size).clamp(1, 32) as u64;
    let load = LoadConfig { operations: u64::MAX, depth: 4, max_blocks: blocks, sweep: true, ..LoadConfig::default() };
    Load::start(&mut scene.world, 0, &reopened, load, rng.next_u64());
    while reopened.borrow().loads > 0 {
        // A channel that closed with requests out has cut the process off: it comes back.
        scene.advance();
        scene.world.run_for(Duration::from_micros(100));
    }
    scene.device = reopened;
    scene.device.borrow().succeeded > 0
}

fn end(mut scene: Scene) {
    let system = Arc::clone(&scene.system);
    let deleting = async move { device::delete(&system, NAME).await };
    scene.world.block_on("the delete", deleting).expect("nobody has it open");
    let mut guest = scene.guest.take().expect("the last one stays");
    while !guest.is_over() {
        // It is told, behind what it has not heard yet.
        guest.step(&mut |_| {});
    }
    drop(guest);
    scene.world.assert_clean();
    assert_eq!(Arc::strong_count(&scene.disk), 1, "somebody keeps the handler");
}

#[test]
fn external_takeover() {
    seeds::each("external_takeover", 60, regressions::TAKEOVER, takeover);
}
