//! The host's machine against the target's, and against a target that lies.

use super::*;
use crate::spec::opcode::io;
use crate::tcp::{Config, Connection, Event};

/// Reproducible numbers.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % n.max(1)
    }
}

const DISK: usize = 1 << 16;
const SLOTS: u16 = 12;

fn scattered(bytes: &[u8]) -> Buffers {
    let first = bytes.len() / 3;
    let mut data = Buffers::heap(first);
    for buffer in Buffers::heap(bytes.len() - first).drain() {
        data.push(buffer);
    }
    data.write_at(0, bytes);
    data
}

/// A host and a target with a wire of their own and a disk behind the target.
struct World {
    rng: Rng,
    host: HostConnection,
    target: Connection,
    to_target: VecDeque<u8>,
    to_host: VecDeque<u8>,
    disk: Vec<u8>,
    executing: Vec<(u16, Sqe, Buffers)>,
}

fn drain_some(rng: &mut Rng, from: &mut VecDeque<u8>) -> Vec<u8> {
    let n = if rng.below(3) == 0 { rng.below(40) } else { rng.below(20_000) };
    from.drain(..n.min(from.len())).collect()
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let header_digest = rng.below(2) == 0;
        let data_digest = rng.below(2) == 0;
        let config = Config {
            slots: SLOTS,
            maxh2cdata: 4096 + 4 * rng.below(2000) as u32,
            cpda: if rng.below(2) == 0 { 0 } else { rng.below(32) as u8 },
            allow_data_digest: rng.below(4) != 0,
            r2t_window_bytes: 1 + rng.below(100_000) as u32,
            ..Config::default()
        };
        let mut target = Connection::new(config);
        target.set_queue(u32::from(SLOTS), rng.below(2) == 0, true);
        let mut host = HostConnection::new(HostConfig { slots: SLOTS, header_digest, data_digest });
        host.set_in_capsule_bytes(if rng.below(2) == 0 { 8192 } else { 0 });
        let disk = (0..DISK).map(|i| (i * 31) as u8).collect();
        let (to_target, to_host) = (VecDeque::new(), VecDeque::new());
        Self { rng, host, target, to_target, to_host, disk, executing: Vec::new() }
    }

    fn host_sends(&mut self) {
        let mut iov = [IoSlice::new(&[]); 5];
        let n = self.host.poll_output(&mut iov);
        let bytes: Vec<u8> = iov[..n].iter().flat_map(|s| s.to_vec()).collect();
        let n = if self.rng.below(2) == 0 { bytes.len() } else { self.rng.below(bytes.len() + 1) };
        self.to_target.extend(&bytes[..n]);
        self.host.sent(n);
    }

    fn target_turns(&mut self) {
        let bytes = drain_some(&mut self.rng, &mut self.to_target);
        let rng = &mut self.rng;
        let mut alloc = |len: u32, _| (rng.below(4) > 0).then(|| scattered(&vec![0xee; len as usize]));
        self.target.retry_alloc(&mut alloc);
        let used = self.target.handle_input(&bytes, &mut alloc).expect("a well-behaved host");
        for byte in bytes[used..].iter().rev() {
            self.to_target.push_front(*byte);
        }
        while let Some(event) = self.target.poll_event() {
            let Event::Command { slot, sqe, data, .. } = event else { panic!("{event:?}") };
            self.executing.push((slot, sqe, data));
        }
        if !self.executing.is_empty() && self.rng.below(3) > 0 {
            let at = self.rng.below(self.executing.len());
            let (slot, sqe, mut data) = self.executing.swap_remove(at);
            let offset = sqe.cdw10.get() as usize;
            match sqe.opcode {
                io::WRITE => {
                    self.disk[offset..offset + data.len()].copy_from_slice(&data.to_vec());
                    self.target.complete(slot, Cqe::success(0), None);
                }
                io::READ => {
                    data.write_at(0, &self.disk[offset..offset + data.len()]);
                    self.target.complete(slot, Cqe::success(0), Some(data));
                }
                _ => self.target.complete(slot, Cqe::new(0, Status::INVALID_OPCODE), None),
            }
        }
        let mut iov = [IoSlice::new(&[]); 5];
        let n = self.target.poll_output(&mut iov);
        let bytes: Vec<u8> = iov[..n].iter().flat_map(|s| s.to_vec()).collect();
        let n = if self.rng.below(2) == 0 { bytes.len() } else { self.rng.below(bytes.len() + 1) };
        self.to_host.extend(&bytes[..n]);
        self.target.sent(n, &mut |_| ());
    }

    fn host_receives(&mut self) {
        let mut bytes = drain_some(&mut self.rng, &mut self.to_host);
        if self.rng.below(2) == 0
            && let Some(target) = self.host.read_target()
        {
            let n = target.len().min(bytes.len());
            target[..n].copy_from_slice(&bytes[..n]);
            self.host.read_done(n);
            bytes.drain(..n);
        }
        self.host.handle_input(&bytes).expect("a well-behaved target");
    }
}

/// A part of the disk for each command, so that their order does not matter to what they find.
struct Expected {
    opcode: u8,
    offset: usize,
    bytes: Vec<u8>,
}

#[test]
fn random_mixes_over_random_splits() {
    for seed in 0..120 {
        let mut world = World::new(seed);
        let mut expected: Vec<Option<Expected>> = (0..SLOTS).map(|_| None).collect();
        let share = DISK / usize::from(SLOTS);
        let (mut submitted, mut finished, mut turns) = (0, 0, 0);
        while finished < 60 {
            turns += 1;
            assert!(turns < 1_000_000, "seed {seed}: stuck at {finished} with {:?}", world.host);
            let lane = world.rng.below(expected.len());
            if submitted < 60 && expected[lane].is_none() && world.host.can_submit() {
                let (offset, len) = (lane * share, 1 + world.rng.below(share));
                let mut sqe = Sqe::new_zeroed();
                sqe.cdw10 = U32::new(offset as u32);
                sqe.opcode = [io::WRITE, io::READ, io::FLUSH][world.rng.below(3)];
                let fresh: Vec<u8> = (0..len).map(|_| world.rng.below(256) as u8).collect();
                let (payload, data, bytes) = match sqe.opcode {
                    io::WRITE => (Payload::ToController(len as u32), scattered(&fresh), fresh),
                    io::READ => {
                        let room = scattered(&vec![0x77; len]);
                        (Payload::ToHost(len as u32), room, world.disk[offset..offset + len].to_vec())
                    }
                    _ => (Payload::None, Buffers::new(), Vec::new()),
                };
                expected[lane] = Some(Expected { opcode: sqe.opcode, offset, bytes });
                world.host.submit(lane as u64, sqe, payload, data);
                submitted += 1;
            }
            match world.rng.below(3) {
                0 => world.host_sends(),
                1 => world.target_turns(),
                _ => world.host_receives(),
            }
            while let Some(done) = world.host.poll_completion() {
                let want = expected[done.user as usize].take().expect("one completion for each command");
                assert_eq!(done.cqe.status().is_success(), want.opcode != io::FLUSH, "seed {seed}");
                assert_eq!(done.data.to_vec(), want.bytes, "seed {seed}");
                assert_eq!(done.transferred_bytes as usize, want.bytes.len());
                assert_eq!(world.disk[want.offset..][..want.bytes.len()], want.bytes, "seed {seed}");
                finished += 1;
            }
        }
        assert_eq!((world.host.outstanding(), submitted), (0, 60));
    }
}

/// A host that has initialised without digests and sent one command; returns it and the command's CID.
fn started(opcode: u8, payload: Payload, data: Buffers, data_digest: bool) -> (HostConnection, u16) {
    let mut host = HostConnection::new(HostConfig { slots: 4, header_digest: false, data_digest });
    let mut resp = IcResp::new_zeroed();
    resp.ch = CommonHeader::bare(PduType::IcResp);
    resp.maxh2cdata = U32::new(4096);
    resp.dgst = if data_digest { dgst::DATA } else { 0 };
    host.handle_input(resp.as_bytes()).unwrap();
    let mut sqe = Sqe::new_zeroed();
    sqe.opcode = opcode;
    host.submit(7, sqe, payload, data);
    let sent = output(&mut host);
    let capsule = CapsuleCmd::read_from_prefix(&sent[size_of::<IcReq>()..]).unwrap().0;
    (host, capsule.sqe.cid.get())
}

fn output(host: &mut HostConnection) -> Vec<u8> {
    let mut all = Vec::new();
    while host.wants_output() {
        let mut iov = [IoSlice::new(&[]); 16];
        let n = host.poll_output(&mut iov);
        let bytes: Vec<u8> = iov[..n].iter().flat_map(|s| s.to_vec()).collect();
        host.sent(bytes.len());
        all.extend(bytes);
    }
    all
}

fn c2h(cid: u16, offset: u32, datal: u32, data: &[u8], pdu_flags: u8) -> Vec<u8> {
    let (ch, _) = Framing::default().header(PduType::C2hData, pdu_flags, data.len() as u32);
    [DataPdu::new(ch, cid, 0, offset, datal).as_bytes(), data].concat()
}

fn r2t(cid: u16, offset: u32, len: u32) -> Vec<u8> {
    let (ch, _) = Framing::default().header(PduType::R2t, 0, 0);
    R2t::new(ch, cid, 9, offset, len).as_bytes().to_vec()
}

fn response(cid: u16) -> Vec<u8> {
    let (ch, _) = Framing::default().header(PduType::CapsuleResp, 0, 0);
    CapsuleResp { ch, cqe: Cqe::success(cid) }.as_bytes().to_vec()
}

/// The stream must end the connection with an H2CTermReq of this kind, and the command must come back from drain().
#[track_caller]
fn refused(host: &mut HostConnection, stream: &[u8], fes: Fes) {
    let fault = host.handle_input(stream).expect_err("accepted");
    let HostFault::Protocol(fatal) = fault else { panic!("{fault}") };
    assert_eq!(fatal.fes, fes, "{fatal}");
    let sent = output(host);
    let at = sent.len() - MAX_TERM_BYTES.min(sent.len());
    let found = (at..sent.len())
        .filter_map(|at| TermReq::read_from_prefix(&sent[at..]).ok())
        .any(|(term, _)| term.ch.pdu_type == PduType::H2cTermReq as u8 && term.fes.get() == fes as u16);
    assert!(found && host.is_closed());
    assert_eq!(host.handle_input(b"anything"), Ok(()));
}

#[test]
fn a_target_that_lies_is_shown_the_door() {
    use Fes::*;
    let read = || started(io::READ, Payload::ToHost(8), Buffers::heap(8), false);
    let write = || started(io::WRITE, Payload::ToController(8), Buffers::heap(8), false);
    type Lie = Box<dyn Fn(u16) -> Vec<u8>>;
    let of_read: Vec<(Fes, Lie)> = vec![
        (InvalidHeaderField, Box::new(|cid| c2h(cid ^ 1, 0, 8, &[1; 8], flags::LAST_PDU))),
        (InvalidHeaderField, Box::new(|cid| c2h(cid ^ 0x8000, 0, 8, &[1; 8], flags::LAST_PDU))),
        (InvalidHeaderField, Box::new(|cid| c2h(cid, 0, 7, &[1; 8], flags::LAST_PDU))),
        (InvalidHeaderField, Box::new(|cid| c2h(cid, 0, 0, &[], flags::LAST_PDU))),
        (InvalidHeaderField, Box::new(|cid| c2h(cid, 0, 8, &[1; 8], flags::SUCCESS))),
        (DataTransferOutOfRange, Box::new(|cid| c2h(cid, 1, 4, &[1; 4], 0))),
        (DataTransferOutOfRange, Box::new(|cid| c2h(cid, u32::MAX, 4, &[1; 4], 0))),
        (DataTransferOutOfRange, Box::new(|cid| c2h(cid, 0, 9, &[1; 9], 0))),
        (DataTransferOutOfRange, Box::new(|cid| [c2h(cid, 0, 4, &[1; 4], 0), c2h(cid, 0, 4, &[1; 4], 0)].concat())),
        (PduSequenceError, Box::new(|cid| c2h(cid, 0, 4, &[1; 4], flags::LAST_PDU).repeat(2))),
        (InvalidHeaderField, Box::new(|cid| r2t(cid, 0, 8))),
        (InvalidHeaderField, Box::new(|cid| response(cid).repeat(2))),
        (InvalidHeaderField, Box::new(|cid| [response(cid), c2h(cid, 0, 8, &[1; 8], 0)].concat())),
        (InvalidHeaderField, Box::new(|cid| response(cid ^ 3))),
        (InvalidHeaderField, Box::new(|_| vec![PduType::CapsuleCmd as u8; 24])),
        (PduSequenceError, Box::new(|_| CommonHeader::bare(PduType::IcResp).as_bytes().to_vec())),
    ];
    for (fes, lie) in of_read {
        let (mut host, cid) = read();
        refused(&mut host, &lie(cid), fes);
    }
    let of_write: Vec<(Fes, Lie)> = vec![
        (InvalidHeaderField, Box::new(|cid| c2h(cid, 0, 8, &[1; 8], 0))),
        (InvalidHeaderField, Box::new(|cid| r2t(cid ^ 1, 0, 8))),
        (DataTransferOutOfRange, Box::new(|cid| r2t(cid, 0, 9))),
        (DataTransferOutOfRange, Box::new(|cid| r2t(cid, 0, 0))),
        (DataTransferOutOfRange, Box::new(|cid| r2t(cid, 4, 4))),
        (DataTransferOutOfRange, Box::new(|cid| r2t(cid, 0, 8).repeat(2))),
        (DataTransferOutOfRange, Box::new(|cid| r2t(cid, 0, u32::MAX))),
    ];
    for (fes, lie) in of_write {
        let (mut host, cid) = write();
        refused(&mut host, &lie(cid), fes);
    }
}

#[test]
fn what_is_lost_comes_back() {
    let (mut host, cid) = started(io::READ, Payload::ToHost(8), Buffers::heap(8), false);
    refused(&mut host, &response(cid ^ 1), Fes::InvalidHeaderField);
    let mut lost = Vec::new();
    host.drain(&mut |user, data| lost.push((user, data.len())));
    assert_eq!((lost, host.outstanding()), (vec![(7, 8)], 0));
}

#[test]
fn an_acknowledged_write_that_was_not_taken_is_an_error() {
    let (mut host, cid) = started(io::WRITE, Payload::ToController(8), Buffers::heap(8), false);
    host.handle_input(&response(cid)).unwrap();
    assert_eq!(host.poll_completion().unwrap().cqe.status(), Status::DATA_TRANSFER_ERROR);
}

#[test]
fn a_response_waits_until_the_payload_has_left() {
    let (mut host, cid) = started(io::WRITE, Payload::ToController(9000), Buffers::heap(9000), false);
    host.handle_input(&r2t(cid, 0, 9000)).unwrap();
    host.handle_input(&response(cid)).unwrap();
    assert!(host.poll_completion().is_none());
    let sent = output(&mut host);
    assert_eq!(sent.len(), 9000 + 3 * size_of::<DataPdu>());
    assert!(host.poll_completion().unwrap().cqe.status().is_success());
}

#[test]
fn a_wrong_data_digest_fails_the_command_alone() {
    let (mut host, cid) = started(io::READ, Payload::ToHost(8), Buffers::heap(8), true);
    let framing = Framing { data_digest: true, ..Framing::default() };
    let (ch, _) = framing.header(PduType::C2hData, flags::LAST_PDU | flags::SUCCESS, 8);
    host.handle_input(DataPdu::new(ch, cid, 0, 0, 8).as_bytes()).unwrap();
    host.handle_input(&[1; 8]).unwrap();
    host.handle_input(&[0; 4]).unwrap();
    assert_eq!(host.poll_completion().unwrap().cqe.status(), Status::TRANSIENT_TRANSPORT_ERROR);
    assert!(host.can_submit());
}

#[test]
fn a_termination_by_the_target_is_told() {
    let (mut host, _) = started(io::FLUSH, Payload::None, Buffers::new(), false);
    let mut term = TermReq::new_zeroed();
    term.ch = CommonHeader::bare(PduType::C2hTermReq);
    term.fes = U16::new(3);
    term.fei = U32::new(5);
    assert_eq!(host.handle_input(term.as_bytes()), Err(HostFault::Target { fes: 3, fei: 5 }));
    assert!(host.is_closed() && !host.can_submit());
}

#[test]
fn icresp_is_checked() {
    for (spoil, fes) in [
        ((|resp| resp.pfv = U16::new(1)) as fn(&mut IcResp), Fes::UnsupportedParameter),
        (|resp| resp.cpda = 32, Fes::InvalidHeaderField),
        (|resp| resp.dgst = 1, Fes::InvalidHeaderField),
        (|resp| resp.maxh2cdata = U32::new(4095), Fes::InvalidHeaderField),
        (|resp| resp.ch.plen = U32::new(127), Fes::InvalidHeaderField),
    ] {
        let mut host = HostConnection::new(HostConfig { slots: 4, header_digest: false, data_digest: true });
        let mut resp = IcResp::new_zeroed();
        resp.ch = CommonHeader::bare(PduType::IcResp);
        resp.maxh2cdata = U32::new(4096);
        spoil(&mut resp);
        refused(&mut host, resp.as_bytes(), fes);
    }
}
