//! `POST /v1/responses`, and the stored responses below it.

pub mod convert;
pub mod items;
pub mod output;
pub mod reply;
pub mod store;
pub mod stored;
pub mod tools;
pub mod types;
pub mod validate;

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response as HttpResponse};
use futures_util::StreamExt;
use serde_json::Value;

use self::convert::Previous;
use self::output::{Event, Response, Status};
use self::reply::EventBuilder;
use self::store::{ResponseStore, Stored};
use self::types::ResponsesRequest;
use crate::chat::{self, ChatEvent, ChatStream};
use crate::metrics::RequestType;
use crate::server::body::JsonBody;
use crate::server::error::ApiError;
use crate::server::openai::chat_completions;
use crate::server::openai::convert::RequestContext;
use crate::server::openai::tool_metrics;
use crate::server::sse::{Frames, Framing};
use crate::server::{App, ids, sse};

const RESPONSE_ID: &str = "resp_";

pub async fn create(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(mut request): JsonBody<ResponsesRequest>,
) -> Result<HttpResponse, ApiError> {
    let options = validate::check(&request, app.config.responses_store)?;
    let id = response_id(&request, &app)?;
    let context = RequestContext::with_id(id, request.model.as_deref(), &headers, &app)?;
    let previous = previous(request.previous_response_id.as_deref(), &app)?;
    let conversation = convert::conversation(&mut request, previous)?;
    let chat_request = convert::chat_request(&request, options, &conversation, app.model.max_model_len)?;
    let conversion = chat_completions::checked(chat_request, context, &app)?;

    let streams = request.stream.unwrap_or(false);
    let in_background = request.background.unwrap_or(false);
    // Without the flag `store` is not an error: it is true by default.
    let stores = app.config.responses_store && request.store.unwrap_or(true);
    let mut response = convert::response(request, &conversion, &app);
    let (reply, events) = chat_completions::begin(conversion, &app).await?;
    let events = tool_metrics::counted(events, app.metrics.clone(), streams, RequestType::Responses);
    let room = app.model.max_model_len.saturating_sub(reply.prompt.len());
    response.max_output_tokens = response.max_output_tokens.min(room);

    if in_background {
        response.status = Status::Queued;
        let stored = Stored::new(response.clone(), conversation.messages);
        let stored = Arc::new(if streams { stored.with_events() } else { stored });
        app.responses.insert(response.id.clone(), stored.clone());
        let builder = EventBuilder::new(response.clone(), reply);
        let task = tokio::spawn(make(events, builder, stored.clone(), app.clone()));
        stored.set_task(task.abort_handle());
        return Ok(match streams {
            true => stored::follow(stored, 0, &app),
            false => Json(response).into_response(),
        });
    }
    let keep = stores.then(|| Keep {
        store: app.responses.clone(),
        messages: conversation.messages,
    });
    if streams {
        let framing = Streamed {
            builder: EventBuilder::new(response, reply),
            keep,
        };
        let keep_alive = Duration::from_secs(app.config.sse_keep_alive_s);
        return Ok(sse::named(sse::framed(events, framing), keep_alive));
    }
    let choice = chat::collect(reply.n, events).await?.into_iter().next();
    let choice = choice.ok_or_else(|| ApiError::internal("the answer has no choice"))?;
    let response = reply::complete(response, &reply, choice);
    if let Some(keep) = keep {
        keep.put(&response);
    }
    Ok(Json(response).into_response())
}

/// The request's own id, else a new one.
///
/// # Errors
/// 400: a stored response has it.
fn response_id(request: &ResponsesRequest, app: &App) -> Result<String, ApiError> {
    let Some(id) = request.request_id.as_deref().filter(|id| !id.is_empty()) else {
        return Ok(ids::prefixed(RESPONSE_ID));
    };
    let id = ids::of_request(&HeaderMap::new(), Some(id));
    match app.responses.get(&id) {
        None => Ok(id),
        Some(_) => Err(ApiError::invalid(
            "request_id",
            "a stored response has this id; leave it out to get a new one",
        )),
    }
}

/// # Errors
/// 404: it is not stored; 400: it is still being made.
fn previous(id: Option<&str>, app: &App) -> Result<Option<Previous>, ApiError> {
    let Some(id) = id else { return Ok(None) };
    let stored = app.responses.get(id).ok_or_else(|| ApiError::response_not_found(id))?;
    let response = stored.response();
    if response.status.is_running() {
        return Err(ApiError::invalid_request(
            "previous_response_id",
            "the previous response is still in progress",
        ));
    }
    Ok(Some(Previous {
        messages: stored.messages().to_vec(),
        output: response.output,
    }))
}

/// Makes a response in the background.
async fn make(mut events: ChatStream, mut builder: EventBuilder, stored: Arc<Stored>, app: Arc<App>) {
    let record = |events: Vec<Event>| {
        let Some(log) = stored.events() else { return };
        events
            .iter()
            .for_each(|event| log.push(frames(std::slice::from_ref(event))));
    };
    let last = loop {
        match events.next().await {
            Some(Ok(event)) => {
                let was_begun = builder.is_begun();
                record(builder.event(&event));
                if !was_begun {
                    stored.update(&Response {
                        status: Status::InProgress,
                        ..builder.response().clone()
                    });
                }
            }
            Some(Err(error)) => {
                let error = ApiError::from(error);
                tracing::error!("a response in the background failed: {}", error.message);
                break builder.failed(&error);
            }
            None => break builder.end(),
        }
    };
    // Whoever has read the last event finds the whole response.
    stored.update(builder.response());
    record(last);
    if let Some(log) = stored.events() {
        log.close();
    }
    app.responses.recount(&builder.response().id);
}

/// Where a finished response is put.
struct Keep {
    store: Arc<ResponseStore>,
    messages: Vec<Value>,
}

impl Keep {
    fn put(self, response: &Response) {
        let stored = Arc::new(Stored::new(response.clone(), self.messages));
        self.store.insert(response.id.clone(), stored);
    }
}

/// A response that is streamed as it is made; stored when it is whole.
struct Streamed {
    builder: EventBuilder,
    keep: Option<Keep>,
}

impl Framing<ChatEvent> for Streamed {
    fn item(&mut self, event: &ChatEvent) -> Frames {
        frames(&self.builder.event(event))
    }

    fn end(&mut self) -> Frames {
        let last = self.builder.end();
        if let Some(keep) = self.keep.take() {
            keep.put(self.builder.response());
        }
        frames(&last)
    }

    fn failed(&mut self, error: ApiError) -> Result<Frames, ApiError> {
        Ok(frames(&self.builder.failed(&error)))
    }
}

fn frames(events: &[Event]) -> Frames {
    let mut frames = Frames::default();
    for event in events {
        frames.push_named(event.body.name(), event);
    }
    frames
}
