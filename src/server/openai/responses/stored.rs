//! `GET /v1/responses/{response_id}` and `POST /v1/responses/{response_id}/cancel`.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response as HttpResponse};
use futures_util::stream;

use super::output::Response;
use super::store::Stored;
use crate::server::error::ApiError;
use crate::server::query::QueryParams;
use crate::server::{App, sse};

/// A stored response; with `stream`, its events after number `starting_after`.
pub async fn retrieve(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
    query: QueryParams,
) -> Result<HttpResponse, ApiError> {
    let streams = query.flag("stream", false)?;
    let starting_after = query.integer("starting_after")?;
    let stored = find(&id, &app)?;
    if !streams {
        return Ok(Json(stored.response()).into_response());
    }
    if stored.events().is_none() {
        return Err(ApiError::invalid_value(
            "response_id",
            "only the events of a response that is streamed from the background are kept",
            crate::server::error::shortened(&id),
        ));
    }
    let first = starting_after.map_or(0, |number| number.saturating_add(1));
    Ok(follow(stored, usize::try_from(first).unwrap_or(0), &app))
}

/// Ends a response that is made in the background.
pub async fn cancel(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Response>, ApiError> {
    match find(&id, &app)?.cancel() {
        Some(response) => Ok(Json(response)),
        None => Err(ApiError::invalid_request(
            "response_id",
            "Cannot cancel a synchronous response.",
        )),
    }
}

fn find(id: &str, app: &App) -> Result<Arc<Stored>, ApiError> {
    app.responses.get(id).ok_or_else(|| ApiError::response_not_found(id))
}

/// The events from number `first` on. The reader may leave: the response goes on.
pub fn follow(stored: Arc<Stored>, first: usize, app: &App) -> HttpResponse {
    let frames = stream::unfold((stored, first), |(stored, next)| async move {
        let frames = stored.events()?.read(next).await?;
        Some((Ok(frames), (stored, next + 1)))
    });
    sse::named(frames, Duration::from_secs(app.config.sse_keep_alive_s))
}
