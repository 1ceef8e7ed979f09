//! Which worker gets a request: the same rule for workers in the server's process and in another.

/// How requests are spread over a device's workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// The device is cut into as many equal ranges as there are workers, once, when it is made; a request belongs to the
    /// worker of its first block, and blocks behind the last range to the last worker. A flush goes to worker 0.
    #[default]
    LbaRange,
    /// All requests of one reactor go to the worker of its index, modulo the number of workers.
    Queue,
    /// Each reactor's requests go to all workers in turn.
    RoundRobin,
}

impl Placement {
    /// The words that RPCs use.
    pub const NAMES: &[&str] = &["lba_range", "queue", "round_robin"];

    /// The word that RPCs use.
    pub fn name(self) -> &'static str {
        Placement::NAMES[self as usize]
    }

    /// From that word.
    pub fn from_name(name: &str) -> Option<Placement> {
        [Placement::LbaRange, Placement::Queue, Placement::RoundRobin].into_iter().find(|each| each.name() == name)
    }
}

/// The rule as one reactor applies it.
#[derive(Clone, Debug)]
pub struct Placer {
    placement: Placement,
    /// The last worker.
    last: usize,
    /// Blocks of each worker, for placement by range.
    range_blocks: u64,
    /// The worker of this reactor, for placement by queue.
    queue: usize,
    /// The worker whose turn it was.
    turn: usize,
}

impl Placer {
    /// For the reactor of index `reactor`, `workers` workers, and a device that had `num_blocks` blocks when it was made.
    ///
    /// # Panics
    /// If there are no workers.
    pub fn new(placement: Placement, workers: usize, num_blocks: u64, reactor: u32) -> Placer {
        assert!(workers > 0, "without workers there is nothing to choose from");
        let queue = reactor as usize % workers;
        let range_blocks = num_blocks.div_ceil(workers as u64).max(1);
        Placer { placement, last: workers - 1, range_blocks, queue, turn: queue }
    }

    /// The worker of a request whose first block is `lba`.
    #[inline]
    pub fn place(&mut self, lba: u64) -> usize {
        match self.placement {
            _ if self.last == 0 => 0,
            Placement::LbaRange => {
                usize::try_from(lba / self.range_blocks).map_or(self.last, |worker| worker.min(self.last))
            }
            Placement::Queue => self.queue,
            Placement::RoundRobin => {
                self.turn = if self.turn == self.last { 0 } else { self.turn + 1 };
                self.turn
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_names_a_worker_that_there_is() {
        let places = |mut placer: Placer, lbas: &[u64]| lbas.iter().map(|&lba| placer.place(lba)).collect::<Vec<_>>();
        let ranges = |workers, blocks| Placer::new(Placement::LbaRange, workers, blocks, 5);
        assert_eq!(places(ranges(3, 10), &[0, 3, 4, 7, 8, 9, 10, u64::MAX]), [0, 0, 1, 1, 2, 2, 2, 2]);
        assert_eq!(places(ranges(4, 1), &[0, 1, 2, 3, 4]), [0, 1, 2, 3, 3]);
        assert_eq!(places(Placer::new(Placement::Queue, 3, 10, 5), &[0, 9]), [2, 2]);
        assert_eq!(places(Placer::new(Placement::RoundRobin, 3, 10, 1), &[0; 5]), [2, 0, 1, 2, 0]);
        for placement in [Placement::LbaRange, Placement::Queue, Placement::RoundRobin] {
            assert_eq!(Placement::from_name(placement.name()), Some(placement));
            assert_eq!(places(Placer::new(placement, 1, 10, 3), &[0, 5, u64::MAX]), [0; 3]);
        }
    }
}
