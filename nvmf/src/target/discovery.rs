//! The discovery log: what a host can connect to (Base 5.1.12.3.1).
//!
//! ```text
//! | header, 1024 bytes | this discovery service | subsystem 1, listener 1 | ... | referrals ... |   1024 bytes each
//! ```
//! A host sees the subsystems that allow it, at the listeners that pass the target's filter. Each host's log is its own;
//! the generation counter is the target's, so it may rise without a change that this host sees.

use std::net::{IpAddr, SocketAddr};

use zerocopy::{FromZeros, IntoBytes};

use super::view::{DISCOVERY_NQN, ListenAddress, TargetView, TransportKind};
use crate::spec::fabrics::MIN_ADMIN_QUEUE_ENTRIES;
use crate::spec::log::{DiscoveryEntry, DiscoveryHeader, adrfam, eflags, subtype};

/// CNTLID of entries: controllers are made for each connection.
const DYNAMIC_CONTROLLERS: u16 = 0xffff;
/// TREQ: a secure channel is required.
const SECURE_REQUIRED: u8 = 1;
/// TREQ: a secure channel is not required.
const SECURE_NOT_REQUIRED: u8 = 2;
/// TREQ: SQ flow control can be disabled.
const FLOW_CONTROL_OPTIONAL: u8 = 1 << 2;
/// TSAS of RDMA: reliable connected queue pairs, no provider named, RDMA_CM.
const RDMA_TSAS: [u8; 3] = [1, 1, 1];

/// The log as `hostnqn` sees it, who came in through the listener `came_in`, whose address for this connection is `local`.
pub fn log(view: &TargetView, hostnqn: &str, came_in: &ListenAddress, local: SocketAddr) -> Vec<u8> {
    let entries = entries(view, hostnqn, came_in, local.ip());
    let mut header = DiscoveryHeader::new_zeroed();
    header.genctr.set(view.discovery_generation);
    header.numrec.set(entries.len() as u64);
    let mut bytes = Vec::with_capacity(size_of::<DiscoveryHeader>() + entries.len() * size_of::<DiscoveryEntry>());
    bytes.extend_from_slice(header.as_bytes());
    for entry in &entries {
        bytes.extend_from_slice(entry.as_bytes());
    }
    bytes
}

/// The log without its header: what must differ for a host to be told of a change.
pub(super) fn entries(view: &TargetView, hostnqn: &str, came_in: &ListenAddress, local: IpAddr) -> Vec<DiscoveryEntry> {
    let mut entries = Vec::new();
    let shown = |address: &ListenAddress| {
        let filter = view.discovery_filter;
        (!filter.transport || address.trtype == came_in.trtype)
            && (!filter.address || address.traddr == came_in.traddr)
            && (!filter.svcid || address.trsvcid == came_in.trsvcid)
    };
    // Where the host is, which is where it found the service, and the other addresses that were opened for it.
    let others = view.discovery_listeners.iter().filter(|address| *address != came_in && shown(address));
    for address in std::iter::once(came_in).chain(others) {
        let Some(mut entry) = at(view, address, local) else { continue };
        entry.subtype = subtype::CURRENT_DISCOVERY;
        // All listeners lead to the same log, and connections to it may stay.
        entry.eflags.set(eflags::DUPLICATE | eflags::PERSISTENT);
        entry.set_subnqn(DISCOVERY_NQN);
        entries.push(entry);
    }
    for subsystem in view.subsystems.values().filter(|subsystem| subsystem.allows(hostnqn)) {
        for listener in subsystem.listeners.iter().filter(|listener| shown(&listener.address)) {
            let Some(mut entry) = at(view, &listener.address, local) else { continue };
            entry.subtype = subtype::NVM;
            entry.portid.set(listener.port_id);
            entry.set_subnqn(&subsystem.nqn);
            entries.push(entry);
        }
    }
    for referral in &view.referrals {
        let mut entry = address_entry(&referral.address, referral.address.traddr);
        entry.subtype = subtype::REFERRAL;
        // What every admin queue can be.
        entry.asqsz.set(MIN_ADMIN_QUEUE_ENTRIES as u16);
        if referral.secure_channel {
            entry.treq = SECURE_REQUIRED;
        }
        entry.set_subnqn(&referral.subnqn);
        entries.push(entry);
    }
    entries
}

/// An entry for one of this target's own addresses. A listener on all addresses is shown at the one that the host came
/// to, or not at all if that is of another family.
fn at(view: &TargetView, address: &ListenAddress, local: IpAddr) -> Option<DiscoveryEntry> {
    // A dual-stack socket says IPv4 addresses in IPv6 words.
    let local = local.to_canonical();
    let reached = match address.traddr {
        any if !any.is_unspecified() => any,
        // `::` takes IPv4 connections too.
        any if any.is_ipv6() || local.is_ipv4() => local,
        _ => return None,
    };
    let mut entry = address_entry(address, reached);
    let options = view.transports.get(&address.trtype)?;
    entry.asqsz.set(u16::try_from(options.max_aq_depth).unwrap_or(u16::MAX));
    Some(entry)
}

fn address_entry(address: &ListenAddress, reached: IpAddr) -> DiscoveryEntry {
    let mut entry = DiscoveryEntry::new_zeroed();
    entry.trtype = address.trtype.trtype();
    entry.adrfam = if reached.is_ipv4() { adrfam::IPV4 } else { adrfam::IPV6 };
    entry.treq = SECURE_NOT_REQUIRED | FLOW_CONTROL_OPTIONAL;
    entry.cntlid.set(DYNAMIC_CONTROLLERS);
    entry.set_address(&reached.to_string(), &address.trsvcid.to_string());
    match address.trtype {
        // SECTYPE 0: no security.
        TransportKind::Tcp => {}
        TransportKind::Rdma => entry.tsas[..3].copy_from_slice(&RDMA_TSAS),
    }
    entry
}

#[cfg(test)]
mod tests;
