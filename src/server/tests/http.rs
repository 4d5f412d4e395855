//! Errors, keys, CORS, limits and vLLM's own endpoints.

use serde_json::json;

use super::*;

const CHAT: &str = "/v1/chat/completions";

/// A chat request with more fields.
fn chat(extra: &str) -> String {
    format!(r#"{{"messages":[{{"role":"user","content":"q"}}]{extra}}}"#)
}

#[tokio::test]
async fn each_class_of_error() {
    let server = Setup::default().start();
    let long = format!(r#"{{"prompt":"{}"}}"#, "a b ".repeat(600));
    let many_ids = format!(r#"{{"prompt":[{}1]}}"#, "1,".repeat(511));
    let cases: Vec<(&str, String, u16, &str, Value)> = vec![
        (CHAT, "{\"messages\": [".into(), 400, "Bad Request", json!("body.14")),
        (CHAT, "".into(), 400, "Bad Request", json!("body")),
        (CHAT, "[]".into(), 400, "Bad Request", json!("body")),
        (CHAT, "{}".into(), 400, "Bad Request", json!("body.messages")),
        (
            CHAT,
            chat(r#","temperature":"hot""#),
            400,
            "Bad Request",
            json!("body.temperature"),
        ),
        (
            CHAT,
            chat(r#","seed":99999999999999999999"#),
            400,
            "Bad Request",
            json!("body.seed"),
        ),
        (
            CHAT,
            chat(r#","reasoning_effort":"extreme""#),
            400,
            "Bad Request",
            json!("body.reasoning_effort"),
        ),
        (CHAT, chat(r#","temperature":NaN"#), 400, "Bad Request", Value::Null),
        (
            CHAT,
            chat(r#","temperature":"nan""#),
            400,
            "BadRequestError",
            json!("temperature"),
        ),
        (
            CHAT,
            chat(r#","temperature":-1"#),
            400,
            "BadRequestError",
            json!("temperature"),
        ),
        (CHAT, chat(r#","top_p":0"#), 400, "BadRequestError", json!("top_p")),
        (CHAT, chat(r#","top_k":-2"#), 400, "BadRequestError", Value::Null),
        (
            CHAT,
            chat(r#","repetition_penalty":0"#),
            400,
            "BadRequestError",
            Value::Null,
        ),
        (
            CHAT,
            chat(r#","n":2,"temperature":0"#),
            400,
            "BadRequestError",
            Value::Null,
        ),
        (
            CHAT,
            chat(r#","logprobs":true,"top_logprobs":21"#),
            400,
            "BadRequestError",
            json!("logprobs"),
        ),
        (
            CHAT,
            chat(r#","prompt_logprobs":21"#),
            400,
            "BadRequestError",
            json!("prompt_logprobs"),
        ),
        (
            CHAT,
            chat(r#","logit_bias":{"999999":1}"#),
            400,
            "BadRequestError",
            json!("logit_bias"),
        ),
        (
            CHAT,
            chat(r#","allowed_token_ids":[]"#),
            400,
            "BadRequestError",
            json!("allowed_token_ids"),
        ),
        (
            CHAT,
            chat(r#","max_tokens":0"#),
            400,
            "BadRequestError",
            json!("max_tokens"),
        ),
        (
            CHAT,
            chat(r#","max_tokens":513"#),
            400,
            "BadRequestError",
            json!("max_tokens"),
        ),
        (CHAT, chat(r#","model":"other""#), 404, "NotFoundError", json!("model")),
        (
            CHAT,
            chat(r#","response_format":{"type":"json_schema"}"#),
            400,
            "BadRequestError",
            json!("response_format"),
        ),
        (CHAT, r#"{"messages":[]}"#.into(), 400, "BadRequestError", Value::Null),
        ("/v1/completions", long, 400, "BadRequestError", json!("input_tokens")),
        ("/v1/completions", many_ids, 400, "BadRequestError", json!("max_tokens")),
        (
            "/v1/completions",
            r#"{"prompt":[4000000]}"#.into(),
            400,
            "BadRequestError",
            Value::Null,
        ),
        (
            "/v1/completions",
            r#"{"prompt":""}"#.into(),
            400,
            "BadRequestError",
            json!("prompt"),
        ),
    ];
    for (path, body, status, kind, param) in cases {
        let reply = server.post(path, &body).await;
        let (found_status, found_kind, found_param) = reply.error();
        assert_eq!(
            (found_status, found_kind.as_str()),
            (status, kind),
            "{body}: {}",
            reply.text
        );
        if !(param.is_null() && kind == "Bad Request") {
            assert_eq!(found_param, param, "{body}: {}", reply.text);
        }
    }
    server.idle().await;
    assert_eq!(server.post("/v1/completions", r#"{"prompt":"a"}"#).await.status, 200);
}

#[tokio::test]
async fn bodies_must_be_json_of_bounded_size() {
    let server = Setup::default().start();
    let plain = Request::post(CHAT)
        .header("content-type", "text/plain")
        .body(Body::from("{}"))
        .unwrap();
    let reply = server.send(plain).await;
    assert_eq!(reply.error(), (400, "Bad Request".into(), Value::Null));
    assert!(reply.text.contains("Unsupported Media Type"));
    let with_charset = Request::post("/tokenize")
        .header("content-type", "application/json; charset=utf-8")
        .body(Body::from(r#"{"prompt":"a"}"#));
    assert_eq!(server.send(with_charset.unwrap()).await.status, 200);

    let large = format!(r#"{{"prompt":"{}"}}"#, "a".repeat(1 << 20));
    assert_eq!(server.post("/v1/completions", &large).await.status, 413);
    let chunks: Vec<Result<String, std::io::Error>> = (0..20).map(|_| Ok("[".repeat(1 << 16))).collect();
    let chunked = Request::post("/v1/completions")
        .header("content-type", "application/json")
        .body(Body::from_stream(futures_util::stream::iter(chunks)))
        .unwrap();
    assert_eq!(server.send(chunked).await.status, 413);
}

#[tokio::test]
async fn unknown_paths_methods_and_trailing_slashes() {
    let server = Setup::default().start();
    let reply = server.get("/nowhere").await;
    assert_eq!(
        (reply.status.as_u16(), reply.text.as_str()),
        (404, r#"{"detail":"Not Found"}"#)
    );
    let reply = server.get(CHAT).await;
    assert_eq!(
        (reply.status.as_u16(), reply.text.as_str()),
        (405, r#"{"detail":"Method Not Allowed"}"#)
    );
    let head = Request::head("/v1/models").body(Body::empty()).unwrap();
    assert_eq!(server.send(head).await.status, 405);
    let reply = server.get("/v1/models/?a=1").await;
    assert_eq!(
        (reply.status.as_u16(), reply.headers["location"].to_str().unwrap()),
        (307, "/v1/models?a=1")
    );
    for path in ["//v1/models", "/v1/models/x", "/v1//models", "/%76%31/models"] {
        assert_eq!(server.get(path).await.status, 404, "{path}");
    }
}

#[tokio::test]
async fn keys_guard_what_generates() {
    let mut setup = Setup::default();
    setup.server.api_keys = vec!["secret".into()];
    setup.server.root_path = "/base".into();
    let server = setup.start();
    for path in ["/v1/models", "/v1/unknown", "/base/v1/models", "/invocations"] {
        let reply = server.get(path).await;
        assert_eq!(
            (reply.status.as_u16(), reply.text.as_str()),
            (401, r#"{"error":"Unauthorized"}"#),
            "{path}"
        );
    }
    for path in ["/health", "/version", "/metrics", "/base/ping"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    let with_key = Request::get("/base/v1/models")
        .header("authorization", "bearer secret")
        .body(Body::empty())
        .unwrap();
    assert_eq!(server.send(with_key).await.status, 200);
}

#[tokio::test]
async fn request_ids_and_cors_mark_every_response() {
    let mut setup = Setup::default();
    setup.server.enable_request_id_headers = true;
    setup.server.api_keys = vec!["k".into()];
    let server = setup.start();
    let refused = Request::get("/v1/models")
        .header("x-request-id", "mine")
        .body(Body::empty())
        .unwrap();
    let reply = server.send(refused).await;
    assert_eq!(
        (reply.status.as_u16(), &reply.headers["x-request-id"]),
        (401, &"mine".parse().unwrap())
    );
    assert_eq!(reply.headers["vary"], "Origin");
    let fresh = server.get("/health").await;
    assert_eq!(fresh.headers["x-request-id"].len(), 32);
    let preflight = Request::options("/v1/models")
        .header("origin", "http://page")
        .header("access-control-request-method", "GET")
        .body(Body::empty())
        .unwrap();
    let reply = server.send(preflight).await;
    assert_eq!(
        (reply.status.as_u16(), reply.text.as_str()),
        (400, "Disallowed CORS origin")
    );
}

#[tokio::test]
async fn models_version_and_metrics() {
    let server = Setup::default().start();
    let models = server.get("/v1/models").await.json();
    assert_eq!(models["object"], "list");
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(models["data"][1]["id"], "alias");
    assert_eq!(models["data"][0]["root"], "org/tiny");
    assert_eq!(models["data"][0]["max_model_len"], MAX_MODEL_LEN);
    assert_eq!(models["data"][0]["permission"][0]["object"], "model_permission");
    assert_eq!(
        server.get("/version").await.json()["version"],
        crate::config::VLLM_VERSION
    );
    server.post("/v1/completions", r#"{"prompt":"a"}"#).await;
    server.idle().await;
    let metrics = server.get("/metrics").await;
    assert_eq!(
        metrics.headers["content-type"],
        "text/plain; version=1.0.0; charset=utf-8"
    );
    assert!(
        metrics
            .text
            .contains(r#"http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1"#)
    );
    assert!(metrics.text.contains("vllm:generation_tokens_total"));
    assert_eq!(server.get("/metrics/").await.status, 200);
}

#[tokio::test]
async fn a_panicking_handler_is_a_500() {
    let app = Arc::new(Setup::default().app());
    let panicking = axum::routing::get(|| async {
        if true {
            panic!("oops")
        }
    });
    let inner = Router::new().route("/panics", panicking).with_state(());
    let router = super::super::wrapped(app, inner);
    let response = router
        .oneshot(Request::get("/panics").body(Body::empty()).unwrap())
        .await
        .unwrap();
    assert_eq!(response.status(), 500);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&body).contains("InternalServerError"));
}
