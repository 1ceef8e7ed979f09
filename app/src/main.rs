//! The `ringstone` command.
fn main() {}
