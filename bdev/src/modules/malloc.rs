//! The RAM disk: shared by all reactors, allocated where it is written, gone with the process.
//!
//! # Layout
//! ```text
//! top[16 GiB each] -> middle[32 MiB each] -> chunk[64 KiB] = RwLock<Option<bytes>>
//!                                            slab[2 MiB] of 32 chunks
//! ```
//! Both levels of the index are made when something below them is first written and stay until the end; a chunk is freed
//! when all of it is unmapped or zeroed. A chunk that is not there reads as zeroes. Chunks that are neighbours on the disk are
//! neighbours in a [`Slab`]; behind one that is half full, the next is a huge page from the start.
//!
//! # Invariants
//! - A block never crosses a chunk, and a chunk's bytes are only reached under its lock: no block is ever torn, whatever
//!   the reactors do at the same time.
//! - Only compare-and-write holds several locks at once; it takes them in ascending order.
//! - An operation looks at the size when it is done, and is done in one go, so a shrunk device has no I/O beyond its end
//!   once all reactors know of the new size; only then are the chunks beyond it freed, and growing again shows zeroes.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use futures_util::future::BoxFuture;
use reactor::buffer::prefetch;
use reactor::buffer::slab::{PIECE_BYTES, PIECES, Slab};
use reactor::{Buffer, Buffers, Progress};
use schema::{ConfigEntry, Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};
use smallvec::SmallVec;
use uuid::Uuid;

use super::Module;
use super::common::{MIB, REFUSED_MD, check_physical, check_size, device_as, refuse_metadata, take_uuid, whole_blocks};
use crate::conformance::{Spec, Subject};
use crate::core::{
    Bdev, BdevError, BdevInfo, BdevSystem, ChannelCx, Geometry, Io, IoChannel, IoCx, IoStatus, IoTag, NewBdev, Op,
    OpKind, OpSet,
};

/// The module.
pub const MODULE: Module = Module { name: "malloc", methods: METHODS, subjects: &[SUBJECT], examine: None };

const PRODUCT: &str = "Malloc disk";

/// Bytes in a chunk; at least the largest block.
const CHUNK: usize = PIECE_BYTES;
/// Chunks under one entry of a middle level.
const CHUNKS: usize = 512;
/// Entries of a middle level.
const MIDDLES: usize = 512;
/// Entries of the top level.
const TOPS: usize = 1024;
/// The largest disk, in bytes: 16 TiB.
const MAX_BYTES: u64 = (CHUNK * CHUNKS * MIDDLES) as u64 * TOPS as u64;

/// Bytes of an operation that are brought near beforehand.
const PREFETCH: usize = 4096;

type Chunk = RwLock<Option<Buffer>>;
type Middle = OnceLock<Box<[OnceLock<Page>]>>;

/// What a middle level has an entry for.
struct Page {
    chunks: Box<[Chunk]>,
    /// Where the chunks have their bytes. A slab is gone when none of its chunks is there.
    slabs: Box<[Mutex<Weak<Slab>>]>,
}

impl Page {
    fn new() -> Page {
        Page {
            chunks: (0..CHUNKS).map(|_| RwLock::default()).collect(),
            slabs: (0..CHUNKS / PIECES).map(|_| Mutex::default()).collect(),
        }
    }
}

/// How to make one.
#[derive(Clone, Copy, Debug)]
pub struct MallocOptions {
    /// Bytes in a block.
    pub block_size: u32,
    /// Blocks.
    pub num_blocks: u64,
    /// Bytes in a physical block; 0: as a logical one.
    pub physical_block_size: u32,
    /// Blocks at whose multiples I/O is split; 0: nowhere.
    pub optimal_io_boundary: u32,
}

impl MallocOptions {
    /// A disk without preferences.
    pub fn new(block_size: u32, num_blocks: u64) -> MallocOptions {
        MallocOptions { block_size, num_blocks, physical_block_size: 0, optimal_io_boundary: 0 }
    }
}

/// The memory of one disk.
struct Memory {
    top: Box<[Middle]>,
}

fn read(chunk: &Chunk) -> RwLockReadGuard<'_, Option<Buffer>> {
    chunk.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(chunk: &Chunk) -> RwLockWriteGuard<'_, Option<Buffer>> {
    chunk.write().unwrap_or_else(PoisonError::into_inner)
}

/// A chunk that is locked to be written.
struct Open<'a> {
    guard: RwLockWriteGuard<'a, Option<Buffer>>,
    memory: &'a Memory,
    index: u64,
}

impl Open<'_> {
    /// Its bytes, made if need be.
    fn bytes(&mut self) -> &mut [u8] {
        self.guard.get_or_insert_with(|| self.memory.new_bytes(self.index))
    }
}

/// One chunk's part of a range: its index, and the bytes in it.
#[derive(Clone, Copy)]
struct Piece {
    chunk: u64,
    start: usize,
    len: usize,
    /// Offset from the start of the range.
    at: usize,
}

/// The pieces of `len` bytes from `offset`.
fn pieces(offset: u64, len: u64) -> impl Iterator<Item = Piece> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at == len {
            return None;
        }
        let start = ((offset + at) % CHUNK as u64) as usize;
        let n = (len - at).min((CHUNK - start) as u64);
        let piece = Piece { chunk: (offset + at) / CHUNK as u64, start, len: n as usize, at: at as usize };
        at += n;
        Some(piece)
    })
}

impl Memory {
    fn new() -> Memory {
        Memory { top: (0..TOPS).map(|_| OnceLock::new()).collect() }
    }

    /// The chunk of `index`, if its part of the index was ever made.
    #[inline]
    fn chunk(&self, index: u64) -> Option<&Chunk> {
        Some(&self.page(index)?.chunks[index as usize % CHUNKS])
    }

    #[inline]
    fn page(&self, index: u64) -> Option<&Page> {
        let index = index as usize;
        self.top[index / (CHUNKS * MIDDLES)].get()?[index / CHUNKS % MIDDLES].get()
    }

    /// Locks the chunk of `index` to be written, and makes its part of the index if need be.
    #[inline]
    fn open(&self, index: u64) -> Open<'_> {
        let at = index as usize;
        let middle = self.top[at / (CHUNKS * MIDDLES)].get_or_init(|| (0..MIDDLES).map(|_| OnceLock::new()).collect());
        let page = middle[at / CHUNKS % MIDDLES].get_or_init(Page::new);
        Open { guard: write(&page.chunks[at % CHUNKS]), memory: self, index }
    }

    /// The place of the slab that the chunk of `index` is in.
    fn slab(&self, index: u64) -> Option<MutexGuard<'_, Weak<Slab>>> {
        let place = &self.page(index)?.slabs[index as usize % CHUNKS / PIECES];
        Some(place.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Zeroes for the chunk of `index`, which has no bytes. Aligned to a page, so that a 4 KiB block lies in one.
    #[cold]
    fn new_bytes(&self, index: u64) -> Buffer {
        let before = index.checked_sub(PIECES as u64).and_then(|index| self.slab(index)?.upgrade());
        let will_fill = before.is_some_and(|slab| slab.is_half_taken());
        let slab = self.slab(index).and_then(|mut place| {
            let slab = place.upgrade().or_else(|| Slab::map(will_fill).ok())?;
            *place = Arc::downgrade(&slab);
            Some(slab)
        });
        // Where no more can be mapped, the allocator may still have something.
        slab.and_then(|slab| slab.take(index as usize % PIECES)).unwrap_or_else(|| Buffer::heap(CHUNK))
    }

    fn prefetch(&self, offset: u64, len: usize) {
        let Some(chunk) = self.chunk(offset / CHUNK as u64) else { return };
        let start = (offset % CHUNK as u64) as usize;
        if let Some(bytes) = read(chunk).as_deref() {
            prefetch(&bytes[start..CHUNK.min(start + len)]);
        }
    }

    fn read(&self, offset: u64, out: &mut Buffers) {
        for piece in pieces(offset, out.len() as u64) {
            let guard = self.chunk(piece.chunk).map(read);
            let bytes = guard.as_ref().and_then(|guard| guard.as_deref());
            match bytes {
                Some(bytes) => out.write_at(piece.at, &bytes[piece.start..piece.start + piece.len]),
                None if piece.len == out.len() => out.zero(),
                None => zero(out, piece.at, piece.len),
            }
        }
    }

    /// Writes `len` bytes of the payload from `from`.
    fn write(&self, offset: u64, payload: &Buffers, from: usize, len: u64) {
        for piece in pieces(offset, len) {
            let mut chunk = self.open(piece.chunk);
            payload.read_at(from + piece.at, &mut chunk.bytes()[piece.start..piece.start + piece.len]);
        }
    }

    fn zero(&self, offset: u64, len: u64) {
        for piece in pieces(offset, len) {
            let Some(chunk) = self.chunk(piece.chunk) else { continue };
            let mut guard = write(chunk);
            if piece.len == CHUNK {
                *guard = None;
            } else if let Some(bytes) = guard.as_deref_mut() {
                bytes[piece.start..piece.start + piece.len].fill(0);
            }
        }
    }

    fn compare(&self, offset: u64, payload: &Buffers) -> IoStatus {
        let equal = pieces(offset, payload.len() as u64).all(|piece| {
            let guard = self.chunk(piece.chunk).map(read);
            is_equal(guard.as_ref().and_then(|guard| guard.as_deref()), piece, payload)
        });
        if equal { IoStatus::Success } else { IoStatus::CompareFailed }
    }

    fn compare_and_write(&self, offset: u64, payload: &Buffers) -> IoStatus {
        let half = payload.len() / 2;
        let mut chunks: SmallVec<[Open<'_>; 4]> = SmallVec::new();
        for piece in pieces(offset, half as u64) {
            chunks.push(self.open(piece.chunk));
        }
        let locked = || pieces(offset, half as u64).zip(0..);
        if !locked().all(|(piece, n): (_, usize)| is_equal(chunks[n].guard.as_deref(), piece, payload)) {
            return IoStatus::CompareFailed;
        }
        for (piece, n) in locked() {
            payload.read_at(half + piece.at, &mut chunks[n].bytes()[piece.start..piece.start + piece.len]);
        }
        IoStatus::Success
    }

    /// Copies within the disk, a block-aligned piece at a time through `scratch`, from the end where the ranges overlap
    /// upwards.
    fn copy(&self, from: u64, to: u64, len: u64, scratch: &mut Buffers) {
        let step = scratch.len() as u64;
        let backwards = to > from && to - from < len;
        let mut done = 0;
        while done < len {
            let n = step.min(len - done);
            let at = if backwards { len - done - n } else { done };
            for piece in pieces(from + at, n) {
                let guard = self.chunk(piece.chunk).map(read);
                match guard.as_ref().and_then(|guard| guard.as_deref()) {
                    Some(bytes) => scratch.write_at(piece.at, &bytes[piece.start..piece.start + piece.len]),
                    None => zero(scratch, piece.at, piece.len),
                }
            }
            self.write(to + at, scratch, 0, n);
            done += n;
        }
    }

    /// Frees everything from `offset` on.
    fn forget_from(&self, offset: u64) {
        let first = offset / CHUNK as u64;
        for (t, middle) in self.top.iter().enumerate().skip(first as usize / (CHUNKS * MIDDLES)) {
            for (m, page) in middle.get().map(|middle| &middle[..]).unwrap_or_default().iter().enumerate() {
                for (c, chunk) in page.get().map(|page| &page.chunks[..]).unwrap_or_default().iter().enumerate() {
                    let index = ((t * MIDDLES + m) * CHUNKS + c) as u64;
                    if index > first || index == first && offset.is_multiple_of(CHUNK as u64) {
                        *write(chunk) = None;
                    } else if index == first
                        && let Some(bytes) = write(chunk).as_deref_mut()
                    {
                        bytes[(offset % CHUNK as u64) as usize..].fill(0);
                    }
                }
            }
        }
    }

    /// Bytes that are allocated.
    fn allocated(&self) -> u64 {
        let pages =
            self.top.iter().filter_map(OnceLock::get).flat_map(|middle| middle.iter().filter_map(OnceLock::get));
        let chunks = pages.flat_map(|page| page.chunks.iter()).filter(|chunk| read(chunk).is_some()).count();
        chunks as u64 * CHUNK as u64
    }
}

fn zero(payload: &mut Buffers, mut at: usize, mut len: usize) {
    while len > 0 {
        let room = payload.slice_at_mut(at);
        let n = room.len().min(len);
        room[..n].fill(0);
        at += n;
        len -= n;
    }
}

/// Whether a piece of a chunk equals its part of the payload; a chunk that is not there is zeroes.
fn is_equal(bytes: Option<&[u8]>, piece: Piece, payload: &Buffers) -> bool {
    let mut done = 0;
    while done < piece.len {
        let theirs = payload.slice_at(piece.at + done);
        let n = theirs.len().min(piece.len - done);
        let equal = match bytes {
            Some(bytes) => bytes[piece.start + done..][..n] == theirs[..n],
            None => theirs[..n].iter().all(|&byte| byte == 0),
        };
        if !equal {
            return false;
        }
        done += n;
    }
    true
}

struct Malloc {
    options: MallocOptions,
    num_blocks: Arc<AtomicU64>,
    memory: Arc<Memory>,
}

impl Bdev for Malloc {
    fn product_name(&self) -> &'static str {
        PRODUCT
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::new(self.options.block_size, self.num_blocks.load(Ordering::Acquire));
        if self.options.physical_block_size != 0 {
            geometry.physical_block_size = self.options.physical_block_size;
        }
        geometry.optimal_io_boundary = self.options.optimal_io_boundary;
        geometry.unmap_zeroes = true;
        geometry
    }

    fn native_ops(&self) -> OpSet {
        OpSet::of(&OpKind::ALL)
    }

    fn open_channel(&self, _: &mut ChannelCx<'_>) -> io::Result<Box<dyn IoChannel>> {
        Ok(Box::new(MallocChannel {
            block_size: self.options.block_size.into(),
            num_blocks: Arc::clone(&self.num_blocks),
            memory: Arc::clone(&self.memory),
            scratch: Buffers::new(),
            batch: VecDeque::new(),
        }))
    }

    fn driver_specific(&self) -> Value {
        json!({ "malloc": { "allocated_bytes": self.memory.allocated() } })
    }

    fn config(&self, info: &BdevInfo) -> Vec<ConfigEntry> {
        let geometry = self.geometry();
        let params = json!({
            "name": info.name(),
            "num_blocks": geometry.num_blocks,
            "block_size": geometry.block_size,
            "physical_block_size": geometry.physical_block_size,
            "optimal_io_boundary": geometry.optimal_io_boundary,
            "uuid": info.uuid().to_string(),
        });
        vec![ConfigEntry::new("bdev_malloc_create", params)]
    }
}

struct MallocChannel {
    block_size: u64,
    num_blocks: Arc<AtomicU64>,
    memory: Arc<Memory>,
    /// For copies; made by the first.
    scratch: Buffers,
    /// Operations of this step, in order. Bounded by the I/Os that the reactor's pool has.
    batch: VecDeque<Io>,
}

impl MallocChannel {
    /// Brings the start of what an operation moves near, while the one before it is done: a copy waits for memory far
    /// longer than it moves bytes.
    fn prefetch(&self, io: &Io) {
        if matches!(io.op(), Op::Read | Op::Write { .. }) {
            self.memory.prefetch(io.lba() * self.block_size, io.bufs().len().min(PREFETCH));
        }
    }

    fn perform(&mut self, io: &mut Io) -> IoStatus {
        let (op, lba, blocks) = (io.op(), io.lba(), io.blocks());
        if matches!(op, Op::Flush | Op::Reset) {
            return IoStatus::Success;
        }
        // The device may have been shrunk since the layer looked.
        let size = self.num_blocks.load(Ordering::Acquire);
        let is_inside = |lba: u64| lba.checked_add(blocks).is_some_and(|end| end <= size);
        if !is_inside(lba) {
            return IoStatus::OutOfRange;
        }
        let (offset, len) = (lba * self.block_size, blocks * self.block_size);
        match op {
            Op::Read => {
                self.memory.read(offset, io.bufs_mut());
                IoStatus::Success
            }
            Op::Write { .. } => {
                self.memory.write(offset, io.bufs(), 0, len);
                IoStatus::Success
            }
            Op::Unmap | Op::WriteZeroes { .. } => {
                self.memory.zero(offset, len);
                IoStatus::Success
            }
            Op::Compare => self.memory.compare(offset, io.bufs()),
            Op::CompareAndWrite { .. } => self.memory.compare_and_write(offset, io.bufs()),
            Op::Copy { source_lba } if is_inside(source_lba) => {
                if self.scratch.is_empty() {
                    self.scratch = Buffers::heap(CHUNK);
                }
                self.memory.copy(source_lba * self.block_size, offset, len, &mut self.scratch);
                IoStatus::Success
            }
            Op::Copy { .. } => IoStatus::OutOfRange,
            Op::Flush | Op::Reset => IoStatus::Success,
        }
    }
}

impl IoChannel for MallocChannel {
    #[inline]
    fn submit(&mut self, io: Io, cx: &mut IoCx<'_>) {
        if self.batch.is_empty() {
            cx.poll_soon();
        }
        self.batch.push_back(io);
    }

    fn poll(&mut self, cx: &mut IoCx<'_>) -> Progress {
        let Some(mut io) = self.batch.pop_front() else { return Progress::Idle };
        loop {
            let next = self.batch.pop_front();
            if let Some(next) = &next {
                self.prefetch(next);
            }
            let status = self.perform(&mut io);
            cx.complete(io, status);
            match next {
                Some(next) => io = next,
                None => return Progress::Busy,
            }
        }
    }

    fn abort(&mut self, tag: IoTag, cx: &mut IoCx<'_>) -> bool {
        let found = self.batch.iter().position(|io| io.tag() == tag).and_then(|at| self.batch.remove(at));
        found.map(|io| cx.complete(io, IoStatus::Aborted)).is_some()
    }

    fn abort_all(&mut self, cx: &mut IoCx<'_>) {
        for io in self.batch.drain(..) {
            cx.complete(io, IoStatus::Aborted);
        }
    }
}

/// Creates and registers a RAM disk.
///
/// # Errors
/// As [`BdevSystem::register`]; [`BdevError::Invalid`] for a size that cannot be served.
pub async fn create(
    system: &BdevSystem,
    name: &str,
    uuid: Option<Uuid>,
    options: MallocOptions,
) -> Result<Arc<BdevInfo>, BdevError> {
    check(options.block_size, options.num_blocks)?;
    check_physical(options.block_size, options.physical_block_size)?;
    let device =
        Malloc { options, num_blocks: Arc::new(AtomicU64::new(options.num_blocks)), memory: Arc::new(Memory::new()) };
    system.register(NewBdev { name: name.to_string(), uuid, aliases: Vec::new(), device: Arc::new(device) }).await
}

fn check(block_size: u32, num_blocks: u64) -> Result<(), BdevError> {
    check_size(block_size, num_blocks)?;
    if num_blocks * u64::from(block_size) > MAX_BYTES {
        return Err(BdevError::invalid("num_blocks", num_blocks, "RAM disks are at most 16 TiB large"));
    }
    Ok(())
}

/// Sets the size of a RAM disk. What lies beyond a smaller end is forgotten.
///
/// # Errors
/// [`BdevError::NotFound`], [`BdevError::WrongKind`]; [`BdevError::Invalid`] for a size that cannot be served.
pub async fn resize(system: &BdevSystem, name: &str, num_blocks: u64) -> Result<(), BdevError> {
    let info = system.get(name)?;
    let malloc = device_as::<Malloc>(&info, PRODUCT)?;
    check(malloc.options.block_size, num_blocks)?;
    let before = malloc.num_blocks.swap(num_blocks, Ordering::AcqRel);
    let told = system.resized(&info).await;
    if num_blocks < before && told.is_ok() {
        malloc.memory.forget_from(num_blocks * u64::from(malloc.options.block_size));
    }
    told
}

const METHODS: &[Method<BdevSystem>] = &[
    Method::new("bdev_malloc_create", "Create a RAM disk.", |s, p| Box::pin(rpc_create(s, p)))
        .params(&[
            Param::optional("name", Kind::Str, "Name of the bdev; Malloc0, Malloc1, ... when left out").at_least(1),
            Param::required("block_size", Kind::U32, "Bytes in a block: a power of two from 512 to 65536"),
            Param::required("num_blocks", Kind::U64, "Number of blocks"),
            Param::optional("uuid", Kind::Uuid, "UUID of the bdev; drawn at random when left out"),
            Param::optional("optimal_io_boundary", Kind::U32, "Blocks at whose multiples I/O is split; 0: nowhere"),
            Param::optional("md_size", Kind::U32, REFUSED_MD),
            Param::optional("md_interleave", Kind::Bool, REFUSED_MD),
            Param::optional("dif_type", Kind::I32, REFUSED_MD),
            Param::optional("dif_is_head_of_md", Kind::Bool, REFUSED_MD),
            Param::optional("physical_block_size", Kind::U32, "Bytes in a physical block; as block_size when left out"),
            Param::optional("dif_pi_format", Kind::U32, REFUSED_MD),
            Param::optional("numa_id", Kind::I32, "Accepted, without effect: memory comes from where it is used")
                .deprecated(),
        ])
        .mutates()
        .refuses_with(code::INTERNAL_ERROR)
        .result("name of the bdev"),
    Method::new("bdev_malloc_delete", "Delete a RAM disk and what is on it.", |s, p| {
        Box::pin(super::common::rpc_delete(s, p, PRODUCT))
    })
    .params(&[Param::required("name", Kind::Str, "Name of the bdev")])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR),
    Method::new("bdev_malloc_resize", "Change the size of a RAM disk; what lies beyond the end is lost.", |s, p| {
        Box::pin(rpc_resize(s, p))
    })
    .params(&[
        Param::required("name", Kind::Str, "Name of the bdev"),
        Param::required("new_size", Kind::U64, "New size in MiB").at_least(1),
    ])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR),
];

async fn rpc_create(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    refuse_metadata(&params)?;
    let options = MallocOptions {
        block_size: params.u32("block_size")?,
        num_blocks: params.u64("num_blocks")?,
        physical_block_size: params.opt_u32("physical_block_size").unwrap_or(0),
        optimal_io_boundary: params.opt_u32("optimal_io_boundary").unwrap_or(0),
    };
    let uuid = take_uuid(&params)?;
    let info = match params.opt_str("name") {
        Some(name) => create(&system, name, uuid, options).await?,
        None => create(&system, &free_name(&system), uuid, options).await?,
    };
    Ok(json!(info.name()))
}

/// The first of Malloc0, Malloc1, ... that is not taken.
fn free_name(system: &BdevSystem) -> String {
    let names = (0..).map(|n: u64| format!("Malloc{n}"));
    names.into_iter().find(|name| system.get(name).is_err()).expect("there are more numbers than bdevs")
}

async fn rpc_resize(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let name = params.str("name")?;
    let block_size = system.get(name)?.device().geometry().block_size;
    let bytes = params.u64("new_size")?.saturating_mul(MIB);
    resize(&system, name, whole_blocks(bytes, block_size)).await.map_err(|error| match error {
        BdevError::Invalid { reason, .. } => params.invalid("new_size", reason),
        other => other.into(),
    })?;
    Ok(json!(true))
}

const SUBJECT: Subject = Subject {
    label: "malloc",
    block_sizes: &[512, 4096, 65536],
    forgets: false,
    make: conformance_make,
    resize: Some(|system, spec, blocks| Box::pin(async move { resize(&system, &spec.name, blocks).await })),
};

fn conformance_make(system: Arc<BdevSystem>, spec: Spec) -> BoxFuture<'static, Result<Vec<String>, BdevError>> {
    Box::pin(async move {
        let options = MallocOptions::new(spec.block_size, spec.num_blocks);
        create(&system, &spec.name, None, options).await?;
        Ok(vec![spec.name])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_made_by_writing_and_freed_by_unmapping() {
        let memory = Memory::new();
        let at = 7 * CHUNK as u64 - 512;
        let payload = Buffers::from(&[5; 1024][..]);
        memory.write(at, &payload, 0, 1024);
        assert_eq!(memory.allocated(), 2 * CHUNK as u64);
        memory.zero(6 * CHUNK as u64, CHUNK as u64);
        assert_eq!(memory.allocated(), CHUNK as u64);
        let mut out = Buffers::from(&[9; 1024][..]);
        memory.read(at, &mut out);
        assert_eq!(out.to_vec(), [&[0; 512][..], &[5; 512]].concat());
        memory.forget_from(7 * CHUNK as u64 + 256);
        memory.read(at, &mut out);
        assert_eq!(out.to_vec(), [&[0; 512][..], &[5; 256], &[0; 256]].concat());
        memory.forget_from(7 * CHUNK as u64);
        assert_eq!(memory.allocated(), 0);
    }

    #[test]
    fn the_last_byte_of_the_largest_disk_has_a_place() {
        let memory = Memory::new();
        let payload = Buffers::from(&[1; 512][..]);
        memory.write(MAX_BYTES - 512, &payload, 0, 512);
        assert!(memory.compare(MAX_BYTES - 512, &payload).is_success());
        assert!(check(512, MAX_BYTES / 512).is_ok());
        assert!(check(512, MAX_BYTES / 512 + 1).is_err());
        assert!(check(65536, u64::MAX).is_err());
    }

    #[test]
    fn what_was_discarded_is_zeroes_wherever_its_memory_goes() {
        // Three slabs' worth, so that they fill to a huge page, empty, and fill again.
        const DISK: u64 = 6 * MIB;
        let (memory, mut model) = (Memory::new(), vec![0u8; DISK as usize]);
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        for step in 0..400 {
            // Mostly written for a while, then mostly discarded.
            let discards = if step / 100 % 2 == 0 { 2 } else { 8 };
            let start = random(DISK / 4096) * 4096;
            let len = (random(128) * 4096 + 4096).min(DISK - start);
            let range = start as usize..(start + len) as usize;
            if random(10) < discards {
                memory.zero(start, len);
                model[range].fill(0);
            } else {
                memory.write(start, &Buffers::from(&vec![step as u8; len as usize][..]), 0, len);
                model[range].fill(step as u8);
            }
            if step % 20 == 19 {
                let mut out = Buffers::heap(DISK as usize);
                memory.read(0, &mut out);
                assert!(out.to_vec() == model, "after step {step}");
            }
        }
    }

    #[test]
    fn threads_neither_tear_blocks_nor_lose_swaps() {
        const BLOCK: usize = 4096;
        let memory = Memory::new();
        // Two blocks on either side of a border between chunks.
        let counter = CHUNK as u64 - BLOCK as u64;
        let payload = |low: u64| {
            let mut bytes = vec![0; 4 * BLOCK];
            bytes[..8].copy_from_slice(&low.to_le_bytes());
            bytes[2 * BLOCK - 8..2 * BLOCK].copy_from_slice(&low.to_le_bytes());
            bytes[2 * BLOCK..2 * BLOCK + 8].copy_from_slice(&(low + 1).to_le_bytes());
            bytes[4 * BLOCK - 8..].copy_from_slice(&(low + 1).to_le_bytes());
            Buffers::from(&bytes[..])
        };
        std::thread::scope(|scope| {
            for thread in 1..=3u8 {
                let (memory, payload) = (&memory, &payload);
                scope.spawn(move || {
                    let mut out = Buffers::heap(2 * BLOCK);
                    let mut swapped = 0;
                    while swapped < 500 {
                        memory.read(counter, &mut out);
                        let mut low = [0; 8];
                        out.read_at(0, &mut low);
                        swapped += u32::from(
                            memory.compare_and_write(counter, &payload(u64::from_le_bytes(low))).is_success(),
                        );
                        // One block that all write whole is never seen in parts.
                        memory.write(10 * CHUNK as u64, &Buffers::from(&[thread; BLOCK][..]), 0, BLOCK as u64);
                        let mut block = Buffers::heap(BLOCK);
                        memory.read(10 * CHUNK as u64, &mut block);
                        let bytes = block.to_vec();
                        assert!(bytes.iter().all(|&byte| byte == bytes[0]), "a block is torn");
                    }
                });
            }
        });
        let mut out = Buffers::heap(2 * BLOCK);
        memory.read(counter, &mut out);
        let mut counts = [[0; 8]; 2];
        out.read_at(0, &mut counts[0]);
        out.read_at(2 * BLOCK - 8, &mut counts[1]);
        assert_eq!(counts.map(u64::from_le_bytes), [1500, 1500]);
    }
}
