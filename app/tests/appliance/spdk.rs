//! A running SPDK's replies, call by call: the same shapes, the same codes.
//!
//! The samples are not part of the project; where they do not lie beside it, the test says that it was skipped.

use std::collections::BTreeSet;
use std::fs;

use schema::spdk::Reference;
use serde_json::{Value, json};

use crate::common::{Scratch, Server, free_port};

/// Differences that are meant, and why.
const MEANT: &[(&str, &str)] = &[
    ("spdk_get_version null: spdk_get_version.fields.commit: missing", "a release has a version, not a commit"),
    ("log_get_flags null: log_get_flags.", "each server's own parts"),
    ("load_percent: SPDK has no such key", "what connections are placed by is worth knowing"),
    ("qpairs_moved_in: SPDK has no such key", "queues move here"),
    ("qpairs_moved_out: SPDK has no such key", "queues move here"),
    (
        "framework_get_scheduler null: framework_get_scheduler.load_limit",
        "of the dynamic scheduler, which SPDK's was not",
    ),
    ("framework_get_scheduler null: framework_get_scheduler.core_", "of the dynamic scheduler, which SPDK's was not"),
    ("driver_specific.uring.direct: SPDK has no such key", "whether O_DIRECT is in use is worth knowing"),
    ("bdev_malloc_create {\"block_size\":512,\"num_blocks\":16384}: ", "SPDK had a Malloc1 that no sample made"),
    ("bdev_get_bdevs {\"name\":\"lvs0/vol0\"}: ", "made by methods that are not served"),
];

/// What the samples' own server was given that this one is given otherwise.
fn here(value: &Value, image: &str, port: &str) -> Value {
    match value {
        Value::String(text) if text == "/srv/a.img" => json!(image),
        Value::String(text) if text == "4420" => json!(port),
        Value::Array(items) => items.iter().map(|item| here(item, image, port)).collect(),
        Value::Object(object) => object.iter().map(|(key, item)| (key.clone(), here(item, image, port))).collect(),
        other => other.clone(),
    }
}

#[test]
fn the_samples_are_answered_alike() {
    let Some(reference) = Reference::beside(env!("CARGO_MANIFEST_DIR")) else { return };
    let scratch = Scratch::new();
    let [image, other] = ["a.img", "b.img"].map(|name| {
        let path = scratch.path().join(name);
        fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
        path.to_str().unwrap().to_string()
    });
    let port = free_port().to_string();
    let server = Server::start(&scratch, &["--empty"]);
    let served = server.call("rpc_get_methods", json!({"include_aliases": true}));
    let served: BTreeSet<_> = served.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();

    let (mut compared, mut differences, mut absent) = (0, Vec::new(), BTreeSet::new());
    for sample in reference.samples() {
        let method = sample.method;
        if !served.contains(method) && method != "no_such_method" {
            absent.insert(method);
            continue;
        }
        // SPDK lets two bdevs share a file; here that is refused.
        let image = if method == "bdev_aio_create" { &other } else { &image };
        let params = here(sample.params, image, &port);
        let told = format!("{method} {params}");
        compared += 1;
        match (server.client().call(method, params), sample.outcome) {
            (Ok(ours), Ok(_)) => {
                differences.extend(
                    reference.result_differences(method, &ours).into_iter().flatten().map(|d| format!("{told}: {d}")),
                );
            }
            (Err(rpc::ClientError::Server { code, .. }), Err(theirs)) if code == theirs => {}
            (ours, theirs) => differences.push(format!("{told}: {ours:?} here, {theirs:?} there")),
        }
    }
    eprintln!("{compared} samples compared; not served here: {}", absent.into_iter().collect::<Vec<_>>().join(", "));
    assert!(compared > 0);
    differences.retain(|difference| !MEANT.iter().any(|(meant, _)| difference.contains(meant)));
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}
