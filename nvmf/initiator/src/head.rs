//! One reactor's way into one bdev: which path an I/O takes, what waits for one, what is held.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bdev::core::{Io, IoStatus, IoTag, Op};
use nvmf::spec::log::AnaState;
use reactor::Instant;
use slab::Slab;

use crate::disk::Disk;
use crate::part::LocalPath;
use crate::path::PathState;
use crate::policy::{Candidate, Choice, Memory, Mode, choose};
use bdev::core::claims::{Claims, Extent};

/// How long a path is not used for a namespace after it has completed a command with a path-related status, unless its
/// access states change sooner.
const SUSPICION: Duration = Duration::from_secs(1);
/// How often a command is sent again after path-related statuses.
const MAX_RETRIES: u8 = 10;
/// How long access states may keep all paths closed where the controller gives no time.
const DEFAULT_TRANSITION: Duration = Duration::from_secs(10);

/// What I/O ends with that has no path: Host Pathing Error.
pub const NO_PATH: IoStatus = IoStatus::Nvme { sct: 3, sc: 0x70, dnr: false };

/// A path of this head.
#[derive(Debug)]
pub(crate) struct Route {
    /// Its place in the part.
    pub path: usize,
    /// The namespace on it.
    pub nsid: u32,
    /// The user prefers it.
    pub preferred: bool,
    ana: AnaState,
    suspect_until: Option<Instant>,
}

/// I/O that waits for a path.
pub(crate) struct Waiting {
    pub io: Io,
    pub retries: u8,
    /// Its claim, if it writes and was sent before.
    pub claim: Option<usize>,
}

/// A command whose fate is unknown.
pub(crate) struct Held {
    pub io: Io,
    /// Place of its path in the part, which is counted as used by this.
    pub path: usize,
    /// Its association.
    pub number: u64,
    /// The order of submission.
    pub turn: u64,
    /// Its claim.
    pub claim: Option<usize>,
}

/// The head.
pub(crate) struct Head {
    pub disk: Arc<Disk>,
    pub seen: u64,
    pub routes: Vec<Route>,
    mode: Mode,
    memory: Memory,
    pub waiting: VecDeque<Waiting>,
    pub held: Vec<Held>,
    /// One for each command that writes, from when it is sent first until it completes.
    claims: Claims,
    /// What conflicts with one of these, or with something before it in here.
    behind: VecDeque<Waiting>,
    /// Since when only access states keep it from going on.
    blocked_since: Option<Instant>,
    /// Its channel is called soon.
    pub called: bool,
}

/// Whether doing it twice is doing it once.
fn is_idempotent(io: &Io) -> bool {
    // No command copies blocks onto ones that it reads.
    !matches!(io.op(), Op::CompareAndWrite { .. })
}

impl Head {
    pub fn new(disk: Arc<Disk>) -> Head {
        Head {
            disk,
            seen: 0,
            routes: Vec::new(),
            mode: Mode::default(),
            memory: Memory::default(),
            waiting: VecDeque::new(),
            held: Vec::new(),
            claims: Claims::default(),
            behind: VecDeque::new(),
            blocked_since: None,
            called: false,
        }
    }

    /// Takes the disk's paths: those of `routes`, by place in the part and NSID.
    pub fn set_routes(&mut self, routes: Vec<Route>, mode: Mode) {
        self.routes = routes;
        self.mode = mode;
        self.memory = Memory::default();
    }

    pub fn route(path: usize, nsid: u32, preferred: bool) -> Route {
        Route { path, nsid, preferred, ana: AnaState::Optimized, suspect_until: None }
    }

    /// The path's access states have changed, or it has.
    pub fn path_changed(&mut self, key: usize, path: &LocalPath) {
        for route in self.routes.iter_mut().filter(|route| route.path == key) {
            route.ana = path.view.ana.get(&route.nsid).copied().unwrap_or(AnaState::Optimized);
            route.suspect_until = None;
        }
    }

    /// Whether something in here has to be looked at.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.held.is_empty() && self.behind.is_empty()
    }

    /// Whether an I/O that comes now has to take its place behind others.
    #[inline]
    pub fn must_queue(&self, io: &Io) -> bool {
        !self.waiting.is_empty() || self.is_behind(io)
    }

    /// Whether `io` writes what is claimed, or what something behind a claim is to have first.
    #[inline]
    fn is_behind(&self, io: &Io) -> bool {
        if !io.op().modifies() {
            return false;
        }
        let extent = Extent::of(io);
        self.claims.conflict(&extent) || self.behind.iter().any(|behind| extent.conflicts(&Extent::of(&behind.io)))
    }

    /// `io` is sent, for the first time or again.
    #[inline]
    pub fn claim(&mut self, io: &Io, claim: Option<usize>) -> Option<usize> {
        claim.or_else(|| io.op().modifies().then(|| self.claims.add(Extent::of(io))))
    }

    /// The fate of a command is unknown.
    pub fn hold(&mut self, held: Held) {
        self.held.push(held);
    }

    /// A command has completed: what is behind it may go on.
    #[inline]
    pub fn end_claim(&mut self, claim: Option<usize>) {
        let Some(claim) = claim else { return };
        self.claims.end(claim);
        if !self.behind.is_empty() {
            self.look_behind();
        }
    }

    fn look_behind(&mut self) {
        for waiting in std::mem::take(&mut self.behind) {
            if self.is_behind(&waiting.io) {
                self.behind.push_back(waiting);
            } else {
                self.waiting.push_back(waiting);
            }
        }
    }

    pub fn queue(&mut self, waiting: Waiting) {
        if let Some(waiting) = self.keep_behind(waiting) {
            self.waiting.push_back(waiting);
        }
    }

    /// Keeps what overlaps something that is held, and gives everything else back.
    pub fn keep_behind(&mut self, waiting: Waiting) -> Option<Waiting> {
        if waiting.claim.is_some() || !self.is_behind(&waiting.io) {
            return Some(waiting);
        }
        self.behind.push_back(waiting);
        None
    }

    /// Chooses a path.
    pub fn choose(&mut self, paths: &Slab<LocalPath>, now: Instant, pair: bool) -> Choice {
        let routes = &self.routes;
        choose(self.mode, &mut self.memory, routes.len(), |index| {
            let route = &routes[index];
            let path = &paths[route.path];
            let suspect = route.suspect_until.is_some_and(|until| now < until);
            let rank = match route.ana {
                _ if suspect || !path.takes_commands() => None,
                AnaState::Optimized => Some(0),
                AnaState::NonOptimized => Some(1),
                _ => None,
            };
            let (room, load) = path.room(pair);
            Candidate { rank, room, load, preferred: route.preferred }
        })
    }

    /// Whether a path that cannot be used now may be usable later.
    fn may_recover(&mut self, paths: &Slab<LocalPath>, now: Instant) -> bool {
        let mut transition = None;
        for route in &self.routes {
            let path = &paths[route.path];
            let gone = path.view.fails_io || path.view.state == PathState::Failed;
            if gone || path.lacks_queue() || route.ana == AnaState::PersistentLoss {
                continue;
            }
            let closed = matches!(route.ana, AnaState::Inaccessible | AnaState::Change);
            if !closed || !path.takes_commands() {
                self.blocked_since = None;
                return true;
            }
            let seconds = Duration::from_secs(path.view.anatt_s.into());
            let seconds = if seconds.is_zero() { DEFAULT_TRANSITION } else { seconds };
            transition = transition.max(Some(seconds));
        }
        let Some(transition) = transition else { return false };
        now < *self.blocked_since.get_or_insert(now) + transition
    }

    /// When something in here changes by itself.
    pub fn deadline(&self, paths: &Slab<LocalPath>) -> Option<Instant> {
        if self.waiting.is_empty() {
            return None;
        }
        let longest = self.routes.iter().map(|route| match paths[route.path].view.anatt_s {
            0 => DEFAULT_TRANSITION,
            seconds => Duration::from_secs(seconds.into()),
        });
        let transition = self.blocked_since.zip(longest.max()).map(|(since, longest)| since + longest);
        let suspects = self.routes.iter().filter_map(|route| route.suspect_until);
        suspects.chain(transition).min()
    }

    /// Lets go of what is held and fenced: it is sent again, before anything else. What would do something else the second
    /// time ends.
    pub fn release(&mut self, paths: &mut Slab<LocalPath>, sink: &mut dyn FnMut(Io, IoStatus)) {
        let mut freed: Vec<Held> = Vec::new();
        let mut index = 0;
        while index < self.held.len() {
            let held = &self.held[index];
            if paths[held.path].view.fenced >= held.number {
                let held = self.held.swap_remove(index);
                paths[held.path].refs -= 1;
                freed.push(held);
            } else {
                index += 1;
            }
        }
        // The last first: each goes to the front.
        freed.sort_by_key(|held| std::cmp::Reverse(held.turn));
        for held in freed {
            if is_idempotent(&held.io) {
                self.waiting.push_front(Waiting { io: held.io, retries: 0, claim: held.claim });
            } else {
                self.end_claim(held.claim);
                sink(held.io, IoStatus::Aborted);
            }
        }
    }

    /// There is no path for what waits first: waits on, or ends all of it.
    pub fn no_path(&mut self, paths: &Slab<LocalPath>, now: Instant, sink: &mut dyn FnMut(Io, IoStatus)) {
        if !self.may_recover(paths, now) {
            for waiting in std::mem::take(&mut self.waiting) {
                self.end_claim(waiting.claim);
                sink(waiting.io, NO_PATH);
            }
        }
    }

    /// A path was found.
    pub fn unblocked(&mut self) {
        self.blocked_since = None;
    }

    /// A command has been completed with a path-related status: it is sent again, and returned if that was often enough.
    pub fn path_error(&mut self, path: usize, waiting: Waiting, now: Instant) -> Option<Waiting> {
        for route in self.routes.iter_mut().filter(|route| route.path == path) {
            route.suspect_until = Some(now + SUSPICION);
        }
        if waiting.retries >= MAX_RETRIES {
            return Some(waiting);
        }
        self.waiting.push_front(Waiting { retries: waiting.retries + 1, ..waiting });
        None
    }

    /// Takes the I/O of `tag` out, if it waits.
    pub fn take(&mut self, tag: IoTag) -> Option<Io> {
        let is_it = |waiting: &Waiting| waiting.io.tag() == tag;
        let waiting = match self.waiting.iter().position(is_it) {
            Some(index) => self.waiting.remove(index),
            None => self.behind.iter().position(is_it).and_then(|index| self.behind.remove(index)),
        }?;
        self.end_claim(waiting.claim);
        Some(waiting.io)
    }

    /// Takes all that waits.
    pub fn take_all(&mut self) -> Vec<Io> {
        let all: Vec<Waiting> = self.waiting.drain(..).chain(self.behind.drain(..)).collect();
        all.iter().for_each(|waiting| self.end_claim(waiting.claim));
        all.into_iter().map(|waiting| waiting.io).collect()
    }
}
