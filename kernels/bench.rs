//! Every operation of a step at the shapes of LFM2.5-8B-A1B: checked against the CPU backend, then timed by device events in a graph
//! whose launches walk over buffers larger than the L2 cache. Prints operation · shape · µs · GB/s or TFLOP/s · share of the limit
//! measured in the same run.
//!
//! `cargo bench --features cuda -- [FILTER …]`: only operations whose name and shape contain every FILTER.

#[cfg(feature = "cuda")]
fn main() {
    if let Err(error) = cuda::run() {
        eprintln!("{error}");
        std::process::exit(1);
    }
}

#[cfg(not(feature = "cuda"))]
fn main() {
    eprintln!("the bench of the kernels needs --features cuda");
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::sync::Arc;

    use rvllm::backend::cpu::CpuBackend;
    use rvllm::backend::cuda::CudaBackend;
    use rvllm::backend::{
        AttentionShape, Backend, BatchLayout, ConvWeights, DType, HostTensor, Result, RouteShape, SampleRequest,
    };
    use rvllm::step::{SamplingParams, StartedSlot};

    type Tensor = <CudaBackend as Backend>::Tensor;
    type Weight = <CudaBackend as Backend>::Weight;

    const HIDDEN: usize = 2048;
    const QKV: usize = 3072;
    const DENSE: usize = 7168;
    const WIDTH: usize = 1792;
    const VOCABULARY: usize = 128_000;
    const TAPS: usize = 3;
    const BLOCK: usize = 16;
    const ROUTE: RouteShape = RouteShape {
        num_experts: 32,
        experts_per_token: 4,
        norm_topk_prob: true,
        routed_scaling_factor: 1.0,
    };
    const ATTENTION: AttentionShape = AttentionShape {
        num_q_heads: 32,
        num_kv_heads: 8,
        head_dim: 64,
        scale: 0.125,
        rope_theta: 5e6,
        norm_eps: 1e-5,
    };
    const DECODE_ROWS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];
    const PREFILL_TOKENS: [usize; 3] = [512, 2048, 8192];
    /// Bytes that one turn over the buffers must exceed: more than any L2 cache.
    const TURN: usize = 160 << 20;
    const TFLOPS: f64 = 790e12;
    const EPS: f32 = 1e-5;

    /// Values of a checkpoint's spread, as bf16 bytes that many weights share.
    struct Values(Vec<u8>);

    impl Values {
        fn new(n: usize) -> Values {
            let mut state = 7u64;
            let value = || {
                let mut sum = 0.0f32;
                for _ in 0..4 {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    sum += (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
                }
                sum
            };
            let floats: Vec<f32> = std::iter::repeat_with(value).take(n).collect();
            Values(floats.iter().flat_map(|v| half_bits(v * 0.017).to_le_bytes()).collect())
        }

        /// `[rows, cols]` that begins at another value for each `seed`.
        fn matrix(&self, rows: usize, cols: usize, seed: usize) -> Vec<u8> {
            let bytes = rows * cols * 2;
            let mut from = seed * 7919 * 2 % self.0.len();
            let mut out = Vec::with_capacity(bytes);
            while out.len() < bytes {
                let take = (bytes - out.len()).min(self.0.len() - from);
                out.extend_from_slice(&self.0[from..from + take]);
                from = 0;
            }
            out
        }

        fn floats(&self, n: usize, seed: usize, factor: f32) -> Vec<f32> {
            self.matrix(1, n, seed)
                .chunks_exact(2)
                .map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16) * factor)
                .collect()
        }
    }

    /// bf16, rounded to nearest even.
    fn half_bits(v: f32) -> u16 {
        let bits = v.to_bits();
        ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
    }

    struct Bench {
        gpu: CudaBackend,
        values: Values,
        filters: Vec<String>,
        bandwidth: f64,
        failed: bool,
    }

    pub fn run() -> Result<()> {
        let filters: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
        let mut gpu = CudaBackend::new(0, DType::Bf16, false)?;
        println!("{}", gpu.describe());
        let bandwidth = gpu.read_bandwidth()?;
        println!(
            "read bandwidth {:.2} TB/s; matrix products against {:.0} TFLOP/s",
            bandwidth / 1e12,
            TFLOPS / 1e12
        );
        let mut bench = Bench {
            gpu,
            values: Values::new(1 << 22),
            filters,
            bandwidth,
            failed: false,
        };
        bench.products()?;
        bench.norms()?;
        bench.convs()?;
        bench.attention()?;
        bench.experts()?;
        bench.sampler()?;
        if bench.failed {
            std::process::exit(1);
        }
        Ok(())
    }

    impl Bench {
        fn wants(&self, name: &str) -> bool {
            self.filters.iter().all(|f| name.contains(f.as_str()))
        }

        /// Times `body(i)`, which uses the i-th of the operands' copies; `bytes` and `flops` of one.
        fn time(
            &mut self,
            name: &str,
            bytes: usize,
            flops: f64,
            body: impl FnMut(&mut CudaBackend, usize) -> Result<()>,
        ) -> Result<()> {
            let repeats = (TURN / bytes.max(1)).clamp(12, 48);
            let seconds = self.gpu.time(repeats, body)?;
            let floor = (bytes as f64 / self.bandwidth).max(flops / TFLOPS);
            let rate = if flops / TFLOPS > bytes as f64 / self.bandwidth {
                format!("{:7.1} TFLOP/s", flops / seconds / 1e12)
            } else {
                format!("{:7.0} GB/s   ", bytes as f64 / seconds / 1e9)
            };
            println!(
                "{name:<44} {:9.2} µs {rate} {:4.0} %",
                seconds * 1e6,
                floor / seconds * 100.0
            );
            Ok(())
        }

        fn weight(&mut self, rows: usize, cols: usize, seed: usize) -> Result<Weight> {
            let data = self.values.matrix(rows, cols, seed);
            self.gpu.weight(
                HostTensor {
                    dtype: DType::Bf16,
                    shape: &[rows, cols],
                    data: &data,
                },
                DType::Bf16,
            )
        }

        /// A norm's weight of ones.
        fn ones(&mut self) -> Result<Weight> {
            let data: Vec<u8> = half_bits(1.0).to_le_bytes().repeat(HIDDEN);
            self.gpu.weight(
                HostTensor {
                    dtype: DType::Bf16,
                    shape: &[HIDDEN],
                    data: &data,
                },
                DType::Bf16,
            )
        }

        fn tensor(&mut self, rows: usize, cols: usize, seed: usize) -> Result<Tensor> {
            let mut x = self.gpu.tensor(rows, cols, DType::Bf16)?;
            self.gpu.write(&mut x, &self.values.floats(rows * cols, seed, 40.0))?;
            Ok(x)
        }

        fn copies(bytes: usize) -> usize {
            (TURN / bytes + 1).clamp(1, 24)
        }

        /// The share of the largest value by which GPU and CPU differ.
        fn compare(&mut self, name: &str, got: &[f32], want: &[f32]) {
            let scale = want.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
            let worst = got
                .iter()
                .zip(want)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0f32, |m, d| if m.is_nan() || d <= m { m } else { d });
            if worst.is_nan() || worst / scale > 2e-2 {
                println!(
                    "{name}: FAILED, differs from the CPU by {:.1e} of the largest value",
                    worst / scale
                );
                self.failed = true;
            }
        }

        fn check_product(&mut self, name: &str, rows: usize, n: usize, k: usize, gpu: &mut Tensor) -> Result<()> {
            let threads = std::thread::available_parallelism().map_or(2, |n| n.get());
            let mut cpu = CpuBackend::new(threads, DType::F32);
            let data = self.values.matrix(n, k, 0);
            let host = HostTensor {
                dtype: DType::Bf16,
                shape: &[n, k],
                data: &data,
            };
            let weight = cpu.weight(host, DType::Bf16)?;
            let x = self.values.floats(rows * k, 1, 40.0);
            let mut input = cpu.tensor(rows, k, DType::F32)?;
            cpu.write(&mut input, &x)?;
            let mut out = cpu.tensor(rows, n, DType::F32)?;
            cpu.linear(&input, rows, &weight, None, &mut out)?;
            let (mut want, mut got) = (Vec::new(), Vec::new());
            cpu.read(&out, rows, &mut want)?;
            self.gpu.read(gpu, rows, &mut got)?;
            self.compare(name, &got, &want);
            Ok(())
        }

        fn products(&mut self) -> Result<()> {
            let shapes = [
                ("in_proj", 3 * HIDDEN, HIDDEN),
                ("qkv", QKV, HIDDEN),
                ("out_proj", HIDDEN, HIDDEN),
                ("dense w13", 2 * DENSE, HIDDEN),
                ("dense w2", HIDDEN, DENSE),
                ("lm_head", VOCABULARY, HIDDEN),
            ];
            for (what, n, k) in shapes {
                let name = |rows: usize| format!("linear {what} {rows} x {n} x {k}");
                let mut rows: Vec<usize> = DECODE_ROWS.to_vec();
                if what != "lm_head" {
                    rows.extend(PREFILL_TOKENS);
                }
                rows.retain(|&rows| self.wants(&name(rows)));
                let Some(&most) = rows.iter().max() else { continue };
                let copies = Self::copies(n * k * 2);
                let weights: Vec<Weight> = (0..copies).map(|i| self.weight(n, k, i)).collect::<Result<_>>()?;
                let x = self.tensor(most, k, 1)?;
                let out_dtype = if what == "lm_head" { DType::F32 } else { DType::Bf16 };
                let mut out = self.gpu.tensor(most, n, out_dtype)?;
                for rows in rows {
                    let name = name(rows);
                    if rows <= 32 && n <= 16_384 {
                        self.gpu.linear(&x, rows, &weights[0], None, &mut out)?;
                        self.check_product(&name, rows, n, k, &mut out)?;
                    }
                    let bytes = n * k * 2 + rows * (k + n * if out_dtype == DType::F32 { 2 } else { 1 }) * 2;
                    let flops = 2.0 * rows as f64 * n as f64 * k as f64;
                    self.time(&name, bytes, flops, |gpu, i| {
                        gpu.linear(&x, rows, &weights[i % copies], None, &mut out)
                    })?;
                }
            }
            self.fused_products()
        }

        /// Norm + product, SwiGLU and product + residual as a decode step has them.
        fn fused_products(&mut self) -> Result<()> {
            let norm = self.ones()?;
            for (what, n, k) in [
                ("norm qkv", QKV, HIDDEN),
                ("norm swiglu", 2 * DENSE, HIDDEN),
                ("residual out_proj", HIDDEN, HIDDEN),
                ("residual dense w2", HIDDEN, DENSE),
            ] {
                let name = |rows: usize| format!("fused {what} {rows} x {n} x {k}");
                let rows: Vec<usize> = DECODE_ROWS
                    .into_iter()
                    .filter(|&rows| self.wants(&name(rows)))
                    .collect();
                let Some(&most) = rows.iter().max() else { continue };
                let copies = Self::copies(n * k * 2);
                let weights: Vec<Weight> = (0..copies).map(|i| self.weight(n, k, i)).collect::<Result<_>>()?;
                let x = self.tensor(most, k, 1)?;
                let (mut normed, mut wide) = (self.tensor(most, k, 2)?, self.tensor(most, n, 2)?);
                let mut half = self.tensor(most, n / 2, 2)?;
                let (mut residual, mut delta) = (self.tensor(most, n, 3)?, self.tensor(most, n, 4)?);
                for rows in rows {
                    let flops = 2.0 * rows as f64 * n as f64 * k as f64;
                    self.time(&name(rows), n * k * 2, flops, |gpu, i| {
                        let w = &weights[i % copies];
                        match what {
                            "norm qkv" => {
                                gpu.rms_norm(&x, rows, &norm, EPS, &mut normed)?;
                                gpu.linear(&normed, rows, w, None, &mut wide)
                            }
                            "norm swiglu" => {
                                gpu.rms_norm(&x, rows, &norm, EPS, &mut normed)?;
                                gpu.linear_swiglu(&normed, rows, w, &mut wide, &mut half)
                            }
                            _ => gpu.linear_residual(&x, rows, w, None, &mut residual, &mut delta),
                        }
                    })?;
                }
            }
            Ok(())
        }

        fn norms(&mut self) -> Result<()> {
            let weight = self.ones()?;
            for rows in DECODE_ROWS.into_iter().chain(PREFILL_TOKENS) {
                let name = format!("add_rms_norm {rows} x {HIDDEN}");
                if !self.wants(&name) {
                    continue;
                }
                let (mut residual, delta) = (self.tensor(rows, HIDDEN, 1)?, self.tensor(rows, HIDDEN, 2)?);
                let mut out = self.tensor(rows, HIDDEN, 3)?;
                self.time(&name, rows * HIDDEN * 2 * 4, 0.0, |gpu, _| {
                    gpu.add_rms_norm(&mut residual, &delta, rows, &weight, EPS, &mut out)
                })?;
            }
            Ok(())
        }

        /// `rows` rows that end `context` tokens after their start, the last `each` of them in the step.
        fn batch(&mut self, rows: usize, each: usize, context: usize) -> Result<<CudaBackend as Backend>::Batch> {
            let blocks = context.div_ceil(BLOCK);
            let mut layout = BatchLayout {
                row_starts: vec![0],
                max_blocks: blocks,
                ..BatchLayout::default()
            };
            for row in 0..rows {
                for at in context - each..context {
                    layout.token_ids.push(row as u32);
                    layout.positions.push(at as u32);
                    layout
                        .slot_mapping
                        .push(((row * blocks + at / BLOCK) * BLOCK + at % BLOCK) as i64);
                }
                let tokens = layout.token_ids.len() as u32;
                layout.row_starts.push(tokens);
                layout.context_lens.push(context as u32);
                layout
                    .block_tables
                    .extend((0..blocks).map(|b| (row * blocks + b) as u32));
                layout.slots.push(row as u32);
                layout.reset_conv.push(false);
                layout.feedback.push(false);
                layout.logit_tokens.push(tokens - 1);
            }
            let mut batch = self.gpu.batch(rows * each, rows, blocks)?;
            self.gpu.set_batch(&mut batch, &layout)?;
            Ok(batch)
        }

        fn convs(&mut self) -> Result<()> {
            let names = |rows: usize| {
                [
                    format!("short_conv {rows}"),
                    format!("fused norm in_proj short_conv {rows}"),
                ]
            };
            let rows: Vec<usize> = DECODE_ROWS
                .into_iter()
                .filter(|&r| names(r).iter().any(|n| self.wants(n)))
                .collect();
            let Some(&most) = rows.iter().max() else { return Ok(()) };
            let copies = Self::copies(3 * HIDDEN * HIDDEN * 2);
            let weights: Vec<Weight> = (0..copies)
                .map(|i| self.weight(3 * HIDDEN, HIDDEN, i))
                .collect::<Result<_>>()?;
            let (taps, norm) = (self.weight(HIDDEN, TAPS, 3)?, self.ones()?);
            let mut state = self.gpu.conv_state(most, TAPS, HIDDEN)?;
            let (x, mut normed) = (self.tensor(most, HIDDEN, 1)?, self.tensor(most, HIDDEN, 2)?);
            let (mut bcx, mut out) = (self.tensor(most, 3 * HIDDEN, 3)?, self.tensor(most, HIDDEN, 4)?);
            for rows in rows {
                let batch = self.batch(rows, 1, 16)?;
                let [plain, fused] = names(rows);
                if self.wants(&plain) {
                    self.time(&plain, rows * HIDDEN * 2 * 8, 0.0, |gpu, _| {
                        gpu.short_conv(&bcx, &taps, None, &batch, &mut state, &mut out)
                    })?;
                }
                if self.wants(&fused) {
                    let flops = 2.0 * rows as f64 * 3.0 * (HIDDEN * HIDDEN) as f64;
                    self.time(&fused, 3 * HIDDEN * HIDDEN * 2, flops, |gpu, i| {
                        gpu.rms_norm(&x, rows, &norm, EPS, &mut normed)?;
                        let weights = ConvWeights {
                            in_proj: &weights[i % copies],
                            in_bias: None,
                            taps: &taps,
                            taps_bias: None,
                        };
                        gpu.linear_short_conv(&normed, rows, weights, &batch, &mut state, &mut bcx, &mut out)
                    })?;
                }
            }
            Ok(())
        }

        fn attention(&mut self) -> Result<()> {
            let heads = ATTENTION.num_q_heads * 64;
            let contexts = DECODE_ROWS.into_iter().map(|rows| (rows, 192usize));
            for (rows, context) in contexts.chain([(1, 8192), (32, 8192)]) {
                let name = format!("attention decode {rows} at {context}");
                if !self.wants(&name) {
                    continue;
                }
                let (mut kv, norm) = self.cache(rows, context)?;
                let batch = self.batch(rows, 1, context)?;
                let (mut qkv, mut out) = (self.tensor(rows, QKV, 1)?, self.tensor(rows, heads, 2)?);
                self.time(&name, rows * context * 8 * 64 * 4, 0.0, |gpu, _| {
                    gpu.qk_norm_rope_attention(&mut qkv, &norm, &norm, &ATTENTION, &batch, &mut kv, &mut out)
                })?;
            }
            for (rows, context) in [(1, 1024usize), (1, 8192), (4, 2048)] {
                let name = format!("attention prefill {rows} x {context}");
                if !self.wants(&name) {
                    continue;
                }
                let (mut kv, norm) = self.cache(rows, context)?;
                let batch = self.batch(rows, context, context)?;
                let tokens = rows * context;
                let (mut qkv, mut out) = (self.tensor(tokens, QKV, 1)?, self.tensor(tokens, heads, 2)?);
                let flops = 4.0 * (heads * rows) as f64 * (context * (context + 1) / 2) as f64;
                // Norms and positions are turned once more in every round; finite values stay finite.
                self.time(&name, tokens * 8 * 64 * 4, flops, |gpu, _| {
                    gpu.qk_norm_rope_kv(&mut qkv, &norm, &norm, &ATTENTION, &batch, &mut kv)?;
                    gpu.attention(&qkv, &ATTENTION, &batch, &kv, &mut out)
                })?;
            }
            Ok(())
        }

        /// A KV cache for `rows` contexts, and a head norm of ones.
        fn cache(&mut self, rows: usize, context: usize) -> Result<(<CudaBackend as Backend>::KvCache, Weight)> {
            let blocks = context.div_ceil(BLOCK) * rows;
            let kv = self.gpu.kv_cache(blocks, BLOCK, &ATTENTION, DType::Bf16)?;
            let ones: Vec<u8> = half_bits(1.0).to_le_bytes().repeat(64);
            let host = HostTensor {
                dtype: DType::Bf16,
                shape: &[64],
                data: &ones,
            };
            Ok((kv, self.gpu.weight(host, DType::Bf16)?))
        }

        fn experts(&mut self) -> Result<()> {
            let names = |rows: usize| [format!("fused norm moe_route {rows}"), format!("moe_experts {rows}")];
            let wants = |bench: &Self, rows: usize| names(rows).iter().any(|n| bench.wants(n));
            let rows: Vec<usize> = DECODE_ROWS
                .into_iter()
                .chain(PREFILL_TOKENS)
                .filter(|&r| wants(self, r))
                .collect();
            let Some(&most) = rows.iter().max() else { return Ok(()) };
            let experts = ROUTE.num_experts;
            let data: Vec<Vec<u8>> = (0..experts).map(|e| self.values.matrix(2 * WIDTH, HIDDEN, e)).collect();
            let half = WIDTH * HIDDEN * 2;
            let part = |shape: &'static [usize], data| {
                vec![HostTensor {
                    dtype: DType::Bf16,
                    shape,
                    data,
                }]
            };
            let up: Vec<_> = data.iter().map(|d| part(&[2 * WIDTH, HIDDEN], d.as_slice())).collect();
            let down: Vec<_> = data.iter().map(|d| part(&[HIDDEN, WIDTH], &d[..half])).collect();
            let w13 = self.gpu.weight_experts(&up, DType::Bf16)?;
            let w2 = self.gpu.weight_experts(&down, DType::Bf16)?;
            let (gate, norm) = (self.weight(experts, HIDDEN, 5)?, self.ones()?);
            let mut routing = self.gpu.routing(most, &ROUTE, HIDDEN, WIDTH)?;
            for rows in rows {
                // Rows that choose differently, so that little of the weights is cached.
                let turns = if rows <= 4 { 8 } else { 2 };
                let inputs: Vec<Tensor> = (0..turns)
                    .map(|i| self.tensor(rows, HIDDEN, 11 + i))
                    .collect::<Result<_>>()?;
                let mut normed = self.tensor(rows, HIDDEN, 1)?;
                let (mut residual, mut delta) = (self.tensor(rows, HIDDEN, 2)?, self.tensor(rows, HIDDEN, 3)?);
                let [route_name, experts_name] = names(rows);
                let chosen = 32.0 * (1.0 - (28.0f64 / 32.0).powi(rows as i32));
                let bytes = (chosen * 3.0 * (WIDTH * HIDDEN * 2) as f64) as usize;
                let flops = 2.0 * (rows * 4 * 3) as f64 * (WIDTH * HIDDEN) as f64;
                if self.wants(&route_name) {
                    self.time(&route_name, experts * HIDDEN * 2, 0.0, |gpu, i| {
                        gpu.rms_norm(&inputs[i % turns], rows, &norm, EPS, &mut normed)?;
                        gpu.moe_route(&normed, rows, &gate, None, &ROUTE, &mut routing)
                    })?;
                }
                if self.wants(&experts_name) {
                    // With its router: it names the experts.
                    self.time(&experts_name, bytes, flops, |gpu, i| {
                        let x = &inputs[i % turns];
                        gpu.moe_route(x, rows, &gate, None, &ROUTE, &mut routing)?;
                        gpu.moe_experts_residual(x, rows, &w13, &w2, &mut routing, &mut residual, &mut delta)
                    })?;
                }
            }
            Ok(())
        }

        fn sampler(&mut self) -> Result<()> {
            let common = SamplingParams {
                temperature: 0.2,
                top_k: 80,
                repetition_penalty: 1.05,
                ..SamplingParams::default()
            };
            let greedy = SamplingParams {
                temperature: 0.0,
                ..SamplingParams::default()
            };
            for (what, params) in [("greedy", greedy), ("model card", common)] {
                for rows in [1, 8, 64, 256] {
                    let name = format!("sample {what} {rows}");
                    if !self.wants(&name) {
                        continue;
                    }
                    let mut sampler = self.gpu.sampler(rows, VOCABULARY, rows)?;
                    let mut logits = self.gpu.tensor(rows, VOCABULARY, DType::F32)?;
                    self.gpu
                        .write(&mut logits, &self.values.floats(rows * VOCABULARY, 9, 100.0))?;
                    for slot in 0..rows {
                        let started = StartedSlot {
                            slot: slot as u32,
                            sampling: Arc::new(params.clone()),
                            prompt: (0..128).collect::<Vec<u32>>().into(),
                            output: Vec::new(),
                        };
                        self.gpu.start_slot(&mut sampler, &started)?;
                    }
                    let requests: Vec<SampleRequest> = (0..rows)
                        .map(|row| SampleRequest {
                            logit_row: row,
                            slot: row as u32,
                            output_index: 0,
                            mask: None,
                        })
                        .collect();
                    let seconds = self.gpu.time_stream(20, |gpu, _| {
                        gpu.sample(&logits, &requests, &mut sampler)?;
                        let mut out = Vec::new();
                        gpu.sampled(&mut sampler, &mut out)
                    })?;
                    println!("{name:<44} {:9.2} µs, copies and wait included", seconds * 1e6);
                }
            }
            Ok(())
        }
    }
}
