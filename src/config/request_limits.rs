//! How much one request may ask for: vLLM's limit variables.

use super::environment::Environment;
use super::resolve::{ConfigError, positive};
use crate::step::{MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS};

/// Most choices that `VLLM_MAX_N_SEQUENCES` may allow, vLLM's own default.
const MAX_N: usize = 16_384;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLimits {
    /// `n`. Differs from vLLM: 16,384 there, which one request could fill the queue with.
    pub max_n: usize,
    /// Prompts of a completion request.
    pub max_prompts: usize,
    pub max_stop_strings: usize,
    pub max_bad_words: usize,
    /// Tokens of all bad words together, in every spelling.
    pub max_bad_word_tokens: usize,
}

impl RequestLimits {
    /// Where no variable is set.
    pub const DEFAULT: Self = Self {
        max_n: 128,
        max_prompts: 1024,
        max_stop_strings: 4,
        max_bad_words: MAX_BAD_WORDS,
        max_bad_word_tokens: MAX_BAD_WORD_TOKENS,
    };

    /// # Errors
    /// A variable is no positive number, or more than this server can do.
    pub fn resolve(env: &Environment) -> Result<Self, ConfigError> {
        let limit = |name: &str, default: usize, largest: usize| {
            let Some(value) = env.parsed::<i64>(name)? else {
                return Ok(default);
            };
            match positive(name, value)? {
                value if value > largest => {
                    let message = format!("{value} is more than {largest}, the most that is possible here");
                    Err(ConfigError::new(name, message))
                }
                value => Ok(value),
            }
        };
        let defaults = Self::DEFAULT;
        Ok(Self {
            max_n: limit("VLLM_MAX_N_SEQUENCES", defaults.max_n, MAX_N)?,
            max_prompts: limit("VLLM_MAX_COMPLETION_PROMPTS", defaults.max_prompts, usize::MAX)?,
            max_stop_strings: limit("VLLM_MAX_STOP_STRINGS", defaults.max_stop_strings, usize::MAX)?,
            max_bad_words: limit("VLLM_MAX_NUM_BAD_WORDS", defaults.max_bad_words, MAX_BAD_WORDS)?,
            max_bad_word_tokens: limit(
                "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS",
                defaults.max_bad_word_tokens,
                MAX_BAD_WORD_TOKENS,
            )?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(name: &str, value: &str) -> Result<RequestLimits, ConfigError> {
        RequestLimits::resolve(&[(name.to_owned(), value.to_owned())].into_iter().collect())
    }

    #[test]
    fn variables_change_the_limits_within_bounds() {
        assert_eq!(
            RequestLimits::resolve(&Environment::default()).unwrap(),
            RequestLimits::DEFAULT
        );
        assert_eq!(resolve("VLLM_MAX_N_SEQUENCES", "16384").unwrap().max_n, 16_384);
        assert_eq!(
            resolve("VLLM_MAX_COMPLETION_PROMPTS", "5000").unwrap().max_prompts,
            5000
        );
        assert_eq!(resolve("VLLM_MAX_STOP_STRINGS", "16").unwrap().max_stop_strings, 16);
        assert_eq!(resolve("VLLM_MAX_NUM_BAD_WORDS", "2").unwrap().max_bad_words, 2);
        let tokens = "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS";
        assert_eq!(resolve(tokens, "9").unwrap().max_bad_word_tokens, 9);
        for (name, value) in [
            ("VLLM_MAX_N_SEQUENCES", "16385"),
            ("VLLM_MAX_N_SEQUENCES", "0"),
            ("VLLM_MAX_STOP_STRINGS", "-1"),
            ("VLLM_MAX_NUM_BAD_WORDS", "129"),
            (tokens, "many"),
        ] {
            assert_eq!(resolve(name, value).unwrap_err().parameter, name);
        }
    }
}
