//! Addresses, which subsystems share, and what closes them.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{NvmfSystem, PATIENCE, Released, TargetError};
use crate::target::model::NewListener;
use crate::target::view::ListenAddress;

impl NvmfSystem {
    /// Makes a subsystem, or the discovery service, reachable at an address.
    ///
    /// # Errors
    /// As [`Model::check_listener`](crate::target::model::Model::check_listener); [`TargetError::Listen`].
    pub async fn add_listener(self: &Arc<Self>, nqn: &str, new: NewListener) -> Result<(), TargetError> {
        let (system, nqn) = (Arc::clone(self), nqn.to_owned());
        self.perform(async move {
            let mut open = system.open.lock().await;
            let address = new.address.clone();
            let options = {
                let state = system.state();
                if state.stopped {
                    return Err(TargetError::Stopping);
                }
                state.model.check_listener(&nqn, &new)?;
                state.model.transports()[&address.trtype].clone()
            };
            if !open.contains(&address) {
                let listening = system.transport(address.trtype)?.listen(&address, &options);
                let acceptor = listening.map_err(|source| TargetError::Listen { address: address.clone(), source })?;
                system.reactors.add_listener(address.clone(), acceptor).await?;
                open.insert(address.clone());
            }
            let edited = system.edit(|state| Ok((state.model.add_listener(&nqn, new)?, Released::new())));
            // The subsystem may have been deleted meanwhile.
            system.close_unused(&mut open).await?;
            drop(open);
            let ((), draining) = edited?;
            tracing::info!(nqn, address = %address.socket_addr(), "listening");
            system.announced(draining, format!("{nqn} listens on {}", address.socket_addr())).await
        })
        .await
    }

    /// Makes a subsystem, or the discovery service, unreachable at an address: hosts that came in there are disconnected.
    ///
    /// # Errors
    /// As [`Model::remove_listener`](crate::target::model::Model::remove_listener); [`TargetError::StillDraining`].
    pub async fn remove_listener(self: &Arc<Self>, nqn: &str, address: ListenAddress) -> Result<(), TargetError> {
        let (system, nqn) = (Arc::clone(self), nqn.to_owned());
        self.perform(async move {
            let mut open = system.open.lock().await;
            let ((), draining) =
                system.edit(|state| Ok((state.model.remove_listener(&nqn, &address)?, Released::new())))?;
            let closed = system.close_unused(&mut open).await;
            drop(open);
            let done = format!("{nqn} no longer listens on {}", address.socket_addr());
            system.drained(draining, PATIENCE, done).await?;
            closed
        })
        .await
    }

    /// Removes a subsystem with everything in it, under whatever load: its hosts are disconnected, its devices closed.
    ///
    /// # Errors
    /// As [`Model::delete_subsystem`](crate::target::model::Model::delete_subsystem); [`TargetError::StillDraining`].
    pub async fn delete_subsystem(self: &Arc<Self>, nqn: &str) -> Result<(), TargetError> {
        let (system, nqn) = (Arc::clone(self), nqn.to_owned());
        self.perform(async move {
            let mut open = system.open.lock().await;
            let ((), draining) = system.edit(|state| {
                let gone = state.model.delete_subsystem(&nqn)?;
                Ok(((), state.release(gone)))
            })?;
            let closed = system.close_unused(&mut open).await;
            drop(open);
            system.drained(draining, PATIENCE, format!("subsystem {nqn} is deleted")).await?;
            closed
        })
        .await
    }

    /// Closes the addresses that nothing listens on any more.
    async fn close_unused(&self, open: &mut BTreeSet<ListenAddress>) -> Result<(), TargetError> {
        let used = self.state().model.addresses();
        let unused: Vec<ListenAddress> = open.difference(&used).cloned().collect();
        for address in unused {
            self.reactors.remove_listener(&address).await?;
            open.remove(&address);
            tracing::info!(address = %address.socket_addr(), "no longer listening");
        }
        Ok(())
    }

    /// Closes every address.
    pub(super) async fn close_all(&self) -> Result<(), TargetError> {
        let mut open = self.open.lock().await;
        while let Some(address) = open.pop_first() {
            self.reactors.remove_listener(&address).await?;
        }
        Ok(())
    }
}
