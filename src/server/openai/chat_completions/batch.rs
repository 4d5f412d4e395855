//! `POST /v1/chat/completions/batch`: several conversations in one request, one choice each.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use futures_util::future::try_join_all;
use serde_json::{Map, Value};

use super::reply;
use super::types::{ChatCompletionRequest, ChatCompletionResponse};
use crate::chat;
use crate::server::App;
use crate::server::body::{JsonBody, parse_value};
use crate::server::error::ApiError;
use crate::server::openai::convert::RequestContext;
use crate::server::openai::types::Usage;

/// Most conversations of one request.
const MAX_CONVERSATIONS: usize = 1024;

pub async fn create(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(body): JsonBody<Map<String, Value>>,
) -> Result<Json<ChatCompletionResponse>, ApiError> {
    let mut started = Vec::new();
    let mut head = None;
    for (i, request) in split(body)?.into_iter().enumerate() {
        check(&request)?;
        let mut context =
            RequestContext::new("chatcmpl-", request.model.as_deref(), &request.sampling, &headers, &app)?;
        // A request without an id gets a fresh one for each of its parts: the first names the answer.
        let head = head.get_or_insert_with(|| context.head.clone());
        context.head.id = format!("{}_{i}", head.id);
        started.push(super::start(request, context, &app).await?);
    }
    let answers = started.into_iter().map(|(reply, events)| async {
        let choices = chat::collect(reply.n, events).await?;
        Ok::<_, ApiError>(reply::response(reply, choices))
    });
    let answers = try_join_all(answers).await?;
    let usage = usage(&answers);
    let mut whole: Option<ChatCompletionResponse> = None;
    for (index, answer) in (0u32..).zip(answers) {
        let choices = answer.choices.iter().cloned().map(|mut choice| {
            choice.index = index;
            choice
        });
        let choices: Vec<_> = choices.collect();
        match &mut whole {
            Some(whole) => whole.choices.extend(choices),
            None => whole = Some(ChatCompletionResponse { choices, ..answer }),
        }
    }
    let (Some(mut whole), Some(head)) = (whole, head) else {
        return Err(ApiError::missing("messages"));
    };
    whole.id = head.id;
    whole.usage = usage;
    (whole.prompt_logprobs, whole.prompt_token_ids, whole.prompt_text) = (None, None, None);
    Ok(Json(whole))
}

/// One chat request for each conversation.
fn split(mut body: Map<String, Value>) -> Result<Vec<ChatCompletionRequest>, ApiError> {
    let location = |i: usize| vec!["messages".to_owned(), i.to_string()];
    let conversations = match body.remove("messages") {
        None | Some(Value::Null) => return Err(ApiError::missing("messages")),
        Some(Value::Array(conversations)) => conversations,
        Some(_) => {
            return Err(ApiError::validation(
                "list_type",
                &["messages".to_owned()],
                "Input should be a valid list",
            ));
        }
    };
    if conversations.is_empty() || conversations.len() > MAX_CONVERSATIONS {
        return Err(ApiError::invalid(
            "messages",
            format!("from 1 to {MAX_CONVERSATIONS} conversations are allowed"),
        ));
    }
    let request = |(i, conversation): (usize, Value)| {
        if !conversation.is_array() {
            return Err(ApiError::validation(
                "list_type",
                &location(i),
                "Input should be a valid list",
            ));
        }
        let mut single = body.clone();
        single.insert("messages".to_owned(), conversation);
        parse_value(Value::Object(single), &[])
    };
    conversations.into_iter().enumerate().map(request).collect()
}

/// What a batch cannot have.
fn check(request: &ChatCompletionRequest) -> Result<(), ApiError> {
    let refused = |field: &str| {
        Err(ApiError::invalid(
            field,
            format!("Batch chat completions do not support {field}"),
        ))
    };
    if request.sampling.stream.unwrap_or(false) {
        return refused("stream");
    }
    if request.tools.is_some() {
        return refused("tools");
    }
    if request.sampling.n.is_some_and(|n| n != 1) {
        return refused("n");
    }
    if request.sampling.use_beam_search.unwrap_or(false) {
        return refused("use_beam_search");
    }
    Ok(())
}

fn usage(answers: &[ChatCompletionResponse]) -> Usage {
    let sum = |count: fn(&Usage) -> usize| answers.iter().map(|answer| count(&answer.usage)).sum();
    Usage {
        prompt_tokens: sum(|usage| usage.prompt_tokens),
        total_tokens: sum(|usage| usage.total_tokens),
        completion_tokens: sum(|usage| usage.completion_tokens),
        prompt_tokens_details: None,
        completion_tokens_details: None,
    }
}
