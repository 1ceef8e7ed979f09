//! The appliance device: its I/O is done by a handler, on threads of its own, inline, or in another process.
//!
//! | room | concern |
//! |---|---|
//! | [`port`] | the seams: [`Backend`](port::Backend), one a device, and [`Port`](port::Port), one a channel |
//! | [`settings`] | what `bdev_appliance_create` was asked for |
//! | [`builtin`] | handlers by name |

pub mod builtin;
pub mod port;
pub mod settings;
