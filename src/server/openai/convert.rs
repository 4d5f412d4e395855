//! The shared sampling fields on their way down.

use std::sync::Arc;

use axum::http::HeaderMap;

use super::reply::Head;
use super::types::SamplingFields;
use super::validate::repetition_detection;
use crate::config::GenerationDefaults;
use crate::engine::ThinkingBudget;
use crate::server::error::ApiError;
use crate::server::{App, ids};
use crate::step::TokenId;
use crate::text::{
    BeamSearch, GenerateExtensions, GenerateRequest, ResolvedSampling, SamplingOptions, SamplingRules, resolve_sampling,
};

const PRIORITY: &str = "x-vllm-priority";

/// What the endpoints name differently.
#[derive(Clone, Copy, Debug, Default)]
pub struct EndpointSampling {
    /// `max_completion_tokens`, which beats `max_tokens`.
    pub max_completion_tokens: Option<i64>,
    /// Alternatives per token, from `top_logprobs` or `logprobs`.
    pub logprobs: Option<i64>,
    /// In place of the request's own.
    pub max_tokens: Option<i64>,
    pub prompt_logprobs: Option<i64>,
    /// `max_tokens` where the request names none.
    pub default_max_tokens: Option<u32>,
    /// Only `max_tokens` has the generation config's default; the rest has vLLM's neutral values.
    pub neutral_defaults: bool,
}

/// Completes the sampling fields by the generation config's defaults.
///
/// # Errors
/// 400 for a value out of bounds.
pub fn resolve(fields: &SamplingFields, endpoint: EndpointSampling, app: &App) -> Result<ResolvedSampling, ApiError> {
    let max_tokens = endpoint
        .max_tokens
        .or(endpoint.max_completion_tokens)
        .or(fields.max_tokens);
    let options = SamplingOptions {
        n: fields.n,
        temperature: fields.temperature,
        top_p: fields.top_p,
        top_k: fields.top_k,
        min_p: fields.min_p,
        repetition_penalty: fields.repetition_penalty,
        presence_penalty: fields.presence_penalty,
        frequency_penalty: fields.frequency_penalty,
        seed: fields.seed,
        max_tokens,
        max_tokens_param: match endpoint.max_completion_tokens {
            Some(_) => "max_completion_tokens",
            None => "max_tokens",
        },
        min_tokens: fields.min_tokens,
        ignore_eos: fields.ignore_eos.unwrap_or(false),
        stop: fields.stop.clone().unwrap_or_default().0,
        stop_token_ids: fields.stop_token_ids.clone().unwrap_or_default(),
        logit_bias: fields.logit_bias.clone().unwrap_or_default().0,
        allowed_token_ids: fields.allowed_token_ids.clone(),
        bad_words: fields.bad_words.clone().unwrap_or_default(),
        logprobs: endpoint.logprobs,
        prompt_logprobs: endpoint.prompt_logprobs,
        beam_search: fields.use_beam_search.unwrap_or(false),
    };
    let model = &app.model;
    let neutral = GenerationDefaults {
        max_new_tokens: model.generation_defaults.max_new_tokens,
        max_new_tokens_is_cap: model.generation_defaults.max_new_tokens_is_cap,
        ..GenerationDefaults::default()
    };
    let rules = SamplingRules {
        limits: app.config.request_limits,
        defaults: if endpoint.neutral_defaults {
            &neutral
        } else {
            &model.generation_defaults
        },
        tokenizer: app.tokenizer(),
        vocab_size: model.vocab_size,
        max_model_len: model.max_model_len,
        max_logprobs: model.max_logprobs,
        logprobs_mode: model.logprobs_mode,
        default_max_tokens: endpoint.default_max_tokens,
    };
    Ok(resolve_sampling(options, &rules)?)
}

/// What a request's headers and the server add to its body.
#[derive(Clone, Debug)]
pub struct RequestContext {
    pub head: Head,
    /// `X-Vllm-Priority`, which beats the body's; as in vLLM, one that is no integer counts as absent.
    pub priority: Option<i64>,
}

impl RequestContext {
    /// `prefix` stands before the response's id.
    ///
    /// # Errors
    /// 404 for a model that is not served.
    pub fn new(
        prefix: &str,
        model: Option<&str>,
        fields: &SamplingFields,
        headers: &HeaderMap,
        app: &App,
    ) -> Result<Self, ApiError> {
        let id = ids::of_request(headers, fields.request_id.as_deref());
        Self::with_id(format!("{prefix}{id}"), model, headers, app)
    }

    /// `id` is the response's, with its prefix.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_id(id: String, model: Option<&str>, headers: &HeaderMap, app: &App) -> Result<Self, ApiError> {
        let model = app.model_name(model)?;
        let priority = headers
            .get(PRIORITY)
            .and_then(|value| value.to_str().ok()?.trim().parse().ok());
        Ok(Self {
            head: Head::new(id, model, &app.config),
            priority,
        })
    }
}

/// The text layer's request for one prompt.
pub fn generate_request(
    fields: &SamplingFields,
    resolved: ResolvedSampling,
    prompt: Arc<[TokenId]>,
    context: &RequestContext,
    app: &App,
) -> GenerateRequest {
    let skip_by_default = app.model.generation_defaults.skip_special_tokens.unwrap_or(true);
    GenerateRequest {
        id: context.head.id.clone(),
        prompt,
        sampling: resolved.sampling,
        n: resolved.n,
        max_tokens: resolved.max_tokens,
        min_tokens: resolved.min_tokens,
        ignore_eos: resolved.ignore_eos,
        stop_token_ids: resolved.stop_token_ids,
        stop: resolved.stop,
        include_stop_str_in_output: fields.include_stop_str_in_output.unwrap_or(false),
        skip_special_tokens: fields.skip_special_tokens.unwrap_or(skip_by_default),
        spaces_between_special_tokens: fields.spaces_between_special_tokens.unwrap_or(true),
        priority: context.priority.or(fields.priority).unwrap_or(0),
        cache_salt: fields.cache_salt.clone(),
        extensions: extensions(fields, app),
    }
}

/// For fields that passed `validate`; what can still fail is the endpoints' to add.
fn extensions(fields: &SamplingFields, app: &App) -> GenerateExtensions {
    let asked = fields
        .stream_interval
        .and_then(|interval| usize::try_from(interval).ok());
    GenerateExtensions {
        stream_interval: match fields.stream {
            Some(true) => asked.unwrap_or(1).max(app.config.stream_interval),
            _ => 1,
        },
        repetition_detection: repetition_detection(fields).unwrap_or_default(),
        beam_search: fields.use_beam_search.unwrap_or(false).then(|| BeamSearch {
            length_penalty: fields.length_penalty.unwrap_or(1.0),
        }),
        stream: fields.stream.unwrap_or(false),
        constraint: None,
        thinking_budget: None,
    }
}

/// `thinking_token_budget` by the markers of the reasoning parser; -1 is absent.
///
/// # Errors
/// 400: no count, no parser, or markers that cannot be forced.
pub fn thinking_budget(fields: &SamplingFields, app: &App) -> Result<Option<ThinkingBudget>, ApiError> {
    const PARAM: &str = "thinking_token_budget";
    let Some(asked) = &fields.thinking_token_budget else {
        return Ok(None);
    };
    let max_tokens = match asked.as_i64() {
        Some(-1) => return Ok(None),
        Some(count) => usize::try_from(count).ok(),
        None => None,
    };
    let max_tokens = max_tokens.ok_or_else(|| {
        let message = format!("`{PARAM}` must be a non-negative integer or -1 for unlimited.");
        ApiError::invalid(PARAM, message)
    })?;
    let Some(parser) = app.chat.parsers().reasoning else {
        let message = format!(
            "{PARAM} is set but there is no reasoning parser; the server can be given one with --reasoning-parser"
        );
        return Err(ApiError::invalid(PARAM, message));
    };
    let [open, close] = parser.markers.map(|marker| app.tokenizer().token_to_id(marker));
    let (Some(open), Some(close)) = (open, close) else {
        let message = format!("{PARAM}: the model has no tokens for the beginning and the end of reasoning");
        return Err(ApiError::invalid(PARAM, message));
    };
    let allowed = fields.allowed_token_ids.as_deref();
    if allowed.is_some_and(|allowed| !allowed.contains(&i64::from(close))) {
        let message = format!("{PARAM} needs token {close}, the end of reasoning, among the allowed_token_ids");
        return Err(ApiError::invalid(PARAM, message));
    }
    Ok(Some(ThinkingBudget {
        max_tokens,
        open,
        close,
    }))
}
