//! Rules of `/v1/chat/completions`.

use serde_json::{Map, Value};

use super::types::ChatCompletionRequest;
use crate::chat::ToolChoice;
use crate::config::RequestLimits;
use crate::server::error::ApiError;
use crate::server::openai::validate::check_shared;

/// Template variables that the server sets itself: a request's template arguments must leave them alone.
const RESERVED_KWARGS: [&str; 5] = ["chat_template", "tokenize", "messages", "conversation", "tools"];

/// What the server's flags allow and the model offers.
#[derive(Clone, Copy, Debug)]
pub struct ChatRules {
    /// `--trust-request-chat-template`.
    pub trust_request_template: bool,
    /// Tool calls can be read from the model's output.
    pub has_tool_parser: bool,
    pub max_model_len: usize,
    pub limits: RequestLimits,
}

/// What the model may do with the tools, if all is well.
///
/// # Errors
/// 400 that names the field.
pub fn check(request: &ChatCompletionRequest, rules: ChatRules) -> Result<ToolChoice, ApiError> {
    let Some(messages) = &request.messages else {
        return Err(ApiError::missing("messages"));
    };
    if messages.is_empty() {
        return Err(ApiError::bad_request("messages must not be empty"));
    }
    check_shared(&request.sampling, &rules.limits)?;
    check_logprobs(request)?;
    check_max_tokens(request, rules.max_model_len)?;
    let tool_choice = tool_choice(request, rules.has_tool_parser)?;
    check_continuation(
        request.continue_final_message.unwrap_or(false),
        request.add_generation_prompt.unwrap_or(true),
    )?;
    check_trust(request, rules.trust_request_template)?;
    Ok(tool_choice)
}

fn check_logprobs(request: &ChatCompletionRequest) -> Result<(), ApiError> {
    let Some(count) = request.top_logprobs else {
        return Ok(());
    };
    if count < 0 && count != -1 {
        return Err(ApiError::invalid_value(
            "top_logprobs",
            "`top_logprobs` must be a positive value or -1.",
            count,
        ));
    }
    if count != 0 && !request.logprobs.unwrap_or(false) {
        return Err(ApiError::invalid(
            "top_logprobs",
            "when using `top_logprobs`, `logprobs` must be set to true.",
        ));
    }
    Ok(())
}

fn check_max_tokens(request: &ChatCompletionRequest, max_model_len: usize) -> Result<(), ApiError> {
    let (param, value) = match (request.max_completion_tokens, request.sampling.max_tokens) {
        (Some(value), _) => ("max_completion_tokens", value),
        (None, Some(value)) => ("max_tokens", value),
        (None, None) => return Ok(()),
    };
    if value < 1 {
        return Err(ApiError::invalid_value(
            param,
            format!("{param} must be at least 1, got {value}."),
            value,
        ));
    }
    if usize::try_from(value).is_ok_and(|value| value > max_model_len) {
        return Err(ApiError::invalid_value(
            param,
            format!("{param}={value} cannot be greater than max_model_len={max_model_len}."),
            value,
        ));
    }
    Ok(())
}

/// # Errors
/// 400: a choice that does not fit the tools, or that this server cannot enforce.
fn tool_choice(request: &ChatCompletionRequest, has_tool_parser: bool) -> Result<ToolChoice, ApiError> {
    let tools = request.tools.as_deref();
    if tools.is_some_and(<[Value]>::is_empty) {
        return Err(ApiError::invalid(
            "tools",
            "`tools` must not be an empty array; leave it out instead.",
        ));
    }
    let needs_tools = || {
        tools
            .map(|_| ())
            .ok_or_else(|| ApiError::invalid("tool_choice", "When using `tool_choice`, `tools` must be set."))
    };
    let auto = || {
        if has_tool_parser {
            return Ok(ToolChoice::Auto);
        }
        Err(ApiError::bad_request(
            "\"auto\" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set",
        ))
    };
    // The calls are read as JSON, whatever the parser; vLLM asks for one all the same.
    let forced = |choice: ToolChoice| {
        if request.sampling.use_beam_search.unwrap_or(false) {
            return Err(ApiError::invalid(
                "use_beam_search",
                "beam search cannot be constrained by tool_choice",
            ));
        }
        if has_tool_parser {
            return Ok(choice);
        }
        Err(ApiError::bad_request(
            "a tool choice of \"required\" or a named function requires --tool-call-parser to be set",
        ))
    };
    match &request.tool_choice {
        None if tools.is_some() => auto(),
        None => Ok(ToolChoice::None),
        Some(Value::String(choice)) => match choice.as_str() {
            "none" => Ok(ToolChoice::None),
            "auto" => needs_tools().and_then(|()| auto()),
            "required" => needs_tools().and_then(|()| forced(ToolChoice::Required)),
            _ => Err(bad_choice()),
        },
        Some(Value::Object(choice)) => {
            needs_tools()?;
            let name = choice
                .get("function")
                .and_then(|function| function.get("name"))
                .and_then(Value::as_str);
            let Some(name) = name else {
                return Err(ApiError::validation(
                    "missing",
                    &["tool_choice".into(), "function".into(), "name".into()],
                    "Field required",
                ));
            };
            if !tools
                .unwrap_or_default()
                .iter()
                .any(|tool| tool["function"]["name"] == name)
            {
                return Err(ApiError::invalid(
                    "tool_choice",
                    "The tool specified in `tool_choice` does not match any of the specified `tools`",
                ));
            }
            if request.sampling.structured_outputs.is_some() {
                return Err(ApiError::bad_request(
                    "You can only either use constraints for structured outputs or tools, not both.",
                ));
            }
            forced(ToolChoice::Named(name.to_owned()))
        }
        Some(_) => Err(bad_choice()),
    }
}

fn bad_choice() -> ApiError {
    ApiError::validation(
        "literal_error",
        &["tool_choice".to_owned()],
        "Input should be 'none', 'auto', 'required' or a named function",
    )
}

/// # Errors
/// 400: a final message cannot be both continued and followed by a new turn.
pub fn check_continuation(continue_final_message: bool, add_generation_prompt: bool) -> Result<(), ApiError> {
    if continue_final_message && add_generation_prompt {
        return Err(ApiError::bad_request(
            "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
        ));
    }
    Ok(())
}

/// # Errors
/// 400: the request brings its own template and the server does not trust requests with that.
pub fn check_template_trust(
    brings_template: bool,
    kwargs: Option<&Map<String, Value>>,
    trusted: bool,
) -> Result<(), ApiError> {
    let has = |name: &str| kwargs.is_some_and(|kwargs| kwargs.contains_key(name));
    if (brings_template || has("chat_template")) && !trusted {
        return Err(ApiError::bad_request(
            "Chat template is passed with request, but --trust-request-chat-template is not set. Refused request with untrusted chat template.",
        ));
    }
    match RESERVED_KWARGS.into_iter().find(|name| has(name)) {
        None => Ok(()),
        Some(name) => Err(ApiError::invalid(
            "chat_template_kwargs",
            format!("Found unexpected chat template kwargs from request: '{name}'"),
        )),
    }
}

/// # Errors
/// 400: arguments of media processing, which a text model does not have.
pub fn check_media_kwargs(
    processor: Option<&Map<String, Value>>,
    media_io: Option<&Map<String, Value>>,
) -> Result<(), ApiError> {
    for (param, given) in [("mm_processor_kwargs", processor), ("media_io_kwargs", media_io)] {
        if given.is_some_and(|kwargs| !kwargs.is_empty()) {
            return Err(ApiError::invalid(
                param,
                format!("`{param}` needs --trust-request-mm-kwargs, which this server does not have"),
            ));
        }
    }
    Ok(())
}

fn check_trust(request: &ChatCompletionRequest, trust_request_template: bool) -> Result<(), ApiError> {
    check_template_trust(
        request.chat_template.is_some(),
        request.chat_template_kwargs.as_ref(),
        trust_request_template,
    )?;
    check_media_kwargs(request.mm_processor_kwargs.as_ref(), request.media_io_kwargs.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::body::parse;

    const RULES: ChatRules = ChatRules {
        trust_request_template: false,
        has_tool_parser: true,
        max_model_len: 64,
        limits: RequestLimits::DEFAULT,
    };
    const TOOL: &str = r#"{"type":"function","function":{"name":"f"}}"#;

    fn failure(extra: &str, rules: ChatRules) -> Option<String> {
        let json = format!(r#"{{"messages":[{{"role":"user","content":"q"}}]{extra}}}"#);
        let request: ChatCompletionRequest = parse(json.as_bytes()).unwrap();
        check(&request, rules).err().map(|error| {
            assert_eq!(error.status, 400);
            error.param.unwrap_or(error.message)
        })
    }

    #[test]
    fn broken_rules_name_the_field() {
        let absent = format!(r#","tools":[{TOOL}],"tool_choice":{{"type":"function","function":{{"name":"g"}}}}"#);
        for (extra, param) in [
            (r#","top_logprobs":3"#, "top_logprobs"),
            (r#","logprobs":true,"top_logprobs":-2"#, "top_logprobs"),
            (r#","max_tokens":0"#, "max_tokens"),
            (r#","max_tokens":1,"max_completion_tokens":65"#, "max_completion_tokens"),
            (r#","tools":[]"#, "tools"),
            (r#","tool_choice":"auto""#, "tool_choice"),
            (r#","tool_choice":"maybe""#, "body.tool_choice"),
            (r#","mm_processor_kwargs":{"a":1}"#, "mm_processor_kwargs"),
            (r#","chat_template_kwargs":{"tokenize":true}"#, "chat_template_kwargs"),
            (r#","chat_template_kwargs":{"messages":[]}"#, "chat_template_kwargs"),
            (r#","tool_choice":"required""#, "tool_choice"),
            (absent.as_str(), "tool_choice"),
        ] {
            assert_eq!(failure(extra, RULES).as_deref(), Some(param), "{extra}");
        }
        let both = format!(
            r#","structured_outputs":{{"regex":"a"}},"tools":[{TOOL}],"tool_choice":{{"function":{{"name":"f"}}}}"#
        );
        for extra in [
            both.as_str(),
            r#","continue_final_message":true"#,
            r#","chat_template":"x""#,
            r#","chat_template_kwargs":{"chat_template":"x"}"#,
        ] {
            assert!(failure(extra, RULES).is_some(), "{extra}");
        }
    }

    #[test]
    fn tools_without_a_parser_name_the_flags() {
        let rules = ChatRules {
            has_tool_parser: false,
            ..RULES
        };
        let tools = format!(r#","tools":[{TOOL}]"#);
        let message = failure(&tools, rules).unwrap();
        assert!(
            message.contains("--enable-auto-tool-choice") && message.contains("--tool-call-parser"),
            "{message}"
        );
        assert_eq!(failure(&format!(r#"{tools},"tool_choice":"none""#), rules), None);
        for choice in [r#""required""#, r#"{"type":"function","function":{"name":"f"}}"#] {
            let message = failure(&format!(r#"{tools},"tool_choice":{choice}"#), rules).unwrap();
            assert!(message.contains("--tool-call-parser"), "{message}");
        }
    }

    #[test]
    fn ordinary_requests_pass() {
        let tools = format!(r#","tools":[{TOOL}]"#);
        let required = format!(r#"{tools},"tool_choice":"required""#);
        let named = format!(r#"{tools},"tool_choice":{{"type":"function","function":{{"name":"f"}}}}"#);
        for extra in [
            "",
            tools.as_str(),
            required.as_str(),
            named.as_str(),
            r#","logprobs":true,"top_logprobs":2,"max_tokens":64,"tool_choice":"none""#,
            r#","mm_processor_kwargs":{},"media_io_kwargs":{},"chat_template_kwargs":{"documents":[]}"#,
        ] {
            assert_eq!(failure(extra, RULES), None, "{extra}");
        }
    }
}
