//! `bdevperf`.

use std::os::unix::fs::MetadataExt;
use std::process::{Output, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::{Scratch, ringstone, wait_for};
use crate::stage::{parsed, signal, stderr};

fn config(scratch: &Scratch) -> std::path::PathBuf {
    let file = scratch.write("disk.img", vec![0; 0]);
    std::fs::File::options()
        .write(true)
        .open(&file)
        .expect("it was just made")
        .set_len(64 << 20)
        .expect("a sparse file");
    let bdevs = json!([
        {"method": "bdev_malloc_create", "params": {"name": "M", "num_blocks": 8192, "block_size": 512}},
        {"method": "bdev_malloc_create", "params": {"name": "B", "num_blocks": 8192, "block_size": 512}},
        {"method": "bdev_null_create", "params": {"name": "N", "num_blocks": 8192, "block_size": 512}},
        {"method": "bdev_uring_create", "params": {"name": "F", "filename": file, "block_size": 4096}},
        {"method": "bdev_passthru_create", "params": {"name": "P", "base_bdev_name": "B"}},
    ]);
    let document = json!({"subsystems": [
        {"subsystem": "bdev", "config": bdevs},
        {"subsystem": "nvmf", "config": [{"method": "nvmf_create_transport", "params": {"trtype": "TCP"}}]},
    ]});
    scratch.write("config.json", document.to_string())
}

fn run(scratch: &Scratch, args: &[&str]) -> Output {
    let config = config(scratch);
    ringstone().arg("bdevperf").arg("--config").arg(config).args(args).output().expect("the binary runs")
}

#[track_caller]
fn report(scratch: &Scratch, args: &[&str]) -> Value {
    let output = run(scratch, &[args, &["--json"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    parsed(&output)
}

#[test]
fn bdevs_of_all_kinds_take_the_load() {
    let scratch = Scratch::new();
    for bdev in ["M", "P", "F"] {
        let report = report(&scratch, &["--bdev", bdev, "--rw", "randrw", "--count", "2000", "--verify"]);
        assert_eq!((report["commands"].as_u64(), report["errors"].as_u64()), (Some(2000), Some(0)), "{report}");
        assert_eq!((report["verify"]["mismatches"].as_u64(), &report["verify"]["complete"]), (Some(0), &json!(true)));
    }
    let once = report(&scratch, &["--bdev", "N", "--rw", "read", "--time", "0.2", "--warmup", "0"]);
    assert!(once["iops"].as_f64() > Some(0.0), "{once}");
    // Two in turn, filled before.
    let args = ["--bdev", "M", "--bdev", "P", "--fill", "--rw", "randread", "--count", "2000", "--verify"];
    let both = report(&scratch, &args);
    let checked = both["verify"]["checked_blocks"].as_u64().expect("a number");
    assert!(checked >= 2 * 8192 && both["verify"]["mismatches"] == 0, "{both}");
}

#[test]
fn what_is_wrong_is_said() {
    let scratch = Scratch::new();
    let unknown = run(&scratch, &["--bdev", "X", "--rw", "read"]);
    assert!(
        !unknown.status.success() && stderr(&unknown).contains("the configuration makes: "),
        "{}",
        stderr(&unknown)
    );
    // One that another bdev stands on cannot be written.
    let claimed = run(&scratch, &["--bdev", "B", "--rw", "write", "--count", "1"]);
    assert!(!claimed.status.success() && stderr(&claimed).contains("in use by passthru"), "{}", stderr(&claimed));
    let odd = run(&scratch, &["--bdev", "M", "--rw", "write", "--count", "1", "--bs", "1000"]);
    assert!(!odd.status.success() && stderr(&odd).contains("give a multiple of 512"), "{}", stderr(&odd));
    let forgets = run(&scratch, &["--bdev", "N", "--rw", "randwrite", "--count", "500", "--verify", "--json"]);
    assert_eq!(forgets.status.code(), Some(1));
    assert!(parsed(&forgets)["verify"]["mismatches"].as_u64() > Some(0));
    let nothing = ringstone().args(["bdevperf", "--config", "/no/such/file", "--bdev", "M", "--rw", "read"]).output();
    assert!(stderr(&nothing.expect("the binary runs")).contains("/no/such/file"));
}

#[test]
fn an_interrupt_prints_the_result_so_far() {
    let scratch = Scratch::new();
    let config = config(&scratch);
    let args = ["--bdev", "F", "--rw", "randwrite", "--time", "100000", "--warmup", "0", "--json"];
    let child = ringstone().arg("bdevperf").arg("--config").arg(config).args(args).stdout(Stdio::piped()).spawn();
    let child = child.expect("the binary runs");
    let file = scratch.path().join("disk.img");
    // So much that commands have completed.
    wait_for("the load begins", || (std::fs::metadata(&file).expect("it is there").blocks() > 4000).then_some(()));
    signal(&child, Signal::INT);
    let output = child.wait_with_output().expect("it is a child of this process");
    let report = parsed(&output);
    assert_eq!((output.status.code(), &report["interrupted"]), (Some(0), &json!(true)), "{report}");
    assert!(report["commands"].as_u64() > Some(0), "{report}");
}
