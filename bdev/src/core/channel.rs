//! What a module implements.

use std::any::Any;
use std::io;

use reactor::file::Errno;
use reactor::{Instant, Progress};
use schema::ConfigEntry;
use serde_json::Value;

use super::cx::{ChannelCx, IoCx};
use super::io::{Io, IoTag};
use super::registry::BdevInfo;
use super::runtime::ChannelId;
use super::types::{Geometry, IoStatus, OpSet};

/// A block device: shared by all reactors, stateless on the data path.
///
/// Its end is [`Bdev::removed`]; it is dropped when nobody refers to it any more.
pub trait Bdev: Any + Send + Sync {
    /// What kind of device this is, in the words that RPCs show ("Malloc disk").
    fn product_name(&self) -> &'static str;
    /// Size and limits as of now.
    fn geometry(&self) -> Geometry;
    /// Operations that the device does itself. What is missing is emulated where it can be (see
    /// [`saga`](super::saga)), and refused where it cannot. READ is never emulated; RESET and ABORT need not be listed.
    fn native_ops(&self) -> OpSet;
    /// Opens one reactor's channel, on that reactor.
    ///
    /// # Errors
    /// When the device cannot be used on this reactor.
    fn open_channel(&self, cx: &mut ChannelCx<'_>) -> io::Result<Box<dyn IoChannel>>;
    /// The device has been removed: every channel and every descriptor is closed. It lets go of what others may want now
    /// (other devices, files), since somebody may still hold the device itself for a moment.
    fn removed(&self) {}
    /// What RPCs show of this kind of device besides what all devices have.
    fn driver_specific(&self) -> Value {
        Value::Object(serde_json::Map::new())
    }
    /// The calls that make this device again under the name and UUID of `info`, in order; empty for one that is made by
    /// another's call.
    fn config(&self, info: &BdevInfo) -> Vec<ConfigEntry>;
    /// Names of the devices that this one is built on.
    fn base_bdevs(&self) -> Vec<String> {
        Vec::new()
    }
}

/// One reactor's way into a device.
///
/// Every `Io` given to `submit` must be completed once: through [`IoCx::complete`] on this reactor, or through
/// [`Io::complete`] from any thread. Operations may complete in any order. The layer has checked that the range lies on
/// the device, the payload fits it, the limits of the geometry hold, and the operation is one of
/// [`Bdev::native_ops`].
pub trait IoChannel {
    /// Takes an operation.
    fn submit(&mut self, io: Io, cx: &mut IoCx<'_>);

    /// An `Io` that was given to [`IoCx::forward`] has come back, with its status. Complete it or go on with it.
    fn completed(&mut self, io: Io, cx: &mut IoCx<'_>) {
        let status = io.status();
        cx.complete(io, status);
    }

    /// A file operation started with [`IoCx::submit_file`] has ended.
    fn file_done(&mut self, io: Io, result: Result<(), Errno>, cx: &mut IoCx<'_>) {
        let status = match result {
            Ok(()) => IoStatus::Success,
            Err(errno) => IoStatus::from_errno(errno.0, io.op().kind()),
        };
        cx.complete(io, status);
    }

    /// Whether [`IoChannel::poll`] is to be called at every step.
    fn wants_poll(&self) -> bool {
        false
    }

    /// Looks for work that no completion announces.
    fn poll(&mut self, cx: &mut IoCx<'_>) -> Progress {
        let _ = cx;
        Progress::Idle
    }

    /// When [`IoChannel::poll`] should be called even if nothing wakes the reactor.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// The reactor is about to sleep: look once more for work that nothing else announces (rings); `false`: there is some.
    /// Asked of channels that want to be polled.
    fn may_sleep(&mut self) -> bool {
        true
    }

    /// Channels of lower devices that operations are forwarded to: an abort that this module cannot do itself is tried
    /// on them.
    fn base_channels(&self) -> &[ChannelId] {
        &[]
    }

    /// Tries to end the operation of `tag` early (with [`IoStatus::Aborted`]); `false` when it is not here or cannot be
    /// ended.
    fn abort(&mut self, tag: IoTag, cx: &mut IoCx<'_>) -> bool {
        let _ = (tag, cx);
        false
    }

    /// Ends early whatever can be: the device is being reset or removed. New operations follow only after a reset has
    /// drained. A module that has a lower device to itself passes this on with [`IoCx::abort_all`].
    fn abort_all(&mut self, cx: &mut IoCx<'_>) {
        let _ = cx;
    }

    /// The device's geometry has changed.
    fn resized(&mut self, geometry: &Geometry) {
        let _ = geometry;
    }

    /// Something from the device to all its channels ([`IoRuntime::send_notice`](super::IoRuntime::send_notice)). What follows for
    /// I/Os is done in [`IoChannel::poll`], which is called next. Channels of lower devices may be opened and given back.
    fn notice(&mut self, notice: Box<dyn Any + Send>, cx: &mut ChannelCx<'_>) {
        let _ = (notice, cx);
    }

    /// The channel is closing: give back what [`IoCx`] lent (attached files, base channels). No operation is
    /// outstanding.
    fn close(&mut self, cx: &mut ChannelCx<'_>) {
        let _ = cx;
    }
}
