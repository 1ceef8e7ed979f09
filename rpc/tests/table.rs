//! The table without a socket and without a tokio runtime.

mod common;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Waker};

use common::{METHODS, Shelf, TestLog, TestRuntime, block_on};
use ringstone_rpc::log::LogLevel;
use ringstone_rpc::{BuildError, KillSignal, MAX_BATCH, MAX_REPLY_BYTES, Phase, Table};
use schema::{ConfigEntry, ConfigSource, RpcError};
use serde_json::{Value, json};

fn call(table: &Table, method: &str, params: Value) -> Result<Value, RpcError> {
    block_on(table.call(method, params))
}

fn answer(table: &Table, request: &Value) -> Value {
    let reply = block_on(table.answer(&request.to_string())).unwrap();
    serde_json::from_str(&reply).unwrap()
}

/// Polls once.
fn is_pending<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) -> bool {
    future.poll(&mut Context::from_waker(Waker::noop())).is_pending()
}

#[test]
fn states_decide_what_is_callable() {
    let table = Shelf::new().table();
    let methods = |current| call(&table, "rpc_get_methods", json!({"current": current})).unwrap();
    let has = |list: &Value, name| list.as_array().unwrap().contains(&json!(name));

    assert_eq!(table.phase(), Phase::Startup);
    assert!(has(&methods(false), "shelf_put"));
    assert!(!has(&methods(true), "shelf_put"));
    assert!(has(&methods(true), "shelf_set_size"));
    assert!(has(&methods(true), "framework_start_init"));
    let error = call(&table, "shelf_put", json!({"name": "a"})).unwrap_err();
    assert_eq!(
        (error.code(), error.message().as_str()),
        (
            -1,
            "Invalid state: shelf_put: only callable once the server has started; \
             call framework_start_init first"
        )
    );

    assert_eq!(call(&table, "framework_start_init", Value::Null), Ok(json!(true)));
    assert_eq!(table.phase(), Phase::Runtime);
    assert!(has(&methods(true), "shelf_put"));
    assert!(!has(&methods(true), "framework_start_init"));
    assert!(has(&methods(false), "framework_start_init"));
    for method in ["framework_start_init", "shelf_set_size"] {
        let error = call(&table, method, Value::Null).unwrap_err();
        assert_eq!(error.code(), -1);
        assert!(error.message().contains("--wait-for-rpc"));
    }
}

#[test]
fn aliases_answer_but_are_listed_on_request_only() {
    let table = Shelf::new().table();
    assert_eq!(call(&table, "shelf_ls", Value::Null), Ok(json!([])));
    let methods = |params| call(&table, "rpc_get_methods", params).unwrap().to_string();
    assert!(!methods(Value::Null).contains("shelf_ls"));
    assert!(methods(json!({"include_aliases": true})).contains("shelf_ls"));
}

#[test]
fn unknown_methods_get_the_nearest() {
    let table = Shelf::new().table();
    let error = call(&table, "shelf_putt", Value::Null).unwrap_err();
    assert_eq!(error.code(), -32601);
    assert!(error.message().starts_with("Method not found: shelf_putt"));
    assert_eq!(error.remedy(), Some("did you mean shelf_put?"));
    let reply = answer(&table, &json!({"method": "shelf_putt", "id": 1}));
    assert_eq!(reply["error"]["code"], -32601);
    assert_eq!(reply["error"]["data"]["fix"], "did you mean shelf_put?");
}

#[test]
fn a_failed_start_may_be_repeated() {
    let shelf = Shelf::new();
    let table = shelf.table();
    shelf.starting_fails.store(true, Ordering::SeqCst);
    let error = call(&table, "framework_start_init", Value::Null).unwrap_err();
    assert_eq!(error.code(), -12);
    assert_eq!(table.phase(), Phase::Startup);
    shelf.starting_fails.store(false, Ordering::SeqCst);
    assert!(call(&table, "framework_start_init", Value::Null).is_ok());
}

#[test]
fn waiting_for_the_start_ends_with_it() {
    let table = Shelf::new().table();
    let mut waiter = pin!(table.call("framework_wait_init", Value::Null));
    assert!(is_pending(waiter.as_mut()));
    assert!(call(&table, "framework_start_init", Value::Null).is_ok());
    assert_eq!(block_on(waiter), Ok(json!(true)));
    assert!(call(&table, "framework_wait_init", Value::Null).is_ok());
}

#[test]
fn changes_are_saved_before_they_are_answered() {
    let shelf = Shelf::new();
    let table = shelf.running();
    assert_eq!(call(&table, "shelf_put", json!({"name": "a"})), Ok(json!("a")));
    let document = json!({"subsystems": [
        {"subsystem": "room", "config": []},
        {"subsystem": "shelf", "config": [
            {"method": "shelf_set_size", "params": {"size": 8}},
            {"method": "shelf_put", "params": {"name": "a"}},
        ]},
    ]});
    let saved = [("shelf_put".to_owned(), document.clone())];
    assert_eq!(*shelf.saved.lock().unwrap(), saved);
    assert_eq!(block_on(table.save()), document);

    // What fails, what only reads and what is brought back is not saved.
    assert!(call(&table, "shelf_put", json!({"name": "a"})).is_err());
    assert!(call(&table, "shelf_list", Value::Null).is_ok());
    assert!(block_on(table.apply("shelf_put", json!({"name": "b"}))).is_ok());
    assert_eq!(shelf.saved.lock().unwrap().len(), 1);

    // What fails and has changed something all the same is.
    assert_eq!(call(&table, "shelf_put", json!({"name": "heavy"})).unwrap_err().code(), -16);
    assert_eq!(shelf.saved.lock().unwrap().len(), 2);
}

#[test]
fn a_change_that_is_not_saved_is_told() {
    let shelf = Shelf::new();
    let table = shelf.running();
    shelf.saving_fails.store(true, Ordering::SeqCst);
    let error = call(&table, "shelf_put", json!({"name": "a"})).unwrap_err();
    assert_eq!(error.code(), -32603);
    let message = error.message();
    assert!(message.contains("shelf_put: the change is live but could not be saved"), "{message}");
    assert!(message.contains("No space left on device: writing the state failed"), "{message}");
    assert_eq!(*shelf.boxes.lock().unwrap(), ["a"]);
}

#[test]
fn changes_run_one_at_a_time_and_in_order() {
    let shelf = Shelf::new();
    let table = shelf.running();
    let mut first = pin!(table.call("shelf_wait", Value::Null));
    assert!(is_pending(first.as_mut()));
    assert_eq!(shelf.waiting.load(Ordering::SeqCst), 1);

    let mut second = pin!(table.call("shelf_put", json!({"name": "second"})));
    let mut third = pin!(table.call("shelf_put", json!({"name": "third"})));
    let mut saving = pin!(table.save());
    for _ in 0..3 {
        assert!(is_pending(second.as_mut()));
        assert!(is_pending(third.as_mut()));
        assert!(is_pending(saving.as_mut()));
    }
    // Reading does not wait.
    assert_eq!(call(&table, "shelf_list", Value::Null), Ok(json!([])));
    assert!(call(&table, "framework_get_config", json!({"name": "shelf"})).is_ok());
    // Nor do mistakes.
    assert!(call(&table, "shelf_put", json!({"nmae": "x"})).is_err());

    shelf.gate.add_permits(1);
    assert_eq!(block_on(first), Ok(json!(true)));
    // The third asked later than the second, and waits for it.
    assert!(is_pending(third.as_mut()));
    assert_eq!(block_on(second), Ok(json!("second")));
    assert_eq!(block_on(third), Ok(json!("third")));
    assert_eq!(*shelf.boxes.lock().unwrap(), ["second", "third"]);
}

#[test]
fn a_change_that_waited_for_the_start_is_checked_again() {
    let shelf = Shelf::new();
    let table = shelf.table();
    let mut blocker = pin!(table.call("shelf_wait", Value::Null));
    let mut start = pin!(table.call("framework_start_init", Value::Null));
    let mut size = pin!(table.call("shelf_set_size", json!({"size": 9})));
    assert!(is_pending(blocker.as_mut()));
    assert!(is_pending(start.as_mut()));
    assert!(is_pending(size.as_mut()), "allowed so far");
    shelf.gate.add_permits(1);
    assert!(block_on(blocker).is_ok());
    assert!(block_on(start).is_ok());
    assert_eq!(block_on(size).unwrap_err().code(), -1);
    assert_eq!(*shelf.size.lock().unwrap(), 8);
}

#[test]
fn requests_of_every_shape() {
    let table = Shelf::new().running();
    let list = |request: Value| {
        let reply = answer(&table, &request);
        assert_eq!(reply["jsonrpc"], "2.0");
        assert_eq!(reply["result"], json!([]), "{request}");
        reply["id"].clone()
    };
    // Ids come back as they were, whatever they are.
    for id in [json!(1), json!("x\"y"), Value::Null, json!(-7), json!(1.5), json!(u64::MAX)] {
        assert_eq!(list(json!({"jsonrpc": "2.0", "method": "shelf_list", "id": id})), id);
    }
    // What SPDK's clients may leave out or write differently.
    list(json!({"method": "shelf_list", "id": 1}));
    list(json!({"method": "shelf_list", "id": 1, "params": {}}));
    list(json!({"method": "shelf_list", "id": 1, "params": null}));
    let spaced = " {\n\"id\" : 1 , \"method\" :\t\"shelf\\u005flist\" } \r\n";
    assert!(block_on(table.answer(spaced)).unwrap().contains("\"result\":[]"));
}

#[test]
fn wrong_requests_say_what_is_wrong() {
    let table = Shelf::new().running();
    for (request, code, text) in [
        (json!({"method": "shelf_list", "id": 1, "params": []}), -32602, "must be an object"),
        (json!({"method": "shelf_list", "id": 1, "params": 5}), -32600, "params 5: must be an"),
        (json!({"method": "shelf_list", "id": 1, "parms": {}}), -32600, "did you mean params?"),
        (json!({"method": "shelf_list", "id": 1, "jsonrpc": "1.0"}), -32600, "write \"2.0\""),
        (json!({"method": "shelf_list", "id": 1, "jsonrpc": 2.0}), -32600, "jsonrpc 2.0"),
        (json!({"method": 5, "id": 1}), -32600, "method 5: must be a string"),
        (json!({"id": 1}), -32600, "method: required but not given"),
        (json!({"method": "shelf_put", "id": 1}), -32602, "shelf_put: name: required"),
        (json!({"method": "shelf_put", "id": 1, "params": {"name": 1}}), -32602, "in quotes"),
    ] {
        let reply = answer(&table, &request);
        let message = reply["error"]["message"].as_str().unwrap();
        assert_eq!(reply["error"]["code"], code, "{request}: {message}");
        assert_eq!(reply["id"], 1, "{request}");
        assert!(message.contains(text), "{request}: {message}");
        for key in ["method", "field", "value", "reason", "fix"] {
            assert!(reply["error"]["data"].get(key).is_some(), "{key}");
        }
    }
    for request in [json!({"method": "shelf_list", "id": {}}), json!({"id": [1]}), json!({"id": true})] {
        let reply = answer(&table, &request);
        assert_eq!((&reply["error"]["code"], &reply["id"]), (&json!(-32600), &Value::Null));
    }
    for (text, code) in [
        ("{\"method\":", -32700),
        ("{} {}", -32700),
        ("", -32700),
        ("[1,]", -32700),
        ("7", -32600),
        ("{\"method\":\"shelf_list\",\"method\":\"shelf_list\",\"id\":1}", -32600),
        ("{\"method\":\"shelf_put\",\"params\":{\"name\":\"a\",\"name\":\"b\"},\"id\":1}", -32700),
        ("{\"method\":\"shelf_put\",\"params\":{\"name\":\"\\ud800\"},\"id\":1}", -32700),
    ] {
        let reply = block_on(table.answer(text)).unwrap();
        let reply: Value = serde_json::from_str(&reply).unwrap();
        assert_eq!(reply["error"]["code"], code, "{text}: {reply}");
    }
}

#[test]
fn notifications_run_and_are_not_answered() {
    let shelf = Shelf::new();
    let table = shelf.running();
    for request in [
        json!({"method": "shelf_put", "params": {"name": "a"}}),
        json!({"method": "shelf_put", "params": {"name": "a"}}),
        json!({"method": "no_such_method"}),
        json!([{"method": "shelf_put", "params": {"name": "b"}}]),
    ] {
        assert_eq!(block_on(table.answer(&request.to_string())), None, "{request}");
    }
    assert_eq!(*shelf.boxes.lock().unwrap(), ["a", "b"]);
    assert_eq!(shelf.saved.lock().unwrap().len(), 2);
}

#[test]
fn batches_are_answered_in_order() {
    let table = Shelf::new().running();
    let reply = answer(
        &table,
        &json!([
            {"method": "shelf_put", "params": {"name": "a"}, "id": 1},
            {"method": "shelf_put", "params": {"name": "b"}},
            7,
            {"method": "shelf_put", "params": {"name": "a"}, "id": 2},
            {"method": "none", "id": 3},
            [],
            {"method": "shelf_list", "id": 4},
        ]),
    );
    let replies = reply.as_array().unwrap();
    let outcome: Vec<_> = replies.iter().map(|reply| (reply["id"].clone(), reply["error"]["code"].clone())).collect();
    assert_eq!(
        outcome,
        [
            (json!(1), Value::Null),
            (Value::Null, json!(-32600)),
            (json!(2), json!(-17)),
            (json!(3), json!(-32601)),
            (Value::Null, json!(-32600)),
            (json!(4), Value::Null),
        ]
    );
    assert_eq!(replies[5]["result"], json!(["a", "b"]));

    assert_eq!(answer(&table, &json!([]))["error"]["code"], -32600);
    let many = json!(vec![1; MAX_BATCH + 1]);
    assert_eq!(answer(&table, &many)["error"]["code"], -32600);
}

#[test]
fn replies_are_bounded() {
    let table = Shelf::new().table();
    let request = |id: u64, bytes: usize| json!({"method": "shelf_large", "id": id, "params": {"bytes": bytes}});
    let reply = answer(&table, &request(1, MAX_REPLY_BYTES));
    assert!(reply["error"]["code"].is_i64());

    let third = MAX_REPLY_BYTES / 3;
    let batch = json!([request(1, third), request(2, third), request(3, third), request(4, 10)]);
    let reply = answer(&table, &batch);
    assert!(reply.to_string().len() < MAX_REPLY_BYTES);
    assert!(reply[1]["result"].is_string());
    assert!(reply[2]["error"]["code"].is_i64(), "the third does not fit");
    assert!(reply[3]["result"].is_string(), "the fourth does");
}

#[test]
fn framework_methods_tell_the_truth() {
    let shelf = Shelf::new();
    let log = Arc::new(TestLog::default());
    let builder = shelf.builder().log(log.clone()).runtime(Arc::new(TestRuntime));
    let table = builder.build().unwrap();
    call(&table, "framework_start_init", Value::Null).unwrap();

    let version = call(&table, "spdk_get_version", Value::Null).unwrap();
    let text = version["version"].as_str().unwrap();
    assert!(text.starts_with("SPDK v26.09 (Ringstone "), "{text}");
    assert_eq!(version["fields"]["major"], 26);

    assert_eq!(
        call(&table, "framework_get_subsystems", Value::Null),
        Ok(json!([
            {"subsystem": "room", "depends_on": []},
            {"subsystem": "shelf", "depends_on": ["room"]},
        ]))
    );
    assert_eq!(
        call(&table, "framework_get_config", json!({"name": "shelf", "with_batches": true})),
        Ok(json!([{"method": "shelf_set_size", "params": {"size": 8}}]))
    );
    let error = call(&table, "framework_get_config", json!({"name": "shlf"})).unwrap_err();
    assert_eq!((error.code(), error.remedy()), (-32602, Some("did you mean shelf?")));

    assert!(call(&table, "spdk_kill_instance", json!({"sig_name": "SIGTERM"})).is_ok());
    assert_eq!(*shelf.killed.lock().unwrap(), Some(KillSignal::Terminate));
    assert!(call(&table, "spdk_kill_instance", json!({"sig_name": "SIGSEGV"})).is_err());

    assert!(call(&table, "log_set_level", json!({"level": "DEBUG"})).is_ok());
    assert!(call(&table, "log_set_print_level", json!({"level": "ERROR"})).is_ok());
    assert_eq!(call(&table, "log_get_level", Value::Null), Ok(json!("DEBUG")));
    assert_eq!(call(&table, "log_get_print_level", Value::Null), Ok(json!("ERROR")));
    assert_eq!(*log.levels.lock().unwrap(), Some((LogLevel::Debug, LogLevel::Error)));
    assert!(call(&table, "log_set_level", json!({"level": "debug"})).is_err());
    assert!(call(&table, "log_set_flag", json!({"flag": "nvmf"})).is_ok());
    let flags = json!({"bdev": false, "nvmf": true});
    assert_eq!(call(&table, "log_get_flags", Value::Null), Ok(flags));
    assert!(call(&table, "log_set_flag", json!({"flag": "all"})).is_ok());
    assert_eq!(*log.flags.lock().unwrap(), [true, true]);
    assert!(call(&table, "log_clear_flag", json!({"flag": "bdev"})).is_ok());
    assert_eq!(*log.flags.lock().unwrap(), [false, true]);
    let error = call(&table, "log_clear_flag", json!({"flag": "nvme"})).unwrap_err();
    assert_eq!((error.code(), error.remedy()), (-32602, Some("did you mean nvmf?")));
}

struct Source(&'static str, &'static [&'static str]);

impl ConfigSource for Source {
    fn name(&self) -> &'static str {
        self.0
    }

    fn depends_on(&self) -> &'static [&'static str] {
        self.1
    }

    fn save(&self) -> Vec<ConfigEntry> {
        Vec::new()
    }
}

#[test]
fn mistakes_of_the_program_are_found_when_the_table_is_built() {
    let shelf = Shelf::new();
    let build = |sources: &[(&'static str, &'static [&'static str])]| {
        let mut builder = shelf.builder();
        for (name, depends_on) in sources {
            builder = builder.source(Arc::new(Source(name, depends_on)));
        }
        builder.build().map(|table| table.sources().collect::<Vec<_>>())
    };
    assert_eq!(build(&[("attic", &["roof", "shelf"]), ("roof", &[])]), Ok(vec!["room", "shelf", "roof", "attic"]));
    assert_eq!(build(&[("room", &[])]), Err(BuildError::SameSource("room")));
    assert_eq!(build(&[("attic", &["sky"])]), Err(BuildError::Dependency { of: "attic", on: "sky" }));
    assert_eq!(build(&[("a", &["b"]), ("b", &["a"])]), Err(BuildError::Dependency { of: "a", on: "b" }));
    let twice = shelf.builder().add(&shelf, &METHODS[..1]).build();
    assert_eq!(twice.err(), Some(BuildError::SameName("shelf_put")));
}

#[test]
fn what_is_only_half_brought_in_is_never_saved() {
    let shelf = Shelf::new();
    let table = shelf.table();
    table.hold();
    call(&table, "shelf_set_size", json!({"size": 3})).unwrap();
    assert!(shelf.saved.lock().unwrap().is_empty(), "before the start there is nothing whole to save");
    call(&table, "framework_start_init", Value::Null).unwrap();

    let mut change = pin!(table.call("shelf_put", json!({"name": "mine"})));
    let mut ready = pin!(table.call("framework_wait_init", Value::Null));
    assert!(is_pending(change.as_mut()) && is_pending(ready.as_mut()));
    block_on(table.apply("shelf_put", json!({"name": "restored"}))).unwrap();
    assert!(is_pending(change.as_mut()));
    assert!(shelf.saved.lock().unwrap().is_empty());

    block_on(table.release()).unwrap();
    let last = |shelf: &Shelf| shelf.saved.lock().unwrap().last().unwrap().1.to_string();
    assert!(last(&shelf).contains("restored") && !last(&shelf).contains("mine"));
    block_on(change).unwrap();
    block_on(ready).unwrap();
    assert!(last(&shelf).contains("restored") && last(&shelf).contains("mine"));
}

#[test]
fn what_was_brought_in_unchanged_is_not_saved_again() {
    let shelf = Shelf::new();
    let table = shelf.table();
    table.hold();
    call(&table, "framework_start_init", Value::Null).unwrap();
    block_on(table.apply("shelf_put", json!({"name": "restored"}))).unwrap();
    block_on(table.release()).unwrap();
    assert!(shelf.saved.lock().unwrap().is_empty());
}
