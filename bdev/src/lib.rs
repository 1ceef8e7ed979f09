//! Block devices on reactors.
//!
//! A [`Bdev`](core::Bdev) is shared by all reactors; its [`IoChannel`](core::IoChannel)s are not: each reactor that uses
//! the device has one, and every I/O submitted on a reactor completes on it. What all devices have in common
//! (validation, splitting, emulation, range locks, removal, statistics) is done once by the per-reactor
//! [`IoRuntime`](core::IoRuntime), so that a module is only the code that reads and writes.
//!
//! | module | concern |
//! |---|---|
//! | [`core`] | the layer: I/O, channels, runtime, registry, control plane |
//! | [`modules`] | the devices themselves, one line each in [`modules::MODULES`] |
//! | [`rpc`] | the methods that show and change all of it |
//! | [`conformance`] | what every device must do, as a suite that each module runs |

pub mod conformance;
pub mod core;
pub mod modules;
pub mod rpc;
