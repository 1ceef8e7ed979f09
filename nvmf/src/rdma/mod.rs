//! NVMe/RDMA: capsules, and the machines and transports that move them.
//!
//! | module | concern |
//! |---|---|
//! | [`capsule`] | command capsules and their data descriptors, both directions |
//! | [`queue`] | a queue pair of the target, without I/O: credits, transfers, order |
//! | [`group`] | what the queue pairs of one reactor share: hubs of devices |
//! | [`transport`] | the target's transport |
//!
//! Private data of connections is in [`crate::spec::rdma`]; devices are behind the seam [`reactor::rdma`].

pub mod capsule;
pub mod group;
pub mod queue;
pub mod transport;
