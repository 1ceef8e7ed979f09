//! The methods against SPDK's data, and what they say to mistakes.

use std::collections::BTreeMap;

use reactor::ReactorId;
use schema::ConfigSource;
use schema::spdk::Reference;
use serde_json::{Value, json};
use uuid::Uuid;

use super::*;
use crate::target::shared::{ControllerShared, IoCounters};
use crate::target::system::testing::World;
use crate::target::system::{QpairInfo, QpairState};

const NQN: &str = "nqn.2024-01.io.example:vol1";
const HOST: &str = "nqn.2024-01.io.example:host1";

fn reference() -> Option<Reference> {
    Reference::beside(env!("CARGO_MANIFEST_DIR"))
}

fn at(port: u16) -> Value {
    json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string()})
}

/// A target with one of everything.
fn full() -> World {
    let world = World::new(0);
    world.add_bdev_with_uuid("Uring0", Uuid::from_u128(0x4dadce4d_faac_4eb4_8ccf_8b8a6dba70bc));
    for (method, params) in [
        ("nvmf_set_config", json!({"discovery_filters": "transport,svcid"})),
        ("nvmf_set_crdt", json!({"crdt2": 7})),
        ("nvmf_create_transport", json!({"trtype": "TCP", "acceptor_backlog": 77, "max_io_size": 1_048_576})),
        ("nvmf_discovery_add_referral", json!({"address": at(8009)})),
        (
            "nvmf_create_subsystem",
            json!({"nqn": NQN, "serial_number": "VOL0001", "model_number": "Example", "ana_reporting": true,
                   "max_namespaces": 4, "admin_label": "label"}),
        ),
        ("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": HOST})),
        (
            "nvmf_subsystem_add_ns",
            json!({"nqn": NQN, "namespace": {"bdev_name": "Uring0", "nsid": 3, "eui64": "0011223344556677"}}),
        ),
        ("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": at(4420)})),
        ("nvmf_subsystem_add_listener", json!({"nqn": "discovery", "listen_address": at(8009), "sock_impl": "posix"})),
    ] {
        world.call(method, params).unwrap();
    }
    world
}

/// Parameters beyond SPDK's, which does not let its users choose.
const BEYOND: &[&str] = &["nvmf_create_transport.send_with_invalidate: SPDK has no such parameter"];
/// Methods beyond SPDK's.
const OWN: &[&str] = &["nvmf_subsystem_move_qpair"];
/// What replies say beyond SPDK's: where connections are placed by load, it is worth seeing.
const SHOWN: &[&str] = &[
    "load_percent: SPDK has no such key",
    "qpairs_moved_in: SPDK has no such key",
    "qpairs_moved_out: SPDK has no such key",
];

#[test]
fn declarations_are_spdks() {
    let Some(reference) = reference() else { return };
    let mut beyond = Vec::new();
    for method in methods().iter().filter(|method| !OWN.contains(&method.spec.name)) {
        let name = method.spec.name;
        let differences = reference.parameter_differences(&method.spec).unwrap_or_else(|| panic!("SPDK has no {name}"));
        beyond.extend(differences);
    }
    assert_eq!(beyond, BEYOND);
}

/// Everything that was asked of a running SPDK, asked here: the same keys and types come back, and the same error codes.
#[test]
fn a_session_with_spdk_goes_the_same_way() {
    let Some(reference) = reference() else { return };
    let world = World::new(0);
    world.add_bdev_with_uuid("Uring0", Uuid::from_u128(0x4dadce4d_faac_4eb4_8ccf_8b8a6dba70bc));
    let mut asked = 0;
    for sample in reference.samples().filter(|sample| sample.method.starts_with("nvmf_")) {
        asked += 1;
        let what = format!("{} {}", sample.method, sample.params);
        match (world.call(sample.method, sample.params.clone()), sample.outcome) {
            (Ok(ours), Ok(_)) => {
                let mut differences = reference.result_differences(sample.method, &ours).unwrap();
                differences.retain(|difference| !SHOWN.iter().any(|shown| difference.ends_with(shown)));
                assert!(differences.is_empty(), "{what}: {ours}: {differences:?}");
            }
            (Err(error), Err(code)) => assert_eq!(i64::from(error.code()), code, "{what}: {error}"),
            (ours, theirs) => panic!("{what}: {ours:?} here, {theirs:?} there"),
        }
    }
    assert!(asked > 15, "{asked} calls are in the data");
}

#[test]
fn the_saved_configuration_has_spdks_calls() {
    let Some(reference) = reference() else { return };
    let world = full();
    let theirs: BTreeMap<String, Value> = reference
        .samples()
        .filter(|sample| sample.method == "framework_get_config")
        .filter_map(|sample| sample.outcome.ok()?.as_array().cloned())
        .flatten()
        .map(|call| (call["method"].as_str().unwrap_or_default().to_owned(), call["params"].clone()))
        .filter(|(method, _)| method.starts_with("nvmf_"))
        .collect();
    let keys = |value: &Value| value.as_object().map(|all| all.keys().cloned().collect::<Vec<_>>());
    let mut ours = world.system.save();
    // What SPDK saves only when it was set.
    for call in &mut ours {
        if let Value::Object(params) = &mut call.params {
            ["acceptor_backlog", "admin_label", "sock_impl"].iter().for_each(|name| drop(params.remove(*name)));
            if let Some(Value::Object(namespace)) = params.get_mut("namespace") {
                ["eui64", "anagrpid"].iter().for_each(|name| drop(namespace.remove(*name)));
            }
        }
    }
    for (method, params) in &theirs {
        let call = ours.iter().find(|call| call.method == method);
        let call = call.unwrap_or_else(|| panic!("{method} is not saved"));
        assert_eq!(keys(&call.params), keys(params), "{method}");
        for key in ["namespace", "listen_address", "admin_cmd_passthru"] {
            assert_eq!(keys(&call.params[key]), keys(&params[key]), "{method}.{key}");
        }
    }
    assert!(ours.iter().all(|call| theirs.contains_key(call.method)));
}

#[test]
fn the_saved_configuration_makes_the_same_target() {
    let world = full();
    for (group, state) in [(1, "inaccessible"), (3, "non_optimized")] {
        let params = json!({"nqn": NQN, "listen_address": at(4420), "ana_state": state, "anagrpid": group});
        world.call("nvmf_subsystem_listener_set_ana_state", params).unwrap();
    }
    let params = json!({"nqn": NQN, "listen_address": at(4421), "ana_state": "inaccessible"});
    world.call("nvmf_subsystem_add_listener", params).unwrap();
    world.call("nvmf_subsystem_set_ns_ana_group", json!({"nqn": NQN, "nsid": 3, "anagrpid": 2})).unwrap();
    let saved = world.system.save();
    let order: Vec<&str> = saved.iter().map(|call| call.method).collect();
    assert_eq!(
        order,
        [
            "nvmf_set_config",
            "nvmf_set_max_subsystems",
            "nvmf_set_crdt",
            "nvmf_create_transport",
            "nvmf_discovery_add_referral",
            "nvmf_subsystem_add_listener",
            "nvmf_create_subsystem",
            "nvmf_subsystem_add_host",
            "nvmf_subsystem_add_ns",
            "nvmf_subsystem_add_listener",
            "nvmf_subsystem_listener_set_ana_state",
            "nvmf_subsystem_listener_set_ana_state",
            "nvmf_subsystem_add_listener",
        ]
    );
    let again = World::new(1);
    again.add_bdev_with_uuid("Uring0", Uuid::from_u128(0x4dadce4d_faac_4eb4_8ccf_8b8a6dba70bc));
    for call in &saved {
        again.call(call.method, call.params.clone()).unwrap_or_else(|error| panic!("{}: {error}", call.method));
    }
    assert_eq!(again.system.save(), saved);
    for method in ["nvmf_get_subsystems", "nvmf_get_transports", "nvmf_discovery_get_referrals"] {
        assert_eq!(again.call(method, json!({})), world.call(method, json!({})));
    }
    let listeners = |world: &World| world.call("nvmf_subsystem_get_listeners", json!({"nqn": NQN})).unwrap();
    assert_eq!(listeners(&again), listeners(&world));
    assert_eq!(
        listeners(&world)[0]["ana_states"],
        json!([
            {"ana_group": 1, "ana_state": "inaccessible"},
            {"ana_group": 2, "ana_state": "optimized"},
            {"ana_group": 3, "ana_state": "non_optimized"},
            {"ana_group": 4, "ana_state": "optimized"},
        ])
    );
    let view = again.system.view();
    assert!(view.discovery_filter.transport && view.discovery_filter.svcid && !view.discovery_filter.address);
    assert_eq!(view.crdt, [0, 7, 0]);
}

#[test]
fn a_subsystem_is_shown_as_it_is() {
    let world = full();
    let shown = world.call("nvmf_get_subsystems", json!({"nqn": NQN, "tgt_name": "nvmf_tgt"})).unwrap();
    assert_eq!(
        shown,
        json!([{
            "nqn": NQN, "subtype": "NVMe", "allow_any_host": false, "hosts": [{"nqn": HOST}],
            "listen_addresses": [at(4420)], "serial_number": "VOL0001", "model_number": "Example",
            "admin_label": "label", "max_namespaces": 4, "passthrough": false, "min_cntlid": 1, "max_cntlid": 65519,
            "dmrsl": 2_097_152, "wzsl": 12,
            "namespaces": [{
                "nsid": 3, "bdev_name": "Uring0", "name": "Uring0", "nguid": "4DADCE4DFAAC4EB48CCF8B8A6DBA70BC",
                "eui64": "0011223344556677", "uuid": "4dadce4d-faac-4eb4-8ccf-8b8a6dba70bc", "anagrpid": 3,
            }],
        }])
    );
    let all = world.call("nvmf_get_subsystems", json!({})).unwrap();
    assert_eq!(all[0]["listen_addresses"], json!([at(8009)]));
    assert_eq!(all[1], shown[0]);
    assert_eq!(world.call("nvmf_get_targets", json!({})), Ok(json!(["nvmf_tgt"])));
    let listeners = world.call("nvmf_subsystem_get_listeners", json!({"nqn": "discovery"}));
    assert_eq!(listeners, Ok(json!([{"address": at(8009)}])));
}

#[test]
fn options_of_a_transport_are_shown_as_given() {
    let world = full();
    let shown = world.call("nvmf_get_transports", json!({"trtype": "tCp"})).unwrap();
    let transport = &shown[0];
    assert_eq!((&transport["acceptor_backlog"], &transport["max_io_size"]), (&json!(77), &json!(1_048_576)));
    assert_eq!((&transport["kas"], &transport["min_kato"]), (&json!(100), &json!(10_000)));
    let error = world.call("nvmf_get_transports", json!({"trtype": "RDMA"})).unwrap_err();
    assert_eq!(error.code(), -19);
    let view = world.system.view();
    assert_eq!(view.transports[&TransportKind::Tcp].max_io_size, 1_048_576);
    assert_eq!(view.transports[&TransportKind::Tcp].extra["acceptor_backlog"], json!(77));
}

/// A world with two controllers, and queue pairs of three subsystems.
fn connected() -> World {
    let world = full();
    let listen = ListenAddress { trtype: TransportKind::Tcp, traddr: [127, 0, 0, 1].into(), trsvcid: 4420 };
    let hostid = *Uuid::from_u128(0x4dadce4d_faac_4eb4_8ccf_8b8a6dba70bd).as_bytes();
    for subnqn in [NQN, "nqn.2014-08.org.nvmexpress.discovery"] {
        let made = world.controllers.add(subnqn, 1, 9, |cntlid| ControllerShared {
            cntlid,
            subnqn: subnqn.to_owned(),
            incarnation: 1,
            hostnqn: HOST.to_owned(),
            hostid,
            admin_reactor: ReactorId(0),
            listener: listen.clone(),
            max_io_queues: 4.into(),
            ready: true.into(),
            dead: false.into(),
            dead_since: 0.into(),
            traffic: false.into(),
            io_queues: [(1, ReactorId(0)), (2, ReactorId(1))].into_iter().collect::<BTreeMap<_, _>>().into(),
            counters: IoCounters::default(),
            errors: Default::default(),
        });
        assert_eq!(made.map(|controller| controller.cntlid), Some(1));
    }
    let qpair = |qid, reactor, subnqn: &str| QpairInfo {
        cntlid: 1,
        qid,
        state: QpairState::Enabled,
        reactor: ReactorId(reactor),
        subnqn: subnqn.to_owned(),
        hostnqn: HOST.to_owned(),
        hostid,
        listen: listen.clone(),
        peer: "[::1]:50000".parse().unwrap(),
        is_movable: qid > 0,
        units: 0,
    };
    world.reactors.set_qpairs(vec![qpair(1, 1, NQN), qpair(0, 0, NQN), qpair(7, 0, "nqn.2024-01.io.example:other")]);
    world
}

#[test]
fn controllers_queue_pairs_and_poll_groups_are_shown() {
    let world = connected();
    let controllers = world.call("nvmf_subsystem_get_controllers", json!({"nqn": NQN}));
    let hostid = "4dadce4d-faac-4eb4-8ccf-8b8a6dba70bd";
    assert_eq!(
        controllers,
        Ok(json!([{"cntlid": 1, "cntrltype": "io", "hostnqn": HOST, "hostid": hostid, "num_io_qpairs": 2}]))
    );
    let discovery = world.call("nvmf_subsystem_get_controllers", json!({"nqn": "discovery"})).unwrap();
    assert_eq!(discovery[0]["cntrltype"], "discovery");
    let qpairs = world.call("nvmf_subsystem_get_qpairs", json!({"nqn": NQN})).unwrap();
    let peer = json!({"trtype": "TCP", "adrfam": "IPv6", "traddr": "::1", "trsvcid": "50000"});
    let shown = |qid: u16| {
        json!({"cntlid": 1, "qid": qid, "state": "enabled", "thread": format!("nvmf_tgt_poll_group_00{qid}"),
               "hostnqn": HOST, "listen_address": at(4420), "peer_address": peer})
    };
    assert_eq!(qpairs, json!([shown(0), shown(1)]));
    let stats = world.call("nvmf_get_stats", json!({})).unwrap();
    assert_eq!(stats["tick_rate"], 1_000_000_000);
    assert_eq!(
        stats["poll_groups"][1],
        json!({"name": "nvmf_tgt_poll_group_001", "admin_qpairs": 1, "io_qpairs": 2, "current_admin_qpairs": 3,
               "current_io_qpairs": 4, "current_unassociated_qpairs": 5, "pending_bdev_io": 6, "completed_nvme_io": 7,
               "load_percent": 0.0, "qpairs_moved_in": 8, "qpairs_moved_out": 9, "transports": [{"trtype": "TCP"}]})
    );
    assert_eq!(stats["poll_groups"][0]["load_percent"], 25.0);
}

#[test]
fn a_queue_pair_moves_to_the_poll_group_that_is_named() {
    let world = connected();
    // Queue 1 goes to the other reactor.
    let to = |qid: u16, group: &str| {
        let params = json!({"nqn": NQN, "cntlid": 1, "qid": qid, "thread": group});
        world.call("nvmf_subsystem_move_qpair", params)
    };
    assert_eq!(to(1, "nvmf_tgt_poll_group_000"), Ok(json!(true)));
    let qpairs = world.call("nvmf_subsystem_get_qpairs", json!({"nqn": NQN})).unwrap();
    assert_eq!(qpairs[1]["thread"], "nvmf_tgt_poll_group_000");
    let refused = to(1, "nvmf_tgt_poll_group_002").unwrap_err();
    assert!(refused.message().contains("nvmf_tgt_poll_group_001"), "{refused}");
    let refused = to(3, "nvmf_tgt_poll_group_000").unwrap_err();
    assert!(refused.message().contains("nvmf_subsystem_get_qpairs"), "{refused}");
}

#[test]
fn the_scheduler_is_shown_saved_and_restored() {
    let world = World::new(0);
    let source = super::scheduler_config_source(&world.system);
    assert_eq!((source.name(), source.save()), ("scheduler", vec![]));
    let shown = world.call("framework_get_scheduler", json!({})).unwrap();
    assert_eq!(shown["scheduler_name"], "dynamic");
    assert_eq!((&shown["scheduler_period"], &shown["core_limit"]), (&json!(1_000_000), &json!(80)));
    world.call("framework_set_scheduler", json!({"name": "dynamic", "period": 200_000, "load_limit": 30})).unwrap();
    let saved = source.save();
    assert_eq!(saved[0].params["load_limit"], 30);
    world.call("framework_set_scheduler", json!({"name": "static"})).unwrap();
    let shown = world.call("framework_get_scheduler", json!({})).unwrap();
    let wanted =
        json!({"scheduler_name": "static", "scheduler_period": 0, "isolated_core_mask": "0", "scheduling_core": 0});
    assert_eq!(shown, wanted);
    world.call(saved[0].method, saved[0].params.clone()).unwrap();
    let shown = world.call("framework_get_scheduler", json!({})).unwrap();
    assert_eq!((&shown["scheduler_period"], &shown["load_limit"]), (&json!(200_000), &json!(30)));
    assert!(world.call("framework_set_scheduler", json!({"name": "dynamic", "mappings": "0:1"})).is_err());
    assert!(world.call("framework_set_scheduler", json!({"name": "dynamic", "core_limit": 101})).is_err());
    let odd = world.call("framework_set_scheduler", json!({"name": "dynamo"})).unwrap_err();
    assert!(odd.message().contains("did you mean dynamic"), "{odd}");
}

#[test]
fn addresses_may_be_written_in_several_ways() {
    let world = full();
    for (given, shown) in [
        (json!({"trtype": "tcp", "traddr": "::1", "trsvcid": "4431"}), ("IPv6", "::1", "4431")),
        (
            json!({"trtype": "Tcp", "adrfam": "ipv4", "traddr": "0.0.0.0", "trsvcid": "04432"}),
            ("IPv4", "0.0.0.0", "4432"),
        ),
        (json!({"trtype": "TCP", "traddr": "192.0.2.1"}), ("IPv4", "192.0.2.1", "4420")),
    ] {
        world.call("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": given})).unwrap();
        let all = world.call("nvmf_get_subsystems", json!({"nqn": NQN})).unwrap();
        let (adrfam, traddr, trsvcid) = shown;
        let last = all[0]["listen_addresses"].as_array().and_then(|all| all.last()).cloned();
        let wanted = json!({"trtype": "TCP", "adrfam": adrfam, "traddr": traddr, "trsvcid": trsvcid});
        assert_eq!(last, Some(wanted));
        world.call("nvmf_subsystem_remove_listener", json!({"nqn": NQN, "listen_address": given})).unwrap();
    }
}

/// Method, parameters, code, and a part of the message.
type Mistake = (&'static str, Value, i32, &'static str);

fn mistakes() -> Vec<Mistake> {
    const OTHER: &str = "nqn.2024-01.io.example:vol2";
    let listen = |key: &str, value: Value| {
        let mut address = at(4444);
        address[key] = value;
        json!({"nqn": NQN, "listen_address": address})
    };
    let ns = |key: &str, value: Value| {
        let mut namespace = json!({"bdev_name": "Uring1"});
        namespace[key] = value;
        json!({"nqn": NQN, "namespace": namespace})
    };
    let tcp = |key: &str, value: Value| json!({"trtype": "TCP", key: value});
    vec![
        // Another transport than TCP.
        ("nvmf_create_transport", json!({"trtype": "RDMA"}), -32602, "built without a transport RDMA; it has TCP"),
        ("nvmf_create_transport", json!({"trtype": "PCIE"}), -32602, "does not serve; give TCP or RDMA"),
        ("nvmf_create_transport", json!({"trtype": "TPC"}), -32602, "trtype \"TPC\": not a transport type"),
        ("nvmf_create_transport", tcp("no_srq", json!(true)), -32602, "no_srq true: only the transport RDMA"),
        ("nvmf_create_transport", tcp("dif_insert_or_strip", json!(true)), -32602, "leave it out"),
        ("nvmf_create_transport", tcp("masked_oncs", json!(["reservs"])), -32602, "masked"),
        ("nvmf_create_transport", tcp("max_io_sise", json!(1)), -32602, "did you mean max_io_size?"),
        ("nvmf_create_transport", tcp("tgt_name", json!("x")), -32603, "there is no such target"),
        ("nvmf_create_transport", tcp("max_aq_depth", json!(8)), -32602, "give 32 to"),
        // Subsystems.
        ("nvmf_create_subsystem", json!({"nqn": NQN}), -32603, "exists already"),
        ("nvmf_create_subsystem", json!({"nqn": "discovery"}), -32603, "always there"),
        ("nvmf_create_subsystem", json!({"nqn": "nqn.2024-1.io.x:y"}), -32603, "\"2024-1\" is not a date"),
        ("nvmf_create_subsystem", json!({"nqn": OTHER, "serial_number": "S".repeat(21)}), -32602, "21 bytes long"),
        ("nvmf_create_subsystem", json!({"nqn": OTHER, "model_number": "é"}), -32602, "printable ASCII"),
        ("nvmf_create_subsystem", json!({"nqn": OTHER, "min_cntlid": 5, "max_cntlid": 4}), -32602, "larger than max"),
        ("nvmf_create_subsystem", json!({"nqn": OTHER, "min_cntlid": 0}), -32602, "reserved"),
        ("nvmf_create_subsystem", json!({"nqn": OTHER, "max_cntlid": 65520}), -32602, "give 1 to 65519"),
        ("nvmf_create_subsystem", json!({"nqn": OTHER, "max_namespaces": 16385}), -32602, "give 1 to 16384"),
        ("nvmf_create_subsystem", json!({"nqn": OTHER, "passthrough": true}), -32602, "not passed through"),
        ("nvmf_create_subsystem", json!({"nqn": OTHER, "enable_nssr": true}), -32602, "not served"),
        ("nvmf_delete_subsystem", json!({"nqn": "nqn.2024-01.io.example:vol"}), -32602, "did you mean"),
        ("nvmf_delete_subsystem", json!({"nqn": "discovery"}), -32602, "always there"),
        ("nvmf_get_subsystems", json!({"nqn": OTHER}), -19, "there is no such subsystem"),
        // Namespaces.
        ("nvmf_subsystem_add_ns", ns("bdev_name", json!("Nope")), -32602, "namespace.bdev_name \"Nope\""),
        ("nvmf_subsystem_add_ns", ns("bdev_name", json!("Uring0")), -32602, "in use by NVMe-oF subsystem nqn.2024"),
        ("nvmf_subsystem_add_ns", ns("nsid", json!(3)), -32602, "taken by bdev 'Uring0'; choose another"),
        ("nvmf_subsystem_add_ns", ns("nsid", json!(5)), -32602, "namespaces 1 to 4"),
        ("nvmf_subsystem_add_ns", ns("nguid", json!("12")), -32602, "write exactly 32 digits"),
        ("nvmf_subsystem_add_ns", ns("eui64", json!("0011223344556677")), -32602, "namespace 3 of"),
        ("nvmf_subsystem_add_ns", ns("nguid", json!("4dadce4dfaac4eb48ccf8b8a6dba70bc")), -32602, "nguid"),
        ("nvmf_subsystem_add_ns", ns("uuid", json!("4dadce4d-faac-4eb4-8ccf-8b8a6dba70bc")), -32602, "namespace.uuid"),
        ("nvmf_subsystem_add_ns", ns("eui64", json!("0".repeat(16))), -32602, "all zeroes"),
        ("nvmf_subsystem_add_ns", ns("anagrpid", json!(5)), -32602, "give 1 to 4"),
        ("nvmf_subsystem_add_ns", ns("ptpl_file", json!("/x")), -32602, "reservations are not served"),
        ("nvmf_subsystem_add_ns", ns("no_auto_visible", json!(true)), -32602, "some hosts only"),
        ("nvmf_subsystem_remove_ns", json!({"nqn": NQN, "nsid": 1}), -32602, "no such namespace; it has 3"),
        ("nvmf_subsystem_remove_ns", json!({"nqn": OTHER, "nsid": 1}), -32602, "there is no such subsystem"),
        ("nvmf_subsystem_set_ns_ana_group", json!({"nqn": NQN, "nsid": 3, "anagrpid": 9}), -32602, "give 1 to 4"),
        // Hosts.
        ("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": HOST}), -32603, "lists this host already"),
        ("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": "me"}), -32603, "nqn."),
        ("nvmf_subsystem_add_host", json!({"nqn": OTHER, "host": HOST}), -32602, "no such subsystem"),
        ("nvmf_subsystem_add_host", json!({"nqn": "discovery", "host": HOST}), -32602, "open to any host"),
        ("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": HOST, "psk": "key"}), -32602, "TLS is not served"),
        ("nvmf_subsystem_add_host", json!({"nqn": NQN, "host": HOST, "dhchap_key": "key"}), -32602, "DH-HMAC-CHAP"),
        ("nvmf_subsystem_remove_host", json!({"nqn": NQN, "host": "nqn.2024-01.io.example:host2"}), -32603, "host1?"),
        // Listeners.
        ("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": at(4420)}), -32602, "there already"),
        (
            "nvmf_subsystem_add_listener",
            listen("trtype", json!("rdma")),
            -32602,
            "nvmf_create_transport with trtype RDMA",
        ),
        ("nvmf_subsystem_add_listener", listen("traddr", json!("localhost")), -32602, "write it in numbers"),
        ("nvmf_subsystem_add_listener", listen("adrfam", json!("IPv6")), -32602, "give IPv4"),
        ("nvmf_subsystem_add_listener", listen("adrfam", json!("ib")), -32602, "listen_address.adrfam \"ib\""),
        ("nvmf_subsystem_add_listener", listen("trsvcid", json!("0")), -32602, "give 1 to 65535"),
        ("nvmf_subsystem_add_listener", listen("trsvcid", json!("+1")), -32602, "not a port"),
        ("nvmf_subsystem_add_listener", listen("trsvcid", json!(4420)), -32602, "write it in quotes"),
        ("nvmf_subsystem_add_listener", listen("transport", json!("TCP")), -32602, "no such parameter"),
        ("nvmf_subsystem_remove_listener", listen("trsvcid", json!("4421")), -32602, "it listens on 127.0.0.1:4420"),
        // Referrals and settings.
        (
            "nvmf_discovery_add_referral",
            json!({"address": at(8009), "secure_channel": true}),
            -32603,
            "remove it first",
        ),
        ("nvmf_discovery_remove_referral", json!({"address": at(8010)}), -32603, "no referral"),
        ("nvmf_set_config", json!({"poll_groups_mask": "0x1"}), -32602, "--cores"),
        (
            "nvmf_set_config",
            json!({"admin_cmd_passthru": {"nvme_mi": true}}),
            -32602,
            "admin_cmd_passthru.nvme_mi true",
        ),
        ("nvmf_set_config", json!({"dup_host_policy": "restrict_per_listener"}), -32602, "give allow"),
        ("nvmf_set_config", json!({"discovery_filter": "transport,addres"}), -32602, "did you mean address?"),
        ("nvmf_set_max_subsystems", json!({"max_subsystems": 1}), -32602, "give 2 to"),
    ]
}

#[test]
fn mistakes_are_explained_and_change_nothing() {
    let world = full();
    world.add_bdev("Uring1", 1024);
    let (saved, generation) = (world.system.save(), world.system.view().generation);
    for (method, params, code, text) in mistakes() {
        let error = world.call(method, params.clone()).unwrap_err();
        let message = error.message();
        assert_eq!(error.code(), code, "{method} {params}: {message}");
        assert!(message.contains(text), "{method} {params}: {message}");
        assert!(message.contains(method) && error.blamed_field().is_some(), "{message}");
        assert_ne!(error.data()["value"], Value::Null, "{message}");
        assert!(error.remedy().is_some(), "{message}");
    }
    assert_eq!(world.system.save(), saved);
    assert_eq!(world.system.view().generation, generation);
    assert_eq!(world.bdevs.get("Uring1").map(|bdev| world.claim(&bdev).kind).ok(), Some(None));
}

#[test]
fn a_second_transport_of_a_kind_is_an_internal_error() {
    let world = full();
    let error = world.call("nvmf_create_transport", json!({"trtype": "TCP"})).unwrap_err();
    assert_eq!((error.code(), error.blamed_field()), (-32603, Some("trtype")));
    assert!(error.message().contains("exists already"));
}

#[test]
fn odd_options_of_a_transport_are_explained() {
    for (options, field, fix) in [
        (json!({"max_io_size": 100_000}), "max_io_size", "give 65536 or 131072"),
        (json!({"max_io_size": 4096}), "max_io_size", "at least 8192"),
        (json!({"max_io_size": 33_554_432}), "max_io_size", "at most 16777216"),
        (json!({"in_capsule_data_size": 8200}), "in_capsule_data_size", "give 8192"),
        (json!({"in_capsule_data_size": 262_144}), "in_capsule_data_size", "max_io_size larger"),
        (json!({"max_aq_depth": 4097}), "max_aq_depth", "at most 4096"),
        (json!({"max_io_qpairs_per_ctrlr": 65535}), "max_io_qpairs_per_ctrlr", "at most 65534"),
    ] {
        let world = World::new(0);
        let mut params = options.clone();
        params["trtype"] = json!("TCP");
        let error = world.call("nvmf_create_transport", params).unwrap_err();
        assert_eq!((error.code(), error.blamed_field()), (-32602, Some(field)), "{options}");
        assert!(error.message().contains(fix), "{error}");
        // What SPDK no longer heeds is accepted.
        let params = json!({"trtype": "TCP", "io_unit_size": 8192, "num_shared_buffers": 1, "buf_cache_size": 1,
                            "dif_insert_or_strip": false, "zcopy": true});
        assert_eq!(world.call("nvmf_create_transport", params), Ok(json!(true)));
    }
}

#[test]
fn asymmetric_access_needs_a_subsystem_that_reports_it() {
    let world = full();
    let other = "nqn.2024-01.io.example:vol2";
    world.call("nvmf_create_subsystem", json!({"nqn": other})).unwrap();
    let listener = json!({"nqn": other, "listen_address": at(4420), "ana_state": "inaccessible"});
    let error = world.call("nvmf_subsystem_add_listener", listener).unwrap_err();
    assert!(error.message().contains("create the subsystem with ana_reporting = true"), "{error}");
    let listener = json!({"nqn": other, "listen_address": at(4420), "ana_state": "optimized"});
    world.call("nvmf_subsystem_add_listener", listener.clone()).unwrap();
    let error = world.call("nvmf_subsystem_listener_set_ana_state", listener).unwrap_err();
    assert_eq!((error.code(), error.blamed_field()), (-32602, Some("ana_state")));
    let shown = world.call("nvmf_subsystem_get_listeners", json!({"nqn": other})).unwrap();
    assert_eq!(shown, json!([{"address": at(4420)}]));
    let listener = json!({"nqn": "discovery", "listen_address": at(4420), "ana_state": "inaccessible"});
    assert!(world.call("nvmf_subsystem_add_listener", listener).is_err());
}
