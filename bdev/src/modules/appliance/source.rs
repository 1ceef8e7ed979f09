//! From the parameter `handler` to a backend.

use std::sync::Arc;

use appliance::Handler;

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
