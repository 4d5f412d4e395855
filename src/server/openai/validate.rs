//! Rules on the fields that chat and completions share. Bounds of the sampling values themselves are the text layer's.

use serde_json::{Map, Value};

use super::types::SamplingFields;
use crate::server::error::ApiError;

/// Most stop strings of a request.
const MAX_STOP_STRINGS: usize = 4;
const MAX_BAD_WORDS: usize = 128;
/// Above this a request is refused rather than queued n times. vLLM's limit is 16384.
const MAX_N: i64 = 128;
const MAX_CACHE_SALT_CHARS: usize = 128;

/// # Errors
/// 400 that names the field.
pub fn check_shared(fields: &SamplingFields) -> Result<(), ApiError> {
    let streams = fields.stream.unwrap_or(false);
    if fields.stream_options.is_some() && !streams {
        return Err(ApiError::invalid(
            "stream_options",
            "Stream options can only be defined when `stream=True`.",
        ));
    }
    if streams && fields.prompt_logprobs.is_some_and(|count| count > 0 || count == -1) {
        return Err(ApiError::invalid(
            "prompt_logprobs",
            "`prompt_logprobs` are not available when `stream=True`.",
        ));
    }
    check_n(fields)?;
    if let Some(salt) = &fields.cache_salt {
        check_cache_salt(salt)?;
    }
    if fields.stop.as_ref().is_some_and(|stop| stop.0.len() > MAX_STOP_STRINGS) {
        return Err(ApiError::validation(
            "too_long",
            &["stop".to_owned()],
            &format!("List should have at most {MAX_STOP_STRINGS} items after validation"),
        ));
    }
    if fields
        .bad_words
        .as_ref()
        .is_some_and(|words| words.len() > MAX_BAD_WORDS)
    {
        return Err(ApiError::invalid(
            "bad_words",
            format!("at most {MAX_BAD_WORDS} bad words are allowed"),
        ));
    }
    if fields.truncate_prompt_tokens.is_some_and(|count| count < -1) {
        return Err(ApiError::validation(
            "greater_than_equal",
            &["truncate_prompt_tokens".to_owned()],
            "Input should be greater than or equal to -1",
        ));
    }
    check_unsupported(fields)
}

fn check_n(fields: &SamplingFields) -> Result<(), ApiError> {
    let n = fields.n.unwrap_or(1);
    if n < 1 {
        return Err(ApiError::bad_request(format!("n must be at least 1, got {n}.")));
    }
    if n > MAX_N {
        return Err(ApiError::invalid_value("n", format!("n must be at most {MAX_N}."), n));
    }
    Ok(())
}

fn check_cache_salt(salt: &str) -> Result<(), ApiError> {
    let allowed =
        !salt.is_empty() && salt.chars().count() <= MAX_CACHE_SALT_CHARS && !salt.contains(['@', '/', '\\', '\0']);
    if allowed {
        return Ok(());
    }
    Err(ApiError::invalid(
        "cache_salt",
        format!(
            "Parameter 'cache_salt' must be a non-empty string of at most {MAX_CACHE_SALT_CHARS} characters without '@', '/', '\\' and NUL."
        ),
    ))
}

/// Fields that vLLM honours and this server does not yet.
fn check_unsupported(fields: &SamplingFields) -> Result<(), ApiError> {
    let flags = [
        ("use_beam_search", fields.use_beam_search),
        ("watermarking", fields.watermarking),
        ("return_weight_versions", fields.return_weight_versions),
        ("return_token_offsets", fields.return_token_offsets),
        ("logprob_token_ids", fields.logprob_token_ids.as_ref().map(|_| true)),
        (
            "repetition_detection",
            fields.repetition_detection.as_ref().map(|_| true),
        ),
        ("stream_interval", fields.stream_interval.map(|interval| interval != 1)),
        ("structured_outputs", fields.structured_outputs.as_ref().map(|_| true)),
    ];
    if let Some((name, _)) = flags.into_iter().find(|(_, asked)| *asked == Some(true)) {
        return Err(ApiError::unsupported(name));
    }
    fields.response_format.as_ref().map_or(Ok(()), check_response_format)
}

fn check_response_format(format: &Map<String, Value>) -> Result<(), ApiError> {
    let at_type = |code, message: &str| ApiError::validation(code, &["response_format".into(), "type".into()], message);
    match format.get("type") {
        None => Err(at_type("missing", "Field required")),
        Some(Value::String(kind)) => match kind.as_str() {
            "text" => Ok(()),
            "json_schema" if format.get("json_schema").is_none_or(Value::is_null) => Err(ApiError::invalid(
                "response_format",
                "When response_format type is 'json_schema', the 'json_schema' field must be provided.",
            )),
            "json_object" | "json_schema" | "structural_tag" => Err(ApiError::unsupported("response_format")),
            _ => Err(at_type(
                "literal_error",
                "Input should be 'text', 'json_object', 'json_schema' or 'structural_tag'",
            )),
        },
        Some(_) => Err(at_type(
            "literal_error",
            "Input should be 'text', 'json_object', 'json_schema' or 'structural_tag'",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::body::parse;

    fn check(json: &str) -> Result<(), (String, u16)> {
        let fields: SamplingFields = parse(json.as_bytes()).unwrap();
        check_shared(&fields).map_err(|error| (error.param.unwrap_or_default(), error.status.as_u16()))
    }

    #[test]
    fn broken_rules_name_the_field() {
        for (json, param) in [
            (r#"{"stream_options":{"include_usage":true}}"#, "stream_options"),
            (r#"{"stream":true,"prompt_logprobs":1}"#, "prompt_logprobs"),
            (r#"{"n":0}"#, ""),
            (r#"{"n":1000000000}"#, "n"),
            (r#"{"cache_salt":""}"#, "cache_salt"),
            (r#"{"cache_salt":"a/b"}"#, "cache_salt"),
            (r#"{"stop":["a","b","c","d","e"]}"#, "body.stop"),
            (r#"{"truncate_prompt_tokens":-2}"#, "body.truncate_prompt_tokens"),
            (r#"{"use_beam_search":true}"#, "use_beam_search"),
            (r#"{"structured_outputs":{"regex":"a"}}"#, "structured_outputs"),
            (r#"{"response_format":{"type":"json_object"}}"#, "response_format"),
            (r#"{"response_format":{"type":"json_schema"}}"#, "response_format"),
            (r#"{"response_format":{"type":"xml"}}"#, "body.response_format.type"),
            (r#"{"response_format":{}}"#, "body.response_format.type"),
        ] {
            assert_eq!(check(json), Err((param.to_owned(), 400)), "{json}");
        }
    }

    #[test]
    fn what_asks_for_nothing_is_accepted() {
        for json in [
            "{}",
            r#"{"use_beam_search":false,"structured_outputs":null,"response_format":{"type":"text"},"stream_interval":1}"#,
            r#"{"stream":true,"stream_options":{"include_usage":true},"prompt_logprobs":0,"n":128,"cache_salt":"x"}"#,
        ] {
            assert_eq!(check(json), Ok(()), "{json}");
        }
    }
}
