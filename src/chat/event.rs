//! What an assistant's turn is made of: events as they come, and the choice they add up to.

use crate::engine::SequenceTiming;
use crate::parsers::{AssistantDelta, ToolBlock, ToolCall};
use crate::step::TokenId;
use crate::text::{TextDelta, TextFinish, TextLogprobs};

/// New pieces of one choice.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatEvent {
    /// `0..n`.
    pub index: u32,
    /// What the parsers made of the delta's text, in order; may be empty. Hidden reasoning is left out.
    pub parts: Vec<AssistantDelta>,
    /// The text delta that caused it (token ids, logprobs, finish).
    pub delta: TextDelta,
    /// Output tokens inside reasoning so far.
    pub reasoning_tokens: usize,
    /// Set on the choice's last event, as a stream reports it.
    pub finish: Option<ChatFinish>,
    /// The same on all events of a choice.
    pub parsing: Parsing,
}

/// What the text of a choice is searched for; decides how a collected message writes blank content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Parsing {
    /// Nothing: content is the text, empty or not.
    #[default]
    Plain,
    /// Reasoning: empty content is null.
    Reasoning,
    /// Tool calls: blank content is null.
    Tools,
    /// Calls that a grammar makes sure of: beside them content is empty, not null.
    RequiredCalls,
    /// The call of one function; it does not show in the finish reason.
    NamedCall,
}

/// The pieces of one event merged, as one chunk of a stream sends them. Absent and empty are told apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChatDelta {
    pub content: Option<String>,
    pub reasoning: Option<String>,
    /// By ascending index; at most one per call.
    pub tool_calls: Vec<ToolCallDelta>,
}

/// News of one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCallDelta {
    pub index: usize,
    /// Set when the call begins: this chunk gives it its id.
    pub name: Option<String>,
    /// JSON text; may be empty.
    pub arguments: String,
}

impl ChatEvent {
    /// What a stream sends for this event; nothing set when there is nothing new.
    pub fn to_delta(&self) -> ChatDelta {
        let mut out = ChatDelta::default();
        for part in &self.parts {
            match part {
                AssistantDelta::Content(text) => out.content.get_or_insert_default().push_str(text),
                AssistantDelta::Reasoning(text) => out.reasoning.get_or_insert_default().push_str(text),
                AssistantDelta::ToolCallStart { index, name } => {
                    out.call(*index).name = Some(name.clone());
                }
                AssistantDelta::ToolCallArguments { index, arguments } => out.call(*index).arguments += arguments,
                AssistantDelta::ToolBlock(block) => {
                    if let Some(text) = block.stream_content() {
                        out.content.get_or_insert_default().push_str(text);
                    }
                }
            }
        }
        out
    }
}

impl ChatDelta {
    /// True when there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.content.is_none() && self.reasoning.is_none() && self.tool_calls.is_empty()
    }

    /// Calls come one after the other, so only the last one can still grow.
    fn call(&mut self, index: usize) -> &mut ToolCallDelta {
        if self.tool_calls.last().is_none_or(|call| call.index != index) {
            self.tool_calls.push(ToolCallDelta {
                index,
                name: None,
                arguments: String::new(),
            });
        }
        let last = self.tool_calls.len() - 1;
        &mut self.tool_calls[last]
    }
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatFinish {
    pub reason: FinishReason,
    pub stop: Option<StopReason>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    Stop,
    Length,
    ToolCalls,
    Repetition,
    Abort,
}

/// What stopped the text when it was not EOS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    Token(TokenId),
    Text(String),
    RepetitionDetected,
}

impl ChatFinish {
    /// A choice that stopped by itself and carries calls finishes with `tool_calls`; one that was cut stays cut.
    pub fn new(finish: &TextFinish, has_calls: bool) -> Self {
        let stopped = if has_calls {
            FinishReason::ToolCalls
        } else {
            FinishReason::Stop
        };
        let (reason, stop) = match finish {
            TextFinish::Eos => (stopped, None),
            TextFinish::StopToken(id) => (stopped, Some(StopReason::Token(*id))),
            TextFinish::StopString(text) => (stopped, Some(StopReason::Text(text.clone()))),
            TextFinish::Length => (FinishReason::Length, None),
            TextFinish::Repetition => (FinishReason::Repetition, Some(StopReason::RepetitionDetected)),
            TextFinish::Abort => (FinishReason::Abort, None),
        };
        ChatFinish { reason, stop }
    }
}

impl FinishReason {
    /// As in `finish_reason`.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::ToolCalls => "tool_calls",
            FinishReason::Repetition => "repetition",
            FinishReason::Abort => "abort",
        }
    }
}

/// A whole choice: all its events added up. The body of a non-streaming answer is made of these and nothing else.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatChoice {
    /// `0..n`.
    pub index: u32,
    pub content: Option<String>,
    pub reasoning: Option<String>,
    pub tool_calls: Vec<ToolCall>,
    pub finish: ChatFinish,
    /// The stopping token included.
    pub token_ids: Vec<TokenId>,
    /// Parallel to `token_ids` when logprobs were asked.
    pub logprobs: Vec<TextLogprobs>,
    pub prompt_logprobs: Option<Vec<TextLogprobs>>,
    /// Prompt tokens that came from the prefix cache.
    pub num_cached_tokens: usize,
    /// Part of `token_ids`, markers excluded.
    pub reasoning_tokens: usize,
    pub timing: Option<SequenceTiming>,
}

/// Adds up the events of one choice.
#[derive(Default)]
pub(super) struct Collector {
    parsing: Parsing,
    /// Content before the block of calls; all of it when there is none.
    before: String,
    after: String,
    in_after: bool,
    reasoning: String,
    calls: Vec<ToolCall>,
    finish: Option<TextFinish>,
    delta: TextDelta,
    reasoning_tokens: usize,
}

impl Collector {
    pub fn add(&mut self, event: ChatEvent) {
        self.parsing = event.parsing;
        self.reasoning_tokens = event.reasoning_tokens;
        for part in event.parts {
            self.add_part(part);
        }
        let delta = event.delta;
        self.delta.index = event.index;
        self.delta.token_ids.extend(delta.token_ids);
        self.delta.logprobs.extend(delta.logprobs);
        self.delta.prompt_logprobs = self.delta.prompt_logprobs.take().or(delta.prompt_logprobs);
        self.delta.num_cached_tokens = self.delta.num_cached_tokens.max(delta.num_cached_tokens);
        self.delta.timing = delta.timing.or(self.delta.timing);
        self.finish = delta.finish.or(self.finish.take());
    }

    fn add_part(&mut self, part: AssistantDelta) {
        let content = if self.in_after {
            &mut self.after
        } else {
            &mut self.before
        };
        match part {
            AssistantDelta::Content(text) => content.push_str(&text),
            AssistantDelta::Reasoning(text) => self.reasoning.push_str(&text),
            AssistantDelta::ToolCallStart { name, .. } => self.calls.push(ToolCall {
                name,
                arguments: String::new(),
            }),
            AssistantDelta::ToolCallArguments { index, arguments } => {
                if let Some(call) = self.calls.get_mut(index) {
                    call.arguments.push_str(&arguments);
                }
            }
            AssistantDelta::ToolBlock(ToolBlock::Calls(calls)) => {
                self.calls = calls;
                self.in_after = true;
            }
            AssistantDelta::ToolBlock(ToolBlock::Invalid(raw) | ToolBlock::Cut(raw)) => {
                self.calls.clear();
                content.push_str(&raw);
            }
        }
    }

    /// `None` when the choice has not finished.
    pub fn finish(self) -> Option<ChatChoice> {
        let content = if self.in_after {
            // vLLM: the text on either side of the block, stripped.
            let sides = [strip(&self.before), strip(&self.after)];
            sides
                .into_iter()
                .filter(|side| !side.is_empty())
                .collect::<Vec<_>>()
                .join("\n")
        } else {
            self.before
        };
        let is_null = match self.parsing {
            Parsing::Plain => false,
            Parsing::Reasoning => content.is_empty(),
            Parsing::Tools => strip(&content).is_empty(),
            Parsing::RequiredCalls | Parsing::NamedCall => content.is_empty() && self.calls.is_empty(),
        };
        Some(ChatChoice {
            index: self.delta.index,
            content: (!is_null).then_some(content),
            reasoning: Some(self.reasoning).filter(|text| !text.is_empty()),
            finish: ChatFinish::new(
                &self.finish?,
                !self.calls.is_empty() && self.parsing != Parsing::NamedCall,
            ),
            tool_calls: self.calls,
            token_ids: self.delta.token_ids,
            logprobs: self.delta.logprobs,
            prompt_logprobs: self.delta.prompt_logprobs,
            num_cached_tokens: self.delta.num_cached_tokens,
            reasoning_tokens: self.reasoning_tokens,
            timing: self.delta.timing,
        })
    }
}

/// Python's `str.strip()`.
fn strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}
