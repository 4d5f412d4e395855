//! `POST /v1/chat/completions/render` and `POST /v1/completions/render`: the request for `/inference/v1/generate` that
//! stands for a chat or a completion.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use serde_json::{Value, json};

use super::check_enabled;
use crate::chat::{RenderRequest, ToolChoice};
use crate::server::body::JsonBody;
use crate::server::error::ApiError;
use crate::server::openai::chat_completions::{self, types::ChatCompletionRequest};
use crate::server::openai::completions::{self, types::CompletionRequest};
use crate::server::openai::convert::RequestContext;
use crate::server::openai::types::SamplingFields;
use crate::server::{App, blocking};
use crate::text::GenerateRequest;

pub async fn chat(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(request): JsonBody<ChatCompletionRequest>,
) -> Result<Json<Value>, ApiError> {
    check_enabled(&app)?;
    check(&request.sampling)?;
    let asked = Asked::new(request.model.as_deref(), &request.sampling);
    let context = RequestContext::new("chatcmpl-", request.model.as_deref(), &request.sampling, &headers, &app)?;
    let request = chat_completions::checked(request, context, &app)?.request;
    if matches!(request.tool_choice, ToolChoice::Required | ToolChoice::Named(_)) {
        return Err(ApiError::unsupported("tool_choice"));
    }
    let rendered = app
        .chat
        .render(RenderRequest {
            messages: request.messages,
            tools: request.tools,
            documents: request.documents,
            add_generation_prompt: request.add_generation_prompt,
            continue_final_message: request.continue_final_message,
            template_kwargs: request.template_kwargs,
            chat_template: request.chat_template,
            add_special_tokens: request.add_special_tokens,
            will_be_cut: request.truncation.is_some(),
        })
        .await?;
    let mut generate = request.generate;
    let mut ids = rendered.token_ids.to_vec();
    if let Some(truncation) = request.truncation {
        truncation.apply(&mut ids);
    }
    generate.prompt = ids.into();
    Ok(Json(asked.generate_body(&generate, &app)?))
}

pub async fn completion(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(request): JsonBody<CompletionRequest>,
) -> Result<Json<Vec<Value>>, ApiError> {
    check_enabled(&app)?;
    check(&request.sampling)?;
    completions::validate::check(&request, &app.config.request_limits, app.model.max_model_len)?;
    let asked = Asked::new(request.model.as_deref(), &request.sampling);
    let context = RequestContext::new("cmpl-", request.model.as_deref(), &request.sampling, &headers, &app)?;
    let converting = app.clone();
    let conversion = blocking(move || completions::convert::convert(request, &converting, context, None)).await??;
    let bodies = conversion
        .requests
        .iter()
        .map(|generate| asked.generate_body(generate, &app));
    Ok(Json(bodies.collect::<Result<_, _>>()?))
}

/// What the tokens of another server could not be held to.
fn check(fields: &SamplingFields) -> Result<(), ApiError> {
    if fields.use_beam_search.unwrap_or(false) {
        return Err(ApiError::invalid(
            "use_beam_search",
            "Beam search is not supported by the render endpoint",
        ));
    }
    for (field, given) in [
        ("response_format", fields.response_format.is_some()),
        ("structured_outputs", fields.structured_outputs.is_some()),
    ] {
        if given {
            return Err(ApiError::unsupported(field));
        }
    }
    Ok(())
}

/// What goes into the body as it was asked.
struct Asked {
    model: Option<String>,
    stream: bool,
    stream_options: Value,
    seed: Option<i64>,
    bad_words: Vec<String>,
}

impl Asked {
    fn new(model: Option<&str>, fields: &SamplingFields) -> Self {
        let stream = fields.stream.unwrap_or(false);
        let options = fields.stream_options.as_ref().filter(|_| stream);
        Self {
            model: model.map(str::to_owned),
            stream,
            stream_options: options.map_or(Value::Null, |options| {
                json!({
                    "include_usage": options.include_usage.unwrap_or(false),
                    "continuous_usage_stats": options.continuous_usage_stats.unwrap_or(false),
                })
            }),
            seed: fields.seed,
            bad_words: fields.bad_words.clone().unwrap_or_default(),
        }
    }

    fn generate_body(&self, generate: &GenerateRequest, app: &App) -> Result<Value, ApiError> {
        let room = app.text().check_prompt(&generate.prompt)?;
        let sampling = &generate.sampling;
        let bias: serde_json::Map<String, Value> = sampling
            .logit_bias
            .iter()
            .map(|(id, bias)| (id.to_string(), json!(bias)))
            .collect();
        Ok(json!({
            "request_id": generate.id,
            "token_ids": &generate.prompt[..],
            "token_offsets": null,
            "features": null,
            "content_parts": null,
            "sampling_params": {
                "n": generate.n,
                "presence_penalty": sampling.presence_penalty,
                "frequency_penalty": sampling.frequency_penalty,
                "repetition_penalty": sampling.repetition_penalty,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
                "seed": self.seed,
                "stop": generate.stop,
                "stop_token_ids": generate.stop_token_ids,
                "ignore_eos": generate.ignore_eos,
                "max_tokens": generate.max_tokens.map_or(room, |asked| asked.min(room)),
                "min_tokens": generate.min_tokens,
                "logprobs": sampling.logprobs,
                "prompt_logprobs": sampling.prompt_logprobs,
                "skip_special_tokens": generate.skip_special_tokens,
                "spaces_between_special_tokens": generate.spaces_between_special_tokens,
                "include_stop_str_in_output": generate.include_stop_str_in_output,
                "logit_bias": if bias.is_empty() { Value::Null } else { Value::Object(bias) },
                "allowed_token_ids": sampling.allowed_token_ids,
                "bad_words": self.bad_words,
            },
            "model": self.model,
            "reasoning_ended": null,
            "reasoning_parser_kwargs": null,
            "return_token_ids": null,
            "output_mode": "tokens",
            "parse_context": null,
            "stream": self.stream,
            "stream_options": self.stream_options,
            "cache_salt": generate.cache_salt,
            "priority": generate.priority,
            "kv_transfer_params": null,
            "ec_transfer_params": null,
        }))
    }
}
