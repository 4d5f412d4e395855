//! Routing and experts: which kernel takes which number of tokens.

use std::sync::Arc;

use super::driver::{Arg, Device, Memory, TensorMap};
use super::linear::{WIDE_SHARED_BYTES, WIDE_THREADS, stream_depth, stream_shared_bytes, streams};
use super::{CudaBackend, CudaTensor, CudaWeight, Value, need};
use crate::backend::{DType, Result, RouteShape};

/// Up to here an expert has so few tokens that reading its weights once is all that counts (moe_skinny.cu); with and without wgmma.
const SKINNY_TOKENS: [usize; 2] = [64, 128];
/// MAX_PAIRS of moe_skinny.cu.
const SKINNY_PAIRS: usize = 1024;
/// Tokens that a block of moe_route takes at a time, at most, and the shared memory that every card has for them.
const ROUTE_GROUP: usize = 8;
const ROUTE_THREADS: usize = 512;
const ROUTE_SHARED_BYTES: usize = 96 << 10;
/// What moe_route brings to L2 of the experts' weights while memory idles.
const ROUTE_AHEAD_BYTES: usize = 16 << 20;

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
            h: memory(pairs * ffn * dtype.size_bytes())?,
            delta: memory(pairs * hidden * dtype.size_bytes())?,
        })
    }
}

/// Shared memory of moe_skinny.cu's `ExpertShared<tiles>`.
const fn expert_shared_bytes(tiles: usize) -> usize {
    stream_shared_bytes(tiles) + 64 * 4 + SKINNY_PAIRS + 8 * tiles * 8 * 4
}

/// `AddShared`.
const ADD_SHARED_BYTES: usize =
    stream_depth(1) * 3 * 256 * 16 + 2 * 8 * 16 * 9 * 4 + 64 * 4 + SKINNY_PAIRS + 8 * 8 * 4 + 8 * 16 * 4;

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

/// Pairs that a tile of moe_wgmma.cu takes: an expert's usual number fits one tile, up to the largest.
fn wide_pairs(tokens: usize, shape: &RouteShape) -> usize {
    match tokens * shape.experts_per_token / shape.num_experts {
        0..=40 => 64,
        41..=96 => 128,
        _ => 256,
    }
}

impl CudaBackend {
    /// Whether moe_skinny.cu takes a step of `rows` tokens, which needs no lists.
    fn few(&self, r: &CudaRouting, rows: usize) -> bool {
        let fits = |inner: usize| streams(inner) && inner <= 2048;
        let most = SKINNY_TOKENS[usize::from(!self.has_wgmma)];
        rows <= most && rows * r.shape.experts_per_token <= SKINNY_PAIRS && fits(r.hidden) && fits(r.ffn)
    }

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
        let bias = bias.map_or(0, |b| b.memory.address).arg();
        need("moe_route", rows <= x.rows, || {
            format!("{rows} rows of a tensor of {}", x.rows)
        })?;
        let (from, norm, eps) = match x.value.get() {
            Value::Normed(norm) => (norm.x, norm.weight, norm.eps),
            _ => {
                self.whole("moe_route", x, rows)?;
                (x.address(), 0, 0.0)
            }
        };
        // With three pairs an expert hardly any is left out.
        let (ahead, ahead_bytes) = match self.soon.take() {
            Some((address, bytes)) if rows * k >= 3 * e => (address, bytes.min(ROUTE_AHEAD_BYTES)),
            _ => (0, 0),
        };
        let blocks = self.device.multiprocessors;
        let (norm_bytes, token_bytes) = (r.hidden * 2, (r.hidden + 32) * 2 + (ROUTE_THREADS / 32 + 1) * e * 4);
        let room = ROUTE_SHARED_BYTES.saturating_sub(norm_bytes) / token_bytes;
        let group = rows.div_ceil(blocks).clamp(1, room.clamp(1, ROUTE_GROUP));
        let args = [
            from.arg(),
            norm.arg(),
            eps.arg(),
            x.address().arg(),
            gate.memory.address.arg(),
            bias,
            r.pair_weight.address.arg(),
            r.pair_expert.address.arg(),
            rows.arg(),
            group.arg(),
            r.hidden.arg(),
            e.arg(),
            k.arg(),
            shape.norm_topk_prob.arg(),
            shape.routed_scaling_factor.arg(),
            ahead.arg(),
            ahead_bytes.arg(),
        ];
        x.store();
        let bytes = norm_bytes + group * token_bytes;
        self.device.launch(
            self.kernel("moe_route", bytes)?,
            [rows.div_ceil(group).min(blocks), 1, 1],
            ROUTE_THREADS,
            bytes,
            &args,
        )?;
        if !self.few(r, rows) {
            let args = [
                r.pair_expert.address.arg(),
                r.sorted_pairs.address.arg(),
                r.offsets.address.arg(),
                (rows * k).arg(),
                e.arg(),
            ];
            self.device
                .launch(self.device.function("moe_lists", 0)?, [e, 1, 1], 1024, 0, &args)?;
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "the operands of the table")]
    pub(super) fn experts(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        w13: &CudaWeight,
        w2: &CudaWeight,
        r: &mut CudaRouting,
        residual: Option<&mut CudaTensor>,
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
        if self.few(r, rows) {
            return self.few_experts(x, rows, w13, w2, r, residual, out);
        }
        if self.has_wgmma {
            self.whole("moe_experts", x, rows)?;
            out.value.set(Value::Parts {
                from: r.delta.address,
                count: k,
            });
            return self.experts_wide(x, rows, w13, w2, r);
        }
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
        out.value.set(Value::Parts {
            from: r.delta.address,
            count: k,
        });
        Ok(())
    }

    /// moe_skinny.cu: w13, then w2, added to the residual by up to 8 tokens, else left in parts.
    #[expect(clippy::too_many_arguments, reason = "the operands of the table")]
    fn few_experts(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        w13: &CudaWeight,
        w2: &CudaWeight,
        r: &mut CudaRouting,
        residual: Option<&mut CudaTensor>,
        out: &mut CudaTensor,
    ) -> Result<()> {
        let k = r.shape.experts_per_token;
        let (h, f) = (r.hidden, r.ffn);
        let args = |x: u64, w: &CudaWeight, out: u64, n: usize, inner: usize| {
            [
                x,
                w.memory.address.arg(),
                r.pair_expert.address.arg(),
                r.pair_weight.address.arg(),
                out,
                rows.arg(),
                n.arg(),
                inner.arg(),
                k.arg(),
            ]
        };
        // An expert that has more tokens than a block holds takes another pass over its weights: several times its share is common.
        let share = if rows <= 8 { 1 } else { rows * k / r.shape.num_experts };
        let tiles = match share {
            0..=2 => 1,
            3..=8 => 2,
            _ => 4,
        };
        let bytes = self.device.exclusive(expert_shared_bytes(tiles));
        let groups = (rows * k).min(r.shape.num_experts);
        let launch = |name: &str, rows: usize, bytes: usize, args: &[u64]| {
            let blocks = rows.min(self.device.multiprocessors);
            self.device
                .launch(self.device.function(name, bytes)?, [blocks, 1, 1], 256, bytes, args)
        };
        launch(
            &format!("moe_w13_skinny_{}_{tiles}", self.suffix),
            groups * f / 8,
            bytes,
            &args(x.address().arg(), w13, r.h.address.arg(), f, h),
        )?;
        if let (Some(residual), true) = (residual, rows <= 8) {
            self.whole("moe_experts", residual, rows)?;
            out.value.set(Value::Added);
            return launch(
                &format!("moe_w2_add_{}", self.suffix),
                h / 16,
                self.device.exclusive(ADD_SHARED_BYTES),
                &args(r.h.address.arg(), w2, residual.address().arg(), h, f),
            );
        }
        out.value.set(Value::Parts {
            from: r.delta.address,
            count: k,
        });
        launch(
            &format!("moe_w2_skinny_{}_{tiles}", self.suffix),
            groups * h / 16,
            bytes,
            &args(r.h.address.arg(), w2, r.delta.address.arg(), h, f),
        )
    }

    /// moe_wgmma.cu: both products over persistent tiles; h stands in the lists' order.
    fn experts_wide(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        w13: &CudaWeight,
        w2: &CudaWeight,
        r: &CudaRouting,
    ) -> Result<()> {
        let (e, k, h, f) = (r.shape.num_experts, r.shape.experts_per_token, r.hidden, r.ffn);
        let pairs = wide_pairs(rows, &r.shape);
        let lists = [r.sorted_pairs.address.arg(), r.offsets.address.arg()];
        let launch = |name: &str, maps: &[TensorMap], args: &[u64]| {
            let name = format!("moe_{name}_wgmma_{}_{pairs}", self.suffix);
            let function = self.device.function(&name, WIDE_SHARED_BYTES)?;
            let grid = [self.device.multiprocessors, 1, 1];
            self.device
                .launch_mapped(function, grid, WIDE_THREADS, WIDE_SHARED_BYTES, maps, args)
        };
        let (mid, x) = (r.h.address.arg(), x.address().arg());
        let args = [x, lists[0], lists[1], mid, f.arg(), h.arg(), k.arg(), e.arg()];
        launch("w13", &[w13.gated_map(e)?], &args)?;
        let maps = [
            w2.expert_map(e)?,
            TensorMap::matrix(r.h.address, rows * k, f, pairs / 4)?,
        ];
        let (weight, delta) = (r.pair_weight.address.arg(), r.delta.address.arg());
        launch(
            "w2",
            &maps,
            &[lists[0], lists[1], weight, delta, h.arg(), f.arg(), e.arg()],
        )
    }
}
