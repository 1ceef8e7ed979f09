//! Handlers in other processes: the backend and the ports over [`appliance::external`].
//!
//! The handler's name is `unix:` and the path of a socket, on which this side listens; see `docs/appliance.md`. What the
//! device does by itself must be the same whichever process serves it, so that is said when the device is made, in its
//! options, and a process that cannot keep it is turned away:
//!
//! | option | meaning | when left out |
//! |---|---|---|
//! | `ops` | names of operations that the process does by itself | read, write, flush |
//! | `volatile_cache` | writes may be lost before the next flush | true |
//! | `unmap_zeroes` | unmapped blocks read as zeroes | false |
//! | `io_bytes` | payload of one request at most | 131072 |
//!
//! Compare, compare-and-write and copy are never the process's: after a crash a request may be done twice, and these are
//! not the same twice. They are made of reads and writes instead.
//!
//! A reactor is woken by its lane's eventfd for as long as the port is open; a poller of its own sees to that.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use appliance::external::dock::Dock;
use appliance::external::{Lane, OnDisconnect, ServeOptions, Stop, Target, TargetOptions};
use appliance::layout::Shape;
use appliance::request::Body;
use appliance::{Capabilities, RequestId};
use futures_channel::oneshot;
use futures_util::future::BoxFuture;
use reactor::park::Source;
use reactor::{Clock, Context, Instant, Poller, PollerId, Progress, Schedule};
use serde_json::Value;

use super::port::{Backend, Port, PortCx};
use super::settings::{Placement, Settings};
use crate::conformance::Spec;
use crate::core::{BdevError, BdevSystem, OpKind, OpSet};

/// What the name of such a handler begins with.
pub const PREFIX: &str = "unix:";

/// Payload of one request when the options do not say.
const IO_BYTES: u32 = 128 << 10;

/// Operations that a process may do by itself: those that can be done twice.
const REPEATABLE: [OpKind; 5] = [OpKind::Read, OpKind::Write, OpKind::Flush, OpKind::Unmap, OpKind::WriteZeroes];

/// The backend of one device.
pub struct External {
    target: Arc<Target>,
    name: Arc<str>,
    capabilities: Capabilities,
}

impl External {
    /// Listens for the process of the device `bdev`.
    ///
    /// # Errors
    /// [`BdevError::Invalid`] for options that make no sense; [`BdevError::Host`] when the socket cannot be had.
    pub fn start(system: &BdevSystem, bdev: &str, settings: &Settings) -> Result<Arc<External>, BdevError> {
        External::with(system, bdev, settings, Target::listen)
    }

    /// As [`External::start`], for a process that is simulated in this one and comes to the dock.
    ///
    /// # Errors
    /// As [`External::start`].
    pub fn docked(system: &BdevSystem, bdev: &str, settings: &Settings) -> Result<(Arc<External>, Dock), BdevError> {
        let external = External::with(system, bdev, settings, Target::docked)?;
        let dock = Dock::of(&external.target).expect("a docked target has a dock");
        Ok((external, dock))
    }

    fn with(
        system: &BdevSystem,
        bdev: &str,
        settings: &Settings,
        target: fn(TargetOptions, Arc<dyn Clock>) -> io::Result<Target>,
    ) -> Result<Arc<External>, BdevError> {
        let path = settings.handler.strip_prefix(PREFIX).unwrap_or(&settings.handler);
        let (capabilities, io_bytes) = promises(settings)?;
        if settings.workers == 0 {
            let reason = "the handler is in another process, not on the reactors; give it at least one worker";
            return Err(BdevError::invalid("workers", 0, reason));
        }
        let (lanes, workers) = (system.reactors().len() as u32, settings.workers as u32);
        let shape = Shape::new(lanes, workers, settings.queue_depth as u32, io_bytes)
            .map_err(|bad| BdevError::invalid("queue_depth", settings.queue_depth, bad.to_string()))?;
        let cores = settings.cores.iter().take(settings.workers).map(|&core| u32::try_from(core));
        let cores: Vec<u32> = cores
            .collect::<Result<_, _>>()
            .map_err(|_| BdevError::invalid("cores", format!("{:?}", settings.cores), "no host has so many cores"))?;
        let options = TargetOptions {
            path: PathBuf::from(path),
            bdev: bdev.to_string(),
            block_size: settings.geometry.block_size,
            num_blocks: settings.geometry.num_blocks,
            shape,
            placement: settings.placement,
            spin: settings.spin,
            cores,
            policy: settings.on_disconnect,
            ops: capabilities.ops,
            unmap_zeroes: capabilities.unmap_zeroes,
            volatile_cache: capabilities.volatile_cache,
        };
        let target = target(options, system.platform().clock()).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => BdevError::invalid("handler", &settings.handler, error.to_string()),
            _ => BdevError::host("preparing for the handler's process", error),
        })?;
        let name = Arc::from(settings.handler.as_str());
        Ok(Arc::new(External { target: Arc::new(target), name, capabilities }))
    }
}

/// What the device promises its hosts, and the payload of one request.
fn promises(settings: &Settings) -> Result<(Capabilities, u32), BdevError> {
    let block_size = settings.geometry.block_size;
    let (mut capabilities, mut io_bytes) = (Capabilities::BASIC, IO_BYTES);
    let options = settings.options.as_object().into_iter().flatten();
    for (key, value) in options {
        let bad = |reason: &str| BdevError::invalid("options", format!("{key}: {value}"), reason);
        let flag = || value.as_bool().ok_or_else(|| bad("it is true or false"));
        match key.as_str() {
            "ops" => capabilities.ops = ops(value).map_err(|reason| bad(&reason))?,
            "volatile_cache" => capabilities.volatile_cache = flag()?,
            "unmap_zeroes" => capabilities.unmap_zeroes = flag()?,
            "io_bytes" => {
                let bytes = value.as_u64().and_then(|bytes| u32::try_from(bytes).ok());
                let whole = bytes.filter(|&bytes| bytes >= block_size && bytes % block_size == 0);
                io_bytes = whole.ok_or_else(|| bad("it is a number of whole blocks in bytes"))?;
            }
            _ => {
                let known = "ops, volatile_cache, unmap_zeroes and io_bytes; the process gets its own options from you";
                return Err(bad(&format!("the options of a handler in another process are {known}")));
            }
        }
    }
    capabilities.max_rw_blocks = (io_bytes / block_size).max(1);
    if capabilities.volatile_cache && !capabilities.ops.contains(OpKind::Flush) {
        let reason = "with a volatile cache the process must do flush; add it to 'ops', or set 'volatile_cache' false";
        return Err(BdevError::invalid("options", &settings.options, reason));
    }
    Ok((capabilities, io_bytes.max(block_size)))
}

fn ops(value: &Value) -> Result<OpSet, String> {
    let known = || REPEATABLE.map(OpKind::name).join(", ");
    let words = value.as_array().ok_or_else(|| format!("it is an array of {}", known()))?;
    let mut ops = OpSet::default();
    for word in words {
        let kind = REPEATABLE.into_iter().find(|kind| Some(kind.name()) == word.as_str());
        let kind = kind.ok_or_else(|| {
            format!("{word} is none of {}; anything else is made of these, so that it can be done twice", known())
        })?;
        ops = ops.with(kind);
    }
    if !ops.contains(OpKind::Read) {
        return Err("reads are always the process's: add read".into());
    }
    Ok(ops)
}

impl Backend for External {
    fn handler_name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn open_port(&self, cx: &PortCx) -> io::Result<Box<dyn Port>> {
        let index = cx.reactor.0;
        let lane = Lane::open(&self.target, index, cx.waker.clone())?;
        let watch = Arc::new(Watched::default());
        let Some(source) = self.target.source(index) else {
            watch.ready.store(true, Ordering::Release);
            return Ok(Box::new(ExternalPort { lane, watched: watch }));
        };
        let bell = Bell { _target: Arc::clone(&self.target), watched: Arc::clone(&watch), source, poller: None };
        if cx.handle.send(Box::new(move |cx: &mut Context| bell.install(cx))).is_err() {
            lane.close(drop);
            return Err(io::Error::other("the reactor's mailbox is full; try again"));
        }
        Ok(Box::new(ExternalPort { lane, watched: watch }))
    }

    fn resize(&self, num_blocks: u64) -> BoxFuture<'static, Result<(), BdevError>> {
        let target = Arc::clone(&self.target);
        // It waits for the process's word, which nobody else should have to.
        let answer = elsewhere("appliance_resize", move || target.resize(num_blocks));
        Box::pin(async move {
            let resized = answer.await.unwrap_or_else(|_| Err(io::Error::other("its thread panicked")));
            resized.map_err(|error| BdevError::host("changing the size", error))
        })
    }

    fn stats(&self) -> Value {
        self.target.stats()
    }

    fn stop(&self) {
        self.target.stop();
    }

    fn stopped(&self) -> BoxFuture<'static, ()> {
        let target = Arc::clone(&self.target);
        if Dock::of(&target).is_some() {
            // There is no thread to wait for.
            target.close();
            return Box::pin(std::future::ready(()));
        }
        let closed = elsewhere("appliance_close", move || {
            target.close();
            Ok(())
        });
        Box::pin(async move {
            // A thread that could not be had has been said by then, and nothing is left to wait for.
            let _ = closed.await;
        })
    }
}

/// Runs what may block on a thread of its own.
fn elsewhere(name: &str, work: impl FnOnce() -> io::Result<()> + Send + 'static) -> oneshot::Receiver<io::Result<()>> {
    let (answer, answered) = oneshot::channel();
    let thread = std::thread::Builder::new().name(name.into());
    if let Err(error) = thread.spawn(move || drop(answer.send(work()))) {
        let (answer, failed) = oneshot::channel();
        let _ = answer.send(Err(error));
        return failed;
    }
    answered
}

/// What a port and its poller tell each other.
#[derive(Default)]
struct Watched {
    /// The eventfd ends sleep: the reactor may sleep.
    ready: AtomicBool,
    /// The port is closed: the poller is to go.
    closed: AtomicBool,
}

/// Has the lane's eventfd wake the reactor for as long as the port is open.
struct Bell {
    /// The source is its.
    _target: Arc<Target>,
    watched: Arc<Watched>,
    source: Source,
    poller: Option<PollerId>,
}

impl Bell {
    fn install(mut self, cx: &mut Context) {
        if self.watched.closed.load(Ordering::Acquire) {
            return;
        }
        let poller = cx.reserve_poller();
        match cx.wake_by(self.source) {
            Ok(()) => {
                self.poller = Some(poller);
                self.watched.ready.store(true, Ordering::Release);
                cx.add_reserved_poller(poller, "appliance bell", Schedule::Active, Box::new(self));
            }
            Err(error) => {
                tracing::error!("a handler's process cannot be watched: {error}; its reactor will not sleep");
            }
        }
    }
}

impl Poller for Bell {
    fn poll(&mut self, cx: &mut Context) -> Progress {
        if self.watched.closed.load(Ordering::Acquire)
            && let Some(poller) = self.poller.take()
        {
            cx.unwake_by(self.source);
            cx.remove_poller(poller);
        }
        Progress::Idle
    }
}

/// A channel's way to the process.
struct ExternalPort {
    lane: Lane,
    watched: Arc<Watched>,
}

impl Port for ExternalPort {
    fn send(&mut self, body: Box<Body>, now: Instant) -> Result<(), Box<Body>> {
        self.lane.send(body, now);
        Ok(())
    }

    fn flush(&mut self) {
        self.lane.flush();
    }

    fn drain(&mut self, now: Instant, max: usize, take: &mut dyn FnMut(Box<Body>)) {
        self.lane.awake();
        self.lane.drain(now, max, take);
    }

    fn may_sleep(&mut self) -> bool {
        self.lane.may_sleep() && self.watched.ready.load(Ordering::Acquire)
    }

    fn abort(&mut self, request: RequestId) {
        self.lane.abort(request);
        self.lane.flush();
    }

    fn reset(&mut self, before: RequestId) {
        self.lane.reset(before);
        self.lane.flush();
    }

    fn close(self: Box<Self>) {
        self.watched.closed.store(true, Ordering::Release);
        self.lane.close(drop);
    }
}

/// A device whose process is a thread of this one, with the handler `memory`. The thread ends with the device.
pub(super) async fn conformance_make(system: Arc<BdevSystem>, spec: Spec) -> Result<Vec<String>, BdevError> {
    let socket = spec.folder.join(format!("{}.sock", spec.name));
    let handler = format!("{PREFIX}{}", socket.display());
    let mut settings = Settings::new(&handler, spec.block_size, spec.num_blocks);
    settings.on_disconnect = OnDisconnect::Park;
    settings.latency_sample = 1;
    (settings.workers, settings.placement) = (2, Placement::RoundRobin);
    settings.options = serde_json::json!({
        "ops": ["read", "write", "flush", "unmap", "write_zeroes"],
        "unmap_zeroes": true,
        "io_bytes": 16384.max(spec.block_size),
    });
    let info = super::create(&system, &spec.name, None, settings).await?;
    let serve = move || {
        let stop = Stop::new()?;
        let options = ServeOptions { until_gone: true, ..ServeOptions::default() };
        appliance::external::serve(&socket, &mut appliance::memory::Memory::make, &options, &stop)
    };
    std::thread::Builder::new()
        .name("external".into())
        .spawn(move || {
            if let Err(error) = serve() {
                tracing::error!("the process of a conformance test ended: {error}");
            }
        })
        .map_err(|error| BdevError::host("starting the handler's process", error))?;
    // It must not be left waiting for a device that was deleted before it came.
    let device = crate::modules::common::device_as::<super::Device>(&info, super::PRODUCT)?;
    while device.backend.stats()["connected"] != true {
        system.executor().sleep(Duration::from_micros(100)).await;
    }
    Ok(vec![spec.name])
}
