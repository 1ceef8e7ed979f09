//! The NVMe-oF target: subsystems served to hosts over transports it does not know.
//!
//! # Control plane and reactors
//! The control plane owns the [`model`]: what was configured. At each change it builds a new [`view`] of the whole
//! target, immutable, and hands it to every reactor's [`poll_group`]; the change is done when every reactor says that
//! nothing of the old view is in use any more. Reactors never lock anything of the control plane's.
//!
//! # Data path
//! ```text
//! Transport qpair -> Event::Command{slot, sqe, data} -> io: namespace, range -> bdev channel of this reactor
//!                 <- complete(slot, cqe, data)       <- status               <- completion
//! ```
//! | module | concern |
//! |---|---|
//! | [`model`] | what was configured, checked |
//! | [`view`] | the target as reactors see it |
//! | [`poll_group`] | one reactor's queue pairs and the commands on them |
//! | [`shared`] | what the queues of one controller share across reactors |
//! | [`system`] | the control plane, and its seam to poll groups |
//! | [`memory`] | the most memory that hosts can make the target take |
//! | [`transport`] | what a transport is to the target |
//! | [`balance`] | moving queues between reactors by load |
//! | [`admin`] | the admin commands of a controller |
//! | [`connect`] | whether a queue may connect |
//! | [`controller`] | the brain of a controller: properties, admin commands, events, keep alive |
//! | [`discovery`] | the discovery log |

pub mod admin;
pub mod balance;
pub mod connect;
pub mod controller;
pub mod discovery;
mod io;
pub mod memory;
pub mod model;
pub mod poll_group;
pub mod shared;
pub mod system;
pub mod transport;
pub mod view;
