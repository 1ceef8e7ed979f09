//! What a Connect command must be to be accepted: Base 6.3.

use std::sync::Arc;

use reactor::ReactorId;

use super::shared::{ControllerShared, ControllerTable};
use super::view::{ListenAddress, SubsystemView, TargetView};
use crate::spec::command::Connect;
use crate::spec::fabrics::{ConnectData, InvalidParameter};
use crate::spec::{Cqe, Status};

/// Where an admin queue wants to go.
#[derive(Clone, Debug)]
pub enum Target {
    /// The discovery service.
    Discovery,
    /// A subsystem.
    Subsystem(Arc<SubsystemView>),
}

/// Why a Connect is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectError {
    /// The status.
    pub status: Status,
    /// With Connect Invalid Parameters: which one.
    pub parameter: Option<InvalidParameter>,
    /// For the log.
    pub reason: String,
}

impl ConnectError {
    /// The completion.
    pub fn cqe(&self, cid: u16) -> Cqe {
        Cqe::new(cid, self.status).with_dw0(self.parameter.map_or(0, InvalidParameter::dw0))
    }
}

/// Checks a Connect of an admin queue (QID 0).
///
/// # Errors
/// What to complete the command with.
pub fn check_admin(
    view: &TargetView,
    cmd: &Connect,
    data: &ConnectData,
    listener: &ListenAddress,
) -> Result<Target, ConnectError> {
    let _ = (view, cmd, data, listener);
    Ok(Target::Discovery)
}

/// Checks a Connect of an I/O queue and finds its controller. [`join`] must follow.
///
/// # Errors
/// What to complete the command with.
pub fn check_io(
    view: &TargetView,
    controllers: &ControllerTable,
    cmd: &Connect,
    data: &ConnectData,
    listener: &ListenAddress,
) -> Result<Arc<ControllerShared>, ConnectError> {
    let _ = (view, controllers, cmd, data, listener);
    Err(ConnectError { status: Status::CONNECT_CONTROLLER_BUSY, parameter: None, reason: String::new() })
}

/// Enters an I/O queue into its controller, at once for all reactors.
///
/// # Errors
/// When the controller has this queue already, or is no longer ready.
pub fn join(shared: &ControllerShared, qid: u16, reactor: ReactorId) -> Result<(), ConnectError> {
    let _ = (shared, qid, reactor);
    Ok(())
}
