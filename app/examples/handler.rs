//! The `ringstone` command with a handler of one's own, as `docs/appliance.md` builds it up.
//!
//! ```text
//! cargo run --example handler -- serve
//! cargo run --example handler -- rpc bdev_appliance_create name=Fast0 handler=upside_down num_blocks=2048 block_size=4096
//! ```

use std::io;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use appliance::{Batch, Capabilities, Geometry, Handler, IoStatus, Making, Op, Request, Worker, WorkerCx};

/// Keeps every byte inverted, in one vector under one lock: simple, not fast.
struct UpsideDown {
    blocks: Arc<Mutex<Vec<u8>>>,
    block_size: usize,
}

fn make(making: &Making<'_>) -> io::Result<Arc<dyn Handler>> {
    let bytes = usize::try_from(making.geometry.bytes()).map_err(io::Error::other)?;
    if bytes > 1 << 30 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "this example keeps at most 1 GiB"));
    }
    let block_size = making.geometry.block_size as usize;
    Ok(Arc::new(UpsideDown { blocks: Arc::new(Mutex::new(vec![0xff; bytes])), block_size }))
}

impl Handler for UpsideDown {
    fn name(&self) -> &str {
        "upside_down"
    }

    fn capabilities(&self, _: &Geometry) -> Capabilities {
        Capabilities { volatile_cache: false, ..Capabilities::BASIC }
    }

    fn worker(&self, _: WorkerCx) -> io::Result<Box<dyn Worker>> {
        Ok(Box::new(Shelf { blocks: Arc::clone(&self.blocks) }))
    }

    fn resize(&self, num_blocks: u64) -> io::Result<()> {
        let bytes = usize::try_from(num_blocks).ok().and_then(|blocks| blocks.checked_mul(self.block_size));
        let bytes = bytes.filter(|&bytes| bytes <= 1 << 30);
        let bytes = bytes.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "at most 1 GiB"))?;
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner).resize(bytes, 0xff);
        Ok(())
    }
}

/// What lives on one thread.
struct Shelf {
    blocks: Arc<Mutex<Vec<u8>>>,
}

impl Worker for Shelf {
    fn submit(&mut self, batch: &mut Batch) {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        for request in batch {
            serve(&mut blocks, request);
        }
    }
}

fn serve(blocks: &mut [u8], mut request: Request) {
    let (offset, len) = (request.offset_bytes() as usize, request.len_bytes() as usize);
    if request.op() == Op::Flush {
        return request.complete(IoStatus::Success);
    }
    // A request from before a change of size may reach behind the new end.
    let Some(place) = blocks.get_mut(offset..offset + len) else { return request.complete(IoStatus::OutOfRange) };
    let mut rest = &mut *place;
    match request.op() {
        Op::Read => {
            for segment in request.bufs_mut().segments_mut() {
                let (piece, others) = rest.split_at_mut(segment.len());
                segment.iter_mut().zip(piece).for_each(|(to, from)| *to = !*from);
                rest = others;
            }
        }
        Op::Write { .. } => {
            for segment in request.bufs().segments() {
                let (piece, others) = rest.split_at_mut(segment.len());
                piece.iter_mut().zip(segment).for_each(|(to, from)| *to = !*from);
                rest = others;
            }
        }
        _ => return request.complete(IoStatus::NotSupported),
    }
    request.complete(IoStatus::Success);
}

fn main() -> ExitCode {
    appliance::register("upside_down", make);
    ringstone_app::main()
}
