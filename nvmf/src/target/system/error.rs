//! Why the control plane could not do something.

use std::fmt;
use std::io;
use std::time::Duration;

use bdev::core::BdevError;
use schema::{Errno, RpcError};

use super::Stopping;
use crate::target::model::ModelError;
use crate::target::view::{ListenAddress, TransportKind};

/// Why something could not be done to the target.
#[derive(Debug)]
#[non_exhaustive]
pub enum TargetError {
    /// The model refused it. Nothing was done.
    Model(ModelError),
    /// The device cannot be used. Nothing was done.
    Bdev {
        /// The name it was asked for by.
        name: String,
        /// Why.
        source: BdevError,
    },
    /// The program was built without this transport.
    NoTransport {
        /// Which.
        kind: TransportKind,
        /// Those that it was built with.
        have: Vec<TransportKind>,
    },
    /// The program has it, but this machine does not have what it needs. Nothing was done.
    Unavailable {
        /// Which.
        kind: TransportKind,
        /// What is missing, and how to get it.
        source: io::Error,
    },
    /// The host does not let the address be listened on. Nothing was done.
    Listen {
        /// Where.
        address: ListenAddress,
        /// What the host said.
        source: io::Error,
    },
    /// It is done, but what was in use before has not ended; that goes on by itself.
    StillDraining {
        /// What was done.
        done: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The server is stopping.
    Stopping,
}

impl fmt::Display for TargetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TargetError::Model(error) => error.fmt(f),
            TargetError::Bdev { source, .. } => source.fmt(f),
            TargetError::NoTransport { kind, .. } => {
                write!(f, "this program was built without a transport {}", kind.name())
            }
            TargetError::Unavailable { kind, source } => {
                write!(f, "transport {} cannot be used: {source}", kind.name())
            }
            TargetError::Listen { address, source } => {
                write!(f, "cannot listen on {}: {}", address.socket_addr(), refusal(source).0)
            }
            TargetError::StillDraining { done, waited } => write!(
                f,
                "{done}, but commands or connections that were under way have not ended within {} s; they end in the \
                 background",
                waited.as_secs_f64()
            ),
            TargetError::Stopping => Stopping.fmt(f),
        }
    }
}

impl std::error::Error for TargetError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            TargetError::Bdev { source, .. } => Some(source),
            TargetError::Listen { source, .. } | TargetError::Unavailable { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl From<ModelError> for TargetError {
    fn from(error: ModelError) -> TargetError {
        TargetError::Model(error)
    }
}

impl From<Stopping> for TargetError {
    fn from(_: Stopping) -> TargetError {
        TargetError::Stopping
    }
}

/// What the host's refusal to listen means, and what helps.
fn refusal(error: &io::Error) -> (String, &'static str) {
    match error.kind() {
        io::ErrorKind::AddrInUse => (
            "another program, or another listener whose address contains this one, has the port".into(),
            "stop that one ('ss -ltnp' names it), or choose another trsvcid",
        ),
        io::ErrorKind::AddrNotAvailable => (
            "this machine has no such address".into(),
            "give one of its own ('ip address' lists them), or 0.0.0.0 or :: for all",
        ),
        io::ErrorKind::PermissionDenied => (
            "this process may not use the port".into(),
            "choose a port from 1024 up (4420 is NVMe's), or give the program the capability CAP_NET_BIND_SERVICE",
        ),
        _ => (error.to_string(), "see the reason"),
    }
}

impl From<TargetError> for RpcError {
    fn from(error: TargetError) -> RpcError {
        let text = error.to_string();
        match error {
            TargetError::Model(error) => error.into(),
            // SPDK answers -32602 for whatever a namespace cannot be made of.
            TargetError::Bdev { name, source } => {
                RpcError::from(source).with_code(schema::code::INVALID_PARAMS).field("namespace.bdev_name").value(name)
            }
            TargetError::NoTransport { kind, have } => {
                let have: Vec<&str> = have.iter().map(|kind| kind.name()).collect();
                RpcError::invalid_params(text)
                    .field("trtype")
                    .value(kind.name())
                    .fix(format!("it has {}", have.join(", ")))
            }
            TargetError::Unavailable { kind, source } => {
                let error = RpcError::invalid_params(source.to_string());
                error.field("trtype").value(kind.name()).fix("get what is missing and call again; TCP needs none of it")
            }
            TargetError::Listen { address, source } => {
                let (reason, fix) = refusal(&source);
                let field = match source.kind() {
                    io::ErrorKind::AddrNotAvailable => "listen_address.traddr",
                    _ => "listen_address",
                };
                RpcError::invalid_params(reason).field(field).value(address.socket_addr().to_string()).fix(fix)
            }
            TargetError::StillDraining { .. } => RpcError::errno(Errno::BUSY, text)
                .fix("do not repeat the call; nvmf_subsystem_get_qpairs shows what is still connected"),
            TargetError::Stopping => RpcError::internal(text),
        }
    }
}
