//! The `ringstone` command: the appliance (`serve`) and its tools.
#![forbid(unsafe_code)]

mod defaults;
mod executor;
mod logging;
mod perf;
mod rpc_command;
mod serve;
mod state;

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
    /// Put a load on a namespace over NVMe-oF and report its speed.
    Perf(perf::Options),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Serve(options) => serve::main(&options),
        Command::Rpc(options) => rpc_command::main(&options),
        Command::Perf(options) => perf::main(&options),
    }
}
