//! I/Os for those who do I/O below a device as part of I/O on it.
//!
//! Requests on the device may hold every I/O of the pool while they wait for I/O below it. That must not wait for the pool in its
//! turn, or both would wait for ever. So whoever does such I/O has a few I/Os of its own; with one it goes on. They are not
//! shared, so that stores may stand on stores.

use std::io;

use super::io::{Completion, IoBody, IoRequest};
use super::runtime::{ChannelId, ClientId, IoRuntime};

/// Spare I/Os of one reactor, all holders together.
pub const MAX_SPARES: usize = 1024;

/// A holder's own I/Os. Give them back with [`IoRuntime::put_spares`].
#[derive(Default)]
pub struct Spares {
    // Boxed because I/Os travel by pointer.
    #[allow(clippy::vec_box)]
    bodies: Vec<Box<IoBody>>,
    all: usize,
}

impl Spares {
    pub(super) fn pop(&mut self) -> Option<Box<IoBody>> {
        self.bodies.pop()
    }

    pub(super) fn push(&mut self, body: Box<IoBody>) {
        self.bodies.push(body);
    }
}

impl IoRuntime {
    /// `count` spare I/Os.
    ///
    /// # Errors
    /// When [`MAX_SPARES`] are lent already.
    pub fn take_spares(&mut self, count: usize) -> io::Result<Spares> {
        if self.spares + count > MAX_SPARES {
            return Err(io::Error::other("too many devices stand on others by way of this reactor"));
        }
        self.spares += count;
        let blank = |_| {
            let mut body = IoRuntime::blank(&self.home);
            body.spare = true;
            body
        };
        Ok(Spares { bodies: (0..count).map(blank).collect(), all: count })
    }

    /// Takes them back, all of them.
    pub fn put_spares(&mut self, spares: Spares) {
        debug_assert_eq!(spares.bodies.len(), spares.all, "spare I/Os are out");
        self.spares -= spares.all;
    }

    /// As [`IoRuntime::submit`], but with a spare I/O where the pool has none. `Ok` says whether it is a spare: then the
    /// completion goes to [`IoRuntime::recycle_spare`].
    ///
    /// # Errors
    /// The request, when there is no I/O for it; something of this holder is outstanding then.
    // The request goes back as it came: a box would be an allocation an I/O.
    #[allow(clippy::result_large_err)]
    pub fn submit_or_spare(
        &mut self,
        spares: &mut Spares,
        channel: ChannelId,
        client: ClientId,
        request: IoRequest,
    ) -> Result<bool, IoRequest> {
        if self.waiting.is_empty() && !self.inner.free.is_empty() {
            self.submit(channel, client, request);
            return Ok(false);
        }
        let Some(body) = spares.bodies.pop() else { return Err(request) };
        self.start_with(body, channel, client, request);
        Ok(true)
    }

    /// Submits with a spare I/O, and no statistics count it: for looking at a device that somebody else uses.
    ///
    /// # Panics
    /// When all spares are out.
    pub fn submit_uncounted(&mut self, spares: &mut Spares, channel: ChannelId, client: ClientId, request: IoRequest) {
        let mut body = spares.bodies.pop().expect("the caller has a spare");
        body.uncounted = true;
        self.start_with(body, channel, client, request);
    }

    /// Gives the I/O of a completion back to its holder, and its payload to the pool if it was not taken.
    pub fn recycle_spare(&mut self, spares: &mut Spares, mut completion: Completion) {
        let bufs = completion.take_bufs();
        if !bufs.is_empty() {
            self.pool().put(bufs);
        }
        completion.body.uncounted = false;
        spares.bodies.push(completion.body);
    }
}

impl std::fmt::Debug for Spares {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Spares({} of {})", self.bodies.len(), self.all)
    }
}
