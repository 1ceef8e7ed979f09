//! Many hosts, and hosts that come and go.

use std::io::Write;

use nvmf::spec::Status;
use nvmf::spec::opcode::io;
use nvmf::tcp::wire_client::{command, read, write, write_in_capsule};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::wait_for;
use crate::host::{BLOCK, NQN, Target};

/// A sum over the poll groups.
fn total(target: &Target, key: &str) -> u64 {
    let stats = target.server.call("nvmf_get_stats", json!({}));
    stats["poll_groups"].as_array().unwrap().iter().map(|group| group[key].as_u64().unwrap()).sum()
}

const CURRENT: [&str; 3] = ["current_admin_qpairs", "current_io_qpairs", "current_unassociated_qpairs"];

#[track_caller]
fn wait_until_all_have_gone(target: &Target) {
    wait_for("all connections have gone", || {
        let open = CURRENT.iter().map(|key| total(target, key)).sum::<u64>();
        let controllers = target.server.call("nvmf_subsystem_get_controllers", json!({ "nqn": NQN }));
        (open == 0 && controllers == json!([])).then_some(())
    });
}

#[test]
fn two_hundred_connections_at_once() {
    let target = Target::start();
    let files = target.server.open_files();
    {
        let mut hosts: Vec<_> = (0..100)
            .map(|_| {
                let (admin, cntlid) = target.admin();
                (admin, target.io(cntlid, 1))
            })
            .collect();
        assert_eq!((total(&target, CURRENT[0]), total(&target, CURRENT[1])), (100, 100));
        // All ask before any reads an answer.
        let data = [3; BLOCK as usize];
        for (n, (_, queue)) in hosts.iter_mut().enumerate() {
            queue.send_command(&write_in_capsule(1, 1, n as u64, 1, BLOCK), &data);
            queue.send_command(&command(io::FLUSH, 2, 1), &[]);
        }
        for (_, queue) in &mut hosts {
            let mut answers = [queue.response(), queue.response()].map(|cqe| (cqe.cid.get(), cqe.status()));
            answers.sort_by_key(|answer| answer.0);
            assert_eq!(answers, [(1, Status::SUCCESS), (2, Status::SUCCESS)]);
        }
        let (admin, queue) = &mut hosts[57];
        assert_eq!(queue.read(read(3, 1, 99, 1, BLOCK)), (Status::SUCCESS, data.to_vec()));
        assert_eq!(admin.property(0x1c, 4), 1);
    }
    wait_until_all_have_gone(&target);
    wait_for("their file descriptors are closed", || (target.server.open_files() <= files).then_some(()));
    target.still_serves();
}

/// What a server holds that hosts could leave behind.
fn holdings(target: &Target) -> (usize, Value, u64) {
    let channels = target.server.call("thread_get_io_channels", json!({}));
    let references = channels["threads"].clone();
    (target.server.open_files(), references, total(target, "pending_bdev_io"))
}

#[test]
fn five_hundred_hosts_come_and_go() {
    let target = Target::start();
    // Once first, so that everything that is made on demand is there.
    visit(&target, 0);
    wait_until_all_have_gone(&target);
    let before = wait_for("rest", || settled(&target));
    let pools = target.server.call("iobuf_get_stats", json!({}));
    for n in 0..500 {
        visit(&target, n);
    }
    wait_until_all_have_gone(&target);
    wait_for("as before", || (settled(&target)? == before).then_some(()));
    // Nobody ever had to wait for memory, at the end no more than at the beginning.
    let after = target.server.call("iobuf_get_stats", json!({}));
    let retries = |pools: &Value| {
        pools
            .as_array()
            .unwrap()
            .iter()
            .map(|m| [&m["small_pool"]["retry"], &m["large_pool"]["retry"]].map(Value::clone))
            .collect::<Vec<_>>()
    };
    assert_eq!(retries(&after), retries(&pools));
    assert_eq!(total(&target, "admin_qpairs"), 501);
    // Memory that was lost with each of them would be missing now.
    let (_admin, cntlid) = target.admin();
    let mut queue = target.io(cntlid, 1);
    for cid in 0..31 {
        queue.send_command(&write(cid, 1, 0, 131072 / BLOCK, 131072), &[]);
    }
    for _ in 0..31 {
        queue.r2t();
    }
}

fn settled(target: &Target) -> Option<(usize, Value, u64)> {
    let now = holdings(target);
    (now.2 == 0).then_some(now)
}

/// A host that leaves in one of many ways.
fn visit(target: &Target, n: u32) {
    let (mut admin, cntlid) = target.admin();
    let mut queue = target.io(cntlid, 1);
    match n % 5 {
        0 => {}
        1 => {
            // In the middle of its data.
            queue.send_command(&write(1, 1, 0, 2, 2 * BLOCK), &[]);
            let (_, ttag, ..) = queue.r2t();
            let half = queue.wire.h2c_data(1, ttag, 0, &[1; BLOCK as usize], false);
            queue.send(&half[..half.len() - 7]);
        }
        2 => {
            // Before it has read its answers.
            for cid in 0..20 {
                queue.send_command(&read(cid, 1, 0, 64, 64 * BLOCK), &[]);
            }
        }
        3 => {
            // In the middle of a header.
            let _ = queue.stream.write_all(&[4, 0, 72]);
            let request = admin.admin_command(0x0c, 0, 0, 0);
            admin.send_command(&request, &[]);
        }
        _ => {
            assert_eq!(admin.set_property(0x14, 0x0046_4001), Status::SUCCESS);
            assert_eq!(queue.next_or_end(), None);
        }
    }
}

#[test]
fn a_stop_under_load_is_clean() {
    for signal in [Signal::TERM, Signal::INT] {
        let target = Target::start();
        let (_admin, cntlid) = target.admin();
        let mut queues: Vec<_> = (1..=4).map(|qid| target.io(cntlid, qid)).collect();
        // Some wait for data that never come, some have answers that nobody reads.
        queues[0].send_command(&write(1, 1, 0, 8, 8 * BLOCK), &[]);
        queues[0].r2t();
        for queue in &mut queues[1..] {
            for cid in 0..31 {
                queue.send_command(&read(cid, 1, 0, 256, 256 * BLOCK), &[]);
            }
        }
        target.server.stop(signal);
    }
}

#[test]
fn removing_everything_under_load() {
    let target = Target::start();
    let (mut admin, cntlid) = target.admin();
    let mut queues: Vec<_> = (1..=4).map(|qid| target.io(cntlid, qid)).collect();
    for queue in &mut queues {
        queue.send_command(&write(1, 1, 0, 8, 8 * BLOCK), &[]);
        queue.r2t();
        for cid in 2..20 {
            queue.send_command(&read(cid, 1, 0, 8, 8 * BLOCK), &[]);
        }
    }
    // The bdev goes below the namespace; then the subsystem; then the transport.
    target.server.call("bdev_malloc_delete", json!({"name": "M"}));
    for queue in &mut queues {
        wait_for("the namespace is gone", || {
            queue.send_command(&command(io::FLUSH, 50, 1), &[]);
            loop {
                if let nvmf::tcp::wire_client::TargetPdu::Response(cqe) = queue.next()
                    && cqe.cid.get() == 50
                {
                    let gone = cqe.status() == Status::INVALID_NAMESPACE_OR_FORMAT.dnr();
                    return gone.then_some(());
                }
            }
        });
    }
    assert_eq!(admin.property(0x1c, 4), 1);
    target.server.call("nvmf_delete_subsystem", json!({ "nqn": NQN }));
    for queue in &mut queues {
        assert_eq!(queue.next_or_end(), None);
    }
    assert_eq!(admin.next_or_end(), None);
    assert_eq!(
        target.server.call("nvmf_get_subsystems", json!({})).as_array().unwrap().len(),
        1,
        "only the discovery subsystem"
    );
    target.server.stop(Signal::TERM);
}
