//! One device, several users: atomic updates from several reactors, descriptors, claims.

use std::sync::Arc;

use reactor::Buffers;

use super::client::Client;
use super::{Trial, model};
use crate::core::registry::OnEvent;
use crate::core::{BdevError, ClaimKind, IoStatus, Op};

/// Increments on each reactor.
const INCREMENTS: u64 = 150;

enum Turn {
    Read(u64),
    Swap(u64),
}

/// A counter of two blocks, incremented by compare-and-write from all reactors at once: no update is lost.
pub fn atomic_updates(trial: &mut Trial<'_>) {
    if trial.subject.forgets {
        return;
    }
    let block = trial.bdev().device().geometry().block_size as usize;
    let bytes_of = |count: u64| {
        let mut bytes = vec![0; 2 * block];
        bytes[..8].copy_from_slice(&count.to_le_bytes());
        bytes[2 * block - 8..].copy_from_slice(&count.to_le_bytes());
        bytes
    };
    // At a place where a device may keep the two blocks apart.
    let lba = (64 * 1024 / block) as u64 - 1;
    let mut clients = model::clients(trial);
    let total = INCREMENTS * clients.len() as u64;
    clients[0].write(trial.world, lba, &bytes_of(0));
    let stale = vec![0xa5; 2 * block];
    let mut left: Vec<u64> = vec![INCREMENTS; clients.len()];
    let begin = |client: &mut Client| Turn::Read(client.submit(Op::Read, lba, 2, Buffers::from(&stale[..])));
    let mut turns: Vec<Turn> = clients.iter_mut().map(begin).collect();
    let mut lost = 0u64;
    trial.world.step_until("all increments", |_| {
        for ((client, left), turn) in clients.iter_mut().zip(&mut left).zip(&mut turns) {
            if *left == 0 {
                continue;
            }
            match *turn {
                Turn::Read(mark) => {
                    let Some(done) = client.take(mark) else { continue };
                    let low = u64::from_le_bytes(done.bytes[..8].try_into().expect("eight bytes"));
                    let payload = [bytes_of(low), bytes_of(low + 1)].concat();
                    let op = Op::CompareAndWrite { fua: false };
                    *turn = Turn::Swap(client.submit(op, lba, 2, Buffers::from(&payload[..])));
                }
                Turn::Swap(mark) => {
                    let Some(done) = client.take(mark) else { continue };
                    match done.status {
                        IoStatus::Success => *left -= 1,
                        // Somebody else was faster, or the read saw an update half done.
                        IoStatus::CompareFailed => lost += 1,
                        other => panic!("compare-and-write ended with {other}"),
                    }
                    if *left > 0 {
                        *turn = begin(client);
                    }
                }
            }
        }
        left.iter().all(|&left| left == 0)
    });
    assert!(clients[0].read(trial.world, lba, 2) == bytes_of(total), "updates were lost ({lost} were repeated)");
    clients.into_iter().for_each(Client::close);
}

/// A small compare-and-write beside a large one, of which a device may do only the small one by itself: one of the two
/// comes first, and the other sees it.
pub fn swaps_beside_swaps(trial: &mut Trial<'_>) {
    if trial.subject.forgets {
        return;
    }
    let block = trial.bdev().device().geometry().block_size as usize;
    let mut clients = model::clients(trial);
    let last = clients.len() - 1;
    let (old, new, other) = (vec![1; 6 * block], vec![2; 6 * block], vec![3; block]);
    let swap = Op::CompareAndWrite { fua: false };
    for steps in 0..40 {
        clients[0].write(trial.world, 9, &old);
        let (large, small) = ([&old[..], &new[..]].concat(), [&old[..block], &other[..]].concat());
        let large = clients[0].submit(swap, 9, 6, Buffers::from(&large[..]));
        (0..steps % 13).for_each(|_| trial.world.step());
        let small = clients[last].submit(swap, 13, 1, Buffers::from(&small[..]));
        let ends = [clients[0].wait(trial.world, large).status, clients[last].wait(trial.world, small).status];
        let mut wanted = match ends {
            [IoStatus::Success, IoStatus::CompareFailed] => new.clone(),
            [IoStatus::CompareFailed, IoStatus::Success] => old.clone(),
            other => panic!("two compare-and-writes of one block ended with {other:?}"),
        };
        if ends[1].is_success() {
            wanted[4 * block..5 * block].fill(3);
        }
        assert!(clients[0].read(trial.world, 9, 6) == wanted, "one came between compare and write of the other");
    }
    clients.into_iter().for_each(Client::close);
}

/// Writers beside a compare-and-write are seen by it, or come after it: never in between.
pub fn writes_beside_swaps(trial: &mut Trial<'_>) {
    if trial.subject.forgets {
        return;
    }
    let block = trial.bdev().device().geometry().block_size as usize;
    let mut clients = model::clients(trial);
    let last = clients.len() - 1;
    let (old, new, other) = (vec![1; 6 * block], vec![2; 6 * block], vec![3; 6 * block]);
    for steps in 0..40 {
        clients[0].write(trial.world, 9, &old);
        let payload = [&old[..], &new[..]].concat();
        let swap = clients[0].submit(Op::CompareAndWrite { fua: false }, 9, 6, Buffers::from(&payload[..]));
        (0..steps % 13).for_each(|_| trial.world.step());
        let write = clients[last].submit(Op::Write { fua: false }, 11, 1, Buffers::from(&other[..block]));
        assert_eq!(clients[last].wait(trial.world, write).status, IoStatus::Success);
        let swapped = clients[0].wait(trial.world, swap).status;
        let mut wanted = match swapped {
            IoStatus::Success => new.clone(),
            IoStatus::CompareFailed => old.clone(),
            other => panic!("compare-and-write ended with {other}"),
        };
        wanted[2 * block..3 * block].fill(3);
        assert!(clients[0].read(trial.world, 9, 6) == wanted, "a write came between compare and write");
    }
    clients.into_iter().for_each(Client::close);
}

/// Descriptors and claims exclude each other as they say.
pub fn claims(trial: &mut Trial<'_>) {
    let system = Arc::clone(trial.world.system());
    let name = trial.made_name(false);
    let open = |write| {
        let nothing: OnEvent = Arc::new(|_| {});
        system.open(&name, write, "a check", nothing)
    };
    let claimed = |result: Result<_, BdevError>| matches!(result, Err(BdevError::Claimed { .. }));
    let reader = open(false).expect("anybody may read");
    let writer = open(true).expect("nobody has claimed it");
    assert!(claimed(reader.claim(ClaimKind::ReadManyWriteNone)), "somebody writes");
    writer.claim(ClaimKind::ExclusiveWrite).expect("there is no other writer");
    assert!(claimed(open(true).map(drop)));
    assert!(claimed(reader.claim(ClaimKind::ExclusiveWrite)));
    assert_eq!(system.claim_state(&trial.bdev()).kind, Some(ClaimKind::ExclusiveWrite));
    drop(open(false).expect("anybody may read"));
    drop(writer);
    assert_eq!(system.claim_state(&trial.bdev()).kind, None);
    reader.claim(ClaimKind::ReadManyWriteNone).expect("nobody writes");
    let second = open(false).expect("anybody may read");
    second.claim(ClaimKind::ReadManyWriteNone).expect("it is shared");
    assert!(claimed(second.claim(ClaimKind::ExclusiveWrite)));
    assert!(claimed(open(true).map(drop)));
    drop((reader, second));
    drop(open(true).expect("nobody claims it any more"));
    let uuid = trial.bdev().uuid().to_string();
    assert_eq!(system.get(&uuid).expect("it answers to its UUID").name(), name);
}
