//! The store as a handler: an [`Engine`] on a worker's thread, a [`BaseClient`] below it.
//!
//! The store is opened while the device is made, so that whoever makes it is told why it cannot be. Should the worker panic, the
//! next one waits until what the last one asked of the base has ended, and opens the store again, as after a crash of the process;
//! whatever had been acknowledged is there, since it was written before, and the base has not lost its power. A request that the
//! worker had fails.
//!
//! # A change of size
//! has ended when it is durable: the size is saved with the configuration then, and a store that has blocks beyond it is refused.
//! So the worker carries it out, behind the requests that came before it, while later ones wait.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use appliance::request::in_panic;
use appliance::{Batch, Capabilities, Handler, Request, RequestId, Worker, WorkerCx};
use reactor::{Instant, Progress};
use serde_json::{Map, Value, json};
use slab::Slab;

use super::engine::{self, Engine, LogOp};
use super::format::MAX_BLOCKS;
use super::recovery::{BaseIo, BaseOp, Config, Opened, Recovery};
use crate::core::{BdevError, Geometry, IoStatus, Op, OpKind, OpSet};
use crate::modules::appliance::base::{BaseClient, Closer};
use crate::modules::appliance::builtin::Maker;

/// Bytes that one read or write may move.
const MAX_RW_BYTES: u32 = 1 << 20;
/// The tag of a change of size among those of requests.
const RESIZE: u64 = u64::MAX;
/// Rounds of a worker after which its counters are shown, if it does not sleep before.
const SHOW_EVERY: u32 = 256;

/// The handler.
pub struct LogStore(Arc<Inner>);

struct Inner {
    config: Config,
    base: String,
    base_block: u32,
    closer: Closer,
    seat: Mutex<Option<Seat>>,
    size: Mutex<Size>,
    shown: Mutex<Value>,
}

/// The size of the device; outlives workers.
struct Size {
    num_blocks: u64,
    /// A change that is under way.
    wanted: Option<u64>,
    /// How it has ended, until somebody was told.
    outcome: Option<io::Result<()>>,
}

/// What one worker leaves to the next.
struct Seat {
    client: BaseClient,
    opened: Option<Opened>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What `options` may have.
struct Options {
    base: String,
    segment_bytes: Option<u32>,
    compress: bool,
    format: bool,
    accept_loss: bool,
}

impl Options {
    fn parse(options: &Value) -> Result<Options, BdevError> {
        let empty = Map::new();
        let map = options.as_object().unwrap_or(&empty);
        let invalid = |reason: String| BdevError::invalid("options", options, reason);
        let flag = |name: &str| match map.get(name) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(invalid(format!("{name} is true or false, not {other}"))),
        };
        let known = ["base_bdev", "segment_bytes", "compression", "format", "accept_loss"];
        if let Some(unknown) = map.keys().find(|name| !known.contains(&name.as_str())) {
            return Err(invalid(format!("there is no option {unknown}; there are {}", known.join(", "))));
        }
        let base = map.get("base_bdev").and_then(Value::as_str);
        let base =
            base.ok_or_else(|| invalid("base_bdev is missing: name the bdev that keeps the data".to_string()))?;
        let compress = match map.get("compression").map(|value| value.as_str().unwrap_or_default()) {
            None | Some("lz4") => true,
            Some("none") => false,
            Some(_) => return Err(invalid("compression is \"lz4\" or \"none\"".to_string())),
        };
        let segment_bytes = match map.get("segment_bytes") {
            None => None,
            Some(value) => {
                let bytes = value.as_u64().and_then(|bytes| u32::try_from(bytes).ok());
                Some(bytes.ok_or_else(|| invalid("segment_bytes is a number of bytes below 4 GiB".to_string()))?)
            }
        };
        let (format, accept_loss) = (flag("format")?, flag("accept_loss")?);
        Ok(Options { base: base.to_string(), segment_bytes, compress, format, accept_loss })
    }
}

/// Opens a store on its base, or formats it, and makes the handler.
///
/// # Errors
/// [`BdevError::Invalid`] for options that make no sense and for a store that is refused; as [`BaseClient::open`].
pub(in crate::modules::appliance) async fn make(maker: Maker) -> Result<Arc<dyn Handler>, BdevError> {
    let Maker { system, bdev, settings } = maker;
    if settings.workers != 1 {
        let reason = "a log store has one log, and one worker that writes it: leave it out, or give 1; for more threads cut the \
                      base with bdev_split_create, and make a store on each part";
        return Err(BdevError::invalid("workers", settings.workers, reason));
    }
    if settings.geometry.num_blocks > MAX_BLOCKS {
        let reason = format!("a log store has at most {MAX_BLOCKS} blocks");
        return Err(BdevError::invalid("num_blocks", settings.geometry.num_blocks, reason));
    }
    let options = Options::parse(&settings.options)?;
    let owner = format!("the log store '{bdev}'");
    let (mut client, base) = BaseClient::open(&system, &options.base, &owner, &bdev).await?;
    let below = base.device().geometry();
    let mut store = [0; 16];
    system.platform().random(&mut store);
    let config = Config {
        base_bytes: below.bytes(),
        base_block: below.block_size,
        base_physical: below.physical_block_size.max(below.block_size),
        base_volatile: below.volatile_cache,
        block_size: settings.geometry.block_size,
        num_blocks: settings.geometry.num_blocks,
        segment_bytes: options.segment_bytes,
        compress: options.compress,
        format: options.format,
        accept_loss: options.accept_loss,
        store,
    };
    let mut recovery = Recovery::new(config.clone());
    let opened = loop {
        if let Some(outcome) = recovery.take_outcome() {
            break outcome
                .map_err(|refusal| BdevError::invalid("options.base_bdev", &options.base, refusal.to_string()))?;
        }
        let Some(io) = recovery.next_io() else {
            return Err(BdevError::host("opening the store", io::Error::other("it asks for nothing")));
        };
        let (op, lba, blocks) = place(&io, below.block_size);
        let answer = client.call(op, lba, blocks, io.bufs).await?;
        recovery.on_io_done(&answer.bufs, result_of(answer.status));
    };
    let report = opened.report;
    tracing::info!(
        bdev,
        base = base.name(),
        formatted = report.formatted,
        batches = report.batches,
        bytes = report.bytes,
        lost_blocks = report.lost_blocks,
        "log store opened"
    );
    // Once is enough: a worker that opens the store again finds it formatted.
    let config = Config { format: false, accept_loss: false, ..config };
    let inner = Inner {
        size: Mutex::new(Size { num_blocks: config.num_blocks, wanted: None, outcome: None }),
        config,
        base: options.base,
        base_block: below.block_size,
        closer: client.closer(),
        seat: Mutex::new(Some(Seat { client, opened: Some(opened) })),
        shown: Mutex::new(Value::Null),
    };
    Ok(Arc::new(LogStore(Arc::new(inner))))
}

/// An operation of the base in its blocks.
fn place(io: &BaseIo, block: u32) -> (Op, u64, u64) {
    let block = u64::from(block);
    let (lba, blocks) = (io.offset / block, io.bufs.len() as u64 / block);
    match io.op {
        BaseOp::Read => (Op::Read, lba, blocks),
        BaseOp::Write => (Op::Write { fua: false }, lba, blocks),
        BaseOp::Flush => (Op::Flush, 0, 0),
    }
}

fn result_of(status: IoStatus) -> Result<(), IoStatus> {
    if status.is_success() { Ok(()) } else { Err(status) }
}

impl Handler for LogStore {
    fn name(&self) -> &str {
        "log"
    }

    fn capabilities(&self, geometry: &Geometry) -> Capabilities {
        Capabilities {
            ops: OpSet::of(&[OpKind::Read, OpKind::Write, OpKind::Flush, OpKind::Unmap, OpKind::WriteZeroes]),
            volatile_cache: self.0.config.base_volatile,
            unmap_zeroes: true,
            max_rw_blocks: MAX_RW_BYTES / geometry.block_size,
        }
    }

    fn worker(&self, cx: WorkerCx) -> io::Result<Box<dyn Worker>> {
        let seat = lock(&self.0.seat).take().ok_or_else(|| io::Error::other("the store has a worker already"))?;
        let Seat { mut client, opened } = seat;
        client.set_waker(cx.waker);
        let phase = match opened {
            Some(opened) => Phase::Running(Box::new(Engine::new(self.0.config.clone(), opened))),
            None => Phase::Draining,
        };
        let size = lock(&self.0.size);
        Ok(Box::new(LogWorker {
            inner: Arc::clone(&self.0),
            client: Some(client),
            phase,
            requests: Slab::new(),
            num_blocks: size.num_blocks,
            wanted: size.wanted,
            resizing: false,
            rounds: 0,
        }))
    }

    fn resize(&self, num_blocks: u64) -> io::Result<()> {
        if num_blocks > MAX_BLOCKS {
            let text = format!("a log store has at most {MAX_BLOCKS} blocks");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        // The worker finds it in this round, on this thread, and before any request from behind the change.
        lock(&self.0.size).wanted = Some(num_blocks);
        Ok(())
    }

    fn stats(&self) -> Value {
        lock(&self.0.shown).clone()
    }

    fn stop(&self) {
        self.0.closer.close();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.closer.close();
    }
}

enum Phase {
    /// What an earlier worker asked of the base is still out.
    Draining,
    Opening(Box<Recovery>),
    Running(Box<Engine>),
    /// The store could not be opened again.
    Refused,
}

struct LogWorker {
    inner: Arc<Inner>,
    /// There until the end.
    client: Option<BaseClient>,
    phase: Phase,
    requests: Slab<Request>,
    num_blocks: u64,
    /// A change of size is to come or under way: requests wait.
    wanted: Option<u64>,
    /// The engine has it.
    resizing: bool,
    rounds: u32,
}

impl LogWorker {
    fn take_answers(&mut self) -> bool {
        let Some(client) = &mut self.client else { return false };
        let mut any = false;
        while let Some(answer) = client.answer() {
            any = true;
            let result = result_of(answer.status);
            match &mut self.phase {
                Phase::Running(engine) => engine.on_io_done(answer.token, answer.bufs, result),
                Phase::Opening(recovery) => recovery.on_io_done(&answer.bufs, result),
                Phase::Draining | Phase::Refused => {}
            }
        }
        any
    }

    /// Goes on with opening the store again.
    fn open(&mut self) {
        if matches!(self.phase, Phase::Draining) && self.client.as_ref().is_some_and(|client| client.out() == 0) {
            self.phase = Phase::Opening(Box::new(Recovery::new(self.config())));
        }
        let Phase::Opening(recovery) = &mut self.phase else { return };
        match recovery.take_outcome() {
            None => {}
            Some(Ok(opened)) => self.phase = Phase::Running(Box::new(Engine::new(self.config(), opened))),
            Some(Err(refusal)) => {
                tracing::error!(base = self.inner.base, "the log store cannot be opened again: {refusal}");
                self.phase = Phase::Refused;
            }
        }
    }

    fn config(&self) -> Config {
        Config { num_blocks: self.num_blocks, ..self.inner.config.clone() }
    }

    fn step_resize(&mut self) {
        let Some(num_blocks) = self.wanted else { return };
        match &mut self.phase {
            Phase::Running(engine) if !self.resizing => {
                self.resizing = true;
                engine.resize(num_blocks, RESIZE);
            }
            Phase::Refused => self.end_resize(Err(io::Error::other("the store could not be opened again"))),
            _ => {}
        }
    }

    fn end_resize(&mut self, result: io::Result<()>) {
        let mut size = lock(&self.inner.size);
        if let (Some(num_blocks), Ok(())) = (self.wanted, &result) {
            size.num_blocks = num_blocks;
            self.num_blocks = num_blocks;
        } else if let Phase::Running(engine) = &mut self.phase {
            engine.unresize(self.num_blocks);
        }
        (size.wanted, self.wanted, self.resizing) = (None, None, false);
        size.outcome = Some(result);
    }

    /// Asks the base for what is wanted of it.
    fn feed(&mut self) -> bool {
        let Some(client) = &mut self.client else { return false };
        let mut any = false;
        while client.room() > 0 {
            let io = match &mut self.phase {
                Phase::Running(engine) => engine.next_io(),
                Phase::Opening(recovery) => recovery.next_io(),
                Phase::Draining | Phase::Refused => None,
            };
            let Some(io) = io else { break };
            let (op, lba, blocks) = place(&io, self.inner.base_block);
            client.ask(io.tag, op, lba, blocks, io.bufs);
            any = true;
        }
        client.flush();
        any
    }

    /// Ends what has ended.
    fn complete(&mut self) -> bool {
        let Phase::Running(engine) = &mut self.phase else { return false };
        let (mut any, mut resized) = (false, None);
        while let Some(done) = engine.take_done() {
            any = true;
            if done.tag == RESIZE {
                resized = Some(done.status);
                continue;
            }
            let mut request = self.requests.remove(done.tag as usize);
            *request.bufs_mut() = done.bufs;
            request.complete(done.status);
        }
        if let Some(status) = resized {
            self.end_resize(match status {
                IoStatus::Success => Ok(()),
                failed => Err(io::Error::other(format!("what is behind the new end could not be forgotten: {failed}"))),
            });
        }
        any
    }

    fn show(&mut self) {
        self.rounds = 0;
        let shown = match &self.phase {
            Phase::Running(engine) => {
                let (counters, (free, segments)) = (engine.counters(), engine.segments());
                json!({
                    "state": if engine.failed().is_some() { "read_only" } else { "running" },
                    "base_bdev": self.inner.base,
                    "mapped_blocks": engine.mapped_blocks(),
                    "stored_bytes": engine.live_bytes(),
                    "room_bytes": engine.room_bytes(),
                    "segments": segments,
                    "free_segments": free,
                    "written_bytes": counters.written_bytes,
                    "packed_bytes": counters.stored_bytes,
                    "log_bytes": counters.log_bytes,
                    "checkpoints": counters.checkpoints,
                    "checkpoint_bytes": counters.checkpoint_bytes,
                    "moved_bytes": counters.moved_bytes,
                    "collected_segments": counters.collected_segments,
                    "bad_blocks": counters.bad_blocks,
                    "no_space": counters.no_space,
                    "restarts": counters.restarts,
                })
            }
            Phase::Draining | Phase::Opening(_) => json!({ "state": "opening", "base_bdev": self.inner.base }),
            Phase::Refused => json!({ "state": "refused", "base_bdev": self.inner.base }),
        };
        *lock(&self.inner.shown) = shown;
    }
}

impl Worker for LogWorker {
    fn submit(&mut self, batch: &mut Batch) {
        let engine = match &mut self.phase {
            Phase::Running(engine) if self.wanted.is_none() => engine,
            Phase::Refused => return batch.complete_all(IoStatus::Failed),
            _ => return,
        };
        for mut request in batch {
            let op = match request.op() {
                Op::Read => LogOp::Read,
                Op::Write { fua } => LogOp::Write { fua },
                Op::Flush => LogOp::Flush,
                Op::Unmap => LogOp::Zeroes { fua: false },
                Op::WriteZeroes { fua, .. } => LogOp::Zeroes { fua },
                _ => {
                    request.complete(IoStatus::NotSupported);
                    continue;
                }
            };
            let (lba, blocks, bufs) = (request.lba(), request.blocks(), std::mem::take(request.bufs_mut()));
            let tag = self.requests.insert(request) as u64;
            engine.submit(engine::Request { tag, op, lba, blocks, bufs });
        }
    }

    fn poll(&mut self, _: Instant) -> Progress {
        let mut busy = self.take_answers();
        self.open();
        self.step_resize();
        busy |= self.feed();
        busy |= self.complete();
        self.rounds += u32::from(busy);
        if self.rounds >= SHOW_EVERY {
            self.show();
        }
        Progress::from_busy(busy)
    }

    fn may_sleep(&mut self) -> bool {
        if self.rounds > 0 || lock(&self.inner.shown).is_null() {
            self.show();
        }
        // Who asked for another size is told in the next round.
        let told = lock(&self.inner.size).outcome.is_none();
        told && self.client.as_ref().is_none_or(|client| !client.has_answers())
    }

    fn resized(&mut self) -> Option<io::Result<()>> {
        let mut size = lock(&self.inner.size);
        self.wanted = size.wanted;
        // One that this worker finds ended was ended by the one before it, or just now.
        if self.wanted.is_none() { Some(size.outcome.take().unwrap_or(Ok(()))) } else { None }
    }

    fn abort(&mut self, request: RequestId) {
        let found = self.requests.iter().find(|(_, held)| held.id() == request).map(|(tag, _)| tag);
        if let (Some(tag), Phase::Running(engine)) = (found, &mut self.phase) {
            engine.abort(tag as u64);
            self.complete();
        }
    }

    fn reset(&mut self) {
        if let Phase::Running(engine) = &mut self.phase {
            for (tag, _) in &self.requests {
                engine.abort(tag as u64);
            }
            self.complete();
        }
    }
}

impl Drop for LogWorker {
    fn drop(&mut self) {
        if let Phase::Running(engine) = &mut self.phase {
            for (tag, bufs) in engine.abandon() {
                // None has that of a change of size.
                if let Some(request) = self.requests.get_mut(tag as usize) {
                    *request.bufs_mut() = bufs;
                }
            }
        }
        for request in self.requests.drain() {
            if in_panic() {
                // It fails, and the log says which it was.
                drop(request);
            } else {
                request.complete(IoStatus::Aborted);
            }
        }
        if let Some(client) = self.client.take() {
            *lock(&self.inner.seat) = Some(Seat { client, opened: None });
        }
    }
}
