//! The time of a streamed answer: observed when its body is over, read to the end or dropped.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::response::Response;
use hyper::body::{Frame, SizeHint};

use super::App;

/// What is known of an answer when its head is ready.
pub struct Observation {
    pub app: Arc<App>,
    /// The route's template; `none` where no route matched.
    pub handler: String,
    pub method: &'static str,
    pub status: u16,
    pub start: Instant,
    pub request_bytes: u64,
    /// 0 where the length is not known beforehand.
    pub response_bytes: u64,
}

impl Observation {
    fn observe(&self) {
        self.app.metrics.http.observe(
            &self.handler,
            self.method,
            self.status,
            self.start.elapsed(),
            self.request_bytes,
            self.response_bytes,
        );
    }
}

/// Observes a whole answer now, so that whoever has read it finds it in the metrics; a stream at its end.
pub fn observe(response: Response, observation: Observation) -> Response {
    if response.body().size_hint().exact().is_some() {
        observation.observe();
        return response;
    }
    response.map(|body| Body::new(ObservedBody { body, observation }))
}

struct ObservedBody {
    body: Body,
    observation: Observation,
}

impl HttpBody for ObservedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for ObservedBody {
    fn drop(&mut self) {
        self.observation.observe();
    }
}
