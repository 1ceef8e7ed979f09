//! Payload memory: slabs of page-aligned buffers, handed out whole, and scatter lists of them.
//!
//! A [`BufferPool`] belongs to one reactor. It maps one region at start, so that the region can be registered once
//! with io_uring or an RDMA device, and cuts it into three size classes. Buffers leave and return last-in
//! first-out, which keeps the ones in use warm in the cache. The mapping uses ordinary 4 KiB pages and touches none
//! of them before its buffer is first used.
//!
//! ```text
//! region: | 4 KiB x small | 16 KiB x medium | 128 KiB x large |      every buffer is aligned to 4096 bytes
//! ```
//!
//! Invariants
//! - A [`Buffer`] is the only way to its bytes while it lives (a *view* borrows them by contract, see
//!   [`Buffers::view`]).
//! - A buffer of a pool goes back to that pool: at once through [`BufferPool::put`] on the pool's own thread, through
//!   a locked return list when it is dropped anywhere else. None is lost, and none is handed out twice.
//! - The mapping lives until the last buffer of the pool is gone.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::cell::RefCell;
use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use smallvec::SmallVec;

/// Alignment of every buffer's first byte, in bytes: fits O_DIRECT on any block device.
pub const ALIGNMENT: usize = 4096;

/// Capacity of a buffer of each class, in bytes, smallest first.
pub const CLASS_BYTES: [usize; 3] = [4096, 16 * 1024, 128 * 1024];

/// How many buffers of each class a pool holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Buffers of 4 KiB.
    pub small: usize,
    /// Buffers of 16 KiB.
    pub medium: usize,
    /// Buffers of 128 KiB.
    pub large: usize,
}

impl Default for PoolConfig {
    /// 4096 + 512 + 256 buffers: 56 MiB of address space for each reactor.
    fn default() -> Self {
        PoolConfig { small: 4096, medium: 512, large: 256 }
    }
}

impl PoolConfig {
    fn counts(&self) -> [usize; 3] {
        [self.small, self.medium, self.large]
    }

    /// Bytes of address space the pool maps.
    pub fn bytes(&self) -> usize {
        self.counts().iter().zip(CLASS_BYTES).map(|(n, size)| n * size).sum()
    }
}

/// The mapped region and the list through which buffers come back from other threads.
struct PoolShared {
    base: NonNull<u8>,
    bytes: usize,
    returned: Mutex<Returned>,
}

#[derive(Default)]
struct Returned {
    closed: bool,
    buffers: Vec<Buffer>,
}

// SAFETY: the region is plain memory; `base` is only used to derive addresses and to unmap in `drop`.
unsafe impl Send for PoolShared {}
// SAFETY: as above; all mutable state is behind the mutex.
unsafe impl Sync for PoolShared {}

impl PoolShared {
    fn map(bytes: usize) -> io::Result<PoolShared> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        // SAFETY: a fresh anonymous mapping chosen by the kernel aliases nothing.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::other("mmap returned a null address"))?;
        Ok(PoolShared { base, bytes, returned: Mutex::default() })
    }
}

impl Drop for PoolShared {
    fn drop(&mut self) {
        // SAFETY: every buffer of the region holds an Arc to this value, so none is left; the mapping is ours.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// Asks the processor to bring bytes near, a while before they are read or written. Costs little and changes nothing.
#[inline]
pub fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch has no effect on memory, and the address lies in a borrowed slice.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// As [`prefetch`], for the memory of a value itself.
#[inline]
pub fn prefetch_value<T>(value: &T) {
    #[cfg(target_arch = "x86_64")]
    for offset in (0..size_of::<T>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch has no effect on memory, and the address lies in a borrowed value.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast::<i8>().add(offset)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = value;
}

/// Takes the cache lines of a value that is about to be written from whichever core has them. Fetched for reading only, each would
/// be asked for a second time when it is written, and everything stored after that would wait.
#[inline]
pub fn prefetch_for_write<T>(value: &T) {
    #[cfg(target_arch = "x86_64")]
    for offset in (0..size_of::<T>()).step_by(64) {
        let line = std::ptr::from_ref(value).cast::<u8>().wrapping_add(offset);
        // SAFETY: a prefetch has no effect on memory. Processors of this kind that do not know this one ignore it.
        unsafe { std::arch::asm!("prefetchw [{}]", in(reg) line, options(nostack, preserves_flags, readonly)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = value;
}

enum Home {
    /// A buffer of a pool's region.
    Pool(Arc<PoolShared>),
    /// Memory of its own from the global allocator.
    Heap,
    /// Somebody else's memory, borrowed under the contract of [`Buffers::view`].
    View,
    /// Somebody else's memory, which lives as long as this does.
    Lent(#[expect(dead_code, reason = "held for its end")] Arc<dyn Any + Send + Sync>),
}

/// One contiguous piece of payload memory, exclusively owned.
pub struct Buffer {
    ptr: NonNull<u8>,
    /// Bytes usable through `deref`.
    len: u32,
    /// Bytes owned; equals a class size for pool buffers.
    capacity: u32,
    /// All of the capacity is known to be zeroes. Whoever can write to it, or has a device do so, gets the address from
    /// [`Buffer::as_mut_ptr`] or a mutable slice, which forget it. Never of memory that is somebody else's.
    zeroes: bool,
    home: Home,
}

// SAFETY: a Buffer owns its bytes exclusively (or by the contract of `Buffers::view`), like a Box<[u8]>.
unsafe impl Send for Buffer {}
// SAFETY: shared references only permit reads.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// A zeroed buffer of its own, outside any pool, aligned to [`ALIGNMENT`].
    ///
    /// # Panics
    /// If `len` is above `u32::MAX`.
    pub fn heap(len: usize) -> Buffer {
        let capacity = u32::try_from(len.max(1)).expect("a buffer is shorter than 4 GiB");
        let layout = Buffer::heap_layout(capacity);
        // SAFETY: the layout has a size of at least one byte.
        let Some(ptr) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        Buffer { ptr, len: len as u32, capacity, zeroes: true, home: Home::Heap }
    }

    /// `len` bytes at `ptr` that belong to `owner`, which is kept until the buffer is dropped.
    ///
    /// # Safety
    /// The bytes must be initialised, and valid for reading and writing, for as long as `owner` lives; and nobody in this
    /// process may access them in another way while the buffer lives.
    ///
    /// # Panics
    /// If `len` is above `u32::MAX`.
    pub unsafe fn lent(ptr: NonNull<u8>, len: usize, owner: Arc<dyn Any + Send + Sync>) -> Buffer {
        let len = u32::try_from(len).expect("a buffer is shorter than 4 GiB");
        Buffer { ptr, len, capacity: len, zeroes: false, home: Home::Lent(owner) }
    }

    fn heap_layout(capacity: u32) -> Layout {
        Layout::from_size_align(capacity as usize, ALIGNMENT).expect("a buffer's layout is valid")
    }

    /// Bytes that the buffer could hold.
    pub fn capacity(&self) -> usize {
        self.capacity as usize
    }

    /// Address of the first byte, for handing to the kernel or a device. Asked for anew each time that the bytes may be
    /// written through it.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.zeroes = false;
        self.ptr.as_ptr()
    }

    /// Whether these bytes lie in the region of `region` (and so inside its registration).
    pub fn in_region(&self, region: &Region) -> bool {
        let start = self.ptr.as_ptr() as usize;
        start >= region.base && start + self.capacity as usize <= region.base + region.bytes
    }
}

impl Deref for Buffer {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` is valid for `len <= capacity` initialised bytes (mappings and heap start zeroed).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len as usize) }
    }
}

impl DerefMut for Buffer {
    #[inline]
    fn deref_mut(&mut self) -> &mut [u8] {
        self.zeroes = false;
        // SAFETY: as for `deref`, and the buffer is exclusively borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len as usize) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match std::mem::replace(&mut self.home, Home::View) {
            Home::View | Home::Lent(_) => {}
            // SAFETY: allocated in `heap` with exactly this layout.
            Home::Heap => unsafe { dealloc(self.ptr.as_ptr(), Buffer::heap_layout(self.capacity)) },
            Home::Pool(shared) => {
                let mut returned = shared.returned.lock().unwrap_or_else(PoisonError::into_inner);
                if !returned.closed {
                    let buffer = Buffer {
                        ptr: self.ptr,
                        len: self.capacity,
                        capacity: self.capacity,
                        zeroes: self.zeroes,
                        home: Home::Pool(Arc::clone(&shared)),
                    };
                    returned.buffers.push(buffer);
                }
            }
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} of {} bytes)", self.len, self.capacity)
    }
}

/// An owned scatter list: the payload of one command. Segments other than the last are full.
///
/// It is one word: lists change hands several times a command, inside of requests, events and completions, and a processor that
/// copies a structure right after its parts were written waits for all stores before them.
#[derive(Default)]
pub struct Buffers(Option<Box<List>>);

/// What a list is of.
#[derive(Default)]
struct List {
    segments: SmallVec<[Buffer; 2]>,
    len: u32,
}

/// Lists without segments that a thread keeps for its next ones at most: as many as a reactor has buffers.
const MAX_SPARE_LISTS: usize = 4096;

thread_local! {
    // Boxed because that is how they travel.
    #[allow(clippy::vec_box)]
    static SPARE_LISTS: RefCell<Vec<Box<List>>> = const { RefCell::new(Vec::new()) };
}

impl Drop for Buffers {
    #[inline]
    fn drop(&mut self) {
        if let Some(mut list) = self.0.take() {
            list.segments.clear();
            list.len = 0;
            // A thread that ends has no place for it.
            let _ = SPARE_LISTS.try_with(|spare| {
                let mut spare = spare.borrow_mut();
                if spare.len() < MAX_SPARE_LISTS {
                    spare.push(list);
                }
            });
        }
    }
}

impl Buffers {
    /// An empty list.
    #[inline]
    pub const fn new() -> Buffers {
        Buffers(None)
    }

    #[inline]
    fn list(&mut self) -> &mut List {
        let spare = || SPARE_LISTS.try_with(|spare| spare.borrow_mut().pop()).ok().flatten().unwrap_or_default();
        self.0.get_or_insert_with(spare)
    }

    #[inline]
    fn buffers(&self) -> &[Buffer] {
        self.0.as_ref().map_or(&[], |list| &list.segments)
    }

    /// Zeroed memory of its own, outside any pool, in one segment. For control paths and tests.
    pub fn heap(len: usize) -> Buffers {
        let mut list = Buffers::new();
        if len > 0 {
            list.push(Buffer::heap(len));
        }
        list
    }

    /// Appends a buffer with all of its present length.
    ///
    /// # Panics
    /// If the total would pass `u32::MAX` bytes.
    pub fn push(&mut self, buffer: Buffer) {
        let list = self.list();
        list.len = list.len.checked_add(buffer.len).expect("a scatter list is shorter than 4 GiB");
        list.segments.push(buffer);
    }

    /// Payload bytes in all segments together.
    #[inline]
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |list| list.len as usize)
    }

    /// Whether there is no payload.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether any of it is somebody else's memory, lent by [`Buffers::view`]: it must not be kept past the lender's contract.
    pub fn has_views(&self) -> bool {
        self.buffers().iter().any(|buffer| matches!(buffer.home, Home::View))
    }

    /// Number of segments.
    pub fn segment_count(&self) -> usize {
        self.buffers().len()
    }

    /// The segments in order.
    pub fn segments(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.buffers().iter().map(|b| &**b)
    }

    /// The segments in order, writable.
    pub fn segments_mut(&mut self) -> impl ExactSizeIterator<Item = &mut [u8]> {
        self.buffers_mut().iter_mut().map(|b| &mut **b)
    }

    /// The buffers themselves, for registration checks and addresses.
    #[inline]
    pub fn buffers_mut(&mut self) -> &mut [Buffer] {
        self.0.as_mut().map_or(&mut [], |list| &mut list.segments)
    }

    /// Takes the buffers out, leaving an empty list.
    pub fn drain(&mut self) -> impl Iterator<Item = Buffer> {
        self.0.as_mut().into_iter().flat_map(|list| {
            list.len = 0;
            list.segments.drain(..)
        })
    }

    /// The contiguous bytes from `offset` to the end of the segment that holds it; empty at the end.
    pub fn slice_at(&self, offset: usize) -> &[u8] {
        let mut start = 0;
        for segment in self.buffers() {
            if offset < start + segment.len() {
                return &segment[offset - start..];
            }
            start += segment.len();
        }
        &[]
    }

    /// As [`Buffers::slice_at`], writable.
    pub fn slice_at_mut(&mut self, offset: usize) -> &mut [u8] {
        let mut start = 0;
        for segment in self.buffers_mut() {
            let len = segment.len();
            if offset < start + len {
                return &mut segment[offset - start..];
            }
            start += len;
        }
        &mut []
    }

    /// Copies `bytes` into the payload at `offset`.
    ///
    /// # Panics
    /// If the range passes the end of the payload.
    pub fn write_at(&mut self, mut offset: usize, mut bytes: &[u8]) {
        assert!(offset.saturating_add(bytes.len()) <= self.len(), "write past the end of a payload");
        while !bytes.is_empty() {
            let room = self.slice_at_mut(offset);
            let n = room.len().min(bytes.len());
            room[..n].copy_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            offset += n;
        }
    }

    /// Copies from the payload at `offset` into `out`.
    ///
    /// # Panics
    /// If the range passes the end of the payload.
    pub fn read_at(&self, mut offset: usize, mut out: &mut [u8]) {
        assert!(offset.saturating_add(out.len()) <= self.len(), "read past the end of a payload");
        while !out.is_empty() {
            let have = self.slice_at(offset);
            let n = have.len().min(out.len());
            out[..n].copy_from_slice(&have[..n]);
            out = &mut out[n..];
            offset += n;
        }
    }

    /// Sets every payload byte to `value`.
    pub fn fill(&mut self, value: u8) {
        for segment in self.buffers_mut() {
            segment.fill(value);
        }
    }

    /// Makes every payload byte zero. Buffers that still are what the last call left cost nothing: devices that have nothing
    /// written would otherwise fill the same memory over and over.
    #[inline]
    pub fn zero(&mut self) {
        for buffer in self.buffers_mut() {
            if !buffer.zeroes {
                buffer.fill(0);
                buffer.zeroes = buffer.len == buffer.capacity && matches!(buffer.home, Home::Pool(_) | Home::Heap);
            }
        }
    }

    /// The payload in one vector. For control paths and tests.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.len()];
        self.read_at(0, &mut out);
        out
    }

    /// Shortens the payload to `len` bytes; buffers past the end go home.
    pub fn truncate(&mut self, len: usize) {
        let Some(list) = &mut self.0 else { return };
        let mut left = len.min(list.len as usize);
        list.len = left as u32;
        let mut keep = 0;
        for segment in &mut list.segments {
            if left == 0 {
                break;
            }
            let n = segment.len().min(left);
            segment.len = n as u32;
            left -= n;
            keep += 1;
        }
        list.segments.truncate(keep);
    }

    /// Makes every segment as long as its buffer is: undoes [`Buffers::truncate`] for a list of one buffer. The bytes that come
    /// back are unspecified.
    ///
    /// # Panics
    /// If the total would pass `u32::MAX` bytes.
    pub fn widen(&mut self) {
        let Some(list) = &mut self.0 else { return };
        let mut len = 0u32;
        for segment in &mut list.segments {
            segment.len = segment.capacity;
            len = len.checked_add(segment.len).expect("a scatter list is shorter than 4 GiB");
        }
        list.len = len;
    }

    /// A second list over `len` bytes of this payload from `offset`, for handing a part of a parent's memory to a
    /// child operation.
    ///
    /// # Safety
    /// The parent list must outlive the view, must not be touched (read, written, truncated) while the view lives, and
    /// no two live views of it may overlap unless all of them are only read.
    ///
    /// # Panics
    /// If the range passes the end of the payload.
    pub unsafe fn view(&mut self, offset: usize, len: usize) -> Buffers {
        assert!(offset.saturating_add(len) <= self.len(), "view past the end of a payload");
        let mut view = Buffers::new();
        let mut done = 0;
        while done < len {
            let piece = self.slice_at_mut(offset + done);
            let n = piece.len().min(len - done);
            let ptr = NonNull::from(&mut *piece).cast::<u8>();
            view.push(Buffer { ptr, len: n as u32, capacity: n as u32, zeroes: false, home: Home::View });
            done += n;
        }
        view
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffers({} bytes in {})", self.len(), self.segment_count())
    }
}

impl From<&[u8]> for Buffers {
    fn from(bytes: &[u8]) -> Buffers {
        let mut list = Buffers::heap(bytes.len());
        list.write_at(0, bytes);
        list
    }
}

/// Where a pool's memory lies, for registering it with a device once.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Address of the first byte.
    pub base: usize,
    /// Length in bytes.
    pub bytes: usize,
}

/// How many buffers of one class are at home, and how often none was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassStats {
    /// Bytes of one buffer.
    pub buffer_bytes: usize,
    /// Buffers in the class.
    pub total: usize,
    /// Buffers at home now.
    pub free: usize,
    /// Buffers handed out so far.
    pub handed_out: u64,
    /// Requests that found none and had to wait.
    pub retries: u64,
}

/// One reactor's buffers. Not shared: it lives on its reactor.
pub struct BufferPool {
    shared: Arc<PoolShared>,
    free: [Vec<Buffer>; 3],
    totals: [usize; 3],
    retries: [u64; 3],
    handed_out: [u64; 3],
}

impl BufferPool {
    /// Maps the region and cuts it up.
    ///
    /// # Errors
    /// When the mapping is refused (address space limits).
    pub fn new(config: PoolConfig) -> io::Result<BufferPool> {
        let shared = Arc::new(PoolShared::map(config.bytes().max(ALIGNMENT))?);
        let mut offset = 0;
        let counts = config.counts();
        let free = [0, 1, 2].map(|class| {
            let size = CLASS_BYTES[class];
            let mut list = Vec::with_capacity(counts[class]);
            for _ in 0..counts[class] {
                // SAFETY: `offset + size <= config.bytes()`, inside the mapping; each piece is given out once.
                let ptr = unsafe { shared.base.add(offset) };
                let home = Home::Pool(Arc::clone(&shared));
                list.push(Buffer { ptr, len: size as u32, capacity: size as u32, zeroes: true, home });
                offset += size;
            }
            list.reverse();
            list
        });
        Ok(BufferPool { shared, free, totals: counts, retries: [0; 3], handed_out: [0; 3] })
    }

    /// The memory to register with a device.
    pub fn region(&self) -> Region {
        Region { base: self.shared.base.as_ptr() as usize, bytes: self.shared.bytes }
    }

    /// What keeps the memory of [`BufferPool::region`] mapped, for a device that it is registered with.
    pub fn memory_owner(&self) -> Arc<dyn Any + Send + Sync> {
        Arc::clone(&self.shared) as Arc<dyn Any + Send + Sync>
    }

    /// Payload memory of `len` bytes, contents unspecified (bytes of earlier payloads; never hand it to a peer
    /// unwritten). `None` when the pool has too few buffers at home: wait, in order, and try again.
    #[inline]
    pub fn alloc(&mut self, len: usize) -> Option<Buffers> {
        if len == 0 {
            return Some(Buffers::new());
        }
        if len <= CLASS_BYTES[0]
            && let Some(mut buffer) = self.free[0].pop()
        {
            buffer.len = len as u32;
            self.handed_out[0] += 1;
            let mut list = Buffers::new();
            list.push(buffer);
            return Some(list);
        }
        self.alloc_slow(len)
    }

    fn alloc_slow(&mut self, len: usize) -> Option<Buffers> {
        let mut list = self.try_alloc(len);
        if list.is_none() {
            self.collect_returned();
            list = self.try_alloc(len);
        }
        match &list {
            Some(list) => list.buffers().iter().for_each(|b| self.handed_out[exact_class(b.capacity())] += 1),
            None => self.retries[class_for(len)] += 1,
        }
        list
    }

    fn try_alloc(&mut self, len: usize) -> Option<Buffers> {
        let mut list = Buffers::new();
        let mut left = len;
        while left > 0 {
            // The smallest class that holds the rest in one piece; failing that the largest there is.
            let fit = (class_for(left)..3).chain((0..class_for(left)).rev()).find(|&c| !self.free[c].is_empty());
            let Some(mut buffer) = fit.and_then(|class| self.free[class].pop()) else {
                self.put(list);
                return None;
            };
            let n = buffer.capacity().min(left);
            buffer.len = n as u32;
            left -= n;
            list.push(buffer);
        }
        Some(list)
    }

    /// The largest payload that could ever be handed out, in bytes.
    pub fn max_payload(&self) -> usize {
        self.totals.iter().zip(CLASS_BYTES).map(|(n, size)| n * size).sum()
    }

    /// Whether buffers of `bytes` bytes together are at home. Those that were dropped elsewhere are brought in first when it
    /// depends on them.
    pub fn has_free(&mut self, bytes: usize) -> bool {
        let free = |pool: &Self| pool.free.iter().zip(CLASS_BYTES).map(|(list, size)| list.len() * size).sum::<usize>();
        if free(self) < bytes {
            self.collect_returned();
        }
        free(self) >= bytes
    }

    /// Gives memory back. Buffers of other pools and heap buffers find their own way home.
    #[inline]
    pub fn put(&mut self, mut list: Buffers) {
        let Some(list) = &mut list.0 else { return };
        list.len = 0;
        for mut buffer in list.segments.drain(..) {
            match &buffer.home {
                Home::Pool(shared) if Arc::ptr_eq(shared, &self.shared) => {
                    buffer.len = buffer.capacity;
                    self.free[exact_class(buffer.capacity())].push(buffer);
                }
                _ => drop(buffer),
            }
        }
    }

    fn collect_returned(&mut self) {
        let mut returned = self.shared.returned.lock().unwrap_or_else(PoisonError::into_inner);
        for buffer in returned.buffers.drain(..) {
            self.free[exact_class(buffer.capacity())].push(buffer);
        }
    }

    /// State of each class, smallest first.
    pub fn stats(&mut self) -> [ClassStats; 3] {
        self.collect_returned();
        [0, 1, 2].map(|c| ClassStats {
            buffer_bytes: CLASS_BYTES[c],
            total: self.totals[c],
            free: self.free[c].len(),
            handed_out: self.handed_out[c],
            retries: self.retries[c],
        })
    }

    /// Whether every buffer is at home.
    pub fn is_whole(&mut self) -> bool {
        self.stats().iter().all(|class| class.free == class.total)
    }
}

impl Drop for BufferPool {
    fn drop(&mut self) {
        let stray = {
            let mut returned = self.shared.returned.lock().unwrap_or_else(PoisonError::into_inner);
            returned.closed = true;
            std::mem::take(&mut returned.buffers)
        };
        for mut buffer in stray.into_iter().chain(self.free.iter_mut().flat_map(|list| list.drain(..))) {
            // The return list is closed: let go of the region without going through it.
            drop(std::mem::replace(&mut buffer.home, Home::View));
        }
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let free = [self.free[0].len(), self.free[1].len(), self.free[2].len()];
        f.debug_struct("BufferPool").field("free", &free).field("totals", &self.totals).finish()
    }
}

fn class_for(len: usize) -> usize {
    CLASS_BYTES.iter().position(|&size| len <= size).unwrap_or(2)
}

fn exact_class(capacity: usize) -> usize {
    CLASS_BYTES.iter().position(|&size| size == capacity).expect("a pool buffer has a class size")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> BufferPool {
        BufferPool::new(PoolConfig { small: 4, medium: 2, large: 1 }).unwrap()
    }

    #[test]
    fn payloads_fit_the_smallest_class_and_come_home() {
        let mut pool = pool();
        for len in [1, 4096, 4097, 16384, 16385, 131_072] {
            let list = pool.alloc(len).unwrap();
            assert_eq!((list.len(), list.segment_count()), (len, 1));
            assert_eq!(list.slice_at(0).as_ptr() as usize % ALIGNMENT, 0);
            pool.put(list);
            assert!(pool.is_whole());
        }
    }

    #[test]
    fn zeroes_stay_known_until_somebody_may_write() {
        let mut pool = pool();
        let writers: [fn(&mut Buffers); 6] = [
            |list| list.write_at(100, &[1]),
            |list| list.fill(1),
            |list| list.slice_at_mut(5)[0] = 1,
            |list| list.segments_mut().for_each(|segment| segment[0] = 1),
            // SAFETY: the address is of 4096 bytes that are borrowed exclusively.
            |list| unsafe { list.buffers_mut()[0].as_mut_ptr().write(1) },
            // SAFETY: the list is not touched while the view lives.
            |list| unsafe { list.view(10, 20) }.write_at(3, &[1]),
        ];
        for write in writers {
            let mut list = pool.alloc(4096).unwrap();
            list.zero();
            assert!(list.buffers()[0].zeroes);
            pool.put(list);
            let mut list = pool.alloc(4096).unwrap();
            assert!(list.buffers()[0].zeroes, "it is the buffer that came last");
            write(&mut list);
            assert!(list.to_vec().contains(&1) && !list.buffers()[0].zeroes);
            // A part of it does not make the whole of it known.
            list.truncate(200);
            list.zero();
            assert!(!list.buffers()[0].zeroes);
            list.widen();
            list.zero();
            assert_eq!(list.to_vec(), [0; 4096]);
            pool.put(list);
        }
    }

    #[test]
    fn a_payload_larger_than_any_class_is_scattered() {
        let mut pool = pool();
        let mut list = pool.alloc(131_072 + 16_384 + 100).unwrap();
        assert_eq!(list.len(), 131_072 + 16_384 + 100);
        assert!(list.segment_count() >= 2);
        let bytes: Vec<u8> = (0..list.len()).map(|i| i as u8).collect();
        list.write_at(0, &bytes);
        assert_eq!(list.to_vec(), bytes);
        let mut middle = [0; 300];
        list.read_at(131_000, &mut middle);
        assert_eq!(middle[..], bytes[131_000..131_300]);
    }

    #[test]
    fn exhaustion_is_none_and_keeps_nothing() {
        let mut pool = pool();
        let max = pool.max_payload();
        assert!(pool.alloc(max + 1).is_none());
        assert!(pool.is_whole());
        let all = pool.alloc(max).unwrap();
        assert!(pool.alloc(1).is_none());
        pool.put(all);
        assert_eq!(pool.stats()[0].retries, 1);
        assert_eq!(pool.stats().map(|class| class.handed_out), pool.totals.map(|total| total as u64));
        assert!(pool.alloc(1).is_some());
    }

    #[test]
    fn a_buffer_dropped_on_another_thread_comes_home() {
        let mut pool = pool();
        let lists: Vec<_> = (0..4).map(|_| pool.alloc(4096).unwrap()).collect();
        std::thread::spawn(move || drop(lists)).join().unwrap();
        assert!(pool.is_whole());
    }

    #[test]
    fn what_was_dropped_counts_as_free() {
        let mut pool = BufferPool::new(PoolConfig { small: 2, medium: 0, large: 0 }).unwrap();
        let (kept, dropped) = (pool.alloc(4096).unwrap(), pool.alloc(4096).unwrap());
        drop(dropped);
        assert!(pool.has_free(4096));
        assert!(!pool.has_free(4097));
        pool.put(kept);
        assert!(pool.has_free(8192));
    }

    #[test]
    fn buffers_outlive_their_pool() {
        let mut pool = pool();
        let mut list = pool.alloc(4096).unwrap();
        drop(pool);
        list.fill(7);
        assert!(list.to_vec().iter().all(|&b| b == 7));
    }

    #[test]
    fn truncation_sends_whole_buffers_home() {
        let mut pool = pool();
        let mut list = pool.alloc(131_072 + 4096).unwrap();
        list.truncate(10);
        assert_eq!((list.len(), list.segment_count()), (10, 1));
        list.widen();
        assert_eq!((list.len(), list.slice_at(0).len()), (131_072, 131_072));
        pool.put(list);
        assert!(pool.is_whole());
    }

    #[test]
    fn a_view_reaches_the_parents_bytes() {
        let mut pool = pool();
        let mut list = pool.alloc(131_072 + 4096).unwrap();
        list.fill(0);
        // SAFETY: the parent is not touched until the view is gone.
        let mut view = unsafe { list.view(131_070, 4) };
        assert!(view.has_views());
        view.write_at(0, &[1, 2, 3, 4]);
        drop(view);
        let mut out = [0; 6];
        list.read_at(131_069, &mut out);
        assert_eq!(out, [0, 1, 2, 3, 4, 0]);
        assert!(!list.has_views());
    }
}
