//! Which reactor connections are on: the scheduler's options, and moving one queue by hand.

use std::sync::Arc;

use schema::{ConfigEntry, ConfigSource, Kind, Method, Param, Params, RpcError, States};
use serde_json::{Value, json};

use super::{NQN, TGT_NAME, check_target, known_words, not_served};
use crate::target::balance::Options;
use crate::target::system::{NvmfSystem, QueueName, TargetError, poll_group_name};

const fn percent(name: &'static str, help: &'static str) -> Param {
    Param::optional(name, Kind::U8, help).at_least(1).at_most(100)
}

/// `framework_set_scheduler`
pub(super) const SET: Method<NvmfSystem> = Method::new(
    "framework_set_scheduler",
    "Set whether queues of hosts move from reactors that are too busy to others.",
    |system, params| Box::pin(set(system, params)),
)
.params(&[
    Param::required(
        "name",
        Kind::Str,
        "static: they stay where they were accepted; dynamic, as at the start: at most one moves in a period",
    ),
    Param::optional("period", Kind::U64, "Microseconds between two looks at the reactors' loads; 1000000 unless set")
        .at_least(10_000)
        .at_most(3_600_000_000),
    percent("load_limit", "How much less busy another reactor has to be, in percent of its time; 20 unless set"),
    percent("core_limit", "From which load on a reactor gives queues away, in percent; 80 unless set"),
    percent("core_busy", "Up to which load a reactor takes queues, in percent; 95 unless set"),
    Param::optional("mappings", Kind::Str, "Not served: queues are moved by load"),
])
.states(States::BOTH)
.mutates();

/// `framework_get_scheduler`
pub(super) const GET: Method<NvmfSystem> = Method::new(
    "framework_get_scheduler",
    "Show whether queues of hosts move between reactors.",
    |system: Arc<NvmfSystem>, _| Box::pin(async move { Ok(shown(&system.scheduler())) }),
)
.result("an object with scheduler_name and its options");

/// `nvmf_subsystem_move_qpair`
pub(super) const MOVE: Method<NvmfSystem> = Method::new(
    "nvmf_subsystem_move_qpair",
    "Move an I/O queue of a host, with its connection, to another reactor.",
    |system, params| Box::pin(move_qpair(system, params)),
)
.params(&[
    NQN,
    Param::required("cntlid", Kind::U16, "Its controller, as nvmf_subsystem_get_qpairs shows it"),
    Param::required("qid", Kind::U16, "Its queue identifier").at_least(1),
    Param::required("thread", Kind::Str, "The poll group to move it to, as nvmf_get_stats names it"),
    TGT_NAME,
]);

async fn set(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    not_served(&params, "mappings", "queues are moved by load, not by a list", "leave it out")?;
    let dynamic = match params.str("name")? {
        "static" => false,
        "dynamic" => true,
        odd => {
            return Err(params
                .invalid("name", "there is no such scheduler")
                .fix(known_words(odd, &["static", "dynamic"])));
        }
    };
    let mut options = Options { dynamic, ..system.scheduler() };
    options.period_us = params.opt("period")?.unwrap_or(options.period_us);
    options.load_limit = params.opt("load_limit")?.unwrap_or(options.load_limit);
    options.core_limit = params.opt("core_limit")?.unwrap_or(options.core_limit);
    options.core_busy = params.opt("core_busy")?.unwrap_or(options.core_busy);
    system.set_scheduler(options);
    Ok(json!(true))
}

fn shown(options: &Options) -> Value {
    let mut shown = json!({
        "scheduler_name": options.name(),
        "scheduler_period": if options.dynamic { options.period_us } else { 0 },
        "isolated_core_mask": "0",
        "scheduling_core": 0,
    });
    if options.dynamic {
        shown["load_limit"] = json!(options.load_limit);
        shown["core_limit"] = json!(options.core_limit);
        shown["core_busy"] = json!(options.core_busy);
    }
    shown
}

async fn move_qpair(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    let name = QueueName {
        subnqn: params.str("nqn")?.to_owned(),
        cntlid: params.opt("cntlid")?.unwrap_or_default(),
        qid: params.opt("qid")?.unwrap_or_default(),
    };
    let stopping = |stopping| RpcError::from(TargetError::from(stopping));
    let groups = system.reactors().stats().await.map_err(stopping)?;
    let wanted = params.str("thread")?;
    let Some(to) = groups.iter().map(|group| group.reactor).find(|id| poll_group_name(*id) == wanted) else {
        let names: Vec<String> = groups.iter().map(|group| poll_group_name(group.reactor)).collect();
        return Err(params
            .invalid("thread", "there is no such poll group")
            .fix(format!("known are {}", names.join(", "))));
    };
    let qpairs = system.reactors().qpairs().await.map_err(stopping)?;
    let Some(from) = qpairs.iter().find(|qpair| qpair.name() == name).map(|qpair| qpair.reactor) else {
        let error = params.invalid("qid", "the controller has no such queue");
        return Err(error.fix("look with nvmf_subsystem_get_qpairs"));
    };
    let moved = system.reactors().move_qpair(name, from, to).await.map_err(stopping)?;
    moved.map_err(|why| RpcError::invalid_state(why.to_string()))?;
    Ok(json!(true))
}

/// "scheduler" in saved configurations.
struct SchedulerConfig(Arc<NvmfSystem>);

/// The scheduler's part of the saved configuration.
pub fn scheduler_config_source(system: &Arc<NvmfSystem>) -> Arc<dyn ConfigSource> {
    Arc::new(SchedulerConfig(Arc::clone(system)))
}

impl ConfigSource for SchedulerConfig {
    fn name(&self) -> &'static str {
        "scheduler"
    }

    fn save(&self) -> Vec<ConfigEntry> {
        let options = self.0.scheduler();
        if options == Options::default() {
            return Vec::new();
        }
        let params = json!({
            "name": options.name(),
            "period": options.period_us,
            "load_limit": options.load_limit,
            "core_limit": options.core_limit,
            "core_busy": options.core_busy,
        });
        vec![ConfigEntry::new("framework_set_scheduler", params)]
    }
}
