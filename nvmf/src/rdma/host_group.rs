//! What the host's queue pairs of one reactor share: the hubs of the devices that they are on.
//!
//! ```text
//! HostGroup -> HubState (one a device; another when its completion queue is promised out) -> Member (one a queue pair)
//!           -> Resolving (one a connection whose device is not known yet)
//! ```
//! So a reactor's payload memory is registered once with a device, however many controllers are behind it, and every command
//! names it by that key. The group's own poller takes completions off the hubs' queues and puts each into its
//! member's inbox, as does whoever polls a queue pair; it has the hubs watched, looks for what happens to connections, arms completions
//! before the reactor sleeps, and drops hubs that nobody uses.
//!
//! A queue pair that is polled by somebody without a reactor has a group of its own.
//!
//! # Keys
//! A controller that was told the key of a reactor's memory can use it as long as one of the host's queue pairs of that hub is
//! connected to it. It is told addresses of single commands, but nothing but its good will keeps it to them: NVMe/RDMA
//! with memory that stays registered trusts the controllers that it connects to.
//!
//! # Bounds
//! - completions outstanding on a hub: each member's commands and receives are taken off the completion queue's entries when
//!   it is admitted; so inboxes, which are that long, never grow;
//! - completions that one poll takes: [`POLL_COMPLETIONS`], about;
//! - memory for messages: what the most queue pairs at once have needed; it is used again;
//! - memory for payloads that are in none of the reactor's: [`SPARE`], beyond which such a payload is registered for its command;
//! - hubs without a queue pair go after [`IDLE_PATIENCE`].

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use reactor::buffer::{CLASS_BYTES, PoolConfig, Region};
use reactor::park::Ready;
use reactor::rdma::{
    ConnectParams, Connecting, Done, EndpointId, Hub, HubConfig, HubEvent, Link, LinkEvent, QueueDepths,
};
use reactor::reactor::WatchId;
use reactor::{Buffer, BufferPool, Buffers, Context, Instant, Poller, PollerId, Progress, Schedule};
use slab::Slab;

use super::capsule::RESPONSE_BYTES;
use super::host_transport::CAPSULE_BYTES;
use crate::host::transport::PayloadMemory;

/// Entries of a completion queue, if the device can have so many.
const HUB_COMPLETIONS: u32 = 32_768;
/// Completions that one poll takes from one device, about.
const POLL_COMPLETIONS: usize = 128;
/// Memory for payloads that the device does not know: lists of ranges, what comes from elsewhere.
const SPARE: PoolConfig = PoolConfig { small: 64, medium: 16, large: 4 };
/// Bytes of the longest piece of it.
const LARGEST: usize = CLASS_BYTES[CLASS_BYTES.len() - 1];
/// How often devices are asked for events that nobody announced.
const EVENTS_PERIOD: Duration = Duration::from_millis(500);
/// So long may a hub be without queue pairs: those that reconnect find its memory registered.
const IDLE_PATIENCE: Duration = Duration::from_secs(10);
/// The group's key of its hubs' sources; those of what is being resolved follow.
const HUB_KEY: u64 = 0;

/// One queue pair on a hub.
struct Member {
    inbox: VecDeque<Done>,
    /// What happened to its connection.
    events: VecDeque<LinkEvent>,
    ended: Option<String>,
    /// Entries of the completion queue that are kept for it.
    promised: u32,
}

/// One hub.
struct HubState {
    hub: Box<dyn Hub>,
    members: Vec<Option<Member>>,
    watch: Option<WatchId>,
    lost: Option<String>,
    entries_left: u32,
    /// The reactor's payload memory, if it is registered.
    known: Option<Region>,
    spare: BufferPool,
    spare_region: Region,
    heads: Vec<Buffer>,
    responses: Vec<Buffer>,
    events_due: bool,
    looks: u8,
    done: Vec<Done>,
    /// Since when it has no member.
    idle_since: Option<Instant>,
}

struct Resolving {
    connecting: Box<dyn Connecting>,
    watch: WatchId,
    announced: bool,
    /// Its queue pair is gone.
    abandoned: bool,
}

/// What the host's queue pairs of one reactor share.
pub(super) struct HostGroup {
    hubs: Slab<HubState>,
    resolving: Slab<Resolving>,
    /// `None`: it is polled by its only queue pair.
    poller: Option<PollerId>,
    events: Vec<HubEvent>,
    now: Instant,
    events_at: Instant,
}

/// The group as its queue pairs hold it.
pub(super) type SharedGroup = Rc<RefCell<HostGroup>>;

struct GroupSlot(SharedGroup);

/// Where a queue pair is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct At {
    hub: usize,
    endpoint: EndpointId,
}

/// How a queue pair is made.
pub(super) struct Admission<'a> {
    /// Commands outstanding at once.
    pub slots: u16,
    /// Pieces of memory of one send.
    pub send_pieces: u32,
    /// What its connection asks for.
    pub params: ConnectParams,
    /// What it says.
    pub private_data: &'a [u8],
}

impl Admission<'_> {
    /// One more than can be outstanding, as a queue has one entry more than commands.
    fn receives(&self) -> u32 {
        u32::from(self.slots) + 1
    }

    fn entries(&self) -> u32 {
        u32::from(self.slots) + self.receives()
    }
}

impl HostGroup {
    fn new(poller: Option<PollerId>, now: Instant) -> SharedGroup {
        let (hubs, resolving, events) = (Slab::new(), Slab::new(), Vec::new());
        Rc::new(RefCell::new(HostGroup { hubs, resolving, poller, events, now, events_at: now }))
    }

    /// The group of a reactor, which begins with its first queue pair; or one of its own.
    pub fn of(cx: Option<&mut Context>) -> SharedGroup {
        let Some(cx) = cx else { return HostGroup::new(None, Instant(0)) };
        if let Some(slot) = cx.get::<GroupSlot>() {
            return Rc::clone(&slot.0);
        }
        let poller = cx.reserve_poller();
        let shared = HostGroup::new(Some(poller), cx.now());
        cx.insert(GroupSlot(Rc::clone(&shared)));
        cx.add_reserved_poller(poller, "nvme_rdma", Schedule::Active, Box::new(GroupPoller(Rc::clone(&shared))));
        shared
    }

    /// Whether the reactor hears of what there is to do, so that queue pairs need not be watched by themselves.
    pub fn is_watched(&self) -> bool {
        self.poller.is_some()
    }

    // ---- resolving -------------------------------------------------------------------------------------------------

    /// Has a connection watched whose device is not known yet.
    pub fn resolve(&mut self, cx: &mut Context, connecting: Box<dyn Connecting>) -> io::Result<usize> {
        let poller = self.poller.expect("a reactor's group has a poller");
        let entry = self.resolving.vacant_entry();
        let index = entry.key();
        let watch = cx.watch(poller, connecting.source(), HUB_KEY + 1 + index as u64)?;
        // What came before is not announced.
        entry.insert(Resolving { connecting, watch, announced: true, abandoned: false });
        Ok(index)
    }

    /// Whether something was announced for it.
    pub fn has_way(&self, index: usize) -> bool {
        self.resolving[index].announced
    }

    /// The connection, once its device is known.
    pub fn way(&mut self, index: usize) -> io::Result<Option<Box<dyn Link>>> {
        let resolving = &mut self.resolving[index];
        if !std::mem::take(&mut resolving.announced) {
            return Ok(None);
        }
        resolving.connecting.poll()
    }

    /// It is of no use any more.
    pub fn abandon(&mut self, index: usize) {
        self.resolving[index].abandoned = true;
    }

    // ---- members ---------------------------------------------------------------------------------------------------

    /// Makes the queue pair of a connection, with receives posted, and asks to connect; memory for its capsules comes too.
    pub fn admit(
        &mut self,
        mut cx: Option<&mut Context>,
        link: Box<dyn Link>,
        admission: &Admission<'_>,
    ) -> io::Result<(At, Vec<Buffer>)> {
        let index = self.hub_for(cx.as_deref_mut(), &*link, admission)?;
        let hub = &mut self.hubs[index];
        if hub.known.is_none() {
            hub.register(cx)?;
        }
        let (endpoint, heads) = hub.attach(link, admission)?;
        Ok((At { hub: index, endpoint }, heads))
    }

    /// A hub on the link's device that has enough left, or a new one.
    fn hub_for(&mut self, cx: Option<&mut Context>, link: &dyn Link, admission: &Admission<'_>) -> io::Result<usize> {
        let wanted = admission.entries();
        let fits = |hub: &HubState| hub.lost.is_none() && hub.hub.is_on(link) && hub.entries_left >= wanted;
        if let Some((index, _)) = self.hubs.iter().find(|(_, hub)| fits(hub)) {
            return Ok(index);
        }
        // A hub for one queue pair need not have room for others.
        let alone = if self.is_watched() { HUB_COMPLETIONS } else { wanted };
        let completions = alone.max(wanted).min(link.limits().cqe.max(wanted));
        let mut hub = link.hub(HubConfig { completions, shared_receives: 0, announce: true })?;
        let spare = BufferPool::new(SPARE)?;
        hub.register(&spare, true)?;
        let watch = match (cx, self.poller) {
            (Some(cx), Some(poller)) => Some(cx.watch(poller, hub.source(), HUB_KEY)?),
            _ => None,
        };
        Ok(self.hubs.insert(HubState {
            hub,
            members: Vec::new(),
            watch,
            lost: None,
            entries_left: completions,
            known: None,
            spare_region: spare.region(),
            spare,
            heads: Vec::new(),
            responses: Vec::new(),
            events_due: true,
            looks: 0,
            done: Vec::with_capacity(2 * POLL_COMPLETIONS),
            idle_since: Some(self.now),
        }))
    }

    /// Looks at the device's work, and at what happened to connections if that was announced, or `eager`. Both lists are
    /// empty, and filled.
    ///
    /// # Errors
    /// The queue pair has ended. What is in the lists counts all the same.
    pub fn poll(
        &mut self,
        at: At,
        eager: bool,
        inbox: &mut VecDeque<Done>,
        events: &mut VecDeque<LinkEvent>,
    ) -> Result<(), String> {
        let watched = self.is_watched();
        let hub = &mut self.hubs[at.hub];
        // Events cost calls of the kernel: where nobody announces them they are looked for seldom.
        hub.looks = hub.looks.wrapping_add(1);
        if hub.lost.is_none() && (hub.events_due || !watched && (eager || hub.looks == 0)) {
            hub.take_events(&mut self.events);
        }
        hub.take_work();
        let lost = hub.lost.clone();
        let member = hub.member(at.endpoint);
        // Both have been emptied: what is in there stays allocated.
        std::mem::swap(&mut member.inbox, inbox);
        std::mem::swap(&mut member.events, events);
        match lost.or_else(|| member.ended.clone()) {
            Some(why) => Err(why),
            None => Ok(()),
        }
    }

    /// Whether something came for a queue pair.
    #[inline]
    pub fn has_input(&self, at: At) -> bool {
        let hub = &self.hubs[at.hub];
        let member = hub.members[at.endpoint.0].as_ref().expect("a queue pair is a member until it is closed");
        hub.lost.is_some() || !member.inbox.is_empty() || !member.events.is_empty() || member.ended.is_some()
    }

    /// The hub and the name of a queue pair there.
    #[inline]
    pub fn hub(&mut self, at: At) -> (&mut dyn Hub, EndpointId) {
        (&mut *self.hubs[at.hub].hub, at.endpoint)
    }

    /// Whether these buffers may be part of a message.
    #[inline]
    pub fn knows(&self, at: At, data: &mut Buffers) -> bool {
        let hub = &self.hubs[at.hub];
        let knows = |buffer: &mut Buffer| {
            hub.known.as_ref().is_some_and(|pool| buffer.in_region(pool)) || buffer.in_region(&hub.spare_region)
        };
        data.buffers_mut().iter_mut().all(knows)
    }

    /// Memory that the device knows, in one piece, if there is some.
    pub fn spare(&mut self, at: At, bytes: usize) -> Option<Buffers> {
        let spare = &mut self.hubs[at.hub].spare;
        if bytes > LARGEST {
            return None;
        }
        let list = spare.alloc(bytes)?;
        if list.segment_count() > 1 {
            spare.put(list);
            return None;
        }
        Some(list)
    }

    /// Gives it back.
    pub fn put_spare(&mut self, at: At, data: Buffers) {
        self.hubs[at.hub].spare.put(data);
    }

    /// A receive's memory is to be used again.
    pub fn post_receive(&mut self, at: At, buffer: Buffer) -> Result<(), String> {
        let hub = &mut self.hubs[at.hub];
        hub.hub.post_receive(Some(at.endpoint), buffer).map_err(|(buffer, error)| {
            hub.responses.push(buffer);
            format!("a receive cannot be posted: {error}")
        })
    }

    /// A receive's memory is kept for later.
    pub fn keep_receive(&mut self, at: At, buffer: Buffer) {
        self.hubs[at.hub].responses.push(buffer);
    }

    /// Ends a queue pair: gives back the data of what was posted, with the number that it was posted with. Memory for
    /// capsules comes back in `heads`; the peer can reach nothing of this queue pair's any more.
    pub fn close(&mut self, at: At, heads: Vec<Buffer>, back: &mut dyn FnMut(u64, Buffers)) {
        let hub = &mut self.hubs[at.hub];
        hub.heads.extend(heads);
        hub.hub.disconnect(at.endpoint);
        hub.detach(at.endpoint, back);
        if hub.members.iter().all(Option::is_none) {
            hub.idle_since = Some(self.now);
        }
    }

    // ---- the group's poller ----------------------------------------------------------------------------------------

    fn poll_all(&mut self, cx: &mut Context) -> bool {
        self.now = cx.now();
        let look = self.now >= self.events_at;
        if look {
            self.events_at = self.now + EVENTS_PERIOD;
        }
        let mut busy = false;
        for (_, hub) in &mut self.hubs {
            if hub.lost.is_none() && (hub.events_due || look) {
                busy |= hub.take_events(&mut self.events);
            }
            // Queue pairs are asked for nothing as long as their inboxes are empty.
            busy |= hub.take_work();
        }
        while let Some(index) = self.resolving.iter().find_map(|(n, resolving)| resolving.abandoned.then_some(n)) {
            let gone = self.resolving.remove(index);
            cx.unwatch(gone.watch);
            busy = true;
        }
        let now = self.now;
        while let Some(index) = self.hubs.iter().find_map(|(n, hub)| hub.is_unused(now).then_some(n)) {
            if let Some(watch) = self.hubs[index].watch.take() {
                cx.unwatch(watch);
            }
            self.hubs.remove(index);
            busy = true;
        }
        busy
    }

    fn may_sleep(&mut self) -> bool {
        let mut may = self.resolving.iter().all(|(_, resolving)| !resolving.announced && !resolving.abandoned);
        for (_, hub) in self.hubs.iter_mut().filter(|(_, hub)| hub.lost.is_none()) {
            let armed = hub.hub.arm().is_ok();
            // What came before that is not announced.
            may &= armed && !hub.take_work() && !hub.events_due;
        }
        may
    }

    fn deadline(&self) -> Option<Instant> {
        let used = self.hubs.iter().any(|(_, hub)| hub.idle_since.is_none());
        let idle = self.hubs.iter().filter_map(|(_, hub)| hub.idle_since.map(|since| since + IDLE_PATIENCE));
        idle.chain(used.then_some(self.events_at)).min()
    }
}

impl HubState {
    fn member(&mut self, endpoint: EndpointId) -> &mut Member {
        self.members[endpoint.0].as_mut().expect("a queue pair is a member until it is closed")
    }

    fn is_unused(&self, now: Instant) -> bool {
        self.idle_since.is_some_and(|since| self.lost.is_some() || now >= since + IDLE_PATIENCE)
    }

    /// Registers the reactor's payload memory, if it has some.
    fn register(&mut self, cx: Option<&mut Context>) -> io::Result<()> {
        let Some(memory) = cx.and_then(|cx| cx.get::<PayloadMemory>()) else { return Ok(()) };
        let mut result = Ok(());
        memory.with(&mut |pool| {
            result = self.hub.register(pool, true);
            self.known = result.is_ok().then(|| pool.region());
        });
        result
    }

    fn attach(&mut self, link: Box<dyn Link>, admission: &Admission<'_>) -> io::Result<(EndpointId, Vec<Buffer>)> {
        let (slots, receives) = (usize::from(admission.slots), admission.receives() as usize);
        let missing = slots.saturating_sub(self.heads.len());
        if missing > 0 {
            self.heads.extend(self.hub.messages(missing, CAPSULE_BYTES)?);
        }
        let missing = receives.saturating_sub(self.responses.len());
        if missing > 0 {
            self.responses.extend(self.hub.messages(missing, RESPONSE_BYTES)?);
        }
        let depths = QueueDepths { send: slots as u32, receive: receives as u32, send_pieces: admission.send_pieces };
        let endpoint = self.hub.attach(link, depths)?;
        if self.members.len() <= endpoint.0 {
            self.members.resize_with(endpoint.0 + 1, || None);
        }
        let promised = admission.entries();
        self.entries_left -= promised;
        self.idle_since = None;
        self.members[endpoint.0] = Some(Member {
            inbox: VecDeque::with_capacity(promised as usize),
            events: VecDeque::with_capacity(4),
            ended: None,
            promised,
        });
        match self.begin(endpoint, receives, admission) {
            Ok(()) => Ok((endpoint, self.heads.split_off(self.heads.len() - slots))),
            Err(error) => {
                self.detach(endpoint, &mut |_, _| {});
                self.idle_since = self.members.iter().all(Option::is_none).then_some(Instant(0));
                Err(error)
            }
        }
    }

    fn begin(&mut self, endpoint: EndpointId, receives: usize, admission: &Admission<'_>) -> io::Result<()> {
        for _ in 0..receives {
            let buffer = self.responses.pop().expect("there are as many");
            if let Err((buffer, error)) = self.hub.post_receive(Some(endpoint), buffer) {
                self.responses.push(buffer);
                return Err(error);
            }
        }
        self.hub.connect(endpoint, admission.params, admission.private_data)
    }

    fn detach(&mut self, endpoint: EndpointId, back: &mut dyn FnMut(u64, Buffers)) {
        let mut member = self.members[endpoint.0].take().expect("a queue pair is closed once");
        self.entries_left += member.promised;
        let (heads, responses) = (&mut self.heads, &mut self.responses);
        let mut put_away = |done| match done {
            Done::Posted { user, data, head, .. } => {
                heads.extend(head.map(super::host_transport::widened));
                if !data.is_empty() {
                    back(user, data);
                }
            }
            Done::Received { buffer, .. } => responses.push(buffer),
        };
        member.inbox.drain(..).for_each(&mut put_away);
        self.hub.detach(endpoint, &mut put_away);
    }

    fn lose(&mut self, why: String) {
        tracing::warn!(device = self.hub.device().name, why, "an RDMA device is lost");
        self.lost.get_or_insert(why);
    }

    fn take_events(&mut self, events: &mut Vec<HubEvent>) -> bool {
        self.events_due = false;
        if let Err(error) = self.hub.events(events) {
            self.lose(format!("the RDMA device fails: {error}"));
        }
        let busy = !events.is_empty();
        for event in events.drain(..) {
            match event {
                HubEvent::Link(endpoint, event) => {
                    if let Some(member) = self.members.get_mut(endpoint.0).and_then(Option::as_mut) {
                        member.events.push_back(event);
                    }
                }
                HubEvent::Failed(endpoint, why) => {
                    if let Some(member) = self.members.get_mut(endpoint.0).and_then(Option::as_mut) {
                        member.ended.get_or_insert(format!("the queue pair failed: {why}"));
                    }
                }
                HubEvent::DeviceLost(why) => self.lose(why),
                HubEvent::Port { port, active } => {
                    let device = &self.hub.device().name;
                    match active {
                        true => tracing::info!(device, port, "a port of an RDMA device is up"),
                        false => tracing::warn!(device, port, "a port of an RDMA device is down"),
                    }
                }
            }
        }
        busy
    }

    /// Takes completions and sorts them in; whether there were any.
    fn take_work(&mut self) -> bool {
        if self.lost.is_some() {
            return false;
        }
        let mut done = std::mem::take(&mut self.done);
        let mut found = 0;
        while found < POLL_COMPLETIONS {
            match self.hub.poll(&mut done) {
                Ok(0) => break,
                Ok(count) => found += count,
                Err(error) => {
                    self.lose(format!("the RDMA device fails: {error}"));
                    break;
                }
            }
        }
        for done in done.drain(..) {
            let endpoint = match &done {
                Done::Received { endpoint, .. } => *endpoint,
                Done::Posted { endpoint, .. } => Some(*endpoint),
            };
            // Work comes back while its queue pair is there, or with its end.
            let member = endpoint.and_then(|at| self.members.get_mut(at.0)).and_then(Option::as_mut);
            if let Some(member) = member {
                member.inbox.push_back(done);
            }
        }
        self.done = done;
        found > 0
    }
}

struct GroupPoller(SharedGroup);

impl Poller for GroupPoller {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        Progress::from_busy(self.0.borrow_mut().poll_all(cx))
    }

    fn ready(&mut self, key: u64, _: Ready) {
        let mut group = self.0.borrow_mut();
        match key.checked_sub(HUB_KEY + 1) {
            Some(index) => {
                if let Some(resolving) = group.resolving.get_mut(index as usize) {
                    resolving.announced = true;
                }
            }
            // Which of its hubs, the key does not say.
            None => group.hubs.iter_mut().for_each(|(_, hub)| hub.events_due = true),
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.0.borrow().deadline()
    }

    fn may_sleep(&mut self, _: &mut Context) -> bool {
        self.0.borrow_mut().may_sleep()
    }
}
