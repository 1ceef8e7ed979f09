//! What the load generators show while they run, and an interrupt in each of their phases.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use rustix::pty;
use serde_json::{Value, json};

use crate::common::{Scratch, ringstone};
use crate::stage::{NQN, signal, tool_at};

/// `bdevperf` on `N`, which is large and keeps nothing, or on `D`, whose reads take long.
fn bdevperf(scratch: &Scratch, args: &[&str]) -> Command {
    let bdevs = json!([
        {"method": "bdev_null_create", "params": {"name": "N", "num_blocks": 1u64 << 40, "block_size": 512}},
        {"method": "bdev_malloc_create", "params": {"name": "M", "num_blocks": 8192, "block_size": 512}},
        {"method": "bdev_delay_create", "params": {
            "name": "D", "base_bdev_name": "M", "avg_read_latency": 300_000, "p99_read_latency": 300_000,
            "avg_write_latency": 0, "p99_write_latency": 0
        }},
    ]);
    let config =
        scratch.write("config.json", json!({"subsystems": [{"subsystem": "bdev", "config": bdevs}]}).to_string());
    let mut command = ringstone();
    command.arg("bdevperf").arg("--config").arg(config).args(args).stdout(Stdio::piped());
    command
}

/// Interrupts a tool once it says that it does `word`; how it ended, its report, and what it said from then on.
#[track_caller]
fn interrupted_while(mut command: Command, word: &str) -> (Option<i32>, Value, String) {
    let mut child =
        command.args(["--json", "--progress"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.starts_with(word) {
        line.clear();
        assert_ne!(said.read_line(&mut line).unwrap(), 0, "it ended before it was {word}");
        assert!(line.contains(" IOPS ") && line.ends_with(" errors\n"), "no line of progress: {line}");
    }
    signal(&child, Signal::INT);
    let mut rest = String::new();
    said.read_to_string(&mut rest).unwrap();
    let output = child.wait_with_output().unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {rest}"));
    (output.status.code(), report, rest)
}

#[test]
fn an_interrupt_ends_every_phase_with_a_report() {
    let scratch = Scratch::new();
    let endless = ["--bdev", "N", "--time", "100000"];
    for (args, word, measured) in [
        (&["--rw", "randread", "--fill", "--bs", "512"][..], "filling", false),
        (&["--rw", "randread", "--warmup", "100000"], "warming up", false),
        (&["--rw", "randread", "--warmup", "0"], "measuring", true),
        (&["--rw", "randrw", "--warmup", "0", "--verify", "--size", "1m", "--bs", "512"], "measuring", true),
    ] {
        let (code, report, said) = interrupted_while(bdevperf(&scratch, &[&endless, args].concat()), word);
        assert_eq!(report["interrupted"], true, "{word}: {report}");
        assert_eq!(report["iops"].as_f64() > Some(0.0), measured, "{word}: {report}");
        // This device keeps nothing, so a verified run has seen that something is wrong.
        let verified = args.contains(&"--verify");
        assert_eq!(code, Some(i32::from(!measured || verified)), "{word}: {said}");
        assert_eq!(said.contains("interrupted before anything was measured"), !measured, "{word}: {said}");
    }
}

#[test]
fn an_interrupt_ends_the_check_of_what_was_written() {
    let scratch = Scratch::new();
    // 300 reads, one after the other, of 0.3 s each.
    let args = ["--bdev", "D", "--rw", "write", "--count", "300", "--qd", "1", "--verify"];
    let (code, report, said) = interrupted_while(bdevperf(&scratch, &args), "checking");
    assert_eq!((report["commands"].as_u64(), &report["interrupted"]), (Some(300), &json!(true)), "{report}");
    let verify = &report["verify"];
    assert_eq!((&verify["complete"], verify["mismatches"].as_u64()), (&json!(false), Some(0)), "{report}");
    assert!(said.contains("not all read again") && code == Some(0), "{said}");
}

#[test]
fn an_interrupt_ends_the_wait_for_a_target() {
    // Somebody who listens and never says anything.
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let command = tool_at(port, "perf", &["--subnqn", NQN, "--rw", "randread"]);
    let (code, report, said) = interrupted_while(command, "connecting");
    assert_eq!(
        (code, &report["interrupted"], report["commands"].as_u64()),
        (Some(1), &json!(true), Some(0)),
        "{report}"
    );
    assert!(said.contains("interrupted before anything was measured"), "{said}");
}

/// Runs a tool with its standard error on a terminal, and interrupts it when `enough` is shown there; what was shown.
fn on_a_terminal(mut command: Command, enough: Option<&str>) -> String {
    let master = pty::openpt(pty::OpenptFlags::RDWR | pty::OpenptFlags::NOCTTY).unwrap();
    pty::grantpt(&master).unwrap();
    pty::unlockpt(&master).unwrap();
    let path = pty::ptsname(&master, Vec::new()).unwrap();
    let terminal = File::options().read(true).write(true).open(path.to_str().unwrap()).unwrap();
    let child: Child = command.stderr(terminal).spawn().unwrap();
    // This process's end of the terminal's other side goes with the command.
    drop(command);
    let (mut master, mut shown, mut piece) = (File::from(master), String::new(), [0; 1024]);
    let mut enough = enough;
    // It ends with an error when nobody has the terminal open any more.
    while let Ok(n @ 1..) = master.read(&mut piece) {
        shown += &String::from_utf8_lossy(&piece[..n]);
        if enough.take_if(|enough| shown.contains(*enough)).is_some() {
            signal(&child, Signal::INT);
        }
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && !output.stdout.is_empty());
    shown
}

#[test]
fn progress_is_for_people() {
    let scratch = Scratch::new();
    let run =
        |more: &[&str]| bdevperf(&scratch, &[&["--bdev", "N", "--rw", "randread", "--warmup", "0"], more].concat());
    let endless = |more: &[&str]| run(&[&["--time", "100000"], more].concat());
    let shown = on_a_terminal(endless(&[]), Some("\rmeasuring "));
    assert!(shown.ends_with("\r\x1b[K") && !shown.contains('\n'), "{shown:?}");
    on_a_terminal(endless(&["--json", "--progress"]), Some("\rmeasuring "));
    // JSON that a program reads, and no terminal: silence for as long as two lines would have taken.
    let long = ["--time", "1.2"];
    assert_eq!(on_a_terminal(run(&[&long[..], &["--json"]].concat()), None), "");
    assert_eq!(String::from_utf8_lossy(&run(&long).output().unwrap().stderr), "");
}

#[test]
fn a_reader_that_is_gone_does_not_crash_it() {
    let scratch = Scratch::new();
    let mut child = bdevperf(&scratch, &["--bdev", "N", "--rw", "randread", "--count", "100"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(1), ""));
}
