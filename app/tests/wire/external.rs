//! Handlers in processes of their own, and in C: killed, restarted, resized, deleted, while a host writes.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nvmf::spec::{Sqe, Status};
use nvmf::tcp::wire_client::{read, write_in_capsule};
use serde_json::{Value, json};

use crate::common::{Scratch, ringstone, wait_for};
use crate::host::{BLOCK, Host, NQN, Target};

const NSID: u32 = 3;
const NUM_BLOCKS: u64 = 4096;

/// Builds `examples/file.c` with the system's compiler.
fn file_so(scratch: &Scratch) -> PathBuf {
    let crate_root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bdev/appliance");
    let out = scratch.path().join("file.so");
    let built = Command::new("cc")
        .args(["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-I"])
        .arg(crate_root.join("include"))
        .arg("-o")
        .arg(&out)
        .arg(crate_root.join("examples/file.c"))
        .output()
        .expect("the system has a C compiler");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    out
}

/// A running `ringstone appliance`.
struct Process(Child);

impl Process {
    fn kill(mut self) {
        self.0.kill().expect("it is a child of this process");
        self.0.wait().expect("it is a child of this process");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A target whose namespace 3 is an appliance bdev.
struct World {
    target: Target,
    scratch: Scratch,
    so: PathBuf,
}

impl World {
    #[track_caller]
    fn new(handler: impl Fn(&World) -> String, extra: Value) -> World {
        let scratch = Scratch::new();
        let so = file_so(&scratch);
        let world = World { target: Target::start(), scratch, so };
        let mut params = json!({
            "name": "E", "handler": handler(&world), "num_blocks": NUM_BLOCKS, "block_size": BLOCK, "timeout_ms": 60_000,
        });
        params.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        world.target.server.call("bdev_appliance_create", params);
        let namespace = json!({"bdev_name": "E", "nsid": NSID});
        world.target.server.call("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": namespace}));
        world
    }

    fn external(policy: &str) -> World {
        World::new(|world| format!("unix:{}", world.socket().display()), json!({ "on_disconnect": policy }))
    }

    fn socket(&self) -> PathBuf {
        self.scratch.path().join("e.sock")
    }

    fn options(&self) -> Value {
        json!({ "path": self.scratch.path().join("data") })
    }

    #[track_caller]
    fn start(&self) -> Process {
        let log = std::fs::File::create(self.scratch.path().join("process.log")).unwrap();
        let child = ringstone()
            .arg("appliance")
            .arg("--socket")
            .arg(self.socket())
            .arg("--handler")
            .arg(&self.so)
            .args(["--options", &self.options().to_string()])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the binary can be started");
        let process = Process(child);
        self.await_connected(true);
        process
    }

    #[track_caller]
    fn await_connected(&self, connected: bool) {
        wait_for("the target notices the process", || {
            (self.stats()["backend"]["connected"] == connected).then_some(())
        });
    }

    fn stats(&self) -> Value {
        self.target.server.call("bdev_appliance_get_stats", json!({"name": "E"}))[0].clone()
    }

    fn io(&self) -> (Host, Host) {
        let (admin, cntlid) = self.target.admin();
        (admin, self.target.io(cntlid, 1))
    }
}

fn content(lba: u64, version: u64) -> Vec<u8> {
    let mut block = vec![version as u8; BLOCK as usize];
    block[..8].copy_from_slice(&lba.to_le_bytes());
    block[8..16].copy_from_slice(&version.to_le_bytes());
    block
}

/// Keeps writes going, each block with a newer version each time, and knows what was acknowledged.
struct Writer {
    next: u64,
    outstanding: VecDeque<(u16, u64)>,
    acknowledged: u64,
}

const SPAN: u64 = 100;
const DEPTH: usize = 16;

impl Writer {
    fn new() -> Writer {
        Writer { next: 0, outstanding: VecDeque::new(), acknowledged: 0 }
    }

    /// Fills the queue. Blocks that are outstanding are not written again: their order would be nobody's.
    fn submit(&mut self, io: &mut Host) {
        let oldest = self.outstanding.front().map_or(self.next, |(_, n)| *n);
        while self.outstanding.len() < DEPTH && self.next < oldest + SPAN {
            let (lba, version) = (self.next % SPAN, self.next / SPAN);
            let cid = (self.next % 60_000) as u16;
            io.send_command(&write_in_capsule(cid, NSID, lba, 1, BLOCK), &content(lba, version));
            self.outstanding.push_back((cid, self.next));
            self.next += 1;
        }
    }

    #[track_caller]
    fn reap(&mut self, io: &mut Host) {
        let cqe = io.response();
        assert_eq!(cqe.status(), Status::SUCCESS);
        let index = self.outstanding.iter().position(|(cid, _)| *cid == cqe.cid.get()).expect("it was sent");
        self.outstanding.remove(index);
        self.acknowledged += 1;
    }

    #[track_caller]
    fn go_on(&mut self, io: &mut Host, count: u64) {
        let aim = self.acknowledged + count;
        while self.acknowledged < aim {
            self.submit(io);
            self.reap(io);
        }
    }

    #[track_caller]
    fn finish(&mut self, io: &mut Host) {
        while !self.outstanding.is_empty() {
            self.reap(io);
        }
        for lba in 0..SPAN.min(self.next) {
            let version = (self.next - 1 - lba) / SPAN;
            let (status, data) = io.read(read(61_000, NSID, lba, 1, BLOCK));
            assert_eq!(status, Status::SUCCESS);
            assert!(data == content(lba, version), "block {lba}: {:?} instead of version {version}", &data[..16]);
        }
    }
}

#[test]
fn parked_writes_survive_killed_processes() {
    let world = World::external("park");
    let (_admin, mut io) = world.io();
    let mut writer = Writer::new();
    // Before there is any process.
    writer.submit(&mut io);
    let mut process = world.start();
    for round in 0..4 {
        writer.go_on(&mut io, 300);
        writer.submit(&mut io);
        process.kill();
        // More comes while nobody is there.
        writer.submit(&mut io);
        if round % 2 == 0 {
            world.await_connected(false);
        }
        process = world.start();
    }
    writer.go_on(&mut io, 300);
    writer.finish(&mut io);
    let stats = world.stats();
    assert_eq!(stats["backend"]["sessions"], 5, "{stats}");
    assert_eq!((&stats["backend"]["faults"], &stats["timed_out"]), (&json!(0), &json!(0)), "{stats}");
    process.kill();
    world.target.server.call("bdev_appliance_delete", json!({"name": "E"}));
    world.target.still_serves();
}

#[test]
fn with_fail_the_host_is_told_and_nothing_acknowledged_is_lost() {
    let world = World::external("fail");
    let (_admin, mut io) = world.io();
    let refused = |io: &mut Host| {
        let cid = 62_000;
        assert_eq!(io.write(write_in_capsule(cid, NSID, 0, 1, BLOCK), &content(0, 0)).status(), Status::INTERNAL_ERROR);
        assert_eq!(io.read(read(cid, NSID, 0, 1, BLOCK)).0, Status::INTERNAL_ERROR);
    };
    refused(&mut io);
    let mut writer = Writer::new();
    for _ in 0..3 {
        let process = world.start();
        writer.go_on(&mut io, 200);
        writer.finish(&mut io);
        process.kill();
        world.await_connected(false);
        refused(&mut io);
    }
    let _process = world.start();
    writer.finish(&mut io);
    // The other namespaces never noticed.
    world.target.still_serves();
}

#[test]
fn the_size_changes_and_the_device_goes_under_its_process() {
    let world = World::external("park");
    let process = world.start();
    let (_admin, mut io) = world.io();
    let beyond = write_in_capsule(1, NSID, NUM_BLOCKS, 1, BLOCK);
    assert_eq!(io.write(beyond, &content(1, 1)).status(), Status::LBA_OUT_OF_RANGE.dnr());
    let resize = |num_blocks: u64| {
        world.target.server.call("bdev_appliance_resize", json!({"name": "E", "num_blocks": num_blocks}));
    };
    // The namespace follows its device, a moment later.
    let grown = |io: &mut Host, command: Sqe, data: &[u8]| {
        wait_for("the namespace to grow", || match io.write(command, data).status() {
            status if status == Status::LBA_OUT_OF_RANGE.dnr() => None,
            status => {
                assert_eq!(status, Status::SUCCESS);
                Some(())
            }
        });
    };
    resize(2 * NUM_BLOCKS);
    grown(&mut io, beyond, &content(1, 1));
    // Without a process too: the next one is told.
    process.kill();
    world.await_connected(false);
    resize(3 * NUM_BLOCKS);
    let mut process = world.start();
    let last = 3 * NUM_BLOCKS - 1;
    grown(&mut io, write_in_capsule(2, NSID, last, 1, BLOCK), &content(2, 2));
    assert_eq!(io.read(read(3, NSID, NUM_BLOCKS, 1, BLOCK)), (Status::SUCCESS, content(1, 1)));
    let mut writer = Writer::new();
    writer.submit(&mut io);
    world.target.server.call("bdev_appliance_delete", json!({"name": "E"}));
    // Each of them ends, one way or another; the process waits for the next device.
    for _ in 0..DEPTH {
        io.response();
    }
    assert!(!world.socket().exists());
    assert!(process.0.try_wait().unwrap().is_none());
    rustix::process::kill_process(rustix::process::Pid::from_child(&process.0), rustix::process::Signal::TERM).unwrap();
    assert_eq!(process.0.wait().unwrap().code(), Some(0));
    world.target.still_serves();
}

#[test]
fn a_handler_in_c_serves_from_within() {
    let world = World::new(
        |world| world.so.display().to_string(),
        json!({"workers": 2, "options": {"path": std::env::temp_dir().join(format!("ringstone-c-{}", std::process::id()))}}),
    );
    let (_admin, mut io) = world.io();
    let mut writer = Writer::new();
    writer.go_on(&mut io, 1000);
    writer.finish(&mut io);
    world.target.server.call("bdev_appliance_delete", json!({"name": "E"}));
    let options = world.options();
    let _ = std::fs::remove_file(std::env::temp_dir().join(format!("ringstone-c-{}", std::process::id())));
    let fails = |handler: &Path| {
        let params = json!({"name": "F", "handler": handler, "num_blocks": 8, "block_size": 512, "options": options});
        let (_, message, data) = world.target.server.call_fails("bdev_appliance_create", params);
        format!("{message} {data}")
    };
    assert!(fails(Path::new("/nowhere/lib.so")).contains("build it first"));
    let text = world.scratch.write("text.so", "no library");
    assert!(fails(&text).contains("cannot be loaded"), "{}", fails(&text));
}
