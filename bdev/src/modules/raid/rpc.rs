//! The methods `bdev_raid_*`.

use std::sync::Arc;

use schema::{Errno, Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};

use super::array::Standing;
use super::control::{self, Create, Running, Waiting, arrays};
use super::format::{DATA_OFFSET, LegState};
use crate::core::{BdevError, BdevSystem};
use crate::modules::common::take_uuid;
use crate::modules::layer::blame_base;

const CATEGORIES: &[&str] = &["all", "online", "configuring", "offline"];
const LEVELS: &[&str] = &["raid1", "1", "raid0", "0", "raid5f", "5f", "concat"];

/// The methods.
pub const METHODS: &[Method<BdevSystem>] = &[
    Method::new("bdev_raid_create", "Create a bdev on several others, each of which has all of it.", |s, p| {
        Box::pin(create(s, p))
    })
    .params(&[
        Param::required("name", Kind::Str, "Name of the bdev").at_least(1),
        Param::optional("strip_size_kb", Kind::U32, "Must be 0 or left out: raid1 has no strips"),
        Param::required("raid_level", Kind::Enum(LEVELS), "raid1 or 1; the others are not there"),
        Param::required(
            "base_bdevs",
            Kind::Array(&Kind::Str),
            "Names of 2 to 7 bdevs; those that are not there yet are waited for",
        ),
        Param::optional("uuid", Kind::Uuid, "UUID of the bdev; drawn at random when left out"),
        Param::optional(
            "superblock",
            Kind::Bool,
            "Whether to keep on each base bdev who has what: survives restarts, refuses stale base bdevs, copies only what \
             changed; false when left out",
        ),
    ])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR),
    Method::new("bdev_raid_delete", "Delete a raid bdev; its base bdevs stay.", |s, p| Box::pin(delete(s, p)))
        .params(&[
            Param::required("name", Kind::Str, "Name of the bdev"),
            Param::optional("clear_sb", Kind::Bool, "Whether to wipe the superblocks; false when left out"),
        ])
        .mutates()
        .refuses_with(code::INTERNAL_ERROR),
    Method::new("bdev_raid_get_bdevs", "Show raid bdevs.", |s, p| Box::pin(get_bdevs(s, p)))
        .params(&[Param::required("category", Kind::Enum(CATEGORIES), "Which to show")])
        .refuses_with(code::INTERNAL_ERROR)
        .result("array of raid bdevs"),
    Method::new("bdev_raid_add_base_bdev", "Add a base bdev: everything is copied to it.", |s, p| Box::pin(add(s, p)))
        .params(&[
            Param::required("raid_bdev", Kind::Str, "Name of the raid bdev"),
            Param::required("base_bdev", Kind::Str, "Name of the base bdev"),
        ])
        .mutates()
        .refuses_with(code::INTERNAL_ERROR),
    Method::new("bdev_raid_remove_base_bdev", "Take a base bdev out of its raid bdev.", |s, p| Box::pin(remove(s, p)))
        .params(&[Param::required("name", Kind::Str, "Name of the base bdev")])
        .mutates()
        .refuses_with(code::INTERNAL_ERROR),
    Method::new("bdev_raid_set_options", "Set how what a base bdev lacks is copied, for all arrays.", |s, p| {
        Box::pin(set_options(s, p))
    })
    .params(&[
        Param::optional("process_window_size_kb", Kind::U32, "KiB copied at once, while writes to them wait; 1024 at first")
            .at_least(1)
            .at_most(1 << 20),
        Param::optional("process_max_bandwidth_mb_sec", Kind::U32, "MiB a second at the most; 0 for no limit, as at first"),
    ])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR),
    Method::new(
        "bdev_raid_start",
        "Start a raid bdev that has superblocks from the base bdevs that there are. By itself it starts only when all are there \
         that may have everything; by order (force) also without them.",
        |s, p| Box::pin(start(s, p)),
    )
    .params(&[
        Param::required("name", Kind::Str, "Name or UUID of the raid bdev").at_least(1),
        Param::optional("base_bdevs", Kind::Array(&Kind::Str), "Names of its base bdevs; those that are known when left out"),
        Param::optional(
            "force",
            Kind::Bool,
            "Whether to start without base bdevs that may have more; nobody else may have the array then; true when left out",
        ),
    ])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR)
    .result("whether it runs"),
    Method::new("bdev_raid_get_status", "Show what a raid bdev knows of its base bdevs.", |s, p| Box::pin(status(s, p)))
        .params(&[Param::required("name", Kind::Str, "Name or UUID of the raid bdev")])
        .refuses_with(code::INTERNAL_ERROR)
        .result("object"),
];

fn names(params: &Params, field: &str) -> Option<Vec<String>> {
    let list = params.get(field)?.as_array()?;
    Some(list.iter().filter_map(|name| name.as_str().map(str::to_owned)).collect())
}

async fn create(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let level = params.str("raid_level")?;
    if !matches!(level, "raid1" | "1") {
        let error = RpcError::errno(Errno::INVAL, format!("there is no {level} here"));
        return Err(params.blame("raid_level", error.fix("raid1 is the only level that is served")));
    }
    if params.opt_u32("strip_size_kb").unwrap_or(0) != 0 {
        let error = RpcError::errno(Errno::INVAL, "raid1 has no strips");
        return Err(params.blame("strip_size_kb", error.fix("leave it out, or say 0")));
    }
    let options = Create {
        uuid: take_uuid(&params)?,
        superblock: params.opt_bool("superblock").unwrap_or(false),
        region_bytes: None,
    };
    let legs = names(&params, "base_bdevs").unwrap_or_default();
    control::create(&system, params.str("name")?, &legs, options).await?;
    Ok(json!(true))
}

async fn delete(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    control::delete(&system, params.str("name")?, params.opt_bool("clear_sb").unwrap_or(false)).await?;
    Ok(json!(true))
}

async fn add(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let added = control::add_leg(&system, params.str("raid_bdev")?, params.str("base_bdev")?).await;
    added.map_err(|error| blame_base(&params, "base_bdev", error))?;
    Ok(json!(true))
}

async fn remove(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    control::remove_leg(&system, params.str("name")?).await?;
    Ok(json!(true))
}

async fn set_options(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let settings = &arrays(&system).settings;
    let window = params.opt_u32("process_window_size_kb").map_or(settings.window_kb(), u64::from);
    let bandwidth = params.opt_u32("process_max_bandwidth_mb_sec").map_or(settings.bandwidth_mb(), u64::from);
    settings.set(window, bandwidth);
    Ok(json!(true))
}

async fn start(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let force = params.opt_bool("force").unwrap_or(true);
    Ok(json!(control::order(&system, params.str("name")?, names(&params, "base_bdevs"), force).await?))
}

async fn get_bdevs(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let category = params.str("category")?;
    let mut all = Vec::new();
    let arrays = arrays(&system);
    for running in arrays.running() {
        // One that is ending is not shown.
        if let Ok(shown) = describe(&running).await {
            all.push(shown);
        }
    }
    all.extend(arrays.waiting().iter().map(|waiting| describe_waiting(&system, waiting)));
    all.retain(|one| category == "all" || one["state"] == category);
    Ok(Value::Array(all))
}

fn base(name: Value, uuid: String, configured: bool, offset: u64, size: u64) -> Value {
    json!({ "name": name, "uuid": uuid, "is_configured": configured, "data_offset": offset, "data_size": size })
}

async fn describe(running: &Running) -> Result<Value, BdevError> {
    let status = control::status(running).await?;
    let layout = &status.superblock.layout;
    let mut bases = Vec::new();
    let mut found = 0;
    let mut legs = 0;
    for (known, (bdev, standing)) in status.superblock.legs.iter().zip(&status.legs) {
        legs += usize::from(known.state != LegState::Empty);
        let configured = matches!(standing, Standing::InSync | Standing::Rebuilding);
        found += usize::from(configured);
        let name = bdev.as_ref().map_or(Value::Null, |bdev| json!(bdev.name()));
        let uuid = bdev.as_ref().map_or(uuid::Uuid::nil(), |bdev| bdev.uuid());
        bases.push(base(name, uuid.to_string(), configured, layout.data_offset, layout.num_blocks));
    }
    let mut shown = json!({
        "name": running.name,
        "uuid": running.uuid.to_string(),
        "strip_size_kb": 0,
        "state": if status.online { "online" } else { "offline" },
        "raid_level": "raid1",
        "superblock": running.shared.persist,
        "num_base_bdevs": legs.max(bases.len()),
        "num_base_bdevs_discovered": found,
        "num_base_bdevs_operational": found,
        "base_bdevs_list": bases,
    });
    if let Some(progress) = status.progress {
        let target = status.legs[progress.target].0.as_ref().map(|bdev| bdev.name());
        let percent = (progress.done * 100).checked_div(progress.total).unwrap_or(100);
        shown["process"] = json!({
            "type": "rebuild",
            "target": target,
            "progress": { "blocks": progress.done, "percent": percent },
        });
    }
    Ok(shown)
}

fn describe_waiting(system: &BdevSystem, waiting: &Waiting) -> Value {
    let superblock = waiting.create.is_none_or(|create| create.superblock);
    let mut found = 0;
    let mut bases = Vec::new();
    for name in &waiting.legs {
        let bdev = system.get(name).ok();
        found += usize::from(bdev.is_some());
        let geometry = bdev.as_ref().map(|bdev| bdev.device().geometry());
        let offset = geometry.filter(|_| superblock).map_or(0, |geometry| DATA_OFFSET / u64::from(geometry.block_size));
        let size = geometry.map_or(0, |geometry| geometry.num_blocks.saturating_sub(offset));
        let uuid = bdev.as_ref().map_or(uuid::Uuid::nil(), |bdev| bdev.uuid());
        bases.push(base(json!(name), uuid.to_string(), bdev.is_some(), offset, size));
    }
    while bases.len() < waiting.count {
        bases.push(base(Value::Null, uuid::Uuid::nil().to_string(), false, 0, 0));
    }
    json!({
        "name": waiting.name,
        "uuid": waiting.uuid.unwrap_or_default().to_string(),
        "strip_size_kb": 0,
        "state": "configuring",
        "raid_level": "raid1",
        "superblock": superblock,
        "num_base_bdevs": waiting.count.max(waiting.legs.len()),
        "num_base_bdevs_discovered": found,
        "num_base_bdevs_operational": waiting.count.max(waiting.legs.len()),
        "base_bdevs_list": bases,
    })
}

async fn status(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let arrays = arrays(&system);
    let name = params.str("name")?;
    let Some(running) = arrays.get(name) else {
        let waiting = arrays.waiting();
        let known =
            waiting.iter().find(|one| one.name == name || one.uuid.is_some_and(|uuid| uuid.to_string() == name));
        let waiting = known.ok_or_else(|| BdevError::NotFound { name: name.to_string() })?;
        return Ok(
            json!({ "name": waiting.name, "state": "configuring", "reason": waiting.why, "base_bdevs": waiting.legs }),
        );
    };
    let status = control::status(&running).await?;
    let superblock = &status.superblock;
    let legs = superblock.legs.iter().zip(&status.legs).zip(&status.lacking);
    let legs: Vec<Value> = legs
        .map(|((known, (bdev, standing)), lacking)| {
            let state = match known.state {
                LegState::InSync if *standing == Standing::InSync => "in_sync",
                // Nothing may depend on it before that is durable on the others.
                LegState::InSync | LegState::Rebuilding => "rebuilding",
                LegState::Out => "out",
                LegState::Empty => "removed",
            };
            json!({
                "id": known.id.to_string(),
                "base_bdev": bdev.as_ref().map(|bdev| bdev.name()),
                "state": state,
                "since_event": known.since,
                "lacking_regions": lacking,
            })
        })
        .collect();
    Ok(json!({
        "name": running.name,
        "state": if status.online { "online" } else { "offline" },
        "events": superblock.events,
        "epoch": superblock.epoch.to_string(),
        "region_blocks": superblock.layout.region_blocks,
        "regions": superblock.layout.regions(),
        "dirty_regions": status.active,
        "copied_blocks": status.copied_blocks,
        "trouble": status.trouble,
        "legs": legs,
    }))
}
