//! Log-probabilities with the texts of their tokens.

use super::{TextLogprobs, TokenText, Tokenizer};
use crate::step::{TokenId, TokenLogprobs};

/// vLLM's floor: JSON has no -inf.
const MIN_LOGPROB: f32 = -9999.0;

/// The token alone, special or not.
pub fn token_text(tokenizer: &Tokenizer, id: TokenId) -> TokenText {
    let bytes = tokenizer.token_bytes(id).to_vec();
    TokenText {
        id,
        text: String::from_utf8_lossy(&bytes).into_owned(),
        bytes,
    }
}

/// Values are floored at -9999 (NaN too). Alternatives are ranked from 1 in their order.
pub fn text_logprobs(tokenizer: &Tokenizer, logprobs: &TokenLogprobs) -> TextLogprobs {
    let top = logprobs.top.iter().zip(1..);
    TextLogprobs {
        token: token_text(tokenizer, logprobs.id),
        logprob: logprobs.logprob.max(MIN_LOGPROB),
        rank: logprobs.rank,
        top: top
            .map(|(&(id, value), rank)| (token_text(tokenizer, id), value.max(MIN_LOGPROB), rank))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::testing::tokenizer;

    #[test]
    fn broken_characters_keep_their_bytes_and_infinity_is_floored() {
        let tokenizer = tokenizer("tiny-moe");
        let logprobs = TokenLogprobs {
            id: 1107,
            logprob: -0.5,
            rank: 2,
            top: vec![(1873, f32::NEG_INFINITY)],
        };
        let text = text_logprobs(&tokenizer, &logprobs);
        assert_eq!(
            (text.token.text.as_str(), text.token.bytes.as_slice()),
            ("\u{fffd}", &[0xf0, 0x9f][..])
        );
        assert_eq!(
            (text.top[0].0.text.as_str(), text.top[0].1, text.top[0].2),
            ("<|im_end|>", -9999.0, 1)
        );
    }
}
