//! What goes on: controllers, queue pairs, poll groups.

use std::sync::Arc;

use reactor::time::TICK_RATE;
use schema::{Method, Params, RpcError};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{NQN, TARGET, TGT_NAME, check_target};
use crate::target::model::{address_json, is_discovery};
use crate::target::shared::ControllerShared;
use crate::target::system::{NvmfSystem, PollGroupStats, QpairInfo, Stopping, TargetError, poll_group_name};
use crate::target::transport::DeviceStats;
use crate::target::view::{DISCOVERY_NQN, ListenAddress, TransportKind};

/// `nvmf_get_targets`
pub(super) const GET_TARGETS: Method<NvmfSystem> =
    Method::new("nvmf_get_targets", "Show the targets.", |_, _| Box::pin(async { Ok(json!([TARGET])) }))
        .result("an array of names");

/// `nvmf_subsystem_get_controllers`
pub(super) const GET_CONTROLLERS: Method<NvmfSystem> = Method::new(
    "nvmf_subsystem_get_controllers",
    "Show the controllers that hosts have made in a subsystem.",
    |system, params| Box::pin(get_controllers(system, params)),
)
.params(&[NQN, TGT_NAME])
.result("an array of controllers");

/// `nvmf_subsystem_get_qpairs`
pub(super) const GET_QPAIRS: Method<NvmfSystem> = Method::new(
    "nvmf_subsystem_get_qpairs",
    "Show the queue pairs that hosts have connected to a subsystem.",
    |system, params| Box::pin(get_qpairs(system, params)),
)
.params(&[NQN, TGT_NAME])
.result("an array of queue pairs");

/// `nvmf_get_stats`
pub(super) const GET_STATS: Method<NvmfSystem> =
    Method::new("nvmf_get_stats", "Show what each reactor's poll group has done.", |system, params| {
        Box::pin(get_stats(system, params))
    })
    .params(&[TGT_NAME])
    .result("an object with an array of poll groups");

/// The NQN of a subsystem that there is.
fn subsystem(system: &NvmfSystem, params: &Params) -> Result<String, RpcError> {
    check_target(params)?;
    let nqn = params.str("nqn")?;
    if is_discovery(nqn) {
        return Ok(DISCOVERY_NQN.to_owned());
    }
    system.model(|model| model.subsystem(nqn).map(|_| ()))?;
    Ok(nqn.to_owned())
}

async fn get_controllers(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    let nqn = subsystem(&system, &params)?;
    let shown = |controller: &Arc<ControllerShared>| {
        json!({
            "cntlid": controller.cntlid,
            "cntrltype": if nqn == DISCOVERY_NQN { "discovery" } else { "io" },
            "hostnqn": controller.hostnqn,
            "hostid": Uuid::from_bytes(controller.hostid),
            "num_io_qpairs": controller.io_queues().len(),
        })
    };
    Ok(system.controllers().of(&nqn).iter().map(shown).collect())
}

async fn get_qpairs(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    let nqn = subsystem(&system, &params)?;
    let mut qpairs = system.reactors().qpairs().await.map_err(stopping)?;
    qpairs.retain(|qpair| qpair.subnqn == nqn);
    qpairs.sort_by_key(|qpair| (qpair.cntlid, qpair.qid));
    Ok(qpairs.iter().map(qpair).collect())
}

fn qpair(info: &QpairInfo) -> Value {
    let peer = ListenAddress { trtype: info.listen.trtype, traddr: info.peer.ip(), trsvcid: info.peer.port() };
    json!({
        "cntlid": info.cntlid,
        "qid": info.qid,
        "state": info.state.name(),
        "thread": poll_group_name(info.reactor),
        "hostnqn": info.hostnqn,
        "listen_address": address_json(&info.listen),
        "peer_address": address_json(&peer),
    })
}

async fn get_stats(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    let groups = system.reactors().stats().await.map_err(stopping)?;
    let loads = system.loads();
    let load = |stats: &PollGroupStats| loads.get(stats.reactor.0 as usize).copied().unwrap_or(0);
    Ok(json!({
        "tick_rate": TICK_RATE,
        "poll_groups": groups.iter().map(|stats| poll_group(stats, load(stats))).collect::<Value>(),
    }))
}

fn poll_group(stats: &PollGroupStats, load: u32) -> Value {
    let transport = |kind: &TransportKind| match kind {
        TransportKind::Tcp => json!({"trtype": kind.name()}),
        TransportKind::Rdma => json!({
            "trtype": kind.name(),
            "pending_data_buffer": stats.groups.iter().map(|group| group.pending_data_buffer).sum::<u64>(),
            "devices": stats.groups.iter().flat_map(|group| &group.devices).map(device).collect::<Value>(),
        }),
    };
    json!({
        "name": poll_group_name(stats.reactor),
        "admin_qpairs": stats.admin_qpairs,
        "io_qpairs": stats.io_qpairs,
        "current_admin_qpairs": stats.current_admin_qpairs,
        "current_io_qpairs": stats.current_io_qpairs,
        "current_unassociated_qpairs": stats.current_unassociated_qpairs,
        "pending_bdev_io": stats.pending_bdev_io,
        "completed_nvme_io": stats.completed_nvme_io,
        // Of the reactor's last half second, in percent: what connections are placed and moved by.
        "load_percent": f64::from(load) / 10.0,
        "qpairs_moved_in": stats.moved_in,
        "qpairs_moved_out": stats.moved_out,
        "transports": stats.transports.iter().map(transport).collect::<Value>(),
    })
}

fn device(stats: &DeviceStats) -> Value {
    json!({
        "name": stats.name,
        "polls": stats.polls,
        "idle_polls": stats.idle_polls,
        "completions": stats.completions,
        "requests": stats.requests,
        // Ticks, of which a second has TICK_RATE.
        "request_latency": (u128::from(stats.request_latency_ns) * u128::from(TICK_RATE) / 1_000_000_000) as u64,
        "pending_free_request": stats.pending_free_request,
        "pending_rdma_read": stats.pending_rdma_read,
        "pending_rdma_write": stats.pending_rdma_write,
        "pending_rdma_send": stats.pending_rdma_send,
        "total_send_wrs": stats.total_send_wrs,
        "send_doorbell_updates": stats.send_doorbell_updates,
        "total_recv_wrs": stats.total_recv_wrs,
        "recv_doorbell_updates": stats.recv_doorbell_updates,
    })
}

fn stopping(stopping: Stopping) -> RpcError {
    TargetError::from(stopping).into()
}
