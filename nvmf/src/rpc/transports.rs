//! Transports.

use std::collections::BTreeMap;
use std::sync::Arc;

use schema::{Errno, Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};

use super::{TGT_NAME, check_target, not_served, transport_kind};
use crate::target::model::options;
use crate::target::system::{NvmfSystem, TargetError};
use crate::target::view::{TransportKind, TransportOptions};

const PARAMS: &[Param] = &[
    Param::required("trtype", Kind::Str, "Transport: TCP or RDMA, in any case"),
    TGT_NAME,
    Param::optional("max_queue_depth", Kind::U16, "Entries of an I/O queue, default 128").at_least(2),
    Param::optional("max_io_qpairs_per_ctrlr", Kind::U16, "I/O queues of one controller, default 127").at_least(1),
    Param::optional("in_capsule_data_size", Kind::U32, "Bytes of data in a command capsule, default 8192 (RDMA 4096)"),
    Param::optional("max_io_size", Kind::U32, "Bytes of the largest transfer, a power of two, default 131072"),
    Param::optional("io_unit_size", Kind::U32, "Bytes of a data buffer").deprecated(),
    Param::optional("max_aq_depth", Kind::U32, "Entries of an admin queue, default 128").at_least(32),
    Param::optional("num_shared_buffers", Kind::U32, "Data buffers").deprecated(),
    Param::optional("buf_cache_size", Kind::U32, "Data buffers kept per thread").deprecated(),
    Param::optional("iobuf_small_cache_size", Kind::U32, "Kept and shown; buffers belong to reactors"),
    Param::optional("iobuf_large_cache_size", Kind::U32, "Kept and shown; buffers belong to reactors"),
    Param::optional("zcopy", Kind::Bool, "Kept and shown; data is not copied between target and bdev anyway"),
    Param::optional("num_cqe", Kind::I32, "Completion queue entries (RDMA only)"),
    Param::optional("max_srq_depth", Kind::U32, "Entries of a shared receive queue (RDMA only)"),
    Param::optional("no_srq", Kind::Bool, "Do without shared receive queues (RDMA only)"),
    Param::optional("c2h_success", Kind::Bool, "Send no completion of a read that succeeded, default true (TCP only)"),
    Param::optional("dif_insert_or_strip", Kind::Bool, "Not served: only false"),
    Param::optional("sock_priority", Kind::U32, "Priority of sockets, kept and shown (TCP only)"),
    Param::optional("acceptor_backlog", Kind::I32, "Connections that may wait for being accepted, kept and shown"),
    Param::optional("abort_timeout_sec", Kind::U32, "Seconds until an abort that does not end is given up, default 1"),
    Param::optional("no_wr_batching", Kind::Bool, "Do not batch work requests (RDMA only)"),
    Param::optional("control_msg_num", Kind::U16, "Control messages per poll group, kept and shown (TCP only)"),
    Param::optional("disable_mappable_bar0", Kind::Bool, "Not served: only false (VFIO-user)"),
    Param::optional("disable_adaptive_irq", Kind::Bool, "Not served: only false (VFIO-user)"),
    Param::optional("disable_shadow_doorbells", Kind::Bool, "Not served: only false (VFIO-user)"),
    Param::optional("acceptor_poll_rate", Kind::U32, "Kept and shown; connections are accepted as they come"),
    Param::optional("ack_timeout", Kind::U32, "Acknowledge timeout, kept and shown"),
    Param::optional("data_wr_pool_size", Kind::U32, "Work requests for data (RDMA only)"),
    Param::optional(
        "send_with_invalidate",
        Kind::Bool,
        "Invalidate keys of hosts with responses where they ask for it and the device can, default true (RDMA only)",
    ),
    Param::optional("disable_command_passthru", Kind::Bool, "Kept and shown; commands are never passed through"),
    Param::optional("kas", Kind::U16, "Granularity of the keep alive timeout in units of 100 ms, default 100")
        .at_least(1),
    Param::optional("min_kato", Kind::U32, "Shortest keep alive timeout in milliseconds, default 10000"),
    Param::optional("masked_oncs", Kind::Set(ONCS), "Not served: only none"),
    Param::optional("masked_fuses", Kind::Set(FUSES), "Not served: only none"),
];
const ONCS: &[&str] = &["nvmcmps", "nvmdsmsv", "nvmwzsv", "reservs", "nvmcpys"];
const FUSES: &[&str] = &["fcws"];

/// `nvmf_create_transport`
pub(super) const CREATE: Method<NvmfSystem> =
    Method::new("nvmf_create_transport", "Serve a transport.", |system, params| Box::pin(create(system, params)))
        .params(PARAMS)
        .mutates();

/// `nvmf_get_transports`
pub(super) const GET: Method<NvmfSystem> =
    Method::new("nvmf_get_transports", "Show the transports.", |system, params| Box::pin(get(system, params)))
        .params(&[TGT_NAME, Param::optional("trtype", Kind::Str, "Only this transport")])
        .result("an array of transports with their options");

/// Options that are kept and shown as they were given.
const KEPT: &[&str] = &[
    "iobuf_small_cache_size",
    "iobuf_large_cache_size",
    "zcopy",
    "sock_priority",
    "acceptor_backlog",
    "control_msg_num",
    "acceptor_poll_rate",
    "ack_timeout",
    "data_wr_pool_size",
    "disable_command_passthru",
];
/// Options of RDMA; the transport finds them among the others that are kept.
const KEPT_RDMA: &[&str] = &["num_cqe", "max_srq_depth", "no_srq", "no_wr_batching", "send_with_invalidate"];

async fn create(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    let kind = transport_kind(&params, "trtype", params.str("trtype")?)?;
    let created = system.create_transport(kind, options_of(kind, &params)?).await;
    created.map_err(|error| match error {
        // A transport that is there already is an internal error to SPDK.
        TargetError::Model(error) if error.field == "trtype" => RpcError::from(error).with_code(code::INTERNAL_ERROR),
        other => other.into(),
    })?;
    Ok(json!(true))
}

fn options_of(kind: TransportKind, params: &Params) -> Result<TransportOptions, RpcError> {
    let vfio = "it belongs to VFIO-user, which this target does not serve";
    for field in ["disable_mappable_bar0", "disable_adaptive_irq", "disable_shadow_doorbells"] {
        not_served(params, field, vfio, "leave it out")?;
    }
    let reason = "protection information is not served by transports";
    not_served(params, "dif_insert_or_strip", reason, "leave it out")?;
    for field in ["masked_oncs", "masked_fuses"] {
        if params.get(field).and_then(Value::as_array).is_some_and(|masked| !masked.is_empty()) {
            return Err(params.invalid(field, "commands cannot be masked").fix("leave it out"));
        }
    }
    if kind == TransportKind::Tcp {
        for field in KEPT_RDMA {
            not_served(params, field, "only the transport RDMA has it", "leave it out")?;
        }
    } else {
        for field in ["sock_priority", "control_msg_num"] {
            not_served(params, field, "only the transport TCP has it", "leave it out")?;
        }
    }
    let defaults = options::defaults(kind);
    let kept = KEPT.iter().chain(if kind == TransportKind::Rdma { KEPT_RDMA } else { &[] });
    let extra: BTreeMap<String, Value> =
        kept.filter_map(|&name| Some((name.to_owned(), params.get(name)?.clone()))).collect();
    Ok(TransportOptions {
        max_queue_depth: params.opt_u32("max_queue_depth").unwrap_or(defaults.max_queue_depth),
        max_io_qpairs_per_ctrlr: params.opt("max_io_qpairs_per_ctrlr")?.unwrap_or(defaults.max_io_qpairs_per_ctrlr),
        in_capsule_data_size: params.opt_u32("in_capsule_data_size").unwrap_or(defaults.in_capsule_data_size),
        max_io_size: params.opt_u32("max_io_size").unwrap_or(defaults.max_io_size),
        max_aq_depth: params.opt_u32("max_aq_depth").unwrap_or(defaults.max_aq_depth),
        c2h_success: params.opt_bool("c2h_success").unwrap_or(defaults.c2h_success),
        abort_timeout_sec: params.opt_u32("abort_timeout_sec").unwrap_or(defaults.abort_timeout_sec),
        kas: params.opt("kas")?.unwrap_or(defaults.kas),
        min_kato_ms: params.opt_u32("min_kato").unwrap_or(defaults.min_kato_ms),
        extra,
    })
}

async fn get(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    let only = match params.opt_str("trtype") {
        None => None,
        Some(text) => Some(transport_kind(&params, "trtype", text)?),
    };
    let shown: Vec<Value> = system.model(|model| {
        let wanted = model.transports().iter().filter(|(kind, _)| only.is_none_or(|only| only == **kind));
        wanted.map(|(&kind, options)| options::to_json(kind, options)).collect()
    });
    match only {
        Some(kind) if shown.is_empty() => {
            let error = RpcError::errno(Errno::NODEV, format!("transport {} was not created", kind.name()));
            Err(params.blame("trtype", error).fix("call nvmf_create_transport first"))
        }
        _ => Ok(Value::Array(shown)),
    }
}
