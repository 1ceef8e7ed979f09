//! The array as a machine without I/O: it is told what happened and names what is to be done.
//!
//! # Legs
//! ```text
//!             admit: superblock            all copied: flush, log, superblock
//!   Out ----------------------> Rebuilding ----------------------------------> InSync
//!    ^ \                            | a write fails                              | a write fails, others are in sync
//!    |  `---------------------------+--------------------------------------------'
//!    |     suspect told to all reactors, superblock on all that are left, then told to all reactors
//! ```
//! A reactor acknowledges a write that a leg has not got only when it was told that the leg is out. So by then the superblock of
//! every leg that is left says so, and no reactor reads from it.
//!
//! # Commits
//! What has to be durable is written in rounds, one at a time: flush of all legs (where bits are to be cleared), blocks of the log,
//! superblock. What comes meanwhile waits for the next round, so that many writes share one. A leg that fails in a round goes out
//! and the round begins again with the others; where it was the last one in sync, the array is offline until a round succeeds.
//!
//! # Copying
//! One window at a time, under a lock that keeps writes out of it on all reactors. By the time a region is copied every reactor has
//! been told that the leg gets all writes, so the region is the same on both from then on.

use std::collections::VecDeque;

use uuid::Uuid;

use super::format::{Layout, Leg, LegState, MAX_LEGS, Superblock};
use super::regions::{ACTIVE, Regions};

mod copies;
mod words;

pub use words::{CopyEnd, Effect, Meta, Progress, Rule, Standing, View};

/// Repairs that may wait; a read that finds the same place bad asks again.
const MAX_REPAIRS: usize = 64;
/// Regions copied before that is made durable.
const CHECKPOINT: usize = 64;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Step {
    #[default]
    Idle,
    Suspect,
    Flush,
    Log,
    Super,
    /// Of a leg that has become in sync: behind those that could go on without it.
    Promoted,
    Tell,
}

#[derive(Debug, Default)]
struct Commit {
    step: Step,
    /// Operations that are out: which and on which leg.
    out: Vec<(u64, usize)>,
    /// Waits for the reactors to be told this.
    telling: Option<u64>,
    grants: Vec<(u32, Vec<usize>)>,
    blocks: Vec<usize>,
    flush: bool,
    supers: bool,
    /// A leg went out: begin again.
    again: bool,
    /// The last leg failed.
    broken: bool,
    /// Bits cleared in this round, to be set again when the flush fails.
    undo: Vec<(usize, u8)>,
    /// The leg that this round calls in sync.
    completing: Option<usize>,
    /// The same, when all others have that in their superblocks.
    completed: Option<usize>,
    /// Legs that get the whole log in this round.
    full: u8,
    /// Which bits are durable has to be seen from the log.
    recount: bool,
}

#[derive(Debug)]
struct Job {
    from: usize,
    to: usize,
    lba: u64,
    blocks: u64,
    /// The region that is copied when this is, if it is not a repair.
    ends: Option<usize>,
    repair: bool,
    state: JobState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum JobState {
    Locking,
    Copying,
    /// Its target has gone out: what is under way ends, and nothing comes of it.
    Void,
}

#[derive(Debug)]
struct Rebuild {
    target: usize,
    todo: VecDeque<usize>,
    /// Blocks of the first of them that are copied.
    within: u64,
    progress: Progress,
    /// Sources that could not be read.
    bad_sources: u8,
}

/// See the [module](self).
pub struct Array {
    sb: Superblock,
    regions: Regions,
    /// Whether anything is written to the legs besides data.
    persist: bool,
    draw: Box<dyn FnMut() -> Uuid + Send>,
    view: View,
    effects: Vec<Effect>,
    next_op: u64,
    commit: Commit,
    /// What the next round is for.
    super_changed: bool,
    log_full: u8,
    marks: Vec<(u32, Vec<usize>)>,
    clears: Vec<usize>,
    copied: Vec<(usize, usize)>,
    checkpoint: bool,
    suspects: u8,
    /// Legs that every reactor writes to.
    receiving: u8,
    /// Regions whose bit is durable.
    durable: Vec<bool>,
    round: u64,
    revoking: bool,
    granted_in_round: Vec<bool>,
    job: Option<Job>,
    rebuild: Option<Rebuild>,
    repairs: VecDeque<(usize, u64, u64)>,
    window: u64,
    stopping: bool,
    #[cfg(test)]
    pub(super) without: Option<Rule>,
}

fn bit(leg: usize) -> u8 {
    1 << leg
}

/// What each leg is from now on, in the superblock and in the log: those that are there and have everything are in sync, where
/// what may differ has one source only. Returns legs that get the whole log.
fn take_stock(sb: &mut Superblock, regions: &mut Regions, present: u8, draw: &mut dyn FnMut() -> Uuid) -> u8 {
    let unclean = regions.any_active();
    let mut source = None;
    let mut fewer = false;
    let event = sb.events + 1;
    let mut log_full = 0;
    for (n, leg) in sb.legs.iter_mut().enumerate() {
        let here = present & bit(n) != 0;
        let to = match leg.state {
            LegState::InSync if here && (source.is_none() || !unclean) => {
                source = source.or(Some(n));
                LegState::InSync
            }
            LegState::Empty => LegState::Empty,
            _ if here => LegState::Rebuilding,
            _ => LegState::Out,
        };
        fewer |= leg.state == LegState::InSync && to != LegState::InSync;
        if to != LegState::InSync {
            regions.settle(bit(n));
            log_full |= if to == LegState::Rebuilding { bit(n) } else { 0 };
        }
        if leg.state != to {
            (leg.state, leg.since) = (to, event);
        }
    }
    if fewer {
        let id = draw();
        sb.begin_epoch(id);
    }
    sb.events = event;
    for n in 0..sb.legs.len() {
        if sb.legs[n].state == LegState::InSync {
            regions.lack_none(bit(n));
        }
    }
    log_full
}

impl Array {
    /// An array as its superblock says, with the log that its legs in sync have together. `present`: legs that are there. What may
    /// have been written when it ended is copied from one of them to the others. Legs in sync that are not there are left behind.
    pub fn start(
        mut sb: Superblock,
        mut regions: Regions,
        present: u8,
        persist: bool,
        draw: Box<dyn FnMut() -> Uuid + Send>,
    ) -> Array {
        let mut draw = draw;
        let log_full = take_stock(&mut sb, &mut regions, present, &mut draw);
        let legs = vec![Standing::Out; sb.legs.len()];
        let count = regions.len();
        let durable = (0..count).map(|region| regions.is_active(region)).collect();
        Array {
            sb,
            regions,
            persist,
            draw,
            view: View { generation: 0, legs, offline: true },
            effects: Vec::new(),
            next_op: 0,
            commit: Commit { recount: true, ..Commit::default() },
            super_changed: true,
            log_full: log_full | present,
            marks: Vec::new(),
            clears: Vec::new(),
            copied: Vec::new(),
            checkpoint: false,
            suspects: 0,
            receiving: 0,
            durable,
            round: 0,
            revoking: false,
            granted_in_round: vec![false; count],
            job: None,
            rebuild: None,
            repairs: VecDeque::new(),
            window: 2048,
            stopping: false,
            #[cfg(test)]
            without: None,
        }
    }

    /// Whether a test has taken this rule out.
    #[cfg(test)]
    fn lacks(&self, rule: Rule) -> bool {
        self.without == Some(rule)
    }

    #[cfg(not(test))]
    fn lacks(&self, _: Rule) -> bool {
        false
    }

    /// What is to be done since the last call; the machine goes on as far as it can first.
    pub fn effects(&mut self) -> Vec<Effect> {
        self.pump();
        std::mem::take(&mut self.effects)
    }

    /// As reactors are to see it.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// As the superblocks tell it, or will.
    pub fn superblock(&self) -> &Superblock {
        &self.sb
    }

    /// The log.
    pub fn regions(&self) -> &Regions {
        &self.regions
    }

    /// Where things lie.
    pub fn layout(&self) -> &Layout {
        &self.sb.layout
    }

    /// The copy under way.
    pub fn progress(&self) -> Option<Progress> {
        self.rebuild.as_ref().map(|rebuild| rebuild.progress)
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.commit.step == Step::Idle && !self.wants_commit() && self.job.is_none()
    }

    /// Whether it serves: the first round has ended, and none has failed since.
    pub fn is_online(&self) -> bool {
        !self.view.offline
    }

    /// Whether a leg is in sync, or about to be, that reactors do not read from yet.
    pub fn is_promoting(&self) -> bool {
        let mut legs = self.sb.legs.iter().zip(&self.view.legs);
        legs.any(|(leg, standing)| leg.state == LegState::InSync && *standing != Standing::InSync)
    }

    /// Sets the blocks of a window.
    pub fn set_window(&mut self, blocks: u64) {
        self.window = blocks.max(1);
    }

    fn count(&self, state: LegState) -> usize {
        self.sb.legs.iter().filter(|leg| leg.state == state).count()
    }

    fn members(&self) -> Vec<usize> {
        let in_array = |leg: &Leg| matches!(leg.state, LegState::InSync | LegState::Rebuilding);
        self.sb.legs.iter().enumerate().filter(|(_, leg)| in_array(leg)).map(|(n, _)| n).collect()
    }

    // ---- what happens -------------------------------------------------------------------------------------------------------

    /// A reactor wants to write these regions.
    pub fn mark(&mut self, from: u32, regions: Vec<usize>) {
        if self.view.offline && self.commit.step == Step::Idle && !self.super_changed {
            return;
        }
        let marked = !self.persist || regions.iter().all(|&region| self.durable[region]);
        if marked || self.lacks(Rule::MarkFirst) {
            return self.grant(from, regions);
        }
        self.marks.push((from, regions));
    }

    fn grant(&mut self, to: u32, regions: Vec<usize>) {
        regions.iter().for_each(|&region| self.granted_in_round[region] = true);
        self.clears.retain(|region| !regions.contains(region));
        self.effects.push(Effect::Grant { to, regions });
    }

    /// An operation on a leg failed, or the leg is gone. `false`: it is the last one in sync, and stays.
    pub fn leg_failed(&mut self, leg: usize, why: &str) -> bool {
        self.put_out(leg, LegState::Out, why)
    }

    /// A write has failed on the last leg in sync: what the others have of it is not known.
    pub fn uncertain(&mut self) {
        for leg in 0..self.sb.legs.len() {
            let state = self.sb.legs[leg].state;
            // Also one that is complete, and of which not all reactors have been told.
            let untold = self.view.legs[leg] == Standing::Rebuilding || self.commit.completed == Some(leg);
            let young = state == LegState::InSync && untold;
            if state == LegState::Rebuilding || young {
                self.put_out(leg, LegState::Out, "a write failed on the leg that it is copied from");
            }
        }
    }

    /// A leg is taken out for good. `false`: it is the last one in sync.
    pub fn remove(&mut self, leg: usize) -> bool {
        self.put_out(leg, LegState::Empty, "it was taken out")
    }

    fn put_out(&mut self, leg: usize, to: LegState, why: &str) -> bool {
        let state = self.sb.legs[leg].state;
        if matches!(state, LegState::Out | LegState::Empty) {
            if to == LegState::Empty && state == LegState::Out {
                self.change(leg, to);
            }
            return true;
        }
        let early = matches!(self.commit.step, Step::Suspect | Step::Flush);
        if let Some(completing) = self.commit.completing.take() {
            // Not all superblocks say so yet: a leg that goes out now could start alone later, and would not know of this one.
            self.sb.legs[completing].state = LegState::Rebuilding;
            self.rebuild = None;
        }
        let state = self.sb.legs[leg].state;
        if state == LegState::InSync {
            if self.count(LegState::InSync) == 1 {
                return false;
            }
            let id = (self.draw)();
            self.sb.begin_epoch(id);
        }
        if early {
            self.undo();
        }
        self.change(leg, to);
        self.copied.retain(|(of, _)| *of != leg);
        if !self.lacks(Rule::Settle) {
            self.regions.settle(bit(leg));
        }
        self.receiving &= !bit(leg);
        self.log_full &= !bit(leg);
        self.suspects |= bit(leg);
        self.commit.again = true;
        self.repairs.retain(|(to, ..)| *to != leg);
        if let Some(job) = self.job.as_mut().filter(|job| job.to == leg) {
            job.state = if job.state == JobState::Locking { JobState::Locking } else { JobState::Void };
            job.to = usize::MAX;
        }
        if self.rebuild.as_ref().is_some_and(|rebuild| rebuild.target == leg) {
            self.rebuild = None;
        }
        self.effects
            .push(Effect::Note { leg, text: format!("out of the array since event {}: {why}", self.sb.events) });
        true
    }

    /// The bits that this round was to clear are set again: a flush before it has failed.
    fn undo(&mut self) {
        if self.commit.undo.is_empty() {
            return;
        }
        for (region, bits) in std::mem::take(&mut self.commit.undo) {
            self.regions.set(region, bits);
        }
        self.commit.recount = true;
        // What was copied is to be copied again.
        self.rebuild = None;
    }

    fn change(&mut self, leg: usize, to: LegState) {
        self.sb.events += 1;
        (self.sb.legs[leg].state, self.sb.legs[leg].since) = (to, self.sb.events);
        self.super_changed = true;
    }

    /// A leg that is out is there again, or, with a new identity, another in its place, which lacks everything.
    pub fn admit(&mut self, leg: usize, identity: Option<Uuid>) {
        debug_assert!(matches!(self.sb.legs[leg].state, LegState::Out | LegState::Empty), "it is in the array");
        if let Some(id) = identity {
            self.sb.legs[leg].id = id;
        }
        if identity.is_some() || !self.persist {
            self.regions.lack_all(bit(leg));
        }
        self.change(leg, LegState::Rebuilding);
        self.log_full |= bit(leg);
        let text = format!("in the array again, lacking {} regions", self.regions.lacking(leg).count());
        self.effects.push(Effect::Note { leg, text });
    }

    /// Another leg, which lacks everything: its number. `None` when there are enough.
    pub fn add_leg(&mut self, id: Uuid) -> Option<usize> {
        if self.sb.legs.len() == MAX_LEGS {
            return None;
        }
        self.sb.legs.push(Leg { id, state: LegState::Empty, since: self.sb.events });
        self.view.legs.push(Standing::Out);
        Some(self.sb.legs.len() - 1)
    }

    /// A write or flush of [`Effect::Meta`] has ended.
    pub fn meta_done(&mut self, op: u64, ok: bool) {
        let Some(at) = self.commit.out.iter().position(|(out, _)| *out == op) else { return };
        let (_, leg) = self.commit.out.swap_remove(at);
        if !ok && !self.leg_failed(leg, "its superblock or log cannot be written") {
            self.commit.broken = true;
        }
    }

    /// All reactors know the view of this generation.
    pub fn told(&mut self, generation: u64) {
        if self.commit.telling == Some(generation) {
            self.commit.telling = None;
        }
    }

    /// After an end offline: try again.
    pub fn retry(&mut self) {
        if self.view.offline && self.commit.step == Step::Idle {
            self.super_changed = true;
        }
    }

    /// It is time to clear the bits of regions that nobody writes, and to make durable what was copied.
    pub fn tidy(&mut self) {
        self.checkpoint |= !self.copied.is_empty();
        if self.persist && !self.revoking && self.regions.any_active() && !self.view.offline {
            self.revoking = true;
            self.round += 1;
            self.granted_in_round.fill(false);
            self.effects.push(Effect::Revoke(self.round));
        }
    }

    /// What reactors did not give back in this round.
    pub fn revoked(&mut self, round: u64, held: &[bool]) {
        if !self.revoking || round != self.round {
            return;
        }
        self.revoking = false;
        for (region, held) in held.iter().enumerate() {
            let idle = !held && !self.granted_in_round[region];
            if (idle || self.lacks(Rule::Revoke)) && self.durable[region] {
                self.clears.push(region);
            }
        }
    }

    /// Nothing is written any more and nothing will be: all bits go.
    pub fn stop(&mut self) {
        self.stopping = true;
        self.repairs.clear();
        if self.persist && !self.view.offline {
            self.clears = (0..self.regions.len()).filter(|&region| self.regions.is_active(region)).collect();
            self.checkpoint |= !self.copied.is_empty();
        }
    }

    // ---- rounds ---------------------------------------------------------------------------------------------------------------

    fn wants_commit(&self) -> bool {
        // Offline, only what is asked for is tried.
        let rest = !self.marks.is_empty() || !self.clears.is_empty() || self.checkpoint || self.log_full != 0;
        self.super_changed || rest && !self.view.offline
    }

    fn pump(&mut self) {
        while self.commit.out.is_empty() && self.commit.telling.is_none() {
            if self.commit.broken {
                self.go_offline();
                continue;
            }
            if std::mem::take(&mut self.commit.again) && self.commit.step != Step::Idle {
                self.commit.step = Step::Suspect;
                self.enter(Step::Suspect);
                continue;
            }
            match self.commit.step {
                Step::Idle => {
                    self.drive_copies();
                    if !self.wants_commit() {
                        return;
                    }
                    self.begin();
                    self.enter(Step::Suspect);
                }
                Step::Suspect => self.enter(Step::Flush),
                Step::Flush => self.enter(Step::Log),
                Step::Log => self.enter(Step::Super),
                Step::Super => self.enter(Step::Promoted),
                Step::Promoted => self.enter(Step::Tell),
                Step::Tell => self.finish(),
            }
        }
    }

    fn begin(&mut self) {
        let commit = &mut self.commit;
        (commit.again, commit.broken) = (false, false);
        commit.undo.clear();
        commit.blocks.clear();
        commit.supers = false;
        commit.full = 0;
        commit.completing = None;
        commit.completed = None;
        commit.grants = std::mem::take(&mut self.marks);
        let checkpoint = std::mem::take(&mut self.checkpoint);
        // Clears of what is to be marked as well make no sense.
        for region in std::mem::take(&mut self.clears) {
            if !commit.grants.iter().any(|(_, regions)| regions.contains(&region)) {
                self.regions.clear(region, ACTIVE);
                self.durable[region] = false;
                commit.undo.push((region, ACTIVE));
            }
        }
        if checkpoint {
            for (leg, region) in std::mem::take(&mut self.copied) {
                self.regions.clear(region, bit(leg));
                commit.undo.push((region, bit(leg)));
            }
        }
        commit.flush = !commit.undo.is_empty();
        let away = if self.lacks(Rule::Receiving) { 0 } else { !self.receiving & self.lackers() };
        for &region in self.commit.grants.iter().flat_map(|(_, regions)| regions) {
            self.regions.set(region, ACTIVE | away);
        }
        if let Some(rebuild) = &self.rebuild
            && rebuild.todo.is_empty()
            && self.regions.lacking(rebuild.target).next().is_none()
        {
            let target = rebuild.target;
            self.rebuild = None;
            self.change(target, LegState::InSync);
            self.commit.completing = Some(target);
            self.commit.flush = true;
        }
    }

    /// Legs that can lack something.
    fn lackers(&self) -> u8 {
        let lacks = |leg: &Leg| !matches!(leg.state, LegState::InSync | LegState::Empty);
        self.sb.legs.iter().enumerate().filter(|(_, leg)| lacks(leg)).fold(0, |mask, (n, _)| mask | bit(n))
    }

    fn op(&mut self, leg: usize, what: Meta, lba: u64, bytes: Vec<u8>) {
        self.next_op += 1;
        let op = self.next_op;
        self.commit.out.push((op, leg));
        self.effects.push(Effect::Meta { op, leg, what, lba, bytes });
    }

    fn enter(&mut self, step: Step) {
        self.commit.step = step;
        match step {
            Step::Suspect if self.suspects != 0 && self.lacks(Rule::DurableBeforeOut) => {
                for leg in 0..self.view.legs.len() {
                    if self.suspects & bit(leg) != 0 {
                        self.view.legs[leg] = Standing::Out;
                    }
                }
                self.tell();
            }
            Step::Suspect if self.suspects != 0 && !self.lacks(Rule::SuspectFirst) => {
                for leg in 0..self.view.legs.len() {
                    if self.suspects & bit(leg) != 0 {
                        self.view.legs[leg] = Standing::Suspect;
                    }
                }
                self.tell();
            }
            Step::Flush if self.commit.flush && self.persist && !self.lacks(Rule::FlushBeforeClear) => {
                self.members().into_iter().for_each(|leg| self.op(leg, Meta::Flush, 0, Vec::new()));
            }
            Step::Log => {
                // What was to be flushed is.
                self.commit.undo.clear();
                self.commit.flush = false;
                if self.persist {
                    self.write_log();
                }
            }
            Step::Super => {
                self.commit.supers |= std::mem::take(&mut self.super_changed);
                self.sb.sequence += u64::from(self.commit.supers);
                let promoted = self.commit.completing.filter(|_| !self.lacks(Rule::PromotedLast));
                self.write_supers(|leg| Some(leg) != promoted);
            }
            Step::Promoted => {
                self.commit.completed = self.commit.completing.take();
                let promoted = self.commit.completed.filter(|_| !self.lacks(Rule::PromotedLast));
                self.write_supers(|leg| Some(leg) == promoted);
            }
            Step::Tell if self.commit.supers => {
                self.view.offline = false;
                for (standing, leg) in self.view.legs.iter_mut().zip(&self.sb.legs) {
                    *standing = match leg.state {
                        LegState::InSync => Standing::InSync,
                        LegState::Rebuilding => Standing::Rebuilding,
                        LegState::Out | LegState::Empty => Standing::Out,
                    };
                }
                self.suspects = 0;
                self.tell();
            }
            _ => {}
        }
    }

    fn write_supers(&mut self, to: impl Fn(usize) -> bool) {
        if !self.commit.supers || !self.persist {
            return;
        }
        let lba = self.sb.layout.super_lba(self.sb.sequence & 1);
        for leg in self.members().into_iter().filter(|&leg| to(leg)) {
            self.sb.me = leg;
            let bytes = self.sb.encode();
            self.op(leg, Meta::Super, lba, bytes);
        }
    }

    fn tell(&mut self) {
        self.view.generation += 1;
        self.commit.telling = Some(self.view.generation);
        self.effects.push(Effect::Tell(self.view.generation));
    }

    fn write_log(&mut self) {
        let mut blocks = self.regions.take_changed();
        blocks.extend(self.commit.blocks.iter().filter(|block| !blocks.contains(block)).copied().collect::<Vec<_>>());
        self.commit.blocks = blocks;
        self.commit.full = self.log_full;
        for leg in self.members() {
            let all: Vec<usize> = match self.commit.full & bit(leg) {
                0 => self.commit.blocks.clone(),
                _ => (0..self.sb.layout.log_blocks()).collect(),
            };
            for block in all {
                let (lba, bytes) = (self.sb.layout.log_lba(block), self.regions.encode(self.sb.array, block));
                self.op(leg, Meta::Log, lba, bytes);
            }
        }
    }

    fn finish(&mut self) {
        self.commit.step = Step::Idle;
        if self.commit.supers {
            for (leg, standing) in self.view.legs.iter().enumerate() {
                // Those who fail meanwhile are taken out of it by `put_out`, and this round begins again.
                if matches!(standing, Standing::InSync | Standing::Rebuilding) {
                    self.receiving |= bit(leg);
                }
            }
            if let Some(leg) = self.commit.completed.take() {
                self.effects.push(Effect::Note { leg, text: format!("in sync since event {}", self.sb.events) });
            }
        }
        if self.persist {
            self.log_full &= !std::mem::take(&mut self.commit.full);
        } else {
            self.log_full = 0;
        }
        if std::mem::take(&mut self.commit.recount) {
            (0..self.durable.len()).for_each(|region| self.durable[region] = self.regions.is_active(region));
        }
        for (to, regions) in std::mem::take(&mut self.commit.grants) {
            regions.iter().for_each(|&region| self.durable[region] = true);
            self.grant(to, regions);
        }
    }

    fn go_offline(&mut self) {
        let commit = &mut self.commit;
        (commit.step, commit.broken, commit.again) = (Step::Idle, false, false);
        self.undo();
        if let Some(leg) = self.commit.completing.take() {
            self.sb.legs[leg].state = LegState::Rebuilding;
        }
        // Whether they are durable is not known; the view takes all grants back.
        self.durable.fill(false);
        self.commit.recount = true;
        self.commit.grants.clear();
        self.marks.clear();
        self.clears.clear();
        self.checkpoint = false;
        self.super_changed = false;
        self.rebuild = None;
        let all = self.sb.legs.len();
        self.log_full |= self.members().into_iter().fold(0, |mask, leg| mask | bit(leg));
        self.view.offline = true;
        self.tell();
        // Only when told may the next round begin, and that only when it is asked for.
        self.effects
            .push(Effect::Note { leg: all, text: "no leg in sync can be written: the array is offline".into() });
    }
}

impl std::fmt::Debug for Array {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut all = f.debug_struct("Array");
        all.field("superblock", &self.sb).field("view", &self.view).field("round", &self.commit);
        all.field("job", &self.job).field("rebuild", &self.rebuild).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
