//! PDUs that are wrong: TCP 3.6, 3.3.1.

use nvmf::spec::Status;
use nvmf::spec::opcode::io;
use nvmf::spec::pdu::Fes;
use nvmf::tcp::wire_client::{command, read, write, write_in_capsule};

use crate::common::wait_for;
use crate::host::{BLOCK, Host, IN_CAPSULE, Join, MAX_IO, Target};

/// FEI: byte offsets of fields of the common header and of H2CData.
const TYPE: u32 = 0;
const FLAGS: u32 = 1;
const HLEN: u32 = 2;
const PDO: u32 = 3;
const PLEN: u32 = 4;
const CCCID: u32 = 8;
const TTAG: u32 = 10;
const DATAL: u32 = 16;

#[test]
fn before_the_connection_is_initialised() {
    let target = Target::start();
    let bystander = target.admin();
    let icreq = target.open().wire.icreq(false, false, 0, 0);
    let spoilt = |at: usize, byte: u8| {
        let mut icreq = icreq.clone();
        icreq[at] = byte;
        target.open().fatal(&icreq)
    };
    // Somebody who speaks another protocol altogether.
    assert_eq!(target.open().fatal(b"GET / HTTP/1.1\r\n\r\n"), (Fes::InvalidHeaderField, TYPE));
    assert_eq!(target.open().fatal(&[0xff; 4096]), (Fes::InvalidHeaderField, TYPE));
    for pdu_type in [1, 3, 5, 7, 8, 9, 0x0a] {
        assert_eq!(spoilt(0, pdu_type), (Fes::InvalidHeaderField, TYPE), "type {pdu_type:02x}h");
    }
    // PDUs that come too early.
    for pdu_type in [4, 6] {
        assert_eq!(spoilt(0, pdu_type), (Fes::PduSequenceError, 0), "type {pdu_type:02x}h");
    }
    assert_eq!(spoilt(2, 64), (Fes::InvalidHeaderField, HLEN));
    assert_eq!(spoilt(4, 127), (Fes::InvalidHeaderField, PLEN));
    assert_eq!(spoilt(4, 0), (Fes::InvalidHeaderField, PLEN));
    assert_eq!(spoilt(7, 0xff), (Fes::InvalidHeaderField, PLEN), "4 GiB");
    // PFV 1, HPDA 32.
    assert_eq!(spoilt(8, 1), (Fes::UnsupportedParameter, 8));
    assert_eq!(spoilt(10, 32), (Fes::InvalidHeaderField, 10));
    // A host that ends it itself gets nothing, and the connection ends.
    let mut host = target.open();
    let term = host.wire.term_req(1, 0);
    host.send(&term);
    assert_eq!(host.next_or_end(), None);
    let (mut admin, _) = bystander;
    assert_eq!(admin.property(0x1c, 4), 1, "another host notices nothing");
    target.still_serves();
}

#[test]
fn one_byte_at_a_time_is_fine() {
    let target = Target::start();
    let mut host = target.open();
    for byte in host.wire.icreq(true, true, 3, 0) {
        host.send(&[byte]);
    }
    assert!(matches!(host.next(), nvmf::tcp::wire_client::TargetPdu::IcResp(_)));
    let (_admin, cntlid) = target.admin_on(host, crate::host::NQN, 0);
    let mut io = target.io_on(target.link_with(true, true, 7), cntlid, 1);
    let cid = io.cid();
    let capsule = io.wire.capsule(&write_in_capsule(cid, 1, 0, 1, BLOCK), &[5; BLOCK as usize]);
    for byte in capsule {
        io.send(&[byte]);
    }
    assert_eq!(io.response().status(), Status::SUCCESS);
    let cid = io.cid();
    // HPDA 7: the client checks that the data start at a multiple of 32 bytes.
    assert_eq!(io.read(read(cid, 1, 0, 1, BLOCK)), (Status::SUCCESS, vec![5; BLOCK as usize]));
}

#[test]
fn headers_after_the_initialisation() {
    let target = Target::start();
    for digests in [false, true] {
        let link = || target.link_with(digests, digests, 0);
        let mut again = link();
        let icreq = again.wire.icreq(false, false, 0, 0);
        assert_eq!(again.fatal(&icreq), (Fes::PduSequenceError, 0), "a second ICReq");
        for pdu_type in [1, 3, 5, 7, 8, 9, 0x0a, 0xff] {
            assert_eq!(link().fatal(&[pdu_type; 128]), (Fes::InvalidHeaderField, TYPE), "type {pdu_type:02x}h");
        }
        let capsule = link().wire.capsule(&write_in_capsule(1, 1, 0, 1, BLOCK), &[7; BLOCK as usize]);
        let spoilt = |at: usize, byte: u8| {
            let mut host = link();
            let mut capsule = capsule.clone();
            capsule[at] = byte;
            host.wire.reseal(&mut capsule);
            host.fatal(&capsule)
        };
        assert_eq!(spoilt(1, capsule[1] ^ 1), (Fes::InvalidHeaderField, FLAGS), "HDGSTF not as negotiated");
        assert_eq!(spoilt(1, capsule[1] ^ 2), (Fes::InvalidHeaderField, FLAGS), "DDGSTF not as negotiated");
        assert_eq!(spoilt(2, 24), (Fes::InvalidHeaderField, HLEN));
        assert_eq!(spoilt(2, 0xff), (Fes::InvalidHeaderField, HLEN));
        assert_eq!(spoilt(3, 0), (Fes::InvalidHeaderField, PDO));
        assert_eq!(spoilt(3, 71), (Fes::InvalidHeaderField, PDO));
        assert_eq!(spoilt(3, 0x51), (Fes::InvalidHeaderField, PDO), "not a multiple of 4");
        let mut host = link();
        let mut short = capsule.clone();
        (short[3], short[4], short[5]) = (80, 79, 0);
        host.wire.reseal(&mut short);
        assert_eq!(host.fatal(&short), (Fes::InvalidHeaderField, PLEN), "PLEN below PDO");
        assert_eq!(spoilt(6, 0x10), (Fes::DataTransferLimitExceeded, 0), "in-capsule data of a MiB");
        assert_eq!(spoilt(7, 0xff), (Fes::DataTransferLimitExceeded, 0), "in-capsule data of 4 GiB");
    }
    target.still_serves();
}

#[test]
fn digests() {
    let target = Target::start();
    let (_admin, cntlid) = target.admin();
    // A header digest that is wrong ends the connection; FEI is the digest that came.
    let mut io = target.io_on(target.link_with(true, true, 0), cntlid, 1);
    let mut capsule = io.wire.capsule(&command(io::FLUSH, 1, 1), &[]);
    capsule[72] ^= 1;
    let digest = u32::from_le_bytes(capsule[72..76].try_into().unwrap());
    assert_eq!(io.fatal(&capsule), (Fes::HeaderDigestError, digest));

    // A data digest that is wrong fails its command, and only that.
    let mut io = target.io_on(target.link_with(true, true, 0), cntlid, 2);
    let good = vec![1; BLOCK as usize];
    assert_eq!(io.write(write_in_capsule(11, 1, 0, 1, BLOCK), &good).status(), Status::SUCCESS);
    let mut capsule = io.wire.capsule(&write_in_capsule(12, 1, 0, 1, BLOCK), &[2; BLOCK as usize]);
    let last = capsule.len() - 1;
    capsule[last] ^= 0x80;
    io.send(&capsule);
    let cqe = io.response();
    assert_eq!((cqe.cid.get(), cqe.status()), (12, Status::TRANSIENT_TRANSPORT_ERROR));
    // The same for data that an R2T asked for, in the first of two pieces.
    io.send_command(&write(13, 1, 0, 2, 2 * BLOCK), &[]);
    let (_, ttag, offset, len) = io.r2t();
    assert_eq!((offset, len), (0, 2 * BLOCK));
    let mut first = io.wire.h2c_data(13, ttag, 0, &[3; BLOCK as usize], false);
    let last = first.len() - 1;
    first[last] ^= 1;
    let second = io.wire.h2c_data(13, ttag, BLOCK, &[3; BLOCK as usize], true);
    io.send(&first);
    io.send(&second);
    let cqe = io.response();
    assert_eq!((cqe.cid.get(), cqe.status()), (13, Status::TRANSIENT_TRANSPORT_ERROR));
    // Nothing of it was written, and the connection lives.
    assert_eq!(io.read(read(14, 1, 0, 1, BLOCK)), (Status::SUCCESS, good));
    target.still_serves();
}

/// A write of 4 blocks, asked for.
fn asked(target: &Target, cntlid: u16, qid: u16) -> (Host, u16) {
    let join = Join { qid, cntlid, ..Join::admin() };
    // The queue of that number on an earlier connection is gone once the target has seen its end.
    let mut io = wait_for("the queue can be made", || {
        let mut io = target.link();
        io.try_join(&join).status().is_success().then_some(io)
    });
    io.send_command(&write(9, 1, 0, 4, 4 * BLOCK), &[]);
    let (cid, ttag, offset, len) = io.r2t();
    assert_eq!((cid, offset, len), (9, 0, 4 * BLOCK));
    (io, ttag)
}

#[test]
fn host_data_that_nobody_asked_for() {
    let target = Target::start();
    let (_admin, cntlid) = target.admin();
    let mut qid = 0;
    let mut fresh = || {
        qid = qid % 8 + 1;
        asked(&target, cntlid, qid)
    };
    let data = vec![0; MAX_IO as usize + 4096];
    let mut check = |cid: u16, tag: u16, offset: u32, len: usize, last: bool, wanted: (Fes, u32), what: &str| {
        let (mut io, ttag) = fresh();
        let pdu = io.wire.h2c_data(cid, ttag ^ tag, offset, &data[..len], last);
        assert_eq!(io.fatal(&pdu), wanted, "{what}");
    };
    let field = |at| (Fes::InvalidHeaderField, at);
    check(9, 1, 0, 512, false, field(TTAG), "a tag that is not in use");
    check(9, 0xffff, 0, 512, false, field(TTAG), "a tag beyond all");
    check(8, 0, 0, 512, false, field(CCCID), "another command's identifier");
    check(9, 0, 1, 512, false, (Fes::PduSequenceError, 0), "a gap");
    check(9, 0, 512, 512, false, (Fes::PduSequenceError, 0), "the second piece first");
    check(9, 0, u32::MAX - 100, 512, false, (Fes::DataTransferOutOfRange, 0), "an offset near 4 GiB");
    check(9, 0, 0, 2560, true, (Fes::DataTransferOutOfRange, 0), "more than was asked for");
    check(9, 0, 1536, 1024, true, (Fes::DataTransferOutOfRange, 0), "beyond the end");
    check(9, 0, 0, data.len(), true, (Fes::DataTransferLimitExceeded, 0), "more than MAXH2CDATA");
    check(9, 0, 0, 512, true, field(FLAGS), "LAST_PDU too early");
    check(9, 0, 0, 2048, false, field(FLAGS), "no LAST_PDU at the end");
    check(9, 0, 0, 0, false, field(DATAL), "no data at all");

    // DATAL that is not the length of what follows.
    let (mut io, ttag) = fresh();
    let mut pdu = io.wire.h2c_data(9, ttag, 0, &data[..512], false);
    pdu[16] = 0xff;
    assert_eq!(io.fatal(&pdu), field(DATAL));
    // The same data twice.
    let (mut io, ttag) = fresh();
    let all = io.wire.h2c_data(9, ttag, 0, &data[..2048], true);
    io.send(&all);
    assert_eq!(io.response().status(), Status::SUCCESS);
    assert_eq!(io.fatal(&all), field(TTAG));
    // Without any command.
    let mut io = target.link();
    let pdu = io.wire.h2c_data(0, 0, 0, &data[..512], true);
    assert_eq!(io.fatal(&pdu), field(TTAG));
    target.still_serves();
}

#[test]
fn in_capsule_data_of_a_wrong_length() {
    let target = Target::start();
    let (_admin, cntlid) = target.admin();
    let mut io = target.io(cntlid, 1);
    let blocks = IN_CAPSULE / BLOCK;
    let data = vec![9; IN_CAPSULE as usize + BLOCK as usize];
    let full = &data[..IN_CAPSULE as usize];
    assert_eq!(io.status(write_in_capsule(1, 1, 0, blocks, IN_CAPSULE), full), Status::SUCCESS);
    // One block more than IOCCSZ says: the command fails, its data are passed over, the connection lives.
    let more = write_in_capsule(2, 1, 0, blocks + 1, IN_CAPSULE + BLOCK);
    assert_eq!(io.status(more, &data), Status::DATA_SGL_LENGTH_INVALID.dnr());
    // An SGL that names more than came.
    assert_eq!(io.status(write_in_capsule(3, 1, 0, 2, 2 * BLOCK), &data[..512]), Status::DATA_SGL_LENGTH_INVALID.dnr());
    // Fewer bytes than the command writes.
    assert_eq!(io.status(write_in_capsule(4, 1, 0, 2, BLOCK), &data[..512]), Status::DATA_SGL_LENGTH_INVALID.dnr());
    // Data with a command that has none.
    assert_eq!(io.status(command(io::FLUSH, 5, 1), &data[..512]), Status::INVALID_FIELD.dnr());
    // A transfer longer than MDTS.
    let long = write(6, 1, 0, (MAX_IO / BLOCK) + 8, MAX_IO + 8 * BLOCK);
    assert_eq!(io.status(long, &[]), Status::DATA_SGL_LENGTH_INVALID.dnr());
    assert_eq!(
        io.read(read(7, 1, 0, (MAX_IO / BLOCK) + 8, MAX_IO + 8 * BLOCK)).0,
        Status::DATA_SGL_LENGTH_INVALID.dnr()
    );
    assert_eq!(io.read(read(8, 1, 0, 8, 4096)), (Status::SUCCESS, vec![9; 4096]));
}
