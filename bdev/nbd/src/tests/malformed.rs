//! What breaks a rule, and what becomes of it.

use super::{Bench, chunks, context_data, facts, go_data, opt, rep, request, simple, write};
use crate::connection::Fault;
use crate::negotiation::Facts;
use crate::wire::{command, command_flag, option, reply};

fn greeted() -> Bench {
    let mut bench = Bench::new(facts());
    bench.exchange(&3u32.to_be_bytes());
    bench
}

#[test]
fn a_stream_that_is_no_nbd_ends() {
    assert_eq!(Bench::new(facts()).fault(b"GET "), Fault::ClientFlags(u32::from_be_bytes(*b"GET ")));
    let fault = greeted().fault(b"GET / HTTP/1.1\r\n");
    assert_eq!(fault, Fault::OptionMagic(u64::from_be_bytes(*b"GET / HT")));
    let mut bytes = request(command::READ, 0, 1, 0, 512);
    bytes[3] ^= 1;
    assert_eq!(Bench::ready(facts(), true).fault(&bytes), Fault::RequestMagic(0x2560_9512));
}

#[test]
fn export_name_of_another_export_ends() {
    assert_eq!(greeted().fault(&opt(option::EXPORT_NAME, b"other")), Fault::NoSuchExport);
    let long = opt(option::EXPORT_NAME, &[b'x'; 70_000]);
    assert_eq!(greeted().fault(&long), Fault::OptionLength { option: 1, length: 70_000 });
}

#[test]
fn lengths_that_do_not_add_up_are_refused() {
    let mut bench = greeted();
    bench.exchange(&opt(option::STRUCTURED_REPLY, &[]));
    let text = b"the lengths in the option's data do not add up";
    for option in [option::INFO, option::GO] {
        let good = go_data("vol", &[3, 1]);
        for cut in 0..good.len() {
            assert_eq!(bench.exchange(&opt(option, &good[..cut])), rep(option, reply::ERR_INVALID, text), "{cut}");
        }
        let long = [&good[..], b"x"].concat();
        assert_eq!(bench.exchange(&opt(option, &long)), rep(option, reply::ERR_INVALID, text));
        let huge = [&u32::MAX.to_be_bytes()[..], b"vol"].concat();
        assert_eq!(bench.exchange(&opt(option, &huge)), rep(option, reply::ERR_INVALID, text));
    }
    for option in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
        let good = context_data("vol", &["base:allocation", "base:"]);
        for cut in 0..good.len() {
            assert_eq!(bench.exchange(&opt(option, &good[..cut])), rep(option, reply::ERR_INVALID, text), "{cut}");
        }
        let many = [&3u32.to_be_bytes()[..], b"vol", &u32::MAX.to_be_bytes()].concat();
        assert_eq!(bench.exchange(&opt(option, &many)), rep(option, reply::ERR_INVALID, text));
    }
}

#[test]
fn long_options_are_passed_over_and_longer_ones_end() {
    let mut bench = greeted();
    let out = bench.exchange(&opt(option::LIST, &vec![0; 70_000]));
    assert_eq!(out, rep(3, reply::ERR_TOO_BIG, b"the option's data is too long"));
    let head = [&b"IHAVEOPT"[..], &3u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat();
    assert_eq!(bench.fault(&head), Fault::OptionLength { option: 3, length: u32::MAX });
}

#[test]
fn requests_that_make_no_sense_are_invalid() {
    const EINVAL: u32 = 22;
    let wrong = [
        (command::READ, 0, 0, 0),
        (command::READ, 0, 1, 512),
        (command::READ, 0, 0, 513),
        (command::READ, 0, super::SIZE, 512),
        (command::READ, 0, u64::MAX - 511, 1024),
        (command::READ, 0, 0, (1 << 20) + 512),
        (command::READ, command_flag::DF, 0, 512),
        (command::READ, command_flag::NO_HOLE, 0, 512),
        (command::READ, 1 << 4, 0, 512),
        (command::FLUSH, 0, 0, 512),
        (command::FLUSH, 0, 512, 0),
        (command::FLUSH, command_flag::NO_HOLE, 0, 0),
        (command::TRIM, command_flag::NO_HOLE, 0, 512),
        (command::TRIM, 0, super::SIZE, 512),
        (command::WRITE_ZEROES, 1 << 4, 0, 512),
        (command::BLOCK_STATUS, 0, 0, 512),
        (5, 0, 0, 512),
        (99, 0, 0, 512),
    ];
    let mut bench = Bench::ready(facts(), false);
    for (command, flags, offset, length) in wrong {
        let out = bench.exchange(&request(command, flags, 9, offset, length));
        assert_eq!(out, simple(9, EINVAL, &[]), "command {command} flags {flags} {offset}+{length}");
    }
    assert!(bench.log.is_empty(), "none reaches the device");
    let mut bench = Bench::ready(facts(), true);
    for (command, flags, offset, length) in wrong.into_iter().filter(|&(c, f, ..)| c < 7 && f != command_flag::DF) {
        let got = chunks(&bench.exchange(&request(command, flags, 9, offset, length)));
        let [(9, 1, 0x8001, payload)] = &got[..] else { panic!("{got:?}") };
        assert_eq!(payload[..4], EINVAL.to_be_bytes());
        assert_eq!(payload.len(), 6 + usize::from(u16::from_be_bytes([payload[4], payload[5]])));
    }
}

#[test]
fn the_data_of_a_refused_write_is_passed_over() {
    let mut bench = Bench::ready(facts(), false);
    let bad = [
        (write(0, 1, 1, &[7; 512]), 22),
        (write(0, 2, super::SIZE - 512, &[7; 1024]), 28),
        (write(0, 3, u64::MAX - 511, &[7; 1024]), 28),
        (write(command_flag::NO_HOLE, 4, 0, &[7; 512]), 22),
        (write(0, 5, 0, &[7; (1 << 20) + 512]), 22),
        (write(0, 6, 0, &[]), 22),
    ];
    for (cookie, (bytes, error)) in (1..).zip(bad) {
        assert_eq!(bench.exchange(&bytes), simple(cookie, error, &[]), "{cookie}");
    }
    assert_eq!(bench.exchange(&write(0, 9, 0, &[7; 512])), simple(9, 0, &[]));
    assert_eq!(bench.log.len(), 1);
    let out = bench.exchange(&request(command::WRITE_ZEROES, 0, 1, super::SIZE - 512, 1024));
    assert_eq!(out, simple(1, 28, &[]));
}

#[test]
fn a_read_only_export_is_not_changed() {
    for structured in [false, true] {
        let mut bench = Bench::ready(Facts { read_only: true, ..facts() }, structured);
        for bytes in [
            write(0, 4, 0, &[1; 512]),
            request(command::TRIM, 0, 4, 0, 512),
            request(command::WRITE_ZEROES, 0, 4, 0, 512),
        ] {
            let out = bench.exchange(&bytes);
            match structured {
                false => assert_eq!(out, simple(4, 1, &[])),
                true => assert_eq!(chunks(&out)[0].3[..4], 1u32.to_be_bytes()),
            }
        }
        assert!(bench.log.is_empty());
        assert!(!bench.exchange(&request(command::FLUSH, 0, 1, 0, 0)).is_empty());
    }
}
