//! `POST /v1/messages`.

pub mod convert;
pub mod reply;
pub mod thinking;
pub mod types;
pub mod validate;

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};

use self::reply::{EventBuilder, MessageReply};
use self::types::MessagesRequest;
use crate::chat;
use crate::metrics::RequestType;
use crate::server::body::JsonBody;
use crate::server::error::{AnthropicError, ApiError};
use crate::server::openai::convert::RequestContext;
use crate::server::openai::{chat_completions, tool_metrics};
use crate::server::{App, sse};

pub async fn create(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(request): JsonBody<MessagesRequest>,
) -> Result<Response, AnthropicError> {
    answer(request, &headers, &app).await.map_err(AnthropicError)
}

async fn answer(request: MessagesRequest, headers: &HeaderMap, app: &App) -> Result<Response, ApiError> {
    validate::check(&request)?;
    let streams = request.stream.unwrap_or(false);
    let disabled_effort = thinking::disabled_effort(app).await;
    let request = convert::convert(request, disabled_effort);
    let context = RequestContext::new("chatcmpl-", request.model.as_deref(), &request.sampling, headers, app)?;
    let (reply, events) = chat_completions::start(request, context, app).await?;
    let events = tool_metrics::counted(events, app.metrics.clone(), streams, RequestType::Other);
    let n = reply.n;
    let reply = MessageReply::new(reply);
    if streams {
        let keep_alive = Duration::from_secs(app.config.sse_keep_alive_s);
        let frames = sse::framed(events, EventBuilder::new(reply));
        return Ok(sse::named(frames, keep_alive));
    }
    let choice = chat::collect(n, events).await?.into_iter().next();
    let choice = choice.ok_or_else(|| ApiError::internal("the answer has no choice"))?;
    Ok(Json(reply::message(&reply, choice)).into_response())
}
