//! The control plane: controllers are attached and detached, bdevs follow their namespaces.
//!
//! # Following
//! Whatever a path publishes starts a task, unless one is waiting already, that compares all that the controller's paths
//! know with the bdevs there are: namespaces that are new are registered, those that are gone are removed under whatever
//! load, sizes are passed on, paths that were given up are forgotten. One thing at a time changes a controller; calls and
//! these tasks take turns.

pub mod discovery;
mod error;
mod follow;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bdev::core::{BdevError, BdevSystem};
use futures_channel::oneshot;
use nvmf::host::{Connector, OnTimeout, Options as HostOptions, ReconnectPolicy, Transports};
use reactor::ReactorId;
use schema::ConfigEntry;
use serde_json::{Value, json};

use crate::disk::Disk;
use crate::home::{Port, Then};
use crate::part::Part;
use crate::path::{Address, Path, Site, TransportKind};
use crate::policy::Mode;
use discovery::Service;

pub use error::InitiatorError;

/// How often a removal that goes on in the background is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Controllers that may be attached.
pub const MAX_CONTROLLERS: usize = 1024;
/// Paths that a controller may have.
pub const MAX_PATHS: usize = 16;

/// What a second path to an attached controller is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Multipath {
    /// There is none: the name has to be new.
    Disable,
    /// To have another port when the one that is used fails: there is one connection at a time.
    Failover,
    /// To be used as the policy says.
    Multipath,
}

/// A call of `bdev_nvme_attach_controller`.
#[derive(Clone, Debug)]
pub struct Attach {
    /// Name of the controller.
    pub name: String,
    /// Where it is.
    pub address: Address,
    /// Digests of headers and of data.
    pub digests: (bool, bool),
    /// What the path is for.
    pub multipath: Multipath,
    /// What happens when it is lost.
    pub reconnect: ReconnectPolicy,
    /// How long each step of connecting may take.
    pub step_timeout: Option<Duration>,
    /// How a path is chosen, for bdevs to come.
    pub mode: Option<Mode>,
    /// The most bdevs.
    pub max_bdevs: usize,
    /// The discovery service that has found it; what a user attaches has none.
    pub owner: Option<Weak<Service>>,
    /// The call's parameters, for saving it.
    pub params: Value,
}

/// What `bdev_nvme_set_options` sets, for controllers that are attached afterwards.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Keep-alive timeout, milliseconds.
    pub kato_ms: u32,
    /// Commands outstanding on an I/O queue.
    pub io_depth: u16,
    /// How long an I/O command may take.
    pub io_timeout: Duration,
    /// What happens when it takes longer.
    pub on_timeout: OnTimeout,
    /// How long an admin command may take.
    pub admin_timeout: Duration,
    /// `ctrlr_loss_timeout_sec`, `reconnect_delay_sec`, `fast_io_fail_timeout_sec`.
    pub reconnect: (i64, u64, u64),
    /// How often I/O that has failed is sent again; `None`: for ever.
    pub retries: Option<u32>,
    /// How long a TCP connection may take to be set up, up to the answer to ICReq; `None`: as long as other steps.
    pub connect_timeout: Option<Duration>,
    /// How long an RDMA connection may take to be set up, likewise.
    pub rdma_connect_timeout: Option<Duration>,
    /// How a path is chosen.
    pub mode: Mode,
    /// The call that set them, if there was one.
    pub params: Option<Value>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            kato_ms: 10_000,
            io_depth: 512,
            io_timeout: Duration::from_secs(30),
            on_timeout: OnTimeout::GiveUp,
            admin_timeout: Duration::from_secs(5),
            reconnect: (0, 0, 0),
            retries: Some(3),
            connect_timeout: None,
            rdma_connect_timeout: None,
            mode: Mode::default(),
            params: None,
        }
    }
}

impl Settings {
    fn connect_timeout_on(&self, trtype: TransportKind) -> Option<Duration> {
        match trtype {
            TransportKind::Tcp => self.connect_timeout,
            TransportKind::Rdma => self.rdma_connect_timeout,
        }
    }
}

/// A path of a controller.
#[derive(Clone, Debug)]
pub struct Member {
    /// The path.
    pub path: Arc<Path>,
    /// The discovery service that has found it.
    owner: Option<Weak<Service>>,
    /// The calls that made it: one for each port.
    calls: Vec<(Site, Value)>,
}

#[derive(Debug, Default)]
struct Inner {
    members: Vec<Member>,
    disks: BTreeMap<u32, Arc<Disk>>,
    mode: Mode,
    retries: Option<u32>,
    max_bdevs: usize,
    /// It is no longer in the list.
    over: bool,
}

/// A controller: a name, and the paths to one subsystem under it.
pub struct Group {
    /// The name.
    pub name: String,
    system: Weak<InitiatorSystem>,
    /// Held while something about it changes.
    turn: futures_util::lock::Mutex<()>,
    inner: Mutex<Inner>,
    /// A task that follows the news waits for its turn.
    following: AtomicBool,
}

impl Group {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its paths.
    pub fn paths(&self) -> Vec<Arc<Path>> {
        self.inner().members.iter().map(|member| Arc::clone(&member.path)).collect()
    }

    /// Its bdevs.
    pub fn disks(&self) -> Vec<Arc<Disk>> {
        self.inner().disks.values().filter(|disk| !disk.is_removed()).cloned().collect()
    }
}

#[derive(Default)]
struct State {
    groups: BTreeMap<String, Arc<Group>>,
    services: BTreeMap<String, Arc<Service>>,
    settings: Settings,
}

/// The initiator's control plane, and the context of the `bdev_nvme_*` methods.
pub struct InitiatorSystem {
    bdevs: Arc<BdevSystem>,
    state: Mutex<State>,
    hostid: [u8; 16],
    hostnqn: String,
    next_path: AtomicU64,
    transports: Transports,
}

impl InitiatorSystem {
    /// An initiator without controllers, over reactors on each of which [`Part::install`] was called.
    pub fn new(bdevs: &Arc<BdevSystem>, transports: Transports) -> Arc<InitiatorSystem> {
        let uuid = bdevs.random_uuid();
        let system = Arc::new(InitiatorSystem {
            bdevs: Arc::clone(bdevs),
            state: Mutex::default(),
            hostid: *uuid.as_bytes(),
            hostnqn: format!("nqn.2014-08.org.nvmexpress:uuid:{uuid}"),
            next_path: AtomicU64::new(1),
            transports,
        });
        let saved = Arc::downgrade(&system);
        bdevs.add_base_config(Box::new(move || saved.upgrade().map_or_else(Vec::new, |system| system.save())));
        system
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bdev layer.
    pub fn bdevs(&self) -> &Arc<BdevSystem> {
        &self.bdevs
    }

    /// NQN of this host where none is given; another one with each start.
    pub fn hostnqn(&self) -> &str {
        &self.hostnqn
    }

    /// The options in force.
    pub fn settings(&self) -> Settings {
        self.state().settings.clone()
    }

    /// Sets the options.
    ///
    /// # Errors
    /// [`InitiatorError::InUse`] when controllers are attached.
    pub fn set_settings(&self, settings: Settings) -> Result<(), InitiatorError> {
        let mut state = self.state();
        if !state.groups.is_empty() || !state.services.is_empty() {
            return Err(InitiatorError::InUse);
        }
        state.settings = settings;
        Ok(())
    }

    /// The controllers.
    pub fn groups(&self) -> Vec<Arc<Group>> {
        self.state().groups.values().cloned().collect()
    }

    /// The controller `name`.
    ///
    /// # Errors
    /// [`InitiatorError::NotFound`].
    pub fn group(&self, name: &str) -> Result<Arc<Group>, InitiatorError> {
        self.state().groups.get(name).cloned().ok_or_else(|| InitiatorError::NotFound { name: name.to_string() })
    }

    /// Runs `work` to its end, also when the caller loses interest.
    async fn finish<R: Send + 'static>(
        &self,
        work: impl Future<Output = Result<R, InitiatorError>> + Send + 'static,
    ) -> Result<R, InitiatorError> {
        let (send, receive) = oneshot::channel();
        self.bdevs.executor().spawn(Box::pin(async move {
            let _ = send.send(work.await);
        }));
        receive.await.unwrap_or(Err(InitiatorError::Stopping))
    }

    // ---- attach ----------------------------------------------------------------------------------------------------

    /// Attaches a controller, or another path of one; the names of the bdevs on that path.
    ///
    /// # Errors
    /// As they say.
    pub async fn attach(self: &Arc<Self>, request: Attach) -> Result<Vec<String>, InitiatorError> {
        let system = Arc::clone(self);
        self.finish(async move { system.attach_to_end(request).await }).await
    }

    async fn attach_to_end(self: Arc<Self>, request: Attach) -> Result<Vec<String>, InitiatorError> {
        let group = self.group_for(&request)?;
        let turn = group.turn.lock().await;
        let attached = self.attach_path(&group, request).await;
        let empty = group.inner().members.is_empty();
        if empty {
            self.forget(&group);
        }
        drop(turn);
        attached
    }

    fn group_for(self: &Arc<Self>, request: &Attach) -> Result<Arc<Group>, InitiatorError> {
        let mut state = self.state();
        if let Some(group) = state.groups.get(&request.name) {
            return Ok(Arc::clone(group));
        }
        if state.groups.len() >= MAX_CONTROLLERS {
            return Err(InitiatorError::TooMany { what: "controllers", limit: MAX_CONTROLLERS });
        }
        let inner = Inner {
            mode: request.mode.unwrap_or(state.settings.mode),
            retries: state.settings.retries,
            max_bdevs: request.max_bdevs,
            ..Inner::default()
        };
        let group = Arc::new(Group {
            name: request.name.clone(),
            system: Arc::downgrade(self),
            turn: futures_util::lock::Mutex::new(()),
            inner: Mutex::new(inner),
            following: AtomicBool::new(false),
        });
        state.groups.insert(request.name.clone(), Arc::clone(&group));
        Ok(group)
    }

    /// Whether the controller can have this path.
    fn check(&self, group: &Group, request: &Attach) -> Result<(), InitiatorError> {
        let inner = group.inner();
        let name = request.name.clone();
        if inner.over {
            return Err(InitiatorError::BeingDetached { name });
        }
        let Some(first) = inner.members.first() else { return Ok(()) };
        if request.multipath == Multipath::Disable {
            return Err(InitiatorError::Exists { name });
        }
        let (old, new) = (&first.path.address, &request.address);
        if old.subnqn != new.subnqn {
            return Err(InitiatorError::OtherSubsystem { name, is: old.subnqn.clone() });
        }
        if old.hostnqn != new.hostnqn {
            return Err(InitiatorError::OtherHost { name, is: old.hostnqn.clone() });
        }
        if inner.members.iter().any(|member| member.path.is_at(new)) {
            return Err(InitiatorError::SamePath { name, path: new.to_string() });
        }
        if request.multipath == Multipath::Failover && inner.members.len() > 1 {
            return Err(InitiatorError::SeveralPaths { name });
        }
        let ports: usize = inner.members.iter().map(|member| member.calls.len()).sum();
        if ports >= MAX_PATHS {
            return Err(InitiatorError::TooMany { what: "paths of a controller", limit: MAX_PATHS });
        }
        Ok(())
    }

    async fn attach_path(self: &Arc<Self>, group: &Arc<Group>, request: Attach) -> Result<Vec<String>, InitiatorError> {
        self.check(group, &request)?;
        let path = self.connect(group, &request).await?;
        if let Err(error) = self.check_namespaces(group, &path) {
            let _ = self.end(&path, Then::Detach).await;
            return Err(error);
        }
        let call = (request.address.site, request.params);
        let first = group.paths().into_iter().next().filter(|_| request.multipath == Multipath::Failover);
        let path = match first {
            None => {
                let member = Member { path: Arc::clone(&path), owner: request.owner, calls: vec![call] };
                group.inner().members.push(member);
                path
            }
            // It was only to be seen that it leads to the same.
            Some(first) => {
                self.end(&path, Then::Detach).await?;
                self.add_port(group, &first, request.digests, call).await?;
                first
            }
        };
        self.follow(group).await;
        let disks = group.disks();
        let on_path = |disk: &&Arc<Disk>| disk.paths().iter().any(|route| Arc::ptr_eq(&route.path, &path));
        Ok(disks.iter().filter(on_path).map(|disk| disk.name.clone()).collect())
    }

    /// What connects to a port.
    fn connector(&self, site: Site, digests: (bool, bool)) -> Result<Arc<dyn Connector>, InitiatorError> {
        let missing = |why: String| InitiatorError::NoTransport { trtype: site.trtype, why };
        let found = self.transports.iter().find(|transport| transport.kind() == site.trtype);
        let transport = found.ok_or_else(|| missing("it is not built in".into()))?;
        transport.check().map_err(|error| missing(error.to_string()))?;
        Ok(transport.connector(site.socket, digests))
    }

    /// Whether this machine has what a transport takes.
    fn has_transport(&self, trtype: TransportKind) -> bool {
        self.transports.iter().any(|transport| transport.kind() == trtype && transport.check().is_ok())
    }

    /// Gives a path another port.
    async fn add_port(
        &self,
        group: &Group,
        path: &Arc<Path>,
        digests: (bool, bool),
        call: (Site, Value),
    ) -> Result<(), InitiatorError> {
        let (id, site) = (path.id, call.0);
        let port = Port { site, connector: self.connector(site, digests)? };
        let home = &self.bdevs.reactors()[path.home.0 as usize];
        if !home.call(move |cx| Part::of(cx).borrow_mut().add_port(id, port)).await? {
            return Err(InitiatorError::BeingDetached { name: group.name.clone() });
        }
        let mut inner = group.inner();
        let member = inner.members.iter_mut().find(|member| Arc::ptr_eq(&member.path, path));
        member.into_iter().for_each(|member| member.calls.push(call.clone()));
        Ok(())
    }

    /// Takes ports from a path that keeps others.
    async fn remove_ports(&self, group: &Group, path: &Arc<Path>, ports: &[Site]) -> Result<(), InitiatorError> {
        let mut result = Ok(());
        for &site in ports {
            let id = path.id;
            let removed = self.bdevs.reactors()[path.home.0 as usize].call_deferred(move |cx, reply| {
                let part = Part::of(cx);
                part.borrow_mut().remove_port(cx, id, site, reply);
            });
            let refused = |why| InitiatorError::Refused { path: path.address.to_string(), why };
            let removed = removed.await.map_err(InitiatorError::from).and_then(|removed| removed.map_err(refused));
            result = result.and(removed);
        }
        let mut inner = group.inner();
        for member in inner.members.iter_mut().filter(|member| Arc::ptr_eq(&member.path, path)) {
            member.calls.retain(|(site, _)| !ports.contains(site));
        }
        result
    }

    /// Connects a path for the first time.
    async fn connect(self: &Arc<Self>, group: &Arc<Group>, request: &Attach) -> Result<Arc<Path>, InitiatorError> {
        let settings = self.settings();
        let site = request.address.site;
        // First of all: nothing else is worth trying without.
        let port = Port { site, connector: self.connector(site, request.digests)? };
        let reactors = self.bdevs.reactors();
        let id = self.next_path.fetch_add(1, Ordering::Relaxed);
        let home = ReactorId((id % reactors.len() as u64) as u32);
        let news = Arc::downgrade(group);
        let on_news = Box::new(move || {
            if let Some(group) = news.upgrade() {
                group.has_news();
            }
        });
        let path = Path::new(id, request.address.clone(), home, on_news);
        let options = HostOptions {
            subnqn: request.address.subnqn.clone(),
            hostnqn: request.address.hostnqn.clone(),
            hostid: self.hostid_of(&request.address.hostnqn),
            discovery: false,
            io_queues: u16::try_from(reactors.len()).unwrap_or(u16::MAX),
            io_depth: settings.io_depth,
            step_timeout: request.step_timeout.unwrap_or(settings.admin_timeout),
            connect_timeout: settings.connect_timeout_on(site.trtype),
            io_timeout: settings.io_timeout,
            on_timeout: settings.on_timeout,
            kato_ms: settings.kato_ms,
            reconnect: request.reconnect,
            ..HostOptions::default()
        };
        let begun = Arc::clone(&path);
        let connected = reactors[home.0 as usize].call_deferred(move |cx, reply| {
            let now = cx.now();
            Part::of(cx).borrow_mut().add_home(begun, port, options, reply, now);
        });
        let to = request.address.to_string();
        connected.await?.map_err(|why| InitiatorError::Connect { to, why: why.to_string() })?;
        let granted = path.view().association.as_ref().map_or(0, |association| association.queues.len());
        if granted < reactors.len() {
            let _ = self.end(&path, Then::Detach).await;
            return Err(InitiatorError::FewQueues { granted, wanted: reactors.len() });
        }
        Ok(path)
    }

    /// One identifier for each name that this host goes by.
    fn hostid_of(&self, hostnqn: &str) -> [u8; 16] {
        let mut id = self.hostid;
        if hostnqn != self.hostnqn {
            for (n, byte) in hostnqn.bytes().enumerate() {
                id[n % 16] = id[n % 16].rotate_left(3) ^ byte;
            }
        }
        id
    }

    /// Namespaces with the same number have to be the same, and have a name that shows it.
    fn check_namespaces(&self, group: &Group, path: &Path) -> Result<(), InitiatorError> {
        let inner = group.inner();
        for (nsid, namespace) in &path.view().namespaces {
            let Some(disk) = inner.disks.get(nsid).filter(|disk| !disk.is_removed()) else { continue };
            if !disk.is_same(namespace) {
                return Err(InitiatorError::OtherNamespace { nsid: *nsid, bdev: disk.name.clone() });
            }
            let identity = &namespace.identity;
            if identity.nguid.is_none() && identity.eui64.is_none() && identity.uuid.is_none() {
                return Err(InitiatorError::NamelessNamespace { nsid: *nsid });
            }
        }
        Ok(())
    }

    // ---- detach and the like ---------------------------------------------------------------------------------------

    /// Has a path's home end its association.
    async fn end(&self, path: &Arc<Path>, then: Then) -> Result<(), InitiatorError> {
        let id = path.id;
        let ended = self.bdevs.reactors()[path.home.0 as usize].call_deferred(move |cx, reply| {
            let part = Part::of(cx);
            part.borrow_mut().end(cx, id, then, reply);
        });
        ended.await?.map_err(|why| InitiatorError::Refused { path: path.address.to_string(), why })
    }

    /// Detaches the paths of a controller that `which` names; with the last one, the controller.
    ///
    /// # Errors
    /// [`InitiatorError::NotFound`], [`InitiatorError::NoSuchPath`]; [`BdevError::StillDraining`] when I/O does not end: the
    /// rest happens in the background then.
    pub async fn detach(
        self: &Arc<Self>,
        name: &str,
        which: impl Fn(&Address) -> bool + Send + 'static,
    ) -> Result<(), InitiatorError> {
        let group = self.group(name)?;
        let mut found: Vec<(Arc<Service>, Address)> = Vec::new();
        for member in &group.inner().members {
            let owner = member.owner.as_ref().and_then(Weak::upgrade).filter(|_| which(&member.path.address));
            found.extend(owner.map(|owner| (owner, member.path.address.clone())));
        }
        found.into_iter().for_each(|(owner, address)| owner.leave_alone(&[address]));
        self.detach_paths(name, which).await
    }

    /// The same, without telling the discovery services that have found the paths.
    async fn detach_paths(
        self: &Arc<Self>,
        name: &str,
        which: impl Fn(&Address) -> bool + Send + 'static,
    ) -> Result<(), InitiatorError> {
        let group = self.group(name)?;
        let system = Arc::clone(self);
        let (send, receive) = oneshot::channel();
        self.bdevs.executor().spawn(Box::pin(async move {
            let mut answer = Some(send);
            let result = system.detach_to_end(&group, which, &mut answer).await;
            if let Some(answer) = answer {
                let _ = answer.send(result);
            }
        }));
        receive.await.unwrap_or(Err(InitiatorError::Stopping))
    }

    async fn detach_to_end(
        &self,
        group: &Arc<Group>,
        which: impl Fn(&Address) -> bool + Send + 'static,
        answer: &mut Option<oneshot::Sender<Result<(), InitiatorError>>>,
    ) -> Result<(), InitiatorError> {
        let turn = group.turn.lock().await;
        let mut result = Ok(());
        let (mut leaving, mut found): (Vec<Arc<Path>>, bool) = (Vec::new(), false);
        for path in group.paths() {
            let addresses = path.addresses();
            let ports: Vec<Site> = addresses.iter().filter(|at| which(at)).map(|at| at.site).collect();
            found |= !ports.is_empty();
            if ports.len() == addresses.len() {
                leaving.push(path);
            } else if !ports.is_empty() {
                result = result.and(self.remove_ports(group, &path, &ports).await);
            }
        }
        if !found {
            return Err(InitiatorError::NoSuchPath { name: group.name.clone() });
        }
        leaving.iter().for_each(|path| path.leaving.store(true, Ordering::Release));
        self.follow(group).await;
        // What does not end in its time ends later; the paths stay as long as it may need them.
        for disk in group
            .disks()
            .iter()
            .filter(|disk| disk.paths().iter().all(|route| route.path.leaving.load(Ordering::Acquire)))
        {
            while !disk.is_removed() {
                if let (Some(answer), Err(error)) = (answer.take(), self.bdevs.remove(&disk.name).await) {
                    let _ = answer.send(Err(error.into()));
                }
                self.bdevs.executor().sleep(LOOK_AGAIN).await;
            }
        }
        for path in &leaving {
            result = result.and(self.end(path, Then::Detach).await);
        }
        let empty = {
            let mut inner = group.inner();
            inner.members.retain(|member| !leaving.iter().any(|path| Arc::ptr_eq(path, &member.path)));
            inner.members.is_empty()
        };
        if empty {
            self.forget(group);
        }
        drop(turn);
        result
    }

    /// The controller has no path left.
    fn forget(&self, group: &Arc<Group>) {
        group.inner().over = true;
        let mut state = self.state();
        if state.groups.get(&group.name).is_some_and(|known| Arc::ptr_eq(known, group)) {
            state.groups.remove(&group.name);
        }
    }

    /// The paths of a controller, or the one whose controller has the identifier `cntlid`.
    fn paths_of(&self, name: &str, cntlid: Option<u16>) -> Result<Vec<Arc<Path>>, InitiatorError> {
        let mut paths = self.group(name)?.paths();
        if let Some(cntlid) = cntlid {
            let has = |path: &Arc<Path>| path.view().association.as_ref().is_some_and(|a| a.cntlid == cntlid);
            paths.retain(has);
            if paths.is_empty() {
                return Err(InitiatorError::NoSuchCntlid { name: name.to_string(), cntlid });
            }
        }
        Ok(paths)
    }

    /// Connects a controller's paths anew, one after the other.
    ///
    /// # Errors
    /// As they say; the rest of the paths is reset all the same.
    pub async fn reset(self: &Arc<Self>, name: &str, cntlid: Option<u16>) -> Result<(), InitiatorError> {
        self.for_each(name, cntlid, Then::Reconnect).await
    }

    /// Ends the connections of a controller's paths until they are enabled.
    ///
    /// # Errors
    /// As they say.
    pub async fn disable(self: &Arc<Self>, name: &str, cntlid: Option<u16>) -> Result<(), InitiatorError> {
        self.for_each(name, cntlid, Then::Disable).await
    }

    async fn for_each(self: &Arc<Self>, name: &str, cntlid: Option<u16>, then: Then) -> Result<(), InitiatorError> {
        let paths = self.paths_of(name, cntlid)?;
        let system = Arc::clone(self);
        self.finish(async move {
            let mut result = Ok(());
            for path in paths {
                result = result.and(system.end(&path, then).await);
            }
            result
        })
        .await
    }

    /// Connects a controller's paths that were disabled.
    ///
    /// # Errors
    /// As they say.
    pub async fn enable(self: &Arc<Self>, name: &str, cntlid: Option<u16>) -> Result<(), InitiatorError> {
        let paths = self.paths_of(name, cntlid)?;
        let reactors = self.bdevs.reactors().to_vec();
        self.finish(async move {
            let mut result = Ok(());
            for path in paths {
                let id = path.id;
                let enabled = reactors[path.home.0 as usize].call_deferred(move |cx, reply| {
                    let now = cx.now();
                    Part::of(cx).borrow_mut().enable(id, reply, now);
                });
                let enabled = enabled.await.map_err(InitiatorError::from);
                let refused = |why| InitiatorError::Refused { path: path.address.to_string(), why };
                result = result.and(enabled.and_then(|enabled| enabled.map_err(refused)));
            }
            result
        })
        .await
    }

    /// Ends all connections in good order, for the end of the process. Bdevs stay, without paths.
    pub async fn shut_down(self: &Arc<Self>) {
        self.end_discovery().await;
        let paths: Vec<Arc<Path>> = self.groups().iter().flat_map(|group| group.paths()).collect();
        for path in &paths {
            path.leaving.store(true, Ordering::Release);
        }
        let ends = paths.iter().map(|path| self.end(path, Then::Detach));
        futures_util::future::join_all(ends).await;
    }

    /// The bdev `name`, if a controller made it.
    ///
    /// # Errors
    /// [`BdevError::NotFound`], [`BdevError::WrongKind`].
    pub fn disk(&self, name: &str) -> Result<Arc<Disk>, InitiatorError> {
        let info = self.bdevs.get(name)?;
        Disk::of(&info).ok_or_else(|| BdevError::wrong_kind(&info, crate::disk::PRODUCT).into())
    }

    /// The calls that bring all of this back.
    fn save(&self) -> Vec<ConfigEntry> {
        let mut entries = Vec::new();
        if let Some(params) = &self.state().settings.params {
            entries.push(ConfigEntry::new("bdev_nvme_set_options", params.clone()));
        }
        for group in self.groups() {
            let inner = group.inner();
            let stays = |member: &&Member| member.owner.is_none() && !member.path.leaving.load(Ordering::Acquire);
            let members = inner.members.iter().filter(stays);
            if members.clone().next().is_none() {
                // What was discovered is discovered again, and perhaps under other names.
                continue;
            }
            let calls = members.flat_map(|member| &member.calls);
            entries.extend(calls.map(|(_, params)| ConfigEntry::new("bdev_nvme_attach_controller", params.clone())));
            let changed = inner.disks.values().filter(|disk| !disk.is_removed() && disk.mode() != inner.mode);
            for disk in changed {
                let mut params = crate::rpc::policy_to_json(disk.mode());
                params["name"] = json!(disk.name);
                entries.push(ConfigEntry::new("bdev_nvme_set_multipath_policy", params));
            }
        }
        let services = self.services();
        entries.extend(services.iter().map(|s| ConfigEntry::new("bdev_nvme_start_discovery", s.params.clone())));
        entries
    }
}

impl fmt::Debug for InitiatorSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InitiatorSystem").field("controllers", &self.state().groups.len()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Group({})", self.name)
    }
}
