//! Namespaces and the devices that they are made of.

use std::sync::{Arc, Weak};

use bdev::core::registry::OnEvent;
use bdev::core::{BdevError, BdevEvent, ClaimKind, Descriptor};

use super::{Draining, NvmfSystem, PATIENCE, Released, State, TargetError};
use crate::target::model::{Incarnation, NewNamespace};

impl NvmfSystem {
    /// Adds a namespace made of the device that answers to `bdev`, which nobody else may write from then on. Answers its
    /// NSID.
    ///
    /// # Errors
    /// As [`Model::add_namespace`](crate::target::model::Model::add_namespace); [`TargetError::Bdev`].
    pub async fn add_namespace(self: &Arc<Self>, nqn: &str, new: NewNamespace, bdev: &str) -> Result<u32, TargetError> {
        let (system, nqn, name) = (Arc::clone(self), nqn.to_owned(), bdev.to_owned());
        self.perform(async move {
            let incarnation = {
                let mut state = system.state();
                state.model.subsystem(&nqn)?;
                state.model.draw_incarnation()
            };
            let descriptor = system.open_device(&nqn, &name, incarnation)?;
            let (nsid, draining) = system.enter_namespace(&nqn, &new, &name, incarnation, descriptor)?;
            system.announced(draining, format!("namespace {nsid} of {nqn} is added")).await?;
            Ok(nsid)
        })
        .await
    }

    pub(super) fn open_device(
        self: &Arc<Self>,
        nqn: &str,
        name: &str,
        incarnation: Incarnation,
    ) -> Result<Descriptor, TargetError> {
        let refused = |source| TargetError::Bdev { name: name.to_owned(), source };
        let owner = format!("NVMe-oF subsystem {nqn}");
        let on_event = on_event(Arc::downgrade(self), incarnation);
        let descriptor = self.bdevs.open(name, true, &owner, on_event).map_err(refused)?;
        descriptor.claim(ClaimKind::ExclusiveWrite).map_err(refused)?;
        Ok(descriptor)
    }

    pub(super) fn enter_namespace(
        &self,
        nqn: &str,
        new: &NewNamespace,
        name: &str,
        incarnation: Incarnation,
        descriptor: Descriptor,
    ) -> Result<(u32, Draining), TargetError> {
        self.edit(|state| {
            let bdev = Arc::clone(descriptor.bdev());
            // If its removal began after it was opened, the event may have come before there was a namespace to remove; if
            // it begins after this, the event finds it.
            if bdev.is_removing() {
                let source = BdevError::BeingRemoved { name: bdev.name().to_owned() };
                return Err(TargetError::Bdev { name: name.to_owned(), source });
            }
            let geometry = bdev.device().geometry();
            let nsid = state.model.add_namespace(nqn, new, incarnation, &bdev, geometry)?;
            state.descriptors.insert(incarnation, descriptor);
            Ok((nsid, Released::new()))
        })
    }

    /// Removes a namespace under whatever load. Its device is closed when its I/O has ended.
    ///
    /// # Errors
    /// As [`Model::remove_namespace`](crate::target::model::Model::remove_namespace); [`TargetError::StillDraining`].
    pub async fn remove_namespace(self: &Arc<Self>, nqn: &str, nsid: u32) -> Result<(), TargetError> {
        let (system, nqn) = (Arc::clone(self), nqn.to_owned());
        self.perform(async move {
            let ((), draining) = system.edit(|state| {
                let incarnation = state.model.remove_namespace(&nqn, nsid)?;
                Ok(((), state.release([incarnation])))
            })?;
            system.drained(draining, PATIENCE, format!("namespace {nsid} of {nqn} is removed")).await
        })
        .await
    }

    /// The device of a namespace goes away.
    async fn device_removing(self: Arc<Self>, incarnation: Incarnation) {
        let removed = self.edit(|state| {
            let Some((nqn, nsid)) = state.model.find(incarnation) else { return Ok((None, Released::new())) };
            let nqn = nqn.to_owned();
            state.model.remove_namespace(&nqn, nsid)?;
            Ok((Some((nqn, nsid)), state.release([incarnation])))
        });
        // It is gone already, or going, when there is nothing to remove; then its own removal closes the device.
        if let Ok((Some((nqn, nsid)), draining)) = removed {
            tracing::warn!(nqn, nsid, "namespace removed: its bdev goes away");
            if draining.0.await.is_err() {
                tracing::debug!(nqn, nsid, "the reactors stopped before the namespace had drained");
            }
        }
    }

    /// The device of a namespace has another geometry.
    async fn device_resized(self: Arc<Self>, incarnation: Incarnation) {
        let resized = self.edit(|state| {
            let Some(descriptor) = state.descriptors.get(&incarnation) else { return Ok((None, Released::new())) };
            let geometry = descriptor.bdev().device().geometry();
            let changed = state.model.resize_namespace(incarnation, geometry);
            let found = state.model.find(incarnation).map(|(nqn, nsid)| (nqn.to_owned(), nsid));
            Ok((found.filter(|_| changed).map(|found| (found, geometry)), Released::new()))
        });
        if let Ok((Some(((nqn, nsid), geometry)), draining)) = resized {
            tracing::info!(nqn, nsid, blocks = geometry.num_blocks, "namespace resized with its bdev");
            if draining.0.await.is_err() {
                tracing::debug!(nqn, nsid, "the reactors stopped before they knew of the new size");
            }
        }
    }
}

impl State {
    /// Takes out the devices of namespaces that are gone from the model, for closing when they have drained.
    pub(super) fn release(&mut self, gone: impl IntoIterator<Item = Incarnation>) -> Released {
        gone.into_iter().filter_map(|incarnation| self.descriptors.remove(&incarnation)).collect()
    }
}

/// Hands a device's events to the control plane's executor. Weak, because the system owns the descriptors whose registry
/// owns this.
fn on_event(system: Weak<NvmfSystem>, incarnation: Incarnation) -> OnEvent {
    Arc::new(move |event| {
        let Some(system) = system.upgrade() else { return };
        let executor = Arc::clone(system.executor());
        executor.spawn(match event {
            BdevEvent::Removing => Box::pin(system.device_removing(incarnation)),
            BdevEvent::Resized => Box::pin(system.device_resized(incarnation)),
        });
    })
}
