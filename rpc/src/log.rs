//! The `log_*` methods. What a level or a flag does is up to the application.

use std::fmt;
use std::sync::Arc;

use schema::{Kind, Method, Param, Params, RpcError, States, nearest};
use serde_json::{Value, json};

/// How important a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something may fail.
    Warning,
    /// What an operator wants to know.
    Notice,
    /// More of it.
    Info,
    /// What a developer wants to know.
    Debug,
}

const NAMES: &[&str] = &["ERROR", "WARNING", "NOTICE", "INFO", "DEBUG"];

impl LogLevel {
    /// From most to least important.
    pub const ALL: [LogLevel; 5] =
        [LogLevel::Error, LogLevel::Warning, LogLevel::Notice, LogLevel::Info, LogLevel::Debug];

    /// The level of that name on the wire.
    pub fn from_name(name: &str) -> Option<LogLevel> {
        let at = NAMES.iter().position(|known| *known == name)?;
        Some(LogLevel::ALL[at])
    }

    /// The name on the wire.
    pub fn name(self) -> &'static str {
        NAMES[self as usize]
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The application's log.
pub trait LogControl: Send + Sync {
    /// Least important level that goes to the log.
    fn level(&self) -> LogLevel;
    /// Changes it.
    fn set_level(&self, level: LogLevel);
    /// Least important level that is printed as well.
    fn print_level(&self) -> LogLevel;
    /// Changes it.
    fn set_print_level(&self, level: LogLevel);
    /// Components whose debug messages can be turned on, and whether they are.
    fn flags(&self) -> Vec<(&'static str, bool)>;
    /// Turns the debug messages of one listed component on or off.
    fn set_flag(&self, flag: &str, on: bool);
}

/// Context of the `log_*` methods.
pub struct Log(pub Arc<dyn LogControl>);

const LEVEL: &[Param] = &[Param::required("level", Kind::Enum(NAMES), "least important level that is wanted")];

const FLAG: &[Param] = &[Param::required("flag", Kind::Str, "a component that log_get_flags lists, or all")];

/// The `log_*` methods, for catalogues without a server.
pub const METHODS: &[Method<Log>] = &[
    Method::new("log_set_flag", "Turn on the debug messages of a component.", |log: Arc<Log>, params| {
        Box::pin(async move { log.set_flag(&params, true) })
    })
    .states(States::BOTH)
    .params(FLAG),
    Method::new("log_clear_flag", "Turn off the debug messages of a component.", |log: Arc<Log>, params| {
        Box::pin(async move { log.set_flag(&params, false) })
    })
    .states(States::BOTH)
    .params(FLAG),
    Method::new("log_get_flags", "List the components whose debug messages can be turned on.", |log: Arc<Log>, _| {
        Box::pin(async move { Ok(Value::Object(log.flags())) })
    })
    .states(States::BOTH)
    .result("object of component: on or off"),
    Method::new("log_set_level", "Set what goes to the log.", |log: Arc<Log>, params| {
        Box::pin(async move {
            log.0.set_level(level(&params)?);
            Ok(json!(true))
        })
    })
    .states(States::BOTH)
    .params(LEVEL),
    Method::new("log_get_level", "Tell what goes to the log.", |log: Arc<Log>, _| {
        Box::pin(async move { Ok(json!(log.0.level().name())) })
    })
    .states(States::BOTH)
    .result("name of the level"),
    Method::new("log_set_print_level", "Set what is printed to standard error.", |log: Arc<Log>, params| {
        Box::pin(async move {
            log.0.set_print_level(level(&params)?);
            Ok(json!(true))
        })
    })
    .states(States::BOTH)
    .params(LEVEL),
    Method::new("log_get_print_level", "Tell what is printed to standard error.", |log: Arc<Log>, _| {
        Box::pin(async move { Ok(json!(log.0.print_level().name())) })
    })
    .states(States::BOTH)
    .result("name of the level"),
];

fn level(params: &Params) -> Result<LogLevel, RpcError> {
    LogLevel::from_name(params.str("level")?).ok_or_else(|| params.invalid("level", "there is no such level"))
}

impl Log {
    fn flags(&self) -> serde_json::Map<String, Value> {
        let flags = self.0.flags().into_iter();
        flags.map(|(flag, on)| (flag.to_owned(), json!(on))).collect()
    }

    fn set_flag(&self, params: &Params, on: bool) -> Result<Value, RpcError> {
        let wanted = params.str("flag")?;
        let flags = self.0.flags();
        let names = || flags.iter().map(|(flag, _)| *flag);
        let known = names().filter(|flag| wanted == "all" || wanted == *flag);
        let known: Vec<_> = known.collect();
        if known.is_empty() && wanted != "all" {
            let fix = match nearest(wanted, names()) {
                Some(flag) => format!("did you mean {flag}?"),
                None => format!("known are all, {}", names().collect::<Vec<_>>().join(", ")),
            };
            return Err(params.invalid("flag", "there is no such component").fix(fix));
        }
        for flag in known {
            self.0.set_flag(flag, on);
        }
        Ok(json!(true))
    }
}
