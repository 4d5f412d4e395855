//! What the replies of chat and completions have in common.

use std::sync::Arc;

use super::types::{CompletionTokensDetails, PromptTokensDetails, SamplingFields, StopReason, Usage};
use crate::config::ServerConfig;
use crate::server::ids;
use crate::step::TokenId;
use crate::text::TextFinish;

/// What every chunk and every whole response starts with.
#[derive(Clone, Debug)]
pub struct Head {
    /// With its prefix.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
    pub fingerprint: Option<String>,
}

impl Head {
    pub fn new(id: String, model: &str, config: &ServerConfig) -> Self {
        Self {
            id,
            created: ids::unix_seconds(),
            model: model.to_owned(),
            fingerprint: config.fingerprint.clone(),
        }
    }
}

/// What the client and the server's flags ask a reply to contain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplyOptions {
    pub return_token_ids: bool,
    /// Logprobs name tokens `token_id:N`.
    pub tokens_as_token_ids: bool,
    /// A last chunk with the usage.
    pub include_usage: bool,
    /// Running usage in every chunk.
    pub continuous_usage: bool,
    /// `--enable-prompt-tokens-details`.
    pub prompt_details: bool,
    /// Usage counts reasoning tokens: a reasoning parser is active.
    pub reasoning_details: bool,
}

impl ReplyOptions {
    pub fn new(fields: &SamplingFields, config: &ServerConfig, reasoning_details: bool) -> Self {
        let stream_options = fields.stream_options.clone().unwrap_or_default();
        let include_usage = stream_options.include_usage.unwrap_or(false) || config.force_include_usage;
        Self {
            return_token_ids: fields.return_token_ids.unwrap_or(false),
            tokens_as_token_ids: fields
                .return_tokens_as_token_ids
                .unwrap_or(config.return_tokens_as_token_ids),
            include_usage,
            continuous_usage: include_usage
                && (stream_options.continuous_usage_stats.unwrap_or(false) || config.force_include_usage),
            prompt_details: config.prompt_tokens_details,
            reasoning_details,
        }
    }
}

/// Token counts of a reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub cached_tokens: usize,
    pub reasoning_tokens: usize,
}

impl Counts {
    pub fn usage(&self, options: &ReplyOptions) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
            completion_tokens: self.completion_tokens,
            prompt_tokens_details: options.prompt_details.then(|| PromptTokensDetails {
                cached_tokens: self.cached_tokens,
                ..Default::default()
            }),
            completion_tokens_details: options.reasoning_details.then_some(CompletionTokensDetails {
                reasoning_tokens: self.reasoning_tokens,
            }),
        }
    }
}

/// `finish_reason` and `stop_reason` of a text.
pub fn finish(finish: &TextFinish) -> (&'static str, Option<StopReason>) {
    match finish {
        TextFinish::Eos => ("stop", None),
        TextFinish::StopToken(id) => ("stop", Some(StopReason::Token(*id))),
        TextFinish::StopString(text) => ("stop", Some(StopReason::Text(text.clone()))),
        TextFinish::Length => ("length", None),
        TextFinish::Abort => ("abort", None),
    }
}

/// Token ids as the wire has them.
pub fn wire_ids(ids: &Arc<[TokenId]>) -> Vec<u32> {
    ids.to_vec()
}

/// How many of the entries of a position (the chosen token first) are listed for `asked`; -1 = all.
pub fn listed_entries(asked: i64) -> usize {
    usize::try_from(asked).unwrap_or(usize::MAX)
}
