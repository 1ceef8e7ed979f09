//! NVMe over Fabrics: wire format, protocol machines, target.
