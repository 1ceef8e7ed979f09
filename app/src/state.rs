//! The state directory: what survives the process.
//!
//! ```text
//! STATE_DIR/config.json             the configuration, as save_config would write it, after the last successful change
//! STATE_DIR/config.json.superseded  the one before, when something else took its place as a whole
//! STATE_DIR/config.json.unrestored  one of which parts could not be restored
//! STATE_DIR/vol0.img                the volume that a fresh appliance makes
//! STATE_DIR/rpc.sock                the JSON-RPC socket, unless --rpc-socket names another
//! STATE_DIR/lock                    held by the process that uses the directory
//! ```
//! config.json has one key beside SPDK's `subsystems`: `ringstone`, with the version of the format and, where a
//! `--config` file was applied, that file's checksum. It is replaced atomically: temporary file, fsync, rename, fsync of
//! the folder.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;

use reactor::file::Files;
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

/// Version of the format of config.json.
const VERSION: u64 = 1;
/// A configuration is smaller than this.
const MAX_BYTES: u64 = 64 << 20;

/// The state directory of this process.
pub struct StateDir {
    dir: PathBuf,
    files: Arc<dyn Files>,
    _lock: File,
    /// Checksum of the `--config` file that the configuration stems from.
    origin: Mutex<Option<String>>,
}

/// What config.json held.
#[derive(Debug)]
pub struct Saved {
    /// The document, without the `ringstone` key.
    pub text: String,
    /// Checksum of the `--config` file that it stems from.
    pub origin: Option<String>,
}

fn fail(doing: &str, path: &Path, error: &io::Error) -> String {
    format!("{doing} {}: {error}", path.display())
}

impl StateDir {
    /// Makes the directory if need be and takes it for this process.
    pub fn open(dir: &Path, files: Arc<dyn Files>) -> Result<StateDir, String> {
        let hint = "; give --state-dir a directory that you may write to";
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| fail("cannot make the state directory", dir, &e) + hint)?;
        let path = dir.join("lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| fail("cannot open", &path, &e) + hint)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(format!(
                    "another ringstone uses the state directory {}; stop it, or give --state-dir another directory",
                    dir.display()
                ));
            }
            Err(errno) => return Err(fail("cannot lock", &path, &errno.into())),
        }
        Ok(StateDir { dir: dir.to_owned(), files, _lock: lock, origin: Mutex::default() })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    fn config(&self) -> PathBuf {
        self.dir.join("config.json")
    }

    /// Whether a configuration was saved.
    pub fn has_saved(&self) -> bool {
        self.config().exists()
    }

    /// The configuration that was saved last.
    pub fn load(&self) -> Result<Option<Saved>, String> {
        let path = self.config();
        let bytes = match self.files.read(&path, MAX_BYTES) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(fail("cannot read the saved configuration", &path, &error)),
        };
        let unusable = |why: String| {
            format!(
                "the saved configuration {} {why}; repair it, or move it away to start afresh (volumes' files stay)",
                path.display()
            )
        };
        let mut document: Value = serde_json::from_slice(&bytes).map_err(|e| unusable(format!("is not JSON: {e}")))?;
        let own = document.as_object_mut().and_then(|object| object.remove("ringstone"));
        let version = own.as_ref().and_then(|own| own["version"].as_u64());
        if version != Some(VERSION) {
            return Err(unusable(format!("has version {version:?}; this program reads version {VERSION}")));
        }
        let origin = own.and_then(|own| own["config_crc64"].as_str().map(str::to_string));
        Ok(Some(Saved { text: document.to_string(), origin }))
    }

    /// Which `--config` file the configurations saved from now on stem from.
    pub fn set_origin(&self, origin: Option<String>) {
        *self.origin.lock().expect("nothing panics with the lock") = origin;
    }

    /// Saves a configuration document, durably.
    pub fn save(&self, document: &Value) -> Result<(), String> {
        let mut document = document.clone();
        let mut own = json!({ "version": VERSION });
        if let Some(origin) = &*self.origin.lock().expect("nothing panics with the lock") {
            own["config_crc64"] = json!(origin);
        }
        if let Some(object) = document.as_object_mut() {
            object.insert("ringstone".into(), own);
        }
        let path = self.config();
        self.files
            .replace(&path, rpc::config::to_text(&document).as_bytes())
            .map_err(|e| fail("cannot save the configuration", &path, &e))
    }

    /// Keeps the saved configuration under another name, because it is about to be replaced as a whole.
    pub fn set_aside(&self, ending: &str) -> Result<PathBuf, String> {
        let path = self.config();
        let aside = self.dir.join(format!("config.json.{ending}"));
        let bytes = self.files.read(&path, MAX_BYTES).map_err(|e| fail("cannot read", &path, &e))?;
        self.files.replace(&aside, &bytes).map_err(|e| fail("cannot write", &aside, &e))?;
        Ok(aside)
    }
}

/// The checksum that tells whether a `--config` file is the one that was applied.
pub fn checksum(bytes: &[u8]) -> String {
    format!("{:016x}", crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use reactor::file::os::OsFiles;

    fn temporary(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("ringstone-state-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = temporary("saved");
        let state = StateDir::open(&dir, Arc::new(OsFiles)).unwrap();
        assert!(state.load().unwrap().is_none());
        let document = json!({ "subsystems": [{ "subsystem": "bdev", "config": [] }] });
        state.set_origin(Some(checksum(b"file")));
        state.save(&document).unwrap();
        let saved = state.load().unwrap().unwrap();
        assert_eq!(serde_json::from_str::<Value>(&saved.text).unwrap(), document);
        assert_eq!(saved.origin, Some(checksum(b"file")));
        assert_ne!(checksum(b"file"), checksum(b"another"));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_directory_is_used_once() {
        let dir = temporary("lock");
        let first = StateDir::open(&dir, Arc::new(OsFiles)).unwrap();
        let error = StateDir::open(&dir, Arc::new(OsFiles)).err().unwrap();
        assert!(error.contains("--state-dir"), "{error}");
        drop(first);
        StateDir::open(&dir, Arc::new(OsFiles)).unwrap();
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn an_unreadable_configuration_says_what_to_do() {
        let dir = temporary("bad");
        let state = StateDir::open(&dir, Arc::new(OsFiles)).unwrap();
        for text in ["{", "{\"subsystems\":[]}", "{\"subsystems\":[],\"ringstone\":{\"version\":99}}"] {
            fs::write(dir.join("config.json"), text).unwrap();
            let error = state.load().unwrap_err();
            assert!(error.contains("move it away"), "{error}");
        }
        fs::remove_dir_all(dir).unwrap();
    }
}
