//! What arrays say of themselves.

use serde_json::{Value, json};

use crate::common::{Server, wait_for};

/// Blocks of 4 KiB in a region of the array.
pub const REGION: u64 = 256;

#[track_caller]
pub fn status(server: &Server) -> Value {
    server.call("bdev_raid_get_status", json!({"name": "mirror"}))
}

/// What `key` of leg `leg` is.
pub fn of_leg(status: &Value, leg: usize, key: &str) -> Value {
    status["legs"][leg][key].clone()
}

#[track_caller]
pub fn copied_blocks(server: &Server) -> u64 {
    status(server)["copied_blocks"].as_u64().expect("a count")
}

/// Waits until both legs have everything: the array's status then.
#[track_caller]
pub fn until_in_sync(server: &Server) -> Value {
    wait_for("both legs to be in sync", || {
        let now = status(server);
        (0..2).all(|leg| of_leg(&now, leg, "state") == "in_sync").then_some(now)
    })
}

/// Waits until no region counts as written.
#[track_caller]
pub fn until_clean(server: &Server) {
    wait_for("the log to be clean", || (status(server)["dirty_regions"] == 0).then_some(()));
}
