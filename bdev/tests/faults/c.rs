//! A handler in C that does wrong, by the block that is read, as a device.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use reactor::Buffers;
use reactor::file::EngineChoice;
use ringstone_bdev::conformance::{Client, World, WorldConfig};
use ringstone_bdev::core::{BdevInfo, IoStatus, Op};
use ringstone_bdev::modules::appliance::settings::Settings;
use ringstone_bdev::modules::appliance::{create, delete, stats};
use serde_json::json;

use super::Logged;

/// A shared object that is removed at the end. It stays loaded.
struct Object(PathBuf);

impl Object {
    fn build() -> Object {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("appliance");
        let out = std::env::temp_dir().join(format!("ringstone-faulty-{}.so", std::process::id()));
        let built = Command::new("cc")
            .args(["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-I"])
            .arg(root.join("include"))
            .arg("-o")
            .arg(&out)
            .arg(root.join("tests/faulty.c"))
            .output()
            .expect("the system has a C compiler");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        Object(out)
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn make(world: &mut World, object: &Object) -> Arc<BdevInfo> {
    let system = Arc::clone(world.system());
    let mut settings = Settings::new(&object.0.display().to_string(), 512, 64);
    settings.timeout = Some(Duration::from_millis(50));
    world.block_on(create(&system, "app", None, settings)).unwrap()
}

#[test]
fn a_handler_in_c_that_does_wrong_fails_its_own_requests() {
    let logged = Logged::begin();
    let object = Object::build();
    let mut world = World::on_host(EngineChoice::Threads, WorldConfig::default());
    let system = Arc::clone(world.system());
    let bdev = make(&mut world, &object);
    let mut client = Client::open(&mut world, 0, &bdev);
    let mut read = |world: &mut World, lba: u64| client.run(world, Op::Read, lba, 1, &[0; 512]).status;
    assert_eq!(read(&mut world, 1), IoStatus::Success, "completed twice, it ends once");
    assert_eq!(read(&mut world, 2), IoStatus::Failed);
    logged.assert_line(&["with a length of 511", "bdev=\"app\"", "handler=\"faulty\"", "request=", "lba=2"]);
    assert_eq!(read(&mut world, 3), IoStatus::Success, "tokens that never were end nothing");
    assert_eq!(read(&mut world, 4), IoStatus::Failed, "a status that there is not");
    // One that it keeps: others go on, it ends at its deadline, and the handler is told to let go of it.
    let kept = client.submit(Op::Read, 5, 1, Buffers::heap(512));
    for lba in 10..20 {
        assert_eq!(client.run(&mut world, Op::Read, lba, 1, &[0; 512]).status, IoStatus::Success);
    }
    assert!(client.take(kept).is_none());
    world.pass_time(Duration::from_millis(51));
    assert_eq!(client.wait(&mut world, kept).status, IoStatus::TimedOut);
    logged.assert_line(&["ends without it", "handler=\"faulty\"", "request=", "lba=5", "timed_out"]);
    (0..20).for_each(|_| world.step());
    assert_eq!(stats(&system, "app").unwrap()["late"], 1, "it was aborted, and came home");
    // An abort reaches it before the deadline.
    let kept = client.submit(Op::Read, 5, 1, Buffers::heap(512));
    (0..20).for_each(|_| world.step());
    client.abort(kept);
    assert_eq!(client.wait(&mut world, kept).status, IoStatus::Aborted);
    // So does a reset: the handler ends what it keeps, and nothing has to be given up.
    let given_up = stats(&system, "app").unwrap()["aborted"].clone();
    let kept: Vec<_> = (0..5).map(|_| client.submit(Op::Read, 5, 1, Buffers::heap(512))).collect();
    (0..20).for_each(|_| world.step());
    let reset = client.submit(Op::Reset, 0, 0, Buffers::new());
    assert_eq!(client.wait(&mut world, reset).status, IoStatus::Success);
    for kept in kept {
        assert_eq!(client.wait(&mut world, kept).status, IoStatus::Aborted);
    }
    let found = stats(&system, "app").unwrap();
    assert_eq!((&found["aborted"], &found["overdue"]), (&given_up, &json!(0)));
    client.close();
    drop(bdev);
    world.block_on(delete(&system, "app")).unwrap();
    // The handler completes requests of the device before, which is gone.
    let bdev = make(&mut world, &object);
    let mut client = Client::open(&mut world, 0, &bdev);
    assert_eq!(client.run(&mut world, Op::Read, 6, 1, &[0; 512]).status, IoStatus::Success);
    client.close();
    drop(bdev);
    world.block_on(delete(&system, "app")).unwrap();
    world.assert_clean();
}
