//! Work on memory that belongs to it: all queue pairs that one reactor has on one device.
//!
//! What posts work gives the memory away and gets it back when the work is done, so that nobody can touch what a device
//! uses; that is what makes this safe to use. One completion queue, and one shared receive queue where the device has them,
//! serve all queue pairs.
//!
//! A post is a chain: transfers (RDMA READs or WRITEs) that cover its data in order, and a message after them. Of a reliable
//! connection, a message arrives after the transfers before it; only the last request of a chain is signalled, and its
//! completion means that all of the chain is done. A request that fails makes all after it complete as flushed, so that the
//! last one of a chain completes in every case.
//!
//! ```text
//! work request identifier:  | serial, 32 bits | index, 30 bits | kind, 2 bits |     0 last of a chain, 1 other, 2 receive
//! ```
//! The serial tells a completion of what was there before from one of what is there now.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use reactor::rdma::{
    ConnectParams, Done, Doorbells, EndpointId, HubConfig, Operation, Post, QueueDepths, Refused, Remote, WorkStatus,
};
use reactor::{Buffer, BufferPool, Buffers};
use slab::Slab;

use crate::cm::{CmId, CmKey, EventChannel};
use crate::device::Context;
use crate::error::{Error, Result};
use crate::memory::{Access, MemoryRegion, ProtectionDomain};
use crate::queue::{self, CompletionChannel, CompletionQueue, Piece, QueuePair, SharedReceiveQueue, WorkCompletion};
use crate::raw;

/// Completions that one look at the queue takes.
const POLL_BATCH: usize = 32;

/// Memory that a peer which is told the key may read and write at any time; nobody here touches it meanwhile.
#[derive(Debug)]
pub struct Exposed {
    // Ends before the memory is given back.
    region: MemoryRegion,
    buffer: Buffer,
}

impl Exposed {
    /// New memory of `bytes` bytes, all zero.
    ///
    /// # Errors
    /// As [`MemoryRegion::of_pool`].
    pub fn new(domain: &Arc<ProtectionDomain>, bytes: usize) -> Result<Exposed> {
        let mut buffer = Buffer::heap(bytes);
        let (base, len) = (buffer.as_mut_ptr() as usize, buffer.capacity());
        // SAFETY: the buffer's memory is freed after the registration has ended, and nobody refers to it before that.
        let region = unsafe { MemoryRegion::register(domain, base, len, Access::Remote, Arc::new(())) }?;
        Ok(Exposed { region, buffer })
    }

    /// The address that peers use.
    pub fn address(&mut self) -> u64 {
        self.buffer.as_mut_ptr() as u64
    }

    /// The key that peers use.
    pub fn rkey(&self) -> u32 {
        self.region.rkey()
    }

    /// Ends the exposure and gives the memory back.
    pub fn into_buffer(self) -> Buffer {
        drop(self.region);
        self.buffer
    }
}

struct Sent {
    endpoint: EndpointId,
    serial: u32,
    user: u64,
    requests: u32,
    data: Buffers,
    head: Option<Buffer>,
    failed: Option<WorkStatus>,
}

struct Awaited {
    serial: u32,
    /// `None` for the shared queue.
    endpoint: Option<EndpointId>,
    buffer: Buffer,
}

struct Endpoint {
    id: CmId,
    number: u32,
    depths: QueueDepths,
    /// Work requests on the send queue.
    outstanding: u32,
}

impl Endpoint {
    fn pair(&self) -> &QueuePair {
        self.id.queue_pair().expect("an endpoint has a queue pair while it is attached")
    }
}

const LAST: u64 = 0;
const OTHER: u64 = 1;
const RECEIVE: u64 = 2;
const MAX_INDEX: usize = (1 << 30) - 1;

fn work_id(serial: u32, index: usize, kind: u64) -> u64 {
    debug_assert!(index <= MAX_INDEX);
    u64::from(serial) << 32 | (index as u64) << 2 | kind
}

/// Splits an identifier into serial, index and kind.
fn split_id(id: u64) -> (u32, usize, u64) {
    ((id >> 32) as u32, (id as u32 >> 2) as usize, id & 3)
}

/// All queue pairs that one reactor has on one device.
pub struct Hub {
    // In the order in which they end: queue pairs first, then what they use, memory last.
    endpoints: Slab<Endpoint>,
    srq: Option<Arc<SharedReceiveQueue>>,
    cq: Arc<CompletionQueue>,
    channel: Option<Arc<CompletionChannel>>,
    sends: Slab<Sent>,
    receives: Slab<Awaited>,
    regions: Vec<MemoryRegion>,
    domain: Arc<ProtectionDomain>,
    by_number: HashMap<u32, EndpointId>,
    serial: u32,
    completions: Box<[WorkCompletion; POLL_BATCH]>,
    /// Chains that wait for [`Hub::flush`], one behind the other, and the pieces of memory that they name.
    work: Vec<raw::ibv_send_wr>,
    pieces: Vec<raw::ibv_sge>,
    waiting: Vec<Waiting>,
    /// Receives that wait for it, and where to.
    receive_work: Vec<raw::ibv_recv_wr>,
    receive_pieces: Vec<raw::ibv_sge>,
    receive_to: Vec<Option<EndpointId>>,
    /// Chains and receives that the device did not take.
    refused: Vec<Done>,
    /// The shared receive queue has failed.
    failed: Option<Error>,
    doorbells: Doorbells,
}

/// A chain in [`Hub::work`].
#[derive(Clone, Copy, Debug)]
struct Waiting {
    endpoint: EndpointId,
    /// Its key in [`Hub::sends`].
    index: usize,
    /// Where it ends in the list.
    end: usize,
}

// SAFETY: the raw pointers in `work` and `receive_work` are made and used within one call; everything else may go to any thread.
unsafe impl Send for Hub {}

impl Hub {
    /// For a device that the connection manager opened.
    ///
    /// # Errors
    /// When the device cannot have queues so deep.
    pub fn new(context: &Arc<Context>, config: HubConfig) -> Result<Hub> {
        let domain = ProtectionDomain::new(context)?;
        let channel = if config.announce { Some(CompletionChannel::new(context)?) } else { None };
        let cq = CompletionQueue::new(context, config.completions, channel.as_ref())?;
        let srq = match config.shared_receives {
            0 => None,
            depth => Some(SharedReceiveQueue::new(&domain, depth)?),
        };
        Ok(Hub {
            endpoints: Slab::new(),
            srq,
            cq,
            channel,
            sends: Slab::new(),
            receives: Slab::new(),
            regions: Vec::new(),
            domain,
            by_number: HashMap::new(),
            serial: 0,
            completions: Box::default(),
            work: Vec::new(),
            pieces: Vec::new(),
            waiting: Vec::new(),
            receive_work: Vec::new(),
            receive_pieces: Vec::new(),
            receive_to: Vec::new(),
            refused: Vec::new(),
            failed: None,
            doorbells: Doorbells::default(),
        })
    }

    /// The protection domain, for exposing memory to peers.
    pub fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.domain
    }

    /// Registers a pool, whose buffers can be posted then.
    ///
    /// # Errors
    /// As [`MemoryRegion::of_pool`].
    pub fn register(&mut self, pool: &BufferPool) -> Result<()> {
        self.register_for(pool, Access::Local)
    }

    /// Registers a pool for use by this side alone, or by peers too.
    ///
    /// # Errors
    /// As [`MemoryRegion::of_pool`].
    pub fn register_for(&mut self, pool: &BufferPool, access: Access) -> Result<()> {
        self.regions.push(MemoryRegion::of_pool(&self.domain, pool, access)?);
        Ok(())
    }

    /// Registers new memory and cuts it up into `count` buffers of `bytes` bytes each. It is freed after the last of them, and
    /// its registration ends with the hub.
    ///
    /// # Errors
    /// As [`MemoryRegion::of_pool`].
    ///
    /// # Panics
    /// If it is 4 GiB or more together.
    pub fn messages(&mut self, count: usize, bytes: usize) -> Result<Vec<Buffer>> {
        // Buffers that do not share a cache line: the device writes them one by one.
        let stride = bytes.next_multiple_of(64);
        let mut memory = Buffer::heap(stride.checked_mul(count).expect("messages are few and short"));
        let (base, len) = (memory.as_mut_ptr(), memory.len());
        let owner: Arc<Buffer> = Arc::new(memory);
        // SAFETY: the memory is the owner's, which the region keeps. It is only reached through the buffers below, which are
        // given away to whoever posts them until the work is done.
        let region = unsafe {
            MemoryRegion::register(&self.domain, base as usize, len, Access::Local, Arc::clone(&owner) as _)
        }?;
        self.regions.push(region);
        let cut = |n: usize| {
            let start = std::ptr::NonNull::new(base.wrapping_add(n * stride)).expect("memory is not at address 0");
            // SAFETY: zeroed memory of the owner's, which each buffer keeps; buffers do not overlap, and nobody derefers the
            // owner's own view of it.
            unsafe { Buffer::lent(start, bytes, Arc::clone(&owner) as _) }
        };
        Ok((0..count).map(cut).collect())
    }

    /// What a peer has to be told to reach `buffer`; `None` if no registration allows it.
    pub(crate) fn remote(&self, buffer: &mut Buffer) -> Option<Remote> {
        let (address, bytes) = (buffer.as_mut_ptr() as usize, buffer.len());
        let region = self.regions.iter().find(|region| region.is_remote() && region.contains(address, bytes))?;
        Some(Remote { address: address as u64, bytes: bytes as u32, key: region.rkey() })
    }

    /// The endpoint with a queue pair's number.
    pub(crate) fn numbered(&self, number: u32) -> Option<EndpointId> {
        self.by_number.get(&number).copied()
    }

    /// Whether receives are posted to a shared queue.
    pub fn has_shared_receives(&self) -> bool {
        self.srq.is_some()
    }

    /// Ends a connection: all of its work completes, if only as flushed.
    pub fn disconnect(&mut self, endpoint: EndpointId) {
        self.flush();
        let of = &self.endpoints[endpoint.0];
        // What was never connected, or whose device is gone, is not told; then the queue pair fails by itself.
        if of.id.disconnect().is_err() {
            let _ = of.pair().set_error();
        }
    }

    /// Makes a queue pair for a connection that has none yet.
    ///
    /// # Errors
    /// When the device cannot have one so deep; the connection is gone then.
    pub fn attach(&mut self, mut id: CmId, depths: QueueDepths) -> Result<EndpointId> {
        let pair = id.create_queue_pair(&self.domain, &self.cq, self.srq.as_ref(), depths)?;
        let number = pair.number();
        let endpoint = EndpointId(self.endpoints.insert(Endpoint { id, number, depths, outstanding: 0 }));
        self.by_number.insert(number, endpoint);
        Ok(endpoint)
    }

    /// The connection of an endpoint.
    ///
    /// # Panics
    /// If it was detached, as all functions that take one.
    pub fn id(&self, endpoint: EndpointId) -> &CmId {
        &self.endpoints[endpoint.0].id
    }

    /// As [`CmId::connect`].
    ///
    /// # Errors
    /// As there.
    pub fn connect(&mut self, endpoint: EndpointId, params: ConnectParams, private_data: &[u8]) -> Result<()> {
        self.flush();
        self.endpoints[endpoint.0].id.connect(params, private_data)
    }

    /// As [`CmId::accept`].
    ///
    /// # Errors
    /// As there.
    pub fn accept(&mut self, endpoint: EndpointId, params: ConnectParams, private_data: &[u8]) -> Result<()> {
        self.flush();
        self.endpoints[endpoint.0].id.accept(params, private_data)
    }

    /// As [`CmId::migrate`].
    ///
    /// # Errors
    /// As there.
    pub fn migrate(&mut self, endpoint: EndpointId, channel: &Arc<EventChannel>) -> Result<()> {
        self.endpoints[endpoint.0].id.migrate(channel)
    }

    /// The endpoint of a connection manager's event.
    pub fn find(&self, key: CmKey) -> Option<EndpointId> {
        self.endpoints.iter().find(|(_, endpoint)| endpoint.id.key() == key).map(|(index, _)| EndpointId(index))
    }

    /// Ends a connection and its queue pair, and gives back what was posted there and has not completed.
    pub fn detach(&mut self, endpoint: EndpointId, back: &mut dyn FnMut(Done)) {
        self.flush();
        let of_it = |done: &mut Done| match done {
            Done::Posted { endpoint: of, .. } => *of == endpoint,
            Done::Received { endpoint: of, .. } => *of == Some(endpoint),
        };
        self.refused.extract_if(.., of_it).for_each(&mut *back);
        let Endpoint { mut id, number, .. } = self.endpoints.remove(endpoint.0);
        id.destroy_queue_pair();
        // From here on the device uses none of its memory.
        self.by_number.remove(&number);
        let sent: Vec<usize> = self.sends.iter().filter(|(_, s)| s.endpoint == endpoint).map(|(n, _)| n).collect();
        for index in sent {
            let Sent { user, data, head, failed, .. } = self.sends.remove(index);
            back(Done::Posted { endpoint, user, data, head, status: failed.unwrap_or(WorkStatus::Flushed) });
        }
        let own = |awaited: &Awaited| awaited.endpoint == Some(endpoint);
        let awaited: Vec<usize> = self.receives.iter().filter(|(_, a)| own(a)).map(|(n, _)| n).collect();
        for index in awaited {
            let buffer = self.receives.remove(index).buffer;
            let status = WorkStatus::Flushed;
            back(Done::Received { endpoint: Some(endpoint), buffer, bytes: 0, invalidated: None, status });
        }
    }

    fn next_serial(&mut self) -> u32 {
        self.serial = self.serial.wrapping_add(1);
        self.serial
    }

    fn lkey(regions: &[MemoryRegion], address: usize, bytes: usize) -> u32 {
        let region = regions.iter().find(|region| region.contains(address, bytes));
        region.expect("only memory of registered pools is posted").lkey()
    }

    /// Takes a receive, to the endpoint's own queue or to the shared one, which is posted with [`Hub::flush`] or
    /// [`Hub::poll`].
    ///
    /// # Panics
    /// If the buffer is of no registered pool, or the queue that is named does not exist.
    pub fn post_receive(&mut self, endpoint: Option<EndpointId>, mut buffer: Buffer) {
        assert!(endpoint.is_none() == self.srq.is_some(), "receives are posted either to the shared queue or to pairs");
        let (address, bytes) = (buffer.as_mut_ptr() as usize, buffer.len());
        let piece = Piece { address, bytes: bytes as u32, lkey: Hub::lkey(&self.regions, address, bytes) };
        let serial = self.next_serial();
        let index = self.receives.insert(Awaited { serial, endpoint, buffer });
        self.receive_work.push(queue::receive(work_id(serial, index, RECEIVE)));
        self.receive_pieces.push(piece.sge());
        self.receive_to.push(endpoint);
    }

    /// Posts the receives that wait, those for one queue that came one after the other as one list.
    fn flush_receives(&mut self) {
        if self.receive_work.is_empty() {
            return;
        }
        let (mut work, to) = (std::mem::take(&mut self.receive_work), std::mem::take(&mut self.receive_to));
        for (wr, piece) in work.iter_mut().zip(&mut self.receive_pieces) {
            wr.sg_list = piece;
        }
        let mut start = 0;
        for run in to.chunk_by(|a, b| a == b) {
            let list = &mut work[start..start + run.len()];
            start += run.len();
            link(list, |wr, next| wr.next = next);
            self.doorbells.receives += 1;
            let posted = match (run[0], &self.srq) {
                // SAFETY: list and pieces are linked above and stay for the call; the buffers are kept until the receives
                // complete or the queue is gone.
                (Some(endpoint), _) => unsafe { self.endpoints[endpoint.0].pair().post_receives(list) },
                // SAFETY: as above.
                (None, Some(srq)) => unsafe { srq.post_list(list) },
                (None, None) => unreachable!("it was looked at when they came"),
            };
            if let Err((posted, error)) = posted {
                self.give_up_receives(run[0], &list[posted..], error);
            }
        }
        self.receive_pieces.clear();
        work.clear();
        self.receive_work = work;
        self.receive_to = to;
        self.receive_to.clear();
    }

    /// Receives that the device did not take: the queue pair fails with them, or all of the hub.
    fn give_up_receives(&mut self, of: Option<EndpointId>, list: &[raw::ibv_recv_wr], error: Error) {
        let Some(endpoint) = of else {
            // Their memory stays until the hub ends.
            self.failed.get_or_insert(error);
            return;
        };
        let _ = self.endpoints[endpoint.0].pair().set_error();
        for wr in list {
            let buffer = self.receives.remove(split_id(wr.wr_id).1).buffer;
            let status = WorkStatus::Flushed;
            self.refused.push(Done::Received { endpoint: of, buffer, bytes: 0, invalidated: None, status });
        }
    }

    /// How often the device was told of work.
    pub fn doorbells(&self) -> Doorbells {
        self.doorbells
    }

    /// Room in an endpoint's send queue, in work requests.
    pub fn room(&self, endpoint: EndpointId) -> u32 {
        let endpoint = &self.endpoints[endpoint.0];
        endpoint.depths.send - endpoint.outstanding
    }

    /// Posts a chain at once.
    ///
    /// # Errors
    /// As [`Hub::enqueue`]; what the device refuses completes as flushed.
    ///
    /// # Panics
    /// As [`Hub::enqueue`].
    pub fn post(&mut self, endpoint: EndpointId, post: Post) -> std::result::Result<(), Box<Refused>> {
        self.enqueue(endpoint, post)?;
        self.flush();
        Ok(())
    }

    /// Takes a chain, which begins with [`Hub::flush`].
    ///
    /// # Errors
    /// [`Refused`]: the send queue has no room.
    ///
    /// # Panics
    /// If the chain is empty, its transfers are longer than its data, or memory is of no registered pool.
    pub fn enqueue(&mut self, endpoint: EndpointId, mut post: Post) -> std::result::Result<(), Box<Refused>> {
        let serial = self.next_serial();
        let index = self.sends.vacant_key();
        let (last, other) = (work_id(serial, index, LAST), work_id(serial, index, OTHER));
        let Some(of) = self.endpoints.get_mut(endpoint.0) else { panic!("the endpoint was detached") };
        let (work, pieces) = (self.work.len(), self.pieces.len());
        build(&mut post, &self.regions, of.depths.send_pieces, other, (&mut self.work, &mut self.pieces));
        let requests = (self.work.len() - work) as u32;
        if of.outstanding + requests > of.depths.send {
            self.work.truncate(work);
            self.pieces.truncate(pieces);
            return Err(Box::new(Refused { post, error: None }));
        }
        let end = self.work.last_mut().filter(|_| requests > 0).expect("a post does something");
        end.wr_id = last;
        end.send_flags |= raw::IBV_SEND_SIGNALED;
        of.outstanding += requests;
        let head = post.message.map(|message| message.head);
        let sent = Sent { endpoint, serial, user: post.user, requests, data: post.data, head, failed: None };
        assert_eq!(self.sends.insert(sent), index);
        self.waiting.push(Waiting { endpoint, index, end: self.work.len() });
        Ok(())
    }

    /// Posts what waits, receives first: chains of one endpoint that came one after the other as one list. Where the device
    /// refuses, the queue pair fails.
    pub fn flush(&mut self) {
        self.flush_receives();
        if self.waiting.is_empty() {
            return;
        }
        let waiting = std::mem::take(&mut self.waiting);
        point_at_pieces(&mut self.work, &mut self.pieces);
        let mut start = 0;
        for run in waiting.chunk_by(|a, b| a.endpoint == b.endpoint) {
            let end = run[run.len() - 1].end;
            let list = &mut self.work[start..end];
            link(list, |wr, next| wr.next = next);
            let pair = self.endpoints[run[0].endpoint.0].pair();
            self.doorbells.sends += 1;
            // SAFETY: list and pieces are linked above and stay for the call; the memory is kept in `sends` until the chains
            // have completed or the pair was destroyed.
            if let Err((posted, _)) = unsafe { pair.post_list(list) } {
                // Whatever was posted completes now, if only as flushed.
                let _ = pair.set_error();
                self.give_up(run, start, start + posted);
            }
            start = end;
        }
        self.work.clear();
        self.pieces.clear();
        self.waiting = waiting;
        self.waiting.clear();
    }

    /// The first of the chains of `run` begins at `start` in the list, of which everything before `posted` was posted. Those
    /// that were not come back; one of which a part was posted stays until the queue pair ends, which the device may use.
    fn give_up(&mut self, run: &[Waiting], mut start: usize, posted: usize) {
        for chain in run {
            if start >= posted {
                let Sent { endpoint, user, requests, data, head, .. } = self.sends.remove(chain.index);
                self.endpoints[endpoint.0].outstanding -= requests;
                self.refused.push(Done::Posted { endpoint, user, data, head, status: WorkStatus::Flushed });
            }
            start = chain.end;
        }
    }

    /// Takes completions; how many.
    ///
    /// # Errors
    /// When the completion queue or the shared receive queue has failed: everything on it is lost.
    pub fn poll(&mut self, out: &mut Vec<Done>) -> Result<usize> {
        self.flush_receives();
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let refused = self.refused.len();
        out.append(&mut self.refused);
        let count = self.cq.poll(&mut self.completions[..])?;
        for n in 0..count {
            let completion = self.completions[n];
            let (serial, index, kind) = split_id(completion.id());
            match kind {
                RECEIVE => {
                    if self.receives.get(index).is_none_or(|awaited| awaited.serial != serial) {
                        continue;
                    }
                    let Awaited { buffer, endpoint, .. } = self.receives.remove(index);
                    let status = completion.status();
                    let endpoint = endpoint.or_else(|| self.by_number.get(&completion.qp_num()).copied());
                    let bytes = if status == WorkStatus::Success { completion.received_bytes() } else { 0 };
                    let invalidated = completion.invalidated_rkey();
                    out.push(Done::Received { endpoint, buffer, bytes, invalidated, status });
                }
                kind => {
                    let Some(sent) = self.sends.get_mut(index).filter(|sent| sent.serial == serial) else { continue };
                    if completion.status() != WorkStatus::Success {
                        sent.failed.get_or_insert(completion.status());
                    }
                    if kind == LAST {
                        let Sent { endpoint, user, requests, data, head, failed, .. } = self.sends.remove(index);
                        self.endpoints[endpoint.0].outstanding -= requests;
                        out.push(Done::Posted {
                            endpoint,
                            user,
                            data,
                            head,
                            status: failed.unwrap_or(WorkStatus::Success),
                        });
                    }
                }
            }
        }
        Ok(refused + count)
    }

    /// The descriptor that is readable after [`Hub::arm`], once there is a completion; -1 for a hub that does not announce.
    pub fn fd(&self) -> std::os::fd::RawFd {
        self.channel.as_ref().map_or(-1, |channel| channel.fd())
    }

    /// Announces the next completion. Poll once more after this and before sleeping.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn arm(&self) -> Result<()> {
        if let Some(channel) = &self.channel {
            while channel.take()? {}
            self.cq.arm()?;
        }
        Ok(())
    }
}

/// The work requests of a chain. Their `sg_list` is the number of their first piece until [`point_at_pieces`].
fn build(
    post: &mut Post,
    regions: &[MemoryRegion],
    max_pieces: u32,
    id: u64,
    (work, pieces): (&mut Vec<raw::ibv_send_wr>, &mut Vec<raw::ibv_sge>),
) {
    let mut segments = post.data.buffers_mut().iter_mut();
    let (mut rest, mut skip) = (Piece::default(), post.start as usize);
    // The next piece of the data, at most `max` bytes.
    let mut next = |max: u32| {
        // A piece of no bytes would mean 2 GiB to a device.
        while rest.bytes == 0 {
            let buffer = segments.next()?;
            let (address, bytes) = (buffer.as_mut_ptr() as usize, buffer.len());
            let skipped = skip.min(bytes);
            skip -= skipped;
            let lkey = Hub::lkey(regions, address, bytes);
            rest = Piece { address: address + skipped, bytes: (bytes - skipped) as u32, lkey };
        }
        let piece = Piece { bytes: rest.bytes.min(max), ..rest };
        rest.address += piece.bytes as usize;
        rest.bytes -= piece.bytes;
        Some(piece)
    };
    let begin = |operation: Operation, at: usize| {
        let mut wr = queue::work(operation, id, false);
        wr.sg_list = std::ptr::without_provenance_mut(at);
        wr
    };
    for transfer in &post.transfers {
        let (mut done, mut wr) = (0, begin(transfer.operation, pieces.len()));
        while done < transfer.bytes {
            let piece = next(transfer.bytes - done).expect("transfers are no longer than the data");
            if wr.num_sge.cast_unsigned() == max_pieces {
                work.push(wr);
                wr = begin(transfer.operation, pieces.len());
                wr.remote_addr = wr.remote_addr.wrapping_add(done.into());
            }
            pieces.push(piece.sge());
            wr.num_sge += 1;
            done += piece.bytes;
        }
        work.push(wr);
    }
    if let Some(message) = &mut post.message {
        let mut wr = begin(message.operation, pieces.len());
        let (address, bytes) = (message.head.as_mut_ptr() as usize, message.head.len());
        assert!(bytes > 0, "a message has a head");
        pieces.push(Piece { address, bytes: bytes as u32, lkey: Hub::lkey(regions, address, bytes) }.sge());
        wr.num_sge = 1;
        while message.with_data
            && let Some(piece) = next(u32::MAX)
        {
            pieces.push(piece.sge());
            wr.num_sge += 1;
        }
        assert!(wr.num_sge.cast_unsigned() <= max_pieces, "a message has no more pieces than a request");
        work.push(wr);
    }
}

/// Turns numbers of pieces into their addresses.
fn point_at_pieces(work: &mut [raw::ibv_send_wr], pieces: &mut [raw::ibv_sge]) {
    for wr in work {
        wr.sg_list = pieces.as_mut_ptr().wrapping_add(wr.sg_list.addr());
    }
}

/// Makes a list of the requests.
fn link<T>(work: &mut [T], set_next: impl Fn(&mut T, *mut T)) {
    let count = work.len();
    let first = work.as_mut_ptr();
    for (n, wr) in work.iter_mut().enumerate() {
        set_next(wr, if n + 1 < count { first.wrapping_add(n + 1) } else { std::ptr::null_mut() });
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("endpoints", &self.endpoints.len())
            .field("sends", &self.sends.len())
            .field("receives", &self.receives.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_come_apart_again() {
        for (serial, index, kind) in [(0, 0, LAST), (u32::MAX, MAX_INDEX, RECEIVE), (7, 12345, OTHER)] {
            assert_eq!(split_id(work_id(serial, index, kind)), (serial, index, kind));
        }
    }

    #[test]
    fn requests_are_linked_to_each_other_and_to_their_pieces() {
        let mut pieces = vec![raw::ibv_sge::default(); 3];
        let mut work: Vec<raw::ibv_send_wr> = (0..3)
            .map(|n| {
                let mut wr = queue::work(Operation::Write { address: 64 * n, rkey: 1 }, 5, false);
                wr.sg_list = std::ptr::without_provenance_mut(n as usize);
                wr
            })
            .collect();
        point_at_pieces(&mut work, &mut pieces);
        link(&mut work[..2], |wr, next| wr.next = next);
        link(&mut work[2..], |wr, next| wr.next = next);
        let base = pieces.as_mut_ptr();
        for (n, wr) in work.iter().enumerate() {
            assert_eq!(wr.sg_list, base.wrapping_add(n));
        }
        assert!(std::ptr::eq(work[0].next, &work[1]));
        assert!(work[1].next.is_null() && work[2].next.is_null());
    }
}
