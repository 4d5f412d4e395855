//! Every Prometheus series, by vLLM's name, in one list.
//!
//! The text is laid out as Python's prometheus_client does it, which is what dashboards made for vLLM have seen: floats
//! with a point, labels in alphabetical order, and a `_created` gauge beside each counter, histogram and summary. (All
//! `_created` values are the time at which [`Metrics`] was made.)

mod engine;
mod exposition;
mod families;
mod http;
mod sleep;

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::{IntCounter, IntCounterVec, Registry};

pub use engine::{EngineMetrics, FinishedRequest};
pub use http::HttpMetrics;
pub use sleep::SleepOperation;

use self::families::{Buckets, Families, one_two_five};
use self::sleep::SleepMetrics;
use crate::config::observability::MetricsConfig;

/// All series of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    config: MetricsConfig,
    /// Unix time in seconds.
    created_s: f64,
    pub engine: EngineMetrics,
    pub frontend: FrontendMetrics,
    pub http: HttpMetrics,
    sleep: OnceLock<SleepMetrics>,
}

/// What the layers between HTTP and the engine observe.
#[derive(Debug)]
pub struct FrontendMetrics {
    /// By `mode`, `outcome`, `request_type`.
    tool_call_parser_invocations: IntCounterVec,
}

/// Which API a tool call was read for; the label `request_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestType {
    ChatCompletions,
    Responses,
    Other,
}

/// What came of the spans of traced requests.
#[derive(Clone, Debug)]
pub struct SpanCounters {
    pub exported: IntCounter,
    pub dropped: IntCounter,
}

impl Metrics {
    /// `model_name` is the first served name; `max_model_len` bounds the buckets that count a request's tokens.
    pub fn new(model_name: &str, max_model_len: usize) -> Self {
        Self::with_config(model_name, max_model_len, MetricsConfig::default())
    }

    /// As [`new`](Self::new), with other buckets, or fewer series.
    pub fn with_config(model_name: &str, max_model_len: usize, config: MetricsConfig) -> Self {
        let registry = Registry::new();
        let engine = Families {
            registry: &registry,
            labels: &[("model_name", model_name), ("engine", "0")],
        };
        let engine_alone = Families {
            registry: &registry,
            labels: &[("engine", "0")],
        };
        let frontend = Families {
            registry: &registry,
            labels: &[("model_name", model_name)],
        };
        let http = Families {
            registry: &registry,
            labels: &[],
        };
        let buckets = Buckets {
            request_tokens: one_two_five(max_model_len),
            config: &config,
        };
        Self {
            created_s: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0.0, |since| since.as_secs_f64()),
            engine: EngineMetrics::new(&engine, &engine_alone, &frontend, &buckets),
            frontend: FrontendMetrics::new(&frontend),
            http: HttpMetrics::new(&http),
            sleep: OnceLock::new(),
            registry,
            config,
        }
    }

    /// The text of `GET /metrics`.
    pub fn render(&self) -> String {
        let mut out = String::with_capacity(64 << 10);
        exposition::render_process(&mut out);
        let created_s = self.config.created.then_some(self.created_s);
        for family in self.registry.gather() {
            if self.config.engine || !family.name().starts_with("vllm:") {
                exposition::render_family(&mut out, &family, created_s);
            }
        }
        out
    }

    /// A sleep or wake-up begins; its time counts until the guard is dropped. As in vLLM the series exist from the first on.
    pub fn sleep_operation(&self, operation: &'static str) -> SleepOperation<'_> {
        let metrics = self.sleep.get_or_init(|| {
            let families = Families {
                registry: &self.registry,
                labels: &[],
            };
            SleepMetrics::new(&families)
        });
        metrics.begin(operation)
    }

    /// Counters of exported spans, which only a server that exports any shows. To be called once.
    pub fn span_counters(&self) -> SpanCounters {
        let families = Families {
            registry: &self.registry,
            labels: &[],
        };
        SpanCounters {
            exported: families.counter("rvllm:otlp_spans_exported_total", "Spans that the collector took."),
            dropped: families.counter(
                "rvllm:otlp_spans_dropped_total",
                "Spans lost because the queue was full or the collector did not take them.",
            ),
        }
    }
}

impl FrontendMetrics {
    fn new(model: &Families) -> Self {
        Self {
            tool_call_parser_invocations: model.counters(
                "vllm:tool_call_parser_invocations_total",
                "Times the tool call parser ran, by what it found.",
                &["mode", "outcome", "request_type"],
                &[],
            ),
        }
    }

    /// The tool call parser has read a choice or, of a stream, a delta.
    pub fn observe_tool_parser(&self, streaming: bool, found_call: bool, request_type: RequestType) {
        let mode = if streaming { "streaming" } else { "non_streaming" };
        let outcome = if found_call { "tool_call" } else { "no_tool_call" };
        let request_type = match request_type {
            RequestType::ChatCompletions => "chat_completions",
            RequestType::Responses => "responses",
            RequestType::Other => "other",
        };
        self.tool_call_parser_invocations
            .with_label_values(&[mode, outcome, request_type])
            .inc();
    }
}

#[cfg(test)]
mod tests;
