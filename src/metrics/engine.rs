//! The engine's series.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use prometheus::{Gauge, GaugeVec, Histogram, IntCounter, IntCounterVec};

use super::families::{Buckets, Families};

/// Series of parts that do not exist here. Dashboards made for vLLM query them; they stay 0.
const ALWAYS_ZERO: &[(&str, &str)] = &[
    (
        "vllm:estimated_flops_per_gpu_total",
        "Estimated floating point operations per GPU (not estimated).",
    ),
    (
        "vllm:estimated_read_bytes_per_gpu_total",
        "Estimated bytes read per GPU (not estimated).",
    ),
    (
        "vllm:estimated_write_bytes_per_gpu_total",
        "Estimated bytes written per GPU (not estimated).",
    ),
    (
        "vllm:external_prefix_cache_queries_total",
        "Tokens looked up in a KV connector (there is none).",
    ),
    (
        "vllm:external_prefix_cache_hits_total",
        "Tokens found through a KV connector (there is none).",
    ),
    (
        "vllm:mm_cache_queries_total",
        "Media items looked up in the media cache (there is none).",
    ),
    (
        "vllm:mm_cache_hits_total",
        "Media items found in the media cache (there is none).",
    ),
];

/// Labels of `vllm:cache_config_info`, beside `engine`.
const CACHE_CONFIG_LABELS: &[&str] = &[
    "_block_size_resolved",
    "block_size",
    "cache_dtype",
    "cache_hit_alignment_tokens",
    "effective_attention_block_size",
    "enable_mamba_shared_prefix_checkpoint",
    "enable_prefix_caching",
    "gpu_memory_utilization",
    "hash_block_size",
    "is_attention_free",
    "kv_cache_dtype_skip_layers",
    "kv_cache_layout",
    "kv_cache_max_concurrency",
    "kv_cache_memory_bytes",
    "kv_cache_size_tokens",
    "kv_offloading_backend",
    "kv_offloading_size",
    "kv_sharing_fast_prefill",
    "mamba_block_size",
    "mamba_cache_dtype",
    "mamba_cache_mode",
    "mamba_page_size_padded",
    "mamba_ssm_cache_dtype",
    "num_cpu_blocks",
    "num_gpu_blocks",
    "num_gpu_blocks_override",
    "prefix_cache_retention_interval",
    "prefix_caching_hash_algo",
    "prefix_match_unit",
    "replayssm_buffer_len",
    "simple_cpu_offload_num_blocks",
    "skip_page_size_padded",
    "sliding_window",
    "swa_bounded_replay",
    "use_kda_recoverssm",
    "use_replayssm",
    "user_specified_block_size",
];

/// What the engine observes.
#[derive(Debug)]
pub struct EngineMetrics {
    pub num_requests_running: Gauge,
    pub num_requests_waiting: Gauge,
    /// `vllm:num_requests_waiting_by_reason{reason="capacity"}`.
    pub num_requests_waiting_capacity: Gauge,
    /// 0..=1.
    pub kv_cache_usage: Gauge,
    /// By `sleep_state`.
    pub sleep_state: GaugeVec,
    pub prefix_cache_queries: IntCounter,
    pub prefix_cache_hits: IntCounter,
    pub num_preemptions: IntCounter,
    pub generation_tokens: IntCounter,
    /// By `reason`.
    pub admission_rejections: IntCounterVec,
    /// Tokens of finished prefills and of decodes, per step.
    pub iteration_tokens: Histogram,
    pub time_to_first_token: Histogram,
    pub inter_token_latency: Histogram,
    /// `n` of each request.
    request_params_n: Histogram,
    prompt_tokens: IntCounter,
    prompt_tokens_by_source: IntCounterVec,
    prompt_tokens_cached: IntCounter,
    prompt_tokens_cached_by_source: IntCounterVec,
    request_success: IntCounterVec,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    request_max_num_generation_tokens: Histogram,
    request_params_max_tokens: Histogram,
    request_time_per_output_token: Histogram,
    e2e_request_latency: Histogram,
    request_queue_time: Histogram,
    request_inference_time: Histogram,
    request_prefill_time: Histogram,
    request_decode_time: Histogram,
    request_num_preemptions: Histogram,
    request_prefill_kv_computed_tokens: Histogram,
    cache_config: CacheConfigInfo,
}

/// A request that is over, for [`EngineMetrics::observe_finished`]. Times are absent where the request did not get there.
#[derive(Clone, Debug)]
pub struct FinishedRequest {
    /// Value of the label `finished_reason`.
    pub reason: &'static str,
    pub num_prompt_tokens: usize,
    pub num_cached_tokens: usize,
    pub num_generated_tokens: usize,
    pub max_tokens: u32,
    pub num_preemptions: usize,
    pub e2e_s: f64,
    pub queue_s: Option<f64>,
    pub prefill_s: Option<f64>,
    pub decode_s: Option<f64>,
    pub inference_s: Option<f64>,
}

impl EngineMetrics {
    /// Three sets of labels: `engine` and `model_name`, the engine's alone, the model's alone.
    pub(super) fn new(engine: &Families, engine_alone: &Families, model: &Families, buckets: &Buckets) -> Self {
        for (name, help) in ALWAYS_ZERO {
            engine.counter(name, help);
        }
        let waiting_by_reason = engine.gauges(
            "vllm:num_requests_waiting_by_reason",
            "Queued requests by what they wait for.",
            &["reason"],
        );
        waiting_by_reason.with_label_values(&["deferred"]).set(0.0);
        let sleep_state = engine.gauges(
            "vllm:engine_sleep_state",
            "1 for the state the engine is in: awake, weights offloaded, or everything discarded.",
            &["sleep_state"],
        );
        for (state, value) in [("awake", 1.0), ("discard_all", 0.0), ("weights_offloaded", 0.0)] {
            sleep_state.with_label_values(&[state]).set(value);
        }
        Self {
            num_requests_running: engine.gauge("vllm:num_requests_running", "Requests that are being computed."),
            num_requests_waiting: engine.gauge("vllm:num_requests_waiting", "Requests in the queue."),
            num_requests_waiting_capacity: waiting_by_reason.with_label_values(&["capacity"]),
            kv_cache_usage: engine.gauge("vllm:kv_cache_usage_perc", "Used share of the KV blocks; 1 = all."),
            sleep_state,
            prefix_cache_queries: engine.counter(
                "vllm:prefix_cache_queries_total",
                "Prompt tokens looked up in the prefix cache.",
            ),
            prefix_cache_hits: engine.counter(
                "vllm:prefix_cache_hits_total",
                "Prompt tokens found in the prefix cache.",
            ),
            num_preemptions: engine.counter(
                "vllm:num_preemptions_total",
                "Times a request lost its KV blocks to another.",
            ),
            generation_tokens: engine.counter("vllm:generation_tokens_total", "Tokens generated."),
            admission_rejections: model.counters(
                "vllm:admission_rejections_total",
                "Requests refused because the queue was full.",
                &["reason"],
                &[&["max_num_queued_reqs"], &["max_num_queued_tokens"]],
            ),
            iteration_tokens: engine.histogram(
                "vllm:iteration_tokens_total",
                "Tokens per step: prompts whose prefill ended with it, and generated ones.",
                &buckets.of("iteration_tokens"),
            ),
            time_to_first_token: engine.histogram(
                "vllm:time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                &buckets.of("time_to_first_token"),
            ),
            inter_token_latency: engine.histogram(
                "vllm:inter_token_latency_seconds",
                "Between two tokens of a request.",
                &buckets.of("inter_token_latency"),
            ),
            prompt_tokens: engine.counter("vllm:prompt_tokens_total", "Prompt tokens of finished prefills."),
            prompt_tokens_by_source: engine.counters(
                "vllm:prompt_tokens_by_source_total",
                "Prompt tokens by where their KV came from.",
                &["source"],
                &[&["external_kv_transfer"], &["local_cache_hit"], &["local_compute"]],
            ),
            prompt_tokens_cached: engine.counter(
                "vllm:prompt_tokens_cached_total",
                "Prompt tokens that were cached, wherever.",
            ),
            prompt_tokens_cached_by_source: engine.counters(
                "vllm:prompt_tokens_cached_by_source_total",
                "Cached prompt tokens by where they were cached.",
                &["source"],
                &[&["device"], &["disk"], &["external_unspecified"], &["host"], &["p2p"]],
            ),
            request_params_n: engine.histogram(
                "vllm:request_params_n",
                "Choices asked for by a request.",
                &buckets.of("request_params_n"),
            ),
            request_success: engine.counters(
                "vllm:request_success_total",
                "Finished requests by reason.",
                &["finished_reason"],
                &[&["abort"], &["error"], &["length"], &["repetition"], &["stop"]],
            ),
            request_prompt_tokens: engine.histogram(
                "vllm:request_prompt_tokens",
                "Prompt tokens of a request.",
                &buckets.of("request_tokens"),
            ),
            request_generation_tokens: engine.histogram(
                "vllm:request_generation_tokens",
                "Generated tokens of a request.",
                &buckets.of("request_tokens"),
            ),
            request_max_num_generation_tokens: engine.histogram(
                "vllm:request_max_num_generation_tokens",
                "Generated tokens of a request's longest choice.",
                &buckets.of("request_tokens"),
            ),
            request_params_max_tokens: engine.histogram(
                "vllm:request_params_max_tokens",
                "max_tokens of a request, after clamping to the context.",
                &buckets.of("request_tokens"),
            ),
            request_time_per_output_token: engine.histogram(
                "vllm:request_time_per_output_token_seconds",
                "Mean time between the tokens of a request.",
                &buckets.of("inter_token_latency"),
            ),
            e2e_request_latency: engine.histogram(
                "vllm:e2e_request_latency_seconds",
                "From a request's arrival to its last token.",
                &buckets.of("request_latency"),
            ),
            request_queue_time: engine.histogram(
                "vllm:request_queue_time_seconds",
                "From a request's arrival to its first step.",
                &buckets.of("request_latency"),
            ),
            request_inference_time: engine.histogram(
                "vllm:request_inference_time_seconds",
                "From a request's first step to its last token.",
                &buckets.of("request_latency"),
            ),
            request_prefill_time: engine.histogram(
                "vllm:request_prefill_time_seconds",
                "From a request's first step to its first token.",
                &buckets.of("request_latency"),
            ),
            request_decode_time: engine.histogram(
                "vllm:request_decode_time_seconds",
                "From a request's first token to its last.",
                &buckets.of("request_latency"),
            ),
            request_num_preemptions: engine.histogram(
                "vllm:request_num_preemptions",
                "Times a request lost its KV blocks.",
                &buckets.of("request_num_preemptions"),
            ),
            request_prefill_kv_computed_tokens: engine.histogram(
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens of a request that were not cached.",
                &buckets.of("request_tokens"),
            ),
            cache_config: CacheConfigInfo {
                gauge: engine_alone.gauges(
                    "vllm:cache_config_info",
                    "The KV cache's configuration, as labels.",
                    CACHE_CONFIG_LABELS,
                ),
                values: Mutex::default(),
            },
        }
    }

    /// A prompt's prefill is done.
    pub fn observe_prompt(&self, num_tokens: usize, num_cached: usize) {
        let (num_tokens, num_cached) = (num_tokens as u64, num_cached as u64);
        self.prompt_tokens.inc_by(num_tokens);
        self.prompt_tokens_by_source
            .with_label_values(&["local_compute"])
            .inc_by(num_tokens.saturating_sub(num_cached));
        self.prompt_tokens_by_source
            .with_label_values(&["local_cache_hit"])
            .inc_by(num_cached);
        self.prompt_tokens_cached.inc_by(num_cached);
        self.prompt_tokens_cached_by_source
            .with_label_values(&["device"])
            .inc_by(num_cached);
    }

    /// A request is over; one that its client aborted is not reported.
    pub fn observe_finished(&self, request: &FinishedRequest) {
        self.request_success.with_label_values(&[request.reason]).inc();
        self.e2e_request_latency.observe(request.e2e_s);
        for (histogram, seconds) in [
            (&self.request_queue_time, request.queue_s),
            (&self.request_prefill_time, request.prefill_s),
            (&self.request_decode_time, request.decode_s),
            (&self.request_inference_time, request.inference_s),
        ] {
            histogram.observe(seconds.unwrap_or(0.0));
        }
        let num_gaps = request.num_generated_tokens.saturating_sub(1);
        let mean_gap_s = if num_gaps > 0 {
            request.decode_s.unwrap_or(0.0) / num_gaps as f64
        } else {
            0.0
        };
        self.request_time_per_output_token.observe(mean_gap_s);
        for (histogram, count) in [
            (&self.request_prompt_tokens, request.num_prompt_tokens),
            (&self.request_generation_tokens, request.num_generated_tokens),
            (&self.request_params_max_tokens, request.max_tokens as usize),
            (&self.request_num_preemptions, request.num_preemptions),
            (
                &self.request_prefill_kv_computed_tokens,
                request.num_prompt_tokens.saturating_sub(request.num_cached_tokens),
            ),
        ] {
            histogram.observe(count as f64);
        }
    }

    /// All choices of a request are over; the longest has `longest` tokens.
    pub fn observe_group(&self, n: u32, longest: usize) {
        self.request_params_n.observe(f64::from(n));
        self.request_max_num_generation_tokens.observe(longest as f64);
    }

    /// Fills labels of `vllm:cache_config_info`; those never named read `None`, as Python writes them. Names that are no
    /// label of it are ignored.
    pub fn set_cache_config(&self, labels: &[(&'static str, String)]) {
        self.cache_config.set(labels);
    }
}

/// A gauge that is 1 for the one set of labels that holds.
#[derive(Debug)]
struct CacheConfigInfo {
    gauge: GaugeVec,
    values: Mutex<BTreeMap<&'static str, String>>,
}

impl CacheConfigInfo {
    fn set(&self, labels: &[(&'static str, String)]) {
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        values.extend(labels.iter().cloned());
        let all: Vec<&str> = CACHE_CONFIG_LABELS
            .iter()
            .map(|&name| values.get(name).map_or("None", String::as_str))
            .collect();
        self.gauge.reset();
        self.gauge.with_label_values(&all).set(1.0);
    }
}
