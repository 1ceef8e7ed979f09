//! A target made of devices without I/O, and a controller in it, for tests.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::time::Duration;

use bdev::core::system::Executor;
use bdev::core::{Bdev, BdevInfo, BdevSystem, ChannelCx, Geometry, IoChannel, NewBdev, OpSet};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use reactor::platform::OsPlatform;
use reactor::{Buffers, Instant, ReactorId};
use schema::ConfigEntry;
use uuid::Uuid;
use zerocopy::FromZeros;

use super::{Admin, AdminEnv, Controller, ControllerConfig, Effect, Kind};
use crate::spec::fabrics::Property;
use crate::spec::opcode::admin;
use crate::spec::{Cqe, FabricsCommand, Sqe, Status};
use crate::target::shared::ControllerShared;
use crate::target::view::{
    DISCOVERY_NQN, ListenAddress, ListenerView, NamespaceView, SubsystemView, TargetView, TransportKind,
    TransportOptions,
};

pub(in crate::target) const NQN: &str = "nqn.2026-11.io.ringstone:vol0";
pub(in crate::target) const HOST: &str = "nqn.2014-08.org.nvmexpress:uuid:host-1";
pub(in crate::target) const HOSTID: [u8; 16] = [7; 16];
/// CC as Linux writes it: enabled, all command sets, entries of 64 and 16 bytes.
pub(in crate::target) const CC_ENABLED: u64 = 0x0046_0061;

struct Disk(Geometry);

impl Bdev for Disk {
    fn product_name(&self) -> &'static str {
        "Disk without I/O"
    }
    fn geometry(&self) -> Geometry {
        self.0
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

struct NoTasks;

impl Executor for NoTasks {
    fn spawn(&self, _: BoxFuture<'static, ()>) {
        // Nobody examines what has no channels.
    }
    fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
        panic!("registering a device does not wait");
    }
}

/// A namespace on a device of its own. Its UUID is made of its NSID, its group is 1.
pub(in crate::target) fn namespace(nsid: u32, geometry: Geometry) -> NamespaceView {
    let system = BdevSystem::new(Vec::new(), Arc::new(OsPlatform::default()), Arc::new(NoTasks));
    let uuid = Uuid::from_u128(0x1111_2222_3333_4444_5555_6666_7777_0000 + u128::from(nsid));
    let device = Arc::new(Disk(geometry));
    let new = NewBdev { name: format!("disk{nsid}"), uuid: Some(uuid), aliases: Vec::new(), device };
    let bdev = system.register(new).now_or_never().expect("registering does not wait").expect("the name is new");
    NamespaceView { incarnation: nsid.into(), nsid, bdev, geometry, uuid, nguid: None, eui64: None, anagrpid: 1 }
}

pub(in crate::target) fn tcp(address: [u8; 4], port: u16) -> ListenAddress {
    ListenAddress { trtype: TransportKind::Tcp, traddr: IpAddr::from(address), trsvcid: port }
}

pub(in crate::target) fn listener(address: ListenAddress, port_id: u16) -> Arc<ListenerView> {
    Arc::new(ListenerView { address, port_id, ana_states: BTreeMap::new() })
}

/// Namespaces 1 (512-byte blocks) and 3 (4096-byte blocks) of at most 32, at 127.0.0.1:4420, for any host.
pub(in crate::target) fn subsystem() -> SubsystemView {
    let namespaces = [namespace(1, Geometry::new(512, 0x12_3456)), namespace(3, Geometry::new(4096, 1000))];
    SubsystemView {
        incarnation: 99,
        nqn: NQN.into(),
        serial_number: "SN42".into(),
        model_number: "A model".into(),
        max_namespaces: 32,
        min_cntlid: 1,
        max_cntlid: 0xffef,
        allow_any_host: true,
        hosts: Vec::new(),
        ana_reporting: false,
        dmrsl: 0,
        wzsl: 0,
        namespaces: namespaces.into_iter().map(|ns| (ns.nsid, Arc::new(ns))).collect(),
        listeners: vec![listener(tcp([127, 0, 0, 1], 4420), 5)],
    }
}

/// What the tests' numbers come from.
pub(in crate::target) fn options() -> TransportOptions {
    TransportOptions {
        max_queue_depth: 128,
        max_io_qpairs_per_ctrlr: 127,
        in_capsule_data_size: 8192,
        max_io_size: 131_072,
        max_aq_depth: 128,
        kas: 10,
        min_kato_ms: 1000,
        ..TransportOptions::default()
    }
}

pub(in crate::target) fn target(subsystems: Vec<SubsystemView>) -> TargetView {
    TargetView {
        generation: 1,
        discovery_generation: 17,
        subsystems: subsystems.into_iter().map(|subsystem| (subsystem.nqn.clone(), Arc::new(subsystem))).collect(),
        discovery_listeners: Vec::new(),
        transports: [(TransportKind::Tcp, options())].into(),
        referrals: Vec::new(),
        discovery_filter: Default::default(),
        crdt: [1, 2, 3],
    }
}

pub(in crate::target) fn shared(subnqn: &str, incarnation: u64) -> ControllerShared {
    ControllerShared {
        cntlid: 0x1234,
        subnqn: subnqn.into(),
        incarnation,
        hostnqn: HOST.into(),
        hostid: HOSTID,
        admin_reactor: ReactorId(0),
        listener: tcp([127, 0, 0, 1], 4420),
        max_io_queues: AtomicU32::new(127),
        ready: AtomicBool::new(false),
        dead: AtomicBool::new(false),
        dead_since: Default::default(),
        traffic: AtomicBool::new(false),
        io_queues: Default::default(),
        counters: Default::default(),
        errors: Default::default(),
    }
}

/// A controller, its target, a clock, and the host's side of the admin queue.
pub(in crate::target) struct Bench {
    pub(in crate::target) controller: Controller,
    pub(in crate::target) target: TargetView,
    pub(in crate::target) now: Instant,
    cid: u16,
}

/// The end of a command and the data that came with it.
#[derive(Debug)]
pub(in crate::target) struct Answer {
    pub(in crate::target) cqe: Cqe,
    pub(in crate::target) data: Option<Vec<u8>>,
}

impl Answer {
    pub(in crate::target) fn ok(self) -> Vec<u8> {
        assert_eq!(self.cqe.status(), Status::SUCCESS);
        self.data.unwrap_or_default()
    }

    pub(in crate::target) fn value(&self) -> u32 {
        assert_eq!(self.cqe.status(), Status::SUCCESS);
        assert!(self.data.is_none());
        self.cqe.dw0.get()
    }

    /// The status of a failure, which must be in the error log.
    pub(in crate::target) fn failure(&self) -> Status {
        let status = self.cqe.status();
        assert!(!status.is_success() && status.is_more() && self.data.is_none(), "{self:?}");
        Status::from_field(status.to_field() & !(1 << 14))
    }
}

pub(in crate::target) fn sqe(opcode: u8, nsid: u32, cdws: [u32; 6]) -> Sqe {
    let mut sqe = Sqe::new_zeroed();
    sqe.opcode = opcode;
    sqe.flags = 0x40;
    sqe.nsid.set(nsid);
    let places = [&mut sqe.cdw10, &mut sqe.cdw11, &mut sqe.cdw12, &mut sqe.cdw13, &mut sqe.cdw14, &mut sqe.cdw15];
    for (place, value) in places.into_iter().zip(cdws) {
        place.set(value);
    }
    sqe
}

impl Bench {
    fn new(kind: Kind, target: TargetView, kato_ms: u32) -> Bench {
        let now = Instant(1_000_000_000);
        let subsystem = match kind {
            Kind::Io => target.subsystems.get(NQN).cloned(),
            Kind::Discovery => None,
        };
        let shared = match &subsystem {
            Some(subsystem) => shared(NQN, subsystem.incarnation),
            None => shared(DISCOVERY_NQN, 0),
        };
        let config = ControllerConfig {
            kind,
            shared: Arc::new(shared),
            subsystem,
            target: Arc::new(target.clone()),
            transport: options(),
            listener: tcp([127, 0, 0, 1], 4420),
            local_addr: SocketAddr::from((Ipv4Addr::LOCALHOST, 4420)),
            kato_ms,
            admin_queue_entries: 32,
        };
        Bench { controller: Controller::new(config, now), target, now, cid: 0 }
    }

    /// An I/O controller that is not yet enabled.
    pub(in crate::target) fn disabled(subsystem: SubsystemView, kato_ms: u32) -> Bench {
        Bench::new(Kind::Io, target(vec![subsystem]), kato_ms)
    }

    /// An enabled I/O controller without keep alive timeout.
    pub(in crate::target) fn io(subsystem: SubsystemView) -> Bench {
        let mut bench = Bench::disabled(subsystem, 0);
        bench.enable();
        bench
    }

    /// An enabled discovery controller.
    pub(in crate::target) fn discovery(target: TargetView, kato_ms: u32) -> Bench {
        let mut bench = Bench::new(Kind::Discovery, target, kato_ms);
        bench.enable();
        bench
    }

    pub(in crate::target) fn enable(&mut self) {
        assert_eq!(self.set_cc(CC_ENABLED), Ok(Effect::Enabled));
    }

    pub(in crate::target) fn set_cc(&mut self, value: u64) -> Result<Effect, Status> {
        let set = FabricsCommand::PropertySet { property: Some(Property::Cc), offset: 0x14, size_bytes: 4, value };
        let outcome = self.controller.fabrics(&set, self.now);
        outcome.result.map(|value| {
            assert_eq!(value, 0);
            outcome.effect
        })
    }

    pub(in crate::target) fn property(&mut self, offset: u32, size_bytes: u8) -> Result<u64, Status> {
        let get = FabricsCommand::PropertyGet { property: Property::from_offset(offset), offset, size_bytes };
        let outcome = self.controller.fabrics(&get, self.now);
        assert_eq!(outcome.effect, Effect::None);
        outcome.result
    }

    pub(in crate::target) fn csts(&mut self) -> u64 {
        self.property(0x1c, 4).unwrap()
    }

    pub(in crate::target) fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
    }

    pub(in crate::target) fn env(&self) -> AdminEnv {
        AdminEnv { started: Instant(0) }
    }

    pub(in crate::target) fn submit(&mut self, slot: u16, mut sqe: Sqe, data: &mut Buffers) -> Admin {
        if sqe.cid.get() == 0 {
            self.cid += 1;
            sqe.cid.set(self.cid);
        }
        let env = self.env();
        self.controller.execute(slot, &sqe, data, &env, self.now)
    }

    /// A command with memory of `bytes` bytes, all FFh, for its answer.
    pub(in crate::target) fn admin(&mut self, sqe: Sqe, bytes: usize) -> Answer {
        let mut data = Buffers::heap(bytes);
        data.fill(0xff);
        match self.submit(0, sqe, &mut data) {
            Admin::Complete { cqe, send } => Answer { cqe, data: send.then(|| data.to_vec()) },
            other => panic!("{other:?}"),
        }
    }

    /// A command with data from the host.
    pub(in crate::target) fn admin_with(&mut self, sqe: Sqe, data: &[u8]) -> Answer {
        let mut data = Buffers::from(data);
        match self.submit(0, sqe, &mut data) {
            Admin::Complete { cqe, send } => Answer { cqe, data: send.then(|| data.to_vec()) },
            other => panic!("{other:?}"),
        }
    }

    pub(in crate::target) fn identify(&mut self, cns: u8, nsid: u32) -> Answer {
        self.admin(sqe(admin::IDENTIFY, nsid, [cns.into(), 0, 0, 0, 0, 0]), 4096)
    }

    /// Get Log Page of all namespaces from `offset`.
    pub(in crate::target) fn log_at(&mut self, lid: u8, rae: bool, offset: u32, bytes: usize) -> Answer {
        let numd = (bytes / 4 - 1) as u32;
        let cdw10 = u32::from(lid) | u32::from(rae) << 15 | numd << 16;
        self.admin(sqe(admin::GET_LOG_PAGE, 0xffff_ffff, [cdw10, numd >> 16, offset, 0, 0, 0]), bytes)
    }

    pub(in crate::target) fn log(&mut self, lid: u8, bytes: usize) -> Vec<u8> {
        self.log_at(lid, false, 0, bytes).ok()
    }

    pub(in crate::target) fn get_feature(&mut self, fid: u8, select: u32) -> Answer {
        self.admin(sqe(admin::GET_FEATURES, 0, [u32::from(fid) | select << 8, 0, 0, 0, 0, 0]), 0)
    }

    pub(in crate::target) fn set_feature(&mut self, fid: u8, cdw11: u32) -> Answer {
        self.admin(sqe(admin::SET_FEATURES, 0, [fid.into(), cdw11, 0, 0, 0, 0]), 0)
    }

    /// An Asynchronous Event Request. `true` if it was kept.
    pub(in crate::target) fn request_event(&mut self, slot: u16, cid: u16) -> bool {
        let mut command = sqe(admin::ASYNC_EVENT_REQUEST, 0, [0; 6]);
        command.cid.set(cid);
        match self.submit(slot, command, &mut Buffers::new()) {
            Admin::Parked => true,
            Admin::Complete { cqe, send } => {
                assert!(!send && cqe.status().same_code(Status::AER_LIMIT_EXCEEDED), "{cqe:?}");
                false
            }
            other => panic!("{other:?}"),
        }
    }

    /// The next completed event request: slot, cid and dword 0.
    pub(in crate::target) fn event(&mut self) -> Option<(u16, u16, u32)> {
        self.controller.pop_event().map(|(slot, cqe)| {
            assert_eq!(cqe.status(), Status::SUCCESS);
            (slot, cqe.cid.get(), cqe.dw0.get())
        })
    }

    /// Changes the target, and its subsystem if the test has one.
    pub(in crate::target) fn change(&mut self, change: impl FnOnce(&mut TargetView)) {
        self.target.generation += 1;
        change(&mut self.target);
        self.controller.target_changed(Arc::new(self.target.clone()));
    }

    pub(in crate::target) fn change_subsystem(&mut self, change: impl FnOnce(&mut SubsystemView)) {
        self.change(|target| change(Arc::make_mut(target.subsystems.get_mut(NQN).unwrap())));
    }

    pub(in crate::target) fn change_namespace(&mut self, nsid: u32, change: impl FnOnce(&mut NamespaceView)) {
        self.change_subsystem(|subsystem| change(Arc::make_mut(subsystem.namespaces.get_mut(&nsid).unwrap())));
    }
}
