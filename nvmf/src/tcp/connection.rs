//! The machine's public face: configuration, events, completions, output.

use super::codec::{Fatal, Framing};
use super::digest::{Crc32c, crc32c};
use super::output::Output;
use super::receive::{Incoming, Rx};
use super::slots::{Mate, Plan, SlotState, Slots};
use crate::spec::pdu::{
    CapsuleResp, CommonHeader, DIGEST_BYTES, DataPdu, Fes, IcResp, MAX_HEADER_BYTES, MAX_PDA, MAX_TERM_BYTES,
    MAX_TERM_DATA_BYTES, MIN_MAXH2CDATA, PduType, R2t, TermReq, alignment_bytes, data_offset, dgst, flags,
};
use crate::spec::sqe::Fuse;
use crate::spec::{Cqe, Sqe, Status};
use reactor::buffer::Buffers;
use std::collections::VecDeque;
use std::fmt;
use std::io::IoSlice;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromZeros, IntoBytes};

/// In-capsule data that Fabrics and admin commands may carry whatever IOCCSZ says (TCP 3.3.2.1.2.1).
pub const ADMIN_IN_CAPSULE_BYTES: u32 = 8192;

/// Limits and offers of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Commands outstanding at once: the largest queue that Connect will be granted, 1 to 65535.
    pub slots: u16,
    /// Longest data of one command, bytes.
    pub max_io_bytes: u32,
    /// In-capsule data of I/O commands, bytes (IOCCSZ without the entry). Admin and Fabrics commands may always have
    /// [`ADMIN_IN_CAPSULE_BYTES`].
    pub in_capsule_bytes: u32,
    /// MAXH2CDATA: data of one H2CData, bytes; at least 4096 and a multiple of 4.
    pub maxh2cdata: u32,
    /// Bytes that may be asked for with R2T and not have arrived, over all commands. One command is always let through.
    pub r2t_window_bytes: u32,
    /// CPDA: alignment of the host's data, in dwords, 0's-based, up to 31. Linux accepts only 0.
    pub cpda: u8,
    /// Grant header digests to hosts that ask for them.
    pub allow_header_digest: bool,
    /// Grant data digests to hosts that ask for them.
    pub allow_data_digest: bool,
}

impl Config {
    /// The most memory that a connection holds beside payloads, bytes, whatever the host negotiates and does.
    pub const fn memory_bytes(&self) -> usize {
        let slots = self.slots as usize;
        let ring = ring_bytes(slots, header_bytes_per_command(true, true, MAX_PDA));
        size_of::<Connection>()
            + Slots::memory_bytes(slots)
            + 2 * slots * size_of::<u16>()
            + ring
            + (slots + 2) * Output::ITEM_BYTES
    }
}

/// The most header bytes that one command can put into the output: a read sends C2HData, its digest and a response; a
/// write sends R2T and a response.
const fn header_bytes_per_command(header_digest: bool, data_digest: bool, hpda: u8) -> usize {
    let digest = if header_digest { DIGEST_BYTES } else { 0 };
    let response = size_of::<CapsuleResp>() + digest;
    let read = data_offset(size_of::<DataPdu>(), header_digest, alignment_bytes(hpda))
        + if data_digest { DIGEST_BYTES } else { 0 }
        + response;
    let write = size_of::<R2t>() + digest + response;
    if read > write { read } else { write }
}

/// Header bytes in the output: those of a whole queue, ICResp and the longest C2HTermReq.
const fn ring_bytes(slots: usize, per_command: usize) -> usize {
    (slots * per_command + CONTROL_BYTES).next_power_of_two()
}

impl Default for Config {
    fn default() -> Self {
        Self {
            slots: 128,
            max_io_bytes: 128 * 1024,
            in_capsule_bytes: 8192,
            maxh2cdata: 128 * 1024,
            r2t_window_bytes: 4 * 1024 * 1024,
            cpda: 0,
            allow_header_digest: true,
            allow_data_digest: true,
        }
    }
}

/// What memory is wanted for. It decides what the allocator must keep back.
///
/// Memory of [`Need::HostData`] is held until the host has sent more of its stream. In-capsule data can stop that very
/// stream. So that the two cannot wait for each other, an allocator must refuse `HostData` while granting it would
/// leave less than one in-capsule payload; `InCapsule` and `ToHost` may use all there is, since such commands finish
/// without anything more to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// For data in a capsule that is being read.
    InCapsule,
    /// For data that will be asked for with R2T, and for half a fused operation: it waits for more of the stream too.
    HostData,
    /// For data that the command will send to the host.
    ToHost,
}

/// Gives payload memory of a length of at least 1 byte, or `None`: try again later.
pub type Alloc<'a> = dyn FnMut(u32, Need) -> Option<Buffers> + 'a;

/// What comes out of the machine. Each slot that comes out must be completed once.
#[derive(Debug)]
pub enum Event {
    /// A command that can be executed.
    Command {
        /// Names the command in [`Connection::complete`].
        slot: u16,
        /// Running number of the command on its queue; adjacent commands differ by 1 (fused operations).
        seq: u32,
        /// The command.
        sqe: Sqe,
        /// Host data, or uninitialised room for data to the host; of the length of the command's SGL.
        data: Buffers,
    },
    /// A command that must be completed with this status, unexecuted: its data could not be transferred.
    Rejected {
        /// Names the command in [`Connection::complete`].
        slot: u16,
        /// Running number of the command on its queue.
        seq: u32,
        /// The command.
        sqe: Sqe,
        /// What to complete it with.
        status: Status,
    },
}

/// Why the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The host broke the protocol; a C2HTermReq is queued. Send it, then close after a while.
    Protocol(Fatal),
    /// The host terminated; close.
    Host {
        /// Its fatal error status; see [`Fes`].
        fes: u16,
        /// Its fatal error information.
        fei: u32,
    },
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Protocol(fatal) => write!(f, "protocol error of the host: {fatal}"),
            Fault::Host { fes, fei } => write!(f, "terminated by the host: FES {fes:#04x}, FEI {fei:#x}"),
        }
    }
}

impl std::error::Error for Fault {}

/// What ICReq and ICResp settled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// Header digests in both directions.
    pub header_digest: bool,
    /// Data digests in both directions.
    pub data_digest: bool,
    /// HPDA: alignment of data to the host, in dwords, 0's-based.
    pub hpda: u8,
    /// R2Ts that the host takes for one command: a count. One is used at a time.
    pub maxr2t: u64,
}

/// What the machine waits for from the peer, for the caller's timers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerDue {
    /// Nothing in particular.
    Nothing,
    /// The ICReq.
    IcReq,
    /// The rest of a PDU that has begun.
    RestOfPdu,
    /// H2CData that an R2T asked for.
    HostData,
    /// That it closes the connection.
    Close,
}

/// What became of [`Connection::abort`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbortOutcome {
    /// No such command is outstanding.
    NotFound,
    /// It has not been delivered, and will come out as [`Event::Rejected`] with Command Abort Requested.
    Undelivered,
    /// It has been delivered in this slot, and is the caller's to abort.
    Executing(u16),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    AwaitIcReq,
    Ready,
    Terminating,
    Closed,
}

/// One NVMe/TCP queue pair on the target's side. See the [module](super) for its states.
pub struct Connection {
    pub(super) config: Config,
    pub(super) phase: Phase,
    pub(super) rx: Rx,
    pub(super) incoming: Incoming,
    /// Bytes of a header or data digest that came in pieces.
    pub(super) head: [u8; MAX_HEADER_BYTES + DIGEST_BYTES],
    pub(super) have: usize,
    pub(super) rx_framing: Framing,
    pub(super) tx_framing: Framing,
    pub(super) negotiated: Negotiated,
    /// Over host data that is arriving.
    pub(super) crc: Crc32c,
    tx_crc: Crc32c,
    pub(super) slots: Slots,
    /// Slots to be delivered. Never longer than there are slots.
    pub(super) ready: VecDeque<u16>,
    /// Slots in line for memory. Never longer than there are slots.
    pub(super) waiting: VecDeque<u16>,
    pub(super) tx: Output,
    /// Most header bytes that one command can queue.
    pub(super) tx_per_command: usize,
    pub(super) r2t_bytes: u32,
    pub(super) seq: u32,
    /// The last command that came, when it is the first half of a fused operation.
    fused_first: Option<u16>,
    sq_head: u32,
    sq_entries: u32,
    sq_flow_control: bool,
    pub(super) is_io_queue: bool,
    pub(super) data_digest_errors: u64,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("phase", &self.phase)
            .field("rx", &self.rx)
            .field("incoming", &self.incoming)
            .field("outstanding", &self.slots.used())
            .field("ready", &self.ready)
            .field("waiting", &self.waiting)
            .field("r2t_bytes", &self.r2t_bytes)
            .field("output_bytes", &self.tx.pending_bytes())
            .finish_non_exhaustive()
    }
}

/// Room for ICResp and the longest C2HTermReq, beside what commands produce.
pub(super) const CONTROL_BYTES: usize = size_of::<IcResp>() + MAX_TERM_BYTES;

impl Connection {
    /// A connection on which nothing has been received.
    ///
    /// # Panics
    /// If the configuration breaks a rule that [`Config`] states.
    pub fn new(config: Config) -> Self {
        assert!(config.slots > 0 && config.slots < u16::MAX, "slots: 1 to 65534");
        assert!(config.maxh2cdata >= MIN_MAXH2CDATA && config.maxh2cdata.is_multiple_of(4), "MAXH2CDATA");
        assert!(config.cpda <= MAX_PDA, "CPDA: 0 to 31");
        assert!(config.max_io_bytes > 0 && config.max_io_bytes <= 1 << 30, "longest data: 1 byte to 1 GiB");
        let depth = usize::from(config.slots);
        Self {
            config,
            phase: Phase::AwaitIcReq,
            rx: Rx::Header,
            incoming: Incoming::default(),
            head: [0; MAX_HEADER_BYTES + DIGEST_BYTES],
            have: 0,
            rx_framing: Framing::default(),
            tx_framing: Framing::default(),
            negotiated: Negotiated::default(),
            crc: Crc32c::new(),
            tx_crc: Crc32c::new(),
            slots: Slots::new(config.slots),
            ready: VecDeque::with_capacity(depth),
            waiting: VecDeque::with_capacity(depth),
            tx: Output::new(CONTROL_BYTES),
            tx_per_command: 0,
            r2t_bytes: 0,
            seq: 0,
            fused_first: None,
            sq_head: 0,
            sq_entries: u32::from(config.slots),
            sq_flow_control: true,
            is_io_queue: false,
            data_digest_errors: 0,
        }
    }

    /// Tells the machine what Connect settled; to be called before the Connect command is completed.
    ///
    /// `entries` is the size of the submission queue (a count), and SQHD in completions wraps there. Without SQ flow
    /// control SQHD stays as the caller of [`complete`](Self::complete) set it, and successful reads need no response.
    pub fn set_queue(&mut self, entries: u32, sq_flow_control: bool, is_io_queue: bool) {
        assert!(entries > 0, "a queue has entries");
        self.sq_entries = entries;
        self.sq_head %= entries;
        self.sq_flow_control = sq_flow_control;
        self.is_io_queue = is_io_queue;
    }

    /// What the initialisation settled; `None` before it.
    pub fn negotiated(&self) -> Option<Negotiated> {
        (self.phase != Phase::AwaitIcReq).then_some(self.negotiated)
    }

    /// The next command. `None` if there is none now.
    #[inline]
    pub fn poll_event(&mut self) -> Option<Event> {
        if self.phase != Phase::Ready {
            return None;
        }
        let index = self.ready.pop_front()?;
        let slot = &mut self.slots[index];
        debug_assert_eq!(slot.state, SlotState::Ready);
        slot.state = SlotState::Executing;
        Some(if slot.verdict == Status::SUCCESS {
            Event::Command { slot: index, seq: slot.seq, sqe: slot.sqe, data: std::mem::take(&mut slot.data) }
        } else {
            // The data of a command that will not be executed goes home by itself.
            slot.data = Buffers::new();
            Event::Rejected { slot: index, seq: slot.seq, sqe: slot.sqe, status: slot.verdict }
        })
    }

    /// Completes a delivered command. CID and (with SQ flow control) SQHD of `cqe` are filled in here.
    ///
    /// `data` is what goes to the host; it is sent only with a successful status, and must not be longer than the
    /// buffers that came with the command. After the end of the connection this only frees the slot.
    ///
    /// # Panics
    /// If the slot has no delivered command, or the data is too long or goes the wrong way.
    pub fn complete(&mut self, slot: u16, cqe: Cqe, data: Option<Buffers>) {
        let (cid, room) = match self.slots.get(slot) {
            Some(s) if s.state == SlotState::Executing => match s.plan {
                Plan::ToHost { len } if s.verdict == Status::SUCCESS => (s.cid, len as usize),
                _ => (s.cid, 0),
            },
            _ => panic!("slot {slot} has no delivered command"),
        };
        self.slots.release(slot);
        if self.phase != Phase::Ready {
            return;
        }
        let mut cqe = cqe;
        cqe.cid = U16::new(cid);
        self.sq_head += 1;
        if self.sq_head >= self.sq_entries {
            self.sq_head = 0;
        }
        if self.sq_flow_control {
            cqe.sqhd = U16::new(self.sq_head as u16);
        }
        let data = data.filter(|data| !data.is_empty() && cqe.status().is_success());
        if let Some(data) = data {
            assert!(data.len() <= room, "{} bytes for a host that expects {room}", data.len());
            // TCP 3.3.2.2: the response may be left out if it says nothing that the host does not know.
            let implied = !self.sq_flow_control && cqe.result() == 0 && cqe.status_field.get() == 0;
            self.push_c2h_data(cid, data, implied);
            if implied {
                return;
            }
        }
        let (ch, _) = self.tx_framing.header(PduType::CapsuleResp, 0, 0);
        self.push_header(CapsuleResp { ch, cqe }.as_bytes());
    }

    fn push_c2h_data(&mut self, cid: u16, data: Buffers, success: bool) {
        let len = data.len() as u32;
        let pdu_flags = flags::LAST_PDU | if success { flags::SUCCESS } else { 0 };
        let (ch, layout) = self.tx_framing.header(PduType::C2hData, pdu_flags, len);
        self.push_header(DataPdu::new(ch, cid, 0, 0, len).as_bytes());
        if layout.pad_bytes > 0 {
            self.tx.push(&[0; MAX_HEADER_BYTES][..layout.pad_bytes]);
        }
        let digest = layout.data_digest.then(|| {
            for segment in data.segments() {
                self.tx_crc.update(segment);
            }
            self.tx_crc.finish()
        });
        self.tx.push_data(data);
        if let Some(digest) = digest {
            self.tx.push(&digest);
        }
    }

    /// Queues a header, with its digest if there is one.
    #[inline]
    fn push_header(&mut self, header: &[u8]) {
        self.tx.push(header);
        if self.tx_framing.header_digest {
            self.tx.push(&crc32c(header));
        }
    }

    pub(super) fn push_r2t(&mut self, slot: u16, cid: u16, len: u32) {
        let (ch, _) = self.tx_framing.header(PduType::R2t, 0, 0);
        self.push_header(R2t::new(ch, cid, slot, 0, len).as_bytes());
    }

    /// Applies what ICReq asked for and answers it.
    pub(super) fn initialize(&mut self, negotiated: Negotiated) {
        self.negotiated = negotiated;
        self.phase = Phase::Ready;
        let Negotiated { header_digest, data_digest, hpda, .. } = negotiated;
        self.rx_framing = Framing { header_digest, data_digest, pda: self.config.cpda };
        self.tx_framing = Framing { header_digest, data_digest, pda: hpda };
        self.tx_per_command = header_bytes_per_command(header_digest, data_digest, hpda);
        self.tx.reserve(ring_bytes(self.slots.len(), self.tx_per_command), self.slots.len() + 2);

        let mut resp = IcResp::new_zeroed();
        resp.ch = CommonHeader::bare(PduType::IcResp);
        resp.cpda = self.config.cpda;
        resp.dgst = if negotiated.header_digest { dgst::HEADER } else { 0 }
            | if negotiated.data_digest { dgst::DATA } else { 0 };
        resp.maxh2cdata = U32::new(self.config.maxh2cdata);
        self.tx.push(resp.as_bytes());
    }

    /// Fills `iov` with slices to send, in order; returns how many. Any number of their bytes may be sent.
    pub fn poll_output<'a>(&'a self, iov: &mut [IoSlice<'a>]) -> usize {
        self.tx.gather(iov)
    }

    /// True if there is something to send.
    #[inline]
    pub fn wants_output(&self) -> bool {
        !self.tx.is_empty()
    }

    /// Bytes that wait to be sent.
    pub fn pending_output_bytes(&self) -> usize {
        self.tx.pending_bytes()
    }

    /// The first `bytes` of the output are sent. Payloads that have left completely are given to `free`.
    ///
    /// # Panics
    /// If that is more than there was to send.
    pub fn sent(&mut self, bytes: usize, free: &mut dyn FnMut(Buffers)) {
        self.tx.sent(bytes, free);
        if self.phase == Phase::Terminating && self.tx.is_empty() {
            self.phase = Phase::Closed;
        }
    }

    /// Ends the connection from this side with a C2HTermReq. Input is ignored from now on; commands that are executing
    /// are still to be completed.
    pub fn terminate(&mut self, fes: Fes, fei: u32) {
        self.terminate_with(fes, fei, &[]);
    }

    pub(super) fn terminate_with(&mut self, fes: Fes, fei: u32, header: &[u8]) {
        if matches!(self.phase, Phase::Terminating | Phase::Closed) {
            return;
        }
        let header = &header[..header.len().min(MAX_TERM_DATA_BYTES)];
        let mut term = TermReq::new_zeroed();
        term.ch = CommonHeader::bare(PduType::C2hTermReq);
        term.ch.plen = U32::new((size_of::<TermReq>() + header.len()) as u32);
        term.fes = U16::new(fes as u16);
        term.fei = U32::new(fei);
        self.tx.push(term.as_bytes());
        self.tx.push(header);
        self.phase = Phase::Terminating;
        self.stop_receiving();
    }

    /// Forgets every command that was not delivered.
    pub(super) fn stop_receiving(&mut self) {
        self.rx = Rx::Dead;
        self.ready.clear();
        self.waiting.clear();
        self.fused_first = None;
        self.r2t_bytes = 0;
        for slot in self.slots.iter_mut() {
            if slot.state != SlotState::Executing {
                slot.data = Buffers::new();
            }
        }
        for index in 0..self.slots.len() as u16 {
            if !matches!(self.slots[index].state, SlotState::Free | SlotState::Executing) {
                self.slots.release(index);
            }
        }
    }

    /// Forgets all output and everything received, and gives the payloads that were queued to `free`: the stream is
    /// gone. Commands that are executing are still to be completed.
    pub fn close(&mut self, free: &mut dyn FnMut(Buffers)) {
        self.phase = Phase::Closed;
        self.stop_receiving();
        self.tx.clear(free);
    }

    /// True when nothing more will be received, and nothing is left to be sent.
    pub fn is_closed(&self) -> bool {
        self.phase == Phase::Closed
    }

    /// True from the first fatal error on.
    pub fn is_ending(&self) -> bool {
        matches!(self.phase, Phase::Terminating | Phase::Closed)
    }

    /// Commands that are delivered, or on their way to be.
    pub fn outstanding(&self) -> usize {
        self.slots.used()
    }

    /// True if commands or the stream wait for memory; see [`retry_alloc`](Self::retry_alloc).
    #[inline]
    pub fn stalled(&self) -> bool {
        !self.waiting.is_empty() || matches!(self.rx, Rx::Stalled)
    }

    /// False while input could not be consumed: it waits for memory, or for output to be sent.
    #[inline]
    pub fn wants_input(&self) -> bool {
        !matches!(self.rx, Rx::Stalled) && (self.phase != Phase::Ready || self.has_room_for_command())
    }

    #[inline]
    pub(super) fn has_room_for_command(&self) -> bool {
        // With no slot left another command is a mistake of the host, to be answered and not to be waited for.
        let (used, slots) = (self.slots.used(), self.slots.len());
        used == slots
            || (self.tx.room() >= (used + 1) * self.tx_per_command + MAX_TERM_BYTES && used + self.tx.items() <= slots)
    }

    /// What the peer owes.
    pub fn peer_due(&self) -> PeerDue {
        match self.phase {
            Phase::AwaitIcReq => PeerDue::IcReq,
            Phase::Terminating | Phase::Closed => PeerDue::Close,
            Phase::Ready => match self.rx {
                Rx::Header if self.have == 0 && self.r2t_bytes > 0 => PeerDue::HostData,
                Rx::Header if self.have == 0 => PeerDue::Nothing,
                Rx::Stalled => PeerDue::Nothing,
                _ => PeerDue::RestOfPdu,
            },
        }
    }

    /// Looks for a command to abort (Base 5.1.1).
    pub fn abort(&mut self, cid: u16) -> AbortOutcome {
        let Some(index) = self.slots.find(cid) else { return AbortOutcome::NotFound };
        let slot = &mut self.slots[index];
        if slot.state == SlotState::Executing {
            return AbortOutcome::Executing(index);
        }
        slot.verdict = Status::ABORT_REQUESTED;
        if slot.state == SlotState::Waiting {
            // A capsule whose data is still to be read off the stream stays; it asks for no memory any more.
            if let Some(place) = self.waiting.iter().position(|w| *w == index) {
                self.waiting.remove(place);
                self.make_ready(index);
            }
        } else if slot.state == SlotState::Ready && slot.mate == Mate::Awaited {
            // Nothing has to come behind it any more.
            slot.mate = Mate::None;
            self.fused_first = None;
            self.ready.push_back(index);
        }
        AbortOutcome::Undelivered
    }

    #[inline]
    pub(super) fn make_ready(&mut self, index: u16) {
        self.slots[index].state = SlotState::Ready;
        match self.slots[index].mate {
            Mate::None => self.ready.push_back(index),
            Mate::Awaited => {}
            Mate::Slot(other) if self.slots[other].state == SlotState::Ready => {
                let is_first = self.slots[index].seq.wrapping_add(1) == self.slots[other].seq;
                self.ready.extend(if is_first { [index, other] } else { [other, index] });
            }
            Mate::Slot(_) => {}
        }
    }

    /// Joins a command that has just come with the one before it, if they are the halves of a fused operation.
    #[inline]
    pub(super) fn join_fused(&mut self, index: u16, fuse: Fuse) {
        if let Some(first) = self.fused_first.take() {
            if fuse == Fuse::Second {
                self.slots[first].mate = Mate::Slot(index);
                self.slots[index].mate = Mate::Slot(first);
            } else {
                // It stays alone, and will be answered so.
                self.slots[first].mate = Mate::None;
                if self.slots[first].state == SlotState::Ready {
                    self.ready.push_back(first);
                }
            }
        }
        if fuse == Fuse::First && self.is_io_queue {
            self.slots[index].mate = Mate::Awaited;
            self.fused_first = Some(index);
        }
    }

    /// Gives the memory of every command that has some and was not delivered to `other`, which returns other memory with the same
    /// bytes: for a connection that changes its reactor, in the middle of a PDU perhaps. Payloads that wait to be sent are not
    /// replaced.
    ///
    /// # Panics
    /// If what comes back is not as long, or output waits.
    pub fn replace_memory(&mut self, other: &mut dyn FnMut(Buffers) -> Buffers) {
        assert!(self.tx.is_empty(), "a connection moves when everything is sent");
        for slot in self.slots.iter_mut().filter(|slot| !slot.data.is_empty()) {
            let len = slot.data.len();
            slot.data = other(std::mem::take(&mut slot.data));
            assert_eq!(slot.data.len(), len, "the same bytes");
        }
    }

    /// Data digests of the host that did not match.
    pub fn data_digest_errors(&self) -> u64 {
        self.data_digest_errors
    }
}
