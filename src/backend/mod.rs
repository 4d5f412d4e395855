//! The operations a model is made of, at the granularity at which a serving engine launches work.
//!
//! [`Backend`] is a closed table: models are written once against it and know neither device nor rank. Outputs are
//! arguments, allocated once by the runner; nothing allocates in a step, so that on CUDA a graph is the same `forward`
//! under capture. A fused operation has a default body made of plain ones; a backend overrides it where that pays.
//!
//! Alphabet: `T` tokens this step, `S` sequences (rows) this step, `H` hidden, `F` ffn width, `Nq`/`Nk` query and KV heads,
//! `D` head dim, `V` vocabulary, `P` tokens per KV block, `E`/`K` experts and experts per token, `L` conv taps.

#[cfg(any(test, feature = "cuda"))]
pub mod conformance;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

use std::fmt;

use crate::step::{DeviceTimes, SampledToken, SlotId, StartedSlot, TokenId, TokenLogprobs, TokenMask};

/// Storage types of weights, activations and KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    F16,
    Bf16,
}

impl DType {
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }
}

impl fmt::Display for DType {
    /// torch's names, as vLLM prints them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::Bf16 => "bfloat16",
        })
    }
}

/// An operation failed; `op` is the table's or the kernel's name.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{op}: {message}")]
pub struct BackendError {
    pub op: &'static str,
    pub message: String,
    /// The device is unusable from now on.
    pub fatal: bool,
}

pub type Result<T, E = BackendError> = std::result::Result<T, E>;

/// A weight as the loader hands it over: row-major bytes in `dtype`.
#[derive(Clone, Copy, Debug)]
pub struct HostTensor<'a> {
    pub dtype: DType,
    /// Outermost first; `[out, in]` for a linear weight.
    pub shape: &'a [usize],
    /// `shape.product() * dtype.size_bytes()` bytes, not necessarily aligned.
    pub data: &'a [u8],
}

/// Shape of attention. Sources: Hugging Face `Lfm2Attention`; see docs/ARCHITECTURE.md.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    pub num_q_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// D^-1/2 unless the model says otherwise.
    pub scale: f32,
    pub rope_theta: f64,
    /// Of the per-head q and k norms.
    pub norm_eps: f32,
}

/// How experts are chosen: sigmoid scores; top-k of score + bias; weights are the scores, normalised if asked, scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RouteShape {
    pub num_experts: usize,
    pub experts_per_token: usize,
    pub norm_topk_prob: bool,
    pub routed_scaling_factor: f32,
}

/// One row of a step as the device sees it. The host arrays that a backend uploads once per step.
///
/// Built by the runner from a `StepPlan`; rows are ragged pieces of sequences, concatenated to `T` tokens.
#[derive(Clone, Debug, Default)]
pub struct BatchLayout {
    /// `[T]` input ids; for tokens of `feedback` rows the value is ignored.
    pub token_ids: Vec<u32>,
    /// `[T]` position of each token in its sequence.
    pub positions: Vec<u32>,
    /// `[T]` physical KV slot `block * P + offset` that the token's K and V go to; -1 = write none (replay).
    pub slot_mapping: Vec<i64>,
    /// `[S + 1]` row s owns tokens `row_starts[s]..row_starts[s + 1]`.
    pub row_starts: Vec<u32>,
    /// `[S]` tokens of context at the row's end (position of its last token + 1).
    pub context_lens: Vec<u32>,
    /// `[S * max_blocks]` KV blocks of each row, padded with 0.
    pub block_tables: Vec<u32>,
    /// Columns of `block_tables`.
    pub max_blocks: usize,
    /// `[S]` conv-state and sampler slot of each row.
    pub slots: Vec<u32>,
    /// `[S]` whether the slot's conv states count as zero before the row.
    pub reset_conv: Vec<bool>,
    /// `[S]` whether the row's single input token is the one last sampled in its slot.
    pub feedback: Vec<bool>,
    /// `[N]` tokens (indices in `0..T`) whose logits are needed, ascending.
    pub logit_tokens: Vec<u32>,
}

/// The slot of a padding row: it reads and writes no state.
pub const PADDING_SLOT: u32 = u32::MAX;

impl BatchLayout {
    /// Whether every row is one token, whose logits are wanted: a decode step.
    pub fn is_decode(&self) -> bool {
        self.num_tokens() == self.num_rows() && self.logit_tokens.len() == self.num_rows()
    }

    /// Appends rows of one token that belong to nobody, up to `rows` in all, to a decode step.
    pub fn pad_rows(&mut self, rows: usize) {
        for row in self.num_rows()..rows {
            self.token_ids.push(0);
            self.positions.push(0);
            self.slot_mapping.push(-1);
            self.row_starts.push(row as u32 + 1);
            self.context_lens.push(1);
            self.block_tables.extend(std::iter::repeat_n(0, self.max_blocks));
            self.slots.push(PADDING_SLOT);
            self.reset_conv.push(true);
            self.feedback.push(false);
            self.logit_tokens.push(row as u32);
        }
    }

    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    pub fn num_rows(&self) -> usize {
        self.slots.len()
    }
}

/// Parameters of a short convolution and of the projection before it.
pub struct ConvWeights<'a, W> {
    /// `[3H, H]`: B, then C, then x.
    pub in_proj: &'a W,
    /// `[3H]`
    pub in_bias: Option<&'a W>,
    /// `[H, L]`; the last tap multiplies the current token.
    pub taps: &'a W,
    /// `[H]`
    pub taps_bias: Option<&'a W>,
}

/// One row of logits to sample from.
#[derive(Clone, Debug)]
pub struct SampleRequest {
    /// Row of the logits.
    pub logit_row: usize,
    pub slot: SlotId,
    /// Tokens the sequence has generated before this one.
    pub output_index: u32,
    pub mask: Option<TokenMask>,
}

/// One row of logits whose log-probabilities of a known next token are wanted (prompt logprobs).
#[derive(Clone, Copy, Debug)]
pub struct ScoreRequest {
    pub logit_row: usize,
    pub slot: SlotId,
    pub next_token: TokenId,
}

/// Splits of contexts whose partial results of decode attention the CUDA backend has room for, at most.
pub const MAX_SPLITS: usize = 64 << 10;
/// Of one split and query head: 64 sums, their maximum and their weight, in f32.
pub const SPLIT_BYTES: usize = 66 * 4;
/// Partial sums of the CUDA backend's products whose inner dimension is split over blocks.
pub const SPLIT_PARTIAL_BYTES: usize = 64 << 20;

/// What the CUDA backend allocates beside the tensors that it is asked for, at most.
pub fn cuda_bytes(num_q_heads: usize) -> usize {
    MAX_SPLITS * num_q_heads * SPLIT_BYTES + SPLIT_PARTIAL_BYTES
}

/// The op table. `T` below is the number of tokens in the batch; tensors may have room for more rows, which are ignored.
pub trait Backend: Send + 'static {
    /// An activation matrix with a fixed capacity of rows.
    type Tensor: Send;
    /// An immutable parameter, in its storage type and the backend's layout.
    type Weight: Send + Sync;
    /// K and V blocks of one attention layer.
    type KvCache: Send;
    /// Conv states of one short-conv layer: `[slots, L - 1, H]`.
    type ConvState: Send;
    /// A step's metadata on the device, allocated once for the largest step.
    type Batch: Send;
    /// Chosen experts and weights of one layer and step, and the experts' scratch space.
    type Routing: Send;
    /// Sampling state of every slot: parameters, token counts, the last sampled token.
    type Sampler: Send;

    /// For the start log: device, threads or SMs, instruction sets, kernels chosen.
    fn describe(&self) -> String;
    /// Bytes the device can give to weights, cache and workspace together.
    fn memory_bytes(&self) -> Result<usize>;
    /// Bytes per second of one pass over a buffer larger than every cache, measured now: the yardstick of benchmarks.
    fn read_bandwidth(&mut self) -> Result<f64>;
    /// See [`Executor::device_times`](crate::step::Executor::device_times), of recorded steps.
    fn device_times(&mut self) -> Result<Option<DeviceTimes>> {
        Ok(None)
    }
    /// Type of activations between operations.
    fn activation_dtype(&self) -> DType;

    // ---- memory, only before the first step

    /// `[rows, cols]`, zeroed.
    fn tensor(&mut self, rows: usize, cols: usize, dtype: DType) -> Result<Self::Tensor>;
    /// Takes a parameter as it stands in the checkpoint, kept in its own dtype unless `dtype` asks for another.
    fn weight(&mut self, host: HostTensor<'_>, dtype: DType) -> Result<Self::Weight>;
    /// Stacks matrices of one input width over their output rows, `[q; k; v]` or `[w1; w3]`.
    fn weight_rows(&mut self, parts: &[HostTensor<'_>], dtype: DType) -> Result<Self::Weight>;
    /// Experts as one parameter: `w13` `[E, 2F, H]` (w1 rows first, then w3) or `w2` `[E, H, F]`; `parts[e]` lists the
    /// matrices of expert e to stack over rows.
    fn weight_experts(&mut self, parts: &[Vec<HostTensor<'_>>], dtype: DType) -> Result<Self::Weight>;
    fn kv_cache(
        &mut self,
        num_blocks: usize,
        block_size: usize,
        shape: &AttentionShape,
        dtype: DType,
    ) -> Result<Self::KvCache>;
    fn conv_state(&mut self, slots: usize, taps: usize, hidden: usize) -> Result<Self::ConvState>;
    fn batch(&mut self, max_tokens: usize, max_rows: usize, max_blocks_per_row: usize) -> Result<Self::Batch>;
    fn routing(&mut self, max_tokens: usize, shape: &RouteShape, hidden: usize, ffn: usize) -> Result<Self::Routing>;

    /// `max_rows`: rows one step may sample.
    fn sampler(&mut self, slots: usize, vocab: usize, max_rows: usize) -> Result<Self::Sampler>;

    // ---- host and device

    /// Uploads a step's arrays.
    fn set_batch(&mut self, batch: &mut Self::Batch, layout: &BatchLayout) -> Result<()>;
    /// Puts the token last sampled in each `feedback` row's slot into the batch's input ids.
    fn feed_back(&mut self, batch: &mut Self::Batch, sampler: &Self::Sampler) -> Result<()>;
    /// Copies the first `rows` rows to the host as f32. Waits for the device. For tests and the host sampler.
    fn read(&mut self, x: &Self::Tensor, rows: usize, out: &mut Vec<f32>) -> Result<()>;
    /// Copies host values into the first rows. For tests.
    fn write(&mut self, x: &mut Self::Tensor, values: &[f32]) -> Result<()>;

    // ---- recording

    /// Numbers of rows at which decode steps are recorded, ascending; the runner pads a step to the next. None: never.
    fn graph_rows(&self) -> &[usize] {
        &[]
    }

    /// Runs `body`: operations whose launches depend only on the sizes of `batch` and on `variant`. A backend may record
    /// them once per size and replay the record, without `body`, when the sizes come again.
    fn record(
        &mut self,
        batch: &mut Self::Batch,
        variant: usize,
        body: impl FnOnce(&mut Self, &mut Self::Batch) -> Result<()>,
    ) -> Result<()> {
        let _ = variant;
        body(self, batch)
    }

    // ---- operations

    /// `out[t] = table[token t]`, `[V, H]` → `[T, H]`.
    fn embed(&mut self, table: &Self::Weight, batch: &Self::Batch, out: &mut Self::Tensor) -> Result<()>;
    /// `out = x · rsqrt(mean(x²) + eps) · weight` over each row of `[rows, H]`; statistics in f32.
    fn rms_norm(
        &mut self,
        x: &Self::Tensor,
        rows: usize,
        weight: &Self::Weight,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// `residual += delta; out = rms_norm(residual)`.
    fn add_rms_norm(
        &mut self,
        residual: &mut Self::Tensor,
        delta: &Self::Tensor,
        rows: usize,
        weight: &Self::Weight,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// `out = x · wᵀ (+ bias)`, `[rows, in]` × `[out, in]`; f32 accumulation.
    fn linear(
        &mut self,
        x: &Self::Tensor,
        rows: usize,
        w: &Self::Weight,
        bias: Option<&Self::Weight>,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// `residual + delta` gains `x · wᵀ (+ bias)`: it is `delta`, for the [`add_rms_norm`](Backend::add_rms_norm) of the same pair
    /// that must follow. A backend may add it to `residual` at once and remember in `delta` that it did.
    fn linear_residual(
        &mut self,
        x: &Self::Tensor,
        rows: usize,
        w: &Self::Weight,
        bias: Option<&Self::Weight>,
        residual: &mut Self::Tensor,
        delta: &mut Self::Tensor,
    ) -> Result<()> {
        let _ = residual;
        self.linear(x, rows, w, bias, delta)
    }
    /// `out = swiglu(x · w13ᵀ)`, `w13` `[2F, H]`; `gate_up` `[rows, 2F]` is scratch.
    fn linear_swiglu(
        &mut self,
        x: &Self::Tensor,
        rows: usize,
        w13: &Self::Weight,
        gate_up: &mut Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        self.linear(x, rows, w13, None, gate_up)?;
        self.swiglu(gate_up, rows, out)
    }
    /// `out = short_conv(x · in_projᵀ (+ in_bias))` over the batch's `rows` tokens; `bcx` `[T, 3H]` is scratch.
    #[expect(clippy::too_many_arguments, reason = "the operands of the table")]
    fn linear_short_conv(
        &mut self,
        x: &Self::Tensor,
        rows: usize,
        weights: ConvWeights<'_, Self::Weight>,
        batch: &Self::Batch,
        state: &mut Self::ConvState,
        bcx: &mut Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        self.linear(x, rows, weights.in_proj, weights.in_bias, bcx)?;
        self.short_conv(bcx, weights.taps, weights.taps_bias, batch, state, out)
    }
    /// On `qkv` `[T, (Nq + 2 Nk) D]`, in place: RMS norm of each q and k head, rotate-half RoPE at the token's position;
    /// then K and V go to the cache where `slot_mapping` says.
    fn qk_norm_rope_kv(
        &mut self,
        qkv: &mut Self::Tensor,
        q_norm: &Self::Weight,
        k_norm: &Self::Weight,
        shape: &AttentionShape,
        batch: &Self::Batch,
        kv: &mut Self::KvCache,
    ) -> Result<()>;
    /// Causal grouped-query attention of the q part of `qkv` over the cached context of its row → `[T, Nq D]`.
    fn attention(
        &mut self,
        qkv: &Self::Tensor,
        shape: &AttentionShape,
        batch: &Self::Batch,
        kv: &Self::KvCache,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// [`qk_norm_rope_kv`](Backend::qk_norm_rope_kv), then [`attention`](Backend::attention); `qkv` holds neither's result for sure.
    #[expect(clippy::too_many_arguments, reason = "the operands of the table")]
    fn qk_norm_rope_attention(
        &mut self,
        qkv: &mut Self::Tensor,
        q_norm: &Self::Weight,
        k_norm: &Self::Weight,
        shape: &AttentionShape,
        batch: &Self::Batch,
        kv: &mut Self::KvCache,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        self.qk_norm_rope_kv(qkv, q_norm, k_norm, shape, batch, kv)?;
        self.attention(qkv, shape, batch, kv, out)
    }
    /// `[B | C | x] = bcx` `[T, 3H]`; `z = B ⊙ x`; `y_t = Σ_k taps[c, k] · z_{t-L+1+k}` (+ bias), z before the row from the
    /// slot's state; `out = C ⊙ y` `[T, H]`; the state keeps the last L − 1 columns of z. `taps` is `[H, L]`.
    fn short_conv(
        &mut self,
        bcx: &Self::Tensor,
        taps: &Self::Weight,
        bias: Option<&Self::Weight>,
        batch: &Self::Batch,
        state: &mut Self::ConvState,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// `out = silu(gate) ⊙ up` of `[rows, 2F]` = `[gate | up]` → `[rows, F]`.
    fn swiglu(&mut self, gate_up: &Self::Tensor, rows: usize, out: &mut Self::Tensor) -> Result<()>;
    /// A hint: what follows the next operation reads this weight from its beginning. It may be ignored.
    fn prefetch(&mut self, _weight: &Self::Weight) {}
    /// Router: scores = sigmoid(x · gateᵀ) in f32; equal scores go to the lower expert.
    fn moe_route(
        &mut self,
        x: &Self::Tensor,
        rows: usize,
        gate: &Self::Weight,
        bias: Option<&Self::Weight>,
        shape: &RouteShape,
        routing: &mut Self::Routing,
    ) -> Result<()>;
    /// `out = Σ_e weight_e · w2_e(silu(w1_e x) ⊙ (w3_e x))` over each token's experts, summed in f32.
    fn moe_experts(
        &mut self,
        x: &Self::Tensor,
        rows: usize,
        w13: &Self::Weight,
        w2: &Self::Weight,
        routing: &mut Self::Routing,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// [`moe_experts`](Backend::moe_experts), added like [`linear_residual`](Backend::linear_residual).
    #[expect(clippy::too_many_arguments, reason = "the operands of the table")]
    fn moe_experts_residual(
        &mut self,
        x: &Self::Tensor,
        rows: usize,
        w13: &Self::Weight,
        w2: &Self::Weight,
        routing: &mut Self::Routing,
        residual: &mut Self::Tensor,
        delta: &mut Self::Tensor,
    ) -> Result<()> {
        let _ = residual;
        self.moe_experts(x, rows, w13, w2, routing, delta)
    }
    /// `out[n] = x[batch.logit_tokens[n]]` → `[N, H]`.
    fn gather_logit_rows(&mut self, x: &Self::Tensor, batch: &Self::Batch, out: &mut Self::Tensor) -> Result<()>;

    // ---- sampling; logits are `[N, V]` f32, columns past the tokenizer's last id included

    /// Resets a slot's sampling state.
    fn start_slot(&mut self, sampler: &mut Self::Sampler, started: &StartedSlot) -> Result<()>;
    /// Chooses a token for each request, in `step::SamplingParams`' order of application, and counts it as output of its
    /// slot. Returns before the device is done.
    fn sample(&mut self, logits: &Self::Tensor, requests: &[SampleRequest], sampler: &mut Self::Sampler) -> Result<()>;
    /// Waits for the oldest unread [`sample`](Backend::sample): one token per request, in order.
    fn sampled(&mut self, sampler: &mut Self::Sampler, out: &mut Vec<SampledToken>) -> Result<()>;
    /// Prompt logprobs, waiting for the device.
    fn score(
        &mut self,
        logits: &Self::Tensor,
        requests: &[ScoreRequest],
        sampler: &mut Self::Sampler,
        out: &mut Vec<TokenLogprobs>,
    ) -> Result<()>;
}
