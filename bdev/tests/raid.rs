//! raid1 on a world of two reactors: the suite, and what happens to legs.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use reactor::Buffers;
use reactor::file::EngineChoice;
use ringstone_bdev::conformance::{Client, World, WorldConfig, suite};
use ringstone_bdev::core::{BdevError, IoRequest, IoStatus, Op};
use ringstone_bdev::modules::raid::control::{self, Create, Status};
use ringstone_bdev::modules::raid::format::LegState;
use ringstone_bdev::modules::{MODULES, malloc, passthru};
use ringstone_bdev::rpc::{BdevConfig, methods};
use schema::{ConfigSource, RpcError, validate};
use serde_json::{Value, json};

const BLOCKS: u64 = 4096;
const OFFSET: u64 = 2048;
const REGION: u64 = 128;

fn world() -> World {
    World::on_host(EngineChoice::Threads, WorldConfig::default())
}

fn call(world: &mut World, name: &str, params: Value) -> Result<Value, RpcError> {
    let method = methods().find(|method| method.spec.name == name).unwrap_or_else(|| panic!("no method {name}"));
    let params = validate(&method.spec, Some(params))?;
    let system = Arc::clone(world.system());
    world.block_on((method.handler)(system, params))
}

/// A leg in memory, under a passthru bdev, so that it can go and come back with what is on it.
fn leg(world: &mut World, name: &str) {
    let system = Arc::clone(world.system());
    let below = format!("{name}-mem");
    if system.get(&below).is_err() {
        let options = malloc::MallocOptions::new(512, OFFSET + BLOCKS);
        world.block_on(malloc::create(&system, &below, None, options)).unwrap();
    }
    world.block_on(passthru::create(&system, name, None, &below)).unwrap();
}

fn create(world: &mut World, superblock: bool, legs: &[&str]) {
    let system = Arc::clone(world.system());
    let options = Create { uuid: None, superblock, region_bytes: Some(REGION * 512) };
    let legs: Vec<String> = legs.iter().map(|leg| leg.to_string()).collect();
    world.block_on(control::create(&system, "R", &legs, options)).unwrap().expect("all legs are there");
}

fn status(world: &mut World) -> Status {
    let running = control::arrays(world.system()).get("R").expect("it runs");
    world.block_on(control::status(&running)).unwrap()
}

fn state(world: &mut World, leg: usize) -> LegState {
    status(world).superblock.legs[leg].state
}

/// Steps, and lets time pass, until every leg has everything.
fn until_in_sync(world: &mut World) -> Status {
    loop {
        let now = status(world);
        if now.superblock.legs.iter().all(|leg| leg.state == LegState::InSync) && now.progress.is_none() {
            return now;
        }
        world.pass_time(Duration::from_millis(100));
        (0..20).for_each(|_| world.step());
    }
}

/// Lets so much time pass that bits of idle regions are cleared.
fn until_clean(world: &mut World) {
    while status(world).active > 0 {
        world.pass_time(Duration::from_secs(1));
        (0..20).for_each(|_| world.step());
    }
}

fn order(world: &mut World, legs: &[&str], force: bool) -> Result<bool, BdevError> {
    let system = Arc::clone(world.system());
    let legs = legs.iter().map(|leg| leg.to_string()).collect();
    world.block_on(control::order(&system, "R", Some(legs), force))
}

fn delete(world: &mut World) {
    let system = Arc::clone(world.system());
    world.block_on(control::delete(&system, "R", false)).unwrap();
}

fn open(world: &mut World, reactor: usize, name: &str) -> Client {
    let bdev = world.system().get(name).unwrap();
    Client::open(world, reactor, &bdev)
}

/// The data of two legs in memory are the same.
fn assert_same(world: &mut World, a: &str, b: &str) {
    let read = |world: &mut World, leg: &str| {
        let running: Vec<String> = control::arrays(world.system()).running().iter().map(|r| r.name.clone()).collect();
        assert!(running.is_empty(), "legs are looked at when nobody has them");
        let mut client = open(world, 0, leg);
        let data: Vec<u8> = (0..BLOCKS / 64).flat_map(|n| client.read(world, OFFSET + n * 64, 64)).collect();
        client.close();
        data
    };
    assert!(read(world, a) == read(world, b), "{a} and {b} differ");
}

fn inject(world: &mut World, leg: &str, io_type: &str, what: &str) {
    let params = json!({ "name": leg, "io_type": io_type, "error_type": what, "num": 1_000_000 });
    call(world, "bdev_error_inject_error", params).unwrap();
}

#[test]
fn raid1_conforms() {
    let subjects = MODULES.iter().filter(|module| module.name == "raid").flat_map(|module| module.subjects);
    for subject in subjects {
        for seed in [1, 77] {
            suite(*subject, seed, Path::new("/nonexistent"), |config| World::on_host(EngineChoice::Threads, config));
        }
    }
}

/// A leg fails, the array goes on, the leg works again, and only what was written meanwhile is copied to it.
#[test]
fn a_short_outage_copies_what_changed() {
    let mut w = world();
    for name in ["A", "B"] {
        leg(&mut w, name);
        call(&mut w, "bdev_error_create", json!({ "base_name": name })).unwrap();
    }
    create(&mut w, true, &["EE_A", "EE_B"]);
    let first = until_in_sync(&mut w);
    assert_eq!(first.copied_blocks, BLOCKS, "at first everything is made the same");
    let mut clients = [open(&mut w, 0, "R"), open(&mut w, 1, "R")];
    for n in 0..BLOCKS / 64 {
        clients[n as usize % 2].write(&mut w, n * 64, &[7; 64 * 512]);
    }
    until_clean(&mut w);
    inject(&mut w, "EE_B", "write", "failure");
    clients[1].write(&mut w, 5, &[8; 512]);
    assert_eq!(state(&mut w, 1), LegState::Out);
    clients[0].write(&mut w, 3 * REGION, &[9; 512]);
    assert_eq!(status(&mut w).lacking, [0, 2]);
    // It is tried again, and again found bad, until it works.
    w.pass_time(Duration::from_secs(2));
    (0..200).for_each(|_| w.step());
    inject(&mut w, "EE_B", "clear", "failure");
    let copied = status(&mut w).copied_blocks;
    // It would be looked at by and by; whoever cannot wait says so.
    let again = json!({ "raid_bdev": "R", "base_bdev": "EE_B" });
    assert_eq!(call(&mut w, "bdev_raid_add_base_bdev", again.clone()), Ok(json!(true)));
    let error = call(&mut w, "bdev_raid_add_base_bdev", again).unwrap_err();
    assert!(error.message().contains("is in the array"), "{error}");
    let after = until_in_sync(&mut w);
    assert_eq!(after.copied_blocks - copied, 2 * REGION, "only two regions changed");
    for client in &mut clients {
        for (lba, value) in [(5, 8), (3 * REGION, 9), (3 * REGION + 1, 7)] {
            assert_eq!(client.read(&mut w, lba, 1), [value; 512]);
        }
    }
    // With the other leg alone as well.
    inject(&mut w, "EE_A", "all", "failure");
    assert_eq!(clients[0].read(&mut w, 5, 1), [8; 512]);
    assert_eq!(clients[1].read(&mut w, 3 * REGION, 1), [9; 512]);
    clients[0].write(&mut w, 6, &[6; 512]);
    assert_eq!(state(&mut w, 0), LegState::Out);
    // The last leg stays, whatever becomes of its writes.
    inject(&mut w, "EE_B", "write", "failure");
    assert_ne!(clients[0].run(&mut w, Op::Write { fua: false }, 6, 1, &[5; 512]).status, IoStatus::Success);
    assert_eq!(state(&mut w, 1), LegState::InSync);
    clients.into_iter().for_each(Client::close);
    delete(&mut w);
    for name in ["EE_A", "EE_B", "A", "B", "A-mem", "B-mem"] {
        let system = Arc::clone(w.system());
        w.block_on(system.remove(name)).unwrap();
    }
    w.assert_clean();
}

/// A leg is pulled under load and comes back by itself when its bdev does.
#[test]
fn a_leg_is_removed_and_found_again() {
    let mut w = world();
    for name in ["A", "B"] {
        leg(&mut w, name);
    }
    create(&mut w, true, &["A", "B"]);
    until_in_sync(&mut w);
    let system = Arc::clone(w.system());
    for round in 0..6u8 {
        let mut client = open(&mut w, usize::from(round % 2), "R");
        let marks: Vec<u64> = (0..40u64)
            .map(|n| client.submit(Op::Write { fua: false }, n * 90, 1, Buffers::from(&[round; 512][..])))
            .collect();
        let name = if round % 3 == 0 { "A" } else { "B" };
        let removing = Arc::clone(&system);
        let removed = w.start(async move { removing.remove(name).await });
        client.wait_all(&mut w);
        for mark in marks {
            assert_eq!(client.take(mark).unwrap().status, IoStatus::Success, "the other leg has it");
        }
        w.step_until("the leg to go", |_| !removed.is_pending());
        removed.take().unwrap().unwrap();
        leg(&mut w, name);
        until_in_sync(&mut w);
        assert_eq!(client.read(&mut w, 90, 1), [round; 512]);
        client.close();
    }
    delete(&mut w);
    assert_same(&mut w, "A", "B");
}

/// What was left behind is not served; what went on by itself on both sides is not mixed.
#[test]
fn stale_legs_are_not_served() {
    let mut w = world();
    for name in ["A", "B"] {
        leg(&mut w, name);
    }
    create(&mut w, true, &["A", "B"]);
    until_in_sync(&mut w);
    delete(&mut w);
    assert!(!order(&mut w, &["B"], false).unwrap(), "A might know more");
    assert!(order(&mut w, &["A"], true).unwrap());
    let mut client = open(&mut w, 0, "R");
    client.write(&mut w, 0, &[1; 512]);
    client.close();
    delete(&mut w);
    // With the stale one alone there is nothing to start without an order, and with both A is the one to read.
    assert!(!order(&mut w, &["B"], false).unwrap());
    assert!(order(&mut w, &["A", "B"], false).unwrap());
    assert_eq!(until_in_sync(&mut w).superblock.legs.len(), 2);
    delete(&mut w);
    assert_same(&mut w, "A", "B");
    for name in ["A", "B"] {
        assert!(order(&mut w, &[name], true).unwrap());
        let mut client = open(&mut w, 0, "R");
        client.write(&mut w, 0, &[2; 512]);
        client.close();
        delete(&mut w);
    }
    for force in [true, false] {
        match order(&mut w, &["A", "B"], force) {
            Err(error) => assert!(error.to_string().contains("without the other"), "{error}"),
            Ok(started) => assert!(!started && !force),
        }
    }
    let shown = call(&mut w, "bdev_raid_get_status", json!({ "name": "R" })).unwrap();
    assert_eq!(shown["state"], "configuring");
    assert!(shown["reason"].as_str().unwrap().contains("choose one"), "{shown}");
    assert!(order(&mut w, &["B"], true).unwrap(), "one of them can be chosen");
    let error = call(&mut w, "bdev_raid_add_base_bdev", json!({ "raid_bdev": "R", "base_bdev": "A" })).unwrap_err();
    assert!(error.message().contains("history of its own"), "{error}");
    delete(&mut w);
}

#[test]
fn a_server_that_ends_badly_copies_what_may_differ() {
    let mut w = world();
    for name in ["A", "B"] {
        leg(&mut w, name);
    }
    create(&mut w, true, &["A", "B"]);
    until_in_sync(&mut w);
    let mut client = open(&mut w, 0, "R");
    client.write(&mut w, 0, &[1; 512]);
    client.write(&mut w, 9 * REGION, &[2; 512]);
    client.close();
    // What is on the legs at this moment is what a server would find that starts after this one was killed.
    let copies: Vec<Vec<u8>> = ["A-mem", "B-mem"]
        .into_iter()
        .map(|name| (0..(OFFSET + BLOCKS) / 64).flat_map(|n| peek(&mut w, name, n * 64, 64)).collect())
        .collect();
    let mut second = world();
    let system = Arc::clone(second.system());
    for (name, bytes) in ["A", "B"].into_iter().zip(copies) {
        let options = malloc::MallocOptions::new(512, OFFSET + BLOCKS);
        second.block_on(malloc::create(&system, &format!("{name}-mem"), None, options)).unwrap();
        let mut client = open(&mut second, 0, &format!("{name}-mem"));
        for n in 0..(OFFSET + BLOCKS) / 64 {
            client.write(&mut second, n * 64, &bytes[n as usize * 64 * 512..][..64 * 512]);
        }
        client.close();
        leg(&mut second, name);
    }
    second.step_until("the array to be found", |w| {
        control::arrays(w.system()).get("R").is_some() && w.system().get("R").is_ok()
    });
    assert_eq!(until_in_sync(&mut second).copied_blocks, 2 * REGION);
    let mut client = open(&mut second, 1, "R");
    assert_eq!(client.read(&mut second, 9 * REGION, 1), [2; 512]);
    client.close();
}

/// Reads a device that somebody else has claimed.
fn peek(world: &mut World, name: &str, lba: u64, blocks: u64) -> Vec<u8> {
    let bdev = world.system().get(name).unwrap();
    let runtime = world.runtime(1);
    let mut runtime = runtime.borrow_mut();
    let client = runtime.add_client();
    let channel = runtime.get_channel(&bdev).unwrap();
    let bufs = Buffers::heap(blocks as usize * 512);
    runtime.submit(channel, client, IoRequest { op: Op::Read, lba, blocks, bufs, user: 0 });
    runtime.run();
    let mut done = Vec::new();
    runtime.take_completions(client, &mut done);
    let read = done[0].payload().to_vec();
    runtime.recycle(done.pop().unwrap());
    runtime.put_channel(channel);
    runtime.remove_client(client);
    read
}

#[test]
fn methods_make_change_and_show_arrays() {
    let mut w = world();
    for n in 0..3 {
        let params = json!({ "name": format!("M{n}"), "num_blocks": 16384, "block_size": 512 });
        call(&mut w, "bdev_malloc_create", params).unwrap();
    }
    let raid = json!({ "name": "R", "raid_level": "raid1", "base_bdevs": ["M0", "M1"] });
    assert_eq!(call(&mut w, "bdev_raid_create", raid.clone()), Ok(json!(true)));
    assert_eq!(call(&mut w, "bdev_raid_create", raid).unwrap_err().code(), -17);
    for (params, wanted) in [
        (json!({ "name": "S", "raid_level": "raid0", "base_bdevs": ["M2", "M1"] }), "raid1 is the only level"),
        (json!({ "name": "S", "raid_level": "1", "base_bdevs": ["M2"] }), "from 2 to 7"),
        (json!({ "name": "S", "raid_level": "1", "base_bdevs": ["M2", "M2"] }), "only once"),
        (json!({ "name": "S", "raid_level": "1", "base_bdevs": ["M2", "M1"] }), "M1"),
        (json!({ "name": "S", "raid_level": "1", "base_bdevs": ["M2", "M1"], "strip_size_kb": 4 }), "strips"),
    ] {
        let error = call(&mut w, "bdev_raid_create", params).unwrap_err().message();
        assert!(error.contains(wanted), "{error}");
    }
    let shown = call(&mut w, "bdev_raid_get_bdevs", json!({ "category": "online" })).unwrap();
    assert_eq!((&shown[0]["state"], &shown[0]["num_base_bdevs_operational"]), (&json!("online"), &json!(2)));
    assert_eq!(shown[0]["base_bdevs_list"][1]["data_size"], 16384);
    assert_eq!(call(&mut w, "bdev_raid_get_bdevs", json!({ "category": "configuring" })), Ok(json!([])));
    // One is taken out, the other may not be, a third takes its place and gets everything.
    assert_eq!(call(&mut w, "bdev_raid_remove_base_bdev", json!({ "name": "M0" })), Ok(json!(true)));
    assert!(call(&mut w, "bdev_raid_remove_base_bdev", json!({ "name": "M1" })).is_err());
    let slow = json!({ "process_window_size_kb": 64, "process_max_bandwidth_mb_sec": 1 });
    assert_eq!(call(&mut w, "bdev_raid_set_options", slow), Ok(json!(true)));
    let added = json!({ "raid_bdev": "R", "base_bdev": "M2" });
    assert_eq!(call(&mut w, "bdev_raid_add_base_bdev", added), Ok(json!(true)));
    w.pass_time(Duration::from_secs(1));
    (0..200).for_each(|_| w.step());
    let shown = call(&mut w, "bdev_raid_get_bdevs", json!({ "category": "all" })).unwrap();
    assert_eq!((&shown[0]["process"]["type"], &shown[0]["process"]["target"]), (&json!("rebuild"), &json!("M2")));
    let saved = BdevConfig(Arc::clone(w.system())).save();
    let saved: Vec<&str> = saved.iter().map(|call| call.method).collect();
    assert!(saved.contains(&"bdev_raid_set_options") && saved.contains(&"bdev_raid_create"), "{saved:?}");
    call(&mut w, "bdev_raid_set_options", json!({ "process_max_bandwidth_mb_sec": 0 })).unwrap();
    until_in_sync(&mut w);
    assert_eq!(call(&mut w, "bdev_raid_delete", json!({ "name": "R" })), Ok(json!(true)));
    assert!(call(&mut w, "bdev_raid_delete", json!({ "name": "R" })).is_err());
    // One that waits for a base bdev is made when that is there.
    let raid = json!({ "name": "T", "raid_level": "1", "base_bdevs": ["M0", "Late"], "superblock": true });
    call(&mut w, "bdev_raid_create", raid).unwrap();
    let shown = call(&mut w, "bdev_raid_get_bdevs", json!({ "category": "configuring" })).unwrap();
    assert_eq!((&shown[0]["name"], &shown[0]["num_base_bdevs_discovered"]), (&json!("T"), &json!(1)));
    call(&mut w, "bdev_malloc_create", json!({ "name": "Late", "num_blocks": 9000, "block_size": 512 })).unwrap();
    call(&mut w, "bdev_wait_for_examine", json!({})).unwrap();
    let shown = call(&mut w, "bdev_raid_get_bdevs", json!({ "category": "online" })).unwrap();
    assert_eq!(shown[0]["base_bdevs_list"][0]["data_offset"], 2048);
    assert_eq!(call(&mut w, "bdev_raid_delete", json!({ "name": "T", "clear_sb": true })), Ok(json!(true)));
    let raid = json!({ "name": "U", "raid_level": "1", "base_bdevs": ["M0", "M1"], "superblock": true });
    assert_eq!(call(&mut w, "bdev_raid_create", raid), Ok(json!(true)), "the superblocks are gone");
    call(&mut w, "bdev_raid_delete", json!({ "name": "U" })).unwrap();
}
