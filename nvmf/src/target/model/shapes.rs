//! What the model's parts look like in JSON, shown and saved.

use serde_json::{Map, Value, json};

use crate::target::view::{ListenAddress, NamespaceView, SubsystemView};

/// Bytes in hexadecimal, upper case, as SPDK writes NGUID and EUI64.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}

/// The object that RPCs show of an address.
pub fn address_json(address: &ListenAddress) -> Value {
    json!({
        "trtype": address.trtype.name(),
        "adrfam": address.adrfam(),
        "traddr": address.traddr.to_string(),
        "trsvcid": address.trsvcid.to_string(),
    })
}

/// The object that `nvmf_subsystem_add_ns` takes for a namespace as it is.
pub(super) fn namespace_json(view: &SubsystemView, namespace: &NamespaceView) -> Map<String, Value> {
    let mut all = Map::new();
    all.insert("nsid".into(), json!(namespace.nsid));
    all.insert("bdev_name".into(), json!(namespace.bdev.name()));
    if let Some(nguid) = &namespace.nguid {
        all.insert("nguid".into(), json!(hex(nguid)));
    }
    if let Some(eui64) = &namespace.eui64 {
        all.insert("eui64".into(), json!(hex(eui64)));
    }
    all.insert("uuid".into(), json!(namespace.uuid));
    if view.ana_reporting {
        all.insert("anagrpid".into(), json!(namespace.anagrpid));
    }
    all
}

/// The object that `nvmf_get_subsystems` shows of a namespace.
pub fn shown_namespace(view: &SubsystemView, namespace: &NamespaceView) -> Value {
    let mut all = namespace_json(view, namespace);
    all.insert("name".into(), json!(namespace.bdev.name()));
    Value::Object(all)
}
