//! Completion queues and channels, shared receive queues, and what queue pairs post.
//!
//! Plain completion queues only: extended ones do not work on soft-RoCE.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use reactor::rdma::{Operation, QueueDepths, WorkStatus};

use crate::device::{Context, set_nonblocking};
use crate::error::{Error, Result};
use crate::memory::ProtectionDomain;
use crate::raw;

/// Through what a sleeper learns that completion queues have something.
pub struct CompletionChannel {
    context: Arc<Context>,
    raw: NonNull<raw::ibv_comp_channel>,
}

// SAFETY: verbs are safe for use from several threads; completion queues on the channel hold it.
unsafe impl Send for CompletionChannel {}
// SAFETY: as above.
unsafe impl Sync for CompletionChannel {}

impl CompletionChannel {
    /// A new one, whose descriptor does not block.
    ///
    /// # Errors
    /// When the process is out of descriptors, or the device is gone.
    pub fn new(context: &Arc<Context>) -> Result<Arc<CompletionChannel>> {
        // SAFETY: the context is open.
        let raw = unsafe { (context.libraries().ibv.ibv_create_comp_channel)(context.as_ptr()) };
        let raw = NonNull::new(raw).ok_or_else(|| Error::last("ibv_create_comp_channel"))?;
        let channel = CompletionChannel { context: Arc::clone(context), raw };
        set_nonblocking(channel.fd()).map_err(|error| Error::Call { call: "fcntl", error, hint: "" })?;
        Ok(Arc::new(channel))
    }

    /// Readable when an armed completion queue has got something.
    pub fn fd(&self) -> RawFd {
        // SAFETY: the channel is open.
        unsafe { self.raw.as_ref().fd }
    }

    /// Takes one notification off; false when there is none. The queue has to be armed anew, and polled after that.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn take(&self) -> Result<bool> {
        let (mut cq, mut user) = (ptr::null_mut(), ptr::null_mut());
        let ibv = &self.context.libraries().ibv;
        // SAFETY: the channel is open and does not block.
        if unsafe { (ibv.ibv_get_cq_event)(self.raw.as_ptr(), &mut cq, &mut user) } != 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(false),
                _ => Err(Error::Call { call: "ibv_get_cq_event", error, hint: "" }),
            };
        }
        // SAFETY: the queue that was told of; it is not destroyed before this acknowledgement.
        unsafe { (ibv.ibv_ack_cq_events)(cq, 1) };
        Ok(true)
    }
}

impl Drop for CompletionChannel {
    fn drop(&mut self) {
        // SAFETY: made by `new`, ended once, after the queues on it.
        unsafe { (self.context.libraries().ibv.ibv_destroy_comp_channel)(self.raw.as_ptr()) };
    }
}

impl fmt::Debug for CompletionChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionChannel").field("fd", &self.fd()).finish()
    }
}

fn status_of(status: u32) -> WorkStatus {
    match status {
        raw::IBV_WC_SUCCESS => WorkStatus::Success,
        raw::IBV_WC_WR_FLUSH_ERR => WorkStatus::Flushed,
        raw::IBV_WC_RETRY_EXC_ERR | raw::IBV_WC_RNR_RETRY_EXC_ERR => WorkStatus::PeerGone,
        raw::IBV_WC_REM_ACCESS_ERR | raw::IBV_WC_REM_INV_REQ_ERR => WorkStatus::RemoteAccess,
        raw::IBV_WC_LOC_LEN_ERR => WorkStatus::Length,
        other => WorkStatus::Failed(other),
    }
}

/// The end of a work request.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default)]
pub struct WorkCompletion(raw::ibv_wc);

impl WorkCompletion {
    /// What it was posted with.
    pub fn id(&self) -> u64 {
        self.0.wr_id
    }

    /// How it ended. After anything but success, only this and the identifier mean something.
    pub fn status(&self) -> WorkStatus {
        status_of(self.0.status)
    }

    /// Number of the queue pair on this side.
    pub fn qp_num(&self) -> u32 {
        self.0.qp_num
    }

    /// Bytes received.
    pub fn received_bytes(&self) -> u32 {
        self.0.byte_len
    }

    /// The key that the peer invalidated with this message.
    pub fn invalidated_rkey(&self) -> Option<u32> {
        (self.0.wc_flags & raw::IBV_WC_WITH_INV != 0).then_some(self.0.invalidated_rkey)
    }
}

/// Where the ends of work requests are found.
pub struct CompletionQueue {
    context: Arc<Context>,
    channel: Option<Arc<CompletionChannel>>,
    raw: NonNull<raw::ibv_cq>,
    entries: u32,
}

// SAFETY: verbs are safe for use from several threads; queue pairs on the queue hold it.
unsafe impl Send for CompletionQueue {}
// SAFETY: as above.
unsafe impl Sync for CompletionQueue {}

impl CompletionQueue {
    /// A queue with room for `entries`, which announces itself on `channel` when armed.
    ///
    /// # Errors
    /// When the device cannot have one so large, or is gone.
    pub fn new(
        context: &Arc<Context>,
        entries: u32,
        channel: Option<&Arc<CompletionChannel>>,
    ) -> Result<Arc<CompletionQueue>> {
        let count = i32::try_from(entries).unwrap_or(i32::MAX);
        let on = channel.map_or(ptr::null_mut(), |channel| channel.raw.as_ptr());
        // SAFETY: context and channel are open, and held by what is made.
        let raw = unsafe { (context.libraries().ibv.ibv_create_cq)(context.as_ptr(), count, ptr::null_mut(), on, 0) };
        let raw = NonNull::new(raw).ok_or_else(|| Error::last("ibv_create_cq"))?;
        // SAFETY: the library made it.
        let entries = u32::try_from(unsafe { raw.as_ref().cqe }).unwrap_or(entries);
        Ok(Arc::new(CompletionQueue { context: Arc::clone(context), channel: channel.cloned(), raw, entries }))
    }

    /// Completions that it has room for, at least what was asked for.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// The channel that it announces itself on.
    pub fn channel(&self) -> Option<&Arc<CompletionChannel>> {
        self.channel.as_ref()
    }

    /// Takes completions off into the front of `out`; how many.
    ///
    /// # Errors
    /// When the queue has failed.
    #[inline]
    pub fn poll(&self, out: &mut [WorkCompletion]) -> Result<usize> {
        let poll = self.context.ops().poll_cq.expect("every provider polls");
        let max = i32::try_from(out.len()).unwrap_or(i32::MAX);
        // SAFETY: the queue lives; `out` is that many structures of C's layout.
        let count = unsafe { poll(self.raw.as_ptr(), max, out.as_mut_ptr().cast()) };
        usize::try_from(count).map_err(|_| Error::code("ibv_poll_cq", if count == -1 { libc::EIO } else { count }))
    }

    /// Announces the next completion on the channel, once. What came before the call is not announced: poll after it.
    ///
    /// # Errors
    /// When the queue has failed.
    pub fn arm(&self) -> Result<()> {
        let notify = self.context.ops().req_notify_cq.expect("every provider notifies");
        // SAFETY: the queue lives.
        match unsafe { notify(self.raw.as_ptr(), 0) } {
            0 => Ok(()),
            code => Err(Error::code("ibv_req_notify_cq", code)),
        }
    }

    pub(crate) fn as_ptr(&self) -> *mut raw::ibv_cq {
        self.raw.as_ptr()
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: made by `new`, ended once, after the queue pairs on it; all of its events were acknowledged.
        unsafe { (self.context.libraries().ibv.ibv_destroy_cq)(self.raw.as_ptr()) };
    }
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionQueue").field("entries", &self.entries).finish()
    }
}

/// A piece of registered memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Address of its first byte.
    pub address: usize,
    /// Its bytes.
    pub bytes: u32,
    /// The local key of its registration.
    pub lkey: u32,
}

impl Piece {
    pub(crate) fn sge(self) -> raw::ibv_sge {
        raw::ibv_sge { addr: self.address as u64, length: self.bytes, lkey: self.lkey }
    }
}

/// A receive into one piece of memory, not yet linked to it and to the next.
pub fn receive(id: u64) -> raw::ibv_recv_wr {
    raw::ibv_recv_wr { wr_id: id, next: ptr::null_mut(), sg_list: ptr::null_mut(), num_sge: 1 }
}

/// What came of posting a list: how many of it were posted before the one that was refused.
fn refused<T>(
    call: &'static str,
    code: libc::c_int,
    work: &[T],
    bad: *const T,
) -> std::result::Result<(), (usize, Error)> {
    match code {
        0 => Ok(()),
        code => Err((work.iter().position(|wr| ptr::eq(wr, bad)).unwrap_or(0), Error::code(call, code))),
    }
}

/// Receives that all queue pairs of a group share.
pub struct SharedReceiveQueue {
    domain: Arc<ProtectionDomain>,
    raw: NonNull<raw::ibv_srq>,
}

// SAFETY: verbs are safe for use from several threads; queue pairs on the queue hold it.
unsafe impl Send for SharedReceiveQueue {}
// SAFETY: as above.
unsafe impl Sync for SharedReceiveQueue {}

impl SharedReceiveQueue {
    /// A queue of `depth` receives of one piece each.
    ///
    /// # Errors
    /// When the device has none, or none so deep.
    pub fn new(domain: &Arc<ProtectionDomain>, depth: u32) -> Result<Arc<SharedReceiveQueue>> {
        let mut attr = raw::ibv_srq_init_attr {
            srq_context: ptr::null_mut(),
            attr: raw::ibv_srq_attr { max_wr: depth, max_sge: 1, srq_limit: 0 },
        };
        // SAFETY: the domain is open, and held by what is made.
        let raw = unsafe { (domain.context().libraries().ibv.ibv_create_srq)(domain.as_ptr(), &mut attr) };
        let raw = NonNull::new(raw).ok_or_else(|| Error::last("ibv_create_srq"))?;
        Ok(Arc::new(SharedReceiveQueue { domain: Arc::clone(domain), raw }))
    }

    /// Posts a linked list of receives.
    ///
    /// # Errors
    /// When the queue is full or has failed; and how many of the list were posted before that.
    ///
    /// # Safety
    /// The list and its pieces are valid, and nobody accesses the pieces' bytes until the receives have completed or the queue
    /// was dropped.
    pub unsafe fn post_list(&self, work: &mut [raw::ibv_recv_wr]) -> std::result::Result<(), (usize, Error)> {
        let Some(first) = work.first_mut() else { return Ok(()) };
        let post = self.domain.context().ops().post_srq_recv.expect("a provider with such queues posts to them");
        let (first, mut bad) = (ptr::from_mut(first), ptr::null_mut());
        // SAFETY: the queue lives; the list is the caller's promise.
        let code = unsafe { post(self.raw.as_ptr(), first, &mut bad) };
        refused("ibv_post_srq_recv", code, work, bad)
    }

    pub(crate) fn as_ptr(&self) -> *mut raw::ibv_srq {
        self.raw.as_ptr()
    }
}

impl Drop for SharedReceiveQueue {
    fn drop(&mut self) {
        // SAFETY: made by `new`, ended once, after the queue pairs on it.
        unsafe { (self.domain.context().libraries().ibv.ibv_destroy_srq)(self.raw.as_ptr()) };
    }
}

impl fmt::Debug for SharedReceiveQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedReceiveQueue")
    }
}

/// A work request for an operation, not yet linked to pieces and to the next.
pub fn work(operation: Operation, id: u64, signaled: bool) -> raw::ibv_send_wr {
    let (opcode, invalidate_rkey, remote_addr, rkey) = match operation {
        Operation::Send => (raw::IBV_WR_SEND, 0, 0, 0),
        Operation::SendInvalidate { rkey } => (raw::IBV_WR_SEND_WITH_INV, rkey, 0, 0),
        Operation::Write { address, rkey } => (raw::IBV_WR_RDMA_WRITE, 0, address, rkey),
        Operation::Read { address, rkey } => (raw::IBV_WR_RDMA_READ, 0, address, rkey),
    };
    raw::ibv_send_wr {
        wr_id: id,
        next: ptr::null_mut(),
        sg_list: ptr::null_mut(),
        num_sge: 0,
        opcode,
        send_flags: if signaled { raw::IBV_SEND_SIGNALED } else { 0 },
        invalidate_rkey,
        remote_addr,
        rkey,
        _wr: [0; 5],
        _qp_type: 0,
        _rest: [0; 6],
    }
}

/// A reliable connected queue pair: half of a connection, which owns it.
pub struct QueuePair {
    pub(crate) raw: NonNull<raw::ibv_qp>,
    pub(crate) domain: Arc<ProtectionDomain>,
    pub(crate) _send_cq: Arc<CompletionQueue>,
    pub(crate) _receive_cq: Arc<CompletionQueue>,
    pub(crate) srq: Option<Arc<SharedReceiveQueue>>,
    pub(crate) depths: QueueDepths,
}

// SAFETY: verbs are safe for use from several threads; the connection that owns it destroys it with exclusive access.
unsafe impl Send for QueuePair {}
// SAFETY: as above.
unsafe impl Sync for QueuePair {}

impl QueuePair {
    /// Its number on this side.
    pub fn number(&self) -> u32 {
        // SAFETY: the pair lives; its number does not change.
        unsafe { self.raw.as_ref().qp_num }
    }

    /// What the device gave, at least what was asked for.
    pub fn depths(&self) -> QueueDepths {
        self.depths
    }

    /// Whether receives are posted to a shared queue.
    pub fn has_shared_receives(&self) -> bool {
        self.srq.is_some()
    }

    /// Posts a linked list of receives to the pair's own queue.
    ///
    /// # Errors
    /// When the queue is full or has failed; and how many of the list were posted before that.
    ///
    /// # Safety
    /// The list and its pieces are valid, and nobody accesses the pieces' bytes until the receives have completed or the pair
    /// was destroyed.
    pub unsafe fn post_receives(&self, work: &mut [raw::ibv_recv_wr]) -> std::result::Result<(), (usize, Error)> {
        let Some(first) = work.first_mut() else { return Ok(()) };
        let post = self.domain.context().ops().post_recv.expect("every provider posts");
        let (first, mut bad) = (ptr::from_mut(first), ptr::null_mut());
        // SAFETY: the pair lives; the list is the caller's promise.
        let code = unsafe { post(self.raw.as_ptr(), first, &mut bad) };
        refused("ibv_post_recv", code, work, bad)
    }

    /// Posts a linked list of work requests.
    ///
    /// # Errors
    /// When the queue is full or has failed; and how many of the list were posted before that.
    ///
    /// # Safety
    /// The list and its pieces are valid, and nobody breaks the use of the pieces' bytes (accesses those that are read into,
    /// changes those that are sent) until the requests have completed or the pair was destroyed.
    pub unsafe fn post_list(&self, work: &mut [raw::ibv_send_wr]) -> std::result::Result<(), (usize, Error)> {
        let Some(first) = work.first_mut() else { return Ok(()) };
        let post = self.domain.context().ops().post_send.expect("every provider posts");
        let (first, mut bad) = (ptr::from_mut(first), ptr::null_mut());
        // SAFETY: the pair lives; the list is the caller's promise.
        let code = unsafe { post(self.raw.as_ptr(), first, &mut bad) };
        refused("ibv_post_send", code, work, bad)
    }

    /// Ends all work at once: what is posted, and what is posted later, completes as flushed.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn set_error(&self) -> Result<()> {
        // SAFETY: all zeroes is a value of it: numbers and arrays of them.
        let mut attr: raw::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attr.qp_state = raw::IBV_QPS_ERR;
        let ibv = &self.domain.context().libraries().ibv;
        // SAFETY: the pair lives; the mask names what was set.
        match unsafe { (ibv.ibv_modify_qp)(self.raw.as_ptr(), &mut attr, raw::IBV_QP_STATE.cast_signed()) } {
            0 => Ok(()),
            code => Err(Error::code("ibv_modify_qp", code)),
        }
    }
}

impl fmt::Debug for QueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueuePair").field("number", &self.number()).field("depths", &self.depths).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_requests_carry_what_their_operation_needs() {
        let wr = work(Operation::Read { address: 7 << 40, rkey: 9 }, 3, true);
        assert_eq!((wr.opcode, wr.remote_addr, wr.rkey), (raw::IBV_WR_RDMA_READ, 7 << 40, 9));
        assert_eq!((wr.wr_id, wr.send_flags), (3, raw::IBV_SEND_SIGNALED));
        let wr = work(Operation::SendInvalidate { rkey: 5 }, 4, false);
        assert_eq!((wr.opcode, wr.invalidate_rkey, wr.send_flags), (raw::IBV_WR_SEND_WITH_INV, 5, 0));
        assert!(wr.next.is_null() && wr.sg_list.is_null() && wr.num_sge == 0);
    }

    #[test]
    fn statuses_are_told_apart() {
        let status = |number| WorkCompletion(raw::ibv_wc { status: number, ..Default::default() }).status();
        assert_eq!(status(raw::IBV_WC_SUCCESS), WorkStatus::Success);
        assert_eq!(status(raw::IBV_WC_WR_FLUSH_ERR), WorkStatus::Flushed);
        assert_eq!(status(raw::IBV_WC_RNR_RETRY_EXC_ERR), WorkStatus::PeerGone);
        assert_eq!(status(raw::IBV_WC_REM_ACCESS_ERR), WorkStatus::RemoteAccess);
        assert!(!status(19).to_string().is_empty());
    }
}
