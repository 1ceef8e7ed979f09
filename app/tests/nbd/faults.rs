//! What goes wrong while clients are at work.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nbd::wire::{Request, command};
use rustix::process::Signal;
use serde_json::json;

use crate::client::{Client, Failure};
use crate::common::{PATIENCE, Server, wait_for};
use crate::exports::serving;

/// Writes a block again and again, each time with the next number, until it is refused. The last number that was
/// acknowledged, and the last that was sent. `started` counts those whose first write is through.
fn write_until_refused(socket: &Path, block: u64, started: &AtomicU32) -> (u32, u32) {
    let mut client = Client::connect(socket).unwrap();
    let mut acknowledged = 0;
    for number in 1u32.. {
        match client.write(block * 512, &number.to_be_bytes().repeat(128)) {
            Ok(()) => acknowledged = number,
            Err(Failure::Gone) => return (acknowledged, number),
            Err(Failure::Refused(code)) => {
                assert!(code == 108 || code == 5, "ESHUTDOWN or EIO: {code}");
                assert!(client.is_closed(), "after which the connection closes");
                return (acknowledged, number);
            }
        }
        if number == 1 {
            started.fetch_add(1, Ordering::SeqCst);
        }
    }
    unreachable!("it is refused at some time")
}

/// Starts writers, each of a block of its own, and waits until all are at work.
fn writers(socket: &Path, count: u32) -> Vec<thread::JoinHandle<(u32, u32)>> {
    let started = Arc::new(AtomicU32::new(0));
    let writer = |block: u32| {
        let (socket, started) = (socket.to_owned(), Arc::clone(&started));
        thread::spawn(move || write_until_refused(&socket, block.into(), &started))
    };
    let all = (0..count).map(writer).collect();
    wait_for("the writers to be at work", || (started.load(Ordering::SeqCst) == count).then_some(()));
    all
}

fn connections(server: &Server) -> u64 {
    server.call("nbd_get_exports", json!({}))[0]["connections"].as_u64().unwrap()
}

#[test]
fn an_export_is_removed_under_load_and_nothing_acknowledged_is_lost() {
    let (_scratch, server, socket) = serving(&["--cores", "0"]);
    for round in 0..3 {
        let writers = writers(&socket, 4);
        assert_eq!(server.call("nbd_export_remove", json!({"socket": socket})), true);
        let numbers: Vec<_> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        server.call("nbd_export_add", json!({"bdev_name": "M", "socket": socket}));
        let mut client = Client::connect(&socket).unwrap();
        for (block, (acknowledged, sent)) in (0..).zip(numbers) {
            let data = client.read(block * 512, 512).unwrap();
            let number = u32::from_be_bytes(data[..4].try_into().unwrap());
            assert_eq!(data, number.to_be_bytes().repeat(128), "whole");
            assert!(number == acknowledged || number == sent, "round {round}: {number} {acknowledged} {sent}");
        }
    }
    server.stop(Signal::TERM);
}

#[test]
fn a_bdev_is_deleted_under_load() {
    let (_scratch, server, socket) = serving(&[]);
    // Slow, so that operations are in the device when it goes.
    let slow = socket.with_file_name("slow.sock");
    server.call("nbd_export_remove", json!({"socket": socket}));
    let mut params = json!({"name": "D", "base_bdev_name": "M"});
    for latency in ["avg_read_latency", "p99_read_latency", "avg_write_latency", "p99_write_latency"] {
        params[latency] = json!(20_000);
    }
    server.call("bdev_delay_create", params);
    server.call("nbd_export_add", json!({"bdev_name": "D", "socket": slow}));
    let writers = writers(&slow, 6);
    server.call("bdev_delay_delete", json!({"name": "D"}));
    for writer in writers {
        writer.join().unwrap();
    }
    assert_eq!(server.call("nbd_get_exports", json!({})), json!([]));
    assert!(!slow.exists());
    let log = server.stop(Signal::TERM);
    assert!(!log.contains("ERROR"), "{log}");
}

#[test]
fn clients_that_vanish_leave_nothing_behind() {
    let (_scratch, server, socket) = serving(&[]);
    let files = server.open_files();
    for round in 0..20u64 {
        let mut client = Client::connect(&socket).unwrap();
        for n in 0..40 {
            client.send(command::READ, 0, n * 512, 64 * 1024, &[]).unwrap();
        }
        // In the middle of a write, at another place each time.
        client.send(command::WRITE, 0, 0, 4096, &vec![1; (round * 200) as usize]).unwrap();
        drop(client);
        // In the middle of a handshake.
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.write_all(&b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x06"[..round as usize]).unwrap();
    }
    wait_for("the connections to go", || (connections(&server) == 0).then_some(()));
    // The connection of an RPC may still be closing, now as at the beginning.
    wait_for("their files to be closed", || (server.open_files() <= files).then_some(()));
    let mut client = Client::connect(&socket).unwrap();
    client.write(0, &[3; 4096]).unwrap();
    let stats = server.call("iobuf_get_stats", json!({}));
    assert!(stats.is_array());
    server.stop(Signal::TERM);
}

/// Everything is sent at once: the handshake, and more requests than may be outstanding.
#[test]
fn a_client_that_waits_for_nothing_is_answered_all_the_same() {
    let (_scratch, server, socket) = serving(&["--poll", "sleep"]);
    const COUNT: u64 = 1000;
    let mut bytes = b"\0\0\0\x03IHAVEOPT\0\0\0\x03\0\0\0\0IHAVEOPT\0\0\0\x01\0\0\0\0".to_vec();
    for cookie in 0..COUNT {
        let request = Request { flags: 0, command: command::READ, cookie, offset: cookie * 512, length: 1024 };
        bytes.extend(request.to_bytes());
    }
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut sender = stream.try_clone().unwrap();
    let sending = thread::spawn(move || sender.write_all(&bytes).unwrap());
    // The greeting, the list ("M", "Malloc disk"), and size and flags.
    let mut head = vec![0; 18 + (20 + 4 + 1 + 11) + 20 + 10];
    stream.read_exact(&mut head).unwrap();
    assert_eq!(head[head.len() - 10..head.len() - 2], (1u64 << 20).to_be_bytes());
    let mut replies = vec![0; COUNT as usize * (16 + 1024)];
    stream.read_exact(&mut replies).unwrap();
    sending.join().unwrap();
    let mut cookies: Vec<_> =
        replies.chunks(16 + 1024).map(|reply| u64::from_be_bytes(reply[8..16].try_into().unwrap())).collect();
    cookies.sort_unstable();
    assert!(cookies.into_iter().eq(0..COUNT));
    server.stop(Signal::TERM);
}

#[test]
fn a_malformed_peer_ends_only_its_own_connection() {
    let (_scratch, server, socket) = serving(&["--cores", "0"]);
    let mut good = Client::connect(&socket).unwrap();
    good.write(0, &[9; 512]).unwrap();
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        b"\0\0\0\x03GET / HTTP/1.1\r\n",
        b"\0\0\0\x03IHAVEOPT\0\0\0\x03\xff\xff\xff\xff",
    ] {
        let mut bad = UnixStream::connect(&socket).unwrap();
        bad.write_all(bytes).unwrap();
        let mut rest = Vec::new();
        // Bytes that it had not read make the host call the end a reset.
        let _ = bad.read_to_end(&mut rest);
        assert!(rest.starts_with(b"NBDMAGIC"));
    }
    let mut bad = Client::connect(&socket).unwrap();
    bad.stream.write_all(&[0; 28]).unwrap();
    assert!(bad.is_closed());
    assert_eq!(good.read(0, 512).unwrap(), [9; 512]);
    wait_for("the others to go", || (connections(&server) == 1).then_some(()));
    server.stop(Signal::TERM);
}

#[test]
fn a_stop_does_not_wait_for_clients_that_do_not_read() {
    let (_scratch, server, socket) = serving(&["--cores", "0"]);
    let mut deaf = Client::connect(&socket).unwrap();
    deaf.write(0, &vec![5; 1 << 20]).unwrap();
    for _ in 0..20 {
        deaf.send(command::READ, 0, 0, 1 << 20, &[]).unwrap();
    }
    let mut other = Client::connect(&socket).unwrap();
    assert_eq!(other.read(0, 512).unwrap(), [5; 512], "nor does anybody else");
    server.stop(Signal::TERM);
    assert!(!socket.exists());
    drop(deaf);
}

#[test]
fn device_errors_are_the_clients_to_see() {
    let (_scratch, server, socket) = serving(&[]);
    server.call("nbd_export_remove", json!({"socket": socket}));
    server.call("bdev_error_create", json!({"base_name": "M"}));
    server.call("nbd_export_add", json!({"bdev_name": "EE_M", "socket": socket}));
    let mut client = Client::connect(&socket).unwrap();
    client.write(0, &[4; 512]).unwrap();
    let inject = |io: &str| {
        server
            .call("bdev_error_inject_error", json!({"name": "EE_M", "io_type": io, "error_type": "failure", "num": 1}));
    };
    inject("read");
    assert_eq!(client.read(0, 512), Err(Failure::Refused(5)));
    assert_eq!(client.read(0, 512).unwrap(), [4; 512]);
    inject("write");
    assert_eq!(client.write(0, &[6; 300 * 512]), Err(Failure::Refused(5)), "one piece of several fails");
    inject("flush");
    assert_eq!(client.flush(), Err(Failure::Refused(5)));
    client.flush().unwrap();
    server.stop(Signal::TERM);
}
