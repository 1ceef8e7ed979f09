//! NVMe over Fabrics: wire format, protocol machines, target, host.
//!
//! - [`spec`]: the bytes of the specifications as types, and the parse of a submission queue entry into a typed
//!   command. No state.
//! - [`rpc`]: the `nvmf_*` methods of the control plane.
//! - [`target`]: subsystems, controllers and namespaces, whatever the transport.
//! - [`host`]: an initiator: queue pairs and controllers, whatever the transport.
//! - [`tcp`]: NVMe/TCP as machines without I/O.
//! - [`rdma`]: NVMe/RDMA as machines without I/O.
#![forbid(unsafe_code)]

pub mod host;
pub mod rdma;
pub mod rpc;
pub mod spec;
pub mod target;
pub mod tcp;
