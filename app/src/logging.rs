//! The log: to standard error, with levels that RPCs change while it runs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rpc::log::{LogControl, LogLevel};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

/// Parts of the program whose debug messages can be turned on one by one, and the crates that they are.
const FLAGS: [(&str, &str); 5] = [
    ("app", "ringstone"),
    ("bdev", "ringstone_bdev"),
    ("nvmf", "ringstone_nvmf"),
    ("reactor", "ringstone_reactor"),
    ("rpc", "ringstone_rpc"),
];

struct Settings {
    level: LogLevel,
    print_level: LogLevel,
    flags: [bool; FLAGS.len()],
}

/// The log's settings, and the way to the running filter.
pub struct Log {
    settings: Mutex<Settings>,
    filter: reload::Handle<Targets, tracing_subscriber::Registry>,
}

impl Log {
    /// Starts to log to standard error.
    pub fn start() -> Arc<Log> {
        let settings = Settings { level: LogLevel::Notice, print_level: LogLevel::Info, flags: [false; FLAGS.len()] };
        let (layer, filter) = reload::Layer::new(targets(&settings));
        tracing_subscriber::registry()
            .with(layer)
            .with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false))
            .init();
        Arc::new(Log { settings: Mutex::new(settings), filter })
    }

    fn settings(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Settings)) {
        let mut settings = self.settings();
        change(&mut settings);
        if let Err(error) = self.filter.reload(targets(&settings)) {
            tracing::error!(%error, "the log's filter cannot be changed");
        }
    }
}

fn filter_of(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warning => LevelFilter::WARN,
        LogLevel::Notice | LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    }
}

fn targets(settings: &Settings) -> Targets {
    let mut targets = Targets::new().with_default(filter_of(settings.print_level));
    for ((_, target), on) in FLAGS.iter().zip(settings.flags) {
        if on {
            targets = targets.with_target(*target, LevelFilter::DEBUG);
        }
    }
    targets
}

impl LogControl for Log {
    fn level(&self) -> LogLevel {
        self.settings().level
    }

    fn set_level(&self, level: LogLevel) {
        self.change(|settings| settings.level = level);
    }

    fn print_level(&self) -> LogLevel {
        self.settings().print_level
    }

    fn set_print_level(&self, level: LogLevel) {
        self.change(|settings| settings.print_level = level);
    }

    fn flags(&self) -> Vec<(&'static str, bool)> {
        FLAGS.iter().map(|(name, _)| *name).zip(self.settings().flags).collect()
    }

    fn set_flag(&self, flag: &str, on: bool) {
        self.change(|settings| {
            for ((name, _), value) in FLAGS.iter().zip(&mut settings.flags) {
                if *name == flag {
                    *value = on;
                }
            }
        });
    }
}
