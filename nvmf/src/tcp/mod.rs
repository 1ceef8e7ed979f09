//! NVMe/TCP: the codec, and the protocol machines of one queue pair: on the target's side here, on the host's in
//! [`host`].
//!
//! [`Connection`] does no I/O, has no clock and knows no reactor: bytes go in, commands come out; completions go in,
//! bytes come out. The simulator, the fuzzer and the reactor drive the same code.
//!
//! ```text
//!             ICReq                        fatal mistake of the host, terminate()
//!  AwaitIcReq -----> Ready -------------------------------> Terminating --(C2HTermReq sent)--> Closed
//!      |               |  H2CTermReq                                                             ^
//!      +---------------+-------------------------------------------------------------------------+
//! ```
//!
//! Receiving inside Ready:
//! ```text
//!   +------> Header --(capsule or H2CData with data)--> Data --(DDGST negotiated)--> Digest --+
//!   |          |  \--(in-capsule data, no memory)--> Stalled --(memory)--> Data               |
//!   |          |                                                                              |
//!   +----------+------------------------------------------------------------------------------+
//! ```
//!
//! A command's way is drawn in `slots`. The rules that hold throughout:
//! - A command is delivered when it can be executed: host data is complete, memory for data to the host is there.
//! - Commands that need memory get it in the order of their arrival. Only in-capsule data makes the stream wait, since
//!   it has nowhere else to go; all other commands wait aside, so that H2CData behind them, which will set memory
//!   free, is still read. See [`Need`] for what the allocator must guarantee.
//! - Nothing the peer says leads to an allocation above the configured limits, and every queue has a bound.
//! - The machine answers a broken protocol with C2HTermReq (TCP 3.6.2.4), a broken command with a status.

pub mod codec;
mod connection;
pub mod digest;
pub mod host;
mod host_output;
pub mod host_transport;
mod output;
mod receive;
mod slots;
pub mod transport;
pub mod wire_client;

#[cfg(test)]
mod tests;

pub use codec::{Fatal, Framing};
pub use connection::{
    ADMIN_IN_CAPSULE_BYTES, AbortOutcome, Alloc, Config, Connection, Event, Fault, Need, Negotiated, PeerDue,
};
