//! Discovery services: controllers follow what discovery logs list.
//!
//! # What is attached
//! A service has a first discovery controller and those that its log and theirs lead to: referrals, and other ports of the
//! same service; each has a connection that stays ([`scout`](crate::scout)). Every entry of an NVM subsystem in any of these
//! logs becomes a path, if it is on TCP, or on RDMA and the machine had a device for it when the service began: entries of one subsystem are paths of one controller, called by the service's name and the
//! next number. An entry that is gone from all logs costs its path, and the last one the controller with its bdevs. A
//! discovery controller that cannot be reached costs nothing: its log counts as it was read last.
//!
//! What cannot be attached is tried again from time to time; what a user has detached comes back only when a log is read
//! anew. An address that is attached already under another name stays there.
//!
//! # Following
//! As controllers do it: whatever is reported starts a task, unless one is waiting, and these take turns.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures_channel::oneshot;
use futures_util::future::{Either, join_all, select};
use nvmf::host::discovery::address_on;
use nvmf::host::{Options as HostOptions, ReconnectPolicy};
use nvmf::spec::fabrics::{DISCOVERY_NQN, NQN_MAX_BYTES};
use nvmf::spec::log::{DiscoveryEntry, subtype};
use nvmf::spec::nul_text;
use reactor::ReactorId;
use serde_json::Value;

use super::{Attach, InitiatorError, InitiatorSystem, MAX_CONTROLLERS, MAX_PATHS, Multipath};
use crate::part::Part;
use crate::path::{Address, Site, TransportKind};
use crate::scout::{Post, Report};

/// Discovery services that may be started.
pub const MAX_SERVICES: usize = 64;
/// Discovery controllers of one service.
pub const MAX_SCOUTS: usize = 16;
/// Entries that a service attaches at most.
const MAX_ENTRIES: usize = 4096;
/// Bdevs of a controller that was found.
const MAX_BDEVS: usize = 8192;
/// How long until what could not be attached is tried again.
const RETRY_DELAY: Duration = Duration::from_secs(10);
/// Subsystems that are attached at the same time.
const AT_ONCE: usize = 8;
/// TREQ: a secure channel is required.
const SECURE_REQUIRED: u8 = 1;

/// A call of `bdev_nvme_start_discovery`.
#[derive(Clone, Debug)]
pub struct Start {
    /// Name of the service, with which the names of its controllers begin.
    pub name: String,
    /// The first discovery controller.
    pub site: Site,
    /// NQN of this host.
    pub hostnqn: String,
    /// What happens when a path that was found is lost.
    pub reconnect: ReconnectPolicy,
    /// So long is waited until everything that is listed is attached; `None`: not at all.
    pub wait: Option<Duration>,
    /// The call's parameters, for saving it.
    pub params: Value,
}

/// A path that a log lists: the subsystem, and where.
type Entry = (String, Site);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It is a path.
    Attached,
    /// It is to be tried again later.
    Failed,
    /// The user has detached it.
    LeftAlone,
}

#[derive(Debug, Default)]
struct Inner {
    posts: Vec<Arc<Post>>,
    /// Readings of all logs, as of the last time that they were looked at.
    reads: u64,
    entries: BTreeMap<Entry, State>,
    /// Names of controllers, by subsystem.
    names: BTreeMap<String, String>,
    next: u64,
    waiters: Vec<oneshot::Sender<()>>,
    /// A task sleeps that looks again at what has failed.
    retrying: bool,
    /// It has slept enough.
    due: bool,
}

/// A discovery service.
pub struct Service {
    /// Its name.
    pub name: String,
    /// The first discovery controller.
    pub site: Site,
    hostnqn: String,
    reconnect: ReconnectPolicy,
    /// The transports whose entries count: those that the machine had when the service began.
    transports: Vec<TransportKind>,
    /// The call that started it.
    pub(super) params: Value,
    system: Weak<InitiatorSystem>,
    turn: futures_util::lock::Mutex<()>,
    inner: Mutex<Inner>,
    following: AtomicBool,
    stopping: AtomicBool,
}

impl Service {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its discovery controllers besides the first.
    pub fn referrals(&self) -> Vec<Arc<Post>> {
        self.inner().posts.iter().filter(|post| post.site != self.site).cloned().collect()
    }

    /// Why the first discovery controller cannot be reached, if it cannot.
    fn error(&self) -> Option<String> {
        let posts = self.inner().posts.clone();
        posts.iter().find(|post| post.site == self.site).and_then(|post| post.report().error)
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Something was reported, or a path of its own is gone.
    pub(super) fn has_news(self: &Arc<Self>) {
        if self.following.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(system) = self.system.upgrade() else { return };
        let service = Arc::clone(self);
        let executor = Arc::clone(system.bdevs.executor());
        executor.spawn(Box::pin(async move {
            let turn = service.turn.lock().await;
            // Before anything is looked at: what is reported from now on needs another look.
            service.following.store(false, Ordering::Release);
            system.follow_service(&service).await;
            drop(turn);
        }));
    }

    /// A user has detached these paths.
    pub(super) fn leave_alone(&self, paths: &[Address]) {
        let mut inner = self.inner();
        for path in paths {
            if let Some(state) = inner.entries.get_mut(&(path.subnqn.clone(), path.site)) {
                *state = State::LeftAlone;
            }
        }
    }
}

/// The service that a referral, or another port of the same service, names.
fn referral(entry: &DiscoveryEntry, with: &[TransportKind]) -> Option<(Site, String)> {
    let leads_on = matches!(entry.subtype, subtype::REFERRAL | subtype::CURRENT_DISCOVERY);
    let nqn = nul_text(&entry.subnqn).filter(|nqn| !nqn.is_empty() && nqn.len() <= NQN_MAX_BYTES);
    Some((usable(entry, with).filter(|_| leads_on)?, nqn?.to_owned()))
}

/// The path that an entry names.
fn path(entry: &DiscoveryEntry, with: &[TransportKind]) -> Option<Entry> {
    let nqn = nul_text(&entry.subnqn).filter(|nqn| !nqn.is_empty() && nqn.len() <= NQN_MAX_BYTES)?;
    let site = usable(entry, with).filter(|_| entry.subtype == subtype::NVM)?;
    (nqn != DISCOVERY_NQN).then(|| (nqn.to_owned(), site))
}

/// The port of an entry, if this host can connect to it.
fn usable(entry: &DiscoveryEntry, with: &[TransportKind]) -> Option<Site> {
    let trtype = *with.iter().find(|kind| kind.trtype() == entry.trtype)?;
    // What is in TSAS[0] is the kind of security on TCP, and that of the queue pairs on RDMA.
    let secure = entry.treq & 3 == SECURE_REQUIRED || trtype == TransportKind::Tcp && entry.tsas[0] != 0;
    let socket = address_on(trtype.trtype(), entry).ok()?;
    let possible = !secure && socket.port() != 0 && !socket.ip().is_unspecified();
    possible.then_some(Site { trtype, socket })
}

/// The discovery controllers that the logs lead to from the first one on, nearest first.
fn reachable(first: Site, reports: &[(Arc<Post>, Report)], with: &[TransportKind]) -> Vec<(Site, String)> {
    let mut found = vec![(first, DISCOVERY_NQN.to_owned())];
    let mut waiting = VecDeque::from([first]);
    while let Some(site) = waiting.pop_front() {
        let report = reports.iter().find(|(post, _)| post.site == site).map(|(_, report)| report);
        let Some(log) = report.and_then(|report| report.log.as_ref()) else { continue };
        for (site, subnqn) in log.entries.iter().filter_map(|entry| referral(entry, with)) {
            // Every NQN at one address shows the same log.
            if found.iter().all(|(known, _)| *known != site) {
                if found.len() == MAX_SCOUTS {
                    tracing::warn!(at = %site, max = MAX_SCOUTS, "a referral too many: it is not followed");
                    return found;
                }
                found.push((site, subnqn));
                waiting.push_back(site);
            }
        }
    }
    found
}

/// The paths that the logs of `reports` list.
fn listed(reports: &[(Arc<Post>, Report)], with: &[TransportKind]) -> BTreeSet<Entry> {
    let logs = reports.iter().filter_map(|(_, report)| report.log.as_ref());
    let mut found = BTreeSet::new();
    for entry in logs.flat_map(|log| &log.entries).filter_map(|entry| path(entry, with)) {
        if found.len() == MAX_ENTRIES && !found.contains(&entry) {
            tracing::warn!(max = MAX_ENTRIES, "a discovery service lists more than is attached");
            break;
        }
        found.insert(entry);
    }
    found
}

impl InitiatorSystem {
    /// The discovery services.
    pub fn services(&self) -> Vec<Arc<Service>> {
        self.state().services.values().cloned().collect()
    }

    /// Starts a discovery service.
    ///
    /// # Errors
    /// [`InitiatorError::Served`], [`InitiatorError::TooMany`]; [`InitiatorError::NotInTime`] where it was waited for: it is
    /// stopped again then.
    pub async fn start_discovery(self: &Arc<Self>, start: Start) -> Result<(), InitiatorError> {
        let wait = start.wait;
        let (done, waited) = oneshot::channel();
        let service = self.new_service(start)?;
        if wait.is_some() {
            service.inner().waiters.push(done);
        }
        let (system, begun) = (Arc::clone(self), Arc::clone(&service));
        self.finish(async move {
            let _turn = begun.turn.lock().await;
            system.add_post(&begun, begun.site, DISCOVERY_NQN.to_owned()).await
        })
        .await?;
        let Some(wait) = wait else { return Ok(()) };
        let name = service.name.clone();
        match select(waited, self.bdevs.executor().sleep(wait)).await {
            Either::Left((Ok(()), _)) => Ok(()),
            Either::Left((Err(_), _)) => Err(InitiatorError::NoService { name }),
            Either::Right(_) => {
                let why = service.error().unwrap_or_else(|| "what it lists is not attached yet".into());
                let _ = self.stop_discovery(&name).await;
                Err(InitiatorError::NotInTime { name, wait, why })
            }
        }
    }

    fn new_service(self: &Arc<Self>, start: Start) -> Result<Arc<Service>, InitiatorError> {
        // Whoever starts one over RDMA is told what is missing.
        self.connector(start.site, (false, false))?;
        let kinds = [TransportKind::Tcp, TransportKind::Rdma];
        let transports = kinds.into_iter().filter(|kind| self.has_transport(*kind)).collect();
        let mut state = self.state();
        let has = |service: &&Arc<Service>| {
            service.name == start.name
                || service.site == start.site
                || service.inner().posts.iter().any(|post| post.site == start.site)
        };
        if let Some(service) = state.services.values().find(has) {
            return Err(InitiatorError::Served { name: service.name.clone(), at: service.site });
        }
        if state.services.len() >= MAX_SERVICES {
            return Err(InitiatorError::TooMany { what: "discovery services", limit: MAX_SERVICES });
        }
        let service = Arc::new(Service {
            name: start.name.clone(),
            site: start.site,
            hostnqn: start.hostnqn,
            reconnect: start.reconnect,
            transports,
            params: start.params,
            system: Arc::downgrade(self),
            turn: futures_util::lock::Mutex::new(()),
            inner: Mutex::default(),
            following: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        });
        state.services.insert(start.name, Arc::clone(&service));
        Ok(service)
    }

    /// Stops a discovery service: what it has attached is detached.
    ///
    /// # Errors
    /// [`InitiatorError::NoService`].
    pub async fn stop_discovery(self: &Arc<Self>, name: &str) -> Result<(), InitiatorError> {
        let removed = self.state().services.remove(name);
        let Some(service) = removed else { return Err(InitiatorError::NoService { name: name.to_string() }) };
        service.stopping.store(true, Ordering::Release);
        let system = Arc::clone(self);
        self.finish(async move {
            service.inner().waiters.clear();
            let _turn = service.turn.lock().await;
            let posts = std::mem::take(&mut service.inner().posts);
            join_all(posts.iter().map(|post| system.end_post(post))).await;
            let gone: Vec<Entry> = service.inner().entries.keys().cloned().collect();
            system.detach_entries(&service, &gone).await;
            Ok(())
        })
        .await
    }

    async fn add_post(
        self: &Arc<Self>,
        service: &Arc<Service>,
        site: Site,
        subnqn: String,
    ) -> Result<(), InitiatorError> {
        let settings = self.settings();
        let reactors = self.bdevs.reactors();
        let id = self.next_path.fetch_add(1, Ordering::Relaxed);
        let home = ReactorId((id % reactors.len() as u64) as u32);
        let news = Arc::downgrade(service);
        let on_news = Box::new(move || news.upgrade().into_iter().for_each(|service| service.has_news()));
        let post = Post::new(id, site, subnqn.clone(), home, on_news);
        let options = HostOptions {
            subnqn,
            hostnqn: service.hostnqn.clone(),
            hostid: self.hostid_of(&service.hostnqn),
            discovery: true,
            step_timeout: settings.admin_timeout,
            connect_timeout: settings.connect_timeout_on(site.trtype),
            kato_ms: settings.kato_ms,
            ..HostOptions::default()
        };
        let connector = self.connector(site, (false, false))?;
        service.inner().posts.push(Arc::clone(&post));
        let added = reactors[home.0 as usize].call(move |cx| {
            let now = cx.now();
            Part::of(cx).borrow_mut().add_scout(post, connector, options, now);
        });
        Ok(added.await?)
    }

    async fn end_post(&self, post: &Arc<Post>) {
        let id = post.id;
        let ended = self.bdevs.reactors()[post.home.0 as usize]
            .call_deferred(move |cx, reply| Part::of(cx).borrow_mut().end_scout(id, reply));
        let _ = ended.await;
    }

    /// Brings the discovery controllers, and the controllers, in line with the logs. The caller has the service's turn.
    async fn follow_service(self: &Arc<Self>, service: &Arc<Service>) {
        if service.is_stopping() {
            return;
        }
        let reports = |posts: &[Arc<Post>]| -> Vec<(Arc<Post>, Report)> {
            posts.iter().map(|post| (Arc::clone(post), post.report())).collect()
        };
        let posts = service.inner().posts.clone();
        let known = reports(&posts);
        let wanted = reachable(service.site, &known, &service.transports);
        for post in posts.iter().filter(|post| wanted.iter().all(|(site, _)| *site != post.site)) {
            service.inner().posts.retain(|known| known.id != post.id);
            self.end_post(post).await;
        }
        for (site, subnqn) in wanted {
            let is_new = posts.iter().all(|post| post.site != site);
            if is_new && self.add_post(service, site, subnqn).await.is_err() {
                return;
            }
        }
        // Of discovery controllers that have come or gone.
        let posts = service.inner().posts.clone();
        let known = reports(&posts);
        let reads = known.iter().map(|(_, report)| report.reads).sum();
        let wanted = listed(&known, &service.transports);
        let (anew, due) = {
            let mut inner = service.inner();
            (std::mem::replace(&mut inner.reads, reads) != reads, std::mem::take(&mut inner.due))
        };
        let gone: Vec<Entry> =
            service.inner().entries.keys().filter(|entry| !wanted.contains(*entry)).cloned().collect();
        self.detach_entries(service, &gone).await;
        let all = self.attach_entries(service, &wanted, (anew, due)).await;
        let asked = known.iter().all(|(_, report)| report.reads + report.failures > 0);
        let first = known.iter().any(|(post, report)| post.site == service.site && report.reads > 0);
        if asked && first {
            for waiter in service.inner().waiters.drain(..) {
                let _ = waiter.send(());
            }
        }
        if !all {
            self.retry_later(service);
        }
    }

    fn retry_later(&self, service: &Arc<Service>) {
        if std::mem::replace(&mut service.inner().retrying, true) {
            return;
        }
        let slept = self.bdevs.executor().sleep(RETRY_DELAY);
        let service = Arc::downgrade(service);
        self.bdevs.executor().spawn(Box::pin(async move {
            slept.await;
            if let Some(service) = service.upgrade() {
                {
                    let mut inner = service.inner();
                    (inner.retrying, inner.due) = (false, true);
                }
                service.has_news();
            }
        }));
    }

    /// Whether a path leads to `entry`, and whether it is the service's.
    fn path_to(&self, service: &Service, (subnqn, site): &Entry) -> Option<bool> {
        let address = Address { site: *site, subnqn: subnqn.clone(), hostnqn: service.hostnqn.clone() };
        self.groups().iter().find_map(|group| {
            let inner = group.inner();
            let member = inner.members.iter().find(|member| member.path.is_at(&address))?;
            Some(member.owner.as_ref().is_some_and(|owner| std::ptr::eq(owner.as_ptr(), service)))
        })
    }

    /// Attaches what is wanted and is no path: what has failed if a log was read `anew` or it is `due`, what was detached by
    /// a user only after the former. Whether all are paths now.
    async fn attach_entries(
        self: &Arc<Self>,
        service: &Arc<Service>,
        wanted: &BTreeSet<Entry>,
        (anew, due): (bool, bool),
    ) -> bool {
        // Paths of one controller one after the other: the first makes it.
        let mut by_subsystem: BTreeMap<&str, Vec<Entry>> = BTreeMap::new();
        let mut all = true;
        for entry in wanted {
            let state = service.inner().entries.get(entry).copied();
            match self.path_to(service, entry) {
                Some(true) => {}
                // It becomes this service's when it is free.
                Some(false) => all = false,
                None if state == Some(State::LeftAlone) && !anew => {}
                None if state == Some(State::Failed) && !anew && !due => all = false,
                None => by_subsystem.entry(&entry.0).or_default().push(entry.clone()),
            }
        }
        let subsystems: Vec<Vec<Entry>> = by_subsystem.into_values().collect();
        for some in subsystems.chunks(AT_ONCE) {
            let attached = join_all(some.iter().map(|entries| self.attach_subsystem(service, entries))).await;
            all &= attached.into_iter().all(|attached| attached);
        }
        all
    }

    async fn attach_subsystem(self: &Arc<Self>, service: &Arc<Service>, entries: &[Entry]) -> bool {
        let mut all = true;
        for (subnqn, site) in entries.iter().take(MAX_PATHS) {
            if service.is_stopping() {
                return true;
            }
            let name = self.name_for(service, subnqn);
            let request = Attach {
                name: name.clone(),
                address: Address { site: *site, subnqn: subnqn.clone(), hostnqn: service.hostnqn.clone() },
                digests: (false, false),
                multipath: Multipath::Multipath,
                reconnect: service.reconnect,
                step_timeout: None,
                mode: None,
                max_bdevs: MAX_BDEVS,
                owner: Some(Arc::downgrade(service)),
                params: Value::Null,
            };
            let attached = self.attach(request).await;
            let state = match &attached {
                Ok(bdevs) => {
                    tracing::info!(service = service.name, name, subnqn, at = %site, ?bdevs, "a path was discovered");
                    State::Attached
                }
                Err(error) => {
                    tracing::warn!(service = service.name, %error, "what was discovered cannot be attached yet");
                    State::Failed
                }
            };
            all &= attached.is_ok();
            service.inner().entries.insert((subnqn.clone(), *site), state);
        }
        all
    }

    /// The name of a subsystem's controller: the one that it has, or the next that is free.
    fn name_for(&self, service: &Service, subnqn: &str) -> String {
        let taken: BTreeSet<String> = self.state().groups.keys().cloned().collect();
        let mut inner = service.inner();
        if let Some(name) = inner.names.get(subnqn) {
            return name.clone();
        }
        let mut name = String::new();
        // No more are taken than there are controllers.
        for _ in 0..=MAX_CONTROLLERS {
            name = format!("{}{}", service.name, inner.next);
            inner.next += 1;
            if !taken.contains(&name) {
                break;
            }
        }
        inner.names.insert(subnqn.to_owned(), name.clone());
        name
    }

    /// Detaches entries that are paths of the service, and forgets them.
    async fn detach_entries(self: &Arc<Self>, service: &Arc<Service>, gone: &[Entry]) {
        let mut by_name: BTreeMap<String, BTreeSet<Site>> = BTreeMap::new();
        for entry in gone {
            let name = service.inner().names.get(&entry.0).cloned();
            if let Some(name) = name.filter(|_| self.path_to(service, entry) == Some(true)) {
                by_name.entry(name).or_default().insert(entry.1);
            }
        }
        for (name, sockets) in by_name {
            let detached = self.detach_paths(&name, move |address| sockets.contains(&address.site)).await;
            match detached {
                Ok(()) | Err(InitiatorError::NotFound { .. } | InitiatorError::NoSuchPath { .. }) => {}
                Err(error) => tracing::warn!(service = service.name, name, %error, "it goes as soon as it can"),
            }
        }
        let mut inner = service.inner();
        inner.entries.retain(|entry, _| !gone.contains(entry));
        let Inner { names, entries, .. } = &mut *inner;
        names.retain(|subnqn, _| entries.keys().any(|(known, _)| known == subnqn));
    }

    /// Ends all discovery controllers, for the end of the process.
    pub(super) async fn end_discovery(&self) {
        let services = std::mem::take(&mut self.state().services);
        let mut posts = Vec::new();
        for service in services.values() {
            service.stopping.store(true, Ordering::Release);
            let mut inner = service.inner();
            inner.waiters.clear();
            posts.append(&mut inner.posts);
        }
        join_all(posts.iter().map(|post| self.end_post(post))).await;
    }
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Service({}, {})", self.name, self.site)
    }
}
