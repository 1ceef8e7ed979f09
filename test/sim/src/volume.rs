//! Volumes for scenarios: in memory, or in a file of the simulated disks.

use std::path::PathBuf;
use std::sync::Arc;

use bdev::core::BdevSystem;
use bdev::modules::{malloc, uring};

use crate::Rng;

/// A volume, and how to make it.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Name of its bdev.
    pub name: String,
    /// Whether it is in a file, at [`Volume::path`].
    pub file: bool,
    /// Bytes in a block.
    pub block_size: u32,
    /// Blocks.
    pub blocks: u64,
}

impl Volume {
    /// One of many, the `n`th of its scenario.
    pub fn draw(rng: &mut Rng, n: usize) -> Volume {
        Volume { name: format!("vol{n}"), file: rng.one_in(2), block_size: 4096, blocks: 32 + rng.below(300) }
    }

    /// Where its file is.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/volumes/{}.img", self.name))
    }

    /// Makes its bdev; a file is there already.
    ///
    /// # Panics
    /// If it cannot be made.
    pub async fn create(self, system: Arc<BdevSystem>) {
        let made = if self.file {
            let options = uring::FileOptions {
                flavor: uring::Flavor::Uring,
                path: self.path(),
                block_size: Some(self.block_size),
                read_only: false,
                fallocate: None,
            };
            uring::create(&system, &self.name, None, options).await
        } else {
            let options = malloc::MallocOptions {
                block_size: self.block_size,
                num_blocks: self.blocks,
                physical_block_size: 0,
                optimal_io_boundary: 0,
            };
            malloc::create(&system, &self.name, None, options).await
        };
        made.expect("the volume can be made");
    }
}
