//! The framework's own methods: what there is, starting, stopping, saving.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use schema::{Kind, Method, Param, Params, RpcError, States, nearest};
use serde_json::{Value, json};

use crate::config;
use crate::table::{Phase, State};

/// SPDK's release whose methods this speaks. Its scripts look at the version
/// to know what they may ask for.
const SPDK_VERSION: (u32, u32, u32) = (26, 9, 0);

/// What the application does when told to.
pub trait Host: Send + Sync {
    /// Starts everything, for `framework_start_init`. Called at most once at a
    /// time and not again after it succeeded. The table's changes wait
    /// meanwhile: do not call mutating methods from here.
    fn start(&self) -> BoxFuture<'_, Result<(), RpcError>>;

    /// Does what a signal of that name sent to the process would do. Must
    /// return soon: the reply is sent after it.
    fn kill(&self, signal: KillSignal) -> Result<(), RpcError>;
}

/// Signals that `spdk_kill_instance` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KillSignal {
    /// SIGINT
    Interrupt,
    /// SIGTERM
    Terminate,
    /// SIGQUIT
    Quit,
    /// SIGHUP
    HangUp,
    /// SIGKILL
    Kill,
    /// SIGUSR1
    User1,
}

const SIGNALS: [(&str, KillSignal); 6] = [
    ("SIGINT", KillSignal::Interrupt),
    ("SIGTERM", KillSignal::Terminate),
    ("SIGQUIT", KillSignal::Quit),
    ("SIGHUP", KillSignal::HangUp),
    ("SIGKILL", KillSignal::Kill),
    ("SIGUSR1", KillSignal::User1),
];

/// Context of the framework's methods; made by the table.
pub struct Framework {
    pub(crate) state: Arc<State>,
    pub(crate) host: Arc<dyn Host>,
}

/// The framework's methods, for catalogues without a server.
pub const METHODS: &[Method<Framework>] = &[
    Method::new("rpc_get_methods", "List the methods of this server.", |framework: Arc<Framework>, params| {
        Box::pin(async move { framework.methods(&params) })
    })
    .states(States::BOTH)
    .params(&[
        Param::optional("current", Kind::Bool, "only those callable in the present state; default false"),
        Param::optional("include_aliases", Kind::Bool, "other names too; default false"),
    ])
    .result("array of names"),
    Method::new(
        "spdk_get_version",
        "Tell the versions of Ringstone and of SPDK's RPC that it speaks.",
        |_: Arc<Framework>, _| Box::pin(async { Ok(version()) }),
    )
    .states(States::BOTH)
    .result("object with version and fields"),
    Method::new(
        "framework_start_init",
        "Start everything; ends the state in which sizes and pools can be set.",
        |framework: Arc<Framework>, _| Box::pin(async move { framework.start().await }),
    )
    .states(States::STARTUP),
    Method::new(
        "framework_wait_init",
        "Wait until the server has started and its configuration is in.",
        |framework: Arc<Framework>, _| Box::pin(async move { framework.wait().await }),
    )
    .states(States::BOTH)
    .waits(),
    Method::new(
        "framework_get_subsystems",
        "List the parts that have configuration, each after those it depends on.",
        |framework: Arc<Framework>, _| Box::pin(async move { Ok(framework.subsystems()) }),
    )
    .result("array of {subsystem, depends_on}"),
    Method::new(
        "framework_get_config",
        "Tell the calls that restore the configuration of one part.",
        |framework: Arc<Framework>, params| Box::pin(async move { framework.config(&params) }),
    )
    .params(&[
        Param::required("name", Kind::Str, "a part that framework_get_subsystems lists"),
        Param::optional(
            "with_batches",
            Kind::Bool,
            "keep calls that belong together in arrays; none do here, so it changes nothing",
        ),
    ])
    .result("array of {method, params}"),
    Method::new(
        "spdk_kill_instance",
        "Do what a signal to the server's process would do.",
        |framework: Arc<Framework>, params| Box::pin(async move { framework.kill(&params) }),
    )
    .states(States::BOTH)
    .params(&[Param::required(
        "sig_name",
        Kind::Enum(&["SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGKILL", "SIGUSR1"]),
        "SIGTERM and SIGINT stop the server cleanly",
    )]),
];

fn version() -> Value {
    let (major, minor, patch) = SPDK_VERSION;
    let ringstone = env!("CARGO_PKG_VERSION");
    json!({
        "version": format!("SPDK v{major:02}.{minor:02} (Ringstone {ringstone})"),
        "fields": {"major": major, "minor": minor, "patch": patch, "suffix": ""},
    })
}

impl Framework {
    fn methods(&self, params: &Params) -> Result<Value, RpcError> {
        let current = params.opt_bool("current").unwrap_or(false);
        let aliases = params.opt_bool("include_aliases").unwrap_or(false);
        let mut names = Vec::new();
        for spec in self.state.methods(current.then(|| self.state.phase())) {
            names.push(spec.name);
            if aliases {
                names.extend(spec.aliases);
            }
        }
        Ok(json!(names))
    }

    async fn start(&self) -> Result<Value, RpcError> {
        // Nothing may change while it starts, and the next start waits here
        // until this one is done.
        let _changes = self.state.changes.lock().await;
        if self.state.phase() == Phase::Runtime {
            return Err(RpcError::invalid_state("the server has started already"));
        }
        self.host.start().await?;
        self.state.phase.send_replace(Phase::Runtime);
        Ok(json!(true))
    }

    async fn wait(&self) -> Result<Value, RpcError> {
        let mut phase = self.state.phase.subscribe();
        // The sender lives as long as the state that is borrowed here.
        let _ = phase.wait_for(|phase| *phase == Phase::Runtime).await;
        self.state.released().await;
        Ok(json!(true))
    }

    fn subsystems(&self) -> Value {
        let subsystem = |source: &Arc<dyn schema::ConfigSource>| json!({"subsystem": source.name(), "depends_on": source.depends_on()});
        self.state.sources.iter().map(subsystem).collect()
    }

    fn config(&self, params: &Params) -> Result<Value, RpcError> {
        let name = params.str("name")?;
        let sources = &self.state.sources;
        let Some(source) = sources.iter().find(|source| source.name() == name) else {
            let names: Vec<_> = sources.iter().map(|source| source.name()).collect();
            let fix = match nearest(name, names.iter().copied()) {
                Some(near) => format!("did you mean {near}?"),
                None => format!("known are {}", names.join(", ")),
            };
            return Err(params.invalid("name", "there is no such part").fix(fix));
        };
        Ok(config::entries(&**source))
    }

    fn kill(&self, params: &Params) -> Result<Value, RpcError> {
        let name = params.str("sig_name")?;
        let signal = SIGNALS.iter().find(|(known, _)| *known == name);
        let Some((_, signal)) = signal else {
            return Err(params.invalid("sig_name", "there is no such signal"));
        };
        self.host.kill(*signal)?;
        Ok(json!(true))
    }
}
