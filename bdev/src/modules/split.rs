//! A device in equal parts.
//!
//! Part `n` of `base` is called `basepn`. The parts share one claim on the base, come together and go together. Their UUIDs
//! follow from the base's, so that they are the same after a restart.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use futures_util::future::BoxFuture;
use schema::{ConfigEntry, Errno, Kind, Method, Param, Params, RpcError, code};
use serde_json::{Value, json};
use uuid::Uuid;

use super::common::MIB;
use super::layer::Base;
use super::{Module, layer, malloc};
use crate::conformance::{Rng, Spec, Subject};
use crate::core::{
    Bdev, BdevError, BdevInfo, BdevSystem, ChannelCx, ChannelId, Geometry, Io, IoChannel, IoCx, NewBdev, Op, OpSet,
};

/// The module.
pub const MODULE: Module = Module { name: "split", methods: METHODS, subjects: &[SUBJECT], examine: None };

const PRODUCT: &str = "Split Disk";
/// Parts of one base.
const MAX_PARTS: i128 = 1024;

/// What all parts share.
struct Whole {
    base: Base,
    params: Value,
    /// Parts that have not been removed.
    parts: AtomicU32,
}

struct Part {
    whole: Arc<Whole>,
    index: u32,
    offset: u64,
    num_blocks: u64,
}

impl Bdev for Part {
    fn product_name(&self) -> &'static str {
        PRODUCT
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = self.whole.base.bdev().device().geometry();
        geometry.num_blocks = self.num_blocks;
        let boundary = u64::from(geometry.optimal_io_boundary);
        if boundary != 0 && !self.offset.is_multiple_of(boundary) {
            // It lies elsewhere in this part's blocks; the base cuts there.
            geometry.optimal_io_boundary = 0;
        }
        geometry
    }

    fn native_ops(&self) -> OpSet {
        layer::ops_of(self.whole.base.bdev())
    }

    fn open_channel(&self, cx: &mut ChannelCx<'_>) -> io::Result<Box<dyn IoChannel>> {
        let base = cx.get_channel(self.whole.base.bdev())?;
        Ok(Box::new(PartChannel { base, offset: self.offset }))
    }

    fn driver_specific(&self) -> Value {
        json!({ "split": { "base_bdev": self.whole.base.bdev().name(), "offset_blocks": self.offset } })
    }

    fn removed(&self) {
        if self.whole.parts.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.whole.base.release();
        }
    }

    fn config(&self, _: &BdevInfo) -> Vec<ConfigEntry> {
        // One call makes all parts.
        let entry = (self.index == 0).then(|| ConfigEntry::new("bdev_split_create", self.whole.params.clone()));
        entry.into_iter().collect()
    }

    fn base_bdevs(&self) -> Vec<String> {
        vec![self.whole.base.bdev().name().to_string()]
    }
}

struct PartChannel {
    base: ChannelId,
    offset: u64,
}

impl IoChannel for PartChannel {
    #[inline]
    fn submit(&mut self, mut io: Io, cx: &mut IoCx<'_>) {
        // Nobody above looks at the range of what has come home.
        io.set_range(io.lba() + self.offset, io.blocks());
        if let Op::Copy { source_lba } = io.op() {
            io.set_op(Op::Copy { source_lba: source_lba + self.offset });
        }
        cx.forward(self.base, io);
    }

    fn base_channels(&self) -> &[ChannelId] {
        std::slice::from_ref(&self.base)
    }

    // Nothing is passed on by `abort_all`: the base's channel has the other parts' operations too.

    fn close(&mut self, cx: &mut ChannelCx<'_>) {
        cx.put_channel(self.base);
    }
}

/// The UUID of part `index` of the device with the UUID `base`.
fn part_uuid(base: Uuid, index: u32) -> Uuid {
    let (high, low) = base.as_u64_pair();
    let mut rng = Rng::new(high ^ Rng::new(low ^ u64::from(index) << 32).next_u64());
    let mut bytes = [0; 16];
    rng.fill(&mut bytes);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

/// Creates and registers `count` parts of `base`, which is claimed: equal ones, or of `size_mb` MiB each, then as many as
/// there is room for.
///
/// # Errors
/// As [`BdevSystem::open`] of the base, claiming it, and [`BdevSystem::register`] (then there are no parts);
/// [`BdevError::Invalid`] when there is no room for a part.
pub async fn create(
    system: &Arc<BdevSystem>,
    base: &str,
    count: u32,
    size_mb: Option<u64>,
) -> Result<Vec<Arc<BdevInfo>>, BdevError> {
    let info = system.get(base)?;
    let geometry = info.device().geometry();
    let (part, count) = match size_mb {
        None => (geometry.num_blocks / u64::from(count.max(1)), count),
        Some(mb) => {
            let part = mb.saturating_mul(MIB) / u64::from(geometry.block_size);
            let room = geometry.num_blocks.checked_div(part).unwrap_or(0);
            (part, u32::try_from(room).unwrap_or(u32::MAX).min(count))
        }
    };
    if part == 0 || count == 0 {
        let reason = format!("'{}' has no room for a part: it has {} MiB", info.name(), geometry.bytes() / MIB);
        return Err(match size_mb {
            Some(mb) => BdevError::invalid("split_size_mb", mb, reason),
            None => BdevError::invalid("split_count", count, reason),
        });
    }
    let names: Vec<String> = (0..count).map(|n| format!("{}p{n}", info.name())).collect();
    let claimed = layer::claim_for(system, &format!("the split of '{}'", info.name()), base, names.clone())?;
    let mut params = json!({ "base_bdev": info.name(), "split_count": count });
    if let Some(mb) = size_mb {
        params["split_size_mb"] = json!(mb);
    }
    let shared = Arc::new(Whole { base: claimed, params, parts: AtomicU32::new(count) });
    let mut parts = Vec::new();
    for (index, name) in (0..count).zip(names) {
        let offset = part * u64::from(index);
        let device = Arc::new(Part { whole: Arc::clone(&shared), index, offset, num_blocks: part });
        let uuid = Some(part_uuid(info.uuid(), index));
        let new = NewBdev { name, uuid, aliases: Vec::new(), device };
        match layer::register(system, new, Arc::clone(&info)).await {
            Ok(part) => parts.push(part),
            Err(error) => {
                for part in parts {
                    // Nobody can have begun to use it.
                    let _ = system.remove(part.name()).await;
                }
                return Err(error);
            }
        }
    }
    Ok(parts)
}

/// Removes the parts of `base`.
///
/// # Errors
/// As [`BdevSystem::remove`] of each; [`BdevError::NotFound`] when it has no parts.
pub async fn remove(system: &Arc<BdevSystem>, base: &str) -> Result<(), BdevError> {
    let base = system.get(base)?.name().to_string();
    let is_part = |info: &&Arc<BdevInfo>| {
        info.device().product_name() == PRODUCT && info.device().base_bdevs().first() == Some(&base)
    };
    let names: Vec<String> = system.list().iter().filter(is_part).map(|info| info.name().to_string()).collect();
    if names.is_empty() {
        return Err(BdevError::NotFound { name: format!("{base}p0") });
    }
    for name in names {
        system.remove(&name).await?;
    }
    Ok(())
}

const METHODS: &[Method<BdevSystem>] = &[
    Method::new("bdev_split_create", "Make bdevs of the parts of another.", |s, p| Box::pin(rpc_create(s, p)))
        .params(&[
            Param::required("base_bdev", Kind::Str, "Name of the bdev to split; it must not be in use"),
            Param::required("split_count", Kind::U32, "Number of parts").at_least(1).at_most(MAX_PARTS),
            Param::optional("split_size_mb", Kind::U64, "Size of a part in MiB; equal parts when left out").at_least(1),
        ])
        .mutates()
        .refuses_with(code::INTERNAL_ERROR)
        .result("array of the parts' names"),
    Method::new("bdev_split_delete", "Delete the parts of a bdev; it stays.", |s, p| Box::pin(rpc_delete(s, p)))
        .params(&[Param::required("base_bdev", Kind::Str, "Name of the bdev that was split")])
        .mutates()
        .refuses_with(code::INTERNAL_ERROR),
];

async fn rpc_create(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    let count = params.u32("split_count")?;
    let created = create(&system, params.str("base_bdev")?, count, params.opt_u64("split_size_mb")).await;
    let parts = created.map_err(|error| layer::blame_base(&params, "base_bdev", error))?;
    Ok(parts.iter().map(|part| json!(part.name())).collect())
}

async fn rpc_delete(system: Arc<BdevSystem>, params: Params) -> Result<Value, RpcError> {
    remove(&system, params.str("base_bdev")?).await.map_err(|error| match error {
        BdevError::NotFound { .. } => {
            params.blame("base_bdev", RpcError::errno(Errno::NODEV, "there is no bdev of that name that was split"))
        }
        other => other.into(),
    })?;
    Ok(json!(true))
}

const SUBJECT: Subject =
    Subject { label: "split", block_sizes: &[512], forgets: false, make: conformance_make, resize: None };

/// Two parts with a boundary that neither of them starts at; the second is tested.
fn conformance_make(system: Arc<BdevSystem>, spec: Spec) -> BoxFuture<'static, Result<Vec<String>, BdevError>> {
    Box::pin(async move {
        let base = spec.name.clone();
        let mut options = malloc::MallocOptions::new(spec.block_size, 2 * spec.num_blocks);
        options.optimal_io_boundary = 24;
        malloc::create(&system, &base, None, options).await?;
        let parts = create(&system, &base, 2, None).await?;
        Ok(vec![parts[1].name().to_string(), parts[0].name().to_string(), base])
    })
}
