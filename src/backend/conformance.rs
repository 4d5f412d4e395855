//! One suite for every backend: each operation of the table against plain f64 loops, from one decode row to ragged prefill.
//!
//! Inputs are representable in bf16, so that backends which round operands see the same numbers. A failure panics with
//! the operation, the shape and the first value that differs. Run it from a test, or from a test binary on a device.

mod attention;
mod fused;
mod sampling;

use std::sync::Arc;

use super::{AttentionShape, Backend, BatchLayout, DType, HostTensor, RouteShape, SampleRequest, ScoreRequest};
use crate::step::{
    LogprobsMode, MAX_LOGPROBS, SampledToken, SamplingParams, StartedSlot, TokenId, TokenLogprobs, TokenMask,
};

/// What is asked of a backend.
#[derive(Clone, Debug)]
pub struct Options {
    /// Types of matrices to test.
    pub weights: Vec<DType>,
    /// Type of norms, taps and biases.
    pub vectors: DType,
    /// Types of KV to test.
    pub kv: Vec<DType>,
    /// Largest difference, as a share of the largest magnitude in the same row: about 1e-4 for f32 activations, 2e-2 for
    /// bf16.
    pub tolerance: f64,
    /// Whether a row's result must be the same bits alone, in any batch, and after any cut of its prompt.
    pub batch_invariant: bool,
    /// Rows of the matrix products.
    pub rows: Vec<usize>,
    /// Sizes to test.
    pub shapes: Shapes,
}

/// Sizes of the operands. A backend that takes only aligned sizes has its own list.
#[derive(Clone, Debug)]
pub struct Shapes {
    /// (in, out) of matrix products.
    pub products: Vec<(usize, usize)>,
    /// (rows, width) of norms and activations.
    pub norms: Vec<(usize, usize)>,
    /// (vocabulary, width) of embedding tables.
    pub tables: Vec<(usize, usize)>,
    /// (channels, taps, with bias).
    pub convs: Vec<(usize, usize, bool)>,
    /// (query heads, KV heads, head dim, block size).
    pub attentions: Vec<(usize, usize, usize, usize)>,
    /// (rows, experts, experts per token, width, experts' width, normalised).
    pub experts: Vec<(usize, usize, usize, usize, usize, bool)>,
    /// (width, dense and experts' width, experts, experts per token).
    pub fused: Vec<(usize, usize, usize, usize)>,
}

impl Shapes {
    /// Odd sizes, down to one.
    pub fn any() -> Self {
        Self {
            products: vec![(64, 64), (33, 19), (1, 1), (7, 130), (300, 80), (1030, 48)],
            norms: vec![(1, 64), (3, 37), (17, 1024), (40, 8)],
            tables: vec![(50, 48), (7, 5)],
            convs: vec![(48, 3, false), (300, 4, true), (5, 1, false), (16, 2, true)],
            attentions: vec![(4, 2, 64, 16), (6, 2, 32, 32), (2, 2, 16, 4), (4, 1, 8, 24)],
            experts: vec![
                (40, 8, 2, 48, 40, true),
                (40, 32, 4, 64, 24, true),
                (40, 4, 4, 33, 17, false),
                (40, 3, 1, 16, 16, true),
            ],
            fused: vec![(40, 24, 4, 2)],
        }
    }

    /// What the kernels of a GPU promise to take: widths in eights, heads of 64, 8 to 64 experts; every kernel is met.
    pub fn aligned() -> Self {
        Self {
            products: vec![
                (64, 64),
                (256, 48),
                (96, 136),
                (2048, 192),
                (1792, 64),
                (4608, 80),
                (2048, 6144),
            ],
            norms: vec![(1, 64), (3, 2048), (17, 1024), (40, 8)],
            tables: vec![(50, 48), (7, 2048)],
            convs: vec![(48, 3, false), (300, 4, true), (2048, 3, false), (16, 2, true)],
            attentions: vec![(4, 2, 64, 16), (8, 2, 64, 32), (2, 2, 64, 16), (3, 1, 64, 48)],
            experts: vec![
                (40, 32, 4, 256, 256, true),
                (64, 8, 2, 512, 768, false),
                (40, 8, 2, 256, 72, true),
                (200, 64, 4, 256, 128, true),
                (400, 8, 2, 256, 72, true),
                (1030, 8, 2, 288, 72, false),
                (130, 16, 2, 2048, 128, true),
                (70, 16, 1, 256, 256, true),
                (130, 8, 4, 256, 256, true),
            ],
            fused: vec![(256, 512, 32, 4), (2048, 1792, 8, 4), (512, 2304, 8, 2), (96, 64, 8, 2)],
        }
    }
}

impl Options {
    pub fn new(tolerance: f64) -> Self {
        Self {
            weights: vec![DType::F32, DType::F16, DType::Bf16],
            vectors: DType::Bf16,
            kv: vec![DType::F32, DType::F16, DType::Bf16],
            tolerance,
            batch_invariant: true,
            rows: vec![1, 2, 3, 4, 7, 8, 16, 17, 33, 64],
            shapes: Shapes::any(),
        }
    }
}

/// Runs everything.
pub fn conformance<B: Backend>(backend: &mut B, options: &Options) {
    let mut suite = Suite {
        backend,
        options,
        rng: Rng(1),
    };
    suite.linear();
    suite.rows();
    suite.embedding();
    suite.conv();
    suite.attention();
    suite.experts();
    suite.fused();
    suite.sampling();
    suite.kept_tokens();
    suite.draws();
    suite.alternatives();
    suite.many_requests();
    suite.unread_samples();
    suite.sampling_state();
    suite.refusals();
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// In (-1, 1), with the 8 significant bits of bf16.
    fn value(&mut self) -> f32 {
        round(DType::Bf16, (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0)
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

fn round(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::F16 => half::f16::from_f32(x).to_f32(),
        DType::Bf16 => half::bf16::from_f32(x).to_f32(),
    }
}

fn bytes(dtype: DType, values: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => values
            .iter()
            .flat_map(|&x| half::f16::from_f32(x).to_le_bytes())
            .collect(),
        DType::Bf16 => values
            .iter()
            .flat_map(|&x| half::bf16::from_f32(x).to_le_bytes())
            .collect(),
    }
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// `[rows, k] × [n, k]ᵀ` in f64, by candle.
fn matmul(x: &[f32], w: &[f32], rows: usize, k: usize, n: usize) -> Vec<f64> {
    use candle_core::{DType, Device, Tensor};
    let tensor = |v: &[f32], shape: (usize, usize)| Tensor::from_slice(v, shape, &Device::Cpu)?.to_dtype(DType::F64);
    let product = || {
        tensor(x, (rows, k))?
            .matmul(&tensor(w, (n, k))?.t()?)?
            .flatten_all()?
            .to_vec1::<f64>()
    };
    product().expect("candle multiplies two matrices")
}

/// A piece of a sequence in a step; slot and sequence have the same number.
#[derive(Clone, Copy)]
struct Piece {
    sequence: usize,
    start: usize,
    len: usize,
    replay: usize,
    reset: bool,
}

fn piece(sequence: usize, start: usize, len: usize) -> Piece {
    Piece {
        sequence,
        start,
        len,
        replay: 0,
        reset: start == 0,
    }
}

/// Sequence s owns blocks `s + i * sequences`, in reverse order of i: neither contiguous nor ascending.
fn block_table(sequence: usize, sequences: usize, blocks: usize) -> Vec<u32> {
    (0..blocks).rev().map(|i| (sequence + i * sequences) as u32).collect()
}

fn layout(pieces: &[Piece], sequences: usize, blocks: usize, block_size: usize) -> BatchLayout {
    let mut b = BatchLayout {
        row_starts: vec![0],
        max_blocks: blocks,
        ..Default::default()
    };
    for p in pieces {
        let table = block_table(p.sequence, sequences, blocks);
        for position in p.start..p.start + p.len {
            b.token_ids.push(0);
            b.positions.push(position as u32);
            let slot = table[position / block_size] as i64 * block_size as i64 + (position % block_size) as i64;
            b.slot_mapping
                .push(if position < p.start + p.replay { -1 } else { slot });
        }
        b.row_starts.push(b.token_ids.len() as u32);
        b.context_lens.push((p.start + p.len) as u32);
        b.block_tables.extend(table);
        b.slots.push(p.sequence as u32);
        b.reset_conv.push(p.reset);
        b.feedback.push(false);
        b.logit_tokens.push(b.token_ids.len() as u32 - 1);
    }
    b
}

/// Cuts sequences of the given lengths into steps: whole, in chunks of some sizes side by side, token by token.
fn schedules(lengths: &[usize]) -> Vec<Vec<Vec<Piece>>> {
    let chunked = |chunk: &dyn Fn(usize, usize) -> usize| {
        let mut at = vec![0; lengths.len()];
        let mut steps = Vec::new();
        while at.iter().zip(lengths).any(|(a, n)| a < n) {
            let mut step = Vec::new();
            for (s, &n) in lengths.iter().enumerate() {
                let len = chunk(s, steps.len()).min(n - at[s]);
                if len > 0 {
                    step.push(piece(s, at[s], len));
                    at[s] += len;
                }
            }
            steps.push(step);
        }
        steps
    };
    vec![
        chunked(&|_, _| usize::MAX),
        chunked(&|s, step| [1, 16, 7, 33][(s + step) % 4]),
        chunked(&|s, _| if s == 0 { 1 } else { 64 }),
        lengths.iter().enumerate().map(|(s, &n)| vec![piece(s, 0, n)]).collect(),
    ]
}

struct Suite<'a, B: Backend> {
    backend: &'a mut B,
    options: &'a Options,
    rng: Rng,
}

impl<B: Backend> Suite<'_, B> {
    fn tensor(&mut self, rows: usize, cols: usize, values: &[f32]) -> B::Tensor {
        let dtype = self.backend.activation_dtype();
        let mut x = self.backend.tensor(rows, cols, dtype).expect("tensor");
        self.backend.write(&mut x, values).expect("write");
        x
    }

    fn weight(&mut self, shape: &[usize], values: &[f32], dtype: DType) -> B::Weight {
        let data = bytes(dtype, values);
        self.backend
            .weight(
                HostTensor {
                    dtype,
                    shape,
                    data: &data,
                },
                dtype,
            )
            .expect("weight")
    }

    fn read(&mut self, x: &B::Tensor, rows: usize) -> Vec<f32> {
        let mut out = Vec::new();
        self.backend.read(x, rows, &mut out).expect("read");
        out
    }

    fn close(&self, what: &str, got: &[f32], want: &[f64], cols: usize) {
        assert_eq!(got.len(), want.len(), "{what}: length");
        for (row, (got, want)) in got.chunks(cols).zip(want.chunks(cols)).enumerate() {
            let scale = want.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
            for (col, (&g, &w)) in got.iter().zip(want).enumerate() {
                let error = (f64::from(g) - w).abs() / scale;
                let limit = self.options.tolerance;
                assert!(
                    error <= limit,
                    "{what}: [{row}, {col}] is {g}, not {w} (off by {error:.1e} of {scale})"
                );
            }
        }
    }

    fn same(&self, what: &str, got: &[f32], want: &[f32]) {
        if !self.options.batch_invariant {
            return;
        }
        assert_eq!(got.len(), want.len(), "{what}: length");
        let differs = got.iter().zip(want).position(|(a, b)| a.to_bits() != b.to_bits());
        if let Some(i) = differs {
            panic!("{what}: not the same bits at {i}: {} and {}", got[i], want[i]);
        }
    }

    fn linear(&mut self) {
        let most = self.options.rows.iter().copied().max().unwrap_or(1);
        for (k, n) in self.options.shapes.products.clone() {
            for dtype in self.options.weights.clone() {
                let (x, w, bias) = (self.rng.values(most * k), self.rng.values(n * k), self.rng.values(n));
                let plain = matmul(&x, &w, most, k, n);
                let parts = [n / 3, n - n / 3];
                let (wt, bt) = if parts[0] > 0 {
                    let (a, b) = (bytes(dtype, &w[..parts[0] * k]), bytes(dtype, &w[parts[0] * k..]));
                    let parts = [
                        HostTensor {
                            dtype,
                            shape: &[parts[0], k],
                            data: &a,
                        },
                        HostTensor {
                            dtype,
                            shape: &[parts[1], k],
                            data: &b,
                        },
                    ];
                    (
                        self.backend.weight_rows(&parts, dtype).expect("weight_rows"),
                        self.weight(&[n], &bias, dtype),
                    )
                } else {
                    (self.weight(&[n, k], &w, dtype), self.weight(&[n], &bias, dtype))
                };
                for with_bias in [false, true] {
                    let want: Vec<f64> = plain
                        .iter()
                        .enumerate()
                        .map(|(i, v)| if with_bias { v + f64::from(bias[i % n]) } else { *v })
                        .collect();
                    let mut whole = Vec::new();
                    for &rows in self.options.rows.iter().rev() {
                        let what = format!("linear {rows} rows, [{n}, {k}] {dtype}, bias {with_bias}");
                        // The last rows, so that a row's place in the batch differs between sizes.
                        let xt = self.tensor(rows, k, &x[(most - rows) * k..]);
                        let mut out = self.tensor(rows, n, &vec![f32::NAN; rows * n]);
                        let b = with_bias.then_some(&bt);
                        self.backend.linear(&xt, rows, &wt, b, &mut out).expect("linear");
                        let got = self.read(&out, rows);
                        self.close(&what, &got, &want[(most - rows) * n..], n);
                        if rows == most {
                            whole = got;
                        } else if whole.len() == most * n {
                            self.same(&what, &got, &whole[(most - rows) * n..]);
                        }
                    }
                }
            }
        }
    }

    fn rows(&mut self) {
        for (rows, h) in self.options.shapes.norms.clone() {
            let (x, d, w) = (self.rng.values(rows * h), self.rng.values(rows * h), self.rng.values(h));
            let wt = self.weight(&[h], &w, self.options.vectors);
            let eps = 1e-5f32;
            let norm = |x: &[f64]| -> Vec<f64> {
                x.chunks(h)
                    .flat_map(|row| {
                        let mean = row.iter().map(|v| v * v).sum::<f64>() / h as f64;
                        let scale = 1.0 / (mean + f64::from(eps)).sqrt();
                        row.iter()
                            .zip(&w)
                            .map(move |(v, &w)| v * scale * f64::from(w))
                            .collect::<Vec<_>>()
                    })
                    .collect()
            };
            let f64s = |x: &[f32]| x.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
            let xt = self.tensor(rows, h, &x);
            let mut out = self.tensor(rows, h, &[]);
            self.backend.rms_norm(&xt, rows, &wt, eps, &mut out).expect("rms_norm");
            let got = self.read(&out, rows);
            self.close(&format!("rms_norm [{rows}, {h}]"), &got, &norm(&f64s(&x)), h);

            let sum: Vec<f64> = x.iter().zip(&d).map(|(&a, &b)| f64::from(a) + f64::from(b)).collect();
            let (mut xt, dt) = (self.tensor(rows, h, &x), self.tensor(rows, h, &d));
            self.backend
                .add_rms_norm(&mut xt, &dt, rows, &wt, eps, &mut out)
                .expect("add_rms_norm");
            let (residual, got) = (self.read(&xt, rows), self.read(&out, rows));
            self.close(&format!("add_rms_norm residual [{rows}, {h}]"), &residual, &sum, h);
            self.close(&format!("add_rms_norm [{rows}, {h}]"), &got, &norm(&sum), h);

            let gate_up: Vec<f32> = self.rng.values(rows * 2 * h).iter().map(|v| v * 8.0).collect();
            let want: Vec<f64> = gate_up
                .chunks(2 * h)
                .flat_map(|r| {
                    (0..h)
                        .map(|i| silu(f64::from(r[i])) * f64::from(r[h + i]))
                        .collect::<Vec<_>>()
                })
                .collect();
            let gt = self.tensor(rows, 2 * h, &gate_up);
            self.backend.swiglu(&gt, rows, &mut out).expect("swiglu");
            let got = self.read(&out, rows);
            self.close(&format!("swiglu [{rows}, {h}]"), &got, &want, h);
        }
    }

    fn embedding(&mut self) {
        for dtype in self.options.weights.clone() {
            for (v, h) in self.options.shapes.tables.clone() {
                let table = self.rng.values(v * h);
                let wt = self.weight(&[v, h], &table, dtype);
                let mut b = layout(&[piece(1, 0, 4), piece(0, 0, 2)], 2, 1, 16);
                b.token_ids = (0..6).map(|i| (i * 5 % v) as u32).collect();
                let mut batch = self.backend.batch(8, 4, 2).expect("batch");
                self.backend.set_batch(&mut batch, &b).expect("set_batch");
                let mut x = self.tensor(8, h, &[]);
                self.backend.embed(&wt, &batch, &mut x).expect("embed");
                let row = |id: u32| {
                    table[id as usize * h..][..h]
                        .iter()
                        .map(|&v| f64::from(v))
                        .collect::<Vec<_>>()
                };
                let want: Vec<f64> = b.token_ids.iter().flat_map(|&id| row(id)).collect();
                let got = self.read(&x, 6);
                self.close(&format!("embed [{v}, {h}] {dtype}"), &got, &want, h);
                let mut last = self.tensor(2, h, &[]);
                self.backend
                    .gather_logit_rows(&x, &batch, &mut last)
                    .expect("gather_logit_rows");
                let got = self.read(&last, 2);
                self.close(
                    "gather_logit_rows",
                    &got,
                    &[row(b.token_ids[3]), row(b.token_ids[5])].concat(),
                    h,
                );
            }
        }
    }

    fn conv(&mut self) {
        const LENGTHS: [usize; 3] = [40, 1, 17];
        for (h, taps, with_bias) in self.options.shapes.convs.clone() {
            let what = format!("short_conv {taps} taps, {h} channels");
            let (w, bias) = (self.rng.values(h * taps), self.rng.values(h));
            let (wt, bt) = (
                self.weight(&[h, 1, taps], &w, self.options.vectors),
                self.weight(&[h], &bias, self.options.vectors),
            );
            let inputs: Vec<Vec<f32>> = LENGTHS.iter().map(|n| self.rng.values(n * 3 * h)).collect();
            let stored = self.backend.activation_dtype();
            let wants: Vec<Vec<f64>> = inputs
                .iter()
                .map(|input| {
                    let n = input.len() / (3 * h);
                    let at = |t: usize, part: usize, c: usize| input[(t * 3 + part) * h + c];
                    let z = |t: usize, c: usize| f64::from(round(stored, at(t, 0, c) * at(t, 2, c)));
                    let y = |t: usize, c: usize| {
                        let past = (0..taps).filter(|k| t + 1 + k >= taps);
                        let sum: f64 = past.map(|k| f64::from(w[c * taps + k]) * z(t + 1 + k - taps, c)).sum();
                        f64::from(at(t, 1, c)) * (sum + if with_bias { f64::from(bias[c]) } else { 0.0 })
                    };
                    (0..n)
                        .flat_map(|t| (0..h).map(move |c| (t, c)))
                        .map(|(t, c)| y(t, c))
                        .collect()
                })
                .collect();
            let mut first: Option<Vec<Vec<f32>>> = None;
            // One state for all schedules: a start must forget what the slot held.
            let mut state = self.backend.conv_state(4, taps, h).expect("conv_state");
            for steps in schedules(&LENGTHS) {
                let mut outs: Vec<Vec<f32>> = vec![Vec::new(); LENGTHS.len()];
                for step in &steps {
                    let b = layout(step, LENGTHS.len(), 3, 16);
                    let tokens = b.num_tokens();
                    let mut batch = self.backend.batch(tokens, 4, 3).expect("batch");
                    self.backend.set_batch(&mut batch, &b).expect("set_batch");
                    let x: Vec<f32> = step
                        .iter()
                        .flat_map(|p| inputs[p.sequence][p.start * 3 * h..(p.start + p.len) * 3 * h].to_vec())
                        .collect();
                    let xt = self.tensor(tokens, 3 * h, &x);
                    let mut out = self.tensor(tokens, h, &[]);
                    let bias = with_bias.then_some(&bt);
                    self.backend
                        .short_conv(&xt, &wt, bias, &batch, &mut state, &mut out)
                        .expect("short_conv");
                    let got = self.read(&out, tokens);
                    for (row, p) in step.iter().enumerate() {
                        let (from, to) = (b.row_starts[row] as usize, b.row_starts[row + 1] as usize);
                        outs[p.sequence].extend(&got[from * h..to * h]);
                    }
                }
                for (got, want) in outs.iter().zip(&wants) {
                    self.close(&what, got, want, h);
                }
                match &first {
                    None => first = Some(outs),
                    Some(first) => first.iter().zip(&outs).for_each(|(a, b)| self.same(&what, b, a)),
                }
            }
        }
    }

    fn experts(&mut self) {
        for (rows, e, k, h, f, norm) in self.options.shapes.experts.clone() {
            let shape = RouteShape {
                num_experts: e,
                experts_per_token: k,
                norm_topk_prob: norm,
                routed_scaling_factor: 1.5,
            };
            for dtype in self.options.weights.clone() {
                for with_bias in [false, true] {
                    self.experts_case(&shape, rows, h, f, dtype, with_bias);
                }
            }
        }
    }

    fn experts_case(&mut self, shape: &RouteShape, rows: usize, h: usize, f: usize, dtype: DType, with_bias: bool) {
        let (e, k) = (shape.num_experts, shape.experts_per_token);
        let x = self.rng.values(rows * h);
        // Logits so large that f32 no longer tells their sigmoids apart would leave the order of experts open.
        let spread = if h > 1024 { 0.25 } else { 1.0 };
        let gate: Vec<f32> = self.rng.values(e * h).iter().map(|g| g * spread).collect();
        let bias: Vec<f32> = self.rng.values(e).iter().map(|b| b * 0.25).collect();
        let w13: Vec<Vec<f32>> = (0..e).map(|_| self.rng.values(2 * f * h)).collect();
        let w2: Vec<Vec<f32>> = (0..e).map(|_| self.rng.values(h * f)).collect();

        let logits = matmul(&x, &gate, rows, h, e);
        let mut want = vec![0.0f64; rows * h];
        for t in 0..rows {
            let scores: Vec<f64> = logits[t * e..][..e].iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect();
            let selection = |i: usize| scores[i] + if with_bias { f64::from(bias[i]) } else { 0.0 };
            let mut order: Vec<usize> = (0..e).collect();
            order.sort_by(|&a, &b| selection(b).total_cmp(&selection(a)).then(a.cmp(&b)));
            let sum: f64 = order[..k].iter().map(|&i| scores[i]).sum();
            for &i in &order[..k] {
                let weight = scores[i] * 1.5 / if shape.norm_topk_prob { sum + 1e-6 } else { 1.0 };
                let gate_up = matmul(&x[t * h..][..h], &w13[i], 1, h, 2 * f);
                let inner: Vec<f64> = (0..f).map(|j| silu(gate_up[j]) * gate_up[f + j]).collect();
                for c in 0..h {
                    let y: f64 = (0..f).map(|j| f64::from(w2[i][c * f + j]) * inner[j]).sum();
                    want[t * h + c] += weight * y;
                }
            }
        }

        let gt = self.weight(&[e, h], &gate, dtype);
        let bt = self.weight(&[e], &bias, DType::F32);
        let split = f * h;
        let pack = |v: &[f32]| bytes(dtype, v);
        let w13_bytes: Vec<[Vec<u8>; 2]> = w13.iter().map(|w| [pack(&w[..split]), pack(&w[split..])]).collect();
        let w2_bytes: Vec<Vec<u8>> = w2.iter().map(|w| pack(w)).collect();
        let (up_shape, down_shape) = ([f, h], [h, f]);
        let w13_parts: Vec<Vec<HostTensor<'_>>> = w13_bytes
            .iter()
            .map(|parts| {
                parts
                    .iter()
                    .map(|data| HostTensor {
                        dtype,
                        shape: &up_shape,
                        data,
                    })
                    .collect()
            })
            .collect();
        let w2_parts: Vec<Vec<HostTensor<'_>>> = w2_bytes
            .iter()
            .map(|data| {
                vec![HostTensor {
                    dtype,
                    shape: &down_shape,
                    data,
                }]
            })
            .collect();
        let w13t = self.backend.weight_experts(&w13_parts, dtype).expect("weight_experts");
        let w2t = self.backend.weight_experts(&w2_parts, dtype).expect("weight_experts");
        let mut routing = self.backend.routing(rows, shape, h, f).expect("routing");
        let mut whole = Vec::new();
        for n in [rows, 17, 3, 1] {
            let what = format!("moe {n} rows, {k} of {e} experts of {h} × {f}, {dtype}, bias {with_bias}");
            let xt = self.tensor(n, h, &x[(rows - n) * h..]);
            let mut out = self.tensor(n, h, &[]);
            let bias = with_bias.then_some(&bt);
            self.backend
                .moe_route(&xt, n, &gt, bias, shape, &mut routing)
                .expect("moe_route");
            self.backend
                .moe_experts(&xt, n, &w13t, &w2t, &mut routing, &mut out)
                .expect("moe_experts");
            let got = self.read(&out, n);
            // Backends that multiply in bf16 round the inner activations.
            let inner = if dtype == DType::Bf16 { 1e-2f64 } else { 0.0 };
            let options = Options {
                tolerance: self.options.tolerance.max(inner),
                ..self.options.clone()
            };
            Suite {
                backend: &mut *self.backend,
                options: &options,
                rng: Rng(0),
            }
            .close(&what, &got, &want[(rows - n) * h..], h);
            if n == rows {
                whole = got;
            } else {
                self.same(&what, &got, &whole[(rows - n) * h..]);
            }
        }
    }

    /// What does not fit is an error, not a crash.
    fn refusals(&mut self) {
        let x = self.tensor(2, 16, &[0.5; 32]);
        let mut out = self.tensor(2, 16, &[]);
        let w = self.weight(&[16, 16], &[1.0; 256], DType::F32);
        let wrong = self.weight(&[16, 8], &[1.0; 128], DType::F32);
        assert!(
            self.backend.linear(&x, 2, &wrong, None, &mut out).is_err(),
            "linear took another width"
        );
        assert!(
            self.backend.linear(&x, 3, &w, None, &mut out).is_err(),
            "linear took more rows than there are"
        );
        let mut batch = self.backend.batch(2, 2, 1).expect("batch");
        assert!(
            self.backend
                .set_batch(&mut batch, &layout(&[piece(0, 0, 3)], 1, 1, 16))
                .is_err(),
            "too many tokens"
        );
        let mut b = layout(&[piece(0, 0, 2)], 1, 1, 16);
        b.positions.pop();
        assert!(
            self.backend.set_batch(&mut batch, &b).is_err(),
            "set_batch took arrays of different lengths"
        );
        let mut sampler = self.backend.sampler(1, 16, 1).expect("sampler");
        let request = SampleRequest {
            logit_row: 0,
            slot: 0,
            output_index: 0,
            mask: None,
        };
        assert!(
            self.backend.sample(&x, &[request], &mut sampler).is_err(),
            "sampled in a slot never started"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::{CpuBackend, Isa};

    #[test]
    fn cpu_f32_on_every_instruction_set() {
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16] {
            conformance(&mut CpuBackend::with_isa(2, DType::F32, isa), &Options::new(2e-5));
        }
    }

    #[test]
    fn cpu_bf16_and_f16_activations() {
        for dtype in [DType::Bf16, DType::F16] {
            conformance(&mut CpuBackend::new(3, dtype), &Options::new(2e-5));
        }
    }

    #[test]
    fn cpu_large_products_cross_every_block_boundary() {
        let mut options = Options::new(2e-5);
        options.rows = vec![1, 5, 191, 192, 193, 400];
        options.weights = vec![DType::Bf16, DType::F32];
        let mut backend = CpuBackend::new(2, DType::F32);
        Suite {
            backend: &mut backend,
            options: &options,
            rng: Rng(9),
        }
        .linear();
    }
}
