//! The data path of one reactor.
//!
//! # Reads
//! Go to the leg in sync with the fewest operations of this reactor. What fails there is tried on the others; a medium that could
//! not be read is written again from one that could. What fails on all that this reactor knows of waits until the driver says that
//! there are no more.
//!
//! # Writes
//! Wait until the reactor may write their regions, then go to every leg that gets writes, as children of the one that came. A write
//! that a leg has not got is held until the reactor is told that this leg is out. The usual case looks at one byte a region, takes
//! no lock and shares nothing with other reactors; in regions that several of these write they meet on [`cells`](super::cells).

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use slab::Slab;
use smallvec::SmallVec;

use super::array::Standing;
use super::format::MAX_LEGS;
use super::shared::{Event, Notice, Shared, Table};
use crate::core::claims::{Claims, Extent};
use crate::core::spares::Spares;
use crate::core::{BdevInfo, ChannelCx, ChannelId, Io, IoChannel, IoCx, IoStatus, Op, OpKind};

/// I/Os of a channel's own, for when the pool has none: one for each leg of one write.
const SPARES: usize = MAX_LEGS;
/// Layers that legs may have, also those that come later.
const LEG_LAYERS: usize = 4;

/// This reactor may write the region, and has since it was last asked; others may write it as well.
const GRANTED: u8 = 1;
const USED: u8 = 2;
const SHARED: u8 = 4;

struct Way {
    bdev: Arc<BdevInfo>,
    channel: ChannelId,
    outstanding: u32,
}

struct Write {
    io: Io,
    op: Op,
    lba: u64,
    blocks: u64,
    /// Legs that it has not been sent to for want of an I/O.
    unsent: u8,
    left: u8,
    done: u8,
    failed: u8,
    status: IoStatus,
    /// On its blocks, from when it goes to the legs.
    claim: Option<usize>,
    /// Others may write its regions, and it needs cells; how many it has.
    shared: bool,
    cells: u32,
    /// It has been sent to the legs.
    sent: bool,
}

/// See the [module](self).
pub(super) struct RaidChannel {
    shared: Arc<Shared>,
    table: Arc<Table>,
    ways: Vec<Option<Way>>,
    bases: SmallVec<[ChannelId; MAX_LEGS]>,
    reactor: u32,
    regions: Vec<u8>,
    writes: Slab<Write>,
    claims: Claims,
    /// Writes that wait for others that overlap them; whether one of these has ended.
    behind: VecDeque<usize>,
    /// Reads of what is being written.
    readers: VecDeque<Io>,
    released: bool,
    /// Writes that wait for regions, for I/Os, for a leg to be out.
    waiting: VecDeque<usize>,
    starved: VecDeque<usize>,
    held: Vec<usize>,
    /// Writes that wait for cells.
    crossing: VecDeque<usize>,
    /// Questions of the driver that are answered when no write is in these regions without its cells.
    shares: Vec<(u64, Vec<usize>)>,
    /// Reads that have failed on all legs that are known to be in sync, and with what; how many of them the driver was asked about.
    doubtful: VecDeque<(Io, IoStatus)>,
    doubted: usize,
    /// Whether the driver has answered.
    settled: bool,
    /// Whether the array was asked for regions and has not answered.
    asking: bool,
    /// Legs whose failure was reported under this table.
    reported: u8,
    spares: Spares,
    /// The table is new: everything that waits is to be looked at.
    look: bool,
}

fn bit(leg: usize) -> u8 {
    1 << leg
}

/// Whether the medium is bad here, rather than the leg.
fn is_medium(status: IoStatus) -> bool {
    matches!(status, IoStatus::ReadError | IoStatus::Nvme { sct: 2, .. })
}

/// Whether nothing was done, and nothing is wrong with the leg.
fn is_refusal(status: IoStatus) -> bool {
    matches!(status, IoStatus::Invalid | IoStatus::NotSupported | IoStatus::OutOfRange | IoStatus::ReadOnly)
}

impl RaidChannel {
    pub(super) fn open(shared: Arc<Shared>, cx: &mut ChannelCx<'_>) -> io::Result<RaidChannel> {
        cx.expect_height(LEG_LAYERS);
        let table = shared.table();
        let regions = vec![0; shared.layout.regions()];
        let spares = cx.take_spares(SPARES)?;
        let mut channel = RaidChannel {
            reactor: cx.reactor().0,
            ways: Vec::new(),
            bases: SmallVec::new(),
            regions,
            writes: Slab::new(),
            claims: Claims::default(),
            behind: VecDeque::new(),
            readers: VecDeque::new(),
            released: false,
            waiting: VecDeque::new(),
            starved: VecDeque::new(),
            held: Vec::new(),
            crossing: VecDeque::new(),
            shares: Vec::new(),
            doubtful: VecDeque::new(),
            doubted: 0,
            settled: false,
            asking: false,
            reported: 0,
            spares,
            look: false,
            table: Arc::clone(&table),
            shared,
        };
        channel.adopt(table, cx);
        Ok(channel)
    }

    /// Goes by another table from here on.
    fn adopt(&mut self, table: Arc<Table>, cx: &mut ChannelCx<'_>) {
        self.ways.resize_with(table.legs.len(), || None);
        for (n, way) in self.ways.iter_mut().enumerate() {
            let wanted = table.legs[n].as_ref().filter(|_| table.view.legs[n] != Standing::Out);
            if let Some(old) = way.take_if(|way| wanted.is_none_or(|bdev| bdev.id() != way.bdev.id())) {
                // It closes when what is outstanding on it has come back.
                cx.put_channel(old.channel);
            }
            if let (None, Some(bdev)) = (&way, wanted) {
                match cx.get_channel(bdev) {
                    Ok(channel) => *way = Some(Way { bdev: Arc::clone(bdev), channel, outstanding: 0 }),
                    Err(error) => {
                        self.shared.send(Event::Failed { leg: n, why: format!("it has no channel: {error}") })
                    }
                }
            }
        }
        self.bases = self.ways.iter().flatten().map(|way| way.channel).collect();
        if table.view.offline {
            self.regions.fill(0);
            self.asking = false;
        }
        self.reported = 0;
        self.table = table;
        self.look = true;
    }

    fn standing(&self, leg: usize) -> Standing {
        self.table.view.legs[leg]
    }

    // ---- reads --------------------------------------------------------------------------------------------------------------

    /// A read of what is being written waits: one leg may have it already, and another not, and no read may find the old after
    /// the new.
    fn start_read(&mut self, io: Io, cx: &mut IoCx<'_>) {
        if self.claims.conflict(&Extent::of(&io)) {
            return self.readers.push_back(io);
        }
        if let Err(io) = self.read(io, 0, cx) {
            cx.complete(io, IoStatus::Failed);
        }
    }

    fn read(&mut self, mut io: Io, tried: u8, cx: &mut IoCx<'_>) -> Result<(), Io> {
        let fits = |n: &usize| self.standing(*n) == Standing::InSync && tried & bit(*n) == 0;
        let candidates = (0..self.ways.len()).filter(fits).filter_map(|n| Some((n, self.ways[n].as_ref()?)));
        let Some((leg, _)) = candidates.min_by_key(|(_, way)| way.outstanding) else { return Err(io) };
        let way = self.ways[leg].as_mut().expect("it was just seen");
        way.outstanding += 1;
        let (lba, blocks) = io.own_range();
        io.set_range(lba + self.shared.layout.data_offset, blocks);
        io.set_mark(u32::from(tried) << 8 | leg as u32);
        cx.forward(way.channel, io);
        Ok(())
    }

    fn read_done(&mut self, io: Io, cx: &mut IoCx<'_>) {
        let status = io.status();
        let (leg, tried) = ((io.mark() & 0xff) as usize, (io.mark() >> 8) as u8);
        let mut removing = true;
        if let Some(way) = self.ways[leg].as_mut() {
            way.outstanding = way.outstanding.saturating_sub(1);
            removing = way.bdev.is_removing();
        }
        let (lba, blocks) = io.own_range();
        if status.is_success() {
            for bad in (0..self.ways.len()).filter(|&n| tried & bit(n) != 0 && self.standing(n) == Standing::InSync) {
                self.shared.send(Event::Repair { leg: bad, lba, blocks });
            }
            return cx.complete(io, status);
        }
        // Somebody wanted the operation itself to end, unless it was the end of the leg.
        if is_refusal(status) || status == IoStatus::Aborted && !removing {
            return cx.complete(io, status);
        }
        if !is_medium(status) {
            self.report(leg, status);
        }
        if let Err(io) = self.read(io, tried | bit(leg), cx) {
            // Another may have become in sync a moment ago, and word of it be on its way.
            if self.table.view.offline || !self.table.view.legs.contains(&Standing::Rebuilding) {
                return cx.complete(io, status);
            }
            self.doubtful.push_back((io, status));
            self.doubt();
        }
    }

    /// Asks whether all legs in sync are known here, one question at a time.
    fn doubt(&mut self) {
        if self.doubted == 0 && !self.doubtful.is_empty() {
            self.doubted = self.doubtful.len();
            self.shared.send(Event::Doubt(self.reactor));
        }
    }

    /// They are, or were when the driver was asked.
    fn end_doubts(&mut self, cx: &mut IoCx<'_>) {
        for (io, status) in self.doubtful.drain(..std::mem::take(&mut self.doubted)).collect::<SmallVec<[_; 8]>>() {
            let (leg, tried) = ((io.mark() & 0xff) as usize, (io.mark() >> 8) as u8);
            if let Err(io) = self.read(io, tried | bit(leg), cx) {
                cx.complete(io, status);
            }
        }
        self.doubt();
    }

    fn report(&mut self, leg: usize, status: IoStatus) {
        if self.reported & bit(leg) == 0 && matches!(self.standing(leg), Standing::InSync | Standing::Rebuilding) {
            self.reported |= bit(leg);
            self.shared.send(Event::Failed { leg, why: format!("an operation ended with {status}") });
        }
    }

    // ---- writes -------------------------------------------------------------------------------------------------------------

    fn span(&self, write: &Write) -> std::ops::RangeInclusive<usize> {
        let layout = &self.shared.layout;
        layout.region_of(write.lba)..=layout.region_of(write.lba + write.blocks.max(1) - 1)
    }

    /// Whether it may be written now; marks its regions as used.
    fn may_write(&mut self, index: usize) -> bool {
        if self.writes[index].op == Op::Flush {
            return true;
        }
        let span = self.span(&self.writes[index]);
        let regions = &mut self.regions[span];
        if regions.iter().any(|region| region & GRANTED == 0) {
            return false;
        }
        let mut all = 0;
        regions.iter_mut().for_each(|region| {
            *region |= USED;
            all |= *region;
        });
        self.writes[index].shared = all & SHARED != 0;
        true
    }

    /// Whether no write through another reactor is on the legs where this one goes. Asks nobody where nobody else may write.
    fn has_crossed(&mut self, index: usize) -> bool {
        let write = &mut self.writes[index];
        let (true, Some(cells)) = (write.shared, &self.shared.cells) else { return true };
        let span = cells.span(write.lba, write.blocks);
        while write.cells < span.len() {
            if !cells.take(&span, write.cells, self.reactor) {
                return false;
            }
            write.cells += 1;
        }
        true
    }

    fn leave_cells(&mut self, write: &Write) {
        if let (true, Some(cells)) = (write.shared, &self.shared.cells) {
            let span = cells.span(write.lba, write.blocks);
            if cells.leave(&span, write.cells, self.reactor) {
                self.shared.send(Event::Freed);
            }
        }
    }

    /// Answers what the driver has asked, as far as it can be.
    fn answer_shares(&mut self) {
        let mut shares = std::mem::take(&mut self.shares);
        shares.retain(|(ask, regions)| {
            let alone = |write: &Write| {
                let is_alone = write.sent && !write.shared && write.op != Op::Flush;
                is_alone && regions.iter().any(|region| self.span(write).contains(region))
            };
            let waits = self.writes.iter().any(|(_, write)| alone(write));
            if !waits {
                self.shared.send(Event::Shared(*ask));
            }
            waits
        });
        self.shares = shares;
    }

    /// Two writes of the same blocks are on the legs one after the other, since these might do them in different orders, and would
    /// differ from then on. Those of other reactors are met in [`has_crossed`](RaidChannel::has_crossed).
    fn claims_its_blocks(&mut self, index: usize) -> bool {
        let write = &self.writes[index];
        if write.op == Op::Flush || write.claim.is_some() {
            return true;
        }
        let extent = Extent::of(&write.io);
        let is_behind = |&other: &usize| Extent::of(&self.writes[other].io).conflicts(&extent);
        if self.claims.conflict(&extent) || self.behind.iter().any(is_behind) {
            return false;
        }
        self.writes[index].claim = Some(self.claims.add(extent));
        true
    }

    /// Starts what waited for writes that have ended.
    fn start_released(&mut self, cx: &mut IoCx<'_>) {
        while std::mem::take(&mut self.released) {
            for io in std::mem::take(&mut self.readers) {
                self.start_read(io, cx);
            }
            for index in std::mem::take(&mut self.behind) {
                self.start(index, cx);
            }
        }
    }

    fn start(&mut self, index: usize, cx: &mut IoCx<'_>) {
        if self.table.view.offline {
            return self.end(index, IoStatus::Failed, cx);
        }
        if !self.claims_its_blocks(index) {
            return self.behind.push_back(index);
        }
        if !self.may_write(index) {
            self.waiting.push_back(index);
            return self.ask();
        }
        if !self.has_crossed(index) {
            return self.crossing.push_back(index);
        }
        let write = &mut self.writes[index];
        write.sent = true;
        for (leg, standing) in self.table.view.legs.iter().enumerate() {
            match standing {
                Standing::InSync | Standing::Rebuilding if self.ways[leg].is_some() => write.unsent |= bit(leg),
                Standing::InSync | Standing::Rebuilding | Standing::Suspect => write.failed |= bit(leg),
                Standing::Out => {}
            }
        }
        self.send(index, cx);
    }

    /// Sends it to the legs that it has not been sent to, as far as there are I/Os.
    fn send(&mut self, index: usize, cx: &mut IoCx<'_>) {
        let offset = self.shared.layout.data_offset;
        let write = &mut self.writes[index];
        while write.unsent != 0 {
            let leg = write.unsent.trailing_zeros() as usize;
            let Some(way) = self.ways[leg].as_mut() else {
                write.unsent &= !bit(leg);
                write.failed |= bit(leg);
                continue;
            };
            let mark = (index as u64) << 8 | leg as u64;
            let lba = if write.op == Op::Flush { write.lba } else { write.lba + offset };
            if !cx.child_as(&mut write.io, write.op, &mut self.spares, mark, way.channel, lba) {
                return self.starved.push_back(index);
            }
            way.outstanding += 1;
            write.left += 1;
            write.unsent &= !bit(leg);
        }
        if write.left == 0 {
            self.settle(index, cx);
        }
    }

    fn child_done(&mut self, child: Io, mark: u64, cx: &mut IoCx<'_>) {
        let (index, leg) = ((mark >> 8) as usize, (mark & 0xff) as usize);
        let status = child.status();
        if let Some(way) = self.ways[leg].as_mut() {
            way.outstanding = way.outstanding.saturating_sub(1);
        }
        let write = &mut self.writes[index];
        cx.end_child(child, &mut write.io, &mut self.spares);
        write.left -= 1;
        if status.is_success() {
            write.done |= bit(leg);
        } else {
            write.failed |= bit(leg);
            write.status = status;
        }
        if write.left == 0 && write.unsent == 0 {
            self.settle(index, cx);
        }
        for _ in 0..self.starved.len() {
            let Some(index) = self.starved.pop_front() else { break };
            let before = self.starved.len();
            self.send(index, cx);
            if self.starved.len() > before {
                // It found none, so nobody else will; it stays the first.
                let index = self.starved.pop_back().expect("it was just pushed");
                self.starved.push_front(index);
                break;
            }
        }
    }

    /// Every leg has answered: acknowledged, failed, or held until those that have not got it are out.
    fn settle(&mut self, index: usize, cx: &mut IoCx<'_>) {
        let write = &self.writes[index];
        if write.failed == 0 {
            return self.end(index, IoStatus::Success, cx);
        }
        let view = &self.table.view;
        if write.done == 0 && is_refusal(write.status) && !view.legs.contains(&Standing::Suspect) {
            return self.end(index, write.status, cx);
        }
        let status = if write.status.is_success() { IoStatus::Failed } else { write.status };
        let mut in_sync = (0..view.legs.len()).filter(|&n| view.legs[n] == Standing::InSync);
        let open = (0..view.legs.len()).filter(|&n| write.failed & bit(n) != 0 && view.legs[n] != Standing::Out);
        let open: SmallVec<[usize; MAX_LEGS]> = open.collect();
        let last = in_sync.next().filter(|_| in_sync.next().is_none());
        let lost = last.is_some_and(|leg| open.contains(&leg)) || open.is_empty() && write.done == 0;
        if view.offline || lost {
            self.shared.send(Event::Uncertain);
            return self.end(index, status, cx);
        }
        if open.is_empty() {
            return self.end(index, IoStatus::Success, cx);
        }
        self.held.push(index);
        open.into_iter().for_each(|leg| self.report(leg, status));
    }

    fn end(&mut self, index: usize, status: IoStatus, cx: &mut IoCx<'_>) {
        let write = self.writes.remove(index);
        self.leave_cells(&write);
        if !self.shares.is_empty() {
            self.answer_shares();
        }
        if let Some(claim) = write.claim {
            self.claims.end(claim);
            self.released = !self.behind.is_empty() || !self.readers.is_empty();
        }
        cx.complete(write.io, status);
    }

    // ---- regions ------------------------------------------------------------------------------------------------------------

    /// Asks for the regions that writes wait for, all at once.
    fn ask(&mut self) {
        if self.asking || self.waiting.is_empty() {
            return;
        }
        let mut regions: Vec<usize> = Vec::new();
        for &index in &self.waiting {
            regions.extend(self.span(&self.writes[index]).filter(|&region| self.regions[region] & GRANTED == 0));
        }
        regions.sort_unstable();
        regions.dedup();
        self.asking = true;
        self.shared.send(Event::Mark { from: self.reactor, regions });
    }

    fn give_back(&mut self, round: u64) {
        for (_, write) in &self.writes {
            if write.op != Op::Flush {
                let span = self.span(write);
                // What is on the legs is in use also when its grant ended with the array offline.
                let in_use = |region: &u8| write.sent || region & GRANTED != 0;
                self.regions[span].iter_mut().filter(|region| in_use(region)).for_each(|region| *region |= USED);
            }
        }
        let mut held = Vec::new();
        for (n, region) in self.regions.iter_mut().enumerate() {
            if *region & USED != 0 {
                *region &= !USED;
                held.push(n);
            } else {
                *region = 0;
            }
        }
        self.shared.send(Event::Kept { round, held });
    }
}

impl IoChannel for RaidChannel {
    fn submit(&mut self, io: Io, cx: &mut IoCx<'_>) {
        if io.op() == Op::Read {
            return self.start_read(io, cx);
        }
        // What unmapped blocks read as would be each leg's own; zeroes are the same everywhere.
        let op = match io.op() {
            Op::Unmap => Op::WriteZeroes { fua: false, may_unmap: true },
            op => op,
        };
        let (lba, blocks) = (io.lba(), io.blocks());
        let status = IoStatus::Success;
        let write = Write {
            io,
            op,
            lba,
            blocks,
            unsent: 0,
            left: 0,
            done: 0,
            failed: 0,
            status,
            claim: None,
            shared: false,
            cells: 0,
            sent: false,
        };
        let index = self.writes.insert(write);
        self.start(index, cx);
        self.start_released(cx);
    }

    fn completed(&mut self, io: Io, cx: &mut IoCx<'_>) {
        match io.child_mark() {
            Some(mark) => {
                self.child_done(io, mark, cx);
                self.start_released(cx);
            }
            None => self.read_done(io, cx),
        }
    }

    fn notice(&mut self, notice: Box<dyn Any + Send>, cx: &mut ChannelCx<'_>) {
        match *notice.downcast::<Notice>().expect("only the array sends notices here") {
            Notice::Table(table) => {
                if table.view.generation > self.table.view.generation {
                    self.adopt(table, cx);
                }
            }
            Notice::Grant(regions) => {
                for (region, shared) in regions {
                    self.regions[region] |= if shared { GRANTED | SHARED } else { GRANTED };
                }
                self.asking = false;
                self.look = true;
            }
            Notice::Share { ask, regions } => {
                for &region in &regions {
                    self.regions[region] |= if self.regions[region] & GRANTED != 0 { SHARED } else { 0 };
                }
                self.shares.push((ask, regions));
                self.answer_shares();
            }
            Notice::Freed => self.look = true,
            Notice::Settled => {
                self.settled = true;
                self.look = true;
            }
            Notice::Revoke(round) => self.give_back(round),
        }
    }

    /// After a notice: what waited may go on.
    fn poll(&mut self, cx: &mut IoCx<'_>) -> reactor::Progress {
        if !std::mem::take(&mut self.look) {
            return reactor::Progress::Idle;
        }
        for index in std::mem::take(&mut self.held) {
            self.settle(index, cx);
        }
        for index in std::mem::take(&mut self.waiting).into_iter().chain(std::mem::take(&mut self.crossing)) {
            self.start(index, cx);
        }
        self.start_released(cx);
        self.ask();
        if std::mem::take(&mut self.settled) {
            self.end_doubts(cx);
        }
        reactor::Progress::Busy
    }

    fn base_channels(&self) -> &[ChannelId] {
        // Reads are there under their own names; writes are not, so that none ends on one leg only.
        &self.bases
    }

    fn close(&mut self, cx: &mut ChannelCx<'_>) {
        for way in self.ways.drain(..).flatten() {
            cx.put_channel(way.channel);
        }
        cx.put_spares(std::mem::take(&mut self.spares));
    }
}

/// What the array does by itself: the rest is made of it above, so that it meets the locks there.
pub(super) const OPS: &[OpKind] = &[OpKind::Read, OpKind::Write, OpKind::Flush, OpKind::Unmap, OpKind::WriteZeroes];
