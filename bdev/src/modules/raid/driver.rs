//! What does the array's work, on one reactor: superblocks, the log, copies, and telling everybody.
//!
//! The machine of [`array`](super::array) decides; this does what it names, with channels of its own to the legs, and spare I/Os, so
//! that writes of hosts that hold the whole pool do not wait for themselves.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_channel::oneshot;
use reactor::{Buffers, Context, Instant, Poller, PollerId, Progress, ReactorId, Schedule};
use slab::Slab;

use super::array::{Array, CopyEnd, Effect, Meta, Standing};
use super::format::{LegState, MAX_LEGS, Superblock};
use super::settings::Settings;
use super::shared::{Event, Notice, Shared, Table};
use super::sharing::{Act, Sharing};
use crate::core::locks::HoldId;
use crate::core::runtime::SharedRuntime;
use crate::core::spares::Spares;
use crate::core::{BdevInfo, ChannelId, ClientId, Completion, IoRequest, IoRuntime, IoStatus, Op};
use crate::modules::layer::Base;

mod legs;

/// I/Os of the driver's own.
const SPARES: usize = 4;
/// The most that one operation of a copy moves, and how many are under way at once.
const PIECE: usize = 128 * 1024;
const PIECES: usize = 4;
/// How often regions are asked back that nobody writes.
const TIDY: Duration = Duration::from_secs(5);
/// When a leg that went out is looked at again, at first and at the most.
const PROBE: Duration = Duration::from_secs(1);
const PROBE_MOST: Duration = Duration::from_secs(60);
/// Places that could not be read on one leg before it goes out.
const MAX_BAD: u32 = 64;

/// A leg as the driver uses it.
#[derive(Default)]
struct Port {
    base: Option<Base>,
    channel: Option<ChannelId>,
    out: u32,
    gone: bool,
    bad: u32,
    probe_at: Option<Instant>,
    backoff: Duration,
    probing: bool,
}

#[derive(Clone, Copy, Debug)]
enum Doing {
    Meta { op: u64, leg: usize },
    Read { piece: usize },
    Write { piece: usize },
    Probe { leg: usize },
    Wipe,
}

struct Out {
    doing: Doing,
    leg: usize,
    spare: bool,
}

struct Copy {
    from: usize,
    to: usize,
    next: u64,
    end: u64,
    out: usize,
    result: CopyEnd,
    /// First block of each piece that is under way.
    pieces: Slab<u64>,
}

/// What is to be told when the first round has ended.
pub(super) type Begun = oneshot::Sender<Result<(), String>>;

/// See the [module](self).
pub(super) struct Driver {
    me: PollerId,
    name: Arc<str>,
    pub(super) array: Array,
    pub(super) shared: Arc<Shared>,
    settings: Arc<Settings>,
    runtime: SharedRuntime,
    client: ClientId,
    spares: Spares,
    ports: Vec<Port>,
    out: Slab<Out>,
    stalled: VecDeque<(Doing, usize, IoRequest)>,
    completions: Vec<Completion>,
    effects: VecDeque<Effect>,
    told_left: Option<(u64, usize)>,
    kept: Option<(u64, usize, Vec<bool>)>,
    sharing: Sharing,
    /// Reactors on which reads have failed on all legs that they know to be in sync.
    doubts: Vec<u32>,
    hold: Option<HoldId>,
    copy: Option<Copy>,
    now: Instant,
    tidy_at: Instant,
    paced_until: Instant,
    begun: Option<Begun>,
    stopping: bool,
    wipe: bool,
    wiped: bool,
    closed: Option<oneshot::Sender<()>>,
    /// Blocks copied since the array was started.
    pub(super) copied_blocks: u64,
    /// Why the last copy ended early.
    pub(super) trouble: Option<String>,
    /// Asks the control plane to remove the device: its last leg is gone.
    on_lost: Arc<dyn Fn() + Send + Sync>,
}

/// What a driver is made of.
pub(super) struct Parts {
    pub(super) name: Arc<str>,
    pub(super) array: Array,
    pub(super) shared: Arc<Shared>,
    pub(super) settings: Arc<Settings>,
    pub(super) bases: Vec<Option<Base>>,
    pub(super) begun: Begun,
    pub(super) closed: oneshot::Sender<()>,
    pub(super) on_lost: Arc<dyn Fn() + Send + Sync>,
}

impl Driver {
    /// Starts an array on this reactor.
    pub(super) fn install(cx: &mut Context, parts: Parts) -> std::io::Result<()> {
        let runtime = IoRuntime::of(cx);
        let mut inner = runtime.borrow_mut();
        let spares = inner.take_spares(SPARES)?;
        let client = inner.add_client();
        let mut ports: Vec<Port> = Vec::new();
        for base in parts.bases {
            let mut port = Port { backoff: PROBE, ..Port::default() };
            if let Some(base) = base {
                match inner.get_channel(base.bdev()) {
                    Ok(channel) => port.channel = Some(channel),
                    Err(error) => {
                        ports.iter().filter_map(|port: &Port| port.channel).for_each(|id| inner.put_channel(id));
                        inner.remove_client(client);
                        inner.put_spares(spares);
                        return Err(error);
                    }
                }
                port.base = Some(base);
            }
            ports.push(port);
        }
        let sharing = Sharing::new(inner.reactors() as u32, parts.shared.layout.regions());
        drop(inner);
        parts.shared.set_waker(cx.waker());
        let me = cx.reserve_poller();
        let driver = Driver {
            me,
            name: parts.name,
            array: parts.array,
            shared: parts.shared,
            settings: parts.settings,
            runtime,
            client,
            spares,
            ports,
            out: Slab::new(),
            stalled: VecDeque::new(),
            completions: Vec::new(),
            effects: VecDeque::new(),
            told_left: None,
            kept: None,
            sharing,
            doubts: Vec::new(),
            hold: None,
            copy: None,
            now: cx.now(),
            tidy_at: cx.now() + TIDY,
            paced_until: cx.now(),
            begun: Some(parts.begun),
            stopping: false,
            wipe: false,
            wiped: false,
            closed: Some(parts.closed),
            copied_blocks: 0,
            trouble: None,
            on_lost: parts.on_lost,
        };
        cx.add_reserved_poller(me, "raid", Schedule::Active, Box::new(driver));
        Ok(())
    }

    /// The device that leg `leg` is on now.
    pub(super) fn bdev_of(&self, leg: usize) -> Option<&Arc<BdevInfo>> {
        self.ports.get(leg)?.base.as_ref().map(Base::bdev)
    }

    /// Gives leg `leg` a device. The leg must be out and without one.
    ///
    /// # Errors
    /// As opening a channel.
    pub(super) fn attach(&mut self, leg: usize, base: Base, runtime: &mut IoRuntime) -> std::io::Result<()> {
        let channel = runtime.get_channel(base.bdev())?;
        if self.ports.len() <= leg {
            self.ports.resize_with(leg + 1, || Port { backoff: PROBE, ..Port::default() });
        }
        self.ports[leg] =
            Port { base: Some(base), channel: Some(channel), backoff: self.ports[leg].backoff, ..Port::default() };
        Ok(())
    }

    /// Takes the device of leg `leg` away again: nothing was done with it.
    pub(super) fn detach(&mut self, leg: usize, runtime: &mut IoRuntime) {
        let port = &mut self.ports[leg];
        if let Some(channel) = port.channel.take() {
            runtime.put_channel(channel);
        }
        if let Some(base) = port.base.take() {
            base.release();
        }
    }

    /// Takes the leg on the device `name` out of the array; `false`: it is the last that has everything.
    pub(super) fn take_out(&mut self, name: &str) -> bool {
        let leg = (0..self.ports.len()).find(|&n| self.bdev_of(n).is_some_and(|bdev| bdev.name() == name));
        leg.is_none_or(|leg| self.array.remove(leg))
    }

    /// Whether all reactors go by the present table.
    pub(super) fn is_told(&self) -> bool {
        self.told_left.is_none() && self.array.is_idle()
    }

    /// Whether leg `leg` may be given a device.
    pub(super) fn is_vacant(&self, leg: usize) -> bool {
        self.ports.get(leg).is_none_or(|port| port.base.is_none())
    }

    // ---- what comes in --------------------------------------------------------------------------------------------------------

    fn take_events(&mut self, runtime: &mut IoRuntime) -> bool {
        let events = self.shared.take();
        let any = !events.is_empty();
        for event in events {
            match event {
                Event::Mark { from, regions } => self.array.mark(from, regions),
                Event::Failed { leg, why } => {
                    self.array.leg_failed(leg, &why);
                }
                Event::Uncertain => self.array.uncertain(),
                Event::Repair { leg, lba, blocks } => self.bad_place(leg, lba, blocks),
                Event::Told(generation) => self.one_told(generation),
                Event::Kept { round, held } => self.one_kept(round, &held),
                Event::Shared(ask) => {
                    if let Some(act) = self.sharing.shared(ask) {
                        self.share(act, runtime);
                    }
                }
                Event::Freed => self.tell_all(|| Notice::Freed, runtime),
                Event::Doubt(reactor) => self.doubts.push(reactor),
                Event::Locked => self.array.locked(),
                Event::Gone(bdev) => self.gone(&bdev),
                Event::Do(work) => work(self, runtime),
                Event::Stop { wipe } => {
                    self.stopping = true;
                    self.wipe |= wipe;
                    self.array.stop();
                }
            }
        }
        any
    }

    fn bad_place(&mut self, leg: usize, lba: u64, blocks: u64) {
        let Some(port) = self.ports.get_mut(leg) else { return };
        port.bad += 1;
        if port.bad > MAX_BAD {
            port.bad = 0;
            self.array.leg_failed(leg, "too many places on it cannot be read");
        } else {
            tracing::warn!(
                raid = &*self.name,
                leg,
                lba,
                blocks,
                "could not be read; it is written again from another leg"
            );
            self.array.repair(leg, lba, blocks);
        }
    }

    fn one_told(&mut self, generation: u64) {
        if let Some((of, left)) = self.told_left.as_mut().filter(|(of, _)| *of == generation) {
            *left -= 1;
            if *left == 0 {
                let of = *of;
                self.told_left = None;
                self.array.told(of);
                let settled = self.array.is_online() || self.array.is_idle();
                if let Some(begun) = self.begun.take_if(|_| settled) {
                    // Whoever asked for it may have gone.
                    let _ = begun.send(match self.array.is_online() {
                        true => Ok(()),
                        false => Err("its superblocks cannot be written".to_string()),
                    });
                }
            }
        }
    }

    fn one_kept(&mut self, round: u64, held: &[usize]) {
        let Some((of, left, all)) = self.kept.as_mut() else { return };
        if *of != round {
            return;
        }
        held.iter().for_each(|&region| all[region] = true);
        *left -= 1;
        if *left == 0 {
            let (round, _, mut all) = self.kept.take().expect("it was just seen");
            self.sharing.revoked(&mut all);
            self.array.revoked(round, &all);
        }
    }

    /// A device that is a leg is being removed.
    fn gone(&mut self, bdev: &Arc<BdevInfo>) {
        let Some(leg) = (0..self.ports.len()).find(|&n| self.bdev_of(n).is_some_and(|of| of.id() == bdev.id())) else {
            return;
        };
        self.ports[leg].gone = true;
        if !self.array.leg_failed(leg, "its bdev was removed") {
            tracing::error!(
                raid = &*self.name,
                bdev = bdev.name(),
                "the last leg is being removed, and the array with it"
            );
            (self.on_lost)();
        }
    }

    // ---- operations on legs -----------------------------------------------------------------------------------------------------

    fn submit(&mut self, doing: Doing, leg: usize, request: IoRequest, runtime: &mut IoRuntime) {
        let Some(channel) = self.ports[leg].channel else {
            return self.ended(doing, IoStatus::NoDevice, request.bufs, runtime);
        };
        if !self.stalled.is_empty() {
            return self.stalled.push_back((doing, leg, request));
        }
        self.try_submit(doing, leg, channel, request, runtime);
    }

    fn try_submit(&mut self, doing: Doing, leg: usize, channel: ChannelId, r: IoRequest, runtime: &mut IoRuntime) {
        let slot = self.out.vacant_entry();
        let request = IoRequest { user: slot.key() as u64, ..r };
        match runtime.submit_or_spare(&mut self.spares, channel, self.client, request) {
            Ok(spare) => {
                slot.insert(Out { doing, leg, spare });
                self.ports[leg].out += 1;
            }
            Err(request) => self.stalled.push_front((doing, leg, request)),
        }
    }

    fn take_completions(&mut self, runtime: &mut IoRuntime) -> bool {
        let mut completions = std::mem::take(&mut self.completions);
        runtime.take_completions(self.client, &mut completions);
        let any = !completions.is_empty();
        for mut completion in completions.drain(..) {
            let Out { doing, leg, spare } = self.out.remove(completion.user() as usize);
            self.ports[leg].out -= 1;
            let (status, bufs) = (completion.status(), completion.take_bufs());
            if spare {
                runtime.recycle_spare(&mut self.spares, completion);
            } else {
                runtime.recycle(completion);
            }
            self.ended(doing, status, bufs, runtime);
        }
        self.completions = completions;
        while let Some((doing, leg, request)) = self.stalled.pop_front() {
            let before = self.stalled.len();
            match self.ports[leg].channel {
                Some(channel) => self.try_submit(doing, leg, channel, request, runtime),
                None => self.ended(doing, IoStatus::NoDevice, request.bufs, runtime),
            }
            if self.stalled.len() > before {
                break;
            }
        }
        any
    }

    fn ended(&mut self, doing: Doing, status: IoStatus, bufs: Buffers, runtime: &mut IoRuntime) {
        match doing {
            Doing::Meta { op, leg } => {
                if !status.is_success() {
                    tracing::warn!(raid = &*self.name, leg, %status, "superblock or log could not be written");
                }
                self.array.meta_done(op, status.is_success());
            }
            Doing::Read { piece } => self.piece_read(piece, status, bufs, runtime),
            Doing::Write { piece } => self.piece_written(piece, status, runtime),
            Doing::Probe { leg } => self.probed(leg, status, &bufs),
            Doing::Wipe => {}
        }
    }

    fn start_copy(&mut self, from: usize, to: usize, lba: u64, blocks: u64, runtime: &mut IoRuntime) {
        let (next, end) = (lba, lba + blocks);
        let result = CopyEnd::Done;
        self.copy = Some(Copy { from, to, next, end, out: 0, result, pieces: Slab::with_capacity(PIECES) });
        self.go_on_copying(runtime);
    }

    fn go_on_copying(&mut self, runtime: &mut IoRuntime) {
        let layout = self.shared.layout;
        let most = (PIECE as u64 / u64::from(layout.block_size)).max(1);
        while let Some(copy) = self.copy.as_mut() {
            if copy.out == 0 && (copy.next == copy.end || copy.result != CopyEnd::Done) {
                let copy = self.copy.take().expect("it was just seen");
                match copy.result {
                    CopyEnd::Done => {}
                    CopyEnd::Source => {
                        self.trouble = Some(format!("leg {} cannot be read at block {}", copy.from, copy.next))
                    }
                    CopyEnd::Target => self.trouble = Some(format!("leg {} cannot be written", copy.to)),
                }
                return self.array.copied(copy.result);
            }
            if copy.out == PIECES || copy.next == copy.end || copy.result != CopyEnd::Done {
                return;
            }
            let blocks = most.min(copy.end - copy.next);
            let piece = copy.pieces.insert(copy.next);
            let lba = copy.next + layout.data_offset;
            copy.next += blocks;
            copy.out += 1;
            let from = copy.from;
            let bufs = Buffers::heap(blocks as usize * layout.block_size as usize);
            let request = IoRequest { op: Op::Read, lba, blocks, bufs, user: 0 };
            self.submit(Doing::Read { piece }, from, request, runtime);
        }
    }

    fn piece_read(&mut self, piece: usize, status: IoStatus, bufs: Buffers, runtime: &mut IoRuntime) {
        let layout = self.shared.layout;
        let Some(copy) = self.copy.as_mut() else { return };
        let first = copy.pieces[piece];
        if !status.is_success() {
            (copy.result, copy.next) = (CopyEnd::Source, first);
            copy.pieces.remove(piece);
            copy.out -= 1;
            return self.go_on_copying(runtime);
        }
        let (to, blocks) = (copy.to, bufs.len() as u64 / u64::from(layout.block_size));
        let request =
            IoRequest { op: Op::Write { fua: false }, lba: first + layout.data_offset, blocks, bufs, user: 0 };
        self.submit(Doing::Write { piece }, to, request, runtime);
    }

    fn piece_written(&mut self, piece: usize, status: IoStatus, runtime: &mut IoRuntime) {
        let Some(copy) = self.copy.as_mut() else { return };
        copy.pieces.remove(piece);
        copy.out -= 1;
        if !status.is_success() && copy.result == CopyEnd::Done {
            copy.result = CopyEnd::Target;
        }
        self.go_on_copying(runtime);
    }

    // ---- what goes out ----------------------------------------------------------------------------------------------------------

    fn run_effects(&mut self, runtime: &mut IoRuntime) -> bool {
        let mut any = false;
        loop {
            self.array.set_window(self.settings.window_blocks(self.shared.layout.block_size));
            self.effects.extend(self.array.effects());
            let Some(effect) = self.effects.pop_front() else { return any };
            // A copy waits for its time and for the device, whose locks it needs; what comes after it does not wait for that.
            if let Effect::Lock { .. } = effect
                && (self.now < self.paced_until || !self.shared.has_device())
                && !self.stopping
            {
                let rest_waits = self.effects.iter().all(|effect| matches!(effect, Effect::Lock { .. }));
                self.effects.push_back(effect);
                if rest_waits {
                    return any;
                }
                continue;
            }
            any = true;
            self.run_effect(effect, runtime);
        }
    }

    fn run_effect(&mut self, effect: Effect, runtime: &mut IoRuntime) {
        let layout = self.shared.layout;
        match effect {
            Effect::Meta { op, leg, what, lba, bytes } => {
                let blocks = bytes.len() as u64 / u64::from(layout.block_size);
                let kind = if what == Meta::Flush { Op::Flush } else { Op::Write { fua: true } };
                let request = IoRequest { op: kind, lba, blocks, bufs: Buffers::from(&bytes[..]), user: 0 };
                self.submit(Doing::Meta { op, leg }, leg, request, runtime);
            }
            Effect::Tell(generation) => self.tell(generation, runtime),
            Effect::Revoke(round) => self.revoke(round, runtime),
            Effect::Grant { to, regions } => {
                for act in self.sharing.grant(to, regions) {
                    self.share(act, runtime);
                }
            }
            Effect::Lock { lba, blocks } => {
                let rate = self.settings.bytes_per_second();
                if rate > 0 {
                    let bytes = blocks * u64::from(layout.block_size);
                    let takes = Duration::from_nanos((u128::from(bytes) * 1_000_000_000 / u128::from(rate)) as u64);
                    self.paced_until = self.now + takes;
                }
                let shared = Arc::clone(&self.shared);
                match self.shared.device() {
                    Some(bdev) => {
                        let held = Box::new(move || shared.send(Event::Locked));
                        self.hold = Some(runtime.hold_range(&bdev, lba, blocks, held));
                    }
                    None => shared.send(Event::Locked),
                }
            }
            Effect::Unlock => {
                if let Some(hold) = self.hold.take() {
                    runtime.release_range(hold);
                }
            }
            Effect::Copy { from, to, lba, blocks } => {
                self.copied_blocks += blocks;
                self.start_copy(from, to, lba, blocks, runtime);
            }
            Effect::Note { leg, text } => self.note(leg, &text),
        }
    }

    fn share(&mut self, act: Act, runtime: &mut IoRuntime) {
        // Nobody asks before there is one.
        let Some(bdev) = self.shared.device() else { return };
        match act {
            Act::Grant { to, regions } => {
                runtime.send_notice(ReactorId(to), bdev.id(), Box::new(Notice::Grant(regions)), |_| {});
            }
            Act::Share { ask, of, regions } => {
                let shared = Arc::clone(&self.shared);
                let absent = move |there: bool| {
                    if !there {
                        shared.send(Event::Shared(ask));
                    }
                };
                runtime.send_notice(ReactorId(of), bdev.id(), Box::new(Notice::Share { ask, regions }), absent);
            }
        }
    }

    fn tell_all(&mut self, notice: impl Fn() -> Notice, runtime: &mut IoRuntime) {
        let Some(bdev) = self.shared.device() else { return };
        for reactor in 0..runtime.reactors() {
            runtime.send_notice(ReactorId(reactor as u32), bdev.id(), Box::new(notice()), |_| {});
        }
    }

    /// Reads that failed everywhere are tried again when their reactors know of all legs in sync: what they are told goes the same
    /// way, and before this.
    fn settle_doubts(&mut self, runtime: &mut IoRuntime) {
        if self.doubts.is_empty() || self.array.is_promoting() && self.array.is_online() {
            return;
        }
        let Some(bdev) = self.shared.device() else { return };
        for reactor in self.doubts.drain(..) {
            runtime.send_notice(ReactorId(reactor), bdev.id(), Box::new(Notice::Settled), |_| {});
        }
    }

    fn note(&mut self, leg: usize, text: &str) {
        let name = self.bdev_of(leg).map_or("", |bdev| bdev.name()).to_string();
        tracing::warn!(raid = &*self.name, leg, bdev = name, "{text}");
        if let Some(port) = self.ports.get_mut(leg)
            && self.array.superblock().legs[leg].state == LegState::InSync
        {
            port.backoff = PROBE;
            self.trouble = None;
        }
    }

    fn tell(&mut self, generation: u64, runtime: &mut IoRuntime) {
        if !self.array.is_online() {
            self.sharing.offline();
        }
        let legs = (0..self.array.view().legs.len()).map(|leg| self.bdev_of(leg).cloned()).collect();
        let table = Arc::new(Table { view: self.array.view().clone(), legs });
        self.shared.set_table(Arc::clone(&table));
        let reactors = runtime.reactors();
        self.told_left = Some((generation, reactors));
        for reactor in 0..reactors {
            let shared = Arc::clone(&self.shared);
            match self.shared.device() {
                Some(bdev) => {
                    let notice = Box::new(Notice::Table(Arc::clone(&table)));
                    let then = move |_| shared.send(Event::Told(generation));
                    runtime.send_notice(ReactorId(reactor as u32), bdev.id(), notice, then);
                }
                None => shared.send(Event::Told(generation)),
            }
        }
    }

    fn revoke(&mut self, round: u64, runtime: &mut IoRuntime) {
        let reactors = runtime.reactors();
        self.kept = Some((round, reactors, vec![false; self.shared.layout.regions()]));
        self.sharing.revoke();
        for reactor in 0..reactors {
            let shared = Arc::clone(&self.shared);
            let absent = move |there: bool| {
                if !there {
                    shared.send(Event::Kept { round, held: Vec::new() });
                }
            };
            match self.shared.device() {
                Some(bdev) => {
                    let notice = Box::new(Notice::Revoke(round));
                    runtime.send_notice(ReactorId(reactor as u32), bdev.id(), notice, absent);
                }
                None => absent(false),
            }
        }
    }

    // ---- the end ------------------------------------------------------------------------------------------------------------------

    /// Lets go of devices that are gone, once nobody uses them any more.
    fn release_gone(&mut self, runtime: &mut IoRuntime) {
        let told = self.array.is_idle() && self.told_left.is_none();
        let mut released = false;
        for leg in 0..self.ports.len() {
            let out = self.array.view().legs.get(leg).is_none_or(|standing| *standing == Standing::Out);
            let port = &mut self.ports[leg];
            let taken_out = self.array.superblock().legs[leg].state == LegState::Empty;
            if told && out && port.out == 0 && port.base.is_some() && (port.gone || taken_out) {
                if let Some(channel) = port.channel.take() {
                    runtime.put_channel(channel);
                }
                if let Some(base) = port.base.take() {
                    base.release();
                }
                port.gone = false;
                (port.probe_at, port.probing) = (None, false);
                released = true;
            }
        }
        if released {
            self.publish();
        }
    }

    fn publish(&self) {
        let legs = (0..self.array.view().legs.len()).map(|leg| self.bdev_of(leg).cloned()).collect();
        self.shared.set_table(Arc::new(Table { view: self.array.view().clone(), legs }));
    }

    fn close_if_done(&mut self, runtime: &mut IoRuntime, cx: &mut Context) {
        let quiet = self.out.is_empty() && self.stalled.is_empty() && self.told_left.is_none() && self.kept.is_none();
        if !self.stopping || !quiet || !self.array.is_idle() || self.copy.is_some() || self.hold.is_some() {
            return;
        }
        if self.wipe && !std::mem::replace(&mut self.wiped, true) {
            for leg in 0..self.ports.len().min(MAX_LEGS) {
                let blocks = 2 * self.shared.layout.unit_blocks();
                let bufs = Buffers::heap(2 * self.shared.layout.unit());
                let request = IoRequest { op: Op::Write { fua: true }, lba: 0, blocks, bufs, user: 0 };
                self.submit(Doing::Wipe, leg, request, runtime);
            }
            if !self.out.is_empty() {
                return;
            }
        }
        for port in &mut self.ports {
            if let Some(channel) = port.channel.take() {
                runtime.put_channel(channel);
            }
            if let Some(base) = port.base.take() {
                base.release();
            }
        }
        runtime.remove_client(self.client);
        runtime.put_spares(std::mem::take(&mut self.spares));
        cx.remove_poller(self.me);
        // Legs that are on their way to it are let go of.
        self.shared.close();
        if let Some(closed) = self.closed.take() {
            let _ = closed.send(());
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl Poller for Driver {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        self.now = cx.now();
        let shared = std::rc::Rc::clone(&self.runtime);
        let mut runtime = shared.borrow_mut();
        runtime.set_now(cx.now());
        let mut busy = self.take_events(&mut runtime);
        busy |= self.take_completions(&mut runtime);
        if self.now >= self.tidy_at {
            self.tidy_at = self.now + TIDY;
            self.array.tidy();
            if !self.stopping {
                self.array.retry();
            }
        }
        self.probe(&mut runtime);
        busy |= self.run_effects(&mut runtime);
        self.settle_doubts(&mut runtime);
        self.release_gone(&mut runtime);
        if busy {
            runtime.run();
            runtime.flush();
        }
        self.close_if_done(&mut runtime, cx);
        Progress::from_busy(busy)
    }

    fn deadline(&self) -> Option<Instant> {
        let probes = self.ports.iter().filter(|port| !port.probing && !port.gone).filter_map(|port| port.probe_at);
        let paced = (!self.effects.is_empty()).then_some(self.paced_until);
        probes.chain(paced).chain([self.tidy_at]).min()
    }

    fn may_sleep(&mut self, _: &mut Context) -> bool {
        self.shared.is_quiet()
    }
}
