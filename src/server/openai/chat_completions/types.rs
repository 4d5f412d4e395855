//! The wire types of `/v1/chat/completions`: vLLM's fields, its order of keys.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::server::field::{Choice, Words, request_body};
use crate::server::openai::types::{Key, SamplingFields, StopReason, StreamUsage, StringMap, Usage};

request_body! {
    pub struct ChatCompletionRequest {
        pub messages: Vec<Value>,
        pub model: String,
        pub logprobs: bool,
        pub top_logprobs: i64,
        pub max_completion_tokens: i64,
        pub tools: Vec<Value>,
        pub tool_choice: Value,
        pub parallel_tool_calls: bool,
        pub reasoning_effort: Choice<ReasoningEfforts>,
        pub include_reasoning: bool,
        pub echo: bool,
        pub add_generation_prompt: bool,
        pub continue_final_message: bool,
        pub add_special_tokens: bool,
        pub documents: Vec<StringMap>,
        pub chat_template: String,
        pub chat_template_kwargs: Map<String, Value>,
        pub media_io_kwargs: Map<String, Value>,
        pub mm_processor_kwargs: Map<String, Value>,
        pub return_prompt_text: bool,
        also sampling: SamplingFields,
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReasoningEfforts;
impl Words for ReasoningEfforts {
    const WORDS: &'static [&'static str] = &["none", "minimal", "low", "medium", "high", "xhigh", "max"];
}

#[derive(Clone, Debug, Serialize)]
pub struct ChatCompletionResponse {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ResponseChoice>,
    pub service_tier: Option<String>,
    pub system_fingerprint: Option<String>,
    pub usage: Usage,
    pub prompt_logprobs: Option<Vec<Value>>,
    pub prompt_token_ids: Option<Vec<u32>>,
    pub prompt_text: Option<String>,
    pub kv_transfer_params: Option<Value>,
    pub ec_transfer_params: Option<Value>,
    pub metrics: Option<Value>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ResponseChoice {
    pub index: u32,
    pub message: ChatMessage,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
    pub stop_reason: Option<StopReason>,
    pub token_ids: Option<Vec<u32>>,
    pub routed_experts: Option<String>,
    pub weight_versions: Option<Value>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ChatMessage {
    pub role: String,
    pub content: Option<String>,
    pub refusal: Option<String>,
    pub annotations: Option<Value>,
    pub audio: Option<Value>,
    pub function_call: Option<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    pub reasoning: Option<String>,
    /// The name before vLLM 0.16; some clients read only this one. Differs from vLLM, which sends only `reasoning`.
    pub reasoning_content: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ToolCall {
    pub id: String,
    pub r#type: &'static str,
    pub function: FunctionCall,
}

#[derive(Clone, Debug, Serialize)]
pub struct FunctionCall {
    pub name: String,
    pub arguments: String,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct ChatLogprobs {
    pub content: Option<Vec<LogprobContent>>,
}

#[derive(Clone, Debug, Serialize)]
pub struct LogprobContent {
    pub token: String,
    pub logprob: f64,
    pub bytes: Option<Vec<u8>>,
    pub top_logprobs: Vec<TopLogprob>,
}

#[derive(Clone, Debug, Serialize)]
pub struct TopLogprob {
    pub token: String,
    pub logprob: f64,
    pub bytes: Option<Vec<u8>>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ChatCompletionChunk {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<StreamUsage>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_fingerprint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Key<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_text: Key<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_transfer_params: Key<Value>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ChunkChoice {
    pub index: u32,
    pub delta: DeltaMessage,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Key<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Key<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_versions: Key<Value>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeltaMessage {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Key<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// As in [`ChatMessage`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<DeltaToolCall>,
}

impl DeltaMessage {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The first delta of a call has an id, a type and a name; later ones have `id: null` and more arguments.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeltaToolCall {
    pub id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r#type: Option<&'static str>,
    pub index: usize,
    pub function: DeltaFunctionCall,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeltaFunctionCall {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arguments: Option<String>,
}
