//! What can go wrong, in words that say what to do.

use std::fmt;
use std::io;

/// How to get a device where no hardware is.
pub const SOFT_ROCE: &str = "for a software device: modprobe rdma_rxe && rdma link add rxe0 type rxe netdev NETDEV (package \
    iproute2, as root)";

/// Why RDMA is not to be had, or a call of it failed.
#[derive(Debug)]
pub enum Error {
    /// A library cannot be opened.
    Library {
        /// The file name that was tried.
        file: &'static str,
        /// The Debian package that has it.
        package: &'static str,
        /// What the dynamic linker said.
        cause: String,
    },
    /// A library lacks a function: it is too old.
    Symbol {
        /// The library's file name.
        file: &'static str,
        /// The function.
        symbol: &'static str,
        /// What the dynamic linker said.
        cause: String,
    },
    /// The kernel has no RDMA device.
    NoDevice,
    /// The kernel has devices that the libraries do not know.
    NoProvider {
        /// The kernel's names of them.
        devices: Vec<String>,
    },
    /// No device has this name.
    UnknownDevice {
        /// The name that was asked for.
        name: String,
        /// The names that there are.
        present: Vec<String>,
    },
    /// The connection manager's device file is missing.
    NoConnectionManager(io::Error),
    /// librdmacm may have no more rsockets in this process.
    TooManyRsockets {
        /// How many there are.
        limit: usize,
        /// Whether that is of listeners, or of connections.
        listeners: bool,
    },
    /// A call failed.
    Call {
        /// The function.
        call: &'static str,
        /// Its `errno`.
        error: io::Error,
        /// What may help; empty if nothing is known.
        hint: &'static str,
    },
}

impl Error {
    /// The failure of `call` that `errno` tells of.
    pub(crate) fn last(call: &'static str) -> Error {
        Error::of(call, io::Error::last_os_error())
    }

    /// The failure of a `call` that returns its error number.
    pub(crate) fn code(call: &'static str, code: libc::c_int) -> Error {
        // Some calls return -1 and set errno, some return the number, some its negative.
        let error = if code == -1 { io::Error::last_os_error() } else { io::Error::from_raw_os_error(code.abs()) };
        Error::of(call, error)
    }

    fn of(call: &'static str, error: io::Error) -> Error {
        let hint = match (call, error.raw_os_error()) {
            ("ibv_reg_mr" | "ibv_create_cq" | "rdma_create_qp" | "ibv_create_srq", Some(libc::ENOMEM)) => {
                "memory that a device uses is locked: raise the memlock limit (ulimit -l), or ask for less"
            }
            (
                "rdma_bind_addr" | "rdma_resolve_addr" | "rbind" | "rconnect",
                Some(libc::ENODEV | libc::EADDRNOTAVAIL),
            ) => "the address belongs to no network interface with an RDMA device (see `rdma link`)",
            (_, Some(libc::EACCES | libc::EPERM)) => "access to /dev/infiniband/* is needed",
            _ => "",
        };
        Error::Call { call, error, hint }
    }

    /// The error number, where there is one.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Error::Call { error, .. } | Error::NoConnectionManager(error) => Some(error.kind()),
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Library { file, package, cause } => {
                write!(f, "RDMA needs the library {file}, which is not here: install the package {package}")?;
                if *package == "libibverbs1" {
                    f.write_str(" and ibverbs-providers")?;
                }
                write!(f, " ({cause})")
            }
            Error::Symbol { file, symbol, cause } => {
                write!(f, "the library {file} has no function {symbol}: a newer rdma-core is needed ({cause})")
            }
            Error::NoDevice => write!(f, "there is no RDMA device; {SOFT_ROCE}"),
            Error::NoProvider { devices } => write!(
                f,
                "libibverbs has no driver for {}: install the package ibverbs-providers, and load the kernel module \
                 ib_uverbs",
                devices.join(", ")
            ),
            Error::UnknownDevice { name, present } => {
                write!(f, "there is no RDMA device {name:?}; there is {}", present.join(", "))
            }
            Error::TooManyRsockets { limit, listeners } => {
                let kind = if *listeners { "listeners" } else { "connections" };
                write!(
                    f,
                    "{limit} {kind} over rsockets are open or being closed, which is as many as a process may have: use fewer"
                )
            }
            Error::NoConnectionManager(error) => {
                write!(f, "the RDMA connection manager cannot be used: {error}; load the kernel module rdma_ucm")
            }
            Error::Call { call, error, hint } => {
                write!(f, "{call}: {error}")?;
                if hint.is_empty() { Ok(()) } else { write!(f, " ({hint})") }
            }
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Call { error, .. } | Error::NoConnectionManager(error) => Some(error),
            _ => None,
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = match &error {
            Error::Call { error, .. } => error.kind(),
            Error::UnknownDevice { .. } => io::ErrorKind::NotFound,
            _ => io::ErrorKind::Unsupported,
        };
        io::Error::new(kind, error)
    }
}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_says_what_to_do() {
        let library = |file, package| Error::Library { file, package, cause: "no such file".into() }.to_string();
        let text = library("libibverbs.so.1", "libibverbs1");
        assert!(text.contains("libibverbs.so.1") && text.contains("libibverbs1 and ibverbs-providers"), "{text}");
        let text = library("librdmacm.so.1", "librdmacm1");
        assert!(text.contains("librdmacm.so.1") && text.contains("package librdmacm1 ("), "{text}");
        assert!(Error::NoDevice.to_string().contains("rdma link add rxe0 type rxe"));
        let text = Error::NoProvider { devices: vec!["rxe0".into()] }.to_string();
        assert!(text.contains("rxe0") && text.contains("ibverbs-providers"), "{text}");
        let text = Error::code("ibv_reg_mr", libc::ENOMEM).to_string();
        assert!(text.contains("memlock"), "{text}");
    }

    #[test]
    fn error_numbers_come_in_three_ways() {
        for code in [libc::EINVAL, -libc::EINVAL] {
            assert_eq!(Error::code("x", code).io_kind(), Some(io::ErrorKind::InvalidInput));
        }
        // SAFETY: no descriptor has the number -1.
        let code = unsafe { libc::close(-1) };
        assert!(Error::code("x", code).to_string().contains("descriptor"));
    }
}
