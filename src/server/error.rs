//! Errors as HTTP: the only file that knows which status belongs to whose fault, and vLLM's envelopes.
//!
//! | envelope | used for |
//! |---|---|
//! | `{"error":{"message","type","param","code"}}` | every route that answers in OpenAI's style |
//! | `{"type":"error","error":{"type","message"}}` | Anthropic's routes, once the body could be read |
//! | `{"error":"Unauthorized"}` | the API key |
//! | `{"detail":"Not Found"}` | unknown path, wrong method |

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::chat::ChatError;
use crate::engine::EngineError;
use crate::grammar::GrammarError;
use crate::text::TextError;

/// The class of errors found while reading the body. They have OpenAI's envelope on every route, as in vLLM.
const READING: &str = "Bad Request";

/// Seconds after which an overloaded server may be asked again.
const RETRY_AFTER_S: &str = "1";

/// An answer that is not 2xx, in OpenAI's envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    pub status: StatusCode,
    /// vLLM's word for the class: `Bad Request` from reading the body, `BadRequestError` from a rule.
    pub kind: &'static str,
    pub message: String,
    /// The request field at fault.
    pub param: Option<String>,
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: Info<'a>,
}

#[derive(Serialize)]
struct Info<'a> {
    message: &'a str,
    r#type: &'a str,
    param: Option<&'a str>,
    code: u16,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl AsRef<str>, param: Option<String>) -> Self {
        Self {
            status,
            kind,
            message: sanitised(message.as_ref()),
            param,
        }
    }

    /// A rule is broken and no single field is at fault.
    pub fn bad_request(message: impl AsRef<str>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequestError", message, None)
    }

    /// A rule about `param` is broken.
    pub fn invalid(param: &str, message: impl AsRef<str>) -> Self {
        let message = format!("{} (parameter={param})", message.as_ref());
        Self::new(
            StatusCode::BAD_REQUEST,
            "BadRequestError",
            message,
            Some(param.to_owned()),
        )
    }

    /// A rule about `param` is broken by `value`.
    pub fn invalid_value(param: &str, message: impl AsRef<str>, value: impl std::fmt::Display) -> Self {
        let message = format!("{} (parameter={param}, value={value})", message.as_ref());
        Self::new(
            StatusCode::BAD_REQUEST,
            "BadRequestError",
            message,
            Some(param.to_owned()),
        )
    }

    /// vLLM honours the field and this server does not.
    pub fn unsupported(param: &str) -> Self {
        Self::invalid(param, format!("`{param}` is not supported by this server yet"))
    }

    /// The body could not be read as the request's type. `location` lies below `body`.
    pub fn validation(code: &str, location: &[String], message: &str) -> Self {
        Self::validation_in("body", code, location, message)
    }

    /// A parameter of the query string could not be read.
    pub fn invalid_query(name: &str, code: &str, message: &str) -> Self {
        Self::validation_in("query", code, &[name.to_owned()], message)
    }

    fn validation_in(part: &str, code: &str, location: &[String], message: &str) -> Self {
        let mut path = String::from(part);
        let mut quoted = format!("'{part}'");
        for part in location {
            path.push('.');
            path.push_str(part);
            if part.parse::<u64>().is_ok() {
                quoted.push_str(&format!(", {part}"));
            } else {
                quoted.push_str(&format!(", '{part}'"));
            }
        }
        if location.is_empty() {
            quoted.push(',');
        }
        let message = format!("1 validation error:\n  {{'type': '{code}', 'loc': ({quoted}), 'msg': '{message}'}}");
        Self::new(StatusCode::BAD_REQUEST, READING, message, Some(path))
    }

    /// A required field is absent.
    pub fn missing(field: &str) -> Self {
        Self::validation("missing", &[field.to_owned()], "Field required")
    }

    pub fn unsupported_media_type() -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            READING,
            "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed",
            None,
        )
    }

    pub fn body_too_large(limit_bytes: usize) -> Self {
        let message = format!("the request body is larger than {limit_bytes} bytes");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "Request Entity Too Large", message, None)
    }

    /// The body stopped arriving.
    pub fn body_timeout() -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "Request Timeout",
            "the request body did not arrive in time",
            None,
        )
    }

    /// The connection broke, or the chunked encoding is wrong, while the body was read.
    pub fn body_broken() -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            READING,
            "the request body could not be read",
            None,
        )
    }

    pub fn model_not_found(model: &str, served: &[String]) -> Self {
        let message = format!(
            "The model `{}` does not exist. Served here: {}.",
            shortened(model),
            served.join(", ")
        );
        Self::new(
            StatusCode::NOT_FOUND,
            "NotFoundError",
            message,
            Some("model".to_owned()),
        )
    }

    /// vLLM's class for a LoRA request that makes no sense.
    pub fn invalid_user_input(message: impl AsRef<str>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "InvalidUserInput", message, None)
    }

    pub fn adapter_not_found(name: &str) -> Self {
        let message = format!("The lora adapter '{}' cannot be found.", shortened(name));
        Self::new(StatusCode::NOT_FOUND, "NotFoundError", message, None)
    }

    /// What vLLM's handlers raise as an HTTP error: the class is the status' own phrase.
    pub fn plain(status: StatusCode, message: impl AsRef<str>) -> Self {
        Self::new(status, status.canonical_reason().unwrap_or("Error"), message, None)
    }

    /// The route exists and needs a flag.
    pub fn permission_denied(message: impl AsRef<str>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "PermissionDeniedError", message, None)
    }

    /// The route exists and this model or this server cannot answer it.
    pub fn not_implemented(message: impl AsRef<str>) -> Self {
        Self::new(StatusCode::NOT_IMPLEMENTED, "NotImplementedError", message, None)
    }

    /// OpenAI's word for a client's fault, which vLLM keeps for stored responses.
    pub fn invalid_request(param: &str, message: impl AsRef<str>) -> Self {
        Self::new(
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            message,
            Some(param.to_owned()),
        )
    }

    pub fn response_not_found(id: &str) -> Self {
        let message = format!("Response with id '{}' not found.", shortened(id));
        Self {
            status: StatusCode::NOT_FOUND,
            ..Self::invalid_request("response_id", message)
        }
    }

    pub fn internal(message: impl AsRef<str>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalServerError", message, None)
    }

    /// The envelope as JSON text, as in-stream frames carry it.
    pub fn to_json(&self) -> String {
        let envelope = Envelope {
            error: Info {
                message: &self.message,
                r#type: self.kind,
                param: self.param.as_deref(),
                code: self.status.as_u16(),
            },
        };
        serde_json::to_string(&envelope).unwrap_or_else(|_| r#"{"error":{"message":"","type":"","code":500}}"#.into())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        answer(self.status, &self.message, self.to_json())
    }
}

/// Logs a bug or a failed device (501 and 503 are answers), and tells an overloaded server's clients when to come back.
fn answer(status: StatusCode, message: &str, body: String) -> Response {
    if status == StatusCode::INTERNAL_SERVER_ERROR {
        tracing::error!(status = status.as_u16(), "{message}");
    }
    let mut response = json(status, body);
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_S));
    }
    response
}

/// The same in Anthropic's envelope, for `/v1/messages` and below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnthropicError(pub ApiError);

impl AnthropicError {
    /// Anthropic's word for the status.
    fn kind(&self) -> &'static str {
        match self.0.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        }
    }

    /// The envelope, as `event: error` carries it too.
    pub fn to_value(&self) -> serde_json::Value {
        serde_json::json!({"type": "error", "error": {"type": self.kind(), "message": self.0.message}})
    }
}

impl IntoResponse for AnthropicError {
    fn into_response(self) -> Response {
        if self.0.kind == READING {
            return self.0.into_response();
        }
        answer(self.0.status, &self.0.message, self.to_value().to_string())
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::Overloaded(_) | EngineError::ShuttingDown => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "Service Unavailable",
                error.to_string(),
                None,
            ),
            EngineError::Paused => Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "ServiceUnavailableError",
                error.to_string(),
                None,
            ),
            EngineError::Invalid { param, message } => Self::invalid(param, message),
            EngineError::Constraint(message) => Self::bad_request(message),
            EngineError::Device(_) | EngineError::Stopped => Self::internal(error.to_string()),
        }
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        match error {
            // The message names the parameter and its value already.
            TextError::Invalid { param, message } => Self::new(
                StatusCode::BAD_REQUEST,
                "BadRequestError",
                message,
                param.map(str::to_owned),
            ),
            TextError::Grammar(GrammarError::Invalid(message)) => Self::bad_request(message),
            TextError::Grammar(GrammarError::Busy) => EngineError::Overloaded(error.to_string()).into(),
            TextError::Engine(error) => error.into(),
        }
    }
}

impl From<ChatError> for ApiError {
    fn from(error: ChatError) -> Self {
        match error {
            ChatError::Text(error) => error.into(),
            ChatError::Invalid(message) => Self::bad_request(message),
            ChatError::Internal(_) => Self::internal(error.to_string()),
        }
    }
}

/// A JSON body that is already text.
pub fn json(status: StatusCode, body: String) -> Response {
    (
        status,
        [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))],
        body,
    )
        .into_response()
}

pub fn unauthorized() -> Response {
    json(StatusCode::UNAUTHORIZED, r#"{"error":"Unauthorized"}"#.to_owned())
}

pub fn not_found() -> Response {
    json(StatusCode::NOT_FOUND, r#"{"detail":"Not Found"}"#.to_owned())
}

pub fn method_not_allowed() -> Response {
    json(
        StatusCode::METHOD_NOT_ALLOWED,
        r#"{"detail":"Method Not Allowed"}"#.to_owned(),
    )
}

/// What a client may see of its own long input.
pub fn shortened(text: &str) -> String {
    const LIMIT: usize = 200;
    match text.char_indices().nth(LIMIT) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// Roots of absolute paths that must not leave the machine.
const PATH_ROOTS: [&str; 13] = [
    "/home/", "/usr/", "/opt/", "/var/", "/tmp/", "/root/", "/lib/", "/lib64/", "/mnt/", "/srv/", "/etc/", "/proc/",
    "/data/",
];

/// Replaces absolute paths by `<path>` and memory addresses by `<address>`.
fn sanitised(message: &str) -> String {
    let mut out = String::with_capacity(message.len());
    let mut rest = message;
    let mut at_word_start = true;
    while let Some(first) = rest.chars().next() {
        if at_word_start && PATH_ROOTS.iter().any(|root| rest.starts_with(root)) {
            let end = rest
                .find(|c: char| c.is_whitespace() || matches!(c, '\'' | '"' | '`' | ')' | ']' | '}' | ',' | ';'))
                .unwrap_or(rest.len());
            out.push_str("<path>");
            rest = &rest[end..];
            at_word_start = false;
            continue;
        }
        if at_word_start && rest.starts_with("0x") {
            let digits = rest[2..]
                .find(|c: char| !c.is_ascii_hexdigit())
                .unwrap_or(rest.len() - 2);
            if digits >= 6 {
                out.push_str("<address>");
                rest = &rest[2 + digits..];
                at_word_start = false;
                continue;
            }
        }
        out.push(first);
        at_word_start = !first.is_alphanumeric() && first != '/';
        rest = &rest[first.len_utf8()..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envelope_has_vllm_keys_in_order() {
        let error = ApiError::invalid_value("temperature", "must be non-negative", -1);
        assert_eq!(
            error.to_json(),
            r#"{"error":{"message":"must be non-negative (parameter=temperature, value=-1)","type":"BadRequestError","param":"temperature","code":400}}"#
        );
        let error = ApiError::validation("missing", &["messages".into(), "0".into()], "Field required");
        assert_eq!(error.param.as_deref(), Some("body.messages.0"));
        assert!(
            error
                .message
                .starts_with("1 validation error:\n  {'type': 'missing', 'loc': ('body', 'messages', 0)")
        );
    }

    #[test]
    fn messages_name_no_path_and_no_address() {
        assert_eq!(sanitised("open /home/me/x.json (no)"), "open <path> (no)");
        assert_eq!(sanitised("at '/tmp/a b' 0x7f12ab34cd"), "at '<path> b' <address>");
        assert_eq!(sanitised("a/usr/b and 0x12 stay"), "a/usr/b and 0x12 stay");
    }

    #[test]
    fn whose_fault_decides_the_status() {
        let cases = [
            (
                ApiError::from(EngineError::Overloaded("full".into())),
                503,
                "Service Unavailable",
            ),
            (
                ApiError::from(EngineError::Device("k".into())),
                500,
                "InternalServerError",
            ),
            (ApiError::from(EngineError::Stopped), 500, "InternalServerError"),
            (ApiError::from(EngineError::Paused), 503, "ServiceUnavailableError"),
            (
                ApiError::from(TextError::Invalid {
                    param: Some("prompt"),
                    message: "m".into(),
                }),
                400,
                "BadRequestError",
            ),
        ];
        for (error, status, kind) in cases {
            assert_eq!((error.status.as_u16(), error.kind), (status, kind));
        }
        let overloaded = ApiError::from(EngineError::Overloaded("full".into()));
        assert_eq!(AnthropicError(overloaded.clone()).kind(), "overloaded_error");
        for response in [
            overloaded.clone().into_response(),
            AnthropicError(overloaded).into_response(),
        ] {
            assert_eq!(response.headers()["retry-after"], "1");
        }
    }
}
