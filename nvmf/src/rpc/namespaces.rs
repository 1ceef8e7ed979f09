//! Namespaces.

use std::sync::Arc;

use schema::{Kind, Method, Param, Params, RpcError};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{NQN, TGT_NAME, check_target};
use crate::target::model::NewNamespace;
use crate::target::system::NvmfSystem;

const NAMESPACE: &[Param] = &[
    Param::optional("nsid", Kind::U32, "Namespace identifier; default: the lowest free one"),
    Param::required("bdev_name", Kind::Str, "Name, alias or UUID of the bdev"),
    Param::optional("nguid", Kind::Hex(16), "Globally unique identifier; default: the UUID"),
    Param::optional("eui64", Kind::Hex(8), "Extended unique identifier; default: none"),
    Param::optional("uuid", Kind::Uuid, "UUID; default: the bdev's"),
    Param::optional("ptpl_file", Kind::Str, "Not served: reservations that outlive the server"),
    Param::optional("anagrpid", Kind::U32, "ANA group; default: the namespace identifier"),
    Param::optional("no_auto_visible", Kind::Bool, "Not served: only false"),
    Param::optional("hide_metadata", Kind::Bool, "Hide metadata").deprecated(),
];
const NSID: Param = Param::required("nsid", Kind::U32, "Namespace identifier");

/// `nvmf_subsystem_add_ns`
pub(super) const ADD: Method<NvmfSystem> = Method::new(
    "nvmf_subsystem_add_ns",
    "Add a bdev to a subsystem as a namespace; hosts that are connected see it.",
    |system, params| Box::pin(add(system, params)),
)
.params(&[NQN, Param::required("namespace", Kind::Object(NAMESPACE), "The namespace"), TGT_NAME])
.mutates()
.result("the namespace identifier, a number");

/// `nvmf_subsystem_remove_ns`
pub(super) const REMOVE: Method<NvmfSystem> = Method::new(
    "nvmf_subsystem_remove_ns",
    "Remove a namespace; hosts that are connected see it go, commands to it end.",
    |system, params| Box::pin(remove(system, params)),
)
.params(&[NQN, NSID, TGT_NAME])
.mutates();

/// `nvmf_subsystem_set_ns_ana_group`
pub(super) const SET_ANA_GROUP: Method<NvmfSystem> =
    Method::new("nvmf_subsystem_set_ns_ana_group", "Move a namespace to another ANA group.", |system, params| {
        Box::pin(set_ana_group(system, params))
    })
    .params(&[NQN, NSID, Param::required("anagrpid", Kind::U32, "ANA group").at_least(1), TGT_NAME])
    .mutates();

#[derive(Deserialize)]
struct Given {
    nsid: Option<u32>,
    bdev_name: String,
    nguid: Option<String>,
    eui64: Option<String>,
    uuid: Option<Uuid>,
    ptpl_file: Option<String>,
    anagrpid: Option<u32>,
    no_auto_visible: Option<bool>,
}

async fn add(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    let given: Given =
        params.opt("namespace")?.ok_or_else(|| params.invalid("namespace", "missing, or not an object"))?;
    if given.ptpl_file.is_some() {
        let error = params.invalid("namespace.ptpl_file", "reservations are not served");
        return Err(error.fix("leave it out"));
    }
    if given.no_auto_visible == Some(true) {
        let error = params.invalid("namespace.no_auto_visible", "namespaces cannot be shown to some hosts only");
        return Err(error.fix("leave it out, and put the bdev into a subsystem of its own for these hosts"));
    }
    let new = NewNamespace {
        nsid: given.nsid,
        uuid: given.uuid,
        nguid: given.nguid.as_deref().map(bytes),
        eui64: given.eui64.as_deref().map(bytes),
        anagrpid: given.anagrpid,
    };
    let nsid = system.add_namespace(params.str("nqn")?, new, &given.bdev_name).await?;
    Ok(json!(nsid))
}

/// Bytes of hexadecimal digits, whose number and form the declaration has checked.
fn bytes<const N: usize>(digits: &str) -> [u8; N] {
    let value = u128::from_str_radix(digits, 16).expect("checked to be at most 32 hexadecimal digits");
    let all = value.to_be_bytes();
    std::array::from_fn(|at| all[all.len() - N + at])
}

async fn remove(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    system.remove_namespace(params.str("nqn")?, params.u32("nsid")?).await?;
    Ok(json!(true))
}

async fn set_ana_group(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    check_target(&params)?;
    system.set_ana_group(params.str("nqn")?, params.u32("nsid")?, params.u32("anagrpid")?).await?;
    Ok(json!(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_become_bytes_in_their_order() {
        assert_eq!(bytes::<8>("0011223344556677"), [0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77]);
        assert_eq!(bytes::<16>("4DADCE4DFAAC4EB48ccf8b8a6dba70bc")[..3], [0x4d, 0xad, 0xce]);
        assert_eq!(bytes::<16>(&"f".repeat(32)), [0xff; 16]);
    }
}
