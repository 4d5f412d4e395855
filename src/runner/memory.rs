//! How a device's memory is divided, computed from shapes before anything is allocated.

use std::fmt;

use crate::backend::DType;
use crate::config::CacheConfig;
use crate::model::LoadError;
use crate::model::cost::ModelCost;
use crate::model::layers::WorkspaceShape;
use crate::model::lfm2::config::Lfm2Config;

/// KV space on a CPU when nothing is asked for: a host's memory is not the server's alone.
pub const CPU_KV_BYTES: usize = 4 << 30;

/// What is asked of the memory.
#[derive(Clone, Debug)]
pub struct MemoryRequest<'a> {
    pub cache: &'a CacheConfig,
    pub dtype: DType,
    pub max_model_len: usize,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub max_in_flight: usize,
    /// Bytes that the device can give in all.
    pub device_bytes: usize,
    /// Most bytes that the KV cache takes unless the cache configuration says how many.
    pub default_kv_bytes: Option<usize>,
    /// Bytes that the backend takes for itself, of a model's query heads.
    pub backend_bytes: fn(usize) -> usize,
}

/// Who gets how many bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryPlan {
    pub device_bytes: usize,
    /// Share of `device_bytes` that the server may use.
    pub utilization: f64,
    pub weight_bytes: usize,
    /// Activations, logits, the experts' scratch space and the backend's own.
    pub workspace_bytes: usize,
    /// Conv states of all slots.
    pub conv_bytes: usize,
    /// Token counts and parameters of all slots.
    pub sampler_bytes: usize,
    pub kv_bytes: usize,
    pub num_blocks: usize,
    pub block_size: usize,
    pub kv_bytes_per_token: usize,
    pub max_model_len: usize,
}

impl MemoryPlan {
    /// Rows of logits that one step computes at once.
    pub fn logit_rows(max_num_seqs: usize, max_num_batched_tokens: usize) -> usize {
        max_num_seqs.min(max_num_batched_tokens).max(1)
    }

    /// Divides the memory.
    ///
    /// # Errors
    /// Weights and workspace leave no room, or one sequence of `max_model_len` tokens does not fit the cache; the message
    /// says what would.
    pub fn new(config: &Lfm2Config, request: &MemoryRequest) -> Result<Self, LoadError> {
        let cache = request.cache;
        let cost = ModelCost::new(config, request.dtype, cache.kv_dtype.unwrap_or(request.dtype));
        let logit_rows = Self::logit_rows(request.max_num_seqs, request.max_num_batched_tokens);
        let workspace = WorkspaceShape::new(config, request.max_num_batched_tokens, logit_rows).elements();
        let logits = logit_rows
            .saturating_mul(config.vocab_size)
            .saturating_mul(4 * request.max_in_flight);
        let kv_bytes_per_token = cost.kv_bytes_per_token as usize;
        let block_bytes = kv_bytes_per_token * cache.block_size;
        let needed_blocks = request.max_model_len.div_ceil(cache.block_size);

        let mut plan = Self {
            device_bytes: request.device_bytes,
            utilization: cache.memory_utilization,
            weight_bytes: cost.weight_bytes as usize,
            workspace_bytes: workspace
                .saturating_mul(request.dtype.size_bytes())
                .saturating_add(logits)
                .saturating_add((request.backend_bytes)(config.attention.num_q_heads)),
            conv_bytes: request.max_num_seqs.saturating_mul(cost.conv_bytes_per_slot as usize),
            sampler_bytes: request.max_num_seqs.saturating_mul(config.vocab_size).saturating_mul(4),
            kv_bytes: 0,
            num_blocks: 0,
            block_size: cache.block_size,
            kv_bytes_per_token,
            max_model_len: request.max_model_len,
        };
        plan.num_blocks = match (cache.num_blocks_override, cache.memory_bytes) {
            (Some(blocks), _) => blocks,
            // A model without attention caches nothing: blocks are only numbers.
            _ if block_bytes == 0 => needed_blocks.saturating_mul(request.max_num_seqs),
            (None, Some(bytes)) => bytes / block_bytes,
            (None, None) => plan.free_bytes(request.default_kv_bytes)? / block_bytes,
        };
        plan.kv_bytes = plan.num_blocks.saturating_mul(block_bytes);
        if plan.num_blocks < needed_blocks {
            return Err(LoadError::Memory(format!(
                "one sequence of --max-model-len {} tokens needs {} of KV cache ({needed_blocks} blocks of {} tokens), and \
                 there is room for {} ({} blocks). The largest length that fits is {}. Lower --max-model-len, or raise \
                 --gpu-memory-utilization, --kv-cache-memory-bytes or --num-gpu-blocks-override.\n{plan}",
                plan.max_model_len,
                gib(needed_blocks * block_bytes),
                cache.block_size,
                gib(plan.kv_bytes),
                plan.num_blocks,
                plan.largest_model_len(),
            )));
        }
        Ok(plan)
    }

    /// Longest sequence that the cache holds, in tokens.
    pub fn largest_model_len(&self) -> usize {
        self.num_blocks.saturating_mul(self.block_size)
    }

    /// Bytes left for KV under the utilization.
    fn free_bytes(&self, default_kv_bytes: Option<usize>) -> Result<usize, LoadError> {
        let usable = (self.device_bytes as f64 * self.utilization) as usize;
        let fixed = [self.workspace_bytes, self.conv_bytes, self.sampler_bytes]
            .iter()
            .fold(self.weight_bytes, |sum, &bytes| sum.saturating_add(bytes));
        match usable.checked_sub(fixed) {
            Some(free) => Ok(free.min(default_kv_bytes.unwrap_or(usize::MAX))),
            None => Err(LoadError::Memory(format!(
                "the model needs {} before any KV cache, and --gpu-memory-utilization {} of {} is {}. Raise it, or lower \
                 --max-num-batched-tokens or --max-num-seqs.\n{self}",
                gib(fixed),
                self.utilization,
                gib(self.device_bytes),
                gib(usable),
            ))),
        }
    }
}

impl fmt::Display for MemoryPlan {
    /// One line per part, for logs and dry runs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "memory: {} on the device, {} of it usable",
            gib(self.device_bytes),
            self.utilization
        )?;
        writeln!(f, "  weights     {:>12}", gib(self.weight_bytes))?;
        writeln!(f, "  workspace   {:>12}", gib(self.workspace_bytes))?;
        writeln!(f, "  conv states {:>12}", gib(self.conv_bytes))?;
        writeln!(f, "  sampler     {:>12}", gib(self.sampler_bytes))?;
        let tokens = self.largest_model_len();
        write!(
            f,
            "  KV cache    {:>12}  {} blocks of {} tokens",
            gib(self.kv_bytes),
            self.num_blocks,
            self.block_size
        )?;
        write!(f, " = {tokens} tokens")?;
        let sequences = tokens as f64 / self.max_model_len.max(1) as f64;
        write!(f, ", {sequences:.2} sequences of {} tokens", self.max_model_len)
    }
}

fn gib(bytes: usize) -> String {
    match bytes {
        0..0x40_0000 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        0x40_0000..0x4000_0000 => format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64),
        _ => format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config() -> Lfm2Config {
        Lfm2Config::dense(&json!({
            "hidden_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 16, "num_key_value_heads": 8,
            "vocab_size": 65536, "max_position_embeddings": 128000, "intermediate_size": 4608,
            "block_auto_adjust_ff_dim": false, "layer_types": ["conv", "full_attention", "conv"]
        }))
        .unwrap()
    }

    fn cache() -> CacheConfig {
        CacheConfig {
            block_size: 16,
            memory_utilization: 0.9,
            memory_bytes: None,
            num_blocks_override: None,
            prefix_caching: true,
            kv_dtype: None,
        }
    }

    fn request(cache: &CacheConfig) -> MemoryRequest<'_> {
        MemoryRequest {
            cache,
            dtype: DType::Bf16,
            max_model_len: 4096,
            max_num_seqs: 8,
            max_num_batched_tokens: 256,
            max_in_flight: 1,
            device_bytes: 2 << 30,
            default_kv_bytes: None,
            backend_bytes: |_| 0,
        }
    }

    #[test]
    fn what_the_backend_takes_for_itself_is_no_cache() {
        let cache = cache();
        let plain = MemoryPlan::new(&config(), &request(&cache)).unwrap();
        let taking = MemoryRequest {
            backend_bytes: |heads| heads << 20,
            ..request(&cache)
        };
        let plan = MemoryPlan::new(&config(), &taking).unwrap();
        assert_eq!(plan.workspace_bytes - plain.workspace_bytes, 16 << 20);
        let block_bytes = plan.kv_bytes_per_token * 16;
        assert!((plain.num_blocks - plan.num_blocks).abs_diff((16 << 20) / block_bytes) <= 1);
    }

    #[test]
    fn parts_add_up_to_the_usable_memory() {
        let cache = cache();
        let plan = MemoryPlan::new(&config(), &request(&cache)).unwrap();
        assert_eq!(plan.kv_bytes_per_token, 2 * 8 * 64 * 2);
        assert_eq!(plan.conv_bytes, 8 * 2 * 1024 * 2 * 2);
        let used = plan.weight_bytes + plan.workspace_bytes + plan.conv_bytes + plan.sampler_bytes + plan.kv_bytes;
        let usable = ((2u64 << 30) as f64 * 0.9) as usize;
        assert!(
            used <= usable && usable - used < plan.kv_bytes_per_token * 16,
            "{used} of {usable}"
        );
        let text = plan.to_string();
        assert!(
            text.contains(&format!("{} blocks of 16 tokens", plan.num_blocks)),
            "{text}"
        );
    }

    #[test]
    fn overrides_come_first() {
        let mut fixed = cache();
        fixed.memory_bytes = Some(64 << 20);
        let plan = MemoryPlan::new(&config(), &request(&fixed)).unwrap();
        assert_eq!(plan.num_blocks, (64 << 20) / (2048 * 16));
        fixed.num_blocks_override = Some(300);
        assert_eq!(MemoryPlan::new(&config(), &request(&fixed)).unwrap().num_blocks, 300);

        let cache = cache();
        let capped = MemoryRequest {
            default_kv_bytes: Some(32 << 20),
            ..request(&cache)
        };
        assert_eq!(MemoryPlan::new(&config(), &capped).unwrap().kv_bytes, 32 << 20);
    }

    #[test]
    fn too_long_a_context_names_the_longest_that_fits() {
        let mut small = cache();
        small.num_blocks_override = Some(10);
        let error = MemoryPlan::new(&config(), &request(&small)).unwrap_err().to_string();
        assert!(
            error.contains("--max-model-len 4096") && error.contains("largest length that fits is 160"),
            "{error}"
        );

        let cache = cache();
        let tiny = MemoryRequest {
            device_bytes: 100 << 20,
            ..request(&cache)
        };
        let error = MemoryPlan::new(&config(), &tiny).unwrap_err().to_string();
        assert!(error.contains("--gpu-memory-utilization 0.9 of 100.0 MiB"), "{error}");
    }

    #[test]
    fn no_attention_no_cache_bytes() {
        let config = Lfm2Config::dense(&json!({
            "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
            "vocab_size": 64, "max_position_embeddings": 128, "intermediate_size": 64, "layer_types": ["conv"]
        }))
        .unwrap();
        let cache = cache();
        let plan = MemoryPlan::new(&config, &request(&cache)).unwrap();
        assert_eq!((plan.kv_bytes, plan.num_blocks), (0, 256 * 8));
    }
}
