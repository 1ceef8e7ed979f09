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
use crate::policy::{Candidate, Choice, Memory, Mode, choose, in_use};
use bdev::core::claims::{Claims, Extent};

/// How long a path is not used for a namespace after it has completed a command with a path-related status, unless its
/// access states change sooner.
const SUSPICION: Duration = Duration::from_secs(1);
/// How often a command is sent again after path-related statuses, unless it is sent again for ever.
const MAX_PATH_RETRIES: u8 = 10;
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
    /// The namespace there is the one that the disk is, by what its controller says now. It may have come back as another
    /// one, of which the control plane hears later than I/O could be sent to it.
    same: bool,
    suspect_until: Option<Instant>,
}

/// How good an access state is: 0 is best; `None` is of no use.
pub(crate) fn rank(state: AnaState) -> Option<u8> {
    match state {
        AnaState::Optimized => Some(0),
        AnaState::NonOptimized => Some(1),
        _ => None,
    }
}

/// A route as RPCs show it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShownRoute {
    /// [`Path::id`](crate::path::Path::id) of its path.
    pub path: u64,
    /// I/O takes it.
    pub current: bool,
    /// This reactor's queue takes commands.
    pub connected: bool,
    /// The access state lets it be used.
    pub accessible: bool,
}

/// How often an I/O was sent again, and why.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tries {
    /// After path-related statuses: it was not executed.
    pub path: u8,
    /// After other failures that trying again may mend.
    pub errors: u32,
}

/// I/O that waits for a path.
pub(crate) struct Waiting {
    pub io: Io,
    pub tries: Tries,
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
    /// It ends when it is fenced, and is not sent again.
    pub ends: bool,
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
    /// What is outstanding and is to end has to have ended by then, or its path is reset.
    pub abort_until: Option<Instant>,
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
            abort_until: None,
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
        Route { path, nsid, preferred, ana: AnaState::Optimized, same: false, suspect_until: None }
    }

    /// The path's access states have changed, or it has.
    pub fn path_changed(&mut self, key: usize, path: &LocalPath) {
        for route in self.routes.iter_mut().filter(|route| route.path == key) {
            let namespace = path.view.namespaces.get(&route.nsid);
            route.same = namespace.is_some_and(|namespace| self.disk.is_same(namespace));
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
            let rank = rank(route.ana).filter(|_| route.same && !suspect && path.takes_commands());
            let (room, load) = path.room(pair);
            Candidate { rank, room, load, preferred: route.preferred }
        })
    }

    /// What RPCs show of the routes.
    pub fn shown(&self, paths: &Slab<LocalPath>) -> Vec<ShownRoute> {
        let candidate = |index: usize| {
            let route = &self.routes[index];
            let rank = rank(route.ana).filter(|_| route.same && paths[route.path].takes_commands());
            Candidate { rank, room: true, load: 0, preferred: route.preferred }
        };
        let used = in_use(self.mode, self.memory, self.routes.len(), candidate);
        let shown = self.routes.iter().zip(used).map(|(route, current)| ShownRoute {
            path: paths[route.path].id(),
            current,
            connected: paths[route.path].takes_commands(),
            accessible: route.same && rank(route.ana).is_some(),
        });
        shown.collect()
    }

    /// Whether a path that cannot be used now may be usable later.
    fn may_recover(&mut self, paths: &Slab<LocalPath>, now: Instant) -> bool {
        let mut transition = None;
        let waits = self.disk.retries != Some(0);
        for route in &self.routes {
            let path = &paths[route.path];
            // What is never sent again waits for nothing but a queue that is being connected.
            let lost = !waits && path.view.association.is_none();
            let gone = lost || path.view.fails_io || path.view.state == PathState::Failed;
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
            return self.abort_until;
        }
        let longest = self.routes.iter().map(|route| match paths[route.path].view.anatt_s {
            0 => DEFAULT_TRANSITION,
            seconds => Duration::from_secs(seconds.into()),
        });
        let transition = self.blocked_since.zip(longest.max()).map(|(since, longest)| since + longest);
        let suspects = self.routes.iter().filter_map(|route| route.suspect_until);
        suspects.chain(transition).chain(self.abort_until).min()
    }

    /// Lets go of what is held and fenced: it is sent again, before anything else. What would do something else the second
    /// time ends, and so does what is to end.
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
            if is_idempotent(&held.io) && !held.ends && self.disk.retries != Some(0) {
                self.waiting.push_front(Waiting { io: held.io, tries: Tries::default(), claim: held.claim });
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
        let tries = waiting.tries;
        let enough = match self.disk.retries {
            None => false,
            Some(0) => true,
            Some(_) => tries.path >= MAX_PATH_RETRIES,
        };
        if enough {
            return Some(waiting);
        }
        let tries = Tries { path: tries.path.saturating_add(1), ..tries };
        self.waiting.push_front(Waiting { tries, ..waiting });
        None
    }

    /// A command has failed in a way that trying again may mend, and its path is well: it is sent again, and returned if that
    /// was often enough, or if it would do something else the second time.
    pub fn try_again(&mut self, waiting: Waiting) -> Option<Waiting> {
        let tries = waiting.tries;
        if !is_idempotent(&waiting.io) || self.disk.retries.is_some_and(|most| tries.errors >= most) {
            return Some(waiting);
        }
        let tries = Tries { errors: tries.errors.saturating_add(1), ..tries };
        self.waiting.push_back(Waiting { tries, ..waiting });
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

    /// Has what is held end when it is fenced, if it is the I/O of `tag`; whether it is held.
    pub fn end_held(&mut self, tag: IoTag) -> bool {
        let held = self.held.iter_mut().find(|held| held.io.tag() == tag);
        held.map(|held| held.ends = true).is_some()
    }

    /// Takes all that waits; what is held ends when it is fenced.
    pub fn take_all(&mut self) -> Vec<Io> {
        self.held.iter_mut().for_each(|held| held.ends = true);
        let all: Vec<Waiting> = self.waiting.drain(..).chain(self.behind.drain(..)).collect();
        all.iter().for_each(|waiting| self.end_claim(waiting.claim));
        all.into_iter().map(|waiting| waiting.io).collect()
    }
}
