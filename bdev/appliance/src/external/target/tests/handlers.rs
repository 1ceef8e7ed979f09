//! Handlers that do what a test needs.

use super::*;

/// Keeps every request until it is aborted or reset.
pub(super) struct Hoarder;

struct HoardingWorker(Vec<Request>);

impl Handler for Hoarder {
    fn name(&self) -> &str {
        "hoarder"
    }
    fn capabilities(&self, _: &Geometry) -> Capabilities {
        Capabilities::BASIC
    }
    fn worker(&self, _: WorkerCx) -> io::Result<Box<dyn Worker>> {
        Ok(Box::new(HoardingWorker(Vec::new())))
    }
    fn resize(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

impl Worker for HoardingWorker {
    fn submit(&mut self, batch: &mut Batch) {
        self.0.extend(batch);
    }
    fn abort(&mut self, id: RequestId) {
        if let Some(index) = self.0.iter().position(|request| request.id() == id) {
            self.0.swap_remove(index).complete(IoStatus::Aborted);
        }
    }
    fn reset(&mut self) {
        self.0.drain(..).for_each(|request| request.complete(IoStatus::Aborted));
    }
}

/// Notes which workers are made.
pub(super) struct Curious(pub(super) Arc<Mutex<Vec<(usize, usize)>>>, pub(super) Arc<dyn Handler>);

impl Handler for Curious {
    fn name(&self) -> &str {
        "curious"
    }
    fn capabilities(&self, geometry: &Geometry) -> Capabilities {
        self.1.capabilities(geometry)
    }
    fn worker(&self, cx: WorkerCx) -> io::Result<Box<dyn Worker>> {
        self.0.lock().unwrap().push((cx.index, cx.workers));
        self.1.worker(cx)
    }
    fn resize(&self, num_blocks: u64) -> io::Result<()> {
        self.1.resize(num_blocks)
    }
}

/// Panics at one block.
pub(super) struct Nervous(pub(super) Arc<dyn Handler>);

struct NervousWorker(Box<dyn Worker>);

impl Handler for Nervous {
    fn name(&self) -> &str {
        "nervous"
    }
    fn capabilities(&self, geometry: &Geometry) -> Capabilities {
        self.0.capabilities(geometry)
    }
    fn worker(&self, cx: WorkerCx) -> io::Result<Box<dyn Worker>> {
        Ok(Box::new(NervousWorker(self.0.worker(cx)?)))
    }
    fn resize(&self, num_blocks: u64) -> io::Result<()> {
        self.0.resize(num_blocks)
    }
}

impl Worker for NervousWorker {
    fn submit(&mut self, batch: &mut Batch) {
        if batch.peek().is_some_and(|request| request.lba() == 666) {
            let _lost = batch.next();
            panic!("block 666");
        }
        self.0.submit(batch);
    }
}
