//! `POST /tokenize` and `POST /detokenize`.

pub mod types;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use self::types::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};
use crate::server::body::JsonBody;
use crate::server::error::ApiError;
use crate::server::openai::chat_completions::convert::render_request;
use crate::server::{App, blocking};
use crate::step::TokenId;

pub async fn tokenize(
    State(app): State<Arc<App>>,
    JsonBody(request): JsonBody<TokenizeRequest>,
) -> Result<Json<TokenizeResponse>, ApiError> {
    app.model_name(request.model.as_deref())?;
    let with_strings = request.return_token_strs.unwrap_or(false);
    let tokens: Arc<[TokenId]> = match (request.prompt.clone(), &request.messages) {
        (Some(prompt), _) => {
            let add_special_tokens = request.add_special_tokens.unwrap_or(true);
            let text = app.text().clone();
            blocking(move || text.encode_prompt(&prompt, add_special_tokens))
                .await??
                .into()
        }
        (None, Some(_)) => app.chat.render(render_request(request, &app)?).await?.token_ids,
        (None, None) => return Err(ApiError::missing("prompt")),
    };
    let token_strs = with_strings.then(|| tokens.iter().map(|id| token_string(&app, *id)).collect());
    Ok(Json(TokenizeResponse {
        count: tokens.len(),
        max_model_len: app.model.max_model_len,
        tokens: tokens.to_vec(),
        token_strs,
    }))
}

fn token_string(app: &App, id: TokenId) -> String {
    app.tokenizer().id_to_token(id).unwrap_or_default()
}

pub async fn detokenize(
    State(app): State<Arc<App>>,
    JsonBody(request): JsonBody<DetokenizeRequest>,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    app.model_name(request.model.as_deref())?;
    let Some(tokens) = request.tokens else {
        return Err(ApiError::missing("tokens"));
    };
    blocking(move || {
        let ids: Result<Vec<TokenId>, ApiError> = tokens.iter().map(|id| known_id(*id)).collect();
        Ok(DetokenizeResponse {
            prompt: app.tokenizer().decode(&ids?, false),
        })
    })
    .await?
    .map(Json)
}

/// Ids outside the vocabulary decode to nothing; negative ones are no ids.
fn known_id(id: i64) -> Result<TokenId, ApiError> {
    if id < 0 {
        return Err(ApiError::invalid_value("tokens", "token ids must not be negative", id));
    }
    Ok(TokenId::try_from(id).unwrap_or(TokenId::MAX))
}
