//! rsockets: sockets' interface over verbs, in librdmacm.
//!
//! Their descriptors mean nothing to the kernel: epoll and io_uring do not take them, only [`Rsocket::poll`] here does. Closing
//! blocks while the peer is told, so that it belongs on a thread that may wait.
//!
//! # Threads
//! Calls for different rsockets may run on different threads at once: the table of descriptors is under a lock of librdmacm for
//! changes and is read without one, an rsocket leaves it before its descriptor is closed and can be given out again, and every
//! poll here has one entry, which borrows its rsocket. One rsocket is used by one thread at a time, which the types say.
//!
//! librdmacm has two threads of its own, one for all listeners and one for all connections, which begin with the first rsocket
//! of their kind and end with the last. Up to rdma-core 54 (Debian 12 has 44), such a thread keeps using the array of its
//! rsockets after it was moved to make room for the fourth one: freed memory is written and rsockets are taken for others. That
//! array never shrinks, and grows by four places each time the thread begins, before the thread uses it. So before the first
//! rsocket of a kind is opened, that many are opened and closed, one after the other, that the array has places for all that
//! may ever be open: see [`MAX_CONNECTIONS`] and [`MAX_LISTENERS`]. With a later librdmacm that is only of no use.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::cm::{from_c, to_c};
use crate::error::{Error, Result};
use crate::library::{Libraries, libraries};
use crate::raw;

/// Connections that a process may have, those being closed included.
pub const MAX_CONNECTIONS: usize = 63;
/// Listeners that a process may have, those being closed included.
pub const MAX_LISTENERS: usize = 7;
/// Places that an array of librdmacm gets each time its thread begins.
const PLACES_A_START: usize = 4;
/// Starts of the thread that may fail before the places that there are have to do.
const FAILURES_ALLOWED: usize = 64;

/// What one of librdmacm's threads looks after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    Connections,
    Listeners,
}

/// How many rsockets a service of librdmacm has, and may have.
#[derive(Debug)]
struct Places {
    /// Times that the thread began for nothing but its array.
    starts: usize,
    used: usize,
}

static CONNECTIONS: Mutex<Places> = Mutex::new(Places { starts: 0, used: 0 });
static LISTENERS: Mutex<Places> = Mutex::new(Places { starts: 0, used: 0 });

impl Service {
    fn places(self) -> MutexGuard<'static, Places> {
        let places = match self {
            Service::Connections => &CONNECTIONS,
            Service::Listeners => &LISTENERS,
        };
        places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limit(self) -> usize {
        match self {
            Service::Connections => MAX_CONNECTIONS,
            Service::Listeners => MAX_LISTENERS,
        }
    }
}

/// Leave to have one rsocket.
struct Place(Service);

impl Place {
    /// Makes the service ready, if it is not.
    fn take(service: Service, libraries: &'static Libraries) -> Result<Place> {
        let mut places = service.places();
        places.make_room(service.limit(), || start_once(service, libraries).is_ok());
        let limit = places.room().min(service.limit());
        if places.used == limit {
            return Err(Error::TooManyRsockets { limit, listeners: service == Service::Listeners });
        }
        places.used += 1;
        Ok(Place(service))
    }
}

/// Makes librdmacm ready for all rsockets that this process may have. The first rsocket does so too, but then it is the one who
/// connects or accepts that waits.
///
/// # Errors
/// What is missing: a library, a device.
pub fn prepare() -> Result<()> {
    let libraries = libraries()?;
    crate::device::devices()?;
    for service in [Service::Connections, Service::Listeners] {
        service.places().make_room(service.limit(), || start_once(service, libraries).is_ok());
    }
    Ok(())
}

impl Places {
    /// rsockets that fit before the array moves. One start comes with the first of them, and the thread itself has a place.
    fn room(&self) -> usize {
        (self.starts + 1) * PLACES_A_START - 1
    }

    /// Starts the thread until there is room for `limit`, if nothing is open. `start` says whether it has: an address may be
    /// resolved and found to lead nowhere before the thread is told of it. Without success, there is room for fewer.
    fn make_room(&mut self, limit: usize, mut start: impl FnMut() -> bool) {
        let mut failures = 0;
        while self.used == 0 && self.room() < limit && failures < FAILURES_ALLOWED {
            if start() {
                self.starts += 1;
            } else {
                failures += 1;
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.places().used -= 1;
    }
}

/// Opens an rsocket that the service looks after, and closes it.
fn start_once(service: Service, libraries: &'static Libraries) -> Result<()> {
    // A connection is to this machine, and to a port that nobody can listen at.
    let nowhere = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
    let small = RsocketOptions { send_queue: 16, receive_queue: 16, send_bytes: 4096, receive_bytes: 4096 };
    let handle = Handle::new(libraries, &nowhere, &small)?;
    match service {
        Service::Connections => handle.connect(nowhere),
        Service::Listeners => handle.listen(nowhere, 1),
    }
}

/// An rsocket's descriptor. Dropping it closes it.
struct Handle {
    libraries: &'static Libraries,
    fd: libc::c_int,
}

/// A non-blocking stream or listener. Dropping it closes it, which blocks for as long as the peer takes to answer.
pub struct Rsocket {
    // Closed before its place is given back.
    handle: Handle,
    _place: Place,
}

/// What [`poll`] is to look for and has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// There is something to receive or to accept, or the peer has closed.
    pub readable: bool,
    /// There is room to send, or a connect has ended.
    pub writable: bool,
    /// The connection has failed or ended.
    pub ended: bool,
}

fn family(addr: &SocketAddr) -> libc::c_int {
    if addr.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

/// The sizes of a socket's queues and buffers. They are memory that is locked, for each connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RsocketOptions {
    /// Messages on their way out at once.
    pub send_queue: u32,
    /// Messages on their way in at once.
    pub receive_queue: u32,
    /// Bytes of the send buffer.
    pub send_bytes: u32,
    /// Bytes of the receive buffer.
    pub receive_bytes: u32,
}

impl Default for RsocketOptions {
    fn default() -> Self {
        RsocketOptions { send_queue: 384, receive_queue: 384, send_bytes: 256 * 1024, receive_bytes: 256 * 1024 }
    }
}

/// The error that a call which failed has left.
///
/// When a connection ends while it is made, librdmacm takes the -1 of a call for an error number: 1, which is "operation not
/// permitted". And where a device gives no reason, there is none.
fn failure() -> io::Error {
    told(io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

fn told(code: libc::c_int) -> io::Error {
    match code.abs() {
        0 => io::Error::new(io::ErrorKind::ConnectionAborted, "the connection failed, and its device gives no reason"),
        libc::EPERM => {
            io::Error::new(io::ErrorKind::ConnectionAborted, "the peer went away while the connection was made")
        }
        code => io::Error::from_raw_os_error(code),
    }
}

/// `errno` of this thread means the next call that fails.
fn clear_errno() {
    // SAFETY: the address of this thread's own errno.
    unsafe { *libc::__errno_location() = 0 };
}

impl Handle {
    fn new(libraries: &'static Libraries, addr: &SocketAddr, options: &RsocketOptions) -> Result<Handle> {
        // SAFETY: no pointers.
        let fd = unsafe { (libraries.cm.rsocket)(family(addr), libc::SOCK_STREAM, 0) };
        if fd < 0 {
            return Err(Error::last("rsocket"));
        }
        let handle = Handle { libraries, fd };
        handle.set_nonblocking()?;
        handle.set(libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        handle.set(libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
        handle.set(libc::SOL_SOCKET, libc::SO_SNDBUF, options.send_bytes)?;
        handle.set(libc::SOL_SOCKET, libc::SO_RCVBUF, options.receive_bytes)?;
        let rdma = raw::SOL_RDMA.cast_signed();
        handle.set(rdma, raw::RDMA_SQSIZE.cast_signed(), options.send_queue)?;
        handle.set(rdma, raw::RDMA_RQSIZE.cast_signed(), options.receive_queue)?;
        Ok(handle)
    }

    fn set_nonblocking(&self) -> Result<()> {
        // SAFETY: the socket is open; F_SETFL takes an int.
        match unsafe { (self.libraries.cm.rfcntl)(self.fd, libc::F_SETFL, libc::O_NONBLOCK) } {
            0 => Ok(()),
            _ => Err(Error::last("rfcntl")),
        }
    }

    fn set(&self, level: libc::c_int, option: libc::c_int, value: u32) -> Result<()> {
        let set = self.libraries.cm.rsetsockopt;
        // SAFETY: the socket is open; the option is an int.
        match unsafe { set(self.fd, level, option, (&raw const value).cast(), size_of::<u32>() as libc::socklen_t) } {
            0 => Ok(()),
            _ => Err(Error::last("rsetsockopt")),
        }
    }

    fn connect(&self, addr: SocketAddr) -> Result<()> {
        let (storage, len) = to_c(addr);
        // SAFETY: the socket is open; the address is read before the call returns.
        if unsafe { (self.libraries.cm.rconnect)(self.fd, (&raw const storage).cast(), len) } != 0 {
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::EINPROGRESS | libc::EAGAIN)) {
                return Err(Error::last("rconnect"));
            }
        }
        Ok(())
    }

    fn listen(&self, addr: SocketAddr, backlog: u32) -> Result<()> {
        let (storage, len) = to_c(addr);
        // SAFETY: the socket is open; the address is read before the call returns.
        if unsafe { (self.libraries.cm.rbind)(self.fd, (&raw const storage).cast(), len) } != 0 {
            return Err(Error::last("rbind"));
        }
        // SAFETY: the socket is open.
        match unsafe { (self.libraries.cm.rlisten)(self.fd, i32::try_from(backlog).unwrap_or(i32::MAX)) } {
            0 => Ok(()),
            _ => Err(Error::last("rlisten")),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: opened by `rsocket` or `raccept`, closed once. Closing sends the end of the stream first.
        unsafe { (self.libraries.cm.rclose)(self.fd) };
    }
}

impl Rsocket {
    fn new(service: Service, addr: &SocketAddr, options: &RsocketOptions) -> Result<Rsocket> {
        let libraries = libraries()?;
        crate::device::devices()?;
        let place = Place::take(service, libraries)?;
        Ok(Rsocket { handle: Handle::new(libraries, addr, options)?, _place: place })
    }

    /// A listener. Port 0 chooses a free one. Connections inherit `options`.
    ///
    /// # Errors
    /// What is missing; an address that is in use or of no device; [`MAX_LISTENERS`].
    pub fn listen(addr: SocketAddr, backlog: u32, options: &RsocketOptions) -> Result<Rsocket> {
        let socket = Rsocket::new(Service::Listeners, &addr, options)?;
        socket.handle.listen(addr, backlog)?;
        Ok(socket)
    }

    /// Starts to connect; the socket is writable when that has ended, and [`Rsocket::connected`] says how.
    ///
    /// # Errors
    /// What is missing; when the host refuses at once; [`MAX_CONNECTIONS`].
    pub fn connect(addr: SocketAddr, options: &RsocketOptions) -> Result<Rsocket> {
        let socket = Rsocket::new(Service::Connections, &addr, options)?;
        socket.handle.connect(addr)?;
        Ok(socket)
    }

    /// How a connect ended, when the socket has become writable.
    ///
    /// # Errors
    /// Why it failed.
    pub fn connected(&self) -> io::Result<()> {
        let mut code: libc::c_int = 0;
        let mut len = size_of::<libc::c_int>() as libc::socklen_t;
        let get = self.handle.libraries.cm.rgetsockopt;
        // SAFETY: the socket is open; the option is an int.
        let result = unsafe { get(self.handle.fd, libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut code).cast(), &mut len) };
        match (result, code) {
            (0, 0) => Ok(()),
            (0, code) => Err(told(code)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The next connection of a listener.
    ///
    /// # Errors
    /// `WouldBlock` when there is none, or there are [`MAX_CONNECTIONS`]: it waits in the backlog then.
    pub fn accept(&self) -> io::Result<Rsocket> {
        let libraries = self.handle.libraries;
        let place = match Place::take(Service::Connections, libraries) {
            Ok(place) => place,
            Err(Error::TooManyRsockets { .. }) => return Err(io::ErrorKind::WouldBlock.into()),
            Err(error) => return Err(error.into()),
        };
        // SAFETY: the socket is open; the peer's address is not asked for.
        let fd = unsafe { (libraries.cm.raccept)(self.handle.fd, std::ptr::null_mut(), std::ptr::null_mut()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = Rsocket { handle: Handle { libraries, fd }, _place: place };
        // A connection inherits this from its listener in some versions only.
        socket.handle.set_nonblocking()?;
        Ok(socket)
    }

    /// Receives what is there; 0 is the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there; anything else ends the stream.
    pub fn recv(&self, bytes: &mut [u8]) -> io::Result<usize> {
        clear_errno();
        // SAFETY: the socket is open; the slice is written for at most its length.
        let n = unsafe { (self.handle.libraries.cm.rrecv)(self.handle.fd, bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        usize::try_from(n).map_err(|_| failure())
    }

    /// Sends as much as there is room for.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room; anything else ends the stream.
    pub fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        clear_errno();
        // SAFETY: the socket is open; the slice is copied or sent before its memory is given back: a send returns when the
        // bytes are in the socket's own buffer.
        let n = unsafe { (self.handle.libraries.cm.rsend)(self.handle.fd, bytes.as_ptr().cast(), bytes.len(), 0) };
        usize::try_from(n).map_err(|_| failure())
    }

    /// Looks once, without waiting, for whether it can be received from or, if `write`, sent to.
    ///
    /// # Errors
    /// When the connection manager fails.
    pub fn poll(&self, write: bool) -> io::Result<Readiness> {
        let events = if write { libc::POLLIN | libc::POLLOUT } else { libc::POLLIN };
        let mut entry = libc::pollfd { fd: self.handle.fd, events, revents: 0 };
        // SAFETY: one entry, and no time to wait.
        match unsafe { (self.handle.libraries.cm.rpoll)(&mut entry, 1, 0) } {
            n if n >= 0 => {
                let ended = entry.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0;
                Ok(Readiness {
                    readable: ended || entry.revents & libc::POLLIN != 0,
                    writable: ended || entry.revents & libc::POLLOUT != 0,
                    ended,
                })
            }
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => Ok(Readiness::default()),
                error => Err(error),
            },
        }
    }

    fn address(&self, get: unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut u32) -> i32) -> io::Result<SocketAddr> {
        // SAFETY: all zeroes is a value of it.
        let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
        let mut len = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
        // SAFETY: the socket is open; the storage is as long as said.
        match unsafe { get(self.handle.fd, (&raw mut storage).cast(), &mut len) } {
            0 => Ok(from_c(&storage)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// This end's address, with the port that was chosen.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.address(self.handle.libraries.cm.rgetsockname)
    }

    /// The other end's address.
    ///
    /// # Errors
    /// When there is no connection.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.address(self.handle.libraries.cm.rgetpeername)
    }
}

impl fmt::Debug for Rsocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rsocket").field("fd", &self.handle.fd).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arrays_have_room_for_all_before_the_first() {
        for limit in [1, 3, 4, 7, MAX_LISTENERS, MAX_CONNECTIONS] {
            let mut places = Places { starts: 0, used: 0 };
            let mut calls = 0;
            places.make_room(limit, || {
                calls += 1;
                calls % 3 != 0
            });
            assert!(places.room() >= limit && places.room() < limit + PLACES_A_START, "{places:?}");
        }
    }

    #[test]
    fn without_success_there_is_room_for_what_fits_anyway_and_with_something_open_nothing_is_started() {
        let mut places = Places { starts: 0, used: 0 };
        places.make_room(MAX_CONNECTIONS, || false);
        assert_eq!(places.room(), 3);
        places.used = 1;
        places.make_room(MAX_CONNECTIONS, || panic!("the thread runs"));
    }

    #[test]
    fn an_error_that_means_something_else_is_told_as_what_it_means() {
        assert_eq!(told(libc::EPERM).kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(told(0).kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(told(-libc::ECONNREFUSED).kind(), io::ErrorKind::ConnectionRefused);
        clear_errno();
        assert!(failure().to_string().contains("no reason"));
    }
}
