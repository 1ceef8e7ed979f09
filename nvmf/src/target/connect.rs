//! What a Connect command must be to be accepted: Base 6.3.
//!
//! Nothing here changes anything, but for [`join`], which enters an I/O queue into its controller. Every refusal that is
//! the host's fault names the field with Connect Invalid Parameters, or says that trying again is of no use.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use reactor::ReactorId;

use super::shared::{ControllerShared, ControllerTable};
use super::view::{DISCOVERY_NQN, ListenAddress, SubsystemView, TargetView, TransportOptions};
use crate::spec::command::Connect;
use crate::spec::fabrics::{CNTLID_DYNAMIC, ConnectData, InvalidParameter};
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

    fn new(status: Status, reason: impl Into<String>) -> ConnectError {
        ConnectError { status, parameter: None, reason: reason.into() }
    }

    fn parameter(parameter: InvalidParameter, reason: impl Into<String>) -> ConnectError {
        let status = Status::CONNECT_INVALID_PARAMETERS.dnr();
        ConnectError { status, parameter: Some(parameter), reason: reason.into() }
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
    assert_eq!(cmd.qid, 0, "not an admin queue");
    let (subnqn, hostnqn) = names(data)?;
    let max_entries = options(view, listener)?.max_aq_depth;
    check_entries(cmd, max_entries)?;
    let target = if subnqn == DISCOVERY_NQN {
        Target::Discovery
    } else {
        Target::Subsystem(Arc::clone(find_subsystem(view, subnqn, hostnqn, listener)?))
    };
    let cntlid = data.cntlid.get();
    if cntlid != CNTLID_DYNAMIC {
        let reason =
            format!("controller {cntlid:#06x} was asked for, but controllers are dynamic: only FFFFh is possible");
        return Err(ConnectError::parameter(InvalidParameter::CNTLID, reason));
    }
    Ok(target)
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
    assert_ne!(cmd.qid, 0, "not an I/O queue");
    let (subnqn, hostnqn) = names(data)?;
    let max_entries = options(view, listener)?.max_queue_depth;
    check_entries(cmd, max_entries)?;
    if subnqn == DISCOVERY_NQN {
        return Err(ConnectError::parameter(InvalidParameter::QID, "the discovery service has no I/O queues"));
    }
    let subsystem = find_subsystem(view, subnqn, hostnqn, listener)?;
    let cntlid = data.cntlid.get();
    let shared = controllers
        .get(subnqn, cntlid)
        .filter(|shared| shared.incarnation == subsystem.incarnation && !shared.is_dead())
        .ok_or_else(|| {
            ConnectError::parameter(InvalidParameter::CNTLID, format!("there is no controller {cntlid} of {subnqn}"))
        })?;
    if shared.hostnqn != hostnqn {
        let reason = format!("controller {cntlid} is {}'s, not {hostnqn}'s", shared.hostnqn);
        return Err(ConnectError::parameter(InvalidParameter::HOSTNQN, reason));
    }
    if shared.hostid != data.hostid {
        let reason = format!("controller {cntlid} was connected with another host identifier");
        return Err(ConnectError::parameter(InvalidParameter::HOSTID, reason));
    }
    check_queue(&shared, cmd.qid)?;
    Ok(shared)
}

/// Enters an I/O queue into its controller, at once for all reactors.
///
/// # Errors
/// When the controller has this queue already, or is no longer ready.
pub fn join(shared: &ControllerShared, qid: u16, reactor: ReactorId) -> Result<(), ConnectError> {
    let mut queues = shared.io_queues();
    // Under the lock: a controller that is being disabled first stops being ready and then looks for queues.
    check_queue(shared, qid)?;
    if queues.contains_key(&qid) {
        // Base 6.3: a queue that exists cannot be created.
        return Err(ConnectError::new(
            Status::COMMAND_SEQUENCE_ERROR.dnr(),
            format!("controller {} has an I/O queue {qid} already", shared.cntlid),
        ));
    }
    queues.insert(qid, reactor);
    Ok(())
}

fn check_queue(shared: &ControllerShared, qid: u16) -> Result<(), ConnectError> {
    if shared.is_dead() || !shared.ready.load(Ordering::Acquire) {
        let reason = format!("controller {} is not enabled", shared.cntlid);
        return Err(ConnectError::parameter(InvalidParameter::QID, reason));
    }
    let max = shared.max_io_queues.load(Ordering::Relaxed);
    if u32::from(qid) > max {
        let reason = format!("controller {} has I/O queues 1 to {max}, not {qid}", shared.cntlid);
        return Err(ConnectError::parameter(InvalidParameter::QID, reason));
    }
    Ok(())
}

fn names(data: &ConnectData) -> Result<(&str, &str), ConnectError> {
    let subnqn = data.subnqn().ok_or_else(|| {
        ConnectError::parameter(InvalidParameter::SUBNQN, "the subsystem NQN is not a name of 1 to 223 bytes")
    })?;
    let hostnqn = data.hostnqn().ok_or_else(|| {
        ConnectError::parameter(InvalidParameter::HOSTNQN, "the host NQN is not a name of 1 to 223 bytes")
    })?;
    Ok((subnqn, hostnqn))
}

fn options<'a>(view: &'a TargetView, listener: &ListenAddress) -> Result<&'a TransportOptions, ConnectError> {
    view.transports.get(&listener.trtype).ok_or_else(|| {
        ConnectError::new(
            Status::CONNECT_CONTROLLER_BUSY,
            format!("the {} transport is being deleted", listener.trtype.name()),
        )
    })
}

fn check_entries(cmd: &Connect, max_entries: u32) -> Result<(), ConnectError> {
    if (2..=max_entries).contains(&cmd.queue_entries) {
        return Ok(());
    }
    let reason = format!("queue {} is to have {} entries; 2 to {max_entries} are possible", cmd.qid, cmd.queue_entries);
    Err(ConnectError::parameter(InvalidParameter::SQSIZE, reason))
}

fn find_subsystem<'a>(
    view: &'a TargetView,
    subnqn: &str,
    hostnqn: &str,
    listener: &ListenAddress,
) -> Result<&'a Arc<SubsystemView>, ConnectError> {
    let subsystem = view
        .subsystems
        .get(subnqn)
        .ok_or_else(|| ConnectError::parameter(InvalidParameter::SUBNQN, format!("there is no subsystem {subnqn}")))?;
    if subsystem.listener(listener).is_none() {
        let reason = format!("{subnqn} is not served at {}", listener.socket_addr());
        return Err(ConnectError::parameter(InvalidParameter::SUBNQN, reason));
    }
    if !subsystem.allows(hostnqn) {
        return Err(ConnectError::new(
            Status::CONNECT_INVALID_HOST.dnr(),
            format!("{subnqn} does not allow the host {hostnqn}"),
        ));
    }
    Ok(subsystem)
}
