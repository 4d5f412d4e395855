//! Ids to text, token by token.

use super::Tokenizer;
use crate::step::TokenId;

/// Decodes one choice. What it has put out so far is a prefix of the whole text: an incomplete character waits for its
/// remaining bytes. Time is linear in the bytes decoded.
///
/// The whole text is exactly [`Tokenizer::decode`] of all ids. `spaces_between_special_tokens` has no effect on a
/// byte-level vocabulary (nor in vLLM: its decoder joins tokens by nothing).
#[derive(Clone, Debug)]
pub struct Detokenizer {
    skip_special_tokens: bool,
    /// An incomplete character; at most 3 bytes between calls.
    pending: Vec<u8>,
}

impl Detokenizer {
    pub fn new(skip_special_tokens: bool) -> Self {
        Self {
            skip_special_tokens,
            pending: Vec::new(),
        }
    }

    /// Appends to `text` what the token makes certain.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: TokenId, text: &mut String) {
        if self.skip_special_tokens && tokenizer.is_special(id) {
            return;
        }
        let token = tokenizer.token_bytes(id);
        if self.pending.is_empty() {
            let rest = take_valid(token, text);
            self.pending.extend_from_slice(rest);
        } else {
            self.pending.extend_from_slice(token);
            let rest = take_valid(&self.pending, text).len();
            self.pending.drain(..self.pending.len() - rest);
        }
    }

    /// The end: an incomplete character becomes U+FFFD.
    pub fn finish(&mut self, text: &mut String) {
        text.push_str(&String::from_utf8_lossy(&self.pending));
        self.pending.clear();
    }
}

/// Appends every decided character of `bytes`, U+FFFD for what can be none; returns the undecided end.
fn take_valid<'a>(mut bytes: &'a [u8], text: &mut String) -> &'a [u8] {
    loop {
        match std::str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                return &[];
            }
            Err(error) => {
                let (valid, rest) = bytes.split_at(error.valid_up_to());
                text.push_str(&String::from_utf8_lossy(valid));
                match error.error_len() {
                    None => return rest,
                    Some(len) => {
                        text.push(char::REPLACEMENT_CHARACTER);
                        bytes = &rest[len..];
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::text::tokenizer::testing::{golden, tokenizer};

    #[test]
    fn what_is_out_is_the_decided_part_of_every_golden_prefix() {
        for model in ["tiny-dense", "tiny-moe"] {
            let tokenizer = tokenizer(model);
            for case in golden(model)["prefix"].as_array().unwrap() {
                for (key, skip) in [("prefix_decodes", false), ("prefix_decodes_skip", true)] {
                    let (mut detokenizer, mut text) = (Detokenizer::new(skip), String::new());
                    for (id, expected) in case["ids"]
                        .as_array()
                        .unwrap()
                        .iter()
                        .zip(case[key].as_array().unwrap())
                    {
                        detokenizer.push(&tokenizer, id.as_u64().unwrap() as u32, &mut text);
                        let (mut flushed, mut end) = (text.clone(), detokenizer.clone());
                        end.finish(&mut flushed);
                        assert_eq!(flushed, expected.as_str().unwrap());
                    }
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_ids_give_the_text_of_the_whole(ids in prop::collection::vec(0u32..2048, 0..80), skip in any::<bool>()) {
            let tokenizer = tokenizer("tiny-dense");
            let (mut detokenizer, mut text) = (Detokenizer::new(skip), String::new());
            for &id in &ids {
                detokenizer.push(&tokenizer, id, &mut text);
                prop_assert!(detokenizer.pending.len() <= 3);
            }
            detokenizer.finish(&mut text);
            prop_assert_eq!(text, tokenizer.decode(&ids, skip));
        }
    }
}
