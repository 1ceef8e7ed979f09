//! Either server is killed under load, comes back, and gets what it missed and nothing else.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::common::{Scratch, Server, address, free_port, wait_for};
use crate::host::{BLOCK, Host, Ledger, VOLUME, Writer};
use crate::nbd_client;
use crate::pair::{REGION, copied_blocks, of_leg, status, until_clean, until_in_sync};

const LEG_BYTES: u64 = 24 << 20;
/// Behind the superblocks and the log.
const DATA: u64 = 1 << 20;
const BLOCKS: u64 = (LEG_BYTES - DATA) / BLOCK as u64;

/// One of the two servers.
struct Side {
    name: &'static str,
    scratch: Scratch,
    leg_port: u16,
    volume_port: u16,
}

impl Side {
    fn new(name: &'static str) -> Side {
        Side { name, scratch: Scratch::new(), leg_port: free_port(), volume_port: free_port() }
    }

    fn file(&self) -> PathBuf {
        self.scratch.path().join("leg.img")
    }

    fn leg_nqn(&self) -> String {
        format!("nqn.2026-11.io.example:leg-{}", self.name)
    }

    #[track_caller]
    fn first_start(&self) -> Server {
        fs::File::create(self.file()).and_then(|file| file.set_len(LEG_BYTES)).expect("a file for the leg");
        let server =
            Server::start_until(&self.scratch, &["--empty", "--wait-for-rpc"], |line| line.starts_with("waiting"));
        server.call("bdev_set_options", json!({"bdev_auto_examine": false}));
        server.call("framework_start_init", json!({}));
        server.call("nvmf_create_transport", json!({"trtype": "TCP"}));
        server.call("bdev_uring_create", json!({"name": "disk", "filename": self.file(), "block_size": BLOCK}));
        server
    }

    fn serve(server: &Server, nqn: &str, bdev: &str, port: u16) {
        server.call("nvmf_create_subsystem", json!({"nqn": nqn, "allow_any_host": true}));
        server.call("nvmf_subsystem_add_ns", json!({"nqn": nqn, "namespace": {"bdev_name": bdev}}));
        server.call("nvmf_subsystem_add_listener", json!({"nqn": nqn, "listen_address": address(port)}));
    }

    fn serve_leg(&self, server: &Server) {
        Side::serve(server, &self.leg_nqn(), "disk", self.leg_port);
    }

    /// The volume, for hosts and for local programs.
    fn serve_volume(&self, server: &Server) {
        Side::serve(server, VOLUME, "mirror", self.volume_port);
        server.call("nbd_export_add", json!({"bdev_name": "mirror", "socket": self.nbd(), "readonly": true}));
    }

    fn nbd(&self) -> PathBuf {
        self.scratch.path().join("mirror.sock")
    }

    /// The leg of the other server becomes a bdev of this one.
    #[track_caller]
    fn attach(server: &Server, other: &Side) -> Value {
        let params = json!({
            "name": other.name, "trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1",
            "trsvcid": other.leg_port.to_string(), "subnqn": other.leg_nqn(),
            "fast_io_fail_timeout_sec": 1, "reconnect_delay_sec": 1, "ctrlr_loss_timeout_sec": -1,
        });
        server.call("bdev_nvme_attach_controller", params)
    }

    /// The whole volume over NBD is what the ledger says.
    #[track_caller]
    fn check_over_nbd(&self, ledger: &mut Ledger) {
        let mut client = nbd_client::Client::connect(&self.nbd()).expect("the export is there");
        assert_eq!(client.size, BLOCKS * BLOCK as u64);
        for first in (0..BLOCKS).step_by(64) {
            let count = 64.min(BLOCKS - first);
            let data = client.read(first * BLOCK as u64, count as u32 * BLOCK as u32).expect("it can be read");
            ledger.check(first, &data);
        }
    }
}

fn regions(range: std::ops::Range<u64>) -> std::ops::Range<u64> {
    range.start * REGION..range.end * REGION
}

/// Regions that leg `leg` lacks.
#[track_caller]
fn lacking(server: &Server, leg: usize) -> u64 {
    of_leg(&status(server), leg, "lacking_regions").as_u64().expect("a count")
}

fn data_of(side: &Side) -> Vec<u8> {
    fs::read(side.file()).expect("the leg's file")[DATA as usize..].to_vec()
}

#[test]
fn a_volume_of_two_servers_survives_either() {
    let (a, b) = (Side::new("a"), Side::new("b"));
    let (at_a, at_b) = (a.first_start(), b.first_start());
    b.serve_leg(&at_b);
    assert_eq!(Side::attach(&at_a, &b), json!(["bn1"]));
    let mirror = json!({"name": "mirror", "raid_level": "raid1", "superblock": true, "base_bdevs": ["disk", "bn1"]});
    at_a.call("bdev_raid_create", mirror);
    a.serve_volume(&at_a);
    let first = until_in_sync(&at_a);
    assert_eq!((&first["regions"], &first["copied_blocks"]), (&json!(BLOCKS / REGION), &json!(BLOCKS)));

    // Some of it is written, and then nothing for so long that the log is clean.
    let writer = Writer::start(a.volume_port, Ledger::default(), regions(0..2));
    writer.until_written(2 * REGION);
    let mut ledger = writer.stop();
    until_clean(&at_a);

    // B dies under load, and the load goes on.
    let writer = Writer::start(a.volume_port, ledger, regions(4..6));
    writer.until_written(50);
    at_b.kill();
    wait_for("B's leg to be out", || (of_leg(&status(&at_a), 1, "state") == "out").then_some(()));
    writer.until_written(2 * REGION + 50);
    ledger = writer.stop();
    Host::connect(a.volume_port).check(&mut ledger, 0..BLOCKS);
    assert_eq!(lacking(&at_a, 1), 2, "two regions were written");

    // It comes back as it was and is found by itself, under load; it gets these two regions.
    let before = copied_blocks(&at_a);
    let writer = Writer::start(a.volume_port, ledger, regions(4..6));
    let at_b = Server::start(&b.scratch, &[]);
    until_in_sync(&at_a);
    assert_eq!(copied_blocks(&at_a) - before, 2 * REGION, "only what changed is copied");
    writer.until_written(50);
    ledger = writer.stop();
    a.check_over_nbd(&mut ledger);
    until_clean(&at_a);

    // A dies under load. B's leg has everything that was acknowledged.
    let writer = Writer::start(a.volume_port, ledger, regions(8..10));
    writer.until_written(100);
    at_a.kill();
    ledger = writer.lose();
    at_b.call("nvmf_delete_subsystem", json!({"nqn": b.leg_nqn()}));
    let alone = json!({"name": "mirror", "base_bdevs": ["disk"]});
    assert_eq!(at_b.call("bdev_raid_start", alone.clone()), json!(true));
    b.serve_volume(&at_b);
    Host::connect(b.volume_port).check(&mut ledger, 0..BLOCKS);
    let writer = Writer::start(b.volume_port, ledger, regions(12..13));
    writer.until_written(REGION);
    ledger = writer.stop();
    until_clean_alone(&at_b);

    // A comes back, and does not serve what it has: B might know more.
    let at_a = Server::start(&a.scratch, &["--partial"]);
    let refused = status(&at_a);
    assert_eq!(refused["state"], "configuring", "{refused}");
    assert!(refused["reason"].as_str().is_some_and(|why| why.contains("might know more")), "{refused}");
    at_a.call_fails("bdev_get_bdevs", json!({"name": "mirror"}));
    assert_eq!(at_a.call("bdev_raid_delete", json!({"name": "mirror"})), json!(true));
    a.serve_leg(&at_a);
    assert_eq!(Side::attach(&at_b, &a), json!(["an1"]));
    // What A may have had under way when it died, and what B wrote alone.
    let missed = lacking(&at_b, 0);
    assert!((2..=3).contains(&missed), "{missed} regions");
    let before = copied_blocks(&at_b);
    let add = json!({"raid_bdev": "mirror", "base_bdev": "an1"});
    assert_eq!(at_b.call("bdev_raid_add_base_bdev", add), json!(true));
    until_in_sync(&at_b);
    assert_eq!(copied_blocks(&at_b) - before, missed * REGION, "only what changed is copied");
    b.check_over_nbd(&mut ledger);

    // Both legs are the same, byte by byte.
    at_b.call("nvmf_delete_subsystem", json!({"nqn": VOLUME}));
    at_b.stop(rustix::process::Signal::TERM);
    at_a.stop(rustix::process::Signal::TERM);
    assert!(data_of(&a) == data_of(&b), "the legs differ");
}

/// With one leg, bits of what the other lacks stay; what was written before does not count as being written.
#[track_caller]
fn until_clean_alone(server: &Server) {
    until_clean(server);
    assert!(lacking(server, 0) > 0);
}
