//! The host against a target that lies over RDMA: about lengths, commands, keys and what it accepts. A lie about I/O costs a
//! connection, and no I/O; one while connecting is told in words, and leaves nothing behind.

mod stage;

use std::sync::Arc;

use bdev::core::{IoStatus, Op};
use initiator::path::PathState;
use initiator::system::Multipath;
use nvmf::host::Transports;
use nvmf::rdma::host_transport::RdmaHost;
use nvmf::target::view::TransportKind;
use ringstone_sim::rdma::SimFabric;
use ringstone_sim::tamper::{Tamperer, Tampering};
use ringstone_sim::target::address;
use ringstone_sim::{World, seeds};
use stage::{Stage, seconds};

fn stage(seed: u64) -> (Stage, Tamperer) {
    let tamperer = Tamperer::new(seed);
    let by = tamperer.clone();
    let transports = move |world: &World| -> Transports {
        vec![Arc::new(RdmaHost { fabric: Arc::new(by.over(SimFabric::new(world.sim()))) })]
    };
    (Stage::with(TransportKind::Rdma, seed, transports), tamperer)
}

fn lies_about_io(seed: u64) {
    let lie = Tampering::WORK[(seed % Tampering::WORK.len() as u64) as usize];
    let (mut stage, tamperer) = stage(seed);
    stage.attach(address(), Multipath::Multipath, (-1, 1, 0)).expect("it can be attached");
    let probe = stage.probe();
    assert_eq!(stage.run(&probe, Op::Write { fua: false }).0, IoStatus::Success);
    // A path that is lost as soon as it is there is not connected again at once.
    stage.world.run_for(seconds(2));
    let before = stage.sim.attempts(address()).len();
    tamperer.lie(lie, 1 + seed / 7 % 3);
    for op in [Op::Read, Op::Write { fua: false }, Op::Read, Op::Read] {
        assert_eq!(stage.run(&probe, op).0, IoStatus::Success, "{lie:?}");
    }
    assert!(tamperer.told() > 0 && stage.sim.attempts(address()).len() > before, "{lie:?} cost no connection");
    let initiator = Arc::clone(&stage.initiator);
    stage
        .world
        .run_until("the path to be back", |_| initiator.groups()[0].paths()[0].view().state == PathState::Enabled);
    stage.close(probe);
    stage.finish();
}

#[test]
fn a_lie_about_io_costs_a_connection_and_no_io() {
    seeds::each("a_lie_about_io_costs_a_connection_and_no_io", 60, &[], lies_about_io);
}

fn lies_while_connecting(seed: u64) {
    let (lie, words) = Tampering::SETUP[(seed % Tampering::SETUP.len() as u64) as usize];
    let (mut stage, tamperer) = stage(seed);
    tamperer.lie(lie, 1);
    let refused = stage.attach(address(), Multipath::Multipath, (-1, 1, 0));
    let error = refused.expect_err("the admin queue is not to be had").to_string();
    assert!(error.contains(words), "{lie:?}: {error}");
    assert!(stage.initiator.groups().is_empty());
    // Later on it is one of the I/O queues, or the controller when it is connected again.
    stage.attach(address(), Multipath::Multipath, (-1, 1, 0)).expect("it is honest now");
    let probe = stage.probe();
    tamperer.lie(lie, 1 + seed / 5 % 3);
    stage.world.run_for(seconds(2));
    stage.sim.break_connections(100);
    for op in [Op::Read, Op::Write { fua: false }, Op::Read] {
        assert_eq!(stage.run(&probe, op).0, IoStatus::Success, "{lie:?}");
    }
    assert!(tamperer.told() > 1);
    stage.close(probe);
    stage.finish();
}

#[test]
fn a_lie_while_connecting_is_told_in_words() {
    seeds::each("a_lie_while_connecting_is_told_in_words", 50, &[], lies_while_connecting);
}
