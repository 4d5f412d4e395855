//! Request bodies: JSON of a bounded size, read into a request type, with every failure as vLLM's error.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use serde::de::DeserializeOwned;
use serde_json::error::Category;
use serde_json::{Map, Value};
use serde_path_to_error::Segment;

use super::App;
use super::error::ApiError;

/// Longest silence inside a body.
const BODY_IDLE: Duration = Duration::from_secs(60);

/// Extracts a request body of type `T`.
pub struct JsonBody<T>(pub T);

impl<T: DeserializeOwned> FromRequest<std::sync::Arc<App>> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &std::sync::Arc<App>) -> Result<Self, ApiError> {
        if !is_json(request.headers()) {
            return Err(ApiError::unsupported_media_type());
        }
        parse(&read(request, app).await?).map(JsonBody)
    }
}

/// Extracts a JSON object that vLLM's handler reads by itself: any content type, and its own words for what is wrong.
pub struct JsonObject(pub Map<String, Value>);

impl FromRequest<std::sync::Arc<App>> for JsonObject {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &std::sync::Arc<App>) -> Result<Self, ApiError> {
        let bytes = read(request, app).await?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(object)) => Ok(Self(object)),
            Ok(_) => Err(ApiError::plain(StatusCode::BAD_REQUEST, "Expected a JSON object")),
            Err(error) => Err(ApiError::plain(
                StatusCode::BAD_REQUEST,
                format!("JSON decode error: {error}"),
            )),
        }
    }
}

/// A field that may be absent or null, else a list of strings.
///
/// # Errors
/// 400: it is something else.
pub fn string_list(body: &Map<String, Value>, field: &str) -> Result<Option<Vec<String>>, ApiError> {
    let wrong = || ApiError::invalid(field, format!("{field} must be a list of strings"));
    match body.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(items)) => items
            .iter()
            .map(|item| item.as_str().map(str::to_owned).ok_or_else(wrong))
            .collect::<Result<_, _>>()
            .map(Some),
        Some(_) => Err(wrong()),
    }
}

/// The body's bytes, within the limit.
async fn read(request: Request, app: &App) -> Result<Bytes, ApiError> {
    let limit_bytes = app.config.max_body_bytes;
    if content_length(request.headers()).is_some_and(|length| length > limit_bytes as u64) {
        return Err(ApiError::body_too_large(limit_bytes));
    }
    collect(request.into_body(), limit_bytes).await
}

fn is_json(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .is_some_and(|media_type| media_type.trim().eq_ignore_ascii_case("application/json"))
}

fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

async fn collect(body: axum::body::Body, limit_bytes: usize) -> Result<Bytes, ApiError> {
    let mut body = Limited::new(body, limit_bytes);
    let mut collected = Vec::new();
    loop {
        match tokio::time::timeout(BODY_IDLE, body.frame()).await {
            Err(_) => return Err(ApiError::body_timeout()),
            Ok(None) => return Ok(collected.into()),
            Ok(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    collected.extend_from_slice(&data);
                }
            }
            Ok(Some(Err(error))) => {
                return Err(match error.downcast_ref::<http_body_util::LengthLimitError>() {
                    Some(_) => ApiError::body_too_large(limit_bytes),
                    None => ApiError::body_broken(),
                });
            }
        }
    }
}

/// Reads JSON bytes.
///
/// # Errors
/// `json_invalid` with the byte offset for malformed JSON; otherwise the path of the first field that does not fit.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(ApiError::validation("missing", &[], "Field required"));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path: Vec<String> = error.path().iter().filter_map(segment).collect();
        reading_error(bytes, &path, error.inner())
    })?;
    deserializer.end().map_err(|error| reading_error(bytes, &[], &error))?;
    Ok(value)
}

/// Reads a JSON value that was kept unread, such as one message; `location` is its place below `body`.
///
/// # Errors
/// As [`parse`].
pub fn parse_value<T: DeserializeOwned>(value: Value, location: &[String]) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let mut path = location.to_vec();
        path.extend(error.path().iter().filter_map(segment));
        type_error(&path, &error.inner().to_string())
    })
}

fn segment(segment: &Segment) -> Option<String> {
    match segment {
        Segment::Seq { index } => Some(index.to_string()),
        Segment::Map { key } => Some(key.clone()),
        Segment::Enum { variant } => Some(variant.clone()),
        Segment::Unknown => None,
    }
}

fn reading_error(bytes: &[u8], path: &[String], error: &serde_json::Error) -> ApiError {
    let text = error.to_string();
    let message = text.rfind(" at line ").map_or(text.as_str(), |end| &text[..end]);
    match error.classify() {
        Category::Data => type_error(path, message),
        Category::Syntax | Category::Eof | Category::Io => {
            let offset = match error.is_eof() {
                true => bytes.len(),
                false => byte_offset(bytes, error.line(), error.column()),
            };
            ApiError::validation(
                "json_invalid",
                &[offset.to_string()],
                &format!("JSON decode error: {message}"),
            )
        }
    }
}

fn type_error(path: &[String], message: &str) -> ApiError {
    if let Some(field) = message
        .strip_prefix("missing field `")
        .and_then(|rest| rest.strip_suffix('`'))
    {
        let mut path = path.to_vec();
        path.push(field.to_owned());
        return ApiError::validation("missing", &path, "Field required");
    }
    let message = message.find("Input should").map_or(message, |start| &message[start..]);
    ApiError::validation(error_code(message), path, message)
}

/// pydantic's code for a message of `field.rs`.
fn error_code(message: &str) -> &'static str {
    const CODES: [(&str, &str); 15] = [
        ("Input should be a valid integer, unable", "int_parsing"),
        ("Input should be a valid integer, got", "int_from_float"),
        ("Input should be a valid integer of", "int_parsing_size"),
        ("Input should be a valid integer", "int_type"),
        ("Input should be a valid number, unable", "float_parsing"),
        ("Input should be a valid number", "float_type"),
        ("Input should be a valid boolean, unable", "bool_parsing"),
        ("Input should be a valid boolean", "bool_type"),
        ("Input should be a valid string", "string_type"),
        ("Input should be a valid list", "list_type"),
        ("Input should be a valid dictionary or", "model_attributes_type"),
        ("Input should be a valid dictionary", "dict_type"),
        ("Input should be less than or equal", "less_than_equal"),
        ("Input should be greater than or equal", "greater_than_equal"),
        ("Input should be '", "literal_error"),
    ];
    CODES
        .iter()
        .find(|(start, _)| message.starts_with(start))
        .map_or("value_error", |(_, code)| code)
}

/// serde_json counts lines and columns from 1.
fn byte_offset(bytes: &[u8], line: usize, column: usize) -> usize {
    let line_start = match line {
        0 | 1 => 0,
        _ => bytes
            .iter()
            .enumerate()
            .filter(|(_, byte)| **byte == b'\n')
            .nth(line - 2)
            .map_or(0, |(newline, _)| newline + 1),
    };
    (line_start + column.saturating_sub(1)).min(bytes.len())
}

#[cfg(test)]
mod tests {
    use super::super::field::request_body;
    use super::*;

    request_body! {
        pub struct Inner { pub flag: bool, }
    }
    request_body! {
        pub struct Sample {
            pub count: i64,
            pub ids: Vec<i64>,
            pub inner: Inner,
        }
    }

    fn error(text: &[u8]) -> ApiError {
        parse::<Sample>(text).unwrap_err()
    }

    #[test]
    fn malformed_json_has_the_byte_offset() {
        let found = error(b"{\"count\": 1,\n \"ids\": [1,,2]}");
        assert_eq!(found.param.as_deref(), Some("body.24"));
        assert!(found.message.starts_with("1 validation error:") && found.message.contains("json_invalid"));
        for text in [
            &b"{\"count\": NaN}"[..],
            b"{\"count\": 1} x",
            b"{\"count\": 1",
            b"\xff\xfe{\x00}\x00",
            b"{\"\xff\": 1}",
        ] {
            assert!(error(text).message.contains("json_invalid"), "{text:?}");
        }
    }

    #[test]
    fn type_errors_name_the_field_by_its_path() {
        let cases: [(&[u8], &str, &str); 5] = [
            (b"", "body", "missing"),
            (b"[1]", "body", "model_attributes_type"),
            (b"{\"count\":\"x\"}", "body.count", "int_parsing"),
            (b"{\"ids\":[1,2,{}]}", "body.ids.2", "int_type"),
            (b"{\"inner\":{\"flag\":9}}", "body.inner.flag", "bool_parsing"),
        ];
        for (text, param, code) in cases {
            let found = error(text);
            assert_eq!(found.param.as_deref(), Some(param), "{found:?}");
            assert!(found.message.contains(&format!("'{code}'")), "{found:?}");
        }
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_overflow() {
        let text = format!("{{\"x\":{}", "[".repeat(1_000_000));
        assert!(error(text.as_bytes()).message.contains("json_invalid"));
    }

    #[test]
    fn a_byte_order_mark_is_skipped() {
        assert_eq!(parse::<Sample>(b"\xef\xbb\xbf{\"count\":4}").unwrap().count, Some(4));
    }
}
