//! File I/O by io_uring: one ring a reactor, used by that reactor's thread alone.
//!
//! A request waits in a slot of the engine from submission until its last completion; the slot keeps the payload and
//! the list that describes it, because the kernel may read or write both at any time between the two. Slots and lists
//! are reused, so that a running engine allocates nothing.
//!
//! ```text
//! submit -> [queue] -> submission queue -> flush: one io_uring_enter -> kernel -> completion queue -> reap
//!               ^------------------ short transfers, EINTR, EAGAIN -----------------------'
//! ```
//!
//! Invariants
//! - No more requests are with the kernel than the completion queue has room for, so it never overflows.
//! - `user_data` is the index of a slot whose request is with the kernel, or [`CANCEL`].
//! - The ring is dropped only when no request is with the kernel. Requests that the kernel does not give back in time
//!   are leaked with their memory rather than freed under it.
//!
//! What the kernel does in the background (deferred task work) is done when this thread enters it, so completions cost
//! no interrupt of it. An eventfd registered with the ring tells a sleeping reactor that there is something to enter
//! for: it is signalled both when a completion is posted and when work is deferred. Watching the ring's own descriptor
//! edge-triggered is not enough: on Linux 6.18 a sleeper then misses deferred work, as the engine's tests showed.
//!
//! Zeroing a range goes through `IORING_OP_FALLOCATE`, which block devices understand too. Discarding on a block device
//! does not: there a hole would have to read as zeroes, which a device without such a command only reaches by writing.
//! That ioctl, and the fallback of writing zeroes, run on the thread pool of [`threads`](super::threads).
//!
//! Reads and writes of files in memory (tmpfs) do not go through the ring: the kernel cannot do them without blocking, as
//! it thinks, and hands each to a worker thread of its own, which costs several times what the bytes do. They are done by
//! plain system calls when the requests are flushed, as a device in this process's memory would do them.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::Instant;

use io_uring::types::{CancelBuilder, Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};

use super::threads::{Attached, DRAIN_TIME, Doorbell, Workers, ended};
use super::transfer::{self, Next, Target, Transfer};
use super::{Errno, File, FileDone, FileEngine, FileOp, FileRequest, FileSlot};
use crate::buffer::Region;
use crate::park::Parker;

/// Entries of the submission queue: what one flush hands over in one system call.
const SUBMISSIONS: u32 = 256;
/// Entries of the completion queue: requests that are with the kernel at once.
const COMPLETIONS: u32 = 2048;
/// Files that the kernel keeps looked up; more are used by descriptor.
const FIXED_FILES: u32 = 1024;
/// Most bytes of one registered buffer.
const FIXED_BUFFER: usize = 1 << 30;
/// Completions taken from the queue at a time.
const BATCH: usize = 32;
/// Most bytes that are moved to or from a file in memory by this thread itself: more would hold up the others for long.
const MAX_INLINE: usize = 1 << 20;
/// `user_data` of the request that cancels all others.
const CANCEL: u64 = u64::MAX;

/// One request's place.
#[derive(Default)]
struct Operation {
    request: Option<FileRequest>,
    transfer: Transfer,
    /// How many ways of zeroing were refused.
    mode: usize,
    iovecs: Vec<libc::iovec>,
}

/// A [`FileEngine`] on io_uring.
pub struct UringEngine {
    ring: IoUring,
    region: Option<Region>,
    fixed_files: bool,
    mode: Mode,
    files: Attached,
    operations: Vec<Operation>,
    free: Vec<u32>,
    /// Requests that are to be handed to the kernel, in order.
    queue: VecDeque<u32>,
    /// Requests in the submission queue or beyond.
    with_kernel: usize,
    limit: usize,
    in_flight: usize,
    /// Requests that the next flush carries out itself.
    inline: Vec<FileRequest>,
    iovecs: Vec<libc::iovec>,
    /// Requests that ended without the ring.
    ended: Vec<FileDone>,
    doorbell: Arc<Doorbell>,
    workers: Option<Workers>,
}

impl UringEngine {
    /// Sets up a ring with what the kernel offers; `parker` will report completions under
    /// [`ENGINE_TOKEN`](super::ENGINE_TOKEN). The memory of `region` must stay mapped while the engine is used.
    ///
    /// # Errors
    /// When the kernel has no io_uring, forbids it, or lacks an operation that is needed.
    pub fn new(region: Region, parker: &mut dyn Parker) -> io::Result<UringEngine> {
        for mode in [Mode::Deferred, Mode::Cooperative] {
            match mode.build() {
                Ok(ring) => return UringEngine::on(ring, mode, region, parker),
                // An older kernel does not know the flags.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => return Err(error),
            }
        }
        UringEngine::on(Mode::Plain.build()?, Mode::Plain, region, parker)
    }

    /// The engine on a ring that was built in `mode`.
    pub(super) fn on(ring: IoUring, mode: Mode, region: Region, parker: &mut dyn Parker) -> io::Result<UringEngine> {
        require_operations(&ring)?;
        let doorbell = Doorbell::new(parker)?;
        ring.submitter().register_eventfd(doorbell.raw_fd())?;
        let region = match register_region(&ring, region) {
            Ok(()) => Some(region),
            Err(error) => {
                let mib = region.bytes >> 20;
                tracing::info!(%error, "io_uring: {mib} MiB of buffers cannot be registered (see ulimit -l); \
                    they are looked up at each operation instead");
                None
            }
        };
        let fixed_files = ring.submitter().register_files_sparse(FIXED_FILES).is_ok();
        let limit = ring.params().cq_entries() as usize;
        Ok(UringEngine {
            ring,
            region,
            fixed_files,
            mode,
            files: Attached::default(),
            operations: Vec::new(),
            free: Vec::new(),
            queue: VecDeque::new(),
            with_kernel: 0,
            limit,
            in_flight: 0,
            inline: Vec::new(),
            iovecs: Vec::new(),
            ended: Vec::new(),
            doorbell,
            workers: None,
        })
    }

    /// How the file of `slot` is named to the kernel.
    fn fixed(&self, slot: FileSlot) -> bool {
        self.fixed_files && slot.0 < FIXED_FILES
    }

    /// Moves requests from the queue to the submission queue while both sides have room.
    fn fill(&mut self) {
        while self.with_kernel < self.limit
            && let Some(&index) = self.queue.front()
        {
            if self.ring.submission().is_full() {
                return;
            }
            self.queue.pop_front();
            let entry = self.entry(index).user_data(u64::from(index));
            // SAFETY: what the entry points at (payload, list) stays in its slot until its completion; see `entry`.
            unsafe { self.ring.submission().push(&entry) }.expect("the submission queue has room");
            self.with_kernel += 1;
        }
    }

    /// Describes the rest of a request to the kernel.
    fn entry(&mut self, index: u32) -> squeue::Entry {
        let operation = &mut self.operations[index as usize];
        let request = operation.request.as_mut().expect("a queued slot holds a request");
        let slot = request.slot;
        let offset = request.offset + operation.transfer.done as u64;
        let target = self.files.get(slot);
        let fixed = self.fixed_files && slot.0 < FIXED_FILES;
        let (file, fd) = (Fixed(slot.0), Fd(target.fd));
        // The same operation on either kind of file name.
        macro_rules! on_file {
            ($op:ident, [$($arg:expr),*] $(, $set:ident = $value:expr)*) => {
                if fixed {
                    opcode::$op::new(file $(, $arg)*)$(.$set($value))*.build()
                } else {
                    opcode::$op::new(fd $(, $arg)*)$(.$set($value))*.build()
                }
            };
        }
        let allocate = |mode: i32, len: u64| on_file!(Fallocate, [len], offset = offset, mode = mode);
        let (write, flags) = match request.op {
            FileOp::Read => (false, 0),
            FileOp::Write { durable } => (true, if durable { libc::RWF_DSYNC } else { 0 }),
            FileOp::Sync => return on_file!(Fsync, [], flags = FsyncFlags::DATASYNC),
            FileOp::Discard { len } => return allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, len),
            FileOp::WriteZeroes { len, may_unmap } => {
                return allocate(transfer::zero_modes(may_unmap)[operation.mode], len);
            }
        };
        let buffers = request.payload.buffers();
        let fixed_buffer = match (&self.region, &*buffers.buffers_mut()) {
            (Some(region), [only]) if only.in_region(region) => {
                // A buffer is aligned to its power-of-two class within the region's classes, yet it may straddle two
                // registrations of a very large region.
                let first = only.as_ptr() as usize - region.base;
                let last = first + only.len() - 1;
                (first / FIXED_BUFFER == last / FIXED_BUFFER).then_some((first / FIXED_BUFFER) as u16)
            }
            _ => None,
        };
        transfer::describe(buffers, operation.transfer.done, &mut operation.iovecs);
        let (list, count) = (operation.iovecs.as_ptr(), operation.iovecs.len() as u32);
        let first = operation.iovecs[0];
        let (start, len) = (first.iov_base.cast::<u8>(), first.iov_len as u32);
        match (write, fixed_buffer, count) {
            (false, Some(n), _) => on_file!(ReadFixed, [start, len, n], offset = offset),
            (true, Some(n), _) => on_file!(WriteFixed, [start, len, n], offset = offset, rw_flags = flags),
            (false, None, 1) => on_file!(Read, [start, len], offset = offset),
            (true, None, 1) => on_file!(Write, [start, len], offset = offset, rw_flags = flags),
            (false, None, _) => on_file!(Readv, [list, count], offset = offset),
            (true, None, _) => on_file!(Writev, [list, count], offset = offset, rw_flags = flags),
        }
    }

    /// Enters the kernel: hands over the submission queue, runs deferred work.
    fn enter(&mut self) {
        loop {
            match self.ring.submit() {
                Ok(_) => return,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // Out of memory, or completions to be reaped first: at the next flush, which must come.
                    Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => return self.doorbell.ring(),
                    // Only a broken descriptor table can do this; requests would hang unnoticed.
                    _ => panic!("io_uring: entering the kernel failed: {error}"),
                },
            }
        }
    }

    /// Takes what is in the completion queue.
    fn drain(&mut self, out: &mut Vec<FileDone>) {
        loop {
            let mut batch = [const { MaybeUninit::uninit() }; BATCH];
            let batch = self.ring.completion().fill(&mut batch);
            for completion in &*batch {
                if completion.user_data() == CANCEL {
                    continue;
                }
                self.with_kernel -= 1;
                self.completed(completion.user_data() as u32, completion.result(), out);
            }
            if batch.len() < BATCH {
                return;
            }
        }
    }

    fn completed(&mut self, index: u32, answer: i32, out: &mut Vec<FileDone>) {
        let operation = &mut self.operations[index as usize];
        let request = operation.request.as_mut().expect("a completion names a slot in use");
        if answer == -libc::EOPNOTSUPP
            && let FileOp::WriteZeroes { may_unmap, .. } = request.op
        {
            operation.mode += 1;
            if operation.mode < transfer::zero_modes(may_unmap).len() {
                self.queue.push_back(index);
                return;
            }
            let request = self.release(index);
            return self.delegate(request);
        }
        match operation.transfer.advance(request, &self.files.get(request.slot).info, answer) {
            Next::Again => self.queue.push_back(index),
            Next::Finished(result) => {
                let request = self.release(index);
                self.files.end(request.slot);
                out.push(ended(request, result));
            }
        }
    }

    /// Empties a slot.
    fn release(&mut self, index: u32) -> FileRequest {
        let operation = &mut self.operations[index as usize];
        operation.transfer = Transfer::default();
        operation.mode = 0;
        self.free.push(index);
        operation.request.take().expect("a slot in use holds a request")
    }

    /// Gives a request that is already counted to the threads.
    fn delegate(&mut self, request: FileRequest) {
        if self.workers.is_none() {
            match Workers::start(Arc::clone(&self.doorbell)) {
                Ok(workers) => self.workers = Some(workers),
                Err(error) => {
                    tracing::error!(%error, "no threads for a file operation that io_uring lacks");
                    return self.end_now(request, Err(Errno(libc::EAGAIN)));
                }
            }
        }
        let workers = self.workers.as_mut().expect("started above");
        workers.submit(self.files.get(request.slot), request);
        workers.flush();
    }

    /// Moves the bytes of files in memory.
    fn move_inline(&mut self) {
        for mut request in self.inline.drain(..) {
            let result = transfer::perform(self.files.get(request.slot), &mut request, &mut self.iovecs);
            self.files.end(request.slot);
            self.ended.push(ended(request, result));
        }
        self.doorbell.ring();
    }

    fn end_now(&mut self, request: FileRequest, result: Result<(), Errno>) {
        self.files.end(request.slot);
        self.ended.push(ended(request, result));
        self.doorbell.ring();
    }

    /// Cancels what is with the kernel and waits until it has let go. Returns whether it has.
    fn withdraw(&mut self) -> bool {
        let mut out = Vec::new();
        self.queue.clear();
        if self.with_kernel > 0 {
            let cancel = opcode::AsyncCancel2::new(CancelBuilder::any()).build().user_data(CANCEL);
            if self.ring.submission().is_full() {
                self.enter();
            }
            // SAFETY: the entry points at no memory.
            let _ = unsafe { self.ring.submission().push(&cancel) };
        }
        let deadline = Instant::now() + DRAIN_TIME;
        while self.with_kernel > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let timeout = Timespec::from(left);
            let waited = self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&timeout));
            match waited.as_ref().map_err(io::Error::raw_os_error) {
                Ok(_) | Err(Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(_) => return false,
            }
            self.drain(&mut out);
            // What was cut short is not continued.
            self.queue.clear();
        }
        true
    }
}

impl Drop for UringEngine {
    fn drop(&mut self) {
        if !self.withdraw() {
            let count = self.with_kernel;
            tracing::error!(count, "file operations did not return; their memory is left to the kernel");
            std::mem::forget(std::mem::take(&mut self.operations));
        }
        // Now rather than when the kernel tears the ring down in the background: the files' owners may open them again.
        let _ = self.ring.submitter().unregister_files();
    }
}

impl FileEngine for UringEngine {
    fn mode(&self) -> String {
        let buffers = if self.region.is_some() { ", registered buffers" } else { "" };
        let files = if self.fixed_files { ", registered files" } else { "" };
        format!("io_uring, {}{buffers}{files}", self.mode.name())
    }

    fn attach(&mut self, file: Arc<dyn File>) -> io::Result<FileSlot> {
        let target = Target::new(file)?;
        let fd = target.fd;
        let slot = self.files.insert(target);
        if self.fixed(slot)
            && let Err(error) = self.ring.submitter().register_files_update(slot.0, &[fd])
        {
            self.files.remove(slot);
            return Err(error);
        }
        Ok(slot)
    }

    fn detach(&mut self, slot: FileSlot) {
        let target = self.files.remove(slot);
        if self.fixed(slot)
            && let Err(error) = self.ring.submitter().register_files_update(slot.0, &[-1])
        {
            tracing::warn!(%error, path = %target.file.path().display(), "io_uring keeps a file that was detached");
        }
    }

    fn submit(&mut self, mut request: FileRequest) {
        self.in_flight += 1;
        let target = self.files.begin(request.slot);
        let (block_device, in_memory) = (target.info.block_device, target.in_memory);
        match transfer::check(&mut request) {
            Ok(()) if transfer::is_empty(&mut request) => return self.end_now(request, Ok(())),
            Ok(()) => {}
            Err(errno) => return self.end_now(request, Err(errno)),
        }
        if block_device && matches!(request.op, FileOp::Discard { .. }) {
            return self.delegate(request);
        }
        if in_memory && matches!(request.op, FileOp::Read | FileOp::Write { .. }) && len(&mut request) <= MAX_INLINE {
            return self.inline.push(request);
        }
        let index = self.free.pop().unwrap_or_else(|| {
            self.operations.push(Operation::default());
            u32::try_from(self.operations.len() - 1).expect("fewer than 2^32 operations are under way")
        });
        self.operations[index as usize].request = Some(request);
        self.queue.push_back(index);
    }

    fn flush(&mut self) {
        if !self.inline.is_empty() {
            self.move_inline();
        }
        loop {
            self.fill();
            if self.ring.submission().is_empty() {
                return;
            }
            self.enter();
            if self.queue.is_empty() || self.with_kernel >= self.limit || self.ring.submission().is_full() {
                return;
            }
        }
    }

    fn reap(&mut self, out: &mut Vec<FileDone>) -> usize {
        let before = out.len();
        self.doorbell.answer();
        out.append(&mut self.ended);
        if let Some(workers) = &mut self.workers {
            let files = &mut self.files;
            workers.reap(|finished| {
                files.end(finished.slot);
                out.push(finished.done);
            });
        }
        self.drain(out);
        if self.ring.submission().taskrun() {
            self.enter();
            self.drain(out);
        }
        if !self.queue.is_empty() || !self.ring.submission().is_empty() {
            // Continuations, requests for which there is room now, and what the kernel had no memory for at the last
            // attempt: nobody else may come to flush them.
            self.flush();
        }
        let n = out.len() - before;
        self.in_flight -= n;
        n
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl fmt::Debug for UringEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringEngine")
            .field("mode", &self.mode())
            .field("in_flight", &self.in_flight)
            .field("with_kernel", &self.with_kernel)
            .finish_non_exhaustive()
    }
}

/// When the kernel does its share of a completion, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// When the ring's thread asks for completions (Linux 6.1).
    Deferred,
    /// When the ring's thread enters the kernel for any reason (Linux 5.19).
    Cooperative,
    /// Whenever it likes, interrupting the ring's thread.
    Plain,
}

impl Mode {
    pub(super) fn build(self) -> io::Result<IoUring> {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp().setup_cqsize(COMPLETIONS);
        match self {
            Mode::Deferred => {
                builder.setup_submit_all().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
            }
            Mode::Cooperative => {
                builder.setup_submit_all().setup_coop_taskrun().setup_taskrun_flag();
            }
            Mode::Plain => {}
        }
        builder.build(SUBMISSIONS)
    }

    fn name(self) -> &'static str {
        match self {
            Mode::Deferred => "deferred work",
            Mode::Cooperative => "cooperative work",
            Mode::Plain => "plain",
        }
    }
}

/// Bytes of a request's payload.
fn len(request: &mut FileRequest) -> usize {
    request.payload.buffers().len()
}

/// Refuses kernels that lack an operation or a property without which the engine does not work.
fn require_operations(ring: &IoUring) -> io::Result<()> {
    let unsupported = |what: &str| Err(io::Error::new(io::ErrorKind::Unsupported, format!("io_uring lacks {what}")));
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [
        (opcode::Read::CODE, "reads"),
        (opcode::Write::CODE, "writes"),
        (opcode::Readv::CODE, "vectored reads"),
        (opcode::Writev::CODE, "vectored writes"),
        (opcode::ReadFixed::CODE, "reads into registered buffers"),
        (opcode::WriteFixed::CODE, "writes from registered buffers"),
        (opcode::Fsync::CODE, "syncs"),
        (opcode::Fallocate::CODE, "fallocate"),
        (opcode::AsyncCancel::CODE, "cancellation"),
    ];
    for (code, name) in needed {
        if !probe.is_supported(code) {
            return unsupported(name);
        }
    }
    // From Linux 5.11: waiting with a time limit, without which a ring could not be left in bounded time.
    if !ring.params().is_feature_ext_arg() {
        return unsupported("waiting with a time limit");
    }
    // From Linux 5.5: descriptions of transfers are read when they are handed over.
    if !ring.params().is_feature_nodrop() {
        return unsupported("completions that are never dropped");
    }
    Ok(())
}

fn register_region(ring: &IoUring, region: Region) -> io::Result<()> {
    let pieces = (0..region.bytes).step_by(FIXED_BUFFER).map(|start| libc::iovec {
        iov_base: std::ptr::with_exposed_provenance_mut(region.base + start),
        iov_len: FIXED_BUFFER.min(region.bytes - start),
    });
    let pieces: Vec<_> = pieces.collect();
    // SAFETY: the region is mapped, by the contract of `UringEngine::new`; the kernel holds its pages from here on.
    unsafe { ring.submitter().register_buffers(&pieces) }
}
