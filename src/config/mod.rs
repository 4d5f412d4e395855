//! What the flags mean: resolved once from arguments, environment, checkpoint and device, then immutable.
//!
//! Each part of the program receives its own part. Only `resolve.rs` reads the environment and the checkpoint's files.

pub mod args;
mod checkpoint;
mod demo;
#[cfg(test)]
pub mod document;
pub mod environment;
mod files;
pub mod http;
mod info;
mod limits;
pub mod logging;
pub mod observability;
mod pooling;
mod request_limits;
pub mod resolve;
mod routes;

use std::collections::HashMap;
use std::path::PathBuf;

use serde_json::{Map, Value};

pub use info::ServerInfo;
pub use pooling::{Dimensions, Pooling, PoolingConfig};
pub use request_limits::RequestLimits;
pub use routes::RoutesConfig;

use self::http::HttpConfig;
use self::observability::ObservabilityConfig;
use crate::backend::DType;

/// The vLLM release whose flags, API and metrics are mirrored.
pub const VLLM_VERSION: &str = "0.33.0";

/// Everything `rvllm serve` and `rvllm bench` need.
#[derive(Clone, Debug)]
pub struct Config {
    pub model: ModelConfig,
    pub cache: CacheConfig,
    pub scheduler: SchedulerConfig,
    pub chat: ChatConfig,
    pub server: ServerConfig,
    pub observability: ObservabilityConfig,
    pub device: DeviceConfig,
}

impl Config {
    /// What was decided, a line each, without secrets: for logs and `/server_info`.
    pub fn summary(&self) -> String {
        let Self {
            model,
            cache,
            scheduler,
            chat,
            server,
            observability: _,
            device,
        } = self;
        let lines = [
            ("model", model.name.clone()),
            ("served as", model.served_names.join(", ")),
            ("device", format!("{:?}, {} threads", device.kind, device.threads)),
            ("dtype", model.dtype.to_string()),
            ("context", format!("{} tokens", model.max_model_len)),
            (
                "EOS",
                format!("{:?} and {:?}", model.eos_token_id, model.extra_eos_token_ids),
            ),
            ("sampling defaults", format!("{:?}", model.generation_defaults)),
            ("KV cache", format!("{cache:?}")),
            ("scheduler", format!("{scheduler:?}")),
            (
                "chat template",
                chat.template
                    .as_ref()
                    .map_or("none".into(), |t| format!("{} bytes", t.len())),
            ),
            (
                "parsers",
                format!("reasoning {:?}, tools {:?}", chat.reasoning_parser, chat.tool_parser),
            ),
            ("address", server.address() + &server.root_path),
            (
                "pooling",
                model
                    .pooling
                    .as_ref()
                    .map_or("none, it generates".into(), |pooling| format!("{pooling:?}")),
            ),
            ("API keys", server.api_keys.len().to_string()),
        ];
        lines
            .iter()
            .map(|(name, value)| format!("{name:<18} {value}\n"))
            .collect()
    }
}

#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// As the user wrote it: a hub id, a directory or `demo`.
    pub name: String,
    /// `/v1/models` ids; the first is the main one.
    pub served_names: Vec<String>,
    /// Where its files are.
    pub files: ModelFiles,
    /// Where tokenizer.json and its companions are; `files` unless `--tokenizer`.
    pub tokenizer_files: ModelFiles,
    /// The checkpoint's config.json with `--hf-overrides` applied.
    pub hf_config: Value,
    /// Type of weights and activations after `--dtype`.
    pub dtype: DType,
    pub load_format: LoadFormat,
    /// Context length in tokens.
    pub max_model_len: usize,
    /// `--max-model-len auto`: to be lowered to what the KV cache holds.
    pub fit_max_model_len: bool,
    pub vocab_size: usize,
    pub seed: u64,
    /// Primary EOS (config.json, else the tokenizer's eos_token).
    pub eos_token_id: Option<u32>,
    /// Further EOS ids of generation_config.json.
    pub extra_eos_token_ids: Vec<u32>,
    pub generation_defaults: GenerationDefaults,
    pub max_logprobs: i64,
    pub logprobs_mode: crate::step::LogprobsMode,
    /// None: it generates.
    pub pooling: Option<PoolingConfig>,
}

/// Sampling defaults after `--generation-config` and `--override-generation-config`; none = vLLM's neutral value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<i64>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub max_new_tokens: Option<u32>,
    /// `max_new_tokens` is a hard cap for every request (it came from an override or an explicit folder).
    pub max_new_tokens_is_cap: bool,
    pub skip_special_tokens: Option<bool>,
}

#[derive(Clone, Debug)]
pub enum ModelFiles {
    /// A directory in Hugging Face layout (local, or a snapshot of the hub cache).
    Directory(PathBuf),
    /// Embedded in the binary.
    Embedded(&'static [(&'static str, &'static [u8])]),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadFormat {
    Safetensors,
    /// Random weights that route evenly.
    Dummy,
}

#[derive(Clone, Debug)]
pub struct CacheConfig {
    pub block_size: usize,
    pub memory_utilization: f64,
    /// `--kv-cache-memory-bytes`: overrides the utilization.
    pub memory_bytes: Option<usize>,
    pub num_blocks_override: Option<usize>,
    pub prefix_caching: bool,
    /// None = as activations.
    pub kv_dtype: Option<DType>,
}

#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    pub max_num_batched_tokens: usize,
    pub max_num_seqs: usize,
    /// Waiting requests above this are refused with 503; none = no bound, which only tests have.
    pub max_queued_requests: Option<usize>,
    pub max_queued_tokens: Option<usize>,
    pub policy: SchedulingPolicy,
    /// Prefills longer than this are cut to it per step; 0 = off.
    pub long_prefill_token_threshold: usize,
    pub chunked_prefill: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SchedulingPolicy {
    Fcfs,
    Priority,
}

/// What a message's content is to a chat template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentFormat {
    String,
    /// A list of `{"type": …}` parts.
    Parts,
}

#[derive(Clone, Debug)]
pub struct ChatConfig {
    /// `--chat-template` or the checkpoint's.
    pub template: Option<String>,
    /// `--chat-template-content-format`; none = what the template iterates over.
    pub content_format: Option<ContentFormat>,
    pub template_kwargs: Map<String, Value>,
    /// `reasoning_effort` of a request to what is meant by it; others stay as they are.
    pub reasoning_effort_map: HashMap<String, String>,
    pub trust_request_template: bool,
    /// Of `parsers::reasoning::REGISTRY`.
    pub reasoning_parser: ParserChoice,
    /// Of `parsers::tool::REGISTRY`.
    pub tool_parser: ParserChoice,
    /// `--enable-auto-tool-choice` was given. A detected tool parser implies it.
    pub auto_tool_choice: bool,
    pub exclude_tools_when_none: bool,
    pub response_role: String,
    /// What Anthropic's `thinking: disabled` asks of the template; none = what the template can do.
    pub anthropic_disabled_thinking_effort: Option<String>,
    pub structured_outputs: StructuredOutputsConfig,
}

/// `--structured-outputs-config`: defaults of what requests may ask, and where grammars begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StructuredOutputsConfig {
    pub disable_any_whitespace: bool,
    pub disable_additional_properties: bool,
    /// Reasoning is under the grammar too.
    pub enable_in_reasoning: bool,
}

/// Which parser reads the model's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParserChoice {
    /// No flag: the one that fits the checkpoint, if any.
    Detect,
    /// `none`.
    Off,
    /// As the user wrote it; not yet looked up.
    Named(String),
}

#[derive(Clone, Debug)]
pub struct ServerConfig {
    pub host: Option<String>,
    pub port: u16,
    pub http: HttpConfig,
    /// Bearer tokens; empty = open.
    pub api_keys: Vec<String>,
    pub root_path: String,
    pub allowed_origins: Vec<String>,
    pub allowed_methods: Vec<String>,
    pub allowed_headers: Vec<String>,
    pub allow_credentials: bool,
    pub enable_request_id_headers: bool,
    pub prompt_tokens_details: bool,
    pub force_include_usage: bool,
    pub return_tokens_as_token_ids: bool,
    /// Tokens that a streamed chunk gathers at least; 1 = every token is sent.
    pub stream_interval: usize,
    /// Responses tell where the request's time went.
    pub per_request_metrics: bool,
    /// uvicorn's own lines at start and end.
    pub lifecycle_log: bool,
    pub access_log: bool,
    /// Paths that the access log leaves out.
    pub access_log_excluded_paths: Vec<String>,
    /// Seconds that SIGTERM leaves running requests.
    pub shutdown_timeout_s: u64,
    /// 0 = off.
    pub sse_keep_alive_s: u64,
    pub max_body_bytes: usize,
    pub request_limits: RequestLimits,
    /// `VLLM_SKIP_MODEL_NAME_VALIDATION`: every name is the served model.
    pub any_model_name: bool,
    /// `VLLM_ENABLE_RESPONSES_API_STORE`: responses can be asked for again.
    pub responses_store: bool,
    /// `system_fingerprint`; none = null.
    pub fingerprint: Option<String>,
    pub routes: RoutesConfig,
}

impl ServerConfig {
    /// What clients connect to, as the log names it.
    pub fn address(&self) -> String {
        if let Some(path) = &self.http.uds {
            return format!("unix:{}", path.display());
        }
        let scheme = if self.http.tls.is_some() { "https" } else { "http" };
        let host = self.host.as_deref().unwrap_or("0.0.0.0");
        match host.contains(':') {
            true => format!("{scheme}://[{host}]:{}", self.port),
            false => format!("{scheme}://{host}:{}", self.port),
        }
    }
}

#[derive(Clone, Debug)]
pub struct DeviceConfig {
    pub kind: DeviceKind,
    pub threads: usize,
    pub enforce_eager: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    Cpu,
    Cuda { ordinal: usize },
}
