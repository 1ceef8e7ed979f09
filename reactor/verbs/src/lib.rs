//! RDMA: verbs, the connection manager and rsockets, through libraries that are opened at run time.
//!
//! Nothing of RDMA is needed to build this. Where the libraries or a device are missing, everything here answers with an
//! [`Error`] that names what is missing and how to get it.
//!
//! | module | concern |
//! |---|---|
//! | [`raw`] | C's structures, constants and functions, as far as they are used |
//! | [`library`] | the libraries, opened once |
//! | [`error`] | what is missing, what failed |
//! | [`device`] | devices, open devices, what they report |
//! | [`memory`] | protection domains, registered memory |
//! | [`queue`] | completion queues and channels, shared receive queues, queue pairs |
//! | [`cm`] | connections: identifiers, events, private data, rejects |
//! | [`hub`] | work on memory that belongs to it: what is safe to use |
//! | [`fabric`] | all of it as the seam [`reactor::rdma`], which transports use |
//! | [`rsocket`] | byte streams over verbs |
//!
//! ```text
//! Context <- ProtectionDomain <- MemoryRegion        an arrow is an Arc that the right one holds of the left one, so that
//!         <- CompletionChannel <- CompletionQueue    nothing ends before what was made of it
//!         <- ProtectionDomain <- SharedReceiveQueue
//! EventChannel <- CmId -owns-> QueuePair -> ProtectionDomain, CompletionQueue, SharedReceiveQueue
//! ```
//!
//! Unsafe code is here because calling C is the job. Beyond that, what posts work on memory says whose memory it is until
//! the work is done.

pub mod cm;
pub mod device;
pub mod error;
pub mod fabric;
pub mod hub;
pub mod library;
pub mod memory;
pub mod queue;
pub mod raw;
pub mod rsocket;

pub use cm::{CmId, CmKey, Event, EventChannel, EventKind};
pub use device::{AsyncEvent, Context, PortState, devices};
pub use error::{Error, Result};
pub use fabric::VerbsFabric;
pub use hub::{Exposed, Hub};
pub use memory::{Access, MemoryRegion, ProtectionDomain};
pub use queue::{CompletionChannel, CompletionQueue, Piece, QueuePair, SharedReceiveQueue, WorkCompletion};
pub use rsocket::{MAX_CONNECTIONS, MAX_LISTENERS, Rsocket, RsocketOptions, prepare as prepare_rsockets};
