//! The framework's methods against SPDK's declarations and replies.

mod common;

use std::sync::Arc;

use common::{Shelf, TestLog, TestRuntime, block_on};
use ringstone_rpc::Catalogue;
use schema::spdk::Reference;
use serde_json::{Value, json};

#[test]
fn parameters_are_those_of_spdk() {
    let Some(reference) = Reference::beside(env!("CARGO_MANIFEST_DIR")) else {
        return;
    };
    for spec in Catalogue::builtin().specs() {
        let differences = reference.parameter_differences(spec);
        assert_eq!(differences, Some(vec![]), "{}", spec.name);
    }
}

#[test]
fn results_have_the_shapes_of_spdk() {
    let Some(reference) = Reference::beside(env!("CARGO_MANIFEST_DIR")) else {
        return;
    };
    let shelf = Shelf::new();
    let builder = shelf.builder().log(Arc::new(TestLog::default()));
    let table = builder.runtime(Arc::new(TestRuntime)).build().unwrap();
    block_on(table.call("framework_start_init", Value::Null)).unwrap();
    for method in [
        "framework_get_subsystems",
        "framework_get_reactors",
        "thread_get_stats",
        "thread_get_pollers",
        "thread_get_io_channels",
    ] {
        let ours = block_on(table.call(method, Value::Null)).unwrap();
        let differences = reference.result_differences(method, &ours);
        assert_eq!(differences, Some(vec![]), "{method}");
    }
    // Its commit is not ours.
    let version = block_on(table.call("spdk_get_version", Value::Null)).unwrap();
    assert_eq!(
        reference.result_differences("spdk_get_version", &version),
        Some(vec!["spdk_get_version.fields.commit: missing".to_owned()])
    );
    let flags = block_on(table.call("log_get_flags", Value::Null)).unwrap();
    assert_eq!(flags, json!({"bdev": false, "nvmf": false}));
}
