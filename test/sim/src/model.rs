//! What a device may answer: a register a block, shared by any number of writers.
//!
//! Every write carries a *stamp* of its own, and fills each block with a pattern of stamp and block address, so a block's
//! contents say which write they are of, and that they are whole and in their place. For each block the model keeps the
//! writes whose contents a read may still find.
//!
//! # Rules
//! Moments are counts of events. A write has a moment `invoked`, a moment `done` at which it is known to have taken effect
//! (its acknowledgement, or the end of a read that has seen it; never for a failed one) and a moment `before`: every write
//! invoked after it is ordered after this one. Usually both are the same. Write *b* hides write *a* from a read that began
//! after `b.done` when `b.invoked > a.before`.
//!
//! Two writes that were outstanding at once may be ordered either way, but each takes effect once: when a read has shown that
//! *a* had taken effect, and a later one that *b* has replaced it, *b* is ordered behind *a* from then on, and no read may
//! find *a* again.
//!
//! A compare-and-write that succeeded against the contents of *a* is ordered directly behind it: its `before` is that of
//! *a*. So when another write came between its halves, a read will find what it must not.
//!
//! A copy is a write of a stamp of its own to each block, which stands for the contents of the source: those of another write to
//! another block. So a block that was copied says of which write and from where it is.
//!
//! # Power failure
//! A write is *kept* once a flush was invoked after its acknowledgement and acknowledged itself, or if it was durable by
//! itself. After a power failure a read may find any write that no kept write hides; what the first read finds then stays.

use std::collections::BTreeMap;

use bdev::conformance::Rng;

/// Contents of a block: zeroes, or the stamp of a write.
pub type Stamp = u64;

const NEVER: u64 = u64::MAX;

#[derive(Clone, Debug)]
struct Write {
    stamp: Stamp,
    invoked: u64,
    done: u64,
    before: u64,
    /// When it was acknowledged.
    acked: u64,
    /// Since when it survives a power failure.
    kept: u64,
    /// It is outstanding: `done` may still come.
    open: bool,
    token: u64,
    /// The first of the writes that compare-and-writes have replaced one after another, and the place among them.
    chain: (u64, u64),
    /// Contents that may have survived a power failure, of which only one did.
    ambiguous: bool,
    /// Writes, by token, that reads have shown to be ordered before this one although neither waited for the other.
    after: Vec<u64>,
}

impl Write {
    /// Whether it is certainly ordered after `other`.
    fn is_after(&self, other: &Write) -> bool {
        if self.after.contains(&other.token) {
            return true;
        }
        if self.chain.0 == other.chain.0 { self.chain.1 > other.chain.1 } else { self.invoked > other.before }
    }
}

/// One device's blocks.
#[derive(Debug)]
pub struct Model {
    block_size: usize,
    moment: u64,
    next_token: u64,
    blocks: Vec<Vec<Write>>,
    /// Reads, compares and compare-and-writes under way, by token, with the moment they began.
    readers: BTreeMap<u64, u64>,
    /// Whether completed writes need a flush to survive.
    volatile: bool,
    /// A write may take effect again, also after it was seen, until it is answered.
    repeats: bool,
    /// Reads may find the old after the new as long as the write is under way.
    flickers: bool,
    /// What a compare-and-write replaced, for finding two that replaced the same.
    replaced: BTreeMap<(u64, Stamp), Stamp>,
    /// What stamps of copies stand for: the write whose contents these are, and the block that it was to.
    copied: BTreeMap<Stamp, (Stamp, u64)>,
}

/// A write under way. Give it back to [`Model::wrote`] or [`Model::lost`].
#[derive(Clone, Copy, Debug)]
pub struct WriteToken(u64);

/// A read under way.
#[derive(Clone, Copy, Debug)]
pub struct ReadToken {
    token: u64,
    began: u64,
}

/// The pattern of a block.
pub fn fill(stamp: Stamp, lba: u64, block: &mut [u8]) {
    if stamp == 0 {
        block.fill(0);
        return;
    }
    let mut rng = Rng::new(stamp ^ lba.rotate_left(32));
    block[..8].copy_from_slice(&stamp.to_le_bytes());
    block[8..16].copy_from_slice(&lba.to_le_bytes());
    // Each eighth of a block is its own: a part of another write shows.
    let eighth = block.len() / 8;
    for (n, part) in block.chunks_mut(eighth).enumerate() {
        let word = rng.next_u64().to_le_bytes();
        let from = if n == 0 { 16 } else { 0 };
        for chunk in part[from..].chunks_mut(8) {
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

/// The payload of a write of `stamp` to blocks from `lba`.
pub fn payload(stamp: Stamp, lba: u64, blocks: u64, block_size: usize) -> Vec<u8> {
    let mut bytes = vec![0; blocks as usize * block_size];
    for (n, block) in bytes.chunks_mut(block_size).enumerate() {
        fill(stamp, lba + n as u64, block);
    }
    bytes
}

fn contents(copied: &BTreeMap<Stamp, (Stamp, u64)>, stamp: Stamp, lba: u64) -> (Stamp, u64) {
    copied.get(&stamp).copied().unwrap_or((stamp, lba))
}

/// Forgets a write. Whoever is after it is after those that it is after, which from then on is said where it does not follow.
fn forget(block: &mut Vec<Write>, token: u64) {
    let at = block.iter().position(|write| write.token == token).expect("it is there");
    let gone = block.remove(at);
    // Moments are in order by themselves, but for what was seen in another one, and for compare-and-writes.
    let plain = gone.after.is_empty() && gone.before >= gone.invoked;
    for at in 0..block.len() {
        let write = &block[at];
        if write.is_after(&gone) && !(plain && write.invoked > gone.before) {
            let follows = |other: &&Write| other.token != write.token && gone.is_after(other) && !write.is_after(other);
            let news: Vec<u64> = block.iter().filter(follows).map(|other| other.token).collect();
            block[at].after.extend(news);
        }
        block[at].after.retain(|after| *after != token);
    }
}

impl Model {
    /// A device of `blocks` blocks of zeroes; `volatile`: it has a write cache.
    pub fn new(blocks: u64, block_size: u32, volatile: bool) -> Model {
        let mut model = Model {
            block_size: block_size as usize,
            moment: 1,
            next_token: 0,
            blocks: Vec::new(),
            readers: BTreeMap::new(),
            volatile,
            repeats: false,
            flickers: false,
            replaced: BTreeMap::new(),
            copied: BTreeMap::new(),
        };
        model.set_len(blocks);
        model
    }

    /// Blocks there are.
    pub fn len(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Bytes in a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// The device has another size; new blocks read as zeroes. Nothing may be outstanding on blocks that go.
    pub fn set_len(&mut self, blocks: u64) {
        let zero = Write {
            stamp: 0,
            invoked: 0,
            done: 0,
            before: 0,
            acked: 0,
            kept: 0,
            open: false,
            token: 0,
            chain: (0, 0),
            ambiguous: false,
            after: Vec::new(),
        };
        self.blocks.resize(blocks as usize, vec![zero]);
    }

    /// From now on a write may take effect more than once until it is answered: whoever does it may have to begin anew.
    pub fn allow_repeats(&mut self) {
        self.repeats = true;
    }

    /// Whether reads from now on may find the old after the new as long as the write is under way: the device has several copies.
    pub fn set_flickers(&mut self, flickers: bool) {
        self.flickers = flickers;
    }

    fn tick(&mut self) -> u64 {
        self.moment += 1;
        self.moment
    }

    fn draw(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// A stamp that no write had.
    pub fn stamp(&mut self) -> Stamp {
        self.draw()
    }

    /// A write of `stamp` (0: zeroes) begins.
    pub fn write(&mut self, stamp: Stamp, lba: u64, blocks: u64) -> WriteToken {
        self.write_each(lba, std::iter::repeat_n(stamp, blocks as usize))
    }

    /// Whether there is one thing only that each of the blocks can hold.
    pub fn is_known(&self, lba: u64, blocks: u64) -> bool {
        self.blocks[lba as usize..(lba + blocks) as usize].iter().all(|block| block.len() == 1 && !block[0].open)
    }

    /// A copy of known blocks begins; they stay as they are until it has ended.
    ///
    /// # Panics
    /// If they are not known.
    pub fn copy(&mut self, from: u64, to: u64, blocks: u64) -> WriteToken {
        assert!(self.is_known(from, blocks), "what is copied has to be known");
        let mut stamps = Vec::new();
        for lba in from..from + blocks {
            let contents = self.contents(self.blocks[lba as usize][0].stamp, lba);
            stamps.push(if contents.0 == 0 { 0 } else { self.stamp() });
            self.copied.extend(stamps.last().filter(|stamp| **stamp != 0).map(|stamp| (*stamp, contents)));
        }
        self.write_each(to, stamps.into_iter())
    }

    /// Whose contents a block has that has `stamp`: the write, and the block that it was to.
    fn contents(&self, stamp: Stamp, lba: u64) -> (Stamp, u64) {
        contents(&self.copied, stamp, lba)
    }

    /// The bytes of a block that has `stamp`.
    pub fn image(&self, stamp: Stamp, lba: u64, block: &mut [u8]) {
        let (stamp, lba) = self.contents(stamp, lba);
        fill(stamp, lba, block);
    }

    fn write_each(&mut self, lba: u64, stamps: impl Iterator<Item = Stamp>) -> WriteToken {
        let token = self.draw();
        let invoked = self.tick();
        for (block, stamp) in self.blocks[lba as usize..].iter_mut().zip(stamps) {
            block.push(Write {
                stamp,
                invoked,
                done: NEVER,
                before: NEVER,
                acked: NEVER,
                kept: NEVER,
                open: true,
                token,
                chain: (token, 0),
                ambiguous: false,
                after: Vec::new(),
            });
        }
        WriteToken(token)
    }

    /// A write has succeeded; `durable`: it asked to survive a power failure by itself.
    pub fn wrote(&mut self, token: WriteToken, lba: u64, blocks: u64, durable: bool) {
        let now = self.tick();
        let volatile = self.volatile;
        for n in lba..(lba + blocks).min(self.len()) {
            let block = &mut self.blocks[n as usize];
            if let Some(write) = block.iter_mut().find(|write| write.token == token.0) {
                write.open = false;
                write.done = write.done.min(now);
                write.before = write.before.min(now);
                write.acked = now;
                if durable || !volatile {
                    write.kept = now;
                }
            }
            self.prune(n);
        }
    }

    /// A write has failed, or nobody will ever know: it may have had its effect, or have it later.
    pub fn lost(&mut self, token: WriteToken, lba: u64, blocks: u64) {
        for n in lba..(lba + blocks).min(self.len()) {
            let write = self.blocks[n as usize].iter_mut().find(|write| write.token == token.0);
            write.into_iter().for_each(|write| write.open = false);
        }
    }

    /// A write that certainly has had and will have no effect.
    pub fn refused(&mut self, token: WriteToken, lba: u64, blocks: u64) {
        for n in lba..(lba + blocks).min(self.len()) {
            self.blocks[n as usize].retain(|write| write.token != token.0);
        }
    }

    /// Something that sees contents begins.
    pub fn read(&mut self) -> ReadToken {
        let token = self.draw();
        let began = self.tick();
        self.readers.insert(token, began);
        ReadToken { token, began }
    }

    /// It has failed or will never be known.
    pub fn read_lost(&mut self, read: ReadToken) {
        self.readers.remove(&read.token);
    }

    /// A read has brought `bytes`.
    ///
    /// # Errors
    /// What cannot be.
    pub fn was_read(&mut self, read: ReadToken, lba: u64, bytes: &[u8]) -> Result<(), String> {
        let now = self.tick();
        let size = self.block_size;
        for (n, bytes) in bytes.chunks(size).enumerate() {
            self.see(read.began, now, lba + n as u64, bytes)?;
        }
        self.readers.remove(&read.token);
        (lba..lba + (bytes.len() / size) as u64).for_each(|n| self.prune(n));
        Ok(())
    }

    fn see(&mut self, began: u64, now: u64, lba: u64, bytes: &[u8]) -> Result<Stamp, String> {
        let word = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
        let (stamp, origin) = word(0).zip(word(8)).ok_or("a block is short")?;
        // Zeroes are of no place.
        let seen_contents = (stamp, if stamp == 0 { lba } else { origin });
        let mut wanted = vec![0; self.block_size];
        fill(stamp, origin, &mut wanted);
        let copied = &self.copied;
        let block = &mut self.blocks[lba as usize];
        if wanted != bytes {
            let at = (0..bytes.len()).find(|&at| wanted[at] != bytes[at]).unwrap_or(0);
            return Err(format!(
                "block {lba} is not whole: byte {at} is not of write {stamp} to block {origin}: {block:?}"
            ));
        }
        let hidden = |a: &Write| block.iter().any(|b| b.is_after(a) && b.done < began);
        let is_it = |write: &Write| contents(copied, write.stamp, lba) == seen_contents;
        let seen: Vec<u64> =
            block.iter().filter(|write| is_it(write) && !hidden(write)).map(|write| write.token).collect();
        match seen[..] {
            [] => Err(format!(
                "block {lba} has write {stamp} to block {origin}, which it cannot have for a read from {began} to {now}: {block:?}"
            )),
            [one] if self.flickers && block.iter().any(|write| write.token == one && write.open) => Ok(stamp),
            [one] => {
                // A write takes effect once: what had taken effect before the read began, and is not there, was before.
                let repeats = |write: &Write| self.repeats && write.open;
                let is_before = |write: &&Write| write.token != one && write.done < began && !repeats(write);
                let at = block.iter().position(|write| write.token == one).expect("it was just found");
                // What follows from moments is not kept: of many writes, few are outstanding at once.
                let is_news = |write: &&Write| !block[at].is_after(write);
                let before: Vec<u64> =
                    block.iter().filter(is_before).filter(is_news).map(|write| write.token).collect();
                let write = &mut block[at];
                write.done = write.done.min(now);
                if !repeats(write) {
                    write.before = write.before.min(now);
                    write.after.extend(before);
                }
                let name = write.stamp;
                if write.ambiguous {
                    block.retain(|write| !write.ambiguous || write.token == one);
                }
                Ok(name)
            }
            // Several writes of zeroes, or copies of the same: which one it was is not known.
            _ => Ok(0),
        }
    }

    /// Forgets writes that no read can find any more, nor one after a power failure.
    fn prune(&mut self, lba: u64) {
        let oldest = self.readers.values().copied().min().unwrap_or(NEVER - 1);
        let block = &mut self.blocks[lba as usize];
        if block.len() < 2 {
            return;
        }
        let hidden = |a: &Write| {
            let gone = |b: &Write| b.is_after(a) && b.done < oldest && b.kept < oldest;
            !a.open && block.iter().any(gone)
        };
        let gone: Vec<u64> = block.iter().filter(|write| hidden(write)).map(|write| write.token).collect();
        for token in gone {
            forget(block, token);
        }
    }

    /// A flush begins; its moment goes to [`Model::flushed`].
    pub fn flush(&mut self) -> u64 {
        self.tick()
    }

    /// The flush that began at `began` has succeeded.
    pub fn flushed(&mut self, began: u64) {
        let now = self.tick();
        for lba in 0..self.len() {
            for write in &mut self.blocks[lba as usize] {
                if write.acked < began {
                    write.kept = write.kept.min(now);
                }
            }
            self.prune(lba);
        }
    }

    /// A compare with the blocks' contents of `stamps` has succeeded.
    ///
    /// # Errors
    /// When it should not have.
    pub fn was_equal(&mut self, read: ReadToken, lba: u64, expected: &[u8]) -> Result<(), String> {
        self.was_read(read, lba, expected).map_err(|error| format!("a compare succeeded: {error}"))
    }

    /// A compare has found a difference.
    ///
    /// # Errors
    /// When there can be none.
    pub fn was_different(&mut self, read: ReadToken, lba: u64, expected: &[u8]) -> Result<(), String> {
        self.readers.remove(&read.token);
        let mut wanted = vec![0; self.block_size];
        let mut sure = true;
        for (n, bytes) in expected.chunks(self.block_size).enumerate() {
            let lba = lba + n as u64;
            let block = &self.blocks[lba as usize];
            // Only what hides nothing and is hidden by nothing is sure; several candidates are not.
            let only = (block.len() == 1).then(|| block[0].stamp);
            sure &= only.is_some_and(|stamp| {
                self.image(stamp, lba, &mut wanted);
                wanted == bytes
            });
        }
        if sure {
            return Err(format!("a compare of blocks from {lba} failed against the only contents they can have"));
        }
        Ok(())
    }

    /// A compare-and-write of `stamp` has replaced `expected`.
    ///
    /// # Errors
    /// When it cannot have.
    pub fn replaced(
        &mut self,
        read: ReadToken,
        token: WriteToken,
        lba: u64,
        expected: &[u8],
        stamp: Stamp,
        durable: bool,
    ) -> Result<(), String> {
        let now = self.tick();
        let blocks = (expected.len() / self.block_size) as u64;
        for (n, bytes) in expected.chunks(self.block_size).enumerate() {
            let lba = lba + n as u64;
            let old = self.see(read.began, now, lba, bytes).map_err(|e| format!("compare-and-write succeeded: {e}"))?;
            if old == 0 {
                continue;
            }
            if let Some(other) = self.replaced.insert((lba, old), stamp) {
                return Err(format!("writes {other} and {stamp} have both replaced {old} in block {lba}"));
            }
            let block = &mut self.blocks[lba as usize];
            let found = block.iter().find(|write| write.stamp == old).map(|write| (write.before, write.chain));
            if let Some((before, (chain, place))) = found
                && let Some(write) = block.iter_mut().find(|write| write.token == token.0)
            {
                write.before = write.before.min(before);
                write.chain = (chain, place + 1);
            }
        }
        self.readers.remove(&read.token);
        self.wrote(token, lba, blocks, durable);
        Ok(())
    }

    /// Everything that was ever submitted has ended, and will have no effect from here on.
    pub fn settled(&mut self) {
        let now = self.tick();
        self.readers.clear();
        for lba in 0..self.len() {
            for write in &mut self.blocks[lba as usize] {
                write.open = false;
                write.before = write.before.min(now);
            }
            self.prune(lba);
        }
    }

    /// The power has failed, and the device is back.
    pub fn crashed(&mut self) {
        let now = self.tick();
        self.readers.clear();
        self.replaced.clear();
        for block in &mut self.blocks {
            let hidden: Vec<bool> = block.iter().map(|a| block.iter().any(|b| b.is_after(a) && b.kept < now)).collect();
            let mut hidden = hidden.into_iter();
            block.retain(|_| !hidden.next().unwrap_or(false));
            for write in block.iter_mut() {
                write.open = false;
                write.done = NEVER;
                write.before = now;
                write.acked = now;
                write.kept = now;
                write.ambiguous = true;
                write.after.clear();
                write.chain = (write.token, 0);
            }
        }
    }

    /// A stamp that the block may have, for a compare that has a chance.
    pub fn guess(&self, lba: u64) -> Stamp {
        self.blocks[lba as usize].last().map_or(0, |write| write.stamp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(stamp: Stamp, lba: u64) -> Vec<u8> {
        payload(stamp, lba, 1, 512)
    }

    fn model() -> Model {
        Model::new(4, 512, true)
    }

    #[test]
    fn a_copy_brings_the_contents_of_its_source_and_nothing_else() {
        let mut model = model();
        let (a, b) = (model.stamp(), model.stamp());
        let (first, second) = (model.write(a, 0, 1), model.write(b, 1, 1));
        assert!(!model.is_known(0, 1));
        model.wrote(first, 0, 1, true);
        model.wrote(second, 1, 1, true);
        let copy = model.copy(0, 2, 1);
        // Before and after, until it has ended.
        for (bytes, fits) in [(block(0, 2), true), (block(a, 0), true), (block(a, 2), false), (block(b, 1), false)] {
            let read = model.read();
            assert_eq!(model.was_read(read, 2, &bytes).is_ok(), fits);
            model.read_lost(read);
        }
        model.wrote(copy, 2, 1, true);
        let read = model.read();
        assert!(model.was_read(read, 2, &block(0, 2)).is_err(), "it was seen, and is done");
        model.read_lost(read);
        let mut guess = vec![0; 512];
        model.image(model.guess(2), 2, &mut guess);
        assert_eq!(guess, block(a, 0));
        // A copy of a copy, and one back to where it came from.
        let (on, back) = (model.copy(2, 3, 1), model.copy(2, 0, 1));
        model.wrote(on, 3, 1, true);
        model.wrote(back, 0, 1, true);
        for lba in [0, 2, 3] {
            let read = model.read();
            model.was_read(read, lba, &block(a, 0)).unwrap();
        }
    }

    #[test]
    fn a_read_finds_the_last_write_or_one_under_way() {
        let mut model = model();
        let (a, b) = (model.stamp(), model.stamp());
        let first = model.write(a, 0, 1);
        model.wrote(first, 0, 1, false);
        let second = model.write(b, 0, 1);
        for stamp in [a, b, b] {
            let read = model.read();
            model.was_read(read, 0, &block(stamp, 0)).unwrap();
        }
        // Once it was seen the older one is gone.
        let read = model.read();
        assert!(model.was_read(read, 0, &block(a, 0)).is_err());
        model.wrote(second, 0, 1, false);
        let read = model.read();
        assert!(model.was_read(read, 0, &block(0, 0)).is_err());
        let read = model.read();
        assert!(model.was_read(read, 1, &block(b, 0)).is_err(), "of another place");
        let mut torn = block(b, 0);
        torn[256..].copy_from_slice(&block(a, 0)[256..]);
        let read = model.read();
        assert!(model.was_read(read, 0, &torn).is_err());
    }

    #[test]
    fn a_failed_write_may_take_effect_later() {
        let mut model = model();
        let (a, b) = (model.stamp(), model.stamp());
        let lost = model.write(a, 0, 1);
        model.lost(lost, 0, 1);
        let token = model.write(b, 0, 1);
        model.wrote(token, 0, 1, false);
        let read = model.read();
        model.was_read(read, 0, &block(a, 0)).unwrap();
        model.settled();
        let token = model.write(b, 0, 1);
        model.wrote(token, 0, 1, false);
        let read = model.read();
        assert!(model.was_read(read, 0, &block(a, 0)).is_err());
    }

    #[test]
    fn what_was_flushed_survives() {
        let mut model = model();
        let (a, b) = (model.stamp(), model.stamp());
        let token = model.write(a, 0, 1);
        model.wrote(token, 0, 1, false);
        let flush = model.flush();
        model.flushed(flush);
        let token = model.write(b, 0, 1);
        model.wrote(token, 0, 1, false);
        model.crashed();
        let read = model.read();
        assert!(model.was_read(read, 0, &block(0, 0)).is_err());
        let read = model.read();
        model.was_read(read, 0, &block(a, 0)).unwrap();
        let read = model.read();
        assert!(model.was_read(read, 0, &block(b, 0)).is_err(), "the first read has decided");
    }

    #[test]
    fn a_write_between_the_halves_of_a_compare_and_write_shows() {
        let mut model = model();
        let (a, b, c) = (model.stamp(), model.stamp(), model.stamp());
        let token = model.write(a, 0, 1);
        model.wrote(token, 0, 1, false);
        let read = model.read();
        let swap = model.write(b, 0, 1);
        let between = model.write(c, 0, 1);
        model.wrote(between, 0, 1, false);
        model.replaced(read, swap, 0, &block(a, 0), b, false).unwrap();
        // `c` was invoked after `a` was done, so it is ordered behind `b`, and is there now.
        let read = model.read();
        assert!(model.was_read(read, 0, &block(b, 0)).is_err());
        let read = model.read();
        model.was_read(read, 0, &block(c, 0)).unwrap();
    }

    #[test]
    fn a_write_takes_effect_once() {
        let mut model = model();
        let (a, b) = (model.stamp(), model.stamp());
        let (first, second) = (model.write(a, 0, 1), model.write(b, 0, 1));
        let see = |model: &mut Model, stamp| {
            let read = model.read();
            model.was_read(read, 0, &block(stamp, 0))
        };
        see(&mut model, a).unwrap();
        let both = (model.read(), model.read());
        see(&mut model, b).unwrap();
        // Reads that began before may have seen either.
        model.was_read(both.0, 0, &block(a, 0)).unwrap();
        model.was_read(both.1, 0, &block(b, 0)).unwrap();
        assert!(see(&mut model, a).is_err(), "it was replaced");
        model.wrote(second, 0, 1, false);
        model.wrote(first, 0, 1, false);
        assert!(see(&mut model, a).is_err(), "it was replaced, whenever it was acknowledged");
        see(&mut model, b).unwrap();
        // Neither was seen: both are possible, until one is.
        let (c, d) = (model.stamp(), model.stamp());
        let (third, fourth) = (model.write(c, 0, 1), model.write(d, 0, 1));
        model.wrote(third, 0, 1, false);
        model.wrote(fourth, 0, 1, false);
        see(&mut model, c).unwrap();
        assert!(see(&mut model, d).is_err());
    }

    /// Many writes of whose end nobody heard, each seen at some time: what is known of their order does not outgrow them.
    #[test]
    fn what_is_kept_of_lost_writes_grows_with_their_number_only() {
        let mut model = Model::new(1, 512, true);
        let mut rng = Rng::new(5);
        let mut lost = Vec::new();
        for _ in 0..400 {
            let stamp = model.stamp();
            let token = model.write(stamp, 0, 1);
            model.lost(token, 0, 1);
            lost.push(stamp);
            if rng.one_in(2) {
                let at = rng.below(lost.len() as u64) as usize;
                let read = model.read();
                model.was_read(read, 0, &block(lost.swap_remove(at), 0)).expect("it takes effect late");
            }
            if rng.one_in(8) {
                let stamp = model.stamp();
                let token = model.write(stamp, 0, 1);
                model.wrote(token, 0, 1, rng.one_in(2));
            }
            if rng.one_in(16) {
                let flush = model.flush();
                model.flushed(flush);
            }
        }
        let (writes, known) =
            (model.blocks[0].len(), model.blocks[0].iter().map(|write| write.after.len()).sum::<usize>());
        assert!(writes >= lost.len() && writes < 600, "{writes} writes");
        assert!(known < writes * writes / 2, "{known} of {writes} writes");
        for write in &model.blocks[0] {
            let mut after = write.after.clone();
            after.sort_unstable();
            after.dedup();
            assert_eq!(after.len(), write.after.len(), "nothing is kept twice");
        }
        // Each of the lost may still be found, and none of those that were seen and replaced.
        let read = model.read();
        model.was_read(read, 0, &block(lost[0], 0)).unwrap();
    }

    #[test]
    fn two_cannot_replace_the_same() {
        let mut model = model();
        let (a, b, c) = (model.stamp(), model.stamp(), model.stamp());
        let token = model.write(a, 0, 1);
        model.wrote(token, 0, 1, false);
        let (first, second) = (model.write(b, 0, 1), model.write(c, 0, 1));
        let (r1, r2) = (model.read(), model.read());
        model.replaced(r1, first, 0, &block(a, 0), b, false).unwrap();
        assert!(model.replaced(r2, second, 0, &block(a, 0), c, false).is_err());
    }
}
