//! NBD exports as their users meet them: the real binary, and clients on its sockets.

#[path = "../common/mod.rs"]
mod common;

mod client;
mod exports;
mod faults;
mod log;
mod tools;
