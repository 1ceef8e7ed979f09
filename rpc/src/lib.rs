//! JSON-RPC 2.0 control plane: method table, server, client.
//!
//! Speaks what SPDK's rpc.py and the scripts around it expect, on a Unix
//! socket, on a thread of its own, never on a reactor.
//!
//! - [`Table`] merges the methods that modules declare in the words of the
//!   `schema` crate, checks each call and runs it; changes one at a time, each
//!   saved before it is answered.
//! - [`Server`](server::Server) serves a table on a Unix socket;
//!   [`framer`] finds the requests in its bytes.
//! - [`config`] loads and writes configuration documents.
//! - [`client`] and [`args`] are the other side, for the command line.
//! - [`Catalogue`] is the table as help and as a reference page.
#![forbid(unsafe_code)]

pub mod args;
pub mod catalogue;
pub mod client;
pub mod config;
mod dispatch;
pub mod framer;
pub mod framework;
mod json;
pub mod log;
pub mod reactors;
pub mod runtime;
pub mod server;
pub mod table;

pub use catalogue::Catalogue;
pub use client::{Client, ClientError};
pub use dispatch::{MAX_BATCH, MAX_REPLY_BYTES};
pub use framework::{Host, KillSignal};
pub use server::{BindError, Limits, Server};
pub use table::{AfterChange, BuildError, Phase, Table, TableBuilder};
