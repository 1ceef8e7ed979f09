//! What legs lack is copied to them, one window at a time, and what could not be read is written again.

use std::collections::VecDeque;

use super::super::format::LegState;
use super::{Array, CHECKPOINT, CopyEnd, Effect, Job, JobState, MAX_REPAIRS, Progress, Rebuild, Standing, bit};

impl Array {
    /// A leg could not be read here, and another could.
    pub fn repair(&mut self, leg: usize, lba: u64, blocks: u64) {
        let known = self.repairs.iter().any(|one| *one == (leg, lba, blocks));
        if self.sb.legs[leg].state == LegState::InSync && !known && self.repairs.len() < MAX_REPAIRS {
            self.repairs.push_back((leg, lba, blocks));
        }
    }

    fn source_for(&self, target: usize, bad: u8) -> Option<usize> {
        let fits = |leg: &usize| {
            *leg != target && self.view.legs[*leg] == Standing::InSync && self.sb.legs[*leg].state == LegState::InSync
        };
        (0..self.sb.legs.len()).filter(fits).find(|leg| bad & bit(*leg) == 0)
    }

    pub(super) fn drive_copies(&mut self) {
        if self.job.is_some() || self.view.offline || self.stopping {
            return;
        }
        while let Some((to, lba, blocks)) = self.repairs.pop_front() {
            if let Some(from) = self.source_for(to, 0) {
                return self.lock(Job { from, to, lba, blocks, ends: None, repair: true, state: JobState::Locking });
            }
        }
        if self.rebuild.is_none() {
            self.begin_rebuild();
        }
        let Some(rebuild) = &self.rebuild else { return };
        let Some(&region) = rebuild.todo.front() else {
            // All is copied; once that is durable the leg is in sync.
            self.checkpoint |= self.regions.lacking(rebuild.target).next().is_some();
            self.super_changed = true;
            return;
        };
        let target = rebuild.target;
        let Some(from) = self.source_for(target, rebuild.bad_sources) else {
            self.leg_failed(target, "what it lacks cannot be read from any leg in sync");
            return;
        };
        let (first, blocks) = self.sb.layout.range_of(region);
        let (lba, left) = (first + rebuild.within, blocks - rebuild.within);
        let count = left.min(self.window);
        let ends = (count == left).then_some(region);
        self.lock(Job { from, to: target, lba, blocks: count, ends, repair: false, state: JobState::Locking });
    }

    fn begin_rebuild(&mut self) {
        let ready = |leg: &usize| {
            self.view.legs[*leg] == Standing::Rebuilding
                && self.sb.legs[*leg].state == LegState::Rebuilding
                && self.receiving & bit(*leg) != 0
        };
        let Some(target) = (0..self.sb.legs.len()).find(ready) else { return };
        let todo: VecDeque<usize> = self.regions.lacking(target).collect();
        let total = todo.iter().map(|&region| self.sb.layout.range_of(region).1).sum();
        let progress = Progress { target, done: 0, total };
        self.rebuild = Some(Rebuild { target, todo, within: 0, progress, bad_sources: 0 });
    }

    fn lock(&mut self, job: Job) {
        self.effects.push(Effect::Lock { lba: job.lba, blocks: job.blocks });
        self.job = Some(job);
    }

    /// Writes are kept out of the blocks of [`Effect::Lock`].
    pub fn locked(&mut self) {
        let Some(job) = self.job.as_mut() else { return };
        let from_is_well = self.sb.legs[job.from].state == LegState::InSync;
        if job.to == usize::MAX || !from_is_well || self.view.offline || self.stopping {
            self.job = None;
            self.effects.push(Effect::Unlock);
            return;
        }
        job.state = JobState::Copying;
        self.effects.push(Effect::Copy { from: job.from, to: job.to, lba: job.lba, blocks: job.blocks });
    }

    /// The copy of [`Effect::Copy`] has ended.
    pub fn copied(&mut self, end: CopyEnd) {
        let Some(job) = self.job.take() else { return };
        self.effects.push(Effect::Unlock);
        if job.state == JobState::Void {
            return;
        }
        match end {
            CopyEnd::Target => {
                self.leg_failed(job.to, "what it lacks cannot be written to it");
            }
            CopyEnd::Source if job.repair => {}
            CopyEnd::Source => {
                if let Some(rebuild) = self.rebuild.as_mut() {
                    rebuild.bad_sources |= bit(job.from);
                }
            }
            CopyEnd::Done if job.repair => {}
            // The source was put out meanwhile: what was read from it may have been overtaken elsewhere.
            CopyEnd::Done if self.sb.legs[job.from].state != LegState::InSync => {}
            CopyEnd::Done => self.advance(&job),
        }
    }

    fn advance(&mut self, job: &Job) {
        let Some(rebuild) = self.rebuild.as_mut() else { return };
        rebuild.progress.done += job.blocks;
        match job.ends {
            None => rebuild.within += job.blocks,
            Some(region) => {
                rebuild.todo.pop_front();
                rebuild.within = 0;
                self.copied.push((job.to, region));
                self.checkpoint |= self.copied.len() >= CHECKPOINT;
            }
        }
    }
}
