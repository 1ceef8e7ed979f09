//! Asks running reactors for what [`runtime`](crate::runtime) tells.

use std::fmt;
use std::fs;
use std::sync::Arc;

use futures_util::future::{BoxFuture, join_all};
use reactor::reactor::{PollPolicy, PollerStats, ReactorStats};
use reactor::time::TICK_RATE;
use reactor::{Context, ReactorHandle, Schedule};
use schema::RpcError;

use crate::runtime::{
    IoChannelSnapshot, PollerSchedule, PollerSnapshot, ReactorSnapshot, RuntimeSnapshot, RuntimeStats, ThreadSnapshot,
};

/// Lists what has channels on a reactor. Runs on that reactor.
pub type ListChannels = Arc<dyn Fn(&mut Context) -> Vec<IoChannelSnapshot> + Send + Sync>;

/// Reactors as a source of statistics. Each is asked by a message, so the
/// numbers are its own; one that sleeps wakes for it.
pub struct Reactors {
    handles: Vec<ReactorHandle>,
    policy: PollPolicy,
    channels: ListChannels,
    host: bool,
}

impl fmt::Debug for Reactors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactors").field("handles", &self.handles).finish_non_exhaustive()
    }
}

impl Reactors {
    /// These reactors, which all have that policy.
    pub fn new(handles: Vec<ReactorHandle>, policy: PollPolicy, channels: ListChannels) -> Self {
        Self { handles, policy, channels, host: true }
    }

    /// Leaves out what only the host knows, CPU times and NUMA nodes, for
    /// reactors in a simulator.
    pub fn simulated(mut self) -> Self {
        self.host = false;
        self
    }

    async fn ask(&self, handle: &ReactorHandle) -> Result<ReactorSnapshot, RpcError> {
        let channels = Arc::clone(&self.channels);
        let asked = handle.call(move |cx| (cx.stats(), channels(cx)));
        match asked.await {
            Ok((stats, channels)) => Ok(self.snapshot(&stats, channels)),
            Err(gone) => Err(RpcError::internal(gone.to_string())),
        }
    }

    fn snapshot(&self, stats: &ReactorStats, io_channels: Vec<IoChannelSnapshot>) -> ReactorSnapshot {
        let core = stats.core.filter(|_| self.host);
        let cpu = core.and_then(cpu_times).unwrap_or_default();
        let lcore = stats.core.map_or(stats.id.0, |core| u32::try_from(core).unwrap_or(u32::MAX));
        ReactorSnapshot {
            lcore,
            numa_id: core.and_then(numa_node).unwrap_or(-1),
            tid: stats.os_thread_id,
            busy: stats.busy_ns,
            idle: stats.idle_ns,
            in_interrupt: self.policy == PollPolicy::Sleep,
            irq: cpu.irq,
            sys: cpu.sys,
            usr: cpu.usr,
            threads: vec![ThreadSnapshot {
                name: format!("reactor_{lcore}"),
                id: u64::from(stats.id.0) + 1,
                busy: stats.busy_ns,
                idle: stats.idle_ns,
                elapsed: stats.busy_ns.saturating_add(stats.idle_ns),
                pollers: stats.pollers.iter().map(poller).collect(),
                io_channels,
            }],
        }
    }
}

impl RuntimeStats for Reactors {
    fn snapshot(&self) -> BoxFuture<'_, Result<RuntimeSnapshot, RpcError>> {
        Box::pin(async {
            let reactors = join_all(self.handles.iter().map(|handle| self.ask(handle))).await;
            Ok(RuntimeSnapshot {
                tick_rate: TICK_RATE,
                pid: std::process::id(),
                reactors: reactors.into_iter().collect::<Result<_, _>>()?,
            })
        })
    }
}

fn poller(stats: &PollerStats) -> PollerSnapshot {
    PollerSnapshot {
        name: stats.name.clone(),
        id: stats.id.0,
        schedule: match stats.schedule {
            Schedule::Active => PollerSchedule::Active,
            Schedule::Every(period) => PollerSchedule::Timed {
                // A tick is a nanosecond.
                period_ticks: u64::try_from(period.as_nanos()).unwrap_or(u64::MAX),
            },
        },
        run_count: stats.run_count,
        busy_count: stats.busy_count,
    }
}

/// Times of one core since the host started, in its clock ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct CpuTimes {
    usr: u64,
    sys: u64,
    irq: u64,
}

fn cpu_times(core: usize) -> Option<CpuTimes> {
    parse_cpu_times(&fs::read_to_string("/proc/stat").ok()?, core)
}

/// proc(5): `cpuN user nice system idle iowait irq softirq ...`.
fn parse_cpu_times(stat: &str, core: usize) -> Option<CpuTimes> {
    let name = format!("cpu{core}");
    let mut words = stat.lines().map(str::split_ascii_whitespace).find_map(|mut words| {
        let first = words.next()?;
        (first == name).then_some(words)
    })?;
    let mut next = || words.next()?.parse::<u64>().ok();
    let (usr, _nice, sys, _idle, _iowait, irq) = (next()?, next()?, next()?, next()?, next()?, next()?);
    Some(CpuTimes { usr, sys, irq })
}

/// The folder of a core in sysfs holds a link `nodeN`.
fn numa_node(core: usize) -> Option<i32> {
    let folder = fs::read_dir(format!("/sys/devices/system/cpu/cpu{core}")).ok()?;
    folder.flatten().find_map(|entry| entry.file_name().to_str()?.strip_prefix("node")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_times_are_those_of_the_core() {
        let stat =
            "cpu  9 9 9 9 9 9 9\ncpu0 1 2 3 4 5 6 7 0 0 0\ncpu1 10 20 30 40 50 60 70\ncpu11 0 0 0 0 0 0\nintr 5\n";
        assert_eq!(parse_cpu_times(stat, 0), Some(CpuTimes { usr: 1, sys: 3, irq: 6 }));
        assert_eq!(parse_cpu_times(stat, 1), Some(CpuTimes { usr: 10, sys: 30, irq: 60 }));
        assert_eq!(parse_cpu_times(stat, 2), None);
        assert_eq!(parse_cpu_times("cpu0 1 2", 0), None);
    }
}
