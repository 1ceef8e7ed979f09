//! Handlers in C: loading shared objects, and the C ABI of `include/ringstone_appliance.h`.
//!
//! A worker's requests are in a *table*: a slot holds the request while C has it, and what C sees of it. A token is a
//! slot's index and its generation, which goes up whenever the slot changes hands; whoever completes takes the slot with
//! one exchange, so of two completions one finds nothing. Completing locks and allocates nothing.
//!
//! # What must live for ever
//! C may call `complete` whenever it likes, also when the worker is long gone. Tables are therefore never freed: a worker's
//! end gives its table back for the next worker, and generations go on. Libraries are never unloaded. Both are bounded by
//! what was in use at once.
//!
//! # What C must keep
//! Memory safety rests on the handler's word where C's always does: it touches buffers only between `submit` and
//! `complete`, and no longer after `worker_destroy`. Who cannot trust it runs it in a process of its own.

#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use reactor::park::Waker;
use reactor::ring::{Consumer, Producer, ring};
use reactor::{Clock, Instant, Progress};

use crate::abi;
use crate::handler::{Batch, Capabilities, Handler, Making, Worker, WorkerCx};
use crate::home::Limiter;
use crate::request::{Request, RequestId};
use crate::types::{Geometry, IoStatus, OpKind, OpSet};

/// `RS_APPLIANCE_VERSION`.
pub const VERSION: u32 = 1;

/// The symbol that a shared object must have.
const ENTRY: &str = "ringstone_appliance_handler";

/// Requests that one worker can have at once; others wait their turn.
const SLOTS: usize = 1024;

/// `struct rs_buffer`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct RsBuffer {
    base: *mut c_void,
    bytes: usize,
}

/// `struct rs_request`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct RsRequest {
    struct_bytes: u32,
    op: u8,
    flags: u8,
    reserved: u16,
    token: u64,
    id: u64,
    lba: u64,
    blocks: u64,
    source_lba: u64,
    timeout_ns: u64,
    payload_bytes: u32,
    buffer_count: u32,
    buffers: *const RsBuffer,
}

/// `struct rs_host`.
#[derive(Debug)]
#[repr(C)]
pub struct RsHost {
    struct_bytes: u32,
    version: u32,
    complete: extern "C" fn(*const RsHost, u64, u16, u32),
    wake: extern "C" fn(*const RsHost),
    log: extern "C" fn(*const RsHost, c_int, *const c_char),
}

/// `struct rs_device`.
#[derive(Debug)]
#[repr(C)]
pub struct RsDevice {
    struct_bytes: u32,
    block_size: u32,
    num_blocks: u64,
    bdev: *const c_char,
    options: *const c_char,
    workers: u32,
    reserved: u32,
}

/// `struct rs_capabilities`.
#[derive(Debug)]
#[repr(C)]
pub struct RsCapabilities {
    struct_bytes: u32,
    ops: u32,
    flags: u32,
    max_rw_blocks: u32,
}

/// `struct rs_handler`. Functions may be null, whatever the header says.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct RsHandler {
    struct_bytes: u32,
    version: u32,
    name: *const c_char,
    create: Option<unsafe extern "C" fn(*const RsDevice, *mut c_char, usize, *mut *mut c_void) -> c_int>,
    capabilities: Option<unsafe extern "C" fn(*mut c_void, *mut RsCapabilities)>,
    resize: Option<unsafe extern "C" fn(*mut c_void, u64) -> c_int>,
    destroy: Option<unsafe extern "C" fn(*mut c_void)>,
    worker_create: Option<unsafe extern "C" fn(*mut c_void, u32, *const RsHost, *mut *mut c_void) -> c_int>,
    submit: Option<unsafe extern "C" fn(*mut c_void, *const *const RsRequest, usize)>,
    poll: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    abort: Option<unsafe extern "C" fn(*mut c_void, u64)>,
    reset: Option<unsafe extern "C" fn(*mut c_void)>,
    worker_destroy: Option<unsafe extern "C" fn(*mut c_void)>,
}

const CAP_VOLATILE_CACHE: u32 = 1;
const CAP_UNMAP_ZEROES: u32 = 2;

/// A shared object that has been loaded and found fit.
#[derive(Clone, Debug)]
pub struct SharedObject {
    functions: Functions,
    name: Arc<str>,
}

/// The functions of a handler, all that must be there being there.
#[derive(Clone, Copy, Debug)]
struct Functions {
    create: unsafe extern "C" fn(*const RsDevice, *mut c_char, usize, *mut *mut c_void) -> c_int,
    capabilities: unsafe extern "C" fn(*mut c_void, *mut RsCapabilities),
    resize: Option<unsafe extern "C" fn(*mut c_void, u64) -> c_int>,
    destroy: unsafe extern "C" fn(*mut c_void),
    worker_create: unsafe extern "C" fn(*mut c_void, u32, *const RsHost, *mut *mut c_void) -> c_int,
    submit: unsafe extern "C" fn(*mut c_void, *const *const RsRequest, usize),
    poll: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    abort: Option<unsafe extern "C" fn(*mut c_void, u64)>,
    reset: Option<unsafe extern "C" fn(*mut c_void)>,
    worker_destroy: unsafe extern "C" fn(*mut c_void),
}

fn unfit(path: &Path, what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {what}", path.display()))
}

impl SharedObject {
    /// Loads the shared object at an absolute path. It is never unloaded: to replace it, restart the server.
    ///
    /// # Errors
    /// `InvalidInput`, with a text that says what to do: when the path is not absolute, nothing can be loaded there, the
    /// entry symbol is missing, or it was built for another version.
    pub fn load(path: &Path) -> io::Result<SharedObject> {
        if !path.is_absolute() {
            return Err(unfit(path, "the path of a shared object is absolute; write all of it"));
        }
        match std::fs::metadata(path) {
            Err(error) => return Err(unfit(path, &format!("{error}; build it first, or correct the path"))),
            Ok(found) if !found.is_file() => {
                return Err(unfit(path, "it is no file; give the path of a shared object"));
            }
            Ok(_) => {}
        }
        // SAFETY: loading runs the library's constructors: whoever may call this method is trusted with that.
        let library = unsafe { libloading::Library::new(path) }.map_err(|error| {
            unfit(path, &format!("it cannot be loaded ({error}); build it with cc -shared -fPIC for this machine"))
        })?;
        // SAFETY: the symbol is this ABI's own name, for a function of this type.
        let entry = unsafe { library.get::<unsafe extern "C" fn() -> *const RsHandler>(ENTRY.as_bytes()) };
        let entry = *entry.map_err(|_| {
            unfit(
                path,
                &format!("it has no symbol {ENTRY}; define it as ringstone_appliance.h says, and do not hide it"),
            )
        })?;
        // From here on its code has run, and may have begun anything.
        std::mem::forget(library);
        // SAFETY: the entry of a library that was just loaded.
        let handler = unsafe { entry() };
        if handler.is_null() || !handler.is_aligned() {
            return Err(unfit(path, &format!("{ENTRY} returned no handler")));
        }
        // SAFETY: the first two fields are there in every version.
        let (bytes, version) = unsafe { ((*handler).struct_bytes, (*handler).version) };
        if version != VERSION {
            let text = format!(
                "it was built for version {version} of the interface, and this server has {VERSION}; build it again with \
                 the ringstone_appliance.h of this release"
            );
            return Err(unfit(path, &text));
        }
        if (bytes as usize) < size_of::<RsHandler>() {
            let text = format!(
                "its rs_handler has {bytes} bytes instead of {}; set struct_bytes to sizeof(struct rs_handler)",
                size_of::<RsHandler>()
            );
            return Err(unfit(path, &text));
        }
        // SAFETY: it has as many bytes, and is valid for ever, as the entry promises.
        let handler = unsafe { *handler };
        let name = if handler.name.is_null() {
            path.display().to_string()
        } else {
            // SAFETY: a NUL-terminated string, valid for ever, as the header says.
            unsafe { CStr::from_ptr(handler.name) }.to_string_lossy().into_owned()
        };
        let functions = Functions::of(&handler)
            .ok_or_else(|| unfit(path, "a function that is not optional is NULL; see rs_handler in the header"))?;
        Ok(SharedObject { functions, name: name.into() })
    }

    /// Makes a handler for a device.
    ///
    /// # Errors
    /// What the handler says.
    pub fn make(&self, making: &Making<'_>) -> io::Result<Arc<dyn Handler>> {
        let text = |text: String| CString::new(text).map_err(|_| io::Error::other("a text with a NUL in it"));
        let (bdev, options) = (text(making.bdev.to_string())?, text(making.options.to_string())?);
        let device = RsDevice {
            struct_bytes: size_of::<RsDevice>() as u32,
            block_size: making.geometry.block_size,
            num_blocks: making.geometry.num_blocks,
            bdev: bdev.as_ptr(),
            options: options.as_ptr(),
            workers: making.workers as u32,
            reserved: 0,
        };
        let mut said = [0u8; 512];
        let mut instance = std::ptr::null_mut();
        // SAFETY: all pointers are valid for the call, and `said` has as many bytes as is said.
        let errno = unsafe { (self.functions.create)(&device, said.as_mut_ptr().cast(), said.len(), &mut instance) };
        if errno != 0 {
            let said = CStr::from_bytes_until_nul(&said).map(CStr::to_string_lossy).unwrap_or_default();
            let said =
                if said.is_empty() { io::Error::from_raw_os_error(errno).to_string() } else { said.into_owned() };
            return Err(io::Error::other(format!("the handler '{}' cannot be made: {said}", self.name)));
        }
        let instance = Arc::new(Instance { functions: self.functions, handler: instance });
        let mut capabilities =
            RsCapabilities { struct_bytes: size_of::<RsCapabilities>() as u32, ops: 0, flags: 0, max_rw_blocks: 0 };
        // SAFETY: the handler was made by `create`; the struct is valid for the call.
        unsafe { (self.functions.capabilities)(instance.handler, &mut capabilities) };
        let kinds = OpKind::ALL.into_iter().filter(|&kind| kind != OpKind::Reset);
        let ops = kinds.filter(|&kind| capabilities.ops & 1 << kind as u32 != 0).fold(OpSet::default(), OpSet::with);
        let volatile_cache = capabilities.flags & CAP_VOLATILE_CACHE != 0;
        if !ops.contains(OpKind::Read) || volatile_cache && !ops.contains(OpKind::Flush) {
            return Err(io::Error::other(format!(
                "the handler '{}' says that it does neither read nor, with a volatile cache, flush; see rs_capabilities",
                self.name
            )));
        }
        let capabilities = Capabilities {
            ops,
            volatile_cache,
            unmap_zeroes: capabilities.flags & CAP_UNMAP_ZEROES != 0,
            max_rw_blocks: capabilities.max_rw_blocks,
        };
        let bdev = Arc::from(making.bdev);
        Ok(Arc::new(CHandler { instance, capabilities, name: Arc::clone(&self.name), bdev }))
    }
}

impl Functions {
    fn of(handler: &RsHandler) -> Option<Functions> {
        Some(Functions {
            create: handler.create?,
            capabilities: handler.capabilities?,
            resize: handler.resize,
            destroy: handler.destroy?,
            worker_create: handler.worker_create?,
            submit: handler.submit?,
            poll: handler.poll,
            abort: handler.abort,
            reset: handler.reset,
            worker_destroy: handler.worker_destroy?,
        })
    }
}

/// A handler that `create` made. Workers keep it.
struct Instance {
    functions: Functions,
    handler: *mut c_void,
}

// SAFETY: functions that are given the handler may be called on any thread, as the header says.
unsafe impl Send for Instance {}
// SAFETY: as above.
unsafe impl Sync for Instance {}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: nobody else refers to the handler: workers keep this value.
        unsafe { (self.functions.destroy)(self.handler) };
    }
}

/// A handler in C.
struct CHandler {
    instance: Arc<Instance>,
    capabilities: Capabilities,
    name: Arc<str>,
    bdev: Arc<str>,
}

impl Handler for CHandler {
    fn name(&self) -> &str {
        &self.name
    }

    fn capabilities(&self, _: &Geometry) -> Capabilities {
        self.capabilities
    }

    fn worker(&self, cx: WorkerCx) -> io::Result<Box<dyn Worker>> {
        let (table, returned) = Table::draw();
        *lock(&table.owner) = Some(Owner {
            waker: cx.waker.clone(),
            clock: Arc::clone(&cx.clock),
            bdev: Arc::clone(&self.bdev),
            handler: Arc::clone(&self.name),
        });
        let mut worker = CWorker {
            instance: Arc::clone(&self.instance),
            worker: None,
            table,
            returned: Some(returned),
            free: (0..SLOTS as u32).rev().collect(),
            requests: Vec::with_capacity(SLOTS),
        };
        let mut made = std::ptr::null_mut();
        // SAFETY: the handler was made by `create`; the table, whose first field the host is, is never freed.
        let errno = unsafe {
            (self.instance.functions.worker_create)(self.instance.handler, cx.index as u32, &table.host, &mut made)
        };
        if errno != 0 {
            let error = io::Error::from_raw_os_error(errno);
            return Err(io::Error::new(error.kind(), format!("worker {} of '{}': {error}", cx.index, self.name)));
        }
        worker.worker = Some(made);
        Ok(Box::new(worker))
    }

    fn resize(&self, num_blocks: u64) -> io::Result<()> {
        let Some(resize) = self.instance.functions.resize else {
            return Err(io::Error::new(io::ErrorKind::Unsupported, format!("'{}' cannot change its size", self.name)));
        };
        // SAFETY: the handler was made by `create`.
        match unsafe { resize(self.instance.handler, num_blocks) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// Whose table it is, for messages.
struct Owner {
    waker: Waker,
    clock: Arc<dyn Clock>,
    bdev: Arc<str>,
    handler: Arc<str>,
}

struct Slot {
    /// Twice the generation, plus one while C has the request.
    state: AtomicU64,
    request: UnsafeCell<Option<Request>>,
    seen: UnsafeCell<RsRequest>,
    /// What `seen.buffers` points to. Its room is kept for the next request.
    buffers: UnsafeCell<Vec<RsBuffer>>,
}

/// The requests of one worker. `#[repr(C)]`: C is given the address of the first field.
#[repr(C)]
struct Table {
    host: RsHost,
    slots: Box<[Slot]>,
    /// Slots that were completed, on their way back to the worker.
    free: Producer<u32>,
    returned: Mutex<Option<Consumer<u32>>>,
    /// The worker has requests and no slots: it is to be woken.
    short: AtomicBool,
    owner: Mutex<Option<Owner>>,
    log: Limiter,
}

// SAFETY: a slot's cells are touched by the worker while its state is even, and by the one thread that changed it from odd
// to even; the exchange orders the two. C reads `seen` and `buffers` while the state is odd, when nobody writes them.
unsafe impl Sync for Table {}
// SAFETY: as above; nothing in it belongs to a thread.
unsafe impl Send for Table {}

/// Tables that no worker has.
static SPARE: Mutex<Vec<&'static Table>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Table {
    /// A table, with every slot free, and its way back.
    fn draw() -> (&'static Table, Consumer<u32>) {
        if let Some(table) = lock(&SPARE).pop()
            && let Some(returned) = lock(&table.returned).take()
        {
            return (table, returned);
        }
        let (free, returned) = ring(SLOTS);
        let blank = RsRequest {
            struct_bytes: size_of::<RsRequest>() as u32,
            op: 0,
            flags: 0,
            reserved: 0,
            token: 0,
            id: 0,
            lba: 0,
            blocks: 0,
            source_lba: 0,
            timeout_ns: 0,
            payload_bytes: 0,
            buffer_count: 0,
            buffers: std::ptr::null(),
        };
        let slot = |_| Slot {
            // Generation 0 is never given out, so a token of 0 names nothing.
            state: AtomicU64::new(2),
            request: UnsafeCell::new(None),
            seen: UnsafeCell::new(blank),
            buffers: UnsafeCell::new(Vec::new()),
        };
        let host = RsHost { struct_bytes: size_of::<RsHost>() as u32, version: VERSION, complete, wake, log };
        let table = Box::leak(Box::new(Table {
            host,
            slots: (0..SLOTS).map(slot).collect(),
            free,
            returned: Mutex::new(None),
            short: AtomicBool::new(false),
            owner: Mutex::new(None),
            log: Limiter::default(),
        }));
        (table, returned)
    }

    /// Puts a request into a free slot: what C is to see of it.
    fn fill(&self, index: u32, mut request: Request, now: Instant) -> *const RsRequest {
        let slot = &self.slots[index as usize];
        let generation = slot.state.load(Ordering::Relaxed) >> 1;
        let (op, flags, source_lba) = abi::encode_op(request.op());
        // SAFETY: the slot is free, so its cells are the worker's alone.
        let (cell, seen, buffers) =
            unsafe { (&mut *slot.request.get(), &mut *slot.seen.get(), &mut *slot.buffers.get()) };
        buffers.clear();
        let pieces = request.bufs_mut().segments_mut();
        buffers.extend(pieces.map(|bytes| RsBuffer { base: bytes.as_mut_ptr().cast(), bytes: bytes.len() }));
        *seen = RsRequest {
            struct_bytes: size_of::<RsRequest>() as u32,
            op,
            flags,
            reserved: 0,
            token: generation << 16 | u64::from(index),
            id: request.id().0,
            lba: request.lba(),
            blocks: request.blocks(),
            source_lba,
            timeout_ns: request.deadline().map_or(u64::MAX, |deadline| deadline.nanos_since(now)),
            payload_bytes: request.bufs().len() as u32,
            buffer_count: buffers.len() as u32,
            buffers: buffers.as_ptr(),
        };
        *cell = Some(request);
        slot.state.store(generation << 1 | 1, Ordering::Release);
        slot.seen.get()
    }

    /// Takes the request of a token out of its slot, which is free then.
    fn take(&self, token: u64) -> Option<Request> {
        let (index, generation) = ((token & 0xffff) as usize, token >> 16);
        let slot = self.slots.get(index)?;
        let (held, freed) = (generation << 1 | 1, (generation + 1) << 1);
        slot.state.compare_exchange(held, freed, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        // SAFETY: the exchange succeeded on this thread alone; the worker does not use the slot before it is pushed below.
        let request = unsafe { (*slot.request.get()).take() };
        self.free.push(index as u32);
        request
    }

    #[cold]
    fn fault(&self, what: std::fmt::Arguments<'_>) {
        let owner = lock(&self.owner);
        let Some(owner) = &*owner else {
            // Whoever it was, its device is gone; so nobody's log is flooded by it twice.
            if self.log.admit(Instant(0)).is_some() {
                tracing::error!("a handler in C whose worker is gone {what}: it has a bug; ignored");
            }
            return;
        };
        if let Some(unsaid) = self.log.admit(owner.clock.now()) {
            tracing::error!(
                bdev = &*owner.bdev,
                handler = &*owner.handler,
                unsaid,
                "a handler in C {what}: it has a bug; ignored"
            );
        }
    }
}

/// The table behind what C gave back.
///
/// # Safety
/// `host` must be one that a worker was lent.
unsafe fn table_of<'a>(host: *const RsHost) -> Option<&'a Table> {
    if host.is_null() || !host.is_aligned() {
        tracing::error!("a handler in C called back without its host: it has a bug; ignored");
        return None;
    }
    // SAFETY: by contract it is the first field of a table, and tables are never freed.
    Some(unsafe { &*host.cast::<Table>() })
}

extern "C" fn complete(host: *const RsHost, token: u64, status: u16, bytes: u32) {
    // SAFETY: the header demands the worker's own host.
    let Some(table) = (unsafe { table_of(host) }) else { return };
    let Some(request) = table.take(token) else {
        let known = table.slots.get((token & 0xffff) as usize);
        let ended = known.is_some_and(|slot| token >> 16 > 0 && slot.state.load(Ordering::Relaxed) >> 1 > token >> 16);
        let why = if ended { "which has ended already" } else { "which never was one" };
        return table.fault(format_args!("completed the token {token:#x}, {why}"));
    };
    match abi::decode_status(status) {
        Some(status) => request.complete_with(status, bytes.into()),
        None => {
            table.fault(format_args!("completed {request:?} with status {status}, which there is not"));
            request.complete(IoStatus::Failed);
        }
    }
    if table.short.swap(false, Ordering::SeqCst) {
        wake(host);
    }
}

extern "C" fn wake(host: *const RsHost) {
    // SAFETY: as in `complete`.
    let Some(table) = (unsafe { table_of(host) }) else { return };
    if let Some(owner) = &*lock(&table.owner) {
        owner.waker.wake();
    }
}

extern "C" fn log(host: *const RsHost, level: c_int, text: *const c_char) {
    // SAFETY: as in `complete`.
    let Some(table) = (unsafe { table_of(host) }) else { return };
    if text.is_null() {
        return;
    }
    // SAFETY: a NUL-terminated string, as the header demands.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    let owner = lock(&table.owner);
    let (bdev, handler) = owner.as_ref().map_or(("", ""), |owner| (&*owner.bdev, &*owner.handler));
    match level {
        1 => tracing::error!(bdev, handler, "{text}"),
        2 => tracing::warn!(bdev, handler, "{text}"),
        4 => tracing::debug!(bdev, handler, "{text}"),
        _ => tracing::info!(bdev, handler, "{text}"),
    }
}

/// A worker in C.
struct CWorker {
    instance: Arc<Instance>,
    /// `None` until it was made.
    worker: Option<*mut c_void>,
    table: &'static Table,
    returned: Option<Consumer<u32>>,
    free: Vec<u32>,
    /// Scratch for `submit`.
    requests: Vec<*const RsRequest>,
}

impl CWorker {
    fn collect(&mut self) {
        let free = &mut self.free;
        if let Some(returned) = &mut self.returned {
            returned.pop_batch(SLOTS, |index| free.push(index));
        }
    }
}

impl Worker for CWorker {
    fn submit(&mut self, batch: &mut Batch) {
        self.collect();
        if self.free.len() < batch.len() {
            // Said first, then looked once more: whoever completes meanwhile sees the one, or is seen by the other.
            self.table.short.swap(true, Ordering::SeqCst);
            self.collect();
        }
        let now = batch.now();
        self.requests.clear();
        while !batch.is_empty() {
            let Some(index) = self.free.pop() else { break };
            if let Some(request) = batch.next() {
                self.requests.push(self.table.fill(index, request, now));
            }
        }
        if let Some(worker) = self.worker.filter(|_| !self.requests.is_empty()) {
            // SAFETY: the worker was made by `worker_create`; the array and what it points to are valid as the header says.
            unsafe { (self.instance.functions.submit)(worker, self.requests.as_ptr(), self.requests.len()) };
        }
    }

    fn poll(&mut self, _: Instant) -> Progress {
        let (Some(worker), Some(poll)) = (self.worker, self.instance.functions.poll) else { return Progress::Idle };
        // SAFETY: the worker was made by `worker_create`, and this is its thread.
        Progress::from_busy(unsafe { poll(worker) } != 0)
    }

    fn abort(&mut self, id: RequestId) {
        let (Some(worker), Some(abort)) = (self.worker, self.instance.functions.abort) else { return };
        let found = self.table.slots.iter().find_map(|slot| {
            let held = slot.state.load(Ordering::Acquire) & 1 == 1;
            // SAFETY: `seen` is written by this thread alone.
            let seen = unsafe { &*slot.seen.get() };
            (held && seen.id == id.0).then_some(seen.token)
        });
        if let Some(token) = found {
            // SAFETY: as in `poll`. Should it end meanwhile, the token names nothing.
            unsafe { abort(worker, token) };
        }
    }

    fn reset(&mut self) {
        if let (Some(worker), Some(reset)) = (self.worker, self.instance.functions.reset) {
            // SAFETY: as in `poll`.
            unsafe { reset(worker) };
        }
    }
}

impl Drop for CWorker {
    fn drop(&mut self) {
        if let Some(worker) = self.worker {
            // SAFETY: as in `poll`; it is not used after this.
            unsafe { (self.instance.functions.worker_destroy)(worker) };
        }
        // What it has not completed comes back here, and is reported as lost by being dropped.
        for (index, slot) in self.table.slots.iter().enumerate() {
            let state = slot.state.load(Ordering::Acquire);
            if state & 1 == 1 {
                drop(self.table.take(state >> 1 << 16 | index as u64));
            }
        }
        self.collect();
        *lock(&self.table.owner) = None;
        *lock(&self.table.returned) = self.returned.take();
        // A slot that is still on its way back is held by a thread inside `complete`: then the table is not used again.
        if self.free.len() == SLOTS {
            lock(&SPARE).push(self.table);
        }
    }
}

#[cfg(test)]
mod tests;
