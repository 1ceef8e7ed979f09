//! What all reactors know of a path: one address of one subsystem.
//!
//! The path's [`home`](crate::home) publishes; everybody else reads. Readers look at the generation first, so that a step
//! of a reactor costs them one load.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nvmf::host::{Namespace, QueueParams};
use nvmf::spec::identify::IdentifyController;
use nvmf::spec::log::AnaState;
pub use nvmf::target::view::TransportKind;
use reactor::ReactorId;

/// A port of a target: a transport, and an address on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site {
    /// The transport.
    pub trtype: TransportKind,
    /// The address.
    pub socket: SocketAddr,
}

impl Site {
    /// A port on TCP.
    pub fn tcp(socket: SocketAddr) -> Site {
        Site { trtype: TransportKind::Tcp, socket }
    }

    /// A port on RDMA.
    pub fn rdma(socket: SocketAddr) -> Site {
        Site { trtype: TransportKind::Rdma, socket }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.trtype {
            TransportKind::Tcp => self.socket.fmt(f),
            TransportKind::Rdma => write!(f, "{} over RDMA", self.socket),
        }
    }
}

/// Where a path leads, and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Where the controller is.
    pub site: Site,
    /// NQN of the subsystem.
    pub subnqn: String,
    /// NQN of this host.
    pub hostnqn: String,
}

impl Address {
    /// Address family in the words of RPCs.
    pub fn family(&self) -> &'static str {
        if self.site.socket.is_ipv4() { "IPv4" } else { "IPv6" }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.subnqn, self.site)
    }
}

/// What a path is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PathState {
    /// It is being connected for the first time.
    #[default]
    Connecting,
    /// It works.
    Enabled,
    /// It is being ended in order to be connected again.
    Resetting,
    /// It is lost and connected again from time to time.
    Reconnecting,
    /// It was disabled, and waits to be enabled.
    Disabled,
    /// It is lost for good, or being detached.
    Failed,
}

impl PathState {
    /// The name that RPCs show.
    pub fn name(self) -> &'static str {
        match self {
            PathState::Connecting => "connecting",
            PathState::Enabled => "enabled",
            PathState::Resetting => "resetting",
            PathState::Reconnecting => "reconnect_is_delayed",
            PathState::Disabled => "disabled",
            PathState::Failed => "failed",
        }
    }
}

/// One life of a path's controller: what it takes to have queues of it.
#[derive(Debug)]
pub struct Association {
    /// Counts the associations of the path, from 1.
    pub number: u64,
    /// The controller.
    pub cntlid: u16,
    /// What to connect an I/O queue with, by reactor; `None` where the controller has too few.
    pub queues: Vec<QueueParams>,
    /// Queues of it that are open on any reactor.
    pub open: AtomicU32,
}

/// What is published.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// What the path is doing.
    pub state: PathState,
    /// Which of its ports is connected, or tried; `None` before the first attempt.
    pub site: Option<Site>,
    /// The association that takes commands.
    pub association: Option<Arc<Association>>,
    /// Number of the association that takes no more commands, but ends the ones that it has.
    pub drains: Option<u64>,
    /// Associations up to this number can execute nothing any more.
    pub fenced: u64,
    /// I/O does not wait for this path any more.
    pub fails_io: bool,
    /// Access states, by NSID. What is missing is optimized.
    pub ana: BTreeMap<u32, AnaState>,
    /// How long an access state may be in transition, seconds.
    pub anatt_s: u8,
    /// The namespaces, as of the last time that the path worked.
    pub namespaces: BTreeMap<u32, Namespace>,
    /// Identify Controller, likewise.
    pub identity: Option<Arc<IdentifyController>>,
    /// The longest payload of one command, bytes, likewise.
    pub max_io_bytes: Option<u64>,
    /// Why it was lost last.
    pub error: Option<String>,
}

/// Told that something was published; must not block.
pub type OnNews = Box<dyn Fn() + Send + Sync>;

/// A command that is to be aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AbortRequest {
    /// Number of its association.
    pub number: u64,
    /// Its queue.
    pub qid: u16,
    /// Its identifier.
    pub cid: u16,
}

/// Commands of a path that wait for their Abort; more are not aborted.
const MAX_ABORTS: usize = 256;

/// A path.
pub struct Path {
    /// Names it for as long as the process runs.
    pub id: u64,
    /// Where it leads: the port that it began with.
    pub address: Address,
    /// The reactor with its admin queue.
    pub home: ReactorId,
    /// Number of the association that a reactor has found broken.
    pub broken: AtomicU64,
    /// It is being detached: its namespaces are not to become bdevs.
    pub leaving: AtomicBool,
    /// The ports at which it can be had: one of them is used, the others when that one fails.
    ports: Mutex<Vec<Site>>,
    /// Commands that reactors want to be aborted.
    aborts: Mutex<VecDeque<AbortRequest>>,
    /// How many, so that nobody takes the lock to see that there are none.
    abort_count: AtomicUsize,
    generation: AtomicU64,
    view: Mutex<Arc<View>>,
    on_news: OnNews,
}

impl Path {
    /// A path that nothing is known of.
    pub fn new(id: u64, address: Address, home: ReactorId, on_news: OnNews) -> Arc<Path> {
        Arc::new(Path {
            id,
            ports: Mutex::new(vec![address.site]),
            address,
            home,
            broken: AtomicU64::new(0),
            leaving: AtomicBool::new(false),
            aborts: Mutex::default(),
            abort_count: AtomicUsize::new(0),
            generation: AtomicU64::new(0),
            view: Mutex::default(),
            on_news,
        })
    }

    fn lock_ports(&self) -> MutexGuard<'_, Vec<Site>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ports at which it can be had, as addresses: the one that is used or tried first.
    pub fn addresses(&self) -> Vec<Address> {
        let used = self.view().site;
        let mut ports = self.lock_ports().clone();
        ports.sort_by_key(|port| Some(*port) != used);
        ports.into_iter().map(|site| Address { site, ..self.address.clone() }).collect()
    }

    /// Another port at which it can be had comes.
    pub(crate) fn add_port(&self, port: Site) {
        self.lock_ports().push(port);
    }

    /// A port goes.
    pub(crate) fn remove_port(&self, port: Site) {
        self.lock_ports().retain(|known| *known != port);
    }

    fn aborts(&self) -> MutexGuard<'_, VecDeque<AbortRequest>> {
        self.aborts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks its home to abort a command; `false` if too many are to be aborted.
    pub(crate) fn ask_abort(&self, request: AbortRequest) -> bool {
        let mut aborts = self.aborts();
        let room = aborts.len() < MAX_ABORTS;
        if room {
            aborts.push_back(request);
            self.abort_count.store(aborts.len(), Ordering::Release);
        }
        room
    }

    /// The next command to abort.
    pub(crate) fn next_abort(&self) -> Option<AbortRequest> {
        if !self.has_aborts() {
            return None;
        }
        let mut aborts = self.aborts();
        let next = aborts.pop_front();
        self.abort_count.store(aborts.len(), Ordering::Release);
        next
    }

    /// Whether there is one.
    pub(crate) fn has_aborts(&self) -> bool {
        self.abort_count.load(Ordering::Acquire) > 0
    }

    /// Whether it can be had at that port of that subsystem.
    pub fn is_at(&self, address: &Address) -> bool {
        self.address.subnqn == address.subnqn && self.lock_ports().contains(&address.site)
    }

    /// Counts what was published.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// What was published last.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Publishes a change. Called by the path's home alone.
    pub(crate) fn publish(&self, change: impl FnOnce(&mut View)) {
        let mut view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        change(Arc::make_mut(&mut view));
        self.generation.fetch_add(1, Ordering::AcqRel);
        drop(view);
        (self.on_news)();
    }

    /// The published association, counted as having one more open queue, if it is still the one that takes commands.
    pub(crate) fn open_queue(&self) -> Option<Arc<Association>> {
        // Under the lock: its home looks at the count only after it has published the end.
        let view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        let association = view.association.as_ref()?;
        association.open.fetch_add(1, Ordering::AcqRel);
        Some(Arc::clone(association))
    }
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Path({}, {})", self.id, self.address)
    }
}
