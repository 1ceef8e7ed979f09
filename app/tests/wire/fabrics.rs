//! Connect, properties, discovery: Base 6.3, 3.1.4, 3.1.3.3.

use nvmf::spec::Status;
use nvmf::spec::fabrics::InvalidParameter;
use nvmf::spec::opcode::{self, admin, io};
use nvmf::spec::pdu::Fes;
use nvmf::tcp::wire_client::{self, command, property_get, property_set, read, with_transfer, write};
use serde_json::json;

use crate::common::wait_for;
use crate::host::{BLOCK, DISCOVERY, Host, Join, NQN, Target};

#[test]
fn nothing_but_connect_comes_first() {
    let target = Target::start();
    let mut host = target.link();
    for sqe in [
        command(admin::KEEP_ALIVE, 1, 0),
        command(io::FLUSH, 2, 1),
        property_get(3, 0, 8),
        property_set(4, 0x14, 0x0046_0001),
        with_transfer(command(admin::IDENTIFY, 5, 0), 4096),
    ] {
        assert_eq!(host.status(sqe, &[]), Status::COMMAND_SEQUENCE_ERROR.dnr(), "{:#x}", sqe.opcode);
    }
    // The connection is none the worse for it.
    host.join(&Join::admin());
    host.enable();
}

#[test]
fn a_queue_is_connected_once() {
    let target = Target::start();
    let (mut admin, cntlid) = target.admin();
    assert_eq!(admin.try_join(&Join::admin()).status(), Status::COMMAND_SEQUENCE_ERROR.dnr());
    let mut io = target.io(cntlid, 1);
    let again = Join { qid: 1, cntlid, ..Join::admin() };
    assert_eq!(io.try_join(&again).status(), Status::COMMAND_SEQUENCE_ERROR.dnr());
    // Nor does another connection get the queue.
    assert_eq!(target.link().try_join(&again).status(), Status::COMMAND_SEQUENCE_ERROR.dnr());
    assert_eq!(io.status(command(io::FLUSH, 77, 1), &[]), Status::SUCCESS);
    assert_eq!(admin.property(0x1c, 4), 1);
}

#[track_caller]
fn wrong(host: &mut Host, join: Join, parameter: InvalidParameter) {
    let cqe = host.try_join(&join);
    assert_eq!(cqe.status(), Status::CONNECT_INVALID_PARAMETERS.dnr(), "{join:?}");
    assert_eq!(InvalidParameter::from_dw0(cqe.dw0.get()), parameter, "{join:?}");
}

#[test]
fn parameters_of_connect() {
    let target = Target::start();
    // One connection may try as often as it likes.
    let mut host = target.link();
    let good = Join::admin();
    wrong(&mut host, Join { nqn: "nqn.2026-11.io.example:nope", ..good }, InvalidParameter::SUBNQN);
    wrong(&mut host, Join { nqn: "", ..good }, InvalidParameter::SUBNQN);
    wrong(&mut host, Join { hostnqn: "", ..good }, InvalidParameter::HOSTNQN);
    wrong(&mut host, Join { cntlid: 1, ..good }, InvalidParameter::CNTLID);
    wrong(&mut host, Join { cntlid: 0xfffe, ..good }, InvalidParameter::CNTLID);
    wrong(&mut host, Join { entries: 1, ..good }, InvalidParameter::SQSIZE);
    wrong(&mut host, Join { entries: 4096, ..good }, InvalidParameter::SQSIZE);
    // Names without an end.
    let mut endless = good.data();
    endless[256..512].fill(b'x');
    let sqe = wire_client::connect(host.cid(), 0, 32, 0, false);
    let cqe = host.call(sqe, &endless);
    assert_eq!(cqe.status(), Status::CONNECT_INVALID_PARAMETERS.dnr());
    assert_eq!(InvalidParameter::from_dw0(cqe.dw0.get()), InvalidParameter::SUBNQN);
    // Less data than Connect has.
    let short = wire_client::with_in_capsule(wire_client::connect(host.cid(), 0, 32, 0, false), 512);
    assert_eq!(host.status(short, &[0; 512]), Status::DATA_SGL_LENGTH_INVALID.dnr());
    // A record format that is not known.
    let mut format = wire_client::connect(host.cid(), 0, 32, 0, false);
    format.cdw10.set(1);
    assert_eq!(host.status(format, &good.data()), Status::CONNECT_INCOMPATIBLE_FORMAT.dnr());

    let cntlid = host.join(&good);
    // An I/O queue before the controller is enabled.
    let queue = Join { qid: 1, cntlid, ..good };
    let mut io = target.link();
    assert_eq!(io.try_join(&queue).status(), Status::CONNECT_INVALID_PARAMETERS.dnr());
    host.enable();
    wrong(&mut io, Join { cntlid: cntlid + 1, ..queue }, InvalidParameter::CNTLID);
    wrong(&mut io, Join { cntlid: 0xffff, ..queue }, InvalidParameter::CNTLID);
    wrong(&mut io, Join { hostnqn: "nqn.2026-11.io.example:thief", ..queue }, InvalidParameter::HOSTNQN);
    wrong(&mut io, Join { hostid: [8; 16], ..queue }, InvalidParameter::HOSTID);
    wrong(&mut io, Join { qid: 9, ..queue }, InvalidParameter::QID);
    wrong(&mut io, Join { qid: 0xffff, ..queue }, InvalidParameter::QID);
    wrong(&mut io, Join { entries: 65, ..queue }, InvalidParameter::SQSIZE);
    io.join(&queue);
    assert_eq!(io.status(command(io::FLUSH, 77, 1), &[]), Status::SUCCESS);
}

#[test]
fn hosts_that_are_not_allowed() {
    let target = Target::start();
    target.server.call("nvmf_subsystem_allow_any_host", json!({"nqn": NQN, "allow_any_host": false}));
    let mut host = target.link();
    assert_eq!(host.try_join(&Join::admin()).status(), Status::CONNECT_INVALID_HOST.dnr());
    target.server.call("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": crate::host::HOSTNQN}));
    let cntlid = host.join(&Join::admin());
    host.enable();
    let mut io = target.io(cntlid, 1);
    assert_eq!(io.status(command(io::FLUSH, 1, 1), &[]), Status::SUCCESS);
    // A host that is no longer welcome loses what it has.
    target.server.call("nvmf_subsystem_remove_host", json!({"nqn": NQN, "host": crate::host::HOSTNQN}));
    assert_eq!(io.next_or_end(), None);
    assert_eq!(host.next_or_end(), None);
}

#[test]
fn properties() {
    let target = Target::start();
    let mut host = target.link();
    host.join(&Join::admin());
    let cap = host.property(0, 8);
    assert_eq!(cap & 0xffff, 63, "MQES, 0's-based");
    assert_eq!(cap >> 16 & 1, 1, "CQR");
    assert_eq!(cap >> 37 & 1, 1, "the NVM command set");
    assert_eq!(host.property(8, 4), 0x0002_0100, "2.1");
    assert_eq!(host.property(0x14, 4), 0);
    assert_eq!(host.property(0x1c, 4), 0);
    let refuses = |host: &mut Host, sqe| assert_eq!(host.status(sqe, &[]), Status::INVALID_FIELD.dnr());
    // Sizes that the property does not have, offsets between properties and beyond all.
    for (offset, size) in [(0, 4), (8, 8), (0x14, 8), (4, 4), (0x0c, 4), (0x38, 8), (0x1000, 4), (u32::MAX, 8)] {
        refuses(&mut host, property_get(1, offset, size));
    }
    let mut sqe = property_get(1, 0, 8);
    sqe.cdw10.set(7);
    refuses(&mut host, sqe);
    // What is read only, or not there.
    for offset in [0, 8, 0x1c, 0x20, 0x64, 0x68, 0x30, 0x1000, u32::MAX] {
        refuses(&mut host, property_set(1, offset, 1));
    }
    // Admin commands need an enabled controller.
    let identify = host.identify(1, 0);
    assert_eq!(host.read(identify).0, Status::COMMAND_SEQUENCE_ERROR.dnr().more());
    // Entry sizes that cannot be: it shows that it cannot start (CSTS.CFS), and is reset by EN = 0.
    assert_eq!(host.set_property(0x14, 1), Status::SUCCESS);
    assert_eq!(host.property(0x1c, 4), 2, "CFS without RDY");
    assert_eq!(host.set_property(0x14, 0), Status::SUCCESS);
    assert_eq!(host.property(0x1c, 4), 0);
    host.enable();
    // Enabled again while enabled changes nothing.
    host.enable();
    // A shutdown ends as one.
    assert_eq!(host.set_property(0x14, 0x0046_4001), Status::SUCCESS);
    wait_for("the shutdown is complete", || (host.property(0x1c, 4) >> 2 & 3 == 2).then_some(()));
}

#[test]
fn disabling_takes_the_queues() {
    let target = Target::start_with(&["--cores", "0"]);
    let (mut host, cntlid) = target.admin();
    let mut queues: Vec<_> = (1..=4).map(|qid| target.io(cntlid, qid)).collect();
    // One waits for data, one has sent half of it.
    queues[0].send_command(&write(1, 1, 0, 2, 2 * BLOCK), &[]);
    let (_, ttag, ..) = queues[0].r2t();
    let half = queues[0].wire.h2c_data(1, ttag, 0, &[1; BLOCK as usize], false);
    queues[0].send(&half);
    assert_eq!(host.set_property(0x14, 0x0046_0000), Status::SUCCESS);
    for mut queue in queues {
        assert_eq!(queue.next_or_end(), None);
    }
    wait_for("RDY is 0", || (host.property(0x1c, 4) & 1 == 0).then_some(()));
    host.enable();
    let mut again = target.io(cntlid, 1);
    assert_eq!(again.read(read(1, 1, 0, 1, BLOCK)).0, Status::SUCCESS);
}

#[test]
fn fabrics_commands_that_do_not_belong() {
    let target = Target::start();
    let (mut host, cntlid) = target.admin();
    let fabrics = |fctype: u8| command(opcode::FABRICS, 1, u32::from(fctype));
    assert_eq!(host.status(fabrics(0x08), &[]), Status::INVALID_QUEUE_TYPE.dnr(), "Disconnect of the admin queue");
    assert_eq!(host.status(fabrics(0x10), &[]), Status::INVALID_OPCODE.dnr());
    assert_eq!(host.status(fabrics(0xfc), &[]), Status::INVALID_OPCODE.dnr());
    let mut io = target.io(cntlid, 1);
    assert_eq!(io.status(property_get(1, 0, 8), &[]), Status::INVALID_OPCODE.dnr());
    assert_eq!(io.status(property_set(1, 0x14, 0), &[]), Status::INVALID_OPCODE.dnr());
    assert_eq!(host.property(0x1c, 4), 1, "an I/O queue cannot disable its controller");
}

#[test]
fn keep_alive() {
    let target = Target::start();
    // 500 ms, and a host that falls silent: the association ends, with its I/O queues.
    let (mut host, cntlid) = target.admin_on(target.link(), NQN, 500);
    let mut io = target.io(cntlid, 1);
    let (mut other, _) = target.admin();
    assert_eq!(host.next_or_end(), None);
    assert_eq!(io.next_or_end(), None);
    wait_for("the controller is gone", || {
        let controllers = target.server.call("nvmf_subsystem_get_controllers", json!({ "nqn": NQN }));
        (controllers.as_array().unwrap().len() == 1).then_some(())
    });
    assert_eq!(
        target.link().try_join(&Join { qid: 2, cntlid, ..Join::admin() }).status(),
        Status::CONNECT_INVALID_PARAMETERS.dnr()
    );
    // The one without a timeout stays.
    assert_eq!(other.property(0x1c, 4), 1);
}

#[test]
fn discovery_controllers_only_discover() {
    let target = Target::start();
    let (mut host, cntlid) = target.admin_on(target.link(), DISCOVERY, 0);
    let identify = host.identify(1, 0);
    let (status, data) = host.read(identify);
    assert_eq!(status, Status::SUCCESS);
    assert_eq!(data[111], 2, "CNTRLTYPE: discovery");
    assert!(data[768..].starts_with(DISCOVERY.as_bytes()));
    // No namespaces.
    for cns in [0, 2, 3] {
        let identify = host.identify(cns, 1);
        assert_eq!(host.read(identify).0, Status::INVALID_FIELD.dnr().more(), "CNS {cns}");
    }
    // The log has the subsystem.
    let get = host.admin_command(admin::GET_LOG_PAGE, 0, 0x70 | (4096 / 4 - 1) << 16, 0);
    let (status, log) = host.read(with_transfer(get, 4096));
    assert_eq!(status, Status::SUCCESS);
    let records = u64::from_le_bytes(log[8..16].try_into().unwrap()) as usize;
    assert_eq!(records, 2, "the subsystem, and the discovery service itself");
    let mut records: Vec<_> = log[1024..].chunks(1024).take(records).collect();
    records.sort_by_key(|record| record[2]);
    for (record, (subtype, nqn)) in records.iter().zip([(2, NQN), (3, DISCOVERY)]) {
        assert_eq!((record[0], record[1], record[2]), (3, 1, subtype), "TCP, IPv4");
        assert!(record[32..].starts_with(format!("{} ", target.port).as_bytes()));
        assert!(record[256..].starts_with(format!("{nqn}\0").as_bytes()));
        assert!(record[512..].starts_with(b"127.0.0.1 "));
    }
    // Logs of controllers with namespaces, and commands for them.
    let get = host.admin_command(admin::GET_LOG_PAGE, 0xffff_ffff, 0x02 | 127 << 16, 0);
    assert!(!host.read(with_transfer(get, 512)).0.is_success());
    for opcode in [admin::ABORT, admin::NAMESPACE_MANAGEMENT, admin::FORMAT_NVM, 0xff] {
        let sqe = host.admin_command(opcode, 0, 0, 0);
        assert_eq!(host.status(sqe, &[]), Status::INVALID_OPCODE.dnr().more(), "{opcode:02x}h");
    }
    let mut io = target.link();
    wrong(&mut io, Join { nqn: DISCOVERY, qid: 1, cntlid, ..Join::admin() }, InvalidParameter::QID);
    assert_eq!(host.property(0x1c, 4), 1);
}

#[test]
fn a_host_says_goodbye_in_the_middle_of_everything() {
    let target = Target::start();
    let (mut host, cntlid) = target.admin();
    let mut io = target.io(cntlid, 1);
    io.send_command(&write(1, 1, 0, 2, 2 * BLOCK), &[]);
    io.r2t();
    let term = io.wire.term_req(Fes::PduSequenceError as u16, 0);
    io.send(&term);
    assert_eq!(io.next_or_end(), None);
    assert_eq!(host.property(0x1c, 4), 1);
    // Its queue can be made again once the target has seen the end.
    let queue = Join { qid: 1, cntlid, ..Join::admin() };
    wait_for("the queue can be made again", || {
        let mut again = target.link();
        again.try_join(&queue).status().is_success().then_some(())
    });
    target.still_serves();
}
