//! What devices did.

use std::sync::Arc;

use reactor::ReactorId;
use reactor::time::TICK_RATE;
use schema::{Kind, Method, Param, Params, RpcError, code};
use serde_json::{Map, Value, json};

use crate::core::stats::{ERROR_NAMES, IoStats, StatsReset};
use crate::core::{BdevInfo, BdevSystem, OpKind};

const MODES: &[&str] = &["all", "maxmin", "error", "none"];

/// The methods.
pub const METHODS: &[Method<BdevSystem>] = &[
    Method::new("bdev_get_iostat", "Show what bdevs did: operations, bytes, latencies, errors.", |s, p| {
        Box::pin(get_iostat(s, p))
    })
    .params(&[
        Param::optional("names", Kind::Array(&Kind::Str), "Names of the bdevs to show; all when left out")
            .at_most(1024),
        Param::optional("per_channel", Kind::Bool, "Show each reactor's numbers instead of their sums"),
        Param::optional("reset_mode", Kind::Enum(MODES), "What to forget after it was shown; none when left out"),
    ])
    .refuses_with(code::INTERNAL_ERROR)
    .result("object with tick_rate, ticks and bdevs"),
    Method::new("bdev_reset_iostat", "Forget what bdevs did.", |s, p| Box::pin(reset_iostat(s, p)))
        .params(&[
            Param::optional("name", Kind::Str, "Name of the bdev; all when left out").at_least(1),
            Param::optional("mode", Kind::Enum(MODES), "What to forget; all when left out"),
        ])
        .refuses_with(code::INTERNAL_ERROR),
];

fn mode(word: Option<&str>, default: StatsReset) -> StatsReset {
    match word {
        Some("all") => StatsReset::All,
        Some("maxmin") => StatsReset::MaxMin,
        Some("error") => StatsReset::Error,
        Some("none") => StatsReset::None,
        _ => default,
    }
}

async fn get_iostat(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let bdevs = match params.opt::<Vec<String>>("names")? {
        None => system.list(),
        Some(names) => names.iter().map(|name| system.get(name)).collect::<Result<_, _>>()?,
    };
    let per_channel = params.opt_bool("per_channel").unwrap_or(false);
    let reset = mode(params.opt_str("reset_mode"), StatsReset::None);
    let mut shown = Vec::with_capacity(bdevs.len());
    for info in &bdevs {
        shown.push(if per_channel {
            let channels = system.channel_stats(info).await?;
            json!({ "name": info.name(), "channels": channels.iter().map(channel).collect::<Vec<_>>() })
        } else {
            let mut out = counters(&system.stats(info).await?);
            out.insert("name".to_string(), json!(info.name()));
            Value::Object(out)
        });
        if reset != StatsReset::None {
            system.reset_stats(info, reset).await?;
        }
    }
    Ok(json!({ "tick_rate": TICK_RATE, "ticks": system.platform().clock().now().as_nanos(), "bdevs": shown }))
}

async fn reset_iostat(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let bdevs: Vec<Arc<BdevInfo>> = match params.opt_str("name") {
        None => system.list(),
        Some(name) => vec![system.get(name)?],
    };
    let mode = mode(params.opt_str("mode"), StatsReset::All);
    for info in &bdevs {
        system.reset_stats(info, mode).await?;
    }
    Ok(json!(true))
}

/// One reactor's counters. Its thread has the reactor's number plus one, as in `thread_get_stats`.
fn channel((reactor, stats): &(ReactorId, IoStats)) -> Value {
    let mut out = counters(stats);
    out.insert("thread_id".to_string(), json!(reactor.0 + 1));
    Value::Object(out)
}

fn counters(stats: &IoStats) -> Map<String, Value> {
    let mut out = Map::new();
    let kinds = [
        ("read", "read", OpKind::Read),
        ("written", "write", OpKind::Write),
        ("unmapped", "unmap", OpKind::Unmap),
        ("copied", "copy", OpKind::Copy),
    ];
    for (bytes, name, kind) in kinds {
        let of = stats.of(kind);
        out.insert(format!("bytes_{bytes}"), json!(of.bytes));
        out.insert(format!("num_{name}_ops"), json!(of.ops));
        out.insert(format!("{name}_latency_ticks"), json!(of.latency_ns));
        out.insert(format!("max_{name}_latency_ticks"), json!(of.max_latency_ns));
        out.insert(format!("min_{name}_latency_ticks"), json!(of.shortest_ns()));
    }
    let errors = ERROR_NAMES.iter().zip(stats.errors).filter(|(_, count)| *count > 0);
    let errors: Map<String, Value> = errors.map(|(name, count)| (name.to_string(), json!(count))).collect();
    out.insert("io_error".to_string(), Value::Object(errors));
    out
}
