//! Arrays come, wait for legs, and go.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use futures_channel::oneshot;
use futures_util::FutureExt;
use schema::ConfigEntry;
use serde_json::json;
use uuid::Uuid;

use super::array::{Array, Progress, Standing, View};
use super::assembly::{self, Role, Verdict};
use super::driver::{Driver, Parts};
use super::format::{DATA_OFFSET, Layout, Leg, LegState, MAX_LEGS, MAX_NAME, SUPER_BYTES, Superblock};
use super::regions::Regions;
use super::settings::Settings;
use super::shared::{Event, Shared, Table};
use super::{PRODUCT, Raid, probe};
use crate::core::{BdevError, BdevEvent, BdevInfo, BdevSystem, Geometry, NewBdev, OpKind};
use crate::modules::layer::{self, Base};

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
                    let mut params = json!({
                        "name": name,
                        "raid_level": "raid1",
                        "base_bdevs": legs,
                        "superblock": create.superblock,
                    });
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

/// What tells the array of its legs' events, from before it is there.
#[derive(Default)]
struct Hook {
    shared: OnceLock<Arc<Shared>>,
    bdev: OnceLock<Arc<BdevInfo>>,
}

impl Hook {
    fn removing(&self) {
        if let (Some(shared), Some(bdev)) = (self.shared.get(), self.bdev.get()) {
            shared.send(Event::Gone(Arc::clone(bdev)));
        }
    }
}

struct Claimed {
    base: Base,
    hook: Arc<Hook>,
}

fn claim(system: &Arc<BdevSystem>, raid: &str, leg: &str) -> Result<Claimed, BdevError> {
    let hook = Arc::new(Hook::default());
    let told = Arc::downgrade(&hook);
    let on_event = move |event| {
        // The size of the array stays as it is when a leg changes its own.
        if event == BdevEvent::Removing
            && let Some(hook) = Weak::upgrade(&told)
        {
            hook.removing();
        }
    };
    // The closure is all that others keep of it, so the hook lives as long as somebody may be told.
    let keep = Arc::clone(&hook);
    let on_event = move |event| {
        let _ = &keep;
        on_event(event);
    };
    let base = layer::claim_with(system, &format!("{PRODUCT} '{raid}'"), leg, Arc::new(on_event))?;
    let _ = hook.bdev.set(Arc::clone(base.bdev()));
    Ok(Claimed { base, hook })
}

impl Claimed {
    /// Whom to tell from now on.
    fn connect(&self, shared: &Arc<Shared>) {
        let _ = self.hook.shared.set(Arc::clone(shared));
        if self.base.bdev().is_removing() {
            self.hook.removing();
        }
    }
}

/// The superblock on a device, if it has one.
async fn superblock_of(system: &BdevSystem, bdev: &Arc<BdevInfo>) -> Result<Option<Superblock>, String> {
    let geometry = bdev.device().geometry();
    if geometry.bytes() <= DATA_OFFSET || bdev.is_removing() {
        return Ok(None);
    }
    let unit = (geometry.block_size as usize).max(SUPER_BYTES);
    let blocks = 2 * unit as u64 / u64::from(geometry.block_size);
    let bytes = probe::read(system, bdev, 0, blocks).await.map_err(|error| error.to_string())?.to_vec();
    let found = Superblock::newer(&bytes[..unit], &bytes[unit..])?;
    Ok(match found {
        Some(found) if found.layout.block_size != geometry.block_size => {
            return Err(format!("a raid superblock for blocks of {} bytes", found.layout.block_size));
        }
        Some(found) if !geometry.contains(found.layout.data_offset, found.layout.num_blocks) => {
            return Err("a raid superblock of a larger leg".to_string());
        }
        found => found,
    })
}

/// Geometry that all legs can serve.
fn common_geometry(layout: &Layout, legs: &[Arc<BdevInfo>]) -> Geometry {
    let mut geometry = Geometry::new(layout.block_size, layout.num_blocks);
    for leg in legs.iter().map(|leg| leg.device().geometry()) {
        geometry.physical_block_size = geometry.physical_block_size.max(leg.physical_block_size);
        geometry.volatile_cache |= leg.volatile_cache;
        geometry.optimal_io_boundary = geometry.optimal_io_boundary.max(leg.optimal_io_boundary);
    }
    if geometry.optimal_io_boundary != 0 && !layout.data_offset.is_multiple_of(geometry.optimal_io_boundary.into()) {
        geometry.optimal_io_boundary = 0;
    }
    // Unmapped blocks are zeroes on every leg, so that all legs read the same.
    geometry.unmap_zeroes = true;
    geometry
}

fn check_leg(leg: &BdevInfo) -> Result<(), BdevError> {
    if !leg.supports(OpKind::Write) || leg.device().geometry().read_only {
        return Err(BdevError::invalid("base_bdevs", leg.name(), "it is read-only, and every leg is written"));
    }
    Ok(())
}

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
    let shared = Shared::new(layout, persist, table);
    legs.iter().flatten().for_each(|leg| leg.connect(&shared));
    let (begun, has_begun) = oneshot::channel();
    let (closed, has_closed) = oneshot::channel();
    let lost_in = Arc::downgrade(system);
    let lost_name = name.clone();
    let on_lost = Arc::new(move || {
        if let Some(system) = lost_in.upgrade() {
            let name = lost_name.clone();
            let task = Arc::clone(&system);
            system.executor().spawn(Box::pin(async move { lose(&task, &name).await }));
        }
    });
    let parts = Parts {
        name: name.as_str().into(),
        array,
        shared: Arc::clone(&shared),
        settings: Arc::clone(&arrays.settings),
        bases: legs.into_iter().map(|leg| leg.map(|leg| leg.base)).collect(),
        begun,
        closed,
        on_lost,
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
    let (forgetting, of) = (Arc::downgrade(&arrays), Arc::clone(&running));
    system.executor().spawn(Box::pin(async move {
        ended(&of).await;
        if let Some(arrays) = forgetting.upgrade() {
            locked(&arrays.running).retain(|one| !Arc::ptr_eq(one, &of));
        }
    }));
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

/// A leg of an array that runs has turned up.
async fn come_back(
    system: &Arc<BdevSystem>,
    running: &Arc<Running>,
    bdev: &str,
    found: Superblock,
) -> Result<(), BdevError> {
    if running.leg_names().iter().any(|leg| leg == bdev) {
        return Ok(());
    }
    let claimed = claim(system, &running.name, bdev)?;
    // Others may have written to it until now.
    let now = superblock_of(system, claimed.base.bdev()).await;
    if now.as_ref().ok().and_then(Option::as_ref) != Some(&found) {
        return Err(refusal(bdev, "its superblock has changed meanwhile"));
    }
    claimed.connect(&running.shared);
    let Claimed { base, hook } = claimed;
    let done = ask(&running.shared, move |driver, runtime| {
        // The hook has to live as long as the claim does.
        let _ = &hook;
        let leg = found.me;
        if !driver.is_vacant(leg) {
            return Err("its place is taken".to_string());
        }
        driver.attach(leg, base, runtime).map_err(|error| error.to_string())?;
        let taken = driver.take_back(leg, &found);
        if taken.is_err() {
            driver.detach(leg, runtime);
        }
        taken
    })
    .await?;
    done.map_err(|why| refusal(bdev, &why))
}

fn refusal(what: &str, why: &str) -> BdevError {
    BdevError::invalid("base_bdevs", what, why.to_string())
}

/// Starts the array `uuid` from those of `names` that are its legs.
async fn assemble(system: &Arc<BdevSystem>, uuid: Uuid, names: &[String], force: bool) -> Result<(), BdevError> {
    let mut found: Vec<(Arc<BdevInfo>, Superblock)> = Vec::new();
    for name in names {
        let Ok(bdev) = system.get(name) else { continue };
        // What somebody has built on is not a leg itself, but perhaps what is built there.
        if system.claim_state(&bdev).kind.is_some() {
            continue;
        }
        if let Ok(Some(one)) = superblock_of(system, &bdev).await
            && one.array == uuid
        {
            found.push((bdev, one));
        }
    }
    if found.is_empty() {
        return Err(refusal(&names.join(", "), "none of these has a superblock of the array"));
    }
    let blocks: Vec<Superblock> = found.iter().map(|(_, one)| one.clone()).collect();
    let name_of = |n: usize| found[n].0.name();
    let (newest, roles) = match assembly::assemble(&blocks, force) {
        Verdict::Start { newest, roles } => (newest, roles),
        Verdict::Wait { newest, missing } => {
            let why = format!(
                "leg {missing:?} is not there, which has everything according to '{}' (event {}) and might know more; when \
                 it is lost and no other server has the array, start without it: bdev_raid_start with force",
                name_of(newest),
                blocks[newest].events
            );
            return Err(refusal(&names.join(", "), &why));
        }
        Verdict::Diverged { newest, other } => {
            let why = format!(
                "'{}' (event {}, epoch {}) and '{}' (event {}, epoch {}) have each gone on without the other; choose one: \
                 bdev_raid_start with base_bdevs that names it and force, then wipe the first MiB of the other and add it with \
                 bdev_raid_add_base_bdev, which copies everything to it",
                name_of(newest),
                blocks[newest].events,
                blocks[newest].epoch,
                name_of(other),
                blocks[other].events,
                blocks[other].epoch,
            );
            tracing::error!(raid = blocks[newest].name, "{why}");
            return Err(refusal(&names.join(", "), &why));
        }
        Verdict::NothingInSync { newest } => {
            let why = format!("no leg that has everything is among them, according to '{}'", name_of(newest));
            return Err(refusal(&names.join(", "), &why));
        }
    };
    let sequence = blocks.iter().map(|one| one.sequence).max().expect("something was found");
    let sb = Superblock { sequence, ..blocks[newest].clone() };
    let mut legs: Vec<Option<Claimed>> = sb.legs.iter().map(|_| None).collect();
    let mut regions = Regions::new(sb.layout);
    let mut present = 0;
    for ((bdev, one), role) in found.iter().zip(&roles) {
        if *role == Role::Stranger {
            tracing::warn!(raid = sb.name, bdev = bdev.name(), "is no leg of this array any more");
            continue;
        }
        let claimed = match claim(system, &sb.name, bdev.name()) {
            Ok(claimed) => claimed,
            Err(error) if *role == Role::InSync => return Err(error),
            Err(_) => continue,
        };
        if *role == Role::InSync {
            read_log(system, bdev, &sb, &mut regions).await?;
        }
        present |= 1 << one.me;
        legs[one.me] = Some(claimed);
    }
    let (name, uuid) = (sb.name.clone(), sb.array);
    let array = Array::start(sb, regions, present, true, drawing(system));
    start(system, Start { name, uuid, array, persist: true, legs }).await.map(drop)
}

async fn read_log(
    system: &BdevSystem,
    bdev: &Arc<BdevInfo>,
    sb: &Superblock,
    regions: &mut Regions,
) -> Result<(), BdevError> {
    for index in 0..sb.layout.log_blocks() {
        let block = probe::read(system, bdev, sb.layout.log_lba(index), sb.layout.unit_blocks()).await?.to_vec();
        if !regions.add(sb.array, index, &block) {
            tracing::warn!(
                raid = sb.name,
                bdev = bdev.name(),
                index,
                "a block of the log is damaged: all of its regions are copied"
            );
        }
    }
    Ok(())
}

/// Starts an array that has superblocks, by name or UUID, from the legs that are known or named. `false`: it waits for more.
///
/// # Errors
/// In words, why it cannot be started, when it is to be (`force`).
pub async fn order(
    system: &Arc<BdevSystem>,
    name: &str,
    legs: Option<Vec<String>>,
    force: bool,
) -> Result<bool, BdevError> {
    let arrays = arrays(system);
    let turn = arrays.turn.lock().await;
    let_end(system, &arrays, name).await;
    if arrays.get(name).is_some() {
        return if force { Err(BdevError::Exists { name: name.to_string() }) } else { Ok(true) };
    }
    let waiting = arrays.waiting();
    let known = waiting.iter().find(|one| one.name == name || one.uuid.is_some_and(|uuid| uuid.to_string() == name));
    let mut uuid = known.and_then(|one| one.uuid);
    let named = legs.is_some();
    let legs = legs.or_else(|| known.map(|one| one.legs.clone())).unwrap_or_default();
    for leg in &legs {
        if let Ok(bdev) = system.get(leg)
            && let Ok(Some(found)) = superblock_of(system, &bdev).await
            && (found.name == name || found.array.to_string() == name)
        {
            uuid = Some(found.array);
        }
    }
    let result = match uuid {
        Some(uuid) => assemble(system, uuid, &legs, force).await,
        None if named => Err(refusal(&legs.join(", "), "none of these is a leg of the array")),
        None => Err(BdevError::NotFound { name: name.to_string() }),
    };
    drop(turn);
    match result {
        Ok(()) => Ok(true),
        Err(error) if force || legs.is_empty() => Err(error),
        Err(error) => {
            let count = legs.len();
            let why = error.to_string();
            arrays.wait_for(Waiting { name: name.to_string(), uuid, legs, count, create: None, why });
            Ok(false)
        }
    }
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

/// Adds a device to an array: in the place of a leg that was taken out or is lost, or as one more.
///
/// # Errors
/// As claiming it; [`BdevError::Invalid`] when it does not fit.
pub async fn add_leg(system: &Arc<BdevSystem>, raid: &str, leg: &str) -> Result<(), BdevError> {
    let arrays = arrays(system);
    let turn = arrays.turn.lock().await;
    let running = arrays.get(raid).ok_or_else(|| BdevError::NotFound { name: raid.to_string() })?;
    let claimed = claim(system, &running.name, leg)?;
    check_leg(claimed.base.bdev())?;
    let refuse = |why: &str| Err(BdevError::invalid("base_bdev", leg, why.to_string()));
    let layout = running.shared.layout;
    let geometry = claimed.base.bdev().device().geometry();
    if geometry.block_size != layout.block_size || !geometry.contains(layout.data_offset, layout.num_blocks) {
        return refuse("its blocks are of another size, or there are too few of them");
    }
    if let Ok(Some(found)) = superblock_of(system, claimed.base.bdev()).await {
        if found.array != running.uuid {
            return refuse(&format!("it is a leg of the array '{}'; wipe its first MiB to give that up", found.name));
        }
        if come_back_claimed(&running, claimed, found).await?.is_ok() {
            return Ok(());
        }
        return refuse("it has a history of its own as a leg of this array; wipe its first MiB to give that up");
    }
    claimed.connect(&running.shared);
    let Claimed { base, hook } = claimed;
    let id = system.random_uuid();
    let done = ask(&running.shared, move |driver, runtime| {
        let _ = &hook;
        let legs = &driver.array.superblock().legs;
        let vacant = |state| (0..legs.len()).find(|&n| legs[n].state == state && driver.is_vacant(n));
        let place = vacant(LegState::Empty).or_else(|| vacant(LegState::Out));
        let Some(place) = place.or_else(|| driver.array.add_leg(id)) else {
            return Err("the array has all the legs that there can be".to_string());
        };
        driver.attach(place, base, runtime).map_err(|error| error.to_string())?;
        driver.array.admit(place, Some(id));
        Ok(())
    })
    .await?;
    drop(turn);
    done.map_err(|why| BdevError::invalid("base_bdev", leg, why))
}

async fn come_back_claimed(
    running: &Arc<Running>,
    claimed: Claimed,
    found: Superblock,
) -> Result<Result<(), String>, BdevError> {
    claimed.connect(&running.shared);
    let Claimed { base, hook } = claimed;
    ask(&running.shared, move |driver, runtime| {
        let _ = &hook;
        let leg = found.me;
        if !driver.is_vacant(leg) {
            return Err("its place is taken".to_string());
        }
        driver.attach(leg, base, runtime).map_err(|error| error.to_string())?;
        let taken = driver.take_back(leg, &found);
        if taken.is_err() {
            driver.detach(leg, runtime);
        }
        taken
    })
    .await
}

/// Takes the device `leg` out of the array that it is in.
///
/// # Errors
/// [`BdevError::NotFound`] when it is in none; [`BdevError::Invalid`] when it is the last that has everything.
pub async fn remove_leg(system: &Arc<BdevSystem>, leg: &str) -> Result<(), BdevError> {
    let name = system.get(leg)?.name().to_string();
    let arrays = arrays(system);
    let turn = arrays.turn.lock().await;
    let has = |one: &&Arc<Running>| one.leg_names().contains(&name);
    let running = locked(&arrays.running).iter().find(has).cloned();
    let Some(running) = running else { return Err(BdevError::invalid("name", leg, "it is no base bdev of an array")) };
    let wanted = name.clone();
    let removed = ask(&running.shared, move |driver, _| driver.take_out(&wanted)).await?;
    if !removed {
        return Err(BdevError::invalid("name", leg, "no other base bdev has everything; the array would be lost"));
    }
    // It is let go of when no reactor uses it any more.
    while running.leg_names().contains(&name) {
        system.executor().sleep(Duration::from_millis(1)).await;
    }
    drop(turn);
    Ok(())
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
