//! Row-wise operations: RMS norm, with and without the residual addition, and SwiGLU.

use super::linear::for_rows;
use super::pool::{Pool, Shards};
use super::simd::{self, Isa};

/// Lanes of the sum of squares: fixed, so that the reduction order depends on nothing else.
const LANES: usize = 16;

/// `1 / sqrt(mean(x²) + eps)`.
#[inline(always)]
pub fn inverse_rms<const FMA: bool>(x: &[f32], eps: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for j in 0..LANES {
            lanes[j] = simd::fma::<FMA>(chunk[j], chunk[j], lanes[j]);
        }
    }
    for (j, &v) in tail.iter().enumerate() {
        lanes[j] = simd::fma::<FMA>(v, v, lanes[j]);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for j in 0..width {
            lanes[j] += lanes[j + width];
        }
        width /= 2;
    }
    1.0 / (lanes[0] / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
fn rms_row_body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = inverse_rms::<FMA>(x, eps);
    for ((o, &v), &w) in out.iter_mut().zip(x).zip(weight) {
        *o = v * scale * w;
    }
}

#[inline(always)]
fn add_rms_row_body<const FMA: bool>(residual: &mut [f32], delta: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (r, &d) in residual.iter_mut().zip(delta) {
        *r += d;
    }
    rms_row_body::<FMA>(residual, weight, eps, out);
}

#[inline(always)]
fn swiglu_row_body<const FMA: bool>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((o, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        *o = simd::silu::<FMA>(g) * u;
    }
}

simd::versions! {
    fn rms_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = rms_row_body
}
simd::versions! {
    fn add_rms_row(residual: &mut [f32], delta: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = add_rms_row_body
}
simd::versions! {
    /// `out = silu(gate) ⊙ up`.
    pub fn swiglu_row(gate: &[f32], up: &[f32], out: &mut [f32]) = swiglu_row_body
}

/// `[rows, H]` with `H = weight.len()`.
pub fn rms_norm(pool: &mut Pool, isa: Isa, x: &[f32], rows: usize, weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    let out = Shards::new(out);
    for_rows(pool, rows, width, |row| {
        // SAFETY: one row each.
        rms_row(isa, &x[row * width..][..width], weight, eps, unsafe {
            out.slice(row * width, width)
        });
    });
}

/// `residual += delta; out = rms_norm(residual)`.
#[expect(
    clippy::too_many_arguments,
    reason = "the operation's own arguments and the backend's parts"
)]
pub fn add_rms_norm(
    pool: &mut Pool,
    isa: Isa,
    residual: &mut [f32],
    delta: &[f32],
    rows: usize,
    weight: &[f32],
    eps: f32,
    out: &mut [f32],
) {
    let width = weight.len();
    let (residual, out) = (Shards::new(residual), Shards::new(out));
    for_rows(pool, rows, width, |row| {
        // SAFETY: one row each.
        let (residual, out) = unsafe { (residual.slice(row * width, width), out.slice(row * width, width)) };
        add_rms_row(isa, residual, &delta[row * width..][..width], weight, eps, out);
    });
}

/// `[rows, 2F]` → `[rows, F]`.
pub fn swiglu(pool: &mut Pool, isa: Isa, gate_up: &[f32], rows: usize, width: usize, out: &mut [f32]) {
    let out = Shards::new(out);
    for_rows(pool, rows, 2 * width, |row| {
        let (gate, up) = gate_up[row * 2 * width..][..2 * width].split_at(width);
        // SAFETY: one row each.
        swiglu_row(isa, gate, up, unsafe { out.slice(row * width, width) });
    });
}
