//! The bdev: one namespace, over all paths to it.

use std::any::Any;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bdev::core::{Bdev, BdevInfo, ChannelCx, Geometry, Io, IoChannel, IoCx, IoStatus, IoTag, Op, OpKind, OpSet};
use nvmf::host::{Identity, Namespace};
use nvmf::spec::identify::{IdentifyController, nsfeat, oncs};
use reactor::Progress;
use schema::ConfigEntry;
use serde_json::{Value, json};

use crate::part::{Aborted, Part, SharedPart};
use crate::path::{Path, View};
use crate::policy::Mode;

/// What RPCs call it.
pub const PRODUCT: &str = "NVMe disk";

/// The most that one command moves where the controller has no limit, bytes.
const MAX_IO_BYTES: u64 = 1 << 20;
/// Blocks that a command can name.
const MAX_BLOCKS: u32 = 1 << 16;

/// Bit of FUSES: Compare and Write.
const FUSED_COMPARE_AND_WRITE: u16 = 1;

/// A path to the namespace.
#[derive(Clone, Debug)]
pub struct Route {
    /// The path.
    pub path: Arc<Path>,
    /// The namespace's number there.
    pub nsid: u32,
}

#[derive(Clone, Debug, Default)]
struct Routes {
    list: Vec<Route>,
    mode: Mode,
    /// Path that the user prefers.
    preferred: Option<u64>,
}

/// The device.
pub struct Disk {
    me: Weak<Disk>,
    /// Name of the bdev.
    pub name: String,
    /// Name of the controller.
    pub controller: String,
    /// What the namespace is called.
    pub identity: Identity,
    block_bytes: u32,
    geometry: Mutex<Geometry>,
    ops: OpSet,
    /// How often I/O that has failed is sent again; `None`: for ever.
    pub retries: Option<u32>,
    generation: AtomicU64,
    routes: Mutex<Routes>,
    removed: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the controller behind `view` makes of a namespace.
pub fn geometry(namespace: &Namespace, view: &View) -> Geometry {
    let raw = &namespace.raw;
    let block = namespace.block_bytes;
    let max_bytes = view.max_io_bytes.unwrap_or(MAX_IO_BYTES).min(MAX_IO_BYTES);
    let max_rw_blocks = u32::try_from(max_bytes / u64::from(block)).unwrap_or(MAX_BLOCKS).clamp(1, MAX_BLOCKS);
    let mut geometry = Geometry::new(block, namespace.blocks);
    if raw.nsfeat & nsfeat::OPTIMAL != 0 {
        let physical = (u32::from(raw.npwg.get()) + 1).saturating_mul(block);
        if physical.is_power_of_two() {
            geometry.physical_block_size = physical;
        }
        geometry.unmap_granularity = u32::from(raw.npdg.get()) + 1;
    }
    geometry.optimal_io_boundary = raw.noiob.get().into();
    geometry.max_rw_blocks = max_rw_blocks;
    geometry.max_unmap_blocks = u32::MAX;
    // Their own limits are in a page that older controllers do not have: with this, they keep to both.
    geometry.max_write_zeroes_blocks = max_rw_blocks;
    let copy = match (u32::from(raw.mssrl.get()), raw.mcl.get()) {
        (range, 0) => range,
        (range, total) => range.min(total),
    };
    geometry.max_copy_blocks = copy.min(MAX_BLOCKS);
    let acwu = match raw.nsfeat & nsfeat::ATOMICS {
        0 => view.identity.as_ref().map_or(0, |identity| identity.acwu.get()),
        _ => raw.nacwu.get(),
    };
    geometry.max_compare_and_write_blocks = u32::from(acwu) + 1;
    geometry.volatile_cache = view.identity.as_ref().is_some_and(|identity| identity.vwc & 1 != 0);
    geometry.unmap_zeroes = raw.dlfeat & 7 == 1;
    geometry.read_only = namespace.read_only;
    geometry
}

/// The operations that a controller has commands for. Fused commands are atomic for a few blocks only (ACWU), often one;
/// longer compare-and-writes are the layer's, which keeps out this host alone.
fn native_ops(identity: &IdentifyController, namespace: &Namespace) -> OpSet {
    let has = |bit: u16| identity.oncs.get() & bit != 0;
    let given = [
        (OpKind::Flush, identity.vwc & 1 != 0),
        (OpKind::Compare, has(oncs::COMPARE)),
        (OpKind::CompareAndWrite, has(oncs::COMPARE) && identity.fuses.get() & FUSED_COMPARE_AND_WRITE != 0),
        (OpKind::Unmap, has(oncs::DATASET_MANAGEMENT)),
        (OpKind::WriteZeroes, has(oncs::WRITE_ZEROES)),
        (OpKind::Copy, has(oncs::COPY) && namespace.raw.mssrl.get() > 0),
    ];
    let basic = OpSet::of(&[OpKind::Read, OpKind::Write]);
    given.into_iter().filter(|(_, given)| *given).fold(basic, |ops, (kind, _)| ops.with(kind))
}

impl Disk {
    /// The bdev `name` of the controller called `controller`, for a namespace as a path sees it.
    pub fn new(
        name: String,
        controller: String,
        namespace: &Namespace,
        path: &Arc<Path>,
        (mode, retries): (Mode, Option<u32>),
    ) -> Arc<Disk> {
        let view = path.view();
        let identity = view.identity.as_deref();
        let ops = identity.map_or(OpSet::of(&[OpKind::Read, OpKind::Write]), |i| native_ops(i, namespace));
        let route = Route { path: Arc::clone(path), nsid: namespace.nsid };
        Arc::new_cyclic(|me| Disk {
            me: Weak::clone(me),
            name,
            controller,
            identity: namespace.identity,
            block_bytes: namespace.block_bytes,
            geometry: Mutex::new(geometry(namespace, &view)),
            ops,
            retries,
            generation: AtomicU64::new(1),
            routes: Mutex::new(Routes { list: vec![route], mode, preferred: None }),
            removed: AtomicBool::new(false),
        })
    }

    /// Counts changes of the paths and of the policy.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The generation, the paths, each with the namespace's number on it and whether it is preferred, and the policy.
    #[allow(clippy::type_complexity)] // One caller, which takes it apart at once.
    pub(crate) fn routes(&self) -> (u64, Vec<(Arc<Path>, u32, bool)>, Mode) {
        let routes = lock(&self.routes);
        let list = routes
            .list
            .iter()
            .map(|route| (Arc::clone(&route.path), route.nsid, routes.preferred == Some(route.path.id)));
        (self.generation(), list.collect(), routes.mode)
    }

    /// The paths.
    pub fn paths(&self) -> Vec<Route> {
        lock(&self.routes).list.clone()
    }

    /// Path that the user prefers.
    pub fn preferred(&self) -> Option<u64> {
        lock(&self.routes).preferred
    }

    fn change(&self, change: impl FnOnce(&mut Routes)) {
        let mut routes = lock(&self.routes);
        change(&mut routes);
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// Sets the paths, if they are others; whether they are.
    pub fn set_paths(&self, paths: Vec<Route>) -> bool {
        let key =
            |list: &[Route]| -> Vec<(u64, u32)> { list.iter().map(|route| (route.path.id, route.nsid)).collect() };
        if key(&lock(&self.routes).list) == key(&paths) {
            return false;
        }
        self.change(|routes| routes.list = paths);
        true
    }

    /// Sets how a path is chosen.
    pub fn set_mode(&self, mode: Mode) {
        self.change(|routes| routes.mode = mode);
    }

    /// How a path is chosen.
    pub fn mode(&self) -> Mode {
        lock(&self.routes).mode
    }

    /// Sets the path that is taken before others that are as good.
    pub fn prefer(&self, path: u64) {
        self.change(|routes| routes.preferred = Some(path));
    }

    /// Whether `namespace` is the same one, in a form that this device can go on with.
    pub fn is_same(&self, namespace: &Namespace) -> bool {
        self.block_bytes == namespace.block_bytes && self.identity.is_same_as(&namespace.identity)
    }

    /// Takes the geometry; whether its size has changed.
    pub fn set_geometry(&self, new: Geometry) -> bool {
        let mut geometry = lock(&self.geometry);
        let changed = *geometry != new;
        *geometry = new;
        changed
    }

    /// Whether its removal has ended.
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    /// The device behind `info`, if it is one of these.
    pub fn of(info: &BdevInfo) -> Option<Arc<Disk>> {
        let device: Arc<dyn Any + Send + Sync> = Arc::clone(info.device()) as _;
        device.downcast().ok()
    }
}

impl Bdev for Disk {
    fn product_name(&self) -> &'static str {
        PRODUCT
    }

    fn geometry(&self) -> Geometry {
        *lock(&self.geometry)
    }

    fn native_ops(&self) -> OpSet {
        self.ops
    }

    fn open_channel(&self, cx: &mut ChannelCx<'_>) -> io::Result<Box<dyn IoChannel>> {
        let me = self.me.upgrade().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let reactor = cx.reactor().0 as usize;
        let lacks = |route: &Route| route.path.view().association.as_ref().is_some_and(|a| a.queues.len() <= reactor);
        if self.paths().iter().all(lacks) {
            let text = format!("'{}' has too few I/O queues on its controllers for reactor {reactor}", self.name);
            return Err(io::Error::other(text));
        }
        let part: SharedPart =
            cx.attached::<std::cell::RefCell<Part>>().ok_or_else(|| io::Error::other("no initiator"))?;
        let head = part.borrow_mut().open(&me);
        Ok(Box::new(DiskChannel { part, head }))
    }

    fn removed(&self) {
        self.removed.store(true, Ordering::Release);
    }

    fn driver_specific(&self) -> Value {
        let paths = self.paths();
        let shown: Vec<Value> = paths
            .iter()
            .map(|Route { path, nsid }| {
                let view = path.view();
                let identity = view.identity.as_deref();
                let text = |bytes: &[u8]| nvmf::spec::shown_text(bytes);
                json!({
                    "trid": crate::rpc::trid(&path.addresses()[0]),
                    "ns_data": { "id": nsid, "can_share": true },
                    "ctrlr_data": identity.map(|identity| json!({
                        "cntlid": view.association.as_ref().map_or(0, |association| association.cntlid),
                        "vendor_id": format!("0x{:04x}", identity.vid.get()),
                        "model_number": text(&identity.mn),
                        "serial_number": text(&identity.sn),
                        "firmware_revision": text(&identity.fr),
                        "subnqn": path.address.subnqn,
                        "multi_ctrlr": identity.cmic & 2 != 0,
                        "ana_reporting": identity.cmic & 8 != 0,
                    })),
                })
            })
            .collect();
        let policy = if self.mode() == Mode::ActivePassive { "active_passive" } else { "active_active" };
        json!({ "nvme": shown, "mp_policy": policy })
    }

    fn config(&self, _: &BdevInfo) -> Vec<ConfigEntry> {
        // The controller's call makes it.
        Vec::new()
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Disk({})", self.name)
    }
}

/// One reactor's channel.
struct DiskChannel {
    part: SharedPart,
    head: usize,
}

impl IoChannel for DiskChannel {
    #[inline]
    fn submit(&mut self, io: Io, cx: &mut IoCx<'_>) {
        match io.op() {
            // Nothing changes, and no controller takes it.
            Op::Copy { source_lba } if source_lba == io.lba() => return cx.complete(io, IoStatus::Success),
            // All that was outstanding has ended by now, if need be with its path.
            Op::Reset => return cx.complete(io, IoStatus::Success),
            _ => {}
        }
        if self.part.borrow_mut().submit(self.head, io, cx.now()) {
            cx.poll_soon();
        }
    }

    fn wants_poll(&self) -> bool {
        true
    }

    fn poll(&mut self, cx: &mut IoCx<'_>) -> Progress {
        let now = cx.now();
        let busy = self.part.borrow_mut().poll_head(self.head, now, &mut |io, status| cx.complete(io, status));
        Progress::from_busy(busy)
    }

    fn abort(&mut self, tag: IoTag, cx: &mut IoCx<'_>) -> bool {
        let aborted = self.part.borrow_mut().abort(self.head, tag);
        match aborted {
            Aborted::Out(io) => cx.complete(io, IoStatus::Aborted),
            Aborted::Asked => {}
            Aborted::No => return false,
        }
        true
    }

    fn abort_all(&mut self, cx: &mut IoCx<'_>) {
        let waiting = self.part.borrow_mut().abort_all(self.head, cx.now());
        waiting.into_iter().for_each(|io| cx.complete(io, IoStatus::Aborted));
    }

    fn close(&mut self, _: &mut ChannelCx<'_>) {
        self.part.borrow_mut().close(self.head);
    }
}
