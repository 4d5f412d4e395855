//! Rules on the fields that chat and completions share. Bounds of the sampling values themselves are the text layer's.

use super::types::SamplingFields;
use crate::config::RequestLimits;
use crate::engine::RepetitionDetection;
use crate::server::error::ApiError;
use crate::server::field::StringOrList;
use crate::server::fields;

const MAX_CACHE_SALT_CHARS: usize = 128;
/// vLLM detects nothing above its own bound; here it is an error.
const MAX_PATTERN_SIZE: i64 = 4096;
const MAX_PATTERN_COUNT: i64 = 1 << 20;

/// # Errors
/// 400 that names the field.
pub fn check_shared(fields: &SamplingFields, limits: &RequestLimits) -> Result<(), ApiError> {
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
    if let Some(salt) = &fields.cache_salt {
        check_cache_salt(salt)?;
    }
    check_stop(fields.stop.as_ref(), limits)?;
    check_lowest("truncate_prompt_tokens", fields.truncate_prompt_tokens, -1)?;
    check_lowest("stream_interval", fields.stream_interval, 1)?;
    check_lowest("routed_experts_prompt_start", fields.routed_experts_prompt_start, 0)?;
    repetition_detection(fields)?;
    check_beam_search(fields)?;
    check_unsupported(fields)
}

fn check_lowest(field: &str, value: Option<i64>, lowest: i64) -> Result<(), ApiError> {
    if value.is_none_or(|value| value >= lowest) {
        return Ok(());
    }
    Err(ApiError::validation(
        "greater_than_equal",
        &[field.to_owned()],
        &format!("Input should be greater than or equal to {lowest}"),
    ))
}

/// What `repetition_detection` asks for; none where it is off.
///
/// # Errors
/// 400: sizes or a count that make no sense.
pub fn repetition_detection(fields: &SamplingFields) -> Result<Option<RepetitionDetection>, ApiError> {
    let Some(asked) = &fields.repetition_detection else {
        return Ok(None);
    };
    let max = asked.max_pattern_size.unwrap_or(0);
    let min = asked.min_pattern_size.unwrap_or(0);
    let count = asked.min_count.unwrap_or(0);
    let invalid = |message: &str| Err(ApiError::invalid("repetition_detection", message));
    if !(0..=max).contains(&min) {
        return invalid(
            "max_pattern_size and min_pattern_size must be at least 0, with min_pattern_size <= max_pattern_size",
        );
    }
    if max == 0 {
        return Ok(None);
    }
    if max > MAX_PATTERN_SIZE || count > MAX_PATTERN_COUNT {
        return invalid(&format!(
            "max_pattern_size must be at most {MAX_PATTERN_SIZE} and min_count at most {MAX_PATTERN_COUNT}"
        ));
    }
    if count < 2 {
        return invalid("min_count must be at least 2; to detect nothing, set max_pattern_size to 0");
    }
    Ok(Some(RepetitionDetection {
        min_pattern_size: min.max(1) as usize,
        max_pattern_size: max as usize,
        min_count: count as usize,
    }))
}

fn check_beam_search(fields: &SamplingFields) -> Result<(), ApiError> {
    if fields.length_penalty.is_some_and(|penalty| !penalty.is_finite()) {
        return Err(ApiError::invalid(
            "length_penalty",
            "length_penalty must be a finite number",
        ));
    }
    let constrained = fields.structured_outputs.is_some()
        || fields
            .response_format
            .as_ref()
            .is_some_and(|format| format.get("type").is_some_and(|kind| kind != "text"));
    let budgeted = fields
        .thinking_token_budget
        .as_ref()
        .is_some_and(|budget| *budget != -1);
    if fields.use_beam_search.unwrap_or(false) && (constrained || budgeted) {
        return Err(ApiError::invalid(
            "use_beam_search",
            "beam search cannot be constrained by response_format, structured_outputs or thinking_token_budget",
        ));
    }
    Ok(())
}

fn check_stop(stop: Option<&StringOrList>, limits: &RequestLimits) -> Result<(), ApiError> {
    let max = limits.max_stop_strings;
    if stop.is_none_or(|stop| stop.0.len() <= max) {
        return Ok(());
    }
    Err(ApiError::validation(
        "too_long",
        &["stop".to_owned()],
        &format!("List should have at most {max} items after validation"),
    ))
}

/// # Errors
/// 400: empty, too long or with a character that separates.
pub fn check_cache_salt(salt: &str) -> Result<(), ApiError> {
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
        ("watermarking", fields.watermarking),
        ("return_weight_versions", fields.return_weight_versions),
        ("logprob_token_ids", fields.logprob_token_ids.as_ref().map(|_| true)),
    ];
    if let Some((name, _)) = flags.into_iter().find(|(_, asked)| *asked == Some(true)) {
        return Err(fields::refused(name));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::body::parse;

    fn check(json: &str) -> Result<(), (String, u16)> {
        let fields: SamplingFields = parse(json.as_bytes()).unwrap();
        check_shared(&fields, &RequestLimits::DEFAULT)
            .map_err(|error| (error.param.unwrap_or_default(), error.status.as_u16()))
    }

    #[test]
    fn broken_rules_name_the_field() {
        for (json, param) in [
            (r#"{"stream_options":{"include_usage":true}}"#, "stream_options"),
            (r#"{"stream":true,"prompt_logprobs":1}"#, "prompt_logprobs"),
            (r#"{"cache_salt":""}"#, "cache_salt"),
            (r#"{"cache_salt":"a/b"}"#, "cache_salt"),
            (r#"{"stop":["a","b","c","d","e"]}"#, "body.stop"),
            (r#"{"truncate_prompt_tokens":-2}"#, "body.truncate_prompt_tokens"),
            (
                r#"{"thinking_token_budget":5,"use_beam_search":true}"#,
                "use_beam_search",
            ),
            (r#"{"watermarking":true}"#, "watermarking"),
            (r#"{"logprob_token_ids":[1]}"#, "logprob_token_ids"),
            (r#"{"length_penalty":"inf"}"#, "length_penalty"),
            (
                r#"{"use_beam_search":true,"response_format":{"type":"json_object"}}"#,
                "use_beam_search",
            ),
            (r#"{"stream_interval":0}"#, "body.stream_interval"),
            (
                r#"{"routed_experts_prompt_start":-1}"#,
                "body.routed_experts_prompt_start",
            ),
            (
                r#"{"repetition_detection":{"max_pattern_size":3}}"#,
                "repetition_detection",
            ),
            (
                r#"{"repetition_detection":{"max_pattern_size":2,"min_pattern_size":3,"min_count":2}}"#,
                "repetition_detection",
            ),
            (
                r#"{"repetition_detection":{"max_pattern_size":1000000,"min_count":2}}"#,
                "repetition_detection",
            ),
            (
                r#"{"repetition_detection":{"max_pattern_size":-1}}"#,
                "repetition_detection",
            ),
        ] {
            assert_eq!(check(json), Err((param.to_owned(), 400)), "{json}");
        }
    }

    #[test]
    fn what_asks_for_nothing_is_accepted() {
        for json in [
            "{}",
            r#"{"use_beam_search":false,"stream_interval":1}"#,
            r#"{"thinking_token_budget":-1,"repetition_detection":{},"use_beam_search":true,"watermarking":false}"#,
            r#"{"stream":true,"stream_options":{"include_usage":true},"prompt_logprobs":0,"n":128,"cache_salt":"x"}"#,
        ] {
            assert_eq!(check(json), Ok(()), "{json}");
        }
    }
}
