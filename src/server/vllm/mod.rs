//! vLLM's own endpoints.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::App;
use crate::config::VLLM_VERSION;
use crate::engine::Health;

/// `GET /health`, `GET|POST /ping`: 503 once the engine is dead or a step has hung.
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

/// `GET /load`: 0, as vLLM answers without `--enable-server-load-tracking`.
pub async fn load() -> Json<Value> {
    Json(json!({ "server_load": 0 }))
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
