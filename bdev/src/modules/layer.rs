//! What devices that are built on another have in common.
//!
//! The upper device holds a claimed descriptor of the lower one. When the lower one is removed the upper one goes first;
//! when it changes its size, the upper one follows.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use schema::{Params, RpcError};

use crate::core::registry::OnEvent;
use crate::core::{BdevError, BdevEvent, BdevInfo, BdevSystem, ClaimKind, Descriptor, NewBdev, OpKind, OpSet};

/// The base of a device, held open and claimed until the device is removed.
pub(crate) struct Base {
    info: Arc<BdevInfo>,
    held: Mutex<Option<Descriptor>>,
}

impl Base {
    /// The base itself.
    pub(crate) fn bdev(&self) -> &Arc<BdevInfo> {
        &self.info
    }

    /// Closes it.
    pub(crate) fn release(&self) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Opens and claims `base` for a device to be called `name`, which follows it.
pub(crate) fn claim_base(system: &Arc<BdevSystem>, name: &str, base: &str, product: &str) -> Result<Base, BdevError> {
    claim_for(system, &format!("{product} '{name}'"), base, vec![name.to_string()])
}

/// Opens and claims `base` for `owner`, whose devices `tops` follow it.
pub(crate) fn claim_for(
    system: &Arc<BdevSystem>,
    owner: &str,
    base: &str,
    tops: Vec<String>,
) -> Result<Base, BdevError> {
    let weak: Weak<BdevSystem> = Arc::downgrade(system);
    let on_event = move |event| {
        let Some(system) = weak.upgrade() else { return };
        for top in tops.clone() {
            system.executor().spawn(Box::pin(follow(Arc::clone(&system), top, event)));
        }
    };
    let descriptor = system.open(base, true, owner, Arc::new(on_event))?;
    descriptor.claim(ClaimKind::ExclusiveWrite)?;
    Ok(Base { info: Arc::clone(descriptor.bdev()), held: Mutex::new(Some(descriptor)) })
}

/// Opens and claims `base` for `owner`, who hears of its events.
pub(crate) fn claim_with(
    system: &Arc<BdevSystem>,
    owner: &str,
    base: &str,
    on_event: OnEvent,
) -> Result<Base, BdevError> {
    let descriptor = system.open(base, true, owner, on_event)?;
    descriptor.claim(ClaimKind::ExclusiveWrite)?;
    Ok(Base { info: Arc::clone(descriptor.bdev()), held: Mutex::new(Some(descriptor)) })
}

async fn follow(system: Arc<BdevSystem>, top: String, event: BdevEvent) {
    match event {
        BdevEvent::Removing => match system.remove(&top).await {
            // Whoever removes it already does what is to be done.
            Ok(()) | Err(BdevError::NotFound { .. } | BdevError::BeingRemoved { .. }) => {}
            Err(error) => tracing::warn!(bdev = top, "its base bdev is being removed: {error}"),
        },
        BdevEvent::Resized => {
            if let Ok(info) = system.get(&top)
                && let Err(error) = system.resized(&info).await
            {
                tracing::warn!(bdev = top, "its base bdev changed its size: {error}");
            }
        }
    }
}

/// What a device does by itself that passes everything on to `base`: also what is emulated there.
pub(crate) fn ops_of(base: &BdevInfo) -> OpSet {
    OpKind::ALL.into_iter().filter(|&kind| base.supports(kind)).fold(OpSet::default(), OpSet::with)
}

/// Says which parameter names a base that cannot be had.
pub(crate) fn blame_base(params: &Params, field: &str, error: BdevError) -> RpcError {
    match &error {
        BdevError::NotFound { name } | BdevError::Claimed { name, .. }
            if Some(name.as_str()) == params.opt_str(field) =>
        {
            params.blame(field, error.into())
        }
        _ => error.into(),
    }
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
