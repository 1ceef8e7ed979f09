//! Opening a store: formatting it, or finding out what it holds.
//!
//! [`Recovery`] does no I/O itself: its owner asks for the next operation, does it, and hands the result back, until there is
//! an outcome. One operation is outstanding at a time, and memory is bounded by one batch beside the map itself.
//!
//! # What is believed
//! The superblock with the higher generation, of those whose check is right. Its checkpoint, whole. Then the log from where
//! the superblock says, batch by batch, as long as each has the next sequence number, the check of the batch before as its
//! link, and an epoch that is not lower. The link and the epoch, which grows durably before anything is written, tell what
//! is left over from before an earlier crash from what belongs to the log.
//!
//! # Where the log ends
//! At the first batch that is not there whole, if nothing says that it was durable once: it was torn or lost with the power, and
//! nothing that was acknowledged by a flush can be behind it. Batches name the highest sequence number that was durable when
//! they were written. If a later one names a batch whose payloads do not fit their checksums then these are damaged: their
//! blocks read as errors, and the log goes on. If it names a batch that is not there at all then nobody knows which blocks it
//! changed, and the store is not opened unless the owner accepts that.
//!
//! To find such a witness, the rest of the segment is searched for batches that come later, and each is followed as far as its
//! successors go. Where what is missing may be what named the next segment, the starts of all segments are searched too.

use std::fmt;

mod witness;

use reactor::Buffers;

use super::format::{
    AREA, Found, Layout, LogPos, MAX_BLOCKS, MAX_SEGMENT_BYTES, MAX_SEGMENTS, MIN_SEGMENTS, NONE, Record, RecordKind,
    SLOT_BYTES, Slot, Superblock, payload_crc, read_batch, read_chunk, read_page, round_up,
};
use super::map::{Entry, Loc, Map};
use crate::core::IoStatus;

/// What a store is opened with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Bytes of the base.
    pub base_bytes: u64,
    /// Bytes in a block of the base.
    pub base_block: u32,
    /// Bytes in a physical block of the base.
    pub base_physical: u32,
    /// The base may lose completed writes before a flush.
    pub base_volatile: bool,
    /// Bytes in a block of the device.
    pub block_size: u32,
    /// Blocks of the device.
    pub num_blocks: u64,
    /// Bytes in a segment, when it is formatted; chosen by the size of the base if it is not given.
    pub segment_bytes: Option<u32>,
    /// Blocks are compressed.
    pub compress: bool,
    /// Whatever the base holds is given up for an empty store.
    pub format: bool,
    /// Damage that hides which blocks were changed last ends the log instead of refusing to open.
    pub accept_loss: bool,
    /// Identity of the store, if it is formatted: random.
    pub store: [u8; 16],
}

/// What the base is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseOp {
    /// Fill the payload.
    Read,
    /// Write the payload.
    Write,
    /// Make durable what has completed.
    Flush,
}

/// An operation on the base.
#[derive(Debug)]
pub struct BaseIo {
    /// Comes back with the result.
    pub tag: u64,
    /// What to do.
    pub op: BaseOp,
    /// First byte; a multiple of the base's block, as is the length of the payload.
    pub offset: u64,
    /// Payload, in one segment aligned for direct I/O; comes back with the result.
    pub bufs: Buffers,
}

/// Why a store is not opened. The text says what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn refuse<T>(text: String) -> Result<T, Refusal> {
    Err(Refusal(text))
}

/// What a store holds.
#[derive(Debug)]
pub struct Opened {
    pub(super) superblock: Superblock,
    pub(super) map: Map,
    /// Where the next batch goes.
    pub(super) head: LogPos,
    /// Segments that the log from the checkpoint on is in, in order; the last is the head's.
    pub(super) chain: Vec<u32>,
    /// Segments of the checkpoint.
    pub(super) checkpoint: Vec<u32>,
    /// The log cannot go on at the head: behind it are batches that must not be found again.
    pub(super) start_afresh: bool,
    /// What was found.
    pub report: Report,
}

/// What an opening did, for the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// It was formatted.
    pub formatted: bool,
    /// Batches that were replayed.
    pub batches: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Blocks that were found damaged and read as errors.
    pub lost_blocks: u64,
}

enum Step {
    Slot(u8),
    Page,
    Replay,
    Scan,
    /// Follows what was found behind the end; from a scan of all segments, or of one.
    Probe,
    /// Looks at the start of a segment: its first unit, then as much as a batch may have.
    Wide(u32, bool),
    Settle,
    Super,
    SettleSuper,
    /// Formatting: the slot to write, and whether it waits for the flush behind it.
    Format(u8, bool),
}

/// The opening of a store; see the [module](self).
pub struct Recovery {
    config: Config,
    step: Step,
    waiting: bool,
    outcome: Option<Result<Opened, Refusal>>,
    slots: [Option<Slot>; 2],
    superblock: Option<Superblock>,
    map: Map,
    records: Vec<Record>,
    /// Blocks from here on make no sense.
    bound: u64,
    pages: u32,
    page_at: (u32, u32),
    next_chunk: u64,
    checkpoint: Vec<u32>,
    chain: Vec<u32>,
    pos: LogPos,
    epoch: u64,
    durable: u64,
    /// A batch with damaged payloads of which it is not known yet whether it was durable.
    suspect: Option<(LogPos, u64, usize)>,
    scan_at: u32,
    probe: LogPos,
    /// The segment whose start led to the batch that is followed.
    wide: Option<u32>,
    start_afresh: bool,
    report: Report,
}

impl Recovery {
    /// Starts to open the store.
    pub fn new(config: Config) -> Recovery {
        Recovery {
            config,
            step: Step::Slot(0),
            waiting: false,
            outcome: None,
            slots: [None, None],
            superblock: None,
            map: Map::default(),
            records: Vec::new(),
            bound: 0,
            pages: 0,
            page_at: (0, 0),
            next_chunk: 0,
            checkpoint: Vec::new(),
            chain: Vec::new(),
            pos: LogPos { segment: 0, offset: 0, seq: 0, link: 0 },
            epoch: 0,
            durable: 0,
            suspect: None,
            scan_at: 0,
            probe: LogPos { segment: 0, offset: 0, seq: 0, link: 0 },
            wide: None,
            start_afresh: false,
            report: Report::default(),
        }
    }

    /// How it ended, once it has.
    pub fn take_outcome(&mut self) -> Option<Result<Opened, Refusal>> {
        self.outcome.take()
    }

    /// The next operation; `None` while one is outstanding, and at the end.
    pub fn next_io(&mut self) -> Option<BaseIo> {
        if self.waiting || self.outcome.is_some() {
            return None;
        }
        self.waiting = true;
        let io = |op, offset, bufs| Some(BaseIo { tag: 0, op, offset, bufs });
        match self.step {
            Step::Slot(slot) => {
                let bytes = if self.config.base_bytes < AREA { self.config.base_block.into() } else { SLOT_BYTES };
                io(BaseOp::Read, u64::from(slot) * SLOT_BYTES, Buffers::heap(bytes as usize))
            }
            Step::Page => io(BaseOp::Read, self.at(self.page_at), self.window(self.page_at.1)),
            Step::Replay => {
                let at = (self.pos.segment, self.pos.offset);
                io(BaseOp::Read, self.at(at), self.window(at.1))
            }
            Step::Scan => {
                let at = (self.pos.segment, self.scan_at);
                io(BaseOp::Read, self.at(at), self.window(at.1))
            }
            Step::Probe => {
                let at = (self.probe.segment, self.probe.offset);
                io(BaseOp::Read, self.at(at), self.window(at.1))
            }
            Step::Wide(segment, whole) => {
                let layout = self.current().layout;
                let bytes = if whole { layout.batch_bytes } else { layout.align };
                io(BaseOp::Read, layout.start_of(segment), Buffers::heap(bytes as usize))
            }
            Step::Super => {
                let superblock = self.current();
                io(BaseOp::Write, slot_of(superblock.generation), self.super_bufs(&superblock))
            }
            Step::Format(slot, false) => {
                let superblock = self.current();
                io(BaseOp::Write, u64::from(slot) * SLOT_BYTES, self.super_bufs(&superblock))
            }
            Step::Settle | Step::SettleSuper | Step::Format(_, true) => io(BaseOp::Flush, 0, Buffers::new()),
        }
    }

    fn current(&self) -> Superblock {
        self.superblock.expect("there is a superblock in this step")
    }

    fn super_bufs(&self, superblock: &Superblock) -> Buffers {
        let mut bufs = Buffers::heap(self.config.base_block.max(512) as usize);
        superblock.encode(bufs.slice_at_mut(0));
        bufs
    }

    fn at(&self, (segment, offset): (u32, u32)) -> u64 {
        self.current().layout.start_of(segment) + u64::from(offset)
    }

    fn window(&self, offset: u32) -> Buffers {
        let layout = self.current().layout;
        Buffers::heap(layout.batch_bytes.min(layout.segment_bytes - offset) as usize)
    }

    /// The operation that [`Recovery::next_io`] gave has ended.
    pub fn on_io_done(&mut self, bufs: &Buffers, result: Result<(), IoStatus>) {
        self.waiting = false;
        let went = match result {
            Ok(()) => self.advance(bufs.slice_at(0)),
            Err(status) => {
                refuse(format!("the base bdev failed while the store was opened: {status}; see to it, and try again"))
            }
        };
        if let Err(refusal) = went {
            self.outcome = Some(Err(refusal));
        }
    }

    fn advance(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        match self.step {
            Step::Slot(slot) => {
                self.slots[usize::from(slot)] = Some(Superblock::decode(bytes));
                if slot == 0 && self.config.base_bytes >= AREA {
                    self.step = Step::Slot(1);
                    return Ok(());
                }
                self.choose()
            }
            Step::Page => self.page(bytes),
            Step::Replay => self.replay(bytes),
            Step::Scan => self.scan(bytes),
            Step::Probe => self.follow(bytes),
            Step::Wide(segment, _) => self.look(segment, bytes),
            Step::Settle => {
                let superblock = self.superblock.as_mut().expect("there is a superblock in this step");
                superblock.generation += 1;
                superblock.epoch += 1;
                superblock.bound = superblock.bound.max(self.config.num_blocks);
                self.step = Step::Super;
                Ok(())
            }
            Step::Super => {
                self.step = Step::SettleSuper;
                Ok(())
            }
            Step::Format(slot, false) => {
                self.step = Step::Format(slot, true);
                Ok(())
            }
            Step::Format(1, true) => {
                // The other slot may hold a superblock of an earlier store: it goes too before the store counts as formatted.
                self.superblock.as_mut().expect("there is a superblock in this step").generation = 2;
                self.step = Step::Format(0, false);
                Ok(())
            }
            Step::SettleSuper | Step::Format(_, true) => {
                self.finish();
                Ok(())
            }
        }
    }

    fn finish(&mut self) {
        self.outcome = Some(Ok(Opened {
            superblock: self.current(),
            map: std::mem::take(&mut self.map),
            head: self.pos,
            chain: std::mem::take(&mut self.chain),
            checkpoint: std::mem::take(&mut self.checkpoint),
            start_afresh: self.start_afresh,
            report: self.report,
        }));
    }

    // ---- superblocks -----------------------------------------------------------------------------------------------

    fn choose(&mut self) -> Result<(), Refusal> {
        let slots: Vec<Slot> = self.slots.iter().flatten().copied().collect();
        if self.config.format {
            return self.format();
        }
        if let Some(version) = slots.iter().find_map(|slot| if let Slot::Newer(v) = slot { Some(v) } else { None }) {
            return refuse(format!(
                "the base bdev holds a log store of format version {version}, newer than this program reads; use the program \
                 that wrote it, or give all of it up with the option format=true"
            ));
        }
        let supers = slots.iter().filter_map(|slot| if let Slot::Super(s) = slot { Some(*s) } else { None });
        if let Some(superblock) = supers.max_by_key(|superblock| superblock.generation) {
            return self.open(superblock);
        }
        if slots.contains(&Slot::Broken) {
            return refuse(
                "the base bdev holds a log store whose superblocks are both damaged; restore them from a copy, or give all of \
                 it up with the option format=true"
                    .to_string(),
            );
        }
        if slots.contains(&Slot::Foreign) {
            return refuse(
                "the base bdev holds data that is not a log store's; choose another base, or overwrite it with the option \
                 format=true"
                    .to_string(),
            );
        }
        self.format()
    }

    fn format(&mut self) -> Result<(), Refusal> {
        let config = &self.config;
        let align = config.base_block.max(config.base_physical.min(65536));
        let smallest = Layout::min_segment_bytes(config.block_size, align);
        let area = config.base_bytes.saturating_sub(AREA);
        let default = || {
            let wanted = (area / 64).min(4 << 20).max(area / MAX_SEGMENTS + 1).max(smallest.into());
            wanted.next_power_of_two().min(MAX_SEGMENT_BYTES.into()) as u32
        };
        let mut segment_bytes = config.segment_bytes.unwrap_or_else(default);
        if config.segment_bytes.is_none() && area / u64::from(segment_bytes) < MIN_SEGMENTS {
            segment_bytes = smallest;
        }
        if !segment_bytes.is_power_of_two() || !(smallest..=MAX_SEGMENT_BYTES).contains(&segment_bytes) {
            return refuse(format!(
                "segment_bytes = {segment_bytes}: with this base and block size it is a power of two from {smallest} to \
                 {MAX_SEGMENT_BYTES}"
            ));
        }
        let segments = (area / u64::from(segment_bytes)).min(MAX_SEGMENTS);
        let Some(layout) = Layout::new(config.block_size, align, segment_bytes, segments as u32) else {
            return refuse(format!(
                "the base bdev has {} bytes: a log store with segments of {segment_bytes} bytes needs at least {}; choose a \
                 larger base or smaller segments",
                config.base_bytes,
                AREA + MIN_SEGMENTS * u64::from(segment_bytes)
            ));
        };
        // Sequence numbers start at 1, so that "durable up to 0" is "nothing is".
        let log = LogPos { segment: 0, offset: 0, seq: 1, link: 0 };
        self.superblock = Some(Superblock {
            layout,
            store: config.store,
            bound: config.num_blocks,
            generation: 1,
            epoch: 1,
            checkpoint: 0,
            checkpoint_segment: NONE,
            checkpoint_pages: 0,
            checkpoint_entries: 0,
            log,
            log_epoch: 1,
        });
        self.pos = log;
        self.chain = vec![0];
        self.report.formatted = true;
        self.step = Step::Format(1, false);
        Ok(())
    }

    fn open(&mut self, mut superblock: Superblock) -> Result<(), Refusal> {
        let (config, layout) = (&self.config, superblock.layout);
        if layout.block_size != config.block_size {
            return refuse(format!(
                "the store has blocks of {} bytes, not {}; create it with block_size={}, or give all of it up with the option \
                 format=true",
                layout.block_size, config.block_size, layout.block_size
            ));
        }
        let needed = layout.start_of(layout.segments);
        if needed > config.base_bytes {
            return refuse(format!(
                "the store occupies {needed} bytes, but its base bdev has only {}; give the base its size back, or give the \
                 store up with the option format=true",
                config.base_bytes
            ));
        }
        if config.base_block > layout.align {
            return refuse(format!(
                "the store is written in units of {} bytes, but its base bdev now has blocks of {}; use the base with smaller \
                 blocks again, or give the store up with the option format=true",
                layout.align, config.base_block
            ));
        }
        if let Some(asked) = config.segment_bytes.filter(|&asked| asked != layout.segment_bytes) {
            return refuse(format!(
                "segment_bytes = {asked}: the store was made with {}; leave it out, or give the store up with the option \
                 format=true",
                layout.segment_bytes
            ));
        }
        // A base that has grown since is used.
        let room = ((config.base_bytes - AREA) / u64::from(layout.segment_bytes)).min(MAX_SEGMENTS);
        superblock.layout.segments = room as u32;
        self.bound = superblock.bound.max(config.num_blocks).min(MAX_BLOCKS);
        self.superblock = Some(superblock);
        self.epoch = superblock.log_epoch;
        self.pos = superblock.log;
        self.durable = superblock.log.seq.saturating_sub(1);
        self.chain = vec![superblock.log.segment];
        if superblock.checkpoint == 0 || superblock.checkpoint_pages == 0 {
            self.step = Step::Replay;
        } else {
            self.page_at = (superblock.checkpoint_segment, 0);
            self.checkpoint = vec![superblock.checkpoint_segment];
            self.step = Step::Page;
        }
        Ok(())
    }

    // ---- checkpoint ------------------------------------------------------------------------------------------------

    fn page(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let superblock = self.current();
        let header = read_page(bytes, &superblock.layout, &superblock.store)
            .filter(|header| header.checkpoint == superblock.checkpoint && header.index == self.pages);
        let Some(header) = header else { return self.damaged_checkpoint() };
        let mut body = &bytes[super::format::PAGE_HEADER..header.used as usize];
        for _ in 0..header.chunks {
            let (map, bound) = (&mut self.map, self.bound);
            let mut beyond = false;
            let read = read_chunk(body, &superblock.layout, |lba, entry| {
                if lba < bound {
                    map.set(lba, entry);
                } else {
                    beyond = true;
                }
            });
            match read {
                Some((number, len)) if !beyond && u64::from(number) >= self.next_chunk => {
                    self.next_chunk = u64::from(number) + 1;
                    body = &body[len..];
                }
                _ => return self.damaged_checkpoint(),
            }
        }
        self.pages += 1;
        if self.pages == superblock.checkpoint_pages {
            if self.map.entries() != superblock.checkpoint_entries {
                return self.damaged_checkpoint();
            }
            self.step = Step::Replay;
            return Ok(());
        }
        if header.next == NONE {
            self.page_at.1 += header.len;
        } else if self.checkpoint.contains(&header.next) {
            return self.damaged_checkpoint();
        } else {
            self.checkpoint.push(header.next);
            self.page_at = (header.next, 0);
        }
        if self.page_at.1 >= superblock.layout.segment_bytes {
            return self.damaged_checkpoint();
        }
        Ok(())
    }

    fn damaged_checkpoint(&self) -> Result<(), Refusal> {
        refuse(format!(
            "page {} of the store's checkpoint, at byte {} of the base bdev, is damaged: where the blocks are is not known; \
             restore the base from a copy, or give all of it up with the option format=true",
            self.pages,
            self.at(self.page_at)
        ))
    }

    // ---- log -------------------------------------------------------------------------------------------------------

    fn replay(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        let superblock = self.current();
        let layout = superblock.layout;
        let mut at = 0;
        loop {
            let mut records = std::mem::take(&mut self.records);
            let found = read_batch(&bytes[at..], &layout, &superblock.store, &mut records);
            self.records = records;
            let header = match found {
                Found::Batch(header) => header,
                // It may go on beyond the window; at the start of one it cannot.
                Found::Cut if at > 0 => return Ok(()),
                Found::Cut | Found::Nothing => return self.end_of_log(),
            };
            let epochs = self.epoch..=superblock.epoch;
            if header.seq != self.pos.seq || header.link != self.pos.link || !epochs.contains(&header.epoch) {
                return self.end_of_log();
            }
            let here = (self.pos, self.epoch, self.chain.len());
            self.durable = self.durable.max(header.durable);
            if self.suspect.is_some_and(|(suspect, ..)| suspect.seq <= self.durable) {
                // It was durable, so the log goes on behind it: back, to replay from there.
                let (pos, epoch, chain) = self.suspect.take().expect("just seen");
                (self.pos, self.epoch) = (pos, epoch);
                self.chain.truncate(chain);
                return Ok(());
            }
            if self.suspect.is_none() && !self.apply(&bytes[at..], header.seq)? {
                self.suspect = Some(here);
            }
            if self.suspect.is_none() {
                self.report.batches += 1;
                self.report.bytes += u64::from(header.len);
            }
            self.epoch = header.epoch;
            self.pos.seq += 1;
            self.pos.link = header.check;
            if header.next != NONE {
                if self.chain.contains(&header.next) || self.checkpoint.contains(&header.next) {
                    return self.damaged_log();
                }
                self.chain.push(header.next);
                (self.pos.segment, self.pos.offset) = (header.next, 0);
                return Ok(());
            }
            self.pos.offset += header.len;
            at += header.len as usize;
            if self.pos.offset + layout.align > layout.segment_bytes {
                return self.damaged_log();
            }
        }
    }

    /// Enters a batch's records into the map; `false`, and nothing is entered, when a payload is damaged that may just be torn.
    fn apply(&mut self, batch: &[u8], seq: u64) -> Result<bool, Refusal> {
        let layout = self.current().layout;
        let is_whole = |record: &Record| {
            let (from, len) = (record.offset as usize, record.len as usize);
            !record.has_payload() || payload_crc(&batch[from..from + len]) == record.crc
        };
        if seq > self.durable && !self.records.iter().all(is_whole) {
            return Ok(false);
        }
        let start = layout.start_of(self.pos.segment) + u64::from(self.pos.offset);
        for record in &self.records {
            let blocks = if let RecordKind::Zeroes(blocks) = record.kind { blocks } else { 1 };
            if record.lba.saturating_add(blocks) > self.bound {
                return refuse(format!(
                    "the log names block {}, beyond the {} that the store ever had: it is damaged; restore the base bdev from a \
                     copy, or give all of it up with the option format=true",
                    record.lba, self.bound
                ));
            }
            let mut entry = Entry { loc: Loc::new(start + u64::from(record.offset), record.len), crc: record.crc };
            if record.has_payload() && !is_whole(record) {
                self.report.lost_blocks += 1;
                entry = Entry { loc: Loc::LOST, crc: 0 };
            }
            apply_record(&mut self.map, record, entry, |_| {});
        }
        Ok(true)
    }

    fn end_of_log(&mut self) -> Result<(), Refusal> {
        self.scan_at = self.pos.offset;
        self.step = Step::Scan;
        Ok(())
    }

    fn damaged_log(&self) -> Result<(), Refusal> {
        refuse(format!(
            "the log is damaged at byte {} of the base bdev (batch {}): it does not go on where it says; restore the base from a \
             copy, or give all of it up with the option format=true",
            self.at((self.pos.segment, self.pos.offset)),
            self.pos.seq
        ))
    }

    fn ended(&mut self) {
        if let Some((pos, epoch, chain)) = self.suspect.take() {
            (self.pos, self.epoch) = (pos, epoch);
            self.chain.truncate(chain);
        }
        let asked = self.config.num_blocks;
        if let Some(last) = self.map.last().filter(|&last| last >= asked) {
            self.outcome = Some(refuse(format!(
                "the store has data up to block {last}, so it cannot be opened with num_blocks={asked}; create it with at least \
                 {}, and use bdev_appliance_resize to make it smaller",
                last + 1
            )));
            return;
        }
        if let Some(wrong) = self.map.iter().find(|(_, entry)| {
            entry.loc.is_place()
                && self.current().layout.segment_of(entry.loc.offset()).is_none_or(|s| self.checkpoint.contains(&s))
        }) {
            self.outcome = Some(refuse(format!(
                "block {} is said to be inside the checkpoint: the store is damaged; restore the base bdev from a copy, or give \
                 all of it up with the option format=true",
                wrong.0
            )));
            return;
        }
        // What was found may be in a cache of the base only; nothing may build on it before it is durable.
        self.step = Step::Settle;
    }
}

/// Where a superblock of this generation is written.
pub(super) fn slot_of(generation: u64) -> u64 {
    generation % 2 * SLOT_BYTES
}

/// Bytes of a superblock's write.
pub(super) fn super_len(base_block: u32) -> usize {
    round_up(super::format::SUPER_BYTES, base_block as usize)
}

/// Enters one record. `entry` is what a write or a moved block is mapped to; `dead` is told of each location that is not used any
/// more, or is not used at all.
pub(super) fn apply_record(map: &mut Map, record: &Record, entry: Entry, mut dead: impl FnMut(Loc)) {
    match record.kind {
        RecordKind::Write => dead(map.set(record.lba, entry).loc),
        RecordKind::Zeroes(blocks) => map.remove(record.lba, blocks, |_, old| dead(old.loc)),
        RecordKind::Moved(old) if map.get(record.lba).loc == old => dead(map.set(record.lba, entry).loc),
        RecordKind::Moved(_) => dead(entry.loc),
        RecordKind::Lost(old) if map.get(record.lba).loc == old => {
            dead(map.set(record.lba, Entry { loc: Loc::LOST, crc: 0 }).loc);
        }
        RecordKind::Lost(_) => {}
    }
}

impl fmt::Debug for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recovery").field("pos", &self.pos).field("report", &self.report).finish_non_exhaustive()
    }
}
