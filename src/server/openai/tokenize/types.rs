//! The wire types of `/tokenize` and `/detokenize`.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::server::field::request_body;

request_body! {
    /// With `prompt` a text, else with `messages` a conversation.
    pub struct TokenizeRequest {
        pub model: String,
        pub prompt: String,
        pub messages: Vec<Value>,
        pub add_special_tokens: bool,
        pub return_token_strs: bool,
        pub add_generation_prompt: bool,
        pub continue_final_message: bool,
        pub chat_template: String,
        pub chat_template_kwargs: Map<String, Value>,
        pub media_io_kwargs: Map<String, Value>,
        pub mm_processor_kwargs: Map<String, Value>,
        pub tools: Vec<Value>,
    }
}

request_body! {
    pub struct DetokenizeRequest {
        pub model: String,
        pub tokens: Vec<i64>,
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct TokenizeResponse {
    pub count: usize,
    pub max_model_len: usize,
    pub tokens: Vec<u32>,
    pub token_strs: Option<Vec<String>>,
}

#[derive(Clone, Debug, Serialize)]
pub struct DetokenizeResponse {
    pub prompt: String,
}
