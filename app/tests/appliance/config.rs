//! `--config`, `--empty`, `--wait-for-rpc`, and which configuration counts.

use std::fs;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::{Scratch, Server, address, free_port};

const NQN: &str = "nqn.2026-11.io.example:one";

fn document(calls: &[(&str, &str, Value)]) -> String {
    let mut sections: Vec<Value> = Vec::new();
    for (section, method, params) in calls {
        let call = json!({"method": method, "params": params});
        match sections.iter_mut().find(|known| known["subsystem"] == *section) {
            Some(known) => known["config"].as_array_mut().unwrap().push(call),
            None => sections.push(json!({"subsystem": section, "config": [call]})),
        }
    }
    json!({ "subsystems": sections }).to_string()
}

fn null(name: &str) -> (&'static str, &'static str, Value) {
    ("bdev", "bdev_null_create", json!({"name": name, "num_blocks": 128, "block_size": 512}))
}

fn bdevs(server: &Server) -> Vec<String> {
    let bdevs = server.call("bdev_get_bdevs", json!({}));
    bdevs.as_array().unwrap().iter().map(|bdev| bdev["name"].as_str().unwrap().to_string()).collect()
}

fn aside(scratch: &Scratch) -> String {
    fs::read_to_string(scratch.state().join("config.json.superseded")).unwrap_or_default()
}

#[test]
fn a_file_counts_when_it_is_new_or_has_changed() {
    let scratch = Scratch::new();
    let file = scratch.write("first.json", document(&[null("A")]));
    let args = ["--config", file.to_str().unwrap()];

    // A fresh state directory: the file, and no first volume.
    let server = Server::start(&scratch, &args);
    assert_eq!(bdevs(&server), ["A"]);
    assert!(!scratch.state().join("vol0.img").exists());
    server.call("bdev_null_create", json!({"name": "B", "num_blocks": 128, "block_size": 512}));
    server.kill();

    // The same file again: the saved state contains it, and what came after.
    let server = Server::start(&scratch, &args);
    assert_eq!(bdevs(&server), ["A", "B"]);
    assert!(server.log().contains("has not changed"), "{}", server.log());
    server.kill();
    assert_eq!(aside(&scratch), "");

    // Without it as well, and it is still known afterwards.
    let server = Server::start(&scratch, &[]);
    assert_eq!(bdevs(&server), ["A", "B"]);
    server.call("bdev_null_delete", json!({"name": "A"}));
    server.kill();
    let server = Server::start(&scratch, &args);
    assert_eq!(bdevs(&server), ["B"]);
    server.kill();

    // A changed file wins, and says so; what was saved is kept.
    fs::write(&file, document(&[null("C")])).unwrap();
    let server = Server::start(&scratch, &args);
    assert_eq!(bdevs(&server), ["C"]);
    assert!(server.log().contains("kept aside"), "{}", server.log());
    assert!(aside(&scratch).contains("\"B\""));
    server.kill();
    let server = Server::start(&scratch, &args);
    assert_eq!(bdevs(&server), ["C"]);
    server.stop(Signal::TERM);
}

#[test]
fn a_file_that_is_wrong_changes_nothing() {
    let scratch = Scratch::new();
    let server = Server::start(&scratch, &["--empty"]);
    server.call("bdev_null_create", json!({"name": "A", "num_blocks": 128, "block_size": 512}));
    server.kill();
    let saved = fs::read(scratch.config()).unwrap();
    let refuses = |name: &str, text: &str, words: &[&str]| {
        let file = scratch.write(name, text);
        let said = scratch.refused(&["--config", file.to_str().unwrap()]);
        assert!(said.contains(file.to_str().unwrap()), "{said}");
        for word in words {
            assert!(said.contains(word), "{word}: {said}");
        }
        assert_eq!(fs::read(scratch.config()).unwrap(), saved, "{said}");
    };
    refuses("1", "{", &["not JSON"]);
    refuses("2", "[]", &["must be an object"]);
    refuses("3", r#"{"subsystem": []}"#, &["subsystems"]);
    refuses("4", &document(&[null("X"), ("bdev", "bdev_nul_create", json!({}))]), &["entry 1", "bdev_null_create"]);
    refuses(
        "5",
        &document(&[("bdev", "bdev_null_create", json!({"name": "X", "num_blocks": 1}))]),
        &["entry 0", "block_size"],
    );
    refuses("6", &document(&[null("X"), null("X")]), &["entry 1", "X"]);
    let missing = scratch.path().join("nope");
    let said = scratch.refused(&["--config", missing.to_str().unwrap()]);
    assert!(said.contains(missing.to_str().unwrap()), "{said}");
    // And the next plain start restores what was there.
    let server = Server::start(&scratch, &[]);
    assert_eq!(bdevs(&server), ["A"]);
}

#[test]
fn empty_is_empty_whatever_was_saved() {
    let scratch = Scratch::new();
    let server = Server::start(&scratch, &["--empty"]);
    server.call("bdev_null_create", json!({"name": "A", "num_blocks": 128, "block_size": 512}));
    server.kill();
    let server = Server::start(&scratch, &["--empty"]);
    assert_eq!(server.call("bdev_get_bdevs", json!({})), json!([]));
    assert_eq!(server.call("nvmf_get_transports", json!({})), json!([]));
    let subsystems = server.call("nvmf_get_subsystems", json!({}));
    assert_eq!(subsystems.as_array().unwrap().len(), 1, "only the discovery subsystem: {subsystems}");
    assert!(!server.said.iter().any(|line| line.contains("nvme connect")));
    assert!(server.log().contains("--empty"), "{}", server.log());
    assert!(aside(&scratch).contains("\"A\""));
    server.kill();
    // An empty server's configuration is a configuration: no first volume comes by itself.
    let server = Server::start(&scratch, &[]);
    assert_eq!(server.call("bdev_get_bdevs", json!({})), json!([]));
    let both = scratch.serve(&["--empty", "--config", "x"]).output().unwrap();
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn waiting_for_rpc() {
    let scratch = Scratch::new();
    let waiting = |line: &str| line.starts_with("waiting for framework_start_init");
    let mut server = Server::start_until(&scratch, &["--empty", "--wait-for-rpc"], waiting);
    let (code, message, _) =
        server.call_fails("bdev_null_create", json!({"name": "A", "num_blocks": 128, "block_size": 512}));
    assert_eq!(code, -1, "{message}");
    assert!(message.contains("framework_start_init"), "{message}");
    server.call("iobuf_set_options", json!({"small_pool_count": 2048, "large_pool_count": 512}));
    server.call("framework_start_init", json!({}));
    server.read_until(|line| line == "ready");
    server.call("framework_wait_init", json!({}));
    let (code, message, _) = server.call_fails("framework_start_init", json!({}));
    assert!(code != 0, "{message}");
    let (_, message, _) =
        server.call_fails("iobuf_set_options", json!({"small_pool_count": 2048, "large_pool_count": 512}));
    assert!(message.contains("iobuf_set_options"), "{message}");
    server.call("bdev_null_create", json!({"name": "A", "num_blocks": 128, "block_size": 512}));
    // What was set before the start is part of what is saved.
    server.kill();
    let server = Server::start(&scratch, &[]);
    let iobuf = server.call("framework_get_config", json!({"name": "iobuf"}));
    assert!(iobuf.to_string().contains("\"small_pool_count\":2048"), "{iobuf}");
    assert_eq!(bdevs(&server), ["A"]);
    server.kill();
    // A change before the start does not put the part that is there then in the place of what was saved.
    let mut server = Server::start_until(&scratch, &["--wait-for-rpc"], waiting);
    let saved = fs::read(scratch.config()).unwrap();
    server.call("iobuf_set_options", json!({"small_pool_count": 1024, "large_pool_count": 256}));
    assert_eq!(fs::read(scratch.config()).unwrap(), saved);
    server.call("framework_start_init", json!({}));
    server.call("framework_wait_init", json!({}));
    assert_eq!(bdevs(&server), ["A"]);
    let now = fs::read_to_string(scratch.config()).unwrap();
    assert!(now.contains("bdev_null_create") && now.contains("1024"), "{now}");
    server.read_until(|line| line == "ready");
    server.kill();
    // With a file, what the file says for before the start is in place while it waits.
    let file = scratch.write(
        "c.json",
        document(&[
            ("iobuf", "iobuf_set_options", json!({"small_pool_count": 4096, "large_pool_count": 256})),
            null("Z"),
        ]),
    );
    let args = ["--config", file.to_str().unwrap(), "--wait-for-rpc"];
    let mut server = Server::start_until(&scratch, &args, waiting);
    server.call("framework_start_init", json!({}));
    server.read_until(|line| line == "ready");
    assert_eq!(bdevs(&server), ["Z"]);
    let iobuf = server.call("framework_get_config", json!({"name": "iobuf"}));
    assert!(iobuf.to_string().contains("\"small_pool_count\":4096"), "{iobuf}");
    server.stop(Signal::TERM);
}

/// What save_config writes.
fn save_config(server: &Server) -> Value {
    let parts = server.call("framework_get_subsystems", json!({}));
    let config = |name: &Value| server.call("framework_get_config", json!({ "name": name }));
    let sections = parts.as_array().unwrap().iter().map(|part| {
        let name = &part["subsystem"];
        json!({"subsystem": name, "config": config(name)})
    });
    json!({ "subsystems": sections.collect::<Vec<_>>() })
}

#[test]
fn what_save_config_writes_makes_the_same_server() {
    let scratch = Scratch::new();
    let port = free_port();
    let server = Server::start(&scratch, &["--listen", &format!("127.0.0.1:{port}")]);
    let file = scratch.path().join("image");
    fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
    for (method, params) in [
        ("bdev_malloc_create", json!({"name": "M", "num_blocks": 64, "block_size": 512})),
        ("bdev_aio_create", json!({"name": "A", "filename": file, "block_size": 512, "readonly": true})),
        ("bdev_passthru_create", json!({"name": "P", "base_bdev_name": "M"})),
        ("nvmf_create_subsystem", json!({"nqn": NQN, "serial_number": "X", "ana_reporting": true})),
        ("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": "P", "nsid": 5, "anagrpid": 3}})),
        ("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": "nqn.2026-11.io.example:host"})),
        ("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": address(port)})),
        (
            "nvmf_subsystem_listener_set_ana_state",
            json!({"nqn": NQN, "listen_address": address(port), "ana_state": "non_optimized", "anagrpid": 3}),
        ),
        ("nvmf_discovery_add_referral", json!({"address": address(8009)})),
    ] {
        server.call(method, params);
    }
    let saved = save_config(&server);
    let seen = server.call("nvmf_get_subsystems", json!({}));
    let devices = server.call("bdev_get_bdevs", json!({}));
    // The server's own file says the same.
    let mut own: Value = serde_json::from_slice(&fs::read(scratch.config()).unwrap()).unwrap();
    own.as_object_mut().unwrap().remove("ringstone");
    assert_eq!(own, saved);
    server.stop(Signal::TERM);

    let fresh = Scratch::new();
    let written = fresh.write("saved.json", serde_json::to_string_pretty(&saved).unwrap());
    let server = Server::start(&fresh, &["--config", written.to_str().unwrap()]);
    assert_eq!(save_config(&server), saved);
    assert_eq!(server.call("nvmf_get_subsystems", json!({})), seen);
    assert_eq!(server.call("bdev_get_bdevs", json!({})), devices);
}

#[test]
fn listen_only_counts_for_a_fresh_appliance_and_the_log_says_so() {
    let scratch = Scratch::new();
    let (first, second) = (free_port(), free_port());
    Server::start(&scratch, &["--listen", &format!("127.0.0.1:{first}")]).stop(Signal::TERM);
    let server = Server::start(&scratch, &["--listen", &format!("127.0.0.1:{second}")]);
    assert!(server.said.iter().any(|line| line.contains(&format!("-s {first} "))), "{:?}", server.said);
    assert!(server.log().contains("--listen only says"), "{}", server.log());
}
