//! HTTP in, JSON or server-sent events out.
//!
//! An endpoint is a folder `openai/<endpoint>/{mod,types,validate,convert}.rs` (or a file in `vllm/`) and one line in
//! `ROUTES`. Its handler reads a request type, validates it, converts it into what the layer below takes, and turns
//! what comes back into the response type; the full answer is the collected stream.

pub mod body;
pub mod cors;
pub mod error;
pub mod field;
pub mod ids;
pub mod listen;
pub mod middleware;
pub mod openai;
pub mod sse;
pub mod vllm;

use std::sync::Arc;

use axum::Router;
use axum::extract::OriginalUri;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};

use crate::config::{ModelConfig, ServerConfig};

/// What the handlers share.
pub struct App {
    pub config: ServerConfig,
    pub model: ServedModel,
    pub cors: cors::Cors,
    pub keys: middleware::Keys,
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
}

impl ServedModel {
    pub fn new(config: &ModelConfig) -> Self {
        Self {
            served_names: config.served_names.clone(),
            root: config.name.clone(),
            max_model_len: config.max_model_len,
        }
    }
}

impl App {
    pub fn new(config: ServerConfig, model: ServedModel) -> Self {
        Self {
            cors: cors::Cors::new(&config),
            keys: middleware::Keys::new(&config.api_keys),
            config,
            model,
        }
    }

    /// The name a response carries: the request's, which must be served, else the main one.
    ///
    /// # Errors
    /// 404 for a model that is not served.
    pub fn model_name(&self, requested: Option<&str>) -> Result<&str, error::ApiError> {
        match requested {
            None | Some("") => Ok(self.model.served_names.first().map_or("", String::as_str)),
            Some(name) => self
                .model
                .served_names
                .iter()
                .find(|served| *served == name)
                .map(String::as_str)
                .ok_or_else(|| error::ApiError::model_not_found(name)),
        }
    }
}

/// Every route. A path with a trailing slash is redirected to the one without.
fn routes() -> Vec<(&'static str, MethodRouter<Arc<App>>)> {
    vec![
        ("/v1/models", get(openai::models::list)),
        ("/version", get(vllm::version)),
        ("/load", get(vllm::load)),
    ]
}

/// The whole HTTP surface.
pub fn router(app: Arc<App>) -> Router {
    let routes = routes();
    let paths: Arc<[&'static str]> = routes.iter().map(|(path, _)| *path).collect();
    let inner = routes
        .into_iter()
        .fold(Router::new(), |router, (path, handler)| router.route(path, handler))
        .method_not_allowed_fallback(|| async { error::method_not_allowed() })
        .fallback(move |OriginalUri(uri): OriginalUri| async move { unknown_path(&paths, uri.path(), uri.query()) })
        .with_state(app.clone());
    // The middleware stands around the router: it may change the path before a route is chosen.
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
