//! `/inference/v1/*` and `/v1/*/render`: tokens in and out for servers that render elsewhere. Without `--enable-scale-out`
//! or `--tokens-only` they answer 403, as vLLM's do.

pub mod render;
mod reply;
pub mod types;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;

use self::reply::TokensReply;
use self::types::{GenerateBody, SamplingBody};
use crate::grammar::{Constraint, Start};
use crate::server::body::{JsonBody, JsonObject, string_list};
use crate::server::error::ApiError;
use crate::server::openai::convert::{EndpointSampling, RequestContext, generate_request, resolve};
use crate::server::openai::reply::ReplyOptions;
use crate::server::openai::structured::grammar_spec;
use crate::server::openai::validate::check_shared;
use crate::server::{App, sse};
use crate::step::TokenId;
use crate::text;

/// # Errors
/// 403: the flag is missing.
fn check_enabled(app: &App) -> Result<(), ApiError> {
    let routes = &app.config.routes;
    if routes.scale_out || routes.tokens_only {
        return Ok(());
    }
    Err(ApiError::permission_denied("This route needs --enable-scale-out"))
}

/// `POST /inference/v1/generate`.
pub async fn generate(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(mut body): JsonBody<GenerateBody>,
) -> Result<Response, ApiError> {
    check_enabled(&app)?;
    check(&body)?;
    let token_ids = body.token_ids.take().ok_or_else(|| ApiError::missing("token_ids"))?;
    let prompt: Arc<[TokenId]> = token_ids.into_iter().map(token_id).collect::<Result<_, _>>()?;
    let SamplingBody {
        logprobs, mut fields, ..
    } = body
        .sampling_params
        .take()
        .ok_or_else(|| ApiError::missing("sampling_params"))?;
    fields.stream = body.stream;
    fields.stream_options = body.stream_options.take();
    fields.cache_salt = body.cache_salt.take();
    fields.priority = body.priority;
    fields.request_id = body.request_id.take();
    check_shared(&fields, &app.config.request_limits)?;

    let context = RequestContext::new("generate-tokens-", body.model.as_deref(), &fields, &headers, &app)?;
    let endpoint = EndpointSampling {
        logprobs,
        prompt_logprobs: fields.prompt_logprobs,
        neutral_defaults: true,
        ..EndpointSampling::default()
    };
    let resolved = resolve(&fields, endpoint, &app)?;
    let mut request = generate_request(&fields, resolved, prompt.clone(), &context, &app);
    if let Some(spec) = grammar_spec(&fields, &app.chat_config.structured_outputs)? {
        request.extensions.constraint = Some(Constraint {
            grammar: app.text().compile_grammar(spec).await?,
            start: Start::Now,
        });
    }
    let reply = TokensReply {
        head: context.head,
        options: ReplyOptions::new(&fields, &app.config, false),
        logprobs,
        n: request.n,
        prompt,
        return_prompt: body.return_token_ids.unwrap_or(false),
        as_text: body.output_mode.as_ref().is_some_and(|mode| mode.0 == "text"),
    };
    let deltas = app.text().generate(request)?;
    if fields.stream.unwrap_or(false) {
        let mut chunks = reply::ChunkBuilder::new(reply);
        let frames = deltas
            .map(Some)
            .chain(futures_util::stream::once(async { None }))
            .map(move |delta| match delta {
                Some(delta) => Ok(chunks.delta(delta?)),
                None => Ok(chunks.end()),
            });
        return Ok(sse::response(frames, std::time::Duration::ZERO));
    }
    let choices = text::collect(deltas).await?;
    Ok(Json(reply.response(choices)).into_response())
}

/// What this server has no part of.
fn check(body: &GenerateBody) -> Result<(), ApiError> {
    for (field, given) in [
        ("features", body.features.is_some()),
        ("content_parts", body.content_parts.is_some()),
        ("parse_context", body.parse_context.is_some()),
        ("reasoning_parser_kwargs", body.reasoning_parser_kwargs.is_some()),
        ("reasoning_ended", body.reasoning_ended.is_some()),
    ] {
        if given {
            return Err(ApiError::unsupported(field));
        }
    }
    if let Some(sampling) = &body.sampling_params {
        for (field, given) in [
            ("prompt_logprob_token_ids", sampling.prompt_logprob_token_ids.is_some()),
            (
                "prompt_logprob_start",
                sampling.prompt_logprob_start.is_some_and(|start| start != 0),
            ),
            (
                "skip_reading_prefix_cache",
                sampling.skip_reading_prefix_cache == Some(true),
            ),
            (
                "extra_args",
                sampling.extra_args.as_ref().is_some_and(|args| !args.is_empty()),
            ),
            ("flat_logprobs", sampling.flat_logprobs == Some(true)),
            ("trace_decode_token_ids", sampling.trace_decode_token_ids.is_some()),
        ] {
            if given {
                return Err(ApiError::unsupported(field));
            }
        }
    }
    let mode = body.output_mode.as_ref().map_or("tokens", |mode| mode.0.as_str());
    if mode == "derender" || (mode == "text" && body.stream.unwrap_or(false)) {
        return Err(ApiError::unsupported("output_mode"));
    }
    Ok(())
}

/// Ids above u32 are kept as one that no vocabulary has.
fn token_id(id: i64) -> Result<TokenId, ApiError> {
    if id < 0 {
        return Err(ApiError::invalid_value(
            "token_ids",
            "token_ids must not contain negative values",
            id,
        ));
    }
    Ok(TokenId::try_from(id).unwrap_or(TokenId::MAX))
}

/// `POST /inference/v1/abort_requests`, and `/abort_requests` with `--tokens-only`.
pub async fn abort_requests(State(app): State<Arc<App>>, JsonObject(body): JsonObject) -> Result<StatusCode, ApiError> {
    check_enabled(&app)?;
    let ids = string_list(&body, "request_ids")?
        .ok_or_else(|| ApiError::plain(StatusCode::BAD_REQUEST, "Missing 'request_ids' in request body"))?;
    app.engine().abort_requests(Some(ids)).await?;
    Ok(StatusCode::OK)
}

/// The routes whose way back from tokens is not built.
pub async fn not_built(State(app): State<Arc<App>>) -> ApiError {
    match check_enabled(&app) {
        Err(refused) => refused,
        Ok(()) => ApiError::not_implemented("this scale-out route of vLLM is not built in this server"),
    }
}
