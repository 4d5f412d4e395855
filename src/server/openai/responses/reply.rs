//! Events of the chat become the events of a response, or one whole response.

use super::output::{
    ContentPart, Event, EventBody, IncompleteDetails, InputTokensDetails, OutputItem, OutputTokensDetails, Response,
    ResponseError, ResponseUsage, Status,
};
use crate::chat::{ChatChoice, ChatEvent, ChatFinish, FinishReason};
use crate::parsers::AssistantDelta;
use crate::server::error::ApiError;
use crate::server::ids;
use crate::server::openai::chat_completions::reply::ChatReply;
use crate::server::openai::chat_completions::types::LogprobContent;

const REASONING_ID: &str = "rs_";
const MESSAGE_ID: &str = "msg_";
const CALL_ITEM_ID: &str = "fc_";
/// What a client names when it returns a result.
const CALL_ID: &str = "call_";

/// Token counts of one answer.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    output_tokens: usize,
    cached_tokens: usize,
    reasoning_tokens: usize,
}

impl Counts {
    fn usage(self, reply: &ChatReply) -> ResponseUsage {
        let input_tokens = reply.prompt.len();
        ResponseUsage {
            input_tokens,
            input_tokens_details: InputTokensDetails {
                cached_tokens: self.cached_tokens,
                cache_write_tokens: reply.cacheable_tokens.saturating_sub(self.cached_tokens),
                input_tokens_per_turn: vec![input_tokens],
                cached_tokens_per_turn: vec![self.cached_tokens],
            },
            output_tokens: self.output_tokens,
            output_tokens_details: OutputTokensDetails {
                reasoning_tokens: self.reasoning_tokens,
                tool_output_tokens: 0,
                output_tokens_per_turn: vec![self.output_tokens],
                tool_output_tokens_per_turn: vec![0],
            },
            total_tokens: input_tokens + self.output_tokens,
        }
    }
}

fn set_finish(response: &mut Response, finish: &ChatFinish) {
    response.status = match finish.reason {
        FinishReason::Stop | FinishReason::ToolCalls | FinishReason::Repetition => Status::Completed,
        FinishReason::Length => Status::Incomplete,
        FinishReason::Abort => Status::Cancelled,
    };
    response.incomplete_details = (response.status == Status::Incomplete).then_some(IncompleteDetails {
        reason: "max_output_tokens",
    });
}

/// The whole response.
pub fn complete(mut response: Response, reply: &ChatReply, choice: ChatChoice) -> Response {
    set_finish(&mut response, &choice.finish);
    let counts = Counts {
        output_tokens: choice.token_ids.len(),
        cached_tokens: choice.num_cached_tokens,
        reasoning_tokens: choice.reasoning_tokens,
    };
    response.usage = Some(counts.usage(reply));
    let reasoning = choice
        .reasoning
        .map(|text| OutputItem::reasoning(&ids::prefixed(REASONING_ID), Some(&text)));
    let logprobs = reply.logprobs(&choice.logprobs).and_then(|logprobs| logprobs.content);
    let message = choice.content.filter(|text| !text.is_empty()).map(|text| {
        let part = ContentPart::text(&text, logprobs);
        OutputItem::message(&ids::prefixed(MESSAGE_ID), Some(part))
    });
    let calls = choice.tool_calls.into_iter().map(|call| {
        let (id, call_id) = (ids::prefixed(CALL_ITEM_ID), ids::prefixed(CALL_ID));
        OutputItem::function_call(&id, &call_id, &call.name, Some(&call.arguments))
    });
    response.output = reasoning.into_iter().chain(message).chain(calls).collect();
    response
}

/// The item that is being made.
#[derive(Debug)]
struct Open {
    id: String,
    kind: Kind,
    /// Its text or arguments so far.
    text: String,
    logprobs: Vec<LogprobContent>,
}

#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Message,
    FunctionCall { call_id: String, name: String },
}

/// Builds the events of a response; knows the response as far as they have come.
pub struct EventBuilder {
    response: Response,
    reply: ChatReply,
    sequence_number: u64,
    begun: bool,
    open: Option<Open>,
    /// Blank text that is sent only if more text follows: between reasoning and a call it is none.
    blank: String,
    counts: Counts,
}

impl EventBuilder {
    /// `response` is in progress and empty.
    pub fn new(response: Response, reply: ChatReply) -> Self {
        Self {
            response,
            reply,
            sequence_number: 0,
            begun: false,
            open: None,
            blank: String::new(),
            counts: Counts::default(),
        }
    }

    pub fn response(&self) -> &Response {
        &self.response
    }

    /// The first events are out.
    pub fn is_begun(&self) -> bool {
        self.begun
    }

    pub fn event(&mut self, event: &ChatEvent) -> Vec<Event> {
        let mut out = Vec::new();
        self.begin(&mut out);
        self.counts.output_tokens += event.delta.token_ids.len();
        self.counts.cached_tokens = self.counts.cached_tokens.max(event.delta.num_cached_tokens);
        self.counts.reasoning_tokens = event.reasoning_tokens;
        let mut logprobs = self
            .reply
            .logprobs(&event.delta.logprobs)
            .and_then(|logprobs| logprobs.content)
            .unwrap_or_default();
        for part in &event.parts {
            match part {
                AssistantDelta::Content(text) => self.text(text, &mut logprobs, &mut out),
                AssistantDelta::Reasoning(text) => self.reasoning(text, &mut out),
                AssistantDelta::ToolCallStart { name, .. } => self.call(name, &mut out),
                AssistantDelta::ToolCallArguments { arguments, .. } => self.arguments(arguments, &mut out),
                AssistantDelta::ToolBlock(block) => {
                    if let Some(text) = block.stream_content() {
                        self.text(text, &mut logprobs, &mut out);
                    }
                }
            }
        }
        if let Some(finish) = &event.finish {
            set_finish(&mut self.response, finish);
        }
        out
    }

    /// What follows the chat's last event.
    pub fn end(&mut self) -> Vec<Event> {
        let mut out = Vec::new();
        self.begin(&mut out);
        if self.response.output.is_empty() && self.open.is_none() && !self.blank.is_empty() {
            let blank = std::mem::take(&mut self.blank);
            self.text_delta(&blank, Vec::new(), &mut out);
        }
        self.close(&mut out);
        self.response.usage = Some(self.counts.usage(&self.reply));
        let response = Box::new(self.response.clone());
        let body = match response.status {
            Status::Completed => EventBody::Completed { response },
            _ => EventBody::Incomplete { response },
        };
        self.push(body, &mut out);
        out
    }

    /// The last event of a response that broke.
    pub fn failed(&mut self, error: &ApiError) -> Vec<Event> {
        let mut out = Vec::new();
        self.begin(&mut out);
        self.open = None;
        self.response.status = Status::Failed;
        self.response.error = Some(ResponseError {
            code: "server_error",
            message: error.message.clone(),
        });
        let response = Box::new(self.response.clone());
        self.push(EventBody::Failed { response }, &mut out);
        out
    }

    fn begin(&mut self, out: &mut Vec<Event>) {
        if self.begun {
            return;
        }
        self.begun = true;
        self.response.status = Status::InProgress;
        let response = Box::new(self.response.clone());
        self.push(
            EventBody::Created {
                response: response.clone(),
            },
            out,
        );
        self.push(EventBody::InProgress { response }, out);
    }

    fn push(&mut self, body: EventBody, out: &mut Vec<Event>) {
        out.push(Event {
            body,
            sequence_number: self.sequence_number,
        });
        self.sequence_number += 1;
    }

    /// The place of the open item, or of the next one.
    fn output_index(&self) -> usize {
        self.response.output.len()
    }

    fn reasoning(&mut self, text: &str, out: &mut Vec<Event>) {
        if text.is_empty() {
            return;
        }
        self.open(Kind::Reasoning, out);
        if let Some(open) = &mut self.open {
            open.text.push_str(text);
            let body = EventBody::ReasoningDelta {
                content_index: 0,
                delta: text.to_owned(),
                item_id: open.id.clone(),
                output_index: self.response.output.len(),
            };
            self.push(body, out);
        }
    }

    /// Takes the logprobs with the first text that is sent.
    fn text(&mut self, text: &str, logprobs: &mut Vec<LogprobContent>, out: &mut Vec<Event>) {
        if text.is_empty() {
            return;
        }
        let in_message = self.open.as_ref().is_some_and(|open| open.kind == Kind::Message);
        if !in_message && text.trim().is_empty() {
            self.blank.push_str(text);
            return;
        }
        let text = std::mem::take(&mut self.blank) + text;
        self.text_delta(&text, std::mem::take(logprobs), out);
    }

    fn text_delta(&mut self, text: &str, logprobs: Vec<LogprobContent>, out: &mut Vec<Event>) {
        self.open(Kind::Message, out);
        if let Some(open) = &mut self.open {
            open.text.push_str(text);
            open.logprobs.extend(logprobs.iter().cloned());
            let body = EventBody::TextDelta {
                content_index: 0,
                delta: text.to_owned(),
                item_id: open.id.clone(),
                logprobs,
                output_index: self.response.output.len(),
            };
            self.push(body, out);
        }
    }

    fn call(&mut self, name: &str, out: &mut Vec<Event>) {
        let kind = Kind::FunctionCall {
            call_id: ids::prefixed(CALL_ID),
            name: name.to_owned(),
        };
        self.open(kind, out);
    }

    fn arguments(&mut self, arguments: &str, out: &mut Vec<Event>) {
        let output_index = self.output_index();
        if let Some(open) = self.open.as_mut().filter(|_| !arguments.is_empty())
            && matches!(open.kind, Kind::FunctionCall { .. })
        {
            open.text.push_str(arguments);
            let body = EventBody::ArgumentsDelta {
                delta: arguments.to_owned(),
                item_id: open.id.clone(),
                output_index,
            };
            self.push(body, out);
        }
    }

    /// Makes an item of this kind the open one; every call is an item of its own.
    fn open(&mut self, kind: Kind, out: &mut Vec<Event>) {
        if self.open.as_ref().is_some_and(|open| open.kind == kind) {
            return;
        }
        self.close(out);
        if kind != Kind::Message {
            self.blank.clear();
        }
        let output_index = self.output_index();
        let (id, item, part) = match &kind {
            Kind::Reasoning => {
                let id = ids::prefixed(REASONING_ID);
                let item = OutputItem::reasoning(&id, None);
                (id, item, Some(ContentPart::reasoning("")))
            }
            Kind::Message => {
                let id = ids::prefixed(MESSAGE_ID);
                let item = OutputItem::message(&id, None);
                (id, item, Some(ContentPart::text("", Some(Vec::new()))))
            }
            Kind::FunctionCall { call_id, name } => {
                let id = ids::prefixed(CALL_ITEM_ID);
                let item = OutputItem::function_call(&id, call_id, name, None);
                (id, item, None)
            }
        };
        self.push(EventBody::ItemAdded { item, output_index }, out);
        if let Some(part) = part {
            let body = EventBody::PartAdded {
                content_index: 0,
                item_id: id.clone(),
                output_index,
                part,
            };
            self.push(body, out);
        }
        self.open = Some(Open {
            id,
            kind,
            text: String::new(),
            logprobs: Vec::new(),
        });
    }

    fn close(&mut self, out: &mut Vec<Event>) {
        let Some(open) = self.open.take() else { return };
        let output_index = self.output_index();
        let (item_id, text) = (open.id.clone(), open.text.clone());
        let (item, part) = match open.kind {
            Kind::Reasoning => {
                let done = EventBody::ReasoningDone {
                    content_index: 0,
                    item_id,
                    output_index,
                    text,
                };
                self.push(done, out);
                let item = OutputItem::reasoning(&open.id, Some(&open.text));
                (item, Some(ContentPart::reasoning(&open.text)))
            }
            Kind::Message => {
                let logprobs = self.reply.top_logprobs.map(|_| open.logprobs.clone());
                let done = EventBody::TextDone {
                    content_index: 0,
                    item_id,
                    logprobs: open.logprobs,
                    output_index,
                    text,
                };
                self.push(done, out);
                let part = ContentPart::text(&open.text, logprobs);
                (OutputItem::message(&open.id, Some(part.clone())), Some(part))
            }
            Kind::FunctionCall { call_id, name } => {
                let item = OutputItem::function_call(&open.id, &call_id, &name, Some(&open.text));
                let done = EventBody::ArgumentsDone {
                    arguments: text,
                    item_id,
                    name,
                    output_index,
                };
                self.push(done, out);
                (item, None)
            }
        };
        if let Some(part) = part {
            let body = EventBody::PartDone {
                content_index: 0,
                item_id: open.id,
                output_index,
                part,
            };
            self.push(body, out);
        }
        self.response.output.push(item.clone());
        self.push(EventBody::ItemDone { item, output_index }, out);
    }
}
