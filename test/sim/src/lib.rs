//! Deterministic simulator: production reactors, bdevs and target over a seeded world.
//!
//! See the README beside this crate for what is simulated and how to run a failing seed again.

#![forbid(unsafe_code)]

pub mod disk;
pub mod host;
pub mod initiator;
pub mod liar;
pub mod load;
pub mod model;
pub mod nbd;
pub mod net;
mod park;
pub mod platform;
pub mod rdma;
pub mod rdma_vandal;
pub mod seeds;
pub mod sim;
pub mod tamper;
pub mod target;
pub mod trace;
pub mod vandal;
pub mod volume;
pub mod world;

pub use bdev::conformance::Rng;
pub use model::Model;
pub use sim::Sim;
pub use world::{Actor, World, WorldConfig};
