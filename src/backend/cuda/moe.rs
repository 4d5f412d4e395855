//! Routing and experts: which kernel takes which number of tokens.

use std::sync::Arc;

use super::driver::{Arg, Device, Memory};
use super::linear::{STREAM_ROWS, stream_chunk};
use super::{CudaBackend, CudaTensor, CudaWeight, need};
use crate::backend::{DType, Result, RouteShape};

/// Up to here an expert has so few tokens that reading its weights once is all that counts.
const SKINNY_TOKENS: usize = 64;
/// moe_route makes the experts' lists itself up to here; past it moe_lists does.
const ONE_BLOCK_TOKENS: usize = 16;
/// EXPERT_TILES of moe_experts.cu.
const EXPERT_TILES: usize = 2;

/// Chosen experts, their lists, and the hidden and weighted output of every (token, k) pair.
pub struct CudaRouting {
    shape: RouteShape,
    hidden: usize,
    ffn: usize,
    max_tokens: usize,
    pair_weight: Memory,
    pair_expert: Memory,
    sorted_pairs: Memory,
    offsets: Memory,
    active: Memory,
    active_count: Memory,
    h: Memory,
    delta: Memory,
}

impl CudaRouting {
    pub fn new(
        device: &Arc<Device>,
        max_tokens: usize,
        shape: &RouteShape,
        hidden: usize,
        ffn: usize,
        dtype: DType,
    ) -> Result<Self> {
        let (e, k) = (shape.num_experts, shape.experts_per_token);
        need(
            "moe",
            (8..=64).contains(&e) && e.is_multiple_of(8) && (1..=8).contains(&k) && k <= e,
            || format!("{k} of {e} experts (1 to 8 of 8 to 64, in eights, are built)"),
        )?;
        need("moe", hidden.is_multiple_of(8) && ffn.is_multiple_of(8), || {
            format!("hidden {hidden}, experts' width {ffn}")
        })?;
        let pairs = max_tokens * k;
        let memory = |bytes| Memory::new(device, bytes, "moe");
        Ok(CudaRouting {
            shape: *shape,
            hidden,
            ffn,
            max_tokens,
            pair_weight: memory(pairs * 4)?,
            pair_expert: memory(pairs * 4)?,
            sorted_pairs: memory(pairs * 4)?,
            offsets: memory((e + 1) * 4)?,
            active: memory(e * 4)?,
            active_count: memory(4)?,
            h: memory(pairs * ffn * dtype.size_bytes())?,
            delta: memory(pairs * hidden * dtype.size_bytes())?,
        })
    }
}

/// A tile of moe_experts.cu's `*_gemm`.
struct Tile {
    bm: usize,
    threads: usize,
    stages: usize,
}

impl Tile {
    const BN: usize = 128;

    fn shared_bytes(&self) -> usize {
        self.stages * (self.bm + Self::BN) * 64 * 2
    }

    fn for_tokens(tokens: usize, shape: &RouteShape) -> Tile {
        match tokens * shape.experts_per_token / shape.num_experts {
            0..=16 => Tile {
                bm: 16,
                threads: 128,
                stages: 4,
            },
            17..=96 => Tile {
                bm: 64,
                threads: 128,
                stages: 4,
            },
            _ => Tile {
                bm: 128,
                threads: 256,
                stages: 3,
            },
        }
    }
}

impl CudaBackend {
    pub(super) fn route(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        gate: &CudaWeight,
        bias: Option<&CudaWeight>,
        shape: &RouteShape,
        r: &mut CudaRouting,
    ) -> Result<()> {
        let (e, k) = (shape.num_experts, shape.experts_per_token);
        need(
            "moe_route",
            r.shape == *shape && gate.rows == e && gate.cols == r.hidden && x.cols == r.hidden && rows <= r.max_tokens,
            || {
                format!(
                    "gate [{}, {}] over x of {} for {e} experts, {rows} rows",
                    gate.rows, gate.cols, x.cols
                )
            },
        )?;
        need("moe_route", r.hidden.is_multiple_of(32), || {
            format!("hidden {} is no multiple of 32", r.hidden)
        })?;
        need(
            "moe_route",
            gate.dtype == self.dtype && bias.is_none_or(|b| b.dtype == DType::F32),
            || format!("gate in {}, bias in float32 expected", gate.dtype),
        )?;
        let args = [
            x.address().arg(),
            gate.memory.address.arg(),
            bias.map_or(0, |b| b.memory.address).arg(),
            r.pair_weight.address.arg(),
            r.pair_expert.address.arg(),
            r.sorted_pairs.address.arg(),
            r.offsets.address.arg(),
            r.active.address.arg(),
            r.active_count.address.arg(),
            rows.arg(),
            r.hidden.arg(),
            e.arg(),
            k.arg(),
            shape.norm_topk_prob.arg(),
            shape.routed_scaling_factor.arg(),
        ];
        let shared_bytes = 8 * 16 * e * 4;
        self.device.launch(
            self.kernel("moe_route", shared_bytes)?,
            [rows.div_ceil(16), 1, 1],
            256,
            shared_bytes,
            &args,
        )?;
        if rows > ONE_BLOCK_TOKENS {
            let args = [
                r.pair_expert.address.arg(),
                r.sorted_pairs.address.arg(),
                r.offsets.address.arg(),
                r.active.address.arg(),
                r.active_count.address.arg(),
                (rows * k).arg(),
                e.arg(),
            ];
            self.device
                .launch(self.device.function("moe_lists", 0)?, [e, 1, 1], 1024, 0, &args)?;
        }
        Ok(())
    }

    pub(super) fn experts(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        w13: &CudaWeight,
        w2: &CudaWeight,
        r: &mut CudaRouting,
        out: &mut CudaTensor,
    ) -> Result<()> {
        let (e, k) = (r.shape.num_experts, r.shape.experts_per_token);
        let (h, f) = (r.hidden, r.ffn);
        need(
            "moe_experts",
            w13.rows == e * 2 * f && w13.cols == h && w2.rows == e * h && w2.cols == f,
            || {
                format!(
                    "w13 [{}, {}], w2 [{}, {}] for {e} experts of {f} over {h}",
                    w13.rows, w13.cols, w2.rows, w2.cols
                )
            },
        )?;
        need(
            "moe_experts",
            w13.dtype == self.dtype && w2.dtype == self.dtype && out.cols == h && rows <= out.rows,
            || format!("{rows} rows of {} into [{}, {}]", w13.dtype, out.rows, out.cols),
        )?;
        let fits = |inner: usize| inner.is_multiple_of(256) && inner <= 2048;
        let skinny = rows <= SKINNY_TOKENS && fits(h) && fits(f) && h.is_multiple_of(STREAM_ROWS);
        let lists = [r.sorted_pairs.address.arg(), r.offsets.address.arg()];
        let (weight, mid, delta) = (r.pair_weight.address.arg(), r.h.address.arg(), r.delta.address.arg());
        // w13: x by token → h by pair; w2: h by pair → delta by pair.
        let passes = [
            ("w13", x.address().arg(), w13, mid, f, h, true),
            ("w2", mid, w2, delta, h, f, false),
        ];
        for (name, from, w, to, n, inner, gated) in passes {
            let w = w.memory.address.arg();
            let columns = if gated { 2 * n } else { n };
            if skinny {
                let groups = (rows * k).min(e);
                let (blocks, shared_bytes) = self.stream_launch(groups * columns / STREAM_ROWS, EXPERT_TILES);
                let function = self.kernel(&format!("moe_{name}_skinny"), shared_bytes)?;
                let grid = if shared_bytes > 0 {
                    [blocks, 1, 1]
                } else {
                    [columns / STREAM_ROWS, groups, 1]
                };
                let active = [r.active.address.arg(), r.active_count.address.arg()];
                let args = [
                    from,
                    w,
                    lists[0],
                    lists[1],
                    active[0],
                    active[1],
                    weight,
                    to,
                    n.arg(),
                    inner.arg(),
                    k.arg(),
                    stream_chunk(inner).unwrap_or(inner).arg(),
                ];
                self.device.launch(function, grid, 256, shared_bytes, &args)?;
            } else {
                let tile = Tile::for_tokens(rows, &r.shape);
                let name = format!("moe_{name}_gemm_{}_{}x{}", self.suffix, tile.bm, Tile::BN);
                let function = self.device.function(&name, tile.shared_bytes())?;
                let args = [
                    from,
                    w,
                    lists[0],
                    lists[1],
                    weight,
                    to,
                    n.arg(),
                    inner.arg(),
                    k.arg(),
                    e.arg(),
                ];
                let tiles = (rows * k / tile.bm + e).min(rows * k);
                self.device.launch(
                    function,
                    [columns.div_ceil(Tile::BN), tiles, 1],
                    tile.threads,
                    tile.shared_bytes(),
                    &args,
                )?;
            }
        }
        out.parts = Some((r.delta.address, k));
        Ok(())
    }
}
