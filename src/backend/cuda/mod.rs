//! The op table on an NVIDIA GPU: our kernels, compiled ahead of time, on one stream.
//!
//! Every launcher checks what its kernel's header demands. Nothing here falls back: a shape that no kernel takes is an error at
//! start or in the step, never a slow path. Activations and weights share one 2-byte type; logits are f32.

mod attention;
mod batch;
pub mod driver;
mod linear;
mod moe;
mod sampler;
mod weight;

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use driver::{Address, Arg, Device, Event, Function, Graph, Memory};
use weight::{convert, decode_f32};

use crate::backend::{
    AttentionShape, Backend, BackendError, BatchLayout, ConvWeights, DType, HostTensor, Result, RouteShape,
    SPLIT_PARTIAL_BYTES, SampleRequest, ScoreRequest,
};
use crate::step::{DeviceTimes, SampledToken, StartedSlot, TokenLogprobs};

pub use attention::CudaKvCache;
pub use batch::CudaBatch;
pub use moe::CudaRouting;
pub use sampler::CudaSampler;
pub use weight::CudaWeight;

/// Tokens of a row that one block of attention and short convolution takes.
pub(super) const PIECE_TOKENS: usize = 32;
/// Context tokens per split of a decode row's attention; a property of the row alone, so that no sum depends on neighbours.
pub(super) const SPLIT_TOKENS: usize = 512;

fn bug(op: &'static str, message: String) -> BackendError {
    BackendError {
        op,
        message,
        fatal: false,
    }
}

fn need(op: &'static str, holds: bool, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(bug(op, what())) }
}

/// An activation matrix `[rows, cols]`.
pub struct CudaTensor {
    memory: Memory,
    rows: usize,
    cols: usize,
    dtype: DType,
    value: Cell<Value>,
}

/// What a tensor stands for.
#[derive(Clone, Copy)]
enum Value {
    /// What its memory holds.
    Stored,
    /// The sum of `count` `[rows, cols]` parts interleaved by row at `from`, in order: left by `moe_experts`, read by `add_rms_norm`,
    /// which adds them as it goes.
    Parts { from: Address, count: usize },
    /// Nothing more: a `delta` that was added to the residual where it was made.
    Added,
    /// The norm of the rows at `x`, which kernels with few tokens compute for themselves; others let a kernel store it first.
    /// Rows at `x` stay as they are until its readers have run, as the table's order of operations has it.
    Normed(Norm),
}

/// An RMS norm that is still to be computed.
#[derive(Clone, Copy)]
struct Norm {
    x: Address,
    weight: Address,
    eps: f32,
}

impl CudaTensor {
    fn address(&self) -> Address {
        self.memory.address
    }

    fn store(&self) {
        self.value.set(Value::Stored);
    }
}

pub struct CudaConvState {
    memory: Memory,
    taps: usize,
    hidden: usize,
}

pub struct CudaBackend {
    device: Arc<Device>,
    dtype: DType,
    /// The kernels' name for the element type.
    suffix: &'static str,
    /// Whether the binary holds wgmma kernels for this device (sm_90a).
    has_wgmma: bool,
    /// f32 partial sums of matrix products whose K is split over blocks, and a zeroed arrival counter per tile.
    split_partial: Memory,
    split_arrived: Memory,
    /// `[rows, Nq, splits of a row, 66]` f32 partial results of decode attention, and a zeroed arrival counter per row and KV head.
    attention_partial: Option<Memory>,
    attention_arrived: Memory,
    /// Recorded decode steps by what their launches depend on; none with `--enforce-eager`.
    graphs: Option<HashMap<GraphKey, Graph>>,
    /// Where a weight is that will be read soon, and its bytes; the next kernel that can bring it to L2 takes it.
    soon: Option<(Address, usize)>,
    timing: Option<Timing>,
    /// Per slot of the sampler its last token; 0 before there is one.
    last_sampled: Address,
    /// Decode rows times the most splits of one that `attention_partial` has room for.
    attention_splits: usize,
}

/// Events around recorded steps and their samplers, until they are read.
#[derive(Default)]
struct Timing {
    forwards: VecDeque<([Event; 2], usize)>,
    samples: VecDeque<[Event; 2]>,
}

impl Timing {
    /// Steps that may be under way when another is collected.
    const UNREAD: usize = 3;

    fn read(&mut self) -> Result<DeviceTimes> {
        let mut times = DeviceTimes::default();
        while self.forwards.len() > Self::UNREAD {
            if let Some(([start, end], launches)) = self.forwards.pop_front() {
                times.steps += 1;
                times.forward_s += end.seconds_since(&start)?;
                times.launches += launches as u64;
            }
        }
        while self.samples.len() > Self::UNREAD {
            if let Some([start, end]) = self.samples.pop_front() {
                times.sample_s += end.seconds_since(&start)?;
            }
        }
        Ok(times)
    }
}

/// Everything that a decode step's launches depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct GraphKey {
    rows: usize,
    max_blocks: usize,
    max_splits: usize,
    split_tokens: usize,
    variant: usize,
}

/// Dense where a padded row costs most.
const GRAPH_ROWS: &[usize] = &[
    1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320,
    384, 448, 512, 640, 768, 896, 1024,
];

const SPLIT_TILES: usize = 16 << 10;
const ATTENTION_COUNTERS: usize = 64 << 10;

impl CudaBackend {
    /// # Errors
    /// No driver, no such device, compute capability below 8.0, or an activation type that is not 2 bytes.
    pub fn new(ordinal: usize, dtype: DType, enforce_eager: bool) -> Result<CudaBackend> {
        let suffix = match dtype {
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::F32 => {
                let message = "--dtype float32 runs on --device cpu; the CUDA engine takes bfloat16 and float16".into();
                return Err(BackendError {
                    op: "cuda",
                    message,
                    fatal: true,
                });
            }
        };
        let device = Device::open(ordinal)?;
        Ok(CudaBackend {
            split_partial: Memory::new(&device, SPLIT_PARTIAL_BYTES, "workspace")?,
            split_arrived: Memory::new(&device, SPLIT_TILES * 4, "workspace")?,
            attention_arrived: Memory::new(&device, ATTENTION_COUNTERS * 4, "workspace")?,
            has_wgmma: device.has("gemm_wgmma_bf16_bf16_256"),
            device,
            dtype,
            suffix,
            attention_partial: None,
            graphs: (!enforce_eager).then(HashMap::new),
            timing: None,
            attention_splits: 0,
            soon: None,
            last_sampled: 0,
        })
    }

    /// Device seconds of one `body`, as the fastest of some replays of a graph of `repeats` of them (0, 1, …): for benchmarks.
    ///
    /// # Errors
    /// What `body` reports, or the device.
    pub fn time(&mut self, repeats: usize, mut body: impl FnMut(&mut Self, usize) -> Result<()>) -> Result<f64> {
        const REPLAYS: usize = 4;
        let device = self.device.clone();
        device.bind()?;
        let graph = device.capture(|| (0..repeats).try_for_each(|i| body(self, i)))?;
        let (start, end) = (Event::timed(&device)?, Event::timed(&device)?);
        let mut best = f64::INFINITY;
        for replay in 0..REPLAYS {
            start.record(&device)?;
            device.replay(&graph)?;
            end.record(&device)?;
            let seconds = end.seconds_since(&start)?;
            // The first warms up.
            if replay > 0 {
                best = best.min(seconds);
            }
        }
        Ok(best / repeats as f64)
    }

    /// Seconds of one `body` by the host's clock, for what no graph can hold: the fastest of `repeats`.
    ///
    /// # Errors
    /// What `body` reports, or the device.
    pub fn time_stream(&mut self, repeats: usize, mut body: impl FnMut(&mut Self, usize) -> Result<()>) -> Result<f64> {
        let mut best = f64::INFINITY;
        for i in 0..repeats {
            self.device.synchronize("time")?;
            let start = std::time::Instant::now();
            body(self, i)?;
            self.device.synchronize("time")?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(best)
    }

    fn kernel(&self, name: &str, shared_bytes: usize) -> Result<Function> {
        self.device.function(&format!("{name}_{}", self.suffix), shared_bytes)
    }

    /// Makes `rows` rows of `x` what its memory holds.
    fn whole(&self, op: &'static str, x: &CudaTensor, rows: usize) -> Result<()> {
        need(op, rows <= x.rows, || format!("{rows} rows of a tensor of {}", x.rows))?;
        match x.value.get() {
            Value::Stored => Ok(()),
            Value::Normed(norm) => {
                x.store();
                self.launch_norm(norm, rows, x)
            }
            Value::Parts { .. } | Value::Added => Err(bug(op, "the input is for add_rms_norm only".into())),
        }
    }

    /// A kernel of norm.cu for rows of `cols`: of one turn where it does.
    fn norm_kernel(&self, name: &str, cols: usize) -> Result<Function> {
        let turns = if cols <= 8 * 256 { 1 } else { 4 };
        self.device.function(&format!("{name}_{}_{turns}", self.suffix), 0)
    }

    fn launch_norm(&self, norm: Norm, rows: usize, out: &CudaTensor) -> Result<()> {
        let args = [
            norm.x.arg(),
            norm.weight.arg(),
            norm.eps.arg(),
            out.address().arg(),
            out.cols.arg(),
        ];
        self.device
            .launch(self.norm_kernel("rms_norm", out.cols)?, [rows, 1, 1], 256, 0, &args)
    }

    fn norm_shape(&self, op: &'static str, weight: &CudaWeight, x: &CudaTensor) -> Result<()> {
        need(
            op,
            weight.dtype == self.dtype && weight.cols == x.cols && x.cols.is_multiple_of(8) && x.cols <= 8 * 256 * 4,
            || {
                format!(
                    "a norm over {} with a {} weight of {}",
                    x.cols, weight.dtype, weight.cols
                )
            },
        )
    }
}

impl Backend for CudaBackend {
    type Tensor = CudaTensor;
    type Weight = CudaWeight;
    type KvCache = CudaKvCache;
    type ConvState = CudaConvState;
    type Batch = CudaBatch;
    type Routing = CudaRouting;
    type Sampler = CudaSampler;

    fn describe(&self) -> String {
        let many = if self.has_wgmma { "wgmma" } else { "mma.sync" };
        format!(
            "CUDA device {} (sm_{}, {} SMs, driver {}), {} activations, {many} tiles, streamed weights for few tokens",
            self.device.name,
            self.device.capability,
            self.device.multiprocessors,
            driver::driver_version().unwrap_or_default(),
            self.dtype,
        )
    }

    fn memory_bytes(&self) -> Result<usize> {
        Ok(self.device.free_bytes_at_start)
    }

    fn read_bandwidth(&mut self) -> Result<f64> {
        const BYTES: usize = 4 << 30;
        // What reads fastest differs from card to card.
        const BLOCKS_PER_MULTIPROCESSOR: [usize; 4] = [1, 2, 4, 16];
        const PASSES: usize = 4;
        let buffer = Memory::new(&self.device, BYTES, "read_bandwidth")?;
        let function = self.device.function("read_bandwidth", 0)?;
        let args = [
            buffer.address.arg(),
            (BYTES / 16).arg(),
            self.split_partial.address.arg(),
        ];
        let mut best = f64::INFINITY;
        for blocks in BLOCKS_PER_MULTIPROCESSOR.repeat(PASSES) {
            self.device.synchronize("read_bandwidth")?;
            let start = std::time::Instant::now();
            let grid = [self.device.multiprocessors * blocks, 1, 1];
            self.device.launch(function, grid, 512, 0, &args)?;
            self.device.synchronize("read_bandwidth")?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(BYTES as f64 / best)
    }

    fn device_times(&mut self) -> Result<Option<DeviceTimes>> {
        self.timing.get_or_insert_default().read().map(Some)
    }

    fn activation_dtype(&self) -> DType {
        self.dtype
    }

    fn tensor(&mut self, rows: usize, cols: usize, dtype: DType) -> Result<CudaTensor> {
        let memory = Memory::new(&self.device, rows * cols * dtype.size_bytes(), "workspace")?;
        Ok(CudaTensor {
            memory,
            rows,
            cols,
            dtype,
            value: Cell::new(Value::Stored),
        })
    }

    fn weight(&mut self, host: HostTensor<'_>, dtype: DType) -> Result<CudaWeight> {
        let cols = host.shape.last().copied().unwrap_or(1);
        let rows = host.shape.iter().product::<usize>() / cols.max(1);
        self.upload_weight(&[host], (rows, cols), dtype)
    }

    fn weight_rows(&mut self, parts: &[HostTensor<'_>], dtype: DType) -> Result<CudaWeight> {
        let cols = parts.first().and_then(|p| p.shape.last()).copied().unwrap_or(1);
        let rows = parts
            .iter()
            .map(|p| p.shape.iter().product::<usize>() / cols.max(1))
            .sum();
        self.upload_weight(parts, (rows, cols), dtype)
    }

    fn weight_experts(&mut self, parts: &[Vec<HostTensor<'_>>], dtype: DType) -> Result<CudaWeight> {
        let flat: Vec<HostTensor<'_>> = parts.iter().flatten().copied().collect();
        self.weight_rows(&flat, dtype)
    }

    fn kv_cache(
        &mut self,
        num_blocks: usize,
        block_size: usize,
        shape: &AttentionShape,
        dtype: DType,
    ) -> Result<CudaKvCache> {
        self.new_kv_cache(num_blocks, block_size, shape, dtype)
    }

    fn conv_state(&mut self, slots: usize, taps: usize, hidden: usize) -> Result<CudaConvState> {
        need(
            "conv_state",
            (2..=4).contains(&taps) && hidden.is_multiple_of(2),
            || format!("{taps} taps (2 to 4 are built) over {hidden} channels"),
        )?;
        let memory = Memory::new(
            &self.device,
            slots * (taps - 1) * hidden * self.dtype.size_bytes(),
            "conv_state",
        )?;
        Ok(CudaConvState { memory, taps, hidden })
    }

    fn batch(&mut self, max_tokens: usize, max_rows: usize, max_blocks_per_row: usize) -> Result<CudaBatch> {
        CudaBatch::new(&self.device, max_tokens, max_rows, max_blocks_per_row)
    }

    fn routing(&mut self, max_tokens: usize, shape: &RouteShape, hidden: usize, ffn: usize) -> Result<CudaRouting> {
        CudaRouting::new(&self.device, max_tokens, shape, hidden, ffn, self.dtype)
    }

    fn sampler(&mut self, slots: usize, vocab: usize, max_rows: usize) -> Result<CudaSampler> {
        let sampler = CudaSampler::new(&self.device, slots, vocab, max_rows)?;
        self.last_sampled = sampler.last_sampled();
        Ok(sampler)
    }

    fn set_batch(&mut self, batch: &mut CudaBatch, layout: &BatchLayout) -> Result<()> {
        self.device.bind()?;
        batch.set(&self.device, layout, self.attention_splits)
    }

    fn feed_back(&mut self, batch: &mut CudaBatch, sampler: &CudaSampler) -> Result<()> {
        // `embed` looks the tokens up where it finds their mark.
        need(
            "feed_back",
            !batch.any_feedback || self.last_sampled == sampler.last_sampled(),
            || "not the sampler that was made last".into(),
        )
    }

    fn read(&mut self, x: &CudaTensor, rows: usize, out: &mut Vec<f32>) -> Result<()> {
        self.device.bind()?;
        need("read", rows <= x.rows, || {
            format!("{rows} rows of a tensor of {}", x.rows)
        })?;
        out.clear();
        let (from, parts) = match x.value.get() {
            Value::Parts { from, count } => (from, count),
            _ => {
                self.whole("read", x, rows)?;
                (x.address(), 1)
            }
        };
        let mut bytes = vec![0; rows * parts * x.cols * x.dtype.size_bytes()];
        driver::download(&self.device, from, &mut bytes, "read")?;
        let mut values = Vec::new();
        decode_f32(x.dtype, &bytes, &mut values);
        for row in values.chunks_exact(parts * x.cols) {
            out.extend((0..x.cols).map(|c| row.iter().skip(c).step_by(x.cols).sum::<f32>()));
        }
        Ok(())
    }

    fn write(&mut self, x: &mut CudaTensor, values: &[f32]) -> Result<()> {
        self.device.bind()?;
        need("write", values.len() <= x.rows * x.cols, || {
            format!("{} values into [{}, {}]", values.len(), x.rows, x.cols)
        })?;
        x.store();
        let raw: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let host = HostTensor {
            dtype: DType::F32,
            shape: &[values.len()],
            data: &raw,
        };
        x.memory.upload(0, &convert(&host, x.dtype), "write")
    }

    fn graph_rows(&self) -> &[usize] {
        if self.graphs.is_some() { GRAPH_ROWS } else { &[] }
    }

    fn record(
        &mut self,
        batch: &mut CudaBatch,
        variant: usize,
        body: impl FnOnce(&mut Self, &mut CudaBatch) -> Result<()>,
    ) -> Result<()> {
        let key = GraphKey {
            rows: batch.rows,
            max_blocks: batch.max_blocks,
            max_splits: batch.max_splits,
            split_tokens: batch.split_tokens,
            variant,
        };
        let device = self.device.clone();
        if let Some(graph) = self.graphs.as_ref().and_then(|graphs| graphs.get(&key)) {
            let Some(timing) = &mut self.timing else {
                return device.replay(graph);
            };
            let events = [Event::timed(&device)?, Event::timed(&device)?];
            events[0].record(&device)?;
            device.replay(graph)?;
            events[1].record(&device)?;
            timing.forwards.push_back((events, graph.nodes));
            return Ok(());
        }
        if self.graphs.is_none() {
            return body(self, batch);
        }
        let graph = device.capture(|| body(self, batch))?;
        device.replay(&graph)?;
        if let Some(graphs) = &mut self.graphs {
            graphs.insert(key, graph);
        }
        Ok(())
    }

    fn embed(&mut self, table: &CudaWeight, batch: &CudaBatch, out: &mut CudaTensor) -> Result<()> {
        need(
            "embed",
            table.dtype == out.dtype
                && table.cols == out.cols
                && table.cols.is_multiple_of(8)
                && batch.tokens <= out.rows,
            || {
                format!(
                    "a table of width {} into [{}, {}] for {} tokens",
                    table.cols, out.rows, out.cols, batch.tokens
                )
            },
        )?;
        out.store();
        let vectors = table.cols * table.dtype.size_bytes() / 16;
        let function = self.device.function("embed", 0)?;
        let args = [
            table.memory.address.arg(),
            batch.token_ids().arg(),
            self.last_sampled.arg(),
            out.address().arg(),
            vectors.arg(),
        ];
        self.device.launch(function, [batch.tokens, 1, 1], 256, 0, &args)
    }

    fn rms_norm(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        weight: &CudaWeight,
        eps: f32,
        out: &mut CudaTensor,
    ) -> Result<()> {
        self.whole("rms_norm", x, rows)?;
        self.norm_shape("rms_norm", weight, x)?;
        let norm = Norm {
            x: x.address(),
            weight: weight.memory.address,
            eps,
        };
        self.norm(norm, rows, out)
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut CudaTensor,
        delta: &CudaTensor,
        rows: usize,
        weight: &CudaWeight,
        eps: f32,
        out: &mut CudaTensor,
    ) -> Result<()> {
        self.norm_shape("add_rms_norm", weight, residual)?;
        need(
            "add_rms_norm",
            rows <= residual.rows.min(delta.rows).min(out.rows) && delta.cols == residual.cols,
            || {
                format!(
                    "{rows} rows of [{}, {}] plus [{}, {}]",
                    residual.rows, residual.cols, delta.rows, delta.cols
                )
            },
        )?;
        let (from, parts) = match delta.value.get() {
            Value::Stored => (delta.address(), 1),
            Value::Parts { from, count } => (from, count),
            Value::Added => {
                let norm = Norm {
                    x: residual.address(),
                    weight: weight.memory.address,
                    eps,
                };
                return self.norm(norm, rows, out);
            }
            Value::Normed(_) => return Err(bug("add_rms_norm", "delta is a norm".into())),
        };
        out.store();
        let args = [
            residual.address().arg(),
            from.arg(),
            parts.arg(),
            weight.memory.address.arg(),
            eps.arg(),
            out.address().arg(),
            residual.cols.arg(),
        ];
        self.device.launch(
            self.norm_kernel("add_rms_norm", residual.cols)?,
            [rows, 1, 1],
            256,
            0,
            &args,
        )
    }

    fn linear(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        w: &CudaWeight,
        bias: Option<&CudaWeight>,
        out: &mut CudaTensor,
    ) -> Result<()> {
        self.matrix_product(x, rows, w, bias, out)
    }

    fn linear_residual(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        w: &CudaWeight,
        bias: Option<&CudaWeight>,
        residual: &mut CudaTensor,
        delta: &mut CudaTensor,
    ) -> Result<()> {
        self.product_added(x, rows, w, bias, residual, delta)
    }

    fn linear_swiglu(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        w13: &CudaWeight,
        gate_up: &mut CudaTensor,
        out: &mut CudaTensor,
    ) -> Result<()> {
        self.product_gated(x, rows, w13, gate_up, out)
    }

    fn linear_short_conv(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        weights: ConvWeights<'_, CudaWeight>,
        batch: &CudaBatch,
        state: &mut CudaConvState,
        bcx: &mut CudaTensor,
        out: &mut CudaTensor,
    ) -> Result<()> {
        self.product_convolved(x, rows, weights, batch, state, bcx, out)
    }

    fn qk_norm_rope_kv(
        &mut self,
        qkv: &mut CudaTensor,
        q_norm: &CudaWeight,
        k_norm: &CudaWeight,
        shape: &AttentionShape,
        batch: &CudaBatch,
        kv: &mut CudaKvCache,
    ) -> Result<()> {
        self.write_kv(qkv, (q_norm, k_norm), shape, batch, kv)
    }

    fn attention(
        &mut self,
        qkv: &CudaTensor,
        shape: &AttentionShape,
        batch: &CudaBatch,
        kv: &CudaKvCache,
        out: &mut CudaTensor,
    ) -> Result<()> {
        self.attend(qkv, shape, batch, kv, out)
    }

    fn qk_norm_rope_attention(
        &mut self,
        qkv: &mut CudaTensor,
        q_norm: &CudaWeight,
        k_norm: &CudaWeight,
        shape: &AttentionShape,
        batch: &CudaBatch,
        kv: &mut CudaKvCache,
        out: &mut CudaTensor,
    ) -> Result<()> {
        self.write_kv_and_attend(qkv, (q_norm, k_norm), shape, batch, kv, out)
    }

    fn short_conv(
        &mut self,
        bcx: &CudaTensor,
        taps: &CudaWeight,
        bias: Option<&CudaWeight>,
        batch: &CudaBatch,
        state: &mut CudaConvState,
        out: &mut CudaTensor,
    ) -> Result<()> {
        need(
            "short_conv",
            bcx.cols == 3 * state.hidden
                && out.cols == state.hidden
                && taps.dtype == self.dtype
                && taps.rows * taps.cols == state.hidden * state.taps,
            || {
                format!(
                    "{} columns for {} channels of {} taps",
                    bcx.cols, state.hidden, state.taps
                )
            },
        )?;
        out.store();
        let h = state.hidden;
        let one_piece_rows = batch.pieces == batch.rows;
        let function = self
            .device
            .function(&format!("short_conv_{}_{}", self.suffix, state.taps), 0)?;
        let args = [
            bcx.address().arg(),
            taps.memory.address.arg(),
            bias.map_or(0, |b| b.memory.address).arg(),
            state.memory.address.arg(),
            batch.piece_row().arg(),
            batch.piece_start().arg(),
            batch.row_starts().arg(),
            batch.slots().arg(),
            batch.reset_conv().arg(),
            out.address().arg(),
            h.arg(),
            one_piece_rows.arg(),
        ];
        self.device
            .launch(function, [batch.pieces, h.div_ceil(256), 1], 128, 0, &args)?;
        if one_piece_rows {
            return Ok(());
        }
        let function = self
            .device
            .function(&format!("short_conv_state_{}_{}", self.suffix, state.taps), 0)?;
        let args = [
            bcx.address().arg(),
            state.memory.address.arg(),
            batch.row_starts().arg(),
            batch.slots().arg(),
            batch.reset_conv().arg(),
            h.arg(),
        ];
        self.device
            .launch(function, [batch.rows, h.div_ceil(512), 1], 256, 0, &args)
    }

    fn swiglu(&mut self, gate_up: &CudaTensor, rows: usize, out: &mut CudaTensor) -> Result<()> {
        self.whole("swiglu", gate_up, rows)?;
        need(
            "swiglu",
            gate_up.cols == 2 * out.cols && out.cols.is_multiple_of(8) && rows <= out.rows,
            || format!("[{}] into [{}]", gate_up.cols, out.cols),
        )?;
        out.store();
        let blocks = (rows * out.cols / 8)
            .div_ceil(256)
            .min(self.device.multiprocessors * 16);
        let args = [gate_up.address().arg(), out.address().arg(), rows.arg(), out.cols.arg()];
        self.device
            .launch(self.kernel("swiglu", 0)?, [blocks, 1, 1], 256, 0, &args)
    }

    fn prefetch(&mut self, weight: &CudaWeight) {
        let bytes = weight.rows * weight.cols * weight.dtype.size_bytes();
        self.soon = Some((weight.memory.address, bytes));
    }

    fn moe_route(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        gate: &CudaWeight,
        bias: Option<&CudaWeight>,
        shape: &RouteShape,
        routing: &mut CudaRouting,
    ) -> Result<()> {
        self.route(x, rows, gate, bias, shape, routing)
    }

    fn moe_experts(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        w13: &CudaWeight,
        w2: &CudaWeight,
        routing: &mut CudaRouting,
        out: &mut CudaTensor,
    ) -> Result<()> {
        self.whole("moe_experts", x, rows)?;
        self.experts(x, rows, w13, w2, routing, None, out)
    }

    fn moe_experts_residual(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        w13: &CudaWeight,
        w2: &CudaWeight,
        routing: &mut CudaRouting,
        residual: &mut CudaTensor,
        delta: &mut CudaTensor,
    ) -> Result<()> {
        self.whole("moe_experts", x, rows)?;
        self.experts(x, rows, w13, w2, routing, Some(residual), delta)
    }

    fn gather_logit_rows(&mut self, x: &CudaTensor, batch: &CudaBatch, out: &mut CudaTensor) -> Result<()> {
        let all = batch.logit_rows == batch.tokens;
        if let (Value::Normed(norm), true) = (x.value.get(), all) {
            // Ascending and as many as there are tokens: every token, in order.
            out.value.set(Value::Normed(norm));
            return Ok(());
        }
        self.whole("gather_logit_rows", x, batch.tokens)?;
        need(
            "gather_logit_rows",
            x.cols == out.cols && batch.logit_rows <= out.rows,
            || format!("{} rows into a tensor of {}", batch.logit_rows, out.rows),
        )?;
        out.store();
        let function = self.device.function("gather_rows", 0)?;
        let vectors = x.cols * x.dtype.size_bytes() / 16;
        let args = [
            x.address().arg(),
            batch.logit_tokens().arg(),
            out.address().arg(),
            vectors.arg(),
        ];
        self.device.launch(function, [batch.logit_rows, 1, 1], 256, 0, &args)
    }

    fn start_slot(&mut self, sampler: &mut CudaSampler, started: &StartedSlot) -> Result<()> {
        self.device.bind()?;
        sampler.start(&self.device, started)
    }

    fn sample(&mut self, logits: &CudaTensor, requests: &[SampleRequest], sampler: &mut CudaSampler) -> Result<()> {
        self.device.bind()?;
        for request in requests {
            need(
                "sample",
                request.logit_row < logits.rows && logits.cols == sampler.vocab(),
                || format!("row {} of logits [{}, {}]", request.logit_row, logits.rows, logits.cols),
            )?;
        }
        let Some(timing) = &mut self.timing else {
            return sampler.sample(&self.device, logits.address(), requests);
        };
        let events = [Event::timed(&self.device)?, Event::timed(&self.device)?];
        events[0].record(&self.device)?;
        sampler.sample(&self.device, logits.address(), requests)?;
        events[1].record(&self.device)?;
        timing.samples.push_back(events);
        Ok(())
    }

    fn sampled(&mut self, sampler: &mut CudaSampler, out: &mut Vec<SampledToken>) -> Result<()> {
        self.device.bind()?;
        sampler.sampled(out)
    }

    fn score(
        &mut self,
        logits: &CudaTensor,
        requests: &[ScoreRequest],
        sampler: &mut CudaSampler,
        out: &mut Vec<TokenLogprobs>,
    ) -> Result<()> {
        self.device.bind()?;
        for request in requests {
            need(
                "score",
                request.logit_row < logits.rows && logits.cols == sampler.vocab(),
                || format!("row {} of logits [{}, {}]", request.logit_row, logits.rows, logits.cols),
            )?;
        }
        sampler.score(&self.device, logits.address(), requests, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::conformance::{Options, Shapes, conformance};

    /// Needs a GPU: `kernels/gpu-check` runs it.
    #[test]
    #[ignore = "needs a GPU"]
    fn conforms_to_the_op_table() {
        for dtype in [DType::Bf16, DType::F16] {
            let mut options = Options::new(2e-2);
            options.weights = vec![dtype];
            options.vectors = dtype;
            options.kv = vec![dtype];
            // Different kernels take different numbers of rows.
            options.batch_invariant = false;
            options.rows = vec![1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64, 65, 130, 200, 257, 512, 1030];
            options.shapes = Shapes::aligned();
            conformance(&mut CudaBackend::new(0, dtype, true).expect("a device"), &options);
        }
    }
}
