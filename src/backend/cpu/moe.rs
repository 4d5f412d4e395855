//! Routing and experts: tokens are grouped by expert, so that each chosen expert's weights are read once.

use super::kernels::Kernel;
use super::linear::{OperandScratch, Product, Rows, for_rows, linear};
use super::norm::swiglu;
use super::pool::{Pool, Shards};
use super::simd::{self, Isa};
use super::weight::CpuWeight;
use crate::backend::{BackendError, Result, RouteShape};

/// (token, expert) pairs whose intermediate values are held at once; more are done in waves, expert by expert.
const WAVE_PAIRS: usize = 1024;

/// Chosen experts of one layer and step, and the experts' scratch.
pub struct CpuRouting {
    pub(super) shape: RouteShape,
    pub(super) max_tokens: usize,
    pub(super) hidden: usize,
    pub(super) ffn: usize,
    /// Tokens routed last.
    rows: usize,
    /// `[T, E]` router logits.
    scores: Vec<f32>,
    /// `[T, K]` in ascending expert order.
    experts: Vec<u32>,
    /// `[T, K]`
    weights: Vec<f32>,
    /// `[E + 1]` where each expert's pairs start.
    starts: Vec<usize>,
    /// `[T · K]` token and weight of each pair, by expert, then by token.
    pair_tokens: Vec<u32>,
    /// `[T, K]` the pair of each choice.
    pair_of: Vec<u32>,
    /// `[wave, 2F]`, `[wave, F]`, `[wave, H]`
    gate_up: Vec<f32>,
    inner: Vec<f32>,
    down: Vec<f32>,
    /// Work blocks up to and with each expert of a wave.
    ends: Vec<usize>,
}

impl CpuRouting {
    pub fn new(max_tokens: usize, shape: &RouteShape, hidden: usize, ffn: usize) -> Result<Self> {
        let (e, k) = (shape.num_experts, shape.experts_per_token);
        if k == 0 || k > e {
            let message = format!("{k} of {e} experts per token");
            return Err(BackendError {
                op: "routing",
                message,
                fatal: false,
            });
        }
        let wave = (max_tokens * k).min(WAVE_PAIRS.max(max_tokens));
        Ok(Self {
            shape: *shape,
            max_tokens,
            hidden,
            ffn,
            rows: 0,
            scores: vec![0.0; max_tokens * e],
            experts: vec![0; max_tokens * k],
            weights: vec![0.0; max_tokens * k],
            starts: vec![0; e + 1],
            pair_tokens: vec![0; max_tokens * k],
            pair_of: vec![0; max_tokens * k],
            gate_up: vec![0.0; wave * 2 * ffn],
            inner: vec![0.0; wave * ffn],
            down: vec![0.0; wave * hidden],
            ends: Vec::with_capacity(e),
        })
    }
}

impl CpuRouting {
    /// Tokens routed last.
    pub fn rows(&self) -> usize {
        self.rows
    }
}

/// Chooses experts for `rows` tokens. Sizes are checked by the caller.
#[expect(
    clippy::too_many_arguments,
    reason = "the operation's own arguments and the backend's parts"
)]
pub fn route(
    pool: &mut Pool,
    isa: Isa,
    scratch: &mut OperandScratch,
    x: &[f32],
    rows: usize,
    gate: &CpuWeight,
    bias: Option<&[f32]>,
    routing: &mut CpuRouting,
) -> Result<()> {
    let RouteShape {
        num_experts: e,
        experts_per_token: k,
        norm_topk_prob,
        routed_scaling_factor,
    } = routing.shape;
    linear(pool, isa, scratch, x, rows, gate, None, &mut routing.scores[..rows * e])?;
    routing.rows = rows;
    for t in 0..rows {
        let scores = &mut routing.scores[t * e..][..e];
        scores
            .iter_mut()
            .for_each(|s| *s = 1.0 / (1.0 + simd::exp::<false>(-*s)));
        let chosen = &mut routing.experts[t * k..][..k];
        // NaN loses against everything; the strict comparison leaves ties to the lower expert.
        let selection = |expert: usize| {
            let s = scores[expert] + bias.map_or(0.0, |bias| bias[expert]);
            if s.is_nan() { f32::NEG_INFINITY } else { s }
        };
        for j in 0..k {
            let free = |expert: &usize| !chosen[..j].contains(&(*expert as u32));
            let best = (0..e)
                .filter(free)
                .reduce(|a, b| if selection(b) > selection(a) { b } else { a });
            chosen[j] = best.unwrap_or(0) as u32;
        }
        chosen.sort_unstable();
        let weights = &mut routing.weights[t * k..][..k];
        for (w, &expert) in weights.iter_mut().zip(chosen.iter()) {
            *w = scores[expert as usize];
        }
        let sum: f32 = weights.iter().sum();
        let norm = if norm_topk_prob { 1.0 / (sum + 1e-6) } else { 1.0 };
        weights.iter_mut().for_each(|w| *w *= norm * routed_scaling_factor);
    }

    // Counting sort of the pairs by expert; tokens stay in order.
    routing.starts.fill(0);
    for &expert in &routing.experts[..rows * k] {
        routing.starts[expert as usize + 1] += 1;
    }
    for expert in 0..e {
        routing.starts[expert + 1] += routing.starts[expert];
    }
    for pair in 0..rows * k {
        let expert = routing.experts[pair] as usize;
        let at = routing.starts[expert];
        routing.pair_tokens[at] = (pair / k) as u32;
        routing.pair_of[pair] = at as u32;
        routing.starts[expert] += 1;
    }
    routing.starts.rotate_right(1);
    routing.starts[0] = 0;
    Ok(())
}

#[inline(always)]
fn axpy_body<const FMA: bool>(a: f32, x: &[f32], out: &mut [f32]) {
    for (o, &x) in out.iter_mut().zip(x) {
        *o = simd::fma::<FMA>(a, x, *o);
    }
}

simd::versions! {
    fn axpy(a: f32, x: &[f32], out: &mut [f32]) = axpy_body
}

/// The weighted sum over each routed token's experts, in ascending expert order. Sizes are checked by the caller.
#[expect(
    clippy::too_many_arguments,
    reason = "the operation's own arguments and the backend's parts"
)]
pub fn experts(
    pool: &mut Pool,
    isa: Isa,
    scratch: &mut [OperandScratch; 2],
    x: &[f32],
    w13: &CpuWeight,
    w2: &CpuWeight,
    routing: &mut CpuRouting,
    out: &mut [f32],
) -> Result<()> {
    let CpuRouting {
        shape,
        hidden,
        ffn,
        rows,
        experts,
        weights,
        starts,
        pair_tokens,
        pair_of,
        ..
    } = routing;
    let (e, k, rows, hidden, ffn) = (shape.num_experts, shape.experts_per_token, *rows, *hidden, *ffn);
    let [scratch_x, scratch_inner] = scratch;
    let up = Kernel::choose(isa, w13.dtype());
    let down = Kernel::choose(isa, w2.dtype());
    let x = scratch_x.rows(pool, isa, &up, x, rows, hidden);
    out[..rows * hidden].fill(0.0);

    let mut first = 0;
    while first < e {
        // Whole experts while they fit; one alone always does, with at most one pair per token.
        let base = starts[first];
        let mut last = first + 1;
        while last < e && starts[last + 1] - base <= WAVE_PAIRS {
            last += 1;
        }
        let pairs = starts[last] - base;
        if pairs > 0 {
            let groups = &starts[first..=last];
            let tokens = &pair_tokens[base..base + pairs];
            grouped(
                pool,
                up,
                x.gathered(tokens),
                groups,
                w13,
                first,
                &mut routing.ends,
                &mut routing.gate_up,
            )?;
            swiglu(pool, isa, &routing.gate_up, pairs, ffn, &mut routing.inner);
            let inner = scratch_inner.rows(pool, isa, &down, &routing.inner, pairs, ffn);
            grouped(
                pool,
                down,
                inner,
                groups,
                w2,
                first,
                &mut routing.ends,
                &mut routing.down,
            )?;

            let sum = Shards::new(out);
            for_rows(pool, rows, k * hidden, |t| {
                // SAFETY: one token each.
                let sum = unsafe { sum.slice(t * hidden, hidden) };
                for j in t * k..(t + 1) * k {
                    if (first..last).contains(&(experts[j] as usize)) {
                        let pair = pair_of[j] as usize - base;
                        axpy(isa, weights[j], &routing.down[pair * hidden..][..hidden], sum);
                    }
                }
            });
        }
        first = last;
    }
    Ok(())
}

/// For each expert `first_expert + i`, rows `starts[i]..starts[i + 1]` (counted from `starts[0]`) of `x` times its matrix.
#[expect(clippy::too_many_arguments, reason = "one product per expert")]
fn grouped(
    pool: &mut Pool,
    kernel: Kernel,
    x: Rows<'_>,
    starts: &[usize],
    w: &CpuWeight,
    first_expert: usize,
    ends: &mut Vec<usize>,
    out: &mut [f32],
) -> Result<()> {
    w.matrix("moe_experts")?;
    let out = Shards::new(out);
    let product = |group: usize| {
        let (from, to) = (starts[group] - starts[0], starts[group + 1] - starts[0]);
        let out = out.as_ptr().wrapping_add(from * w.rows());
        // SAFETY: each expert's pairs are its own rows of `out`.
        unsafe { Product::new(kernel, x.skip(from), to - from, w, first_expert + group, None, out) }
    };
    let mut blocks = 0;
    ends.clear();
    for group in 0..starts.len() - 1 {
        blocks += product(group)?.blocks();
        ends.push(blocks);
    }
    let ends = &*ends;
    pool.run(blocks, |block, _| {
        let group = ends.partition_point(|&end| end <= block);
        let before = if group == 0 { 0 } else { ends[group - 1] };
        if let Ok(product) = product(group) {
            product.run_block(block - before);
        }
    });
    Ok(())
}
