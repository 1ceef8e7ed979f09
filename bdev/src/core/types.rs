//! Operations, statuses and geometry: the words that devices share with the handlers of appliance bdevs.

pub use appliance::types::*;
