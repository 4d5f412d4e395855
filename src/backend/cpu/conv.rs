//! The gated short convolution with its per-slot states.

use super::pool::{Pool, Shards};
use super::simd::{self, Bf16, Element, F16, Isa};
use crate::backend::{BatchLayout, DType, PADDING_SLOT};

/// Channels per task.
const CHANNELS: usize = 256;
/// Most taps L; all models have 3.
pub const MAX_TAPS: usize = 8;

/// Conv states of one layer: `[slots, L - 1, H]` f32, rounded to the activation type.
pub struct CpuConvState {
    pub(super) slots: usize,
    pub(super) history: usize,
    pub(super) hidden: usize,
    pub(super) data: super::buffer::Buffer<f32>,
}

#[cfg(test)]
impl CpuConvState {
    /// A slot's `[L - 1, H]`, the oldest first.
    pub fn slot(&self, slot: usize) -> &[f32] {
        let len = self.history * self.hidden;
        &self.data[slot * len..][..len]
    }
}

/// `z = b ⊙ x`, rounded to `T`.
#[inline(always)]
fn gate_body<const FMA: bool, T: Element>(b: &[f32], x: &[f32], z: &mut [f32]) {
    for ((z, &b), &x) in z.iter_mut().zip(b).zip(x) {
        *z = T::from_f32(b * x).to_f32();
    }
}

/// `acc += taps ⊙ z`.
#[inline(always)]
fn tap_body<const FMA: bool>(taps: &[f32], z: &[f32], acc: &mut [f32]) {
    for ((a, &w), &z) in acc.iter_mut().zip(taps).zip(z) {
        *a = simd::fma::<FMA>(w, z, *a);
    }
}

/// `out *= c`.
#[inline(always)]
fn scale_body<const FMA: bool>(c: &[f32], out: &mut [f32]) {
    for (o, &c) in out.iter_mut().zip(c) {
        *o *= c;
    }
}

simd::versions! {
    fn gate<T: Element>(b: &[f32], x: &[f32], z: &mut [f32]) = gate_body
}
simd::versions! {
    fn tap(taps: &[f32], z: &[f32], acc: &mut [f32]) = tap_body
}
simd::versions! {
    fn scale(c: &[f32], out: &mut [f32]) = scale_body
}

/// `taps` is `[L, H]` (transposed); `state_dtype` is what stored columns are rounded to. z of the row's own tokens is
/// rounded likewise before it is used, so that results do not depend on where a prefill was cut.
#[expect(
    clippy::too_many_arguments,
    reason = "the operation's own arguments and the backend's parts"
)]
pub fn short_conv(
    pool: &mut Pool,
    isa: Isa,
    bcx: &[f32],
    taps: &[f32],
    bias: Option<&[f32]>,
    batch: &BatchLayout,
    state: &mut CpuConvState,
    state_dtype: DType,
    out: &mut [f32],
) {
    let (hidden, history) = (state.hidden, state.history);
    let chunks = hidden.div_ceil(CHANNELS);
    let (out, states) = (Shards::new(out), Shards::new(&mut state.data));
    pool.run(batch.num_rows() * chunks, |task, _| {
        let (row, c0) = (task / chunks, task % chunks * CHANNELS);
        let n = (hidden - c0).min(CHANNELS);
        let is_padding = batch.slots[row] == PADDING_SLOT;
        let slot = batch.slots[row] as usize;
        let past = |k: usize| (slot * history + k) * hidden + c0;
        // The last L columns of z in a ring; the oldest is overwritten by each new token.
        let mut ring = [[0.0f32; CHANNELS]; MAX_TAPS];
        if !batch.reset_conv[row] && !is_padding {
            for (k, z) in ring.iter_mut().take(history).enumerate() {
                // SAFETY: a slot is in at most one row, and a chunk belongs to one task.
                z[..n].copy_from_slice(unsafe { states.slice(past(k), n) });
            }
        }
        let mut newest = history;
        for t in batch.row_starts[row] as usize..batch.row_starts[row + 1] as usize {
            let token = &bcx[t * 3 * hidden..][..3 * hidden];
            let part = |i: usize| &token[i * hidden + c0..][..n];
            // SAFETY: one token's chunk of one task.
            let y = unsafe { out.slice(t * hidden + c0, n) };
            let z = &mut ring[newest][..n];
            match state_dtype {
                DType::F32 => gate::<f32>(isa, part(0), part(2), z),
                DType::F16 => gate::<F16>(isa, part(0), part(2), z),
                DType::Bf16 => gate::<Bf16>(isa, part(0), part(2), z),
            }
            match bias {
                Some(bias) => y.copy_from_slice(&bias[c0..][..n]),
                None => y.fill(0.0),
            }
            for k in 0..=history {
                let z = &ring[(newest + 1 + k) % (history + 1)];
                tap(isa, &taps[k * hidden + c0..][..n], &z[..n], y);
            }
            scale(isa, part(1), y);
            newest = (newest + 1) % (history + 1);
        }
        if is_padding {
            return;
        }
        for k in 0..history {
            // SAFETY: as above.
            unsafe { states.slice(past(k), n) }.copy_from_slice(&ring[(newest + 1 + k) % (history + 1)][..n]);
        }
    });
}
