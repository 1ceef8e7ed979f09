//! `bdev_nvme_start_discovery`, `bdev_nvme_stop_discovery`, `bdev_nvme_get_discovery_info`.

use std::sync::Arc;
use std::time::Duration;

use nvmf::spec::fabrics::DISCOVERY_NQN;
use schema::{Kind, Method, Param, Params, RpcError};
use serde_json::{Value, json};

use super::attach::{ADRFAM, NQN_MAX_BYTES, TRADDR, TRTYPE, reconnect, site};
use super::trid_of;
use crate::system::InitiatorSystem;
use crate::system::discovery::{Service, Start};

/// The port of discovery services, where none was given.
const DISCOVERY_PORT: u16 = 8009;
/// How long is waited where no time is given. Other changes wait meanwhile.
const DEFAULT_WAIT: Duration = Duration::from_secs(30);

pub(super) const START: Method<InitiatorSystem> = Method::new(
    "bdev_nvme_start_discovery",
    "Attach all subsystems that a discovery service lists, and follow what it lists from then on.",
    |s, p| Box::pin(start(s, p)),
)
.params(&[
    Param::required("name", Kind::Str, "Name of the service; its controllers are called NAME0, NAME1, ...").at_least(1),
    Param::required("trtype", Kind::Str, TRTYPE),
    Param::required("traddr", Kind::Str, TRADDR),
    Param::optional("adrfam", Kind::Str, ADRFAM),
    Param::optional("trsvcid", Kind::Str, "Port, as text; default 8009"),
    Param::optional("hostnqn", Kind::Str, "NQN of this host; when left out, one drawn at each start")
        .at_least(1)
        .at_most(NQN_MAX_BYTES),
    Param::optional("wait_for_attach", Kind::Bool, "Answer when all that is listed was attached; default: at once"),
    Param::optional(
        "attach_timeout_ms",
        Kind::U64,
        "Time for that, milliseconds, after which the service is stopped; more than 0 implies wait_for_attach; default 30000",
    )
    .at_most(3_600_000),
    Param::optional("ctrlr_loss_timeout_sec", Kind::I32, "As of bdev_nvme_attach_controller, for what is found").at_least(-1),
    Param::optional("reconnect_delay_sec", Kind::U32, "As of bdev_nvme_attach_controller, for what is found"),
    Param::optional("fast_io_fail_timeout_sec", Kind::U32, "As of bdev_nvme_attach_controller, for what is found"),
])
.mutates()
.refuses_with(super::REFUSAL);

pub(super) const STOP: Method<InitiatorSystem> =
    Method::new("bdev_nvme_stop_discovery", "Stop a discovery service, and detach what it has attached.", |s, p| {
        Box::pin(stop(s, p))
    })
    .params(&[Param::required("name", Kind::Str, "Name of the service").at_least(1)])
    .mutates()
    .refuses_with(super::REFUSAL);

pub(super) const GET: Method<InitiatorSystem> =
    Method::new("bdev_nvme_get_discovery_info", "Show the discovery services.", |s, p| Box::pin(get(s, p)))
        .result("array of {name, trid, referrals: [{trid}]}");

async fn start(system: Arc<InitiatorSystem>, params: Params) -> Result<Value, RpcError> {
    let timeout = params.opt_u64("attach_timeout_ms").filter(|ms| *ms > 0).map(Duration::from_millis);
    let wait = params.opt_bool("wait_for_attach").unwrap_or(false).then_some(DEFAULT_WAIT);
    let start = Start {
        name: params.str("name")?.to_string(),
        site: site(&params, DISCOVERY_PORT)?,
        hostnqn: params.opt_str("hostnqn").unwrap_or(system.hostnqn()).to_string(),
        reconnect: reconnect(&system, &params)?,
        wait: timeout.or(wait),
        params: params.as_value().clone(),
    };
    system.start_discovery(start).await?;
    Ok(json!(true))
}

async fn stop(system: Arc<InitiatorSystem>, params: Params) -> Result<Value, RpcError> {
    system.stop_discovery(params.str("name")?).await?;
    Ok(json!(true))
}

fn show(service: &Arc<Service>) -> Value {
    let referral = |site, subnqn: &str| json!({ "trid": trid_of(site, subnqn) });
    let referrals: Vec<Value> = service.referrals().iter().map(|post| referral(post.site, &post.subnqn)).collect();
    json!({ "name": service.name, "trid": trid_of(service.site, DISCOVERY_NQN), "referrals": referrals })
}

async fn get(system: Arc<InitiatorSystem>, _: Params) -> Result<Value, RpcError> {
    Ok(system.services().iter().map(show).collect())
}
