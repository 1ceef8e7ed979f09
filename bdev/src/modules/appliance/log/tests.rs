//! The store against a base that loses, tears and reorders what was not flushed, fails, and is cut off at any step.
//!
//! Seeds decide everything. `LOG_SEED=n` runs one seed of each test, `LOG_SEEDS=n` so many instead of its own number.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use reactor::Buffers;

use super::engine::{Engine, LogOp, Request};
use super::recovery::{BaseIo, BaseOp, Config, Opened, Recovery, Refusal};
use crate::conformance::Rng;
use crate::core::IoStatus;

mod damage;
mod power;

const SECTOR: usize = 512;

fn seeds(count: u64, regressions: &[u64], run: impl Fn(u64)) {
    let number = |name| std::env::var(name).ok().and_then(|text: String| text.parse::<u64>().ok());
    let all: Vec<u64> = match number("LOG_SEED") {
        Some(seed) => vec![seed],
        None => regressions.iter().copied().chain(1..=number("LOG_SEEDS").unwrap_or(count)).collect(),
    };
    for seed in all {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(seed))) {
            eprintln!("seed {seed} failed; run it again with LOG_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

/// A base device of 512-byte sectors with a cache.
struct Disk {
    medium: Vec<u8>,
    /// Versions of a sector since it was last made durable, each with its running number.
    cached: BTreeMap<usize, Vec<(u64, [u8; SECTOR])>>,
    version: u64,
    volatile: bool,
    /// Operations that were asked for and have not ended, with the version at which a flush began.
    flying: Vec<(BaseIo, u64)>,
}

impl Disk {
    fn new(bytes: usize, volatile: bool) -> Disk {
        Disk { medium: vec![0; bytes], cached: BTreeMap::new(), version: 0, volatile, flying: Vec::new() }
    }

    fn ask(&mut self, io: BaseIo) {
        let end = io.offset as usize + io.bufs.len();
        assert!(end <= self.medium.len(), "beyond the base: {} + {}", io.offset, io.bufs.len());
        assert!(io.offset.is_multiple_of(512) && io.bufs.len().is_multiple_of(512), "not in blocks of the base");
        self.flying.push((io, self.version));
    }

    fn sector(&self, index: usize) -> &[u8] {
        match self.cached.get(&index).and_then(|versions| versions.last()) {
            Some((_, bytes)) => bytes,
            None => &self.medium[index * SECTOR..(index + 1) * SECTOR],
        }
    }

    fn write_sector(&mut self, index: usize, bytes: &[u8]) {
        self.version += 1;
        let bytes = bytes.try_into().expect("a sector");
        self.cached.entry(index).or_default().push((self.version, bytes));
    }

    fn settle(&mut self, upto: u64) {
        for (&index, versions) in &mut self.cached {
            let durable = versions.iter().take_while(|(version, _)| *version <= upto).count();
            if let Some((_, bytes)) = versions.drain(..durable).next_back() {
                self.medium[index * SECTOR..(index + 1) * SECTOR].copy_from_slice(&bytes);
            }
        }
        self.cached.retain(|_, versions| !versions.is_empty());
    }

    /// Ends one of the operations that fly, with `error` after any part of it.
    fn finish(&mut self, which: usize, error: Option<(IoStatus, &mut Rng)>) -> (u64, Buffers, Result<(), IoStatus>) {
        let (mut io, began) = self.flying.swap_remove(which);
        let first = io.offset as usize / SECTOR;
        let count = io.bufs.len() / SECTOR;
        let result = match error {
            Some((status, rng)) => {
                let part = rng.below(count as u64 + 1) as usize;
                if io.op == BaseOp::Write {
                    self.put(first, &io.bufs, |sector| sector < part);
                }
                Err(status)
            }
            None => {
                match io.op {
                    BaseOp::Read => {
                        for sector in 0..count {
                            let bytes = self.sector(first + sector).to_vec();
                            io.bufs.write_at(sector * SECTOR, &bytes);
                        }
                    }
                    BaseOp::Write => self.put(first, &io.bufs, |_| true),
                    BaseOp::Flush => self.settle(began),
                }
                Ok(())
            }
        };
        if !self.volatile {
            self.settle(u64::MAX);
        }
        (io.tag, io.bufs, result)
    }

    fn put(&mut self, first: usize, bufs: &Buffers, arrives: impl Fn(usize) -> bool) {
        let bytes = bufs.to_vec();
        for (sector, bytes) in bytes.chunks(SECTOR).enumerate().filter(|(sector, _)| arrives(*sector)) {
            self.write_sector(first + sector, bytes);
        }
    }

    /// The power fails: of each sector any version since the last flush is there, and of what was being written any part.
    fn crash(&mut self, rng: &mut Rng) {
        for (io, _) in std::mem::take(&mut self.flying) {
            if io.op == BaseOp::Write {
                let mask: Vec<bool> = (0..io.bufs.len() / SECTOR).map(|_| rng.one_in(2)).collect();
                self.put(io.offset as usize / SECTOR, &io.bufs, |sector| mask[sector]);
            }
        }
        let keep_all = rng.one_in(4);
        for (index, versions) in std::mem::take(&mut self.cached) {
            let kept = if keep_all { versions.len() } else { rng.below(versions.len() as u64 + 1) as usize };
            if kept > 0 {
                self.medium[index * SECTOR..(index + 1) * SECTOR].copy_from_slice(&versions[kept - 1].1);
            }
        }
    }
}

fn config(disk: &Disk, block_size: u32, num_blocks: u64) -> Config {
    Config {
        base_bytes: disk.medium.len() as u64,
        base_block: 512,
        base_physical: 512,
        base_volatile: disk.volatile,
        block_size,
        num_blocks,
        segment_bytes: None,
        compress: true,
        format: false,
        accept_loss: false,
        store: [7; 16],
    }
}

fn recover(disk: &mut Disk, config: &Config) -> Result<Opened, Refusal> {
    let mut recovery = Recovery::new(config.clone());
    loop {
        if let Some(outcome) = recovery.take_outcome() {
            return outcome;
        }
        disk.ask(recovery.next_io().expect("an operation or an outcome"));
        let (_, bufs, result) = disk.finish(0, None);
        recovery.on_io_done(&bufs, result);
    }
}

fn open(disk: &mut Disk, config: &Config) -> Engine {
    let opened = recover(disk, config).unwrap_or_else(|refusal| panic!("{refusal}"));
    Engine::new(config.clone(), opened)
}

/// Runs until nothing is left to do.
fn settle(engine: &mut Engine, disk: &mut Disk) -> Vec<super::engine::Done> {
    loop {
        while let Some(io) = engine.next_io() {
            disk.ask(io);
        }
        if disk.flying.is_empty() {
            break;
        }
        let (tag, bufs, result) = disk.finish(0, None);
        engine.on_io_done(tag, bufs, result);
    }
    std::iter::from_fn(|| engine.take_done()).collect()
}

fn do_one(engine: &mut Engine, disk: &mut Disk, op: LogOp, lba: u64, blocks: u64, bytes: &[u8]) -> super::engine::Done {
    engine.submit(Request { tag: 1, op, lba, blocks, bufs: Buffers::from(bytes) });
    let mut done = settle(engine, disk);
    assert_eq!(done.len(), 1);
    done.pop().expect("it has ended")
}

/// The contents that belong to a number: zeroes to 0; else incompressible, very compressible, or in between.
fn contents(stamp: u64, block: usize) -> Vec<u8> {
    let mut bytes = vec![0; block];
    if stamp == 0 {
        return bytes;
    }
    let random = match stamp % 4 {
        0 => block,
        1 => 16,
        2 => block / 2,
        _ => block / 8,
    };
    Rng::new(stamp).fill(&mut bytes[..random]);
    bytes[..8].copy_from_slice(&stamp.to_le_bytes());
    bytes
}

/// The number of contents.
fn stamp_of(bytes: &[u8]) -> u64 {
    let stamp = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    assert!(bytes == contents(stamp, bytes.len()), "contents that were never written ({stamp})");
    stamp
}

#[test]
fn reads_what_was_written_and_finds_it_again() {
    for (block, volatile) in [(512, true), (4096, false), (4096, true), (65536, true)] {
        let mut disk = Disk::new(if block == 65536 { 40 << 20 } else { 4 << 20 }, volatile);
        let config = config(&disk, block, 200);
        let size = block as usize;
        let mut engine = open(&mut disk, &config);
        for lba in 0..100 {
            let bytes = [contents(lba + 1, size), contents(lba + 1001, size)].concat();
            let done = do_one(&mut engine, &mut disk, LogOp::Write { fua: lba % 7 == 0 }, lba, 2, &bytes);
            assert_eq!(done.status, IoStatus::Success);
        }
        assert!(do_one(&mut engine, &mut disk, LogOp::Zeroes { fua: false }, 10, 5, &[]).status.is_success());
        assert!(do_one(&mut engine, &mut disk, LogOp::Flush, 0, 0, &[]).status.is_success());
        let zeroes = vec![0; size];
        assert!(do_one(&mut engine, &mut disk, LogOp::Write { fua: false }, 20, 1, &zeroes).status.is_success());
        for reopened in [false, true] {
            if reopened {
                engine = open(&mut disk, &config);
            }
            let done = do_one(&mut engine, &mut disk, LogOp::Read, 0, 200, &vec![1; 200 * size]);
            assert_eq!(done.status, IoStatus::Success);
            for (lba, bytes) in done.bufs.to_vec().chunks(size).enumerate() {
                let expected = match lba {
                    10..15 | 20 | 101.. => 0,
                    100 => 1100,
                    _ => lba as u64 + 1,
                };
                assert_eq!(stamp_of(bytes), expected, "block {lba}");
            }
            assert_eq!(engine.mapped_blocks(), 95);
        }
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let mut disk = Disk::new(4 << 20, true);
    let config = config(&disk, 4096, 100);
    let mut engine = open(&mut disk, &config);
    for (op, lba, blocks, bytes, status) in [
        (LogOp::Read, 99, 2, 8192, IoStatus::OutOfRange),
        (LogOp::Read, u64::MAX, 1, 4096, IoStatus::OutOfRange),
        (LogOp::Write { fua: false }, 0, 1, 4095, IoStatus::Invalid),
        (LogOp::Zeroes { fua: false }, 0, 0, 0, IoStatus::OutOfRange),
    ] {
        assert_eq!(do_one(&mut engine, &mut disk, op, lba, blocks, &vec![1; bytes]).status, status);
    }
}

#[test]
fn changes_its_size_and_forgets_what_is_cut_off() {
    let mut disk = Disk::new(4 << 20, true);
    let config = config(&disk, 4096, 100);
    let mut engine = open(&mut disk, &config);
    for num_blocks in [1000, 50, 5000, 2000, 60] {
        engine.resize(num_blocks, 1);
        assert!(settle(&mut engine, &mut disk).iter().all(|done| done.tag == 1 && done.status.is_success()));
        let last = num_blocks - 1;
        let done = do_one(&mut engine, &mut disk, LogOp::Read, last, 1, &[1; 4096]);
        assert_eq!(stamp_of(&done.bufs.to_vec()), 0, "of {num_blocks}");
        let done = do_one(&mut engine, &mut disk, LogOp::Write { fua: true }, last, 1, &contents(last, 4096));
        assert_eq!(done.status, IoStatus::Success);
        let done = do_one(&mut engine, &mut disk, LogOp::Read, num_blocks, 1, &[1; 4096]);
        assert_eq!(done.status, IoStatus::OutOfRange);
    }
    let mut engine = open(&mut disk, &Config { num_blocks: 60, ..config.clone() });
    let done = do_one(&mut engine, &mut disk, LogOp::Read, 49, 11, &[1; 11 * 4096]);
    let stamps: Vec<u64> = done.bufs.to_vec().chunks(4096).map(stamp_of).collect();
    assert_eq!(stamps, [49, 0, 0, 0, 0, 0, 0, 0, 0, 0, 59]);
}

/// What `open` says when it refuses.
fn refusal(disk: &mut Disk, config: &Config) -> String {
    recover(disk, config).expect_err("it must be refused").to_string()
}

#[test]
fn refuses_to_open_what_is_not_what_was_asked_for() {
    let mut disk = Disk::new(4 << 20, true);
    let asked = config(&disk, 4096, 100);
    disk.medium[70_000] = 1;
    assert!(refusal(&mut disk, &asked).contains("format=true"));
    let mut engine = open(&mut disk, &Config { format: true, ..asked.clone() });
    assert!(do_one(&mut engine, &mut disk, LogOp::Write { fua: true }, 99, 1, &contents(1, 4096)).status.is_success());
    for (wrong, words) in [
        (Config { block_size: 512, ..asked.clone() }, "block_size=4096"),
        (Config { num_blocks: 99, ..asked.clone() }, "at least 100"),
        (Config { base_bytes: 3 << 20, ..asked.clone() }, "give the base its size back"),
        (Config { base_block: 4096, ..asked.clone() }, "smaller blocks"),
        (Config { segment_bytes: Some(131_072), ..asked.clone() }, "leave it out"),
        (Config { segment_bytes: Some(1000), format: true, ..asked.clone() }, "power of two"),
        (Config { base_bytes: 300_000, format: true, ..asked.clone() }, "larger base"),
        (Config { base_bytes: 512, format: true, ..asked.clone() }, "larger base"),
    ] {
        let said = refusal(&mut disk, &wrong);
        assert!(said.contains(words), "{said}");
    }
    // More blocks are fine, and so is a larger base.
    let mut engine = open(&mut disk, &Config { num_blocks: 1000, ..asked.clone() });
    let far = do_one(&mut engine, &mut disk, LogOp::Write { fua: true }, 999, 1, &contents(2, 4096));
    assert!(far.status.is_success());
    disk.medium.resize(5 << 20, 0);
    let before = engine.segments().1;
    let mut engine = open(&mut disk, &Config { base_bytes: 5 << 20, num_blocks: 1000, ..asked.clone() });
    assert!(engine.segments().1 > before);
    let done = do_one(&mut engine, &mut disk, LogOp::Read, 999, 1, &[0; 4096]);
    assert_eq!(stamp_of(&done.bufs.to_vec()), 2);
    // A later version of the format is not touched.
    for slot in [0, 65536] {
        disk.medium[slot + 7] = 9;
        let check = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &disk.medium[slot..slot + 504]);
        disk.medium[slot + 504..slot + 512].copy_from_slice(&check.to_le_bytes());
    }
    assert!(refusal(&mut disk, &asked).contains("version 9"));
}

#[test]
fn a_full_store_says_so_and_goes_on() {
    for volatile in [true, false] {
        let mut disk = Disk::new(3 << 20, volatile);
        let config = config(&disk, 4096, 4096);
        let mut engine = open(&mut disk, &config);
        let mut stored = Vec::new();
        let mut rng = Rng::new(5);
        loop {
            let lba = stored.len() as u64;
            let stamp = 4 * (lba + 1);
            let done = do_one(&mut engine, &mut disk, LogOp::Write { fua: false }, lba, 1, &contents(stamp, 4096));
            if done.status == IoStatus::NoSpace {
                break;
            }
            assert_eq!(done.status, IoStatus::Success);
            stored.push(stamp);
        }
        assert!(stored.len() > 350, "only {} blocks of 4 KiB fit into 3 MiB", stored.len());
        // Blocks can be overwritten, for as long as one likes, and room comes back when some are zeroed.
        let count = stored.len() as u64;
        for round in 0..3 * count {
            let lba = rng.below(count);
            let stamp = 4 * (100_000 + round);
            let done = do_one(&mut engine, &mut disk, LogOp::Write { fua: false }, lba, 1, &contents(stamp, 4096));
            assert_eq!(done.status, IoStatus::Success, "round {round}: {engine:?}");
            stored[lba as usize] = stamp;
        }
        let more = do_one(&mut engine, &mut disk, LogOp::Write { fua: false }, count, 1, &contents(4, 4096));
        assert_eq!(more.status, IoStatus::NoSpace);
        assert!(do_one(&mut engine, &mut disk, LogOp::Zeroes { fua: false }, 0, 2, &[]).status.is_success());
        stored[..2].fill(0);
        let more = do_one(&mut engine, &mut disk, LogOp::Write { fua: false }, count, 1, &contents(4, 4096));
        assert_eq!(more.status, IoStatus::Success);
        for (lba, &stamp) in stored.iter().enumerate() {
            let done = do_one(&mut engine, &mut disk, LogOp::Read, lba as u64, 1, &[0; 4096]);
            assert_eq!(stamp_of(&done.bufs.to_vec()), stamp);
        }
        let counters = engine.counters();
        assert!(counters.moved_bytes > 0 && counters.checkpoints > 0);
        assert!(counters.log_bytes < 20 * counters.stored_bytes, "{counters:?}");
    }
}
