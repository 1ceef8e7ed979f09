//! The memory that target and process share: making it, mapping it, reaching into it.
//!
//! The only place that dereferences shared memory. No Rust reference to shared payload is ever made on the target's side:
//! bytes are copied between raw addresses, and whatever the other side does to them meanwhile, they are bytes. Words are
//! atomics. The file is sealed against shrinking before anybody else sees it, so no access can raise SIGBUS; punching
//! holes into it gives zeroes.

#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use reactor::Buffer;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use super::ring::Words;
use crate::layout::Shape;

const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A session's memory in this process's address space.
#[derive(Debug)]
pub(crate) struct Memory {
    base: NonNull<u8>,
    shape: Shape,
    /// On the heap instead of in a file: both sides are in this process.
    heap: bool,
}

// SAFETY: the mapping is reached through atomics and raw copies only, from whatever thread; it is unmapped when nobody
// refers to this value any more.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Makes memory of `shape`, all zeroes, and the file to pass on.
    ///
    /// # Errors
    /// When the host is out of descriptors or address space.
    pub(crate) fn create(shape: Shape) -> io::Result<(Memory, OwnedFd)> {
        let file = memfd_create("ringstone-appliance", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, shape.bytes() as u64)?;
        fcntl_add_seals(&file, SEALS)?;
        Ok((Memory::map(&file, shape)?, file))
    }

    /// Maps memory that the other side made.
    ///
    /// # Errors
    /// `InvalidData` when the file is not as long as `shape`, or could be made shorter; else as the host says.
    pub(crate) fn open(file: impl AsFd, shape: Shape) -> io::Result<Memory> {
        let bytes = u64::try_from(fstat(&file)?.st_size).unwrap_or(0);
        if bytes != shape.bytes() as u64 || !fcntl_get_seals(&file)?.contains(SEALS) {
            let text = format!("the memory has {bytes} bytes, not {}, or is not sealed", shape.bytes());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Memory::map(file, shape)
    }

    fn map(file: impl AsFd, shape: Shape) -> io::Result<Memory> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of this process.
        let base = unsafe { mmap(std::ptr::null_mut(), shape.bytes(), access, MapFlags::SHARED, file, 0)? };
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::other("mmap returned a null address"))?;
        Ok(Memory { base, shape, heap: false })
    }

    /// Memory of `shape` for both sides in one process, all zeroes.
    pub(crate) fn heap(shape: Shape) -> Memory {
        let layout = Memory::layout(&shape);
        // SAFETY: a shape has at least a page.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) });
        Memory { base: base.unwrap_or_else(|| handle_alloc_error(layout)), shape, heap: true }
    }

    fn layout(shape: &Shape) -> Layout {
        Layout::from_size_align(shape.bytes(), 4096).expect("a shape's size is far below the address space's")
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The words of `lane`.
    pub(crate) fn lane(self: &Arc<Self>, lane: u32) -> SharedWords {
        let (offset, words) = self.shape.words(lane);
        SharedWords { memory: Arc::clone(self), offset, words }
    }

    /// The heads of the workers.
    pub(crate) fn heads(self: &Arc<Self>) -> SharedWords {
        let (offset, words) = self.shape.heads();
        SharedWords { memory: Arc::clone(self), offset, words }
    }

    /// Address of `len` bytes of a slot's payload.
    fn payload(&self, lane: u32, slot: u32, len: usize) -> *mut u8 {
        assert!(len <= self.shape.slot_bytes() as usize, "{len} bytes in a slot of {}", self.shape.slot_bytes());
        // SAFETY: `Shape::payload` is the offset of a whole slot inside the mapping.
        unsafe { self.base.as_ptr().add(self.shape.payload(lane, slot)) }
    }

    /// Copies the segments, one after another, into the payload of a slot.
    ///
    /// # Panics
    /// If they are longer than a slot.
    pub(crate) fn copy_in<'a>(&self, lane: u32, slot: u32, segments: impl Iterator<Item = &'a [u8]>) {
        let mut done = 0;
        for bytes in segments {
            let to = self.payload(lane, slot, done + bytes.len());
            // SAFETY: `done + bytes.len()` bytes from `to` are in the slot; the source is a slice of this process, which
            // the mapping does not overlap. The other process may access the same bytes: they have no meaning here.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.add(done), bytes.len()) };
            done += bytes.len();
        }
    }

    /// Copies the payload of a slot into the segments, one after another.
    ///
    /// # Panics
    /// If they are longer than a slot.
    pub(crate) fn copy_out<'a>(&self, lane: u32, slot: u32, segments: impl Iterator<Item = &'a mut [u8]>) {
        let mut done = 0;
        for bytes in segments {
            let from = self.payload(lane, slot, done + bytes.len());
            // SAFETY: as in `copy_in`, the other way round. Any bytes are valid bytes.
            unsafe { std::ptr::copy_nonoverlapping(from.add(done), bytes.as_mut_ptr(), bytes.len()) };
            done += bytes.len();
        }
    }

    /// The payload of a slot as a buffer, for the process's side: the target leaves the slot alone until the request in it
    /// was answered.
    pub(crate) fn lend(self: &Arc<Self>, lane: u32, slot: u32, len: usize) -> Buffer {
        let ptr = NonNull::new(self.payload(lane, slot, len)).expect("a mapping is not at address 0");
        let owner: Arc<dyn Any + Send + Sync> = Arc::clone(self) as _;
        // SAFETY: the bytes lie in the mapping, which `owner` keeps; the caller has the slot's only request.
        unsafe { Buffer::lent(ptr, len, owner) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.heap {
            // SAFETY: it was allocated with this layout, and nobody refers to it any more.
            return unsafe { dealloc(self.base.as_ptr(), Memory::layout(&self.shape)) };
        }
        // SAFETY: the mapping was made here with this length, and nobody refers to it any more.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.shape.bytes()) };
    }
}

/// The words of one lane, or the heads of the workers.
#[derive(Clone, Debug)]
pub(crate) struct SharedWords {
    memory: Arc<Memory>,
    offset: usize,
    words: usize,
}

impl SharedWords {
    #[inline]
    fn word(&self, word: usize) -> &AtomicU64 {
        assert!(word < self.words, "word {word} of {}", self.words);
        // SAFETY: the word lies inside the mapping, aligned (heads and lanes begin on pages), and lives as long as `memory`. It is
        // only ever accessed atomically in this process.
        unsafe { AtomicU64::from_ptr(self.memory.base.as_ptr().add(self.offset + word * 8).cast()) }
    }

    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }
}

impl Words for SharedWords {
    #[inline]
    fn load(&self, word: usize, order: Ordering) -> u64 {
        self.word(word).load(order)
    }
    #[inline]
    fn store(&self, word: usize, value: u64, order: Ordering) {
        self.word(word).store(value, order);
    }
    #[inline]
    fn swap(&self, word: usize, value: u64, order: Ordering) -> u64 {
        self.word(word).swap(value, order)
    }
    #[inline]
    fn add(&self, word: usize, value: u64, order: Ordering) -> u64 {
        self.word(word).fetch_add(value, order)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_see_the_same_and_nobody_can_shrink_it() {
        let shape = Shape::new(2, 1, 4, 8192).unwrap();
        let (a, file) = Memory::create(shape).unwrap();
        let (a, b) = (Arc::new(a), Arc::new(Memory::open(&file, shape).unwrap()));
        a.lane(1).store(7, 42, Ordering::Release);
        assert_eq!(b.lane(1).load(7, Ordering::Acquire), 42);
        assert_eq!(b.lane(0).load(7, Ordering::Acquire), 0);
        a.copy_in(1, 3, [&[1u8; 5000][..], &[2; 3192]].into_iter());
        let (mut x, mut y) = ([0u8; 4999], [0u8; 3193]);
        b.copy_out(1, 3, [&mut x[..], &mut y[..]].into_iter());
        assert!(x.iter().all(|&byte| byte == 1) && y[0] == 1 && y[1..].iter().all(|&byte| byte == 2));
        assert!(ftruncate(&file, 0).is_err());
        assert!(ftruncate(&file, shape.bytes() as u64 * 2).is_err());
    }

    #[test]
    fn memory_of_another_length_or_unsealed_is_not_mapped() {
        let shape = Shape::new(1, 1, 4, 4096).unwrap();
        let (_, file) = Memory::create(shape).unwrap();
        assert!(Memory::open(&file, Shape::new(1, 1, 8, 4096).unwrap()).is_err());
        let bare = memfd_create("bare", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&bare, shape.bytes() as u64).unwrap();
        assert!(Memory::open(&bare, shape).is_err());
    }

    #[test]
    #[should_panic(expected = "in a slot of")]
    fn nothing_is_copied_past_a_slot() {
        let (memory, _file) = Memory::create(Shape::new(1, 1, 1, 4096).unwrap()).unwrap();
        memory.copy_in(0, 0, [&[0u8; 4097][..]].into_iter());
    }

    #[test]
    fn a_lent_buffer_keeps_the_memory() {
        let (memory, _file) = Memory::create(Shape::new(1, 1, 2, 4096).unwrap()).unwrap();
        let memory = Arc::new(memory);
        let mut buffer = memory.lend(0, 1, 512);
        let weak = Arc::downgrade(&memory);
        drop(memory);
        buffer.fill(9);
        assert_eq!(weak.upgrade().map(|memory| memory.shape().depth()), Some(2));
        drop(buffer);
        assert!(weak.upgrade().is_none());
    }
}
