//! Removal, reset, abort and changes of size, at every moment under load.

use std::sync::Arc;

use reactor::Buffers;

use super::client::Client;
use super::model::{self, Model};
use super::{Rng, Trial};
use crate::core::{BdevError, IoStatus, Op};

/// A load of everything, on blocks below `blocks`; returns the marks.
fn load(client: &mut Client, rng: &mut Rng, block: usize, blocks: u64, count: u64) -> Vec<u64> {
    (0..count)
        .map(|n| {
            let len = 1 + rng.below(8);
            let lba = rng.below(blocks - len);
            let op = match n % 9 {
                0 | 1 => Op::Read,
                2 | 3 => Op::Write { fua: n % 2 == 0 },
                4 => Op::Flush,
                5 => Op::WriteZeroes { fua: false, may_unmap: true },
                6 => Op::Copy { source_lba: rng.below(blocks - len) },
                7 => Op::CompareAndWrite { fua: false },
                _ => Op::Compare,
            };
            let bytes = op.payload_bytes(len, block as u32) as usize;
            client.submit(op, lba, len, Buffers::heap(bytes))
        })
        .collect()
}

/// What an operation may end with when its device goes away or is reset.
fn assert_ended_well(client: &mut Client, marks: &[u64], gone: IoStatus) {
    for &mark in marks {
        let status = client.take(mark).expect("it has come home").status;
        let usual = matches!(status, IoStatus::Success | IoStatus::CompareFailed | IoStatus::Aborted);
        assert!(usual || status == gone, "an operation ended with {status}");
    }
}

/// Removal with operations outstanding, a step later each time.
pub fn removal(trial: &mut Trial<'_>) {
    let geometry = trial.bdev().device().geometry();
    let system = Arc::clone(trial.world.system());
    for steps in 0..24 {
        let mut clients = model::clients(trial);
        let mut marks = Vec::new();
        for client in &mut clients {
            // More than the pool has, so that some wait for it.
            marks.push(load(client, &mut trial.rng, geometry.block_size as usize, 128, 90));
        }
        (0..steps).for_each(|_| trial.world.step());
        // Of devices in layers, the lowest every other time: those above go with it.
        let (removing, name) = (Arc::clone(&system), trial.made_name(steps % 2 == 1));
        let top = trial.made_name(false);
        let removed = trial.world.start(async move { removing.remove(&name).await });
        trial.world.step_until("the clients to be told", |_| clients.iter().all(Client::is_told_of_removal));
        let late = clients[0].submit(Op::Read, 0, 1, Buffers::heap(geometry.block_size as usize));
        for (client, marks) in clients.iter_mut().zip(&marks) {
            client.wait_all(trial.world);
            assert_ended_well(client, marks, IoStatus::NoDevice);
        }
        // On a reactor that has not heard of it yet it may still pass.
        assert_ended_well(&mut clients[0], &[late], IoStatus::NoDevice);
        (0..20).for_each(|_| trial.world.step());
        assert!(removed.is_pending(), "the removal does not wait for those who have it open");
        let refused = clients[0].run(trial.world, Op::Read, 0, 1, &vec![0; geometry.block_size as usize]);
        assert_eq!(refused.status, IoStatus::NoDevice);
        let nobody: crate::core::registry::OnEvent = Arc::new(|_| {});
        assert!(matches!(system.open(&top, false, "late", nobody), Err(BdevError::NotFound { .. })));
        clients.into_iter().for_each(Client::close);
        trial.world.step_until("the removal", |_| !removed.is_pending());
        removed.take().expect("it has ended").expect("nobody holds it");
        assert!(system.get(&top).is_err());
        trial.make_again();
    }
}

/// Reset with operations outstanding, a step later each time: what was there has ended, what comes after works.
pub fn reset(trial: &mut Trial<'_>) {
    let geometry = trial.bdev().device().geometry();
    let block = geometry.block_size as usize;
    for steps in 0..24 {
        let mut clients = model::clients(trial);
        let mut marks = Vec::new();
        for client in &mut clients {
            marks.push(load(client, &mut trial.rng, block, 128, 30));
        }
        (0..steps).for_each(|_| trial.world.step());
        let by = (steps % clients.len() as u64) as usize;
        let reset = clients[by].submit(Op::Reset, 0, 0, Buffers::new());
        let after: Vec<u64> = clients.iter_mut().map(|c| c.submit(Op::Read, 0, 1, Buffers::heap(block))).collect();
        let done = clients[by].wait(trial.world, reset);
        assert_eq!(done.status, IoStatus::Success);
        for (client, marks) in clients.iter_mut().zip(&marks) {
            client.collect(usize::MAX);
            assert_ended_well(client, marks, IoStatus::Aborted);
        }
        for (client, mark) in clients.iter_mut().zip(after) {
            let status = client.wait(trial.world, mark).status;
            assert!(matches!(status, IoStatus::Success | IoStatus::Aborted), "a read beside a reset: {status}");
        }
        // Two resets at once, and then everything as usual.
        let resets: Vec<u64> = clients.iter_mut().map(|c| c.submit(Op::Reset, 0, 0, Buffers::new())).collect();
        for (client, mark) in clients.iter_mut().zip(resets) {
            assert_eq!(client.wait(trial.world, mark).status, IoStatus::Success);
        }
        clients[0].write(trial.world, 0, &vec![0; block]);
        clients[1 % marks.len()].read(trial.world, 0, 1);
        clients.into_iter().for_each(Client::close);
    }
}

/// Aborts of operations anywhere on their way: each ends once, aborted or as usual.
pub fn abort(trial: &mut Trial<'_>) {
    let geometry = trial.bdev().device().geometry();
    for round in 0..30 {
        let mut clients = model::clients(trial);
        for client in &mut clients {
            let marks = load(client, &mut trial.rng, geometry.block_size as usize, 128, 40);
            (0..round % 10).for_each(|_| trial.world.step());
            for _ in 0..15 {
                let mark = marks[trial.rng.below(40) as usize];
                client.abort(mark);
            }
            client.wait_all(trial.world);
            assert_ended_well(client, &marks, IoStatus::Aborted);
        }
        clients.into_iter().for_each(Client::close);
    }
}

/// Growing and shrinking under load: clients are told, the new end holds, and what came back reads as zeroes.
pub fn resize(trial: &mut Trial<'_>) {
    let Some(resize) = trial.subject.resize else { return };
    let geometry = trial.bdev().device().geometry();
    let block = geometry.block_size as usize;
    let system = Arc::clone(trial.world.system());
    let small = geometry.num_blocks / 2;
    let mut clients = model::clients(trial);
    let mut model = Model::new(&geometry, trial.subject.forgets);
    for round in 0..6 {
        let mut marks = Vec::new();
        for client in &mut clients {
            marks.push(load(client, &mut trial.rng, block, small, 40));
        }
        (0..round).for_each(|_| trial.world.step());
        let told = clients[0].resizes();
        let blocks = if round % 2 == 0 { small } else { geometry.num_blocks + round };
        trial.world.block_on(resize(Arc::clone(&system), trial.spec.clone(), blocks)).expect("its size can change");
        // A device that follows another is told by a task of its own.
        trial.world.step_until("the clients to be told", |_| clients[0].resizes() > told);
        for (client, marks) in clients.iter_mut().zip(&marks) {
            client.wait_all(trial.world);
            assert_ended_well(client, marks, IoStatus::Success);
        }
        assert_eq!(trial.bdev().device().geometry().num_blocks, blocks);
        for client in &mut clients {
            assert_eq!(client.run(trial.world, Op::Read, blocks, 1, &vec![0; block]).status, IoStatus::OutOfRange);
            assert_eq!(client.read(trial.world, blocks - 1, 1).len(), block);
        }
        if blocks > small {
            let end = clients[0].read(trial.world, small, 8);
            assert!(end.iter().all(|&byte| byte == 0), "what was cut off is back");
            clients[0].write(trial.world, small, &vec![0xee; 8 * block]);
        }
    }
    // With its contents known again, everything still works at the new size.
    let blocks = trial.bdev().device().geometry().num_blocks;
    let zeroes = clients[0].run(trial.world, Op::WriteZeroes { fua: false, may_unmap: true }, 0, blocks, &[]);
    assert_eq!(zeroes.status, IoStatus::Success);
    model.resize(blocks);
    model::run(trial, &mut model, &mut clients, 100);
    model::read_everything(trial, &model, &mut clients[0]);
    clients.into_iter().for_each(Client::close);
}
