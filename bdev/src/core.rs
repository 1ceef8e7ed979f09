//! The bdev layer.
//!
//! # Path of an I/O
//! ```text
//! client --submit--> IoRuntime: pool, checks, locks, split, emulation --> IoChannel::submit --> device
//!                                                                             |   same reactor: IoCx::complete
//! client <--inbox--- IoRuntime: sagas, IoChannel::completed, statistics <-----+   other thread: Io::complete -> ring
//! ```
//! One [`Io`] travels the whole way. A layer that needs it back leaves a frame on it; splitting and emulation rewrite the
//! same `Io` piece by piece, so they need no memory and cannot run out of slots half way.
//!
//! # Rooms
//! | module | concern |
//! |---|---|
//! | [`types`] | operations, statuses, geometry |
//! | [`io`] | the travelling I/O, its pool and its home |
//! | [`channel`] | the traits that a module implements |
//! | [`cx`] | what a module is lent while it works |
//! | [`runtime`] | one reactor's part of the layer |
//! | [`children`] | I/Os that a device makes of one |
//! | [`claims`] | which blocks are being changed: what overlaps waits |
//! | [`spares`] | I/Os for devices that do I/O of their own below themselves |
//! | [`saga`] | split and emulated operations |
//! | [`locks`] | range locks and quiescing across reactors |
//! | [`registry`] | names, descriptors, claims |
//! | [`system`] | the control plane: register, remove, resize, statistics |
//! | [`stats`] | counters |

pub mod channel;
pub mod children;
pub mod claims;
pub mod cx;
pub mod io;
pub mod locks;
pub mod registry;
pub mod runtime;
pub mod saga;
pub mod spares;
pub mod stats;
mod steps;
pub mod system;
pub mod types;

pub use channel::{Bdev, IoChannel};
pub use cx::{ChannelCx, IoCx};
pub use io::{Completion, Io, IoRequest, IoTag};
pub use registry::{BdevEvent, BdevInfo, ClaimKind, Descriptor};
pub use runtime::{ChannelId, ClientId, IoRuntime, RuntimeConfig};
pub use stats::IoStats;
pub use system::{BdevError, BdevSystem, NewBdev};
pub use types::{Geometry, IoStatus, Op, OpKind, OpSet};
