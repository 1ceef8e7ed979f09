//! `bdev_nvme_get_io_paths`, `bdev_nvme_set_preferred_path`, `bdev_nvme_set_multipath_policy`.

use std::sync::Arc;

use nvmf::spec::log::AnaState;
use reactor::ReactorHandle;
use schema::{Errno, Kind, Method, Param, Params, RpcError};
use serde_json::{Value, json};

use super::policy;
use crate::disk::Disk;
use crate::head::{ShownRoute, rank};
use crate::part::Part;
use crate::path::Address;
use crate::policy::{Candidate, Memory, in_use};
use crate::system::{InitiatorError, InitiatorSystem};

const BDEV: Param = Param::required("name", Kind::Str, "Name of the bdev").at_least(1);

pub(super) const GET: Method<InitiatorSystem> =
    Method::new("bdev_nvme_get_io_paths", "Show the paths of NVMe bdevs, or of one, on each reactor.", |s, p| {
        Box::pin(get(s, p))
    })
    .params(&[Param::optional("name", Kind::Str, "Name of the bdev")])
    .result("{poll_groups: [{thread, io_paths: [{bdev_name, cntlid, current, connected, accessible, transport}]}]}");

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

/// What a reactor would use that does not use the disk: nothing is connected there, so what the path's home knows counts.
fn unused(disk: &Disk) -> Vec<ShownRoute> {
    let routes = disk.paths();
    let known: Vec<(AnaState, bool)> = routes
        .iter()
        .map(|route| {
            let view = route.path.view();
            (view.ana.get(&route.nsid).copied().unwrap_or(AnaState::Optimized), view.association.is_some())
        })
        .collect();
    let preferred = disk.preferred();
    let candidate = |n: usize| {
        let (state, connected) = known[n];
        let preferred = preferred == Some(routes[n].path.id);
        Candidate { rank: rank(state).filter(|_| connected), room: true, load: 0, preferred }
    };
    let used = in_use(disk.mode(), Memory::default(), routes.len(), candidate);
    let shown = routes.iter().zip(known).zip(used).map(|((route, (state, connected)), current)| ShownRoute {
        path: route.path.id,
        current,
        connected,
        accessible: rank(state).is_some(),
    });
    shown.collect()
}

/// The transport of a path as this method shows it: what is a `trid` elsewhere, without the subsystem.
fn transport(address: &Address) -> Value {
    json!({
        "trtype": address.site.trtype.name(),
        "traddr": address.site.socket.ip().to_string(),
        "trsvcid": address.site.socket.port().to_string(),
        "adrfam": address.family(),
    })
}

fn show(disk: &Disk, routes: &[ShownRoute]) -> Vec<Value> {
    let paths = disk.paths();
    let shown = routes.iter().filter_map(|shown| {
        let path = &paths.iter().find(|route| route.path.id == shown.path)?.path;
        Some(json!({
            "bdev_name": disk.name,
            "cntlid": path.view().association.as_ref().map_or(0, |association| association.cntlid),
            "current": shown.current,
            "connected": shown.connected,
            "accessible": shown.accessible,
            "transport": transport(&path.addresses()[0]),
        }))
    });
    shown.collect()
}

/// The paths of one reactor.
async fn group(reactor: &ReactorHandle, disks: &[Arc<Disk>]) -> Result<Value, RpcError> {
    let asked = disks.to_vec();
    let used = reactor.call(move |cx| {
        let part = Part::of(cx);
        let part = part.borrow();
        asked.iter().map(|disk| part.shown(disk)).collect::<Vec<_>>()
    });
    let used = used.await.map_err(InitiatorError::from)?;
    let paths = disks.iter().zip(used).flat_map(|(disk, used)| show(disk, &used.unwrap_or_else(|| unused(disk))));
    Ok(json!({ "thread": format!("reactor_{}", reactor.id().0), "io_paths": paths.collect::<Vec<_>>() }))
}

async fn get(system: Arc<InitiatorSystem>, params: Params) -> Result<Value, RpcError> {
    let disks = match params.opt_str("name") {
        Some(name) => vec![system.disk(name)?],
        None => system.groups().iter().flat_map(|group| group.disks()).collect(),
    };
    let mut groups = Vec::new();
    for reactor in system.bdevs().reactors() {
        groups.push(group(reactor, &disks).await?);
    }
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
