//! Payload memory: slabs of page-aligned buffers, handed out whole, and scatter lists of them.
//!
//! A [`BufferPool`] belongs to one reactor. It maps one region at start, so that the region can be registered once
//! with io_uring or an RDMA device, and cuts it into three size classes. Buffers leave and return last-in
//! first-out, which keeps the ones in use warm in the cache. The mapping takes huge pages where the host lets programs have
//! them (transparent huge pages: nothing is reserved, nobody has to be root), and none before a buffer in it is first used.
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

mod list;
mod pool;
mod prefetch;
pub mod slab;

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, PoisonError};

pub use list::Buffers;
use pool::PoolShared;
pub use pool::{BufferPool, ClassStats, PoolConfig, Region};
pub use prefetch::{prefetch, prefetch_for_write, prefetch_value};

/// Alignment of every buffer's first byte, in bytes: fits O_DIRECT on any block device.
pub const ALIGNMENT: usize = 4096;

/// Capacity of a buffer of each class, in bytes, smallest first.
pub const CLASS_BYTES: [usize; 3] = [4096, 16 * 1024, 128 * 1024];

enum Home {
    /// A buffer of a pool's region.
    Pool(Arc<PoolShared>),
    /// A piece of a slab.
    Slab(Arc<slab::Slab>),
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
            Home::Slab(slab) => slab.give_back(self.ptr),
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

#[cfg(test)]
mod tests;
