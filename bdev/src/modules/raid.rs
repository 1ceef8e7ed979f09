//! raid1: one device on several others, each of which has all of it.
//!
//! | room | concern |
//! |---|---|
//! | [`format`] | every byte on a leg besides the data |
//! | [`assembly`] | which legs make the array |
//! | [`regions`] | what may be written at this moment, and which leg lacks what |
//! | [`array`](mod@array) | the array as a machine without I/O |
//! | `driver` | does what the machine names, on one reactor |
//! | `channel` | reads and writes of one reactor |
//! | `shared` | what those two have in common |
//! | [`control`] | arrays come, wait for legs and go |
//! | `probe` | one read by the control plane |
//! | [`settings`] | how fast is copied |
//! | [`rpc`] | the methods |
//!
//! # Without superblocks
//! Nothing is written to the legs but data: there is no log, no leg is known to be stale after a restart, and a leg that comes back
//! gets everything. Legs that fail still go out before what they miss is acknowledged.
//!
//! # What an array cannot know
//! Whether another server runs it as well. Whoever orders a start without a leg has to know that nobody else does.

pub mod array;
pub mod assembly;
mod cells;
mod channel;
pub mod control;
mod driver;
pub mod format;
mod probe;
pub mod regions;
pub mod rpc;
pub mod settings;
mod shared;
mod sharing;

use std::io;
use std::sync::Arc;

use schema::ConfigEntry;
use serde_json::{Value, json};

use self::control::Running;
use super::Module;
use crate::conformance::{Spec, Subject};
use crate::core::{Bdev, BdevError, BdevInfo, BdevSystem, ChannelCx, Geometry, IoChannel, OpSet};

/// The module.
pub const MODULE: Module = Module {
    name: "raid",
    methods: rpc::METHODS,
    subjects: &[
        Subject {
            label: "raid1",
            block_sizes: &[512, 4096],
            forgets: false,
            make: |system, spec| Box::pin(conformance_make(system, spec, true, 2)),
            resize: None,
        },
        Subject {
            label: "raid1-plain",
            block_sizes: &[512],
            forgets: false,
            make: |system, spec| Box::pin(conformance_make(system, spec, false, 3)),
            resize: None,
        },
    ],
    examine: Some(|system, bdev| Box::pin(control::examine(system, bdev))),
};

const PRODUCT: &str = "Raid Volume";

/// The device.
struct Raid {
    running: Arc<Running>,
    geometry: Geometry,
}

impl Bdev for Raid {
    fn product_name(&self) -> &'static str {
        PRODUCT
    }

    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn native_ops(&self) -> OpSet {
        OpSet::of(channel::OPS)
    }

    fn open_channel(&self, cx: &mut ChannelCx<'_>) -> io::Result<Box<dyn IoChannel>> {
        let shared = Arc::clone(&self.running.shared);
        if !shared.has_device() {
            // Its driver would not know of the channel, and so not wait for it.
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "the array is being started; try again"));
        }
        Ok(Box::new(channel::RaidChannel::open(shared, cx)?))
    }

    fn removed(&self) {
        self.running.stop();
    }

    fn driver_specific(&self) -> Value {
        json!({ "raid": {
            "uuid": self.running.uuid.to_string(),
            "strip_size_kb": 0,
            "raid_level": "raid1",
            "superblock": self.running.shared.persist,
        } })
    }

    fn config(&self, _: &BdevInfo) -> Vec<ConfigEntry> {
        vec![self.running.config()]
    }

    fn base_bdevs(&self) -> Vec<String> {
        self.running.leg_names()
    }
}

async fn conformance_make(
    system: Arc<BdevSystem>,
    spec: Spec,
    superblock: bool,
    legs: usize,
) -> Result<Vec<String>, BdevError> {
    let mut made = vec![spec.name.clone()];
    let more = if superblock { format::DATA_OFFSET / u64::from(spec.block_size) } else { 0 };
    for n in 0..legs {
        let name = format!("{}-leg{n}", spec.name);
        let options = super::malloc::MallocOptions::new(spec.block_size, spec.num_blocks + more);
        super::malloc::create(&system, &name, None, options).await?;
        made.push(name);
    }
    let region_bytes = Some(64 * 1024);
    let options = control::Create { uuid: None, superblock, region_bytes };
    control::create(&system, &spec.name, &made[1..], options).await?;
    // Named as the lowest as well: an array does not go with a leg.
    made.push(spec.name);
    Ok(made)
}
