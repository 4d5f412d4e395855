//! A finished sequence as a span, with vLLM's attribute names.

use std::time::Instant;

use crate::metrics::FinishedRequest;
use crate::otlp::{Span, SpanIds, Value, unix_ns};
use crate::step::SamplingParams;

/// What a span tells beside the metrics of its sequence.
pub(super) struct TracedRequest<'a> {
    pub id: &'a str,
    pub n: u32,
    pub sampling: &'a SamplingParams,
    pub arrival: Instant,
    pub ttft_s: Option<f64>,
}

impl TracedRequest<'_> {
    /// Ends now. As with vLLM, a parameter that is zero is left out.
    pub fn span(&self, ids: SpanIds, finished: &FinishedRequest) -> Span {
        let mut attributes = vec![
            ("gen_ai.request.id", Value::Text(self.id.to_owned())),
            ("gen_ai.request.n", Value::Int(i64::from(self.n))),
            (
                "gen_ai.usage.prompt_tokens",
                Value::Int(finished.num_prompt_tokens as i64),
            ),
            (
                "gen_ai.usage.completion_tokens",
                Value::Int(finished.num_generated_tokens as i64),
            ),
            ("gen_ai.request.max_tokens", Value::Int(i64::from(finished.max_tokens))),
            ("gen_ai.latency.e2e", Value::Double(finished.e2e_s)),
        ];
        let parameters = [
            ("gen_ai.request.temperature", self.sampling.temperature),
            ("gen_ai.request.top_p", self.sampling.top_p),
        ];
        for (name, value) in parameters {
            if value != 0.0 {
                attributes.push((name, Value::Double(f64::from(value))));
            }
        }
        let times = [
            ("gen_ai.latency.time_in_queue", finished.queue_s),
            ("gen_ai.latency.time_to_first_token", self.ttft_s),
            ("gen_ai.latency.time_in_model_prefill", finished.prefill_s),
            ("gen_ai.latency.time_in_model_decode", finished.decode_s),
            ("gen_ai.latency.time_in_model_inference", finished.inference_s),
        ];
        for (name, seconds) in times {
            attributes.extend(seconds.map(|seconds| (name, Value::Double(seconds))));
        }
        Span {
            name: "llm_request",
            ids,
            start_unix_ns: unix_ns(self.arrival),
            end_unix_ns: unix_ns(Instant::now()),
            attributes,
            error: (finished.reason == "error").then(|| "the engine failed".to_owned()),
        }
    }
}
