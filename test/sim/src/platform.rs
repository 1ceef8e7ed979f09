//! The seams of a reactor, simulated.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use reactor::buffer::Region;
use reactor::file::{FileEngine, Files};
use reactor::net::Network;
use reactor::park::Parker;
use reactor::{Clock, Platform};

use crate::disk::{SimEngine, SimFiles};
use crate::net::SimNetwork;
use crate::park::SimParker;
use crate::sim::Sim;

/// A [`Platform`] over a simulated machine.
#[derive(Debug)]
pub struct SimPlatform {
    sim: Arc<Sim>,
    engines: AtomicUsize,
}

impl SimPlatform {
    /// The seams of `sim`.
    pub fn new(sim: &Arc<Sim>) -> Arc<SimPlatform> {
        Arc::new(SimPlatform { sim: Arc::clone(sim), engines: AtomicUsize::new(0) })
    }
}

impl Platform for SimPlatform {
    fn clock(&self) -> Arc<dyn Clock> {
        Arc::clone(&self.sim) as Arc<dyn Clock>
    }

    fn network(&self) -> Arc<dyn Network> {
        Arc::new(SimNetwork::new(&self.sim))
    }

    fn files(&self) -> Arc<dyn Files> {
        Arc::new(SimFiles::new(&self.sim))
    }

    fn parker(&self) -> io::Result<Box<dyn Parker>> {
        Ok(Box::new(SimParker::new(&self.sim)))
    }

    fn file_engine(&self, _: Region, _: &mut dyn Parker) -> io::Result<Box<dyn FileEngine>> {
        // Reactors ask in the order in which they were made, once each, so the counts of parkers and engines agree.
        let index = self.engines.fetch_add(1, Ordering::AcqRel);
        Ok(Box::new(SimEngine::new(&self.sim, index)))
    }

    fn random(&self, bytes: &mut [u8]) {
        self.sim.lock().rng.fill(bytes);
    }

    fn pin(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
}
