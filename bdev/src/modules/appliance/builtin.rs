//! Handlers by name: those that come with Ringstone, and those that a binary of its own has
//! [registered](appliance::register).

use std::io;
use std::sync::Arc;

use appliance::memory::Memory;
use appliance::null::Null;
use appliance::{Handler, Making};
use futures_util::future::BoxFuture;

use super::settings::Settings;
use crate::core::{BdevError, BdevSystem};

/// What a built-in handler is made from.
pub struct Maker {
    /// The bdev layer, for handlers that keep their data on another device.
    pub system: Arc<BdevSystem>,
    /// Name of the device.
    pub bdev: String,
    /// What was asked for.
    pub settings: Settings,
}

/// Makes a handler. It may take a while.
pub type Make = fn(Maker) -> BoxFuture<'static, Result<Arc<dyn Handler>, BdevError>>;

/// A built-in handler.
#[derive(Clone, Copy)]
pub struct Builtin {
    /// Its name.
    pub name: &'static str,
    /// Makes it.
    pub make: Make,
}

/// Every built-in handler.
pub const BUILTIN: &[Builtin] = &[
    Builtin { name: "memory", make: |maker| Box::pin(async move { plain(&maker, Memory::make) }) },
    Builtin { name: "null", make: |maker| Box::pin(async move { plain(&maker, Null::make) }) },
];

/// Makes a handler that needs nothing of the bdev layer.
fn plain(maker: &Maker, make: appliance::registry::Make) -> Result<Arc<dyn Handler>, BdevError> {
    let Maker { bdev, settings, .. } = maker;
    let making = Making { bdev, geometry: settings.geometry, options: &settings.options, workers: settings.workers };
    make(&making).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => BdevError::invalid("options", &settings.options, error.to_string()),
        _ => BdevError::host(format!("making the handler '{}' for '{bdev}'", settings.handler), error),
    })
}

/// Makes the handler that `settings` names.
///
/// # Errors
/// [`BdevError::Invalid`] for a name that nobody has; else what the handler says.
pub async fn make(maker: Maker) -> Result<Arc<dyn Handler>, BdevError> {
    let name = maker.settings.handler.clone();
    if let Some(builtin) = BUILTIN.iter().find(|builtin| builtin.name == name) {
        return (builtin.make)(maker).await;
    }
    match appliance::registry::find(&name) {
        Some(make) => plain(&maker, make),
        None => {
            let mut names: Vec<&str> = BUILTIN.iter().map(|builtin| builtin.name).collect();
            names.extend(appliance::registry::names());
            let reason = format!("there is no such handler; there are {}", names.join(", "));
            Err(BdevError::invalid("handler", &name, reason))
        }
    }
}
