//! Too few I/Os, too little memory: everything waits its turn and ends.

use reactor::Buffers;

use super::client::Client;
use super::{Trial, model};
use crate::core::{IoStatus, Op};

/// I/Os in the pool of [`few_ios`].
pub const FEW: usize = 2;
/// Requests in [`few_ios`].
const REQUESTS: u64 = 100;

/// A hundred requests with two I/Os in the pool: all end, in the order in which they waited.
pub fn few_ios(trial: &mut Trial<'_>) {
    let block = trial.bdev().device().geometry().block_size as usize;
    let mut clients = model::clients(trial);
    let mut first = Vec::new();
    for client in &mut clients {
        let marks: Vec<u64> = (0..REQUESTS)
            .map(|n| {
                let op = if n % 3 == 0 { Op::Write { fua: false } } else { Op::Read };
                client.submit(op, n % 32, 1, Buffers::heap(block))
            })
            .collect();
        first.push(marks[0]);
    }
    for (client, first) in clients.iter_mut().zip(first) {
        client.wait_all(trial.world);
        let order = client.take_order();
        assert_eq!(order.len() as u64, REQUESTS);
        for (position, mark) in order.iter().enumerate() {
            // It was admitted when at most one before it had not come home.
            let turn = (mark - first) as usize;
            assert!(turn < position + FEW, "request {turn} came home as number {position}");
        }
    }
    clients.into_iter().for_each(Client::close);
}

/// Requests that wait for the pool can be aborted, and those beside them are not disturbed.
pub fn abort_waiting(trial: &mut Trial<'_>) {
    let block = trial.bdev().device().geometry().block_size as usize;
    let mut client = Client::open(trial.world, 0, &trial.bdev());
    let marks: Vec<u64> = (0..20).map(|n| client.submit(Op::Read, n, 1, Buffers::heap(block))).collect();
    assert!(client.abort(marks[10]), "a request that waits can be aborted");
    assert!(client.abort(marks[19]));
    assert!(!client.abort(u64::MAX), "there is no such request");
    client.wait_all(trial.world);
    for (n, &mark) in marks.iter().enumerate() {
        let done = client.take(mark).expect("it has come home");
        let wanted = if n == 10 || n == 19 { IoStatus::Aborted } else { IoStatus::Success };
        assert_eq!((done.status, done.bytes.len()), (wanted, block), "request {n}");
    }
    client.close();
}

/// Emulated operations with no memory in the pool: they take turns with the reserved buffer.
pub fn no_memory(trial: &mut Trial<'_>) {
    let geometry = trial.bdev().device().geometry();
    let block = geometry.block_size as usize;
    let blocks = (160 * 1024 / block).max(8) as u64;
    let mut client = Client::open(trial.world, 0, &trial.bdev());
    let mut bytes = vec![0; blocks as usize * block];
    trial.rng.fill(&mut bytes);
    client.write(trial.world, 0, &bytes);
    if trial.subject.forgets {
        bytes.fill(0);
    }
    let runtime = trial.world.runtime(0);
    let mut taken = Vec::new();
    for size in [128 * 1024, 16 * 1024, 4096] {
        while let Some(list) = runtime.borrow_mut().pool().alloc(size) {
            taken.push(list);
        }
    }
    let mut different = bytes.clone();
    *different.last_mut().expect("there are bytes") ^= 1;
    let mut swap = bytes[..8 * block].to_vec();
    swap.extend_from_slice(&bytes[..8 * block]);
    let mut expected = Vec::new();
    let at = blocks;
    for round in 0..4 {
        let mut submit = |op, lba, blocks, payload: &[u8], status| {
            expected.push((client.submit(op, lba, blocks, Buffers::from(payload)), op, status));
        };
        submit(Op::Compare, 0, blocks, &bytes, IoStatus::Success);
        submit(Op::Compare, 0, blocks, &different, IoStatus::CompareFailed);
        submit(Op::CompareAndWrite { fua: false }, 0, 8, &swap, IoStatus::Success);
        submit(Op::Copy { source_lba: 0 }, at + 40 * round, 8, &[], IoStatus::Success);
        submit(Op::WriteZeroes { fua: false, may_unmap: false }, at + 40 * round + 10, 8, &[], IoStatus::Success);
    }
    client.wait_all(trial.world);
    for (mark, op, status) in expected {
        assert_eq!(client.take(mark).expect("it has come home").status, status, "{op:?} without memory");
    }
    for list in taken {
        runtime.borrow_mut().pool().put(list);
    }
    for round in 0..4 {
        assert!(client.read(trial.world, at + 40 * round, 8) == bytes[..8 * block]);
        assert!(client.read(trial.world, at + 40 * round + 10, 8).iter().all(|&byte| byte == 0));
    }
    client.close();
}
