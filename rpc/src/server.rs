//! Serves a table on a Unix stream socket.
//!
//! A connection carries JSON texts without delimiters, see [`framer`](crate::framer).
//! Its requests are answered one after another, in order; while one is being
//! answered, and while a reply waits for its reader, nothing more is read, so
//! that a client's backlog stays in its own socket. Connections do not wait for
//! one another, except where they change the configuration.
//!
//! Bounds: clients, bytes of a request, bytes of a reply, requests in a batch,
//! time for a client to take its reply. Text that is not JSON is answered with
//! -32700, after which the connection is closed: in a stream without delimiters
//! there is no place to start again.
//!
//! The socket's file belongs to who holds the lock on `PATH.lock`, so that two
//! servers never fight over it, and one that a killed server left is replaced.
//! It is readable and writable by its owner only, from before the first
//! connection on.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use schema::RpcError;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::dispatch;
use crate::framer::Framer;
use crate::table::Table;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Bytes read at once.
const CHUNK: usize = 64 << 10;

/// How often it is looked whether the client of a long request is still there:
/// the system tells only that together with "writable", which it always is.
const HANG_UP_CHECK: Duration = Duration::from_secs(1);

/// Limits of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections at one time; one more is told so and closed.
    pub clients: usize,
    /// Bytes of one request or batch.
    pub request_bytes: usize,
    /// How long a client may take to read a reply.
    pub reply_timeout: Duration,
    /// How long requests may go on after the server was told to stop.
    pub stop_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            clients: 64,
            request_bytes: 4 << 20,
            reply_timeout: Duration::from_secs(60),
            stop_timeout: Duration::from_secs(1),
        }
    }
}

/// Why a server cannot have its socket.
#[derive(Debug)]
pub enum BindError {
    /// Another process has it.
    InUse {
        /// The socket.
        path: PathBuf,
        /// The process, where the system tells.
        process: Option<String>,
    },
    /// There is something else of that name.
    NotASocket(PathBuf),
    /// The path has more bytes than a socket's address can hold.
    PathTooLong(PathBuf),
    /// A system call failed.
    Io {
        /// What it was meant to do.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BindError::InUse { path, process } => write!(
                f,
                "RPC socket {} is in use by {}; stop that, or choose another path with --rpc-socket",
                path.display(),
                process.as_deref().unwrap_or("another process"),
            ),
            BindError::NotASocket(path) => write!(
                f,
                "{} is there already and is not a socket; remove it, or choose another path with \
                 --rpc-socket",
                path.display()
            ),
            BindError::PathTooLong(path) => write!(
                f,
                "RPC socket path {} is longer than the 107 bytes that a socket's address holds; \
                 choose a shorter one with --rpc-socket",
                path.display()
            ),
            BindError::Io { doing, path, error } => {
                write!(f, "RPC socket: {doing} {} failed: {error}", path.display())
            }
        }
    }
}

impl std::error::Error for BindError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            BindError::Io { error, .. } => Some(error),
            _ => None,
        }
    }
}

/// A socket that is bound and listens, with the table that answers on it.
#[derive(Debug)]
pub struct Server {
    listener: StdListener,
    files: Files,
    table: Arc<Table>,
    limits: Limits,
}

/// Removes the socket and the lock when the server ends.
#[derive(Debug)]
struct Files {
    socket: PathBuf,
    lock: PathBuf,
    _locked: File,
}

impl Drop for Files {
    fn drop(&mut self) {
        // The lock goes last: who waits for it finds no socket.
        for path in [&self.socket, &self.lock] {
            if let Err(error) = fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "removing failed");
            }
        }
    }
}

impl Server {
    /// Takes the socket at `path`, replacing one that nobody answers on.
    /// Clients can connect from now on; they are answered once
    /// [`serve`](Server::serve) runs.
    pub fn bind(path: &Path, table: Arc<Table>, limits: Limits) -> Result<Server, BindError> {
        let address = SocketAddrUnix::new(path).map_err(|errno| match errno {
            Errno::NAMETOOLONG => BindError::PathTooLong(path.to_owned()),
            errno => io_error("using", path, errno.into()),
        })?;
        let (lock, locked) = lock(path)?;
        remove_stale(path)?;

        let fail = |doing| move |errno: Errno| io_error(doing, path, errno.into());
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(fail("making"))?;
        rustix::net::bind(&socket, &address).map_err(fail("binding"))?;
        let files = Files { socket: path.to_owned(), lock, _locked: locked };
        // Nobody can connect before it listens.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .map_err(|error| io_error("restricting", path, error))?;
        rustix::net::listen(&socket, BACKLOG).map_err(fail("listening on"))?;
        Ok(Server { listener: StdListener::from(socket), files, table, limits })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.files.socket
    }

    /// Answers until `stop` is done; then lets requests that run finish, for
    /// at most the time that the limits give, and removes the socket. Needs a
    /// tokio runtime with I/O and time.
    pub async fn serve(self, stop: impl Future<Output = ()>) -> io::Result<()> {
        let listener = UnixListener::from_std(self.listener)?;
        let (stopping, told) = watch::channel(false);
        let mut clients = JoinSet::new();
        let mut stop = std::pin::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => break,
                Some(ended) = clients.join_next() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "an RPC connection ended abnormally");
                    }
                }
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) if clients.len() >= self.limits.clients => {
                        refuse(&stream, self.limits.clients);
                    }
                    Ok((stream, _)) => {
                        let connection = Connection {
                            stream,
                            table: Arc::clone(&self.table),
                            limits: self.limits,
                            stopping: told.clone(),
                        };
                        clients.spawn(connection.run());
                    }
                    Err(error) => {
                        tracing::warn!(%error, "accepting an RPC connection failed");
                        // Out of descriptors: nothing says when there are some.
                        sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
        drop(listener);
        drop(self.files);
        stopping.send_replace(true);
        let finish = async { while clients.join_next().await.is_some() {} };
        if timeout(self.limits.stop_timeout, finish).await.is_err() {
            tracing::warn!("RPC requests still ran when the server stopped");
        }
        Ok(())
    }
}

fn io_error(doing: &'static str, path: &Path, error: io::Error) -> BindError {
    BindError::Io { doing, path: path.to_owned(), error }
}

/// Takes the lock that says whose the socket is.
fn lock(socket: &Path) -> Result<(PathBuf, File), BindError> {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    loop {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| io_error("opening the lock", &path, error))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(BindError::InUse {
                    path: socket.to_owned(),
                    process: StdStream::connect(socket).ok().and_then(|peer| process(&peer)),
                });
            }
            Err(errno) => return Err(io_error("locking", &path, errno.into())),
        }
        // Its last owner may have removed the file between the two calls.
        let locked = file.metadata().map_err(|error| io_error("reading", &path, error))?;
        let same = fs::metadata(&path).is_ok_and(|now| (now.dev(), now.ino()) == (locked.dev(), locked.ino()));
        if same {
            return Ok((path, file));
        }
    }
}

/// Removes a socket that nobody answers on.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let kind = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error("looking at", path, error)),
    };
    if !kind.is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    match StdStream::connect(path) {
        Ok(peer) => Err(BindError::InUse { path: path.to_owned(), process: process(&peer) }),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "replacing a socket that nobody answers on");
            fs::remove_file(path).map_err(|error| io_error("removing", path, error))
        }
        Err(error) => Err(io_error("trying", path, error)),
    }
}

/// Names the process at the other end: "process 4711 (ringstone)".
fn process(peer: &impl AsFd) -> Option<String> {
    let pid = sockopt::socket_peercred(peer).ok()?.pid.as_raw_nonzero();
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok();
    Some(match name.as_deref().map(str::trim) {
        Some(name) => format!("process {pid} ({name})"),
        None => format!("process {pid}"),
    })
}

fn refuse(stream: &UnixStream, clients: usize) {
    tracing::warn!(clients, "an RPC connection was refused: there are too many");
    let error = RpcError::internal(format!("{clients} clients are connected, no more are served")).fix("close some");
    // As much as fits without waiting; the socket is new, so all of it does.
    let _ = stream.try_write(dispatch::reply("null", &error).as_bytes());
}

/// Whether the client has closed its socket, not just its writing half.
fn hung_up(stream: &UnixStream) -> bool {
    match stream.ready(Interest::WRITABLE).now_or_never() {
        Some(Ok(ready)) => ready.is_write_closed(),
        Some(Err(_)) => true,
        None => false,
    }
}

struct Connection {
    stream: UnixStream,
    table: Arc<Table>,
    limits: Limits,
    stopping: watch::Receiver<bool>,
}

impl Connection {
    async fn run(mut self) {
        if let Err(error) = self.answer_all().await {
            tracing::debug!(%error, "an RPC connection ended");
        }
    }

    async fn answer_all(&mut self) -> io::Result<()> {
        let mut framer = Framer::new(self.limits.request_bytes);
        let mut chunk = vec![0; CHUNK];
        loop {
            while let Some(request) = framer.next() {
                let reply = match request {
                    Ok(text) => match self.answer(&text).await {
                        Some(reply) => reply,
                        None => return Ok(()),
                    },
                    Err(error) => {
                        self.send(dispatch::parse_error(&error.to_string())).await?;
                        return self.linger(&mut chunk).await;
                    }
                };
                if let Some(reply) = reply {
                    self.send(reply).await?;
                }
                if *self.stopping.borrow() {
                    return Ok(());
                }
                // A client with many short requests must not keep others off
                // this thread.
                tokio::task::yield_now().await;
            }
            let count = tokio::select! {
                count = self.stream.read(&mut chunk) => count?,
                _ = self.stopping.changed() => return Ok(()),
            };
            if count == 0 {
                if let Err(error) = framer.end() {
                    self.send(dispatch::parse_error(&error.to_string())).await?;
                }
                return Ok(());
            }
            framer.push(&chunk[..count]);
        }
    }

    /// `None` if the request only waited, and nobody waits for its reply.
    async fn answer(&mut self, text: &str) -> Option<Option<String>> {
        let waits = AtomicBool::new(false);
        let mut answer = pin!(self.table.answer_watched(text, &waits));
        let mut stopping = false;
        loop {
            tokio::select! {
                reply = &mut answer => return Some(reply),
                _ = self.stopping.changed(), if !stopping => stopping = true,
                () = sleep(HANG_UP_CHECK) => {}
            }
            if waits.load(Ordering::Relaxed) && (stopping || hung_up(&self.stream)) {
                return None;
            }
        }
    }

    async fn send(&mut self, mut reply: String) -> io::Result<()> {
        reply.push('\n');
        let write = self.stream.write_all(reply.as_bytes());
        match timeout(self.limits.reply_timeout, write).await {
            Ok(result) => result,
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read its reply")),
        }
    }

    /// Reads what the client still sends, so that it finds the reply rather
    /// than a broken pipe.
    async fn linger(&mut self, chunk: &mut [u8]) -> io::Result<()> {
        self.stream.shutdown().await?;
        let mut left = 4 * self.limits.request_bytes;
        let drain = async {
            while left > 0 {
                match self.stream.read(chunk).await? {
                    0 => break,
                    count => left = left.saturating_sub(count),
                }
            }
            Ok(())
        };
        tokio::select! {
            result = timeout(self.limits.stop_timeout, drain) => result.unwrap_or(Ok(())),
            _ = self.stopping.changed() => Ok(()),
        }
    }
}
