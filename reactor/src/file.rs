//! Asynchronous file I/O: the seam that bdevs see, and its engines.
//!
//! One [`FileEngine`] serves one reactor. A request hands its payload over; the engine keeps it while the operation is
//! under way and brings it back with the result, so no memory that the kernel may still write is ever in two hands.
//! Engines finish short transfers themselves: a completion is the whole operation or an error.
//!
//! | engine | module | when |
//! |---|---|---|
//! | io_uring | [`uring`] | the kernel offers it |
//! | thread pool | [`threads`] | it does not, or it was asked for |

pub mod os;
pub mod threads;
mod transfer;
pub mod uring;

use std::any::Any;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::buffer::{Buffers, Region};
use crate::park::{Parker, Source};

/// The token under which a reactor's parker reports its file engine.
pub const ENGINE_TOKEN: u64 = u64::MAX - 1;

/// Which engine a platform is to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// io_uring where the kernel offers it, threads where not.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// The thread pool.
    Threads,
}

/// What travels with a request: the memory that is read into or written from, and whatever its owner keeps with it.
pub trait Payload: Any + Send {
    /// The memory of the operation. Must be the same list at each call while the engine holds the payload.
    fn buffers(&mut self) -> &mut Buffers;
    /// For getting the concrete type back out of a completion.
    fn into_any(self: Box<Self>) -> Box<dyn Any + Send>;
}

/// An operation on an open file. Offsets and lengths are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileOp {
    /// Fills the payload from the file. A range that passes the end of the file fails with EIO, its payload zeroed there.
    Read,
    /// Writes the payload. With `durable`, it is on stable media before the completion.
    Write {
        /// Force unit access.
        durable: bool,
    },
    /// Everything that was completed before is on stable media (fdatasync).
    Sync,
    /// Deallocates `len` bytes; they read as zeroes afterwards where the file says so, otherwise undefined.
    Discard {
        /// Bytes.
        len: u64,
    },
    /// `len` bytes read as zeroes afterwards.
    WriteZeroes {
        /// Bytes.
        len: u64,
        /// Whether the space may be deallocated.
        may_unmap: bool,
    },
}

/// A file attached to one engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileSlot(pub u32);

/// One operation, with its payload.
pub struct FileRequest {
    /// The file.
    pub slot: FileSlot,
    /// What to do.
    pub op: FileOp,
    /// Where, in bytes from the file's start.
    pub offset: u64,
    /// Its memory; the engine keeps it until the completion.
    pub payload: Box<dyn Payload>,
    /// Comes back with the completion.
    pub token: u64,
}

/// The end of one operation.
pub struct FileDone {
    /// As in the request.
    pub token: u64,
    /// As in the request.
    pub payload: Box<dyn Payload>,
    /// Whole success, or the error number.
    pub result: Result<(), Errno>,
}

/// A host's error number, positive (`libc::EIO`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

/// Asynchronous file I/O for one reactor.
pub trait FileEngine {
    /// What is in use, for logs and reports: "io_uring, registered buffers", "threads", ...
    fn mode(&self) -> String;
    /// Makes `file` known to this engine.
    ///
    /// # Errors
    /// When the host refuses.
    fn attach(&mut self, file: Arc<dyn File>) -> io::Result<FileSlot>;
    /// Forgets a file.
    ///
    /// # Panics
    /// If operations on it are still under way.
    fn detach(&mut self, slot: FileSlot);
    /// Takes a request. Never refuses: what exceeds the device's queue waits inside, in order; the bound is the number
    /// of payloads that the caller's pool has.
    fn submit(&mut self, request: FileRequest);
    /// Hands what was submitted to the host: once a poll, after a batch of submissions.
    fn flush(&mut self);
    /// Appends finished operations to `out`; returns how many.
    fn reap(&mut self, out: &mut Vec<FileDone>) -> usize;
    /// Operations submitted and not yet reaped.
    fn in_flight(&self) -> usize;
}

/// How to open a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// Bypass the page cache where the file allows it; [`FileInfo::direct`] says whether it does.
    pub direct: bool,
}

/// What is known about an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// Size in bytes.
    pub bytes: u64,
    /// Smallest unit and alignment of I/O, in bytes; 1 where anything goes.
    pub io_unit: u32,
    /// Physical block size in bytes.
    pub physical_block: u32,
    /// A block device rather than a regular file.
    pub block_device: bool,
    /// I/O bypasses the page cache.
    pub direct: bool,
    /// [`FileOp::Discard`] does something.
    pub discard: bool,
    /// Discarded bytes read as zeroes.
    pub discard_zeroes: bool,
    /// [`FileOp::WriteZeroes`] works without writing payload.
    pub write_zeroes: bool,
    /// A completed write may still be lost by a power failure before the next sync.
    pub volatile_cache: bool,
}

/// An open file or block device. Shared by the channels of all reactors.
pub trait File: Send + Sync {
    /// Its path, for messages.
    fn path(&self) -> &Path;
    /// What an engine works on.
    fn source(&self) -> Source;
    /// What was found when it was opened.
    fn info(&self) -> FileInfo;
    /// Its size in bytes now.
    ///
    /// # Errors
    /// As the host says.
    fn bytes(&self) -> io::Result<u64>;
}

/// Opening, creating and replacing files: control-plane work, blocking, never on a reactor.
pub trait Files: Send + Sync {
    /// Opens an existing file or block device.
    ///
    /// # Errors
    /// As the host says.
    fn open(&self, path: &Path, options: OpenOptions) -> io::Result<Arc<dyn File>>;
    /// Creates a sparse file of `bytes` bytes, durably. An existing file is an error.
    ///
    /// # Errors
    /// `AlreadyExists`, or as the host says.
    fn create(&self, path: &Path, bytes: u64) -> io::Result<()>;
    /// Sets a regular file's size.
    ///
    /// # Errors
    /// As the host says.
    fn set_len(&self, path: &Path, bytes: u64) -> io::Result<()>;
    /// Reads a whole small file.
    ///
    /// # Errors
    /// As the host says; `FileTooLarge` above `max_bytes`.
    fn read(&self, path: &Path, max_bytes: u64) -> io::Result<Vec<u8>>;
    /// Replaces a small file's contents so that after a crash it has either the old or the new ones: temporary file,
    /// fsync, rename, fsync of the folder.
    ///
    /// # Errors
    /// As the host says; the old contents are then still there.
    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// Renames a file within its folder, durably.
    ///
    /// # Errors
    /// As the host says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
}

/// The path of a temporary file beside `path`, for replacing it.
pub fn temporary_beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".tmp");
    path.with_file_name(name)
}

/// An engine of the operating system for the calling thread's reactor. The memory of `region` must stay mapped while
/// the engine is used; `parker` will report completions under [`ENGINE_TOKEN`].
///
/// # Errors
/// When the engine asked for cannot be had, or with [`EngineChoice::Auto`] none.
pub fn os_engine(choice: EngineChoice, region: Region, parker: &mut dyn Parker) -> io::Result<Box<dyn FileEngine>> {
    let ring = match choice {
        EngineChoice::Threads => None,
        EngineChoice::Uring => Some(uring::UringEngine::new(region, parker).map_err(|error| {
            let hint = "see /proc/sys/kernel/io_uring_disabled and the container's seccomp profile";
            io::Error::new(error.kind(), format!("io_uring cannot be used: {error} ({hint})"))
        })?),
        EngineChoice::Auto => match uring::UringEngine::new(region, parker) {
            Ok(engine) => Some(engine),
            Err(error) => {
                tracing::warn!(%error, "io_uring cannot be used; file I/O runs on threads, which is slower");
                None
            }
        },
    };
    let engine: Box<dyn FileEngine> = match ring {
        Some(engine) => Box::new(engine),
        None => Box::new(threads::ThreadEngine::new(parker)?),
    };
    tracing::debug!(mode = engine.mode(), "file engine");
    Ok(engine)
}

#[cfg(test)]
mod tests;
