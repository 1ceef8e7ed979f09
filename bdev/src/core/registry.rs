//! Names, descriptors and claims: who may use which device, and who is told when it changes.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use futures_channel::oneshot;
use uuid::Uuid;

use super::channel::Bdev;
use super::locks::LockTable;
use super::stats::{IoStats, StatsReset};
use super::system::BdevError;
use super::types::OpKind;

/// Names one registered device for as long as the process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BdevId(u64);

/// What is the same about a device on all reactors.
pub struct BdevInfo {
    id: BdevId,
    name: String,
    uuid: Uuid,
    aliases: Vec<String>,
    device: Arc<dyn Bdev>,
    locks: LockTable,
    removing: AtomicBool,
    /// Counters of channels that have closed.
    retired: Mutex<IoStats>,
}

impl BdevInfo {
    /// Its identity.
    pub fn id(&self) -> BdevId {
        self.id
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its UUID, which is also a name.
    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Its other names.
    pub fn aliases(&self) -> &[String] {
        &self.aliases
    }

    /// The device itself.
    pub fn device(&self) -> &Arc<dyn Bdev> {
        &self.device
    }

    /// Whether the layer takes operations of this kind for it: done by the device, or emulated.
    pub fn supports(&self, kind: OpKind) -> bool {
        let native = self.device.native_ops();
        let writes = native.contains(OpKind::Write);
        match kind {
            _ if native.contains(kind) => true,
            OpKind::Reset | OpKind::Compare => true,
            OpKind::Flush => !self.device.geometry().volatile_cache,
            OpKind::CompareAndWrite | OpKind::Copy | OpKind::WriteZeroes => writes,
            OpKind::Read | OpKind::Write | OpKind::Unmap => false,
        }
    }

    /// Whether its removal has begun.
    pub fn is_removing(&self) -> bool {
        self.removing.load(Ordering::Acquire)
    }

    pub(super) fn locks(&self) -> &LockTable {
        &self.locks
    }

    pub(super) fn retire_stats(&self, stats: &IoStats) {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).add(stats);
    }

    pub(super) fn retired_stats(&self) -> IoStats {
        *self.retired.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn reset_retired_stats(&self, mode: StatsReset) {
        self.retired.lock().unwrap_or_else(PoisonError::into_inner).reset(mode);
    }

    fn answers_to(&self, name: &str) -> bool {
        self.name == name
            || self.aliases.iter().any(|alias| alias == name)
            || Uuid::parse_str(name).is_ok_and(|uuid| uuid == self.uuid)
    }
}

impl fmt::Debug for BdevInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BdevInfo").field("name", &self.name).field("uuid", &self.uuid).finish_non_exhaustive()
    }
}

/// What a descriptor's holder is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BdevEvent {
    /// The device is going away: stop using it and drop the descriptor. New I/O already fails.
    Removing,
    /// The device's geometry has changed.
    Resized,
}

/// Told of events, on the control plane's thread; must not block.
pub type OnEvent = Arc<dyn Fn(BdevEvent) + Send + Sync>;

/// How a claim excludes others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimKind {
    /// Only the claim's holder writes; others may read.
    ExclusiveWrite,
    /// Any number of readers that share the claim, no writer at all.
    ReadManyWriteNone,
}

impl ClaimKind {
    /// The name that RPCs show.
    pub fn name(self) -> &'static str {
        match self {
            ClaimKind::ExclusiveWrite => "exclusive_write",
            ClaimKind::ReadManyWriteNone => "read_many_write_none",
        }
    }
}

struct Open {
    id: u64,
    owner: String,
    write: bool,
    on_event: OnEvent,
}

struct Claim {
    descriptor: u64,
    kind: ClaimKind,
}

struct Entry {
    info: Arc<BdevInfo>,
    opens: Vec<Open>,
    claims: Vec<Claim>,
    all_closed: Vec<oneshot::Sender<()>>,
}

#[derive(Default)]
struct Tables {
    next_bdev: u64,
    next_descriptor: u64,
    bdevs: BTreeMap<BdevId, Entry>,
}

impl Tables {
    fn find(&self, name: &str) -> Option<&Entry> {
        self.bdevs.values().find(|entry| entry.info.answers_to(name))
    }

    fn find_mut(&mut self, name: &str) -> Option<&mut Entry> {
        self.bdevs.values_mut().find(|entry| entry.info.answers_to(name))
    }
}

/// A removal that has begun.
pub(super) struct Removal {
    pub(super) info: Arc<BdevInfo>,
    /// Whom to tell.
    pub(super) tell: Vec<OnEvent>,
    /// Resolves when nobody has it open.
    pub(super) all_closed: oneshot::Receiver<()>,
}

/// All devices. Control plane only: reactors hold what they need.
#[derive(Default)]
pub(super) struct Registry(Mutex<Tables>);

/// What `bdev_get_bdevs` says about claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClaimState {
    /// The kind of claim, if any is held.
    pub kind: Option<ClaimKind>,
}

impl Registry {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a device under its names, all of which must be new.
    pub(super) fn add(
        &self,
        name: String,
        uuid: Uuid,
        aliases: Vec<String>,
        device: Arc<dyn Bdev>,
    ) -> Result<Arc<BdevInfo>, BdevError> {
        let mut tables = self.tables();
        for taken in std::iter::once(&name).chain(&aliases) {
            if tables.find(taken).is_some() {
                return Err(BdevError::Exists { name: taken.clone() });
            }
        }
        if tables.find(&uuid.to_string()).is_some() {
            return Err(BdevError::Exists { name: uuid.to_string() });
        }
        tables.next_bdev += 1;
        let id = BdevId(tables.next_bdev);
        let info = Arc::new(BdevInfo {
            id,
            name,
            uuid,
            aliases,
            device,
            locks: LockTable::default(),
            removing: AtomicBool::new(false),
            retired: Mutex::default(),
        });
        let entry = Entry { info: Arc::clone(&info), opens: Vec::new(), claims: Vec::new(), all_closed: Vec::new() };
        tables.bdevs.insert(id, entry);
        Ok(info)
    }

    pub(super) fn get(&self, name: &str) -> Result<Arc<BdevInfo>, BdevError> {
        let tables = self.tables();
        tables.find(name).map(|entry| Arc::clone(&entry.info)).ok_or_else(|| BdevError::not_found(name))
    }

    /// All devices in the order of their creation.
    pub(super) fn list(&self) -> Vec<Arc<BdevInfo>> {
        self.tables().bdevs.values().map(|entry| Arc::clone(&entry.info)).collect()
    }

    pub(super) fn claim_state(&self, id: BdevId) -> ClaimState {
        let kind = self.tables().bdevs.get(&id).and_then(|entry| entry.claims.first().map(|claim| claim.kind));
        ClaimState { kind }
    }

    pub(super) fn open(
        self: &Arc<Self>,
        name: &str,
        write: bool,
        owner: &str,
        on_event: OnEvent,
    ) -> Result<Descriptor, BdevError> {
        let mut tables = self.tables();
        tables.next_descriptor += 1;
        let id = tables.next_descriptor;
        let entry = tables.find_mut(name).ok_or_else(|| BdevError::not_found(name))?;
        if entry.info.is_removing() {
            return Err(BdevError::not_found(name));
        }
        if write && let Some(claim) = entry.claims.first() {
            let holder = entry.opens.iter().find(|open| open.id == claim.descriptor).map(|open| open.owner.clone());
            return Err(BdevError::Claimed { name: name.to_string(), by: holder.unwrap_or_default() });
        }
        entry.opens.push(Open { id, owner: owner.to_string(), write, on_event });
        Ok(Descriptor { registry: Arc::downgrade(self), info: Arc::clone(&entry.info), id })
    }

    fn claim(&self, descriptor: &Descriptor, kind: ClaimKind) -> Result<(), BdevError> {
        let mut tables = self.tables();
        let entry =
            tables.bdevs.get_mut(&descriptor.info.id).ok_or_else(|| BdevError::not_found(&descriptor.info.name))?;
        let shared = kind == ClaimKind::ReadManyWriteNone && entry.claims.iter().all(|claim| claim.kind == kind);
        let writer = entry.opens.iter().find(|open| open.write && open.id != descriptor.id);
        let in_the_way = match (entry.claims.first(), writer) {
            (Some(claim), _) if !shared => entry.opens.iter().find(|open| open.id == claim.descriptor),
            (_, writer) => writer,
        };
        if let Some(other) = in_the_way {
            return Err(BdevError::Claimed { name: descriptor.info.name.clone(), by: other.owner.clone() });
        }
        entry.claims.push(Claim { descriptor: descriptor.id, kind });
        Ok(())
    }

    fn close(&self, info: &BdevInfo, descriptor: u64) {
        let mut tables = self.tables();
        let Some(entry) = tables.bdevs.get_mut(&info.id) else { return };
        entry.opens.retain(|open| open.id != descriptor);
        entry.claims.retain(|claim| claim.descriptor != descriptor);
        if entry.opens.is_empty() {
            for waiter in std::mem::take(&mut entry.all_closed) {
                // Whoever gave up waiting need not be told.
                let _ = waiter.send(());
            }
        }
    }

    /// Who has a device open.
    pub(super) fn owners(&self, id: BdevId) -> Vec<String> {
        let tables = self.tables();
        tables
            .bdevs
            .get(&id)
            .map(|entry| entry.opens.iter().map(|open| open.owner.clone()).collect())
            .unwrap_or_default()
    }

    /// Marks a device as going away.
    pub(super) fn begin_remove(&self, name: &str) -> Result<Removal, BdevError> {
        let mut tables = self.tables();
        let entry = tables.find_mut(name).ok_or_else(|| BdevError::not_found(name))?;
        if entry.info.removing.swap(true, Ordering::AcqRel) {
            return Err(BdevError::BeingRemoved { name: name.to_string() });
        }
        let (sender, receiver) = oneshot::channel();
        if entry.opens.is_empty() {
            let _ = sender.send(());
        } else {
            entry.all_closed.push(sender);
        }
        let tell = entry.opens.iter().map(|open| Arc::clone(&open.on_event)).collect();
        Ok(Removal { info: Arc::clone(&entry.info), tell, all_closed: receiver })
    }

    pub(super) fn finish_remove(&self, id: BdevId) {
        let entry = self.tables().bdevs.remove(&id);
        // After the lock: a device that holds another open closes that when it is dropped.
        drop(entry);
    }

    pub(super) fn listeners(&self, id: BdevId) -> Vec<OnEvent> {
        let tables = self.tables();
        let opens = tables.bdevs.get(&id).map(|entry| &entry.opens[..]).unwrap_or_default();
        opens.iter().map(|open| Arc::clone(&open.on_event)).collect()
    }
}

/// The right to use a device. While it lives the device is not destroyed; dropping it closes it.
pub struct Descriptor {
    /// Weak, because a device in layers keeps one of these, and is itself kept by the registry.
    registry: Weak<Registry>,
    info: Arc<BdevInfo>,
    id: u64,
}

impl Descriptor {
    /// The device, for opening channels on reactors.
    pub fn bdev(&self) -> &Arc<BdevInfo> {
        &self.info
    }

    /// Keeps others from writing to the device while this descriptor is open.
    ///
    /// # Errors
    /// [`BdevError::Claimed`] when somebody else has it open for writing or claimed.
    pub fn claim(&self, kind: ClaimKind) -> Result<(), BdevError> {
        let registry = self.registry.upgrade().ok_or_else(|| BdevError::not_found(self.info.name()))?;
        registry.claim(self, kind)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        if let Some(registry) = self.registry.upgrade() {
            registry.close(&self.info, self.id);
        }
    }
}

impl fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Descriptor({})", self.info.name)
    }
}
