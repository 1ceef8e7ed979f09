//! The method table: who answers what, when, and in which order.
//!
//! ```text
//!   socket text --> request envelope --> jsonrpsee RpcModule --+
//!   (dispatch)                                                 v
//!   Table::call / apply ------------------------------------> run
//!                                                              |
//!     state? -> parameters? -> [one change at a time] -> handler -> [save]
//! ```
//!
//! The server is in STARTUP until `framework_start_init` has succeeded, then
//! in RUNTIME for ever. Methods that change the configuration run one at a
//! time, in the order in which they asked; after each success the whole
//! configuration is handed to the `after_change` hook, and only when that is
//! done is the caller told.
//!
//! While a configuration is being brought in ([`Table::hold`]) nothing is saved, since what there is then is only a part:
//! changes that clients ask for wait, and what they changed before the start is saved with the whole.
//!
//! Nothing here needs a tokio runtime: its locks and channels work under any
//! executor, the simulator's too.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use futures_util::future::BoxFuture;
use jsonrpsee::RpcModule;
use jsonrpsee::types::ErrorObjectOwned;
use schema::{ConfigSource, Method, MethodSpec, Params, RpcError, code, nearest, validate};
use serde_json::Value;
use tokio::sync::{Mutex, watch};

use crate::catalogue::Catalogue;
use crate::framework::{self, Framework, Host};
use crate::{config, json, log, runtime};

/// What is told of every change that must be saved: the method that made it
/// and the whole configuration, a document as [`config::document`] makes it.
/// The caller gets its reply when the future is done.
pub type AfterChange = Box<dyn Fn(&'static str, Value) -> BoxFuture<'static, Result<(), RpcError>> + Send + Sync>;

type Invoke = Box<dyn Fn(Params) -> BoxFuture<'static, Result<Value, RpcError>> + Send + Sync>;

/// Whether the server has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// `framework_start_init` has not succeeded yet.
    Startup,
    /// It has.
    Runtime,
}

impl Phase {
    fn allows(self, spec: &MethodSpec) -> bool {
        match self {
            Phase::Startup => spec.states.startup,
            Phase::Runtime => spec.states.runtime,
        }
    }
}

/// What the framework's own methods share with the table.
pub(crate) struct State {
    pub(crate) phase: watch::Sender<Phase>,
    /// Whether a configuration is being brought in.
    pub(crate) held: watch::Sender<bool>,
    /// Whether something was changed meanwhile that has to be saved with the whole.
    unsaved: AtomicBool,
    /// Held while the configuration changes.
    pub(crate) changes: Mutex<()>,
    /// Ordered so that each comes after those it depends on.
    pub(crate) sources: Vec<Arc<dyn ConfigSource>>,
    pub(crate) catalogue: OnceLock<Catalogue>,
}

impl State {
    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Waits until no configuration is being brought in.
    pub(crate) async fn released(&self) {
        // The sender lives as long as this.
        let _ = self.held.subscribe().wait_for(|held| !held).await;
    }

    /// Methods callable in this phase, or in any.
    pub(crate) fn methods(&self, phase: Option<Phase>) -> impl Iterator<Item = &MethodSpec> {
        let specs = self.catalogue.get().map_or(&[][..], Catalogue::specs);
        specs.iter().filter(move |spec| phase.is_none_or(|phase| phase.allows(spec)))
    }
}

struct Entry {
    spec: MethodSpec,
    invoke: Invoke,
}

pub(crate) struct Core {
    state: Arc<State>,
    entries: Vec<Entry>,
    index: HashMap<&'static str, usize>,
    after_change: Option<AfterChange>,
}

/// All methods of a server. Build one with [`Table::builder`].
pub struct Table {
    core: Arc<Core>,
    pub(crate) module: RpcModule<Core>,
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table")
            .field("methods", &self.core.entries.len())
            .field("phase", &self.phase())
            .finish_non_exhaustive()
    }
}

/// Why a table cannot be built: a mistake of the program, not of its user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildError {
    /// Two methods, or a method and an alias, have one name.
    SameName(&'static str),
    /// Two configuration sources have one name.
    SameSource(&'static str),
    /// A source depends on one that there is not, or in a circle.
    Dependency {
        /// The source.
        of: &'static str,
        /// What it depends on.
        on: &'static str,
    },
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BuildError::SameName(name) => write!(f, "two methods are named {name}"),
            BuildError::SameSource(name) => write!(f, "two configuration sources are named {name}"),
            BuildError::Dependency { of, on } => {
                write!(f, "configuration source {of} depends on {on}, which is missing or part of a circle")
            }
        }
    }
}

impl std::error::Error for BuildError {}

/// Collects what a [`Table`] is made of.
pub struct TableBuilder {
    host: Arc<dyn Host>,
    entries: Vec<Entry>,
    sources: Vec<Arc<dyn ConfigSource>>,
    after_change: Option<AfterChange>,
}

impl TableBuilder {
    /// Adds the methods of one context.
    pub fn add<C: Send + Sync + 'static>(mut self, context: &Arc<C>, methods: &[Method<C>]) -> Self {
        for method in methods {
            let context = Arc::clone(context);
            let handler = method.handler;
            self.entries.push(Entry {
                spec: method.spec,
                invoke: Box::new(move |params| handler(Arc::clone(&context), params)),
            });
        }
        self
    }

    /// Adds a part of the server that has configuration to save.
    pub fn source(mut self, source: Arc<dyn ConfigSource>) -> Self {
        self.sources.push(source);
        self
    }

    /// Adds the `log_*` methods.
    pub fn log(self, control: Arc<dyn log::LogControl>) -> Self {
        self.add(&Arc::new(log::Log(control)), log::METHODS)
    }

    /// Adds `framework_get_reactors` and the `thread_*` methods.
    pub fn runtime(self, stats: Arc<dyn runtime::RuntimeStats>) -> Self {
        self.add(&Arc::new(runtime::Runtime(stats)), runtime::METHODS)
    }

    /// Called after each change, before its caller gets the reply.
    pub fn after_change(mut self, hook: AfterChange) -> Self {
        self.after_change = Some(hook);
        self
    }

    /// Adds the framework's own methods and makes the table.
    pub fn build(mut self) -> Result<Table, BuildError> {
        let state = Arc::new(State {
            phase: watch::Sender::new(Phase::Startup),
            held: watch::Sender::new(false),
            unsaved: AtomicBool::new(false),
            changes: Mutex::new(()),
            sources: config::ordered(std::mem::take(&mut self.sources))?,
            catalogue: OnceLock::new(),
        });
        let host = Arc::clone(&self.host);
        let framework = Arc::new(Framework { state: Arc::clone(&state), host });
        let builder = self.add(&framework, framework::METHODS);

        let mut index = HashMap::new();
        for (at, entry) in builder.entries.iter().enumerate() {
            for &name in std::iter::once(&entry.spec.name).chain(entry.spec.aliases) {
                if index.insert(name, at).is_some() {
                    return Err(BuildError::SameName(name));
                }
            }
        }
        let catalogue = Catalogue::new(builder.entries.iter().map(|entry| entry.spec).collect());
        state.catalogue.set(catalogue).expect("set here for the first time");
        let core = Arc::new(Core { state, entries: builder.entries, index, after_change: builder.after_change });
        let mut module = RpcModule::from_arc(Arc::clone(&core));
        for (&name, &at) in &core.index {
            module
                .register_async_method(
                    name,
                    move |params, core, _| async move { core.answer(at, params.as_str()).await },
                )
                .map_err(|_| BuildError::SameName(name))?;
        }
        Ok(Table { core, module })
    }
}

impl Table {
    /// Starts a table whose framework methods act on this host.
    pub fn builder(host: Arc<dyn Host>) -> TableBuilder {
        TableBuilder { host, entries: Vec::new(), sources: Vec::new(), after_change: None }
    }

    /// Calls a method as a client would: a change is saved before this ends.
    pub async fn call(&self, method: &str, params: Value) -> Result<Value, RpcError> {
        let at = self.find(method)?;
        self.core.run(at, Some(params), true).await
    }

    /// Calls a method without saving what it changes: for bringing back a
    /// configuration that is saved already.
    pub async fn apply(&self, method: &str, params: Value) -> Result<Value, RpcError> {
        let at = self.find(method)?;
        self.core.run(at, Some(params), false).await
    }

    /// A configuration is about to be brought in: until [`Table::release`], changes by [`call`](Self::call) and by clients
    /// wait once the server has started, and none is saved.
    pub fn hold(&self) {
        self.core.state.held.send_replace(true);
    }

    /// The configuration is complete. What was changed before the start is saved now, and whatever waits goes on.
    ///
    /// # Errors
    /// As the `after_change` hook says; everything stays held then.
    pub async fn release(&self) -> Result<(), RpcError> {
        let _changes = self.core.state.changes.lock().await;
        if self.core.state.unsaved.load(Ordering::Relaxed)
            && let Some(hook) = &self.core.after_change
        {
            hook("framework_start_init", config::document(&self.core.state.sources)).await?;
        }
        self.core.state.unsaved.store(false, Ordering::Relaxed);
        self.core.state.held.send_replace(false);
        Ok(())
    }

    /// Waits until `framework_start_init` has succeeded.
    pub async fn started(&self) {
        // The sender lives as long as the table.
        let _ = self.core.state.phase.subscribe().wait_for(|phase| *phase == Phase::Runtime).await;
    }

    /// Whether `framework_start_init` has succeeded.
    pub fn phase(&self) -> Phase {
        self.core.state.phase()
    }

    /// All methods, sorted by name.
    pub fn catalogue(&self) -> &Catalogue {
        self.core.state.catalogue.get().expect("set by build")
    }

    /// The declaration of a method, by its name or an alias.
    pub fn spec(&self, method: &str) -> Option<&MethodSpec> {
        let at = *self.core.index.get(method)?;
        Some(&self.core.entries[at].spec)
    }

    /// Names of the parts that have configuration, each after those it
    /// depends on.
    pub fn sources(&self) -> impl Iterator<Item = &'static str> {
        self.core.state.sources.iter().map(|source| source.name())
    }

    /// The present configuration as a document that [`config`] loads again.
    /// No change is under way while it is taken.
    pub async fn save(&self) -> Value {
        let _changes = self.core.state.changes.lock().await;
        config::document(&self.core.state.sources)
    }

    fn find(&self, method: &str) -> Result<usize, RpcError> {
        let found = self.core.index.get(method).copied();
        found.ok_or_else(|| self.unknown(method))
    }

    /// The error for a method that there is not.
    pub(crate) fn unknown(&self, method: &str) -> RpcError {
        let error = RpcError::new(code::METHOD_NOT_FOUND, "there is no such method").in_method(method);
        let mut names: Vec<_> = self.core.index.keys().copied().collect();
        names.sort_unstable();
        error.fix(match nearest(method, names) {
            Some(name) => format!("did you mean {name}?"),
            None => "rpc_get_methods lists all methods".to_owned(),
        })
    }
}

impl Core {
    /// The way in from jsonrpsee.
    async fn answer(&self, at: usize, params: Option<&str>) -> Result<Value, ErrorObjectOwned> {
        let params = params.map(json::parse).transpose();
        let result = match params {
            Ok(params) => self.run(at, params, true).await,
            Err(error) => Err(RpcError::new(code::PARSE_ERROR, format!("params cannot be read: {error}"))
                .in_method(self.entries[at].spec.name)),
        };
        result.map_err(|error| ErrorObjectOwned::owned(error.code(), error.message(), Some(error.data())))
    }

    async fn run(&self, at: usize, params: Option<Value>, save: bool) -> Result<Value, RpcError> {
        let Entry { spec, invoke } = &self.entries[at];
        self.check_phase(spec)?;
        let params = validate(spec, params)?;
        if !spec.mutates {
            return invoke(params).await.map_err(|error| error.in_method(spec.name));
        }
        let _changes = loop {
            let changes = self.state.changes.lock().await;
            if !(save && *self.state.held.borrow() && self.state.phase() == Phase::Runtime) {
                break changes;
            }
            drop(changes);
            self.state.released().await;
        };
        // It may have changed while others made their changes.
        self.check_phase(spec)?;
        let held = *self.state.held.borrow();
        if save && held {
            self.state.unsaved.store(true, Ordering::Relaxed);
        }
        let hook = self.after_change.as_ref().filter(|_| save && !held);
        let before = hook.map(|_| config::document(&self.state.sources));
        let result = invoke(params).await.map_err(|error| error.in_method(spec.name));
        if result.is_ok() {
            tracing::info!(method = spec.name, "configuration changed");
        }
        if let (Some(hook), Some(before)) = (hook, before) {
            let now = config::document(&self.state.sources);
            // A call that failed may have changed something all the same: what it ended still drains, say.
            if result.is_ok() || now != before {
                hook(spec.name, now).await.map_err(|error| unsaved(spec.name, &error))?;
            }
        }
        result
    }

    fn check_phase(&self, spec: &MethodSpec) -> Result<(), RpcError> {
        let phase = self.state.phase();
        if phase.allows(spec) {
            return Ok(());
        }
        let error = match phase {
            Phase::Startup => RpcError::invalid_state("only callable once the server has started")
                .fix("call framework_start_init first"),
            Phase::Runtime => RpcError::invalid_state("only callable before the server has started")
                .fix("start it with --wait-for-rpc and call this before framework_start_init"),
        };
        Err(error.in_method(spec.name))
    }
}

fn unsaved(method: &str, error: &RpcError) -> RpcError {
    tracing::error!(method, %error, "the change is live but could not be saved");
    RpcError::internal(format!("the change is live but could not be saved, a restart would lose it: {error}"))
        .fix("mend the cause; the next change that is made saves this one too")
        .in_method(method)
}
