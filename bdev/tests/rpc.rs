//! The methods of the layer, called as the server calls them, on a world of two reactors.

use std::path::PathBuf;

use reactor::Buffers;
use reactor::file::EngineChoice;
use ringstone_bdev::conformance::{Client, World, WorldConfig};
use ringstone_bdev::core::{ClaimKind, IoStatus, Op};
use ringstone_bdev::rpc::{BdevConfig, IobufConfig, methods};
use schema::spdk::Reference;
use schema::{ConfigSource, RpcError, validate};
use serde_json::{Value, json};
use std::sync::Arc;

fn world() -> World {
    World::on_host(EngineChoice::Auto, WorldConfig::default())
}

fn call(world: &mut World, name: &str, params: Value) -> Result<Value, RpcError> {
    let method = methods().find(|method| method.spec.name == name).unwrap_or_else(|| panic!("no method {name}"));
    let params = validate(&method.spec, Some(params))?;
    let system = Arc::clone(world.system());
    world.block_on((method.handler)(system, params))
}

fn code(result: Result<Value, RpcError>) -> i32 {
    result.expect_err("this must be refused").code()
}

/// A folder of this test's own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("ringstone-rpc-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn file(&self, name: &str, bytes: u64) -> String {
        let path = self.0.join(name);
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        path.to_str().unwrap().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn malloc_answers_as_scripts_expect() {
    let mut w = world();
    let malloc0 = json!({"name": "Malloc0", "num_blocks": 16384, "block_size": 4096});
    assert_eq!(call(&mut w, "bdev_malloc_create", malloc0.clone()), Ok(json!("Malloc0")));
    assert_eq!(code(call(&mut w, "bdev_malloc_create", malloc0)), -17);
    let unnamed = json!({"num_blocks": 16384, "block_size": 512});
    assert_eq!(call(&mut w, "bdev_malloc_create", unnamed.clone()), Ok(json!("Malloc1")));
    assert_eq!(call(&mut w, "bdev_malloc_create", unnamed), Ok(json!("Malloc2")));
    for (params, wanted) in [
        (json!({"name": "Bad", "num_blocks": 0, "block_size": 4096}), -22),
        (json!({"name": "Bad", "num_blocks": 16, "block_size": 4096, "nonsense": 1}), -32603),
        (json!({"name": "Bad", "num_blocks": 16, "block_size": 1000}), -22),
        (json!({"name": "Bad", "num_blocks": u64::MAX, "block_size": 4096}), -22),
        (json!({"name": "Bad", "num_blocks": 16, "block_size": 4096, "md_size": 8}), -22),
        (json!({"name": "Bad", "num_blocks": 16, "block_size": 4096, "physical_block_size": 512}), -22),
        (json!({"name": "", "num_blocks": 16, "block_size": 4096}), -32603),
    ] {
        assert_eq!(code(call(&mut w, "bdev_malloc_create", params.clone())), wanted, "{params}");
    }
    let zero_md = json!({"name": "M", "num_blocks": 16, "block_size": 4096, "md_size": 0, "dif_type": 0});
    assert_eq!(call(&mut w, "bdev_malloc_create", zero_md), Ok(json!("M")));
    assert_eq!(call(&mut w, "bdev_malloc_delete", json!({"name": "M"})), Ok(json!(true)));
    assert_eq!(code(call(&mut w, "bdev_malloc_delete", json!({"name": "M"}))), -19);
    // Of another kind.
    assert_eq!(code(call(&mut w, "bdev_null_delete", json!({"name": "Malloc0"}))), -19);
    assert_eq!(call(&mut w, "bdev_malloc_resize", json!({"name": "Malloc0", "new_size": 5})), Ok(json!(true)));
    let shown = call(&mut w, "bdev_get_bdevs", json!({"name": "Malloc0"})).unwrap();
    assert_eq!(shown[0]["num_blocks"], 5 << 8);
    let text = call(&mut w, "bdev_malloc_create", json!({"num_blocks": 1, "block_size": 3})).unwrap_err().message();
    assert!(text.contains("block_size 3") || text.contains("block_size \"3\""), "{text}");
}

#[test]
fn one_bdev_is_found_by_name_and_uuid_and_waited_for() {
    let mut w = world();
    let uuid = "1d301314-64e1-44f0-ad01-7b6aa9476f81";
    let null = json!({"name": "Null0", "num_blocks": 262144, "block_size": 4096, "uuid": uuid});
    assert_eq!(call(&mut w, "bdev_null_create", null), Ok(json!("Null0")));
    let by_name = call(&mut w, "bdev_get_bdevs", json!({"name": "Null0"})).unwrap();
    assert_eq!(call(&mut w, "bdev_get_bdevs", json!({"name": uuid})).unwrap(), by_name);
    assert_eq!(call(&mut w, "bdev_get_bdevs", json!({})).unwrap(), by_name);
    assert_eq!(by_name[0]["aliases"], json!([uuid]));
    assert_eq!(code(call(&mut w, "bdev_get_bdevs", json!({"name": "Nope"}))), -19);
    // A name is taken by the other's UUID.
    let clash = json!({"name": uuid, "num_blocks": 1, "block_size": 512});
    assert_eq!(code(call(&mut w, "bdev_null_create", clash)), -17);

    // The wait ends when the device appears, and when its time is over.
    let get = methods().find(|method| method.spec.name == "bdev_get_bdevs").unwrap();
    let params = validate(&get.spec, Some(json!({"name": "Late", "timeout": 10_000}))).unwrap();
    let system = Arc::clone(w.system());
    let waiting = (get.handler)(Arc::clone(&system), params);
    let create = methods().find(|method| method.spec.name == "bdev_null_create").unwrap();
    let late = json!({"name": "Late", "num_blocks": 1, "block_size": 512});
    let late = (create.handler)(system, validate(&create.spec, Some(late)).unwrap());
    let (found, made) = w.block_on(async { futures_util::future::join(waiting, late).await });
    assert_eq!(made.unwrap(), "Late");
    assert_eq!(found.unwrap()[0]["name"], "Late");
    assert_eq!(code(call(&mut w, "bdev_get_bdevs", json!({"name": "Never", "timeout": 30}))), -19);
    assert_eq!(call(&mut w, "bdev_examine", json!({"name": "Late"})), Ok(json!(true)));
    assert_eq!(code(call(&mut w, "bdev_examine", json!({"name": "Never"}))), -19);
    assert_eq!(call(&mut w, "bdev_wait_for_examine", json!({})), Ok(json!(true)));
}

#[test]
fn a_claimed_bdev_shows_its_claim() {
    let mut w = world();
    call(&mut w, "bdev_null_create", json!({"name": "Null0", "num_blocks": 8, "block_size": 512})).unwrap();
    let nothing: ringstone_bdev::core::registry::OnEvent = Arc::new(|_| {});
    let descriptor = w.system().open("Null0", true, "a test", nothing).unwrap();
    descriptor.claim(ClaimKind::ExclusiveWrite).unwrap();
    let shown = call(&mut w, "bdev_get_bdevs", json!({})).unwrap();
    assert_eq!((&shown[0]["claimed"], &shown[0]["claim_type"]), (&json!(true), &json!("exclusive_write")));
    drop(descriptor);
    let shown = call(&mut w, "bdev_get_bdevs", json!({})).unwrap();
    assert_eq!((&shown[0]["claimed"], shown[0].get("claim_type")), (&json!(false), None));
}

#[test]
fn files_are_made_into_bdevs_or_refused_with_their_name() {
    let folder = Folder::new("files");
    let mut w = world();
    let path = folder.file("a.img", (64 << 20) + 100);
    let uring = json!({"name": "Uring0", "filename": path, "block_size": 4096});
    assert_eq!(call(&mut w, "bdev_uring_create", uring), Ok(json!("Uring0")));
    let shown = call(&mut w, "bdev_get_bdevs", json!({"name": "Uring0"})).unwrap();
    assert_eq!(shown[0]["num_blocks"], 16384);
    assert_eq!(shown[0]["driver_specific"]["uring"]["filename"], json!(path));
    // The file is in use: nobody else gets it.
    let again = call(&mut w, "bdev_aio_create", json!({"name": "Aio0", "filename": path})).unwrap_err();
    assert_eq!(again.code(), -16, "{again}");
    assert!(again.message().contains(&path), "{again}");
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(128 << 20).unwrap();
    assert_eq!(code(call(&mut w, "bdev_aio_rescan", json!({"name": "Uring0"}))), -19);
    assert_eq!(call(&mut w, "bdev_uring_rescan", json!({"name": "Uring0"})), Ok(json!(true)));
    let shown = call(&mut w, "bdev_get_bdevs", json!({"name": "Uring0"})).unwrap();
    assert_eq!(shown[0]["num_blocks"], 32768);
    assert_eq!(call(&mut w, "bdev_uring_delete", json!({"name": "Uring0"})), Ok(json!(true)));

    let aio = json!({"name": "Aio0", "filename": path, "readonly": true});
    assert_eq!(call(&mut w, "bdev_aio_create", aio), Ok(json!("Aio0")));
    let shown = call(&mut w, "bdev_get_bdevs", json!({"name": "Aio0"})).unwrap();
    assert_eq!(shown[0]["block_size"], 512);
    assert_eq!(shown[0]["driver_specific"]["aio"]["readonly"], json!(true));
    assert_eq!(shown[0]["supported_io_types"]["write"], json!(false));
    assert_eq!(call(&mut w, "bdev_aio_delete", json!({"name": "Aio0"})), Ok(json!(true)));

    let tiny = folder.file("tiny.img", 100);
    for (params, wanted) in [
        (json!({"name": "Bad", "filename": "/nonexistent/file"}), -2),
        (json!({"name": "Bad", "filename": folder.0.to_str().unwrap()}), -22),
        (json!({"name": "Bad", "filename": tiny}), -22),
        (json!({"name": "Bad", "filename": path, "block_size": 777}), -22),
        (json!({"name": "Bad", "filename": path, "readonly": true, "fallocate": true}), -22),
        (json!({"name": "Bad"}), -32603),
    ] {
        assert_eq!(code(call(&mut w, "bdev_aio_create", params.clone())), wanted, "{params}");
    }
    assert_eq!(call(&mut w, "bdev_get_bdevs", json!({})), Ok(json!([])));
}

#[test]
fn counters_add_up_by_channel_and_in_all() {
    let mut w = world();
    call(&mut w, "bdev_malloc_create", json!({"name": "M", "num_blocks": 64, "block_size": 512})).unwrap();
    let info = w.system().get("M").unwrap();
    let mut clients: Vec<Client> = (0..2).map(|n| Client::open(&mut w, n, &info)).collect();
    clients[0].write(&mut w, 0, &[7; 1024]);
    clients[0].read(&mut w, 0, 1);
    clients[1].read(&mut w, 0, 4);
    clients[1].run(&mut w, Op::Unmap, 0, 8, &[]);
    clients[1].run(&mut w, Op::Copy { source_lba: 0 }, 8, 3, &[]);
    clients[1].run(&mut w, Op::Read, 64, 1, &[0; 512]);
    let all = call(&mut w, "bdev_get_iostat", json!({"names": ["M"]})).unwrap();
    let sum = &all["bdevs"][0];
    for (key, wanted) in [
        ("num_read_ops", 2),
        ("bytes_read", 2560),
        ("num_write_ops", 1),
        ("bytes_written", 1024),
        ("num_unmap_ops", 1),
        ("bytes_unmapped", 4096),
        ("num_copy_ops", 1),
        ("bytes_copied", 1536),
    ] {
        assert_eq!(sum[key], wanted, "{key}");
    }
    assert_eq!(sum["io_error"], json!({"out_of_range": 1}));
    assert_eq!(all["tick_rate"], 1_000_000_000);
    let each = call(&mut w, "bdev_get_iostat", json!({"per_channel": true})).unwrap();
    let channels = each["bdevs"][0]["channels"].as_array().unwrap();
    assert_eq!(channels.iter().map(|c| c["num_read_ops"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 1]);
    assert_eq!(channels.iter().map(|c| c["thread_id"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);

    // What a closed channel did is not forgotten, until it is to be.
    clients.pop().unwrap().close();
    let later = call(&mut w, "bdev_get_iostat", json!({"reset_mode": "error"})).unwrap();
    assert_eq!(later["bdevs"][0]["num_unmap_ops"], 1);
    let later = call(&mut w, "bdev_get_iostat", json!({})).unwrap();
    assert_eq!((&later["bdevs"][0]["io_error"], &later["bdevs"][0]["num_unmap_ops"]), (&json!({}), &json!(1)));
    assert_eq!(call(&mut w, "bdev_reset_iostat", json!({"name": "M"})), Ok(json!(true)));
    let later = call(&mut w, "bdev_get_iostat", json!({})).unwrap();
    assert_eq!(later["bdevs"][0]["num_read_ops"], 0);
    assert_eq!(code(call(&mut w, "bdev_get_iostat", json!({"names": ["Nope"]}))), -19);
    assert_eq!(code(call(&mut w, "bdev_get_iostat", json!({"name": "M"}))), -32603);
    assert_eq!(code(call(&mut w, "bdev_reset_iostat", json!({"name": "Nope"}))), -19);
    clients.pop().unwrap().close();
}

#[test]
fn pools_take_the_sizes_asked_for_until_they_are_used() {
    let mut w = world();
    assert_eq!(call(&mut w, "bdev_set_options", json!({"bdev_io_pool_size": 100})), Ok(json!(true)));
    let iobuf = json!({"small_pool_count": 33, "large_pool_count": 3, "small_bufsize": 8192});
    assert_eq!(call(&mut w, "iobuf_set_options", iobuf), Ok(json!(true)));
    for n in 0..2 {
        let config = w.runtime(n).borrow().config();
        assert_eq!((config.io_pool, config.buffers.small, config.buffers.large), (100, 17, 2));
    }
    assert_eq!(code(call(&mut w, "bdev_set_options", json!({"bdev_io_pool_size": 1}))), -32602);
    call(&mut w, "bdev_malloc_create", json!({"name": "M", "num_blocks": 64, "block_size": 512})).unwrap();
    let info = w.system().get("M").unwrap();
    let mut client = Client::open(&mut w, 1, &info);
    client.write(&mut w, 0, &[7; 1024]);
    assert_eq!(code(call(&mut w, "bdev_set_options", json!({"bdev_io_pool_size": 50}))), -16);
    client.close();
    let lent: Vec<_> = (0..4).map(|_| w.runtime(0).borrow_mut().pool().alloc(4096).unwrap()).collect();
    lent.into_iter().for_each(|list| w.runtime(0).borrow_mut().pool().put(list));
    let stats = call(&mut w, "iobuf_get_stats", json!({})).unwrap();
    assert_eq!(stats[0]["module"], "bdev");
    assert_eq!(stats[0]["small_pool"], json!({"cache": 4, "main": 0, "retry": 0, "cache_size": 34}));
    // 2 reactors, each with 16 buffers of the middle class and its share of the large ones.
    assert_eq!(stats[0]["large_pool"]["cache_size"], 36);
}

#[test]
fn devices_in_layers_are_made_changed_and_deleted() {
    let mut w = world();
    call(&mut w, "bdev_malloc_create", json!({"name": "M", "num_blocks": 8192, "block_size": 512})).unwrap();
    let delay = json!({"name": "D", "base_bdev_name": "M", "avg_read_latency": 1000, "p99_read_latency": 1000,
        "avg_write_latency": 0, "p99_write_latency": 0});
    assert_eq!(call(&mut w, "bdev_delay_create", delay.clone()), Ok(json!("D")));
    let taken = call(&mut w, "bdev_passthru_create", json!({"name": "P", "base_bdev_name": "M"})).unwrap_err();
    assert_eq!((taken.code(), taken.blamed_field()), (-1, Some("base_bdev_name")), "{taken}");
    let mut unsound = delay.clone();
    unsound["name"] = json!("D2");
    unsound["avg_read_latency"] = json!(1001);
    assert_eq!(code(call(&mut w, "bdev_delay_create", unsound)), -22);
    assert_eq!(call(&mut w, "bdev_error_create", json!({"base_name": "D"})), Ok(json!(true)));
    assert_eq!(call(&mut w, "bdev_wait_for_examine", json!({})), Ok(json!(true)));
    let top = w.system().get("EE_D").unwrap();
    let mut client = Client::open(&mut w, 0, &top);
    let clock = w.system().platform().clock();
    let timed = |w: &mut World, client: &mut Client| {
        let began = clock.now();
        client.read(w, 0, 1);
        clock.now().nanos_since(began) / 1000
    };
    client.write(&mut w, 0, &[1; 512]);
    assert!((1000..1020).contains(&timed(&mut w, &mut client)));
    let update = json!({"delay_bdev_name": "D", "latency_type": "avg_read", "latency_us": 0});
    assert_eq!(call(&mut w, "bdev_delay_update_latency", update), Ok(json!(true)));
    let update = json!({"delay_bdev_name": "D", "latency_type": "p99_read", "latency_us": 0});
    assert_eq!(call(&mut w, "bdev_delay_update_latency", update), Ok(json!(true)));
    assert!(timed(&mut w, &mut client) < 20);

    let inject = |w: &mut World, extra: Value| {
        let mut params = json!({"name": "EE_D", "io_type": "read"});
        params.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        call(w, "bdev_error_inject_error", params)
    };
    let status = |w: &mut World, client: &mut Client| client.run(w, Op::Read, 0, 1, &[0; 512]).status;
    inject(&mut w, json!({"error_type": "failure", "num": 2})).unwrap();
    let seen: Vec<IoStatus> = (0..3).map(|_| status(&mut w, &mut client)).collect();
    assert_eq!(seen, [IoStatus::Failed, IoStatus::Failed, IoStatus::Success]);
    inject(&mut w, json!({"error_type": "nvme_failure", "nvme_sct": 2, "nvme_sc": 0x81})).unwrap();
    assert_eq!(status(&mut w, &mut client), IoStatus::Nvme { sct: 2, sc: 0x81, dnr: false });
    assert_eq!(code(inject(&mut w, json!({"error_type": "nvme_failure"}))), -22);
    inject(&mut w, json!({"error_type": "corrupt_data", "corrupt_offset": 7, "corrupt_value": 0x10})).unwrap();
    assert_eq!(client.read(&mut w, 0, 1)[..9], [1, 1, 1, 1, 1, 1, 1, 0x11, 1]);
    assert_eq!(client.read(&mut w, 0, 1), [1; 512]);
    inject(&mut w, json!({"error_type": "nomem"})).unwrap();
    assert_eq!(status(&mut w, &mut client), IoStatus::Success);
    // What never ends is ended by an abort, or by a reset.
    inject(&mut w, json!({"error_type": "pending", "num": 5})).unwrap();
    let stuck: Vec<u64> = (0..5).map(|n| client.submit(Op::Read, n, 1, Buffers::heap(512))).collect();
    (0..100).for_each(|_| w.step());
    assert!(client.take(stuck[0]).is_none());
    assert!(client.abort(stuck[0]));
    assert_eq!(client.wait(&mut w, stuck[0]).status, IoStatus::Aborted);
    assert_eq!(client.run(&mut w, Op::Reset, 0, 0, &[]).status, IoStatus::Success);
    for &mark in &stuck[1..] {
        assert_eq!(client.wait(&mut w, mark).status, IoStatus::Aborted);
    }
    inject(&mut w, json!({"error_type": "failure", "num": 9})).unwrap();
    call(&mut w, "bdev_error_inject_error", json!({"name": "EE_D", "io_type": "clear", "error_type": "failure"}))
        .unwrap();
    assert_eq!(status(&mut w, &mut client), IoStatus::Success);
    client.close();
    drop(top);
    assert_eq!(call(&mut w, "bdev_error_delete", json!({"name": "EE_D"})), Ok(json!(true)));
    assert_eq!(call(&mut w, "bdev_delay_delete", json!({"name": "D"})), Ok(json!(true)));

    let split = json!({"base_bdev": "M", "split_count": 3, "split_size_mb": 2});
    assert_eq!(call(&mut w, "bdev_split_create", split.clone()), Ok(json!(["Mp0", "Mp1"])));
    assert_eq!(code(call(&mut w, "bdev_split_create", split)), -1);
    let shown = call(&mut w, "bdev_get_bdevs", json!({"name": "Mp1"})).unwrap();
    assert_eq!(shown[0]["num_blocks"], 4096);
    assert_eq!(call(&mut w, "bdev_split_delete", json!({"base_bdev": "M"})), Ok(json!(true)));
    assert_eq!(code(call(&mut w, "bdev_split_delete", json!({"base_bdev": "M"}))), -19);
    assert_eq!(
        call(&mut w, "bdev_split_create", json!({"base_bdev": "M", "split_count": 2})),
        Ok(json!(["Mp0", "Mp1"]))
    );
    let again = call(&mut w, "bdev_get_bdevs", json!({"name": "Mp1"})).unwrap();
    assert_eq!(again[0]["uuid"], shown[0]["uuid"]);
    // The base goes, and its parts with it.
    assert_eq!(call(&mut w, "bdev_malloc_delete", json!({"name": "M"})), Ok(json!(true)));
    assert_eq!(call(&mut w, "bdev_get_bdevs", json!({})), Ok(json!([])));
}

#[test]
fn the_saved_configuration_makes_the_same_bdevs_again() {
    let folder = Folder::new("config");
    let path = folder.file("a.img", 1 << 20);
    let mut w = world();
    call(&mut w, "iobuf_set_options", json!({"large_pool_count": 8})).unwrap();
    call(&mut w, "bdev_malloc_create", json!({"name": "B", "num_blocks": 64, "block_size": 512})).unwrap();
    call(&mut w, "bdev_null_create", json!({"name": "A", "num_blocks": 64, "block_size": 4096})).unwrap();
    call(&mut w, "bdev_null_resize", json!({"name": "A", "new_size": 3})).unwrap();
    call(&mut w, "bdev_uring_create", json!({"name": "U", "filename": path})).unwrap();
    call(&mut w, "bdev_passthru_create", json!({"name": "P", "base_bdev_name": "B"})).unwrap();
    call(&mut w, "bdev_split_create", json!({"base_bdev": "U", "split_count": 2})).unwrap();
    let appliance = json!({
        "name": "H", "handler": "memory", "num_blocks": 64, "block_size": 512, "workers": 2, "placement": "queue",
        "timeout_ms": 0, "queue_depth": 7, "spin_us": 3, "latency_sample": 5, "read_only": true, "cores": [0],
    });
    assert_eq!(call(&mut w, "bdev_appliance_create", appliance.clone()), Ok(json!("H")));
    assert_eq!(call(&mut w, "bdev_appliance_resize", json!({"name": "H", "num_blocks": 99})), Ok(json!(true)));
    let shown = call(&mut w, "bdev_get_bdevs", json!({"name": "H"})).unwrap();
    for (key, value) in appliance.as_object().unwrap().iter().filter(|(key, _)| *key != "name") {
        let wanted = if key == "num_blocks" { &json!(99) } else { value };
        assert_eq!(&shown[0]["driver_specific"]["appliance"][key], wanted, "{key}");
    }
    let io_types = &shown[0]["supported_io_types"];
    assert!(io_types["read"] == true && io_types["unmap"] == true && io_types["compare_and_write"] == true);
    let save = |w: &World| {
        let system = w.system();
        [IobufConfig(Arc::clone(system)).save(), BdevConfig(Arc::clone(system)).save()].concat()
    };
    let saved = save(&w);
    let order: Vec<&str> = saved.iter().map(|entry| entry.method).collect();
    let wanted = [
        "iobuf_set_options",
        "bdev_set_options",
        "bdev_malloc_create",
        "bdev_null_create",
        "bdev_uring_create",
        "bdev_passthru_create",
        "bdev_split_create",
        "bdev_appliance_create",
        "bdev_wait_for_examine",
    ];
    assert_eq!(order, wanted);
    let before = call(&mut w, "bdev_get_bdevs", json!({})).unwrap();
    drop(w);
    let mut w = world();
    for entry in &saved {
        call(&mut w, entry.method, entry.params.clone()).unwrap();
    }
    assert_eq!(call(&mut w, "bdev_get_bdevs", json!({})).unwrap(), before);
    assert_eq!(save(&w), saved);
}

#[test]
fn appliance_bdevs() {
    let mut w = world();
    let params = json!({"name": "H", "handler": "memory", "num_blocks": 64, "block_size": 512, "timeout_ms": 5});
    assert_eq!(call(&mut w, "bdev_appliance_create", params.clone()), Ok(json!("H")));
    assert_eq!(code(call(&mut w, "bdev_appliance_create", params.clone())), -17);
    call(&mut w, "bdev_malloc_create", json!({"name": "M", "num_blocks": 64, "block_size": 512})).unwrap();
    let bad = |key: &str, value: Value| {
        let mut params = params.clone();
        params["name"] = json!("other");
        params[key] = value;
        params
    };
    for params in [
        bad("handler", json!("nobody")),
        bad("placement", json!("anywhere")),
        bad("workers", json!(65)),
        bad("queue_depth", json!(0)),
        bad("cores", json!(["one"])),
        bad("options", json!([1])),
        bad("options", json!({"unknown": 1})),
    ] {
        assert!(call(&mut w, "bdev_appliance_create", params.clone()).is_err(), "{params}");
    }
    let text = call(&mut w, "bdev_appliance_create", bad("handler", json!("nobody"))).unwrap_err().message();
    assert!(text.contains("memory"), "it says which handlers there are: {text}");
    let all = call(&mut w, "bdev_appliance_get_stats", json!({})).unwrap();
    assert_eq!((all.as_array().unwrap().len(), &all[0]["name"], &all[0]["submitted"]), (1, &json!("H"), &json!(0)));
    assert_eq!(all[0]["backend"]["workers"][0]["running"], true);
    assert_eq!(code(call(&mut w, "bdev_appliance_get_stats", json!({"name": "M"}))), -19);
    assert_eq!(code(call(&mut w, "bdev_appliance_resize", json!({"name": "M", "num_blocks": 1}))), -19);
    assert_eq!(code(call(&mut w, "bdev_appliance_delete", json!({"name": "M"}))), -19);
    assert_eq!(call(&mut w, "bdev_appliance_delete", json!({"name": "H"})), Ok(json!(true)));
    assert_eq!(code(call(&mut w, "bdev_appliance_delete", json!({"name": "H"}))), -19);
    w.assert_clean();
}

#[test]
fn parameters_are_those_of_spdk() {
    let Some(reference) = Reference::beside(env!("CARGO_MANIFEST_DIR")) else { return };
    for method in methods() {
        match reference.parameter_differences(&method.spec) {
            None => {
                let name = method.spec.name;
                assert!(
                    name == "bdev_malloc_resize"
                        || name.starts_with("bdev_appliance_")
                        || ["bdev_raid_start", "bdev_raid_get_status"].contains(&name),
                    "{name} is not one of our own"
                );
            }
            Some(differences) => assert_eq!(differences, Vec::<String>::new(), "{}", method.spec.name),
        }
    }
}

/// What is shown here and not there.
const OURS: &[&str] = &["driver_specific.uring.direct"];

#[test]
fn results_are_those_of_spdk() {
    let Some(reference) = Reference::beside(env!("CARGO_MANIFEST_DIR")) else { return };
    let folder = Folder::new("shapes");
    let path = folder.file("a.img", 64 << 20);
    let mut w = world();
    let mut compared = 0;
    for sample in reference.samples().filter(|sample| methods().any(|method| method.spec.name == sample.method)) {
        let (name, params) = (sample.method, sample.params);
        // The samples go on with kinds of bdevs that are not here. One file cannot be two bdevs, nor Malloc0 be taken by
        // a bdev that has no name.
        let is_ours = params["name"]
            .as_str()
            .is_none_or(|n| ["Null0", "Malloc0", "Uring0", "Pt0", "Nope", "Bad", "Delay0", "EE_Delay0"].contains(&n));
        let is_ours = is_ours && params["base_bdev"].is_null();
        if !is_ours || name == "bdev_malloc_create" && params.get("name").is_none() {
            continue;
        }
        let mut params = params.clone();
        if params["filename"].is_string() {
            params["filename"] = json!(path);
        }
        match (call(&mut w, name, params.clone()), sample.outcome) {
            (Ok(ours), Ok(theirs)) => {
                let text = |value: &Value| value.as_str().map(str::to_owned);
                assert_eq!(text(&ours), text(theirs), "{name} {params}");
                assert_same_shape(&ours, theirs, name);
            }
            (Err(ours), Err(theirs)) => assert_eq!(i64::from(ours.code()), theirs, "{name} {params}: {ours}"),
            (ours, theirs) => panic!("{name} {params}: {ours:?}, theirs {theirs:?}"),
        }
        compared += 1;
    }
    assert!(compared >= 12, "only {compared} samples were compared");
}

/// Every key of either is in the other, with a value of the same type.
fn assert_same_shape(ours: &Value, theirs: &Value, at: &str) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for (key, value) in theirs {
                let mine = ours.get(key).unwrap_or_else(|| panic!("{at}.{key} is missing"));
                assert_same_shape(mine, value, &format!("{at}.{key}"));
            }
            for key in ours.keys().filter(|key| !theirs.contains_key(*key)) {
                assert!(OURS.iter().any(|known| format!("{at}.{key}").ends_with(known)), "{at}.{key} is ours alone");
            }
        }
        (Value::Array(ours), Value::Array(theirs)) => {
            for (mine, theirs) in ours.iter().zip(theirs) {
                assert_same_shape(mine, theirs, &format!("{at}[]"));
            }
        }
        _ => assert_eq!(
            std::mem::discriminant(ours),
            std::mem::discriminant(theirs),
            "{at} is {ours}, theirs is {theirs}"
        ),
    }
}
