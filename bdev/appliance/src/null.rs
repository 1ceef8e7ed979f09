//! The handler that does nothing: reads are zeroes, writes vanish. It measures what the way to a handler costs.
//!
//! Reads are filled all the same: payload memory is used again, and a host must never see what another wrote.

use std::io;
use std::sync::Arc;

use reactor::ReactorId;

use crate::handler::{Batch, Capabilities, Handler, Inline, Making, Worker, WorkerCx};
use crate::request::{Completions, Request};
use crate::types::{Geometry, IoStatus, Op, OpKind, OpSet};

/// The handler called `null`.
#[derive(Clone, Copy, Debug)]
pub struct Null;

impl Null {
    /// Makes it; for the table of handlers.
    ///
    /// # Errors
    /// None; it ignores its options.
    pub fn make(_: &Making<'_>) -> io::Result<Arc<dyn Handler>> {
        Ok(Arc::new(Null))
    }
}

impl Handler for Null {
    fn name(&self) -> &str {
        "null"
    }

    fn capabilities(&self, _: &Geometry) -> Capabilities {
        let ops = [OpKind::Read, OpKind::Write, OpKind::Flush, OpKind::Unmap, OpKind::WriteZeroes];
        Capabilities { ops: OpSet::of(&ops), volatile_cache: false, unmap_zeroes: true, max_rw_blocks: 0 }
    }

    fn worker(&self, _: WorkerCx) -> io::Result<Box<dyn Worker>> {
        Ok(Box::<NullWorker>::default())
    }

    fn inline(&self, _: ReactorId) -> Option<io::Result<Box<dyn Inline>>> {
        Some(Ok(Box::new(Null)))
    }

    fn resize(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Requests that go home together: so many that the way costs little, so few that the first of them does not wait.
const TOGETHER: usize = 16;

#[derive(Default)]
struct NullWorker {
    done: Completions,
}

impl Worker for NullWorker {
    fn submit(&mut self, batch: &mut Batch) {
        for mut request in batch {
            fill(&mut request);
            self.done.add(request, IoStatus::Success);
            if self.done.len() == TOGETHER {
                self.done.flush();
            }
        }
        self.done.flush();
    }
}

impl Inline for Null {
    #[inline]
    fn handle(&mut self, mut request: Request) {
        fill(&mut request);
        request.complete(IoStatus::Success);
    }
}

#[inline]
fn fill(request: &mut Request) {
    if request.op() == Op::Read {
        request.bufs_mut().fill(0);
    }
}
