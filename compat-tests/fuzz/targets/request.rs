//! Request bodies through the whole server on the demo model: any bytes, to any route that takes a body, give an answer or an error in
//! the route's protocol, and the engine lives.
#![no_main]

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use http_body_util::BodyExt;
use libfuzzer_sys::fuzz_target;
use rvllm::cli::{self, Invocation};
use rvllm::config::args::Machine;
use rvllm::config::environment::Environment;
use rvllm::config::resolve;
use rvllm::server::routes::{ROUTES, When};
use rvllm::{serve, server};
use serde_json::Value;
use tokio::runtime::Runtime;
use tower::ServiceExt;

/// Where bodies go: the first byte of the input chooses. New ones stand at the end, for the seeds' first bytes.
const PATHS: [(&str, Runner); 33] = [
    ("/v1/chat/completions", Generate),
    ("/v1/completions", Generate),
    ("/v1/responses", Generate),
    ("/v1/messages", Generate),
    ("/v1/messages/count_tokens", Generate),
    ("/tokenize", Generate),
    ("/detokenize", Generate),
    ("/invocations", Generate),
    ("/v1/chat/completions/batch", Generate),
    ("/generative_scoring", Generate),
    ("/inference/v1/generate", Generate),
    ("/v1/chat/completions/render", Generate),
    ("/v1/completions/render", Generate),
    ("/v1/embeddings", Pooling),
    ("/v2/embed", Pooling),
    ("/pooling", Pooling),
    ("/score", Pooling),
    ("/v1/score", Pooling),
    ("/rerank", Pooling),
    ("/v1/rerank", Pooling),
    ("/v2/rerank", Pooling),
    ("/invocations", Pooling),
    ("/v1/load_lora_adapter", Generate),
    ("/v1/unload_lora_adapter", Generate),
    ("/adapters", Generate),
    ("/inference/v1/abort_requests", Generate),
    ("/scale_elastic_ep", Generate),
    ("/v1/responses/x/cancel", Generate),
    ("/v1/systemone", Generate),
    ("/v1/messages/render", Generate),
    ("/tokenize", Pooling),
    ("/detokenize", Pooling),
    ("/ping", Generate),
];
/// Routes that never look at the body: another of their handler is above.
const SAME_HANDLER: [&str; 5] = [
    "/v1/decisions",
    "/v1/responses/render",
    "/v1/chat/completions/derender",
    "/v1/completions/derender",
    "/is_scaling_elastic_ep",
];

#[derive(Clone, Copy)]
enum Runner {
    Generate,
    Pooling,
}
use Runner::{Generate, Pooling};

struct Server {
    runtime: Runtime,
    generate: Router,
    pooling: Router,
}

/// Two servers without sockets, with a context so short that no request takes long.
fn start() -> Server {
    // Development routes put the engine to sleep, for the next input too; all others are fed.
    for route in ROUTES {
        let fed = |path: &str| path == route.path.replace("{response_id}", "x");
        let out = matches!(route.when, When::Never(_) | When::DevMode | When::DevModeOrTokensOnly);
        assert!(
            out || !route.methods.contains("POST") || SAME_HANDLER.contains(&route.path) || PATHS.iter().any(|&(path, _)| fed(path)),
            "{} is not in PATHS",
            route.path
        );
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    Server { runtime, generate: router("generate"), pooling: router("pooling") }
}

/// `rvllm serve demo`.
fn router(runner: &str) -> Router {
    let flags = "serve demo --max-model-len 96 --max-num-seqs 8 --device cpu --disable-log-stats --enable-scale-out --runner";
    let argv: Vec<String> = flags.split(' ').chain([runner]).map(str::to_owned).collect();
    let Ok(Invocation::Serve(args)) = cli::parse(&argv) else { panic!("good flags") };
    let on = ["VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_ENABLE_RESPONSES_API_STORE"];
    let environment: Environment = on.iter().map(|name| ((*name).to_owned(), "1".to_owned())).collect();
    let config = resolve::resolve(&args, &environment, &Machine::probe(Vec::new())).expect("a good configuration");
    let (config, executor) = serve::load(config, &mut serve::Phases::default()).expect("the demo model loads");
    let app = Arc::new(serve::build_app(&config, executor).expect("the demo model's parts fit"));
    server::router(app)
}

/// OpenAI's envelope, or Anthropic's below `/v1/messages`; a body that cannot be read is an error of the server's own everywhere.
fn check_error(path: &str, status: StatusCode, text: &str) {
    let body: Value = serde_json::from_str(text).unwrap_or_else(|_| panic!("{path}: {status}: no JSON: {text}"));
    let error = &body["error"];
    let [message, kind] = ["message", "type"].map(|name| error[name].as_str().unwrap_or_default());
    assert!(!message.is_empty() && !kind.is_empty(), "{path}: {status}: {text}");
    let anthropic = matches!(path, "/v1/messages" | "/v1/messages/count_tokens") && kind != "Bad Request";
    if anthropic {
        assert_eq!(body["type"], "error", "{path}: {text}");
    } else {
        assert_eq!(error["code"], status.as_u16(), "{path}: {text}");
    }
}

fuzz_target!(|data: &[u8]| {
    static SERVER: OnceLock<Server> = OnceLock::new();
    let server = SERVER.get_or_init(start);
    let Some((&which, body)) = data.split_first() else { return };
    let (path, runner) = PATHS[usize::from(which) % PATHS.len()];
    let router = match runner {
        Generate => &server.generate,
        Pooling => &server.pooling,
    };
    let request = Request::post(path)
        .header("content-type", "application/json")
        .body(Body::from(body.to_owned()))
        .expect("a request");
    server.runtime.block_on(async {
        let response = router.clone().oneshot(request).await.expect("an answer");
        let status = response.status();
        let text = response.into_body().collect().await.expect("a whole body").to_bytes();
        let text = String::from_utf8_lossy(&text);
        // 501 is the refusal of what this server never does.
        assert!(!status.is_server_error() || status == StatusCode::NOT_IMPLEMENTED, "{path}: {status}: {text}");
        if !status.is_success() {
            check_error(path, status, &text);
        }
        assert!(!text.contains(r#""code":500"#), "a stream that fails: {path}: {text}");
        assert!(!text.contains("panicked") && !text.contains(env!("CARGO_MANIFEST_DIR")), "{path}: {text}");
        let health = Request::get("/health").body(Body::empty()).expect("a request");
        let health = router.clone().oneshot(health).await.expect("an answer");
        assert_eq!(health.status(), StatusCode::OK);
    });
});
