//! The null device: reads are zeroes, writes vanish.
//!
//! It measures what everything above it costs. Reads are filled with zeroes all the same: payload memory is used again,
//! and a peer must never see what another peer wrote.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::future::BoxFuture;
use schema::{ConfigEntry, Errno, Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};
use uuid::Uuid;

use super::Module;
use super::common::{MIB, REFUSED_MD, refuse_metadata, take_name, take_uuid, whole_blocks};
use crate::conformance::{Spec, Subject};
use crate::core::{
    Bdev, BdevError, BdevInfo, BdevSystem, ChannelCx, Geometry, Io, IoChannel, IoCx, IoStatus, NewBdev, Op, OpKind,
    OpSet,
};

/// The module.
pub const MODULE: Module = Module { name: "null", methods: METHODS, subjects: &[SUBJECT], examine: None };

const PRODUCT: &str = "Null disk";

/// How to make one.
#[derive(Clone, Copy, Debug)]
pub struct NullOptions {
    /// Bytes in a block.
    pub block_size: u32,
    /// Blocks.
    pub num_blocks: u64,
    /// Bytes in a physical block; 0: as a logical one.
    pub physical_block_size: u32,
}

struct Null {
    options: NullOptions,
    num_blocks: AtomicU64,
}

impl Bdev for Null {
    fn product_name(&self) -> &'static str {
        PRODUCT
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::new(self.options.block_size, self.num_blocks.load(Ordering::Acquire));
        if self.options.physical_block_size != 0 {
            geometry.physical_block_size = self.options.physical_block_size;
        }
        geometry.unmap_zeroes = true;
        geometry
    }

    fn native_ops(&self) -> OpSet {
        OpSet::of(&OpKind::ALL)
    }

    fn open_channel(&self, _: &mut ChannelCx<'_>) -> io::Result<Box<dyn IoChannel>> {
        Ok(Box::new(NullChannel))
    }

    fn config(&self, info: &BdevInfo) -> Vec<ConfigEntry> {
        let geometry = self.geometry();
        let params = json!({
            "name": info.name(),
            "num_blocks": geometry.num_blocks,
            "block_size": geometry.block_size,
            "physical_block_size": geometry.physical_block_size,
            "uuid": info.uuid().to_string(),
        });
        vec![ConfigEntry::new("bdev_null_create", params)]
    }
}

struct NullChannel;

impl IoChannel for NullChannel {
    #[inline]
    fn submit(&mut self, mut io: Io, cx: &mut IoCx<'_>) {
        let status = match io.op() {
            Op::Read => {
                io.bufs_mut().zero();
                IoStatus::Success
            }
            Op::Compare => compare(&io, io.bufs().len()),
            Op::CompareAndWrite { .. } => compare(&io, io.bufs().len() / 2),
            Op::Write { .. } | Op::Flush | Op::Unmap | Op::WriteZeroes { .. } | Op::Copy { .. } | Op::Reset => {
                IoStatus::Success
            }
        };
        cx.complete(io, status);
    }
}

/// Whether the first `bytes` bytes of the payload are what the blocks read as.
fn compare(io: &Io, mut bytes: usize) -> IoStatus {
    for segment in io.bufs().segments() {
        let n = segment.len().min(bytes);
        if segment[..n].iter().any(|&byte| byte != 0) {
            return IoStatus::CompareFailed;
        }
        bytes -= n;
    }
    IoStatus::Success
}

/// Creates and registers a null device.
///
/// # Errors
/// As [`BdevSystem::register`]; [`BdevError::Invalid`] for a size of zero.
pub async fn create(
    system: &BdevSystem,
    name: &str,
    uuid: Option<Uuid>,
    options: NullOptions,
) -> Result<Arc<BdevInfo>, BdevError> {
    super::common::check_size(options.block_size, options.num_blocks)?;
    super::common::check_physical(options.block_size, options.physical_block_size)?;
    let device = Arc::new(Null { options, num_blocks: AtomicU64::new(options.num_blocks) });
    system.register(NewBdev { name: name.to_string(), uuid, aliases: Vec::new(), device }).await
}

/// Sets the size of a null device.
///
/// # Errors
/// [`BdevError::NotFound`], also for another kind of device; [`BdevError::Invalid`] for a size of zero.
pub async fn resize(system: &BdevSystem, name: &str, num_blocks: u64) -> Result<(), BdevError> {
    let info = system.get(name)?;
    let null = super::common::device_as::<Null>(&info, PRODUCT)?;
    super::common::check_size(null.options.block_size, num_blocks)?;
    null.num_blocks.store(num_blocks, Ordering::Release);
    system.resized(&info).await
}

const METHODS: &[Method<BdevSystem>] = &[
    Method::new("bdev_null_create", "Create a bdev that reads as zeroes and forgets what is written.", |s, p| {
        Box::pin(rpc_create(s, p))
    })
    .params(&[
        Param::required("name", Kind::Str, "Name of the bdev").at_least(1),
        Param::required("block_size", Kind::U32, "Bytes in a block: a power of two from 512 to 65536"),
        Param::required("num_blocks", Kind::U64, "Number of blocks"),
        Param::optional("uuid", Kind::Uuid, "UUID of the bdev; drawn at random when left out"),
        Param::optional("physical_block_size", Kind::U32, "Bytes in a physical block; as block_size when left out"),
        Param::optional("md_size", Kind::U32, REFUSED_MD),
        Param::optional("dif_type", Kind::I32, REFUSED_MD),
        Param::optional("dif_pi_format", Kind::U32, REFUSED_MD),
        Param::optional("dif_is_head_of_md", Kind::Bool, REFUSED_MD),
        Param::optional("preferred_write_granularity", Kind::U32, "Accepted, without effect").deprecated(),
        Param::optional("preferred_write_alignment", Kind::U32, "Accepted, without effect").deprecated(),
        Param::optional("optimal_write_size", Kind::U32, "Accepted, without effect").deprecated(),
        Param::optional("preferred_unmap_granularity", Kind::U32, "Accepted, without effect").deprecated(),
        Param::optional("preferred_unmap_alignment", Kind::U32, "Accepted, without effect").deprecated(),
    ])
    .mutates()
    .refuses_with(code::INTERNAL_ERROR)
    .result("name of the bdev"),
    Method::new("bdev_null_delete", "Delete a null bdev.", |s, p| Box::pin(super::common::rpc_delete(s, p, PRODUCT)))
        .params(&[Param::required("name", Kind::Str, "Name of the bdev")])
        .mutates()
        .refuses_with(code::INTERNAL_ERROR),
    Method::new("bdev_null_resize", "Change the size of a null bdev.", |s, p| Box::pin(rpc_resize(s, p)))
        .params(&[
            Param::required("name", Kind::Str, "Name of the bdev"),
            Param::required("new_size", Kind::U64, "New size in MiB").at_least(1),
        ])
        .mutates()
        .refuses_with(code::INTERNAL_ERROR),
];

async fn rpc_create(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    refuse_metadata(&params)?;
    let options = NullOptions {
        block_size: params.u32("block_size")?,
        num_blocks: params.u64("num_blocks")?,
        physical_block_size: params.opt_u32("physical_block_size").unwrap_or(0),
    };
    let info = create(&system, take_name(&params)?, take_uuid(&params)?, options).await?;
    Ok(json!(info.name()))
}

async fn rpc_resize(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let name = params.str("name")?;
    let mib = params.u64("new_size")?;
    let block_size = system.get(name)?.device().geometry().block_size;
    let bytes = mib.checked_mul(MIB).ok_or_else(|| {
        params.blame("new_size", RpcError::errno(Errno::INVAL, "more bytes than a 64-bit number can count"))
    })?;
    resize(&system, name, whole_blocks(bytes, block_size)).await?;
    Ok(json!(true))
}

const SUBJECT: Subject = Subject {
    label: "null",
    block_sizes: &[512, 4096],
    forgets: true,
    make: conformance_make,
    resize: Some(|system, spec, blocks| Box::pin(async move { resize(&system, &spec.name, blocks).await })),
};

fn conformance_make(system: Arc<BdevSystem>, spec: Spec) -> BoxFuture<'static, Result<Vec<String>, BdevError>> {
    Box::pin(async move {
        let options = NullOptions { block_size: spec.block_size, num_blocks: spec.num_blocks, physical_block_size: 0 };
        create(&system, &spec.name, None, options).await?;
        Ok(vec![spec.name])
    })
}
