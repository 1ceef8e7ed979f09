//! Calls a server's methods over its socket; without tokio, for the command
//! line.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

use crate::dispatch::MAX_REPLY_BYTES;
use crate::framer::Framer;

/// How long a call may take unless said otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a call brought no result.
#[derive(Debug)]
pub enum ClientError {
    /// There is no connection.
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// No reply in time.
    TimedOut {
        /// The method.
        method: String,
        /// The time.
        timeout: Duration,
    },
    /// The server closed the connection before it replied.
    Closed {
        /// The method.
        method: String,
    },
    /// The connection failed.
    Io(io::Error),
    /// What came is no reply.
    Protocol(String),
    /// The server answered with an error.
    Server {
        /// Its code.
        code: i64,
        /// Its message, which says everything in words.
        message: String,
        /// The same, taken apart; null if the server gave none.
        data: Value,
    },
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClientError::Connect { path, error } => {
                let path = path.display();
                match error.kind() {
                    io::ErrorKind::NotFound => write!(
                        f,
                        "there is no socket at {path}: is `ringstone serve` running? start it, or \
                         name its socket with --socket PATH"
                    ),
                    io::ErrorKind::ConnectionRefused => write!(
                        f,
                        "nobody answers at {path}: the server that made it has ended; start \
                         `ringstone serve` again, or name another socket with --socket PATH"
                    ),
                    io::ErrorKind::PermissionDenied => write!(
                        f,
                        "{path} may be used by its owner only: run this as the user that runs the \
                         server"
                    ),
                    io::ErrorKind::WouldBlock => {
                        write!(f, "the server at {path} takes no connections: it has too many, or hangs")
                    }
                    _ => write!(f, "connecting to {path} failed: {error}"),
                }
            }
            ClientError::TimedOut { method, timeout } => write!(
                f,
                "no reply to {method} within {} s; it may still happen, look before you repeat it",
                timeout.as_secs_f64()
            ),
            ClientError::Closed { method } => {
                write!(f, "the server closed the connection before it replied to {method}; its log says why")
            }
            ClientError::Io(error) => write!(f, "the connection failed: {error}"),
            ClientError::Protocol(reason) => write!(f, "the server sent {reason}"),
            ClientError::Server { code, message, .. } => write!(f, "{message} (code {code})"),
        }
    }
}

impl std::error::Error for ClientError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ClientError::Connect { error, .. } | ClientError::Io(error) => Some(error),
            _ => None,
        }
    }
}

/// A connection to a server.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    framer: Framer,
    last_id: u64,
    timeout: Duration,
}

impl Client {
    /// Connects to the socket at `path`. Each call must end within `timeout`.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Client, ClientError> {
        let stream = connect(path).map_err(|error| ClientError::Connect { path: path.to_owned(), error })?;
        Ok(Client { stream, framer: Framer::new(2 * MAX_REPLY_BYTES), last_id: 0, timeout })
    }

    /// Changes how long each call may take.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Calls a method and waits for its result. `params` is an object, or null
    /// for none.
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value, ClientError> {
        let deadline = Instant::now() + self.timeout;
        self.last_id += 1;
        let mut request = json!({"jsonrpc": "2.0", "id": self.last_id, "method": method});
        if !params.is_null() {
            request["params"] = params;
        }
        // A server that refuses the connection or the request replies without
        // having read all of it, so its reply is worth more than this error.
        let sent = self.send(request.to_string().as_bytes(), deadline, method);
        match self.receive(deadline, method) {
            Err(ClientError::Closed { .. } | ClientError::Io(_)) if sent.is_err() => sent.map(|()| Value::Null),
            result => result,
        }
    }

    fn send(&mut self, bytes: &[u8], deadline: Instant, method: &str) -> Result<(), ClientError> {
        let timeout = self.left(deadline, method)?;
        self.stream
            .set_write_timeout(Some(timeout))
            .and_then(|()| self.stream.write_all(bytes))
            .map_err(|error| self.failed(error, method))
    }

    fn receive(&mut self, deadline: Instant, method: &str) -> Result<Value, ClientError> {
        let mut chunk = vec![0; 64 << 10];
        loop {
            while let Some(text) = self.framer.next() {
                let text = text.map_err(|error| ClientError::Protocol(error.to_string()))?;
                if let Some(result) = self.reply(&text)? {
                    return Ok(result);
                }
            }
            let timeout = self.left(deadline, method)?;
            let count = self
                .stream
                .set_read_timeout(Some(timeout))
                .and_then(|()| self.stream.read(&mut chunk))
                .map_err(|error| self.failed(error, method))?;
            if count == 0 {
                return Err(ClientError::Closed { method: method.to_owned() });
            }
            self.framer.push(&chunk[..count]);
        }
    }

    /// The result in a reply; `None` if it answers an earlier call, one that
    /// took too long.
    fn reply(&self, text: &str) -> Result<Option<Value>, ClientError> {
        let mut reply: Value = serde_json::from_str(text)
            .map_err(|error| ClientError::Protocol(format!("a reply that is not JSON: {error}")))?;
        let id = reply["id"].as_u64();
        if id.is_some_and(|id| id < self.last_id) {
            return Ok(None);
        }
        if let Some(error) = reply.get_mut("error") {
            return Err(ClientError::Server {
                code: error["code"].as_i64().unwrap_or_default(),
                message: error["message"].as_str().unwrap_or_default().to_owned(),
                data: error["data"].take(),
            });
        }
        match reply.get_mut("result") {
            Some(result) if id == Some(self.last_id) => Ok(Some(result.take())),
            _ => Err(ClientError::Protocol("something that is no reply".to_owned())),
        }
    }

    fn left(&self, deadline: Instant, method: &str) -> Result<Duration, ClientError> {
        match deadline.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(left),
            _ => Err(self.timed_out(method)),
        }
    }

    fn failed(&self, error: io::Error, method: &str) -> ClientError {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.timed_out(method),
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                ClientError::Closed { method: method.to_owned() }
            }
            _ => ClientError::Io(error),
        }
    }

    fn timed_out(&self, method: &str) -> ClientError {
        ClientError::TimedOut { method: method.to_owned(), timeout: self.timeout }
    }
}

/// Connects without waiting for a server whose backlog is full.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path).map_err(|errno| match errno {
        Errno::NAMETOOLONG => io::Error::other("the path is longer than the 107 bytes allowed"),
        errno => errno.into(),
    })?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}
