//! Every module goes through the conformance suite.

use std::path::PathBuf;

use reactor::file::EngineChoice;
use ringstone_bdev::conformance::{World, suite};
use ringstone_bdev::modules::MODULES;

/// A folder of this test's own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("ringstone-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn every_module_conforms() {
    let folder = Folder::new("conformance");
    for subject in MODULES.iter().flat_map(|module| module.subjects) {
        for seed in [1, 0xfeed_beef, 0x1234_5678_9abc_def0] {
            suite(*subject, seed, &folder.0, |config| World::on_host(EngineChoice::Auto, config));
        }
    }
}
