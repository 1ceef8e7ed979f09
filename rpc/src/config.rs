//! Configuration documents, in the form that SPDK's save_config writes:
//!
//! ```json
//! {"subsystems": [{"subsystem": "bdev", "config": [
//!     {"method": "bdev_malloc_create", "params": {"name": "Malloc0", "...": "..."}}
//! ]}]}
//! ```
//!
//! `config` may be null. A member of `config` may itself be an array of calls;
//! those are made one by one like all others.
//!
//! Loading makes all calls that are allowed before the server starts, then
//! `framework_start_init`, then the rest. A call that is allowed in both
//! states is made once, before the start.
//!
//! A document that SPDK wrote names parts and options of modules that are not
//! here. Skipped, and told, is what cannot have made anything: calls in parts
//! that this server does not have, and unknown methods that only set options.
//! Any other unknown method is an error.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use schema::{ConfigEntry, ConfigSource, RpcError, nearest};
use serde_json::{Map, Value, json};

use crate::json;
use crate::table::{BuildError, Phase, Table};

/// Larger files are refused before they are read.
pub const MAX_FILE_BYTES: u64 = 64 << 20;

/// The document for these sources, which come in their order.
pub fn document(sources: &[Arc<dyn ConfigSource>]) -> Value {
    let section = |source: &Arc<dyn ConfigSource>| json!({"subsystem": source.name(), "config": entries(&**source)});
    json!({"subsystems": sources.iter().map(section).collect::<Value>()})
}

/// The document as text, indented by two spaces, with a newline at its end.
pub fn to_text(document: &Value) -> String {
    format!("{document:#}\n")
}

pub(crate) fn entries(source: &dyn ConfigSource) -> Value {
    source.save().iter().map(ConfigEntry::to_json).collect()
}

/// Each source after those it depends on; otherwise in the order given.
pub(crate) fn ordered(mut left: Vec<Arc<dyn ConfigSource>>) -> Result<Vec<Arc<dyn ConfigSource>>, BuildError> {
    let mut ordered: Vec<Arc<dyn ConfigSource>> = Vec::new();
    let has = |ordered: &[Arc<dyn ConfigSource>], name: &str| ordered.iter().any(|source| source.name() == name);
    for (at, source) in left.iter().enumerate() {
        if has(&left[..at], source.name()) {
            return Err(BuildError::SameSource(source.name()));
        }
    }
    while !left.is_empty() {
        let ready = |source: &Arc<dyn ConfigSource>| source.depends_on().iter().all(|name| has(&ordered, name));
        let Some(at) = left.iter().position(ready) else {
            let of = &left[0];
            let on = of.depends_on().iter().find(|name| !has(&ordered, name));
            return Err(BuildError::Dependency { of: of.name(), on: on.copied().unwrap_or_default() });
        };
        ordered.push(left.remove(at));
    }
    Ok(ordered)
}

/// One call of a document, and where it stands.
#[derive(Clone, Debug, PartialEq)]
struct Call {
    place: Place,
    params: Value,
}

/// Where in a document a call stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Name of the part.
    pub subsystem: String,
    /// Index in its `config`, from 0.
    pub entry: usize,
    /// Index in a batch, where the entry is one.
    pub in_batch: Option<usize>,
    /// The method.
    pub method: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "subsystem {}, entry {}", self.subsystem, self.entry)?;
        match self.in_batch {
            Some(at) => write!(f, ", call {at} of its batch"),
            None => Ok(()),
        }
    }
}

/// Why a document was not loaded.
#[derive(Debug)]
pub struct ConfigError {
    /// The file, if it came from one.
    pub file: Option<PathBuf>,
    /// What went wrong.
    pub kind: ConfigErrorKind,
}

/// What can go wrong with a document.
#[derive(Debug)]
pub enum ConfigErrorKind {
    /// The file cannot be read.
    Read(std::io::Error),
    /// It is too large; how many bytes it has.
    TooLarge(u64),
    /// It is no JSON, or no configuration.
    Malformed(String),
    /// The server does not start.
    Start(RpcError),
    /// A call failed.
    Call(Place, RpcError),
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "configuration file {}: ", file.display())?,
            None => write!(f, "configuration: ")?,
        }
        match &self.kind {
            ConfigErrorKind::Read(error) => write!(f, "cannot be read: {error}"),
            ConfigErrorKind::TooLarge(bytes) => {
                write!(f, "has {bytes} bytes; at most {MAX_FILE_BYTES} are read")
            }
            ConfigErrorKind::Malformed(reason) => write!(f, "{reason}"),
            ConfigErrorKind::Start(error) => write!(f, "starting failed: {error}"),
            ConfigErrorKind::Call(place, error) => write!(f, "{place}: {error}"),
        }
    }
}

impl std::error::Error for ConfigError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            ConfigErrorKind::Read(error) => Some(error),
            ConfigErrorKind::Start(error) | ConfigErrorKind::Call(_, error) => Some(error),
            _ => None,
        }
    }
}

/// What to do when a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// End with the error.
    Stop,
    /// Report it and go on with the next call.
    Continue,
}

/// What loading a document did.
#[derive(Debug, Default)]
pub struct LoadReport {
    /// Calls that succeeded.
    pub applied: usize,
    /// Calls that were not made, and why not.
    pub skipped: Vec<(Place, &'static str)>,
    /// Calls that failed; with [`OnError::Stop`] there are none.
    pub failed: Vec<(Place, RpcError)>,
}

/// A configuration document, checked in its form but not yet applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    file: Option<PathBuf>,
    calls: Vec<Call>,
}

impl Config {
    /// Reads a document from a file.
    pub fn read(path: &Path) -> Result<Config, ConfigError> {
        let fail = |kind| ConfigError { file: Some(path.to_owned()), kind };
        let text = read_bounded(path).map_err(fail)?;
        let mut config = Config::parse(&text).map_err(|error| fail(error.kind))?;
        config.file = Some(path.to_owned());
        Ok(config)
    }

    /// Reads a document from text.
    pub fn parse(text: &str) -> Result<Config, ConfigError> {
        let calls = json::parse(text)
            .map_err(|error| format!("is not JSON: {error}"))
            .and_then(calls)
            .map_err(|reason| ConfigError { file: None, kind: ConfigErrorKind::Malformed(reason) })?;
        Ok(Config { file: None, calls })
    }

    /// Whether there is no call to make.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Makes the calls, and starts the server between those for before and
    /// those for after. Changes are not saved: they come from what is saved.
    pub async fn load(&self, table: &Table, on_error: OnError) -> Result<LoadReport, ConfigError> {
        let mut report = LoadReport::default();
        let mut done = vec![false; self.calls.len()];
        if table.phase() == Phase::Startup {
            self.pass(table, on_error, &mut done, &mut report).await?;
            table
                .apply("framework_start_init", Value::Null)
                .await
                .map_err(|error| self.fails(ConfigErrorKind::Start(error)))?;
        }
        self.pass(table, on_error, &mut done, &mut report).await?;
        for (call, done) in self.calls.iter().zip(done) {
            if !done {
                let why = "only callable before the server has started";
                report.skipped.push((call.place.clone(), why));
            }
        }
        Ok(report)
    }

    /// Makes the calls for before the start only, as for a server that waits
    /// for `framework_start_init` over RPC.
    pub async fn load_startup(&self, table: &Table, on_error: OnError) -> Result<LoadReport, ConfigError> {
        let mut report = LoadReport::default();
        let mut done = vec![false; self.calls.len()];
        self.pass(table, on_error, &mut done, &mut report).await?;
        Ok(report)
    }

    /// Makes all calls that are not done and allowed in the present state.
    async fn pass(
        &self,
        table: &Table,
        on_error: OnError,
        done: &mut [bool],
        report: &mut LoadReport,
    ) -> Result<(), ConfigError> {
        let phase = table.phase();
        for (call, done) in self.calls.iter().zip(done) {
            if *done {
                continue;
            }
            let place = &call.place;
            let Some(spec) = table.spec(&place.method) else {
                *done = true;
                if let Some(why) = skippable(table, place) {
                    tracing::warn!(method = place.method, "{place} of the configuration skipped: {why}");
                    report.skipped.push((place.clone(), why));
                    continue;
                }
                self.failed(call, table.unknown(&place.method), on_error, report)?;
                continue;
            };
            let allowed = match phase {
                Phase::Startup => spec.states.startup,
                Phase::Runtime => spec.states.runtime,
            };
            if !allowed {
                continue;
            }
            *done = true;
            match table.apply(&place.method, call.params.clone()).await {
                Ok(_) => report.applied += 1,
                Err(error) => self.failed(call, error, on_error, report)?,
            }
        }
        Ok(())
    }

    fn failed(
        &self,
        call: &Call,
        error: RpcError,
        on_error: OnError,
        report: &mut LoadReport,
    ) -> Result<(), ConfigError> {
        match on_error {
            OnError::Stop => Err(self.fails(ConfigErrorKind::Call(call.place.clone(), error))),
            OnError::Continue => {
                report.failed.push((call.place.clone(), error));
                Ok(())
            }
        }
    }

    fn fails(&self, kind: ConfigErrorKind) -> ConfigError {
        ConfigError { file: self.file.clone(), kind }
    }
}

fn read_bounded(path: &Path) -> Result<String, ConfigErrorKind> {
    let bytes = std::fs::metadata(path).map_err(ConfigErrorKind::Read)?.len();
    if bytes > MAX_FILE_BYTES {
        return Err(ConfigErrorKind::TooLarge(bytes));
    }
    std::fs::read_to_string(path).map_err(ConfigErrorKind::Read)
}

/// Why an unknown method may be left out, if it may.
fn skippable(table: &Table, place: &Place) -> Option<&'static str> {
    if !table.sources().any(|name| name == place.subsystem) {
        return Some("this server has no such part");
    }
    const SETTINGS: [&str; 3] = ["_set_options", "_set_hotplug", "_set_crdt"];
    let sets = SETTINGS.iter().any(|end| place.method.ends_with(end));
    sets.then_some("it sets options of something that is not here")
}

/// All calls of a document, in order.
fn calls(document: Value) -> Result<Vec<Call>, String> {
    let mut document = object(document, "the document", &["subsystems"])?;
    let subsystems = match document.remove("subsystems") {
        Some(Value::Array(subsystems)) => subsystems,
        Some(_) => return Err("subsystems must be an array".to_owned()),
        None => return Err("the key subsystems is missing".to_owned()),
    };
    let mut calls = Vec::new();
    for (at, section) in subsystems.into_iter().enumerate() {
        let mut section = object(section, &format!("subsystems[{at}]"), &["subsystem", "config"])?;
        let subsystem = match section.remove("subsystem") {
            Some(Value::String(subsystem)) => subsystem,
            _ => return Err(format!("subsystems[{at}].subsystem must be a string")),
        };
        let entries = match section.remove("config") {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(entries)) => entries,
            Some(_) => return Err(format!("config of subsystem {subsystem} must be an array")),
        };
        for (entry, value) in entries.into_iter().enumerate() {
            match value {
                Value::Array(batch) => {
                    for (at, value) in batch.into_iter().enumerate() {
                        calls.push(call(value, &subsystem, entry, Some(at))?);
                    }
                }
                value => calls.push(call(value, &subsystem, entry, None)?),
            }
        }
    }
    Ok(calls)
}

fn call(value: Value, subsystem: &str, entry: usize, in_batch: Option<usize>) -> Result<Call, String> {
    let mut place = Place { subsystem: subsystem.to_owned(), entry, in_batch, method: String::new() };
    let mut value = object(value, &place.to_string(), &["method", "params"])?;
    place.method = match value.remove("method") {
        Some(Value::String(method)) => method,
        _ => return Err(format!("{place}: method must be a string")),
    };
    let params = value.remove("params").unwrap_or(Value::Null);
    if !params.is_object() && !params.is_null() {
        return Err(format!("{place}: params must be an object"));
    }
    Ok(Call { place, params })
}

fn object(value: Value, what: &str, known: &[&str]) -> Result<Map<String, Value>, String> {
    let Value::Object(object) = value else {
        return Err(format!("{what} must be an object"));
    };
    if let Some(key) = object.keys().find(|key| !known.contains(&key.as_str())) {
        let meant = match nearest(key, known.iter().copied()) {
            Some(name) => format!("did you mean {name}?"),
            None => format!("known are {}", known.join(", ")),
        };
        return Err(format!("{what} has an unknown key {key:?}; {meant}"));
    }
    Ok(object)
}
