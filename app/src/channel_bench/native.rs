//! The same measurements over verbs: RDMA WRITE into memory that the peer exposed, and SEND there and back.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use reactor::buffer::{BufferPool, PoolConfig};
use reactor::rdma::{
    ConnectParams, Done, EndpointId, HubConfig, Message, Operation, Post, QueueDepths, Transfer, WorkStatus,
};
use reactor::time::OsClock;
use reactor::{Buffer, Buffers, Clock};
use verbs::{CmId, Event, EventChannel, EventKind, Exposed, Hub};

use super::{Figures, Options, StopOnDrop};

const DEPTH: u32 = 16;
const WINDOW_BYTES: usize = 1 << 20;
/// A SEND's size, at most: one buffer of the pool.
const MESSAGE_BYTES: usize = 128 * 1024;
/// Private data of a connect that is accepted.
const GREETING: &[u8] = b"ringstone channel-bench 1";
/// One that is refused, with the right one for a reason: the first connect of every run sees that refusals come through.
const WRONG_GREETING: &[u8] = b"ringstone channel-bench 0";
const TIMEOUT_MS: u32 = 10_000;
const DEPTHS: QueueDepths = QueueDepths { send: 4 * DEPTH, receive: 2 * DEPTH, send_pieces: 16 };
const PARAMS: ConnectParams = ConnectParams { responder_resources: 16, initiator_depth: 16, rnr_retry_count: 7 };

fn text(error: verbs::Error) -> String {
    error.to_string()
}

/// One end of a connection.
struct End {
    hub: Hub,
    endpoint: EndpointId,
    pool: BufferPool,
    done: Vec<Done>,
}

impl End {
    /// For a connection whose device is known; receives are posted.
    fn new(id: CmId) -> Result<End, String> {
        let context = id.context().map_err(text)?;
        let config = HubConfig { completions: 8 * DEPTH, shared_receives: 0, announce: false };
        let mut hub = Hub::new(&context, config).map_err(text)?;
        // A window of WRITEs, and the receives.
        let large = WINDOW_BYTES / MESSAGE_BYTES + 2 * DEPTH as usize + 2;
        let mut pool = BufferPool::new(PoolConfig { small: 0, medium: 0, large }).map_err(|e| e.to_string())?;
        hub.register(&pool).map_err(text)?;
        let endpoint = hub.attach(id, DEPTHS).map_err(text)?;
        for _ in 0..DEPTH {
            let buffer = one(&mut pool, MESSAGE_BYTES);
            hub.post_receive(Some(endpoint), buffer);
        }
        Ok(End { hub, endpoint, pool, done: Vec::new() })
    }

    fn send(&mut self, head: Buffer) -> Result<(), String> {
        let message = Some(Message { operation: Operation::Send, head, with_data: false });
        self.post(Post { message, ..Post::default() })
    }

    fn post(&mut self, post: Post) -> Result<(), String> {
        self.hub.post(self.endpoint, post).map_err(|refused| match refused.error {
            Some(error) => error.to_string(),
            None => "the send queue is full".into(),
        })
    }

    /// Takes completions into `done`; an error if one failed.
    fn poll(&mut self) -> Result<(), String> {
        if self.hub.poll(&mut self.done).map_err(text)? == 0 {
            std::thread::yield_now();
        }
        let failed = self.done.iter().find_map(|done| match done {
            Done::Received { status, .. } | Done::Posted { status, .. } => {
                (*status != WorkStatus::Success).then_some(*status)
            }
        });
        failed.map_or(Ok(()), |status| Err(status.to_string()))
    }

    /// Gives memory of finished work back; the received messages.
    fn collect(&mut self) -> Result<Vec<Buffer>, String> {
        let mut received = Vec::new();
        for done in std::mem::take(&mut self.done) {
            match done {
                Done::Received { buffer, bytes, .. } => {
                    let mut list = Buffers::new();
                    list.push(buffer);
                    list.truncate(bytes as usize);
                    received.extend(list.drain());
                }
                Done::Posted { data, head, .. } => {
                    self.pool.put(data);
                    drop(head);
                }
            }
        }
        Ok(received)
    }
}

/// A buffer of the pool, `len` bytes long.
fn one(pool: &mut BufferPool, len: usize) -> Buffer {
    let mut list = pool.alloc(len).expect("the pool was made large enough");
    list.drain().next().expect("one buffer holds a message")
}

/// Waits for an event.
fn event(channel: &Arc<EventChannel>, stop: &AtomicBool) -> Result<Event, String> {
    loop {
        if let Some(event) = channel.next().map_err(text)? {
            return Ok(event);
        }
        if stop.load(Ordering::Acquire) {
            return Err("the other end has given up".into());
        }
        std::thread::yield_now();
    }
}

/// All sizes.
pub fn measure(options: &Options) -> Result<Vec<Figures>, String> {
    let channel = EventChannel::new().map_err(text)?;
    let listener = CmId::listen(&channel, SocketAddr::new(options.address, 0), 4)
        .map_err(|error| format!("{}: {error}", options.address))?;
    let addr = listener.local_addr();
    let stop = AtomicBool::new(false);
    let (ready, is_ready) = mpsc::channel();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let _stop = StopOnDrop(&stop);
            serve(&channel, listener, &stop, ready)
        });
        let measured = (|| {
            let _stop = StopOnDrop(&stop);
            let (mut end, window) = connect(addr, &stop)?;
            // The server has accepted; from now on it echoes.
            is_ready.recv().map_err(|_| "the other end has given up")?;
            let mut figures = Vec::new();
            for &size in &options.sizes {
                let round_trip_us = match size as usize <= MESSAGE_BYTES {
                    true => Some(round_trip(&mut end, size, options.time)?),
                    false => None,
                };
                let bytes_per_second = throughput(&mut end, window, size, options.time)?;
                figures.push(Figures { size, bytes_per_second, round_trip_us });
            }
            Ok(figures)
        })();
        let served = server.join().expect("the serving thread does not panic");
        // Whichever end failed first is the cause; the other one saw the connection end.
        match (measured, served) {
            (Ok(figures), _) => Ok(figures),
            (Err(error), Ok(())) => Err(error),
            (Err(error), Err(other)) => Err(format!("{error}; the other end: {other}")),
        }
    })
}

/// Where the peer may be written to.
#[derive(Clone, Copy, Debug)]
struct Window {
    address: u64,
    rkey: u32,
}

/// Accepts one connection, exposes a window, and sends every message back until it is stopped.
fn serve(
    channel: &Arc<EventChannel>,
    _listener: CmId,
    stop: &AtomicBool,
    ready: mpsc::Sender<()>,
) -> Result<(), String> {
    let id = loop {
        if let EventKind::ConnectRequest { id, private_data, .. } = event(channel, stop)?.kind {
            // The kernel pads what it hands up with zeroes.
            if private_data.starts_with(GREETING) {
                break id;
            }
            id.reject(GREETING).map_err(text)?;
        }
    };
    let mut end = End::new(id)?;
    let mut window = Exposed::new(end.hub.domain(), WINDOW_BYTES).map_err(text)?;
    let mut private = [0; 12];
    private[..8].copy_from_slice(&window.address().to_le_bytes());
    private[8..].copy_from_slice(&window.rkey().to_le_bytes());
    end.hub.accept(end.endpoint, PARAMS, &private).map_err(text)?;
    while !matches!(event(channel, stop)?.kind, EventKind::Established { .. }) {}
    ready.send(()).map_err(|_| "the other end has given up")?;
    while !stop.load(Ordering::Acquire) {
        end.poll()?;
        for message in end.collect()? {
            let fresh = one(&mut end.pool, MESSAGE_BYTES);
            end.hub.post_receive(Some(end.endpoint), fresh);
            end.send(message)?;
        }
    }
    Ok(())
}

fn connect(addr: SocketAddr, stop: &AtomicBool) -> Result<(End, Window), String> {
    let (_refused, kind) = connect_saying(WRONG_GREETING, addr, stop)?;
    match kind {
        EventKind::Rejected { private_data, .. } if private_data.starts_with(GREETING) => {}
        other => return Err(format!("a greeting that must be refused led to {other:?}")),
    }
    let (end, kind) = connect_saying(GREETING, addr, stop)?;
    let EventKind::Established { private_data, .. } = kind else { return Err(format!("not connected: {kind:?}")) };
    let data: &[u8; 12] = private_data.first_chunk().ok_or("the other end did not say where its memory is")?;
    let address = u64::from_le_bytes(std::array::from_fn(|n| data[n]));
    let rkey = u32::from_le_bytes(std::array::from_fn(|n| data[8 + n]));
    Ok((end, Window { address, rkey }))
}

/// Connects with private data; what came of it.
fn connect_saying(greeting: &[u8], addr: SocketAddr, stop: &AtomicBool) -> Result<(End, EventKind), String> {
    let channel = EventChannel::new().map_err(text)?;
    let mut id = CmId::new(&channel).map_err(text)?;
    id.resolve_address(addr, TIMEOUT_MS).map_err(text)?;
    expect(event(&channel, stop)?, |kind| matches!(kind, EventKind::AddressResolved))?;
    id.resolve_route(TIMEOUT_MS).map_err(text)?;
    expect(event(&channel, stop)?, |kind| matches!(kind, EventKind::RouteResolved))?;
    let mut end = End::new(id)?;
    end.hub.connect(end.endpoint, PARAMS, greeting).map_err(text)?;
    Ok((end, event(&channel, stop)?.kind))
}

fn expect(event: Event, wanted: impl Fn(&EventKind) -> bool) -> Result<(), String> {
    if wanted(&event.kind) { Ok(()) } else { Err(format!("not connected: {:?}", event.kind)) }
}

/// Median time of a SEND there and back, in microseconds.
fn round_trip(end: &mut End, size: u32, seconds: f64) -> Result<f64, String> {
    let clock = OsClock::default();
    let mut times: Vec<u64> = Vec::new();
    let began = clock.now();
    while times.is_empty() || clock.now().since(began).as_secs_f64() < seconds {
        let mut message = one(&mut end.pool, size as usize);
        message.fill(7);
        let start = clock.now();
        end.send(message)?;
        let back = loop {
            end.poll()?;
            if let Some(back) = end.collect()?.pop() {
                break back;
            }
        };
        times.push(clock.now().nanos_since(start));
        if back.len() != size as usize || back.iter().any(|&byte| byte != 7) {
            return Err("the message came back changed".into());
        }
        drop(back);
        let fresh = one(&mut end.pool, MESSAGE_BYTES);
        end.hub.post_receive(Some(end.endpoint), fresh);
    }
    times.sort_unstable();
    Ok(times[times.len() / 2] as f64 / 1e3)
}

/// Bytes a second written into the peer's window, as many at once as the window's size and the depth allow.
fn throughput(end: &mut End, window: Window, size: u32, seconds: f64) -> Result<f64, String> {
    let clock = OsClock::default();
    let depth = (WINDOW_BYTES / size as usize).clamp(1, DEPTH as usize);
    let write = |end: &mut End, data: Buffers| {
        let operation = Operation::Write { address: window.address, rkey: window.rkey };
        let transfers = [Transfer { operation, bytes: size }].into_iter().collect();
        end.post(Post { user: 1, data, transfers, ..Post::default() })
    };
    // Buffers of 128 KiB, whatever the size: the memory is the same for all.
    let memory = |end: &mut End| end.pool.alloc(size as usize).ok_or("the pool is too small");
    let (mut outstanding, mut written) = (0, 0u64);
    let began = clock.now();
    loop {
        let over = clock.now().since(began).as_secs_f64() >= seconds;
        while !over && outstanding < depth {
            let Ok(mut data) = memory(end) else { break };
            data.fill(7);
            write(end, data)?;
            outstanding += 1;
        }
        if over && outstanding == 0 {
            break;
        }
        end.poll()?;
        let finished = end.done.iter().filter(|done| matches!(done, Done::Posted { user: 1, .. })).count();
        outstanding -= finished;
        written += finished as u64 * u64::from(size);
        end.collect()?;
    }
    Ok(written as f64 / clock.now().since(began).as_secs_f64())
}
