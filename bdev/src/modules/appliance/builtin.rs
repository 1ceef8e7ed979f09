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
    /// Options that count when the device is made, and not when it is made again from a saved configuration.
    pub once: &'static [&'static str],
    /// The option that names the device below.
    pub base: Option<&'static str>,
}

/// Every built-in handler.
pub const BUILTIN: &[Builtin] = &[
    Builtin {
        name: "memory",
        make: |maker| Box::pin(async move { plain(&maker, Memory::make) }),
        once: &[],
        base: None,
    },
    Builtin { name: "null", make: |maker| Box::pin(async move { plain(&maker, Null::make) }), once: &[], base: None },
    Builtin {
        name: "log",
        make: |maker| Box::pin(super::log::handler::make(maker)),
        once: &["format", "accept_loss"],
        base: Some("base_bdev"),
    },
];

fn find(settings: &Settings) -> Option<&'static Builtin> {
    BUILTIN.iter().find(|builtin| builtin.name == settings.handler)
}

/// The device below, if the handler has one.
pub(super) fn base_bdev(settings: &Settings) -> Option<String> {
    let option = find(settings)?.base?;
    settings.options.get(option)?.as_str().map(str::to_string)
}

/// Takes out the options that count once.
pub(super) fn forget_once(settings: &mut Settings) {
    if let (Some(builtin), Some(options)) = (find(settings), settings.options.as_object_mut()) {
        options.retain(|name, _| !builtin.once.contains(&name.as_str()));
    }
}

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
    if let Some(builtin) = find(&maker.settings) {
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
