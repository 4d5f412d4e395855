//! From a configuration to a running executor.

use serde_json::Value;

use super::memory::{MemoryPlan, MemoryRequest};
use super::model_runner::{ModelRunner, Parts};
use crate::backend::{Backend, DType};
use crate::config::{CacheConfig, LoadFormat, ModelFiles, SchedulerConfig};
use crate::model::LoadError;
use crate::model::dummy::Dummy;
use crate::model::layers::{Workspace, WorkspaceShape};
use crate::model::lfm2::params::params;
use crate::model::lfm2::text::{Cache, Lfm2Text};
use crate::model::loader::{Loader, Progress, TensorSource};
use crate::model::registry::read_config;
use crate::model::weights::Checkpoint;
use crate::step::{Capacity, Executor};

/// Prefix of a text checkpoint's tensors.
const TEXT_PREFIX: &str = "model.";

/// What an executor is built from: parts of the resolved configuration.
#[derive(Clone, Copy, Debug)]
pub struct ExecutorOptions<'a> {
    pub files: &'a ModelFiles,
    /// config.json.
    pub hf_config: &'a Value,
    pub load_format: LoadFormat,
    /// Of weights and activations; the backend was made with the same.
    pub dtype: DType,
    /// Of dummy weights.
    pub seed: u64,
    pub max_model_len: usize,
    pub cache: &'a CacheConfig,
    pub scheduler: &'a SchedulerConfig,
    /// Steps that may be submitted before the first is collected.
    pub max_in_flight: usize,
    /// Most bytes for the KV cache unless `cache` says how many ([`CPU_KV_BYTES`](super::memory::CPU_KV_BYTES) on a CPU).
    pub default_kv_bytes: Option<usize>,
    /// See [`MemoryRequest`].
    pub backend_bytes: fn(usize) -> usize,
}

impl<'a> ExecutorOptions<'a> {
    fn memory_request(&self, device_bytes: usize) -> MemoryRequest<'a> {
        MemoryRequest {
            cache: self.cache,
            dtype: self.dtype,
            max_model_len: self.max_model_len,
            max_num_seqs: self.scheduler.max_num_seqs,
            max_num_batched_tokens: self.scheduler.max_num_batched_tokens,
            max_in_flight: self.max_in_flight,
            device_bytes,
            default_kv_bytes: self.default_kv_bytes,
            backend_bytes: self.backend_bytes,
        }
    }
}

/// How memory would be divided on a device of `device_bytes`, without loading anything.
pub fn plan_memory(options: &ExecutorOptions, device_bytes: usize) -> Result<MemoryPlan, LoadError> {
    MemoryPlan::new(&read_config(options.hf_config)?, &options.memory_request(device_bytes))
}

/// Plans the memory, loads the model and returns what runs it.
///
/// # Errors
/// Whatever is wrong with config.json, the checkpoint or the memory; the message names it. Nothing large is allocated
/// before headers, shapes and memory are checked.
pub fn build_executor<B: Backend>(
    options: &ExecutorOptions,
    backend: B,
    progress: Progress,
) -> Result<(Box<dyn Executor>, MemoryPlan), LoadError> {
    let (runner, plan) = build_runner(options, backend, progress)?;
    Ok((Box::new(runner), plan))
}

/// [`build_executor`] with the concrete type.
pub fn build_runner<B: Backend>(
    options: &ExecutorOptions,
    mut backend: B,
    progress: Progress,
) -> Result<(ModelRunner<B>, MemoryPlan), LoadError> {
    let config = read_config(options.hf_config)?;
    let plan = MemoryPlan::new(&config, &options.memory_request(backend.memory_bytes()?))?;

    let (source, params): (Box<dyn TensorSource>, _) = match options.load_format {
        LoadFormat::Safetensors => {
            let checkpoint = Checkpoint::open(options.files, TEXT_PREFIX)?;
            let params = params(&config, |layer| checkpoint.has_fused_experts(layer));
            checkpoint.check(&params)?;
            (Box::new(checkpoint), params)
        }
        LoadFormat::Dummy => {
            let params = params(&config, |_| false);
            (Box::new(Dummy::new(&params, options.dtype, options.seed)), params)
        }
    };
    let mut loader = Loader::new(&mut backend, source.as_ref(), &params, options.dtype, progress);
    let model = Lfm2Text::load(&mut loader, &config)?;
    drop(source);

    let (seqs, tokens) = (options.scheduler.max_num_seqs, options.scheduler.max_num_batched_tokens);
    let logit_rows = MemoryPlan::logit_rows(seqs, tokens);
    let shape = WorkspaceShape::new(&config, tokens, logit_rows);
    let workspace = Workspace::new(&mut backend, &config, &shape)?;
    let kv_dtype = options.cache.kv_dtype.unwrap_or(options.dtype);
    let cache = Cache::new(&mut backend, &config, plan.num_blocks, plan.block_size, kv_dtype, seqs)?;
    let max_blocks_per_row = options.max_model_len.div_ceil(plan.block_size);
    let batch = backend.batch(tokens, seqs, max_blocks_per_row)?;
    let sampler = backend.sampler(seqs, config.vocab_size, logit_rows)?;
    let logits = (0..options.max_in_flight)
        .map(|_| backend.tensor(logit_rows, config.vocab_size, DType::F32))
        .collect::<Result<_, _>>()?;

    let capacity = Capacity {
        num_blocks: plan.num_blocks,
        block_size: plan.block_size,
        max_num_seqs: seqs,
        max_num_batched_tokens: tokens,
        conv_replay_tokens: config.conv_replay_tokens(),
        vocab_size: config.vocab_size,
        max_in_flight: options.max_in_flight,
    };
    let parts = Parts {
        backend,
        model,
        workspace,
        cache,
        batch,
        sampler,
        logits,
        logit_rows,
    };
    Ok((ModelRunner::new(parts, capacity, options.max_model_len), plan))
}
