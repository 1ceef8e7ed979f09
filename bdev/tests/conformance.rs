//! Every module goes through the conformance suite.

use std::path::PathBuf;
use std::sync::Arc;

use reactor::Buffers;
use reactor::file::EngineChoice;
use ringstone_bdev::conformance::{Client, Subject, World, WorldConfig, limited, suite};
use ringstone_bdev::core::io::MAX_LAYERS;
use ringstone_bdev::core::system::REMOVE_PATIENCE;
use ringstone_bdev::core::{BdevError, IoRequest, IoStatus, Op};
use ringstone_bdev::modules::{MODULES, malloc, passthru, uring};

/// A folder of this test's own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("ringstone-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs every subject that `wanted` names; with the seed of `RINGSTONE_SEED` alone where that is set, as a failure
/// prints it.
fn conforms(name: &str, engine: EngineChoice, seeds: &[u64], wanted: impl Fn(&Subject) -> bool) {
    let folder = Folder::new(name);
    let modules = MODULES.iter().flat_map(|module| module.subjects);
    let subjects: Vec<&Subject> = modules.chain(limited::SUBJECTS).filter(|subject| wanted(subject)).collect();
    assert!(!subjects.is_empty());
    let given = std::env::var("RINGSTONE_SEED").ok().map(|text| {
        let digits = text.trim_start_matches("0x");
        u64::from_str_radix(digits, 16).expect("RINGSTONE_SEED is a hexadecimal number")
    });
    for subject in subjects {
        for &seed in given.as_slice().iter().chain(seeds.iter().filter(|_| given.is_none())) {
            suite(*subject, seed, &folder.0, |config| World::on_host(engine, config));
        }
    }
}

const SEEDS: &[u64] = &[1, 0xfeed_beef, 0x1234_5678_9abc_def0];
const ON_FILES: &[&str] = &["uring", "aio", "aio-without-fallocate"];

#[test]
fn devices_in_memory_conform() {
    conforms("memory", EngineChoice::Auto, SEEDS, |subject| !ON_FILES.contains(&subject.label));
}

#[test]
fn files_conform_on_io_uring() {
    conforms("uring", EngineChoice::Auto, &SEEDS[..1], |subject| ON_FILES.contains(&subject.label));
}

#[test]
fn files_conform_on_threads() {
    conforms("threads", EngineChoice::Threads, &SEEDS[..1], |subject| subject.label == "uring");
}

/// A device that loses its operations does not lose its clients: they come home as failed, and it can be removed.
#[test]
fn lost_operations_come_home_as_failed() {
    let mut world = World::on_host(EngineChoice::Threads, WorldConfig::default());
    let system = Arc::clone(world.system());
    let dropped = world.block_on(limited::lossy(&system, "lossy")).unwrap();
    let bdev = system.get("lossy").unwrap();
    let mut client = Client::open(&mut world, 1, &bdev);
    let marks: Vec<u64> = (0..10).map(|n| client.submit(Op::Read, n, 1, Buffers::heap(512))).collect();
    client.wait_all(&mut world);
    let failed = marks.iter().filter(|&&mark| client.take(mark).unwrap().status == IoStatus::Failed).count();
    assert_eq!((failed, *dropped.lock().unwrap()), (5, 5));
    client.close();
    world.block_on(system.remove("lossy")).unwrap();
    world.assert_clean();
}

#[test]
fn a_read_only_device_refuses_what_writes() {
    let mut world = World::on_host(EngineChoice::Threads, WorldConfig::default());
    let system = Arc::clone(world.system());
    let mut options = limited::LimitedOptions::new(1);
    options.geometry.read_only = true;
    world.block_on(malloc::create(&system, "base", None, malloc::MallocOptions::new(512, 64))).unwrap();
    let bdev = world.block_on(limited::limited(&system, "top", "base", options)).unwrap();
    let mut client = Client::open(&mut world, 0, &bdev);
    let zeroes = Op::WriteZeroes { fua: false, may_unmap: true };
    let swap = Op::CompareAndWrite { fua: false };
    for (op, payload) in
        [(Op::Write { fua: false }, 1), (Op::Unmap, 0), (zeroes, 0), (swap, 2), (Op::Copy { source_lba: 3 }, 0)]
    {
        let done = client.run(&mut world, op, 0, 1, &vec![0; payload * 512]);
        assert_eq!(done.status, IoStatus::ReadOnly, "{op:?}");
    }
    assert_eq!(client.read(&mut world, 0, 1), [0; 512]);
    assert_eq!(client.run(&mut world, Op::Flush, 0, 0, &[]).status, IoStatus::Success);
    client.close();
}

/// A removal that somebody holds up answers after its time and goes on by itself; what is stacked goes from the top.
#[test]
fn a_removal_waits_answers_and_goes_on() {
    let mut world = World::on_host(EngineChoice::Threads, WorldConfig::default());
    let system = Arc::clone(world.system());
    world.block_on(malloc::create(&system, "base", None, malloc::MallocOptions::new(512, 64))).unwrap();
    let bdev = world.block_on(passthru::create(&system, "top", None, "base")).unwrap();
    assert!(matches!(
        world.block_on(passthru::create(&system, "other", None, "base")),
        Err(BdevError::Claimed { by, .. }) if by.contains("top")
    ));
    let client = Client::open(&mut world, 0, &bdev);
    drop(bdev);
    let removing = Arc::clone(&system);
    let removed = world.start(async move { removing.remove("base").await });
    world.step_until("the removal to begin", |_| client.is_told_of_removal());
    world.pass_time(REMOVE_PATIENCE);
    world.step_until("an answer", |_| !removed.is_pending());
    match removed.take().unwrap() {
        Err(BdevError::StillDraining { name, held_by }) => {
            assert_eq!((name.as_str(), held_by.len()), ("base", 1));
            assert!(held_by[0].contains("top"), "{held_by:?}");
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(world.block_on(system.remove("base")), Err(BdevError::BeingRemoved { .. })));
    client.close();
    world.step_until("both to go", |_| system.list().is_empty());
    world.assert_clean();
}

/// As many layers as an I/O has frames for, opened from the ground up, and not one more.
#[test]
fn stacks_end_where_frames_do() {
    let mut world = World::on_host(EngineChoice::Threads, WorldConfig::default());
    let system = Arc::clone(world.system());
    world.block_on(malloc::create(&system, "L1", None, malloc::MallocOptions::new(512, 64))).unwrap();
    for n in 2..=MAX_LAYERS + 1 {
        let (name, base) = (format!("L{n}"), format!("L{}", n - 1));
        world.block_on(passthru::create(&system, &name, None, &base)).unwrap();
        // Opened at once, so that every channel is there when the next layer looks for it.
        let bdev = system.get(&name).unwrap();
        let runtime = world.runtime(0);
        let channel = runtime.borrow_mut().get_channel(&bdev);
        assert_eq!(channel.is_ok(), n <= MAX_LAYERS, "{n} layers");
    }
    let top = system.get(&format!("L{MAX_LAYERS}")).unwrap();
    let runtime = world.runtime(1);
    let mut runtime = runtime.borrow_mut();
    let client = runtime.add_client();
    let channel = runtime.get_channel(&top).unwrap();
    runtime.submit(channel, client, IoRequest { op: Op::Read, lba: 0, blocks: 1, bufs: Buffers::heap(512), user: 0 });
    runtime.run();
    let mut done = Vec::new();
    runtime.take_completions(client, &mut done);
    assert_eq!(done[0].status(), IoStatus::Success);
}

/// A file that is cut short behind the server's back fails what lies beyond its end, and nothing else.
#[test]
fn a_file_cut_short_fails_beyond_its_end() {
    let folder = Folder::new("short");
    let path = folder.0.join("a.img");
    for engine in [EngineChoice::Auto, EngineChoice::Threads] {
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let mut world = World::on_host(engine, WorldConfig::default());
        let system = Arc::clone(world.system());
        let options = uring::FileOptions {
            flavor: uring::Flavor::Uring,
            path: path.clone(),
            block_size: Some(4096),
            read_only: false,
            fallocate: None,
        };
        let bdev = world.block_on(uring::create(&system, "U", None, options)).unwrap();
        let mut client = Client::open(&mut world, 0, &bdev);
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(512 * 1024).unwrap();
        assert_eq!(client.read(&mut world, 0, 128), [7; 512 * 1024]);
        for (lba, blocks) in [(128, 1), (127, 2), (255, 1)] {
            let done = client.run(&mut world, Op::Read, lba, blocks, &vec![0; blocks as usize * 4096]);
            assert_eq!(done.status, IoStatus::ReadError, "{blocks} blocks at {lba}");
        }
        world.block_on(uring::rescan(&system, "U", uring::Flavor::Uring)).unwrap();
        assert_eq!(bdev.device().geometry().num_blocks, 128);
        assert_eq!(client.run(&mut world, Op::Read, 128, 1, &[0; 4096]).status, IoStatus::OutOfRange);
        assert_eq!(client.read(&mut world, 127, 1), [7; 4096]);
        client.close();
    }
}

/// A channel whose last requests wait for the pool closes when they have been refused, not when its client lets go.
#[test]
fn a_removed_channel_closes_behind_those_who_waited() {
    let config = WorldConfig { io_pool: 2, reactors: 1, ..WorldConfig::default() };
    let mut world = World::on_host(EngineChoice::Threads, config);
    let system = Arc::clone(world.system());
    world.block_on(malloc::create(&system, "base", None, malloc::MallocOptions::new(512, 64))).unwrap();
    let bdev = world.block_on(passthru::create(&system, "top", None, "base")).unwrap();
    let mut client = Client::open(&mut world, 0, &bdev);
    let marks: Vec<u64> = (0..20).map(|n| client.submit(Op::Read, n, 1, Buffers::heap(512))).collect();
    let removing = Arc::clone(&system);
    let removed = world.start(async move { removing.remove("top").await });
    world.step_until("the removal to begin", |_| client.is_told_of_removal());
    (0..10).for_each(|_| world.step());
    assert!(client.outstanding() == 20, "nobody has given an I/O back to the pool");
    let open = |world: &mut World| world.runtime(0).borrow().channel_refs().iter().any(|(name, _)| name == "base");
    assert!(open(&mut world));
    client.wait_all(&mut world);
    (0..10).for_each(|_| world.step());
    assert!(!open(&mut world), "the removed device still has its base open");
    let refused = marks.iter().filter(|&&mark| client.take(mark).unwrap().status == IoStatus::NoDevice).count();
    assert!(refused >= 18, "{refused}");
    client.close();
    world.step_until("the removal", |_| !removed.is_pending());
    removed.take().unwrap().unwrap();
    drop(bdev);
    world.block_on(system.remove("base")).unwrap();
    world.assert_clean();
}
