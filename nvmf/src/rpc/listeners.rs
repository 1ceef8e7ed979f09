//! Listeners.

use std::sync::Arc;

use schema::{Kind, Method, Param, Params, RpcError};
use serde_json::{Value, json};

use super::{LISTEN_ADDRESS, NQN, TGT_NAME, address, check_target, known_words, not_served};
use crate::target::model::{NewListener, address_json, is_discovery};
use crate::target::system::NvmfSystem;
use crate::target::view::{AnaState, SubsystemView};

const ANA_STATES: &[&str] = &["optimized", "non_optimized", "inaccessible"];
/// Names of SPDK's socket implementations without TLS.
const SOCK_IMPLS: &[&str] = &["posix", "uring"];

/// `nvmf_subsystem_add_listener`
pub(super) const ADD: Method<NvmfSystem> = Method::new(
    "nvmf_subsystem_add_listener",
    "Make a subsystem reachable at an address; nqn \"discovery\" opens it for the discovery service alone.",
    |system, params| Box::pin(add(system, params)),
)
.params(&[
    NQN,
    TGT_NAME,
    LISTEN_ADDRESS,
    Param::optional("secure_channel", Kind::Bool, "Not served: only false"),
    Param::optional("ana_state", Kind::Enum(ANA_STATES), "State of all ANA groups, default optimized"),
    Param::optional("sock_impl", Kind::Str, "Name of a socket implementation, kept; the reactor has its own"),
    Param::optional("numa_id", Kind::I32, "Without effect: connections go where there is room"),
])
.mutates();

/// `nvmf_subsystem_remove_listener`
pub(super) const REMOVE: Method<NvmfSystem> = Method::new(
    "nvmf_subsystem_remove_listener",
    "Make a subsystem unreachable at an address; hosts that came in there are disconnected.",
    |system, params| Box::pin(remove(system, params)),
)
.params(&[NQN, TGT_NAME, LISTEN_ADDRESS])
.mutates();

/// `nvmf_subsystem_get_listeners`
pub(super) const GET: Method<NvmfSystem> =
    Method::new("nvmf_subsystem_get_listeners", "Show where a subsystem can be reached.", |system, params| {
        Box::pin(get(system, params))
    })
    .params(&[NQN, TGT_NAME])
    .result("an array of addresses, with ANA states where the subsystem reports them");

/// `nvmf_subsystem_listener_set_ana_state`
pub(super) const SET_ANA_STATE: Method<NvmfSystem> = Method::new(
    "nvmf_subsystem_listener_set_ana_state",
    "Set the ANA state that hosts see through a listener.",
    |system, params| Box::pin(set_ana_state(system, params)),
)
.params(&[
    NQN,
    TGT_NAME,
    LISTEN_ADDRESS,
    Param::required("ana_state", Kind::Enum(ANA_STATES), "State"),
    Param::optional("anagrpid", Kind::U32, "ANA group; default and 0: all"),
])
.mutates();

fn ana_state(params: &Params) -> Option<AnaState> {
    let word = params.opt_str("ana_state")?;
    let states = [AnaState::Optimized, AnaState::NonOptimized, AnaState::Inaccessible];
    states.into_iter().find(|state| state.name() == word)
}

async fn add(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    let reason = "TLS is not served";
    not_served(&params, "secure_channel", reason, "leave it out, and secure the network otherwise")?;
    if let Some(name) = params.opt_str("sock_impl").filter(|name| !SOCK_IMPLS.contains(name)) {
        let reason = if name == "ssl" { reason } else { "no such socket implementation" };
        return Err(params.invalid("sock_impl", reason).fix(known_words(name, SOCK_IMPLS)));
    }
    let new = NewListener {
        address: address(&params, "listen_address")?,
        ana_state: ana_state(&params),
        sock_impl: params.opt_str("sock_impl").map(str::to_owned),
    };
    system.add_listener(params.str("nqn")?, new).await?;
    Ok(json!(true))
}

async fn remove(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    system.remove_listener(params.str("nqn")?, address(&params, "listen_address")?).await?;
    Ok(json!(true))
}

async fn get(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    let nqn = params.str("nqn")?;
    system.model(|model| match is_discovery(nqn) {
        true => {
            let addresses = model.discovery_listeners().iter();
            Ok(addresses.map(|address| json!({"address": address_json(address)})).collect())
        }
        false => Ok(shown(model.subsystem(nqn)?.view())),
    })
}

fn shown(view: &SubsystemView) -> Value {
    let listeners = view.listeners.iter().map(|listener| {
        let mut all = json!({"address": address_json(&listener.address)});
        if view.ana_reporting {
            let state = |group| json!({"ana_group": group, "ana_state": listener.ana_state(group).name()});
            all["ana_states"] = (1..=view.max_namespaces).map(state).collect();
        }
        all
    });
    listeners.collect()
}

async fn set_ana_state(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    let address = address(&params, "listen_address")?;
    let state = ana_state(&params).ok_or_else(|| params.invalid("ana_state", "not a state"))?;
    system.set_ana_state(params.str("nqn")?, address, state, params.opt_u32("anagrpid")).await?;
    Ok(json!(true))
}
