//! The seams between a device and whoever runs its handler.
//!
//! A [`Backend`] is one a device, shared by all reactors; a [`Port`] is one a channel, on its reactor. The channel keeps
//! the I/Os, their deadlines and the bodies; the port carries bodies to the handler and back.
//!
//! ```text
//! channel --send--> Port --rings--> handler
//! channel <--completion ring (Body::home)--+        a handler in this process
//! channel <--drain-- Port <--rings---------+        a handler in another process
//! ```

use std::io;
use std::sync::Arc;

use appliance::request::{Body, Home};
use appliance::{Capabilities, RequestId};
use futures_util::future::BoxFuture;
use reactor::park::Waker;
use reactor::{Instant, ReactorHandle, ReactorId};
use serde_json::Value;

use crate::core::{BdevError, Geometry};

/// What a port is told when it opens.
pub struct PortCx {
    /// The channel's reactor.
    pub reactor: ReactorId,
    /// What reaches that reactor, for adding a poller that watches descriptors.
    pub handle: ReactorHandle,
    /// What wakes that reactor.
    pub waker: Waker,
    /// Bodies of the channel: as many may be out at once, with slots from zero.
    pub queue_depth: usize,
    /// Where completed bodies go; every body's [`Body::home`] is this one.
    pub home: Arc<dyn Home>,
    /// Size and block size of the device.
    pub geometry: Geometry,
}

/// One channel's way to the handler.
///
/// Every body that was sent comes home once, through its [`Body::home`] or through [`Port::drain`], or never (the handler
/// hangs); the channel ends its I/O at its deadline and reckons with either.
pub trait Port {
    /// Sends a body on its way, behind all that were sent before it.
    ///
    /// # Errors
    /// The body, when there is no room now: it is sent again after something has come home.
    fn send(&mut self, body: Box<Body>, now: Instant) -> Result<(), Box<Body>>;

    /// Bodies were sent in this poll: wake the other side if it sleeps.
    fn flush(&mut self);

    /// Hands over up to `max` bodies that have come home without going through [`Body::home`].
    fn drain(&mut self, now: Instant, max: usize, take: &mut dyn FnMut(Box<Body>)) {
        let _ = (now, max, take);
    }

    /// The reactor is about to sleep: arm what wakes it; `false`: [`Port::drain`] would find something.
    fn may_sleep(&mut self) -> bool {
        true
    }

    /// When [`Port::drain`] is to be called even if nothing wakes the reactor.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// Asks the handler to end a request early. It may take no notice.
    fn abort(&mut self, request: RequestId);

    /// Asks the handler to end early whatever it can, and not to begin any more with requests of ids below `before`: these
    /// are given up 500 ms from now.
    fn reset(&mut self, before: RequestId);

    /// The device has another size.
    fn resized(&mut self, geometry: &Geometry) {
        let _ = geometry;
    }

    /// The channel closes. Bodies that are still out come home to nobody: one that goes through [`Body::home`] is dropped
    /// there, and what the port holds is dropped with it.
    fn close(self: Box<Self>);
}

/// Whoever runs a device's handler. Shared by all reactors.
pub trait Backend: Send + Sync {
    /// What the handler is called in messages.
    fn handler_name(&self) -> Arc<str>;

    /// What the handler does by itself.
    fn capabilities(&self) -> Capabilities;

    /// Opens a channel's port, on its reactor.
    ///
    /// # Errors
    /// When there is no handler, or the host has no room for the rings.
    fn open_port(&self, cx: &PortCx) -> io::Result<Box<dyn Port>>;

    /// Tells the handler of another size; answers when it has taken note.
    fn resize(&self, num_blocks: u64) -> BoxFuture<'static, Result<(), BdevError>>;

    /// Numbers of the handler and of whoever runs it, for `bdev_appliance_get_stats`. Must not block.
    fn stats(&self) -> Value;

    /// The device is gone: every channel is closed. Ends the handler, without waiting for it.
    fn stop(&self);

    /// Resolves when the handler has let go of everything; never, if it hangs.
    fn stopped(&self) -> BoxFuture<'static, ()>;
}
