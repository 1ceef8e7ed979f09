//! Mistakes that end the connection: each with its FES and FEI.

use super::*;
use crate::spec::opcode::io;
use crate::tcp::wire_client::{command, write, write_in_capsule};

#[test]
fn before_initialisation() {
    let host = WireClient::new();
    let fresh = || Link::bare(Config::default());
    assert_eq!(fresh().refused(&host.capsule(&command(0, 1, 1), &[])), (Fes::PduSequenceError, 0));
    assert_eq!(fresh().refused(&host.h2c_data(1, 0, 0, &[0; 8], true)), (Fes::PduSequenceError, 0));
    let icreq = WireClient::new().icreq(true, true, 0, 0);
    let spoilt = |at: usize, byte: u8| {
        let mut icreq = icreq.clone();
        icreq[at] = byte;
        fresh().refused(&icreq)
    };
    assert_eq!(spoilt(0, 0x0a), (Fes::InvalidHeaderField, 0));
    assert_eq!(spoilt(2, 127), (Fes::InvalidHeaderField, 2));
    assert_eq!(spoilt(4, 127), (Fes::InvalidHeaderField, 4));
    assert_eq!(spoilt(4, 129), (Fes::InvalidHeaderField, 4));
    assert_eq!(spoilt(8, 1), (Fes::UnsupportedParameter, 8));
    assert_eq!(spoilt(9, 1), (Fes::UnsupportedParameter, 8));
    assert_eq!(spoilt(10, 32), (Fes::InvalidHeaderField, 10));
}

#[test]
fn digests_are_granted_as_configured() {
    let config = Config { allow_header_digest: false, ..Config::default() };
    let link = Link::with(config, true, true, 0);
    let negotiated = link.conn.negotiated().unwrap();
    assert_eq!((negotiated.header_digest, negotiated.data_digest), (false, true));
}

#[test]
fn a_second_icreq() {
    let mut link = Link::new();
    let icreq = link.host.icreq(false, false, 0, 0);
    assert_eq!(link.refused(&icreq), (Fes::PduSequenceError, 0));
}

#[test]
fn types_that_a_host_does_not_send() {
    for byte in [1, 3, 5, 7, 8, 9, 10, 0x7f, 0xff] {
        assert_eq!(Link::new().refused(&[byte; 24]), (Fes::InvalidHeaderField, 0));
        assert_eq!(Link::new().refused(&[byte]), (Fes::InvalidHeaderField, 0));
    }
}

#[test]
fn broken_capsules() {
    for (header_digest, data_digest) in [(false, false), (true, true)] {
        let link = || Link::with(Config { cpda: 1, ..Config::default() }, header_digest, data_digest, 0);
        let capsule = link().host.capsule(&write_in_capsule(1, 1, 0, 1, 512), &[7; 512]);
        let spoilt = |at: usize, byte: u8| {
            let mut link = link();
            let mut capsule = capsule.clone();
            capsule[at] = byte;
            link.host.reseal(&mut capsule);
            link.refused(&capsule)
        };
        assert_eq!(spoilt(1, capsule[1] ^ 1), (Fes::InvalidHeaderField, 1));
        assert_eq!(spoilt(1, capsule[1] ^ 2), (Fes::InvalidHeaderField, 1));
        assert_eq!(spoilt(2, 24), (Fes::InvalidHeaderField, 2));
        assert_eq!(spoilt(3, 0), (Fes::InvalidHeaderField, 3));
        assert_eq!(spoilt(3, 84), (Fes::InvalidHeaderField, 3));
        assert_eq!(spoilt(3, 71), (Fes::InvalidHeaderField, 3));
        assert_eq!(spoilt(7, 0xff), (Fes::DataTransferLimitExceeded, 0));
    }
}

#[test]
fn broken_lengths_are_seen_before_the_rest_of_the_header() {
    let mut link = Link::with(Config::default(), true, false, 0);
    let mut capsule = link.host.capsule(&command(0, 1, 1), &[]);
    capsule[4] = 75;
    link.feed(&capsule[..7]);
    assert_eq!(link.conn.peer_due(), PeerDue::RestOfPdu);
    assert_eq!(link.refused(&capsule[7..8]), (Fes::InvalidHeaderField, 4));
}

#[test]
fn header_digests() {
    let mut link = Link::with(Config::default(), true, false, 0);
    let mut capsule = link.host.capsule(&command(0, 1, 1), &[]);
    capsule[20] ^= 4;
    let received = u32::from_le_bytes(capsule[72..76].try_into().unwrap());
    assert_eq!(link.refused(&capsule), (Fes::HeaderDigestError, received));
}

#[test]
fn more_commands_than_slots() {
    let mut link = Link::with(Config { slots: 3, ..Config::default() }, false, false, 0);
    for cid in 0..3 {
        link.feed(&link.host.capsule(&command(io::FLUSH, cid, 1), &[]));
    }
    let capsule = link.host.capsule(&command(io::FLUSH, 3, 1), &[]);
    assert_eq!(link.refused(&capsule), (Fes::PduSequenceError, 0));
    assert_eq!(link.conn.outstanding(), 0);
}

#[test]
fn broken_h2c_data() {
    let start = || {
        let mut link = Link::with(Config { maxh2cdata: 8192, ..Config::default() }, false, false, 0);
        link.feed(&link.host.capsule(&command(io::FLUSH, 8, 1), &[]));
        link.feed(&link.host.capsule(&write(9, 1, 0, 1, 16384), &[]));
        let [TargetPdu::R2t { ttag, .. }] = link.output()[..] else { panic!() };
        (link, ttag)
    };
    let data = vec![0; 20000];
    let check = |cid: u16, tag: u16, offset: u32, len: usize, last: bool| {
        let (mut link, ttag) = start();
        let pdu = link.host.h2c_data(cid, ttag ^ tag, offset, &data[..len], last);
        link.refused(&pdu)
    };
    assert_eq!(check(9, 1, 0, 4096, false), (Fes::InvalidHeaderField, 10), "another command's tag");
    assert_eq!(check(9, 0x4000, 0, 4096, false), (Fes::InvalidHeaderField, 10), "nobody's tag");
    assert_eq!(check(8, 0, 0, 4096, false), (Fes::InvalidHeaderField, 8));
    assert_eq!(check(9, 0, 0, 8193, false), (Fes::DataTransferLimitExceeded, 0));
    assert_eq!(check(9, 0, 16380, 8, false), (Fes::DataTransferOutOfRange, 0));
    assert_eq!(check(9, 0, u32::MAX, 8, false), (Fes::DataTransferOutOfRange, 0));
    assert_eq!(check(9, 0, 4096, 4096, false), (Fes::PduSequenceError, 0));
    assert_eq!(check(9, 0, 0, 8192, true), (Fes::InvalidHeaderField, 1));
    let (mut link, ttag) = start();
    let mut pdu = link.host.h2c_data(9, ttag, 0, &data[..64], false);
    pdu[16] = 63;
    assert_eq!(link.refused(&pdu), (Fes::InvalidHeaderField, 16));
    let (mut link, ttag) = start();
    let pdu = link.host.h2c_data(9, ttag, 0, &[], false);
    assert_eq!(link.refused(&pdu), (Fes::InvalidHeaderField, 16));
    // Data that was sent before is no continuation either.
    let (mut link, ttag) = start();
    link.feed(&link.host.h2c_data(9, ttag, 0, &data[..8192], false));
    let overlap = link.host.h2c_data(9, ttag, 4096, &data[..8192], false);
    assert_eq!(link.refused(&overlap), (Fes::PduSequenceError, 0));
    // The end must say so, and a second answer to the same R2T has no tag.
    let (mut link, ttag) = start();
    link.feed(&link.host.h2c_data(9, ttag, 0, &data[..8192], false));
    let silent_end = link.host.h2c_data(9, ttag, 8192, &data[..8192], false);
    assert_eq!(link.refused(&silent_end), (Fes::InvalidHeaderField, 1));
    let (mut link, ttag) = start();
    link.feed(&link.host.answer_r2t(9, ttag, 0, 16384, &data, 8192));
    let again = link.host.h2c_data(9, ttag, 0, &data[..8], false);
    assert_eq!(link.refused(&again), (Fes::InvalidHeaderField, 10));
}

#[test]
fn the_host_terminates() {
    for initialised in [false, true] {
        let mut link = if initialised { Link::new() } else { Link::bare(Config::default()) };
        let term = link.host.term_req(2, 77);
        assert_eq!(link.handle(&term), Err(Fault::Host { fes: 2, fei: 77 }));
        assert!(link.conn.is_closed() && !link.conn.wants_output());
        assert_eq!(link.conn.peer_due(), PeerDue::Close);
        assert_eq!(link.handle(&[0; 100]), Ok(100));
    }
}

#[test]
fn this_side_terminates() {
    let mut link = Link::new();
    link.feed(&link.host.capsule(&command(io::FLUSH, 1, 1), &[]));
    let (slot, ..) = link.command();
    link.conn.terminate(Fes::PduSequenceError, 5);
    link.conn.terminate(Fes::InvalidHeaderField, 6);
    assert_eq!(link.conn.peer_due(), PeerDue::Close);
    assert_eq!(link.output(), [TargetPdu::TermReq { fes: 2, fei: 5, header: vec![] }]);
    assert!(link.conn.is_closed());
    link.conn.complete(slot, Cqe::success(0), None);
    assert!(!link.conn.wants_output());
}
