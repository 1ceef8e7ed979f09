//! Waiting: for memory, for room, for the end.

use bdev::core::IoStatus;

use super::{Bench, SIZE, chunks, data_chunk, facts, pattern, request, simple, write};
use crate::connection::{MAX_REQUESTS, PIECE_BYTES, WINDOW_BYTES};
use crate::negotiation::Facts;
use crate::wire::command;

const PIECE: usize = PIECE_BYTES as usize;

#[test]
fn a_read_without_memory_waits_and_holds_what_comes_behind_it() {
    let mut bench = Bench::ready(facts(), true);
    bench.disk = pattern(1, SIZE as usize);
    bench.memory = 0;
    let both = [request(command::READ, 0, 1, 0, 512), request(command::FLUSH, 0, 2, 0, 0)].concat();
    assert_eq!(bench.feed(&both), Ok(28));
    assert_eq!(bench.connection.wants_memory(), Some(512));
    assert!(!bench.connection.wants_input() && !bench.connection.peer_owes());
    bench.memory = 512;
    let out = bench.exchange(&both[28..]);
    assert_eq!(out, [data_chunk(1, 1, 0, &bench.disk[..512]), simple(2, 0, &[])].concat());
}

#[test]
fn a_large_transfer_needs_no_more_than_a_piece() {
    let data = pattern(2, 5 * PIECE + 512);
    for structured in [false, true] {
        let mut bench = Bench::ready(facts(), structured);
        bench.memory = PIECE;
        assert_eq!(bench.exchange(&write(0, 1, 0, &data)), simple(1, 0, &[]));
        assert!(bench.disk[..data.len()] == data);
    }
    let mut bench = Bench::ready(facts(), true);
    bench.disk = pattern(3, SIZE as usize);
    bench.memory = PIECE;
    let got = chunks(&bench.exchange(&request(command::READ, 0, 1, 0, data.len() as u32)));
    assert_eq!(got.iter().map(|(_, done, ..)| done).collect::<Vec<_>>(), [&0, &0, &0, &0, &0, &1]);
    let read: Vec<u8> = got.iter().flat_map(|(.., payload)| payload[8..].to_vec()).collect();
    assert!(read == bench.disk[..data.len()]);
    // In one piece it waits for all of it.
    let mut bench = Bench::ready(facts(), false);
    bench.memory = PIECE;
    bench.exchange(&request(command::READ, 0, 1, 0, data.len() as u32));
    assert_eq!(bench.connection.wants_memory(), Some(data.len()));
}

#[test]
fn what_a_connection_holds_is_bounded() {
    let big = Facts { size: 64 << 20, max_request: 32 << 20, ..facts() };
    let mut bench = Bench::ready(big.clone(), true);
    bench.eager = false;
    bench.feed(&request(command::READ, 0, 1, 0, 32 << 20)).unwrap();
    assert_eq!((bench.lent, bench.held.len()), (WINDOW_BYTES, WINDOW_BYTES / PIECE));
    assert_eq!(bench.connection.wants_memory(), None);
    assert!(!bench.connection.wants_input());
    bench.disk.fill(1);
    bench.finish(0, IoStatus::Success);
    bench.feed(&[]).unwrap();
    assert_eq!(bench.lent, WINDOW_BYTES, "room comes when data has left, not when it was read");
    bench.output();
    bench.feed(&[]).unwrap();
    assert_eq!((bench.lent, bench.held.len()), (WINDOW_BYTES, WINDOW_BYTES / PIECE));
    // One request that is larger than all that may be held has it alone.
    let mut bench = Bench::ready(big, false);
    bench.eager = false;
    let three = [512, 32 << 20, 512].map(|len| request(command::READ, 0, 1, 0, len)).concat();
    assert_eq!(bench.feed(&three), Ok(56));
    assert_eq!(bench.lent, 512);
    bench.finish(0, IoStatus::Success);
    bench.output();
    assert_eq!(bench.feed(&three[56..]), Ok(28));
    assert_eq!(bench.lent, 32 << 20);
}

#[test]
fn outstanding_requests_are_bounded() {
    let mut bench = Bench::ready(facts(), false);
    bench.eager = false;
    let many: Vec<u8> = (0..u64::from(MAX_REQUESTS) + 3).flat_map(|n| request(command::FLUSH, 0, n, 0, 0)).collect();
    assert_eq!(bench.feed(&many), Ok(28 * usize::from(MAX_REQUESTS)));
    assert!(!bench.connection.wants_input());
    bench.finish(5, IoStatus::Success);
    assert!(!bench.connection.wants_input(), "its reply has not left yet");
    assert_eq!(bench.output(), simple(5, 0, &[]));
    assert!(bench.connection.wants_input());
}

#[test]
fn the_handshake_goes_one_answer_at_a_time() {
    let mut bench = Bench::new(facts());
    // Nothing is read before the greeting has left.
    assert_eq!(bench.feed(&3u32.to_be_bytes()), Ok(0));
    bench.output();
    let twice = [3u32.to_be_bytes().to_vec(), super::opt(3, &[]), super::opt(3, &[])].concat();
    assert_eq!(bench.feed(&twice), Ok(20));
    assert!(!bench.connection.wants_input());
    bench.output();
    assert!(bench.connection.wants_input());
}

#[test]
fn what_the_peer_owes() {
    let mut bench = Bench::ready(facts(), false);
    assert!(!bench.connection.peer_owes(), "an idle client owes nothing");
    let before = bench.connection.progress();
    bench.feed(&write(0, 1, 0, &[1; 512])[..10]).unwrap();
    assert!(bench.connection.peer_owes());
    bench.feed(&write(0, 1, 0, &[1; 512])[10..100]).unwrap();
    assert!(bench.connection.peer_owes());
    assert_eq!(bench.connection.progress(), before + 100);
    bench.eager = false;
    bench.feed(&write(0, 1, 0, &[1; 512])[100..]).unwrap();
    assert!(!bench.connection.peer_owes(), "now it is the device's turn");
    bench.finish(0, IoStatus::Success);
    assert!(bench.connection.peer_owes(), "it has a reply to read");
}

/// Shuts down in the middle of `bytes`, after `cut` of them, and checks that it ends with every request answered.
fn shut_down_within(bytes: &[u8], cut: usize, structured: bool, memory: usize) {
    let mut bench = Bench::ready(facts(), structured);
    bench.eager = false;
    bench.memory = memory;
    let taken = bench.feed(&bytes[..cut]).unwrap();
    let lent = &mut bench.lent;
    bench.connection.shut_down(&mut |bufs| *lent -= bufs.len());
    bench.memory = usize::MAX;
    let mut rest = &bytes[taken..];
    // Which waits for room as any input does.
    for _ in 0..3 {
        rest = &rest[bench.feed(rest).unwrap()..];
        while !bench.held.is_empty() {
            bench.finish(0, IoStatus::NoDevice);
        }
        bench.output();
    }
    assert!(rest.is_empty());
    assert!(bench.connection.is_over(), "cut at {cut}");
    assert_eq!(bench.lent, 0, "cut at {cut}");
}

#[test]
fn the_end_of_an_export_at_every_moment() {
    let bytes = [
        write(0, 1, 0, &[7; 1024]),
        request(command::READ, 0, 2, 0, 1024),
        request(command::TRIM, 1, 3, 0, 512),
        request(command::FLUSH, 0, 4, 0, 0),
    ]
    .concat();
    for structured in [false, true] {
        for cut in 0..=bytes.len() {
            shut_down_within(&bytes, cut, structured, usize::MAX);
            shut_down_within(&bytes, cut, structured, 0);
        }
        let large = [write(0, 1, 0, &vec![7; 3 * PIECE]), request(command::READ, 0, 2, 0, 4 * PIECE_BYTES)].concat();
        for cut in [28, 100, PIECE + 28, PIECE + 29, 2 * PIECE, 3 * PIECE + 27, large.len()] {
            for memory in [0, PIECE, 2 * PIECE, 5 * PIECE] {
                shut_down_within(&large, cut, structured, memory);
            }
        }
    }
}

#[test]
fn requests_to_an_export_that_ends_are_refused() {
    let mut bench = Bench::ready(facts(), false);
    bench.eager = false;
    bench.exchange(&write(0, 1, 0, &[1; 512]));
    bench.connection.shut_down(&mut drop);
    assert_eq!(bench.exchange(&request(command::READ, 0, 2, 0, 512)), simple(2, 108, &[]));
    bench.finish(0, IoStatus::Success);
    assert_eq!(bench.output(), simple(1, 0, &[]), "what was begun is done");
    assert!(bench.connection.is_over());
    // In the handshake it just ends.
    let mut bench = Bench::new(facts());
    bench.output();
    bench.connection.shut_down(&mut drop);
    assert!(bench.connection.is_over());
}

#[test]
fn the_end_of_the_stream_at_every_moment() {
    let bytes = [write(0, 1, 0, &[7; 1024]), request(command::READ, 0, 2, 0, 1024)].concat();
    for cut in 0..=bytes.len() {
        let mut bench = Bench::ready(facts(), true);
        bench.eager = false;
        bench.feed(&bytes[..cut]).unwrap();
        let lent = &mut bench.lent;
        bench.connection.end_of_input(&mut |bufs| *lent -= bufs.len());
        while !bench.held.is_empty() {
            bench.finish(0, IoStatus::Success);
        }
        let answered = bench.output();
        assert_eq!(answered.is_empty(), cut < 28 + 1024, "what was whole is answered, nothing else: {cut}");
        assert!(bench.connection.is_over(), "{cut}");
        assert_eq!(bench.lent, 0);
    }
}

#[test]
fn closing_gives_back_all_memory() {
    let bytes =
        [write(0, 1, 0, &[7; 1024]), request(command::READ, 0, 2, 0, 1024), write(0, 1, 0, &[7; 1024])].concat();
    for cut in 0..bytes.len() {
        let mut bench = Bench::ready(facts(), true);
        bench.eager = false;
        bench.feed(&bytes[..cut]).unwrap();
        if bench.held.len() > 1 {
            bench.finish(1, IoStatus::Success);
        }
        let lent = &mut bench.lent;
        bench.connection.close(&mut |bufs| *lent -= bufs.len());
        let held: usize = bench.held.iter().map(|operation| operation.bufs.len()).sum();
        assert_eq!(bench.lent, held, "only what is in the device is out");
    }
}
