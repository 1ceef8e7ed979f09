//! The header against the mirror, and shared objects built by the system's compiler.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::AtomicU32;

use reactor::park::Unpark;
use reactor::time::OsClock;
use reactor::{Buffers, ReactorId};
use serde_json::{Value, json};

use super::*;
use crate::home::RingHome;
use crate::request::{Body, Home, NO_DEADLINE};
use crate::types::Op;

const BLOCK: usize = 512;

/// A folder that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("ringstone-c-{}-{number}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Scratch(path)
    }

    /// Builds a file of this crate.
    fn cc(&self, source: &str, name: &str, options: &[&str]) -> PathBuf {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let out = self.0.join(name);
        let built = Command::new("cc")
            .args(["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-I"])
            .arg(root.join("include"))
            .args(options)
            .arg("-o")
            .arg(&out)
            .arg(root.join(source))
            .arg("-lpthread")
            .output()
            .expect("the system has a C compiler");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        out
    }

    fn so(&self, source: &str, name: &str, options: &[&str]) -> PathBuf {
        let all: Vec<&str> = ["-shared", "-fPIC"].iter().chain(options).copied().collect();
        self.cc(source, name, &all)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_mirror_is_the_header() {
    let mut program = String::from(
        "#include <stdio.h>\n#include \"ringstone_appliance.h\"\n#define V(x) printf(\"%s=%llu\\n\", #x, (unsigned long long)(x));\nint main(void) {\n",
    );
    let mut expected = Vec::new();
    let mut expect = |text: &str, value: u64| {
        program.push_str(&format!("V({text})\n"));
        expected.push(format!("{text}={value}"));
    };
    macro_rules! layout {
        ($rust:ty, $c:literal, $($field:ident),*) => {
            expect(&format!("sizeof(struct {})", $c), size_of::<$rust>() as u64);
            $(expect(
                &format!("offsetof(struct {}, {})", $c, stringify!($field)),
                std::mem::offset_of!($rust, $field) as u64,
            );)*
        };
    }
    layout!(RsBuffer, "rs_buffer", base, bytes);
    layout!(
        RsRequest,
        "rs_request",
        struct_bytes,
        op,
        flags,
        reserved,
        token,
        id,
        lba,
        blocks,
        source_lba,
        timeout_ns,
        payload_bytes,
        buffer_count,
        buffers
    );
    layout!(RsHost, "rs_host", struct_bytes, version, complete, wake, log);
    layout!(RsDevice, "rs_device", struct_bytes, block_size, num_blocks, bdev, options, workers, reserved);
    layout!(RsCapabilities, "rs_capabilities", struct_bytes, ops, flags, max_rw_blocks);
    layout!(
        RsHandler,
        "rs_handler",
        struct_bytes,
        version,
        name,
        create,
        capabilities,
        resize,
        destroy,
        worker_create,
        submit,
        poll,
        abort,
        reset,
        worker_destroy
    );
    expect("RS_APPLIANCE_VERSION", VERSION.into());
    expect("RS_CAP_VOLATILE_CACHE", CAP_VOLATILE_CACHE.into());
    expect("RS_CAP_UNMAP_ZEROES", CAP_UNMAP_ZEROES.into());
    expect("RS_FLAG_FUA", abi::FLAG_FUA.into());
    expect("RS_FLAG_MAY_UNMAP", abi::FLAG_MAY_UNMAP.into());
    for kind in OpKind::ALL.into_iter().filter(|&kind| kind != OpKind::Reset) {
        expect(&format!("RS_OP_{}", kind.name().to_uppercase()), kind as u64);
    }
    for (name, status) in [
        ("SUCCESS", IoStatus::Success),
        ("FAILED", IoStatus::Failed),
        ("OUT_OF_RANGE", IoStatus::OutOfRange),
        ("INVALID", IoStatus::Invalid),
        ("NOT_SUPPORTED", IoStatus::NotSupported),
        ("NO_DEVICE", IoStatus::NoDevice),
        ("ABORTED", IoStatus::Aborted),
        ("TIMED_OUT", IoStatus::TimedOut),
        ("READ_ERROR", IoStatus::ReadError),
        ("WRITE_ERROR", IoStatus::WriteError),
        ("COMPARE_FAILED", IoStatus::CompareFailed),
        ("READ_ONLY", IoStatus::ReadOnly),
        ("NO_SPACE", IoStatus::NoSpace),
        ("NVME_STATUS(2, 0x81, 0)", IoStatus::Nvme { sct: 2, sc: 0x81, dnr: false }),
        ("NVME_STATUS(7, 0xff, 1)", IoStatus::Nvme { sct: 7, sc: 0xff, dnr: true }),
    ] {
        expect(&format!("RS_{name}"), abi::encode_status(status).into());
    }
    program.push_str("return 0; }\n");
    let scratch = Scratch::new();
    std::fs::write(scratch.0.join("layout.c"), program).unwrap();
    let binary = scratch.cc(scratch.0.join("layout.c").to_str().unwrap(), "layout", &[]);
    let printed = Command::new(binary).output().unwrap().stdout;
    assert_eq!(String::from_utf8(printed).unwrap().lines().collect::<Vec<_>>(), expected);
}

#[test]
fn what_cannot_be_loaded_is_said_with_a_remedy() {
    let scratch = Scratch::new();
    let say = |path: &Path| SharedObject::load(path).unwrap_err().to_string();
    assert!(say(Path::new("lib.so")).contains("absolute"));
    assert!(say(&scratch.0.join("none.so")).contains("build it first"));
    assert!(say(&scratch.0).contains("no file"));
    let text = scratch.0.join("text.so");
    std::fs::write(&text, "not a library").unwrap();
    assert!(say(&text).contains("cc -shared"), "{}", say(&text));
    let path = scratch.so("tests/faulty.c", "no_entry.so", &["-DNO_ENTRY"]);
    assert!(say(&path).contains("no symbol ringstone_appliance_handler"), "{}", say(&path));
    let path = scratch.so("tests/faulty.c", "version.so", &["-DVERSION=99"]);
    assert!(say(&path).contains("version 99") && say(&path).contains("build it again"), "{}", say(&path));
    let path = scratch.so("tests/faulty.c", "size.so", &["-DSIZE=40"]);
    assert!(say(&path).contains("sizeof(struct rs_handler)"), "{}", say(&path));
    let path = scratch.so("tests/faulty.c", "no_submit.so", &["-DNO_SUBMIT"]);
    assert!(say(&path).contains("NULL"), "{}", say(&path));
}

struct Nobody;

impl Unpark for Nobody {
    fn unpark(&self) {}
}

/// A handler with one worker, called as a worker's thread calls it.
struct World {
    handler: Arc<dyn Handler>,
    worker: Option<Box<dyn Worker>>,
    home: Arc<RingHome>,
    ended: Consumer<Box<Body>>,
    free: Vec<u32>,
    next: u64,
    clock: Arc<dyn Clock>,
}

impl World {
    const DEPTH: usize = 2000;

    fn new(path: &Path, options: &Value) -> World {
        let geometry = Geometry::new(BLOCK as u32, 100_000);
        let making = Making { bdev: "vol", geometry, options, workers: 1 };
        let handler = SharedObject::load(path).unwrap().make(&making).unwrap();
        let clock: Arc<dyn Clock> = Arc::new(OsClock::default());
        let waker = Waker::new(Arc::new(Nobody));
        let names = (Arc::from("vol"), Arc::from(handler.name()));
        let (home, ended) = RingHome::new(World::DEPTH, waker, Arc::clone(&clock), names.0, names.1);
        let free = (0..World::DEPTH as u32).collect();
        let mut world = World { handler, worker: None, home, ended, free, next: 1, clock };
        world.begin();
        world
    }

    fn begin(&mut self) {
        let (waker, clock) = (Waker::new(Arc::new(Nobody)), Arc::clone(&self.clock));
        self.worker = Some(self.handler.worker(WorkerCx { index: 0, workers: 1, waker, clock }).unwrap());
    }

    fn request(&mut self, op: Op, lba: u64, bytes: &[u8]) -> Request {
        let mut body =
            Body::blank(self.free.pop().unwrap(), ReactorId(0), BLOCK as u32, Arc::clone(&self.home) as Arc<dyn Home>);
        body.id = RequestId(self.next);
        self.next += 1;
        (body.op, body.lba, body.blocks) = (op, lba, (bytes.len() / BLOCK) as u64);
        (body.bufs, body.payload_bytes, body.deadline) = (Buffers::from(bytes), bytes.len() as u32, NO_DEADLINE);
        Request::from_body(body)
    }

    fn submit(&mut self, batch: &mut Batch) {
        batch.begin(self.clock.now());
        self.worker.as_mut().unwrap().submit(batch);
    }

    fn pop(&mut self) -> Option<Box<Body>> {
        let body = self.ended.pop()?;
        self.free.push(body.slot);
        Some(body)
    }

    fn wait(&mut self) -> Box<Body> {
        let start = std::time::Instant::now();
        loop {
            if let Some(body) = self.pop() {
                return body;
            }
            assert!(start.elapsed().as_secs() < 60, "a request does not end");
            std::thread::yield_now();
        }
    }

    fn run(&mut self, op: Op, lba: u64, bytes: &[u8]) -> (IoStatus, Vec<u8>) {
        let mut batch = Batch::default();
        let request = self.request(op, lba, bytes);
        batch.push(request);
        self.submit(&mut batch);
        assert!(batch.is_empty());
        let body = self.wait();
        (body.status, body.bufs.to_vec())
    }
}

#[test]
fn the_example_stores_what_it_is_given_whatever_the_order() {
    let scratch = Scratch::new();
    let mut world = World::new(&scratch.so("examples/memory.c", "memory.so", &[]), &json!({}));
    assert_eq!(world.handler.name(), "memory.c");
    let write = Op::Write { fua: false };
    // More than there are slots at once: the rest waits in the batch, and is taken when slots come back.
    let mut batch = Batch::default();
    for lba in 0..World::DEPTH as u64 {
        let request = world.request(write, lba, &[lba as u8; BLOCK]);
        batch.push(request);
    }
    let mut ended = 0;
    let start = std::time::Instant::now();
    while ended < World::DEPTH {
        world.submit(&mut batch);
        while let Some(body) = world.pop() {
            assert_eq!(body.status, IoStatus::Success);
            ended += 1;
        }
        assert!(start.elapsed().as_secs() < 60, "{ended} requests have ended");
    }
    for lba in (0..World::DEPTH as u64).step_by(7) {
        assert_eq!(world.run(Op::Read, lba, &[0; BLOCK]), (IoStatus::Success, vec![lba as u8; BLOCK]));
    }
    assert_eq!(world.run(Op::Compare, 5, &[5; BLOCK]).0, IoStatus::Success);
    assert_eq!(world.run(Op::Compare, 5, &[6; BLOCK]).0, IoStatus::CompareFailed);
    assert_eq!(world.run(Op::Read, 99_999, &[1; 2 * BLOCK]).0, IoStatus::OutOfRange);
    assert_eq!(world.run(Op::Copy { source_lba: 1 }, 2, &[]).0, IoStatus::NotSupported);
    assert_eq!(world.run(Op::Flush, 0, &[]).0, IoStatus::Success);
    world.handler.resize(100_001).unwrap();
    assert_eq!(world.run(Op::Read, 99_999, &[1; 2 * BLOCK]), (IoStatus::Success, vec![0; 2 * BLOCK]));
    assert!(world.handler.resize(u64::MAX).is_err());
    assert_eq!(world.home.faults(), 0);
    // Its end, with requests on the way.
    let mut batch = Batch::default();
    for lba in 0..100 {
        let request = world.request(write, lba, &[0; BLOCK]);
        batch.push(request);
    }
    world.submit(&mut batch);
    world.worker = None;
    (0..100).for_each(|_| assert_eq!(world.wait().status, IoStatus::Success));
}

#[test]
fn faults_of_c_are_found_and_harmless() {
    let scratch = Scratch::new();
    let path = scratch.so("tests/faulty.c", "faulty.so", &[]);
    let mut world = World::new(&path, &json!({}));
    let good = (IoStatus::Success, vec![7; BLOCK]);
    assert_eq!(world.run(Op::Read, 0, &[0; BLOCK]), good);
    for round in 0..100 {
        assert_eq!(world.run(Op::Read, 1, &[0; BLOCK]), good, "completed twice");
        assert_eq!(world.run(Op::Read, 2, &[0; BLOCK]).0, IoStatus::Failed, "the wrong length");
        assert_eq!(world.run(Op::Read, 3, &[0; BLOCK]), good, "unknown tokens");
        assert_eq!(world.run(Op::Read, 4, &[0; BLOCK]).0, IoStatus::Failed, "an unknown status");
        assert!(world.pop().is_none(), "round {round}: nothing ends twice");
    }
    // One that it keeps, until it is aborted; an abort of what is not there does nothing.
    let mut batch = Batch::default();
    let kept = world.request(Op::Read, 5, &[0; BLOCK]);
    let id = kept.id();
    batch.push(kept);
    world.submit(&mut batch);
    let worker = world.worker.as_mut().unwrap();
    worker.abort(RequestId(u64::MAX));
    worker.abort(id);
    assert_eq!(world.wait().status, IoStatus::Aborted);
    // One that it keeps until its worker ends fails then, and its token names nothing for the next worker.
    let kept = world.request(Op::Read, 5, &[0; BLOCK]);
    batch.push(kept);
    world.submit(&mut batch);
    world.worker = None;
    assert_eq!(world.wait().status, IoStatus::Failed);
    world.begin();
    let mut others = Batch::default();
    for _ in 0..SLOTS - 1 {
        let request = world.request(Op::Read, 5, &[0; BLOCK]);
        others.push(request);
    }
    world.submit(&mut others);
    assert_eq!(world.run(Op::Read, 6, &[0; BLOCK]), good, "completions of the worker before");
    assert!(world.pop().is_none());
}

#[test]
fn a_handler_says_why_it_cannot_be_made() {
    let scratch = Scratch::new();
    let object = SharedObject::load(&scratch.so("tests/faulty.c", "faulty.so", &[])).unwrap();
    let options = json!({"refuse": true});
    let making = Making { bdev: "vol", geometry: Geometry::new(512, 8), options: &options, workers: 1 };
    let error = object.make(&making).err().unwrap().to_string();
    assert!(error.contains("faulty") && error.contains("I was asked to refuse"), "{error}");
}

#[test]
fn tables_are_used_again() {
    let scratch = Scratch::new();
    let mut world = World::new(&scratch.so("tests/faulty.c", "faulty.so", &[]), &json!({}));
    for _ in 0..200 {
        world.worker = None;
        world.begin();
        assert_eq!(world.run(Op::Read, 0, &[0; BLOCK]).0, IoStatus::Success);
    }
    // Other tests of this process have workers too, but not hundreds.
    assert!(lock(&SPARE).len() < 20);
}
