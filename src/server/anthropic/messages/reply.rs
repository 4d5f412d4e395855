//! Events become Anthropic's events, or one whole message.

use serde_json::{Map, Value};

use super::types::{Block, BlockDelta, MessageDelta, MessageResponse, StreamEvent, Usage};
use crate::chat::{ChatChoice, ChatEvent, ChatFinish, FinishReason, StopReason};
use crate::parsers::AssistantDelta;
use crate::server::error::{AnthropicError, ApiError};
use crate::server::ids;
use crate::server::openai::chat_completions::reply::{ChatReply, TOOL_CALL_ID};
use crate::server::openai::reply::Head;
use crate::server::sse::{Frames, Framing};

/// What a message contains beside its events.
#[derive(Clone, Debug)]
pub struct MessageReply {
    head: Head,
    prompt_tokens: usize,
    /// Prompt tokens that the prefix cache can hold.
    cacheable_tokens: usize,
    /// `--enable-prompt-tokens-details`.
    prompt_details: bool,
}

impl MessageReply {
    pub fn new(reply: ChatReply) -> Self {
        Self {
            prompt_tokens: reply.prompt.len(),
            cacheable_tokens: reply.cacheable_tokens,
            prompt_details: reply.options.prompt_details,
            head: reply.head,
        }
    }

    /// Anthropic counts what the cache gave and what it took apart from the input.
    fn usage(&self, output_tokens: usize, cached_tokens: usize) -> Usage {
        if !self.prompt_details {
            return Usage {
                input_tokens: self.prompt_tokens,
                output_tokens,
                ..Usage::default()
            };
        }
        let created_tokens = self.cacheable_tokens.saturating_sub(cached_tokens);
        Usage {
            input_tokens: self.prompt_tokens.saturating_sub(cached_tokens + created_tokens),
            output_tokens,
            cache_creation_input_tokens: Some(created_tokens),
            cache_read_input_tokens: Some(cached_tokens),
        }
    }

    fn message(&self, content: Vec<Block>, stop: MessageDelta, usage: Usage) -> MessageResponse {
        MessageResponse {
            id: self.head.id.clone(),
            r#type: "message",
            role: "assistant",
            content,
            model: self.head.model.clone(),
            stop_reason: stop.stop_reason,
            stop_sequence: stop.stop_sequence,
            usage,
        }
    }
}

/// Not ended: `message_start`. Answers that end in a way that Anthropic has no word for have no reason either.
const NO_REASON: MessageDelta = MessageDelta {
    stop_reason: None,
    stop_sequence: None,
};

/// `has_calls`: a forced tool's call is one too, though a chat that makes it just stops.
fn stop(finish: &ChatFinish, has_calls: bool) -> MessageDelta {
    let because = |stop_reason| MessageDelta {
        stop_reason: Some(stop_reason),
        stop_sequence: None,
    };
    match (finish.reason, &finish.stop) {
        (FinishReason::Stop, Some(StopReason::Text(text))) => MessageDelta {
            stop_sequence: Some(text.clone()),
            ..because("stop_sequence")
        },
        (FinishReason::ToolCalls, _) => because("tool_use"),
        (FinishReason::Stop, _) if has_calls => because("tool_use"),
        (FinishReason::Stop, _) => because("end_turn"),
        (FinishReason::Length, _) => because("max_tokens"),
        (FinishReason::Repetition | FinishReason::Abort, _) => NO_REASON,
    }
}

/// Nobody checks it; clients send it back with the block.
fn signature() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

fn empty_text() -> Block {
    Block::Text { text: String::new() }
}

/// The whole message.
pub fn message(reply: &MessageReply, choice: ChatChoice) -> MessageResponse {
    let stop = stop(&choice.finish, !choice.tool_calls.is_empty());
    let usage = reply.usage(choice.token_ids.len(), choice.num_cached_tokens);
    let thinking = choice.reasoning.map(|thinking| Block::Thinking {
        thinking,
        signature: signature(),
    });
    let text = choice.content.filter(|text| !text.is_empty());
    let calls = choice.tool_calls.into_iter().map(|call| Block::ToolUse {
        id: ids::prefixed(TOOL_CALL_ID),
        name: call.name,
        // An answer that was cut may hold half a call.
        input: serde_json::from_str(&call.arguments).unwrap_or_else(|_| Value::Object(Map::new())),
    });
    let mut content: Vec<Block> = thinking
        .into_iter()
        .chain(text.map(|text| Block::Text { text }))
        .chain(calls)
        .collect();
    if content.is_empty() {
        content.push(empty_text());
    }
    reply.message(content, stop, usage)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BlockKind {
    Text,
    ToolUse,
    Thinking,
}

/// Builds the events of a streamed message.
pub struct EventBuilder {
    reply: MessageReply,
    begun: bool,
    open: Option<BlockKind>,
    /// The open block's, or the next one's.
    index: usize,
    has_calls: bool,
    output_tokens: usize,
    cached_tokens: usize,
    stop: MessageDelta,
}

impl EventBuilder {
    pub fn new(reply: MessageReply) -> Self {
        Self {
            reply,
            begun: false,
            open: None,
            index: 0,
            has_calls: false,
            output_tokens: 0,
            cached_tokens: 0,
            stop: NO_REASON,
        }
    }

    fn start(&mut self, frames: &mut Frames) {
        if self.begun {
            return;
        }
        self.begun = true;
        // As in vLLM, what came from the cache is told at the end.
        let usage = Usage {
            input_tokens: self.reply.prompt_tokens,
            ..Usage::default()
        };
        let message = self.reply.message(Vec::new(), NO_REASON, usage);
        push(frames, &StreamEvent::MessageStart { message });
    }

    fn part(&mut self, part: &AssistantDelta, frames: &mut Frames) {
        match part {
            AssistantDelta::Content(text) => self.text(text, frames),
            AssistantDelta::Reasoning(thinking) if !thinking.is_empty() => {
                self.block(
                    BlockKind::Thinking,
                    || Block::Thinking {
                        thinking: String::new(),
                        signature: String::new(),
                    },
                    frames,
                );
                let thinking = thinking.clone();
                self.delta(BlockDelta::ThinkingDelta { thinking }, frames);
            }
            AssistantDelta::Reasoning(_) => {}
            AssistantDelta::ToolCallStart { name, .. } => {
                self.close(frames);
                self.has_calls = true;
                let call = || Block::ToolUse {
                    id: ids::prefixed(TOOL_CALL_ID),
                    name: name.clone(),
                    input: Value::Object(Map::new()),
                };
                self.block(BlockKind::ToolUse, call, frames);
            }
            AssistantDelta::ToolCallArguments { arguments, .. } => {
                if self.open == Some(BlockKind::ToolUse) && !arguments.is_empty() {
                    let partial_json = arguments.clone();
                    self.delta(BlockDelta::InputJsonDelta { partial_json }, frames);
                }
            }
            AssistantDelta::ToolBlock(block) => {
                if let Some(text) = block.stream_content() {
                    self.text(text, frames);
                }
            }
        }
    }

    fn text(&mut self, text: &str, frames: &mut Frames) {
        if !text.is_empty() {
            self.block(BlockKind::Text, empty_text, frames);
            let text = text.to_owned();
            self.delta(BlockDelta::TextDelta { text }, frames);
        }
    }

    /// Makes a block of this kind the open one.
    fn block(&mut self, kind: BlockKind, empty: impl FnOnce() -> Block, frames: &mut Frames) {
        if self.open == Some(kind) {
            return;
        }
        self.close(frames);
        self.open = Some(kind);
        let (content_block, index) = (empty(), self.index);
        push(frames, &StreamEvent::ContentBlockStart { content_block, index });
    }

    fn delta(&self, delta: BlockDelta, frames: &mut Frames) {
        let index = self.index;
        push(frames, &StreamEvent::ContentBlockDelta { delta, index });
    }

    fn close(&mut self, frames: &mut Frames) {
        let Some(kind) = self.open.take() else { return };
        if kind == BlockKind::Thinking {
            let signature = signature();
            self.delta(BlockDelta::SignatureDelta { signature }, frames);
        }
        push(frames, &StreamEvent::ContentBlockStop { index: self.index });
        self.index += 1;
    }
}

impl Framing<ChatEvent> for EventBuilder {
    fn item(&mut self, event: &ChatEvent) -> Frames {
        let mut frames = Frames::default();
        self.start(&mut frames);
        self.output_tokens += event.delta.token_ids.len();
        self.cached_tokens = self.cached_tokens.max(event.delta.num_cached_tokens);
        for part in &event.parts {
            self.part(part, &mut frames);
        }
        if let Some(finish) = &event.finish {
            self.stop = stop(finish, self.has_calls);
        }
        frames
    }

    fn end(&mut self) -> Frames {
        let mut frames = Frames::default();
        self.start(&mut frames);
        if self.index == 0 && self.open.is_none() {
            self.block(BlockKind::Text, empty_text, &mut frames);
        }
        self.close(&mut frames);
        let delta = StreamEvent::MessageDelta {
            delta: self.stop.clone(),
            usage: self.reply.usage(self.output_tokens, self.cached_tokens),
        };
        push(&mut frames, &delta);
        push(&mut frames, &StreamEvent::MessageStop);
        frames
    }

    fn failed(&mut self, error: ApiError) -> Result<Frames, ApiError> {
        let mut frames = Frames::default();
        frames.push_named("error", &AnthropicError(error).to_value());
        Ok(frames)
    }
}

fn push(frames: &mut Frames, event: &StreamEvent) {
    frames.push_named(event.name(), event);
}
