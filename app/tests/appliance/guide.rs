//! The guide to handlers, followed to the letter: the commands of docs/appliance.md, in empty folders, and a verified load on
//! what they make. Only folders that belong to somebody else (`/run/user/1000`, `/var/tmp`) are put elsewhere. The guide's own
//! Rust is compiled by the documentation tests of this crate.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::common::guide::{Background, Guide, Terminal, root};
use crate::common::{Scratch, Server, free_port, ringstone, wait_for};

const VOLUME: &str = "nqn.2026-11.io.ringstone:vol0";

const GUIDE: Guide = Guide("docs/appliance.md");

#[track_caller]
fn commands(heading: &str) -> Vec<String> {
    GUIDE.commands(heading)
}

fn serve(scratch: &Scratch) -> (Server, u16) {
    let port = free_port();
    (Server::start(scratch, &["--listen", &format!("127.0.0.1:{port}")]), port)
}

/// The namespace of a bdev.
#[track_caller]
fn nsid(server: &Server, bdev: &str) -> u64 {
    let subsystems = server.call("nvmf_get_subsystems", json!({}));
    let namespaces =
        subsystems.as_array().into_iter().flatten().filter_map(|subsystem| subsystem["namespaces"].as_array());
    let found = namespaces.flatten().find(|namespace| namespace["bdev_name"] == bdev);
    found.and_then(|namespace| namespace["nsid"].as_u64()).expect("the guide has made a namespace")
}

#[track_caller]
fn verified_load(server: &Server, port: u16, bdev: &str) {
    let (port, nsid) = (port.to_string(), nsid(server, bdev).to_string());
    let output = ringstone()
        .args(["perf", "--traddr", "127.0.0.1", "--trsvcid", &port, "--subnqn", VOLUME, "--nsid", &nsid])
        .args(["--rw", "randrw", "--count", "500", "--qd", "8", "--size", "1m", "--verify", "--json"])
        .output()
        .expect("the binary runs");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{bdev}: {said}\n{}", server.log());
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&report["errors"], &report["verify"]["mismatches"]), (&json!(0), &json!(0)), "{bdev}: {said}");
}

#[test]
fn the_guide_in_c_leads_to_a_namespace_in_the_server_and_out_of_it() {
    let scratch = Scratch::new();
    let (server, port) = serve(&scratch);
    let mut terminal = Terminal::new(&scratch);
    let commands_in_c = commands("In C");
    assert_eq!(commands_in_c.len(), 2, "building it, and using it: {commands_in_c:?}");
    terminal.run(&commands_in_c[0]);
    // The first block ends in the new folder.
    terminal.folder.push("my-handler");
    assert!(terminal.folder.join("my.so").exists());
    terminal.run(&commands_in_c[1]);
    verified_load(&server, port, "mine");

    let outside = commands("In a process of its own");
    let (create, process) = (&outside[0], &outside[1]);
    terminal.run(create);
    assert!(process.starts_with("ringstone appliance "), "{process}");
    let child = terminal.shell(&format!("exec {process}")).spawn().expect("there is a shell");
    let child = Background(child);
    verified_load(&server, port, "out");
    drop(child);
    // With `on_disconnect=park`, the process may come back.
    let child = terminal.shell(&format!("exec {process}")).spawn().expect("there is a shell");
    let _child = Background(child);
    verified_load(&server, port, "out");
}

#[test]
fn the_other_commands_of_the_guide_work() {
    let scratch = Scratch::new();
    let (server, _) = serve(&scratch);
    let terminal = Terminal::new(&scratch);
    terminal.run(&commands_before_the_first_section());
    for command in commands("The store `log`") {
        terminal.run(&command);
    }
    let bdevs = server.call("bdev_get_bdevs", json!({"name": "Log0"}));
    assert_eq!(bdevs[0]["driver_specific"]["appliance"]["handler_name"], "log", "{bdevs}");
}

fn commands_before_the_first_section() -> String {
    let text = fs::read_to_string(root().join("docs/appliance.md")).expect("the guide is there");
    let (_, after) = text.split_once("```sh\n").expect("it begins with commands");
    after.split_once("\n```").expect("they end").0.to_string()
}

/// What the guide says of Cargo: the crates are where it says, and called so.
#[test]
fn the_guide_in_rust_names_crates_that_there_are() {
    let commands = commands("In Rust").join("\n");
    let mut found = 0;
    for line in commands.lines().filter(|line| line.contains("package = ")) {
        let quoted: Vec<&str> = line.split('"').skip(1).step_by(2).collect();
        let [package, path] = quoted[..] else { panic!("{line}") };
        let manifest = path.strip_prefix("../ringstone/").expect("beside it");
        let manifest = fs::read_to_string(root().join(manifest).join("Cargo.toml")).expect("the crate is there");
        assert!(manifest.contains(&format!("name = \"{package}\"")), "{line}");
        found += 1;
    }
    assert_eq!(found, 2, "{commands}");
    let example = fs::read_to_string(root().join("app/examples/handler.rs")).expect("the example is there");
    let (_, shown) =
        GUIDE.section("In Rust").into_iter().find(|(kind, _)| kind.starts_with("rust")).expect("its end is shown");
    assert!(example.ends_with(&format!("{shown}\n")), "the example does not end with {shown}");
}

/// The guide in Rust, with Cargo, from an empty folder. Everything that Ringstone needs is built once more.
#[test]
#[ignore = "builds everything once more, so scripts/test runs it apart: cargo test -p ringstone --test appliance guide -- --ignored"]
fn the_guide_in_rust_leads_to_a_namespace_in_the_server_and_out_of_it() {
    let scratch = Scratch::new();
    let mut terminal = Terminal::new(&scratch);
    symlink(root(), terminal.folder.join("ringstone")).expect("a link");
    let in_rust = commands("In Rust");
    let target = scratch.path().join("target");
    // The same versions as here, and nothing from the network.
    let offline = |script: &str| {
        let lock = root().join("Cargo.lock").display().to_string();
        let script = script.replace("cargo build", &format!("cp {lock} .\ncargo build"));
        format!("export CARGO_NET_OFFLINE=true CARGO_TARGET_DIR={}\n{script}", target.display())
    };
    terminal.run(&offline(&in_rust[0]));
    terminal.folder.push("my-appliance");
    let example = GUIDE.section("In a process of its own").into_iter().find(|(kind, _)| kind.starts_with("rust"));
    let (_, example) = example.expect("the guide has a program");
    fs::create_dir(terminal.folder.join("examples")).expect("a new folder");
    fs::write(terminal.folder.join("examples/process.rs"), example).expect("a new file");
    terminal.run(&offline("cargo build --example process"));

    let port = free_port();
    let serve =
        format!("exec cargo run -q -- serve --listen 127.0.0.1:{port} --state-dir {}", scratch.state().display());
    let server = terminal.shell(&offline(&serve)).stdout(Stdio::null()).spawn().expect("there is a shell");
    let _server = Background(server);
    wait_for("the server answers", || scratch.rpc_command(&["spdk_get_version"]).status.success().then_some(()));
    terminal.run(&offline(&in_rust[1]));
    let outside = commands("In a process of its own");
    terminal.run(&outside[0]);
    let process = outside.iter().find(|command| command.contains("--example process")).expect("it is run");
    let child = terminal.shell(&offline(&format!("exec {process}"))).spawn().expect("there is a shell");
    let _child = Background(child);
    for nsid in ["2", "3"] {
        let load = format!(
            "ringstone perf --traddr 127.0.0.1 --trsvcid {port} --subnqn {VOLUME} --nsid {nsid} --rw randrw --count 500 \
             --size 1m --verify"
        );
        terminal.run(&load);
    }
}
