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
    /// Its hold, if it was held once.
    pub hold: Option<u64>,
}

/// The blocks that a command which was held once changes, and reads, until it completes.
struct Hold {
    id: u64,
    extent: Extent,
}

#[derive(Clone, Copy)]
struct Extent {
    target: (u64, u64),
    source: Option<(u64, u64)>,
}

impl Extent {
    fn of(io: &Io) -> Extent {
        let source = match io.op() {
            Op::Copy { source_lba } => Some((source_lba, io.blocks())),
            _ => None,
        };
        Extent { target: (io.lba(), io.blocks()), source }
    }

    /// Whether one changes what the other reads or writes.
    fn conflicts(&self, other: &Extent) -> bool {
        let meets = |source: Option<(u64, u64)>, target| source.is_some_and(|source| overlap(source, target));
        overlap(self.target, other.target) || meets(self.source, other.target) || meets(other.source, self.target)
    }
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
    /// Its hold.
    pub hold: u64,
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
    /// One for each command that is held, or was and has not completed since.
    holds: Vec<Hold>,
    /// What overlaps one of these, or something before it in here.
    behind: VecDeque<Waiting>,
    /// Since when only access states keep it from going on.
    blocked_since: Option<Instant>,
    /// Its channel is called soon.
    pub called: bool,
}

fn overlap(a: (u64, u64), b: (u64, u64)) -> bool {
    a.0 < b.0.saturating_add(b.1) && b.0 < a.0.saturating_add(a.1)
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
            holds: Vec::new(),
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
    pub fn must_queue(&self, io: &Io) -> bool {
        !self.waiting.is_empty() || self.is_behind(io)
    }

    /// Whether `io` writes what overlaps a hold, or something behind one.
    fn is_behind(&self, io: &Io) -> bool {
        if self.holds.is_empty() || !io.op().modifies() {
            return false;
        }
        let extent = Extent::of(io);
        self.holds.iter().any(|hold| extent.conflicts(&hold.extent))
            || self.behind.iter().any(|behind| extent.conflicts(&Extent::of(&behind.io)))
    }

    /// The fate of a command is unknown.
    pub fn hold(&mut self, held: Held, hold: Option<u64>) {
        if hold.is_none() {
            self.holds.push(Hold { id: held.turn, extent: Extent::of(&held.io) });
        }
        self.held.push(Held { hold: hold.unwrap_or(held.turn), ..held });
    }

    /// A command that was held once has completed: what is behind it may go on.
    pub fn end_hold(&mut self, id: u64) {
        self.holds.retain(|hold| hold.id != id);
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
        if waiting.hold.is_some() || !self.is_behind(&waiting.io) {
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
                self.waiting.push_front(Waiting { io: held.io, retries: 0, hold: Some(held.hold) });
            } else {
                self.end_hold(held.hold);
                sink(held.io, IoStatus::Aborted);
            }
        }
    }

    /// There is no path for what waits first: waits on, or ends all of it.
    pub fn no_path(&mut self, paths: &Slab<LocalPath>, now: Instant, sink: &mut dyn FnMut(Io, IoStatus)) {
        if !self.may_recover(paths, now) {
            for waiting in std::mem::take(&mut self.waiting) {
                if let Some(hold) = waiting.hold {
                    self.end_hold(hold);
                }
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
        if let Some(hold) = waiting.hold {
            self.end_hold(hold);
        }
        Some(waiting.io)
    }

    /// Takes all that waits.
    pub fn take_all(&mut self) -> Vec<Io> {
        let all: Vec<Waiting> = self.waiting.drain(..).chain(self.behind.drain(..)).collect();
        all.iter().filter_map(|waiting| waiting.hold).for_each(|hold| self.end_hold(hold));
        all.into_iter().map(|waiting| waiting.io).collect()
    }
}
