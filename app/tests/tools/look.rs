//! `identify` and `discover`.

use std::io::Write;
use std::net::TcpListener;
use std::process::Stdio;

use serde_json::json;

use crate::common::{Scratch, Server, address, free_port};
use crate::stage::{DISCOVERY, NQN, Stage, parsed, stderr, stdout, tool_at};

#[test]
fn identify_shows_controller_and_namespaces() {
    let stage = Stage::start();
    let shown = stage.json("identify", &[]);
    let controller = &shown["controller"];
    assert_eq!((controller["sn"].as_str(), controller["subnqn"].as_str()), (Some("TOOLS01"), Some(NQN)));
    assert_eq!((controller["cntrltype"].as_u64(), controller["ver"].as_u64()), (Some(1), Some(0x0002_0100)));
    let namespaces = shown["namespaces"].as_array().expect("a list");
    let sizes: Vec<_> =
        namespaces.iter().map(|ns| (ns["nsid"].as_u64(), ns["nsze"].as_u64(), ns["block_size"].as_u64())).collect();
    assert_eq!(
        sizes,
        [(Some(1), Some(4096), Some(512)), (Some(2), Some(2048), Some(4096)), (Some(3), Some(65536), Some(512))]
    );
    let bdev = stage.server.call("bdev_get_bdevs", json!({"name": "M2"}));
    assert_eq!(namespaces[1]["uuid"], bdev[0]["uuid"], "a namespace is called as its bdev is");
    assert_eq!(namespaces[0]["ana_state"], "optimized");

    let output = stage.run("identify", &["--nsid", "3"]);
    let text = stdout(&output);
    assert!(output.status.success() && text.contains("Namespace 3") && !text.contains("Namespace 1"), "{text}");
    assert!(
        text.contains("I/O controller") && text.contains("compare and write") && text.contains("32.0 MiB"),
        "{text}"
    );
    let discovery = stage.tool("identify", &["--subnqn", DISCOVERY, "--json"]).output().expect("it runs");
    assert_eq!(parsed(&discovery)["controller"]["cntrltype"], 2);
}

#[test]
fn failures_say_what_to_do() {
    let stage = Stage::start();
    let fails = |args: &[&str], says: &str| {
        let output = stage.tool("identify", args).output().expect("the binary runs");
        let said = stderr(&output);
        assert!(output.status.code() == Some(1) && said.contains(says) && stdout(&output).is_empty(), "{said}");
    };
    fails(&["--subnqn", "nqn.2026-11.io.example:none"], "no such subsystem at that address: look for it with discover");
    fails(
        &["--subnqn", NQN, "--nsid", "9"],
        "--nsid 9: there is no such namespace for this host; give one of these: 1, 2, 3",
    );
    stage.server.call("nvmf_subsystem_allow_any_host", json!({"nqn": NQN, "allow_any_host": false}));
    fails(&["--subnqn", NQN], "does not allow this host: add its NQN there");
    let nobody = tool_at(free_port(), "identify", &["--subnqn", NQN]).output().expect("the binary runs");
    assert!(stderr(&nobody).contains("nothing listens there"), "{}", stderr(&nobody));
    let unnamed = stage.tool("identify", &["--subnqn", NQN, "--traddr", "no.such.name.invalid"]).output();
    let unnamed = unnamed.expect("the binary runs");
    assert!(!unnamed.status.success(), "{}", stderr(&unnamed));
}

#[test]
fn arguments_that_cannot_be_are_refused_before_anything_is_asked() {
    let long = "n".repeat(224);
    for (tool, args, says) in [
        ("identify", &["--subnqn", ""][..], "an NQN has 1 to 223 bytes, and this has 0"),
        ("identify", &["--subnqn", &long], "and this has 224"),
        ("discover", &["--subnqn", ""], "an NQN has 1 to 223 bytes"),
        ("discover", &["--hostnqn", ""], "an NQN has 1 to 223 bytes"),
        ("identify", &["--subnqn", NQN, "--nsid", "0"], "1..=4294967295"),
        ("identify", &[], "--subnqn"),
        ("discover", &["--trtype", "pigeon"], "tcp"),
    ] {
        // Nothing listens there, and nobody asks.
        let output = tool_at(1, tool, args).output().expect("the binary runs");
        let said = stderr(&output);
        assert!(output.status.code() == Some(2) && said.contains(says), "{tool} {args:?}: {said}");
    }
    let no_port = tool_at(0, "discover", &[]).output().expect("the binary runs");
    assert!(no_port.status.code() == Some(2) && stderr(&no_port).contains("1..=65535"), "{}", stderr(&no_port));
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure_and_a_full_disk_is() {
    let stage = Stage::start();
    for (tool, args) in
        [("identify", &["--subnqn", NQN][..]), ("discover", &[]), ("identify", &["--subnqn", NQN, "--json"])]
    {
        let mut child = stage.tool(tool, args);
        let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it runs");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success() && stderr(&output).is_empty(), "{tool}: {}", stderr(&output));
        let full = std::fs::File::options().write(true).open("/dev/full").expect("it is there");
        let output = stage.tool(tool, args).stdout(full).output().expect("it runs");
        assert!(!output.status.success() && stderr(&output).contains("standard output"), "{}", stderr(&output));
    }
}

#[test]
fn discover_follows_referrals_once() {
    let stage = Stage::start();
    let (scratch, port, gone) = (Scratch::new(), free_port(), free_port());
    let other = Server::start(&scratch, &["--empty"]);
    other.call("nvmf_create_transport", json!({"trtype": "TCP"}));
    other.call("nvmf_create_subsystem", json!({"nqn": "nqn.2026-11.io.example:second", "allow_any_host": true}));
    other.call(
        "nvmf_subsystem_add_listener",
        json!({"nqn": "nqn.2026-11.io.example:second", "listen_address": address(port)}),
    );
    // In a circle, and into nothing.
    stage.server.call("nvmf_discovery_add_referral", json!({"address": address(port)}));
    stage.server.call("nvmf_discovery_add_referral", json!({"address": address(gone)}));
    other.call("nvmf_discovery_add_referral", json!({"address": address(stage.port)}));

    let output = stage.tool("discover", &["--json"]).output().expect("the binary runs");
    assert!(output.status.success(), "{}", stderr(&output));
    let found = parsed(&output);
    let services = found["services"].as_array().expect("a list");
    let ports: Vec<_> = services.iter().map(|service| service["trsvcid"].as_str().unwrap_or("")).collect();
    assert_eq!(ports[0], stage.port.to_string());
    assert_eq!(services.len(), 3, "each once: {ports:?}");
    for service in &services[1..] {
        let is_gone = service["trsvcid"] == gone.to_string().as_str();
        assert_eq!(service["error"].is_string(), is_gone, "{service}");
        assert_eq!(service["referrals_before"], 1);
    }
    let names: Vec<_> =
        services.iter().flat_map(|s| s["records"].as_array().into_iter().flatten()).map(|r| &r["subnqn"]).collect();
    assert!(names.contains(&&json!(NQN)) && names.contains(&&json!("nqn.2026-11.io.example:second")), "{names:?}");

    let alone = stage.tool("discover", &["--json", "--no-referrals"]).output().expect("the binary runs");
    let alone = parsed(&alone);
    assert_eq!(
        (alone["services"].as_array().map(Vec::len), alone["not_followed"].as_array().map(Vec::len)),
        (Some(1), Some(2))
    );
    let text = stdout(&stage.tool("discover", &[]).output().expect("the binary runs"));
    assert!(text.contains("discovery subsystem referral") && text.contains(NQN), "{text}");
}

#[test]
fn a_discovery_log_of_many_pieces_is_whole() {
    let stage = Stage::start();
    for n in 0..150 {
        let nqn = format!("nqn.2026-11.io.example:many{n}");
        stage.server.call("nvmf_create_subsystem", json!({"nqn": nqn, "allow_any_host": true}));
        stage.server.call("nvmf_subsystem_add_listener", json!({"nqn": nqn, "listen_address": address(stage.port)}));
    }
    let output = stage.tool("discover", &["--json"]).output().expect("the binary runs");
    let found = parsed(&output);
    // Those, the first, and the service itself.
    assert_eq!(found["services"][0]["records"].as_array().map(Vec::len), Some(152), "{}", stderr(&output));
}

#[test]
fn what_is_no_target_is_told_from_one() {
    // Speaks first, and not NVMe; hangs up; says nothing at all.
    for (answer, says) in [
        (Some(&b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"[..]), "protocol error of the target"),
        (Some(&b""[..]), "closed the connection: see whether the target still runs"),
        (None, "does not answer: see whether the target still runs"),
    ] {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port is free");
        let port = listener.local_addr().expect("it listens").port();
        let child = tool_at(port, "identify", &["--subnqn", NQN]).stderr(std::process::Stdio::piped()).spawn();
        let (mut stream, _) = listener.accept().expect("it connects");
        if let Some(bytes) = answer {
            // Whoever hangs up first is not the question.
            let _ = stream.write_all(bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        let output = child.expect("the binary runs").wait_with_output().expect("it is a child of this process");
        let said = stderr(&output);
        assert!(output.status.code() == Some(1) && said.contains(says), "{said}");
    }
}
