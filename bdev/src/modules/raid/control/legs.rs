//! Legs come to an array and leave it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::super::format::{DATA_OFFSET, Layout, LegState, SUPER_BYTES, Superblock};
use super::super::shared::{Event, Shared};
use super::super::{PRODUCT, probe};
use super::{Running, arrays, ask, locked, refusal};
use crate::core::{BdevError, BdevEvent, BdevInfo, BdevSystem, Geometry, OpKind};
use crate::modules::layer::{self, Base};

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

pub(super) struct Claimed {
    pub(super) base: Base,
    hook: Arc<Hook>,
}

pub(super) fn claim(system: &Arc<BdevSystem>, raid: &str, leg: &str) -> Result<Claimed, BdevError> {
    let hook = Arc::new(Hook::default());
    let told = Arc::clone(&hook);
    let on_event = move |event| {
        // The size of the array stays as it is when a leg changes its own.
        if event == BdevEvent::Removing {
            told.removing();
        }
    };
    let base = layer::claim_with(system, &format!("{PRODUCT} '{raid}'"), leg, Arc::new(on_event))?;
    let _ = hook.bdev.set(Arc::clone(base.bdev()));
    Ok(Claimed { base, hook })
}

impl Claimed {
    /// Whom to tell from now on.
    pub(super) fn connect(&self, shared: &Arc<Shared>) {
        let _ = self.hook.shared.set(Arc::clone(shared));
        if self.base.bdev().is_removing() {
            self.hook.removing();
        }
    }
}

/// The superblock on a device, if it has one.
pub(super) async fn superblock_of(system: &BdevSystem, bdev: &Arc<BdevInfo>) -> Result<Option<Superblock>, String> {
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
pub(super) fn common_geometry(layout: &Layout, legs: &[Arc<BdevInfo>]) -> Geometry {
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

pub(super) fn check_leg(leg: &BdevInfo) -> Result<(), BdevError> {
    if !leg.supports(OpKind::Write) || leg.device().geometry().read_only {
        return Err(BdevError::invalid("base_bdevs", leg.name(), "it is read-only, and every leg is written"));
    }
    Ok(())
}

/// A leg of an array that runs has turned up.
pub(super) async fn come_back(
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
    come_back_claimed(running, claimed, found).await?.map_err(|why| refusal(bdev, &why))
}

/// Adds a device to an array: in the place of a leg that was taken out or is lost, or as one more.
///
/// # Errors
/// As claiming it; [`BdevError::Invalid`] when it does not fit.
pub async fn add_leg(system: &Arc<BdevSystem>, raid: &str, leg: &str) -> Result<(), BdevError> {
    let arrays = arrays(system);
    let turn = arrays.turn.lock().await;
    let running = arrays.get(raid).ok_or_else(|| BdevError::NotFound { name: raid.to_string() })?;
    let bdev = system.get(leg)?;
    if running.leg_names().iter().any(|name| name == bdev.name()) {
        return add_again(system, &running, bdev).await;
    }
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
    let base = claimed.base;
    let id = system.random_uuid();
    let done = ask(&running.shared, move |driver, runtime| {
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

/// Adds a device that the array has kept although its leg went out: it does so as long as the device is there.
async fn add_again(system: &Arc<BdevSystem>, running: &Arc<Running>, bdev: Arc<BdevInfo>) -> Result<(), BdevError> {
    let refuse = |why: String| BdevError::invalid("base_bdev", bdev.name(), why);
    let found = superblock_of(system, &bdev).await.map_err(|why| refuse(format!("it cannot be looked at: {why}")))?;
    let (kept, id) = (Arc::clone(&bdev), system.random_uuid());
    ask(&running.shared, move |driver, _| driver.take_again(&kept, found.as_ref(), id)).await?.map_err(refuse)
}

/// The same, with the leg claimed; the inner error says why the array does not want it.
async fn come_back_claimed(
    running: &Arc<Running>,
    claimed: Claimed,
    found: Superblock,
) -> Result<Result<(), String>, BdevError> {
    claimed.connect(&running.shared);
    let base = claimed.base;
    ask(&running.shared, move |driver, runtime| {
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
    while running.leg_names().contains(&name) && running.closed.peek().is_none() {
        system.executor().sleep(Duration::from_millis(1)).await;
    }
    drop(turn);
    Ok(())
}
