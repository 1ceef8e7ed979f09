//! Handlers: your own code behind a block device.
//!
//! An *appliance bdev* is a block device whose I/O is done by a [`Handler`]. Requests reach it on threads of its own
//! through rings; completions come home to the reactor that submitted through another ring, from whatever thread, in
//! whatever order. This crate is all that the author of a handler needs; `docs/appliance.md` walks through it.
//!
//! ```text
//! reactor: Io stays in a slot --Request--> submission ring --> worker thread: Worker::submit
//!             ^                                                    |  complete(): there, later, elsewhere
//!             +--------- completion ring <-- RingHome::send <------+
//! ```
//!
//! | module | concern |
//! |---|---|
//! | [`handler`] | the traits [`Handler`], [`Worker`] and [`Inline`], and what they are lent |
//! | [`request`] | the owned [`Request`], its body, and where it goes when it ends |
//! | [`home`] | the way home to a reactor, also for requests that come too late |
//! | [`registry`] | names of handlers |
//! | [`memory`] | the model handler: blocks in memory |
//! | [`null`] | a handler that does nothing, for measuring |
//! | [`placement`] | which worker gets a request |
//! | [`types`] | operations, statuses, geometry |
//! | [`external`] | handlers in processes of their own, over shared memory |
//! | [`layout`] | what lies where in that memory |
//! | [`abi`] | codes of operations and statuses |
//! | [`shared_object`] | handlers in C, loaded from shared objects |
//!
//! # Invariants
//! - A request ends exactly once: `complete` consumes it, and one that is dropped ends as failed.
//! - A request owns its payload until it ends. Whoever gave up waiting for it has no part of that memory any more.
//! - Nothing is allocated, locked or reference-counted for a request: its body comes from a pool, and so does its
//!   payload.

#![deny(unsafe_code)]

pub mod abi;
pub mod external;
pub mod handler;
pub mod home;
#[cfg_attr(loom, allow(dead_code))]
pub mod layout;
pub mod memory;
pub mod null;
pub mod placement;
pub mod registry;
pub mod request;
#[cfg(not(loom))]
pub mod shared_object;
pub mod types;

pub use handler::{Batch, Capabilities, Handler, Inline, Making, Worker, WorkerCx};
pub use registry::register;
pub use request::{Completions, Request, RequestId};
pub use types::{Geometry, IoStatus, Op, OpKind, OpSet};
