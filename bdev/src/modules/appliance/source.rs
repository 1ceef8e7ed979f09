//! From the parameter `handler` to a backend.

use std::path::Path;
use std::sync::Arc;

use appliance::shared_object::SharedObject;
use appliance::{Handler, Making};

use super::builtin::{self, Maker};
use super::external::{External, PREFIX};
use super::inline::OnReactors;
use super::port::Backend;
use super::settings::Settings;
use super::workers::Workers;
use crate::core::{BdevError, BdevSystem};

/// Starts whoever will do the I/O of the device `bdev`.
///
/// # Errors
/// [`BdevError::Invalid`] for a handler that there is not; else as the handler says.
pub async fn start(system: &Arc<BdevSystem>, bdev: &str, settings: &Settings) -> Result<Arc<dyn Backend>, BdevError> {
    if settings.handler.starts_with(PREFIX) {
        return Ok(External::start(system, bdev, settings)?);
    }
    if settings.handler.starts_with('/') {
        let handler = in_c(bdev, settings)?;
        return Ok(Workers::start(system, bdev, handler, settings).await?);
    }
    let maker = Maker { system: Arc::clone(system), bdev: bdev.to_string(), settings: settings.clone() };
    let handler = builtin::make(maker).await?;
    start_with(system, bdev, settings, handler).await
}

/// As [`start`], with a handler that is there already.
///
/// # Errors
/// As the handler says.
pub async fn start_with(
    system: &Arc<BdevSystem>,
    bdev: &str,
    settings: &Settings,
    handler: Arc<dyn Handler>,
) -> Result<Arc<dyn Backend>, BdevError> {
    if settings.workers == 0 {
        return Ok(OnReactors::new(bdev, handler, settings)?);
    }
    Ok(Workers::start(system, bdev, handler, settings).await?)
}

/// Makes a handler from a shared object.
fn in_c(bdev: &str, settings: &Settings) -> Result<Arc<dyn Handler>, BdevError> {
    if settings.workers == 0 {
        let reason = "handlers in C have threads; give them at least one worker";
        return Err(BdevError::invalid("workers", 0, reason));
    }
    let object = SharedObject::load(Path::new(&settings.handler))
        .map_err(|error| BdevError::invalid("handler", &settings.handler, error.to_string()))?;
    let making = Making { bdev, geometry: settings.geometry, options: &settings.options, workers: settings.workers };
    object.make(&making).map_err(|error| BdevError::host(format!("making the handler for '{bdev}'"), error))
}
