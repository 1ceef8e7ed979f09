//! What Linux never sends, over real connections to the real binary, byte by byte.
//!
//! Each test asserts what the specification names: FES and FEI of the termination request, or the status of the
//! completion; and that other hosts do not notice.

#[path = "../common/mod.rs"]
mod common;

mod commands;
mod crowd;
mod external;
mod fabrics;
mod framing;
mod host;
