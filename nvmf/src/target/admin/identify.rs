//! Identify: Base 5.1.13, NVM 4.1.5.
//!
//! # Decisions
//! - **Volatile write cache.** VWC says "present" always, because it is read once for each association: a device with a
//!   cache that is added later would never be flushed by a host that was told that there is none. Whether a namespace
//!   really has one is said of the namespace (CNS 08h, NSFEAT bit 5), where newer hosts look. Flush with NSID FFFFFFFFh
//!   is not supported, as most hosts never send it.
//! - **Atomicity.** One logical block, which is what every device gives (AWUN, AWUPF, ACWU).
//! - **Inactive NSIDs** give a zero-filled structure (CNS 00h, 05h, 08h); those above NN, and 0, are invalid.
//! - **NGUID** is the UUID for namespaces that were given neither NGUID nor EUI-64: some hosts want one of the two.
//! - No IEEE OUI and no PCI vendor are reported: the project has none.

use bdev::core::Geometry;
use reactor::Buffers;
use zerocopy::{FromZeros, IntoBytes};

use super::{FIRMWARE_REVISION, Fault, Step, byte, send};
use crate::rdma::capsule::MAX_BLOCKS;
use crate::spec::command::{Identify, NSID_ALL};
use crate::spec::fabrics::Vs;
use crate::spec::identify::{
    IDENTIFY_BYTES, IdentifyController, IdentifyControllerNvm, IdentifyNamespace, IdentifyNamespaceIndependent,
    IdentifyNamespaceNvm, IoCommandSets, NamespaceDescriptors, NamespaceList, anacap, cmic, cns, cntrltype, csi,
    ctratt, lpa, nsfeat, oncs, sgls,
};
use crate::spec::{Status, log};
use crate::target::controller::{
    COMMAND_QUIESCE_TIME, Controller, ERROR_LOG_ENTRIES, Kind, MAX_ABORTS, MAX_EVENT_REQUESTS,
};
use crate::target::io::MAX_COPY_RANGES;
use crate::target::view::{DISCOVERY_NQN, NamespaceView, SubsystemView, TransportKind};

/// Bytes of one source range of Copy: what MSSRL comes from.
const MAX_COPY_RANGE_BYTES: u64 = 16 << 20;
/// Bytes of all source ranges of one Copy: what MCL comes from. Bounds how long a host waits for one command.
const MAX_COPY_BYTES: u64 = 64 << 20;
/// Longest time that an ANA transition takes, in seconds (ANATT).
const ANA_TRANSITION_S: u8 = 10;
/// SQES, CQES: 64 and 16 bytes, required and largest.
const SQ_ENTRY_SIZES: u8 = 0x66;
const CQ_ENTRY_SIZES: u8 = 0x44;
/// VWC: present, and Flush of all namespaces at once is not supported.
const VWC_PRESENT: u8 = 0b10 << 1 | 1;
/// NSFEAT of CNS 08h: the namespace has no volatile write cache.
const NO_VOLATILE_CACHE: u8 = 1 << 5;
/// FRMW: one slot, read only.
const FIRMWARE_SLOTS: u8 = 1 << 1 | 1;
/// DCTYPE: a discovery controller that answers for its own target.
const DIRECT_DISCOVERY: u8 = 1;
/// Version of the NVM command set specification (1.1).
const NVM_VERSION: u32 = 0x0001_0100;
/// Bytes of the memory page that CAP.MPSMIN stands for, unit of MDTS.
const PAGE_BYTES: u32 = 4096;

/// What one Copy may do: MSSRL, MCL and MSRC as counts. Beyond it: Command Size Limit Exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyLimits {
    /// Blocks of one source range.
    pub range_blocks: u16,
    /// Blocks of all source ranges together.
    pub total_blocks: u32,
    /// Source ranges.
    pub ranges: u16,
}

/// The limits for a device, as Identify Namespace reports them.
pub fn copy_limits(geometry: &Geometry) -> CopyLimits {
    let blocks = |bytes: u64| bytes / u64::from(geometry.block_size);
    CopyLimits {
        range_blocks: u16::try_from(blocks(MAX_COPY_RANGE_BYTES)).unwrap_or(u16::MAX),
        total_blocks: u32::try_from(blocks(MAX_COPY_BYTES)).unwrap_or(u32::MAX),
        ranges: MAX_COPY_RANGES,
    }
}

impl Controller {
    pub(in crate::target) fn identify(&self, command: &Identify, data: &mut Buffers) -> Result<Step, Fault> {
        if self.config.kind == Kind::Discovery {
            return match command.cns {
                cns::CONTROLLER => send(data, self.identify_controller()?.as_bytes()),
                _ => Err(Fault::field(byte::CDW10)),
            };
        }
        let subsystem = self.own_subsystem()?;
        match command.cns {
            cns::NAMESPACE => {
                let answer = find(subsystem, command.nsid)?.map_or_else(IdentifyNamespace::new_zeroed, namespace);
                send(data, answer.as_bytes())
            }
            cns::CONTROLLER => send(data, self.identify_controller()?.as_bytes()),
            cns::ACTIVE_NAMESPACES => send(data, active(subsystem, command.nsid)?.as_bytes()),
            cns::ACTIVE_NAMESPACES_CSI => {
                check_csi(command)?;
                send(data, active(subsystem, command.nsid)?.as_bytes())
            }
            cns::NAMESPACE_DESCRIPTORS => {
                let ns = find(subsystem, command.nsid)?
                    .ok_or(Fault::at(Status::INVALID_NAMESPACE_OR_FORMAT.dnr(), byte::NSID))?;
                send(data, &descriptors(ns))
            }
            cns::NAMESPACE_CSI => {
                check_csi(command)?;
                // No metadata, no protection information, no large granularities: zeroes for active namespaces too.
                find(subsystem, command.nsid)?;
                send(data, IdentifyNamespaceNvm::new_zeroed().as_bytes())
            }
            cns::CONTROLLER_CSI => {
                check_csi(command)?;
                send(data, controller_nvm(subsystem).as_bytes())
            }
            cns::NAMESPACE_INDEPENDENT => {
                let answer = find(subsystem, command.nsid)?;
                let answer = answer.map_or_else(IdentifyNamespaceIndependent::new_zeroed, independent);
                send(data, answer.as_bytes())
            }
            cns::IO_COMMAND_SETS => {
                if ![NSID_ALL as u16, self.config.shared.cntlid].contains(&command.cntid) {
                    return Err(Fault::field(byte::CDW10 + 2));
                }
                let mut sets = IoCommandSets::new_zeroed();
                sets.vectors[0].set(1 << csi::NVM);
                send(data, sets.as_bytes())
            }
            _ => Err(Fault::field(byte::CDW10)),
        }
    }

    /// The subsystem; while the controller of a deleted one still lives, its commands fail.
    pub(super) fn own_subsystem(&self) -> Result<&SubsystemView, Fault> {
        self.config.subsystem.as_deref().ok_or(Status::INTERNAL_PATH_ERROR.into())
    }

    fn identify_controller(&self) -> Result<IdentifyController, Fault> {
        let config = &self.config;
        let mut id = IdentifyController::new_zeroed();
        id.mdts = (config.transport.max_io_size / PAGE_BYTES).max(1).ilog2() as u8;
        id.cntlid.set(config.shared.cntlid);
        id.ver.set(Vs::V2_1.0);
        id.oaes.set(self.optional_events().0);
        id.ctratt.set(ctratt::HOSTID_128 | ctratt::TRAFFIC_BASED_KEEP_ALIVE);
        for (field, delay) in [&mut id.crdt1, &mut id.crdt2, &mut id.crdt3].into_iter().zip(config.target.crdt) {
            field.set(delay);
        }
        id.aerl = MAX_EVENT_REQUESTS as u8 - 1;
        id.elpe = (ERROR_LOG_ENTRIES - 1) as u8;
        id.kas.set(config.transport.kas);
        id.sgls.set(sgl_support(config.listener.trtype));
        match config.kind {
            Kind::Io => self.fill_io_controller(&mut id)?,
            Kind::Discovery => {
                id.set_names("", "", FIRMWARE_REVISION);
                id.cntrltype = cntrltype::DISCOVERY;
                id.dctype = DIRECT_DISCOVERY;
                id.lpa = lpa::EXTENDED_DATA;
                id.maxcmd.set(max_commands(config.admin_queue_entries));
                id.set_subnqn(DISCOVERY_NQN);
            }
        }
        Ok(id)
    }

    fn fill_io_controller(&self, id: &mut IdentifyController) -> Result<(), Fault> {
        let config = &self.config;
        let subsystem = self.own_subsystem()?;
        id.set_names(&subsystem.serial_number, &subsystem.model_number, FIRMWARE_REVISION);
        id.set_subnqn(&subsystem.nqn);
        id.cntrltype = cntrltype::IO;
        id.cmic = cmic::MULTI_PORT | cmic::MULTI_CONTROLLER;
        id.acl = MAX_ABORTS - 1;
        id.cqt.set(COMMAND_QUIESCE_TIME.as_millis() as u16);
        id.frmw = FIRMWARE_SLOTS;
        id.lpa = lpa::COMMAND_EFFECTS | lpa::EXTENDED_DATA | lpa::SUPPORTED_LOG_PAGES;
        id.sqes = SQ_ENTRY_SIZES;
        id.cqes = CQ_ENTRY_SIZES;
        id.maxcmd.set(max_commands(config.transport.max_queue_depth));
        id.nn.set(subsystem.max_namespaces);
        id.mnan.set(subsystem.max_namespaces);
        id.oncs.set(oncs::COMPARE | oncs::DATASET_MANAGEMENT | oncs::WRITE_ZEROES | oncs::SAVE_SELECT | oncs::COPY);
        // Compare and Write; copy descriptor format 0h.
        id.fuses.set(1);
        id.cdfs.set(1);
        id.vwc = VWC_PRESENT;
        if subsystem.ana_reporting {
            id.cmic |= cmic::ANA;
            id.anatt = ANA_TRANSITION_S;
            id.anacap = anacap::OPTIMIZED | anacap::NON_OPTIMIZED | anacap::INACCESSIBLE;
            id.anagrpmax.set(subsystem.max_namespaces);
            id.nanagrpid.set(subsystem.max_namespaces);
        }
        id.ioccsz.set((64 + config.transport.in_capsule_data_size) / 16);
        id.iorcsz.set(1);
        id.msdbd = data_blocks(config.listener.trtype, config.transport.in_capsule_data_size);
        Ok(())
    }
}

fn max_commands(queue_entries: u32) -> u16 {
    u16::try_from(queue_entries).unwrap_or(u16::MAX)
}

/// Data block descriptors of one command (MSDBD). A list of them is in the capsule, so it has to fit there; and hosts in the
/// field take more than 4 KiB of data in a capsule together with more than one descriptor for a licence to cut that data up.
fn data_blocks(transport: TransportKind, in_capsule_bytes: u32) -> u8 {
    match transport {
        TransportKind::Rdma if (MAX_BLOCKS as u32 * 16..=4096).contains(&in_capsule_bytes) => MAX_BLOCKS as u8,
        TransportKind::Rdma | TransportKind::Tcp => 1,
    }
}

fn sgl_support(transport: TransportKind) -> u32 {
    let common = sgls::SUPPORTED | sgls::LONGER_THAN_DATA | sgls::OFFSET;
    match transport {
        TransportKind::Tcp => common | sgls::TRANSPORT,
        TransportKind::Rdma => common | sgls::KEYED,
    }
}

/// The namespace, or `None` if the NSID is valid but inactive.
fn find(subsystem: &SubsystemView, nsid: u32) -> Result<Option<&NamespaceView>, Fault> {
    if nsid == 0 || nsid > subsystem.max_namespaces {
        return Err(Fault::at(Status::INVALID_NAMESPACE_OR_FORMAT.dnr(), byte::NSID));
    }
    Ok(subsystem.namespaces.get(&nsid).map(|ns| &**ns))
}

fn check_csi(command: &Identify) -> Result<(), Fault> {
    if command.csi == csi::NVM { Ok(()) } else { Err(Fault::field(byte::CDW11 + 3)) }
}

fn active(subsystem: &SubsystemView, above: u32) -> Result<NamespaceList, Fault> {
    if above >= NSID_ALL - 1 {
        return Err(Fault::at(Status::INVALID_NAMESPACE_OR_FORMAT.dnr(), byte::NSID));
    }
    let mut list = NamespaceList::new_zeroed();
    for (place, (nsid, _)) in list.nsid.iter_mut().zip(subsystem.namespaces.range(above + 1..)) {
        place.set(*nsid);
    }
    Ok(list)
}

fn descriptors(ns: &NamespaceView) -> [u8; IDENTIFY_BYTES] {
    let mut page = [0; IDENTIFY_BYTES];
    let mut list = NamespaceDescriptors::new(&mut page);
    if let Some(eui64) = ns.eui64 {
        list.eui64(eui64);
    }
    if let Some(nguid) = nguid(ns) {
        list.nguid(nguid);
    }
    if !ns.uuid.is_nil() {
        list.uuid(*ns.uuid.as_bytes());
    }
    list.csi(csi::NVM);
    page
}

fn nguid(ns: &NamespaceView) -> Option<[u8; 16]> {
    ns.nguid.or_else(|| (ns.eui64.is_none() && !ns.uuid.is_nil()).then_some(*ns.uuid.as_bytes()))
}

fn namespace(ns: &NamespaceView) -> IdentifyNamespace {
    let geometry = &ns.geometry;
    let copy = copy_limits(geometry);
    // 0's-based; what does not fit is as good as the largest that does.
    let less_one = |blocks: u32| u16::try_from(blocks.max(1) - 1).unwrap_or(u16::MAX);
    let write_granularity = (geometry.physical_block_size / geometry.block_size).max(1);
    let deallocate_granularity = geometry.unmap_granularity.max(write_granularity);
    let mut id = IdentifyNamespace::new_zeroed();
    id.nsze.set(geometry.num_blocks);
    id.ncap.set(geometry.num_blocks);
    id.nuse.set(geometry.num_blocks);
    id.nvmcap.set(geometry.bytes().into());
    id.nsfeat = nsfeat::OPTIMAL;
    id.npwg.set(less_one(write_granularity));
    id.npwa.set(less_one(write_granularity));
    id.npdg.set(less_one(deallocate_granularity));
    id.npda.set(less_one(deallocate_granularity));
    // A multiple of NPWG, as the specification wants it.
    let boundary = geometry.optimal_io_boundary;
    let optimal_write =
        if boundary > 0 && boundary.is_multiple_of(write_granularity) { boundary } else { write_granularity };
    id.nows.set(less_one(optimal_write));
    id.noiob.set(u16::try_from(boundary).unwrap_or(0));
    id.lbaf[0].lbads = geometry.block_size.ilog2() as u8;
    // Controllers share namespaces.
    id.nmic = 1;
    if geometry.unmap_zeroes {
        // Deallocated blocks read as zeroes, and Write Zeroes may deallocate.
        id.dlfeat = 1 << 3 | 1;
    }
    id.mssrl.set(copy.range_blocks);
    id.mcl.set(copy.total_blocks);
    id.msrc = (copy.ranges - 1) as u8;
    id.anagrpid.set(ns.anagrpid);
    id.nsattr = geometry.read_only.into();
    id.nguid = nguid(ns).unwrap_or_default();
    id.eui64 = ns.eui64.unwrap_or_default();
    id
}

fn independent(ns: &NamespaceView) -> IdentifyNamespaceIndependent {
    let mut id = IdentifyNamespaceIndependent::new_zeroed();
    if !ns.geometry.volatile_cache {
        id.nsfeat = NO_VOLATILE_CACHE;
    }
    id.nmic = 1;
    id.anagrpid.set(ns.anagrpid);
    id.nsattr = ns.geometry.read_only.into();
    // Ready.
    id.nstat = 1;
    id
}

fn controller_nvm(subsystem: &SubsystemView) -> IdentifyControllerNvm {
    let mut id = IdentifyControllerNvm::new_zeroed();
    id.wzsl = subsystem.wzsl;
    id.dmrsl.set(u32::try_from(subsystem.dmrsl).unwrap_or(u32::MAX));
    id.ver.set(NVM_VERSION);
    id
}

// The log's trtype values are what the views use; a mismatch would misdirect every host.
const _: () = assert!(log::trtype::TCP == 3 && log::trtype::RDMA == 1);
