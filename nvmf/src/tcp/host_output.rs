//! What a host has to send: headers in one ring of bytes, payloads by the slot of their command.
//!
//! ```text
//! items:  | inline 72, slot 3 at 0, 4096 | inline 72, - | inline 24, slot 7 at 65536, 65536 |
//! ring:   ..[capsule]....................[capsule].......[H2CData]..      bytes in the order of sending
//! ```
//!
//! A command's payload stays with its slot, since the caller gets it back with the completion and one payload may go
//! in several H2CData. The caller keeps a slot and its payload alive as long as an item names it.

use std::collections::VecDeque;
use std::io::IoSlice;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Item {
    /// Bytes of the ring to send before the data.
    inline: u32,
    /// Whose data follows.
    slot: u16,
    /// From where in the slot's payload.
    offset: u32,
    /// Bytes of data; 0 for none.
    len: u32,
}

/// A queue of bytes and pieces of payloads on their way out.
#[derive(Debug)]
pub(super) struct HostOutput {
    ring: Box<[u8]>,
    /// Bytes ever taken out of and put into the ring; their difference never exceeds its length.
    head: usize,
    tail: usize,
    items: VecDeque<Item>,
    /// The most items that are ever queued.
    max_items: usize,
}

impl HostOutput {
    /// With room for `bytes` of headers and `items` pieces of payload.
    pub fn new(bytes: usize, items: usize) -> Self {
        let ring = vec![0; bytes.next_power_of_two()].into_boxed_slice();
        Self { ring, head: 0, tail: 0, items: VecDeque::with_capacity(items), max_items: items }
    }

    /// Whether `bytes` of headers with one payload between or behind them can be queued.
    #[inline]
    pub fn has_room(&self, bytes: usize) -> bool {
        self.ring.len() - (self.tail - self.head) >= bytes && self.items.len() + 2 <= self.max_items
    }

    /// The same for two payloads, `bytes` of headers in all.
    pub fn has_room_for_pair(&self, bytes: usize) -> bool {
        self.ring.len() - (self.tail - self.head) >= bytes && self.items.len() + 4 <= self.max_items
    }

    #[inline]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Queues header bytes.
    ///
    /// # Panics
    /// If there is no room for them.
    #[inline]
    pub fn push(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        assert!(bytes.len() <= self.ring.len() - (self.tail - self.head), "output was queued without asking for room");
        let at = self.tail & (self.ring.len() - 1);
        if let Some(place) = self.ring.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        } else {
            let (end, start) = bytes.split_at(self.ring.len() - at);
            self.ring[at..].copy_from_slice(end);
            self.ring[..start.len()].copy_from_slice(start);
        }
        self.tail += bytes.len();
        match self.items.back_mut() {
            Some(item) if item.len == 0 => item.inline += bytes.len() as u32,
            _ => self.items.push_back(Item { inline: bytes.len() as u32, slot: 0, offset: 0, len: 0 }),
        }
    }

    /// Queues `len` bytes of a slot's payload behind the header bytes that were queued last.
    ///
    /// # Panics
    /// If no header bytes are queued, or a payload is already behind them.
    #[inline]
    pub fn push_data(&mut self, slot: u16, offset: u32, len: u32) {
        let item = self.items.back_mut().expect("data has a header");
        assert!(item.len == 0 && len > 0, "one payload behind each header");
        (item.slot, item.offset, item.len) = (slot, offset, len);
    }

    /// Fills `out` with what to send next, in order; returns how many slices were filled. `data` gives the contiguous
    /// bytes of a slot's payload from an offset.
    pub fn gather<'a>(&'a self, out: &mut [IoSlice<'a>], data: impl Fn(u16, u32) -> &'a [u8]) -> usize {
        let mask = self.ring.len() - 1;
        let mut n = 0;
        let mut put = |slice: &'a [u8]| {
            if slice.is_empty() {
                return true;
            }
            let Some(place) = out.get_mut(n) else { return false };
            *place = IoSlice::new(slice);
            n += 1;
            true
        };
        let mut at = self.head;
        for item in &self.items {
            let start = at & mask;
            let inline = item.inline as usize;
            let first = inline.min(self.ring.len() - start);
            if !put(&self.ring[start..start + first]) || !put(&self.ring[..inline - first]) {
                return n;
            }
            at += inline;
            let (mut offset, mut left) = (item.offset, item.len);
            while left > 0 {
                let piece = data(item.slot, offset);
                let len = piece.len().min(left as usize);
                assert!(len > 0, "a payload is as long as its command said");
                if !put(&piece[..len]) {
                    return n;
                }
                offset += len as u32;
                left -= len as u32;
            }
        }
        n
    }

    /// Forgets the first `bytes`, which are sent; names the slot of each piece of payload that has left completely.
    ///
    /// # Panics
    /// If fewer bytes wait.
    pub fn sent(&mut self, mut bytes: usize, mut left: impl FnMut(u16)) {
        while let Some(item) = self.items.front_mut() {
            let inline = bytes.min(item.inline as usize);
            item.inline -= inline as u32;
            self.head += inline;
            bytes -= inline;
            if item.inline > 0 {
                return;
            }
            let had_data = item.len > 0;
            let data = bytes.min(item.len as usize);
            item.offset += data as u32;
            item.len -= data as u32;
            bytes -= data;
            if item.len > 0 {
                return;
            }
            if had_data {
                left(item.slot);
            }
            self.items.pop_front();
        }
        assert_eq!(bytes, 0, "more sent than was queued");
    }

    /// Forgets everything that is queued.
    pub fn clear(&mut self) {
        self.head = self.tail;
        self.items.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_split_sends_the_same_and_names_each_payload_once() {
        const PAYLOAD: &[u8] = b"0123456789";
        fn data(slot: u16, offset: u32) -> &'static [u8] {
            // Two segments of 4 and 6 bytes.
            let end = if offset < 4 { 4 } else { 10 };
            if slot == 1 { &PAYLOAD[offset as usize..end] } else { &PAYLOAD[9..] }
        }
        for step in 1..=22 {
            let (mut out, mut seen, mut left) = (HostOutput::new(16, 8), Vec::new(), Vec::new());
            for _ in 0..5 {
                out.push(b"head");
                out.push_data(1, 2, 8);
                out.push(b"one ");
                out.push(b"two");
                out.push_data(2, 0, 1);
                while !out.is_empty() {
                    let mut iov = [IoSlice::new(&[]); 16];
                    let n = out.gather(&mut iov, |slot, offset| data(slot, offset));
                    let now = iov[..n].iter().flat_map(|s| s.to_vec()).collect::<Vec<u8>>();
                    let n = now.len().min(step);
                    seen.extend_from_slice(&now[..n]);
                    out.sent(n, |slot| left.push(slot));
                }
            }
            assert_eq!(seen, b"head23456789one two9".repeat(5));
            assert_eq!(left, [1, 2].repeat(5));
        }
    }

    #[test]
    #[should_panic(expected = "without asking for room")]
    fn overflow_is_a_bug() {
        HostOutput::new(8, 4).push(b"123456789");
    }
}
