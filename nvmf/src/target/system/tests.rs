//! Changes under delayed, held and missing answers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bdev::core::{BdevError, ClaimKind};
use schema::ConfigSource;
use serde_json::{Value, json};

use super::testing::{Answers, Rng, World};
use super::*;
use crate::target::model::NewNamespace;

const NQN: &str = "nqn.2026-11.io.example:vol0";

fn listen(port: u16) -> Value {
    json!({"trtype": "TCP", "traddr": "127.0.0.1", "trsvcid": port.to_string()})
}

/// A target with a transport and a subsystem.
fn world(seed: u64) -> World {
    let world = World::new(seed);
    world.call("nvmf_create_transport", json!({"trtype": "tcp"})).unwrap();
    world.call("nvmf_create_subsystem", json!({"nqn": NQN, "allow_any_host": true})).unwrap();
    world
}

fn add_ns(bdev: &str) -> Value {
    json!({"nqn": NQN, "namespace": {"bdev_name": bdev}})
}

#[test]
fn a_namespace_claims_its_bdev_until_it_has_drained() {
    let world = world(1);
    let bdev = world.add_bdev("a", 1024);
    assert_eq!(world.call("nvmf_subsystem_add_ns", add_ns("a")), Ok(json!(1)));
    assert_eq!(world.claim(&bdev).kind, Some(ClaimKind::ExclusiveWrite));
    world.reactors.answer(Answers::Held);
    let before = world.executor.now();
    let error = world.call("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 1})).unwrap_err();
    assert_eq!(error.code(), -16);
    assert!(error.message().contains("namespace 1 of nqn.2026-11.io.example:vol0 is removed, but"), "{error}");
    assert_eq!(world.executor.now() - before, PATIENCE);
    // The change is made, and the device stays open for what still uses it.
    assert!(world.reactors.view().subsystems[NQN].namespaces.is_empty());
    assert!(world.claim(&bdev).kind.is_some());
    let error = world.call("nvmf_subsystem_add_ns", add_ns("a")).unwrap_err();
    assert!(error.message().contains("in use by NVMe-oF subsystem nqn.2026-11.io.example:vol0"), "{error}");
    world.reactors.answer(Answers::Late);
    world.settle();
    assert!(world.claim(&bdev).kind.is_none());
    assert_eq!(world.call("nvmf_subsystem_add_ns", add_ns("a")), Ok(json!(1)));
}

#[test]
fn an_addition_does_not_fail_because_something_else_drains() {
    let world = world(2);
    world.add_bdev("a", 1024);
    world.reactors.answer(Answers::Held);
    assert_eq!(world.call("nvmf_subsystem_add_ns", add_ns("a")), Ok(json!(1)));
    assert_eq!(world.reactors.view().subsystems[NQN].namespaces.len(), 1);
}

#[test]
fn a_caller_that_goes_away_leaves_nothing_half_done() {
    let world = world(3);
    let bdev = world.add_bdev("a", 1024);
    let listener = json!({"nqn": NQN, "listen_address": listen(4420)});
    for (method, params) in [
        ("nvmf_subsystem_add_ns", add_ns("a")),
        ("nvmf_subsystem_add_listener", listener.clone()),
        ("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 1})),
        ("nvmf_subsystem_remove_listener", listener),
    ] {
        let call = Box::pin(world.calling(method, params));
        assert!(call.now_or_never().is_none(), "{method} does not answer at once");
        world.settle();
        let view = world.reactors.view();
        let (there, addresses) = (method.contains("add"), &world.system.model(Model::addresses));
        match method.ends_with("ns") {
            true => assert_eq!(view.subsystems[NQN].namespaces.len(), usize::from(there)),
            false => assert_eq!(view.subsystems[NQN].listeners.len(), usize::from(there)),
        }
        assert_eq!(&world.reactors.listening(), addresses);
        assert_eq!(world.claim(&bdev).kind.is_some(), !view.subsystems[NQN].namespaces.is_empty());
    }
}

#[test]
fn a_bdev_that_goes_away_takes_its_namespace_with_it() {
    let world = world(4);
    world.add_bdev("a", 1024);
    world.add_bdev("b", 1024);
    world.call("nvmf_subsystem_add_ns", add_ns("a")).unwrap();
    world.call("nvmf_subsystem_add_ns", add_ns("b")).unwrap();
    world.reactors.answer(Answers::Held);
    let removed = world.run(world.bdevs.remove("a"));
    assert!(matches!(removed, Err(BdevError::StillDraining { .. })), "{removed:?}");
    let left: Vec<u32> = world.reactors.view().subsystems[NQN].namespaces.keys().copied().collect();
    assert_eq!(left, [2]);
    assert!(world.bdevs.get("a").is_ok(), "it is there as long as reactors use it");
    world.reactors.answer(Answers::Late);
    world.settle();
    assert!(world.bdevs.get("a").is_err());
    let error = world.call("nvmf_subsystem_add_ns", add_ns("a")).unwrap_err();
    assert_eq!((error.code(), error.blamed_field()), (-32602, Some("namespace.bdev_name")));
}

#[test]
fn a_bdev_whose_removal_begins_while_it_is_being_added_is_not_added() {
    let world = world(11);
    world.add_bdev("a", 1024);
    let incarnation = world.system.state().model.draw_incarnation();
    let descriptor = world.system.open_device(NQN, "a", incarnation).unwrap();
    let bdevs = Arc::clone(&world.bdevs);
    world.executor.spawn(Box::pin(async move { drop(bdevs.remove("a").await) }));
    // The event comes, and finds no namespace.
    world.settle();
    let entered = world.system.enter_namespace(NQN, &NewNamespace::default(), "a", incarnation, descriptor);
    let error = entered.map(|(nsid, _)| nsid).unwrap_err();
    assert!(matches!(&error, TargetError::Bdev { source: BdevError::BeingRemoved { .. }, .. }), "{error}");
    world.settle();
    assert!(world.bdevs.get("a").is_err(), "its removal has ended");
    assert!(world.system.view().subsystems[NQN].namespaces.is_empty());
}

#[test]
fn a_bdev_that_grows_makes_a_new_view_of_its_namespace_only() {
    let world = world(5);
    world.add_bdev("a", 1024);
    world.add_bdev("b", 1024);
    world.call("nvmf_subsystem_add_ns", add_ns("a")).unwrap();
    world.call("nvmf_subsystem_add_ns", add_ns("b")).unwrap();
    let before = world.reactors.view();
    world.run(world.resizing("a", 4096));
    world.settle();
    let after = world.reactors.view();
    let (old, new) = (&before.subsystems[NQN].namespaces, &after.subsystems[NQN].namespaces);
    assert_eq!((old[&1].geometry.num_blocks, new[&1].geometry.num_blocks), (1024, 4096));
    assert_eq!(old[&1].incarnation, new[&1].incarnation);
    assert!(Arc::ptr_eq(&old[&2], &new[&2]));
    assert_eq!(before.discovery_generation, after.discovery_generation);
    // The same size again is nothing new.
    world.run(world.resizing("a", 4096));
    world.settle();
    assert_eq!(world.reactors.view().generation, after.generation);
}

#[test]
fn subsystems_share_an_address() {
    let world = world(6);
    let other = "nqn.2026-11.io.example:vol1";
    world.call("nvmf_create_subsystem", json!({"nqn": other})).unwrap();
    let on = |nqn: &str| json!({"nqn": nqn, "listen_address": listen(4420)});
    world.call("nvmf_subsystem_add_listener", on(NQN)).unwrap();
    world.call("nvmf_subsystem_add_listener", on(other)).unwrap();
    world.call("nvmf_subsystem_add_listener", on("discovery")).unwrap();
    assert_eq!(world.network.bound().len(), 1);
    let view = world.reactors.view();
    assert_eq!(view.subsystems[NQN].listeners[0].port_id, view.subsystems[other].listeners[0].port_id);
    assert_eq!(view.discovery_listeners.len(), 1);
    world.call("nvmf_subsystem_remove_listener", on(NQN)).unwrap();
    world.call("nvmf_delete_subsystem", json!({"nqn": other})).unwrap();
    assert_eq!(world.network.bound().len(), 1);
    world.call("nvmf_subsystem_remove_listener", on("nqn.2014-08.org.nvmexpress.discovery")).unwrap();
    assert!(world.network.bound().is_empty());
}

#[test]
fn a_refused_address_is_explained_and_leaves_nothing() {
    let world = world(7);
    for (errno, text) in [
        (98, "another program, or another listener"),
        (99, "this machine has no such address; give one of its own"),
        (13, "may not use the port; choose a port from 1024 up"),
        (5, "Input/output error"),
    ] {
        world.network.refuse("127.0.0.1:80".parse().unwrap(), errno);
        let params = json!({"nqn": NQN, "listen_address": listen(80)});
        let error = world.call("nvmf_subsystem_add_listener", params).unwrap_err();
        assert_eq!(error.code(), -32602);
        assert!(error.message().contains(text), "{error}");
        assert!(error.message().contains("127.0.0.1:80"), "{error}");
    }
    assert!(world.reactors.view().subsystems[NQN].listeners.is_empty());
    assert!(world.reactors.listening().is_empty());
}

#[test]
fn shutting_down_closes_everything_and_keeps_what_is_saved() {
    let world = world(8);
    let bdev = world.add_bdev("a", 1024);
    world.call("nvmf_subsystem_add_ns", add_ns("a")).unwrap();
    world.call("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": listen(4420)})).unwrap();
    let saved = world.system.save();
    world.run(world.system.shut_down());
    assert!(world.claim(&bdev).kind.is_none());
    assert!(world.network.bound().is_empty());
    assert!(world.reactors.view().subsystems.is_empty());
    assert_eq!(world.system.save(), saved);
    for (method, params) in [
        ("nvmf_delete_subsystem", json!({"nqn": NQN})),
        ("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": listen(4421)})),
    ] {
        let error = world.call(method, params).unwrap_err();
        assert!(error.message().contains("the server is stopping"), "{error}");
    }
    world.run(world.system.shut_down());
}

#[test]
fn a_target_that_never_served_shuts_down_without_reactors() {
    let world = World::new(9);
    world.call("nvmf_set_max_subsystems", json!({"max_subsystems": 8})).unwrap();
    world.run(world.system.shut_down());
    assert_eq!(world.reactors.view().generation, 0);
}

#[test]
fn reactors_that_stop_answer_every_caller() {
    let world = world(10);
    let bdev = world.add_bdev("a", 1024);
    world.call("nvmf_subsystem_add_ns", add_ns("a")).unwrap();
    world.reactors.answer(Answers::Held);
    let answered = Arc::new(AtomicUsize::new(0));
    let calls = [
        world.calling("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 1})),
        world.calling("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": "nqn.2026-11.io.example:h"})),
    ];
    for call in calls {
        let answered = Arc::clone(&answered);
        world.executor.spawn(Box::pin(async move {
            assert!(call.await.unwrap_err().message().contains("the server is stopping"));
            answered.fetch_add(1, Ordering::SeqCst);
        }));
    }
    world.settle();
    assert_eq!(answered.load(Ordering::SeqCst), 0);
    world.reactors.stop();
    world.settle();
    assert_eq!(answered.load(Ordering::SeqCst), 2);
    assert!(world.claim(&bdev).kind.is_none());
}

/// One random call, or thing that happens to a device.
fn something(world: &World, rng: &mut Rng) -> BoxFuture<'static, ()> {
    let nqn = *rng.pick(&[NQN, "nqn.2026-11.io.example:vol1", "nqn.2026-11.io.example:vol2"]);
    let bdev = *rng.pick(&["a", "b", "c", "d"]);
    let nsid = 1 + rng.below(3) as u32;
    let port = 4420 + rng.below(3) as u16;
    let host = *rng.pick(&["nqn.2026-11.io.example:h0", "nqn.2026-11.io.example:h1"]);
    let or_discovery = if rng.below(4) == 0 { "discovery" } else { nqn };
    let (method, params) = match rng.below(16) {
        0 => {
            let adding = world.adding_bdev(bdev, None, 1024);
            return Box::pin(async move { drop(adding.await) });
        }
        1 => {
            let (bdevs, name) = (Arc::clone(&world.bdevs), bdev.to_owned());
            return Box::pin(async move { drop(bdevs.remove(&name).await) });
        }
        2 => return Box::pin(world.resizing(bdev, 1 + rng.next() % 5000)),
        3..=5 => ("nvmf_subsystem_add_ns", json!({"nqn": nqn, "namespace": {"bdev_name": bdev}})),
        6 => ("nvmf_subsystem_add_ns", json!({"nqn": nqn, "namespace": {"bdev_name": bdev, "nsid": nsid}})),
        7..=8 => ("nvmf_subsystem_remove_ns", json!({"nqn": nqn, "nsid": nsid})),
        9 => ("nvmf_create_subsystem", json!({"nqn": nqn, "allow_any_host": rng.below(2) == 0, "ana_reporting": true})),
        10 => ("nvmf_delete_subsystem", json!({"nqn": nqn})),
        11 => ("nvmf_subsystem_add_listener", json!({"nqn": or_discovery, "listen_address": listen(port)})),
        12 => ("nvmf_subsystem_remove_listener", json!({"nqn": or_discovery, "listen_address": listen(port)})),
        13 => ("nvmf_subsystem_add_host", json!({"nqn": nqn, "host": host})),
        14 => ("nvmf_subsystem_remove_host", json!({"nqn": nqn, "host": host})),
        _ => ("nvmf_subsystem_set_ns_ana_group", json!({"nqn": nqn, "nsid": nsid, "anagrpid": 1 + rng.below(32)})),
    };
    let call = world.calling(method, params);
    match rng.below(8) {
        // A caller that is gone before it has its answer.
        0 => Box::pin(async move { drop(Box::pin(call).now_or_never()) }),
        _ => Box::pin(async move { drop(call.await) }),
    }
}

/// What must hold whenever nothing is under way.
fn check_at_rest(world: &World) {
    assert_eq!(world.reactors.pending(), 0);
    let (view, seen) = (world.system.view(), world.reactors.view());
    assert_eq!(view.generation, seen.generation);
    let mut claimed = BTreeSet::new();
    for namespace in seen.subsystems.values().flat_map(|subsystem| subsystem.namespaces.values()) {
        assert!(claimed.insert(namespace.bdev.name().to_owned()), "a device is one namespace");
        assert_eq!(namespace.geometry, namespace.bdev.device().geometry());
        assert!(!namespace.bdev.is_removing());
    }
    for bdev in world.bdevs.list() {
        assert_eq!(world.claim(&bdev).kind.is_some(), claimed.contains(bdev.name()), "{}", bdev.name());
        assert!(!bdev.is_removing(), "removals have ended");
    }
    assert_eq!(world.system.state().descriptors.len(), claimed.len());
    let addresses = world.system.model(Model::addresses);
    assert_eq!(world.reactors.listening(), addresses);
    assert_eq!(world.network.bound(), addresses.iter().map(ListenAddress::socket_addr).collect());
}

#[test]
fn changes_in_any_order_leave_nothing_open_and_nobody_waiting() {
    let mut served = 0;
    for seed in 0..300 {
        let world = world(seed);
        let mut rng = Rng(seed ^ 0xabcd);
        for name in ["a", "b", "c"] {
            world.add_bdev(name, 1024);
        }
        for _ in 0..6 {
            let (begun, ended) = (1 + rng.below(12), Arc::new(AtomicUsize::new(0)));
            for _ in 0..begun {
                let (one, ended) = (something(&world, &mut rng), Arc::clone(&ended));
                world.executor.spawn(Box::pin(async move {
                    one.await;
                    ended.fetch_add(1, Ordering::SeqCst);
                }));
            }
            world.settle();
            assert_eq!(ended.load(Ordering::SeqCst), begun, "seed {seed}: somebody waits for ever");
            check_at_rest(&world);
            served += world.reactors.view().subsystems.values().map(|s| s.namespaces.len()).sum::<usize>();
        }
        world.run(world.system.shut_down());
        assert!(world.bdevs.list().iter().all(|bdev| world.claim(bdev).kind.is_none()), "seed {seed}");
        assert!(world.network.bound().is_empty());
    }
    assert!(served > 300, "the changes did something: {served}");
}
