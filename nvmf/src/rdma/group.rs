//! What the queue pairs of one reactor share: the hubs of the devices that they are on.
//!
//! ```text
//! Group -> HubState (one a device; another when its completion queue is promised out) -> Member (one a queue pair)
//! ```
//! A poll takes completions and puts each into its member's inbox; the queue pair fetches it from there. A member stays after
//! its queue pair was closed, until the work that the device had has come back, or for [`DRAIN_PATIENCE`]; then its endpoint is
//! detached. So closing waits for nothing and no memory is freed under a device.
//!
//! # Bounds
//! - completions outstanding on a hub: each member's send queue and receives, and the shared receives, are taken off the
//!   completion queue's entries when it is admitted;
//! - receives: as many as all members' queues have entries, at most `max_srq_depth` on a hub with a shared queue;
//! - completions of one poll: [`POLL_COMPLETIONS`];
//! - hubs: those that [`MAX_QPAIRS`](crate::target::poll_group::MAX_QPAIRS) queue pairs can fill; those without a queue pair go,
//!   but for one a device.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use reactor::park::Ready;
use reactor::rdma::{
    self, ConnectParams, Done, EndpointId, Hub, HubConfig, HubEvent, Link, LinkEvent, QueueDepths, WorkStatus,
};
use reactor::reactor::WatchId;
use reactor::{Buffer, BufferPool, Context, Instant, PollerId};
use slab::Slab;

use super::capsule::RESPONSE_BYTES;
use crate::target::transport::{DeviceStats, Group, GroupStats, Place};

/// Time for the work of a closed queue pair to come back.
pub const DRAIN_PATIENCE: Duration = Duration::from_secs(5);
/// How often devices are asked for events that nobody announced.
const EVENTS_PERIOD: Duration = Duration::from_millis(500);
/// Completions that one poll takes from one device, about.
const POLL_COMPLETIONS: usize = 128;
/// Bytes of messages that are registered at once.
const CHUNK_BYTES: usize = 64 << 20;
/// Entries of a completion queue, if the device can have so many.
const HUB_COMPLETIONS: u32 = 32_768;

/// How the hubs of a transport are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HubOptions {
    /// Entries of a completion queue, at least.
    pub completions: u32,
    /// Receives of a shared queue; 0 for none.
    pub shared_receives: u32,
    /// Bytes of a receive.
    pub receive_bytes: u32,
}

/// What a queue pair asks of a hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Work requests of its send queue.
    pub send_depth: u32,
    /// Segments of one.
    pub send_pieces: u32,
    /// Capsules that the host may have on the way.
    pub receives: u32,
    /// Response capsules that may be on the way.
    pub heads: u32,
    /// What is agreed with the host.
    pub params: ConnectParams,
}

/// One queue pair on a hub.
pub struct Member {
    /// The poll group's key of it, once it has one.
    key: Option<u64>,
    /// It is known to the poll group to have input.
    woken: bool,
    inbox: VecDeque<Done>,
    ended: Option<String>,
    /// The queue pair was closed: until when its work may come back.
    closing: Option<Instant>,
    /// Entries of the completion queue, and receives, that are kept for it.
    promised: u32,
    receives: u32,
    /// Chains that have not come back.
    chains_out: u32,
    /// Receives of its own that have not.
    receives_out: u32,
    /// What it waits for, for the counters; kept by the queue pair.
    pub pending: super::queue::Pending,
}

/// One hub.
pub struct HubState {
    hub: Box<dyn Hub>,
    members: Vec<Option<Member>>,
    /// Members that were closed and are not detached.
    closing: usize,
    watch: Option<WatchId>,
    lost: Option<String>,
    options: HubOptions,
    /// Entries of the completion queue that nobody was promised.
    entries_left: u32,
    /// Receives that were made for the shared queue.
    shared_made: u32,
    /// Receives that members want.
    receives_wanted: u32,
    spare_receives: Vec<Buffer>,
    spare_heads: Vec<Buffer>,
    /// Of both, how many there are in all, with those that are in use.
    receives_made: usize,
    heads_made: usize,
    events_due: bool,
    /// Taken off the completion queue and not yet sorted in.
    done: Vec<Done>,
    counters: DeviceStats,
}

/// All hubs of one reactor.
pub struct RdmaGroup {
    hubs: Slab<HubState>,
    poller: PollerId,
    key: u64,
    now: Instant,
    events_at: Instant,
    events: Vec<HubEvent>,
}

/// The group as its queue pairs hold it.
pub type SharedGroup = Rc<RefCell<RdmaGroup>>;

struct GroupSlot(SharedGroup);
struct GroupHandle(SharedGroup);

/// Where a queue pair is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    hub: usize,
    endpoint: EndpointId,
}

/// What a new member gets.
pub struct Admitted {
    /// Where it is.
    pub at: At,
    /// Memory for response capsules.
    pub heads: Vec<Buffer>,
}

impl RdmaGroup {
    /// The group of a reactor, which begins with its first queue pair.
    pub fn of(place: &mut Place<'_>) -> SharedGroup {
        if let Some(slot) = place.cx.get::<GroupSlot>() {
            return Rc::clone(&slot.0);
        }
        let group = RdmaGroup {
            hubs: Slab::new(),
            poller: place.poller,
            key: place.next_group_key(),
            now: place.cx.now(),
            events_at: place.cx.now() + EVENTS_PERIOD,
            events: Vec::new(),
        };
        let shared: SharedGroup = Rc::new(RefCell::new(group));
        place.cx.insert(GroupSlot(Rc::clone(&shared)));
        place.groups.push(Box::new(GroupHandle(Rc::clone(&shared))));
        shared
    }

    /// Makes the queue pair of a connection, with receives posted, and accepts it.
    ///
    /// # Errors
    /// When the device cannot give what it needs. The link is given back if nothing was tried with it.
    pub fn admit(
        &mut self,
        cx: &mut Context,
        pool: &BufferPool,
        link: Box<dyn Link>,
        options: HubOptions,
        admission: Admission,
        private_data: &[u8],
    ) -> Result<Admitted, (Option<Box<dyn Link>>, io::Error)> {
        let index = match self.hub_for(cx, pool, &*link, options, admission) {
            Ok(index) => index,
            Err(error) => return Err((Some(link), error)),
        };
        let hub = &mut self.hubs[index];
        let heads = match hub.make_receives(admission.receives).and_then(|()| hub.heads(admission.heads as usize)) {
            Ok(heads) => heads,
            Err(error) => return Err((Some(link), error)),
        };
        match hub.attach(link, admission, private_data) {
            Ok(endpoint) => Ok(Admitted { at: At { hub: index, endpoint }, heads }),
            Err(error) => {
                hub.spare_heads.extend(heads);
                Err((None, error))
            }
        }
    }

    /// A hub on the link's device that has enough left, or a new one.
    fn hub_for(
        &mut self,
        cx: &mut Context,
        pool: &BufferPool,
        link: &dyn Link,
        options: HubOptions,
        admission: Admission,
    ) -> io::Result<usize> {
        let fits = |hub: &HubState| {
            hub.lost.is_none()
                && hub.options == options
                && hub.hub.is_on(link)
                && hub.entries_left >= hub.entries_for(admission)
        };
        if let Some((index, _)) = self.hubs.iter().find(|(_, hub)| fits(hub)) {
            return Ok(index);
        }
        let limits = link.limits();
        let shared_receives = options.shared_receives.min(limits.srq_wr);
        let completions = options.completions.max(HUB_COMPLETIONS).min(limits.cqe);
        let Some(left) = completions.checked_sub(shared_receives) else {
            let text =
                format!("the device has only {completions} completion queue entries: give a smaller max_srq_depth");
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, text));
        };
        // Before anything is made for it, which a host could ask for over and over.
        if left < entries_for(admission, shared_receives > 0) {
            let text = "the device's completion queues are too small for such a queue: give a smaller max_queue_depth";
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, text));
        }
        let config = |shared_receives| HubConfig { completions, shared_receives, announce: true };
        let mut hub = match link.hub(config(shared_receives)) {
            Err(error) if shared_receives > 0 => {
                tracing::warn!(device = link.device().name, %error, "no shared receive queue: each queue pair has its own");
                link.hub(config(0))?
            }
            made => made?,
        };
        hub.register(pool, false)?;
        let entries_left = if hub.has_shared_receives() { left } else { completions };
        let counters = DeviceStats { name: hub.device().name.clone(), ..DeviceStats::default() };
        let watch = Some(cx.watch(self.poller, hub.source(), self.key)?);
        let state = HubState {
            hub,
            members: Vec::new(),
            closing: 0,
            watch,
            lost: None,
            options,
            entries_left,
            shared_made: 0,
            receives_wanted: 0,
            spare_receives: Vec::new(),
            spare_heads: Vec::new(),
            receives_made: 0,
            heads_made: 0,
            events_due: true,
            done: Vec::new(),
            counters,
        };
        if state.entries_left < state.entries_for(admission) {
            if let Some(watch) = state.watch {
                cx.unwatch(watch);
            }
            let text = "the device's completion queues are too small for such a queue without shared receives";
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, text));
        }
        Ok(self.hubs.insert(state))
    }

    /// The hub and the member at a place.
    ///
    /// # Panics
    /// If it was closed.
    fn member(&mut self, at: At) -> (&mut HubState, Instant) {
        (&mut self.hubs[at.hub], self.now)
    }

    /// Time, as of this step.
    pub fn now(&self) -> Instant {
        self.now
    }

    /// The poll group knows the queue pair by this key.
    pub fn set_key(&mut self, at: At, key: u64) {
        self.member(at).0.at(at.endpoint).key = Some(key);
    }

    /// Swaps a queue pair's inbox with an empty list; why it has ended, if it has.
    pub fn take_inbox(&mut self, at: At, inbox: &mut VecDeque<Done>) -> Option<String> {
        let hub = self.member(at).0;
        let lost = hub.lost.clone();
        let member = hub.at(at.endpoint);
        member.woken = false;
        std::mem::swap(&mut member.inbox, inbox);
        member.ended.clone().or(lost)
    }

    /// Whether something came for a queue pair.
    #[inline]
    pub fn has_input(&self, at: At) -> bool {
        let hub = &self.hubs[at.hub];
        let member = hub.members[at.endpoint.0].as_ref().expect("a queue pair is a member until it is closed");
        !member.inbox.is_empty() || member.ended.is_some() || hub.lost.is_some()
    }

    /// Posts a chain; it comes back in the inbox.
    ///
    /// # Errors
    /// As [`Hub::post`].
    pub fn post(&mut self, at: At, post: rdma::Post) -> Result<(), Box<rdma::Refused>> {
        let hub = self.member(at).0;
        let requests = post.requests();
        hub.hub.post(at.endpoint, post)?;
        hub.counters.total_send_wrs += u64::from(requests);
        hub.at(at.endpoint).chains_out += 1;
        Ok(())
    }

    /// Lets the device begin with what was posted.
    pub fn flush(&mut self, at: At) {
        self.member(at).0.hub.flush();
    }

    /// A queue pair needs a receive's memory no longer.
    pub fn give_receive(&mut self, at: At, buffer: Buffer) {
        self.member(at).0.post_receive(Some(at.endpoint), buffer);
    }

    /// Counts a command whose response has arrived.
    pub fn count_request(&mut self, at: At, arrived: Instant) {
        let (hub, now) = self.member(at);
        hub.counters.requests += 1;
        hub.counters.request_latency_ns += now.nanos_since(arrived);
    }

    /// What a queue pair waits for.
    pub fn set_pending(&mut self, at: At, pending: super::queue::Pending) {
        self.member(at).0.at(at.endpoint).pending = pending;
    }

    /// Closes a queue pair: it is no concern of its owner any more.
    pub fn close(&mut self, at: At, heads: Vec<Buffer>) {
        let (hub, now) = self.member(at);
        hub.spare_heads.extend(heads);
        let member = hub.at(at.endpoint);
        member.closing = Some(now + DRAIN_PATIENCE);
        member.pending = super::queue::Pending::default();
        for done in std::mem::take(&mut member.inbox) {
            hub.put_away(done);
        }
        hub.closing += 1;
        hub.hub.disconnect(at.endpoint);
    }

    fn poll(&mut self, cx: &mut Context, pool: &mut BufferPool, woken: &mut Vec<u64>) -> bool {
        self.now = cx.now();
        let look = self.now >= self.events_at;
        if look {
            self.events_at = self.now + EVENTS_PERIOD;
        }
        let mut busy = false;
        for (_, hub) in &mut self.hubs {
            if hub.lost.is_none() && (std::mem::take(&mut hub.events_due) || look) {
                busy |= hub.take_events(&mut self.events, woken);
            }
            if hub.lost.is_none() {
                busy |= hub.take_completions(pool, woken);
            }
            hub.finish_closing(self.now, pool);
        }
        self.drop_unused(cx);
        busy
    }

    /// Hubs that are lost, or more than are needed, and have no member.
    fn drop_unused(&mut self, cx: &mut Context) {
        let empty = |hub: &HubState| hub.members.iter().all(Option::is_none);
        let several = self.hubs.len() > 1;
        let unused = |hub: &HubState, others: bool| empty(hub) && (hub.lost.is_some() || others);
        while let Some(index) = self.hubs.iter().find_map(|(index, hub)| {
            let same = |other: &HubState| other.hub.device().name == hub.hub.device().name;
            let others =
                several && self.hubs.iter().any(|(n, other)| n != index && other.lost.is_none() && same(other));
            unused(hub, others).then_some(index)
        }) {
            if let Some(watch) = self.hubs[index].watch.take() {
                cx.unwatch(watch);
            }
            self.hubs.remove(index);
        }
    }
}

fn entries_for(admission: Admission, shared: bool) -> u32 {
    admission.send_depth + if shared { 0 } else { admission.receives }
}

impl HubState {
    fn at(&mut self, endpoint: EndpointId) -> &mut Member {
        self.members[endpoint.0].as_mut().expect("a queue pair is a member until it is closed")
    }

    /// Completion queue entries that a queue pair may need at once.
    fn entries_for(&self, admission: Admission) -> u32 {
        entries_for(admission, self.hub.has_shared_receives())
    }

    /// Memory for messages, in pieces that a device can register.
    fn messages(
        &mut self,
        mut count: usize,
        bytes: usize,
        out: fn(&mut HubState) -> &mut Vec<Buffer>,
    ) -> io::Result<()> {
        let most = (CHUNK_BYTES / bytes.max(1)).max(1);
        while count > 0 {
            let made = self.hub.messages(count.min(most), bytes)?;
            count -= made.len();
            out(self).extend(made);
        }
        Ok(())
    }

    fn heads(&mut self, count: usize) -> io::Result<Vec<Buffer>> {
        let spare = self.spare_heads.len();
        if spare < count {
            self.messages(count - spare, RESPONSE_BYTES, |hub| &mut hub.spare_heads)?;
            self.heads_made += count - spare;
        }
        Ok(self.spare_heads.split_off(self.spare_heads.len() - count))
    }

    /// Sees to it that there is memory for the receives of one more queue pair.
    fn make_receives(&mut self, receives: u32) -> io::Result<()> {
        let bytes = self.options.receive_bytes as usize;
        if self.hub.has_shared_receives() {
            let most = self.options.shared_receives.min(self.hub.limits().srq_wr);
            let wanted = (self.receives_wanted + receives).min(most);
            let missing = wanted.saturating_sub(self.shared_made);
            if missing > 0 {
                self.messages(missing as usize, bytes, |hub| &mut hub.spare_receives)?;
                self.shared_made += missing;
                for buffer in std::mem::take(&mut self.spare_receives) {
                    self.post_receive(None, buffer);
                }
            }
        } else if self.spare_receives.len() < receives as usize {
            let missing = receives as usize - self.spare_receives.len();
            self.messages(missing, bytes, |hub| &mut hub.spare_receives)?;
            self.receives_made += missing;
        }
        Ok(())
    }

    fn attach(&mut self, link: Box<dyn Link>, admission: Admission, private_data: &[u8]) -> io::Result<EndpointId> {
        let shared = self.hub.has_shared_receives();
        let own_receives = if shared { 0 } else { admission.receives };
        let depths =
            QueueDepths { send: admission.send_depth, receive: own_receives, send_pieces: admission.send_pieces };
        let endpoint = self.hub.attach(link, depths)?;
        if self.members.len() <= endpoint.0 {
            self.members.resize_with(endpoint.0 + 1, || None);
        }
        let promised = self.entries_for(admission);
        self.entries_left -= promised;
        self.receives_wanted += admission.receives;
        self.members[endpoint.0] = Some(Member {
            key: None,
            woken: false,
            inbox: VecDeque::new(),
            ended: None,
            closing: None,
            promised,
            receives: admission.receives,
            chains_out: 0,
            receives_out: 0,
            pending: super::queue::Pending::default(),
        });
        for _ in 0..own_receives {
            let buffer = self.spare_receives.pop().expect("memory for receives was made");
            self.post_receive(Some(endpoint), buffer);
        }
        if let Err(error) = self.hub.accept(endpoint, admission.params, private_data) {
            self.detach(endpoint, None);
            return Err(error);
        }
        Ok(endpoint)
    }

    /// Posts a receive, to the shared queue if there is one. What cannot be posted is kept; its queue pair has failed then.
    fn post_receive(&mut self, endpoint: Option<EndpointId>, buffer: Buffer) {
        let to = endpoint.filter(|_| !self.hub.has_shared_receives());
        let over = |member: &Member| member.closing.is_some() || member.ended.is_some();
        let gone = to.is_some_and(|to| self.members[to.0].as_ref().is_none_or(over));
        if gone || self.lost.is_some() || to.is_none() && !self.hub.has_shared_receives() {
            return self.spare_receives.push(buffer);
        }
        match self.hub.post_receive(to, buffer) {
            Ok(()) => {
                self.counters.total_recv_wrs += 1;
                if let Some(to) = to {
                    self.at(to).receives_out += 1;
                }
            }
            Err((buffer, error)) => {
                self.spare_receives.push(buffer);
                let why = format!("a receive cannot be posted: {error}");
                match to {
                    Some(to) => self.at(to).ended = Some(why),
                    None => self.lost = Some(why),
                }
            }
        }
    }

    fn wake(member: &mut Member, woken: &mut Vec<u64>) {
        if !member.woken
            && member.closing.is_none()
            && let Some(key) = member.key
        {
            member.woken = true;
            woken.push(key);
        }
    }

    fn lose(&mut self, why: String, woken: &mut Vec<u64>) {
        tracing::warn!(device = self.counters.name, why, "an RDMA device is lost");
        self.lost.get_or_insert(why);
        self.members.iter_mut().flatten().for_each(|member| HubState::wake(member, woken));
    }

    fn take_events(&mut self, events: &mut Vec<HubEvent>, woken: &mut Vec<u64>) -> bool {
        if let Err(error) = self.hub.events(events) {
            self.lose(error.to_string(), woken);
        }
        let busy = !events.is_empty();
        for event in events.drain(..) {
            let (endpoint, why) = match event {
                HubEvent::Link(_, LinkEvent::Established { .. }) => continue,
                HubEvent::Link(endpoint, LinkEvent::Disconnected) => (endpoint, "the host disconnected".to_owned()),
                HubEvent::Link(endpoint, LinkEvent::Rejected { .. }) => (endpoint, "the host gave up".to_owned()),
                HubEvent::Link(endpoint, LinkEvent::Failed { what }) => (endpoint, what.to_owned()),
                HubEvent::Link(endpoint, LinkEvent::DeviceRemoved) => {
                    self.lose("the device was removed".to_owned(), woken);
                    (endpoint, "the device was removed".to_owned())
                }
                HubEvent::Failed(endpoint, why) => (endpoint, why),
                HubEvent::DeviceLost(why) => {
                    self.lose(why, woken);
                    continue;
                }
                HubEvent::Port { port, active } => {
                    let device = &self.counters.name;
                    match active {
                        true => tracing::info!(device, port, "a port of an RDMA device is up"),
                        false => tracing::warn!(device, port, "a port of an RDMA device is down"),
                    }
                    continue;
                }
            };
            if let Some(member) = self.members.get_mut(endpoint.0).and_then(Option::as_mut) {
                member.ended.get_or_insert(why);
                HubState::wake(member, woken);
            }
        }
        busy
    }

    fn take_completions(&mut self, pool: &mut BufferPool, woken: &mut Vec<u64>) -> bool {
        let mut done = std::mem::take(&mut self.done);
        let mut found = done.len();
        while found < POLL_COMPLETIONS {
            self.counters.polls += 1;
            match self.hub.poll(&mut done) {
                Ok(0) => {
                    self.counters.idle_polls += u64::from(found == 0);
                    break;
                }
                Ok(count) => found += count,
                Err(error) => {
                    self.lose(error.to_string(), woken);
                    break;
                }
            }
        }
        self.counters.completions += found as u64;
        for done in done.drain(..) {
            self.sort_in(done, pool, woken);
        }
        self.done = done;
        found > 0
    }

    fn sort_in(&mut self, done: Done, pool: &mut BufferPool, woken: &mut Vec<u64>) {
        let endpoint = match &done {
            Done::Received { endpoint, .. } => *endpoint,
            Done::Posted { endpoint, .. } => Some(*endpoint),
        };
        let shared = self.hub.has_shared_receives();
        let member = endpoint.and_then(|endpoint| self.members.get_mut(endpoint.0)).and_then(Option::as_mut);
        let Some(member) = member else { return self.put_away_with(done, pool) };
        match done {
            Done::Posted { .. } => member.chains_out -= 1,
            Done::Received { .. } if !shared => member.receives_out -= 1,
            Done::Received { .. } => {}
        }
        if member.closing.is_some() {
            return self.put_away_with(done, pool);
        }
        match done {
            Done::Received { buffer, status, .. } if status != WorkStatus::Success => {
                // A flushed receive is the end of its queue pair, however it came about.
                member.ended.get_or_insert_with(|| match status {
                    WorkStatus::Flushed => "the connection has ended".to_owned(),
                    other => format!("receiving failed: {other}"),
                });
                HubState::wake(member, woken);
                self.post_receive(endpoint, buffer);
            }
            done => {
                member.inbox.push_back(done);
                HubState::wake(member, woken);
            }
        }
    }

    /// Nobody waits for this any more.
    fn put_away_with(&mut self, done: Done, pool: &mut BufferPool) {
        match done {
            Done::Posted { data, head, .. } => {
                pool.put(data);
                self.spare_heads.extend(head);
            }
            done => self.put_away(done),
        }
    }

    fn put_away(&mut self, done: Done) {
        match done {
            Done::Received { endpoint, buffer, .. } => self.post_receive(endpoint, buffer),
            // The data finds home by itself.
            Done::Posted { head, .. } => self.spare_heads.extend(head),
        }
    }

    /// Detaches the closed members whose work has come back, or never will.
    fn finish_closing(&mut self, now: Instant, pool: &mut BufferPool) {
        if self.closing == 0 {
            return;
        }
        for index in 0..self.members.len() {
            let Some(member) = &self.members[index] else { continue };
            let Some(until) = member.closing else { continue };
            let drained = member.chains_out == 0 && member.receives_out == 0;
            if drained || now >= until || self.lost.is_some() {
                self.detach(EndpointId(index), Some(pool));
            }
        }
        let used = self.lost.is_some() || self.members.iter().any(Option::is_some);
        debug_assert!(used || self.is_whole(), "something of a hub was lost");
    }

    /// Of a hub that serves nobody, everything is here.
    fn is_whole(&self) -> bool {
        let own_receives = self.hub.has_shared_receives() || self.spare_receives.len() == self.receives_made;
        self.receives_wanted == 0 && self.closing == 0 && self.spare_heads.len() == self.heads_made && own_receives
    }

    fn detach(&mut self, endpoint: EndpointId, mut pool: Option<&mut BufferPool>) {
        let Some(member) = self.members[endpoint.0].take() else { return };
        self.entries_left += member.promised;
        self.receives_wanted -= member.receives;
        self.closing -= usize::from(member.closing.is_some());
        let (heads, receives) = (&mut self.spare_heads, &mut self.spare_receives);
        self.hub.detach(endpoint, &mut |done| match done {
            Done::Posted { data, head, .. } => {
                heads.extend(head);
                if let Some(pool) = &mut pool {
                    pool.put(data);
                }
            }
            Done::Received { buffer, .. } => receives.push(buffer),
        });
    }
}

impl Group for GroupHandle {
    fn poll(&mut self, cx: &mut Context, pool: &mut BufferPool, woken: &mut Vec<u64>) -> bool {
        self.0.borrow_mut().poll(cx, pool, woken)
    }

    fn ready(&mut self, _: Ready) {
        // Which of its hubs, the key does not say.
        self.0.borrow_mut().hubs.iter_mut().for_each(|(_, hub)| hub.events_due = true);
    }

    fn may_sleep(&mut self) -> bool {
        for (_, hub) in &mut self.0.borrow_mut().hubs {
            if hub.lost.is_some() {
                continue;
            }
            let quiet = |hub: &mut HubState| hub.hub.poll(&mut hub.done).is_ok_and(|found| found == 0);
            if hub.events_due || !hub.done.is_empty() || hub.hub.arm().is_err() || !quiet(hub) {
                return false;
            }
        }
        true
    }

    fn deadline(&self) -> Option<Instant> {
        let group = self.0.borrow();
        // Also without a queue pair: a device that is to go may wait for its hub to let go of it.
        (!group.hubs.is_empty()).then_some(group.events_at)
    }

    fn stats(&self) -> GroupStats {
        let group = self.0.borrow();
        let mut stats = GroupStats::default();
        for (_, hub) in &group.hubs {
            let mut device = hub.counters.clone();
            let doorbells = hub.hub.doorbells();
            device.send_doorbell_updates = doorbells.sends;
            device.recv_doorbell_updates = doorbells.receives;
            for pending in hub.members.iter().flatten().map(|member| member.pending) {
                stats.pending_data_buffer += pending.memory as u64;
                device.pending_rdma_read += pending.reads as u64;
                device.pending_rdma_write += pending.data_responses as u64;
                device.pending_rdma_send += pending.responses as u64;
            }
            match stats.devices.iter_mut().find(|known| known.name == device.name) {
                Some(known) => known.add(&device),
                None => stats.devices.push(device),
            }
        }
        stats
    }
}

impl DeviceStats {
    fn add(&mut self, other: &DeviceStats) {
        self.polls += other.polls;
        self.idle_polls += other.idle_polls;
        self.completions += other.completions;
        self.requests += other.requests;
        self.request_latency_ns += other.request_latency_ns;
        self.pending_free_request += other.pending_free_request;
        self.pending_rdma_read += other.pending_rdma_read;
        self.pending_rdma_write += other.pending_rdma_write;
        self.pending_rdma_send += other.pending_rdma_send;
        self.total_send_wrs += other.total_send_wrs;
        self.send_doorbell_updates += other.send_doorbell_updates;
        self.total_recv_wrs += other.total_recv_wrs;
        self.recv_doorbell_updates += other.recv_doorbell_updates;
    }
}
