//! The devices themselves.
//!
//! A module is one file here and one line in [`MODULES`]; the line yields its RPCs and the configuration that is saved
//! and restored.

use schema::Method;

use crate::core::BdevSystem;

/// One kind of device.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Its name.
    pub name: &'static str,
    /// The methods that create, change and delete its devices.
    pub methods: &'static [Method<BdevSystem>],
}

/// Every module there is.
pub const MODULES: &[Module] = &[];
