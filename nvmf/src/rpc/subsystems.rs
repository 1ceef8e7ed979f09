//! Subsystems.

use std::sync::Arc;

use schema::{Errno, Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};

use super::{NQN, TGT_NAME, check_target, not_served};
use crate::target::model::{Model, NewSubsystem, Subsystem, address_json, is_discovery, shown_namespace};
use crate::target::system::{NvmfSystem, TargetError};
use crate::target::view::DISCOVERY_NQN;

/// `nvmf_create_subsystem`
pub(super) const CREATE: Method<NvmfSystem> =
    Method::new("nvmf_create_subsystem", "Make an NVM subsystem.", |system, params| Box::pin(create(system, params)))
        .params(&[
            NQN,
            TGT_NAME,
            Param::optional("serial_number", Kind::Str, "At most 20 ASCII characters; default: derived from the NQN"),
            Param::optional("model_number", Kind::Str, "At most 40 ASCII characters"),
            Param::optional("admin_label", Kind::Str, "A label for administrators"),
            Param::optional("max_namespaces", Kind::U32, "Largest NSID, default 32"),
            Param::optional("allow_any_host", Kind::Bool, "Whether any host may connect, default false"),
            Param::optional("ana_reporting", Kind::Bool, "Report asymmetric namespace access, default false"),
            Param::optional("min_cntlid", Kind::U16, "Smallest controller identifier, default 1"),
            Param::optional("max_cntlid", Kind::U16, "Largest controller identifier, default 65519"),
            Param::optional("dmrsl", Kind::U32, "Blocks that one deallocation may name, default 2097152"),
            Param::optional("wzsl", Kind::U8, "Largest write zeroes: 4 KiB times two to this, default 12"),
            Param::optional("passthrough", Kind::Bool, "Not served: only false"),
            Param::optional("enable_nssr", Kind::Bool, "Not served: only false"),
        ])
        .mutates();

/// `nvmf_delete_subsystem`
pub(super) const DELETE: Method<NvmfSystem> = Method::new(
    "nvmf_delete_subsystem",
    "Delete an NVM subsystem with its namespaces and listeners; its hosts are disconnected.",
    |system, params| Box::pin(delete(system, params)),
)
.params(&[NQN, TGT_NAME])
.mutates();

/// `nvmf_get_subsystems`
pub(super) const GET: Method<NvmfSystem> =
    Method::new("nvmf_get_subsystems", "Show the subsystems.", |system, params| Box::pin(get(system, params)))
        .params(&[Param::optional("nqn", Kind::Str, "Only the subsystem of this NQN"), TGT_NAME])
        .result("an array of subsystems with their listeners, hosts and namespaces");

async fn create(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    not_served(&params, "passthrough", "commands are not passed through to devices", "leave it out")?;
    not_served(&params, "enable_nssr", "NVM subsystem reset is not served", "leave it out")?;
    let text = |name: &str| params.opt_str(name).map(str::to_owned);
    let new = NewSubsystem {
        nqn: params.str("nqn")?.to_owned(),
        serial_number: text("serial_number"),
        model_number: text("model_number"),
        admin_label: text("admin_label"),
        allow_any_host: params.opt_bool("allow_any_host").unwrap_or(false),
        max_namespaces: params.opt_u32("max_namespaces"),
        ana_reporting: params.opt_bool("ana_reporting").unwrap_or(false),
        min_cntlid: params.opt("min_cntlid")?,
        max_cntlid: params.opt("max_cntlid")?,
        dmrsl: params.opt_u32("dmrsl"),
        wzsl: params.opt("wzsl")?,
    };
    system.create_subsystem(new).await.map_err(|error| match error {
        // A subsystem that cannot be made under its NQN is an internal error to SPDK; its other fields are parameters.
        TargetError::Model(error) if error.field == "nqn" => RpcError::from(error).with_code(code::INTERNAL_ERROR),
        other => other.into(),
    })?;
    Ok(json!(true))
}

async fn delete(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    system.delete_subsystem(params.str("nqn")?).await?;
    Ok(json!(true))
}

async fn get(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    system.model(|model| match params.opt_str("nqn") {
        None => Ok(std::iter::once(discovery(model)).chain(model.subsystems().values().map(shown)).collect()),
        Some(nqn) if is_discovery(nqn) => Ok(json!([discovery(model)])),
        Some(nqn) => match model.subsystem(nqn) {
            Ok(subsystem) => Ok(json!([shown(subsystem)])),
            Err(error) => Err(RpcError::from(error).with_code(-Errno::NODEV.0)),
        },
    })
}

fn discovery(model: &Model) -> Value {
    json!({
        "nqn": DISCOVERY_NQN,
        "subtype": "Discovery",
        "listen_addresses": model.discovery_listeners().iter().map(address_json).collect::<Value>(),
        "allow_any_host": true,
        "hosts": [],
    })
}

fn shown(subsystem: &Subsystem) -> Value {
    let view = subsystem.view();
    let mut all = json!({
        "nqn": view.nqn,
        "subtype": "NVMe",
        "listen_addresses": view.listeners.iter().map(|listener| address_json(&listener.address)).collect::<Value>(),
        "allow_any_host": view.allow_any_host,
        "hosts": view.hosts.iter().map(|host| json!({"nqn": host})).collect::<Value>(),
        "serial_number": view.serial_number,
        "model_number": view.model_number,
        "max_namespaces": view.max_namespaces,
        "passthrough": false,
        "min_cntlid": view.min_cntlid,
        "max_cntlid": view.max_cntlid,
        "dmrsl": view.dmrsl,
        "wzsl": view.wzsl,
        "namespaces": view.namespaces.values().map(|namespace| shown_namespace(view, namespace)).collect::<Value>(),
    });
    if let Some(label) = subsystem.admin_label() {
        all["admin_label"] = json!(label);
    }
    all
}
