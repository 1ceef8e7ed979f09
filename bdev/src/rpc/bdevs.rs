//! What devices there are.

use std::sync::Arc;
use std::time::Duration;

use schema::{Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};

use crate::core::{BdevError, BdevInfo, BdevSystem, OpKind};

/// How often `bdev_get_bdevs` looks again for a device that it waits for.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The methods.
pub const METHODS: &[Method<BdevSystem>] = &[
    Method::new("bdev_get_bdevs", "Show all bdevs, or one.", |s, p| Box::pin(get_bdevs(s, p)))
        .params(&[
            Param::optional("name", Kind::Str, "Name, alias or UUID of the one to show").at_least(1),
            Param::optional("timeout", Kind::U64, "Milliseconds to wait for the named bdev to appear; 0 when left out")
                .at_most(24 * 3600 * 1000),
        ])
        .refuses_with(code::INTERNAL_ERROR)
        .result("array of bdevs"),
    Method::new("bdev_wait_for_examine", "Return when all bdevs have been examined.", |s, _| {
        Box::pin(async move {
            while s.is_examining() {
                s.executor().sleep(LOOK_AGAIN).await;
            }
            Ok(json!(true))
        })
    }),
    Method::new("bdev_examine", "Show a bdev to the modules that build on what they find on it.", |s, p| {
        Box::pin(examine(s, p))
    })
    .params(&[Param::required("name", Kind::Str, "Name of the bdev")])
    .refuses_with(code::INTERNAL_ERROR),
];

async fn get_bdevs(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let Some(name) = params.opt_str("name") else {
        return Ok(system.list().iter().map(|info| describe(&system, info)).collect());
    };
    let timeout = Duration::from_millis(params.opt_u64("timeout").unwrap_or(0));
    let clock = system.platform().clock();
    let until = clock.now() + timeout;
    loop {
        match system.get(name) {
            Ok(info) => return Ok(json!([describe(&system, &info)])),
            Err(error) if clock.now() >= until => return Err(error.into()),
            Err(_) => system.executor().sleep(LOOK_AGAIN.min(until.since(clock.now()))).await,
        }
    }
}

async fn examine(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let name = params.str("name")?;
    let info = system.get(name)?;
    if info.is_removing() {
        return Err(BdevError::BeingRemoved { name: name.to_string() }.into());
    }
    system.examine(&info);
    while system.is_examining() {
        system.executor().sleep(LOOK_AGAIN).await;
    }
    Ok(json!(true))
}

/// One device as `bdev_get_bdevs` shows it.
pub fn describe(system: &BdevSystem, info: &BdevInfo) -> Value {
    let geometry = info.device().geometry();
    let uuid = info.uuid().to_string();
    let own = (info.name() != uuid).then_some(uuid.as_str());
    let aliases: Vec<&str> = own.into_iter().chain(info.aliases().iter().map(String::as_str)).collect();
    let mut out = json!({
        "name": info.name(),
        "aliases": aliases,
        "product_name": info.device().product_name(),
        "block_size": geometry.block_size,
        "num_blocks": geometry.num_blocks,
        "preferred_write_alignment": 0,
        "preferred_write_granularity": 0,
        "optimal_write_size": 0,
        "preferred_unmap_alignment": 0,
        "preferred_unmap_granularity": geometry.unmap_granularity,
        "uuid": uuid,
        "assigned_rate_limits": {
            "rw_ios_per_sec": 0,
            "rw_mbytes_per_sec": 0,
            "r_mbytes_per_sec": 0,
            "w_mbytes_per_sec": 0,
        },
        "claimed": false,
        "zoned": false,
        "supported_io_types": supported(info),
        "driver_specific": info.device().driver_specific(),
    });
    if let Some(kind) = system.claim_state(info).kind {
        out["claimed"] = json!(true);
        out["claim_type"] = json!(kind.name());
    }
    out
}

/// What the layer takes for a device, done by the device itself or emulated.
fn supported(info: &BdevInfo) -> Value {
    let never = [
        "nvme_admin",
        "nvme_io",
        "nvme_io_md",
        "zcopy",
        "get_zone_info",
        "zone_management",
        "zone_append",
        "seek_hole",
        "seek_data",
        "nvme_iov_md",
        "nvme_nssr",
        "write_uncorrectable",
    ];
    let mut types: serde_json::Map<String, Value> = never.iter().map(|name| (name.to_string(), json!(false))).collect();
    for kind in OpKind::ALL {
        types.insert(kind.name().to_string(), json!(info.supports(kind)));
    }
    // What waits in the layer can always be aborted.
    types.insert("abort".to_string(), json!(true));
    Value::Object(types)
}
