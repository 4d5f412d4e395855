//! The wire types of `/v1/completions`: vLLM's fields, its order of keys.

use std::fmt;

use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::server::field::{Field, request_body};
use crate::server::openai::types::{Key, SamplingFields, StopReason, StreamUsage, Usage};

request_body! {
    pub struct CompletionRequest {
        pub model: String,
        pub prompt: Prompts,
        pub prompt_embeds: Value,
        pub echo: bool,
        pub logprobs: i64,
        pub suffix: String,
        pub add_special_tokens: bool,
        also sampling: SamplingFields,
    }
}

/// One prompt or a batch of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompts(pub Vec<Prompt>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    Text(String),
    /// Ids above u32 are kept as `u32::MAX`, which no vocabulary has.
    Tokens(Vec<u32>),
}

/// An element of the `prompt` list.
enum PromptItem {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

fn token<E: de::Error>(id: i64) -> Result<u32, E> {
    if id < 0 {
        return Err(E::custom("Input should be greater than or equal to 0"));
    }
    Ok(u32::try_from(id).unwrap_or(u32::MAX))
}

impl<'de> Deserialize<'de> for PromptItem {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemVisitor;
        impl<'de> Visitor<'de> for ItemVisitor {
            type Value = PromptItem;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("Input should be a valid integer, string or list of integers")
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<PromptItem, E> {
                Ok(PromptItem::Text(value.to_owned()))
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<PromptItem, E> {
                token(value).map(PromptItem::Token)
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<PromptItem, E> {
                token(i64::try_from(value).unwrap_or(i64::MAX)).map(PromptItem::Token)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<PromptItem, A::Error> {
                let mut ids = Vec::new();
                while let Some(TokenItem(id)) = items.next_element()? {
                    ids.push(id);
                }
                Ok(PromptItem::Tokens(ids))
            }
        }
        deserializer.deserialize_any(ItemVisitor)
    }
}

struct TokenItem(u32);

impl<'de> Deserialize<'de> for TokenItem {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        token(i64::read(deserializer)?).map(TokenItem)
    }
}

impl Field for Prompts {
    fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptsVisitor;
        impl<'de> Visitor<'de> for PromptsVisitor {
            type Value = Prompts;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "Input should be a valid string, list of strings, list of integers or list of lists of integers",
                )
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<Prompts, E> {
                Ok(Prompts(vec![Prompt::Text(value.to_owned())]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Prompts, A::Error> {
                let mut prompts = Vec::new();
                let mut ids = Vec::new();
                while let Some(item) = items.next_element()? {
                    match item {
                        PromptItem::Token(id) => ids.push(id),
                        PromptItem::Text(text) => prompts.push(Prompt::Text(text)),
                        PromptItem::Tokens(ids) => prompts.push(Prompt::Tokens(ids)),
                    }
                    if !ids.is_empty() && !prompts.is_empty() {
                        return Err(de::Error::custom(
                            "Input should be a list of one kind: strings, integers or lists",
                        ));
                    }
                }
                if !ids.is_empty() {
                    prompts.push(Prompt::Tokens(ids));
                }
                Ok(Prompts(prompts))
            }
        }
        deserializer.deserialize_any(PromptsVisitor)
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct CompletionResponse {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ResponseChoice>,
    pub service_tier: Option<String>,
    pub system_fingerprint: Option<String>,
    pub usage: Usage,
    pub kv_transfer_params: Option<Value>,
    pub ec_transfer_params: Option<Value>,
    pub metrics: Option<Value>,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct ResponseChoice {
    pub index: u32,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    pub finish_reason: Option<&'static str>,
    pub stop_reason: Option<StopReason>,
    pub token_ids: Option<Vec<u32>>,
    pub prompt_logprobs: Option<Vec<Value>>,
    pub prompt_token_ids: Option<Vec<u32>>,
    pub routed_experts: Option<String>,
    pub weight_versions: Option<Value>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CompletionLogprobs {
    /// Characters of the choice's text before each token.
    pub text_offset: Vec<usize>,
    pub token_logprobs: Vec<Option<f64>>,
    pub tokens: Vec<String>,
    pub top_logprobs: Vec<Option<Map<String, Value>>>,
}

#[derive(Clone, Debug, Serialize)]
pub struct CompletionChunk {
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
    pub metrics: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_transfer_params: Key<Value>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ChunkChoice {
    pub index: u32,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    pub finish_reason: Option<&'static str>,
    pub stop_reason: Option<StopReason>,
    pub prompt_token_ids: Option<Vec<u32>>,
    pub token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_versions: Key<Value>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::body::parse;

    fn prompts(json: &str) -> Result<Vec<Prompt>, String> {
        let body: CompletionRequest =
            parse(format!("{{\"prompt\":{json}}}").as_bytes()).map_err(|error| error.param.unwrap_or_default())?;
        Ok(body.prompt.map(|prompts| prompts.0).unwrap_or_default())
    }

    #[test]
    fn prompts_come_in_four_shapes() {
        let text = |s: &str| Prompt::Text(s.into());
        assert_eq!(prompts(r#""a""#), Ok(vec![text("a")]));
        assert_eq!(prompts(r#"["a","b"]"#), Ok(vec![text("a"), text("b")]));
        assert_eq!(prompts("[1,2]"), Ok(vec![Prompt::Tokens(vec![1, 2])]));
        assert_eq!(
            prompts("[[1],[2,4294967296]]"),
            Ok(vec![Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, u32::MAX])])
        );
        assert_eq!(prompts("[]"), Ok(vec![]));
    }

    #[test]
    fn mixed_and_negative_prompts_are_refused_with_their_place() {
        assert_eq!(prompts(r#"[1,"a"]"#), Err("body.prompt".into()));
        assert_eq!(prompts("[1,-2]"), Err("body.prompt.1".into()));
        assert_eq!(prompts("[[1],[null]]"), Err("body.prompt.1.0".into()));
        assert_eq!(prompts("{}"), Err("body.prompt".into()));
    }
}
