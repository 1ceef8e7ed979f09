//! Executing and completing commands.

use std::sync::Arc;

use bdev::core::{Completion, IoRequest, IoRuntime, IoTag};
use reactor::{Buffers, Context};

use super::{HeldFused, LocalNamespace, Origin, PollGroup, Role, Work};
use crate::spec::command::NSID_ALL;
use crate::spec::opcode::{FABRICS, fabrics};
use crate::spec::{Cqe, FabricsCommand, IoCommand, Sqe, Status};
use crate::target::controller::{Admin, AdminEnv, Effect, ErrorRecord};
use crate::target::io::{self, Piece, Plan};
use crate::target::shared::ControllerShared;
use crate::target::transport::{AbortOutcome, Event};
use crate::target::view::AnaState;

/// What a completion's mark says: queue pair, its generation, slot.
pub(super) fn mark(index: usize, generation: u32, slot: u16) -> u64 {
    debug_assert!(index < 1 << 16);
    (generation as u64) << 32 | (index as u64) << 16 | u64::from(slot)
}

/// A command on its queue pair.
#[derive(Clone, Copy)]
struct At {
    /// Key of the queue pair.
    index: usize,
    slot: u16,
    seq: u32,
    cid: u16,
}

fn unmark(user: u64) -> (usize, u32, u16) {
    ((user >> 16) as usize & 0xffff, (user >> 32) as u32, user as u16)
}

impl PollGroup {
    pub(super) fn handle(&mut self, cx: &Context, runtime: &mut IoRuntime, index: usize, event: Event) {
        let qp = &mut self.qpairs[index];
        match (event, &qp.role) {
            (Event::Rejected { slot, sqe, status, .. }, _) => {
                if let Role::Io(io) = &mut self.qpairs[index].role {
                    // The first half of a fused operation waits for nothing but the next command.
                    let held = io.fused.take();
                    self.fail_fused(runtime, index, held);
                }
                self.complete(index, slot, Cqe::new(sqe.cid.get(), status), None);
            }
            (Event::Command { slot, seq, sqe, data }, Role::Io(_)) => {
                self.execute_io(runtime, At { index, slot, seq, cid: sqe.cid.get() }, &sqe, data);
            }
            (Event::Command { slot, sqe, data, .. }, Role::Admin(_)) => {
                self.execute_admin(cx, runtime, index, slot, &sqe, data);
            }
            (Event::Command { slot, sqe, data, .. }, Role::New) => {
                self.connect(cx, runtime, index, slot, &sqe, data);
            }
        }
    }

    pub(super) fn complete(&mut self, index: usize, slot: u16, cqe: Cqe, data: Option<Buffers>) {
        self.stats.completed += 1;
        self.qpairs[index].qpair.complete(slot, cqe, data);
        self.want_flush(index);
    }

    /// Completes an I/O command that was not submitted.
    fn finish(&mut self, runtime: &mut IoRuntime, at: At, origin: Origin, status: Status, data: Buffers) {
        runtime.pool().put(data);
        self.note_error(at.index, origin, status);
        self.complete(at.index, at.slot, Cqe::new(at.cid, status), None);
    }

    // ---- admin -----------------------------------------------------------------------------------------------------

    fn execute_admin(
        &mut self,
        cx: &Context,
        runtime: &mut IoRuntime,
        index: usize,
        slot: u16,
        sqe: &Sqe,
        mut data: Buffers,
    ) {
        let now = cx.now();
        let qp = &mut self.qpairs[index];
        let cid = sqe.cid.get();
        let Role::Admin(admin) = &mut qp.role else { return };
        if sqe.opcode == FABRICS {
            runtime.pool().put(data);
            let outcome = match FabricsCommand::parse(sqe) {
                Ok(command) => admin.controller.fabrics(&command, now),
                Err(status) => return self.complete(index, slot, Cqe::new(cid, status), None),
            };
            self.complete(index, slot, outcome.cqe(cid), None);
            // Disabling ends the event requests that are parked.
            self.send_events(index);
            if matches!(outcome.effect, Effect::Disabled | Effect::ShutDown) {
                self.delete_io_queues(cx, index);
                self.disabling.push((index, self.qpairs[index].generation));
            }
            return;
        }
        let env = AdminEnv { started: self.started };
        match admin.controller.execute(slot, sqe, &mut data, &env, now) {
            Admin::Complete { cqe, send } => {
                if send {
                    self.complete(index, slot, cqe, Some(data));
                } else {
                    runtime.pool().put(data);
                    self.complete(index, slot, cqe, None);
                }
            }
            Admin::Parked => runtime.pool().put(data),
            Admin::Abort { sqid, cid: victim, .. } => {
                runtime.pool().put(data);
                self.abort(runtime, At { index, slot, seq: 0, cid }, sqid, victim);
            }
        }
        self.send_events(index);
    }

    /// Completes the asynchronous event requests that have something to say.
    pub(super) fn send_events(&mut self, index: usize) {
        loop {
            let Some(qp) = self.qpairs.get_mut(index) else { return };
            let Role::Admin(admin) = &mut qp.role else { return };
            let Some((slot, cqe)) = admin.controller.pop_event() else { return };
            self.complete(index, slot, cqe, None);
        }
    }

    /// Abort of a command on an I/O queue (Base 5.1.1), which may be on another reactor.
    fn abort(&mut self, runtime: &mut IoRuntime, at: At, sqid: u16, victim: u16) {
        let Role::Admin(admin) = &self.qpairs[at.index].role else { return };
        let shared = Arc::clone(&admin.shared);
        let reactor = shared.io_queues().get(&sqid).copied();
        let there = match reactor {
            None => return self.abort_done(at, false),
            Some(here) if here == self.reactor => {
                let aborted = self.abort_io(runtime, &shared, sqid, victim);
                return self.abort_done(at, aborted);
            }
            Some(there) => there,
        };
        let (home, generation) = (self.reactor, self.qpairs[at.index].generation);
        let ask = Box::new(move |cx: &mut Context| {
            let (runtime, group) = (IoRuntime::of(cx), PollGroup::of(cx));
            let mut runtime = runtime.borrow_mut();
            let aborted = group.borrow_mut().abort_io(&mut runtime, &shared, sqid, victim);
            let back = Box::new(move |cx: &mut Context| {
                let group = PollGroup::of(cx);
                let mut group = group.borrow_mut();
                if group.qpairs.get(at.index).is_some_and(|qp| qp.generation == generation && !qp.closed) {
                    group.abort_done(at, aborted);
                }
            });
            runtime.post(home, back);
        });
        // At most four Aborts of a controller are under way (ACL).
        runtime.post(there, ask);
    }

    fn abort_done(&mut self, at: At, aborted: bool) {
        if let Role::Admin(admin) = &mut self.qpairs[at.index].role {
            let cqe = admin.controller.abort_done(at.cid, aborted);
            self.complete(at.index, at.slot, cqe, None);
        }
    }

    fn abort_io(&mut self, runtime: &mut IoRuntime, shared: &Arc<ControllerShared>, sqid: u16, victim: u16) -> bool {
        let found = self.qpairs.iter().find(|(_, qp)| {
            !qp.closed && matches!(&qp.role, Role::Io(io) if io.qid == sqid && Arc::ptr_eq(&io.shared, shared))
        });
        let Some((index, _)) = found else { return false };
        let qp = &mut self.qpairs[index];
        match qp.qpair.abort(victim) {
            AbortOutcome::NotFound => false,
            AbortOutcome::Undelivered => {
                if !qp.queued {
                    qp.queued = true;
                    self.runnable.push_back(index);
                }
                true
            }
            AbortOutcome::Executing(slot) => {
                let Work::Io { namespace, .. } = qp.work[slot as usize] else { return false };
                let user = mark(index, qp.generation, slot);
                let Some(channel) = self.namespaces[namespace].channel else { return false };
                runtime.abort(channel, IoTag { client: self.client, user })
            }
        }
    }

    // ---- I/O: down -------------------------------------------------------------------------------------------------

    fn execute_io(&mut self, runtime: &mut IoRuntime, at: At, sqe: &Sqe, mut data: Buffers) {
        let Role::Io(io) = &mut self.qpairs[at.index].role else { return };
        let ready = io.shared.ready.load(std::sync::atomic::Ordering::Acquire);
        let held = io.fused.take();
        let command = match IoCommand::parse(sqe) {
            // A queue is connected once (Base 6.3).
            _ if sqe.opcode == FABRICS && sqe.fctype() == fabrics::CONNECT => Err(Status::COMMAND_SEQUENCE_ERROR.dnr()),
            // Authentication is not offered, and single queues are not deleted.
            _ if sqe.opcode == FABRICS => Err(Status::INVALID_OPCODE.dnr()),
            _ if !ready => Err(Status::COMMAND_SEQUENCE_ERROR.dnr()),
            parsed => parsed,
        };
        let second = matches!(command, Ok(IoCommand::Write { fused: true, .. }));
        let held = held.filter_or(second, at.seq, |alone| self.drop_fused(runtime, at.index, alone));
        let nsid = sqe.nsid.get();
        let lba = u64::from(sqe.cdw10.get()) | u64::from(sqe.cdw11.get()) << 32;
        let origin = Origin { cid: at.cid, opcode: sqe.opcode, nsid, lba };
        let found = command.and_then(|command| Ok((command, self.namespace(runtime, at.index, nsid)?)));
        let (command, namespace) = match found {
            Ok(found) => found,
            Err(status) => {
                self.fail_fused(runtime, at.index, held);
                return self.finish(runtime, at, origin, status, data);
            }
        };
        let geometry = self.namespaces[namespace].view.geometry;
        let plan = match io::plan(&command, &geometry, &mut data) {
            Ok(plan) => plan,
            Err(status) => {
                self.fail_fused(runtime, at.index, held);
                return self.finish(runtime, at, origin, status, data);
            }
        };
        match command {
            IoCommand::Compare { fused: true, .. } => {
                let Role::Io(io) = &mut self.qpairs[at.index].role else { return };
                io.fused = Some(HeldFused { at: (at.slot, at.seq), nsid, command, data });
                return;
            }
            IoCommand::Write { fused: true, .. } => {
                return self.execute_fused(runtime, at, origin, namespace, &command, data, held);
            }
            _ => {}
        }
        self.count(at.index, &command, geometry.block_size);
        match plan {
            Plan::Done => self.finish(runtime, at, origin, Status::SUCCESS, data),
            Plan::One(piece) => {
                let work = Work::Io {
                    namespace,
                    left: 1,
                    status: Status::SUCCESS,
                    to_host: matches!(command, IoCommand::Read(_)),
                    fused_with: None,
                    origin,
                };
                self.submit(runtime, at, namespace, work, piece, data);
            }
            Plan::Many(pieces) => {
                runtime.pool().put(data);
                self.submit_many(runtime, at, origin, namespace, pieces);
            }
        }
    }

    fn count(&mut self, index: usize, command: &IoCommand, block_size: u32) {
        let Role::Io(io) = &mut self.qpairs[index].role else { return };
        match command {
            IoCommand::Read(range) | IoCommand::Compare { range, .. } => {
                io.tally.reads += 1;
                io.tally.bytes_read += range.len_bytes(block_size);
            }
            IoCommand::Write { range, .. } => {
                io.tally.writes += 1;
                io.tally.bytes_written += range.len_bytes(block_size);
            }
            _ => io.tally.others += 1,
        }
    }

    /// The namespace of a command, with its channel open.
    fn namespace(&mut self, runtime: &mut IoRuntime, index: usize, nsid: u32) -> Result<usize, Status> {
        let qp = &self.qpairs[index];
        let Role::Io(io) = &qp.role else { return Err(Status::INTERNAL_ERROR) };
        if nsid == NSID_ALL || nsid == 0 {
            return Err(Status::INVALID_NAMESPACE_OR_FORMAT.dnr());
        }
        let table = &self.subsystems[io.subsystem].table;
        let Some(key) = table.get(nsid as usize - 1).copied().flatten() else {
            return Err(Status::INVALID_NAMESPACE_OR_FORMAT.dnr());
        };
        let namespace = &mut self.namespaces[key];
        if namespace.channel.is_none() {
            open_channel(runtime, namespace)?;
        }
        match self.ana_state(index, key) {
            AnaState::Optimized | AnaState::NonOptimized => Ok(key),
            AnaState::Inaccessible => Err(Status::ANA_INACCESSIBLE),
        }
    }

    fn ana_state(&self, index: usize, namespace: usize) -> AnaState {
        let qp = &self.qpairs[index];
        let Role::Io(io) = &qp.role else { return AnaState::Optimized };
        if !self.subsystems[io.subsystem].ana_reporting {
            return AnaState::Optimized;
        }
        let group = self.namespaces[namespace].view.anagrpid;
        qp.entrance.as_ref().map_or(AnaState::Inaccessible, |listener| listener.ana_state(group))
    }

    #[inline]
    fn submit(&mut self, runtime: &mut IoRuntime, at: At, namespace: usize, work: Work, piece: Piece, data: Buffers) {
        let client = self.client;
        let qp = &mut self.qpairs[at.index];
        let target = &mut self.namespaces[namespace];
        let channel = target.channel.expect("a command's namespace has its channel open");
        qp.work[at.slot as usize] = work;
        qp.outstanding += 1;
        target.outstanding += 1;
        self.pending_io += 1;
        let user = mark(at.index, qp.generation, at.slot);
        let request = IoRequest { op: piece.op, lba: piece.lba, blocks: piece.blocks, bufs: data, user };
        runtime.submit(channel, client, request);
    }

    /// Submits the pieces of one command. At most 256, as the wire says.
    fn submit_many(&mut self, runtime: &mut IoRuntime, at: At, origin: Origin, namespace: usize, pieces: io::Pieces) {
        let left = pieces.len() as u32;
        let work = Work::Io { namespace, left, status: Status::SUCCESS, to_host: false, fused_with: None, origin };
        for piece in pieces {
            self.submit(runtime, at, namespace, work, piece, Buffers::new());
        }
    }

    // ---- fused operations (Base 3.4.2) -----------------------------------------------------------------------------

    /// The first half's partner did not come.
    fn drop_fused(&mut self, runtime: &mut IoRuntime, index: usize, held: HeldFused) {
        runtime.pool().put(held.data);
        self.complete(index, held.at.0, Cqe::new(0, Status::ABORTED_MISSING_FUSED), None);
    }

    /// The second half cannot be executed, so the first is not either.
    fn fail_fused(&mut self, runtime: &mut IoRuntime, index: usize, held: Option<HeldFused>) {
        if let Some(held) = held {
            runtime.pool().put(held.data);
            self.complete(index, held.at.0, Cqe::new(0, Status::ABORTED_FAILED_FUSED), None);
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn execute_fused(
        &mut self,
        runtime: &mut IoRuntime,
        at: At,
        origin: Origin,
        namespace: usize,
        write: &IoCommand,
        mut data: Buffers,
        first: Option<HeldFused>,
    ) {
        let geometry = self.namespaces[namespace].view.geometry;
        let Some(first) = first else {
            return self.finish(runtime, at, origin, Status::ABORTED_MISSING_FUSED, data);
        };
        let fused = match first.nsid == origin.nsid {
            true => io::fuse(&first.command, write, &geometry),
            false => Err(Status::INVALID_FIELD.dnr()),
        };
        match fused {
            Ok(piece) => {
                self.count(at.index, &first.command, geometry.block_size);
                self.count(at.index, write, geometry.block_size);
                let mut joined = first.data;
                data.drain().for_each(|buffer| joined.push(buffer));
                let work = Work::Io {
                    namespace,
                    left: 1,
                    status: Status::SUCCESS,
                    to_host: false,
                    fused_with: Some(first.at.0),
                    origin,
                };
                self.submit(runtime, at, namespace, work, piece, joined);
            }
            Err(status) => {
                self.fail_fused(runtime, at.index, Some(first));
                self.finish(runtime, at, origin, status, data);
            }
        }
    }

    // ---- I/O: up ---------------------------------------------------------------------------------------------------

    /// An operation has come back from the bdev layer.
    #[inline]
    pub(super) fn completed(&mut self, runtime: &mut IoRuntime, mut completion: Completion) {
        let (index, generation, slot) = unmark(completion.user());
        let qp = &mut self.qpairs[index];
        assert_eq!(qp.generation, generation, "a queue pair stays in its place until its last operation has come back");
        qp.outstanding -= 1;
        self.pending_io -= 1;
        let Work::Io { namespace, left, status, to_host, fused_with, origin } = &mut qp.work[slot as usize] else {
            unreachable!("an operation came back to a slot that has none")
        };
        *left -= 1;
        if status.is_success() {
            *status = io::status_of(completion.status());
        }
        let (namespace, left, status, origin) = (*namespace, *left, *status, *origin);
        let (to_host, fused_with) = (*to_host, *fused_with);
        let target = &mut self.namespaces[namespace];
        target.outstanding -= 1;
        if target.gone && target.outstanding == 0 {
            self.forget_namespace(runtime, namespace);
        }
        if left > 0 {
            return runtime.recycle(completion);
        }
        let qp = &mut self.qpairs[index];
        qp.work[slot as usize] = Work::None;
        if qp.closed {
            runtime.recycle(completion);
            if qp.outstanding == 0 {
                self.forget_qpair(index);
            }
            return;
        }
        if let (Role::Io(io), true) = (&mut qp.role, is_media_error(status)) {
            io.tally.media_errors += 1;
        }
        self.note_error(index, origin, status);
        let data = (to_host && status.is_success()).then(|| completion.take_bufs());
        runtime.recycle(completion);
        if let Some(first) = fused_with {
            // A miscompare is the first command's; the second is then aborted with it (NVM 3.3.1).
            let compare_failed = status.same_code(Status::COMPARE_FAILURE);
            let (one, two) = match (status.is_success(), compare_failed) {
                (true, _) => (Status::SUCCESS, Status::SUCCESS),
                (false, true) => (status, Status::ABORTED_FAILED_FUSED),
                (false, false) => (Status::ABORTED_FAILED_FUSED, status),
            };
            self.complete(index, first, Cqe::new(0, one), None);
            return self.complete(index, slot, Cqe::new(0, two), None);
        }
        self.complete(index, slot, Cqe::new(0, status), data);
    }
}

impl PollGroup {
    /// Sends an error to the log of the queue's controller. A miscompare and an abort are answers, not errors.
    fn note_error(&self, index: usize, origin: Origin, status: Status) {
        let answer = [Status::SUCCESS, Status::COMPARE_FAILURE, Status::ABORT_REQUESTED];
        if answer.iter().any(|answer| status.same_code(*answer)) {
            return;
        }
        let Role::Io(io) = &self.qpairs[index].role else { return };
        io.shared.record_error(ErrorRecord {
            sqid: io.qid,
            cid: origin.cid,
            status,
            opcode: origin.opcode,
            nsid: origin.nsid,
            lba: origin.lba,
            // Which byte of the command was wrong is not known here.
            pel: 0xffff,
        });
    }
}

fn is_media_error(status: Status) -> bool {
    status.same_code(Status::UNRECOVERED_READ_ERROR) || status.same_code(Status::WRITE_FAULT)
}

/// Keeps the first half of a fused operation only for the command right behind it that can be the second.
trait Held {
    fn filter_or(self, second: bool, seq: u32, alone: impl FnOnce(HeldFused)) -> Option<HeldFused>;
}

impl Held for Option<HeldFused> {
    fn filter_or(self, second: bool, seq: u32, alone: impl FnOnce(HeldFused)) -> Option<HeldFused> {
        match self {
            Some(held) if second && held.at.1.wrapping_add(1) == seq => Some(held),
            Some(held) => {
                alone(held);
                None
            }
            None => None,
        }
    }
}

fn open_channel(runtime: &mut IoRuntime, namespace: &mut LocalNamespace) -> Result<(), Status> {
    match runtime.get_channel(&namespace.view.bdev) {
        Ok(channel) => {
            namespace.channel = Some(channel);
            Ok(())
        }
        Err(error) => {
            tracing::error!(nsid = namespace.view.nsid, bdev = namespace.view.bdev.name(), %error, "a namespace's bdev cannot be opened on this reactor");
            Err(Status::NAMESPACE_NOT_READY)
        }
    }
}
