//! A discovery service on the host against a target whose subsystems, listeners and referrals come and go, while connections
//! break and fall silent: when the world is at rest again, exactly what is listed is attached, and when the service is
//! stopped, nothing is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bdev::modules::malloc::{self, MallocOptions};
use initiator::path::Site;
use initiator::system::discovery::Start;
use initiator::{InitiatorSystem, Part};
use nvmf::host::ReconnectPolicy;
use nvmf::target::model::{NewListener, NewNamespace, NewSubsystem};
use nvmf::target::system::NvmfSystem;
use nvmf::target::view::{DISCOVERY_NQN, ListenAddress, Referral, TransportKind, TransportOptions};
use reactor::buffer::PoolConfig;
use ringstone_sim::seeds;
use ringstone_sim::target::{NQN, Target, address, host_transports, listen_on};
use ringstone_sim::{Rng, Sim, World, WorldConfig};

const HOST: &str = "nqn.2026-11.io.ringstone:sim-host";
/// Subsystems that come and go, besides the one that stays.
const EXTRA: u64 = 3;

/// A port of the machine, counted from the first one.
fn port(trtype: TransportKind, number: u16) -> Site {
    let mut site = Site { trtype, socket: address() };
    site.socket.set_port(number);
    site
}

fn at(site: Site) -> ListenAddress {
    listen_on(site.trtype, site.socket)
}

fn nqn(n: u64) -> String {
    format!("{NQN}:{n}")
}

fn listener(site: Site) -> NewListener {
    NewListener { address: at(site), ana_state: None, sock_impl: None }
}

/// The transports of the target's two ports.
type Kinds = [TransportKind; 2];

struct Stage {
    /// Where the target listens: always, and from time to time; and where nobody ever does.
    first: Site,
    second: Site,
    nobody: Site,
    sim: Arc<Sim>,
    world: World,
    target: Target,
    initiator: Arc<InitiatorSystem>,
    rng: Rng,
    /// What is listed: the addresses of each subsystem.
    listed: BTreeMap<String, BTreeSet<Site>>,
}

impl Stage {
    fn new([one, other]: Kinds, seed: u64) -> Stage {
        let (sim, mut rng) = (Sim::new(seed), Rng::new(seed));
        let config = WorldConfig {
            reactors: 1 + rng.below(3) as usize,
            io_pool: 1024,
            buffers: PoolConfig { small: 512, medium: 128, large: 64 },
            sleeps: !rng.one_in(4),
            rounds: 6_000_000,
        };
        let mut world = World::new(&sim, config, rng.next_u64());
        let system = Arc::clone(world.system());
        let volumes = async move {
            for n in 0..=EXTRA {
                malloc::create(&system, &format!("vol{n}"), None, MallocOptions::new(4096, 16))
                    .await
                    .expect("a volume");
            }
        };
        world.block_on("the volumes", volumes);
        let target = Target::install_over(&mut world, one, TransportOptions::default());
        if other != one {
            target.add_transport(&mut world, other, TransportOptions::default());
        }
        let number = address().port();
        let (first, second, nobody) = (port(one, number), port(other, number + 1), port(other, 9));
        target.serve(&mut world, &["vol0".into()]);
        for n in 0..world.reactor_count() {
            Part::install(world.context(n));
        }
        let initiator = InitiatorSystem::new(world.system(), host_transports(&world));
        let listed = BTreeMap::from([(NQN.to_string(), BTreeSet::from([first]))]);
        Stage { first, second, nobody, sim, world, target, initiator, rng, listed }
    }

    fn start(&mut self, wait: Option<Duration>) {
        let start = Start {
            name: "auto".into(),
            site: self.first,
            hostnqn: HOST.into(),
            // A path that is lost for long is given up, and discovered again.
            reconnect: ReconnectPolicy::from_seconds(if self.rng.one_in(2) { 4 } else { -1 }, 1, 0).expect("a policy"),
            wait,
            params: serde_json::Value::Null,
        };
        let initiator = Arc::clone(&self.initiator);
        self.world.block_on("the service", async move { initiator.start_discovery(start).await }).expect("it starts");
    }

    fn on_target<R: 'static>(&mut self, work: impl AsyncFnOnce(Arc<NvmfSystem>) -> R + 'static) -> R {
        let nvmf = Arc::clone(&self.target.nvmf);
        self.world.block_on("the target", async move { work(nvmf).await })
    }

    /// Adds a subsystem or removes it.
    fn change_subsystem(&mut self) {
        let n = 1 + self.rng.below(EXTRA);
        let name = nqn(n);
        if self.listed.remove(&name).is_some() {
            return self.on_target(async move |nvmf| nvmf.delete_subsystem(&name).await.expect("it is there"));
        }
        let at: BTreeSet<Site> = match self.rng.below(3) {
            0 => BTreeSet::from([self.first]),
            1 => BTreeSet::from([self.second]),
            _ => BTreeSet::from([self.first, self.second]),
        };
        self.listed.insert(name.clone(), at.clone());
        self.on_target(async move |nvmf| {
            let new = NewSubsystem { nqn: name.clone(), allow_any_host: true, ..NewSubsystem::default() };
            nvmf.create_subsystem(new).await.expect("the name is free");
            nvmf.add_namespace(&name, NewNamespace::default(), &format!("vol{n}")).await.expect("a namespace");
            for site in at {
                nvmf.add_listener(&name, listener(site)).await.expect("it listens");
            }
        });
    }

    /// Another way to the subsystem that stays comes or goes.
    fn change_listener(&mut self) {
        let second = self.second;
        let at = self.listed.get_mut(NQN).expect("it stays");
        let comes = !at.remove(&second);
        if comes {
            at.insert(second);
        }
        self.on_target(async move |nvmf| match comes {
            true => nvmf.add_listener(NQN, listener(second)).await.expect("it listens"),
            false => nvmf.remove_listener(NQN, self::at(second)).await.expect("it listened"),
        });
    }

    /// Refers to an address where nobody may be.
    fn change_referral(&mut self) {
        let site = if self.rng.one_in(2) { self.second } else { self.nobody };
        self.on_target(async move |nvmf| {
            let referral = Referral { address: at(site), subnqn: DISCOVERY_NQN.into(), secure_channel: false };
            if nvmf.add_referral(referral).await.is_err() {
                nvmf.remove_referral(at(site), DISCOVERY_NQN).await.expect("it was there");
            }
        });
    }

    /// The target refuses everybody for a while: listeners are closed.
    fn refuse(&mut self) {
        let wait = Duration::from_millis(self.rng.below(8_000));
        let all = self.listed.clone();
        let closed = all.clone();
        self.on_target(async move |nvmf| {
            for (name, site) in closed.iter().flat_map(|(name, at)| at.iter().map(move |site| (name, *site))) {
                nvmf.remove_listener(name, at(site)).await.expect("it listened");
            }
        });
        self.world.run_for(wait);
        self.on_target(async move |nvmf| {
            for (name, site) in all.iter().flat_map(|(name, at)| at.iter().map(move |site| (name, *site))) {
                nvmf.add_listener(name, listener(site)).await.expect("it listens");
            }
        });
    }

    /// What is attached: the paths to each subsystem, and whether they work and have their bdev.
    fn attached(&self) -> BTreeMap<String, BTreeSet<Site>> {
        let mut found: BTreeMap<String, BTreeSet<Site>> = BTreeMap::new();
        for group in self.initiator.groups() {
            for path in group.paths().iter().filter(|path| path.view().association.is_some()) {
                let is_on = |disk: &Arc<initiator::disk::Disk>| disk.paths().iter().any(|r| r.path.id == path.id);
                assert!(group.name.starts_with("auto"));
                if group.disks().iter().any(is_on) {
                    found.entry(path.address.subnqn.clone()).or_default().insert(path.address.site);
                }
            }
        }
        found
    }

    fn finish(mut self) {
        let (initiator, listed) = (Arc::clone(&self.initiator), self.listed.clone());
        self.sim.net(|rules| rules.reset_one_in = 0);
        self.sim.rdma(|rules| rules.break_one_in = 0);
        // What a service listed that is referred to, and that cannot be reached any more, would stay.
        let never = [self.second, self.nobody];
        self.on_target(async move |nvmf| {
            for site in never {
                let _ = nvmf.remove_referral(at(site), DISCOVERY_NQN).await;
            }
        });
        for _ in 0..600 {
            // What is gone may only have lost its connection yet.
            if self.attached() == listed && initiator.groups().len() == listed.len() {
                break;
            }
            self.world.run_for(Duration::from_millis(100));
        }
        assert_eq!(self.attached(), listed, "a minute is enough; {:?}", initiator.groups());
        let names: BTreeSet<String> = initiator.groups().iter().map(|group| group.name.clone()).collect();
        assert_eq!(names.len(), listed.len(), "a controller for each subsystem");
        let stopping = Arc::clone(&initiator);
        self.world.block_on("the end", async move { stopping.stop_discovery("auto").await }).expect("it runs");
        assert!(initiator.groups().is_empty() && initiator.services().is_empty());
        assert!((0..=EXTRA).all(|n| self.world.system().get(&format!("auto{n}n1")).is_err()));
        self.target.shut_down(&mut self.world);
        for n in 0..=EXTRA {
            let system = Arc::clone(self.world.system());
            let removed = async move { system.remove(&format!("vol{n}")).await };
            self.world.block_on("a volume to go", removed).expect("nobody holds it");
        }
        self.world.assert_clean();
        let sim = Arc::clone(&self.sim);
        self.world.run_until("sockets to be closed", |_| sim.open_sockets() == 0);
    }
}

fn follows(kinds: Kinds, seed: u64) {
    let mut stage = Stage::new(kinds, seed);
    for _ in 0..stage.rng.below(3) {
        stage.change_subsystem();
    }
    let wait = stage.rng.one_in(2).then_some(Duration::from_secs(30));
    stage.start(wait);
    if wait.is_some() {
        assert_eq!(stage.attached(), stage.listed, "it has waited");
    }
    for _ in 0..2 + stage.rng.below(12) {
        let pause = Duration::from_millis([0, 3, 200, 3_000][stage.rng.below(4) as usize]);
        stage.world.run_for(pause);
        match stage.rng.below(9) {
            0..3 => stage.change_subsystem(),
            3 => stage.change_listener(),
            4 => stage.change_referral(),
            5 => drop(stage.sim.break_connections(1 + stage.rng.below(100) as usize)),
            6 => drop(stage.sim.silence_some()),
            7 => stage.refuse(),
            _ => {
                let often = if stage.rng.one_in(2) { 2_000 } else { 0 };
                stage.sim.net(|rules| rules.reset_one_in = often);
                stage.sim.rdma(|rules| rules.break_one_in = often);
            }
        }
    }
    stage.finish();
}

#[test]
fn what_is_listed_is_attached() {
    seeds::each("what_is_listed_is_attached", 40, &[], |seed| follows([TransportKind::Tcp; 2], seed));
}

#[test]
fn what_is_listed_is_attached_rdma() {
    seeds::each("what_is_listed_is_attached_rdma", 40, &[], |seed| follows([TransportKind::Rdma; 2], seed));
}

#[test]
fn what_is_listed_is_attached_on_both_transports() {
    let kinds = [TransportKind::Tcp, TransportKind::Rdma];
    seeds::each("what_is_listed_is_attached_on_both_transports", 40, &[], |seed| follows(kinds, seed));
}
