//! Replies that wait to be sent.
//!
//! Bounded by what makes them: a request holds its slot until its last chunk has been sent, payloads are counted in the
//! connection's window, and the handshake goes on only when its replies have left.

use std::collections::VecDeque;
use std::io::IoSlice;

use reactor::Buffers;

use crate::wire::Head;

#[derive(Debug)]
struct Chunk {
    head: Head,
    data: Buffers,
    /// The slot that is free once this has been sent.
    ends: Option<u16>,
}

impl Chunk {
    fn len(&self) -> usize {
        self.head.len() + self.data.len()
    }
}

/// Chunks in the order in which they leave.
#[derive(Debug, Default)]
pub struct Output {
    chunks: VecDeque<Chunk>,
    /// Bytes of the first chunk that have left.
    sent: usize,
    bytes: usize,
}

impl Output {
    /// Whether nothing waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Bytes that wait.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Queues a chunk.
    #[inline]
    pub fn push(&mut self, head: Head, data: Buffers, ends: Option<u16>) {
        let chunk = Chunk { head, data, ends };
        self.bytes += chunk.len();
        self.chunks.push_back(chunk);
    }

    /// Fills `out` with what to send next, in order; returns how many slices were filled.
    pub fn gather<'a>(&'a self, out: &mut [IoSlice<'a>]) -> usize {
        let mut skip = self.sent;
        let mut count = 0;
        for chunk in &self.chunks {
            for part in std::iter::once(&chunk.head[..]).chain(chunk.data.segments()) {
                if skip >= part.len() {
                    skip -= part.len();
                    continue;
                }
                if count == out.len() {
                    return count;
                }
                out[count] = IoSlice::new(&part[skip..]);
                skip = 0;
                count += 1;
            }
        }
        count
    }

    /// The first `n` bytes have left: `done` gets the payload and the slot of each chunk that is through.
    pub fn advance(&mut self, n: usize, mut done: impl FnMut(Buffers, Option<u16>)) {
        assert!(n <= self.bytes, "no more is sent than was there");
        self.sent += n;
        self.bytes -= n;
        while let Some(first) = self.chunks.front()
            && self.sent >= first.len()
        {
            self.sent -= first.len();
            let chunk = self.chunks.pop_front().expect("it was just seen");
            done(chunk.data, chunk.ends);
        }
    }

    /// Forgets everything; `put` gets the payloads.
    pub fn clear(&mut self, mut put: impl FnMut(Buffers)) {
        self.chunks.drain(..).for_each(|chunk| put(chunk.data));
        (self.sent, self.bytes) = (0, 0);
    }
}
