//! Arrays come, wait for legs, and go.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_channel::oneshot;
use futures_util::FutureExt;
use schema::ConfigEntry;
use serde_json::json;
use uuid::Uuid;

use super::Raid;
use super::array::{Array, Progress, Standing, View};
use super::driver::{Driver, Parts};
use super::format::{Layout, Leg, LegState, MAX_LEGS, MAX_NAME, Superblock};
use super::regions::Regions;
use super::settings::Settings;
use super::shared::{Event, Shared, Table};
use crate::core::{BdevError, BdevInfo, BdevSystem, Geometry, NewBdev};

mod assemble;
mod legs;

pub use assemble::order;
pub use legs::{add_leg, remove_leg};

use assemble::assemble;
use legs::{Claimed, check_leg, claim, come_back, common_geometry, superblock_of};

/// How long an array may take to begin or to end before the caller is told that it goes on by itself.
const PATIENCE: Duration = Duration::from_secs(10);

/// What an array is to be.
#[derive(Clone, Copy, Debug, Default)]
pub struct Create {
    /// Its UUID; drawn at random when there is none.
    pub uuid: Option<Uuid>,
    /// Whether the legs get superblocks.
    pub superblock: bool,
    /// Bytes of a region; as many as make sense when there are none.
    pub region_bytes: Option<u64>,
}

/// An array that waits for legs.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// Its name.
    pub name: String,
    /// Its UUID, once known.
    pub uuid: Option<Uuid>,
    /// The legs that are known or wanted, by name.
    pub legs: Vec<String>,
    /// How many it has in all.
    pub count: usize,
    /// To be made, rather than found.
    pub create: Option<Create>,
    /// What it waits for.
    pub why: String,
}

/// Resolves when the legs are let go of.
type Closed = futures_util::future::Shared<oneshot::Receiver<()>>;

/// An array that runs.
pub struct Running {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    pub(super) shared: Arc<Shared>,
    wipe: AtomicBool,
    stopped: AtomicBool,
    closed: Closed,
}

impl Running {
    pub(super) fn stop(&self) {
        if !self.stopped.swap(true, Ordering::AcqRel) {
            self.shared.send(Event::Stop { wipe: self.wipe.load(Ordering::Acquire) });
        }
    }

    /// Names of the devices that it has now.
    pub fn leg_names(&self) -> Vec<String> {
        self.shared.table().legs.iter().flatten().map(|bdev| bdev.name().to_string()).collect()
    }

    pub(super) fn config(&self) -> ConfigEntry {
        let legs = self.leg_names();
        if self.shared.persist {
            let params = json!({ "name": self.name, "base_bdevs": legs, "force": false });
            return ConfigEntry::new("bdev_raid_start", params);
        }
        let uuid = self.uuid.to_string();
        let params = json!({ "name": self.name, "raid_level": "raid1", "base_bdevs": legs, "uuid": uuid });
        ConfigEntry::new("bdev_raid_create", params)
    }
}

/// All arrays of a system.
pub struct Arrays {
    /// For all of them.
    pub settings: Arc<Settings>,
    running: Mutex<Vec<Arc<Running>>>,
    waiting: Mutex<Vec<Waiting>>,
    /// Superblocks that could not be used, and why, by device.
    refused: Mutex<HashMap<String, String>>,
    /// One assembly at a time.
    turn: futures_util::lock::Mutex<()>,
    saved: AtomicBool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The arrays of `system`.
pub fn arrays(system: &BdevSystem) -> Arc<Arrays> {
    let arrays = system.attached(|| Arrays {
        settings: Arc::default(),
        running: Mutex::default(),
        waiting: Mutex::default(),
        refused: Mutex::default(),
        turn: futures_util::lock::Mutex::new(()),
        saved: AtomicBool::new(false),
    });
    if !arrays.saved.swap(true, Ordering::AcqRel) {
        let weak = Arc::downgrade(&arrays);
        system.add_base_config(Box::new(move || weak.upgrade().map(|arrays| arrays.config()).unwrap_or_default()));
    }
    arrays
}

impl Arrays {
    /// Those that run, in the order of their start.
    pub fn running(&self) -> Vec<Arc<Running>> {
        locked(&self.running).clone()
    }

    /// Those that wait.
    pub fn waiting(&self) -> Vec<Waiting> {
        locked(&self.waiting).clone()
    }

    /// The one of that name.
    pub fn get(&self, name: &str) -> Option<Arc<Running>> {
        let answers =
            |one: &&Arc<Running>| one.name == name || Uuid::parse_str(name).is_ok_and(|uuid| uuid == one.uuid);
        locked(&self.running).iter().find(answers).cloned()
    }

    fn by_uuid(&self, uuid: Uuid) -> Option<Arc<Running>> {
        locked(&self.running).iter().find(|one| one.uuid == uuid).cloned()
    }

    fn config(&self) -> Vec<ConfigEntry> {
        let mut calls = Vec::new();
        if !self.settings.is_default() {
            let params = json!({
                "process_window_size_kb": self.settings.window_kb(),
                "process_max_bandwidth_mb_sec": self.settings.bandwidth_mb(),
            });
            calls.push(ConfigEntry::new("bdev_raid_set_options", params));
        }
        for one in self.waiting() {
            let (name, legs) = (&one.name, &one.legs);
            calls.push(match one.create {
                None => {
                    ConfigEntry::new("bdev_raid_start", json!({ "name": name, "base_bdevs": legs, "force": false }))
                }
                Some(create) => {
                    let mut params = json!({ "name": name, "raid_level": "raid1", "base_bdevs": legs });
                    // Left out where it is the default, as SPDK's configuration has no such key.
                    if create.superblock {
                        params["superblock"] = json!(true);
                    }
                    if let Some(uuid) = create.uuid {
                        params["uuid"] = json!(uuid.to_string());
                    }
                    ConfigEntry::new("bdev_raid_create", params)
                }
            });
        }
        calls
    }

    fn wait_for(&self, one: Waiting) {
        tracing::warn!(raid = one.name, "waits: {}", one.why);
        let mut waiting = locked(&self.waiting);
        match waiting.iter_mut().find(|old| old.name == one.name) {
            Some(old) => *old = one,
            None => waiting.push(one),
        }
    }

    fn forget(&self, name: &str) -> bool {
        let mut waiting = locked(&self.waiting);
        let before = waiting.len();
        waiting.retain(|one| one.name != name);
        waiting.len() < before
    }
}

// ---- legs -----------------------------------------------------------------------------------------------------------------------

// ---- starting -------------------------------------------------------------------------------------------------------------------

struct Start {
    name: String,
    uuid: Uuid,
    array: Array,
    persist: bool,
    legs: Vec<Option<Claimed>>,
}

async fn start(system: &Arc<BdevSystem>, start: Start) -> Result<Arc<BdevInfo>, BdevError> {
    let arrays = arrays(system);
    let Start { name, uuid, array, persist, legs } = start;
    let layout = *array.layout();
    let infos: Vec<Arc<BdevInfo>> = legs.iter().flatten().map(|leg| Arc::clone(leg.base.bdev())).collect();
    let geometry = common_geometry(&layout, &infos);
    let table = Table {
        view: View { generation: 0, legs: vec![Standing::Out; legs.len()], offline: true },
        legs: vec![None; legs.len()],
    };
    let shared = Shared::new(layout, persist, system.reactors().len(), table);
    legs.iter().flatten().for_each(|leg| leg.connect(&shared));
    let (begun, has_begun) = oneshot::channel();
    let (closed, has_closed) = oneshot::channel();
    let parts = Parts {
        name: name.as_str().into(),
        array,
        shared: Arc::clone(&shared),
        settings: Arc::clone(&arrays.settings),
        bases: legs.into_iter().map(|leg| leg.map(|leg| leg.base)).collect(),
        begun,
        closed,
        on_lost: losing(system, &name),
    };
    let spread = name.bytes().fold(0usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    let reactors = system.reactors();
    let installed = reactors[spread % reactors.len()].call(move |cx| Driver::install(cx, parts)).await?;
    installed.map_err(|error| BdevError::host(format!("starting '{name}'"), error))?;
    let running = Arc::new(Running {
        name: name.clone(),
        uuid,
        shared: Arc::clone(&shared),
        wipe: AtomicBool::new(false),
        stopped: AtomicBool::new(false),
        closed: has_closed.shared(),
    });
    let fail = |running: Arc<Running>| async move {
        running.stop();
        ended(&running).await;
    };
    match has_begun.await {
        Ok(Ok(())) => {}
        Ok(Err(why)) => {
            fail(running).await;
            return Err(BdevError::host(format!("starting '{name}'"), std::io::Error::other(why)));
        }
        Err(_) => return Err(BdevError::Stopping),
    }
    locked(&arrays.running).push(Arc::clone(&running));
    forget_at_the_end(system, &arrays, &running);
    arrays.forget(&name);
    let device = Arc::new(Raid { running: Arc::clone(&running), geometry });
    match system.register(NewBdev { name: name.clone(), uuid: Some(uuid), aliases: Vec::new(), device }).await {
        Ok(info) => {
            shared.set_device(&info);
            Ok(info)
        }
        Err(error) => {
            locked(&arrays.running).retain(|one| !Arc::ptr_eq(one, &running));
            fail(running).await;
            Err(error)
        }
    }
}

/// What is called when the last leg of an array is being removed.
fn losing(system: &Arc<BdevSystem>, name: &str) -> Arc<dyn Fn() + Send + Sync> {
    let (system, name) = (Arc::downgrade(system), name.to_string());
    Arc::new(move || {
        if let Some(system) = system.upgrade() {
            let (name, task) = (name.clone(), Arc::clone(&system));
            system.executor().spawn(Box::pin(async move { lose(&task, &name).await }));
        }
    })
}

/// The array is one that runs until it has let go of its legs.
fn forget_at_the_end(system: &Arc<BdevSystem>, arrays: &Arc<Arrays>, running: &Arc<Running>) {
    let (arrays, running) = (Arc::downgrade(arrays), Arc::clone(running));
    system.executor().spawn(Box::pin(async move {
        ended(&running).await;
        if let Some(arrays) = arrays.upgrade() {
            locked(&arrays.running).retain(|one| !Arc::ptr_eq(one, &running));
        }
    }));
}

/// An array of that name whose device was removed lets go of its legs first.
async fn let_end(system: &Arc<BdevSystem>, arrays: &Arrays, name: &str) {
    if let Some(old) = arrays.get(name).filter(|old| old.stopped.load(Ordering::Acquire)) {
        futures_util::future::select(Box::pin(ended(&old)), system.executor().sleep(PATIENCE)).await;
        if old.closed.peek().is_some() {
            locked(&arrays.running).retain(|one| !Arc::ptr_eq(one, &old));
        }
    }
}

/// Waits until the legs are let go of.
async fn ended(running: &Running) {
    // A driver whose reactor has stopped has let go of them as well.
    let _ = running.closed.clone().await;
}

/// The last leg of an array is being removed.
async fn lose(system: &Arc<BdevSystem>, name: &str) {
    let arrays = arrays(system);
    let Some(running) = arrays.get(name) else { return };
    let (legs, persist) = (running.leg_names(), running.shared.persist);
    if let Err(error) = remove(system, &running).await {
        tracing::warn!(raid = name, "its last leg is being removed: {error}");
    }
    if persist {
        let why = "its last leg was removed".to_string();
        let (name, uuid, count) = (name.to_string(), Some(running.uuid), legs.len());
        arrays.wait_for(Waiting { name, uuid, legs, count, create: None, why });
    }
}

async fn remove(system: &Arc<BdevSystem>, running: &Arc<Running>) -> Result<(), BdevError> {
    let result = match system.remove(&running.name).await {
        Err(BdevError::NotFound { .. } | BdevError::BeingRemoved { .. }) => Ok(()),
        other => other,
    };
    let arrays = arrays(system);
    let gone = ended(running);
    let patience = system.executor().sleep(PATIENCE);
    futures_util::future::select(Box::pin(gone), patience).await;
    locked(&arrays.running).retain(|one| !Arc::ptr_eq(one, running));
    result
}

/// Deletes an array; with `clear`, its superblocks as well.
///
/// # Errors
/// [`BdevError::NotFound`]; as [`BdevSystem::remove`].
pub async fn delete(system: &Arc<BdevSystem>, name: &str, clear: bool) -> Result<(), BdevError> {
    let arrays = arrays(system);
    let Some(running) = arrays.get(name) else {
        if arrays.forget(name) {
            return Ok(());
        }
        return Err(BdevError::NotFound { name: name.to_string() });
    };
    running.wipe.store(clear, Ordering::Release);
    remove(system, &running).await
}

/// Makes an array of `legs`. `None`: some of them are not there, and it waits for them.
///
/// # Errors
/// As claiming the legs and [`BdevSystem::register`]; [`BdevError::Invalid`] for legs that do not fit each other.
pub async fn create(
    system: &Arc<BdevSystem>,
    name: &str,
    legs: &[String],
    options: Create,
) -> Result<Option<Arc<BdevInfo>>, BdevError> {
    let arrays = arrays(system);
    let turn = arrays.turn.lock().await;
    let_end(system, &arrays, name).await;
    if arrays.get(name).is_some() || system.get(name).is_ok() {
        return Err(BdevError::Exists { name: name.to_string() });
    }
    let refuse = |field, value: String, why: &str| Err(BdevError::invalid(field, value, why));
    if legs.len() < 2 || legs.len() > MAX_LEGS {
        return refuse("base_bdevs", legs.len().to_string(), "raid1 has from 2 to 7 base bdevs");
    }
    if options.superblock && (name.is_empty() || name.len() > MAX_NAME) {
        return refuse("name", name.to_string(), "a superblock has room for a name of 64 bytes");
    }
    if (1..legs.len()).any(|n| legs[..n].contains(&legs[n])) {
        return refuse("base_bdevs", legs.join(", "), "each can be there only once");
    }
    let missing: Vec<&String> = legs.iter().filter(|leg| system.get(leg).is_err()).collect();
    if !missing.is_empty() {
        let why = format!("base bdevs that are not there: {missing:?}");
        let (name, uuid, create) = (name.to_string(), options.uuid, Some(options));
        arrays.wait_for(Waiting { name, uuid, legs: legs.to_vec(), count: legs.len(), create, why });
        return Ok(None);
    }
    let made = make(system, name, legs, options).await;
    drop(turn);
    made.map(Some)
}

async fn make(
    system: &Arc<BdevSystem>,
    name: &str,
    legs: &[String],
    options: Create,
) -> Result<Arc<BdevInfo>, BdevError> {
    let mut claimed = Vec::new();
    for leg in legs {
        let one = claim(system, name, leg)?;
        check_leg(one.base.bdev())?;
        if let Ok(Some(found)) = superblock_of(system, one.base.bdev()).await {
            let reason = format!(
                "it is a leg of the array '{}' ({}); delete that with clear_sb, or wipe its first MiB",
                found.name, found.array
            );
            return Err(BdevError::invalid("base_bdevs", leg.clone(), reason));
        }
        claimed.push(one);
    }
    let geometries: Vec<Geometry> = claimed.iter().map(|one| one.base.bdev().device().geometry()).collect();
    let block_size = geometries[0].block_size;
    if let Some(at) = geometries.iter().position(|geometry| geometry.block_size != block_size) {
        let reason =
            format!("its blocks have {} bytes, those of the first have {block_size}", geometries[at].block_size);
        return Err(BdevError::invalid("base_bdevs", legs[at].clone(), reason));
    }
    let least = geometries.iter().map(|geometry| geometry.num_blocks).min().expect("there are legs");
    let Some(layout) = Layout::new(block_size, least, options.superblock, options.region_bytes) else {
        return Err(BdevError::invalid(
            "base_bdevs",
            legs.join(", "),
            "the smallest has no room behind the superblock",
        ));
    };
    let uuid = options.uuid.unwrap_or_else(|| system.random_uuid());
    let mut regions = Regions::new(layout);
    let mut of = Vec::new();
    for n in 0..legs.len() {
        // What the others have is not known to be the same, and the superblock would vouch for it.
        let state = if n == 0 || !options.superblock { LegState::InSync } else { LegState::Rebuilding };
        if state == LegState::Rebuilding {
            regions.lack_all(1 << n);
        }
        of.push(Leg { id: system.random_uuid(), state, since: 0 });
    }
    let present = (1u8 << legs.len()) - 1;
    let sb = Superblock {
        array: uuid,
        name: name.to_string(),
        layout,
        sequence: 0,
        events: 0,
        epoch: system.random_uuid(),
        history: Vec::new(),
        legs: of,
        me: 0,
    };
    let array = Array::start(sb, regions, present, options.superblock, drawing(system));
    let legs = claimed.into_iter().map(Some).collect();
    start(system, Start { name: name.to_string(), uuid, array, persist: options.superblock, legs }).await
}

fn drawing(system: &Arc<BdevSystem>) -> Box<dyn FnMut() -> Uuid + Send> {
    let platform = Arc::clone(system.platform());
    Box::new(move || {
        let mut bytes = [0; 16];
        platform.random(&mut bytes);
        uuid::Builder::from_random_bytes(bytes).into_uuid()
    })
}

// ---- finding --------------------------------------------------------------------------------------------------------------------

/// Looks at a new device: a leg of an array that runs, or of one that waits.
pub(super) async fn examine(system: Arc<BdevSystem>, bdev: Arc<BdevInfo>) {
    let arrays = arrays(&system);
    let turn = arrays.turn.lock().await;
    let wanted = |one: &Waiting| one.create.is_some() && one.legs.iter().all(|leg| system.get(leg).is_ok());
    let ready: Option<Waiting> = arrays.waiting().into_iter().find(wanted);
    if let Some(Waiting { name, legs, create: Some(options), .. }) = ready {
        if let Err(error) = make(&system, &name, &legs, options).await {
            tracing::warn!(raid = name, "all its base bdevs are there, and it cannot be made: {error}");
        }
        return;
    }
    if system.claim_state(&bdev).kind.is_some() {
        return;
    }
    let found = match superblock_of(&system, &bdev).await {
        Ok(Some(found)) => found,
        Ok(None) => return,
        Err(why) => {
            tracing::warn!(bdev = bdev.name(), "is not used for raid: it has {why}");
            locked(&arrays.refused).insert(bdev.name().to_string(), why);
            return;
        }
    };
    if let Some(running) = arrays.by_uuid(found.array) {
        if let Err(error) = come_back(&system, &running, bdev.name(), found).await {
            tracing::warn!(raid = running.name, bdev = bdev.name(), "is not taken in: {error}");
        }
        return;
    }
    let known = arrays.waiting().into_iter().find(|one| one.uuid == Some(found.array) && one.create.is_none());
    let mut legs = known.map(|one| one.legs).unwrap_or_default();
    if !legs.iter().any(|leg| leg == bdev.name()) {
        legs.push(bdev.name().to_string());
    }
    let name = found.name.clone();
    if let Err(error) = assemble(&system, found.array, &legs, false).await {
        let (uuid, count) = (Some(found.array), found.legs.len());
        arrays.wait_for(Waiting { name, uuid, legs, count, create: None, why: error.to_string() });
    }
    drop(turn);
}

fn refusal(what: &str, why: &str) -> BdevError {
    BdevError::invalid("base_bdevs", what, why.to_string())
}

// ---- running --------------------------------------------------------------------------------------------------------------------

/// Has the driver do something.
async fn ask<R: Send + 'static>(
    shared: &Arc<Shared>,
    work: impl FnOnce(&mut Driver, &mut crate::core::IoRuntime) -> R + Send + 'static,
) -> Result<R, BdevError> {
    let (sender, receiver) = oneshot::channel();
    shared.send(Event::Do(Box::new(move |driver, runtime| {
        let _ = sender.send(work(driver, runtime));
    })));
    receiver.await.map_err(|_| BdevError::Stopping)
}

/// What an array says of itself.
#[derive(Clone, Debug)]
pub struct Status {
    /// Its superblock.
    pub superblock: Superblock,
    /// Whether it serves.
    pub online: bool,
    /// By leg: its device, and how reactors treat it.
    pub legs: Vec<(Option<Arc<BdevInfo>>, Standing)>,
    /// Whether all reactors know of that.
    pub told: bool,
    /// Regions that each leg lacks.
    pub lacking: Vec<usize>,
    /// Regions that count as written.
    pub active: usize,
    /// What is being copied.
    pub progress: Option<Progress>,
    /// Blocks copied since the start.
    pub copied_blocks: u64,
    /// Why the last copy ended early.
    pub trouble: Option<String>,
}

/// See [`Status`].
///
/// # Errors
/// [`BdevError::Stopping`] when it is ending.
pub async fn status(running: &Running) -> Result<Status, BdevError> {
    ask(&running.shared, |driver, _| {
        let array = &driver.array;
        let legs = 0..array.superblock().legs.len();
        Status {
            superblock: array.superblock().clone(),
            online: array.is_online(),
            legs: legs.clone().map(|n| (driver.bdev_of(n).cloned(), array.view().legs[n])).collect(),
            told: driver.is_told(),
            lacking: legs.map(|n| array.regions().lacking(n).count()).collect(),
            active: (0..array.regions().len()).filter(|&region| array.regions().is_active(region)).count(),
            progress: array.progress(),
            copied_blocks: driver.copied_blocks,
            trouble: driver.trouble.clone(),
        }
    })
    .await
}
