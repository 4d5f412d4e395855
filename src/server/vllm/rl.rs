//! Routes for reinforcement learning and scaling. There is one process with one device and the checkpoint's weights: what
//! needs more is refused by name.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde_json::{Map, Value, json};

use crate::server::App;
use crate::server::body::JsonObject;
use crate::server::error::ApiError;

fn required<'a>(body: &'a Map<String, Value>, field: &str) -> Result<&'a Value, ApiError> {
    body.get(field)
        .filter(|value| !value.is_null())
        .ok_or_else(|| ApiError::plain(StatusCode::BAD_REQUEST, format!("Missing '{field}' in request body")))
}

fn bad_request(message: &str) -> ApiError {
    ApiError::plain(StatusCode::BAD_REQUEST, message)
}

/// `POST /collective_rpc`.
pub async fn collective_rpc(JsonObject(body): JsonObject) -> Result<(), ApiError> {
    let method = required(&body, "method")?.as_str().unwrap_or_default();
    Err(ApiError::not_implemented(format!(
        "collective_rpc: there are no worker processes that could run '{}'",
        super::super::error::shortened(method)
    )))
}

/// `GET /get_world_size`.
pub async fn get_world_size() -> Json<Value> {
    Json(json!({ "world_size": 1 }))
}

const NO_TRANSFER: &str = "weights cannot be transferred into this server: they come from the checkpoint";

/// `POST /init_weight_transfer_engine`.
pub async fn init_weight_transfer_engine(JsonObject(body): JsonObject) -> Result<(), ApiError> {
    required(&body, "init_info")?;
    Err(ApiError::not_implemented(NO_TRANSFER))
}

/// `POST /update_weights`.
pub async fn update_weights(JsonObject(body): JsonObject) -> Result<(), ApiError> {
    required(&body, "update_info")?;
    Err(ApiError::not_implemented(NO_TRANSFER))
}

/// The steps of a transfer that take no body.
pub async fn no_weight_transfer() -> ApiError {
    ApiError::not_implemented(NO_TRANSFER)
}

/// `POST /update_weight_version`: the name that `/weight_info` tells.
pub async fn update_weight_version(
    State(app): State<Arc<App>>,
    JsonObject(body): JsonObject,
) -> Result<Json<Value>, ApiError> {
    let version = required(&body, "new_version")?
        .as_str()
        .ok_or_else(|| ApiError::invalid("new_version", "the version must be a string"))?;
    const LONGEST: usize = 1024;
    if version.len() > LONGEST {
        return Err(ApiError::invalid(
            "new_version",
            format!("at most {LONGEST} bytes are kept"),
        ));
    }
    version.clone_into(&mut app.control.weight_version());
    Ok(Json(json!({ "success": true, "new_version": version })))
}

/// `GET /weight_info`.
pub async fn weight_info(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({ "weight_version": *app.control.weight_version() }))
}

/// `POST /weight_checker`.
pub async fn weight_checker(State(app): State<Arc<App>>, JsonObject(body): JsonObject) -> Result<(), ApiError> {
    if !matches!(
        body.get("action").and_then(Value::as_str),
        Some("checksum" | "reset" | "compare")
    ) {
        return Err(bad_request("action must be one of checksum|reset|compare"));
    }
    if app.engine().is_paused() {
        return Err(ApiError::plain(
            StatusCode::CONFLICT,
            "weight_checker requires an awake, unpaused engine",
        ));
    }
    Err(ApiError::not_implemented(
        "weights are neither hashed nor overwritten while they serve",
    ))
}

/// `POST /release_kv_cache_memory`.
pub async fn release_kv_cache_memory() -> ApiError {
    ApiError::not_implemented("the KV cache is allocated once and stays; stop the server to free its memory")
}

/// `POST /scale_elastic_ep`: one engine is what there is.
pub async fn scale_elastic_ep(JsonObject(body): JsonObject) -> Result<Json<Value>, ApiError> {
    let size = body
        .get("new_data_parallel_size")
        .filter(|size| !size.is_null())
        .ok_or_else(|| bad_request("new_data_parallel_size is required"))?;
    let positive = |value: &Value| value.as_i64().is_some_and(|value| value > 0);
    if !positive(size) {
        return Err(bad_request("new_data_parallel_size must be a positive integer"));
    }
    if body.get("drain_timeout").is_some_and(|timeout| !positive(timeout)) {
        return Err(bad_request("drain_timeout must be a positive integer"));
    }
    if size.as_i64() != Some(1) {
        return Err(bad_request(
            "the server has one engine: --enable-elastic-ep is not offered",
        ));
    }
    Ok(Json(json!({ "message": "Scaled to 1 data parallel engines" })))
}

/// `POST /is_scaling_elastic_ep`.
pub async fn is_scaling_elastic_ep() -> Json<Value> {
    Json(json!({
        "is_scaling_elastic_ep": false,
        "phase": "idle",
        "epoch": null,
        "error": null,
        "requested_data_parallel_size": null,
    }))
}
