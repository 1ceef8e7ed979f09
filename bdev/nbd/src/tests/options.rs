//! Each option, to the byte.

use super::{Bench, context_data, facts, go_data, opt, rep, string};
use crate::negotiation::Facts;
use crate::wire::{info, option, reply};

/// Transmission flags of the test export: HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN.
const FLAGS: u16 = 0b1_0110_1101;
const DF: u16 = 1 << 7;

fn greeted() -> Bench {
    let mut bench = Bench::new(facts());
    let greeting = bench.output();
    assert_eq!(greeting, *b"NBDMAGICIHAVEOPT\x00\x03");
    assert_eq!(bench.exchange(&3u32.to_be_bytes()), b"");
    bench
}

fn export_info(option: u32, flags: u16) -> Vec<u8> {
    let data = [&info::EXPORT.to_be_bytes()[..], &facts().size.to_be_bytes(), &flags.to_be_bytes()].concat();
    rep(option, reply::INFO, &data)
}

fn block_info(option: u32, sizes: [u32; 3]) -> Vec<u8> {
    let data = [&info::BLOCK_SIZE.to_be_bytes()[..], &sizes.map(u32::to_be_bytes).concat()].concat();
    rep(option, reply::INFO, &data)
}

const SIZES: [u32; 3] = [512, 4096, 1 << 20];

#[test]
fn export_name_answers_with_and_without_zeroes() {
    for name in ["", "vol"] {
        let mut bench = greeted();
        let out = bench.exchange(&opt(option::EXPORT_NAME, name.as_bytes()));
        assert_eq!(out, [&facts().size.to_be_bytes()[..], &FLAGS.to_be_bytes()].concat());
        assert!(!bench.connection.is_negotiating());
    }
    let mut bench = Bench::new(facts());
    bench.exchange(&1u32.to_be_bytes());
    let out = bench.exchange(&opt(option::EXPORT_NAME, b""));
    assert_eq!(out, [&facts().size.to_be_bytes()[..], &FLAGS.to_be_bytes(), &[0; 124]].concat());
}

#[test]
fn abort_is_acknowledged_and_ends() {
    let mut bench = greeted();
    assert!(!bench.connection.is_over());
    assert_eq!(bench.exchange(&opt(option::ABORT, &[])), rep(2, reply::ACK, &[]));
    assert!(bench.connection.is_over());
    assert_eq!(bench.feed(b"more"), Ok(0));
}

#[test]
fn list_shows_the_export() {
    let mut bench = greeted();
    let entry = [string("vol"), b"Test disk".to_vec()].concat();
    let both = [rep(3, reply::SERVER, &entry), rep(3, reply::ACK, &[])].concat();
    assert_eq!(bench.exchange(&opt(option::LIST, &[])), both);
    let refused = bench.exchange(&opt(option::LIST, b"x"));
    assert_eq!(refused, rep(3, reply::ERR_INVALID, b"this option has no data"));
}

#[test]
fn tls_extended_headers_and_the_unknown_are_unsupported() {
    let mut bench = greeted();
    for option in [option::STARTTLS, option::EXTENDED_HEADERS, 4, 12, u32::MAX] {
        let out = bench.exchange(&opt(option, b"whatever"));
        assert_eq!(out[..16], rep(option, reply::ERR_UNSUP, &[])[..16]);
    }
    // The handshake goes on.
    assert!(!bench.exchange(&opt(option::LIST, &[])).is_empty());
}

#[test]
fn info_and_go() {
    let mut bench = greeted();
    let out = bench.exchange(&opt(option::INFO, &go_data("vol", &[])));
    assert_eq!(out, [block_info(6, SIZES), export_info(6, FLAGS), rep(6, reply::ACK, &[])].concat());
    assert!(bench.connection.is_negotiating());
    let asked = [info::DESCRIPTION, info::NAME, info::EXPORT, info::BLOCK_SIZE, 77];
    let out = bench.exchange(&opt(option::GO, &go_data("", &asked)));
    let name = [&info::NAME.to_be_bytes()[..], b"vol"].concat();
    let description = [&info::DESCRIPTION.to_be_bytes()[..], b"Test disk"].concat();
    let all = [
        block_info(7, SIZES),
        rep(7, reply::INFO, &name),
        rep(7, reply::INFO, &description),
        export_info(7, FLAGS),
        rep(7, reply::ACK, &[]),
    ];
    assert_eq!(out, all.concat());
    assert!(!bench.connection.is_negotiating());
}

#[test]
fn go_to_another_export_is_unknown() {
    let mut bench = greeted();
    for option in [option::INFO, option::GO] {
        let out = bench.exchange(&opt(option, &go_data("other", &[])));
        assert_eq!(out, rep(option, reply::ERR_UNKNOWN, b"this socket serves 'vol' only"));
    }
    assert!(bench.connection.is_negotiating());
}

#[test]
fn large_blocks_have_to_be_asked_for() {
    let mut bench = Bench::new(Facts { block_size: 4096, ..facts() });
    bench.exchange(&3u32.to_be_bytes());
    let out = bench.exchange(&opt(option::GO, &go_data("", &[])));
    let sizes = block_info(7, [4096, 4096, 1 << 20]);
    assert_eq!(out, [sizes, rep(7, reply::ERR_BLOCK_SIZE_REQD, b"ask for the block sizes and obey them")].concat());
    assert!(bench.connection.is_negotiating());
    bench.exchange(&opt(option::INFO, &go_data("", &[])));
    bench.exchange(&opt(option::GO, &go_data("", &[info::BLOCK_SIZE])));
    assert!(!bench.connection.is_negotiating());
}

#[test]
fn structured_replies_once() {
    let mut bench = greeted();
    let refused = bench.exchange(&opt(option::STRUCTURED_REPLY, b"x"));
    assert_eq!(refused, rep(8, reply::ERR_INVALID, b"this option has no data"));
    assert_eq!(bench.exchange(&opt(option::STRUCTURED_REPLY, &[])), rep(8, reply::ACK, &[]));
    let again = bench.exchange(&opt(option::STRUCTURED_REPLY, &[]));
    assert_eq!(again, rep(8, reply::ERR_INVALID, b"structured replies have been agreed on already"));
    let out = bench.exchange(&opt(option::INFO, &go_data("", &[])));
    assert!(out.windows(2).any(|pair| pair == (FLAGS | DF).to_be_bytes()), "DF is offered");
}

#[test]
fn metadata_contexts() {
    let mut bench = greeted();
    let early = bench.exchange(&opt(option::SET_META_CONTEXT, &context_data("", &["base:allocation"])));
    assert_eq!(early, rep(10, reply::ERR_INVALID, b"agree on structured replies first"));
    bench.exchange(&opt(option::STRUCTURED_REPLY, &[]));
    let context = |option: u32, id: u32| {
        let data = [&id.to_be_bytes()[..], b"base:allocation"].concat();
        [rep(option, reply::META_CONTEXT, &data), rep(option, reply::ACK, &[])].concat()
    };
    for queries in [&[][..], &["base:"], &["base:allocation"], &["x:y", "base:allocation", "base:allocation"]] {
        let out = bench.exchange(&opt(option::LIST_META_CONTEXT, &context_data("vol", queries)));
        assert_eq!(out, context(9, 0), "{queries:?}");
    }
    for queries in [&["base:other"][..], &["qemu:dirty-bitmap:b"], &["base"]] {
        for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
            let out = bench.exchange(&opt(option, &context_data("vol", queries)));
            assert_eq!(out, rep(option, reply::ACK, &[]), "{queries:?}");
        }
    }
    let out = bench.exchange(&opt(option::SET_META_CONTEXT, &context_data("vol", &["base:allocation"])));
    assert_eq!(out, context(10, 1));
    // A namespace alone chooses nothing.
    let out = bench.exchange(&opt(option::SET_META_CONTEXT, &context_data("vol", &["base:"])));
    assert_eq!(out, rep(10, reply::ACK, &[]));
    let out = bench.exchange(&opt(option::SET_META_CONTEXT, &context_data("other", &["base:allocation"])));
    assert_eq!(out, rep(10, reply::ERR_UNKNOWN, b"this socket serves 'vol' only"));
}

#[test]
fn what_an_export_cannot_do_is_not_offered() {
    let none = Facts { flush: false, trim: false, write_zeroes: false, ..facts() };
    assert_eq!(none.flags(false), 0x101);
    let read_only = Facts { read_only: true, ..facts() };
    assert_eq!(read_only.flags(true), 0x101 | 2 | 4 | DF);
}
