//! A chat request on its way down: messages and tools as templates see them, sampling resolved.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::messages::{check_messages, content_text, convert_tools};
use super::reply::ChatReply;
use super::types::ChatCompletionRequest;
use crate::chat::{ChatRequest, RenderRequest, ToolChoice};
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::openai::convert::{EndpointSampling, RequestContext, generate_request, resolve};
use crate::server::openai::reply::ReplyOptions;
use crate::server::openai::tokenize::types::TokenizeRequest;
use crate::server::openai::truncate::truncation;

/// Template variables that the server sets itself; requests cannot replace them.
const RESERVED_KWARGS: [&str; 8] = [
    "messages",
    "conversation",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "chat_template",
];

/// A request that passed `validate`, ready to run.
pub struct Conversion {
    pub request: ChatRequest,
    /// Its prompt is filled in once it is rendered.
    pub reply: ChatReply,
}

/// # Errors
/// 400 for a malformed message or tool, or a sampling value out of bounds.
pub fn convert(
    request: ChatCompletionRequest,
    tool_choice: ToolChoice,
    app: &App,
    context: RequestContext,
) -> Result<Conversion, ApiError> {
    let fields = &request.sampling;
    let asked_logprobs = request
        .logprobs
        .unwrap_or(false)
        .then(|| request.top_logprobs.unwrap_or(0));
    let endpoint = EndpointSampling {
        max_completion_tokens: request.max_completion_tokens,
        logprobs: asked_logprobs,
        prompt_logprobs: fields.prompt_logprobs,
        ..EndpointSampling::default()
    };
    let resolved = resolve(fields, endpoint, app)?;
    let truncation = truncation(fields, app.model.max_model_len, resolved.max_tokens)?;
    let generate = generate_request(fields, resolved, Arc::from([]), &context, app);
    let n = generate.n;

    let messages = request.messages.unwrap_or_default();
    check_messages(&messages)?;
    let tools = convert_tools(request.tools.unwrap_or_default())?;
    let add_generation_prompt = request.add_generation_prompt.unwrap_or(true);
    let last = messages.last();
    let last_role = last.and_then(|message| message["role"].as_str()).unwrap_or_default();
    let role = if add_generation_prompt {
        app.chat_config.response_role.clone()
    } else {
        last_role.to_owned()
    };
    let echo = last
        .filter(|_| request.echo.unwrap_or(false) && last_role == role)
        .map(content_text);

    // What belongs to hidden reasoning is hidden with it.
    let has_reasoning_parser = app.chat.parsers().reasoning.is_some();
    let include_reasoning = request.include_reasoning.unwrap_or(true);
    let shows_tokens = include_reasoning || !has_reasoning_parser;
    let mut options = ReplyOptions::new(fields, &app.config, has_reasoning_parser);
    options.return_token_ids &= shows_tokens;

    let reply = ChatReply {
        head: context.head,
        options,
        role,
        top_logprobs: asked_logprobs.filter(|_| shows_tokens),
        n,
        echo,
        prompt: Arc::from([]),
        prompt_text: None,
        return_prompt_text: request.return_prompt_text.unwrap_or(false),
    };
    let effort = request.reasoning_effort.map(|effort| effort.0);
    let request = ChatRequest {
        messages,
        tools: match tool_choice {
            ToolChoice::None if app.chat_config.exclude_tools_when_none => Vec::new(),
            _ => tools,
        },
        tool_choice,
        parallel_tool_calls: request.parallel_tool_calls.unwrap_or(true),
        add_generation_prompt,
        continue_final_message: request.continue_final_message.unwrap_or(false),
        documents: request
            .documents
            .unwrap_or_default()
            .into_iter()
            .map(Value::Object)
            .collect(),
        template_kwargs: template_kwargs(&app.chat_config.template_kwargs, request.chat_template_kwargs, effort),
        chat_template: request.chat_template,
        include_reasoning,
        truncation,
        generate,
    };
    Ok(Conversion { request, reply })
}

/// The request's template arguments over the server's, with what `reasoning_effort` means to templates.
fn template_kwargs(
    defaults: &Map<String, Value>,
    request: Option<Map<String, Value>>,
    effort: Option<String>,
) -> Map<String, Value> {
    let mut kwargs = defaults.clone();
    let request = request.unwrap_or_default();
    if let Some(effort) = effort {
        if !request.contains_key("enable_thinking") {
            kwargs.insert("enable_thinking".to_owned(), Value::Bool(effort != "none"));
        }
        kwargs.insert("reasoning_effort".to_owned(), Value::String(effort));
    }
    kwargs.extend(request);
    kwargs.retain(|name, _| !RESERVED_KWARGS.contains(&name.as_str()));
    kwargs
}

/// The rendering that a `/tokenize` conversation asks for.
///
/// # Errors
/// As for a chat request with the same messages.
pub fn render_request(request: TokenizeRequest, app: &App) -> Result<RenderRequest, ApiError> {
    let in_kwargs = request
        .chat_template_kwargs
        .as_ref()
        .is_some_and(|kwargs| kwargs.contains_key("chat_template"));
    let brings_template = request.chat_template.is_some() || in_kwargs;
    super::validate::check_template_trust(brings_template, app.chat_config.trust_request_template)?;
    let add_generation_prompt = request.add_generation_prompt.unwrap_or(true);
    let continue_final_message = request.continue_final_message.unwrap_or(false);
    super::validate::check_continuation(continue_final_message, add_generation_prompt)?;
    let messages = request.messages.unwrap_or_default();
    check_messages(&messages)?;
    Ok(RenderRequest {
        messages,
        tools: convert_tools(request.tools.unwrap_or_default())?,
        documents: Vec::new(),
        add_generation_prompt,
        continue_final_message,
        template_kwargs: template_kwargs(&app.chat_config.template_kwargs, request.chat_template_kwargs, None),
        chat_template: request.chat_template,
        add_special_tokens: request.add_special_tokens.unwrap_or(false),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn request_kwargs_win_and_reserved_names_are_dropped() {
        let object = |value: Value| value.as_object().cloned().unwrap();
        let defaults = object(json!({"a": 1, "enable_thinking": true}));
        let merged = template_kwargs(
            &defaults,
            Some(object(json!({"a": 2, "messages": []}))),
            Some("none".into()),
        );
        assert_eq!(
            Value::Object(merged),
            json!({"a": 2, "enable_thinking": false, "reasoning_effort": "none"})
        );
        let merged = template_kwargs(
            &defaults,
            Some(object(json!({"enable_thinking": true}))),
            Some("none".into()),
        );
        assert_eq!(merged["enable_thinking"], true);
    }
}
