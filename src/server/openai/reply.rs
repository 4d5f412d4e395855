//! What the replies of chat and completions have in common.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::types::{CompletionTokensDetails, PromptTokensDetails, SamplingFields, StopReason, Usage};
use crate::config::ServerConfig;
use crate::engine::SequenceTiming;
use crate::server::ids;
use crate::step::TokenId;
use crate::text::TextFinish;

/// What every chunk and every whole response starts with.
#[derive(Clone, Debug)]
pub struct Head {
    /// With its prefix.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    pub model: String,
    pub fingerprint: Option<String>,
}

impl Head {
    pub fn new(id: String, model: &str, config: &ServerConfig) -> Self {
        Self {
            id,
            created: ids::unix_seconds(),
            model: model.to_owned(),
            fingerprint: config.fingerprint.clone(),
        }
    }
}

/// What the client and the server's flags ask a reply to contain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplyOptions {
    pub return_token_ids: bool,
    /// Logprobs name tokens `token_id:N`.
    pub tokens_as_token_ids: bool,
    /// A last chunk with the usage.
    pub include_usage: bool,
    /// Running usage in every chunk.
    pub continuous_usage: bool,
    /// `--enable-prompt-tokens-details`.
    pub prompt_details: bool,
    /// Usage counts reasoning tokens: a reasoning parser is active.
    pub reasoning_details: bool,
    /// `--enable-per-request-metrics`, and the times are those of one sequence.
    pub request_metrics: bool,
}

impl ReplyOptions {
    pub fn new(fields: &SamplingFields, config: &ServerConfig, reasoning_details: bool) -> Self {
        let stream_options = fields.stream_options.clone().unwrap_or_default();
        let include_usage = stream_options.include_usage.unwrap_or(false) || config.force_include_usage;
        Self {
            return_token_ids: fields.return_token_ids.unwrap_or(false),
            tokens_as_token_ids: fields
                .return_tokens_as_token_ids
                .unwrap_or(config.return_tokens_as_token_ids),
            include_usage,
            continuous_usage: include_usage
                && (stream_options.continuous_usage_stats.unwrap_or(false) || config.force_include_usage),
            prompt_details: config.prompt_tokens_details,
            reasoning_details,
            request_metrics: config.per_request_metrics && fields.n.unwrap_or(1) == 1,
        }
    }
}

/// Token counts of a reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub cached_tokens: usize,
    /// None where the endpoint does not tell.
    pub created_cache_tokens: Option<usize>,
    pub reasoning_tokens: usize,
}

impl Counts {
    pub fn usage(&self, options: &ReplyOptions) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            total_tokens: self.prompt_tokens + self.completion_tokens,
            completion_tokens: self.completion_tokens,
            prompt_tokens_details: options.prompt_details.then(|| PromptTokensDetails {
                cached_tokens: self.cached_tokens,
                created_cache_tokens: self.created_cache_tokens,
                multimodal_tokens: None,
            }),
            completion_tokens_details: options.reasoning_details.then_some(CompletionTokensDetails {
                reasoning_tokens: self.reasoning_tokens,
            }),
        }
    }
}

/// `stop_reason` of a text that repeats itself.
pub const REPETITION_DETECTED: &str = "repetition_detected";

/// `metrics` of a response; what is not known is null.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
struct RequestMetrics {
    /// From its first step, not from its arrival, as in vLLM.
    time_to_first_token_ms: Option<f64>,
    /// From the first token to the last.
    generation_time_ms: Option<f64>,
    queue_time_ms: Option<f64>,
    mean_itl_ms: Option<f64>,
    /// Over both times above.
    tokens_per_second: Option<f64>,
    /// There is no speculative decoding.
    speculative_decoding: Option<()>,
}

/// `metrics` of a sequence that gave so many tokens; a beam search has no times.
pub fn request_metrics(timing: Option<SequenceTiming>, completion_tokens: usize) -> Value {
    let ms = |time: Duration| 1000.0 * time.as_secs_f64();
    let metrics = timing.map_or_else(RequestMetrics::default, |timing| {
        let inference_s = (timing.prefill + timing.decode).as_secs_f64();
        RequestMetrics {
            time_to_first_token_ms: Some(ms(timing.prefill)),
            generation_time_ms: Some(ms(timing.decode)),
            queue_time_ms: Some(ms(timing.queue)),
            mean_itl_ms: (completion_tokens > 1).then(|| ms(timing.decode) / (completion_tokens - 1) as f64),
            tokens_per_second: (inference_s > 0.0).then(|| completion_tokens as f64 / inference_s),
            speculative_decoding: None,
        }
    });
    // Numbers and nulls: they always serialise.
    serde_json::to_value(metrics).unwrap_or_default()
}

/// The same as the usage chunk of a stream has it, without nulls.
pub fn stream_request_metrics(timing: Option<SequenceTiming>, completion_tokens: usize) -> Value {
    let mut metrics = request_metrics(timing, completion_tokens);
    if let Value::Object(metrics) = &mut metrics {
        metrics.retain(|_, value| !value.is_null());
    }
    metrics
}

/// `finish_reason` and `stop_reason` of a text.
pub fn finish(finish: &TextFinish) -> (&'static str, Option<StopReason>) {
    match finish {
        TextFinish::Eos => ("stop", None),
        TextFinish::StopToken(id) => ("stop", Some(StopReason::Token(*id))),
        TextFinish::StopString(text) => ("stop", Some(StopReason::Text(text.clone()))),
        TextFinish::Length => ("length", None),
        TextFinish::Repetition => ("repetition", Some(StopReason::Text(REPETITION_DETECTED.to_owned()))),
        TextFinish::Abort => ("abort", None),
    }
}

/// Token ids as the wire has them.
pub fn wire_ids(ids: &Arc<[TokenId]>) -> Vec<u32> {
    ids.to_vec()
}

/// How many of the entries of a position (the chosen token first) are listed for `asked`; -1 = all.
pub fn listed_entries(asked: i64) -> usize {
    usize::try_from(asked).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn metrics_are_milliseconds_of_each_phase() {
        let timing = SequenceTiming {
            queue: Duration::from_millis(5),
            prefill: Duration::from_millis(100),
            decode: Duration::from_millis(400),
        };
        assert_eq!(
            request_metrics(Some(timing), 5),
            json!({"time_to_first_token_ms": 100.0, "generation_time_ms": 400.0, "queue_time_ms": 5.0,
                "mean_itl_ms": 100.0, "tokens_per_second": 10.0, "speculative_decoding": null})
        );
        assert_eq!(request_metrics(Some(timing), 1)["mean_itl_ms"], Value::Null);
        assert_eq!(stream_request_metrics(None, 5), json!({}));
    }
}
