//! The log store on a file, behind an export, while its server is killed.

use rustix::process::Signal;
use serde_json::json;

use crate::client::Client;
use crate::common::{Scratch, Server, wait_for};

const BLOCK: usize = 4096;
const BLOCKS: u64 = 512;

/// What block `lba` has in round `round`: random in one half, so that compression has something to do.
fn contents(lba: u64, round: u64) -> Vec<u8> {
    let mut state = (lba << 32 | round) * 2 + 1;
    let mut bytes = vec![round as u8; BLOCK];
    for chunk in bytes[..BLOCK / 2].chunks_mut(8) {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        chunk.copy_from_slice(&state.to_le_bytes());
    }
    bytes
}

#[test]
fn a_log_store_survives_the_kill_of_its_server() {
    let scratch = Scratch::new();
    let file = scratch.path().join("base.img");
    let socket = scratch.path().join("l.sock");
    std::fs::File::create(&file).unwrap().set_len(16 << 20).unwrap();
    let mut server = Server::start(&scratch, &["--empty"]);
    server.call("bdev_uring_create", json!({"name": "base", "filename": file, "block_size": 512}));
    let create =
        |options| json!({"name": "L", "handler": "log", "num_blocks": BLOCKS, "block_size": BLOCK, "options": options});
    let (code, text, _) = server.call_fails("bdev_appliance_create", create(json!({})));
    assert!(code == -22 && text.contains("base_bdev is missing"), "{code}: {text}");
    server.call("bdev_appliance_create", create(json!({"base_bdev": "base", "format": true})));
    server.call("nbd_export_add", json!({"bdev_name": "L", "socket": socket}));

    // How far each round got before the server was killed under it.
    let mut flushed = vec![0u64; BLOCKS as usize];
    for round in 1..=4u64 {
        let mut client = Client::connect(&socket).unwrap();
        for lba in (0..BLOCKS).filter(|lba| lba % (round + 1) == 0) {
            client.write(lba * BLOCK as u64, &contents(lba, round)).unwrap();
        }
        client.flush().unwrap();
        for lba in (0..BLOCKS).filter(|lba| lba % (round + 1) == 0) {
            flushed[lba as usize] = round;
        }
        // These are under way or in no flush: either contents will do.
        for lba in 0..20 {
            client.write(lba * BLOCK as u64, &contents(lba, 100 + round)).unwrap();
        }
        server.kill();
        server = Server::start(&scratch, &[]);
        assert!(!server.log().contains("ERROR"), "{}", server.log());
        let mut client = Client::connect(&socket).unwrap();
        for lba in 0..BLOCKS {
            let found = client.read(lba * BLOCK as u64, BLOCK as u32).unwrap();
            let flushed = flushed[lba as usize];
            let good = found == if flushed == 0 { vec![0; BLOCK] } else { contents(lba, flushed) };
            let later = lba < 20 && (1..=round).any(|round| found == contents(lba, 100 + round));
            assert!(good || later, "block {lba} after round {round}");
        }
    }
    let shown = server.call("bdev_get_bdevs", json!({"name": "L"}));
    let options = &shown[0]["driver_specific"]["appliance"]["options"];
    assert_eq!(*options, json!({"base_bdev": "base"}), "what formats it is not done again");

    // In the way of a second one, and gone with its base.
    let again =
        json!({"name": "M", "handler": "log", "num_blocks": 8, "block_size": 512, "options": {"base_bdev": "base"}});
    let (code, text, _) = server.call_fails("bdev_appliance_create", again);
    assert!(code == -1 && text.contains("in use by the log store 'L'"), "{code}: {text}");
    server.call("nbd_export_remove", json!({"socket": socket}));
    server.call("bdev_appliance_delete", json!({"name": "L"}));
    let small =
        json!({"name": "L", "handler": "log", "num_blocks": 16, "block_size": BLOCK, "options": {"base_bdev": "base"}});
    let (code, text, _) = server.call_fails("bdev_appliance_create", small);
    assert!(code == -22 && text.contains("create it with at least"), "{code}: {text}");
    server.call("bdev_appliance_create", create(json!({"base_bdev": "base"})));
    let stats = wait_for("the store's counters", || {
        let stats = server.call("bdev_appliance_get_stats", json!({"name": "L"}));
        stats.to_string().contains("\"mapped_blocks\":").then_some(stats)
    });
    assert!(stats.to_string().contains("\"state\":\"running\""), "{stats}");
    server.call("bdev_uring_delete", json!({"name": "base"}));
    assert_eq!(server.call("bdev_get_bdevs", json!({})), json!([]));
    server.stop(Signal::TERM);
}
