//! What the bench subcommands were asked for.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::ServeArgs;

/// What `rvllm bench latency` and `rvllm bench throughput` were asked for.
#[derive(Clone, Debug)]
pub struct BenchArgs {
    pub kind: BenchKind,
    /// Prompt tokens.
    pub input_len: usize,
    /// Generated tokens per sequence.
    pub output_len: usize,
    /// Sequences per prompt.
    pub n: usize,
    pub output_json: Option<PathBuf>,
    /// Operations per second of the device's matrix units, for the prefill's floor.
    pub peak_flops: Option<f64>,
    /// The engine flags.
    pub engine: ServeArgs,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BenchKind {
    /// Seconds for one batch, over iterations.
    Latency {
        batch_size: usize,
        num_iters_warmup: usize,
        num_iters: usize,
    },
    /// Tokens per second over many prompts sent at once.
    Throughput { num_prompts: usize },
}

/// What `rvllm bench startup` was asked for.
#[derive(Clone, Debug)]
pub struct BenchStartupArgs {
    pub num_iters_cold: usize,
    pub num_iters_warmup: usize,
    pub num_iters_warm: usize,
    pub output_json: Option<PathBuf>,
    /// The engine flags.
    pub engine: ServeArgs,
    /// The same as a command line for `rvllm serve`.
    pub serve_argv: Vec<String>,
}

/// What `rvllm bench serve` was asked for.
#[derive(Clone, Debug)]
pub struct BenchServeArgs {
    /// As typed: `openai`, `vllm` or `openai-chat`.
    pub backend: String,
    pub chat: bool,
    /// `http://host:port`, without a slash at the end.
    pub base_url: String,
    /// The route, with a slash in front.
    pub endpoint: String,
    pub headers: Vec<(String, String)>,
    /// None = the first of `/v1/models`.
    pub model: Option<String>,
    pub served_model_name: Option<String>,
    pub num_prompts: usize,
    pub dataset: Dataset,
    /// Of prompts and arrival times.
    pub seed: u64,
    pub arrivals: Arrivals,
    pub max_concurrency: Option<usize>,
    pub logprobs: Option<i64>,
    pub ignore_eos: bool,
    pub sampling: Sampling,
    pub extra_body: Map<String, Value>,
    pub request_id_prefix: Option<String>,
    pub ready_check_timeout_s: u64,
    pub num_warmups: usize,
    pub progress: bool,
    /// Bytes per second of the server's device, for the floor.
    pub read_bandwidth: Option<f64>,
    pub result: ResultArgs,
}

/// Which prompts are sent.
#[derive(Clone, Debug, PartialEq)]
pub enum Dataset {
    /// Random ids. Lengths vary by `range_ratio` to both sides.
    Random {
        input_len: usize,
        output_len: usize,
        range_ratio: f64,
        prefix_len: usize,
    },
    /// Random ids behind one of `num_prefixes` prefixes.
    PrefixRepetition {
        prefix_len: usize,
        suffix_len: usize,
        num_prefixes: usize,
        output_len: usize,
    },
    /// First turns of recorded conversations.
    ShareGpt {
        path: PathBuf,
        /// None = the recorded answer's.
        output_len: Option<usize>,
        shuffle: bool,
        oversample: bool,
    },
    /// `{"prompt": …, "output_tokens"?: …}` a line.
    Custom {
        path: PathBuf,
        output_len: usize,
        shuffle: bool,
        oversample: bool,
    },
}

/// When requests are sent.
#[derive(Clone, Debug, PartialEq)]
pub struct Arrivals {
    /// Requests per second; none = all at once.
    pub rate: Option<f64>,
    /// Shape of the gamma distribution of the pauses; 1 = exponential, infinite = equal.
    pub burstiness: f64,
    pub ramp: Option<Ramp>,
}

/// A rate that grows over the run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ramp {
    /// By equal factors instead of equal steps.
    pub exponential: bool,
    pub start_rps: f64,
    pub end_rps: f64,
}

/// Sampling parameters that were given, by the name of the request's field.
pub type Sampling = Map<String, Value>;

/// What is reported and where it goes.
#[derive(Clone, Debug)]
pub struct ResultArgs {
    pub label: Option<String>,
    /// Of `ttft`, `tpot`, `itl`, `e2el`, `client_queue_time`, `e2el_including_client_queue`.
    pub percentile_metrics: Vec<String>,
    pub percentiles: Vec<f64>,
    /// Most milliseconds by metric name (`ttft`, `tpot`, `e2el`).
    pub goodput_ms: Vec<(String, f64)>,
    pub save: bool,
    pub detailed: bool,
    pub append: bool,
    pub metadata: Vec<(String, String)>,
    pub directory: Option<PathBuf>,
    pub filename: Option<String>,
}
