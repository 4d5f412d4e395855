//! `POST /generative_scoring`: how likely a label follows a query with each of several items.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use futures_util::future::try_join_all;
use serde_json::{Value, json};

use crate::server::body::JsonBody;
use crate::server::error::ApiError;
use crate::server::field::request_body;
use crate::server::openai::validate::check_cache_salt;
use crate::server::{App, blocking, ids};
use crate::step::{MAX_LOGPROBS, TokenId};
use crate::text::LabelRequest;

const MAX_ITEMS: usize = 1024;
const MAX_LABELS: usize = MAX_LOGPROBS;

request_body! {
    pub struct GenerativeScoringRequest {
        pub model: String,
        pub query: Value,
        pub items: Vec<Value>,
        pub label_token_ids: Vec<i64>,
        pub apply_softmax: bool,
        pub item_first: bool,
        pub add_special_tokens: bool,
        pub cache_salt: String,
        pub priority: i64,
        pub request_id: String,
    }
}

pub async fn score(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(mut body): JsonBody<GenerativeScoringRequest>,
) -> Result<Json<Value>, ApiError> {
    let model = app.model_name(body.model.as_deref())?.to_owned();
    let labels = labels(body.label_token_ids.take(), app.model.vocab_size)?;
    if let Some(salt) = &body.cache_salt {
        check_cache_salt(salt)?;
    }
    let id = format!(
        "generative-scoring-{}",
        ids::of_request(&headers, body.request_id.as_deref())
    );
    let (priority, cache_salt) = (body.priority.unwrap_or(0), body.cache_salt.clone());
    let among_labels = body.apply_softmax.unwrap_or(true);
    let building = app.clone();
    let prompts = blocking(move || prompts(body, &building)).await??;
    let prompt_tokens: usize = prompts.iter().map(Vec::len).sum();
    let completion_tokens = prompts.len();

    let mut running = Vec::with_capacity(prompts.len());
    for (i, prompt) in prompts.into_iter().enumerate() {
        running.push(app.text().label(LabelRequest {
            id: format!("{id}-{i}"),
            prompt: prompt.into(),
            labels: labels.clone(),
            among_labels,
            priority,
            cache_salt: cache_salt.clone(),
        })?);
    }
    let scores = try_join_all(running.into_iter().map(|prompt| prompt.probability())).await?;
    let data: Vec<Value> = scores
        .into_iter()
        .enumerate()
        .map(|(index, score)| json!({ "index": index, "object": "score", "score": f64::from(score) }))
        .collect();
    Ok(Json(json!({
        "id": id,
        "object": "list",
        "created": ids::unix_seconds(),
        "model": model,
        "data": data,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
            "prompt_tokens_details": null,
            "completion_tokens_details": null,
        },
    })))
}

fn labels(asked: Option<Vec<i64>>, vocab_size: usize) -> Result<Vec<TokenId>, ApiError> {
    let asked = asked.ok_or_else(|| ApiError::missing("label_token_ids"))?;
    if asked.is_empty() || asked.len() > MAX_LABELS {
        return Err(ApiError::invalid(
            "label_token_ids",
            format!("label_token_ids must contain from 1 to {MAX_LABELS} token ids."),
        ));
    }
    let inside = |id: i64| TokenId::try_from(id).ok().filter(|id| (*id as usize) < vocab_size);
    asked
        .into_iter()
        .map(|id| {
            inside(id).ok_or_else(|| {
                ApiError::invalid_value(
                    "label_token_ids",
                    format!("label_token_id {id} is out of vocabulary range [0, {vocab_size})."),
                    id,
                )
            })
        })
        .collect()
}

/// Query and item one after the other, cut to leave room for the label.
fn prompts(body: GenerativeScoringRequest, app: &App) -> Result<Vec<Vec<TokenId>>, ApiError> {
    let query = body.query.ok_or_else(|| ApiError::missing("query"))?;
    let items = body.items.ok_or_else(|| ApiError::missing("items"))?;
    if items.is_empty() || items.len() > MAX_ITEMS {
        return Err(ApiError::invalid(
            "items",
            format!("items must contain from 1 to {MAX_ITEMS} items."),
        ));
    }
    let query = ids_of("query", query, body.add_special_tokens.unwrap_or(true), app)?;
    let item_first = body.item_first.unwrap_or(false);
    items
        .into_iter()
        .map(|item| {
            let item = ids_of("items", item, false, app)?;
            let mut prompt = if item_first {
                [&item[..], &query].concat()
            } else {
                [&query[..], &item].concat()
            };
            prompt.truncate(app.model.max_model_len.saturating_sub(1));
            Ok(prompt)
        })
        .collect()
}

/// A text's ids, or the ids that stand for it.
fn ids_of(field: &str, value: Value, add_special_tokens: bool, app: &App) -> Result<Vec<TokenId>, ApiError> {
    let wrong = || ApiError::invalid(field, format!("{field} must be text or token ids"));
    match value {
        Value::String(text) => Ok(app.text().encode_prompt(&text, add_special_tokens)?),
        Value::Array(ids) => ids
            .iter()
            .map(|id| id.as_u64().and_then(|id| TokenId::try_from(id).ok()).ok_or_else(wrong))
            .collect(),
        _ => Err(wrong()),
    }
}
