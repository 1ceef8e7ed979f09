//! A whole queue pair against a host, an allocator and a backend that do whatever the bytes say.
//!
//! The bytes are a program. It puts PDUs (well formed, nearly so, or plain noise) into the stream, cuts the stream
//! anywhere, grants or refuses memory, completes commands in any order, sends any part of the output, aborts, closes.
//! Checked all the while:
//! - nothing panics, and what the target sends is well formed to the last bit;
//! - a command comes out once, with the data that was sent for it, and memory of the length that it asked for;
//! - memory stays within the limits, whatever lengths the host writes;
//! - after a fatal error comes one C2HTermReq and nothing else.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nvmf::spec::opcode::{Direction, io};
use nvmf::spec::sqe::{Sgl, SglDescriptor};
use nvmf::spec::{Cqe, Sqe, Status};
use nvmf::tcp::wire_client::{TargetPdu, WireClient, command, connect, read, with_descriptor, write, write_in_capsule};
use nvmf::tcp::{AbortOutcome, Alloc, Config, Connection, Event, Fault, Need, PeerDue};
use reactor::Buffers;
use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSlice;

/// Reads the program; zeroes when it is at its end.
struct Program<'a>(&'a [u8]);

impl Program<'_> {
    fn byte(&mut self) -> u8 {
        let Some((byte, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *byte
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn long(&mut self) -> u32 {
        u32::from(self.word()) | u32::from(self.word()) << 16
    }

    /// A length that is often small, and sometimes any.
    fn len(&mut self) -> u32 {
        match self.byte() {
            255 => self.long(),
            n @ 200.. => u32::from(n - 199) * 700,
            n => u32::from(n),
        }
    }

    fn bytes(&mut self) -> Vec<u8> {
        let n = usize::from(self.byte()).min(self.0.len());
        let (bytes, rest) = self.0.split_at(n);
        self.0 = rest;
        bytes.to_vec()
    }
}

struct R2t {
    cid: u16,
    ttag: u16,
    len: u32,
    sent: u32,
}

struct World {
    conn: Connection,
    host: WireClient,
    stream: Vec<u8>,
    /// True while everything in the stream was built by the rules, so that faults would be the target's mistake.
    clean: bool,
    memory: usize,
    executing: BTreeMap<u16, (Sqe, Option<Buffers>)>,
    r2ts: Vec<R2t>,
    /// CIDs that the host has sent and got no answer to.
    in_use: BTreeSet<u16>,
    seen: BTreeSet<u32>,
    ended: bool,
    term_reqs: usize,
}

const SLOTS: u16 = 6;
const MAX_IO: u32 = 10_000;

fn data_byte(cid: u16, at: usize) -> u8 {
    (cid as u8).wrapping_mul(91).wrapping_add(at as u8)
}

fn data(cid: u16, at: u32, len: u32) -> Vec<u8> {
    (at..at + len).map(|i| data_byte(cid, i as usize)).collect()
}

impl World {
    fn new(p: &mut Program<'_>) -> Self {
        let bits = p.byte();
        let config = Config {
            slots: SLOTS,
            max_io_bytes: MAX_IO,
            in_capsule_bytes: 512,
            maxh2cdata: 4096,
            r2t_window_bytes: 12_000,
            cpda: p.byte() % 32,
            allow_header_digest: bits & 1 != 0,
            allow_data_digest: bits & 2 != 0,
        };
        let mut world = Self {
            conn: Connection::new(config),
            host: WireClient::new(),
            stream: Vec::new(),
            clean: true,
            memory: MAX_IO as usize * 2,
            executing: BTreeMap::new(),
            r2ts: Vec::new(),
            in_use: BTreeSet::new(),
            seen: BTreeSet::new(),
            ended: false,
            term_reqs: 0,
        };
        if bits & 4 == 0 {
            let icreq = world.host.icreq(bits & 8 != 0, bits & 16 != 0, p.byte() % 32, u32::from(p.byte()));
            world.stream.extend(icreq);
            world.feed(p, usize::MAX);
            world.send(usize::MAX, 64);
        }
        world
    }

    fn alloc(memory: &mut usize, len: u32, need: Need) -> Option<Buffers> {
        let limit = if need == Need::InCapsule { MAX_IO.max(8192) } else { MAX_IO };
        assert!(len > 0 && len <= limit, "{len} bytes for {need:?}");
        *memory = memory.checked_sub(len as usize)?;
        let mut list = Buffers::heap(len as usize / 2);
        for buffer in Buffers::heap(len as usize - len as usize / 2).drain() {
            list.push(buffer);
        }
        Some(list)
    }

    /// Lets the target read up to `limit` bytes of the stream.
    fn feed(&mut self, p: &mut Program<'_>, limit: usize) {
        let mut n = self.stream.len().min(limit);
        if p.byte() % 2 == 1
            && let Some(target) = self.conn.read_target()
        {
            let direct = target.len().min(n);
            target[..direct].copy_from_slice(&self.stream[..direct]);
            self.conn.read_done(direct);
            self.stream.drain(..direct);
            n -= direct;
        }
        let memory = &mut self.memory;
        let alloc: &mut Alloc<'_> = &mut |len, need| Self::alloc(memory, len, need);
        match self.conn.handle_input(&self.stream[..n], alloc) {
            Ok(used) => {
                assert!(used == n || self.conn.stalled() || !self.conn.wants_input());
                self.stream.drain(..used);
            }
            Err(fault) => {
                assert!(!self.ended && !self.clean, "{fault}");
                self.ended = true;
                assert!(self.conn.is_ending() && self.conn.peer_due() == PeerDue::Close);
                if let Fault::Host { .. } = fault {
                    assert!(self.conn.is_closed());
                }
                self.stream.clear();
            }
        }
        self.events();
    }

    fn events(&mut self) {
        while let Some(event) = self.conn.poll_event() {
            assert!(!self.ended);
            let (slot, seq, sqe, room) = match event {
                Event::Command { slot, seq, sqe, data: buffers } => {
                    self.check_data(&sqe, &buffers);
                    (slot, seq, sqe, Some(buffers))
                }
                Event::Rejected { slot, seq, sqe, status } => {
                    assert!(!status.is_success());
                    (slot, seq, sqe, None)
                }
            };
            assert!(self.seen.insert(seq), "command {seq} twice");
            assert!(slot < SLOTS);
            assert!(self.executing.insert(slot, (sqe, room)).is_none(), "slot {slot} twice");
        }
        assert!(self.conn.outstanding() <= usize::from(SLOTS) && self.executing.len() <= self.conn.outstanding());
    }

    /// Data of commands of a clean stream follows a pattern; its length is always that of the descriptor.
    fn check_data(&self, sqe: &Sqe, buffers: &Buffers) {
        match Direction::of_command(sqe) {
            Direction::None | Direction::Bidirectional => assert!(buffers.is_empty()),
            direction => {
                assert_eq!(buffers.len(), sqe.dptr.parse().expect("delivered").len() as usize);
                if direction == Direction::HostToController && self.clean {
                    assert_eq!(buffers.to_vec(), data(sqe.cid.get(), 0, buffers.len() as u32));
                }
            }
        }
    }

    /// The target sends up to `limit` bytes in at most `slices` slices.
    fn send(&mut self, limit: usize, slices: usize) {
        let mut iov = [IoSlice::new(&[]); 64];
        let n = self.conn.poll_output(&mut iov[..slices.clamp(1, 64)]);
        assert!(n > 0 || !self.conn.wants_output());
        let mut bytes: Vec<u8> = iov[..n].iter().flat_map(|s| s.to_vec()).collect();
        assert!(bytes.len() <= self.conn.pending_output_bytes());
        bytes.truncate(limit);
        self.conn.sent(bytes.len(), &mut |data| assert!(!data.is_empty()));
        // A host that never initialised properly cannot read what comes.
        for pdu in self.host.receive(&bytes).expect("the target obeys the specification") {
            assert_eq!(self.term_reqs, 0, "{pdu:?} behind C2HTermReq");
            match pdu {
                TargetPdu::R2t { cid, ttag, offset, len } => {
                    assert_eq!(offset, 0);
                    self.r2ts.push(R2t { cid, ttag, len, sent: 0 });
                }
                TargetPdu::TermReq { .. } => self.term_reqs += 1,
                TargetPdu::Response(cqe) => self.answered(cqe.cid.get()),
                TargetPdu::Data { cid, success: true, .. } => self.answered(cid),
                TargetPdu::IcResp(_) | TargetPdu::Data { .. } => {}
            }
        }
    }

    fn answered(&mut self, cid: u16) {
        assert!(self.in_use.remove(&cid) || !self.clean, "an answer to nothing");
    }

    fn complete(&mut self, p: &mut Program<'_>) {
        let choice = p.byte();
        let Some(slot) = self.executing.keys().nth(usize::from(choice) % self.executing.len().max(1)).copied() else {
            return;
        };
        let (sqe, room) = self.executing.remove(&slot).expect("it is there");
        let status = match choice >> 6 {
            0 => Status::LBA_OUT_OF_RANGE.dnr(),
            _ => Status::SUCCESS,
        };
        let cqe = Cqe::new(0, status).with_dw0(u32::from(choice & 8));
        let payload = match room {
            Some(mut room) if Direction::of_command(&sqe) == Direction::ControllerToHost => {
                if choice & 16 != 0 {
                    room.truncate(usize::from(p.byte()));
                }
                Some(room)
            }
            _ => None,
        };
        self.conn.complete(slot, cqe, payload);
    }

    /// A command by the rules, if the host may send one now.
    fn good_command(&mut self, p: &mut Program<'_>) {
        let kind = p.byte();
        let cid = u16::from(p.byte() % 16);
        // The rules: not more than the queue holds, no CID in use, initialised.
        let free = self.in_use.len() < usize::from(SLOTS) && !self.in_use.contains(&cid);
        if !free || self.conn.negotiated().is_none() {
            return;
        }
        let len = p.len() % (MAX_IO + 1);
        let host = &self.host;
        let inline = len % 513;
        let capsule = match kind % 5 {
            0 => host.capsule(&command(io::FLUSH, cid, 1), &[]),
            1 => host.capsule(&read(cid, 1, 0, 1, len), &[]),
            2 => host.capsule(&write(cid, 1, 0, 1, len), &[]),
            3 => host.capsule(&write_in_capsule(cid, 1, 0, 1, inline), &data(cid, 0, inline)),
            _ => host.capsule(&connect(cid, 1, 32, 0, false), &data(cid, 0, 1024)),
        };
        self.stream.extend(capsule);
        self.in_use.insert(cid);
    }

    /// The next piece of data that an R2T asked for.
    fn good_data(&mut self, p: &mut Program<'_>) {
        let choice = usize::from(p.byte());
        let piece = p.len().clamp(1, 4096);
        if self.r2ts.is_empty() {
            return;
        }
        let at = choice % self.r2ts.len();
        let r2t = &mut self.r2ts[at];
        let n = piece.min(r2t.len - r2t.sent);
        let last = r2t.sent + n == r2t.len;
        self.stream.extend(self.host.h2c_data(r2t.cid, r2t.ttag, r2t.sent, &data(r2t.cid, r2t.sent, n), last));
        r2t.sent += n;
        if last {
            self.r2ts.remove(at);
        }
    }

    fn bad_command(&mut self, p: &mut Program<'_>) {
        self.clean = false;
        let opcode = p.byte();
        let cid = u16::from(p.byte() % 16);
        let address = u64::from(p.byte());
        let dptr = match p.byte() % 4 {
            0 => Sgl::InCapsule { offset: address, len: p.len() }.into(),
            1 => Sgl::Transport { len: p.len() }.into(),
            _ => SglDescriptor::raw(address, p.len(), p.byte()),
        };
        let mut sqe = with_descriptor(command(opcode, cid, u32::from(p.byte())), dptr);
        sqe.flags = p.byte();
        let data = vec![p.byte(); (p.len() % 12_000) as usize];
        self.stream.extend(self.host.capsule(&sqe, &data));
    }

    fn bad_data(&mut self, p: &mut Program<'_>) {
        self.clean = false;
        let (cid, ttag) = (u16::from(p.byte() % 16), u16::from(p.byte() % 8));
        let (offset, len) = (p.len(), p.len() % 5000);
        let last = p.byte() % 2 == 0;
        self.stream.extend(self.host.h2c_data(cid, ttag, offset, &vec![0; len as usize], last));
    }

    /// Changes a byte that the target has not read.
    fn spoil(&mut self, p: &mut Program<'_>) {
        let at = usize::from(p.word());
        let bits = p.byte();
        let reseal = p.byte() % 2 == 0;
        self.clean = false;
        if let Some(byte) = self.stream.get_mut(at) {
            *byte ^= bits;
            if reseal && self.stream.len() >= 256 {
                self.host.reseal(&mut self.stream);
            }
        }
    }

    fn abort(&mut self, p: &mut Program<'_>) {
        if let AbortOutcome::Executing(slot) = self.conn.abort(u16::from(p.byte() % 16)) {
            assert!(self.executing.contains_key(&slot));
        }
        self.events();
    }

    fn step(&mut self, p: &mut Program<'_>) {
        if self.stream.len() > 100_000 {
            self.feed(p, usize::MAX);
        }
        match p.byte() % 16 {
            0 | 1 => self.good_command(p),
            2 | 3 => self.good_data(p),
            4 => self.bad_command(p),
            5 => self.bad_data(p),
            6 => {
                let noise = p.bytes();
                self.clean &= noise.is_empty();
                self.stream.extend(noise);
            }
            7 => self.spoil(p),
            8 | 9 => {
                let limit = p.len() as usize;
                self.feed(p, limit);
            }
            10 => self.complete(p),
            11 => {
                let (limit, slices) = (p.len() as usize, usize::from(p.byte()));
                self.send(limit, slices);
            }
            12 => self.memory = p.len() as usize,
            13 => {
                let memory = &mut self.memory;
                self.conn.retry_alloc(&mut |len, need| Self::alloc(memory, len, need));
                self.events();
            }
            14 => self.abort(p),
            _ => match p.byte() {
                0..=100 => {
                    let entries = u32::from(p.byte()) + 1;
                    self.conn.set_queue(entries, p.byte() % 2 == 0, p.byte() % 2 == 0);
                }
                101..=200 => {
                    self.clean = false;
                    self.stream.extend(self.host.term_req(p.word(), p.long()));
                }
                201..=210 => {
                    self.conn.close(&mut |data| assert!(!data.is_empty()));
                    self.ended = true;
                }
                _ => {}
            },
        }
    }

    /// A clean host gets all its answers once there is memory and everybody does his part.
    fn finish(mut self) {
        let mut rounds = 0;
        while self.clean && !self.ended {
            self.memory = usize::MAX;
            self.feed(&mut Program(&[]), usize::MAX);
            let memory = &mut self.memory;
            self.conn.retry_alloc(&mut |len, need| Self::alloc(memory, len, need));
            self.events();
            while !self.executing.is_empty() {
                self.complete(&mut Program(&[0x40]));
            }
            self.send(usize::MAX, 64);
            while !self.r2ts.is_empty() {
                self.good_data(&mut Program(&[0, 255, 0xff, 0xff]));
            }
            if self.stream.is_empty() && self.conn.outstanding() == 0 && !self.conn.wants_output() {
                assert!(!self.conn.stalled() && self.host.pending_bytes() == 0);
                return;
            }
            rounds += 1;
            assert!(rounds < 1000, "no progress: {:?}", self.conn);
        }
        let slots: Vec<u16> = self.executing.keys().copied().collect();
        for slot in slots {
            self.conn.complete(slot, Cqe::success(0), None);
        }
        if self.ended {
            assert_eq!(self.conn.outstanding(), 0);
            while self.conn.wants_output() {
                self.send(usize::MAX, 64);
            }
            assert!(self.conn.is_closed() && self.term_reqs <= 1);
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let p = &mut Program(bytes);
    let mut world = World::new(p);
    while !p.0.is_empty() {
        world.step(p);
    }
    world.finish();
});
