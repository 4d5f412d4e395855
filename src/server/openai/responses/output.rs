//! What `/v1/responses` answers: the response, its items and the events of a stream, with vLLM's keys.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::server::openai::chat_completions::types::LogprobContent;

#[derive(Clone, Debug, Serialize)]
pub struct Response {
    pub id: String,
    /// Seconds since 1970.
    pub created_at: u64,
    /// Why it failed; OpenAI's key, which vLLM leaves out.
    pub error: Option<ResponseError>,
    pub incomplete_details: Option<IncompleteDetails>,
    pub instructions: Option<String>,
    pub metadata: Option<Map<String, Value>>,
    pub model: String,
    pub object: &'static str,
    pub output: Vec<OutputItem>,
    pub parallel_tool_calls: bool,
    pub temperature: f32,
    pub tool_choice: Value,
    pub tools: Vec<Map<String, Value>>,
    pub top_p: f32,
    pub background: bool,
    /// What the answer may take, resolved.
    pub max_output_tokens: usize,
    pub max_tool_calls: Option<i64>,
    pub previous_response_id: Option<String>,
    pub prompt: Option<Value>,
    pub prompt_cache_options: Option<Map<String, Value>>,
    pub prompt_cache_key: Option<String>,
    pub prompt_cache_retention: Option<String>,
    pub reasoning: Option<Map<String, Value>>,
    pub safety_identifier: Option<String>,
    pub service_tier: String,
    pub status: Status,
    pub text: Option<Map<String, Value>>,
    pub top_logprobs: Option<i64>,
    pub truncation: String,
    pub usage: Option<ResponseUsage>,
    pub user: Option<String>,
    pub metrics: Option<Value>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub kv_transfer_params: Option<Value>,
    pub ec_transfer_params: Option<Value>,
    pub input_messages: Option<Value>,
    pub output_messages: Option<Value>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Queued,
    InProgress,
    Completed,
    Incomplete,
    Failed,
    Cancelled,
}

impl Status {
    /// The answer is still being made.
    pub fn is_running(self) -> bool {
        matches!(self, Status::Queued | Status::InProgress)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ResponseError {
    pub code: &'static str,
    pub message: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct IncompleteDetails {
    pub reason: &'static str,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ResponseUsage {
    pub input_tokens: usize,
    pub input_tokens_details: InputTokensDetails,
    pub output_tokens: usize,
    pub output_tokens_details: OutputTokensDetails,
    pub total_tokens: usize,
}

/// A response is one turn: lists have one entry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct InputTokensDetails {
    pub cached_tokens: usize,
    pub cache_write_tokens: usize,
    pub input_tokens_per_turn: Vec<usize>,
    pub cached_tokens_per_turn: Vec<usize>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct OutputTokensDetails {
    pub reasoning_tokens: usize,
    pub tool_output_tokens: usize,
    pub output_tokens_per_turn: Vec<usize>,
    pub tool_output_tokens_per_turn: Vec<usize>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputItem {
    Reasoning {
        id: String,
        summary: Vec<Value>,
        content: Option<Vec<ContentPart>>,
        encrypted_content: Option<String>,
        status: Option<ItemStatus>,
    },
    Message {
        id: String,
        content: Vec<ContentPart>,
        role: &'static str,
        status: ItemStatus,
        phase: Option<Value>,
    },
    FunctionCall {
        arguments: String,
        call_id: String,
        name: String,
        id: String,
        status: ItemStatus,
    },
}

impl OutputItem {
    /// `text` is none while the item is being made.
    pub fn reasoning(id: &str, text: Option<&str>) -> Self {
        OutputItem::Reasoning {
            id: id.to_owned(),
            summary: Vec::new(),
            content: text.map(|text| vec![ContentPart::reasoning(text)]),
            encrypted_content: None,
            status: Some(ItemStatus::of(text)),
        }
    }

    /// `part` is none while the item is being made.
    pub fn message(id: &str, part: Option<ContentPart>) -> Self {
        OutputItem::Message {
            id: id.to_owned(),
            status: ItemStatus::of(part.as_ref()),
            content: part.into_iter().collect(),
            role: "assistant",
            phase: None,
        }
    }

    /// `arguments` is none while the item is being made.
    pub fn function_call(id: &str, call_id: &str, name: &str, arguments: Option<&str>) -> Self {
        OutputItem::FunctionCall {
            arguments: arguments.unwrap_or_default().to_owned(),
            call_id: call_id.to_owned(),
            name: name.to_owned(),
            id: id.to_owned(),
            status: ItemStatus::of(arguments),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ItemStatus {
    InProgress,
    Completed,
}

impl ItemStatus {
    fn of<T>(whole: Option<T>) -> Self {
        match whole {
            Some(_) => ItemStatus::Completed,
            None => ItemStatus::InProgress,
        }
    }
}

#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ContentPart {
    OutputText {
        annotations: Vec<Value>,
        text: String,
        logprobs: Option<Vec<LogprobContent>>,
    },
    ReasoningText {
        text: String,
    },
}

impl ContentPart {
    pub fn text(text: &str, logprobs: Option<Vec<LogprobContent>>) -> Self {
        ContentPart::OutputText {
            annotations: Vec::new(),
            text: text.to_owned(),
            logprobs,
        }
    }

    pub fn reasoning(text: &str) -> Self {
        ContentPart::ReasoningText { text: text.to_owned() }
    }
}

/// An event with its place in the stream.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    #[serde(flatten)]
    pub body: EventBody,
    /// From 0.
    pub sequence_number: u64,
}

/// Items have one part each, so every `content_index` is 0.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "type")]
pub enum EventBody {
    #[serde(rename = "response.created")]
    Created { response: Box<Response> },
    #[serde(rename = "response.in_progress")]
    InProgress { response: Box<Response> },
    #[serde(rename = "response.completed")]
    Completed { response: Box<Response> },
    #[serde(rename = "response.incomplete")]
    Incomplete { response: Box<Response> },
    #[serde(rename = "response.failed")]
    Failed { response: Box<Response> },
    #[serde(rename = "response.output_item.added")]
    ItemAdded { item: OutputItem, output_index: usize },
    #[serde(rename = "response.output_item.done")]
    ItemDone { item: OutputItem, output_index: usize },
    #[serde(rename = "response.content_part.added")]
    PartAdded {
        content_index: usize,
        item_id: String,
        output_index: usize,
        part: ContentPart,
    },
    #[serde(rename = "response.content_part.done")]
    PartDone {
        content_index: usize,
        item_id: String,
        output_index: usize,
        part: ContentPart,
    },
    #[serde(rename = "response.reasoning_text.delta")]
    ReasoningDelta {
        content_index: usize,
        delta: String,
        item_id: String,
        output_index: usize,
    },
    #[serde(rename = "response.reasoning_text.done")]
    ReasoningDone {
        content_index: usize,
        item_id: String,
        output_index: usize,
        text: String,
    },
    #[serde(rename = "response.output_text.delta")]
    TextDelta {
        content_index: usize,
        delta: String,
        item_id: String,
        logprobs: Vec<LogprobContent>,
        output_index: usize,
    },
    #[serde(rename = "response.output_text.done")]
    TextDone {
        content_index: usize,
        item_id: String,
        logprobs: Vec<LogprobContent>,
        output_index: usize,
        text: String,
    },
    #[serde(rename = "response.function_call_arguments.delta")]
    ArgumentsDelta {
        delta: String,
        item_id: String,
        output_index: usize,
    },
    #[serde(rename = "response.function_call_arguments.done")]
    ArgumentsDone {
        arguments: String,
        item_id: String,
        name: String,
        output_index: usize,
    },
}

impl EventBody {
    /// The frame's name, which is the event's `type`.
    pub fn name(&self) -> &'static str {
        match self {
            EventBody::Created { .. } => "response.created",
            EventBody::InProgress { .. } => "response.in_progress",
            EventBody::Completed { .. } => "response.completed",
            EventBody::Incomplete { .. } => "response.incomplete",
            EventBody::Failed { .. } => "response.failed",
            EventBody::ItemAdded { .. } => "response.output_item.added",
            EventBody::ItemDone { .. } => "response.output_item.done",
            EventBody::PartAdded { .. } => "response.content_part.added",
            EventBody::PartDone { .. } => "response.content_part.done",
            EventBody::ReasoningDelta { .. } => "response.reasoning_text.delta",
            EventBody::ReasoningDone { .. } => "response.reasoning_text.done",
            EventBody::TextDelta { .. } => "response.output_text.delta",
            EventBody::TextDone { .. } => "response.output_text.done",
            EventBody::ArgumentsDelta { .. } => "response.function_call_arguments.delta",
            EventBody::ArgumentsDone { .. } => "response.function_call_arguments.done",
        }
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;

    /// In progress, and empty.
    pub fn response() -> Response {
        Response {
            id: "resp_1".into(),
            created_at: 0,
            error: None,
            incomplete_details: None,
            instructions: None,
            metadata: None,
            model: "m".into(),
            object: "response",
            output: Vec::new(),
            parallel_tool_calls: true,
            temperature: 1.0,
            tool_choice: "none".into(),
            tools: Vec::new(),
            top_p: 1.0,
            background: false,
            max_output_tokens: 1,
            max_tool_calls: None,
            previous_response_id: None,
            prompt: None,
            prompt_cache_options: None,
            prompt_cache_key: None,
            prompt_cache_retention: None,
            reasoning: None,
            safety_identifier: None,
            service_tier: "auto".into(),
            status: Status::InProgress,
            text: None,
            top_logprobs: None,
            truncation: "disabled".into(),
            usage: None,
            user: None,
            metrics: None,
            presence_penalty: None,
            frequency_penalty: None,
            kv_transfer_params: None,
            ec_transfer_params: None,
            input_messages: None,
            output_messages: None,
        }
    }
}
