//! What the program does beside `serve` and `bench`: each subcommand a file.

pub mod collect_env;
pub mod dry_run;
pub mod run_batch;
pub mod talk;

use std::io::Write;

/// A line on stdout, as `println!` but for a reader that went away.
macro_rules! say {
    ($($part:tt)*) => {
        $crate::commands::print(&(format!($($part)*) + "\n"))
    };
}
pub(crate) use say;

/// Writes to stdout at once; a reader that went away (`| head`) is no error.
pub fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}
