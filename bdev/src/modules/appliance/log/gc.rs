//! The collector: moves what is still mapped out of segments that have little of it.
//!
//! It works when few segments are free, on the segment with the least in it. It reads the segment in windows of one batch; each
//! block that is still mapped to it is checked and appended to the log again, as "moved from there", which has no
//! effect if the block has changed in the meantime. So it needs no lock on anything, and a crash at any moment leaves either
//! place in force.
//!
//! # Cost
//! A segment is only worth it when it is at most 15/16 full, and when there is no hurry, 3/4. What may be stored leaves 1/8 of the room
//! (see [`space`](super::space)), so that such a segment exists whenever requests wait for one.
//!
//! # Damage
//! A block whose payload does not fit its checksum is recorded as lost: it reads as an error until it is written again,
//! wherever it was. Batches are found by their headers; when one is damaged, what the map still has in the segment is found by
//! looking through the map.

use reactor::Buffers;

use super::append::Room;
use super::engine::{Engine, Kind, Mode};
use super::format::{Found, NONE, Record, RecordKind, payload_crc, read_batch};
use super::map::{Entry, Loc};
use super::read::aligned;
use super::recovery::BaseOp;
use super::space::HOST_RESERVE;
use crate::core::IoStatus;

/// Reads that may fail before a segment is left alone.
const MAX_RETRIES: u32 = 3;
/// Blocks that one look through the map finds.
const STRAYS: usize = 1024;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Idle,
    /// From batch to batch.
    Walk,
    /// Waits until all that was moved is in the map.
    Drain,
    /// Block by block.
    Strays,
}

#[derive(Default)]
pub(super) struct Collector {
    phase: Phase,
    victim: u32,
    /// Offset in the segment of the next batch.
    at: u32,
    window: Option<Buffers>,
    window_start: u64,
    reading: bool,
    /// Records of the batch at hand, and where it starts in the window.
    records: Vec<Record>,
    batch_at: usize,
    batch_len: u32,
    next: usize,
    strays: Vec<(u64, Entry)>,
    retries: u32,
    /// It waits for a segment, and nothing that it can ask for frees one.
    blocked: bool,
    /// The last batch that something was moved to.
    moved_seq: u64,
}

impl Collector {
    pub(super) fn is_idle(&self) -> bool {
        self.phase == Phase::Idle && !self.reading
    }

    /// Whether nothing that it does will free a segment.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked && !self.reading
    }

    /// The segment that must not be used again yet.
    pub(super) fn victim(&self) -> Option<u32> {
        (self.phase != Phase::Idle || self.reading).then_some(self.victim)
    }

    /// Whether more will come for the batch that is being filled.
    pub(super) fn is_moving(&self) -> bool {
        matches!(self.phase, Phase::Walk | Phase::Strays)
    }

    pub(super) fn give_up(&mut self) {
        self.phase = Phase::Idle;
        self.blocked = false;
        self.window = None;
        self.records.clear();
        self.strays.clear();
    }
}

impl Engine {
    /// Does what can be done without waiting.
    pub(super) fn collect(&mut self) {
        while self.mode == Mode::Running && !self.gc.reading {
            let goes_on = match self.gc.phase {
                Phase::Idle => self.choose_victim(),
                Phase::Walk => self.walk(),
                Phase::Drain => self.drained(),
                Phase::Strays => self.move_stray(),
            };
            if !goes_on {
                break;
            }
        }
    }

    fn choose_victim(&mut self) -> bool {
        let need = self.checkpoint_reserve();
        let free = self.space.free_count();
        let segments = self.layout.segments as usize;
        if free > need + HOST_RESERVE + 2 + segments / 16 {
            return false;
        }
        let usable = self.space.usable();
        let urgent = free <= need + HOST_RESERVE + 2;
        let most = if urgent { usable / 16 * 15 } else { usable / 4 * 3 };
        match self.space.victim() {
            Some((victim, live)) if live <= most => {
                self.gc.victim = victim;
                self.gc.phase = Phase::Walk;
                self.gc.at = 0;
                self.gc.next = 0;
                self.gc.retries = 0;
                self.gc.records.clear();
                true
            }
            _ => {
                if urgent && self.space.would_free(self.durable) {
                    self.want_flush();
                } else if urgent && self.space.chain_len() > 1 && self.checkpointer.is_idle() {
                    // What is kept for the replay may have something to collect.
                    self.checkpointer.want();
                }
                false
            }
        }
    }

    fn read_window(&mut self, start: u64, len: usize) -> bool {
        let mut bufs = self.gc.window.take().unwrap_or_else(|| Buffers::heap(self.layout.batch_bytes as usize));
        bufs.widen();
        bufs.truncate(len);
        self.gc.window_start = start;
        self.gc.reading = true;
        self.ask(Kind::Gc, 0, BaseOp::Read, start, bufs);
        false
    }

    pub(super) fn gc_read_done(&mut self, bufs: Buffers, result: Result<(), IoStatus>) {
        self.gc.reading = false;
        if self.gc.phase == Phase::Idle {
            return;
        }
        match result {
            Ok(()) => self.gc.window = Some(bufs),
            Err(status) => {
                self.gc.window = None;
                self.gc.retries += 1;
                if self.gc.retries >= MAX_RETRIES {
                    let segment = self.gc.victim;
                    tracing::warn!(%status, segment, "log store: a segment cannot be read to collect it; it is left as it is");
                    self.space.get_mut(segment).stuck = true;
                    self.gc.give_up();
                }
            }
        }
    }

    /// Moves what is at hand and goes on to the next batch; `false` when it has to wait.
    fn walk(&mut self) -> bool {
        let layout = self.layout;
        let start = layout.start_of(self.gc.victim);
        let here = start + u64::from(self.gc.at);
        let Some(window) = self.gc.window.take() else {
            let len = layout.batch_bytes.min(layout.segment_bytes - self.gc.at) as usize;
            return self.read_window(here, len);
        };
        let went = self.walk_in(window.slice_at(0), here);
        match went {
            Walked::On => self.gc.window = Some(window),
            Walked::Waits => {
                self.gc.window = Some(window);
                return false;
            }
            Walked::Reread => {
                let len = layout.batch_bytes.min(layout.segment_bytes - self.gc.at) as usize;
                self.gc.window = Some(window);
                return self.read_window(here, len);
            }
            Walked::End => {
                self.gc.window = Some(window);
                self.gc.phase = Phase::Drain;
            }
        }
        true
    }

    fn walk_in(&mut self, bytes: &[u8], here: u64) -> Walked {
        if self.gc.next < self.gc.records.len() {
            while let Some(&record) = self.gc.records.get(self.gc.next) {
                let at = self.gc.batch_at + record.offset as usize;
                if record.has_payload() {
                    let loc = Loc::new(self.gc.window_start + at as u64, record.len);
                    if !self.move_block(record.lba, loc, &bytes[at..at + record.len as usize]) {
                        return Walked::Waits;
                    }
                }
                self.gc.next += 1;
            }
            self.gc.at += self.gc.batch_len;
            self.gc.records.clear();
            self.gc.next = 0;
            return Walked::On;
        }
        let Some(from) = here.checked_sub(self.gc.window_start).map(|from| from as usize) else {
            return Walked::Reread;
        };
        if self.gc.at + self.layout.align > self.layout.segment_bytes {
            return Walked::End;
        }
        if from >= bytes.len() {
            return Walked::Reread;
        }
        let mut records = std::mem::take(&mut self.gc.records);
        let found = read_batch(&bytes[from..], &self.layout, &self.superblock.store, &mut records);
        self.gc.records = records;
        match found {
            Found::Batch(header) => {
                self.gc.batch_at = from;
                self.gc.batch_len = header.len;
                self.gc.next = 0;
                if self.gc.records.is_empty() {
                    self.gc.at += header.len;
                }
                if header.next != NONE { Walked::End } else { Walked::On }
            }
            Found::Cut if from > 0 => Walked::Reread,
            Found::Cut | Found::Nothing => {
                self.gc.records.clear();
                Walked::End
            }
        }
    }

    /// Moves a block, if it is still mapped there; `false` when it has to wait.
    fn move_block(&mut self, lba: u64, loc: Loc, payload: &[u8]) -> bool {
        let entry = self.map.get(lba);
        if entry.loc != loc {
            return true;
        }
        self.gc.blocked = false;
        let room = if payload_crc(payload) == entry.crc {
            self.append(None, lba, RecordKind::Moved(loc), payload, entry.crc)
        } else {
            self.append(None, lba, RecordKind::Lost(loc), &[], 0)
        };
        match room {
            Room::Ready => {
                self.gc.moved_seq = self.head.seq;
                self.counters.moved_bytes += payload.len() as u64;
                true
            }
            Room::NoSegment => {
                // Only what frees a segment helps: what was emptied already, when that is durable.
                if self.space.would_free(self.durable) {
                    self.want_flush();
                } else if self.checkpointer.is_idle() && self.space.chain_len() > 1 {
                    self.checkpointer.want();
                } else {
                    self.gc.blocked = true;
                }
                false
            }
            Room::Later | Room::NoSpace => false,
        }
    }

    /// Goes on when all that was moved is in the map.
    fn drained(&mut self) -> bool {
        if self.unapplied.seq <= self.gc.moved_seq {
            return false;
        }
        let live = self.space.get(self.gc.victim).live;
        if live == 0 {
            self.counters.collected_segments += 1;
            self.gc.phase = Phase::Idle;
            self.space.reap(self.durable, None);
            if self.space.would_free(self.durable) {
                self.want_flush();
            }
            return true;
        }
        let (layout, victim) = (self.layout, self.gc.victim);
        let here = self
            .map
            .iter()
            .filter(|(_, entry)| entry.loc.is_place() && layout.segment_of(entry.loc.offset()) == Some(victim));
        self.gc.strays = here.take(STRAYS).collect();
        if self.gc.strays.is_empty() {
            debug_assert!(false, "{live} bytes in a segment that nothing is mapped to");
            tracing::error!(
                live,
                segment = victim,
                "log store: nothing is mapped to what is counted; it is left as it is"
            );
            self.space.get_mut(victim).stuck = true;
            self.gc.give_up();
            return true;
        }
        self.gc.retries = 0;
        self.gc.window = None;
        self.gc.phase = Phase::Strays;
        true
    }

    /// Moves a block that no header led to.
    fn move_stray(&mut self) -> bool {
        let Some(&(lba, entry)) = self.gc.strays.last() else {
            self.gc.phase = Phase::Drain;
            return true;
        };
        let (start, len) = aligned(entry.loc, self.layout.align);
        match self.gc.window.take() {
            Some(window) if self.gc.window_start == start && window.len() == len => {
                let from = (entry.loc.offset() - start) as usize;
                let moved =
                    self.move_block(lba, entry.loc, &window.slice_at(0)[from..from + entry.loc.bytes() as usize]);
                self.gc.window = Some(window);
                if moved {
                    self.gc.strays.pop();
                }
                moved
            }
            window => {
                self.gc.window = window;
                self.read_window(start, len)
            }
        }
    }
}

impl std::fmt::Debug for Collector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Collector { phase, victim, at, blocked, .. } = self;
        write!(f, "Collector({phase:?} {victim}+{at} blocked={blocked})")
    }
}

enum Walked {
    On,
    Waits,
    Reread,
    End,
}
