//! What lies where in the memory that the target shares with an external process.
//!
//! One file in memory (memfd) a session, made by the target and sealed against shrinking and growing. Everything is a
//! native-endian 64-bit word, or payload bytes. One *lane* for each reactor; `depth` is a power of two.
//!
//! ```text
//! memory     | lane 0 | lane 1 | ...                            each lane begins on a page
//!
//! lane       | control: 4096 | aborts: 8 x depth | submissions: 64 x depth | completions: 32 x depth | (to a page)
//!            | payload: slot_bytes x depth |                    each slot begins on a page
//!
//! control    word 0    process_sleeps  the process is about to sleep: ring its doorbell     process: 1, target: 0
//!            word 16   target_sleeps   the target's reactor is about to sleep: ring its     target: 1, process: 0
//!            word 32   aborts_posted   how often the target has written to `aborts`         target
//!            word 48   resets_posted   how often the device was reset                       target
//!            word 49   reset_before    the last reset is for requests of smaller ids         target
//!
//! aborts     word s    id of the request in slot `s` that the target wants back; 0: none    target
//!
//! submission word 0    sequence: position + 1, written last                                 target
//!            word 1    id of the request, never 0, never used again
//!            word 2    bits 0-7 operation, 8-15 flags, 16-31 slot, 32-63 payload bytes
//!            word 3    first block
//!            word 4    blocks
//!            word 5    nanoseconds until its deadline; all ones: none
//!            word 6    first block to copy from
//!            word 7    1: the process is to measure how long its handler has it; 0
//!
//! completion word 0    sequence: position + 1, written last                                 process
//!            word 1    id of the request
//!            word 2    bits 0-15 slot, 16-31 status, 32-63 payload bytes that were moved
//!            word 3    nanoseconds for which the handler had it, if that was to be measured; 0
//! ```
//!
//! A ring has no head and no tail in shared memory: each side counts its own positions, and an entry is there when its
//! sequence says so. So there is no count that the other side could lie about, and a completion costs the transfer of
//! one cache line instead of two. Neither ring can overflow: a slot is given out again only after its request was
//! answered, so at most `depth` entries of a ring are unread.
//!
//! The target's payload memory is not here. A request's payload is copied into its slot before it is submitted (what is
//! written), and out of it when it is completed (what was read).

use std::fmt;
use std::io;

/// Words of the control block, each on a pair of cache lines of its own.
pub(crate) const PROCESS_SLEEPS: usize = 0;
/// See [`PROCESS_SLEEPS`].
pub(crate) const TARGET_SLEEPS: usize = 16;
/// See [`PROCESS_SLEEPS`].
pub(crate) const ABORTS_POSTED: usize = 32;
/// See [`PROCESS_SLEEPS`].
pub(crate) const RESETS_POSTED: usize = 48;
/// See [`PROCESS_SLEEPS`].
pub(crate) const RESET_BEFORE: usize = 49;

const PAGE: usize = 4096;
const CONTROL_BYTES: usize = PAGE;
/// Words of a submission.
pub(crate) const SUBMISSION_WORDS: usize = 8;
/// Words of a completion.
pub(crate) const COMPLETION_WORDS: usize = 4;
const WORD: usize = 8;

/// Lanes at most: what one Unix socket can have descriptors of in flight.
pub const MAX_LANES: u32 = 64;
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
    /// to pages).
    ///
    /// # Errors
    /// When one of them is zero or above its limit, or all together above [`MAX_BYTES`].
    pub fn new(lanes: u32, depth: u32, slot_bytes: u32) -> Result<Shape, BadShape> {
        let within = |name: &str, value: u32, most: u32| {
            if value == 0 || value > most {
                return Err(BadShape(format!("{name} is {value}; it can be from 1 to {most}")));
            }
            Ok(())
        };
        within("the number of lanes", lanes, MAX_LANES)?;
        within("the queue depth", depth, MAX_DEPTH)?;
        within("the bytes of a slot", slot_bytes, MAX_SLOT_BYTES)?;
        let shape =
            Shape { lanes, depth: depth.next_power_of_two(), slot_bytes: slot_bytes.next_multiple_of(PAGE as u32) };
        if shape.bytes() as u64 > MAX_BYTES {
            return Err(BadShape(format!(
                "{} lanes of {} requests of {} bytes are more than {MAX_BYTES} bytes together",
                shape.lanes, shape.depth, shape.slot_bytes
            )));
        }
        Ok(shape)
    }

    /// Lanes: one for each reactor.
    pub fn lanes(&self) -> u32 {
        self.lanes
    }

    /// Requests that a lane can have outstanding at the process; a power of two.
    pub fn depth(&self) -> u32 {
        self.depth
    }

    /// Payload bytes of one request at most; whole pages.
    pub fn slot_bytes(&self) -> u32 {
        self.slot_bytes
    }

    fn rings_bytes(&self) -> usize {
        let depth = self.depth as usize;
        let entries = depth * WORD * (1 + SUBMISSION_WORDS + COMPLETION_WORDS);
        (CONTROL_BYTES + entries).next_multiple_of(PAGE)
    }

    fn lane_bytes(&self) -> usize {
        self.rings_bytes() + self.depth as usize * self.slot_bytes as usize
    }

    /// Bytes of the whole memory. Pages that are never touched take up no room.
    pub fn bytes(&self) -> usize {
        self.lanes as usize * self.lane_bytes()
    }

    /// Where the words of `lane` begin in the memory, and how many there are (payload not included).
    pub(crate) fn words(&self, lane: u32) -> (usize, usize) {
        assert!(lane < self.lanes, "lane {lane} of {}", self.lanes);
        (lane as usize * self.lane_bytes(), self.rings_bytes() / WORD)
    }

    /// Where the payload of `slot` of `lane` begins in the memory.
    pub(crate) fn payload(&self, lane: u32, slot: u32) -> usize {
        assert!(lane < self.lanes && slot < self.depth, "slot {slot} of lane {lane}");
        lane as usize * self.lane_bytes() + self.rings_bytes() + slot as usize * self.slot_bytes as usize
    }

    /// The word of `slot` among the aborts.
    pub(crate) fn abort_word(&self, slot: u32) -> usize {
        assert!(slot < self.depth, "slot {slot} of {}", self.depth);
        CONTROL_BYTES / WORD + slot as usize
    }

    /// The first word of the submissions.
    pub(crate) fn submissions(&self) -> usize {
        CONTROL_BYTES / WORD + self.depth as usize
    }

    /// The first word of the completions.
    pub(crate) fn completions(&self) -> usize {
        self.submissions() + self.depth as usize * SUBMISSION_WORDS
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
    /// Whether [`Completed::handler_ns`] is wanted.
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
    /// How long the handler had it; 0: not measured.
    pub handler_ns: u64,
}

impl Completed {
    /// Its words behind the sequence.
    pub(crate) fn encode(&self) -> [u64; COMPLETION_WORDS - 1] {
        [self.id, u64::from(self.slot) | u64::from(self.status) << 16 | u64::from(self.bytes) << 32, self.handler_ns]
    }

    /// From the words behind the sequence.
    pub(crate) fn decode(words: [u64; COMPLETION_WORDS - 1]) -> Completed {
        let [id, word, handler_ns] = words;
        Completed { id, slot: word as u16, status: (word >> 16) as u16, bytes: (word >> 32) as u32, handler_ns }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps_and_all_of_it_is_inside() {
        for (lanes, depth, slot_bytes) in [(1, 1, 1), (1, 128, 131_072), (3, 100, 5000), (2, MAX_DEPTH, 4096)] {
            let shape = Shape::new(lanes, depth, slot_bytes).unwrap();
            let mut end = 0;
            for lane in 0..lanes {
                let (base, words) = shape.words(lane);
                assert_eq!((base, base % PAGE), (end, 0));
                const { assert!(RESET_BEFORE < CONTROL_BYTES / WORD) };
                assert_eq!(shape.abort_word(0), CONTROL_BYTES / WORD);
                assert_eq!(shape.abort_word(shape.depth() - 1) + 1, shape.submissions());
                let last = shape.completions() + shape.depth() as usize * COMPLETION_WORDS;
                assert!(last <= words, "{last} of {words}");
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
        for (lanes, depth, slot_bytes) in
            [(0, 1, 1), (1, 0, 1), (1, 1, 0), (MAX_LANES + 1, 1, 1), (1, MAX_DEPTH + 1, 1), (1, 1, MAX_SLOT_BYTES + 1)]
        {
            assert!(Shape::new(lanes, depth, slot_bytes).is_err());
        }
        let error = Shape::new(MAX_LANES, MAX_DEPTH, MAX_SLOT_BYTES).unwrap_err();
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
        let completed = Completed { id: 1 << 63, slot: 0xffff, status: 0xabcd, bytes: u32::MAX, handler_ns: 5 };
        assert_eq!(Completed::decode(completed.encode()), completed);
    }
}
