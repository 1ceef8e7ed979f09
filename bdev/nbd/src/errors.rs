//! What is said to a client whose request failed, and why connections end.

use std::fmt;

use bdev::core::IoStatus;

use crate::wire::NbdError;

/// Why a connection ends at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Not the magic number of an option.
    OptionMagic(u64),
    /// Not the magic number of a request.
    RequestMagic(u32),
    /// Flags that nobody offered.
    ClientFlags(u32),
    /// An option with more data than anybody needs.
    OptionLength {
        /// The option.
        option: u32,
        /// Its length.
        length: u32,
    },
    /// EXPORT_NAME named something else.
    NoSuchExport,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::OptionMagic(magic) => write!(f, "an option begins with {magic:#018x}: this is no NBD client"),
            Fault::RequestMagic(magic) => write!(f, "a request begins with {magic:#010x}: the stream is out of step"),
            Fault::ClientFlags(flags) => write!(f, "the client wants flags that were not offered: {flags:#x}"),
            Fault::OptionLength { option, length } => write!(f, "option {option} has {length} bytes of data"),
            Fault::NoSuchExport => f.write_str("the client wants an export of another name"),
        }
    }
}

impl std::error::Error for Fault {}

/// The error for the client of an operation that ended with `status`.
pub fn error_of(status: IoStatus) -> NbdError {
    match status {
        IoStatus::OutOfRange | IoStatus::NoSpace => NbdError::NoSpc,
        IoStatus::Invalid => NbdError::Inval,
        IoStatus::NotSupported => NbdError::NotSup,
        IoStatus::NoDevice => NbdError::Shutdown,
        IoStatus::ReadOnly => NbdError::Perm,
        _ => NbdError::Io,
    }
}

/// What an error says to a human.
pub fn error_text(error: NbdError) -> &'static str {
    match error {
        NbdError::Perm => "the export is read-only",
        NbdError::Io => "the device failed",
        NbdError::Inval => "not a request that this export takes: see its block sizes, limits and flags",
        NbdError::NoSpc => "past the end of the export, or the device is full",
        NbdError::NotSup => "the device cannot do this",
        NbdError::Shutdown => "the export is going away",
    }
}
