//! `bdev_nvme_get_io_paths`, `bdev_nvme_set_preferred_path`, `bdev_nvme_set_multipath_policy`.

use std::sync::Arc;

use nvmf::spec::log::AnaState;
use schema::{Errno, Kind, Method, Param, Params, RpcError};
use serde_json::{Value, json};

use super::{policy, trid};
use crate::disk::Disk;
use crate::system::InitiatorSystem;

const BDEV: Param = Param::required("name", Kind::Str, "Name of the bdev").at_least(1);

pub(super) const GET: Method<InitiatorSystem> =
    Method::new("bdev_nvme_get_io_paths", "Show the paths of NVMe bdevs, or of one, on each reactor.", |s, p| {
        Box::pin(get(s, p))
    })
    .params(&[Param::optional("name", Kind::Str, "Name of the bdev")])
    .result("{poll_groups: [{thread, io_paths: [...]}]}");

pub(super) const SET_PREFERRED: Method<InitiatorSystem> = Method::new(
    "bdev_nvme_set_preferred_path",
    "Have one path of a bdev taken before others that are as good. Not saved: identifiers change with each connection.",
    |s, p| Box::pin(set_preferred(s, p)),
)
.params(&[BDEV, Param::required("cntlid", Kind::U16, "Identifier of the controller behind that path")]);

pub(super) const SET_POLICY: Method<InitiatorSystem> =
    Method::new("bdev_nvme_set_multipath_policy", "Set which paths of a bdev are used.", |s, p| {
        Box::pin(set_policy(s, p))
    })
    .params(&[
        BDEV,
        Param::required(
            "policy",
            Kind::Enum(&["active_passive", "active_active"]),
            "One path at a time, or all that are optimized",
        ),
        Param::optional(
            "selector",
            Kind::Enum(&["round_robin", "queue_depth"]),
            "Of active_active: in turns, the default, or the least loaded first",
        ),
        Param::optional("rr_min_io", Kind::U32, "Of round_robin: I/Os before the next path's turn; default 1")
            .at_least(1),
    ])
    .mutates()
    .refuses_with(super::REFUSAL);

fn show(disk: &Arc<Disk>) -> Vec<Value> {
    let routes = disk.paths();
    let usable = |n: usize| {
        let view = routes[n].path.view();
        let ana = view.ana.get(&routes[n].nsid).copied().unwrap_or(AnaState::Optimized);
        let rank = match ana {
            AnaState::Optimized => Some(0),
            AnaState::NonOptimized => Some(1),
            _ => None,
        };
        rank.filter(|_| view.association.is_some())
    };
    let best = (0..routes.len()).filter_map(usable).min();
    let shown = routes.iter().enumerate().map(|(n, route)| {
        let view = route.path.view();
        json!({
            "bdev_name": disk.name,
            "cntlid": view.association.as_ref().map_or(0, |association| association.cntlid),
            "current": best.is_some() && usable(n) == best,
            "connected": view.association.is_some(),
            "accessible": usable(n).is_some(),
            "transport": trid(&route.path.addresses()[0]),
        })
    });
    shown.collect()
}

async fn get(system: Arc<InitiatorSystem>, params: Params) -> Result<Value, RpcError> {
    let disks = match params.opt_str("name") {
        Some(name) => vec![system.disk(name)?],
        None => system.groups().iter().flat_map(|group| group.disks()).collect(),
    };
    let paths: Vec<Value> = disks.iter().flat_map(show).collect();
    let group = |reactor: usize| json!({ "thread": format!("reactor_{reactor}"), "io_paths": paths });
    let groups: Vec<Value> = (0..system.bdevs().reactors().len()).map(group).collect();
    Ok(json!({ "poll_groups": groups }))
}

async fn set_preferred(system: Arc<InitiatorSystem>, params: Params) -> Result<Value, RpcError> {
    let disk = system.disk(params.str("name")?)?;
    let wanted = params.u64("cntlid")?;
    let has = |route: &&crate::disk::Route| {
        route.path.view().association.as_ref().is_some_and(|association| u64::from(association.cntlid) == wanted)
    };
    let Some(route) = disk.paths().iter().find(has).cloned() else {
        let error = RpcError::errno(Errno::NODEV, "no connected path of the bdev has this controller ID");
        return Err(params.blame("cntlid", error.fix("bdev_nvme_get_io_paths shows them")));
    };
    disk.prefer(route.path.id);
    Ok(json!(true))
}

async fn set_policy(system: Arc<InitiatorSystem>, params: Params) -> Result<Value, RpcError> {
    let disk = system.disk(params.str("name")?)?;
    let given = (params.opt_str("policy"), params.opt_str("selector"), params.opt_u32("rr_min_io"));
    disk.set_mode(policy(&params, given, "rr_min_io")?);
    Ok(json!(true))
}
