//! Starting and stopping.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;

use rustix::process::Signal;
use serde_json::json;

use crate::common::{Scratch, Server, free_port, ringstone, wait_for};

const VOLUME: &str = "nqn.2026-11.io.ringstone:vol0";

#[test]
fn a_first_start_serves_a_volume() {
    let scratch = Scratch::new();
    let port = free_port();
    let server = Server::start(&scratch, &["--listen", &format!("127.0.0.1:{port}")]);
    let said = server.said.join("\n");
    assert!(said.contains(&format!("nvme connect -t tcp -a 127.0.0.1 -s {port} -n {VOLUME}")), "{said}");
    assert!(said.contains(&format!("JSON-RPC    {}", scratch.socket().display())), "{said}");
    assert!(said.contains(&format!("state       {}", scratch.state().display())), "{said}");
    assert!(said.contains("cores       "), "{said}");

    let file = fs::metadata(scratch.state().join("vol0.img")).unwrap();
    assert_eq!(file.len(), 1 << 30);
    let socket = fs::metadata(scratch.socket()).unwrap();
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(scratch.state()).unwrap().permissions().mode() & 0o777, 0o700);

    let subsystems = server.call("nvmf_get_subsystems", json!({}));
    let volume = subsystems.as_array().unwrap().iter().find(|s| s["nqn"] == VOLUME).unwrap();
    assert_eq!(volume["namespaces"][0]["nsid"], 1);
    assert_eq!(volume["namespaces"][0]["bdev_name"], "vol0");
    assert_eq!(volume["listen_addresses"][0]["trsvcid"], port.to_string());
    TcpStream::connect(("127.0.0.1", port)).unwrap();
    let log = server.stop(Signal::TERM);
    assert!(!log.contains("ERROR"), "{log}");
    assert!(!scratch.socket().exists(), "the socket goes with the server");
}

#[test]
fn both_signals_and_the_rpc_stop_it_and_the_volume_stays() {
    let scratch = Scratch::new();
    let listen = format!("127.0.0.1:{}", free_port());
    let args = ["--listen", listen.as_str()];
    let first = Server::start(&scratch, &args);
    let before = first.call("bdev_get_bdevs", json!({}));
    first.stop(Signal::INT);
    let second = Server::start(&scratch, &args);
    assert_eq!(second.call("bdev_get_bdevs", json!({})), before);
    second.stop(Signal::TERM);
    let mut third = Server::start(&scratch, &args);
    assert_eq!(third.call("spdk_kill_instance", json!({"sig_name": "SIGTERM"})), true);
    assert_eq!(third.wait().code(), Some(0));
}

#[test]
fn a_stop_while_it_waits_for_rpc() {
    let scratch = Scratch::new();
    let server =
        Server::start_until(&scratch, &["--wait-for-rpc"], |line| line.starts_with("waiting for framework_start_init"));
    server.stop(Signal::TERM);
}

#[test]
fn a_state_directory_has_one_server() {
    let scratch = Scratch::new();
    let server = Server::start(&scratch, &["--empty"]);
    let said = scratch.refused(&["--empty"]);
    assert!(said.contains("another ringstone uses the state directory"), "{said}");
    assert!(said.contains("--state-dir"), "{said}");
    // Nor does the second take anything from the first.
    server.call("bdev_get_bdevs", json!({}));
    // A socket that is in use is not taken over either.
    let other = Scratch::new();
    let said = other.refused(&["--empty", "--rpc-socket", scratch.socket().to_str().unwrap()]);
    assert!(said.contains(scratch.socket().to_str().unwrap()), "{said}");
    server.call("bdev_get_bdevs", json!({}));
    server.stop(Signal::TERM);
}

#[test]
fn a_port_in_use_is_said() {
    let scratch = Scratch::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = taken.local_addr().unwrap().to_string();
    let said = scratch.refused(&["--listen", &listen]);
    assert!(said.contains(&listen) && said.contains("another program"), "{said}");
    assert!(said.contains("--listen"), "{said}");
    assert!(!scratch.config().exists(), "a start that failed leaves no configuration: {said}");
    // The next start is as the first would have been.
    drop(taken);
    let server = Server::start(&scratch, &["--listen", &listen]);
    assert!(server.said.iter().any(|line| line.contains("nvme connect")), "{:?}", server.said);
    server.stop(Signal::TERM);
}

#[test]
fn a_state_directory_that_cannot_be_made() {
    let scratch = Scratch::new();
    let file = scratch.write("file", "");
    let output = ringstone().args(["serve", "--state-dir"]).arg(file.join("state")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot make the state directory") && said.contains("--state-dir"), "{said}");
}

#[test]
fn no_home_no_state_directory() {
    let output = ringstone().arg("serve").env_remove("HOME").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("--state-dir"), "{said}");
}

#[test]
fn cores_that_are_not_there() {
    let scratch = Scratch::new();
    let said = scratch.refused(&["--empty", "--cores", "1023"]);
    assert!(said.contains("core 1023") && said.contains("[0"), "{said}");
    for bad in ["x", "3-1", "1,,2"] {
        let output = scratch.serve(&["--cores", bad]).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("0,2-3"), "{said}");
    }
    assert!(!scratch.state().exists(), "nothing is made before the options are right");
}

#[test]
fn every_way_to_poll_serves() {
    for poll in ["adaptive", "busy", "sleep"] {
        let scratch = Scratch::new();
        let server = Server::start(&scratch, &["--empty", "--poll", poll, "--cores", "0"]);
        server.call("bdev_malloc_create", json!({"name": "M", "num_blocks": 64, "block_size": 512}));
        let reactors = server.call("framework_get_reactors", json!({}));
        assert_eq!(reactors["reactors"].as_array().unwrap().len(), 1);
        server.stop(Signal::TERM);
    }
}

#[test]
fn without_io_uring_it_serves_too() {
    let scratch = Scratch::new();
    let server = Server::start(&scratch, &["--empty", "--file-engine", "threads"]);
    for (name, method) in [("U", "bdev_uring_create"), ("A", "bdev_aio_create")] {
        let file = scratch.write(name, vec![0; 1 << 20]);
        server.call(method, json!({"name": name, "filename": file, "block_size": 512}));
    }
    server.stop(Signal::TERM);
}

#[test]
fn a_second_signal_is_not_needed() {
    // Connections that never say anything do not hold up the end.
    let scratch = Scratch::new();
    let port = free_port();
    let server = Server::start(&scratch, &["--listen", &format!("127.0.0.1:{port}")]);
    let silent: Vec<_> = (0..20).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    wait_for("the connections are taken", || {
        let stats = server.call("nvmf_get_stats", json!({}));
        let groups = stats["poll_groups"].as_array().unwrap().clone();
        let open: u64 = groups.iter().map(|group| group["current_unassociated_qpairs"].as_u64().unwrap()).sum();
        (open == 20).then_some(())
    });
    server.stop(Signal::TERM);
    drop(silent);
}
