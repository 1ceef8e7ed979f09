//! One controller of a remote subsystem, from the first connection to the last keep-alive (Base 3.5.1, 3.6).
//!
//! ```text
//!  Connecting -> Connect -> ReadCap -> Enable -> AwaitReady -> Identify -> ListNamespaces -> IdentifyNamespace
//!     -> Queues -> IoConnecting <-> IoConnect -> Live
//! ```
//! Every step has one admin or Connect command outstanding, and one deadline. The first failure ends the controller.

use super::Error;
use super::queue::IoQueue;
use super::transport::{Completion, Connector, Payload, Qpair};
use crate::spec::fabrics::{CNTLID_DYNAMIC, CONNECT_DATA_BYTES, Cap, Cc, ConnectData, ConnectResult, Csts, Property};
use crate::spec::feature::{NumberOfQueues, fid};
use crate::spec::identify::{IDENTIFY_BYTES, IdentifyController, IdentifyNamespace, cns};
use crate::spec::opcode::{self, admin, fabrics};
use crate::spec::{Sqe, fill_text};
use reactor::{Buffers, Instant};
use std::time::Duration;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Entries of the admin queue; the least that Connect may ask for (Base 3.3.3.1).
const ADMIN_ENTRIES: u16 = 32;
/// Marks commands of the controller's own on the admin queue.
const KEEP_ALIVE: u64 = u64::MAX;
const STEP: u64 = u64::MAX - 1;

/// What to connect to, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// NQN of the subsystem.
    pub subnqn: String,
    /// NQN of this host.
    pub hostnqn: String,
    /// Identifier of this host.
    pub hostid: [u8; 16],
    /// Namespace to look at; `None` for the first that is active.
    pub nsid: Option<u32>,
    /// I/O queues to ask for, at least 1. Fewer may be granted.
    pub io_queues: u16,
    /// Commands outstanding at once on an I/O queue, at least 1. Lowered to what the controller can.
    pub io_depth: u16,
    /// How long each step of the set-up may take.
    pub step_timeout: Duration,
    /// How long an I/O queue may complete nothing while commands are outstanding.
    pub io_timeout: Duration,
    /// Keep-alive timeout, milliseconds; 0 for none.
    pub kato_ms: u32,
}

/// A namespace, as far as I/O has to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its identifier.
    pub nsid: u32,
    /// Its size, blocks.
    pub blocks: u64,
    /// Bytes of a block.
    pub block_bytes: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Connecting,
    Connect,
    ReadCap,
    Enable,
    AwaitReady,
    Identify,
    ListNamespaces,
    IdentifyNamespace,
    Queues,
    IoConnecting,
    IoConnect,
    Live,
}

impl Step {
    const fn what(self) -> &'static str {
        match self {
            Step::Connecting | Step::IoConnecting => "setting up a connection",
            Step::Connect => "Connect of the admin queue",
            Step::ReadCap => "reading CAP",
            Step::Enable => "enabling",
            Step::AwaitReady => "becoming ready",
            Step::Identify => "Identify Controller",
            Step::ListNamespaces => "the list of active namespaces",
            Step::IdentifyNamespace => "Identify Namespace",
            Step::Queues => "Set Features, Number of Queues",
            Step::IoConnect => "Connect of an I/O queue",
            Step::Live => "Keep Alive",
        }
    }
}

/// A controller. Poll it until [`is_live`](Controller::is_live), and go on polling for the keep-alive.
pub struct Controller {
    connector: Box<dyn Connector>,
    options: Options,
    admin: Box<dyn Qpair>,
    /// The I/O queue pair that is being connected.
    joining: Option<Box<dyn Qpair>>,
    io: Vec<IoQueue>,
    io_wanted: u16,
    step: Step,
    deadline: Instant,
    cntlid: u16,
    cap: Cap,
    in_capsule_bytes: u32,
    max_io_bytes: Option<u64>,
    namespace: Option<Namespace>,
    keep_alive_due: Instant,
    keep_alive_sent: bool,
    done: Vec<Completion>,
}

impl Controller {
    /// Starts to connect.
    ///
    /// # Errors
    /// The host refuses at once.
    pub fn new(connector: Box<dyn Connector>, options: Options, now: Instant) -> Result<Controller, Error> {
        assert!(options.io_queues > 0 && options.io_depth > 0, "a controller has I/O queues");
        let admin = connector.connect(ADMIN_ENTRIES - 1).map_err(|e| Error::Transport(e.to_string()))?;
        let deadline = now + options.step_timeout;
        Ok(Controller {
            connector,
            io_wanted: options.io_queues,
            options,
            admin,
            joining: None,
            io: Vec::new(),
            step: Step::Connecting,
            deadline,
            cntlid: CNTLID_DYNAMIC,
            cap: Cap(0),
            in_capsule_bytes: 0,
            max_io_bytes: None,
            namespace: None,
            keep_alive_due: now,
            keep_alive_sent: false,
            done: Vec::with_capacity(usize::from(ADMIN_ENTRIES)),
        })
    }

    /// Whether the set-up is complete.
    pub fn is_live(&self) -> bool {
        self.step == Step::Live
    }

    /// The namespace that was identified; there is one once the controller is live.
    pub fn namespace(&self) -> Option<Namespace> {
        self.namespace
    }

    /// The controller's identifier.
    pub fn cntlid(&self) -> u16 {
        self.cntlid
    }

    /// The longest payload of one command, bytes; `None` for no limit (MDTS).
    pub fn max_io_bytes(&self) -> Option<u64> {
        self.max_io_bytes
    }

    /// Takes the I/O queues. There is at least one once the controller is live.
    pub fn take_io_queues(&mut self) -> Vec<IoQueue> {
        std::mem::take(&mut self.io)
    }

    /// Does what there is to do; whether that was anything.
    ///
    /// # Errors
    /// The controller is of no use any more.
    pub fn poll(&mut self, now: Instant) -> Result<bool, Error> {
        let mut done = std::mem::take(&mut self.done);
        let result = self.poll_with(now, &mut done);
        done.clear();
        self.done = done;
        result
    }

    fn poll_with(&mut self, now: Instant, done: &mut Vec<Completion>) -> Result<bool, Error> {
        let mut busy = self.admin.poll(done).map_err(Error::Transport)?;
        if let Some(joining) = &mut self.joining {
            busy |= joining.poll(done).map_err(Error::Transport)?;
        }
        for completion in done.drain(..) {
            self.completed(completion, now)?;
        }
        let joined = self.joining.as_ref().is_some_and(|qpair| qpair.is_ready());
        match self.step {
            Step::Connecting if self.admin.is_ready() => self.enter(Step::Connect, now),
            Step::IoConnecting if joined => self.enter(Step::IoConnect, now),
            Step::Live => self.keep_alive(now)?,
            step if now > self.deadline => return Err(Error::Timeout { what: step.what() }),
            _ => {}
        }
        self.admin.flush().map_err(Error::Transport)?;
        if let Some(joining) = &mut self.joining {
            joining.flush().map_err(Error::Transport)?;
        }
        Ok(busy)
    }

    fn keep_alive(&mut self, now: Instant) -> Result<(), Error> {
        if self.options.kato_ms == 0 || now < self.keep_alive_due {
            return Ok(());
        }
        if self.keep_alive_sent {
            return Err(Error::Timeout { what: Step::Live.what() });
        }
        let mut sqe = Sqe::new_zeroed();
        sqe.opcode = admin::KEEP_ALIVE;
        self.admin.submit(KEEP_ALIVE, sqe, Payload::None, Buffers::new());
        self.keep_alive_sent = true;
        self.keep_alive_due = now + self.half_kato();
        Ok(())
    }

    fn half_kato(&self) -> Duration {
        Duration::from_millis(u64::from(self.options.kato_ms / 2).max(1))
    }

    /// Sends the command of a step.
    fn enter(&mut self, step: Step, now: Instant) {
        self.step = step;
        self.deadline = now + self.options.step_timeout;
        let mut sqe = Sqe::new_zeroed();
        let (mut payload, mut data) = (Payload::None, Buffers::new());
        match step {
            Step::Connect | Step::IoConnect => return self.submit_connect(step),
            Step::ReadCap => property(&mut sqe, fabrics::PROPERTY_GET, Property::Cap, 0),
            Step::Enable => {
                let cc = Cc(0).with_en(1).with_iosqes(6).with_iocqes(4);
                property(&mut sqe, fabrics::PROPERTY_SET, Property::Cc, cc.0);
            }
            Step::AwaitReady => property(&mut sqe, fabrics::PROPERTY_GET, Property::Csts, 0),
            Step::Identify | Step::ListNamespaces | Step::IdentifyNamespace => {
                sqe.opcode = admin::IDENTIFY;
                let (cns, nsid) = match step {
                    Step::Identify => (cns::CONTROLLER, 0),
                    Step::ListNamespaces => (cns::ACTIVE_NAMESPACES, 0),
                    _ => (cns::NAMESPACE, self.options.nsid.unwrap_or(0)),
                };
                (sqe.cdw10, sqe.nsid) = (U32::new(u32::from(cns)), U32::new(nsid));
                (payload, data) = (Payload::ToHost(IDENTIFY_BYTES as u32), Buffers::heap(IDENTIFY_BYTES));
            }
            Step::Queues => {
                sqe.opcode = admin::SET_FEATURES;
                sqe.cdw10 = U32::new(u32::from(fid::NUMBER_OF_QUEUES));
                let count = u32::from(self.io_wanted);
                sqe.cdw11 = U32::new(NumberOfQueues { submission: count, completion: count }.dw0());
            }
            Step::Connecting | Step::IoConnecting | Step::Live => unreachable!("steps without a command"),
        }
        self.admin.submit(STEP, sqe, payload, data);
    }

    fn submit_connect(&mut self, step: Step) {
        let mut connect = ConnectData::new_zeroed();
        connect.hostid = self.options.hostid;
        connect.cntlid = U16::new(self.cntlid);
        fill_text(&mut connect.subnqn, &self.options.subnqn, 0);
        fill_text(&mut connect.hostnqn, &self.options.hostnqn, 0);
        let mut data = Buffers::heap(CONNECT_DATA_BYTES as usize);
        data.write_at(0, connect.as_bytes());
        let mut sqe = Sqe::new_zeroed();
        (sqe.opcode, sqe.nsid) = (opcode::FABRICS, U32::new(u32::from(fabrics::CONNECT)));
        let (qid, entries) = match step {
            Step::Connect => (0, ADMIN_ENTRIES),
            _ => (self.io.len() as u16 + 1, self.io_slots() + 1),
        };
        sqe.cdw10 = U32::new(u32::from(qid) << 16);
        // Without SQ flow control successful reads need no response: the slots bound the queue.
        let cattr = if qid == 0 { 0 } else { 4 << 16 };
        sqe.cdw11 = U32::new(u32::from(entries - 1) | cattr);
        sqe.cdw12 = U32::new(if qid == 0 { self.options.kato_ms } else { 0 });
        let payload = Payload::ToController(CONNECT_DATA_BYTES);
        let in_capsule_bytes = self.connector.admin_in_capsule_bytes();
        let qpair = if qid == 0 { &mut self.admin } else { self.joining.as_mut().expect("an I/O queue is joining") };
        qpair.set_in_capsule_bytes(in_capsule_bytes);
        qpair.submit(STEP, sqe, payload, data);
    }

    /// Commands outstanding at once on an I/O queue: one entry of a queue always stays free.
    fn io_slots(&self) -> u16 {
        self.options.io_depth.min(self.cap.mqes() as u16).max(1)
    }

    fn start_io_queue(&mut self, now: Instant) -> Result<(), Error> {
        let qpair = self.connector.connect(self.io_slots()).map_err(|e| Error::Transport(e.to_string()))?;
        self.joining = Some(qpair);
        self.step = Step::IoConnecting;
        self.deadline = now + self.options.step_timeout;
        Ok(())
    }

    fn completed(&mut self, completion: Completion, now: Instant) -> Result<(), Error> {
        let status = completion.cqe.status();
        if completion.user == KEEP_ALIVE {
            self.keep_alive_sent = false;
            return match status.is_success() {
                true => Ok(()),
                false => Err(Error::Refused { what: Step::Live.what(), status }),
            };
        }
        if !status.is_success() {
            return Err(Error::Refused { what: self.step.what(), status });
        }
        let short = (completion.transferred_bytes as usize) < completion.data.len();
        if short {
            return Err(Error::Nonsense("less data than was asked for"));
        }
        let result = completion.cqe.result();
        match self.step {
            Step::Connect => {
                let answer = ConnectResult(result as u32);
                if answer.atr() != 0 || answer.ascr() != 0 {
                    return Err(Error::Transport("the subsystem wants authentication, which is not supported".into()));
                }
                self.cntlid = answer.cntlid() as u16;
                self.enter(Step::ReadCap, now);
            }
            Step::ReadCap => {
                self.cap = Cap(result);
                self.enter(Step::Enable, now);
            }
            Step::Enable => self.enter(Step::AwaitReady, now),
            Step::AwaitReady => self.on_status(Csts(result as u32), now)?,
            Step::Identify => {
                self.on_identity(&completion.data.to_vec())?;
                let next = if self.options.nsid.is_some() { Step::IdentifyNamespace } else { Step::ListNamespaces };
                self.enter(next, now);
            }
            Step::ListNamespaces => {
                let mut first = [0; 4];
                completion.data.read_at(0, &mut first);
                match u32::from_le_bytes(first) {
                    0 => return Err(Error::Transport("the subsystem has no namespace for this host".into())),
                    nsid => self.options.nsid = Some(nsid),
                }
                self.enter(Step::IdentifyNamespace, now);
            }
            Step::IdentifyNamespace => {
                self.on_namespace(&completion.data.to_vec())?;
                self.enter(Step::Queues, now);
            }
            Step::Queues => {
                let granted = NumberOfQueues::from_cdw11(result as u32).ok_or(Error::Nonsense("number of queues"))?;
                let granted = granted.submission.min(granted.completion);
                self.io_wanted = self.io_wanted.min(u16::try_from(granted).unwrap_or(u16::MAX));
                self.start_io_queue(now)?;
            }
            Step::IoConnect => {
                let mut qpair = self.joining.take().expect("an I/O queue is joining");
                qpair.set_in_capsule_bytes(self.in_capsule_bytes);
                self.io.push(IoQueue::new(qpair, self.options.io_timeout, now));
                if self.io.len() < usize::from(self.io_wanted) {
                    self.start_io_queue(now)?;
                } else {
                    self.step = Step::Live;
                    self.keep_alive_due = now + self.half_kato();
                }
            }
            Step::Connecting | Step::IoConnecting | Step::Live => {}
        }
        Ok(())
    }

    fn on_status(&mut self, csts: Csts, now: Instant) -> Result<(), Error> {
        if csts.cfs() != 0 {
            return Err(Error::Nonsense("fatal status while it is enabled"));
        }
        if csts.rdy() != 0 {
            self.enter(Step::Identify, now);
            return Ok(());
        }
        if now > self.deadline {
            return Err(Error::Timeout { what: Step::AwaitReady.what() });
        }
        let deadline = self.deadline;
        self.enter(Step::AwaitReady, now);
        self.deadline = deadline;
        Ok(())
    }

    fn on_identity(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let (identity, _) = IdentifyController::ref_from_prefix(bytes).map_err(|_| Error::Nonsense("Identify"))?;
        // ICDOFF is 0 on TCP (TCP 3.3.2.1.2); data elsewhere is left to R2T.
        let capsule_bytes = identity.ioccsz.get().saturating_mul(16);
        self.in_capsule_bytes = match identity.icdoff.get() {
            0 => capsule_bytes.saturating_sub(size_of::<Sqe>() as u32),
            _ => 0,
        };
        let page_bytes = 1u64 << (12 + self.cap.mpsmin());
        self.max_io_bytes = match identity.mdts {
            0 => None,
            mdts => Some(page_bytes.saturating_mul(1u64.checked_shl(u32::from(mdts)).unwrap_or(u64::MAX))),
        };
        Ok(())
    }

    fn on_namespace(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let (ns, _) = IdentifyNamespace::ref_from_prefix(bytes).map_err(|_| Error::Nonsense("Identify"))?;
        let format = usize::from(ns.flbas & 0xf | (ns.flbas >> 1) & 0x30);
        let lba = ns.lbaf.get(format).ok_or(Error::Nonsense("LBA format"))?;
        if !(9..=20).contains(&lba.lbads) || lba.ms.get() != 0 {
            return Err(Error::Nonsense("no namespace, or blocks with metadata or of an odd size"));
        }
        let nsid = self.options.nsid.expect("the namespace was asked for by its identifier");
        self.namespace = Some(Namespace { nsid, blocks: ns.nsze.get(), block_bytes: 1 << lba.lbads });
        Ok(())
    }

    /// Tells the controller that the host is leaving (CC.SHN, Base 3.6.1), if there is room to say so, and does not wait
    /// for its answer.
    pub fn say_goodbye(&mut self) {
        if !self.is_live() || !self.admin.can_submit() {
            return;
        }
        let mut sqe = Sqe::new_zeroed();
        let cc = Cc(0).with_en(1).with_iosqes(6).with_iocqes(4).with_shn(1);
        property(&mut sqe, fabrics::PROPERTY_SET, Property::Cc, cc.0);
        self.admin.submit(STEP, sqe, Payload::None, Buffers::new());
        if let Err(why) = self.admin.flush() {
            tracing::debug!(why, "the connection ended before the shutdown");
        }
    }
}

/// Property Get or Set (Base 6.5, 6.6).
fn property(sqe: &mut Sqe, fctype: u8, property: Property, value: u32) {
    (sqe.opcode, sqe.nsid) = (opcode::FABRICS, U32::new(u32::from(fctype)));
    sqe.cdw10 = U32::new(u32::from(property.size_bytes() == 8));
    sqe.cdw11 = U32::new(property.offset());
    sqe.cdw12 = U32::new(value);
}
