//! Requests at random over a base that ends its operations in any order, until the power fails; then again.
//!
//! # What is checked
//! A read finds the last write that had ended when it was submitted, or a later one. After a power failure each block has what was
//! last made durable, or something later; never anything else. When no write has failed, what is found is moreover what was there
//! at one moment: all writes up to it, in the order of their submission, and none behind it.

use super::super::engine::{Done, Engine, LogOp, Request};
use super::super::recovery::Config;
use super::{Disk, config, contents, open, seeds, settle, stamp_of};
use crate::conformance::Rng;
use crate::core::IoStatus;
use reactor::Buffers;

/// Seeds that found something once.
const REGRESSIONS: &[u64] = &[568, 2808];

/// A write of one block: its place in the order of all writes, and what was written.
type Written = (u64, u64);

struct Block {
    history: Vec<Written>,
    /// The latest that is known to be in force.
    ended: u64,
    /// The latest that is known to be durable.
    durable: u64,
}

enum Waiting {
    Read { lba: u64, floors: Vec<u64> },
    Write { lba: u64, blocks: u64, last: u64, fua: bool },
    Flush { floors: Vec<u64> },
}

struct World {
    rng: Rng,
    disk: Disk,
    config: Config,
    engine: Engine,
    blocks: Vec<Block>,
    waiting: Vec<(u64, Waiting)>,
    order: u64,
    next_tag: u64,
    one_in: u64,
    had_failures: bool,
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = Rng::new(seed);
        let block_size = if rng.one_in(3) { 512 } else { 4096 };
        let segments = 12 + rng.below(20);
        let physical = segments * 65536 / u64::from(block_size);
        // Some fit easily, some do not fit at all.
        let num_blocks = 10 + rng.below((physical * 3 / 2).min(700));
        let mut disk = Disk::new(131_072 + 65536 * segments as usize, !rng.one_in(4));
        let mut config = config(&disk, block_size, num_blocks);
        config.compress = !rng.one_in(5);
        let one_in = if rng.one_in(3) { 20 + rng.below(200) } else { 0 };
        let engine = open(&mut disk, &config);
        let blocks = (0..num_blocks).map(|_| Block { history: vec![(0, 0)], ended: 0, durable: 0 }).collect();
        World {
            rng,
            disk,
            config,
            engine,
            blocks,
            waiting: Vec::new(),
            order: 0,
            next_tag: 0,
            one_in,
            had_failures: false,
        }
    }

    fn submit(&mut self) {
        let count = self.blocks.len() as u64;
        let hot = if self.rng.one_in(2) { count.min(20) } else { count };
        let lba = self.rng.below(hot);
        let most = if self.rng.one_in(4) { 40 } else { 3 };
        let blocks = 1 + self.rng.below((count - lba).min(most));
        let range = lba as usize..(lba + blocks) as usize;
        let size = u64::from(self.config.block_size);
        self.next_tag += 1;
        let fua = self.rng.one_in(10);
        let kind = self.rng.below(20);
        let (op, bufs, waiting) = match kind {
            0..6 => {
                let floors = self.blocks[range].iter().map(|block| block.ended).collect();
                (LogOp::Read, Buffers::heap((blocks * size) as usize), Waiting::Read { lba, floors })
            }
            6..8 => {
                let floors = self.blocks.iter().map(|block| block.ended).collect();
                (LogOp::Flush, Buffers::new(), Waiting::Flush { floors })
            }
            _ => {
                let zeroes = kind == 8;
                let mut bytes = Vec::new();
                for index in range {
                    self.order += 1;
                    let stamp = if zeroes || self.rng.one_in(20) { 0 } else { self.order };
                    self.blocks[index].history.push((self.order, stamp));
                    if !zeroes {
                        bytes.extend(contents(stamp, size as usize));
                    }
                }
                let op = if zeroes { LogOp::Zeroes { fua } } else { LogOp::Write { fua } };
                (op, Buffers::from(&bytes[..]), Waiting::Write { lba, blocks, last: self.order, fua })
            }
        };
        let (lba, blocks) = if op == LogOp::Flush { (0, 0) } else { (lba, blocks) };
        self.waiting.push((self.next_tag, waiting));
        self.engine.submit(Request { tag: self.next_tag, op, lba, blocks, bufs });
    }

    fn ended(&mut self, done: Done) {
        let index = self.waiting.iter().position(|(tag, _)| *tag == done.tag).expect("it was submitted, and ends once");
        let (_, waiting) = self.waiting.swap_remove(index);
        let size = self.config.block_size as usize;
        match waiting {
            Waiting::Read { lba, floors } if done.status.is_success() => {
                let bytes = done.bufs.to_vec();
                for ((bytes, floor), index) in bytes.chunks(size).zip(floors).zip(lba as usize..) {
                    self.was_read(index, bytes, floor);
                }
            }
            Waiting::Write { lba, blocks, last, fua } if done.status.is_success() => {
                for (index, order) in (lba..lba + blocks).zip(last + 1 - blocks..) {
                    let block = &mut self.blocks[index as usize];
                    block.ended = block.ended.max(order);
                    if fua || !self.config.base_volatile {
                        block.durable = block.durable.max(order);
                    }
                }
            }
            Waiting::Flush { floors } if done.status.is_success() => {
                for (block, floor) in self.blocks.iter_mut().zip(floors) {
                    block.durable = block.durable.max(floor);
                }
            }
            Waiting::Write { lba, blocks, last, .. } if done.status == IoStatus::Aborted => {
                // It was not begun, and leaves nothing.
                for (index, order) in (lba..lba + blocks).zip(last + 1 - blocks..) {
                    self.blocks[index as usize].history.retain(|written| written.0 != order);
                }
            }
            Waiting::Read { .. } if done.status == IoStatus::Aborted => {}
            Waiting::Write { .. } => {
                let allowed = matches!(done.status, IoStatus::NoSpace) || self.one_in > 0;
                assert!(allowed, "a write failed: {}", done.status);
                self.had_failures = true;
            }
            _ => assert!(self.one_in > 0, "{} without an error below", done.status),
        }
    }

    fn was_read(&mut self, index: usize, bytes: &[u8], floor: u64) {
        let stamp = stamp_of(bytes);
        let block = &mut self.blocks[index];
        let found = block.history.iter().rev().find(|(_, written)| *written == stamp);
        let &(order, _) = found.unwrap_or_else(|| panic!("block {index} has {stamp}, which was never written there"));
        assert!(order >= floor, "block {index} has {stamp} of write {order}, but write {floor} had ended");
        if stamp != 0 {
            block.ended = block.ended.max(order);
        }
    }

    fn step(&mut self) {
        if self.waiting.len() < 12 && self.rng.one_in(2) {
            self.submit();
        }
        if !self.waiting.is_empty() && self.rng.one_in(30) {
            let which = self.rng.below(self.waiting.len() as u64) as usize;
            self.engine.abort(self.waiting[which].0);
        }
        for _ in 0..self.rng.below(4) {
            let Some(io) = self.engine.next_io() else { break };
            self.disk.ask(io);
        }
        if !self.disk.flying.is_empty() && !self.rng.one_in(3) {
            let which = self.rng.below(self.disk.flying.len() as u64) as usize;
            let fails = self.one_in > 0 && self.rng.one_in(self.one_in);
            // A request may fail in part before it ends.
            self.had_failures |= fails;
            let (tag, bufs, result) = self.disk.finish(which, fails.then_some((IoStatus::WriteError, &mut self.rng)));
            self.engine.on_io_done(tag, bufs, result);
        }
        while let Some(done) = self.engine.take_done() {
            self.ended(done);
        }
    }

    /// Lets everything end.
    fn settle(&mut self) {
        for done in settle(&mut self.engine, &mut self.disk) {
            self.ended(done);
        }
        assert!(self.waiting.is_empty(), "{} requests never end: {:?}", self.waiting.len(), self.engine);
        self.engine.check();
    }

    /// Opens the store again and sees what it has.
    fn reopen(&mut self) {
        self.waiting.clear();
        self.engine = open(&mut self.disk, &self.config);
        let (count, size) = (self.blocks.len(), self.config.block_size as usize);
        let bufs = Buffers::heap(count * size);
        self.engine.submit(Request { tag: 0, op: LogOp::Read, lba: 0, blocks: count as u64, bufs });
        let done = settle(&mut self.engine, &mut self.disk).pop().expect("the read has ended");
        assert_eq!(done.status, IoStatus::Success, "what is found can be read");
        self.engine.check();
        let bytes = done.bufs.to_vec();
        // Moments at which a block had what it has: one more at the first, one less behind the last.
        let mut moments = vec![0i64; self.order as usize + 2];
        for (index, bytes) in bytes.chunks(size).enumerate() {
            let stamp = stamp_of(bytes);
            let block = &mut self.blocks[index];
            let mut found = None;
            for (at, &(order, written)) in block.history.iter().enumerate() {
                let next = block.history.get(at + 1).map_or(self.order + 1, |next| next.0);
                if written == stamp {
                    found = Some(order);
                    moments[order as usize] += 1;
                    moments[next as usize] -= 1;
                }
            }
            let order = found.unwrap_or_else(|| panic!("block {index} has {stamp}, which was never written there"));
            let durable = block.durable;
            assert!(order >= durable, "block {index} has {stamp} of write {order}, but write {durable} was durable");
            block.history = vec![(0, stamp)];
            (block.ended, block.durable) = (0, 0);
        }
        let mut having = 0;
        let consistent = moments.iter().any(|change| {
            having += change;
            having == count as i64
        });
        assert!(consistent || self.had_failures, "this was never the state of all blocks at once");
        self.order = 0;
        self.had_failures = false;
        // Orders start again; so do contents, of which those that are there must not be written anew by chance.
        let top = self.blocks.iter().map(|block| block.history[0].1).max().unwrap_or(0);
        self.order = top;
        for block in &mut self.blocks {
            block.history[0].0 = 0;
        }
    }
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    for _ in 0..1 + world.rng.below(5) {
        let most = if world.rng.one_in(4) { 6000 } else { 600 };
        let steps = world.rng.below(most);
        for _ in 0..steps {
            world.step();
        }
        match world.rng.below(4) {
            // A clean end, and the process is gone.
            0 => world.settle(),
            // The process is killed: what was asked of the base happens, or does not.
            1 => {
                let kept = world.disk.volatile;
                world.disk.volatile = false;
                while !world.disk.flying.is_empty() {
                    let which = world.rng.below(world.disk.flying.len() as u64) as usize;
                    if world.rng.one_in(2) {
                        let _ = world.disk.finish(which, None);
                    } else {
                        world.disk.flying.swap_remove(which);
                    }
                }
                world.disk.settle(u64::MAX);
                world.disk.volatile = kept;
            }
            _ => {
                let mut rng = world.rng.clone();
                world.disk.crash(&mut rng);
                world.rng = rng;
            }
        }
        world.reopen();
    }
    world.settle();
}

#[test]
fn survives_power_failures_at_any_step() {
    seeds(300, REGRESSIONS, run);
}
