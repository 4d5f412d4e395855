//! Disconnects, slow readers, many at once, a full queue, a dead engine.

use futures_util::StreamExt;

use super::*;
use crate::step::ExecutorError;

const ENDLESS: &str = r#"{"prompt":"a","max_tokens":400,"ignore_eos":true,"stream":true}"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_a_stream_frees_its_slot() {
    let server = Setup::default().start();
    server.control.set_step_delay(Duration::from_millis(5));
    let response = server
        .router
        .clone()
        .oneshot(post("/v1/completions", ENDLESS))
        .await
        .unwrap();
    let mut body = response.into_body().into_data_stream();
    assert!(body.next().await.unwrap().unwrap().starts_with(b"data: "));
    server.running(1).await;
    drop(body);
    server.idle().await;
    assert!(server.control.counters().steps < 300, "it ran to its end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_a_pending_answer_frees_its_slot() {
    let server = Setup::default().start();
    server.control.set_step_delay(Duration::from_millis(5));
    let whole = ENDLESS.replace(r#","stream":true"#, "");
    let answer = tokio::spawn(server.router.clone().oneshot(post("/v1/completions", &whole)));
    server.running(1).await;
    answer.abort();
    server.idle().await;
    assert!(server.control.counters().steps < 300, "it ran to its end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_at_once_answer_as_one_alone() {
    let server = Arc::new(Setup::replying("the same answer for everyone").start());
    let body = |i: usize| {
        format!(
            r#"{{"prompt":"question {i}","max_tokens":40,"stream":{}}}"#,
            i.is_multiple_of(2)
        )
    };
    let tasks: Vec<_> = (0..64)
        .map(|i| {
            let server = server.clone();
            tokio::spawn(async move { (i, server.post("/v1/completions", &body(i)).await) })
        })
        .collect();
    for task in tasks {
        let (i, reply) = task.await.unwrap();
        assert_eq!(reply.status, 200);
        if i % 2 == 1 {
            assert_eq!(reply.json()["choices"][0]["text"], "the same answer for everyone");
        } else {
            assert!(reply.text.ends_with("data: [DONE]\n\n") && reply.text.contains(r#""finish_reason":"stop""#));
        }
    }
    server.idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_loses_nothing_and_hinders_nobody() {
    let server = Setup::default().start();
    let response = server
        .router
        .clone()
        .oneshot(post("/v1/completions", ENDLESS))
        .await
        .unwrap();
    // Nobody reads while another request is served and the first one finishes.
    let other = server.post("/v1/completions", r#"{"prompt":"b"}"#).await;
    assert_eq!(other.status, 200);
    server.idle().await;
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    assert!(text.contains(r#""finish_reason":"length""#) && text.ends_with("data: [DONE]\n\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_is_503_before_the_stream_starts() {
    let setup = Setup {
        max_queued_requests: Some(1),
        max_num_seqs: 1,
        ..Setup::default()
    };
    let server = setup.start();
    server.control.set_step_delay(Duration::from_millis(20));
    let first = tokio::spawn(server.router.clone().oneshot(post("/v1/completions", ENDLESS)));
    server.running(1).await;
    let queued = server
        .router
        .clone()
        .oneshot(post("/v1/completions", ENDLESS))
        .await
        .unwrap();
    assert_eq!(queued.status(), 200);
    let refused = server.post("/v1/completions", ENDLESS).await;
    assert_eq!(refused.error(), (503, "Service Unavailable".into(), Value::Null));
    assert_eq!(refused.headers["retry-after"], "1");
    drop((first, queued));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_engine_fails_requests_and_health() {
    let server = Setup::default().start();
    server.control.set_step_delay(Duration::from_millis(20));
    let whole = tokio::spawn({
        let router = server.router.clone();
        async move {
            router
                .oneshot(post("/v1/completions", r#"{"prompt":"a"}"#))
                .await
                .unwrap()
                .status()
        }
    });
    server.running(1).await;
    let streamed = server
        .router
        .clone()
        .oneshot(post("/v1/completions", ENDLESS))
        .await
        .unwrap();
    let failure = ExecutorError {
        message: "kernel attention failed".into(),
        fatal: true,
    };
    server.control.fail_next(failure);
    assert_eq!(whole.await.unwrap(), 500);
    let bytes = streamed.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    assert!(
        text.contains(r#""type":"InternalServerError""#) && text.ends_with("data: [DONE]\n\n"),
        "{text}"
    );
    server.engine.stopped().await;
    assert_eq!(server.get("/health").await.status, 503);
    assert_eq!(server.post("/v1/completions", r#"{"prompt":"a"}"#).await.status, 500);
}

#[tokio::test]
async fn whole_answers_report_the_load_to_who_asks() {
    let server = Setup::default().start();
    for (path, body) in [
        (
            "/v1/chat/completions",
            r#"{"messages":[{"role":"user","content":"a"}]}"#,
        ),
        ("/v1/completions", r#"{"prompt":"a"}"#),
    ] {
        assert!(
            !server
                .post(path, body)
                .await
                .headers
                .contains_key("endpoint-load-metrics")
        );
        let mut request = post(path, body);
        let format = axum::http::HeaderValue::from_static("JSON");
        request.headers_mut().insert("endpoint-load-metrics-format", format);
        let reply = server.send(request).await;
        let report = reply.headers["endpoint-load-metrics"].to_str().unwrap();
        let report: Value = serde_json::from_str(report.strip_prefix("JSON ").unwrap()).unwrap();
        assert_eq!(report["named_metrics"]["num_requests_waiting"], 0.0);
    }
}
