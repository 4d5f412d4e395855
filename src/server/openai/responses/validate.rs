//! Rules of `/v1/responses`; what they leave open is checked as for a chat.

use serde_json::{Map, Value, json};

use super::types::{Reasoning, ResponsesRequest, TextConfig, TextFormat};
use crate::server::body::parse_value;
use crate::server::error::ApiError;
use crate::server::field::Choice;
use crate::server::fields;
use crate::server::openai::chat_completions::types::ReasoningEfforts;

/// What was read from fields that are also repeated in the answer.
#[derive(Debug, Default)]
pub struct Options {
    pub effort: Option<Choice<ReasoningEfforts>>,
    /// As a chat request has it.
    pub response_format: Option<Map<String, Value>>,
}

/// `store_enabled`: `VLLM_ENABLE_RESPONSES_API_STORE`.
///
/// # Errors
/// 400 that names the field.
pub fn check(request: &ResponsesRequest, store_enabled: bool) -> Result<Options, ApiError> {
    if request.input.is_none() {
        return Err(ApiError::missing("input"));
    }
    if request.prompt.is_some() {
        return Err(fields::refused("prompt"));
    }
    check_store(request, store_enabled)?;
    check_metadata(request.metadata.as_ref())?;
    check_max_output_tokens(request.max_output_tokens)?;
    check_logprobs(request)?;
    check_bounds(request)?;
    if request.enable_response_messages == Some(true) {
        return Err(fields::refused("enable_response_messages"));
    }
    if request
        .previous_input_messages
        .as_ref()
        .is_some_and(|list| !list.is_empty())
    {
        return Err(fields::refused("previous_input_messages"));
    }
    Ok(Options {
        effort: read::<Reasoning>(request.reasoning.as_ref(), "reasoning")?.effort,
        response_format: match read::<TextConfig>(request.text.as_ref(), "text")?.format {
            Some(format) => response_format(format)?,
            None => None,
        },
    })
}

fn read<T: serde::de::DeserializeOwned + Default>(
    value: Option<&Map<String, Value>>,
    name: &str,
) -> Result<T, ApiError> {
    match value {
        Some(object) => parse_value(Value::Object(object.clone()), &[name.to_owned()]),
        None => Ok(T::default()),
    }
}

fn check_store(request: &ResponsesRequest, store_enabled: bool) -> Result<(), ApiError> {
    if request.background != Some(true) {
        return Ok(());
    }
    if request.store == Some(false) {
        return Err(ApiError::invalid_request(
            "background",
            "background can only be used when `store` is true",
        ));
    }
    if !store_enabled {
        return Err(ApiError::invalid_request(
            "background",
            "This server does not store responses, so it has no background mode. \
             Set VLLM_ENABLE_RESPONSES_API_STORE=1 when starting it.",
        ));
    }
    Ok(())
}

fn check_metadata(metadata: Option<&Map<String, Value>>) -> Result<(), ApiError> {
    let wrong = metadata
        .into_iter()
        .flatten()
        .find(|(_, value)| !value.is_string())
        .map(|(key, _)| key);
    match wrong {
        None => Ok(()),
        Some(key) => Err(ApiError::validation(
            "string_type",
            &["metadata".to_owned(), key.clone()],
            "Input should be a valid string",
        )),
    }
}

fn check_max_output_tokens(asked: Option<i64>) -> Result<(), ApiError> {
    match asked {
        Some(count) if count < 1 => Err(ApiError::invalid_value(
            "max_output_tokens",
            format!("max_output_tokens must be at least 1, got {count}."),
            count,
        )),
        _ => Ok(()),
    }
}

fn check_logprobs(request: &ResponsesRequest) -> Result<(), ApiError> {
    match request.top_logprobs {
        Some(count) if count < 0 => Err(ApiError::invalid_value(
            "top_logprobs",
            "`top_logprobs` must not be negative.",
            count,
        )),
        Some(count) if count > 0 && !includes_logprobs(request) => Err(ApiError::invalid(
            "top_logprobs",
            "when using `top_logprobs`, `include` must contain \"message.output_text.logprobs\".",
        )),
        _ => Ok(()),
    }
}

pub fn includes_logprobs(request: &ResponsesRequest) -> bool {
    let logprobs = |include: &Choice<_>| include.0 == "message.output_text.logprobs";
    request.include.as_ref().is_some_and(|list| list.iter().any(logprobs))
}

fn check_bounds(request: &ResponsesRequest) -> Result<(), ApiError> {
    let sampling = &request.sampling;
    for (name, value) in [
        ("presence_penalty", sampling.presence_penalty),
        ("frequency_penalty", sampling.frequency_penalty),
    ] {
        if value.is_some_and(|value| !(-2.0..=2.0).contains(&value)) {
            return Err(ApiError::validation(
                "value_error",
                &[name.to_owned()],
                "Input should be between -2 and 2",
            ));
        }
    }
    Ok(())
}

/// None for plain text.
fn response_format(format: TextFormat) -> Result<Option<Map<String, Value>>, ApiError> {
    let missing = |field: &str| {
        ApiError::validation(
            "missing",
            &["text".into(), "format".into(), field.into()],
            "Field required",
        )
    };
    let Some(kind) = format.r#type else {
        return Err(missing("type"));
    };
    let value = match kind.0.as_str() {
        "json_schema" => {
            let name = format.name.ok_or_else(|| missing("name"))?;
            let schema = format.schema.ok_or_else(|| missing("schema"))?;
            json!({"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": format.strict}})
        }
        "json_object" => json!({"type": "json_object"}),
        _ => return Ok(None),
    };
    match value {
        Value::Object(format) => Ok(Some(format)),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::body::parse;

    fn failure(extra: &str, store_enabled: bool) -> Option<String> {
        let body = format!(r#"{{"input":"q"{extra}}}"#);
        let error = match parse::<ResponsesRequest>(body.as_bytes()) {
            Ok(request) => check(&request, store_enabled).err()?,
            Err(error) => error,
        };
        assert_eq!(error.status, 400, "{extra}");
        error.param
    }

    #[test]
    fn broken_rules_name_the_field() {
        for (extra, param) in [
            (r#","input":null"#, "body.input"),
            (r#","input":7"#, "body.input"),
            (r#","prompt":{"id":"p"}"#, "prompt"),
            (r#","background":true"#, "background"),
            (r#","metadata":{"a":1}"#, "body.metadata.a"),
            (r#","max_output_tokens":0"#, "max_output_tokens"),
            (r#","top_logprobs":2"#, "top_logprobs"),
            (
                r#","include":["message.output_text.logprobs"],"top_logprobs":-1"#,
                "top_logprobs",
            ),
            (r#","include":["everything"]"#, "body.include.0"),
            (r#","presence_penalty":3"#, "body.presence_penalty"),
            (r#","truncation":"some""#, "body.truncation"),
            (r#","service_tier":"gold""#, "body.service_tier"),
            (r#","reasoning":{"effort":"huge"}"#, "body.reasoning.effort"),
            (r#","text":{"format":{"type":"xml"}}"#, "body.text.format.type"),
            (r#","text":{"format":{}}"#, "body.text.format.type"),
            (
                r#","text":{"format":{"type":"json_schema","name":"n"}}"#,
                "body.text.format.schema",
            ),
            (
                r#","text":{"format":{"type":"json_schema","schema":{}}}"#,
                "body.text.format.name",
            ),
            (r#","text":{"verbosity":"loud"}"#, "body.text.verbosity"),
            (r#","enable_response_messages":true"#, "enable_response_messages"),
            (r#","previous_input_messages":[{}]"#, "previous_input_messages"),
        ] {
            assert_eq!(failure(extra, false).as_deref(), Some(param), "{extra}");
        }
        assert_eq!(
            failure(r#","background":true,"store":false"#, true).as_deref(),
            Some("background")
        );
    }

    #[test]
    fn ordinary_requests_pass() {
        for extra in [
            "",
            r#","background":true"#,
            r#","include":["reasoning.encrypted_content","message.output_text.logprobs"],"top_logprobs":2"#,
            r#","text":{"format":{"type":"text"},"verbosity":"low"},"reasoning":{"effort":"low","summary":"auto"},"metadata":{"a":"b"}"#,
            r#","previous_input_messages":[],"wibble":1,"truncation":"auto""#,
        ] {
            assert_eq!(failure(extra, true), None, "{extra}");
        }
    }
}
