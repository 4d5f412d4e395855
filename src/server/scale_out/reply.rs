//! Deltas become one response, or chunks.

use std::sync::Arc;

use serde_json::json;

use super::types::{ChoiceLogprobs, GenerateChoice, GenerateChunk, GenerateResponse, TokenLogprob, TopTokenLogprob};
use crate::server::openai::chat_completions::types::{ChatLogprobs, LogprobContent, TopLogprob};
use crate::server::openai::reply::{Counts, Head, ReplyOptions, finish, listed_entries, wire_ids};
use crate::server::openai::types::{StreamUsage, Usage, prompt_logprobs, ranked, wire_logprob};
use crate::server::sse::Frames;
use crate::step::TokenId;
use crate::text::{TextDelta, TextLogprobs};

/// What a reply contains beside its tokens.
pub struct TokensReply {
    pub head: Head,
    pub options: ReplyOptions,
    pub logprobs: Option<i64>,
    pub n: u32,
    pub prompt: Arc<[TokenId]>,
    pub return_prompt: bool,
    /// `output_mode` text.
    pub as_text: bool,
}

impl TokensReply {
    pub fn response(&self, choices: Vec<TextDelta>) -> GenerateResponse {
        let counts = choices.iter().fold((0, 0), |(tokens, cached), choice| {
            (tokens + choice.token_ids.len(), choice.num_cached_tokens.max(cached))
        });
        let positions = choices.first().and_then(|choice| choice.prompt_logprobs.as_deref());
        GenerateResponse {
            request_id: self.head.id.clone(),
            model: self.head.model.clone(),
            created: self.head.created,
            usage: self.usage(counts.0, counts.1),
            prompt_logprobs: positions.map(prompt_logprobs),
            prompt_token_id_logprobs: None,
            prompt_token_ids: self.return_prompt.then(|| wire_ids(&self.prompt)),
            mm_placeholders: None,
            metrics: None,
            kv_transfer_params: None,
            ec_transfer_params: None,
            output_mode: if self.as_text { "text" } else { "tokens" },
            choices: choices.into_iter().map(|delta| self.choice(delta)).collect(),
        }
    }

    fn choice(&self, delta: TextDelta) -> GenerateChoice {
        let (finish_reason, stop_reason) = delta.finish.as_ref().map(finish).unzip();
        GenerateChoice {
            index: delta.index,
            finish_reason,
            stop_reason: stop_reason.flatten(),
            logprobs: self.logprobs(&delta.logprobs),
            token_ids: Some(delta.token_ids),
            routed_experts: None,
            sampling_mask: None,
            weight_versions: None,
            text: self.as_text.then_some(delta.text),
        }
    }

    fn logprobs(&self, tokens: &[TextLogprobs]) -> Option<ChoiceLogprobs> {
        let listed = listed_entries(self.logprobs?);
        if self.as_text {
            let content = tokens.iter().map(|token| text_logprob(token, listed)).collect();
            return Some(ChoiceLogprobs::Text(ChatLogprobs { content: Some(content) }));
        }
        let content = tokens.iter().map(|token| token_logprob(token, listed)).collect();
        Some(ChoiceLogprobs::Tokens { content })
    }

    fn usage(&self, completion_tokens: usize, cached_tokens: usize) -> Usage {
        let counts = Counts {
            prompt_tokens: self.prompt.len(),
            completion_tokens,
            cached_tokens,
            ..Counts::default()
        };
        counts.usage(&self.options)
    }
}

fn token_logprob(token: &TextLogprobs, listed: usize) -> TokenLogprob {
    let top = ranked(token)
        .take(listed)
        .map(|(token, logprob, rank)| TopTokenLogprob {
            token_id: token.id,
            logprob: wire_logprob(logprob),
            rank: Some(rank),
        });
    TokenLogprob {
        token_id: token.token.id,
        logprob: wire_logprob(token.logprob),
        rank: Some(token.rank),
        top_logprobs: top.collect(),
    }
}

fn text_logprob(token: &TextLogprobs, listed: usize) -> LogprobContent {
    let top = ranked(token).take(listed).map(|(token, logprob, _)| TopLogprob {
        bytes: Some(token.text.clone().into_bytes()),
        token: token.text.clone(),
        logprob: wire_logprob(logprob),
    });
    LogprobContent {
        bytes: Some(token.token.text.clone().into_bytes()),
        token: token.token.text.clone(),
        logprob: wire_logprob(token.logprob),
        top_logprobs: top.collect(),
    }
}

/// Builds the chunks of a streamed answer.
pub struct ChunkBuilder {
    reply: TokensReply,
    /// By choice.
    completion_tokens: Vec<usize>,
    cached_tokens: usize,
    begun: bool,
}

impl ChunkBuilder {
    pub fn new(reply: TokensReply) -> Self {
        Self {
            completion_tokens: vec![0; reply.n as usize],
            cached_tokens: 0,
            begun: false,
            reply,
        }
    }

    pub fn delta(&mut self, delta: TextDelta) -> Frames {
        let mut frames = Frames::default();
        self.cached_tokens = self.cached_tokens.max(delta.num_cached_tokens);
        let Some(count) = self.completion_tokens.get_mut(delta.index as usize) else {
            return frames;
        };
        *count += delta.token_ids.len();
        let count = *count;
        // A sequence that is aborted ends without a token.
        if delta.token_ids.is_empty() && delta.finish.is_none() {
            return frames;
        }
        let choice = self.reply.choice(delta);
        let usage = self
            .reply
            .options
            .continuous_usage
            .then(|| self.reply.usage(count, self.cached_tokens));
        let chunk = self.chunk(vec![choice], usage);
        self.begun = true;
        frames.push(&chunk);
        frames
    }

    /// What follows the last delta: the usage, if it was asked. As in vLLM, the only chunk without nulls.
    pub fn end(&mut self) -> Frames {
        let mut frames = Frames::default();
        if self.reply.options.include_usage {
            let usage = self
                .reply
                .usage(self.completion_tokens.iter().sum(), self.cached_tokens);
            frames.push(&json!({
                "request_id": self.reply.head.id,
                "usage": StreamUsage::from(usage),
                "output_mode": "tokens",
                "choices": [],
            }));
        }
        frames
    }

    fn chunk(&self, choices: Vec<GenerateChoice>, usage: Option<Usage>) -> GenerateChunk {
        let shows_prompt = self.reply.return_prompt && !self.begun;
        GenerateChunk {
            request_id: self.reply.head.id.clone(),
            usage,
            prompt_token_ids: shows_prompt.then(|| wire_ids(&self.reply.prompt)),
            mm_placeholders: None,
            metrics: None,
            output_mode: "tokens",
            choices,
        }
    }
}
