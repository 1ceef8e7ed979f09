//! What devices that are built on another have in common.
//!
//! The upper device holds a claimed descriptor of the lower one. When the lower one is removed the upper one goes first;
//! when it changes its size, the upper one follows.

use std::sync::{Arc, Weak};

use crate::core::{BdevError, BdevEvent, BdevInfo, BdevSystem, ClaimKind, Descriptor, NewBdev};

/// Opens and claims `base` for a device to be called `name`.
pub(crate) fn claim_base(
    system: &Arc<BdevSystem>,
    name: &str,
    base: &str,
    product: &str,
) -> Result<Descriptor, BdevError> {
    let (weak, top): (Weak<BdevSystem>, String) = (Arc::downgrade(system), name.to_string());
    let on_event = move |event| {
        let (Some(system), top) = (weak.upgrade(), top.clone()) else { return };
        let follow = Arc::clone(&system);
        system.executor().spawn(Box::pin(async move {
            match event {
                BdevEvent::Removing => match follow.remove(&top).await {
                    // Whoever removes it already does what is to be done.
                    Ok(()) | Err(BdevError::NotFound { .. } | BdevError::BeingRemoved { .. }) => {}
                    Err(error) => tracing::warn!(bdev = top, "its base bdev is being removed: {error}"),
                },
                BdevEvent::Resized => {
                    if let Ok(info) = follow.get(&top)
                        && let Err(error) = follow.resized(&info).await
                    {
                        tracing::warn!(bdev = top, "its base bdev changed its size: {error}");
                    }
                }
            }
        }));
    };
    let owner = format!("{product} '{name}'");
    let descriptor = system.open(base, true, &owner, Arc::new(on_event))?;
    descriptor.claim(ClaimKind::ExclusiveWrite)?;
    Ok(descriptor)
}

/// Registers a device on `base`.
pub(crate) async fn register(
    system: &Arc<BdevSystem>,
    new: NewBdev,
    base: Arc<BdevInfo>,
) -> Result<Arc<BdevInfo>, BdevError> {
    let info = system.register(new).await?;
    if base.is_removing() {
        // Its holder was told before this device had its name.
        match system.remove(info.name()).await {
            Ok(()) | Err(BdevError::NotFound { .. } | BdevError::BeingRemoved { .. }) => {}
            Err(error) => return Err(error),
        }
        return Err(BdevError::BeingRemoved { name: base.name().to_string() });
    }
    Ok(info)
}
