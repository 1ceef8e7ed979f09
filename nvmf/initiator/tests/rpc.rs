//! The `bdev_nvme_*` methods, called as the server calls them, against a target on sockets of this machine.

mod common;

use std::net::SocketAddr;
use std::sync::Arc;

use bdev::conformance::WorldConfig;
use bdev::modules::malloc::{self, MallocOptions};
use bdev::rpc::BdevConfig;
use common::{NQN, Pair, Target};
use initiator::rpc::methods;
use nvmf::target::model::{NewNamespace, NewSubsystem};
use nvmf::target::view::{ListenAddress, TransportKind};
use schema::spdk::Reference;
use schema::{ConfigSource, RpcError, validate};
use serde_json::{Value, json};

fn call(pair: &mut Pair, name: &str, params: Value) -> Result<Value, RpcError> {
    let method = methods().iter().find(|m| m.spec.name == name).unwrap_or_else(|| panic!("no method {name}"));
    let params = validate(&method.spec, Some(params))?;
    let initiator = Arc::clone(&pair.initiator);
    pair.host.block_on((method.handler)(initiator, params))
}

fn refused(result: Result<Value, RpcError>) -> (i32, String) {
    let error = result.expect_err("this must be refused");
    (error.code(), error.message())
}

/// Waits until what a method shows is as it should be.
fn until(pair: &mut Pair, method: &str, what: impl Fn(&Value) -> bool) -> Value {
    loop {
        let shown = call(pair, method, json!({})).expect("it can be shown");
        if what(&shown) {
            return shown;
        }
        (0..50).for_each(|_| pair.host.step());
    }
}

/// A namespace on a malloc bdev.
fn add_namespace(target: &mut Target, nqn: &str, bdev: &str) {
    let (bdevs, nvmf) = (Arc::clone(&target.bdevs), Arc::clone(&target.nvmf));
    let (nqn, bdev) = (nqn.to_string(), bdev.to_string());
    target.world.block_on(async move {
        malloc::create(&bdevs, &bdev, None, MallocOptions::new(512, 128)).await.expect("a bdev");
        nvmf.add_namespace(&nqn, NewNamespace::default(), &bdev).await.expect("a namespace");
    });
}

fn add_subsystem(target: &mut Target, nqn: &str) {
    let new = NewSubsystem { nqn: nqn.into(), allow_any_host: true, ana_reporting: true, ..NewSubsystem::default() };
    let nvmf = Arc::clone(&target.nvmf);
    target.world.block_on(async move { nvmf.create_subsystem(new).await }).expect("a subsystem");
}

fn where_of(socket: SocketAddr) -> Value {
    json!({ "trtype": "tcp", "traddr": socket.ip().to_string(), "trsvcid": socket.port().to_string() })
}

fn with(mut object: Value, more: Value) -> Value {
    object.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    object
}

/// Names of the controllers, each with the ports of its paths.
fn controllers(shown: &Value) -> Vec<(String, Vec<String>)> {
    let text = |value: &Value| value.as_str().expect("text").to_string();
    let ports = |group: &Value| {
        let paths = group["ctrlrs"].as_array().expect("paths");
        paths.iter().map(|path| text(&path["trid"]["trsvcid"])).collect()
    };
    shown.as_array().expect("a list").iter().map(|group| (text(&group["name"]), ports(group))).collect()
}

#[test]
fn parameters_are_those_of_spdk() {
    let Some(reference) = Reference::beside(env!("CARGO_MANIFEST_DIR")) else { return };
    for method in methods() {
        let differences = reference.parameter_differences(&method.spec);
        assert_eq!(differences, Some(Vec::new()), "{}", method.spec.name);
    }
}

#[test]
fn what_a_discovery_service_lists_is_attached_followed_and_detached() {
    const SECOND: &str = "nqn.2026-11.io.ringstone:second";
    let mut pair = Pair::new(WorldConfig::default());
    let target = std::rc::Rc::clone(&pair.target);
    let (first, other) = {
        let mut target = target.borrow_mut();
        add_namespace(&mut target, NQN, "one");
        (target.listen(), target.listen())
    };
    let start = with(where_of(first), json!({ "name": "auto", "hostnqn": common::HOST }));
    let waiting = with(start.clone(), json!({ "attach_timeout_ms": 20_000 }));
    assert_eq!(call(&mut pair, "bdev_nvme_start_discovery", waiting.clone()), Ok(json!(true)));
    // Both listeners of the subsystem are paths of one controller.
    let shown = call(&mut pair, "bdev_nvme_get_controllers", json!({})).unwrap();
    let mut ports = vec![first.port().to_string(), other.port().to_string()];
    ports.sort();
    assert_eq!(controllers(&shown), [("auto0".to_string(), ports)]);
    assert!(pair.host.system().get("auto0n1").is_ok());
    let info = call(&mut pair, "bdev_nvme_get_discovery_info", json!({})).unwrap();
    let trid = json!({ "trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": first.port().to_string(),
        "subnqn": "nqn.2014-08.org.nvmexpress.discovery" });
    assert_eq!(info, json!([{ "name": "auto", "trid": trid, "referrals": [] }]));

    // The same service again, under this name or another.
    assert_eq!(refused(call(&mut pair, "bdev_nvme_start_discovery", start.clone())).0, -17);
    let renamed = with(start.clone(), json!({ "name": "again" }));
    assert_eq!(refused(call(&mut pair, "bdev_nvme_start_discovery", renamed)).0, -17);
    let (code, text) = refused(call(&mut pair, "bdev_nvme_set_options", json!({ "keep_alive_timeout_ms": 5_000 })));
    assert!(code == -1 && text.contains("stop"), "{code} {text}");

    // It is the service that is saved, not what it has found.
    let saved = BdevConfig(Arc::clone(pair.host.system())).save();
    let nvme: Vec<_> = saved.iter().filter(|entry| entry.method.contains("nvme")).collect();
    assert_eq!((nvme.len(), nvme[0].method, &nvme[0].params), (1, "bdev_nvme_start_discovery", &waiting));

    // A subsystem comes, and goes.
    {
        let mut target = target.borrow_mut();
        add_subsystem(&mut target, SECOND);
        add_namespace(&mut target, SECOND, "two");
    }
    let more = target.borrow_mut().listen_for(SECOND);
    let shown = until(&mut pair, "bdev_nvme_get_controllers", |shown| controllers(shown).len() == 2);
    assert_eq!(controllers(&shown)[1], ("auto1".to_string(), vec![more.port().to_string()]));
    let nvmf = Arc::clone(&target.borrow().nvmf);
    let deleted = target.borrow_mut().world.start(async move { nvmf.delete_subsystem(SECOND).await });
    until(&mut pair, "bdev_nvme_get_controllers", |shown| controllers(shown).len() == 1);
    assert!(deleted.take().expect("it has ended").is_ok());
    assert!(pair.host.system().get("auto1n1").is_err());
    // One of two listeners goes: a path less.
    let nvmf = Arc::clone(&target.borrow().nvmf);
    let address = ListenAddress { trtype: TransportKind::Tcp, traddr: other.ip(), trsvcid: other.port() };
    let _ = target.borrow_mut().world.start(async move { nvmf.remove_listener(NQN, address).await });
    let shown = until(&mut pair, "bdev_nvme_get_controllers", |shown| controllers(shown)[0].1.len() == 1);
    assert_eq!(controllers(&shown), [("auto0".to_string(), vec![first.port().to_string()])]);

    assert_eq!(refused(call(&mut pair, "bdev_nvme_stop_discovery", json!({ "name": "nobody" }))).0, -19);
    assert_eq!(call(&mut pair, "bdev_nvme_stop_discovery", json!({ "name": "auto" })), Ok(json!(true)));
    assert_eq!(call(&mut pair, "bdev_nvme_get_controllers", json!({})), Ok(json!([])));
    assert_eq!(call(&mut pair, "bdev_nvme_get_discovery_info", json!({})), Ok(json!([])));
    assert!(pair.host.system().get("auto0n1").is_err());
    // The name is free, and numbers begin anew.
    assert_eq!(call(&mut pair, "bdev_nvme_start_discovery", waiting), Ok(json!(true)));
    let shown = call(&mut pair, "bdev_nvme_get_controllers", json!({})).unwrap();
    assert_eq!(controllers(&shown)[0].0, "auto0");
    // What a user detaches stays away, and what is attached by hand is not the service's.
    assert_eq!(call(&mut pair, "bdev_nvme_detach_controller", json!({ "name": "auto0" })), Ok(json!(true)));
    let by_hand = with(where_of(first), json!({ "name": "hand", "subnqn": NQN, "hostnqn": common::HOST }));
    assert_eq!(call(&mut pair, "bdev_nvme_attach_controller", by_hand), Ok(json!(["handn1"])));
    assert_eq!(call(&mut pair, "bdev_nvme_stop_discovery", json!({ "name": "auto" })), Ok(json!(true)));
    let shown = call(&mut pair, "bdev_nvme_get_controllers", json!({})).unwrap();
    assert_eq!(controllers(&shown)[0].0, "hand");
}

#[test]
fn a_discovery_service_that_is_not_there_is_said_to_be_so() {
    let mut pair = Pair::new(WorldConfig::default());
    let socket = pair.target.borrow_mut().listen();
    let free = SocketAddr::new(
        socket.ip(),
        std::net::TcpListener::bind((socket.ip(), 0)).unwrap().local_addr().unwrap().port(),
    );
    let start = with(where_of(free), json!({ "name": "auto", "attach_timeout_ms": 20 }));
    let (code, text) = refused(call(&mut pair, "bdev_nvme_start_discovery", start.clone()));
    assert!(code == -110 && text.contains("attach_timeout_ms") && text.contains("wait_for_attach"), "{code} {text}");
    assert_eq!(call(&mut pair, "bdev_nvme_get_discovery_info", json!({})), Ok(json!([])));
    // Without waiting, it is tried for as long as it is wanted.
    let start = with(where_of(free), json!({ "name": "auto" }));
    assert_eq!(call(&mut pair, "bdev_nvme_start_discovery", start), Ok(json!(true)));
    assert_eq!(call(&mut pair, "bdev_nvme_stop_discovery", json!({ "name": "auto" })), Ok(json!(true)));
    for bad in [
        json!({ "trtype": "fc" }),
        json!({ "traddr": "somewhere" }),
        json!({ "ctrlr_loss_timeout_sec": 5 }),
        json!({ "name": "" }),
    ] {
        let params = with(with(where_of(free), json!({ "name": "auto" })), bad);
        assert_eq!(refused(call(&mut pair, "bdev_nvme_start_discovery", params.clone())).0, -32602, "{params}");
    }
    // Nor is there RDMA here: it is said for what is attached as well.
    let params = with(where_of(free), json!({ "name": "auto", "trtype": "RDMA", "subnqn": NQN }));
    for method in ["bdev_nvme_start_discovery", "bdev_nvme_attach_controller"] {
        let mut params = params.clone();
        if method == "bdev_nvme_start_discovery" {
            params.as_object_mut().expect("an object").remove("subnqn");
        }
        let (code, text) = refused(call(&mut pair, method, params));
        assert!(code == -19 && text.contains("trtype") && text.contains("RDMA"), "{code} {text}");
    }
    let digests = with(params, json!({ "hdgst": true }));
    let (code, text) = refused(call(&mut pair, "bdev_nvme_attach_controller", digests));
    assert!(code == -32602 && text.contains("hdgst"), "{code} {text}");
}

#[test]
fn options_hold_for_what_is_attached_afterwards_and_what_is_not_served_is_refused() {
    let mut pair = Pair::new(WorldConfig::default());
    let socket = {
        let target = std::rc::Rc::clone(&pair.target);
        let mut target = target.borrow_mut();
        add_namespace(&mut target, NQN, "one");
        target.listen()
    };
    for (bad, named) in [
        (json!({ "keep_alive_timeout_ms": 0 }), "keep_alive_timeout_ms"),
        (json!({ "transport_ack_timeout": 5 }), "transport_ack_timeout"),
        (json!({ "transport_tos": 5 }), "transport_tos"),
        (json!({ "arbitration_burst": 3 }), "arbitration_burst"),
        (json!({ "io_path_stat": true }), "io_path_stat"),
        (json!({ "generate_uuids": true }), "generate_uuids"),
        (json!({ "action_on_timeout": "panic" }), "action_on_timeout"),
        (json!({ "ctrlr_loss_timeout_sec": 3 }), "reconnect_delay_sec"),
        (json!({ "ctrlr_loss_timeout_sec": -2 }), "ctrlr_loss_timeout_sec"),
        (json!({ "ctrlr_loss_timeout_sec": 3, "reconnect_delay_sec": 4 }), "reconnect_delay_sec"),
        (
            json!({ "ctrlr_loss_timeout_sec": 9, "reconnect_delay_sec": 4, "fast_io_fail_timeout_sec": 2 }),
            "fast_io_fail_timeout_sec",
        ),
        (json!({ "reconnect_delay_sec": 4 }), "reconnect_delay_sec"),
    ] {
        let (code, text) = refused(call(&mut pair, "bdev_nvme_set_options", bad.clone()));
        assert!(code == -32602 && text.contains(named), "{bad}: {code} {text}");
    }
    // What SPDK saves, where it is the default there, is taken.
    let theirs = json!({
        "action_on_timeout": "abort", "timeout_us": 9_000_000, "timeout_admin_us": 0, "keep_alive_timeout_ms": 10_000,
        "arbitration_burst": 0, "low_priority_weight": 0, "medium_priority_weight": 0, "high_priority_weight": 0,
        "nvme_adminq_poll_period_us": 10_000, "nvme_ioq_poll_period_us": 0, "io_queue_requests": 0,
        "delay_cmd_submit": true, "transport_retry_count": 4, "bdev_retry_count": 3, "transport_ack_timeout": 0,
        "ctrlr_loss_timeout_sec": 5, "reconnect_delay_sec": 2, "fast_io_fail_timeout_sec": 3,
        "disable_auto_failback": false, "generate_uuids": false, "transport_tos": 0, "nvme_error_stat": false,
        "io_path_stat": false,
    });
    assert_eq!(call(&mut pair, "bdev_nvme_set_options", theirs), Ok(json!(true)));
    let attach = with(where_of(socket), json!({ "name": "N", "subnqn": NQN, "hostnqn": common::HOST }));
    // Against the options' five seconds.
    let late = with(attach.clone(), json!({ "fast_io_fail_timeout_sec": 6 }));
    let (code, text) = refused(call(&mut pair, "bdev_nvme_attach_controller", late));
    assert!(code == -32602 && text.contains("fast_io_fail_timeout_sec"), "{code} {text}");
    for (bad, named) in [
        (json!({ "num_io_queues": 1 }), "num_io_queues"),
        (json!({ "psk": "key" }), "psk"),
        (json!({ "hostaddr": "127.0.0.1" }), "hostaddr"),
        (json!({ "prchk_guard": true }), "prchk_guard"),
        (json!({ "multipath_opts": { "policy": "active_passive", "min_io": 3 } }), "min_io"),
    ] {
        let (code, text) = refused(call(&mut pair, "bdev_nvme_attach_controller", with(attach.clone(), bad.clone())));
        assert!(code == -32602 && text.contains(named), "{bad}: {code} {text}");
    }
    assert_eq!(call(&mut pair, "bdev_nvme_attach_controller", attach.clone()), Ok(json!(["Nn1"])));
    let disable = with(attach, json!({ "multipath": "disable" }));
    let (code, text) = refused(call(&mut pair, "bdev_nvme_attach_controller", disable));
    assert!(code == -17 && text.contains("multipath"), "{code} {text}");
    let shown = call(&mut pair, "bdev_nvme_get_controllers", json!({ "name": "N" })).unwrap();
    let wanted = json!([{ "name": "N", "ctrlrs": [{
        "state": "enabled", "cntlid": shown[0]["ctrlrs"][0]["cntlid"],
        "trid": { "trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": socket.port().to_string(),
            "subnqn": NQN },
        "host": { "nqn": common::HOST, "addr": "", "svcid": "" },
    }]}]);
    assert_eq!(shown, wanted);
    let policy = json!({ "name": "Nn1", "policy": "active_active", "selector": "round_robin", "rr_min_io": 7 });
    assert_eq!(call(&mut pair, "bdev_nvme_set_multipath_policy", policy), Ok(json!(true)));
    let policy = json!({ "name": "Nn1", "policy": "active_active", "selector": "queue_depth", "rr_min_io": 7 });
    assert_eq!(refused(call(&mut pair, "bdev_nvme_set_multipath_policy", policy)).0, -32602);
    let paths = call(&mut pair, "bdev_nvme_get_io_paths", json!({ "name": "Nn1" })).unwrap();
    let path = &paths["poll_groups"][0]["io_paths"][0];
    assert_eq!(
        (&path["bdev_name"], &path["current"], &path["accessible"]),
        (&json!("Nn1"), &json!(true), &json!(true))
    );
    let prefer = json!({ "name": "Nn1", "cntlid": path["cntlid"] });
    assert_eq!(call(&mut pair, "bdev_nvme_set_preferred_path", prefer), Ok(json!(true)));
    assert_eq!(call(&mut pair, "bdev_nvme_detach_controller", json!({ "name": "N" })), Ok(json!(true)));
}
