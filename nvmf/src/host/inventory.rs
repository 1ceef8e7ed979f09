//! What a host knows of a subsystem: namespaces and their identity, access states, the discovery log.
//!
//! It outlives connections, so that what has changed while a controller was away is seen as a change. Everything in it
//! was checked: sizes are whole, block sizes are powers of two from 512 bytes to 1 MiB.

use super::Error;
use crate::spec::identify::{IdentifyNamespace, NamespaceDescriptors, csi};
use crate::spec::log::{AnaGroup, AnaState, DiscoveryEntry};
use std::collections::{BTreeMap, BTreeSet};
use zerocopy::FromBytes;

/// The most namespaces that a controller is believed to have.
pub const MAX_NAMESPACES: usize = 8192;

/// What a namespace is called by the subsystem, whatever its NSID. Two with the same are the same one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Identity {
    /// NGUID, big-endian.
    pub nguid: Option<[u8; 16]>,
    /// EUI-64, big-endian.
    pub eui64: Option<[u8; 8]>,
    /// UUID.
    pub uuid: Option<[u8; 16]>,
}

impl Identity {
    /// Whether both have a name in common and none that differs. Namespaces without any name cannot be told apart.
    pub fn is_same_as(&self, other: &Identity) -> bool {
        fn differ<T: PartialEq>(a: Option<T>, b: Option<T>) -> bool {
            matches!((a, b), (Some(a), Some(b)) if a != b)
        }
        !(differ(self.nguid, other.nguid) || differ(self.eui64, other.eui64) || differ(self.uuid, other.uuid))
    }
}

/// One namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its identifier on this controller.
    pub nsid: u32,
    /// Its size, blocks.
    pub blocks: u64,
    /// Bytes of a block.
    pub block_bytes: u32,
    /// What it is called.
    pub identity: Identity,
    /// ANA group; 0 for none.
    pub anagrpid: u32,
    /// It cannot be written.
    pub read_only: bool,
    /// All that Identify Namespace said.
    pub raw: Box<IdentifyNamespace>,
}

impl Namespace {
    /// From Identify Namespace; `None` if the NSID is inactive.
    ///
    /// # Errors
    /// Blocks that no command of this host can have: with metadata, of an odd size, of another command set.
    pub fn parse(nsid: u32, bytes: &[u8]) -> Result<Option<Namespace>, Error> {
        let (raw, _) = IdentifyNamespace::read_from_prefix(bytes).map_err(|_| Error::Nonsense("Identify Namespace"))?;
        if raw.nsze.get() == 0 {
            return Ok(None);
        }
        let format = usize::from(raw.flbas & 0xf | (raw.flbas >> 1) & 0x30);
        let lba = raw.lbaf.get(format).ok_or(Error::Nonsense("LBA format"))?;
        if !(9..=20).contains(&lba.lbads) || lba.ms.get() != 0 {
            return Err(Error::Nonsense("a namespace whose blocks have metadata or an odd size"));
        }
        let block_bytes = 1u32 << lba.lbads;
        let blocks = raw.nsze.get();
        if blocks.checked_mul(block_bytes.into()).is_none() {
            return Err(Error::Nonsense("a namespace of more than 2^64 bytes"));
        }
        let identity = Identity {
            nguid: Some(raw.nguid).filter(|nguid| *nguid != [0; 16]),
            eui64: Some(raw.eui64).filter(|eui64| *eui64 != [0; 8]),
            uuid: None,
        };
        let (anagrpid, read_only) = (raw.anagrpid.get(), raw.nsattr & 1 != 0);
        Ok(Some(Namespace { nsid, blocks, block_bytes, identity, anagrpid, read_only, raw: Box::new(raw) }))
    }

    /// Adds what the list of identification descriptors says.
    ///
    /// # Errors
    /// Descriptors that cannot be, or of another command set than NVM.
    pub fn add_descriptors(&mut self, page: &[u8]) -> Result<(), Error> {
        for (nidt, nid) in NamespaceDescriptors::parse(page) {
            match nidt {
                NamespaceDescriptors::EUI64 => self.identity.eui64 = nid.try_into().ok().or(self.identity.eui64),
                NamespaceDescriptors::NGUID => self.identity.nguid = nid.try_into().ok().or(self.identity.nguid),
                NamespaceDescriptors::UUID => self.identity.uuid = nid.try_into().ok().or(self.identity.uuid),
                NamespaceDescriptors::CSI if nid != [csi::NVM] => {
                    return Err(Error::Nonsense("a namespace of another command set"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Its size, bytes.
    pub fn bytes(&self) -> u64 {
        self.blocks * u64::from(self.block_bytes)
    }
}

/// The discovery log at one generation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DiscoveryLog {
    /// Its generation counter.
    pub generation: u64,
    /// Its records.
    pub entries: Vec<DiscoveryEntry>,
}

/// What has changed since it was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Namespaces were added, removed, replaced or changed: compare [`Inventory::namespaces`] with what was known.
    pub namespaces: bool,
    /// Access states.
    pub ana: bool,
    /// The discovery log.
    pub discovery: bool,
}

/// What is known of a subsystem through one controller.
#[derive(Debug, Default)]
pub struct Inventory {
    namespaces: BTreeMap<u32, Namespace>,
    ana: BTreeMap<u32, AnaState>,
    discovery: DiscoveryLog,
    changes: Changes,
}

impl Inventory {
    /// The namespaces, by NSID.
    pub fn namespaces(&self) -> &BTreeMap<u32, Namespace> {
        &self.namespaces
    }

    /// The discovery log; empty for controllers that are none of discovery.
    pub fn discovery(&self) -> &DiscoveryLog {
        &self.discovery
    }

    /// States of the ANA groups.
    pub fn ana_groups(&self) -> &BTreeMap<u32, AnaState> {
        &self.ana
    }

    /// How a namespace can be reached through this controller. Optimized where ANA is not reported.
    pub fn ana_state(&self, namespace: &Namespace) -> AnaState {
        self.ana.get(&namespace.anagrpid).copied().unwrap_or(AnaState::Optimized)
    }

    /// Takes what has changed.
    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    pub(super) fn put(&mut self, namespace: Namespace) {
        let nsid = namespace.nsid;
        let full = self.namespaces.len() >= MAX_NAMESPACES && !self.namespaces.contains_key(&nsid);
        if !full && self.namespaces.get(&nsid) != Some(&namespace) {
            self.namespaces.insert(nsid, namespace);
            self.changes.namespaces = true;
        }
    }

    pub(super) fn remove(&mut self, nsid: u32) {
        self.changes.namespaces |= self.namespaces.remove(&nsid).is_some();
    }

    /// Removes all namespaces that are not listed.
    pub(super) fn retain(&mut self, listed: &BTreeSet<u32>) {
        let before = self.namespaces.len();
        self.namespaces.retain(|nsid, _| listed.contains(nsid));
        self.changes.namespaces |= self.namespaces.len() != before;
    }

    /// Takes the records of an ANA log.
    pub(super) fn set_ana(&mut self, records: &[u8]) -> Result<(), Error> {
        let mut groups = BTreeMap::new();
        for record in records.chunks_exact(size_of::<AnaGroup>()) {
            let group = AnaGroup::ref_from_bytes(record).map_err(|_| Error::Nonsense("ANA group"))?;
            let state = AnaState::from_value(group.state & 0xf).ok_or(Error::Nonsense("an unknown ANA state"))?;
            if group.agid.get() == 0 || group.nnsids.get() != 0 {
                return Err(Error::Nonsense("an ANA log of groups that is none"));
            }
            groups.insert(group.agid.get(), state);
        }
        if groups != self.ana {
            self.ana = groups;
            self.changes.ana = true;
        }
        Ok(())
    }

    pub(super) fn set_discovery(&mut self, generation: u64, records: &[u8]) {
        let entries = records.chunks_exact(size_of::<DiscoveryEntry>());
        let entries: Vec<DiscoveryEntry> =
            entries.filter_map(|entry| DiscoveryEntry::read_from_bytes(entry).ok()).collect();
        if (generation, &entries) != (self.discovery.generation, &self.discovery.entries) {
            self.discovery = DiscoveryLog { generation, entries };
            self.changes.discovery = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::{FromZeros, IntoBytes};

    fn page() -> IdentifyNamespace {
        let mut page = IdentifyNamespace::new_zeroed();
        page.nsze.set(1000);
        page.lbaf[0].lbads = 12;
        page.nguid = [7; 16];
        page
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let good = Namespace::parse(3, page().as_bytes()).unwrap().unwrap();
        assert_eq!((good.nsid, good.blocks, good.block_bytes, good.bytes()), (3, 1000, 4096, 4_096_000));
        assert_eq!(Namespace::parse(1, &[0; 4096]), Ok(None));
        let lies: [fn(&mut IdentifyNamespace); 5] = [
            |page| page.lbaf[0].lbads = 0,
            |page| page.lbaf[0].lbads = 32,
            |page| page.lbaf[0].ms.set(8),
            |page| page.flbas = 0x6f,
            |page| page.nsze.set(u64::MAX),
        ];
        for lie in lies {
            let mut page = page();
            lie(&mut page);
            assert!(Namespace::parse(1, page.as_bytes()).is_err());
        }
        assert!(Namespace::parse(1, &[1; 100]).is_err());
    }

    #[test]
    fn a_name_in_place_of_another_is_another_namespace() {
        let mut first = Namespace::parse(1, page().as_bytes()).unwrap().unwrap();
        let mut list = [0; 4096];
        let mut descriptors = NamespaceDescriptors::new(&mut list);
        descriptors.uuid([9; 16]);
        descriptors.csi(csi::NVM);
        first.add_descriptors(&list).unwrap();
        assert_eq!(first.identity.uuid, Some([9; 16]));
        let same = Identity { uuid: Some([9; 16]), ..Identity::default() };
        assert!(first.identity.is_same_as(&same));
        assert!(!first.identity.is_same_as(&Identity { eui64: None, uuid: Some([8; 16]), nguid: Some([7; 16]) }));
        let mut descriptors = NamespaceDescriptors::new(&mut list);
        descriptors.csi(csi::ZONED);
        assert!(first.add_descriptors(&list).is_err());
    }

    #[test]
    fn changes_are_told_once_and_namespaces_are_bounded() {
        let mut inventory = Inventory::default();
        let namespace = |nsid| Namespace { nsid, ..Namespace::parse(1, page().as_bytes()).unwrap().unwrap() };
        inventory.put(namespace(1));
        assert!(inventory.take_changes().namespaces);
        inventory.put(namespace(1));
        inventory.retain(&BTreeSet::from([1, 2]));
        inventory.remove(2);
        assert_eq!(inventory.take_changes(), Changes::default());
        inventory.put(Namespace { blocks: 5, ..namespace(1) });
        assert!(inventory.take_changes().namespaces);
        (1..20_000).for_each(|nsid| inventory.put(namespace(nsid)));
        assert_eq!(inventory.namespaces().len(), MAX_NAMESPACES);
    }

    #[test]
    fn ana_states_are_those_that_exist() {
        let mut inventory = Inventory::default();
        let mut group = AnaGroup::new_zeroed();
        group.agid.set(1);
        group.state = 3;
        inventory.set_ana(group.as_bytes()).unwrap();
        let mut namespace = Namespace::parse(1, page().as_bytes()).unwrap().unwrap();
        assert_eq!(inventory.ana_state(&namespace), AnaState::Optimized);
        namespace.anagrpid = 1;
        assert_eq!(inventory.ana_state(&namespace), AnaState::Inaccessible);
        assert!(inventory.take_changes().ana);
        group.state = 7;
        assert!(inventory.set_ana(group.as_bytes()).is_err());
        assert_eq!(inventory.ana_state(&namespace), AnaState::Inaccessible);
    }
}
