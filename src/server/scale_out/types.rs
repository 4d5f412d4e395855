//! The wire types of tokens in and tokens out: vLLM's fields, its order of keys.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::server::field::{Choice, Words, request_body};
use crate::server::openai::chat_completions::types::ChatLogprobs;
use crate::server::openai::types::{SamplingFields, StopReason, StreamOptions, Usage};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputModes;
impl Words for OutputModes {
    const WORDS: &'static [&'static str] = &["tokens", "text", "derender"];
}

request_body! {
    pub struct GenerateBody {
        pub request_id: String,
        pub token_ids: Vec<i64>,
        pub token_offsets: Value,
        pub features: Value,
        pub content_parts: Value,
        pub sampling_params: SamplingBody,
        pub model: String,
        pub reasoning_ended: bool,
        pub reasoning_parser_kwargs: Value,
        pub return_token_ids: bool,
        pub output_mode: Choice<OutputModes>,
        pub parse_context: Value,
        pub stream: bool,
        pub stream_options: StreamOptions,
        pub cache_salt: String,
        pub priority: i64,
        pub kv_transfer_params: Value,
        pub ec_transfer_params: Value,
    }
}

request_body! {
    /// vLLM's `SamplingParams`; what is not listed apart has the name it has in completions.
    pub struct SamplingBody {
        pub logprobs: i64,
        pub prompt_logprob_token_ids: Value,
        pub prompt_logprob_start: i64,
        pub flat_logprobs: bool,
        pub skip_reading_prefix_cache: bool,
        pub extra_args: Map<String, Value>,
        pub trace_decode_token_ids: Value,
        also fields: SamplingFields,
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct GenerateResponse {
    pub request_id: String,
    pub model: String,
    pub created: u64,
    pub usage: Usage,
    pub prompt_logprobs: Option<Vec<Value>>,
    pub prompt_token_id_logprobs: Option<String>,
    pub prompt_token_ids: Option<Vec<u32>>,
    pub mm_placeholders: Option<Value>,
    pub metrics: Option<Value>,
    pub kv_transfer_params: Option<Value>,
    pub ec_transfer_params: Option<Value>,
    pub output_mode: &'static str,
    pub choices: Vec<GenerateChoice>,
}

#[derive(Clone, Debug, Serialize)]
pub struct GenerateChoice {
    pub index: u32,
    pub finish_reason: Option<&'static str>,
    pub stop_reason: Option<StopReason>,
    pub token_ids: Option<Vec<u32>>,
    pub routed_experts: Option<String>,
    pub sampling_mask: Option<Value>,
    pub weight_versions: Option<Value>,
    /// Only with `output_mode` text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    pub logprobs: Option<ChoiceLogprobs>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum ChoiceLogprobs {
    Tokens { content: Vec<TokenLogprob> },
    Text(ChatLogprobs),
}

#[derive(Clone, Debug, Serialize)]
pub struct TokenLogprob {
    pub token_id: u32,
    pub logprob: f64,
    pub rank: Option<u32>,
    pub top_logprobs: Vec<TopTokenLogprob>,
}

#[derive(Clone, Debug, Serialize)]
pub struct TopTokenLogprob {
    pub token_id: u32,
    pub logprob: f64,
    pub rank: Option<u32>,
}

#[derive(Clone, Debug, Serialize)]
pub struct GenerateChunk {
    pub request_id: String,
    pub usage: Option<Usage>,
    pub prompt_token_ids: Option<Vec<u32>>,
    pub mm_placeholders: Option<Value>,
    pub metrics: Option<Value>,
    pub output_mode: &'static str,
    pub choices: Vec<GenerateChoice>,
}
