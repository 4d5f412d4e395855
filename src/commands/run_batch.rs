//! `rvllm run-batch`: an OpenAI batch file through the engine in this process.
//!
//! Each line goes through the server's own router, so that every endpoint answers as it does over HTTP. Answers are written
//! in the order of the requests, as soon as those before are there.
//!
//! # Source
//! The form of the lines is that of `vllm run-batch`. Differs from vLLM: a line that cannot be read becomes an error line and
//! does not end the run; `/v1/completions` is taken too.

mod transfer;

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use http_body_util::BodyExt;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::task::JoinSet;
use tower::ServiceExt;
use uuid::Uuid;

use crate::config::Config;
use crate::config::args::RunBatchArgs;
use crate::serve::{self, Phases};
use crate::server;

/// Answers that may wait for an earlier one, for each request that runs: bounds the memory.
const WAITING_PER_RUNNING: usize = 8;
/// Between two lines of progress in the log.
const LOG_INTERVAL: Duration = Duration::from_secs(5);

/// Answers every line of the input.
///
/// # Errors
/// The model cannot be loaded, a file cannot be read or written, or the engine died. A request that fails is an error in its
/// line of the output.
pub fn run(mut config: Config, args: &RunBatchArgs, mut phases: Phases) -> anyhow::Result<ExitCode> {
    // There are no clients to tell apart, and the order of the file is the queue.
    config.server.api_keys.clear();
    config.server.access_log = false;
    config.scheduler.max_queued_requests = None;
    config.scheduler.max_queued_tokens = None;

    let input = transfer::open_input(&args.input_file)?;
    let mut output = transfer::Output::create(&args.output_file, args.output_tmp_dir.as_deref())?;
    let (config, executor) = serve::load(config, &mut phases)?;
    let app = Arc::new(serve::build_app(&config, executor)?);
    tracing::info!("Reading batch from {}...", args.input_file);

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the threads cannot be started")?;
    let engine = app.engine().clone();
    let router = server::router(app);
    let limit = 2 * config.scheduler.max_num_seqs;
    let Count { written, failed } = runtime.block_on(async {
        tokio::select! {
            count = answer_all(router, input, &mut output, limit) => {
                let count = count?;
                engine.drain(Instant::now()).await;
                anyhow::Ok(count)
            }
            exit = engine.stopped() => anyhow::bail!("the engine is dead: {exit:?}"),
        }
    })?;
    output.finish()?;
    tracing::info!("Batch complete. Written: {written}, failed: {failed}");
    Ok(ExitCode::SUCCESS)
}

/// How the lines fared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    written: usize,
    failed: usize,
}

/// Runs up to `limit` requests at once.
async fn answer_all(
    router: Router,
    input: impl BufRead,
    output: &mut impl Write,
    limit: usize,
) -> anyhow::Result<Count> {
    let mut lines = input.lines().enumerate().fuse();
    let mut running: JoinSet<(usize, Answer)> = JoinSet::new();
    let mut waiting: BTreeMap<usize, Answer> = BTreeMap::new();
    let (mut started, mut count) = (0, Count::default());
    let mut progress = Progress::new();
    loop {
        while running.len() < limit && running.len() + waiting.len() < limit * WAITING_PER_RUNNING {
            let Some((number, line)) = lines.next() else { break };
            let line = line.with_context(|| format!("line {} of the input cannot be read", number + 1))?;
            if line.trim().is_empty() {
                continue;
            }
            let (index, router) = (started, router.clone());
            started += 1;
            running.spawn(async move { (index, answer(router, &line, number + 1).await) });
        }
        let Some(done) = running.join_next().await else { break };
        let (index, answer) = done.context("a request's task died")?;
        waiting.insert(index, answer);
        while let Some(answer) = waiting.remove(&count.written) {
            count.written += 1;
            count.failed += usize::from(answer.error.is_some());
            serde_json::to_writer(&mut *output, &answer)?;
            output.write_all(b"\n").context("the output cannot be written")?;
        }
        progress.at(count.written, started);
    }
    output.flush().context("the output cannot be written")?;
    Ok(count)
}

/// A line of the input, as far as it must be right.
#[derive(Deserialize)]
struct Line {
    custom_id: String,
    #[expect(dead_code, reason = "vLLM requires the field and does not look at it")]
    method: String,
    url: String,
    body: Value,
}

/// A line of the output.
#[derive(Debug, Serialize)]
struct Answer {
    id: String,
    /// None when the line had none that could be read.
    custom_id: Option<String>,
    response: ResponseData,
    error: Option<Value>,
}

#[derive(Debug, Serialize)]
struct ResponseData {
    status_code: u16,
    request_id: String,
    body: Option<Value>,
}

impl Answer {
    fn new(custom_id: Option<String>, status: StatusCode, body: Option<Value>, error: Option<Value>) -> Self {
        Self {
            id: format!("vllm-{}", Uuid::new_v4().simple()),
            custom_id,
            response: ResponseData {
                status_code: status.as_u16(),
                request_id: format!("vllm-batch-{}", Uuid::new_v4().simple()),
                body,
            },
            error,
        }
    }

    fn bad(custom_id: Option<String>, message: impl Into<String>) -> Self {
        Self::new(
            custom_id,
            StatusCode::BAD_REQUEST,
            None,
            Some(Value::from(message.into())),
        )
    }
}

/// Endings of routes, and what vLLM calls their API.
const ENDPOINTS: [(&str, &str); 5] = [
    ("/v1/chat/completions", "Chat Completions"),
    ("/v1/completions", "Completions"),
    ("/v1/embeddings", "Embeddings"),
    ("/score", "Scores"),
    ("/rerank", "Rerank"),
];

async fn answer(router: Router, line: &str, number: usize) -> Answer {
    let Line {
        custom_id, url, body, ..
    } = match serde_json::from_str(line) {
        Ok(line) => line,
        Err(error) => {
            let custom_id = serde_json::from_str::<Value>(line).ok();
            let custom_id = custom_id.and_then(|line| line.get("custom_id")?.as_str().map(str::to_owned));
            return Answer::bad(custom_id, format!("line {number} is no batch request: {error}"));
        }
    };
    let is_whole = |path: &str| path.starts_with("/v1/");
    let known = ENDPOINTS.iter().find(|(path, _)| match is_whole(path) {
        true => url == *path,
        false => url.ends_with(path) && url.starts_with('/'),
    });
    let Some((_, api)) = known else {
        let supported = ENDPOINTS.map(|(path, _)| path).join(", ");
        return Answer::bad(
            Some(custom_id),
            format!("URL {url} was used. Supported endpoints: {supported}."),
        );
    };
    if body
        .get("stream")
        .is_some_and(|stream| stream != &Value::Bool(false) && !stream.is_null())
    {
        return Answer::bad(Some(custom_id), "Request must not be sent in stream mode");
    }
    let request = Request::post(url.as_str())
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(body.to_string()));
    let Ok(request) = request else {
        return Answer::bad(Some(custom_id), format!("URL {url} is no path"));
    };
    let (parts, body) = match router.oneshot(request).await {
        Ok(response) => response.into_parts(),
        Err(never) => match never {},
    };
    let Ok(bytes) = body.collect().await else {
        return Answer::bad(Some(custom_id), "the answer ended early");
    };
    let value: Value = serde_json::from_slice(&bytes.to_bytes()).unwrap_or_default();
    if parts.status.is_success() {
        Answer::new(Some(custom_id), StatusCode::OK, Some(value), None)
    } else if value.get("detail").is_some() {
        Answer::bad(Some(custom_id), format!("The model does not support {api} API"))
    } else {
        Answer::new(Some(custom_id), parts.status, None, Some(value))
    }
}

/// How far the batch is: on a terminal a bar, elsewhere a line now and then.
struct Progress {
    bar: ProgressBar,
    last_log: Instant,
}

impl Progress {
    fn new() -> Self {
        let style = ProgressStyle::with_template("Running batch: {pos}/{len} [{elapsed}, {per_sec}]");
        let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self {
            bar,
            last_log: Instant::now(),
        }
    }

    fn at(&mut self, written: usize, started: usize) {
        self.bar.set_length(started as u64);
        self.bar.set_position(written as u64);
        if self.bar.is_hidden() && self.last_log.elapsed() >= LOG_INTERVAL {
            self.last_log = Instant::now();
            tracing::info!("Running batch: {written} of {started} so far");
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;
    use axum::routing::post;
    use axum::{Json, http};
    use serde_json::json;

    use super::*;

    /// Answers after a time that the request names; refuses what has no prompt.
    fn router() -> Router {
        let handler = |Json(body): Json<Value>| async move {
            let wait_ms = body.get("wait_ms").and_then(Value::as_u64).unwrap_or(0);
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            match body.get("prompt") {
                Some(prompt) => Json(json!({"echo": prompt})).into_response(),
                None => {
                    let error =
                        json!({"error": {"message": "m", "type": "BadRequestError", "param": "prompt", "code": 422}});
                    (http::StatusCode::UNPROCESSABLE_ENTITY, Json(error)).into_response()
                }
            }
        };
        let missing = || async { (http::StatusCode::NOT_FOUND, Json(json!({"detail": "Not Found"}))) };
        Router::new().route("/v1/completions", post(handler)).fallback(missing)
    }

    async fn batch(lines: &[&str], limit: usize) -> (Vec<Value>, Count) {
        let mut output = Vec::new();
        let count = answer_all(router(), lines.join("\n").as_bytes(), &mut output, limit)
            .await
            .unwrap();
        let text = String::from_utf8(output).unwrap();
        (
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(),
            count,
        )
    }

    fn request(id: &str, url: &str, body: &str) -> String {
        format!(r#"{{"custom_id": "{id}", "method": "POST", "url": "{url}", "body": {body}}}"#)
    }

    #[tokio::test]
    async fn answers_come_in_the_order_of_the_lines() {
        let lines: Vec<String> = (0..20)
            .map(|i| {
                let body = json!({"prompt": i, "wait_ms": if i % 5 == 0 { 30 } else { 0 }});
                request(&format!("r{i}"), "/v1/completions", &body.to_string())
            })
            .collect();
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let (answers, count) = batch(&lines, 3).await;
        assert_eq!(count, Count { written: 20, failed: 0 });
        for (i, answer) in answers.iter().enumerate() {
            assert_eq!(answer["custom_id"], format!("r{i}"));
            assert_eq!(answer["response"]["body"], json!({"echo": i}));
            assert_eq!(
                (&answer["response"]["status_code"], &answer["error"]),
                (&json!(200), &Value::Null)
            );
        }
        let keys: Vec<&String> = answers[0].as_object().unwrap().keys().collect();
        assert_eq!(keys, ["id", "custom_id", "response", "error"]);
    }

    #[tokio::test]
    async fn a_bad_line_fails_alone() {
        let stream = request("s", "/v1/completions", r#"{"prompt": 1, "stream": true}"#);
        let lines = [
            request("a", "/v1/completions", r#"{"prompt": 1}"#),
            request("b", "/v1/completions", "{}"),
            request("c", "/v1/embeddings", "{}"),
            request("d", "/v1/frobnicate", "{}"),
            stream,
            r#"{"custom_id": "e", "url": "/v1/completions"}"#.to_owned(),
            "not json".to_owned(),
            String::new(),
            request("f", "/v1/score", "{}"),
            request("g", "/v1/completions", r#"{"prompt": 2, "stream": false}"#),
        ];
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let (answers, count) = batch(&lines, 4).await;
        assert_eq!(count, Count { written: 9, failed: 7 });
        let error = |i: usize| answers[i]["error"].as_str().unwrap_or_default().to_owned();
        let code = |i: usize| answers[i]["response"]["status_code"].as_u64().unwrap();
        assert_eq!(answers[1]["error"]["error"]["param"], "prompt");
        assert_eq!((code(1), &answers[1]["response"]["body"]), (422, &Value::Null));
        assert_eq!(error(2), "The model does not support Embeddings API");
        assert!(error(3).starts_with("URL /v1/frobnicate was used. Supported endpoints: /v1/chat/completions, "));
        assert_eq!(
            (error(4).as_str(), code(4)),
            ("Request must not be sent in stream mode", 400)
        );
        assert!(
            error(5).starts_with("line 6 is no batch request: missing field `method`"),
            "{}",
            error(5)
        );
        assert_eq!(answers[5]["custom_id"], "e");
        assert_eq!(answers[6]["custom_id"], Value::Null);
        assert_eq!(error(7), "The model does not support Scores API");
        assert_eq!(answers[8]["response"]["body"], json!({"echo": 2}));
    }
}
