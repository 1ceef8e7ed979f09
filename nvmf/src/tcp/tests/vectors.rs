//! Byte-exact PDUs, written down from the specification.

use super::*;
use crate::tcp::digest::crc32c;
use crate::tcp::wire_client::{command, read, write};

fn raw_output(link: &mut Link) -> Vec<u8> {
    let mut iov = [IoSlice::new(&[]); 64];
    let n = link.conn.poll_output(&mut iov);
    let bytes = iov[..n].iter().flat_map(|s| s.to_vec()).collect::<Vec<u8>>();
    link.conn.sent(bytes.len(), &mut |_| ());
    bytes
}

#[test]
fn initialisation() {
    let mut link = Link::bare(Config { cpda: 1, maxh2cdata: 0x2_0000, ..Config::default() });
    let mut icreq = vec![0, 0, 128, 0, 128, 0, 0, 0, 0, 0, 3, 2, 15, 0, 0, 0];
    icreq.resize(128, 0);
    link.feed(&icreq);
    let mut icresp = vec![1, 0, 128, 0, 128, 0, 0, 0, 0, 0, 1, 2, 0, 0, 2, 0];
    icresp.resize(128, 0);
    assert_eq!(raw_output(&mut link), icresp);
    let negotiated = Negotiated { header_digest: false, data_digest: true, hpda: 3, maxr2t: 16 };
    assert_eq!(link.conn.negotiated(), Some(negotiated));
}

#[test]
fn a_keep_alive_and_its_response() {
    let mut link = Link::new();
    let mut capsule = vec![4, 0, 72, 0, 72, 0, 0, 0, 0x18, 0x40, 0x34, 0x12];
    capsule.resize(72, 0);
    link.feed(&capsule);
    let (slot, seq, sqe, data) = link.command();
    assert_eq!((sqe.opcode, sqe.cid.get(), seq, data.len()), (0x18, 0x1234, 0, 0));
    link.conn.complete(slot, Cqe::new(0, Status::INVALID_FIELD.dnr()), None);
    assert_eq!(
        raw_output(&mut link),
        [5, 0, 24, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0x34, 0x12, 0x04, 0x80]
    );
}

#[test]
fn a_read_with_digests_and_padding() {
    let mut link = Link::with(Config::default(), true, true, 7);
    let mut capsule = link.host.capsule(&read(9, 1, 0, 1, 8), &[]);
    assert_eq!(capsule[..8], [4, 1, 72, 0, 76, 0, 0, 0]);
    assert_eq!(crc32c(&capsule[..72]), capsule[72..]);
    link.feed(&capsule);
    let (slot, _, _, mut data) = link.command();
    data.write_at(0, b"contents");
    link.conn.complete(slot, Cqe::success(0), Some(data));

    let mut want = vec![7, 0b111, 24, 32, 44, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0];
    want.extend(crc32c(&want));
    want.extend([0; 4]);
    want.extend(b"contents");
    want.extend(crc32c(b"contents"));
    let mut response = vec![5, 1, 24, 0, 28, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0];
    response.extend(crc32c(&response));
    want.extend(response);
    assert_eq!(raw_output(&mut link), want);

    capsule[72] ^= 1;
    let received = u32::from_le_bytes(capsule[72..76].try_into().unwrap());
    assert_eq!(link.refused(&capsule), (Fes::HeaderDigestError, received));
}

#[test]
fn a_write_by_r2t() {
    let mut link = Link::new();
    link.feed(&link.host.capsule(&write(0x0102, 1, 0, 1, 6), &[]));
    assert_eq!(raw_output(&mut link), [9, 0, 24, 0, 24, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]);
    link.feed(&[6, 0, 24, 24, 28, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, b'd', b'a', b't', b'a']);
    assert!(link.conn.poll_event().is_none());
    assert_eq!(link.conn.peer_due(), PeerDue::HostData);
    link.feed(&[6, 4, 24, 24, 26, 0, 0, 0, 2, 1, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, b'!', b'?']);
    let (_, _, _, data) = link.command();
    assert_eq!(data.to_vec(), b"data!?");
    assert_eq!(link.conn.peer_due(), PeerDue::Nothing);
}

#[test]
fn termination() {
    let mut link = Link::new();
    let mut capsule = link.host.capsule(&command(0, 1, 1), &[]);
    capsule[2] = 64;
    assert!(link.handle(&capsule).is_err());
    let mut want = vec![3, 0, 24, 0, 96, 0, 0, 0, 1, 0, 2, 0, 0, 0];
    want.resize(24, 0);
    want.extend_from_slice(&capsule);
    assert_eq!(raw_output(&mut link), want);
}
