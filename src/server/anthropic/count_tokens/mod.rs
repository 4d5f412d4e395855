//! `POST /v1/messages/count_tokens`: the prompt's length, without an answer.

pub mod types;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;

use self::types::{ContextManagement, CountTokensResponse};
use super::messages::types::PromptFields;
use super::messages::{convert, thinking, validate};
use crate::server::App;
use crate::server::body::JsonBody;
use crate::server::error::{AnthropicError, ApiError};
use crate::server::openai::chat_completions;
use crate::server::openai::convert::RequestContext;

pub async fn create(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(request): JsonBody<PromptFields>,
) -> Result<Json<CountTokensResponse>, AnthropicError> {
    count(request, &headers, &app).await.map(Json).map_err(AnthropicError)
}

async fn count(request: PromptFields, headers: &HeaderMap, app: &App) -> Result<CountTokensResponse, ApiError> {
    validate::check_prompt(&request)?;
    let disabled_effort = thinking::disabled_effort(app).await;
    let request = convert::convert_prompt(request, disabled_effort);
    let context = RequestContext::new("chatcmpl-", request.model.as_deref(), &request.sampling, headers, app)?;
    let mut chat = chat_completions::checked(request, context, app)?.request;
    let input_tokens = app.chat.render(chat.take_render_request()).await?.token_ids.len();
    Ok(CountTokensResponse {
        input_tokens,
        context_management: ContextManagement {
            original_input_tokens: input_tokens,
        },
    })
}
