//! What `ctrlr_loss_timeout_sec`, `reconnect_delay_sec` and `fast_io_fail_timeout_sec` promise, and what a failover port is
//! for, to the second of virtual time.

mod stage;

use std::sync::Arc;

use bdev::core::{IoStatus, IoTag, Op, OpKind};
use bdev::modules::error::{self, Fault};
use bdev::modules::malloc::{self, MallocOptions};
use bdev::modules::uring;
use initiator::InitiatorError;
use initiator::head::NO_PATH;
use initiator::path::PathState;
use initiator::system::{Multipath, Settings};
use nvmf::host::OnTimeout;
use nvmf::target::controller::COMMAND_QUIESCE_TIME;
use nvmf::target::model::NewNamespace;
use nvmf::target::view::TransportKind;
use ringstone_sim::seeds;
use ringstone_sim::target::{NQN, address};
use stage::{BDEV, SOON, Stage, near, second, seconds};

fn timeouts(kind: TransportKind, seed: u64) {
    let mut stage = Stage::new(kind, seed);
    stage.attach(address(), Multipath::Multipath, (11, 2, 5)).expect("it can be attached");
    let probe = stage.probe();
    assert_eq!(stage.run(&probe, Op::Read).0, IoStatus::Success);
    // One that is lost as soon as it is there is not connected again at once.
    stage.world.run_for(seconds(3));
    let before = stage.sim.attempts(address()).len();
    let lost = stage.lose(address());
    // Each reactor hears of it; a write that was sent before would be held until it is fenced.
    stage.world.run_for(SOON);
    let (status, at) = stage.run(&probe, if seed.is_multiple_of(2) { Op::Read } else { Op::Write { fua: false } });
    assert_eq!(status, NO_PATH);
    near(at, lost + seconds(5));
    // Others do not wait then.
    let began = stage.now();
    let (status, at) = stage.run(&probe, Op::Read);
    assert_eq!((status, at < began + SOON), (NO_PATH, true));
    assert_eq!(stage.state(), PathState::Reconnecting);
    let initiator = Arc::clone(&stage.initiator);
    stage.close(probe);
    stage.world.run_until("the controller to be given up", |_| initiator.groups().is_empty());
    let gone = stage.now();
    near(gone, lost + seconds(11));
    assert!(stage.world.system().get(BDEV).is_err(), "its bdev goes with it");
    // One at once, then one every two seconds, as long as there is time.
    let attempts = stage.sim.attempts(address()).split_off(before);
    assert_eq!(attempts.len(), 6, "{attempts:?}");
    near(attempts[0], lost);
    attempts.windows(2).for_each(|pair| near(pair[1], pair[0] + seconds(2)));
    stage.world.run_for(seconds(30));
    assert_eq!(stage.sim.attempts(address()).len(), before + 6, "it stays given up");
    stage.finish();
}

#[test]
fn io_fails_in_time_and_so_goes_the_controller() {
    seeds::each("io_fails_in_time_and_so_goes_the_controller", 10, &[], |seed| timeouts(TransportKind::Tcp, seed));
}

#[test]
fn io_fails_in_time_and_so_goes_the_controller_rdma() {
    seeds::each("io_fails_in_time_and_so_goes_the_controller_rdma", 10, &[], |seed| {
        timeouts(TransportKind::Rdma, seed)
    });
}

fn for_ever(kind: TransportKind, seed: u64) {
    let mut stage = Stage::new(kind, seed);
    let fails = seed.is_multiple_of(2);
    stage.attach(address(), Multipath::Multipath, (-1, 3, if fails { 7 } else { 0 })).expect("it can be attached");
    let probe = stage.probe();
    let before = stage.sim.attempts(address()).len();
    let lost = stage.lose(address());
    stage.submit(&probe, Op::Read);
    stage.world.run_for(seconds(300));
    if fails {
        assert_eq!(Stage::taken(&probe), Some(NO_PATH));
        stage.submit(&probe, Op::Read);
        assert_eq!(stage.ended(&probe).0, NO_PATH);
    } else {
        assert_eq!(Stage::taken(&probe), None, "it waits");
    }
    let attempts = stage.sim.attempts(address()).len() - before;
    assert!((98..=102).contains(&attempts), "{attempts} attempts since {lost:?}");
    stage.listen(address(), true);
    let initiator = Arc::clone(&stage.initiator);
    stage.world.run_until("it to be back", |_| initiator.groups()[0].paths()[0].view().state == PathState::Enabled);
    // Each reactor hears of it.
    stage.world.run_for(SOON);
    let (status, _) = if fails { stage.run(&probe, Op::Read) } else { stage.ended(&probe) };
    assert_eq!(status, IoStatus::Success, "the same bdev goes on");
    stage.close(probe);
    stage.finish();
}

#[test]
fn attempts_go_on_for_ever_where_that_is_asked_for() {
    seeds::each("attempts_go_on_for_ever_where_that_is_asked_for", 4, &[], |seed| for_ever(TransportKind::Tcp, seed));
}

#[test]
fn attempts_go_on_for_ever_where_that_is_asked_for_rdma() {
    seeds::each("attempts_go_on_for_ever_where_that_is_asked_for_rdma", 4, &[], |seed| {
        for_ever(TransportKind::Rdma, seed)
    });
}

fn once(kind: TransportKind, seed: u64) {
    let mut stage = Stage::new(kind, seed);
    stage.attach(address(), Multipath::Multipath, (0, 0, 0)).expect("it can be attached");
    // A connection that breaks is made again at once, and nobody notices.
    let probe = stage.probe();
    stage.sim.break_connections(100);
    assert_eq!(stage.run(&probe, Op::Read).0, IoStatus::Success);
    stage.world.run_for(seconds(3));
    let before = stage.sim.attempts(address()).len();
    stage.lose(address());
    let (status, _) = stage.run(&probe, Op::Read);
    assert!(status == NO_PATH || status == IoStatus::NoDevice || status == IoStatus::Aborted, "{status}");
    stage.close(probe);
    let initiator = Arc::clone(&stage.initiator);
    stage.world.run_until("the controller to go", |_| initiator.groups().is_empty());
    assert_eq!(stage.sim.attempts(address()).len(), before + 1);
    stage.finish();
}

#[test]
fn without_a_loss_timeout_there_is_one_attempt() {
    seeds::each("without_a_loss_timeout_there_is_one_attempt", 10, &[], |seed| once(TransportKind::Tcp, seed));
}

#[test]
fn without_a_loss_timeout_there_is_one_attempt_rdma() {
    seeds::each("without_a_loss_timeout_there_is_one_attempt_rdma", 10, &[], |seed| once(TransportKind::Rdma, seed));
}

fn failover(kind: TransportKind, seed: u64) {
    let mut stage = Stage::new(kind, seed);
    stage.listen(second(), true);
    stage
        .attach(
            address(),
            Multipath::Multipath,
            (if seed.is_multiple_of(2) { 0 } else { 60 }, u64::from(!seed.is_multiple_of(2)), 0),
        )
        .expect("it can be attached");
    let refused = stage.attach(second(), Multipath::Disable, (0, 0, 0)).expect_err("the name is taken");
    assert!(matches!(refused, InitiatorError::Exists { .. }) && refused.to_string().contains("Nvme0"));
    assert_eq!(stage.attach(second(), Multipath::Failover, (0, 0, 0)).expect("it leads to the same"), [BDEV]);
    let again = stage.attach(second(), Multipath::Failover, (0, 0, 0)).expect_err("it is known");
    assert!(matches!(again, InitiatorError::SamePath { .. }), "{again}");
    let group = Arc::clone(&stage.initiator.groups()[0]);
    assert_eq!((group.paths().len(), stage.port()), (1, address()));
    let probe = stage.probe();
    let idle = stage.sim.attempts(second()).len();
    for _ in 0..5 {
        assert_eq!(stage.run(&probe, Op::Write { fua: false }).0, IoStatus::Success);
    }
    stage.world.run_for(seconds(20));
    assert_eq!(
        (stage.sim.attempts(second()).len(), stage.port()),
        (idle, address()),
        "it is there for when this one fails"
    );
    // To the second, and there to stay; and back when that one fails.
    for (gone, used) in [(address(), second()), (second(), address())] {
        stage.lose(gone);
        assert_eq!(stage.run(&probe, Op::Read).0, IoStatus::Success);
        assert_eq!(stage.port(), used);
        stage.listen(gone, true);
        stage.world.run_for(seconds(20));
        assert_eq!(stage.port(), used, "what works is used");
    }
    assert_eq!(group.paths()[0].addresses()[1].site.socket, second());
    // The port in use is taken away: the other one is used, and is the only one.
    let initiator = Arc::clone(&stage.initiator);
    let detached = async move { initiator.detach("Nvme0", |at| at.site.socket == address()).await };
    stage.world.block_on("a port to go", detached).expect("there is another");
    assert_eq!(stage.run(&probe, Op::Read).0, IoStatus::Success);
    assert_eq!((stage.port(), group.paths()[0].addresses().len()), (second(), 1));
    stage.close(probe);
    stage.finish();
}

#[test]
fn a_failover_port_is_used_when_the_other_fails() {
    seeds::each("a_failover_port_is_used_when_the_other_fails", 20, &[], |seed| failover(TransportKind::Tcp, seed));
}

#[test]
fn a_failover_port_is_used_when_the_other_fails_rdma() {
    seeds::each("a_failover_port_is_used_when_the_other_fails_rdma", 20, &[], |seed| {
        failover(TransportKind::Rdma, seed)
    });
}

/// A command hangs at the target, whose connections are well.
fn hangs(kind: TransportKind, seed: u64) {
    let action = [OnTimeout::GiveUp, OnTimeout::Tell, OnTimeout::Nothing][(seed % 3) as usize];
    let mut stage = Stage::new(kind, seed);
    let settings = Settings { io_timeout: seconds(8), on_timeout: action, ..Settings::default() };
    stage.initiator.set_settings(settings).expect("nothing is attached");
    let (system, nvmf) = (Arc::clone(stage.world.system()), Arc::clone(&stage.target.nvmf));
    let made = async move {
        malloc::create(&system, "base", None, MallocOptions::new(4096, 64)).await.expect("the name is free");
        error::create(&system, None, "base").await.expect("nobody has it");
        nvmf.remove_namespace(NQN, 1).await.expect("it is there");
        nvmf.add_namespace(NQN, NewNamespace::default(), "EE_base").await.expect("a namespace");
    };
    stage.world.block_on("a volume that hangs", made);
    stage.attach(address(), Multipath::Multipath, (-1, 1, 0)).expect("it can be attached");
    let probe = stage.probe();
    // Its queue is connected when it is used first.
    assert_eq!(stage.run(&probe, Op::Read).0, IoStatus::Success);
    stage.world.run_for(seconds(3));
    let before = stage.sim.attempts(address()).len();
    error::inject(stage.world.system(), "EE_base", &[OpKind::Read], Fault::Pending, 1, 0).expect("it is there");
    let began = stage.now();
    stage.submit(&probe, Op::Read);
    match action {
        OnTimeout::Nothing => {
            stage.world.run_for(seconds(100));
            assert_eq!(Stage::taken(&probe), None, "it is waited for");
            // Whoever wants it to end aborts it.
            let tag = IoTag { client: probe.client, user: 1 };
            assert!(probe.runtime.borrow_mut().abort(probe.channel, tag));
            stage.world.wake(probe.reactor);
            let asked = stage.now();
            let (status, at) = stage.ended(&probe);
            assert_eq!(status, IoStatus::Aborted);
            near(at, asked);
        }
        OnTimeout::Tell => {
            let (status, at) = stage.ended(&probe);
            assert_eq!(status, IoStatus::Aborted);
            // Ages are looked at eight times in a timeout.
            assert!(at + SOON >= began + seconds(8) && at < began + seconds(10), "{began:?} {at:?}");
        }
        OnTimeout::GiveUp => {
            let initiator = Arc::clone(&stage.initiator);
            stage.world.run_until("the path to be reset", |_| {
                initiator.groups()[0].paths()[0].view().state != PathState::Enabled
            });
            let at = stage.now();
            assert!(at + SOON >= began + seconds(8) && at < began + seconds(10), "{began:?} {at:?}");
            // The target aborts what nobody waits for, and takes the host back: the read is sent again.
            assert_eq!(stage.ended(&probe).0, IoStatus::Success);
        }
    }
    let again = stage.sim.attempts(address()).len() - before;
    assert_eq!(again > 0, action == OnTimeout::GiveUp, "otherwise the connection stays");
    assert_eq!(stage.run(&probe, Op::Read).0, IoStatus::Success);
    stage.close(probe);
    stage.finish_after(&["EE_base", "base"]);
}

#[test]
fn a_command_that_hangs_is_aborted_reset_or_waited_for() {
    seeds::each("a_command_that_hangs_is_aborted_reset_or_waited_for", 12, &[], |seed| hangs(TransportKind::Tcp, seed));
}

#[test]
fn a_command_that_hangs_is_aborted_reset_or_waited_for_rdma() {
    seeds::each("a_command_that_hangs_is_aborted_reset_or_waited_for_rdma", 12, &[], |seed| {
        hangs(TransportKind::Rdma, seed)
    });
}

/// A command hangs in the target's device, which nobody can abort, when its connection is lost: the target takes its host back,
/// at once if the command only reads, and in the time that it tells (CQT) if it writes.
fn let_in(kind: TransportKind, seed: u64) {
    const VOLUME: &str = "disk";
    let mut stage = Stage::new(kind, seed);
    let path = std::path::PathBuf::from("/volumes/disk.img");
    stage.world.platform().files().create(&path, 64 * 4096).expect("a new file");
    let (system, nvmf) = (Arc::clone(stage.world.system()), Arc::clone(&stage.target.nvmf));
    let made = async move {
        let flavor = uring::Flavor::Uring;
        let options = uring::FileOptions { flavor, path, block_size: Some(4096), read_only: false, fallocate: None };
        uring::create(&system, VOLUME, None, options).await.expect("the name is free");
        nvmf.remove_namespace(NQN, 1).await.expect("it is there");
        nvmf.add_namespace(NQN, NewNamespace::default(), VOLUME).await.expect("a namespace");
    };
    stage.world.block_on("a volume on a disk", made);
    stage.attach(address(), Multipath::Multipath, (-1, 1, 0)).expect("it can be attached");
    let probe = stage.probe();
    assert_eq!(stage.run(&probe, Op::Read).0, IoStatus::Success);
    stage.world.run_for(seconds(3));
    let writes = seed.is_multiple_of(2);
    let usual = stage.sim.disk(|rules| std::mem::replace(&mut rules.latency_ns, (60_000_000_000, 60_000_000_000)));
    stage.submit(&probe, if writes { Op::Write { fua: false } } else { Op::Read });
    stage.world.run_for(SOON);
    stage.sim.disk(|rules| rules.latency_ns = usual);
    stage.sim.break_connections(100);
    let lost = stage.now();
    let initiator = Arc::clone(&stage.initiator);
    let state = move || initiator.groups()[0].paths()[0].view().state;
    stage.world.run_until("the loss to be noticed", |_| state() != PathState::Enabled);
    stage.world.run_until("the path to be back", |_| state() == PathState::Enabled);
    let back = stage.now();
    let (soonest, latest) = match writes {
        // Attempts are a second apart.
        true => (COMMAND_QUIESCE_TIME, COMMAND_QUIESCE_TIME + seconds(1)),
        false => (seconds(0), seconds(1)),
    };
    assert!(back >= lost + soonest && back < lost + latest + SOON, "{writes}: {:?}", back.since(lost));
    let (status, at) = stage.ended(&probe);
    assert_eq!(status, IoStatus::Success);
    // What writes is sent again when it can no longer land, as far as the host is told.
    let fence = seconds(20) + COMMAND_QUIESCE_TIME;
    if writes {
        near(at, lost + fence)
    } else {
        near(at, back)
    }
    stage.close(probe);
    stage.finish_after(&[VOLUME]);
}

#[test]
fn a_host_is_let_in_although_a_command_of_its_earlier_connection_hangs() {
    seeds::each("a_host_is_let_in_although_a_command_of_its_earlier_connection_hangs", 10, &[], |seed| {
        let_in(TransportKind::Tcp, seed)
    });
}

#[test]
fn a_host_is_let_in_although_a_command_of_its_earlier_connection_hangs_rdma() {
    seeds::each("a_host_is_let_in_although_a_command_of_its_earlier_connection_hangs_rdma", 10, &[], |seed| {
        let_in(TransportKind::Rdma, seed)
    });
}
