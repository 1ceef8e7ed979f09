//! rsockets: sockets' interface over verbs, in librdmacm.
//!
//! Their descriptors mean nothing to the kernel: epoll and io_uring do not take them, only [`poll`] here does. `close` blocks
//! while the peer is told, so that it belongs on a thread that may wait.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use crate::cm::{from_c, to_c};
use crate::error::{Error, Result};
use crate::library::{Libraries, libraries};
use crate::raw;

/// A non-blocking stream or listener. Dropping it closes it, which blocks for as long as the peer takes to answer.
pub struct Rsocket {
    libraries: &'static Libraries,
    fd: libc::c_int,
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

impl Rsocket {
    fn new(addr: &SocketAddr, options: &RsocketOptions) -> Result<Rsocket> {
        let libraries = libraries()?;
        crate::device::devices()?;
        // SAFETY: no pointers.
        let fd = unsafe { (libraries.cm.rsocket)(family(addr), libc::SOCK_STREAM, 0) };
        if fd < 0 {
            return Err(Error::last("rsocket"));
        }
        let socket = Rsocket { libraries, fd };
        // SAFETY: the socket is open; F_SETFL takes an int.
        if unsafe { (libraries.cm.rfcntl)(fd, libc::F_SETFL, libc::O_NONBLOCK) } != 0 {
            return Err(Error::last("rfcntl"));
        }
        socket.set(libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        socket.set(libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)?;
        socket.set(libc::SOL_SOCKET, libc::SO_SNDBUF, options.send_bytes)?;
        socket.set(libc::SOL_SOCKET, libc::SO_RCVBUF, options.receive_bytes)?;
        let rdma = raw::SOL_RDMA.cast_signed();
        socket.set(rdma, raw::RDMA_SQSIZE.cast_signed(), options.send_queue)?;
        socket.set(rdma, raw::RDMA_RQSIZE.cast_signed(), options.receive_queue)?;
        Ok(socket)
    }

    fn set(&self, level: libc::c_int, option: libc::c_int, value: u32) -> Result<()> {
        let set = self.libraries.cm.rsetsockopt;
        // SAFETY: the socket is open; the option is an int.
        match unsafe { set(self.fd, level, option, (&raw const value).cast(), size_of::<u32>() as libc::socklen_t) } {
            0 => Ok(()),
            _ => Err(Error::last("rsetsockopt")),
        }
    }

    /// A listener. Port 0 chooses a free one. Connections inherit `options`.
    ///
    /// # Errors
    /// What is missing; an address that is in use or of no device.
    pub fn listen(addr: SocketAddr, backlog: u32, options: &RsocketOptions) -> Result<Rsocket> {
        let socket = Rsocket::new(&addr, options)?;
        let (storage, len) = to_c(addr);
        let cm = &socket.libraries.cm;
        // SAFETY: the socket is open; the address is read before the call returns.
        if unsafe { (cm.rbind)(socket.fd, (&raw const storage).cast(), len) } != 0 {
            return Err(Error::last("rbind"));
        }
        // SAFETY: the socket is open.
        if unsafe { (cm.rlisten)(socket.fd, i32::try_from(backlog).unwrap_or(i32::MAX)) } != 0 {
            return Err(Error::last("rlisten"));
        }
        Ok(socket)
    }

    /// Starts to connect; the socket is writable when that has ended, and [`Rsocket::connected`] says how.
    ///
    /// # Errors
    /// What is missing, or when the host refuses at once.
    pub fn connect(addr: SocketAddr, options: &RsocketOptions) -> Result<Rsocket> {
        let socket = Rsocket::new(&addr, options)?;
        let (storage, len) = to_c(addr);
        // SAFETY: the socket is open; the address is read before the call returns.
        if unsafe { (socket.libraries.cm.rconnect)(socket.fd, (&raw const storage).cast(), len) } != 0 {
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::EINPROGRESS | libc::EAGAIN)) {
                return Err(Error::last("rconnect"));
            }
        }
        Ok(socket)
    }

    /// How a connect ended, when the socket has become writable.
    ///
    /// # Errors
    /// Why it failed.
    pub fn connected(&self) -> io::Result<()> {
        let mut code: libc::c_int = 0;
        let mut len = size_of::<libc::c_int>() as libc::socklen_t;
        let get = self.libraries.cm.rgetsockopt;
        // SAFETY: the socket is open; the option is an int.
        let result = unsafe { get(self.fd, libc::SOL_SOCKET, libc::SO_ERROR, (&raw mut code).cast(), &mut len) };
        match (result, code) {
            (0, 0) => Ok(()),
            (0, code) => Err(io::Error::from_raw_os_error(code.abs())),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The next connection of a listener.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub fn accept(&self) -> io::Result<Rsocket> {
        let raccept = self.libraries.cm.raccept;
        // SAFETY: the socket is open; the peer's address is not asked for.
        let fd = unsafe { raccept(self.fd, std::ptr::null_mut(), std::ptr::null_mut()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = Rsocket { libraries: self.libraries, fd };
        // A connection inherits this from its listener in some versions only.
        // SAFETY: the socket is open; F_SETFL takes an int.
        if unsafe { (self.libraries.cm.rfcntl)(fd, libc::F_SETFL, libc::O_NONBLOCK) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }

    /// Receives what is there; 0 is the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there; anything else ends the stream.
    pub fn recv(&self, bytes: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the socket is open; the slice is written for at most its length.
        let n = unsafe { (self.libraries.cm.rrecv)(self.fd, bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Sends as much as there is room for.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room; anything else ends the stream.
    pub fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: the socket is open; the slice is copied or sent before its memory is given back: a send returns when the
        // bytes are in the socket's own buffer.
        let n = unsafe { (self.libraries.cm.rsend)(self.fd, bytes.as_ptr().cast(), bytes.len(), 0) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// Looks once, without waiting, for whether it can be received from or, if `write`, sent to.
    ///
    /// # Errors
    /// When the connection manager fails.
    pub fn poll(&self, write: bool) -> io::Result<Readiness> {
        let events = if write { libc::POLLIN | libc::POLLOUT } else { libc::POLLIN };
        let mut entry = libc::pollfd { fd: self.fd, events, revents: 0 };
        // SAFETY: one entry, and no time to wait.
        match unsafe { (self.libraries.cm.rpoll)(&mut entry, 1, 0) } {
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
        match unsafe { get(self.fd, (&raw mut storage).cast(), &mut len) } {
            0 => Ok(from_c(&storage)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// This end's address, with the port that was chosen.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.address(self.libraries.cm.rgetsockname)
    }

    /// The other end's address.
    ///
    /// # Errors
    /// When there is no connection.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.address(self.libraries.cm.rgetpeername)
    }
}

impl Drop for Rsocket {
    fn drop(&mut self) {
        // SAFETY: opened by `rsocket` or `raccept`, closed once. Closing sends the end of the stream first.
        unsafe { (self.libraries.cm.rclose)(self.fd) };
    }
}

impl fmt::Debug for Rsocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rsocket").field("fd", &self.fd).finish()
    }
}
