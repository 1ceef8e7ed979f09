//! I/Os that a device makes of one: the same operation, with the same payload, on several lower devices.
//!
//! # Invariants
//! - A parent stays with its module while children are out: its payload is what they show.
//! - Nobody writes to that payload meanwhile: the parent gives no writable view of it, and a child asked for one gets a copy.
//! - Children come from the pool, or, when it is empty, from spares of the channel; whoever has one spare always gets on.

use super::cx::IoCx;
use super::io::{Frame, Io, NO_SAGA};
use super::runtime::{ChannelId, ClientId};
use super::spares::Spares;
use super::types::{IoStatus, Op};

/// The client of all children: nobody's, so that no abort finds them.
const NOBODY: ClientId = ClientId(u32::MAX);

impl IoCx<'_> {
    /// Sends the operation of `parent` to `to`, at `lba` there, as an I/O of its own. It comes back through
    /// [`IoChannel::completed`](super::IoChannel::completed), where [`Io::child_mark`] is `mark`, and then goes to
    /// [`IoCx::end_child`]. `false`: there is no I/O for it; with spares of its own, something of this channel is out then.
    ///
    /// # Panics
    /// For operations that write to their payload.
    #[inline]
    pub fn child(&mut self, parent: &mut Io, spares: &mut Spares, mark: u64, to: ChannelId, lba: u64) -> bool {
        self.child_as(parent, parent.op(), spares, mark, to, lba)
    }

    /// As [`IoCx::child`], with another operation that has the same payload.
    ///
    /// # Panics
    /// As [`IoCx::child`]; when the payload of `op` is another.
    pub fn child_as(
        &mut self,
        parent: &mut Io,
        op: Op,
        spares: &mut Spares,
        mark: u64,
        to: ChannelId,
        lba: u64,
    ) -> bool {
        assert!(!matches!(op, Op::Read), "a read has its payload to itself");
        let Some(mut body) = self.inner.free.pop().or_else(|| spares.pop()) else { return false };
        let of = parent.body_mut();
        assert_eq!(op.payload_bytes(1, 1), of.op.payload_bytes(1, 1), "a child has its parent's payload");
        let frame = of.frames.top().copied().expect("a module holds an Io under its own frame");
        body.op = op;
        body.lba = lba;
        body.blocks = of.blocks;
        body.status = IoStatus::Success;
        body.tag.client = NOBODY;
        body.tag.user = mark;
        body.child = true;
        if !of.bufs.is_empty() {
            body.shared = true;
            let bytes = of.bufs.len();
            // SAFETY: the parent keeps its list until the count of its children is zero: `Io::bufs_mut`, completing, forwarding and
            // submitting it to a file refuse before that, and dropping it leaks the list. All views of it are only read: a child's
            // `bufs_mut` makes a copy, and the operations let through above read their payload only.
            body.bufs = unsafe { of.bufs.view(0, bytes) };
        }
        of.children += 1;
        body.frames.push(Frame { channel: self.channel, saga: NO_SAGA, forwarded: true, ..frame });
        self.inner.queue.submit(to, Io::from_body(body));
        true
    }

    /// A child of `parent` has come back; its I/O goes where it came from.
    pub fn end_child(&mut self, child: Io, parent: &mut Io, spares: &mut Spares) {
        let mut body = child.into_body();
        assert!(body.child && parent.body().children > 0, "it is no child of this");
        parent.body_mut().children -= 1;
        drop(std::mem::take(&mut body.bufs));
        body.frames.pop();
        (body.child, body.shared) = (false, false);
        if body.spare {
            spares.push(body);
        } else {
            self.inner.free.push(body);
        }
    }
}

impl Io {
    /// What [`IoCx::child`] was given, if this is a child.
    #[inline]
    pub fn child_mark(&self) -> Option<u64> {
        self.body().child.then_some(self.body().tag.user)
    }
}
