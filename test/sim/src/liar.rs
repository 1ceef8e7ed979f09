//! A target that serves one namespace well, until it is told to do one thing wrong: then it does that at the next moment that
//! is right for it.
//!
//! It keeps what it acknowledges, and does what the specification lets a target do that has lost its host: commands that write and
//! were not answered may still be executed, until twice the keep-alive timeout and the command quiesce time have passed.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bdev::conformance::Rng;
use nvmf::spec::fabrics::{Cap, ConnectData, ConnectResult, Csts};
use nvmf::spec::feature::{AsyncEvent, AsyncEventConfig, fid};
use nvmf::spec::identify::{
    IDENTIFY_BYTES, IdentifyController, IdentifyNamespace, NamespaceDescriptors, NamespaceList, cns, csi,
};
use nvmf::spec::log::lid;
use nvmf::spec::opcode::{FABRICS, admin, fabrics, io};
use nvmf::spec::pdu::{CapsuleCmd, CapsuleResp, CommonHeader, DataPdu, IcResp, PduType, R2t, flags};
use nvmf::spec::{Cqe, Sqe, Status};
use reactor::net::{Listener, Network, Stream};
use reactor::{Clock, Instant, Progress};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::net::SimNetwork;
use crate::trace;
use crate::world::{Actor, World, WorldView};

/// Bytes of its blocks.
pub const BLOCK: usize = 4096;
/// Command quiesce time that it reports, milliseconds.
const CQT_MS: u16 = 1_000;
/// Data of a write that may come in its capsule, bytes.
const IN_CAPSULE: usize = BLOCK;
/// It takes no longer PDU.
const MAX_PDU: usize = 1 << 20;

/// Something wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// A new connection is never answered.
    HangAfterAccept,
    /// Half of ICResp, and nothing more.
    HangInIcResp,
    /// Connect of the admin queue is not answered.
    HangAtAdminConnect,
    /// Connect of an I/O queue is not answered.
    HangAtIoConnect,
    /// The controller is never ready.
    NeverReady,
    /// Identify is not answered.
    HangAtIdentify,
    /// Half of the data of an Identify, and nothing more.
    HangInIdentify,
    /// Connect of the admin queue is refused.
    RefuseAdmin,
    /// Connect of an I/O queue is refused.
    RefuseIo,
    /// A block that is read comes by half, and nothing more.
    HangInData,
    /// I/O commands are not answered any more, on any queue, until it is told to do something else. All others are.
    HangIo,
    /// Half of a response, and nothing more.
    HangInResponse,
    /// A response to a command that is not there.
    WrongCid,
    /// A response twice.
    Duplicate,
    /// A response again, after others.
    Late,
    /// More data than was asked for.
    DataTooLong,
    /// Less, and the command is called successful.
    DataTooShort,
    /// None, and the command is called successful.
    NoData,
    /// The same data twice.
    DataTwice,
    /// Data for a command that writes.
    DataForWrite,
    /// More is asked for than there is to write.
    R2tBeyond,
    /// Data is asked for twice.
    R2tTwice,
    /// Data is asked for of a command that reads.
    R2tForRead,
    /// A write is called successful whose data was never asked for.
    EarlySuccess,
    /// Bytes without sense.
    Garbage,
    /// A PDU that says that it is endless.
    Endless,
    /// A second ICResp.
    SecondIcResp,
    /// A command fails that may be tried again.
    Fails,
    /// The connection ends.
    Close,
}

/// Those that an I/O command is answered with.
pub const IO_LIES: [Lie; 20] = [
    Lie::HangInData,
    Lie::HangIo,
    Lie::HangInResponse,
    Lie::WrongCid,
    Lie::Duplicate,
    Lie::Late,
    Lie::DataTooLong,
    Lie::DataTooShort,
    Lie::NoData,
    Lie::DataTwice,
    Lie::DataForWrite,
    Lie::R2tBeyond,
    Lie::R2tTwice,
    Lie::R2tForRead,
    Lie::EarlySuccess,
    Lie::Garbage,
    Lie::Endless,
    Lie::SecondIcResp,
    Lie::Fails,
    Lie::Close,
];

/// Those with which a connection is not made.
pub const SETUP_LIES: [Lie; 9] = [
    Lie::HangAfterAccept,
    Lie::HangInIcResp,
    Lie::HangAtAdminConnect,
    Lie::HangAtIoConnect,
    Lie::NeverReady,
    Lie::HangAtIdentify,
    Lie::HangInIdentify,
    Lie::RefuseAdmin,
    Lie::RefuseIo,
];

/// A write whose data is not complete.
struct Writing {
    sqe: Sqe,
    data: Vec<u8>,
    have: usize,
}

struct Conn {
    stream: Box<dyn Stream>,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Nothing goes out any more.
    mute: bool,
    over: bool,
    /// After Connect.
    qid: Option<u16>,
    /// Its controller.
    cntlid: u16,
    kato_ms: u32,
    enabled: bool,
    shut_down: bool,
    events: Vec<u16>,
    writing: BTreeMap<u16, Writing>,
    /// I/O commands that are not answered; those that write may be executed later.
    held: Vec<(Sqe, Vec<u8>)>,
    /// The last response, to be sent again after so many others.
    late: Option<(Cqe, u32)>,
}

/// The target.
pub struct Liar {
    network: SimNetwork,
    listener: Option<Box<dyn Listener>>,
    addr: SocketAddr,
    conns: Vec<Conn>,
    rng: Rng,
    lie: Option<Lie>,
    /// I/O commands that fail yet.
    failures: u64,
    /// Lies that were told.
    pub told: u64,
    /// Blocks of the namespace.
    pub blocks: u64,
    /// UUID of the namespace; `None`: there is none.
    pub uuid: Option<[u8; 16]>,
    store: BTreeMap<([u8; 16], u64), Vec<u8>>,
    /// Writes of lost connections: when they are executed, and of which controller.
    overdue: Vec<(Instant, u16, Sqe, Vec<u8>)>,
    /// Controllers that have told their host that all is over.
    ended: BTreeSet<u16>,
    pending_event: bool,
    next_cntlid: u16,
    kato_ms: u32,
}

/// The target as scenarios hold it.
pub type SharedLiar = Rc<RefCell<Liar>>;

impl Liar {
    /// Puts one into the world, at `addr`.
    ///
    /// # Panics
    /// When the port is taken.
    pub fn start(world: &mut World, addr: SocketAddr, blocks: u64, seed: u64) -> SharedLiar {
        let network = SimNetwork::new(world.sim());
        let liar = Rc::new(RefCell::new(Liar {
            listener: Some(network.listen(addr, 64).expect("the port is free")),
            network,
            addr,
            conns: Vec::new(),
            rng: Rng::new(seed),
            lie: None,
            failures: 0,
            told: 0,
            blocks,
            uuid: Some([1; 16]),
            store: BTreeMap::new(),
            overdue: Vec::new(),
            ended: BTreeSet::new(),
            pending_event: false,
            next_cntlid: 1,
            kato_ms: 0,
        }));
        world.add_actor(Rc::clone(&liar) as _);
        liar
    }

    /// From now on: this, or nothing wrong.
    pub fn lie(&mut self, lie: Option<Lie>) {
        trace::text(format!("liar: {lie:?}"));
        self.lie = lie;
    }

    /// So many of the I/O commands to come fail, in a way that may be tried again.
    pub fn fail(&mut self, failures: u64) {
        self.failures = failures;
        self.lie = (failures > 0).then_some(Lie::Fails);
    }

    /// Whether it listens.
    pub fn listen(&mut self, listens: bool) {
        self.listener = listens.then(|| self.network.listen(self.addr, 64).expect("the port is free"));
    }

    /// Hosts are told that the namespaces have changed.
    pub fn namespaces_changed(&mut self) {
        self.pending_event = true;
    }

    /// Blocks that were ever written to the namespace with this UUID.
    pub fn written(&self, uuid: [u8; 16]) -> usize {
        self.store.range((uuid, 0)..=(uuid, u64::MAX)).count()
    }

    /// Whether this is the moment for a lie, which is told then.
    fn tells(&mut self, lie: Lie) -> bool {
        let tells = self.lie == Some(lie);
        if tells {
            self.told += 1;
            self.failures = self.failures.saturating_sub(1);
            if !matches!(lie, Lie::HangIo | Lie::NeverReady) && self.failures == 0 {
                self.lie = None;
            }
            trace::text(format!("liar: tells {lie:?}"));
        }
        tells
    }

    fn accept(&mut self) -> bool {
        let mut busy = false;
        while let Some(Ok(stream)) = self.listener.as_mut().map(|listener| listener.accept()) {
            busy = true;
            let mute = self.tells(Lie::HangAfterAccept);
            self.conns.push(Conn {
                stream,
                input: Vec::new(),
                output: Vec::new(),
                mute,
                over: false,
                qid: None,
                cntlid: 0,
                kato_ms: 0,
                enabled: false,
                shut_down: false,
                events: Vec::new(),
                writing: BTreeMap::new(),
                held: Vec::new(),
                late: None,
            });
        }
        busy
    }

    fn serve(&mut self, conn: &mut Conn) -> bool {
        let mut busy = receive(conn);
        while !conn.over && conn.input.len() >= size_of::<CommonHeader>() {
            let (ch, _) = CommonHeader::read_from_prefix(&conn.input).expect("8 bytes");
            let len = ch.plen.get() as usize;
            assert!((size_of::<CommonHeader>()..MAX_PDU).contains(&len), "the host sends sense");
            if conn.input.len() < len {
                break;
            }
            let pdu: Vec<u8> = conn.input.drain(..len).collect();
            self.take(conn, &ch, &pdu);
            busy = true;
        }
        if std::mem::take(&mut self.pending_event) {
            self.pending_event = true;
            if let Some(cid) = conn.events.pop() {
                self.pending_event = false;
                respond(conn, Cqe::success(cid).with_dw0(AsyncEvent::NAMESPACE_CHANGED.dw0()));
            }
        }
        busy | send(conn)
    }

    fn take(&mut self, conn: &mut Conn, ch: &CommonHeader, pdu: &[u8]) {
        match PduType::from_byte(ch.pdu_type) {
            Some(PduType::IcReq) => {
                let mut resp = IcResp::new_zeroed();
                resp.ch = CommonHeader::bare(PduType::IcResp);
                resp.maxh2cdata.set(8192);
                let bytes = resp.as_bytes();
                if self.tells(Lie::HangInIcResp) {
                    say(conn, &bytes[..bytes.len() / 2]);
                    conn.mute = true;
                } else {
                    say(conn, bytes);
                }
            }
            Some(PduType::CapsuleCmd) => {
                let (capsule, _) = CapsuleCmd::read_from_prefix(pdu).expect("a whole capsule");
                let data = if ch.pdo > 0 { &pdu[usize::from(ch.pdo)..] } else { &[] };
                self.command(conn, capsule.sqe, data);
            }
            Some(PduType::H2cData) => {
                let (header, _) = DataPdu::read_from_prefix(pdu).expect("a whole header");
                let cid = header.cccid.get();
                let Some(writing) = conn.writing.get_mut(&cid) else { return conn.over = true };
                let (at, data) = (header.datao.get() as usize, &pdu[usize::from(ch.pdo)..]);
                writing.data[at..at + data.len()].copy_from_slice(data);
                writing.have += data.len();
                if writing.have == writing.data.len() {
                    let writing = conn.writing.remove(&cid).expect("it was just there");
                    self.write(conn, writing.sqe, &writing.data);
                }
            }
            _ => conn.over = true,
        }
    }

    fn command(&mut self, conn: &mut Conn, sqe: Sqe, data: &[u8]) {
        match (conn.qid, sqe.opcode) {
            (_, FABRICS) => self.fabrics(conn, &sqe, data),
            (Some(0), _) => self.admin(conn, &sqe),
            (Some(_), _) if self.tells(Lie::HangIo) => conn.held.push((sqe, data.to_vec())),
            (Some(_), io::READ) => self.read(conn, &sqe),
            (Some(_), io::WRITE) if data.is_empty() => self.ask(conn, sqe),
            (Some(_), io::WRITE) => self.write(conn, sqe, data),
            (Some(_), io::FLUSH) => self.answer(conn, Cqe::success(sqe.cid.get())),
            (Some(_), opcode) => panic!("the host asks for I/O command {opcode:#x}, which was not offered"),
            (None, _) => conn.over = true,
        }
    }

    fn fabrics(&mut self, conn: &mut Conn, sqe: &Sqe, data: &[u8]) {
        let cid = sqe.cid.get();
        match sqe.fctype() {
            fabrics::CONNECT => {
                let qid = (sqe.cdw10.get() >> 16) as u16;
                let (hang, refuse) = match qid {
                    0 => (Lie::HangAtAdminConnect, Lie::RefuseAdmin),
                    _ => (Lie::HangAtIoConnect, Lie::RefuseIo),
                };
                if self.tells(hang) {
                    conn.mute = true;
                } else if self.tells(refuse) {
                    respond(conn, Cqe::new(cid, Status::CONNECT_INVALID_HOST.dnr()));
                } else {
                    conn.qid = Some(qid);
                    let connect = ConnectData::parse(data).expect("the data of a Connect");
                    conn.cntlid = connect.cntlid.get();
                    if qid == 0 {
                        conn.kato_ms = sqe.cdw12.get();
                        self.kato_ms = conn.kato_ms;
                        conn.cntlid = self.next_cntlid;
                        self.next_cntlid += 1;
                    }
                    let result = ConnectResult(0).with_cntlid(conn.cntlid.into()).0;
                    respond(conn, Cqe::success(cid).with_dw0(result));
                }
            }
            fabrics::PROPERTY_SET => {
                conn.enabled = sqe.cdw12.get() & 1 != 0;
                if sqe.cdw12.get() & 3 << 14 != 0 {
                    conn.shut_down = true;
                    // The host hears that all is over: nothing of this controller that was not executed will be.
                    self.ended.insert(conn.cntlid);
                    self.overdue.retain(|(_, cntlid, ..)| *cntlid != conn.cntlid);
                }
                respond(conn, Cqe::success(cid));
            }
            _ if sqe.cdw11.get() == 0 => {
                respond(conn, Cqe::success(cid).with_result(Cap(0).with_mqes(127).with_to(4).0));
            }
            _ => {
                let ready = conn.enabled && !self.tells(Lie::NeverReady);
                let shst = if conn.shut_down { 2 } else { 0 };
                respond(conn, Cqe::success(cid).with_dw0(Csts(0).with_rdy(ready.into()).with_shst(shst).0));
            }
        }
    }

    fn admin(&mut self, conn: &mut Conn, sqe: &Sqe) {
        let cid = sqe.cid.get();
        match sqe.opcode {
            admin::IDENTIFY => self.identify(conn, sqe),
            admin::SET_FEATURES if sqe.cdw10.get() as u8 == fid::NUMBER_OF_QUEUES => {
                respond(conn, Cqe::success(cid).with_dw0(0x000f_000f));
            }
            admin::GET_FEATURES => respond(conn, Cqe::success(cid).with_dw0(conn.kato_ms)),
            admin::SET_FEATURES | admin::KEEP_ALIVE => respond(conn, Cqe::success(cid)),
            admin::ASYNC_EVENT_REQUEST => conn.events.push(cid),
            // Bit 0: it was not aborted.
            admin::ABORT => respond(conn, Cqe::success(cid).with_dw0(1)),
            admin::GET_LOG_PAGE if sqe.cdw10.get() as u8 == lid::CHANGED_NAMESPACES => {
                let mut list = NamespaceList::new_zeroed();
                list.nsid[0].set(1);
                data(conn, cid, 0, list.as_bytes(), true);
                respond(conn, Cqe::success(cid));
            }
            _ => respond(conn, Cqe::new(cid, Status::INVALID_FIELD.dnr())),
        }
    }

    fn identify(&mut self, conn: &mut Conn, sqe: &Sqe) {
        let cid = sqe.cid.get();
        let mut page = [0; IDENTIFY_BYTES];
        match (sqe.cdw10.get() as u8, self.uuid) {
            (cns::CONTROLLER, _) => {
                let mut id = IdentifyController::new_zeroed();
                id.cntrltype = 1;
                id.aerl = 1;
                id.acl = 3;
                id.cqt.set(CQT_MS);
                id.ioccsz.set(((size_of::<Sqe>() + IN_CAPSULE) / 16) as u32);
                id.oaes.set(AsyncEventConfig(0).with_ns_attribute(1).0);
                id.set_names("LIAR", "A target that lies", "1");
                page.copy_from_slice(id.as_bytes());
            }
            (cns::ACTIVE_NAMESPACES, Some(_)) if sqe.nsid.get() == 0 => page[0] = 1,
            (cns::ACTIVE_NAMESPACES, _) => {}
            (cns::NAMESPACE, Some(_)) => {
                let mut id = IdentifyNamespace::new_zeroed();
                id.nsze.set(self.blocks);
                id.ncap.set(self.blocks);
                id.lbaf[0].lbads = BLOCK.ilog2() as u8;
                page.copy_from_slice(id.as_bytes());
            }
            (cns::NAMESPACE_DESCRIPTORS, Some(uuid)) => {
                let mut list = NamespaceDescriptors::new(&mut page);
                list.uuid(uuid);
                list.csi(csi::NVM);
            }
            _ => return respond(conn, Cqe::new(cid, Status::INVALID_NAMESPACE_OR_FORMAT.dnr())),
        }
        if self.tells(Lie::HangAtIdentify) {
            conn.mute = true;
        } else if self.tells(Lie::HangInIdentify) {
            data(conn, cid, 0, &page, true);
            conn.output.truncate(conn.output.len() - page.len() / 2);
            conn.mute = true;
        } else {
            data(conn, cid, 0, &page, true);
            respond(conn, Cqe::success(cid));
        }
    }

    /// First block and bytes of a command.
    fn range(sqe: &Sqe) -> (u64, usize) {
        let lba = u64::from(sqe.cdw10.get()) | u64::from(sqe.cdw11.get()) << 32;
        (lba, ((sqe.cdw12.get() & 0xffff) as usize + 1) * BLOCK)
    }

    fn is_there(&self, sqe: &Sqe) -> Option<[u8; 16]> {
        let (lba, bytes) = Self::range(sqe);
        self.uuid.filter(|_| sqe.nsid.get() == 1 && lba + (bytes / BLOCK) as u64 <= self.blocks)
    }

    fn read(&mut self, conn: &mut Conn, sqe: &Sqe) {
        let (cid, (lba, bytes)) = (sqe.cid.get(), Self::range(sqe));
        let Some(uuid) = self.is_there(sqe) else {
            return respond(conn, Cqe::new(cid, Status::INVALID_NAMESPACE_OR_FORMAT.dnr()));
        };
        let mut out = Vec::with_capacity(bytes);
        for lba in lba..lba + (bytes / BLOCK) as u64 {
            out.extend(self.store.get(&(uuid, lba)).map_or(&[0; BLOCK][..], |block| block));
        }
        if self.tells(Lie::R2tForRead) {
            return say(conn, R2t::new(CommonHeader::bare(PduType::R2t), cid, 1, 0, bytes as u32).as_bytes());
        }
        if self.tells(Lie::DataTooLong) {
            out.extend([0xee; 512]);
            return data(conn, cid, 0, &out, true);
        }
        if self.tells(Lie::DataTooShort) {
            data(conn, cid, 0, &out[..bytes / 2], true);
            return respond(conn, Cqe::success(cid));
        }
        if self.tells(Lie::NoData) {
            return respond(conn, Cqe::success(cid));
        }
        if self.tells(Lie::DataTwice) {
            data(conn, cid, 0, &out[..bytes / 2], false);
            return data(conn, cid, 0, &out, true);
        }
        if self.tells(Lie::HangInData) {
            data(conn, cid, 0, &out, true);
            conn.output.truncate(conn.output.len() - bytes / 2);
            conn.mute = true;
            return;
        }
        let first = 4 * (1 + self.rng.below(bytes as u64 / 4) as usize);
        data(conn, cid, 0, &out[..first], first == bytes);
        if first < bytes {
            data(conn, cid, first as u32, &out[first..], true);
        }
        self.answer(conn, Cqe::success(cid));
    }

    /// Asks for the data of a write.
    fn ask(&mut self, conn: &mut Conn, sqe: Sqe) {
        let (cid, (_, bytes)) = (sqe.cid.get(), Self::range(&sqe));
        if self.tells(Lie::EarlySuccess) {
            return respond(conn, Cqe::success(cid));
        }
        let r2t = |len: usize| R2t::new(CommonHeader::bare(PduType::R2t), cid, cid ^ 0x55, 0, len as u32);
        if self.tells(Lie::R2tBeyond) {
            return say(conn, r2t(bytes + 4096).as_bytes());
        }
        conn.writing.insert(cid, Writing { sqe, data: vec![0; bytes], have: 0 });
        say(conn, r2t(bytes).as_bytes());
        if self.tells(Lie::R2tTwice) {
            say(conn, r2t(bytes).as_bytes());
        }
    }

    fn write(&mut self, conn: &mut Conn, sqe: Sqe, bytes: &[u8]) {
        let cid = sqe.cid.get();
        if self.tells(Lie::DataForWrite) {
            return data(conn, cid, 0, bytes, true);
        }
        match self.execute(&sqe, bytes) {
            true => self.answer(conn, Cqe::success(cid)),
            false => respond(conn, Cqe::new(cid, Status::INVALID_NAMESPACE_OR_FORMAT.dnr())),
        }
    }

    fn execute(&mut self, sqe: &Sqe, bytes: &[u8]) -> bool {
        let Some(uuid) = self.is_there(sqe) else { return false };
        for (lba, block) in (Self::range(sqe).0..).zip(bytes.chunks(BLOCK)) {
            self.store.insert((uuid, lba), block.to_vec());
        }
        true
    }

    /// The response to an I/O command, or something else.
    fn answer(&mut self, conn: &mut Conn, cqe: Cqe) {
        let cid = cqe.cid.get();
        if let Some((again, after)) = conn.late.take() {
            match after {
                0 => respond(conn, again),
                _ => conn.late = Some((again, after - 1)),
            }
        }
        if self.tells(Lie::Fails) {
            // What writes has been executed all the same.
            return respond(conn, Cqe::new(cid, Status::INTERNAL_ERROR));
        }
        if self.tells(Lie::WrongCid) {
            return respond(conn, Cqe::success(cid ^ 0x0800));
        }
        if self.tells(Lie::Garbage) {
            let mut noise = vec![0; 1 + self.rng.below(500) as usize];
            self.rng.fill(&mut noise);
            return say(conn, &noise);
        }
        if self.tells(Lie::Endless) {
            let mut ch = CommonHeader::bare(PduType::C2hData);
            ch.plen.set(u32::MAX);
            ch.pdo = 24;
            return say(conn, DataPdu::new(ch, cid, 0, 0, u32::MAX - 24).as_bytes());
        }
        if self.tells(Lie::SecondIcResp) {
            let mut resp = IcResp::new_zeroed();
            resp.ch = CommonHeader::bare(PduType::IcResp);
            resp.maxh2cdata.set(8192);
            return say(conn, resp.as_bytes());
        }
        if self.tells(Lie::Close) {
            conn.over = true;
            return;
        }
        respond(conn, cqe);
        if self.tells(Lie::HangInResponse) {
            conn.output.truncate(conn.output.len() - size_of::<CapsuleResp>() / 2);
            conn.mute = true;
        } else if self.tells(Lie::Duplicate) {
            respond(conn, cqe);
        } else if self.tells(Lie::Late) {
            conn.late = Some((cqe, self.rng.below(20) as u32));
        }
    }

    /// A connection is gone: what it has not answered may be executed in the time that there is for that, or never.
    fn lose(&mut self, conn: Conn, now: Instant) {
        // The host has closed it at the latest now, and waits longer than this for what it may send again.
        let time = Duration::from_millis(u64::from(self.kato_ms) * 2 + u64::from(CQT_MS) - 100);
        for (sqe, bytes) in conn.held {
            let may_be = sqe.opcode == io::WRITE && !bytes.is_empty() && !self.ended.contains(&conn.cntlid);
            if may_be && self.rng.one_in(2) {
                let at = now + Duration::from_nanos(self.rng.below(time.as_nanos() as u64));
                self.overdue.push((at, conn.cntlid, sqe, bytes));
            }
        }
    }

    fn execute_overdue(&mut self, now: Instant) -> bool {
        let due: Vec<_> = self.overdue.extract_if(.., |(at, ..)| *at <= now).collect();
        for (.., sqe, bytes) in &due {
            trace::text("liar: executes a write of a lost connection".into());
            self.execute(sqe, bytes);
        }
        !due.is_empty()
    }
}

/// Puts bytes into the output.
fn say(conn: &mut Conn, bytes: &[u8]) {
    if !conn.mute {
        conn.output.extend_from_slice(bytes);
    }
}

fn respond(conn: &mut Conn, cqe: Cqe) {
    say(conn, CapsuleResp { ch: CommonHeader::bare(PduType::CapsuleResp), cqe }.as_bytes());
}

fn data(conn: &mut Conn, cid: u16, offset: u32, bytes: &[u8], last: bool) {
    let mut ch = CommonHeader::bare(PduType::C2hData);
    ch.flags = if last { flags::LAST_PDU } else { 0 };
    ch.pdo = ch.hlen;
    ch.plen.set(u32::from(ch.hlen) + bytes.len() as u32);
    say(conn, DataPdu::new(ch, cid, 0, offset, bytes.len() as u32).as_bytes());
    say(conn, bytes);
}

fn receive(conn: &mut Conn) -> bool {
    let mut busy = false;
    loop {
        let mut bytes = [0; 16 * 1024];
        match conn.stream.recv(&mut [IoSliceMut::new(&mut bytes)]) {
            Ok(0) => conn.over = true,
            Ok(count) => {
                conn.input.extend_from_slice(&bytes[..count]);
                busy = true;
                continue;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => conn.over = true,
        }
        return busy || conn.over;
    }
}

fn send(conn: &mut Conn) -> bool {
    let mut busy = false;
    while !conn.output.is_empty() && !conn.over {
        match conn.stream.send(&[IoSlice::new(&conn.output)]) {
            Ok(count) => {
                conn.output.drain(..count);
                busy = true;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(_) => conn.over = true,
        }
    }
    busy
}

impl Actor for Liar {
    fn act(&mut self, world: &WorldView) -> Progress {
        let now = world.sim.now();
        let mut busy = self.accept() | self.execute_overdue(now);
        for mut conn in std::mem::take(&mut self.conns) {
            busy |= self.serve(&mut conn);
            if conn.over {
                self.lose(conn, now);
            } else {
                self.conns.push(conn);
            }
        }
        Progress::from_busy(busy)
    }

    fn deadline(&self) -> Option<Instant> {
        self.overdue.iter().map(|(at, ..)| *at).min()
    }

    fn describe(&self) -> String {
        format!("liar: {} connections, {} lies told, next {:?}", self.conns.len(), self.told, self.lie)
    }
}

impl std::fmt::Debug for Liar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.describe())
    }
}
