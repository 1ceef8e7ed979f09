//! `perf`: what it does, what it counts, and how it ends.

use rustix::process::Signal;
use serde_json::Value;

use crate::common::wait_for;
use crate::stage::{Stage, parsed, signal, stderr, stdout};

#[test]
fn every_kind_of_load_runs_and_is_counted() {
    let stage = Stage::start();
    for (rw, reads, writes) in
        [("read", 1, 0), ("write", 0, 1), ("randread", 1, 0), ("randwrite", 0, 1), ("randrw", 1, 1)]
    {
        let args = ["--rw", rw, "--count", "600", "--qd", "8", "--queues", "2", "--nsid", "1,2"];
        let report = stage.json("perf", &args);
        assert_eq!((report["commands"].as_u64(), report["errors"].as_u64()), (Some(600), Some(0)), "{rw}: {report}");
        let (read, written) = (report["reads"].as_u64(), report["writes"].as_u64());
        assert_eq!((read > Some(0), written > Some(0)), (reads == 1, writes == 1), "{rw}: {report}");
        for key in ["iops", "bytes_per_s", "mean_us", "cpu_s", "seconds"] {
            assert!(report[key].as_f64().is_some_and(|value| value > 0.0), "{rw}: {key} of {report}");
        }
        let percentiles = report["percentiles_us"].as_object().expect("a map");
        assert!(percentiles.contains_key("50") && percentiles.contains_key("99.999"), "{percentiles:?}");
        assert_eq!(report["latency_from"], "submission");
    }
    let text = stdout(&stage.run("perf", &["--rw", "randread", "--time", "0.2", "--warmup", "0"]));
    assert!(text.contains("IOPS") && text.contains("99.999"), "{text}");
}

#[test]
fn digests_and_sizes_of_all_kinds_verify() {
    let stage = Stage::start();
    for args in [
        &["--bs", "512", "--nsid", "1", "--qd", "64"][..],
        &["--bs", "131072", "--nsid", "all", "--qd", "4", "--rw", "write", "--size", "1048576"],
        &["--bs", "8192", "--nsid", "2,1", "--queues", "3", "--hdr-digest", "--data-digest", "--qd", "16"],
    ] {
        let all = [&["--rw", "randrw", "--count", "3000", "--verify"][..], args].concat();
        // The last of a kind counts.
        let all: Vec<&str> = if args.contains(&"write") { all.into_iter().skip(2).collect() } else { all };
        // A volume that keeps nothing is found out, which is another test's.
        let all: Vec<&str> = all.into_iter().map(|arg| if arg == "all" { "1,2" } else { arg }).collect();
        let report = stage.json("perf", &all);
        let verify = &report["verify"];
        assert_eq!((verify["mismatches"].as_u64(), verify["complete"].as_bool()), (Some(0), Some(true)), "{report}");
        assert!(verify["checked_blocks"].as_u64() > Some(100), "{report}");
    }
}

#[test]
fn a_volume_that_forgets_is_found_out() {
    let stage = Stage::start();
    let args = ["--rw", "randwrite", "--count", "500", "--verify", "--nsid", "3", "--json"];
    let output = stage.run("perf", &args);
    let report = parsed(&output);
    assert_eq!(output.status.code(), Some(1));
    assert!(report["verify"]["mismatches"].as_u64() > Some(0), "{report}");
    assert!(stderr(&output).contains("there are zeroes"), "{}", stderr(&output));
}

#[test]
fn at_a_rate_latency_counts_from_when_a_command_was_due() {
    let stage = Stage::start();
    let report = stage.json("perf", &["--rw", "randread", "--rate", "500", "--time", "1", "--warmup", "0"]);
    assert_eq!(report["latency_from"], "schedule");
    // However slow the machine: no more than were due.
    let due = 500.0 * report["seconds"].as_f64().expect("a number") + 1.0;
    let commands = report["commands"].as_f64().expect("a number");
    assert!(commands > 0.0 && commands <= due, "{report}");
    assert!(report["late"].is_u64(), "{report}");
}

#[test]
fn options_that_make_no_sense_say_what_would() {
    let stage = Stage::start();
    for (args, says) in [
        (&["--rw", "randread", "--verify"][..], "use it with --rw write"),
        (&["--rw", "randread", "--bs", "700"], "give a multiple of 512"),
        (&["--rw", "randread", "--bs", "16777216"], "give a smaller one"),
        (&["--rw", "randread", "--nsid", "7"], "give one of these: 1, 2, 3"),
        (&["--rw", "randread", "--rate=0"], "--rate"),
        (&["--rw", "write", "--bs", "131072", "--nsid", "1", "--verify"], "lower --qd or --queues"),
        (&["--rw", "read", "--size", "100"], "less than one command"),
        (&["--rw", "read", "--bs", "4q"], "write for example 4096, 4k"),
        (&["--rw", "read", "--bs", "17m"], "512 to 16m bytes"),
        (&["--rw", "read", "--core", "a"], "write for example 0,2-3"),
        (&["--rw", "read", "--core", "1023"], "--core: core 1023 is not one that this process may use"),
        (&["--rw", "reed"], "randread"),
        (&["--rw", "read", "--qd", "5000"], "1..=4096"),
        (&["--rw", "read", "--time", "-1"], "--time"),
        (&["--rw", "read", "--time", "0"], "--time: give seconds"),
        (&["--rw", "read", "--time", "nan"], "--time: give seconds"),
        (&["--rw", "read", "--warmup", "1e300"], "--warmup: give seconds"),
        (&["--rw", "read", "--io-timeout", "0"], "--io-timeout: give seconds"),
        (&["--rw", "read", "--nsid", "1,2,1"], "namespace 1 is named twice"),
        (&["--rw", "read", "--nsid", "0"], "1,3 or all"),
        (&["--rw", "read", "--rwmixread", "70"], "--rw randrw"),
        (&["--rw", "read", "--count", "0"], "1.."),
        (&["--rw", "read", "--queues", "0"], "1..=256"),
        (&["--rw", "read", "--qd", "0"], "1..=4096"),
        (&["--rw", "read", "--bs", "0"], "512 to 16m bytes"),
    ] {
        let output = stage.run("perf", args);
        let said = stderr(&output);
        assert!(!output.status.success() && said.contains(says), "{args:?}: {said}");
    }
}

/// Two cores that this process may use, as a list; `None` if there is one.
pub fn two_cores() -> Option<String> {
    let allowed = rustix::thread::sched_getaffinity(None).expect("there are cores");
    let mut cores = (0..rustix::thread::CpuSet::MAX_CPU).filter(|core| allowed.is_set(*core));
    Some(format!("{},{}", cores.next()?, cores.next()?))
}

#[test]
fn queues_are_dealt_to_the_cores() {
    let stage = Stage::start();
    let Some(cores) = two_cores() else {
        eprintln!("skipped: this machine has one core");
        return;
    };
    for (args, queues) in [
        (&["--rw", "randrw"][..], 2),
        (&["--rw", "write", "--queues", "3"], 3),
        (&["--rw", "randwrite", "--queues", "4", "--hdr-digest", "--nsid", "2,1"], 4),
    ] {
        let all = [args, &["--core", &cores, "--count", "2001", "--qd", "8", "--verify"]].concat();
        let report = stage.json("perf", &all);
        assert_eq!((report["commands"].as_u64(), report["errors"].as_u64()), (Some(2001), Some(0)), "{report}");
        let by_queue: Vec<_> =
            report["commands_by_queue"].as_array().expect("a list").iter().filter_map(Value::as_u64).collect();
        assert_eq!((by_queue.len(), by_queue.iter().sum::<u64>()), (queues, 2001), "{report}");
        assert!(by_queue.iter().all(|commands| *commands > 0), "{report}");
        let verify = &report["verify"];
        assert_eq!((verify["mismatches"].as_u64(), &verify["complete"]), (Some(0), &Value::Bool(true)), "{report}");
    }
    let few = stage.run("perf", &["--rw", "read", "--core", &cores, "--queues", "1"]);
    assert!(stderr(&few).contains("give 2 or more"), "{}", stderr(&few));
    // One of several that fails ends all, and an interrupt reaches all.
    let child = stage.endless(&["--core", &cores, "--queues", "4"]);
    signal(&child, Signal::INT);
    let (code, report, said) = end(child);
    assert_eq!(
        (code, &report["interrupted"], report["errors"].as_u64()),
        (Some(0), &Value::Bool(true), Some(0)),
        "{said}"
    );
    let child = stage.endless(&["--core", &cores]);
    stage.server.kill();
    let (code, report, said) = end(child);
    assert_eq!((code, report["failure"].is_string()), (Some(1), true), "{said}");
}

#[test]
fn what_was_filled_is_read_and_checked() {
    let stage = Stage::start();
    let args = ["--rw", "randread", "--fill", "--verify", "--bs", "8k", "--nsid", "1,2", "--count", "500", "--qd", "4"];
    let report = stage.json("perf", &args);
    // Each read was checked, and then every block once more.
    let checked = report["verify"]["checked_blocks"].as_u64().expect("a number");
    assert!(checked >= crate::stage::BLOCKS + 2048 + 500 * 2, "{report}");
    assert_eq!((report["writes"].as_u64(), &report["verify"]["complete"]), (Some(0), &Value::Bool(true)), "{report}");
}

#[track_caller]
fn end(child: std::process::Child) -> (Option<i32>, Value, String) {
    let output = child.wait_with_output().expect("it is a child of this process");
    (output.status.code(), parsed(&output), stderr(&output))
}

#[test]
fn an_interrupt_prints_the_result_so_far() {
    let stage = Stage::start();
    let child = stage.endless(&["--queues", "2"]);
    signal(&child, Signal::INT);
    // As programs that pass signals on do it.
    signal(&child, Signal::INT);
    let (code, report, said) = end(child);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!((report["interrupted"].as_bool(), report["errors"].as_u64()), (Some(true), Some(0)), "{report}");
    assert!(report["commands"].as_u64() > Some(0) && report["iops"].as_f64() > Some(0.0), "{report}");
}

#[test]
fn a_target_that_dies_ends_it_with_the_result_so_far() {
    let stage = Stage::start();
    let child = stage.endless(&[]);
    let Stage { server, .. } = stage;
    server.kill();
    let (code, report, said) = end(child);
    assert_eq!(code, Some(1));
    assert!(report["commands"].as_u64() > Some(0) && report["errors"].as_u64() > Some(0), "{report}");
    assert!(said.contains("see whether the target still runs"), "{said}");
    assert!(report["failure"].is_string(), "{report}");
}

#[test]
fn a_target_that_hangs_ends_it_too() {
    let stage = Stage::start();
    let child = stage.endless(&["--io-timeout", "1"]);
    stage.server.signal(Signal::STOP);
    let (code, report, said) = end(child);
    stage.server.signal(Signal::CONT);
    assert_eq!(code, Some(1));
    assert!(said.contains("does not answer") && report["commands"].as_u64() > Some(0), "{said} {report}");
    // And an interrupt does not wait for one that hangs.
    let child = stage.endless(&[]);
    stage.server.signal(Signal::STOP);
    signal(&child, Signal::INT);
    let (code, report, said) = end(child);
    stage.server.signal(Signal::CONT);
    assert_eq!(report["interrupted"], true, "{code:?} {said}");
    wait_for("the target still serves", || stage.run("identify", &[]).status.success().then_some(()));
}

#[test]
fn a_namespace_that_goes_away_makes_errors_of_one_kind() {
    let stage = Stage::start();
    let child = stage.endless(&["--nsid", "1"]);
    let params = serde_json::json!({"nqn": crate::stage::NQN, "nsid": 1});
    stage.server.call("nvmf_subsystem_remove_ns", params);
    signal(&child, Signal::INT);
    let (_, report, said) = end(child);
    assert!(report["commands"].as_u64() > Some(0), "{report} {said}");
    if report["errors"].as_u64() > Some(0) {
        assert!(report["errors_by_kind"]["Invalid Namespace or Format"].as_u64() > Some(0), "{report}");
    }
}
