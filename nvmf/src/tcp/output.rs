//! What waits to be sent: headers in one ring of bytes, payloads by reference.
//!
//! ```text
//! items:  | inline 24, data 4096 | inline 24, data 4096 | inline 96, - |
//! ring:   ..[C2HData header]......[C2HData header].......[4 responses]..      bytes in the order of sending
//! iovec:    ^24  ^data             ^24  ^data             ^96
//! ```
//!
//! Headers, padding, digests and whole capsules are copied into the ring when they are queued, so that neighbours
//! without payload between them make one slice, and a slot is free again as soon as its response is queued. The ring
//! and the list of payloads never overflow: the connection accepts a command only while there is room for the most that any
//! command can add.

use reactor::buffer::Buffers;
use std::collections::VecDeque;
use std::io::IoSlice;

#[derive(Debug)]
struct Item {
    /// Bytes of the ring to send before the data.
    inline: u32,
    /// Payload to send behind them; empty for none.
    data: Buffers,
}

/// A queue of bytes and payloads on their way out.
#[derive(Debug)]
pub(super) struct Output {
    ring: Box<[u8]>,
    /// Bytes ever taken out of and put into the ring; their difference never exceeds its length.
    head: usize,
    tail: usize,
    items: VecDeque<Item>,
    /// Bytes of the front item's data that are sent.
    data_sent: usize,
    /// Payload bytes that are queued and not sent.
    data_pending: usize,
}

impl Output {
    /// Bytes of the entry of one payload.
    pub const ITEM_BYTES: usize = size_of::<Item>();

    /// With room for at least `bytes` of headers.
    pub fn new(bytes: usize) -> Self {
        let len = bytes.next_power_of_two();
        Self {
            ring: vec![0; len].into_boxed_slice(),
            head: 0,
            tail: 0,
            items: VecDeque::new(),
            data_sent: 0,
            data_pending: 0,
        }
    }

    /// Makes room for at least `bytes` of headers and `items` payloads. Keeps what is queued.
    pub fn reserve(&mut self, bytes: usize, items: usize) {
        if bytes > self.ring.len() {
            let mut ring = vec![0; bytes.next_power_of_two()].into_boxed_slice();
            let pending = self.tail - self.head;
            for i in 0..pending {
                ring[i] = self.ring[(self.head + i) & (self.ring.len() - 1)];
            }
            (self.ring, self.head, self.tail) = (ring, 0, pending);
        }
        self.items.reserve_exact(items);
    }

    /// Header bytes that can still be queued.
    #[inline]
    pub fn room(&self) -> usize {
        self.ring.len() - (self.tail - self.head)
    }

    /// True if nothing waits.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Entries that wait: at most one more than payloads.
    #[inline]
    pub fn items(&self) -> usize {
        self.items.len()
    }

    /// All bytes that wait.
    pub fn pending_bytes(&self) -> usize {
        self.tail - self.head + self.data_pending
    }

    /// Queues header bytes.
    ///
    /// # Panics
    /// If there is no room for them.
    #[inline]
    pub fn push(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.room(), "more output than commands can produce");
        let mask = self.ring.len() - 1;
        let at = self.tail & mask;
        if let Some(place) = self.ring.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        } else {
            let (end, start) = bytes.split_at(self.ring.len() - at);
            self.ring[at..].copy_from_slice(end);
            self.ring[..start.len()].copy_from_slice(start);
        }
        self.tail += bytes.len();
        match self.items.back_mut() {
            Some(item) if item.data.is_empty() => item.inline += bytes.len() as u32,
            _ => self.items.push_back(Item { inline: bytes.len() as u32, data: Buffers::new() }),
        }
    }

    /// Queues a payload behind the header bytes that were queued last.
    ///
    /// # Panics
    /// If no header bytes are queued, or a payload is already behind them.
    #[inline]
    pub fn push_data(&mut self, data: Buffers) {
        let item = self.items.back_mut().expect("data has a header");
        assert!(item.data.is_empty() && !data.is_empty(), "one payload behind each header");
        self.data_pending += data.len();
        item.data = data;
    }

    /// Fills `out` with what to send next, in order; returns how many slices were filled.
    pub fn gather<'a>(&'a self, out: &mut [IoSlice<'a>]) -> usize {
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
        let mut skip = self.data_sent;
        for item in &self.items {
            let start = at & mask;
            let inline = item.inline as usize;
            let first = inline.min(self.ring.len() - start);
            if !put(&self.ring[start..start + first]) || !put(&self.ring[..inline - first]) {
                return n;
            }
            at += inline;
            for segment in item.data.segments() {
                let skipped = skip.min(segment.len());
                skip -= skipped;
                if !put(&segment[skipped..]) {
                    return n;
                }
            }
        }
        n
    }

    /// Forgets the first `bytes`, which are sent; gives payloads that are sent completely to `free`.
    ///
    /// # Panics
    /// If fewer bytes wait.
    pub fn sent(&mut self, mut bytes: usize, free: &mut dyn FnMut(Buffers)) {
        assert!(bytes <= self.pending_bytes(), "more sent than was queued");
        while let Some(item) = self.items.front_mut() {
            let inline = bytes.min(item.inline as usize);
            item.inline -= inline as u32;
            self.head += inline;
            bytes -= inline;
            if item.inline > 0 {
                return;
            }
            let data = bytes.min(item.data.len() - self.data_sent);
            self.data_sent += data;
            self.data_pending -= data;
            bytes -= data;
            if self.data_sent < item.data.len() {
                return;
            }
            self.data_sent = 0;
            if let Some(item) = self.items.pop_front()
                && !item.data.is_empty()
            {
                free(item.data);
            }
        }
    }

    /// Forgets everything that is queued; gives the payloads to `free`.
    pub fn clear(&mut self, free: &mut dyn FnMut(Buffers)) {
        self.head = self.tail;
        (self.data_sent, self.data_pending) = (0, 0);
        for item in self.items.drain(..) {
            if !item.data.is_empty() {
                free(item.data);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(out: &Output) -> Vec<u8> {
        let mut iov = [IoSlice::new(&[]); 64];
        let n = out.gather(&mut iov);
        iov[..n].iter().flat_map(|s| s.to_vec()).collect()
    }

    #[test]
    fn neighbours_share_a_slice_and_payloads_keep_their_place() {
        let mut out = Output::new(64);
        out.push(b"head");
        out.push_data(Buffers::from(&b"payload"[..]));
        out.push(b"one ");
        out.push(b"two");
        let mut iov = [IoSlice::new(&[]); 8];
        assert_eq!(out.gather(&mut iov), 3);
        assert_eq!(bytes(&out), b"headpayloadone two");
        assert_eq!(out.pending_bytes(), 18);
    }

    #[test]
    fn any_split_of_sending_sends_the_same() {
        for step in 1..=18 {
            let mut out = Output::new(16);
            let mut freed = 0;
            let mut seen = Vec::new();
            for _ in 0..5 {
                out.push(b"head");
                out.push_data(Buffers::from(&b"payload"[..]));
                out.push(b"one ");
                out.push(b"two");
                while !out.is_empty() {
                    let now = bytes(&out);
                    let n = now.len().min(step);
                    seen.extend_from_slice(&now[..n]);
                    out.sent(n, &mut |data| freed += data.len());
                }
            }
            assert_eq!(seen, b"headpayloadone two".repeat(5));
            assert_eq!((freed, out.room()), (35, 16));
        }
    }

    #[test]
    fn a_short_list_of_slices_is_no_harm() {
        let mut out = Output::new(64);
        for _ in 0..3 {
            out.push(b"h");
            out.push_data(Buffers::from(&b"dd"[..]));
        }
        let mut iov = [IoSlice::new(&[]); 3];
        assert_eq!(out.gather(&mut iov), 3);
        assert_eq!(iov.iter().flat_map(|s| s.to_vec()).collect::<Vec<u8>>(), b"hddh");
    }

    #[test]
    fn growing_keeps_the_bytes() {
        let mut out = Output::new(8);
        out.push(b"123456");
        out.sent(5, &mut |_| ());
        out.push(b"789abc");
        out.reserve(100, 4);
        out.push(b"def");
        assert_eq!(bytes(&out), b"6789abcdef");
        assert_eq!(out.room(), 128 - 10);
    }

    #[test]
    #[should_panic(expected = "more output than commands can produce")]
    fn overflow_is_a_bug() {
        Output::new(8).push(b"123456789");
    }
}
