//! What `/server_info` and `/tokenizer_info` tell, decided at start.

use serde_json::{Map, Value, json};

use super::{Config, DeviceKind, SchedulingPolicy, VLLM_VERSION};

/// Answers that do not change while the server runs.
#[derive(Clone, Debug, Default)]
pub struct ServerInfo {
    /// The configuration for people.
    pub text: String,
    /// The configuration under vLLM's names.
    pub config: Value,
    pub system: Value,
    pub tokenizer: Value,
}

impl ServerInfo {
    /// Of the configuration as it is after loading.
    pub fn new(config: &Config) -> Self {
        Self {
            text: config.summary(),
            config: as_vllm_names_it(config),
            system: json!({
                "os": std::env::consts::OS,
                "architecture": std::env::consts::ARCH,
                "threads": config.device.threads,
                "rvllm_version": env!("CARGO_PKG_VERSION"),
                "vllm_version": VLLM_VERSION,
            }),
            tokenizer: tokenizer_info(config),
        }
    }
}

fn as_vllm_names_it(config: &Config) -> Value {
    let Config {
        model,
        cache,
        scheduler,
        device,
        ..
    } = config;
    let policy = match scheduler.policy {
        SchedulingPolicy::Fcfs => "fcfs",
        SchedulingPolicy::Priority => "priority",
    };
    json!({
        "model_config": {
            "model": model.name,
            "served_model_name": model.served_names,
            "dtype": model.dtype.to_string(),
            "seed": model.seed,
            "max_model_len": model.max_model_len,
            "vocab_size": model.vocab_size,
            "max_logprobs": model.max_logprobs,
            "enforce_eager": device.enforce_eager,
            "hf_config": model.hf_config,
        },
        "cache_config": {
            "block_size": cache.block_size,
            "gpu_memory_utilization": cache.memory_utilization,
            "kv_cache_memory_bytes": cache.memory_bytes,
            "num_gpu_blocks_override": cache.num_blocks_override,
            "enable_prefix_caching": cache.prefix_caching,
            "cache_dtype": cache.kv_dtype.map_or_else(|| "auto".to_owned(), |dtype| dtype.to_string()),
        },
        "scheduler_config": {
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_queued_reqs": scheduler.max_queued_requests,
            "max_num_queued_tokens": scheduler.max_queued_tokens,
            "policy": policy,
            "long_prefill_token_threshold": scheduler.long_prefill_token_threshold,
            "enable_chunked_prefill": scheduler.chunked_prefill,
        },
        "parallel_config": {
            "world_size": 1,
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "data_parallel_size": 1,
        },
        "device_config": {
            "device_type": match device.kind {
                DeviceKind::Cpu => "cpu",
                DeviceKind::Cuda { .. } => "cuda",
            },
        },
    })
}

/// tokenizer_config.json without the names of files, tokens by their text, as vLLM tells it.
fn tokenizer_info(config: &Config) -> Value {
    let files = &config.model.tokenizer_files;
    let read = files.read_object("tokenizer_config.json").ok().flatten();
    let mut info: Map<String, Value> = read
        .unwrap_or_default()
        .into_iter()
        .filter(|(name, _)| !matches!(name.as_str(), "vocab_file" | "merges_file"))
        .map(|(name, value)| (name, tokens_as_text(value)))
        .collect();
    info.entry("backend").or_insert_with(|| "tokenizers".into());
    if let Some(template) = &config.chat.template {
        info.insert("chat_template".to_owned(), template.as_str().into());
    }
    Value::Object(info)
}

fn tokens_as_text(value: Value) -> Value {
    match value {
        Value::Object(mut object) => match object.remove("content") {
            Some(content) => content,
            None => Value::Object(object.into_iter().map(|(k, v)| (k, tokens_as_text(v))).collect()),
        },
        Value::Array(items) => Value::Array(items.into_iter().map(tokens_as_text).collect()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn added_tokens_are_told_by_their_text() {
        let config = json!({"a": {"content": "<x>", "lstrip": false}, "b": {"7": {"content": "<y>"}}, "c": [1, null]});
        assert_eq!(
            tokens_as_text(config),
            json!({"a": "<x>", "b": {"7": "<y>"}, "c": [1, null]})
        );
    }
}
