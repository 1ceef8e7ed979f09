//! An inbox of a reactor with what is outstanding in it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use reactor::Buffers;

use super::world::World;
use crate::core::runtime::SharedRuntime;
use crate::core::{BdevEvent, BdevInfo, ChannelId, ClientId, Descriptor, IoRequest, IoStatus, IoTag, Op};

/// The end of one operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// How it ended.
    pub status: IoStatus,
    /// Its payload.
    pub bytes: Vec<u8>,
}

/// What a client was told of its device.
#[derive(Debug, Default)]
struct Told {
    removing: AtomicBool,
    resizes: AtomicU64,
}

/// A client of one device on one reactor, with a descriptor of its own.
pub struct Client {
    told: Arc<Told>,
    descriptor: Descriptor,
    runtime: SharedRuntime,
    id: ClientId,
    channel: ChannelId,
    next: u64,
    outstanding: usize,
    done: HashMap<u64, Done>,
    /// Marks in the order of their completion.
    order: Vec<u64>,
}

impl Client {
    /// Opens a channel of `bdev` on `reactor`.
    ///
    /// # Panics
    /// When the device refuses.
    pub fn open(world: &mut World, reactor: usize, bdev: &Arc<BdevInfo>) -> Client {
        let told = Arc::new(Told::default());
        let hear = Arc::clone(&told);
        let on_event = move |event| match event {
            BdevEvent::Removing => hear.removing.store(true, Ordering::Release),
            BdevEvent::Resized => {
                hear.resizes.fetch_add(1, Ordering::AcqRel);
            }
        };
        let descriptor = world.system().open(bdev.name(), true, "a check's client", Arc::new(on_event));
        let descriptor = descriptor.expect("the device can be opened");
        let runtime = world.runtime(reactor);
        let (channel, id) = {
            let mut runtime = runtime.borrow_mut();
            let channel = runtime.get_channel(bdev).expect("a channel can be opened");
            (channel, runtime.add_client())
        };
        Client {
            told,
            descriptor,
            runtime,
            id,
            channel,
            next: 0,
            outstanding: 0,
            done: HashMap::new(),
            order: Vec::new(),
        }
    }

    /// Submits an operation; returns its mark.
    pub fn submit(&mut self, op: Op, lba: u64, blocks: u64, bufs: Buffers) -> u64 {
        self.next += 1;
        let request = IoRequest { op, lba, blocks, bufs, user: self.next };
        self.runtime.borrow_mut().submit(self.channel, self.id, request);
        self.outstanding += 1;
        self.next
    }

    /// Tries to abort the operation of `mark`.
    pub fn abort(&mut self, mark: u64) -> bool {
        self.runtime.borrow_mut().abort(self.channel, IoTag { client: self.id, user: mark })
    }

    /// Takes what has come home, at most `limit`.
    pub fn collect(&mut self, limit: usize) {
        let mut runtime = self.runtime.borrow_mut();
        let mut completions = Vec::new();
        runtime.take_completions(self.id, &mut completions);
        // What is not taken now waits here, with its I/O still drawn from the pool.
        assert!(completions.len() <= limit, "more came home than the check allowed for");
        for completion in completions {
            let done = Done { status: completion.status(), bytes: completion.payload().to_vec() };
            let mark = completion.user();
            assert!(self.done.insert(mark, done).is_none(), "operation {mark} completed twice");
            self.order.push(mark);
            self.outstanding -= 1;
            runtime.recycle(completion);
        }
    }

    /// Whether it has heard that the device is being removed.
    pub fn is_told_of_removal(&self) -> bool {
        self.told.removing.load(Ordering::Acquire)
    }

    /// How often it has heard that the device changed its size.
    pub fn resizes(&self) -> u64 {
        self.told.resizes.load(Ordering::Acquire)
    }

    /// Operations that have not come home.
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// Marks in the order in which their operations came home, since the last call.
    pub fn take_order(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.order)
    }

    /// Takes the end of the operation of `mark`, if it has come home.
    pub fn take(&mut self, mark: u64) -> Option<Done> {
        self.collect(usize::MAX);
        self.done.remove(&mark)
    }

    /// Waits for the operation of `mark`.
    pub fn wait(&mut self, world: &mut World, mark: u64) -> Done {
        let mut done = None;
        world.step_until("an operation", |_| {
            done = self.take(mark);
            done.is_some()
        });
        done.expect("it has just come")
    }

    /// Waits for everything.
    pub fn wait_all(&mut self, world: &mut World) {
        world.step_until("all operations", |_| {
            self.collect(usize::MAX);
            self.outstanding == 0
        });
    }

    /// Submits an operation and waits for it.
    pub fn run(&mut self, world: &mut World, op: Op, lba: u64, blocks: u64, payload: &[u8]) -> Done {
        let mark = self.submit(op, lba, blocks, Buffers::from(payload));
        self.wait(world, mark)
    }

    /// Writes, which must succeed.
    pub fn write(&mut self, world: &mut World, lba: u64, bytes: &[u8]) {
        let block = u64::from(self.runtime.borrow().geometry(self.channel).block_size);
        let done = self.run(world, Op::Write { fua: false }, lba, bytes.len() as u64 / block, bytes);
        assert_eq!(done.status, IoStatus::Success, "write of {} bytes to block {lba}", bytes.len());
    }

    /// Reads, which must succeed.
    pub fn read(&mut self, world: &mut World, lba: u64, blocks: u64) -> Vec<u8> {
        let block = u64::from(self.runtime.borrow().geometry(self.channel).block_size);
        // Not zeroes: a device that leaves the payload alone must not pass.
        let stale = vec![0xa5; (blocks * block) as usize];
        let done = self.run(world, Op::Read, lba, blocks, &stale);
        assert_eq!(done.status, IoStatus::Success, "read of {blocks} blocks from {lba}");
        done.bytes
    }

    /// Gives channel and inbox back. Everything must have come home.
    pub fn close(self) {
        assert_eq!(self.outstanding, 0, "a client closes with operations outstanding");
        let mut runtime = self.runtime.borrow_mut();
        runtime.put_channel(self.channel);
        runtime.remove_client(self.id);
        drop(runtime);
        drop(self.descriptor);
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("id", &self.id).field("outstanding", &self.outstanding).finish_non_exhaustive()
    }
}
