//! Queues that move between reactors under load: real sockets, threads and epoll sets.

use std::process::{Child, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::wait_for;
use crate::perf::two_cores;
use crate::stage::{NQN, Stage, parsed, signal, stderr};

/// A server with two reactors; `None` where there is one core.
fn two_reactors() -> Option<Stage> {
    let Some(cores) = two_cores() else {
        eprintln!("skipped: this machine has one core");
        return None;
    };
    let stage = Stage::start_with(&["--cores", &cores]);
    // What moves is decided here.
    stage.server.call("framework_set_scheduler", json!({"name": "static"}));
    Some(stage)
}

/// A verified load that runs until it is stopped.
fn load(stage: &Stage, args: &[&str]) -> Child {
    let all = ["--subnqn", NQN, "--time", "100000", "--warmup", "0", "--verify", "--json"];
    let mut tool = stage.tool("perf", &[&all, args].concat());
    tool.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs")
}

/// The I/O queues, as controller, queue and poll group.
fn queues(stage: &Stage) -> Vec<(u64, u64, String)> {
    let qpairs = stage.server.call("nvmf_subsystem_get_qpairs", json!({"nqn": NQN}));
    let field = |qpair: &Value, name: &str| qpair[name].as_u64().expect("a number");
    let all = qpairs.as_array().expect("an array").iter();
    all.filter(|qpair| qpair["qid"] != 0)
        .map(|qpair| (field(qpair, "cntlid"), field(qpair, "qid"), qpair["thread"].as_str().unwrap_or("").to_owned()))
        .collect()
}

fn group(number: u32) -> String {
    format!("nvmf_tgt_poll_group_{number:03}")
}

fn moved_in(stage: &Stage) -> Vec<u64> {
    let stats = stage.server.call("nvmf_get_stats", json!({}));
    let groups = stats["poll_groups"].as_array().expect("an array").iter();
    groups.map(|group| group["qpairs_moved_in"].as_u64().expect("a number")).collect()
}

/// Ends a load: what it found.
#[track_caller]
fn found(child: Child) -> Value {
    signal(&child, Signal::INT);
    let output = child.wait_with_output().expect("it ends");
    let report = parsed(&output);
    assert_eq!((&report["errors"], &report["verify"]["mismatches"]), (&json!(0), &json!(0)), "{}", stderr(&output));
    report
}

#[test]
fn queues_move_under_a_verified_load() {
    let Some(stage) = two_reactors() else { return };
    // Small commands by the dozen, and large ones whose data is asked for in pieces, with digests.
    let loads = [
        load(&stage, &["--nsid", "1", "--rw", "randrw", "--bs", "4096", "--qd", "16", "--queues", "4"]),
        load(
            &stage,
            &[
                "--nsid",
                "2",
                "--rw",
                "randrw",
                "--bs",
                "131072",
                "--qd",
                "4",
                "--queues",
                "2",
                "--hdr-digest",
                "--data-digest",
            ],
        ),
    ];
    wait_for("all queues are there", || (queues(&stage).len() == 6).then_some(()));
    let mut moved = 0;
    wait_for("queues have moved", || {
        for (cntlid, qid, at) in queues(&stage) {
            let to = if at == group(0) { group(1) } else { group(0) };
            let params = json!({"nqn": NQN, "cntlid": cntlid, "qid": qid, "thread": to});
            // A machine that is busy enough may not let a queue become quiet in time.
            moved += u32::from(stage.server.client().call("nvmf_subsystem_move_qpair", params).is_ok());
        }
        (moved >= 120).then_some(())
    });
    assert!(moved_in(&stage).iter().all(|count| *count > 0), "{:?}", moved_in(&stage));
    for child in loads {
        let report = found(child);
        assert!(report["verify"]["checked_blocks"].as_u64() > Some(100), "{report}");
    }
    wait_for("the queues are gone", || queues(&stage).is_empty().then_some(()));
}

#[test]
fn a_reactor_that_has_too_much_to_do_gives_a_queue_away() {
    let Some(stage) = two_reactors() else { return };
    let child = load(&stage, &["--nsid", "1", "--rw", "randrw", "--bs", "4096", "--qd", "8", "--queues", "3"]);
    wait_for("all queues are there", || (queues(&stage).len() == 3).then_some(()));
    wait_for("all queues are on one reactor", || {
        for (cntlid, qid, _) in queues(&stage) {
            let params = json!({"nqn": NQN, "cntlid": cntlid, "qid": qid, "thread": group(0)});
            let _ = stage.server.client().call("nvmf_subsystem_move_qpair", params);
        }
        queues(&stage).iter().all(|(_, _, at)| *at == group(0)).then_some(())
    });
    let before = moved_in(&stage)[1];
    // On a machine that others load, too, "too much" is little.
    let options = json!({"name": "dynamic", "period": 50_000, "core_limit": 2, "load_limit": 1});
    stage.server.call("framework_set_scheduler", options);
    wait_for("a queue has moved", || (moved_in(&stage)[1] > before).then_some(()));
    found(child);
}
