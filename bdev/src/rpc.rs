//! The methods of the bdev layer.
//!
//! | room | methods |
//! |---|---|
//! | [`bdevs`] | what there is: `bdev_get_bdevs`, `bdev_examine`, `bdev_wait_for_examine` |
//! | [`iostat`] | what was done: `bdev_get_iostat`, `bdev_reset_iostat` |
//! | [`options`] | sizes of pools: `bdev_set_options`, `iobuf_set_options`, `iobuf_get_stats` |
//!
//! Each module's methods come from its line in [`MODULES`].

pub mod bdevs;
pub mod iostat;
pub mod options;

use std::sync::Arc;

use schema::{ConfigEntry, ConfigSource, Method};
use serde_json::{Value, json};

use crate::core::BdevSystem;
use crate::modules::MODULES;

/// Every method of the layer and its modules.
pub fn methods() -> impl Iterator<Item = &'static Method<BdevSystem>> {
    let generic = [bdevs::METHODS, iostat::METHODS, options::METHODS];
    generic.into_iter().chain(MODULES.iter().map(|module| module.methods)).flatten()
}

/// The part "iobuf" of the configuration: payload memory.
#[derive(Debug)]
pub struct IobufConfig(pub Arc<BdevSystem>);

impl ConfigSource for IobufConfig {
    fn name(&self) -> &'static str {
        "iobuf"
    }

    fn save(&self) -> Vec<ConfigEntry> {
        let options = self.0.options();
        let counts = [("small_pool_count", options.small_pool_count), ("large_pool_count", options.large_pool_count)];
        let given = counts.into_iter().filter_map(|(name, count)| Some((name.to_string(), json!(count?))));
        let params: serde_json::Map<String, Value> = given.collect();
        if params.is_empty() {
            return Vec::new();
        }
        vec![ConfigEntry::new("iobuf_set_options", Value::Object(params))]
    }
}

/// The part "bdev" of the configuration: options, then each device in the order of creation.
#[derive(Debug)]
pub struct BdevConfig(pub Arc<BdevSystem>);

impl ConfigSource for BdevConfig {
    fn name(&self) -> &'static str {
        "bdev"
    }

    fn depends_on(&self) -> &'static [&'static str] {
        &["iobuf"]
    }

    fn save(&self) -> Vec<ConfigEntry> {
        let options = self.0.options();
        let params = json!({
            "bdev_io_pool_size": options.io_pool_size,
            "bdev_io_cache_size": options.io_cache_size,
            "bdev_auto_examine": options.auto_examine,
        });
        let mut entries = vec![ConfigEntry::new("bdev_set_options", params)];
        entries.extend(self.0.base_config());
        for info in self.0.list().iter().filter(|info| !info.is_removing()) {
            entries.extend(info.device().config(info));
        }
        entries.push(ConfigEntry::new("bdev_wait_for_examine", Value::Null));
        entries
    }
}
