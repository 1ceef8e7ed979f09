//! Handlers in processes of their own: the same requests, over shared memory.
//!
//! ```text
//! target                                              external process
//!   reactor 0: Lane  ==submissions==>  shared memory  ==>  worker thread: Worker::submit
//!                    <==completions==                 <==  complete(), on any thread
//!   thread:  Target  <--- Unix socket: greeting, descriptors, size, end --->  serve()
//! ```
//!
//! The target listens; the process connects, is given the memory and the doorbells, and may come and go: a crash costs what
//! [`OnDisconnect`] says, and no host has to reconnect. The target trusts nothing that it reads from the process; see
//! [`lane`].
//!
//! | module | concern |
//! |---|---|
//! | [`lane`] | the target's end on one reactor |
//! | [`target`] | the target's listener, one thread a device |
//! | [`process`] | the process's end: runs any [`Handler`](crate::Handler) |
//! | [`dock`] | both ends in one process, for simulators |

#[cfg(not(loom))]
mod link;
#[cfg(not(loom))]
mod memory;
#[cfg_attr(loom, allow(dead_code))]
mod ring;
#[cfg(not(loom))]
mod session;
#[cfg(not(loom))]
mod wire;
#[cfg(not(loom))]
mod worker;

#[cfg(not(loom))]
pub mod dock;
#[cfg(not(loom))]
pub mod lane;
#[cfg(not(loom))]
pub mod process;
#[cfg(not(loom))]
pub mod target;

#[cfg(not(loom))]
pub use lane::Lane;
#[cfg(not(loom))]
pub use process::{ServeOptions, Stop, serve};
#[cfg(not(loom))]
pub use target::{OnDisconnect, Target, TargetOptions};
#[cfg(not(loom))]
pub use wire::VERSION;
