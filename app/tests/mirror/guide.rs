//! "Two servers, one volume" of docs/raid.md, followed to the letter; only addresses and folders are this machine's.

use std::process::Output;

use serde_json::{Value, json};

use crate::common::guide::{Guide, Terminal};
use crate::common::{Scratch, Server, free_port, ringstone, wait_for};
use crate::host::VOLUME;
use crate::pair::{copied_blocks, of_leg, status, until_in_sync};

const GUIDE: Guide = Guide("docs/raid.md");

/// A server and its terminal.
struct Machine<'a> {
    terminal: Terminal<'a>,
    listen: String,
    server: Option<Server>,
}

impl<'a> Machine<'a> {
    /// The guide's addresses are here: (as it has them, as they are).
    fn new(scratch: &'a Scratch, addresses: &[(String, String)]) -> Machine<'a> {
        let mut terminal = Terminal::new(scratch);
        terminal.instead.extend(addresses.iter().cloned());
        Machine { terminal, listen: format!("127.0.0.1:{}", free_port()), server: None }
    }

    /// `ringstone serve` as the guide's block number `block` of a section says, and where a fresh one listens.
    #[track_caller]
    fn serve(&mut self, command: &str, last: &str) {
        let args = command.strip_prefix("ringstone serve").expect("it starts a server");
        let args: Vec<&str> = args.split_whitespace().chain(["--listen", &self.listen]).collect();
        self.server = Some(Server::start_until(self.terminal.scratch, &args, |line| line.starts_with(last)));
    }

    #[track_caller]
    fn run(&self, command: &str) -> Output {
        self.terminal.run(command)
    }

    fn server(&self) -> &Server {
        self.server.as_ref().expect("it runs")
    }

    fn kill(&mut self) {
        self.server.take().expect("it runs").kill();
    }
}

#[track_caller]
fn verified_load(port: u16, rw: &str) {
    let output = ringstone()
        .args(["perf", "--traddr", "127.0.0.1", "--trsvcid", &port.to_string(), "--subnqn", VOLUME])
        .args(["--rw", rw, "--count", "300", "--qd", "8", "--size", "4m", "--verify", "--json"])
        .output()
        .expect("the binary runs");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!((&report["errors"], &report["verify"]["mismatches"]), (&json!(0), &json!(0)), "{said}");
}

#[track_caller]
fn one(heading: &str) -> String {
    let mut commands = GUIDE.commands(heading);
    assert_eq!(commands.len(), 1, "{commands:?}");
    commands.remove(0)
}

#[track_caller]
fn several<const N: usize>(heading: &str) -> [String; N] {
    let commands = GUIDE.commands(heading);
    commands.try_into().unwrap_or_else(|commands| panic!("{N} blocks are expected: {commands:?}"))
}

#[test]
fn the_guide_to_two_servers_leads_to_a_volume_that_survives_either() {
    let scratches = [Scratch::new(), Scratch::new()];
    // By server: its leg's port, and the volume's.
    let ports = [[free_port(), free_port()], [free_port(), free_port()]];
    let addresses: Vec<(String, String)> = [(0, "4421", 0), (0, "4422", 1), (1, "4421", 0), (1, "4422", 1)]
        .into_iter()
        .flat_map(|(n, port, at)| {
            ["listen_address.", ""].map(|word| {
                let is = format!("traddr=127.0.0.1 {word}trsvcid={}", ports[n][at]);
                (format!("traddr=192.0.2.{} {word}trsvcid={port}", n + 1), is)
            })
        })
        .collect();
    let mut machines = scratches.each_ref().map(|scratch| Machine::new(scratch, &addresses));

    let [serve, set_up] = several("On both, once");
    for machine in &mut machines {
        machine.serve(&serve, "waiting");
        machine.run(&set_up);
    }
    let [a, b] = &mut machines;
    b.run(&one("On B: the disk as a leg for A"));
    a.run(&one("On A: the array, for the hosts"));
    until_in_sync(a.server());
    verified_load(ports[0][1], "randrw");

    b.kill();
    verified_load(ports[0][1], "randrw");
    wait_for("B's leg to be out", || (of_leg(&status(a.server()), 1, "state") == "out").then_some(()));
    b.serve("ringstone serve", "ready");
    until_in_sync(a.server());

    verified_load(ports[0][1], "write");
    a.kill();
    b.run(&one("A is lost"));
    verified_load(ports[1][1], "randrw");

    let [serve, leg, add] = several("A is back");
    a.serve(&serve, "ready");
    assert_eq!(status(a.server())["state"], "configuring");
    a.run(&leg);
    let before = copied_blocks(b.server());
    b.run(&add);
    let now = until_in_sync(b.server());
    let copied = now["copied_blocks"].as_u64().unwrap() - before;
    assert!(copied > 0 && copied < now["regions"].as_u64().unwrap() * now["region_blocks"].as_u64().unwrap());
    verified_load(ports[1][1], "randrw");

    // Now somebody starts it on A all the same, while B has it.
    let unserve = "ringstone rpc nvmf_delete_subsystem nqn=nqn.2026-11.io.example:leg-a";
    let start = "ringstone rpc bdev_raid_start name=mirror 'base_bdevs=[\"disk\"]'";
    a.run(unserve);
    verified_load(ports[1][1], "write");
    wait_for("A's leg to be out", || (of_leg(&status(b.server()), 0, "state") == "out").then_some(()));
    a.run(start);
    a.run("ringstone rpc bdev_raid_delete name=mirror");
    let serve_leg: Vec<&str> = leg.lines().skip_while(|line| !line.contains("nvmf_create_subsystem")).collect();
    let [give_up, again] = several("Both have run it");
    a.run(&serve_leg.join("\n"));
    let connected = |b: &Machine| {
        b.server().call("bdev_nvme_get_controllers", json!({"name": "a"}))[0]["ctrlrs"][0]["state"] == "enabled"
    };
    wait_for("B to find it", || connected(b).then_some(()));
    let refused = b.terminal.refused(&again);
    assert!(refused.contains("history of its own"), "{refused}");
    a.run(unserve);
    wait_for("B to lose it", || (!connected(b)).then_some(()));
    a.run(start);
    a.run(&give_up);
    a.run(&serve_leg.join("\n"));
    wait_for("B to find it", || connected(b).then_some(()));
    let before = copied_blocks(b.server());
    b.run(&again);
    let now = until_in_sync(b.server());
    let all = now["regions"].as_u64().unwrap() * now["region_blocks"].as_u64().unwrap();
    assert_eq!(now["copied_blocks"].as_u64().unwrap() - before, all, "it is a new leg");
    verified_load(ports[1][1], "randrw");
    for machine in &mut machines {
        machine.server.take().expect("it runs").stop(rustix::process::Signal::TERM);
    }
}
