//! A whole NBD connection against a client, an allocator and a device that do whatever the bytes say.
//!
//! The bytes are a program. It puts options and requests (well formed, nearly so, or plain noise) into the stream, cuts the
//! stream anywhere, grants or refuses memory, completes operations in any order and with any outcome, sends any part of the
//! output, ends the export, the stream or the connection. Checked all the while:
//! - nothing panics, and what the server sends is well formed: every reply is to a request that is outstanding, ends it once,
//!   and brings all of a read's bytes or an error;
//! - operations stay within the export, are whole blocks, and have memory of their length;
//! - memory stays within the limits, and all of it comes back.
#![no_main]

use bdev::core::{IoStatus, Op};
use libfuzzer_sys::fuzz_target;
use nbd::connection::{Connection, MAX_REQUESTS, Operation, WINDOW_BYTES};
use nbd::negotiation::Facts;
use nbd::wire::{self, IHAVEOPT, OPTION_REPLY_MAGIC, Reader, Request, chunk, command};
use reactor::Buffers;
use std::collections::BTreeMap;
use std::io::IoSlice;

const BLOCK: u32 = 512;
const SIZE: u64 = 1 << 20;
const MAX_REQUEST: u32 = 1 << 19;

/// Reads the program; zeroes when it is at its end.
struct Program<'a>(&'a [u8]);

impl Program<'_> {
    fn byte(&mut self) -> u8 {
        let Some((byte, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *byte
    }

    fn long(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }

    fn bytes(&mut self) -> Vec<u8> {
        let n = usize::from(self.byte()).min(self.0.len());
        let (bytes, rest) = self.0.split_at(n);
        self.0 = rest;
        bytes.to_vec()
    }
}

struct World {
    connection: Connection,
    stream: Vec<u8>,
    output: Vec<u8>,
    /// Requests by cookie: what is left to be brought of a read, `None` for others.
    requests: BTreeMap<u64, Option<u32>>,
    next_cookie: u64,
    held: Vec<Operation>,
    lent: usize,
    memory: usize,
    /// Everything in the stream was built by the rules.
    clean: bool,
    greeted: bool,
    over: bool,
}

impl World {
    fn new(p: &mut Program<'_>) -> World {
        let bits = p.byte();
        let facts = Facts {
            name: "vol".into(),
            description: "fuzzed".into(),
            size: SIZE,
            block_size: BLOCK,
            preferred: 4096,
            max_request: MAX_REQUEST,
            read_only: bits & 1 != 0,
            flush: bits & 2 == 0,
            trim: bits & 4 == 0,
            write_zeroes: bits & 8 == 0,
        };
        let mut world = World {
            connection: Connection::new(facts),
            stream: Vec::new(),
            output: Vec::new(),
            requests: BTreeMap::new(),
            next_cookie: 1,
            held: Vec::new(),
            lent: 0,
            memory: usize::MAX,
            // Without the handshake, requests are noise.
            clean: bits & 16 == 0,
            greeted: false,
            over: false,
        };
        if bits & 16 == 0 {
            world.stream.extend(3u32.to_be_bytes());
            if bits & 32 == 0 {
                world.option(8, &[]);
                world.option(10, b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation");
            }
            world.option(7, b"\0\0\0\x03vol\0\x01\0\x03");
            for _ in 0..4 {
                world.send(usize::MAX);
                world.feed(usize::MAX);
            }
            world.send(usize::MAX);
        }
        world
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        self.stream.extend(IHAVEOPT.to_be_bytes());
        self.stream.extend(option.to_be_bytes());
        self.stream.extend((data.len() as u32).to_be_bytes());
        self.stream.extend(data);
    }

    fn request(&mut self, p: &mut Program<'_>) {
        if self.requests.len() > 200 {
            return;
        }
        let (command, shape) = (u16::from(p.byte() % 9), p.byte());
        let flags = if shape & 1 == 0 { 0 } else { u16::from(p.byte()) };
        let mut offset = u64::from(p.byte()) * 4096;
        let mut length = (u32::from(p.byte()) + 1) * if shape & 2 == 0 { BLOCK } else { 2 * BLOCK };
        if shape & 0x18 == 0x18 {
            offset ^= u64::from(p.long());
            length ^= p.long() & 0x8007_ffff;
        }
        let length = if command == command::FLUSH { 0 } else { length };
        if command == command::DISC && shape & 4 == 0 || command == command::WRITE && length > 2 * MAX_REQUEST {
            return;
        }
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        if command != command::DISC && self.clean {
            self.requests.insert(cookie, (command == command::READ).then_some(length));
        }
        self.stream.extend(Request { flags, command, cookie, offset, length }.to_bytes());
        if command == command::WRITE {
            self.stream.extend(vec![p.byte(); length as usize]);
        }
    }

    fn feed(&mut self, limit: usize) {
        let n = self.stream.len().min(limit);
        let (lent, memory) = (&mut self.lent, self.memory);
        let mut direct = 0;
        if let Some(target) = self.connection.read_target() {
            direct = target.len().min(n);
            target[..direct].copy_from_slice(&self.stream[..direct]);
            if direct > 0 {
                self.connection.read_done(direct);
            }
        }
        let fed = self.connection.handle_input(&self.stream[direct..n], &mut |len| {
            assert!(len > 0 && len <= MAX_REQUEST as usize);
            (*lent + len <= memory).then(|| {
                *lent += len;
                Buffers::heap(len)
            })
        });
        assert!(self.lent <= WINDOW_BYTES.max(MAX_REQUEST as usize));
        match fed {
            Ok(taken) => {
                self.stream.drain(..direct + taken);
            }
            Err(_) => {
                assert!(!self.clean, "a client that obeys the rules is not thrown out");
                self.operations();
                self.close();
            }
        }
        self.operations();
    }

    fn operations(&mut self) {
        while let Some(operation) = self.connection.poll_operation() {
            let Operation { op, lba, blocks, bufs, .. } = &operation;
            assert!((lba + blocks) * u64::from(BLOCK) <= SIZE);
            assert_eq!(bufs.len() as u64, op.payload_bytes(*blocks, BLOCK));
            self.held.push(operation);
        }
        assert!(self.held.len() <= usize::from(MAX_REQUESTS) + WINDOW_BYTES / 512);
    }

    fn complete(&mut self, p: &mut Program<'_>) {
        if self.held.is_empty() {
            return;
        }
        let at = usize::from(p.byte()) % self.held.len();
        let mut operation = self.held.swap_remove(at);
        let outcome = p.byte();
        if operation.op == Op::Read && outcome & 1 != 0 {
            operation.bufs.fill(outcome);
        }
        let status = match outcome {
            0..=200 => IoStatus::Success,
            201..=220 => IoStatus::NoDevice,
            221..=240 => IoStatus::NoSpace,
            _ => IoStatus::Aborted,
        };
        let lent = &mut self.lent;
        if self.over {
            *lent -= operation.bufs.len();
        } else {
            self.connection.complete(operation.tag, status, operation.bufs, &mut |bufs| *lent -= bufs.len());
        }
        self.operations();
    }

    fn send(&mut self, limit: usize) {
        if self.over || !self.connection.wants_output() {
            return;
        }
        let mut slices = [IoSlice::new(&[]); 5];
        let count = self.connection.poll_output(&mut slices);
        let all: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.iter().copied()).collect();
        assert!(!all.is_empty());
        let n = all.len().min(limit);
        self.output.extend(&all[..n]);
        let lent = &mut self.lent;
        self.connection.sent(n, &mut |bufs| *lent -= bufs.len());
        while let Some(left) = self.reply() {
            let taken = self.output.len() - left;
            self.output.drain(..taken);
        }
    }

    /// Reads one whole reply off the output, if it is there; how many bytes are behind it.
    fn reply(&mut self) -> Option<usize> {
        if !self.greeted {
            let greeting = self.output.get(..18)?;
            assert_eq!(greeting, &wire::greeting()[..]);
            self.greeted = true;
            return Some(self.output.len() - 18);
        }
        let output = std::mem::take(&mut self.output);
        let mut reader = Reader(&output);
        let whole = self.parse(&mut reader);
        let left = reader.0.len();
        self.output = output;
        whole.map(|()| left)
    }

    fn parse(&mut self, reader: &mut Reader<'_>) -> Option<()> {
        match reader.u32()? {
            wire::SIMPLE_REPLY_MAGIC => {
                let (error, cookie) = (reader.u32()?, reader.u64()?);
                let length = self.outstanding(cookie);
                if let (0, Some(length)) = (error, length) {
                    reader.take(length as usize)?;
                }
                self.requests.remove(&cookie);
            }
            wire::CHUNK_MAGIC => {
                let (flags, kind, cookie) = (reader.u16()?, reader.u16()?, reader.u64()?);
                let mut payload = Reader(reader.string()?);
                let left = self.outstanding(cookie);
                let brought = match kind {
                    chunk::OFFSET_DATA => payload.0.len() as u32 - 8,
                    chunk::OFFSET_HOLE => Reader(&payload.0[8..]).u32()?,
                    // What an error stands for is not said: all that is left may be.
                    chunk::ERROR | chunk::ERROR_OFFSET => {
                        assert_ne!(payload.u32()?, 0);
                        left.unwrap_or(0)
                    }
                    _ => 0,
                };
                if let Some(left) = left {
                    // After an error for a part, the other parts may still come.
                    self.requests.insert(cookie, Some(left.saturating_sub(brought)));
                    // A request that was spoiled on its way may ask for another length than is known here.
                    let whole = flags & chunk::DONE == 0 || left <= brought || left == 0;
                    assert!(whole || !self.clean, "bytes are missing");
                }
                if flags & chunk::DONE != 0 {
                    self.requests.remove(&cookie);
                }
            }
            magic => {
                // An answer to EXPORT_NAME has no mark; it comes from spoiled streams only.
                if u64::from(magic) != OPTION_REPLY_MAGIC >> 32 {
                    assert!(!self.clean);
                    reader.take(reader.0.len())?;
                    return Some(());
                }
                reader.take(12)?;
                reader.string()?;
            }
        }
        Some(())
    }

    fn outstanding(&self, cookie: u64) -> Option<u32> {
        let known = self.requests.get(&cookie);
        assert!(known.is_some() || !self.clean, "a reply to nothing");
        known.copied().flatten()
    }

    fn close(&mut self) {
        let lent = &mut self.lent;
        self.connection.close(&mut |bufs| *lent -= bufs.len());
        self.stream.clear();
        self.output.clear();
        self.over = true;
    }

    fn step(&mut self, p: &mut Program<'_>) {
        if self.stream.len() > 3 << 20 {
            self.feed(usize::MAX);
            // A client that is cut off in the middle of a request obeys no rules.
            self.clean &= self.stream.len() <= 3 << 20;
            self.stream.truncate(3 << 20);
        }
        match p.byte() % 16 {
            0..=4 => self.request(p),
            5 => {
                // Options in the middle of requests are noise.
                self.clean = false;
                let option = u32::from(p.byte() % 14);
                let data = p.bytes();
                self.option(option, &data);
            }
            6 => {
                let noise = p.bytes();
                self.clean &= noise.is_empty();
                self.stream.extend(noise);
            }
            7 => {
                let (at, bits) = (p.long() as usize, p.byte());
                let len = self.stream.len().max(1);
                if let Some(byte) = self.stream.get_mut(at % len) {
                    *byte ^= bits;
                    self.clean = false;
                }
            }
            8 | 9 => {
                let limit = p.long() as usize >> (p.byte() % 32);
                self.feed(limit);
            }
            10 | 11 => self.complete(p),
            12 => {
                let limit = 1 + (p.long() as usize >> (p.byte() % 32));
                self.send(limit);
            }
            13 => self.memory = p.long() as usize >> (p.byte() % 32),
            14 => self.feed(usize::MAX),
            _ => {
                let lent = &mut self.lent;
                let mut put = |bufs: Buffers| *lent -= bufs.len();
                match p.byte() {
                    0..=20 => self.connection.shut_down(&mut put),
                    21..=40 => self.connection.end_of_input(&mut put),
                    41..=50 => self.close(),
                    _ => {}
                }
            }
        }
    }

    /// Everything ends once there is memory and everybody does his part.
    fn finish(mut self) {
        self.memory = usize::MAX;
        for _ in 0..100_000 {
            if self.over {
                break;
            }
            let before = (self.stream.len(), self.held.len(), self.connection.progress());
            self.feed(usize::MAX);
            while !self.held.is_empty() {
                self.complete(&mut Program(&[]));
            }
            self.send(usize::MAX);
            if before == (self.stream.len(), self.held.len(), self.connection.progress()) {
                break;
            }
        }
        while !self.held.is_empty() {
            self.complete(&mut Program(&[]));
        }
        if !self.over {
            self.close();
        }
        assert_eq!(self.lent, 0, "memory is lost");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let p = &mut Program(bytes);
    let mut world = World::new(p);
    while !p.0.is_empty() && !world.over {
        world.step(p);
    }
    world.finish();
});
