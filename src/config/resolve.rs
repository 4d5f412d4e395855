//! From what was typed to what it means, once: flags, environment, the checkpoint's files and the machine.

use std::collections::HashMap;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::args::{DeviceChoice, FingerprintMode, FrontendArgs, Machine, ModelArgs, ServeArgs, StructuredOutputsArgs};
use super::environment::Environment;
use super::files::Locator;
use super::{
    CacheConfig, ChatConfig, Config, ContentFormat, DeviceConfig, DeviceKind, GenerationDefaults, LoadFormat,
    ModelConfig, ModelFiles, ParserChoice, RequestLimits, RoutesConfig, ServerConfig, StructuredOutputsConfig,
    VLLM_VERSION, checkpoint, http, limits, observability, pooling,
};
use crate::backend::DType;
use crate::step::{LogprobsMode, MAX_LOGPROBS};

/// Most tokens of context and of vocabulary that are believed; larger counts are a damaged config.json.
const MAX_COUNT: usize = 1 << 28;
/// vLLM's default KV block.
const DEFAULT_BLOCK_SIZE: i64 = 16;
const DEFAULT_BODY_BYTES: usize = 32 << 20;

/// A setting that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{parameter}: {message}")]
pub struct ConfigError {
    /// The flag, environment variable or file.
    pub parameter: String,
    pub message: String,
}

impl ConfigError {
    pub fn new(parameter: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            parameter: parameter.into(),
            message: message.into(),
        }
    }
}

/// # Errors
/// `value` is less than 1.
pub(super) fn positive(flag: &str, value: i64) -> Result<usize, ConfigError> {
    let count = usize::try_from(value).ok().filter(|v| *v > 0);
    count.ok_or_else(|| ConfigError::new(flag, format!("{value} is not positive")))
}

/// # Errors
/// `value` does not fit `T`.
pub(super) fn not_negative<T: TryFrom<i64>>(flag: &str, value: i64) -> Result<T, ConfigError> {
    T::try_from(value).map_err(|_| ConfigError::new(flag, format!("{value} is out of range")))
}

/// Decides everything. Downloads the model if it is a hub id that is not cached.
///
/// # Errors
/// The first setting that cannot be used, by name.
pub fn resolve(args: &ServeArgs, env: &Environment, machine: &Machine) -> Result<Config, ConfigError> {
    let device = device(args, env, machine)?;
    let model = model(args, env, device.kind)?;
    let scheduler = limits::scheduler(
        &args.scheduler,
        &args.vllm.performance_mode,
        model.max_model_len,
        machine,
        device.kind,
    )?;
    let cache = cache(args, env, device.kind)?;
    let chat = chat(args, &model.tokenizer_files)?;
    let server = server(args, env, fingerprint(&args.frontend, &model, &device)?)?;
    Ok(Config {
        model,
        cache,
        scheduler,
        chat,
        server,
        observability: observability::resolve(args, env)?,
        device,
    })
}

fn device(args: &ServeArgs, env: &Environment, machine: &Machine) -> Result<DeviceConfig, ConfigError> {
    let ordinal = match args.parallel.device_ids.as_deref() {
        None => 0,
        Some(ids) => {
            let message = format!("'{ids}' is not one CUDA device number; one device is used for now");
            ids.trim()
                .parse()
                .map_err(|_| ConfigError::new("--device-ids", message))?
        }
    };
    let kind = match args.device {
        DeviceChoice::Cpu => DeviceKind::Cpu,
        DeviceChoice::Auto if machine.gpus.is_empty() => DeviceKind::Cpu,
        DeviceChoice::Cuda if machine.gpus.is_empty() => {
            return Err(ConfigError::new(
                "--device",
                "cuda: no CUDA device, or a build without CUDA; use cpu (or --dry-run-device-memory with --dry-run)",
            ));
        }
        DeviceChoice::Auto | DeviceChoice::Cuda => DeviceKind::Cuda { ordinal },
    };
    if let DeviceKind::Cuda { ordinal } = kind
        && ordinal >= machine.gpus.len()
    {
        let message = format!("device {ordinal} does not exist; there are {}", machine.gpus.len());
        return Err(ConfigError::new("--device-ids", message));
    }
    let threads = env
        .parsed::<usize>("OMP_NUM_THREADS")?
        .filter(|n| *n > 0)
        .unwrap_or(machine.cpu_threads);
    Ok(DeviceConfig {
        kind,
        threads,
        enforce_eager: args.model_args.enforce_eager,
    })
}

/// The CUDA sampler reports a bounded number of alternatives: a request for more is refused, as one above the flag is.
fn max_logprobs(asked: i64, device: DeviceKind) -> Result<i64, ConfigError> {
    const ON_CUDA: i64 = MAX_LOGPROBS as i64;
    match device {
        _ if asked < -1 => Err(ConfigError::new("--max-logprobs", format!("{asked} is less than -1"))),
        DeviceKind::Cuda { .. } if !(0..=ON_CUDA).contains(&asked) => {
            tracing::warn!("--max-logprobs {asked}: on CUDA a request may ask for at most {ON_CUDA}");
            Ok(ON_CUDA)
        }
        _ => Ok(asked),
    }
}

fn model(args: &ServeArgs, env: &Environment, device: DeviceKind) -> Result<ModelConfig, ConfigError> {
    let flags = &args.model_args;
    let name = args
        .model
        .clone()
        .filter(|name| !name.is_empty())
        .ok_or_else(|| ConfigError::new("model_tag", "no model is given: a hub id, a directory, or `demo`"))?;
    let load_format = if args.load.load_format == "dummy" {
        LoadFormat::Dummy
    } else {
        LoadFormat::Safetensors
    };
    let locator = Locator::new(args, env)?;
    let revision = flags.revision.as_deref();
    let weights = load_format == LoadFormat::Safetensors && args.dry_run.is_none();
    let files = locator.locate("model_tag", &name, revision, weights)?;
    let tokenizer_files = match flags.tokenizer.as_deref() {
        None => files.clone(),
        Some(tokenizer) => locator.locate("--tokenizer", tokenizer, flags.tokenizer_revision.as_deref(), false)?,
    };

    let config_files = match flags.hf_config_path.as_deref() {
        None => files.clone(),
        Some(path) => locator.locate("--hf-config-path", path, revision, false)?,
    };
    let mut hf_config = config_files
        .read_object("config.json")?
        .ok_or_else(|| ConfigError::new(config_files.describe("config.json"), "the file does not exist"))?;
    match &flags.hf_overrides {
        Value::Object(overrides) => checkpoint::merge(&mut hf_config, overrides),
        Value::Null => {}
        other => return Err(ConfigError::new("--hf-overrides", format!("{other} is no JSON object"))),
    }
    let hf_config = Value::Object(hf_config);

    let vocab_size = checkpoint::count(&hf_config, "vocab_size", MAX_COUNT)?;
    let model_len = checkpoint::count(&hf_config, "max_position_embeddings", MAX_COUNT)?;
    let allow_longer = env.is_on("VLLM_ALLOW_LONG_MAX_MODEL_LEN");
    let (max_model_len, fit_max_model_len) = limits::max_model_len(flags.max_model_len, model_len, allow_longer)?;
    let (generation_defaults, generation_eos) = generation(flags, &config_files, &locator, vocab_size)?;
    let own_eos = checkpoint::token_ids(
        "config.json",
        checkpoint::text_field(&hf_config, "eos_token_id"),
        vocab_size,
    )?;
    let eos_token_id = match own_eos.first() {
        Some(&id) => Some(id),
        None => checkpoint::tokenizer_eos(&tokenizer_files)?.filter(|id| (*id as usize) < vocab_size),
    };
    let mut extra_eos_token_ids: Vec<u32> = Vec::new();
    for id in own_eos.into_iter().chain(generation_eos) {
        if Some(id) != eos_token_id && !extra_eos_token_ids.contains(&id) {
            extra_eos_token_ids.push(id);
        }
    }
    let served_names = match &flags.served_model_name {
        Some(names) if names.iter().any(|name| name.is_empty()) => {
            return Err(ConfigError::new("--served-model-name", "a name is empty"));
        }
        Some(names) if !names.is_empty() => names.clone(),
        _ => vec![name.clone()],
    };
    Ok(ModelConfig {
        served_names,
        tokenizer_files,
        dtype: limits::dtype(&flags.dtype, &hf_config)?,
        load_format,
        max_model_len,
        fit_max_model_len,
        vocab_size,
        seed: not_negative("--seed", flags.seed)?,
        eos_token_id,
        extra_eos_token_ids,
        generation_defaults,
        max_logprobs: max_logprobs(flags.max_logprobs, device)?,
        logprobs_mode: match flags.logprobs_mode.as_str() {
            "raw_logits" => LogprobsMode::RawLogits,
            "processed_logprobs" => LogprobsMode::ProcessedLogprobs,
            "processed_logits" => LogprobsMode::ProcessedLogits,
            _ => LogprobsMode::RawLogprobs,
        },
        pooling: pooling::resolve(flags, &files, &hf_config)?,
        name,
        files,
        hf_config,
    })
}

/// Sampling defaults and the generation config's EOS ids. The ids are read even with `--generation-config vllm`.
fn generation(
    flags: &ModelArgs,
    model: &ModelFiles,
    locator: &Locator,
    vocab_size: usize,
) -> Result<(GenerationDefaults, Vec<u32>), ConfigError> {
    let file = "generation_config.json";
    let is_folder = !matches!(flags.generation_config.as_str(), "auto" | "vllm");
    let files = if is_folder {
        locator.locate("--generation-config", &flags.generation_config, None, false)?
    } else {
        model.clone()
    };
    let object = files.read_object(file)?;
    if is_folder && object.is_none() {
        let message = format!("{} does not exist", files.describe(file));
        return Err(ConfigError::new("--generation-config", message));
    }
    let object = object.unwrap_or_default();
    let eos = checkpoint::token_ids(file, object.get("eos_token_id"), vocab_size)?;

    let base = if flags.generation_config == "vllm" {
        Map::new()
    } else {
        object
    };
    let mut defaults = checkpoint::generation_defaults(file, &base)?;
    let overrides = &flags.override_generation_config;
    let over = checkpoint::generation_defaults("--override-generation-config", overrides)?;
    defaults.max_new_tokens_is_cap = over.max_new_tokens.is_some() || (is_folder && defaults.max_new_tokens.is_some());
    defaults.temperature = over.temperature.or(defaults.temperature);
    defaults.top_p = over.top_p.or(defaults.top_p);
    defaults.top_k = over.top_k.or(defaults.top_k);
    defaults.min_p = over.min_p.or(defaults.min_p);
    defaults.repetition_penalty = over.repetition_penalty.or(defaults.repetition_penalty);
    defaults.presence_penalty = over.presence_penalty.or(defaults.presence_penalty);
    defaults.frequency_penalty = over.frequency_penalty.or(defaults.frequency_penalty);
    defaults.max_new_tokens = over.max_new_tokens.or(defaults.max_new_tokens);
    defaults.skip_special_tokens = over.skip_special_tokens.or(defaults.skip_special_tokens);
    Ok((defaults, eos))
}

fn cache(args: &ServeArgs, env: &Environment, device: DeviceKind) -> Result<CacheConfig, ConfigError> {
    let flags = &args.cache;
    let utilization = flags.gpu_memory_utilization;
    if !(utilization > 0.0 && utilization <= 1.0) {
        return Err(ConfigError::new(
            "--gpu-memory-utilization",
            format!("{utilization} is not in (0, 1]"),
        ));
    }
    let given_bytes = flags
        .kv_cache_memory_bytes
        .map(|n| positive("--kv-cache-memory-bytes", n))
        .transpose()?;
    let cpu_space = match device {
        DeviceKind::Cpu => env.parsed::<f64>("VLLM_CPU_KVCACHE_SPACE")?.filter(|gib| *gib > 0.0),
        DeviceKind::Cuda { .. } => None,
    };
    Ok(CacheConfig {
        block_size: positive("--block-size", flags.block_size.unwrap_or(DEFAULT_BLOCK_SIZE))?,
        memory_utilization: utilization,
        memory_bytes: given_bytes.or(cpu_space.map(|gib| (gib * (1u64 << 30) as f64) as usize)),
        num_blocks_override: flags
            .num_gpu_blocks_override
            .map(|n| positive("--num-gpu-blocks-override", n))
            .transpose()?,
        prefix_caching: flags.enable_prefix_caching.unwrap_or(true),
        kv_dtype: match flags.kv_cache_dtype.as_str() {
            "bfloat16" => Some(DType::Bf16),
            "float16" => Some(DType::F16),
            _ => None,
        },
    })
}

fn chat(args: &ServeArgs, tokenizer_files: &ModelFiles) -> Result<ChatConfig, ConfigError> {
    let flags = &args.frontend;
    let parser = |name: Option<&str>| match name {
        None | Some("") => ParserChoice::Detect,
        Some(name) if name.eq_ignore_ascii_case("none") => ParserChoice::Off,
        Some(name) => ParserChoice::Named(name.to_owned()),
    };
    let (structured_outputs, reasoning_parser) = structured_outputs(&args.structured_outputs)?;
    Ok(ChatConfig {
        template: match &flags.chat_template {
            Some(text) => Some(checkpoint::given_template(text)?),
            None => checkpoint::chat_template(tokenizer_files)?,
        },
        content_format: match flags.chat_template_content_format.as_str() {
            "string" => Some(ContentFormat::String),
            "openai" => Some(ContentFormat::Parts),
            _ => None,
        },
        template_kwargs: flags.default_chat_template_kwargs.clone().unwrap_or_default(),
        reasoning_effort_map: reasoning_effort_map(flags.reasoning_effort_map.as_ref())?,
        trust_request_template: flags.trust_request_chat_template,
        reasoning_parser: parser(Some(&reasoning_parser)),
        tool_parser: parser(flags.tool_call_parser.as_deref()),
        auto_tool_choice: flags.enable_auto_tool_choice,
        exclude_tools_when_none: flags.exclude_tools_when_tool_choice_none,
        response_role: flags.response_role.clone(),
        anthropic_disabled_thinking_effort: Some(flags.anthropic_disabled_thinking_effort.clone())
            .filter(|effort| effort != "auto"),
        structured_outputs,
    })
}

/// The values of a request's `reasoning_effort`.
const REASONING_EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

fn reasoning_effort_map(given: Option<&Map<String, Value>>) -> Result<HashMap<String, String>, ConfigError> {
    let error = |message: String| ConfigError::new("--reasoning-effort-map", message);
    given
        .into_iter()
        .flatten()
        .map(|(from, to)| {
            if !REASONING_EFFORTS.contains(&from.as_str()) {
                return Err(error(format!("'{from}' is none of {}", REASONING_EFFORTS.join(", "))));
            }
            match to {
                Value::String(to) => Ok((from.clone(), to.clone())),
                other => Err(error(format!("{other}, the value of '{from}', is no string"))),
            }
        })
        .collect()
}

/// `--structured-outputs-config`, and the reasoning parser that it or its own flag names.
fn structured_outputs(flags: &StructuredOutputsArgs) -> Result<(StructuredOutputsConfig, String), ConfigError> {
    let mut config = StructuredOutputsConfig::default();
    let mut reasoning_parser = flags.reasoning_parser.clone();
    for (key, value) in flags.structured_outputs_config.iter().flatten() {
        let refused = |what: &str| {
            let flag = format!("--structured-outputs-config.{key}");
            Err(ConfigError::new(flag, what))
        };
        let switch = match key.as_str() {
            "disable_any_whitespace" => &mut config.disable_any_whitespace,
            "disable_additional_properties" => &mut config.disable_additional_properties,
            "enable_in_reasoning" => &mut config.enable_in_reasoning,
            "reasoning_parser" => {
                match value {
                    Value::String(name) if reasoning_parser.is_empty() => reasoning_parser.clone_from(name),
                    Value::String(_) => {}
                    _ => return refused("it must be a name"),
                }
                continue;
            }
            // There is one grammar engine, whatever its name elsewhere.
            "backend" => match value.as_str() {
                Some("auto" | "xgrammar" | "guidance" | "outlines" | "lm-format-enforcer") => continue,
                _ => return refused("it must be auto, xgrammar, guidance, outlines or lm-format-enforcer"),
            },
            "reasoning_parser_plugin" if value.as_str().is_some_and(str::is_empty) => continue,
            "reasoning_parser_plugin" => return refused("Python plugins cannot be loaded"),
            _ => return refused("there is no such setting"),
        };
        match value {
            Value::Bool(value) => *switch = *value,
            _ => return refused("it must be true or false"),
        }
    }
    Ok((config, reasoning_parser))
}

fn server(args: &ServeArgs, env: &Environment, fingerprint: Option<String>) -> Result<ServerConfig, ConfigError> {
    let flags = &args.frontend;
    let api_keys = match &flags.api_key {
        Some(keys) => keys.iter().filter(|key| !key.is_empty()).cloned().collect(),
        None => env.get("VLLM_API_KEY").map(str::to_owned).into_iter().collect(),
    };
    let excluded = flags.disable_access_log_for_endpoints.as_deref().unwrap_or_default();
    let excluded = excluded.split(',').map(str::trim).filter(|path| !path.is_empty());
    let slashed = |path: &str| format!("/{}", path.trim_matches('/'));
    let root = flags.root_path.as_deref().unwrap_or_default().trim_matches('/');
    // uvicorn logs its life and each request at this level.
    let uvicorn_info = matches!(flags.uvicorn_log_level.as_str(), "info" | "debug" | "trace");
    Ok(ServerConfig {
        host: flags.host.clone().filter(|host| !host.is_empty()),
        port: not_negative("--port", flags.port)?,
        api_keys,
        root_path: if root.is_empty() { String::new() } else { slashed(root) },
        allowed_origins: flags.allowed_origins.clone(),
        allowed_methods: flags.allowed_methods.clone(),
        allowed_headers: flags.allowed_headers.clone(),
        allow_credentials: flags.allow_credentials,
        enable_request_id_headers: flags.enable_request_id_headers,
        prompt_tokens_details: flags.enable_prompt_tokens_details,
        per_request_metrics: flags.enable_per_request_metrics,
        stream_interval: positive("--stream-interval", args.scheduler.stream_interval)?,
        force_include_usage: flags.enable_force_include_usage,
        return_tokens_as_token_ids: flags.return_tokens_as_token_ids,
        http: http::resolve(&args.http, env)?,
        lifecycle_log: uvicorn_info,
        access_log: !flags.disable_uvicorn_access_log && uvicorn_info,
        access_log_excluded_paths: excluded.map(slashed).collect(),
        shutdown_timeout_s: not_negative("--shutdown-timeout", args.general.shutdown_timeout)?,
        responses_store: env.is_on("VLLM_ENABLE_RESPONSES_API_STORE"),
        sse_keep_alive_s: not_negative("--sse-keep-alive-interval", flags.sse_keep_alive_interval)?,
        max_body_bytes: env
            .parsed("VLLM_HTTP_MAX_REQUEST_BODY_SIZE")?
            .unwrap_or(DEFAULT_BODY_BYTES),
        request_limits: RequestLimits::resolve(env)?,
        any_model_name: env.is_on("VLLM_SKIP_MODEL_NAME_VALIDATION"),
        fingerprint,
        routes: RoutesConfig::resolve(flags, env),
    })
}

/// `vllm-<version>-<8 hex>`; the digits stand for this program's version and everything that shapes the model's output.
fn fingerprint(
    flags: &FrontendArgs,
    model: &ModelConfig,
    device: &DeviceConfig,
) -> Result<Option<String>, ConfigError> {
    let digits = || {
        let what = format!(
            "{}|{}|{}|{}|{:?}|{}",
            env!("CARGO_PKG_VERSION"),
            model.name,
            model.hf_config,
            model.dtype,
            device.kind,
            model.max_model_len
        );
        Sha256::digest(what.as_bytes())
            .iter()
            .take(4)
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    match flags.fingerprint_mode {
        FingerprintMode::None => Ok(None),
        FingerprintMode::Hash => Ok(Some(digits())),
        FingerprintMode::Full => Ok(Some(format!("vllm-{VLLM_VERSION}-{}", digits()))),
        FingerprintMode::Custom => match &flags.fingerprint_value {
            Some(value) => Ok(Some(value.clone())),
            None => Err(ConfigError::new(
                "--fingerprint-mode",
                "custom needs --fingerprint-value",
            )),
        },
    }
}
