//! The configuration as calls, in the order in which SPDK saves it: settings, transports, the discovery service, then each
//! subsystem with its hosts, namespaces and listeners.

use std::collections::BTreeMap;

use schema::ConfigEntry;
use serde_json::{Value, json};

use super::shapes::{address_json, namespace_json};
use super::{Model, Settings, Subsystem, options};
use crate::target::view::{AnaState, DISCOVERY_NQN, DiscoveryFilter, ListenAddress, ListenerView};

impl Model {
    /// The calls that make this target again.
    pub fn save(&self) -> Vec<ConfigEntry> {
        let mut calls = self.settings.save();
        for (&kind, options) in &self.transports {
            calls.push(ConfigEntry::new("nvmf_create_transport", options::to_json(kind, options)));
        }
        for referral in &self.referrals {
            let params = json!({
                "address": address_json(&referral.address),
                "secure_channel": referral.secure_channel,
                "subnqn": referral.subnqn,
            });
            calls.push(ConfigEntry::new("nvmf_discovery_add_referral", params));
        }
        for address in &self.discovery {
            calls.push(listener(DISCOVERY_NQN, address, self.discovery_sock_impls.get(address)));
        }
        self.subsystems.values().for_each(|subsystem| subsystem.save(&mut calls));
        calls
    }
}

impl Settings {
    fn save(&self) -> Vec<ConfigEntry> {
        let passthru: BTreeMap<&str, bool> = ADMIN_CMD_PASSTHRU.iter().map(|&name| (name, false)).collect();
        let config = json!({
            "discovery_filters": filter_words(self.discovery_filter),
            "admin_cmd_passthru": passthru,
            "dhchap_digests": self.dhchap_digests,
            "dhchap_dhgroups": self.dhchap_dhgroups,
            "dup_host_policy": "allow",
        });
        let [crdt1, crdt2, crdt3] = self.crdt;
        vec![
            ConfigEntry::new("nvmf_set_config", config),
            ConfigEntry::new("nvmf_set_max_subsystems", json!({"max_subsystems": self.max_subsystems})),
            ConfigEntry::new("nvmf_set_crdt", json!({"crdt1": crdt1, "crdt2": crdt2, "crdt3": crdt3})),
        ]
    }
}

/// Admin commands that SPDK can hand to a device that speaks NVMe.
pub const ADMIN_CMD_PASSTHRU: &[&str] = &[
    "identify_ctrlr",
    "identify_uuid_list",
    "get_log_page",
    "get_set_features",
    "sanitize",
    "security_send_recv",
    "fw_update",
    "nvme_mi",
    "vendor_specific",
];

/// The parts of an address that must match, in the words of `nvmf_set_config`.
fn filter_words(filter: DiscoveryFilter) -> Vec<&'static str> {
    let words = [("transport", filter.transport), ("address", filter.address), ("svcid", filter.svcid)];
    words.into_iter().filter_map(|(word, on)| on.then_some(word)).collect()
}

impl Subsystem {
    fn save(&self, calls: &mut Vec<ConfigEntry>) {
        let view = self.view();
        let nqn = &view.nqn;
        let mut params = json!({
            "nqn": nqn,
            "allow_any_host": view.allow_any_host,
            "serial_number": view.serial_number,
            "model_number": view.model_number,
            "max_namespaces": view.max_namespaces,
            "min_cntlid": view.min_cntlid,
            "max_cntlid": view.max_cntlid,
            "ana_reporting": view.ana_reporting,
            "dmrsl": view.dmrsl,
            "wzsl": view.wzsl,
            "passthrough": false,
            "enable_nssr": false,
        });
        if let Some(label) = self.admin_label() {
            params["admin_label"] = json!(label);
        }
        calls.push(ConfigEntry::new("nvmf_create_subsystem", params));
        for host in &view.hosts {
            calls.push(ConfigEntry::new("nvmf_subsystem_add_host", json!({"nqn": nqn, "host": host})));
        }
        for namespace in view.namespaces.values() {
            let mut namespace = namespace_json(view, namespace);
            namespace.insert("no_auto_visible".into(), json!(false));
            calls.push(ConfigEntry::new("nvmf_subsystem_add_ns", json!({"nqn": nqn, "namespace": namespace})));
        }
        for added in &view.listeners {
            let address = &added.address;
            let mut call = listener(nqn, address, self.sock_impls.get(address));
            match uniform(added, view.max_namespaces) {
                Some(AnaState::Optimized) => calls.push(call),
                Some(state) => {
                    call.params["ana_state"] = json!(state.name());
                    calls.push(call);
                }
                None => {
                    calls.push(call);
                    let address = address_json(address);
                    calls.extend(added.ana_states.iter().map(|(group, state)| {
                        let params = json!({
                            "nqn": nqn, "listen_address": address, "ana_state": state.name(), "anagrpid": group,
                        });
                        ConfigEntry::new("nvmf_subsystem_listener_set_ana_state", params)
                    }));
                }
            }
        }
    }
}

fn listener(nqn: &str, address: &ListenAddress, sock_impl: Option<&String>) -> ConfigEntry {
    let mut params: Value = json!({"nqn": nqn, "listen_address": address_json(address), "secure_channel": false});
    if let Some(name) = sock_impl {
        params["sock_impl"] = json!(name);
    }
    ConfigEntry::new("nvmf_subsystem_add_listener", params)
}

/// The state of all groups, if it is one.
fn uniform(listener: &ListenerView, groups: u32) -> Option<AnaState> {
    let first = listener.ana_state(1);
    (2..=groups).all(|group| listener.ana_state(group) == first).then_some(first)
}
