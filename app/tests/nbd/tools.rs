//! Programs that others wrote, as they are installed: qemu-img, qemu-io, nbdinfo, nbdcopy, fio.
//!
//! A test whose program is not installed says so and is skipped; `scripts/test` installs them all.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::client::Client;
use crate::common::{Scratch, Server, wait_for};

/// Whether a program is there; says so if not.
fn installed(program: &str, package: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        eprintln!("skipped: {program} is not installed (package {package})");
    }
    found
}

/// Whether fio has its nbd engine.
fn fio_has_nbd() -> bool {
    if !installed("fio", "fio") {
        return false;
    }
    let engines = Command::new("fio").arg("--enghelp").output().unwrap();
    let found = String::from_utf8_lossy(&engines.stdout).lines().any(|line| line.trim() == "nbd");
    if !found {
        eprintln!("skipped: this fio was built without its nbd engine");
    }
    found
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

#[track_caller]
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().unwrap();
    let said = said(&output);
    assert!(output.status.success(), "{program} {args:?}: {}\n{said}", output.status);
    said
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat()
}

/// Bytes that are not all alike, with holes.
fn image(scratch: &Scratch, name: &str, len: usize) -> PathBuf {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let block = if state >> 62 == 0 { vec![0; 4096] } else { state.to_le_bytes().repeat(512) };
        bytes.extend(block);
    }
    scratch.write(name, bytes)
}

const LEN: usize = 24 << 20;

/// A server with three exports of [`LEN`] bytes: memory with blocks of 512 and of 4096 bytes, and a file.
fn three_exports(scratch: &Scratch) -> (Server, [PathBuf; 3]) {
    let server = Server::start(scratch, &["--empty"]);
    server.call("bdev_malloc_create", json!({"name": "small", "num_blocks": LEN / 512, "block_size": 512}));
    server.call("bdev_malloc_create", json!({"name": "large", "num_blocks": LEN / 4096, "block_size": 4096}));
    let file = scratch.write("backing", vec![0; LEN]);
    server.call("bdev_uring_create", json!({"name": "file", "filename": file, "block_size": 512}));
    let sockets = ["small", "large", "file"].map(|name| {
        let socket = scratch.path().join(format!("{name}.sock"));
        server.call("nbd_export_add", json!({"bdev_name": name, "socket": socket}));
        socket
    });
    (server, sockets)
}

#[test]
fn qemu_img_copies_and_compares() {
    if !installed("qemu-img", "qemu-utils") {
        return;
    }
    let scratch = Scratch::new();
    let source = image(&scratch, "source", LEN);
    let (server, sockets) = three_exports(&scratch);
    for socket in &sockets {
        let source = source.to_str().unwrap();
        run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", source, &uri(socket)]);
        let said = run("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &uri(socket)]);
        assert!(said.contains("Images are identical"), "{said}");
        let said = run("qemu-img", &["info", "--output=json", "-f", "raw", &uri(socket)]);
        let info: Value = serde_json::from_str(&said).unwrap();
        assert_eq!(info["virtual-size"], LEN);
    }
    // From one export to another, eight requests at a time and out of order.
    let [small, _, file] = &sockets;
    Client::connect(file).unwrap().write(4096, &[0xee; 4096]).unwrap();
    let said = Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw", &uri(small), &uri(file)]).output();
    assert_eq!(said.unwrap().status.code(), Some(1), "a difference is seen");
    run("qemu-img", &["convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", &uri(small), &uri(file)]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri(small), &uri(file)]);
    server.stop(Signal::TERM);
}

#[test]
fn qemu_io_finds_its_patterns() {
    if !installed("qemu-io", "qemu-utils") {
        return;
    }
    let scratch = Scratch::new();
    let (server, sockets) = three_exports(&scratch);
    for socket in &sockets {
        let commands = [
            "write -P 0x5a 0 2M",
            "read -P 0x5a 0 2M",
            "write -z 64k 64k",
            "read -P 0 64k 64k",
            "read -P 0x5a 128k 64k",
            "write -f -P 7 4k 4k",
            "read -P 7 4k 4k",
            "read -P 0x5a 0 4k",
            "write -z -u 1M 1M",
            "read -P 0 1M 1M",
            // Less than a block: qemu reads, changes and writes.
            "write -P 9 513 700",
            "read -P 9 513 700",
            "read -P 0x5a 0 513",
            "discard 0 1M",
            "aio_write -P 3 4M 8M",
            "aio_write -P 4 12M 8M",
            "aio_flush",
            "read -P 3 4M 8M",
            "read -P 4 12M 8M",
            "flush",
        ];
        let mut args = vec!["-f", "raw"];
        commands.iter().for_each(|command| args.extend(["-c", command]));
        let target = uri(socket);
        args.push(&target);
        let said = run("qemu-io", &args);
        assert!(!said.contains("failed") && !said.contains("error"), "{said}");
    }
    server.stop(Signal::TERM);
}

#[test]
fn nbdinfo_is_told_the_truth() {
    if !installed("nbdinfo", "libnbd-bin") {
        return;
    }
    let scratch = Scratch::new();
    let (server, [_, large, file]) = three_exports(&scratch);
    let info = |args: &[&str]| -> Value { serde_json::from_str(&run("nbdinfo", args)).unwrap() };
    let told = info(&["--json", &uri(&large)]);
    assert_eq!(told["structured"], true);
    let export = &told["exports"][0];
    for (key, value) in [
        ("export-name", json!("large")),
        ("export-size", json!(LEN)),
        ("is_read_only", json!(false)),
        ("can_df", json!(true)),
        ("can_fast_zero", json!(false)),
        ("can_flush", json!(true)),
        ("can_fua", json!(true)),
        ("can_multi_conn", json!(true)),
        ("can_trim", json!(true)),
        ("can_zero", json!(true)),
        ("block_size_minimum", json!(4096)),
        ("block_size_maximum", json!(32 << 20)),
        ("contexts", json!(["base:allocation"])),
    ] {
        assert_eq!(export[key], value, "{key} of {told}");
    }
    assert_eq!(info(&["--json", "--list", &uri(&file)])["exports"].as_array().unwrap().len(), 1);
    let map = info(&["--json", "--map", &uri(&file)]);
    assert_eq!(map, json!([{"offset": 0, "length": LEN, "type": 0, "description": "data"}]));
    let only = scratch.path().join("only.sock");
    server.call("nbd_export_add", json!({"bdev_name": "file", "socket": only, "readonly": true}));
    let export = info(&["--json", &uri(&only)])["exports"][0].clone();
    assert_eq!(
        (&export["is_read_only"], &export["can_trim"], &export["can_fua"]),
        (&json!(true), &json!(false), &json!(false))
    );
    // Another name is refused.
    let other = format!("nbd+unix:///other?socket={}", file.display());
    let output = Command::new("nbdinfo").arg(other).output().unwrap();
    assert!(!output.status.success());
    assert!(said(&output).contains("for export: other"), "{}", said(&output));
    server.stop(Signal::TERM);
}

#[test]
fn nbdcopy_copies_over_several_connections() {
    if !installed("nbdcopy", "libnbd-bin") {
        return;
    }
    let scratch = Scratch::new();
    let source = image(&scratch, "source", LEN);
    let (server, [small, large, file]) = three_exports(&scratch);
    run("nbdcopy", &[source.to_str().unwrap(), &uri(&large)]);
    run("nbdcopy", &["--connections=4", "--requests=64", &uri(&large), &uri(&file)]);
    run("nbdcopy", &["--synchronous", "--flush", &uri(&file), &uri(&small)]);
    let back = scratch.path().join("back");
    run("nbdcopy", &["--request-size=2097152", &uri(&small), back.to_str().unwrap()]);
    assert!(fs::read(&back).unwrap() == fs::read(&source).unwrap(), "what comes back is what went out");
    server.stop(Signal::TERM);
}

/// In threads, so that its end is the end of all of it.
fn fio(socket: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("fio");
    command
        .args(["--name=job", "--thread", "--ioengine=nbd", "--output-format=json", &format!("--uri={}", uri(socket))])
        .args(args)
        .stdin(Stdio::null());
    command
}

#[test]
fn fio_verifies() {
    if !fio_has_nbd() {
        return;
    }
    let scratch = Scratch::new();
    let (server, sockets) = three_exports(&scratch);
    for (socket, bs) in sockets.iter().zip(["--bsrange=512-256k", "--bsrange=4k-1m", "--bsrange=512-64k"]) {
        let size = format!("--size={LEN}");
        let args =
            ["--rw=randwrite", bs, "--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", &size];
        let output = fio(socket, &args).current_dir(scratch.path()).output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        // It may say something before.
        let told = String::from_utf8(output.stdout).unwrap();
        let told: Value = serde_json::from_str(&told[told.find('{').unwrap()..]).unwrap();
        assert_eq!(told["jobs"][0]["error"], 0);
        assert!(told["jobs"][0]["read"]["total_ios"].as_u64().unwrap() > 0, "it has read what it wrote");
    }
    server.stop(Signal::TERM);
}

fn start_fio(socket: &Path, scratch: &Scratch) -> Child {
    let args = ["--rw=randrw", "--bs=64k", "--iodepth=32", "--time_based", "--runtime=600", "--size=16m"];
    fio(socket, &args).current_dir(scratch.path()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn fio_is_killed_and_the_export_stays() {
    if !fio_has_nbd() {
        return;
    }
    let scratch = Scratch::new();
    let (server, [_, large, _]) = three_exports(&scratch);
    let connections = || {
        let exports = server.call("nbd_get_exports", json!({}));
        exports[1]["connections"].as_u64().unwrap()
    };
    let reads = || {
        let stats = server.call("bdev_get_iostat", json!({"names": ["large"]}));
        stats["bdevs"][0]["num_read_ops"].as_u64().unwrap()
    };
    for _ in 0..3 {
        let before = reads();
        let mut child = start_fio(&large, &scratch);
        wait_for("fio to be at work", || (reads() > before + 500).then_some(()));
        child.kill().unwrap();
        child.wait().unwrap();
        wait_for("its connection to go", || (connections() == 0).then_some(()));
    }
    // The other way round: the export goes, and fio ends with an error.
    let before = reads();
    let mut child = start_fio(&large, &scratch);
    wait_for("fio to be at work", || (reads() > before + 500).then_some(()));
    server.call("bdev_malloc_delete", json!({"name": "large"}));
    let status = wait_for("fio to end", || child.try_wait().unwrap());
    assert!(!status.success());
    assert!(!large.exists());
    let log = server.stop(Signal::TERM);
    assert!(!log.contains("ERROR"), "{log}");
}
