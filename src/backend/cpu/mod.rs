//! The CPU backend: our kernels over panels of weights, activations in f32.
//!
//! Weights stay in their own type in memory. In bf16 a matrix product rounds its activations to bf16 where the CPU has a
//! dot product for it; everything else is f32 between operations. KV is stored in the cache's type, conv states in the
//! activation type. No result depends on the batch around a row or on where a prefill was cut.

mod attention;
mod bandwidth;
mod buffer;
mod conv;
mod kernels;
mod linear;
mod moe;
mod norm;
mod pool;
mod sampler;
pub mod sampling;
mod simd;
mod weight;

use self::attention::{AttentionScratch, QkNorm, RopeTable};
use self::buffer::Buffer;
use self::linear::OperandScratch;
use self::pool::Pool;
use super::{
    AttentionShape, Backend, BackendError, BatchLayout, DType, HostTensor, PADDING_SLOT, Result, RouteShape,
    SampleRequest, ScoreRequest,
};
use crate::step::{SampledToken, StartedSlot, TokenLogprobs};

pub use self::attention::CpuKvCache;
pub use self::conv::CpuConvState;
pub use self::moe::CpuRouting;
pub use self::sampler::CpuSampler;
pub use self::simd::Isa;
pub use self::weight::CpuWeight;

/// The CPU and its threads.
pub struct CpuBackend {
    pool: Pool,
    isa: Isa,
    activation_dtype: DType,
    operands: [OperandScratch; 2],
    attention: Vec<AttentionScratch>,
    rope: RopeTable,
    /// Batches set so far: names a step for `rope`.
    steps: u64,
}

/// An activation matrix, f32 whatever type was asked for.
pub struct CpuTensor {
    rows: usize,
    cols: usize,
    data: Buffer<f32>,
}

/// A step's arrays.
pub struct CpuBatch {
    layout: BatchLayout,
    step: u64,
    /// Scratch of `set_batch`.
    sorted_slots: Vec<u32>,
    max_tokens: usize,
    max_rows: usize,
    max_blocks_per_row: usize,
}

fn fail(op: &'static str, message: String) -> BackendError {
    BackendError {
        op,
        message,
        fatal: false,
    }
}

/// Checks that a tensor has `cols` columns and room for `rows` rows.
fn check(op: &'static str, name: &str, x: &CpuTensor, rows: usize, cols: usize) -> Result<()> {
    if x.cols != cols {
        return Err(fail(op, format!("{name} has {} columns where {cols} belong", x.cols)));
    }
    if x.rows < rows {
        return Err(fail(
            op,
            format!("{name} has room for {} rows, {rows} are needed", x.rows),
        ));
    }
    Ok(())
}

impl CpuBackend {
    /// `threads`: 0 = every core this process may use.
    pub fn new(threads: usize, activation_dtype: DType) -> Self {
        Self::with_isa(threads, activation_dtype, Isa::detect())
    }

    /// Uses no instructions beyond `isa`, nor beyond the machine's.
    pub fn with_isa(threads: usize, activation_dtype: DType, isa: Isa) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let pool = Pool::new(if threads == 0 { cores } else { threads });
        let attention = (0..pool.threads()).map(|_| AttentionScratch::default()).collect();
        Self {
            pool,
            isa: isa.min(Isa::detect()),
            activation_dtype,
            operands: Default::default(),
            attention,
            rope: RopeTable::default(),
            steps: 0,
        }
    }

    /// Checks the attention operations' common operands and returns the width of `qkv`.
    fn check_attention(
        op: &'static str,
        qkv: &CpuTensor,
        shape: &AttentionShape,
        batch: &CpuBatch,
        kv: &CpuKvCache,
    ) -> Result<()> {
        let AttentionShape {
            num_q_heads,
            num_kv_heads,
            head_dim,
            ..
        } = *shape;
        if num_kv_heads == 0 || num_q_heads % num_kv_heads != 0 || head_dim == 0 || head_dim % 2 != 0 {
            return Err(fail(
                op,
                format!("{num_q_heads} heads on {num_kv_heads} of {head_dim} dimensions"),
            ));
        }
        if (kv.heads, kv.head_dim) != (num_kv_heads, head_dim) {
            return Err(fail(op, format!("the cache has {} heads of {}", kv.heads, kv.head_dim)));
        }
        check(
            op,
            "qkv",
            qkv,
            batch.layout.num_tokens(),
            (num_q_heads + 2 * num_kv_heads) * head_dim,
        )
    }
}

impl Backend for CpuBackend {
    type Tensor = CpuTensor;
    type Weight = CpuWeight;
    type KvCache = CpuKvCache;
    type ConvState = CpuConvState;
    type Batch = CpuBatch;
    type Routing = CpuRouting;
    type Sampler = CpuSampler;

    fn describe(&self) -> String {
        format!(
            "CPU, {} threads, {}; activations float32 (for {}), {}",
            self.pool.threads(),
            self.isa.name(),
            self.activation_dtype,
            linear::describe(self.isa)
        )
    }

    fn memory_bytes(&self) -> Result<usize> {
        available_memory_bytes().ok_or_else(|| fail("memory_bytes", "the system does not tell its free memory".into()))
    }

    fn read_bandwidth(&mut self) -> Result<f64> {
        Ok(bandwidth::read_bandwidth(&mut self.pool))
    }

    fn activation_dtype(&self) -> DType {
        self.activation_dtype
    }

    fn tensor(&mut self, rows: usize, cols: usize, _dtype: DType) -> Result<CpuTensor> {
        let len = rows
            .checked_mul(cols)
            .ok_or_else(|| fail("tensor", format!("{rows} × {cols} is too large")))?;
        Ok(CpuTensor {
            rows,
            cols,
            data: Buffer::zeroed(len)?,
        })
    }

    fn weight(&mut self, host: HostTensor<'_>, dtype: DType) -> Result<CpuWeight> {
        CpuWeight::single(&mut self.pool, host, dtype)
    }

    fn weight_rows(&mut self, parts: &[HostTensor<'_>], dtype: DType) -> Result<CpuWeight> {
        CpuWeight::stacked(&mut self.pool, "weight_rows", &[parts.to_vec()], dtype)
    }

    fn weight_experts(&mut self, parts: &[Vec<HostTensor<'_>>], dtype: DType) -> Result<CpuWeight> {
        CpuWeight::stacked(&mut self.pool, "weight_experts", parts, dtype)
    }

    fn kv_cache(
        &mut self,
        num_blocks: usize,
        block_size: usize,
        shape: &AttentionShape,
        dtype: DType,
    ) -> Result<CpuKvCache> {
        if block_size == 0 {
            return Err(fail("kv_cache", "blocks of 0 tokens".into()));
        }
        CpuKvCache::new(num_blocks, block_size, shape, dtype)
    }

    fn conv_state(&mut self, slots: usize, taps: usize, hidden: usize) -> Result<CpuConvState> {
        if taps == 0 || taps > conv::MAX_TAPS {
            return Err(fail(
                "conv_state",
                format!("{taps} conv taps; 1 to {} are supported", conv::MAX_TAPS),
            ));
        }
        let history = taps - 1;
        Ok(CpuConvState {
            slots,
            history,
            hidden,
            data: Buffer::zeroed(slots * history * hidden)?,
        })
    }

    fn batch(&mut self, max_tokens: usize, max_rows: usize, max_blocks_per_row: usize) -> Result<CpuBatch> {
        Ok(CpuBatch {
            layout: BatchLayout::default(),
            step: 0,
            sorted_slots: Vec::new(),
            max_tokens,
            max_rows,
            max_blocks_per_row,
        })
    }

    fn routing(&mut self, max_tokens: usize, shape: &RouteShape, hidden: usize, ffn: usize) -> Result<CpuRouting> {
        CpuRouting::new(max_tokens, shape, hidden, ffn)
    }

    fn sampler(&mut self, slots: usize, vocab: usize, max_rows: usize) -> Result<CpuSampler> {
        Ok(CpuSampler::new(self.isa, slots, vocab, max_rows, self.pool.threads()))
    }

    fn set_batch(&mut self, batch: &mut CpuBatch, layout: &BatchLayout) -> Result<()> {
        const OP: &str = "set_batch";
        let (tokens, rows) = (layout.num_tokens(), layout.num_rows());
        if tokens > batch.max_tokens || rows > batch.max_rows || layout.max_blocks > batch.max_blocks_per_row {
            let CpuBatch {
                max_tokens,
                max_rows,
                max_blocks_per_row,
                ..
            } = batch;
            return Err(fail(
                OP,
                format!(
                    "{tokens} tokens, {rows} rows of {} blocks; room for {max_tokens}, {max_rows}, {max_blocks_per_row}",
                    layout.max_blocks
                ),
            ));
        }
        let lengths = [
            ("positions", layout.positions.len(), tokens),
            ("slot_mapping", layout.slot_mapping.len(), tokens),
            ("row_starts", layout.row_starts.len(), rows + 1),
            ("context_lens", layout.context_lens.len(), rows),
            ("block_tables", layout.block_tables.len(), rows * layout.max_blocks),
            ("reset_conv", layout.reset_conv.len(), rows),
            ("feedback", layout.feedback.len(), rows),
        ];
        if let Some((name, got, want)) = lengths.into_iter().find(|(_, got, want)| got != want) {
            return Err(fail(OP, format!("{name} has {got} entries where {want} belong")));
        }
        let starts = &layout.row_starts;
        if starts[0] != 0 || starts[rows] as usize != tokens || !starts.is_sorted_by(|a, b| a < b) {
            return Err(fail(
                OP,
                format!("row_starts {starts:?} do not cut {tokens} tokens into rows"),
            ));
        }
        batch.sorted_slots.clone_from(&layout.slots);
        batch.sorted_slots.sort_unstable();
        if batch.sorted_slots.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(fail(OP, format!("a slot has two rows: {:?}", layout.slots)));
        }
        if let Some(row) = (0..rows).find(|&row| layout.feedback[row] && starts[row + 1] - starts[row] != 1) {
            return Err(fail(OP, format!("feedback row {row} has more than one token")));
        }
        if let Some(t) = layout.logit_tokens.iter().find(|&&t| t as usize >= tokens) {
            return Err(fail(OP, format!("logit token {t} of {tokens}")));
        }
        batch.layout.clone_from(layout);
        self.steps += 1;
        batch.step = self.steps;
        Ok(())
    }

    fn feed_back(&mut self, batch: &mut CpuBatch, sampler: &CpuSampler) -> Result<()> {
        let layout = &mut batch.layout;
        for row in 0..layout.slots.len() {
            if layout.feedback[row] {
                layout.token_ids[layout.row_starts[row] as usize] = sampler.last_sampled(layout.slots[row])?;
            }
        }
        Ok(())
    }

    fn read(&mut self, x: &CpuTensor, rows: usize, out: &mut Vec<f32>) -> Result<()> {
        check("read", "x", x, rows, x.cols)?;
        out.clear();
        out.extend_from_slice(&x.data[..rows * x.cols]);
        Ok(())
    }

    fn write(&mut self, x: &mut CpuTensor, values: &[f32]) -> Result<()> {
        let room = x.data.len();
        let Some(to) = x.data.get_mut(..values.len()) else {
            return Err(fail("write", format!("{} values for a tensor of {room}", values.len())));
        };
        to.copy_from_slice(values);
        Ok(())
    }

    fn embed(&mut self, table: &CpuWeight, batch: &CpuBatch, out: &mut CpuTensor) -> Result<()> {
        check("embed", "out", out, batch.layout.num_tokens(), table.cols())?;
        linear::embed(&mut self.pool, table, &batch.layout.token_ids, &mut out.data)
    }

    fn rms_norm(
        &mut self,
        x: &CpuTensor,
        rows: usize,
        weight: &CpuWeight,
        eps: f32,
        out: &mut CpuTensor,
    ) -> Result<()> {
        const OP: &str = "rms_norm";
        let weight = weight.vector(OP, x.cols)?;
        check(OP, "x", x, rows, x.cols)?;
        check(OP, "out", out, rows, x.cols)?;
        norm::rms_norm(&mut self.pool, self.isa, &x.data, rows, weight, eps, &mut out.data);
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut CpuTensor,
        delta: &CpuTensor,
        rows: usize,
        weight: &CpuWeight,
        eps: f32,
        out: &mut CpuTensor,
    ) -> Result<()> {
        const OP: &str = "add_rms_norm";
        let weight = weight.vector(OP, residual.cols)?;
        check(OP, "residual", residual, rows, residual.cols)?;
        check(OP, "delta", delta, rows, residual.cols)?;
        check(OP, "out", out, rows, residual.cols)?;
        norm::add_rms_norm(
            &mut self.pool,
            self.isa,
            &mut residual.data,
            &delta.data,
            rows,
            weight,
            eps,
            &mut out.data,
        );
        Ok(())
    }

    fn linear(
        &mut self,
        x: &CpuTensor,
        rows: usize,
        w: &CpuWeight,
        bias: Option<&CpuWeight>,
        out: &mut CpuTensor,
    ) -> Result<()> {
        check("linear", "x", x, rows, w.cols())?;
        check("linear", "out", out, rows, w.rows())?;
        linear::linear(
            &mut self.pool,
            self.isa,
            &mut self.operands[0],
            &x.data,
            rows,
            w,
            bias,
            &mut out.data,
        )
    }

    fn qk_norm_rope_kv(
        &mut self,
        qkv: &mut CpuTensor,
        q_norm: &CpuWeight,
        k_norm: &CpuWeight,
        shape: &AttentionShape,
        batch: &CpuBatch,
        kv: &mut CpuKvCache,
    ) -> Result<()> {
        const OP: &str = "qk_norm_rope_kv";
        Self::check_attention(OP, qkv, shape, batch, kv)?;
        let (q_norm, k_norm) = (q_norm.vector(OP, shape.head_dim)?, k_norm.vector(OP, shape.head_dim)?);
        self.rope.update(batch.step, shape, &batch.layout.positions);
        let norm = QkNorm {
            q_norm,
            k_norm,
            shape,
            batch: &batch.layout,
            rope: &self.rope,
        };
        attention::qk_norm_rope_kv(&mut self.pool, self.isa, &mut qkv.data, &norm, kv)
    }

    fn attention(
        &mut self,
        qkv: &CpuTensor,
        shape: &AttentionShape,
        batch: &CpuBatch,
        kv: &CpuKvCache,
        out: &mut CpuTensor,
    ) -> Result<()> {
        const OP: &str = "attention";
        Self::check_attention(OP, qkv, shape, batch, kv)?;
        check(
            OP,
            "out",
            out,
            batch.layout.num_tokens(),
            shape.num_q_heads * shape.head_dim,
        )?;
        let (pool, scratch) = (&mut self.pool, &mut self.attention);
        attention::attention(
            pool,
            self.isa,
            scratch,
            &qkv.data,
            shape,
            &batch.layout,
            kv,
            &mut out.data,
        )
    }

    fn short_conv(
        &mut self,
        bcx: &CpuTensor,
        taps: &CpuWeight,
        bias: Option<&CpuWeight>,
        batch: &CpuBatch,
        state: &mut CpuConvState,
        out: &mut CpuTensor,
    ) -> Result<()> {
        const OP: &str = "short_conv";
        let (tokens, hidden) = (batch.layout.num_tokens(), state.hidden);
        check(OP, "bcx", bcx, tokens, 3 * hidden)?;
        check(OP, "out", out, tokens, hidden)?;
        taps.matrix(OP)?;
        if (taps.rows(), taps.cols()) != (hidden, state.history + 1) {
            let (n, l) = (taps.rows(), taps.cols());
            return Err(fail(
                OP,
                format!("taps are [{n}, {l}], not [{hidden}, {}]", state.history + 1),
            ));
        }
        let bias = bias.map(|bias| bias.vector(OP, hidden)).transpose()?;
        let mut slots = batch.layout.slots.iter();
        if let Some(slot) = slots.find(|&&slot| slot != PADDING_SLOT && slot as usize >= state.slots) {
            return Err(fail(OP, format!("slot {slot} of {}", state.slots)));
        }
        let dtype = self.activation_dtype;
        let taps = taps.transposed();
        conv::short_conv(
            &mut self.pool,
            self.isa,
            &bcx.data,
            taps,
            bias,
            &batch.layout,
            state,
            dtype,
            &mut out.data,
        );
        Ok(())
    }

    fn swiglu(&mut self, gate_up: &CpuTensor, rows: usize, out: &mut CpuTensor) -> Result<()> {
        check("swiglu", "gate_up", gate_up, rows, 2 * out.cols)?;
        check("swiglu", "out", out, rows, out.cols)?;
        norm::swiglu(&mut self.pool, self.isa, &gate_up.data, rows, out.cols, &mut out.data);
        Ok(())
    }

    fn moe_route(
        &mut self,
        x: &CpuTensor,
        rows: usize,
        gate: &CpuWeight,
        bias: Option<&CpuWeight>,
        shape: &RouteShape,
        routing: &mut CpuRouting,
    ) -> Result<()> {
        const OP: &str = "moe_route";
        check(OP, "x", x, rows, gate.cols())?;
        if rows > routing.max_tokens || *shape != routing.shape || gate.rows() != shape.num_experts {
            let (e, have) = (gate.rows(), routing.max_tokens);
            return Err(fail(
                OP,
                format!(
                    "{rows} rows on {e} experts; made for {have} rows of {:?}",
                    routing.shape
                ),
            ));
        }
        let bias = bias.map(|bias| bias.vector(OP, shape.num_experts)).transpose()?;
        moe::route(
            &mut self.pool,
            self.isa,
            &mut self.operands[0],
            &x.data,
            rows,
            gate,
            bias,
            routing,
        )
    }

    fn moe_experts(
        &mut self,
        x: &CpuTensor,
        rows: usize,
        w13: &CpuWeight,
        w2: &CpuWeight,
        routing: &mut CpuRouting,
        out: &mut CpuTensor,
    ) -> Result<()> {
        const OP: &str = "moe_experts";
        let (e, h, f) = (routing.shape.num_experts, routing.hidden, routing.ffn);
        check(OP, "x", x, rows, h)?;
        check(OP, "out", out, rows, h)?;
        let dims = |w: &CpuWeight| (w.experts(), w.rows(), w.cols());
        if dims(w13) != (e, 2 * f, h) || dims(w2) != (e, h, f) || rows != routing.rows() {
            let message = format!(
                "w13 {:?}, w2 {:?}, {rows} rows; routing is for {e} experts of {h} × {f}, {} rows",
                dims(w13),
                dims(w2),
                routing.rows()
            );
            return Err(fail(OP, message));
        }
        moe::experts(
            &mut self.pool,
            self.isa,
            &mut self.operands,
            &x.data,
            w13,
            w2,
            routing,
            &mut out.data,
        )
    }

    fn gather_logit_rows(&mut self, x: &CpuTensor, batch: &CpuBatch, out: &mut CpuTensor) -> Result<()> {
        const OP: &str = "gather_logit_rows";
        check(OP, "x", x, batch.layout.num_tokens(), x.cols)?;
        check(OP, "out", out, batch.layout.logit_tokens.len(), x.cols)?;
        let from = batch
            .layout
            .logit_tokens
            .iter()
            .map(|&t| &x.data[t as usize * x.cols..][..x.cols]);
        for (to, from) in out.data.chunks_exact_mut(x.cols).zip(from) {
            to.copy_from_slice(from);
        }
        Ok(())
    }

    fn start_slot(&mut self, sampler: &mut CpuSampler, started: &StartedSlot) -> Result<()> {
        sampler.start(started)
    }

    fn sample(&mut self, logits: &CpuTensor, requests: &[SampleRequest], sampler: &mut CpuSampler) -> Result<()> {
        for request in requests {
            check("sample", "logits", logits, request.logit_row + 1, sampler.vocab())?;
        }
        sampler.sample(&mut self.pool, &logits.data, requests)
    }

    fn sampled(&mut self, sampler: &mut CpuSampler, out: &mut Vec<SampledToken>) -> Result<()> {
        sampler.take_sampled(out)
    }

    fn score(
        &mut self,
        logits: &CpuTensor,
        requests: &[ScoreRequest],
        sampler: &mut CpuSampler,
        out: &mut Vec<TokenLogprobs>,
    ) -> Result<()> {
        for request in requests {
            check("score", "logits", logits, request.logit_row + 1, sampler.vocab())?;
        }
        sampler.score(&mut self.pool, &logits.data, requests, out)
    }
}

/// Memory this process may still take: the system's, and less where a control group says so.
fn available_memory_bytes() -> Option<usize> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let system = line
        .trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<usize>()
        .ok()?
        .checked_mul(1024)?;
    let read = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<usize>().ok();
    let group = match (read("/sys/fs/cgroup/memory.max"), read("/sys/fs/cgroup/memory.current")) {
        (Some(max), Some(current)) => max.saturating_sub(current),
        _ => usize::MAX,
    };
    Some(system.min(group))
}
