//! The reactor runtime: one pinned thread per core, polled, adaptive, deterministic when it must be.
//!
//! Everything above this crate runs on a [`Reactor`](reactor::Reactor): pollers are called in a loop, messages arrive
//! through a bounded mailbox, completions from other threads through a bounded [`ring`], and when nothing has
//! happened for a while the thread sleeps until a socket, a file completion, a message or a timer wakes it.
//!
//! Nothing here or above reads a clock, opens a socket, touches a file or starts a thread except through the seams
//! of a [`Platform`](platform::Platform). The operating system is one implementation; the simulator in `test/sim`
//! is another, and steps the same reactors on one thread over virtual time.
//!
//! | module | concern |
//! |---|---|
//! | [`time`] | instants, the clock seam |
//! | [`buffer`] | DMA-able buffer slabs and scatter lists |
//! | [`ring`] | bounded multi-producer single-consumer completion ring |
//! | [`mailbox`] | bounded message queue into a reactor |
//! | [`park`] | readiness and sleeping: the seam and the epoll implementation |
//! | [`net`] | stream sockets: the seam and the implementation |
//! | [`rdma`] | RDMA: the seam only |
//! | [`file`] | asynchronous file I/O: the seam and its engines |
//! | [`placement`] | which reactor a new connection goes to |
//! | [`platform`] | the bundle of seams a reactor is built on |
//! | [`reactor`] | the loop itself, pollers, statistics |

pub mod buffer;
pub mod file;
pub mod mailbox;
pub mod net;
pub mod park;
pub mod placement;
pub mod platform;
pub mod rdma;
pub mod reactor;
pub mod ring;
pub mod time;

pub use buffer::{Buffer, BufferPool, Buffers};
pub use platform::Platform;
pub use reactor::{Context, Poller, PollerId, Progress, Reactor, ReactorHandle, ReactorId, Schedule};
pub use time::{Clock, Instant};
