//! From texts, token ids and conversations to prompts.

use std::sync::Arc;

use serde_json::Value;

use super::types::{EmbeddingRequest, SharedFields};
use crate::chat::RenderRequest;
use crate::server::error::ApiError;
use crate::server::openai::chat_completions::convert::template_kwargs;
use crate::server::openai::chat_completions::messages::check_messages;
use crate::server::openai::chat_completions::validate::{check_continuation, check_media_kwargs, check_template_trust};
use crate::server::openai::completions::types::Prompt;
use crate::server::{App, blocking};
use crate::step::TokenId;
use crate::text::Truncation;

/// How prompts are cut: `truncate_prompt_tokens`, -1 = to the context.
///
/// # Errors
/// 400: longer than the context, or padding, which a paged engine has no use for.
pub fn truncation(app: &App, fields: &SharedFields) -> Result<Option<Truncation>, ApiError> {
    if fields.padding.as_ref().is_some_and(|padding| padding.0 == "max_length") {
        return Err(ApiError::unsupported("padding"));
    }
    let context = app.model.max_model_len;
    let keep_end = fields.truncation_side.as_ref().is_some_and(|side| side.0 == "left");
    let max_tokens = match fields.truncate_prompt_tokens {
        None => return Ok(None),
        Some(-1) => context,
        Some(asked) => match usize::try_from(asked) {
            Ok(count) if (1..=context).contains(&count) => count,
            _ => {
                return Err(ApiError::invalid_value(
                    "truncate_prompt_tokens",
                    format!("truncate_prompt_tokens must be -1 or from 1 to max_model_len ({context})"),
                    asked,
                ));
            }
        },
    };
    Ok(Some(Truncation { max_tokens, keep_end }))
}

/// The prompts of `/v1/embeddings` and `/pooling`.
///
/// # Errors
/// 400 that names the field.
pub async fn prompts(app: &Arc<App>, request: &EmbeddingRequest) -> Result<Vec<Arc<[TokenId]>>, ApiError> {
    let truncation = truncation(app, &request.shared)?;
    let cut = |mut ids: Vec<TokenId>| -> Arc<[TokenId]> {
        if let Some(truncation) = &truncation {
            truncation.apply(&mut ids);
        }
        ids.into()
    };
    if let Some(input) = &request.input {
        if input.0.is_empty() {
            return Err(ApiError::invalid("input", "The input cannot be empty."));
        }
        let special = request.add_special_tokens.unwrap_or(true);
        let ids = texts_and_ids(app, input.0.clone(), special, truncation.is_some()).await?;
        return Ok(ids.into_iter().map(cut).collect());
    }
    let Some(messages) = &request.messages else {
        return Err(ApiError::missing("input"));
    };
    let mut prompts = Vec::new();
    for conversation in conversations(messages)? {
        let rendered = app.chat.render(render_request(app, request, conversation)?).await?;
        prompts.push(cut(rendered.token_ids.to_vec()));
    }
    Ok(prompts)
}

/// Token ids of every prompt; texts are tokenized where blocking is allowed.
///
/// # Errors
/// 400: a text that is far too long, unless it `will_be_cut`.
pub async fn texts_and_ids(
    app: &Arc<App>,
    prompts: Vec<Prompt>,
    add_special_tokens: bool,
    will_be_cut: bool,
) -> Result<Vec<Vec<TokenId>>, ApiError> {
    let text = app.text().clone();
    let encode = move |prompt| match prompt {
        Prompt::Tokens(ids) => Ok(ids),
        Prompt::Text(prompt) if will_be_cut => text.encode(&prompt, add_special_tokens),
        Prompt::Text(prompt) => text.encode_prompt(&prompt, add_special_tokens),
    };
    Ok(blocking(move || prompts.into_iter().map(encode).collect::<Result<_, _>>()).await??)
}

/// One conversation, or a list of them.
fn conversations(messages: &[Value]) -> Result<Vec<Vec<Value>>, ApiError> {
    if !messages.first().is_some_and(Value::is_array) {
        return Ok(vec![messages.to_vec()]);
    }
    messages
        .iter()
        .map(|conversation| {
            let wrong = || {
                ApiError::invalid(
                    "messages",
                    "messages must be a list of messages or a list of such lists",
                )
            };
            conversation.as_array().cloned().ok_or_else(wrong)
        })
        .collect()
}

fn render_request(app: &App, request: &EmbeddingRequest, messages: Vec<Value>) -> Result<RenderRequest, ApiError> {
    let kwargs = request.shared.chat_template_kwargs.clone();
    check_template_trust(
        request.chat_template.is_some(),
        kwargs.as_ref(),
        app.chat_config.trust_request_template,
    )?;
    let add_generation_prompt = request.add_generation_prompt.unwrap_or(false);
    let continue_final_message = request.continue_final_message.unwrap_or(false);
    check_continuation(continue_final_message, add_generation_prompt)?;
    check_media_kwargs(None, request.media_io_kwargs.as_ref())?;
    check_messages(&messages)?;
    Ok(RenderRequest {
        messages,
        add_generation_prompt,
        continue_final_message,
        template_kwargs: template_kwargs(&app.chat_config.template_kwargs, kwargs, None),
        chat_template: request.chat_template.clone(),
        add_special_tokens: request.add_special_tokens.unwrap_or(false),
        will_be_cut: request.shared.truncate_prompt_tokens.is_some(),
        ..RenderRequest::default()
    })
}
