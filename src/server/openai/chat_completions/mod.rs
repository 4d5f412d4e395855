//! `POST /v1/chat/completions`.

pub mod batch;
pub mod convert;
pub mod messages;
pub mod reply;
pub mod types;
pub mod validate;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;

use self::convert::{Conversion, convert};
use self::reply::{ChatReply, ChunkBuilder};
use self::types::ChatCompletionRequest;
use self::validate::ChatRules;
use crate::chat::{self, Chat, ChatStream};
use crate::metrics::RequestType;
use crate::server::body::JsonBody;
use crate::server::error::ApiError;
use crate::server::openai::convert::RequestContext;
use crate::server::openai::load_report;
use crate::server::openai::tool_metrics;
use crate::server::{App, sse};

pub async fn create(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(request): JsonBody<ChatCompletionRequest>,
) -> Result<Response, ApiError> {
    let context = RequestContext::new("chatcmpl-", request.model.as_deref(), &request.sampling, &headers, &app)?;
    let streams = request.sampling.stream.unwrap_or(false);
    let (reply, events) = start(request, context, &app).await?;
    let events = tool_metrics::counted(events, app.metrics.clone(), streams, RequestType::ChatCompletions);
    if streams {
        let keep_alive = Duration::from_secs(app.config.sse_keep_alive_s);
        return Ok(sse::response(sse::framed(events, ChunkBuilder::new(reply)), keep_alive));
    }
    let choices = chat::collect(reply.n, events).await?;
    Ok(load_report::answered(reply::response(reply, choices), &headers, &app))
}

/// Checks, converts and starts a chat request; other protocols bring theirs in this form.
///
/// # Errors
/// As [`checked`] and [`begin`].
pub async fn start(
    request: ChatCompletionRequest,
    context: RequestContext,
    app: &App,
) -> Result<(ChatReply, ChatStream), ApiError> {
    begin(checked(request, context, app)?, app).await
}

/// # Errors
/// The conversation cannot be rendered, the prompt is too long, or the queue is full.
pub async fn begin(conversion: Conversion, app: &App) -> Result<(ChatReply, ChatStream), ApiError> {
    let Conversion { request, mut reply } = conversion;
    let Chat { prompt, events } = app.chat.chat(request).await?;
    reply.set_prompt(prompt, app.engine());
    Ok((reply, events))
}

/// # Errors
/// 400: a rule is broken.
pub fn checked(request: ChatCompletionRequest, context: RequestContext, app: &App) -> Result<Conversion, ApiError> {
    let rules = ChatRules {
        trust_request_template: app.chat_config.trust_request_template,
        has_tool_parser: app.chat.parsers().tool.is_some(),
        max_model_len: app.model.max_model_len,
        limits: app.config.request_limits,
    };
    let tool_choice = validate::check(&request, rules)?;
    convert(request, tool_choice, app, context)
}
