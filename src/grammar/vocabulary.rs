//! The model's vocabulary as the automaton sees it.

use std::sync::Arc;

use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use super::GrammarError;

/// Longer tokens are never allowed under a grammar: the trie has room for a depth of 1024.
const MAX_TOKEN_BYTES: usize = 512;

/// Bytes of every token id.
pub struct Vocabulary {
    /// By id, as many as the model has logits; empty for ids that stand for nothing. Special tokens begin with
    /// [`TokTrie::SPECIAL_TOKEN_MARKER`], so that no grammar takes them for their text.
    words: Vec<Vec<u8>>,
    /// The primary one first.
    eos: Vec<TokenId>,
}

impl Vocabulary {
    /// `token` gives the bytes of an id, and whether it is an added token rather than text. `eos`: the primary one first;
    /// ids outside the vocabulary do not count.
    pub fn new<'a>(vocab_size: usize, eos: &[u32], token: impl Fn(u32) -> (&'a [u8], bool)) -> Self {
        let words = (0..vocab_size as u32).map(|id| match token(id) {
            (bytes, _) if bytes.len() > MAX_TOKEN_BYTES => Vec::new(),
            (bytes, true) => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
            (bytes, false) => bytes.to_vec(),
        });
        Self {
            words: words.collect(),
            eos: eos.iter().copied().filter(|&id| (id as usize) < vocab_size).collect(),
        }
    }

    pub(super) fn words(&self) -> &[Vec<u8>] {
        &self.words
    }

    /// # Errors
    /// No EOS: constrained output could not end.
    pub(super) fn token_env(&self) -> Result<TokEnv, GrammarError> {
        let Some(&primary) = self.eos.first() else {
            return Err(GrammarError::invalid(
                "the model has no end-of-sequence token, so its output cannot be constrained",
            ));
        };
        let info = TokRxInfo::new(self.words.len() as u32, primary);
        let trie = TokTrie::from(&info, &self.words).with_eos_tokens(&self.eos);
        Ok(Arc::new(Environment { trie }))
    }
}

/// Tokens are never forced (the model chooses among all spellings of a text), so tokenizing is not needed to be exact.
struct Environment {
    trie: TokTrie,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.greedy_tokenize(bytes)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}
