//! A chat request on its way down: messages and tools as templates see them, sampling resolved.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::messages::{check_messages, content_text, convert_tools};
use super::reply::ChatReply;
use super::types::ChatCompletionRequest;
use crate::chat::{ChatRequest, RenderRequest, ToolChoice};
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::openai::convert::{EndpointSampling, RequestContext, generate_request, resolve, thinking_budget};
use crate::server::openai::reply::ReplyOptions;
use crate::server::openai::structured::grammar_spec;
use crate::server::openai::tokenize::types::TokenizeRequest;
use crate::server::openai::truncate::truncation;

/// Template arguments that are fields of the request: the fields win, also by their defaults.
const FIELD_KWARGS: [&str; 2] = ["add_generation_prompt", "continue_final_message"];

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
        prompt_logprobs: prompt_logprobs(&request),
        ..EndpointSampling::default()
    };
    let resolved = resolve(fields, endpoint, app)?;
    let grammar = grammar_spec(fields, &app.chat_config.structured_outputs)?;
    let output_tokens = request.max_completion_tokens.or(fields.max_tokens).unwrap_or(0);
    let output_tokens = usize::try_from(output_tokens).unwrap_or(0);
    let truncation = truncation(fields, app.model.max_model_len, output_tokens)?;
    let mut generate = generate_request(fields, resolved, Arc::from([]), &context, app);
    generate.extensions.thinking_budget = thinking_budget(fields, app)?;
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
    let echo = request.echo.unwrap_or(false).then(|| {
        let continued = last.filter(|_| last_role == role);
        continued.map(content_text).unwrap_or_default()
    });

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
        cacheable_tokens: 0,
    };
    let effort = request.reasoning_effort.map(|effort| effort.0);
    let effort = effort.map(|effort| {
        app.chat_config
            .reasoning_effort_map
            .get(&effort)
            .cloned()
            .unwrap_or(effort)
    });
    let mut template_kwargs = template_kwargs(&app.chat_config.template_kwargs, request.chat_template_kwargs, effort);
    let documents = match request.documents {
        Some(documents) => documents
            .into_iter()
            .map(|document| Value::Object(document.0))
            .collect(),
        None => take_documents(&mut template_kwargs)?,
    };
    let request = ChatRequest {
        messages,
        tools: match tool_choice {
            ToolChoice::None if app.chat_config.exclude_tools_when_none => Vec::new(),
            _ => tools,
        },
        tool_choice,
        parallel_tool_calls: request.parallel_tool_calls.unwrap_or(true),
        grammar,
        add_generation_prompt,
        continue_final_message: request.continue_final_message.unwrap_or(false),
        add_special_tokens: request.add_special_tokens.unwrap_or(false),
        documents,
        template_kwargs,
        chat_template: request.chat_template,
        include_reasoning,
        truncation,
        generate,
    };
    Ok(Conversion { request, reply })
}

/// Alternatives per prompt token. `echo` asks for them like `top_logprobs`, as in vLLM; a stream has no place for them.
fn prompt_logprobs(request: &ChatCompletionRequest) -> Option<i64> {
    let echoed = request.echo.unwrap_or(false) && !request.sampling.stream.unwrap_or(false);
    request
        .sampling
        .prompt_logprobs
        .or(echoed.then(|| request.top_logprobs.unwrap_or(0)))
}

/// The request's template arguments over the server's, with what `reasoning_effort` means to templates. As in vLLM, null
/// and "auto" leave the server's argument as it is, and the field `reasoning_effort` beats the argument of that name.
pub fn template_kwargs(
    defaults: &Map<String, Value>,
    request: Option<Map<String, Value>>,
    effort: Option<String>,
) -> Map<String, Value> {
    let mut asked = request.unwrap_or_default();
    if let Some(effort) = effort {
        if !asked.contains_key("enable_thinking") {
            asked.insert("enable_thinking".to_owned(), Value::Bool(effort != "none"));
        }
        asked.insert("reasoning_effort".to_owned(), Value::String(effort));
    }
    asked.retain(|name, _| !FIELD_KWARGS.contains(&name.as_str()));
    let mut kwargs = defaults.clone();
    if !kwargs.is_empty() {
        asked.retain(|_, value| !value.is_null() && value != "auto");
    }
    kwargs.extend(asked);
    kwargs
}

/// The template argument `documents`, which stands for the field of that name where there is none.
///
/// # Errors
/// 400: it is no list.
fn take_documents(kwargs: &mut Map<String, Value>) -> Result<Vec<Value>, ApiError> {
    match kwargs.shift_remove("documents") {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(documents)) => Ok(documents),
        Some(_) => Err(ApiError::invalid(
            "chat_template_kwargs",
            "the template argument `documents` must be a list",
        )),
    }
}

/// The rendering that a `/tokenize` conversation asks for.
///
/// # Errors
/// As for a chat request with the same messages.
pub fn render_request(request: TokenizeRequest, app: &App) -> Result<RenderRequest, ApiError> {
    super::validate::check_template_trust(
        request.chat_template.is_some(),
        request.chat_template_kwargs.as_ref(),
        app.chat_config.trust_request_template,
    )?;
    super::validate::check_media_kwargs(request.mm_processor_kwargs.as_ref(), request.media_io_kwargs.as_ref())?;
    let add_generation_prompt = request.add_generation_prompt.unwrap_or(true);
    let continue_final_message = request.continue_final_message.unwrap_or(false);
    super::validate::check_continuation(continue_final_message, add_generation_prompt)?;
    let messages = request.messages.unwrap_or_default();
    check_messages(&messages)?;
    let mut template_kwargs = template_kwargs(&app.chat_config.template_kwargs, request.chat_template_kwargs, None);
    Ok(RenderRequest {
        messages,
        tools: convert_tools(request.tools.unwrap_or_default())?,
        documents: take_documents(&mut template_kwargs)?,
        add_generation_prompt,
        continue_final_message,
        template_kwargs,
        chat_template: request.chat_template,
        add_special_tokens: request.add_special_tokens.unwrap_or(false),
        will_be_cut: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn request_kwargs_win_and_fields_win_over_them() {
        let object = |value: Value| value.as_object().cloned().unwrap();
        let defaults = object(json!({"a": 1, "enable_thinking": true}));
        let merged = template_kwargs(
            &defaults,
            Some(object(
                json!({"a": 2, "b": null, "c": "auto", "add_generation_prompt": false, "reasoning_effort": 3}),
            )),
            Some("none".into()),
        );
        assert_eq!(
            Value::Object(merged),
            json!({"a": 2, "enable_thinking": false, "reasoning_effort": "none"})
        );
        let unset = Some(object(json!({"b": null, "c": "auto"})));
        assert_eq!(
            Value::Object(template_kwargs(&Map::new(), unset, None)),
            json!({"b": null, "c": "auto"})
        );
        let merged = template_kwargs(
            &defaults,
            Some(object(json!({"enable_thinking": true}))),
            Some("none".into()),
        );
        assert_eq!(merged["enable_thinking"], true);
    }
}
