//! The machine against a device that does what it is told, in whatever order is allowed.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;
use reactor::buffer::PoolConfig;
use zerocopy::FromBytes;

use super::*;
use crate::rdma::capsule::{Block, MAX_BLOCKS, SQE_BYTES};
use crate::spec::sqe::{Sgl, SglDescriptor};

const READ: u8 = opcode::io::READ;
const WRITE: u8 = opcode::io::WRITE;
const FLUSH: u8 = opcode::io::FLUSH;
const MAX_IO: u32 = 256 * 1024;

fn config() -> Config {
    Config { slots: 8, max_io_bytes: MAX_IO, send_depth: 40, read_depth: 4, send_pieces: 4, invalidate: true }
}

fn pool(small: usize) -> BufferPool {
    BufferPool::new(PoolConfig { small, medium: 0, large: 0 }).unwrap()
}

fn queue(config: Config) -> Queue {
    let mut queue = Queue::new(config, (0..16).map(|_| Buffer::heap(RESPONSE_BYTES)).collect());
    queue.set_queue(8, true, true);
    queue
}

fn sqe(opcode: u8, cid: u16) -> Sqe {
    let mut sqe = Sqe::new_zeroed();
    sqe.opcode = opcode;
    sqe.flags = 0x40;
    sqe.cid = U16::new(cid);
    sqe
}

fn message(sqe: Sqe, blocks: &[Block], tail: &[u8]) -> (Buffer, u32) {
    let mut bytes = vec![0; SQE_BYTES + MAX_BLOCKS * 16 + tail.len()];
    let len = if tail.is_empty() {
        capsule::write(sqe, blocks, &mut bytes)
    } else {
        let len = capsule::write_with_data(sqe, tail.len() as u32, &mut bytes);
        bytes[len..len + tail.len()].copy_from_slice(tail);
        len + tail.len()
    };
    let mut buffer = Buffer::heap(bytes.len());
    buffer.copy_from_slice(&bytes);
    (buffer, len as u32)
}

fn send(queue: &mut Queue, pool: &mut BufferPool, sqe: Sqe, blocks: &[Block], tail: &[u8]) {
    let (buffer, len) = message(sqe, blocks, tail);
    queue.receive(buffer, len, pool).unwrap();
}

fn block(address: u64, len: u32) -> Block {
    Block { address, len, key: 7 }
}

fn finish(queue: &mut Queue, pool: &mut BufferPool, post: Post) {
    let head = post.message.map(|message| message.head);
    queue.done(post.user, post.data, head, WorkStatus::Success, pool).unwrap();
}

fn command(queue: &mut Queue, pool: &mut BufferPool) -> (u16, Sqe, Buffers) {
    match queue.poll_event(pool) {
        Some(Event::Command { slot, sqe, data, .. }) => (slot, sqe, data),
        other => panic!("{other:?}"),
    }
}

fn cqe_of(post: &Post) -> Cqe {
    Cqe::read_from_bytes(&post.message.as_ref().expect("a response").head).unwrap()
}

#[test]
fn a_read_is_written_to_the_hosts_blocks_and_then_answered() {
    let (mut pool, mut queue) = (pool(16), queue(config()));
    send(&mut queue, &mut pool, sqe(READ, 5), &[block(0x1000, 6000), block(0x9000, 2192)], &[]);
    let (slot, _, mut data) = command(&mut queue, &mut pool);
    assert_eq!(data.len(), 8192);
    data.fill(3);
    queue.complete(slot, Cqe::success(99), Some(data));
    let post = queue.poll_post().unwrap();
    assert_eq!(
        post.transfers.to_vec(),
        [
            Transfer { operation: Operation::Write { address: 0x1000, rkey: 7 }, bytes: 6000 },
            Transfer { operation: Operation::Write { address: 0x9000, rkey: 7 }, bytes: 2192 },
        ]
    );
    let cqe = cqe_of(&post);
    assert_eq!((cqe.cid.get(), cqe.sqhd.get()), (5, 1), "the machine fills these in");
    assert!(queue.poll_post().is_none());
    finish(&mut queue, &mut pool, post);
    assert!(pool.is_whole() && queue.outstanding() == 0);
    assert!(queue.take_spent().is_some() && queue.take_spent().is_none());
}

#[test]
fn a_host_that_takes_no_responses_has_no_more_commands_than_entries() {
    let (mut pool, mut queue) = (pool(16), queue(config()));
    let mut posted = Vec::new();
    let mut cid = 0;
    let end = loop {
        let (buffer, len) = message(sqe(FLUSH, cid), &[], &[]);
        if let Err(fault) = queue.receive(buffer, len, &mut pool) {
            break fault;
        }
        let (slot, ..) = command(&mut queue, &mut pool);
        queue.complete(slot, Cqe::success(0), None);
        // As many as there is memory for are on their way and may have arrived.
        posted.extend(queue.poll_post());
        cid += 1;
        assert!(cid < 100, "commands are taken without an end");
    };
    assert_eq!((end, posted.len(), queue.pending().responses), (Fault::TooManyCommands, 16, 8));
    // Once they have arrived, the host may go on.
    finish(&mut queue, &mut pool, posted.pop().unwrap());
    posted.extend(queue.poll_post());
    send(&mut queue, &mut pool, sqe(FLUSH, cid), &[], &[]);
}

#[test]
fn a_write_is_fetched_with_as_many_reads_as_there_are_credits() {
    let (mut pool, mut queue) = (pool(64), queue(config()));
    // 16 segments of 4 KiB, 4 in a request: 4 READs, all of the credits.
    send(&mut queue, &mut pool, sqe(WRITE, 1), &[block(0x10000, 65536)], &[]);
    send(&mut queue, &mut pool, sqe(WRITE, 2), &[block(0x50000, 4096)], &[]);
    let first = queue.poll_post().unwrap();
    assert_eq!((first.transfers.len(), queue.reads_out()), (4, 4));
    assert!(first.message.is_none());
    assert!(queue.poll_post().is_none(), "no credit is left");
    assert_eq!(queue.pending().reads, 1);
    assert!(queue.poll_event(&mut pool).is_none());
    finish(&mut queue, &mut pool, first);
    let second = queue.poll_post().unwrap();
    assert_eq!(second.transfers[0].operation, Operation::Read { address: 0x50000, rkey: 7 });
    assert_eq!(command(&mut queue, &mut pool).1.cid.get(), 1);
    finish(&mut queue, &mut pool, second);
    assert_eq!(command(&mut queue, &mut pool).1.cid.get(), 2);
}

#[test]
fn more_reads_than_credits_come_one_round_after_the_other() {
    let (mut pool, mut queue) = (pool(64), queue(Config { read_depth: 3, ..config() }));
    let blocks: Vec<Block> = (0..16).map(|n| block(n << 20, 1000)).collect();
    send(&mut queue, &mut pool, sqe(WRITE, 1), &blocks, &[]);
    let mut seen = Vec::new();
    let mut at = 0;
    while queue.poll_event(&mut pool).is_none() {
        let post = queue.poll_post().unwrap();
        assert!(post.transfers.len() <= 3);
        assert_eq!(post.start, at);
        at += post.transfers.iter().map(|transfer| transfer.bytes).sum::<u32>();
        seen.extend(post.transfers.iter().map(|transfer| match transfer.operation {
            Operation::Read { address, .. } => address >> 20,
            other => panic!("{other:?}"),
        }));
        finish(&mut queue, &mut pool, post);
    }
    assert_eq!((seen, at), ((0..16).collect(), 16000));
}

#[test]
fn a_response_too_long_for_the_send_queue_is_written_in_rounds() {
    let (mut pool, mut queue) = (pool(64), queue(Config { send_depth: 4, ..config() }));
    let blocks: Vec<Block> = (0..16).map(|n| block(n << 20, 256)).collect();
    send(&mut queue, &mut pool, sqe(READ, 1), &blocks, &[]);
    let (slot, _, data) = command(&mut queue, &mut pool);
    queue.complete(slot, Cqe::success(0), Some(data));
    let mut written = 0;
    loop {
        let post = queue.poll_post().unwrap();
        assert!(post.requests() <= 4 && queue.poll_post().is_none());
        written += post.transfers.len();
        let last = post.message.is_some();
        finish(&mut queue, &mut pool, post);
        if last {
            break;
        }
    }
    assert_eq!(written, 16);
    assert!(pool.is_whole() && queue.poll_post().is_none());
}

#[test]
fn data_in_the_capsule_is_copied_and_the_receive_is_free_at_once() {
    let (mut pool, mut queue) = (pool(1), queue(config()));
    send(&mut queue, &mut pool, sqe(WRITE, 1), &[], &[9; 512]);
    assert!(queue.take_spent().is_some());
    // No memory for the second: its capsule is kept, and the third has to wait behind it.
    send(&mut queue, &mut pool, sqe(WRITE, 2), &[], &[8; 512]);
    send(&mut queue, &mut pool, sqe(FLUSH, 3), &[], &[]);
    assert!(queue.stalled() && queue.pending().memory == 2);
    let (slot, _, data) = command(&mut queue, &mut pool);
    assert_eq!(data.to_vec(), [9; 512]);
    assert!(queue.poll_event(&mut pool).is_none());
    queue.complete(slot, Cqe::success(0), None);
    pool.put(data);
    queue.retry(&mut pool);
    let (_, _, data) = command(&mut queue, &mut pool);
    assert_eq!(data.to_vec(), [8; 512]);
    assert_eq!(command(&mut queue, &mut pool).1.cid.get(), 3);
}

#[test]
fn a_key_is_invalidated_with_the_response_where_the_host_asks_and_it_is_allowed() {
    for allowed in [true, false] {
        let (mut pool, mut queue) = (pool(4), queue(Config { invalidate: allowed, ..config() }));
        let mut entry = sqe(READ, 1);
        entry.dptr = SglDescriptor::from(Sgl::Keyed { address: 1, len: 512, key: 77, invalidate: true });
        let mut buffer = Buffer::heap(SQE_BYTES);
        buffer.copy_from_slice(entry.as_bytes());
        queue.receive(buffer, SQE_BYTES as u32, &mut pool).unwrap();
        let (slot, _, data) = command(&mut queue, &mut pool);
        // Also when it fails: the host waits for nothing else.
        queue.complete(slot, Cqe::new(0, Status::INTERNAL_ERROR), None);
        drop(data);
        let post = queue.poll_post().unwrap();
        assert!(post.transfers.is_empty());
        let expected = if allowed { Operation::SendInvalidate { rkey: 77 } } else { Operation::Send };
        assert_eq!(post.message.unwrap().operation, expected);
    }
}

#[test]
fn what_the_host_does_wrong_is_answered_or_ends_the_connection() {
    let (mut pool, mut queue) = (pool(16), queue(config()));
    let rejected = |queue: &mut Queue, pool: &mut BufferPool| match queue.poll_event(pool) {
        Some(Event::Rejected { slot, status, .. }) => {
            queue.complete(slot, Cqe::new(0, status), None);
            let post = queue.poll_post().unwrap();
            assert_eq!(cqe_of(&post).status(), status);
            finish(queue, pool, post);
            status
        }
        other => panic!("{other:?}"),
    };
    // Too long; data to the host in the capsule; no SGL.
    send(&mut queue, &mut pool, sqe(READ, 1), &[block(0, MAX_IO + 1)], &[]);
    assert_eq!(rejected(&mut queue, &mut pool), Status::DATA_SGL_LENGTH_INVALID.dnr());
    send(&mut queue, &mut pool, sqe(READ, 1), &[], &[1; 64]);
    assert_eq!(rejected(&mut queue, &mut pool), Status::SGL_TYPE_INVALID.dnr());
    let mut prp = sqe(READ, 1);
    prp.flags = 0;
    send(&mut queue, &mut pool, prp, &[block(0, 512)], &[]);
    assert_eq!(rejected(&mut queue, &mut pool), Status::INVALID_FIELD.dnr());
    // One identifier twice.
    send(&mut queue, &mut pool, sqe(FLUSH, 1), &[], &[]);
    let (_slot, ..) = command(&mut queue, &mut pool);
    send(&mut queue, &mut pool, sqe(FLUSH, 1), &[], &[]);
    assert_eq!(rejected(&mut queue, &mut pool), Status::CID_CONFLICT.dnr());
    // More than the queue has, and no capsule.
    for cid in 2..9 {
        send(&mut queue, &mut pool, sqe(FLUSH, cid), &[], &[]);
    }
    let (buffer, len) = message(sqe(FLUSH, 9), &[], &[]);
    assert_eq!(queue.receive(buffer, len, &mut pool), Err(Fault::TooManyCommands));
    let (buffer, _) = message(sqe(FLUSH, 9), &[], &[]);
    assert_eq!(queue.receive(buffer, 63, &mut pool), Err(Fault::NoCapsule(63)));
}

#[test]
fn a_chain_that_was_not_taken_is_posted_again() {
    let (mut pool, mut queue) = (pool(64), queue(config()));
    send(&mut queue, &mut pool, sqe(WRITE, 1), &[block(0, 8192), block(1 << 20, 8192)], &[]);
    let post = queue.poll_post().unwrap();
    let transfers = post.transfers.clone();
    queue.put_back(post);
    assert_eq!(queue.reads_out(), 0);
    let post = queue.poll_post().unwrap();
    assert_eq!(post.transfers, transfers);
    finish(&mut queue, &mut pool, post);
    let (slot, _, data) = command(&mut queue, &mut pool);
    pool.put(data);
    queue.complete(slot, Cqe::success(0), None);
    let post = queue.poll_post().unwrap();
    queue.put_back(post);
    let post = queue.poll_post().unwrap();
    assert_eq!(cqe_of(&post).cid.get(), 1);
    finish(&mut queue, &mut pool, post);
    assert!(pool.is_whole());
}

#[test]
fn halves_of_a_fused_operation_get_their_memory_together() {
    let (mut pool, mut queue) = (pool(2), queue(config()));
    let fused = |opcode, cid, fuse| {
        let mut entry = sqe(opcode, cid);
        entry.flags |= fuse;
        entry
    };
    send(&mut queue, &mut pool, fused(opcode::io::COMPARE, 1, 1), &[], &[1; 512]);
    assert!(pool.is_whole(), "a half holds nothing");
    // The memory for both is not there: neither has any.
    let taken = pool.alloc(4096).unwrap();
    send(&mut queue, &mut pool, fused(WRITE, 2, 2), &[], &[2; 512]);
    assert!(queue.stalled() && pool.has_free(4096));
    pool.put(taken);
    queue.retry(&mut pool);
    let (_, first, data) = command(&mut queue, &mut pool);
    assert_eq!((first.cid.get(), data.to_vec()), (1, vec![1; 512]));
    let (_, second, data) = command(&mut queue, &mut pool);
    assert_eq!((second.cid.get(), data.to_vec()), (2, vec![2; 512]));
    // One that stays alone comes out when the next command has come.
    send(&mut queue, &mut pool, fused(FLUSH, 3, 1), &[], &[]);
    assert!(queue.poll_event(&mut pool).is_none());
    send(&mut queue, &mut pool, sqe(FLUSH, 4), &[], &[]);
    assert_eq!(command(&mut queue, &mut pool).1.cid.get(), 3);
    assert_eq!(command(&mut queue, &mut pool).1.cid.get(), 4);
}

#[test]
fn aborts_find_commands_wherever_they_are() {
    let (mut pool, mut queue) = (pool(1), queue(config()));
    send(&mut queue, &mut pool, sqe(WRITE, 1), &[block(0, 512)], &[]);
    send(&mut queue, &mut pool, sqe(READ, 2), &[block(0, 512)], &[]);
    assert_eq!(queue.abort(7), AbortOutcome::NotFound);
    assert_eq!(queue.abort(2), AbortOutcome::Undelivered);
    assert!(matches!(queue.poll_event(&mut pool), Some(Event::Rejected { status: Status::ABORT_REQUESTED, .. })));
    // Its READ is on the way: it is rejected when that has come.
    let post = queue.poll_post().unwrap();
    assert_eq!(queue.abort(1), AbortOutcome::Undelivered);
    assert!(queue.poll_event(&mut pool).is_none());
    finish(&mut queue, &mut pool, post);
    assert!(matches!(queue.poll_event(&mut pool), Some(Event::Rejected { status: Status::ABORT_REQUESTED, .. })));
    assert!(pool.is_whole());
    send(&mut queue, &mut pool, sqe(FLUSH, 3), &[], &[]);
    let (slot, ..) = command(&mut queue, &mut pool);
    assert_eq!(queue.abort(3), AbortOutcome::Executing(slot));
}

#[test]
fn closing_gives_everything_back() {
    let (mut pool, mut queue) = (pool(4), queue(config()));
    send(&mut queue, &mut pool, sqe(WRITE, 1), &[block(0, 4096)], &[]);
    let read = queue.poll_post().unwrap();
    send(&mut queue, &mut pool, sqe(READ, 2), &[block(0, 4096)], &[]);
    let (slot, _, data) = command(&mut queue, &mut pool);
    queue.complete(slot, Cqe::success(0), Some(data));
    send(&mut queue, &mut pool, sqe(WRITE, 3), &[block(0, 8192)], &[]);
    send(&mut queue, &mut pool, sqe(WRITE, 4), &[], &[1; 100]);
    assert!(queue.stalled());
    queue.close(&mut pool);
    drop(read);
    assert!(pool.is_whole());
    assert_eq!((queue.take_heads().len(), std::iter::from_fn(|| queue.take_spent()).count()), (16, 4));
    assert!(!queue.has_work() && !queue.stalled());
}

/// A command as the test's host knows it.
#[derive(Clone, Debug)]
struct Wanted {
    opcode: u8,
    blocks: Vec<u32>,
    in_capsule: bool,
}

fn wanted() -> impl Strategy<Value = Wanted> {
    let blocks = proptest::collection::vec(1u32..9000, 1..=MAX_BLOCKS);
    (prop_oneof![Just(READ), Just(WRITE), Just(FLUSH)], blocks, any::<bool>()).prop_map(
        |(opcode, mut blocks, in_capsule)| {
            if opcode == FLUSH {
                blocks.clear();
            }
            Wanted { opcode, blocks, in_capsule: in_capsule && opcode == WRITE }
        },
    )
}

/// The byte of the host's memory that belongs to a command at an offset of its data.
fn pattern(cid: u16, at: u32) -> u8 {
    (u32::from(cid) * 31 + at * 7) as u8
}

/// Addresses: the command's number, then the offset of the data.
fn address(cid: u16, at: u32) -> u64 {
    u64::from(cid) << 32 | u64::from(at)
}

/// Does what a device does with a chain, against a host that has [`pattern`] in its memory and checks what it is given.
fn execute(post: &mut Post, config: Config) -> Option<(u16, Cqe)> {
    let mut at = post.start;
    for transfer in post.transfers.clone() {
        let (mut pieces, mut left, mut offset) = (0, transfer.bytes, at);
        while left > 0 {
            let segment = post.data.slice_at(offset as usize).len() as u32;
            pieces += 1;
            offset += segment.min(left);
            left -= segment.min(left);
        }
        assert!(pieces <= config.send_pieces, "{pieces} segments in one request");
        let (Operation::Read { address: from, .. } | Operation::Write { address: from, .. }) = transfer.operation
        else {
            panic!("{transfer:?}");
        };
        for n in 0..transfer.bytes {
            let (cid, there) = ((from >> 32) as u16, from as u32 + n);
            assert_eq!(there, at + n, "data and host's memory are out of step");
            let expected = pattern(cid, there);
            match transfer.operation {
                Operation::Read { .. } => post.data.write_at((at + n) as usize, &[expected]),
                _ => {
                    let mut byte = [0];
                    post.data.read_at((at + n) as usize, &mut byte);
                    assert_eq!(byte[0], expected, "cid {cid} at {there}");
                }
            }
        }
        at += transfer.bytes;
    }
    post.message.is_some().then(|| {
        let cqe = cqe_of(post);
        (cqe.cid.get(), cqe)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is sent, with whatever limits and in whatever order things come back: each command is executed once with the
    /// right data, answered once, no limit is passed, and nothing is left.
    #[test]
    fn every_command_is_served_once_within_all_limits(
        commands in proptest::collection::vec(wanted(), 1..60),
        (send_depth, read_depth, send_pieces) in (2u32..30, 1u32..6, 1u32..5),
        buffers in 36usize..80,
        choices in proptest::collection::vec(any::<u8>(), 2000),
    ) {
        let config = Config { send_depth, read_depth, send_pieces, ..config() };
        let (mut pool, mut queue) = (pool(buffers), queue(config));
        let mut choices = choices.into_iter().cycle();
        let mut to_send: VecDeque<(u16, Wanted)> = commands.iter().cloned().enumerate().map(|(n, w)| (n as u16, w)).collect();
        let mut at_host: BTreeMap<u16, Wanted> = BTreeMap::new();
        let mut executing: Vec<(u16, Sqe, Buffers)> = Vec::new();
        // In the order in which they were posted, as one queue pair completes them.
        let mut device: VecDeque<Post> = VecDeque::new();
        let mut answered = 0;
        let mut idle = 0;
        while answered < commands.len() || !device.is_empty() {
            idle += 1;
            prop_assert!(idle < 20_000, "nothing goes on: {queue:?}");
            match choices.next().unwrap() % 4 {
                0 if at_host.len() < 8 => if let Some((cid, wanted)) = to_send.pop_front() {
                    let len: u32 = wanted.blocks.iter().sum();
                    let mut at = 0;
                    let blocks: Vec<Block> = wanted.blocks.iter().map(|&len| {
                        let block = block(address(cid, at), len);
                        at += len;
                        block
                    }).collect();
                    let tail: Vec<u8> = (0..len).map(|at| pattern(cid, at)).collect();
                    let tail = if wanted.in_capsule { &tail[..] } else { &[] };
                    send(&mut queue, &mut pool, sqe(wanted.opcode, cid), &blocks, tail);
                    at_host.insert(cid, wanted);
                },
                1 => if let Some(event) = queue.poll_event(&mut pool) {
                    let Event::Command { slot, sqe, mut data, .. } = event else { panic!("{event:?}") };
                    let cid = sqe.cid.get();
                    let len: u32 = at_host[&cid].blocks.iter().sum();
                    prop_assert_eq!(data.len() as u32, len);
                    for at in 0..len {
                        let mut byte = [pattern(cid, at)];
                        if sqe.opcode == READ {
                            data.write_at(at as usize, &byte);
                        } else {
                            data.read_at(at as usize, &mut byte);
                            prop_assert_eq!(byte[0], pattern(cid, at));
                        }
                    }
                    executing.push((slot, sqe, data));
                },
                2 => if !executing.is_empty() {
                    let n = usize::from(choices.next().unwrap()) % executing.len();
                    let (slot, sqe, data) = executing.swap_remove(n);
                    let data = if sqe.opcode == READ { Some(data) } else { pool.put(data); None };
                    queue.complete(slot, Cqe::success(0), data);
                },
                _ => {
                    while let Some(post) = queue.poll_post() {
                        device.push_back(post);
                    }
                    let reads = |post: &Post| post.transfers.iter().filter(|t| matches!(t.operation, Operation::Read { .. })).count() as u32;
                    prop_assert!(device.iter().map(Post::requests).sum::<u32>() <= send_depth);
                    prop_assert!(device.iter().map(reads).sum::<u32>() <= read_depth);
                    if let Some(mut post) = device.pop_front() {
                        if let Some((cid, cqe)) = execute(&mut post, config) {
                            prop_assert!(cqe.status().is_success());
                            prop_assert!(at_host.remove(&cid).is_some(), "answered twice");
                            answered += 1;
                        }
                        finish(&mut queue, &mut pool, post);
                        queue.retry(&mut pool);
                        idle = 0;
                    }
                    while queue.take_spent().is_some() {}
                }
            }
        }
        prop_assert!(pool.is_whole() && queue.outstanding() == 0 && at_host.is_empty());
        prop_assert_eq!(queue.take_heads().len(), 16);
        prop_assert_eq!(queue.pending(), Pending::default());
    }
}
