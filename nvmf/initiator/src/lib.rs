//! Remote NVMe-oF namespaces as bdevs.
//!
//! ```text
//!  bdev layer --submit--> head ---> local path ---> I/O queue        one of each a reactor
//!                          |  waits: no path, queue full
//!                          |  held: a write whose fate is unknown
//!  control plane <--news-- home: admin queue, keep-alive, recovery   on one reactor a path
//! ```
//!
//! | room | concern |
//! |---|---|
//! | [`path`] | what all reactors know of a path: its associations, and which of them have ended for sure |
//! | [`home`] | a path's control state machine, on one reactor |
//! | [`part`] | one reactor's queues, and the I/O on them |
//! | [`head`] | one reactor's way into one bdev: choice of the path, waiting, holding |
//! | [`policy`] | which path is chosen |
//! | [`disk`] | the bdev |
//! | [`scout`] | a discovery controller whose log is followed |
//! | [`system`] | the control plane: attach, detach, bdevs that follow their namespaces, controllers that follow a discovery log |
//! | [`rpc`] | the `bdev_nvme_*` methods |
//!
//! # When I/O in flight on a lost path is sent again
//! A command whose connection is lost may have been executed, may be executed later, or never.
//! - What only reads, and Flush, is sent again at once, on any path.
//! - What writes is *held* until its association is *fenced*: until it is known that the controller which may still have the
//!   command can execute nothing any more. It completes no sooner, not even as failed. An association is fenced when all its
//!   queues are closed on this side and either the controller has acknowledged its shutdown (CC.SHN, then CSTS.SHST =
//!   complete), or twice its keep-alive timeout and its command quiesce time (CQT) have passed since: the controller,
//!   which hears nothing, has ended the association by then (Base 3.9 and 9.6).
//! - A held write, write-zeroes, unmap or copy is then sent again; a compare-and-write would do something else the second
//!   time and ends as aborted.
//! - What writes waits while something that overlaps it and was submitted before it on the same reactor has not completed.
//!   Otherwise a write that is sent twice could have another one between its two executions: what was acknowledged, and read,
//!   would change back. Writes that are outstanding at once on several reactors have no order, as everywhere in the layer: of
//!   those that overlap and of which one is sent again, the other may show in between, until both have completed.
//!
//! So a write that has been completed, well or badly, never lands afterwards: what was acknowledged is only overwritten by
//! what was submitted later, or was outstanding beside it.
//!
//! A command that was completed with a path-related status was not executed, and is sent again on another path, or when the
//! access states have changed.
//!
//! # Bounds
//! What waits or is held is bounded by the reactor's I/O pool. It waits as long as a path may come back:
//! `fast_io_fail_timeout_sec`, then `ctrlr_loss_timeout_sec`; while every path is inaccessible, for the transition time that
//! the controller gives (ANATT).
#![forbid(unsafe_code)]

pub mod disk;
pub mod head;
pub mod home;
pub mod part;
pub mod path;
pub mod policy;
pub mod rpc;
pub mod scout;
pub mod system;

pub use part::Part;
pub use system::{InitiatorError, InitiatorSystem};
