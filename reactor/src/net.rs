//! Stream sockets: the seam that transports see, and its implementation on the operating system.
//!
//! Sockets are non-blocking and are read and written with plain vectored system calls from the reactor that owns them;
//! readiness comes from the reactor's [`park`](crate::park) set.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};

use crate::park::Source;

/// Opens sockets.
pub trait Network: Send + Sync {
    /// Listens on `addr` (port 0: a free port is chosen).
    ///
    /// # Errors
    /// As the host says: address in use, not available, no permission.
    fn listen(&self, addr: SocketAddr, backlog: u32) -> io::Result<Box<dyn Listener>>;

    /// Starts to connect to `addr`; the stream is writable once that has happened, and reports a failure from its
    /// first `send` or `recv`.
    ///
    /// # Errors
    /// When the host refuses at once.
    fn connect(&self, addr: SocketAddr) -> io::Result<Box<dyn Stream>>;
}

/// A listening socket.
pub trait Listener: Send {
    /// The next connection; `WouldBlock` when there is none.
    ///
    /// # Errors
    /// `WouldBlock`, or as the host says (out of descriptors: the connection stays queued).
    fn accept(&mut self) -> io::Result<Box<dyn Stream>>;
    /// The address listened on, with the port that was chosen.
    fn local_addr(&self) -> SocketAddr;
    /// What to watch.
    fn source(&self) -> Source;
}

/// A connected (or connecting) stream. Dropping it closes it.
pub trait Stream: Send {
    /// Reads into `bufs` in order. `Ok(0)` is the end of the stream (when `bufs` has room).
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there; anything else ends the stream.
    fn recv(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize>;
    /// Writes from `bufs` in order, as much as there is room for.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room; anything else ends the stream.
    fn send(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize>;
    /// What to watch.
    fn source(&self) -> Source;
    /// The other end's address.
    fn peer_addr(&self) -> SocketAddr;
    /// This end's address.
    fn local_addr(&self) -> SocketAddr;
    /// Says that nothing more will be sent; the peer reads the end of the stream after what was sent.
    fn shutdown_write(&mut self);
}

/// Sockets of the operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsNetwork;

impl Network for OsNetwork {
    fn listen(&self, addr: SocketAddr, backlog: u32) -> io::Result<Box<dyn Listener>> {
        use rustix::net::{self, AddressFamily, SocketFlags, SocketType, sockopt};
        let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = net::socket_with(family, SocketType::STREAM, flags, None)?;
        sockopt::set_socket_reuseaddr(&fd, true)?;
        if addr.is_ipv6() {
            // An IPv6 wildcard serves IPv6; IPv4 is asked for by its own listener.
            sockopt::set_ipv6_v6only(&fd, true)?;
        }
        net::bind(&fd, &addr)?;
        net::listen(&fd, i32::try_from(backlog).unwrap_or(i32::MAX))?;
        let listener = TcpListener::from(fd);
        let local = listener.local_addr()?;
        Ok(Box::new(OsListener { listener, local }))
    }

    fn connect(&self, addr: SocketAddr) -> io::Result<Box<dyn Stream>> {
        use rustix::net::{self, AddressFamily, SocketFlags, SocketType};
        let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = net::socket_with(family, SocketType::STREAM, flags, None)?;
        match net::connect(&fd, &addr) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(errno) => return Err(errno.into()),
        }
        OsStream::boxed(fd, addr)
    }
}

struct OsListener {
    listener: TcpListener,
    local: SocketAddr,
}

impl Listener for OsListener {
    fn accept(&mut self) -> io::Result<Box<dyn Stream>> {
        use rustix::net::{SocketFlags, acceptfrom_with};
        loop {
            match acceptfrom_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok((fd, peer)) => {
                    let peer = peer.and_then(|p| SocketAddr::try_from(p).ok());
                    let peer = peer.ok_or_else(|| io::Error::other("a connection without an address"))?;
                    return OsStream::boxed(fd, peer);
                }
                // The peer went away between its connection and this call: look at the next.
                Err(rustix::io::Errno::CONNABORTED | rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn local_addr(&self) -> SocketAddr {
        self.local
    }

    fn source(&self) -> Source {
        Source::Fd(self.listener.as_raw_fd())
    }
}

struct OsStream {
    stream: TcpStream,
    peer: SocketAddr,
    local: SocketAddr,
}

impl OsStream {
    fn boxed(fd: OwnedFd, peer: SocketAddr) -> io::Result<Box<dyn Stream>> {
        let stream = TcpStream::from(fd);
        // Replies are gathered before they are sent; waiting for more would only add latency.
        stream.set_nodelay(true)?;
        let local = stream.local_addr()?;
        Ok(Box::new(OsStream { stream, peer, local }))
    }
}

impl Stream for OsStream {
    #[inline]
    fn recv(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        use rustix::net::{RecvFlags, recv};
        loop {
            let result = match &mut *bufs {
                [one] => recv(&self.stream, &mut **one, RecvFlags::empty()).map(|(n, _)| n),
                many => rustix::io::readv(&self.stream, many),
            };
            match result {
                Err(rustix::io::Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    #[inline]
    fn send(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        use rustix::net::{SendAncillaryBuffer, SendFlags, send, sendmsg};
        loop {
            let result = match bufs {
                [one] => send(&self.stream, one, SendFlags::NOSIGNAL),
                many => sendmsg(&self.stream, many, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL),
            };
            match result {
                Err(rustix::io::Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    fn source(&self) -> Source {
        Source::Fd(self.stream.as_raw_fd())
    }

    fn peer_addr(&self) -> SocketAddr {
        self.peer
    }

    fn local_addr(&self) -> SocketAddr {
        self.local
    }

    fn shutdown_write(&mut self) {
        // A stream that is already gone needs no farewell.
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
    }
}

impl fmt::Debug for dyn Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({} <- {})", self.local_addr(), self.peer_addr())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::park::{EpollParker, Parker};

    fn wait_for(parker: &mut EpollParker, want: u64) {
        let mut out = Vec::new();
        while !out.iter().any(|r: &crate::park::Ready| r.token == want && r.readable) {
            parker.wait(None, &mut out).unwrap();
        }
    }

    #[test]
    fn bytes_cross_a_connection_in_order() {
        let net = OsNetwork;
        let mut parker = EpollParker::new().unwrap();
        let mut listener = net.listen("127.0.0.1:0".parse().unwrap(), 16).unwrap();
        assert_eq!(listener.accept().err().unwrap().kind(), io::ErrorKind::WouldBlock);
        parker.watch(listener.source(), 1).unwrap();
        let mut client = net.connect(listener.local_addr()).unwrap();
        wait_for(&mut parker, 1);
        let mut server = listener.accept().unwrap();
        assert_eq!(server.peer_addr(), client.local_addr());
        parker.watch(server.source(), 2).unwrap();
        assert_eq!(client.send(&[IoSlice::new(b"hel"), IoSlice::new(b"lo")]).unwrap(), 5);
        wait_for(&mut parker, 2);
        let (mut a, mut b) = ([0; 2], [0; 9]);
        assert_eq!(server.recv(&mut [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)]).unwrap(), 5);
        assert_eq!((&a, &b[..3]), (b"he", &b"llo"[..]));
        client.shutdown_write();
        wait_for(&mut parker, 2);
        assert_eq!(server.recv(&mut [IoSliceMut::new(&mut a)]).unwrap(), 0);
        parker.unwatch(server.source());
    }

    #[test]
    fn a_port_in_use_is_an_error() {
        let net = OsNetwork;
        let listener = net.listen("127.0.0.1:0".parse().unwrap(), 16).unwrap();
        assert_eq!(net.listen(listener.local_addr(), 16).err().unwrap().kind(), io::ErrorKind::AddrInUse);
    }
}
