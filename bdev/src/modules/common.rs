//! What several modules need.

use std::any::Any;
use std::sync::Arc;

use schema::{Errno, Params, RpcError};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::core::{Bdev, BdevError, BdevInfo, BdevSystem, Geometry};

/// Bytes in a MiB, the unit of the sizes in several methods.
pub(super) const MIB: u64 = 1 << 20;

/// Help of the parameters for metadata and protection information.
pub(super) const REFUSED_MD: &str = "Metadata is not kept: only 0 or false is accepted";

/// Whole blocks in `bytes` bytes.
pub(super) fn whole_blocks(bytes: u64, block_size: u32) -> u64 {
    bytes / u64::from(block_size)
}

/// Refuses sizes that cannot be served.
pub(super) fn check_size(block_size: u32, num_blocks: u64) -> Result<(), BdevError> {
    if !Geometry::is_valid_block_size(block_size) {
        let reason = "block sizes are powers of two from 512 to 65536 bytes";
        return Err(BdevError::invalid("block_size", block_size, reason));
    }
    if num_blocks == 0 {
        return Err(BdevError::invalid("num_blocks", num_blocks, "a bdev has at least one block"));
    }
    if num_blocks.checked_mul(block_size.into()).is_none_or(|bytes| bytes > i64::MAX as u64) {
        return Err(BdevError::invalid("num_blocks", num_blocks, "the bdev would be larger than 2^63 - 1 bytes"));
    }
    Ok(())
}

/// Refuses physical block sizes that make no sense; 0 means none was given.
pub(super) fn check_physical(block_size: u32, physical: u32) -> Result<(), BdevError> {
    if physical != 0 && (!physical.is_power_of_two() || physical < block_size) {
        let reason = format!("a physical block is a power of two of at least block_size ({block_size}) bytes");
        return Err(BdevError::invalid("physical_block_size", physical, reason));
    }
    Ok(())
}

/// The device behind `info` as the type that a module made.
pub(super) fn device_as<T: Bdev + 'static>(info: &Arc<BdevInfo>, product: &str) -> Result<Arc<T>, BdevError> {
    let device: Arc<dyn Any + Send + Sync> = Arc::clone(info.device()) as _;
    device.downcast::<T>().map_err(|_| BdevError::wrong_kind(info, product))
}

/// The parameter `name`.
pub(super) fn take_name(params: &Params) -> Result<&str, RpcError> {
    params.str("name")
}

/// The parameter `uuid`, if given.
pub(super) fn take_uuid(params: &Params) -> Result<Option<Uuid>, RpcError> {
    let Some(text) = params.opt_str("uuid") else { return Ok(None) };
    let uuid = Uuid::parse_str(text).map_err(|error| params.invalid("uuid", error.to_string()))?;
    if uuid.is_nil() {
        let error = RpcError::errno(Errno::INVAL, "the nil UUID names nothing");
        return Err(params.blame("uuid", error.fix("leave it out, and one is drawn at random")));
    }
    Ok(Some(uuid))
}

/// Refuses metadata and protection information, which no device here keeps.
pub(super) fn refuse_metadata(params: &Params) -> Result<(), RpcError> {
    for field in ["md_size", "md_interleave", "dif_type", "dif_is_head_of_md", "dif_pi_format"] {
        let is_off = match params.get(field) {
            None => true,
            Some(value) => value == &json!(0) || value == &json!(false),
        };
        if !is_off {
            let error = RpcError::errno(Errno::INVAL, "blocks with metadata or protection information are not kept");
            return Err(params.blame(field, error.fix("leave it out")));
        }
    }
    Ok(())
}

/// Deletes a device of one kind of module.
pub(super) async fn rpc_delete(system: Arc<BdevSystem>, params: Params, product: &str) -> Result<Value, RpcError> {
    let name = params.str("name")?;
    let info = system.get(name)?;
    if info.device().product_name() != product {
        return Err(BdevError::wrong_kind(&info, product).into());
    }
    system.remove(info.name()).await?;
    Ok(json!(true))
}
