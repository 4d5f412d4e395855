//! docs/compatibility.md in tests: parts of it are made from the tables that the program itself reads.

use std::sync::{Mutex, PoisonError};

const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/compatibility.md");

/// Tests run at once; each writes its own part of one file.
static FILE: Mutex<()> = Mutex::new(());

/// The part of `text` from `begin` through `end`.
fn part<'a>(text: &'a str, begin: &str, end: &str) -> Option<&'a str> {
    let from = text.find(begin)?;
    let to = from + text[from..].find(end)? + end.len();
    Some(&text[from..to])
}

/// # Panics
/// The document's part is not `expected`.
pub fn assert_current(begin: &str, end: &str, expected: &str) {
    let text = std::fs::read_to_string(PATH).unwrap_or_default();
    let message = "docs/compatibility.md is stale: cargo test --lib write_the_document -- --ignored";
    assert!(part(&text, begin, end) == Some(expected), "{message}");
}

/// Puts `new` in the place of the document's part, or at its end.
///
/// # Panics
/// The file cannot be written.
pub fn write(begin: &str, end: &str, new: &str) {
    let _alone = FILE.lock().unwrap_or_else(PoisonError::into_inner);
    let text = std::fs::read_to_string(PATH).unwrap_or_else(|_| "# Compatibility with vLLM\n\n".into());
    let text = match part(&text, begin, end) {
        Some(old) => text.replace(old, new),
        None => format!("{text}\n{new}"),
    };
    std::fs::write(PATH, text).unwrap();
}
