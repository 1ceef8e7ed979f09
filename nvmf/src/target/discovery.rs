//! The discovery log: what a host can connect to (Base 5.1.12.3.1).

use std::net::SocketAddr;

use super::view::{ListenAddress, TargetView};

/// The log as `hostnqn` sees it, who came in through the listener `came_in`, whose address for this connection is `local`.
pub fn log(view: &TargetView, hostnqn: &str, came_in: &ListenAddress, local: SocketAddr) -> Vec<u8> {
    let _ = (view, hostnqn, came_in, local);
    Vec::new()
}
