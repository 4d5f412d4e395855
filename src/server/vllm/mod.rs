//! vLLM's own endpoints.

use axum::Json;
use serde_json::{Value, json};

/// `GET /version`.
pub async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

/// `GET /load`: 0, as vLLM answers without `--enable-server-load-tracking`.
pub async fn load() -> Json<Value> {
    Json(json!({ "server_load": 0 }))
}
