//! The device that passes everything on to another, as a template for devices in layers and a measure of what a layer
//! costs.

use std::io;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use schema::{ConfigEntry, Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};
use uuid::Uuid;

use super::common::{rpc_delete, take_uuid};
use super::layer::Base;
use super::{Module, layer, malloc};
use crate::conformance::{Spec, Subject};
use crate::core::{
    Bdev, BdevError, BdevInfo, BdevSystem, ChannelCx, ChannelId, Geometry, Io, IoChannel, IoCx, NewBdev, OpSet,
};

/// The module.
pub const MODULE: Module = Module { name: "passthru", methods: METHODS, subjects: &[SUBJECT], examine: None };

const PRODUCT: &str = "passthru";

struct Passthru {
    base: Base,
}

impl Bdev for Passthru {
    fn product_name(&self) -> &'static str {
        PRODUCT
    }

    fn geometry(&self) -> Geometry {
        self.base.bdev().device().geometry()
    }

    fn native_ops(&self) -> OpSet {
        // What the base emulates is best emulated there.
        layer::ops_of(self.base.bdev())
    }

    fn open_channel(&self, cx: &mut ChannelCx<'_>) -> io::Result<Box<dyn IoChannel>> {
        Ok(Box::new(PassthruChannel { base: cx.get_channel(self.base.bdev())? }))
    }

    fn driver_specific(&self) -> Value {
        json!({ "passthru": { "base_bdev_name": self.base.bdev().name() } })
    }

    fn removed(&self) {
        self.base.release();
    }

    fn config(&self, info: &BdevInfo) -> Vec<ConfigEntry> {
        let base = self.base.bdev().name();
        let params = json!({ "name": info.name(), "base_bdev_name": base, "uuid": info.uuid().to_string() });
        vec![ConfigEntry::new("bdev_passthru_create", params)]
    }

    fn base_bdevs(&self) -> Vec<String> {
        vec![self.base.bdev().name().to_string()]
    }
}

struct PassthruChannel {
    base: ChannelId,
}

impl IoChannel for PassthruChannel {
    #[inline]
    fn submit(&mut self, io: Io, cx: &mut IoCx<'_>) {
        cx.forward(self.base, io);
    }

    fn base_channels(&self) -> &[ChannelId] {
        std::slice::from_ref(&self.base)
    }

    fn abort_all(&mut self, cx: &mut IoCx<'_>) {
        cx.abort_all(self.base);
    }

    fn close(&mut self, cx: &mut ChannelCx<'_>) {
        cx.put_channel(self.base);
    }
}

/// Creates and registers a device on `base`, which it claims.
///
/// # Errors
/// As [`BdevSystem::open`] of the base, claiming it, and [`BdevSystem::register`].
pub async fn create(
    system: &Arc<BdevSystem>,
    name: &str,
    uuid: Option<Uuid>,
    base: &str,
) -> Result<Arc<BdevInfo>, BdevError> {
    let base = layer::claim_base(system, name, base, PRODUCT)?;
    let below = Arc::clone(base.bdev());
    let device = Arc::new(Passthru { base });
    layer::register(system, NewBdev { name: name.to_string(), uuid, aliases: Vec::new(), device }, below).await
}

const METHODS: &[Method<BdevSystem>] = &[
    Method::new("bdev_passthru_create", "Create a bdev that passes everything on to another.", |s, p| {
        Box::pin(rpc_create(s, p))
    })
    .params(&[
        Param::required("name", Kind::Str, "Name of the bdev").at_least(1),
        Param::required("base_bdev_name", Kind::Str, "Name of the bdev to pass on to; it must not be in use"),
        Param::optional("uuid", Kind::Uuid, "UUID of the bdev; drawn at random when left out"),
    ])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR)
    .result("name of the bdev"),
    Method::new("bdev_passthru_delete", "Delete a passthru bdev; its base stays.", |s, p| {
        Box::pin(rpc_delete(s, p, PRODUCT))
    })
    .params(&[Param::required("name", Kind::Str, "Name of the bdev")])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR),
];

async fn rpc_create(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let base = params.str("base_bdev_name")?;
    let uuid = take_uuid(&params)?;
    let created = create(&system, params.str("name")?, uuid, base).await;
    let info = created.map_err(|error| layer::blame_base(&params, "base_bdev_name", error))?;
    Ok(json!(info.name()))
}

const SUBJECT: Subject = Subject {
    label: "passthru",
    block_sizes: &[512],
    forgets: false,
    make: conformance_make,
    resize: Some(|system, spec, blocks| {
        Box::pin(async move { malloc::resize(&system, &format!("{}-base", spec.name), blocks).await })
    }),
};

fn conformance_make(system: Arc<BdevSystem>, spec: Spec) -> BoxFuture<'static, Result<Vec<String>, BdevError>> {
    Box::pin(async move {
        let base = format!("{}-base", spec.name);
        malloc::create(&system, &base, None, malloc::MallocOptions::new(spec.block_size, spec.num_blocks)).await?;
        create(&system, &spec.name, None, &base).await?;
        Ok(vec![spec.name, base])
    })
}
