//! Bytes on the base that rot: a block reads as what was written, or as an error, or the store is not opened; never as anything
//! else.

use super::super::engine::LogOp;
use super::super::format::AREA;
use super::super::recovery::Config;
use super::{Disk, config, contents, do_one, open, recover, seeds, stamp_of};
use crate::conformance::Rng;
use crate::core::IoStatus;

const BLOCKS: u64 = 200;

/// A store with some history, all of it durable and some batches behind the last flush, and what it holds.
fn filled(rng: &mut Rng) -> (Disk, Config, Vec<u64>) {
    let mut disk = Disk::new(131_072 + 65536 * 24, true);
    let config = config(&disk, 4096, BLOCKS);
    let mut engine = open(&mut disk, &config);
    let mut stamps = vec![0; BLOCKS as usize];
    for step in 0..400 + rng.below(400) {
        let lba = rng.below(BLOCKS);
        let stamp = if rng.one_in(10) { 0 } else { step + 1 };
        let done = do_one(&mut engine, &mut disk, LogOp::Write { fua: rng.one_in(5) }, lba, 1, &contents(stamp, 4096));
        assert_eq!(done.status, IoStatus::Success);
        stamps[lba as usize] = stamp;
    }
    assert!(do_one(&mut engine, &mut disk, LogOp::Flush, 0, 0, &[]).status.is_success());
    // These say that what is before them was durable, and change nothing.
    for _ in 0..2 {
        let same = contents(stamps[0], 4096);
        assert!(do_one(&mut engine, &mut disk, LogOp::Write { fua: true }, 0, 1, &same).status.is_success());
    }
    disk.settle(u64::MAX);
    (disk, config, stamps)
}

#[test]
fn never_shows_damaged_blocks_as_good() {
    seeds(300, &[266], |seed| {
        let mut rng = Rng::new(seed);
        let (mut disk, config, stamps) = filled(&mut rng);
        let sector = (rng.below(disk.medium.len() as u64) / 512 * 512) as usize;
        let was = disk.medium[sector..sector + 512].to_vec();
        match rng.below(3) {
            0 => disk.medium[sector + rng.below(512) as usize] ^= 1 << rng.below(8),
            1 => disk.medium[sector..sector + 512].fill(0),
            _ => rng.fill(&mut disk.medium[sector..sector + 512]),
        }
        let opened = recover(&mut disk, &config);
        if opened.is_err() {
            // Damage of what is there once, and is not a payload, may do this.
            disk.medium[sector..sector + 512].copy_from_slice(&was);
            open(&mut disk, &config);
            return;
        }
        let mut engine = open(&mut disk, &config);
        let mut bad = 0;
        for (lba, &stamp) in stamps.iter().enumerate() {
            let done = do_one(&mut engine, &mut disk, LogOp::Read, lba as u64, 1, &[0; 4096]);
            match done.status {
                IoStatus::Success => assert_eq!(stamp_of(&done.bufs.to_vec()), stamp, "block {lba}"),
                IoStatus::ReadError => bad += 1,
                other => panic!("block {lba}: {other}"),
            }
        }
        // Small payloads share a sector, and no more than this many.
        assert!(bad <= 20, "{bad} blocks are damaged by one sector");
        // What is written anew can be read, and lost blocks survive the collector without becoming anything else.
        for round in 0..1000 {
            let lba = rng.below(BLOCKS / 2);
            let stamp = 10_000 + round;
            assert!(
                do_one(&mut engine, &mut disk, LogOp::Write { fua: false }, lba, 1, &contents(stamp, 4096))
                    .status
                    .is_success()
            );
        }
        for lba in BLOCKS / 2..BLOCKS {
            let done = do_one(&mut engine, &mut disk, LogOp::Read, lba, 1, &[0; 4096]);
            match done.status {
                IoStatus::Success => assert_eq!(stamp_of(&done.bufs.to_vec()), stamps[lba as usize], "block {lba}"),
                status => assert_eq!(status, IoStatus::ReadError),
            }
        }
        engine.check();
    });
}

#[test]
fn a_gap_in_the_log_is_refused_and_can_be_accepted() {
    let mut disk = Disk::new(4 << 20, true);
    let config = config(&disk, 4096, 100);
    let mut engine = open(&mut disk, &config);
    for lba in 0..6 {
        let done = do_one(&mut engine, &mut disk, LogOp::Write { fua: true }, lba, 1, &contents(4 * lba + 4, 4096));
        assert!(done.status.is_success());
    }
    disk.settle(u64::MAX);
    // The fourth batch: each has its header, a block as it is, and the table.
    let batch = 4608;
    disk.medium[AREA as usize + 3 * batch + 20] ^= 1;
    let refusal = recover(&mut disk, &config).expect_err("a gap").to_string();
    assert!(refusal.contains("accept_loss=true") && refusal.contains("batch 4"), "{refusal}");
    let accepting = Config { accept_loss: true, ..config.clone() };
    for round in 0..3 {
        // Once it was accepted, it is not found again.
        let mut engine = open(&mut disk, if round == 0 { &accepting } else { &config });
        for lba in 0..6 {
            let done = do_one(&mut engine, &mut disk, LogOp::Read, lba, 1, &[0; 4096]);
            let expected = if lba < 3 { 4 * lba + 4 } else { 0 };
            assert_eq!(stamp_of(&done.bufs.to_vec()), expected, "block {lba}");
        }
        if round > 0 {
            let done = do_one(&mut engine, &mut disk, LogOp::Write { fua: true }, 50 + round, 1, &contents(99, 4096));
            assert!(done.status.is_success());
        }
    }
}

/// Whatever the base holds: it is opened or refused, without a panic and without memory for numbers that make no sense.
#[test]
fn nonsense_is_refused() {
    seeds(300, &[], |seed| {
        let mut rng = Rng::new(seed);
        let (mut disk, config, _) = filled(&mut rng);
        for _ in 0..1 + rng.below(40) {
            // Fields of superblocks, with a check that fits, and anything elsewhere.
            if rng.one_in(2) {
                let slot = rng.below(2) as usize * 65536;
                let field = 8 + 4 * rng.below(26) as usize;
                let value = match rng.below(3) {
                    0 => rng.next_u64() as u32,
                    1 => u32::MAX,
                    _ => rng.below(40) as u32 * 512,
                };
                disk.medium[slot + field..slot + field + 4].copy_from_slice(&value.to_le_bytes());
                let check = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, &disk.medium[slot..slot + 504]);
                disk.medium[slot + 504..slot + 512].copy_from_slice(&check.to_le_bytes());
            } else {
                let at = AREA + rng.below(disk.medium.len() as u64 - AREA);
                disk.medium[at as usize] = rng.next_u64() as u8;
            }
        }
        if let Ok(opened) = recover(&mut disk, &config) {
            drop(super::Engine::new(config.clone(), opened));
        }
    });
}
