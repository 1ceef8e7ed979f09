//! The production host library on a simulated reactor: a controller that comes back, its queues, and a load that is
//! checked against a [`Model`].
//!
//! As the product uses it: queue pairs are watched, the reactor sleeps when nothing is to do, a queue that fails takes its
//! controller with it, and what was outstanding counts as unknown.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bdev::conformance::Rng;
use nvmf::host::{Completion, Connector, Controller, IoQueue, Options, Payload, State, Watching, commands};
use nvmf::spec::opcode::io;
use nvmf::spec::{Sqe, Status};
use nvmf::target::view::TransportKind;
use reactor::park::Ready;
use reactor::{Buffers, Context, Instant, Poller, PollerId, Progress, Schedule};

use crate::model::{Model, ReadToken, Stamp, WriteToken, payload};
use crate::target::host_transports;
use crate::trace;
use crate::world::World;

/// What one initiator does.
#[derive(Clone, Debug)]
pub struct InitiatorConfig {
    /// Where the target is.
    pub addr: SocketAddr,
    /// How to connect.
    pub options: Options,
    /// The transport.
    pub kind: TransportKind,
    /// Header and data digests, on TCP.
    pub digests: (bool, bool),
    /// Commands that have to succeed.
    pub commands: u64,
    /// Outstanding at once.
    pub depth: usize,
}

/// What all of them, and the scenario, see.
#[derive(Debug, Default)]
pub struct Shared {
    /// Namespaces that stay, by NSID.
    pub models: BTreeMap<u32, Model>,
    /// Initiators that have ended.
    pub ended: usize,
    /// Commands that have succeeded.
    pub succeeded: u64,
    /// How often a controller came back.
    pub returns: u64,
    /// NSIDs and sizes that each initiator knew at its end.
    pub known: Vec<BTreeMap<u32, u64>>,
    /// Initiators go on with their load until this is set.
    pub may_end: bool,
}

enum Op {
    Read(ReadToken),
    Write(WriteToken),
    Compare(ReadToken, Vec<u8>),
    Replace(Replace),
    Flush(u64),
}

/// A fused Compare and Write.
struct Replace {
    read: ReadToken,
    write: WriteToken,
    stamp: Stamp,
    expected: Vec<u8>,
    /// How the halves ended, which come one by one.
    compared: Option<Status>,
    wrote: Option<Status>,
}

/// In the number of the first half of a fused operation, which is that of the second otherwise.
const FIRST_HALF: u64 = 1 << 63;

struct Pending {
    nsid: u32,
    lba: u64,
    blocks: u64,
    op: Op,
}

/// One host.
pub struct Initiator {
    id: PollerId,
    shared: Rc<RefCell<Shared>>,
    connector: Arc<dyn Connector>,
    controller: Controller,
    epoch: u64,
    queues: Vec<IoQueue>,
    pending: BTreeMap<u64, Pending>,
    done: Vec<Completion>,
    config: InitiatorConfig,
    rng: Rng,
    next: u64,
    left: u64,
    pause_until: Instant,
    /// A first connection that fails is tried again then.
    retry_at: Instant,
    over: bool,
}

/// The controller's key; queues have their identifiers.
const ADMIN: u64 = 0;

fn controller(connector: &Arc<dyn Connector>, config: &InitiatorConfig, now: Instant) -> Controller {
    Controller::new(Arc::clone(connector), config.options.clone(), ADMIN, now)
}

impl Initiator {
    /// Puts one on `reactor`.
    pub fn start(world: &mut World, reactor: usize, shared: &Rc<RefCell<Shared>>, config: InitiatorConfig, seed: u64) {
        let transports = host_transports(world);
        let transport = transports.iter().find(|transport| transport.kind() == config.kind).expect("there are both");
        let connector = transport.connector(config.addr, config.digests);
        let cx = world.context(reactor);
        let now = cx.read_clock();
        let id = cx.reserve_poller();
        let initiator = Initiator {
            id,
            shared: Rc::clone(shared),
            controller: controller(&connector, &config, now),
            connector,
            epoch: 0,
            queues: Vec::new(),
            pending: BTreeMap::new(),
            done: Vec::new(),
            left: config.commands,
            config,
            rng: Rng::new(seed),
            next: 0,
            pause_until: now,
            retry_at: now,
            over: false,
        };
        cx.add_reserved_poller(id, "initiator", Schedule::Active, Box::new(initiator));
    }

    /// Closes the queues: what is outstanding is unknown.
    fn close_queues(&mut self, cx: &mut Context) {
        let mut lost = Vec::new();
        for mut queue in self.queues.drain(..) {
            queue.close(&mut Watching { cx, poller: self.id }, &mut |user, _| lost.push(user & !FIRST_HALF));
        }
        // Of a fused operation both halves are lost, or the one that had not ended.
        lost.sort_unstable();
        lost.dedup();
        for user in lost {
            let pending = self.pending.remove(&user).expect("it was outstanding, once");
            self.unknown(pending);
        }
        assert!(self.pending.is_empty(), "what is outstanding comes out of its queue");
    }

    fn unknown(&mut self, pending: Pending) {
        let mut shared = self.shared.borrow_mut();
        let model = shared.models.get_mut(&pending.nsid).expect("namespaces with models stay");
        match pending.op {
            Op::Read(token) | Op::Compare(token, _) => model.read_lost(token),
            Op::Write(token) => model.lost(token, pending.lba, pending.blocks),
            Op::Replace(replace) => {
                model.read_lost(replace.read);
                model.lost(replace.write, pending.lba, pending.blocks);
            }
            Op::Flush(_) => {}
        }
    }

    fn complete(&mut self, completion: Completion) {
        let (user, status) = (completion.user & !FIRST_HALF, completion.cqe.status());
        trace::event("completed", completion.user, u64::from(status.to_field()), 0);
        if let Some(Op::Replace(replace)) = self.pending.get_mut(&user).map(|pending| &mut pending.op) {
            let half = if completion.user == user { &mut replace.wrote } else { &mut replace.compared };
            assert!(half.replace(status).is_none(), "a half of a fused operation ends once");
            if replace.compared.is_some() && replace.wrote.is_some() {
                self.replaced(user);
            }
            return;
        }
        let pending = self.pending.remove(&user).expect("a completion is of a command that is outstanding");
        let differs = status.same_code(Status::COMPARE_FAILURE) && matches!(pending.op, Op::Compare(..));
        if !status.is_success() && !differs {
            self.unknown(pending);
            return;
        }
        let mut shared = self.shared.borrow_mut();
        shared.succeeded += 1;
        self.left = self.left.saturating_sub(1);
        let model = shared.models.get_mut(&pending.nsid).expect("namespaces with models stay");
        let checked = match pending.op {
            Op::Read(token) => model.was_read(token, pending.lba, &completion.data.to_vec()),
            Op::Compare(token, bytes) if status.is_success() => model.was_equal(token, pending.lba, &bytes),
            Op::Compare(token, bytes) => model.was_different(token, pending.lba, &bytes),
            Op::Write(token) => {
                model.wrote(token, pending.lba, pending.blocks, false);
                Ok(())
            }
            Op::Flush(began) => {
                model.flushed(began);
                Ok(())
            }
            Op::Replace(_) => unreachable!("its halves were told apart"),
        };
        if let Err(why) = checked {
            panic!("namespace {}: {why}", pending.nsid);
        }
    }

    /// Both halves of a fused operation have ended.
    fn replaced(&mut self, user: u64) {
        let pending = self.pending.remove(&user).expect("it was just there");
        let Op::Replace(Replace { read, write, stamp, ref expected, compared, wrote }) = pending.op else { return };
        let (compared, wrote) = (compared.expect("it has ended"), wrote.expect("it has ended"));
        assert!(compared.is_success() || !wrote.is_success(), "a write happened whose compare ended as {compared:?}");
        let differs = compared.same_code(Status::COMPARE_FAILURE) && wrote.same_code(Status::ABORTED_FAILED_FUSED);
        if !wrote.is_success() && !differs {
            return self.unknown(pending);
        }
        let mut shared = self.shared.borrow_mut();
        shared.succeeded += 1;
        self.left = self.left.saturating_sub(1);
        let model = shared.models.get_mut(&pending.nsid).expect("namespaces with models stay");
        let checked = if wrote.is_success() {
            model.replaced(read, write, pending.lba, expected, stamp, false)
        } else {
            model.refused(write, pending.lba, pending.blocks);
            model.was_different(read, pending.lba, expected)
        };
        if let Err(why) = checked {
            panic!("namespace {}: {why}", pending.nsid);
        }
    }

    fn submit_one(&mut self, now: Instant) -> bool {
        let at = self.rng.below(self.queues.len() as u64) as usize;
        let queue = &mut self.queues[at];
        if !queue.can_submit() {
            return false;
        }
        let mut shared = self.shared.borrow_mut();
        let nth = self.rng.below(shared.models.len() as u64) as usize;
        let (&nsid, model) = shared.models.iter_mut().nth(nth).expect("there are namespaces");
        let kind = self.rng.below(12);
        if kind == 11 && !queue.can_submit_pair() {
            return false;
        }
        // What compares and writes at once does so with one block.
        let blocks = if kind == 11 { 1 } else { 1 + self.rng.below(8.min(model.len())) };
        let lba = self.rng.below(model.len() - blocks + 1);
        let size = model.block_size();
        self.next += 1;
        let user = self.next;
        let block = |opcode| -> Sqe { commands::blocks(opcode, nsid, lba, blocks as u32) };
        let guess = |model: &Model| -> Vec<u8> {
            (lba..lba + blocks).flat_map(|lba| payload(model.guess(lba), lba, 1, size)).collect()
        };
        let op = match kind {
            0..4 => {
                queue.read(user, nsid, lba, blocks as u32, Buffers::heap(blocks as usize * size), now);
                Op::Read(model.read())
            }
            4..8 => {
                let stamp = model.stamp();
                let data = Buffers::from(&payload(stamp, lba, blocks, size)[..]);
                let sqe = commands::with_fua(block(io::WRITE), self.rng.one_in(3));
                queue.submit(user, sqe, Payload::ToController(data.len() as u32), data, now);
                Op::Write(model.write(stamp, lba, blocks))
            }
            8 if self.rng.one_in(2) => {
                queue.write_zeroes(user, nsid, lba, blocks as u32, now);
                Op::Write(model.write(0, lba, blocks))
            }
            8 => {
                queue.flush_cache(user, nsid, now);
                Op::Flush(model.flush())
            }
            9 => {
                // Memory reads as zeroes then, as its namespaces say.
                let first = 1 + self.rng.below(blocks);
                let ranges = [(lba, first as u32), (lba + first, (blocks - first) as u32)];
                queue.deallocate(user, nsid, &ranges[..1 + usize::from(first < blocks)], now);
                Op::Write(model.write(0, lba, blocks))
            }
            10 => {
                let bytes = guess(model);
                queue.compare(user, nsid, lba, blocks as u32, Buffers::from(&bytes[..]), now);
                Op::Compare(model.read(), bytes)
            }
            _ => {
                let (expected, stamp) = (guess(model), model.stamp());
                let data = payload(stamp, lba, blocks, size);
                let halves = commands::compare_and_write(nsid, lba, blocks as u32);
                let first = (user | FIRST_HALF, Buffers::from(&expected[..]));
                queue.compare_and_write(first, (user, Buffers::from(&data[..])), halves, now);
                let (read, write) = (model.read(), model.write(stamp, lba, blocks));
                Op::Replace(Replace { read, write, stamp, expected, compared: None, wrote: None })
            }
        };
        self.pending.insert(user, Pending { nsid, lba, blocks, op });
        true
    }

    /// The queues follow the controller.
    fn tend(&mut self, cx: &mut Context) {
        let now = cx.now();
        if self.controller.epoch() != self.epoch || !self.controller.is_live() {
            self.close_queues(cx);
            if self.controller.epoch() != self.epoch {
                self.shared.borrow_mut().returns += u64::from(self.epoch > 0);
                self.epoch = self.controller.epoch();
            }
        }
        if self.controller.is_live() && self.queues.is_empty() {
            for qid in 1..=self.controller.io_queues() {
                let params = self.controller.queue_params(qid).expect("the queue was granted");
                match IoQueue::connect(params, qid.into(), now) {
                    Ok(queue) => self.queues.push(queue),
                    Err(error) => self.controller.fail(error),
                }
            }
        }
        let mut failed = None;
        for at in 0..self.queues.len() {
            let mut done = std::mem::take(&mut self.done);
            let polled = self.queues[at].poll(now, &mut Watching { cx, poller: self.id }, &mut done);
            failed = polled.err().or(failed);
            done.drain(..).for_each(|completion| self.complete(completion));
            self.done = done;
        }
        if let Some(error) = failed {
            self.close_queues(cx);
            self.controller.fail(error);
        } else if self.rng.one_in(4096) {
            // As an administrator does it, whatever is outstanding.
            self.controller.reset();
        }
    }

    fn end(&mut self, cx: &mut Context) {
        self.over = true;
        self.close_queues(cx);
        self.controller.close(&mut Watching { cx, poller: self.id });
        let known = self.controller.inventory().namespaces();
        let mut shared = self.shared.borrow_mut();
        shared.ended += 1;
        shared.known.push(known.iter().map(|(nsid, namespace)| (*nsid, namespace.blocks)).collect());
        cx.remove_poller(self.id);
    }

    fn wants_more(&self) -> bool {
        self.left > 0 || !self.shared.borrow().may_end
    }
}

impl Poller for Initiator {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        if self.over {
            return Progress::Idle;
        }
        let now = cx.now();
        let mut busy = self.controller.poll(now, &mut Watching { cx, poller: self.id });
        if self.controller.state() == State::Down {
            // Before its first success it is not tried again by itself.
            if self.wants_more() && now < self.retry_at {
                return Progress::Idle;
            }
            if self.wants_more() {
                self.retry_at = now + Duration::from_millis(200);
                self.controller.close(&mut Watching { cx, poller: self.id });
                let again = controller(&self.connector, &self.config, now);
                self.close_queues(cx);
                (self.controller, self.epoch) = (again, 0);
            } else {
                self.end(cx);
            }
            return Progress::Busy;
        }
        let before = self.pending.len();
        self.tend(cx);
        busy |= self.pending.len() != before;
        let open = self.controller.is_live() && !self.queues.is_empty() && self.queues.iter().all(IoQueue::is_live);
        while open && self.wants_more() && self.pending.len() < self.config.depth && now >= self.pause_until {
            if !self.submit_one(now) {
                break;
            }
            busy = true;
            if self.left == 0 {
                // Enough, but the scenario is not: a trickle.
                self.pause_until = now + Duration::from_millis(20 + self.rng.below(300));
            } else if self.rng.one_in(24) {
                self.pause_until = now + Duration::from_nanos(self.rng.below(5_000_000));
            }
        }
        let mut failed = None;
        for queue in self.queues.iter_mut().filter(|queue| queue.is_live()) {
            failed = queue.send().err().or(failed);
        }
        if let Some(error) = failed {
            self.close_queues(cx);
            self.controller.fail(error);
        }
        if !self.wants_more() && self.pending.is_empty() && self.controller.is_live() {
            self.controller.shut_down();
            busy = true;
        }
        Progress::from_busy(busy)
    }

    fn ready(&mut self, key: u64, ready: Ready) {
        match key {
            ADMIN => self.controller.ready(ready),
            qid => {
                let queue = self.queues.iter_mut().find(|queue| u64::from(queue.params().qid) == qid);
                queue.into_iter().for_each(|queue| queue.ready(ready));
            }
        }
    }

    fn deadline(&self) -> Option<Instant> {
        if self.controller.state() == State::Down {
            return Some(self.retry_at);
        }
        let waits = self.wants_more() && self.controller.is_live() && self.pending.len() < self.config.depth;
        let queues = self.queues.iter().filter_map(IoQueue::deadline);
        let own = self.controller.deadline(self.pause_until);
        queues.chain(own).chain(waits.then_some(self.pause_until)).min()
    }

    fn may_sleep(&mut self, _cx: &mut Context) -> bool {
        !self.controller.has_work() && !self.queues.iter().any(IoQueue::has_work)
    }
}

impl std::fmt::Debug for Initiator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Initiator({:?}, {:?}, {} pending)", self.controller, self.queues, self.pending.len())
    }
}
