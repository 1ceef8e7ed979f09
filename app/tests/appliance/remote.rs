//! Namespaces of another server as bdevs: two of the real binary, one the host of the other.

use serde_json::{Value, json};

use crate::common::{Scratch, Server, address, free_port, ringstone, wait_for};

const NQN: &str = "nqn.2026-11.io.ringstone:far";
const FRONT: &str = "nqn.2026-11.io.ringstone:near";

/// A target with one namespace on two ports.
fn target(scratch: &Scratch, ports: [u16; 2]) -> Server {
    let server = Server::start(scratch, &["--empty"]);
    server.call("nvmf_create_transport", json!({"trtype": "TCP"}));
    server.call("bdev_malloc_create", json!({"name": "M", "num_blocks": 4096, "block_size": 4096}));
    server.call("nvmf_create_subsystem", json!({"nqn": NQN, "allow_any_host": true, "ana_reporting": true}));
    server.call("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": "M"}}));
    for port in ports {
        server.call("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": address(port)}));
    }
    server
}

fn path(port: u16) -> Value {
    json!({
        "name": "Nvme0", "trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string(),
        "subnqn": NQN, "multipath": "multipath", "ctrlr_loss_timeout_sec": -1, "reconnect_delay_sec": 1,
    })
}

fn states(host: &Server) -> Vec<String> {
    let shown = host.call("bdev_nvme_get_controllers", json!({"name": "Nvme0"}));
    let controllers = shown[0]["ctrlrs"].as_array().unwrap();
    controllers.iter().map(|controller| controller["state"].as_str().unwrap().to_string()).collect()
}

fn await_states(host: &Server, wanted: &[&str]) {
    wait_for(&format!("controllers that are {wanted:?}"), || (states(host) == wanted).then_some(()));
}

fn paths(host: &Server) -> Vec<Value> {
    let shown = host.call("bdev_nvme_get_io_paths", json!({"name": "Nvme0n1"}));
    shown["poll_groups"][0]["io_paths"].as_array().unwrap().clone()
}

/// Serves the remote namespace on to another host.
fn serve_on(host: &Server, port: u16) {
    host.call("nvmf_create_transport", json!({"trtype": "TCP"}));
    host.call("nvmf_create_subsystem", json!({"nqn": FRONT, "allow_any_host": true}));
    host.call("nvmf_subsystem_add_ns", json!({"nqn": FRONT, "namespace": {"bdev_name": "Nvme0n1"}}));
    host.call("nvmf_subsystem_add_listener", json!({"nqn": FRONT, "listen_address": address(port)}));
}

/// Writes, reads, and compares, while `meanwhile` happens.
fn verified_load(port: u16, meanwhile: impl FnOnce()) {
    let port = port.to_string();
    let load = ringstone()
        .args([
            "perf",
            "--traddr",
            "127.0.0.1",
            "--trsvcid",
            &port,
            "--subnqn",
            FRONT,
            "--rw",
            "randrw",
            "--bs",
            "4096",
        ])
        .args(["--qd", "16", "--time", "3", "--warmup", "0", "--verify", "--json"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    meanwhile();
    let done = load.wait_with_output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let found: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(found["errors"], 0, "{found}");
    assert!(found["iops"].as_f64().unwrap() > 0.0, "{found}");
}

#[test]
fn two_paths_one_of_which_goes_and_comes_back() {
    let (far, near) = (Scratch::new(), Scratch::new());
    let ports = [free_port(), free_port()];
    let target = target(&far, ports);
    let host = Server::start(&near, &["--empty"]);
    for port in ports {
        assert_eq!(host.call("bdev_nvme_attach_controller", path(port)), json!(["Nvme0n1"]));
    }
    await_states(&host, &["enabled", "enabled"]);
    let bdev = &host.call("bdev_get_bdevs", json!({"name": "Nvme0n1"}))[0];
    assert_eq!((&bdev["num_blocks"], &bdev["block_size"]), (&json!(4096), &json!(4096)));
    let there = &target.call("bdev_get_bdevs", json!({"name": "M"}))[0];
    assert_eq!(bdev["uuid"], there["uuid"], "the namespace's own identity");

    // Each path in its turn, then only the one that is preferred.
    host.call("bdev_nvme_set_multipath_policy", json!({"name": "Nvme0n1", "policy": "active_active"}));
    let front = free_port();
    serve_on(&host, front);
    verified_load(front, || {
        target.call("nvmf_subsystem_remove_listener", json!({"nqn": NQN, "listen_address": address(ports[0])}));
        wait_for("the path to be lost", || {
            let connected = paths(&host).iter().filter(|path| path["connected"] == true).count();
            (connected == 1).then_some(())
        });
        target.call("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": address(ports[0])}));
        await_states(&host, &["enabled", "enabled"]);
    });
    let all = paths(&host);
    assert_eq!(all.len(), 2, "{all:?}");
    host.call("bdev_nvme_set_multipath_policy", json!({"name": "Nvme0n1", "policy": "active_passive"}));
    host.call("bdev_nvme_set_preferred_path", json!({"name": "Nvme0n1", "cntlid": all[1]["cntlid"]}));

    // The target says which path is to be used.
    verified_load(front, || {
        for (port, state) in [(ports[1], "inaccessible"), (ports[1], "optimized"), (ports[0], "non_optimized")] {
            let params = json!({"nqn": NQN, "listen_address": address(port), "ana_state": state});
            target.call("nvmf_subsystem_listener_set_ana_state", params);
            let at = usize::from(port == ports[1]);
            wait_for(&format!("path {at} to be {state}"), || {
                let all = paths(&host);
                let (this, other) = (&all[at], &all[1 - at]);
                match state {
                    "inaccessible" => this["accessible"] == false && other["current"] == true,
                    "optimized" => this["accessible"] == true,
                    _ => this["current"] == false && other["current"] == true,
                }
                .then_some(())
            });
        }
    });
    target.stop(rustix::process::Signal::TERM);
    host.stop(rustix::process::Signal::TERM);
}

#[test]
fn what_is_attached_survives_a_kill_and_follows_its_target() {
    let (far, near) = (Scratch::new(), Scratch::new());
    let ports = [free_port(), free_port()];
    let target = target(&far, ports);
    let host = Server::start(&near, &["--empty"]);
    for port in ports {
        host.call("bdev_nvme_attach_controller", path(port));
    }
    let front = free_port();
    serve_on(&host, front);
    host.kill();
    let host = Server::start(&near, &[]);
    await_states(&host, &["enabled", "enabled"]);
    verified_load(front, || {
        assert_eq!(host.call("bdev_nvme_reset_controller", json!({"name": "Nvme0"})), json!(true));
        await_states(&host, &["enabled", "enabled"]);
    });

    // A controller that is switched off stays attached.
    host.call("bdev_nvme_disable_controller", json!({"name": "Nvme0"}));
    await_states(&host, &["disabled", "disabled"]);
    host.call("bdev_nvme_enable_controller", json!({"name": "Nvme0"}));
    await_states(&host, &["enabled", "enabled"]);

    // Namespaces grow and come and go there, and so do the bdevs here.
    target.call("bdev_malloc_create", json!({"name": "N", "num_blocks": 64, "block_size": 512}));
    target.call("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": "N", "nsid": 7}}));
    let has = |name: &str| host.client().call("bdev_get_bdevs", json!({"name": name})).is_ok();
    wait_for("the new namespace's bdev", || has("Nvme0n7").then_some(()));
    target.call("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 7}));
    wait_for("the end of that bdev", || (!has("Nvme0n7")).then_some(()));

    host.call("nvmf_delete_subsystem", json!({"nqn": FRONT}));
    let first = json!({"name": "Nvme0", "trtype": "TCP", "traddr": "127.0.0.1", "trsvcid": ports[0].to_string()});
    assert_eq!(host.call("bdev_nvme_detach_controller", first), json!(true));
    assert_eq!(states(&host).len(), 1);
    assert_eq!(host.call("bdev_nvme_detach_controller", json!({"name": "Nvme0"})), json!(true));
    assert!(!has("Nvme0n1"));
    assert_eq!(host.call("bdev_nvme_get_controllers", json!({})), json!([]));
    target.stop(rustix::process::Signal::TERM);
    host.stop(rustix::process::Signal::TERM);
}

#[test]
fn what_cannot_be_attached_says_why() {
    let (far, near) = (Scratch::new(), Scratch::new());
    let ports = [free_port(), free_port()];
    let target = target(&far, ports);
    let host = Server::start(&near, &["--empty"]);
    let with = |changes: Value| {
        let mut params = path(ports[0]);
        params.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        params
    };
    for (changes, word) in [
        (json!({"traddr": "localhost"}), "traddr"),
        (json!({"trsvcid": "0"}), "trsvcid"),
        (json!({"trsvcid": free_port().to_string()}), "127.0.0.1"),
        (json!({"subnqn": "nqn.2026-11.io.ringstone:none"}), "nqn.2026-11.io.ringstone:none"),
        // The device that is missing, or the package (librdmacm1).
        (json!({"trtype": "RDMA"}), "rdma"),
        (json!({"psk": "key"}), "psk"),
        (json!({"ctrlr_loss_timeout_sec": 5, "reconnect_delay_sec": 0}), "reconnect_delay_sec"),
    ] {
        let (_, message, _) = host.call_fails("bdev_nvme_attach_controller", with(changes.clone()));
        assert!(message.to_lowercase().contains(word), "{changes}: {message}");
    }
    assert_eq!(host.call("bdev_nvme_get_controllers", json!({})), json!([]));
    host.call("bdev_nvme_attach_controller", path(ports[0]));
    let again = host.call_fails("bdev_nvme_attach_controller", path(ports[0])).1;
    assert!(again.contains("Nvme0"), "{again}");
    let single = host.call_fails("bdev_nvme_attach_controller", {
        let mut params = path(ports[1]);
        params["multipath"] = json!("disable");
        params
    });
    assert!(single.1.contains("Nvme0"), "{}", single.1);
    for method in ["bdev_nvme_detach_controller", "bdev_nvme_reset_controller", "bdev_nvme_get_controllers"] {
        let (code, message, _) = host.call_fails(method, json!({"name": "Nvme9"}));
        assert!(code < 0 && message.contains("Nvme9"), "{method}: {code} {message}");
    }
    target.stop(rustix::process::Signal::TERM);
    host.stop(rustix::process::Signal::TERM);
}
