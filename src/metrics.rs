//! Every Prometheus series, by vLLM's name, in one list.
//!
//! The text is laid out as Python's prometheus_client does it, which is what dashboards made for vLLM have seen: floats
//! with a point, labels in alphabetical order, and a `_created` gauge beside each counter, histogram and summary. (All
//! `_created` values are the time at which [`Metrics`] was made.)

mod exposition;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::core::Collector;
use prometheus::{Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry};

const REQUEST_LATENCY_S: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const TIME_TO_FIRST_TOKEN_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const INTER_TOKEN_LATENCY_S: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const ITERATION_TOKENS: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
const REQUEST_N: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
const REQUEST_PREEMPTIONS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0];
const HTTP_DURATION_S: &[f64] = &[0.1, 0.5, 1.0];
const HTTP_DURATION_FINE_S: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0, 60.0,
];

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

/// All series of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Unix time in seconds.
    created_s: f64,
    pub engine: EngineMetrics,
    pub frontend: FrontendMetrics,
    pub http: HttpMetrics,
}

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

/// What the layers between HTTP and the engine observe.
#[derive(Debug)]
pub struct FrontendMetrics {
    /// `n` of each request.
    pub request_params_n: Histogram,
    /// By `mode`, `outcome`, `request_type`. Non-streaming: once per choice; streaming: once per delta.
    pub tool_call_parser_invocations: IntCounterVec,
}

/// What the server observes.
#[derive(Debug)]
pub struct HttpMetrics {
    requests: IntCounterVec,
    request_size_bytes: HistogramVec,
    response_size_bytes: HistogramVec,
    duration_fine: Histogram,
    duration: HistogramVec,
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

impl Metrics {
    /// `model_name` is the first served name; `max_model_len` bounds the buckets that count a request's tokens.
    pub fn new(model_name: &str, max_model_len: usize) -> Self {
        let registry = Registry::new();
        let engine = Families {
            registry: &registry,
            labels: &[("model_name", model_name), ("engine", "0")],
        };
        let frontend = Families {
            registry: &registry,
            labels: &[("model_name", model_name)],
        };
        let http = Families {
            registry: &registry,
            labels: &[],
        };
        for (name, help) in ALWAYS_ZERO {
            engine.counter(name, help);
        }
        let request_tokens = one_two_five(max_model_len);
        Self {
            created_s: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0.0, |since| since.as_secs_f64()),
            engine: EngineMetrics::new(&engine, &frontend, &request_tokens),
            frontend: FrontendMetrics::new(&engine, &frontend),
            http: HttpMetrics::new(&http),
            registry,
        }
    }

    /// The text of `GET /metrics`.
    pub fn render(&self) -> String {
        let mut out = String::with_capacity(64 << 10);
        exposition::render_process(&mut out);
        for family in self.registry.gather() {
            exposition::render_family(&mut out, &family, self.created_s);
        }
        out
    }
}

impl EngineMetrics {
    fn new(engine: &Families, model: &Families, request_tokens: &[f64]) -> Self {
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
                ITERATION_TOKENS,
            ),
            time_to_first_token: engine.histogram(
                "vllm:time_to_first_token_seconds",
                "From a request's arrival to its first token.",
                TIME_TO_FIRST_TOKEN_S,
            ),
            inter_token_latency: engine.histogram(
                "vllm:inter_token_latency_seconds",
                "Between two tokens of a request.",
                INTER_TOKEN_LATENCY_S,
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
            request_success: engine.counters(
                "vllm:request_success_total",
                "Finished requests by reason.",
                &["finished_reason"],
                &[&["abort"], &["error"], &["length"], &["repetition"], &["stop"]],
            ),
            request_prompt_tokens: engine.histogram(
                "vllm:request_prompt_tokens",
                "Prompt tokens of a request.",
                request_tokens,
            ),
            request_generation_tokens: engine.histogram(
                "vllm:request_generation_tokens",
                "Generated tokens of a request.",
                request_tokens,
            ),
            request_max_num_generation_tokens: engine.histogram(
                "vllm:request_max_num_generation_tokens",
                "Generated tokens of a request's longest choice.",
                request_tokens,
            ),
            request_params_max_tokens: engine.histogram(
                "vllm:request_params_max_tokens",
                "max_tokens of a request, after clamping to the context.",
                request_tokens,
            ),
            request_time_per_output_token: engine.histogram(
                "vllm:request_time_per_output_token_seconds",
                "Mean time between the tokens of a request.",
                INTER_TOKEN_LATENCY_S,
            ),
            e2e_request_latency: engine.histogram(
                "vllm:e2e_request_latency_seconds",
                "From a request's arrival to its last token.",
                REQUEST_LATENCY_S,
            ),
            request_queue_time: engine.histogram(
                "vllm:request_queue_time_seconds",
                "From a request's arrival to its first step.",
                REQUEST_LATENCY_S,
            ),
            request_inference_time: engine.histogram(
                "vllm:request_inference_time_seconds",
                "From a request's first step to its last token.",
                REQUEST_LATENCY_S,
            ),
            request_prefill_time: engine.histogram(
                "vllm:request_prefill_time_seconds",
                "From a request's first step to its first token.",
                REQUEST_LATENCY_S,
            ),
            request_decode_time: engine.histogram(
                "vllm:request_decode_time_seconds",
                "From a request's first token to its last.",
                REQUEST_LATENCY_S,
            ),
            request_num_preemptions: engine.histogram(
                "vllm:request_num_preemptions",
                "Times a request lost its KV blocks.",
                REQUEST_PREEMPTIONS,
            ),
            request_prefill_kv_computed_tokens: engine.histogram(
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens of a request that were not cached.",
                request_tokens,
            ),
            cache_config: CacheConfigInfo {
                gauge: engine.gauges(
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
            (&self.request_max_num_generation_tokens, request.num_generated_tokens),
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

    /// Fills labels of `vllm:cache_config_info`; those never named read `None`, as Python writes them. Names that are no
    /// label of it are ignored.
    pub fn set_cache_config(&self, labels: &[(&'static str, String)]) {
        self.cache_config.set(labels);
    }
}

impl FrontendMetrics {
    fn new(engine: &Families, model: &Families) -> Self {
        Self {
            request_params_n: engine.histogram("vllm:request_params_n", "Choices asked for by a request.", REQUEST_N),
            tool_call_parser_invocations: model.counters(
                "vllm:tool_call_parser_invocations_total",
                "Times the tool call parser ran, by what it found.",
                &["mode", "outcome", "request_type"],
                &[],
            ),
        }
    }
}

impl HttpMetrics {
    fn new(http: &Families) -> Self {
        let sum_and_count = &[f64::MAX];
        Self {
            requests: http.counters(
                "http_requests_total",
                "Requests by method, status class and route.",
                &["handler", "method", "status"],
                &[],
            ),
            request_size_bytes: http.histograms(
                "http_request_size_bytes",
                "Bytes of request bodies.",
                &["handler"],
                sum_and_count,
            ),
            response_size_bytes: http.histograms(
                "http_response_size_bytes",
                "Bytes of response bodies.",
                &["handler"],
                sum_and_count,
            ),
            duration_fine: http.histogram(
                "http_request_duration_highr_seconds",
                "Time to answer a request, in fine steps.",
                HTTP_DURATION_FINE_S,
            ),
            duration: http.histograms(
                "http_request_duration_seconds",
                "Time to answer a request, by route.",
                &["handler", "method"],
                HTTP_DURATION_S,
            ),
        }
    }

    /// An answered request. `handler` is the route's template, `none` where no route matched; routes for probes and
    /// scrapers are not to be reported.
    pub fn observe(
        &self,
        handler: &str,
        method: &str,
        status: u16,
        duration: Duration,
        request_bytes: u64,
        response_bytes: u64,
    ) {
        let class = format!("{}xx", status / 100);
        self.requests.with_label_values(&[handler, method, &class]).inc();
        self.request_size_bytes
            .with_label_values(&[handler])
            .observe(request_bytes as f64);
        self.response_size_bytes
            .with_label_values(&[handler])
            .observe(response_bytes as f64);
        self.duration_fine.observe(duration.as_secs_f64());
        self.duration
            .with_label_values(&[handler, method])
            .observe(duration.as_secs_f64());
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

/// Makes and registers families that share constant labels.
struct Families<'a> {
    registry: &'a Registry,
    labels: &'a [(&'a str, &'a str)],
}

/// Names, labels and buckets are this file's own: an invalid or repeated one fails every test that makes [`Metrics`].
impl Families<'_> {
    fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(Gauge::with_opts(self.opts(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> GaugeVec {
        self.register(GaugeVec::new(self.opts(name, help), labels))
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::with_opts(self.opts(name, help)))
    }

    /// The label values in `preset` are shown from the start, at 0.
    fn counters(&self, name: &str, help: &str, labels: &[&str], preset: &[&[&str]]) -> IntCounterVec {
        let counters = self.register(IntCounterVec::new(self.opts(name, help), labels));
        for values in preset {
            counters.with_label_values(values);
        }
        counters
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let opts = HistogramOpts {
            common_opts: self.opts(name, help),
            buckets: buckets.to_vec(),
        };
        self.register(Histogram::with_opts(opts))
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
        let opts = HistogramOpts {
            common_opts: self.opts(name, help),
            buckets: buckets.to_vec(),
        };
        self.register(HistogramVec::new(opts, labels))
    }

    fn opts(&self, name: &str, help: &str) -> Opts {
        self.labels.iter().fold(Opts::new(name, help), |opts, &(label, value)| {
            opts.const_label(label, value)
        })
    }

    fn register<C: Collector + Clone + 'static>(&self, collector: prometheus::Result<C>) -> C {
        let collector = collector.expect("the family is well formed");
        self.registry
            .register(Box::new(collector.clone()))
            .expect("the family is registered once");
        collector
    }
}

/// 1, 2, 5, 10, 20, ... up to `max`.
fn one_two_five(max: usize) -> Vec<f64> {
    let mut buckets = Vec::new();
    let mut decade = 1usize;
    loop {
        for mantissa in [1, 2, 5] {
            match decade.checked_mul(mantissa) {
                Some(bound) if bound <= max => buckets.push(bound as f64),
                _ if buckets.is_empty() => return vec![1.0],
                _ => return buckets,
            }
        }
        decade = decade.saturating_mul(10);
    }
}

#[cfg(test)]
mod tests;
