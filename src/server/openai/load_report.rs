//! The response header `endpoint-load-metrics`: the engine's load in ORCA's notation, for load balancers that ask for it with
//! the request header `endpoint-load-metrics-format: TEXT` or `JSON`.
//!
//! # Source
//! vLLM 0.33: whole answers of chat and completions have it, streams do not; a format that is neither is ignored.

use axum::Json;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::json;

use crate::engine::EngineStats;
use crate::server::App;

const FORMAT: &str = "endpoint-load-metrics-format";
const REPORT: &str = "endpoint-load-metrics";

/// A whole answer, with the load where `request` asks for it.
pub fn answered(answer: impl Serialize, request: &HeaderMap, app: &App) -> Response {
    let mut response = Json(answer).into_response();
    let format = request.get(FORMAT).and_then(|format| format.to_str().ok());
    let report = format.and_then(|format| report(format, &app.engine().stats()));
    if let Some(value) = report.and_then(|report| HeaderValue::from_str(&report).ok()) {
        response.headers_mut().insert(REPORT, value);
    }
    response
}

fn report(format: &str, stats: &EngineStats) -> Option<String> {
    let (usage, waiting) = (stats.kv_cache_usage, stats.num_waiting as f64);
    match format.to_ascii_lowercase().as_str() {
        "text" => Some(format!(
            "TEXT named_metrics.kv_cache_usage_perc={usage:?}, named_metrics.num_requests_waiting={waiting:?}"
        )),
        "json" => {
            let metrics = json!({ "kv_cache_usage_perc": usage, "num_requests_waiting": waiting });
            Some(format!("JSON {}", json!({ "named_metrics": metrics })))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_told_in_the_notation_that_was_asked_for() {
        let stats = EngineStats {
            kv_cache_usage: 0.25,
            num_waiting: 3,
            ..EngineStats::default()
        };
        assert_eq!(
            report("TEXT", &stats).unwrap(),
            "TEXT named_metrics.kv_cache_usage_perc=0.25, named_metrics.num_requests_waiting=3.0"
        );
        assert_eq!(
            report("json", &stats).unwrap(),
            r#"JSON {"named_metrics":{"kv_cache_usage_perc":0.25,"num_requests_waiting":3.0}}"#
        );
        assert_eq!(report("xml", &stats), None);
    }
}
