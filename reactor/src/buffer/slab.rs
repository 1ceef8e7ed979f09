//! Memory in pieces that lie side by side, so that many of them share a huge page.
//!
//! What is read and written at random in ordinary pages waits for the processor to find each page, in a virtual machine
//! most of all: 4 KiB at random from 512 MiB took a fifth to a third less time out of huge pages.
//!
//! ```text
//! slab (2 MiB, aligned): | piece 0 | piece 1 | ... | piece 31 |      a piece is 64 KiB
//! ```
//! A slab in ordinary pages takes memory only for what is written. Once half of its pieces are taken, the kernel may gather it
//! into a huge page when it finds the time, so that no reactor waits for it; once less than a quarter is left, the memory of the
//! free ones goes back. So it takes at most four times the memory of the pieces that are taken. Whoever expects a slab to fill
//! asks for a huge page at once, which comes with the first byte.

use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use super::{Buffer, Home};

/// Bytes of a slab, and its alignment: a huge page.
pub const SLAB_BYTES: usize = 2 << 20;
/// Bytes of a piece.
pub const PIECE_BYTES: usize = 64 << 10;
/// Pieces of a slab.
pub const PIECES: usize = SLAB_BYTES / PIECE_BYTES;

/// Pieces taken from which on a huge page is worth its memory.
const GATHER: u32 = 16;
/// Pieces taken below which it is not any more.
const SCATTER: u32 = 8;

/// 2 MiB of memory in [`PIECES`] pieces, each of which is taken once at a time.
///
/// The mapping ends with the last piece and the last reference to the slab.
pub struct Slab {
    base: NonNull<u8>,
    state: Mutex<State>,
}

/// One bit a piece.
#[derive(Default)]
struct State {
    taken: u32,
    /// May hold something other than zeroes.
    dirty: u32,
    is_gathered: bool,
}

// SAFETY: `base` names plain memory, of which a piece is only reached through the one Buffer that has it, or under the lock.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

impl Slab {
    /// Reserves the address space of a slab. It takes no memory yet. With `huge`, a huge page if the host has one.
    ///
    /// # Errors
    /// When the mapping is refused (limits of address space or of mappings).
    pub fn map(huge: bool) -> io::Result<Arc<Slab>> {
        // Twice as much has an aligned half, wherever it begins.
        // SAFETY: a fresh anonymous mapping chosen by the kernel aliases nothing.
        let start = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            mmap_anonymous(std::ptr::null_mut(), 2 * SLAB_BYTES, access, MapFlags::PRIVATE)?
        };
        let before = start.cast::<u8>().align_offset(SLAB_BYTES);
        // SAFETY: both ranges are parts of the mapping that was just made, and nobody knows of them.
        let base = unsafe {
            let base = start.cast::<u8>().add(before);
            if before > 0 {
                let _ = munmap(start, before);
            }
            let _ = munmap(base.add(SLAB_BYTES).cast(), SLAB_BYTES - before);
            base
        };
        let base = NonNull::new(base).ok_or_else(|| io::Error::other("mmap returned a null address"))?;
        let slab = Slab { base, state: Mutex::new(State { is_gathered: huge, ..State::default() }) };
        slab.advise(huge);
        Ok(Arc::new(slab))
    }

    /// A piece, all zeroes; `None` while it is taken.
    ///
    /// # Panics
    /// If there is no such piece.
    pub fn take(self: &Arc<Self>, piece: usize) -> Option<Buffer> {
        assert!(piece < PIECES, "a slab has {PIECES} pieces");
        let bit = 1 << piece;
        let mut state = self.state();
        if state.taken & bit != 0 {
            return None;
        }
        // SAFETY: inside the mapping.
        let ptr = unsafe { self.base.add(piece * PIECE_BYTES) };
        if state.dirty & bit != 0 {
            // SAFETY: nobody has this piece, and nobody gets it while the lock is held.
            unsafe { ptr.write_bytes(0, PIECE_BYTES) };
        }
        state.taken |= bit;
        state.dirty |= bit;
        if !state.is_gathered && state.taken.count_ones() >= GATHER {
            state.is_gathered = true;
            self.advise(true);
        }
        let bytes = PIECE_BYTES as u32;
        Some(Buffer { ptr, len: bytes, capacity: bytes, zeroes: true, home: Home::Slab(Arc::clone(self)) })
    }

    /// Takes the piece at `ptr` back.
    pub(super) fn give_back(&self, ptr: NonNull<u8>) {
        let piece = (ptr.as_ptr() as usize - self.base.as_ptr() as usize) / PIECE_BYTES;
        let mut state = self.state();
        state.taken &= !(1 << piece);
        if state.taken.count_ones() >= SCATTER {
            return;
        }
        if std::mem::take(&mut state.is_gathered) {
            self.advise(false);
        }
        for piece in 0..PIECES {
            let bit = 1 << piece;
            if state.dirty & !state.taken & bit == 0 {
                continue;
            }
            // SAFETY: inside the mapping; nobody has this piece, and the lock keeps it so. It reads as zeroes afterwards.
            let forgotten = unsafe {
                let at = self.base.add(piece * PIECE_BYTES);
                madvise(at.as_ptr().cast(), PIECE_BYTES, Advice::LinuxDontNeed)
            };
            if forgotten.is_ok() {
                state.dirty &= !bit;
            }
        }
    }

    /// Whether at least half of its pieces are taken.
    pub fn is_half_taken(&self) -> bool {
        self.state().taken.count_ones() >= GATHER
    }

    /// Whether memory may come in a huge page, whatever the host does for others. Not to get one is no error.
    fn advise(&self, huge: bool) {
        let advice = if huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
        // SAFETY: the range is this mapping, and what it holds stays what it is.
        let _ = unsafe { madvise(self.base.as_ptr().cast(), SLAB_BYTES, advice) };
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        // SAFETY: every piece holds an Arc to this value, so none is left; the mapping is ours.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), SLAB_BYTES) };
    }
}

impl fmt::Debug for Slab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slab").field("taken", &self.state().taken.count_ones()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(piece: &mut Buffer, with: u8) {
        piece.fill(with);
    }

    fn is_all(piece: &Buffer, byte: u8) -> bool {
        piece.iter().all(|b| *b == byte)
    }

    /// Bytes of the slab that have memory.
    fn resident(slab: &Slab) -> usize {
        let mut pages = vec![0u8; SLAB_BYTES / 4096];
        // SAFETY: the range is mapped, and the list has a byte for each page of it.
        let told = unsafe { libc::mincore(slab.base.as_ptr().cast(), SLAB_BYTES, pages.as_mut_ptr()) };
        assert_eq!(told, 0, "{}", io::Error::last_os_error());
        pages.iter().filter(|page| **page & 1 != 0).count() * 4096
    }

    #[test]
    fn a_piece_is_taken_once_and_comes_back_as_zeroes() {
        let slab = Slab::map(false).unwrap();
        assert_eq!(slab.base.as_ptr() as usize % SLAB_BYTES, 0);
        let mut pieces: Vec<_> = (0..PIECES).map(|piece| slab.take(piece).unwrap()).collect();
        for (n, piece) in pieces.iter_mut().enumerate() {
            assert!(piece.len() == PIECE_BYTES && is_all(piece, 0));
            fill(piece, n as u8 + 1);
        }
        assert!((0..PIECES).all(|piece| slab.take(piece).is_none()));
        // One that is free among many keeps its memory, and few give theirs back: either way nobody sees what was there.
        for left in (0..PIECES).rev() {
            drop(pieces.pop());
            assert!(is_all(&slab.take(left).unwrap(), 0), "{left}");
            assert!(pieces.iter().enumerate().all(|(n, piece)| is_all(piece, n as u8 + 1)), "{left}");
        }
    }

    #[test]
    fn one_that_is_half_taken_may_be_gathered() {
        let slab = Slab::map(false).unwrap();
        let mut pieces: Vec<_> = (0..GATHER as usize - 1).map(|piece| slab.take(2 * piece).unwrap()).collect();
        pieces.iter_mut().enumerate().for_each(|(n, piece)| fill(piece, n as u8 + 1));
        assert!(!slab.state().is_gathered);
        let last = slab.take(1).unwrap();
        assert!(slab.state().is_gathered && is_all(&last, 0));
        assert!(pieces.iter().enumerate().all(|(n, piece)| is_all(piece, n as u8 + 1)));
    }

    #[test]
    fn memory_is_bounded_by_what_is_taken() {
        let slab = Slab::map(false).unwrap();
        assert_eq!(resident(&slab), 0);
        let mut pieces = Vec::new();
        for piece in 0..PIECES {
            pieces.push(slab.take(piece).unwrap());
            fill(pieces.last_mut().unwrap(), 1);
            assert!(resident(&slab) <= 4 * pieces.len() * PIECE_BYTES, "{piece}");
        }
        while pieces.pop().is_some() {
            assert!(resident(&slab) <= 4 * pieces.len() * PIECE_BYTES, "{}", pieces.len());
        }
    }

    #[test]
    fn a_slab_that_was_to_fill_and_did_not_gives_its_memory_back() {
        let slab = Slab::map(true).unwrap();
        let mut pieces: Vec<_> = (0..PIECES).map(|piece| slab.take(piece).unwrap()).collect();
        pieces.iter_mut().for_each(|piece| fill(piece, 1));
        assert!(slab.is_half_taken() && resident(&slab) == SLAB_BYTES);
        pieces.truncate(1);
        assert!(!slab.is_half_taken() && resident(&slab) <= 4 * PIECE_BYTES);
    }

    #[test]
    fn a_slab_lives_as_long_as_its_pieces() {
        let slab = Slab::map(false).unwrap();
        let (piece, weak) = (slab.take(3).unwrap(), Arc::downgrade(&slab));
        drop(slab);
        assert!(weak.upgrade().is_some() && is_all(&piece, 0));
        std::thread::spawn(move || drop(piece)).join().unwrap();
        assert!(weak.upgrade().is_none());
    }
}
