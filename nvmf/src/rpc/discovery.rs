//! Referrals to other discovery services.

use std::sync::Arc;

use schema::{Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};

use super::{ADDRESS_FIELDS, TGT_NAME, address, check_target};
use crate::target::model::address_json;
use crate::target::system::{NvmfSystem, TargetError};
use crate::target::view::{DISCOVERY_NQN, Referral};

const ADDRESS: Param = Param::required("address", Kind::Object(ADDRESS_FIELDS), "Where the other service is");
const SUBNQN: Param =
    Param::optional("subnqn", Kind::Str, "Its NQN; default: the well-known one of discovery services");

/// `nvmf_discovery_add_referral`
pub(super) const ADD_REFERRAL: Method<NvmfSystem> =
    Method::new("nvmf_discovery_add_referral", "Refer hosts to another discovery service.", |system, params| {
        Box::pin(add(system, params))
    })
    .params(&[
        TGT_NAME,
        ADDRESS,
        Param::optional("secure_channel", Kind::Bool, "Whether it requires a secure channel, default false"),
        SUBNQN,
    ])
    .mutates();

/// `nvmf_discovery_remove_referral`
pub(super) const REMOVE_REFERRAL: Method<NvmfSystem> = Method::new(
    "nvmf_discovery_remove_referral",
    "No longer refer hosts to another discovery service.",
    |system, params| Box::pin(remove(system, params)),
)
.params(&[TGT_NAME, ADDRESS, SUBNQN])
.mutates();

/// `nvmf_discovery_get_referrals`
pub(super) const GET_REFERRALS: Method<NvmfSystem> =
    Method::new("nvmf_discovery_get_referrals", "Show the referrals to other discovery services.", |system, params| {
        Box::pin(get(system, params))
    })
    .params(&[TGT_NAME])
    .result("an array of referrals");

/// A referral that cannot be added or removed is an internal error to SPDK.
fn coded(error: TargetError) -> RpcError {
    match error {
        TargetError::Model(error) => RpcError::from(error).with_code(code::INTERNAL_ERROR),
        other => other.into(),
    }
}

fn subnqn(params: &Params) -> String {
    params.opt_str("subnqn").unwrap_or(DISCOVERY_NQN).to_owned()
}

async fn add(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    let referral = Referral {
        address: address(&params, "address")?,
        subnqn: subnqn(&params),
        secure_channel: params.opt_bool("secure_channel").unwrap_or(false),
    };
    system.add_referral(referral).await.map_err(coded)?;
    Ok(json!(true))
}

async fn remove(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    system.remove_referral(address(&params, "address")?, &subnqn(&params)).await.map_err(coded)?;
    Ok(json!(true))
}

async fn get(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    let shown = |referral: &Referral| {
        json!({
            "address": address_json(&referral.address),
            "secure_channel": referral.secure_channel,
            "subnqn": referral.subnqn,
        })
    };
    Ok(system.model(|model| model.referrals().iter().map(shown).collect()))
}
