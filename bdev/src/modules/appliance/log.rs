//! The built-in handler `log`: a log-structured store over another bdev, as the model of a handler that keeps data.
//!
//! Blocks are compressed, checksummed and appended to a log; a map in memory says where each block is; checkpoints of the map
//! bound how much of the log is replayed when the store is opened; a collector empties segments of which little is still in use.
//! Blocks of zeroes take no room.
//!
//! # Options
//! | option | meaning |
//! |---|---|
//! | `base_bdev` | the bdev that keeps the data; claimed |
//! | `segment_bytes` | unit of the collector, a power of two; chosen by the size of the base |
//! | `compression` | `lz4` (default) or `none`; may differ each time the store is opened |
//! | `format` | `true`: give up whatever the base holds. Without it only a blank base is formatted. Counts once: it is not saved |
//! | `accept_loss` | `true`: open a store whose log has a gap, without what is behind the gap. Counts once |
//!
//! # What to copy
//! `handler` is all there is to a handler over a lower bdev: options, a worker that feeds an engine, what the next worker finds after
//! a panic. The engine shows how to keep promises about durability without knowing about threads.
//!
//! | room | concern |
//! |---|---|
//! | [`format`](mod@format) | what is on the base device, byte by byte |
//! | [`map`] | where each block is |
//! | [`recovery`] | opening a store, and what is believed of what is found |
//! | [`engine`] | requests in, operations on the base out |
//! | `append` | blocks into batches, batches into the log, the log into the map |
//! | `read` | blocks out of the log |
//! | `checkpoint` | the map, written out |
//! | `space` | segments: which are free, and how much may be stored |
//! | `gc` | the collector |
//! | `handler` | the engine on a worker's thread, over its base |
//!
//! All of it but the last is free of threads, clocks and I/O: it says what the base is to do, and is told what came of it. That is what makes it
//! possible to try it against a base that loses power at every step.

mod append;
mod checkpoint;
pub mod engine;
pub mod format;
mod gc;
pub(super) mod handler;
pub mod map;
mod read;
pub mod recovery;
mod space;
#[cfg(test)]
mod tests;
