//! HTTP for the subcommands that talk to a server: keep-alive connections, JSON in, JSON or server-sent events out.
//!
//! Made to cost little: one connection pool, bodies as bytes, events cut out of the frames as they arrive, so that the load
//! generator on the machine of the server that it measures takes little from it.

mod sse;

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde_json::Value;

use sse::EventParser;

/// Idle time after which a connection is not trusted any more: less than servers keep them.
const IDLE: Duration = Duration::from_secs(3);
/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(30);
/// Most of an error's body that is shown.
const MAX_ERROR_BYTES: usize = 2000;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("'{0}' is no http or https address")]
    Url(String),
    #[error("'{0}' is no HTTP header")]
    Header(String),
    #[error("{url}: {message}")]
    Connection { url: String, message: String },
    #[error("{status}: {body}")]
    Status { status: StatusCode, body: String },
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("the answer is not the JSON that was expected: {0}")]
    Json(String),
}

impl ClientError {
    fn broken(error: impl std::error::Error) -> Self {
        Self::Broken(chain(&error))
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// A client with its connections. Clones share them.
#[derive(Clone, Debug)]
pub struct Client {
    inner: legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    headers: HeaderMap,
}

impl Client {
    /// Sends `headers` and, with `api_key`, a bearer token with every request. The later of two headers of one name stands.
    ///
    /// # Errors
    /// A header is none.
    pub fn new(api_key: Option<&str>, headers: &[(String, String)]) -> Result<Self, ClientError> {
        let mut map = HeaderMap::new();
        if let Some(key) = api_key {
            let value = HeaderValue::from_str(&format!("Bearer {key}"));
            map.insert(
                AUTHORIZATION,
                value.map_err(|_| ClientError::Header("Authorization".into()))?,
            );
        }
        for (name, value) in headers {
            let wrong = || ClientError::Header(name.clone());
            let header = HeaderName::try_from(name.as_str()).map_err(|_| wrong())?;
            map.insert(header, HeaderValue::from_str(value).map_err(|_| wrong())?);
        }
        let mut http = HttpConnector::new();
        http.set_nodelay(true);
        http.enforce_http(false);
        http.set_connect_timeout(Some(CONNECT));
        let connector = HttpsConnectorBuilder::new()
            .with_webpki_roots()
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        let inner = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .build(connector);
        Ok(Self { inner, headers: map })
    }

    /// `GET url`, read as JSON.
    ///
    /// # Errors
    /// No answer, a status that is not 2xx, or no JSON.
    pub async fn get_json(&self, url: &str) -> Result<Value, ClientError> {
        self.send(Method::GET, url, Bytes::new(), None).await?.json().await
    }

    /// `POST url` with JSON, read as JSON.
    ///
    /// # Errors
    /// As [`get_json`](Self::get_json).
    pub async fn post_json(&self, url: &str, body: &Value) -> Result<Value, ClientError> {
        self.post(url, body.to_string().into(), None).await?.json().await
    }

    /// `POST url` with a JSON body; the answer's body is not read yet.
    ///
    /// # Errors
    /// No answer, or a status that is not 2xx; the error has the body's beginning.
    pub async fn post(&self, url: &str, body: Bytes, request_id: Option<&str>) -> Result<Reply, ClientError> {
        self.send(Method::POST, url, body, request_id).await
    }

    async fn send(&self, method: Method, url: &str, body: Bytes, id: Option<&str>) -> Result<Reply, ClientError> {
        let uri: Uri = url.parse().map_err(|_| ClientError::Url(url.to_owned()))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            return Err(ClientError::Url(url.to_owned()));
        }
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = uri;
        *request.headers_mut() = self.headers.clone();
        let headers = request.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(id) = id {
            let value = HeaderValue::from_str(id).map_err(|_| ClientError::Header("X-Request-Id".into()))?;
            headers.insert(HeaderName::from_static("x-request-id"), value);
        }
        let response = self
            .inner
            .request(request)
            .await
            .map_err(|error| ClientError::Connection {
                url: url.to_owned(),
                message: chain(&error),
            })?;
        let status = response.status();
        let reply = Reply {
            body: response.into_body(),
        };
        if status.is_success() {
            return Ok(reply);
        }
        let bytes = reply.bytes().await.unwrap_or_default();
        let shown = &bytes[..bytes.len().min(MAX_ERROR_BYTES)];
        Err(ClientError::Status {
            status,
            body: String::from_utf8_lossy(shown).into_owned(),
        })
    }
}

/// An answer of 2xx.
#[derive(Debug)]
pub struct Reply {
    body: Incoming,
}

impl Reply {
    async fn bytes(self) -> Result<Bytes, ClientError> {
        Ok(self.body.collect().await.map_err(ClientError::broken)?.to_bytes())
    }

    /// The whole body as JSON.
    ///
    /// # Errors
    /// The connection broke, or it is no JSON.
    pub async fn json(self) -> Result<Value, ClientError> {
        serde_json::from_slice(&self.bytes().await?).map_err(|error| ClientError::Json(error.to_string()))
    }

    /// The body as server-sent events.
    pub fn events(self) -> Events {
        Events {
            body: self.body,
            parser: EventParser::default(),
        }
    }
}

/// The data of server-sent events, as they arrive.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    parser: EventParser,
}

impl Events {
    /// The next event's data; none at the end. Comments are left out.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            if let Some(data) = self.parser.next_event() {
                return Ok(Some(data));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame.map_err(ClientError::broken)?.into_data() {
                        self.parser.push(data);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_and_headers_are_checked_before_anything_is_sent() {
        let client = Client::new(Some("key"), &[("X-A".into(), "1".into())]).unwrap();
        assert_eq!(client.headers[AUTHORIZATION], "Bearer key");
        assert_eq!(client.headers["x-a"], "1");
        for url in ["ftp://h/x", "localhost:8000", "/v1", "http://"] {
            assert!(matches!(client.get_json(url).await, Err(ClientError::Url(_))), "{url}");
        }
        assert!(matches!(Client::new(Some("a\nb"), &[]), Err(ClientError::Header(_))));
        assert!(matches!(
            Client::new(None, &[("a b".into(), "c".into())]),
            Err(ClientError::Header(_))
        ));
        let refused = client.get_json("http://127.0.0.1:1/x").await.unwrap_err();
        assert!(matches!(refused, ClientError::Connection { .. }), "{refused}");
    }
}
