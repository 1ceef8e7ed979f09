//! Exports come, are saved, and go.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use rustix::process::Signal;
use serde_json::json;

use crate::client::{Client, Failure};
use crate::common::{Scratch, Server, wait_for};

/// A folder, and a server with an export of 1 MiB of memory at its path.
pub fn serving(args: &[&str]) -> (Scratch, Server, PathBuf) {
    let scratch = Scratch::new();
    let server = Server::start(&scratch, &[&["--empty"], args].concat());
    server.call("bdev_malloc_create", json!({"name": "M", "num_blocks": 2048, "block_size": 512}));
    let socket = scratch.path().join("m.sock");
    server.call("nbd_export_add", json!({"bdev_name": "M", "socket": socket}));
    (scratch, server, socket)
}

#[test]
fn an_export_is_served_listed_and_removed() {
    let (_scratch, server, socket) = serving(&[]);
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let mut client = Client::connect(&socket).unwrap();
    assert_eq!((client.size, client.flags & 1), (1 << 20, 1));
    client.write(512, &[7; 1024]).unwrap();
    client.flush().unwrap();
    assert_eq!(client.read(0, 2048).unwrap(), [vec![0; 512], vec![7; 1024], vec![0; 512]].concat());
    let listed = json!([{"bdev_name": "M", "socket": socket, "readonly": false, "connections": 1}]);
    assert_eq!(server.call("nbd_get_exports", json!({})), listed);
    assert_eq!(server.call("nbd_export_remove", json!({"socket": socket})), true);
    assert!(client.is_closed());
    assert!(!socket.exists());
    assert_eq!(server.call("nbd_get_exports", json!({})), json!([]));
    // The bdev is free again.
    server.call("bdev_malloc_delete", json!({"name": "M"}));
    server.stop(Signal::TERM);
}

#[test]
fn wrong_arguments_are_told_what_to_do() {
    let (scratch, server, socket) = serving(&[]);
    let path = |name: &str| scratch.path().join(name);
    let says = |params, code: i64, text: &str| {
        let (is, message, _) = server.call_fails("nbd_export_add", params);
        assert!(is == code && message.contains(text), "{is}: {message}");
    };
    says(json!({"bdev_name": "M", "socket": socket}), -17, "exports 'M' already");
    says(json!({"bdev_name": "no", "socket": path("n")}), -19, "there is no bdev 'no'");
    says(json!({"bdev_name": "M", "socket": "relative"}), -22, "is not an absolute path");
    says(json!({"bdev_name": "M", "socket": path("no/folder")}), -2, "make the folder first");
    says(json!({"bdev_name": "M", "socket": format!("/{}", "x".repeat(200))}), -22, "107 bytes");
    says(json!({"bdev_name": "M"}), -32602, "socket");
    let file = scratch.write("file", "precious");
    says(json!({"bdev_name": "M", "socket": file}), -17, "not a socket");
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let alive = UnixListener::bind(path("alive")).unwrap();
    says(json!({"bdev_name": "M", "socket": path("alive")}), -17, "another process listens there");
    drop(alive);
    // What a process that is gone left behind is replaced.
    server.call("nbd_export_add", json!({"bdev_name": "M", "socket": path("alive")}));
    Client::connect(&path("alive")).unwrap();
    let (code, message, _) = server.call_fails("nbd_export_remove", json!({"socket": path("n")}));
    assert!(code == -2 && message.contains("nbd_get_exports"), "{code} {message}");
    assert!(!path("n").exists(), "a refused export leaves no socket");
    server.stop(Signal::TERM);
}

#[test]
fn exports_come_back_with_the_server_even_when_it_was_killed() {
    let scratch = Scratch::new();
    let image = scratch.write("image", vec![0; 1 << 20]);
    let (all, only) = (scratch.path().join("all.sock"), scratch.path().join("only.sock"));
    let server = Server::start(&scratch, &["--empty"]);
    server.call("bdev_uring_create", json!({"name": "U", "filename": image, "block_size": 512}));
    server.call("nbd_export_add", json!({"bdev_name": "U", "socket": all}));
    server.call("nbd_export_add", json!({"bdev_name": "U", "socket": only, "readonly": true}));
    let before = server.call("nbd_get_exports", json!({}));
    let mut client = Client::connect(&all).unwrap();
    client.write(0, &[1; 4096]).unwrap();
    server.kill();
    assert!(all.exists(), "nobody was there to remove it");
    for _ in 0..2 {
        let server = Server::start(&scratch, &[]);
        assert_eq!(server.call("nbd_get_exports", json!({})), before);
        let mut client = Client::connect(&only).unwrap();
        assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
        assert_eq!(client.write(0, &[2; 512]), Err(Failure::Refused(1)));
        server.stop(Signal::TERM);
        assert!(!all.exists() && !only.exists(), "the sockets go with the server");
        assert!(client.is_closed());
    }
    let server = Server::start(&scratch, &[]);
    server.call("nbd_export_remove", json!({"socket": only}));
    server.stop(Signal::TERM);
    let server = Server::start(&scratch, &[]);
    assert_eq!(server.call("nbd_get_exports", json!({})).as_array().unwrap().len(), 1);
    server.stop(Signal::TERM);
}

#[test]
fn a_bdev_that_somebody_has_to_himself_is_exported_for_reading_only() {
    let (scratch, server, socket) = serving(&[]);
    let passthru = json!({"name": "P", "base_bdev_name": "M"});
    let (_, message, _) = server.call_fails("bdev_passthru_create", passthru.clone());
    assert!(message.contains(&format!("NBD export {}", socket.display())), "{message}");
    server.call("nbd_export_remove", json!({"socket": socket}));
    server.call("bdev_passthru_create", passthru);
    let (code, message, _) = server.call_fails("nbd_export_add", json!({"bdev_name": "M", "socket": socket}));
    assert!(code == -1 && message.contains("in use by"), "{code} {message}");
    server.call("nbd_export_add", json!({"bdev_name": "M", "socket": socket, "readonly": true}));
    let top = scratch.path().join("top.sock");
    server.call("nbd_export_add", json!({"bdev_name": "P", "socket": top}));
    Client::connect(&top).unwrap().write(0, &[8; 512]).unwrap();
    assert_eq!(Client::connect(&socket).unwrap().read(0, 512).unwrap(), [8; 512]);
    server.stop(Signal::TERM);
}

#[test]
fn connections_are_spread_over_reactors() {
    let cores = fs::read_to_string("/proc/self/status").unwrap();
    let allowed = cores.lines().find(|line| line.starts_with("Cpus_allowed_list:")).unwrap().to_string();
    let (_scratch, server, socket) = serving(&["--poll", "sleep"]);
    let reactors = server.call("framework_get_reactors", json!({}))["reactors"].as_array().unwrap().len();
    let mut clients: Vec<_> = (0..2 * reactors).map(|_| Client::connect(&socket).unwrap()).collect();
    let threads = server.call("thread_get_io_channels", json!({}));
    let with_channel = threads["threads"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|thread| thread["io_channels"].as_array().unwrap().iter().any(|channel| channel["name"] == "M"))
        .count();
    assert_eq!(with_channel, reactors, "{allowed}: {threads}");
    for (n, client) in clients.iter_mut().enumerate() {
        client.write(n as u64 * 512, &[n as u8 + 1; 512]).unwrap();
    }
    // All see what each wrote.
    for client in &mut clients {
        for n in 0..2 * reactors {
            assert_eq!(client.read(n as u64 * 512, 512).unwrap(), [n as u8 + 1; 512]);
        }
    }
    drop(clients);
    wait_for("the connections to go", || {
        let exports = server.call("nbd_get_exports", json!({}));
        (exports[0]["connections"] == 0).then_some(())
    });
    server.stop(Signal::TERM);
}

#[test]
fn requests_follow_the_size_of_the_bdev() {
    let scratch = Scratch::new();
    let image = scratch.write("image", vec![0; 1 << 20]);
    let socket = scratch.path().join("u.sock");
    let server = Server::start(&scratch, &["--empty"]);
    server.call("bdev_uring_create", json!({"name": "U", "filename": image, "block_size": 512}));
    server.call("nbd_export_add", json!({"bdev_name": "U", "socket": socket}));
    let mut old = Client::connect(&socket).unwrap();
    assert_eq!(old.write(1 << 20, &[1; 512]), Err(Failure::Refused(28)));
    fs::File::options().write(true).open(&image).unwrap().set_len(2 << 20).unwrap();
    server.call("bdev_uring_rescan", json!({"name": "U"}));
    old.write(1 << 20, &[1; 512]).unwrap();
    let mut new = Client::connect(&socket).unwrap();
    assert_eq!((old.size, new.size), (1 << 20, 2 << 20));
    assert_eq!(new.read(1 << 20, 512).unwrap(), [1; 512]);
    server.stop(Signal::TERM);
}
