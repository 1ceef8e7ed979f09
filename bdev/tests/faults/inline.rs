//! An inline handler that does wrong, by the block that is read.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use appliance::{Capabilities, Handler, Inline, IoStatus, Request, Worker, WorkerCx};
use reactor::ReactorId;
use reactor::file::EngineChoice;
use ringstone_bdev::conformance::{Client, World, WorldConfig};
use ringstone_bdev::core::Op;
use ringstone_bdev::modules::appliance::settings::Settings;
use ringstone_bdev::modules::appliance::{create_with, delete, stats};

use super::Logged;

type Kept = Arc<Mutex<Vec<Request>>>;

#[derive(Clone)]
struct Wrong(Kept);

impl Handler for Wrong {
    fn name(&self) -> &str {
        "wrong"
    }
    fn capabilities(&self, _: &appliance::Geometry) -> Capabilities {
        Capabilities::BASIC
    }
    fn worker(&self, _: WorkerCx) -> io::Result<Box<dyn Worker>> {
        Err(io::Error::other("it has none"))
    }
    fn inline(&self, _: ReactorId) -> Option<io::Result<Box<dyn Inline>>> {
        Some(Ok(Box::new(self.clone())))
    }
    fn resize(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

impl Inline for Wrong {
    fn handle(&mut self, mut request: Request) {
        let bytes = request.bufs().len() as u64;
        match request.lba() {
            1 => drop(request),
            2 => request.complete_with(IoStatus::Success, bytes + 1),
            3 => {
                request.bufs_mut().truncate(1);
                request.complete(IoStatus::Success);
            }
            4 => panic!("a habit"),
            // It must not, but a thread of its own may have it.
            5 => self.0.lock().unwrap().push(request),
            _ => request.complete(IoStatus::Success),
        }
    }
}

#[test]
fn an_inline_handler_that_does_wrong_fails_its_own_requests() {
    let logged = Logged::begin();
    let mut world = World::on_host(EngineChoice::Threads, WorldConfig::default());
    let system = Arc::clone(world.system());
    let mut settings = Settings::new("wrong", 512, 64);
    (settings.workers, settings.queue_depth) = (0, 2);
    settings.timeout = Some(Duration::from_millis(2500));
    let kept = Kept::default();
    let handler = Arc::new(Wrong(Arc::clone(&kept)));
    let bdev = world.block_on(create_with(&system, "app", None, settings, handler)).unwrap();
    let mut client = Client::open(&mut world, 0, &bdev);
    for (lba, status, words) in [
        (0, IoStatus::Success, None),
        (1, IoStatus::Failed, Some("was dropped")),
        (2, IoStatus::Failed, Some("with a length of 513")),
        (3, IoStatus::Failed, Some("with a length of 1 ")),
        (4, IoStatus::Failed, Some("was lost in a panic")),
    ] {
        assert_eq!(client.run(&mut world, Op::Read, lba, 1, &[0; 512]).status, status, "block {lba}");
        if let Some(words) = words {
            let lba = format!("lba={lba}");
            logged.assert_line(&[words, "bdev=\"app\"", "handler=\"wrong\"", "request=", "op=\"read\"", &lba]);
        }
    }
    logged.assert_line(&["a handler panicked", "handler=\"wrong\"", "a habit"]);
    world.pass_time(Duration::from_millis(1001));
    // What it keeps takes a place until it comes home; the others go on, in order.
    let lost = client.submit(Op::Read, 5, 1, reactor::Buffers::heap(512));
    for lba in 6..20 {
        assert_eq!(client.run(&mut world, Op::Read, lba, 1, &[0; 512]).status, IoStatus::Success);
    }
    assert!(client.take(lost).is_none());
    world.pass_time(Duration::from_millis(2501));
    assert_eq!(client.wait(&mut world, lost).status, IoStatus::TimedOut);
    logged.assert_line(&["ends without it", "handler=\"wrong\"", "request=", "lba=5", "timed_out"]);
    let request = kept.lock().unwrap().pop().unwrap();
    std::thread::spawn(move || request.complete(IoStatus::Success)).join().unwrap();
    (0..10).for_each(|_| world.step());
    assert_eq!(stats(&system, "app").unwrap()["late"], 1);
    // Another one comes home after the delete.
    let last = client.submit(Op::Read, 5, 1, reactor::Buffers::heap(512));
    world.step_until("it to be kept", |_| kept.lock().unwrap().len() == 1);
    world.pass_time(Duration::from_millis(2501));
    assert_eq!(client.wait(&mut world, last).status, IoStatus::TimedOut);
    client.close();
    drop(bdev);
    world.block_on(delete(&system, "app")).unwrap();
    let request = kept.lock().unwrap().pop().unwrap();
    request.complete(IoStatus::Success);
    world.assert_clean();
}
