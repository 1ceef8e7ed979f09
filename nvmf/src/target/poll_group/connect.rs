//! From a new connection to a queue of a controller, and its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use bdev::core::{IoRuntime, IoTag};
use reactor::{Buffers, Context, Instant, ReactorId};

use super::commands::mark;
use super::{AdminQueue, IoQueue, LocalSubsystem, MAX_QPAIRS, PollGroup, Qp, Role, Tally, Work, qpair_key};
use crate::spec::command::Connect;
use crate::spec::fabrics::{ConnectData, ConnectResult, InvalidParameter};
use crate::spec::opcode::{self, FABRICS};
use crate::spec::{Cqe, FabricsCommand, Sqe, Status};
use crate::target::connect::{self, ConnectError};
use crate::target::controller::{COMMAND_QUIESCE_TIME, Controller, ControllerConfig, Kind};
use crate::target::shared::{ControllerShared, ControllerTable, IoCounters};
use crate::target::transport::{Incoming, Place};
use crate::target::view::{DISCOVERY_NQN, ListenAddress, SubsystemView, TransportOptions};

impl PollGroup {
    /// Finds a reactor for a new connection and brings it there.
    pub(super) fn place(&mut self, cx: &mut Context, address: ListenAddress, incoming: Box<dyn Incoming>) {
        let owner = incoming.peer_addr().ip();
        let reactor = self.loads.place(cx, owner);
        if reactor == self.reactor {
            return self.adopt(cx, address, incoming);
        }
        let peer = incoming.peer_addr();
        let message = Box::new(move |cx: &mut Context| {
            let group = PollGroup::of(cx);
            group.borrow_mut().adopt(cx, address, incoming);
        });
        if cx.group()[reactor.0 as usize].send(message).is_err() {
            self.loads.release(reactor, owner);
            tracing::warn!(%peer, reactor = reactor.0, "a connection was turned away: its reactor does not keep up");
        }
    }

    /// Takes a connection in on this reactor. Its load has been counted.
    fn adopt(&mut self, cx: &mut Context, listener: ListenAddress, incoming: Box<dyn Incoming>) {
        let peer = incoming.peer_addr();
        if self.qpairs.len() >= MAX_QPAIRS {
            self.loads.release(self.reactor, peer.ip());
            incoming.turn_away();
            tracing::warn!(%peer, limit = MAX_QPAIRS, "a connection was turned away: the reactor has all that it may have");
            return;
        }
        self.next_generation = self.next_generation.wrapping_add(1);
        let index = self.qpairs.vacant_key();
        let runtime = std::rc::Rc::clone(&self.runtime);
        let made = {
            let mut runtime = runtime.borrow_mut();
            let (poller, pool) = (self.poller, runtime.pool());
            incoming.into_qpair(&mut Place { cx, poller, pool, groups: &mut self.groups })
        };
        let mut qpair = match made {
            Ok(qpair) => qpair,
            Err(error) => {
                self.loads.release(self.reactor, peer.ip());
                tracing::warn!(%peer, %error, "a connection was turned away");
                return;
            }
        };
        if let Err(error) = qpair.watch(cx, self.poller, qpair_key(index)) {
            self.loads.release(self.reactor, peer.ip());
            tracing::warn!(%peer, %error, "a connection was turned away: it cannot be watched");
            return;
        }
        let depth =
            self.transport_options(&listener).max_queue_depth.max(self.transport_options(&listener).max_aq_depth);
        self.qpairs.insert(Qp {
            qpair,
            role: Role::New,
            generation: self.next_generation,
            work: vec![Work::None; depth as usize + 1],
            outstanding: 0,
            queued: true,
            flushing: false,
            closed: false,
            listener,
            entrance: None,
            since: cx.now(),
            due_since: None,
        });
        // Something may have arrived before it was watched.
        self.runnable.push_back(index);
    }

    fn transport_options(&self, listener: &ListenAddress) -> TransportOptions {
        self.view.transports.get(&listener.trtype).cloned().unwrap_or_default()
    }

    /// The first command of a queue pair.
    pub(super) fn connect(
        &mut self,
        cx: &Context,
        runtime: &mut IoRuntime,
        index: usize,
        slot: u16,
        sqe: &Sqe,
        data: Buffers,
    ) {
        let cid = sqe.cid.get();
        let bytes = data.to_vec();
        runtime.pool().put(data);
        let parsed = match sqe.opcode {
            FABRICS => FabricsCommand::parse(sqe),
            _ => Err(Status::COMMAND_SEQUENCE_ERROR.dnr()),
        };
        let command = match parsed {
            Ok(FabricsCommand::Connect(connect)) => connect,
            Ok(_) => {
                let cqe = Cqe::new(cid, Status::COMMAND_SEQUENCE_ERROR.dnr());
                return self.complete(index, slot, cqe, None);
            }
            Err(status) => return self.complete(index, slot, Cqe::new(cid, status), None),
        };
        let connected = match ConnectData::parse(&bytes) {
            Ok(data) if command.qid == 0 => self.connect_admin(cx, index, &command, &data),
            Ok(data) => self.connect_io(index, &command, &data),
            Err(status) => {
                Err(ConnectError { status, parameter: None, reason: "the command's data is too short".into() })
            }
        };
        let cqe = match connected {
            Ok(cntlid) => Cqe::success(cid).with_dw0(ConnectResult::default().with_cntlid(cntlid.into()).0),
            Err(error) => {
                let peer = self.qpairs[index].qpair.peer_addr();
                tracing::warn!(%peer, qid = command.qid, status = %error.status, why = error.reason, "a host was refused");
                error.cqe(cid)
            }
        };
        self.complete(index, slot, cqe, None);
    }

    fn connect_admin(
        &mut self,
        cx: &Context,
        index: usize,
        command: &Connect,
        data: &ConnectData,
    ) -> Result<u16, ConnectError> {
        let listener = self.qpairs[index].listener.clone();
        let options = self.transport_options(&listener);
        let destination = connect::check_admin(&self.view, command, data, &listener)?;
        let hostnqn = data.hostnqn().unwrap_or_default().to_string();
        let (kind, subsystem, subnqn, ids) = match destination {
            connect::Target::Discovery => (Kind::Discovery, None, DISCOVERY_NQN.to_string(), (1, 0xffef)),
            connect::Target::Subsystem(view) => {
                let ids = (view.min_cntlid, view.max_cntlid);
                (Kind::Io, Some(Arc::clone(&view)), view.nqn.clone(), ids)
            }
        };
        if kind == Kind::Io {
            self.check_quiet(&subnqn, data, cx.now())?;
        }
        let incarnation = subsystem.as_ref().map_or(0, |view: &Arc<SubsystemView>| view.incarnation);
        let build = |cntlid| ControllerShared {
            cntlid,
            subnqn: subnqn.clone(),
            incarnation,
            hostnqn: hostnqn.clone(),
            hostid: data.hostid,
            admin_reactor: self.reactor,
            listener: listener.clone(),
            max_io_queues: AtomicU32::new(options.max_io_qpairs_per_ctrlr.into()),
            ready: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            dead_since: AtomicU64::new(0),
            traffic: AtomicBool::new(false),
            io_queues: Default::default(),
            counters: IoCounters::default(),
            errors: Default::default(),
        };
        let shared = self.table.add(&subnqn, ids.0, ids.1, build).ok_or(ConnectError {
            status: Status::CONNECT_CONTROLLER_BUSY,
            parameter: None,
            reason: "the subsystem's controller identifiers are all in use".into(),
        })?;
        let config = ControllerConfig {
            kind,
            shared: Arc::clone(&shared),
            subsystem,
            target: Arc::clone(&self.view),
            transport: options,
            listener,
            local_addr: self.qpairs[index].qpair.local_addr(),
            kato_ms: command.kato_ms,
            admin_queue_entries: command.queue_entries,
        };
        let controller = Controller::new(config, cx.now());
        let qp = &mut self.qpairs[index];
        qp.qpair.connected(command.queue_entries, command.disable_sq_flow_control, false);
        tracing::info!(peer = %qp.qpair.peer_addr(), host = hostnqn, subsystem = subnqn, cntlid = shared.cntlid, "host connected");
        qp.role = Role::Admin(Box::new(AdminQueue { controller, shared: Arc::clone(&shared) }));
        self.stats.admin_qpairs += 1;
        Ok(shared.cntlid)
    }

    /// Keeps a host out while commands of an earlier association of its write, but not for longer than it was told (CQT).
    fn check_quiet(&self, subnqn: &str, data: &ConnectData, now: Instant) -> Result<(), ConnectError> {
        let Some(since) = self.table.draining_since(subnqn, &data.hostid) else { return Ok(()) };
        if now < since + COMMAND_QUIESCE_TIME {
            return Err(ConnectError {
                status: Status::CONNECT_CONTROLLER_BUSY,
                parameter: None,
                reason: "commands of the host's earlier association have not ended yet".into(),
            });
        }
        let host = data.hostnqn().unwrap_or_default();
        tracing::warn!(
            host,
            subsystem = subnqn,
            "a host is let in although commands of its earlier association have not ended: look whether a device hangs"
        );
        Ok(())
    }

    fn connect_io(&mut self, index: usize, command: &Connect, data: &ConnectData) -> Result<u16, ConnectError> {
        let listener = self.qpairs[index].listener.clone();
        let shared = connect::check_io(&self.view, &self.table, command, data, &listener)?;
        let Some(view) = self.view.subsystems.get(&shared.subnqn).map(Arc::clone) else {
            let parameter = Some(InvalidParameter::SUBNQN);
            let reason = "the subsystem is gone".into();
            return Err(ConnectError { status: Status::CONNECT_INVALID_PARAMETERS.dnr(), parameter, reason });
        };
        connect::join(&shared, command.qid, self.reactor)?;
        let subsystem = self.use_subsystem(&view);
        let cntlid = shared.cntlid;
        let qp = &mut self.qpairs[index];
        qp.qpair.connected(command.queue_entries, command.disable_sq_flow_control, true);
        qp.entrance = view.listener(&listener).cloned();
        qp.role = Role::Io(IoQueue {
            shared,
            qid: command.qid,
            listed: true,
            subsystem,
            fused: None,
            tally: Tally::default(),
            units: 0,
        });
        self.stats.io_qpairs += 1;
        Ok(cntlid)
    }

    /// This reactor's entry for a subsystem, with one more queue on it.
    pub(super) fn use_subsystem(&mut self, view: &Arc<SubsystemView>) -> usize {
        let key = match self.subsystem_by_nqn.get(&view.nqn) {
            Some(&key) => key,
            None => {
                let local = LocalSubsystem {
                    nqn: view.nqn.clone(),
                    incarnation: view.incarnation,
                    table: Vec::new(),
                    ana_reporting: view.ana_reporting,
                    queues: 0,
                    gone: false,
                };
                let key = self.subsystems.insert(local);
                self.subsystem_by_nqn.insert(view.nqn.clone(), key);
                self.add_namespaces(key, view);
                key
            }
        };
        self.subsystems[key].queues += 1;
        key
    }

    // ---- the end ---------------------------------------------------------------------------------------------------

    /// CC.EN went to 0 or the association is over: the I/O queues of the controller on `index` close, on every reactor.
    pub(super) fn delete_io_queues(&mut self, cx: &Context, index: usize) {
        let Role::Admin(admin) = &self.qpairs[index].role else { return };
        let shared = Arc::clone(&admin.shared);
        let reactors: Vec<ReactorId> = shared.io_queues().values().copied().collect();
        self.end_queues_of(&shared);
        for (n, reactor) in reactors.iter().enumerate() {
            if *reactor == self.reactor || reactors[..n].contains(reactor) {
                continue;
            }
            let shared = Arc::clone(&shared);
            let message = Box::new(move |cx: &mut Context| PollGroup::of(cx).borrow_mut().end_queues_of(&shared));
            if cx.group()[reactor.0 as usize].send(message).is_err() {
                // Its timer looks at dead controllers too; a disabled one's queues refuse every command meanwhile.
                tracing::warn!(reactor = reactor.0, "queues are closed late: their reactor does not keep up");
            }
        }
    }

    fn end_queues_of(&mut self, shared: &Arc<ControllerShared>) {
        for (index, qp) in &self.qpairs {
            if !qp.closed && matches!(&qp.role, Role::Io(io) if Arc::ptr_eq(&io.shared, shared)) {
                self.ended.push((index, "the controller's queues were deleted".into()));
            }
        }
    }

    pub(super) fn close_ended(&mut self, cx: &mut Context) {
        // To the end at once: closing an admin queue adds its I/O queues, and a name that is left behind could be another
        // queue's by the time that it is looked at.
        while !self.ended.is_empty() {
            for (index, why) in std::mem::take(&mut self.ended) {
                let Some(qp) = self.qpairs.get(index).filter(|qp| !qp.closed) else { continue };
                tracing::debug!(peer = %qp.qpair.peer_addr(), why, "connection closes");
                self.close(cx, index, &why);
            }
        }
    }

    fn close(&mut self, cx: &mut Context, index: usize, why: &str) {
        if let Role::Admin(admin) = &self.qpairs[index].role {
            let shared = Arc::clone(&admin.shared);
            shared.kill(cx.now());
            tracing::info!(host = shared.hostnqn, subsystem = shared.subnqn, cntlid = shared.cntlid, why, "host gone");
            self.delete_io_queues(cx, index);
            forget_controller_if_done(&self.table, &shared);
        }
        let runtime = std::rc::Rc::clone(&self.runtime);
        let mut runtime = runtime.borrow_mut();
        let qp = &mut self.qpairs[index];
        qp.closed = true;
        qp.qpair.close(cx, runtime.pool());
        self.loads.release(self.reactor, qp.qpair.peer_addr().ip());
        if let Role::Io(io) = &mut qp.role {
            if let Some(held) = io.fused.take() {
                runtime.pool().put(held.data);
            }
            let subsystem = io.subsystem;
            self.leave_subsystem(&mut runtime, subsystem);
            self.abort_outstanding(&mut runtime, index);
        }
        if self.qpairs[index].outstanding == 0 {
            self.forget_qpair(index);
        }
    }

    /// A closed I/O queue's commands have nobody left to answer to: those end early that can. Without one that writes, the
    /// queue is no longer waited for.
    fn abort_outstanding(&mut self, runtime: &mut IoRuntime, index: usize) {
        let (qp, client) = (&mut self.qpairs[index], self.client);
        let mut writes = false;
        for (slot, work) in qp.work.iter().enumerate() {
            let Work::Io { namespace, left, origin, .. } = *work else { continue };
            writes |= opcode::io::writes(origin.opcode);
            let Some(channel) = self.namespaces[namespace].channel else { continue };
            let tag = IoTag { client, user: mark(index, qp.generation, slot as u16) };
            for _ in 0..left {
                runtime.abort(channel, tag);
            }
        }
        if !writes {
            Self::unlist(&self.table, qp);
        }
    }

    /// Takes a closed I/O queue out of its controller's list.
    fn unlist(table: &ControllerTable, qp: &mut Qp) {
        let Role::Io(io) = &mut qp.role else { return };
        if std::mem::take(&mut io.listed) {
            io.shared.io_queues().remove(&io.qid);
            forget_controller_if_done(table, &io.shared);
        }
    }

    /// A closed queue pair's last operation has come back: its place is free.
    pub(super) fn forget_qpair(&mut self, index: usize) {
        let mut qp = self.qpairs.remove(index);
        debug_assert!(qp.closed && qp.outstanding == 0);
        // With a command that writes only now: as long as the queue is listed, its host is not connected anew, and so no
        // write of the old association can land behind one of the new.
        Self::unlist(&self.table, &mut qp);
    }

    pub(super) fn leave_subsystem(&mut self, runtime: &mut IoRuntime, key: usize) {
        let subsystem = &mut self.subsystems[key];
        subsystem.queues -= 1;
        if subsystem.queues > 0 {
            return;
        }
        let subsystem = self.subsystems.remove(key);
        if self.subsystem_by_nqn.get(&subsystem.nqn) == Some(&key) {
            self.subsystem_by_nqn.remove(&subsystem.nqn);
        }
        for namespace in subsystem.table.into_iter().flatten() {
            self.retire_namespace(runtime, namespace);
        }
    }
}

/// Takes a dead controller out of the table when its last I/O queue has closed.
pub(super) fn forget_controller_if_done(table: &ControllerTable, shared: &ControllerShared) {
    let done = shared.dead.load(Ordering::Acquire) && shared.io_queues().is_empty();
    if done {
        table.remove(shared);
    }
}
