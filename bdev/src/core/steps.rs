//! What a runtime has to do next, in order.
//!
//! An entry is two words, which processors store and load as such. As an enumeration it was written word by word and copied as a
//! whole right after, and a load that spans several earlier stores waits until all stores before them have reached the cache.

use std::collections::VecDeque;

use super::io::Io;
use super::runtime::ChannelId;

/// One thing to do.
pub(super) enum Step {
    Submit(ChannelId, Io),
    Complete(Io),
    AbortAll(ChannelId),
    Poll(ChannelId),
}

const SUBMIT: u64 = 0;
const COMPLETE: u64 = 1;
const ABORT_ALL: u64 = 2;
const POLL: u64 = 3;

struct Entry {
    /// What, in the lower half; the channel, in the upper.
    what: u64,
    io: Io,
}

/// The queue. Bounded by the I/Os of the reactor, and one abort and one poll for each time that a module asks for them.
#[derive(Default)]
pub(super) struct Steps(VecDeque<Entry>);

impl Steps {
    #[inline]
    fn push(&mut self, what: u64, channel: u32, io: Io) {
        self.0.push_back(Entry { what: what | u64::from(channel) << 32, io });
    }

    #[inline]
    pub(super) fn submit(&mut self, to: ChannelId, io: Io) {
        self.push(SUBMIT, to.0, io);
    }

    #[inline]
    pub(super) fn complete(&mut self, io: Io) {
        self.push(COMPLETE, 0, io);
    }

    #[inline]
    pub(super) fn abort_all(&mut self, channel: ChannelId) {
        self.push(ABORT_ALL, channel.0, Io::nothing());
    }

    #[inline]
    pub(super) fn poll(&mut self, channel: ChannelId) {
        self.push(POLL, channel.0, Io::nothing());
    }

    #[inline]
    pub(super) fn pop(&mut self) -> Option<Step> {
        let Entry { what, io } = self.0.pop_front()?;
        let channel = ChannelId((what >> 32) as u32);
        Some(match what & 0xffff_ffff {
            SUBMIT => Step::Submit(channel, io),
            COMPLETE => Step::Complete(io),
            ABORT_ALL => Step::AbortAll(channel),
            _ => Step::Poll(channel),
        })
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
