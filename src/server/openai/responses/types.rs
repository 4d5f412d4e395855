//! The request of `/v1/responses`: vLLM's fields. What the answer repeats is kept as it came.

use serde_json::{Map, Value};

use crate::server::field::{Choice, StringOrList, TextOrList, TokenMap, Words, request_body};
use crate::server::openai::types::{ExtraArgs, MediaPayloads, StructuredOutputs};

request_body! {
    pub struct ResponsesRequest {
        pub background: bool,
        pub include: Vec<Choice<Includes>>,
        pub input: TextOrList<Value>,
        pub instructions: String,
        pub max_output_tokens: i64,
        /// Of tools that run in the server; there are none.
        pub max_tool_calls: i64,
        pub metadata: Map<String, Value>,
        pub model: String,
        pub logit_bias: TokenMap,
        pub parallel_tool_calls: bool,
        pub previous_response_id: String,
        pub prompt: Map<String, Value>,
        pub reasoning: Map<String, Value>,
        pub include_reasoning: bool,
        pub service_tier: Choice<ServiceTiers>,
        pub store: bool,
        pub stream: bool,
        pub text: Map<String, Value>,
        pub tool_choice: Value,
        pub tools: Vec<Map<String, Value>>,
        pub top_logprobs: i64,
        pub truncation: Choice<Truncations>,
        pub user: String,
        pub prompt_cache_key: String,
        pub prompt_cache_options: Map<String, Value>,
        pub prompt_cache_retention: Choice<CacheRetentions>,
        pub safety_identifier: String,
        pub request_id: String,
        pub enable_response_messages: bool,
        pub previous_input_messages: Vec<Value>,
        pub chat_template_kwargs: Map<String, Value>,
        pub media_io_kwargs: Map<String, Value>,
        pub mm_processor_kwargs: Map<String, Value>,

        // Without effect: for proxies, connectors, plugins and render servers.
        pub session_id: String,
        pub kv_transfer_params: Map<String, Value>,
        pub ec_transfer_params: Map<String, Value>,
        pub vllm_xargs: ExtraArgs,
        pub mm_payload: Choice<MediaPayloads>,
        pub return_mm_kwargs: bool,
        also sampling: ResponsesSampling,
    }
}

request_body! {
    /// Fields that mean what they mean in a chat request.
    pub struct ResponsesSampling {
        pub temperature: f64,
        pub top_p: f64,
        pub top_k: i64,
        pub min_p: f64,
        pub presence_penalty: f64,
        pub frequency_penalty: f64,
        pub repetition_penalty: f64,
        pub seed: i64,
        pub stop: StringOrList,
        pub stop_token_ids: Vec<i64>,
        pub include_stop_str_in_output: bool,
        pub ignore_eos: bool,
        pub skip_special_tokens: bool,
        pub spaces_between_special_tokens: bool,
        pub priority: i64,
        pub cache_salt: String,
        pub watermarking: bool,
        pub structured_outputs: StructuredOutputs,
    }
}

request_body! {
    pub struct Reasoning {
        pub effort: Choice<super::super::chat_completions::types::ReasoningEfforts>,
        pub summary: Choice<Summaries>,
        pub generate_summary: Choice<Summaries>,
    }
}

request_body! {
    pub struct TextConfig {
        pub format: TextFormat,
        pub verbosity: Choice<Verbosities>,
    }
}

request_body! {
    pub struct TextFormat {
        pub r#type: Choice<TextFormatTypes>,
        pub name: String,
        pub schema: Map<String, Value>,
        pub strict: bool,
        pub description: String,
    }
}

request_body! {
    /// A function; tools of other types run in servers that have them.
    pub struct Tool {
        pub r#type: String,
        pub name: String,
        pub description: String,
        pub parameters: Map<String, Value>,
        pub strict: bool,
        pub defer_loading: bool,
    }
}

request_body! {
    /// A `tool_choice` that is no word.
    pub struct ToolChoiceObject {
        pub r#type: String,
        /// The function's.
        pub name: String,
        /// Of `allowed_tools`.
        pub mode: Choice<AllowedModes>,
        pub tools: Vec<AllowedTool>,
    }
}

request_body! {
    pub struct AllowedTool {
        pub r#type: String,
        pub name: String,
    }
}

request_body! {
    /// An item of `input`; which fields have a meaning is `type`'s to say.
    pub struct InputItem {
        pub r#type: String,
        pub role: Choice<Roles>,
        /// Of messages and reasoning.
        pub content: TextOrList<Value>,
        pub status: Choice<ItemStatuses>,
        pub call_id: String,
        pub name: String,
        pub namespace: String,
        pub arguments: String,
        pub output: TextOrList<Value>,
        pub summary: Vec<Map<String, Value>>,
        pub encrypted_content: String,
    }
}

macro_rules! words {
    ($($name:ident: $($word:literal)*;)*) => {
        $(
            #[derive(Clone, Debug, PartialEq, Eq)]
            pub struct $name;
            impl Words for $name {
                const WORDS: &'static [&'static str] = &[$($word),*];
            }
        )*
    };
}

words! {
    Includes: "code_interpreter_call.outputs" "computer_call_output.output.image_url" "file_search_call.results"
        "message.input_image.image_url" "message.output_text.logprobs" "reasoning.encrypted_content";
    ServiceTiers: "auto" "default" "flex" "scale" "priority";
    Truncations: "auto" "disabled";
    CacheRetentions: "in_memory" "24h";
    Summaries: "auto" "concise" "detailed";
    Verbosities: "low" "medium" "high";
    TextFormatTypes: "text" "json_schema" "json_object";
    AllowedModes: "auto" "required";
    Roles: "user" "assistant" "system" "developer";
    ItemStatuses: "in_progress" "completed" "incomplete";
}
