//! The appliance device: its I/O is done by a handler, on threads of its own, inline, or in another process.
//!
//! | room | concern |
//! |---|---|
//! | [`channel`] | one reactor's slots, deadlines, the queue before them |
//! | [`port`] | the seams: [`Backend`], one a device, and [`Port`](port::Port), one a channel |
//! | [`workers`] | handlers on threads of their own |
//! | [`inline`] | handlers on the reactors |
//! | [`external`] | handlers in other processes |
//! | [`source`] | from the parameter `handler` to a backend |
//! | [`builtin`] | handlers by name |
//! | [`base`] | a lower device for a handler on threads of its own |
//! | [`log`] | the log-structured store |
//! | [`settings`] | what `bdev_appliance_create` was asked for |
//! | [`stats`] | counters and histograms |
//! | [`rpc`] | the methods |
//!
//! # What a handler cannot do
//! It cannot keep an I/O past its deadline, nor a removal past half a second: the I/O ends without it, and the request stays
//! with its payload where it is until it comes home. It cannot end an I/O twice: a request is consumed by its end, and one
//! that comes home late finds its slot empty. What it can do is sleep on its own threads, and waste its own depth.

pub mod base;
pub mod builtin;
mod channel;
pub mod external;
pub mod inline;
pub mod log;
pub mod port;
pub mod rpc;
pub mod settings;
pub mod source;
pub mod stats;
pub mod workers;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use appliance::external::dock::Dock;
use appliance::{Capabilities, Handler};
use futures_util::future::{BoxFuture, Either, select};
use reactor::Clock;
use schema::ConfigEntry;
use serde_json::{Value, json};
use uuid::Uuid;

use self::port::Backend;
use self::settings::Settings;
use self::stats::DeviceStats;
use super::Module;
use crate::conformance::{Spec, Subject};
use crate::core::system::Executor;
use crate::core::{Bdev, BdevError, BdevInfo, BdevSystem, ChannelCx, Geometry, IoChannel, NewBdev, OpKind, OpSet};

/// The module.
pub const MODULE: Module = Module { name: "appliance", methods: rpc::METHODS, subjects: SUBJECTS, examine: None };

const PRODUCT: &str = "appliance";

/// How long a handler may take to stop before the log says that it hangs.
const STOP_PATIENCE: Duration = Duration::from_secs(1);

/// The device.
pub(crate) struct Device {
    me: Weak<Device>,
    name: Arc<str>,
    settings: Settings,
    backend: Arc<dyn Backend>,
    capabilities: Capabilities,
    num_blocks: AtomicU64,
    clock: Arc<dyn Clock>,
    executor: Arc<dyn Executor>,
    stats: DeviceStats,
}

impl Bdev for Device {
    fn product_name(&self) -> &'static str {
        PRODUCT
    }

    fn geometry(&self) -> Geometry {
        Geometry {
            num_blocks: self.num_blocks.load(Ordering::Acquire),
            volatile_cache: self.capabilities.volatile_cache,
            unmap_zeroes: self.capabilities.unmap_zeroes,
            max_rw_blocks: self.capabilities.max_rw_blocks,
            ..self.settings.geometry
        }
    }

    fn native_ops(&self) -> OpSet {
        self.capabilities.ops.without(OpKind::Reset)
    }

    fn open_channel(&self, cx: &mut ChannelCx<'_>) -> io::Result<Box<dyn IoChannel>> {
        let me = self.me.upgrade().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(Box::new(channel::ApplianceChannel::open(&me, cx)?))
    }

    fn removed(&self) {
        self.backend.stop();
        let (stopped, patience) = (self.backend.stopped(), self.executor.sleep(STOP_PATIENCE));
        let (bdev, handler) = (Arc::clone(&self.name), self.backend.handler_name());
        self.executor.spawn(Box::pin(async move {
            if let Either::Right((_, stopped)) = select(stopped, patience).await {
                let (bdev, handler) = (&*bdev, &*handler);
                tracing::warn!(bdev, handler, "a handler does not stop: its threads are left behind where they hang");
                drop(stopped);
            }
        }));
    }

    fn driver_specific(&self) -> Value {
        let mut shown = self.params();
        shown["handler_name"] = json!(&*self.backend.handler_name());
        json!({ "appliance": shown })
    }

    fn config(&self, info: &BdevInfo) -> Vec<ConfigEntry> {
        let mut params = self.params();
        params["name"] = json!(info.name());
        params["uuid"] = json!(info.uuid().to_string());
        vec![ConfigEntry::new("bdev_appliance_create", params)]
    }

    fn base_bdevs(&self) -> Vec<String> {
        builtin::base_bdev(&self.settings).into_iter().collect()
    }
}

impl Device {
    /// The parameters that make it again, apart from name and UUID.
    fn params(&self) -> Value {
        let settings = &self.settings;
        json!({
            "handler": settings.handler,
            "num_blocks": self.num_blocks.load(Ordering::Acquire),
            "block_size": settings.geometry.block_size,
            "read_only": settings.geometry.read_only,
            "workers": settings.workers,
            "cores": settings.cores,
            "queue_depth": settings.queue_depth,
            "spin_us": settings.spin.as_micros() as u64,
            "placement": settings.placement.name(),
            "timeout_ms": settings.timeout.map_or(0, |timeout| timeout.as_millis() as u64),
            "on_disconnect": settings.on_disconnect.name(),
            "latency_sample": settings.latency_sample,
            "options": settings.options,
        })
    }

    /// Its numbers, for `bdev_appliance_get_stats`.
    fn stats(&self) -> Value {
        let mut all = self.stats.to_json();
        all["name"] = json!(&*self.name);
        all["handler"] = json!(&*self.backend.handler_name());
        all["backend"] = self.backend.stats();
        all
    }

    /// Resolves when its handler has let go of everything.
    fn stopped(&self) -> BoxFuture<'static, ()> {
        self.backend.stopped()
    }
}

fn check(settings: &Settings) -> Result<(), BdevError> {
    super::common::check_size(settings.geometry.block_size, settings.geometry.num_blocks)?;
    let (workers, depth) = (settings.workers, settings.queue_depth);
    if workers > Settings::MAX_WORKERS {
        let reason = format!("a device has at most {} workers", Settings::MAX_WORKERS);
        return Err(BdevError::invalid("workers", workers, reason));
    }
    if depth == 0 || depth > Settings::MAX_QUEUE_DEPTH {
        let reason = format!("from 1 to {} requests may be with a handler", Settings::MAX_QUEUE_DEPTH);
        return Err(BdevError::invalid("queue_depth", depth, reason));
    }
    if settings.handler.is_empty() {
        return Err(BdevError::invalid("handler", "\"\"", "name a handler, a shared object, or a socket"));
    }
    if !settings.options.is_object() {
        return Err(BdevError::invalid("options", &settings.options, "options are an object, as in {\"key\": 1}"));
    }
    Ok(())
}

/// Creates and registers an appliance device, and starts its handler.
///
/// # Errors
/// [`BdevError::Invalid`] for settings that make no sense, as the handler says, and as [`BdevSystem::register`].
pub async fn create(
    system: &Arc<BdevSystem>,
    name: &str,
    uuid: Option<Uuid>,
    settings: Settings,
) -> Result<Arc<BdevInfo>, BdevError> {
    check(&settings)?;
    if system.get(name).is_ok() {
        // Before a handler is started for nothing; registering says it again, should another be faster.
        return Err(BdevError::Exists { name: name.to_string() });
    }
    let backend = source::start(system, name, &settings).await?;
    register(system, name, uuid, settings, backend).await
}

/// As [`create`], with a handler that is there already. Such a device is made again from a saved configuration only if
/// [`Settings::handler`] names a handler that does the same.
///
/// # Errors
/// As [`create`].
pub async fn create_with(
    system: &Arc<BdevSystem>,
    name: &str,
    uuid: Option<Uuid>,
    settings: Settings,
    handler: Arc<dyn Handler>,
) -> Result<Arc<BdevInfo>, BdevError> {
    check(&settings)?;
    let backend = source::start_with(system, name, &settings, handler).await?;
    register(system, name, uuid, settings, backend).await
}

/// As [`create`], with a handler in another process that is simulated in this one: it comes to the dock.
///
/// # Errors
/// As [`create`].
pub async fn create_docked(
    system: &Arc<BdevSystem>,
    name: &str,
    settings: Settings,
) -> Result<(Arc<BdevInfo>, Dock), BdevError> {
    check(&settings)?;
    let (backend, dock) = external::External::docked(system, name, &settings)?;
    Ok((register(system, name, None, settings, backend).await?, dock))
}

async fn register(
    system: &Arc<BdevSystem>,
    name: &str,
    uuid: Option<Uuid>,
    settings: Settings,
    backend: Arc<dyn Backend>,
) -> Result<Arc<BdevInfo>, BdevError> {
    let mut settings = settings;
    builtin::forget_once(&mut settings);
    let base = builtin::base_bdev(&settings);
    let stopping = Arc::clone(&backend);
    let device = Arc::new_cyclic(|me| Device {
        me: Weak::clone(me),
        name: name.into(),
        capabilities: backend.capabilities(),
        num_blocks: AtomicU64::new(settings.geometry.num_blocks),
        clock: system.platform().clock(),
        executor: Arc::clone(system.executor()),
        stats: DeviceStats::default(),
        backend,
        settings,
    });
    let registered = system.register(NewBdev { name: name.to_string(), uuid, aliases: Vec::new(), device }).await;
    if registered.is_err() {
        stopping.stop();
    }
    let info = registered?;
    if base.is_some_and(|base| system.get(&base).is_ok_and(|base| base.is_removing())) {
        // Its holder was told before this device had its name.
        match system.remove(info.name()).await {
            Ok(()) | Err(BdevError::NotFound { .. } | BdevError::BeingRemoved { .. }) => {}
            Err(error) => return Err(error),
        }
        return Err(BdevError::NotFound { name: info.name().to_string() });
    }
    Ok(info)
}

/// Sets the size of an appliance device. Its handler takes note first: it may refuse.
///
/// # Errors
/// [`BdevError::NotFound`], also for another kind of device; [`BdevError::Invalid`] for a size that cannot be, or that the
/// handler does not serve.
pub async fn resize(system: &BdevSystem, name: &str, num_blocks: u64) -> Result<(), BdevError> {
    let info = system.get(name)?;
    let device = super::common::device_as::<Device>(&info, PRODUCT)?;
    super::common::check_size(device.settings.geometry.block_size, num_blocks)?;
    device.backend.resize(num_blocks).await?;
    device.num_blocks.store(num_blocks, Ordering::Release);
    system.resized(&info).await
}

/// The numbers of an appliance device, as `bdev_appliance_get_stats` shows them.
///
/// # Errors
/// [`BdevError::NotFound`]; [`BdevError::WrongKind`] for another kind of device.
pub fn stats(system: &BdevSystem, name: &str) -> Result<Value, BdevError> {
    let info = system.get(name)?;
    Ok(super::common::device_as::<Device>(&info, PRODUCT)?.stats())
}

/// Deletes an appliance device, and waits a moment for its handler to let go of what it has.
///
/// # Errors
/// As [`BdevSystem::remove`]; [`BdevError::WrongKind`] for another kind of device.
pub async fn delete(system: &Arc<BdevSystem>, name: &str) -> Result<(), BdevError> {
    let info = system.get(name)?;
    let device = super::common::device_as::<Device>(&info, PRODUCT)?;
    drop(info);
    system.remove(name).await?;
    // A handler that hangs has its threads left behind; the log says so.
    select(device.stopped(), system.executor().sleep(STOP_PATIENCE / 4)).await;
    Ok(())
}

const SUBJECTS: &[Subject] = &[
    Subject {
        label: "appliance-memory",
        block_sizes: &[512, 4096],
        forgets: false,
        make: |system, spec| Box::pin(conformance_make(system, spec, "memory", |_| {})),
        resize: Some(conformance_resize),
    },
    Subject {
        label: "appliance-memory-many",
        block_sizes: &[512],
        forgets: false,
        make: |system, spec| {
            Box::pin(conformance_make(system, spec, "memory", |settings| {
                (settings.workers, settings.queue_depth) = (3, 5);
                (settings.placement, settings.latency_sample) = (settings::Placement::RoundRobin, 1);
            }))
        },
        resize: Some(conformance_resize),
    },
    Subject {
        label: "appliance-memory-inline",
        block_sizes: &[4096],
        forgets: false,
        make: |system, spec| Box::pin(conformance_make(system, spec, "memory", |settings| settings.workers = 0)),
        resize: Some(conformance_resize),
    },
    Subject {
        label: "appliance-log",
        block_sizes: &[512, 4096],
        forgets: false,
        make: |system, spec| Box::pin(conformance_log(system, spec)),
        resize: Some(conformance_resize),
    },
    Subject {
        label: "appliance-log-twice",
        block_sizes: &[4096],
        forgets: false,
        make: |system, spec| Box::pin(conformance_log_twice(system, spec)),
        resize: Some(conformance_resize),
    },
    Subject {
        label: "appliance-null",
        block_sizes: &[512],
        forgets: true,
        make: |system, spec| {
            Box::pin(conformance_make(system, spec, "null", |settings| {
                (settings.workers, settings.placement) = (2, settings::Placement::Queue);
            }))
        },
        resize: Some(conformance_resize),
    },
    Subject {
        label: "appliance-external",
        block_sizes: &[512, 4096],
        forgets: false,
        make: |system, spec| Box::pin(external::conformance_make(system, spec)),
        resize: Some(conformance_resize),
    },
];

/// A log store on memory: without a cache below, and in segments so small that the collector has work.
async fn conformance_log(system: Arc<BdevSystem>, spec: Spec) -> Result<Vec<String>, BdevError> {
    let base = format!("{}-base", spec.name);
    let bytes = 3 * spec.num_blocks * u64::from(spec.block_size) + (4 << 20);
    let options = super::malloc::MallocOptions::new(512, bytes.next_multiple_of(4096) / 512);
    super::malloc::create(&system, &base, None, options).await?;
    let mut settings = Settings::new("log", spec.block_size, spec.num_blocks);
    settings.options = json!({ "base_bdev": base });
    create(&system, &spec.name, None, settings).await?;
    Ok(vec![spec.name, base])
}

/// A log store on a log store: what is done below has I/Os of its own on both floors.
async fn conformance_log_twice(system: Arc<BdevSystem>, spec: Spec) -> Result<Vec<String>, BdevError> {
    let below = Spec { name: format!("{}-below", spec.name), num_blocks: 4 * spec.num_blocks + 8192, ..spec.clone() };
    let mut made = vec![spec.name.clone()];
    made.extend(conformance_log(Arc::clone(&system), below.clone()).await?);
    let mut settings = Settings::new("log", spec.block_size, spec.num_blocks);
    settings.options = json!({ "base_bdev": below.name, "compression": "none" });
    create(&system, &spec.name, None, settings).await?;
    Ok(made)
}

fn conformance_resize(system: Arc<BdevSystem>, spec: Spec, blocks: u64) -> BoxFuture<'static, Result<(), BdevError>> {
    Box::pin(async move { resize(&system, &spec.name, blocks).await })
}

async fn conformance_make(
    system: Arc<BdevSystem>,
    spec: Spec,
    handler: &str,
    change: fn(&mut Settings),
) -> Result<Vec<String>, BdevError> {
    let mut settings = Settings::new(handler, spec.block_size, spec.num_blocks);
    change(&mut settings);
    create(&system, &spec.name, None, settings).await?;
    Ok(vec![spec.name])
}
