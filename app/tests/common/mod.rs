//! The real binary, in a folder of its own.
//!
//! Times here are patience with a loaded machine, never what is tested: who waits, waits for a condition, and what does
//! not come within [`PATIENCE`] is a failure.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod guide;

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rpc::{Client, ClientError};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// How long something may take that takes moments on an idle machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until `condition` gives something.
#[track_caller]
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::yield_now();
    }
}

/// A folder that is removed at the end.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("ringstone-{}-{number}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).expect("a temporary folder can be made");
        Scratch(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The state directory of its servers.
    pub fn state(&self) -> PathBuf {
        self.0.join("state")
    }

    pub fn socket(&self) -> PathBuf {
        self.state().join("rpc.sock")
    }

    pub fn config(&self) -> PathBuf {
        self.state().join("config.json")
    }

    /// A file of this folder, written anew.
    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).expect("a file can be written");
        path
    }

    /// `ringstone serve` in this folder, not yet started.
    pub fn serve(&self, args: &[&str]) -> Command {
        let mut command = ringstone();
        command.arg("serve").arg("--state-dir").arg(self.state()).args(args);
        command
    }

    /// A start that must not succeed: what it says.
    #[track_caller]
    pub fn refused(&self, args: &[&str]) -> String {
        let output = self.serve(args).output().expect("the binary runs");
        let said = String::from_utf8(output.stderr).expect("UTF-8");
        assert_eq!(output.status.code(), Some(1), "{said}");
        said
    }

    /// `ringstone rpc` with this folder's socket.
    pub fn rpc_command(&self, words: &[&str]) -> Output {
        ringstone().arg("rpc").arg("--socket").arg(self.socket()).args(words).output().expect("the binary runs")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The binary, with nothing of this process's surroundings that it looks at.
pub fn ringstone() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringstone"));
    command.env_remove("XDG_STATE_HOME").stdin(Stdio::null());
    command
}

/// A port that nobody listens on. Below those that the kernel gives to outgoing connections, so that none takes it.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    for _ in 0..20_000 {
        let offset = NEXT.fetch_add(1, Ordering::Relaxed) as u32 + std::process::id() * 101;
        let port = 10_000 + (offset % 20_000) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no port is free");
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    child: Child,
    lines: Receiver<String>,
    /// What it printed up to "ready".
    pub said: Vec<String>,
    socket: PathBuf,
    log: PathBuf,
}

impl Server {
    /// Starts a server in `scratch` and waits until it is ready.
    #[track_caller]
    pub fn start(scratch: &Scratch, args: &[&str]) -> Server {
        Server::start_until(scratch, args, |line| line == "ready")
    }

    /// The same, until it prints a certain line.
    #[track_caller]
    pub fn start_until(scratch: &Scratch, args: &[&str], last: impl Fn(&str) -> bool) -> Server {
        let log = scratch.path().join("log");
        let stderr = fs::File::create(&log).expect("a log can be made");
        let mut child =
            scratch.serve(args).stdout(Stdio::piped()).stderr(stderr).spawn().expect("the binary can be started");
        let stdout = child.stdout.take().expect("a pipe");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut server = Server { child, lines, said: Vec::new(), socket: scratch.socket(), log };
        server.read_until(last);
        server
    }

    /// Takes lines of the server's output up to a certain one.
    #[track_caller]
    pub fn read_until(&mut self, last: impl Fn(&str) -> bool) {
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => {
                    let done = last(&line);
                    self.said.push(line);
                    if done {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("the server hangs: {:?}\n{}", self.said, self.log()),
                Err(RecvTimeoutError::Disconnected) => panic!("the server ended: {:?}\n{}", self.said, self.log()),
            }
        }
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Open file descriptors.
    pub fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("the server runs").count()
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket, PATIENCE).expect("the server answers")
    }

    /// A call that must succeed.
    #[track_caller]
    pub fn call(&self, method: &str, params: Value) -> Value {
        match self.client().call(method, params) {
            Ok(result) => result,
            Err(error) => panic!("{method}: {error}\n{}", self.log()),
        }
    }

    /// A call that must fail: code, message and data.
    #[track_caller]
    pub fn call_fails(&self, method: &str, params: Value) -> (i64, String, Value) {
        match self.client().call(method, params) {
            Err(ClientError::Server { code, message, data }) => (code, message, data),
            other => panic!("{method}: {other:?}"),
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it is a child of this process");
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the server ends", || self.child.try_wait().expect("it is a child of this process"))
    }

    /// Stops it with a signal that it must obey cleanly.
    #[track_caller]
    pub fn stop(mut self, signal: Signal) -> String {
        self.signal(signal);
        let status = self.wait();
        let log = self.log();
        assert_eq!(status.code(), Some(0), "{status}\n{log}");
        log
    }

    /// Takes it away without warning.
    #[track_caller]
    pub fn kill(mut self) {
        self.signal(Signal::KILL);
        assert_eq!(self.wait().signal(), Some(Signal::KILL.as_raw()));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A TCP listen address as RPCs take it.
pub fn address(port: u16) -> Value {
    json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string()})
}
