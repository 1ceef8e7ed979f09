//! Whether there was more of the log than what was found.

use super::{Recovery, Refusal, Step, refuse};
use crate::modules::appliance::log::format::{
    BATCH_HEADER, BatchHeader, Found, LogPos, NONE, RECORD_BYTES, read_batch,
};

impl Recovery {
    /// The first sequence number that is not believed.
    fn end_seq(&self) -> u64 {
        self.suspect.map_or(self.pos.seq, |(suspect, ..)| suspect.seq)
    }

    /// Looks behind the end of the log, in the same segment, for a batch that says there was more that was durable.
    pub(super) fn scan(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let superblock = self.current();
        let layout = superblock.layout;
        let (mut at, end) = (0, self.end_seq());
        while at < bytes.len() {
            match read_batch(&bytes[at..], &layout, &superblock.store, &mut self.records) {
                Found::Batch(header) if header.seq > end && header.epoch >= self.epoch => {
                    let place = (self.pos.segment, self.scan_at + at as u32);
                    self.wide = None;
                    return self.found_later(&header, place);
                }
                Found::Cut if at > 0 => break,
                _ => at += layout.align as usize,
            }
        }
        self.scan_at += at as u32;
        if self.scan_at >= layout.segment_bytes {
            self.scanned();
        }
        Ok(())
    }

    /// A batch from behind the end: it is a witness, or leads to one, or is what was lost with the power.
    fn found_later(&mut self, header: &BatchHeader, (segment, offset): (u32, u32)) -> Result<(), Refusal> {
        if header.durable >= self.end_seq() {
            return self.gap(header.seq);
        }
        let (segment, offset) = if header.next == NONE { (segment, offset + header.len) } else { (header.next, 0) };
        self.probe = LogPos { segment, offset, seq: header.seq.saturating_add(1), link: header.check };
        self.step = Step::Probe;
        self.probe_on();
        Ok(())
    }

    /// Goes on following, unless the segment is at its end.
    fn probe_on(&mut self) {
        let layout = self.current().layout;
        if u64::from(self.probe.offset) + u64::from(layout.align) > layout.segment_bytes.into() {
            self.followed();
        }
    }

    pub(super) fn follow(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let superblock = self.current();
        match read_batch(bytes, &superblock.layout, &superblock.store, &mut self.records) {
            Found::Batch(header) if header.seq == self.probe.seq && header.link == self.probe.link => {
                self.found_later(&header, (self.probe.segment, self.probe.offset))?;
            }
            _ => self.followed(),
        }
        Ok(())
    }

    /// What was followed has no witness.
    fn followed(&mut self) {
        match self.wide {
            Some(segment) => self.look_on(segment),
            None if self.probe.segment == self.pos.segment && self.probe.offset > self.scan_at => {
                self.scan_at = self.probe.offset;
                self.step = Step::Scan;
                if self.scan_at >= self.current().layout.segment_bytes {
                    self.scanned();
                }
            }
            None => self.scanned(),
        }
    }

    /// There is no witness in the segment.
    fn scanned(&mut self) {
        let layout = self.current().layout;
        // The last record that did not fit, and the batch that then names the next segment.
        let tail = 2 * u64::from(layout.align) + u64::from(layout.block_size) + (BATCH_HEADER + RECORD_BYTES) as u64;
        let may_have_led_on = u64::from(self.pos.offset) + tail > layout.segment_bytes.into();
        if may_have_led_on || self.pos.offset == 0 { self.step = Step::Wide(0, false) } else { self.ended() }
    }

    /// Looks for a later batch at the start of a segment.
    pub(super) fn look(&mut self, segment: u32, bytes: &[u8]) -> Result<(), Refusal> {
        let superblock = self.current();
        match read_batch(bytes, &superblock.layout, &superblock.store, &mut self.records) {
            Found::Batch(header) if header.seq > self.end_seq() && header.epoch >= self.epoch => {
                self.wide = Some(segment);
                return self.found_later(&header, (segment, 0));
            }
            Found::Cut if bytes.len() < superblock.layout.batch_bytes as usize => {
                self.step = Step::Wide(segment, true);
            }
            _ => self.look_on(segment),
        }
        Ok(())
    }

    fn look_on(&mut self, segment: u32) {
        if segment + 1 < self.current().layout.segments {
            self.step = Step::Wide(segment + 1, false);
        } else {
            self.ended();
        }
    }

    fn gap(&mut self, witness: u64) -> Result<(), Refusal> {
        if !self.config.accept_loss {
            return refuse(format!(
                "the log is damaged at byte {} of the base bdev: batch {} was durable when batch {witness} was written, and cannot \
                 be read, so blocks that were written last may have older contents; restore the base from a copy, or accept the \
                 loss with the option accept_loss=true",
                self.at((self.pos.segment, self.pos.offset)),
                self.pos.seq
            ));
        }
        // What is behind the gap must never be taken for a part of the log; new sequence numbers start behind it.
        self.start_afresh = true;
        self.ended();
        self.pos.seq = self.pos.seq.max(witness.saturating_add(1));
        Ok(())
    }
}
