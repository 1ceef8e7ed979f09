//! What the reactors' channels and the array's driver share.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use reactor::park::Waker;

use super::array::View;
use super::cells::Cells;
use super::driver::Driver;
use super::format::Layout;
use crate::core::{BdevInfo, IoRuntime};

/// How reactors treat the legs, and what these are.
pub(super) struct Table {
    pub(super) view: View,
    pub(super) legs: Vec<Option<Arc<BdevInfo>>>,
}

/// What channels are told.
pub(super) enum Notice {
    Table(Arc<Table>),
    /// These regions may be written; whether other reactors may as well.
    Grant(Vec<(usize, bool)>),
    /// Others are to write these regions, too: to be answered when what was written here without cells has ended.
    Share {
        ask: u64,
        regions: Vec<usize>,
    },
    /// Cells that somebody waits for are free.
    Freed,
    /// No leg is becoming in sync that the channel has not been told of.
    Settled,
    /// Regions that were not written since the last round are to be given back.
    Revoke(u64),
}

/// A piece of work for the driver, on its reactor.
pub(super) type Work = Box<dyn FnOnce(&mut Driver, &mut IoRuntime) + Send>;

/// What the driver is told.
pub(super) enum Event {
    Mark {
        from: u32,
        regions: Vec<usize>,
    },
    Failed {
        leg: usize,
        why: String,
    },
    Uncertain,
    Repair {
        leg: usize,
        lba: u64,
        blocks: u64,
    },
    Told(u64),
    Kept {
        round: u64,
        held: Vec<usize>,
    },
    /// The answer to `Notice::Share`.
    Shared(u64),
    /// Cells are free that somebody waits for.
    Freed,
    /// A read has failed on all legs that this reactor knows to be in sync.
    Doubt(u32),
    Locked,
    /// The leg is being removed.
    Gone(Arc<BdevInfo>),
    Do(Work),
    Stop {
        wipe: bool,
    },
}

/// See the [module](self). The queue of events is bounded by what may be outstanding: of each channel one `Mark`, one `Kept`, one
/// `Told`, one `Doubt`, a `Shared` for each other reactor, a `Failed` for each leg under each table; one `Freed`; repairs beyond
/// [`MAX_REPAIRS`] are dropped.
pub(super) struct Shared {
    pub(super) layout: Layout,
    pub(super) persist: bool,
    /// Where reactors meet, if there are several.
    pub(super) cells: Option<Cells>,
    /// The device, once it is registered; it holds this.
    bdev: OnceLock<Weak<BdevInfo>>,
    table: Mutex<Arc<Table>>,
    inbox: Mutex<Inbox>,
    waker: OnceLock<Waker>,
}

#[derive(Default)]
struct Inbox {
    events: VecDeque<Event>,
    repairs: usize,
    uncertain: bool,
    freed: bool,
    /// Nobody takes events any more.
    closed: bool,
}

/// Repairs that may wait for the driver.
const MAX_REPAIRS: usize = 64;

impl Shared {
    pub(super) fn new(layout: Layout, persist: bool, reactors: usize, table: Table) -> Arc<Shared> {
        Arc::new(Shared {
            layout,
            persist,
            cells: (reactors > 1).then(|| Cells::new(&layout)),
            bdev: OnceLock::new(),
            table: Mutex::new(Arc::new(table)),
            inbox: Mutex::default(),
            waker: OnceLock::new(),
        })
    }

    /// The device has been registered.
    pub(super) fn set_device(&self, bdev: &Arc<BdevInfo>) {
        let _ = self.bdev.set(Arc::downgrade(bdev));
        // Copying waits for it.
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }

    /// Whether the device has been registered: before that nobody has a channel.
    pub(super) fn has_device(&self) -> bool {
        self.bdev.get().is_some()
    }

    /// The device, while it is there.
    pub(super) fn device(&self) -> Option<Arc<BdevInfo>> {
        self.bdev.get()?.upgrade()
    }

    pub(super) fn set_waker(&self, waker: Waker) {
        let _ = self.waker.set(waker);
    }

    pub(super) fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn set_table(&self, table: Arc<Table>) {
        *self.table.lock().unwrap_or_else(PoisonError::into_inner) = table;
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From any thread; never on the path of a read or write that goes well.
    pub(super) fn send(&self, event: Event) {
        let mut inbox = self.inbox();
        if inbox.closed {
            // Whoever waits for it hears so when it is dropped, which may lead back here.
            drop(inbox);
            return drop(event);
        }
        match event {
            Event::Repair { .. } if inbox.repairs == MAX_REPAIRS => return,
            Event::Repair { .. } => inbox.repairs += 1,
            Event::Uncertain if inbox.uncertain => return,
            Event::Uncertain => inbox.uncertain = true,
            Event::Freed if inbox.freed => return,
            Event::Freed => inbox.freed = true,
            _ => {}
        }
        inbox.events.push_back(event);
        drop(inbox);
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }

    pub(super) fn take(&self) -> VecDeque<Event> {
        std::mem::take(&mut *self.inbox()).events
    }

    /// The driver is gone: what it was told and has not seen is dropped, and so is what comes later.
    pub(super) fn close(&self) {
        let mut inbox = self.inbox();
        inbox.closed = true;
        let left = std::mem::take(&mut inbox.events);
        drop(inbox);
        drop(left);
    }

    pub(super) fn is_quiet(&self) -> bool {
        self.inbox().events.is_empty()
    }
}
