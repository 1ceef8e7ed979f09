//! What the reactors do: `framework_get_reactors` and the `thread_*` methods.
//!
//! SPDK has threads that move between reactors; here each reactor has one
//! thread for ever, and the control plane is none of them. The replies have
//! SPDK's shape, so that spdk_top and scripts read them.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use schema::{Method, RpcError};
use serde_json::{Value, json};

/// Everything that the reactors count, at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RuntimeSnapshot {
    /// Ticks per second, the unit of all times here.
    pub tick_rate: u64,
    /// The process.
    pub pid: u32,
    /// One for each reactor.
    pub reactors: Vec<ReactorSnapshot>,
}

/// One reactor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReactorSnapshot {
    /// The core that it is pinned to.
    pub lcore: u32,
    /// The core's NUMA node; -1 if not known.
    pub numa_id: i32,
    /// The operating system's identifier of its thread.
    pub tid: u64,
    /// Ticks in which it found work.
    pub busy: u64,
    /// Ticks in which it found none, asleep or not.
    pub idle: u64,
    /// Whether it sleeps when idle rather than spin for ever.
    pub in_interrupt: bool,
    /// CPU time in interrupts, in clock ticks of the operating system.
    pub irq: u64,
    /// CPU time of its core in the kernel, in the same unit.
    pub sys: u64,
    /// CPU time of its core in programs, in the same unit.
    pub usr: u64,
    /// What runs on it.
    pub threads: Vec<ThreadSnapshot>,
}

/// One thread of a reactor.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ThreadSnapshot {
    /// Its name.
    pub name: String,
    /// Its number, from 1, unique in the process.
    pub id: u64,
    /// Ticks in which it found work.
    pub busy: u64,
    /// Ticks in which it found none.
    pub idle: u64,
    /// Ticks since it started.
    pub elapsed: u64,
    /// Its pollers.
    pub pollers: Vec<PollerSnapshot>,
    /// The devices and modules it has channels to.
    pub io_channels: Vec<IoChannelSnapshot>,
}

/// When a poller runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PollerSchedule {
    /// Always.
    #[default]
    Active,
    /// Every so many ticks.
    Timed {
        /// The period.
        period_ticks: u64,
    },
    /// Not now.
    Paused,
}

/// One poller.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PollerSnapshot {
    /// Its name.
    pub name: String,
    /// Its number on its thread.
    pub id: u64,
    /// When it runs.
    pub schedule: PollerSchedule,
    /// How often it ran.
    pub run_count: u64,
    /// How often it found work.
    pub busy_count: u64,
}

/// One channel.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct IoChannelSnapshot {
    /// To what.
    pub name: String,
    /// How many use it.
    pub references: u64,
}

/// Where the numbers come from. They must be true ones.
pub trait RuntimeStats: Send + Sync {
    /// Asks all reactors.
    fn snapshot(&self) -> BoxFuture<'_, Result<RuntimeSnapshot, RpcError>>;
}

/// Context of these methods.
pub struct Runtime(pub Arc<dyn RuntimeStats>);

/// These methods, for catalogues without a server.
pub const METHODS: &[Method<Runtime>] = &[
    Method::new(
        "framework_get_reactors",
        "Tell how busy each reactor is and what runs on it.",
        |runtime: Arc<Runtime>, _| Box::pin(async move { Ok(runtime.0.snapshot().await?.reactors()) }),
    )
    .result("object with tick_rate, pid and reactors"),
    Method::new("thread_get_stats", "Tell how busy each thread is.", |runtime: Arc<Runtime>, _| {
        Box::pin(async move { Ok(runtime.0.snapshot().await?.stats()) })
    })
    .result("object with tick_rate and threads"),
    Method::new("thread_get_pollers", "List the pollers of each thread.", |runtime: Arc<Runtime>, _| {
        Box::pin(async move { Ok(runtime.0.snapshot().await?.pollers()) })
    })
    .result("object with tick_rate and threads"),
    Method::new("thread_get_io_channels", "List the channels of each thread.", |runtime: Arc<Runtime>, _| {
        Box::pin(async move { Ok(runtime.0.snapshot().await?.io_channels()) })
    })
    .result("object with tick_rate and threads"),
];

impl RuntimeSnapshot {
    fn reactors(&self) -> Value {
        let thread = |reactor: &ReactorSnapshot, thread: &ThreadSnapshot| {
            json!({
                "name": thread.name,
                "id": thread.id,
                "cpumask": cpumask(reactor.lcore),
                "elapsed": thread.elapsed,
            })
        };
        let reactors: Value = self
            .reactors
            .iter()
            .map(|reactor| {
                let threads = reactor.threads.iter().map(|each| thread(reactor, each));
                json!({
                    "lcore": reactor.lcore,
                    "numa_id": reactor.numa_id,
                    "tid": reactor.tid,
                    "busy": reactor.busy,
                    "idle": reactor.idle,
                    "in_interrupt": reactor.in_interrupt,
                    "irq": reactor.irq,
                    "sys": reactor.sys,
                    "usr": reactor.usr,
                    "lw_threads": threads.collect::<Value>(),
                })
            })
            .collect();
        json!({"tick_rate": self.tick_rate, "pid": self.pid, "reactors": reactors})
    }

    fn stats(&self) -> Value {
        self.threads(|reactor, thread| {
            let (active, timed, paused) = thread.pollers_by_schedule();
            json!({
                "name": thread.name,
                "id": thread.id,
                "cpumask": cpumask(reactor.lcore),
                "busy": thread.busy,
                "idle": thread.idle,
                "active_pollers_count": active.len(),
                "timed_pollers_count": timed.len(),
                "paused_pollers_count": paused.len(),
            })
        })
    }

    fn pollers(&self) -> Value {
        self.threads(|_, thread| {
            let (active, timed, paused) = thread.pollers_by_schedule();
            json!({
                "name": thread.name,
                "id": thread.id,
                "active_pollers": active,
                "timed_pollers": timed,
                "paused_pollers": paused,
            })
        })
    }

    fn io_channels(&self) -> Value {
        self.threads(|_, thread| {
            let channels = thread.io_channels.iter();
            let channels = channels.map(|channel| json!({"name": channel.name, "ref": channel.references}));
            json!({"name": thread.name, "io_channels": channels.collect::<Value>()})
        })
    }

    fn threads(&self, each: impl Fn(&ReactorSnapshot, &ThreadSnapshot) -> Value) -> Value {
        let threads: Value = self
            .reactors
            .iter()
            .flat_map(|reactor| reactor.threads.iter().map(move |thread| (reactor, thread)))
            .map(|(reactor, thread)| each(reactor, thread))
            .collect();
        json!({"tick_rate": self.tick_rate, "threads": threads})
    }
}

impl ThreadSnapshot {
    fn pollers_by_schedule(&self) -> (Vec<Value>, Vec<Value>, Vec<Value>) {
        let (mut active, mut timed, mut paused) = (Vec::new(), Vec::new(), Vec::new());
        for poller in &self.pollers {
            match poller.schedule {
                PollerSchedule::Active => active.push(poller.to_json("waiting")),
                PollerSchedule::Paused => paused.push(poller.to_json("paused")),
                PollerSchedule::Timed { period_ticks } => {
                    let mut json = poller.to_json("waiting");
                    json["period_ticks"] = json!(period_ticks);
                    timed.push(json);
                }
            }
        }
        (active, timed, paused)
    }
}

impl PollerSnapshot {
    fn to_json(&self, state: &str) -> Value {
        json!({
            "name": self.name,
            "id": self.id,
            "state": state,
            "run_count": self.run_count,
            "busy_count": self.busy_count,
        })
    }
}

/// A hexadecimal mask with one bit set: core 0 is "1", core 5 is "20".
fn cpumask(lcore: u32) -> String {
    let zeros = usize::try_from(lcore / 4).unwrap_or(0);
    format!("{:x}{}", 1 << (lcore % 4), "0".repeat(zeros))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks() {
        for (lcore, mask) in [(0, "1"), (1, "2"), (5, "20"), (64, "10000000000000000")] {
            assert_eq!(cpumask(lcore), mask);
        }
    }

    #[test]
    fn shapes() {
        let snapshot = RuntimeSnapshot {
            tick_rate: 1_000_000_000,
            pid: 7,
            reactors: vec![ReactorSnapshot {
                lcore: 3,
                tid: 8,
                busy: 1,
                idle: 2,
                threads: vec![ThreadSnapshot {
                    name: "reactor_3".to_owned(),
                    id: 1,
                    pollers: vec![
                        PollerSnapshot { name: "tcp".to_owned(), run_count: 10, busy_count: 4, ..Default::default() },
                        PollerSnapshot {
                            name: "accept".to_owned(),
                            schedule: PollerSchedule::Timed { period_ticks: 99 },
                            ..Default::default()
                        },
                    ],
                    io_channels: vec![IoChannelSnapshot { name: "bdev_Malloc0".to_owned(), references: 2 }],
                    ..Default::default()
                }],
                ..Default::default()
            }],
        };
        let reactors = snapshot.reactors();
        assert_eq!(reactors["reactors"][0]["lw_threads"][0]["cpumask"], "8");
        assert_eq!(snapshot.stats()["threads"][0]["timed_pollers_count"], 1);
        let pollers = &snapshot.pollers()["threads"][0];
        assert_eq!(pollers["active_pollers"][0]["busy_count"], 4);
        assert_eq!(pollers["timed_pollers"][0]["period_ticks"], 99);
        assert_eq!(pollers["paused_pollers"], json!([]));
        assert_eq!(
            snapshot.io_channels(),
            json!({"tick_rate": 1_000_000_000, "threads": [{
                "name": "reactor_3",
                "io_channels": [{"name": "bdev_Malloc0", "ref": 2}],
            }]})
        );
    }
}
