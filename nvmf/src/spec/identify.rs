//! Identify data structures: Base 5.1.13.2, NVM 4.1.5.
//!
//! Each is a whole 4096-byte answer, or an element of one. Start from
//! `new_zeroed()`: what is not set is then "not supported" or "not reported".

use super::fill_text;
use zerocopy::little_endian::{U16, U32, U64, U128};

/// Bytes of every Identify answer.
pub const IDENTIFY_BYTES: usize = 4096;

/// Values of CNS: Base 5.1.13.2.
pub mod cns {
    /// Namespace, NVM command set.
    pub const NAMESPACE: u8 = 0x00;
    /// Controller.
    pub const CONTROLLER: u8 = 0x01;
    /// List of active NSIDs.
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    /// Namespace identification descriptors.
    pub const NAMESPACE_DESCRIPTORS: u8 = 0x03;
    /// NVM set list.
    pub const NVM_SETS: u8 = 0x04;
    /// Namespace, I/O command set specific.
    pub const NAMESPACE_CSI: u8 = 0x05;
    /// Controller, I/O command set specific.
    pub const CONTROLLER_CSI: u8 = 0x06;
    /// List of active NSIDs of one I/O command set.
    pub const ACTIVE_NAMESPACES_CSI: u8 = 0x07;
    /// Namespace, independent of the I/O command set.
    pub const NAMESPACE_INDEPENDENT: u8 = 0x08;
    /// List of allocated NSIDs.
    pub const ALLOCATED_NAMESPACES: u8 = 0x10;
    /// Allocated namespace.
    pub const ALLOCATED_NAMESPACE: u8 = 0x11;
    /// Controllers attached to a namespace.
    pub const NAMESPACE_CONTROLLERS: u8 = 0x12;
    /// Controllers of the subsystem.
    pub const CONTROLLERS: u8 = 0x13;
    /// UUID list.
    pub const UUIDS: u8 = 0x17;
    /// Endurance group list.
    pub const ENDURANCE_GROUPS: u8 = 0x19;
    /// I/O command sets.
    pub const IO_COMMAND_SETS: u8 = 0x1c;
}

/// Command set identifiers: Base 5.1.13.2.
pub mod csi {
    /// NVM command set.
    pub const NVM: u8 = 0x00;
    /// Key value command set.
    pub const KEY_VALUE: u8 = 0x01;
    /// Zoned namespace command set.
    pub const ZONED: u8 = 0x02;
}

wire! {
    /// Identify Controller (CNS 01h): Base 5.1.13.2.
    pub struct IdentifyController: 4096 {
        /// 0: PCI vendor ID.
        pub vid: U16,
        /// 2: PCI subsystem vendor ID.
        pub ssvid: U16,
        /// 4: serial number, ASCII, padded with spaces.
        pub sn: [u8; 20],
        /// 24: model number, ASCII, padded with spaces.
        pub mn: [u8; 40],
        /// 64: firmware revision, ASCII, padded with spaces.
        pub fr: [u8; 8],
        /// 72: recommended arbitration burst, a power of two.
        pub rab: u8,
        /// 73: IEEE OUI, least significant byte first.
        pub ieee: [u8; 3],
        /// 76: multi-path and namespace sharing; see [`cmic`].
        pub cmic: u8,
        /// 77: maximum data transfer size, 2^n memory pages of CAP.MPSMIN; 0 is no limit.
        pub mdts: u8,
        /// 78: controller ID.
        pub cntlid: U16,
        /// 80: version, as in VS.
        pub ver: U32,
        /// 84: RTD3 resume latency, microseconds.
        pub rtd3r: U32,
        /// 88: RTD3 entry latency, microseconds.
        pub rtd3e: U32,
        /// 92: optional async events supported; see [`super::feature::AsyncEventConfig`].
        pub oaes: U32,
        /// 96: controller attributes; see [`ctratt`].
        pub ctratt: U32,
        /// 100: read recovery levels supported.
        pub rrls: U16,
        /// 102: boot partition capabilities.
        pub bpcap: u8,
        reserved103: u8,
        /// 104: NVM subsystem shutdown latency, microseconds.
        pub nssl: U32,
        reserved108: [u8; 2],
        /// 110: power loss signalling information.
        pub plsi: u8,
        /// 111: controller type; see [`cntrltype`].
        pub cntrltype: u8,
        /// 112: FRU globally unique identifier.
        pub fguid: [u8; 16],
        /// 128: command retry delay time 1, in 100 ms.
        pub crdt1: U16,
        /// 130: command retry delay time 2, in 100 ms.
        pub crdt2: U16,
        /// 132: command retry delay time 3, in 100 ms.
        pub crdt3: U16,
        /// 134: controller reachability capabilities.
        pub crcap: u8,
        reserved135: [u8; 118],
        /// 253: NVM subsystem report (management interface).
        pub nvmsr: u8,
        /// 254: VPD write cycle information.
        pub vwci: u8,
        /// 255: management endpoint capabilities.
        pub mec: u8,
        /// 256: optional admin commands; see [`oacs`].
        pub oacs: U16,
        /// 258: abort command limit, 0's-based.
        pub acl: u8,
        /// 259: asynchronous event request limit, 0's-based.
        pub aerl: u8,
        /// 260: firmware updates: bit 0 slot 1 read only, bits 3:1 slots.
        pub frmw: u8,
        /// 261: log page attributes; see [`lpa`].
        pub lpa: u8,
        /// 262: error log page entries, 0's-based.
        pub elpe: u8,
        /// 263: number of power states, 0's-based.
        pub npss: u8,
        /// 264: admin vendor specific command configuration.
        pub avscc: u8,
        /// 265: autonomous power state transition attributes.
        pub apsta: u8,
        /// 266: warning composite temperature, kelvin.
        pub wctemp: U16,
        /// 268: critical composite temperature, kelvin.
        pub cctemp: U16,
        /// 270: maximum time for firmware activation, in 100 ms.
        pub mtfa: U16,
        /// 272: host memory buffer preferred size, in 4 KiB.
        pub hmpre: U32,
        /// 276: host memory buffer minimum size, in 4 KiB.
        pub hmmin: U32,
        /// 280: total NVM capacity, bytes.
        pub tnvmcap: U128,
        /// 296: unallocated NVM capacity, bytes.
        pub unvmcap: U128,
        /// 312: replay protected memory block support.
        pub rpmbs: U32,
        /// 316: extended device self-test time, minutes.
        pub edstt: U16,
        /// 318: device self-test options.
        pub dsto: u8,
        /// 319: firmware update granularity, in 4 KiB.
        pub fwug: u8,
        /// 320: keep alive support: granularity in 100 ms, 0 for none.
        pub kas: U16,
        /// 322: host controlled thermal management attributes.
        pub hctma: U16,
        /// 324: minimum thermal management temperature, kelvin.
        pub mntmt: U16,
        /// 326: maximum thermal management temperature, kelvin.
        pub mxtmt: U16,
        /// 328: sanitize capabilities.
        pub sanicap: U32,
        /// 332: host memory buffer minimum descriptor entry size, in 4 KiB.
        pub hmminds: U32,
        /// 336: host memory maximum descriptors entries.
        pub hmmaxd: U16,
        /// 338: highest NVM set identifier.
        pub nsetidmax: U16,
        /// 340: highest endurance group identifier.
        pub endgidmax: U16,
        /// 342: ANA transition time, seconds.
        pub anatt: u8,
        /// 343: ANA capabilities; see [`anacap`].
        pub anacap: u8,
        /// 344: highest ANA group identifier.
        pub anagrpmax: U32,
        /// 348: number of ANA groups.
        pub nanagrpid: U32,
        /// 352: persistent event log size, in 64 KiB.
        pub pels: U32,
        /// 356: domain identifier.
        pub did: U16,
        /// 358: key per I/O capabilities.
        pub kpioc: u8,
        reserved359: u8,
        /// 360: maximum processing time for firmware activation without reset, in 100 ms.
        pub mptfawr: U16,
        reserved362: [u8; 6],
        /// 368: max endurance group capacity, bytes.
        pub megcap: U128,
        /// 384: temperature threshold hysteresis attributes.
        pub tmpthha: u8,
        reserved385: u8,
        /// 386: command quiesce time, in milliseconds.
        pub cqt: U16,
        reserved388: [u8; 124],
        /// 512: submission queue entry size: required in 3:0, maximum in 7:4, powers of two.
        pub sqes: u8,
        /// 513: completion queue entry size: required in 3:0, maximum in 7:4, powers of two.
        pub cqes: u8,
        /// 514: maximum outstanding commands per queue; mandatory on fabrics.
        pub maxcmd: U16,
        /// 516: highest NSID.
        pub nn: U32,
        /// 520: optional NVM commands; see [`oncs`].
        pub oncs: U16,
        /// 522: fused operations: bit 0 Compare and Write.
        pub fuses: U16,
        /// 524: Format NVM attributes.
        pub fna: u8,
        /// 525: volatile write cache: bit 0 present, bits 2:1 Flush with NSID FFFFFFFFh
        /// (10b not supported, 11b supported).
        pub vwc: u8,
        /// 526: atomic write unit normal, logical blocks, 0's-based.
        pub awun: U16,
        /// 528: atomic write unit power fail, logical blocks, 0's-based.
        pub awupf: U16,
        /// 530: I/O command set vendor specific command configuration.
        pub icsvscc: u8,
        /// 531: namespace write protection capabilities.
        pub nwpc: u8,
        /// 532: atomic compare and write unit, logical blocks, 0's-based.
        pub acwu: U16,
        /// 534: copy descriptor formats supported, a bit each.
        pub cdfs: U16,
        /// 536: SGL support; see [`sgls`].
        pub sgls: U32,
        /// 540: maximum number of allowed namespaces.
        pub mnan: U32,
        /// 544: maximum domain namespace attachments.
        pub maxdna: U128,
        /// 560: maximum I/O controller namespace attachments.
        pub maxcna: U32,
        /// 564: optimal aggregated queue depth.
        pub oaqd: U32,
        reserved568: [u8; 200],
        /// 768: NQN of the subsystem, ended and padded with zeros.
        pub subnqn: [u8; 256],
        reserved1024: [u8; 768],
        /// 1792: I/O queue command capsule size, in 16 bytes.
        pub ioccsz: U32,
        /// 1796: I/O queue response capsule size, in 16 bytes.
        pub iorcsz: U32,
        /// 1800: in-capsule data offset behind the entry, in 16 bytes.
        pub icdoff: U16,
        /// 1802: fabrics controller attributes: bit 0 static controller model.
        pub fcatt: u8,
        /// 1803: maximum SGL data block descriptors; 0 is no limit.
        pub msdbd: u8,
        /// 1804: optional fabrics commands: bit 0 Disconnect.
        pub ofcs: U16,
        /// 1806: discovery controller type.
        pub dctype: u8,
        reserved1807: [u8; 241],
        /// 2048: power state descriptors.
        pub psd: [PowerState; 32],
        /// 3072: vendor specific.
        pub vendor: [u8; 1024],
    }
}

impl IdentifyController {
    /// Sets SN, MN and FR, padded with spaces.
    pub fn set_names(&mut self, serial: &str, model: &str, firmware: &str) {
        fill_text(&mut self.sn, serial, b' ');
        fill_text(&mut self.mn, model, b' ');
        fill_text(&mut self.fr, firmware, b' ');
    }

    /// Sets SUBNQN, padded with zeros.
    pub fn set_subnqn(&mut self, nqn: &str) {
        fill_text(&mut self.subnqn, nqn, 0);
    }
}

wire! {
    /// Power State Descriptor: Base 5.1.13.2.
    pub struct PowerState: 32 {
        /// 0: maximum power, in 10 mW (or 0.1 mW, by bit 0 of byte 3).
        pub mp: U16,
        reserved2: u8,
        /// 3: bit 0 scale of MP, bit 1 non-operational.
        pub flags: u8,
        /// 4: entry latency, microseconds.
        pub enlat: U32,
        /// 8: exit latency, microseconds.
        pub exlat: U32,
        /// 12: relative read throughput.
        pub rrt: u8,
        /// 13: relative read latency.
        pub rrl: u8,
        /// 14: relative write throughput.
        pub rwt: u8,
        /// 15: relative write latency.
        pub rwl: u8,
        /// 16: idle power.
        pub idlp: U16,
        /// 18: scale of idle power in bits 7:6.
        pub ips: u8,
        reserved19: u8,
        /// 20: active power.
        pub actp: U16,
        /// 22: scale of active power in 7:6, workload in 2:0.
        pub aps: u8,
        reserved23: [u8; 9],
    }
}

/// Bits of CMIC.
pub mod cmic {
    /// The subsystem may have several ports.
    pub const MULTI_PORT: u8 = 1 << 0;
    /// The subsystem may have several controllers.
    pub const MULTI_CONTROLLER: u8 = 1 << 1;
    /// ANA reporting.
    pub const ANA: u8 = 1 << 3;
}

/// Bits of CTRATT.
pub mod ctratt {
    /// 128-bit host identifiers.
    pub const HOSTID_128: u32 = 1 << 0;
    /// Any command counts as keep alive.
    pub const TRAFFIC_BASED_KEEP_ALIVE: u32 = 1 << 6;
    /// UUID list.
    pub const UUID_LIST: u32 = 1 << 9;
    /// Extended LBA formats.
    pub const EXTENDED_LBA_FORMATS: u32 = 1 << 15;
}

/// Values of CNTRLTYPE.
pub mod cntrltype {
    /// I/O controller.
    pub const IO: u8 = 1;
    /// Discovery controller.
    pub const DISCOVERY: u8 = 2;
    /// Administrative controller.
    pub const ADMINISTRATIVE: u8 = 3;
}

/// Bits of OACS.
pub mod oacs {
    /// Security Send and Receive.
    pub const SECURITY: u16 = 1 << 0;
    /// Format NVM.
    pub const FORMAT: u16 = 1 << 1;
    /// Firmware download and commit.
    pub const FIRMWARE: u16 = 1 << 2;
    /// Namespace management and attachment.
    pub const NAMESPACE_MANAGEMENT: u16 = 1 << 3;
    /// Get LBA Status.
    pub const GET_LBA_STATUS: u16 = 1 << 9;
}

/// Bits of LPA.
pub mod lpa {
    /// SMART log per namespace.
    pub const SMART_PER_NAMESPACE: u8 = 1 << 0;
    /// Commands Supported and Effects log.
    pub const COMMAND_EFFECTS: u8 = 1 << 1;
    /// 32-bit NUMD and offsets in Get Log Page.
    pub const EXTENDED_DATA: u8 = 1 << 2;
    /// Telemetry logs.
    pub const TELEMETRY: u8 = 1 << 3;
    /// Persistent event log.
    pub const PERSISTENT_EVENT: u8 = 1 << 4;
    /// Supported Log Pages, Feature Identifiers Effects and the like.
    pub const SUPPORTED_LOG_PAGES: u8 = 1 << 5;
}

/// Bits of ONCS.
pub mod oncs {
    /// Compare.
    pub const COMPARE: u16 = 1 << 0;
    /// Write Uncorrectable.
    pub const WRITE_UNCORRECTABLE: u16 = 1 << 1;
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: u16 = 1 << 2;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u16 = 1 << 3;
    /// The SV bit of Set Features and SEL of Get Features.
    pub const SAVE_SELECT: u16 = 1 << 4;
    /// Reservations.
    pub const RESERVATIONS: u16 = 1 << 5;
    /// Timestamp feature.
    pub const TIMESTAMP: u16 = 1 << 6;
    /// Verify.
    pub const VERIFY: u16 = 1 << 7;
    /// Copy.
    pub const COPY: u16 = 1 << 8;
}

/// Bits of SGLS.
pub mod sgls {
    /// SGLs without alignment or granularity demands (01b in bits 1:0).
    pub const SUPPORTED: u32 = 1 << 0;
    /// SGLs with dword alignment (10b in bits 1:0).
    pub const SUPPORTED_DWORD_ALIGNED: u32 = 1 << 1;
    /// Keyed data blocks.
    pub const KEYED: u32 = 1 << 2;
    /// Bit buckets.
    pub const BIT_BUCKET: u32 = 1 << 16;
    /// SGLs longer than the data.
    pub const LONGER_THAN_DATA: u32 = 1 << 18;
    /// The address field may be an offset (in-capsule data).
    pub const OFFSET: u32 = 1 << 20;
    /// Transport data blocks.
    pub const TRANSPORT: u32 = 1 << 21;
}

/// Bits of ANACAP.
pub mod anacap {
    /// Reports the optimized state.
    pub const OPTIMIZED: u8 = 1 << 0;
    /// Reports the non-optimized state.
    pub const NON_OPTIMIZED: u8 = 1 << 1;
    /// Reports the inaccessible state.
    pub const INACCESSIBLE: u8 = 1 << 2;
    /// Reports the persistent loss state.
    pub const PERSISTENT_LOSS: u8 = 1 << 3;
    /// Reports the change state.
    pub const CHANGE: u8 = 1 << 4;
    /// ANAGRPID of an attached namespace does not change.
    pub const GROUP_IS_FIXED: u8 = 1 << 6;
    /// Namespace management takes a non-zero ANAGRPID.
    pub const GROUP_BY_MANAGEMENT: u8 = 1 << 7;
}

wire! {
    /// Identify Namespace (CNS 00h): NVM 4.1.5.
    pub struct IdentifyNamespace: 4096 {
        /// 0: size, logical blocks.
        pub nsze: U64,
        /// 8: capacity, logical blocks.
        pub ncap: U64,
        /// 16: utilization, logical blocks.
        pub nuse: U64,
        /// 24: features; see [`nsfeat`].
        pub nsfeat: u8,
        /// 25: number of LBA formats, 0's-based.
        pub nlbaf: u8,
        /// 26: LBA format in use: bits 3:0, and 6:5 for the high bits; bit 4 extended LBA.
        pub flbas: u8,
        /// 27: metadata capabilities.
        pub mc: u8,
        /// 28: protection information capabilities.
        pub dpc: u8,
        /// 29: protection information settings.
        pub dps: u8,
        /// 30: bit 0: several controllers may attach.
        pub nmic: u8,
        /// 31: reservation capabilities; see [`rescap`].
        pub rescap: u8,
        /// 32: format progress.
        pub fpi: u8,
        /// 33: deallocate: 2:0 what a read returns (1 zeroes), bit 3 in Write Zeroes, bit 4 guard.
        pub dlfeat: u8,
        /// 34: atomic write unit normal, 0's-based.
        pub nawun: U16,
        /// 36: atomic write unit power fail, 0's-based.
        pub nawupf: U16,
        /// 38: atomic compare and write unit, 0's-based.
        pub nacwu: U16,
        /// 40: atomic boundary size normal, 0's-based.
        pub nabsn: U16,
        /// 42: atomic boundary offset.
        pub nabo: U16,
        /// 44: atomic boundary size power fail, 0's-based.
        pub nabspf: U16,
        /// 46: optimal I/O boundary, logical blocks.
        pub noiob: U16,
        /// 48: NVM capacity, bytes.
        pub nvmcap: U128,
        /// 64: preferred write granularity, 0's-based.
        pub npwg: U16,
        /// 66: preferred write alignment, 0's-based.
        pub npwa: U16,
        /// 68: preferred deallocate granularity, 0's-based.
        pub npdg: U16,
        /// 70: preferred deallocate alignment, 0's-based.
        pub npda: U16,
        /// 72: optimal write size, 0's-based.
        pub nows: U16,
        /// 74: maximum single source range length of Copy, logical blocks.
        pub mssrl: U16,
        /// 76: maximum length of Copy, logical blocks.
        pub mcl: U32,
        /// 80: maximum source range count of Copy, 0's-based.
        pub msrc: u8,
        /// 81: key per I/O status.
        pub kpios: u8,
        /// 82: number of unique attribute LBA formats.
        pub nulbaf: u8,
        reserved83: u8,
        /// 84: key per I/O data access alignment and granularity.
        pub kpiodaag: U32,
        reserved88: [u8; 4],
        /// 92: ANA group.
        pub anagrpid: U32,
        reserved96: [u8; 3],
        /// 99: attributes; bit 0 write protected.
        pub nsattr: u8,
        /// 100: NVM set.
        pub nvmsetid: U16,
        /// 102: endurance group.
        pub endgid: U16,
        /// 104: NGUID, big-endian.
        pub nguid: [u8; 16],
        /// 120: EUI-64, big-endian.
        pub eui64: [u8; 8],
        /// 128: LBA formats.
        pub lbaf: [LbaFormat; 64],
        /// 384: vendor specific.
        pub vendor: [u8; 3712],
    }
}

wire! {
    /// LBA Format: NVM 4.1.5.
    pub struct LbaFormat: 4 {
        /// Metadata bytes per logical block.
        pub ms: U16,
        /// Logical block size, a power of two (9 or more; 0: not available).
        pub lbads: u8,
        /// Relative performance, 0 the best.
        pub rp: u8,
    }
}

/// Bits of NSFEAT.
pub mod nsfeat {
    /// Thin provisioning.
    pub const THIN: u8 = 1 << 0;
    /// The namespace's own atomic write fields are set.
    pub const ATOMICS: u8 = 1 << 1;
    /// Deallocated blocks can give an error.
    pub const DEALLOCATED_ERROR: u8 = 1 << 2;
    /// NGUID and EUI64 are never reused.
    pub const UID_REUSE: u8 = 1 << 3;
    /// NPWG, NPWA, NPDG, NPDA and NOWS are set (01b in bits 5:4).
    pub const OPTIMAL: u8 = 1 << 4;
}

/// Bits of RESCAP.
pub mod rescap {
    /// Persist through power loss.
    pub const PTPL: u8 = 1 << 0;
    /// Write exclusive.
    pub const WRITE_EXCLUSIVE: u8 = 1 << 1;
    /// Exclusive access.
    pub const EXCLUSIVE_ACCESS: u8 = 1 << 2;
    /// Write exclusive, registrants only.
    pub const WRITE_EXCLUSIVE_REGISTRANTS: u8 = 1 << 3;
    /// Exclusive access, registrants only.
    pub const EXCLUSIVE_ACCESS_REGISTRANTS: u8 = 1 << 4;
    /// Write exclusive, all registrants.
    pub const WRITE_EXCLUSIVE_ALL: u8 = 1 << 5;
    /// Exclusive access, all registrants.
    pub const EXCLUSIVE_ACCESS_ALL: u8 = 1 << 6;
    /// Ignore existing key as of 1.3.
    pub const IGNORE_EXISTING_KEY: u8 = 1 << 7;
}

wire! {
    /// List of NSIDs in rising order, ended by zero (CNS 02h, 07h, 10h; log 04h).
    pub struct NamespaceList: 4096 {
        /// The identifiers.
        pub nsid: [U32; 1024],
    }
}

wire! {
    /// List of controllers (CNS 12h, 13h).
    pub struct ControllerList: 4096 {
        /// Identifiers that follow.
        pub count: U16,
        /// The identifiers in rising order.
        pub cntlid: [U16; 2047],
    }
}

/// Namespace Identification Descriptors (CNS 03h): Base 5.1.13.2.
///
/// ```text
/// byte 0      1      2        4
/// +------+------+----------+------------+
/// | NIDT | NIDL | reserved | NID (NIDL) |   ... ended by a NIDL of zero
/// +------+------+----------+------------+
/// ```
#[derive(Debug)]
pub struct NamespaceDescriptors<'a> {
    page: &'a mut [u8],
    used: usize,
}

impl<'a> NamespaceDescriptors<'a> {
    /// Clears `page` and starts a list in it.
    pub fn new(page: &'a mut [u8; IDENTIFY_BYTES]) -> Self {
        page.fill(0);
        Self { page, used: 0 }
    }

    /// NIDT of an EUI-64.
    pub const EUI64: u8 = 1;
    /// NIDT of an NGUID.
    pub const NGUID: u8 = 2;
    /// NIDT of a UUID.
    pub const UUID: u8 = 3;
    /// NIDT of a command set identifier.
    pub const CSI: u8 = 4;

    /// Type and value of each descriptor of a page, up to the end of the list or the first that does not fit.
    pub fn parse(page: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
        let mut rest = page;
        std::iter::from_fn(move || {
            let (&[nidt, nidl, ..], body) = (rest.first_chunk::<4>()?, &rest[4..]);
            if nidl == 0 || usize::from(nidl) > body.len() {
                return None;
            }
            let (nid, behind) = body.split_at(nidl.into());
            rest = behind;
            Some((nidt, nid))
        })
    }

    /// Type 1h. EUI-64, big-endian.
    pub fn eui64(&mut self, eui64: [u8; 8]) {
        self.push(Self::EUI64, &eui64);
    }

    /// Type 2h. NGUID, big-endian.
    pub fn nguid(&mut self, nguid: [u8; 16]) {
        self.push(Self::NGUID, &nguid);
    }

    /// Type 3h. UUID as its 16 bytes stand in RFC 9562.
    pub fn uuid(&mut self, uuid: [u8; 16]) {
        self.push(Self::UUID, &uuid);
    }

    /// Type 4h. Command set identifier.
    pub fn csi(&mut self, csi: u8) {
        self.push(Self::CSI, &[csi]);
    }

    fn push(&mut self, nidt: u8, nid: &[u8]) {
        let at = self.used;
        let end = at + 4 + nid.len();
        assert!(end <= self.page.len(), "identification descriptors fill the page");
        self.page[at] = nidt;
        self.page[at + 1] = nid.len() as u8;
        self.page[at + 4..end].copy_from_slice(nid);
        self.used = end;
    }
}

wire! {
    /// Identify Namespace of the NVM command set (CNS 05h, CSI 00h): NVM 4.1.5.
    pub struct IdentifyNamespaceNvm: 4096 {
        /// 0: logical block storage tag mask.
        pub lbstm: U64,
        /// 8: protection information capabilities.
        pub pic: u8,
        /// 9: protection information format attribute.
        pub pifa: u8,
        reserved10: [u8; 2],
        /// 12: extended LBA formats: STS in 6:0, PIF in 8:7, QPIF in 12:9.
        pub elbaf: [U32; 64],
        /// 268: preferred deallocate granularity, large.
        pub npdgl: U32,
        /// 272: preferred read granularity.
        pub nprg: U32,
        /// 276: preferred read alignment.
        pub npra: U32,
        /// 280: optimal read size.
        pub nors: U32,
        /// 284: preferred deallocate alignment, large.
        pub npdal: U32,
        reserved288: [u8; 3808],
    }
}

wire! {
    /// Identify Controller of the NVM command set (CNS 06h, CSI 00h): NVM 4.1.5.
    ///
    /// Sizes are powers of two in units of the smallest memory page; 0 is no limit.
    pub struct IdentifyControllerNvm: 4096 {
        /// 0: Verify size limit.
        pub vsl: u8,
        /// 1: Write Zeroes size limit.
        pub wzsl: u8,
        /// 2: Write Uncorrectable size limit.
        pub wusl: u8,
        /// 3: ranges of one Dataset Management; 0 is not reported.
        pub dmrl: u8,
        /// 4: logical blocks of one range; 0 is not reported.
        pub dmrsl: U32,
        /// 8: logical blocks of all ranges; 0 is not reported.
        pub dmsl: U64,
        /// 16: key per I/O capabilities.
        pub kpiocap: u8,
        /// 17: Write Zeroes with deallocate size limit.
        pub wzdsl: u8,
        /// 18: admin optional command support.
        pub aocs: U16,
        /// 20: version of the NVM command set specification.
        pub ver: U32,
        reserved24: [u8; 4072],
    }
}

wire! {
    /// I/O Command Set Independent Identify Namespace (CNS 08h): Base 5.1.13.2.
    pub struct IdentifyNamespaceIndependent: 4096 {
        /// 0: features: bit 3 UID reuse, bit 4 rotational, bit 5 volatile write cache not present.
        pub nsfeat: u8,
        /// 1: bit 0: several controllers may attach.
        pub nmic: u8,
        /// 2: reservation capabilities; see [`rescap`].
        pub rescap: u8,
        /// 3: format progress.
        pub fpi: u8,
        /// 4: ANA group.
        pub anagrpid: U32,
        /// 8: attributes; bit 0 write protected.
        pub nsattr: u8,
        reserved9: u8,
        /// 10: NVM set.
        pub nvmsetid: U16,
        /// 12: endurance group.
        pub endgid: U16,
        /// 14: status: bit 0 ready, bits 2:1 I/O impacted.
        pub nstat: u8,
        /// 15: key per I/O status.
        pub kpios: u8,
        /// 16: maximum key tag.
        pub maxkt: U16,
        reserved18: [u8; 2],
        /// 20: reachability group.
        pub rgrpid: U32,
        reserved24: [u8; 4072],
    }
}

wire! {
    /// I/O Command Sets (CNS 1Ch): Base 5.1.13.2.
    pub struct IoCommandSets: 4096 {
        /// Combinations that can be enabled together, a bit for each CSI.
        pub vectors: [U64; 512],
    }
}

#[cfg(test)]
mod tests;
