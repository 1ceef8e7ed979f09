//! raid1 over two simulated files: legs go and come back under load on several reactors, and the power fails.
//!
//! The checker is the model of the loads: every block read is the last write acknowledged or one in flight, and after a power failure
//! what was durable or something later, which then stays.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bdev::core::{BdevSystem, IoRequest, Op};
use bdev::modules::raid::array::Standing;
use bdev::modules::raid::control::{self, Create};
use bdev::modules::raid::format::{DATA_OFFSET, LegState};
use bdev::modules::uring;
use reactor::Buffers;
use ringstone_sim::load::{Device, Load, LoadConfig, SharedDevice};
use ringstone_sim::seeds;
use ringstone_sim::{Rng, Sim, World, WorldConfig};

/// Seeds that once failed, each with what was wrong.
mod regressions {
    // Reads through one reactor of what another was writing found the old after the new, until the write ended: that may be.
    pub const OUTAGES: &[u64] = &[2060, 2277, 2292, 2429, 2778];
}

const LEGS: [&str; 2] = ["A", "B"];

fn path(leg: &str) -> String {
    format!("/volumes/{leg}.img")
}

async fn open_leg(system: &Arc<BdevSystem>, leg: &str, block_size: u32) {
    let options = uring::FileOptions {
        flavor: uring::Flavor::Uring,
        path: path(leg).into(),
        block_size: Some(block_size),
        read_only: false,
        fallocate: None,
    };
    uring::create(system, leg, None, options).await.expect("the leg can be opened");
}

/// Takes legs away and brings them back as long as there are loads; only while the other has everything.
fn outages(world: &World, mut rng: Rng, device: SharedDevice, block_size: u32) -> impl Future<Output = ()> + use<> {
    let system = Arc::clone(world.system());
    async move {
        while device.borrow().loads > 0 {
            // Sometimes at the very moment at which the other leg has become in sync, and not all reactors know.
            let at_once = rng.one_in(2);
            let pause = if at_once { 20_000 } else { 3_000_000 };
            system.executor().sleep(Duration::from_nanos(rng.below(pause))).await;
            let Some(running) = control::arrays(&system).get("R") else { continue };
            let Ok(status) = control::status(&running).await else { continue };
            let in_sync = status.legs.iter().all(|(_, standing)| *standing == Standing::InSync);
            if !in_sync || !status.told && !at_once {
                continue;
            }
            let leg = LEGS[rng.below(2) as usize];
            if system.get(leg).is_err() {
                continue;
            }
            system.remove(leg).await.expect("the array lets go of it");
            system.executor().sleep(Duration::from_nanos(rng.below(2_000_000))).await;
            open_leg(&system, leg, block_size).await;
        }
    }
}

fn start_loads(world: &mut World, rng: &mut Rng, device: &SharedDevice, config: WorldConfig) {
    let block_size = device.borrow().model.block_size();
    let fits = (config.buffers.bytes() / block_size).max(1) as u64;
    // Half of all operations meet on a few blocks, also through several reactors.
    let one = rng.one_in(3).then(|| rng.below(config.reactors as u64) as usize);
    device.borrow_mut().model.set_flickers(one.is_none());
    for _ in 0..1 + rng.below(4) {
        let on = one.unwrap_or_else(|| rng.below(config.reactors as u64) as usize);
        let load = LoadConfig {
            operations: 60 + rng.below(200),
            depth: 1 + rng.below(16) as usize,
            max_blocks: (1 + rng.below(60)).min(fits),
            aborts: rng.one_in(2),
            ..LoadConfig::default()
        };
        Load::start(world, on, device, load, rng.next_u64());
    }
}

/// Waits until every leg has everything.
fn until_in_sync(world: &mut World) {
    let arrays = control::arrays(world.system());
    loop {
        let running = arrays.get("R").expect("it runs");
        let status = world.block_on("its status", async move { control::status(&running).await.expect("it runs") });
        if status.superblock.legs.iter().all(|leg| leg.state == LegState::InSync) && status.told {
            return;
        }
        world.run_for(Duration::from_millis(1));
    }
}

/// What a leg has of the array's blocks, when nobody else uses it.
fn data_of(world: &mut World, leg: &str, blocks: u64, block_size: u32) -> Vec<u8> {
    let bdev = world.system().get(leg).expect("it is there");
    let runtime = world.runtime(0);
    let (client, channel) = {
        let mut runtime = runtime.borrow_mut();
        let (client, channel) = (runtime.add_client(), runtime.get_channel(&bdev).expect("a channel"));
        let bufs = Buffers::heap((blocks * u64::from(block_size)) as usize);
        let lba = DATA_OFFSET / u64::from(block_size);
        runtime.submit(channel, client, IoRequest { op: Op::Read, lba, blocks, bufs, user: 0 });
        (client, channel)
    };
    world.context(0).waker().wake();
    let mut done = Vec::new();
    world.run_until("a leg to be read", |_| {
        runtime.borrow_mut().take_completions(client, &mut done);
        !done.is_empty()
    });
    let mut runtime = runtime.borrow_mut();
    let read = done.pop().expect("it was just seen");
    assert!(read.status().is_success(), "{leg} cannot be read: {}", read.status());
    let data = read.payload().to_vec();
    runtime.recycle(read);
    runtime.put_channel(channel);
    runtime.remove_client(client);
    data
}

fn scenario(seed: u64) {
    let mut rng = Rng::new(seed);
    let mut sim = Sim::new(seed);
    let block_size = if rng.one_in(3) { 4096 } else { 512 };
    let blocks = 32 + rng.below(300);
    let cache = !rng.one_in(3);
    let mut model = None;
    for life in 0..4 {
        sim.disk(|rules| {
            rules.sector = block_size as usize;
            rules.volatile_cache = cache;
        });
        let config =
            WorldConfig { reactors: 1 + rng.below(3) as usize, sleeps: !rng.one_in(4), ..WorldConfig::default() };
        let mut world = World::new(&sim, config, seed ^ life);
        let system = Arc::clone(world.system());
        if life == 0 {
            for leg in LEGS {
                let bytes = DATA_OFFSET + blocks * u64::from(block_size);
                world.platform().files().create(Path::new(&path(leg)), bytes).expect("a new file");
            }
        }
        let first = rng.below(2) as usize;
        let opening = Arc::clone(&system);
        world.block_on("the legs", async move {
            for leg in [LEGS[first], LEGS[1 - first]] {
                open_leg(&opening, leg, block_size).await;
            }
        });
        if life == 0 {
            let region_bytes = Some(u64::from(block_size) << rng.below(7));
            let creating = Arc::clone(&system);
            world.block_on("the array to be made", async move {
                let options = Create { uuid: None, superblock: true, region_bytes };
                control::create(&creating, "R", &LEGS.map(str::to_string), options).await.expect("it can be made");
            });
        }
        world.run_until("the array to be found", |world| {
            let system = world.system();
            system.get("R").is_ok() && !system.is_examining()
        });
        let device = match model.take() {
            Some(model) => Device::reopen(&system, "R", model),
            None => Device::open(&system, "R", blocks, false),
        };
        start_loads(&mut world, &mut rng, &device, config);
        let trouble = outages(&world, Rng::new(rng.next_u64()), device.clone(), block_size);
        let trouble = world.spawn(trouble);
        if life == 3 {
            let loaded = device.clone();
            world.run_until("the loads to end", |_| loaded.borrow().loads == 0);
            world.run_until("the legs to be left alone", |_| trouble.take().is_some());
            until_in_sync(&mut world);
            let ending = Arc::clone(&system);
            world.block_on("the array to end", async move {
                control::delete(&ending, "R", false).await.expect("nobody has it open");
            });
            // Whatever was written at once through several reactors, the legs are the same.
            let [a, b] = LEGS.map(|leg| data_of(&mut world, leg, blocks, block_size));
            let differs = a.chunks(block_size as usize).zip(b.chunks(block_size as usize)).position(|(a, b)| a != b);
            assert_eq!(differs, None, "a block on the legs");
            let system = Arc::clone(&system);
            world.block_on("the end", async move {
                for leg in LEGS {
                    system.remove(leg).await.expect("nobody has it open");
                }
            });
            return world.assert_clean();
        }
        world.run_for(Duration::from_nanos(rng.below(9_000_000)));
        model = Some(std::mem::replace(&mut device.borrow_mut().model, ringstone_sim::Model::new(1, 512, true)));
        drop(device);
        drop(system);
        sim = world.power_cycle(rng.next_u64());
    }
}

#[test]
fn raid_outages() {
    seeds::each("raid_outages", 40, regressions::OUTAGES, scenario);
}
