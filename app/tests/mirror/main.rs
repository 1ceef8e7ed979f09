//! Two Ringstones make a volume that survives either: real servers over loopback, killed without warning.

#[path = "../common/mod.rs"]
mod common;

mod guide;
mod host;
#[path = "../nbd/client.rs"]
#[allow(dead_code, reason = "it is the NBD tests' client")]
mod nbd_client;
mod pair;
mod survives;
