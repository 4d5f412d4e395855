//! Traces of requests, sent to an OpenTelemetry collector.
//!
//! One span per sequence, `llm_request`, made when the sequence is over, with the attribute names of vLLM's `SpanAttributes`. A
//! span never waits: it goes into a bounded queue, from which one thread exports batches; what does not fit or cannot be
//! delivered is counted and gone.
//!
//! The caller's trace context (`traceparent`, `tracestate`) is a property of the task that serves the request
//! ([`in_context`]), as in OpenTelemetry's own libraries: whatever endpoint starts a sequence, it belongs to the caller's trace.

mod context;
mod exporter;
mod proto;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, oneshot};

pub use context::{TRACE_PARENT, TRACE_STATE, TraceContext, current, in_context};

use crate::config::observability::{Sampler, TracesConfig};
use crate::metrics::SpanCounters;

/// A value of a span's attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Text(String),
    Int(i64),
    /// Seconds, where it is a time.
    Double(f64),
}

/// A finished span.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    pub name: &'static str,
    pub ids: SpanIds,
    /// Nanoseconds since 1970.
    pub start_unix_ns: u64,
    pub end_unix_ns: u64,
    pub attributes: Vec<(&'static str, Value)>,
    /// Why it failed.
    pub error: Option<String>,
}

/// Where a span belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpanIds {
    pub trace_id: [u8; 16],
    pub span_id: [u8; 8],
    /// None of a trace's root.
    pub parent_span_id: Option<[u8; 8]>,
    pub trace_state: String,
}

enum Message {
    Span(Box<Span>),
    Flush(oneshot::Sender<()>),
}

/// Takes spans; clones share the queue.
#[derive(Clone)]
pub struct Tracer {
    shared: Arc<Shared>,
}

struct Shared {
    queue: mpsc::Sender<Message>,
    sampler: Sampler,
    counters: SpanCounters,
}

impl std::fmt::Debug for Tracer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracer").field("sampler", &self.shared.sampler).finish()
    }
}

/// Traces cannot be exported as configured.
#[derive(Debug, thiserror::Error)]
pub enum TracerError {
    #[error("--otlp-traces-endpoint: {0}")]
    Endpoint(String),
    #[error("OTEL_EXPORTER_OTLP_CERTIFICATE: {0}")]
    Certificate(String),
    #[error("the exporter's thread cannot be started: {0}")]
    Thread(std::io::Error),
}

impl Tracer {
    /// Starts the exporter's thread. Whether the collector is there shows with the first export.
    ///
    /// # Errors
    /// The endpoint or the certificate is unusable.
    pub fn start(config: TracesConfig, counters: SpanCounters) -> Result<Self, TracerError> {
        let (queue, spans) = mpsc::channel(config.max_queue_size);
        let sampler = config.sampler;
        let exporter = exporter::Exporter::new(config, counters.clone())?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(TracerError::Thread)?;
        std::thread::Builder::new()
            .name("otlp".into())
            .spawn(move || runtime.block_on(exporter.run(spans)))
            .map_err(TracerError::Thread)?;
        Ok(Self {
            shared: Arc::new(Shared {
                queue,
                sampler,
                counters,
            }),
        })
    }

    /// The ids of a span below the current task's context; none where the trace is not sampled.
    pub fn begin(&self) -> Option<SpanIds> {
        let parent = current();
        let trace_id = parent
            .as_ref()
            .map_or_else(|| *uuid::Uuid::new_v4().as_bytes(), |parent| parent.trace_id);
        let sampler = self.shared.sampler;
        let sampled = match &parent {
            Some(parent) if sampler.parent_based => parent.sampled,
            _ => keeps(sampler.ratio, &trace_id),
        };
        let random = *uuid::Uuid::new_v4().as_bytes();
        let mut span_id = [0; 8];
        // The first and last bytes of a version 4 UUID are all random.
        span_id[..4].copy_from_slice(&random[..4]);
        span_id[4..].copy_from_slice(&random[12..]);
        sampled.then(|| SpanIds {
            trace_id,
            span_id,
            parent_span_id: parent.as_ref().map(|parent| parent.span_id),
            trace_state: parent.map(|parent| parent.state).unwrap_or_default(),
        })
    }

    /// Queues a span; never waits.
    pub fn export(&self, span: Span) {
        if self.shared.queue.try_send(Message::Span(Box::new(span))).is_err() {
            self.shared.counters.dropped.inc();
        }
    }

    /// Sends what is queued, for at most `limit`.
    pub async fn flush(&self, limit: Duration) {
        let (done, flushed) = oneshot::channel();
        let flush = async {
            if self.shared.queue.send(Message::Flush(done)).await.is_ok() {
                // A dropped sender means the same: nothing is left to wait for.
                let _ = flushed.await;
            }
        };
        if tokio::time::timeout(limit, flush).await.is_err() {
            tracing::warn!("traces were not sent in time");
        }
    }
}

/// OpenTelemetry's TraceIdRatioBased: the lower half of the id decides, so that all services of a trace agree.
fn keeps(ratio: f64, trace_id: &[u8; 16]) -> bool {
    let mut low = [0; 8];
    low.copy_from_slice(&trace_id[8..]);
    ratio >= 1.0 || (u64::from_be_bytes(low) as f64) < ratio * u64::MAX as f64
}

/// The time on the wall that `instant` was at.
pub fn unix_ns(instant: Instant) -> u64 {
    let then = SystemTime::now().checked_sub(instant.elapsed()).unwrap_or(UNIX_EPOCH);
    then.duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos() as u64)
}

#[cfg(test)]
mod tests;
