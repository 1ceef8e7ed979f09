//! What every device must do, as a suite that each module runs.
//!
//! A module lists its [`Subject`]s: ways to make a device. [`suite`] puts each of them through every [`CHECKS`] entry in a
//! [`World`]: production reactors and the production layer on one thread, stepped one after another over a virtual clock,
//! with a seed that decides everything that is random. A check that fails panics, and says which subject, block size and
//! seed it was.
//!
//! | room | concern |
//! |---|---|
//! | [`world`] | reactors, control plane and clock on one thread |
//! | [`client`] | an inbox of a reactor with what is outstanding in it |
//! | [`rng`] | the seeded random numbers |
//! | [`model`] | random operations against a model in memory |
//! | [`edges`] | first and last blocks, requests that make no sense, durability, counters |
//! | [`pressure`] | too few I/Os, too little memory |
//! | [`ending`] | removal, reset, abort, changes of size |
//! | [`sharing`] | atomic updates, descriptors, claims |
//! | [`limited`] | devices that make the layer work |
//! | [`rogue`] | a handler of appliance devices that does everything wrong |
//! | [`panicky`] | a handler around another whose workers panic |

pub mod client;
pub mod edges;
pub mod ending;
pub mod limited;
pub mod model;
pub mod panicky;
pub mod pressure;
pub mod rng;
pub mod rogue;
pub mod sharing;
pub mod world;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::BoxFuture;

pub use client::{Client, Done};
pub use rng::Rng;
pub use world::{World, WorldConfig};

use crate::core::{BdevError, BdevInfo, BdevSystem};

/// What a subject is to make.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Name of the device.
    pub name: String,
    /// Bytes in a block.
    pub block_size: u32,
    /// Blocks.
    pub num_blocks: u64,
    /// A folder for files.
    pub folder: PathBuf,
}

/// Makes a device; returns the names of all that were made, the one to be tested first, in the order of their removal.
pub type Make = fn(Arc<BdevSystem>, Spec) -> BoxFuture<'static, Result<Vec<String>, BdevError>>;
/// Changes the size of what [`Make`] made, to a number of blocks.
pub type Resize = fn(Arc<BdevSystem>, Spec, u64) -> BoxFuture<'static, Result<(), BdevError>>;

/// A way to make a device for the suite.
#[derive(Clone, Copy)]
pub struct Subject {
    /// What it is called in messages.
    pub label: &'static str,
    /// Block sizes to try.
    pub block_sizes: &'static [u32],
    /// What is written is forgotten: all blocks always read as zeroes.
    pub forgets: bool,
    /// Makes it.
    pub make: Make,
    /// Changes its size, where it can.
    pub resize: Option<Resize>,
}

impl std::fmt::Debug for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.label)
    }
}

/// One run of one check.
pub struct Trial<'a> {
    /// Where it happens.
    pub world: &'a mut World,
    /// What is tested.
    pub subject: Subject,
    /// As it was asked for.
    pub spec: Spec,
    /// The seed's random numbers.
    pub rng: Rng,
    made: Vec<String>,
    /// Let go of while the device is made again: a file has to be closed first.
    bdev: Option<Arc<BdevInfo>>,
}

impl Trial<'_> {
    /// The device under test.
    pub fn bdev(&self) -> Arc<BdevInfo> {
        self.bdev.clone().expect("there is always a device")
    }

    /// The name of the device under test, or of the lowest that was made for it.
    fn made_name(&self, lowest: bool) -> String {
        let name = if lowest { self.made.last() } else { self.made.first() };
        name.expect("a subject makes a device").clone()
    }

    /// Removes whatever the subject made and makes it again.
    pub fn make_again(&mut self) {
        self.bdev = None;
        let system = Arc::clone(self.world.system());
        for name in &self.made {
            remove_if_there(self.world, name);
        }
        let made = self.world.block_on((self.subject.make)(Arc::clone(&system), self.spec.clone()));
        self.made = made.expect("the device can be made");
        self.bdev = Some(system.get(&self.made[0]).expect("the device is registered"));
    }
}

impl std::fmt::Debug for Trial<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.spec)
    }
}

/// A check: its name, the world that it wants, and its code.
#[derive(Clone, Copy)]
pub struct Check {
    /// What it shows.
    pub name: &'static str,
    /// I/Os in each reactor's pool.
    pub io_pool: usize,
    /// The code. Panics when the device fails.
    pub run: fn(&mut Trial<'_>),
}

impl std::fmt::Debug for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// Every check.
pub const CHECKS: &[Check] = &[
    Check { name: "requests at the edges", io_pool: 64, run: edges::boundaries },
    Check { name: "durable writes and flushes", io_pool: 64, run: edges::durability },
    Check { name: "counters add up", io_pool: 64, run: edges::statistics },
    Check { name: "many small operations", io_pool: 64, run: edges::many },
    Check { name: "random operations match a model", io_pool: 64, run: model::random_operations },
    Check { name: "the same with two I/Os in the pool", io_pool: pressure::FEW, run: model::random_operations },
    Check { name: "two I/Os serve a hundred requests in order", io_pool: pressure::FEW, run: pressure::few_ios },
    Check { name: "waiting requests can be aborted", io_pool: pressure::FEW, run: pressure::abort_waiting },
    Check { name: "emulation without memory", io_pool: 64, run: pressure::no_memory },
    Check { name: "atomic updates", io_pool: 64, run: sharing::atomic_updates },
    Check { name: "writes beside compare-and-writes", io_pool: 64, run: sharing::writes_beside_swaps },
    Check { name: "compare-and-writes beside each other", io_pool: 64, run: sharing::swaps_beside_swaps },
    Check { name: "descriptors and claims", io_pool: 64, run: sharing::claims },
    Check { name: "abort anywhere", io_pool: 64, run: ending::abort },
    Check { name: "reset at every step", io_pool: 64, run: ending::reset },
    Check { name: "removal at every step", io_pool: 64, run: ending::removal },
    Check { name: "growing and shrinking under load", io_pool: 64, run: ending::resize },
];

/// Puts `subject` through every check with `seed`; `world` makes the world that a check asks for. Files go to `folder`.
///
/// # Panics
/// When the device fails a check; standard error names the check, the subject, its block size and the seed.
pub fn suite(subject: Subject, seed: u64, folder: &Path, mut world: impl FnMut(WorldConfig) -> World) {
    for &block_size in subject.block_sizes {
        for check in CHECKS {
            let label = format!("{}, blocks of {block_size}, seed {seed:#x}: {}", subject.label, check.name);
            let _note = OnPanic(&label);
            let config = WorldConfig { io_pool: check.io_pool, seed, ..WorldConfig::default() };
            run(subject, block_size, check, folder, &mut world(config), seed);
        }
    }
}

fn run(subject: Subject, block_size: u32, check: &Check, folder: &Path, world: &mut World, seed: u64) {
    // Enough for several of the largest pieces that the layer moves, and for an end inside a chunk of any device.
    let num_blocks = ((1 << 20) / u64::from(block_size)).max(512) + 37;
    let name = format!("{}-{block_size}", subject.label);
    let spec = Spec { name, block_size, num_blocks, folder: folder.to_path_buf() };
    let system = Arc::clone(world.system());
    let made = world.block_on((subject.make)(Arc::clone(&system), spec.clone())).expect("the device can be made");
    let bdev = system.get(&made[0]).expect("the device is registered");
    let mut trial = Trial { world, subject, spec, rng: Rng::new(seed), made, bdev: Some(bdev) };
    (check.run)(&mut trial);
    let made = std::mem::take(&mut trial.made);
    drop(trial);
    for name in made {
        remove_if_there(world, &name);
    }
    world.settle();
    world.assert_clean();
}

fn remove_if_there(world: &mut World, name: &str) {
    let system = Arc::clone(world.system());
    match world.block_on(system.remove(name)) {
        // A device that follows another is removed with it.
        Ok(()) | Err(BdevError::NotFound { .. }) => {}
        Err(BdevError::BeingRemoved { .. }) => {
            world.step_until("a removal under way", |_| system.get(name).is_err());
        }
        Err(error) => panic!("{name} cannot be removed: {error}"),
    }
}

/// Says what was running when a check panics.
struct OnPanic<'a>(&'a str);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("conformance failed: {}", self.0);
        }
    }
}
