//! vLLM's own endpoints.

pub mod control;
pub mod docs;
pub mod generative_scoring;
pub mod info;
pub mod invocations;
pub mod lora;
pub mod rl;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::App;
use super::error::ApiError;
use crate::config::VLLM_VERSION;
use crate::engine::Health;

/// `GET /health`, `GET|POST /ping`: 503 once the engine is dead, or has work and makes no progress.
pub async fn health(State(app): State<Arc<App>>) -> StatusCode {
    match app.engine().health() {
        Health::Healthy => StatusCode::OK,
        Health::Stalled(_) | Health::Stopped(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// `GET /version`: the vLLM release whose API this is, and our own.
pub async fn version() -> Json<Value> {
    Json(json!({ "version": VLLM_VERSION, "rvllm_version": env!("CARGO_PKG_VERSION") }))
}

/// `GET /load`: inference requests in flight; 0 without `--enable-server-load-tracking`.
pub async fn load(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({ "server_load": app.load.current() }))
}

/// `POST /v1/systemone`, `POST /v1/decisions`.
pub async fn no_decisions() -> ApiError {
    ApiError::not_implemented("The model does not support structured decisions")
}

/// `GET /kv_event_sources`: no publishers.
pub async fn kv_event_sources() -> Json<Value> {
    Json(json!({}))
}

/// `GET /metrics` and everything below it.
pub async fn metrics(State(app): State<Arc<App>>, uri: Uri) -> Response {
    let content_type = match uri.path() {
        "/metrics" => "text/plain; version=1.0.0; charset=utf-8",
        _ => "text/plain; version=0.0.4; charset=utf-8",
    };
    (
        [(header::CONTENT_TYPE, HeaderValue::from_static(content_type))],
        app.metrics.render(),
    )
        .into_response()
}
