//! A transport's options: what is allowed, and how they are shown and saved.

use serde_json::{Map, Value, json};

use super::error::ModelError;
use crate::target::view::{TransportKind, TransportOptions};

/// Smallest admin queue that NVMe over Fabrics has (Base 3.3.3.2.1).
const MIN_AQ_DEPTH: u32 = 32;
/// Smallest limit of a transfer, in bytes.
const MIN_IO_SIZE: u32 = 8192;
/// Largest limit of a transfer, in bytes.
const MAX_IO_SIZE: u32 = 16 << 20;
/// What `acceptor_backlog` and others are where they were not given; only shown.
const UNLIMITED_CACHE: u32 = u32::MAX;

/// The options of a transport that was given none.
pub fn defaults(kind: TransportKind) -> TransportOptions {
    let defaults = TransportOptions::default();
    match kind {
        TransportKind::Tcp => defaults,
        TransportKind::Rdma => TransportOptions { in_capsule_data_size: 4096, c2h_success: false, ..defaults },
    }
}

/// Checks what the types do not.
pub(super) fn check(options: &TransportOptions) -> Result<(), ModelError> {
    let at_least = |field, value: u32, min: u32| {
        if value < min {
            return Err(ModelError::invalid(field, value, "too small", format!("give at least {min}")));
        }
        Ok(())
    };
    let at_most = |field, value: u32, max: u32| {
        if value > max {
            return Err(ModelError::invalid(field, value, "too large", format!("give at most {max}")));
        }
        Ok(())
    };
    at_least("max_queue_depth", options.max_queue_depth, 2)?;
    at_most("max_queue_depth", options.max_queue_depth, u16::MAX.into())?;
    at_least("max_aq_depth", options.max_aq_depth, MIN_AQ_DEPTH)?;
    at_most("max_aq_depth", options.max_aq_depth, 4096)?;
    at_least("max_io_qpairs_per_ctrlr", options.max_io_qpairs_per_ctrlr.into(), 1)?;
    at_most("max_io_qpairs_per_ctrlr", options.max_io_qpairs_per_ctrlr.into(), 65534)?;
    at_least("max_io_size", options.max_io_size, MIN_IO_SIZE)?;
    at_most("max_io_size", options.max_io_size, MAX_IO_SIZE)?;
    if !options.max_io_size.is_power_of_two() {
        let down = 1 << options.max_io_size.ilog2();
        return Err(ModelError::invalid(
            "max_io_size",
            options.max_io_size,
            "not a power of two, which MDTS can only say",
            format!("give {down} or {}", (down << 1).min(MAX_IO_SIZE)),
        ));
    }
    if !options.in_capsule_data_size.is_multiple_of(16) {
        let (size, reason) = (options.in_capsule_data_size, "not a multiple of 16 bytes, the unit of IOCCSZ");
        return Err(ModelError::invalid("in_capsule_data_size", size, reason, format!("give {}", size / 16 * 16)));
    }
    if options.in_capsule_data_size > options.max_io_size {
        return Err(ModelError::invalid(
            "in_capsule_data_size",
            options.in_capsule_data_size,
            format!("larger than max_io_size ({})", options.max_io_size),
            "make it smaller, or max_io_size larger",
        ));
    }
    at_least("kas", options.kas.into(), 1)
}

/// The object that `nvmf_get_transports` shows and `nvmf_create_transport` takes.
pub fn to_json(kind: TransportKind, options: &TransportOptions) -> Value {
    let mut all = Map::new();
    let mut put = |name: &str, value: Value| all.insert(name.to_owned(), value);
    put("trtype", json!(kind.name()));
    put("max_queue_depth", json!(options.max_queue_depth));
    put("max_io_qpairs_per_ctrlr", json!(options.max_io_qpairs_per_ctrlr));
    put("in_capsule_data_size", json!(options.in_capsule_data_size));
    put("max_io_size", json!(options.max_io_size));
    put("max_aq_depth", json!(options.max_aq_depth));
    put("iobuf_small_cache_size", json!(UNLIMITED_CACHE));
    put("iobuf_large_cache_size", json!(UNLIMITED_CACHE));
    put("dif_insert_or_strip", json!(false));
    put("zcopy", json!(false));
    match kind {
        TransportKind::Tcp => {
            put("c2h_success", json!(options.c2h_success));
            put("sock_priority", json!(0));
        }
        TransportKind::Rdma => {
            put("max_srq_depth", json!(4096));
            put("no_srq", json!(false));
            put("num_cqe", json!(4096));
            put("acceptor_backlog", json!(100));
            put("no_wr_batching", json!(false));
        }
    }
    put("abort_timeout_sec", json!(options.abort_timeout_sec));
    put("ack_timeout", json!(0));
    put("data_wr_pool_size", json!(0));
    put("disable_command_passthru", json!(false));
    put("kas", json!(options.kas));
    put("min_kato", json!(options.min_kato_ms));
    for (name, value) in &options.extra {
        all.insert(name.clone(), value.clone());
    }
    Value::Object(all)
}
