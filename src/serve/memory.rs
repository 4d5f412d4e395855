//! How the device's memory is divided: planned from the configuration, logged, fitted.

use crate::backend::cuda_bytes;
use crate::config::{Config, DeviceKind};
use crate::runner::memory::CPU_KV_BYTES;
use crate::runner::{ExecutorOptions, MemoryPlan, plan_memory};

/// What depends on the kind of device alone.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTraits {
    /// Steps that may be submitted before the first is collected.
    pub max_in_flight: usize,
    /// Most bytes of KV cache that are taken unasked.
    pub default_kv_bytes: Option<usize>,
    /// Bytes that the backend takes for itself, of a model's query heads.
    pub backend_bytes: fn(usize) -> usize,
}

impl DeviceTraits {
    /// The CPU computes a step inside `submit`: planning ahead of it would only delay the tokens. A GPU computes while the
    /// host plans the next step.
    pub fn of(kind: DeviceKind) -> Self {
        match kind {
            DeviceKind::Cpu => Self {
                max_in_flight: 1,
                default_kv_bytes: Some(CPU_KV_BYTES),
                backend_bytes: |_| 0,
            },
            DeviceKind::Cuda { .. } => Self {
                max_in_flight: 2,
                default_kv_bytes: None,
                backend_bytes: cuda_bytes,
            },
        }
    }
}

/// The runner's part of the configuration, for contexts of `max_model_len` tokens.
pub fn executor_options(config: &Config, max_model_len: usize) -> ExecutorOptions<'_> {
    let DeviceTraits {
        max_in_flight,
        default_kv_bytes,
        backend_bytes,
    } = DeviceTraits::of(config.device.kind);
    ExecutorOptions {
        files: &config.model.files,
        hf_config: &config.model.hf_config,
        load_format: config.model.load_format,
        dtype: config.model.dtype,
        seed: config.model.seed,
        max_model_len,
        cache: &config.cache,
        scheduler: &config.scheduler,
        max_in_flight,
        default_kv_bytes,
        backend_bytes,
    }
}

/// Lowers the context of `--max-model-len auto` to what the KV cache holds on a device of `device_bytes`.
///
/// # Errors
/// As [`plan`].
pub fn fit_context(config: &mut Config, device_bytes: usize) -> anyhow::Result<()> {
    if !config.model.fit_max_model_len {
        return Ok(());
    }
    let shortest = config.cache.block_size.min(config.model.max_model_len);
    let fitting = plan_memory(&executor_options(config, shortest), device_bytes)?.largest_model_len();
    if fitting < config.model.max_model_len {
        tracing::info!("--max-model-len auto: {fitting} tokens, what the KV cache holds");
        config.model.max_model_len = fitting;
    }
    Ok(())
}

/// How a device of `device_bytes` would be divided; nothing is allocated.
///
/// # Errors
/// config.json is no model that is known, or it does not fit; the message says what would.
pub fn plan(config: &mut Config, device_bytes: usize) -> anyhow::Result<MemoryPlan> {
    fit_context(config, device_bytes)?;
    Ok(plan_memory(
        &executor_options(config, config.model.max_model_len),
        device_bytes,
    )?)
}

/// vLLM's lines on the KV cache, which operators look for, after the whole division of memory.
///
/// `on_gpu`: the driver keeps some memory beside the plan.
pub fn log(plan: &MemoryPlan, on_gpu: bool) {
    tracing::info!("{plan}");
    if on_gpu {
        tracing::info!("the driver's context, the kernels and the CUDA graphs take of the rest");
    }
    let tokens = plan.largest_model_len();
    tracing::info!("GPU KV cache size: {} tokens", grouped(tokens));
    tracing::info!(
        "Maximum concurrency for {} tokens per request: {:.2}x",
        grouped(plan.max_model_len),
        tokens as f64 / plan.max_model_len.max(1) as f64
    );
}

/// `1234567` as `1,234,567`.
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), text);
        }
    }
}
