//! The last compiled grammars, by their content.

use std::collections::HashMap;
use std::sync::Arc;

use super::Grammar;

/// SHA-256 of a grammar's kind, content and options.
pub(super) type Key = [u8; 32];

/// Least recently used goes first, when there are too many or they hold too much.
pub(super) struct GrammarCache {
    entries: HashMap<Key, Entry>,
    max_entries: usize,
    max_bytes: usize,
    /// Counts uses.
    clock: u64,
}

struct Entry {
    grammar: Arc<Grammar>,
    last_used: u64,
}

impl GrammarCache {
    pub fn new(max_entries: usize, max_bytes: usize) -> Self {
        Self {
            entries: HashMap::new(),
            max_entries,
            max_bytes,
            clock: 0,
        }
    }

    /// A grammar that has failed under a sequence is not handed out again.
    pub fn get(&mut self, key: &Key) -> Option<Arc<Grammar>> {
        self.clock += 1;
        if self.entries.get(key).is_some_and(|entry| entry.grammar.is_spent()) {
            self.entries.remove(key);
        }
        let entry = self.entries.get_mut(key)?;
        entry.last_used = self.clock;
        Some(entry.grammar.clone())
    }

    pub fn insert(&mut self, key: Key, grammar: Arc<Grammar>) {
        self.clock += 1;
        let last_used = self.clock;
        self.entries.insert(key, Entry { grammar, last_used });
        // Grammars grow while they are used, so all are asked again.
        let mut bytes: usize = self.entries.values().map(|entry| entry.grammar.bytes()).sum();
        while self.entries.len() > self.max_entries || (bytes > self.max_bytes && self.entries.len() > 1) {
            let oldest = self
                .entries
                .iter()
                .min_by_key(|(_, entry)| entry.last_used)
                .map(|(key, entry)| (*key, entry.grammar.bytes()));
            let Some((oldest, freed)) = oldest else { break };
            self.entries.remove(&oldest);
            bytes -= freed.min(bytes);
        }
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.entries.len()
    }
}
