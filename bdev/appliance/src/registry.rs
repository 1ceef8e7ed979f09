//! Names of handlers.
//!
//! A binary of your own calls [`register`] before it starts the server; `bdev_appliance_create` then makes devices with
//! that name as `handler`. The names of handlers that come with Ringstone cannot be taken.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::handler::{Handler, Making};

/// Makes a handler. Called on a thread of the control plane; it should not block for long: what takes time belongs into
/// [`Handler::worker`].
pub type Make = fn(&Making<'_>) -> io::Result<Arc<dyn Handler>>;

static HANDLERS: Mutex<BTreeMap<&'static str, Make>> = Mutex::new(BTreeMap::new());

/// Makes handlers of this name available to `bdev_appliance_create`. The last registration of a name counts.
pub fn register(name: &'static str, make: Make) {
    HANDLERS.lock().unwrap_or_else(PoisonError::into_inner).insert(name, make);
}

/// How to make the handler called `name`, if it was registered.
pub fn find(name: &str) -> Option<Make> {
    HANDLERS.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied()
}

/// All registered names.
pub fn names() -> Vec<&'static str> {
    HANDLERS.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect()
}
