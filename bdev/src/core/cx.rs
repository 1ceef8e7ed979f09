//! What the layer lends to a module: while it handles an I/O, and while a channel opens or closes.

use std::io;
use std::rc::Rc;
use std::sync::Arc;

use reactor::file::{File, FileOp, FileRequest, FileSlot};
use reactor::park::Waker;
use reactor::{BufferPool, Instant, ReactorHandle, ReactorId};

use super::io::Io;
use super::registry::BdevInfo;
use super::runtime::{ChannelId, Inner, IoRuntime};
use super::spares::Spares;
use super::types::IoStatus;

/// What modules reach while they handle an I/O.
pub struct IoCx<'a> {
    pub(super) inner: &'a mut Inner,
    pub(super) channel: ChannelId,
}

impl IoCx<'_> {
    /// Ends an operation on its own reactor.
    #[inline]
    pub fn complete(&mut self, mut io: Io, status: IoStatus) {
        assert_eq!(io.body().children, 0, "children still show its payload");
        io.body_mut().status = status;
        self.inner.queue.complete(io);
    }

    /// Passes an operation on to a lower device's channel; it comes back through
    /// [`IoChannel::completed`](super::IoChannel::completed).
    #[inline]
    pub fn forward(&mut self, to: ChannelId, mut io: Io) {
        assert_eq!(io.body().children, 0, "children still show its payload");
        io.body_mut().frames.top().expect("a module holds an Io under its own frame").forwarded = true;
        self.inner.queue.submit(to, io);
    }

    /// Ends early whatever can be of what is in a lower device's channel.
    pub fn abort_all(&mut self, base: ChannelId) {
        self.inner.queue.abort_all(base);
    }

    /// Has [`IoChannel::poll`](super::IoChannel::poll) called once, after what is submitted together with this.
    #[inline]
    pub fn poll_soon(&mut self) {
        self.inner.queue.poll(self.channel);
    }

    /// Starts a file operation with the I/O's payload; it comes back through [`IoChannel::file_done`](super::IoChannel::file_done).
    #[inline]
    pub fn submit_file(&mut self, slot: FileSlot, op: FileOp, offset: u64, io: Io) {
        let request = FileRequest { slot, op, offset, payload: io.into_body(), token: self.channel.0.into() };
        self.inner.engine.submit(request);
    }

    /// The instant of this poll.
    #[inline]
    pub fn now(&self) -> Instant {
        self.inner.now
    }

    /// Payload memory.
    pub fn pool(&mut self) -> &mut BufferPool {
        &mut self.inner.pool
    }
}

/// What modules reach while a channel opens or closes.
pub struct ChannelCx<'a> {
    pub(super) runtime: &'a mut IoRuntime,
    /// Height of the highest lower device whose channel was opened through this.
    pub(super) height: usize,
    /// The most that it may become: what is open is not to grow.
    pub(super) limit: usize,
}

impl ChannelCx<'_> {
    /// Opens the channel of a lower device.
    ///
    /// # Errors
    /// As the lower device says, or when devices are stacked too deep.
    pub fn get_channel(&mut self, bdev: &Arc<BdevInfo>) -> io::Result<ChannelId> {
        let channel = self.runtime.get_channel(bdev)?;
        let height = self.runtime.channels[channel.0 as usize].height;
        if height > self.limit {
            self.runtime.put_channel(channel);
            let text = format!("'{}' has {height} layers, and {} have room here", bdev.name(), self.limit);
            return Err(io::Error::other(text));
        }
        self.height = self.height.max(height);
        Ok(channel)
    }

    /// Lower devices of this many layers may be opened later, in [`IoChannel::notice`](super::IoChannel::notice).
    pub fn expect_height(&mut self, layers: usize) {
        self.height = self.height.max(layers);
    }

    /// I/Os of the channel's own, for [`IoCx::child`].
    ///
    /// # Errors
    /// As [`IoRuntime::take_spares`].
    pub fn take_spares(&mut self, count: usize) -> io::Result<Spares> {
        self.runtime.take_spares(count)
    }

    /// Gives them back, all of them.
    pub fn put_spares(&mut self, spares: Spares) {
        self.runtime.put_spares(spares);
    }

    /// Gives a lower device's channel back.
    pub fn put_channel(&mut self, channel: ChannelId) {
        self.runtime.put_channel(channel);
    }

    /// Makes a file known to this reactor's engine.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn attach_file(&mut self, file: Arc<dyn File>) -> io::Result<FileSlot> {
        self.runtime.inner.engine.attach(file)
    }

    /// Forgets a file.
    pub fn detach_file(&mut self, slot: FileSlot) {
        self.runtime.inner.engine.detach(slot);
    }

    /// What file I/O is done with on this reactor.
    pub fn file_mode(&self) -> String {
        self.runtime.inner.engine.mode()
    }

    /// What reaches the reactor that the channel is on.
    pub fn handle(&self) -> ReactorHandle {
        self.runtime.group[self.runtime.reactor.0 as usize].clone()
    }

    /// What the module has on this reactor besides its channels ([`IoRuntime::attach`]).
    pub fn attached<T: 'static>(&self) -> Option<Rc<T>> {
        self.runtime.attached()
    }

    /// What wakes the reactor that the channel is on.
    pub fn waker(&self) -> Waker {
        self.runtime.waker()
    }

    /// The reactor that the channel is on.
    pub fn reactor(&self) -> ReactorId {
        self.runtime.reactor
    }
}
