//! The bundle of seams on which a reactor, and everything above it, stands.

use std::io;
use std::sync::Arc;

use crate::buffer::Region;
use crate::file::os::OsFiles;
use crate::file::{EngineChoice, FileEngine, Files, os_engine};
use crate::net::{Network, OsNetwork};
use crate::park::{EpollParker, Parker};
use crate::time::{Clock, OsClock};

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

/// The operating system.
#[derive(Clone, Debug, Default)]
pub struct OsPlatform {
    clock: Arc<OsClock>,
    engine: EngineChoice,
}

impl OsPlatform {
    /// The operating system, with file I/O by `engine`. The clock starts now.
    pub fn new(engine: EngineChoice) -> OsPlatform {
        OsPlatform { clock: Arc::default(), engine }
    }
}

impl Platform for OsPlatform {
    fn clock(&self) -> Arc<dyn Clock> {
        Arc::clone(&self.clock) as Arc<dyn Clock>
    }

    fn network(&self) -> Arc<dyn Network> {
        Arc::new(OsNetwork)
    }

    fn files(&self) -> Arc<dyn Files> {
        Arc::new(OsFiles)
    }

    fn parker(&self) -> io::Result<Box<dyn Parker>> {
        Ok(Box::new(EpollParker::new()?))
    }

    fn file_engine(&self, region: Region, parker: &mut dyn Parker) -> io::Result<Box<dyn FileEngine>> {
        os_engine(self.engine, region, parker)
    }

    fn random(&self, bytes: &mut [u8]) {
        let mut filled = 0;
        while filled < bytes.len() {
            match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
                Ok(n) => filled += n,
                Err(rustix::io::Errno::INTR) => {}
                // Linux has had it since 3.17; identifiers that are not random would collide unnoticed.
                Err(errno) => panic!("the host gives no random bytes: {errno}"),
            }
        }
    }

    fn pin(&self, core: usize) -> io::Result<()> {
        use rustix::thread::{CpuSet, sched_setaffinity};
        if core >= CpuSet::MAX_CPU {
            let text = format!("core {core} is beyond the {} that can be named", CpuSet::MAX_CPU);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let mut cores = CpuSet::new();
        cores.set(core);
        sched_setaffinity(None, &cores).map_err(|errno| {
            let text = format!("core {core} cannot be used: {errno} (does it exist, and may this process use it?)");
            io::Error::new(io::Error::from(errno).kind(), text)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_bytes_differ() {
        let platform = OsPlatform::default();
        let (mut a, mut b) = ([0; 300], [0; 300]);
        platform.random(&mut a);
        platform.random(&mut b);
        assert_ne!(a, b);
        assert_ne!(platform.random_u64(), platform.random_u64());
    }

    #[test]
    fn a_thread_pins_to_a_core_it_may_use_and_to_no_other() {
        let platform = OsPlatform::default();
        std::thread::spawn(move || {
            let allowed = rustix::thread::sched_getaffinity(None).unwrap();
            let core = (0..rustix::thread::CpuSet::MAX_CPU).find(|&c| allowed.is_set(c)).unwrap();
            platform.pin(core).unwrap();
            let now = rustix::thread::sched_getaffinity(None).unwrap();
            assert_eq!((now.count(), now.is_set(core)), (1, true));
            let error = platform.pin(rustix::thread::CpuSet::MAX_CPU - 1).unwrap_err();
            assert!(error.to_string().contains("cannot be used"), "{error}");
            assert!(platform.pin(usize::MAX).is_err());
        })
        .join()
        .unwrap();
    }
}
