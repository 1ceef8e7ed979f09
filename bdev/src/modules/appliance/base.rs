//! A lower device for a handler that runs on threads of its own.
//!
//! ```text
//! worker: BaseClient --ring of asks--> gateway (a poller on one reactor) --> the lower device's channel
//! worker: BaseClient <--ring of answers + the worker's waker-- gateway <--+
//! ```
//!
//! The device is opened and claimed until the gateway has closed. When it is removed, the device on top goes first, as with
//! every device in layers; operations that are still asked for end as `NoDevice`.
//!
//! # Bounds
//! [`MAX_ASKS`] operations are out at once; both rings have room for all of them. Operations may end in any order.
//!
//! # The end
//! [`BaseClient::close`], or dropping every handle: the gateway aborts what it can, waits for the rest, gives back the channel, and
//! only then lets go of the claim. So nobody else writes to the device while an operation of an earlier owner may still arrive.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_channel::oneshot;
use reactor::park::Waker;
use reactor::ring::{Consumer, Producer, ring};
use reactor::{Buffers, Context, Poller, PollerId, Progress, Schedule};
use slab::Slab;

use crate::core::runtime::SharedRuntime;
use crate::core::spares::Spares;
use crate::core::{
    BdevError, BdevInfo, BdevSystem, ChannelId, ClientId, Completion, IoRequest, IoRuntime, IoStatus, IoTag, Op,
};
use crate::modules::layer::{self, Base};

/// Operations that may be out at once.
pub const MAX_ASKS: usize = 128;

/// Operations handed to the lower device in one poll.
const ROUND: usize = 64;

/// I/Os of the gateway's own, for when requests of hosts hold all others.
const SPARES: usize = 4;

/// How often, and how long at a time, a claim is waited for whose earlier owner is closing.
const CLAIM_RETRIES: u32 = 50;
const CLAIM_PAUSE: Duration = Duration::from_millis(20);

/// An operation of the lower device.
struct Ask {
    token: u64,
    op: Op,
    lba: u64,
    blocks: u64,
    bufs: Buffers,
    /// Where the answer goes instead of the ring.
    reply: Option<oneshot::Sender<Answer>>,
}

/// Its end.
#[derive(Debug)]
pub struct Answer {
    /// As it was given.
    pub token: u64,
    /// How it ended.
    pub status: IoStatus,
    /// The payload.
    pub bufs: Buffers,
}

struct Shared {
    /// Of the worker; set before it asks for anything.
    worker: OnceLock<Waker>,
    gateway: Waker,
    closing: AtomicBool,
}

/// The handler's end.
pub struct BaseClient {
    asks: Producer<Ask>,
    answers: Consumer<Answer>,
    shared: Arc<Shared>,
    out: usize,
    unflushed: bool,
}

/// Ends the gateway from another thread than the one that has the [`BaseClient`].
#[derive(Clone)]
pub struct Closer(Arc<Shared>);

impl Closer {
    /// See the [module](self).
    pub fn close(&self) {
        self.0.closing.store(true, Ordering::SeqCst);
        self.0.gateway.wake();
    }
}

impl BaseClient {
    /// Opens and claims `base` for `owner`, whose device `top` goes when `base` does.
    ///
    /// # Errors
    /// As [`BdevSystem::open`] and claiming; [`BdevError::Host`] when the device has no channel to give.
    pub async fn open(
        system: &Arc<BdevSystem>,
        base: &str,
        owner: &str,
        top: &str,
    ) -> Result<(BaseClient, Arc<BdevInfo>), BdevError> {
        let mut retries = 0;
        let base = loop {
            match layer::claim_for(system, owner, base, vec![top.to_string()]) {
                // The device of that name was deleted a moment ago, and its last operations are not back yet.
                Err(BdevError::Claimed { by, .. }) if by == owner && retries < CLAIM_RETRIES => {
                    retries += 1;
                    system.executor().sleep(CLAIM_PAUSE).await;
                }
                other => break other?,
            }
        };
        let info = Arc::clone(base.bdev());
        let reactors = system.reactors();
        let spread = top.bytes().fold(0usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        let reactor = &reactors[spread % reactors.len()];
        let doing = format!("opening a channel to '{}'", info.name());
        let opened = reactor.call(move |cx| Gateway::install(cx, base)).await?;
        Ok((opened.map_err(|error| BdevError::host(doing, error))?, info))
    }

    /// Whom the answers wake. Counts once.
    pub fn set_waker(&mut self, waker: Waker) {
        let _ = self.shared.worker.set(waker);
    }

    /// What ends the gateway.
    pub fn closer(&self) -> Closer {
        Closer(Arc::clone(&self.shared))
    }

    /// Operations that are out.
    pub fn out(&self) -> usize {
        self.out
    }

    /// Operations that may be added now.
    pub fn room(&self) -> usize {
        MAX_ASKS - self.out
    }

    /// Asks for an operation; there must be [`BaseClient::room`]. The gateway is told by [`BaseClient::flush`].
    pub fn ask(&mut self, token: u64, op: Op, lba: u64, blocks: u64, bufs: Buffers) {
        assert!(self.out < MAX_ASKS, "more is asked for than there is room");
        self.out += 1;
        self.unflushed = true;
        self.asks.push(Ask { token, op, lba, blocks, bufs, reply: None });
    }

    /// Wakes the gateway if something was asked for.
    pub fn flush(&mut self) {
        if std::mem::take(&mut self.unflushed) {
            self.shared.gateway.wake_after_rmw();
        }
    }

    /// The next operation that has ended.
    pub fn answer(&mut self) -> Option<Answer> {
        let answer = self.answers.pop()?;
        self.out -= 1;
        Some(answer)
    }

    /// Whether [`BaseClient::answer`] would find something.
    pub fn has_answers(&self) -> bool {
        !self.answers.is_empty()
    }

    /// Does one operation while the caller waits.
    ///
    /// # Errors
    /// [`BdevError::Stopping`] when the gateway is gone.
    pub async fn call(&mut self, op: Op, lba: u64, blocks: u64, bufs: Buffers) -> Result<Answer, BdevError> {
        let (reply, answer) = oneshot::channel();
        self.asks.push(Ask { token: 0, op, lba, blocks, bufs, reply: Some(reply) });
        self.shared.gateway.wake_after_rmw();
        answer.await.map_err(|_| BdevError::Stopping)
    }
}

impl Drop for BaseClient {
    fn drop(&mut self) {
        self.closer().close();
    }
}

/// An operation that is with the lower device.
struct Out {
    token: u64,
    reply: Option<oneshot::Sender<Answer>>,
    spare: bool,
}

/// The reactor's end.
struct Gateway {
    me: PollerId,
    runtime: SharedRuntime,
    channel: ChannelId,
    client: ClientId,
    asks: Consumer<Ask>,
    answers: Producer<Answer>,
    shared: Arc<Shared>,
    base: Base,
    out: Slab<Out>,
    spares: Spares,
    /// An operation that there was no I/O for.
    held: Option<Ask>,
    completions: Vec<Completion>,
    aborted: bool,
}

impl Gateway {
    fn install(cx: &mut Context, base: Base) -> std::io::Result<BaseClient> {
        let runtime = IoRuntime::of(cx);
        let (channel, client, spares) = {
            let mut runtime = runtime.borrow_mut();
            let spares = runtime.take_spares(SPARES)?;
            match runtime.get_channel(base.bdev()) {
                Ok(channel) => (channel, runtime.add_client(), spares),
                Err(error) => {
                    runtime.put_spares(spares);
                    return Err(error);
                }
            }
        };
        let (asks, asked) = ring(MAX_ASKS);
        let (answers, answered) = ring(MAX_ASKS);
        let shared = Arc::new(Shared { worker: OnceLock::new(), gateway: cx.waker(), closing: AtomicBool::new(false) });
        let me = cx.reserve_poller();
        let gateway = Gateway {
            me,
            runtime,
            channel,
            client,
            asks: asked,
            answers,
            shared: Arc::clone(&shared),
            base,
            out: Slab::with_capacity(MAX_ASKS),
            spares,
            held: None,
            completions: Vec::with_capacity(MAX_ASKS),
            aborted: false,
        };
        cx.add_reserved_poller(me, "appliance base", Schedule::Active, Box::new(gateway));
        Ok(BaseClient { asks, answers: answered, shared, out: 0, unflushed: false })
    }

    fn submit(&mut self, runtime: &mut IoRuntime) -> usize {
        let mut count = 0;
        while count < ROUND
            && let Some(ask) = self.held.take().or_else(|| self.asks.pop())
        {
            let Ask { token, op, lba, blocks, bufs, reply } = ask;
            let slot = self.out.vacant_entry();
            let request = IoRequest { op, lba, blocks, bufs, user: slot.key() as u64 };
            match runtime.submit_or_spare(&mut self.spares, self.channel, self.client, request) {
                Ok(spare) => {
                    slot.insert(Out { token, reply, spare });
                    count += 1;
                }
                Err(request) => {
                    self.held = Some(Ask { token, op, lba, blocks, bufs: request.bufs, reply });
                    break;
                }
            }
        }
        count
    }

    fn answer(&mut self, runtime: &mut IoRuntime) -> bool {
        runtime.take_completions(self.client, &mut self.completions);
        let mut woken = false;
        let any = !self.completions.is_empty();
        for mut completion in self.completions.drain(..) {
            let Out { token, reply, spare } = self.out.remove(completion.user() as usize);
            let answer = Answer { token, status: completion.status(), bufs: completion.take_bufs() };
            if spare {
                runtime.recycle_spare(&mut self.spares, completion);
            } else {
                runtime.recycle(completion);
            }
            match reply {
                // Whoever lost interest has dropped the other end.
                Some(reply) => drop(reply.send(answer)),
                None => {
                    self.answers.push(answer);
                    woken = true;
                }
            }
        }
        if woken && let Some(waker) = self.shared.worker.get() {
            waker.wake_after_rmw();
        }
        any
    }

    /// Ends, once nothing is out any more.
    fn close(&mut self, runtime: &mut IoRuntime, cx: &mut Context) {
        if !std::mem::replace(&mut self.aborted, true) {
            for (user, _) in &self.out {
                runtime.abort(self.channel, IoTag { client: self.client, user: user as u64 });
            }
        }
        if self.out.is_empty() && self.asks.is_empty() && self.held.is_none() {
            runtime.put_channel(self.channel);
            runtime.remove_client(self.client);
            runtime.put_spares(std::mem::take(&mut self.spares));
            self.base.release();
            cx.remove_poller(self.me);
        }
    }
}

impl Poller for Gateway {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        let shared = std::rc::Rc::clone(&self.runtime);
        let mut runtime = shared.borrow_mut();
        let submitted = self.submit(&mut runtime);
        if submitted > 0 {
            runtime.set_now(cx.now());
            runtime.run();
        }
        let answered = self.answer(&mut runtime);
        if submitted > 0 {
            runtime.flush();
        }
        let closing = self.shared.closing.load(Ordering::Acquire);
        if closing {
            self.close(&mut runtime, cx);
        }
        Progress::from_busy(submitted > 0 || answered)
    }

    fn may_sleep(&mut self, _: &mut Context) -> bool {
        let closes = self.shared.closing.load(Ordering::SeqCst) && (!self.aborted || self.out.is_empty());
        self.asks.is_empty() && (self.held.is_none() || !self.out.is_empty()) && !closes
    }
}
