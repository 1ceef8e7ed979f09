//! `ringstone perf`: a load over NVMe-oF from reactors that never sleep. See [`crate::load`] for how it is measured.
//!
//! The first reactor has the controller, and the I/O queues are dealt to all in turn. The others wait in their set-up until
//! the first has put an [`Invitation`] into their slot.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use nvmf::host::{
    Completion, Controller, IoQueue, Options as HostOptions, PayloadMemory, Polled, QueueParams, State, Watches,
};
use nvmf::spec::fabrics::DISCOVERY_NQN;
use reactor::buffer::{CLASS_BYTES, PoolConfig};
use reactor::park::Source;
use reactor::reactor::{PollPolicy, WatchId};
use reactor::{BufferPool, Buffers, Context, Instant};

use crate::load::crew::Crew;
use crate::load::engine::{Command, Device, Done, Engine, Ready, Volume};
use crate::load::{self, LoadOptions, report};
use crate::remote::{self, Remote};

const KATO_MS: u32 = 30_000;

/// Options of `ringstone perf`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    #[command(flatten)]
    remote: Remote,
    /// NQN of the subsystem.
    #[arg(long, value_parser = remote::parse_nqn)]
    subnqn: String,
    /// Namespaces to use in turn, as in 1,3; or all [default: the first that is active].
    #[arg(long, value_parser = parse_nsids)]
    nsid: Option<Nsids>,
    /// I/O queues, dealt to the cores in turn [default: one for each core].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: Option<u16>,
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
    let nsids = nsids.ok_or_else(|| format!("'{text}' is no list of namespaces; write for example 1,3 or all"))?;
    match nsids.iter().enumerate().find(|(n, nsid)| nsids[..*n].contains(nsid)) {
        Some((_, twice)) => Err(format!("namespace {twice} is named twice")),
        None => Ok(Nsids::These(nsids)),
    }
}

/// What a reactor needs to do its part.
#[derive(Clone)]
struct Invitation {
    queues: Vec<QueueParams>,
    volumes: Vec<Volume>,
    max_bytes: Option<u64>,
}

/// Invitations by reactor; `None` until the controller is there.
type Slots = Arc<[Mutex<Option<Invitation>>]>;

/// Bytes of the largest buffer of a pool.
const LARGEST: usize = CLASS_BYTES[CLASS_BYTES.len() - 1];

/// As [`Polled`], on a reactor: what its queue pairs share is shared.
struct PolledOn<'a>(&'a mut Context);

impl Watches for PolledOn<'_> {
    fn watch(&mut self, source: Source, key: u64) -> std::io::Result<Option<WatchId>> {
        Polled.watch(source, key)
    }

    fn unwatch(&mut self, watch: WatchId) {
        Polled.unwatch(watch);
    }

    fn context(&mut self) -> Option<&mut Context> {
        Some(self.0)
    }
}

struct NvmfDevice {
    options: Options,
    address: SocketAddr,
    slots: Slots,
    /// This reactor.
    index: usize,
    /// On the first reactor only.
    controller: Option<Controller>,
    asked_queues: u16,
    invitation: Option<Invitation>,
    queues: Vec<IoQueue>,
    /// NSIDs by the index of their volume.
    nsids: Vec<u32>,
    done: Vec<Completion>,
    /// Payload memory, over RDMA.
    pool: Option<Rc<RefCell<BufferPool>>>,
}

impl NvmfDevice {
    fn new(cx: &mut Context, options: Options, address: SocketAddr, slots: Slots) -> Result<NvmfDevice, String> {
        let index = cx.id().0 as usize;
        let asked_queues = options.queues.unwrap_or(slots.len() as u16);
        let controller = (index == 0).then(|| {
            let host = HostOptions {
                io_queues: asked_queues,
                io_depth: options.load.qd,
                io_timeout: options.load.patience(),
                kato_ms: KATO_MS,
                ..options.remote.host_options(cx, &options.subnqn)
            };
            let connector = options.remote.connector(&cx.platform().network(), address);
            Controller::new(connector, host, 0, cx.read_clock())
        });
        let (queues, nsids, done) = (Vec::new(), Vec::new(), Vec::new());
        // A device knows a pool's memory for good; other memory it has to be told of for each command.
        let pool = match options.remote.is_rdma() {
            true => {
                let pool = BufferPool::new(PoolConfig::default()).map_err(|error| error.to_string())?;
                let pool = Rc::new(RefCell::new(pool));
                let reached = Rc::clone(&pool);
                cx.insert(PayloadMemory::new(move |use_it| use_it(&reached.borrow())));
                Some(pool)
            }
            false => None,
        };
        let invitation = None;
        Ok(NvmfDevice {
            options,
            address,
            slots,
            index,
            controller,
            asked_queues,
            invitation,
            queues,
            nsids,
            done,
            pool,
        })
    }

    fn explain(&self, why: impl ToString) -> String {
        self.options.remote.explain(self.address, &why.to_string())
    }

    /// The first reactor's part once the controller is live: all are invited.
    fn invite(&self, controller: &Controller) -> Result<(), String> {
        let (granted, members) = (controller.io_queues(), self.slots.len());
        if usize::from(granted) < members {
            return Err(format!(
                "the controller gives {granted} queues to this host, and --core has {members} cores; name fewer of them"
            ));
        }
        if granted < self.asked_queues {
            eprintln!("note: the controller has {granted} of the {} queues asked for", self.asked_queues);
        }
        let volumes = self.volumes(controller)?;
        for (index, slot) in self.slots.iter().enumerate() {
            let mine = (1..=granted).skip(index).step_by(members).map(|qid| controller.queue_params(qid));
            let queues = mine.collect::<Option<_>>().ok_or("the controller is gone")?;
            let invitation = Invitation { queues, volumes: volumes.clone(), max_bytes: controller.max_io_bytes() };
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(invitation);
        }
        Ok(())
    }

    fn volumes(&self, controller: &Controller) -> Result<Vec<Volume>, String> {
        let known = controller.inventory().namespaces();
        let found: Vec<_> = match &self.options.nsid {
            None => known.values().take(1).collect(),
            Some(Nsids::All) => known.values().collect(),
            Some(Nsids::These(nsids)) => {
                let find = |nsid: &u32| known.get(nsid).ok_or_else(|| remote::no_namespace(*nsid, known.keys()));
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
        if self.invitation.is_none() {
            if let Some(controller) = self.controller.as_ref().filter(|controller| controller.is_live()) {
                self.invite(controller)?;
            }
            self.invitation = self.slots[self.index].lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some(invitation) = &self.invitation else { return Ok(None) };
            for params in &invitation.queues {
                let key = params.qid.into();
                self.queues.push(IoQueue::connect(params.clone(), key, cx.now()).map_err(|e| e.to_string())?);
            }
        }
        for at in 0..self.queues.len() {
            let now = cx.now();
            let polled = self.queues[at].poll(now, &mut PolledOn(cx), &mut self.done);
            polled.map_err(|e| self.explain(e))?;
        }
        if !self.queues.iter().all(IoQueue::is_live) {
            return Ok(None);
        }
        let Some(Invitation { volumes, max_bytes, .. }) = self.invitation.clone() else { return Ok(None) };
        self.nsids = volumes.iter().map(|volume| volume.number as u32).collect();
        let slots = self.queues.iter().map(|queue| usize::from(queue.params().slots)).min().unwrap_or(0);
        let depth = slots.min(self.options.load.qd.into());
        Ok(Some(Ready { volumes, lanes: self.queues.len(), depth, max_bytes }))
    }

    fn tend(&mut self, cx: &mut Context) -> Result<bool, String> {
        let Some(controller) = &mut self.controller else { return Ok(false) };
        let now = cx.now();
        let busy = controller.poll(now, &mut PolledOn(cx));
        if controller.state() != State::Down {
            return Ok(busy);
        }
        let why = controller.error().map_or_else(|| "the controller is down".to_owned(), ToString::to_string);
        Err(self.explain(why))
    }

    fn poll(&mut self, lane: usize, now: Instant, mut each: impl FnMut(Done)) -> Result<bool, String> {
        // It is set up, and needs its reactor no longer.
        let polled = self.queues[lane].poll(now, &mut Polled, &mut self.done);
        for completion in self.done.drain(..) {
            let status = completion.cqe.status();
            let error = (!status.is_success()).then(|| status.name().into());
            each(Done { tag: completion.user, data: completion.data, error });
        }
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

    fn memory(&mut self, bytes: usize) -> Buffers {
        // One buffer, so that it is one stretch: a controller may take no more than one descriptor.
        let whole = self.pool.as_ref().filter(|_| bytes <= LARGEST).and_then(|pool| pool.borrow_mut().alloc(bytes));
        whole.unwrap_or_else(|| Buffers::heap(bytes))
    }

    fn leave(&mut self, cx: &mut Context) {
        // It is told, and not waited for: the report is what somebody waits for.
        if let Some(controller) = &mut self.controller {
            controller.shut_down();
            let now = cx.now();
            controller.poll(now, &mut PolledOn(cx));
        }
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
    if options.subnqn == DISCOVERY_NQN {
        return Err(format!(
            "--subnqn {DISCOVERY_NQN}: a discovery service has no namespaces; ringstone discover lists what does"
        ));
    }
    let cores = options.load.cores()?;
    if let Some(queues) = options.queues.filter(|queues| usize::from(*queues) < cores.len()) {
        let (given, needed) = (queues, cores.len());
        return Err(format!("--queues {given}: each of the {needed} cores of --core needs one; give {needed} or more"));
    }
    let address = options.remote.address()?;
    let crew = Crew::new(cores.len(), load::stop_flag()?);
    let make = {
        let (options, crew) = (options.clone(), Arc::clone(&crew));
        let slots: Slots = cores.iter().map(|_| Mutex::new(None)).collect();
        move |cx: &mut Context, _, out| {
            let device = NvmfDevice::new(cx, options.clone(), address, Arc::clone(&slots))?;
            let place = (Arc::clone(&crew), cx.id().0 as usize);
            let engine = Engine::new(cx, device, options.load.clone(), place, out);
            Ok(Box::new(engine) as _)
        }
    };
    let found = remote::run(&cores, PollPolicy::Busy, make, |reports| load::wait(&options.load, reports, &crew))?;
    Ok(report::print(&options.load, &found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_are_a_list_without_repetition() {
        assert_eq!(parse_nsids("all"), Ok(Nsids::All));
        assert_eq!(parse_nsids("3, 1"), Ok(Nsids::These(vec![3, 1])));
        assert!(parse_nsids("1,3,1").unwrap_err().contains("namespace 1 is named twice"));
        for bad in ["", "0", "1,", "4294967295", "-1", "1-3"] {
            assert!(parse_nsids(bad).unwrap_err().contains("1,3 or all"), "{bad}");
        }
    }
}
