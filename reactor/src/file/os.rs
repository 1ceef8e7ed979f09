//! Files and block devices of the operating system.
//!
//! A file that is opened for writing is locked against every other opener that takes the lock (`flock`; block devices
//! are opened `O_EXCL` besides, which the kernel checks against mounts), so that two instances never write one volume.
//! Read-only openers share the lock. The lock goes with the [`OsFile`], even where the kernel still holds the open file
//! for a moment longer.

use std::fmt;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, FallocateFlags, FileType, FlockOperation, Mode, OFlags, StatxFlags};

use super::{File, FileInfo, Files, OpenOptions, temporary_beside};
use crate::buffer::Buffer;
use crate::park::Source;

/// `ioctl(fd, BLKGETSIZE64, &u64)`: `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: libc::Ioctl = {
    let size = size_of::<usize>() as libc::Ioctl;
    (2 << 30) | (size << 16) | (0x12 << 8) | 114
};
/// Mode of every file created: its owner's alone.
const PRIVATE: u32 = 0o600;
/// A device that was just closed may stay busy for a moment, until the kernel has let go of its last reference.
const BUSY_TRIES: u32 = 50;
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// Says which file an error is about, keeping its kind.
fn about(path: &Path, what: &str, error: impl Into<io::Error>) -> io::Error {
    let error = error.into();
    io::Error::new(error.kind(), format!("{}: {what}: {error}", path.display()))
}

/// An open file or block device.
pub struct OsFile {
    path: PathBuf,
    fd: OwnedFd,
    info: FileInfo,
}

impl OsFile {
    /// Opens `path`, locks it and finds out what it can do.
    ///
    /// # Errors
    /// With the path in the text: what it is, when it is neither a regular file nor a block device; that it is in use;
    /// or what the host says.
    pub fn open(path: &Path, options: OpenOptions) -> io::Result<OsFile> {
        let found = fs::metadata(path).map_err(|e| about(path, "cannot be opened", e))?.file_type();
        // Looked at before opening: opening a FIFO would block.
        if !found.is_file() && !found.is_block_device() {
            let text = format!("{}: is neither a regular file nor a block device", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let (fd, direct) = open_descriptor(path, options, found.is_block_device())?;
        lock(path, &fd, options)?;
        let stat = rustix::fs::fstat(&fd).map_err(|e| about(path, "cannot be examined", e))?;
        let info = match FileType::from_raw_mode(stat.st_mode) {
            FileType::BlockDevice => block_info(&fd, stat.st_rdev, direct),
            FileType::RegularFile => regular_info(&fd, options, direct),
            _ => Err(io::Error::other("it was replaced while it was being opened")),
        };
        let info = info.map_err(|e| about(path, "cannot be examined", e))?;
        Ok(OsFile { path: path.to_path_buf(), fd, info })
    }
}

impl Drop for OsFile {
    fn drop(&mut self) {
        // Said aloud, because an io_uring may keep the open file, and with it the lock, for a moment longer.
        let _ = rustix::fs::flock(&self.fd, FlockOperation::Unlock);
    }
}

impl File for OsFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn source(&self) -> Source {
        Source::Fd(self.fd.as_raw_fd())
    }

    fn info(&self) -> FileInfo {
        self.info
    }

    fn bytes(&self) -> io::Result<u64> {
        let size = if self.info.block_device { device_bytes(&self.fd) } else { regular_bytes(&self.fd) };
        size.map_err(|e| about(&self.path, "its size cannot be read", e))
    }
}

impl fmt::Debug for OsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OsFile").field("path", &self.path).field("info", &self.info).finish_non_exhaustive()
    }
}

/// Opens with `O_DIRECT` if asked for and allowed; says whether it was.
fn open_descriptor(path: &Path, options: OpenOptions, block_device: bool) -> io::Result<(OwnedFd, bool)> {
    let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY;
    flags |= if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    if block_device && !options.read_only {
        flags |= OFlags::EXCL;
    }
    let mut direct = options.direct;
    let mut busy = 0;
    loop {
        let asked = if direct { flags | OFlags::DIRECT } else { flags };
        match rustix::fs::open(path, asked, Mode::empty()) {
            Ok(fd) => return Ok((fd, direct)),
            Err(rustix::io::Errno::INVAL) if direct => direct = false,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::BUSY) if busy < BUSY_TRIES => {
                busy += 1;
                std::thread::sleep(BUSY_PAUSE);
            }
            Err(rustix::io::Errno::BUSY) => {
                let text = format!("{}: the device is mounted or in use by another program", path.display());
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
            }
            Err(errno) => return Err(about(path, "cannot be opened", errno)),
        }
    }
}

fn lock(path: &Path, fd: &OwnedFd, options: OpenOptions) -> io::Result<()> {
    let operation = if options.read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match rustix::fs::flock(fd, operation) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let text = format!(
                "{}: already open elsewhere; close the volume there, or stop the other instance that serves it",
                path.display()
            );
            Err(io::Error::new(io::ErrorKind::ResourceBusy, text))
        }
        // A file system without locks cannot protect against a second instance; it can still serve the first.
        Err(rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOLCK) => {
            tracing::warn!(path = %path.display(), "its file system has no locks; nothing stops a second opener");
            Ok(())
        }
        Err(errno) => Err(about(path, "cannot be locked", errno)),
    }
}

fn regular_bytes(fd: &OwnedFd) -> io::Result<u64> {
    let stat = rustix::fs::fstat(fd)?;
    u64::try_from(stat.st_size).map_err(|_| io::Error::other("the host reports a negative size"))
}

fn device_bytes(fd: &OwnedFd) -> io::Result<u64> {
    let mut bytes = 0u64;
    // SAFETY: the ioctl writes one u64 to the address given; `fd` is open.
    if unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(bytes)
}

fn regular_info(fd: &OwnedFd, options: OpenOptions, asked_direct: bool) -> io::Result<FileInfo> {
    let bytes = regular_bytes(fd)?;
    let stat = rustix::fs::fstat(fd)?;
    let (direct, unit) = if asked_direct { direct_unit(fd, bytes)? } else { (false, 1) };
    let discard = !options.read_only && can_punch(fd, bytes);
    Ok(FileInfo {
        bytes,
        io_unit: unit,
        physical_block: u32::try_from(stat.st_blksize).unwrap_or(4096).clamp(512, 1 << 20),
        block_device: false,
        direct,
        discard,
        discard_zeroes: discard,
        write_zeroes: discard,
        // What is on its way through a file system is safe after the next sync and not before, direct or not.
        volatile_cache: true,
    })
}

/// Whether direct I/O works on a regular file that was opened for it, and in which unit. Where it does not (the file
/// system says so only now), the descriptor is switched back to the page cache.
fn direct_unit(fd: &OwnedFd, bytes: u64) -> io::Result<(bool, u32)> {
    let statx = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    if let Ok(statx) = statx
        && statx.stx_mask & StatxFlags::DIOALIGN.bits() != 0
    {
        let (memory, unit) = (statx.stx_dio_mem_align, statx.stx_dio_offset_align);
        if unit == 0 || memory as usize > crate::buffer::ALIGNMENT {
            let flags = rustix::fs::fcntl_getfl(fd)?;
            rustix::fs::fcntl_setfl(fd, flags - OFlags::DIRECT)?;
            return Ok((false, 1));
        }
        return Ok((true, unit));
    }
    // A host that does not say is asked by a read of one small sector; a file too short to tell is taken for the worst.
    let mut sector = Buffer::heap(512);
    let small = bytes >= 1024 && rustix::io::pread(fd, &mut sector[..], 512).is_ok_and(|n| n == 512);
    Ok((true, if small { 512 } else { 4096 }))
}

/// Whether holes can be punched, tried where there is nothing to lose: past the end of the file.
fn can_punch(fd: &OwnedFd, bytes: u64) -> bool {
    const PAST: u64 = 1 << 20;
    let Some(offset) = bytes.checked_next_multiple_of(PAST).filter(|o| o.saturating_add(PAST) <= i64::MAX as u64)
    else {
        return false;
    };
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(fd, mode, offset, 4096).is_ok()
}

fn block_info(fd: &OwnedFd, device: u64, direct: bool) -> io::Result<FileInfo> {
    let queue = queue_folder(device);
    let limit = |name: &str| -> u64 {
        let text = queue.as_ref().and_then(|folder| fs::read_to_string(folder.join(name)).ok());
        text.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };
    let cache = queue.as_ref().and_then(|folder| fs::read_to_string(folder.join("write_cache")).ok());
    let write_through = cache.is_some_and(|text| text.trim() == "write through");
    Ok(FileInfo {
        bytes: device_bytes(fd)?,
        io_unit: if direct { rustix::fs::ioctl_blksszget(fd)? } else { 1 },
        physical_block: rustix::fs::ioctl_blkpbszget(fd)?,
        block_device: true,
        direct,
        discard: limit("discard_max_bytes") > 0,
        // No block device promises this any more; what must read as zeroes is written as zeroes.
        discard_zeroes: false,
        write_zeroes: limit("write_zeroes_max_bytes") > 0,
        // The page cache is a volatile cache too. A device that does not tell is not trusted.
        volatile_cache: !(direct && write_through),
    })
}

/// Where the kernel describes the queue of a block device; a partition's is its disk's.
fn queue_folder(device: u64) -> Option<PathBuf> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let folder = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let disk = if folder.join("partition").exists() { folder.parent()?.to_path_buf() } else { folder };
    Some(disk.join("queue"))
}

/// [`Files`] of the operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsFiles;

/// Makes a change of `path`'s folder durable.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    fs::File::open(folder).and_then(|f| f.sync_all()).map_err(|e| about(folder, "cannot be synced", e))
}

impl Files for OsFiles {
    fn open(&self, path: &Path, options: OpenOptions) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(OsFile::open(path, options)?))
    }

    fn create(&self, path: &Path, bytes: u64) -> io::Result<()> {
        let file = fs::OpenOptions::new().write(true).create_new(true).mode(PRIVATE).open(path);
        let file = file.map_err(|e| about(path, "cannot be created", e))?;
        let made = file.set_len(bytes).and_then(|()| file.sync_all());
        if let Err(error) = made {
            // Nobody else can have begun to use what was never announced.
            let _ = fs::remove_file(path);
            return Err(about(path, &format!("cannot be made {bytes} bytes long"), error));
        }
        sync_folder(path)
    }

    fn set_len(&self, path: &Path, bytes: u64) -> io::Result<()> {
        let found = fs::metadata(path).map_err(|e| about(path, "cannot be resized", e))?;
        if !found.is_file() {
            let text = format!("{}: only a regular file can be resized", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let file = fs::OpenOptions::new().write(true).open(path);
        let resized = file.and_then(|file| file.set_len(bytes).and_then(|()| file.sync_all()));
        resized.map_err(|e| about(path, &format!("cannot be made {bytes} bytes long"), e))
    }

    fn read(&self, path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
        let file = fs::File::open(path).map_err(|e| about(path, "cannot be opened", e))?;
        let mut bytes = Vec::new();
        // The limit holds also for a file that grows, or does not tell its size.
        let read = file.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes);
        read.map_err(|e| about(path, "cannot be read", e))?;
        if bytes.len() as u64 > max_bytes {
            let text = format!("{}: is longer than the {max_bytes} bytes allowed", path.display());
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, text));
        }
        Ok(bytes)
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let temporary = temporary_beside(path);
        let write = || {
            // A file left over from a crash is in the way of nobody but us; a link planted there is not followed.
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(PRIVATE)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&temporary)?;
            file.set_permissions(fs::Permissions::from_mode(PRIVATE))?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, path)
        };
        if let Err(error) = write() {
            let _ = fs::remove_file(&temporary);
            return Err(about(path, "cannot be replaced", error));
        }
        sync_folder(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to).map_err(|e| about(from, &format!("cannot be renamed to {}", to.display()), e))?;
        sync_folder(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::tests::Folder;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_created_volume_is_sparse_private_and_never_overwrites() {
        use std::os::unix::fs::MetadataExt;
        let folder = Folder::temporary();
        let path = folder.0.join("volume");
        OsFiles.create(&path, 1 << 30).unwrap();
        let found = fs::metadata(&path).unwrap();
        assert_eq!((found.len(), mode(&path)), (1 << 30, PRIVATE));
        assert!(found.blocks() * 512 < 1 << 20, "it is not sparse");
        let error = OsFiles.create(&path, 4096).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert!(error.to_string().contains("volume"), "{error}");
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 30);
        // A size that no file can have leaves nothing behind.
        let other = folder.0.join("other");
        assert!(OsFiles.create(&other, u64::MAX).is_err());
        assert!(!other.exists());
    }

    #[test]
    fn a_volume_is_opened_for_writing_once() {
        let folder = Folder::temporary();
        let path = folder.0.join("volume");
        OsFiles.create(&path, 1 << 20).unwrap();
        let write = OpenOptions { read_only: false, direct: false };
        let read = OpenOptions { read_only: true, direct: false };
        let first = OsFiles.open(&path, write).unwrap();
        for options in [write, read] {
            let error = OsFiles.open(&path, options).err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::ResourceBusy);
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
        drop(first);
        let readers = [OsFiles.open(&path, read).unwrap(), OsFiles.open(&path, read).unwrap()];
        assert!(OsFiles.open(&path, write).is_err());
        assert!(!readers[0].info().discard);
        drop(readers);
        assert_eq!(OsFiles.open(&path, write).unwrap().path(), path);
    }

    #[test]
    fn what_is_found_is_what_the_host_does() {
        let folder = Folder::temporary();
        let path = folder.0.join("volume");
        OsFiles.create(&path, 1 << 20).unwrap();
        let cached = OsFile::open(&path, OpenOptions::default()).unwrap();
        assert_eq!((cached.info().bytes, cached.info().io_unit, cached.info().direct), (1 << 20, 1, false));
        assert!(cached.info().volatile_cache && !cached.info().block_device);
        OsFiles.set_len(&path, 2 << 20).unwrap();
        assert_eq!(cached.bytes().unwrap(), 2 << 20);
        drop(cached);
        let direct = OsFile::open(&path, OpenOptions { read_only: false, direct: true }).unwrap();
        let flags = rustix::fs::fcntl_getfl(&direct.fd).unwrap();
        assert_eq!(flags.contains(OFlags::DIRECT), direct.info().direct);
        assert!(direct.info().io_unit.is_power_of_two());
        // The unit that was found really works.
        let mut memory = Buffer::heap(direct.info().io_unit as usize);
        let unit = u64::from(direct.info().io_unit);
        assert_eq!(rustix::io::pread(&direct.fd, &mut memory[..], unit).unwrap() as u64, unit);
    }

    #[test]
    fn only_files_and_block_devices_are_opened() {
        let folder = Folder::temporary();
        let fifo = folder.0.join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        for path in [fifo.as_path(), folder.0.as_path(), Path::new("/dev/null")] {
            let error = OsFiles.open(path, OpenOptions::default()).err().unwrap();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{error}");
        }
        let missing = OsFiles.open(&folder.0.join("missing"), OpenOptions::default()).err().unwrap();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        assert!(missing.to_string().contains("missing"), "{missing}");
        assert!(OsFiles.set_len(Path::new("/dev/null"), 5).is_err());
    }

    #[test]
    fn a_small_file_is_replaced_whole_or_not_at_all() {
        let folder = Folder::temporary();
        let path = folder.0.join("state.json");
        OsFiles.replace(&path, b"one").unwrap();
        assert_eq!(mode(&path), PRIVATE);
        assert_eq!(OsFiles.read(&path, 3).unwrap(), b"one");
        assert_eq!(OsFiles.read(&path, 2).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        // Left over from a crash, readable by all.
        fs::write(temporary_beside(&path), b"half of something longer").unwrap();
        OsFiles.replace(&path, b"two").unwrap();
        assert_eq!((OsFiles.read(&path, 99).unwrap(), mode(&path)), (b"two".to_vec(), PRIVATE));
        assert!(!temporary_beside(&path).exists());
        // A link planted in the temporary file's place is not written through.
        let victim = folder.0.join("victim");
        fs::write(&victim, b"precious").unwrap();
        std::os::unix::fs::symlink(&victim, temporary_beside(&path)).unwrap();
        assert!(OsFiles.replace(&path, b"three").is_err());
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
        assert_eq!(fs::read(&path).unwrap(), b"two");
        OsFiles.rename(&path, &folder.0.join("kept")).unwrap();
        assert_eq!(fs::read(folder.0.join("kept")).unwrap(), b"two");
        assert!(OsFiles.rename(&path, &folder.0.join("gone")).is_err());
    }
}
