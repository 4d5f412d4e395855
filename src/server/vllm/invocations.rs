//! `POST /invocations`, SageMaker's only route: the body says which endpoint is meant.

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::server::App;
use crate::server::body::{JsonBody, parse_value};
use crate::server::error::ApiError;
use crate::server::openai::{chat_completions, completions};
use crate::server::pooling::{embeddings, score};

/// Names the model, as the adapter that it is elsewhere.
const ADAPTER: &str = "x-amzn-sagemaker-adapter-identifier";

pub async fn invoke(
    state: State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(mut body): JsonBody<Map<String, Value>>,
) -> Result<Response, ApiError> {
    if let Some(adapter) = headers.get(ADAPTER).and_then(|value| value.to_str().ok()) {
        body.insert("model".to_owned(), adapter.into());
    }
    let has = |field: &str| body.get(field).is_some_and(|value| !value.is_null());
    let pools = state.0.model.pooling.is_some();
    if !pools && has("messages") {
        return chat_completions::create(state, headers, read(body)?).await;
    }
    if !pools && (has("prompt") || has("prompt_embeds")) {
        return completions::create(state, headers, read(body)?).await;
    }
    if pools && (has("input") || has("messages")) {
        return embeddings::embeddings(state, headers, read(body)?).await;
    }
    if pools && has("query") {
        return Ok(score::rerank(state, headers, read(body)?).await?.into_response());
    }
    if pools && ["queries", "text_1", "data_1"].into_iter().any(has) {
        return Ok(score::score(state, headers, read(body)?).await?.into_response());
    }
    let expected = if pools {
        "['EmbeddingRequest', 'ScoreRequest', 'RerankRequest']"
    } else {
        "['ChatCompletionRequest', 'CompletionRequest']"
    };
    Err(ApiError::bad_request(format!(
        "Cannot find suitable handler for request. Expected one of: {expected}"
    )))
}

fn read<T: DeserializeOwned>(body: Map<String, Value>) -> Result<JsonBody<T>, ApiError> {
    parse_value(Value::Object(body), &[]).map(JsonBody)
}
