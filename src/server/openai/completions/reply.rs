//! Text deltas become chunks, or one whole response. Choice i of prompt p has index p * n + i.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::types::{ChunkChoice, CompletionChunk, CompletionLogprobs, CompletionResponse, ResponseChoice};
use crate::engine::SequenceTiming;
use crate::server::openai::reply::{
    Counts, Head, ReplyOptions, finish, listed_entries, request_metrics, stream_request_metrics, wire_ids,
};
use crate::server::openai::types::{StopReason, StreamUsage, prompt_logprobs, ranked, token_name, wire_logprob};
use crate::server::sse::Frames;
use crate::step::TokenId;
use crate::text::{TextDelta, TextLogprobs, TokenText};

/// What a completion reply contains beside its deltas.
#[derive(Clone, Debug)]
pub struct CompletionReply {
    pub head: Head,
    pub options: ReplyOptions,
    /// `logprobs`: alternatives beside the chosen token.
    pub logprobs: Option<i64>,
    /// The request asked `prompt_logprobs`, or `echo` with `logprobs`.
    pub prompt_logprobs: bool,
    /// Choices per prompt.
    pub n: u32,
    /// The prompt stands before the answer.
    pub echo: bool,
    /// `echo` with `max_tokens` 0: the text of what was sampled is not shown; as in vLLM it counts.
    pub prompt_only: bool,
    pub prompts: Vec<EchoedPrompt>,
}

/// A prompt, as `echo` shows it.
#[derive(Clone, Debug)]
pub struct EchoedPrompt {
    pub ids: Arc<[TokenId]>,
    /// Empty unless `echo` shows it.
    pub text: String,
    /// The first token, which has no logprobs of its own; none unless `echo` with logprobs.
    pub first: Option<TokenText>,
}

/// What is known of one choice while its deltas arrive.
#[derive(Clone, Debug, Default)]
struct ChoiceState {
    completion_tokens: usize,
    /// The next `text_offset`, in characters.
    offset: usize,
    /// Of the text that is out.
    text_chars: usize,
    begun: bool,
    timing: Option<SequenceTiming>,
}

impl CompletionReply {
    fn prompt(&self, index: u32) -> Option<&EchoedPrompt> {
        self.prompts.get((index / self.n.max(1)) as usize)
    }

    fn num_choices(&self) -> usize {
        self.prompts.len() * self.n as usize
    }

    /// Logprobs of what this delta shows: the echoed prompt before the first, then its tokens.
    fn logprobs(&self, state: &mut ChoiceState, delta: &TextDelta, is_first: bool) -> Option<CompletionLogprobs> {
        let asked = self.logprobs?;
        let mut out = CompletionLogprobs::default();
        if self.echo && is_first {
            if let Some(first) = self.prompt(delta.index).and_then(|prompt| prompt.first.as_ref()) {
                self.push_token(&mut out, state, first, None, None);
            }
            for position in delta.prompt_logprobs.iter().flatten() {
                self.push_position(&mut out, state, position, asked);
            }
        }
        if !self.prompt_only {
            for position in &delta.logprobs {
                self.push_position(&mut out, state, position, asked);
            }
        }
        Some(out)
    }

    fn push_position(
        &self,
        out: &mut CompletionLogprobs,
        state: &mut ChoiceState,
        position: &TextLogprobs,
        asked: i64,
    ) {
        let entries: Map<String, Value> = ranked(position)
            .take(listed_entries(asked).saturating_add(1))
            .map(|(token, logprob, _)| {
                (
                    token_name(token, self.options.tokens_as_token_ids),
                    Value::from(wire_logprob(logprob)),
                )
            })
            .collect();
        self.push_token(
            out,
            state,
            &position.token,
            Some(wire_logprob(position.logprob)),
            Some(entries),
        );
    }

    fn push_token(
        &self,
        out: &mut CompletionLogprobs,
        state: &mut ChoiceState,
        token: &TokenText,
        logprob: Option<f64>,
        top: Option<Map<String, Value>>,
    ) {
        let name = token_name(token, self.options.tokens_as_token_ids);
        out.text_offset.push(state.offset);
        state.offset += name.chars().count();
        out.tokens.push(name);
        out.token_logprobs.push(logprob);
        out.top_logprobs.push(top);
    }

    fn counts(&self, choices: &[ChoiceState], cached_tokens: usize) -> Counts {
        Counts {
            prompt_tokens: self.prompts.iter().map(|prompt| prompt.ids.len()).sum(),
            completion_tokens: choices.iter().map(|choice| choice.completion_tokens).sum(),
            cached_tokens,
            created_cache_tokens: None,
            reasoning_tokens: 0,
        }
    }

    fn finish(&self, delta: &TextDelta) -> Option<(&'static str, Option<StopReason>)> {
        delta.finish.as_ref().map(finish)
    }
}

/// Builds the chunks of a streamed answer.
pub struct ChunkBuilder {
    reply: CompletionReply,
    choices: Vec<ChoiceState>,
    cached_tokens: usize,
}

impl ChunkBuilder {
    pub fn new(reply: CompletionReply) -> Self {
        let choices = vec![ChoiceState::default(); reply.num_choices()];
        Self {
            reply,
            choices,
            cached_tokens: 0,
        }
    }

    /// `delta.index` counts over all prompts.
    pub fn delta(&mut self, delta: &TextDelta) -> Frames {
        let mut frames = Frames::default();
        let index = delta.index;
        let Some(mut state) = self.choices.get(index as usize).cloned() else {
            return frames;
        };
        let is_first = !std::mem::replace(&mut state.begun, true);
        state.completion_tokens += delta.token_ids.len();
        state.timing = delta.timing;
        // As vLLM: a chunk's offsets count from the text before it, also where some text is held back.
        state.offset = state.text_chars;
        self.cached_tokens = self.cached_tokens.max(delta.num_cached_tokens);

        let mut text = String::new();
        let prompt = self.reply.prompt(index);
        if let Some(prompt) = prompt.filter(|_| self.reply.echo && is_first) {
            text.push_str(&prompt.text);
        }
        if !self.reply.prompt_only {
            text.push_str(&delta.text);
        }
        let prompt_ids = prompt
            .filter(|_| is_first && (self.reply.echo || self.reply.options.return_token_ids))
            .map(|p| wire_ids(&p.ids));
        let finish = self.reply.finish(delta);
        let is_last = finish.is_some();
        let (finish_reason, stop_reason) = finish.map_or((None, None), |(reason, stop)| (Some(reason), stop));
        let logprobs = self.reply.logprobs(&mut state, delta, is_first);
        state.text_chars += text.chars().count();
        let completion_tokens = state.completion_tokens;
        let prompt_tokens = prompt.map_or(0, |prompt| prompt.ids.len());
        self.choices[index as usize] = state;

        let mut chunk = self.chunk(vec![ChunkChoice {
            index,
            text,
            logprobs,
            finish_reason,
            stop_reason,
            prompt_token_ids: prompt_ids,
            token_ids: self.reply.options.return_token_ids.then(|| delta.token_ids.clone()),
            weight_versions: is_last.then_some(None),
        }]);
        chunk.kv_transfer_params = Some(None);
        if self.reply.options.continuous_usage {
            chunk.usage = Some(StreamUsage::running(prompt_tokens, completion_tokens));
        }
        if is_last && !self.reply.options.include_usage {
            chunk.system_fingerprint = self.reply.head.fingerprint.clone();
        }
        frames.push(&chunk);
        frames
    }

    /// What follows the last delta: the usage, if it was asked.
    pub fn end(&mut self) -> Frames {
        let mut frames = Frames::default();
        if self.reply.options.include_usage {
            let mut chunk = self.chunk(Vec::new());
            let usage = self
                .reply
                .counts(&self.choices, self.cached_tokens)
                .usage(&self.reply.options);
            chunk.usage = Some(usage.into());
            chunk.system_fingerprint = self.reply.head.fingerprint.clone();
            if let (true, [choice]) = (self.reply.options.request_metrics, self.choices.as_slice()) {
                chunk.metrics = Some(stream_request_metrics(choice.timing, choice.completion_tokens));
            }
            frames.push(&chunk);
        }
        frames
    }

    fn chunk(&self, choices: Vec<ChunkChoice>) -> CompletionChunk {
        CompletionChunk {
            id: self.reply.head.id.clone(),
            object: "text_completion",
            created: self.reply.head.created,
            model: self.reply.head.model.clone(),
            choices,
            usage: None,
            system_fingerprint: None,
            metrics: None,
            kv_transfer_params: None,
        }
    }
}

/// Builds the whole answer.
pub struct ResponseBuilder {
    reply: CompletionReply,
    choices: Vec<(ChoiceState, ResponseChoice)>,
    cached_tokens: usize,
}

impl ResponseBuilder {
    pub fn new(reply: CompletionReply) -> Self {
        let choices = (0..reply.num_choices() as u32)
            .map(|index| {
                let prompt = reply.prompt(index);
                let choice = ResponseChoice {
                    index,
                    text: prompt
                        .filter(|_| reply.echo)
                        .map_or_else(String::new, |prompt| prompt.text.clone()),
                    logprobs: reply.logprobs.map(|_| CompletionLogprobs::default()),
                    token_ids: reply.options.return_token_ids.then(Vec::new),
                    prompt_token_ids: prompt
                        .filter(|_| reply.options.return_token_ids)
                        .map(|p| wire_ids(&p.ids)),
                    ..Default::default()
                };
                (ChoiceState::default(), choice)
            })
            .collect();
        Self {
            reply,
            choices,
            cached_tokens: 0,
        }
    }

    /// `delta.index` counts over all prompts.
    pub fn delta(&mut self, delta: TextDelta) {
        let Some((state, choice)) = self.choices.get_mut(delta.index as usize) else {
            return;
        };
        let is_first = !std::mem::replace(&mut state.begun, true);
        self.cached_tokens = self.cached_tokens.max(delta.num_cached_tokens);
        if let (Some(new), Some(all)) = (self.reply.logprobs(state, &delta, is_first), choice.logprobs.as_mut()) {
            all.text_offset.extend(new.text_offset);
            all.tokens.extend(new.tokens);
            all.token_logprobs.extend(new.token_logprobs);
            all.top_logprobs.extend(new.top_logprobs);
        }
        if let Some(positions) = delta.prompt_logprobs.as_ref().filter(|_| self.reply.prompt_logprobs) {
            choice.prompt_logprobs = Some(prompt_logprobs(positions));
        }
        if let Some((reason, stop_reason)) = self.reply.finish(&delta) {
            choice.finish_reason = Some(reason);
            choice.stop_reason = stop_reason;
        }
        state.completion_tokens += delta.token_ids.len();
        state.timing = delta.timing;
        if let Some(ids) = choice.token_ids.as_mut() {
            ids.extend(&delta.token_ids);
        }
        if !self.reply.prompt_only {
            choice.text.push_str(&delta.text);
        }
    }

    pub fn end(self) -> CompletionResponse {
        let Self {
            reply,
            choices,
            cached_tokens,
        } = self;
        let (states, choices): (Vec<_>, Vec<_>) = choices.into_iter().unzip();
        let usage = reply.counts(&states, cached_tokens).usage(&reply.options);
        let metrics = match (reply.options.request_metrics, states.as_slice()) {
            (true, [choice]) => Some(request_metrics(choice.timing, choice.completion_tokens)),
            _ => None,
        };
        CompletionResponse {
            id: reply.head.id,
            object: "text_completion",
            created: reply.head.created,
            model: reply.head.model,
            choices,
            service_tier: None,
            system_fingerprint: reply.head.fingerprint,
            usage,
            kv_transfer_params: None,
            ec_transfer_params: None,
            metrics,
        }
    }
}
