//! A world for tests of the control plane: an executor with a clock of its own that polls in an order drawn from a seed,
//! reactors that answer when they like, a transport without sockets, devices without data.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context as Task, Poll, Wake, Waker};
use std::time::Duration;

use bdev::core::registry::ClaimState;
use bdev::core::system::Executor;
use bdev::core::{Bdev, BdevInfo, BdevSystem, ChannelCx, Geometry, IoChannel, NewBdev, OpSet};
use futures_channel::oneshot;
use futures_util::future::BoxFuture;
use reactor::platform::OsPlatform;
use reactor::{Context, Instant, PollerId, ReactorId};
use schema::{ConfigEntry, RpcError};
use serde_json::Value;
use uuid::Uuid;

use super::{MoveError, NvmfSystem, PollGroupStats, QpairInfo, QueueName, Reactors, Stopping};
use crate::target::shared::ControllerTable;
use crate::target::transport::{Acceptor, Incoming, Transport};
use crate::target::view::{ListenAddress, NamespaceView, TargetView, TransportKind, TransportOptions};

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `bound`, without it.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[derive(Default)]
struct Clock {
    now: Duration,
    alarms: Vec<(Duration, oneshot::Sender<()>)>,
}

/// Runs tasks on one thread. When nothing else moves, its clock does.
#[derive(Default)]
pub struct TestExecutor {
    spawned: Mutex<Vec<BoxFuture<'static, ()>>>,
    clock: Mutex<Clock>,
    woken: Arc<Woken>,
}

impl Executor for TestExecutor {
    fn spawn(&self, task: BoxFuture<'static, ()>) {
        lock(&self.spawned).push(task);
        self.woken.0.store(true, Ordering::SeqCst);
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        let (alarm, rings) = oneshot::channel();
        let mut clock = lock(&self.clock);
        let at = clock.now + duration;
        clock.alarms.push((at, alarm));
        Box::pin(async move {
            let _ = rings.await;
        })
    }
}

impl TestExecutor {
    pub fn now(&self) -> Duration {
        lock(&self.clock).now
    }

    /// Moves the clock to the next alarm that somebody waits for.
    fn advance(&self) -> bool {
        let mut clock = lock(&self.clock);
        clock.alarms.retain(|(_, alarm)| !alarm.is_canceled());
        let Some(next) = clock.alarms.iter().map(|(at, _)| *at).min() else { return false };
        clock.now = next;
        let (due, later) = std::mem::take(&mut clock.alarms).into_iter().partition(|(at, _)| *at <= next);
        clock.alarms = later;
        let due: Vec<(Duration, oneshot::Sender<()>)> = due;
        drop(clock);
        for (_, alarm) in due {
            // Whoever waited may be gone.
            let _ = alarm.send(());
        }
        true
    }
}

/// When the reactors say that a view has replaced those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answers {
    /// In an order drawn from the seed, some time later.
    Late,
    /// Not before they are told to.
    Held,
}

struct Applied {
    gone: BTreeSet<u64>,
    reply: oneshot::Sender<()>,
}

#[derive(Default)]
struct FakeState {
    view: Arc<TargetView>,
    /// Namespaces that reactors use, by incarnation.
    used: BTreeMap<u64, Arc<NamespaceView>>,
    pending: Vec<Applied>,
    listeners: BTreeMap<ListenAddress, Box<dyn Acceptor>>,
    qpairs: Vec<QpairInfo>,
}

/// Reactors without threads. They check that views come in order and that what they use is open.
pub struct FakeReactors {
    state: Arc<Mutex<FakeState>>,
    answers: Mutex<Answers>,
}

impl Reactors for FakeReactors {
    fn apply(&self, view: Arc<TargetView>) -> BoxFuture<'static, Result<(), Stopping>> {
        let state = Arc::clone(&self.state);
        Box::pin(async move {
            let applied = {
                let mut state = lock(&state);
                assert!(view.generation > state.view.generation, "views come in their order");
                let now: BTreeMap<u64, Arc<NamespaceView>> = view
                    .subsystems
                    .values()
                    .flat_map(|subsystem| subsystem.namespaces.values())
                    .map(|namespace| (namespace.incarnation, Arc::clone(namespace)))
                    .collect();
                let before = state.view.subsystems.values().flat_map(|subsystem| subsystem.namespaces.values());
                let gone = before.map(|namespace| namespace.incarnation).filter(|id| !now.contains_key(id)).collect();
                state.used.extend(now);
                state.view = view;
                let (reply, applied) = oneshot::channel();
                state.pending.push(Applied { gone, reply });
                applied
            };
            applied.await.map_err(|_| Stopping)
        })
    }

    fn add_listener(
        &self,
        address: ListenAddress,
        acceptor: Box<dyn Acceptor>,
    ) -> BoxFuture<'static, Result<(), Stopping>> {
        let state = Arc::clone(&self.state);
        Box::pin(async move {
            yield_once().await;
            assert!(lock(&state).listeners.insert(address, acceptor).is_none(), "an address is opened once");
            yield_once().await;
            Ok(())
        })
    }

    fn remove_listener(&self, address: &ListenAddress) -> BoxFuture<'static, Result<(), Stopping>> {
        let (state, address) = (Arc::clone(&self.state), address.clone());
        Box::pin(async move {
            yield_once().await;
            let acceptor = lock(&state).listeners.remove(&address);
            assert!(acceptor.is_some(), "only what is open is closed");
            yield_once().await;
            Ok(())
        })
    }

    fn qpairs(&self) -> BoxFuture<'static, Result<Vec<QpairInfo>, Stopping>> {
        let qpairs = lock(&self.state).qpairs.clone();
        Box::pin(async move { Ok(qpairs) })
    }

    fn loads(&self, _: Instant) -> Vec<u32> {
        vec![250, 0]
    }

    fn move_qpair(
        &self,
        name: QueueName,
        from: ReactorId,
        to: ReactorId,
    ) -> BoxFuture<'static, Result<Result<(), MoveError>, Stopping>> {
        let mut state = lock(&self.state);
        let found = state.qpairs.iter_mut().find(|qpair| qpair.name() == name && qpair.reactor == from);
        let moved = match found {
            None => Err(MoveError::NoQueue),
            Some(_) if to.0 > 1 => Err(MoveError::NoReactor),
            Some(qpair) => {
                qpair.reactor = to;
                Ok(())
            }
        };
        Box::pin(async move { Ok(moved) })
    }

    fn stats(&self) -> BoxFuture<'static, Result<Vec<PollGroupStats>, Stopping>> {
        let stats = |id| PollGroupStats {
            reactor: ReactorId(id),
            admin_qpairs: 1,
            io_qpairs: 2,
            current_admin_qpairs: 3,
            current_io_qpairs: 4,
            current_unassociated_qpairs: 5,
            pending_bdev_io: 6,
            completed_nvme_io: 7,
            moved_in: 8,
            moved_out: 9,
            transports: vec![TransportKind::Tcp],
            groups: Vec::new(),
        };
        Box::pin(async move { Ok(vec![stats(0), stats(1)]) })
    }
}

async fn yield_once() {
    let mut yielded = false;
    std::future::poll_fn(|task: &mut Task<'_>| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        task.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

impl FakeReactors {
    pub fn answer(&self, answers: Answers) {
        *lock(&self.answers) = answers;
    }

    pub fn view(&self) -> Arc<TargetView> {
        Arc::clone(&lock(&self.state).view)
    }

    pub fn set_qpairs(&self, qpairs: Vec<QpairInfo>) {
        lock(&self.state).qpairs = qpairs;
    }

    pub fn listening(&self) -> BTreeSet<ListenAddress> {
        lock(&self.state).listeners.keys().cloned().collect()
    }

    /// Views that were handed over and not answered.
    pub fn pending(&self) -> usize {
        lock(&self.state).pending.len()
    }

    /// Answers one view.
    fn step(&self, rng: &mut Rng) -> bool {
        let mut state = lock(&self.state);
        if *lock(&self.answers) == Answers::Held || state.pending.is_empty() {
            return false;
        }
        let at = rng.below(state.pending.len());
        let Applied { gone, reply } = state.pending.swap_remove(at);
        state.used.retain(|id, _| !gone.contains(id));
        drop(state);
        let _ = reply.send(());
        true
    }

    /// The reactors end without answering.
    pub fn stop(&self) {
        let mut state = lock(&self.state);
        state.pending.clear();
        state.used.clear();
    }

    fn used(&self) -> Vec<Arc<BdevInfo>> {
        lock(&self.state).used.values().map(|namespace| Arc::clone(&namespace.bdev)).collect()
    }
}

/// Addresses that are bound, and those that cannot be.
#[derive(Default)]
pub struct FakeNetwork {
    bound: Mutex<BTreeSet<SocketAddr>>,
    refused: Mutex<BTreeMap<SocketAddr, i32>>,
}

impl FakeNetwork {
    /// Lets the host refuse an address with an error number.
    pub fn refuse(&self, address: SocketAddr, errno: i32) {
        lock(&self.refused).insert(address, errno);
    }

    pub fn bound(&self) -> BTreeSet<SocketAddr> {
        lock(&self.bound).clone()
    }
}

struct FakeTransport(Arc<FakeNetwork>);

impl Transport for FakeTransport {
    fn kind(&self) -> TransportKind {
        TransportKind::Tcp
    }

    fn listen(&self, address: &ListenAddress, _: &TransportOptions) -> io::Result<Box<dyn Acceptor>> {
        let address = address.socket_addr();
        if let Some(&errno) = lock(&self.0.refused).get(&address) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        if !lock(&self.0.bound).insert(address) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        Ok(Box::new(FakeAcceptor { address, network: Arc::clone(&self.0) }))
    }
}

struct FakeAcceptor {
    address: SocketAddr,
    network: Arc<FakeNetwork>,
}

impl Acceptor for FakeAcceptor {
    fn accept(&mut self, _: &mut Context, _: usize) -> Vec<Box<dyn Incoming>> {
        Vec::new()
    }

    fn watch(&mut self, _: &mut Context, _: PollerId, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn close(&mut self, _: &mut Context) {}
}

impl Drop for FakeAcceptor {
    fn drop(&mut self) {
        lock(&self.network.bound).remove(&self.address);
    }
}

/// A device that only has a size.
struct TestBdev(Mutex<Geometry>);

impl Bdev for TestBdev {
    fn product_name(&self) -> &'static str {
        "Test disk"
    }

    fn geometry(&self) -> Geometry {
        *lock(&self.0)
    }

    fn native_ops(&self) -> OpSet {
        OpSet::default()
    }

    fn open_channel(&self, _: &mut ChannelCx<'_>) -> io::Result<Box<dyn IoChannel>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn config(&self, _: &BdevInfo) -> Vec<ConfigEntry> {
        Vec::new()
    }
}

type Sizes = Arc<Mutex<BTreeMap<String, Arc<TestBdev>>>>;

/// A target and all that it stands on.
pub struct World {
    pub executor: Arc<TestExecutor>,
    pub bdevs: Arc<BdevSystem>,
    pub reactors: Arc<FakeReactors>,
    pub network: Arc<FakeNetwork>,
    pub controllers: Arc<ControllerTable>,
    pub system: Arc<NvmfSystem>,
    sizes: Sizes,
    rng: Mutex<Rng>,
    tasks: Mutex<Vec<BoxFuture<'static, ()>>>,
}

impl World {
    pub fn new(seed: u64) -> World {
        let executor = Arc::new(TestExecutor::default());
        let platform = Arc::new(OsPlatform::default());
        let bdevs = BdevSystem::new(Vec::new(), platform, Arc::clone(&executor) as Arc<dyn Executor>);
        let reactors = Arc::new(FakeReactors { state: Arc::default(), answers: Mutex::new(Answers::Late) });
        let network = Arc::new(FakeNetwork::default());
        let controllers = Arc::new(ControllerTable::default());
        let transport = Arc::new(FakeTransport(Arc::clone(&network)));
        let (table, groups) = (Arc::clone(&controllers), Arc::clone(&reactors) as Arc<dyn Reactors>);
        let system = NvmfSystem::new(Arc::clone(&bdevs), table, vec![transport], groups);
        World {
            executor,
            bdevs,
            reactors,
            network,
            controllers,
            system,
            sizes: Arc::default(),
            rng: Mutex::new(Rng(seed)),
            tasks: Mutex::default(),
        }
    }

    /// Runs everything until `main` has ended.
    ///
    /// # Panics
    /// If nothing moves any more before.
    pub fn run<T>(&self, main: impl Future<Output = T>) -> T {
        let mut main = pin!(main);
        loop {
            let waker = Waker::from(Arc::clone(&self.executor.woken));
            if let Poll::Ready(value) = main.as_mut().poll(&mut Task::from_waker(&waker)) {
                return value;
            }
            assert!(self.turn() || self.executor.advance(), "nothing moves any more");
        }
    }

    /// Runs everything until nothing moves without the clock.
    pub fn settle(&self) {
        while self.turn() {}
    }

    /// Polls every task once, in a random order, and lets the reactors do something. Tells whether anything moved.
    fn turn(&self) -> bool {
        let mut rng = lock(&self.rng);
        self.executor.woken.0.store(false, Ordering::SeqCst);
        let mut tasks = lock(&self.tasks);
        tasks.append(&mut lock(&self.executor.spawned));
        let waker = Waker::from(Arc::clone(&self.executor.woken));
        for left in (1..=tasks.len()).rev() {
            let last = left - 1;
            tasks.swap(rng.below(left), last);
            let mut task = std::mem::replace(&mut tasks[last], Box::pin(std::future::ready(())));
            if task.as_mut().poll(&mut Task::from_waker(&waker)).is_pending() {
                tasks[last] = task;
            } else {
                drop(tasks.swap_remove(last));
            }
            self.check_open();
        }
        drop(tasks);
        let answered = rng.below(3) == 0 && self.reactors.step(&mut rng);
        let more = !lock(&self.executor.spawned).is_empty() || self.executor.woken.0.load(Ordering::SeqCst);
        // Late answers come in the end, when all waits for them.
        answered || more || self.reactors.step(&mut rng)
    }

    /// Everything that reactors use is claimed.
    fn check_open(&self) {
        for bdev in self.reactors.used() {
            assert!(self.claim(&bdev).kind.is_some(), "{} was closed while reactors use it", bdev.name());
        }
    }

    pub fn claim(&self, bdev: &BdevInfo) -> ClaimState {
        self.bdevs.claim_state(bdev)
    }

    /// Makes a device of `blocks` blocks of 512 bytes.
    pub fn add_bdev(&self, name: &str, blocks: u64) -> Arc<BdevInfo> {
        self.run(self.adding_bdev(name, None, blocks)).expect("the name is new")
    }

    pub fn add_bdev_with_uuid(&self, name: &str, uuid: Uuid) -> Arc<BdevInfo> {
        self.run(self.adding_bdev(name, Some(uuid), 1024)).expect("the name is new")
    }

    pub fn adding_bdev(
        &self,
        name: &str,
        uuid: Option<Uuid>,
        blocks: u64,
    ) -> impl Future<Output = Result<Arc<BdevInfo>, bdev::core::BdevError>> + Send + 'static {
        let (bdevs, sizes, name) = (Arc::clone(&self.bdevs), Arc::clone(&self.sizes), name.to_owned());
        async move {
            let device = Arc::new(TestBdev(Mutex::new(Geometry::new(512, blocks))));
            let new = NewBdev { name: name.clone(), uuid, aliases: Vec::new(), device: Arc::clone(&device) as _ };
            let info = bdevs.register(new).await?;
            lock(&sizes).insert(name, device);
            Ok(info)
        }
    }

    /// Changes a device's size and tells everybody.
    pub fn resizing(&self, name: &str, blocks: u64) -> impl Future<Output = ()> + Send + 'static {
        let (bdevs, sizes, name) = (Arc::clone(&self.bdevs), Arc::clone(&self.sizes), name.to_owned());
        async move {
            let Ok(info) = bdevs.get(&name) else { return };
            if let Some(device) = lock(&sizes).get(&name) {
                lock(&device.0).num_blocks = blocks;
            }
            bdevs.resized(&info).await.expect("reactors do not stop");
        }
    }

    /// A call that has not begun, with the checks that the table makes.
    pub fn calling(&self, name: &str, params: Value) -> impl Future<Output = Result<Value, RpcError>> + Send + 'static {
        let method = crate::rpc::methods().iter().find(|method| method.spec.name == name);
        let method = method.unwrap_or_else(|| panic!("there is no method {name}"));
        let (system, params) = (Arc::clone(&self.system), schema::validate(&method.spec, Some(params)));
        async move {
            let called = (method.handler)(system, params?).await;
            called.map_err(|error| error.in_method(method.spec.name))
        }
    }

    pub fn call(&self, name: &str, params: Value) -> Result<Value, RpcError> {
        self.run(self.calling(name, params))
    }
}
