//! What well-behaved hosts do, and commands that fail alone.

use super::*;
use crate::spec::opcode::{admin, io};
use crate::spec::sqe::{Sgl, SglDescriptor};
use crate::tcp::wire_client::{
    command, connect, read, with_descriptor, with_in_capsule, with_transfer, write, write_in_capsule,
};

#[test]
fn a_write_in_the_capsule() {
    for (header_digest, data_digest) in [(false, false), (true, false), (false, true), (true, true)] {
        for cpda in [0, 5] {
            let mut link = Link::with(Config { cpda, ..Config::default() }, header_digest, data_digest, 0);
            let data = pattern(4096, 7);
            link.feed(&link.host.capsule(&write_in_capsule(3, 1, 0, 8, 4096), &data));
            let (slot, _, sqe, got) = link.command();
            assert_eq!((sqe.opcode, got.to_vec()), (io::WRITE, data));
            link.conn.complete(slot, Cqe::success(0), None);
            let [TargetPdu::Response(cqe)] = link.output()[..] else { panic!() };
            assert_eq!((cqe.cid.get(), cqe.sqhd.get()), (3, 1));
        }
    }
}

#[test]
fn connect_data_fits_before_the_queue_is_known_and_on_io_queues() {
    let mut link = Link::with(Config { in_capsule_bytes: 0, ..Config::default() }, false, false, 0);
    for is_io_queue in [false, true] {
        link.conn.set_queue(128, true, is_io_queue);
        link.feed(&link.host.capsule(&connect(0, 1, 128, 0, false), &pattern(1024, 0)));
        let (slot, ..) = link.command();
        link.conn.complete(slot, Cqe::success(0), None);
    }
    link.feed(&link.host.capsule(&write_in_capsule(1, 1, 0, 1, 512), &pattern(512, 0)));
    assert_eq!(link.rejected(), Status::DATA_SGL_LENGTH_INVALID.dnr());
    link.output();
    link.conn.set_queue(32, true, false);
    link.feed(&link.host.capsule(&write_in_capsule(1, 1, 0, 1, 512), &pattern(512, 0)));
    link.command();
}

#[test]
fn in_capsule_data_behind_an_offset() {
    let mut link = Link::with(Config::default(), false, true, 0);
    let data = pattern(64, 1);
    let sgl = |offset, len| SglDescriptor::from(Sgl::InCapsule { offset, len });
    link.feed(&link.host.capsule(&with_descriptor(command(io::WRITE, 1, 1), sgl(16, 40)), &data));
    assert_eq!(link.command().3.to_vec(), data[16..56]);
    for (offset, len, status) in [
        (65, 0, Status::SGL_OFFSET_INVALID),
        (u64::MAX, 64, Status::SGL_OFFSET_INVALID),
        (1, 64, Status::DATA_SGL_LENGTH_INVALID),
        (0, u32::MAX, Status::DATA_SGL_LENGTH_INVALID),
    ] {
        link.feed(&link.host.capsule(&with_descriptor(command(io::WRITE, 2, 1), sgl(offset, len)), &data));
        assert_eq!(link.rejected(), status.dnr());
    }
    // In-capsule data that the descriptor makes nothing of is still skipped.
    link.feed(&link.host.capsule(&with_descriptor(command(io::WRITE, 2, 1), sgl(8, 0)), &data));
    assert_eq!(link.command().3.len(), 0);
}

#[test]
fn reads_send_data_then_the_response() {
    let mut link = Link::with(Config::default(), false, false, 3);
    link.feed(&link.host.capsule(&read(1, 1, 0, 8, 4096), &[]));
    let (slot, _, _, mut data) = link.command();
    let want = pattern(4096, 3);
    data.write_at(0, &want);
    link.conn.complete(slot, Cqe::success(0), Some(data));
    let sent = link.output();
    assert_eq!(sent[0], TargetPdu::Data { cid: 1, offset: 0, data: want, last: true, success: false });
    assert!(matches!(&sent[1..], [TargetPdu::Response(cqe)] if cqe.status().is_success() && cqe.sqhd.get() == 1));
    assert_eq!(link.freed, 1);
}

#[test]
fn success_needs_no_response_without_flow_control() {
    let mut link = Link::new();
    link.conn.set_queue(128, false, true);
    let mut run = |cqe: Cqe, len: usize| {
        link.feed(&link.host.capsule(&read(5, 1, 0, 8, 4096), &[]));
        let (slot, _, _, mut data) = link.command();
        data.truncate(len);
        link.conn.complete(slot, cqe, Some(data));
        link.output()
    };
    assert!(matches!(run(Cqe::success(0), 4096)[..], [TargetPdu::Data { success: true, last: true, .. }]));
    assert!(matches!(run(Cqe::success(0), 100)[..], [TargetPdu::Data { success: true, last: true, .. }]));
    let [TargetPdu::Data { success: false, .. }, TargetPdu::Response(cqe)] = run(Cqe::success(0).with_dw0(1), 4096)[..]
    else {
        panic!()
    };
    assert_eq!((cqe.dw0.get(), cqe.sqhd.get()), (1, 0));
    // Nothing was read, or it failed: there is only the response.
    assert!(matches!(run(Cqe::success(0), 0)[..], [TargetPdu::Response(_)]));
    let failed = Cqe::new(0, Status::UNRECOVERED_READ_ERROR);
    assert!(matches!(run(failed, 4096)[..], [TargetPdu::Response(_)]));
    let mut sqhd = Cqe::success(0);
    sqhd.sqhd.set(0xffff);
    let [TargetPdu::Response(cqe)] = run(sqhd, 0)[..] else { panic!() };
    assert_eq!(cqe.sqhd.get(), 0xffff);
}

#[test]
fn sqhd_counts_completions_and_wraps() {
    let mut link = Link::new();
    link.conn.set_queue(3, true, true);
    let mut heads = Vec::new();
    for cid in 0..7 {
        link.feed(&link.host.capsule(&command(io::FLUSH, cid, 1), &[]));
        let (slot, ..) = link.command();
        link.conn.complete(slot, Cqe::success(0), None);
        let [TargetPdu::Response(cqe)] = link.output()[..] else { panic!() };
        assert_eq!(cqe.cid.get(), cid);
        heads.push(cqe.sqhd.get());
    }
    assert_eq!(heads, [1, 2, 0, 1, 2, 0, 1]);
}

#[test]
fn h2c_data_in_many_pieces_and_two_transfers_at_once() {
    for piece in [1, 100, 4096, 100_000] {
        let config = Config { maxh2cdata: 4096, cpda: 2, ..Config::default() };
        let mut link = Link::with(config, true, true, 0);
        let (a, b) = (pattern(5000, 1), pattern(6001, 2));
        link.feed(&link.host.capsule(&write(1, 1, 0, 1, 5000), &[]));
        link.feed(&link.host.capsule(&write(2, 1, 0, 1, 6001), &[]));
        let [TargetPdu::R2t { ttag: ta, len: 5000, .. }, TargetPdu::R2t { ttag: tb, len: 6001, .. }] =
            link.output()[..]
        else {
            panic!()
        };
        let half = link.host.h2c_data(1, ta, 0, &a[..2000], false);
        link.feed(&half);
        link.feed(&link.host.answer_r2t(2, tb, 0, 6001, &b, piece));
        assert_eq!(link.command().3.to_vec(), b);
        link.feed(&link.host.h2c_data(1, ta, 2000, &a[2000..], true));
        assert_eq!(link.command().3.to_vec(), a);
    }
}

#[test]
fn payload_can_be_read_in_place() {
    let mut link = Link::with(Config::default(), false, true, 0);
    let data = pattern(5000, 9);
    assert!(link.conn.read_target().is_none());
    link.feed(&link.host.capsule(&write(1, 1, 0, 1, 5000), &[]));
    let [TargetPdu::R2t { ttag, .. }] = link.output()[..] else { panic!() };
    let pdu = link.host.h2c_data(1, ttag, 0, &data, true);
    link.feed(&pdu[..24]);
    let mut at = 24;
    while let Some(target) = link.conn.read_target() {
        let n = target.len().min(700);
        target[..n].copy_from_slice(&pdu[at..at + n]);
        link.conn.read_done(n);
        at += n;
    }
    assert_eq!(at, 5024);
    link.feed(&pdu[at..]);
    assert_eq!(link.command().3.to_vec(), data);
}

#[test]
fn memory_is_waited_for_in_order() {
    let mut link = Link::new();
    link.memory = 0;
    link.feed(&link.host.capsule(&read(1, 1, 0, 1, 100), &[]));
    link.feed(&link.host.capsule(&read(2, 1, 0, 1, 10), &[]));
    link.feed(&link.host.capsule(&write(3, 1, 0, 1, 50), &[]));
    link.feed(&link.host.capsule(&command(io::FLUSH, 4, 1), &[]));
    assert!(link.conn.stalled());
    // What needs no memory is not held up.
    assert_eq!(link.command().2.cid.get(), 4);
    link.memory = 60;
    link.retry();
    assert!(link.conn.poll_event().is_none(), "the first in line wants more");
    link.memory = 110;
    link.retry();
    assert_eq!(link.command().2.cid.get(), 1);
    assert_eq!(link.command().2.cid.get(), 2);
    assert!(link.conn.stalled() && link.output().is_empty());
    link.memory = 50;
    link.retry();
    assert!(!link.conn.stalled());
    assert!(matches!(link.output()[..], [TargetPdu::R2t { cid: 3, len: 50, .. }]));
}

#[test]
fn in_capsule_data_stops_the_stream_until_there_is_memory() {
    let mut link = Link::new();
    link.memory = 0;
    let mut stream = link.host.capsule(&write_in_capsule(1, 1, 0, 1, 512), &pattern(512, 1));
    stream.extend(link.host.capsule(&command(io::FLUSH, 2, 1), &[]));
    assert_eq!(link.handle(&stream), Ok(72));
    assert!(link.conn.stalled() && !link.conn.wants_input());
    assert_eq!(link.handle(&stream[72..]), Ok(0));
    link.memory = 512;
    link.retry();
    assert!(!link.conn.stalled() && link.conn.wants_input());
    link.feed(&stream[72..]);
    assert_eq!(link.command().3.to_vec(), pattern(512, 1));
    assert_eq!(link.command().2.cid.get(), 2);
}

#[test]
fn h2c_data_is_read_while_commands_wait_for_memory() {
    let mut link = Link::new();
    link.memory = 100;
    link.feed(&link.host.capsule(&write(1, 1, 0, 1, 100), &[]));
    link.feed(&link.host.capsule(&write(2, 1, 0, 1, 100), &[]));
    let [TargetPdu::R2t { cid: 1, ttag, .. }] = link.output()[..] else { panic!() };
    link.feed(&link.host.answer_r2t(1, ttag, 0, 100, &pattern(100, 5), 64));
    assert_eq!(link.command().2.cid.get(), 1);
    link.memory = 100;
    link.retry();
    assert!(matches!(link.output()[..], [TargetPdu::R2t { cid: 2, .. }]));
}

#[test]
fn the_r2t_window_bounds_what_is_asked_for() {
    let mut link = Link::with(Config { r2t_window_bytes: 1000, ..Config::default() }, false, false, 0);
    for (cid, len) in [(1, 5000), (2, 600), (3, 400), (4, 1)] {
        link.feed(&link.host.capsule(&write(cid, 1, 0, 1, len), &[]));
    }
    let [TargetPdu::R2t { cid: 1, ttag, len: 5000, .. }] = link.output()[..] else { panic!() };
    link.feed(&link.host.answer_r2t(1, ttag, 0, 5000, &pattern(5000, 0), 5000));
    link.retry();
    let [TargetPdu::R2t { cid: 2, .. }, TargetPdu::R2t { cid: 3, ttag, .. }] = link.output()[..] else { panic!() };
    assert!(link.conn.stalled());
    link.feed(&link.host.answer_r2t(3, ttag, 0, 400, &pattern(400, 0), 400));
    link.retry();
    assert!(matches!(link.output()[..], [TargetPdu::R2t { cid: 4, .. }]));
}

#[test]
fn a_data_digest_error_fails_one_command() {
    let mut link = Link::with(Config::default(), true, true, 0);
    let data = pattern(512, 1);
    let mut bad = link.host.capsule(&write_in_capsule(1, 1, 0, 1, 512), &data);
    *bad.last_mut().unwrap() ^= 0x80;
    link.feed(&bad);
    assert_eq!(link.rejected(), Status::TRANSIENT_TRANSPORT_ERROR);
    assert!(!Status::TRANSIENT_TRANSPORT_ERROR.is_dnr());
    assert!(matches!(&link.output()[..], [TargetPdu::Response(cqe)] if cqe.sqhd.get() == 1));

    link.feed(&link.host.capsule(&write(2, 1, 0, 1, 512), &[]));
    let [TargetPdu::R2t { ttag, .. }] = link.output()[..] else { panic!() };
    let mut stream = link.host.h2c_data(2, ttag, 0, &data[..200], false);
    let at = stream.len() - 100;
    stream[at] ^= 1;
    stream.extend(link.host.h2c_data(2, ttag, 200, &data[200..], true));
    stream.extend(link.host.capsule(&write_in_capsule(3, 1, 0, 1, 512), &data));
    link.feed(&stream);
    assert_eq!(link.rejected(), Status::TRANSIENT_TRANSPORT_ERROR);
    assert_eq!(link.command().3.to_vec(), data);
    assert_eq!(link.conn.data_digest_errors(), 2);
}

#[test]
fn transfers_that_cannot_be() {
    let mut link = Link::new();
    let data = pattern(512, 0);
    let raw = |opcode, id| with_descriptor(command(opcode, 1, 1), SglDescriptor::raw(0, 512, id));
    let mut no_sgl = read(1, 1, 0, 1, 512);
    no_sgl.flags = 0;
    let mut both = write_in_capsule(1, 1, 0, 1, 512);
    both.flags = 0xc0;
    for (sqe, data, status) in [
        (read(1, 1, 0, 1, 128 * 1024 + 1), &[][..], Status::DATA_SGL_LENGTH_INVALID),
        (write(1, 1, 0, 1, u32::MAX), &[], Status::DATA_SGL_LENGTH_INVALID),
        (write_in_capsule(1, 1, 0, 1, 512), &[], Status::DATA_SGL_LENGTH_INVALID),
        (write_in_capsule(1, 1, 0, 1, 8196), &pattern(8196, 0), Status::DATA_SGL_LENGTH_INVALID),
        (with_in_capsule(read(1, 1, 0, 1, 0), 512), &data, Status::SGL_TYPE_INVALID),
        (write(1, 1, 0, 1, 512), &data, Status::SGL_TYPE_INVALID),
        (command(io::FLUSH, 1, 1), &data, Status::INVALID_FIELD),
        (no_sgl, &[], Status::INVALID_FIELD),
        (both, &data, Status::INVALID_FIELD),
        (raw(io::READ, 0x00), &[], Status::SGL_TYPE_INVALID),
        (raw(io::READ, 0x40), &[], Status::SGL_TYPE_INVALID),
        (raw(io::WRITE, 0x30), &[], Status::SGL_TYPE_INVALID),
        (raw(io::WRITE, 0x5b), &[], Status::SGL_TYPE_INVALID),
        (raw(io::WRITE, 0xf0), &data, Status::SGL_TYPE_INVALID),
    ] {
        link.feed(&link.host.capsule(&sqe, data));
        assert_eq!(link.rejected(), status.dnr(), "{sqe:?}");
        let [TargetPdu::Response(cqe)] = link.output()[..] else { panic!() };
        assert_eq!((cqe.cid.get(), cqe.status()), (1, status.dnr()));
    }
    assert_eq!(link.conn.outstanding(), 0);
}

#[test]
fn commands_without_data_come_as_they_are() {
    let mut link = Link::new();
    let zeroed = SglDescriptor::raw(0, 0, 0);
    for sqe in [
        command(io::FLUSH, 1, 1),
        command(admin::GET_FEATURES, 2, 0),
        command(admin::SET_FEATURES, 3, 0),
        with_descriptor(command(admin::GET_FEATURES, 4, 0), zeroed),
        with_descriptor(command(admin::KEEP_ALIVE, 5, 0), SglDescriptor::raw(1, 512, 0xff)),
        command(0x03, 6, 0),
    ] {
        link.feed(&link.host.capsule(&sqe, &[]));
        let (_, seq, got, data) = link.command();
        assert_eq!((got, data.len(), seq), (sqe, 0, u32::from(sqe.cid.get()) - 1));
    }
}

#[test]
fn a_cid_in_use_is_refused() {
    let mut link = Link::new();
    link.feed(&link.host.capsule(&command(io::FLUSH, 7, 1), &[]));
    link.feed(&link.host.capsule(&command(io::FLUSH, 7, 1), &[]));
    let (first, ..) = link.command();
    assert_eq!(link.rejected(), Status::CID_CONFLICT.dnr());
    link.conn.complete(first, Cqe::success(0), None);
    link.feed(&link.host.capsule(&command(io::FLUSH, 7, 1), &[]));
    link.command();
}

#[test]
fn aborts_reach_commands_wherever_they_are() {
    let mut link = Link::new();
    assert_eq!(link.conn.abort(1), AbortOutcome::NotFound);
    link.feed(&link.host.capsule(&command(io::FLUSH, 1, 1), &[]));
    let (slot, ..) = link.command();
    assert_eq!(link.conn.abort(1), AbortOutcome::Executing(slot));
    link.conn.complete(slot, Cqe::success(0), None);
    assert_eq!(link.conn.abort(1), AbortOutcome::NotFound);

    // Ready, waiting for memory, and in the middle of a transfer.
    link.feed(&link.host.capsule(&command(io::FLUSH, 2, 1), &[]));
    assert_eq!(link.conn.abort(2), AbortOutcome::Undelivered);
    assert_eq!(link.rejected(), Status::ABORT_REQUESTED);
    link.memory = 0;
    link.feed(&link.host.capsule(&read(3, 1, 0, 1, 512), &[]));
    assert_eq!(link.conn.abort(3), AbortOutcome::Undelivered);
    assert_eq!(link.rejected(), Status::ABORT_REQUESTED);
    assert!(!link.conn.stalled());
    link.memory = 512;
    link.feed(&link.host.capsule(&write(4, 1, 0, 1, 512), &[]));
    let Some(TargetPdu::R2t { ttag, .. }) = link.output().pop() else { panic!() };
    assert_eq!(link.conn.abort(4), AbortOutcome::Undelivered);
    assert!(link.conn.poll_event().is_none(), "the host still sends what it was asked for");
    link.feed(&link.host.answer_r2t(4, ttag, 0, 512, &pattern(512, 0), 512));
    assert_eq!(link.rejected(), Status::ABORT_REQUESTED);
    // In-capsule data that waits for memory needs none any more.
    let capsule = link.host.capsule(&write_in_capsule(5, 1, 0, 1, 512), &pattern(512, 0));
    assert_eq!(link.handle(&capsule), Ok(72));
    assert_eq!(link.conn.abort(5), AbortOutcome::Undelivered);
    link.retry();
    link.feed(&capsule[72..]);
    assert_eq!(link.rejected(), Status::ABORT_REQUESTED);
}

#[test]
fn a_full_queue_of_unsent_responses_makes_input_wait() {
    let mut link = Link::with(Config { slots: 4, ..Config::default() }, false, false, 0);
    let capsule = link.host.capsule(&command(io::FLUSH, 1, 1), &[]);
    let mut taken = 0;
    while link.conn.wants_input() {
        assert_eq!(link.handle(&capsule), Ok(72));
        let (slot, ..) = link.command();
        link.conn.complete(slot, Cqe::success(0), None);
        taken += 1;
    }
    assert!(taken >= 4, "a host within its queue is never held up");
    assert_eq!(link.handle(&capsule), Ok(0));
    assert_eq!(link.output().len(), taken);
    link.feed(&capsule);
}

#[test]
fn closing_frees_what_was_queued() {
    let mut link = Link::new();
    link.feed(&link.host.capsule(&read(1, 1, 0, 1, 512), &[]));
    link.feed(&link.host.capsule(&read(2, 1, 0, 1, 512), &[]));
    link.feed(&link.host.capsule(&with_transfer(command(io::READ, 3, 1), 512), &[]));
    let (first, _, _, data) = link.command();
    let (second, ..) = link.command();
    link.conn.complete(first, Cqe::success(0), Some(data));
    let mut freed = 0;
    link.conn.close(&mut |_| freed += 1);
    assert_eq!((freed, link.conn.outstanding()), (1, 1));
    assert!(link.conn.is_closed() && !link.conn.wants_output() && link.conn.poll_event().is_none());
    link.conn.complete(second, Cqe::success(0), None);
    assert_eq!(link.conn.outstanding(), 0);
}

#[test]
#[should_panic(expected = "has no delivered command")]
fn completing_twice_is_a_bug() {
    let mut link = Link::new();
    link.feed(&link.host.capsule(&command(io::FLUSH, 1, 1), &[]));
    let (slot, ..) = link.command();
    link.conn.complete(slot, Cqe::success(0), None);
    link.conn.complete(slot, Cqe::success(0), None);
}
