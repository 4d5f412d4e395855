//! `POST /v1/completions`.

pub mod convert;
pub mod reply;
pub mod types;
pub mod validate;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use futures_util::stream::{self, SelectAll, Stream, StreamExt};

use self::convert::{Conversion, convert};
use self::reply::{ChunkBuilder, ResponseBuilder};
use self::types::CompletionRequest;
use crate::server::App;
use crate::server::body::JsonBody;
use crate::server::error::ApiError;
use crate::server::openai::convert::RequestContext;
use crate::server::openai::load_report;
use crate::server::openai::structured::grammar_spec;
use crate::server::{blocking, sse};
use crate::text::TextDelta;

pub async fn create(
    State(app): State<Arc<App>>,
    headers: HeaderMap,
    JsonBody(request): JsonBody<CompletionRequest>,
) -> Result<Response, ApiError> {
    validate::check(&request, &app.config.request_limits, app.model.max_model_len)?;
    let context = RequestContext::new("cmpl-", request.model.as_deref(), &request.sampling, &headers, &app)?;
    let streams = request.sampling.stream.unwrap_or(false);
    let grammar = match grammar_spec(&request.sampling, &app.chat_config.structured_outputs)? {
        Some(spec) => Some(app.text().compile_grammar(spec).await?),
        None => None,
    };
    let converting = app.clone();
    let conversion = blocking(move || convert(request, &converting, context, grammar)).await??;

    let (deltas, reply) = start(&app, conversion)?;
    if streams {
        let keep_alive = Duration::from_secs(app.config.sse_keep_alive_s);
        return Ok(sse::response(chunks(deltas, ChunkBuilder::new(reply)), keep_alive));
    }
    let mut builder = ResponseBuilder::new(reply);
    let mut deltas = std::pin::pin!(deltas);
    while let Some(delta) = deltas.next().await {
        builder.delta(delta?);
    }
    Ok(load_report::answered(builder.end(), &headers, &app))
}

/// Submits all prompts; the deltas' indices count over all of them.
fn start(
    app: &App,
    conversion: Conversion,
) -> Result<
    (
        impl Stream<Item = Result<TextDelta, ApiError>> + Send + use<>,
        reply::CompletionReply,
    ),
    ApiError,
> {
    let n = conversion.reply.n;
    let mut deltas = SelectAll::new();
    for (prompt_index, request) in (0_u32..).zip(conversion.requests) {
        let stream = app.text().generate(request)?;
        deltas.push(stream.map(move |delta| {
            let mut delta = delta?;
            delta.index += prompt_index * n;
            Ok(delta)
        }));
    }
    Ok((deltas, conversion.reply))
}

fn chunks(
    deltas: impl Stream<Item = Result<TextDelta, ApiError>> + Send,
    builder: ChunkBuilder,
) -> impl Stream<Item = Result<sse::Frames, ApiError>> + Send {
    let deltas = Box::pin(deltas);
    stream::unfold(Some((deltas, builder)), |state| async move {
        let (mut deltas, mut builder) = state?;
        match deltas.next().await {
            Some(Ok(delta)) => {
                let frames = builder.delta(&delta);
                Some((Ok(frames), Some((deltas, builder))))
            }
            Some(Err(error)) => Some((Err(error), None)),
            None => Some((Ok(builder.end()), None)),
        }
    })
}
