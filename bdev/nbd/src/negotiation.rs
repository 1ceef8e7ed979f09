//! Options of the handshake: what the client asks for, and the answers.
//!
//! One socket serves one export. It answers to its own name and to the empty one, which is the default export.
//!
//! | option | answer |
//! |---|---|
//! | EXPORT_NAME | size and flags, and the transmission begins; another name ends the connection, as the section says |
//! | ABORT | ACK, and the end |
//! | LIST | the one export |
//! | STARTTLS, EXTENDED_HEADERS, unknown | ERR_UNSUP |
//! | INFO, GO | EXPORT and BLOCK_SIZE always, NAME and DESCRIPTION when asked for |
//! | STRUCTURED_REPLY | ACK, once |
//! | LIST_META_CONTEXT, SET_META_CONTEXT | `base:allocation` |
//!
//! GO without BLOCK_SIZE for an export whose blocks have more than 512 bytes is refused with ERR_BLOCK_SIZE_REQD: a
//! client that does not know the block size takes 512 for safe (section "Block size constraints").

use std::sync::Arc;

use crate::wire::{Reader, info, option, option_reply, reply, transmission};

/// The block size that clients take for safe when they were told none.
const SAFE_BLOCK: u32 = 512;
/// The one metadata context.
const BASE_ALLOCATION: &[u8] = b"base:allocation";
/// Its identifier on a connection.
pub const BASE_ALLOCATION_ID: u32 = 1;

/// What an export is, as clients are told.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Its name.
    pub name: Arc<str>,
    /// What it is, for humans.
    pub description: Arc<str>,
    /// Bytes.
    pub size: u64,
    /// Bytes of a block: requests are multiples of it.
    pub block_size: u32,
    /// Bytes of the block that is best: a power of two.
    pub preferred: u32,
    /// Bytes that one read or write may move: a power of two.
    pub max_request: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// The device flushes, or has nothing to flush.
    pub flush: bool,
    /// The device unmaps.
    pub trim: bool,
    /// The device, or the layer above it, zeroes.
    pub write_zeroes: bool,
}

impl Facts {
    /// The transmission flags.
    pub fn flags(&self, structured: bool) -> u16 {
        use transmission as t;
        let writes = !self.read_only;
        // A flush reaches the device, whichever connection and reactor it comes from.
        let mut flags = t::HAS_FLAGS | t::CAN_MULTI_CONN;
        for (can, flag) in [
            (self.read_only, t::READ_ONLY),
            (self.flush, t::SEND_FLUSH),
            (self.flush && writes, t::SEND_FUA),
            (self.trim && writes, t::SEND_TRIM),
            (self.write_zeroes && writes, t::SEND_WRITE_ZEROES),
            (structured, t::SEND_DF),
        ] {
            if can {
                flags |= flag;
            }
        }
        flags
    }

    fn answers_to(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }
}

/// What was agreed on so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// The client does not want the 124 zeroes.
    pub no_zeroes: bool,
    /// Reads are answered in chunks.
    pub structured: bool,
    /// The client may ask for the status of blocks.
    pub base_allocation: bool,
}

/// What comes after an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another option.
    Option,
    /// Requests.
    Transmission,
    /// The end, once the answer has been sent.
    Close,
    /// The end at once: there is no answer to an EXPORT_NAME that names nothing.
    NoSuchExport,
}

/// Answers an option.
pub fn answer(facts: &Facts, agreed: &mut Agreed, opt: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
    let mut say = |kind: u32, data: &[u8]| option_reply(out, opt, kind, data);
    match opt {
        option::EXPORT_NAME => return export_name(facts, *agreed, data, out),
        option::ABORT => {
            say(reply::ACK, &[]);
            return Next::Close;
        }
        option::LIST if !data.is_empty() => say(reply::ERR_INVALID, b"this option has no data"),
        option::LIST => {
            let mut entry = (facts.name.len() as u32).to_be_bytes().to_vec();
            entry.extend_from_slice(facts.name.as_bytes());
            entry.extend_from_slice(facts.description.as_bytes());
            say(reply::SERVER, &entry);
            say(reply::ACK, &[]);
        }
        option::INFO | option::GO => return info_or_go(facts, *agreed, opt, data, out),
        option::STRUCTURED_REPLY if !data.is_empty() => say(reply::ERR_INVALID, b"this option has no data"),
        option::STRUCTURED_REPLY if agreed.structured => {
            say(reply::ERR_INVALID, b"structured replies have been agreed on already");
        }
        option::STRUCTURED_REPLY => {
            agreed.structured = true;
            say(reply::ACK, &[]);
        }
        option::LIST_META_CONTEXT | option::SET_META_CONTEXT => meta_context(facts, agreed, opt, data, out),
        option::STARTTLS => say(reply::ERR_UNSUP, b"TLS is not served on Unix sockets"),
        _ => say(reply::ERR_UNSUP, b"this option is not served"),
    }
    Next::Option
}

fn export_name(facts: &Facts, agreed: Agreed, name: &[u8], out: &mut Vec<u8>) -> Next {
    if !facts.answers_to(name) {
        return Next::NoSuchExport;
    }
    out.extend_from_slice(&facts.size.to_be_bytes());
    out.extend_from_slice(&facts.flags(agreed.structured).to_be_bytes());
    if !agreed.no_zeroes {
        out.extend_from_slice(&[0; 124]);
    }
    Next::Transmission
}

fn parse_info(data: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let mut reader = Reader(data);
    let name = reader.string()?;
    let count = reader.u16()?;
    let wanted: Option<Vec<u16>> = (0..count).map(|_| reader.u16()).collect();
    Some((name, wanted?)).filter(|_| reader.is_empty())
}

fn info_or_go(facts: &Facts, agreed: Agreed, opt: u32, data: &[u8], out: &mut Vec<u8>) -> Next {
    let Some((name, wanted)) = parse_info(data) else {
        option_reply(out, opt, reply::ERR_INVALID, b"the lengths in the option's data do not add up");
        return Next::Option;
    };
    if !facts.answers_to(name) {
        unknown_export(facts, opt, out);
        return Next::Option;
    }
    let piece = |out: &mut Vec<u8>, kind: u16, data: &[u8]| {
        let payload = [&kind.to_be_bytes()[..], data].concat();
        option_reply(out, opt, reply::INFO, &payload);
    };
    let sizes = [facts.block_size, facts.preferred, facts.max_request].map(u32::to_be_bytes).concat();
    piece(out, info::BLOCK_SIZE, &sizes);
    if opt == option::GO && facts.block_size > SAFE_BLOCK && !wanted.contains(&info::BLOCK_SIZE) {
        option_reply(out, opt, reply::ERR_BLOCK_SIZE_REQD, b"ask for the block sizes and obey them");
        return Next::Option;
    }
    if wanted.contains(&info::NAME) {
        piece(out, info::NAME, facts.name.as_bytes());
    }
    if wanted.contains(&info::DESCRIPTION) {
        piece(out, info::DESCRIPTION, facts.description.as_bytes());
    }
    let export = [&facts.size.to_be_bytes()[..], &facts.flags(agreed.structured).to_be_bytes()].concat();
    piece(out, info::EXPORT, &export);
    option_reply(out, opt, reply::ACK, &[]);
    if opt == option::GO { Next::Transmission } else { Next::Option }
}

fn unknown_export(facts: &Facts, opt: u32, out: &mut Vec<u8>) {
    let text = format!("this socket serves '{}' only", facts.name);
    option_reply(out, opt, reply::ERR_UNKNOWN, text.as_bytes());
}

fn parse_queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let mut reader = Reader(data);
    let name = reader.string()?;
    let count = reader.u32()?;
    // Each takes four bytes at least, so the data bounds them.
    let queries: Option<Vec<&[u8]>> = (0..count).map(|_| reader.string()).collect();
    Some((name, queries?)).filter(|_| reader.is_empty())
}

fn meta_context(facts: &Facts, agreed: &mut Agreed, opt: u32, data: &[u8], out: &mut Vec<u8>) {
    let sets = opt == option::SET_META_CONTEXT;
    if sets {
        // Whatever becomes of this one, it ends what an earlier one chose.
        agreed.base_allocation = false;
    }
    if !agreed.structured {
        return option_reply(out, opt, reply::ERR_INVALID, b"agree on structured replies first");
    }
    let Some((name, queries)) = parse_queries(data) else {
        return option_reply(out, opt, reply::ERR_INVALID, b"the lengths in the option's data do not add up");
    };
    if !facts.answers_to(name) {
        return unknown_export(facts, opt, out);
    }
    // A namespace alone lists what is in it, and chooses nothing.
    let listed = !sets && (queries.is_empty() || queries.contains(&&b"base:"[..]));
    if listed || queries.contains(&BASE_ALLOCATION) {
        let id = if sets { BASE_ALLOCATION_ID } else { 0 };
        option_reply(out, opt, reply::META_CONTEXT, &[&id.to_be_bytes()[..], BASE_ALLOCATION].concat());
        agreed.base_allocation |= sets;
    }
    option_reply(out, opt, reply::ACK, &[]);
}
