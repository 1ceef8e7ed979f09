//! The control plane of the target: the model, and how a change of it reaches the reactors.
//!
//! # A change
//! ```text
//! RPC or bdev event -> edit of the model (checked, at once) -> view -> every reactor
//!                      answer or give up waiting <- drained <- nothing of the old view is in use
//!                                                      +-> descriptors of removed namespaces are closed
//! ```
//! - Edits are made under one lock that is never held while anything is waited for. Views reach the reactors in the order
//!   of the edits: the future of [`Reactors::apply`] is polled once before the lock is let go.
//! - Every change runs as a task of its own: a caller that goes away leaves nothing half done.
//! - A descriptor is closed only when no reactor uses its namespace any more, however long that takes. A caller waits no
//!   longer than [`PATIENCE`].
//! - Addresses are opened and closed one at a time; one that several subsystems listen on is opened once.
//! - A device that goes away takes its namespace with it; one that changes its size makes a new view, of which hosts are
//!   told.
//!
//! # Seam
//! [`Reactors`] is all that the control plane knows of poll groups. Tests and the simulator bring their own.

mod error;
mod listeners;
mod namespaces;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bdev::core::system::Executor;
use bdev::core::{BdevSystem, Descriptor};
use futures_channel::oneshot;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Either, select};
use reactor::reactor::Gone;
use reactor::{Instant, ReactorId};
use schema::{ConfigEntry, ConfigSource};

use super::balance;
use super::model::{Incarnation, Model, NewSubsystem, Settings};
use super::poll_group::moving::MoveError;
use super::shared::ControllerTable;
use super::transport::{Acceptor, GroupStats, Transport, Transports};
use super::view::{AnaState, ListenAddress, Referral, TargetView, TransportKind, TransportOptions};
pub use error::TargetError;

/// How long a caller waits for what a change ends, unless it says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A reactor stopped before it answered: the process is going down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopping;

impl fmt::Display for Stopping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the server is stopping")
    }
}

impl std::error::Error for Stopping {}

impl From<Gone> for Stopping {
    fn from(_: Gone) -> Stopping {
        Stopping
    }
}

/// The poll groups of all reactors, as the control plane reaches them. The futures do not borrow and may be dropped
/// unfinished: what they began goes on.
pub trait Reactors: Send + Sync {
    /// Moves every reactor to `view`. Resolves when nothing of an older view is in use any more: I/O to namespaces that are
    /// gone has ended and their channels are closed, the controllers of subsystems that are gone, of hosts that are no
    /// longer allowed and of listeners that their subsystem no longer has are closed.
    ///
    /// Calls overlap. Their futures are first polled in the order of the views' generations, and that poll hands the view
    /// over; a reactor never goes back to a smaller generation.
    fn apply(&self, view: Arc<TargetView>) -> BoxFuture<'static, Result<(), Stopping>>;
    /// Gives an open listening address to a reactor, which accepts connections for it from then on.
    fn add_listener(
        &self,
        address: ListenAddress,
        acceptor: Box<dyn Acceptor>,
    ) -> BoxFuture<'static, Result<(), Stopping>>;
    /// Closes a listening address. Resolves when it can be listened on again. Connections stay.
    fn remove_listener(&self, address: &ListenAddress) -> BoxFuture<'static, Result<(), Stopping>>;
    /// The connected queue pairs.
    fn qpairs(&self) -> BoxFuture<'static, Result<Vec<QpairInfo>, Stopping>>;
    /// What each poll group has done, by reactor.
    fn stats(&self) -> BoxFuture<'static, Result<Vec<PollGroupStats>, Stopping>>;
    /// How busy each reactor was of late, in permille. Wakes none.
    fn loads(&self, now: Instant) -> Vec<u32>;
    /// Moves an I/O queue that is on the reactor `from`. Resolves when it is received from again.
    fn move_qpair(
        &self,
        name: QueueName,
        from: ReactorId,
        to: ReactorId,
    ) -> BoxFuture<'static, Result<Result<(), MoveError>, Stopping>>;
}

/// Names one queue of one controller.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueName {
    /// NQN of the subsystem.
    pub subnqn: String,
    /// The controller.
    pub cntlid: u16,
    /// The queue identifier.
    pub qid: u16,
}

/// State of a queue pair, as RPCs show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QpairState {
    /// Connected on the transport, not yet by a Connect command.
    Connecting,
    /// It takes commands.
    Enabled,
    /// It is closing.
    Deactivating,
}

impl QpairState {
    /// The name that RPCs use.
    pub fn name(self) -> &'static str {
        match self {
            QpairState::Connecting => "connecting",
            QpairState::Enabled => "enabled",
            QpairState::Deactivating => "deactivating",
        }
    }
}

/// One queue pair that belongs to a controller, for `nvmf_subsystem_get_qpairs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QpairInfo {
    /// Its controller.
    pub cntlid: u16,
    /// Its queue identifier, 0 for the admin queue.
    pub qid: u16,
    /// What it does.
    pub state: QpairState,
    /// The reactor that owns it.
    pub reactor: ReactorId,
    /// NQN of its subsystem.
    pub subnqn: String,
    /// NQN of its host.
    pub hostnqn: String,
    /// Identifier of its host.
    pub hostid: [u8; 16],
    /// Where the host came in.
    pub listen: ListenAddress,
    /// Where the host came from.
    pub peer: SocketAddr,
    /// It can be moved to another reactor.
    pub is_movable: bool,
    /// Work that it has been since it was connected, in units that can be compared between queues.
    pub units: u64,
}

impl QpairInfo {
    /// Its name.
    pub fn name(&self) -> QueueName {
        QueueName { subnqn: self.subnqn.clone(), cntlid: self.cntlid, qid: self.qid }
    }
}

/// What one reactor's poll group has done, for `nvmf_get_stats`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PollGroupStats {
    /// The reactor.
    pub reactor: ReactorId,
    /// Admin queues that were ever connected.
    pub admin_qpairs: u32,
    /// I/O queues that were ever connected.
    pub io_qpairs: u32,
    /// Admin queues that are connected.
    pub current_admin_qpairs: u32,
    /// I/O queues that are connected.
    pub current_io_qpairs: u32,
    /// Connections without a Connect command yet.
    pub current_unassociated_qpairs: u32,
    /// Commands that wait for a device.
    pub pending_bdev_io: u64,
    /// Commands that were completed.
    pub completed_nvme_io: u64,
    /// I/O queues that have come from other reactors.
    pub moved_in: u64,
    /// I/O queues that have gone to other reactors.
    pub moved_out: u64,
    /// The transports it polls.
    pub transports: Vec<TransportKind>,
    /// What queue pairs of transports share there: of RDMA only.
    pub groups: Vec<GroupStats>,
}

/// The name of a reactor's poll group.
pub fn poll_group_name(reactor: ReactorId) -> String {
    format!("nvmf_tgt_poll_group_{:03}", reactor.0)
}

struct State {
    model: Model,
    /// The view that was made last.
    view: Arc<TargetView>,
    /// The devices of the namespaces that there are.
    descriptors: BTreeMap<Incarnation, Descriptor>,
    /// Whether reactors were ever given a view.
    published: bool,
    /// Whether the end has begun.
    stopped: bool,
}

/// The target's control plane, and the context of the `nvmf_*` methods.
pub struct NvmfSystem {
    state: Mutex<State>,
    bdevs: Arc<BdevSystem>,
    controllers: Arc<ControllerTable>,
    transports: Transports,
    reactors: Arc<dyn Reactors>,
    /// Addresses that reactors listen on; locked while one is opened or closed.
    open: futures_util::lock::Mutex<BTreeSet<ListenAddress>>,
    /// Whether and when queues are moved between reactors.
    scheduler: Mutex<balance::Options>,
}

impl fmt::Debug for NvmfSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NvmfSystem").field("generation", &self.view().generation).finish_non_exhaustive()
    }
}

/// Resolves when nothing of an old view is in use any more. Unfinished, it keeps devices open: it is waited for to the end.
#[must_use]
struct Draining(BoxFuture<'static, Result<(), Stopping>>);

/// What an edit leaves to be closed when it has been drained.
type Released = Vec<Descriptor>;

impl NvmfSystem {
    /// A target without anything. Reactors are first reached when something is added.
    pub fn new(
        bdevs: Arc<BdevSystem>,
        controllers: Arc<ControllerTable>,
        transports: Transports,
        reactors: Arc<dyn Reactors>,
    ) -> Arc<NvmfSystem> {
        let state = State {
            model: Model::new(),
            view: Arc::default(),
            descriptors: BTreeMap::new(),
            published: false,
            stopped: false,
        };
        let open = futures_util::lock::Mutex::default();
        let scheduler = Mutex::default();
        Arc::new(NvmfSystem { state: Mutex::new(state), bdevs, controllers, transports, reactors, open, scheduler })
    }

    /// The target as reactors were last told to see it.
    pub fn view(&self) -> Arc<TargetView> {
        Arc::clone(&self.state().view)
    }

    /// Reads the model. `read` must not call back.
    pub fn model<R>(&self, read: impl FnOnce(&Model) -> R) -> R {
        read(&self.state().model)
    }

    /// The controllers that hosts have made.
    pub fn controllers(&self) -> &Arc<ControllerTable> {
        &self.controllers
    }

    /// The poll groups.
    pub fn reactors(&self) -> &Arc<dyn Reactors> {
        &self.reactors
    }

    /// How busy each reactor was of late, in permille.
    pub fn loads(&self) -> Vec<u32> {
        self.reactors.loads(self.bdevs.platform().clock().now())
    }

    /// Whether and when queues are moved between reactors.
    pub fn scheduler(&self) -> balance::Options {
        self.scheduler.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes that, from the next look on.
    pub fn set_scheduler(&self, options: balance::Options) {
        *self.scheduler.lock().unwrap_or_else(PoisonError::into_inner) = options;
    }

    /// Begins to look after the reactors' loads, and to move queues as [`scheduler`](Self::scheduler) says. Ends with this, or when
    /// the reactors stop.
    pub fn start_balancing(self: &Arc<Self>) {
        self.executor().spawn(Box::pin(balance::run(Arc::downgrade(self))));
    }

    pub(super) fn pause_between_looks(&self) -> BoxFuture<'static, ()> {
        self.executor().sleep(self.scheduler().period())
    }

    /// The transport of a kind.
    ///
    /// # Errors
    /// [`TargetError::NoTransport`] when the program was built without it.
    pub fn transport(&self, kind: TransportKind) -> Result<&Arc<dyn Transport>, TargetError> {
        let found = self.transports.iter().find(|transport| transport.kind() == kind);
        found.ok_or_else(|| {
            let have = self.transports.iter().map(|transport| transport.kind()).collect();
            TargetError::NoTransport { kind, have }
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn executor(&self) -> &Arc<dyn Executor> {
        self.bdevs.executor()
    }

    /// Runs a change as a task of its own and waits for it.
    async fn perform<T: Send + 'static>(
        &self,
        change: impl Future<Output = Result<T, TargetError>> + Send + 'static,
    ) -> Result<T, TargetError> {
        let (answer, answered) = oneshot::channel();
        self.executor().spawn(Box::pin(async move {
            // A caller who no longer waits is not an error.
            let _ = answer.send(change.await);
        }));
        answered.await.unwrap_or(Err(TargetError::Stopping))
    }

    /// Makes an edit and hands the new view to the reactors.
    fn edit<T>(
        &self,
        edit: impl FnOnce(&mut State) -> Result<(T, Released), TargetError>,
    ) -> Result<(T, Draining), TargetError> {
        let mut state = self.state();
        if state.stopped {
            return Err(TargetError::Stopping);
        }
        let (value, released) = edit(&mut state)?;
        let view = state.model.view();
        if view.generation == state.view.generation {
            assert!(released.is_empty(), "what ends a namespace's use makes a new view");
            return Ok((value, Draining(Box::pin(std::future::ready(Ok(()))))));
        }
        Ok((value, self.publish(&mut state, view, released)))
    }

    fn publish(&self, state: &mut State, view: TargetView, released: Released) -> Draining {
        state.view = Arc::new(view);
        state.published = true;
        let mut applying = self.reactors.apply(Arc::clone(&state.view));
        let at_once = (&mut applying).now_or_never();
        Draining(Box::pin(async move {
            let applied = match at_once {
                Some(applied) => applied,
                None => applying.await,
            };
            drop(released);
            applied
        }))
    }

    /// Waits for what a change ends, as long as `patience`; `done` says what was done.
    async fn drained(&self, draining: Draining, patience: Duration, done: String) -> Result<(), TargetError> {
        match select(draining.0, self.executor().sleep(patience)).await {
            Either::Left((drained, _)) => Ok(drained?),
            Either::Right((_, draining)) => {
                tracing::warn!("{done}, but what it ended has not drained after {patience:?}");
                let text = done.clone();
                self.executor().spawn(Box::pin(async move {
                    if draining.await.is_ok() {
                        tracing::info!("{text}, and what it ended has drained");
                    }
                }));
                Err(TargetError::StillDraining { done, waited: patience })
            }
        }
    }

    /// Waits until the reactors know of something new. They may be late because something else still drains: that does not
    /// make the addition fail.
    async fn announced(&self, draining: Draining, done: String) -> Result<(), TargetError> {
        match self.drained(draining, PATIENCE, done).await {
            Err(TargetError::StillDraining { .. }) => Ok(()),
            other => other,
        }
    }

    /// An edit that ends nothing.
    async fn add<T: Send + 'static>(
        self: &Arc<Self>,
        done: String,
        edit: impl FnOnce(&mut Model) -> Result<T, TargetError> + Send + 'static,
    ) -> Result<T, TargetError> {
        let system = Arc::clone(self);
        self.perform(async move {
            let (value, draining) = system.edit(|state| Ok((edit(&mut state.model)?, Released::new())))?;
            system.announced(draining, done).await?;
            Ok(value)
        })
        .await
    }

    /// An edit that ends what hosts may be using.
    async fn end(
        self: &Arc<Self>,
        done: String,
        patience: Duration,
        edit: impl FnOnce(&mut Model) -> Result<(), TargetError> + Send + 'static,
    ) -> Result<(), TargetError> {
        let system = Arc::clone(self);
        self.perform(async move {
            let ((), draining) = system.edit(|state| Ok((edit(&mut state.model)?, Released::new())))?;
            system.drained(draining, patience, done).await
        })
        .await
    }

    /// Changes settings. Reactors get them with the next change: settings are made before the start.
    ///
    /// # Errors
    /// As [`Model::set_settings`].
    pub fn set_settings(&self, change: impl FnOnce(&mut Settings)) -> Result<(), TargetError> {
        let mut state = self.state();
        let mut settings = state.model.settings().clone();
        change(&mut settings);
        Ok(state.model.set_settings(settings)?)
    }

    /// Adds a transport.
    ///
    /// # Errors
    /// As [`Model::create_transport`]; [`TargetError::NoTransport`].
    pub async fn create_transport(
        self: &Arc<Self>,
        kind: TransportKind,
        options: TransportOptions,
    ) -> Result<(), TargetError> {
        let checked = self.transport(kind)?.check(&options);
        checked.map_err(|source| TargetError::Unavailable { kind, source })?;
        let done = format!("transport {} is created", kind.name());
        self.add(done, move |model| Ok(model.create_transport(kind, options)?)).await
    }

    /// Adds a subsystem.
    ///
    /// # Errors
    /// As [`Model::create_subsystem`].
    pub async fn create_subsystem(self: &Arc<Self>, new: NewSubsystem) -> Result<(), TargetError> {
        let done = format!("subsystem {} is created", new.nqn);
        self.add(done, move |model| Ok(model.create_subsystem(new)?)).await
    }

    /// Lets a host connect.
    ///
    /// # Errors
    /// As [`Model::add_host`].
    pub async fn add_host(self: &Arc<Self>, nqn: &str, host: &str) -> Result<(), TargetError> {
        let (nqn, host) = (nqn.to_owned(), host.to_owned());
        let done = format!("host {host} is allowed");
        self.add(done, move |model| Ok(model.add_host(&nqn, &host)?)).await
    }

    /// No longer lets a host connect, and disconnects it.
    ///
    /// # Errors
    /// As [`Model::remove_host`]; [`TargetError::StillDraining`] after `patience`.
    pub async fn remove_host(self: &Arc<Self>, nqn: &str, host: &str, patience: Duration) -> Result<(), TargetError> {
        let (nqn, host) = (nqn.to_owned(), host.to_owned());
        let done = format!("host {host} is no longer allowed");
        self.end(done, patience, move |model| Ok(model.remove_host(&nqn, &host)?)).await
    }

    /// Lets any host connect, or only those that are listed; others are disconnected.
    ///
    /// # Errors
    /// As [`Model::allow_any_host`]; [`TargetError::StillDraining`].
    pub async fn allow_any_host(self: &Arc<Self>, nqn: &str, allow: bool) -> Result<(), TargetError> {
        let done = format!("{nqn} is open to {} hosts", if allow { "all" } else { "listed" });
        let nqn = nqn.to_owned();
        let edit = move |model: &mut Model| Ok(model.allow_any_host(&nqn, allow)?);
        match allow {
            true => self.add(done, edit).await,
            false => self.end(done, PATIENCE, edit).await,
        }
    }

    /// Sets the state of an ANA group, or of all, as seen through one listener.
    ///
    /// # Errors
    /// As [`Model::set_ana_state`].
    pub async fn set_ana_state(
        self: &Arc<Self>,
        nqn: &str,
        address: ListenAddress,
        state: AnaState,
        group: Option<u32>,
    ) -> Result<(), TargetError> {
        let nqn = nqn.to_owned();
        let done = format!("ANA state is {}", state.name());
        self.add(done, move |model| Ok(model.set_ana_state(&nqn, &address, state, group)?)).await
    }

    /// Moves a namespace to another ANA group.
    ///
    /// # Errors
    /// As [`Model::set_ana_group`].
    pub async fn set_ana_group(self: &Arc<Self>, nqn: &str, nsid: u32, group: u32) -> Result<(), TargetError> {
        let nqn = nqn.to_owned();
        let done = format!("namespace {nsid} is in ANA group {group}");
        self.add(done, move |model| Ok(model.set_ana_group(&nqn, nsid, group)?)).await
    }

    /// Refers hosts to another discovery service.
    ///
    /// # Errors
    /// As [`Model::add_referral`].
    pub async fn add_referral(self: &Arc<Self>, referral: Referral) -> Result<(), TargetError> {
        self.add("the referral is added".into(), move |model| Ok(model.add_referral(referral)?)).await
    }

    /// No longer refers hosts to a discovery service.
    ///
    /// # Errors
    /// As [`Model::remove_referral`].
    pub async fn remove_referral(self: &Arc<Self>, address: ListenAddress, subnqn: &str) -> Result<(), TargetError> {
        let subnqn = subnqn.to_owned();
        let done = "the referral is removed".into();
        self.add(done, move |model| Ok(model.remove_referral(&address, &subnqn)?)).await
    }

    /// Ends everything: addresses are closed, hosts disconnected, devices closed when their I/O has ended. What is saved
    /// stays as it was. Waits as long as it takes.
    pub async fn shut_down(self: &Arc<Self>) {
        let system = Arc::clone(self);
        // It only fails when the reactors are gone, and then all this is done.
        let _ = self
            .perform(async move {
                let draining = {
                    let mut state = system.state();
                    if std::mem::replace(&mut state.stopped, true) || !state.published {
                        return Ok(());
                    }
                    let released = std::mem::take(&mut state.descriptors).into_values().collect();
                    let view = TargetView {
                        generation: state.view.generation + 1,
                        discovery_generation: state.view.discovery_generation,
                        ..TargetView::default()
                    };
                    system.publish(&mut state, view, released)
                };
                let closed = system.close_all().await;
                draining.0.await?;
                closed
            })
            .await;
    }
}

/// "nvmf" in saved configurations.
impl ConfigSource for NvmfSystem {
    fn name(&self) -> &'static str {
        "nvmf"
    }

    fn depends_on(&self) -> &'static [&'static str] {
        &["bdev"]
    }

    fn save(&self) -> Vec<ConfigEntry> {
        self.state().model.save()
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
