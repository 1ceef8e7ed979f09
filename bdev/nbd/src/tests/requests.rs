//! Each command, to the byte.

use bdev::core::{IoStatus, Op};

use super::{BLOCK, Bench, SIZE, chunk, chunks, data_chunk, facts, hole_chunk, pattern, request, simple, write};
use crate::connection::PIECE_BYTES;
use crate::negotiation::Facts;
use crate::wire::{command, command_flag};

#[test]
fn a_write_and_reads_of_it() {
    let data = pattern(3, 2048);
    let mut bench = Bench::ready(facts(), false);
    assert_eq!(bench.exchange(&write(0, 0x1122_3344_5566_7788, 1024, &data)), simple(0x1122_3344_5566_7788, 0, &[]));
    assert_eq!(bench.log, [(Op::Write { fua: false }, 2, 4)]);
    assert_eq!(bench.exchange(&request(command::READ, 0, 8, 1024, 2048)), simple(8, 0, &data));
    // Simple replies say zeroes as data.
    assert_eq!(bench.exchange(&request(command::READ, 0, 9, 512, 512)), simple(9, 0, &[0; 512]));

    let mut bench = Bench::ready(facts(), true);
    assert_eq!(bench.exchange(&write(command_flag::FUA, 7, 1024, &data)), simple(7, 0, &[]));
    assert_eq!(bench.log, [(Op::Write { fua: true }, 2, 4)]);
    assert_eq!(bench.exchange(&request(command::READ, 0, 8, 1024, 2048)), data_chunk(8, 1, 1024, &data));
    assert_eq!(bench.exchange(&request(command::READ, 0, 9, 512, 512)), hole_chunk(9, 1, 512, 512));
    let df = bench.exchange(&request(command::READ, command_flag::DF | command_flag::FUA, 9, 512, 512));
    assert_eq!(df, data_chunk(9, 1, 512, &[0; 512]));
    // A single byte makes it data.
    bench.disk[512 + 511] = 1;
    let out = bench.exchange(&request(command::READ, 0, 9, 512, 512));
    assert_eq!(chunks(&out)[0].2, 1);
    assert_eq!(bench.lent, 0);
}

#[test]
fn flush_trim_zeroes() {
    let mut bench = Bench::ready(facts(), true);
    bench.disk.fill(9);
    assert_eq!(bench.exchange(&request(command::FLUSH, 0, 1, 0, 0)), simple(1, 0, &[]));
    assert_eq!(bench.exchange(&request(command::TRIM, 0, 2, 512, 1024)), simple(2, 0, &[]));
    let both = command_flag::FUA | command_flag::NO_HOLE;
    assert_eq!(bench.exchange(&request(command::WRITE_ZEROES, both, 3, 0, SIZE as u32)), simple(3, 0, &[]));
    assert_eq!(bench.exchange(&request(command::WRITE_ZEROES, 0, 4, 0, BLOCK)), simple(4, 0, &[]));
    let blocks = SIZE / u64::from(BLOCK);
    let expected = [
        (Op::Flush, 0, 0),
        (Op::Unmap, 1, 2),
        (Op::WriteZeroes { fua: true, may_unmap: false }, 0, blocks),
        (Op::WriteZeroes { fua: false, may_unmap: true }, 0, 1),
    ];
    assert_eq!(bench.log, expected);
}

#[test]
fn a_trim_with_fua_is_answered_after_a_flush() {
    let mut bench = Bench::ready(facts(), false);
    bench.eager = false;
    bench.exchange(&request(command::TRIM, command_flag::FUA, 2, 0, 512));
    bench.finish(0, IoStatus::Success);
    assert_eq!(bench.output(), b"");
    assert_eq!((bench.held.len(), bench.held[0].op), (1, Op::Flush));
    bench.finish(0, IoStatus::Success);
    assert_eq!(bench.output(), simple(2, 0, &[]));
    // A flush that fails is the trim's failure; a trim that fails needs none.
    for failing in [1, 0] {
        bench.exchange(&request(command::TRIM, command_flag::FUA, 3, 0, 512));
        (0..failing).for_each(|_| bench.finish(0, IoStatus::Success));
        bench.finish(0, IoStatus::Failed);
        assert!(bench.held.is_empty());
        assert_eq!(bench.output(), simple(3, 5, &[]));
    }
}

#[test]
fn without_a_flush_there_is_no_fua() {
    let mut bench = Bench::ready(Facts { flush: false, trim: false, write_zeroes: false, ..facts() }, false);
    assert_eq!(bench.exchange(&write(command_flag::FUA, 1, 0, &[1; 512])), simple(1, 22, &[]));
    for command in [command::FLUSH, command::TRIM, command::WRITE_ZEROES] {
        let length = if command == command::FLUSH { 0 } else { 512 };
        assert_eq!(bench.exchange(&request(command, 0, 2, 0, length)), simple(2, 22, &[]));
    }
    assert!(bench.log.is_empty());
}

#[test]
fn everything_is_allocated() {
    let mut bench = Bench::ready(facts(), true);
    for flags in [0, command_flag::REQ_ONE] {
        let out = bench.exchange(&request(command::BLOCK_STATUS, flags, 5, 512, 1024));
        let payload = [1u32, 1024, 0].map(u32::to_be_bytes).concat();
        assert_eq!(out, chunk(5, 1, 5, &payload));
    }
    let past = chunks(&bench.exchange(&request(command::BLOCK_STATUS, 0, 5, SIZE, 512)));
    assert_eq!((past[0].2, &past[0].3[..4]), (0x8001, &22u32.to_be_bytes()[..]));
}

#[test]
fn a_large_read_comes_in_pieces_in_any_order() {
    let mut bench = Bench::ready(facts(), true);
    bench.disk = pattern(1, SIZE as usize);
    let piece = PIECE_BYTES as usize;
    bench.disk[piece..2 * piece].fill(0);
    bench.eager = false;
    let offset = 512u64;
    bench.disk[512 + piece..512 + 2 * piece].fill(0);
    bench.exchange(&request(command::READ, 0, 6, offset, 2 * PIECE_BYTES + 1024));
    assert_eq!(bench.held.len(), 3);
    bench.finish(2, IoStatus::Success);
    bench.finish(0, IoStatus::Success);
    bench.finish(0, IoStatus::Success);
    let at = |n: usize| offset + (n * piece) as u64;
    let slice = |n: usize, len: usize| &bench.disk[at(n) as usize..at(n) as usize + len];
    let expected = [
        data_chunk(6, 0, at(2), slice(2, 1024)),
        data_chunk(6, 0, at(0), slice(0, piece)),
        hole_chunk(6, 1, at(1), PIECE_BYTES),
    ]
    .concat();
    assert!(bench.output() == expected);
    assert_eq!(bench.lent, 0);
}

#[test]
fn a_piece_that_fails_is_an_error_at_its_offset() {
    let mut bench = Bench::ready(facts(), true);
    bench.eager = false;
    bench.exchange(&request(command::READ, 0, 6, 0, 2 * PIECE_BYTES));
    bench.finish(1, IoStatus::ReadError);
    bench.finish(0, IoStatus::Success);
    let got = chunks(&bench.output());
    assert_eq!((got[0].1, got[0].2), (0, 0x8002));
    assert_eq!(got[0].3[..4], 5u32.to_be_bytes());
    assert_eq!(got[0].3[got[0].3.len() - 8..], u64::from(PIECE_BYTES).to_be_bytes());
    assert_eq!((got[1].1, got[1].2), (1, 2));
    // In a simple reply there is only the error.
    let mut bench = Bench::ready(facts(), false);
    bench.eager = false;
    bench.exchange(&request(command::READ, 0, 6, 0, 2 * PIECE_BYTES));
    assert_eq!(bench.held.len(), 1, "one operation, so that its outcome is known before the data");
    bench.finish(0, IoStatus::NoDevice);
    assert_eq!(bench.output(), simple(6, 108, &[]));
    assert_eq!(bench.lent, 0);
}

#[test]
fn a_large_write_goes_in_pieces_and_fails_with_any() {
    let data = pattern(5, 3 * PIECE_BYTES as usize - 512);
    for (failing, error) in [(None, 0), (Some(IoStatus::NoSpace), 28), (Some(IoStatus::Aborted), 5)] {
        let mut bench = Bench::ready(facts(), false);
        bench.eager = false;
        bench.exchange(&write(0, 1, 512, &data));
        assert_eq!(bench.held.len(), 3);
        bench.finish(1, failing.unwrap_or_default());
        bench.finish(0, IoStatus::Success);
        assert_eq!(bench.output(), b"", "no answer before the last piece");
        bench.finish(0, IoStatus::Success);
        assert_eq!(bench.output(), simple(1, error, &[]));
        if failing.is_none() {
            assert!(bench.disk[512..512 + data.len()] == data);
        }
        assert_eq!(bench.lent, 0);
    }
}

#[test]
fn a_goodbye_waits_for_what_is_outstanding() {
    let mut bench = Bench::ready(facts(), false);
    bench.eager = false;
    let both = [write(0, 1, 0, &[1; 512]), request(command::DISC, 0, 0, 0, 0), b"never read".to_vec()].concat();
    assert_eq!(bench.feed(&both), Ok(both.len() - 10));
    assert!(!bench.connection.is_over());
    bench.finish(0, IoStatus::Success);
    assert!(!bench.connection.is_over());
    assert_eq!(bench.output(), simple(1, 0, &[]));
    assert!(bench.connection.is_over());
}

#[test]
fn requests_follow_the_size_as_of_now() {
    let mut bench = Bench::ready(facts(), false);
    bench.disk.resize(2 * SIZE as usize, 3);
    assert_eq!(bench.exchange(&request(command::READ, 0, 1, SIZE, 512)), simple(1, 22, &[]));
    bench.connection.set_size(2 * SIZE);
    assert_eq!(bench.exchange(&request(command::READ, 0, 1, SIZE, 512)), simple(1, 0, &[3; 512]));
    bench.connection.set_size(512);
    assert_eq!(bench.exchange(&write(0, 1, 512, &[1; 512])), simple(1, 28, &[]));
}
