//! `bdev_nvme_set_options`.

use std::sync::Arc;
use std::time::Duration;

use nvmf::host::OnTimeout;
use schema::{Kind, Method, Param, Params, RpcError, States};
use serde_json::{Value, json};

use super::{MULTIPATH_OPTS, not_served, policy};
use crate::policy::Mode;
use crate::system::{InitiatorSystem, Settings};

const RDMA: &str = "Accepted: receives and completion queues of RDMA are as large as its queues need";
const KEYS: &str = "Accepted: of authentication, which is not served: keys are refused";
const ONLY_ZERO: &str = "Only 0, the default, is served";

const SPDK_ADMINQ_POLL_PERIOD_US: u64 = 10_000;

pub(super) const SET: Method<InitiatorSystem> = Method::new(
    "bdev_nvme_set_options",
    "Set what holds for controllers that are attached from now on. Not while one is.",
    |s, p| Box::pin(set(s, p)),
)
.params(&[
    Param::optional(
        "action_on_timeout",
        Kind::Enum(&["none", "reset", "abort"]),
        "What is done when an I/O command times out: reset, the default: the path is; abort: the controller is asked to abort \
         it, and the path is reset when it takes as long again; none: it is waited for. Admin commands always reset",
    ),
    Param::optional("timeout_us", Kind::U64, "Time for an I/O command, microseconds; 0, the default: 30 s"),
    Param::optional("timeout_admin_us", Kind::U64, "Time for an admin command, microseconds; 0, the default: 5 s"),
    Param::optional("keep_alive_timeout_ms", Kind::U32, "Keep-alive timeout, milliseconds; default 10000").at_most(3_600_000),
    Param::optional("arbitration_burst", Kind::U32, ONLY_ZERO),
    Param::optional("low_priority_weight", Kind::U32, ONLY_ZERO),
    Param::optional("medium_priority_weight", Kind::U32, ONLY_ZERO),
    Param::optional("high_priority_weight", Kind::U32, ONLY_ZERO),
    Param::optional(
        "nvme_adminq_poll_period_us",
        Kind::U64,
        "Time between looks at an admin queue; only 0, and SPDK's default 10000, are taken: it is looked at when something came",
    ),
    Param::optional(
        "nvme_ioq_poll_period_us",
        Kind::U64,
        "Time between looks at an I/O queue; only 0, the default, is served: it is looked at when something came",
    ),
    Param::optional("io_queue_requests", Kind::U32, "Commands outstanding on an I/O queue; 0, the default: 512").at_most(32767),
    Param::optional("delay_cmd_submit", Kind::Bool, "Accepted: commands of one step always leave together").deprecated(),
    Param::optional("transport_retry_count", Kind::U32, "Accepted: of PCIe, over which nothing is attached").deprecated(),
    Param::optional(
        "bdev_retry_count",
        Kind::I32,
        "How often I/O that has failed is sent again, if the status allows that (DNR); -1: for ever; 0: never, then it does not \
         wait for a lost path either; default 3. Lost paths and path-related statuses do not count, unless it is 0",
    )
    .at_least(-1),
    Param::optional("transport_ack_timeout", Kind::U8, ONLY_ZERO),
    Param::optional("ctrlr_loss_timeout_sec", Kind::I32, "As of bdev_nvme_attach_controller; default 0").at_least(-1),
    Param::optional("reconnect_delay_sec", Kind::U32, "As of bdev_nvme_attach_controller; default 0"),
    Param::optional("fast_io_fail_timeout_sec", Kind::U32, "As of bdev_nvme_attach_controller; default 0"),
    Param::optional("disable_auto_failback", Kind::Bool, "Stay on a non-preferred path; not served"),
    Param::optional("generate_uuids", Kind::Bool, "Make UUIDs of serial numbers; not served: without one, it is random"),
    Param::optional("transport_tos", Kind::U8, "Type of service of the sockets; only 0 is served"),
    Param::optional("nvme_error_stat", Kind::Bool, "Count errors by status; not served"),
    Param::optional("rdma_srq_size", Kind::U32, RDMA).deprecated(),
    Param::optional("io_path_stat", Kind::Bool, "Count I/O by path; not served"),
    Param::optional("allow_accel_sequence", Kind::Bool, "Accepted: for controllers with such sequences, of which there are none").deprecated(),
    Param::optional("rdma_max_cq_size", Kind::U32, RDMA).deprecated(),
    Param::optional(
        "rdma_cm_event_timeout_ms",
        Kind::U16,
        "Time for each RDMA connection to be made, up to the controller's acceptance, milliseconds; 0, the default: as for \
         other steps of connecting",
    ),
    Param::optional("dhchap_digests", Kind::Set(&["sha256", "sha384", "sha512"]), KEYS).deprecated(),
    Param::optional(
        "dhchap_dhgroups",
        Kind::Set(&["null", "ffdhe2048", "ffdhe3072", "ffdhe4096", "ffdhe6144", "ffdhe8192"]),
        KEYS,
    )
    .deprecated(),
    Param::optional("rdma_umr_per_io", Kind::Bool, "Accepted: payload memory is registered once, not by command").deprecated(),
    Param::optional(
        "tcp_connect_timeout_ms",
        Kind::U32,
        "Time for each TCP connection to be made, up to the answer to ICReq, milliseconds; 0, the default: as for other steps of \
         connecting",
    )
    .at_most(3_600_000),
    Param::optional("enable_flush", Kind::Bool, "Accepted: flushes are always sent where the controller has a cache")
        .deprecated(),
    Param::optional("multipath_opts", Kind::Object(MULTIPATH_OPTS), "How the paths of bdevs to come are used"),
])
.states(States::BOTH)
.mutates()
.refuses_with(super::REFUSAL);

async fn set(system: Arc<InitiatorSystem>, params: Params) -> Result<Value, RpcError> {
    not_served(&params, "disable_auto_failback", "a better path is always taken again when it is back")?;
    not_served(&params, "generate_uuids", "a UUID that a namespace does not have is drawn at random")?;
    not_served(&params, "transport_tos", "the type of service is the system's")?;
    not_served(&params, "transport_ack_timeout", "how long the system sends again is its own")?;
    not_served(&params, "nvme_ioq_poll_period_us", "a queue is looked at when something came, and there is no period")?;
    // It is in every configuration that SPDK saves.
    if params.opt_u64("nvme_adminq_poll_period_us") != Some(SPDK_ADMINQ_POLL_PERIOD_US) {
        let reason = "an admin queue is looked at when something came, and there is no period";
        not_served(&params, "nvme_adminq_poll_period_us", reason)?;
    }
    not_served(&params, "arbitration_burst", "controllers arbitrate as they are set up")?;
    for field in ["low_priority_weight", "medium_priority_weight", "high_priority_weight"] {
        not_served(&params, field, "controllers arbitrate as they are set up")?;
    }
    not_served(&params, "nvme_error_stat", "errors are counted by bdev_get_iostat only")?;
    not_served(&params, "io_path_stat", "I/O is counted by bdev, not by path")?;
    if params.opt_u32("keep_alive_timeout_ms") == Some(0) {
        let reason = "without keep-alive it is never known when the writes of a lost connection can no longer land";
        return Err(params.invalid("keep_alive_timeout_ms", reason).fix("give 1 or more"));
    }
    let defaults = Settings::default();
    let micros =
        |field: &str, default| params.opt_u64(field).filter(|us| *us > 0).map_or(default, Duration::from_micros);
    let depth = params.opt_u32("io_queue_requests").filter(|depth| *depth > 0);
    let mode = match params.get("multipath_opts") {
        None => Mode::default(),
        Some(given) => {
            let text = |key: &str| given.get(key).and_then(Value::as_str);
            let min_io = given.get("min_io").and_then(Value::as_u64).and_then(|n| u32::try_from(n).ok());
            policy(&params, (text("policy"), text("selector"), min_io), "multipath_opts.min_io")?
        }
    };
    let reconnect = (
        params.get("ctrlr_loss_timeout_sec").and_then(Value::as_i64).unwrap_or(0),
        params.opt_u64("reconnect_delay_sec").unwrap_or(0),
        params.opt_u64("fast_io_fail_timeout_sec").unwrap_or(0),
    );
    nvmf::host::ReconnectPolicy::from_seconds(reconnect.0, reconnect.1, reconnect.2)
        .map_err(|rule| params.invalid(rule.split(' ').next().unwrap_or("ctrlr_loss_timeout_sec"), rule))?;
    let settings = Settings {
        kato_ms: params.opt_u32("keep_alive_timeout_ms").unwrap_or(defaults.kato_ms),
        io_depth: depth.and_then(|depth| u16::try_from(depth).ok()).unwrap_or(defaults.io_depth),
        on_timeout: match params.opt_str("action_on_timeout") {
            Some("abort") => OnTimeout::Tell,
            Some("none") => OnTimeout::Nothing,
            _ => OnTimeout::GiveUp,
        },
        io_timeout: micros("timeout_us", defaults.io_timeout),
        admin_timeout: micros("timeout_admin_us", defaults.admin_timeout),
        reconnect,
        retries: match params.get("bdev_retry_count").and_then(Value::as_i64) {
            None => defaults.retries,
            // Nothing below -1 gets here.
            Some(count) => u32::try_from(count).ok(),
        },
        connect_timeout: params
            .opt_u64("tcp_connect_timeout_ms")
            .filter(|ms| *ms > 0)
            .map_or(defaults.connect_timeout, |ms| Some(Duration::from_millis(ms))),
        rdma_connect_timeout: params
            .opt_u64("rdma_cm_event_timeout_ms")
            .filter(|ms| *ms > 0)
            .map_or(defaults.rdma_connect_timeout, |ms| Some(Duration::from_millis(ms))),
        mode,
        params: Some(params.as_value().clone()),
    };
    system.set_settings(settings)?;
    Ok(json!(true))
}
