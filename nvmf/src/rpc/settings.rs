//! Settings that are made before the start.

use std::sync::Arc;

use schema::{Kind, Method, Param, Params, RpcError, States};
use serde_json::{Value, json};

use super::known_words;
use crate::target::model::{ADMIN_CMD_PASSTHRU, DHCHAP_DHGROUPS, DHCHAP_DIGESTS};
use crate::target::system::NvmfSystem;
use crate::target::view::DiscoveryFilter;

const FILTERS: &[&str] = &["transport", "address", "svcid"];

const fn passthru(name: &'static str) -> Param {
    Param::optional(name, Kind::Bool, "Not served: only false")
}

const PASSTHRU: &[Param] = &{
    let mut fields = [passthru(""); ADMIN_CMD_PASSTHRU.len()];
    let mut at = 0;
    while at < fields.len() {
        fields[at] = passthru(ADMIN_CMD_PASSTHRU[at]);
        at += 1;
    }
    fields
};

/// `nvmf_set_config`
pub(super) const SET_CONFIG: Method<NvmfSystem> = Method::new(
    "nvmf_set_config",
    "Set what concerns the whole target.",
    |system, params| Box::pin(set_config(system, params)),
)
.params(&[
    Param::optional("admin_cmd_passthru", Kind::Object(PASSTHRU), "Admin commands to hand to devices"),
    Param::optional("poll_groups_mask", Kind::Str, "Not served: every reactor polls connections"),
    Param::optional("discovery_filter", Kind::Str, "As discovery_filters, with commas; or match_any").deprecated(),
    Param::optional(
        "discovery_filters",
        Kind::Set(FILTERS),
        "What of a listener must equal the one that a host came through to be in its discovery log, default nothing",
    ),
    Param::optional("dhchap_digests", Kind::Set(DHCHAP_DIGESTS), "Kept and shown; authentication is not served"),
    Param::optional("dhchap_dhgroups", Kind::Set(DHCHAP_DHGROUPS), "Kept and shown; authentication is not served"),
    Param::optional(
        "dup_host_policy",
        Kind::Enum(&["allow", "restrict_per_listener"]),
        "Whether a host may connect more than once; only allow is served",
    ),
])
.states(States::STARTUP)
.mutates();

/// `nvmf_set_max_subsystems`
pub(super) const SET_MAX_SUBSYSTEMS: Method<NvmfSystem> =
    Method::new("nvmf_set_max_subsystems", "Set how many subsystems there may be.", |system, params| {
        Box::pin(set_max_subsystems(system, params))
    })
    .params(&[Param::required("max_subsystems", Kind::U32, "How many, with that for discovery; 1024 unless set")])
    .states(States::STARTUP)
    .mutates();

/// `nvmf_set_crdt`
pub(super) const SET_CRDT: Method<NvmfSystem> =
    Method::new("nvmf_set_crdt", "Set the command retry delay times that hosts are told.", |system, params| {
        Box::pin(set_crdt(system, params))
    })
    .params(&[
        Param::optional("crdt1", Kind::U16, "First, in units of 100 ms"),
        Param::optional("crdt2", Kind::U16, "Second, in units of 100 ms"),
        Param::optional("crdt3", Kind::U16, "Third, in units of 100 ms"),
    ])
    .states(States::STARTUP)
    .mutates();

async fn set_config(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    if let Some(Value::Object(passthru)) = params.get("admin_cmd_passthru")
        && let Some((name, _)) = passthru.iter().find(|(_, value)| **value == json!(true))
    {
        let error = params.invalid(&format!("admin_cmd_passthru.{name}"), "commands are not passed through to devices");
        return Err(error.fix("leave it out, or give false"));
    }
    if params.get("poll_groups_mask").is_some() {
        let error = params.invalid("poll_groups_mask", "every reactor polls connections");
        return Err(error.fix("leave it out, and choose reactors with --cores"));
    }
    if params.opt_str("dup_host_policy").is_some_and(|policy| policy != "allow") {
        let error = params.invalid("dup_host_policy", "a host may always connect more than once");
        return Err(error.fix("leave it out, or give allow"));
    }
    let filter = discovery_filter(&params)?;
    let (digests, groups): (Option<Vec<String>>, Option<Vec<String>>) =
        (params.opt("dhchap_digests")?, params.opt("dhchap_dhgroups")?);
    system.set_settings(|settings| {
        if let Some(filter) = filter {
            settings.discovery_filter = filter;
        }
        if let Some(digests) = digests {
            settings.dhchap_digests = digests;
        }
        if let Some(groups) = groups {
            settings.dhchap_dhgroups = groups;
        }
    })?;
    Ok(json!(true))
}

/// The filter, in its present form or in its old one.
fn discovery_filter(params: &Params) -> Result<Option<DiscoveryFilter>, RpcError> {
    let words: Vec<String> = match (params.opt("discovery_filters")?, params.opt_str("discovery_filter")) {
        (Some(_), Some(_)) => {
            let error = params.invalid("discovery_filter", "given together with discovery_filters");
            return Err(error.fix("give only discovery_filters"));
        }
        (Some(words), None) => words,
        (None, Some("match_any")) => Vec::new(),
        (None, Some(text)) => text.split(',').map(|word| word.trim().to_owned()).collect(),
        (None, None) => return Ok(None),
    };
    let mut filter = DiscoveryFilter::default();
    for word in &words {
        match word.as_str() {
            "transport" => filter.transport = true,
            "address" => filter.address = true,
            "svcid" => filter.svcid = true,
            odd => {
                let error = params.invalid("discovery_filter", format!("{odd:?} is not a part of an address"));
                return Err(error.fix(known_words(odd, FILTERS)));
            }
        }
    }
    Ok(Some(filter))
}

async fn set_max_subsystems(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    let max = params.u32("max_subsystems")?;
    system.set_settings(|settings| settings.max_subsystems = max)?;
    Ok(json!(true))
}

async fn set_crdt(system: Arc<NvmfSystem>, params: Params) -> Result<Value, RpcError> {
    let times: [Option<u16>; 3] = [params.opt("crdt1")?, params.opt("crdt2")?, params.opt("crdt3")?];
    system.set_settings(|settings| {
        for (time, given) in settings.crdt.iter_mut().zip(times) {
            *time = given.unwrap_or(*time);
        }
    })?;
    Ok(json!(true))
}
