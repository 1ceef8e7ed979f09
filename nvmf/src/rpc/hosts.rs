//! Who may connect.

use std::sync::Arc;
use std::time::Duration;

use schema::{Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};

use super::{NQN, TGT_NAME, check_target, not_served};
use crate::target::system::{NvmfSystem, PATIENCE, TargetError};

const HOST: Param = Param::required("host", Kind::Str, "NQN of the host");

/// `nvmf_subsystem_add_host`
pub(super) const ADD: Method<NvmfSystem> =
    Method::new("nvmf_subsystem_add_host", "Let a host connect to a subsystem.", |system, params| {
        Box::pin(add(system, params))
    })
    .params(&[
        NQN,
        HOST,
        TGT_NAME,
        Param::optional("psk", Kind::Str, "Not served: key for TLS"),
        Param::optional("dhchap_key", Kind::Str, "Not served: key for authentication"),
        Param::optional("dhchap_ctrlr_key", Kind::Str, "Not served: key for authentication"),
    ])
    .mutates();

/// `nvmf_subsystem_remove_host`
pub(super) const REMOVE: Method<NvmfSystem> = Method::new(
    "nvmf_subsystem_remove_host",
    "No longer let a host connect to a subsystem, and disconnect it.",
    |system, params| Box::pin(remove(system, params)),
)
.params(&[
    NQN,
    HOST,
    TGT_NAME,
    Param::optional("timeout_ms", Kind::U64, "How long to wait for its connections to end; default and 0: 10000"),
])
.mutates();

/// `nvmf_subsystem_allow_any_host`
pub(super) const ALLOW_ANY: Method<NvmfSystem> = Method::new(
    "nvmf_subsystem_allow_any_host",
    "Let any host connect to a subsystem, or only those that it lists.",
    |system, params| Box::pin(allow_any(system, params)),
)
.params(&[NQN, Param::required("allow_any_host", Kind::Bool, "Whether any host may"), TGT_NAME])
.mutates();

/// Mistakes in hosts are internal errors to SPDK, unlike those in subsystems.
fn coded(error: TargetError) -> RpcError {
    match error {
        TargetError::Model(error) if error.field == "host" => RpcError::from(error).with_code(code::INTERNAL_ERROR),
        other => other.into(),
    }
}

async fn add(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    not_served(&params, "psk", "TLS is not served", "leave it out, and secure the network otherwise")?;
    for key in ["dhchap_key", "dhchap_ctrlr_key"] {
        let fix = "leave it out, and secure the network otherwise";
        not_served(&params, key, "DH-HMAC-CHAP authentication is not served", fix)?;
    }
    system.add_host(params.str("nqn")?, params.str("host")?).await.map_err(coded)?;
    Ok(json!(true))
}

async fn remove(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    let patience = match params.opt_u64("timeout_ms") {
        None | Some(0) => PATIENCE,
        // Nobody waits longer than an hour.
        Some(ms) => Duration::from_millis(ms.min(3_600_000)),
    };
    system.remove_host(params.str("nqn")?, params.str("host")?, patience).await.map_err(coded)?;
    Ok(json!(true))
}

async fn allow_any(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    system.allow_any_host(params.str("nqn")?, params.bool("allow_any_host")?).await?;
    Ok(json!(true))
}
