//! HTTP in, JSON or server-sent events out.
//!
//! An endpoint is a folder `openai/<endpoint>/{mod,types,validate,convert}.rs` (or in `anthropic/`, or a file in `vllm/`) and one
//! line in [`routes::ROUTES`]. Its handler reads a request type, validates it, converts it into what the layer below takes, and turns
//! what comes back into the response type; the full answer is the collected stream.

pub mod anthropic;
pub mod body;
mod ciphers;
pub mod cors;
pub mod error;
pub mod field;
pub mod fields;
pub mod ids;
pub mod listen;
pub mod load;
pub mod middleware;
mod observed;
pub mod openai;
pub mod pooling;
pub mod query;
pub mod routes;
pub mod scale_out;
pub mod sse;
pub mod tls;
pub mod vllm;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use axum::Router;
use axum::extract::OriginalUri;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use tokio::sync::OnceCell;

use crate::chat::ChatEngine;
use crate::config::{ChatConfig, GenerationDefaults, ModelConfig, PoolingConfig, ServerConfig, ServerInfo};
use crate::engine::EngineHandle;
use crate::metrics::Metrics;
use crate::step::LogprobsMode;
use crate::text::{TextEngine, Tokenizer};

/// What the handlers share.
pub struct App {
    pub config: ServerConfig,
    pub chat_config: ChatConfig,
    pub model: ServedModel,
    pub chat: ChatEngine,
    pub metrics: Arc<Metrics>,
    pub info: ServerInfo,
    pub load: load::Load,
    pub control: vllm::control::Control,
    responses: Arc<openai::responses::store::ResponseStore>,
    cors: cors::Cors,
    keys: middleware::Keys,
    /// What turning thinking off means to the template; found out when it is first asked.
    disabled_thinking_effort: OnceCell<&'static str>,
}

/// The model as clients see it.
#[derive(Clone, Debug)]
pub struct ServedModel {
    /// Not empty; the first is the main one.
    pub served_names: Vec<String>,
    /// As the user named it on the command line.
    pub root: String,
    /// Context length in tokens.
    pub max_model_len: usize,
    pub vocab_size: usize,
    pub generation_defaults: GenerationDefaults,
    /// -1 = the vocabulary's size.
    pub max_logprobs: i64,
    pub logprobs_mode: LogprobsMode,
    /// None: it generates.
    pub pooling: Option<PoolingConfig>,
}

impl ServedModel {
    pub fn new(config: &ModelConfig) -> Self {
        Self {
            served_names: config.served_names.clone(),
            root: config.name.clone(),
            max_model_len: config.max_model_len,
            vocab_size: config.vocab_size,
            generation_defaults: config.generation_defaults.clone(),
            max_logprobs: config.max_logprobs,
            logprobs_mode: config.logprobs_mode,
            pooling: config.pooling.clone(),
        }
    }
}

impl App {
    pub fn new(
        config: ServerConfig,
        chat_config: ChatConfig,
        model: ServedModel,
        chat: ChatEngine,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            responses: Arc::default(),
            cors: cors::Cors::new(&config),
            keys: middleware::Keys::new(&config.api_keys),
            disabled_thinking_effort: OnceCell::new(),
            config,
            chat_config,
            model,
            chat,
            metrics,
            info: ServerInfo::default(),
            load: load::Load::default(),
            control: vllm::control::Control::default(),
        }
    }

    /// With what `/server_info` and `/tokenizer_info` tell.
    pub fn with_info(mut self, info: ServerInfo) -> Self {
        self.info = info;
        self
    }

    pub fn text(&self) -> &TextEngine {
        self.chat.text()
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        self.text().tokenizer()
    }

    pub fn engine(&self) -> &EngineHandle {
        self.text().engine()
    }

    /// The name a response carries: the request's, which must be served, else the main one.
    ///
    /// # Errors
    /// 404 for a model that is not served.
    pub fn model_name(&self, requested: Option<&str>) -> Result<&str, error::ApiError> {
        let first = || self.model.served_names.first().map_or("", String::as_str);
        match requested {
            None | Some("") => Ok(first()),
            Some(_) if self.config.any_model_name => Ok(first()),
            Some(name) => self
                .model
                .served_names
                .iter()
                .find(|served| *served == name)
                .map(String::as_str)
                .ok_or_else(|| error::ApiError::model_not_found(name, &self.model.served_names)),
        }
    }
}

/// Runs `work` where blocking is allowed: templates and tokenizing take milliseconds on long prompts.
///
/// # Errors
/// 500: the work panicked.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, error::ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| error::ApiError::internal("Internal server error"))
}

/// Routes whose requests are not measured: probes and scrapers.
const UNMEASURED: [&str; 6] = ["/metrics", "/health", "/load", "/ping", "/version", "/server_info"];

/// The whole HTTP surface. A path with a trailing slash is redirected to the one without.
pub fn router(app: Arc<App>) -> Router {
    let routes = || routes::ROUTES.iter().filter(|route| route.when.holds(&app));
    let paths: Arc<[&'static str]> = routes().map(|route| route.path).collect();
    let inner = routes()
        .fold(Router::new(), |router, route| router.route(route.path, route.handler()))
        .method_not_allowed_fallback(|| async { error::method_not_allowed() })
        .fallback(move |OriginalUri(uri): OriginalUri| async move { unknown_path(&paths, uri.path(), uri.query()) })
        .with_state(app.clone())
        .layer(axum::middleware::from_fn_with_state(app.clone(), middleware::measure));
    wrapped(app, inner)
}

/// The middleware stands around the router: it may change the path before a route is chosen.
fn wrapped(app: Arc<App>, inner: Router) -> Router {
    Router::new().fallback_service(
        tower::ServiceBuilder::new()
            .layer(axum::middleware::from_fn_with_state(app, middleware::around))
            .service(inner),
    )
}

fn unknown_path(paths: &[&str], path: &str, query: Option<&str>) -> Response {
    let Some(known) = path.strip_suffix('/').filter(|path| paths.contains(path)) else {
        return error::not_found();
    };
    let target = query.map_or_else(|| known.to_owned(), |query| format!("{known}?{query}"));
    match HeaderValue::from_str(&target) {
        Ok(target) => (StatusCode::TEMPORARY_REDIRECT, [(header::LOCATION, target)]).into_response(),
        Err(_) => error::not_found(),
    }
}
