//! Random operations against a model in memory.
//!
//! Many operations are outstanding at once, from every reactor, but none that conflicts with another: then what each must
//! find is known when it is submitted. A block whose contents the device may choose (unmapped on a device that does not
//! promise zeroes) is read by nobody until it has been written again.

use reactor::Buffers;

use super::client::{Client, Done};
use super::rng::Rng;
use super::{Trial, World};
use crate::core::{Geometry, IoStatus, Op, OpKind};

/// Operations in one run.
const OPERATIONS: usize = 1500;
/// Outstanding at once.
const DEPTH: usize = 24;

/// A payload of `bytes` in segments as pools hand them out: multiples of 4096 bytes, the rest last.
pub fn scattered(rng: &mut Rng, bytes: &[u8]) -> Buffers {
    let mut list = Buffers::new();
    let mut at = 0;
    while at < bytes.len() {
        let whole = 4096 * (1 + rng.below(6) as usize);
        let n = if rng.one_in(3) { bytes.len() - at } else { whole.min(bytes.len() - at) };
        let mut segment = reactor::Buffer::heap(n);
        segment.copy_from_slice(&bytes[at..at + n]);
        list.push(segment);
        at += n;
    }
    list
}

/// What the device must contain.
pub struct Model {
    block: usize,
    bytes: Vec<u8>,
    /// Blocks whose contents are the device's choice are not.
    known: Vec<bool>,
    forgets: bool,
}

impl Model {
    /// The model of a device that reads as zeroes everywhere.
    pub fn new(geometry: &Geometry, forgets: bool) -> Model {
        let blocks = geometry.num_blocks as usize;
        let block = geometry.block_size as usize;
        Model { block, bytes: vec![0; blocks * block], known: vec![true; blocks], forgets }
    }

    fn range(&self, lba: u64, blocks: u64) -> std::ops::Range<usize> {
        lba as usize * self.block..(lba + blocks) as usize * self.block
    }

    /// What a read must return.
    pub fn read(&self, lba: u64, blocks: u64) -> Vec<u8> {
        self.bytes[self.range(lba, blocks)].to_vec()
    }

    fn is_known(&self, lba: u64, blocks: u64) -> bool {
        self.known[lba as usize..(lba + blocks) as usize].iter().all(|&known| known)
    }

    /// A write was submitted.
    pub fn write(&mut self, lba: u64, bytes: &[u8]) {
        let blocks = (bytes.len() / self.block) as u64;
        self.known[lba as usize..(lba + blocks) as usize].fill(true);
        if !self.forgets {
            let range = self.range(lba, blocks);
            self.bytes[range].copy_from_slice(bytes);
        }
    }

    fn unmap(&mut self, lba: u64, blocks: u64, zeroes: bool) {
        self.write(lba, &vec![0; blocks as usize * self.block]);
        self.known[lba as usize..(lba + blocks) as usize].fill(zeroes);
    }

    /// Sets the number of blocks; new ones read as zeroes.
    pub fn resize(&mut self, blocks: u64) {
        self.bytes.resize(blocks as usize * self.block, 0);
        self.known.resize(blocks as usize, true);
    }
}

struct Planned {
    op: Op,
    lba: u64,
    blocks: u64,
    payload: Vec<u8>,
    expect: Done,
}

struct Outstanding {
    client: usize,
    mark: u64,
    plan: Planned,
}

impl Outstanding {
    fn conflicts(&self, op: Op, lba: u64, blocks: u64) -> bool {
        let overlaps = |a: (u64, u64), b: (u64, u64)| a.0 < b.0 + b.1 && b.0 < a.0 + a.1;
        let ranges = |op: Op, lba: u64, blocks: u64| {
            let source = if let Op::Copy { source_lba } = op { Some((source_lba, blocks, false)) } else { None };
            source.into_iter().chain(std::iter::once((lba, blocks, op.modifies())))
        };
        ranges(op, lba, blocks).any(|(lba, blocks, writes)| {
            ranges(self.plan.op, self.plan.lba, self.plan.blocks)
                .any(|other| (writes || other.2) && overlaps((lba, blocks), (other.0, other.1)))
        })
    }
}

fn random_range(rng: &mut Rng, geometry: &Geometry) -> (u64, u64) {
    let bytes = match rng.below(8) {
        0 => 300 * 1024,
        1 | 2 => 80 * 1024,
        _ => 12 * 1024,
    };
    let blocks = 1 + rng.below((bytes / u64::from(geometry.block_size)).max(1));
    let lba = match rng.below(10) {
        0 => 0,
        1 => geometry.num_blocks - blocks,
        _ => rng.below(geometry.num_blocks - blocks + 1),
    };
    (lba, blocks)
}

fn random_op(rng: &mut Rng, geometry: &Geometry, lba: u64, blocks: u64) -> Op {
    let fua = rng.one_in(4);
    match rng.below(14) {
        0..=3 => Op::Read,
        4..=6 => Op::Write { fua },
        7 => Op::Flush,
        8 => Op::Unmap,
        9 => Op::WriteZeroes { fua, may_unmap: rng.one_in(2) },
        10 => Op::Compare,
        11 => Op::CompareAndWrite { fua },
        _ => {
            // Half of the copies overlap themselves, one way or the other.
            let last = geometry.num_blocks - blocks;
            let near = rng.below(2 * blocks + 1);
            let source_lba =
                if rng.one_in(2) { (lba + near).saturating_sub(blocks).min(last) } else { rng.below(last + 1) };
            Op::Copy { source_lba }
        }
    }
}

/// What `op` must find and leave, by the model.
fn plan(trial: &mut Trial<'_>, model: &mut Model, op: Op, lba: u64, blocks: u64) -> Planned {
    let geometry = trial.bdev().device().geometry();
    let len = op.payload_bytes(blocks, geometry.block_size) as usize;
    let mut payload = vec![0; len];
    trial.rng.fill(&mut payload);
    let mut status = IoStatus::Success;
    let supported = trial.bdev().supports(op.kind());
    if !supported {
        let expect = Done { status: IoStatus::NotSupported, bytes: payload.clone() };
        return Planned { op, lba, blocks, payload, expect };
    }
    let mut after = None;
    match op {
        Op::Read => after = Some(model.read(lba, blocks)),
        Op::Write { .. } => model.write(lba, &payload),
        Op::Unmap => model.unmap(lba, blocks, geometry.unmap_zeroes),
        Op::WriteZeroes { .. } => model.unmap(lba, blocks, true),
        Op::Compare | Op::CompareAndWrite { .. } => {
            let half = model.read(lba, blocks);
            payload[..half.len()].copy_from_slice(&half);
            if trial.rng.one_in(2) {
                let at = trial.rng.below(half.len() as u64) as usize;
                payload[at] ^= 1 << trial.rng.below(8);
                status = IoStatus::CompareFailed;
            } else if op != Op::Compare {
                model.write(lba, &payload[half.len()..]);
            }
        }
        Op::Copy { source_lba } => {
            let bytes = model.read(source_lba, blocks);
            model.write(lba, &bytes);
        }
        Op::Flush | Op::Reset => {}
    }
    let bytes = after.unwrap_or_else(|| payload.clone());
    Planned { op, lba, blocks, payload, expect: Done { status, bytes } }
}

fn needs_known(op: Op) -> bool {
    matches!(op, Op::Read | Op::Compare | Op::CompareAndWrite { .. } | Op::Copy { .. })
}

/// A client on every reactor.
pub fn clients(trial: &mut Trial<'_>) -> Vec<Client> {
    (0..trial.world.reactor_count()).map(|n| Client::open(trial.world, n, &trial.bdev())).collect()
}

/// Waits for one of `outstanding`, or all, and checks what came home.
fn settle_some(world: &mut World, clients: &mut [Client], outstanding: &mut Vec<Outstanding>, all: bool) {
    let before = outstanding.len();
    world.step_until("operations of the model", |_| {
        outstanding.retain(|io| {
            let Some(done) = clients[io.client].take(io.mark) else { return true };
            let Planned { op, lba, blocks, expect, .. } = &io.plan;
            assert_eq!(done.status, expect.status, "{op:?} of {blocks} blocks at {lba}");
            if let Some(at) = (0..expect.bytes.len()).find(|&at| done.bytes[at] != expect.bytes[at]) {
                panic!(
                    "{op:?} of {blocks} blocks at {lba}: byte {at} is {:#x}, must be {:#x}",
                    done.bytes[at], expect.bytes[at]
                );
            }
            false
        });
        outstanding.is_empty() || !all && outstanding.len() < before
    });
}

/// The check.
pub fn random_operations(trial: &mut Trial<'_>) {
    let geometry = trial.bdev().device().geometry();
    let mut model = Model::new(&geometry, trial.subject.forgets);
    let mut clients = clients(trial);
    run(trial, &mut model, &mut clients, OPERATIONS);
    read_everything(trial, &model, &mut clients[0]);
    clients.into_iter().for_each(Client::close);
}

/// Does `count` random operations.
pub fn run(trial: &mut Trial<'_>, model: &mut Model, clients: &mut [Client], count: usize) {
    let geometry = trial.bdev().device().geometry();
    let mut outstanding: Vec<Outstanding> = Vec::new();
    for _ in 0..count {
        let (lba, blocks) = random_range(&mut trial.rng, &geometry);
        let op = random_op(&mut trial.rng, &geometry, lba, blocks);
        let source = if let Op::Copy { source_lba } = op { source_lba } else { lba };
        let unknown = needs_known(op) && !(model.is_known(lba, blocks) && model.is_known(source, blocks));
        let op = if unknown { Op::Write { fua: false } } else { op };
        if outstanding.iter().any(|other| other.conflicts(op, lba, blocks)) {
            settle_some(trial.world, clients, &mut outstanding, true);
        }
        let plan = plan(trial, model, op, lba, blocks);
        let client = trial.rng.below(clients.len() as u64) as usize;
        // A read's payload starts as what nobody may see.
        let stale = vec![0xa5; plan.payload.len()];
        let payload = if op.kind() == OpKind::Read { &stale } else { &plan.payload };
        let bufs = scattered(&mut trial.rng, payload);
        let mark = clients[client].submit(op, lba, blocks, bufs);
        outstanding.push(Outstanding { client, mark, plan });
        if outstanding.len() >= DEPTH {
            settle_some(trial.world, clients, &mut outstanding, false);
        }
        if trial.rng.one_in(4) {
            trial.world.step();
        }
    }
    settle_some(trial.world, clients, &mut outstanding, true);
}

/// Compares the whole device with the model.
pub fn read_everything(trial: &mut Trial<'_>, model: &Model, client: &mut Client) {
    let geometry = trial.bdev().device().geometry();
    let step = (64 * 1024 / u64::from(geometry.block_size)).max(1);
    let mut lba = 0;
    while lba < geometry.num_blocks {
        let blocks = step.min(geometry.num_blocks - lba);
        let found = client.read(trial.world, lba, blocks);
        for n in (lba..lba + blocks).filter(|&n| model.is_known(n, 1)) {
            let at = (n - lba) as usize * geometry.block_size as usize;
            let wanted = model.read(n, 1);
            assert!(found[at..at + wanted.len()] == wanted[..], "block {n} differs from the model at the end");
        }
        lba += blocks;
    }
}
