//! Control, information and refusals: vLLM's routes beside the ones that generate.

use futures_util::StreamExt;
use serde_json::json;

use super::*;
use crate::server::routes::{ROUTES, When};

const ENDLESS: &str = r#"{"prompt":"a","max_tokens":400,"ignore_eos":true,"stream":true}"#;

fn dev() -> Setup {
    let mut setup = Setup::default();
    setup.server.routes.dev_mode = true;
    setup
}

impl Server {
    async fn empty_post(&self, path: &str) -> Reply {
        self.send(Request::post(path).body(Body::empty()).unwrap()).await
    }

    async fn health_becomes(&self, status: u16) {
        for _ in 0..1000 {
            if self.get("/health").await.status == status {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("/health never becomes {status}");
    }

    /// A streaming completion whose first bytes have come.
    async fn begun(&self) -> axum::body::BodyDataStream {
        let response = self
            .router
            .clone()
            .oneshot(post("/v1/completions", ENDLESS))
            .await
            .unwrap();
        assert_eq!(response.status(), 200);
        let mut body = response.into_body().into_data_stream();
        body.next().await.unwrap().unwrap();
        body
    }
}

async fn rest(mut body: axum::body::BodyDataStream) -> String {
    let mut text = String::new();
    while let Some(bytes) = body.next().await {
        text += std::str::from_utf8(&bytes.unwrap()).unwrap();
    }
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pausing_by_abort_ends_streams_and_refuses_new_requests() {
    let server = dev().start();
    server.control.set_step_delay(Duration::from_millis(5));
    let running = server.begun().await;
    assert_eq!(server.get("/is_paused").await.text, r#"{"is_paused":false}"#);
    assert_eq!(server.empty_post("/pause").await.text, r#"{"status":"paused"}"#);
    let text = rest(running).await;
    assert!(
        text.contains(r#""finish_reason":"abort""#) && text.ends_with("data: [DONE]\n\n"),
        "{text}"
    );
    assert_eq!(server.get("/is_paused").await.text, r#"{"is_paused":true}"#);
    let refused = server.post("/v1/completions", ENDLESS).await;
    insta::assert_snapshot!(
        refused.text,
        @r#"{"error":{"message":"generation is paused","type":"ServiceUnavailableError","param":null,"code":503}}"#
    );
    assert_eq!(
        (refused.status.as_u16(), &refused.headers["retry-after"]),
        (503, &"1".parse().unwrap())
    );
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(server.empty_post("/resume").await.text, r#"{"status":"resumed"}"#);
    assert_eq!(server.post("/v1/completions", r#"{"prompt":"a"}"#).await.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pausing_can_freeze_or_wait() {
    let server = Arc::new(dev().start());
    server.control.set_step_delay(Duration::from_millis(1));
    let frozen = server.begun().await;
    server.empty_post("/pause?mode=keep").await;
    let steps = server.control.counters().steps;
    let queued = tokio::spawn({
        let server = server.clone();
        async move { server.post("/v1/completions", r#"{"prompt":"b"}"#).await.status }
    });
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert_eq!(server.control.counters().steps, steps);
    assert!(!queued.is_finished());
    server.empty_post("/resume").await;
    assert!(rest(frozen).await.contains(r#""finish_reason":"length""#));
    assert_eq!(queued.await.unwrap(), 200);

    let waited_for = server.begun().await;
    server.empty_post("/pause?mode=wait").await;
    assert_eq!(server.engine.stats().num_running, 0);
    assert!(rest(waited_for).await.contains(r#""finish_reason":"length""#));
    assert_eq!(server.post("/v1/completions", ENDLESS).await.status, 503);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asleep_requests_wait_until_all_parts_are_awake() {
    let server = Arc::new(dev().start());
    assert_eq!(server.get("/is_sleeping").await.text, r#"{"is_sleeping":false}"#);
    assert_eq!(
        server.empty_post("/sleep").await.text,
        r#"{"status":"sleeping","level":1}"#
    );
    assert_eq!(server.get("/is_sleeping").await.text, r#"{"is_sleeping":true}"#);
    assert!(
        server
            .get("/metrics")
            .await
            .text
            .contains(r#"sleep_state="weights_offloaded"} 1"#)
    );
    let waiting = tokio::spawn({
        let server = server.clone();
        async move { server.post("/v1/completions", r#"{"prompt":"b"}"#).await.status }
    });
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert_eq!(
        server.empty_post("/wake_up?tags=weights").await.text,
        r#"{"status":"sleeping","tags":["weights"]}"#
    );
    assert!(!waiting.is_finished());
    assert_eq!(
        server.empty_post("/wake_up?tags=kv_cache").await.text,
        r#"{"status":"awake","tags":["kv_cache"]}"#
    );
    assert_eq!(waiting.await.unwrap(), 200);
    assert_eq!(server.empty_post("/sleep?level=2&mode=keep").await.json()["level"], 2);
    assert_eq!(
        server.empty_post("/wake_up").await.text,
        r#"{"status":"awake","tags":null}"#
    );
    assert!(server.get("/metrics").await.text.contains(r#"sleep_state="awake"} 1"#));
    assert_eq!(server.empty_post("/wake_up?tags=x").await.error().2, "tags");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_prefix_cache_is_reset() {
    let mut setup = dev();
    setup.server.prompt_tokens_details = true;
    let server = setup.start();
    let body = format!(r#"{{"prompt":[{}7],"max_tokens":1}}"#, "7,".repeat(63));
    let mut cached = Vec::new();
    for reset in [false, false, true] {
        if reset {
            assert_eq!(
                server.empty_post("/reset_prefix_cache").await.text,
                r#"{"success":true}"#
            );
        }
        let reply = server.post("/v1/completions", &body).await.json();
        cached.push(reply["usage"]["prompt_tokens_details"]["cached_tokens"].clone());
        server.idle().await;
    }
    assert_eq!(cached, [json!(0), json!(48), json!(0)]);

    server.control.set_step_delay(Duration::from_millis(1));
    let running = server.begun().await;
    assert_eq!(
        server.empty_post("/reset_prefix_cache").await.text,
        r#"{"success":false}"#
    );
    let reset = server
        .empty_post("/reset_prefix_cache?reset_running_requests=true")
        .await;
    assert_eq!(reset.text, r#"{"success":true}"#);
    assert!(rest(running).await.contains(r#""finish_reason":"length""#));
    let external = server.empty_post("/reset_prefix_cache?reset_external=1").await;
    assert_eq!(external.text, r#"{"success":false}"#, "there is no external cache");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_aborted_by_the_ids_of_their_responses() {
    let server = dev().start();
    server.control.set_step_delay(Duration::from_millis(5));
    let running = server.begun().await;
    let unknown = server
        .post("/abort_requests", r#"{"request_ids":["cmpl-other"]}"#)
        .await;
    assert_eq!(unknown.text, r#"{"status":"aborted","aborted":0}"#);
    let known = server.post("/abort_requests", r#"{"request_ids":["cmpl-test"]}"#).await;
    assert_eq!(known.text, r#"{"status":"aborted","aborted":1}"#);
    assert!(rest(running).await.contains(r#""finish_reason":"abort""#));
    let (a, b) = (server.begun().await, server.begun().await);
    assert_eq!(server.post("/abort_requests", "{}").await.json()["aborted"], 2);
    assert!(rest(a).await.contains("abort") && rest(b).await.contains("abort"));
    assert_eq!(
        server.post("/abort_requests", r#"{"request_ids":[1]}"#).await.error().2,
        "request_ids"
    );
    assert_eq!(server.post("/abort_requests", "").await.error().1, "Bad Request");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn load_counts_requests_until_their_last_byte() {
    let mut setup = Setup::default();
    setup.server.routes.load_tracking = true;
    let server = Arc::new(setup.start());
    server.control.set_step_delay(Duration::from_millis(5));
    let load = async || server.get("/load").await.text;
    assert_eq!(load().await, r#"{"server_load":0}"#);
    let stream = server.begun().await;
    let whole = tokio::spawn({
        let server = server.clone();
        async move {
            server
                .post("/v1/completions", r#"{"prompt":"b","max_tokens":50,"ignore_eos":true}"#)
                .await
        }
    });
    server.running(2).await;
    assert_eq!(load().await, r#"{"server_load":2}"#);
    assert_eq!(server.post("/tokenize", r#"{"prompt":"b"}"#).await.status, 200);
    assert_eq!(whole.await.unwrap().status, 200);
    assert_eq!(load().await, r#"{"server_load":1}"#);
    drop(stream);
    assert_eq!(load().await, r#"{"server_load":0}"#);

    let untracked = Setup::default().start();
    let stream = untracked.begun().await;
    assert_eq!(untracked.get("/load").await.text, r#"{"server_load":0}"#);
    drop(stream);
}

#[tokio::test]
async fn work_without_progress_is_unhealthy() {
    let server = Setup {
        stall_timeout: Duration::from_millis(20),
        ..Setup::default()
    }
    .start();
    tokio::time::sleep(Duration::from_millis(40)).await;
    assert_eq!(server.get("/health").await.status, 200, "idle is healthy");
    server.control.hold();
    let pending = tokio::spawn(server.router.clone().oneshot(post("/v1/completions", ENDLESS)));
    server.health_becomes(503).await;
    assert_eq!(server.get("/ping").await.status, 503);
    server.control.release();
    drop(pending.await);
    server.health_becomes(200).await;
}

#[tokio::test]
async fn information_is_told_as_vllm_tells_it() {
    let mut setup = dev();
    setup.server.routes.tokenizer_info = true;
    setup.server.routes.environment = vec![("VLLM_LOGGING_LEVEL".into(), "DEBUG".into())];
    setup.info = ServerInfo {
        text: "model  tiny\n".into(),
        config: json!({"model_config": {"model": "tiny"}}),
        system: json!({"os": "linux"}),
        tokenizer: json!({"backend": "tokenizers"}),
    };
    let server = setup.start();
    insta::assert_snapshot!(
        server.get("/server_info").await.text,
        @r#"{"vllm_config":"model  tiny\n","vllm_env":{"VLLM_LOGGING_LEVEL":"DEBUG"},"system_env":{"os":"linux"}}"#
    );
    let as_json = server.get("/server_info?config_format=json").await.json();
    assert_eq!(as_json["vllm_config"], json!({"model_config": {"model": "tiny"}}));
    let error = server.get("/server_info?config_format=xml").await.error();
    assert_eq!(error, (400, "Bad Request".into(), json!("query.config_format")));
    assert_eq!(server.get("/tokenizer_info").await.text, r#"{"backend":"tokenizers"}"#);
    assert_eq!(
        server.get("/get_world_size?include_dp=false").await.text,
        r#"{"world_size":1}"#
    );
    assert_eq!(server.get("/weight_info").await.text, r#"{"weight_version":"default"}"#);
    let renamed = server.post("/update_weight_version", r#"{"new_version":"v2"}"#).await;
    assert_eq!(renamed.text, r#"{"success":true,"new_version":"v2"}"#);
    assert_eq!(server.get("/weight_info").await.text, r#"{"weight_version":"v2"}"#);
}

/// Each refusal: path, body, status, type and the words that name what is refused.
#[tokio::test]
async fn what_cannot_be_done_is_refused_by_name() {
    let mut setup = dev();
    setup.server.routes.lora_updates = true;
    let server = setup.start();
    let cases = [
        (
            "/v1/systemone",
            "{}",
            501,
            "NotImplementedError",
            "structured decisions",
        ),
        (
            "/v1/decisions",
            "{}",
            501,
            "NotImplementedError",
            "structured decisions",
        ),
        (
            "/v1/chat/completions/derender",
            "{}",
            403,
            "PermissionDeniedError",
            "--enable-scale-out",
        ),
        (
            "/v1/messages/render",
            "{}",
            403,
            "PermissionDeniedError",
            "--enable-scale-out",
        ),
        ("/collective_rpc", "{}", 400, "Bad Request", "Missing 'method'"),
        (
            "/collective_rpc",
            r#"{"method":"f"}"#,
            501,
            "NotImplementedError",
            "'f'",
        ),
        ("/collective_rpc", "{", 400, "Bad Request", "JSON decode error"),
        ("/collective_rpc", "[]", 400, "Bad Request", "JSON object"),
        (
            "/init_weight_transfer_engine",
            "{}",
            400,
            "Bad Request",
            "Missing 'init_info'",
        ),
        (
            "/init_weight_transfer_engine",
            r#"{"init_info":{}}"#,
            501,
            "NotImplementedError",
            "checkpoint",
        ),
        (
            "/update_weights",
            r#"{"update_info":{}}"#,
            501,
            "NotImplementedError",
            "checkpoint",
        ),
        ("/start_weight_update", "", 501, "NotImplementedError", "checkpoint"),
        ("/finish_weight_update", "", 501, "NotImplementedError", "checkpoint"),
        ("/update_weight_version", "{}", 400, "Bad Request", "new_version"),
        (
            "/weight_checker",
            r#"{"action":"x"}"#,
            400,
            "Bad Request",
            "checksum|reset|compare",
        ),
        (
            "/weight_checker",
            r#"{"action":"reset"}"#,
            501,
            "NotImplementedError",
            "weights",
        ),
        ("/release_kv_cache_memory", "", 501, "NotImplementedError", "KV cache"),
        (
            "/scale_elastic_ep",
            "{}",
            400,
            "Bad Request",
            "new_data_parallel_size is required",
        ),
        (
            "/scale_elastic_ep",
            r#"{"new_data_parallel_size":0}"#,
            400,
            "Bad Request",
            "positive",
        ),
        (
            "/scale_elastic_ep",
            r#"{"new_data_parallel_size":2}"#,
            400,
            "Bad Request",
            "--enable-elastic-ep",
        ),
        (
            "/v1/load_lora_adapter",
            r#"{"lora_name":"a"}"#,
            400,
            "Bad Request",
            "lora_path",
        ),
        (
            "/v1/load_lora_adapter",
            r#"{"lora_name":"","lora_path":"p"}"#,
            400,
            "InvalidUserInput",
            "must be provided",
        ),
        (
            "/v1/load_lora_adapter",
            r#"{"lora_name":"tiny","lora_path":"p"}"#,
            400,
            "InvalidUserInput",
            "base model",
        ),
        (
            "/v1/load_lora_adapter",
            r#"{"lora_name":"a","lora_path":"p"}"#,
            501,
            "NotImplementedError",
            "LoRA",
        ),
        (
            "/adapters",
            r#"{"name":"a","src":"p"}"#,
            501,
            "NotImplementedError",
            "LoRA",
        ),
        (
            "/v1/unload_lora_adapter",
            r#"{"lora_name":"a"}"#,
            404,
            "NotFoundError",
            "'a' cannot be found",
        ),
    ];
    for (path, body, status, kind, words) in cases {
        let reply = server.post(path, body).await;
        let (found_status, found_kind, _) = reply.error();
        assert_eq!(
            (found_status, found_kind.as_str()),
            (status, kind),
            "{path} {body}: {}",
            reply.text
        );
        assert!(reply.text.contains(words), "{path} {body}: {}", reply.text);
    }
    let delete = Request::delete("/adapters/a").body(Body::empty()).unwrap();
    assert_eq!(server.send(delete).await.status, 404);
    let same_size = server
        .post("/scale_elastic_ep", r#"{"new_data_parallel_size":1}"#)
        .await;
    assert_eq!(same_size.text, r#"{"message":"Scaled to 1 data parallel engines"}"#);
    insta::assert_snapshot!(
        server.empty_post("/is_scaling_elastic_ep").await.text,
        @r#"{"is_scaling_elastic_ep":false,"phase":"idle","epoch":null,"error":null,"requested_data_parallel_size":null}"#
    );
    assert_eq!(server.empty_post("/reset_mm_cache").await.text, "");
    server.empty_post("/pause").await;
    assert_eq!(
        server.post("/weight_checker", r#"{"action":"reset"}"#).await.error().1,
        "Conflict"
    );
}

/// A route exists exactly under its condition; where it does not, the path is as unknown as in vLLM.
#[tokio::test]
async fn routes_exist_under_their_conditions() {
    let bare = |pooling| Setup {
        server: ServerConfig {
            routes: RoutesConfig::default(),
            ..server_config()
        },
        pooling,
        ..Setup::default()
    };
    let (plain, pooling) = (bare(None).start(), bare(Some(pooling::last())).start());
    let mut all = dev();
    all.server.routes = RoutesConfig {
        dev_mode: true,
        lora_updates: true,
        load_tracking: true,
        tokenizer_info: true,
        scale_out: true,
        tokens_only: true,
        docs: true,
        environment: Vec::new(),
    };
    let all = all.start();
    for route in ROUTES {
        let path = route
            .path
            .replace("{*rest}", "x")
            .replace("{response_id}", "x")
            .replace("{adapter_name}", "x");
        // A method that no route has: it finds the route without running it.
        let patch = |server: &Server| {
            let request = Request::patch(&path).body(Body::empty()).unwrap();
            let router = server.router.clone();
            async move { router.oneshot(request).await.unwrap().status().as_u16() }
        };
        let expected = |exists: bool| if exists { 405 } else { 404 };
        let (always, generates) = (route.when == When::Always, route.when == When::Generate);
        let pools = route.when == When::Pooling;
        assert_eq!(patch(&plain).await, expected(always || generates), "{path}");
        assert_eq!(patch(&pooling).await, expected(always || pools), "{path}");
        let possible = !pools && !matches!(route.when, When::Never(_));
        assert_eq!(patch(&all).await, expected(possible), "{path}");
    }
}

#[tokio::test]
async fn the_openapi_document_lists_what_exists() {
    let mut setup = dev();
    setup.server.routes.docs = true;
    let server = setup.start();
    let document = server.get("/openapi.json").await.json();
    assert_eq!(document["openapi"], "3.1.0");
    let paths = document["paths"].as_object().unwrap();
    let documented = |route: &&crate::server::routes::Route| {
        !route.path.contains("{*")
            && !matches!(
                route.when,
                When::Docs | When::Never(_) | When::Pooling | When::LoraUpdates | When::TokenizerInfo
            )
    };
    let expected: Vec<&str> = ROUTES.iter().filter(documented).map(|route| route.path).collect();
    assert_eq!(paths.keys().collect::<Vec<_>>(), expected);
    assert!(paths["/ping"]["get"].is_object() && paths["/ping"]["post"].is_object());
    let chat = &document["components"]["schemas"]["ChatCompletionRequest"]["properties"];
    assert_eq!(chat["temperature"], json!({"type": "number"}));
    assert_eq!(chat["messages"], json!({"type": "array", "items": {}}));
    let reference = &paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"];
    assert_eq!(reference["$ref"], "#/components/schemas/ChatCompletionRequest");
    // Every documented field is one that the parser reads: a value of no JSON type that fits is refused by its name.
    for (field, schema) in chat.as_object().unwrap() {
        let wrong = match schema["type"].as_str() {
            Some("object") => "[]",
            Some(_) => "{}",
            None => continue,
        };
        let body = format!(r#"{{"messages":[{{"role":"user","content":"q"}}],"{field}":{wrong}}}"#);
        let error = server.post("/v1/chat/completions", &body).await.error();
        assert_eq!(error.2, json!(format!("body.{field}")), "{body}");
    }

    for path in ["/docs", "/redoc", "/docs/oauth2-redirect"] {
        let page = server.get(path).await;
        assert!(
            page.headers["content-type"].to_str().unwrap().starts_with("text/html"),
            "{path}"
        );
        let head = server.send(Request::head(path).body(Body::empty()).unwrap()).await;
        assert_eq!((head.status.as_u16(), head.text.as_str()), (200, ""), "{path}");
    }
    let page = server.get("/docs").await.text;
    assert!(page.contains("/v1/chat/completions") && page.contains("<code>temperature</code>"));
    assert!(
        !page.contains("http://") && !page.contains("https://"),
        "nothing from the network"
    );
}
