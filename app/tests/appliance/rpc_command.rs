//! `ringstone rpc`.

use std::process::Output;

use serde_json::{Value, json};

use crate::common::{Scratch, Server, ringstone};

#[track_caller]
fn prints(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty());
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// What a command that fails says.
#[track_caller]
fn complains(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

#[test]
fn calls_print_their_results_and_errors() {
    let scratch = Scratch::new();
    let _server = Server::start(&scratch, &["--empty"]);
    let rpc = |words: &[&str]| scratch.rpc_command(words);

    // Words, JSON, and a value that JSON alone would take for a number.
    let made = rpc(&["bdev_malloc_create", "name=4096", "num_blocks=0x400", "block_size=512"]);
    assert_eq!(prints(&made), json!("4096"));
    let made = rpc(&["bdev_null_create", r#"{"name": "N", "num_blocks": 100, "block_size": 4096}"#]);
    assert_eq!(prints(&made), json!("N"));
    let made = rpc(&["nvmf_create_subsystem", "nqn=nqn.2026-11.io.example:a", "allow_any_host=true"]);
    assert_eq!(prints(&made), json!(true));
    let nested = rpc(&["nvmf_subsystem_add_ns", "nqn=nqn.2026-11.io.example:a", "namespace.bdev_name=4096"]);
    assert_eq!(prints(&nested), json!(1));
    let listed = prints(&rpc(&["bdev_get_bdevs"]));
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|bdev| bdev["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["4096", "N"]);

    // Mistakes that the command sees itself, and ones that the server tells.
    let text = complains(&rpc(&["bdev_malloc_create", "name=X", "num_blocks=8", "block_siz=512"]));
    assert!(text.contains("bdev_malloc_create has no parameter block_siz; did you mean block_size?"), "{text}");
    let text = complains(&rpc(&["bdev_malloc_create", r#"{"name":"X","num_blocks":8,"block_siz":512}"#]));
    assert!(text.contains("bdev_malloc_create") && text.contains("block_siz") && text.contains("block_size"), "{text}");
    let text = complains(&rpc(&["bdev_malloc_create", "name=X", "num_blocks=many", "block_size=512"]));
    assert!(text.contains("num_blocks=many"), "{text}");
    let text = complains(&rpc(&["bdev_malloc_create", "name=4096", "num_blocks=8", "block_size=512"]));
    assert!(text.contains("4096") && text.contains("code -17"), "{text}");
    let text = complains(&rpc(&["bdev_malloc_delete", "name=Nope"]));
    assert!(text.contains("Nope") && text.contains("code -19"), "{text}");
    let text = complains(&rpc(&["bdev_malloc_creat", "name=X"]));
    assert!(text.contains("bdev_malloc_create") && text.contains("code -32601"), "{text}");
    let text = complains(&rpc(&["bdev_get_bdevs", "[1]"]));
    assert!(text.contains("array"), "{text}");
}

#[test]
fn without_a_server_it_says_so() {
    let scratch = Scratch::new();
    let text = complains(&scratch.rpc_command(&["bdev_get_bdevs"]));
    assert!(text.contains("ringstone serve") && text.contains("--socket"), "{text}");
    // A server that was killed leaves its socket behind.
    Server::start(&scratch, &["--empty"]).kill();
    let text = complains(&scratch.rpc_command(&["bdev_get_bdevs"]));
    assert!(text.contains("has ended"), "{text}");
}

#[test]
fn the_list_has_every_method_of_the_server() {
    let scratch = Scratch::new();
    let server = Server::start(&scratch, &["--empty"]);
    let output = ringstone().args(["rpc", "--list"]).output().unwrap();
    assert!(output.status.success());
    let list = String::from_utf8(output.stdout).unwrap();
    let listed: Vec<_> =
        list.lines().filter(|line| line.starts_with(char::is_alphabetic)).flat_map(|line| line.split(", ")).collect();
    let mut served = server.call("rpc_get_methods", json!({"include_aliases": true}));
    let mut served: Vec<_> = served.as_array_mut().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    let mut sorted = listed.clone();
    sorted.sort_unstable();
    served.sort_unstable();
    assert_eq!(sorted, served);
    assert!(list.contains("      num_blocks "), "parameters are shown");
}

#[test]
fn the_default_socket_is_that_of_the_default_state_directory() {
    let scratch = Scratch::new();
    let home = scratch.path();
    // The server's state directory is what the defaults name for this home.
    let state = home.join("ringstone");
    let mut child = ringstone();
    child.args(["serve", "--empty"]).env("XDG_STATE_HOME", home).stdout(std::process::Stdio::piped());
    let mut child = child.stderr(std::process::Stdio::null()).spawn().unwrap();
    let socket = state.join("rpc.sock");
    let output = crate::common::wait_for("the server answers", || {
        let output = ringstone().args(["rpc", "spdk_get_version"]).env("XDG_STATE_HOME", home).output().unwrap();
        output.status.success().then_some(output)
    });
    assert!(prints(&output)["version"].as_str().unwrap().contains("SPDK"));
    assert!(socket.exists());
    child.kill().unwrap();
    child.wait().unwrap();
}
