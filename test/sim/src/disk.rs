//! Files on simulated disks: latency, completion out of order, a volatile cache, torn writes, errors, a full disk.
//!
//! # Contents
//! A file is sectors of [`DiskRules::sector`] bytes, the unit that a power failure leaves whole. Each sector has what is on the
//! medium, and the versions that were written since and are only in the cache. At [`Disks::crash`] each sector keeps the
//! medium's contents or any of its versions, independently of the others, and of each write that is under way any of its
//! sectors may have arrived: so a write is lost, torn or reordered unless a sync or its own durability says otherwise.
//!
//! # Operations
//! An operation takes effect in two parts at two moments between its submission and its completion, so that what runs
//! at the same time sees half of it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bdev::conformance::Rng;
use reactor::file::{
    Errno, File, FileDone, FileEngine, FileInfo, FileOp, FileRequest, FileSlot, Files, OpenOptions, Payload,
};
use reactor::park::Source;

use crate::park::Parks;
use crate::sim::{Agenda, Event, Sim, State};
use crate::trace;

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// How the disks behave.
#[derive(Clone, Copy, Debug)]
pub struct DiskRules {
    /// Bytes that are written whole or not at all; must not change once there are files.
    pub sector: usize,
    /// Time of an operation in nanoseconds, from and to.
    pub latency_ns: (u64, u64),
    /// One operation in so many takes a thousand times as long; 0: none.
    pub slow_one_in: u64,
    /// One read in so many fails; 0: none.
    pub read_error_one_in: u64,
    /// One write in so many fails, after any part of it; 0: none.
    pub write_error_one_in: u64,
    /// One sync in so many fails; 0: none.
    pub sync_error_one_in: u64,
    /// Sectors that all files together may occupy.
    pub capacity_sectors: usize,
    /// Writes stay in a cache until a sync.
    pub volatile_cache: bool,
    /// Files can be opened for direct I/O.
    pub direct: bool,
    /// Space can be given back, and reads as zeroes then.
    pub discard: bool,
    /// The next replacement of a small file but so many is where the power fails; 0: none.
    pub fail_at_replace: u64,
    /// Operations that the host works on at once; further ones wait in the engine, in order.
    pub queue_depth: usize,
}

impl Default for DiskRules {
    fn default() -> DiskRules {
        DiskRules {
            sector: 512,
            latency_ns: (5_000, 500_000),
            slow_one_in: 0,
            read_error_one_in: 0,
            write_error_one_in: 0,
            sync_error_one_in: 0,
            capacity_sectors: usize::MAX,
            volatile_cache: true,
            direct: true,
            discard: true,
            fail_at_replace: 0,
            queue_depth: 32,
        }
    }
}

/// `None` is a sector of zeroes that occupies nothing.
type Sector = Option<Arc<[u8]>>;

#[derive(Clone, Default)]
struct Image {
    bytes: u64,
    medium: BTreeMap<u64, Sector>,
    /// Versions since, each with its running number.
    cached: BTreeMap<u64, Vec<(u64, Sector)>>,
    locked: bool,
    sector: usize,
}

impl Image {
    fn sector(&self, index: u64) -> &Sector {
        match self.cached.get(&index).and_then(|versions| versions.last()) {
            Some((_, sector)) => sector,
            None => self.medium.get(&index).unwrap_or(&None),
        }
    }

    /// Everything up to version `upto` of a sector is on the medium.
    fn settle(&mut self, index: u64, upto: u64) {
        let Some(versions) = self.cached.get_mut(&index) else { return };
        let durable = versions.iter().take_while(|(number, _)| *number <= upto).count();
        if let Some((_, sector)) = versions.drain(..durable).next_back() {
            self.medium.insert(index, sector);
        }
        if versions.is_empty() {
            self.cached.remove(&index);
        }
    }

    fn set_len(&mut self, bytes: u64) {
        if bytes < self.bytes {
            let (whole, rest) = (bytes / self.sector as u64, (bytes % self.sector as u64) as usize);
            let kept = self.sector(whole).clone();
            self.medium.retain(|index, _| *index < whole);
            self.cached.retain(|index, _| *index < whole);
            if rest > 0
                && let Some(mut sector) = kept.map(|sector| sector.to_vec())
            {
                sector[rest..].fill(0);
                self.medium.insert(whole, Some(sector.into()));
            }
        }
        self.bytes = bytes;
    }
}

struct Op {
    engine: usize,
    slot: FileSlot,
    file: PathBuf,
    op: FileOp,
    offset: u64,
    len: u64,
    token: u64,
    payload: Box<dyn Payload>,
    /// Sectors of the first part.
    first: u64,
    /// Running number of the last version that was there when it was submitted.
    submitted_at: u64,
    fails: Option<i32>,
    sector: u64,
}

impl Op {
    fn sectors(&self) -> std::ops::Range<u64> {
        self.offset / self.sector..(self.offset + self.len).div_ceil(self.sector)
    }

    fn parts(&self) -> [std::ops::Range<u64>; 2] {
        let all = self.sectors();
        let cut = (all.start + self.first).min(all.end);
        [all.start..cut, cut..all.end]
    }
}

pub(crate) enum DiskEvent {
    First(u64),
    Done(u64),
}

#[derive(Default)]
struct Engine {
    waiting: VecDeque<Op>,
    working: usize,
    done: VecDeque<(FileSlot, FileDone)>,
}

#[derive(Default)]
pub(crate) struct Disks {
    pub(crate) rules: DiskRules,
    images: BTreeMap<PathBuf, Image>,
    small: BTreeMap<PathBuf, Vec<u8>>,
    ops: BTreeMap<u64, Op>,
    next_op: u64,
    next_version: u64,
    occupied: BTreeSet<(PathBuf, u64)>,
    engines: Vec<Engine>,
    power_failed: bool,
}

impl Disks {
    /// What is left after the power has failed.
    pub(crate) fn crash(&mut self, rng: &mut Rng) -> Disks {
        let mut under_way: Vec<Op> = std::mem::take(&mut self.ops).into_values().collect();
        for op in &mut under_way {
            for part in op.parts() {
                for sector in part.filter(|_| rng.one_in(2)) {
                    let _ = self.apply(op, sector..sector + 1);
                }
            }
        }
        for image in self.images.values_mut() {
            image.locked = false;
            for (index, versions) in std::mem::take(&mut image.cached) {
                let kept = rng.below(versions.len() as u64 + 1) as usize;
                if kept > 0 {
                    image.medium.insert(index, versions[kept - 1].1.clone());
                }
            }
        }
        Disks {
            rules: DiskRules { fail_at_replace: 0, ..self.rules },
            images: std::mem::take(&mut self.images),
            small: std::mem::take(&mut self.small),
            occupied: std::mem::take(&mut self.occupied),
            ..Disks::default()
        }
    }

    fn start(&mut self, engine: usize, rng: &mut Rng, agenda: &mut Agenda) {
        while self.engines[engine].working < self.rules.queue_depth {
            let Some(mut op) = self.engines[engine].waiting.pop_front() else { break };
            self.engines[engine].working += 1;
            let rules = &self.rules;
            let one_in = match op.op {
                FileOp::Read => rules.read_error_one_in,
                FileOp::Sync => rules.sync_error_one_in,
                _ => rules.write_error_one_in,
            };
            op.fails = (one_in > 0 && rng.one_in(one_in)).then_some(EIO);
            let count = op.sectors();
            op.first = rng.below(count.end - count.start + 1);
            op.submitted_at = self.next_version;
            let mut latency = State::skewed(rng, rules.latency_ns);
            if rules.slow_one_in > 0 && rng.one_in(rules.slow_one_in) {
                latency = latency.saturating_mul(1000);
            }
            self.next_op += 1;
            trace::event("disk start", self.next_op, op.offset, op.len);
            agenda.after(rng.below(latency + 1), Event::Disk(DiskEvent::First(self.next_op)));
            agenda.after(latency, Event::Disk(DiskEvent::Done(self.next_op)));
            self.ops.insert(self.next_op, op);
        }
    }

    pub(crate) fn happen(&mut self, event: DiskEvent, rng: &mut Rng, agenda: &mut Agenda, parks: &mut Parks) {
        match event {
            DiskEvent::First(id) => {
                // The second part may have the same instant and does not come before it: numbers order them.
                let Some(mut op) = self.ops.remove(&id) else { return };
                let [first, _] = op.parts();
                if let Err(errno) = self.apply(&mut op, first) {
                    op.fails = Some(errno);
                }
                self.ops.insert(id, op);
            }
            DiskEvent::Done(id) => {
                let Some(mut op) = self.ops.remove(&id) else { return };
                let [_, second] = op.parts();
                let result = match op.fails {
                    Some(errno) => Err(Errno(errno)),
                    None => self.apply(&mut op, second).map_err(Errno),
                };
                if result.is_ok() {
                    self.make_durable(&op);
                }
                trace::event("disk done", id, u64::from(result.is_err()), 0);
                let engine = &mut self.engines[op.engine];
                engine.working -= 1;
                engine.done.push_back((op.slot, FileDone { token: op.token, payload: op.payload, result }));
                parks.flags(op.engine).engine_done();
                self.start(op.engine, rng, agenda);
            }
        }
    }

    /// What an operation that has succeeded promises about the medium.
    fn make_durable(&mut self, op: &Op) {
        let Some(image) = self.images.get_mut(&op.file) else { return };
        match op.op {
            FileOp::Sync => {
                for index in image.cached.keys().copied().collect::<Vec<_>>() {
                    image.settle(index, op.submitted_at);
                }
            }
            FileOp::Read => {}
            FileOp::Write { durable } if !durable && self.rules.volatile_cache => {}
            _ if matches!(op.op, FileOp::Write { .. }) || !self.rules.volatile_cache => {
                for index in op.sectors() {
                    // Its own version is among those that are there now.
                    image.settle(index, self.next_version);
                }
            }
            _ => {}
        }
    }

    /// Lets some sectors of an operation take effect.
    fn apply(&mut self, op: &mut Op, sectors: std::ops::Range<u64>) -> Result<(), i32> {
        let Some(image) = self.images.get_mut(&op.file) else { return Err(EIO) };
        let (size, zeroes) = (self.rules.sector, vec![0; self.rules.sector]);
        for index in sectors {
            let start = index * size as u64;
            let at = start.max(op.offset);
            let end = (start + size as u64).min(op.offset + op.len);
            let (from, to) = ((at - start) as usize, (end - start) as usize);
            match op.op {
                FileOp::Sync => {}
                FileOp::Read => {
                    let beyond = start >= image.bytes;
                    let bytes = image.sector(index).as_deref().filter(|_| !beyond).unwrap_or(&zeroes);
                    op.payload.buffers().write_at((at - op.offset) as usize, &bytes[from..to]);
                }
                FileOp::Write { .. } | FileOp::Discard { .. } | FileOp::WriteZeroes { .. } => {
                    let mut bytes = image.sector(index).as_deref().map_or(zeroes.clone(), <[u8]>::to_vec);
                    if matches!(op.op, FileOp::Write { .. }) {
                        op.payload.buffers().read_at((at - op.offset) as usize, &mut bytes[from..to]);
                    } else {
                        bytes[from..to].fill(0);
                    }
                    let gives_back =
                        matches!(op.op, FileOp::Discard { .. } | FileOp::WriteZeroes { may_unmap: true, .. });
                    let key = (op.file.clone(), index);
                    let sector: Sector = if gives_back && bytes.iter().all(|&byte| byte == 0) {
                        self.occupied.remove(&key);
                        None
                    } else {
                        if !self.occupied.contains(&key) {
                            if self.occupied.len() >= self.rules.capacity_sectors {
                                return Err(ENOSPC);
                            }
                            self.occupied.insert(key);
                        }
                        Some(bytes.into())
                    };
                    self.next_version += 1;
                    image.cached.entry(index).or_default().push((self.next_version, sector));
                    image.bytes = image.bytes.max(end);
                }
            }
        }
        Ok(())
    }
}

/// Files of a simulated machine.
#[derive(Debug)]
pub struct SimFiles(Arc<Sim>);

impl SimFiles {
    /// The files of `sim`.
    pub fn new(sim: &Arc<Sim>) -> SimFiles {
        SimFiles(Arc::clone(sim))
    }

    /// Whether the power failed within a replacement (see [`DiskRules::fail_at_replace`]).
    pub fn power_failed(&self) -> bool {
        self.0.lock().disks.power_failed
    }
}

fn not_found(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{} does not exist", path.display()))
}

impl Files for SimFiles {
    fn open(&self, path: &Path, options: OpenOptions) -> io::Result<Arc<dyn File>> {
        let mut state = self.0.lock();
        let rules = state.disks.rules;
        let image = state.disks.images.get_mut(path).ok_or_else(|| not_found(path))?;
        if !options.read_only {
            if image.locked {
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, "it is open for writing already"));
            }
            image.locked = true;
        }
        let direct = options.direct && rules.direct;
        let info = FileInfo {
            bytes: image.bytes,
            io_unit: if direct { 512 } else { 1 },
            physical_block: 4096,
            block_device: false,
            direct,
            discard: rules.discard,
            discard_zeroes: rules.discard,
            write_zeroes: rules.discard,
            volatile_cache: rules.volatile_cache,
        };
        trace::event("open", image.bytes, direct.into(), 0);
        Ok(Arc::new(SimFile { sim: Arc::clone(&self.0), path: path.to_path_buf(), info, locks: !options.read_only }))
    }

    fn create(&self, path: &Path, bytes: u64) -> io::Result<()> {
        let mut state = self.0.lock();
        if state.disks.images.contains_key(path) || state.disks.small.contains_key(path) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{} exists", path.display())));
        }
        let sector = state.disks.rules.sector;
        state.disks.images.insert(path.to_path_buf(), Image { bytes, sector, ..Image::default() });
        Ok(())
    }

    fn set_len(&self, path: &Path, bytes: u64) -> io::Result<()> {
        let mut state = self.0.lock();
        state.disks.images.get_mut(path).ok_or_else(|| not_found(path))?.set_len(bytes);
        Ok(())
    }

    fn read(&self, path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
        let state = self.0.lock();
        let bytes = state.disks.small.get(path).ok_or_else(|| not_found(path))?;
        if bytes.len() as u64 > max_bytes {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes.clone())
    }

    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.0.lock();
        let state = &mut *state;
        let disks = &mut state.disks;
        if disks.power_failed {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        if disks.rules.fail_at_replace > 0 {
            disks.rules.fail_at_replace -= 1;
            if disks.rules.fail_at_replace == 0 {
                disks.power_failed = true;
                let done = state.rng.one_in(2);
                trace::event("power fails in replace", done.into(), 0, 0);
                if done {
                    disks.small.insert(path.to_path_buf(), bytes.to_vec());
                }
                return Err(io::Error::from_raw_os_error(EIO));
            }
        }
        disks.small.insert(path.to_path_buf(), bytes.to_vec());
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.0.lock();
        let disks = &mut state.disks;
        if let Some(bytes) = disks.small.remove(from) {
            disks.small.insert(to.to_path_buf(), bytes);
        } else {
            let image = disks.images.remove(from).ok_or_else(|| not_found(from))?;
            disks.images.insert(to.to_path_buf(), image);
        }
        Ok(())
    }
}

struct SimFile {
    sim: Arc<Sim>,
    path: PathBuf,
    info: FileInfo,
    locks: bool,
}

impl File for SimFile {
    fn path(&self) -> &Path {
        &self.path
    }
    fn source(&self) -> Source {
        Source::Virtual(0)
    }
    fn info(&self) -> FileInfo {
        self.info
    }
    fn bytes(&self) -> io::Result<u64> {
        self.sim.lock().disks.images.get(&self.path).map(|image| image.bytes).ok_or_else(|| not_found(&self.path))
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let mut state = self.sim.lock();
        let used = state.disks.ops.values().any(|op| op.file == self.path);
        assert!(self.sim.is_off() || std::thread::panicking() || !used, "a file is closed under its operations");
        if let Some(image) = state.disks.images.get_mut(&self.path)
            && self.locks
        {
            image.locked = false;
        }
    }
}

/// One reactor's file engine.
pub(crate) struct SimEngine {
    sim: Arc<Sim>,
    index: usize,
    files: Vec<Option<Arc<dyn File>>>,
    /// Submitted since the last flush.
    batch: Vec<FileRequest>,
    outstanding: Vec<usize>,
    in_flight: usize,
}

impl SimEngine {
    pub(crate) fn new(sim: &Arc<Sim>, index: usize) -> SimEngine {
        let mut state = sim.lock();
        assert_eq!(state.disks.engines.len(), index, "one engine a reactor");
        state.disks.engines.push(Engine::default());
        SimEngine {
            sim: Arc::clone(sim),
            index,
            files: Vec::new(),
            batch: Vec::new(),
            outstanding: Vec::new(),
            in_flight: 0,
        }
    }
}

impl FileEngine for SimEngine {
    fn mode(&self) -> String {
        "simulated".into()
    }

    fn attach(&mut self, file: Arc<dyn File>) -> io::Result<FileSlot> {
        let free = self.files.iter().position(Option::is_none).unwrap_or(self.files.len());
        if free == self.files.len() {
            self.files.push(None);
            self.outstanding.push(0);
        }
        self.files[free] = Some(file);
        Ok(FileSlot(free as u32))
    }

    fn detach(&mut self, slot: FileSlot) {
        let index = slot.0 as usize;
        assert_eq!(self.outstanding[index], 0, "a file is detached under its operations");
        assert!(self.files[index].take().is_some(), "a file is detached twice");
    }

    fn submit(&mut self, request: FileRequest) {
        let index = request.slot.0 as usize;
        assert!(self.files[index].is_some(), "an operation on a file that is not attached");
        self.outstanding[index] += 1;
        self.in_flight += 1;
        self.batch.push(request);
    }

    fn flush(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let mut state = self.sim.lock();
        let state = &mut *state;
        for mut request in self.batch.drain(..) {
            let file = self.files[request.slot.0 as usize].as_ref().expect("checked when it was submitted");
            let len = match request.op {
                FileOp::Read | FileOp::Write { .. } => request.payload.buffers().len() as u64,
                FileOp::Discard { len } | FileOp::WriteZeroes { len, .. } => len,
                FileOp::Sync => 0,
            };
            let info = file.info();
            if info.direct && matches!(request.op, FileOp::Read | FileOp::Write { .. }) {
                let unit = u64::from(info.io_unit);
                assert!(request.offset.is_multiple_of(unit) && len.is_multiple_of(unit), "direct I/O is not aligned");
            }
            state.disks.engines[self.index].waiting.push_back(Op {
                engine: self.index,
                slot: request.slot,
                file: file.path().to_path_buf(),
                op: request.op,
                offset: request.offset,
                len,
                token: request.token,
                payload: request.payload,
                first: 0,
                submitted_at: 0,
                fails: None,
                sector: state.disks.rules.sector as u64,
            });
        }
        state.disks.start(self.index, &mut state.rng, &mut state.agenda);
    }

    fn reap(&mut self, out: &mut Vec<FileDone>) -> usize {
        let mut state = self.sim.lock();
        let state = &mut *state;
        let done = &mut state.disks.engines[self.index].done;
        // Not always everything that is there.
        let count = if done.is_empty() { 0 } else { 1 + state.rng.below(done.len() as u64) as usize };
        if count < done.len() {
            state.parks.flags(self.index).engine_done();
        }
        for (slot, done) in done.drain(..count) {
            self.outstanding[slot.0 as usize] -= 1;
            out.push(done);
        }
        self.in_flight -= count;
        count
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}
