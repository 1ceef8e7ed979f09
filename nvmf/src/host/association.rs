//! One association with a controller: from the first connection to the first failure (Base 3.5.1, 3.6).
//!
//! ```text
//!  Connecting -> Connect -> ReadCap -> Enable -> AwaitReady -> IdentifyController -> ConfigureEvents
//!     I/O:        -> RequestQueues -> ListNamespaces* -> (IdentifyNamespace -> Descriptors)* -> AnaLog* -> Live
//!     discovery:  -> DiscoveryLog* -> Live
//!
//!  Live -- event: namespaces --> ChangedNamespaces -> ListNamespaces* -> those that changed or are new
//!       -- event: ANA, discovery --> the log, to its end
//!       -- shut_down() --> Shutdown -> AwaitShutdown* -> Over
//! ```
//! Tasks run one at a time, each with one command and one deadline. Beside them go keep-alives, Asynchronous Event
//! Requests and the caller's own admin commands. The first failure of a task ends the association; what a namespace says
//! of itself and cannot be only costs that namespace.

use super::inventory::{Inventory, MAX_NAMESPACES, Namespace};
use super::log_reader::{Kind as Log, LogReader};
use super::transport::{Completion, Link, Payload, Watches};
use super::{Error, Options, commands, fabrics_connect};
use crate::spec::fabrics::{CNTLID_DYNAMIC, Cap, Cc, Csts, Property};
use crate::spec::feature::{AsyncEvent, AsyncEventConfig, NumberOfQueues, fid};
use crate::spec::identify::{IDENTIFY_BYTES, IdentifyController, cmic, cns, cntrltype};
use crate::spec::log::{CHANGED_NAMESPACES_OVERFLOW, lid};
use crate::spec::opcode::admin;
use crate::spec::{Sqe, Status};
use reactor::park::Ready;
use reactor::{Buffers, Instant};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use zerocopy::FromBytes;

/// Entries of the admin queue; the least that Connect may ask for (Base 3.3.3.1).
pub(super) const ADMIN_ENTRIES: u16 = 32;
/// Event requests that are kept outstanding, if the controller takes so many.
const EVENT_REQUESTS: u32 = 4;
/// Commands of the caller that may be outstanding: the rest is for tasks, keep-alives and event requests.
pub(super) const MAX_ADMIN: usize = 16;
/// One piece of a log page at most, bytes.
const LOG_PIECE_BYTES: u32 = 64 * 1024;
/// Bytes of the entries that are read of the error and SMART logs, which acknowledges their events.
const ERROR_ENTRY_BYTES: u32 = 64;
const SMART_BYTES: u32 = 512;

/// Marks commands of the association's own; the caller's numbers are below.
const OWN: u64 = 1 << 63;
const TASK: u64 = OWN;
const KEEP_ALIVE: u64 = OWN | 1;
const EVENT: u64 = OWN | 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    Connecting,
    Connect,
    ReadCap,
    Enable,
    AwaitReady,
    IdentifyController,
    ConfigureEvents,
    RequestQueues,
    ListNamespaces {
        above: u32,
    },
    IdentifyNamespace {
        nsid: u32,
    },
    Descriptors {
        nsid: u32,
    },
    ChangedNamespaces,
    Log(Log),
    /// Reads the first bytes of a log, to acknowledge the event that is about it.
    Acknowledge {
        lid: u8,
        len: u32,
    },
    Shutdown,
    AwaitShutdown,
}

impl Task {
    const fn what(self) -> &'static str {
        match self {
            Task::Connecting => "setting up a connection",
            Task::Connect => "Connect of the admin queue",
            Task::ReadCap => "reading CAP",
            Task::Enable => "enabling",
            Task::AwaitReady => "becoming ready",
            Task::IdentifyController => "Identify Controller",
            Task::ConfigureEvents => "Set Features, Asynchronous Event Configuration",
            Task::RequestQueues => "Set Features, Number of Queues",
            Task::ListNamespaces { .. } => "the list of active namespaces",
            Task::IdentifyNamespace { .. } => "Identify Namespace",
            Task::Descriptors { .. } => "the namespace identification descriptors",
            Task::ChangedNamespaces => "the list of changed namespaces",
            Task::Log(Log::Ana) => "the ANA log",
            Task::Log(Log::Discovery) => "the discovery log",
            Task::Acknowledge { .. } => "a log page",
            Task::Shutdown | Task::AwaitShutdown => "shutting down",
        }
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    SettingUp,
    Live,
    ShuttingDown,
    /// It was shut down.
    Over,
}

/// One association.
pub(super) struct Association {
    link: Link,
    options: Arc<Options>,
    stage: Stage,
    task: Option<Task>,
    plan: VecDeque<Task>,
    deadline: Instant,
    /// The deadline that the next task has, if not its own.
    within: Option<Instant>,
    /// Since when the output does not leave that the next task waits for.
    stuck: Option<Instant>,
    /// Connect has succeeded.
    connected: bool,
    pub cntlid: u16,
    pub cap: Cap,
    pub identity: Option<Box<IdentifyController>>,
    pub in_capsule_bytes: u32,
    pub max_io_bytes: Option<u64>,
    pub io_queues: u16,
    reader: Option<LogReader>,
    listed: BTreeSet<u32>,
    /// Identify these of the listed ones; `None` for all.
    changed: Option<BTreeSet<u32>>,
    to_identify: BTreeSet<u32>,
    /// The namespace between its two tasks.
    half: Option<Namespace>,
    keep_alive_due: Instant,
    keep_alive_sent: bool,
    /// When each of the caller's commands is too old.
    admin: BTreeMap<u64, Instant>,
    pub admin_done: Vec<Completion>,
    done: Vec<Completion>,
}

impl Association {
    pub fn new(link: Link, options: Arc<Options>, now: Instant) -> Association {
        Association {
            link,
            stage: Stage::SettingUp,
            task: Some(Task::Connecting),
            plan: VecDeque::new(),
            deadline: now + options.connect_timeout.unwrap_or(options.step_timeout),
            within: None,
            stuck: None,
            options,
            connected: false,
            cntlid: CNTLID_DYNAMIC,
            cap: Cap(0),
            identity: None,
            in_capsule_bytes: 0,
            max_io_bytes: None,
            io_queues: 0,
            reader: None,
            listed: BTreeSet::new(),
            changed: None,
            to_identify: BTreeSet::new(),
            half: None,
            keep_alive_due: now,
            keep_alive_sent: false,
            admin: BTreeMap::new(),
            admin_done: Vec::new(),
            done: Vec::with_capacity(ADMIN_ENTRIES.into()),
        }
    }

    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Does what there is to do; whether that was anything.
    pub fn poll(&mut self, now: Instant, watches: &mut dyn Watches, known: &mut Inventory) -> Result<bool, Error> {
        let mut done = std::mem::take(&mut self.done);
        let result = self.poll_with(now, watches, known, &mut done);
        done.clear();
        self.done = done;
        result
    }

    fn poll_with(
        &mut self,
        now: Instant,
        watches: &mut dyn Watches,
        known: &mut Inventory,
        done: &mut Vec<Completion>,
    ) -> Result<bool, Error> {
        let mut busy = self.link.poll(watches, done).map_err(Error::Transport)?;
        for completion in done.drain(..) {
            busy = true;
            self.completed(completion, now, known)?;
        }
        if self.task == Some(Task::Connecting) && self.link.is_ready() {
            busy = true;
            self.link.set_in_capsule_bytes(self.options.admin_in_capsule_bytes);
            self.task = None;
            self.next(Task::Connect);
        }
        if self.task.is_none() {
            busy |= self.next_task(now)?;
        }
        if let Some(task) = self.task.filter(|_| now > self.deadline) {
            return Err(Error::Timeout { what: task.what() });
        }
        if self.admin.values().any(|deadline| now > *deadline) {
            return Err(Error::Timeout { what: "an admin command" });
        }
        self.keep_alive(now)?;
        self.link.flush().map_err(Error::Transport)?;
        Ok(busy)
    }

    /// Starts the next task; whether there was one, or the set-up has ended.
    fn next_task(&mut self, now: Instant) -> Result<bool, Error> {
        if self.stage == Stage::Over || !self.is_planned() {
            return Ok(false);
        }
        if !self.link.can_submit() {
            let since = *self.stuck.get_or_insert(now);
            return match now.since(since) > self.options.step_timeout {
                true => Err(Error::Timeout { what: "taking a command" }),
                false => Ok(false),
            };
        }
        let next = self.plan.pop_front();
        let next = next.or_else(|| self.to_identify.pop_first().map(|nsid| Task::IdentifyNamespace { nsid }));
        match next {
            Some(task) => self.start(task, now),
            None if self.stage == Stage::SettingUp => {
                self.stage = Stage::Live;
                self.request_events();
            }
            None => return Ok(false),
        }
        Ok(true)
    }

    /// Whether there is something to begin when the task at hand is done.
    fn is_planned(&self) -> bool {
        !self.plan.is_empty() || !self.to_identify.is_empty() || self.stage == Stage::SettingUp
    }

    fn keep_alive(&mut self, now: Instant) -> Result<(), Error> {
        let off = !self.connected || self.options.kato_ms == 0 || self.stage == Stage::Over;
        if off || now < self.keep_alive_due {
            return Ok(());
        }
        if self.keep_alive_sent || !self.link.can_submit() {
            return Err(Error::Timeout { what: "Keep Alive" });
        }
        self.link.submit(KEEP_ALIVE, commands::plain(admin::KEEP_ALIVE, 0), Payload::None, Buffers::new());
        self.keep_alive_sent = true;
        self.keep_alive_due = now + self.half_kato();
        Ok(())
    }

    fn half_kato(&self) -> Duration {
        Duration::from_millis(u64::from(self.options.kato_ms / 2).max(1))
    }

    /// Sends the command of a task.
    fn start(&mut self, task: Task, now: Instant) {
        self.task = Some(task);
        self.stuck = None;
        self.deadline = self.within.take().unwrap_or(now + self.options.step_timeout);
        let read = |sqe, len: u32| (sqe, Payload::ToHost(len), Buffers::heap(len as usize));
        let identify = |cns, nsid| read(commands::identify(cns, nsid), IDENTIFY_BYTES as u32);
        let bare = |sqe| (sqe, Payload::None, Buffers::new());
        let enabled = Cc(0).with_en(1).with_iosqes(6).with_iocqes(4);
        let (sqe, payload, data): (Sqe, Payload, Buffers) = match task {
            Task::Connecting => unreachable!("a connection is waited for"),
            Task::Connect => {
                let Options { subnqn, hostnqn, hostid, kato_ms, .. } = &*self.options;
                let data = fabrics_connect::data(subnqn, hostnqn, *hostid, CNTLID_DYNAMIC);
                (commands::connect(0, ADMIN_ENTRIES, *kato_ms), Payload::ToController(data.len() as u32), data)
            }
            Task::ReadCap => bare(commands::property_get(Property::Cap)),
            Task::Enable => bare(commands::property_set(Property::Cc, enabled.0)),
            Task::Shutdown => bare(commands::property_set(Property::Cc, enabled.with_shn(1).0)),
            Task::AwaitReady | Task::AwaitShutdown => bare(commands::property_get(Property::Csts)),
            Task::IdentifyController => identify(cns::CONTROLLER, 0),
            Task::ConfigureEvents => bare(commands::set_features(fid::ASYNC_EVENT_CONFIG, self.wanted_events().0)),
            Task::RequestQueues => {
                let count = u32::from(self.options.io_queues);
                let queues = NumberOfQueues { submission: count, completion: count };
                bare(commands::set_features(fid::NUMBER_OF_QUEUES, queues.dw0()))
            }
            Task::ListNamespaces { above } => identify(cns::ACTIVE_NAMESPACES, above),
            Task::IdentifyNamespace { nsid } => identify(cns::NAMESPACE, nsid),
            Task::Descriptors { nsid } => identify(cns::NAMESPACE_DESCRIPTORS, nsid),
            Task::ChangedNamespaces => {
                read(commands::get_log_page(lid::CHANGED_NAMESPACES, 0, 0, 4096, false), IDENTIFY_BYTES as u32)
            }
            Task::Log(log) => {
                let piece = self.max_io_bytes.map_or(LOG_PIECE_BYTES, |max| max.min(LOG_PIECE_BYTES.into()) as u32);
                let groups = self.identity.as_ref().map_or(0, |identity| identity.nanagrpid.get());
                let get = self.reader.get_or_insert_with(|| LogReader::new(log, piece, groups)).next();
                read(commands::get_log_page(get.lid, get.lsp, get.offset, get.len, get.retain), get.len)
            }
            Task::Acknowledge { lid, len } => read(commands::get_log_page(lid, 0, 0, len, false), len),
        };
        self.link.submit(TASK, sqe, payload, data);
    }

    /// The task to come next.
    fn next(&mut self, task: Task) {
        self.plan.push_front(task);
    }

    /// A task that is not finished is started again, within the same time.
    fn again(&mut self, task: Task) {
        self.within = Some(self.deadline);
        self.plan.push_front(task);
    }

    fn completed(&mut self, completion: Completion, now: Instant, known: &mut Inventory) -> Result<(), Error> {
        match completion.user {
            TASK => self.task_done(completion, now, known),
            KEEP_ALIVE => {
                self.keep_alive_sent = false;
                let status = completion.cqe.status();
                if status.is_success() { Ok(()) } else { Err(Error::Refused { what: "Keep Alive", status, hint: "" }) }
            }
            EVENT => {
                self.on_event(&completion);
                Ok(())
            }
            user => {
                self.admin.remove(&user);
                self.admin_done.push(completion);
                Ok(())
            }
        }
    }

    fn task_done(&mut self, completion: Completion, now: Instant, known: &mut Inventory) -> Result<(), Error> {
        let task = self.task.take().expect("a task has one command");
        let status = completion.cqe.status();
        let short = (completion.transferred_bytes as usize) < completion.data.len();
        if status.is_success() && short {
            return Err(Error::Nonsense("less data than was asked for"));
        }
        if !status.is_success() && task != Task::Connect {
            return self.task_failed(task, status, known);
        }
        let (result, data) = (completion.cqe.result(), &completion.data);
        match task {
            Task::Connecting => {}
            Task::Connect => {
                self.cntlid = fabrics_connect::check(task.what(), &completion.cqe)?;
                self.connected = true;
                self.keep_alive_due = now + self.half_kato();
                self.next(Task::ReadCap);
            }
            Task::ReadCap => {
                self.cap = Cap(result);
                self.next(Task::Enable);
            }
            Task::Enable => {
                self.next(Task::AwaitReady);
                self.within = Some(now + self.options.step_timeout.max(Duration::from_millis(500 * self.cap.to())));
            }
            Task::AwaitReady => match Csts(result as u32) {
                csts if csts.cfs() != 0 => return Err(Error::Nonsense("fatal status while it is enabled")),
                csts if csts.rdy() != 0 => self.next(Task::IdentifyController),
                _ => self.again(task),
            },
            Task::IdentifyController => self.on_identity(&data.to_vec())?,
            Task::ConfigureEvents | Task::Acknowledge { .. } => {}
            Task::RequestQueues => {
                let granted = NumberOfQueues::from_cdw11(result as u32).ok_or(Error::Nonsense("number of queues"))?;
                let granted = granted.submission.min(granted.completion);
                self.io_queues = self.options.io_queues.min(u16::try_from(granted).unwrap_or(u16::MAX));
            }
            Task::ListNamespaces { above } => self.on_list(above, &data.to_vec(), known)?,
            Task::IdentifyNamespace { nsid } => self.on_namespace(nsid, &data.to_vec(), known),
            Task::Descriptors { nsid } => self.on_descriptors(nsid, &data.to_vec(), known),
            Task::ChangedNamespaces => self.on_changed(&data.to_vec()),
            Task::Log(log) => self.on_log(log, &data.to_vec(), known)?,
            Task::Shutdown => self.next(Task::AwaitShutdown),
            Task::AwaitShutdown if Csts(result as u32).shst() == 2 => self.stage = Stage::Over,
            Task::AwaitShutdown => self.again(task),
        }
        Ok(())
    }

    /// Most failures end the association; these do not.
    fn task_failed(&mut self, task: Task, status: Status, known: &mut Inventory) -> Result<(), Error> {
        match task {
            // It went away between the list and the question.
            Task::IdentifyNamespace { nsid } if status.same_code(Status::INVALID_NAMESPACE_OR_FORMAT) => {
                known.remove(nsid);
            }
            Task::IdentifyNamespace { nsid } => {
                tracing::warn!(nsid, %status, "a namespace cannot be identified: it stays as it was known");
            }
            // Older controllers have no such list: what Identify Namespace says has to do.
            Task::Descriptors { .. } => known_without_descriptors(self.half.take(), known),
            // Without the list of those that changed, all may have.
            Task::ChangedNamespaces => self.changed = None,
            Task::ConfigureEvents | Task::Acknowledge { .. } => {
                tracing::debug!(what = task.what(), %status, "the controller does not take it");
            }
            _ => return Err(Error::Refused { what: task.what(), status, hint: "" }),
        }
        Ok(())
    }

    fn on_identity(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let whole = IdentifyController::read_from_prefix(bytes).map_err(|_| Error::Nonsense("Identify Controller"))?;
        let identity = Box::new(whole.0);
        let is_discovery = identity.cntrltype == cntrltype::DISCOVERY;
        if identity.cntrltype != 0 && is_discovery != self.options.discovery {
            return Err(Error::Nonsense(
                "a discovery controller where one for I/O was asked for, or the other way round",
            ));
        }
        // ICDOFF is 0 on TCP (TCP 3.3.2.1.2); data elsewhere is left to R2T.
        let capsule_bytes = identity.ioccsz.get().saturating_mul(16);
        self.in_capsule_bytes = match identity.icdoff.get() {
            0 => capsule_bytes.saturating_sub(size_of::<Sqe>() as u32),
            _ => 0,
        };
        self.link.set_descriptors(identity.msdbd);
        let page_bytes = 1u64 << (12 + self.cap.mpsmin());
        self.max_io_bytes = match identity.mdts {
            0 => None,
            // 2^64 bytes and more are no limit either.
            mdts => page_bytes.checked_shl(mdts.into()).filter(|bytes| bytes >> mdts == page_bytes),
        };
        let ana = identity.cmic & cmic::ANA != 0;
        self.identity = Some(identity);
        if self.wanted_events().0 != 0 {
            self.plan.push_back(Task::ConfigureEvents);
        }
        if self.options.discovery {
            self.plan.push_back(Task::Log(Log::Discovery));
            return Ok(());
        }
        self.plan.extend([Task::RequestQueues, Task::ListNamespaces { above: 0 }]);
        if ana {
            self.plan.push_back(Task::Log(Log::Ana));
        }
        Ok(())
    }

    /// The notices that the host wants and the controller has (OAES).
    fn wanted_events(&self) -> AsyncEventConfig {
        let oaes = self.identity.as_ref().map_or(0, |identity| identity.oaes.get());
        let wanted = AsyncEventConfig(0).with_ns_attribute(1).with_ana_change(1).with_discovery_change(1);
        AsyncEventConfig(oaes & wanted.0)
    }

    /// One page of the list of active namespaces, which goes on behind `above` until a page is not full.
    fn on_list(&mut self, above: u32, bytes: &[u8], known: &mut Inventory) -> Result<(), Error> {
        if above == 0 {
            self.listed.clear();
        }
        let mut last = above;
        let nsids = bytes.chunks_exact(4).map(|nsid| u32::from_le_bytes([nsid[0], nsid[1], nsid[2], nsid[3]]));
        let page = nsids.take_while(|nsid| *nsid != 0);
        let mut count = 0;
        for nsid in page {
            if nsid <= last {
                return Err(Error::Nonsense("a list of namespaces that does not rise"));
            }
            if self.listed.len() == MAX_NAMESPACES {
                return Err(Error::Nonsense("more than 8192 namespaces"));
            }
            self.listed.insert(nsid);
            last = nsid;
            count += 1;
        }
        // FFFFFFFEh cannot be asked for what is behind it.
        if count == bytes.len() / 4 && last < u32::MAX - 1 {
            self.plan.push_front(Task::ListNamespaces { above: last });
            return Ok(());
        }
        known.retain(&self.listed);
        let listed = std::mem::take(&mut self.listed);
        self.to_identify = match self.changed.take() {
            None => listed,
            Some(changed) => {
                let new = |nsid: &u32| changed.contains(nsid) || !known.namespaces().contains_key(nsid);
                listed.into_iter().filter(new).chain(std::mem::take(&mut self.to_identify)).collect()
            }
        };
        Ok(())
    }

    fn on_namespace(&mut self, nsid: u32, bytes: &[u8], known: &mut Inventory) {
        match Namespace::parse(nsid, bytes) {
            Ok(Some(namespace)) => {
                self.half = Some(namespace);
                self.plan.push_front(Task::Descriptors { nsid });
            }
            Ok(None) => known.remove(nsid),
            Err(error) => {
                tracing::warn!(nsid, %error, "a namespace cannot be used");
                known.remove(nsid);
            }
        }
    }

    fn on_descriptors(&mut self, nsid: u32, bytes: &[u8], known: &mut Inventory) {
        let Some(mut namespace) = self.half.take() else { return };
        match namespace.add_descriptors(bytes) {
            Ok(()) => known.put(namespace),
            Err(error) => {
                tracing::warn!(nsid, %error, "a namespace cannot be used");
                known.remove(nsid);
            }
        }
    }

    /// The list of changed namespaces; what is not in it and is known stays.
    fn on_changed(&mut self, bytes: &[u8]) {
        let nsids = bytes.chunks_exact(4).map(|nsid| u32::from_le_bytes([nsid[0], nsid[1], nsid[2], nsid[3]]));
        let nsids: BTreeSet<u32> = nsids.take_while(|nsid| *nsid != 0).collect();
        self.changed = (!nsids.contains(&CHANGED_NAMESPACES_OVERFLOW)).then_some(nsids);
    }

    fn on_log(&mut self, log: Log, bytes: &[u8], known: &mut Inventory) -> Result<(), Error> {
        let reader = self.reader.as_mut().expect("the log is being read");
        if !reader.take(bytes)? {
            // Each piece has its own time: logs may be long.
            self.next(Task::Log(log));
            return Ok(());
        }
        let (generation, records) = self.reader.take().expect("the log is being read").finish();
        match log {
            Log::Ana => known.set_ana(&records),
            Log::Discovery => {
                known.set_discovery(generation, &records);
                Ok(())
            }
        }
    }

    /// Keeps event requests outstanding, as many as the controller takes (AERL).
    fn request_events(&mut self) {
        let limit = self.identity.as_ref().map_or(1, |identity| u32::from(identity.aerl) + 1);
        for _ in 0..limit.min(EVENT_REQUESTS) {
            self.request_event();
        }
    }

    fn request_event(&mut self) {
        if self.link.can_submit() {
            let sqe = commands::plain(admin::ASYNC_EVENT_REQUEST, 0);
            self.link.submit(EVENT, sqe, Payload::None, Buffers::new());
        }
    }

    fn on_event(&mut self, completion: &Completion) {
        let status = completion.cqe.status();
        if !status.is_success() {
            // One too many, or the controller ends: it is not asked again.
            tracing::debug!(%status, "an event request ended");
            return;
        }
        if self.stage == Stage::Live {
            self.request_event();
        }
        let event = AsyncEvent::from_dw0(completion.cqe.dw0.get());
        // Each log at most once in the plan: one that comes again while it waits is covered by the read to come.
        match event {
            AsyncEvent::NAMESPACE_CHANGED if !self.options.discovery => {
                self.plan_once(&[Task::ChangedNamespaces, Task::ListNamespaces { above: 0 }]);
            }
            AsyncEvent::ANA_CHANGED if !self.options.discovery => self.plan_once(&[Task::Log(Log::Ana)]),
            AsyncEvent::DISCOVERY_CHANGED if self.options.discovery => self.plan_once(&[Task::Log(Log::Discovery)]),
            AsyncEvent { kind: AsyncEvent::TYPE_ERROR, .. } => {
                tracing::warn!(info = event.info, "the controller reports an error");
                self.plan_once(&[Task::Acknowledge { lid: lid::ERROR_INFORMATION, len: ERROR_ENTRY_BYTES }]);
            }
            AsyncEvent { kind: AsyncEvent::TYPE_SMART, .. } => {
                tracing::warn!(info = event.info, "the controller reports its health");
                self.plan_once(&[Task::Acknowledge { lid: lid::SMART, len: SMART_BYTES }]);
            }
            _ => tracing::debug!(?event, "an event that means nothing to this host"),
        }
    }

    fn plan_once(&mut self, tasks: &[Task]) {
        if !self.plan.contains(&tasks[0]) {
            self.plan.extend(tasks);
        }
    }

    /// Takes an admin command of the caller, if there is room. `user` is below 2^63 and not outstanding.
    pub fn submit_admin(&mut self, user: u64, sqe: Sqe, payload: Payload, data: Buffers, now: Instant) -> bool {
        assert!(user < OWN && !self.admin.contains_key(&user), "admin commands have numbers of their own");
        let open = self.stage == Stage::Live && self.admin.len() < MAX_ADMIN && self.link.can_submit();
        if open {
            self.admin.insert(user, now + self.options.step_timeout);
            self.link.submit(user, sqe, payload, data);
        }
        open
    }

    /// Tells the controller that the host is leaving (CC.SHN, Base 3.6.1), after the task at hand.
    pub fn shut_down(&mut self) {
        if self.stage != Stage::ShuttingDown && self.stage != Stage::Over {
            self.stage = Stage::ShuttingDown;
            self.plan.clear();
            self.to_identify.clear();
            self.plan.push_back(Task::Shutdown);
        }
    }

    pub fn ready(&mut self, ready: Ready) {
        self.link.ready(ready);
    }

    pub fn has_work(&self) -> bool {
        let idle = self.task.is_none() && self.stage != Stage::Over;
        let connected = self.task == Some(Task::Connecting) && self.link.is_ready();
        self.link.has_work() || idle && self.is_planned() && self.link.can_submit() || connected
    }

    pub fn deadline(&self) -> Option<Instant> {
        let task = self.task.map(|_| self.deadline);
        let admin = self.admin.values().min().copied();
        // Deadlines are passed a nanosecond later.
        let stuck = self.stuck.map(|since| since + self.options.step_timeout);
        let passed = task.into_iter().chain(admin).chain(stuck).min().map(|at| at + Duration::from_nanos(1));
        let keep_alive = self.connected && self.options.kato_ms > 0 && self.stage != Stage::Over;
        passed.into_iter().chain(keep_alive.then_some(self.keep_alive_due)).min()
    }

    /// Ends it: the caller's commands that have not completed, whose fate is unknown, are given back.
    pub fn close(&mut self, watches: &mut dyn Watches, lost: &mut dyn FnMut(u64, Buffers)) {
        self.link.close(watches, &mut |user, data| {
            if user < OWN {
                lost(user, data);
            }
        });
        self.admin.clear();
    }
}

fn known_without_descriptors(half: Option<Namespace>, known: &mut Inventory) {
    if let Some(namespace) = half {
        known.put(namespace);
    }
}
