//! What a verified run knows of each place: how often it was written, and whether a command is on its way to it.
//!
//! A place is as long as one command and used by one command at a time, so every read has exactly one right answer.

/// The places of one volume.
#[derive(Debug)]
pub struct Ledger {
    /// Writes of each place; 0 when what is there is not known.
    generations: Vec<u32>,
    busy: Vec<u64>,
}

impl Ledger {
    /// Nothing is known of `places` places.
    pub fn new(places: usize) -> Ledger {
        Ledger { generations: vec![0; places], busy: vec![0; places.div_ceil(64)] }
    }

    /// Takes the first free place from `from` on, around the end; `None` if there is none.
    pub fn take(&mut self, from: u64) -> Option<u64> {
        let places = self.generations.len() as u64;
        let place =
            (from..places).chain(0..from).find(|place| self.busy[*place as usize / 64] & 1 << (place % 64) == 0)?;
        self.busy[place as usize / 64] |= 1 << (place % 64);
        Some(place)
    }

    /// Gives a place back.
    pub fn release(&mut self, place: u64) {
        self.busy[place as usize / 64] &= !(1 << (place % 64));
    }

    /// Writes that a place is known to hold the last of; 0 if that is not known.
    pub fn generation(&self, place: u64) -> u32 {
        self.generations[place as usize]
    }

    /// A place holds that write now; 0: nobody knows what.
    pub fn set(&mut self, place: u64, generation: u32) {
        self.generations[place as usize] = generation;
    }

    /// The first place from `from` on whose contents are known.
    pub fn next_known(&self, from: u64) -> Option<u64> {
        let rest = self.generations.get(from as usize..)?;
        rest.iter().position(|generation| *generation > 0).map(|at| from + at as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_taken_once() {
        let mut ledger = Ledger::new(130);
        assert_eq!((ledger.take(129), ledger.take(129), ledger.take(0)), (Some(129), Some(0), Some(1)));
        let all: Vec<_> = std::iter::from_fn(|| ledger.take(70)).collect();
        assert_eq!((all.len(), all[0], all[126]), (127, 70, 69));
        ledger.release(64);
        assert_eq!(ledger.take(65), Some(64));
    }

    #[test]
    fn what_is_known_is_found() {
        let mut ledger = Ledger::new(100);
        assert_eq!(ledger.next_known(0), None);
        ledger.set(3, 1);
        ledger.set(99, 7);
        assert_eq!((ledger.next_known(0), ledger.next_known(4), ledger.next_known(100)), (Some(3), Some(99), None));
        ledger.set(3, 0);
        assert_eq!((ledger.next_known(0), ledger.generation(99)), (Some(99), 7));
    }
}
