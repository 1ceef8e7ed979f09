//! `ringstone appliance`: a handler in a process of its own.
//!
//! The bdev is made with `bdev_appliance_create` and the handler `unix:PATH`; the target then listens at PATH, and this
//! connects to it, waits when nobody listens yet, and connects again when the target was restarted. Whatever happens to
//! this process happens to no other: the bdev's I/O fails or waits until it is started again, as `on_disconnect` says.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use appliance::external::{ServeOptions, Stop, serve};
use appliance::memory::Memory;
use appliance::null::Null;
use appliance::shared_object::SharedObject;
use appliance::{Handler, Making, registry};
use serde_json::Value;

use crate::logging::Log;

/// Options of `ringstone appliance`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The socket: what bdev_appliance_create was given behind 'unix:'.
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// memory, null, or the absolute path of a shared object.
    #[arg(long, value_name = "NAME|/LIB.SO")]
    handler: String,
    /// The handler's own options: a JSON object.
    #[arg(long, value_name = "JSON", default_value = "{}")]
    options: String,
    /// End when the bdev is deleted or the target ends; otherwise wait for the next.
    #[arg(long)]
    until_gone: bool,
}

/// Runs the command.
pub fn main(options: &Options) -> ExitCode {
    let _log = Log::start();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), String> {
    let json: Value = serde_json::from_str(&options.options).map_err(|error| format!("--options: {error}"))?;
    if !json.is_object() {
        return Err("--options: they are a JSON object, as in {\"key\": 1}".into());
    }
    let mut make = maker(&options.handler)?;
    let stop = Stop::new().map_err(|error| error.to_string())?;
    stop_on_signals(&stop).map_err(|error| format!("cannot watch for signals: {error}"))?;
    let how = ServeOptions { until_gone: options.until_gone, options: json };
    serve(&options.socket, &mut *make, &how, &stop).map_err(|error| error.to_string())
}

type Make = Box<dyn FnMut(&Making<'_>) -> io::Result<Arc<dyn Handler>>>;

/// What makes the handler of this name or path. It is found, or refused, before anything is connected to.
fn maker(handler: &str) -> Result<Make, String> {
    if handler.starts_with('/') {
        let object = SharedObject::load(Path::new(handler)).map_err(|error| format!("--handler: {error}"))?;
        return Ok(Box::new(move |making| object.make(making)));
    }
    let make = match handler {
        "memory" => Memory::make,
        "null" => Null::make,
        name => registry::find(name).ok_or_else(|| {
            format!(
                "--handler: there is no '{name}'; there are memory, null, and shared objects by their absolute path"
            )
        })?,
    };
    Ok(Box::new(make))
}

/// The first signal ends it in good order, the second at once.
fn stop_on_signals(stop: &Stop) -> io::Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT])?;
    let stop = stop.clone();
    let watch = move || {
        let mut asked = false;
        for _ in signals.forever() {
            if std::mem::replace(&mut asked, true) {
                std::process::exit(130);
            }
            stop.stop();
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(watch).map(drop)
}
