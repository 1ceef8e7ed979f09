//! The most memory that hosts can make the target take, beside the reactors' pools: the sum that docs/performance.md states.
//!
//! Everything that a host can fill has a bound that the transport's options set. What is bounded per reactor or per device (pools,
//! I/Os, scratch areas) does not grow with connections and is not here.

use super::controller::{Controller, ERROR_LOG_ENTRIES, MAX_CHANGED_NAMESPACES};
use super::poll_group::queue_pair_bytes;
use super::shared::ControllerShared;
use super::view::TransportOptions;
use crate::tcp::transport::queue_bytes;

/// Names that a controller keeps: NQNs of its host and subsystem, which are at most 223 bytes, in a few places.
const NAMES_BYTES: usize = 8 * 256;
/// An entry of the error log.
const ERROR_BYTES: usize = 64;
/// An entry of a map, with its share of the map's nodes.
const ENTRY_BYTES: usize = 48;

/// Of one NVMe/TCP connection, with a queue as large as the options allow: machine, slots, output, places for its commands.
/// Beside it, only while its commands wait for payload memory, [`UNREAD_BYTES`].
pub fn connection_bytes(options: &TransportOptions) -> usize {
    let depth = options.max_queue_depth.max(options.max_aq_depth) as usize;
    queue_bytes(options) + queue_pair_bytes(depth)
}

/// Bytes received of a connection whose commands wait for memory, at most.
pub const UNREAD_BYTES: usize = crate::tcp::transport::SCRATCH_BYTES;

/// Of one controller, on top of its admin queue's connection: features, events, error log, list of queues, changed namespaces.
pub fn controller_bytes(options: &TransportOptions) -> usize {
    size_of::<Controller>()
        + size_of::<ControllerShared>()
        + NAMES_BYTES
        + ERROR_LOG_ENTRIES * ERROR_BYTES
        + usize::from(options.max_io_qpairs_per_ctrlr) * ENTRY_BYTES
        + MAX_CHANGED_NAMESPACES * ENTRY_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    /// docs/performance.md states these for the defaults.
    #[test]
    fn the_defaults_are_what_is_documented() {
        let options = TransportOptions::default();
        let (connection, controller) = (connection_bytes(&options), controller_bytes(&options));
        assert!((48 << 10..=64 << 10).contains(&connection), "{connection} bytes a connection");
        assert!(controller <= 80 << 10, "{controller} bytes a controller");
        assert_eq!(UNREAD_BYTES, 512 << 10);
    }

    #[test]
    fn queues_cost_in_proportion_to_their_depth() {
        let of =
            |max_queue_depth| connection_bytes(&TransportOptions { max_queue_depth, ..TransportOptions::default() });
        assert!(of(1024) > 4 * of(128) && of(1024) < 9 * of(128), "{} and {}", of(128), of(1024));
    }
}
