//! One read of a device by the control plane.

use std::sync::Arc;

use reactor::{Buffers, Context, Poller, PollerId, Progress, Schedule};

use crate::core::runtime::SharedRuntime;
use crate::core::spares::Spares;
use crate::core::{BdevError, BdevInfo, BdevSystem, ChannelId, ClientId, IoRequest, IoRuntime, IoStatus, Op};

struct OneRead<F: FnOnce(IoStatus, Buffers)> {
    me: PollerId,
    runtime: SharedRuntime,
    channel: ChannelId,
    client: ClientId,
    spares: Spares,
    then: Option<F>,
}

impl<F: FnOnce(IoStatus, Buffers) + 'static> Poller for OneRead<F> {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        let mut done = Vec::new();
        let mut runtime = self.runtime.borrow_mut();
        runtime.take_completions(self.client, &mut done);
        let Some(mut completion) = done.pop() else { return Progress::Idle };
        let (status, bufs) = (completion.status(), completion.take_bufs());
        runtime.recycle_spare(&mut self.spares, completion);
        runtime.put_spares(std::mem::take(&mut self.spares));
        runtime.put_channel(self.channel);
        runtime.remove_client(self.client);
        cx.remove_poller(self.me);
        if let Some(then) = self.then.take() {
            then(status, bufs);
        }
        Progress::Busy
    }
}

/// Reads `blocks` blocks from `lba` of a device, on the first reactor. It is not counted in the device's statistics.
///
/// # Errors
/// As opening a channel; [`BdevError::Host`] when the read fails; [`BdevError::Stopping`] without a reactor.
pub(super) async fn read(
    system: &BdevSystem,
    bdev: &Arc<BdevInfo>,
    lba: u64,
    blocks: u64,
) -> Result<Buffers, BdevError> {
    let info = Arc::clone(bdev);
    let bytes = blocks as usize * bdev.device().geometry().block_size as usize;
    let reactor = system.reactors().first().ok_or(BdevError::Stopping)?;
    let read = reactor.call_deferred(move |cx, reply| {
        let runtime = IoRuntime::of(cx);
        let mut inner = runtime.borrow_mut();
        let channel = match inner.get_channel(&info) {
            Ok(channel) => channel,
            Err(error) => return reply.send(Err(error)),
        };
        let mut spares = match inner.take_spares(1) {
            Ok(spares) => spares,
            Err(error) => {
                inner.put_channel(channel);
                return reply.send(Err(error));
            }
        };
        let client = inner.add_client();
        let request = IoRequest { op: Op::Read, lba, blocks, bufs: Buffers::heap(bytes), user: 0 };
        inner.set_now(cx.now());
        inner.submit_uncounted(&mut spares, channel, client, request);
        inner.run();
        inner.flush();
        drop(inner);
        let then = move |status: IoStatus, bufs| {
            let failed = || std::io::Error::other(format!("the read ended with {status}"));
            reply.send(if status.is_success() { Ok(bufs) } else { Err(failed()) });
        };
        let me = cx.reserve_poller();
        let poller = OneRead { me, runtime, channel, client, spares, then: Some(then) };
        cx.add_reserved_poller(me, "raid examine", Schedule::Active, Box::new(poller));
    });
    let doing = format!("reading the superblock of '{}'", bdev.name());
    read.await?.map_err(|error| BdevError::host(doing, error))
}
