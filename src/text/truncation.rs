//! Prompts cut to a length before anything else looks at it.

use crate::step::TokenId;

/// How a prompt is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Truncation {
    pub max_tokens: usize,
    /// Cut at the start, not at the end.
    pub keep_end: bool,
}

impl Truncation {
    /// Whether anything was cut.
    pub fn apply(&self, ids: &mut Vec<TokenId>) -> bool {
        let Some(excess) = ids.len().checked_sub(self.max_tokens).filter(|excess| *excess > 0) else {
            return false;
        };
        if self.keep_end {
            ids.drain(..excess);
        } else {
            ids.truncate(self.max_tokens);
        }
        true
    }
}
