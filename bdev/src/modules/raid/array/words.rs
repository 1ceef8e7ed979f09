//! What the machine is told and what it says.

#[cfg(doc)]
use super::Array;

/// How reactors treat a leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Reads and writes.
    InSync,
    /// Writes.
    Rebuilding,
    /// Nothing, and nothing that it has not got is acknowledged.
    Suspect,
    /// Nothing.
    Out,
}

/// What reactors are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Grows.
    pub generation: u64,
    /// By leg.
    pub legs: Vec<Standing>,
    /// Everything fails.
    pub offline: bool,
}

/// What is written to a leg besides data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meta {
    /// A flush.
    Flush,
    /// A block of the log.
    Log,
    /// A superblock.
    Super,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Write durably (or flush); then [`Array::meta_done`].
    Meta {
        /// To be given back.
        op: u64,
        /// To which leg.
        leg: usize,
        /// What.
        what: Meta,
        /// First block, on the leg.
        lba: u64,
        /// Whole units; none for a flush.
        bytes: Vec<u8>,
    },
    /// Bring [`Array::view`] to all reactors; then [`Array::told`].
    Tell(u64),
    /// Ask all reactors to give back regions that they do not use; then [`Array::revoked`].
    Revoke(u64),
    /// A reactor may write these regions.
    Grant {
        /// The reactor.
        to: u32,
        /// The regions.
        regions: Vec<usize>,
    },
    /// Keep writes out of these blocks of the array; then [`Array::locked`].
    Lock {
        /// First block.
        lba: u64,
        /// Blocks.
        blocks: u64,
    },
    /// The opposite.
    Unlock,
    /// Copy blocks of the array from one leg to another; then [`Array::copied`].
    Copy {
        /// From this leg.
        from: usize,
        /// To this.
        to: usize,
        /// First block.
        lba: u64,
        /// Blocks.
        blocks: u64,
    },
    /// A leg has changed its state: for the log.
    Note {
        /// Which.
        leg: usize,
        /// What happened.
        text: String,
    },
}

/// The rules that hold data together, for tests that take one out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A leg that is out is out in all superblocks before anything depends on it.
    DurableBeforeOut,
    /// No reactor reads from a leg of which another acknowledges less.
    SuspectFirst,
    /// A region's bit is durable before it is written.
    MarkFirst,
    /// What was written when the array ended is copied.
    Resync,
    /// Bits are cleared behind a flush.
    FlushBeforeClear,
    /// Regions that are written when a leg goes out are lacking on it.
    Settle,
    /// A leg lacks what is written before every reactor writes to it.
    Receiving,
    /// Nobody writes where something is copied.
    Lock,
    /// A leg calls itself in sync only when all others do.
    PromotedLast,
    /// Regions in use keep their bits.
    Revoke,
}

/// How a copy ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyEnd {
    /// Well.
    Done,
    /// It could not be read.
    Source,
    /// It could not be written.
    Target,
}

/// A copy of what a leg lacks, as RPCs show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// To which leg.
    pub target: usize,
    /// Blocks that are copied.
    pub done: u64,
    /// Blocks that were to be.
    pub total: u64,
}
