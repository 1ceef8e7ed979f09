//! The `nbd_*` methods.

use std::path::Path;
use std::sync::Arc;

use schema::{ConfigSource, Kind, Method, Param, Params, RpcError};
use serde_json::{Value, json};

use crate::system::NbdSystem;

/// All methods.
pub fn methods() -> &'static [Method<NbdSystem>] {
    METHODS
}

/// The exports' part of the saved configuration.
pub fn config_source(system: &Arc<NbdSystem>) -> Arc<dyn ConfigSource> {
    Arc::clone(system) as Arc<dyn ConfigSource>
}

const SOCKET: Param =
    Param::required("socket", Kind::Str, "Absolute path of the Unix socket, at most 107 bytes").at_least(1);

const METHODS: &[Method<NbdSystem>] = &[
    Method::new(
        "nbd_export_add",
        "Serve a bdev over NBD at a Unix socket, for qemu-img, nbdcopy, fio and the like.",
        |system, params| Box::pin(add(system, params)),
    )
    .params(&[
        Param::required("bdev_name", Kind::Str, "Name, alias or UUID of the bdev").at_least(1),
        SOCKET,
        Param::optional("readonly", Kind::Bool, "Whether clients may only read; default: false"),
    ])
    .mutates(),
    Method::new(
        "nbd_export_remove",
        "End an export: what is outstanding is answered, then its connections are closed.",
        |system, params| Box::pin(remove(system, params)),
    )
    .params(&[SOCKET])
    .mutates(),
    Method::new("nbd_get_exports", "Show the exports.", |system, _| Box::pin(get(system)))
        .result("array of {bdev_name, socket, readonly, connections}"),
];

async fn add(system: Arc<NbdSystem>, params: Params) -> Result<Value, RpcError> {
    let read_only = params.opt_bool("readonly").unwrap_or(false);
    system.add(params.str("bdev_name")?, Path::new(params.str("socket")?), read_only).await?;
    Ok(json!(true))
}

async fn remove(system: Arc<NbdSystem>, params: Params) -> Result<Value, RpcError> {
    system.remove(Path::new(params.str("socket")?)).await?;
    Ok(json!(true))
}

async fn get(system: Arc<NbdSystem>) -> Result<Value, RpcError> {
    let show = |info: crate::system::ExportInfo| {
        json!({
            "bdev_name": info.bdev_name,
            "socket": info.socket,
            "readonly": info.read_only,
            "connections": info.connections,
        })
    };
    Ok(system.list().into_iter().map(show).collect())
}
