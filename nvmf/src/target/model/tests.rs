//! Random edits, checked against what must hold after each.

use std::sync::Arc;

use bdev::core::{BdevInfo, Geometry};
use zerocopy::IntoBytes;

use super::*;
use crate::target::system::testing::{Rng, World};

const NQNS: [&str; 4] =
    ["nqn.2026-11.io.example:a", "nqn.2026-11.io.example:b", "nqn.2026-11.io.example:c", "not-an-nqn"];

fn tcp(port: u16) -> ListenAddress {
    ListenAddress { trtype: TransportKind::Tcp, traddr: [127, 0, 0, 1].into(), trsvcid: port }
}

fn listener(port: u16) -> NewListener {
    NewListener { address: tcp(port), ana_state: None, sock_impl: None }
}

fn subsystem(nqn: &str) -> NewSubsystem {
    NewSubsystem { nqn: nqn.to_owned(), ..NewSubsystem::default() }
}

/// A model with a transport and a subsystem.
fn model() -> Model {
    let mut model = Model::new();
    model.create_transport(TransportKind::Tcp, TransportOptions::default()).unwrap();
    model.create_subsystem(subsystem(NQNS[0])).unwrap();
    model
}

/// The logs that hosts read, by host and by where they came in.
fn read(view: &TargetView) -> Vec<Vec<u8>> {
    let hosts = ["nqn.2026-11.io.example:h0", "nqn.2026-11.io.example:h1", "nqn.2026-11.io.example:h2"];
    let reads = hosts.iter().flat_map(|host| (0..4).map(move |port| (*host, tcp(port))));
    let log = |(host, came_in): (&str, ListenAddress)| {
        let entries = crate::target::discovery::entries(view, host, &came_in, came_in.traddr);
        entries.iter().flat_map(|entry| entry.as_bytes().to_vec()).collect()
    };
    reads.map(log).collect()
}

/// Everything that a discovery log is made of, from the view alone.
fn logs(view: &TargetView) -> String {
    let mut text = format!("{:?} {:?} {:?}", view.discovery_filter, view.discovery_listeners, view.referrals);
    for subsystem in view.subsystems.values().filter(|subsystem| !subsystem.listeners.is_empty()) {
        let hosts = if subsystem.allow_any_host { "any".into() } else { format!("{:?}", subsystem.hosts) };
        let ports = subsystem.listeners.iter().map(|listener| (&listener.address, listener.port_id));
        text += &format!(" {} {hosts} {:?}", subsystem.nqn, ports.collect::<Vec<_>>());
    }
    text
}

fn edit(model: &mut Model, rng: &mut Rng, bdevs: &[Arc<BdevInfo>]) -> Result<(), ModelError> {
    let nqn = *rng.pick(&NQNS);
    let (nsid, port) = (rng.below(6) as u32, rng.below(4) as u16);
    let host = *rng.pick(&["nqn.2026-11.io.example:h0", "nqn.2026-11.io.example:h1", "h"]);
    let or_discovery = if rng.below(4) == 0 { "discovery" } else { nqn };
    match rng.below(16) {
        0..=1 => model.create_subsystem(NewSubsystem {
            allow_any_host: rng.below(2) == 0,
            max_namespaces: Some(4),
            ana_reporting: rng.below(2) == 0,
            serial_number: (rng.below(4) == 0).then(|| "S".repeat(rng.below(24))),
            min_cntlid: (rng.below(4) == 0).then(|| rng.next() as u16),
            max_cntlid: (rng.below(4) == 0).then(|| rng.next() as u16),
            ..subsystem(nqn)
        }),
        2 => model.delete_subsystem(nqn).map(drop),
        3..=5 => {
            let new = NewNamespace {
                nsid: Some(nsid),
                anagrpid: (rng.below(4) == 0).then(|| rng.below(6) as u32),
                eui64: (rng.below(4) == 0).then(|| [rng.below(3) as u8; 8]),
                ..NewNamespace::default()
            };
            let incarnation = model.draw_incarnation();
            model.add_namespace(nqn, &new, incarnation, rng.pick(bdevs), Geometry::new(512, 8)).map(drop)
        }
        6 => model.remove_namespace(nqn, nsid).map(drop),
        7 => {
            model.resize_namespace(rng.next() % 40, Geometry::new(512, rng.next() % 9));
            Ok(())
        }
        8 => model.set_ana_group(nqn, nsid, rng.below(6) as u32),
        9 => model.add_host(nqn, host),
        10 => model.remove_host(nqn, host),
        11 => model.allow_any_host(nqn, rng.below(2) == 0),
        12..=13 => model.add_listener(or_discovery, listener(port)),
        14 => match rng.below(2) {
            0 => model.remove_listener(or_discovery, &tcp(port)),
            _ => model.set_ana_state(nqn, &tcp(port), AnaState::Inaccessible, Some(rng.below(6) as u32)),
        },
        _ => match rng.below(3) {
            0 => {
                let subnqn = DISCOVERY_NQN.to_owned();
                let secure_channel = rng.below(4) == 0;
                model.add_referral(Referral { address: tcp(port), subnqn, secure_channel })
            }
            1 => model.remove_referral(&tcp(port), DISCOVERY_NQN),
            _ => {
                let mut settings = model.settings().clone();
                settings.discovery_filter.address = rng.below(2) == 0;
                settings.max_subsystems = rng.below(6) as u32;
                model.set_settings(settings)
            }
        },
    }
}

/// What must hold of every view.
fn check(view: &TargetView) {
    for (nqn, subsystem) in &view.subsystems {
        assert_eq!(*nqn, subsystem.nqn);
        names::check_nqn("nqn", nqn).unwrap();
        names::check_ascii("serial_number", &subsystem.serial_number, MAX_SERIAL_BYTES).unwrap();
        assert!(1 <= subsystem.min_cntlid && subsystem.min_cntlid <= subsystem.max_cntlid);
        assert!(subsystem.max_cntlid <= MAX_CNTLID);
        for (&nsid, namespace) in &subsystem.namespaces {
            assert_eq!(nsid, namespace.nsid);
            assert!((1..=subsystem.max_namespaces).contains(&nsid));
            assert!((1..=subsystem.max_namespaces).contains(&namespace.anagrpid));
            for other in subsystem.namespaces.values().filter(|other| other.nsid != nsid) {
                assert!(other.uuid != namespace.uuid && other.nguid != namespace.nguid);
                assert!(other.eui64.is_none() || other.eui64 != namespace.eui64);
            }
        }
        for listener in &subsystem.listeners {
            let same = subsystem.listeners.iter().filter(|other| other.address == listener.address);
            assert_eq!(same.count(), 1);
            assert!(listener.ana_states.keys().all(|group| (1..=subsystem.max_namespaces).contains(group)));
        }
    }
    let listeners = || view.subsystems.values().flat_map(|subsystem| &subsystem.listeners);
    for (one, other) in listeners().flat_map(|one| listeners().map(move |other| (one, other))) {
        assert_eq!(one.address == other.address, one.port_id == other.port_id, "a port has one identifier");
    }
}

#[test]
fn random_edits_keep_the_rules() {
    let world = World::new(0);
    let bdevs: Vec<_> = (0..6).map(|n| world.add_bdev(&format!("b{n}"), 8)).collect();
    let (mut made, mut refused) = (0, 0);
    for seed in 0..60 {
        let mut rng = Rng(seed);
        let mut model = Model::new();
        model.create_transport(TransportKind::Tcp, TransportOptions::default()).unwrap();
        for _ in 0..120 {
            let (before, saved) = (model.view(), model.save());
            let result = edit(&mut model, &mut rng, &bdevs);
            let after = model.view();
            check(&after);
            let changed = after.generation != before.generation;
            match &result {
                Ok(()) => made += 1,
                Err(error) => {
                    refused += 1;
                    assert!(!changed && model.save() == saved, "seed {seed}: {error} changed something");
                    assert!(!error.reason.is_empty() && !error.fix.is_empty());
                }
            }
            let newer = after.discovery_generation != before.discovery_generation;
            assert_eq!(newer, logs(&after) != logs(&before));
            assert!(newer || read(&after) == read(&before), "seed {seed}: hosts are not told of a change");
            assert!(changed || model.save() == saved, "seed {seed}: a change without a view");
            // Only one subsystem can have been touched: the others are the same.
            let touched = after
                .subsystems
                .iter()
                .filter(|(nqn, new)| before.subsystems.get(*nqn).is_none_or(|old| !Arc::ptr_eq(old, new)));
            assert!(touched.count() <= 1, "seed {seed}");
        }
    }
    assert!(made > 1000 && refused > 1000, "{made} made, {refused} refused");
}

#[test]
fn a_recreated_subsystem_is_a_new_one() {
    let mut model = model();
    let first = model.view().subsystems[NQNS[0]].clone();
    model.delete_subsystem(NQNS[0]).unwrap();
    model.create_subsystem(subsystem(NQNS[0])).unwrap();
    let second = model.view().subsystems[NQNS[0]].clone();
    assert!(second.incarnation > first.incarnation);
    assert_eq!(second.serial_number, first.serial_number);
}

#[test]
fn the_lowest_free_nsid_is_taken_and_the_last_is_the_limit() {
    let world = World::new(0);
    let mut model = Model::new();
    model.create_subsystem(NewSubsystem { max_namespaces: Some(3), ..subsystem(NQNS[0]) }).unwrap();
    let add = |model: &mut Model, n: u32| {
        let bdev = world.add_bdev(&format!("b{n}"), 8);
        let incarnation = model.draw_incarnation();
        model.add_namespace(NQNS[0], &NewNamespace::default(), incarnation, &bdev, Geometry::new(512, 8))
    };
    assert_eq!((add(&mut model, 0), add(&mut model, 1), add(&mut model, 2)), (Ok(1), Ok(2), Ok(3)));
    assert_eq!(add(&mut model, 3).unwrap_err().kind, ModelErrorKind::Full);
    model.remove_namespace(NQNS[0], 2).unwrap();
    assert_eq!(add(&mut model, 4), Ok(2));
}

#[test]
fn there_are_limits() {
    let mut model = model();
    model.set_settings(Settings { max_subsystems: 3, ..Settings::default() }).unwrap();
    model.create_subsystem(subsystem(NQNS[1])).unwrap();
    assert_eq!(model.create_subsystem(subsystem(NQNS[2])).unwrap_err().kind, ModelErrorKind::Full);
    for n in 0..MAX_HOSTS {
        model.add_host(NQNS[0], &format!("nqn.2026-11.io.example:{n}")).unwrap();
    }
    let error = model.add_host(NQNS[0], "nqn.2026-11.io.example:more").unwrap_err();
    assert_eq!((error.kind, error.field), (ModelErrorKind::Full, "host"));
    for port in 0..MAX_ADDRESSES as u16 {
        model.add_listener("discovery", listener(1 + port)).unwrap();
    }
    let error = model.add_listener(NQNS[0], listener(60000)).unwrap_err();
    assert_eq!((error.kind, error.field), (ModelErrorKind::Full, "listen_address"));
    // One that is open already needs no more room.
    model.add_listener(NQNS[0], listener(1)).unwrap();
    for port in 0..MAX_REFERRALS as u16 {
        let subnqn = DISCOVERY_NQN.to_owned();
        model.add_referral(Referral { address: tcp(1 + port), subnqn, secure_channel: false }).unwrap();
    }
    let more = Referral { address: tcp(60000), subnqn: DISCOVERY_NQN.to_owned(), secure_channel: false };
    assert_eq!(model.add_referral(more).unwrap_err().kind, ModelErrorKind::Full);
}

#[test]
fn a_port_keeps_its_identifier_while_anybody_listens() {
    let mut model = model();
    model.create_subsystem(subsystem(NQNS[1])).unwrap();
    for (nqn, port) in [(NQNS[0], 1), (NQNS[0], 2), (NQNS[1], 2)] {
        model.add_listener(nqn, listener(port)).unwrap();
    }
    let ids = |model: &Model, nqn: &str| -> Vec<u16> {
        model.view().subsystems[nqn].listeners.iter().map(|listener| listener.port_id).collect()
    };
    assert_eq!((ids(&model, NQNS[0]), ids(&model, NQNS[1])), (vec![0, 1], vec![1]));
    model.delete_subsystem(NQNS[0]).unwrap();
    model.add_listener(NQNS[1], listener(3)).unwrap();
    assert_eq!(ids(&model, NQNS[1]), [1, 0]);
}
