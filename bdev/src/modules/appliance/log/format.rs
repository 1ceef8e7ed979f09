//! What is on the base device, byte by byte. All numbers are little-endian.
//!
//! ```text
//! byte 0          superblock, slot 0        the slot with the higher generation counts
//! byte 65536      superblock, slot 1
//! byte 131072     segment 0, segment 1, ...  segment_bytes each
//! ```
//!
//! A segment holds either batches of the log or pages of a checkpoint, one after the other from its first byte. Batches and
//! pages start and end at multiples of `align`, the unit that is never rewritten while its contents count, so that a torn
//! write only ever damages what was not yet acknowledged.
//!
//! # Superblock (512 bytes, zeroes up to the base's block)
//! | bytes | field |
//! |---|---|
//! | 0..8 | magic `RSLOGSB` and the version of the format, 1 |
//! | 8..12 | bytes in a block of the device |
//! | 12..16 | `align` |
//! | 16..32 | store identity, drawn at random when it is formatted |
//! | 32..40 | bound of the block numbers that may occur |
//! | 40..44 | `segment_bytes` |
//! | 44..48 | segments |
//! | 48..56 | generation: grows with each superblock |
//! | 56..64 | epoch: grows each time the store is opened |
//! | 64..72 | checkpoint: identity; 0 when there is none |
//! | 72..76 | checkpoint: first segment |
//! | 76..80 | checkpoint: pages |
//! | 80..88 | checkpoint: blocks that it maps |
//! | 88..92 | log: segment where the replay starts |
//! | 92..96 | log: offset in it |
//! | 96..104 | log: sequence number of the first batch to replay |
//! | 104..112 | log: link that this batch carries |
//! | 112..120 | log: epoch in which this was decided; no batch to replay has a lower one |
//! | 120..504 | zeroes |
//! | 504..512 | CRC-64/NVME of bytes 0..504 |
//!
//! # Batch
//! | bytes | field |
//! |---|---|
//! | 0..8 | magic `RSLOGBAT` |
//! | 8..24 | store identity |
//! | 24..32 | sequence number: one more than the batch before |
//! | 32..40 | epoch |
//! | 40..48 | highest sequence number that was known to be durable |
//! | 48..56 | link: check of the batch before |
//! | 56..60 | bytes of the batch |
//! | 60..64 | records |
//! | 64..68 | offset of the record table |
//! | 68..72 | segment in which the log goes on, or `FFFFFFFFh`: here |
//! | 72..80 | check: CRC-64/NVME of bytes 0..72 and of the record table |
//! | 80.. | payloads, each at a multiple of 8 bytes; then the record table |
//!
//! # Record (32 bytes)
//! | bytes | field |
//! |---|---|
//! | 0..8 | first block |
//! | 8..16 | write: 0; moved, lost: the packed location that it replaces; zeroes: number of blocks |
//! | 16..20 | offset of the payload in the batch |
//! | 20..24 | bytes of the payload: less than a block is LZ4 (block format), a whole block is as it is |
//! | 24..28 | CRC-32C of the payload |
//! | 28..29 | 1 write, 2 zeroes, 3 moved, 4 lost |
//! | 29..32 | zeroes |
//!
//! # Checkpoint page
//! | bytes | field |
//! |---|---|
//! | 0..8 | magic `RSLOGCKP` |
//! | 8..24 | store identity |
//! | 24..32 | checkpoint identity |
//! | 32..36 | number of the page, from 0 |
//! | 36..40 | bytes of the page |
//! | 40..44 | bytes of it that are used |
//! | 44..48 | segment of the next page, or `FFFFFFFFh`: behind this one |
//! | 48..52 | chunks |
//! | 52..56 | zeroes |
//! | 56..64 | CRC-64/NVME of bytes 0..56 and 64..used |
//! | 64.. | chunks |
//!
//! A chunk maps 256 blocks: its number (4 bytes), how many of its blocks are mapped (2), zeroes (2), a bit for each block
//! (32, lowest first), then for each mapped block its packed location (8) and the CRC-32C of its payload (4).

use crc_fast::{CrcAlgorithm, Digest, checksum};

use super::map::{CHUNK_BLOCKS, Entry, Loc};

/// Where the second superblock starts.
pub const SLOT_BYTES: u64 = 65536;
/// Where segments start.
pub const AREA: u64 = 2 * SLOT_BYTES;
/// Bytes of a superblock.
pub const SUPER_BYTES: usize = 512;
/// Bytes before a batch's payloads.
pub const BATCH_HEADER: usize = 80;
/// Bytes of a record in the table.
pub const RECORD_BYTES: usize = 32;
/// Bytes before a page's chunks.
pub const PAGE_HEADER: usize = 64;
/// Bytes of a chunk without its entries.
pub const CHUNK_HEADER: usize = 40;
/// Bytes of an entry in a chunk.
pub const ENTRY_BYTES: usize = 12;
/// Bytes of a chunk that maps all its blocks.
pub const CHUNK_BYTES: usize = CHUNK_HEADER + ENTRY_BYTES * CHUNK_BLOCKS;
/// No segment.
pub const NONE: u32 = u32::MAX;
/// The most segments of a store.
pub const MAX_SEGMENTS: u64 = 1 << 20;
/// The fewest segments of a store that is of any use.
pub const MIN_SEGMENTS: u64 = 12;
/// The most blocks of a device.
pub const MAX_BLOCKS: u64 = 1 << 38;
/// The smallest segment, in bytes.
pub const MIN_SEGMENT_BYTES: u32 = 65536;
/// The largest segment, in bytes.
pub const MAX_SEGMENT_BYTES: u32 = 1 << 30;
/// The largest batch, in bytes.
const MAX_BATCH_BYTES: u32 = 256 * 1024;

/// No counter on the base gets here.
const MAX_COUNTER: u64 = 1 << 62;

const SUPER_MAGIC: &[u8; 7] = b"RSLOGSB";
/// The version of the format that this code writes.
pub const VERSION: u8 = 1;
const BATCH_MAGIC: &[u8; 8] = b"RSLOGBAT";
const PAGE_MAGIC: &[u8; 8] = b"RSLOGCKP";

/// CRC-32C of a payload.
#[inline]
pub fn payload_crc(bytes: &[u8]) -> u32 {
    checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

fn check_of(parts: [&[u8]; 2]) -> u64 {
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    parts.into_iter().for_each(|part| digest.update(part));
    digest.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// `value` rounded up to a multiple of `unit`, a power of two.
#[inline]
pub fn round_up(value: usize, unit: usize) -> usize {
    (value + unit - 1) & !(unit - 1)
}

/// Sizes of a store; checked when it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes in a block of the device.
    pub block_size: u32,
    /// Unit of writes to the base, in bytes.
    pub align: u32,
    /// Bytes in a segment.
    pub segment_bytes: u32,
    /// Segments.
    pub segments: u32,
    /// The most bytes of a batch or a page.
    pub batch_bytes: u32,
}

impl Layout {
    /// The layout with these sizes; `None` when they make no sense.
    pub fn new(block_size: u32, align: u32, segment_bytes: u32, segments: u32) -> Option<Layout> {
        let unit = |n: u32| n.is_power_of_two() && (512..=65536).contains(&n);
        let fits = unit(block_size)
            && unit(align)
            && segment_bytes.is_power_of_two()
            && segment_bytes >= Layout::min_segment_bytes(block_size, align)
            && segment_bytes <= MAX_SEGMENT_BYTES
            && (MIN_SEGMENTS..=MAX_SEGMENTS).contains(&segments.into());
        let batch_bytes = MAX_BATCH_BYTES.min(segment_bytes / 4).max(align);
        fits.then_some(Layout { block_size, align, segment_bytes, segments, batch_bytes })
    }

    /// The smallest segment for blocks of `block_size` bytes on a base written in units of `align`.
    pub fn min_segment_bytes(block_size: u32, align: u32) -> u32 {
        (16 * block_size.max(align)).max(MIN_SEGMENT_BYTES)
    }

    /// Where a segment's bytes start on the base.
    pub fn start_of(&self, segment: u32) -> u64 {
        AREA + u64::from(segment) * u64::from(self.segment_bytes)
    }

    /// The segment that a byte of the base is in; `None` outside of all segments.
    pub fn segment_of(&self, offset: u64) -> Option<u32> {
        let segment = offset.checked_sub(AREA)? / u64::from(self.segment_bytes);
        (segment < u64::from(self.segments)).then_some(segment as u32)
    }

    /// Whether an entry may stand in the map.
    pub fn is_valid(&self, loc: Loc) -> bool {
        if loc.is_lost() {
            return true;
        }
        let len = loc.bytes();
        let start = self.segment_of(loc.offset());
        (1..=self.block_size).contains(&len)
            && start.is_some()
            && start == self.segment_of(loc.offset() + u64::from(len) - 1)
    }
}

/// Where the replay of the log starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPos {
    /// Segment.
    pub segment: u32,
    /// Offset in it, in bytes.
    pub offset: u32,
    /// Sequence number of the batch there.
    pub seq: u64,
    /// The link that it carries.
    pub link: u64,
}

/// See the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Sizes.
    pub layout: Layout,
    /// Identity of the store.
    pub store: [u8; 16],
    /// Bound of the block numbers that may occur.
    pub bound: u64,
    /// Grows with each superblock.
    pub generation: u64,
    /// Grows each time the store is opened.
    pub epoch: u64,
    /// Identity of the checkpoint; 0 when there is none.
    pub checkpoint: u64,
    /// Its first segment.
    pub checkpoint_segment: u32,
    /// Its pages.
    pub checkpoint_pages: u32,
    /// Blocks that it maps.
    pub checkpoint_entries: u64,
    /// Where the replay starts.
    pub log: LogPos,
    /// The epoch in which that was decided.
    pub log_epoch: u64,
}

/// What a superblock's slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Nothing but zeroes.
    Blank,
    /// A superblock.
    Super(Superblock),
    /// A superblock of a later version of the format.
    Newer(u8),
    /// The remains of a superblock: torn, or damaged.
    Broken,
    /// Something else.
    Foreign,
}

impl Superblock {
    /// Writes it to `out`, which has at least [`SUPER_BYTES`] bytes; the rest is zeroed.
    pub fn encode(&self, out: &mut [u8]) {
        out.fill(0);
        put(out, 0, SUPER_MAGIC);
        out[7] = VERSION;
        put(out, 8, &self.layout.block_size.to_le_bytes());
        put(out, 12, &self.layout.align.to_le_bytes());
        put(out, 16, &self.store);
        put(out, 32, &self.bound.to_le_bytes());
        put(out, 40, &self.layout.segment_bytes.to_le_bytes());
        put(out, 44, &self.layout.segments.to_le_bytes());
        put(out, 48, &self.generation.to_le_bytes());
        put(out, 56, &self.epoch.to_le_bytes());
        put(out, 64, &self.checkpoint.to_le_bytes());
        put(out, 72, &self.checkpoint_segment.to_le_bytes());
        put(out, 76, &self.checkpoint_pages.to_le_bytes());
        put(out, 80, &self.checkpoint_entries.to_le_bytes());
        put(out, 88, &self.log.segment.to_le_bytes());
        put(out, 92, &self.log.offset.to_le_bytes());
        put(out, 96, &self.log.seq.to_le_bytes());
        put(out, 104, &self.log.link.to_le_bytes());
        put(out, 112, &self.log_epoch.to_le_bytes());
        let check = check_of([&out[..504], &[]]);
        put(out, 504, &check.to_le_bytes());
    }

    /// Reads a slot. `bytes` has at least [`SUPER_BYTES`] bytes; what follows only tells blank from foreign.
    pub fn decode(bytes: &[u8]) -> Slot {
        if is_zero(bytes) {
            return Slot::Blank;
        }
        if &bytes[..7] != SUPER_MAGIC {
            return Slot::Foreign;
        }
        if u64_at(bytes, 504) != check_of([&bytes[..504], &[]]) {
            return Slot::Broken;
        }
        if bytes[7] != VERSION {
            return Slot::Newer(bytes[7]);
        }
        let layout = Layout::new(u32_at(bytes, 8), u32_at(bytes, 12), u32_at(bytes, 40), u32_at(bytes, 44));
        let Some(layout) = layout else { return Slot::Broken };
        let superblock = Superblock {
            layout,
            store: bytes[16..32].try_into().expect("sixteen bytes"),
            bound: u64_at(bytes, 32),
            generation: u64_at(bytes, 48),
            epoch: u64_at(bytes, 56),
            checkpoint: u64_at(bytes, 64),
            checkpoint_segment: u32_at(bytes, 72),
            checkpoint_pages: u32_at(bytes, 76),
            checkpoint_entries: u64_at(bytes, 80),
            log: LogPos {
                segment: u32_at(bytes, 88),
                offset: u32_at(bytes, 92),
                seq: u64_at(bytes, 96),
                link: u64_at(bytes, 104),
            },
            log_epoch: u64_at(bytes, 112),
        };
        let log = superblock.log;
        let counters = [superblock.generation, superblock.epoch, superblock.checkpoint, log.seq];
        let sane = superblock.bound <= MAX_BLOCKS
            && counters.iter().all(|&counter| counter < MAX_COUNTER)
            && log.seq > 0
            && log.segment < layout.segments
            && log.offset < layout.segment_bytes
            && log.offset.is_multiple_of(layout.align)
            && (superblock.checkpoint == 0 || superblock.checkpoint_segment < layout.segments);
        if sane { Slot::Super(superblock) } else { Slot::Broken }
    }
}

/// Whether all of `bytes` are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut words = bytes.chunks_exact(16);
    words.by_ref().all(|word| u128::from_ne_bytes(word.try_into().expect("sixteen bytes")) == 0)
        && words.remainder().iter().all(|&byte| byte == 0)
}

/// What a record does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// The block's contents are the payload.
    Write,
    /// So many blocks read as zeroes.
    Zeroes(u64),
    /// The payload is what was at another place, unless the block has changed since.
    Moved(Loc),
    /// What was at another place cannot be read any more, unless the block has changed since.
    Lost(Loc),
}

/// One change of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// First block.
    pub lba: u64,
    /// What it does.
    pub kind: RecordKind,
    /// Offset of the payload in the batch.
    pub offset: u32,
    /// Bytes of the payload.
    pub len: u32,
    /// CRC-32C of the payload.
    pub crc: u32,
}

impl Record {
    /// Whether it has a payload.
    pub fn has_payload(&self) -> bool {
        matches!(self.kind, RecordKind::Write | RecordKind::Moved(_))
    }

    fn encode(&self, out: &mut [u8]) {
        let (kind, word) = match self.kind {
            RecordKind::Write => (1, 0),
            RecordKind::Zeroes(blocks) => (2, blocks),
            RecordKind::Moved(old) => (3, old.raw()),
            RecordKind::Lost(old) => (4, old.raw()),
        };
        out.fill(0);
        put(out, 0, &self.lba.to_le_bytes());
        put(out, 8, &u64::to_le_bytes(word));
        put(out, 16, &self.offset.to_le_bytes());
        put(out, 20, &self.len.to_le_bytes());
        put(out, 24, &self.crc.to_le_bytes());
        out[28] = kind;
    }

    fn decode(bytes: &[u8], table: u32, layout: &Layout) -> Option<Record> {
        let word = u64_at(bytes, 8);
        let kind = match bytes[28] {
            1 => RecordKind::Write,
            2 => RecordKind::Zeroes(word),
            3 => RecordKind::Moved(Loc::from_raw(word)),
            4 => RecordKind::Lost(Loc::from_raw(word)),
            _ => return None,
        };
        let record = Record {
            lba: u64_at(bytes, 0),
            kind,
            offset: u32_at(bytes, 16),
            len: u32_at(bytes, 20),
            crc: u32_at(bytes, 24),
        };
        let blocks = if let RecordKind::Zeroes(blocks) = kind { blocks } else { 1 };
        let in_range = record.lba.checked_add(blocks).is_some_and(|end| end <= MAX_BLOCKS) && blocks > 0;
        let payload_fits = !record.has_payload()
            || (record.offset >= BATCH_HEADER as u32
                && record.offset.is_multiple_of(8)
                && (1..=layout.block_size).contains(&record.len)
                && record.offset.checked_add(record.len).is_some_and(|end| end <= table));
        (in_range && payload_fits).then_some(record)
    }
}

/// A batch's header without what follows from its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// Sequence number.
    pub seq: u64,
    /// Epoch of its writer.
    pub epoch: u64,
    /// Highest sequence number that was known to be durable.
    pub durable: u64,
    /// Check of the batch before.
    pub link: u64,
    /// Bytes of the batch.
    pub len: u32,
    /// Segment in which the log goes on, or [`NONE`].
    pub next: u32,
    /// Its own check.
    pub check: u64,
}

/// Completes a batch whose payloads are in `bytes` from [`BATCH_HEADER`] to `used`: adds the table and the header. `bytes` is as
/// long as the batch. Returns its check.
pub fn seal_batch(bytes: &mut [u8], used: usize, store: &[u8; 16], header: &BatchHeader, records: &[Record]) -> u64 {
    let end = used + records.len() * RECORD_BYTES;
    for (record, out) in records.iter().zip(bytes[used..end].chunks_exact_mut(RECORD_BYTES)) {
        record.encode(out);
    }
    bytes[end..].fill(0);
    put(bytes, 0, BATCH_MAGIC);
    put(bytes, 8, store);
    put(bytes, 24, &header.seq.to_le_bytes());
    put(bytes, 32, &header.epoch.to_le_bytes());
    put(bytes, 40, &header.durable.to_le_bytes());
    put(bytes, 48, &header.link.to_le_bytes());
    put(bytes, 56, &header.len.to_le_bytes());
    put(bytes, 60, &(records.len() as u32).to_le_bytes());
    put(bytes, 64, &(used as u32).to_le_bytes());
    put(bytes, 68, &header.next.to_le_bytes());
    let check = check_of([&bytes[..72], &bytes[used..end]]);
    put(bytes, 72, &check.to_le_bytes());
    check
}

/// What stands where a batch is looked for.
#[derive(Debug)]
pub enum Found {
    /// A batch; its records are in the vector that was given.
    Batch(BatchHeader),
    /// It may be a batch, but `bytes` ends before it does.
    Cut,
    /// No batch of this store.
    Nothing,
}

/// Reads the batch at the start of `bytes`. Payloads are not looked at.
pub fn read_batch(bytes: &[u8], layout: &Layout, store: &[u8; 16], records: &mut Vec<Record>) -> Found {
    records.clear();
    if bytes.len() < BATCH_HEADER {
        return Found::Cut;
    }
    if &bytes[..8] != BATCH_MAGIC || &bytes[8..24] != store {
        return Found::Nothing;
    }
    let (len, count, table, next) = (u32_at(bytes, 56), u32_at(bytes, 60), u32_at(bytes, 64), u32_at(bytes, 68));
    let end = u64::from(table) + u64::from(count) * RECORD_BYTES as u64;
    let sane = len > 0
        && len <= layout.batch_bytes
        && len.is_multiple_of(layout.align)
        && table as usize >= BATCH_HEADER
        && end <= u64::from(len)
        && (next == NONE || next < layout.segments);
    if !sane {
        return Found::Nothing;
    }
    if bytes.len() < len as usize {
        return Found::Cut;
    }
    let rows = &bytes[table as usize..end as usize];
    let check = u64_at(bytes, 72);
    if check != check_of([&bytes[..72], rows]) {
        return Found::Nothing;
    }
    for row in rows.chunks_exact(RECORD_BYTES) {
        match Record::decode(row, table, layout) {
            Some(record) => records.push(record),
            None => return Found::Nothing,
        }
    }
    Found::Batch(BatchHeader {
        seq: u64_at(bytes, 24),
        epoch: u64_at(bytes, 32),
        durable: u64_at(bytes, 40),
        link: u64_at(bytes, 48),
        len,
        next,
        check,
    })
}

/// A checkpoint page's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageHeader {
    /// Identity of the checkpoint.
    pub checkpoint: u64,
    /// Number of the page.
    pub index: u32,
    /// Bytes of the page.
    pub len: u32,
    /// Bytes that are used.
    pub used: u32,
    /// Segment of the next page, or [`NONE`].
    pub next: u32,
    /// Chunks.
    pub chunks: u32,
}

/// Completes a page whose chunks are in `bytes` from [`PAGE_HEADER`] to `header.used`. `bytes` is as long as the page.
pub fn seal_page(bytes: &mut [u8], store: &[u8; 16], header: &PageHeader) {
    let used = header.used as usize;
    bytes[used..].fill(0);
    bytes[..PAGE_HEADER].fill(0);
    put(bytes, 0, PAGE_MAGIC);
    put(bytes, 8, store);
    put(bytes, 24, &header.checkpoint.to_le_bytes());
    put(bytes, 32, &header.index.to_le_bytes());
    put(bytes, 36, &header.len.to_le_bytes());
    put(bytes, 40, &header.used.to_le_bytes());
    put(bytes, 44, &header.next.to_le_bytes());
    put(bytes, 48, &header.chunks.to_le_bytes());
    let check = check_of([&bytes[..56], &bytes[PAGE_HEADER..used]]);
    put(bytes, 56, &check.to_le_bytes());
}

/// Reads the page at the start of `bytes`; `None` when there is none, or it is damaged.
pub fn read_page(bytes: &[u8], layout: &Layout, store: &[u8; 16]) -> Option<PageHeader> {
    if bytes.len() < PAGE_HEADER || &bytes[..8] != PAGE_MAGIC || &bytes[8..24] != store {
        return None;
    }
    let header = PageHeader {
        checkpoint: u64_at(bytes, 24),
        index: u32_at(bytes, 32),
        len: u32_at(bytes, 36),
        used: u32_at(bytes, 40),
        next: u32_at(bytes, 44),
        chunks: u32_at(bytes, 48),
    };
    let used = header.used as usize;
    let sane = header.len > 0
        && header.len as usize <= bytes.len()
        && header.len.is_multiple_of(layout.align)
        && used >= PAGE_HEADER
        && used <= header.len as usize
        && (header.next == NONE || header.next < layout.segments);
    (sane && u64_at(bytes, 56) == check_of([&bytes[..56], &bytes[PAGE_HEADER..used]])).then_some(header)
}

/// Appends a chunk at `at`, which has [`CHUNK_BYTES`] bytes of room; returns where the next one goes.
pub fn put_chunk(bytes: &mut [u8], at: usize, number: u32, entries: impl Iterator<Item = (usize, Entry)>) -> usize {
    bytes[at..at + CHUNK_HEADER].fill(0);
    put(bytes, at, &number.to_le_bytes());
    let mut count = 0u16;
    let mut end = at + CHUNK_HEADER;
    for (index, entry) in entries {
        bytes[at + 8 + index / 8] |= 1 << (index % 8);
        put(bytes, end, &entry.loc.raw().to_le_bytes());
        put(bytes, end + 8, &entry.crc.to_le_bytes());
        end += ENTRY_BYTES;
        count += 1;
    }
    put(bytes, at + 4, &count.to_le_bytes());
    end
}

/// Reads the chunk at the start of `bytes`: its number and how long it is, and each mapped block; `None` when it makes no sense.
pub fn read_chunk(bytes: &[u8], layout: &Layout, mut take: impl FnMut(u64, Entry)) -> Option<(u32, usize)> {
    if bytes.len() < CHUNK_HEADER {
        return None;
    }
    let number = u32_at(bytes, 0);
    let count = u16::from_le_bytes(bytes[4..6].try_into().expect("two bytes")) as usize;
    let bits: u32 = bytes[8..CHUNK_HEADER].iter().map(|byte| byte.count_ones()).sum();
    let end = CHUNK_HEADER + count * ENTRY_BYTES;
    if bits as usize != count || bytes.len() < end {
        return None;
    }
    let mut at = CHUNK_HEADER;
    for index in (0..CHUNK_BLOCKS).filter(|index| bytes[8 + index / 8] & (1 << (index % 8)) != 0) {
        let entry = Entry { loc: Loc::from_raw(u64_at(bytes, at)), crc: u32_at(bytes, at + 8) };
        if !layout.is_valid(entry.loc) {
            return None;
        }
        take(u64::from(number) * CHUNK_BLOCKS as u64 + index as u64, entry);
        at += ENTRY_BYTES;
    }
    Some((number, end))
}
