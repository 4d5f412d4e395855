//! Per-head norms, rotary positions, the paged cache and causal grouped-query attention.
//!
//! A block of the cache holds, per KV head, K as `[D][P]` (16 keys are one vector of scores per dimension) and V as
//! `[P][D]` (a vector of outputs per key), each with its inner dimension padded to 16. Attention walks the context in
//! tiles of [`KEYS`] positions counted from 0 with an online softmax in f32, so a token's result does not depend on how
//! its prompt was cut, and memory does not grow with the context.

#![expect(clippy::needless_range_loop, reason = "loops over constant-size register tiles")]

use super::buffer::Buffer;
use super::norm::inverse_rms;
use super::pool::{Pool, Shards};
use super::simd::{self, Bf16, Element, F16, Isa};
use crate::backend::{AttentionShape, BackendError, BatchLayout, DType, Result};

/// Keys per softmax update.
const KEYS: usize = 64;
const LANES: usize = 16;
/// Most query vectors that share a pass over K and V in registers.
const QUERIES: usize = 4;
/// Tokens of a row that one task handles, times the query heads of a KV head.
const TOKENS: usize = 16;

/// K and V of one attention layer.
pub struct CpuKvCache {
    pub(super) blocks: usize,
    pub(super) block_size: usize,
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    storage: KvStorage,
}

enum KvStorage {
    F32(Blocks<f32>),
    F16(Blocks<F16>),
    Bf16(Blocks<Bf16>),
}

struct Blocks<T: Element> {
    /// `[blocks][heads][D][P padded]`
    k: Buffer<T>,
    /// `[blocks][heads][P][D padded]`
    v: Buffer<T>,
}

impl<T: Element> Blocks<T> {
    fn zeroed(k_len: usize, v_len: usize) -> Result<Self> {
        Ok(Self {
            k: Buffer::zeroed(k_len)?,
            v: Buffer::zeroed(v_len)?,
        })
    }
}

impl CpuKvCache {
    pub fn new(blocks: usize, block_size: usize, shape: &AttentionShape, dtype: DType) -> Result<Self> {
        let (heads, head_dim) = (shape.num_kv_heads, shape.head_dim);
        let sizes = || {
            let all = blocks.checked_mul(heads)?;
            let k = head_dim.checked_mul(block_size.checked_next_multiple_of(LANES)?)?;
            let v = block_size.checked_mul(head_dim.checked_next_multiple_of(LANES)?)?;
            Some((all.checked_mul(k)?, all.checked_mul(v)?))
        };
        let (k, v) = sizes().ok_or_else(|| BackendError {
            op: "kv_cache",
            message: format!("{blocks} blocks of {block_size} tokens do not fit in the address space"),
            fatal: false,
        })?;
        let storage = match dtype {
            DType::F32 => KvStorage::F32(Blocks::zeroed(k, v)?),
            DType::F16 => KvStorage::F16(Blocks::zeroed(k, v)?),
            DType::Bf16 => KvStorage::Bf16(Blocks::zeroed(k, v)?),
        };
        Ok(Self {
            blocks,
            block_size,
            heads,
            head_dim,
            storage,
        })
    }
}

#[cfg(test)]
impl CpuKvCache {
    /// K and V `[D]` of one head at one token of a block of an f32 cache.
    pub fn token(&self, block: usize, offset: usize, head: usize) -> (Vec<f32>, Vec<f32>) {
        let KvStorage::F32(Blocks { k, v }) = &self.storage else {
            panic!("not an f32 cache")
        };
        let at = block * self.heads + head;
        let (keys, width) = (
            self.block_size.next_multiple_of(LANES),
            self.head_dim.next_multiple_of(LANES),
        );
        let k = (0..self.head_dim)
            .map(|d| k[(at * self.head_dim + d) * keys + offset])
            .collect();
        (
            k,
            v[(at * self.block_size + offset) * width..][..self.head_dim].to_vec(),
        )
    }
}

/// cos and sin of every token of a step, computed once per step.
#[derive(Default)]
pub struct RopeTable {
    /// Step, θ and D that the table was made for.
    key: Option<(u64, u64, usize)>,
    /// `[T][D]`: D/2 cosines, then D/2 sines.
    values: Vec<f32>,
}

impl RopeTable {
    pub fn update(&mut self, step: u64, shape: &AttentionShape, positions: &[u32]) {
        let key = Some((step, shape.rope_theta.to_bits(), shape.head_dim));
        if self.key == key {
            return;
        }
        let half = shape.head_dim / 2;
        self.values.clear();
        self.values.resize(positions.len() * 2 * half, 0.0);
        for j in 0..half {
            // As Hugging Face: frequency and angle are f32.
            let frequency = (1.0 / shape.rope_theta.powf(2.0 * j as f64 / shape.head_dim as f64)) as f32;
            for (t, &position) in positions.iter().enumerate() {
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                self.values[t * 2 * half + j] = cos as f32;
                self.values[t * 2 * half + half + j] = sin as f32;
            }
        }
        self.key = key;
    }
}

/// Norms and rotates one head in place.
#[inline(always)]
fn head_body<const FMA: bool>(head: &mut [f32], weight: &[f32], eps: f32, rope: &[f32]) {
    let scale = inverse_rms::<FMA>(head, eps);
    let half = head.len() / 2;
    let (a, b) = head.split_at_mut(half);
    let (cos, sin) = rope.split_at(half);
    for j in 0..half {
        let (x, y) = (a[j] * scale * weight[j], b[j] * scale * weight[half + j]);
        a[j] = x * cos[j] - y * sin[j];
        b[j] = y * cos[j] + x * sin[j];
    }
}

simd::versions! {
    fn norm_and_rotate(head: &mut [f32], weight: &[f32], eps: f32, rope: &[f32]) = head_body
}

/// The parts of `qk_norm_rope_kv` that its backend has checked.
pub struct QkNorm<'a> {
    pub q_norm: &'a [f32],
    pub k_norm: &'a [f32],
    pub shape: &'a AttentionShape,
    pub batch: &'a BatchLayout,
    pub rope: &'a RopeTable,
}

/// Sizes are checked by the caller; slots of the cache are checked here.
pub fn qk_norm_rope_kv(
    pool: &mut Pool,
    isa: Isa,
    qkv: &mut [f32],
    norm: &QkNorm<'_>,
    kv: &mut CpuKvCache,
) -> Result<()> {
    let slots = (kv.blocks * kv.block_size) as i64;
    if let Some(slot) = norm.batch.slot_mapping.iter().find(|&&slot| slot >= slots || slot < -1) {
        let message = format!("KV slot {slot} is outside the cache of {slots}");
        return Err(BackendError {
            op: "qk_norm_rope_kv",
            message,
            fatal: false,
        });
    }
    let (heads, block_size) = (kv.heads, kv.block_size);
    match &mut kv.storage {
        KvStorage::F32(blocks) => rotate_and_store(pool, isa, qkv, norm, blocks, heads, block_size),
        KvStorage::F16(blocks) => rotate_and_store(pool, isa, qkv, norm, blocks, heads, block_size),
        KvStorage::Bf16(blocks) => rotate_and_store(pool, isa, qkv, norm, blocks, heads, block_size),
    }
    Ok(())
}

fn rotate_and_store<T: Element>(
    pool: &mut Pool,
    isa: Isa,
    qkv: &mut [f32],
    norm: &QkNorm<'_>,
    blocks: &mut Blocks<T>,
    kv_heads: usize,
    block_size: usize,
) {
    let QkNorm {
        q_norm,
        k_norm,
        shape,
        batch,
        rope,
    } = *norm;
    let (d, q_heads) = (shape.head_dim, shape.num_q_heads);
    let (key_stride, value_stride) = (block_size.next_multiple_of(LANES), d.next_multiple_of(LANES));
    let width = (q_heads + 2 * kv_heads) * d;
    let qkv = Shards::new(qkv);
    let (k_cache, v_cache) = (Shards::new(&mut blocks.k), Shards::new(&mut blocks.v));
    super::linear::for_rows(pool, batch.num_tokens(), 4 * width, |t| {
        // SAFETY: one token each.
        let token = unsafe { qkv.slice(t * width, width) };
        let rope = &rope.values[t * d..][..d];
        let (q, rest) = token.split_at_mut(q_heads * d);
        let (k, v) = rest.split_at_mut(kv_heads * d);
        q.chunks_exact_mut(d)
            .for_each(|head| norm_and_rotate(isa, head, q_norm, shape.norm_eps, rope));
        k.chunks_exact_mut(d)
            .for_each(|head| norm_and_rotate(isa, head, k_norm, shape.norm_eps, rope));
        let Ok(slot) = usize::try_from(batch.slot_mapping[t]) else {
            return;
        };
        let (block, offset) = (slot / block_size, slot % block_size);
        for head in 0..kv_heads {
            let index = block * kv_heads + head;
            for (j, &x) in k[head * d..][..d].iter().enumerate() {
                // SAFETY: the engine gives each token its own slot; a shared slot would hold the same token twice.
                unsafe { k_cache.slice((index * d + j) * key_stride + offset, 1)[0] = T::from_f32(x) };
            }
            // SAFETY: as above.
            let out = unsafe { v_cache.slice((index * block_size + offset) * value_stride, d) };
            for (o, &x) in out.iter_mut().zip(&v[head * d..][..d]) {
                *o = T::from_f32(x);
            }
        }
    });
}

/// Softmax state of the queries of one task; one per thread, reused.
#[derive(Default)]
pub struct AttentionScratch {
    /// `[queries][D]`, scaled.
    q: Vec<f32>,
    /// `[queries][D padded]`
    acc: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
    /// Context each query sees: its position + 1.
    visible: Vec<usize>,
}

/// One task: some tokens of a row under one KV head.
struct Queries<'a> {
    scratch: &'a mut AttentionScratch,
    d: usize,
    block_table: &'a [u32],
    block_size: usize,
    heads: usize,
    head: usize,
}

/// Causal attention of every token over its row's context. Sizes are checked by the caller, block tables here.
#[expect(
    clippy::too_many_arguments,
    reason = "the operation's own arguments and the backend's parts"
)]
pub fn attention(
    pool: &mut Pool,
    isa: Isa,
    scratch: &mut [AttentionScratch],
    qkv: &[f32],
    shape: &AttentionShape,
    batch: &BatchLayout,
    kv: &CpuKvCache,
    out: &mut [f32],
) -> Result<()> {
    const OP: &str = "attention";
    let fail = |message: String| BackendError {
        op: OP,
        message,
        fatal: false,
    };
    for row in 0..batch.num_rows() {
        let blocks = (batch.context_lens[row] as usize).div_ceil(kv.block_size);
        if blocks > batch.max_blocks {
            let have = batch.max_blocks;
            return Err(fail(format!(
                "row {row} needs {blocks} KV blocks, its table has {have}"
            )));
        }
        let table = &batch.block_tables[row * batch.max_blocks..][..blocks];
        if let Some(block) = table.iter().find(|&&block| block as usize >= kv.blocks) {
            return Err(fail(format!(
                "row {row}: block {block} is outside the cache of {}",
                kv.blocks
            )));
        }
        let tokens = batch.row_starts[row] as usize..batch.row_starts[row + 1] as usize;
        if let Some(p) = batch.positions[tokens].iter().find(|&&p| p >= batch.context_lens[row]) {
            return Err(fail(format!(
                "row {row}: position {p} behind its context of {}",
                batch.context_lens[row]
            )));
        }
    }
    match &kv.storage {
        KvStorage::F32(blocks) => attend(pool, isa, scratch, qkv, shape, batch, kv, blocks, out),
        KvStorage::F16(blocks) => attend(pool, isa, scratch, qkv, shape, batch, kv, blocks, out),
        KvStorage::Bf16(blocks) => attend(pool, isa, scratch, qkv, shape, batch, kv, blocks, out),
    }
    Ok(())
}

#[expect(
    clippy::too_many_arguments,
    reason = "as `attention`, with the cache's type resolved"
)]
fn attend<T: Element>(
    pool: &mut Pool,
    isa: Isa,
    scratch: &mut [AttentionScratch],
    qkv: &[f32],
    shape: &AttentionShape,
    batch: &BatchLayout,
    kv: &CpuKvCache,
    blocks: &Blocks<T>,
    out: &mut [f32],
) {
    let (d, q_heads, kv_heads) = (shape.head_dim, shape.num_q_heads, kv.heads);
    let group = q_heads / kv_heads;
    let width = (q_heads + 2 * kv_heads) * d;
    let d_padded = d.next_multiple_of(LANES);
    let tiles = |row: usize| ((batch.row_starts[row + 1] - batch.row_starts[row]) as usize).div_ceil(TOKENS);
    let tasks: usize = (0..batch.num_rows()).map(tiles).sum();
    let (out, scratch) = (Shards::new(out), Shards::new(scratch));
    pool.run(tasks * kv_heads, |task, thread| {
        let (mut tile, head) = (task / kv_heads, task % kv_heads);
        let mut row = 0;
        while tile >= tiles(row) {
            tile -= tiles(row);
            row += 1;
        }
        let first = batch.row_starts[row] as usize + tile * TOKENS;
        let tokens = first..(first + TOKENS).min(batch.row_starts[row + 1] as usize);
        // SAFETY: a thread runs one task at a time.
        let scratch = unsafe { &mut scratch.slice(thread, 1)[0] };
        let queries = tokens.len() * group;
        let padded = if queries <= 2 {
            queries
        } else {
            queries.next_multiple_of(QUERIES)
        };
        scratch.q.clear();
        scratch.q.resize(padded * d, 0.0);
        scratch.acc.clear();
        scratch.acc.resize(padded * d_padded, 0.0);
        scratch.max.clear();
        scratch.max.resize(padded, f32::NEG_INFINITY);
        scratch.sum.clear();
        scratch.sum.resize(padded, 0.0);
        scratch.visible.clear();
        for t in tokens.clone() {
            for g in 0..group {
                let q = &qkv[t * width + (head * group + g) * d..][..d];
                let at = scratch.visible.len();
                for (o, &x) in scratch.q[at * d..][..d].iter_mut().zip(q) {
                    *o = x * shape.scale;
                }
                scratch.visible.push(batch.positions[t] as usize + 1);
            }
        }
        // Padding repeats the last query's range on zeros.
        scratch
            .visible
            .resize(padded, batch.positions[tokens.end - 1] as usize + 1);

        let table = &batch.block_tables[row * batch.max_blocks..][..batch.max_blocks];
        let mut work = Queries {
            scratch,
            d,
            block_table: table,
            block_size: kv.block_size,
            heads: kv_heads,
            head,
        };
        run_queries(isa, &mut work, &blocks.k, &blocks.v);
        for (i, t) in tokens.enumerate() {
            for g in 0..group {
                // SAFETY: one token and head each.
                let out = unsafe { out.slice((t * q_heads + head * group + g) * d, d) };
                let at = i * group + g;
                let inverse = 1.0 / work.scratch.sum[at];
                for (o, &x) in out.iter_mut().zip(&work.scratch.acc[at * d_padded..][..d]) {
                    *o = x * inverse;
                }
            }
        }
    });
}

simd::versions! {
    fn run_queries<T: Element>(work: &mut Queries<'_>, k: &[T], v: &[T]) = queries_body
}

/// All queries of a task over all key tiles that any of them sees.
#[inline(always)]
fn queries_body<const FMA: bool, T: Element>(work: &mut Queries<'_>, k: &[T], v: &[T]) {
    match work.scratch.visible.len() {
        1 => tiles_of::<FMA, T, 1>(work, k, v),
        2 => tiles_of::<FMA, T, 2>(work, k, v),
        _ => tiles_of::<FMA, T, QUERIES>(work, k, v),
    }
}

/// The same, `Q` queries at a time; each query's arithmetic is its own, whatever `Q`.
#[inline(always)]
fn tiles_of<const FMA: bool, T: Element, const Q: usize>(work: &mut Queries<'_>, k: &[T], v: &[T]) {
    let d = work.d;
    let d_padded = d.next_multiple_of(LANES);
    let key_stride = work.block_size.next_multiple_of(LANES);
    let longest = work.scratch.visible.iter().copied().max().unwrap_or(0);
    let mut scores = [[0.0f32; KEYS]; Q];
    for first_key in (0..longest).step_by(KEYS) {
        for q0 in (0..work.scratch.visible.len()).step_by(Q) {
            let visible: [usize; Q] =
                std::array::from_fn(|i| work.scratch.visible[q0 + i].saturating_sub(first_key).min(KEYS));
            let keys = visible.into_iter().max().unwrap_or(0);
            if keys == 0 {
                continue;
            }
            let q = &work.scratch.q[q0 * d..][..Q * d];

            // Scores, up to 16 keys of one block at a time.
            let mut key = 0;
            while key < keys {
                let position = first_key + key;
                let (block, offset) = (position / work.block_size, position % work.block_size);
                let n = (keys - key).min(work.block_size - offset).min(LANES);
                let base = (work.block_table[block] as usize * work.heads + work.head) * d * key_stride;
                let panel = &k[base..][..d * key_stride];
                // A full vector may be read when it stays inside the padded row; scores behind n are overwritten or cut.
                let mut acc = [[0.0f32; LANES]; Q];
                if offset + LANES <= key_stride {
                    for j in 0..d {
                        let Some(row) = panel[j * key_stride + offset..].first_chunk::<LANES>() else {
                            continue;
                        };
                        for i in 0..Q {
                            let x = q[i * d + j];
                            for lane in 0..LANES {
                                acc[i][lane] = simd::fma::<FMA>(x, row[lane].to_f32(), acc[i][lane]);
                            }
                        }
                    }
                } else {
                    for j in 0..d {
                        let row = &panel[j * key_stride + offset..][..n];
                        for i in 0..Q {
                            for lane in 0..n {
                                acc[i][lane] = simd::fma::<FMA>(q[i * d + j], row[lane].to_f32(), acc[i][lane]);
                            }
                        }
                    }
                }
                for i in 0..Q {
                    scores[i][key..key + n].copy_from_slice(&acc[i][..n]);
                }
                key += n;
            }

            // Online softmax; keys that a query does not see get weight 0.
            for i in 0..Q {
                let row = &mut scores[i];
                row[visible[i]..].fill(f32::NEG_INFINITY);
                let before = work.scratch.max[q0 + i];
                let mut lanes = [f32::NEG_INFINITY; LANES];
                let (chunks, _) = row.as_chunks::<LANES>();
                for chunk in chunks {
                    for j in 0..LANES {
                        lanes[j] = lanes[j].max(chunk[j]);
                    }
                }
                let max = lanes.into_iter().fold(before, f32::max);
                if max == f32::NEG_INFINITY {
                    row.fill(0.0);
                    continue;
                }
                let mut sums = [0.0f32; LANES];
                let (chunks, _) = row.as_chunks_mut::<LANES>();
                for chunk in chunks {
                    for j in 0..LANES {
                        chunk[j] = simd::exp::<FMA>(chunk[j] - max);
                        sums[j] += chunk[j];
                    }
                }
                let mut width = LANES / 2;
                while width > 0 {
                    for j in 0..width {
                        sums[j] += sums[j + width];
                    }
                    width /= 2;
                }
                let rescale = simd::exp::<FMA>(before - max);
                work.scratch.max[q0 + i] = max;
                work.scratch.sum[q0 + i] = work.scratch.sum[q0 + i] * rescale + sums[0];
                if rescale != 1.0 {
                    work.scratch.acc[(q0 + i) * d_padded..][..d_padded]
                        .iter_mut()
                        .for_each(|x| *x *= rescale);
                }
            }

            // Weighted sum of values, 16 dimensions at a time.
            for column in (0..d_padded).step_by(LANES) {
                let mut acc = [[0.0f32; LANES]; Q];
                for i in 0..Q {
                    acc[i].copy_from_slice(&work.scratch.acc[(q0 + i) * d_padded + column..][..LANES]);
                }
                let mut key = 0;
                while key < keys {
                    let position = first_key + key;
                    let (block, offset) = (position / work.block_size, position % work.block_size);
                    let n = (keys - key).min(work.block_size - offset);
                    let base = (work.block_table[block] as usize * work.heads + work.head) * work.block_size + offset;
                    for j in 0..n {
                        let Some(row) = v[(base + j) * d_padded + column..].first_chunk::<LANES>() else {
                            continue;
                        };
                        for i in 0..Q {
                            let weight = scores[i][key + j];
                            for lane in 0..LANES {
                                acc[i][lane] = simd::fma::<FMA>(weight, row[lane].to_f32(), acc[i][lane]);
                            }
                        }
                    }
                    key += n;
                }
                for i in 0..Q {
                    work.scratch.acc[(q0 + i) * d_padded + column..][..LANES].copy_from_slice(&acc[i]);
                }
            }
        }
    }
}
