//! A lane, a target and a process in one test: the process is a thread that only has the socket.

use std::collections::HashMap;
use std::sync::atomic::AtomicU32;
use std::thread::JoinHandle;

use reactor::park::Unpark;
use reactor::time::OsClock;
use reactor::{Buffers, ReactorId};

use super::super::lane::Lane;
use super::super::memory::Memory as SharedMemory;
use super::super::process::{ServeOptions, Stop, serve};
use super::super::ring::{Consumer, Producer, Words};
use super::super::wire;
use super::*;
use crate::handler::{Batch, Capabilities, Handler, Making, Worker, WorkerCx};
use crate::home::RingHome;
use crate::layout::{Completed, Submission};
use crate::memory::Memory;
use crate::request::{Body, Home, NO_DEADLINE, Request, RequestId};
use crate::types::{Geometry, IoStatus, Op};

mod handlers;
mod hostile;

use handlers::{Curious, Hoarder, Nervous};

const BLOCK: usize = 512;
const DEPTH: u32 = 8;
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder that is removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("ringstone-external-{}-{number}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        Scratch(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("s")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[track_caller]
fn eventually<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = std::time::Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::yield_now();
    }
}

struct Nobody;

impl Unpark for Nobody {
    fn unpark(&self) {}
}

/// A channel with one lane.
struct World {
    lane: Option<Lane>,
    target: Target,
    clock: Arc<dyn Clock>,
    #[expect(clippy::vec_box, reason = "bodies travel in their boxes")]
    free: Vec<Box<Body>>,
    next_id: u64,
    /// When the last request was submitted.
    sent: Instant,
    done: HashMap<u64, (IoStatus, Vec<u8>)>,
    _scratch: Scratch,
}

impl World {
    fn new(policy: OnDisconnect) -> World {
        World::with(policy, 1, Placement::default())
    }

    fn with(policy: OnDisconnect, workers: u32, placement: Placement) -> World {
        let scratch = Scratch::new();
        let clock: Arc<dyn Clock> = Arc::new(OsClock::default());
        let options = TargetOptions {
            path: scratch.socket(),
            bdev: "vol".into(),
            block_size: BLOCK as u32,
            num_blocks: 1000,
            shape: Shape::new(1, workers, DEPTH, 8192).unwrap(),
            placement,
            spin: Duration::ZERO,
            cores: Vec::new(),
            policy,
            ops: OpSet::of(&[OpKind::Read, OpKind::Write, OpKind::Flush]),
            unmap_zeroes: false,
            volatile_cache: true,
        };
        let target = Target::listen(options, Arc::clone(&clock)).unwrap();
        let waker = Waker::new(Arc::new(Nobody));
        let (home, _consumer) =
            RingHome::new(DEPTH as usize, waker.clone(), Arc::clone(&clock), Arc::from("vol"), Arc::from("external"));
        let lane = Some(Lane::open(&target, 0, waker).unwrap());
        let home: Arc<dyn Home> = home;
        let free =
            (0..DEPTH).rev().map(|slot| Body::blank(slot, ReactorId(0), BLOCK as u32, Arc::clone(&home))).collect();
        World { lane, target, clock, free, next_id: 1, sent: Instant(0), done: HashMap::new(), _scratch: scratch }
    }

    fn path(&self) -> PathBuf {
        self.target.path().to_path_buf()
    }

    fn lane(&mut self) -> &mut Lane {
        self.lane.as_mut().unwrap()
    }

    fn send(&mut self, op: Op, lba: u64, bytes: Vec<u8>) -> u64 {
        self.send_until(op, lba, bytes, NO_DEADLINE)
    }

    fn send_until(&mut self, op: Op, lba: u64, bytes: Vec<u8>, deadline: Instant) -> u64 {
        let mut body = self.free.pop().expect("a body is free");
        let id = self.next_id;
        self.next_id += 1;
        body.id = RequestId(id);
        (body.op, body.lba, body.blocks) = (op, lba, (bytes.len() / BLOCK) as u64);
        body.payload_bytes = bytes.len() as u32;
        body.bufs = Buffers::from(&bytes[..]);
        body.deadline = deadline;
        body.status = IoStatus::Success;
        let now = self.clock.now();
        (body.sampled, body.fixed.sent) = (true, now);
        self.sent = now;
        self.lane().send(body, now);
        self.lane().flush();
        id
    }

    fn write(&mut self, lba: u64, byte: u8) -> u64 {
        self.send(Op::Write { fua: false }, lba, vec![byte; BLOCK])
    }

    fn read(&mut self, lba: u64) -> u64 {
        self.send(Op::Read, lba, vec![0xee; BLOCK])
    }

    /// One poll of the channel.
    fn poll(&mut self) -> usize {
        let (now, mut home) = (self.clock.now(), Vec::new());
        let count = self.lane().drain(now, DEPTH as usize, |body| home.push(body));
        for mut body in home {
            self.done.insert(body.id.0, (body.status, body.bufs.to_vec()));
            body.bufs = Buffers::new();
            self.free.push(body);
        }
        count
    }

    #[track_caller]
    fn wait(&mut self, id: u64) -> (IoStatus, Vec<u8>) {
        eventually("a request ends", || {
            self.poll();
            self.done.remove(&id)
        })
    }

    #[track_caller]
    fn attach(&mut self) {
        eventually("a process serves", || {
            self.poll();
            self.lane().is_attached().then_some(())
        });
    }

    #[track_caller]
    fn detach(&mut self) {
        eventually("the process is gone", || {
            self.poll();
            (!self.lane().is_attached()).then_some(())
        });
    }

    fn lies(&self) -> u64 {
        self.target.inner.counters.lies.load(Ordering::Relaxed)
    }
}

/// A process that behaves.
struct Process {
    stop: Stop,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Process {
    fn start(path: PathBuf, handler: Arc<dyn Handler>) -> Process {
        let stop = Stop::new().unwrap();
        let told = stop.clone();
        let thread = std::thread::spawn(move || {
            let options = ServeOptions::default();
            let mut make = |making: &Making<'_>| {
                handler.resize(making.geometry.num_blocks)?;
                Ok(Arc::clone(&handler))
            };
            serve(&path, &mut make, &options, &told)
        });
        Process { stop, thread: Some(thread) }
    }

    fn memory() -> Arc<dyn Handler> {
        let options = json!({});
        let geometry = Geometry::new(BLOCK as u32, 1000);
        Memory::make(&Making { bdev: "vol", geometry, options: &options, workers: 1 }).unwrap()
    }

    fn end(mut self) {
        self.stop.stop();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop.stop();
    }
}

/// A process that does what it likes: it has the socket and the memory, and nothing else of this crate's process side.
struct Rogue {
    socket: OwnedFd,
    memory: Arc<SharedMemory>,
    submissions: Vec<Consumer<7>>,
    completions: Vec<Producer<3>>,
    /// The worker that it takes for.
    worker: usize,
}

impl Rogue {
    fn connect(path: &Path) -> OwnedFd {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        socket
    }

    fn hear(socket: &OwnedFd) -> Option<(Message, Vec<OwnedFd>)> {
        eventually("the target answers", || match wire::receive(socket, true).unwrap() {
            Received::Message(message, fds) => Some(Some((message, fds))),
            Received::End => Some(None),
            Received::Nothing => None,
        })
    }

    fn start(world: &mut World) -> Rogue {
        let socket = Rogue::connect(&world.path());
        wire::send(&socket, &Message::Hello { version: VERSION }, &[]).unwrap();
        let Some((Message::Welcome(welcome), fds)) = Rogue::hear(&socket) else { panic!("a welcome") };
        let memory = Arc::new(SharedMemory::open(&fds[0], welcome.shape).unwrap());
        let Some((Message::Lanes { count: 1 }, fds)) = Rogue::hear(&socket) else { panic!("lanes") };
        assert_eq!(fds.len(), 1);
        let Some((Message::Workers { count }, fds)) = Rogue::hear(&socket) else { panic!("workers") };
        assert_eq!((count, fds.len()), (welcome.shape.workers(), count as usize));
        wire::send(&socket, &Message::Ready, &[]).unwrap();
        world.attach();
        let shape = welcome.shape;
        Rogue {
            socket,
            memory,
            submissions: (0..count).map(|w| Consumer::new(shape.submissions(w), shape.depth())).collect(),
            completions: (0..count).map(|w| Producer::new(shape.completions(w), shape.depth())).collect(),
            worker: 0,
        }
    }

    fn has_one(&self, worker: usize) -> bool {
        !self.submissions[worker].is_empty(&self.memory.lane(0))
    }

    fn take(&mut self) -> Submission {
        let words = self.memory.lane(0);
        Submission::decode(eventually("a submission", || self.submissions[self.worker].pop(&words)))
    }

    fn answer(&mut self, completed: Completed) {
        self.completions[self.worker].push(&self.memory.lane(0), completed.encode());
    }

    fn answer_at(&mut self, submission: &Submission, picked_ns: u64, done_ns: u64) {
        let picked_word = self.memory.shape().picked_word(submission.slot.into());
        self.memory.lane(0).store(picked_word, picked_ns, Ordering::Relaxed);
        self.answer(Completed { done_ns, ..Rogue::honest(submission) });
    }

    fn honest(submission: &Submission) -> Completed {
        Completed { id: submission.id, slot: submission.slot, status: 0, bytes: submission.bytes, done_ns: u64::MAX }
    }
}

#[test]
fn a_process_serves_what_it_is_sent() {
    let mut world = World::new(OnDisconnect::Fail);
    let process = Process::start(world.path(), Process::memory());
    world.attach();
    for lba in 0..200 {
        let id = world.write(lba, lba as u8);
        assert_eq!(world.wait(id).0, IoStatus::Success);
    }
    for lba in 0..200 {
        let id = world.read(lba);
        assert_eq!(world.wait(id), (IoStatus::Success, vec![lba as u8; BLOCK]));
    }
    let beyond = world.read(1000);
    assert_eq!(world.wait(beyond).0, IoStatus::OutOfRange);
    let flush = world.send(Op::Flush, 0, Vec::new());
    assert_eq!(world.wait(flush).0, IoStatus::Success);
    assert_eq!(world.lies(), 0);
    process.end();
    world.detach();
}

#[test]
fn without_a_process_requests_fail_and_with_the_next_they_do_not() {
    let mut world = World::new(OnDisconnect::Fail);
    let id = world.write(1, 1);
    assert_eq!(world.wait(id).0, IoStatus::Failed);
    let handler = Process::memory();
    for byte in 1..4 {
        let process = Process::start(world.path(), Arc::clone(&handler));
        world.attach();
        let id = world.read(1);
        assert_eq!(world.wait(id), (IoStatus::Success, vec![byte - 1; BLOCK]));
        let id = world.write(1, byte);
        assert_eq!(world.wait(id).0, IoStatus::Success);
        process.end();
        world.detach();
        let id = world.write(1, 99);
        assert_eq!(world.wait(id).0, IoStatus::Failed);
    }
}

#[test]
fn parked_requests_are_replayed_in_order_by_the_next_process() {
    let mut world = World::new(OnDisconnect::Park);
    // One that waits before there was any process.
    let first = world.write(7, 1);
    let mut rogue = Rogue::start(&mut world);
    // It takes them and dies; the second it has even done.
    let second = world.write(7, 2);
    let third = world.write(8, 3);
    for _ in 0..3 {
        rogue.take();
    }
    drop(rogue);
    world.detach();
    let fourth = world.write(7, 4);
    let gone = world.send_until(Op::Write { fua: false }, 7, vec![9; BLOCK], world.clock.now());
    assert_eq!(world.lane().len(), 5);
    let process = Process::start(world.path(), Process::memory());
    for id in [first, second, third, fourth] {
        assert_eq!(world.wait(id).0, IoStatus::Success);
    }
    assert_eq!(world.wait(gone).0, IoStatus::TimedOut, "what is too late must not be done any more");
    let (seven, eight) = (world.read(7), world.read(8));
    assert_eq!(world.wait(seven).1, vec![4; BLOCK], "the last one counts");
    assert_eq!(world.wait(eight).1, vec![3; BLOCK]);
    process.end();
}

#[test]
fn with_fail_what_the_dead_process_had_fails() {
    let mut world = World::new(OnDisconnect::Fail);
    let mut rogue = Rogue::start(&mut world);
    let ids = [world.write(1, 1), world.read(2), world.send(Op::Flush, 0, Vec::new())];
    let done = rogue.take();
    rogue.answer(Rogue::honest(&done));
    // It is gone before anybody has looked at its last answer, which counts all the same.
    drop(rogue);
    eventually("its end is noticed", || (!world.target.is_connected()).then_some(()));
    assert_eq!(world.wait(ids[0]).0, IoStatus::Success);
    assert_eq!(world.wait(ids[1]).0, IoStatus::Failed);
    assert_eq!(world.wait(ids[2]).0, IoStatus::Failed);
    assert!(world.lane().is_empty());
}

#[test]
fn requests_go_to_the_rings_of_their_workers() {
    for (placement, expected) in [
        // 1000 blocks, 3 workers: 334 each.
        (Placement::LbaRange, [0, 0, 1, 1, 2, 2]),
        (Placement::Queue, [0; 6]),
        (Placement::RoundRobin, [1, 2, 0, 1, 2, 0]),
    ] {
        let mut world = World::with(OnDisconnect::Fail, 3, placement);
        let mut rogue = Rogue::start(&mut world);
        for (lba, worker) in [0, 333, 334, 667, 668, 999].into_iter().zip(expected) {
            let id = world.read(lba);
            assert!((0..3).all(|other| rogue.has_one(other) == (other == worker)), "{placement:?}, block {lba}");
            rogue.worker = worker;
            let submission = rogue.take();
            assert_eq!((submission.id, submission.lba), (id, lba));
            // Any worker may answer it: what counts is which request it is.
            rogue.worker = (worker + 1) % 3;
            rogue.answer(Rogue::honest(&submission));
            assert_eq!(world.wait(id).0, IoStatus::Success);
        }
        let requests: Vec<_> = (0..3).map(|worker| expected.iter().filter(|&&at| at == worker).count()).collect();
        let stats = world.target.stats();
        let counted: Vec<_> = stats["workers"].as_array().unwrap().iter().map(|w| w["requests"].clone()).collect();
        assert_eq!(counted, requests);
    }
}

#[test]
fn a_process_has_the_workers_that_the_device_asks_for() {
    for placement in [Placement::LbaRange, Placement::RoundRobin] {
        let mut world = World::with(OnDisconnect::Park, 4, placement);
        let (told, handler) = (Arc::new(Mutex::new(Vec::new())), Process::memory());
        let process = Process::start(world.path(), Arc::new(Curious(Arc::clone(&told), handler)));
        world.attach();
        for round in 0..10 {
            let ids: Vec<_> = (0..DEPTH).map(|n| world.write(u64::from(n) * 125, round + n as u8)).collect();
            ids.into_iter().for_each(|id| assert_eq!(world.wait(id).0, IoStatus::Success));
            for n in 0..DEPTH {
                let id = world.read(u64::from(n) * 125);
                assert_eq!(world.wait(id), (IoStatus::Success, vec![round + n as u8; BLOCK]));
            }
        }
        // All of them are told of a reset, and the one that has it of an abort.
        world.lane().reset(RequestId(u64::MAX));
        world.lane().flush();
        process.end();
        let mut told = told.lock().unwrap().clone();
        told.sort_unstable();
        assert_eq!(told, [(0, 4), (1, 4), (2, 4), (3, 4)]);
    }
}

#[test]
fn an_abort_reaches_the_worker_that_has_the_request() {
    let mut world = World::with(OnDisconnect::Park, 3, Placement::LbaRange);
    let process = Process::start(world.path(), Arc::new(Hoarder));
    world.attach();
    let ids = [world.write(0, 1), world.write(400, 2), world.write(800, 3)];
    for id in [ids[1], ids[2], ids[0]] {
        world.lane().abort(RequestId(id));
        world.lane().flush();
        assert_eq!(world.wait(id).0, IoStatus::Aborted);
    }
    let ids = [world.write(0, 1), world.write(400, 2), world.write(800, 3)];
    world.lane().reset(RequestId(u64::MAX));
    world.lane().flush();
    ids.into_iter().for_each(|id| assert_eq!(world.wait(id).0, IoStatus::Aborted));
    process.end();
}

#[test]
fn an_abort_ends_what_waits_and_reaches_the_process() {
    let mut world = World::new(OnDisconnect::Park);
    let waiting = world.write(0, 1);
    world.lane().abort(RequestId(waiting));
    assert_eq!(world.wait(waiting).0, IoStatus::Aborted);

    let process = Process::start(world.path(), Arc::new(Hoarder));
    world.attach();
    let ids = [world.write(1, 1), world.write(2, 2), world.write(3, 3)];
    world.lane().abort(RequestId(ids[1]));
    world.lane().flush();
    assert_eq!(world.wait(ids[1]).0, IoStatus::Aborted);
    assert_eq!(world.lane().len(), 2);
    world.lane().reset(RequestId(u64::MAX));
    world.lane().flush();
    for id in [ids[0], ids[2]] {
        assert_eq!(world.wait(id).0, IoStatus::Aborted);
    }
    process.end();
}

#[test]
fn what_was_aborted_is_not_replayed() {
    let mut world = World::new(OnDisconnect::Park);
    let rogue = Rogue::start(&mut world);
    let (aborted, kept) = (world.write(1, 1), world.write(2, 2));
    world.lane().abort(RequestId(aborted));
    drop(rogue);
    assert_eq!(world.wait(aborted).0, IoStatus::Aborted);
    let process = Process::start(world.path(), Process::memory());
    assert_eq!(world.wait(kept).0, IoStatus::Success);
    let id = world.read(1);
    assert_eq!(world.wait(id).1, vec![0; BLOCK]);
    process.end();
}

#[test]
fn a_change_of_size_reaches_the_process_there_is_and_the_next() {
    let mut world = World::new(OnDisconnect::Park);
    let handler = Process::memory();
    let process = Process::start(world.path(), Arc::clone(&handler));
    world.attach();
    world.target.resize(2000).unwrap();
    let id = world.write(1999, 1);
    assert_eq!(world.wait(id).0, IoStatus::Success);
    process.end();
    world.detach();
    world.target.resize(3000).unwrap();
    let process = Process::start(world.path(), Arc::clone(&handler));
    let id = world.write(2999, 1);
    assert_eq!(world.wait(id).0, IoStatus::Success);
    // One that refuses.
    let error = world.target.resize(1 << 60).unwrap_err();
    assert!(error.to_string().contains("refuses the size"), "{error}");
    let id = world.read(2999);
    assert_eq!(world.wait(id), (IoStatus::Success, vec![1; BLOCK]));
    process.end();
}

#[test]
fn a_lane_that_closes_with_requests_out_cuts_the_process_off() {
    let mut world = World::new(OnDisconnect::Park);
    let rogue = Rogue::start(&mut world);
    world.write(1, 1);
    let mut home = 0;
    world.lane.take().unwrap().close(|body| {
        assert_eq!(body.status, IoStatus::Aborted);
        home += 1;
    });
    assert_eq!(home, 1);
    assert!(Rogue::hear(&rogue.socket).is_none());
    eventually("the session ends", || (!world.target.is_connected()).then_some(()));
}

#[test]
fn a_lane_that_closes_and_opens_goes_on_where_it_was() {
    let mut world = World::new(OnDisconnect::Fail);
    let process = Process::start(world.path(), Process::memory());
    world.attach();
    for round in 0..5 {
        for lba in 0..3 {
            let id = world.write(lba, round);
            assert_eq!(world.wait(id).0, IoStatus::Success);
        }
        world.lane.take().unwrap().close(|_| panic!("nothing was out"));
        world.lane = Some(Lane::open(&world.target, 0, Waker::new(Arc::new(Nobody))).unwrap());
        world.attach();
    }
    let id = world.read(2);
    assert_eq!(world.wait(id).1, vec![4; BLOCK]);
    process.end();
}

#[test]
fn a_lane_that_has_just_opened_knows_the_process_that_there_is() {
    let mut world = World::new(OnDisconnect::Fail);
    let process = Process::start(world.path(), Process::memory());
    world.attach();
    world.lane.take().unwrap().close(|_| panic!("nothing was out"));
    world.lane = Some(Lane::open(&world.target, 0, Waker::new(Arc::new(Nobody))).unwrap());
    let id = world.write(1, 1);
    assert_eq!(world.wait(id).0, IoStatus::Success, "before its first poll");
    assert_eq!(world.target.stats()["replayed"], 0);
    process.end();
}

#[test]
fn the_handler_ends_the_last_sessions_requests_before_the_next_begins() {
    let mut world = World::new(OnDisconnect::Park);
    let process = Process::start(world.path(), Arc::new(Hoarder));
    world.attach();
    let id = world.write(1, 1);
    // The target cuts the connection; the same process comes back, and is sent the request once more.
    world.target.inner.lane(0).session().unwrap().end();
    world.target.inner.lanes[0].changed.store(true, Ordering::SeqCst);
    eventually("it was replayed", || {
        world.poll();
        (world.target.inner.counters.replayed.load(Ordering::Relaxed) == 1).then_some(())
    });
    assert!(!world.done.contains_key(&id));
    world.lane().abort(RequestId(id));
    world.lane().flush();
    assert_eq!(world.wait(id).0, IoStatus::Aborted);
    process.end();
}

#[test]
fn a_handler_that_lacks_what_is_promised_is_told_so() {
    let world = World::new(OnDisconnect::Fail);
    struct Poor;
    impl Handler for Poor {
        fn name(&self) -> &str {
            "poor"
        }
        fn capabilities(&self, _: &Geometry) -> Capabilities {
            Capabilities { ops: OpSet::of(&[OpKind::Read]), ..Capabilities::BASIC }
        }
        fn worker(&self, _: WorkerCx) -> io::Result<Box<dyn Worker>> {
            panic!("it is not asked")
        }
        fn resize(&self, _: u64) -> io::Result<()> {
            Ok(())
        }
    }
    let mut process = Process::start(world.path(), Arc::new(Poor));
    let error = process.thread.take().unwrap().join().unwrap().unwrap_err();
    assert!(error.to_string().contains("write, flush") && error.to_string().contains("'ops'"), "{error}");
    assert!(!world.target.is_connected());
}

#[test]
fn a_worker_that_panics_is_made_again() {
    let mut world = World::new(OnDisconnect::Fail);
    let process = Process::start(world.path(), Arc::new(Nervous(Process::memory())));
    world.attach();
    let id = world.write(666, 1);
    assert_eq!(world.wait(id).0, IoStatus::Failed);
    let id = world.write(1, 1);
    assert_eq!(world.wait(id).0, IoStatus::Success);
    process.end();
}

#[test]
fn a_process_that_is_given_something_else_than_a_socket_says_so() {
    let scratch = Scratch::new();
    let file = scratch.0.join("file");
    std::fs::write(&file, "x").unwrap();
    let mut make = |_: &Making<'_>| -> io::Result<Arc<dyn Handler>> { panic!("nobody is there") };
    let error = serve(&file, &mut make, &ServeOptions::default(), &Stop::new().unwrap()).unwrap_err();
    assert!(error.to_string().contains("is no socket"), "{error}");
}

#[test]
fn paths_that_cannot_be_listened_at_are_refused_with_a_remedy() {
    let scratch = Scratch::new();
    let file = scratch.0.join("file");
    std::fs::write(&file, "x").unwrap();
    let say = |path: &Path| listen_at(path).unwrap_err().to_string();
    assert!(say(&file).contains("no socket"), "{}", say(&file));
    assert!(say(Path::new("relative")).contains("not absolute"));
    assert!(say(&scratch.0.join("x".repeat(200))).contains("107"));
    let kind = listen_at(&scratch.0.join("x".repeat(200))).unwrap_err().kind();
    assert_eq!(kind, io::ErrorKind::InvalidInput, "it is the caller's to mend");
    assert!(say(&scratch.0.join("no/where")).contains("make the folder"));
    let path = scratch.socket();
    let (first, _) = listen_at(&path).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    assert!(say(&path).contains("another program listens"), "{}", say(&path));
    // One that was left behind is replaced.
    drop(first);
    listen_at(&path).unwrap();
}
