//! Commands that are well formed PDUs and wrong all the same: Base 5, NVM 3.

use nvmf::spec::opcode::{admin, io};
use nvmf::spec::pdu::Fes;
use nvmf::spec::sqe::Sgl;
use nvmf::spec::{Sqe, Status};
use nvmf::tcp::wire_client::{
    TargetPdu, command, read, with_descriptor, with_in_capsule, with_transfer, write, write_in_capsule,
};
use serde_json::json;

use crate::common::wait_for;
use crate::host::{BLOCK, BLOCKS, HOSTNQN, Host, NQN, Target};

const LEN: usize = BLOCK as usize;
const FUSED_FIRST: u8 = 1;
const FUSED_SECOND: u8 = 2;

/// The same command with bits of FUSE.
fn fused(mut sqe: Sqe, fuse: u8) -> Sqe {
    sqe.flags |= fuse;
    sqe
}

fn compare_in_capsule(cid: u16, nsid: u32, slba: u64, blocks: u32, len: u32) -> Sqe {
    let mut sqe = write_in_capsule(cid, nsid, slba, blocks, len);
    sqe.opcode = io::COMPARE;
    sqe
}

/// Statuses of two commands, in the order of their completion, which must be that of their submission.
#[track_caller]
fn two(host: &mut Host, first: u16, second: u16) -> (Status, Status) {
    let (one, two) = (host.response(), host.response());
    assert_eq!((one.cid.get(), two.cid.get()), (first, second));
    (one.status(), two.status())
}

#[test]
fn compare_and_write() {
    let target = Target::start();
    let (_admin, cntlid) = target.admin();
    let mut host = target.io(cntlid, 1);
    let (a, b, c) = (vec![0xaa; LEN], vec![0xbb; LEN], vec![0xcc; LEN]);
    assert_eq!(host.write(write_in_capsule(1, 1, 5, 1, BLOCK), &a).status(), Status::SUCCESS);
    let pair = |host: &mut Host, expected: &[u8], new: &[u8], first: (u32, u64), second: (u32, u64)| {
        let compare = fused(compare_in_capsule(10, first.0, first.1, 1, BLOCK), FUSED_FIRST);
        let write = fused(write_in_capsule(11, second.0, second.1, 1, BLOCK), FUSED_SECOND);
        host.send_command(&compare, expected);
        host.send_command(&write, new);
        two(host, 10, 11)
    };
    // What is there is replaced; what is not there is not.
    assert_eq!(pair(&mut host, &a, &b, (1, 5), (1, 5)), (Status::SUCCESS, Status::SUCCESS));
    assert_eq!(pair(&mut host, &a, &c, (1, 5), (1, 5)), (Status::COMPARE_FAILURE.dnr(), Status::ABORTED_FAILED_FUSED));
    assert_eq!(host.read(read(2, 1, 5, 1, BLOCK)), (Status::SUCCESS, b.clone()));
    // Different blocks, different namespaces, blocks that do not exist.
    let failed = (Status::ABORTED_FAILED_FUSED, Status::INVALID_FIELD.dnr());
    assert_eq!(pair(&mut host, &b, &c, (1, 5), (1, 6)), failed);
    assert_eq!(pair(&mut host, &b, &c, (1, 5), (2, 5)).0, Status::ABORTED_FAILED_FUSED);
    let beyond = pair(&mut host, &b, &c, (1, 5), (1, BLOCKS));
    assert_eq!(beyond, (Status::ABORTED_FAILED_FUSED, Status::LBA_OUT_OF_RANGE.dnr()));
    assert_eq!(host.read(read(3, 1, 5, 1, BLOCK)), (Status::SUCCESS, b.clone()));

    // The second half alone.
    let alone = fused(write_in_capsule(12, 1, 5, 1, BLOCK), FUSED_SECOND);
    assert_eq!(host.status(alone, &c), Status::ABORTED_MISSING_FUSED);
    // The first half, and then something else, which is executed.
    let first = fused(compare_in_capsule(13, 1, 5, 1, BLOCK), FUSED_FIRST);
    host.send_command(&first, &b);
    host.send_command(&command(io::FLUSH, 14, 1), &[]);
    assert_eq!(two(&mut host, 13, 14), (Status::ABORTED_MISSING_FUSED, Status::SUCCESS));
    // Two first halves and a second: the pair is the last two.
    host.send_command(&fused(compare_in_capsule(15, 1, 5, 1, BLOCK), FUSED_FIRST), &b);
    host.send_command(&fused(compare_in_capsule(16, 1, 5, 1, BLOCK), FUSED_FIRST), &b);
    host.send_command(&fused(write_in_capsule(17, 1, 5, 1, BLOCK), FUSED_SECOND), &c);
    assert_eq!(host.response().status(), Status::ABORTED_MISSING_FUSED);
    assert_eq!(two(&mut host, 16, 17), (Status::SUCCESS, Status::SUCCESS));
    assert_eq!(host.read(read(4, 1, 5, 1, BLOCK)), (Status::SUCCESS, c.clone()));
    // Fused operations that do not exist. A first half is looked at when the next command has come.
    for sqe in
        [fused(compare_in_capsule(20, 1, 5, 1, BLOCK), FUSED_SECOND), fused(write_in_capsule(20, 1, 5, 1, BLOCK), 3)]
    {
        assert_eq!(host.status(sqe, &a), Status::INVALID_FIELD.dnr());
    }
    host.send_command(&fused(write_in_capsule(21, 1, 5, 1, BLOCK), FUSED_FIRST), &a);
    host.send_command(&fused(command(io::FLUSH, 22, 1), FUSED_FIRST), &[]);
    host.send_command(&command(io::FLUSH, 23, 1), &[]);
    for (cid, status) in [(21, Status::INVALID_FIELD.dnr()), (22, Status::INVALID_FIELD.dnr()), (23, Status::SUCCESS)] {
        let cqe = host.response();
        assert_eq!((cqe.cid.get(), cqe.status()), (cid, status));
    }
    assert_eq!(host.read(read(5, 1, 5, 1, BLOCK)), (Status::SUCCESS, c));
}

#[test]
fn a_fused_pair_whose_data_are_asked_for() {
    let target = Target::start();
    let (_admin, cntlid) = target.admin();
    let mut host = target.io(cntlid, 1);
    let mut compare = fused(write(1, 1, 0, 1, BLOCK), FUSED_FIRST);
    compare.opcode = io::COMPARE;
    host.send_command(&compare, &[]);
    host.send_command(&fused(write(2, 1, 0, 1, BLOCK), FUSED_SECOND), &[]);
    let (one, two_) = (host.r2t(), host.r2t());
    assert_eq!((one.0, two_.0), (1, 2));
    // The second half's data come first.
    let (zeroes, ones) = (vec![0; LEN], vec![1; LEN]);
    let late = host.wire.answer_r2t(2, two_.1, 0, BLOCK, &ones, u32::MAX);
    host.send(&late);
    let early = host.wire.answer_r2t(1, one.1, 0, BLOCK, &zeroes, u32::MAX);
    host.send(&early);
    let mut answers = [host.response(), host.response()].map(|cqe| (cqe.cid.get(), cqe.status()));
    answers.sort_by_key(|answer| answer.0);
    assert_eq!(answers, [(1, Status::SUCCESS), (2, Status::SUCCESS)]);
    assert_eq!(host.read(read(3, 1, 0, 1, BLOCK)), (Status::SUCCESS, ones));
}

#[test]
fn namespaces_and_blocks_that_do_not_exist() {
    let target = Target::start();
    let (mut admin, cntlid) = target.admin();
    let mut host = target.io(cntlid, 1);
    for nsid in [0, 3, 33, 0x8000_0000, 0xffff_fffe, 0xffff_ffff] {
        assert_eq!(host.status(command(io::FLUSH, 1, nsid), &[]), Status::INVALID_NAMESPACE_OR_FORMAT.dnr());
        let sqe = read(2, nsid, 0, 1, BLOCK);
        assert_eq!(host.read(sqe).0, Status::INVALID_NAMESPACE_OR_FORMAT.dnr(), "NSID {nsid:#x}");
    }
    let beyond = Status::LBA_OUT_OF_RANGE.dnr();
    for (slba, blocks) in [(BLOCKS, 1), (BLOCKS - 1, 2), (u64::MAX, 1), (u64::MAX - 3, 8), (1 << 63, 1)] {
        assert_eq!(host.read(read(3, 1, slba, blocks, blocks * BLOCK)).0, beyond, "{slba}+{blocks}");
        let data = vec![1; blocks as usize * LEN];
        assert_eq!(host.write(write_in_capsule(4, 1, slba, blocks, blocks * BLOCK), &data).status(), beyond);
        let mut zeroes = command(io::WRITE_ZEROES, 5, 1);
        zeroes.cdw10.set(slba as u32);
        zeroes.cdw11.set((slba >> 32) as u32);
        zeroes.cdw12.set(blocks - 1);
        assert_eq!(host.status(zeroes, &[]), beyond);
    }
    // The last block is there.
    assert_eq!(host.read(read(6, 1, BLOCKS - 1, 1, BLOCK)).0, Status::SUCCESS);
    for opcode in [0x03, 0x04, 0x0c, 0x0d, 0x7c, 0x80, 0xff] {
        let status = host.status(command(opcode, 7, 1), &[]);
        assert!(matches!(status, s if s == Status::INVALID_OPCODE.dnr()), "{opcode:02x}h: {status}");
    }
    // A namespace that goes while the queue is connected.
    target.server.call("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 2}));
    wait_for("the namespace is gone here too", || {
        (host.read(read(8, 2, 0, 1, 4096)).0 == Status::INVALID_NAMESPACE_OR_FORMAT.dnr()).then_some(())
    });
    let identify = admin.identify(0, 0xffff_fff0);
    assert_eq!(admin.read(identify).0, Status::INVALID_NAMESPACE_OR_FORMAT.dnr().more());
}

#[test]
fn descriptors_that_tcp_does_not_have() {
    let target = Target::start();
    let (_admin, cntlid) = target.admin();
    let mut host = target.io(cntlid, 1);
    let base = read(1, 1, 0, 1, BLOCK);
    for sgl in [
        Sgl::DataBlock { address: 0xdead_beef, len: BLOCK },
        Sgl::Keyed { address: 1, len: BLOCK, key: 7, invalidate: false },
        Sgl::Segment { address: 0, len: 16, in_capsule: false },
        Sgl::LastSegment { address: 0, len: 16, in_capsule: true },
        Sgl::BitBucket { len: BLOCK },
        Sgl::InCapsule { offset: 0, len: BLOCK },
    ] {
        let (status, data) = host.read(with_descriptor(base, sgl.into()));
        assert_eq!(status, Status::SGL_TYPE_INVALID.dnr(), "{sgl:?}");
        assert!(data.is_empty());
    }
    // PRPs do not exist on fabrics.
    let mut prp = base;
    prp.flags &= 0x3f;
    assert_eq!(host.read(prp).0, Status::INVALID_FIELD.dnr());
    // In-capsule data that begins beyond the capsule.
    let far =
        with_descriptor(write_in_capsule(2, 1, 0, 1, BLOCK), Sgl::InCapsule { offset: 1 << 40, len: BLOCK }.into());
    assert_eq!(host.status(far, &[0; LEN]), Status::SGL_OFFSET_INVALID.dnr());
    // Less memory than the command reads: nothing comes.
    let (status, data) = host.read(read(3, 1, 0, 2, BLOCK));
    assert_eq!((status, data.len()), (Status::DATA_SGL_LENGTH_INVALID.dnr(), 0));
    // More memory than it reads is no mistake.
    let (status, data) = host.read(read(4, 1, 0, 1, 3 * BLOCK));
    assert_eq!((status, data.len()), (Status::SUCCESS, LEN));
}

fn dsm_range(slba: u64, blocks: u32) -> Vec<u8> {
    [&[0; 4], &blocks.to_le_bytes()[..], &slba.to_le_bytes()].concat()
}

/// Deallocate; `count` is the number of ranges that the command claims.
fn deallocate(cid: u16, count: u32, data: &[u8]) -> Sqe {
    let mut sqe = with_in_capsule(command(io::DATASET_MANAGEMENT, cid, 1), data.len() as u32);
    sqe.cdw10.set(count - 1);
    sqe.cdw11.set(4);
    sqe
}

#[test]
fn dataset_management() {
    let target = Target::start();
    let (_admin, cntlid) = target.admin();
    let mut host = target.io(cntlid, 1);
    assert_eq!(host.write(write_in_capsule(1, 1, 0, 8, 4096), &[9; 4096]).status(), Status::SUCCESS);
    let mut check = |count: u32, ranges: &[(u64, u32)]| {
        let data: Vec<u8> = ranges.iter().flat_map(|(slba, blocks)| dsm_range(*slba, *blocks)).collect();
        host.status(deallocate(2, count, &data), &data)
    };
    let short = Status::DATA_SGL_LENGTH_INVALID.dnr();
    assert_eq!(check(2, &[(0, 1)]), short, "fewer ranges than claimed");
    assert_eq!(check(256, &[(0, 1)]), short);
    let beyond = Status::LBA_OUT_OF_RANGE.dnr();
    assert_eq!(check(1, &[(BLOCKS, 1)]), beyond);
    assert_eq!(check(1, &[(0, u32::MAX)]), beyond);
    assert_eq!(check(1, &[(u64::MAX, u32::MAX)]), beyond);
    // One bad range spoils all: nothing has been deallocated.
    assert_eq!(check(2, &[(0, 8), (BLOCKS - 1, 2)]), beyond);
    assert_eq!(host.read(read(3, 1, 0, 8, 4096)), (Status::SUCCESS, vec![9; 4096]));
    let mut check = |count: u32, ranges: &[(u64, u32)]| {
        let data: Vec<u8> = ranges.iter().flat_map(|(slba, blocks)| dsm_range(*slba, *blocks)).collect();
        host.status(deallocate(4, count, &data), &data)
    };
    // Nothing, everything, and as many ranges as there can be.
    assert_eq!(check(1, &[(0, 0)]), Status::SUCCESS);
    assert_eq!(check(256, &(0..256).map(|n| (n * 2, 1)).collect::<Vec<_>>()), Status::SUCCESS);
    let (status, data) = host.read(read(5, 1, 0, 2, 2 * BLOCK));
    assert_eq!(status, Status::SUCCESS);
    assert!(data[..LEN].iter().all(|byte| *byte == 0) && data[LEN..].iter().all(|byte| *byte == 9));
}

fn copy_range(slba: u64, blocks: u32) -> Vec<u8> {
    let mut range = vec![0; 32];
    range[8..16].copy_from_slice(&slba.to_le_bytes());
    range[16..18].copy_from_slice(&(blocks as u16).wrapping_sub(1).to_le_bytes());
    range
}

/// Copy to `to`; `count` is the number of ranges that the command claims.
fn copy(cid: u16, to: u64, count: u32, data: &[u8]) -> Sqe {
    let mut sqe = with_in_capsule(command(io::COPY, cid, 1), data.len() as u32);
    sqe.cdw10.set(to as u32);
    sqe.cdw11.set((to >> 32) as u32);
    sqe.cdw12.set(count - 1);
    sqe
}

#[test]
fn copies() {
    let target = Target::start();
    let (mut admin, cntlid) = target.admin();
    let identify = admin.identify(0, 1);
    let (_, namespace) = admin.read(identify);
    let mssrl = u32::from(u16::from_le_bytes(namespace[74..76].try_into().unwrap()));
    let msrc = u32::from(namespace[80]) + 1;
    assert!(mssrl > 0);
    let mut host = target.io(cntlid, 1);
    for block in 0..8_u8 {
        let cid = host.cid();
        let status = host.write(write_in_capsule(cid, 1, block.into(), 1, BLOCK), &[block + 1; LEN]).status();
        assert_eq!(status, Status::SUCCESS);
    }
    let mut check = |to: u64, count: u32, ranges: &[(u64, u32)]| {
        let data: Vec<u8> = ranges.iter().flat_map(|(slba, blocks)| copy_range(*slba, *blocks)).collect();
        let cid = host.cid();
        host.status(copy(cid, to, count, &data), &data)
    };
    assert_eq!(check(100, 2, &[(6, 2), (0, 1)]), Status::SUCCESS);
    let beyond = Status::LBA_OUT_OF_RANGE.dnr();
    assert_eq!(check(100, 1, &[(BLOCKS, 1)]), beyond);
    assert_eq!(check(100, 1, &[(u64::MAX, 8)]), beyond);
    assert_eq!(check(BLOCKS - 1, 1, &[(0, 2)]), beyond);
    assert_eq!(check(u64::MAX, 1, &[(0, 2)]), beyond);
    assert_eq!(check(100, 2, &[(0, 1)]), Status::DATA_SGL_LENGTH_INVALID.dnr());
    assert_eq!(check(1, 1, &[(0, 4)]), Status::OVERLAPPING_RANGE.dnr());
    let many: Vec<_> = (0..=msrc).map(|n| (u64::from(n), 1)).collect();
    assert_eq!(check(100, msrc + 1, &many), Status::COMMAND_SIZE_LIMIT_EXCEEDED.dnr());
    if mssrl < BLOCKS as u32 {
        assert_eq!(check(0, 1, &[(0, mssrl + 1)]), Status::COMMAND_SIZE_LIMIT_EXCEEDED.dnr());
    }
    let (status, data) = host.read(read(99, 1, 100, 4, 4 * BLOCK));
    assert_eq!(status, Status::SUCCESS);
    assert_eq!([data[0], data[LEN], data[2 * LEN], data[3 * LEN]], [7, 8, 1, 0]);
    // A format of the ranges that is not known.
    let data = copy_range(0, 1);
    let mut format = copy(98, 100, 1, &data);
    format.cdw12.set(1 << 8);
    assert_eq!(host.status(format, &data), Status::INVALID_FIELD.dnr());
}

#[test]
fn one_identifier_for_two_commands() {
    let target = Target::start();
    let (_admin, cntlid) = target.admin();
    let mut host = target.io(cntlid, 1);
    host.send_command(&write(1, 1, 0, 1, BLOCK), &[]);
    let (_, ttag, ..) = host.r2t();
    host.send_command(&write(1, 1, 8, 1, BLOCK), &[]);
    let cqe = host.response();
    assert_eq!((cqe.cid.get(), cqe.status()), (1, Status::CID_CONFLICT.dnr()));
    // The first one goes on.
    let data = host.wire.answer_r2t(1, ttag, 0, BLOCK, &[4; LEN], u32::MAX);
    host.send(&data);
    assert_eq!(host.response().status(), Status::SUCCESS);
    assert_eq!(host.read(read(1, 1, 0, 1, BLOCK)), (Status::SUCCESS, vec![4; LEN]));
}

#[test]
fn more_commands_than_any_queue_has() {
    let target = Target::start();
    let (mut admin, cntlid) = target.admin();
    let mut host = target.io(cntlid, 1);
    // Writes that wait for their data: none ends.
    for cid in 0..=128 {
        host.send_command(&write(cid, 1, 0, 1, BLOCK), &[]);
    }
    assert_eq!(host.terminated(), (Fes::PduSequenceError, 0));
    assert_eq!(admin.property(0x1c, 4), 1);
    target.still_serves();
}

fn abort(host: &mut Host, sqid: u16, cid: u16) -> (u16, Sqe) {
    let sqe = host.admin_command(admin::ABORT, 0, u32::from(cid) << 16 | u32::from(sqid), 0);
    (sqe.cid.get(), sqe)
}

#[test]
fn aborts() {
    // Two reactors where there are two cores: an abort may have to travel.
    let target = Target::start();
    let (mut admin, cntlid) = target.admin();
    let mut host = target.io(cntlid, 1);
    // A write that waits for its data: it ends as aborted when the data that were asked for have come.
    host.send_command(&write(5, 1, 0, 1, BLOCK), &[]);
    let (_, ttag, ..) = host.r2t();
    let (_, sqe) = abort(&mut admin, 1, 5);
    let cqe = admin.call(sqe, &[]);
    assert_eq!((cqe.status(), cqe.dw0.get() & 1), (Status::SUCCESS, 0), "aborted");
    let data = host.wire.answer_r2t(5, ttag, 0, BLOCK, &[1; LEN], u32::MAX);
    host.send(&data);
    let cqe = host.response();
    assert_eq!((cqe.cid.get(), cqe.status()), (5, Status::ABORT_REQUESTED));
    assert_eq!(host.read(read(6, 1, 0, 1, BLOCK)), (Status::SUCCESS, vec![0; LEN]));
    // What is not there: no such command, no such queue.
    for (sqid, cid) in [(1, 5), (1, 77), (2, 5), (0xffff, 5), (0, 77)] {
        let (_, sqe) = abort(&mut admin, sqid, cid);
        let cqe = admin.call(sqe, &[]);
        assert_eq!((cqe.status(), cqe.dw0.get() & 1), (Status::SUCCESS, 1), "{sqid} {cid}");
    }
    // An event request of the admin queue.
    let request = admin.admin_command(admin::ASYNC_EVENT_REQUEST, 0, 0, 0);
    admin.send_command(&request, &[]);
    let (abort_cid, sqe) = abort(&mut admin, 0, request.cid.get());
    admin.send_command(&sqe, &[]);
    let mut answers = [admin.response(), admin.response()].map(|cqe| (cqe.cid.get(), cqe.status(), cqe.dw0.get()));
    answers.sort_by_key(|answer| answer.0);
    assert_eq!(answers, [(request.cid.get(), Status::ABORT_REQUESTED, 0), (abort_cid, Status::SUCCESS, 0)]);
}

#[test]
fn event_requests() {
    let target = Target::start();
    let (mut admin, cntlid) = target.admin();
    let identify = admin.identify(1, 0);
    let (_, controller) = admin.read(identify);
    let limit = u32::from(controller[259]) + 1;
    // The host wants to know of namespaces.
    let sqe = admin.admin_command(admin::SET_FEATURES, 0, 0x0b, 1 << 8);
    assert_eq!(admin.status(sqe, &[]), Status::SUCCESS);
    let mut waiting = Vec::new();
    for _ in 0..limit {
        let sqe = admin.admin_command(admin::ASYNC_EVENT_REQUEST, 0, 0, 0);
        waiting.push(sqe.cid.get());
        admin.send_command(&sqe, &[]);
    }
    let one_more = admin.admin_command(admin::ASYNC_EVENT_REQUEST, 0, 0, 0);
    assert_eq!(admin.status(one_more, &[]), Status::AER_LIMIT_EXCEEDED.dnr().more());
    // The queue goes on while they wait.
    assert_eq!(admin.property(0x1c, 4), 1);
    target.server.call("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 2}));
    let cqe = admin.response();
    assert!(waiting.contains(&cqe.cid.get()));
    assert_eq!((cqe.status(), cqe.dw0.get()), (Status::SUCCESS, 0x0004_0002), "notice, namespaces, log page 04h");
    // Told once: the log has to be read before it is told again.
    target.server.call("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": "N", "nsid": 7}}));
    let mut io = target.io(cntlid, 1);
    wait_for("the namespace is there", || io.status(command(io::FLUSH, 1, 7), &[]).is_success().then_some(()));
    let get = admin.admin_command(admin::GET_LOG_PAGE, 0xffff_ffff, 0x04 | 1023 << 16, 0);
    let (status, log) = admin.read(with_transfer(get, 4096));
    assert_eq!(status, Status::SUCCESS);
    let listed: Vec<_> = log.chunks(4).map(|id| u32::from_le_bytes(id.try_into().unwrap())).take(3).collect();
    assert_eq!(listed, [2, 7, 0]);
    target.server.call("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 7}));
    assert_eq!(admin.response().dw0.get(), 0x0004_0002);
    // A reset ends the others, and they may come again.
    assert_eq!(admin.set_property(0x14, 0x0046_0000), Status::SUCCESS);
    for cid in &waiting[2..] {
        let cqe = admin.response();
        assert_eq!((cqe.cid.get(), cqe.status()), (*cid, Status::ABORTED_SQ_DELETION));
    }
    wait_for("RDY is 0", || (admin.property(0x1c, 4) & 1 == 0).then_some(()));
    admin.enable();
    for _ in 0..limit {
        let sqe = admin.admin_command(admin::ASYNC_EVENT_REQUEST, 0, 0, 0);
        admin.send_command(&sqe, &[]);
    }
    let one_more = admin.admin_command(admin::ASYNC_EVENT_REQUEST, 0, 0, 0);
    assert_eq!(admin.status(one_more, &[]), Status::AER_LIMIT_EXCEEDED.dnr().more());
}

#[test]
fn admin_commands_that_make_no_sense() {
    let target = Target::start();
    let (mut host, _) = target.admin();
    for cns in [0x0a, 0x1f, 0x7f, 0xff] {
        let identify = host.identify(cns, 1);
        assert_eq!(host.read(identify).0, Status::INVALID_FIELD.dnr().more(), "CNS {cns:02x}h");
    }
    for nsid in [0, 33, 0xffff_fffe] {
        let identify = host.identify(0, nsid);
        assert_eq!(host.read(identify).0, Status::INVALID_NAMESPACE_OR_FORMAT.dnr().more(), "NSID {nsid:#x}");
    }
    // Opcodes that only controllers on PCIe have, and that nobody has.
    for opcode in [0x00, 0x01, 0x04, 0x05, 0x10, 0x80, 0x84, 0xc0, 0xff] {
        let sqe = host.admin_command(opcode, 0, 0, 0);
        assert_eq!(host.status(sqe, &[]), Status::INVALID_OPCODE.dnr().more(), "{opcode:02x}h");
    }
    let set = |host: &mut Host, fid: u32, value: u32| {
        let sqe = host.admin_command(admin::SET_FEATURES, 0, fid, value);
        host.status(sqe, &[])
    };
    assert_eq!(set(&mut host, 0x07, 0xffff_ffff), Status::INVALID_FIELD.dnr().more(), "65536 queues");
    assert_eq!(set(&mut host, 0xff, 0), Status::INVALID_FIELD.dnr().more());
    assert_eq!(set(&mut host, 0x8000_0000 | 0x0b, 0), Status::FEATURE_NOT_SAVEABLE.dnr().more());
    for lid in [0x0d, 0x70, 0xff] {
        let get = host.admin_command(admin::GET_LOG_PAGE, 0xffff_ffff, lid | 127 << 16, 0);
        let (status, _) = host.read(with_transfer(get, 512));
        assert_eq!(status, Status::INVALID_LOG_PAGE.dnr().more(), "log {lid:02x}h");
    }
    // A log of 16 GiB into 512 bytes.
    let get = host.admin_command(admin::GET_LOG_PAGE, 0xffff_ffff, 0x02 | 0xffff << 16, 0xffff);
    assert_eq!(host.read(with_transfer(get, 512)).0, Status::DATA_SGL_LENGTH_INVALID.dnr().more());
    // Keep Alive for a namespace.
    let sqe = host.admin_command(admin::KEEP_ALIVE, 1, 0, 0);
    assert_eq!(host.status(sqe, &[]), Status::INVALID_FIELD.dnr().more());
    assert_eq!(host.property(0x1c, 4), 1);
    let controllers = target.server.call("nvmf_subsystem_get_controllers", json!({ "nqn": NQN }));
    assert_eq!(controllers[0]["hostnqn"], HOSTNQN);
}

#[test]
fn the_success_flag_is_the_whole_answer() {
    let target = Target::start();
    let (_admin, cntlid) = target.admin();
    let mut host = target.io(cntlid, 1);
    let len = 131072;
    host.send_command(&read(1, 1, 0, len / BLOCK, len), &[]);
    let mut got = 0;
    loop {
        match host.next() {
            TargetPdu::Data { cid, offset, data, last, success } => {
                assert_eq!((cid, offset), (1, got));
                got += data.len() as u32;
                assert_eq!(last, got == len);
                if last {
                    // Without SQ flow control disabled the host needs SQHD, so a response may follow instead.
                    if !success {
                        assert_eq!(host.response().status(), Status::SUCCESS);
                    }
                    break;
                }
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(host.status(command(io::FLUSH, 2, 1), &[]), Status::SUCCESS);
}
