//! The appliance as its user meets it: the real binary, its command line, its state directory.

#[path = "../common/mod.rs"]
mod common;

mod config;
mod docs;
mod guide;
mod lifetime;
mod remote;
mod rpc_command;
mod spdk;
mod state;
