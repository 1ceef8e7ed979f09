//! Stream sockets: the seam that front ends see, and its implementation on the operating system.
//!
//! Sockets are non-blocking and are read and written with plain vectored system calls from the reactor that owns them;
//! readiness comes from the reactor's [`park`](crate::park) set. A socket has an [`Address`]: of the network, or a path of
//! the file system (a Unix socket, whose file [`unix`] looks after).

mod unix;

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use crate::park::Source;

/// Where a socket listens, or where its other end is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Address {
    /// TCP, over IPv4 or IPv6.
    Ip(SocketAddr),
    /// A Unix socket's file. Empty for an end that has none, as clients have.
    Unix(PathBuf),
}

impl Address {
    /// The address and port, of a TCP socket.
    pub fn ip(&self) -> Option<SocketAddr> {
        match self {
            Address::Ip(addr) => Some(*addr),
            Address::Unix(_) => None,
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(addr: SocketAddr) -> Address {
        Address::Ip(addr)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Ip(addr) => addr.fmt(f),
            Address::Unix(path) if path.as_os_str().is_empty() => f.write_str("a local process"),
            Address::Unix(path) => path.display().fmt(f),
        }
    }
}

/// Opens sockets.
pub trait Network: Send + Sync {
    /// Listens on `at`. Of a network address, port 0 chooses a free port. A Unix socket's file is made with mode 0600,
    /// replaces one that nobody answers on, and is removed when the listener is dropped.
    ///
    /// # Errors
    /// As the host says: address in use (a Unix socket that somebody answers on included), not available, no permission;
    /// `AlreadyExists` when the path is something other than a socket.
    fn listen_at(&self, at: &Address, backlog: u32) -> io::Result<Box<dyn Listener>>;

    /// Starts to connect to `to`; the stream is writable once that has happened, and reports a failure from its first
    /// `send` or `recv`.
    ///
    /// # Errors
    /// When the host refuses at once.
    fn connect_to(&self, to: &Address) -> io::Result<Box<dyn Stream>>;

    /// [`Network::listen_at`] an address of the network.
    ///
    /// # Errors
    /// As there.
    fn listen(&self, addr: SocketAddr, backlog: u32) -> io::Result<Box<dyn Listener>> {
        self.listen_at(&Address::Ip(addr), backlog)
    }

    /// [`Network::connect_to`] an address of the network.
    ///
    /// # Errors
    /// As there.
    fn connect(&self, addr: SocketAddr) -> io::Result<Box<dyn Stream>> {
        self.connect_to(&Address::Ip(addr))
    }
}

/// A listening socket.
pub trait Listener: Send {
    /// The next connection; `WouldBlock` when there is none.
    ///
    /// # Errors
    /// `WouldBlock`, or as the host says (out of descriptors: the connection stays queued).
    fn accept(&mut self) -> io::Result<Box<dyn Stream>>;
    /// The address listened on, with the port that was chosen.
    fn local_addr(&self) -> Address;
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
    fn peer_addr(&self) -> Address;
    /// This end's address.
    fn local_addr(&self) -> Address;
    /// Says that nothing more will be sent; the peer reads the end of the stream after what was sent.
    fn shutdown_write(&mut self);
}

/// Sockets of the operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsNetwork;

/// A socket as all of them are made.
fn socket(family: AddressFamily) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
}

fn family(addr: &SocketAddr) -> AddressFamily {
    if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

fn backlog_i32(backlog: u32) -> i32 {
    i32::try_from(backlog).unwrap_or(i32::MAX)
}

impl Network for OsNetwork {
    fn listen_at(&self, at: &Address, backlog: u32) -> io::Result<Box<dyn Listener>> {
        let addr = match at {
            Address::Ip(addr) => addr,
            Address::Unix(path) => {
                let (socket, file) = unix::listen(path, backlog_i32(backlog))?;
                return Ok(Box::new(OsListener { socket, local: at.clone(), elsewhere: None, _file: Some(file) }));
            }
        };
        let socket = socket(family(addr))?;
        let elsewhere = unpace(&socket);
        sockopt::set_socket_reuseaddr(&socket, true)?;
        if addr.is_ipv6() {
            // An IPv6 wildcard serves IPv6; IPv4 is asked for by its own listener.
            sockopt::set_ipv6_v6only(&socket, true)?;
        }
        rustix::net::bind(&socket, addr)?;
        rustix::net::listen(&socket, backlog_i32(backlog))?;
        let local = Address::Ip(ip_address(rustix::net::getsockname(&socket)?)?);
        Ok(Box::new(OsListener { socket, local, elsewhere, _file: None }))
    }

    fn connect_to(&self, to: &Address) -> io::Result<Box<dyn Stream>> {
        let addr = match to {
            Address::Ip(addr) => addr,
            Address::Unix(path) => {
                let socket = unix::connect(path)?;
                return Ok(Box::new(OsStream { socket, peer: to.clone(), local: Address::Unix(PathBuf::new()) }));
            }
        };
        let socket = socket(family(addr))?;
        if is_within_machine(addr) {
            unpace(&socket);
        }
        match rustix::net::connect(&socket, addr) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(errno) => return Err(errno.into()),
        }
        OsStream::tcp(socket, *addr, None)
    }
}

fn ip_address(any: rustix::net::SocketAddrAny) -> io::Result<SocketAddr> {
    SocketAddr::try_from(any).map_err(|_| io::Error::other("a connection without an address"))
}

struct OsListener {
    socket: OwnedFd,
    local: Address,
    /// Congestion control of connections from other machines; `None` for that which the socket has.
    elsewhere: Option<String>,
    /// Removed with the listener.
    _file: Option<unix::SocketFile>,
}

impl Listener for OsListener {
    fn accept(&mut self) -> io::Result<Box<dyn Stream>> {
        use rustix::net::acceptfrom_with;
        loop {
            match acceptfrom_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok((socket, peer)) => {
                    return match &self.local {
                        Address::Ip(_) => {
                            let peer = peer.ok_or_else(|| io::Error::other("a connection without an address"))?;
                            OsStream::tcp(socket, ip_address(peer)?, self.elsewhere.as_deref())
                        }
                        local => {
                            let peer = Address::Unix(PathBuf::new());
                            Ok(Box::new(OsStream { socket, peer, local: local.clone() }))
                        }
                    };
                }
                // The peer went away between its connection and this call: look at the next.
                Err(rustix::io::Errno::CONNABORTED | rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn local_addr(&self) -> Address {
        self.local.clone()
    }

    fn source(&self) -> Source {
        Source::Fd(self.socket.as_raw_fd())
    }
}

/// Congestion control of a connection within this machine, which every Linux has.
///
/// Nothing is lost there for want of bandwidth, and a sender that paces itself by the bandwidth which it believes to have
/// found, as BBR does, can only be wrong: with it, a connection stayed at half of what it could do for as long as it lasted,
/// as often as not, while a timer sent for it.
const LOCAL_CONGESTION: &str = "reno";

/// Has a socket use [`LOCAL_CONGESTION`], and so what it accepts; says what it used before, if that is something else. To be
/// done before there is a connection: one that has begun to pace itself goes on with that under any other congestion control.
/// An administrator may have forbidden it; then connections are slower, and right all the same.
fn unpace(socket: &OwnedFd) -> Option<String> {
    let before = sockopt::tcp_congestion(socket).ok().filter(|name| name != LOCAL_CONGESTION)?;
    sockopt::set_tcp_congestion(socket, LOCAL_CONGESTION).ok()?;
    Some(before)
}

/// Whether `peer` is an address of this machine: the one that it would itself be reached from. Nothing is sent to find out.
fn is_within_machine(peer: &SocketAddr) -> bool {
    let local = || -> rustix::io::Result<_> {
        let probe = rustix::net::socket_with(family(peer), SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        rustix::net::connect(&probe, peer)?;
        rustix::net::getsockname(&probe)
    };
    local().ok().and_then(|local| ip_address(local).ok()).is_some_and(|local| local.ip() == peer.ip())
}

/// Sets up the socket of a TCP connection; `elsewhere` is its congestion control if it is with another machine.
fn tune(socket: &OwnedFd, peer: SocketAddr, local: SocketAddr, elsewhere: Option<&str>) -> io::Result<()> {
    // Replies are gathered before they are sent; waiting for more would only add latency.
    sockopt::set_tcp_nodelay(socket, true)?;
    if let Some(name) = elsewhere.filter(|_| peer.ip() != local.ip()) {
        sockopt::set_tcp_congestion(socket, name)?;
    }
    Ok(())
}

struct OsStream {
    socket: OwnedFd,
    peer: Address,
    local: Address,
}

impl OsStream {
    fn tcp(socket: OwnedFd, peer: SocketAddr, elsewhere: Option<&str>) -> io::Result<Box<dyn Stream>> {
        let local = ip_address(rustix::net::getsockname(&socket)?)?;
        tune(&socket, peer, local, elsewhere)?;
        Ok(Box::new(OsStream { socket, peer: Address::Ip(peer), local: Address::Ip(local) }))
    }
}

impl Stream for OsStream {
    #[inline]
    fn recv(&mut self, bufs: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        use rustix::net::{RecvFlags, recv};
        loop {
            let result = match &mut *bufs {
                [one] => recv(&self.socket, &mut **one, RecvFlags::empty()).map(|(n, _)| n),
                many => rustix::io::readv(&self.socket, many),
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
                [one] => send(&self.socket, one, SendFlags::NOSIGNAL),
                many => sendmsg(&self.socket, many, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL),
            };
            match result {
                Err(rustix::io::Errno::INTR) => {}
                other => return Ok(other?),
            }
        }
    }

    fn source(&self) -> Source {
        Source::Fd(self.socket.as_raw_fd())
    }

    fn peer_addr(&self) -> Address {
        self.peer.clone()
    }

    fn local_addr(&self) -> Address {
        self.local.clone()
    }

    fn shutdown_write(&mut self) {
        // A stream that is already gone needs no farewell.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Write);
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
        cross(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into());
        let folder = Folder::new();
        cross(&Address::Unix(folder.0.join("socket")));
        assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 0, "the file goes with the listener");
    }

    fn cross(at: &Address) {
        let net = OsNetwork;
        let mut parker = EpollParker::new().unwrap();
        let mut listener = net.listen_at(at, 16).unwrap();
        assert_eq!(listener.accept().err().unwrap().kind(), io::ErrorKind::WouldBlock);
        parker.watch(listener.source(), 1).unwrap();
        let mut client = net.connect_to(&listener.local_addr()).unwrap();
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
    fn connections_within_the_machine_are_not_paced_and_others_are_what_the_host_makes_them() {
        let [here, port, there] = ["127.0.0.1:4420", "127.0.0.1:50000", "192.0.2.1:50000"].map(|a| a.parse().unwrap());
        assert!(is_within_machine(&port));
        assert!(!is_within_machine(&there));
        let of = |socket: &OwnedFd| sockopt::tcp_congestion(socket).unwrap();
        let untouched = of(&socket(AddressFamily::INET).unwrap());
        // As a listener's, and what it accepts.
        let listener = socket(AddressFamily::INET).unwrap();
        let elsewhere = unpace(&listener);
        assert_eq!(of(&listener), LOCAL_CONGESTION);
        assert_eq!(elsewhere.as_deref().unwrap_or(LOCAL_CONGESTION), untouched);
        for (peer, expected) in [(port, LOCAL_CONGESTION), (there, &untouched)] {
            let accepted = socket(AddressFamily::INET).unwrap();
            unpace(&accepted);
            tune(&accepted, peer, here, elsewhere.as_deref()).unwrap();
            assert_eq!(of(&accepted), expected);
        }
    }

    #[test]
    fn a_port_in_use_is_an_error() {
        let net = OsNetwork;
        let listener = net.listen("127.0.0.1:0".parse().unwrap(), 16).unwrap();
        assert_eq!(net.listen_at(&listener.local_addr(), 16).err().unwrap().kind(), io::ErrorKind::AddrInUse);
    }

    struct Folder(PathBuf);

    impl Folder {
        fn new() -> Folder {
            static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
            let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("ringstone-net-{}-{number}", std::process::id()));
            std::fs::create_dir(&path).unwrap();
            Folder(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_unix_socket_that_answers_is_left_and_one_that_does_not_is_replaced() {
        use std::os::unix::fs::PermissionsExt;
        let folder = Folder::new();
        let path = folder.0.join("socket");
        let at = Address::Unix(path.clone());
        let first = OsNetwork.listen_at(&at, 16).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let error = OsNetwork.listen_at(&at, 16).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{error}");
        OsNetwork.connect_to(&at).unwrap();
        drop(first);
        assert!(!path.exists());
        assert_eq!(OsNetwork.connect_to(&at).err().unwrap().kind(), io::ErrorKind::NotFound);
        // The standard library leaves its file behind, as a killed process does.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let second = OsNetwork.listen_at(&at, 16).unwrap();
        OsNetwork.connect_to(&at).unwrap();
        // A file that has meanwhile become somebody else's stays.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "mine").unwrap();
        drop(second);
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        let error = OsNetwork.listen_at(&at, 16).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{error}");
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_said() {
        let error = OsNetwork.listen_at(&Address::Unix(format!("/tmp/{}", "x".repeat(120)).into()), 1).err().unwrap();
        assert!(error.to_string().contains("107 bytes"), "{error}");
        let error = OsNetwork.listen_at(&Address::Unix("/nonexistent/socket".into()), 1).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
