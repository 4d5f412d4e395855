//! Text in, text out: tokenizer, incremental detokenizer, stop strings, logprobs by token text.
//!
//! [`TextEngine`] turns a [`GenerateRequest`] into engine requests and their tokens into [`TextDelta`]s.

mod beam;
pub mod detokenizer;
pub mod generate;
pub mod label;
pub mod logprobs;
pub mod pool;
mod request_log;
pub mod sampling;
pub mod stop;
pub mod tokenizer;
mod truncation;

use std::fmt::Display;
use std::sync::Arc;

use crate::engine::{EngineError, RepetitionDetection, SequenceTiming, ThinkingBudget};
use crate::grammar::{Constraint, GrammarError};
use crate::step::{SamplingParams, TokenId};

pub use generate::{TextEngine, TextLimits, TextStream, collect};
pub use label::{LabelRequest, LabelledPrompt};
pub use pool::{PoolRequest, PooledPrompt};
pub use sampling::{ResolvedSampling, SamplingOptions, SamplingRules, resolve_sampling};
pub use tokenizer::Tokenizer;
pub use truncation::Truncation;

/// A prompt to continue, `n` times.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// The response id's suffix; for logs.
    pub id: String,
    pub prompt: Arc<[TokenId]>,
    /// `seed` here is the request's or a fresh random one; choice i uses seed + i.
    pub sampling: SamplingParams,
    pub n: u32,
    /// Output limit; none = the rest of the context.
    pub max_tokens: Option<u32>,
    pub min_tokens: u32,
    pub ignore_eos: bool,
    pub stop_token_ids: Vec<TokenId>,
    /// Not empty strings.
    pub stop: Vec<String>,
    pub include_stop_str_in_output: bool,
    pub skip_special_tokens: bool,
    pub spaces_between_special_tokens: bool,
    pub priority: i64,
    pub cache_salt: Option<String>,
    pub extensions: GenerateExtensions,
}

/// What most requests leave alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerateExtensions {
    /// Tokens that a delta gathers, except a choice's first and last; 0 and 1 = as they come.
    pub stream_interval: usize,
    pub repetition_detection: Option<RepetitionDetection>,
    /// The choices are the `n` best beams of a search, not samples.
    pub beam_search: Option<BeamSearch>,
    /// The client reads deltas; for logs.
    pub stream: bool,
    /// What the output must look like; not with `beam_search`.
    pub constraint: Option<Constraint>,
    /// Ends reasoning that uses it up.
    pub thinking_budget: Option<ThinkingBudget>,
}

/// Beam search; its width is the request's `n`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BeamSearch {
    /// Beams are ranked by log-probability over length to this power. Finite.
    pub length_penalty: f64,
}

/// New text of one choice. The concatenation of `text` over a choice's deltas is its whole text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TextDelta {
    /// `0..n`.
    pub index: u32,
    /// May be empty: an incomplete character or a possible stop string is held back.
    pub text: String,
    /// Every token sampled since the last delta, the stopping one included, whether or not its text is out yet.
    pub token_ids: Vec<TokenId>,
    /// Parallel to `token_ids` when logprobs were asked.
    pub logprobs: Vec<TextLogprobs>,
    /// Only in a choice's first delta: one entry per prompt token after the first.
    pub prompt_logprobs: Option<Vec<TextLogprobs>>,
    /// Prompt tokens that came from the prefix cache.
    pub num_cached_tokens: usize,
    pub finish: Option<TextFinish>,
    /// With the finish, unless no token came.
    pub timing: Option<SequenceTiming>,
}

impl TextDelta {
    /// Appends a later delta of the same choice.
    pub fn extend(&mut self, later: TextDelta) {
        self.text.push_str(&later.text);
        self.token_ids.extend(later.token_ids);
        self.logprobs.extend(later.logprobs);
        self.prompt_logprobs = self.prompt_logprobs.take().or(later.prompt_logprobs);
        self.num_cached_tokens = later.num_cached_tokens;
        self.finish = later.finish.or(self.finish.take());
        self.timing = later.timing.or(self.timing);
    }
}

/// A token's log-probability with its text.
#[derive(Clone, Debug, PartialEq)]
pub struct TextLogprobs {
    pub token: TokenText,
    pub logprob: f32,
    pub rank: u32,
    pub top: Vec<(TokenText, f32, u32)>,
}

/// A token as text; bytes that are no whole character read as U+FFFD in `text`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenText {
    pub id: TokenId,
    pub text: String,
    pub bytes: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TextFinish {
    /// EOS.
    Eos,
    /// A stop token id other than the primary EOS.
    StopToken(TokenId),
    /// A stop string of the request.
    StopString(String),
    Length,
    /// The request's `repetition_detection` fired.
    Repetition,
    Abort,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum TextError {
    /// The client's fault. `param` is the request field where vLLM names one; the message then ends with vLLM's
    /// ` (parameter=NAME, value=V)`.
    #[error("{message}")]
    Invalid {
        param: Option<&'static str>,
        message: String,
    },
    /// There is no grammar to constrain the output by.
    #[error(transparent)]
    Grammar(#[from] GrammarError),
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl TextError {
    /// The client's fault, in no field that vLLM names.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid {
            param: None,
            message: message.into(),
        }
    }

    /// The client's fault in the request field `param`.
    pub fn parameter(param: &'static str, value: impl Display, message: impl Display) -> Self {
        Self::Invalid {
            param: Some(param),
            message: format!("{message} (parameter={param}, value={value})"),
        }
    }
}
