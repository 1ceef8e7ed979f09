//! The bundle of seams on which a reactor, and everything above it, stands.

use std::io;
use std::sync::Arc;

use crate::buffer::Region;
use crate::file::{FileEngine, Files};
use crate::net::Network;
use crate::park::Parker;
use crate::time::Clock;

/// The outside world: the operating system, or a simulator.
pub trait Platform: Send + Sync {
    /// The clock that all reactors of a process share.
    fn clock(&self) -> Arc<dyn Clock>;
    /// Sockets.
    fn network(&self) -> Arc<dyn Network>;
    /// Opening and inspecting files.
    fn files(&self) -> Arc<dyn Files>;
    /// A place for one reactor to sleep. Called on the reactor's thread.
    ///
    /// # Errors
    /// When the host is out of descriptors or memory.
    fn parker(&self) -> io::Result<Box<dyn Parker>>;
    /// Asynchronous file I/O for one reactor. Called on the reactor's thread; `parker` is told what to watch so that a
    /// completion wakes the reactor under [`file::ENGINE_TOKEN`](crate::file::ENGINE_TOKEN). `region` is payload
    /// memory to register.
    ///
    /// # Errors
    /// When no engine can be had at all.
    fn file_engine(&self, region: Region, parker: &mut dyn Parker) -> io::Result<Box<dyn FileEngine>>;
    /// Fills `bytes` with random bytes, for identifiers and jitter. A simulator's are reproducible.
    fn random(&self, bytes: &mut [u8]);
    /// Restricts the calling thread to `core`.
    ///
    /// # Errors
    /// When the core does not exist or is not allowed.
    fn pin(&self, core: usize) -> io::Result<()>;

    /// A random number.
    fn random_u64(&self) -> u64 {
        let mut bytes = [0; 8];
        self.random(&mut bytes);
        u64::from_ne_bytes(bytes)
    }
}
