//! Handlers that do wrong, one wrong at a time: what the host sees, what the log says, and that nothing is lost.

#[path = "faults/c.rs"]
mod c;
#[path = "faults/inline.rs"]
mod inline;
#[path = "faults/log.rs"]
mod log;

use std::cell::RefCell;
use std::fmt::Write;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Once};
use std::time::Duration;

use appliance::{Batch, Capabilities, Handler, Inline, Request, RequestId, Worker, WorkerCx};
use reactor::file::EngineChoice;
use reactor::{Buffers, ReactorId};
use ringstone_bdev::conformance::rogue::{Habits, Rogue};
use ringstone_bdev::conformance::{Client, World, WorldConfig};
use ringstone_bdev::core::{BdevError, BdevInfo, BdevSystem, IoStatus, Op};
use ringstone_bdev::modules::appliance::settings::Settings;
use ringstone_bdev::modules::appliance::{create, create_with, delete, resize, stats};
use serde_json::Value;

thread_local! {
    static LOG: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps what each thread logs. One for the process: subscribers that come and go with the tests make others miss lines.
struct PerThread;

/// What was logged on this thread since its making.
struct Logged;

struct Fields<'a>(&'a mut String);

impl tracing::field::Visit for Fields<'_> {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        let _ = write!(self.0, "{}={value:?} ", field.name());
    }
}

impl tracing::Subscriber for PerThread {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        LOG.with_borrow_mut(|text| {
            event.record(&mut Fields(text));
            text.push('\n');
        });
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

impl Logged {
    fn begin() -> Logged {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| tracing::subscriber::set_global_default(PerThread).expect("the only one"));
        LOG.with_borrow_mut(String::clear);
        Logged
    }

    /// Checks that one line has all of `words`.
    fn assert_line(&self, words: &[&str]) {
        let text = LOG.with_borrow(String::clone);
        let found = text.lines().any(|line| words.iter().all(|word| line.contains(word)));
        assert!(found, "no line with {words:?} in\n{text}");
    }
}

const BLOCKS: u64 = 256;

struct Bench {
    world: World,
    system: Arc<BdevSystem>,
    rogue: Arc<Rogue>,
    bdev: Option<Arc<BdevInfo>>,
    client: Option<Client>,
    logged: Logged,
}

impl Bench {
    fn new(habits: Habits, change: impl FnOnce(&mut Settings)) -> Bench {
        let logged = Logged::begin();
        let mut world = World::on_host(EngineChoice::Threads, WorldConfig::default());
        let system = Arc::clone(world.system());
        let rogue = Rogue::new(512, BLOCKS, habits).unwrap();
        let mut settings = Settings::new("rogue", 512, BLOCKS);
        settings.timeout = Some(Duration::from_millis(50));
        settings.latency_sample = 1;
        change(&mut settings);
        let handler = Arc::clone(&rogue) as Arc<dyn Handler>;
        let bdev = world.block_on(create_with(&system, "app", None, settings, handler)).unwrap();
        let client = Client::open(&mut world, 0, &bdev);
        Bench { world, system, rogue, bdev: Some(bdev), client: Some(client), logged }
    }

    fn client(&mut self) -> &mut Client {
        self.client.as_mut().unwrap()
    }

    /// Submits a read with payload memory of the reactor's pool.
    fn submit_read(&mut self, lba: u64) -> u64 {
        let bufs = self.world.runtime(0).borrow_mut().pool().alloc(512).unwrap();
        self.client().submit(Op::Read, lba, 1, bufs)
    }

    fn read(&mut self, lba: u64) -> IoStatus {
        let mark = self.submit_read(lba);
        self.wait(mark)
    }

    fn wait(&mut self, mark: u64) -> IoStatus {
        let client = self.client.as_mut().unwrap();
        client.wait(&mut self.world, mark).status
    }

    fn steps(&mut self, count: usize) {
        (0..count).for_each(|_| self.world.step());
    }

    fn pass(&mut self, ms: u64) {
        self.world.pass_time(Duration::from_millis(ms));
        self.steps(3);
    }

    fn number(&self, name: &str) -> u64 {
        stats(&self.system, "app").unwrap()[name].as_u64().unwrap_or_else(|| panic!("there is no number '{name}'"))
    }

    /// Deletes the device and checks that nothing is out.
    fn finish(mut self) {
        self.rogue.release();
        let told = self.rogue.told();
        if let Some(client) = self.client.take() {
            client.close();
        }
        self.bdev = None;
        if self.system.get("app").is_ok() {
            self.world.block_on(delete(&self.system, "app")).unwrap();
        }
        self.world.assert_clean();
        assert!(told.stopped.load(Ordering::Acquire), "the handler was not stopped");
        assert_eq!(Arc::strong_count(&self.rogue), 1, "somebody keeps the handler");
    }
}

#[test]
fn a_request_that_is_dropped_fails() {
    let mut bench = Bench::new(Habits { leak: 1, ..Habits::default() }, |_| {});
    assert_eq!(bench.read(7), IoStatus::Failed);
    bench.logged.assert_line(&["was dropped", "bdev=\"app\"", "handler=\"rogue\"", "request=", "op=\"read\"", "lba=7"]);
    assert_eq!(bench.number("faults"), 1);
    bench.rogue.set_habits(Habits::default());
    assert_eq!(bench.read(7), IoStatus::Success);
    bench.finish();
}

#[test]
fn a_request_of_the_wrong_length_fails() {
    for habits in [Habits { wrong_length: 1, ..Habits::default() }, Habits { truncate: 1, ..Habits::default() }] {
        let mut bench = Bench::new(habits, |_| {});
        assert_eq!(bench.read(9), IoStatus::Failed);
        bench.logged.assert_line(&["with a length of", "handler=\"rogue\"", "request=", "lba=9"]);
        let done = {
            let client = bench.client.as_mut().unwrap();
            client.run(&mut bench.world, Op::Write { fua: false }, 3, 2, &[1; 1024])
        };
        assert_eq!(done.status, IoStatus::Failed);
        bench.rogue.set_habits(Habits::default());
        assert_eq!(bench.read(9), IoStatus::Success);
        bench.finish();
    }
}

#[test]
fn a_panic_costs_the_request_in_hand_and_nothing_else() {
    let mut bench = Bench::new(Habits { panic: 1, ..Habits::default() }, |settings| settings.timeout = None);
    let first = bench.submit_read(1);
    bench.world.step_until("the panic", |_| bench.rogue.told().taken.load(Ordering::Relaxed) == 1);
    bench.rogue.set_habits(Habits::default());
    assert_eq!(bench.wait(first), IoStatus::Failed);
    bench.logged.assert_line(&["a handler panicked", "handler=\"rogue\"", "a habit"]);
    bench.logged.assert_line(&["was lost in a panic", "request=", "lba=1"]);
    // What comes next waits for the worker to be made again, which takes a second.
    let second = bench.submit_read(2);
    bench.steps(100);
    assert!(bench.client().take(second).is_none());
    bench.pass(1100);
    assert_eq!(bench.wait(second), IoStatus::Success);
    assert_eq!(bench.rogue.told().made.load(Ordering::Relaxed), 2);
    bench.finish();
}

#[test]
fn a_lost_request_times_out_and_others_go_on() {
    let mut bench = Bench::new(Habits { lose: 1, ..Habits::default() }, |_| {});
    let lost = bench.submit_read(5);
    bench.world.step_until("the loss", |_| bench.rogue.lost() == 1);
    bench.rogue.set_habits(Habits::default());
    assert_eq!(bench.read(6), IoStatus::Success);
    assert!(bench.client().take(lost).is_none());
    bench.pass(60);
    assert_eq!(bench.wait(lost), IoStatus::TimedOut);
    bench.logged.assert_line(&["ends without it", "handler=\"rogue\"", "request=", "lba=5", "timed_out"]);
    assert!(bench.rogue.told().aborts.load(Ordering::Relaxed) > 0, "the handler is told");
    assert_eq!((bench.number("timed_out"), bench.number("overdue"), bench.number("late")), (1, 1, 0));
    assert!(!bench.world.runtime(0).borrow_mut().pool().is_whole(), "the handler still has the payload");
    // It comes home late: counted, and its memory and its place are there again.
    assert_eq!(bench.rogue.release(), 1);
    bench.steps(10);
    assert_eq!((bench.number("overdue"), bench.number("late")), (0, 1));
    assert!(bench.world.runtime(0).borrow_mut().pool().is_whole());
    bench.logged.assert_line(&["had ended without it", "request=", "lba=5"]);
    bench.finish();
}

/// When every place is lost, everything waits for its deadline; when they come back, all is as before.
#[test]
fn lost_requests_may_take_every_place() {
    let mut bench = Bench::new(Habits { lose: 1, ..Habits::default() }, |settings| settings.queue_depth = 4);
    let marks: Vec<u64> = (0..9).map(|lba| bench.submit_read(lba)).collect();
    bench.world.step_until("the losses", |_| bench.rogue.lost() == 4);
    bench.rogue.set_habits(Habits::default());
    bench.steps(50);
    assert_eq!((bench.number("with_handler"), bench.number("waiting")), (4, 5));
    bench.pass(60);
    for mark in marks {
        assert_eq!(bench.wait(mark), IoStatus::TimedOut);
    }
    let late = bench.submit_read(3);
    bench.steps(50);
    assert!(bench.client().take(late).is_none(), "there is no place");
    assert_eq!((bench.number("overdue"), bench.number("waiting")), (4, 1));
    bench.rogue.release();
    assert_eq!(bench.wait(late), IoStatus::Success);
    bench.finish();
}

#[test]
fn a_full_ring_queues_in_order() {
    for depth in [1, 3] {
        let hold = Habits { hold: 1, hold_ns: 1, ..Habits::default() };
        let mut bench = Bench::new(hold, |settings| settings.queue_depth = depth);
        let marks: Vec<u64> = (0..20).map(|lba| bench.submit_read(lba)).collect();
        let client = bench.client.as_mut().unwrap();
        client.wait_all(&mut bench.world);
        let order = client.take_order();
        if depth == 1 {
            assert_eq!(order, marks);
        }
        // Of what is with the handler at once, any may be first; but nothing overtakes what waits.
        for (position, mark) in order.iter().enumerate() {
            assert!((*mark as usize) < position + 1 + depth, "{mark} came home as number {position}");
        }
        assert!(marks.iter().all(|&mark| client.take(mark).unwrap().status == IoStatus::Success));
        bench.finish();
    }
}

#[test]
fn aborts_reach_what_waits_and_what_the_handler_holds() {
    let hold = Habits { hold: 1, hold_ns: 1 << 50, ..Habits::default() };
    let mut bench = Bench::new(hold, |settings| (settings.queue_depth, settings.timeout) = (2, None));
    let marks: Vec<u64> = (0..4).map(|lba| bench.submit_read(lba)).collect();
    bench.world.step_until("two to be held", |_| bench.rogue.told().taken.load(Ordering::Relaxed) == 2);
    assert!(bench.client().abort(marks[3]), "it waits, and ends at once");
    assert_eq!(bench.wait(marks[3]), IoStatus::Aborted);
    bench.client().abort(marks[0]);
    assert_eq!(bench.wait(marks[0]), IoStatus::Aborted);
    assert!(bench.client().take(marks[1]).is_none());
    bench.client().abort(marks[1]);
    assert_eq!(bench.wait(marks[1]), IoStatus::Aborted);
    bench.world.step_until("the third to be held", |_| bench.rogue.told().taken.load(Ordering::Relaxed) == 3);
    bench.client().abort(marks[2]);
    assert_eq!(bench.wait(marks[2]), IoStatus::Aborted);
    bench.finish();
}

#[test]
fn a_reset_reaches_the_handler_and_does_not_wait_for_ever() {
    for deaf in [false, true] {
        let hold = Habits { hold: 1, hold_ns: 1 << 50, deaf, ..Habits::default() };
        let mut bench = Bench::new(hold, |settings| (settings.queue_depth, settings.timeout) = (3, None));
        let marks: Vec<u64> = (0..5).map(|lba| bench.submit_read(lba)).collect();
        bench.world.step_until("three to be held", |_| bench.rogue.told().taken.load(Ordering::Relaxed) == 3);
        let reset = bench.client().submit(Op::Reset, 0, 0, Buffers::new());
        if deaf {
            bench
                .world
                .step_until("the handler to be told", |_| bench.rogue.told().resets.load(Ordering::Relaxed) == 1);
            bench.steps(20);
            assert!(bench.client().take(reset).is_none());
            bench.pass(510);
        }
        assert_eq!(bench.wait(reset), IoStatus::Success);
        for mark in marks {
            assert_eq!(bench.wait(mark), IoStatus::Aborted);
        }
        bench.rogue.set_habits(Habits::default());
        if !deaf {
            assert_eq!(bench.read(1), IoStatus::Success);
        } else {
            assert_eq!(bench.number("overdue"), 3);
        }
        bench.finish();
    }
}

/// A removal does not wait for a handler that does not end its requests; what it ends afterwards is nobody's.
#[test]
fn requests_come_home_after_the_delete() {
    let habits = Habits { lose: 2, deaf: true, ..Habits::default() };
    let mut bench = Bench::new(habits, |settings| (settings.workers, settings.timeout) = (2, None));
    let mut second = Client::open(&mut bench.world, 1, &bench.bdev.clone().unwrap());
    for lba in 0..40 {
        bench.submit_read(lba * 6);
        second.submit(Op::Write { fua: false }, lba, 1, Buffers::heap(512));
    }
    bench.world.step_until("all to be taken", |_| bench.rogue.told().taken.load(Ordering::Relaxed) == 80);
    let system = Arc::clone(&bench.system);
    let deleted = bench.world.start(async move { delete(&system, "app").await });
    let mut first = bench.client.take().unwrap();
    bench.world.step_until("the clients to be told", |_| first.is_told_of_removal() && second.is_told_of_removal());
    bench.steps(20);
    assert!(first.outstanding() > 0 && bench.rogue.lost() > 10);
    bench.world.pass_time(Duration::from_millis(510));
    first.wait_all(&mut bench.world);
    second.wait_all(&mut bench.world);
    first.close();
    second.close();
    bench.bdev = None;
    bench.world.step_until("the delete", |_| !deleted.is_pending());
    deleted.take().unwrap().unwrap();
    assert!(bench.system.get("app").is_err());
    assert!(!bench.world.runtime(0).borrow_mut().pool().is_whole(), "the handler still has payload");
    // Another device may have the name at once.
    let again = bench.world.block_on(create(&bench.system, "app", None, Settings::new("memory", 512, 64))).unwrap();
    assert!(bench.rogue.release() > 10);
    assert!(bench.world.runtime(0).borrow_mut().pool().is_whole(), "payload came home to its pool");
    drop(again);
    bench.world.block_on(delete(&bench.system, "app")).unwrap();
    bench.finish();
}

/// A thread that hangs cannot be simulated by one that returns: here the worker is not stepped at all, as its thread
/// would be, and what it would have begun later is ended without the handler.
#[test]
fn what_was_given_up_is_not_begun() {
    let refuse = Habits { refuse: 1, ..Habits::default() };
    let mut bench = Bench::new(refuse, |settings| settings.timeout = Some(Duration::from_millis(900)));
    bench.client.as_mut().unwrap().submit(Op::Write { fua: false }, 3, 1, Buffers::from(&[7; 512][..]));
    bench.steps(30);
    let reset = bench.client().submit(Op::Reset, 0, 0, Buffers::new());
    assert_eq!(bench.wait(reset), IoStatus::Success, "what was offered and not taken ends at once");
    bench.rogue.set_habits(Habits::default());
    let client = bench.client.as_mut().unwrap();
    assert_eq!(client.read(&mut bench.world, 3, 1), [0; 512], "a write from before the reset has happened");
    bench.finish();
}

#[test]
fn latencies_are_kept_by_stage() {
    let hold = Habits { hold: 1, hold_ns: 1_000_000, seed: 5, ..Habits::default() };
    let mut bench = Bench::new(hold, |_| {});
    for lba in 0..50 {
        assert_eq!(bench.read(lba), IoStatus::Success);
    }
    let all = stats(&bench.system, "app").unwrap();
    for stage in ["in_ring", "in_handler", "going_home"] {
        assert_eq!(all["latency"][stage]["count"], 50, "{stage}");
    }
    let p50 = |stage: &str| all["latency"][stage]["p50_ns"].as_u64().unwrap();
    // It holds them for half a millisecond; a ring takes a few steps of a microsecond.
    assert!(p50("in_handler") > 100_000 && p50("in_ring") < 50_000 && p50("going_home") < 50_000, "{all}");
    bench.finish();
}

#[test]
fn a_handler_may_refuse_a_size() {
    let mut bench = Bench::new(Habits::default(), |_| {});
    let error = bench.world.block_on(resize(&bench.system, "app", 1 << 40)).unwrap_err();
    assert!(matches!(&error, BdevError::Invalid { field: "num_blocks", .. }), "{error}");
    assert_eq!(bench.bdev.as_ref().unwrap().device().geometry().num_blocks, BLOCKS);
    bench.world.block_on(resize(&bench.system, "app", 2 * BLOCKS)).unwrap();
    assert_eq!(bench.read(2 * BLOCKS - 1), IoStatus::Success);
    bench.finish();
}

/// A handler whose making, ending or objects fail.
struct Broken {
    worker: fn() -> io::Result<Box<dyn Worker>>,
}

impl Handler for Broken {
    fn name(&self) -> &str {
        "broken"
    }
    fn capabilities(&self, _: &appliance::Geometry) -> Capabilities {
        Capabilities::BASIC
    }
    fn worker(&self, _: WorkerCx) -> io::Result<Box<dyn Worker>> {
        (self.worker)()
    }
    fn inline(&self, _: ReactorId) -> Option<io::Result<Box<dyn Inline>>> {
        Some(Ok(Box::new(PanicsOnce)))
    }
    fn resize(&self, _: u64) -> io::Result<()> {
        panic!("no size is right")
    }
    fn stats(&self) -> Value {
        panic!("nobody counts")
    }
    fn stop(&self) {
        panic!("never stop")
    }
}

/// Panics on block 13.
struct PanicsOnce;

impl Inline for PanicsOnce {
    fn handle(&mut self, request: Request) {
        assert!(request.lba() != 13, "bad luck");
        request.complete(IoStatus::Success);
    }
}

struct PanicsAlways;

impl Worker for PanicsAlways {
    fn submit(&mut self, _: &mut Batch) {
        panic!("not that");
    }
    fn abort(&mut self, _: RequestId) {
        panic!("nor that");
    }
    fn reset(&mut self) {
        panic!("nor this");
    }
}

impl Drop for PanicsAlways {
    fn drop(&mut self) {
        panic!("even at the end");
    }
}

#[test]
fn a_worker_that_cannot_be_made_is_an_error() {
    let mut world = World::on_host(EngineChoice::Threads, WorldConfig::default());
    let system = Arc::clone(world.system());
    for (worker, text) in [
        ((|| Err(io::Error::other("no luck"))) as fn() -> io::Result<Box<dyn Worker>>, "no luck"),
        (|| panic!("worse"), "worse"),
    ] {
        let mut settings = Settings::new("broken", 512, 64);
        settings.workers = 3;
        let error =
            world.block_on(create_with(&system, "app", None, settings, Arc::new(Broken { worker }))).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        world.assert_clean();
    }
}

#[test]
fn a_handler_that_always_panics_loses_only_its_own() {
    let mut world = World::on_host(EngineChoice::Threads, WorldConfig::default());
    let system = Arc::clone(world.system());
    let mut settings = Settings::new("broken", 512, 64);
    settings.timeout = Some(Duration::from_millis(2500));
    let handler = Arc::new(Broken { worker: || Ok(Box::new(PanicsAlways)) });
    let bdev = world.block_on(create_with(&system, "app", None, settings, handler)).unwrap();
    let mut client = Client::open(&mut world, 0, &bdev);
    // What it does not take from the batch is offered again and again, until its deadline.
    let mark = client.submit(Op::Read, 0, 1, Buffers::heap(512));
    for _ in 0..3 {
        (0..20).for_each(|_| world.step());
        assert!(client.take(mark).is_none());
        world.pass_time(Duration::from_millis(1000));
    }
    assert_eq!(client.wait(&mut world, mark).status, IoStatus::TimedOut);
    assert!(world.block_on(resize(&system, "app", 99)).unwrap_err().to_string().contains("no size is right"));
    assert!(stats(&system, "app").unwrap()["backend"]["handler"].is_null());
    client.close();
    drop(bdev);
    world.block_on(delete(&system, "app")).unwrap();
    world.assert_clean();
}

#[test]
fn an_inline_handler_that_panics_is_made_again() {
    let mut world = World::on_host(EngineChoice::Threads, WorldConfig::default());
    let system = Arc::clone(world.system());
    let mut settings = Settings::new("broken", 512, 64);
    settings.workers = 0;
    let handler = Arc::new(Broken { worker: || Ok(Box::new(PanicsAlways)) });
    let bdev = world.block_on(create_with(&system, "app", None, settings, handler)).unwrap();
    let mut client = Client::open(&mut world, 1, &bdev);
    assert_eq!(client.run(&mut world, Op::Read, 12, 1, &[0; 512]).status, IoStatus::Success);
    assert_eq!(client.run(&mut world, Op::Read, 13, 1, &[0; 512]).status, IoStatus::Failed);
    let mark = client.submit(Op::Read, 14, 1, Buffers::heap(512));
    (0..50).for_each(|_| world.step());
    assert!(client.take(mark).is_none());
    world.pass_time(Duration::from_millis(1001));
    assert_eq!(client.wait(&mut world, mark).status, IoStatus::Success);
    client.close();
    drop(bdev);
    world.block_on(delete(&system, "app")).unwrap();
    world.assert_clean();
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let mut world = World::on_host(EngineChoice::Threads, WorldConfig::default());
    let system = Arc::clone(world.system());
    type Change = fn(&mut Settings);
    let changes: &[(&str, Change)] = &[
        ("handler", |settings| settings.handler = "nobody".into()),
        ("handler", |settings| settings.handler = String::new()),
        ("queue_depth", |settings| settings.queue_depth = 0),
        ("workers", |settings| settings.workers = 1000),
        ("options", |settings| settings.options = serde_json::json!({ "size": 3 })),
        ("options", |settings| settings.options = serde_json::json!(3)),
        ("block_size", |settings| settings.geometry.block_size = 513),
        ("num_blocks", |settings| settings.geometry.num_blocks = 0),
    ];
    for (wrong, change) in changes {
        let mut settings = Settings::new("memory", 512, 64);
        change(&mut settings);
        let error = world.block_on(create(&system, "app", None, settings)).unwrap_err();
        assert!(matches!(&error, BdevError::Invalid { field, .. } if field == wrong), "{wrong}: {error}");
    }
    world.assert_clean();
}
