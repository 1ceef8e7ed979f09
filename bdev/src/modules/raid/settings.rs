//! `bdev_raid_set_options`: how fast what a leg lacks is copied.

use std::sync::atomic::{AtomicU64, Ordering};

/// For all arrays; in force from the next window on.
#[derive(Debug)]
pub struct Settings {
    window_kb: AtomicU64,
    bandwidth_mb: AtomicU64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { window_kb: AtomicU64::new(1024), bandwidth_mb: AtomicU64::new(0) }
    }
}

impl Settings {
    /// KiB in a window.
    pub fn window_kb(&self) -> u64 {
        self.window_kb.load(Ordering::Relaxed)
    }

    /// MiB a second, 0 for as many as there are.
    pub fn bandwidth_mb(&self) -> u64 {
        self.bandwidth_mb.load(Ordering::Relaxed)
    }

    /// Changes them.
    pub fn set(&self, window_kb: u64, bandwidth_mb: u64) {
        self.window_kb.store(window_kb, Ordering::Relaxed);
        self.bandwidth_mb.store(bandwidth_mb, Ordering::Relaxed);
    }

    /// Whether they are as they were.
    pub fn is_default(&self) -> bool {
        (self.window_kb(), self.bandwidth_mb()) == (1024, 0)
    }

    /// Blocks in a window.
    pub fn window_blocks(&self, block_size: u32) -> u64 {
        (self.window_kb() << 10).div_ceil(block_size.into()).max(1)
    }

    /// Bytes a second, 0 for as many as there are.
    pub fn bytes_per_second(&self) -> u64 {
        self.bandwidth_mb() << 20
    }
}
