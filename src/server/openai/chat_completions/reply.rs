//! Events become chunks, or one whole response.

use std::sync::Arc;

use super::types::{
    ChatCompletionChunk, ChatCompletionResponse, ChatLogprobs, ChatMessage, ChunkChoice, DeltaFunctionCall,
    DeltaMessage, DeltaToolCall, FunctionCall, LogprobContent, ResponseChoice, ToolCall, TopLogprob,
};
use crate::chat::{self, ChatChoice, ChatDelta, ChatEvent, ChatFinish, RenderedChat};
use crate::engine::{EngineHandle, SequenceTiming};
use crate::server::ids;
use crate::server::openai::reply::{
    Counts, Head, REPETITION_DETECTED, ReplyOptions, listed_entries, request_metrics, stream_request_metrics, wire_ids,
};
use crate::server::openai::types::{StopReason, StreamUsage, prompt_logprobs, ranked, token_name, wire_logprob};
use crate::server::sse::{Frames, Framing};
use crate::step::TokenId;
use crate::text::TextLogprobs;

/// Before a tool call's id, whatever the protocol.
pub const TOOL_CALL_ID: &str = "chatcmpl-tool-";

/// What a chat reply contains beside its events.
#[derive(Clone, Debug)]
pub struct ChatReply {
    pub head: Head,
    pub options: ReplyOptions,
    /// The role of the answer.
    pub role: String,
    /// `top_logprobs` where logprobs were asked and may be shown.
    pub top_logprobs: Option<i64>,
    /// Choices.
    pub n: u32,
    /// `echo`: the last message's text, which the answer continues; empty where it was another role's.
    pub echo: Option<String>,
    pub prompt: Arc<[TokenId]>,
    /// The rendered conversation, where the request asked for it.
    pub prompt_text: Option<String>,
    pub return_prompt_text: bool,
    /// Prompt tokens that the prefix cache can hold.
    pub cacheable_tokens: usize,
}

impl ChatReply {
    /// Known once the conversation is rendered.
    pub fn set_prompt(&mut self, prompt: RenderedChat, engine: &EngineHandle) {
        self.cacheable_tokens = engine.num_cacheable_tokens(prompt.token_ids.len());
        self.prompt = prompt.token_ids;
        self.prompt_text = self.return_prompt_text.then_some(prompt.text);
    }

    pub fn logprobs(&self, tokens: &[TextLogprobs]) -> Option<ChatLogprobs> {
        let top = self.top_logprobs?;
        let content = tokens
            .iter()
            .map(|logprobs| self.logprob_content(logprobs, top))
            .collect();
        Some(ChatLogprobs { content: Some(content) })
    }

    fn logprob_content(&self, logprobs: &TextLogprobs, top: i64) -> LogprobContent {
        let name = |token| token_name(token, self.options.tokens_as_token_ids);
        let token = name(&logprobs.token);
        LogprobContent {
            bytes: Some(token.clone().into_bytes()),
            token,
            logprob: wire_logprob(logprobs.logprob),
            top_logprobs: ranked(logprobs)
                .take(listed_entries(top))
                .map(|(token, logprob, _)| {
                    let token = name(token);
                    TopLogprob {
                        bytes: Some(token.clone().into_bytes()),
                        token,
                        logprob: wire_logprob(logprob),
                    }
                })
                .collect(),
        }
    }
}

/// `finish_reason` and `stop_reason`.
fn wire_finish(finish: &ChatFinish) -> (&'static str, Option<StopReason>) {
    let stop = finish.stop.as_ref().map(|stop| match stop {
        chat::StopReason::Token(id) => StopReason::Token(*id),
        chat::StopReason::Text(text) => StopReason::Text(text.clone()),
        chat::StopReason::RepetitionDetected => StopReason::Text(REPETITION_DETECTED.to_owned()),
    });
    (finish.reason.as_str(), stop)
}

/// What is known of one choice while its events arrive.
#[derive(Clone, Copy, Debug, Default)]
struct ChoiceCounts {
    completion_tokens: usize,
    reasoning_tokens: usize,
    cached_tokens: usize,
    timing: Option<SequenceTiming>,
}

fn counts(reply: &ChatReply, choices: impl Iterator<Item = ChoiceCounts>) -> Counts {
    let mut counts = Counts {
        prompt_tokens: reply.prompt.len(),
        ..Counts::default()
    };
    for choice in choices {
        counts.completion_tokens += choice.completion_tokens;
        counts.reasoning_tokens += choice.reasoning_tokens;
        counts.cached_tokens = counts.cached_tokens.max(choice.cached_tokens);
    }
    counts.created_cache_tokens = Some(reply.cacheable_tokens.saturating_sub(counts.cached_tokens));
    counts
}

/// Builds the chunks of a streamed answer.
pub struct ChunkBuilder {
    reply: ChatReply,
    choices: Vec<ChoiceCounts>,
    begun: bool,
}

impl ChunkBuilder {
    pub fn new(reply: ChatReply) -> Self {
        let choices = vec![ChoiceCounts::default(); reply.n as usize];
        Self {
            reply,
            choices,
            begun: false,
        }
    }
}

impl Framing<ChatEvent> for ChunkBuilder {
    /// The chunks of one event; before the first come the role chunks.
    fn item(&mut self, event: &ChatEvent) -> Frames {
        let mut frames = Frames::default();
        if !self.begun {
            self.begun = true;
            self.push_role_chunks(&mut frames);
        }
        let Some(choice) = self.choices.get_mut(event.index as usize) else {
            return frames;
        };
        choice.completion_tokens += event.delta.token_ids.len();
        choice.reasoning_tokens = event.reasoning_tokens;
        choice.cached_tokens = choice.cached_tokens.max(event.delta.num_cached_tokens);
        choice.timing = event.delta.timing;

        let mut delta = delta_message(event.to_delta());
        let finish = event.finish.as_ref().map(wire_finish);
        let completion_tokens = choice.completion_tokens;
        let shows_tokens = self.reply.top_logprobs.is_some() || self.reply.options.return_token_ids;
        if delta.is_empty() {
            if finish.is_some() {
                delta.content = Some(Some(String::new()));
            } else if !shows_tokens || event.delta.token_ids.is_empty() {
                return frames;
            }
        }
        let is_last = finish.is_some();
        let mut chunk = self.chunk(vec![ChunkChoice {
            index: event.index,
            delta,
            logprobs: self.reply.logprobs(&event.delta.logprobs),
            finish_reason: finish.as_ref().map(|(reason, _)| *reason),
            stop_reason: finish.map(|(_, stop_reason)| stop_reason),
            token_ids: Some(
                self.reply
                    .options
                    .return_token_ids
                    .then(|| event.delta.token_ids.clone()),
            ),
            weight_versions: is_last.then_some(None),
        }]);
        chunk.usage = self.running_usage(completion_tokens);
        chunk.kv_transfer_params = Some(None);
        if is_last && !self.reply.options.include_usage {
            chunk.system_fingerprint = self.reply.head.fingerprint.clone();
        }
        frames.push(&chunk);
        frames
    }

    /// The usage, if it was asked.
    fn end(&mut self) -> Frames {
        let mut frames = Frames::default();
        if !self.reply.options.include_usage {
            return frames;
        }
        let usage = counts(&self.reply, self.choices.iter().copied()).usage(&self.reply.options);
        let mut chunk = self.chunk(Vec::new());
        chunk.usage = Some(usage.into());
        chunk.system_fingerprint = self.reply.head.fingerprint.clone();
        if let (true, [choice]) = (self.reply.options.request_metrics, self.choices.as_slice()) {
            chunk.metrics = Some(stream_request_metrics(choice.timing, choice.completion_tokens));
        }
        frames.push(&chunk);
        frames
    }
}

impl ChunkBuilder {
    fn push_role_chunks(&self, frames: &mut Frames) {
        for index in 0..self.reply.n {
            let delta = DeltaMessage {
                role: Some(self.reply.role.clone()),
                content: Some(Some(String::new())),
                ..Default::default()
            };
            let mut chunk = self.chunk(vec![plain_choice(index, delta)]);
            chunk.usage = self.running_usage(0);
            chunk.prompt_token_ids = Some(
                self.reply
                    .options
                    .return_token_ids
                    .then(|| wire_ids(&self.reply.prompt)),
            );
            chunk.prompt_text = Some(self.reply.prompt_text.clone());
            frames.push(&chunk);
        }
        let Some(echo) = self.reply.echo.as_ref().filter(|echo| !echo.is_empty()) else {
            return;
        };
        for index in 0..self.reply.n {
            let delta = DeltaMessage {
                content: Some(Some(echo.clone())),
                ..Default::default()
            };
            let mut chunk = self.chunk(vec![plain_choice(index, delta)]);
            chunk.usage = self.running_usage(0);
            frames.push(&chunk);
        }
    }

    fn running_usage(&self, completion_tokens: usize) -> Option<StreamUsage> {
        self.reply
            .options
            .continuous_usage
            .then(|| StreamUsage::running(self.reply.prompt.len(), completion_tokens))
    }

    fn chunk(&self, choices: Vec<ChunkChoice>) -> ChatCompletionChunk {
        ChatCompletionChunk {
            id: self.reply.head.id.clone(),
            object: "chat.completion.chunk",
            created: self.reply.head.created,
            model: self.reply.head.model.clone(),
            choices,
            usage: None,
            system_fingerprint: None,
            prompt_token_ids: None,
            prompt_text: None,
            metrics: None,
            kv_transfer_params: None,
        }
    }
}

fn plain_choice(index: u32, delta: DeltaMessage) -> ChunkChoice {
    ChunkChoice {
        index,
        delta,
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        token_ids: None,
        weight_versions: None,
    }
}

/// News of one event; a call that begins gets its id here.
fn delta_message(news: ChatDelta) -> DeltaMessage {
    let tool_calls: Vec<DeltaToolCall> = news
        .tool_calls
        .into_iter()
        .map(|call| DeltaToolCall {
            id: call.name.is_some().then(|| ids::prefixed(TOOL_CALL_ID)),
            r#type: call.name.is_some().then_some("function"),
            index: call.index,
            function: DeltaFunctionCall {
                name: call.name,
                arguments: Some(call.arguments),
            },
        })
        .collect();
    DeltaMessage {
        role: None,
        content: match news.content {
            Some(content) => Some(Some(content)),
            None => (!tool_calls.is_empty()).then_some(None),
        },
        reasoning_content: news.reasoning.clone(),
        reasoning: news.reasoning,
        tool_calls,
    }
}

/// The whole answer.
pub fn response(reply: ChatReply, choices: Vec<ChatChoice>) -> ChatCompletionResponse {
    let tokens = choices.iter().map(|choice| ChoiceCounts {
        completion_tokens: choice.token_ids.len(),
        reasoning_tokens: choice.reasoning_tokens,
        cached_tokens: choice.num_cached_tokens,
        timing: choice.timing,
    });
    let usage = counts(&reply, tokens).usage(&reply.options);
    let metrics = match (reply.options.request_metrics, choices.as_slice()) {
        (true, [choice]) => Some(request_metrics(choice.timing, choice.token_ids.len())),
        _ => None,
    };
    let positions = choices
        .first()
        .and_then(|choice| choice.prompt_logprobs.as_deref())
        .map(prompt_logprobs);
    let choices = choices
        .into_iter()
        .map(|choice| response_choice(&reply, choice))
        .collect();
    ChatCompletionResponse {
        choices,
        id: reply.head.id,
        object: "chat.completion",
        created: reply.head.created,
        model: reply.head.model,
        service_tier: None,
        system_fingerprint: reply.head.fingerprint,
        usage,
        prompt_logprobs: positions,
        prompt_token_ids: reply.options.return_token_ids.then(|| wire_ids(&reply.prompt)),
        prompt_text: reply.prompt_text,
        kv_transfer_params: None,
        ec_transfer_params: None,
        metrics,
    }
}

fn response_choice(reply: &ChatReply, choice: ChatChoice) -> ResponseChoice {
    let (finish_reason, stop_reason) = wire_finish(&choice.finish);
    let content = match &reply.echo {
        Some(echo) => Some(echo.clone() + choice.content.as_deref().unwrap_or_default()),
        None => choice.content,
    };
    let tool_calls = choice.tool_calls.into_iter().map(|call| ToolCall {
        id: ids::prefixed(TOOL_CALL_ID),
        r#type: "function",
        function: FunctionCall {
            name: call.name,
            arguments: call.arguments,
        },
    });
    ResponseChoice {
        index: choice.index,
        message: ChatMessage {
            role: reply.role.clone(),
            content,
            refusal: None,
            annotations: None,
            audio: None,
            function_call: None,
            tool_calls: tool_calls.collect(),
            reasoning_content: choice.reasoning.clone(),
            reasoning: choice.reasoning,
        },
        logprobs: reply.logprobs(&choice.logprobs),
        finish_reason: Some(finish_reason),
        stop_reason,
        token_ids: reply.options.return_token_ids.then_some(choice.token_ids),
        routed_experts: None,
        weight_versions: None,
    }
}
