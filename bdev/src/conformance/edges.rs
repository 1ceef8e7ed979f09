//! The edges of a device: its first and last blocks, requests that make no sense, durability, counters.

use reactor::Buffers;

use super::client::Client;
use super::{Trial, model};
use crate::core::{IoStatus, Op, OpKind};

/// Requests at and past the edges.
pub fn boundaries(trial: &mut Trial<'_>) {
    let geometry = trial.bdev().device().geometry();
    let block = geometry.block_size as usize;
    let last = geometry.num_blocks - 1;
    let mut client = Client::open(trial.world, 0, &trial.bdev());
    let mut bytes = vec![0; block];
    trial.rng.fill(&mut bytes);
    let wanted = |bytes: &[u8]| if trial.subject.forgets { vec![0; bytes.len()] } else { bytes.to_vec() };
    for lba in [0, last] {
        client.write(trial.world, lba, &bytes);
        assert!(client.read(trial.world, lba, 1) == wanted(&bytes), "block {lba}");
    }
    let write = Op::Write { fua: false };
    let zeroes = Op::WriteZeroes { fua: false, may_unmap: true };
    let swap = Op::CompareAndWrite { fua: false };
    let copy = |source_lba| Op::Copy { source_lba };
    let max = u64::MAX;
    let refused = [
        (Op::Read, last + 1, 1, 1, IoStatus::OutOfRange),
        (Op::Read, last, 2, 2, IoStatus::OutOfRange),
        (Op::Read, max, 1, 1, IoStatus::OutOfRange),
        (Op::Read, max - 1, 2, 2, IoStatus::OutOfRange),
        (write, last, 2, 2, IoStatus::OutOfRange),
        (Op::Compare, last, 2, 2, IoStatus::OutOfRange),
        (swap, last, 2, 4, IoStatus::OutOfRange),
        (Op::Unmap, last, 2, 0, IoStatus::OutOfRange),
        (Op::Unmap, 0, max, 0, IoStatus::OutOfRange),
        (Op::Unmap, 1, max, 0, IoStatus::OutOfRange),
        (zeroes, last, 2, 0, IoStatus::OutOfRange),
        (copy(0), last, 2, 0, IoStatus::OutOfRange),
        (copy(last), 0, 2, 0, IoStatus::OutOfRange),
        (copy(max), 0, 1, 0, IoStatus::OutOfRange),
        (Op::Read, 0, 0, 0, IoStatus::Invalid),
        (write, 0, 0, 0, IoStatus::Invalid),
        (Op::Unmap, 0, 0, 0, IoStatus::Invalid),
        (copy(0), 0, 0, 0, IoStatus::Invalid),
        (Op::Read, 0, 2, 1, IoStatus::Invalid),
        (Op::Read, 0, 1, 2, IoStatus::Invalid),
        (write, 0, 1, 0, IoStatus::Invalid),
        (write, 0, max, 1, IoStatus::Invalid),
        (swap, 0, 2, 2, IoStatus::Invalid),
        (zeroes, 0, 1, 1, IoStatus::Invalid),
    ];
    for (op, lba, blocks, payload, status) in refused {
        let sent = vec![0x77; payload * block];
        let done = client.run(trial.world, op, lba, blocks, &sent);
        assert_eq!(done.status, status, "{op:?} of {blocks} blocks at {lba} with {payload} blocks of payload");
        assert!(done.bytes == sent, "{op:?} was refused but touched its payload");
    }
    assert_eq!(client.run(trial.world, Op::Read, 0, 1, &vec![0; block - 1]).status, IoStatus::Invalid);
    // It still works, and nothing was written.
    for lba in [0, last] {
        assert!(client.read(trial.world, lba, 1) == wanted(&bytes), "block {lba} after refusals");
    }
    client.close();
}

/// Durable writes and flushes.
pub fn durability(trial: &mut Trial<'_>) {
    let block = trial.bdev().device().geometry().block_size as usize;
    let mut client = Client::open(trial.world, 0, &trial.bdev());
    let mut bytes = vec![0; 3 * block];
    trial.rng.fill(&mut bytes);
    if trial.subject.forgets {
        bytes.fill(0);
    }
    let done = client.run(trial.world, Op::Write { fua: true }, 2, 3, &bytes);
    assert_eq!(done.status, IoStatus::Success);
    assert_eq!(client.run(trial.world, Op::Flush, 0, 0, &[]).status, IoStatus::Success);
    assert!(client.read(trial.world, 2, 3) == bytes);
    for may_unmap in [false, true] {
        let done = client.run(trial.world, Op::WriteZeroes { fua: true, may_unmap }, 3, 1, &[]);
        assert_eq!(done.status, IoStatus::Success);
    }
    bytes[block..2 * block].fill(0);
    assert!(client.read(trial.world, 2, 3) == bytes);
    let mut swap = bytes[..block].to_vec();
    swap.extend_from_slice(&bytes[2 * block..]);
    assert_eq!(client.run(trial.world, Op::CompareAndWrite { fua: true }, 2, 1, &swap).status, IoStatus::Success);
    assert!(client.read(trial.world, 2, 1) == bytes[2 * block..]);
    client.close();
}

/// Counters, on every reactor and in all, say what was done.
pub fn statistics(trial: &mut Trial<'_>) {
    let block = trial.bdev().device().geometry().block_size as usize;
    let mut clients = model::clients(trial);
    let bytes = vec![0; 4 * block];
    let reactors = clients.len() as u64;
    for client in &mut clients {
        client.write(trial.world, 0, &bytes);
        client.read(trial.world, 0, 1);
        client.read(trial.world, 0, 4);
        client.run(trial.world, Op::Compare, 0, 4, &bytes);
        client.run(trial.world, Op::Compare, 0, 4, &vec![1; 4 * block]);
        client.run(trial.world, Op::WriteZeroes { fua: false, may_unmap: true }, 0, 2, &[]);
        client.run(trial.world, Op::Copy { source_lba: 0 }, 2, 1, &[]);
        client.run(trial.world, Op::Read, u64::MAX, 1, &bytes[..block]);
    }
    let system = std::sync::Arc::clone(trial.world.system());
    let each = trial.world.block_on(system.channel_stats(&trial.bdev())).expect("the reactors run");
    assert_eq!(each.len(), clients.len());
    let check = |stats: &crate::core::IoStats, n: u64| {
        let of = |kind| {
            let of = stats.of(kind);
            (of.ops, of.bytes / block as u64, of.errors)
        };
        assert_eq!(of(OpKind::Write), (n, 4 * n, 0));
        assert_eq!(of(OpKind::Read), (2 * n, 5 * n, n));
        assert_eq!(of(OpKind::Compare), (n, 4 * n, n));
        assert_eq!(of(OpKind::WriteZeroes), (n, 2 * n, 0));
        assert_eq!(of(OpKind::Copy), (n, n, 0));
        assert_eq!(stats.errors.iter().sum::<u64>(), 2 * n);
        assert!(stats.of(OpKind::Read).max_latency_ns >= stats.of(OpKind::Read).shortest_ns());
    };
    each.iter().for_each(|(_, stats)| check(stats, 1));
    clients.pop().expect("there is one").close();
    check(&trial.world.block_on(system.stats(&trial.bdev())).expect("the reactors run"), reactors);
    clients.into_iter().for_each(Client::close);
    check(&trial.world.block_on(system.stats(&trial.bdev())).expect("the reactors run"), reactors);
}

/// Thousands of small operations leave nothing behind that the end of the check would not see.
pub fn many(trial: &mut Trial<'_>) {
    let geometry = trial.bdev().device().geometry();
    let block = geometry.block_size as usize;
    let mut client = Client::open(trial.world, 0, &trial.bdev());
    for n in 0..4000 {
        let op = if n % 2 == 0 { Op::Read } else { Op::Write { fua: false } };
        client.submit(op, n % geometry.num_blocks, 1, Buffers::heap(block));
        if n % 200 == 199 {
            client.wait_all(trial.world);
        }
    }
    client.wait_all(trial.world);
    client.close();
}
