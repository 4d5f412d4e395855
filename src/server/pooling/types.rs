//! The wire types of the pooling endpoints: vLLM's fields, its order of keys.

use serde::Serialize;
use serde_json::{Map, Value};

use crate::server::field::{Choice, Words, request_body};
use crate::server::openai::completions::types::Prompts;
use crate::server::openai::types::{TruncationSides, Usage};

macro_rules! words {
    ($name:ident, $($word:literal),+) => {
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct $name;
        impl Words for $name {
            const WORDS: &'static [&'static str] = &[$($word),+];
        }
    };
}

words!(EncodingFormats, "float", "base64", "bytes", "bytes_only");
words!(EmbedTypes, "float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2");
words!(ByteOrders, "native", "big", "little");
words!(Paddings, "max_length", "do_not_pad");
words!(
    Tasks,
    "embed",
    "classify",
    "token_embed",
    "token_classify",
    "plugin",
    "embed&token_classify"
);
words!(CohereTruncations, "NONE", "START", "END");
words!(CohereTypes, "float", "binary", "ubinary", "base64");

request_body! {
    /// Fields that all pooling endpoints have.
    pub struct SharedFields {
        pub use_activation: bool,
        pub truncate_prompt_tokens: i64,
        pub truncation_side: Choice<TruncationSides>,
        pub padding: Choice<Paddings>,
        pub request_id: String,
        pub priority: i64,
        pub cache_salt: String,
        pub mm_processor_kwargs: Map<String, Value>,
        pub chat_template_kwargs: Map<String, Value>,
    }
}

request_body! {
    /// `/v1/embeddings` and `/pooling`: with `input` texts or token ids, else with `messages` one conversation or several.
    pub struct EmbeddingRequest {
        pub model: String,
        pub input: Prompts,
        pub messages: Vec<Value>,
        pub user: String,
        pub encoding_format: Choice<EncodingFormats>,
        pub embed_dtype: Choice<EmbedTypes>,
        pub endianness: Choice<ByteOrders>,
        pub dimensions: i64,
        pub task: Choice<Tasks>,
        pub add_special_tokens: bool,
        pub add_generation_prompt: bool,
        pub continue_final_message: bool,
        pub chat_template: String,
        pub media_io_kwargs: Map<String, Value>,
        also shared: SharedFields,
    }
}

request_body! {
    /// Pairs under any of vLLM's four names for them.
    pub struct ScoreRequest {
        pub model: String,
        pub user: String,
        pub queries: Value,
        pub documents: Value,
        pub items: Value,
        pub data_1: Value,
        pub data_2: Value,
        pub text_1: Value,
        pub text_2: Value,
        pub max_tokens_per_query: i64,
        pub max_tokens_per_doc: i64,
        pub instruction: String,
        also shared: SharedFields,
    }
}

request_body! {
    pub struct RerankRequest {
        pub model: String,
        pub user: String,
        pub query: Value,
        pub documents: Value,
        pub top_n: i64,
        pub max_tokens_per_query: i64,
        pub max_tokens_per_doc: i64,
        pub instruction: String,
        also shared: SharedFields,
    }
}

request_body! {
    /// `/v2/embed`.
    pub struct CohereEmbedRequest {
        pub model: String,
        pub input_type: String,
        pub texts: Vec<String>,
        pub images: Vec<String>,
        pub inputs: Vec<Value>,
        pub output_dimension: i64,
        pub embedding_types: Vec<Choice<CohereTypes>>,
        pub truncate: Choice<CohereTruncations>,
        pub max_tokens: i64,
        pub priority: i64,
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct EmbeddingResponse {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub data: Vec<EmbeddingData>,
    pub usage: Usage,
}

/// One vector: `embedding` on `/v1/embeddings`, `data` on `/pooling`.
#[derive(Clone, Debug, Serialize)]
pub struct EmbeddingData {
    pub index: usize,
    pub object: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding: Option<Encoded>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Encoded>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Encoded {
    /// Each f32 widened.
    Floats(Vec<f64>),
    Base64(String),
}

#[derive(Clone, Debug, Serialize)]
pub struct ScoreResponse {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub data: Vec<ScoreData>,
    pub usage: Usage,
}

#[derive(Clone, Debug, Serialize)]
pub struct ScoreData {
    pub index: usize,
    pub object: &'static str,
    pub score: f64,
}

#[derive(Clone, Debug, Serialize)]
pub struct RerankResponse {
    pub id: String,
    pub model: String,
    pub usage: RerankUsage,
    pub results: Vec<RerankResult>,
}

#[derive(Clone, Debug, Serialize)]
pub struct RerankUsage {
    pub prompt_tokens: usize,
    pub total_tokens: usize,
}

#[derive(Clone, Debug, Serialize)]
pub struct RerankResult {
    pub index: usize,
    pub document: RerankDocument,
    pub relevance_score: f64,
}

#[derive(Clone, Debug, Serialize)]
pub struct RerankDocument {
    pub text: String,
    pub multi_modal: Option<Value>,
}

/// Usage of what generates nothing.
pub fn prompt_usage(prompt_tokens: usize) -> Usage {
    Usage {
        prompt_tokens,
        total_tokens: prompt_tokens,
        ..Usage::default()
    }
}
