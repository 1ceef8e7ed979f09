//! The admin commands of a controller: Base 5, NVM 4.
//!
//! Each is executed at once, on memory that the transport brought; only event requests outlast their execution, and
//! Abort ends on the reactor of the queue that it is about. What a command gets wrong becomes a [`Fault`]: the status,
//! and the byte of the submission queue entry that is to blame, for the Error Information log.
//!
//! | module | commands |
//! |---|---|
//! | [`identify`] | Identify |
//! | [`log`] | Get Log Page |
//! | [`features`] | Get Features, Set Features |

use reactor::Buffers;

use super::controller::ErrorRecord;
use crate::spec::Status;

mod features;
mod identify;
mod log;
#[cfg(test)]
mod tests;

pub(super) use features::Features;
pub use identify::{CopyLimits, copy_limits};

/// Revision of the firmware, in the 8 characters that Identify and the Firmware Slot log have for it.
const FIRMWARE_REVISION: &str = env!("CARGO_PKG_VERSION");

/// What a command came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It is done.
    Done { dw0: u32, send: bool },
    /// It waits for an event.
    Parked,
    /// Somebody has to look for this command.
    Abort { sqid: u16, cid: u16 },
}

impl Step {
    pub(super) const DONE: Step = Step::Done { dw0: 0, send: false };

    fn value(dw0: u32) -> Step {
        Step::Done { dw0, send: false }
    }
}

/// Why a command failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) status: Status,
    /// PEL: byte in 7:0, bit in 10:8.
    pub(super) location: u16,
}

impl Fault {
    /// A fault in the submission queue entry at byte `byte`.
    fn at(status: Status, byte: u8) -> Fault {
        Fault { status, location: byte.into() }
    }

    /// Invalid Field in Command, at byte `byte`.
    fn field(byte: u8) -> Fault {
        Fault::at(Status::INVALID_FIELD.dnr(), byte)
    }
}

impl From<Status> for Fault {
    fn from(status: Status) -> Fault {
        Fault { status, location: ErrorRecord::NO_LOCATION }
    }
}

/// Where the fields of a submission queue entry begin.
mod byte {
    pub(super) const NSID: u8 = 4;
    pub(super) const DPTR: u8 = 24;
    pub(super) const CDW10: u8 = 40;
    pub(super) const CDW11: u8 = 44;
    pub(super) const CDW12: u8 = 48;
    pub(super) const CDW14: u8 = 56;
}

/// Answers with `bytes`. The memory may be longer (SGLS.SDL), never shorter.
fn send(data: &mut Buffers, bytes: &[u8]) -> Result<Step, Fault> {
    enough(data, bytes.len())?;
    data.truncate(bytes.len());
    data.write_at(0, bytes);
    Ok(Step::Done { dw0: 0, send: true })
}

fn enough(data: &Buffers, bytes: usize) -> Result<(), Fault> {
    if data.len() < bytes { Err(Fault::at(Status::DATA_SGL_LENGTH_INVALID.dnr(), byte::DPTR)) } else { Ok(()) }
}
