//! Pausing, sleeping, caches and aborts: the development mode's grip on the engine.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::engine::PauseMode;
use crate::server::App;
use crate::server::body::{JsonObject, string_list};
use crate::server::error::ApiError;
use crate::server::query::QueryParams;
use crate::server::scale_out;

const MODES: [(&str, PauseMode); 3] = [
    ("abort", PauseMode::Abort),
    ("wait", PauseMode::Wait),
    ("keep", PauseMode::Keep),
];
const LEVELS: [(&str, u8); 3] = [("1", 1), ("0", 0), ("2", 2)];
/// What a sleeping engine can be woken up by parts.
const TAGS: [&str; 2] = ["kv_cache", "weights"];

/// What the development mode has changed.
#[derive(Debug)]
pub struct Control {
    /// Parts that sleep; empty = awake.
    asleep: Mutex<BTreeSet<&'static str>>,
    weight_version: Mutex<String>,
}

impl Default for Control {
    fn default() -> Self {
        Self {
            asleep: Mutex::default(),
            weight_version: Mutex::new("default".to_owned()),
        }
    }
}

impl Control {
    fn asleep(&self) -> MutexGuard<'_, BTreeSet<&'static str>> {
        self.asleep.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn weight_version(&self) -> MutexGuard<'_, String> {
        self.weight_version.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `POST /pause?mode=abort|wait|keep&clear_cache=true`.
pub async fn pause(State(app): State<Arc<App>>, query: QueryParams) -> Result<Json<Value>, ApiError> {
    let mut mode = query.one_of("mode", &MODES)?;
    if query.flag("wait_for_inflight_requests", false)? {
        mode = PauseMode::Wait;
    }
    let clear_cache = query.flag("clear_cache", true)?;
    app.engine().pause(mode).await?;
    if clear_cache && mode != PauseMode::Keep {
        app.engine().reset_prefix_cache(false).await?;
    }
    Ok(Json(json!({ "status": "paused" })))
}

/// `POST /resume`.
pub async fn resume(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    app.engine().resume().await?;
    Ok(Json(json!({ "status": "resumed" })))
}

/// `GET /is_paused`.
pub async fn is_paused(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({ "is_paused": app.engine().is_paused() }))
}

/// `POST /sleep?level=0|1|2&mode=abort|wait|keep`: new requests wait until the engine is awake. From level 1 on vLLM frees
/// memory; here only the prefix cache is lost.
pub async fn sleep(State(app): State<Arc<App>>, query: QueryParams) -> Result<Json<Value>, ApiError> {
    let level = query.one_of("level", &LEVELS)?;
    let mode = query.one_of("mode", &MODES)?;
    let _operation = app.metrics.sleep_operation("sleep");
    app.engine().sleep(mode).await?;
    if level > 0 && mode != PauseMode::Keep {
        app.engine().reset_prefix_cache(false).await?;
    }
    *app.control.asleep() = match level {
        0 => BTreeSet::from(["scheduling"]),
        _ => BTreeSet::from(TAGS),
    };
    set_sleep_state(
        &app,
        match level {
            0 => "awake",
            1 => "weights_offloaded",
            _ => "discard_all",
        },
    );
    Ok(Json(json!({ "status": "sleeping", "level": level })))
}

/// `POST /wake_up?tags=weights&tags=kv_cache`: without tags everything wakes up.
pub async fn wake_up(State(app): State<Arc<App>>, query: QueryParams) -> Result<Json<Value>, ApiError> {
    let tags: Vec<&str> = query.all("tags").collect();
    if let Some(unknown) = tags.iter().find(|tag| !TAGS.contains(tag) && **tag != "scheduling") {
        return Err(ApiError::invalid_value(
            "tags",
            "tags are weights, kv_cache and scheduling",
            unknown,
        ));
    }
    let _operation = app.metrics.sleep_operation("wake_up");
    let awake = {
        let mut asleep = app.control.asleep();
        asleep.retain(|part| !tags.is_empty() && !tags.contains(part));
        asleep.is_empty()
    };
    if awake {
        app.engine().resume().await?;
        set_sleep_state(&app, "awake");
    }
    Ok(Json(json!({
        "status": if awake { "awake" } else { "sleeping" },
        "tags": if tags.is_empty() { Value::Null } else { json!(tags) },
    })))
}

/// `GET /is_sleeping`.
pub async fn is_sleeping(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({ "is_sleeping": !app.control.asleep().is_empty() }))
}

fn set_sleep_state(app: &App, current: &str) {
    for state in ["awake", "weights_offloaded", "discard_all"] {
        let value = f64::from(u8::from(state == current));
        app.metrics.engine.sleep_state.with_label_values(&[state]).set(value);
    }
}

/// `POST /reset_prefix_cache`. There is no external cache, so that one's reset fails, as in vLLM without a connector.
pub async fn reset_prefix_cache(State(app): State<Arc<App>>, query: QueryParams) -> Result<Json<Value>, ApiError> {
    let preempt_running = query.flag("reset_running_requests", false)?;
    let external = query.flag("reset_external", false)?;
    let success = app.engine().reset_prefix_cache(preempt_running).await?;
    Ok(Json(json!({ "success": success && !external })))
}

/// `POST /reset_mm_cache`, `POST /reset_encoder_cache`.
pub async fn nothing_to_reset() -> StatusCode {
    StatusCode::OK
}

/// `POST /abort_requests`: the requests named by the ids of their responses, or all; with `--tokens-only` only those.
pub async fn abort_requests(State(app): State<Arc<App>>, body: JsonObject) -> Result<Response, ApiError> {
    if app.config.routes.tokens_only {
        return Ok(scale_out::abort_requests(State(app), body).await?.into_response());
    }
    let JsonObject(body) = body;
    let ids = string_list(&body, "request_ids")?.filter(|ids| !ids.is_empty());
    let aborted = app.engine().abort_requests(ids).await?;
    Ok(Json(json!({ "status": "aborted", "aborted": aborted })).into_response())
}
