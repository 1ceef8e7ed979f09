//! What both engines share: where a transfer stands, and the system calls of a blocking thread.
//!
//! A transfer that the kernel ends early is continued until it is whole. On a file opened for direct I/O the next
//! piece has to start on a unit, so a piece that ends inside of one is repeated from that unit's start; a read that
//! does not even fill one unit has met the end of the file and fails: what is kept in files has a size, and zeroes would
//! pass for data after a file has been cut short. The rest of its payload is zeroed all the same.

use std::os::fd::{BorrowedFd, RawFd};
use std::sync::Arc;

use crate::buffer::{Buffer, Buffers};
use crate::file::{Errno, File, FileInfo, FileOp, FileRequest};
use crate::park::Source;

/// Most segments that one system call takes.
const MAX_IOVECS: usize = 1024;
/// How often a host may answer "again" to one operation before that is an error.
const MAX_RETRIES: u32 = 10_000;
/// Bytes of zeroes in one write where the host cannot zero a range by itself.
const ZERO_CHUNK: usize = 128 * 1024;

/// `ioctl(fd, BLKDISCARD, [start, length])`: `_IO(0x12, 119)`.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// What is needed of an attached file on every operation.
#[derive(Clone)]
pub(super) struct Target {
    /// Keeps the descriptor open.
    pub file: Arc<dyn File>,
    pub fd: RawFd,
    pub info: FileInfo,
    /// Its bytes are in memory: moving them does not wait for a device.
    pub in_memory: bool,
}

/// `f_type` of tmpfs, which memfds are in as well.
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

impl Target {
    pub(super) fn new(file: Arc<dyn File>) -> std::io::Result<Target> {
        let Source::Fd(fd) = file.source() else {
            let text = format!("{}: not a file of this host", file.path().display());
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, text));
        };
        let info = file.info();
        let mut target = Target { file, fd, info, in_memory: false };
        target.in_memory = rustix::fs::fstatfs(target.borrow()).is_ok_and(|found| found.f_type == TMPFS_MAGIC);
        Ok(target)
    }

    fn borrow(&self) -> BorrowedFd<'_> {
        // SAFETY: `file` owns the descriptor and is held by this value.
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }
}

/// How a file becomes zero in a range, from the best to the one that always works.
pub(super) fn zero_modes(may_unmap: bool) -> &'static [i32] {
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    if may_unmap { &[PUNCH, ZERO] } else { &[ZERO] }
}

/// Where one operation stands.
#[derive(Clone, Copy, Default)]
pub(super) struct Transfer {
    /// Bytes that need not be asked for again.
    pub done: usize,
    retries: u32,
}

/// What to do after the kernel has answered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Ask for the rest.
    Again,
    /// The operation is over.
    Finished(Result<(), Errno>),
}

impl Transfer {
    /// Takes an answer in: bytes moved, or a negated error number.
    pub(super) fn advance(&mut self, request: &mut FileRequest, info: &FileInfo, answer: i32) -> Next {
        let write = match request.op {
            FileOp::Read => false,
            FileOp::Write { .. } => true,
            _ => return self.whole(answer),
        };
        if answer < 0 {
            return self.whole(answer);
        }
        let buffers = request.payload.buffers();
        let reached = (self.done + answer as usize).min(buffers.len());
        if reached == buffers.len() {
            return Next::Finished(Ok(()));
        }
        let unit = if info.direct { info.io_unit.max(1) as usize } else { 1 };
        let resume = reached - reached % unit;
        if resume > self.done {
            self.done = resume;
            self.retries = 0;
            return Next::Again;
        }
        if !write {
            zero_from(buffers, reached);
        }
        // Not a byte of progress and no error: the host would answer the same for ever.
        Next::Finished(Err(Errno(libc::EIO)))
    }

    fn whole(&mut self, answer: i32) -> Next {
        match -answer {
            libc::EINTR | libc::EAGAIN if self.retries < MAX_RETRIES => {
                self.retries += 1;
                Next::Again
            }
            errno if errno > 0 => Next::Finished(Err(Errno(errno))),
            _ => Next::Finished(Ok(())),
        }
    }
}

fn zero_from(buffers: &mut Buffers, mut offset: usize) {
    while offset < buffers.len() {
        let rest = buffers.slice_at_mut(offset);
        rest.fill(0);
        offset += rest.len();
    }
}

/// Refuses ranges that a signed file offset cannot express.
pub(super) fn check(request: &mut FileRequest) -> Result<(), Errno> {
    let len = match request.op {
        FileOp::Sync => return Ok(()),
        FileOp::Read | FileOp::Write { .. } => request.payload.buffers().len() as u64,
        FileOp::Discard { len } | FileOp::WriteZeroes { len, .. } => len,
    };
    let end = request.offset.checked_add(len).filter(|&end| end <= i64::MAX as u64);
    end.map(|_| ()).ok_or(Errno(libc::EINVAL))
}

/// Whether there is nothing to do.
pub(super) fn is_empty(request: &mut FileRequest) -> bool {
    match request.op {
        FileOp::Sync => false,
        FileOp::Read | FileOp::Write { .. } => request.payload.buffers().is_empty(),
        FileOp::Discard { len } | FileOp::WriteZeroes { len, .. } => len == 0,
    }
}

/// Describes the payload from byte `done` on in `out`, as far as one system call takes it.
pub(super) fn describe(buffers: &mut Buffers, mut done: usize, out: &mut Vec<libc::iovec>) {
    out.clear();
    for buffer in buffers.buffers_mut() {
        let len = buffer.len();
        if done >= len {
            done -= len;
            continue;
        }
        // In place, so that the pointer keeps its provenance.
        let start = buffer.as_mut_ptr().wrapping_add(done);
        out.push(libc::iovec { iov_base: start.cast(), iov_len: len - done });
        done = 0;
        if out.len() == MAX_IOVECS {
            break;
        }
    }
}

fn answer(result: libc::ssize_t) -> i32 {
    if result >= 0 {
        return i32::try_from(result).unwrap_or(i32::MAX);
    }
    -std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

/// Carries out one operation on the calling thread, to its end.
pub(super) fn perform(target: &Target, request: &mut FileRequest, iovecs: &mut Vec<libc::iovec>) -> Result<(), Errno> {
    check(request)?;
    if is_empty(request) {
        return Ok(());
    }
    let mut transfer = Transfer::default();
    loop {
        let answer = match request.op {
            FileOp::Read | FileOp::Write { .. } => move_bytes(target, request, transfer.done, iovecs),
            // SAFETY: the descriptor is open while `target` lives.
            FileOp::Sync => answer(unsafe { libc::fdatasync(target.fd) } as libc::ssize_t),
            FileOp::Discard { len } => discard(target, request.offset, len),
            FileOp::WriteZeroes { len, may_unmap } => zero(target, request.offset, len, may_unmap),
        };
        if let Next::Finished(result) = transfer.advance(request, &target.info, answer) {
            return result;
        }
    }
}

fn move_bytes(target: &Target, request: &mut FileRequest, done: usize, iovecs: &mut Vec<libc::iovec>) -> i32 {
    let offset = (request.offset + done as u64) as libc::off_t;
    describe(request.payload.buffers(), done, iovecs);
    let (list, count) = (iovecs.as_ptr(), iovecs.len() as libc::c_int);
    // SAFETY (all three): the descriptor is open while `target` lives; the list describes memory of the payload, which
    // is exclusively borrowed through `request`.
    answer(match request.op {
        // SAFETY: as above.
        FileOp::Read => unsafe { libc::preadv(target.fd, list, count, offset) },
        // SAFETY: as above.
        FileOp::Write { durable: true } => unsafe { libc::pwritev2(target.fd, list, count, offset, libc::RWF_DSYNC) },
        // SAFETY: as above.
        _ => unsafe { libc::pwritev(target.fd, list, count, offset) },
    })
}

fn allocate(target: &Target, mode: i32, offset: u64, len: u64) -> i32 {
    // SAFETY: no memory is involved; the descriptor is open while `target` lives.
    answer(unsafe { libc::fallocate(target.fd, mode, offset as libc::off_t, len as libc::off_t) } as libc::ssize_t)
}

fn discard(target: &Target, offset: u64, len: u64) -> i32 {
    if !target.info.block_device {
        return allocate(target, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len);
    }
    // A hole punched into a block device would have to read as zeroes, which the host may only reach by writing them;
    // this asks for what was meant.
    let range = [offset, len];
    // SAFETY: the ioctl reads two u64 from `range`; the descriptor is open while `target` lives.
    answer(unsafe { libc::ioctl(target.fd, BLKDISCARD, range.as_ptr()) } as libc::ssize_t)
}

fn zero(target: &Target, offset: u64, len: u64, may_unmap: bool) -> i32 {
    for &mode in zero_modes(may_unmap) {
        let answer = allocate(target, mode, offset, len);
        if answer != -libc::EOPNOTSUPP {
            return answer;
        }
    }
    write_zeroes(target, offset, len)
}

/// Writes payload, for hosts that cannot zero a range by themselves.
fn write_zeroes(target: &Target, mut offset: u64, len: u64) -> i32 {
    let end = offset + len;
    let zeroes = Buffer::heap(ZERO_CHUNK);
    let mut retries = 0;
    while offset < end {
        let n = (end - offset).min(ZERO_CHUNK as u64) as usize;
        match rustix::io::pwrite(target.borrow(), &zeroes[..n], offset) {
            Ok(0) => return -libc::EIO,
            Ok(n) => offset += n as u64,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) if retries < MAX_RETRIES => retries += 1,
            Err(errno) => return -errno.raw_os_error(),
        }
    }
    0
}
