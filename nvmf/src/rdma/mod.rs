//! NVMe/RDMA: capsules, and the machines and transports that move them.
//!
//! | module | concern |
//! |---|---|
//! | [`capsule`] | command capsules and their data descriptors, both directions |
//!
//! Private data of connections is in [`crate::spec::rdma`]; devices are behind the seam [`reactor::rdma`].

pub mod capsule;
