//! A target made of answers: commands in, completions out, no stream between. It can be made to lie.

use crate::host::transport::{Completion, Connector, Payload, Qpair, QueueName};
use crate::spec::fabrics::{Cap, ConnectData, ConnectResult, Csts};
use crate::spec::feature::{AsyncEvent, AsyncEventConfig};
use crate::spec::identify::{
    IdentifyController, IdentifyNamespace, NamespaceDescriptors, NamespaceList, cmic, cns, csi,
};
use crate::spec::log::{AnaGroup, AnaHeader, DiscoveryEntry, DiscoveryHeader, lid};
use crate::spec::opcode::{self, admin, fabrics};
use crate::spec::{Cqe, Sqe, Status, fill_text};
use reactor::Buffers;
use reactor::park::{Ready, Source};
use std::collections::{BTreeMap, VecDeque};
use std::io as std_io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Reproducible numbers.
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

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// Stands for any I/O command.
const IO: u8 = 0xff;

/// One namespace: blocks, UUID, ANA group.
pub type Volume = (u64, [u8; 16], u32);

/// What the target is, and what it was asked.
pub struct Brain {
    pub namespaces: BTreeMap<u32, Volume>,
    pub changed: Vec<u32>,
    pub ana: BTreeMap<u32, u8>,
    pub discovery: Option<Vec<DiscoveryEntry>>,
    pub generation: u64,
    pub queues: u32,
    /// One answer in so many is a lie; 0 for none.
    pub lies_one_in: usize,
    pub rng: Rng,
    /// Connections end, and new ones are refused.
    pub dead: bool,
    /// Nothing is answered.
    pub hangs: bool,
    /// Commands by opcode.
    pub asked: BTreeMap<u8, u64>,
    pub connections: u64,
    pub shut_down: bool,
    enabled: bool,
    masked: Vec<u8>,
    pending: Vec<AsyncEvent>,
}

impl Brain {
    pub fn new() -> Brain {
        Brain {
            namespaces: BTreeMap::from([(1, (1000, [1; 16], 1)), (7, (50, [7; 16], 2))]),
            changed: Vec::new(),
            ana: BTreeMap::from([(1, 1), (2, 3)]),
            discovery: None,
            generation: 1,
            queues: 4,
            lies_one_in: 0,
            rng: Rng(1),
            dead: false,
            hangs: false,
            asked: BTreeMap::new(),
            connections: 0,
            shut_down: false,
            enabled: false,
            masked: Vec::new(),
            pending: Vec::new(),
        }
    }

    /// Tells the host, once it asks.
    pub fn raise(&mut self, event: AsyncEvent) {
        if !self.pending.contains(&event) {
            self.pending.push(event);
        }
    }

    pub fn count(&self, opcode: u8) -> u64 {
        self.asked.get(&opcode).copied().unwrap_or(0)
    }

    /// Status, result and data of a command; `None` for none yet.
    fn execute(&mut self, sqe: &Sqe, data: &[u8]) -> Option<(Status, u64, Vec<u8>)> {
        *self.asked.entry(sqe.opcode).or_default() += 1;
        let ok = |result: u64, bytes: &[u8]| Some((Status::SUCCESS, result, bytes.to_vec()));
        let nsid = sqe.nsid.get();
        match sqe.opcode {
            opcode::FABRICS if sqe.fctype() == fabrics::CONNECT => {
                let connect = ConnectData::parse(data).ok()?;
                assert!(connect.subnqn().is_some() && connect.hostnqn().is_some());
                if sqe.cdw10.get() >> 16 == 0 {
                    self.enabled = false;
                    self.masked.clear();
                }
                ok(ConnectResult(0).with_cntlid(5).0.into(), &[])
            }
            opcode::FABRICS if sqe.fctype() == fabrics::PROPERTY_SET => {
                self.enabled = true;
                self.shut_down |= sqe.cdw12.get() & 3 << 14 != 0;
                ok(0, &[])
            }
            opcode::FABRICS if sqe.cdw11.get() == 0 => ok(Cap(0).with_mqes(127).with_to(1).0, &[]),
            opcode::FABRICS => {
                let shst = if self.shut_down { 2 } else { 0 };
                ok(Csts(0).with_rdy(self.enabled.into()).with_shst(shst).0.into(), &[])
            }
            admin::IDENTIFY => self.identify(sqe.cdw10.get() as u8, nsid),
            admin::SET_FEATURES if sqe.cdw10.get() == 7 => ok(((self.queues - 1) * 0x1_0001).into(), &[]),
            admin::SET_FEATURES | admin::KEEP_ALIVE => ok(0, &[]),
            admin::GET_LOG_PAGE => {
                let log = self.log(sqe.cdw10.get() as u8)?;
                if sqe.cdw10.get() & 1 << 15 == 0 {
                    self.masked.retain(|masked| *masked != sqe.cdw10.get() as u8);
                }
                let offset = (u64::from(sqe.cdw12.get()) | u64::from(sqe.cdw13.get()) << 32) as usize;
                let len = ((sqe.cdw10.get() >> 16 | sqe.cdw11.get() << 16) as usize + 1) * 4;
                let mut bytes = vec![0; len];
                let part = &log[offset.min(log.len())..log.len().min(offset + len)];
                bytes[..part.len()].copy_from_slice(part);
                ok(0, &bytes)
            }
            _ => ok(0, &[]),
        }
    }

    fn identify(&self, cns: u8, nsid: u32) -> Option<(Status, u64, Vec<u8>)> {
        let ok = |bytes: &[u8]| Some((Status::SUCCESS, 0, bytes.to_vec()));
        match cns {
            cns::CONTROLLER => {
                let mut id = IdentifyController::new_zeroed();
                id.cntrltype = if self.discovery.is_some() { 2 } else { 1 };
                id.cmic = cmic::ANA;
                id.aerl = 1;
                id.mdts = 1;
                id.ioccsz.set(260);
                id.oaes.set(AsyncEventConfig(u32::MAX).0);
                fill_text(&mut id.sn, "FAKE", b' ');
                ok(id.as_bytes())
            }
            cns::ACTIVE_NAMESPACES => {
                let mut list = NamespaceList::new_zeroed();
                for (place, nsid) in list.nsid.iter_mut().zip(self.namespaces.range(nsid + 1..)) {
                    place.set(*nsid.0);
                }
                ok(list.as_bytes())
            }
            cns::NAMESPACE => {
                let mut id = IdentifyNamespace::new_zeroed();
                if let Some((blocks, _, group)) = self.namespaces.get(&nsid) {
                    id.nsze.set(*blocks);
                    id.lbaf[0].lbads = 9;
                    id.anagrpid.set(*group);
                }
                ok(id.as_bytes())
            }
            cns::NAMESPACE_DESCRIPTORS => match self.namespaces.get(&nsid) {
                Some((_, uuid, _)) => {
                    let mut page = [0; 4096];
                    let mut list = NamespaceDescriptors::new(&mut page);
                    list.uuid(*uuid);
                    list.csi(csi::NVM);
                    ok(&page)
                }
                None => Some((Status::INVALID_NAMESPACE_OR_FORMAT.dnr(), 0, Vec::new())),
            },
            _ => Some((Status::INVALID_FIELD.dnr(), 0, Vec::new())),
        }
    }

    fn log(&mut self, lid: u8) -> Option<Vec<u8>> {
        Some(match lid {
            lid::CHANGED_NAMESPACES => {
                let mut list = NamespaceList::new_zeroed();
                list.nsid.iter_mut().zip(self.changed.drain(..)).for_each(|(place, nsid)| place.set(nsid));
                list.as_bytes().to_vec()
            }
            lid::ANA => {
                let mut header = AnaHeader::new_zeroed();
                header.chgcnt.set(self.generation);
                header.ngrps.set(self.ana.len() as u16);
                let mut log = header.as_bytes().to_vec();
                for (group, state) in &self.ana {
                    let mut entry = AnaGroup::new_zeroed();
                    entry.agid.set(*group);
                    entry.state = *state;
                    log.extend_from_slice(entry.as_bytes());
                }
                log
            }
            lid::DISCOVERY => {
                let mut header = DiscoveryHeader::new_zeroed();
                let entries = self.discovery.as_deref().unwrap_or_default();
                header.genctr.set(self.generation);
                header.numrec.set(entries.len() as u64);
                let mut log = header.as_bytes().to_vec();
                entries.iter().for_each(|entry| log.extend_from_slice(entry.as_bytes()));
                log
            }
            _ => vec![0; 512],
        })
    }
}

/// Reaches one brain.
#[derive(Clone)]
pub struct Fake(pub Arc<Mutex<Brain>>);

impl Fake {
    pub fn new() -> Fake {
        Fake(Arc::new(Mutex::new(Brain::new())))
    }

    pub fn brain(&self) -> MutexGuard<'_, Brain> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connector for Fake {
    fn connect(&self, slots: u16, _queue: QueueName) -> std_io::Result<Box<dyn Qpair>> {
        let mut brain = self.brain();
        brain.connections += 1;
        if brain.dead {
            return Err(std_io::Error::from(std_io::ErrorKind::ConnectionRefused));
        }
        Ok(Box::new(FakeQpair {
            fake: self.clone(),
            slots,
            ready: false,
            io: false,
            held: VecDeque::new(),
            events: VecDeque::new(),
        }))
    }

    fn admin_in_capsule_bytes(&self) -> u32 {
        8192
    }
}

type Held = (u64, Sqe, Payload, Buffers);

struct FakeQpair {
    fake: Fake,
    slots: u16,
    ready: bool,
    /// Connected as an I/O queue.
    io: bool,
    held: VecDeque<Held>,
    events: VecDeque<(u64, Buffers)>,
}

impl FakeQpair {
    fn answer(brain: &mut Brain, (user, sqe, payload, mut data): Held) -> Option<Completion> {
        let sent = if matches!(payload, Payload::ToController(_)) { data.to_vec() } else { Vec::new() };
        let (mut status, mut result, mut bytes) = brain.execute(&sqe, &sent)?;
        let wanted = data.len();
        if brain.lies_one_in > 0 && brain.rng.below(brain.lies_one_in) == 0 {
            match brain.rng.below(5) {
                0 => status = Status::from_field(brain.rng.next() as u16),
                1 => result = brain.rng.next(),
                2 => bytes.truncate(brain.rng.below(bytes.len() + 1)),
                3 => {
                    for _ in 0..1 + brain.rng.below(64) {
                        let (at, value) = (brain.rng.next() as usize, brain.rng.next());
                        let near =
                            if value & 256 == 0 { at % bytes.len().max(1) } else { at % bytes.len().clamp(1, 160) };
                        if let Some(byte) = bytes.get_mut(near) {
                            *byte = value as u8;
                        }
                    }
                }
                _ => bytes.iter_mut().for_each(|byte| *byte = 0xff),
            }
        }
        let mut transferred_bytes = sent.len() as u32;
        if matches!(payload, Payload::ToHost(_)) {
            // I/O reads are answered with what the buffer holds.
            transferred_bytes = if sqe.opcode == IO { wanted } else { bytes.len() } as u32;
            bytes.truncate(wanted);
            data.write_at(0, &bytes);
        }
        Some(Completion { user, cqe: Cqe::new(0, status).with_result(result), data, transferred_bytes })
    }
}

impl Qpair for FakeQpair {
    fn is_ready(&self) -> bool {
        self.ready
    }

    fn can_submit(&self) -> bool {
        self.ready && self.outstanding() < self.slots.into()
    }

    fn can_submit_pair(&self) -> bool {
        self.ready && self.outstanding() + 2 <= self.slots.into()
    }

    fn cid_of(&self, _user: u64) -> Option<u16> {
        None
    }

    fn submit(&mut self, user: u64, sqe: Sqe, payload: Payload, data: Buffers) {
        assert!(self.can_submit(), "a command was submitted without asking for room");
        self.held.push_back((user, sqe, payload, data));
    }

    fn poll(&mut self, done: &mut Vec<Completion>) -> Result<bool, String> {
        self.ready = true;
        let fake = self.fake.clone();
        let mut brain = fake.brain();
        if brain.dead {
            return Err("the controller closed the connection".into());
        }
        if brain.hangs {
            return Ok(false);
        }
        let before = done.len();
        while let Some(mut held) = self.held.pop_front() {
            self.io |= held.1.opcode == opcode::FABRICS && held.1.cdw10.get() >> 16 != 0;
            if self.io && held.1.opcode != opcode::FABRICS {
                // I/O opcodes mean something else on admin queues; this one is never an admin command.
                held.1.opcode = IO;
            }
            if held.1.opcode == admin::ASYNC_EVENT_REQUEST {
                if self.events.len() < 2 {
                    self.events.push_back((held.0, held.3));
                    continue;
                }
                assert!(brain.lies_one_in > 0, "no more event requests than AERL says");
                let cqe = Cqe::new(0, Status::AER_LIMIT_EXCEEDED);
                done.push(Completion { user: held.0, cqe, data: held.3, transferred_bytes: 0 });
                continue;
            }
            done.extend(Self::answer(&mut brain, held));
        }
        let mut later = Vec::new();
        for event in std::mem::take(&mut brain.pending) {
            if brain.masked.contains(&event.lid) || self.events.is_empty() {
                later.push(event);
                continue;
            }
            brain.masked.push(event.lid);
            let (user, data) = self.events.pop_front().expect("it was just seen");
            done.push(Completion { user, cqe: Cqe::success(0).with_dw0(event.dw0()), data, transferred_bytes: 0 });
        }
        brain.pending = later;
        Ok(done.len() > before)
    }

    fn flush(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn outstanding(&self) -> usize {
        self.held.len() + self.events.len()
    }

    fn set_in_capsule_bytes(&mut self, _bytes: u32) {}

    fn close(&mut self, lost: &mut dyn FnMut(u64, Buffers)) {
        self.held.drain(..).for_each(|(user, _, _, data)| lost(user, data));
        self.events.drain(..).for_each(|(user, data)| lost(user, data));
    }

    fn source(&self) -> Source {
        Source::Virtual(0)
    }

    fn set_watched(&mut self) {}

    fn ready(&mut self, _ready: Ready) {}

    fn has_work(&self) -> bool {
        true
    }
}

/// A referral or subsystem of a discovery log.
pub fn entry(subtype: u8, address: &str, port: &str, nqn: &str) -> DiscoveryEntry {
    let mut entry = DiscoveryEntry::read_from_bytes(&[0; 1024]).expect("1024 bytes");
    entry.trtype = crate::spec::log::trtype::TCP;
    entry.subtype = subtype;
    entry.set_address(address, port);
    entry.set_subnqn(nqn);
    entry
}
