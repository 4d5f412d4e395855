//! What the OpenAI-style endpoints share: the sampling fields of their requests, usage, prompt logprobs.

use serde::Serialize;
use serde::de::{Deserializer, Error};
use serde_json::{Map, Value, json};

use crate::server::field::{Choice, Field, StringOrList, TokenMap, Words, request_body};
use crate::text::{TextLogprobs, TokenText};

request_body! {
    /// Fields that `/v1/chat/completions` and `/v1/completions` have in common.
    pub struct SamplingFields {
        pub n: i64,
        pub stream: bool,
        pub stream_options: StreamOptions,
        pub max_tokens: i64,
        pub min_tokens: i64,
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
        pub logit_bias: TokenMap,
        pub allowed_token_ids: Vec<i64>,
        pub bad_words: Vec<String>,
        pub prompt_logprobs: i64,
        pub truncate_prompt_tokens: i64,
        pub truncation_side: Choice<TruncationSides>,
        pub priority: i64,
        pub request_id: String,
        pub cache_salt: String,
        pub return_token_ids: bool,
        pub return_tokens_as_token_ids: bool,

        pub response_format: Map<String, Value>,
        pub structured_outputs: StructuredOutputs,
        pub use_beam_search: bool,
        pub length_penalty: f64,
        pub repetition_detection: RepetitionFields,
        pub stream_interval: i64,

        // Refused unless they ask for nothing.
        pub watermarking: bool,
        pub return_weight_versions: bool,
        pub logprob_token_ids: Vec<i64>,
        pub thinking_token_budget: Value,

        // Without effect, here as on vLLM's generation endpoints: for proxies, connectors, plugins and render servers.
        pub user: String,
        pub session_id: String,
        pub kv_transfer_params: Map<String, Value>,
        pub ec_transfer_params: Map<String, Value>,
        pub vllm_xargs: ExtraArgs,
        pub routed_experts_prompt_start: i64,
        pub return_token_offsets: bool,
        pub mm_payload: Choice<MediaPayloads>,
        pub return_mm_kwargs: bool,
    }
}

request_body! {
    pub struct RepetitionFields {
        pub max_pattern_size: i64,
        pub min_pattern_size: i64,
        pub min_count: i64,
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MediaPayloads;
impl Words for MediaPayloads {
    const WORDS: &'static [&'static str] = &["tensors", "none"];
}

/// `vllm_xargs`: strings, numbers and lists of them, for plugins. There are none here, so only the shape is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtraArgs;

impl Field for ExtraArgs {
    fn schema() -> Value {
        json!({ "type": "object" })
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let is_scalar = |value: &Value| value.is_string() || value.is_number();
        let args = Map::<String, Value>::read(deserializer)?;
        let fits = args.values().all(|value| match value {
            Value::Array(items) => items.iter().all(is_scalar),
            value => is_scalar(value),
        });
        if fits {
            Ok(Self)
        } else {
            Err(D::Error::custom(
                "Input should be a valid string, number or list of them",
            ))
        }
    }
}

/// A JSON object whose values are strings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StringMap(pub Map<String, Value>);

impl Field for StringMap {
    fn schema() -> Value {
        json!({ "type": "object", "additionalProperties": { "type": "string" } })
    }

    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = Map::<String, Value>::read(deserializer)?;
        if map.values().all(Value::is_string) {
            Ok(Self(map))
        } else {
            Err(D::Error::custom("Input should be a valid string"))
        }
    }
}

request_body! {
    /// One of the first six, and how it is meant.
    pub struct StructuredOutputs {
        pub json: Value,
        pub regex: String,
        pub choice: Vec<String>,
        pub grammar: String,
        pub json_object: bool,
        pub structural_tag: Value,
        pub disable_any_whitespace: bool,
        pub disable_additional_properties: bool,
        pub whitespace_pattern: String,
    }
}

request_body! {
    pub struct StreamOptions {
        pub include_usage: bool,
        pub continuous_usage_stats: bool,
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TruncationSides;
impl Words for TruncationSides {
    const WORDS: &'static [&'static str] = &["left", "right"];
}

/// A key of a streamed chunk that may be absent, null, or set: chunks list the keys that vLLM sets, null or not.
pub type Key<T> = Option<Option<T>>;

/// `usage` of a whole response; null details stay.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub total_tokens: usize,
    pub completion_tokens: usize,
    pub prompt_tokens_details: Option<PromptTokensDetails>,
    pub completion_tokens_details: Option<CompletionTokensDetails>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PromptTokensDetails {
    pub cached_tokens: usize,
    /// Prompt tokens that were computed and can now be found in the prefix cache; completions do not say.
    pub created_cache_tokens: Option<usize>,
    pub multimodal_tokens: Option<Map<String, Value>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CompletionTokensDetails {
    pub reasoning_tokens: usize,
}

/// `usage` in a stream; null details are left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StreamUsage {
    pub prompt_tokens: usize,
    pub total_tokens: usize,
    pub completion_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_tokens_details: Option<StreamPromptTokensDetails>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_tokens_details: Option<CompletionTokensDetails>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StreamPromptTokensDetails {
    pub cached_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_cache_tokens: Option<usize>,
}

impl StreamUsage {
    /// The running counts of one chunk, without details.
    pub fn running(prompt_tokens: usize, completion_tokens: usize) -> Self {
        Self {
            prompt_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            completion_tokens,
            prompt_tokens_details: None,
            completion_tokens_details: None,
        }
    }
}

impl From<Usage> for StreamUsage {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            total_tokens: usage.total_tokens,
            completion_tokens: usage.completion_tokens,
            prompt_tokens_details: usage.prompt_tokens_details.map(|details| StreamPromptTokensDetails {
                cached_tokens: details.cached_tokens,
                created_cache_tokens: details.created_cache_tokens,
            }),
            completion_tokens_details: usage.completion_tokens_details,
        }
    }
}

/// `stop_reason`: a token id, a stop string, or null.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum StopReason {
    Token(u32),
    Text(String),
}

/// Smallest log-probability on the wire; JSON has no -inf.
pub const LOGPROB_FLOOR: f64 = -9999.0;

/// A log-probability as vLLM writes it: the f32 widened, floored.
pub fn wire_logprob(logprob: f32) -> f64 {
    let wide = f64::from(logprob);
    if wide.is_nan() {
        LOGPROB_FLOOR
    } else {
        wide.max(LOGPROB_FLOOR)
    }
}

/// The text of a token in a logprobs object.
pub fn token_name(token: &TokenText, as_token_id: bool) -> String {
    if as_token_id {
        format!("token_id:{}", token.id)
    } else {
        token.text.clone()
    }
}

/// The chosen token first, then the best alternatives that are not it.
pub fn ranked(logprobs: &TextLogprobs) -> impl Iterator<Item = (&TokenText, f32, u32)> {
    let chosen = logprobs.token.id;
    std::iter::once((&logprobs.token, logprobs.logprob, logprobs.rank)).chain(
        logprobs
            .top
            .iter()
            .filter(move |(token, ..)| token.id != chosen)
            .map(|(token, logprob, rank)| (token, *logprob, *rank)),
    )
}

#[derive(Serialize)]
struct PromptLogprob<'a> {
    logprob: f64,
    rank: u32,
    decoded_token: &'a str,
}

/// `prompt_logprobs`: null for the first token, then `{id: {logprob, rank, decoded_token}}`.
pub fn prompt_logprobs(positions: &[TextLogprobs]) -> Vec<Value> {
    let mut list = vec![Value::Null];
    list.extend(positions.iter().map(|position| {
        let entries = ranked(position).filter_map(|(token, logprob, rank)| {
            let entry = PromptLogprob {
                logprob: wire_logprob(logprob),
                rank,
                decoded_token: &token.text,
            };
            Some((token.id.to_string(), serde_json::to_value(entry).ok()?))
        });
        Value::Object(entries.collect())
    }));
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, text: &str) -> TokenText {
        TokenText {
            id,
            text: text.into(),
            bytes: text.into(),
        }
    }

    #[test]
    fn prompt_logprobs_start_with_null_and_list_the_token_first() {
        let position = TextLogprobs {
            token: token(7, "x"),
            logprob: -2.0,
            rank: 2,
            top: vec![(token(5, "y"), -0.5, 1), (token(7, "x"), -2.0, 2)],
        };
        assert_eq!(
            serde_json::to_string(&prompt_logprobs(&[position])).unwrap(),
            r#"[null,{"7":{"logprob":-2.0,"rank":2,"decoded_token":"x"},"5":{"logprob":-0.5,"rank":1,"decoded_token":"y"}}]"#
        );
    }

    #[test]
    fn logprobs_are_finite_on_the_wire() {
        assert_eq!(wire_logprob(f32::NEG_INFINITY), -9999.0);
        assert_eq!(wire_logprob(f32::NAN), -9999.0);
        assert_eq!(wire_logprob(-0.5), -0.5);
    }
}
