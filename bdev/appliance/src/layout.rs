//! What lies where in the memory that the target shares with an external process.
//!
//! One file in memory (memfd) a session, made by the target and sealed against shrinking and growing. Everything is a
//! native-endian 64-bit word, or payload bytes. One *lane* for each reactor; `depth` is a power of two.
//!
//! ```text
//! memory     | heads: 128 x workers (to a page) | lane 0 | lane 1 | ...      each lane begins on a page
//!
//! head w     word 0    worker_sleeps   worker `w` of the process is about to sleep: ring     process: 1, target: 0
//!                                      its doorbell
//!
//! lane       | control: 4096 | aborts: 8 x depth | picked: 8 x depth | rings of worker 0 | rings of worker 1 | ...
//!            | (to a page) | payload: slot_bytes x depth |         each slot begins on a page
//!
//! rings      | submissions: 64 x depth | completions: 32 x depth |
//!
//! control    word 0    target_sleeps   the target's reactor is about to sleep: ring its     target: 1, process: 0
//!            word 16   aborts_posted   how often the target has written to `aborts`         target
//!            word 32   resets_posted   how often the device was reset                       target
//!            word 33   reset_before    the last reset is for requests of smaller ids         target
//!
//! aborts     word s    id of the request in slot `s` that the target wants back; 0: none    target
//!
//! picked     word s    when the request in slot `s` was taken by its worker, if that is     process
//!                      measured: nanoseconds of CLOCK_MONOTONIC
//!
//! submission word 0    sequence: position + 1, written last                                 target
//!            word 1    id of the request, never 0, never used again
//!            word 2    bits 0-7 operation, 8-15 flags, 16-31 slot, 32-63 payload bytes
//!            word 3    first block
//!            word 4    blocks
//!            word 5    nanoseconds until its deadline; all ones: none
//!            word 6    first block to copy from
//!            word 7    1: the process is to say when it took the request and when it completed it; 0
//!
//! completion word 0    sequence: position + 1, written last                                 process
//!            word 1    id of the request
//!            word 2    bits 0-15 slot, 16-31 status, 32-63 payload bytes that were moved
//!            word 3    when the handler completed it, in nanoseconds of CLOCK_MONOTONIC; 0: not measured
//! ```
//!
//! A ring has no head and no tail in shared memory: each side counts its own positions, and an entry is there when its
//! sequence says so. So there is no count that the other side could lie about, and a completion costs the transfer of
//! one cache line instead of two. Neither ring can overflow: a slot is given out again only after its request was
//! answered, so at most `depth` entries of a lane are unread, whichever of its rings they are in. Each worker has a
//! completion ring of its own on every lane, so that one that is stopped between two steps holds up no other.
//!
//! The target's payload memory is not here. A request's payload is copied into its slot before it is submitted (what is
//! written), and out of it when it is completed (what was read).

use std::fmt;
use std::io;

/// Words of a lane's control block, each on a pair of cache lines of its own.
pub(crate) const TARGET_SLEEPS: usize = 0;
/// See [`TARGET_SLEEPS`].
pub(crate) const ABORTS_POSTED: usize = 16;
/// See [`TARGET_SLEEPS`].
pub(crate) const RESETS_POSTED: usize = 32;
/// See [`TARGET_SLEEPS`].
pub(crate) const RESET_BEFORE: usize = 33;

const PAGE: usize = 4096;
const CONTROL_BYTES: usize = PAGE;
/// Words of a head: a pair of cache lines.
const HEAD_WORDS: usize = 16;
/// Words of a submission.
pub(crate) const SUBMISSION_WORDS: usize = 8;
/// Words of a completion.
pub(crate) const COMPLETION_WORDS: usize = 4;
const WORD: usize = 8;

/// Lanes at most: their descriptors travel in one message.
pub const MAX_LANES: u32 = 64;
/// Workers at most; likewise.
pub const MAX_WORKERS: u32 = 64;
/// Requests in a lane at most; a slot has to fit its field.
pub const MAX_DEPTH: u32 = 16_384;
/// Payload bytes of a slot at most.
pub const MAX_SLOT_BYTES: u32 = 16 << 20;
/// Bytes of a session's memory at most.
pub const MAX_BYTES: u64 = 64 << 30;

/// The measures of a session's memory, from which every offset follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    lanes: u32,
    workers: u32,
    depth: u32,
    slot_bytes: u32,
}

/// Measures that no session can have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadShape(String);

impl fmt::Display for BadShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadShape {}

impl From<BadShape> for io::Error {
    fn from(bad: BadShape) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidInput, bad)
    }
}

impl Shape {
    /// Room for `lanes` lanes of `depth` requests (rounded up to a power of two) of up to `slot_bytes` bytes (rounded up
    /// to pages), with rings for `workers` workers each.
    ///
    /// # Errors
    /// When one of them is zero or above its limit, or all together above [`MAX_BYTES`].
    pub fn new(lanes: u32, workers: u32, depth: u32, slot_bytes: u32) -> Result<Shape, BadShape> {
        let within = |name: &str, value: u32, most: u32| {
            if value == 0 || value > most {
                return Err(BadShape(format!("{name} is {value}; it can be from 1 to {most}")));
            }
            Ok(())
        };
        within("the number of lanes", lanes, MAX_LANES)?;
        within("the number of workers", workers, MAX_WORKERS)?;
        within("the queue depth", depth, MAX_DEPTH)?;
        within("the bytes of a slot", slot_bytes, MAX_SLOT_BYTES)?;
        let (depth, slot_bytes) = (depth.next_power_of_two(), slot_bytes.next_multiple_of(PAGE as u32));
        let shape = Shape { lanes, workers, depth, slot_bytes };
        if shape.bytes() as u64 > MAX_BYTES {
            return Err(BadShape(format!(
                "{} lanes of {} requests of {} bytes with {} workers are more than {MAX_BYTES} bytes together",
                shape.lanes, shape.depth, shape.slot_bytes, shape.workers
            )));
        }
        Ok(shape)
    }

    /// Lanes: one for each reactor.
    pub fn lanes(&self) -> u32 {
        self.lanes
    }

    /// Workers, each with rings of its own on every lane.
    pub fn workers(&self) -> u32 {
        self.workers
    }

    /// Requests that a lane can have outstanding at the process; a power of two.
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// Payload bytes of one request at most; whole pages.
    pub fn slot_bytes(&self) -> u32 {
        self.slot_bytes
    }

    /// Words of one worker's rings on a lane.
    fn rings_words(&self) -> usize {
        self.depth as usize * (SUBMISSION_WORDS + COMPLETION_WORDS)
    }

    /// Words of a lane before its rings: whole cache lines.
    fn tables_words(&self) -> usize {
        CONTROL_BYTES / WORD + (2 * self.depth as usize).next_multiple_of(SUBMISSION_WORDS)
    }

    fn heads_bytes(&self) -> usize {
        (self.workers as usize * HEAD_WORDS * WORD).next_multiple_of(PAGE)
    }

    fn words_bytes(&self) -> usize {
        let words = self.tables_words() + self.workers as usize * self.rings_words();
        (words * WORD).next_multiple_of(PAGE)
    }

    fn lane_bytes(&self) -> usize {
        self.words_bytes() + self.depth as usize * self.slot_bytes as usize
    }

    /// Bytes of the whole memory. Pages that are never touched take up no room.
    pub fn bytes(&self) -> usize {
        self.heads_bytes() + self.lanes as usize * self.lane_bytes()
    }

    /// Where the heads begin in the memory, and how many words they are.
    pub(crate) fn heads(&self) -> (usize, usize) {
        (0, self.heads_bytes() / WORD)
    }

    /// The word among the heads that says that `worker` sleeps.
    pub(crate) fn worker_sleeps(&self, worker: u32) -> usize {
        assert!(worker < self.workers, "worker {worker} of {}", self.workers);
        worker as usize * HEAD_WORDS
    }

    fn lane_at(&self, lane: u32) -> usize {
        assert!(lane < self.lanes, "lane {lane} of {}", self.lanes);
        self.heads_bytes() + lane as usize * self.lane_bytes()
    }

    /// Where the words of `lane` begin in the memory, and how many there are (payload not included).
    pub(crate) fn words(&self, lane: u32) -> (usize, usize) {
        (self.lane_at(lane), self.words_bytes() / WORD)
    }

    /// Where the payload of `slot` of `lane` begins in the memory.
    pub(crate) fn payload(&self, lane: u32, slot: u32) -> usize {
        assert!(slot < self.depth, "slot {slot} of {}", self.depth);
        self.lane_at(lane) + self.words_bytes() + slot as usize * self.slot_bytes as usize
    }

    /// The word of `slot` among the aborts.
    pub(crate) fn abort_word(&self, slot: u32) -> usize {
        assert!(slot < self.depth, "slot {slot} of {}", self.depth);
        CONTROL_BYTES / WORD + slot as usize
    }

    /// The word that says when the request in `slot` was taken.
    pub(crate) fn picked_word(&self, slot: u32) -> usize {
        self.abort_word(slot) + self.depth as usize
    }

    /// The first word of the submissions to `worker`.
    pub(crate) fn submissions(&self, worker: u32) -> usize {
        assert!(worker < self.workers, "worker {worker} of {}", self.workers);
        self.tables_words() + worker as usize * self.rings_words()
    }

    /// The first word of the completions of `worker`.
    pub(crate) fn completions(&self, worker: u32) -> usize {
        self.submissions(worker) + self.depth as usize * SUBMISSION_WORDS
    }
}

/// [`Submission::timeout_ns`] of a request without a deadline.
pub const NO_TIMEOUT: u64 = u64::MAX;

/// A request as it lies in the submission ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Submission {
    /// Names the request; never 0.
    pub id: u64,
    /// Code of the operation, see [`crate::abi`].
    pub op: u8,
    /// Bits of [`crate::abi`].
    pub flags: u8,
    /// Where its payload is.
    pub slot: u16,
    /// Its payload, in bytes.
    pub bytes: u32,
    /// First block.
    pub lba: u64,
    /// Blocks.
    pub blocks: u64,
    /// Until its deadline, or [`NO_TIMEOUT`].
    pub timeout_ns: u64,
    /// First block to copy from.
    pub source_lba: u64,
    /// Whether the process is to say when it took the request, and [`Completed::done_ns`].
    pub measured: bool,
}

impl Submission {
    /// Its words behind the sequence.
    pub(crate) fn encode(&self) -> [u64; SUBMISSION_WORDS - 1] {
        let word =
            u64::from(self.op) | u64::from(self.flags) << 8 | u64::from(self.slot) << 16 | u64::from(self.bytes) << 32;
        [self.id, word, self.lba, self.blocks, self.timeout_ns, self.source_lba, self.measured.into()]
    }

    /// From the words behind the sequence.
    pub(crate) fn decode(words: [u64; SUBMISSION_WORDS - 1]) -> Submission {
        let [id, word, lba, blocks, timeout_ns, source_lba, measured] = words;
        Submission {
            id,
            op: word as u8,
            flags: (word >> 8) as u8,
            slot: (word >> 16) as u16,
            bytes: (word >> 32) as u32,
            lba,
            blocks,
            timeout_ns,
            source_lba,
            measured: measured != 0,
        }
    }
}

/// An answer as it lies in the completion ring. Nothing in it is to be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completed {
    /// The request's.
    pub id: u64,
    /// The request's.
    pub slot: u16,
    /// Code of [`crate::abi`].
    pub status: u16,
    /// Payload bytes that were moved.
    pub bytes: u32,
    /// When the handler completed it, in nanoseconds of CLOCK_MONOTONIC; 0: not measured.
    pub done_ns: u64,
}

impl Completed {
    /// Its words behind the sequence.
    pub(crate) fn encode(&self) -> [u64; COMPLETION_WORDS - 1] {
        [self.id, u64::from(self.slot) | u64::from(self.status) << 16 | u64::from(self.bytes) << 32, self.done_ns]
    }

    /// From the words behind the sequence.
    pub(crate) fn decode(words: [u64; COMPLETION_WORDS - 1]) -> Completed {
        let [id, word, done_ns] = words;
        Completed { id, slot: word as u16, status: (word >> 16) as u16, bytes: (word >> 32) as u32, done_ns }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps_and_all_of_it_is_inside() {
        for (lanes, workers, depth, slot_bytes) in
            [(1, 1, 1, 1), (1, 64, 128, 131_072), (3, 2, 100, 5000), (2, 3, MAX_DEPTH, 4096), (1, 33, 2, 1)]
        {
            let shape = Shape::new(lanes, workers, depth, slot_bytes).unwrap();
            let (heads, head_words) = shape.heads();
            assert_eq!(heads, 0);
            assert!(shape.worker_sleeps(workers - 1) < head_words);
            let mut end = head_words * WORD;
            for lane in 0..lanes {
                let (base, words) = shape.words(lane);
                assert_eq!((base, base % PAGE), (end, 0));
                const { assert!(RESET_BEFORE < CONTROL_BYTES / WORD) };
                let mut next = CONTROL_BYTES / WORD;
                for table in [Shape::abort_word, Shape::picked_word] {
                    assert_eq!(
                        (table(&shape, 0), table(&shape, shape.depth() - 1)),
                        (next, next + shape.depth() as usize - 1)
                    );
                    next += shape.depth() as usize;
                }
                for worker in 0..workers {
                    assert!(shape.submissions(worker) >= next);
                    assert_eq!(shape.submissions(worker) % SUBMISSION_WORDS, 0, "entries are whole cache lines");
                    next = shape.submissions(worker) + shape.depth() as usize * SUBMISSION_WORDS;
                    assert_eq!(shape.completions(worker), next);
                    next += shape.depth() as usize * COMPLETION_WORDS;
                }
                assert!(next <= words, "{next} of {words}");
                end = base + words * WORD;
                for slot in 0..shape.depth() {
                    assert_eq!((shape.payload(lane, slot), shape.payload(lane, slot) % PAGE), (end, 0));
                    end += shape.slot_bytes() as usize;
                }
            }
            assert_eq!(end, shape.bytes());
        }
    }

    #[test]
    fn measures_that_make_no_sense_are_refused() {
        for (lanes, workers, depth, slot_bytes) in [
            (0, 1, 1, 1),
            (1, 0, 1, 1),
            (1, 1, 0, 1),
            (1, 1, 1, 0),
            (MAX_LANES + 1, 1, 1, 1),
            (1, MAX_WORKERS + 1, 1, 1),
            (1, 1, MAX_DEPTH + 1, 1),
            (1, 1, 1, MAX_SLOT_BYTES + 1),
        ] {
            assert!(Shape::new(lanes, workers, depth, slot_bytes).is_err());
        }
        let error = Shape::new(MAX_LANES, 1, MAX_DEPTH, MAX_SLOT_BYTES).unwrap_err();
        assert!(error.to_string().contains("bytes together"), "{error}");
    }

    #[test]
    fn entries_survive_their_encoding() {
        let submission = Submission {
            id: u64::MAX - 1,
            op: 7,
            flags: 3,
            slot: 0xfedc,
            bytes: 0x8000_0001,
            lba: 1 << 60,
            blocks: 9,
            timeout_ns: NO_TIMEOUT,
            source_lba: 77,
            measured: true,
        };
        assert_eq!(Submission::decode(submission.encode()), submission);
        let completed = Completed { id: 1 << 63, slot: 0xffff, status: 0xabcd, bytes: u32::MAX, done_ns: 5 };
        assert_eq!(Completed::decode(completed.encode()), completed);
    }
}
