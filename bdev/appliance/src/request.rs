//! The owned request: what a handler gets, and how it ends.
//!
//! A [`Body`] is boxed once, when a channel opens, and goes round: channel, submission ring, handler, completion ring,
//! channel. A [`Request`] is a body in a handler's hands. It must end through [`Request::complete`]; one that is
//! dropped ends as [`IoStatus::Failed`] and is reported, so that no host waits for it.
//!
//! # Going home without counting
//! A body knows its [`Home`] by reference count, and is gone from the thread once it was sent; waking the reactor
//! afterwards needs the home to live on. A worker's thread therefore keeps a list of the homes that it serves
//! ([`lend_home`]): a completion there finds its home in the list instead of cloning the reference. On any other thread
//! the reference is cloned for the moment.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::Arc;

use reactor::{Buffers, Instant, ReactorId};

use crate::types::{IoStatus, Op};

/// Names a request for as long as the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The deadline of a request that has none.
pub const NO_DEADLINE: Instant = Instant(u64::MAX);

/// The lane of a body whose home is on no thread's list.
pub const NO_LANE: u32 = u32::MAX;

/// What a handler did wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It was dropped instead of completed.
    Leaked,
    /// It was dropped while the handler's code panicked.
    Panicked,
    /// It was completed with another length than its payload has.
    WrongLength {
        /// Bytes that the handler says it moved.
        said_bytes: u64,
    },
    /// It was completed although it had ended already.
    CompletedTwice,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Leaked => f.write_str("was dropped instead of completed"),
            Fault::Panicked => f.write_str("was lost in a panic"),
            Fault::WrongLength { said_bytes } => write!(f, "was completed with a length of {said_bytes} bytes"),
            Fault::CompletedTwice => f.write_str("was completed twice"),
        }
    }
}

/// Where requests go when they have ended: the ring of the reactor's channel, or shared memory.
pub trait Home: Send + Sync {
    /// Takes a body home and wakes whoever waits there, if it sleeps. Never blocks.
    fn send(&self, body: Box<Body>);
    /// The same for several at once; `bodies` is empty afterwards.
    // Boxed because bodies travel by pointer.
    #[allow(clippy::vec_box)]
    fn send_all(&self, bodies: &mut Vec<Box<Body>>) {
        bodies.drain(..).for_each(|body| self.send(body));
    }
    /// The time, for the statistics of one request in many.
    fn now(&self) -> Instant;
    /// A handler did something wrong with `body`: say so, with the names of handler and device.
    fn report(&self, body: &Body, fault: Fault);
}

/// The state of a request, for those who carry requests about; handlers see [`Request`].
///
/// A body goes to another core and back with every request, so its fields lie by who writes them:
///
/// ```text
/// line 0      what a request says, and how it ended: goes both ways
/// from line 1 the payload: goes there when the handler looks at it, and back
/// last line   what never changes, and the instants of the few requests that are sampled: both cores keep it
/// ```
#[repr(C, align(64))]
pub struct Body {
    /// Which request this is.
    pub id: RequestId,
    /// First block.
    pub lba: u64,
    /// Blocks.
    pub blocks: u64,
    /// When it ends without the handler; [`NO_DEADLINE`]: never.
    pub deadline: Instant,
    /// The operation.
    pub op: Op,
    /// Index of the channel's slot that it belongs to; always the same for one body.
    pub slot: u32,
    /// Index of its home in the list of the worker's thread, or [`NO_LANE`].
    pub lane: u32,
    /// Bytes that the payload had when it left; it must have as many when it comes home.
    pub payload_bytes: u32,
    /// How it ended.
    pub status: IoStatus,
    /// Whether the instants below are kept.
    pub sampled: bool,
    /// The payload.
    pub bufs: Buffers,
    /// Where it goes when it ends, and what else stays as it is.
    pub fixed: Fixed,
}

/// What a body has for as long as it lives, and what few requests write.
#[repr(C, align(64))]
pub struct Fixed {
    /// Where it goes when it ends.
    pub home: Arc<dyn Home>,
    /// The reactor that submitted it.
    pub reactor: ReactorId,
    /// Bytes in a block.
    pub block_size: u32,
    /// When it was submitted, if it is sampled.
    pub sent: Instant,
    /// When the handler's side picked it up, if it is sampled.
    pub picked: Instant,
    /// When the handler completed it, if it is sampled.
    pub done: Instant,
}

const _: () = assert!(std::mem::offset_of!(Body, bufs) == 64 && size_of::<Fixed>() == 64);

impl Body {
    /// A body without a request in it.
    pub fn blank(slot: u32, reactor: ReactorId, block_size: u32, home: Arc<dyn Home>) -> Box<Body> {
        Box::new(Body {
            id: RequestId(0),
            lba: 0,
            blocks: 0,
            deadline: NO_DEADLINE,
            op: Op::Flush,
            slot,
            lane: NO_LANE,
            payload_bytes: 0,
            status: IoStatus::Success,
            sampled: false,
            bufs: Buffers::new(),
            fixed: Fixed { home, reactor, block_size, sent: Instant(0), picked: Instant(0), done: Instant(0) },
        })
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "request {} ({} {}+{})", self.id, self.op.kind().name(), self.lba, self.blocks)
    }
}

/// One operation in a handler's hands.
///
/// It may be completed on any thread, at any time, in any order. Dropping it ends it as failed and says so in the log.
/// Completing it twice does not compile:
///
/// ```compile_fail
/// fn twice(request: appliance::Request) {
///     request.complete(appliance::IoStatus::Success);
///     request.complete(appliance::IoStatus::Success);
/// }
/// ```
pub struct Request(Option<Box<Body>>);

impl Request {
    /// The request in `body`, for those who carry requests about.
    #[inline]
    pub fn from_body(body: Box<Body>) -> Request {
        Request(Some(body))
    }

    /// Takes the body out without ending the request.
    #[inline]
    pub fn into_body(mut self) -> Box<Body> {
        self.0.take().expect("a request has its body until it ends")
    }

    /// What it consists of, for those who carry requests about.
    #[inline]
    pub fn body(&self) -> &Body {
        self.0.as_ref().expect("a request has its body until it ends")
    }

    /// Which request this is: unique for as long as the process lives, and the name that [`Worker::abort`] uses.
    ///
    /// [`Worker::abort`]: crate::Worker::abort
    #[inline]
    pub fn id(&self) -> RequestId {
        self.body().id
    }

    /// The operation.
    #[inline]
    pub fn op(&self) -> Op {
        self.body().op
    }

    /// First block. Meaningless for a flush.
    #[inline]
    pub fn lba(&self) -> u64 {
        self.body().lba
    }

    /// Number of blocks. Zero for a flush.
    #[inline]
    pub fn blocks(&self) -> u64 {
        self.body().blocks
    }

    /// Bytes in a block.
    #[inline]
    pub fn block_size(&self) -> u32 {
        self.body().fixed.block_size
    }

    /// First byte on the device.
    #[inline]
    pub fn offset_bytes(&self) -> u64 {
        self.body().lba.saturating_mul(self.body().fixed.block_size.into())
    }

    /// Bytes on the device that the operation concerns: also of those without a payload, and half the payload of a
    /// compare-and-write.
    #[inline]
    pub fn len_bytes(&self) -> u64 {
        self.body().blocks.saturating_mul(self.body().fixed.block_size.into())
    }

    /// The payload: what a write brings, what a compare compares with.
    #[inline]
    pub fn bufs(&self) -> &Buffers {
        &self.body().bufs
    }

    /// The payload, writable: what a read fills. Its length must stay as it is. A read that is completed with success must
    /// have filled all of it: the memory holds bytes of earlier requests.
    #[inline]
    pub fn bufs_mut(&mut self) -> &mut Buffers {
        &mut self.0.as_mut().expect("a request has its body until it ends").bufs
    }

    /// When the request ends as timed out if the handler has not completed it, on the platform's clock; `None` when it has
    /// all the time in the world.
    #[inline]
    pub fn deadline(&self) -> Option<Instant> {
        let deadline = self.body().deadline;
        (deadline != NO_DEADLINE).then_some(deadline)
    }

    /// The reactor that submitted it.
    #[inline]
    pub fn reactor(&self) -> ReactorId {
        self.body().fixed.reactor
    }

    /// Ends the request, from any thread.
    #[inline]
    pub fn complete(mut self, status: IoStatus) {
        if let Some(mut body) = self.0.take() {
            body.status = status;
            go_home(body);
        }
    }

    /// Ends the request, for handlers that know how many bytes they moved: another number than the payload has is a bug
    /// of the handler; the request then fails, and the log says which.
    pub fn complete_with(mut self, status: IoStatus, bytes: u64) {
        let Some(mut body) = self.0.take() else { return };
        body.status = status;
        if status.is_success() && bytes != u64::from(body.payload_bytes) {
            body.fixed.home.report(&body, Fault::WrongLength { said_bytes: bytes });
            body.status = IoStatus::Failed;
        }
        go_home(body);
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let Some(mut body) = self.0.take() else { return };
        let fault = if in_panic() { Fault::Panicked } else { Fault::Leaked };
        body.fixed.home.report(&body, fault);
        body.status = IoStatus::Failed;
        go_home(body);
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(body) => body.fmt(f),
            None => f.write_str("a request that has ended"),
        }
    }
}

thread_local! {
    /// What is dropped belonged to a handler that has panicked.
    static IN_PANIC: Cell<bool> = const { Cell::new(false) };

    /// The homes that the workers on this thread serve, by lane.
    static HOMES: RefCell<Vec<Option<Arc<dyn Home>>>> = const { RefCell::new(Vec::new()) };
}

/// Ends requests in batches: those of one reactor go home together, with one publication and at most one wake. For workers
/// that do many small requests in a row. What was added has ended for the handler, but nobody hears of it before
/// [`Completions::flush`], so flush at the end of each round, and before anything that takes long.
///
/// No memory is taken for a request; what is kept is bounded by what was added.
#[derive(Default)]
pub struct Completions {
    /// All of one home.
    #[allow(clippy::vec_box, reason = "bodies travel by pointer")]
    bodies: Vec<Box<Body>>,
}

impl Completions {
    /// Ends a request.
    #[inline]
    pub fn add(&mut self, mut request: Request, status: IoStatus) {
        let Some(mut body) = request.0.take() else { return };
        body.status = status;
        if body.sampled {
            body.fixed.done = body.fixed.home.now();
        }
        if let Some(first) = self.bodies.first()
            && !std::ptr::addr_eq(Arc::as_ptr(&first.fixed.home), Arc::as_ptr(&body.fixed.home))
        {
            self.flush();
        }
        self.bodies.push(body);
    }

    /// Requests that were added since the last flush.
    pub fn len(&self) -> usize {
        self.bodies.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bodies.is_empty()
    }

    /// Sends home what was added.
    #[inline]
    pub fn flush(&mut self) {
        if let Some(first) = self.bodies.first() {
            // One count for all of them: the bodies may be gone before the home has been rung.
            let home = Arc::clone(&first.fixed.home);
            home.send_all(&mut self.bodies);
        }
    }
}

impl Drop for Completions {
    fn drop(&mut self) {
        self.flush();
    }
}

impl fmt::Debug for Completions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Completions").field(&self.bodies.len()).finish()
    }
}

/// Whether what is dropped on this thread now is lost in a panic, or with a worker that has panicked.
pub fn in_panic() -> bool {
    std::thread::panicking() || IN_PANIC.try_with(Cell::get).unwrap_or(false)
}

/// Lets go of what a handler had that has panicked; a panic in here does not pass [`std::panic::catch_unwind`] either.
pub fn drop_after_panic<T>(what: T) {
    struct Over;
    impl Drop for Over {
        fn drop(&mut self) {
            IN_PANIC.set(false);
        }
    }
    IN_PANIC.set(true);
    let _over = Over;
    drop(what);
}

/// Puts `home` on this thread's list and returns its lane, for [`Body::lane`] of what this thread picks up.
pub fn lend_home(home: &Arc<dyn Home>) -> u32 {
    HOMES.with_borrow_mut(|homes| {
        let free = homes.iter().position(Option::is_none).unwrap_or_else(|| {
            homes.push(None);
            homes.len() - 1
        });
        homes[free] = Some(Arc::clone(home));
        free as u32
    })
}

/// Takes the home of `lane` off this thread's list. Requests of it that are still out find their own way.
pub fn take_home(lane: u32) {
    // While the thread ends its list may be gone already.
    let _ = HOMES.try_with(|homes| homes.borrow_mut().get_mut(lane as usize).and_then(Option::take));
}

#[inline]
fn go_home(mut body: Box<Body>) {
    if body.sampled {
        body.fixed.done = body.fixed.home.now();
    }
    let lane = body.lane as usize;
    let mut body = Some(body);
    let _ = HOMES.try_with(|homes| {
        let Ok(homes) = homes.try_borrow() else { return };
        if let Some(Some(home)) = homes.get(lane)
            && let Some(taken) =
                body.take_if(|body| std::ptr::addr_eq(Arc::as_ptr(home), Arc::as_ptr(&body.fixed.home)))
        {
            home.send(taken);
        }
    });
    if let Some(body) = body {
        let home = Arc::clone(&body.fixed.home);
        home.send(body);
    }
}
