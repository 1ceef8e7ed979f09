//! A host made of bytes: one TCP connection, one queue pair, no opinion of its own about what may be sent.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use nvmf::spec::opcode::admin;
use nvmf::spec::pdu::Fes;
use nvmf::spec::{Cqe, Sqe, Status};
use nvmf::tcp::wire_client::{self, TargetPdu, WireClient, command, property_get, property_set};
use serde_json::json;

use crate::common::{PATIENCE, Scratch, Server, address, free_port, wait_for};

pub const NQN: &str = "nqn.2026-11.io.example:wire";
pub const DISCOVERY: &str = "nqn.2014-08.org.nvmexpress.discovery";
pub const HOSTNQN: &str = "nqn.2026-11.io.example:host";
pub const HOSTID: [u8; 16] = [7; 16];
/// Namespace 1: 512-byte blocks.
pub const BLOCKS: u64 = 16384;
pub const BLOCK: u32 = 512;
/// In-capsule data that I/O queues take.
pub const IN_CAPSULE: u32 = 4096;
/// Largest transfer.
pub const MAX_IO: u32 = 131072;

/// A server with one subsystem: namespace 1 is memory, namespace 2 reads as zeroes in blocks of 4096 bytes.
pub struct Target {
    pub server: Server,
    pub port: u16,
    _scratch: Scratch,
}

impl Target {
    #[track_caller]
    pub fn start() -> Target {
        Target::start_with(&[])
    }

    #[track_caller]
    pub fn start_with(args: &[&str]) -> Target {
        let scratch = Scratch::new();
        let port = free_port();
        let server = Server::start(&scratch, &[&["--empty"], args].concat());
        for (method, params) in [
            ("bdev_malloc_create", json!({"name": "M", "num_blocks": BLOCKS, "block_size": BLOCK})),
            ("bdev_null_create", json!({"name": "N", "num_blocks": 65536, "block_size": 4096})),
            (
                "nvmf_create_transport",
                json!({"trtype": "TCP", "in_capsule_data_size": IN_CAPSULE,
                "max_io_size": MAX_IO, "max_queue_depth": 64, "max_io_qpairs_per_ctrlr": 8, "kas": 1, "min_kato": 100}),
            ),
            ("nvmf_create_subsystem", json!({"nqn": NQN, "allow_any_host": true})),
            ("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": "M"}})),
            ("nvmf_subsystem_add_ns", json!({"nqn": NQN, "namespace": {"bdev_name": "N"}})),
            ("nvmf_subsystem_add_listener", json!({"nqn": NQN, "listen_address": address(port)})),
        ] {
            server.call(method, params);
        }
        Target { server, port, _scratch: scratch }
    }

    /// A TCP connection.
    pub fn open(&self) -> Host {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).expect("the target listens");
        // A test that waits for what never comes ends, instead of hanging.
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes a timeout");
        stream.set_nodelay(true).expect("a TCP socket");
        Host { stream, wire: WireClient::new(), inbox: VecDeque::new(), next_cid: 0 }
    }

    /// An initialised connection without digests.
    pub fn link(&self) -> Host {
        self.link_with(false, false, 0)
    }

    #[track_caller]
    pub fn link_with(&self, header_digest: bool, data_digest: bool, hpda: u8) -> Host {
        let mut host = self.open();
        let icreq = host.wire.icreq(header_digest, data_digest, hpda, 0);
        host.send(&icreq);
        let TargetPdu::IcResp(resp) = host.next() else { panic!("no ICResp") };
        assert_eq!(resp.pfv.get(), 0);
        assert_eq!(resp.dgst, u8::from(header_digest) | u8::from(data_digest) << 1);
        assert!(resp.maxh2cdata.get() >= 4096 && resp.maxh2cdata.get() % 4 == 0);
        host
    }

    /// The admin queue of an enabled controller, and its identifier.
    #[track_caller]
    pub fn admin(&self) -> (Host, u16) {
        self.admin_on(self.link(), NQN, 0)
    }

    #[track_caller]
    pub fn admin_on(&self, mut host: Host, nqn: &str, kato_ms: u32) -> (Host, u16) {
        let join = Join { nqn, kato_ms, ..Join::admin() };
        // While commands of an earlier association of the same host may still run, it is to try again.
        let cqe = wait_for("the controller is not busy", || {
            let cqe = host.try_join(&join);
            (cqe.status() != Status::CONNECT_CONTROLLER_BUSY).then_some(cqe)
        });
        assert_eq!(cqe.status(), Status::SUCCESS);
        let cntlid = cqe.dw0.get() as u16;
        host.enable();
        (host, cntlid)
    }

    /// An I/O queue of a controller.
    #[track_caller]
    pub fn io(&self, cntlid: u16, qid: u16) -> Host {
        self.io_on(self.link(), cntlid, qid)
    }

    #[track_caller]
    pub fn io_on(&self, mut host: Host, cntlid: u16, qid: u16) -> Host {
        host.join(&Join { qid, cntlid, ..Join::admin() });
        host
    }

    /// The target is as it was: new hosts are served.
    #[track_caller]
    pub fn still_serves(&self) {
        let (_admin, cntlid) = self.admin();
        let mut io = self.io(cntlid, 1);
        let data: Vec<u8> = (0..BLOCK).map(|byte| byte as u8).collect();
        let cid = io.cid();
        assert_eq!(io.write(wire_client::write_in_capsule(cid, 1, 9, 1, BLOCK), &data).status(), Status::SUCCESS);
        let cid = io.cid();
        assert_eq!(io.read(wire_client::read(cid, 1, 9, 1, BLOCK)), (Status::SUCCESS, data));
    }
}

/// A Connect command.
#[derive(Clone, Copy, Debug)]
pub struct Join<'a> {
    pub qid: u16,
    pub entries: u16,
    pub kato_ms: u32,
    pub cntlid: u16,
    pub hostid: [u8; 16],
    pub nqn: &'a str,
    pub hostnqn: &'a str,
}

impl Join<'_> {
    pub fn admin() -> Join<'static> {
        Join { qid: 0, entries: 32, kato_ms: 0, cntlid: 0xffff, hostid: HOSTID, nqn: NQN, hostnqn: HOSTNQN }
    }

    pub fn data(&self) -> Vec<u8> {
        let mut data = vec![0; 1024];
        data[..16].copy_from_slice(&self.hostid);
        data[16..18].copy_from_slice(&self.cntlid.to_le_bytes());
        data[256..][..self.nqn.len()].copy_from_slice(self.nqn.as_bytes());
        data[512..][..self.hostnqn.len()].copy_from_slice(self.hostnqn.as_bytes());
        data
    }
}

/// One connection.
pub struct Host {
    pub stream: TcpStream,
    pub wire: WireClient,
    inbox: VecDeque<TargetPdu>,
    next_cid: u16,
}

impl Host {
    /// A command identifier that was not used lately.
    pub fn cid(&mut self) -> u16 {
        self.next_cid += 1;
        self.next_cid
    }

    /// Sends bytes. A target that has closed the connection already is not an error here: what it said is.
    pub fn send(&mut self, bytes: &[u8]) {
        match self.stream.write_all(bytes) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {}
            Err(error) => panic!("sending: {error}"),
        }
    }

    pub fn send_command(&mut self, sqe: &Sqe, in_capsule: &[u8]) {
        let capsule = self.wire.capsule(sqe, in_capsule);
        self.send(&capsule);
    }

    /// The next PDU, or `None` when the target has closed the connection.
    #[track_caller]
    pub fn next_or_end(&mut self) -> Option<TargetPdu> {
        let mut buffer = vec![0; 256 << 10];
        loop {
            if let Some(pdu) = self.inbox.pop_front() {
                return Some(pdu);
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    assert_eq!(self.wire.pending_bytes(), 0, "the stream ends inside of a PDU");
                    return None;
                }
                Ok(n) => {
                    self.inbox.extend(self.wire.receive(&buffer[..n]).expect("the target obeys the specification"))
                }
                Err(error) if error.kind() == ErrorKind::ConnectionReset => panic!("the target reset the connection"),
                Err(error) => panic!("nothing comes: {error}"),
            }
        }
    }

    #[track_caller]
    pub fn next(&mut self) -> TargetPdu {
        self.next_or_end().expect("the target closed the connection")
    }

    /// A response capsule.
    #[track_caller]
    pub fn response(&mut self) -> Cqe {
        match self.next() {
            TargetPdu::Response(cqe) => cqe,
            other => panic!("{other:?} instead of a response"),
        }
    }

    #[track_caller]
    pub fn r2t(&mut self) -> (u16, u16, u32, u32) {
        match self.next() {
            TargetPdu::R2t { cid, ttag, offset, len } => (cid, ttag, offset, len),
            other => panic!("{other:?} instead of R2T"),
        }
    }

    /// The target terminates the connection: FES and FEI, and then the end of the stream.
    #[track_caller]
    pub fn terminated(&mut self) -> (Fes, u32) {
        loop {
            match self.next() {
                TargetPdu::TermReq { fes, fei, .. } => {
                    assert_eq!(self.next_or_end(), None, "nothing follows");
                    return (Fes::from_wire(fes).expect("a status that is defined"), fei);
                }
                TargetPdu::Response(_) | TargetPdu::R2t { .. } | TargetPdu::Data { .. } => {}
                other => panic!("{other:?} instead of C2HTermReq"),
            }
        }
    }

    /// Sends bytes that must end the connection.
    #[track_caller]
    pub fn fatal(&mut self, bytes: &[u8]) -> (Fes, u32) {
        self.send(bytes);
        self.terminated()
    }

    /// Sends a command with no data, or with all of it in the capsule, and waits for its completion.
    #[track_caller]
    pub fn call(&mut self, sqe: Sqe, in_capsule: &[u8]) -> Cqe {
        self.send_command(&sqe, in_capsule);
        let cqe = self.response();
        assert_eq!(cqe.cid.get(), sqe.cid.get());
        cqe
    }

    #[track_caller]
    pub fn status(&mut self, sqe: Sqe, in_capsule: &[u8]) -> Status {
        self.call(sqe, in_capsule).status()
    }

    /// A write, whose data go in the capsule or when R2Ts ask for them, as the command says.
    #[track_caller]
    pub fn write(&mut self, sqe: Sqe, data: &[u8]) -> Cqe {
        let in_capsule = matches!(sqe.dptr.parse(), Ok(nvmf::spec::sqe::Sgl::InCapsule { .. }));
        self.send_command(&sqe, if in_capsule { data } else { &[] });
        loop {
            match self.next() {
                TargetPdu::Response(cqe) => {
                    assert_eq!(cqe.cid.get(), sqe.cid.get());
                    return cqe;
                }
                TargetPdu::R2t { cid, ttag, offset, len } => {
                    assert_eq!(cid, sqe.cid.get());
                    let answer = self.wire.answer_r2t(cid, ttag, offset, len, data, u32::MAX);
                    self.send(&answer);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// A command with data to the host: its status and the data.
    #[track_caller]
    pub fn read(&mut self, sqe: Sqe) -> (Status, Vec<u8>) {
        self.send_command(&sqe, &[]);
        let mut all = Vec::new();
        loop {
            match self.next() {
                TargetPdu::Response(cqe) => {
                    assert_eq!(cqe.cid.get(), sqe.cid.get());
                    return (cqe.status(), all);
                }
                TargetPdu::Data { cid, offset, data, last, success } => {
                    assert_eq!((cid, offset as usize), (sqe.cid.get(), all.len()));
                    all.extend(data);
                    assert!(last || !success, "SUCCESS comes with the last data only");
                    if success {
                        return (Status::SUCCESS, all);
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Connect, whatever comes of it.
    #[track_caller]
    pub fn try_join(&mut self, join: &Join) -> Cqe {
        let sqe = wire_client::connect(self.cid(), join.qid, join.entries, join.kato_ms, false);
        self.call(sqe, &join.data())
    }

    /// A Connect that must succeed: the controller's identifier.
    #[track_caller]
    pub fn join(&mut self, join: &Join) -> u16 {
        let cqe = self.try_join(join);
        assert_eq!(cqe.status(), Status::SUCCESS, "{join:?}, dword 0 {:#x}", cqe.dw0);
        cqe.dw0.get() as u16
    }

    #[track_caller]
    pub fn property(&mut self, offset: u32, size_bytes: u8) -> u64 {
        let cid = self.cid();
        let cqe = self.call(property_get(cid, offset, size_bytes), &[]);
        assert_eq!(cqe.status(), Status::SUCCESS);
        cqe.result()
    }

    #[track_caller]
    pub fn set_property(&mut self, offset: u32, value: u32) -> Status {
        let cid = self.cid();
        self.status(property_set(cid, offset, value), &[])
    }

    /// CC.EN = 1 with the NVM command set's entry sizes.
    #[track_caller]
    pub fn enable(&mut self) {
        assert_eq!(self.set_property(0x14, 0x0046_0001), Status::SUCCESS);
        assert_eq!(self.property(0x1c, 4), 1, "CSTS.RDY");
    }

    /// An admin command without data.
    pub fn admin_command(&mut self, opcode: u8, nsid: u32, cdw10: u32, cdw11: u32) -> Sqe {
        let mut sqe = command(opcode, self.cid(), nsid);
        sqe.cdw10.set(cdw10);
        sqe.cdw11.set(cdw11);
        sqe
    }

    /// Identify with 4096 bytes of memory for the answer.
    pub fn identify(&mut self, cns: u8, nsid: u32) -> Sqe {
        let sqe = self.admin_command(admin::IDENTIFY, nsid, u32::from(cns), 0);
        wire_client::with_transfer(sqe, 4096)
    }
}
