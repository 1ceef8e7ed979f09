//! The `ringstone` command: the appliance (`serve`) and its tools.
//!
//! It is a library so that a binary of your own can be the same command with handlers of your own: see
//! `docs/appliance.md`.
#![forbid(unsafe_code)]

mod appliance_bench;
mod appliance_command;
mod bdevperf;
mod channel_bench;
mod cores;
mod defaults;
mod discover;
mod executor;
mod identify;
mod load;
mod logging;
mod perf;
mod remote;
mod rpc_command;
mod say;
mod serve;
mod state;

/// Builds what the guide says.
#[cfg(doctest)]
#[doc = include_str!("../../docs/appliance.md")]
struct Guide;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A storage appliance in userspace: block devices served over NVMe-oF, configured over JSON-RPC.
#[derive(Debug, Parser)]
#[command(name = "ringstone", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the appliance. Without a configuration it makes a 1 GiB volume and serves it.
    Serve(serve::Options),
    /// Call a JSON-RPC method of a running appliance, or list the methods.
    Rpc(rpc_command::Options),
    /// Show what a controller and its namespaces are.
    Identify(identify::Options),
    /// Show what a discovery service knows.
    Discover(discover::Options),
    /// Put a load on namespaces over NVMe-oF and report its speed.
    Perf(perf::Options),
    /// Put a load on a bdev in this process and report its speed.
    Bdevperf(bdevperf::Options),
    /// Run a handler in a process of its own, for a bdev whose handler is 'unix:' and a socket.
    Appliance(appliance_command::Options),
    /// Measure what the way to a handler of an appliance bdev costs.
    ApplianceBench(appliance_bench::Options),
    /// Compare channels between processes: TCP, rsockets and native verbs.
    ChannelBench(channel_bench::Options),
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Serve(options) => serve::main(&options),
        Command::Rpc(options) => rpc_command::main(&options),
        Command::Identify(options) => identify::main(&options),
        Command::Discover(options) => discover::main(&options),
        Command::Perf(options) => perf::main(&options),
        Command::Bdevperf(options) => bdevperf::main(&options),
        Command::Appliance(options) => appliance_command::main(&options),
        Command::ApplianceBench(options) => appliance_bench::main(&options),
        Command::ChannelBench(options) => channel_bench::main(&options),
    }
}
