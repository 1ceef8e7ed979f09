//! The protocol machine of one connection. It does no I/O: bytes go in, operations and bytes come out.
//!
//! ```text
//! ClientFlags -> Option <-> OptionData | OptionSkip        (one answer at a time)
//!                  | EXPORT_NAME, GO
//!                  v
//!               Request -> Read    pieces are handed out as memory comes
//!                       -> Write   pieces are handed out as their data comes
//!                       -> Skip    the data of a write that was refused
//!                  | DISC, end of stream, fault
//!                  v
//!                Ended             what is outstanding is answered, nothing more is read
//! ```
//!
//! # Pieces
//! Reads and writes of more than [`PIECE_BYTES`] become several operations, so that a large one needs no more memory at
//! once than there is and never holds some of it while it waits for more. A read that must be answered in one piece (a
//! simple reply, or DF) is one operation, whose memory comes all at once. The protocol promises no atomicity for any size.
//!
//! # Bounds
//! [`MAX_REQUESTS`] requests are outstanding at most; a request keeps its slot until its last reply has been sent.
//! Payloads of a connection take [`WINDOW_BYTES`] at most, or one request, if that is larger. Beyond either nothing more is
//! read from the socket.
//!
//! # What is acknowledged
//! A write is answered with success when all of its pieces were; with FUA each is on stable media then. A TRIM with FUA is
//! followed by a flush. Zero-length requests, misaligned ones and ones with flags that were not offered are EINVAL.

use std::collections::VecDeque;
use std::io::IoSlice;

use bdev::core::{IoStatus, Op};
use reactor::Buffers;

pub use crate::errors::Fault;
use crate::errors::{error_of, error_text};
use crate::negotiation::{self, Agreed, BASE_ALLOCATION_ID, Facts, Next};
use crate::output::Output;
use crate::wire::{
    self, CLIENT_FLAGS_BYTES, Head, IHAVEOPT, NbdError, OPTION_BYTES, REQUEST_BYTES, Reader, Request, chunk, command,
    command_flag, handshake, option, option_reply, reply,
};

/// Requests of a connection that may be outstanding.
pub const MAX_REQUESTS: u16 = 128;
/// Bytes of one operation, where a request may be cut.
pub const PIECE_BYTES: u32 = 128 * 1024;
/// Bytes of payload that a connection holds.
pub const WINDOW_BYTES: usize = 8 * 1024 * 1024;
/// The most that one read or write may move, whatever the export allows.
pub const MAX_REQUEST_BYTES: u32 = 32 * 1024 * 1024;
/// Bytes of an option's data that are looked at.
const MAX_OPTION_BYTES: u32 = 64 * 1024;
/// Bytes of an option's data that are passed over; more end the connection.
const MAX_SKIPPED_BYTES: u32 = 1024 * 1024;

/// Memory of a length, or `None` when it has to be waited for.
pub type Alloc<'a> = &'a mut dyn FnMut(usize) -> Option<Buffers>;

/// An operation for the export's channel.
#[derive(Debug)]
pub struct Operation {
    /// For [`Connection::complete`].
    pub tag: u32,
    /// What to do.
    pub op: Op,
    /// First block.
    pub lba: u64,
    /// Blocks.
    pub blocks: u64,
    /// Payload.
    pub bufs: Buffers,
}

#[derive(Debug)]
enum State {
    ClientFlags,
    Option,
    OptionData {
        option: u32,
        data: Vec<u8>,
        left: u32,
    },
    OptionSkip {
        option: u32,
        left: u32,
    },
    Request,
    /// `left` bytes have no memory yet; `next` is the piece that they begin with.
    Read {
        slot: u16,
        next: u16,
        left: u32,
    },
    /// `left` bytes are in no piece yet; `filled` bytes of `piece`, the one with number `next`, have arrived. An empty piece
    /// waits for memory.
    Write {
        slot: u16,
        next: u16,
        left: u32,
        piece: Buffers,
        filled: usize,
    },
    Skip {
        slot: u16,
        left: u32,
    },
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read { whole: bool },
    Write,
    Trim { then_flush: bool },
    Other,
}

/// A request that is outstanding.
#[derive(Clone, Copy, Debug)]
struct Slot {
    cookie: u64,
    offset: u64,
    kind: Kind,
    fua: bool,
    /// Operations in the bdev layer.
    outstanding: u32,
    /// There will be no more of them.
    issued: bool,
    error: Option<NbdError>,
}

/// The machine.
#[derive(Debug)]
pub struct Connection {
    facts: Facts,
    agreed: Agreed,
    state: State,
    /// The fixed part of what comes next, as far as it has arrived.
    header: [u8; REQUEST_BYTES],
    header_len: usize,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Operations that have not come back.
    outstanding: u32,
    window: usize,
    operations: VecDeque<Operation>,
    output: Output,
    shutdown: bool,
    /// Grows with every byte that comes or goes.
    progress: u64,
}

/// Whether all bytes are zero. Ends at the first that is not, which for most data is at once.
fn is_zero(bufs: &Buffers) -> bool {
    bufs.segments().all(|segment| {
        let (words, rest) = segment.as_chunks::<64>();
        words.iter().all(|words| {
            let (words, _) = words.as_chunks::<8>();
            words.iter().fold(0, |sum, word| sum | u64::from_ne_bytes(*word)) == 0
        }) && rest.iter().all(|byte| *byte == 0)
    })
}

impl Connection {
    /// A new connection to the export of `facts`; the greeting is its first output.
    pub fn new(facts: Facts) -> Connection {
        let mut output = Output::default();
        output.push(wire::greeting(), Buffers::new(), None);
        let blank =
            Slot { cookie: 0, offset: 0, kind: Kind::Other, fua: false, outstanding: 0, issued: true, error: None };
        Connection {
            facts,
            agreed: Agreed::default(),
            state: State::ClientFlags,
            header: [0; REQUEST_BYTES],
            header_len: 0,
            slots: vec![blank; MAX_REQUESTS.into()],
            free: (0..MAX_REQUESTS).rev().collect(),
            outstanding: 0,
            window: 0,
            operations: VecDeque::new(),
            output,
            shutdown: false,
            progress: 0,
        }
    }

    /// The size of the export as of now, in bytes.
    #[inline]
    pub fn set_size(&mut self, size: u64) {
        self.facts.size = size;
    }

    /// Whether no export has been chosen yet.
    pub fn is_negotiating(&self) -> bool {
        matches!(self.state, State::ClientFlags | State::Option | State::OptionData { .. } | State::OptionSkip { .. })
    }

    /// Whether the machine would take bytes now.
    #[inline]
    pub fn wants_input(&self) -> bool {
        match &self.state {
            State::Request => !self.free.is_empty(),
            State::Write { piece, .. } => !piece.is_empty(),
            State::Skip { .. } => true,
            State::Read { .. } | State::Ended => false,
            _ => self.output.is_empty(),
        }
    }

    /// Bytes of memory without which the machine does not go on. `None` when it waits for none, or has as much as it may
    /// have.
    #[inline]
    pub fn wants_memory(&self) -> Option<usize> {
        let wanted = match &self.state {
            State::Read { slot, left, .. } => self.read_piece(*slot, *left),
            State::Write { left, piece, .. } if piece.is_empty() => (*left).min(PIECE_BYTES) as usize,
            _ => return None,
        };
        (self.window == 0 || self.window + wanted <= WINDOW_BYTES).then_some(wanted)
    }

    fn read_piece(&self, slot: u16, left: u32) -> usize {
        match self.slots[slot as usize].kind {
            Kind::Read { whole: true } => left as usize,
            _ => left.min(PIECE_BYTES) as usize,
        }
    }

    /// Whether the client owes something: the rest of what it began, or to read what was sent.
    pub fn peer_owes(&self) -> bool {
        let input = match &self.state {
            State::Request => self.header_len > 0,
            State::Write { piece, .. } => !piece.is_empty(),
            State::Skip { .. } => true,
            _ => false,
        };
        input || !self.output.is_empty()
    }

    /// A number that changes whenever bytes came or went.
    pub fn progress(&self) -> u64 {
        self.progress
    }

    /// Whether everything is answered and sent, and nothing more will be.
    pub fn is_over(&self) -> bool {
        let ending = self.shutdown || matches!(self.state, State::Ended);
        ending && self.outstanding == 0 && self.operations.is_empty() && self.output.is_empty()
    }

    // ---- input -----------------------------------------------------------------------------------------------------

    /// Takes bytes, or none to go on after waiting; returns how many it took.
    ///
    /// # Errors
    /// [`Fault`]: the connection is over.
    pub fn handle_input(&mut self, bytes: &[u8], alloc: Alloc<'_>) -> Result<usize, Fault> {
        let mut input = bytes;
        loop {
            let before = input.len();
            let went_on = self.step(&mut input, alloc)?;
            self.progress += (before - input.len()) as u64;
            if !went_on {
                return Ok(bytes.len() - input.len());
            }
        }
    }

    /// One step; `false` when it needs more than it has.
    fn step(&mut self, input: &mut &[u8], alloc: Alloc<'_>) -> Result<bool, Fault> {
        if self.wants_memory().is_some() {
            return Ok(self.feed_memory(alloc));
        }
        if !self.wants_input() || input.is_empty() {
            return Ok(false);
        }
        match &mut self.state {
            State::ClientFlags => {
                if self.gather(input, CLIENT_FLAGS_BYTES) {
                    self.client_flags()?;
                }
            }
            State::Option => {
                if self.gather(input, OPTION_BYTES) {
                    self.option_header()?;
                }
            }
            State::OptionData { data, left, .. } => {
                let n = input.len().min(*left as usize);
                data.extend_from_slice(&input[..n]);
                *left -= n as u32;
                *input = &input[n..];
                self.option_if_complete()?;
            }
            State::OptionSkip { left, .. } => {
                let n = input.len().min(*left as usize);
                *left -= n as u32;
                *input = &input[n..];
                self.option_if_complete()?;
            }
            State::Request => {
                if self.gather(input, REQUEST_BYTES) {
                    self.request()?;
                }
            }
            State::Write { piece, filled, .. } => {
                let place = piece.slice_at_mut(*filled);
                let n = place.len().min(input.len());
                place[..n].copy_from_slice(&input[..n]);
                *input = &input[n..];
                self.arrived(n);
            }
            State::Skip { slot, left } => {
                let n = input.len().min(*left as usize);
                *left -= n as u32;
                *input = &input[n..];
                if *left == 0 {
                    let slot = *slot;
                    self.state = State::Request;
                    self.slots[slot as usize].issued = true;
                    // Pieces that were submitted before the export ended are waited for.
                    if self.slots[slot as usize].outstanding == 0 {
                        self.answer(slot);
                    }
                }
            }
            State::Read { .. } | State::Ended => return Ok(false),
        }
        Ok(true)
    }

    /// Gathers the fixed part of what comes next; `true` when it is complete.
    fn gather(&mut self, input: &mut &[u8], want: usize) -> bool {
        let n = input.len().min(want - self.header_len);
        self.header[self.header_len..self.header_len + n].copy_from_slice(&input[..n]);
        self.header_len += n;
        *input = &input[n..];
        if self.header_len < want {
            return false;
        }
        self.header_len = 0;
        true
    }

    fn client_flags(&mut self) -> Result<(), Fault> {
        let flags = Reader(&self.header).u32().expect("the flags are complete");
        let known = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        if flags & !known != 0 {
            return Err(Fault::ClientFlags(flags));
        }
        self.agreed.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
        self.state = State::Option;
        Ok(())
    }

    fn option_header(&mut self) -> Result<(), Fault> {
        let mut reader = Reader(&self.header);
        let (magic, option, length) = (reader.u64(), reader.u32(), reader.u32());
        let (Some(magic), Some(option), Some(left)) = (magic, option, length) else {
            unreachable!("the header is complete")
        };
        if magic != IHAVEOPT {
            return Err(Fault::OptionMagic(magic));
        }
        let cannot_refuse = option == option::EXPORT_NAME && left > MAX_OPTION_BYTES;
        if left > MAX_SKIPPED_BYTES || cannot_refuse {
            return Err(Fault::OptionLength { option, length: left });
        }
        self.state = match left <= MAX_OPTION_BYTES {
            true => State::OptionData { option, data: Vec::with_capacity(left as usize), left },
            false => State::OptionSkip { option, left },
        };
        self.option_if_complete()
    }

    fn option_if_complete(&mut self) -> Result<(), Fault> {
        let mut out = Vec::new();
        let next = match &self.state {
            State::OptionData { option, data, left: 0 } => {
                negotiation::answer(&self.facts, &mut self.agreed, *option, data, &mut out)
            }
            State::OptionSkip { option, left: 0 } => {
                option_reply(&mut out, *option, reply::ERR_TOO_BIG, b"the option's data is too long");
                Next::Option
            }
            _ => return Ok(()),
        };
        self.state = match next {
            Next::Option => State::Option,
            Next::Transmission => State::Request,
            Next::Close => State::Ended,
            Next::NoSuchExport => return Err(Fault::NoSuchExport),
        };
        self.output.push(Head::from_vec(out), Buffers::new(), None);
        Ok(())
    }

    /// The rest of the place where the data of a write belongs, for receiving into it.
    #[inline]
    pub fn read_target(&mut self) -> Option<&mut [u8]> {
        match &mut self.state {
            State::Write { piece, filled, .. } if !piece.is_empty() => Some(piece.slice_at_mut(*filled)),
            _ => None,
        }
    }

    /// `n` bytes were received into [`Connection::read_target`].
    pub fn read_done(&mut self, n: usize) {
        self.progress += n as u64;
        self.arrived(n);
    }

    // ---- requests --------------------------------------------------------------------------------------------------

    fn request(&mut self) -> Result<(), Fault> {
        let request = Request::parse(&self.header).map_err(Fault::RequestMagic)?;
        if request.command == command::DISC {
            self.state = State::Ended;
            return Ok(());
        }
        let slot = self.free.pop().expect("no request is read without a slot");
        let kind = match request.command {
            command::READ => Kind::Read { whole: !self.agreed.structured || request.flags & command_flag::DF != 0 },
            command::WRITE => Kind::Write,
            command::TRIM => Kind::Trim { then_flush: request.flags & command_flag::FUA != 0 },
            _ => Kind::Other,
        };
        let fua = request.flags & command_flag::FUA != 0;
        self.slots[slot as usize] = Slot {
            cookie: request.cookie,
            offset: request.offset,
            kind,
            fua,
            outstanding: 0,
            issued: false,
            error: self.check(&request).err(),
        };
        self.begin(slot, &request);
        Ok(())
    }

    /// Whether a request can be done.
    fn check(&self, request: &Request) -> Result<(), NbdError> {
        let facts = &self.facts;
        let offered = facts.flags(self.agreed.structured);
        let has = |flag: u16| offered & flag != 0;
        use wire::transmission as t;
        // What is served, whether it changes anything, its flags besides FUA, its longest length, and the error for what
        // passes the end.
        let (served, modifies, flags, limit, past_end) = match request.command {
            command::READ if has(t::SEND_DF) => (true, false, command_flag::DF, facts.max_request, NbdError::Inval),
            command::READ => (true, false, 0, facts.max_request, NbdError::Inval),
            command::WRITE => (true, true, 0, facts.max_request, NbdError::NoSpc),
            command::FLUSH => (has(t::SEND_FLUSH), false, 0, 0, NbdError::Inval),
            command::TRIM => (facts.trim, true, 0, u32::MAX, NbdError::Inval),
            command::WRITE_ZEROES => (facts.write_zeroes, true, command_flag::NO_HOLE, u32::MAX, NbdError::NoSpc),
            command::BLOCK_STATUS => {
                (self.agreed.base_allocation, false, command_flag::REQ_ONE, u32::MAX, NbdError::Inval)
            }
            _ => return Err(NbdError::Inval),
        };
        if self.shutdown {
            return Err(NbdError::Shutdown);
        }
        if modifies && facts.read_only {
            return Err(NbdError::Perm);
        }
        // On a read-only export there is nothing that FUA could be about, but it does no harm either.
        let flags = if facts.flush { flags | command_flag::FUA } else { flags };
        if !served || request.flags & !flags != 0 {
            return Err(NbdError::Inval);
        }
        if request.command == command::FLUSH {
            return if request.offset == 0 && request.length == 0 { Ok(()) } else { Err(NbdError::Inval) };
        }
        let block = u64::from(facts.block_size);
        let length = u64::from(request.length);
        if length == 0 || request.length > limit || !(request.offset | length).is_multiple_of(block) {
            return Err(NbdError::Inval);
        }
        match request.offset.checked_add(length) {
            Some(end) if end <= facts.size => Ok(()),
            _ => Err(past_end),
        }
    }

    fn begin(&mut self, slot: u16, request: &Request) {
        let refused = self.slots[slot as usize].error.is_some();
        let left = request.length;
        match request.command {
            // The data comes whatever becomes of it.
            command::WRITE if refused && left > 0 => self.state = State::Skip { slot, left },
            _ if refused => self.answer(slot),
            command::READ => self.state = State::Read { slot, next: 0, left },
            command::WRITE => self.state = State::Write { slot, next: 0, left, piece: Buffers::new(), filled: 0 },
            command::BLOCK_STATUS => self.answer_block_status(slot, left),
            other => {
                let fua = self.slots[slot as usize].fua;
                let may_unmap = request.flags & command_flag::NO_HOLE == 0;
                let op = match other {
                    command::TRIM => Op::Unmap,
                    command::WRITE_ZEROES => Op::WriteZeroes { fua, may_unmap },
                    _ => Op::Flush,
                };
                self.slots[slot as usize].issued = true;
                self.operate(slot, 0, op, request.offset, left.into(), Buffers::new());
            }
        }
    }

    fn operate(&mut self, slot: u16, piece: u16, op: Op, offset: u64, length: u64, bufs: Buffers) {
        let block = u64::from(self.facts.block_size);
        self.slots[slot as usize].outstanding += 1;
        self.outstanding += 1;
        self.operations.push_back(Operation {
            tag: u32::from(slot) << 16 | u32::from(piece),
            op,
            lba: offset / block,
            blocks: length / block,
            bufs,
        });
    }

    /// Goes on with a read or write that waits for memory.
    fn feed_memory(&mut self, alloc: Alloc<'_>) -> bool {
        let Some(wanted) = self.wants_memory() else { return false };
        let Some(bufs) = alloc(wanted) else { return false };
        debug_assert_eq!(bufs.len(), wanted);
        self.window += wanted;
        match &mut self.state {
            State::Read { slot, next, left } => {
                let (slot, piece) = (*slot, *next);
                *left -= wanted as u32;
                *next += 1;
                if *left == 0 {
                    self.slots[slot as usize].issued = true;
                    self.state = State::Request;
                }
                self.operate(slot, piece, Op::Read, self.piece_offset(slot, piece), wanted as u64, bufs);
            }
            State::Write { left, piece, .. } => {
                *left -= wanted as u32;
                *piece = bufs;
            }
            _ => unreachable!("only reads and writes want memory"),
        }
        true
    }

    fn piece_offset(&self, slot: u16, piece: u16) -> u64 {
        self.slots[slot as usize].offset + u64::from(piece) * u64::from(PIECE_BYTES)
    }

    /// `n` bytes of the piece that is being received have arrived.
    fn arrived(&mut self, n: usize) {
        let State::Write { slot, next, left, piece, filled } = &mut self.state else { return };
        *filled += n;
        if *filled < piece.len() {
            return;
        }
        let (slot, number, bufs) = (*slot, *next, std::mem::take(piece));
        *next += 1;
        *filled = 0;
        if *left == 0 {
            self.slots[slot as usize].issued = true;
            self.state = State::Request;
        }
        let fua = self.slots[slot as usize].fua;
        let length = bufs.len() as u64;
        self.operate(slot, number, Op::Write { fua }, self.piece_offset(slot, number), length, bufs);
    }

    /// The next operation to submit.
    #[inline]
    pub fn poll_operation(&mut self) -> Option<Operation> {
        self.operations.pop_front()
    }

    // ---- completions -----------------------------------------------------------------------------------------------

    /// An operation has come back. `put` gets memory that is no longer needed.
    pub fn complete(&mut self, tag: u32, status: IoStatus, bufs: Buffers, put: &mut dyn FnMut(Buffers)) {
        let (index, piece) = ((tag >> 16) as u16, tag as u16);
        self.outstanding -= 1;
        let slot = &mut self.slots[index as usize];
        slot.outstanding -= 1;
        let last = slot.outstanding == 0 && slot.issued;
        let error = (!status.is_success()).then(|| error_of(status));
        if let Kind::Read { whole } = slot.kind {
            return self.complete_read(index, piece, whole, last, error, bufs, put);
        }
        self.window -= bufs.len();
        put(bufs);
        slot.error = slot.error.or(error);
        if !last {
            return;
        }
        if slot.kind == (Kind::Trim { then_flush: true }) && slot.error.is_none() {
            slot.kind = Kind::Other;
            return self.operate(index, 0, Op::Flush, 0, 0, Buffers::new());
        }
        self.answer(index);
    }

    #[allow(clippy::too_many_arguments, reason = "the parts of one completion")]
    fn complete_read(
        &mut self,
        index: u16,
        piece: u16,
        whole: bool,
        last: bool,
        error: Option<NbdError>,
        bufs: Buffers,
        put: &mut dyn FnMut(Buffers),
    ) {
        let Slot { cookie, .. } = self.slots[index as usize];
        let offset = self.piece_offset(index, piece);
        let ends = last.then_some(index);
        if let Some(error) = error {
            self.window -= bufs.len();
            put(bufs);
            let head = match self.agreed.structured {
                true => wire::error_chunk(cookie, last, error, error_text(error), Some(offset)),
                false => wire::simple_reply(cookie, Some(error)),
            };
            return self.output.push(head, Buffers::new(), ends);
        }
        if !self.agreed.structured {
            return self.output.push(wire::simple_reply(cookie, None), bufs, ends);
        }
        // A reply in one chunk (DF) may be a hole too, but some clients that ask for it want to see data.
        if !whole && is_zero(&bufs) {
            let mut head = wire::chunk_head(cookie, last, chunk::OFFSET_HOLE, 12);
            head.extend_from_slice(&offset.to_be_bytes());
            head.extend_from_slice(&(bufs.len() as u32).to_be_bytes());
            self.window -= bufs.len();
            put(bufs);
            return self.output.push(head, Buffers::new(), ends);
        }
        let mut head = wire::chunk_head(cookie, last, chunk::OFFSET_DATA, 8 + bufs.len() as u32);
        head.extend_from_slice(&offset.to_be_bytes());
        self.output.push(head, bufs, ends);
    }

    /// Answers a request of which nothing is outstanding, and which has no data to answer with.
    fn answer(&mut self, index: u16) {
        let Slot { cookie, error, kind, .. } = self.slots[index as usize];
        let head = match error {
            Some(error) if self.agreed.structured => wire::error_chunk(cookie, true, error, error_text(error), None),
            // A read whose every piece was answered, cut short by the end of the export's service.
            None if matches!(kind, Kind::Read { .. }) => wire::chunk_head(cookie, true, chunk::NONE, 0),
            error => wire::simple_reply(cookie, error),
        };
        self.output.push(head, Buffers::new(), Some(index));
    }

    /// No device says what is allocated, so all of it is: data, in the words of `base:allocation`.
    fn answer_block_status(&mut self, index: u16, length: u32) {
        let cookie = self.slots[index as usize].cookie;
        let mut head = wire::chunk_head(cookie, true, chunk::BLOCK_STATUS, 12);
        head.extend_from_slice(&BASE_ALLOCATION_ID.to_be_bytes());
        head.extend_from_slice(&length.to_be_bytes());
        head.extend_from_slice(&0u32.to_be_bytes());
        self.output.push(head, Buffers::new(), Some(index));
    }

    // ---- output ----------------------------------------------------------------------------------------------------

    /// Whether there is something to send.
    #[inline]
    pub fn wants_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Bytes that wait to be sent.
    #[inline]
    pub fn output_bytes(&self) -> usize {
        self.output.bytes()
    }

    /// Fills `out` with what to send next; returns how many slices were filled.
    pub fn poll_output<'a>(&'a self, out: &mut [IoSlice<'a>]) -> usize {
        self.output.gather(out)
    }

    /// `n` bytes of the output were sent.
    pub fn sent(&mut self, n: usize, put: &mut dyn FnMut(Buffers)) {
        self.progress += n as u64;
        let (free, window) = (&mut self.free, &mut self.window);
        self.output.advance(n, |data, ends| {
            *window -= data.len();
            put(data);
            free.extend(ends);
        });
    }

    // ---- the end ---------------------------------------------------------------------------------------------------

    /// The client sends no more. What it left unfinished is forgotten, what is outstanding is answered.
    pub fn end_of_input(&mut self, put: &mut dyn FnMut(Buffers)) {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Write { slot, piece, .. } => {
                self.window -= piece.len();
                put(piece);
                // Its pieces still come back, and nobody is told.
                self.slots[slot as usize].issued = false;
            }
            State::Read { slot, .. } => self.cut_read(slot),
            _ => {}
        }
    }

    /// The export ends: what is outstanding is answered, what comes from now on is refused.
    pub fn shut_down(&mut self, put: &mut dyn FnMut(Buffers)) {
        self.shutdown = true;
        if self.is_negotiating() {
            self.state = State::Ended;
            return;
        }
        match &mut self.state {
            State::Write { slot, left, piece, filled, .. } => {
                let (slot, left) = (*slot, *left + (piece.len() - *filled) as u32);
                let piece = std::mem::take(piece);
                self.window -= piece.len();
                put(piece);
                self.slots[slot as usize].error = Some(NbdError::Shutdown);
                self.state = State::Skip { slot, left };
            }
            State::Read { slot, .. } => {
                let slot = *slot;
                self.state = State::Request;
                self.cut_read(slot);
            }
            _ => {}
        }
    }

    /// A read that still waited for memory gets no more of it: what has no memory is an error.
    fn cut_read(&mut self, slot: u16) {
        let entry = &mut self.slots[slot as usize];
        entry.issued = true;
        if entry.outstanding == 0 {
            entry.error = Some(NbdError::Shutdown);
            return self.answer(slot);
        }
        let (cookie, error) = (entry.cookie, NbdError::Shutdown);
        // Only a structured reply has pieces, and so something outstanding while more is to come.
        let head = wire::error_chunk(cookie, false, error, error_text(error), None);
        self.output.push(head, Buffers::new(), None);
    }

    /// The connection is gone: `put` gets what it holds. Operations that are outstanding still come back.
    pub fn close(&mut self, put: &mut dyn FnMut(Buffers)) {
        if let State::Write { piece, .. } = std::mem::replace(&mut self.state, State::Ended) {
            put(piece);
        }
        self.operations.drain(..).for_each(|operation| put(operation.bufs));
        self.output.clear(put);
    }
}
