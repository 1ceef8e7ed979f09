//! Byte-stream channels between two processes: one interface over TCP and over RDMA (rsockets).
//!
//! A [`Channel`] is polled by whoever owns it, on one reactor; nothing here waits, and no channel has a thread. Bytes go in
//! and come out in order, as many as there is room for at the moment; a full buffer is how either side learns that the other
//! is slower. Both ends agree on a version first, and notice within a second that the other has died.
//!
//! | module | concern |
//! |---|---|
//! | [`session`] | handshake, frames, keep-alives: bytes and time in, bytes and time out |
//! | [`wire`] | streams: of a platform's network, and rsockets |
//! | [`channel`] | a stream, its session and its buffers |
//! | [`closer`] | threads on which rsockets are closed, since that blocks |
//!
//! rsockets cannot sit in epoll or io_uring: whoever has one that matters must keep polling.

#![forbid(unsafe_code)]

pub mod channel;
pub mod closer;
pub mod session;
pub mod wire;

pub use channel::{Channel, ChannelListener, Received};
pub use session::{Fault, SessionConfig};
pub use wire::{RsocketWires, TcpWires, Wire, WireListener, Wires};
