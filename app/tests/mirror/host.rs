//! A host of the volume that knows of every block what was acknowledged and what is under way.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use nvmf::host::{Completion, Connector, Controller, IoQueue, Options, Polled};
use nvmf::tcp::host_transport::TcpConnector;
use reactor::net::OsNetwork;
use reactor::time::OsClock;
use reactor::{Buffers, Clock};

use crate::common::wait_for;

pub const VOLUME: &str = "nqn.2026-11.io.example:mirror";
pub const BLOCK: usize = 4096;
/// In the number of a command: it reads.
const READ: u64 = 1 << 32;
/// Commands outstanding.
const DEPTH: usize = 16;

/// What blocks have to be: the stamp that was acknowledged last, and one that may have come after it.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    acknowledged: HashMap<u64, u64>,
    under_way: HashMap<u64, u64>,
    next: u64,
}

fn block(lba: u64, stamp: u64) -> Vec<u8> {
    if stamp == 0 {
        return vec![0; BLOCK];
    }
    [stamp, lba].map(u64::to_le_bytes).concat().repeat(BLOCK / 16)
}

impl Ledger {
    /// Whether `data`, all of the blocks from `first`, may be. What was under way is known from then on.
    #[track_caller]
    pub fn check(&mut self, first: u64, data: &[u8]) {
        for (lba, found) in (first..).zip(data.chunks(BLOCK)) {
            let last = self.acknowledged.get(&lba).copied().unwrap_or(0);
            let stamp = match self.under_way.remove(&lba) {
                Some(newer) if found == block(lba, newer) => newer,
                _ => last,
            };
            let says = u64::from_le_bytes(found[..8].try_into().unwrap());
            assert!(found == block(lba, stamp), "block {lba}: {says} instead of {stamp}");
            self.acknowledged.insert(lba, stamp);
        }
    }
}

/// A connection to the volume.
pub struct Host {
    clock: OsClock,
    _controller: Controller,
    queue: IoQueue,
    done: Vec<Completion>,
}

impl Host {
    #[track_caller]
    pub fn connect(port: u16) -> Host {
        let connector: Arc<dyn Connector> = Arc::new(TcpConnector {
            network: Arc::new(OsNetwork),
            address: ([127, 0, 0, 1], port).into(),
            header_digest: true,
            data_digest: true,
        });
        let clock = OsClock::default();
        let options = Options {
            subnqn: VOLUME.into(),
            hostnqn: "nqn.2026-11.io.example:host".into(),
            hostid: [9; 16],
            // It is polled while commands are under way only.
            kato_ms: 0,
            io_depth: DEPTH as u16,
            ..Options::default()
        };
        let mut controller = Controller::new(connector, options, 0, clock.now());
        wait_for("the volume's controller", || {
            controller.poll(clock.now(), &mut Polled);
            assert_ne!(controller.state(), nvmf::host::State::Down, "{:?}", controller.error());
            controller.is_live().then_some(())
        });
        let params = controller.queue_params(1).expect("it is live");
        let mut queue = IoQueue::connect(params, 1, clock.now()).expect("a socket");
        let mut done = Vec::new();
        wait_for("an I/O queue", || {
            queue.poll(clock.now(), &mut Polled, &mut done).expect("it connects");
            queue.is_live().then_some(())
        });
        Host { clock, _controller: controller, queue, done }
    }

    /// Everything that has completed: which, and its data. `None`: the connection is over.
    fn completed(&mut self) -> Option<Vec<(u64, Vec<u8>)>> {
        self.queue.send().ok()?;
        self.queue.poll(self.clock.now(), &mut Polled, &mut self.done).ok()?;
        assert!(self.queue.take_overdue().is_none(), "a command takes longer than half a minute");
        let take = |done: Completion| {
            assert!(done.cqe.status().is_success(), "command {} ended with {:?}", done.user, done.cqe.status());
            (done.user, done.data.to_vec())
        };
        Some(self.done.drain(..).map(take).collect())
    }

    /// Reads blocks and compares them with the ledger.
    #[track_caller]
    pub fn check(&mut self, ledger: &mut Ledger, blocks: Range<u64>) {
        for first in blocks.clone().step_by(32) {
            let count = 32.min(blocks.end - first);
            let data = Buffers::heap(count as usize * BLOCK);
            self.queue.read(first, 1, first, count as u32, data, self.clock.now());
            let data = wait_for("a read", || self.completed().expect("the server lives").pop());
            ledger.check(first, &data.1);
        }
    }

    /// Writes the blocks in turn, and reads every third back, until told to stop or the server is gone.
    fn write(&mut self, ledger: &mut Ledger, blocks: Range<u64>, stop: &AtomicBool, written: &AtomicU64) {
        let mut turn = blocks.clone().cycle();
        let mut reading = HashSet::new();
        let mut out = 0;
        loop {
            let stopping = stop.load(Ordering::Acquire);
            while out < DEPTH && !stopping && self.queue.can_submit() {
                // Nothing overlaps, so that it is known what a read has to find. The ranges are longer than the queue is deep.
                let lba = turn.next().expect("it has no end");
                if reading.contains(&lba) || ledger.under_way.contains_key(&lba) {
                    continue;
                }
                ledger.next += 1;
                let data = Buffers::from(&block(lba, ledger.next)[..]);
                ledger.under_way.insert(lba, ledger.next);
                self.queue.write(lba, 1, lba, 1, data, self.clock.now());
                out += 1;
            }
            let Some(done) = self.completed() else { return };
            for (user, data) in done {
                out -= 1;
                if user & READ != 0 {
                    reading.remove(&(user & !READ));
                    ledger.check(user & !READ, &data);
                    continue;
                }
                let stamp = ledger.under_way.remove(&user).expect("it was written");
                ledger.acknowledged.insert(user, stamp);
                written.fetch_add(1, Ordering::AcqRel);
                if stamp.is_multiple_of(3) && !stopping {
                    let data = Buffers::heap(BLOCK);
                    reading.insert(user);
                    self.queue.read(user | READ, 1, user, 1, data, self.clock.now());
                    out += 1;
                }
            }
            if stopping && out == 0 {
                return;
            }
        }
    }
}

/// A host that writes in the background.
pub struct Writer {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: JoinHandle<Ledger>,
}

impl Writer {
    /// Writes these blocks in turn, over and over.
    pub fn start(port: u16, mut ledger: Ledger, blocks: Range<u64>) -> Writer {
        let (stop, written) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&written));
        let thread = std::thread::spawn(move || {
            let mut host = Host::connect(port);
            host.write(&mut ledger, blocks, &stopped, &count);
            ledger
        });
        Writer { stop, written, thread }
    }

    /// Waits until so many more writes are acknowledged.
    #[track_caller]
    pub fn until_written(&self, more: u64) {
        let wanted = self.written.load(Ordering::Acquire) + more;
        wait_for("writes to be acknowledged", || {
            assert!(!self.thread.is_finished(), "the writer has lost its server");
            (self.written.load(Ordering::Acquire) >= wanted).then_some(())
        });
    }

    /// Lets what is under way end.
    pub fn stop(self) -> Ledger {
        self.stop.store(true, Ordering::Release);
        self.lose()
    }

    /// Its server was killed: what it knows.
    pub fn lose(self) -> Ledger {
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
