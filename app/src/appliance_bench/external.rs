//! Out of process against in process, and against NBD to a qemu-nbd on the same machine.
//!
//! All of them answer reads of one block with zeroes, one at a time. The handler's process is this binary, on the core of
//! the workers; it spins, or else sleeps whenever it has nothing to do, as qemu-nbd does. The way through the bdev layer is
//! in its figures. The NBD client is a loop of its own on a Unix socket, without any layer above it, which spins for the
//! answer: what a bdev over NBD could be at best. It runs when no reactor does, so that client and server have a core each.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bdev::modules::appliance as device;
use bdev::modules::appliance::settings::{OnDisconnect, Settings};

use super::{BLOCK, BLOCKS, Options, Report, Rig, percentile, spread};

/// How long a child may take to begin.
const PATIENCE: Duration = Duration::from_secs(10);

/// A child process, and a folder, that end with this value.
struct Helper {
    child: Child,
    folder: PathBuf,
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn folder(name: &str) -> Result<PathBuf, String> {
    let path = std::env::temp_dir().join(format!("ringstone-bench-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}

/// A device whose handler `null` is another process, whose worker looks for more work for `spin_us` before it sleeps.
async fn process(rig: &Rig, name: &str, spin_us: u64) -> Result<Helper, String> {
    let folder = folder(name)?;
    let socket = folder.join("s");
    let mut settings = Settings::new(&format!("unix:{}", socket.display()), BLOCK, BLOCKS);
    settings.on_disconnect = OnDisconnect::Park;
    (settings.cores, settings.spin) = (vec![rig.worker_core], Duration::from_micros(spin_us));
    device::create(&rig.system, name, None, settings).await.map_err(|error| error.to_string())?;
    let binary = std::env::current_exe().map_err(|error| format!("this binary cannot be found again: {error}"))?;
    let child = Command::new(binary)
        .arg("appliance")
        .arg("--socket")
        .arg(&socket)
        .args(["--handler", "null", "--until-gone"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("the handler's process cannot be started: {error}"))?;
    Ok(Helper { child, folder })
}

/// Median time of a read at depth 1, in microseconds.
async fn median(rig: &Rig, name: &str, seconds: f64) -> Result<f64, String> {
    let load = rig.load(name, 1, true).await?;
    load.rate(seconds).await;
    Ok(percentile(&load.stop().await, 50.0))
}

/// In this process and in another; the latter's medians.
pub(super) async fn round_trips(rig: &Rig, options: &Options, report: &mut Report) -> Result<Vec<f64>, String> {
    let (mut inside, mut outside, mut asleep) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.runs {
        rig.appliance("inside", Duration::from_secs(1)).await?;
        inside.push(median(rig, "inside", options.time).await?);
        rig.delete("inside").await?;
        for (medians, spin_us) in [(&mut outside, 1_000_000), (&mut asleep, 0)] {
            let helper = process(rig, "outside", spin_us).await?;
            medians.push(median(rig, "outside", options.time).await?);
            rig.delete("outside").await?;
            drop(helper);
        }
    }
    report.add("null handler, round trip, in this process", "us (p50)", &mut inside, "");
    report.add("null handler, round trip, in another process", "us (p50)", &mut outside, "");
    report.add("  which sleeps between requests", "us (p50)", &mut asleep, "");
    Ok(outside)
}

/// NBD, beside what another process took.
pub(super) fn nbd(mut outside: Vec<f64>, options: &Options, report: &mut Report) -> Result<(), String> {
    let Some(nbd) = start_nbd()? else {
        eprintln!("qemu-nbd is not installed (Debian: qemu-utils): no comparison with NBD");
        return Ok(());
    };
    let mut round_trips = Vec::new();
    for _ in 0..options.runs {
        round_trips.push(nbd_median(&nbd.folder.join("s"), options.time)?);
    }
    report.add("qemu-nbd, round trip on a Unix socket", "us (p50)", &mut round_trips, "");
    let ([_, outside, _], [_, nbd, _]) = (spread(&mut outside), spread(&mut round_trips));
    report.add("  times that of another process", "", &mut [nbd / outside], "(at least 1.5)");
    Ok(())
}

/// A qemu-nbd that reads as zeroes; `None` when there is none on this machine.
fn start_nbd() -> Result<Option<Helper>, String> {
    let folder = folder("nbd")?;
    let bytes = u64::from(BLOCK) * BLOCKS;
    let started = Command::new("qemu-nbd")
        .arg("--image-opts")
        .arg(format!("driver=null-co,size={bytes},read-zeroes=on"))
        .arg("--persistent")
        .arg("--socket")
        .arg(folder.join("s"))
        .stdin(Stdio::null())
        .spawn();
    match started {
        Ok(child) => Ok(Some(Helper { child, folder })),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let _ = std::fs::remove_dir_all(&folder);
            Ok(None)
        }
        Err(error) => Err(format!("qemu-nbd cannot be started: {error}")),
    }
}

const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// Connects and chooses the default export.
fn nbd_connect(path: &Path) -> Result<UnixStream, String> {
    let began = std::time::Instant::now();
    let mut stream = loop {
        match UnixStream::connect(path) {
            Ok(stream) => break stream,
            Err(error) if began.elapsed() > PATIENCE => return Err(format!("qemu-nbd does not listen: {error}")),
            Err(_) => std::thread::yield_now(),
        }
    };
    let failed = |error: std::io::Error| format!("talking to qemu-nbd: {error}");
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).map_err(failed)?;
    if greeting[8..16] != OPTION_MAGIC.to_be_bytes() {
        return Err("qemu-nbd speaks another protocol".into());
    }
    // Fixed new style, no zeroes; then the option that names the default export.
    let mut hello = Vec::from(3u32.to_be_bytes());
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(1u32.to_be_bytes());
    hello.extend(0u32.to_be_bytes());
    stream.write_all(&hello).map_err(failed)?;
    let mut export = [0; 10];
    stream.read_exact(&mut export).map_err(failed)?;
    stream.set_nonblocking(true).map_err(failed)?;
    Ok(stream)
}

/// Reads one block at a time for `seconds`; the median in microseconds.
fn nbd_median(path: &Path, seconds: f64) -> Result<f64, String> {
    let mut stream = nbd_connect(path)?;
    let mut reply = vec![0; 16 + BLOCK as usize];
    let (mut latencies, mut next) = (Vec::new(), 1u64);
    let began = std::time::Instant::now();
    while began.elapsed().as_secs_f64() < seconds {
        next = next.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let mut request = [0; 28];
        request[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        request[8..16].copy_from_slice(&next.to_be_bytes());
        request[16..24].copy_from_slice(&((next >> 33) % BLOCKS * u64::from(BLOCK)).to_be_bytes());
        request[24..].copy_from_slice(&BLOCK.to_be_bytes());
        let start = std::time::Instant::now();
        stream.write_all(&request).map_err(|error| format!("asking qemu-nbd: {error}"))?;
        let mut got = 0;
        while got < reply.len() {
            match stream.read(&mut reply[got..]) {
                Ok(0) => return Err("qemu-nbd closed the connection".into()),
                Ok(n) => got += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
                Err(error) => return Err(format!("waiting for qemu-nbd: {error}")),
            }
        }
        latencies.push(u32::try_from(start.elapsed().as_nanos()).unwrap_or(u32::MAX));
        let right =
            reply[..4] == REPLY_MAGIC.to_be_bytes() && reply[4..8] == [0; 4] && reply[8..16] == next.to_be_bytes();
        if !right {
            return Err("qemu-nbd answered with an error".into());
        }
    }
    latencies.sort_unstable();
    Ok(percentile(&latencies, 50.0))
}
