//! A host's queue over RDMA: capsules out, responses in, data in memory that the target reads and writes by its key.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;

use bdev::conformance::Rng;
use nvmf::rdma::capsule::{self, Block, MAX_BLOCKS, RESPONSE_BYTES, SQE_BYTES};
use nvmf::spec::rdma::{AcceptData, ConnectRequest, Reject};
use nvmf::spec::sqe::{Sgl, SglDescriptor};
use nvmf::spec::{Cqe, Sqe};
use reactor::rdma::{
    ConnectParams, Connecting, Done, EndpointId, ExposedId, Fabric, Hub, HubConfig, HubEvent, LinkEvent, Message,
    Operation, Post, QueueDepths, WorkStatus,
};
use reactor::{Buffer, Buffers};
use zerocopy::{FromBytes, IntoBytes};

use crate::rdma::{SimFabric, with_len};

/// Data that a capsule may have.
const IN_CAPSULE_BYTES: usize = 8192;

/// What came of a queue.
pub(super) enum Came {
    /// It is connected.
    Up,
    /// A response, and the data of the command as it is now in the host's memory.
    Response(Cqe, Vec<u8>),
}

struct Outgoing {
    sqe: Sqe,
    in_capsule: bool,
    payload: Vec<u8>,
    expects: usize,
}

struct Exposure {
    id: ExposedId,
    expects: usize,
    /// The key that the target was asked to invalidate.
    invalidate: Option<u32>,
}

struct Up {
    hub: Box<dyn Hub>,
    endpoint: EndpointId,
    sends: Vec<Buffer>,
    exposed: BTreeMap<u16, Exposure>,
    established: bool,
}

/// The queue.
pub(super) struct Line {
    qid: u16,
    entries: u32,
    connecting: Option<Box<dyn Connecting>>,
    up: Option<Up>,
    out: VecDeque<Outgoing>,
}

impl Line {
    pub(super) fn new(fabric: &SimFabric, addr: SocketAddr, qid: u16, entries: usize) -> Line {
        let connecting = fabric.connect(addr, 1000).expect("the fabric takes connections");
        Line { qid, entries: entries as u32, connecting: Some(connecting), up: None, out: VecDeque::new() }
    }

    /// Capsules that wait to be sent.
    pub(super) fn waiting(&self) -> usize {
        self.out.len()
    }

    /// Sends a command. `data` goes to the target, in the capsule if that is wished and it fits.
    pub(super) fn submit(&mut self, sqe: Sqe, in_capsule: bool, data: &[u8], expects: usize) {
        let in_capsule = in_capsule && data.len() <= IN_CAPSULE_BYTES;
        self.out.push_back(Outgoing { sqe, in_capsule, payload: data.to_vec(), expects });
    }

    fn attach(&mut self, link: Box<dyn reactor::rdma::Link>, rng: &mut Rng) -> Result<(), String> {
        let depth = self.entries + 2;
        let config = HubConfig { completions: 4 * depth, shared_receives: 0, announce: false };
        let mut hub = link.hub(config).map_err(|error| error.to_string())?;
        let depths = QueueDepths { send: depth, receive: depth, send_pieces: 1 };
        let endpoint = hub.attach(link, depths).map_err(|error| error.to_string())?;
        for buffer in hub.messages(depth as usize, RESPONSE_BYTES).expect("there is memory") {
            hub.post_receive(Some(endpoint), buffer).expect("there is room");
        }
        let sends = hub.messages(depth as usize, SQE_BYTES + IN_CAPSULE_BYTES).expect("there is memory");
        let request =
            ConnectRequest { qid: self.qid, send_entries: self.entries, receive_entries: self.entries, cntlid: None };
        let params =
            ConnectParams { responder_resources: 1 + rng.below(16) as u8, initiator_depth: 0, rnr_retry_count: 7 };
        hub.connect(endpoint, params, request.data().as_bytes()).map_err(|error| error.to_string())?;
        self.up = Some(Up { hub, endpoint, sends, exposed: BTreeMap::new(), established: false });
        Ok(())
    }

    /// Goes on; appends what has come, and says whether there was anything to do. An error is the end of the queue.
    pub(super) fn step(&mut self, rng: &mut Rng, came: &mut Vec<Came>) -> Result<bool, String> {
        let mut busy = false;
        if let Some(connecting) = &mut self.connecting {
            let Some(link) = connecting.poll().map_err(|error| error.to_string())? else { return Ok(false) };
            self.connecting = None;
            self.attach(link, rng)?;
            busy = true;
        }
        let Some(up) = &mut self.up else { return Ok(busy) };
        let mut done = Vec::new();
        busy |= up.hub.poll(&mut done).map_err(|error| error.to_string())? > 0;
        for done in done {
            up.done(done, came)?;
        }
        let mut events = Vec::new();
        up.hub.events(&mut events).map_err(|error| error.to_string())?;
        busy |= !events.is_empty();
        for event in events {
            up.event(event, self.entries, came)?;
        }
        while up.established
            && !up.sends.is_empty()
            && up.hub.room(up.endpoint) > 0
            && let Some(outgoing) = self.out.pop_front()
        {
            up.send(outgoing, rng)?;
            busy = true;
        }
        Ok(busy)
    }
}

impl Up {
    fn event(&mut self, event: HubEvent, entries: u32, came: &mut Vec<Came>) -> Result<(), String> {
        match event {
            HubEvent::Link(_, LinkEvent::Established { private_data, .. }) => {
                assert_eq!(AcceptData::parse(&private_data).map(u32::from), Some(entries), "what the target accepts");
                self.established = true;
                came.push(Came::Up);
                Ok(())
            }
            HubEvent::Link(_, LinkEvent::Rejected { private_data, .. }) => {
                let why = Reject::parse(&private_data).map_or("no reason was given", Reject::text);
                Err(format!("rejected: {why}"))
            }
            HubEvent::Link(_, LinkEvent::Failed { what }) => Err(what.to_owned()),
            other => Err(format!("{other:?}")),
        }
    }

    fn done(&mut self, done: Done, came: &mut Vec<Came>) -> Result<(), String> {
        match done {
            Done::Posted { head, status, .. } => {
                self.sends.extend(head.map(|head| with_len(head, None)));
                if status != WorkStatus::Success {
                    return Err(format!("sending failed: {status}"));
                }
            }
            Done::Received { buffer, bytes, invalidated, status, .. } => {
                if status != WorkStatus::Success {
                    return Err(format!("receiving failed: {status}"));
                }
                assert_eq!(bytes as usize, RESPONSE_BYTES, "a response's length");
                let cqe = Cqe::read_from_bytes(&buffer).expect("it has a response's length");
                self.hub.post_receive(Some(self.endpoint), buffer).map_err(|(_, error)| error.to_string())?;
                let exposure = self.exposed.remove(&cqe.cid.get());
                let asked = exposure.as_ref().and_then(|exposure| exposure.invalidate);
                assert!(invalidated.is_none() || invalidated == asked, "a key was invalidated that was not named");
                let mut data = Vec::new();
                if let Some(exposure) = exposure {
                    let memory = self.hub.reclaim(exposure.id);
                    if exposure.expects > 0 && cqe.status().is_success() {
                        data = memory.to_vec();
                    }
                }
                came.push(Came::Response(cqe, data));
            }
        }
        Ok(())
    }

    fn send(&mut self, outgoing: Outgoing, rng: &mut Rng) -> Result<(), String> {
        let Outgoing { sqe, in_capsule, payload, expects } = outgoing;
        let mut head = self.sends.pop().expect("it was just looked");
        let len = if in_capsule && !payload.is_empty() {
            let len = capsule::write_with_data(sqe, payload.len() as u32, &mut head);
            head[len..len + payload.len()].copy_from_slice(&payload);
            len + payload.len()
        } else if payload.is_empty() && expects == 0 {
            capsule::write(sqe, &[], &mut head)
        } else {
            let memory = if expects > 0 { scattered(&vec![0xa5; expects], rng) } else { scattered(&payload, rng) };
            let id = self.hub.expose(memory).map_err(|(_, error)| error.to_string())?;
            let blocks: Vec<Block> = self
                .hub
                .exposed(id)
                .iter()
                .map(|at| Block { address: at.address, len: at.bytes, key: at.key })
                .collect();
            let mut invalidate = None;
            let len = match blocks[..] {
                [Block { address, len, key }] if rng.one_in(2) => {
                    let mut sqe = sqe;
                    invalidate = Some(key);
                    sqe.dptr = SglDescriptor::from(Sgl::Keyed { address, len, key, invalidate: true });
                    head[..SQE_BYTES].copy_from_slice(sqe.as_bytes());
                    SQE_BYTES
                }
                _ => capsule::write(sqe, &blocks, &mut head),
            };
            self.exposed.insert(sqe.cid.get(), Exposure { id, expects, invalidate });
            len
        };
        let head = with_len(head, Some(len));
        let message = Some(Message { operation: Operation::Send, head, with_data: false });
        let posted = self.hub.post(self.endpoint, Post { message, ..Post::default() });
        self.hub.flush();
        posted.map_err(|refused| refused.error.map_or("the send queue is full".into(), |error| error.to_string()))
    }
}

/// The bytes in memory that is not in one piece.
fn scattered(bytes: &[u8], rng: &mut Rng) -> Buffers {
    let pieces = if rng.one_in(2) { 1 } else { 1 + rng.below(MAX_BLOCKS as u64) as usize };
    let piece = bytes.len().div_ceil(pieces).max(1);
    let mut list = Buffers::new();
    for chunk in bytes.chunks(piece) {
        let mut buffer = Buffer::heap(chunk.len());
        buffer.copy_from_slice(chunk);
        list.push(buffer);
    }
    list
}
