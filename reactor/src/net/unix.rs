//! Unix sockets and the files that they have.
//!
//! # Invariants
//! - A file that somebody answers on is never taken away; one that a killed process left is replaced. Looking at it and
//!   replacing it is one step to others that do it this way: the folder is locked meanwhile.
//! - Nobody but the owner can connect: the mode is 0600 before the socket listens.
//! - A [`SocketFile`] removes only the file that it made.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix};

use super::socket;

/// Bytes of a path that fit a socket's address, on Linux.
const MAX_PATH: usize = 107;

/// The file of a socket that listens; dropped, it is gone.
pub(super) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).ok() == Some(self.identity)
            && let Err(errno) = rustix::fs::unlink(&self.path)
        {
            tracing::warn!(path = %self.path.display(), error = %errno, "a socket's file could not be removed");
        }
    }
}

/// Device and inode, of the file itself.
fn identity(path: &Path) -> Result<(u64, u64), Errno> {
    let stat = rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok((stat.st_dev, stat.st_ino))
}

fn address(path: &Path) -> io::Result<SocketAddrUnix> {
    SocketAddrUnix::new(path).map_err(|errno| match errno {
        Errno::NAMETOOLONG => {
            let text = format!("the path is longer than the {MAX_PATH} bytes that a socket's address holds");
            io::Error::new(io::ErrorKind::InvalidInput, text)
        }
        other => other.into(),
    })
}

/// Starts to connect to the socket at `path`.
pub(super) fn connect(path: &Path) -> io::Result<OwnedFd> {
    let address = address(path)?;
    let socket = socket(AddressFamily::UNIX)?;
    rustix::net::connect(&socket, &address)?;
    Ok(socket)
}

/// Listens at `path`.
pub(super) fn listen(path: &Path, backlog: i32) -> io::Result<(OwnedFd, SocketFile)> {
    let address = address(path)?;
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let folder = rustix::fs::open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // Held for moments by whoever makes a socket here, and gone with the descriptor.
    rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive).map_err(|errno| match errno {
        Errno::WOULDBLOCK => {
            let text = "another process makes a socket in this folder just now; try again";
            io::Error::new(io::ErrorKind::ResourceBusy, text)
        }
        other => other.into(),
    })?;
    remove_stale(path, &address)?;
    let socket = socket(AddressFamily::UNIX)?;
    rustix::net::bind(&socket, &address)?;
    let file = SocketFile { path: path.to_owned(), identity: identity(path)? };
    rustix::fs::chmodat(CWD, path, Mode::RUSR | Mode::WUSR, AtFlags::empty())?;
    rustix::net::listen(&socket, backlog)?;
    Ok((socket, file))
}

/// Removes a socket's file that nobody answers on.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> io::Result<()> {
    let stat = match rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        let text = "there is something of that name already, and it is not a socket";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }
    let probe = socket(AddressFamily::UNIX)?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        Err(Errno::NOENT) => return Ok(()),
        // It took the connection, or has no room for it, or may not be asked: somebody has it.
        _ => return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")),
    }
    match rustix::fs::unlink(path) {
        Ok(()) => tracing::info!(path = %path.display(), "removed a socket that nobody answered on"),
        Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    Ok(())
}
