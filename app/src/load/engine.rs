//! The load itself: which command is next, when, and what came of it; over any [`Device`].
//!
//! ```text
//!  SetUp -> (Fill -> Drain)? -> Muster -> WarmUp -> Measure -> Drain -> (Check -> Drain)? -> Parting -> Over
//! ```
//! There is one engine a reactor. They wait for each other twice: in Muster, so that they measure at the same time, and in
//! Parting, so that the one that has the controller leaves no other without it.
//!
//! *Closed loop* (no rate): every lane keeps its depth of commands outstanding. All completions that one poll brings are
//! answered with new commands that leave in one send, and the clock is read once for all of them, so a latency is the time
//! from the send that a command left with to the poll that found its completion.
//!
//! *Open loop* (a rate): commands are due at fixed times, whatever happens to those before. A latency counts from when its
//! command was due, not from when a late one was sent; so a stall shows in all commands that it held up (no coordinated
//! omission).

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use reactor::{Buffers, Context, Instant, Poller, Progress};

use super::crew::{Crew, Doing};
use super::ledger::Ledger;
use super::report::Report;
use super::stamp::Stamp;
use super::{LoadOptions, Mode};

/// Reads of a mixed load, per cent, where nothing else is said.
const DEFAULT_MIX: u8 = 50;

/// The most memory for payloads.
const MAX_PAYLOAD_BYTES: u64 = 4 << 30;
/// The most places that a verified run keeps account of; four bytes each.
const MAX_PLACES: u64 = 1 << 28;
/// How long the last completions are waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same when somebody has stopped the run, and waits.
const SHORT_PATIENCE: Duration = Duration::from_secs(2);

/// Something with blocks.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Its number for people: the NSID.
    pub number: u64,
    /// Its size, blocks.
    pub blocks: u64,
    /// Bytes of a block.
    pub block_bytes: u32,
}

/// What a device is when it is set up.
#[derive(Clone, Debug)]
pub struct Ready {
    /// What to put the load on.
    pub volumes: Vec<Volume>,
    /// Queues, each of which takes `depth` commands.
    pub lanes: usize,
    /// Commands outstanding on each lane: as asked for or less.
    pub depth: usize,
    /// The longest command, bytes.
    pub max_bytes: Option<u64>,
}

/// One command.
#[derive(Debug)]
pub struct Command {
    /// Comes back with its completion.
    pub tag: u64,
    /// Index of the volume.
    pub volume: usize,
    /// Write or read.
    pub is_write: bool,
    /// First block.
    pub lba: u64,
    /// Blocks.
    pub blocks: u32,
    /// Payload.
    pub data: Buffers,
}

/// The end of a command.
#[derive(Debug)]
pub struct Done {
    /// Which.
    pub tag: u64,
    /// Its payload.
    pub data: Buffers,
    /// Why it failed, if it did.
    pub error: Option<Cow<'static, str>>,
}

/// What the load is put on, from one reactor.
pub trait Device {
    /// Goes on with setting up; what it is once it is ready.
    ///
    /// # Errors
    /// It cannot be, and what to do about it.
    fn set_up(&mut self, cx: &mut Context) -> Result<Option<Ready>, String>;

    /// What has to be done beside commands; whether anything was.
    ///
    /// # Errors
    /// The device is lost.
    fn tend(&mut self, cx: &mut Context) -> Result<bool, String>;

    /// Gives what a lane has completed to `each`; whether there was work.
    ///
    /// # Errors
    /// The device is lost.
    fn poll(&mut self, lane: usize, now: Instant, each: impl FnMut(Done)) -> Result<bool, String>;

    /// Takes a command; a lane has room for its depth.
    fn submit(&mut self, lane: usize, command: Command, now: Instant);

    /// Sends what was submitted to a lane.
    ///
    /// # Errors
    /// The device is lost.
    fn send(&mut self, lane: usize, cx: &mut Context) -> Result<(), String>;

    /// Payload memory.
    fn memory(&mut self, bytes: usize) -> Buffers {
        Buffers::heap(bytes)
    }

    /// The load is over, however it ended.
    fn leave(&mut self, cx: &mut Context);
}

/// CPU time of this process, user and system, seconds.
fn cpu_seconds() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    SetUp,
    Fill,
    FillDrain,
    Muster,
    WarmUp,
    Measure,
    Drain,
    Check,
    CheckDrain,
    Parting,
    Over,
}

/// A command that is outstanding, by its tag.
#[derive(Clone, Copy, Debug)]
struct Sent {
    since: Instant,
    volume: u32,
    is_write: bool,
    place: u64,
    generation: u32,
}

/// A volume as the load uses it.
#[derive(Debug)]
struct Target {
    volume: Volume,
    blocks_per_io: u32,
    /// The volume's place that is place 0 here.
    first: u64,
    places: u64,
    next: u64,
    /// What is left to be filled, and its end.
    fill: std::ops::Range<u64>,
    ledger: Option<Ledger>,
    /// How far everything was read again.
    checked: u64,
}

/// What a member has of `whole`: its share of a number, or its part of a range.
fn share(whole: u64, member: usize, members: usize) -> std::ops::Range<u64> {
    let cut = |at: usize| (u128::from(whole) * at as u128 / members as u128) as u64;
    cut(member)..cut(member + 1)
}

/// When commands are due.
#[derive(Clone, Copy, Debug)]
struct Pace {
    from: Instant,
    per_second: f64,
    /// Commands that were due and are sent.
    sent: u64,
}

impl Pace {
    fn due(&self) -> Instant {
        self.from + Duration::from_secs_f64(self.sent as f64 / self.per_second)
    }

    /// Commands that are due and not sent.
    fn waiting(&self, now: Instant) -> u64 {
        ((now.since(self.from).as_secs_f64() * self.per_second) as u64).saturating_sub(self.sent)
    }
}

/// Which command is next, and what came of those before.
struct Load {
    options: LoadOptions,
    targets: Vec<Target>,
    run: u64,
    random: u64,
    turn: usize,
    sent: Vec<Sent>,
    /// Free tags of each lane, with memory.
    idle: Vec<Vec<(u64, Buffers)>>,
    outstanding: usize,
    begun: u64,
    /// Commands to measure, if that was asked for.
    count: Option<u64>,
    pace: Option<Pace>,
    scratch: Vec<u8>,
    phase: Phase,
    report: Report,
}

/// A run: a load, and what it is put on.
pub struct Engine<D> {
    device: D,
    load: Load,
    depth: usize,
    phase_ends: Instant,
    measured_from: Instant,
    cpu_from: f64,
    busy_from_ns: u64,
    crew: Arc<Crew>,
    index: usize,
    /// It is being stopped, and does not wait long for anything.
    hurries: bool,
    out: Option<mpsc::Sender<Report>>,
}

impl Load {
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// The next command of the load, if one is due.
    #[inline(always)]
    fn next_command(&mut self, lane: usize, now: Instant) -> Option<Command> {
        let since = match &self.pace {
            Some(pace) if pace.due() > now => return None,
            Some(pace) => pace.due(),
            None => now,
        };
        if self.phase == Phase::Measure && self.is_counted() {
            return None;
        }
        let (tag, data) = self.idle[lane].pop()?;
        let volume = self.turn;
        self.turn = if volume + 1 == self.targets.len() { 0 } else { volume + 1 };
        let mode = self.options.rw;
        let (random, coin) = match mode {
            Mode::Read | Mode::Write => (None, 0),
            Mode::Randread | Mode::Randwrite => (Some(self.random()), 0),
            Mode::Randrw => (Some(self.random()), self.random() >> 32),
        };
        let is_write = match mode {
            Mode::Read | Mode::Randread => false,
            Mode::Write | Mode::Randwrite => true,
            Mode::Randrw => coin % 100 >= u64::from(self.options.rwmixread.unwrap_or(DEFAULT_MIX)),
        };
        let target = &mut self.targets[volume];
        let mut place = match random {
            None => target.next,
            Some(random) => ((u128::from(random) * u128::from(target.places)) >> 64) as u64,
        };
        target.next = if target.next + 1 >= target.places { 0 } else { target.next + 1 };
        let mut generation = 0;
        if let Some(ledger) = &mut target.ledger {
            place = ledger.take(place).expect("there are more places than commands");
            generation = ledger.generation(place) + u32::from(is_write);
        }
        if let Some(pace) = &mut self.pace {
            pace.sent += 1;
        }
        if self.phase == Phase::Measure {
            self.begun += 1;
        }
        Some(self.command(tag, data, Sent { since, volume: volume as u32, is_write, place, generation }))
    }

    /// Whether as many commands have begun as were asked for.
    fn is_counted(&self) -> bool {
        self.count.is_some_and(|count| self.begun >= count)
    }

    /// The next command that writes what was not filled yet.
    fn next_fill(&mut self, lane: usize, now: Instant) -> Option<Command> {
        if self.idle[lane].is_empty() {
            return None;
        }
        for volume in 0..self.targets.len() {
            let target = &mut self.targets[volume];
            let Some(place) = target.fill.next() else { continue };
            if let Some(ledger) = &mut target.ledger {
                assert_eq!(ledger.take(place), Some(place), "each place is filled once");
            }
            let (tag, data) = self.idle[lane].pop().expect("it was just looked at");
            let sent = Sent { since: now, volume: volume as u32, is_write: true, place, generation: 1 };
            return Some(self.command(tag, data, sent));
        }
        None
    }

    /// The next command that reads what was written.
    fn next_check(&mut self, lane: usize, now: Instant) -> Option<Command> {
        if self.idle[lane].is_empty() {
            return None;
        }
        for volume in 0..self.targets.len() {
            let target = &mut self.targets[volume];
            let Some(ledger) = &mut target.ledger else { continue };
            let Some(place) = ledger.next_known(target.checked) else { continue };
            target.checked = place + 1;
            // What is still on its way from the measuring, if it was given up, is not waited for.
            if ledger.take(place) != Some(place) {
                continue;
            }
            let generation = ledger.generation(place);
            let (tag, data) = self.idle[lane].pop().expect("it was just looked at");
            let sent = Sent { since: now, volume: volume as u32, is_write: false, place, generation };
            return Some(self.command(tag, data, sent));
        }
        None
    }

    #[inline(always)]
    fn command(&mut self, tag: u64, mut data: Buffers, sent: Sent) -> Command {
        let Sent { volume, is_write, place, .. } = sent;
        self.sent[tag as usize] = sent;
        self.outstanding += 1;
        let target = &self.targets[volume as usize];
        let blocks = target.blocks_per_io;
        let lba = (target.first + place) * u64::from(blocks);
        if is_write && target.ledger.is_some() {
            self.stamp(tag, lba, &mut data);
        }
        Command { tag, volume: volume as usize, is_write, lba, blocks, data }
    }

    /// Fills the payload of a verified write.
    fn stamp(&mut self, tag: u64, lba: u64, data: &mut Buffers) {
        let sent = self.sent[tag as usize];
        let target = &self.targets[sent.volume as usize];
        let (run, volume, block_bytes) = (self.run, target.volume.number, target.volume.block_bytes as usize);
        self.scratch.resize(block_bytes, 0);
        for n in 0..u64::from(target.blocks_per_io) {
            Stamp { run, volume, lba: lba + n, generation: sent.generation }.fill(&mut self.scratch);
            data.write_at(n as usize * block_bytes, &self.scratch);
        }
    }

    #[inline]
    fn complete(&mut self, lane: usize, done: Done, now: Instant) {
        let sent = self.sent[done.tag as usize];
        self.outstanding -= 1;
        let failed = done.error.is_some();
        if let Some(error) = done.error {
            self.report.fail(&error, 1);
        } else if self.phase == Phase::Measure || self.phase == Phase::Drain {
            self.report.histogram.add(now.nanos_since(sent.since));
            if self.phase == Phase::Measure {
                self.report.completed += 1;
                self.report.by_queue[lane] += 1;
                self.report.reads += u64::from(!sent.is_write);
            }
        }
        if self.options.verify {
            self.settle(sent, failed, &done.data);
        }
        self.idle[lane].push((done.tag, done.data));
    }

    /// Checks what a read brought, notes what a write left, and frees the place.
    fn settle(&mut self, sent: Sent, failed: bool, data: &Buffers) {
        let target = &mut self.targets[sent.volume as usize];
        let ledger = target.ledger.as_mut().expect("a verified run keeps account");
        ledger.release(sent.place);
        if sent.is_write {
            // Of a write that failed nobody knows what it did.
            ledger.set(sent.place, if failed { 0 } else { sent.generation });
            return;
        }
        if failed || sent.generation == 0 {
            return;
        }
        let verified = self.report.verified.as_mut().expect("a verified run reports that");
        let block_bytes = target.volume.block_bytes as usize;
        self.scratch.resize(block_bytes, 0);
        for n in 0..target.blocks_per_io {
            data.read_at(n as usize * block_bytes, &mut self.scratch);
            let lba = (target.first + sent.place) * u64::from(target.blocks_per_io) + u64::from(n);
            let right = Stamp { run: self.run, volume: target.volume.number, lba, generation: sent.generation };
            verified.checked_blocks += 1;
            if let Err(why) = right.check(&mut self.scratch) {
                verified.mismatch(why);
            }
        }
    }
}

impl<D: Device> Engine<D> {
    /// Member `index` of a crew; it will send its report to `out`.
    pub fn new(
        cx: &Context,
        device: D,
        options: LoadOptions,
        (crew, index): (Arc<Crew>, usize),
        out: mpsc::Sender<Report>,
    ) -> Engine<D> {
        let (now, platform) = (cx.read_clock(), cx.platform());
        let report = Report::empty(index, options.verify);
        let my_count = |count| share(count, index, crew.size());
        let count = options.count.map(|count| my_count(count).end - my_count(count).start);
        let load = Load {
            options,
            targets: Vec::new(),
            run: platform.random_u64(),
            random: platform.random_u64() | 1,
            turn: 0,
            sent: Vec::new(),
            idle: Vec::new(),
            outstanding: 0,
            begun: 0,
            count,
            pace: None,
            scratch: Vec::new(),
            phase: Phase::SetUp,
            report,
        };
        Engine {
            device,
            load,
            depth: 0,
            phase_ends: now,
            measured_from: now,
            cpu_from: 0.0,
            busy_from_ns: 0,
            crew,
            index,
            hurries: false,
            out: Some(out),
        }
    }

    /// The device is ready: checks the sizes and takes the memory.
    fn begin(&mut self, ready: Ready, now: Instant) -> Result<(), String> {
        let bs = self.load.options.bs;
        if let Some(max) = ready.max_bytes.filter(|max| u64::from(bs) > *max) {
            return Err(format!(
                "--bs {bs} is more than the {max} bytes that one command may have; give a smaller one"
            ));
        }
        let members = self.crew.size();
        if self.index == 0 && ready.depth < usize::from(self.load.options.qd) {
            eprintln!("note: --qd {} is more than a queue takes; it is {} now", self.load.options.qd, ready.depth);
        }
        let count = ready.lanes * ready.depth;
        if (count * members) as u64 * u64::from(bs) > MAX_PAYLOAD_BYTES {
            let limit = MAX_PAYLOAD_BYTES >> 30;
            return Err(format!(
                "--queues, --qd and --bs together take more than {limit} GiB of memory; lower one of them"
            ));
        }
        let mut all_places = 0;
        for volume in ready.volumes {
            let target = self.target(volume, count, &mut all_places)?;
            self.load.targets.push(target);
        }
        if self.load.targets.is_empty() {
            return Err("there is nothing to put a load on".into());
        }
        self.depth = ready.depth;
        self.load.sent = vec![Sent { since: now, volume: 0, is_write: false, place: 0, generation: 0 }; count];
        for lane in 0..ready.lanes {
            let tags = lane * ready.depth..(lane + 1) * ready.depth;
            let with_memory = tags.map(|tag| {
                let mut data = self.device.memory(bs as usize);
                data.fill(tag as u8);
                (tag as u64, data)
            });
            self.load.idle.push(with_memory.collect());
        }
        (self.load.report.by_queue, self.load.report.depth) = (vec![0; ready.lanes], ready.depth);
        if self.load.options.fill {
            self.go_on(Phase::Fill, Doing::Filling);
        } else {
            self.muster();
        }
        Ok(())
    }

    /// What this member does on a volume, with `count` commands at once; `all_places` counts the places of all volumes.
    fn target(&self, volume: Volume, count: usize, all_places: &mut u64) -> Result<Target, String> {
        let (bs, members) = (self.load.options.bs, self.crew.size());
        let block = volume.block_bytes;
        if !bs.is_multiple_of(block) || bs / block > 65536 {
            return Err(format!("--bs {bs} is not 1 to 65536 blocks of {block} bytes; give a multiple of {block}"));
        }
        let bytes = (volume.blocks * u64::from(block)).min(self.load.options.size.unwrap_or(u64::MAX));
        let places = bytes / u64::from(bs);
        if places == 0 {
            return Err(format!("volume {}: {bytes} bytes are less than one command of --bs {bs}", volume.number));
        }
        *all_places += places;
        let in_order = matches!(self.load.options.rw, Mode::Read | Mode::Write);
        let mine = share(places, self.index, members);
        // At random all may go everywhere, unless they keep account of what they find.
        let of = if in_order || self.load.options.verify { mine.clone() } else { 0..places };
        let (first, places) = (of.start, of.end - of.start);
        let fill = if self.load.options.fill { mine.start - first..mine.end - first } else { 0..0 };
        if places == 0 {
            return Err(format!(
                "volume {}: there are fewer commands of --bs {bs} in it than cores; give fewer with --core",
                volume.number
            ));
        }
        let ledger = match self.load.options.verify {
            true if *all_places > MAX_PLACES => {
                return Err(
                    "--verify cannot keep account of so many places; limit them with --size, or raise --bs".into()
                );
            }
            true if places < count as u64 => {
                return Err(format!(
                    "--verify needs a place for each of {count} commands, and volume {} has {places}; lower --qd or --queues",
                    volume.number
                ));
            }
            true => Some(Ledger::new(places as usize)),
            false => None,
        };
        let blocks_per_io = bs / block;
        Ok(Target { volume, blocks_per_io, first, places, next: 0, fill, ledger, checked: 0 })
    }

    fn go_on(&mut self, phase: Phase, doing: Doing) {
        self.load.phase = phase;
        self.crew.member(self.index).does(doing);
    }

    /// Waits for the others.
    fn muster(&mut self) {
        self.load.phase = Phase::Muster;
        self.crew.is_ready();
    }

    /// All are there: the load begins.
    fn warm_up(&mut self, now: Instant) {
        let warmup = if self.load.count.is_some() { 0.0 } else { self.load.options.warmup };
        self.go_on(Phase::WarmUp, Doing::WarmingUp);
        self.phase_ends = now + Duration::from_secs_f64(warmup);
        let members = self.crew.size() as f64;
        self.load.pace = self.load.options.rate.map(|rate| Pace {
            // In turn with the others.
            from: now + Duration::from_secs_f64(self.index as f64 / rate),
            per_second: rate / members,
            sent: 0,
        });
    }

    /// One poll and one send a lane.
    fn turn(&mut self, cx: &mut Context) -> Result<bool, String> {
        let mut busy = false;
        let Engine { device, load, .. } = self;
        for lane in 0..load.idle.len() {
            let mut read = None;
            busy |= device.poll(lane, cx.now(), |done| {
                let now = *read.get_or_insert_with(|| cx.read_clock());
                load.complete(lane, done, now);
            })?;
            let now = read.unwrap_or(cx.now());
            match load.phase {
                Phase::WarmUp | Phase::Measure => {
                    while let Some(command) = load.next_command(lane, now) {
                        device.submit(lane, command, now);
                    }
                }
                Phase::Fill => {
                    while let Some(command) = load.next_fill(lane, now) {
                        device.submit(lane, command, now);
                    }
                }
                Phase::Check => {
                    while let Some(command) = load.next_check(lane, now) {
                        device.submit(lane, command, now);
                    }
                }
                _ => {}
            }
            device.send(lane, cx)?;
        }
        Ok(busy)
    }

    fn step(&mut self, cx: &mut Context) -> Result<bool, String> {
        let now = cx.now();
        if self.crew.must_stop() && !self.hurries {
            self.hurries = true;
            self.load.report.interrupted = self.crew.is_interrupted();
            self.phase_ends = self.phase_ends.min(now + SHORT_PATIENCE);
        }
        match self.load.phase {
            Phase::Over => return Ok(false),
            Phase::SetUp if self.hurries => self.part(),
            Phase::SetUp => {
                let ready = self.device.set_up(cx)?;
                let is_ready = ready.is_some();
                ready.map_or(Ok(()), |ready| self.begin(ready, now))?;
                return Ok(is_ready);
            }
            _ => {}
        }
        match self.work(cx, now) {
            // The one with the controller has left already, and taken the queues of the others with it.
            Err(_) if self.load.phase == Phase::Parting && self.crew.are_done() => {
                self.finish(cx);
                Ok(true)
            }
            other => other,
        }
    }

    fn work(&mut self, cx: &mut Context, now: Instant) -> Result<bool, String> {
        let mut busy = self.device.tend(cx)?;
        self.next_phase(cx, now)?;
        if self.load.phase != Phase::Over {
            busy |= self.turn(cx)?;
            self.crew.member(self.index).show(self.load.report.completed, self.load.report.errors);
        }
        Ok(busy)
    }

    /// Goes on to the next phase if this one is at its end.
    fn next_phase(&mut self, cx: &mut Context, now: Instant) -> Result<(), String> {
        let stop = self.hurries;
        let is_quiet = self.load.outstanding == 0;
        match self.load.phase {
            Phase::Fill | Phase::Muster if stop => self.drain(Phase::Drain, now),
            Phase::Fill if self.load.targets.iter().all(|target| target.fill.is_empty()) => {
                self.drain(Phase::FillDrain, now);
            }
            Phase::FillDrain if is_quiet => self.muster(),
            Phase::Muster if self.crew.are_ready() => {
                self.warm_up(now);
                // Without a warm-up the first command is measured.
                if now >= self.phase_ends {
                    self.measure(cx, now);
                }
            }
            Phase::WarmUp if stop => self.drain(Phase::Drain, now),
            Phase::WarmUp if now >= self.phase_ends => self.measure(cx, now),
            // What was asked for is measured to its end.
            Phase::Measure if self.load.is_counted() && !is_quiet && !stop && now < self.phase_ends => {}
            Phase::Measure if stop || now >= self.phase_ends || self.load.is_counted() => {
                self.stop_measuring(cx);
                self.drain(Phase::Drain, now);
            }
            Phase::Drain if is_quiet && self.load.options.verify && !stop => self.go_on(Phase::Check, Doing::Checking),
            Phase::Drain if is_quiet => self.part(),
            Phase::Check if stop || self.is_checked() => self.drain(Phase::CheckDrain, now),
            Phase::CheckDrain if is_quiet => {
                let complete = self.is_checked();
                if let Some(verified) = &mut self.load.report.verified {
                    verified.complete = complete;
                }
                self.part();
            }
            Phase::FillDrain | Phase::Drain | Phase::CheckDrain if now >= self.phase_ends => {
                return Err(format!(
                    "{} commands did not complete in the end; see what the device does",
                    self.load.outstanding
                ));
            }
            Phase::Parting if self.crew.are_done() => self.finish(cx),
            _ => {}
        }
        Ok(())
    }

    fn measure(&mut self, cx: &Context, now: Instant) {
        self.go_on(Phase::Measure, Doing::Measuring);
        (self.measured_from, self.cpu_from) = (now, cpu_seconds());
        self.busy_from_ns = cx.stats().busy_ns;
        let time = self.load.options.time.unwrap_or(if self.load.count.is_some() { 1e7 } else { super::DEFAULT_TIME });
        self.phase_ends = now + Duration::from_secs_f64(time);
    }

    /// Nothing is outstanding, and nothing will be: waits for the others.
    fn part(&mut self) {
        self.load.phase = Phase::Parting;
        self.crew.is_done();
    }

    fn drain(&mut self, phase: Phase, now: Instant) {
        self.go_on(phase, if phase == Phase::FillDrain { Doing::Filling } else { Doing::Finishing });
        self.phase_ends = now + if self.hurries { SHORT_PATIENCE } else { PATIENCE.max(self.load.options.patience()) };
    }

    fn is_checked(&self) -> bool {
        let unchecked = |target: &Target| target.ledger.as_ref().and_then(|ledger| ledger.next_known(target.checked));
        self.load.targets.iter().all(|target| unchecked(target).is_none())
    }

    fn stop_measuring(&mut self, cx: &Context) {
        let now = cx.now();
        self.load.report.seconds = now.since(self.measured_from).as_secs_f64();
        let busy_ns = cx.stats().busy_ns - self.busy_from_ns;
        self.load.report.busy = (busy_ns as f64 / 1e9 / self.load.report.seconds.max(1e-9)).min(1.0);
        self.load.report.cpu_s = cpu_seconds() - self.cpu_from;
        self.load.report.late = self.load.pace.map_or(0, |pace| pace.waiting(now));
    }

    fn finish(&mut self, cx: &mut Context) {
        self.load.phase = Phase::Over;
        self.device.leave(cx);
        self.send_report();
    }

    fn send_report(&mut self) {
        if let Some(out) = self.out.take() {
            // Whoever waited for it may be gone.
            let _ = out.send(std::mem::replace(&mut self.load.report, Report::empty(self.index, false)));
        }
    }

    /// It cannot go on: the others stop, too.
    fn fail(&mut self, why: String) {
        self.load.report.failure = Some(why);
        self.crew.fail();
        if self.load.phase != Phase::Parting {
            self.crew.is_done();
        }
    }
}

impl<D> Drop for Engine<D> {
    fn drop(&mut self) {
        // Its reactor is unwinding: nobody shall wait for it.
        if let Some(out) = self.out.take() {
            self.crew.fail();
            self.crew.is_done();
            let mut report = Report::empty(self.index, false);
            report.failure = Some("a reactor of the load ended before its time; see the messages above".into());
            let _ = out.send(report);
        }
    }
}

impl<D: Device> Poller for Engine<D> {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        match self.step(cx) {
            Ok(busy) => Progress::from_busy(busy),
            Err(why) => {
                self.fail(why);
                // Commands whose fate is unknown count as errors.
                self.load.report.errors += self.load.outstanding as u64;
                if self.load.phase == Phase::Measure {
                    self.stop_measuring(cx);
                }
                self.finish(cx);
                Progress::Busy
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn shares_are_the_whole() {
        for (whole, members) in [(0, 1), (1, 3), (7, 3), (600, 2), (u64::MAX, 5)] {
            let shares: Vec<_> = (0..members).map(|member| share(whole, member, members)).collect();
            assert_eq!((shares[0].start, shares[members - 1].end), (0, whole));
            assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
        }
    }
}
