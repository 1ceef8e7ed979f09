//! Devices, open devices, and what devices report of themselves.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use reactor::rdma::{DeviceInfo, Limits};

use crate::error::{Error, Result};
use crate::library::{Libraries, libraries};
use crate::raw;

/// The text of a fixed array of C characters.
fn text(array: &[libc::c_char]) -> String {
    let bytes: Vec<u8> = array.iter().take_while(|&&c| c != 0).map(|&c| c.cast_unsigned()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Makes a descriptor of the library's non-blocking.
pub(crate) fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: the descriptor belongs to an object of the library that the caller keeps for the length of this call.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}

/// The library's list of devices; the devices in it live as long as it does.
struct DeviceList {
    libraries: &'static Libraries,
    list: NonNull<*mut raw::ibv_device>,
    count: usize,
}

impl DeviceList {
    fn get() -> Result<DeviceList> {
        let libraries = libraries()?;
        let mut count = 0;
        // SAFETY: `count` is written before the call returns.
        let list = unsafe { (libraries.ibv.ibv_get_device_list)(&mut count) };
        match NonNull::new(list) {
            Some(list) => Ok(DeviceList { libraries, list, count: usize::try_from(count).unwrap_or(0) }),
            None if io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS) => Err(Error::NoDevice),
            None => Err(Error::last("ibv_get_device_list")),
        }
    }

    fn devices(&self) -> &[*mut raw::ibv_device] {
        // SAFETY: the library made an array of `count` pointers, which lives until it is freed in `drop`.
        unsafe { std::slice::from_raw_parts(self.list.as_ptr(), self.count) }
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: the list came from the library and is freed once; open devices hold on to theirs by themselves.
        unsafe { (self.libraries.ibv.ibv_free_device_list)(self.list.as_ptr()) };
    }
}

fn info(device: *mut raw::ibv_device) -> DeviceInfo {
    // SAFETY: the caller's device is in a list, or belongs to an open context; its names never change.
    let device = unsafe { &*device };
    DeviceInfo { name: text(&device.name), iwarp: device.transport_type == raw::IBV_TRANSPORT_IWARP as libc::c_int }
}

/// The kernel's own list, which also has devices that the libraries have no driver for.
fn kernel_devices(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned())).collect();
    names.sort();
    names
}

/// All devices that can be used, sorted by name.
///
/// # Errors
/// What is missing: a library, a driver, a device. Never an empty list.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    let list = DeviceList::get()?;
    let mut found: Vec<DeviceInfo> = list.devices().iter().map(|&device| info(device)).collect();
    if found.is_empty() {
        return Err(none_found(kernel_devices(Path::new("/sys/class/infiniband"))));
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

fn none_found(kernel: Vec<String>) -> Error {
    if kernel.is_empty() { Error::NoDevice } else { Error::NoProvider { devices: kernel } }
}

/// The connection manager's list of open devices: they stay open while it lives.
struct CmDevices {
    libraries: &'static Libraries,
    list: NonNull<*mut raw::ibv_context>,
    count: usize,
}

impl CmDevices {
    fn get() -> Result<CmDevices> {
        let libraries = libraries()?;
        // Without a device the library would print to standard error; this says it better.
        devices()?;
        let mut count = 0;
        // SAFETY: `count` is written before the call returns.
        let list = unsafe { (libraries.cm.rdma_get_devices)(&mut count) };
        let list = NonNull::new(list).ok_or_else(|| match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENODEV) => Error::NoDevice,
            _ => Error::last("rdma_get_devices"),
        })?;
        Ok(CmDevices { libraries, list, count: usize::try_from(count).unwrap_or(0) })
    }

    fn contexts(&self) -> &[*mut raw::ibv_context] {
        // SAFETY: as for `DeviceList::devices`.
        unsafe { std::slice::from_raw_parts(self.list.as_ptr(), self.count) }
    }
}

impl Drop for CmDevices {
    fn drop(&mut self) {
        // SAFETY: the list came from the library and is freed once, after the context that was taken from it.
        unsafe { (self.libraries.cm.rdma_free_devices)(self.list.as_ptr()) };
    }
}

enum Owner {
    /// Opened here, closed here.
    Opened,
    /// The connection manager's.
    Cm(#[expect(dead_code, reason = "held for its end")] CmDevices),
}

/// Where the kernel shows what a context was opened on, and which of those that were ever there it is.
struct Presence {
    path: PathBuf,
    inode: u64,
}

impl Presence {
    fn of(path: PathBuf) -> Option<Presence> {
        let inode = std::fs::metadata(&path).ok()?.ino();
        Some(Presence { path, inode })
    }

    fn is_over(&self) -> bool {
        std::fs::metadata(&self.path).map_or(true, |found| found.ino() != self.inode)
    }
}

/// Contexts of the connection manager by address, and how many [`Context`]s of this process each has. The library opens a
/// device once, so its descriptors may be let go of with the last of them only.
static SHARED: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

/// Counts one more or one less of a shared context; whether it was the last.
fn count_shared(address: usize, more: bool) -> bool {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    let at = shared.iter().position(|(known, _)| *known == address);
    match (at, more) {
        (Some(at), true) => shared[at].1 += 1,
        (None, true) => shared.push((address, 1)),
        (Some(at), false) if shared[at].1 == 1 => drop(shared.swap_remove(at)),
        (Some(at), false) => shared[at].1 -= 1,
        (None, false) => unreachable!("it was counted when it was made"),
    }
    !more && !shared.iter().any(|(known, _)| *known == address)
}

/// An open device. Everything that is made of it holds on to it.
///
/// # Removal
/// A kernel that takes a device away may wait until nobody has it open (soft-RoCE does), and librdmacm keeps devices open that
/// it has ever used; the last one that a machine has until the process ends. So when a device is gone and nothing here uses it
/// any more, its descriptors are replaced by ones of nothing, which the library closes in its own time.
pub struct Context {
    libraries: &'static Libraries,
    raw: NonNull<raw::ibv_context>,
    owner: Owner,
    info: DeviceInfo,
    limits: Limits,
    /// `None` where the kernel does not show it.
    presence: Option<Presence>,
    removed: AtomicBool,
}

// SAFETY: libibverbs is safe for use from several threads at once (its manual: "all verbs are thread safe"); destruction is
// exclusive, because everything made of a context holds an Arc of it.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// The state of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortState {
    /// Traffic can flow.
    pub active: bool,
    /// Bytes of a packet's payload.
    pub active_mtu_bytes: u32,
    /// Over Ethernet (RoCE, iWARP) rather than InfiniBand.
    pub ethernet: bool,
}

/// What a device reports by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AsyncEvent {
    /// Everything of the device is lost.
    DeviceFatal,
    /// A port can be used again.
    PortActive(u8),
    /// A port cannot be used.
    PortError(u8),
    /// A completion queue overran or failed.
    CqError,
    /// A queue pair failed; its number and why.
    QpFailed(u32, String),
    /// A queue pair of a shared receive queue that failed will take no further receive.
    QpLastWqeReached(u32),
    /// A shared receive queue failed.
    SrqError,
    /// A shared receive queue fell below its limit.
    SrqLimitReached,
    /// Something that needs nothing done.
    Other(String),
}

fn non_negative(value: libc::c_int) -> u32 {
    u32::try_from(value).unwrap_or(0)
}

fn small(value: libc::c_int) -> u8 {
    u8::try_from(value.max(0)).unwrap_or(u8::MAX)
}

impl Context {
    /// Opens a device by name. Connections of the connection manager need [`Context::of_connection_manager`] instead.
    ///
    /// # Errors
    /// What is missing, or why the device cannot be opened.
    pub fn open(name: &str) -> Result<Arc<Context>> {
        let list = DeviceList::get()?;
        let Some(&device) = list.devices().iter().find(|&&device| info(device).name == name) else {
            let present = devices()?.into_iter().map(|device| device.name).collect();
            return Err(Error::UnknownDevice { name: name.to_owned(), present });
        };
        // SAFETY: the device is in the list, which lives.
        let raw = unsafe { (list.libraries.ibv.ibv_open_device)(device) };
        let raw = NonNull::new(raw).ok_or_else(|| Error::last("ibv_open_device"))?;
        Context::new(list.libraries, raw, Owner::Opened)
    }

    /// All devices as the connection manager has opened them.
    ///
    /// # Errors
    /// What is missing.
    pub fn of_connection_manager() -> Result<Vec<Arc<Context>>> {
        let count = CmDevices::get()?.count;
        // Each holds the list by itself, so that all can end at different times.
        (0..count).map(|index| Context::from_cm(|list| list.contexts().get(index).copied())).collect()
    }

    /// The connection manager's context at this address.
    pub(crate) fn at(address: *mut raw::ibv_context) -> Result<Arc<Context>> {
        Context::from_cm(|list| list.contexts().iter().copied().find(|&context| context == address))
    }

    fn from_cm(choose: impl Fn(&CmDevices) -> Option<*mut raw::ibv_context>) -> Result<Arc<Context>> {
        let list = CmDevices::get()?;
        let raw = choose(&list).and_then(NonNull::new).ok_or(Error::NoDevice)?;
        Context::new(list.libraries, raw, Owner::Cm(list))
    }

    fn new(libraries: &'static Libraries, raw: NonNull<raw::ibv_context>, owner: Owner) -> Result<Arc<Context>> {
        // SAFETY: the context is open; its device belongs to it.
        let (device, async_fd) = unsafe { (raw.as_ref().device, raw.as_ref().async_fd) };
        // SAFETY: as above; its path does not change.
        let presence = Presence::of(text(unsafe { &(*device).dev_path }).into());
        let removed = AtomicBool::new(false);
        if let Owner::Cm(_) = owner {
            count_shared(raw.as_ptr() as usize, true);
        }
        let info = info(device);
        let mut context = Context { libraries, raw, owner, info, limits: Limits::default(), presence, removed };
        set_nonblocking(async_fd).map_err(|error| Error::Call { call: "fcntl", error, hint: "" })?;
        context.limits = context.query_limits()?;
        Ok(Arc::new(context))
    }

    fn query_limits(&self) -> Result<Limits> {
        let mut attr = MaybeUninit::<raw::ibv_device_attr>::zeroed();
        // SAFETY: the context is open; the structure has the library's size.
        let code = unsafe { (self.libraries.ibv.ibv_query_device)(self.raw.as_ptr(), attr.as_mut_ptr()) };
        if code != 0 {
            return Err(Error::code("ibv_query_device", code));
        }
        // SAFETY: every bit pattern is a value of it, and it was zeroed.
        let attr = unsafe { attr.assume_init() };
        Ok(Limits {
            qp_wr: non_negative(attr.max_qp_wr),
            sge: non_negative(attr.max_sge),
            cqe: non_negative(attr.max_cqe),
            srq_wr: if attr.max_srq > 0 { non_negative(attr.max_srq_wr) } else { 0 },
            responder_resources: small(attr.max_qp_rd_atom),
            initiator_depth: small(attr.max_qp_init_rd_atom),
            ports: attr.phys_port_cnt,
            mem_mgt_extensions: attr.device_cap_flags & raw::IBV_DEVICE_MEM_MGT_EXTENSIONS != 0,
        })
    }

    /// The device.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// What it can do.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The device was removed: everything that is made of it has to end soon, since the kernel may wait for that.
    pub fn set_removed(&self) {
        self.removed.store(true, Ordering::Release);
    }

    /// Whether the device was removed, by what was told or by what the kernel shows. A system call.
    pub fn is_removed(&self) -> bool {
        if !self.removed.load(Ordering::Acquire) && self.presence.as_ref().is_some_and(Presence::is_over) {
            self.set_removed();
        }
        self.removed.load(Ordering::Acquire)
    }

    /// Closes the descriptors of a removed device, and leaves ones of nothing in their place.
    fn let_go(&self) {
        let Ok(nothing) = std::fs::File::open("/dev/null") else { return };
        // SAFETY: the context is open.
        let (commands, events) = unsafe { (self.raw.as_ref().cmd_fd, self.raw.as_ref().async_fd) };
        for fd in [commands, events] {
            // SAFETY: both are open. Nothing of this process uses the device any more, so what the library still does with
            // them is to close them; they stay its own.
            unsafe { libc::dup3(nothing.as_raw_fd(), fd, libc::O_CLOEXEC) };
        }
    }

    /// The state of a port, from 1.
    ///
    /// # Errors
    /// When there is no such port, or the device is gone.
    pub fn port(&self, port: u8) -> Result<PortState> {
        let mut attr = MaybeUninit::<raw::ibv_port_attr>::zeroed();
        // SAFETY: the context is open; the structure is at least as long as what this function fills.
        let code = unsafe { (self.libraries.hidden.ibv_query_port)(self.raw.as_ptr(), port, attr.as_mut_ptr()) };
        if code != 0 {
            return Err(Error::code("ibv_query_port", code));
        }
        // SAFETY: every bit pattern is a value of it, and it was zeroed.
        let attr = unsafe { attr.assume_init() };
        Ok(PortState {
            active: attr.state == raw::IBV_PORT_ACTIVE,
            active_mtu_bytes: 128u32.checked_shl(attr.active_mtu).unwrap_or(0),
            ethernet: u32::from(attr.link_layer) == raw::IBV_LINK_LAYER_ETHERNET,
        })
    }

    /// The descriptor that is readable when there is an event for [`Context::next_event`].
    pub fn event_fd(&self) -> RawFd {
        // SAFETY: the context is open.
        unsafe { self.raw.as_ref().async_fd }
    }

    /// The next thing that the device reports; `None` when there is nothing.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn next_event(&self) -> Result<Option<AsyncEvent>> {
        let mut event = MaybeUninit::<raw::ibv_async_event>::zeroed();
        // SAFETY: the context is open, and its descriptor does not block.
        let code = unsafe { (self.libraries.ibv.ibv_get_async_event)(self.raw.as_ptr(), event.as_mut_ptr()) };
        if code != 0 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::WouldBlock || error.kind() == io::ErrorKind::Interrupted {
                return Ok(None);
            }
            return Err(Error::Call { call: "ibv_get_async_event", error, hint: "" });
        }
        // SAFETY: the call succeeded and filled it.
        let mut event = unsafe { event.assume_init() };
        let read = self.read_event(&event);
        // SAFETY: acknowledged once, after the last look at what the event names.
        unsafe { (self.libraries.ibv.ibv_ack_async_event)(&mut event) };
        Ok(Some(read))
    }

    fn read_event(&self, event: &raw::ibv_async_event) -> AsyncEvent {
        let name = |kind| {
            // SAFETY: the library answers every number with a static string.
            unsafe { CStr::from_ptr((self.libraries.ibv.ibv_event_type_str)(kind)) }.to_string_lossy().into_owned()
        };
        // SAFETY: of a port's event, the number is what the union holds.
        let port = || unsafe { u8::try_from(event.element.port_num).unwrap_or(0) };
        // SAFETY: of a queue pair's event, the pair is; it is not destroyed before the event is acknowledged.
        let qp = || unsafe { (*event.element.qp).qp_num };
        match event.event_type {
            raw::IBV_EVENT_DEVICE_FATAL => AsyncEvent::DeviceFatal,
            raw::IBV_EVENT_PORT_ACTIVE => AsyncEvent::PortActive(port()),
            raw::IBV_EVENT_PORT_ERR => AsyncEvent::PortError(port()),
            raw::IBV_EVENT_CQ_ERR => AsyncEvent::CqError,
            kind @ (raw::IBV_EVENT_QP_FATAL | raw::IBV_EVENT_QP_REQ_ERR | raw::IBV_EVENT_QP_ACCESS_ERR) => {
                AsyncEvent::QpFailed(qp(), name(kind))
            }
            raw::IBV_EVENT_QP_LAST_WQE_REACHED => AsyncEvent::QpLastWqeReached(qp()),
            raw::IBV_EVENT_SRQ_ERR => AsyncEvent::SrqError,
            raw::IBV_EVENT_SRQ_LIMIT_REACHED => AsyncEvent::SrqLimitReached,
            kind => AsyncEvent::Other(name(kind)),
        }
    }

    pub(crate) fn libraries(&self) -> &'static Libraries {
        self.libraries
    }

    pub(crate) fn as_ptr(&self) -> *mut raw::ibv_context {
        self.raw.as_ptr()
    }

    /// What the provider does by itself.
    pub(crate) fn ops(&self) -> &raw::ibv_context_ops {
        // SAFETY: the context is open, and the table does not change after that.
        unsafe { &(*self.raw.as_ptr()).ops }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        match self.owner {
            Owner::Opened => {
                // SAFETY: opened by `open`, closed once; nothing made of it is left, since that would hold it.
                unsafe { (self.libraries.ibv.ibv_close_device)(self.raw.as_ptr()) };
            }
            Owner::Cm(_) => {
                if count_shared(self.raw.as_ptr() as usize, false) && self.is_removed() {
                    self.let_go();
                }
            }
        }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("device", &self.info.name).field("limits", &self.limits).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_device_and_no_driver_are_told_apart() {
        assert!(matches!(none_found(Vec::new()), Error::NoDevice));
        assert!(matches!(none_found(vec!["rxe0".into()]), Error::NoProvider { .. }));
        assert!(kernel_devices(Path::new("/sys/class/there-is-no-such-class")).is_empty());
    }

    #[test]
    fn what_was_there_and_is_another_now_is_gone() {
        let path = std::env::temp_dir().join(format!("ringstone-presence-{}", std::process::id()));
        assert!(Presence::of(path.clone()).is_none(), "what is not shown cannot be missed");
        std::fs::create_dir(&path).unwrap();
        let presence = Presence::of(path.clone()).unwrap();
        assert!(!presence.is_over());
        let other = path.with_extension("other");
        std::fs::create_dir(&other).unwrap();
        std::fs::remove_dir(&path).unwrap();
        assert!(presence.is_over());
        std::fs::rename(&other, &path).unwrap();
        assert!(presence.is_over(), "another device has its name");
        std::fs::remove_dir(&path).unwrap();
    }

    #[test]
    fn the_last_of_several_users_is_told() {
        let address = usize::MAX;
        assert!(!count_shared(address, true) && !count_shared(address, true));
        assert!(!count_shared(address, false));
        assert!(count_shared(address, false));
        assert!(!count_shared(address, true) && count_shared(address, false));
    }

    /// On a machine with a device this opens it; on one without, the error says what is missing.
    #[test]
    fn the_first_device_opens_or_the_lack_is_named() {
        match devices() {
            Ok(found) => {
                let context = Context::open(&found[0].name).unwrap();
                assert!(context.limits().qp_wr > 0);
                assert!(context.port(1).is_ok());
                assert!(context.next_event().unwrap().is_none());
                let error = Context::open("there-is-no-such-device").unwrap_err();
                assert!(error.to_string().contains(&found[0].name), "{error}");
            }
            Err(error @ (Error::NoDevice | Error::NoProvider { .. } | Error::Library { .. })) => {
                eprintln!("skipped: {error}");
                let again = Context::open("rxe0").unwrap_err();
                assert_eq!(again.to_string(), error.to_string());
            }
            Err(error) => panic!("{error}"),
        }
    }
}
