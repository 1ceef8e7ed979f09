//! What survives.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::{Scratch, Server, address, free_port};

const NQN: &str = "nqn.2026-11.io.example:one";
const OTHER: &str = "nqn.2026-11.io.example:two";

/// All that can be seen of what was configured.
fn snapshot(server: &Server) -> Value {
    let subsystems = server.call("nvmf_get_subsystems", json!({}));
    let listeners = |nqn: &str| {
        let there = subsystems.as_array().unwrap().iter().any(|subsystem| subsystem["nqn"] == nqn);
        if there { server.call("nvmf_subsystem_get_listeners", json!({ "nqn": nqn })) } else { Value::Null }
    };
    json!({
        "bdevs": server.call("bdev_get_bdevs", json!({})),
        "transports": server.call("nvmf_get_transports", json!({})),
        "listeners": [listeners(NQN), listeners(OTHER)],
        "referrals": server.call("nvmf_discovery_get_referrals", json!({})),
        "subsystems": subsystems,
    })
}

fn image(scratch: &Scratch, name: &str) -> String {
    let path = scratch.path().join(name);
    fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
    path.to_str().unwrap().to_string()
}

/// Changes of every kind, each on top of those before.
fn changes(scratch: &Scratch, port: u16, second: u16) -> Vec<(&'static str, Value)> {
    let uuid = "8d6e1e4c-5a0f-4b5c-9c39-2f1de3f4a001";
    let ns = |bdev: &str| json!({"nqn": NQN, "namespace": {"bdev_name": bdev}});
    vec![
        ("bdev_malloc_create", json!({"name": "M", "num_blocks": 2048, "block_size": 512, "uuid": uuid})),
        ("bdev_malloc_create", json!({"num_blocks": 2048, "block_size": 4096})),
        ("bdev_null_create", json!({"name": "N", "num_blocks": 1 << 20, "block_size": 4096})),
        ("bdev_uring_create", json!({"name": "U", "filename": image(scratch, "u"), "block_size": 512})),
        ("bdev_aio_create", json!({"name": "A", "filename": image(scratch, "a"), "block_size": 4096})),
        ("bdev_passthru_create", json!({"name": "P", "base_bdev_name": "N"})),
        ("nvmf_create_transport", json!({"trtype": "TCP", "max_io_qpairs_per_ctrlr": 8, "in_capsule_data_size": 8192})),
        (
            "nvmf_create_subsystem",
            json!({"nqn": NQN, "serial_number": "S1", "model_number": "A model",
            "max_namespaces": 8, "ana_reporting": true, "min_cntlid": 5, "max_cntlid": 90}),
        ),
        ("nvmf_create_subsystem", json!({"nqn": OTHER, "allow_any_host": true})),
        (
            "nvmf_subsystem_add_ns",
            json!({"nqn": NQN, "namespace": {"nsid": 3, "bdev_name": "M",
            "nguid": "00112233445566778899AABBCCDDEEFF", "eui64": "0011223344556677",
            "uuid": "8d6e1e4c-5a0f-4b5c-9c39-2f1de3f4a002", "anagrpid": 2}}),
        ),
        ("nvmf_subsystem_add_ns", ns("U")),
        ("nvmf_subsystem_add_ns", ns("A")),
        ("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": "nqn.2026-11.io.example:host1"})),
        ("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": "nqn.2026-11.io.example:host2"})),
        ("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": address(port)})),
        ("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": address(second)})),
        ("nvmf_subsystem_add_listener", json!({"nqn": OTHER, "listen_address": address(port)})),
        (
            "nvmf_subsystem_listener_set_ana_state",
            json!({"nqn": NQN, "listen_address": address(second), "ana_state": "inaccessible", "anagrpid": 2}),
        ),
        (
            "nvmf_discovery_add_referral",
            json!({"address": address(8009), "subnqn": "nqn.2014-08.org.nvmexpress.discovery"}),
        ),
        ("nvmf_subsystem_remove_host", json!({"nqn": NQN, "host": "nqn.2026-11.io.example:host1"})),
        ("nvmf_subsystem_allow_any_host", json!({"nqn": OTHER, "allow_any_host": false})),
        ("bdev_null_resize", json!({"name": "N", "new_size": 8192})),
        ("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 1})),
        ("bdev_uring_delete", json!({"name": "U"})),
        ("nvmf_subsystem_remove_listener", json!({"nqn": OTHER, "listen_address": address(port)})),
        (
            "nvmf_discovery_remove_referral",
            json!({"address": address(8009), "subnqn": "nqn.2014-08.org.nvmexpress.discovery"}),
        ),
        ("nvmf_delete_subsystem", json!({"nqn": OTHER})),
        ("bdev_passthru_delete", json!({"name": "P"})),
    ]
}

#[test]
fn every_change_survives_a_kill() {
    let scratch = Scratch::new();
    let changes = changes(&scratch, free_port(), free_port());
    // Under the first configuration a fresh appliance would make its volume.
    let mut server = Server::start(&scratch, &["--empty"]);
    let methods = server.call("rpc_get_methods", json!({}));
    for (method, params) in changes {
        assert!(methods.as_array().unwrap().iter().any(|name| name == method), "{method} is not served");
        server.call(method, params.clone());
        let before = snapshot(&server);
        server.kill();
        server = Server::start(&scratch, &[]);
        let after = snapshot(&server);
        assert_eq!(after, before, "after {method} {params}\n{}", server.log());
        assert!(!server.log().contains("ERROR"), "{}", server.log());
    }
    assert!(!scratch.state().join("config.json.unrestored").exists());
    server.stop(Signal::TERM);
}

#[test]
fn a_change_that_cannot_be_saved_is_not_answered_as_done() {
    let scratch = Scratch::new();
    let server = Server::start(&scratch, &["--empty"]);
    server.call("bdev_malloc_create", json!({"name": "A", "num_blocks": 64, "block_size": 512}));
    // A folder in the place of the file: renaming over it fails, whoever runs this.
    fs::remove_file(scratch.config()).unwrap();
    fs::create_dir(scratch.config()).unwrap();
    fs::write(scratch.config().join("x"), "").unwrap();
    let (_, message, _) =
        server.call_fails("bdev_malloc_create", json!({"name": "B", "num_blocks": 64, "block_size": 512}));
    assert!(message.contains("config.json"), "{message}");
    fs::remove_dir_all(scratch.config()).unwrap();
    server.call("bdev_malloc_create", json!({"name": "C", "num_blocks": 64, "block_size": 512}));
    let before = snapshot(&server);
    server.kill();
    let server = Server::start(&scratch, &[]);
    assert_eq!(snapshot(&server), before);
}

#[test]
fn what_is_missing_is_said_and_the_rest_served_when_asked_for() {
    let scratch = Scratch::new();
    let port = free_port();
    let (good, gone) = (image(&scratch, "good"), image(&scratch, "gone"));
    let server = Server::start(&scratch, &["--empty"]);
    server.call("nvmf_create_transport", json!({"trtype": "TCP"}));
    for (nqn, bdev, file) in [(OTHER, "Gone", &gone), (NQN, "Good", &good)] {
        server.call("bdev_uring_create", json!({"name": bdev, "filename": file, "block_size": 512}));
        server.call("nvmf_create_subsystem", json!({"nqn": nqn, "allow_any_host": true}));
        server.call("nvmf_subsystem_add_ns", json!({"nqn": nqn, "namespace": {"bdev_name": bdev}}));
        server.call("nvmf_subsystem_add_listener", json!({"nqn": nqn, "listen_address": address(port)}));
    }
    let whole = snapshot(&server);
    server.kill();
    fs::rename(&gone, format!("{gone}.away")).unwrap();

    let saved = fs::read(scratch.config()).unwrap();
    let said = scratch.refused(&[]);
    assert!(said.contains(&gone) && said.contains("--partial"), "{said}");
    assert_eq!(fs::read(scratch.config()).unwrap(), saved, "a refused start changes nothing");
    assert!(!scratch.state().join("config.json.unrestored").exists());

    let server = Server::start(&scratch, &["--partial"]);
    let log = server.log();
    assert!(log.contains("not restored") && log.contains("bdev_uring_create") && log.contains(&gone), "{log}");
    assert!(log.contains("config.json.unrestored"), "{log}");
    let bdevs = server.call("bdev_get_bdevs", json!({}));
    assert_eq!(bdevs.as_array().unwrap().iter().map(|bdev| &bdev["name"]).collect::<Vec<_>>(), ["Good"]);
    let subsystems = server.call("nvmf_get_subsystems", json!({}));
    let served = subsystems.as_array().unwrap().iter().find(|subsystem| subsystem["nqn"] == NQN).unwrap();
    assert_eq!(served["namespaces"][0]["bdev_name"], "Good");
    let aside = fs::read_to_string(scratch.state().join("config.json.unrestored")).unwrap();
    assert!(aside.contains(&gone));
    server.kill();

    // Until something is changed, the saved configuration is what it was: with the file back, all is back.
    fs::rename(format!("{gone}.away"), &gone).unwrap();
    let server = Server::start(&scratch, &[]);
    assert_eq!(snapshot(&server), whole);
    server.stop(Signal::TERM);
}

#[test]
fn a_volume_that_somebody_else_holds() {
    let scratch = Scratch::new();
    let (held, free) = (image(&scratch, "held"), image(&scratch, "free"));
    let server = Server::start(&scratch, &["--empty"]);
    server.call("bdev_uring_create", json!({"name": "Held", "filename": held, "block_size": 512}));
    server.call("bdev_uring_create", json!({"name": "Free", "filename": free, "block_size": 512}));
    // Two servers on one file would destroy it.
    let other = Scratch::new();
    let second = Server::start(&other, &["--empty"]);
    let (_, message, _) =
        second.call_fails("bdev_uring_create", json!({"name": "X", "filename": held, "block_size": 512}));
    assert!(message.contains(&held), "{message}");
    drop(second);
    server.kill();

    let lock = fs::File::options().write(true).open(&held).unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert!(scratch.refused(&[]).contains(&held));
    let server = Server::start(&scratch, &["--partial"]);
    let bdevs = server.call("bdev_get_bdevs", json!({}));
    assert_eq!(bdevs.as_array().unwrap().iter().map(|bdev| &bdev["name"]).collect::<Vec<_>>(), ["Free"]);
    assert!(server.log().contains(&held), "{}", server.log());
    server.kill();
    drop(lock);
    let server = Server::start(&scratch, &[]);
    assert_eq!(server.call("bdev_get_bdevs", json!({})).as_array().unwrap().len(), 2);
}

#[test]
fn a_lost_port_does_not_lose_the_listener() {
    let scratch = Scratch::new();
    let port = free_port();
    let server = Server::start(&scratch, &["--listen", &format!("127.0.0.1:{port}")]);
    let whole = snapshot(&server);
    server.kill();
    let taken = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    assert!(scratch.refused(&[]).contains(&format!("127.0.0.1:{port}")));
    let server = Server::start(&scratch, &["--partial"]);
    assert!(server.log().contains(&format!("127.0.0.1:{port}")), "{}", server.log());
    assert_eq!(server.call("bdev_get_bdevs", json!({})).as_array().unwrap().len(), 1);
    server.kill();
    drop(taken);
    let server = Server::start(&scratch, &[]);
    assert_eq!(snapshot(&server), whole);
}

#[track_caller]
fn keeps(scratch: &Scratch, text: &[u8], words: &[&str]) {
    fs::write(scratch.config(), text).unwrap();
    let said = scratch.refused(&[]);
    for word in words {
        assert!(said.contains(word), "{word}: {said}");
    }
    assert_eq!(fs::read(scratch.config()).unwrap(), text, "nothing is overwritten");
}

#[test]
fn a_broken_state_file_stops_the_start_and_is_kept() {
    let scratch = Scratch::new();
    Server::start(&scratch, &["--empty"]).stop(Signal::TERM);
    let path = scratch.config();
    let path = path.to_str().unwrap();
    keeps(&scratch, b"", &[path, "not JSON", "move it away"]);
    keeps(&scratch, b"{\"subsystems\": [", &[path, "not JSON", "move it away"]);
    keeps(&scratch, &[0xff, 0xfe, 0], &[path, "not JSON"]);
    keeps(&scratch, br#"{"subsystems": []}"#, &[path, "version"]);
    keeps(&scratch, br#"{"subsystems": [], "ringstone": {"version": 2}}"#, &[path, "version"]);
    keeps(&scratch, br#"{"subsystems": {}, "ringstone": {"version": 1}}"#, &["saved configuration", "subsystems"]);
    // --empty starts all the same, and keeps what was there.
    let server = Server::start(&scratch, &["--empty"]);
    let aside = scratch.state().join("config.json.superseded");
    assert_eq!(fs::read(&aside).unwrap(), br#"{"subsystems": {}, "ringstone": {"version": 1}}"#);
    server.stop(Signal::TERM);
}

#[test]
fn what_it_writes_is_for_its_owner_only() {
    let scratch = Scratch::new();
    let server = Server::start(&scratch, &["--empty"]);
    server.call("bdev_malloc_create", json!({"name": "A", "num_blocks": 64, "block_size": 512}));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&scratch.config()), 0o600);
    server.stop(Signal::TERM);
}
