//! The pool of one reactor.

use std::any::Any;
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use super::{ALIGNMENT, Buffer, Buffers, CLASS_BYTES, Home};

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
pub(super) struct PoolShared {
    base: NonNull<u8>,
    bytes: usize,
    pub(super) returned: Mutex<Returned>,
}

#[derive(Default)]
pub(super) struct Returned {
    pub(super) closed: bool,
    pub(super) buffers: Vec<Buffer>,
}

// SAFETY: the region is plain memory; `base` is only used to derive addresses and to unmap in `drop`.
unsafe impl Send for PoolShared {}
// SAFETY: as above; all mutable state is behind the mutex.
unsafe impl Sync for PoolShared {}

impl PoolShared {
    fn map(bytes: usize) -> io::Result<PoolShared> {
        use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
        // SAFETY: a fresh anonymous mapping chosen by the kernel aliases nothing.
        let base = unsafe {
            mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?
        };
        // SAFETY: the range is the mapping that was just made. Where there are no huge pages, ordinary ones do.
        let _ = unsafe { madvise(base, bytes, Advice::LinuxHugepage) };
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
    pub(super) totals: [usize; 3],
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
