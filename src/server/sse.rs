//! Server-sent events with vLLM's framings: `data: <json>` and a blank line with `data: [DONE]` last (chat, completions),
//! or `event: <name>` before each `data:` and no last word (Anthropic, Responses).

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use futures_util::{Stream, StreamExt};
use serde::Serialize;
use tokio::time::{Instant, Sleep};

use super::error::ApiError;

const DONE: &str = "data: [DONE]\n\n";
const KEEP_ALIVE: &str = ": keep-alive\n\n";

/// Whole frames, ready for the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frames(String);

impl Frames {
    /// Appends one event.
    pub fn push(&mut self, event: &impl Serialize) {
        // The events are our own structs of strings and numbers: they always serialise.
        if let Ok(json) = serde_json::to_string(event) {
            self.push_json(&json);
        }
    }

    /// Appends one event with its name.
    pub fn push_named(&mut self, name: &str, event: &impl Serialize) {
        self.0.push_str("event: ");
        self.0.push_str(name);
        self.0.push('\n');
        self.push(event);
    }

    fn push_json(&mut self, json: &str) {
        self.0.push_str("data: ");
        self.0.push_str(json);
        self.0.push_str("\n\n");
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// Turns the items of a stream into frames.
pub trait Framing<T> {
    fn item(&mut self, item: &T) -> Frames;
    /// What follows the last item.
    fn end(&mut self) -> Frames;
    /// The last frames of a stream that broke, where the protocol has its own for that.
    ///
    /// # Errors
    /// It has none: the frame is the error's envelope.
    fn failed(&mut self, error: ApiError) -> Result<Frames, ApiError> {
        Err(error)
    }
}

/// The frames of `items`; nothing follows an error.
pub fn framed<S, T, E, F>(items: S, framing: F) -> impl Stream<Item = Result<Frames, ApiError>> + Send
where
    S: Stream<Item = Result<T, E>> + Send + Unpin,
    T: Send,
    E: Into<ApiError> + Send,
    F: Framing<T> + Send,
{
    futures_util::stream::unfold(Some((items, framing)), |state| async move {
        let (mut items, mut framing) = state?;
        match items.next().await {
            Some(Ok(item)) => {
                let frames = framing.item(&item);
                Some((Ok(frames), Some((items, framing))))
            }
            Some(Err(error)) => {
                let error: ApiError = error.into();
                let message = error.message.clone();
                let last = framing.failed(error);
                if last.is_ok() {
                    log_broken(&message);
                }
                Some((last, None))
            }
            None => Some((Ok(framing.end()), None)),
        }
    })
}

fn log_broken(message: &str) {
    tracing::error!("a stream ended with an error: {message}");
}

/// A 200 that streams `frames` and `[DONE]`. The first error ends the stream with an error frame. Dropping the response
/// drops `frames`.
///
/// Silence of `keep_alive` is filled with a comment; zero = never.
pub fn response<S>(frames: S, keep_alive: Duration) -> Response
where
    S: Stream<Item = Result<Frames, ApiError>> + Send + 'static,
{
    streamed(frames, keep_alive, DONE)
}

/// As [`response`], without `[DONE]`: the protocol's own events say when it is over.
pub fn named<S>(frames: S, keep_alive: Duration) -> Response
where
    S: Stream<Item = Result<Frames, ApiError>> + Send + 'static,
{
    streamed(frames, keep_alive, "")
}

fn streamed<S>(frames: S, keep_alive: Duration, last: &'static str) -> Response
where
    S: Stream<Item = Result<Frames, ApiError>> + Send + 'static,
{
    let keep_alive = (!keep_alive.is_zero()).then(|| KeepAlive::every(keep_alive));
    let body = EventStream {
        frames: Some(frames.boxed()),
        keep_alive,
        last,
    };
    let mut response = Response::new(Body::from_stream(body));
    *response.status_mut() = StatusCode::OK;
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

struct KeepAlive {
    interval: Duration,
    timer: Pin<Box<Sleep>>,
}

impl KeepAlive {
    fn every(interval: Duration) -> Self {
        Self {
            interval,
            timer: Box::pin(tokio::time::sleep(interval)),
        }
    }

    fn restart(&mut self) {
        self.timer.as_mut().reset(Instant::now() + self.interval);
    }
}

type FrameStream = Pin<Box<dyn Stream<Item = Result<Frames, ApiError>> + Send>>;

struct EventStream {
    /// None once the last frame is out.
    frames: Option<FrameStream>,
    keep_alive: Option<KeepAlive>,
    /// What follows the last frame.
    last: &'static str,
}

impl Stream for EventStream {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let Some(frames) = self.frames.as_mut() else {
                return Poll::Ready(None);
            };
            match frames.as_mut().poll_next(cx) {
                Poll::Ready(Some(Ok(frames))) if frames.is_empty() => continue,
                Poll::Ready(Some(Ok(frames))) => {
                    if let Some(keep_alive) = self.keep_alive.as_mut() {
                        keep_alive.restart();
                    }
                    return Poll::Ready(Some(Ok(frames.0.into())));
                }
                Poll::Ready(Some(Err(error))) => {
                    log_broken(&error.message);
                    self.frames = None;
                    let mut last = Frames::default();
                    last.push_json(&error.to_json());
                    last.0.push_str(self.last);
                    return Poll::Ready(Some(Ok(last.0.into())));
                }
                Poll::Ready(None) => {
                    self.frames = None;
                    let last = Bytes::from_static(self.last.as_bytes());
                    return Poll::Ready((!last.is_empty()).then_some(Ok(last)));
                }
                Poll::Pending => {
                    let Some(keep_alive) = self.keep_alive.as_mut() else {
                        return Poll::Pending;
                    };
                    return match keep_alive.timer.as_mut().poll(cx) {
                        Poll::Pending => Poll::Pending,
                        Poll::Ready(()) => {
                            keep_alive.restart();
                            Poll::Ready(Some(Ok(Bytes::from_static(KEEP_ALIVE.as_bytes()))))
                        }
                    };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::stream;
    use http_body_util::BodyExt;

    fn frame(number: u32) -> Frames {
        let mut frames = Frames::default();
        frames.push(&number);
        frames
    }

    async fn text(response: Response) -> String {
        String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn frames_end_with_done() {
        let response = response(
            stream::iter([Ok(frame(1)), Ok(Frames::default()), Ok(frame(2))]),
            Duration::ZERO,
        );
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        assert_eq!(text(response).await, "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n");
    }

    #[tokio::test]
    async fn an_error_is_the_last_frame_before_done() {
        let response = response(
            stream::iter([Ok(frame(1)), Err(ApiError::internal("broken")), Ok(frame(2))]),
            Duration::ZERO,
        );
        assert_eq!(
            text(response).await,
            "data: 1\n\ndata: {\"error\":{\"message\":\"broken\",\"type\":\"InternalServerError\",\"param\":null,\"code\":500}}\n\n\
             data: [DONE]\n\n"
        );
    }

    #[tokio::test]
    async fn silence_is_filled_with_comments() {
        let slow = stream::once(async {
            tokio::time::sleep(Duration::from_millis(250)).await;
            Ok(frame(1))
        });
        let text = text(response(slow, Duration::from_millis(50))).await;
        assert!(text.starts_with(": keep-alive\n\n: keep-alive\n\n"), "{text}");
        assert!(text.ends_with("\n\ndata: 1\n\ndata: [DONE]\n\n"), "{text}");
    }
}
