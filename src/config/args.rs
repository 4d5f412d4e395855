//! The flags as typed, one struct per group of `vllm serve --help`.
//!
//! This is the border between `cli`, which fills the structs from its flag table (field names are the flags' names with
//! `_`), and [`resolve`](super::resolve), which decides what they mean. Flags that are refused or without effect are
//! settled by the table and do not appear.

mod bench;
mod client;

use serde::Deserialize;
use serde_json::{Map, Value};

pub use bench::{
    Arrivals, BenchArgs, BenchKind, BenchServeArgs, BenchStartupArgs, Dataset, Ramp, ResultArgs, Sampling,
};
pub use client::{ChatArgs, ClientArgs, CompleteArgs, RunBatchArgs};

use super::DeviceKind;

/// What `rvllm serve` was asked for.
#[derive(Clone, Debug)]
pub struct ServeArgs {
    /// Hub id, directory or `demo`; none = vLLM's default model.
    pub model: Option<String>,
    /// The model was the positional argument, not `--model`.
    pub model_is_positional: bool,
    pub general: GeneralArgs,
    pub frontend: FrontendArgs,
    pub http: HttpArgs,
    pub request_log: RequestLogArgs,
    pub observability: ObservabilityArgs,
    pub model_args: ModelArgs,
    pub load: LoadArgs,
    pub structured_outputs: StructuredOutputsArgs,
    pub parallel: ParallelArgs,
    pub cache: CacheArgs,
    pub scheduler: SchedulerArgs,
    pub logging: LoggingArgs,
    pub vllm: VllmArgs,
    pub device: DeviceChoice,
    /// `--dry-run`: decide, print, stop.
    pub dry_run: Option<DryRun>,
    /// `--dry-run-device-memory`: bytes of the one device that a dry run plans for.
    pub dry_run_device_memory: Option<u64>,
    /// Every flag of the command line and the configuration file, and what becomes of it.
    pub given: Vec<GivenFlag>,
    /// What the command line said that has no effect or is deprecated; one log line each.
    pub notices: Vec<Notice>,
}

/// A line to log once logging is set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    Info(String),
    Warning(String),
}

/// How a dry run prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DryRun {
    Text,
    Json,
}

/// A flag that was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenFlag {
    /// Its name, with dashes.
    pub flag: String,
    /// Its value; secrets are masked.
    pub value: String,
    pub effect: Effect,
    /// Honoured: what it does. Accepted: why it has no effect. Refused: the message.
    pub text: String,
}

/// What becomes of a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    Honoured,
    /// It has the only value that this server has.
    Unchanged,
    Accepted,
    Refused,
}

/// `--device`, which vLLM had before it chose by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    #[default]
    Auto,
    Cpu,
    Cuda,
}

#[derive(Clone, Debug, Deserialize)]
pub struct GeneralArgs {
    pub disable_log_stats: bool,
    pub shutdown_timeout: i64,
    pub fail_on_environ_validation: bool,
}

#[derive(Clone, Debug, Deserialize)]
pub struct FrontendArgs {
    pub chat_template: Option<String>,
    pub chat_template_content_format: String,
    pub trust_request_chat_template: bool,
    pub default_chat_template_kwargs: Option<Map<String, Value>>,
    pub reasoning_effort_map: Option<Map<String, Value>>,
    pub response_role: String,
    pub anthropic_disabled_thinking_effort: String,
    pub return_tokens_as_token_ids: bool,
    pub enable_auto_tool_choice: bool,
    pub exclude_tools_when_tool_choice_none: bool,
    pub tool_call_parser: Option<String>,
    pub enable_prompt_tokens_details: bool,
    pub enable_per_request_metrics: bool,
    pub enable_force_include_usage: bool,
    pub sse_keep_alive_interval: i64,
    pub fingerprint_mode: FingerprintMode,
    pub fingerprint_value: Option<String>,
    pub host: Option<String>,
    pub port: i64,
    pub uvicorn_log_level: String,
    pub disable_uvicorn_access_log: bool,
    pub disable_access_log_for_endpoints: Option<String>,
    pub allow_credentials: bool,
    pub allowed_origins: Vec<String>,
    pub allowed_methods: Vec<String>,
    pub allowed_headers: Vec<String>,
    pub api_key: Option<Vec<String>>,
    pub root_path: Option<String>,
    pub enable_request_id_headers: bool,
    pub enable_server_load_tracking: bool,
    pub enable_tokenizer_info_endpoint: bool,
    pub disable_fastapi_docs: bool,
    pub enable_scale_out: bool,
    pub tokens_only: bool,
}

/// Of the group Frontend: sockets, TLS and the limits of a connection.
#[derive(Clone, Debug, Deserialize)]
pub struct HttpArgs {
    pub uds: Option<String>,
    pub ssl_keyfile: Option<String>,
    pub ssl_certfile: Option<String>,
    pub ssl_ca_certs: Option<String>,
    pub enable_ssl_refresh: bool,
    pub ssl_cert_reqs: i64,
    pub ssl_ciphers: Option<String>,
    pub h11_max_incomplete_event_size: i64,
    pub h11_max_header_count: i64,
}

/// Of the groups General and Frontend: what is logged of a request.
#[derive(Clone, Debug, Deserialize)]
pub struct RequestLogArgs {
    pub enable_log_requests: bool,
    pub enable_log_outputs: bool,
    pub enable_log_deltas: bool,
    pub max_log_len: Option<i64>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct ObservabilityArgs {
    pub otlp_traces_endpoint: Option<String>,
    pub collect_detailed_traces: Option<Vec<String>>,
    pub custom_histogram_buckets: Option<Map<String, Value>>,
}

/// How `system_fingerprint` is made.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum FingerprintMode {
    Custom,
    Full,
    Hash,
    None,
}

#[derive(Clone, Debug, Deserialize)]
pub struct ModelArgs {
    pub tokenizer: Option<String>,
    pub dtype: String,
    pub seed: i64,
    pub hf_config_path: Option<String>,
    pub revision: Option<String>,
    pub tokenizer_revision: Option<String>,
    /// -1 = as long as fits.
    pub max_model_len: Option<i64>,
    pub enforce_eager: bool,
    pub max_logprobs: i64,
    pub logprobs_mode: String,
    pub served_model_name: Option<Vec<String>>,
    /// A token, or `true` for the stored one.
    pub hf_token: Option<Value>,
    pub hf_overrides: Value,
    pub generation_config: String,
    pub override_generation_config: Map<String, Value>,
    pub runner: String,
    pub convert: String,
    pub pooler_config: Option<Map<String, Value>>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct LoadArgs {
    pub load_format: String,
    pub download_dir: Option<String>,
    pub ignore_patterns: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct StructuredOutputsArgs {
    pub reasoning_parser: String,
    pub structured_outputs_config: Option<Map<String, Value>>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct ParallelArgs {
    pub device_ids: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct CacheArgs {
    pub block_size: Option<i64>,
    pub gpu_memory_utilization: f64,
    pub kv_cache_memory_bytes: Option<i64>,
    pub kv_cache_dtype: String,
    pub num_gpu_blocks_override: Option<i64>,
    pub enable_prefix_caching: Option<bool>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct SchedulerArgs {
    pub max_num_batched_tokens: Option<i64>,
    pub max_num_seqs: Option<i64>,
    pub max_num_queued_reqs: Option<i64>,
    pub max_num_queued_tokens: Option<i64>,
    pub long_prefill_token_threshold: i64,
    pub scheduling_policy: String,
    pub enable_chunked_prefill: Option<bool>,
    pub stream_interval: i64,
}

#[derive(Clone, Debug, Deserialize)]
pub struct LoggingArgs {
    pub log_level: Option<String>,
    pub logging_config: Option<Map<String, Value>>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct VllmArgs {
    pub performance_mode: String,
}

/// What the machine offers; found once at start, a value so that tests can choose it.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Threads that may run at once.
    pub cpu_threads: usize,
    pub gpus: Vec<Gpu>,
}

#[derive(Clone, Debug)]
pub struct Gpu {
    pub name: String,
    pub memory_bytes: u64,
}

impl Machine {
    /// This machine, with the GPUs that the build can use.
    pub fn probe(gpus: Vec<Gpu>) -> Self {
        let cpu_threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        Self { cpu_threads, gpus }
    }

    /// The device itself, when `kind` is one.
    pub fn gpu(&self, kind: DeviceKind) -> Option<&Gpu> {
        match kind {
            DeviceKind::Cpu => None,
            DeviceKind::Cuda { ordinal } => self.gpus.get(ordinal),
        }
    }
}
