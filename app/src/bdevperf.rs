//! `ringstone bdevperf`: the load of `perf` on a bdev in this process, without a network between.
//!
//! The bdevs are those of a configuration file, as `serve --config` takes it; of its other parts nothing is made. The load
//! runs on reactors that never sleep, on channels like any client's.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use bdev::core::runtime::SharedRuntime;
use bdev::core::{
    BdevEvent, BdevInfo, BdevSystem, ChannelId, ClientId, Completion, Descriptor, IoRequest, IoRuntime, IoStatus, Op,
    RuntimeConfig,
};
use bdev::rpc::{BdevConfig, IobufConfig};
use futures_util::future::BoxFuture;
use reactor::file::EngineChoice;
use reactor::platform::OsPlatform;
use reactor::reactor::{PollPolicy, ReactorConfig, ReactorThreads};
use reactor::{Buffers, Context, Instant, Platform, ReactorHandle, ReactorId, Schedule};
use rpc::config::{Config, OnError};
use rpc::{Host, KillSignal, Table};
use schema::RpcError;

use crate::executor::TokioExecutor;
use crate::load::crew::Crew;
use crate::load::engine::{Command, Device, Done, Engine, Ready, Volume};
use crate::load::report::{self, Report};
use crate::load::{self, LoadOptions};

/// Options of `ringstone bdevperf`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Configuration that makes the bdevs, as save_config writes it.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// The bdev to put the load on; given more than once, they are used in turn.
    #[arg(long, value_name = "NAME", required = true)]
    bdev: Vec<String>,
    #[command(flatten)]
    load: LoadOptions,
}

/// A bdev, and whether it is on its way out.
#[derive(Clone)]
struct Used {
    bdev: Arc<BdevInfo>,
    gone: Arc<AtomicBool>,
}

struct BdevDevice {
    used: Vec<Used>,
    runtime: SharedRuntime,
    client: ClientId,
    /// By the index of their volume.
    channels: Vec<ChannelId>,
    depth: usize,
    done: Vec<Completion>,
}

impl Device for BdevDevice {
    fn set_up(&mut self, _cx: &mut Context) -> Result<Option<Ready>, String> {
        let mut volumes = Vec::new();
        for (number, Used { bdev, .. }) in (1..).zip(&self.used) {
            let channel = self.runtime.borrow_mut().get_channel(bdev);
            self.channels.push(channel.map_err(|e| format!("'{}' cannot be used: {e}", bdev.name()))?);
            let geometry = bdev.device().geometry();
            volumes.push(Volume { number, blocks: geometry.num_blocks, block_bytes: geometry.block_size });
        }
        Ok(Some(Ready { volumes, lanes: 1, depth: self.depth, max_bytes: None }))
    }

    fn tend(&mut self, _cx: &mut Context) -> Result<bool, String> {
        match self.used.iter().find(|used| used.gone.load(Ordering::Relaxed)) {
            Some(Used { bdev, .. }) => Err(format!("'{}' is being removed: what it is made of is gone", bdev.name())),
            None => Ok(false),
        }
    }

    #[inline]
    fn poll(&mut self, _lane: usize, now: Instant, mut each: impl FnMut(Done)) -> Result<bool, String> {
        let mut runtime = self.runtime.borrow_mut();
        runtime.set_now(now);
        runtime.take_completions(self.client, &mut self.done);
        for mut completion in self.done.drain(..) {
            let (tag, status, data) = (completion.user(), completion.status(), completion.take_bufs());
            runtime.recycle(completion);
            let error = (status != IoStatus::Success).then(|| format!("{status:?}").into());
            each(Done { tag, data, error });
        }
        // Whoever measures never sleeps.
        Ok(true)
    }

    #[inline(always)]
    fn submit(&mut self, _lane: usize, command: Command, _now: Instant) {
        let op = if command.is_write { Op::Write { fua: false } } else { Op::Read };
        let (lba, blocks, bufs, user) = (command.lba, command.blocks.into(), command.data, command.tag);
        let channel = self.channels[command.volume];
        self.runtime.borrow_mut().submit(channel, self.client, IoRequest { op, lba, blocks, bufs, user });
    }

    fn send(&mut self, _lane: usize, _cx: &mut Context) -> Result<(), String> {
        let mut runtime = self.runtime.borrow_mut();
        runtime.run();
        runtime.flush();
        Ok(())
    }

    fn memory(&mut self, bytes: usize) -> Buffers {
        // Of the pool, which the kernel knows; but the device has a use for the last of it.
        let mut runtime = self.runtime.borrow_mut();
        let pool = runtime.pool();
        match pool.alloc(bytes) {
            Some(data) if pool.has_free(bytes) => data,
            Some(data) => {
                pool.put(data);
                Buffers::heap(bytes)
            }
            None => Buffers::heap(bytes),
        }
    }

    fn leave(&mut self, _cx: &mut Context) {
        for channel in self.channels.drain(..) {
            self.runtime.borrow_mut().put_channel(channel);
        }
    }
}

/// The control plane has nothing to start, and is not reached from outside.
struct Idle;

impl Host for Idle {
    fn start(&self) -> BoxFuture<'_, Result<(), RpcError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn kill(&self, _signal: KillSignal) -> Result<(), RpcError> {
        Ok(())
    }
}

/// Runs the command.
pub fn main(options: &Options) -> ExitCode {
    match run(options) {
        Ok(code) => code,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<ExitCode, String> {
    options.load.check()?;
    let config = Config::read(&options.config).map_err(|e| e.to_string())?;
    let platform: Arc<dyn Platform> = Arc::new(OsPlatform::new(EngineChoice::Auto));
    let reactor = |(id, core)| ReactorConfig { id: ReactorId(id), core, policy: PollPolicy::Busy };
    let configs: Vec<_> = (0..).zip(options.load.cores()?).map(reactor).collect();
    let install = |cx: &mut Context| IoRuntime::install(cx, RuntimeConfig::default()).map(|_| ());
    let reactors = ReactorThreads::start(&platform, &configs, install).map_err(|e| format!("cannot start: {e}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| format!("cannot start the control plane: {e}"))?;
    let result = {
        let _entered = runtime.enter();
        let executor = Arc::new(TokioExecutor::current());
        let bdevs = BdevSystem::new(reactors.handles().to_vec(), Arc::clone(&platform), executor);
        let loaded = runtime.block_on(load_config(&bdevs, &config));
        loaded.and_then(|()| measure(options, &runtime, &bdevs, reactors.handles()))
    };
    runtime.shutdown_timeout(std::time::Duration::from_millis(200));
    let stopped = reactors.stop().map_err(|e| format!("the reactor ended badly: {e}"));
    let report = result?;
    stopped?;
    Ok(report::print(&options.load, &report))
}

/// Makes the bdevs of the configuration.
async fn load_config(bdevs: &Arc<BdevSystem>, config: &Config) -> Result<(), String> {
    let methods: Vec<_> = bdev::rpc::methods().copied().collect();
    let table = Table::builder(Arc::new(Idle))
        .add(bdevs, &methods)
        .source(Arc::new(IobufConfig(Arc::clone(bdevs))))
        .source(Arc::new(BdevConfig(Arc::clone(bdevs))))
        .build()
        .map_err(|e| format!("the method table is inconsistent: {e}"))?;
    config.load(&table, OnError::Stop).await.map_err(|e| e.to_string())?;
    Ok(())
}

/// Opens a bdev for the load.
fn open(options: &Options, bdevs: &Arc<BdevSystem>, name: &str) -> Result<(Descriptor, Used), String> {
    let gone = Arc::new(AtomicBool::new(false));
    let hear = Arc::clone(&gone);
    let on_event = Arc::new(move |event| {
        if event == BdevEvent::Removing {
            hear.store(true, Ordering::Relaxed);
        }
    });
    let names = || bdevs.list().iter().map(|bdev| bdev.name().to_owned()).collect::<Vec<_>>().join(", ");
    let opened = bdevs.open(name, options.load.writes(), "bdevperf", on_event);
    let descriptor = opened.map_err(|e| format!("--bdev: {e}; the configuration makes: {}", names()))?;
    let used = Used { bdev: Arc::clone(descriptor.bdev()), gone };
    Ok((descriptor, used))
}

fn measure(
    options: &Options,
    runtime: &tokio::runtime::Runtime,
    bdevs: &Arc<BdevSystem>,
    handles: &[ReactorHandle],
) -> Result<Report, String> {
    let opened: Result<Vec<_>, _> = options.bdev.iter().map(|name| open(options, bdevs, name)).collect();
    let (descriptors, used): (Vec<_>, Vec<_>) = opened?.into_iter().unzip();
    let crew = Crew::new(handles.len(), load::stop_flag()?);
    let (out, reports) = mpsc::channel();
    for (index, handle) in handles.iter().enumerate() {
        let (load, used, place, out) = (options.load.clone(), used.clone(), (Arc::clone(&crew), index), out.clone());
        let begin = handle.call(move |cx| {
            let runtime = IoRuntime::of(cx);
            let client = runtime.borrow_mut().add_client();
            let (depth, channels, done) = (usize::from(load.qd), Vec::new(), Vec::new());
            let device = BdevDevice { used, runtime, client, channels, depth, done };
            let engine = Engine::new(cx, device, load, place, out);
            cx.add_poller("bdevperf", Schedule::Active, Box::new(engine));
        });
        runtime.block_on(begin).map_err(|e| e.to_string())?;
    }
    drop(out);
    let report = load::wait(&options.load, &reports, &crew).ok_or("the load ended without a result")?;
    drop(descriptors);
    Ok(report)
}
