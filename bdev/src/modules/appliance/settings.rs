//! What a device was asked for: the parameters of `bdev_appliance_create`, checked.

pub use appliance::external::OnDisconnect;
pub use appliance::placement::Placement;
use std::time::Duration;

use serde_json::Value;

use crate::core::Geometry;

/// How to make a device.
#[derive(Clone, Debug)]
pub struct Settings {
    /// A name, the absolute path of a shared object, or `unix:` and the absolute path of a socket.
    pub handler: String,
    /// The size asked for.
    pub geometry: Geometry,
    /// Worker threads; 0: inline on the reactors.
    pub workers: usize,
    /// Cores for the workers, in turn; empty: wherever the host runs them.
    pub cores: Vec<usize>,
    /// Requests of one reactor that may be with the handler at once.
    pub queue_depth: usize,
    /// How long a worker looks for more work before it sleeps.
    pub spin: Duration,
    /// Which worker gets a request.
    pub placement: Placement,
    /// When a request ends without its handler; `None`: never.
    pub timeout: Option<Duration>,
    /// What happens while an external handler's process is away.
    pub on_disconnect: OnDisconnect,
    /// One request in this many is measured by stage; 0: none.
    pub latency_sample: u32,
    /// The handler's own options: an object.
    pub options: Value,
}

impl Settings {
    /// The most workers that a device may have.
    pub const MAX_WORKERS: usize = 64;
    /// The most requests of one reactor that may be with a handler at once.
    pub const MAX_QUEUE_DEPTH: usize = 16_384;

    /// The defaults, as `bdev_appliance_create` has them.
    pub fn new(handler: &str, block_size: u32, num_blocks: u64) -> Settings {
        Settings {
            handler: handler.to_string(),
            geometry: Geometry::new(block_size, num_blocks),
            workers: 1,
            cores: Vec::new(),
            queue_depth: 256,
            // As reactors: whatever keeps a reactor awake between two requests keeps its workers awake too.
            spin: Duration::from_micros(200),
            placement: Placement::default(),
            timeout: Some(Duration::from_secs(20)),
            on_disconnect: OnDisconnect::default(),
            latency_sample: 16,
            options: Value::Object(serde_json::Map::new()),
        }
    }
}
