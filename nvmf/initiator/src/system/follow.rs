//! Bdevs follow the namespaces of their controller.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bdev::core::{BdevError, NewBdev};
use nvmf::host::{Identity, Namespace};
use uuid::Uuid;

use super::discovery::Service;
use super::{Group, InitiatorSystem};
use crate::disk::{Disk, Route, geometry};
use crate::path::{Path, PathState, View};

/// A namespace as one path sees it.
struct Sight {
    path: Arc<Path>,
    view: Arc<View>,
    namespace: Namespace,
}

impl Group {
    /// A path has published something.
    pub(super) fn has_news(self: &Arc<Self>) {
        if self.following.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(system) = self.system.upgrade() else { return };
        let group = Arc::clone(self);
        let executor = Arc::clone(system.bdevs.executor());
        executor.spawn(Box::pin(async move {
            let turn = group.turn.lock().await;
            // Before anything is looked at: what is published from now on needs another look.
            group.following.store(false, Ordering::Release);
            system.follow(&group).await;
            drop(turn);
        }));
    }
}

impl InitiatorSystem {
    /// Brings the bdevs of a controller in line with what its paths know. The caller has the controller's turn.
    pub(super) async fn follow(&self, group: &Arc<Group>) {
        for service in forget_given_up(group) {
            service.has_news();
        }
        let seen = sights(group);
        let disks: BTreeMap<u32, Arc<Disk>> = group.inner().disks.clone();
        for (nsid, disk) in &disks {
            let same: Vec<&Sight> =
                seen.get(nsid).into_iter().flatten().filter(|s| disk.is_same(&s.namespace)).collect();
            if same.is_empty() {
                self.remove_disk(group, *nsid, disk).await;
            } else if !disk.is_removed() {
                self.update_disk(disk, &same).await;
            }
        }
        for (nsid, sights) in &seen {
            if !group.inner().disks.contains_key(nsid) {
                self.add_disk(group, *nsid, sights).await;
            }
        }
        let over = group.inner().members.is_empty() && group.disks().is_empty();
        if over {
            self.forget(group);
        }
    }

    async fn remove_disk(&self, group: &Group, nsid: u32, disk: &Arc<Disk>) {
        if !disk.is_removed() {
            match self.bdevs.remove(&disk.name).await {
                Ok(()) | Err(BdevError::NotFound { .. }) => {}
                Err(error) => tracing::warn!(bdev = disk.name, %error, "its namespace is gone"),
            }
        }
        if disk.is_removed() {
            group.inner().disks.remove(&nsid);
        }
    }

    async fn update_disk(&self, disk: &Arc<Disk>, sights: &[&Sight]) {
        let routes = sights.iter().map(|sight| route(sight)).collect();
        disk.set_paths(routes);
        // What a path that works says counts.
        let live = sights.iter().find(|sight| sight.view.association.is_some()).unwrap_or(&sights[0]);
        let changed = disk.set_geometry(geometry(&live.namespace, &live.view));
        if changed && let Ok(info) = self.bdevs.get(&disk.name) {
            let _ = self.bdevs.resized(&info).await;
        }
    }

    async fn add_disk(&self, group: &Arc<Group>, nsid: u32, sights: &[Sight]) {
        let Some(first) = sights.first() else { return };
        let name = format!("{}n{nsid}", group.name);
        let (how, max) = {
            let inner = group.inner();
            ((inner.mode, inner.retries), inner.max_bdevs)
        };
        if group.disks().len() >= max {
            tracing::warn!(
                controller = group.name,
                nsid,
                max,
                "a namespace more than max_bdevs allows: it is left out"
            );
            return;
        }
        let disk = Disk::new(name.clone(), group.name.clone(), &first.namespace, &first.path, how);
        disk.set_paths(sights.iter().filter(|sight| disk.is_same(&sight.namespace)).map(route).collect());
        let new = |uuid| NewBdev { name: name.clone(), uuid, aliases: Vec::new(), device: Arc::clone(&disk) as _ };
        let uuid = uuid(&disk.identity);
        let mut registered = self.bdevs.register(new(uuid)).await;
        if let (Some(uuid), Err(BdevError::Exists { name: taken })) = (uuid, &registered)
            && *taken == uuid.to_string()
        {
            tracing::warn!(bdev = name, %uuid, "another bdev has the namespace's UUID: this one gets a random one");
            registered = self.bdevs.register(new(None)).await;
        }
        match registered {
            Ok(_) => {
                group.inner().disks.insert(nsid, disk);
            }
            Err(error) => tracing::error!(bdev = name, %error, "a namespace cannot be a bdev"),
        }
    }
}

fn route(sight: &Sight) -> Route {
    Route { path: Arc::clone(&sight.path), nsid: sight.namespace.nsid }
}

/// Paths that are lost for good are no paths. The discovery services that had found them.
fn forget_given_up(group: &Group) -> Vec<Arc<Service>> {
    let given_up = |path: &Path| path.view().state == PathState::Failed && !path.leaving.load(Ordering::Acquire);
    let gone: Vec<_> = group.inner().members.extract_if(.., |member| given_up(&member.path)).collect();
    gone.into_iter().filter_map(|member| member.owner?.upgrade()).collect()
}

/// What the paths see, by NSID. Of two that see different namespaces under one number, the one that came first counts.
fn sights(group: &Group) -> BTreeMap<u32, Vec<Sight>> {
    let mut seen: BTreeMap<u32, Vec<Sight>> = BTreeMap::new();
    for path in group.paths() {
        if path.leaving.load(Ordering::Acquire) {
            continue;
        }
        let view = path.view();
        for (nsid, namespace) in &view.namespaces {
            let sight = Sight { path: Arc::clone(&path), view: Arc::clone(&view), namespace: namespace.clone() };
            seen.entry(*nsid).or_default().push(sight);
        }
    }
    seen
}

/// The UUID that a namespace's names make.
fn uuid(identity: &Identity) -> Option<Uuid> {
    identity.uuid.or(identity.nguid).map(Uuid::from_bytes).filter(|uuid| !uuid.is_nil())
}
