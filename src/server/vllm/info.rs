//! What the server tells about itself.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};

use crate::server::App;
use crate::server::error::ApiError;
use crate::server::query::QueryParams;

/// `GET /server_info?config_format=text|json`.
pub async fn server_info(State(app): State<Arc<App>>, query: QueryParams) -> Result<Json<Value>, ApiError> {
    let as_json = query.one_of("config_format", &[("text", false), ("json", true)])?;
    let environment: Map<String, Value> = app
        .config
        .routes
        .environment
        .iter()
        .map(|(name, value)| (name.clone(), value.as_str().into()))
        .collect();
    Ok(Json(json!({
        "vllm_config": if as_json { app.info.config.clone() } else { app.info.text.as_str().into() },
        "vllm_env": environment,
        "system_env": app.info.system,
    })))
}

/// `GET /tokenizer_info`.
pub async fn tokenizer_info(State(app): State<Arc<App>>) -> Json<Value> {
    Json(app.info.tokenizer.clone())
}
