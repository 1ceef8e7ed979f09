//! The target as reactors see it: immutable, replaced as a whole at each change.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bdev::core::{BdevInfo, Geometry};
use uuid::Uuid;

/// NQN of the discovery subsystem that every target has (Base 3.1.3.3).
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";

/// Everything that a reactor has to know.
#[derive(Clone, Debug, Default)]
pub struct TargetView {
    /// Counts the views.
    pub generation: u64,
    /// Counts the changes that a discovery log shows (GENCTR).
    pub discovery_generation: u64,
    /// NVM subsystems by NQN. The discovery subsystem is not among them.
    pub subsystems: BTreeMap<String, Arc<SubsystemView>>,
    /// Addresses that were opened for the discovery service by name. It answers on all listeners' too.
    pub discovery_listeners: Vec<ListenAddress>,
    /// Transports by type.
    pub transports: BTreeMap<TransportKind, TransportOptions>,
    /// Other discovery services to refer hosts to.
    pub referrals: Vec<Referral>,
    /// Which parts of a listener's address must match the one that a host came through for the listener to be in the log
    /// that this host reads.
    pub discovery_filter: DiscoveryFilter,
    /// Command retry delay times 1 to 3, in units of 100 ms (Identify Controller CRDT).
    pub crdt: [u16; 3],
}

/// What a discovery log is filtered by. All false: everything is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiscoveryFilter {
    /// Same transport type.
    pub transport: bool,
    /// Same address.
    pub address: bool,
    /// Same service identifier.
    pub svcid: bool,
}

/// One NVM subsystem.
#[derive(Clone, Debug)]
pub struct SubsystemView {
    /// Drawn anew when a subsystem is created, so that a deleted and recreated one is not taken for the old one.
    pub incarnation: u64,
    /// Its NQN, at most 223 bytes.
    pub nqn: String,
    /// Serial number, at most 20 ASCII characters.
    pub serial_number: String,
    /// Model number, at most 40 ASCII characters.
    pub model_number: String,
    /// Largest NSID plus one is at most this plus one: NN.
    pub max_namespaces: u32,
    /// Smallest controller identifier to give out.
    pub min_cntlid: u16,
    /// Largest controller identifier to give out, at most FFEFh.
    pub max_cntlid: u16,
    /// Whether any host may connect.
    pub allow_any_host: bool,
    /// The hosts that may.
    pub hosts: Vec<String>,
    /// Asymmetric namespace access is reported.
    pub ana_reporting: bool,
    /// Largest dataset management range to report (DMRSL), in blocks; 0 reports none.
    pub dmrsl: u64,
    /// Largest write zeroes to report (WZSL), as a power of two in units of the minimum page size; 0 reports none.
    pub wzsl: u8,
    /// Namespaces by NSID.
    pub namespaces: BTreeMap<u32, Arc<NamespaceView>>,
    /// Where it can be reached.
    pub listeners: Vec<Arc<ListenerView>>,
}

impl SubsystemView {
    /// Whether `hostnqn` may connect.
    pub fn allows(&self, hostnqn: &str) -> bool {
        self.allow_any_host || self.hosts.iter().any(|host| host == hostnqn)
    }

    /// The listener at `address`, if the subsystem can be reached there.
    pub fn listener(&self, address: &ListenAddress) -> Option<&Arc<ListenerView>> {
        self.listeners.iter().find(|listener| listener.address == *address)
    }
}

/// One namespace.
#[derive(Clone, Debug)]
pub struct NamespaceView {
    /// Drawn anew when a namespace is added, so that a removed and added one is not taken for the old one.
    pub incarnation: u64,
    /// Its identifier.
    pub nsid: u32,
    /// What it is made of.
    pub bdev: Arc<BdevInfo>,
    /// The device's geometry as of this view.
    pub geometry: Geometry,
    /// Its UUID; the device's unless another was asked for.
    pub uuid: Uuid,
    /// Namespace globally unique identifier.
    pub nguid: Option<[u8; 16]>,
    /// IEEE extended unique identifier.
    pub eui64: Option<[u8; 8]>,
    /// ANA group, from 1.
    pub anagrpid: u32,
}

/// A transport's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TransportKind {
    /// NVMe/RDMA.
    Rdma,
    /// NVMe/TCP.
    Tcp,
}

impl TransportKind {
    /// The name that RPCs use.
    pub fn name(self) -> &'static str {
        match self {
            TransportKind::Rdma => "RDMA",
            TransportKind::Tcp => "TCP",
        }
    }

    /// TRTYPE of a discovery log entry.
    pub fn trtype(self) -> u8 {
        match self {
            TransportKind::Rdma => 1,
            TransportKind::Tcp => 3,
        }
    }
}

/// Where something listens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenAddress {
    /// Transport.
    pub trtype: TransportKind,
    /// Address; unspecified (0.0.0.0, ::) for all of the family's.
    pub traddr: IpAddr,
    /// Service identifier: the port.
    pub trsvcid: u16,
}

impl ListenAddress {
    /// As a socket address.
    pub fn socket_addr(&self) -> SocketAddr {
        SocketAddr::new(self.traddr, self.trsvcid)
    }

    /// The name of the address family that RPCs use.
    pub fn adrfam(&self) -> &'static str {
        if self.traddr.is_ipv4() { "IPv4" } else { "IPv6" }
    }
}

/// One address of one subsystem.
#[derive(Clone, Debug)]
pub struct ListenerView {
    /// Where.
    pub address: ListenAddress,
    /// PORTID of its discovery log entries.
    pub port_id: u16,
    /// State of ANA groups other than optimized.
    pub ana_states: BTreeMap<u32, AnaState>,
}

impl ListenerView {
    /// The state of an ANA group through this listener.
    pub fn ana_state(&self, group: u32) -> AnaState {
        self.ana_states.get(&group).copied().unwrap_or(AnaState::Optimized)
    }
}

/// Asymmetric namespace access state (Base 8.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnaState {
    /// 01h
    Optimized,
    /// 02h
    NonOptimized,
    /// 03h
    Inaccessible,
}

impl AnaState {
    /// The name that RPCs use.
    pub fn name(self) -> &'static str {
        match self {
            AnaState::Optimized => "optimized",
            AnaState::NonOptimized => "non_optimized",
            AnaState::Inaccessible => "inaccessible",
        }
    }

    /// The value on the wire.
    pub fn value(self) -> u8 {
        match self {
            AnaState::Optimized => 1,
            AnaState::NonOptimized => 2,
            AnaState::Inaccessible => 3,
        }
    }
}

/// Another discovery service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Referral {
    /// Where.
    pub address: ListenAddress,
    /// Its NQN, usually [`DISCOVERY_NQN`].
    pub subnqn: String,
    /// A secure channel is required.
    pub secure_channel: bool,
}

/// `nvmf_create_transport`: what is the same for all of a transport's connections. The defaults are SPDK's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransportOptions {
    /// Largest submission queue, in entries.
    pub max_queue_depth: u32,
    /// I/O queues that one controller may have.
    pub max_io_qpairs_per_ctrlr: u16,
    /// Data in a command capsule of an I/O queue, in bytes.
    pub in_capsule_data_size: u32,
    /// Largest data transfer of one command, in bytes; a power of two times 4096 (MDTS).
    pub max_io_size: u32,
    /// Largest admin queue, in entries.
    pub max_aq_depth: u32,
    /// Completions without error ride on the last data PDU (TCP).
    pub c2h_success: bool,
    /// Seconds after which an aborted command that does not end is given up.
    pub abort_timeout_sec: u32,
    /// Granularity of the keep alive timeout, in units of 100 ms (KAS).
    pub kas: u16,
    /// Shortest keep alive timeout, in milliseconds.
    pub min_kato_ms: u32,
    /// What was set beyond that, kept for showing and saving: name and value as given.
    pub extra: BTreeMap<String, serde_json::Value>,
}

impl Default for TransportOptions {
    fn default() -> Self {
        TransportOptions {
            max_queue_depth: 128,
            max_io_qpairs_per_ctrlr: 127,
            in_capsule_data_size: 8192,
            max_io_size: 131_072,
            max_aq_depth: 128,
            c2h_success: true,
            abort_timeout_sec: 1,
            kas: 100,
            min_kato_ms: 10_000,
            extra: BTreeMap::new(),
        }
    }
}
