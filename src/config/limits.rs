//! Numbers that depend on model and device: context length, batch limits, types.

use serde_json::Value;

use super::args::{Machine, SchedulerArgs};
use super::checkpoint::text_field;
use super::resolve::{ConfigError, positive};
use super::{DeviceKind, SchedulerConfig, SchedulingPolicy};
use crate::backend::DType;

/// Where `--max-num-queued-reqs` is not given: waiting requests for each that may run, and the least of them. The least
/// lets one request with the most prompts that are allowed through. vLLM's queue has no bound.
const QUEUED_PER_RUNNING: usize = 16;
const MIN_QUEUE: usize = 4096;

/// `--dtype`; `auto` is the checkpoint's, with float32 (or nothing said) loaded as bfloat16 on every device, as vLLM does.
/// On the CPU that also halves the bytes a decode step reads; `--dtype float32` keeps the checkpoint's precision.
///
/// # Errors
/// config.json names a type that is not float32, float16 or bfloat16.
pub fn dtype(flag: &str, hf_config: &Value) -> Result<DType, ConfigError> {
    match flag {
        "bfloat16" => return Ok(DType::Bf16),
        "float16" | "half" => return Ok(DType::F16),
        "float32" | "float" => return Ok(DType::F32),
        _ => {}
    }
    let named = text_field(hf_config, "dtype").or_else(|| text_field(hf_config, "torch_dtype"));
    match named.map(|v| v.as_str().unwrap_or_default()) {
        None | Some("bfloat16" | "float32") => Ok(DType::Bf16),
        Some("float16") => Ok(DType::F16),
        Some(other) => {
            let message = format!("dtype '{other}' is not served; use --dtype bfloat16, float16 or float32");
            Err(ConfigError::new("config.json", message))
        }
    }
}

/// The context length, and whether it is to be fitted to memory.
///
/// # Errors
/// The flag is not positive, or beyond the model's own length and `allow_longer` is not set.
pub fn max_model_len(flag: Option<i64>, model_len: usize, allow_longer: bool) -> Result<(usize, bool), ConfigError> {
    let wanted = match flag {
        None => return Ok((model_len, false)),
        Some(-1) => return Ok((model_len, true)),
        Some(wanted) => positive("--max-model-len", wanted)?,
    };
    if wanted > model_len && !allow_longer {
        let message = format!(
            "{wanted} is more than the model's max_position_embeddings ({model_len}); set \
             VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 if you know that the model bears it"
        );
        return Err(ConfigError::new("--max-model-len", message));
    }
    Ok((wanted, false))
}

/// Tokens and sequences of a step when no flag says so.
///
/// GPUs as vLLM has them. On the CPU a step of 2048 tokens keeps decodes of a mixed batch from waiting longer than about
/// a second; vLLM's CPU build takes 4096.
fn default_limits(machine: &Machine, device: DeviceKind) -> (usize, usize) {
    const GIB: u64 = 1 << 30;
    match machine.gpu(device) {
        None => (2048, 256),
        Some(gpu) if gpu.memory_bytes >= 160 * GIB => (16384, 1024),
        Some(gpu) if gpu.memory_bytes >= 70 * GIB && !gpu.name.contains("A100") && !gpu.name.contains("GB10") => {
            (8192, 1024)
        }
        Some(_) => (2048, 256),
    }
}

/// # Errors
/// A flag is not positive, or flags contradict one another.
pub fn scheduler(
    args: &SchedulerArgs,
    performance_mode: &str,
    max_model_len: usize,
    machine: &Machine,
    device: DeviceKind,
) -> Result<SchedulerConfig, ConfigError> {
    let chunked_prefill = args.enable_chunked_prefill.unwrap_or(true);
    let given = |flag: &str, value: Option<i64>| value.map(|v| positive(flag, v)).transpose();
    let given_tokens = given("--max-num-batched-tokens", args.max_num_batched_tokens)?;
    let given_seqs = given("--max-num-seqs", args.max_num_seqs)?;

    let (mut default_tokens, mut default_seqs) = default_limits(machine, device);
    if performance_mode == "throughput" {
        (default_tokens, default_seqs) = (2 * default_tokens, 2 * default_seqs);
    }
    if !chunked_prefill {
        default_tokens = default_tokens.max(max_model_len);
    }
    let max_num_seqs = given_seqs.unwrap_or_else(|| default_seqs.min(given_tokens.unwrap_or(usize::MAX)));
    let useful_tokens = max_num_seqs.saturating_mul(max_model_len);
    let max_num_batched_tokens = given_tokens.unwrap_or_else(|| default_tokens.max(max_num_seqs).min(useful_tokens));

    if max_num_batched_tokens < max_num_seqs {
        let message = format!("{max_num_batched_tokens} is less than --max-num-seqs ({max_num_seqs})");
        return Err(ConfigError::new("--max-num-batched-tokens", message));
    }
    if !chunked_prefill && max_num_batched_tokens < max_model_len {
        let message = format!(
            "{max_num_batched_tokens} is less than the context ({max_model_len}) and chunked prefill is off; raise it or \
             lower --max-model-len"
        );
        return Err(ConfigError::new("--max-num-batched-tokens", message));
    }
    let threshold = usize::try_from(args.long_prefill_token_threshold)
        .map_err(|_| ConfigError::new("--long-prefill-token-threshold", "must not be negative"))?;
    if threshold > max_model_len {
        let message = format!("{threshold} is more than the context ({max_model_len})");
        return Err(ConfigError::new("--long-prefill-token-threshold", message));
    }
    Ok(SchedulerConfig {
        max_num_batched_tokens,
        max_num_seqs,
        max_queued_requests: Some(match args.max_num_queued_reqs {
            Some(limit) => positive("--max-num-queued-reqs", limit)?,
            None => max_num_seqs.saturating_mul(QUEUED_PER_RUNNING).max(MIN_QUEUE),
        }),
        max_queued_tokens: given("--max-num-queued-tokens", args.max_num_queued_tokens)?,
        policy: if args.scheduling_policy == "priority" {
            SchedulingPolicy::Priority
        } else {
            SchedulingPolicy::Fcfs
        },
        long_prefill_token_threshold: threshold,
        chunked_prefill,
    })
}
