//! A server with namespaces, and the tools run on it.

use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::common::{Scratch, Server, address, free_port, ringstone};

pub const NQN: &str = "nqn.2026-11.io.example:tools";
pub const DISCOVERY: &str = "nqn.2014-08.org.nvmexpress.discovery";
/// Namespace 1: memory, 4096 blocks of 512 bytes.
pub const BLOCKS: u64 = 4096;

/// A server with memory as namespaces 1 and 2, and one that keeps nothing as 3.
pub struct Stage {
    pub server: Server,
    pub port: u16,
    _scratch: Scratch,
}

impl Stage {
    #[track_caller]
    pub fn start() -> Stage {
        Stage::start_with(&[])
    }

    /// With more options of the server.
    #[track_caller]
    pub fn start_with(args: &[&str]) -> Stage {
        let scratch = Scratch::new();
        let port = free_port();
        let server = Server::start(&scratch, &[&["--empty"], args].concat());
        for (method, params) in [
            ("bdev_malloc_create", json!({"name": "M1", "num_blocks": BLOCKS, "block_size": 512})),
            ("bdev_malloc_create", json!({"name": "M2", "num_blocks": 2048, "block_size": 4096})),
            ("bdev_null_create", json!({"name": "N", "num_blocks": 65536, "block_size": 512})),
            ("nvmf_create_transport", json!({"trtype": "TCP"})),
            (
                "nvmf_create_subsystem",
                json!({"nqn": NQN, "allow_any_host": true, "ana_reporting": true, "serial_number": "TOOLS01"}),
            ),
            ("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": "M1"}})),
            ("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": "M2"}})),
            ("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": "N"}})),
            ("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": address(port)})),
        ] {
            server.call(method, params);
        }
        Stage { server, port, _scratch: scratch }
    }

    /// A tool for this target, not yet started.
    pub fn tool(&self, name: &str, args: &[&str]) -> Command {
        tool_at(self.port, name, args)
    }

    /// The same with the subsystem's NQN.
    pub fn run(&self, name: &str, args: &[&str]) -> Output {
        self.tool(name, &[&["--subnqn", NQN], args].concat()).output().expect("the binary runs")
    }

    /// A tool that must succeed and print JSON.
    #[track_caller]
    pub fn json(&self, name: &str, args: &[&str]) -> Value {
        let output = self.run(name, &[args, &["--json"]].concat());
        assert!(output.status.success(), "{}\n{}", stderr(&output), self.server.log());
        parsed(&output)
    }

    /// A load that runs until it is stopped, and has begun.
    #[track_caller]
    pub fn endless(&self, args: &[&str]) -> Child {
        let reads = || {
            let stat = self.server.call("bdev_get_iostat", json!({"names": ["M1"]}));
            stat["bdevs"][0]["num_read_ops"].as_u64().expect("a number")
        };
        let before = reads();
        let all = ["--subnqn", NQN, "--rw", "randread", "--time", "100000", "--warmup", "0", "--json"];
        let child = self.tool("perf", &[&all, args].concat()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let child = child.expect("the binary runs");
        // More than are outstanding at once: some have completed.
        crate::common::wait_for("the load begins", || (reads() > before + 200).then_some(()));
        child
    }
}

pub fn tool_at(port: u16, name: &str, args: &[&str]) -> Command {
    let mut command = ringstone();
    command.args([name, "--traddr", "127.0.0.1", "--trsvcid", &port.to_string()]).args(args);
    command
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What a tool printed as JSON.
#[track_caller]
pub fn parsed(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}\n{}", stdout(output), stderr(output)))
}

pub fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).expect("it is a child of this process");
}
