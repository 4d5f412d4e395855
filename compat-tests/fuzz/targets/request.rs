//! Request bodies through the whole server on the demo model: any bytes give an answer that is no 5xx, and the engine lives.
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
use rvllm::{serve, server};
use tokio::runtime::Runtime;
use tower::ServiceExt;

/// Where bodies go: the first byte of the input chooses.
const PATHS: [&str; 8] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
    "/invocations",
];

struct Server {
    runtime: Runtime,
    router: Router,
}

/// `rvllm serve demo` without a socket, with a context so short that no request takes long.
fn start() -> Server {
    let flags = ["serve", "demo", "--max-model-len", "96", "--max-num-seqs", "8", "--device", "cpu", "--disable-log-stats"];
    let argv: Vec<String> = flags.iter().map(|flag| (*flag).to_owned()).collect();
    let Ok(Invocation::Serve(args)) = cli::parse(&argv) else { panic!("good flags") };
    let config = resolve::resolve(&args, &Environment::default(), &Machine::probe(Vec::new())).expect("a good configuration");
    let (config, executor) = serve::load(config, &mut serve::Phases::default()).expect("the demo model loads");
    let app = Arc::new(serve::build_app(&config, executor).expect("the demo model's parts fit"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    Server { runtime, router: server::router(app) }
}

fuzz_target!(|data: &[u8]| {
    static SERVER: OnceLock<Server> = OnceLock::new();
    let server = SERVER.get_or_init(start);
    let Some((&which, body)) = data.split_first() else { return };
    let path = PATHS[usize::from(which) % PATHS.len()];
    let request = Request::post(path)
        .header("content-type", "application/json")
        .body(Body::from(body.to_owned()))
        .expect("a request");
    server.runtime.block_on(async {
        let response = server.router.clone().oneshot(request).await.expect("an answer");
        let status = response.status();
        let text = response.into_body().collect().await.expect("a whole body").to_bytes();
        let text = String::from_utf8_lossy(&text);
        assert!(!status.is_server_error(), "{path}: {status}: {text}");
        assert!(!text.contains("panicked") && !text.contains(env!("CARGO_MANIFEST_DIR")), "{path}: {text}");
        let health = Request::get("/health").body(Body::empty()).expect("a request");
        let health = server.router.clone().oneshot(health).await.expect("an answer");
        assert_eq!(health.status(), StatusCode::OK);
    });
});
