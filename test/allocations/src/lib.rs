//! An allocator that counts what each thread takes, for tests that demand that a path takes nothing, or no more than it says.
//!
//! ```
//! #[global_allocator]
//! static ALLOCATOR: ringstone_allocations::Counting = ringstone_allocations::Counting;
//!
//! let before = ringstone_allocations::count();
//! drop(std::hint::black_box(vec![0u8; 100]));
//! assert!(ringstone_allocations::count() > before);
//! ```

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, with counters.
pub struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
    static BYTES: Cell<isize> = const { Cell::new(0) };
}

/// Allocations of this thread so far.
pub fn count() -> u64 {
    COUNT.with(Cell::get)
}

/// Bytes that this thread has taken and not given back. Negative when it has given back what others took.
pub fn bytes() -> isize {
    BYTES.with(Cell::get)
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|n| n.set(n.get() + 1));
        BYTES.with(|n| n.set(n.get() + layout.size() as isize));
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        BYTES.with(|n| n.set(n.get() - layout.size() as isize));
        // SAFETY: the caller keeps the contract of `dealloc`, and `ptr` came from the same allocator.
        unsafe { System.dealloc(ptr, layout) }
    }
}
