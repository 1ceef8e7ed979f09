//! Scatter lists.

use std::cell::RefCell;
use std::fmt;
use std::ptr::NonNull;

use smallvec::SmallVec;

use super::{Buffer, Home};

/// An owned scatter list: the payload of one command. Segments other than the last are full.
///
/// It is one word: lists change hands several times a command, inside of requests, events and completions, and a processor that
/// copies a structure right after its parts were written waits for all stores before them.
#[derive(Default)]
pub struct Buffers(pub(super) Option<Box<List>>);

/// What a list is of.
#[derive(Default)]
pub(super) struct List {
    pub(super) segments: SmallVec<[Buffer; 2]>,
    pub(super) len: u32,
}

/// Lists without segments that a thread keeps for its next ones at most: as many as a reactor has buffers.
const MAX_SPARE_LISTS: usize = 4096;

thread_local! {
    // Boxed because that is how they travel.
    #[allow(clippy::vec_box)]
    static SPARE_LISTS: RefCell<Vec<Box<List>>> = const { RefCell::new(Vec::new()) };
}

impl Drop for Buffers {
    #[inline]
    fn drop(&mut self) {
        if let Some(mut list) = self.0.take() {
            list.segments.clear();
            list.len = 0;
            // A thread that ends has no place for it.
            let _ = SPARE_LISTS.try_with(|spare| {
                let mut spare = spare.borrow_mut();
                if spare.len() < MAX_SPARE_LISTS {
                    spare.push(list);
                }
            });
        }
    }
}

impl Buffers {
    /// An empty list.
    #[inline]
    pub const fn new() -> Buffers {
        Buffers(None)
    }

    #[inline]
    fn list(&mut self) -> &mut List {
        let spare = || SPARE_LISTS.try_with(|spare| spare.borrow_mut().pop()).ok().flatten().unwrap_or_default();
        self.0.get_or_insert_with(spare)
    }

    #[inline]
    pub(super) fn buffers(&self) -> &[Buffer] {
        self.0.as_ref().map_or(&[], |list| &list.segments)
    }

    /// Zeroed memory of its own, outside any pool, in one segment. For control paths and tests.
    pub fn heap(len: usize) -> Buffers {
        let mut list = Buffers::new();
        if len > 0 {
            list.push(Buffer::heap(len));
        }
        list
    }

    /// Appends a buffer with all of its present length.
    ///
    /// # Panics
    /// If the total would pass `u32::MAX` bytes.
    pub fn push(&mut self, buffer: Buffer) {
        let list = self.list();
        list.len = list.len.checked_add(buffer.len).expect("a scatter list is shorter than 4 GiB");
        list.segments.push(buffer);
    }

    /// Payload bytes in all segments together.
    #[inline]
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |list| list.len as usize)
    }

    /// Whether there is no payload.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether any of it is somebody else's memory, lent by [`Buffers::view`]: it must not be kept past the lender's contract.
    pub fn has_views(&self) -> bool {
        self.buffers().iter().any(|buffer| matches!(buffer.home, Home::View))
    }

    /// Number of segments.
    pub fn segment_count(&self) -> usize {
        self.buffers().len()
    }

    /// The segments in order.
    pub fn segments(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.buffers().iter().map(|b| &**b)
    }

    /// The segments in order, writable.
    pub fn segments_mut(&mut self) -> impl ExactSizeIterator<Item = &mut [u8]> {
        self.buffers_mut().iter_mut().map(|b| &mut **b)
    }

    /// The buffers themselves, for registration checks and addresses.
    #[inline]
    pub fn buffers_mut(&mut self) -> &mut [Buffer] {
        self.0.as_mut().map_or(&mut [], |list| &mut list.segments)
    }

    /// Takes the buffers out, leaving an empty list.
    pub fn drain(&mut self) -> impl Iterator<Item = Buffer> {
        self.0.as_mut().into_iter().flat_map(|list| {
            list.len = 0;
            list.segments.drain(..)
        })
    }

    /// The contiguous bytes from `offset` to the end of the segment that holds it; empty at the end.
    pub fn slice_at(&self, offset: usize) -> &[u8] {
        let mut start = 0;
        for segment in self.buffers() {
            if offset < start + segment.len() {
                return &segment[offset - start..];
            }
            start += segment.len();
        }
        &[]
    }

    /// As [`Buffers::slice_at`], writable.
    pub fn slice_at_mut(&mut self, offset: usize) -> &mut [u8] {
        let mut start = 0;
        for segment in self.buffers_mut() {
            let len = segment.len();
            if offset < start + len {
                return &mut segment[offset - start..];
            }
            start += len;
        }
        &mut []
    }

    /// Copies `bytes` into the payload at `offset`.
    ///
    /// # Panics
    /// If the range passes the end of the payload.
    pub fn write_at(&mut self, mut offset: usize, mut bytes: &[u8]) {
        assert!(offset.saturating_add(bytes.len()) <= self.len(), "write past the end of a payload");
        while !bytes.is_empty() {
            let room = self.slice_at_mut(offset);
            let n = room.len().min(bytes.len());
            room[..n].copy_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            offset += n;
        }
    }

    /// Copies from the payload at `offset` into `out`.
    ///
    /// # Panics
    /// If the range passes the end of the payload.
    pub fn read_at(&self, mut offset: usize, mut out: &mut [u8]) {
        assert!(offset.saturating_add(out.len()) <= self.len(), "read past the end of a payload");
        while !out.is_empty() {
            let have = self.slice_at(offset);
            let n = have.len().min(out.len());
            out[..n].copy_from_slice(&have[..n]);
            out = &mut out[n..];
            offset += n;
        }
    }

    /// Sets every payload byte to `value`.
    pub fn fill(&mut self, value: u8) {
        for segment in self.buffers_mut() {
            segment.fill(value);
        }
    }

    /// Makes every payload byte zero. Buffers that still are what the last call left cost nothing: devices that have nothing
    /// written would otherwise fill the same memory over and over.
    #[inline]
    pub fn zero(&mut self) {
        for buffer in self.buffers_mut() {
            if !buffer.zeroes {
                buffer.fill(0);
                buffer.zeroes = buffer.len == buffer.capacity && matches!(buffer.home, Home::Pool(_) | Home::Heap);
            }
        }
    }

    /// The payload in one vector. For control paths and tests.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = vec![0; self.len()];
        self.read_at(0, &mut out);
        out
    }

    /// Shortens the payload to `len` bytes; buffers past the end go home.
    pub fn truncate(&mut self, len: usize) {
        let Some(list) = &mut self.0 else { return };
        let mut left = len.min(list.len as usize);
        list.len = left as u32;
        let mut keep = 0;
        for segment in &mut list.segments {
            if left == 0 {
                break;
            }
            let n = segment.len().min(left);
            segment.len = n as u32;
            left -= n;
            keep += 1;
        }
        list.segments.truncate(keep);
    }

    /// Makes every segment as long as its buffer is: undoes [`Buffers::truncate`] for a list of one buffer. The bytes that come
    /// back are unspecified.
    ///
    /// # Panics
    /// If the total would pass `u32::MAX` bytes.
    pub fn widen(&mut self) {
        let Some(list) = &mut self.0 else { return };
        let mut len = 0u32;
        for segment in &mut list.segments {
            segment.len = segment.capacity;
            len = len.checked_add(segment.len).expect("a scatter list is shorter than 4 GiB");
        }
        list.len = len;
    }

    /// A second list over `len` bytes of this payload from `offset`, for handing a part of a parent's memory to a
    /// child operation.
    ///
    /// # Safety
    /// The parent list must outlive the view, must not be touched (read, written, truncated) while the view lives, and
    /// no two live views of it may overlap unless all of them are only read.
    ///
    /// # Panics
    /// If the range passes the end of the payload.
    pub unsafe fn view(&mut self, offset: usize, len: usize) -> Buffers {
        assert!(offset.saturating_add(len) <= self.len(), "view past the end of a payload");
        let mut view = Buffers::new();
        let mut done = 0;
        while done < len {
            let piece = self.slice_at_mut(offset + done);
            let n = piece.len().min(len - done);
            let ptr = NonNull::from(&mut *piece).cast::<u8>();
            view.push(Buffer { ptr, len: n as u32, capacity: n as u32, zeroes: false, home: Home::View });
            done += n;
        }
        view
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffers({} bytes in {})", self.len(), self.segment_count())
    }
}

impl From<&[u8]> for Buffers {
    fn from(bytes: &[u8]) -> Buffers {
        let mut list = Buffers::heap(bytes.len());
        list.write_at(0, bytes);
        list
    }
}
