//! Where things are unless something else is asked for.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// NQN of the volume that a fresh appliance serves.
pub const VOLUME_NQN: &str = "nqn.2026-11.io.ringstone:vol0";
/// Name of its bdev, and of its file without the ending.
pub const VOLUME_NAME: &str = "vol0";
/// Its size.
pub const VOLUME_BYTES: u64 = 1 << 30;
/// Where a fresh appliance listens.
pub const LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 4420);
/// Name of the JSON-RPC socket in the state directory.
const SOCKET_NAME: &str = "rpc.sock";

/// The per-user state directory: `$XDG_STATE_HOME/ringstone`, or `~/.local/state/ringstone`.
pub fn state_dir() -> Result<PathBuf, String> {
    if let Some(dir) = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|dir| dir.is_absolute()) {
        return Ok(dir.join("ringstone"));
    }
    match std::env::var_os("HOME").map(PathBuf::from).filter(|dir| dir.is_absolute()) {
        Some(home) => Ok(home.join(".local/state/ringstone")),
        None => Err("neither XDG_STATE_HOME nor HOME says where state belongs; give --state-dir DIR".into()),
    }
}

/// The JSON-RPC socket of an appliance with this state directory.
pub fn rpc_socket(state_dir: &Path) -> PathBuf {
    state_dir.join(SOCKET_NAME)
}
