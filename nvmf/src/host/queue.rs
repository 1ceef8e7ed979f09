//! I/O commands on one queue pair.

use super::Error;
use super::transport::{Completion, Payload, Qpair};
use crate::spec::opcode::io;
use crate::spec::{Sqe, Status};
use reactor::{Buffers, Instant};
use std::time::Duration;
use zerocopy::FromZeros;
use zerocopy::little_endian::{U16, U32};

/// A connected I/O queue.
///
/// A queue on which commands are outstanding and none completes for the time given at its making is given up as a
/// whole: the fate of all its commands is unknown then.
pub struct IoQueue {
    qpair: Box<dyn Qpair>,
    timeout: Duration,
    /// When something completed last, or the queue was seen empty.
    moved: Instant,
}

impl IoQueue {
    pub(super) fn new(qpair: Box<dyn Qpair>, timeout: Duration, now: Instant) -> IoQueue {
        IoQueue { qpair, timeout, moved: now }
    }

    /// Whether a command will be taken.
    #[inline]
    pub fn can_submit(&self) -> bool {
        self.qpair.can_submit()
    }

    /// Commands that have not completed.
    pub fn outstanding(&self) -> usize {
        self.qpair.outstanding()
    }

    /// Any command. What it says about CID, PSDT and the data pointer does not matter.
    ///
    /// # Panics
    /// If [`can_submit`](Self::can_submit) is false, or `data` is not as long as `payload` says.
    #[inline]
    pub fn submit(&mut self, user: u64, sqe: Sqe, payload: Payload, data: Buffers) {
        self.qpair.submit(user, sqe, payload, data);
    }

    /// Reads `blocks` blocks (1 to 65536) from block `slba` into all of `data`.
    #[inline]
    pub fn read(&mut self, user: u64, nsid: u32, slba: u64, blocks: u32, data: Buffers) {
        let payload = Payload::ToHost(data.len() as u32);
        self.submit(user, block_command(io::READ, nsid, slba, blocks), payload, data);
    }

    /// Writes all of `data` to `blocks` blocks (1 to 65536) from block `slba` on.
    #[inline]
    pub fn write(&mut self, user: u64, nsid: u32, slba: u64, blocks: u32, data: Buffers) {
        let payload = Payload::ToController(data.len() as u32);
        self.submit(user, block_command(io::WRITE, nsid, slba, blocks), payload, data);
    }

    /// Zeroes `blocks` blocks (1 to 65536) from block `slba` on.
    pub fn write_zeroes(&mut self, user: u64, nsid: u32, slba: u64, blocks: u32) {
        self.submit(user, block_command(io::WRITE_ZEROES, nsid, slba, blocks), Payload::None, Buffers::new());
    }

    /// Makes everything that was acknowledged before durable.
    pub fn flush_cache(&mut self, user: u64, nsid: u32) {
        let mut sqe = Sqe::new_zeroed();
        (sqe.opcode, sqe.nsid) = (io::FLUSH, U32::new(nsid));
        self.submit(user, sqe, Payload::None, Buffers::new());
    }

    /// Sends what waits, in one call as far as it fits.
    ///
    /// # Errors
    /// [`Error::Transport`]: the queue is of no use any more.
    pub fn send(&mut self) -> Result<(), Error> {
        self.qpair.flush().map_err(Error::Transport)
    }

    /// Receives once and appends what has completed. A command that read less than its payload and was called
    /// successful completes as Data Transfer Error.
    ///
    /// # Errors
    /// The queue is of no use any more; [`close`](Self::close) gives the commands back.
    pub fn poll(&mut self, now: Instant, done: &mut Vec<Completion>) -> Result<bool, Error> {
        let before = done.len();
        let received = self.qpair.poll(done).map_err(Error::Transport)?;
        for completion in &mut done[before..] {
            if completion.cqe.status().is_success() && (completion.transferred_bytes as usize) < completion.data.len() {
                completion.cqe.status_field = U16::new(Status::DATA_TRANSFER_ERROR.to_field());
            }
        }
        if done.len() > before || self.qpair.outstanding() == 0 {
            self.moved = now;
        } else if now.since(self.moved) > self.timeout {
            return Err(Error::Timeout { what: "an I/O command" });
        }
        Ok(received)
    }

    /// Ends the queue: gives back the commands that have not completed, whose fate is unknown.
    pub fn close(&mut self, lost: &mut dyn FnMut(u64, Buffers)) {
        self.qpair.close(lost);
    }
}

/// A command on a range of blocks.
///
/// # Panics
/// If `blocks` is not 1 to 65536.
fn block_command(opcode: u8, nsid: u32, slba: u64, blocks: u32) -> Sqe {
    assert!((1..=65536).contains(&blocks), "{blocks} blocks in one command");
    let mut sqe = Sqe::new_zeroed();
    (sqe.opcode, sqe.nsid) = (opcode, U32::new(nsid));
    sqe.cdw10 = U32::new(slba as u32);
    sqe.cdw11 = U32::new((slba >> 32) as u32);
    sqe.cdw12 = U32::new(blocks - 1);
    sqe
}
