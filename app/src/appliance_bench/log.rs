//! The handler `log`, against the bare bdev below it: over memory and over a file, small and large, reads and writes, of data that
//! compresses to a quarter and of data that does not; and while its collector works.
//!
//! Both are filled before anything is measured, and measured in slices that take turns. Over memory the ratio is what the
//! store costs on its one thread, a copy, a checksum and LZ4; over a file it is what somebody gets who puts a store there.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use bdev::core::Op;
use bdev::modules::appliance as device;
use bdev::modules::appliance::settings::Settings;
use bdev::modules::{malloc, uring};
use reactor::file::EngineChoice;
use reactor::reactor::PollPolicy;
use serde_json::json;

use super::{BLOCK, Options, Report, Rig, SLICES, Shape};

/// Blocks of the store and of what it is compared with.
const SPAN: u64 = (192 << 20) / BLOCK as u64;
/// Bytes below the store.
const BASE_BYTES: u64 = 384 << 20;
/// Bytes below the store that is nearly full.
const TIGHT_BYTES: u64 = 192 << 20;
/// Bytes of a block that cannot be compressed, of data that can.
const QUARTER: usize = BLOCK as usize / 4;

/// Files that go with this value.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Measures it.
pub(super) async fn measure(options: &Options, report: &mut Report) -> Result<(), String> {
    let parent = options.folder.clone().unwrap_or_else(std::env::temp_dir);
    let folder = Folder(parent.join(format!("ringstone-bench-{}-log", std::process::id())));
    std::fs::create_dir_all(&folder.0).map_err(|error| format!("{}: {error}", folder.0.display()))?;
    for file in [None, Some(&*folder.0)] {
        let rig = Rig::start(PollPolicy::Busy, EngineChoice::Auto)?;
        compare(&rig, file, options, report).await?;
        collect(&rig, file, options, report).await?;
        rig.stop().await?;
    }
    Ok(())
}

async fn base(rig: &Rig, name: &str, bytes: u64, folder: Option<&Path>) -> Result<(), String> {
    let system = &rig.system;
    let Some(folder) = folder else {
        let options = malloc::MallocOptions::new(BLOCK, bytes / u64::from(BLOCK));
        return malloc::create(system, name, None, options).await.map(drop).map_err(|error| error.to_string());
    };
    let path = folder.join(name);
    std::fs::File::create(&path)
        .and_then(|file| file.set_len(bytes))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    let options = uring::FileOptions {
        flavor: uring::Flavor::Uring,
        path,
        block_size: Some(BLOCK),
        read_only: false,
        fallocate: None,
    };
    uring::create(system, name, None, options).await.map(drop).map_err(|error| error.to_string())
}

async fn store(rig: &Rig, base: &str, blocks: u64) -> Result<(), String> {
    let mut settings = Settings::new("log", BLOCK, blocks);
    (settings.cores, settings.spin) = (vec![rig.worker_core], Duration::from_micros(200));
    settings.options = json!({ "base_bdev": base });
    device::create(&rig.system, "log", None, settings).await.map(drop).map_err(|error| error.to_string())
}

async fn delete(rig: &Rig, base: &str, folder: Option<&Path>) -> Result<(), String> {
    device::delete(&rig.system, "log").await.map_err(|error| error.to_string())?;
    rig.delete(base).await?;
    remove(folder, base)
}

fn remove(folder: Option<&Path>, name: &str) -> Result<(), String> {
    match folder {
        Some(folder) => std::fs::remove_file(folder.join(name)).map_err(|error| error.to_string()),
        None => Ok(()),
    }
}

/// Writes the first `span` blocks of a device once.
async fn fill(rig: &Rig, name: &str, span: u64, random_bytes: usize) -> Result<(), String> {
    let op = Op::Write { fua: false };
    let shape = Shape { op, blocks: 32, depth: 8, span, once: true, random_bytes, ..Shape::default() };
    let load = rig.start_load(name, shape).await?;
    load.ended().await;
    if load.shared.failed.load(Ordering::Relaxed) { Err(format!("'{name}' cannot be filled")) } else { Ok(()) }
}

async fn compare(rig: &Rig, folder: Option<&Path>, options: &Options, report: &mut Report) -> Result<(), String> {
    let below = if folder.is_some() { "a file" } else { "memory" };
    base(rig, "bare", SPAN * u64::from(BLOCK), folder).await?;
    base(rig, "base", BASE_BYTES, folder).await?;
    store(rig, "base", SPAN).await?;
    for (data, random_bytes) in [("to a quarter", QUARTER), ("not at all", BLOCK as usize)] {
        fill(rig, "bare", SPAN, random_bytes).await?;
        fill(rig, "log", SPAN, random_bytes).await?;
        for (what, op) in [("write", Op::Write { fua: false }), ("read", Op::Read)] {
            for (size, blocks, depth) in [("4 KiB", 1, 32), ("128 KiB", 32, 8)] {
                let shape = Shape { op, blocks, depth, span: SPAN, random_bytes, ..Shape::default() };
                let (mut bare, mut logs, mut part) = (Vec::new(), Vec::new(), Vec::new());
                for _ in 0..options.runs {
                    let mut sums = [0.0; 2];
                    for slice in 0..SLICES {
                        for turn in 0..2 {
                            let which = (slice + turn) % 2;
                            let load = rig.start_load(["bare", "log"][which], shape).await?;
                            sums[which] += load.rate(options.time / SLICES as f64).await / SLICES as f64;
                            let failed = load.shared.failed.load(Ordering::Relaxed);
                            load.stop().await;
                            if failed {
                                return Err(format!("{what} of {size} failed"));
                            }
                        }
                    }
                    let mib = |rate: f64| rate * shape.bytes() as f64 / f64::from(1 << 20);
                    bare.push(mib(sums[0]));
                    logs.push(mib(sums[1]));
                    part.push(sums[1] / sums[0]);
                }
                let name = format!("{what} {size}, depth {depth}, compresses {data}, on {below}");
                report.add(&format!("bare: {name}"), "MiB/s", &mut bare, "");
                report.add(&format!("log:  {name}"), "MiB/s", &mut logs, "");
                report.add("  part of the bare bdev's", "", &mut part, "");
            }
        }
    }
    delete(rig, "base", folder).await?;
    rig.delete("bare").await?;
    remove(folder, "bare")
}

/// A store that is full to 80 %, with its collector at work.
async fn collect(rig: &Rig, folder: Option<&Path>, options: &Options, report: &mut Report) -> Result<(), String> {
    let below = if folder.is_some() { "a file" } else { "memory" };
    base(rig, "base", TIGHT_BYTES, folder).await?;
    store(rig, "base", TIGHT_BYTES / u64::from(BLOCK)).await?;
    let number = |name: &str| -> Result<f64, String> {
        let stats = device::stats(&rig.system, "log").map_err(|error| error.to_string())?;
        stats["backend"]["handler"][name].as_f64().ok_or_else(|| format!("the store does not show {name}"))
    };
    // What may be stored falls with what is: the first guess is near enough.
    fill(rig, "log", 1024, BLOCK as usize).await?;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let span = (number("room_bytes")? * 0.8 / f64::from(BLOCK + 32)) as u64 / 32 * 32;
    fill(rig, "log", span, BLOCK as usize).await?;
    let shape =
        Shape { op: Op::Write { fua: false }, depth: 32, span, random_bytes: BLOCK as usize, ..Shape::default() };
    let load = rig.start_load("log", shape).await?;
    let began = number("log_bytes")?;
    while number("log_bytes")? - began < 2.0 * TIGHT_BYTES as f64 {
        load.rate(0.05).await;
    }
    let (mut rates, mut times, mut full) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.runs {
        let before = (number("log_bytes")?, number("checkpoint_bytes")?, number("written_bytes")?);
        rates.push(load.rate(options.time.max(0.5)).await * f64::from(BLOCK) / f64::from(1 << 20));
        let written = number("written_bytes")? - before.2;
        times.push((number("log_bytes")? - before.0 + number("checkpoint_bytes")? - before.1) / written.max(1.0));
        full.push(100.0 * number("stored_bytes")? / number("room_bytes")?);
    }
    let failed = load.shared.failed.load(Ordering::Relaxed);
    load.stop().await;
    if failed {
        return Err("a write to a store that is not full failed".into());
    }
    let name = format!("log:  write 4 KiB, depth 32, compresses not at all, collecting, on {below}");
    report.add(&name, "MiB/s", &mut rates, "");
    report.add("  bytes written below for each byte", "", &mut times, "");
    report.add("  stored of what may be stored", "%", &mut full, "");
    delete(rig, "base", folder).await
}
