//! The HTTP surface in process: the router over the real chat and text layers, on a scripted engine.

mod anthropic;
mod bad_input;
mod chat;
mod completions;
mod fields;
mod http;
mod load;
mod pooling;
mod responses;
mod routes;
mod scale_out;
mod sockets;
mod structured;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Map, Value};
use tower::ServiceExt;

use super::{App, ServedModel, router};
use crate::chat::ChatEngine;
use crate::config::http::HttpConfig;
use crate::config::{
    ChatConfig, GenerationDefaults, ModelFiles, ParserChoice, PoolingConfig, RequestLimits, RoutesConfig, ServerConfig,
    ServerInfo, StructuredOutputsConfig,
};
use crate::engine::EngineHandle;
use crate::engine::scripted::{self, ScriptControl, ScriptedExecutor};
use crate::metrics::Metrics;
use crate::step::{LogprobsMode, TokenId};
use crate::text::tokenizer::Tokenizer;
use crate::text::{TextEngine, TextLimits};

const VOCAB_SIZE: usize = 2048;
const MAX_MODEL_LEN: usize = 512;
/// `<|im_end|>` of the golden checkpoints.
const EOS: TokenId = 1873;

/// What a test's server is made of; the defaults are those of the flags.
struct Setup {
    /// What the model answers to every prompt; EOS follows.
    reply: String,
    server: ServerConfig,
    chat: ChatConfig,
    max_queued_requests: Option<usize>,
    max_num_seqs: usize,
    stall_timeout: Duration,
    info: ServerInfo,
    /// None: the model generates.
    pooling: Option<PoolingConfig>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            reply: "Hello there".into(),
            server: server_config(),
            chat: ChatConfig {
                template: None,
                content_format: None,
                template_kwargs: Map::new(),
                reasoning_effort_map: Default::default(),
                trust_request_template: false,
                reasoning_parser: ParserChoice::Off,
                tool_parser: ParserChoice::Off,
                auto_tool_choice: false,
                exclude_tools_when_none: false,
                response_role: "assistant".into(),
                anthropic_disabled_thinking_effort: None,
                structured_outputs: StructuredOutputsConfig::default(),
            },
            max_queued_requests: None,
            max_num_seqs: 64,
            stall_timeout: Duration::from_secs(300),
            info: ServerInfo::default(),
            pooling: None,
        }
    }
}

fn server_config() -> ServerConfig {
    ServerConfig {
        host: None,
        port: 0,
        http: HttpConfig::default(),
        api_keys: Vec::new(),
        root_path: String::new(),
        allowed_origins: Vec::new(),
        allowed_methods: vec!["*".into()],
        allowed_headers: vec!["*".into()],
        allow_credentials: false,
        enable_request_id_headers: false,
        prompt_tokens_details: false,
        force_include_usage: false,
        return_tokens_as_token_ids: false,
        stream_interval: 1,
        per_request_metrics: false,
        lifecycle_log: false,
        access_log: false,
        access_log_excluded_paths: Vec::new(),
        shutdown_timeout_s: 0,
        sse_keep_alive_s: 0,
        max_body_bytes: 1 << 20,
        request_limits: RequestLimits::DEFAULT,
        any_model_name: false,
        fingerprint: Some("vllm-test".into()),
        responses_store: false,
        routes: RoutesConfig {
            docs: true,
            ..RoutesConfig::default()
        },
    }
}

/// A running server without sockets.
struct Server {
    router: Router,
    engine: EngineHandle,
    control: ScriptControl,
}

impl Setup {
    fn replying(reply: &str) -> Self {
        Self {
            reply: reply.into(),
            ..Self::default()
        }
    }

    fn start(self) -> Server {
        let (app, control) = self.build();
        let engine = app.engine().clone();
        Server {
            router: router(Arc::new(app)),
            engine,
            control,
        }
    }

    fn app(self) -> App {
        self.build().0
    }

    fn build(mut self) -> (App, ScriptControl) {
        let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("compat-tests/goldens/tiny-moe/checkpoint");
        // With tools the template tells today's date, and dates have different numbers of tokens.
        let template = std::fs::read_to_string(checkpoint.join("chat_template.jinja")).unwrap();
        let template = template.replace(r#"strftime_now("%Y-%m-%d")"#, r#""2026-11-25""#);
        self.chat.template.get_or_insert(template);
        let tokenizer = Arc::new(Tokenizer::load(&ModelFiles::Directory(checkpoint)).unwrap());
        let mut reply = tokenizer.encode(&self.reply, false).unwrap();
        reply.push(EOS);
        let mut capacity = scripted::capacity(VOCAB_SIZE);
        capacity.max_num_seqs = self.max_num_seqs;
        let executor = ScriptedExecutor::replying(capacity, move |_| reply.clone());
        let control = executor.control();
        let mut config = scripted::config();
        config.max_model_len = MAX_MODEL_LEN;
        config.scheduler.max_queued_requests = self.max_queued_requests;
        config.stall_timeout = self.stall_timeout;
        let metrics = Arc::new(Metrics::new("tiny", MAX_MODEL_LEN));
        let engine = EngineHandle::start(Box::new(executor), config, metrics.clone()).unwrap();
        let limits = TextLimits {
            max_model_len: MAX_MODEL_LEN,
            vocab_size: VOCAB_SIZE,
            eos: Some(EOS),
            extra_eos: Vec::new(),
        };
        let text = TextEngine::new(engine, tokenizer, limits);
        let chat = ChatEngine::from_config(&self.chat, text).unwrap();
        let model = ServedModel {
            served_names: vec!["tiny".into(), "alias".into()],
            root: "org/tiny".into(),
            max_model_len: MAX_MODEL_LEN,
            vocab_size: VOCAB_SIZE,
            generation_defaults: GenerationDefaults {
                temperature: Some(0.0),
                ..GenerationDefaults::default()
            },
            max_logprobs: 20,
            logprobs_mode: LogprobsMode::RawLogprobs,
            pooling: self.pooling,
        };
        let app = App::new(self.server, self.chat, model, chat, metrics).with_info(self.info);
        (app, control)
    }
}

/// A response, read to its end.
struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The body with times and random ids replaced.
    fn stable(&self) -> String {
        let text = replace_run(&self.text, "\"created\":", |c| c.is_ascii_digit(), "0");
        replace_run(&text, "chatcmpl-tool-", |c| c.is_ascii_hexdigit(), "X")
    }

    fn error(&self) -> (u16, String, Value) {
        let error = &self.json()["error"];
        assert_eq!(error["code"], self.status.as_u16(), "{}", self.text);
        (
            self.status.as_u16(),
            error["type"].as_str().unwrap().to_owned(),
            error["param"].clone(),
        )
    }
}

/// Replaces the characters after each `mark` that satisfy `of_run`.
fn replace_run(text: &str, mark: &str, of_run: impl Fn(char) -> bool, with: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(mark) {
        let (before, after) = rest.split_at(at + mark.len());
        out.push_str(before);
        out.push_str(with);
        rest = after.trim_start_matches(&of_run);
    }
    out + rest
}

impl Server {
    async fn send(&self, request: Request<Body>) -> Reply {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        Reply {
            status: parts.status,
            headers: parts.headers,
            text: String::from_utf8_lossy(&bytes).into_owned(),
        }
    }

    async fn get(&self, path: &str) -> Reply {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    async fn post(&self, path: &str, body: &str) -> Reply {
        self.send(post(path, body)).await
    }

    /// Waits until the engine has nothing to do.
    async fn idle(&self) {
        for _ in 0..500 {
            let stats = self.engine.stats();
            if stats.num_running == 0 && stats.num_waiting == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("requests are still there: {:?}", self.engine.stats());
    }

    /// Waits until as many requests run.
    async fn running(&self, count: usize) {
        for _ in 0..500 {
            if self.engine.stats().num_running >= count {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not {count} requests run: {:?}", self.engine.stats());
    }
}

fn post(path: &str, body: &str) -> Request<Body> {
    Request::post(path)
        .header("content-type", "application/json")
        .header("x-request-id", "test")
        .body(Body::from(body.to_owned()))
        .unwrap()
}
