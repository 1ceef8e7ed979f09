//! A reactor's channels to devices: opened with the first reference, closed with the last, and what control does to them.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use reactor::ReactorId;

use super::{Channel, ChannelId, IoRuntime};
use crate::core::cx::ChannelCx;
use crate::core::io::MAX_LAYERS;
use crate::core::registry::{BdevId, BdevInfo};
use crate::core::stats::{IoStats, StatsReset};
use crate::core::types::{Geometry, IoStatus};

impl IoRuntime {
    /// This reactor's channel to `bdev`, opened when it is the first. Give it back with
    /// [`IoRuntime::put_channel`].
    ///
    /// # Errors
    /// As the device says; `NotFound` when it is being removed.
    pub fn get_channel(&mut self, bdev: &Arc<BdevInfo>) -> io::Result<ChannelId> {
        if let Some(&id) = self.by_bdev.get(&bdev.id()) {
            let slot = &mut self.channels[id.0 as usize];
            if !slot.removing {
                slot.refs += 1;
                return Ok(id);
            }
        }
        if bdev.is_removing() {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("'{}' is being removed", bdev.name())));
        }
        let mut cx = ChannelCx { runtime: self, height: 0, limit: MAX_LAYERS };
        let mut module = bdev.device().open_channel(&mut cx)?;
        let height = cx.height + 1;
        if height > MAX_LAYERS {
            module.close(&mut cx);
            let text = format!("'{}' would be the {height}th layer; {MAX_LAYERS} are possible", bdev.name());
            return Err(io::Error::other(text));
        }
        let geometry = bdev.device().geometry();
        let polled = module.wants_poll();
        let slot = Channel {
            bdev: Arc::clone(bdev),
            module: Some(module),
            geometry,
            native: bdev.device().native_ops(),
            refs: 1,
            height,
            removing: false,
            removed: Vec::new(),
            in_flight: [0; 3],
            epoch: 0,
            gates: bdev.locks().gates_for_new_channel(),
            parked: VecDeque::new(),
            waiting: 0,
            stats: IoStats::default(),
        };
        let id = ChannelId(self.channels.insert(slot) as u32);
        self.by_bdev.insert(bdev.id(), id);
        if polled {
            self.polled.push(id);
        }
        Ok(id)
    }

    /// Gives a channel back. It closes once nothing is outstanding on it.
    pub fn put_channel(&mut self, channel: ChannelId) {
        let slot = &mut self.channels[channel.0 as usize];
        slot.refs -= 1;
        if slot.refs == 0 {
            self.close_if_done(channel);
        }
    }

    pub(super) fn close_if_done(&mut self, channel: ChannelId) {
        let slot = &mut self.channels[channel.0 as usize];
        if slot.outstanding() > 0 {
            return;
        }
        let unused = slot.refs == 0;
        if (unused || slot.removing)
            && let Some(mut module) = slot.module.take()
        {
            slot.bdev.retire_stats(&slot.stats);
            slot.stats = IoStats::default();
            let removed = std::mem::take(&mut slot.removed);
            self.polled.retain(|&id| id != channel);
            module.close(&mut ChannelCx { runtime: self, height: 0, limit: MAX_LAYERS });
            drop(module);
            removed.into_iter().for_each(|tell| tell());
        }
        if unused {
            let slot = self.channels.remove(channel.0 as usize);
            if self.by_bdev.get(&slot.bdev.id()) == Some(&channel) {
                self.by_bdev.remove(&slot.bdev.id());
            }
        }
    }

    /// Brings `notice` to this reactor's channel of a device, and has it polled once; `false` when there is none.
    pub fn notice(&mut self, bdev: BdevId, notice: Box<dyn Any + Send>) -> bool {
        let Some(&channel) = self.by_bdev.get(&bdev) else { return false };
        let slot = &mut self.channels[channel.0 as usize];
        let limit = slot.height - 1;
        // It is lent the runtime meanwhile; what that does to other channels does not come back to this one.
        let Some(mut module) = slot.module.take() else { return false };
        module.notice(notice, &mut ChannelCx { runtime: self, height: 0, limit });
        self.channels[channel.0 as usize].module = Some(module);
        self.inner.queue.poll(channel);
        true
    }

    /// Brings `notice` to the channel of a device on another reactor, or on this; `then` is called there afterwards, with whether
    /// there was a channel. Waits in the outbox while that reactor's mailbox is full: the sender bounds how many.
    pub fn send_notice(
        &mut self,
        to: ReactorId,
        bdev: BdevId,
        notice: Box<dyn Any + Send>,
        then: impl FnOnce(bool) + Send + 'static,
    ) {
        self.send_to(to, move |runtime| then(runtime.notice(bdev, notice)));
    }

    /// The geometry under which a channel works now.
    #[inline]
    pub fn geometry(&self, channel: ChannelId) -> &Geometry {
        &self.channels[channel.0 as usize].geometry
    }

    /// Starts to remove a device from this reactor: new I/O fails, what is outstanding is aborted or drains, the channel
    /// closes, and then `done` is called (at once when there is no channel).
    pub(in crate::core) fn remove_bdev(&mut self, bdev: BdevId, done: Box<dyn FnOnce()>) {
        let Some(&channel) = self.by_bdev.get(&bdev) else { return done() };
        let slot = &mut self.channels[channel.0 as usize];
        if slot.module.is_none() {
            return done();
        }
        slot.removing = true;
        slot.removed.push(done);
        self.abort_all(channel);
        self.end_parked(channel, IoStatus::NoDevice);
        self.run();
        // `run` may already have closed it.
        if self.channels.contains(channel.0 as usize) {
            self.close_if_done(channel);
        }
    }

    /// Tells this reactor's channel that its device has changed its size.
    pub(in crate::core) fn resize_bdev(&mut self, bdev: BdevId) {
        let Some(channel) = self.by_bdev.get(&bdev) else { return };
        let slot = &mut self.channels[channel.0 as usize];
        // Asked here rather than sent here, so that of two changes the later one stays.
        let geometry = slot.bdev.device().geometry();
        slot.geometry = geometry;
        if let Some(module) = slot.module.as_mut() {
            module.resized(&geometry);
        }
    }

    /// This reactor's counters of a device.
    pub fn bdev_stats(&self, bdev: BdevId) -> Option<IoStats> {
        let channel = self.by_bdev.get(&bdev)?;
        Some(self.channels[channel.0 as usize].stats)
    }

    /// Forgets counters of a device.
    pub fn reset_bdev_stats(&mut self, bdev: BdevId, mode: StatsReset) {
        if let Some(channel) = self.by_bdev.get(&bdev) {
            self.channels[channel.0 as usize].stats.reset(mode);
        }
    }

    /// The open channels: device name and references.
    pub fn channel_refs(&self) -> Vec<(String, u32)> {
        self.channels.iter().map(|(_, slot)| (slot.bdev.name().to_string(), slot.refs)).collect()
    }

    pub(in crate::core) fn channel_of(&self, bdev: BdevId) -> Option<ChannelId> {
        self.by_bdev.get(&bdev).copied()
    }
}
