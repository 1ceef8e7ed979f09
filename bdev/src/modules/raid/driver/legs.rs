//! Legs that are out: looked at, and taken back.

use super::*;

impl Driver {
    /// Looks at legs that went out and are still there.
    pub(super) fn probe(&mut self, runtime: &mut IoRuntime) {
        if !self.shared.persist || self.stopping || !self.array.is_online() {
            return;
        }
        let layout = self.shared.layout;
        for leg in 0..self.ports.len() {
            let out = self.array.superblock().legs[leg].state == LegState::Out
                && self.array.view().legs[leg] == Standing::Out;
            let port = &mut self.ports[leg];
            if !out || port.gone || port.probing || port.channel.is_none() {
                continue;
            }
            let at = *port.probe_at.get_or_insert(self.now + port.backoff);
            if self.now < at {
                continue;
            }
            port.probing = true;
            let blocks = 2 * layout.unit_blocks();
            let bufs = Buffers::heap(2 * layout.unit());
            let request = IoRequest { op: Op::Read, lba: 0, blocks, bufs, user: 0 };
            self.submit(Doing::Probe { leg }, leg, request, runtime);
        }
    }

    pub(super) fn probed(&mut self, leg: usize, status: IoStatus, bufs: &Buffers) {
        let port = &mut self.ports[leg];
        port.probing = false;
        port.probe_at = None;
        port.backoff = (port.backoff * 2).min(PROBE_MOST);
        if !status.is_success() || port.gone || self.stopping {
            return;
        }
        let bytes = bufs.to_vec();
        let (a, b) = bytes.split_at(self.shared.layout.unit());
        match Superblock::newer(a, b) {
            Ok(Some(found)) => {
                if let Err(why) = self.take_back(leg, &found) {
                    tracing::warn!(raid = &*self.name, leg, "stays out: {why}");
                }
            }
            Ok(None) => tracing::warn!(raid = &*self.name, leg, "stays out: its superblock is gone"),
            Err(why) => tracing::warn!(raid = &*self.name, leg, "stays out: it has {why}"),
        }
    }

    /// A leg that is out is there, with this superblock: it is taken in again if this history has left it behind.
    ///
    /// # Errors
    /// In words.
    pub(in super::super) fn take_back(&mut self, leg: usize, found: &Superblock) -> Result<(), String> {
        let ours = self.array.superblock();
        let known = ours.legs.get(leg).ok_or("it is no leg of this array")?;
        if found.array != ours.array || found.me != leg || found.legs[leg].id != known.id {
            return Err("it is no leg of this array any more; add it with bdev_raid_add_base_bdev".to_string());
        }
        if known.state != LegState::Out {
            return Err(format!("this leg is {:?}, and there cannot be two of it", known.state));
        }
        if !ours.remembers(found.epoch, found.events) {
            return Err(format!(
                "it has a history of its own (epoch {}, event {}; the array is at epoch {}, event {}): something was written to it \
                 while the array ran without it. To give that up, wipe its first MiB and add it with bdev_raid_add_base_bdev: \
                 everything is copied to it",
                found.epoch, found.events, ours.epoch, ours.events
            ));
        }
        self.array.admit(leg, None);
        Ok(())
    }

    /// As [`Driver::take_back`], by order, for a device that the array has kept. One without a superblock is a new leg.
    ///
    /// # Errors
    /// In words.
    pub(in super::super) fn take_again(
        &mut self,
        bdev: &Arc<BdevInfo>,
        found: Option<&Superblock>,
        id: uuid::Uuid,
    ) -> Result<(), String> {
        let mine = |leg: &usize| self.bdev_of(*leg).is_some_and(|of| of.id() == bdev.id());
        let leg = (0..self.ports.len()).find(mine).ok_or("the array has just let go of it; add it again")?;
        let array = &self.array;
        if array.superblock().legs[leg].state != LegState::Out || array.view().legs[leg] != Standing::Out {
            return Err("it is in the array".to_string());
        }
        match found {
            Some(found) => self.take_back(leg, found),
            None if self.ports[leg].gone => Err("it is being removed".to_string()),
            None => {
                self.array.admit(leg, Some(id));
                Ok(())
            }
        }
    }
}
