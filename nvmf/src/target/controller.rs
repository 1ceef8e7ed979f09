//! The brain of one controller: properties, admin commands, asynchronous events, keep alive.
//!
//! A state machine without sockets, threads or clock: what happened comes in with the time that it happened at, what is
//! to be done comes back. It lives on the reactor of the admin queue, whose owner (the poll group) moves the data.
//!
//! # What the owner does
//! - After each call: [`Controller::pop_event`] until it is `None`; each is a completion of a command that was
//!   [`Admin::Parked`].
//! - [`Effect::Disabled`] and [`Effect::ShutDown`]: close the controller's I/O queues on all reactors, then call
//!   [`Controller::queues_deleted`]; CSTS shows the end of it only then.
//! - [`Admin::Abort`]: look for the command on the I/O queue, then complete with [`Controller::abort_done`].
//! - At [`Controller::keep_alive_deadline`], or at any time: [`Controller::check_keep_alive`]; `false` ends the
//!   association.
//! - When the view changes: [`Controller::target_changed`]; with no subsystem left the association ends.
//!
//! # States (Base 3.1.4.5, 3.1.4.6, 3.6)
//! ```text
//!            CC.EN=1              CC.EN=0 or CC.SHN           queues_deleted
//!  disabled ---------> enabled -----------------> deleting -------------------> disabled, or shut down
//!  RDY=0               RDY=1                      RDY=1, SHST=0 or 1            RDY=0, or SHST=2
//! ```
//! Only an enabled controller has a keep alive timer; in the other states the association ends by itself after
//! [`ASSOCIATION_TIMEOUT`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use reactor::{Buffers, Instant};

use super::admin::{Fault, Features, Step};
use super::discovery;
use super::shared::ControllerShared;
use super::view::{AnaState, ListenAddress, NamespaceView, SubsystemView, TargetView, TransportOptions};
use crate::spec::fabrics::{Cap, Cc, Crto, Csts, Property, Vs};
use crate::spec::feature::AsyncEvent;
use crate::spec::opcode::FABRICS;
use crate::spec::{AdminCommand, Cqe, FabricsCommand, Sqe, Status};

mod error_log;
mod events;
#[cfg(test)]
pub(super) mod fixture;
#[cfg(test)]
mod tests;

pub use error_log::{ERROR_LOG_ENTRIES, ErrorLog};
pub use events::MAX_EVENT_REQUESTS;
pub(super) use events::{Event, Events};

/// How long a controller may be without being enabled before the association ends.
pub const ASSOCIATION_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a discovery controller without keep alive timeout waits for a command (Base 3.1.3.3.1).
pub const DISCOVERY_ACTIVITY_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a host is kept out whose earlier association is over and has left commands that write and do not end (CQT).
/// Others are let in sooner; nobody is kept out for ever by a device that hangs.
pub const COMMAND_QUIESCE_TIME: Duration = Duration::from_secs(5);
/// Abort commands that may be under way at once (ACL, a count).
pub const MAX_ABORTS: u8 = 4;
/// CAP.TO and CRTO.CRWMT: 10 s, in units of 500 ms. Becoming ready takes none; this is for closing the I/O queues of a
/// controller that is disabled under load.
const READY_TIMEOUT: u8 = 20;
/// Namespaces that the Changed Attached Namespace List can name.
pub(super) const MAX_CHANGED_NAMESPACES: usize = 1024;

/// What a controller is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Namespaces of a subsystem.
    Io,
    /// The discovery service.
    Discovery,
}

/// What a controller is made of.
#[derive(Clone, Debug)]
pub struct ControllerConfig {
    /// What for.
    pub kind: Kind,
    /// What its I/O queues see of it.
    pub shared: Arc<ControllerShared>,
    /// Its subsystem; `None` for discovery.
    pub subsystem: Option<Arc<SubsystemView>>,
    /// The whole target.
    pub target: Arc<TargetView>,
    /// The transport's options.
    pub transport: TransportOptions,
    /// The listener that the host came in through.
    pub listener: ListenAddress,
    /// The address of this side of the admin queue's connection: what a listener on a wildcard address is reached at.
    pub local_addr: SocketAddr,
    /// Keep alive timeout of the Connect command, in milliseconds; 0 for none.
    pub kato_ms: u32,
    /// Entries of the admin queue.
    pub admin_queue_entries: u32,
}

/// What admin commands need besides.
#[derive(Clone, Copy, Debug)]
pub struct AdminEnv {
    /// When the target started: power on.
    pub started: Instant,
}

/// What the owner must do after a property was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// I/O queues may be connected now.
    Enabled,
    /// CC.EN went from 1 to 0: delete the I/O queues, then call [`Controller::queues_deleted`].
    Disabled,
    /// CC.SHN asked for a shutdown: delete the I/O queues, then call [`Controller::queues_deleted`].
    ShutDown,
}

/// The end of a Property Get or Set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FabricsOutcome {
    /// The value read (0 for a set), or the status to complete with.
    pub result: Result<u64, Status>,
    /// What to do besides completing.
    pub effect: Effect,
}

impl FabricsOutcome {
    /// The completion.
    pub fn cqe(&self, cid: u16) -> Cqe {
        match self.result {
            Ok(value) => Cqe::success(cid).with_result(value),
            Err(status) => Cqe::new(cid, status),
        }
    }
}

/// What became of an admin command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admin {
    /// It is done.
    Complete {
        /// The completion.
        cqe: Cqe,
        /// The data, cut to what the command asked for, goes to the host.
        send: bool,
    },
    /// An Asynchronous Event Request: kept, with its slot, until [`Controller::pop_event`] gives it back.
    Parked,
    /// A command of an I/O queue is to be aborted; complete with [`Controller::abort_done`].
    Abort {
        /// The Abort command itself.
        cid_of_abort: u16,
        /// Queue of the command to abort, not 0.
        sqid: u16,
        /// The command to abort.
        cid: u16,
    },
}

/// One error for the Error Information log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorRecord {
    /// Queue of the command.
    pub sqid: u16,
    /// The command.
    pub cid: u16,
    /// Its status.
    pub status: Status,
    /// Its opcode.
    pub opcode: u8,
    /// Its namespace; 0 if none.
    pub nsid: u32,
    /// First logical block with the error; 0 if none.
    pub lba: u64,
    /// Byte and bit of the submission queue entry that was wrong, as PEL; [`ErrorRecord::NO_LOCATION`] if none.
    pub pel: u16,
}

impl ErrorRecord {
    /// No byte of the command in particular is to blame.
    pub const NO_LOCATION: u16 = 0xffff;
}

/// The brain of one controller.
#[derive(Debug)]
pub struct Controller {
    pub(super) config: ControllerConfig,
    /// CC as the host set it.
    cc: Cc,
    /// CSTS.RDY.
    ready: bool,
    /// CSTS.CFS.
    failed: bool,
    /// CSTS.SHST.
    shutdown_status: u32,
    /// The I/O queues are being deleted.
    deleting: bool,
    pub(super) features: Features,
    pub(super) events: Events,
    pub(super) changed_namespaces: ChangedNamespaces,
    pub(super) ana_changes: AnaChanges,
    aborts: u8,
    /// Keep alive timeout in force, in milliseconds; 0 for none.
    pub(super) kato_ms: u32,
    deadline: Option<Instant>,
    /// Commands came to the admin queue since the timer was last looked at.
    traffic: bool,
}

/// The Changed Attached Namespace List: bounded, because a host may never read it.
#[derive(Debug, Default)]
pub(super) struct ChangedNamespaces {
    pub(super) nsids: BTreeSet<u32>,
    pub(super) overflowed: bool,
}

impl ChangedNamespaces {
    fn add(&mut self, nsid: u32) {
        if self.nsids.len() < MAX_CHANGED_NAMESPACES {
            self.nsids.insert(nsid);
        } else if !self.nsids.contains(&nsid) {
            self.overflowed = true;
        }
    }

    pub(super) fn clear(&mut self) {
        *self = ChangedNamespaces::default();
    }
}

/// How often the ANA log has changed since the controller was made, from 1 (0 means "not reported").
#[derive(Debug)]
pub(super) struct AnaChanges {
    pub(super) log: u64,
    groups: BTreeMap<u32, u64>,
}

impl AnaChanges {
    pub(super) fn of_group(&self, group: u32) -> u64 {
        self.groups.get(&group).copied().unwrap_or(1)
    }

    fn changed(&mut self, group: u32) {
        *self.groups.entry(group).or_insert(1) += 1;
    }
}

impl Controller {
    /// After a successful Connect of the admin queue.
    pub fn new(config: ControllerConfig, now: Instant) -> Controller {
        let kato_ms = round_kato(config.kato_ms, &config.transport);
        let features = Features::new(kato_ms, config.shared.max_io_queues.load(Ordering::Relaxed));
        let mut controller = Controller {
            config,
            cc: Cc::default(),
            ready: false,
            failed: false,
            shutdown_status: 0,
            deleting: false,
            features,
            events: Events::default(),
            changed_namespaces: ChangedNamespaces::default(),
            ana_changes: AnaChanges { log: 1, groups: BTreeMap::new() },
            aborts: 0,
            kato_ms,
            deadline: None,
            traffic: false,
        };
        controller.restart_timer(now);
        controller
    }

    /// What its I/O queues see of it.
    pub fn shared(&self) -> &Arc<ControllerShared> {
        &self.config.shared
    }

    /// The controller's subsystem; `None` for discovery, and when it was deleted.
    pub fn subsystem(&self) -> Option<&Arc<SubsystemView>> {
        self.config.subsystem.as_ref()
    }

    /// CC.EN = 1, CSTS.RDY = 1, and no shutdown was asked for.
    pub fn is_enabled(&self) -> bool {
        self.ready && !self.deleting && self.shutdown_status == 0
    }

    /// Whether the host obeys the retry delay (CRD) in a status (feature 16h, ACRE).
    pub fn host_obeys_retry_delay(&self) -> bool {
        self.features.host_behavior.acre == 1
    }

    // ---- properties -----------------------------------------------------------------------------------------------

    /// Executes a Fabrics command of the connected admin queue: Property Get or Property Set.
    pub fn fabrics(&mut self, cmd: &FabricsCommand, now: Instant) -> FabricsOutcome {
        self.traffic = true;
        let only = |result| FabricsOutcome { result, effect: Effect::None };
        match *cmd {
            FabricsCommand::PropertyGet { property, size_bytes, .. } => only(self.get_property(property, size_bytes)),
            FabricsCommand::PropertySet { property: Some(Property::Cc), size_bytes: 4, value, .. } => {
                match self.set_cc(Cc(value as u32), now) {
                    Ok(effect) => FabricsOutcome { result: Ok(0), effect },
                    Err(status) => only(Err(status)),
                }
            }
            // All others that exist are read only; NSSR and NSSD are not supported (CAP.NSSRS, CAP.NSSS).
            FabricsCommand::PropertySet { .. } => only(Err(Status::INVALID_FIELD.dnr())),
            // A queue is connected once (Base 6.3).
            FabricsCommand::Connect(_) => only(Err(Status::COMMAND_SEQUENCE_ERROR.dnr())),
            // Only I/O queues can be deleted by it (Base 6.4).
            FabricsCommand::Disconnect => only(Err(Status::INVALID_QUEUE_TYPE.dnr())),
            FabricsCommand::AuthenticationSend(_) | FabricsCommand::AuthenticationReceive(_) => {
                only(Err(Status::INVALID_OPCODE.dnr()))
            }
        }
    }

    fn get_property(&self, property: Option<Property>, size_bytes: u8) -> Result<u64, Status> {
        let property = property.filter(|known| known.size_bytes() == size_bytes).ok_or(Status::INVALID_FIELD.dnr())?;
        Ok(match property {
            Property::Cap => self.cap().0,
            Property::Vs => Vs::V2_1.0.into(),
            Property::Cc => self.cc.0.into(),
            Property::Csts => self.csts().0.into(),
            // What is not supported reads as 0.
            Property::Nssr | Property::Nssd => 0,
            Property::Crto => Crto::default().with_crwmt(READY_TIMEOUT.into()).0.into(),
        })
    }

    fn cap(&self) -> Cap {
        let depth = match self.config.kind {
            Kind::Io => self.config.transport.max_queue_depth,
            Kind::Discovery => self.config.transport.max_aq_depth,
        };
        Cap::default()
            .with_mqes(u64::from(depth.clamp(2, 65536)) - 1)
            .with_cqr(1)
            .with_to(READY_TIMEOUT.into())
            // The NVM command set, and command sets selectable with CC.CSS = 6 (CNS 1Ch).
            .with_css(1 << 0 | 1 << 6)
            // Ready with media.
            .with_crms(1)
    }

    fn csts(&self) -> Csts {
        Csts::default().with_rdy(self.ready.into()).with_cfs(self.failed.into()).with_shst(self.shutdown_status)
    }

    fn set_cc(&mut self, new: Cc, now: Instant) -> Result<Effect, Status> {
        match (self.cc.en() == 1, new.en() == 1) {
            (false, true) if self.deleting => Err(Status::COMMAND_SEQUENCE_ERROR.dnr()),
            (false, true) => Ok(self.enable(new, now)),
            (true, false) => Ok(self.disable(new, now)),
            (enabled, _) => {
                let shutdown = new.shn() != 0 && self.cc.shn() == 0;
                // An enabled controller's other fields must not change (Base 3.1.4.5): they do not.
                self.cc = if enabled { self.cc.with_shn(new.shn()) } else { new };
                Ok(if shutdown { self.shut_down(now) } else { Effect::None })
            }
        }
    }

    fn enable(&mut self, new: Cc, now: Instant) -> Effect {
        self.cc = new;
        // The entry sizes are reserved for discovery controllers, which have no I/O queues.
        let entries = self.config.kind == Kind::Discovery || (new.iosqes() == 6 && new.iocqes() == 4);
        let command_sets = matches!(new.css(), 0 | 6);
        if !entries || !command_sets || new.mps() != 0 || new.ams() != 0 || new.crime() != 0 {
            // A property set cannot be refused for its bits; the controller shows that it cannot start.
            self.failed = true;
            return Effect::None;
        }
        self.ready = true;
        self.shutdown_status = 0;
        self.traffic = false;
        self.config.shared.traffic.store(false, Ordering::Relaxed);
        self.config.shared.ready.store(true, Ordering::Release);
        self.restart_timer(now);
        Effect::Enabled
    }

    /// Controller Level Reset (Base 3.7.2): features go back to their defaults, outstanding event requests end.
    fn disable(&mut self, new: Cc, now: Instant) -> Effect {
        self.cc = new.with_shn(0);
        self.failed = false;
        self.shutdown_status = 0;
        self.events.reset();
        self.changed_namespaces.clear();
        self.features.reset();
        self.config.shared.max_io_queues.store(self.features.default_io_queues, Ordering::Relaxed);
        self.begin_deleting(now);
        Effect::Disabled
    }

    fn shut_down(&mut self, now: Instant) -> Effect {
        self.shutdown_status = 1;
        self.begin_deleting(now);
        Effect::ShutDown
    }

    fn begin_deleting(&mut self, now: Instant) {
        // From here on no queue can join, so that "there are none" stays true.
        self.config.shared.ready.store(false, Ordering::Release);
        self.deleting = true;
        self.restart_timer(now);
        if self.config.shared.io_queues().is_empty() {
            self.queues_deleted(now);
        }
    }

    /// The I/O queues of a disabled or shut down controller are gone. Does nothing when none were being deleted.
    pub fn queues_deleted(&mut self, now: Instant) {
        if !self.deleting {
            return;
        }
        self.deleting = false;
        if self.cc.en() == 0 {
            self.ready = false;
        }
        if self.shutdown_status == 1 {
            self.shutdown_status = 2;
        }
        self.restart_timer(now);
    }

    // ---- admin commands -------------------------------------------------------------------------------------------

    /// Executes an admin command that came in `slot`. `data` is as long as the command's SGL says: data from the host, or
    /// memory for data to it.
    pub fn execute(&mut self, slot: u16, sqe: &Sqe, data: &mut Buffers, env: &AdminEnv, now: Instant) -> Admin {
        self.traffic = true;
        let cid = sqe.cid.get();
        match self.step(slot, sqe, data, env, now) {
            Ok(Step::Done { dw0, send }) => Admin::Complete { cqe: Cqe::success(cid).with_dw0(dw0), send },
            Ok(Step::Parked) => Admin::Parked,
            Ok(Step::Abort { sqid, cid: victim }) => Admin::Abort { cid_of_abort: cid, sqid, cid: victim },
            Err(fault) => {
                self.record_error(ErrorRecord {
                    sqid: 0,
                    cid,
                    status: fault.status,
                    opcode: sqe.opcode,
                    nsid: sqe.nsid.get(),
                    lba: 0,
                    pel: fault.location,
                });
                Admin::Complete { cqe: Cqe::new(cid, fault.status.more()), send: false }
            }
        }
    }

    fn step(&mut self, slot: u16, sqe: &Sqe, data: &mut Buffers, env: &AdminEnv, now: Instant) -> Result<Step, Fault> {
        assert_ne!(sqe.opcode, FABRICS, "Fabrics commands go to Controller::fabrics");
        if !self.ready || self.cc.en() == 0 {
            return Err(Status::COMMAND_SEQUENCE_ERROR.dnr().into());
        }
        let command = AdminCommand::parse(sqe)?;
        match command {
            AdminCommand::Identify(identify) => self.identify(&identify, data),
            AdminCommand::GetLogPage(get) => self.get_log_page(&get, data, env, now),
            AdminCommand::GetFeatures(get) => self.get_features(&get, data),
            AdminCommand::SetFeatures(set) => self.set_features(&set, data, now),
            AdminCommand::AsyncEventRequest => match self.events.park(slot, sqe.cid.get()) {
                true => Ok(Step::Parked),
                false => Err(Status::AER_LIMIT_EXCEEDED.dnr().into()),
            },
            AdminCommand::KeepAlive => {
                self.keep_alive(now);
                Ok(Step::DONE)
            }
            AdminCommand::Abort(_) if self.config.kind == Kind::Discovery => Err(Status::INVALID_OPCODE.dnr().into()),
            AdminCommand::Abort(abort) => self.abort(abort.sqid, abort.cid),
        }
    }

    /// Base 5.1.1. Dword 0 bit 0 of the completion is set when the command was not aborted.
    fn abort(&mut self, sqid: u16, cid: u16) -> Result<Step, Fault> {
        if sqid != 0 {
            if self.aborts == MAX_ABORTS {
                return Err(Status::ABORT_LIMIT_EXCEEDED.into());
            }
            self.aborts += 1;
            return Ok(Step::Abort { sqid, cid });
        }
        // Of the admin queue only event requests outlast their execution.
        let aborted = self.events.abort(cid);
        Ok(Step::Done { dw0: u32::from(!aborted), send: false })
    }

    /// The search for a command to abort has ended: the completion of the Abort command.
    pub fn abort_done(&mut self, cid_of_abort: u16, aborted: bool) -> Cqe {
        assert!(self.aborts > 0, "an Abort ends that never began");
        self.aborts -= 1;
        Cqe::success(cid_of_abort).with_dw0(u32::from(!aborted))
    }

    /// Adds to the Error Information log. The controller's other queues do so through its shared part.
    pub fn record_error(&mut self, entry: ErrorRecord) {
        self.config.shared.record_error(entry);
        self.tell_errors();
    }

    fn tell_errors(&mut self) {
        let news = self.config.shared.errors().take_news();
        if news.internal && self.is_enabled() {
            self.events.raise(Event::TransientError);
        }
        if news.medium && self.is_enabled() {
            self.events.raise(Event::Unreliable);
        }
    }

    // ---- asynchronous events --------------------------------------------------------------------------------------

    /// A parked command to complete now: its slot and completion.
    pub fn pop_event(&mut self) -> Option<(u16, Cqe)> {
        self.events.pop()
    }

    /// Takes all parked commands out: slot and cid of each.
    pub fn parked_slots(&mut self) -> Vec<(u16, u16)> {
        self.events.take_all()
    }

    /// Takes the parked command `cid` out: its slot.
    pub fn abort_parked(&mut self, cid: u16) -> Option<u16> {
        self.events.take(cid)
    }

    /// The target has changed: from now on the new view is what the host sees, and it is told of what it wants to be
    /// told. The subsystem is gone if [`Controller::subsystem`] is `None` afterwards (of a controller that is not for
    /// discovery).
    pub fn target_changed(&mut self, new: Arc<TargetView>) {
        match self.config.kind {
            Kind::Discovery => {
                let shown = |view: &TargetView| {
                    discovery::entries(
                        view,
                        &self.config.shared.hostnqn,
                        &self.config.listener,
                        self.config.local_addr.ip(),
                    )
                };
                let changed = shown(&self.config.target) != shown(&new);
                self.config.target = new;
                if changed && self.is_enabled() {
                    self.events.raise(Event::Discovery);
                }
            }
            Kind::Io => {
                let shared = &self.config.shared;
                let subsystem = new.subsystems.get(&shared.subnqn);
                let subsystem = subsystem.filter(|subsystem| subsystem.incarnation == shared.incarnation).cloned();
                let old = std::mem::replace(&mut self.config.subsystem, subsystem);
                self.config.target = new;
                if let (Some(old), Some(new)) = (old, self.config.subsystem.clone()) {
                    self.subsystem_changed(&old, &new);
                }
            }
        }
    }

    fn subsystem_changed(&mut self, old: &SubsystemView, new: &SubsystemView) {
        let nsids: BTreeSet<u32> = old.namespaces.keys().chain(new.namespaces.keys()).copied().collect();
        let mut namespaces_changed = false;
        let mut groups_changed = BTreeSet::new();
        for nsid in nsids {
            let differs = match (old.namespaces.get(&nsid), new.namespaces.get(&nsid)) {
                (Some(old_ns), Some(new_ns)) => {
                    // A namespace's group and its group's state are not attributes of the namespace, and a new or removed
                    // namespace is not a change of access (Base 5.1.2.1).
                    let before = (old_ns.anagrpid, self.ana_state(old, old_ns.anagrpid));
                    let after = (new_ns.anagrpid, self.ana_state(new, new_ns.anagrpid));
                    if before != after {
                        groups_changed.extend([before.0, after.0]);
                    }
                    attributes_differ(old_ns, new_ns)
                }
                _ => true,
            };
            if differs && self.is_enabled() {
                self.changed_namespaces.add(nsid);
                namespaces_changed = true;
            }
        }
        if namespaces_changed {
            self.events.raise(Event::Namespaces);
        }
        if !groups_changed.is_empty() {
            self.ana_changes.log += 1;
            for group in groups_changed {
                self.ana_changes.changed(group);
            }
            if new.ana_reporting && self.is_enabled() {
                self.events.raise(Event::Ana);
            }
        }
    }

    /// The state of an ANA group through the listener that the host came in through.
    pub(super) fn ana_state(&self, subsystem: &SubsystemView, group: u32) -> AnaState {
        match subsystem.listener(&self.config.listener) {
            Some(listener) => listener.ana_state(group),
            // The subsystem is no longer to be reached here; the connection is about to end.
            None => AnaState::Inaccessible,
        }
    }

    /// The log page of an event was read without RAE.
    pub(super) fn log_read(&mut self, lid: u8) {
        self.events.log_read(lid);
    }

    // ---- keep alive -----------------------------------------------------------------------------------------------

    /// When [`Controller::check_keep_alive`] is to be called at the latest; `None` while no timer runs.
    pub fn keep_alive_deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether the association goes on. Any command on any of the controller's queues since the last look counts as a
    /// Keep Alive (TBKAS, Base 3.9.4.1), so that an idle host is noticed after one to two timeouts.
    ///
    /// It is also where the host is told of what went wrong on I/O queues, so that [`Controller::pop_event`] follows.
    pub fn check_keep_alive(&mut self, now: Instant) -> bool {
        self.tell_errors();
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return true;
        }
        // Who does not enable the controller gains nothing by talking to it.
        let traffic = self.config.shared.traffic.swap(false, Ordering::Relaxed) | std::mem::take(&mut self.traffic);
        if traffic && self.is_enabled() {
            self.restart_timer(now);
            return true;
        }
        self.failed = true;
        self.deadline = None;
        self.config.shared.ready.store(false, Ordering::Release);
        false
    }

    /// Takes over a keep alive timeout that Set Features brought.
    pub(super) fn set_kato(&mut self, kato_ms: u32, now: Instant) {
        self.kato_ms = round_kato(kato_ms, &self.config.transport);
        self.keep_alive(now);
    }

    /// After a shutdown nothing prolongs the association.
    fn keep_alive(&mut self, now: Instant) {
        if self.is_enabled() {
            self.restart_timer(now);
        }
    }

    fn restart_timer(&mut self, now: Instant) {
        let period = match (self.is_enabled(), self.kato_ms, self.config.kind) {
            (false, _, _) => Some(ASSOCIATION_TIMEOUT),
            (true, 0, Kind::Discovery) => Some(DISCOVERY_ACTIVITY_TIMEOUT),
            (true, 0, Kind::Io) => None,
            (true, kato_ms, _) => Some(Duration::from_millis(kato_ms.into())),
        };
        self.deadline = period.map(|period| now + period);
    }
}

/// Rounds up to the granularity that KAS reports (Base 5.1.25.1.8), and to the shortest that the transport serves.
fn round_kato(kato_ms: u32, transport: &TransportOptions) -> u32 {
    if kato_ms == 0 {
        return 0;
    }
    let granularity_ms = u32::from(transport.kas.max(1)) * 100;
    let wanted_ms = kato_ms.max(transport.min_kato_ms);
    wanted_ms.checked_next_multiple_of(granularity_ms).unwrap_or(u32::MAX)
}

fn attributes_differ(old: &NamespaceView, new: &NamespaceView) -> bool {
    let attributes = |ns: &NamespaceView| (ns.incarnation, ns.geometry, ns.uuid, ns.nguid, ns.eui64);
    attributes(old) != attributes(new)
}

impl Event {
    fn notice(self) -> AsyncEvent {
        match self {
            Event::Namespaces => AsyncEvent::NAMESPACE_CHANGED,
            Event::Ana => AsyncEvent::ANA_CHANGED,
            Event::Discovery => AsyncEvent::DISCOVERY_CHANGED,
            Event::TransientError => {
                AsyncEvent { kind: AsyncEvent::TYPE_ERROR, info: 0x04, lid: crate::spec::log::lid::ERROR_INFORMATION }
            }
            Event::Unreliable => {
                AsyncEvent { kind: AsyncEvent::TYPE_SMART, info: 0x00, lid: crate::spec::log::lid::SMART }
            }
        }
    }
}
