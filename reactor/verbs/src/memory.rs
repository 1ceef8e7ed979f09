//! Protection domains, and memory that a device may use.

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use reactor::BufferPool;

use crate::device::Context;
use crate::error::{Error, Result};
use crate::raw;

/// What queue pairs and memory have to share to work together.
pub struct ProtectionDomain {
    context: Arc<Context>,
    raw: NonNull<raw::ibv_pd>,
}

// SAFETY: verbs are safe for use from several threads; destruction is exclusive, since whatever is made of a domain holds it.
unsafe impl Send for ProtectionDomain {}
// SAFETY: as above.
unsafe impl Sync for ProtectionDomain {}

impl ProtectionDomain {
    /// A new one.
    ///
    /// # Errors
    /// When the device has no more of them, or is gone.
    pub fn new(context: &Arc<Context>) -> Result<Arc<ProtectionDomain>> {
        // SAFETY: the context is open.
        let raw = unsafe { (context.libraries().ibv.ibv_alloc_pd)(context.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(|| Error::last("ibv_alloc_pd"))?;
        Ok(Arc::new(ProtectionDomain { context: Arc::clone(context), raw }))
    }

    /// The device.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    pub(crate) fn as_ptr(&self) -> *mut raw::ibv_pd {
        self.raw.as_ptr()
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once, after all that was made of it.
        unsafe { (self.context.libraries().ibv.ibv_dealloc_pd)(self.raw.as_ptr()) };
    }
}

impl fmt::Debug for ProtectionDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProtectionDomain").field("device", &self.context.info().name).finish()
    }
}

/// Who may access registered memory, besides this process and its own sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Receives and RDMA READs of this side write it; no peer reaches it by a key.
    Local,
    /// A peer that was told the key may read and write it.
    Remote,
}

/// One registered stretch of memory: one for each slab of buffers, never one for each transfer.
///
/// The pages stay locked, and what owns the memory stays alive, until this is dropped.
pub struct MemoryRegion {
    domain: Arc<ProtectionDomain>,
    raw: NonNull<raw::ibv_mr>,
    base: usize,
    bytes: usize,
    lkey: u32,
    rkey: u32,
    access: Access,
    /// Dropped after the registration has ended.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: a registration is two keys and a handle; see ProtectionDomain for destruction.
unsafe impl Send for MemoryRegion {}
// SAFETY: as above.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    /// Registers all of a pool's memory.
    ///
    /// # Errors
    /// When the memlock limit forbids it, or the device cannot have so much.
    pub fn of_pool(domain: &Arc<ProtectionDomain>, pool: &BufferPool, access: Access) -> Result<MemoryRegion> {
        let region = pool.region();
        // SAFETY: the pool's mapping, which its owner keeps. Its bytes are only reached through buffers, and whoever posts
        // work on them gives the buffer away until the work is done.
        unsafe { MemoryRegion::register(domain, region.base, region.bytes, access, pool.memory_owner()) }
    }

    /// Registers `bytes` bytes at `base`, which belong to `owner`.
    ///
    /// # Errors
    /// As [`MemoryRegion::of_pool`].
    ///
    /// # Safety
    /// The memory is mapped while `owner` lives. A peer that is told the key of [`Access::Remote`] memory accesses it at any
    /// time: then nobody in this process may hold references to it that this would break.
    pub unsafe fn register(
        domain: &Arc<ProtectionDomain>,
        base: usize,
        bytes: usize,
        access: Access,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<MemoryRegion> {
        let flags = match access {
            Access::Local => raw::IBV_ACCESS_LOCAL_WRITE,
            Access::Remote => raw::IBV_ACCESS_LOCAL_WRITE | raw::IBV_ACCESS_REMOTE_READ | raw::IBV_ACCESS_REMOTE_WRITE,
        };
        let libraries = domain.context.libraries();
        // SAFETY: the domain is open; by the caller's promise the memory is mapped, and `owner` is held while registered.
        let raw = unsafe {
            (libraries.hidden.ibv_reg_mr)(domain.as_ptr(), base as *mut libc::c_void, bytes, flags.cast_signed())
        };
        let raw = NonNull::new(raw).ok_or_else(|| Error::last("ibv_reg_mr"))?;
        // SAFETY: the library made it; the keys do not change.
        let (lkey, rkey) = unsafe { (raw.as_ref().lkey, raw.as_ref().rkey) };
        Ok(MemoryRegion { domain: Arc::clone(domain), raw, base, bytes, lkey, rkey, access, _owner: owner })
    }

    /// The key for this side's work requests.
    pub fn lkey(&self) -> u32 {
        self.lkey
    }

    /// The key for the peer's.
    pub fn rkey(&self) -> u32 {
        self.rkey
    }

    /// Whether peers that are told the key can use it.
    pub fn is_remote(&self) -> bool {
        self.access == Access::Remote
    }

    /// Whether `bytes` bytes at `address` lie in it.
    pub fn contains(&self, address: usize, bytes: usize) -> bool {
        address >= self.base && bytes <= self.bytes && address - self.base <= self.bytes - bytes
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: made by `register`, ended once, before the memory's owner is let go.
        unsafe { (self.domain.context.libraries().ibv.ibv_dereg_mr)(self.raw.as_ptr()) };
    }
}

impl fmt::Debug for MemoryRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRegion")
            .field("base", &format_args!("{:#x}", self.base))
            .field("bytes", &self.bytes)
            .finish()
    }
}
