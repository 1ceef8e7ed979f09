//! `ringstone rpc`: one JSON-RPC call from the command line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use rpc::{Catalogue, Client};

use crate::defaults;
use crate::say::say;

/// Options of `ringstone rpc`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Socket of the appliance [default: rpc.sock in the per-user state directory].
    #[arg(long, short, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Seconds to wait for the reply.
    #[arg(long, short, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// List the methods with their parameters and help.
    #[arg(long, exclusive = true)]
    list: bool,
    /// Print docs/rpc.md.
    #[arg(long, exclusive = true, hide = true)]
    markdown: bool,
    /// Method to call.
    #[arg(required_unless_present_any = ["list", "markdown"])]
    method: Option<String>,
    /// Parameters: one JSON object, or key=value words (a.b=c for a nested key).
    #[arg(trailing_var_arg = true)]
    params: Vec<String>,
}

/// Every method that this program's server has.
pub fn catalogue() -> Catalogue {
    let bdevs: Vec<_> = bdev::rpc::methods().copied().collect();
    Catalogue::builtin()
        .with(&bdevs)
        .with(nvmf::rpc::methods())
        .with(nbd::rpc::methods())
        .with(initiator::rpc::methods())
}

/// Runs the command.
pub fn main(options: &Options) -> ExitCode {
    if options.list {
        say!("{}", catalogue().list().trim_end());
        return ExitCode::SUCCESS;
    }
    if options.markdown {
        say!("{}", catalogue().markdown().trim_end());
        return ExitCode::SUCCESS;
    }
    match call(options) {
        Ok(text) => {
            say!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn call(options: &Options) -> Result<String, String> {
    let method = options.method.as_deref().unwrap_or_default();
    let socket = match &options.socket {
        Some(path) => path.clone(),
        None => defaults::rpc_socket(&defaults::state_dir()?),
    };
    let catalogue = catalogue();
    let params = rpc::args::parse(catalogue.find(method), &options.params).map_err(|e| e.to_string())?;
    let mut client = Client::connect(&socket, Duration::from_secs(options.timeout)).map_err(|e| e.to_string())?;
    let result = client.call(method, params).map_err(|e| e.to_string())?;
    serde_json::to_string_pretty(&result).map_err(|e| e.to_string())
}
