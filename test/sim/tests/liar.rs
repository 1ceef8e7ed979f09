//! The initiator against a target that lies, hangs, refuses and changes: every lie ends in a documented way, within a bounded
//! time, and no block is ever read that is not the last acknowledged write, or one in flight. Writes of lost connections land
//! as late as the specification lets them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bdev::core::runtime::SharedRuntime;
use bdev::core::{BdevEvent, ChannelId, ClientId, Completion, Descriptor, IoRequest, IoStatus, Op};
use initiator::head::NO_PATH;
use initiator::path::{Address, PathState, Site};
use initiator::system::{Attach, Multipath, Settings};
use initiator::{InitiatorError, InitiatorSystem, Part};
use nvmf::host::{OnTimeout, ReconnectPolicy};
use reactor::buffer::PoolConfig;
use reactor::{Buffers, Instant};
use ringstone_sim::liar::{BLOCK, IO_LIES, Liar, Lie, SETUP_LIES, SharedLiar};
use ringstone_sim::load::{Device, Load, LoadConfig, SharedDevice};
use ringstone_sim::target::{NQN, address, host_transports};
use ringstone_sim::{Rng, Sim, World, WorldConfig, seeds};

const BDEV: &str = "Nvme0n1";
const KATO: Duration = Duration::from_secs(2);
const STEP: Duration = Duration::from_secs(2);
/// What is due is done this near to when it is due.
const SOON: Duration = Duration::from_millis(500);
/// How long aborted commands may take, and how long an association is drained, as the initiator's documentation says.
const PATIENCE: Duration = Duration::from_secs(5);
/// When nothing of a lost association can land any more: twice the keep-alive timeout, and what the liar reports as CQT.
const FENCE: Duration = Duration::from_secs(5);

struct Stage {
    sim: Arc<Sim>,
    world: World,
    liar: SharedLiar,
    initiator: Arc<InitiatorSystem>,
    rng: Rng,
}

impl Stage {
    fn new(seed: u64, settings: Settings) -> Stage {
        let (sim, mut rng) = (Sim::new(seed), Rng::new(seed));
        sim.net(|rules| {
            rules.delay_ns = (1_000, 10_000 + rng.below(500_000));
            rules.segment = (1, 1_000 + rng.below(100_000));
        });
        let config = WorldConfig {
            reactors: 1 + rng.below(3) as usize,
            io_pool: 256,
            buffers: PoolConfig { small: 256, medium: 64, large: 32 },
            sleeps: !rng.one_in(4),
            rounds: 6_000_000,
        };
        let mut world = World::new(&sim, config, rng.next_u64());
        let liar = Liar::start(&mut world, address(), 8 + rng.below(40), rng.next_u64());
        for n in 0..world.reactor_count() {
            Part::install(world.context(n));
        }
        let initiator = InitiatorSystem::new(world.system(), host_transports(&world));
        let settings = Settings { kato_ms: KATO.as_millis() as u32, admin_timeout: STEP, ..settings };
        initiator.set_settings(settings).expect("nothing is attached");
        Stage { sim, world, liar, initiator, rng }
    }

    fn attach(&mut self) -> Result<Vec<String>, InitiatorError> {
        let attach = Attach {
            name: "Nvme0".into(),
            address: Address {
                site: Site::tcp(address()),
                subnqn: NQN.into(),
                hostnqn: "nqn.2026-11.io.ringstone:sim-host".into(),
            },
            digests: (false, false),
            multipath: Multipath::Multipath,
            reconnect: ReconnectPolicy::from_seconds(-1, 1, 0).expect("a policy"),
            step_timeout: None,
            mode: None,
            max_bdevs: 8,
            owner: None,
            params: serde_json::Value::Null,
        };
        let initiator = Arc::clone(&self.initiator);
        self.world.block_on("the attachment", async move { initiator.attach(attach).await })
    }

    fn lie(&self, lie: impl Into<Option<Lie>>) {
        self.liar.borrow_mut().lie(lie.into());
    }

    fn lie_one_of(&mut self, lies: &[Lie]) {
        let lie = lies[self.rng.below(lies.len() as u64) as usize];
        self.lie(lie);
    }

    fn now(&mut self) -> Instant {
        self.world.context(0).read_clock()
    }

    fn state(&self) -> PathState {
        self.initiator.groups()[0].paths()[0].view().state
    }

    fn await_state(&mut self, state: PathState) {
        let initiator = Arc::clone(&self.initiator);
        self.world.run_until(&format!("the path to be {}", state.name()), |_| {
            initiator.groups().first().is_some_and(|group| group.paths()[0].view().state == state)
        });
    }

    fn probe(&mut self) -> Probe {
        let nothing = Arc::new(|_: BdevEvent| {});
        let descriptor = self.world.system().open(BDEV, true, "a probe", nothing).expect("it is there");
        let reactor = self.world.reactor_count() - 1;
        let runtime = self.world.runtime(reactor);
        let (client, channel) = {
            let mut runtime = runtime.borrow_mut();
            (runtime.add_client(), runtime.get_channel(descriptor.bdev()).expect("a channel"))
        };
        Probe { runtime, client, channel, reactor, _descriptor: descriptor }
    }

    fn submit(&mut self, probe: &Probe, op: Op, user: u64) {
        let now = self.world.context(probe.reactor).read_clock();
        let mut runtime = probe.runtime.borrow_mut();
        runtime.set_now(now);
        let (lba, blocks) = if op == Op::Reset { (0, 0) } else { (user, 1) };
        let request = IoRequest { op, lba, blocks, bufs: Buffers::heap(blocks as usize * BLOCK), user };
        runtime.submit(probe.channel, probe.client, request);
        runtime.run();
        runtime.flush();
        drop(runtime);
        self.world.wake(probe.reactor);
    }

    /// Waits for `count` operations: how each ended, and when the last did.
    fn ended(&mut self, probe: &Probe, count: usize) -> (Vec<(u64, IoStatus)>, Instant) {
        let mut done: Vec<Completion> = Vec::new();
        self.world.run_until("operations to end", |_| {
            probe.runtime.borrow_mut().take_completions(probe.client, &mut done);
            done.len() >= count
        });
        let at = self.now();
        let mut ended: Vec<_> = done.iter().map(|completion| (completion.user(), completion.status())).collect();
        done.into_iter().for_each(|completion| probe.runtime.borrow_mut().recycle(completion));
        ended.sort_unstable_by_key(|(user, _)| *user);
        (ended, at)
    }

    fn run(&mut self, probe: &Probe, op: Op) -> (IoStatus, Instant) {
        self.submit(probe, op, 1);
        let (ended, at) = self.ended(probe, 1);
        (ended[0].1, at)
    }

    fn finish(mut self) {
        self.lie(None);
        if !self.initiator.groups().is_empty() {
            let initiator = Arc::clone(&self.initiator);
            let detached = async move { initiator.detach("Nvme0", |_| true).await };
            self.world.block_on("the controller to go", detached).expect("nobody holds it");
        }
        assert!(self.world.system().get(BDEV).is_err());
        self.world.assert_clean();
    }
}

struct Probe {
    runtime: SharedRuntime,
    client: ClientId,
    channel: ChannelId,
    reactor: usize,
    _descriptor: Descriptor,
}

impl Probe {
    fn close(self) {
        let mut runtime = self.runtime.borrow_mut();
        runtime.put_channel(self.channel);
        runtime.remove_client(self.client);
    }
}

fn settings() -> Settings {
    Settings { io_timeout: Duration::from_secs(4), retries: None, ..Settings::default() }
}

fn start_load(stage: &mut Stage, config: LoadConfig) -> SharedDevice {
    let blocks = stage.liar.borrow().blocks;
    let device = Device::open(stage.world.system(), BDEV, blocks, false);
    // A compare-and-write of unknown fate is not done a second time.
    device.borrow_mut().faults.aborts = true;
    let (reactor, seed) = (stage.rng.below(stage.world.reactor_count() as u64) as usize, stage.rng.next_u64());
    Load::start(&mut stage.world, reactor, &device, config, seed);
    device
}

/// Lies that were told under a load.
static TOLD: AtomicU64 = AtomicU64::new(0);

/// Lies of every kind, one after the other, under a load that is checked.
fn lies(seed: u64) {
    let on_timeout = [OnTimeout::GiveUp, OnTimeout::Tell][(seed % 2) as usize];
    let mut stage = Stage::new(seed, Settings { on_timeout, ..settings() });
    assert_eq!(stage.attach().expect("it can be attached"), [BDEV]);
    let operations = 500 + stage.rng.below(1500);
    let depth = 1 + stage.rng.below(8) as usize;
    let max_blocks = 1 + stage.rng.below(8);
    let device = start_load(&mut stage, LoadConfig { operations, depth, max_blocks, ..LoadConfig::default() });
    let mut rounds = 0;
    while device.borrow().loads > 0 && rounds < 200 {
        rounds += 1;
        let pause = match stage.rng.below(8) {
            0 => Duration::from_millis(stage.rng.below(8_000)),
            1 => Duration::from_millis(stage.rng.below(300)),
            _ => Duration::from_micros(stage.rng.below(2_000)),
        };
        stage.world.run_for(pause);
        match stage.rng.below(10) {
            0 => stage.lie_one_of(&SETUP_LIES),
            1 => drop(stage.sim.break_connections(1 + stage.rng.below(4) as usize)),
            2 => {
                let wait = Duration::from_millis(stage.rng.below(3_000));
                stage.liar.borrow_mut().listen(false);
                stage.sim.break_connections(100);
                stage.world.run_for(wait);
                stage.liar.borrow_mut().listen(true);
            }
            3 => stage.lie(None),
            _ => stage.lie_one_of(&IO_LIES),
        }
    }
    stage.lie(None);
    TOLD.fetch_add(stage.liar.borrow().told, Ordering::Relaxed);
    stage.world.run_until("the load to end", |_| device.borrow().loads == 0);
    // What the liar may still execute of lost connections is nothing that the host has taken back.
    stage.world.run_for(Duration::from_secs(10));
    let swept = start_load(
        &mut stage,
        LoadConfig { operations: u64::MAX, depth: 1, max_blocks: 8, sweep: true, ..LoadConfig::default() },
    );
    device.borrow_mut().model.settled();
    std::mem::swap(&mut device.borrow_mut().model, &mut swept.borrow_mut().model);
    stage.world.run_until("the sweep to end", |_| swept.borrow().loads == 0);
    stage.finish();
}

#[test]
fn no_lie_is_believed() {
    seeds::each("no_lie_is_believed", 40, &[], lies);
    assert!(TOLD.load(Ordering::Relaxed) > 0 || std::env::var_os("SIM_SEED").is_some(), "no lie found its moment");
    eprintln!("lies told: {}", TOLD.load(Ordering::Relaxed));
}

/// Each lie about one I/O: it succeeds in the end, over another connection where the first is of no use.
fn each_io_lie(seed: u64) {
    let lie = IO_LIES[(seed % IO_LIES.len() as u64) as usize];
    let mut stage = Stage::new(seed, settings());
    stage.attach().expect("it can be attached");
    let probe = stage.probe();
    assert_eq!(stage.run(&probe, Op::Read).0, IoStatus::Success);
    stage.world.run_for(Duration::from_secs(2));
    let before = stage.sim.attempts(address()).len();
    stage.lie(lie);
    let began = stage.now();
    // Whatever it is about, one of these is the moment for it.
    for user in 1..=4 {
        stage.submit(&probe, Op::Read, user);
    }
    stage.submit(&probe, Op::Write { fua: false }, 5);
    let liar = std::rc::Rc::clone(&stage.liar);
    if lie == Lie::HangIo {
        stage.world.run_until("the lie to be told", |_| liar.borrow().told > 0);
        stage.lie(None);
    }
    let (ended, at) = stage.ended(&probe, 5);
    assert!(ended.iter().all(|(_, status)| *status == IoStatus::Success), "{lie:?}: {ended:?}");
    // The longest way: a command's time, the fence, and the connections.
    let bound = Duration::from_secs(4) * 2 + FENCE + STEP * 2 + SOON;
    assert!(at < began + bound, "{lie:?} took {:?}", at.since(began));
    let told = stage.liar.borrow().told > 0;
    let fresh = stage.sim.attempts(address()).len() > before;
    // What the layer above can tell by itself leaves the connection alone, and so do lies that found no moment.
    let stays = matches!(lie, Lie::Fails | Lie::DataTooShort | Lie::NoData | Lie::EarlySuccess);
    stage.world.run_for(Duration::from_secs(10));
    if matches!(lie, Lie::Late | Lie::Duplicate | Lie::HangInResponse) {
        // Their connection ends when the second response comes, or the rest of the first does not.
        assert_eq!(stage.run(&probe, Op::Read).0, IoStatus::Success);
    } else {
        assert!(!told || fresh != stays, "{lie:?}: told {told}, connected again {fresh}");
    }
    assert_eq!(stage.state(), PathState::Enabled);
    probe.close();
    stage.finish();
}

#[test]
fn each_lie_about_io_costs_a_connection_at_most() {
    seeds::each("each_lie_about_io_costs_a_connection_at_most", 60, &[], each_io_lie);
}

/// Connections that are not made: an attachment ends in its time and says why, and leaves nothing behind.
fn setup(seed: u64) {
    let lie = SETUP_LIES[(seed % SETUP_LIES.len() as u64) as usize];
    let connect_timeout = seed.is_multiple_of(2).then_some(Duration::from_millis(300));
    let mut stage = Stage::new(seed, Settings { connect_timeout, ..settings() });
    stage.lie(lie);
    let began = stage.now();
    let attached = stage.attach();
    let took = stage.now().since(began);
    let (words, limit) = match lie {
        Lie::HangAfterAccept | Lie::HangInIcResp => ("setting up a connection", connect_timeout.unwrap_or(STEP)),
        Lie::HangAtAdminConnect => ("Connect of the admin queue", STEP),
        Lie::NeverReady => ("becoming ready", STEP),
        // Identify, or the Keep Alive beside it.
        Lie::HangAtIdentify | Lie::HangInIdentify => ("the controller does not answer", STEP),
        Lie::RefuseAdmin => ("does not allow this host", Duration::ZERO),
        _ => ("", Duration::ZERO),
    };
    if words.is_empty() {
        // I/O queues are connected when they are used: the controller is had anew then.
        assert_eq!(attached.expect("the admin queue is well"), [BDEV]);
        let probe = stage.probe();
        assert_eq!(stage.run(&probe, Op::Read).0, IoStatus::Success);
        assert_eq!((stage.liar.borrow().told, stage.sim.attempts(address()).len() > 2), (1, true));
        probe.close();
    } else {
        let error = attached.expect_err("it is not connected").to_string();
        assert!(error.contains(words), "{lie:?}: {error}");
        assert!(took >= limit && took < limit + SOON, "{lie:?}: {took:?} instead of {limit:?}");
        assert!(stage.initiator.groups().is_empty());
        stage.lie(None);
        assert_eq!(stage.attach().expect("now it can"), [BDEV]);
    }
    stage.finish();
}

#[test]
fn a_connection_that_is_not_made_is_given_up_in_time() {
    seeds::each("a_connection_that_is_not_made_is_given_up_in_time", 36, &[], setup);
}

/// A target that hangs, in one of several ways, is detached from in bounded time; and so is a device on it reset.
fn detach(seed: u64) {
    // No command is ever too old, and a lost controller is waited for without end: nothing else would end these.
    let settings = Settings { on_timeout: OnTimeout::Nothing, ..settings() };
    let mut stage = Stage::new(seed, settings);
    stage.attach().expect("it can be attached");
    let probe = stage.probe();
    assert_eq!(stage.run(&probe, Op::Read).0, IoStatus::Success);
    stage.lie(Lie::HangIo);
    let with_write = stage.rng.one_in(2);
    stage.submit(&probe, if with_write { Op::Write { fua: false } } else { Op::Read }, 2);
    stage.submit(&probe, Op::Read, 3);
    let wait = Duration::from_millis(stage.rng.below(4_000));
    stage.world.run_for(wait);
    // What writes ends when it can no longer land.
    let fence = if with_write { FENCE } else { Duration::ZERO };
    let bound = match stage.rng.below(4) {
        // Commands hang, the admin queue does not: Abort is of no use, and the path is reset.
        0 => PATIENCE * 2 + STEP + fence,
        // Nothing is answered any more: the keep-alive finds it out.
        1 => {
            while stage.sim.silence_some() > 0 && stage.rng.one_in(8) {}
            PATIENCE * 2 + KATO * 2 + STEP + fence
        }
        // The target is gone.
        2 => {
            stage.liar.borrow_mut().listen(false);
            stage.sim.break_connections(100);
            fence
        }
        // It is gone, and has been for long: what writes waits for nothing but a path.
        _ => {
            stage.liar.borrow_mut().listen(false);
            stage.sim.break_connections(100);
            stage.world.run_for(FENCE + PATIENCE);
            Duration::ZERO
        }
    };
    let began = stage.now();
    if stage.rng.one_in(3) {
        stage.submit(&probe, Op::Reset, 4);
        let (ended, at) = stage.ended(&probe, 3);
        assert_eq!(ended, [(2, IoStatus::Aborted), (3, IoStatus::Aborted), (4, IoStatus::Success)]);
        assert!(at < began + bound + SOON, "reset: {:?} instead of {bound:?}", at.since(began));
        probe.close();
        return stage.finish();
    }
    let initiator = Arc::clone(&stage.initiator);
    let detaching = stage.world.spawn(async move { initiator.detach("Nvme0", |_| true).await });
    let (ended, at) = stage.ended(&probe, 2);
    assert!(ended.iter().all(|(_, status)| matches!(status, IoStatus::Aborted | IoStatus::NoDevice)), "{ended:?}");
    assert!(at < began + bound + SOON, "detach: {:?} instead of {bound:?}", at.since(began));
    probe.close();
    let initiator = Arc::clone(&stage.initiator);
    stage.world.run_until("the controller to be gone", |_| initiator.groups().is_empty());
    // A shutdown that is not answered is not waited for without end.
    let gone = stage.now();
    assert!(gone < at + PATIENCE + STEP + SOON, "{:?} after the last I/O", gone.since(at));
    stage.world.run_until("the answer", |_| detaching.take().is_some());
    stage.finish();
}

#[test]
fn detaching_from_and_resetting_what_hangs_ends_in_bounded_time() {
    seeds::each("detaching_from_and_resetting_what_hangs_ends_in_bounded_time", 60, &[], detach);
}

/// A namespace that comes back as another one gets none of the first one's I/O.
fn identity(seed: u64) {
    const OTHER: [u8; 16] = [2; 16];
    let mut stage = Stage::new(seed, settings());
    stage.attach().expect("it can be attached");
    let uuid = |stage: &Stage| stage.world.system().get(BDEV).map(|info| *info.uuid().as_bytes());
    assert_eq!(uuid(&stage).expect("it is there"), [1; 16]);
    let config = LoadConfig { operations: u64::MAX, depth: 8, max_blocks: 4, ..LoadConfig::default() };
    let device = start_load(&mut stage, config);
    let wait = Duration::from_micros(stage.rng.below(20_000));
    stage.world.run_for(wait);
    match stage.rng.below(3) {
        // While nobody is connected.
        0 | 1 => {
            stage.liar.borrow_mut().listen(false);
            stage.sim.break_connections(100);
            let wait = Duration::from_millis(stage.rng.below(20_000));
            stage.world.run_for(wait);
            stage.liar.borrow_mut().uuid = Some(OTHER);
            stage.liar.borrow_mut().listen(true);
            stage.world.run_until("the load to lose its device", |_| device.borrow().loads == 0);
            assert_eq!(stage.liar.borrow().written(OTHER), 0, "writes of one namespace landed on another");
        }
        // It goes, which the host is told.
        _ => {
            stage.liar.borrow_mut().uuid = None;
            stage.liar.borrow_mut().namespaces_changed();
            // What is refused as unknown in between ends as that.
            device.borrow_mut().faults.base_goes = true;
            device.borrow_mut().faults.unknown_namespace = true;
            stage.world.run_until("the load to lose its device", |_| device.borrow().loads == 0);
            let system = Arc::clone(stage.world.system());
            stage.world.run_until("the bdev to go", |_| system.get(BDEV).is_err());
            stage.liar.borrow_mut().uuid = Some(OTHER);
            stage.liar.borrow_mut().namespaces_changed();
        }
    }
    drop(device);
    let system = Arc::clone(stage.world.system());
    stage.world.run_until("the other one to be a bdev", |_| {
        system.get(BDEV).is_ok_and(|info| *info.uuid().as_bytes() == OTHER)
    });
    let probe = stage.probe();
    assert_eq!(stage.run(&probe, Op::Write { fua: false }).0, IoStatus::Success);
    probe.close();
    stage.finish();
}

#[test]
fn a_namespace_that_comes_back_as_another_gets_nothing_of_the_first() {
    seeds::each("a_namespace_that_comes_back_as_another_gets_nothing_of_the_first", 30, &[], identity);
}

/// `bdev_retry_count`: 0 neither repeats nor waits, -1 repeats for ever.
fn retries(seed: u64) {
    let retries = [Some(0), Some(2), None][(seed % 3) as usize];
    let mut stage = Stage::new(seed, Settings { retries, ..settings() });
    stage.attach().expect("it can be attached");
    let probe = stage.probe();
    let (first, _) = stage.run(&probe, Op::Read);
    assert_eq!(first, IoStatus::Success, "a queue that is being connected is waited for");
    let error = IoStatus::Nvme { sct: 0, sc: 6, dnr: false };
    for failures in [1, 2, 3, 30] {
        for op in [Op::Read, Op::Write { fua: false }] {
            let told = stage.liar.borrow().told;
            stage.liar.borrow_mut().fail(failures);
            let (status, _) = stage.run(&probe, op);
            let enough = retries.is_none_or(|retries| failures <= u64::from(retries));
            assert_eq!(status, if enough { IoStatus::Success } else { error }, "{retries:?} of {failures}");
            let tries = stage.liar.borrow().told - told;
            assert_eq!(tries, retries.map_or(failures, |retries| failures.min(u64::from(retries) + 1)));
            stage.liar.borrow_mut().fail(0);
        }
    }
    // Without a path.
    stage.liar.borrow_mut().listen(false);
    stage.sim.break_connections(100);
    stage.await_state(PathState::Reconnecting);
    stage.world.run_for(SOON);
    let began = stage.now();
    stage.submit(&probe, Op::Read, 1);
    if retries == Some(0) {
        let (ended, at) = stage.ended(&probe, 1);
        assert_eq!((ended[0].1, at < began + SOON), (NO_PATH, true));
        stage.liar.borrow_mut().listen(true);
    } else {
        stage.world.run_for(Duration::from_secs(60));
        stage.liar.borrow_mut().listen(true);
        let (ended, at) = stage.ended(&probe, 1);
        assert_eq!((ended[0].1, at > began + Duration::from_secs(60)), (IoStatus::Success, true));
    }
    probe.close();
    stage.finish();
}

#[test]
fn what_fails_is_sent_again_as_often_as_it_may_be() {
    seeds::each("what_fails_is_sent_again_as_often_as_it_may_be", 12, &[], retries);
}

/// Reset, disable and enable against a target that is well, gone and back: each answers in bounded time, and in SPDK's words.
fn administration(seed: u64) {
    use initiator::home::Denial;
    let mut stage = Stage::new(seed, settings());
    stage.attach().expect("it can be attached");
    let call = |stage: &mut Stage, what: &'static str| {
        let initiator = Arc::clone(&stage.initiator);
        let began = stage.now();
        let result = stage.world.block_on(what, async move {
            match what {
                "reset" => initiator.reset("Nvme0", None).await,
                "enable" => initiator.enable("Nvme0", None).await,
                _ => initiator.disable("Nvme0", None).await,
            }
        });
        let took = stage.now().since(began);
        assert!(took < PATIENCE + STEP * 2 + SOON, "{what} took {took:?}");
        match result {
            Ok(()) => Ok(()),
            Err(InitiatorError::Refused { why, .. }) => Err(why),
            Err(other) => panic!("{other}"),
        }
    };
    let already = |result: Result<(), Denial>| matches!(result, Err(Denial::Already(_)));
    let failed = |result: Result<(), Denial>| matches!(result, Err(Denial::Failed(_)));
    assert!(already(call(&mut stage, "enable")), "it is not disabled");
    assert_eq!(call(&mut stage, "reset"), Ok(()));
    assert_eq!(stage.state(), PathState::Enabled);
    assert_eq!(call(&mut stage, "disable"), Ok(()));
    assert_eq!(stage.state(), PathState::Disabled);
    assert!(already(call(&mut stage, "disable")) && already(call(&mut stage, "reset")));
    // I/O waits for it to be enabled.
    let probe = stage.probe();
    stage.submit(&probe, Op::Write { fua: false }, 1);
    stage.world.run_for(Duration::from_secs(100));
    assert_eq!(stage.state(), PathState::Disabled);
    assert_eq!(call(&mut stage, "enable"), Ok(()));
    assert_eq!(stage.ended(&probe, 1).0, [(1, IoStatus::Success)]);
    // Gone: what was asked for is tried once before the answer, and goes on.
    stage.liar.borrow_mut().listen(false);
    assert!(failed(call(&mut stage, "reset")));
    assert_eq!(stage.state(), PathState::Reconnecting);
    assert!(failed(call(&mut stage, "reset")), "again, at once");
    assert_eq!(call(&mut stage, "disable"), Ok(()));
    assert!(failed(call(&mut stage, "enable")));
    stage.liar.borrow_mut().listen(true);
    stage.await_state(PathState::Enabled);
    assert_eq!(stage.run(&probe, Op::Read).0, IoStatus::Success);
    // It hangs while it is to be reset, or disabled.
    stage.lie(Lie::HangIo);
    stage.submit(&probe, Op::Read, 1);
    stage.world.run_for(SOON);
    let what = if stage.rng.one_in(2) { "reset" } else { "disable" };
    assert_eq!(call(&mut stage, what), Ok(()));
    stage.lie(None);
    if what == "disable" {
        assert_eq!(call(&mut stage, "enable"), Ok(()));
    }
    assert_eq!(stage.ended(&probe, 1).0, [(1, IoStatus::Success)]);
    probe.close();
    stage.finish();
}

#[test]
fn reset_disable_and_enable_answer_in_time() {
    seeds::each("reset_disable_and_enable_answer_in_time", 10, &[], administration);
}
