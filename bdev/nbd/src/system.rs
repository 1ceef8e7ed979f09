//! The control plane: exports come and go while clients use them.
//!
//! # An export's life
//! ```text
//! add:    open the bdev -> listen -> enter -> reactor 0 accepts
//! remove: leave the list -> reactor 0 accepts no more, the socket's file goes -> every reactor ends its connections
//!         -> the bdev is closed
//! ```
//! - A removal answers what is outstanding, refuses what comes meanwhile with ESHUTDOWN, and closes. It runs as a task of
//!   its own and goes on when its caller loses interest, or patience after [`PATIENCE`].
//! - A bdev that goes away takes its exports with it. One that changes its size needs nothing: each request is checked
//!   against the size as of then, and new connections are told the new size.
//! - The bdev is opened for writing, unless the export is read-only, without a claim: it can have several exports, and
//!   whoever wants it to themselves is refused while it has one that writes.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bdev::core::registry::OnEvent;
use bdev::core::{BdevError, BdevEvent, BdevSystem, Descriptor};
use futures_channel::oneshot;
use futures_util::future::{BoxFuture, Either, join_all, select};
use reactor::net::Address;
use reactor::reactor::Gone;
use schema::{ConfigEntry, ConfigSource, Errno, RpcError};
use serde_json::json;

use crate::group::{Export, NbdGroup};

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 128;
/// How long a removal waits before it answers that it goes on in the background.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Why something could not be done to an export.
#[derive(Debug)]
pub enum NbdError {
    /// The socket has an export already.
    Exists {
        /// The socket.
        socket: PathBuf,
        /// What it exports.
        bdev: String,
    },
    /// There is no such export.
    NotFound {
        /// The socket.
        socket: PathBuf,
    },
    /// The path is not absolute.
    Relative {
        /// The path.
        socket: PathBuf,
    },
    /// The bdev cannot be used.
    Bdev(BdevError),
    /// The host refuses the socket.
    Socket {
        /// The path.
        socket: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// Operations are outstanding in the device and do not end; the removal goes on by itself.
    StillDraining {
        /// The socket.
        socket: PathBuf,
    },
    /// The server ends.
    Stopping,
}

impl fmt::Display for NbdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NbdError::Exists { socket, bdev } => write!(f, "{} exports '{bdev}' already", socket.display()),
            NbdError::NotFound { socket } => write!(f, "there is no export at {}", socket.display()),
            NbdError::Relative { socket } => write!(f, "{} is not an absolute path", socket.display()),
            NbdError::Bdev(error) => error.fmt(f),
            NbdError::Socket { socket, source } => write!(f, "cannot listen at {}: {source}", socket.display()),
            NbdError::StillDraining { socket } => write!(
                f,
                "{} takes no more requests, but some that it has do not end; the export goes when they do",
                socket.display()
            ),
            NbdError::Stopping => f.write_str("the server is stopping"),
        }
    }
}

impl std::error::Error for NbdError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            NbdError::Bdev(error) => Some(error),
            NbdError::Socket { source, .. } => Some(source),
            _ => None,
        }
    }
}

impl From<Gone> for NbdError {
    fn from(_: Gone) -> NbdError {
        NbdError::Stopping
    }
}

impl From<NbdError> for RpcError {
    fn from(error: NbdError) -> RpcError {
        let text = error.to_string();
        let of_socket = |errno: Errno, socket: &Path| {
            RpcError::errno(errno, &text).field("socket").value(socket.display().to_string())
        };
        match &error {
            NbdError::Exists { socket, .. } => {
                of_socket(Errno::EXIST, socket).fix("choose another path, or remove that export with nbd_export_remove")
            }
            NbdError::NotFound { socket } => {
                of_socket(Errno::NOENT, socket).fix("nbd_get_exports lists the exports there are")
            }
            NbdError::Relative { socket } => of_socket(Errno::INVAL, socket)
                .fix("give the whole path, from / on: it is saved, and used again at the next start"),
            NbdError::Socket { socket, source } => {
                let fix = match source.kind() {
                    std::io::ErrorKind::AddrInUse => "stop the program that listens there, or choose another path",
                    std::io::ErrorKind::AlreadyExists => "remove it, or choose another path",
                    std::io::ErrorKind::NotFound => "make the folder first",
                    std::io::ErrorKind::PermissionDenied => "choose a folder that this server may write to",
                    std::io::ErrorKind::InvalidInput => "choose a shorter path",
                    _ => "choose another path",
                };
                let errno = match (source.raw_os_error(), source.kind()) {
                    (Some(number), _) if number > 0 => Errno(number),
                    (_, std::io::ErrorKind::AlreadyExists | std::io::ErrorKind::AddrInUse) => Errno::EXIST,
                    (_, std::io::ErrorKind::ResourceBusy) => Errno::BUSY,
                    _ => Errno::INVAL,
                };
                of_socket(errno, socket).fix(fix)
            }
            NbdError::StillDraining { socket } => of_socket(Errno::BUSY, socket),
            NbdError::Stopping => RpcError::internal(text),
            NbdError::Bdev(_) => match error {
                NbdError::Bdev(error) => RpcError::from(error).field("bdev_name"),
                _ => unreachable!("it was just seen"),
            },
        }
    }
}

/// An export for `nbd_get_exports`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Name of the bdev.
    pub bdev_name: String,
    /// The socket.
    pub socket: PathBuf,
    /// Clients may only read.
    pub read_only: bool,
    /// Connections that are open.
    pub connections: u32,
}

struct Entry {
    export: Arc<Export>,
    descriptor: Descriptor,
}

#[derive(Default)]
struct State {
    exports: BTreeMap<u64, Entry>,
    next_id: u64,
    stopped: bool,
}

/// The server's control plane, and the context of the `nbd_*` methods.
pub struct NbdSystem {
    state: Mutex<State>,
    bdevs: Arc<BdevSystem>,
    /// Held while a listener is opened or closed.
    listening: futures_util::lock::Mutex<()>,
}

impl fmt::Debug for NbdSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdSystem").field("exports", &self.state().exports.len()).finish_non_exhaustive()
    }
}

impl NbdSystem {
    /// A server without exports, over reactors on each of which [`NbdGroup::install`] was called.
    pub fn new(bdevs: Arc<BdevSystem>) -> Arc<NbdSystem> {
        Arc::new(NbdSystem { state: Mutex::default(), bdevs, listening: futures_util::lock::Mutex::new(()) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a change as a task of its own and waits for it.
    async fn perform<T: Send + 'static>(
        &self,
        change: impl Future<Output = Result<T, NbdError>> + Send + 'static,
    ) -> Result<T, NbdError> {
        let (answer, answered) = oneshot::channel();
        self.bdevs.executor().spawn(Box::pin(async move {
            // A caller who no longer waits is not an error.
            let _ = answer.send(change.await);
        }));
        answered.await.unwrap_or(Err(NbdError::Stopping))
    }

    /// The exports, in the order in which they were added.
    pub fn list(&self) -> Vec<ExportInfo> {
        let info = |entry: &Entry| ExportInfo {
            bdev_name: entry.export.bdev.name().to_string(),
            socket: entry.export.socket.clone(),
            read_only: entry.export.read_only,
            connections: entry.export.connections.load(Ordering::Relaxed),
        };
        self.state().exports.values().map(info).collect()
    }

    /// Exports the device that answers to `bdev` at `socket`, an absolute path.
    ///
    /// # Errors
    /// [`NbdError::Relative`], [`NbdError::Exists`], [`NbdError::Bdev`], [`NbdError::Socket`], [`NbdError::Stopping`].
    pub async fn add(self: &Arc<Self>, bdev: &str, socket: &Path, read_only: bool) -> Result<(), NbdError> {
        let (system, bdev, socket) = (Arc::clone(self), bdev.to_owned(), socket.to_owned());
        self.perform(async move { system.do_add(&bdev, socket, read_only).await }).await
    }

    async fn do_add(self: &Arc<Self>, bdev: &str, socket: PathBuf, read_only: bool) -> Result<(), NbdError> {
        if !socket.is_absolute() {
            return Err(NbdError::Relative { socket });
        }
        let _listening = self.listening.lock().await;
        let id = {
            let mut state = self.state();
            if let Some(entry) = state.exports.values().find(|entry| entry.export.socket == socket) {
                return Err(NbdError::Exists { socket, bdev: entry.export.bdev.name().to_string() });
            }
            state.next_id += 1;
            state.next_id
        };
        let owner = format!("NBD export {}", socket.display());
        let on_event = on_event(Arc::downgrade(self), id);
        let descriptor = self.bdevs.open(bdev, !read_only, &owner, on_event).map_err(NbdError::Bdev)?;
        let listener = self
            .bdevs
            .platform()
            .network()
            .listen_at(&Address::Unix(socket.clone()), BACKLOG)
            .map_err(|source| NbdError::Socket { socket: socket.clone(), source })?;
        let export = Arc::new(Export {
            id,
            bdev: Arc::clone(descriptor.bdev()),
            socket: socket.clone(),
            read_only,
            connections: AtomicU32::new(0),
            ended: AtomicBool::new(false),
        });
        {
            let mut state = self.state();
            if state.stopped {
                return Err(NbdError::Stopping);
            }
            // If its removal began after it was opened, the event may have come before there was an export to remove; if it
            // begins after this, the event finds it.
            if export.bdev.is_removing() {
                return Err(NbdError::Bdev(BdevError::BeingRemoved { name: bdev.to_string() }));
            }
            state.exports.insert(id, Entry { export: Arc::clone(&export), descriptor });
        }
        let watched = Arc::clone(&export);
        let added = self.bdevs.reactors()[0]
            .call(move |cx| NbdGroup::of(cx).borrow_mut().add_listener(cx, watched, listener))
            .await?;
        if let Err(source) = added {
            self.state().exports.remove(&id);
            return Err(NbdError::Socket { socket, source });
        }
        tracing::info!(bdev = export.bdev.name(), socket = %socket.display(), read_only, "NBD export added");
        Ok(())
    }

    /// Ends the export at `socket`: what is outstanding is answered, then its connections are closed.
    ///
    /// # Errors
    /// [`NbdError::NotFound`]; [`NbdError::StillDraining`] after [`PATIENCE`]: it then goes on in the background.
    pub async fn remove(self: &Arc<Self>, socket: &Path) -> Result<(), NbdError> {
        let entry = {
            let mut state = self.state();
            let id = state.exports.iter().find(|(_, entry)| entry.export.socket == socket).map(|(&id, _)| id);
            id.and_then(|id| state.exports.remove(&id))
        };
        let Some(entry) = entry else { return Err(NbdError::NotFound { socket: socket.to_owned() }) };
        let system = Arc::clone(self);
        let ended = self.perform(async move { system.end(entry).await });
        match select(Box::pin(ended), self.bdevs.executor().sleep(PATIENCE)).await {
            Either::Left((ended, _)) => ended,
            Either::Right(_) => Err(NbdError::StillDraining { socket: socket.to_owned() }),
        }
    }

    /// Ends an export that is out of the list.
    async fn end(&self, entry: Entry) -> Result<(), NbdError> {
        let Entry { export, descriptor } = entry;
        export.ended.store(true, Ordering::Release);
        let id = export.id;
        {
            let _listening = self.listening.lock().await;
            let listener =
                self.bdevs.reactors()[0].call(move |cx| NbdGroup::of(cx).borrow_mut().remove_listener(cx, id)).await?;
            // Here, not on the reactor: the file goes with it.
            drop(listener);
        }
        // Connections that the listener had sent to other reactors are there before this.
        let drains: Vec<_> = self
            .bdevs
            .reactors()
            .iter()
            .map(|reactor| {
                reactor.call_deferred(move |cx, reply| NbdGroup::of(cx).borrow_mut().end_export(cx, id, reply))
            })
            .collect();
        join_all(drains).await.into_iter().collect::<Result<(), Gone>>()?;
        drop(descriptor);
        tracing::info!(bdev = export.bdev.name(), socket = %export.socket.display(), "NBD export removed");
        Ok(())
    }

    /// The device of an export goes away.
    async fn device_removing(self: Arc<Self>, id: u64) {
        let Some(entry) = self.state().exports.remove(&id) else { return };
        let (bdev, socket) = (entry.export.bdev.name(), entry.export.socket.display());
        tracing::warn!(bdev, %socket, "NBD export ends: its bdev goes away");
        if self.end(entry).await.is_err() {
            tracing::debug!("the reactors stopped before an NBD export had ended");
        }
    }

    /// Ends everything. What is saved stays as it was. Waits as long as it takes.
    pub async fn shut_down(self: &Arc<Self>) {
        let entries = {
            let mut state = self.state();
            state.stopped = true;
            std::mem::take(&mut state.exports)
        };
        let ends: Vec<BoxFuture<'_, _>> =
            entries.into_values().map(|entry| Box::pin(self.end(entry)) as BoxFuture<'_, _>).collect();
        // It only fails when the reactors are gone, and then all this is done.
        let _ = join_all(ends).await;
    }
}

/// Hands a device's events to the control plane's executor. Weak, because the system owns the descriptors whose registry
/// owns this.
fn on_event(system: Weak<NbdSystem>, id: u64) -> OnEvent {
    Arc::new(move |event| {
        let Some(system) = system.upgrade() else { return };
        if event == BdevEvent::Removing {
            let executor = Arc::clone(system.bdevs.executor());
            executor.spawn(Box::pin(system.device_removing(id)));
        }
    })
}

/// "nbd_exports" in saved configurations.
impl ConfigSource for NbdSystem {
    fn name(&self) -> &'static str {
        // Not "nbd", which in SPDK's documents is the part that attaches bdevs to the kernel's driver.
        "nbd_exports"
    }

    fn depends_on(&self) -> &'static [&'static str] {
        &["bdev"]
    }

    fn save(&self) -> Vec<ConfigEntry> {
        let entry = |info: ExportInfo| {
            let params = json!({"bdev_name": info.bdev_name, "socket": info.socket, "readonly": info.read_only});
            ConfigEntry::new("nbd_export_add", params)
        };
        self.list().into_iter().map(entry).collect()
    }
}
