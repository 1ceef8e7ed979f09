//! Why something could not be done to a controller.

use std::fmt;
use std::time::Duration;

use bdev::core::BdevError;
use reactor::reactor::Gone;
use schema::{Errno, RpcError};

use crate::home::Denial;
use crate::path::{Site, TransportKind};

/// Why something could not be done to a controller.
#[derive(Debug)]
#[non_exhaustive]
pub enum InitiatorError {
    /// The name is taken.
    Exists {
        /// The name.
        name: String,
    },
    /// There is no such controller.
    NotFound {
        /// The name.
        name: String,
    },
    /// It is on its way out.
    BeingDetached {
        /// The name.
        name: String,
    },
    /// The controller has this path already.
    SamePath {
        /// The controller.
        name: String,
        /// The path.
        path: String,
    },
    /// A port for failover belongs to one path, and the controller has several.
    SeveralPaths {
        /// The controller.
        name: String,
    },
    /// The controller has no such path.
    NoSuchPath {
        /// The controller.
        name: String,
    },
    /// None of the controller's paths has this identifier.
    NoSuchCntlid {
        /// The controller.
        name: String,
        /// The identifier.
        cntlid: u16,
    },
    /// The controller is one of another subsystem.
    OtherSubsystem {
        /// The controller.
        name: String,
        /// Its subsystem.
        is: String,
    },
    /// The controller is connected under another host's name.
    OtherHost {
        /// The controller.
        name: String,
        /// The host's name.
        is: String,
    },
    /// A namespace is not the one that the bdev is.
    OtherNamespace {
        /// Its number.
        nsid: u32,
        /// The bdev.
        bdev: String,
    },
    /// A namespace has no name by which to know it again.
    NamelessNamespace {
        /// Its number.
        nsid: u32,
    },
    /// There are too many.
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many there may be.
        limit: usize,
    },
    /// The controller has too few queues.
    FewQueues {
        /// So many it granted.
        granted: usize,
        /// So many reactors there are.
        wanted: usize,
    },
    /// This machine lacks what a transport takes.
    NoTransport {
        /// The transport.
        trtype: TransportKind,
        /// What is missing, and how to get it.
        why: String,
    },
    /// It cannot be connected.
    Connect {
        /// What.
        to: String,
        /// Why not.
        why: String,
    },
    /// A path cannot do that now.
    Refused {
        /// The path.
        path: String,
        /// Why not.
        why: Denial,
    },
    /// A discovery service has the name, or the address.
    Served {
        /// Its name.
        name: String,
        /// Where it begins.
        at: Site,
    },
    /// There is no such discovery service.
    NoService {
        /// The name.
        name: String,
    },
    /// What a discovery service lists was not attached in time.
    NotInTime {
        /// The service.
        name: String,
        /// So long was waited.
        wait: Duration,
        /// Why it is not done.
        why: String,
    },
    /// Options cannot be changed while controllers are attached.
    InUse,
    /// The bdev layer refuses.
    Bdev(BdevError),
    /// The server ends.
    Stopping,
}

impl fmt::Display for InitiatorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InitiatorError::Exists { name } => write!(f, "a controller '{name}' is attached already"),
            InitiatorError::NotFound { name } => write!(f, "there is no controller '{name}'"),
            InitiatorError::BeingDetached { name } => write!(f, "the controller '{name}' is being detached"),
            InitiatorError::SamePath { name, path } => {
                write!(f, "the controller '{name}' has a path to {path} already")
            }
            InitiatorError::SeveralPaths { name } => {
                write!(f, "the controller '{name}' has several paths, and a failover port would be one path's")
            }
            InitiatorError::NoSuchPath { name } => write!(f, "the controller '{name}' has no such path"),
            InitiatorError::NoSuchCntlid { name, cntlid } => {
                write!(f, "no connected path of the controller '{name}' has the controller ID {cntlid}")
            }
            InitiatorError::OtherSubsystem { name, is } => {
                write!(f, "the controller '{name}' is one of another subsystem, {is}")
            }
            InitiatorError::OtherHost { name, is } => write!(f, "the controller '{name}' is connected as host {is}"),
            InitiatorError::OtherNamespace { nsid, bdev } => {
                write!(f, "namespace {nsid} is another one there than the one that the bdev '{bdev}' is")
            }
            InitiatorError::NamelessNamespace { nsid } => {
                write!(f, "namespace {nsid} has neither NGUID, EUI64 nor UUID, so it cannot be known on another path")
            }
            InitiatorError::TooMany { what, limit } => write!(f, "there are {limit} {what}, and may be no more"),
            InitiatorError::FewQueues { granted, wanted } => {
                write!(f, "the controller grants {granted} I/O queues, and each of the {wanted} reactors needs one")
            }
            InitiatorError::NoTransport { trtype, why } => {
                write!(f, "there is no NVMe/{} on this machine: {why}", trtype.name())
            }
            InitiatorError::Connect { to, why } => write!(f, "cannot connect to {to}: {why}"),
            InitiatorError::Refused { path, why } => write!(f, "{path}: {why}"),
            InitiatorError::Served { name, at } => {
                write!(f, "the discovery service '{name}', which begins at {at}, has the name or the address")
            }
            InitiatorError::NoService { name } => write!(f, "there is no discovery service '{name}'"),
            InitiatorError::NotInTime { name, wait, why } => {
                write!(
                    f,
                    "the discovery service '{name}' was not ready after {} ms, and is stopped: {why}",
                    wait.as_millis()
                )
            }
            InitiatorError::InUse => f.write_str("controllers are attached, or discovered, with the present options"),
            InitiatorError::Bdev(error) => error.fmt(f),
            InitiatorError::Stopping => f.write_str("the server is stopping"),
        }
    }
}

impl std::error::Error for InitiatorError {}

impl From<BdevError> for InitiatorError {
    fn from(error: BdevError) -> Self {
        InitiatorError::Bdev(error)
    }
}

impl From<Gone> for InitiatorError {
    fn from(_: Gone) -> Self {
        InitiatorError::Stopping
    }
}

impl From<InitiatorError> for RpcError {
    fn from(error: InitiatorError) -> RpcError {
        let text = error.to_string();
        let named = |errno: Errno, name: &str| RpcError::errno(errno, &text).field("name").value(name);
        match &error {
            InitiatorError::Exists { name } => {
                named(Errno::EXIST, name).fix("choose another name, or add a path to it with multipath = multipath")
            }
            InitiatorError::NotFound { name } => {
                named(Errno::NODEV, name).fix("bdev_nvme_get_controllers lists the controllers there are")
            }
            InitiatorError::BeingDetached { name } => named(Errno::BUSY, name).fix("try again in a moment"),
            InitiatorError::SamePath { name, .. } => named(Errno::ALREADY, name).fix("give another address or port"),
            InitiatorError::SeveralPaths { name } => named(Errno::INVAL, name).fix("give multipath = multipath"),
            InitiatorError::NoSuchPath { name } | InitiatorError::NoSuchCntlid { name, .. } => {
                named(Errno::NODEV, name).fix("bdev_nvme_get_controllers shows the paths of each controller")
            }
            InitiatorError::OtherSubsystem { name, .. } => {
                named(Errno::INVAL, name).fix("give that subsystem's NQN, or another name")
            }
            InitiatorError::OtherHost { is, .. } => {
                RpcError::errno(Errno::INVAL, &text).field("hostnqn").fix(format!("give {is}, or another name"))
            }
            InitiatorError::OtherNamespace { .. } => RpcError::errno(Errno::INVAL, &text)
                .fix("paths of one controller lead to the same namespaces: attach this one under another name"),
            InitiatorError::NamelessNamespace { .. } => RpcError::errno(Errno::INVAL, &text)
                .fix("give it a name at the target, or attach it under another name"),
            InitiatorError::TooMany { .. } => RpcError::errno(Errno::NOSPC, &text).fix("detach one that is not needed"),
            InitiatorError::FewQueues { granted, .. } => RpcError::errno(Errno::NOSPC, &text)
                .fix(format!("allow more queues at the target, or start this server on {granted} cores")),
            InitiatorError::NoTransport { trtype, .. } => {
                RpcError::errno(Errno::NODEV, &text).field("trtype").value(trtype.name())
            }
            InitiatorError::Connect { .. } => RpcError::errno(Errno::IO, &text)
                .field("traddr")
                .fix("look whether the target listens there, knows the subsystem and allows this host"),
            InitiatorError::Refused { why, .. } => {
                let errno = match why {
                    Denial::Busy(_) => Errno::BUSY,
                    Denial::Already(_) => Errno::ALREADY,
                    Denial::Gone(_) => Errno::NXIO,
                    Denial::Failed(_) => Errno::IO,
                };
                RpcError::errno(errno, &text).fix("bdev_nvme_get_controllers shows what its paths are doing")
            }
            InitiatorError::Served { name, .. } => {
                named(Errno::EXIST, name).fix("bdev_nvme_get_discovery_info lists the services: one of them is enough")
            }
            InitiatorError::NoService { name } => {
                named(Errno::NODEV, name).fix("bdev_nvme_get_discovery_info lists the services there are")
            }
            InitiatorError::NotInTime { .. } => RpcError::errno(Errno::TIMEDOUT, &text).field("attach_timeout_ms").fix(
                "look whether a discovery service answers there, or start it without wait_for_attach: it is tried again then",
            ),
            InitiatorError::InUse => {
                RpcError::errno(Errno::PERM, &text).fix("detach them and stop bdev_nvme_start_discovery's services first")
            }
            InitiatorError::Stopping => RpcError::internal(text),
            InitiatorError::Bdev(_) => match error {
                InitiatorError::Bdev(error) => error.into(),
                _ => RpcError::internal(text),
            },
        }
    }
}
