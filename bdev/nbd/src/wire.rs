//! Numbers, headers and replies as bytes.
//!
//! ```text
//! greeting        NBDMAGIC(8) IHAVEOPT(8) flags(2)                     client flags(4)
//! option          IHAVEOPT(8) option(4) length(4) data
//! option reply    magic(8) option(4) type(4) length(4) data
//! request         magic(4) flags(2) type(2) cookie(8) offset(8) length(4) [data]
//! simple reply    magic(4) error(4) cookie(8) [data]
//! chunk           magic(4) flags(2) type(2) cookie(8) length(4) payload
//! ```
//! (sections "Protocol phases", "Transmission phase", "Values")

use smallvec::SmallVec;

/// First bytes of a server.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Marks newstyle, and each option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Marks a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Marks a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Marks a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Marks a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Bytes of the client's flags.
pub const CLIENT_FLAGS_BYTES: usize = 4;
/// Bytes of an option before its data.
pub const OPTION_BYTES: usize = 16;
/// Bytes of a request before its data.
pub const REQUEST_BYTES: usize = 28;

/// Handshake flags, of both sides.
pub mod handshake {
    /// The fixed newstyle protocol.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// No 124 zeroes after the answer to EXPORT_NAME.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options of the handshake.
pub mod option {
    /// Chooses the export and ends the handshake, in the old way.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the connection.
    pub const ABORT: u32 = 2;
    /// Which exports are there.
    pub const LIST: u32 = 3;
    /// Starts TLS.
    pub const STARTTLS: u32 = 5;
    /// What an export is like.
    pub const INFO: u32 = 6;
    /// The same, and ends the handshake.
    pub const GO: u32 = 7;
    /// Wants structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which metadata contexts are there.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Chooses metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Wants 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export.
    pub const SERVER: u32 = 2;
    /// One piece of information.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    const ERROR: u32 = 1 << 31;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// The option's data makes no sense here.
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    /// The client has to ask for block sizes first.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR | 8;
    /// The option's data is too long.
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
}

/// Pieces of information about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Its own name.
    pub const NAME: u16 = 1;
    /// What it is, for humans.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest, preferred and largest block.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub mod transmission {
    /// Set always.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA flag.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The DF flag.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers what was completed on all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Flags of requests.
pub mod command_flag {
    /// On stable media before the reply.
    pub const FUA: u16 = 1 << 0;
    /// Zeroes must not become a hole.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The reply to a read in one chunk.
    pub const DF: u16 = 1 << 2;
    /// One extent only.
    pub const REQ_ONE: u16 = 1 << 3;
}

/// Requests.
pub mod command {
    /// Reads.
    pub const READ: u16 = 0;
    /// Writes the data that follows.
    pub const WRITE: u16 = 1;
    /// Ends the connection.
    pub const DISC: u16 = 2;
    /// What was completed is on stable media.
    pub const FLUSH: u16 = 3;
    /// Contents may be forgotten.
    pub const TRIM: u16 = 4;
    /// Reads as zeroes afterwards.
    pub const WRITE_ZEROES: u16 = 6;
    /// Which parts are allocated.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Types of chunks.
pub mod chunk {
    /// Nothing.
    pub const NONE: u16 = 0;
    /// Data and where it belongs.
    pub const OFFSET_DATA: u16 = 1;
    /// Where there are zeroes, and how many.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of a metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// An error of the whole request.
    pub const ERROR: u16 = 1 << 15 | 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = 1 << 15 | 2;
    /// Flag: the last chunk of the reply.
    pub const DONE: u16 = 1 << 0;
}

/// Error numbers of the protocol (section "Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum NbdError {
    /// Not permitted: a write to a read-only export.
    Perm = 1,
    /// The device failed.
    Io = 5,
    /// The request makes no sense.
    Inval = 22,
    /// Past the end, or no room.
    NoSpc = 28,
    /// The device cannot do this.
    NotSup = 95,
    /// The export is going away.
    Shutdown = 108,
}

/// A request before its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Flags.
    pub flags: u16,
    /// What is wanted.
    pub command: u16,
    /// The client's mark.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

/// Takes big-endian numbers off the front of bytes.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N).map(|bytes| bytes.try_into().expect("as many as were taken"))
    }

    /// 16 bits.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// 32 bits.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// 64 bits.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A length of 32 bits and as many bytes.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.take(len as usize)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl Request {
    /// Reads a request; the magic number, where it is another, is the error.
    ///
    /// # Errors
    /// The number that stands where the magic number should.
    pub fn parse(bytes: &[u8; REQUEST_BYTES]) -> Result<Request, u32> {
        let mut reader = Reader(bytes);
        let fields = (|| {
            let (magic, flags, command) = (reader.u32()?, reader.u16()?, reader.u16()?);
            let (cookie, offset, length) = (reader.u64()?, reader.u64()?, reader.u32()?);
            Some((magic, Request { flags, command, cookie, offset, length }))
        })();
        let (magic, request) = fields.expect("a request has the bytes of its fields");
        if magic == REQUEST_MAGIC { Ok(request) } else { Err(magic) }
    }

    /// The request as bytes, for clients.
    pub fn to_bytes(self) -> [u8; REQUEST_BYTES] {
        let mut out = [0; REQUEST_BYTES];
        out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        out[4..6].copy_from_slice(&self.flags.to_be_bytes());
        out[6..8].copy_from_slice(&self.command.to_be_bytes());
        out[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        out[16..24].copy_from_slice(&self.offset.to_be_bytes());
        out[24..].copy_from_slice(&self.length.to_be_bytes());
        out
    }
}

/// The bytes of a reply before its data.
pub type Head = SmallVec<[u8; 32]>;

/// The greeting of a server.
pub fn greeting() -> Head {
    let flags = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
    let mut out = Head::new();
    out.extend_from_slice(&NBDMAGIC.to_be_bytes());
    out.extend_from_slice(&IHAVEOPT.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out
}

/// One reply to an option.
pub fn option_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

/// A simple reply; `None` is success.
pub fn simple_reply(cookie: u64, error: Option<NbdError>) -> Head {
    let mut out = Head::new();
    out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&error.map_or(0, |error| error as u32).to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out
}

/// The header of a chunk whose payload has `length` bytes.
pub fn chunk_head(cookie: u64, done: bool, kind: u16, length: u32) -> Head {
    let mut out = Head::new();
    out.extend_from_slice(&CHUNK_MAGIC.to_be_bytes());
    out.extend_from_slice(&(if done { chunk::DONE } else { 0 }).to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
    out
}

/// The chunk that says an error, of the whole request or at `offset`.
pub fn error_chunk(cookie: u64, done: bool, error: NbdError, text: &str, offset: Option<u64>) -> Head {
    let kind = if offset.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR };
    let length = 6 + text.len() as u32 + if offset.is_some() { 8 } else { 0 };
    let mut out = chunk_head(cookie, done, kind, length);
    out.extend_from_slice(&(error as u32).to_be_bytes());
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
    if let Some(offset) = offset {
        out.extend_from_slice(&offset.to_be_bytes());
    }
    out
}
