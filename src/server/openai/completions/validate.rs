//! Rules of `/v1/completions`.

use super::types::{CompletionRequest, Prompt};
use crate::config::RequestLimits;
use crate::server::error::ApiError;
use crate::server::fields;
use crate::server::openai::validate::check_shared;

/// # Errors
/// 400 that names the field.
pub fn check(request: &CompletionRequest, limits: &RequestLimits, max_model_len: usize) -> Result<(), ApiError> {
    if request.prompt_embeds.is_some() {
        return Err(fields::refused("prompt_embeds"));
    }
    if request.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::invalid("suffix", "suffix is not currently supported"));
    }
    check_beam_search(request)?;
    let prompts = request.prompt.as_ref().map_or(&[][..], |prompts| &prompts.0);
    check_prompts(prompts, limits.max_prompts)?;
    check_shared(&request.sampling, limits)?;
    if let Some(count) = request.logprobs.filter(|count| *count < 0 && *count != -1) {
        return Err(ApiError::invalid_value(
            "logprobs",
            "`logprobs` must be a positive value or -1.",
            count,
        ));
    }
    check_max_tokens(request, max_model_len)
}

fn check_beam_search(request: &CompletionRequest) -> Result<(), ApiError> {
    if !request.sampling.use_beam_search.unwrap_or(false) {
        return Ok(());
    }
    if request.sampling.stream.unwrap_or(false) {
        return Err(ApiError::invalid(
            "use_beam_search",
            "Streaming is not currently supported with beam search",
        ));
    }
    if request.echo.unwrap_or(false) && request.logprobs.is_some() {
        return Err(ApiError::invalid(
            "use_beam_search",
            "beam search gives no logprobs of an echoed prompt",
        ));
    }
    Ok(())
}

fn check_prompts(prompts: &[Prompt], max_prompts: usize) -> Result<(), ApiError> {
    if prompts.is_empty() {
        return Err(ApiError::invalid(
            "prompt",
            "Either prompt or prompt_embeds must be provided and non-empty.",
        ));
    }
    if prompts.len() > max_prompts {
        return Err(ApiError::invalid(
            "prompt",
            format!("at most {max_prompts} prompts are allowed"),
        ));
    }
    let empty = |prompt: &Prompt| match prompt {
        Prompt::Text(text) => text.is_empty(),
        Prompt::Tokens(ids) => ids.is_empty(),
    };
    if prompts.iter().any(empty) {
        return Err(ApiError::invalid("prompt", "The prompt cannot be empty."));
    }
    Ok(())
}

fn check_max_tokens(request: &CompletionRequest, max_model_len: usize) -> Result<(), ApiError> {
    let Some(value) = request.sampling.max_tokens else {
        return Ok(());
    };
    let lowest = if request.echo.unwrap_or(false) { 0 } else { 1 };
    if value < lowest {
        return Err(ApiError::invalid_value(
            "max_tokens",
            format!("max_tokens must be at least {lowest}, got {value}."),
            value,
        ));
    }
    if usize::try_from(value).is_ok_and(|value| value > max_model_len) {
        return Err(ApiError::invalid_value(
            "max_tokens",
            format!("max_tokens={value} cannot be greater than max_model_len={max_model_len}."),
            value,
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::body::parse;

    fn failure(json: &str) -> Option<String> {
        let request: CompletionRequest = parse(json.as_bytes()).unwrap();
        check(&request, &RequestLimits::DEFAULT, 64).err().map(|error| {
            assert_eq!(error.status, 400);
            error.param.unwrap_or_default()
        })
    }

    #[test]
    fn broken_rules_name_the_field() {
        let many = format!(r#"{{"prompt":[{}"a"]}}"#, r#""a","#.repeat(1024));
        for (json, param) in [
            ("{}", "prompt"),
            (r#"{"prompt":""}"#, "prompt"),
            (r#"{"prompt":[]}"#, "prompt"),
            (r#"{"prompt":["a",""]}"#, "prompt"),
            (r#"{"prompt":[[]]}"#, "prompt"),
            (many.as_str(), "prompt"),
            (r#"{"prompt":"a","suffix":"b"}"#, "suffix"),
            (r#"{"prompt":"a","prompt_embeds":"b"}"#, "prompt_embeds"),
            (r#"{"prompt":"a","logprobs":-3}"#, "logprobs"),
            (r#"{"prompt":"a","max_tokens":0}"#, "max_tokens"),
            (r#"{"prompt":"a","max_tokens":-1,"echo":true}"#, "max_tokens"),
            (r#"{"prompt":"a","max_tokens":65}"#, "max_tokens"),
            (
                r#"{"prompt":"a","use_beam_search":true,"stream":true}"#,
                "use_beam_search",
            ),
            (
                r#"{"prompt":"a","use_beam_search":true,"echo":true,"logprobs":1}"#,
                "use_beam_search",
            ),
        ] {
            assert_eq!(failure(json).as_deref(), Some(param), "{json}");
        }
        assert_eq!(
            failure(r#"{"prompt":"a","max_tokens":0,"echo":true,"suffix":null}"#),
            None
        );
    }
}
