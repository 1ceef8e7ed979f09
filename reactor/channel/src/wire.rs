//! What a channel runs on: TCP of a platform, or rsockets.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use reactor::net::{Address, Listener, Network, Stream};
use reactor::park::{Ready, Source};
use verbs::{Rsocket, RsocketOptions};

use crate::closer::{Closer, Permit};

/// A non-blocking byte stream, connected or connecting.
pub trait Wire: Send {
    /// Looks whether there is something to do; `write` says that there is something to send. To be called before a round of
    /// receives and sends.
    ///
    /// # Errors
    /// The stream has failed.
    fn poll(&mut self, write: bool) -> io::Result<()>;
    /// Whether it is known to be connected. Never becomes false again.
    fn is_connected(&self) -> bool;
    /// Receives what is there; 0 is the end.
    ///
    /// # Errors
    /// `WouldBlock`; anything else ends the stream.
    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<usize>;
    /// Sends as much as there is room for.
    ///
    /// # Errors
    /// As [`Wire::recv`].
    fn send(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// What announces that there is something to do; `None`: only polling tells.
    fn source(&self) -> Option<Source>;
    /// The source, which is watched, has announced something.
    fn ready(&mut self, ready: Ready);
    /// The source is watched from now on.
    fn set_watched(&mut self);
    /// Whether polling it now may find something.
    fn has_input(&self) -> bool;
    /// Whether sending now may find room.
    fn has_room(&self) -> bool;
    /// The other end.
    fn peer_addr(&self) -> SocketAddr;
    /// This end.
    fn local_addr(&self) -> SocketAddr;
}

/// Where connections arrive.
pub trait WireListener: Send {
    /// The next one.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    fn accept(&mut self) -> io::Result<Box<dyn Wire>>;
    /// The address, with the port that was chosen.
    fn local_addr(&self) -> SocketAddr;
    /// What announces connections; `None`: only polling tells.
    fn source(&self) -> Option<Source>;
}

/// Makes streams.
pub trait Wires: Send + Sync {
    /// For reports.
    fn name(&self) -> &'static str;
    /// Starts to connect.
    ///
    /// # Errors
    /// When the host refuses at once, or something that is needed is missing.
    fn connect(&self, addr: SocketAddr) -> io::Result<Box<dyn Wire>>;
    /// Listens. Port 0 chooses a free one.
    ///
    /// # Errors
    /// When the host refuses, or something that is needed is missing.
    fn listen(&self, addr: SocketAddr, backlog: u32) -> io::Result<Box<dyn WireListener>>;
    /// Waits until every stream and listener is closed, as long as their peers take, but not longer than `limit`; how many are
    /// not. A process does so before it ends, or its libraries are taken down under the thread that closes; what is not closed
    /// in a good while waits in the kernel, and can be left there.
    fn wait_closed(&self, _limit: Duration) -> usize {
        0
    }
}

fn ip(address: &Address) -> SocketAddr {
    address.ip().expect("a TCP socket has an address and a port")
}

/// TCP of a platform.
pub struct TcpWires {
    network: Arc<dyn Network>,
}

impl TcpWires {
    /// Over `network`.
    pub fn new(network: Arc<dyn Network>) -> TcpWires {
        TcpWires { network }
    }
}

impl fmt::Debug for TcpWires {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TcpWires")
    }
}

impl Wires for TcpWires {
    fn name(&self) -> &'static str {
        "tcp"
    }

    fn connect(&self, addr: SocketAddr) -> io::Result<Box<dyn Wire>> {
        Ok(Box::new(TcpWire::new(self.network.connect(addr)?)))
    }

    fn listen(&self, addr: SocketAddr, backlog: u32) -> io::Result<Box<dyn WireListener>> {
        Ok(Box::new(TcpWireListener(self.network.listen(addr, backlog)?)))
    }
}

struct TcpWireListener(Box<dyn Listener>);

impl WireListener for TcpWireListener {
    fn accept(&mut self) -> io::Result<Box<dyn Wire>> {
        Ok(Box::new(TcpWire::new(self.0.accept()?)))
    }

    fn local_addr(&self) -> SocketAddr {
        ip(&self.0.local_addr())
    }

    fn source(&self) -> Option<Source> {
        Some(self.0.source())
    }
}

/// A TCP stream. Unless it is watched, each poll tries both directions.
struct TcpWire {
    stream: Box<dyn Stream>,
    watched: bool,
    readable: bool,
    writable: bool,
    ended: bool,
}

impl TcpWire {
    fn new(stream: Box<dyn Stream>) -> TcpWire {
        TcpWire { stream, watched: false, readable: true, writable: true, ended: false }
    }
}

impl Wire for TcpWire {
    fn poll(&mut self, _write: bool) -> io::Result<()> {
        if !self.watched {
            (self.readable, self.writable) = (true, true);
        }
        Ok(())
    }

    fn is_connected(&self) -> bool {
        // A stream that is not connected yet takes nothing and has nothing, which is all that matters.
        true
    }

    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if !self.readable {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        match self.stream.recv(&mut [IoSliceMut::new(bytes)]) {
            // A short count means that there is no more; but the end behind these bytes was announced with them.
            Ok(n) => {
                self.readable = n == bytes.len() || self.ended;
                Ok(n)
            }
            Err(error) => {
                self.readable &= error.kind() != io::ErrorKind::WouldBlock;
                Err(error)
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.writable {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let sent = self.stream.send(&[IoSlice::new(bytes)]);
        self.writable = matches!(sent, Ok(n) if n == bytes.len());
        match sent {
            // Before a connection is there, the host says so.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Err(io::ErrorKind::WouldBlock.into()),
            other => other,
        }
    }

    fn source(&self) -> Option<Source> {
        Some(self.stream.source())
    }

    fn ready(&mut self, ready: Ready) {
        self.readable |= ready.readable;
        self.writable |= ready.writable;
        self.ended |= ready.ended;
    }

    fn set_watched(&mut self) {
        self.watched = true;
    }

    fn has_input(&self) -> bool {
        !self.watched || self.readable
    }

    fn has_room(&self) -> bool {
        !self.watched || self.writable
    }

    fn peer_addr(&self) -> SocketAddr {
        ip(&self.stream.peer_addr())
    }

    fn local_addr(&self) -> SocketAddr {
        ip(&self.stream.local_addr())
    }
}

/// rsockets. Each is closed on a thread of `closer`.
#[derive(Debug)]
pub struct RsocketWires {
    closer: Arc<Closer>,
    options: RsocketOptions,
}

/// rsockets that one [`RsocketWires`] has open at once, listeners included. A process may not have more altogether.
pub const MAX_RSOCKETS: usize = verbs::MAX_CONNECTIONS + verbs::MAX_LISTENERS;

impl RsocketWires {
    /// With queues and buffers as `options` says. The first one of a process takes its time: it makes librdmacm ready, so that
    /// nobody who connects or accepts waits for that.
    ///
    /// # Errors
    /// What is missing: a library, a device. When the host refuses a thread.
    pub fn new(options: RsocketOptions) -> io::Result<RsocketWires> {
        verbs::prepare_rsockets()?;
        Ok(RsocketWires { closer: Arc::new(Closer::new(MAX_RSOCKETS)?), options })
    }

    fn permit(&self) -> io::Result<Permit> {
        let full = || io::Error::other(format!("{MAX_RSOCKETS} rsockets are open or being closed: use fewer channels"));
        self.closer.permit().ok_or_else(full)
    }
}

impl Wires for RsocketWires {
    fn name(&self) -> &'static str {
        "rsocket"
    }

    fn connect(&self, addr: SocketAddr) -> io::Result<Box<dyn Wire>> {
        let permit = self.permit()?;
        let socket = Rsocket::connect(addr, &self.options)?;
        Ok(Box::new(RsocketWire::new(socket, permit, addr, false)))
    }

    fn listen(&self, addr: SocketAddr, backlog: u32) -> io::Result<Box<dyn WireListener>> {
        let permit = self.permit()?;
        let socket = Rsocket::listen(addr, backlog, &self.options)?;
        let local = socket.local_addr()?;
        Ok(Box::new(RsocketListener { open: Open::new(socket, permit), closer: Arc::clone(&self.closer), local }))
    }

    fn wait_closed(&self, limit: Duration) -> usize {
        self.closer.wait_idle(limit)
    }
}

/// An rsocket that goes to the closer when it is dropped.
struct Open(Option<(Rsocket, Permit)>);

impl Open {
    fn new(socket: Rsocket, permit: Permit) -> Open {
        Open(Some((socket, permit)))
    }

    fn socket(&self) -> &Rsocket {
        let (socket, _) = self.0.as_ref().expect("it is open until it is dropped");
        socket
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some((socket, permit)) = self.0.take() {
            permit.close(Box::new(socket));
        }
    }
}

struct RsocketListener {
    open: Open,
    closer: Arc<Closer>,
    local: SocketAddr,
}

impl WireListener for RsocketListener {
    fn accept(&mut self) -> io::Result<Box<dyn Wire>> {
        if !self.open.socket().poll(false)?.readable {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // A connection that finds no place waits in the backlog.
        let permit = self.closer.permit().ok_or(io::ErrorKind::WouldBlock)?;
        let socket = self.open.socket().accept()?;
        let peer = socket.peer_addr()?;
        Ok(Box::new(RsocketWire::new(socket, permit, peer, true)))
    }

    fn local_addr(&self) -> SocketAddr {
        self.local
    }

    fn source(&self) -> Option<Source> {
        None
    }
}

/// An rsocket stream: one look without waiting per poll says which directions to try.
struct RsocketWire {
    open: Open,
    peer: SocketAddr,
    connected: bool,
    readable: bool,
    writable: bool,
}

impl RsocketWire {
    fn new(socket: Rsocket, permit: Permit, peer: SocketAddr, connected: bool) -> RsocketWire {
        RsocketWire { open: Open::new(socket, permit), peer, connected, readable: false, writable: false }
    }
}

impl Wire for RsocketWire {
    fn poll(&mut self, write: bool) -> io::Result<()> {
        let found = self.open.socket().poll(write || !self.connected)?;
        if !self.connected {
            if !found.writable {
                return Ok(());
            }
            self.open.socket().connected()?;
            self.connected = true;
        }
        (self.readable, self.writable) = (found.readable, found.writable);
        Ok(())
    }

    fn is_connected(&self) -> bool {
        self.connected
    }

    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if !self.connected || !self.readable {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let received = self.open.socket().recv(bytes);
        self.readable = matches!(received, Ok(n) if n > 0);
        received
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.connected || !self.writable {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let sent = self.open.socket().send(bytes);
        self.writable = matches!(sent, Ok(n) if n == bytes.len());
        sent
    }

    fn source(&self) -> Option<Source> {
        None
    }

    fn ready(&mut self, _ready: Ready) {}

    fn set_watched(&mut self) {}

    fn has_input(&self) -> bool {
        true
    }

    fn has_room(&self) -> bool {
        true
    }

    fn peer_addr(&self) -> SocketAddr {
        self.peer
    }

    fn local_addr(&self) -> SocketAddr {
        self.open.socket().local_addr().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)))
    }
}
