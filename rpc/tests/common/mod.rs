//! A small server to test with: shelves that boxes are put on.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{JoinHandle, Thread};

use futures_util::future::BoxFuture;
use ringstone_rpc::framer::Framer;
use ringstone_rpc::log::{LogControl, LogLevel};
use ringstone_rpc::runtime::{RuntimeSnapshot, RuntimeStats};
use ringstone_rpc::{Host, KillSignal, Limits, Server, Table, TableBuilder};
use schema::{ConfigEntry, ConfigSource, Errno, Kind, Method, Param, Params, RpcError, States};
use serde_json::{Value, json};
use tokio::sync::{Semaphore, oneshot};

pub struct Shelf {
    pub boxes: Mutex<Vec<String>>,
    pub size: Mutex<u64>,
    /// Handlers of shelf_wait that run.
    pub waiting: AtomicUsize,
    /// Handlers of shelf_watch that run.
    pub watching: AtomicUsize,
    /// Lets them end.
    pub gate: Semaphore,
    pub saved: Mutex<Vec<(String, Value)>>,
    pub saving_fails: AtomicBool,
    pub starting_fails: AtomicBool,
    pub killed: Mutex<Option<KillSignal>>,
}

pub const METHODS: &[Method<Shelf>] = &[
    Method::new("shelf_put", "Put a box on the shelf.", |shelf, params| Box::pin(put(shelf, params)))
        .mutates()
        .params(&[
            Param::required("name", Kind::Str, "its name").at_most(64),
            Param::optional("size", Kind::U32, "its size"),
        ])
        .result("its name"),
    Method::new("shelf_list", "List the boxes.", |shelf: Arc<Shelf>, _| {
        Box::pin(async move { Ok(json!(*shelf.boxes.lock().unwrap())) })
    })
    .states(States::BOTH)
    .aliases(&["shelf_ls"])
    .result("array of names"),
    Method::new("shelf_set_size", "Set the size.", |shelf: Arc<Shelf>, params| {
        Box::pin(async move {
            *shelf.size.lock().unwrap() = params.u64("size")?;
            Ok(json!(true))
        })
    })
    .states(States::STARTUP)
    .mutates()
    .params(&[Param::required("size", Kind::U64, "boxes that fit")]),
    Method::new("shelf_wait", "Wait, as a change.", |shelf, params| Box::pin(wait(shelf, params)))
        .states(States::BOTH)
        .mutates(),
    Method::new("shelf_watch", "Wait for ever.", |shelf: Arc<Shelf>, _| {
        Box::pin(async move {
            let _watching = Watching::new(&shelf);
            std::future::pending().await
        })
    })
    .waits(),
    Method::new("shelf_large", "Answer with much text.", |_, params| Box::pin(large(params)))
        .states(States::BOTH)
        .params(&[Param::required("bytes", Kind::U32, "how much")]),
];

struct Watching<'a>(&'a Shelf);

impl<'a> Watching<'a> {
    fn new(shelf: &'a Shelf) -> Self {
        shelf.watching.fetch_add(1, Ordering::SeqCst);
        Watching(shelf)
    }
}

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.0.watching.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn put(shelf: Arc<Shelf>, params: Params) -> Result<Value, RpcError> {
    let name = params.str("name")?;
    let mut boxes = shelf.boxes.lock().unwrap();
    if boxes.iter().any(|known| known == name) {
        let error = RpcError::errno(Errno::EXIST, "a box of that name is there already");
        return Err(params.blame("name", error.fix("choose another name")));
    }
    boxes.push(name.to_owned());
    if name == "heavy" {
        return Err(RpcError::errno(Errno::BUSY, "it is on the shelf, which still shakes"));
    }
    Ok(json!(name))
}

async fn wait(shelf: Arc<Shelf>, _: Params) -> Result<Value, RpcError> {
    shelf.waiting.fetch_add(1, Ordering::SeqCst);
    shelf.gate.acquire().await.unwrap().forget();
    shelf.waiting.fetch_sub(1, Ordering::SeqCst);
    Ok(json!(true))
}

async fn large(params: Params) -> Result<Value, RpcError> {
    let bytes = usize::try_from(params.u64("bytes")?).unwrap();
    Ok(json!("x".repeat(bytes)))
}

impl Shelf {
    pub fn new() -> Arc<Shelf> {
        Arc::new(Shelf {
            boxes: Mutex::default(),
            size: Mutex::new(8),
            waiting: AtomicUsize::new(0),
            watching: AtomicUsize::new(0),
            gate: Semaphore::new(0),
            saved: Mutex::default(),
            saving_fails: AtomicBool::new(false),
            starting_fails: AtomicBool::new(false),
            killed: Mutex::default(),
        })
    }

    pub fn builder(self: &Arc<Self>) -> TableBuilder {
        let shelf = Arc::clone(self);
        Table::builder(Arc::new(ShelfHost(Arc::clone(self))))
            .add(self, METHODS)
            .source(Arc::new(ShelfSource(Arc::clone(self))))
            .source(Arc::new(RoomSource))
            .after_change(Box::new(move |method, document| {
                let shelf = Arc::clone(&shelf);
                Box::pin(async move {
                    if shelf.saving_fails.load(Ordering::SeqCst) {
                        return Err(RpcError::errno(Errno::NOSPC, "writing the state failed"));
                    }
                    let saved = (method.to_owned(), document);
                    shelf.saved.lock().unwrap().push(saved);
                    Ok(())
                })
            }))
    }

    pub fn table(self: &Arc<Self>) -> Arc<Table> {
        Arc::new(self.builder().build().unwrap())
    }

    /// A table that has started.
    pub fn running(self: &Arc<Self>) -> Arc<Table> {
        let table = self.table();
        block_on(table.call("framework_start_init", Value::Null)).unwrap();
        table
    }
}

struct ShelfHost(Arc<Shelf>);

impl Host for ShelfHost {
    fn start(&self) -> BoxFuture<'_, Result<(), RpcError>> {
        Box::pin(async {
            match self.0.starting_fails.load(Ordering::SeqCst) {
                true => Err(RpcError::errno(Errno::NOMEM, "no room for the shelf")),
                false => Ok(()),
            }
        })
    }

    fn kill(&self, signal: KillSignal) -> Result<(), RpcError> {
        *self.0.killed.lock().unwrap() = Some(signal);
        Ok(())
    }
}

struct ShelfSource(Arc<Shelf>);

impl ConfigSource for ShelfSource {
    fn name(&self) -> &'static str {
        "shelf"
    }

    fn depends_on(&self) -> &'static [&'static str] {
        &["room"]
    }

    fn save(&self) -> Vec<ConfigEntry> {
        let size = *self.0.size.lock().unwrap();
        let mut entries = vec![ConfigEntry::new("shelf_set_size", json!({"size": size}))];
        for name in self.0.boxes.lock().unwrap().iter() {
            entries.push(ConfigEntry::new("shelf_put", json!({"name": name})));
        }
        entries
    }
}

struct RoomSource;

impl ConfigSource for RoomSource {
    fn name(&self) -> &'static str {
        "room"
    }

    fn save(&self) -> Vec<ConfigEntry> {
        Vec::new()
    }
}

#[derive(Default)]
pub struct TestLog {
    pub flags: Mutex<[bool; 2]>,
    pub levels: Mutex<Option<(LogLevel, LogLevel)>>,
}

impl LogControl for TestLog {
    fn level(&self) -> LogLevel {
        self.levels.lock().unwrap().map_or(LogLevel::Notice, |levels| levels.0)
    }

    fn set_level(&self, level: LogLevel) {
        let print = self.print_level();
        *self.levels.lock().unwrap() = Some((level, print));
    }

    fn print_level(&self) -> LogLevel {
        self.levels.lock().unwrap().map_or(LogLevel::Info, |levels| levels.1)
    }

    fn set_print_level(&self, level: LogLevel) {
        let log = self.level();
        *self.levels.lock().unwrap() = Some((log, level));
    }

    fn flags(&self) -> Vec<(&'static str, bool)> {
        let flags = self.flags.lock().unwrap();
        vec![("bdev", flags[0]), ("nvmf", flags[1])]
    }

    fn set_flag(&self, flag: &str, on: bool) {
        self.flags.lock().unwrap()[usize::from(flag == "nvmf")] = on;
    }
}

pub struct TestRuntime;

impl RuntimeStats for TestRuntime {
    fn snapshot(&self) -> BoxFuture<'_, Result<RuntimeSnapshot, RpcError>> {
        use ringstone_rpc::runtime::*;
        let poller = |schedule| PollerSnapshot { name: "poller".to_owned(), schedule, ..Default::default() };
        let snapshot = RuntimeSnapshot {
            tick_rate: 1_000_000_000,
            pid: std::process::id(),
            reactors: vec![ReactorSnapshot {
                threads: vec![ThreadSnapshot {
                    pollers: vec![poller(PollerSchedule::Active), poller(PollerSchedule::Timed { period_ticks: 5 })],
                    io_channels: vec![IoChannelSnapshot::default()],
                    ..Default::default()
                }],
                ..Default::default()
            }],
        };
        Box::pin(async { Ok(snapshot) })
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// A folder of its own for one test, removed with all in it.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let name = format!("ringstone-rpc-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A server on a thread of its own, as the application runs it.
pub struct Running {
    pub folder: Folder,
    pub path: PathBuf,
    pub shelf: Arc<Shelf>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    pub fn start() -> Running {
        Running::with(Limits::default())
    }

    pub fn with(limits: Limits) -> Running {
        let folder = Folder::new();
        let shelf = Shelf::new();
        let path = folder.file("rpc.sock");
        let server = Server::bind(&path, shelf.running(), limits).unwrap();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let stopped = async move { drop(stopped.await) };
            runtime.block_on(server.serve(stopped)).unwrap();
        });
        Running { folder, path, shelf, stop: Some(stop), thread: Some(thread) }
    }

    pub fn connect(&self) -> Connection {
        let stream = UnixStream::connect(&self.path).unwrap();
        Connection { stream, framer: Framer::new(1 << 30) }
    }

    pub fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.stop();
        }
    }
}

/// A client that writes whatever it is told to.
pub struct Connection {
    pub stream: UnixStream,
    framer: Framer,
}

impl Connection {
    pub fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    /// The next reply; `None` when the server closed.
    pub fn reply(&mut self) -> Option<Value> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(reply) = self.framer.next() {
                return Some(serde_json::from_str(&reply.unwrap()).unwrap());
            }
            match self.stream.read(&mut chunk).unwrap() {
                0 => return None,
                count => self.framer.push(&chunk[..count]),
            }
        }
    }
}

/// An executor that is not tokio's.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}
