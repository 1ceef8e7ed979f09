//! The `nvmf_*` methods, and those of the scheduler, which moves queues of hosts: SPDK's names, parameters, results and error codes over [`NvmfSystem`].
//!
//! What SPDK has and this target has not is a declared parameter too: it is accepted where leaving it out means the same,
//! and refused in words where it does not.

mod discovery;
mod hosts;
mod listeners;
mod namespaces;
mod reports;
mod scheduler;
mod settings;
mod subsystems;
mod transports;

use std::net::IpAddr;
use std::sync::Arc;

use schema::{ConfigSource, Kind, Method, Param, Params, RpcError, nearest};
use serde::Deserialize;
use serde_json::Value;

use crate::target::system::NvmfSystem;
use crate::target::view::{ListenAddress, TransportKind};
pub use scheduler::scheduler_config_source;

/// The one target that there is.
const TARGET: &str = "nvmf_tgt";
/// The port of NVMe over Fabrics, where none was given.
const NVME_PORT: u16 = 4420;

/// All methods.
pub fn methods() -> &'static [Method<NvmfSystem>] {
    METHODS
}

/// The target's part of the saved configuration.
pub fn config_source(system: &Arc<NvmfSystem>) -> Arc<dyn ConfigSource> {
    Arc::clone(system) as Arc<dyn ConfigSource>
}

const METHODS: &[Method<NvmfSystem>] = &[
    transports::CREATE,
    transports::GET,
    subsystems::CREATE,
    subsystems::DELETE,
    subsystems::GET,
    namespaces::ADD,
    namespaces::REMOVE,
    namespaces::SET_ANA_GROUP,
    hosts::ADD,
    hosts::REMOVE,
    hosts::ALLOW_ANY,
    listeners::ADD,
    listeners::REMOVE,
    listeners::GET,
    listeners::SET_ANA_STATE,
    discovery::ADD_REFERRAL,
    discovery::REMOVE_REFERRAL,
    discovery::GET_REFERRALS,
    settings::SET_CONFIG,
    settings::SET_MAX_SUBSYSTEMS,
    settings::SET_CRDT,
    reports::GET_TARGETS,
    reports::GET_CONTROLLERS,
    reports::GET_QPAIRS,
    reports::GET_STATS,
    scheduler::SET,
    scheduler::GET,
    scheduler::MOVE,
];

const TGT_NAME: Param = Param::optional("tgt_name", Kind::Str, "Name of the target; nvmf_tgt is the only one");
const NQN: Param = Param::required("nqn", Kind::Str, "NQN of the subsystem");

const ADDRESS_FIELDS: &[Param] = &[
    Param::required("trtype", Kind::Str, "Transport: TCP or RDMA, in any case"),
    Param::required("traddr", Kind::Str, "IP address; 0.0.0.0 or :: for all of the machine's"),
    Param::optional("adrfam", Kind::Str, "Address family, IPv4 or IPv6; default: the address's"),
    Param::optional("trsvcid", Kind::Str, "Port, as text; default 4420"),
];
const LISTEN_ADDRESS: Param = Param::required("listen_address", Kind::Object(ADDRESS_FIELDS), "Where hosts connect");

/// Refuses other targets than the one there is, as SPDK does.
fn check_target(params: &Params) -> Result<(), RpcError> {
    match params.opt_str("tgt_name") {
        None | Some(TARGET) => Ok(()),
        Some(_) => {
            let error = params.invalid("tgt_name", "there is no such target");
            Err(error.with_code(schema::code::INTERNAL_ERROR).fix(format!("leave it out, or give {TARGET}")))
        }
    }
}

/// Refuses a parameter that has a meaning which this target does not serve, when it is given.
fn not_served(params: &Params, field: &str, reason: &str, fix: &str) -> Result<(), RpcError> {
    match params.get(field) {
        None | Some(Value::Bool(false)) => Ok(()),
        Some(_) => Err(params.invalid(field, reason).fix(fix)),
    }
}

/// A transport's type as callers write it.
fn transport_kind(params: &Params, field: &str, text: &str) -> Result<TransportKind, RpcError> {
    for kind in [TransportKind::Tcp, TransportKind::Rdma] {
        if text.eq_ignore_ascii_case(kind.name()) {
            return Ok(kind);
        }
    }
    let reason = match text.to_ascii_uppercase().as_str() {
        "PCIE" | "FC" | "VFIOUSER" | "CUSTOM" => "a transport that this target does not serve",
        _ => "not a transport type",
    };
    Err(params.invalid(field, reason).fix("give TCP or RDMA"))
}

#[derive(Deserialize)]
struct AddressParams {
    trtype: String,
    traddr: String,
    adrfam: Option<String>,
    trsvcid: Option<String>,
}

/// The address under `field`.
fn address(params: &Params, field: &str) -> Result<ListenAddress, RpcError> {
    let invalid = |key: &str, reason: &str| params.invalid(&format!("{field}.{key}"), reason);
    let given: AddressParams =
        params.opt(field)?.ok_or_else(|| params.invalid(field, "missing, or not an object as it is wanted"))?;
    let trtype = transport_kind(params, &format!("{field}.trtype"), &given.trtype)?;
    let traddr: IpAddr = given.traddr.parse().map_err(|_| {
        invalid("traddr", "not an IP address").fix("write it in numbers: 192.0.2.1, or 2001:db8::1 without brackets")
    })?;
    if let Some(family) = &given.adrfam {
        let agrees = match family.to_ascii_lowercase().as_str() {
            "ipv4" => traddr.is_ipv4(),
            "ipv6" => traddr.is_ipv6(),
            _ => return Err(invalid("adrfam", "not an address family that is served").fix("give IPv4 or IPv6")),
        };
        if !agrees {
            let other = if traddr.is_ipv4() { "IPv4" } else { "IPv6" };
            return Err(
                invalid("adrfam", "traddr is of the other family").fix(format!("leave it out, or give {other}"))
            );
        }
    }
    let trsvcid = match &given.trsvcid {
        None => NVME_PORT,
        Some(text) => match text.parse::<u16>() {
            // A plus sign would parse too.
            Ok(port) if port != 0 && text.bytes().all(|byte| byte.is_ascii_digit()) => port,
            _ => return Err(invalid("trsvcid", "not a port").fix("give 1 to 65535 in quotes: \"4420\"")),
        },
    };
    Ok(ListenAddress { trtype, traddr, trsvcid })
}

/// `words`, and the one that a mistyped one may have meant.
fn known_words(word: &str, words: &[&str]) -> String {
    match nearest(word, words.iter().copied()) {
        Some(near) => format!("did you mean {near}? known are {}", words.join(", ")),
        None => format!("known are {}", words.join(", ")),
    }
}

#[cfg(test)]
mod tests;
