//! Memory that a server may take is bounded by its configuration, however many hosts there are and whatever they ask for.

use std::fs;
use std::process::{Child, Stdio};

use nvmf::target::memory::{UNREAD_BYTES, connection_bytes, controller_bytes};
use nvmf::target::view::TransportOptions;
use reactor::buffer::PoolConfig;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use serde_json::json;

use crate::common::wait_for;
use crate::stage::{NQN, Stage, parsed, signal, stderr};

const HOSTS: usize = 8;
const QUEUES: usize = 125;
const DEPTH: usize = 16;
/// What a server without hosts may take beside its reactors: the program, the control plane, two devices in memory of 10 MiB.
const BASE_BYTES: usize = 48 << 20;
/// What a reactor may take beside its payload memory: its I/Os, its rings, its scratch area.
const REACTOR_BYTES: usize = 16 << 20;

/// The most memory that the server has had, bytes.
fn peak(stage: &Stage) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", stage.server.pid())).expect("the server runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux tells it");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") << 10
}

/// What all poll groups say together.
fn total(stage: &Stage, key: &str) -> u64 {
    let stats = stage.server.call("nvmf_get_stats", json!({}));
    let groups = stats["poll_groups"].as_array().expect("an array").iter();
    groups.map(|group| group[key].as_u64().expect("a number")).sum()
}

fn host(stage: &Stage) -> Child {
    let (queues, depth) = (QUEUES.to_string(), DEPTH.to_string());
    // More commands than there is payload memory for.
    let args = ["--subnqn", NQN, "--nsid", "2", "--rw", "randrw", "--bs", "4096", "--qd", &depth, "--queues", &queues];
    let mut tool = stage.tool("perf", &[&args[..], &["--time", "100000", "--warmup", "0", "--json"]].concat());
    tool.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs")
}

#[test]
fn a_thousand_connections_stay_within_the_sum() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).expect("up to the maximum anybody may");
    let stage = Stage::start_with(&["--cores", &first_core()]);
    let hosts: Vec<Child> = (0..HOSTS).map(|_| host(&stage)).collect();
    wait_for("all queues are there", || (total(&stage, "current_io_qpairs") == (HOSTS * QUEUES) as u64).then_some(()));
    let before = total(&stage, "completed_nvme_io");
    wait_for("work is done", || (total(&stage, "completed_nvme_io") > before + 40_000).then_some(()));
    let options = TransportOptions::default();
    let connections = HOSTS * (QUEUES + 1);
    let sum = BASE_BYTES
        + REACTOR_BYTES
        + PoolConfig::default().bytes()
        + connections * connection_bytes(&options)
        + HOSTS * controller_bytes(&options);
    // Unread input comes on top of that where commands wait for memory: here no more than a queue of writes, each with its capsule.
    let waiting = connections * UNREAD_BYTES.min(DEPTH * (4096 + 72));
    let peak = peak(&stage);
    eprintln!("{} MiB of {} MiB, and {} MiB for unread input", peak >> 20, sum >> 20, waiting >> 20);
    assert!(peak <= sum + waiting, "{peak} bytes, more than {sum} and {waiting}");
    for child in hosts {
        signal(&child, Signal::INT);
        let output = child.wait_with_output().expect("it ends");
        assert_eq!(parsed(&output)["errors"], 0, "{}", stderr(&output));
    }
    wait_for("all have gone", || (total(&stage, "current_io_qpairs") == 0).then_some(()));
}

fn first_core() -> String {
    let allowed = rustix::thread::sched_getaffinity(None).expect("there are cores");
    let core = (0..rustix::thread::CpuSet::MAX_CPU).find(|core| allowed.is_set(*core));
    core.expect("there is a core").to_string()
}
