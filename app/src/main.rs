//! The `ringstone` command.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    ringstone_app::main()
}
