//! Get Log Page: Base 5.1.12.
//!
//! A log page is made whole and the wanted part of it is cut out, at any offset; past its end there are zeroes. Reading
//! one without RAE, wherever, acknowledges the event that is about it.
//!
//! # Decisions
//! - **Temperature** is reported as 0 K: nothing measures one, and a plausible number would be invented.
//! - **Counters** are those of the controller; power on hours count from the start of the target.
//! - **Spare** is 100 % with a threshold of 0, and nothing is used up: what wears is below, in the devices.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use reactor::{Buffers, Instant};
use zerocopy::{FromZeros, IntoBytes};

use super::features;
use super::{FIRMWARE_REVISION, Fault, Step, byte, enough};
use crate::spec::command::{GetLogPage, LogOffset, NSID_ALL};
use crate::spec::identify::{NamespaceList, csi};
use crate::spec::log::{
    ANA_RETURN_GROUPS_ONLY, AnaGroup, AnaHeader, CHANGED_NAMESPACES_OVERFLOW, CommandEffects, Effects, FeatureEffect,
    FeatureEffects, FirmwareSlots, LogSupport, SmartLog, SupportedLogPages, lid,
};
use crate::spec::opcode::{FABRICS, admin, io};
use crate::spec::{Status, fill_text};
use crate::target::controller::{AdminEnv, Controller, Kind};
use crate::target::discovery;

/// NVMe-MI Commands Supported and Effects. There are none, but LPA bit 5 promises the page.
const LID_MI_EFFECTS: u8 = 0x13;
const MI_EFFECTS_BYTES: usize = 4096;

/// The log pages of each kind of controller.
const IO_LOGS: [u8; 9] = [
    lid::SUPPORTED_LOG_PAGES,
    lid::ERROR_INFORMATION,
    lid::SMART,
    lid::FIRMWARE_SLOT,
    lid::CHANGED_NAMESPACES,
    lid::COMMAND_EFFECTS,
    lid::ANA,
    lid::FEATURE_EFFECTS,
    LID_MI_EFFECTS,
];
const DISCOVERY_LOGS: [u8; 3] = [lid::SUPPORTED_LOG_PAGES, lid::ERROR_INFORMATION, lid::DISCOVERY];

/// The admin commands of an I/O controller.
const ADMIN_COMMANDS: [u8; 7] = [
    admin::GET_LOG_PAGE,
    admin::IDENTIFY,
    admin::ABORT,
    admin::SET_FEATURES,
    admin::GET_FEATURES,
    admin::ASYNC_EVENT_REQUEST,
    admin::KEEP_ALIVE,
];
/// The I/O commands, and whether they change blocks.
const IO_COMMANDS: [(u8, bool); 7] = [
    (io::FLUSH, false),
    (io::WRITE, true),
    (io::READ, false),
    (io::COMPARE, false),
    (io::WRITE_ZEROES, true),
    (io::DATASET_MANAGEMENT, true),
    (io::COPY, true),
];
/// CSP, FSP: of a namespace, of the controller.
const SCOPE_NAMESPACE: u32 = 1;
const SCOPE_CONTROLLER: u32 = 2;
/// Critical warning: reliability is degraded.
const WARN_RELIABILITY: u8 = 1 << 2;
/// A data unit of the SMART log: 1000 times 512 bytes.
const DATA_UNIT_BYTES: u64 = 512_000;

impl Controller {
    pub(in crate::target) fn get_log_page(
        &mut self,
        get: &GetLogPage,
        data: &mut Buffers,
        env: &AdminEnv,
        now: Instant,
    ) -> Result<Step, Fault> {
        if !self.log_pages().any(|known| known == get.lid) {
            return Err(Fault::at(Status::INVALID_LOG_PAGE.dnr(), byte::CDW10));
        }
        // All pages are about the controller or the subsystem (LPA bit 0 is clear: SMART too).
        if !matches!(get.nsid, 0 | NSID_ALL) {
            return Err(Fault::field(byte::NSID));
        }
        if get.lid == lid::COMMAND_EFFECTS && get.csi != csi::NVM {
            return Err(Fault::field(byte::CDW14 + 3));
        }
        let LogOffset::Bytes(offset) = get.offset else {
            // No page has the index offset bit (IOS).
            return Err(Fault::field(byte::CDW14));
        };
        let wanted = usize::try_from(get.len_bytes).map_err(|_| Fault::field(byte::CDW10 + 2))?;
        enough(data, wanted)?;
        let page = self.log_page(get, env, now)?;
        let offset = usize::try_from(offset).ok().filter(|at| *at <= page.len()).ok_or(Fault::field(byte::CDW12))?;
        let part = &page[offset..page.len().min(offset.saturating_add(wanted))];
        data.truncate(wanted);
        data.fill(0);
        data.write_at(0, part);
        if !get.rae {
            self.log_read(get.lid);
            if get.lid == lid::CHANGED_NAMESPACES {
                self.changed_namespaces.clear();
            }
        }
        Ok(Step::Done { dw0: 0, send: true })
    }

    fn log_pages(&self) -> impl Iterator<Item = u8> + use<> {
        let (pages, ana): (&[u8], bool) = match self.config.kind {
            Kind::Io => (&IO_LOGS, self.subsystem().is_some_and(|subsystem| subsystem.ana_reporting)),
            Kind::Discovery => (&DISCOVERY_LOGS, false),
        };
        pages.iter().copied().filter(move |page| *page != lid::ANA || ana)
    }

    fn log_page(&self, get: &GetLogPage, env: &AdminEnv, now: Instant) -> Result<Vec<u8>, Fault> {
        Ok(match get.lid {
            lid::SUPPORTED_LOG_PAGES => {
                let mut page = SupportedLogPages::new_zeroed();
                for known in self.log_pages() {
                    page.lid[usize::from(known)].set(LogSupport::default().with_lsupp(1).0);
                }
                page.as_bytes().to_vec()
            }
            lid::ERROR_INFORMATION => self.config.shared.errors().page(),
            lid::SMART => self.smart(env, now).as_bytes().to_vec(),
            lid::FIRMWARE_SLOT => {
                let mut page = FirmwareSlots::new_zeroed();
                page.afi = 1;
                fill_text(&mut page.frs[0], FIRMWARE_REVISION, b' ');
                page.as_bytes().to_vec()
            }
            lid::CHANGED_NAMESPACES => self.changed_list().as_bytes().to_vec(),
            lid::COMMAND_EFFECTS => command_effects().as_bytes().to_vec(),
            lid::ANA => self.ana_log(get.lsp & ANA_RETURN_GROUPS_ONLY != 0)?,
            lid::FEATURE_EFFECTS => feature_effects(self.config.kind).as_bytes().to_vec(),
            LID_MI_EFFECTS => vec![0; MI_EFFECTS_BYTES],
            lid::DISCOVERY => discovery::log(
                &self.config.target,
                &self.config.shared.hostnqn,
                &self.config.listener,
                self.config.local_addr,
            ),
            other => unreachable!("log page {other:#04x} is listed as supported"),
        })
    }

    fn smart(&self, env: &AdminEnv, now: Instant) -> SmartLog {
        let counters = &self.config.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let units = |counter: &AtomicU64| u128::from(read(counter).div_ceil(DATA_UNIT_BYTES));
        let media_errors = read(&counters.media_errors);
        let mut page = SmartLog::new_zeroed();
        if media_errors > 0 {
            page.critical_warning = WARN_RELIABILITY;
        }
        page.available_spare = 100;
        page.data_units_read.set(units(&counters.bytes_read));
        page.data_units_written.set(units(&counters.bytes_written));
        page.host_reads.set(read(&counters.read_commands).into());
        page.host_writes.set(read(&counters.write_commands).into());
        page.power_on_hours.set((now.since(env.started).as_secs() / 3600).into());
        page.media_errors.set(media_errors.into());
        page.error_log_entries.set(self.config.shared.errors().count().into());
        page
    }

    fn changed_list(&self) -> NamespaceList {
        let mut list = NamespaceList::new_zeroed();
        if self.changed_namespaces.overflowed {
            list.nsid[0].set(CHANGED_NAMESPACES_OVERFLOW);
            return list;
        }
        for (place, nsid) in list.nsid.iter_mut().zip(&self.changed_namespaces.nsids) {
            place.set(*nsid);
        }
        list
    }

    /// The groups that have namespaces, in rising order, with the NSIDs of each.
    fn ana_log(&self, groups_only: bool) -> Result<Vec<u8>, Fault> {
        let subsystem = self.own_subsystem()?;
        let mut groups: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for ns in subsystem.namespaces.values() {
            groups.entry(ns.anagrpid).or_default().push(ns.nsid);
        }
        let mut header = AnaHeader::new_zeroed();
        header.chgcnt.set(self.ana_changes.log);
        header.ngrps.set(u16::try_from(groups.len()).unwrap_or(u16::MAX));
        let mut page = header.as_bytes().to_vec();
        for (group, nsids) in groups.iter().take(u16::MAX.into()) {
            let mut entry = AnaGroup::new_zeroed();
            entry.agid.set(*group);
            entry.chgcnt.set(self.ana_changes.of_group(*group));
            entry.state = self.ana_state(subsystem, *group).value();
            if !groups_only {
                entry.nnsids.set(nsids.len() as u32);
            }
            page.extend_from_slice(entry.as_bytes());
            if !groups_only {
                page.extend(nsids.iter().flat_map(|nsid| nsid.to_le_bytes()));
            }
        }
        Ok(page)
    }
}

fn command_effects() -> CommandEffects {
    let mut page = CommandEffects::new_zeroed();
    let supported = Effects::default().with_csupp(1);
    for opcode in ADMIN_COMMANDS.into_iter().chain([FABRICS]) {
        page.admin[usize::from(opcode)].set(supported.with_csp(SCOPE_CONTROLLER).0);
    }
    for (opcode, changes) in IO_COMMANDS {
        page.io[usize::from(opcode)].set(supported.with_csp(SCOPE_NAMESPACE).with_lbcc(changes.into()).0);
    }
    page
}

fn feature_effects(kind: Kind) -> FeatureEffects {
    let mut page = FeatureEffects::new_zeroed();
    for (fid, _) in features::supported(kind) {
        page.fid[usize::from(*fid)].set(FeatureEffect::default().with_fsupp(1).with_fsp(SCOPE_CONTROLLER).0);
    }
    page
}
