//! The tools that reach a target over NVMe-oF, or a bdev in their own process, against the real binary.

#[path = "../common/mod.rs"]
mod common;

mod bdevperf;
mod library;
mod look;
mod memory;
mod moving;
mod perf;
mod progress;
mod stage;
