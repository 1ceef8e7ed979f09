//! raid1: one device on several others, each of which has all of it.
//!
//! | room | concern |
//! |---|---|
//! | [`format`] | every byte on a leg besides the data |
//! | [`assembly`] | which legs make the array |
//! | [`regions`] | what may be written at this moment, and which leg lacks what |
//! | [`array`](mod@array) | the array as a machine without I/O |

pub mod array;
pub mod assembly;
pub mod format;
pub mod regions;
