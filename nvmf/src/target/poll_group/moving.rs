//! Moving an I/O queue, with its connection, to another reactor.
//!
//! ```text
//! asked -> nothing is received any more -> no operation is out, everything is sent -> leave: off the readiness set, memory copied
//!   |                                   \-- not within QUIESCE_PATIENCE: as before                       |
//!   |                                                                                                    v
//!   +-- a place on the other reactor is held                   a message, with socket, protocol machine and queue
//!                                                                                                        |
//!       answer <- received again, from where it stopped <- its view is as new as the one left <----------+
//! ```
//! Nothing is lost or comes in another order: commands are executed by one reactor until none is out, then by the other, and
//! what was received and not executed (a half PDU, data on its way into a command, commands that wait for memory) is part of the
//! machine that moves. What it holds of the old reactor's memory is copied: at most what a connection may have asked for with R2T,
//! and one capsule.
//!
//! # Invariants
//! - The controller's list names the new reactor from the moment of leaving on, changed under its lock and only while the
//!   controller is ready. Whoever deletes queues makes it unready first and reads the list then: so either the queue does not
//!   leave, or the message goes to the new reactor; and a queue that arrives behind that message finds its controller unready,
//!   which it stays until the queue is gone.
//! - A queue arrives only in a view that is as new as the one it left, and is checked against that: changes of the target that
//!   were acknowledged while it was between two reactors hold for it. Between them it executes nothing and holds no channel.
//! - It counts on both reactors (placement) from being asked until it has left, so no reactor gets more than it may have.
//!
//! Admin queues stay: a controller lives on the reactor of its admin queue, and has event requests outstanding that never end.

use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reactor::reactor::Reply;
use reactor::{Context, Instant, ReactorId};

use super::apply::refused_by;
use super::connect::forget_controller_if_done;
use super::{HeldFused, IoQueue, PollGroup, Qp, Role, Tally, Work, add_tally, qpair_key};
use crate::target::shared::ControllerShared;
use crate::target::system::QueueName;
use crate::target::transport::{Incoming, Place, off_pool};
use crate::target::view::{ListenAddress, SubsystemView};

/// How long a queue that is to move waits for its operations to end and its output to leave.
const QUIESCE_PATIENCE: Duration = Duration::from_secs(1);

/// Why a queue did not move. It goes on where it was, unless it is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MoveError {
    /// There is no such queue on any reactor.
    NoQueue,
    /// It is an admin queue.
    Admin,
    /// Its transport binds it to its reactor.
    Fixed,
    /// It is moving already.
    Moving,
    /// There is no such reactor.
    NoReactor,
    /// The other reactor has all connections that it may have, or does not keep up.
    Full,
    /// Its operations did not end in time, or its host does not take what is sent.
    Busy,
    /// It ended meanwhile.
    Ended,
}

impl fmt::Display for MoveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MoveError::NoQueue => "there is no such queue",
            MoveError::Admin => "admin queues stay where their controller is",
            MoveError::Fixed => "queues of its transport stay where they were accepted",
            MoveError::Moving => "it is moving already",
            MoveError::NoReactor => "there is no such reactor",
            MoveError::Full => "the reactor takes no more connections",
            MoveError::Busy => "its commands have not ended in time, or its host takes no replies",
            MoveError::Ended => "it has ended meanwhile",
        })
    }
}

impl std::error::Error for MoveError {}

/// Where the answer goes.
pub type MoveReply = Reply<Result<(), MoveError>>;

/// A queue that is to leave.
pub(super) struct Departure {
    index: usize,
    generation: u32,
    to: ReactorId,
    /// Whose connection it is, to the placement.
    owner: IpAddr,
    deadline: Instant,
    reply: MoveReply,
}

/// A queue between two reactors.
pub(super) struct Parcel {
    incoming: Box<dyn Incoming>,
    /// Generation of the view that it left.
    view: u64,
    shared: Arc<ControllerShared>,
    qid: u16,
    fused: Option<HeldFused>,
    units: u64,
    listener: ListenAddress,
    slots: usize,
    since: Instant,
    /// What is answered when it has arrived.
    answer: Result<(), MoveError>,
    reply: MoveReply,
}

impl PollGroup {
    /// Begins to move a queue of this reactor; `reply` is answered when it is over.
    pub(super) fn move_qpair(&mut self, cx: &mut Context, name: &QueueName, to: ReactorId, reply: MoveReply) {
        match self.begin_move(cx, name, to) {
            Ok(Some((index, owner))) => {
                let qp = &mut self.qpairs[index];
                // Counts as queued without being so: nobody queues it, and it is not received from.
                qp.queued = true;
                let departure = Departure {
                    index,
                    generation: qp.generation,
                    to,
                    owner,
                    deadline: cx.now() + QUIESCE_PATIENCE,
                    reply,
                };
                self.runnable.retain(|queued| *queued != index);
                self.departures.push(departure);
            }
            Ok(None) => reply.send(Ok(())),
            Err(error) => reply.send(Err(error)),
        }
    }

    /// The queue pair to move; `None` if it is where it should be.
    fn begin_move(
        &mut self,
        cx: &Context,
        name: &QueueName,
        to: ReactorId,
    ) -> Result<Option<(usize, IpAddr)>, MoveError> {
        let is_meant = |qp: &Qp| match &qp.role {
            Role::Io(io) => io.qid == name.qid && io.shared.cntlid == name.cntlid && io.shared.subnqn == name.subnqn,
            _ => false,
        };
        let found = self.qpairs.iter().find(|(_, qp)| !qp.closed && is_meant(qp));
        let (index, qp) = found.ok_or(MoveError::NoQueue)?;
        if !qp.qpair.is_movable() {
            return Err(MoveError::Fixed);
        }
        if to == self.reactor {
            return Ok(None);
        }
        if self.departures.iter().any(|leaving| leaving.index == index && leaving.generation == qp.generation) {
            return Err(MoveError::Moving);
        }
        let owner = qp.qpair.peer_addr().ip();
        if !self.loads.reserve(cx.now(), to, owner) {
            return Err(MoveError::Full);
        }
        Ok(Some((index, owner)))
    }

    /// Lets those leave that can. To be called where nobody holds a queue pair's index any more but for its completions.
    pub(super) fn leave_when_quiet(&mut self, cx: &mut Context) {
        for departure in std::mem::take(&mut self.departures) {
            let Departure { index, generation, to, deadline, .. } = departure;
            let Some(qp) = self.qpairs.get(index).filter(|qp| qp.generation == generation && !qp.closed) else {
                self.give_up(departure, MoveError::Ended);
                continue;
            };
            if qp.outstanding == 0 && qp.qpair.may_leave() {
                self.depart(cx, departure);
            } else if cx.now() >= deadline {
                tracing::debug!(peer = %qp.qpair.peer_addr(), to = to.0, "a queue stays: it did not become quiet");
                self.resume(index);
                self.give_up(departure, MoveError::Busy);
            } else {
                self.departures.push(departure);
            }
        }
    }

    fn give_up(&mut self, departure: Departure, why: MoveError) {
        self.loads.release(departure.to, departure.owner);
        departure.reply.send(Err(why));
    }

    /// Receives from a queue pair again.
    fn resume(&mut self, index: usize) {
        self.qpairs[index].queued = true;
        self.runnable.push_back(index);
    }

    fn depart(&mut self, cx: &mut Context, departure: Departure) {
        let Departure { to, owner, .. } = departure;
        let Some(parcel) = self.pack(cx, departure) else { return };
        let shared = Arc::clone(&parcel.shared);
        {
            let mut queues = shared.io_queues();
            if is_over(&shared).is_some() {
                drop(queues);
                // Whoever ended the controller may have read already that the queue is here.
                return self.come_back(cx, parcel, to, MoveError::Ended);
            }
            queues.insert(parcel.qid, to);
        }
        // Kept in reach, since a full mailbox gives the message back and not what is in it.
        let parcel = Arc::new(Mutex::new(Some(parcel)));
        let take = |parcel: &Mutex<Option<Parcel>>| parcel.lock().unwrap_or_else(PoisonError::into_inner).take();
        let sent = Arc::clone(&parcel);
        let message = Box::new(move |cx: &mut Context| {
            if let Some(parcel) = take(&sent) {
                PollGroup::of(cx).borrow_mut().arrive(cx, parcel);
            }
        });
        if cx.group()[to.0 as usize].send(message).is_ok() {
            self.loads.release(self.reactor, owner);
            self.stats.moved_out += 1;
        } else if let Some(parcel) = take(&parcel) {
            shared.io_queues().insert(parcel.qid, self.reactor);
            self.come_back(cx, parcel, to, MoveError::Full);
        }
    }

    /// Takes a quiet queue pair apart. `None`, and the answer is given, when its transport keeps it.
    fn pack(&mut self, cx: &mut Context, departure: Departure) -> Option<Parcel> {
        let index = departure.index;
        let runtime = std::rc::Rc::clone(&self.runtime);
        let mut runtime = runtime.borrow_mut();
        add_tally(&mut self.qpairs[index]);
        let mut qp = self.qpairs.remove(index);
        match qp.qpair.leave(cx, runtime.pool()) {
            Ok(incoming) => {
                let Role::Io(io) = qp.role else { unreachable!("only I/O queues move") };
                self.leave_subsystem(&mut runtime, io.subsystem);
                let pool = runtime.pool();
                let fused = io.fused.map(|held| HeldFused { data: off_pool(held.data, pool), ..held });
                Some(Parcel {
                    incoming,
                    view: self.view.generation,
                    shared: io.shared,
                    qid: io.qid,
                    fused,
                    units: io.units,
                    listener: qp.listener,
                    slots: qp.work.len(),
                    since: qp.since,
                    answer: Ok(()),
                    reply: departure.reply,
                })
            }
            Err(qpair) => {
                qp.qpair = qpair;
                // The place that was freed last is given out first.
                let again = self.qpairs.insert(qp);
                assert_eq!(again, index, "a queue pair keeps its place");
                drop(runtime);
                self.resume(index);
                self.give_up(departure, MoveError::Fixed);
                None
            }
        }
    }

    /// A queue that had left already, and goes on here.
    fn come_back(&mut self, cx: &mut Context, parcel: Parcel, held: ReactorId, why: MoveError) {
        self.loads.release(held, parcel.incoming.peer_addr().ip());
        self.arrive(cx, Parcel { answer: Err(why), ..parcel });
    }

    /// Takes in a queue that comes from another reactor, which has counted it here.
    pub(super) fn arrive(&mut self, cx: &mut Context, parcel: Parcel) {
        if parcel.view > self.view.generation {
            self.arrivals.push(parcel);
            return;
        }
        let owner = parcel.incoming.peer_addr().ip();
        match self.admit(cx, parcel) {
            Ok((reply, answer)) => {
                if answer.is_ok() {
                    self.stats.moved_in += 1;
                }
                reply.send(answer);
            }
            Err((shared, qid, reply, why)) => {
                tracing::debug!(host = shared.hostnqn, cntlid = shared.cntlid, qid, why, "connection closes");
                self.loads.release(self.reactor, owner);
                shared.io_queues().remove(&qid);
                forget_controller_if_done(&self.table, &shared);
                reply.send(Err(MoveError::Ended));
            }
        }
    }

    /// Those that have waited for the present view.
    pub(super) fn admit_waiting(&mut self, cx: &mut Context) {
        for parcel in std::mem::take(&mut self.arrivals) {
            self.arrive(cx, parcel);
        }
    }

    #[allow(clippy::type_complexity)]
    fn admit(
        &mut self,
        cx: &mut Context,
        parcel: Parcel,
    ) -> Result<(MoveReply, Result<(), MoveError>), (Arc<ControllerShared>, u16, MoveReply, String)> {
        let Parcel { incoming, shared, qid, fused, units, listener, slots, since, answer, reply, .. } = parcel;
        let view = match self.still_allowed(&shared, &listener) {
            Ok(view) => view,
            Err(why) => return Err((shared, qid, reply, why.to_owned())),
        };
        let runtime = std::rc::Rc::clone(&self.runtime);
        let made = {
            let mut runtime = runtime.borrow_mut();
            let (poller, pool) = (self.poller, runtime.pool());
            incoming.into_qpair(&mut Place { cx, poller, pool, groups: &mut self.groups })
        };
        let index = self.qpairs.vacant_key();
        let watched = made.and_then(|mut qpair| {
            qpair.watch(cx, self.poller, qpair_key(index))?;
            Ok(qpair)
        });
        let qpair = match watched {
            Ok(qpair) => qpair,
            Err(error) => return Err((shared, qid, reply, error.to_string())),
        };
        let subsystem = self.use_subsystem(&view);
        self.next_generation = self.next_generation.wrapping_add(1);
        let tally = Tally::default();
        self.qpairs.insert(Qp {
            qpair,
            role: Role::Io(IoQueue { shared, qid, listed: true, subsystem, fused, tally, units }),
            generation: self.next_generation,
            work: vec![Work::None; slots],
            outstanding: 0,
            queued: true,
            flushing: false,
            closed: false,
            entrance: view.listener(&listener).cloned(),
            listener,
            since,
            due_since: None,
        });
        self.runnable.push_back(index);
        Ok((reply, answer))
    }

    /// The subsystem of a queue that arrives, if the present view lets it go on.
    fn still_allowed(
        &self,
        shared: &ControllerShared,
        listener: &ListenAddress,
    ) -> Result<Arc<SubsystemView>, &'static str> {
        if let Some(why) = is_over(shared) {
            return Err(why);
        }
        let subsystem = refused_by(&self.view, shared, listener).map_or(Ok(()), Err);
        subsystem?;
        let view = self.view.subsystems.get(&shared.subnqn);
        view.map(Arc::clone).ok_or("the subsystem was deleted")
    }
}

/// Why queues of a controller go no further, if they do not.
fn is_over(shared: &ControllerShared) -> Option<&'static str> {
    if shared.is_dead() {
        Some("the controller has ended")
    } else if !shared.ready.load(Ordering::Acquire) {
        Some("the controller's queues were deleted")
    } else {
        None
    }
}
