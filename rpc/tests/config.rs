//! Configuration documents: loaded, refused, and written again.

mod common;

use std::fs;
use std::sync::Arc;

use common::{Folder, Shelf, block_on};
use ringstone_rpc::config::{Config, OnError, to_text};
use ringstone_rpc::{Phase, Table};
use serde_json::{Value, json};

fn document(config: Value) -> String {
    json!({"subsystems": [{"subsystem": "shelf", "config": config}]}).to_string()
}

fn load(shelf: &Arc<Shelf>, text: &str) -> (Arc<Table>, Result<usize, String>) {
    let table = shelf.table();
    let applied = Config::parse(text)
        .and_then(|config| block_on(config.load(&table, OnError::Stop)))
        .map(|report| report.applied)
        .map_err(|error| error.to_string());
    (table, applied)
}

#[test]
fn calls_are_made_before_and_after_the_start() {
    let shelf = Shelf::new();
    let text = json!({"subsystems": [
        {"subsystem": "room", "config": null},
        {"subsystem": "shelf", "config": [
            {"method": "shelf_put", "params": {"name": "a"}},
            {"method": "shelf_set_size", "params": {"size": 3}},
            [
                {"method": "shelf_put", "params": {"name": "b"}},
                {"method": "shelf_put", "params": {"name": "c"}},
            ],
            {"method": "shelf_list"},
        ]},
    ]});
    let (table, applied) = load(&shelf, &text.to_string());
    assert_eq!(applied, Ok(5));
    assert_eq!(table.phase(), Phase::Runtime);
    assert_eq!(*shelf.boxes.lock().unwrap(), ["a", "b", "c"]);
    assert_eq!(*shelf.size.lock().unwrap(), 3);
    assert!(shelf.saved.lock().unwrap().is_empty(), "it is saved already");

    // What is saved now loads to the same.
    let text = to_text(&block_on(table.save()));
    assert!(text.starts_with("{\n  \"subsystems\": [\n"), "{text}");
    let copy = Shelf::new();
    let (table, applied) = load(&copy, &text);
    assert_eq!(applied, Ok(4));
    assert_eq!(to_text(&block_on(table.save())), text);
}

#[test]
fn an_empty_document_starts_the_server() {
    for text in
        [json!({"subsystems": []}).to_string(), document(Value::Null), document(json!([])), document(json!([[]]))]
    {
        let (table, applied) = load(&Shelf::new(), &text);
        assert_eq!((applied, table.phase()), (Ok(0), Phase::Runtime));
    }
}

#[test]
fn a_server_may_wait_between_the_two() {
    let shelf = Shelf::new();
    let table = shelf.table();
    let text = document(json!([
        {"method": "shelf_put", "params": {"name": "a"}},
        {"method": "shelf_set_size", "params": {"size": 3}},
    ]));
    let config = Config::parse(&text).unwrap();
    let report = block_on(config.load_startup(&table, OnError::Stop)).unwrap();
    assert_eq!((report.applied, table.phase()), (1, Phase::Startup));
    block_on(table.call("framework_start_init", Value::Null)).unwrap();

    // Into a server that has started, what is for before it is not lost
    // silently.
    let report = block_on(config.load(&table, OnError::Stop)).unwrap();
    assert_eq!((report.applied, report.skipped.len()), (1, 1));
    assert_eq!(report.skipped[0].0.method, "shelf_set_size");
}

#[test]
fn errors_name_file_subsystem_entry_method_and_reason() {
    let folder = Folder::new();
    let path = folder.file("state.json");
    let text = document(json!([
        {"method": "shelf_put", "params": {"name": "a"}},
        [{"method": "shelf_list"}, {"method": "shelf_put", "params": {"name": "a"}}],
        {"method": "shelf_put", "params": {"name": "b"}},
    ]));
    fs::write(&path, text).unwrap();
    let shelf = Shelf::new();
    let config = Config::read(&path).unwrap();
    let error = block_on(config.load(&shelf.table(), OnError::Stop)).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "configuration file {}: subsystem shelf, entry 1, call 1 of its batch: File exists: \
             shelf_put: name \"a\": a box of that name is there already; choose another name",
            path.display()
        )
    );
    assert_eq!(*shelf.boxes.lock().unwrap(), ["a"]);

    let shelf = Shelf::new();
    let report = block_on(config.load(&shelf.table(), OnError::Continue)).unwrap();
    assert_eq!((report.applied, report.failed.len()), (3, 1));
    assert_eq!(report.failed[0].1.code(), -17);
    assert_eq!(*shelf.boxes.lock().unwrap(), ["a", "b"]);
}

#[test]
fn what_another_program_has_and_this_one_lacks() {
    let shelf = Shelf::new();
    let table = shelf.table();
    let text = json!({"subsystems": [
        {"subsystem": "iscsi", "config": [{"method": "iscsi_create", "params": {"x": 1}}]},
        {"subsystem": "shelf", "config": [
            {"method": "shelf_glue_set_options", "params": {"glue": 1}},
            {"method": "shelf_put", "params": {"name": "a"}},
        ]},
    ]});
    let config = Config::parse(&text.to_string()).unwrap();
    let report = block_on(config.load(&table, OnError::Stop)).unwrap();
    assert_eq!((report.applied, report.skipped.len()), (1, 2));
    assert_eq!(report.skipped[0].1, "this server has no such part");

    // But what would have made something is an error.
    let (table, applied) = load(&Shelf::new(), &document(json!([{"method": "shelf_putt"}])));
    let error = applied.unwrap_err();
    assert!(error.contains("subsystem shelf, entry 0: Method not found: shelf_putt"), "{error}");
    assert!(error.contains("did you mean shelf_put?"), "{error}");
    assert_eq!(table.phase(), Phase::Startup);
}

#[test]
fn a_failing_start_is_told() {
    let shelf = Shelf::new();
    shelf.starting_fails.store(true, std::sync::atomic::Ordering::SeqCst);
    let (_, applied) = load(&shelf, &document(json!([])));
    let error = applied.unwrap_err();
    assert!(error.contains("starting failed: Cannot allocate memory"), "{error}");
}

#[test]
fn malformed_documents_are_refused_before_any_call() {
    for (text, reason) in [
        ("", "is not JSON"),
        ("{\"subsystems\": [", "is not JSON"),
        ("[]", "the document must be an object"),
        ("{}", "the key subsystems is missing"),
        ("{\"subsystems\": {}}", "subsystems must be an array"),
        ("{\"subsystem\": []}", "did you mean subsystems?"),
        ("{\"subsystems\": [], \"subsystems\": []}", "given twice"),
        ("{\"subsystems\": [1]}", "subsystems[0] must be an object"),
        ("{\"subsystems\": [{\"config\": []}]}", "subsystems[0].subsystem must be a string"),
        ("{\"subsystems\": [{\"subsystem\": \"a\", \"conf\": []}]}", "did you mean config?"),
        ("{\"subsystems\": [{\"subsystem\": \"a\", \"config\": {}}]}", "config of subsystem a must be an array"),
    ] {
        let error = Config::parse(text).unwrap_err().to_string();
        assert!(error.contains(reason), "{text}: {error}");
    }
    for (entry, reason) in [
        (json!(1), "entry 1 must be an object"),
        (json!({}), "entry 1: method must be a string"),
        (json!({"method": "x", "params": [1]}), "entry 1: params must be an object"),
        (json!({"method": "x", "parms": {}}), "did you mean params?"),
        (json!([{"method": 1}]), "entry 1, call 0 of its batch: method must be a string"),
        (json!([[{"method": "x"}]]), "entry 1, call 0 of its batch must be an object"),
    ] {
        let text = document(json!([{"method": "shelf_list"}, entry]));
        let error = Config::parse(&text).unwrap_err().to_string();
        assert!(error.contains(reason), "{text}: {error}");
    }
}

#[test]
fn files_that_cannot_be_read_are_told() {
    let folder = Folder::new();
    let path = folder.file("none.json");
    let error = Config::read(&path).unwrap_err().to_string();
    assert!(error.contains(&path.display().to_string()), "{error}");
    assert!(error.contains("cannot be read: No such file"), "{error}");

    let path = folder.file("large.json");
    let file = fs::File::create(&path).unwrap();
    file.set_len(ringstone_rpc::config::MAX_FILE_BYTES + 1).unwrap();
    let error = Config::read(&path).unwrap_err().to_string();
    assert!(error.contains("at most 67108864 are read"), "{error}");

    let path = folder.file("binary.json");
    fs::write(&path, b"\xff\xfe").unwrap();
    let error = Config::read(&path).unwrap_err().to_string();
    assert!(error.contains("cannot be read"), "{error}");
}
