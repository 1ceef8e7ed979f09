//! The devices themselves.
//!
//! A module is one file here and one line in [`MODULES`]; the line yields its RPCs, the configuration that is saved and
//! restored, and its run of the [conformance](crate::conformance) suite.

pub mod appliance;
mod common;
pub mod delay;
pub mod error;
pub(crate) mod layer;
pub mod malloc;
pub mod null;
pub mod passthru;
pub mod raid;
pub mod split;
pub mod uring;

use schema::Method;

use crate::conformance::Subject;
use crate::core::BdevSystem;
use crate::core::system::Examine;

/// One kind of device.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Its name.
    pub name: &'static str,
    /// The methods that create, change and delete its devices.
    pub methods: &'static [Method<BdevSystem>],
    /// How the conformance suite makes its devices.
    pub subjects: &'static [Subject],
    /// Looks at every new device for something to build on it.
    pub examine: Option<Examine>,
}

/// Every module there is.
pub const MODULES: &[Module] = &[
    null::MODULE,
    malloc::MODULE,
    uring::MODULE,
    passthru::MODULE,
    delay::MODULE,
    error::MODULE,
    split::MODULE,
    raid::MODULE,
    appliance::MODULE,
];
