//! The protocol machine against bytes.

mod malformed;
mod options;
mod properties;
mod requests;
mod waiting;

use std::io::IoSlice;

use bdev::core::{IoStatus, Op};
use reactor::Buffers;

use crate::connection::{Connection, Fault, Operation};
use crate::negotiation::Facts;
use crate::wire::{self, IHAVEOPT, OPTION_REPLY_MAGIC, Request, command, option};

pub const SIZE: u64 = 4 << 20;
pub const BLOCK: u32 = 512;

pub fn facts() -> Facts {
    Facts {
        name: "vol".into(),
        description: "Test disk".into(),
        size: SIZE,
        block_size: BLOCK,
        preferred: 4096,
        max_request: 1 << 20,
        read_only: false,
        flush: true,
        trim: true,
        write_zeroes: true,
    }
}

/// A connection to a disk in memory, whose operations end when they are told to.
pub struct Bench {
    pub connection: Connection,
    pub disk: Vec<u8>,
    /// Operations that have not ended.
    pub held: Vec<Operation>,
    /// Operations that have ended, in order.
    pub log: Vec<(Op, u64, u64)>,
    /// Bytes of memory lent and not given back.
    pub lent: usize,
    /// Bytes of memory that there are.
    pub memory: usize,
    /// Ends operations by itself.
    pub eager: bool,
}

impl Bench {
    pub fn new(facts: Facts) -> Bench {
        Bench {
            disk: vec![0; facts.size as usize],
            connection: Connection::new(facts),
            held: Vec::new(),
            log: Vec::new(),
            lent: 0,
            memory: usize::MAX,
            eager: true,
        }
    }

    /// A bench whose handshake is done, with structured replies or without.
    pub fn ready(facts: Facts, structured: bool) -> Bench {
        let mut bench = Bench::new(facts);
        bench.exchange(&3u32.to_be_bytes());
        if structured {
            bench.exchange(&opt(option::STRUCTURED_REPLY, &[]));
            bench.exchange(&opt(option::SET_META_CONTEXT, &context_data("", &["base:allocation"])));
        }
        bench.exchange(&opt(option::GO, &go_data("", &[3])));
        assert!(!bench.connection.is_negotiating());
        bench
    }

    /// Feeds bytes as far as the machine takes them. Returns how many it took.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<usize, Fault> {
        let (lent, memory) = (&mut self.lent, self.memory);
        let taken = self.connection.handle_input(bytes, &mut |len| {
            (*lent + len <= memory).then(|| {
                *lent += len;
                Buffers::heap(len)
            })
        });
        while let Some(operation) = self.connection.poll_operation() {
            self.held.push(operation);
        }
        taken
    }

    /// Ends the operation at `at` among those held.
    pub fn finish(&mut self, at: usize, status: IoStatus) {
        let mut operation = self.held.remove(at);
        let Operation { tag, op, lba, blocks, .. } = operation;
        if status.is_success() {
            let (from, len) = ((lba * u64::from(BLOCK)) as usize, (blocks * u64::from(BLOCK)) as usize);
            match op {
                Op::Read => operation.bufs.write_at(0, &self.disk[from..from + len]),
                Op::Write { .. } => operation.bufs.read_at(0, &mut self.disk[from..from + len]),
                Op::WriteZeroes { .. } => self.disk[from..from + len].fill(0),
                _ => {}
            }
        }
        self.log.push((op, lba, blocks));
        let lent = &mut self.lent;
        self.connection.complete(tag, status, operation.bufs, &mut |bufs| *lent -= bufs.len());
        while let Some(operation) = self.connection.poll_operation() {
            self.held.push(operation);
        }
    }

    /// Takes all of the output.
    pub fn output(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        while self.connection.wants_output() {
            let mut slices = [IoSlice::new(&[]); 3];
            let count = self.connection.poll_output(&mut slices);
            // One byte less than offered, so that every cut occurs.
            let offered: usize = slices[..count].iter().map(|slice| slice.len()).sum();
            let take = if offered > 1 { offered - 1 } else { offered };
            let all: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.iter().copied()).collect();
            out.extend_from_slice(&all[..take]);
            let lent = &mut self.lent;
            self.connection.sent(take, &mut |bufs| *lent -= bufs.len());
        }
        out
    }

    /// Feeds all of `bytes`, ends what comes of it, and takes the output.
    #[track_caller]
    pub fn exchange(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = self.output();
        let mut rest = bytes;
        loop {
            let taken = self.feed(rest).expect("the bytes obey the rules");
            rest = &rest[taken..];
            let idle = taken == 0 && self.held.is_empty();
            while self.eager && !self.held.is_empty() {
                self.finish(0, IoStatus::Success);
            }
            let sent = self.output();
            if idle && sent.is_empty() {
                break;
            }
            out.extend(sent);
            if !self.eager {
                break;
            }
        }
        assert!(rest.is_empty() || !self.eager, "{} bytes were not taken", rest.len());
        out
    }

    #[track_caller]
    pub fn fault(&mut self, bytes: &[u8]) -> Fault {
        self.output();
        self.feed(bytes).expect_err("the bytes break a rule")
    }
}

/// An option as a client sends it.
pub fn opt(option: u32, data: &[u8]) -> Vec<u8> {
    [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

/// A reply to an option.
pub fn rep(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let head = [option, kind, data.len() as u32].map(u32::to_be_bytes).concat();
    [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &head, data].concat()
}

pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

pub fn go_data(name: &str, infos: &[u16]) -> Vec<u8> {
    let infos: Vec<u8> = infos.iter().flat_map(|info| info.to_be_bytes()).collect();
    [string(name), ((infos.len() / 2) as u16).to_be_bytes().to_vec(), infos].concat()
}

pub fn context_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let all: Vec<u8> = queries.iter().flat_map(|query| string(query)).collect();
    [string(name), (queries.len() as u32).to_be_bytes().to_vec(), all].concat()
}

pub fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    Request { flags, command, cookie, offset, length }.to_bytes().to_vec()
}

pub fn write(flags: u16, cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    [request(command::WRITE, flags, cookie, offset, data.len() as u32), data.to_vec()].concat()
}

pub fn simple(cookie: u64, error: u32, data: &[u8]) -> Vec<u8> {
    [&wire::SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &error.to_be_bytes(), &cookie.to_be_bytes(), data].concat()
}

pub fn chunk(cookie: u64, done: u16, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = wire::CHUNK_MAGIC.to_be_bytes().to_vec();
    out.extend(done.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend((payload.len() as u32).to_be_bytes());
    out.extend(payload);
    out
}

pub fn data_chunk(cookie: u64, done: u16, offset: u64, data: &[u8]) -> Vec<u8> {
    chunk(cookie, done, 1, &[&offset.to_be_bytes()[..], data].concat())
}

pub fn hole_chunk(cookie: u64, done: u16, offset: u64, length: u32) -> Vec<u8> {
    chunk(cookie, done, 2, &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat())
}

/// The chunks in a stream: cookie, flags, type, payload.
pub fn chunks(mut bytes: &[u8]) -> Vec<(u64, u16, u16, Vec<u8>)> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let mut reader = wire::Reader(bytes);
        assert_eq!(reader.u32(), Some(wire::CHUNK_MAGIC));
        let (flags, kind, cookie) = (reader.u16().unwrap(), reader.u16().unwrap(), reader.u64().unwrap());
        let payload = reader.string().unwrap();
        out.push((cookie, flags, kind, payload.to_vec()));
        bytes = reader.0;
    }
    out
}

pub fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(7).wrapping_add(seed) | 1).collect()
}
