//! Standard output of the tools, whose reader may go: `ringstone discover | head -1`.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write};

/// Prints a line. A reader that is gone has seen enough, and is no failure of whoever prints; anything else that keeps the
/// text from being written is said, and the process ends as failed.
pub fn line(text: Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    match out.write_fmt(format_args!("{text}\n")).and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "standard output cannot be written: {error}");
            std::process::exit(1);
        }
    }
}

/// As `println!`, by [`line`].
macro_rules! say {
    ($($text:tt)*) => { $crate::say::line(format_args!($($text)*)) };
}
pub(crate) use say;
