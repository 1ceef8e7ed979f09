//! The control plane of the target: the model, and how a change of it reaches the reactors.
//!
//! # Seam
//! [`Reactors`] is all that the control plane knows of poll groups. Tests and the simulator bring their own.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use reactor::ReactorId;
use reactor::reactor::Gone;

use super::transport::Acceptor;
use super::view::{ListenAddress, TargetView, TransportKind};

/// A reactor stopped before it answered: the process is going down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopping;

impl fmt::Display for Stopping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the server is stopping")
    }
}

impl std::error::Error for Stopping {}

impl From<Gone> for Stopping {
    fn from(_: Gone) -> Stopping {
        Stopping
    }
}

/// The poll groups of all reactors, as the control plane reaches them. The futures do not borrow and may be dropped
/// unfinished: what they began goes on.
pub trait Reactors: Send + Sync {
    /// Moves every reactor to `view`. Resolves when nothing of an older view is in use any more: I/O to namespaces that are
    /// gone has ended and their channels are closed, the controllers of subsystems that are gone, of hosts that are no
    /// longer allowed and of listeners that their subsystem no longer has are closed.
    fn apply(&self, view: Arc<TargetView>) -> BoxFuture<'static, Result<(), Stopping>>;
    /// Gives an open listening address to a reactor, which accepts connections for it from then on.
    fn add_listener(
        &self,
        address: ListenAddress,
        acceptor: Box<dyn Acceptor>,
    ) -> BoxFuture<'static, Result<(), Stopping>>;
    /// Closes a listening address. Resolves when it can be listened on again. Connections stay.
    fn remove_listener(&self, address: &ListenAddress) -> BoxFuture<'static, Result<(), Stopping>>;
    /// The connected queue pairs.
    fn qpairs(&self) -> BoxFuture<'static, Result<Vec<QpairInfo>, Stopping>>;
    /// What each poll group has done, by reactor.
    fn stats(&self) -> BoxFuture<'static, Result<Vec<PollGroupStats>, Stopping>>;
}

/// State of a queue pair, as RPCs show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QpairState {
    /// Connected on the transport, not yet by a Connect command.
    Connecting,
    /// It takes commands.
    Enabled,
    /// It is closing.
    Deactivating,
}

impl QpairState {
    /// The name that RPCs use.
    pub fn name(self) -> &'static str {
        match self {
            QpairState::Connecting => "connecting",
            QpairState::Enabled => "enabled",
            QpairState::Deactivating => "deactivating",
        }
    }
}

/// One queue pair that belongs to a controller, for `nvmf_subsystem_get_qpairs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QpairInfo {
    /// Its controller.
    pub cntlid: u16,
    /// Its queue identifier, 0 for the admin queue.
    pub qid: u16,
    /// What it does.
    pub state: QpairState,
    /// The reactor that owns it.
    pub reactor: ReactorId,
    /// NQN of its subsystem.
    pub subnqn: String,
    /// NQN of its host.
    pub hostnqn: String,
    /// Identifier of its host.
    pub hostid: [u8; 16],
    /// Where the host came in.
    pub listen: ListenAddress,
    /// Where the host came from.
    pub peer: SocketAddr,
}

/// What one reactor's poll group has done, for `nvmf_get_stats`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PollGroupStats {
    /// The reactor.
    pub reactor: ReactorId,
    /// Admin queues that were ever connected.
    pub admin_qpairs: u32,
    /// I/O queues that were ever connected.
    pub io_qpairs: u32,
    /// Admin queues that are connected.
    pub current_admin_qpairs: u32,
    /// I/O queues that are connected.
    pub current_io_qpairs: u32,
    /// Connections without a Connect command yet.
    pub current_unassociated_qpairs: u32,
    /// Commands that wait for a device.
    pub pending_bdev_io: u64,
    /// Commands that were completed.
    pub completed_nvme_io: u64,
    /// The transports it polls.
    pub transports: Vec<TransportKind>,
}

/// The name of a reactor's poll group.
pub fn poll_group_name(reactor: ReactorId) -> String {
    format!("nvmf_tgt_poll_group_{:03}", reactor.0)
}
