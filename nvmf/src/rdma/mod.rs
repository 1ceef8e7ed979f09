//! NVMe/RDMA: capsules, and the machines and transports that move them.
//!
//! | module | concern |
//! |---|---|
//! | [`capsule`] | command capsules and their data descriptors, both directions |
//! | [`queue`] | a queue pair of the target, without I/O: credits, transfers, order |
//! | [`group`] | what the queue pairs of one reactor share: hubs of devices |
//! | [`transport`] | the target's transport |
//! | [`host`] | the host's machine of one queue pair |
//! | `host_group` | what the host's queue pairs of one reactor share: hubs of devices |
//! | [`host_transport`] | the host's transport over the seam |
//!
//! Private data of connections is in [`crate::spec::rdma`]; devices are behind the seam [`reactor::rdma`].

pub mod capsule;
pub mod group;
pub mod host;
mod host_group;
pub mod host_transport;
pub mod queue;
pub mod transport;
