//! The methods `bdev_appliance_*`.

use std::sync::Arc;
use std::time::Duration;

use schema::{Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};

use super::settings::{OnDisconnect, Placement, Settings};
use super::{Device, PRODUCT};
use crate::core::BdevSystem;
use crate::modules::common::{device_as, take_name, take_uuid};

/// The longest time: a day, in ms.
const MAX_MS: i128 = 24 * 3600 * 1000;

/// The methods.
pub const METHODS: &[Method<BdevSystem>] = &[
    Method::new("bdev_appliance_create", "Create a bdev whose I/O is done by a handler.", |s, p| {
        Box::pin(create(s, p))
    })
    .params(&[
        Param::required("name", Kind::Str, "Name of the bdev").at_least(1),
        Param::required(
            "handler",
            Kind::Str,
            "Name of a handler, the absolute path of a shared object, or unix: and the absolute path of a socket on which \
             its process connects",
        )
        .at_least(1),
        Param::required("num_blocks", Kind::U64, "Number of blocks"),
        Param::required("block_size", Kind::U32, "Bytes in a block: a power of two from 512 to 65536"),
        Param::optional("uuid", Kind::Uuid, "UUID of the bdev; drawn at random when left out"),
        Param::optional(
            "workers",
            Kind::U32,
            "Threads of the handler, also in a process of its own; 0: it runs on the reactors themselves, which only handlers \
             in the server that never block can; 1 when left out",
        )
        .at_most(Settings::MAX_WORKERS as i128),
        Param::optional("cores", Kind::Array(&Kind::U32), "Cores for the workers, in turn; any when left out"),
        Param::optional(
            "queue_depth",
            Kind::U32,
            "Requests of each reactor that may be with the handler at once, others wait; 256 when left out",
        )
        .at_least(1)
        .at_most(Settings::MAX_QUEUE_DEPTH as i128),
        Param::optional(
            "spin_us",
            Kind::U32,
            "Microseconds that a worker looks for more work before it sleeps; 200, as reactors do, when left out",
        ),
        Param::optional(
            "placement",
            Kind::Enum(Placement::NAMES),
            "Which worker gets a request: by range of blocks, by reactor, or in turn; lba_range when left out",
        ),
        Param::optional(
            "timeout_ms",
            Kind::U64,
            "Milliseconds after which an I/O ends without its handler; 0: never; 20000 when left out",
        )
        .at_most(MAX_MS),
        Param::optional(
            "on_disconnect",
            Kind::Enum(OnDisconnect::NAMES),
            "What happens to I/O while the process of a handler on a socket is away; fail when left out",
        ),
        Param::optional(
            "latency_sample",
            Kind::U32,
            "Measure one request in so many by stage; 0: none; 16 when left out",
        ),
        Param::optional("read_only", Kind::Bool, "Refuse writes; false when left out"),
        Param::optional("options", Kind::Any, "An object of options for the handler"),
    ])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR)
    .result("name of the bdev"),
    Method::new(
        "bdev_appliance_delete",
        "Delete an appliance bdev and stop its handler; what the handler does not end is ended without it.",
        |s, p| Box::pin(delete(s, p)),
    )
    .params(&[Param::required("name", Kind::Str, "Name of the bdev")])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR),
    Method::new("bdev_appliance_resize", "Change the size of an appliance bdev, if its handler can.", |s, p| {
        Box::pin(resize(s, p))
    })
    .params(&[
        Param::required("name", Kind::Str, "Name of the bdev"),
        Param::required("num_blocks", Kind::U64, "New number of blocks").at_least(1),
    ])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR),
    Method::new("bdev_appliance_get_stats", "Show counters and latencies by stage of appliance bdevs.", |s, p| {
        Box::pin(get_stats(s, p))
    })
    .params(&[Param::optional("name", Kind::Str, "Name of one bdev; all when left out").at_least(1)])
    .refuses_with(code::INTERNAL_ERROR)
    .result("array of counters; times in nanoseconds"),
];

async fn create(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let mut settings = Settings::new(params.str("handler")?, params.u32("block_size")?, params.u64("num_blocks")?);
    settings.geometry.read_only = params.opt_bool("read_only").unwrap_or(false);
    let number = |name: &str, default: usize| params.opt_u32(name).map_or(default, |value| value as usize);
    settings.workers = number("workers", settings.workers);
    settings.queue_depth = number("queue_depth", settings.queue_depth);
    if let Some(cores) = params.get("cores").and_then(Value::as_array) {
        settings.cores = cores.iter().filter_map(Value::as_u64).map(|core| core as usize).collect();
    }
    if let Some(us) = params.opt_u32("spin_us") {
        settings.spin = Duration::from_micros(us.into());
    }
    if let Some(placement) = params.opt_str("placement").and_then(Placement::from_name) {
        settings.placement = placement;
    }
    if let Some(ms) = params.opt_u64("timeout_ms") {
        settings.timeout = (ms > 0).then(|| Duration::from_millis(ms));
    }
    if let Some(policy) = params.opt_str("on_disconnect").and_then(OnDisconnect::from_name) {
        settings.on_disconnect = policy;
    }
    settings.latency_sample = params.opt_u32("latency_sample").unwrap_or(settings.latency_sample);
    if let Some(options) = params.get("options").filter(|options| !options.is_null()) {
        settings.options = options.clone();
    }
    let info = super::create(&system, take_name(&params)?, take_uuid(&params)?, settings).await?;
    Ok(json!(info.name()))
}

async fn delete(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    super::delete(&system, params.str("name")?).await?;
    Ok(json!(true))
}

async fn resize(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    super::resize(&system, params.str("name")?, params.u64("num_blocks")?).await?;
    Ok(json!(true))
}

async fn get_stats(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    if let Some(name) = params.opt_str("name") {
        let info = system.get(name)?;
        return Ok(json!([device_as::<Device>(&info, PRODUCT)?.stats()]));
    }
    let all = system.list();
    Ok(all.iter().filter_map(|info| device_as::<Device>(info, PRODUCT).ok()).map(|device| device.stats()).collect())
}
