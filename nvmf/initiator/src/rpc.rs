//! The `bdev_nvme_*` methods: SPDK's names, parameters, results and error codes over [`InitiatorSystem`].
//!
//! What SPDK has and this initiator has not is a declared parameter too: it is accepted where leaving it out means the same,
//! and refused in words where it does not.

mod attach;
mod discovery;
mod options;
mod paths;

use std::sync::Arc;

use schema::{Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};

use crate::path::{Address, Path, Site};
use crate::policy::Mode;
use crate::system::{Group, InitiatorSystem};

/// All methods.
pub fn methods() -> &'static [Method<InitiatorSystem>] {
    METHODS
}

const METHODS: &[Method<InitiatorSystem>] = &[
    attach::ATTACH,
    attach::DETACH,
    Method::new("bdev_nvme_get_controllers", "Show the controllers that are attached, or one.", |s, p| {
        Box::pin(get_controllers(s, p))
    })
    .params(&[Param::optional("name", Kind::Str, "Name of the one to show")])
    .result("array of {name, ctrlrs: [{state, cntlid, trid, alternate_trids?, host}]}"),
    Method::new("bdev_nvme_reset_controller", "End a controller's connections and make new ones.", |s, p| {
        Box::pin(reset(s, p))
    })
    .params(&[NAME, CNTLID]),
    Method::new("bdev_nvme_enable_controller", "Connect a controller that was disabled.", |s, p| {
        Box::pin(enable(s, p))
    })
    .params(&[NAME, CNTLID]),
    Method::new(
        "bdev_nvme_disable_controller",
        "End a controller's connections until it is enabled; I/O that has no other path waits.",
        |s, p| Box::pin(disable(s, p)),
    )
    .params(&[NAME, CNTLID]),
    discovery::START,
    discovery::STOP,
    discovery::GET,
    options::SET,
    paths::GET,
    paths::SET_PREFERRED,
    paths::SET_POLICY,
];

const NAME: Param = Param::required("name", Kind::Str, "Name of the controller").at_least(1);
const CNTLID: Param =
    Param::optional("cntlid", Kind::U16, "Identifier of the controller behind one of its paths; all when left out");

const MULTIPATH_OPTS: &[Param] = &[
    Param::optional("policy", Kind::Enum(&["active_passive", "active_active"]), "Which paths are used at a time"),
    Param::optional("selector", Kind::Enum(&["round_robin", "queue_depth"]), "Of active_active: whose turn it is"),
    Param::optional("min_io", Kind::U32, "Of round_robin: I/Os before the next path's turn").at_least(1),
];

/// A path's address as RPCs show it.
pub(crate) fn trid(address: &Address) -> Value {
    trid_of(address.site, &address.subnqn)
}

fn trid_of(site: Site, subnqn: &str) -> Value {
    json!({
        "trtype": site.trtype.name(),
        "adrfam": if site.socket.is_ipv4() { "IPv4" } else { "IPv6" },
        "traddr": site.socket.ip().to_string(),
        "trsvcid": site.socket.port().to_string(),
        "subnqn": subnqn,
    })
}

/// How a path is chosen, as the parameters of `bdev_nvme_set_multipath_policy`.
pub(crate) fn policy_to_json(mode: Mode) -> Value {
    match mode {
        Mode::ActivePassive => json!({ "policy": "active_passive" }),
        Mode::RoundRobin { min_io } => {
            json!({ "policy": "active_active", "selector": "round_robin", "rr_min_io": min_io })
        }
        Mode::QueueDepth => json!({ "policy": "active_active", "selector": "queue_depth" }),
    }
}

/// The same from its parts; `field` names the one with the number.
fn policy(params: &Params, given: (Option<&str>, Option<&str>, Option<u32>), field: &str) -> Result<Mode, RpcError> {
    match given {
        (None | Some("active_passive"), None, None) => Ok(Mode::ActivePassive),
        (None | Some("active_passive"), Some(_), _) => {
            Err(params.invalid("selector", "a selector chooses among active paths").fix("give policy = active_active"))
        }
        (_, Some("queue_depth"), None) => Ok(Mode::QueueDepth),
        (Some("active_active"), None | Some("round_robin"), min_io) => {
            Ok(Mode::RoundRobin { min_io: min_io.unwrap_or(1) })
        }
        _ => Err(params
            .invalid(field, "it counts I/Os of round_robin")
            .fix("give selector = round_robin, or leave it out")),
    }
}

fn show_path(path: &Arc<Path>) -> Value {
    let view = path.view();
    let cntlid = match (&view.association, &view.identity) {
        (Some(association), _) => association.cntlid,
        (None, Some(identity)) => identity.cntlid.get(),
        (None, None) => 0,
    };
    let trids: Vec<Value> = path.addresses().iter().map(trid).collect();
    let mut shown = json!({
        "state": view.state.name(),
        "cntlid": cntlid,
        "trid": trids[0],
        "host": { "nqn": path.address.hostnqn, "addr": "", "svcid": "" },
    });
    if trids.len() > 1 {
        shown["alternate_trids"] = trids[1..].into();
    }
    shown
}

fn show_group(group: &Group) -> Value {
    json!({ "name": group.name, "ctrlrs": group.paths().iter().map(show_path).collect::<Vec<_>>() })
}

async fn get_controllers(system: Arc<InitiatorSystem>, params: Params) -> Result<Value, RpcError> {
    if let Some(name) = params.opt_str("name") {
        return Ok(json!([show_group(&*system.group(name)?)]));
    }
    let groups = system.groups();
    Ok(groups.iter().filter(|group| !group.paths().is_empty()).map(|group| show_group(group)).collect())
}

fn cntlid(params: &Params) -> Option<u16> {
    params.opt_u64("cntlid").and_then(|id| u16::try_from(id).ok())
}

async fn reset(system: Arc<InitiatorSystem>, params: Params) -> Result<Value, RpcError> {
    system.reset(params.str("name")?, cntlid(&params)).await?;
    Ok(json!(true))
}

async fn enable(system: Arc<InitiatorSystem>, params: Params) -> Result<Value, RpcError> {
    system.enable(params.str("name")?, cntlid(&params)).await?;
    Ok(json!(true))
}

async fn disable(system: Arc<InitiatorSystem>, params: Params) -> Result<Value, RpcError> {
    system.disable(params.str("name")?, cntlid(&params)).await?;
    Ok(json!(true))
}

/// Refuses a parameter that has a meaning which this initiator does not serve, when it is given.
fn not_served(params: &Params, field: &str, reason: &str) -> Result<(), RpcError> {
    match params.get(field) {
        None | Some(Value::Bool(false)) => Ok(()),
        Some(Value::Number(n)) if n.as_u64() == Some(0) => Ok(()),
        Some(Value::String(text)) if text.is_empty() => Ok(()),
        Some(_) => Err(params.invalid(field, reason).fix("leave it out")),
    }
}

const REFUSAL: i32 = code::INVALID_PARAMS;
