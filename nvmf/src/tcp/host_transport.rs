//! NVMe/TCP as the host's transport: the sans-IO [`HostConnection`] on a stream of the reactor's network.
//!
//! One receive a poll: into the payload that the stream is in the middle of, and behind that into a scratch area that
//! all queue pairs of a thread share. The machine takes everything that comes, so nothing is kept back.

use std::cell::RefCell;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::sync::Arc;

use reactor::Buffers;
use reactor::net::{Network, Stream};
use reactor::park::{Ready, Source};

use super::connection::ADMIN_IN_CAPSULE_BYTES;
use super::host::{HostConfig, HostConnection};
use crate::host::transport::{Completion, Connector, Payload, Qpair, QueueName, Transport};
use crate::spec::Sqe;
use crate::target::view::TransportKind;

/// Bytes that one receive takes at most, besides data that lands in its place.
const SCRATCH_BYTES: usize = 256 * 1024;
/// Slices gathered into one send.
const SEND_SLICES: usize = 512;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH_BYTES]);
}

/// NVMe/TCP over a network.
pub struct TcpHost {
    /// Where sockets come from.
    pub network: Arc<dyn Network>,
}

impl Transport for TcpHost {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn connector(&self, address: SocketAddr, (header_digest, data_digest): (bool, bool)) -> Arc<dyn Connector> {
        Arc::new(TcpConnector { network: Arc::clone(&self.network), address, header_digest, data_digest })
    }
}

/// Makes NVMe/TCP queue pairs to one address.
pub struct TcpConnector {
    /// Where sockets come from.
    pub network: Arc<dyn Network>,
    /// The controller's address.
    pub address: SocketAddr,
    /// Ask for header digests.
    pub header_digest: bool,
    /// Ask for data digests.
    pub data_digest: bool,
}

impl Connector for TcpConnector {
    fn connect(&self, slots: u16, _queue: QueueName) -> io::Result<Box<dyn Qpair>> {
        let config = HostConfig { slots, header_digest: self.header_digest, data_digest: self.data_digest };
        let stream = self.network.connect(self.address)?;
        let connection = HostConnection::new(config);
        Ok(Box::new(TcpQpair { stream, connection, watched: false, readable: true, writable: true, ended: false }))
    }

    fn admin_in_capsule_bytes(&self) -> u32 {
        ADMIN_IN_CAPSULE_BYTES
    }
}

struct TcpQpair {
    stream: Box<dyn Stream>,
    connection: HostConnection,
    /// Readiness is announced; otherwise the two below stay true.
    watched: bool,
    readable: bool,
    writable: bool,
    /// The end of the stream has been announced, which happens once.
    ended: bool,
}

/// Errors of a stream that only mean "not now". A stream that is still connecting says that it is not connected.
fn is_not_now(error: &io::Error, initialised: bool) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.kind() == io::ErrorKind::NotConnected && !initialised
}

impl TcpQpair {
    fn receive(&mut self, scratch: &mut [u8]) -> Result<bool, String> {
        let direct = self.connection.read_target();
        let direct_len = direct.as_ref().map_or(0, |target| target.len());
        let asked = direct_len + scratch.len();
        let received = match direct {
            Some(target) => self.stream.recv(&mut [IoSliceMut::new(target), IoSliceMut::new(scratch)]),
            None => self.stream.recv(&mut [IoSliceMut::new(scratch)]),
        };
        let n = match received {
            Ok(0) => return Err("the controller closed the connection".into()),
            Ok(n) => n,
            Err(error) if is_not_now(&error, self.connection.is_ready()) => {
                self.readable = !self.watched;
                return Ok(false);
            }
            Err(error) => return Err(format!("receiving from {} failed: {error}", self.stream.peer_addr())),
        };
        // A short count means that the socket is empty; but the end behind these bytes may have been announced with them.
        self.readable = !self.watched || self.ended || n == asked;
        let direct_taken = n.min(direct_len);
        if direct_taken > 0 {
            self.connection.read_done(direct_taken);
        }
        if let Err(fault) = self.connection.handle_input(&scratch[..n - direct_taken]) {
            let why = fault.to_string();
            // What the target did wrong goes out if there is room for it; the queue pair is over either way.
            let _ = self.flush();
            return Err(why);
        }
        Ok(true)
    }
}

impl Qpair for TcpQpair {
    fn is_ready(&self) -> bool {
        self.connection.is_ready()
    }

    #[inline]
    fn can_submit(&self) -> bool {
        self.connection.can_submit()
    }

    fn can_submit_pair(&self) -> bool {
        self.connection.can_submit_pair()
    }

    #[inline]
    fn submit(&mut self, user: u64, sqe: Sqe, payload: Payload, data: Buffers) {
        self.connection.submit(user, sqe, payload, data);
    }

    fn poll(&mut self, done: &mut Vec<Completion>) -> Result<bool, String> {
        if !self.readable {
            return Ok(false);
        }
        let received = SCRATCH.with_borrow_mut(|scratch| self.receive(scratch))?;
        while let Some(completion) = self.connection.poll_completion() {
            done.push(completion);
        }
        Ok(received)
    }

    fn flush(&mut self) -> Result<(), String> {
        while self.writable && self.connection.wants_output() {
            let mut slices = [IoSlice::new(&[]); SEND_SLICES];
            let count = self.connection.poll_output(&mut slices);
            let offered: usize = slices[..count].iter().map(|slice| slice.len()).sum();
            match self.stream.send(&slices[..count]) {
                Ok(n) => {
                    self.connection.sent(n);
                    if n < offered {
                        self.writable = !self.watched;
                        break;
                    }
                }
                Err(error) if is_not_now(&error, self.connection.is_ready()) => {
                    self.writable = !self.watched;
                    break;
                }
                Err(error) => return Err(format!("sending to {} failed: {error}", self.stream.peer_addr())),
            }
        }
        Ok(())
    }

    fn outstanding(&self) -> usize {
        self.connection.outstanding()
    }

    fn cid_of(&self, user: u64) -> Option<u16> {
        self.connection.cid_of(user)
    }

    fn set_in_capsule_bytes(&mut self, bytes: u32) {
        self.connection.set_in_capsule_bytes(bytes);
    }

    fn close(&mut self, lost: &mut dyn FnMut(u64, Buffers)) {
        self.connection.drain(lost);
        self.stream.shutdown_write();
    }

    fn source(&self) -> Source {
        self.stream.source()
    }

    fn set_watched(&mut self) {
        self.watched = true;
    }

    fn ready(&mut self, ready: Ready) {
        self.readable |= ready.readable || ready.ended;
        self.writable |= ready.writable;
        self.ended |= ready.ended;
    }

    #[inline]
    fn has_work(&self) -> bool {
        self.readable || self.writable && self.connection.wants_output()
    }
}
