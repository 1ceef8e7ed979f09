//! A host and a target on one machine, with one controller attached, and a client that does one operation at a time.
#![allow(dead_code)] // Each test uses its part.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bdev::core::runtime::SharedRuntime;
use bdev::core::{BdevEvent, ChannelId, ClientId, Descriptor, IoRequest, IoStatus, Op};
use bdev::modules::malloc::{self, MallocOptions};
use initiator::path::{Address, PathState, Site};
use initiator::system::{Attach, Multipath};
use initiator::{InitiatorError, InitiatorSystem, Part};
use nvmf::host::{ReconnectPolicy, Transports};
use nvmf::target::model::NewListener;
use nvmf::target::view::{TransportKind, TransportOptions};
use reactor::buffer::PoolConfig;
use reactor::{Buffers, Instant};
use ringstone_sim::target::{NQN, Target, address, host_transports, listen_on};
use ringstone_sim::{Rng, Sim, World, WorldConfig};

pub const BDEV: &str = "Nvme0n1";
/// What is due is done this near to when it is due.
pub const SOON: Duration = Duration::from_millis(300);

pub fn second() -> SocketAddr {
    SocketAddr::new(address().ip(), address().port() + 1)
}

pub fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// A client that does one read at a time.
pub struct Probe {
    pub runtime: SharedRuntime,
    pub client: ClientId,
    pub channel: ChannelId,
    pub reactor: usize,
    pub _descriptor: Descriptor,
}

pub struct Stage {
    pub kind: TransportKind,
    pub sim: Arc<Sim>,
    pub world: World,
    pub target: Target,
    pub initiator: Arc<InitiatorSystem>,
}

impl Stage {
    pub fn new(kind: TransportKind, seed: u64) -> Stage {
        Stage::with(kind, seed, host_transports)
    }

    /// The same, with a host that has these transports.
    pub fn with(kind: TransportKind, seed: u64, transports: impl FnOnce(&World) -> Transports) -> Stage {
        let (sim, mut rng) = (Sim::new(seed), Rng::new(seed));
        let config = WorldConfig {
            reactors: 1 + rng.below(3) as usize,
            io_pool: 256,
            buffers: PoolConfig { small: 256, medium: 64, large: 32 },
            sleeps: !rng.one_in(4),
            rounds: 6_000_000,
        };
        let mut world = World::new(&sim, config, rng.next_u64());
        let system = Arc::clone(world.system());
        let volume = async move { malloc::create(&system, "vol", None, MallocOptions::new(4096, 64)).await };
        world.block_on("the volume", volume).expect("the name is free");
        let target = Target::install_over(&mut world, kind, TransportOptions::default());
        target.serve(&mut world, &["vol".into()]);
        for n in 0..world.reactor_count() {
            Part::install(world.context(n));
        }
        let initiator = InitiatorSystem::new(world.system(), transports(&world));
        Stage { kind, sim, world, target, initiator }
    }

    pub fn attach(
        &mut self,
        socket: SocketAddr,
        multipath: Multipath,
        (loss, delay, fail): (i64, u64, u64),
    ) -> Result<Vec<String>, InitiatorError> {
        let attach = Attach {
            name: "Nvme0".into(),
            address: Address {
                site: self.site(socket),
                subnqn: NQN.into(),
                hostnqn: "nqn.2026-11.io.ringstone:sim-host".into(),
            },
            digests: (false, false),
            multipath,
            reconnect: ReconnectPolicy::from_seconds(loss, delay, fail).expect("a policy"),
            step_timeout: None,
            mode: None,
            max_bdevs: 8,
            owner: None,
            params: serde_json::Value::Null,
        };
        let initiator = Arc::clone(&self.initiator);
        self.world.block_on("a path", async move { initiator.attach(attach).await })
    }

    pub fn site(&self, socket: SocketAddr) -> Site {
        Site { trtype: self.kind, socket }
    }

    pub fn listen(&mut self, socket: SocketAddr, listens: bool) {
        let (nvmf, address) = (Arc::clone(&self.target.nvmf), listen_on(self.kind, socket));
        let changed = async move {
            let new = NewListener { address: address.clone(), ana_state: None, sock_impl: None };
            match listens {
                true => nvmf.add_listener(NQN, new).await.expect("the port is free"),
                false => nvmf.remove_listener(NQN, address).await.expect("it listens"),
            }
        };
        self.world.block_on("the listener", changed);
    }

    pub fn now(&mut self) -> Instant {
        self.world.context(0).read_clock()
    }

    pub fn state(&self) -> PathState {
        self.initiator.groups()[0].paths()[0].view().state
    }

    /// The port in use.
    pub fn port(&self) -> SocketAddr {
        self.initiator.groups()[0].paths()[0].addresses()[0].site.socket
    }

    /// The target stops to listen at `socket`; returns when the path is known to be lost.
    pub fn lose(&mut self, socket: SocketAddr) -> Instant {
        self.listen(socket, false);
        let initiator = Arc::clone(&self.initiator);
        self.world.run_until("the loss to be noticed", |_| {
            let groups = initiator.groups();
            groups.is_empty() || groups[0].paths().iter().all(|path| path.view().state != PathState::Enabled)
        });
        self.now()
    }

    pub fn probe(&mut self) -> Probe {
        let system = Arc::clone(self.world.system());
        let nothing = Arc::new(|_: BdevEvent| {});
        let descriptor = system.open(BDEV, true, "a probe", nothing).expect("it is there");
        let reactor = self.world.reactor_count() - 1;
        let runtime = self.world.runtime(reactor);
        let (client, channel) = {
            let mut runtime = runtime.borrow_mut();
            (runtime.add_client(), runtime.get_channel(descriptor.bdev()).expect("a channel"))
        };
        Probe { runtime, client, channel, reactor, _descriptor: descriptor }
    }

    pub fn submit(&mut self, probe: &Probe, op: Op) {
        let now = self.world.context(probe.reactor).read_clock();
        let mut runtime = probe.runtime.borrow_mut();
        runtime.set_now(now);
        let request = IoRequest { op, lba: 3, blocks: 1, bufs: Buffers::heap(4096), user: 1 };
        runtime.submit(probe.channel, probe.client, request);
        runtime.run();
        runtime.flush();
        drop(runtime);
        self.world.wake(probe.reactor);
    }

    pub fn taken(probe: &Probe) -> Option<IoStatus> {
        let mut done = Vec::new();
        let mut runtime = probe.runtime.borrow_mut();
        runtime.take_completions(probe.client, &mut done);
        done.pop().map(|completion| {
            let status = completion.status();
            runtime.recycle(completion);
            status
        })
    }

    pub fn run(&mut self, probe: &Probe, op: Op) -> (IoStatus, Instant) {
        self.submit(probe, op);
        self.ended(probe)
    }

    pub fn ended(&mut self, probe: &Probe) -> (IoStatus, Instant) {
        let mut status = None;
        self.world.run_until("the operation to end", |_| {
            status = Self::taken(probe);
            status.is_some()
        });
        (status.expect("it has ended"), self.now())
    }

    pub fn close(&mut self, probe: Probe) {
        let mut runtime = probe.runtime.borrow_mut();
        runtime.put_channel(probe.channel);
        runtime.remove_client(probe.client);
    }

    /// Takes everything down.
    pub fn finish(self) {
        self.finish_after(&[]);
    }

    /// The same, with more bdevs.
    pub fn finish_after(mut self, more: &'static [&'static str]) {
        for group in self.initiator.groups() {
            let (initiator, name) = (Arc::clone(&self.initiator), group.name.clone());
            let detached = async move { initiator.detach(&name, |_| true).await };
            self.world.block_on("the controller to go", detached).expect("nobody holds it");
        }
        self.target.shut_down(&mut self.world);
        let system = Arc::clone(self.world.system());
        let removed = async move {
            for name in more.iter().chain(&["vol"]) {
                system.remove(name).await.expect("nobody holds it");
            }
        };
        self.world.block_on("the volumes to go", removed);
        self.world.assert_clean();
    }
}

pub fn near(at: Instant, wanted: Instant) {
    let off = at.nanos_since(wanted).max(wanted.nanos_since(at));
    assert!(Duration::from_nanos(off) < SOON, "{at:?} is not about {wanted:?}");
}
