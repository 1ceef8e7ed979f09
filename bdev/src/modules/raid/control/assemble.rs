//! An array is put together from the legs that there are.

use std::sync::Arc;

use uuid::Uuid;

use super::super::array::Array;
use super::super::assembly::{self, Role, Verdict};
use super::super::format::Superblock;
use super::super::probe;
use super::super::regions::Regions;
use super::legs::{Claimed, claim, superblock_of};
use super::{Start, Waiting, arrays, drawing, let_end, refusal, start};
use crate::core::{BdevError, BdevInfo, BdevSystem};

/// Starts the array `uuid` from those of `names` that are its legs.
pub(super) async fn assemble(
    system: &Arc<BdevSystem>,
    uuid: Uuid,
    names: &[String],
    force: bool,
) -> Result<(), BdevError> {
    let found = legs_among(system, uuid, names).await;
    if found.is_empty() {
        return Err(refusal(&names.join(", "), "none of these has a superblock of the array"));
    }
    let blocks: Vec<Superblock> = found.iter().map(|(_, one)| one.clone()).collect();
    let (newest, roles) = chosen(assembly::assemble(&blocks, force), &found, names)?;
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

/// Those of `names` that have a superblock of the array.
async fn legs_among(system: &Arc<BdevSystem>, uuid: Uuid, names: &[String]) -> Vec<(Arc<BdevInfo>, Superblock)> {
    let mut found = Vec::new();
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
    found
}

/// By whom to start, and what each is.
///
/// # Errors
/// In words, why it cannot be started, and what to do.
fn chosen(
    verdict: Verdict,
    found: &[(Arc<BdevInfo>, Superblock)],
    names: &[String],
) -> Result<(usize, Vec<Role>), BdevError> {
    let (name_of, sb) = (|n: usize| found[n].0.name(), |n: usize| &found[n].1);
    match verdict {
        Verdict::Start { newest, roles } => Ok((newest, roles)),
        Verdict::Wait { newest, missing } => {
            let why = format!(
                "leg {missing:?} is not there, which has everything according to '{}' (event {}) and might know more; when \
                 it is lost and no other server has the array, start without it: bdev_raid_start with force",
                name_of(newest),
                sb(newest).events
            );
            Err(refusal(&names.join(", "), &why))
        }
        Verdict::Diverged { newest, other } => {
            let why = format!(
                "'{}' (event {}, epoch {}) and '{}' (event {}, epoch {}) have each gone on without the other; choose one: \
                 bdev_raid_start with base_bdevs that names it and force, then wipe the first MiB of the other and add it with \
                 bdev_raid_add_base_bdev, which copies everything to it",
                name_of(newest),
                sb(newest).events,
                sb(newest).epoch,
                name_of(other),
                sb(other).events,
                sb(other).epoch,
            );
            tracing::error!(raid = sb(newest).name, "{why}");
            Err(refusal(&names.join(", "), &why))
        }
        Verdict::NothingInSync { newest } => {
            let why = format!("no leg that has everything is among them, according to '{}'", name_of(newest));
            Err(refusal(&names.join(", "), &why))
        }
    }
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
