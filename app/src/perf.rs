//! `ringstone perf`: a load over NVMe-oF from one reactor that never sleeps. See [`crate::load`] for how it is measured.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use nvmf::host::{Completion, Controller, IoQueue, Options as HostOptions, Polled, State};
use reactor::reactor::PollPolicy;
use reactor::{Context, Instant};

use crate::load::engine::{Command, Device, Done, Engine, Live, Ready, Volume};
use crate::load::{self, LoadOptions};
use crate::remote::{self, Remote};

const KATO_MS: u32 = 30_000;

/// Options of `ringstone perf`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    remote: Remote,
    /// NQN of the subsystem.
    #[arg(long)]
    subnqn: String,
    /// Namespaces to use in turn, as in 1,3; or all [default: the first that is active].
    #[arg(long, value_parser = parse_nsids)]
    nsid: Option<Nsids>,
    /// I/O queues.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,
    #[command(flatten)]
    load: LoadOptions,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Nsids {
    All,
    These(Vec<u32>),
}

fn parse_nsids(text: &str) -> Result<Nsids, String> {
    if text == "all" {
        return Ok(Nsids::All);
    }
    let nsid = |part: &str| part.trim().parse().ok().filter(|nsid| (1..u32::MAX).contains(nsid));
    let nsids: Option<Vec<u32>> = text.split(',').map(nsid).collect();
    nsids.map(Nsids::These).ok_or_else(|| format!("'{text}' is no list of namespaces; write for example 1,3 or all"))
}

struct NvmfDevice {
    options: Options,
    address: SocketAddr,
    controller: Controller,
    queues: Vec<IoQueue>,
    /// NSIDs by the index of their volume.
    nsids: Vec<u32>,
    done: Vec<Completion>,
}

impl NvmfDevice {
    fn new(cx: &Context, options: Options, address: SocketAddr) -> NvmfDevice {
        let host = HostOptions {
            io_queues: options.queues,
            io_depth: options.load.qd,
            io_timeout: options.load.patience(),
            kato_ms: KATO_MS,
            ..options.remote.host_options(cx, &options.subnqn)
        };
        let connector = options.remote.connector(&cx.platform().network(), address);
        let controller = Controller::new(connector, host, 0, cx.read_clock());
        NvmfDevice { options, address, controller, queues: Vec::new(), nsids: Vec::new(), done: Vec::new() }
    }

    fn explain(&self, why: impl ToString) -> String {
        self.options.remote.explain(self.address, &why.to_string())
    }

    fn volumes(&self) -> Result<Vec<Volume>, String> {
        let known = self.controller.inventory().namespaces();
        let found: Vec<_> = match &self.options.nsid {
            None => known.values().take(1).collect(),
            Some(Nsids::All) => known.values().collect(),
            Some(Nsids::These(nsids)) => {
                let find = |nsid: &u32| {
                    let there: Vec<String> = known.keys().map(u32::to_string).collect();
                    let missing = || format!("--nsid {nsid}: the subsystem has {} for this host", there.join(", "));
                    known.get(nsid).ok_or_else(missing)
                };
                nsids.iter().map(find).collect::<Result<_, _>>()?
            }
        };
        if found.is_empty() {
            return Err("the subsystem has no namespace for this host; add one to it".into());
        }
        let volume = |ns: &&nvmf::host::Namespace| Volume {
            number: ns.nsid.into(),
            blocks: ns.blocks,
            block_bytes: ns.block_bytes,
        };
        Ok(found.iter().map(volume).collect())
    }
}

impl Device for NvmfDevice {
    fn set_up(&mut self, cx: &mut Context) -> Result<Option<Ready>, String> {
        self.tend(cx)?;
        if !self.controller.is_live() {
            return Ok(None);
        }
        if self.queues.is_empty() {
            let granted = self.controller.io_queues();
            if granted < self.options.queues {
                eprintln!("note: the controller has {granted} of the {} queues asked for", self.options.queues);
            }
            for qid in 1..=granted {
                let params = self.controller.queue_params(qid).ok_or("the controller is gone")?;
                self.queues.push(IoQueue::connect(params, qid.into(), cx.now()).map_err(|e| e.to_string())?);
            }
        }
        for at in 0..self.queues.len() {
            let polled = self.queues[at].poll(cx.now(), &mut Polled, &mut self.done);
            polled.map_err(|e| self.explain(e))?;
        }
        if !self.queues.iter().all(IoQueue::is_live) {
            return Ok(None);
        }
        let volumes = self.volumes()?;
        self.nsids = volumes.iter().map(|volume| volume.number as u32).collect();
        let slots = self.queues.iter().map(|queue| usize::from(queue.params().slots)).min().unwrap_or(0);
        let depth = slots.min(self.options.load.qd.into());
        Ok(Some(Ready { volumes, lanes: self.queues.len(), depth, max_bytes: self.controller.max_io_bytes() }))
    }

    fn tend(&mut self, cx: &mut Context) -> Result<bool, String> {
        let busy = self.controller.poll(cx.now(), &mut Polled);
        if self.controller.state() == State::Down {
            return Err(match self.controller.error() {
                Some(error) => self.explain(error),
                None => self.explain("the controller is down"),
            });
        }
        Ok(busy)
    }

    fn poll(&mut self, lane: usize, cx: &mut Context, done: &mut Vec<Done>) -> Result<bool, String> {
        let polled = self.queues[lane].poll(cx.now(), &mut Polled, &mut self.done);
        done.extend(self.done.drain(..).map(|completion| {
            let status = completion.cqe.status();
            let error = (!status.is_success()).then(|| status.name().into());
            Done { tag: completion.user, data: completion.data, error }
        }));
        polled.map_err(|e| self.explain(e))
    }

    #[inline]
    fn submit(&mut self, lane: usize, command: Command, now: Instant) {
        let Command { tag, volume, is_write, lba, blocks, data } = command;
        let (queue, nsid) = (&mut self.queues[lane], self.nsids[volume]);
        if is_write {
            queue.write(tag, nsid, lba, blocks, data, now);
        } else {
            queue.read(tag, nsid, lba, blocks, data, now);
        }
    }

    fn send(&mut self, lane: usize, _cx: &mut Context) -> Result<(), String> {
        self.queues[lane].send().map_err(|e| self.explain(e))
    }

    fn leave(&mut self, cx: &mut Context) {
        // It is told, and not waited for: the report is what somebody waits for.
        self.controller.shut_down();
        self.controller.poll(cx.now(), &mut Polled);
        for queue in &mut self.queues {
            queue.close(&mut Polled, &mut |_, _| {});
        }
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
    let address = options.remote.address()?;
    let (stop, live) = (load::stop_flag()?, Arc::new(Live::default()));
    let make = {
        let (options, live) = (options.clone(), Arc::clone(&live));
        move |cx: &mut Context, _, out| {
            let device = NvmfDevice::new(cx, options.clone(), address);
            let engine = Engine::new(cx, device, options.load.clone(), Arc::clone(&stop), Arc::clone(&live), out);
            Ok(Box::new(engine) as _)
        }
    };
    let bs = options.load.bs;
    let report = remote::run(options.load.core, PollPolicy::Busy, make, |reports| load::wait(reports, &live, bs))?;
    Ok(load::print(&options.load, &report))
}
