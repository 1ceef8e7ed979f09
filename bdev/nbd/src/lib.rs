//! NBD (Network Block Device): bdevs on Unix sockets, for every program that speaks the protocol.
//!
//! The protocol is the fixed newstyle handshake and the transmission phase of the NBD specification
//! (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>); the sections named in these modules are of that
//! document. All numbers on the wire are big-endian.
//!
//! ```text
//! nbd_export_add -> NbdSystem: opens the bdev, listens -> NbdGroup of reactor 0: accepts, places on a reactor
//! socket -> NbdGroup of that reactor -> Connection (no I/O of its own) -> operations -> bdev channel
//! ```
//!
//! | module | concern |
//! |---|---|
//! | [`wire`] | numbers, headers and replies as bytes |
//! | [`negotiation`] | options of the handshake |
//! | [`connection`] | the protocol machine of one connection |
//! | [`errors`] | what failed, in the protocol's numbers and in words |
//! | [`output`] | replies that wait to be sent |
//! | [`group`] | one reactor's connections |
//! | [`system`] | the control plane: exports come and go |
//! | [`rpc`] | its methods and its part of the configuration |

#![forbid(unsafe_code)]

pub mod connection;
pub mod errors;
pub mod group;
pub mod negotiation;
pub mod output;
pub mod rpc;
pub mod system;
pub mod wire;

#[cfg(test)]
mod tests;
