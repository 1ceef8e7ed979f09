//! The two libraries, opened at run time, once a process.
//!
//! They are never closed: providers keep threads and state in them. A failure is not remembered, so that libraries which are
//! installed later are found.

use std::sync::{Mutex, OnceLock, PoisonError};

use crate::error::{Error, Result};
use crate::raw::{Ibverbs, IbverbsHidden, Rdmacm};

/// File name of libibverbs, as the dynamic linker looks for it.
pub const IBVERBS_FILE: &str = "libibverbs.so.1";
/// File name of librdmacm.
pub const RDMACM_FILE: &str = "librdmacm.so.1";

/// The functions of both.
#[derive(Clone, Copy, Debug)]
pub struct Libraries {
    /// Of libibverbs.
    pub ibv: Ibverbs,
    /// Of libibverbs, behind C's macros.
    pub hidden: IbverbsHidden,
    /// Of librdmacm.
    pub cm: Rdmacm,
}

static LIBRARIES: OnceLock<Libraries> = OnceLock::new();
static OPENING: Mutex<()> = Mutex::new(());

/// The libraries, opened when they are asked for first.
///
/// # Errors
/// [`Error::Library`] or [`Error::Symbol`].
pub fn libraries() -> Result<&'static Libraries> {
    if let Some(libraries) = LIBRARIES.get() {
        return Ok(libraries);
    }
    let _one_at_a_time = OPENING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(libraries) = LIBRARIES.get() {
        return Ok(libraries);
    }
    let opened = open_named(IBVERBS_FILE, RDMACM_FILE)?;
    Ok(LIBRARIES.get_or_init(|| opened))
}

/// Opens the libraries under these names.
fn open_named(ibverbs: &'static str, rdmacm: &'static str) -> Result<Libraries> {
    let verbs = open(ibverbs, "libibverbs1")?;
    let cm = open(rdmacm, "librdmacm1")?;
    let symbol = |file| {
        move |(symbol, cause): (&'static str, libloading::Error)| Error::Symbol {
            file,
            symbol,
            cause: cause.to_string(),
        }
    };
    // SAFETY: the library was found under the name whose binary interface the table declares, and is never closed.
    let ibv = unsafe { Ibverbs::load(verbs) }.map_err(symbol(ibverbs))?;
    // SAFETY: as above.
    let hidden = unsafe { IbverbsHidden::load(verbs) }.map_err(symbol(ibverbs))?;
    // SAFETY: as above.
    let cm = unsafe { Rdmacm::load(cm) }.map_err(symbol(rdmacm))?;
    Ok(Libraries { ibv, hidden, cm })
}

fn open(file: &'static str, package: &'static str) -> Result<&'static libloading::Library> {
    // SAFETY: the initialisers of these libraries only register the providers that are linked in; they may run on any
    // thread.
    let library = unsafe { libloading::Library::new(file) }.map_err(|cause| Error::Library {
        file,
        package,
        cause: cause.to_string(),
    })?;
    Ok(Box::leak(Box::new(library)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let error = open_named("libibverbs-of-nobody.so.1", RDMACM_FILE).unwrap_err();
        assert!(matches!(error, Error::Library { file: "libibverbs-of-nobody.so.1", package: "libibverbs1", .. }));
    }

    #[test]
    fn a_library_without_the_functions_is_refused() {
        // The C library is there wherever a test runs, and has none of them.
        let error = open_named("libc.so.6", "libc.so.6").unwrap_err();
        assert!(matches!(error, Error::Symbol { file: "libc.so.6", symbol: "ibv_get_device_list", .. }), "{error}");
    }

    #[test]
    fn both_are_opened_once_or_the_missing_one_is_named() {
        match (libraries(), libraries()) {
            (Ok(first), Ok(again)) => assert!(std::ptr::eq(first, again)),
            (Err(Error::Library { file, .. }), Err(_)) => {
                eprintln!("skipped: {file} is not installed");
                assert!([IBVERBS_FILE, RDMACM_FILE].contains(&file));
            }
            (first, _) => panic!("{first:?}"),
        }
    }
}
