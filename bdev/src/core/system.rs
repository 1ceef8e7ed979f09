//! The control plane of the bdev layer: devices come, change and go while reactors work.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use futures_channel::oneshot;
use futures_util::future::{BoxFuture, Either, select};
use reactor::buffer::ClassStats;
use reactor::reactor::{Gone, LoneReactor};
use reactor::{Platform, ReactorHandle, ReactorId};
use schema::{ConfigEntry, Errno, RpcError};
use uuid::Uuid;

use super::channel::Bdev;
use super::registry::{BdevEvent, BdevInfo, ClaimState, Descriptor, OnEvent, Registry, Removal};
use super::runtime::IoRuntime;
use super::stats::{IoStats, StatsReset};
use super::types::Geometry;

/// What the control plane needs of whoever runs it: a tokio thread, or the simulator.
pub trait Executor: Send + Sync {
    /// Runs a task of the control plane to its end.
    fn spawn(&self, task: BoxFuture<'static, ()>);
    /// Resolves after `duration`.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;
    /// Starts a reactor beside the group, for whoever needs a thread: on a thread of its own, unless the simulator steps it.
    ///
    /// # Errors
    /// When the host has no thread for it.
    fn start_reactor(&self, reactor: LoneReactor, platform: &Arc<dyn Platform>) -> io::Result<()> {
        reactor.spawn(platform)
    }
}

/// Why something could not be done to a device.
#[derive(Debug)]
#[non_exhaustive]
pub enum BdevError {
    /// The name (or alias, or UUID) is taken.
    Exists {
        /// The name.
        name: String,
    },
    /// There is no such device.
    NotFound {
        /// The name.
        name: String,
    },
    /// Its removal has begun and not ended.
    BeingRemoved {
        /// The name.
        name: String,
    },
    /// Somebody else holds it in a way that excludes this.
    Claimed {
        /// The device.
        name: String,
        /// Who.
        by: String,
    },
    /// I/O is outstanding in the device, or somebody keeps it open, and does not end; the removal goes on by itself.
    StillDraining {
        /// The device.
        name: String,
        /// Who has it open.
        held_by: Vec<String>,
    },
    /// It is of another kind than the call is for.
    WrongKind {
        /// The device.
        name: String,
        /// What it is.
        is: &'static str,
        /// What was wanted.
        wanted: String,
    },
    /// A parameter makes no sense for the device.
    Invalid {
        /// Which.
        field: &'static str,
        /// Its value.
        value: String,
        /// Why, and what would.
        reason: String,
    },
    /// The host refused something.
    Host {
        /// What was being done.
        doing: String,
        /// What the host said.
        source: io::Error,
    },
    /// A reactor stopped meanwhile.
    Stopping,
}

impl BdevError {
    pub(super) fn not_found(name: &str) -> BdevError {
        BdevError::NotFound { name: name.to_string() }
    }

    /// `info` is no `wanted`.
    pub fn wrong_kind(info: &BdevInfo, wanted: &str) -> BdevError {
        BdevError::WrongKind {
            name: info.name().to_string(),
            is: info.device().product_name(),
            wanted: wanted.to_string(),
        }
    }

    /// A parameter that makes no sense.
    pub fn invalid(field: &'static str, value: impl fmt::Display, reason: impl Into<String>) -> BdevError {
        BdevError::Invalid { field, value: value.to_string(), reason: reason.into() }
    }

    /// A refusal of the host.
    pub fn host(doing: impl Into<String>, source: io::Error) -> BdevError {
        BdevError::Host { doing: doing.into(), source }
    }
}

impl fmt::Display for BdevError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BdevError::Exists { name } => write!(f, "a bdev with the name '{name}' exists already"),
            BdevError::NotFound { name } => write!(f, "there is no bdev '{name}'"),
            BdevError::BeingRemoved { name } => write!(f, "bdev '{name}' is already being removed"),
            BdevError::Claimed { name, by } => write!(f, "bdev '{name}' is in use by {by}"),
            BdevError::StillDraining { name, held_by } if held_by.is_empty() => {
                write!(
                    f,
                    "bdev '{name}' no longer takes I/O, but some that it has does not end; it goes when that does"
                )
            }
            BdevError::StillDraining { name, held_by } => {
                write!(f, "bdev '{name}' no longer takes I/O, but is still open in {}", held_by.join(", "))
            }
            BdevError::WrongKind { name, is, wanted } => write!(f, "bdev '{name}' is a {is}, not a {wanted}"),
            BdevError::Invalid { field, value, reason } => write!(f, "{field} = {value}: {reason}"),
            BdevError::Host { doing, source } => write!(f, "{doing}: {source}"),
            BdevError::Stopping => f.write_str("the server is stopping"),
        }
    }
}

impl std::error::Error for BdevError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            BdevError::Host { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl From<Gone> for BdevError {
    fn from(_: Gone) -> BdevError {
        BdevError::Stopping
    }
}

impl From<BdevError> for RpcError {
    fn from(error: BdevError) -> RpcError {
        let text = error.to_string();
        match error {
            BdevError::Exists { name } => RpcError::errno(Errno::EXIST, text)
                .field("name")
                .value(name)
                .fix("choose another name, or delete the bdev that has it"),
            BdevError::NotFound { name } => RpcError::errno(Errno::NODEV, text)
                .field("name")
                .value(name)
                .fix("bdev_get_bdevs lists the bdevs there are"),
            BdevError::BeingRemoved { name } => RpcError::errno(Errno::NODEV, text).field("name").value(name),
            BdevError::Claimed { name, .. } => RpcError::errno(Errno::PERM, text)
                .field("name")
                .value(name)
                .fix("remove what uses it first, or use another bdev"),
            BdevError::StillDraining { name, .. } => RpcError::errno(Errno::BUSY, text).field("name").value(name),
            BdevError::WrongKind { name, .. } => RpcError::errno(Errno::NODEV, text)
                .field("name")
                .value(name)
                .fix("bdev_get_bdevs shows what kind each bdev is"),
            BdevError::Invalid { field, value, .. } => RpcError::errno(Errno::INVAL, text).field(field).value(value),
            BdevError::Host { ref source, .. } => RpcError::errno(errno_of(source), text),
            BdevError::Stopping => RpcError::internal(text),
        }
    }
}

/// The number for a host's error, also where the error carries words instead of a number.
fn errno_of(error: &io::Error) -> Errno {
    use io::ErrorKind;
    if let Some(number) = error.raw_os_error().filter(|&number| number > 0) {
        return Errno(number);
    }
    match error.kind() {
        ErrorKind::NotFound => Errno::NOENT,
        ErrorKind::PermissionDenied => Errno::ACCES,
        ErrorKind::AlreadyExists => Errno::EXIST,
        ErrorKind::ResourceBusy => Errno::BUSY,
        ErrorKind::InvalidInput => Errno::INVAL,
        ErrorKind::StorageFull => Errno::NOSPC,
        ErrorKind::QuotaExceeded => Errno::DQUOT,
        ErrorKind::FileTooLarge => Errno::FBIG,
        ErrorKind::ReadOnlyFilesystem => Errno::ROFS,
        ErrorKind::NotADirectory => Errno::NOTDIR,
        ErrorKind::IsADirectory => Errno::ISDIR,
        ErrorKind::ExecutableFileBusy => Errno::TXTBSY,
        ErrorKind::OutOfMemory => Errno::NOMEM,
        _ => Errno::IO,
    }
}

/// A device to register.
pub struct NewBdev {
    /// Its name.
    pub name: String,
    /// Its UUID; drawn at random when there is none.
    pub uuid: Option<Uuid>,
    /// Its other names.
    pub aliases: Vec<String>,
    /// The device.
    pub device: Arc<dyn Bdev>,
}

/// How long a removal waits before it answers that it goes on in the background.
pub const REMOVE_PATIENCE: Duration = Duration::from_secs(10);

/// The bdev layer as the control plane sees it.
pub struct BdevSystem {
    registry: Arc<Registry>,
    reactors: Vec<ReactorHandle>,
    platform: Arc<dyn Platform>,
    executor: Arc<dyn Executor>,
    options: Mutex<Options>,
    base_config: Mutex<Vec<BaseConfig>>,
    me: Weak<BdevSystem>,
    /// What modules have besides their devices.
    attached: Mutex<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>,
    /// Whom new devices are shown to, and how many are being looked at.
    examiners: Mutex<Vec<Examine>>,
    examining: AtomicUsize,
}

/// Looks at a device for something to build on it.
pub type Examine = fn(Arc<BdevSystem>, Arc<BdevInfo>) -> BoxFuture<'static, ()>;

/// Calls that make base devices which no device of their own tells about.
pub type BaseConfig = Box<dyn Fn() -> Vec<ConfigEntry> + Send + Sync>;

/// `bdev_set_options`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// I/Os of one reactor that may be outstanding at once.
    pub io_pool_size: u32,
    /// I/Os kept per reactor without asking the others; accepted for compatibility, every pool is per reactor.
    pub io_cache_size: u32,
    /// Whether new devices are shown to the modules that build on what they find on a device.
    pub auto_examine: bool,
    /// Buffers of the smallest class on all reactors together; `None` leaves what the reactors were built with.
    pub small_pool_count: Option<u64>,
    /// Buffers of the largest class on all reactors together.
    pub large_pool_count: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            io_pool_size: 8192,
            io_cache_size: 256,
            auto_examine: true,
            small_pool_count: None,
            large_pool_count: None,
        }
    }
}

/// One reactor's open channels: device name and references.
#[derive(Clone, Debug)]
pub struct ReactorChannels {
    /// The reactor.
    pub reactor: ReactorId,
    /// Name and references of each.
    pub channels: Vec<(String, u32)>,
}

impl BdevSystem {
    /// The bdev layer over running reactors, on each of which [`IoRuntime::install`] was called.
    pub fn new(
        reactors: Vec<ReactorHandle>,
        platform: Arc<dyn Platform>,
        executor: Arc<dyn Executor>,
    ) -> Arc<BdevSystem> {
        let (options, base_config) = (Mutex::default(), Mutex::default());
        let examiners = Mutex::new(crate::modules::MODULES.iter().filter_map(|module| module.examine).collect());
        Arc::new_cyclic(|me| BdevSystem {
            registry: Arc::default(),
            reactors,
            platform,
            executor,
            options,
            base_config,
            me: Weak::clone(me),
            attached: Mutex::default(),
            examiners,
            examining: AtomicUsize::new(0),
        })
    }

    /// What a module has in this system besides its devices: one value of each type, made when it is first asked for.
    pub fn attached<T: Any + Send + Sync>(&self, make: impl FnOnce() -> T) -> Arc<T> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let value = attached.entry(TypeId::of::<T>()).or_insert_with(|| Arc::new(make()));
        Arc::clone(value).downcast().expect("it is kept under its own type")
    }

    /// Shows a device to the modules that build on what they find on it; they look at it in a task.
    pub fn examine(&self, bdev: &Arc<BdevInfo>) {
        let Some(me) = self.me.upgrade() else { return };
        for examine in self.examiners.lock().unwrap_or_else(PoisonError::into_inner).iter().copied() {
            self.examining.fetch_add(1, Ordering::AcqRel);
            let (system, bdev) = (Arc::clone(&me), Arc::clone(bdev));
            self.executor.spawn(Box::pin(async move {
                examine(Arc::clone(&system), bdev).await;
                system.examining.fetch_sub(1, Ordering::AcqRel);
            }));
        }
    }

    /// Whether devices are being looked at.
    pub fn is_examining(&self) -> bool {
        self.examining.load(Ordering::Acquire) > 0
    }

    /// The reactors.
    pub fn reactors(&self) -> &[ReactorHandle] {
        &self.reactors
    }

    /// The outside world.
    pub fn platform(&self) -> &Arc<dyn Platform> {
        &self.platform
    }

    /// Who runs tasks of the control plane.
    pub fn executor(&self) -> &Arc<dyn Executor> {
        &self.executor
    }

    /// From now on these calls are saved, before those of all devices.
    pub fn add_base_config(&self, calls: BaseConfig) {
        self.base_config.lock().unwrap_or_else(PoisonError::into_inner).push(calls);
    }

    /// The calls of [`BdevSystem::add_base_config`].
    pub fn base_config(&self) -> Vec<ConfigEntry> {
        self.base_config.lock().unwrap_or_else(PoisonError::into_inner).iter().flat_map(|calls| calls()).collect()
    }

    /// The options in force.
    pub fn options(&self) -> Options {
        *self.options.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the options, and the reactors' pools with them.
    ///
    /// # Errors
    /// [`BdevError::Host`] when a reactor's pools are in use or the host has no memory for them: this reactor, and those
    /// after it, keep theirs.
    pub async fn set_options(&self, options: Options) -> Result<(), BdevError> {
        let before = self.options();
        let share = |count: u64| (count.div_ceil(self.reactors.len() as u64).max(1)) as usize;
        for reactor in &self.reactors {
            let (small, large) = (options.small_pool_count.map(share), options.large_pool_count.map(share));
            let resize = move |cx: &mut reactor::Context| {
                let runtime = IoRuntime::of(cx);
                let mut runtime = runtime.borrow_mut();
                let mut config = runtime.config();
                if options.io_pool_size != before.io_pool_size {
                    config.io_pool = options.io_pool_size as usize;
                }
                config.buffers.small = small.unwrap_or(config.buffers.small);
                config.buffers.large = large.unwrap_or(config.buffers.large);
                if config == runtime.config() { Ok(()) } else { runtime.reconfigure(cx, config) }
            };
            let doing = format!("sizing the pools of reactor {}", reactor.id().0);
            reactor.call(resize).await?.map_err(|error| BdevError::host(doing, error))?;
        }
        *self.options.lock().unwrap_or_else(PoisonError::into_inner) = options;
        Ok(())
    }

    /// Random version 4 UUID from the platform.
    pub fn random_uuid(&self) -> Uuid {
        let mut bytes = [0; 16];
        self.platform.random(&mut bytes);
        uuid::Builder::from_random_bytes(bytes).into_uuid()
    }

    /// Makes a device known.
    ///
    /// # Errors
    /// [`BdevError::Exists`] when one of its names is taken; [`BdevError::Invalid`] for a geometry that cannot be served.
    pub async fn register(&self, new: NewBdev) -> Result<Arc<BdevInfo>, BdevError> {
        let geometry = new.device.geometry();
        if !Geometry::is_valid_block_size(geometry.block_size) {
            return Err(BdevError::invalid(
                "block_size",
                geometry.block_size,
                "block sizes are powers of two from 512 to 65536 bytes",
            ));
        }
        if new.name.is_empty() {
            return Err(BdevError::invalid("name", "\"\"", "a bdev needs a name"));
        }
        let uuid = new.uuid.unwrap_or_else(|| self.random_uuid());
        let info = self.registry.add(new.name, uuid, new.aliases, new.device)?;
        tracing::info!(
            bdev = info.name(),
            product = info.device().product_name(),
            bytes = geometry.bytes(),
            "bdev added"
        );
        if self.options().auto_examine {
            self.examine(&info);
        }
        Ok(info)
    }

    /// The device that answers to `name` (name, alias or UUID).
    ///
    /// # Errors
    /// [`BdevError::NotFound`].
    pub fn get(&self, name: &str) -> Result<Arc<BdevInfo>, BdevError> {
        self.registry.get(name)
    }

    /// All devices, in the order of their creation.
    pub fn list(&self) -> Vec<Arc<BdevInfo>> {
        self.registry.list()
    }

    /// Whether and how a device is claimed.
    pub fn claim_state(&self, bdev: &BdevInfo) -> ClaimState {
        self.registry.claim_state(bdev.id())
    }

    /// Opens a device. `owner` is named in messages to others.
    ///
    /// # Errors
    /// [`BdevError::NotFound`]; [`BdevError::Claimed`] when it is to be written and somebody has claimed it.
    pub fn open(&self, name: &str, write: bool, owner: &str, on_event: OnEvent) -> Result<Descriptor, BdevError> {
        self.registry.open(name, write, owner, on_event)
    }

    /// Removes a device under whatever load: holders of descriptors are told, new I/O fails, what is outstanding is aborted
    /// or drains, and the device is dropped when nobody has it open any more.
    ///
    /// # Errors
    /// [`BdevError::NotFound`], [`BdevError::BeingRemoved`]; [`BdevError::StillDraining`] when that has not happened within
    /// [`REMOVE_PATIENCE`]: it then goes on in the background.
    pub async fn remove(self: &Arc<Self>, name: &str) -> Result<(), BdevError> {
        let Removal { info, tell, all_closed } = self.registry.begin_remove(name)?;
        let system = Arc::clone(self);
        let removing = Arc::clone(&info);
        let (ended, has_ended) = oneshot::channel();
        // A task of its own: it goes on when its caller loses interest or patience.
        self.executor.spawn(Box::pin(async move {
            tell.iter().for_each(|tell| tell(BdevEvent::Removing));
            drop(tell);
            let id = removing.id();
            let drains: Vec<_> = system
                .reactors
                .iter()
                .map(|reactor| {
                    reactor.call_deferred(move |cx, reply| {
                        let runtime = IoRuntime::of(cx);
                        runtime.borrow_mut().remove_bdev(id, Box::new(move || reply.send(())));
                    })
                })
                .collect();
            // A reactor that has stopped has nothing left of the device either.
            let _ = futures_util::future::join_all(drains).await;
            let _ = all_closed.await;
            removing.device().removed();
            system.registry.finish_remove(id);
            tracing::info!(bdev = removing.name(), "bdev removed");
            drop(removing);
            let _ = ended.send(());
        }));
        match select(has_ended, self.executor.sleep(REMOVE_PATIENCE)).await {
            Either::Left((Ok(()), _)) => Ok(()),
            Either::Left((Err(_), _)) => Err(BdevError::Stopping),
            Either::Right(_) => {
                let held_by = self.registry.owners(info.id());
                Err(BdevError::StillDraining { name: info.name().to_string(), held_by })
            }
        }
    }

    /// Tells everybody that a device's geometry has changed. The device itself already shows the new one.
    ///
    /// # Errors
    /// [`BdevError::Stopping`].
    pub async fn resized(&self, bdev: &Arc<BdevInfo>) -> Result<(), BdevError> {
        let geometry = bdev.device().geometry();
        let id = bdev.id();
        for reactor in &self.reactors {
            reactor.call(move |cx| IoRuntime::of(cx).borrow_mut().resize_bdev(id)).await?;
        }
        self.registry.listeners(id).iter().for_each(|tell| tell(BdevEvent::Resized));
        tracing::info!(bdev = bdev.name(), bytes = geometry.bytes(), "bdev resized");
        Ok(())
    }

    /// A device's counters on each reactor where it has a channel.
    ///
    /// # Errors
    /// [`BdevError::Stopping`].
    pub async fn channel_stats(&self, bdev: &BdevInfo) -> Result<Vec<(ReactorId, IoStats)>, BdevError> {
        let id = bdev.id();
        let mut all = Vec::new();
        for reactor in &self.reactors {
            if let Some(stats) = reactor.call(move |cx| IoRuntime::of(cx).borrow().bdev_stats(id)).await? {
                all.push((reactor.id(), stats));
            }
        }
        Ok(all)
    }

    /// A device's counters on all reactors together, with those of channels that have closed.
    ///
    /// # Errors
    /// [`BdevError::Stopping`].
    pub async fn stats(&self, bdev: &BdevInfo) -> Result<IoStats, BdevError> {
        let mut sum = bdev.retired_stats();
        self.channel_stats(bdev).await?.iter().for_each(|(_, stats)| sum.add(stats));
        Ok(sum)
    }

    /// Forgets a device's counters.
    ///
    /// # Errors
    /// [`BdevError::Stopping`].
    pub async fn reset_stats(&self, bdev: &BdevInfo, mode: StatsReset) -> Result<(), BdevError> {
        let id = bdev.id();
        bdev.reset_retired_stats(mode);
        for reactor in &self.reactors {
            reactor.call(move |cx| IoRuntime::of(cx).borrow_mut().reset_bdev_stats(id, mode)).await?;
        }
        Ok(())
    }

    /// State of every reactor's payload memory, by class.
    ///
    /// # Errors
    /// [`BdevError::Stopping`].
    pub async fn pool_stats(&self) -> Result<Vec<(ReactorId, [ClassStats; 3])>, BdevError> {
        let mut all = Vec::new();
        for reactor in &self.reactors {
            let stats = reactor.call(|cx| IoRuntime::of(cx).borrow_mut().pool_stats()).await?;
            all.push((reactor.id(), stats));
        }
        Ok(all)
    }

    /// Every reactor's open channels.
    ///
    /// # Errors
    /// [`BdevError::Stopping`].
    pub async fn channels(&self) -> Result<Vec<ReactorChannels>, BdevError> {
        let mut all = Vec::new();
        for reactor in &self.reactors {
            let channels = reactor.call(|cx| IoRuntime::of(cx).borrow().channel_refs()).await?;
            all.push(ReactorChannels { reactor: reactor.id(), channels });
        }
        Ok(all)
    }
}

impl fmt::Debug for BdevSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BdevSystem").field("reactors", &self.reactors.len()).finish_non_exhaustive()
    }
}
