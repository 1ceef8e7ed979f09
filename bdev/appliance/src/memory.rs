//! The model handler: blocks in memory. Copy this file to begin a handler of your own.
//!
//! What it shows:
//! - the [`Handler`] is shared and holds the data; a [`Worker`] is a thread's own and holds what only that thread needs
//!   (here nothing but a reference);
//! - a request is done at once, in the order in which it came, and small ones are completed together ([`Completions`]);
//! - requests of one block may be on two threads at once (two reactors, two workers), so data has locks: one a chunk, taken
//!   for the length of a copy. A store whose workers own their parts (`placement` `lba_range`) can do without, as long as
//!   requests do not cross from one part into the next;
//! - a request may reach behind the end after the device has shrunk, and is answered, not trusted;
//! - it never blocks, so it also comes as [`Inline`].

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use reactor::{Buffers, ReactorId};
use serde_json::{Value, json};

use crate::handler::{Batch, Capabilities, Handler, Inline, Making, Worker, WorkerCx};
use crate::request::{Completions, Request};
use crate::types::{IoStatus, Op, OpKind, OpSet};

/// Bytes of data under one lock. Memory is taken from the host when a chunk is first written.
const CHUNK_BYTES: usize = 1 << 20;

/// The largest device: its table of chunks is made at once.
const MAX_BYTES: u64 = 4 << 40;

/// Requests, and bytes, that go home together: small ones share the cost of the way, and none waits for long copies of others.
const TOGETHER: usize = 16;
const TOGETHER_BYTES: usize = 64 << 10;

/// A chunk of data; `None` reads as zeroes.
type Chunk = Mutex<Option<Box<[u8]>>>;

/// The handler called `memory`.
pub struct Memory {
    store: Arc<Store>,
}

impl Memory {
    /// Makes it; for the table of handlers.
    ///
    /// # Errors
    /// `InvalidInput` for options, of which it has none, and for a device beyond 4 TiB.
    pub fn make(making: &Making<'_>) -> io::Result<Arc<dyn Handler>> {
        Ok(Arc::new(Memory::new(making)?))
    }

    /// As [`Memory::make`], for handlers that are built on this one.
    ///
    /// # Errors
    /// As [`Memory::make`].
    pub fn new(making: &Making<'_>) -> io::Result<Memory> {
        if let Some((key, _)) = making.options.as_object().and_then(|options| options.iter().next()) {
            return Err(invalid(format!("memory has no option '{key}'; leave 'options' out")));
        }
        let store =
            Store { block_size: making.geometry.block_size, chunks: RwLock::default(), held: AtomicU64::new(0) };
        store.resize(making.geometry.num_blocks)?;
        Ok(Memory { store: Arc::new(store) })
    }

    /// Does what a request asks for, and leaves its end to the caller.
    pub fn apply(&self, request: &mut Request) -> IoStatus {
        self.store.apply(request)
    }
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

impl Handler for Memory {
    fn name(&self) -> &str {
        "memory"
    }

    fn capabilities(&self, _: &crate::Geometry) -> Capabilities {
        let ops = [OpKind::Read, OpKind::Write, OpKind::Flush, OpKind::Unmap, OpKind::WriteZeroes, OpKind::Compare];
        Capabilities { ops: OpSet::of(&ops), volatile_cache: false, unmap_zeroes: true, max_rw_blocks: 0 }
    }

    fn worker(&self, _: WorkerCx) -> io::Result<Box<dyn Worker>> {
        Ok(Box::new(MemoryWorker { store: Arc::clone(&self.store), done: Completions::default() }))
    }

    fn inline(&self, _: ReactorId) -> Option<io::Result<Box<dyn Inline>>> {
        Some(Ok(Box::new(MemoryInline { store: Arc::clone(&self.store) })))
    }

    fn resize(&self, num_blocks: u64) -> io::Result<()> {
        self.store.resize(num_blocks)
    }

    fn stats(&self) -> Value {
        json!({ "held_bytes": self.store.held.load(Ordering::Relaxed) })
    }
}

struct MemoryWorker {
    store: Arc<Store>,
    done: Completions,
}

impl Worker for MemoryWorker {
    fn submit(&mut self, batch: &mut Batch) {
        let mut moved = 0;
        for mut request in batch {
            let status = self.store.apply(&mut request);
            moved += request.bufs().len();
            self.done.add(request, status);
            if moved >= TOGETHER_BYTES || self.done.len() == TOGETHER {
                self.done.flush();
                moved = 0;
            }
        }
        self.done.flush();
    }
}

struct MemoryInline {
    store: Arc<Store>,
}

impl Inline for MemoryInline {
    fn handle(&mut self, mut request: Request) {
        let status = self.store.apply(&mut request);
        request.complete(status);
    }
}

/// The data.
struct Store {
    block_size: u32,
    /// Blocks of the device and their chunks. Locked for writing only to change the size.
    chunks: RwLock<(u64, Vec<Chunk>)>,
    /// Bytes of memory in chunks.
    held: AtomicU64,
}

impl Store {
    fn apply(&self, request: &mut Request) -> IoStatus {
        let size = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        let (num_blocks, chunks) = &*size;
        let (op, offset) = (request.op(), request.offset_bytes());
        let inside = request.lba().checked_add(request.blocks()).is_some_and(|end| end <= *num_blocks);
        match op {
            Op::Flush => IoStatus::Success,
            _ if !inside => IoStatus::OutOfRange,
            Op::Read => self.read(chunks, offset, request.bufs_mut()),
            Op::Write { .. } => self.write(chunks, offset, request.bufs()),
            Op::Unmap | Op::WriteZeroes { .. } => self.zero(chunks, offset, request.len_bytes()),
            Op::Compare => self.compare(chunks, offset, request.bufs()),
            Op::CompareAndWrite { .. } | Op::Copy { .. } | Op::Reset => IoStatus::NotSupported,
        }
    }

    fn read(&self, chunks: &[Chunk], mut offset: u64, bufs: &mut Buffers) -> IoStatus {
        for segment in bufs.segments_mut() {
            let mut rest = segment;
            while !rest.is_empty() {
                let (chunk, at) = place(offset);
                let (piece, others) = rest.split_at_mut(rest.len().min(CHUNK_BYTES - at));
                match &*lock(&chunks[chunk]) {
                    Some(bytes) => piece.copy_from_slice(&bytes[at..at + piece.len()]),
                    None => piece.fill(0),
                }
                offset += piece.len() as u64;
                rest = others;
            }
        }
        IoStatus::Success
    }

    fn write(&self, chunks: &[Chunk], mut offset: u64, bufs: &Buffers) -> IoStatus {
        for segment in bufs.segments() {
            let mut rest = segment;
            while !rest.is_empty() {
                let (chunk, at) = place(offset);
                let (piece, others) = rest.split_at(rest.len().min(CHUNK_BYTES - at));
                let mut data = lock(&chunks[chunk]);
                let bytes = data.get_or_insert_with(|| {
                    self.held.fetch_add(CHUNK_BYTES as u64, Ordering::Relaxed);
                    vec![0; CHUNK_BYTES].into_boxed_slice()
                });
                bytes[at..at + piece.len()].copy_from_slice(piece);
                offset += piece.len() as u64;
                rest = others;
            }
        }
        IoStatus::Success
    }

    fn zero(&self, chunks: &[Chunk], mut offset: u64, bytes: u64) -> IoStatus {
        let end = offset + bytes;
        while offset < end {
            let (chunk, at) = place(offset);
            let n = (end - offset).min((CHUNK_BYTES - at) as u64);
            let mut data = lock(&chunks[chunk]);
            if n == CHUNK_BYTES as u64 {
                self.forget(&mut data);
            } else if let Some(bytes) = data.as_mut() {
                bytes[at..at + n as usize].fill(0);
            }
            offset += n;
        }
        IoStatus::Success
    }

    fn compare(&self, chunks: &[Chunk], mut offset: u64, bufs: &Buffers) -> IoStatus {
        for segment in bufs.segments() {
            let mut rest = segment;
            while !rest.is_empty() {
                let (chunk, at) = place(offset);
                let (piece, others) = rest.split_at(rest.len().min(CHUNK_BYTES - at));
                let equal = match &*lock(&chunks[chunk]) {
                    Some(bytes) => bytes[at..at + piece.len()] == *piece,
                    None => piece.iter().all(|&byte| byte == 0),
                };
                if !equal {
                    return IoStatus::CompareFailed;
                }
                offset += piece.len() as u64;
                rest = others;
            }
        }
        IoStatus::Success
    }

    fn forget(&self, data: &mut Option<Box<[u8]>>) {
        if data.take().is_some() {
            self.held.fetch_sub(CHUNK_BYTES as u64, Ordering::Relaxed);
        }
    }

    fn resize(&self, num_blocks: u64) -> io::Result<()> {
        let bytes = num_blocks.saturating_mul(self.block_size.into());
        if bytes > MAX_BYTES {
            return Err(invalid(format!("{bytes} bytes are more than the {MAX_BYTES} that memory serves at most")));
        }
        let mut size = self.chunks.write().unwrap_or_else(PoisonError::into_inner);
        let (old_blocks, chunks) = &mut *size;
        if num_blocks < *old_blocks {
            // What comes back with a later growth reads as zeroes.
            self.zero(chunks, bytes, (*old_blocks - num_blocks) * u64::from(self.block_size));
            let kept = bytes.div_ceil(CHUNK_BYTES as u64) as usize;
            chunks.drain(kept..).for_each(|chunk| {
                self.forget(&mut chunk.into_inner().unwrap_or_else(PoisonError::into_inner));
            });
        } else {
            chunks.resize_with(bytes.div_ceil(CHUNK_BYTES as u64) as usize, Chunk::default);
        }
        *old_blocks = num_blocks;
        Ok(())
    }
}

/// The chunk that holds the byte at `offset`, and where in it.
fn place(offset: u64) -> (usize, usize) {
    ((offset / CHUNK_BYTES as u64) as usize, (offset % CHUNK_BYTES as u64) as usize)
}

fn lock(chunk: &Chunk) -> std::sync::MutexGuard<'_, Option<Box<[u8]>>> {
    chunk.lock().unwrap_or_else(PoisonError::into_inner)
}
