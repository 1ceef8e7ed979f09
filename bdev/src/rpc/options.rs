//! Sizes of pools.
//!
//! SPDK's process-wide pools of small and large buffers become shares of each reactor's own: the smallest and the largest
//! class of its payload memory. There is no cache in front of a pool that nobody else uses, so `iobuf_get_stats` reports
//! all buffers as handed out from the cache, which is the whole pool; the class between counts as large.

use std::sync::Arc;

use reactor::buffer::ClassStats;
use schema::{Kind, Method, Param, Params, RpcError, States};
use serde_json::{Value, json};

use crate::core::BdevSystem;

/// More would be a mistake in a file rather than a wish.
const MAX_IOS: i128 = 1 << 20;
const MAX_BUFFERS: i128 = 1 << 22;

/// The methods.
pub const METHODS: &[Method<BdevSystem>] = &[
    Method::new("bdev_set_options", "Set the sizes of the bdev layer's pools.", |s, p| Box::pin(set_options(s, p)))
        .params(&[
            Param::optional("bdev_io_pool_size", Kind::U32, "I/Os that may be outstanding on each reactor")
                .at_least(2)
                .at_most(MAX_IOS),
            Param::optional("bdev_io_cache_size", Kind::U32, "Kept for scripts, without effect: pools are per reactor"),
            Param::optional("bdev_auto_examine", Kind::Bool, "Examine new bdevs by themselves"),
            Param::optional("iobuf_small_cache_size", Kind::U32, "Accepted, without effect").deprecated(),
            Param::optional("iobuf_large_cache_size", Kind::U32, "Accepted, without effect").deprecated(),
        ])
        .states(States::STARTUP)
        .mutates(),
    Method::new("iobuf_set_options", "Set the amount of payload memory.", |s, p| Box::pin(set_iobuf(s, p)))
        .params(&[
            Param::optional("small_pool_count", Kind::U64, "Buffers of 4 KiB, shared out among the reactors")
                .at_least(1)
                .at_most(MAX_BUFFERS),
            Param::optional("large_pool_count", Kind::U64, "Buffers of 128 KiB, shared out among the reactors")
                .at_least(1)
                .at_most(MAX_BUFFERS),
            Param::optional("small_bufsize", Kind::U32, "Accepted, without effect: small buffers are 4 KiB")
                .deprecated(),
            Param::optional("large_bufsize", Kind::U32, "Accepted, without effect: large buffers are 128 KiB")
                .deprecated(),
            Param::optional("enable_numa", Kind::Bool, "Accepted, without effect: memory comes from where it is used")
                .deprecated(),
        ])
        .states(States::STARTUP)
        .mutates(),
    Method::new("iobuf_get_stats", "Show how payload memory was handed out.", |s, _| Box::pin(iobuf_stats(s)))
        .states(States::BOTH)
        .result("array of modules with their pools"),
];

async fn set_options(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let mut options = system.options();
    options.io_pool_size = params.opt_u32("bdev_io_pool_size").unwrap_or(options.io_pool_size);
    options.io_cache_size = params.opt_u32("bdev_io_cache_size").unwrap_or(options.io_cache_size);
    options.auto_examine = params.opt_bool("bdev_auto_examine").unwrap_or(options.auto_examine);
    system.set_options(options).await?;
    Ok(json!(true))
}

async fn set_iobuf(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let mut options = system.options();
    options.small_pool_count = params.opt_u64("small_pool_count").or(options.small_pool_count);
    options.large_pool_count = params.opt_u64("large_pool_count").or(options.large_pool_count);
    system.set_options(options).await?;
    Ok(json!(true))
}

async fn iobuf_stats(system: Arc<BdevSystem>) -> Result<Value, RpcError> {
    let mut sums = [ClassStats::default(); 3];
    for (_, classes) in system.pool_stats().await? {
        for (sum, class) in sums.iter_mut().zip(classes) {
            sum.total += class.total;
            sum.handed_out += class.handed_out;
            sum.retries += class.retries;
        }
    }
    let show = |classes: &[ClassStats]| {
        let sum = |count: fn(&ClassStats) -> u64| classes.iter().map(count).sum::<u64>();
        let (total, retries) = (sum(|class| class.total as u64), sum(|class| class.retries));
        json!({ "cache": sum(|class| class.handed_out), "main": 0, "retry": retries, "cache_size": total })
    };
    Ok(json!([{ "module": "bdev", "small_pool": show(&sums[..1]), "large_pool": show(&sums[1..]) }]))
}
