//! `ringstone serve`: the appliance.
//!
//! # Which configuration counts
//! 1. `--empty`: none; the server starts with nothing.
//! 2. `--config FILE` when the file is not the one that the saved configuration stems from: the file.
//! 3. The configuration saved in the state directory: it contains what `--config` once brought and every change since.
//! 4. Otherwise (a fresh state directory): a 1 GiB volume, served on `--listen`.
//!
//! The log says which it was. Whatever is set aside stays in the state directory under another name.
//!
//! A saved configuration is restored whole or the server does not start: the next change would save what is there, and
//! forget a volume that was only away. `--partial` serves the rest all the same, and keeps the whole one aside.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use bdev::core::{BdevSystem, IoRuntime, RuntimeConfig};
use bdev::rpc::{BdevConfig, IobufConfig};
use futures_util::future::BoxFuture;
use initiator::InitiatorSystem;
use nbd::group::NbdGroup;
use nbd::system::NbdSystem;
use nvmf::rdma::host_transport::RdmaHost;
use nvmf::rdma::transport::RdmaTransport;
use nvmf::target::poll_group::groups::PollGroups;
use nvmf::target::poll_group::{Loads, PollGroup};
use nvmf::target::shared::ControllerTable;
use nvmf::target::system::NvmfSystem;
use nvmf::target::transport::Transports;
use nvmf::tcp::host_transport::TcpHost;
use nvmf::tcp::transport::TcpTransport;
use reactor::file::EngineChoice;
use reactor::platform::OsPlatform;
use reactor::reactor::{PollPolicy, ReactorConfig, ReactorThreads};
use reactor::{Context, Platform, ReactorHandle, ReactorId};
use rpc::config::{Config, LoadReport, OnError};
use rpc::reactors::Reactors;
use rpc::runtime::IoChannelSnapshot;
use rpc::{Host, KillSignal, Limits, Server, Table};
use schema::RpcError;
use serde_json::{Value, json};
use tokio::sync::{oneshot, watch};
use verbs::VerbsFabric;

use crate::cores::{self, Cores};
use crate::defaults;
use crate::executor::TokioExecutor;
use crate::logging::Log;
use crate::state::{StateDir, checksum};

/// How long a stop waits for hosts' commands to end.
const STOP_PATIENCE: Duration = Duration::from_millis(1200);

/// How long a stop waits for JSON-RPC calls to end.
const RPC_STOP_PATIENCE: Duration = Duration::from_millis(300);

/// Options of `ringstone serve`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Configuration to apply, as SPDK's save_config writes it. Once applied, the saved state (which contains it) counts,
    /// until the file changes.
    #[arg(long, value_name = "FILE", conflicts_with = "empty")]
    config: Option<PathBuf>,
    /// Where state lives [default: $XDG_STATE_HOME/ringstone or ~/.local/state/ringstone].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// JSON-RPC socket [default: STATE_DIR/rpc.sock].
    #[arg(long, short = 'r', value_name = "PATH")]
    rpc_socket: Option<PathBuf>,
    /// Where a fresh appliance serves its first volume [default: 127.0.0.1:4420].
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// Cores to run reactors on, as in 0,2-3 [default: the first half of those allowed].
    #[arg(long, short = 'm', value_name = "LIST", value_parser = cores::parse)]
    cores: Option<Cores>,
    /// adaptive: spin under load, sleep when idle. busy: never sleep. sleep: never spin. coalesce: never spin, and take what comes
    /// within --coalesce-us together.
    #[arg(long, value_enum, default_value_t = Poll::Adaptive)]
    poll: Poll,
    /// How long --poll coalesce lets work come together, in microseconds.
    #[arg(long, value_name = "US", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    coalesce_us: u64,
    /// Start with no volume, transport or listener, whatever was saved.
    #[arg(long)]
    empty: bool,
    /// Wait for framework_start_init over JSON-RPC before starting.
    #[arg(long)]
    wait_for_rpc: bool,
    /// Serve what can be restored of the saved configuration, when not all of it can. The whole of it is kept aside.
    #[arg(long, conflicts_with_all = ["config", "empty"])]
    partial: bool,
    /// How files are read and written. auto: io_uring where the kernel offers it.
    #[arg(long, value_enum, default_value_t = Engine::Auto)]
    file_engine: Engine,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Poll {
    Adaptive,
    Busy,
    Sleep,
    Coalesce,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Engine {
    Auto,
    Uring,
    Threads,
}

fn choose_cores(options: &Options) -> Result<Vec<usize>, String> {
    match &options.cores {
        None => {
            // The other half is left to whoever uses the volumes on this machine.
            let allowed = cores::allowed();
            let half = allowed.len().div_ceil(2).max(1);
            Ok(allowed.into_iter().take(half).collect())
        }
        Some(cores) => cores.checked("--cores"),
    }
}

/// Runs the command.
pub fn main(options: &Options) -> ExitCode {
    let log = Log::start();
    end_with_a_reactor();
    match run(options, &log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// A reactor that panics leaves its hosts hanging: the process ends with it, so that whoever started it starts it again,
/// and hosts reconnect to what was saved.
fn end_with_a_reactor() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        if std::thread::current().name().is_some_and(|name| name.starts_with("reactor_")) {
            std::process::abort();
        }
    }));
}

fn run(options: &Options, log: &Arc<Log>) -> Result<(), String> {
    let dir = match &options.state_dir {
        Some(dir) => dir.clone(),
        None => defaults::state_dir()?,
    };
    let cores = choose_cores(options)?;
    raise_open_files();
    let engine = match options.file_engine {
        Engine::Auto => EngineChoice::Auto,
        Engine::Uring => EngineChoice::Uring,
        Engine::Threads => EngineChoice::Threads,
    };
    let platform: Arc<dyn Platform> = Arc::new(OsPlatform::new(engine));
    let state = Arc::new(StateDir::open(&dir, platform.files())?);
    let policy = match options.poll {
        Poll::Adaptive => PollPolicy::default(),
        Poll::Busy => PollPolicy::Busy,
        Poll::Sleep => PollPolicy::Sleep,
        Poll::Coalesce => PollPolicy::Coalesce { gap: Duration::from_micros(options.coalesce_us) },
    };
    let configs: Vec<_> = cores
        .iter()
        .enumerate()
        .map(|(index, &core)| ReactorConfig { id: ReactorId(index as u32), core: Some(core), policy })
        .collect();
    let controllers = Arc::new(ControllerTable::default());
    let loads = Arc::new(Loads::new(cores.len()));
    let nbd_loads = Arc::new(nbd::group::Loads::new(cores.len()));
    let table = Arc::clone(&controllers);
    let reactors = ReactorThreads::start(&platform, &configs, move |cx| install(cx, &table, &loads, &nbd_loads))
        .map_err(|e| format!("cannot start: {e}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| format!("cannot start the control plane: {e}"))?;
    let served = runtime.block_on(async {
        let parts = Parts { platform: &platform, reactors: reactors.handles(), policy, controllers };
        let appliance = Appliance::new(log, parts, state)?;
        appliance.serve(options, &cores).await
    });
    // Tasks of the control plane that still wait for something end here.
    runtime.shutdown_timeout(Duration::from_millis(200));
    reactors.stop().map_err(|e| format!("a reactor ended badly: {e}"))?;
    served
}

/// A connection is a descriptor: there may be as many as the host lets this process have.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit })
    {
        tracing::warn!(%error, limit = limit.current, "connections are limited by the open files that this process may have");
    }
}

/// Puts the bdev layer and its front ends on a reactor.
fn install(
    cx: &mut Context,
    controllers: &Arc<ControllerTable>,
    loads: &Arc<Loads>,
    nbd_loads: &Arc<nbd::group::Loads>,
) -> std::io::Result<()> {
    let runtime = IoRuntime::install(cx, RuntimeConfig::default())?;
    tracing::info!(reactor = cx.id().0, files = runtime.borrow().file_mode(), "reactor ready");
    PollGroup::install(cx, Arc::clone(controllers), Arc::clone(loads));
    NbdGroup::install(cx, Arc::clone(nbd_loads));
    initiator::Part::install(cx);
    Ok(())
}

/// The devices that have channels on a reactor.
fn channels(cx: &mut Context) -> Vec<IoChannelSnapshot> {
    let refs = IoRuntime::of(cx).borrow().channel_refs();
    refs.into_iter().map(|(name, references)| IoChannelSnapshot { name, references: references.into() }).collect()
}

/// Stops the process when the control plane says so. Starting needs nothing: the reactors run already.
struct Starter {
    stop: watch::Sender<bool>,
}

impl Host for Starter {
    fn start(&self) -> BoxFuture<'_, Result<(), RpcError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn kill(&self, signal: KillSignal) -> Result<(), RpcError> {
        match signal {
            KillSignal::Kill => std::process::abort(),
            _ => {
                self.stop.send_replace(true);
                Ok(())
            }
        }
    }
}

/// What runs below the control plane.
struct Parts<'a> {
    platform: &'a Arc<dyn Platform>,
    reactors: &'a [ReactorHandle],
    policy: PollPolicy,
    controllers: Arc<ControllerTable>,
}

struct Appliance {
    bdevs: Arc<BdevSystem>,
    nvmf: Arc<NvmfSystem>,
    nbd: Arc<NbdSystem>,
    initiator: Arc<InitiatorSystem>,
    table: Arc<Table>,
    state: Arc<StateDir>,
    stop: watch::Sender<bool>,
}

impl Appliance {
    fn new(log: &Arc<Log>, parts: Parts<'_>, state: Arc<StateDir>) -> Result<Appliance, String> {
        let executor = Arc::new(TokioExecutor::current());
        let reactors = parts.reactors.to_vec();
        let bdevs = BdevSystem::new(reactors.clone(), Arc::clone(parts.platform), executor);
        let (network, fabric) = (parts.platform.network(), Arc::new(VerbsFabric::new()));
        let transports: Transports = vec![
            Arc::new(TcpTransport::new(Arc::clone(&network))),
            Arc::new(RdmaTransport::new(Arc::clone(&fabric) as _)),
        ];
        let groups = Arc::new(PollGroups::new(reactors.clone()));
        let nvmf = NvmfSystem::new(Arc::clone(&bdevs), parts.controllers, transports, groups);
        if parts.reactors.len() > 1 {
            nvmf.start_balancing();
        }
        let nbd = NbdSystem::new(Arc::clone(&bdevs));
        let initiator =
            InitiatorSystem::new(&bdevs, vec![Arc::new(TcpHost { network }), Arc::new(RdmaHost { fabric })]);
        let (stop, _) = watch::channel(false);
        let starter = Starter { stop: stop.clone() };
        let numbers = Reactors::new(reactors, parts.policy, Arc::new(channels));
        let bdev_methods: Vec<_> = bdev::rpc::methods().copied().collect();
        let saving = Arc::clone(&state);
        let table = Table::builder(Arc::new(starter))
            .add(&bdevs, &bdev_methods)
            .add(&initiator, initiator::rpc::methods())
            .add(&nvmf, nvmf::rpc::methods())
            .add(&nbd, nbd::rpc::methods())
            .source(Arc::new(IobufConfig(Arc::clone(&bdevs))))
            .source(Arc::new(BdevConfig(Arc::clone(&bdevs))))
            .source(nvmf::rpc::scheduler_config_source(&nvmf))
            .source(nvmf::rpc::config_source(&nvmf))
            .source(nbd::rpc::config_source(&nbd))
            .log(Arc::clone(log) as _)
            .runtime(Arc::new(numbers))
            .after_change(Box::new(move |_, document| {
                let saved = saving.save(&document);
                Box::pin(async move {
                    saved.map_err(|error| {
                        RpcError::internal(error).fix("make room in, or access to, the state directory")
                    })
                })
            }))
            .build()
            .map_err(|e| format!("the method table is inconsistent: {e}"))?;
        Ok(Appliance { bdevs, nvmf, nbd, initiator, table: Arc::new(table), state, stop })
    }

    async fn serve(&self, options: &Options, cores: &[usize]) -> Result<(), String> {
        let socket = match &options.rpc_socket {
            Some(path) => path.clone(),
            None => defaults::rpc_socket(self.state.path()),
        };
        let server = Server::bind(
            &socket,
            Arc::clone(&self.table),
            Limits { stop_timeout: RPC_STOP_PATIENCE, ..Limits::default() },
        )
        .map_err(|e| e.to_string())?;
        watch_signals(&self.stop)?;
        let mut stopped = self.stop.subscribe();
        let stop = async move {
            // The sender lives as long as the appliance.
            let _ = stopped.wait_for(|stop| *stop).await;
        };
        // Until the configuration is in, who calls waits in the socket's queue; unless the start waits for a call.
        let (open, opened) = oneshot::channel();
        self.table.hold();
        let serving = tokio::spawn(async move {
            // Dropped unsent where the start fails: then the server only has to end.
            let _ = opened.await;
            server.serve(stop).await
        });
        let configured = {
            let mut stopped = self.stop.subscribe();
            tokio::select! {
                configured = self.configure(options, cores, &socket, open) => configured,
                _ = stopped.wait_for(|stop| *stop) => Ok(()),
            }
        };
        if configured.is_err() {
            self.stop.send_replace(true);
        }
        let served = serving.await;
        tracing::info!("stopping");
        let fronts = futures_util::future::join(self.nvmf.shut_down(), self.nbd.shut_down());
        // Remote controllers are left when nobody uses their namespaces any more.
        let ended = async {
            fronts.await;
            self.initiator.shut_down().await;
        };
        if tokio::time::timeout(STOP_PATIENCE, ended).await.is_err() {
            tracing::warn!("commands of hosts were still outstanding when the server stopped");
        }
        configured?;
        match served {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("the JSON-RPC server ended: {error}")),
            Err(error) => Err(format!("the JSON-RPC server ended: {error}")),
        }
    }

    /// Brings in the configuration that counts, and announces what is served.
    async fn configure(
        &self,
        options: &Options,
        cores: &[usize],
        socket: &Path,
        open: oneshot::Sender<()>,
    ) -> Result<(), String> {
        let source = Source::choose(options, &self.state)?;
        let mut open = Some(open);
        if options.wait_for_rpc {
            if let Some(config) = source.config() {
                let report = config.load_startup(&self.table, source.on_error()).await.map_err(|e| e.to_string())?;
                self.report(&report);
            }
            let _ = open.take().map(|open| open.send(()));
            announce(&format!("waiting for framework_start_init on {}", socket.display()));
            self.table.started().await;
        }
        self.bring_in(source, options).await?;
        self.table.release().await.map_err(|e| e.message())?;
        let _ = open.map(|open| open.send(()));
        self.announce(cores, socket).await;
        Ok(())
    }

    async fn bring_in(&self, source: Source, options: &Options) -> Result<(), String> {
        let on_error = source.on_error();
        if let Some(config) = source.config() {
            let report = config.load(&self.table, on_error).await.map_err(|e| e.to_string())?;
            self.report(&report);
            if matches!(source, Source::Saved { .. }) {
                if !report.failed.is_empty() {
                    if !options.partial {
                        return Err(format!(
                            "{} of the saved configuration's calls could not be restored, as said above, and nothing was \
                             changed; put right what they name and start again, or serve the rest with --partial",
                            report.failed.len()
                        ));
                    }
                    let aside = self.state.set_aside("unrestored")?;
                    tracing::error!(kept = %aside.display(), "parts of the saved configuration could not be restored; the next change saves what is there now");
                }
                return self.check_listen(options);
            }
        } else if self.table.phase() == rpc::Phase::Startup {
            self.table.apply("framework_start_init", Value::Null).await.map_err(|e| e.message())?;
        }
        match source {
            Source::Fresh => self.first_volume(options.listen.unwrap_or(defaults::LISTEN)).await?,
            Source::Empty { replaces: false } => return Ok(()),
            Source::Empty { replaces: true } => {
                let aside = self.state.set_aside("superseded")?;
                tracing::warn!(kept = %aside.display(), "--empty: the saved configuration is not restored; it is kept aside");
            }
            Source::File { .. } | Source::Saved { .. } => {}
        }
        self.state.save(&self.table.save().await)
    }

    fn report(&self, report: &LoadReport) {
        for (place, error) in &report.failed {
            tracing::error!(%place, "not restored: {}", error.message());
        }
        for (place, why) in &report.skipped {
            tracing::warn!(%place, why, "skipped");
        }
    }

    /// `--listen` says where a fresh appliance listens; later the configuration does.
    fn check_listen(&self, options: &Options) -> Result<(), String> {
        if let Some(listen) = options.listen
            && !self
                .nvmf
                .view()
                .subsystems
                .values()
                .any(|s| s.listeners.iter().any(|l| l.address.socket_addr() == listen))
        {
            tracing::warn!(
                %listen,
                "--listen only says where a fresh appliance listens; the saved configuration has other listeners and wins. \
                 Add this one with nvmf_subsystem_add_listener, or start with another --state-dir"
            );
        }
        Ok(())
    }

    /// What a fresh appliance serves.
    async fn first_volume(&self, listen: SocketAddr) -> Result<(), String> {
        let file = self.state.path().join(format!("{}.img", defaults::VOLUME_NAME));
        match self.bdevs.platform().files().create(&file, defaults::VOLUME_BYTES) {
            Ok(()) => tracing::info!(file = %file.display(), bytes = defaults::VOLUME_BYTES, "volume file made"),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                tracing::info!(file = %file.display(), "volume file found");
            }
            Err(error) => return Err(format!("cannot make the volume file {}: {error}", file.display())),
        }
        let filename = file.to_str().ok_or("the state directory's path is not UTF-8; give --state-dir another")?;
        let nqn = defaults::VOLUME_NQN;
        let family = if listen.is_ipv4() { "IPv4" } else { "IPv6" };
        let address = json!({
            "trtype": "TCP", "adrfam": family, "traddr": listen.ip().to_string(), "trsvcid": listen.port().to_string(),
        });
        let name = defaults::VOLUME_NAME;
        let calls = [
            ("bdev_uring_create", json!({ "name": name, "filename": filename, "block_size": 4096 })),
            ("nvmf_create_transport", json!({ "trtype": "TCP" })),
            (
                "nvmf_create_subsystem",
                json!({ "nqn": nqn, "allow_any_host": true, "serial_number": "RINGSTONE0000001" }),
            ),
            ("nvmf_subsystem_add_ns", json!({ "nqn": nqn, "namespace": { "bdev_name": name } })),
            ("nvmf_subsystem_add_listener", json!({ "nqn": nqn, "listen_address": address })),
        ];
        for (method, params) in calls {
            self.table.apply(method, params).await.map_err(|error| {
                let elsewhere = match method {
                    "nvmf_subsystem_add_listener" => "; --listen ADDR:PORT serves it elsewhere",
                    _ => "",
                };
                format!("the first volume cannot be served: {}{elsewhere}", error.message())
            })?;
        }
        Ok(())
    }

    /// Tells whoever started it how to use it.
    async fn announce(&self, cores: &[usize], socket: &Path) {
        let mut text = format!(
            "ringstone {}\n  cores       {}\n  JSON-RPC    {}\n  state       {}\n",
            env!("CARGO_PKG_VERSION"),
            cores.iter().map(usize::to_string).collect::<Vec<_>>().join(","),
            socket.display(),
            self.state.path().display(),
        );
        for subsystem in self.nvmf.view().subsystems.values() {
            for listener in &subsystem.listeners {
                let at = listener.address.socket_addr();
                text.push_str(&format!(
                    "  connect     nvme connect -t {} -a {} -s {} -n {}\n",
                    listener.address.trtype.name().to_lowercase(),
                    at.ip(),
                    at.port(),
                    subsystem.nqn
                ));
            }
        }
        text.push_str("ready");
        announce(&text);
    }
}

/// Tells whoever started the appliance. Nobody may listen any more, which is no reason not to serve.
fn announce(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// The configuration that counts.
enum Source {
    /// Nothing; whether something was saved.
    Empty { replaces: bool },
    /// A `--config` file.
    File { config: Config },
    /// The state directory's.
    Saved { config: Config },
    /// A first volume.
    Fresh,
}

impl Source {
    fn choose(options: &Options, state: &StateDir) -> Result<Source, String> {
        let saved = if options.empty {
            // What cannot be read must not keep an empty server from starting.
            return Ok(Source::Empty { replaces: state.has_saved() });
        } else {
            state.load()?
        };
        let file = match &options.config {
            None => None,
            Some(path) => {
                let bytes = std::fs::read(path).map_err(|e| {
                    format!("cannot read --config {}: {e}; name a file that save_config wrote", path.display())
                })?;
                Some((path, checksum(&bytes)))
            }
        };
        match (file, saved) {
            (Some((path, sum)), saved) => {
                if let Some(saved) = saved {
                    if saved.origin.as_ref() == Some(&sum) {
                        tracing::info!(
                            file = %path.display(),
                            "--config was applied before and has not changed: the saved configuration, which contains it and \
                             every change since, is restored"
                        );
                        state.set_origin(Some(sum));
                        return Source::saved(&saved.text);
                    }
                    let aside = state.set_aside("superseded")?;
                    tracing::warn!(
                        file = %path.display(), kept = %aside.display(),
                        "--config is new or has changed: it is applied; the saved configuration is kept aside"
                    );
                }
                let config = Config::read(path).map_err(|e| e.to_string())?;
                state.set_origin(Some(sum));
                Ok(Source::File { config })
            }
            (None, Some(saved)) => {
                tracing::info!(dir = %state.path().display(), "the saved configuration is restored");
                state.set_origin(saved.origin.clone());
                Source::saved(&saved.text)
            }
            (None, None) => Ok(Source::Fresh),
        }
    }

    fn saved(text: &str) -> Result<Source, String> {
        let config = Config::parse(text).map_err(|e| format!("the saved configuration: {e}"))?;
        Ok(Source::Saved { config })
    }

    fn config(&self) -> Option<&Config> {
        match self {
            Source::File { config } | Source::Saved { config } => Some(config),
            Source::Empty { .. } | Source::Fresh => None,
        }
    }

    /// A file that somebody wrote must be right; of what was saved, what can be served is served.
    fn on_error(&self) -> OnError {
        match self {
            Source::Saved { .. } => OnError::Continue,
            _ => OnError::Stop,
        }
    }
}

/// Stops the appliance at SIGTERM or SIGINT; a second one ends the process at once.
fn watch_signals(stop: &watch::Sender<bool>) -> Result<(), String> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let failed = |e: std::io::Error| format!("cannot watch for signals: {e}");
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT]).map_err(failed)?;
    let stop = stop.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let mut asked = false;
            for _ in signals.forever() {
                if std::mem::replace(&mut asked, true) {
                    std::process::exit(130);
                }
                stop.send_replace(true);
            }
        })
        .map_err(failed)?;
    Ok(())
}
