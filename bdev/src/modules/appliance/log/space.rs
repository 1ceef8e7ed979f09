//! Which segments are in use, how much of them, and how much may be.
//!
//! # When a segment is free again
//! When no block is mapped to it, *and* what unmapped the last one is durable, *and* the replay from the last checkpoint does not
//! pass through it, *and* nobody reads from it. If one of these were missing, a crash could bring back a map that names what has
//! been overwritten.
//!
//! # Reserve
//! A checkpoint always finds room: as many segments as it may need are left alone by everybody else. The collector leaves these
//! alone, and requests [`HOST_RESERVE`] more, so that the collector can always move something. What may be stored is 7/8 of
//! what fits into the rest; so there is always a segment that is emptied by writing less than it has, however full the store is.

use std::collections::VecDeque;

use super::format::{
    BATCH_HEADER, CHUNK_BYTES, CHUNK_HEADER, ENTRY_BYTES, Layout, PAGE_HEADER, RECORD_BYTES, round_up,
};
use super::map::{Loc, Map};
use super::recovery::Opened;

/// Segments that are left to the collector.
pub const HOST_RESERVE: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Free,
    /// The log is being written to it.
    Head,
    /// Full.
    Closed,
    Checkpoint,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) state: State,
    /// Cost of what is mapped to it.
    pub(super) live: u64,
    /// Where in the order of the log it was begun.
    pub(super) ordinal: u64,
    readers: u32,
    /// The batch that unmapped the last of it.
    dead_since: u64,
    /// It is in `dying`.
    dying: bool,
    /// It could not be written; it is not used again.
    bad: bool,
    /// It could not be read when it was to be collected.
    pub(super) stuck: bool,
}

pub(super) struct Space {
    layout: Layout,
    segments: Vec<Segment>,
    free: VecDeque<u32>,
    dying: Vec<u32>,
    live: u64,
    bad: u32,
    next_ordinal: u64,
    /// Segments from this ordinal on are replayed.
    chain: u64,
    /// Segments of the log that were freed, ever.
    pub(super) freed: u64,
}

/// What a payload costs: its bytes and its record.
#[inline]
pub(super) fn cost(len: u32) -> u64 {
    round_up(len as usize, 8) as u64 + RECORD_BYTES as u64
}

impl Space {
    pub(super) fn new(layout: Layout, opened: &Opened) -> Space {
        let blank = Segment {
            state: State::Free,
            live: 0,
            ordinal: 0,
            readers: 0,
            dead_since: 0,
            dying: false,
            bad: false,
            stuck: false,
        };
        let mut space = Space {
            layout,
            segments: vec![blank; layout.segments as usize],
            free: VecDeque::new(),
            dying: Vec::new(),
            live: 0,
            bad: 0,
            next_ordinal: 1,
            chain: 1,
            freed: 0,
        };
        for (_, entry) in opened.map.iter() {
            space.add(entry.loc);
        }
        for &index in &opened.checkpoint {
            space.segments[index as usize].state = State::Checkpoint;
        }
        for &index in &opened.chain {
            space.segments[index as usize].state = State::Closed;
            space.segments[index as usize].ordinal = space.next_ordinal;
            space.next_ordinal += 1;
        }
        for index in 0..layout.segments {
            let segment = &mut space.segments[index as usize];
            match segment.state {
                State::Free if segment.live > 0 => segment.state = State::Closed,
                State::Free => space.free.push_back(index),
                _ => {}
            }
        }
        let (&head, closed) = opened.chain.split_last().expect("the log is somewhere");
        space.segments[head as usize].state = State::Head;
        for &index in closed {
            space.note_if_dead(index, 0);
        }
        space
    }

    pub(super) fn live(&self) -> u64 {
        self.live
    }

    pub(super) fn free_count(&self) -> usize {
        self.free.len()
    }

    pub(super) fn get(&self, index: u32) -> &Segment {
        &self.segments[index as usize]
    }

    pub(super) fn get_mut(&mut self, index: u32) -> &mut Segment {
        &mut self.segments[index as usize]
    }

    // ---- what is mapped --------------------------------------------------------------------------------------------

    /// A block is mapped to `loc`.
    pub(super) fn add(&mut self, loc: Loc) {
        if loc.is_place()
            && let Some(index) = self.layout.segment_of(loc.offset())
        {
            self.segments[index as usize].live += cost(loc.bytes());
            self.live += cost(loc.bytes());
        }
    }

    /// A block is not mapped to `loc` any more; batch `seq` says so.
    pub(super) fn remove(&mut self, loc: Loc, seq: u64) {
        if loc.is_place()
            && let Some(index) = self.layout.segment_of(loc.offset())
        {
            let segment = &mut self.segments[index as usize];
            debug_assert!(segment.live >= cost(loc.bytes()), "more is unmapped than was mapped");
            segment.live -= cost(loc.bytes());
            self.live -= cost(loc.bytes());
            self.note_if_dead(index, seq);
        }
    }

    fn note_if_dead(&mut self, index: u32, seq: u64) {
        let segment = &mut self.segments[index as usize];
        if segment.live == 0 && segment.state == State::Closed {
            segment.dead_since = seq;
            if !segment.dying {
                segment.dying = true;
                self.dying.push(index);
            }
        }
    }

    pub(super) fn pin(&mut self, index: u32) {
        self.segments[index as usize].readers += 1;
    }

    pub(super) fn unpin(&mut self, index: u32) {
        self.segments[index as usize].readers -= 1;
    }

    // ---- coming and going ------------------------------------------------------------------------------------------

    /// Frees what can be. `held` is being read by the collector.
    pub(super) fn reap(&mut self, durable: u64, held: Option<u32>) {
        let (segments, free, chain) = (&mut self.segments, &mut self.free, self.chain);
        let (freed, bad) = (&mut self.freed, &mut self.bad);
        self.dying.retain(|&index| {
            let segment = &mut segments[index as usize];
            let goes = segment.live == 0
                && segment.ordinal < chain
                && segment.readers == 0
                && segment.dead_since <= durable
                && held != Some(index);
            if goes {
                segment.dying = false;
                segment.stuck = false;
                segment.state = State::Free;
                if segment.bad {
                    *bad += 1;
                } else {
                    free.push_back(index);
                    *freed += 1;
                }
            }
            !goes
        });
    }

    /// Whether a flush would free something.
    pub(super) fn would_free(&self, durable: u64) -> bool {
        let frees = |&index: &u32| {
            let segment = &self.segments[index as usize];
            segment.live == 0 && segment.ordinal < self.chain && segment.dead_since > durable
        };
        self.dying.iter().any(frees)
    }

    /// Takes a free segment for the log.
    pub(super) fn take_head(&mut self) -> Option<u32> {
        let index = self.free.pop_front()?;
        let segment = &mut self.segments[index as usize];
        segment.state = State::Head;
        segment.ordinal = self.next_ordinal;
        self.next_ordinal += 1;
        Some(index)
    }

    /// The log goes on elsewhere.
    pub(super) fn close_head(&mut self, index: u32, seq: u64) {
        self.segments[index as usize].state = State::Closed;
        self.note_if_dead(index, seq);
    }

    /// Takes a free segment for a checkpoint.
    pub(super) fn take_page(&mut self) -> Option<u32> {
        let index = self.free.pop_front()?;
        self.segments[index as usize].state = State::Checkpoint;
        self.segments[index as usize].ordinal = 0;
        Some(index)
    }

    /// A checkpoint does not need it any more.
    pub(super) fn give_page(&mut self, index: u32) {
        let segment = &mut self.segments[index as usize];
        segment.state = State::Free;
        if segment.bad {
            self.bad += 1;
        } else {
            self.free.push_back(index);
        }
    }

    /// It could not be written.
    pub(super) fn spoil(&mut self, index: u32) {
        self.segments[index as usize].bad = true;
    }

    /// The replay starts at this ordinal from now on.
    pub(super) fn set_chain(&mut self, ordinal: u64) {
        self.chain = ordinal;
    }

    /// Segments that the replay passes through.
    pub(super) fn chain_len(&self) -> u64 {
        self.next_ordinal - self.chain
    }

    // ---- room ------------------------------------------------------------------------------------------------------

    /// Segments that a checkpoint of the map may take.
    pub(super) fn checkpoint_need(&self, map: &Map) -> usize {
        let bytes = map.chunks() * CHUNK_HEADER as u64 + map.entries() * ENTRY_BYTES as u64;
        let page = self.layout.batch_bytes as usize;
        let used = page - PAGE_HEADER - CHUNK_BYTES - self.layout.align as usize;
        let in_segment = (self.layout.segment_bytes as usize / page * used) as u64;
        bytes.div_ceil(in_segment) as usize + 1
    }

    /// Bytes that fit into a segment by [`cost`], however they fall.
    pub(super) fn usable(&self) -> u64 {
        let layout = &self.layout;
        let (whole, align) = (u64::from(layout.segment_bytes), u64::from(layout.align));
        let batches = whole.div_ceil(layout.batch_bytes.into()) + 2;
        let lost = align + u64::from(layout.block_size) + RECORD_BYTES as u64 + batches * (BATCH_HEADER as u64 + align);
        whole.saturating_sub(lost)
    }

    /// Bytes that may be stored, by [`cost`].
    pub(super) fn limit(&self, map: &Map) -> u64 {
        let reserve = 2 * self.checkpoint_need(map) as u64 + HOST_RESERVE as u64 + 3 + u64::from(self.bad);
        u64::from(self.layout.segments).saturating_sub(reserve) * self.usable() / 8 * 7
    }

    /// The segment that is emptied with the least work: closed, before the replay, not given up.
    pub(super) fn victim(&self) -> Option<(u32, u64)> {
        let candidates = self.segments.iter().enumerate().filter(|(_, segment)| {
            segment.state == State::Closed && segment.live > 0 && segment.ordinal < self.chain && !segment.stuck
        });
        candidates.min_by_key(|(_, segment)| segment.live).map(|(index, segment)| (index as u32, segment.live))
    }
}

impl std::fmt::Debug for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Space")
            .field("free", &self.free.len())
            .field("dying", &self.dying.len())
            .field("live", &self.live)
            .field("chain", &self.chain_len())
            .finish_non_exhaustive()
    }
}
