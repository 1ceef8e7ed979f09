//! The protocol machine of one NVMe/TCP queue pair on the host's side.
//!
//! [`HostConnection`] does no I/O, has no clock and knows no reactor: commands and bytes go in, completions and bytes
//! come out. It shares framing and digests with the target's machine.
//!
//! ```text
//!                ICResp                       fatal mistake of the target, terminate()
//!  AwaitIcResp --------> Ready ---------------------------------> Terminating --(H2CTermReq sent)--> Closed
//!      |                   |  C2HTermReq                                                               ^
//!      +-------------------+---------------------------------------------------------------------------+
//! ```
//!
//! A command's way through its slot:
//! ```text
//!  Free --submit--> Active --response, or C2HData with SUCCESS--> Done --poll_completion--> Free
//!                    |  ^                                          ^
//!                    +--+ R2T: queued for H2CData                  | not before every byte of its payload that is
//!                    +--+ C2HData: lands in the payload            | queued for sending has left
//! ```
//!
//! The rules that hold throughout:
//! - The payload of a command belongs to its slot until the completion comes out, and goes back with it.
//! - Nothing of the target is believed: a CID has to name a command that is outstanding in this very use of its slot
//!   (the high bits count the uses), offsets have to go up without a gap, lengths have to stay inside the payload.
//!   What does not is answered with H2CTermReq (TCP 3.6.2.5), and the commands then come out of
//!   [`HostConnection::drain`] with their fate unknown.
//! - A payload whose data digest was wrong completes as Transient Transport Error (TCP 3.3.1.3), the connection stays.
//! - Success for a command whose data was never asked for completes as Data Transfer Error: nothing can be stored that
//!   was not sent. How much was received for a command that reads is the caller's to look at.
//! - Nothing is allocated after [`HostConnection::new`].

use super::codec::{Fatal, Framing, Layout};
use super::digest::{Crc32c, crc32c};
use super::host_output::HostOutput;
use crate::host::transport::{Completion, Payload};
use crate::spec::pdu::{
    CapsuleCmd, CapsuleResp, CommonHeader, DIGEST_BYTES, DataPdu, Fes, IcReq, IcResp, MAX_HEADER_BYTES, MAX_PDA,
    MAX_TERM_BYTES, MAX_TERM_DATA_BYTES, MIN_MAXH2CDATA, PduType, R2t, TermReq, alignment_bytes, data_offset, dgst,
    flags,
};
use crate::spec::sqe::Sgl;
use crate::spec::{Cqe, Sqe, Status};
use reactor::buffer::Buffers;
use std::collections::VecDeque;
use std::fmt;
use std::io::IoSlice;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// PSDT 01b: an SGL, and metadata in one piece.
const PSDT_SGL: u8 = 1 << 6;
/// Payload pieces of H2CData that may be queued beside those of capsules.
const H2C_ITEMS: usize = 64;

/// What a host offers and asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostConfig {
    /// Commands outstanding at once, 1 to 32768. Must be below the entries of the queue that Connect asks for.
    pub slots: u16,
    /// Ask for header digests.
    pub header_digest: bool,
    /// Ask for data digests.
    pub data_digest: bool,
}

/// Why the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostFault {
    /// The target broke the protocol; an H2CTermReq is queued. Send it, then close.
    Protocol(Fatal),
    /// The target terminated; close.
    Target {
        /// Its fatal error status; see [`Fes`].
        fes: u16,
        /// Its fatal error information.
        fei: u32,
    },
}

impl fmt::Display for HostFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostFault::Protocol(fatal) => write!(f, "protocol error of the target: {fatal}"),
            HostFault::Target { fes, fei } => write!(f, "terminated by the target: FES {fes:#04x}, FEI {fei:#x}"),
        }
    }
}

impl std::error::Error for HostFault {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    AwaitIcResp,
    Ready,
    Terminating,
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Active,
    Done,
}

#[derive(Debug)]
struct Slot {
    state: State,
    /// The command's identifier: index in the low bits, number of the use above.
    cid: u16,
    user: u64,
    payload: Payload,
    data: Buffers,
    /// Bytes of payload received, or asked for by R2T (or put into the capsule).
    moved: u32,
    /// The last C2HData has come.
    last_seen: bool,
    /// A data digest was wrong.
    spoiled: bool,
    /// What an R2T asked for and is not queued yet: transfer tag, end in the payload, bytes.
    ttag: u16,
    r2t_at: u32,
    r2t_left: u32,
    /// Pieces of payload in the output.
    queued: u32,
    cqe: Cqe,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rx {
    Header,
    Data,
    Digest,
    Dead,
}

/// The C2HData that is being read.
#[derive(Clone, Copy, Debug, Default)]
struct Incoming {
    slot: u16,
    digest: bool,
    success: bool,
    pad: u32,
    offset: u32,
    left: u32,
}

/// One NVMe/TCP queue pair on the host's side. See the [module](self) for its states.
pub struct HostConnection {
    config: HostConfig,
    phase: Phase,
    framing_in: Framing,
    framing_out: Framing,
    maxh2cdata: u32,
    in_capsule_bytes: u32,
    rx: Rx,
    incoming: Incoming,
    head: [u8; MAX_HEADER_BYTES + DIGEST_BYTES],
    have: usize,
    crc: Crc32c,
    tx_crc: Crc32c,
    tx: HostOutput,
    slots: Box<[Slot]>,
    free: Vec<u16>,
    done: VecDeque<u16>,
    /// Slots whose R2T is not answered completely. Each is in it once at most.
    asked: VecDeque<u16>,
    index_mask: u16,
}

impl fmt::Debug for HostConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostConnection")
            .field("phase", &self.phase)
            .field("rx", &self.rx)
            .field("incoming", &self.incoming)
            .field("outstanding", &self.outstanding())
            .finish_non_exhaustive()
    }
}

/// Header bytes of one capsule at the most.
const fn capsule_bytes() -> usize {
    data_offset(size_of::<CapsuleCmd>(), true, alignment_bytes(MAX_PDA)) + DIGEST_BYTES
}

/// Header bytes of one H2CData at the most.
const fn h2c_bytes() -> usize {
    data_offset(size_of::<DataPdu>(), true, alignment_bytes(MAX_PDA)) + DIGEST_BYTES
}

impl HostConnection {
    /// A connection with its ICReq queued.
    ///
    /// # Panics
    /// If the configuration breaks a rule that [`HostConfig`] states.
    pub fn new(config: HostConfig) -> Self {
        assert!(config.slots > 0 && config.slots <= 1 << 15, "slots: 1 to 32768");
        let count = usize::from(config.slots);
        let index_mask = (count.next_power_of_two() - 1) as u16;
        let slots = (0..config.slots).map(|index| Slot {
            state: State::Free,
            cid: index,
            user: 0,
            payload: Payload::None,
            data: Buffers::new(),
            moved: 0,
            last_seen: false,
            spoiled: false,
            ttag: 0,
            r2t_at: 0,
            r2t_left: 0,
            queued: 0,
            cqe: Cqe::success(0),
        });
        let ring = count * capsule_bytes() + H2C_ITEMS * h2c_bytes() + size_of::<IcReq>() + MAX_TERM_BYTES;
        let mut tx = HostOutput::new(ring, 2 * count + 2 * H2C_ITEMS + 4);
        let mut req = IcReq::new_zeroed();
        req.ch = CommonHeader::bare(PduType::IcReq);
        req.dgst =
            if config.header_digest { dgst::HEADER } else { 0 } | if config.data_digest { dgst::DATA } else { 0 };
        tx.push(req.as_bytes());
        Self {
            config,
            phase: Phase::AwaitIcResp,
            framing_in: Framing::default(),
            framing_out: Framing::default(),
            maxh2cdata: MIN_MAXH2CDATA,
            in_capsule_bytes: 0,
            rx: Rx::Header,
            incoming: Incoming::default(),
            head: [0; MAX_HEADER_BYTES + DIGEST_BYTES],
            have: 0,
            crc: Crc32c::new(),
            tx_crc: Crc32c::new(),
            tx,
            slots: slots.collect(),
            free: (0..config.slots).rev().collect(),
            done: VecDeque::with_capacity(count),
            asked: VecDeque::with_capacity(count),
            index_mask,
        }
    }

    /// Sets how much data commands to the controller may carry in their capsules: 8192 on admin queues and for Connect,
    /// else what IOCCSZ says.
    pub fn set_in_capsule_bytes(&mut self, bytes: u32) {
        self.in_capsule_bytes = bytes;
    }

    /// True once ICResp has come, until the connection ends.
    #[inline]
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    /// Whether [`submit`](Self::submit) will take a command.
    #[inline]
    pub fn can_submit(&self) -> bool {
        self.phase == Phase::Ready && !self.free.is_empty() && self.tx.has_room(capsule_bytes() + MAX_TERM_BYTES)
    }

    /// Whether [`submit`](Self::submit) will take two commands, one behind the other.
    pub fn can_submit_pair(&self) -> bool {
        self.phase == Phase::Ready
            && self.free.len() >= 2
            && self.tx.has_room_for_pair(2 * capsule_bytes() + MAX_TERM_BYTES)
    }

    /// Commands that have not come out as completions.
    pub fn outstanding(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Queues a command. CID, PSDT and the data pointer of `sqe` are filled in here.
    ///
    /// # Panics
    /// If [`can_submit`](Self::can_submit) is false, or `data` is not as long as `payload` says.
    pub fn submit(&mut self, user: u64, mut sqe: Sqe, payload: Payload, data: Buffers) {
        assert!(self.can_submit(), "a command was submitted without asking for room");
        let (to_controller, to_host) = match payload {
            Payload::None => (0, 0),
            Payload::ToController(len) => (len, 0),
            Payload::ToHost(len) => (0, len),
        };
        assert_eq!(data.len(), to_controller as usize + to_host as usize, "the payload is not as long as was said");
        let index = self.free.pop().expect("can_submit() saw a free slot");
        let in_capsule = if to_controller <= self.in_capsule_bytes { to_controller } else { 0 };
        let mask = self.index_mask;
        let slot = &mut self.slots[usize::from(index)];
        // One more use: with all bits in the index there is one slot number per CID, and no count.
        slot.cid = slot.cid.wrapping_add(mask.wrapping_add(1)) & !mask | index;
        // FFFFh is left unused, as hosts are asked to (Base 3.3.1.1).
        if slot.cid == u16::MAX {
            slot.cid = index;
        }
        slot.state = State::Active;
        (slot.user, slot.payload, slot.data) = (user, payload, data);
        (slot.moved, slot.last_seen, slot.spoiled, slot.queued) = (in_capsule, false, false, 0);
        slot.r2t_left = 0;
        sqe.cid = U16::new(slot.cid);
        sqe.flags = sqe.flags & 0x3f | PSDT_SGL;
        sqe.dptr = if in_capsule > 0 {
            Sgl::InCapsule { offset: 0, len: in_capsule }.into()
        } else {
            Sgl::Transport { len: to_controller + to_host }.into()
        };
        let (ch, layout) = self.framing_out.header(PduType::CapsuleCmd, 0, in_capsule);
        self.push_pdu(CapsuleCmd { ch, sqe }.as_bytes(), layout, index, 0);
    }

    /// Queues a PDU whose data, if it has any, is a part of a slot's payload.
    fn push_pdu(&mut self, header: &[u8], layout: Layout, index: u16, offset: u32) {
        self.tx.push(header);
        if self.framing_out.header_digest {
            self.tx.push(&crc32c(header));
        }
        let len = layout.data_bytes;
        if len == 0 {
            return;
        }
        self.tx.push(&[0; MAX_HEADER_BYTES][..layout.pad_bytes]);
        self.tx.push_data(index, offset, len);
        let slot = &mut self.slots[usize::from(index)];
        slot.queued += 1;
        if layout.data_digest {
            let (mut at, end) = (offset as usize, (offset + len) as usize);
            while at < end {
                let piece = slot.data.slice_at(at);
                let piece = &piece[..piece.len().min(end - at)];
                self.tx_crc.update(piece);
                at += piece.len();
            }
            self.tx.push(&self.tx_crc.finish());
        }
    }

    /// Queues H2CData for what R2Ts have asked for, while there is room.
    fn answer_r2ts(&mut self) {
        while self.phase == Phase::Ready && self.tx.has_room(capsule_bytes() + h2c_bytes() + MAX_TERM_BYTES) {
            let Some(index) = self.asked.pop_front() else { return };
            let slot = &mut self.slots[usize::from(index)];
            let (offset, len) = (slot.r2t_at, slot.r2t_left.min(self.maxh2cdata));
            slot.r2t_at += len;
            slot.r2t_left -= len;
            let (cid, ttag, is_last) = (slot.cid, slot.ttag, slot.r2t_left == 0);
            if !is_last {
                self.asked.push_front(index);
            }
            let pdu_flags = if is_last { flags::LAST_PDU } else { 0 };
            let (ch, layout) = self.framing_out.header(PduType::H2cData, pdu_flags, len);
            self.push_pdu(DataPdu::new(ch, cid, ttag, offset, len).as_bytes(), layout, index, offset);
        }
    }

    /// True if there is something to send.
    #[inline]
    pub fn wants_output(&self) -> bool {
        !self.tx.is_empty()
    }

    /// Fills `iov` with slices to send, in order; returns how many. Any number of their bytes may be sent.
    pub fn poll_output<'a>(&'a self, iov: &mut [IoSlice<'a>]) -> usize {
        self.tx.gather(iov, |slot, offset| self.slots[usize::from(slot)].data.slice_at(offset as usize))
    }

    /// The first `bytes` of the output are sent.
    ///
    /// # Panics
    /// If that is more than there was to send.
    pub fn sent(&mut self, bytes: usize) {
        let (slots, done) = (&mut self.slots, &mut self.done);
        self.tx.sent(bytes, |index| {
            let slot = &mut slots[usize::from(index)];
            slot.queued -= 1;
            if slot.state == State::Done && slot.queued == 0 {
                done.push_back(index);
            }
        });
        self.answer_r2ts();
        if self.phase == Phase::Terminating && self.tx.is_empty() {
            self.phase = Phase::Closed;
        }
    }

    /// The next completion. `None` if there is none now.
    #[inline]
    pub fn poll_completion(&mut self) -> Option<Completion> {
        let index = self.done.pop_front()?;
        let slot = &mut self.slots[usize::from(index)];
        slot.state = State::Free;
        self.free.push(index);
        Some(Completion {
            user: slot.user,
            cqe: slot.cqe,
            data: std::mem::take(&mut slot.data),
            transferred_bytes: slot.moved,
        })
    }

    /// Ends everything at once, the stream is gone: gives the commands that have not completed, whose fate is unknown.
    pub fn drain(&mut self, lost: &mut dyn FnMut(u64, Buffers)) {
        self.phase = Phase::Closed;
        self.rx = Rx::Dead;
        self.tx.clear();
        self.asked.clear();
        self.done.clear();
        for (index, slot) in self.slots.iter_mut().enumerate() {
            if slot.state != State::Free {
                slot.state = State::Free;
                slot.queued = 0;
                self.free.push(index as u16);
                lost(slot.user, std::mem::take(&mut slot.data));
            }
        }
    }

    /// Ends the connection from this side with an H2CTermReq. Input is ignored from now on.
    pub fn terminate(&mut self, fes: Fes, fei: u32) {
        self.terminate_with(fes, fei, &[]);
    }

    fn terminate_with(&mut self, fes: Fes, fei: u32, header: &[u8]) {
        if matches!(self.phase, Phase::Terminating | Phase::Closed) {
            return;
        }
        let header = &header[..header.len().min(MAX_TERM_DATA_BYTES)];
        let mut term = TermReq::new_zeroed();
        term.ch = CommonHeader::bare(PduType::H2cTermReq);
        term.ch.plen = U32::new((size_of::<TermReq>() + header.len()) as u32);
        term.fes = U16::new(fes as u16);
        term.fei = U32::new(fei);
        self.tx.push(term.as_bytes());
        self.tx.push(header);
        self.phase = Phase::Terminating;
        self.rx = Rx::Dead;
        self.asked.clear();
    }

    /// True when nothing more will be received, and nothing is left to be sent.
    pub fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// Consumes bytes of the stream, all of them.
    ///
    /// # Errors
    /// A fault ends the connection; nothing is looked at any more. For [`HostFault::Protocol`] an H2CTermReq is queued.
    pub fn handle_input(&mut self, mut bytes: &[u8]) -> Result<(), HostFault> {
        while !bytes.is_empty() {
            let used = match self.rx {
                Rx::Header => self.rx_header(bytes)?,
                Rx::Data => self.rx_data(bytes),
                Rx::Digest => self.rx_digest(bytes),
                Rx::Dead => return Ok(()),
            };
            bytes = &bytes[used..];
        }
        Ok(())
    }

    /// If the next bytes of the stream are data, the memory that they belong in: receive straight into it, and say how
    /// much came with [`read_done`](Self::read_done). What follows belongs to [`handle_input`](Self::handle_input).
    #[inline]
    pub fn read_target(&mut self) -> Option<&mut [u8]> {
        let Incoming { slot, pad, offset, left, .. } = self.incoming;
        if self.rx != Rx::Data || pad > 0 {
            return None;
        }
        let target = self.slots[usize::from(slot)].data.slice_at_mut(offset as usize);
        let len = target.len().min(left as usize);
        Some(&mut target[..len])
    }

    /// The first `len` bytes of the [`read_target`](Self::read_target) have been filled from the stream.
    ///
    /// # Panics
    /// If that is more than the target has.
    pub fn read_done(&mut self, len: usize) {
        if len == 0 {
            return;
        }
        let incoming = &mut self.incoming;
        let target = self.slots[usize::from(incoming.slot)].data.slice_at(incoming.offset as usize);
        let is_open = self.rx == Rx::Data && incoming.pad == 0;
        assert!(is_open && len <= target.len().min(incoming.left as usize), "more read than asked for");
        if incoming.digest {
            self.crc.update(&target[..len]);
        }
        incoming.offset += len as u32;
        incoming.left -= len as u32;
        if incoming.left == 0 {
            if incoming.digest {
                self.rx = Rx::Digest;
            } else {
                self.finish_data();
            }
        }
    }

    fn rx_data(&mut self, bytes: &[u8]) -> usize {
        if self.incoming.pad > 0 {
            let n = bytes.len().min(self.incoming.pad as usize);
            self.incoming.pad -= n as u32;
            return n;
        }
        let target = self.read_target().expect("data without padding has a target");
        let n = bytes.len().min(target.len());
        target[..n].copy_from_slice(&bytes[..n]);
        self.read_done(n);
        n
    }

    fn rx_digest(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(DIGEST_BYTES - self.have);
        self.head[self.have..self.have + n].copy_from_slice(&bytes[..n]);
        self.have += n;
        if self.have == DIGEST_BYTES {
            self.have = 0;
            if self.crc.finish() != self.head[..DIGEST_BYTES] {
                self.slots[usize::from(self.incoming.slot)].spoiled = true;
            }
            self.finish_data();
        }
        n
    }

    fn finish_data(&mut self) {
        self.rx = Rx::Header;
        if self.incoming.success {
            let index = self.incoming.slot;
            let cid = self.slots[usize::from(index)].cid;
            self.complete(index, Cqe::success(cid));
        }
    }

    fn complete(&mut self, index: u16, cqe: Cqe) {
        let slot = &mut self.slots[usize::from(index)];
        slot.cqe = cqe;
        if cqe.status().is_success() {
            let never_took_it = matches!(slot.payload, Payload::ToController(len) if slot.moved < len);
            if slot.spoiled {
                slot.cqe.status_field = U16::new(Status::TRANSIENT_TRANSPORT_ERROR.to_field());
            } else if never_took_it {
                slot.cqe.status_field = U16::new(Status::DATA_TRANSFER_ERROR.to_field());
            }
        }
        slot.state = State::Done;
        if slot.queued == 0 {
            self.done.push_back(index);
        }
    }

    fn fail(&mut self, fatal: Fatal, header: &[u8]) -> HostFault {
        self.terminate_with(fatal.fes, fatal.fei, header);
        HostFault::Protocol(fatal)
    }

    /// The type of the PDU whose first byte is given, if it may come now.
    fn expect(&self, first: u8) -> Result<PduType, Fatal> {
        let pdu_type = PduType::from_byte(first)
            .filter(|t| !t.is_from_host())
            .ok_or(Fatal::field(CommonHeader::OFFSET_TYPE, "not a PDU type that a controller sends"))?;
        match (self.phase, pdu_type) {
            (_, PduType::C2hTermReq) | (Phase::AwaitIcResp, PduType::IcResp) => Ok(pdu_type),
            (Phase::AwaitIcResp, _) => Err(Fatal::sequence("a PDU before ICResp")),
            (_, PduType::IcResp) => Err(Fatal::sequence("a second ICResp")),
            _ => Ok(pdu_type),
        }
    }

    #[inline]
    fn rx_header(&mut self, rest: &[u8]) -> Result<usize, HostFault> {
        let first = if self.have == 0 { rest[0] } else { self.head[0] };
        let pdu_type = match self.expect(first) {
            Ok(pdu_type) => pdu_type,
            Err(fatal) => return Err(self.fail(fatal, &rest[..1])),
        };
        let need = self.framing_in.header_bytes(pdu_type);
        if self.have == 0 && rest.len() >= need {
            self.on_header(pdu_type, &rest[..need])?;
            return Ok(need);
        }
        let n = rest.len().min(need - self.have);
        self.head[self.have..self.have + n].copy_from_slice(&rest[..n]);
        self.have += n;
        if self.have == need {
            self.have = 0;
            let head = self.head;
            self.on_header(pdu_type, &head[..need])?;
        }
        Ok(n)
    }

    #[inline]
    fn on_header(&mut self, pdu_type: PduType, header: &[u8]) -> Result<(), HostFault> {
        if pdu_type == PduType::C2hTermReq {
            let term = TermReq::ref_from_prefix(header).map(|(term, _)| (term.fes.get(), term.fei.get()));
            let (fes, fei) = term.unwrap_or((0, 0));
            self.phase = Phase::Closed;
            self.rx = Rx::Dead;
            self.asked.clear();
            return Err(HostFault::Target { fes, fei });
        }
        self.dispatch(pdu_type, header).map_err(|fatal| self.fail(fatal, &header[..pdu_type.header_bytes()]))
    }

    fn dispatch(&mut self, pdu_type: PduType, header: &[u8]) -> Result<(), Fatal> {
        const WHOLE: &str = "a whole header";
        let (ch, _) = CommonHeader::ref_from_prefix(header).expect(WHOLE);
        self.framing_in.check_early(ch, pdu_type)?;
        if self.framing_in.header_digest && pdu_type.may_have_digest() {
            let (bytes, digest) = header.split_at(pdu_type.header_bytes());
            if crc32c(bytes) != digest {
                let fei = digest.try_into().map_or(0, u32::from_le_bytes);
                return Err(Fatal { fes: Fes::HeaderDigestError, fei, what: "header digest mismatch" });
            }
        }
        let layout = self.framing_in.check(ch, pdu_type)?;
        match pdu_type {
            PduType::CapsuleResp => self.on_response(&CapsuleResp::ref_from_prefix(header).expect(WHOLE).0.cqe),
            PduType::C2hData => self.on_data(DataPdu::ref_from_prefix(header).expect(WHOLE).0, layout),
            PduType::R2t => self.on_r2t(R2t::ref_from_prefix(header).expect(WHOLE).0),
            PduType::IcResp => self.on_icresp(IcResp::ref_from_prefix(header).expect(WHOLE).0),
            _ => unreachable!("expect() lets only PDUs of the controller through"),
        }
    }

    fn on_icresp(&mut self, resp: &IcResp) -> Result<(), Fatal> {
        let asked = if self.config.header_digest { dgst::HEADER } else { 0 }
            | if self.config.data_digest { dgst::DATA } else { 0 };
        if resp.pfv.get() != 0 {
            return Err(Fatal { fes: Fes::UnsupportedParameter, fei: 8, what: "PDU format version is not 0" });
        }
        if resp.cpda > MAX_PDA {
            return Err(Fatal::field(10, "CPDA is above 31"));
        }
        if resp.dgst & !asked != 0 {
            return Err(Fatal::field(11, "digests that were not asked for"));
        }
        let maxh2cdata = resp.maxh2cdata.get();
        if maxh2cdata < MIN_MAXH2CDATA {
            return Err(Fatal::field(12, "MAXH2CDATA is below 4096"));
        }
        let header_digest = resp.dgst & dgst::HEADER != 0;
        let data_digest = resp.dgst & dgst::DATA != 0;
        self.framing_out = Framing { header_digest, data_digest, pda: resp.cpda };
        self.framing_in = Framing { header_digest, data_digest, pda: 0 };
        // All pieces but the last have to be whole dwords.
        self.maxh2cdata = maxh2cdata & !3;
        self.phase = Phase::Ready;
        Ok(())
    }

    /// The slot of a command that is outstanding.
    #[inline]
    /// The identifier that the outstanding command `user` has on the wire.
    pub fn cid_of(&self, user: u64) -> Option<u16> {
        let slot = self.slots.iter().find(|slot| slot.state == State::Active && slot.user == user);
        slot.map(|slot| slot.cid)
    }

    fn find(&self, cid: u16, cid_offset: u32) -> Result<u16, Fatal> {
        let index = cid & self.index_mask;
        match self.slots.get(usize::from(index)) {
            Some(slot) if slot.state == State::Active && slot.cid == cid => Ok(index),
            _ => Err(Fatal::field(cid_offset, "no command with this identifier is outstanding")),
        }
    }

    fn on_response(&mut self, cqe: &Cqe) -> Result<(), Fatal> {
        let cid_offset = (size_of::<CommonHeader>() + 12) as u32;
        let index = self.find(cqe.cid.get(), cid_offset)?;
        if self.slots[usize::from(index)].r2t_left > 0 {
            return Err(Fatal::sequence("a response before the data that an R2T asked for"));
        }
        self.complete(index, *cqe);
        Ok(())
    }

    fn on_data(&mut self, pdu: &DataPdu, layout: Layout) -> Result<(), Fatal> {
        let index = self.find(pdu.cccid.get(), DataPdu::OFFSET_CCCID)?;
        let slot = &mut self.slots[usize::from(index)];
        let Payload::ToHost(len) = slot.payload else {
            return Err(Fatal::field(DataPdu::OFFSET_CCCID, "C2HData for a command that reads nothing"));
        };
        let (offset, datal) = (pdu.datao.get(), pdu.datal.get());
        if slot.last_seen {
            return Err(Fatal::sequence("C2HData behind the last one"));
        }
        if datal == 0 || datal != layout.data_bytes {
            return Err(Fatal::field(DataPdu::OFFSET_DATAL, "DATAL is not the data of the PDU"));
        }
        if offset != slot.moved {
            return Err(Fatal {
                fes: Fes::DataTransferOutOfRange,
                fei: DataPdu::OFFSET_DATAO,
                what: "DATAO has a gap",
            });
        }
        if datal > len - offset {
            let what = "C2HData beyond the end of the payload";
            return Err(Fatal { fes: Fes::DataTransferOutOfRange, fei: DataPdu::OFFSET_DATAL, what });
        }
        let is_last = pdu.ch.flags & flags::LAST_PDU != 0;
        let success = pdu.ch.flags & flags::SUCCESS != 0;
        if success && !is_last {
            return Err(Fatal::field(CommonHeader::OFFSET_FLAGS, "SUCCESS without LAST_PDU"));
        }
        slot.moved += datal;
        slot.last_seen = is_last;
        let (digest, pad) = (layout.data_digest, layout.pad_bytes as u32);
        self.incoming = Incoming { slot: index, digest, success, pad, offset, left: datal };
        self.rx = Rx::Data;
        Ok(())
    }

    fn on_r2t(&mut self, r2t: &R2t) -> Result<(), Fatal> {
        let index = self.find(r2t.cccid.get(), DataPdu::OFFSET_CCCID)?;
        let slot = &mut self.slots[usize::from(index)];
        let Payload::ToController(len) = slot.payload else {
            return Err(Fatal::field(DataPdu::OFFSET_CCCID, "R2T for a command that writes nothing"));
        };
        let (offset, asked) = (r2t.r2to.get(), r2t.r2tl.get());
        if slot.r2t_left > 0 {
            let what = "a second R2T for a command";
            return Err(Fatal { fes: Fes::DataTransferLimitExceeded, fei: 0, what });
        }
        if offset != slot.moved {
            return Err(Fatal { fes: Fes::DataTransferOutOfRange, fei: DataPdu::OFFSET_DATAO, what: "R2TO has a gap" });
        }
        if asked == 0 || asked > len - offset {
            let what = "R2T for nothing, or beyond the end of the payload";
            return Err(Fatal { fes: Fes::DataTransferOutOfRange, fei: DataPdu::OFFSET_DATAL, what });
        }
        slot.ttag = r2t.ttag.get();
        (slot.r2t_at, slot.r2t_left) = (offset, asked);
        slot.moved += asked;
        self.asked.push_back(index);
        self.answer_r2ts();
        Ok(())
    }
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
