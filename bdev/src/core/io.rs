//! The travelling I/O, its pool and its home.
//!
//! An [`Io`] is drawn from its reactor's pool, travels by value through the layers and comes home, as a
//! [`Completion`], to the client that submitted it. The pool is as large as the reactor's completion ring, so an `Io`
//! can always come home from another thread without waiting. An `Io` that somebody drops instead of completing is a
//! bug; it says so in the log and comes home as failed, so that no client waits for it.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reactor::file::Payload;
use reactor::park::Waker;
use reactor::ring::Producer;
use reactor::{Buffers, Instant};

use super::runtime::{ChannelId, ClientId};
use super::types::{IoStatus, Op};

/// Layers of devices that may be stacked on each other.
pub const MAX_LAYERS: usize = 8;

/// What a client asks for.
#[derive(Debug)]
pub struct IoRequest {
    /// The operation.
    pub op: Op,
    /// First block.
    pub lba: u64,
    /// Blocks.
    pub blocks: u64,
    /// Payload; comes back with the completion.
    pub bufs: Buffers,
    /// The client's own mark; comes back with the completion.
    pub user: u64,
}

/// Names an outstanding I/O for aborting it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoTag {
    /// Who submitted it.
    pub client: ClientId,
    /// Its [`IoRequest::user`]; the client must use each value once at a time.
    pub user: u64,
}

/// How an I/O comes home from other threads.
#[derive(Clone)]
pub(super) struct Home {
    pub(super) inner: Arc<HomeInner>,
}

pub(super) struct HomeInner {
    pub(super) ring: Producer<Box<IoBody>>,
    pub(super) waker: Waker,
    /// The reactor is gone; nothing will be read from the ring any more.
    pub(super) closed: AtomicBool,
}

/// One layer's claim on an I/O.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame {
    pub(super) channel: ChannelId,
    /// Index of the saga that goes on when this I/O completes, or [`NO_SAGA`].
    pub(super) saga: u32,
    /// The module passed the I/O on to a lower device and wants it back.
    pub(super) forwarded: bool,
    /// Which of the channel's two epochs counts this I/O.
    pub(super) epoch: u8,
    pub(super) op: Op,
    pub(super) blocks: u64,
    /// The range that the module was given: of the whole, or of a piece.
    pub(super) given: (u64, u64),
    pub(super) started: Instant,
    /// The module's own, see [`Io::mark`].
    pub(super) mark: u32,
}

pub(super) const NO_SAGA: u32 = u32::MAX;

/// The state of an I/O. Boxed once, when the pool is built.
pub(super) struct IoBody {
    pub(super) op: Op,
    pub(super) lba: u64,
    pub(super) blocks: u64,
    pub(super) bufs: Buffers,
    pub(super) status: IoStatus,
    pub(super) tag: IoTag,
    pub(super) frames: arrayvec::Frames,
    pub(super) home: Home,
    /// Not of the pool: made for a request that was aborted before it drew one.
    pub(super) spare: bool,
    /// Children that show this payload.
    pub(super) children: u32,
    /// It is not counted in statistics.
    pub(super) uncounted: bool,
    /// It is a child.
    pub(super) child: bool,
    /// Others read the same payload: it is copied before it is written to.
    pub(super) shared: bool,
}

pub(super) mod arrayvec {
    //! The stack of frames: at most one a layer, without allocation.

    use super::{Frame, MAX_LAYERS};

    #[derive(Default)]
    pub(in super::super) struct Frames {
        frames: [Option<Frame>; MAX_LAYERS],
        len: usize,
    }

    impl Frames {
        pub(in super::super) fn push(&mut self, frame: Frame) {
            // The height of a stack of devices is checked when its channels are opened.
            self.frames[self.len] = Some(frame);
            self.len += 1;
        }

        pub(in super::super) fn pop(&mut self) -> Option<Frame> {
            self.len = self.len.checked_sub(1)?;
            self.frames[self.len].take()
        }

        pub(in super::super) fn last(&self) -> Option<&Frame> {
            self.frames[self.len.checked_sub(1)?].as_ref()
        }

        pub(in super::super) fn top(&mut self) -> Option<&mut Frame> {
            self.frames[self.len.checked_sub(1)?].as_mut()
        }
    }
}

impl IoBody {
    /// Replaces a payload that others read by a copy.
    #[cold]
    fn own_payload(&mut self) {
        let mut copy = Buffers::heap(self.bufs.len());
        let mut at = 0;
        for segment in self.bufs.segments() {
            copy.write_at(at, segment);
            at += segment.len();
        }
        self.bufs = copy;
        self.shared = false;
    }
}

impl Payload for IoBody {
    fn buffers(&mut self) -> &mut Buffers {
        &mut self.bufs
    }
    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self
    }
}

/// One operation on its way. Must be completed; see [`IoChannel`](super::IoChannel).
pub struct Io(Option<Box<IoBody>>);

impl Io {
    /// None, where there has to be something.
    #[inline]
    pub(super) fn nothing() -> Io {
        Io(None)
    }

    #[inline]
    pub(super) fn from_body(body: Box<IoBody>) -> Io {
        Io(Some(body))
    }

    #[inline]
    pub(super) fn into_body(mut self) -> Box<IoBody> {
        assert_eq!(self.body().children, 0, "children still show its payload");
        self.0.take().expect("an Io has its body until it is consumed")
    }

    #[inline]
    pub(super) fn body(&self) -> &IoBody {
        self.0.as_ref().expect("an Io has its body until it is consumed")
    }

    #[inline]
    pub(super) fn body_mut(&mut self) -> &mut IoBody {
        self.0.as_mut().expect("an Io has its body until it is consumed")
    }

    /// The operation.
    #[inline]
    pub fn op(&self) -> Op {
        self.body().op
    }

    /// First block.
    #[inline]
    pub fn lba(&self) -> u64 {
        self.body().lba
    }

    /// Blocks.
    #[inline]
    pub fn blocks(&self) -> u64 {
        self.body().blocks
    }

    /// The status that it carries: of the lower device, in [`IoChannel::completed`](super::IoChannel::completed).
    #[inline]
    pub fn status(&self) -> IoStatus {
        self.body().status
    }

    /// Which I/O this is, for [`IoChannel::abort`](super::IoChannel::abort).
    pub fn tag(&self) -> IoTag {
        self.body().tag
    }

    /// The payload.
    #[inline]
    pub fn bufs(&self) -> &Buffers {
        &self.body().bufs
    }

    /// The payload, writable.
    ///
    /// # Panics
    /// While [children](super::children) are out.
    #[inline]
    pub fn bufs_mut(&mut self) -> &mut Buffers {
        let body = self.body_mut();
        assert_eq!(body.children, 0, "children still show its payload");
        if body.shared {
            body.own_payload();
        }
        &mut body.bufs
    }

    /// The range that it had when the module that holds it got it, whatever lower devices have made of it.
    #[inline]
    pub fn own_range(&self) -> (u64, u64) {
        let frame = self.body().frames.last().expect("a module holds an Io under its own frame");
        frame.given
    }

    /// What the module that holds it has set with [`Io::set_mark`]; it stays while the I/O is with lower devices.
    #[inline]
    pub fn mark(&self) -> u32 {
        self.body().frames.last().expect("a module holds an Io under its own frame").mark
    }

    /// See [`Io::mark`].
    #[inline]
    pub fn set_mark(&mut self, mark: u32) {
        self.body_mut().frames.top().expect("a module holds an Io under its own frame").mark = mark;
    }

    /// Redirects the operation, before [`IoCx::forward`](super::IoCx::forward).
    pub fn set_range(&mut self, lba: u64, blocks: u64) {
        let body = self.body_mut();
        body.lba = lba;
        body.blocks = blocks;
    }

    /// Changes the operation, before [`IoCx::forward`](super::IoCx::forward).
    pub fn set_op(&mut self, op: Op) {
        self.body_mut().op = op;
    }

    /// Ends the operation, from any thread. On the operation's own reactor
    /// [`IoCx::complete`](super::IoCx::complete) is faster.
    pub fn complete(mut self, status: IoStatus) {
        assert_eq!(self.body().children, 0, "children still show its payload");
        if let Some(mut body) = self.0.take() {
            body.status = status;
            send_home(body);
        }
    }
}

fn send_home(body: Box<IoBody>) {
    let home = Arc::clone(&body.home.inner);
    if home.closed.load(Ordering::Acquire) {
        return;
    }
    home.ring.push(body);
    home.waker.wake_after_rmw();
}

impl Drop for Io {
    #[inline]
    fn drop(&mut self) {
        if let Some(body) = self.0.take() {
            dropped(body);
        }
    }
}

/// An `Io` is gone that nobody has completed.
#[cold]
fn dropped(mut body: Box<IoBody>) {
    if body.children > 0 {
        // Its module, or the runtime, has ended while children are out: they may still read this memory.
        std::mem::forget(std::mem::take(&mut body.bufs));
    }
    if body.home.inner.closed.load(Ordering::Acquire) {
        return;
    }
    tracing::error!(
        op = body.op.kind().name(),
        lba = body.lba,
        blocks = body.blocks,
        "an I/O was dropped instead of completed: its device has a bug; the I/O fails"
    );
    body.status = IoStatus::Failed;
    send_home(body);
}

impl std::fmt::Debug for Io {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let body = self.body();
        write!(f, "Io({:?} {}+{} {:?})", body.op, body.lba, body.blocks, body.tag)
    }
}

/// An operation that has come home to its client.
pub struct Completion {
    pub(super) body: Box<IoBody>,
}

impl Completion {
    /// How it ended.
    #[inline]
    pub fn status(&self) -> IoStatus {
        self.body.status
    }

    /// The client's mark.
    #[inline]
    pub fn user(&self) -> u64 {
        self.body.tag.user
    }

    /// The payload.
    #[inline]
    pub fn payload(&self) -> &Buffers {
        &self.body.bufs
    }

    /// Takes the payload; give the rest back with [`IoRuntime::recycle`](super::IoRuntime::recycle).
    #[inline]
    pub fn take_bufs(&mut self) -> Buffers {
        std::mem::take(&mut self.body.bufs)
    }
}

impl std::fmt::Debug for Completion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Completion({:?} {})", self.body.tag, self.body.status)
    }
}
