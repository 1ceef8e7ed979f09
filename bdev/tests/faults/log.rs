//! The log store whose worker panics with requests in its hands.

use std::sync::Arc;
use std::time::Duration;

use reactor::Buffers;
use reactor::file::EngineChoice;
use ringstone_bdev::conformance::panicky::Panicky;
use ringstone_bdev::conformance::{Client, World, WorldConfig};
use ringstone_bdev::core::{IoStatus, Op};
use ringstone_bdev::modules::appliance::builtin::{self, Maker};
use ringstone_bdev::modules::appliance::settings::Settings;
use ringstone_bdev::modules::appliance::{create, create_with, delete, resize, stats};
use ringstone_bdev::modules::malloc;
use serde_json::json;

use super::Logged;

fn settings() -> Settings {
    let mut settings = Settings::new("log", 512, 64);
    settings.options = json!({ "base_bdev": "base" });
    settings
}

#[test]
fn a_log_store_comes_back_after_a_panic_with_what_it_had_and_the_size_that_it_had() {
    let logged = Logged::begin();
    let mut world = World::on_host(EngineChoice::Threads, WorldConfig::default());
    let system = Arc::clone(world.system());
    world.block_on(malloc::create(&system, "base", None, malloc::MallocOptions::new(512, 8192))).unwrap();
    let maker = Maker { system: Arc::clone(&system), bdev: "app".into(), settings: settings() };
    let panicky = Panicky::new(world.block_on(builtin::make(maker)).unwrap(), 1);
    let handler = Arc::clone(&panicky) as _;
    let bdev = world.block_on(create_with(&system, "app", None, settings(), handler)).unwrap();
    let mut client = Client::open(&mut world, 0, &bdev);
    // It grows, and has data where it was not before.
    world.block_on(resize(&system, "app", 200)).unwrap();
    for lba in [0, 63, 199] {
        let done = client.run(&mut world, Op::Write { fua: true }, lba, 1, &[lba as u8 + 1; 512]);
        assert_eq!(done.status, IoStatus::Success);
    }
    panicky.panic(1, 1);
    let in_hand = client.submit(Op::Write { fua: false }, 63, 1, Buffers::from(&[99; 512][..]));
    world.step_until("the panic", |_| panicky.left() == 0);
    (0..50).for_each(|_| world.step());
    // A change of size that nobody can carry out waits for the next worker.
    let asking = Arc::clone(&system);
    let resized = world.start(async move { resize(&asking, "app", 150).await });
    (0..50).for_each(|_| world.step());
    assert!(resized.is_pending());
    world.pass_time(Duration::from_millis(1001));
    world.step_until("the size to change", |_| !resized.is_pending());
    resized.take().unwrap().unwrap();
    // It panicked before it took the request, or with it in hand: then the request fails, and the log says which.
    let status = client.wait(&mut world, in_hand).status;
    assert!(matches!(status, IoStatus::Success | IoStatus::Failed), "{status}");
    logged.assert_line(&["a handler panicked", "bdev=\"app\"", "handler=\"log\"", "a habit"]);
    assert_eq!(client.read(&mut world, 0, 1), [1; 512]);
    assert!([[64; 512], [99; 512]].iter().any(|bytes| client.read(&mut world, 63, 1) == bytes));
    assert_eq!(client.run(&mut world, Op::Read, 199, 1, &[0; 512]).status, IoStatus::OutOfRange);
    world.block_on(resize(&system, "app", 200)).unwrap();
    assert_eq!(client.read(&mut world, 199, 1), [0; 512], "what was cut off is forgotten");
    assert_eq!(stats(&system, "app").unwrap()["backend"]["workers"][0]["panics"], 1);

    // One that it holds while it panics: a read of the base is out, and its next call is the last.
    panicky.panic(1, 1);
    let reads: Vec<u64> = (0..8).map(|_| client.submit(Op::Read, 0, 1, Buffers::heap(512))).collect();
    world.step_until("the panic", |_| panicky.left() == 0);
    world.pass_time(Duration::from_millis(1001));
    for mark in reads {
        let status = client.wait(&mut world, mark).status;
        assert!(matches!(status, IoStatus::Success | IoStatus::Failed), "{status}");
    }
    client.close();
    drop(bdev);
    world.block_on(delete(&system, "app")).unwrap();
    drop(panicky);
    // Made again with the size that was last acknowledged.
    let mut last = settings();
    last.geometry.num_blocks = 200;
    world.block_on(create(&system, "app", None, last)).unwrap();
    world.block_on(delete(&system, "app")).unwrap();
    let removed = Arc::clone(&system);
    world.block_on(async move { removed.remove("base").await }).unwrap();
    world.assert_clean();
}

/// A smaller size is durable when it is acknowledged: the store can be made with it at once.
#[test]
fn a_log_store_that_was_made_smaller_opens_with_its_size() {
    let mut world = World::on_host(EngineChoice::Threads, WorldConfig::default());
    let system = Arc::clone(world.system());
    world.block_on(malloc::create(&system, "base", None, malloc::MallocOptions::new(512, 8192))).unwrap();
    let bdev = world.block_on(create(&system, "app", None, settings())).unwrap();
    let mut client = Client::open(&mut world, 0, &bdev);
    let done = client.run(&mut world, Op::Write { fua: true }, 63, 1, &[7; 512]);
    assert_eq!(done.status, IoStatus::Success);
    client.close();
    drop(bdev);
    world.block_on(resize(&system, "app", 10)).unwrap();
    // At once, as after a kill: nobody has a moment to do more.
    world.block_on(delete(&system, "app")).unwrap();
    let mut smaller = settings();
    smaller.geometry.num_blocks = 10;
    world.block_on(create(&system, "app", None, smaller)).unwrap();
    world.block_on(delete(&system, "app")).unwrap();
    let removed = Arc::clone(&system);
    world.block_on(async move { removed.remove("base").await }).unwrap();
    world.assert_clean();
}
