//! What every request passes: root path, CORS, API key, request id, access log, and a 500 where a handler panicked.

use std::io::Write;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::uri::PathAndQuery;
use axum::http::{HeaderMap, HeaderValue, Method, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::FutureExt;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::error::{self, ApiError};
use super::observed::{Observation, observe};
use super::{App, UNMEASURED, routes};
use crate::otlp::{self, TRACE_PARENT, TRACE_STATE, TraceContext};

pub const REQUEST_ID: &str = "x-request-id";

/// Who sent the request; put into its extensions by `listen.rs`.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// The outermost layer: wraps the router, so that it also sees unknown paths.
pub async fn around(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    strip_root_path(&app.config.root_path, request.uri_mut());
    let path = request.uri().path();
    let logged = app.config.access_log
        && !app
            .config
            .access_log_excluded_paths
            .iter()
            .any(|excluded| excluded == path);
    let log = logged.then(|| access_line_start(&request));
    let request_headers = request.headers().clone();

    let mut response = if let Some(response) = app.cors.preflight(request.method(), &request_headers) {
        response
    } else if app.keys.refuse(&request) {
        error::unauthorized()
    } else {
        // HEAD is a method of its own here: few routes answer it.
        if request.method() == Method::HEAD && !routes::answers_head(request.uri().path()) {
            *request.method_mut() = Method::TRACE;
        }
        let answer = otlp::in_context(trace_context(&request_headers), next.run(request));
        match AssertUnwindSafe(answer).catch_unwind().await {
            Ok(response) => response,
            Err(panic) => {
                tracing::error!("a handler panicked: {}", panic_message(panic.as_ref()));
                ApiError::internal("Internal server error").into_response()
            }
        }
    };

    app.cors.mark(&request_headers, response.headers_mut());
    if app.config.enable_request_id_headers {
        response.headers_mut().insert(REQUEST_ID, response_id(&request_headers));
    }
    if let Some(start) = log {
        let status = response.status();
        let reason = status.canonical_reason().unwrap_or("");
        // A log that cannot be written, on a full disk perhaps, is no reason to fail a request.
        let _ = writeln!(std::io::stdout(), "{start} {} {reason}", status.as_u16());
    }
    response
}

/// The caller's place in its trace; none without valid headers.
fn trace_context(headers: &HeaderMap) -> Option<TraceContext> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    TraceContext::parse(text(TRACE_PARENT)?, text(TRACE_STATE))
}

/// Inside the router, where the route is known: counts and times requests under vLLM's names.
pub async fn measure(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map(|path| path.as_str().to_owned());
    let method = method_label(request.method());
    let request_bytes = content_length(request.headers());
    let start = Instant::now();
    let in_flight =
        (app.config.routes.load_tracking && route.as_deref().is_some_and(routes::is_tracked)).then(|| app.load.enter());
    let response = next.run(request).await;
    let response = match in_flight {
        Some(in_flight) => in_flight.until_end_of(response),
        None => response,
    };
    let handler = route.unwrap_or_else(|| "none".to_owned());
    if UNMEASURED.iter().any(|path| handler.starts_with(path)) {
        return response;
    }
    let observation = Observation {
        handler,
        method,
        status: response.status().as_u16(),
        start,
        request_bytes,
        response_bytes: content_length(response.headers()),
        app,
    };
    observe(response, observation)
}

/// Clients can invent methods; a metric's labels must stay few. HEAD arrives here as TRACE, see [`around`].
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::TRACE => "HEAD",
        _ => "OTHER",
    }
}

/// 0 where the length is not known beforehand.
fn content_length(headers: &HeaderMap) -> u64 {
    headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .unwrap_or(0)
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

/// Requests with and without the `--root-path` prefix both work.
fn strip_root_path(root_path: &str, uri: &mut Uri) {
    let root = root_path.trim_end_matches('/');
    if root.is_empty() {
        return;
    }
    let Some(rest) = uri.path().strip_prefix(root) else {
        return;
    };
    if !rest.starts_with('/') {
        return;
    }
    let path_and_query = match uri.query() {
        Some(query) => format!("{rest}?{query}"),
        None => rest.to_owned(),
    };
    if let Ok(path_and_query) = path_and_query.parse::<PathAndQuery>() {
        *uri = Uri::from(path_and_query);
    }
}

fn response_id(request: &HeaderMap) -> HeaderValue {
    request.get(REQUEST_ID).cloned().unwrap_or_else(|| {
        let id = uuid::Uuid::new_v4().simple().to_string();
        HeaderValue::from_str(&id).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
    })
}

/// uvicorn's access line up to the status.
fn access_line_start(request: &Request) -> String {
    // uvicorn shows nobody where there is no address, on a Unix socket.
    let peer = request
        .extensions()
        .get::<Peer>()
        .map_or_else(String::new, |Peer(address)| address.to_string());
    let target = request.uri().path_and_query().map_or("/", PathAndQuery::as_str);
    format!(
        "INFO:     {peer} - \"{} {target} {:?}\"",
        request.method(),
        request.version()
    )
}

/// The API keys, hashed: a comparison takes the same time whatever was sent.
#[derive(Clone, Debug, Default)]
pub struct Keys(Vec<[u8; 32]>);

impl Keys {
    pub fn new(keys: &[String]) -> Self {
        Self(keys.iter().map(|key| Sha256::digest(key.as_bytes()).into()).collect())
    }

    /// Whether the request needs a key and has none that fits. The path is what the router matches, undecoded.
    fn refuse(&self, request: &Request) -> bool {
        !self.0.is_empty()
            && request.method() != Method::OPTIONS
            && routes::needs_key(request.uri().path())
            && !sent_keys(request.headers()).any(|key| self.contains(key))
    }

    fn contains(&self, sent: &[u8]) -> bool {
        let sent: [u8; 32] = Sha256::digest(sent).into();
        self.0
            .iter()
            .fold(subtle::Choice::from(0), |found, key| found | key.ct_eq(&sent))
            .into()
    }
}

/// `Authorization: Bearer <key>`, and Anthropic's `x-api-key`, which vLLM does not accept.
fn sent_keys(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
    });
    bearer
        .into_iter()
        .chain(headers.get("x-api-key").map(HeaderValue::as_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::Body;

    fn request(path: &str, headers: &[(&str, &str)]) -> Request {
        let mut builder = Request::builder().uri(path);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(Body::empty()).unwrap()
    }

    #[test]
    fn guarded_paths_need_a_key() {
        let keys = Keys::new(&["one".into(), "two".into()]);
        for (path, headers, refused) in [
            ("/v1/models", &[][..], true),
            ("/v1/unknown", &[], true),
            ("/invocations", &[], true),
            ("/invocations/x", &[], true),
            ("/health", &[], false),
            ("/tokenize", &[], false),
            ("/v1/models", &[("authorization", "Bearer two")], false),
            ("/v1/models", &[("authorization", "bEARER one")], false),
            ("/v1/models", &[("authorization", "Bearer")], true),
            ("/v1/models", &[("authorization", "Basic one")], true),
            ("/v1/models", &[("authorization", "Bearer three")], true),
            ("/v1/models", &[("x-api-key", "one")], false),
        ] {
            assert_eq!(keys.refuse(&request(path, headers)), refused, "{path} {headers:?}");
        }
        assert!(!Keys::default().refuse(&request("/v1/models", &[])));
    }

    #[test]
    fn the_root_path_is_removed_only_at_a_border() {
        for (root, path, expected) in [
            ("/p", "/p/v1/models?a=1", "/v1/models?a=1"),
            ("/p/", "/p/health", "/health"),
            ("/p", "/px/v1", "/px/v1"),
            ("/p", "/v1/models", "/v1/models"),
            ("", "/v1/models", "/v1/models"),
        ] {
            let mut uri: Uri = path.parse().unwrap();
            strip_root_path(root, &mut uri);
            assert_eq!(uri.to_string(), expected);
        }
    }

    #[test]
    fn the_access_line_is_uvicorns() {
        let mut request = request("/v1/models?x=1", &[]);
        request.extensions_mut().insert(Peer("1.2.3.4:5".parse().unwrap()));
        assert_eq!(
            access_line_start(&request),
            r#"INFO:     1.2.3.4:5 - "GET /v1/models?x=1 HTTP/1.1""#
        );
    }
}
