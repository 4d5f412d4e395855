//! `POST /v2/embed`: Cohere's shape of the same.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value, json};

use super::types::{CohereEmbedRequest, SharedFields};
use super::{Request, check_dimensions, config, finished, input, vectors};
use crate::server::App;
use crate::server::body::JsonBody;
use crate::server::error::ApiError;
use crate::server::openai::completions::types::Prompt;
use crate::step::TokenId;
use crate::text::Truncation;

pub async fn embed(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(body): JsonBody<CohereEmbedRequest>,
) -> Result<Json<Value>, ApiError> {
    let texts = texts(&body)?;
    if body.input_type.is_some() {
        return Err(ApiError::invalid(
            "input_type",
            "the model defines no prompts for input types",
        ));
    }
    let dimensions = check_dimensions(&app, "output_dimension", body.output_dimension)?;
    let fields = SharedFields {
        priority: body.priority,
        ..SharedFields::default()
    };
    let request = Request::new(&app, &headers, "embd-", body.model.as_deref(), &fields)?;
    let normalize = config(&app)?.normalize;
    let prompts = input::texts_and_ids(&app, texts.into_iter().map(Prompt::Text).collect(), true, true).await?;
    let prompts = cut(&app, &body, prompts)?;
    let input_tokens: usize = prompts.iter().map(|prompt| prompt.len()).sum();
    let vectors: Vec<Vec<f32>> = vectors(&app, &request, &prompts)
        .await?
        .into_iter()
        .map(|vector| finished(vector, dimensions, normalize))
        .collect();
    let mut answer = json!({ "id": request.id, "embeddings": embeddings(&body, &vectors)? });
    if let Some(texts) = &body.texts {
        answer["texts"] = json!(texts);
    }
    answer["meta"] = json!({
        "api_version": { "version": "2" },
        "billed_units": { "input_tokens": input_tokens, "image_tokens": 0 },
    });
    answer["response_type"] = "embeddings_by_type".into();
    Ok(Json(answer))
}

/// Of `texts`, or of `inputs` whose contents are texts.
fn texts(body: &CohereEmbedRequest) -> Result<Vec<String>, ApiError> {
    let not_text = |field: &str| ApiError::invalid(field, "the model is not a multimodal model");
    if body.images.is_some() {
        return Err(not_text("images"));
    }
    let given = [body.texts.is_some(), body.inputs.is_some()];
    if given.into_iter().filter(|given| *given).count() != 1 {
        return Err(ApiError::bad_request(
            "Exactly one of texts, images and inputs must be given",
        ));
    }
    let texts = match (&body.texts, &body.inputs) {
        (Some(texts), _) => texts.clone(),
        (None, inputs) => inputs
            .iter()
            .flatten()
            .map(|input| {
                let parts = input["content"]
                    .as_array()
                    .ok_or_else(|| ApiError::invalid("inputs", "an input has a list of contents"))?;
                let texts: Option<Vec<&str>> = parts.iter().map(|part| part["text"].as_str()).collect();
                texts.map(|texts| texts.join("\n")).ok_or_else(|| not_text("inputs"))
            })
            .collect::<Result<_, _>>()?,
    };
    if texts.is_empty() {
        return Err(ApiError::bad_request("At least one text must be given"));
    }
    Ok(texts)
}

/// `max_tokens`, else the context; `truncate` says which end goes, or that nothing may.
fn cut(app: &App, body: &CohereEmbedRequest, prompts: Vec<Vec<TokenId>>) -> Result<Vec<Arc<[TokenId]>>, ApiError> {
    let context = app.model.max_model_len;
    let max_tokens = match body.max_tokens {
        None => context,
        Some(asked) => match usize::try_from(asked) {
            Ok(asked) if asked > 0 => asked.min(context),
            _ => {
                return Err(ApiError::invalid_value(
                    "max_tokens",
                    "max_tokens must be at least 1",
                    asked,
                ));
            }
        },
    };
    let side = body.truncate.as_ref().map_or("END", |side| side.0.as_str());
    let truncation = Truncation {
        max_tokens,
        keep_end: side == "START",
    };
    prompts
        .into_iter()
        .map(|mut ids| {
            if side == "NONE" && ids.len() > max_tokens {
                return Err(ApiError::invalid_value(
                    "truncate",
                    format!("an input has {} tokens, more than {max_tokens}", ids.len()),
                    "NONE",
                ));
            }
            truncation.apply(&mut ids);
            Ok(ids.into())
        })
        .collect()
}

fn embeddings(body: &CohereEmbedRequest, vectors: &[Vec<f32>]) -> Result<Value, ApiError> {
    let types: Vec<&str> = match body.embedding_types.as_deref() {
        None | Some([]) => vec!["float"],
        Some(types) => types.iter().map(|word| word.0.as_str()).collect(),
    };
    if types.iter().any(|word| word.ends_with("binary")) && vectors.iter().any(|vector| vector.len() % 8 != 0) {
        return Err(ApiError::invalid(
            "embedding_types",
            "binary needs a dimension that is a multiple of 8",
        ));
    }
    let mut out = Map::new();
    for word in types {
        let encoded = match word {
            "binary" => json!(vectors.iter().map(|vector| signed(&signs(vector))).collect::<Vec<_>>()),
            "ubinary" => json!(vectors.iter().map(|vector| signs(vector)).collect::<Vec<_>>()),
            "base64" => json!(vectors.iter().map(|vector| base64(vector)).collect::<Vec<_>>()),
            _ => {
                let wide = |vector: &Vec<f32>| vector.iter().map(|value| f64::from(*value)).collect::<Vec<_>>();
                json!(vectors.iter().map(wide).collect::<Vec<_>>())
            }
        };
        out.insert(word.to_owned(), encoded);
    }
    Ok(Value::Object(out))
}

/// One bit per value, the first in the highest: whether it is positive.
fn signs(vector: &[f32]) -> Vec<u8> {
    let pack = |byte: u8, value: &f32| (byte << 1) | u8::from(*value > 0.0);
    vector.chunks(8).map(|eight| eight.iter().fold(0, pack)).collect()
}

fn signed(bytes: &[u8]) -> Vec<i16> {
    bytes.iter().map(|byte| i16::from(*byte) - 128).collect()
}

fn base64(vector: &[f32]) -> String {
    let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
    BASE64_STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_are_packed_from_the_highest_bit() {
        let vector = [1.0, -1.0, 0.0, 2.0, -3.0, -1.0, 0.5, 1.0];
        assert_eq!(signs(&vector), [0b1001_0011]);
        assert_eq!(signed(&signs(&vector)), [0b1001_0011 - 128]);
    }
}
