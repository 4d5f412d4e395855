//! Which matrix-product kernel takes which shape.

use super::driver::{Address, Arg, TensorMap};
use super::{
    CudaBackend, CudaBatch, CudaConvState, CudaTensor, CudaWeight, Norm, SPLIT_PARTIAL_BYTES, SPLIT_TILES, Value, need,
};
use crate::backend::{Backend, ConvWeights, DType, Result};

/// A tile of gemm.cu: tokens × weight rows, threads, pipeline stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    bm: usize,
    bn: usize,
    threads: usize,
    stages: usize,
}

impl Tile {
    const fn shared_bytes(self) -> usize {
        self.stages * (self.bm + self.bn) * 64 * 2
    }
}

const LARGE: Tile = Tile {
    bm: 128,
    bn: 128,
    threads: 256,
    stages: 3,
};
const MEDIUM: Tile = Tile {
    bm: 64,
    bn: 64,
    threads: 128,
    stages: 4,
};
const SMALL: Tile = Tile {
    bm: 32,
    bn: 64,
    threads: 128,
    stages: 5,
};

/// What was decided for `[m, k] × [n, k]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Product {
    /// linear_skinny.cu with this many tiles of 8 tokens.
    Skinny { tiles: usize },
    /// gemm.cu with K over this many blocks.
    Tiled { tile: Tile, splits: usize },
    /// gemm_wgmma.cu with tiles of this many tokens, K over this many blocks.
    Wide { tokens: usize, splits: usize },
}

/// Weight rows of a tile of include/wgmma.cuh, threads of a block and its shared memory.
pub(super) const WIDE_ROWS: usize = 128;
pub(super) const WIDE_THREADS: usize = 384;
pub(super) const WIDE_SHARED_BYTES: usize = 220_560;
/// From here on tiles of include/wgmma.cuh are filled well enough.
const WIDE_TOKENS: usize = 33;
/// Larger weights go there even while two groups of linear_skinny.cu could take the tokens: they would read it twice from L2.
const WIDE_WEIGHT: usize = 2048 * 2048;

/// The tile and split of gemm_wgmma.cu that a small model of its time likes best: waves of blocks, each as long as its stages
/// (tensor cores or copies, whichever takes longer), its start, its epilogue and the sums of a split K.
fn wide(m: usize, n: usize, k: usize, multiprocessors: usize) -> Product {
    const STAGE_BYTES_PER_CYCLE: usize = 48;
    const START_CYCLES: usize = 1500;
    let steps = k.div_ceil(64);
    let cycles = |tokens: usize, splits: usize| {
        let items = n.div_ceil(WIDE_ROWS) * m.div_ceil(tokens) * splits;
        let waves = items.div_ceil(multiprocessors);
        let stage = (tokens * 4).max((WIDE_ROWS + tokens) * 128 / STAGE_BYTES_PER_CYCLE);
        let sums = if splits > 1 { 2000 + tokens * 8 * splits } else { 0 };
        START_CYCLES + waves * (steps.div_ceil(splits) * stage + tokens * 8 + sums)
    };
    let room = |tokens: usize, splits: usize| {
        let tiles = n.div_ceil(WIDE_ROWS) * m.div_ceil(tokens);
        splits == 1 || (tiles * splits * WIDE_ROWS * tokens * 4 <= SPLIT_PARTIAL_BYTES && tiles * 2 <= SPLIT_TILES)
    };
    let candidates = [256, 128, 64]
        .into_iter()
        .flat_map(|tokens| (1..=8).map(move |splits| (tokens, splits)))
        .filter(|&(tokens, splits)| (splits == 1 || steps / splits >= 4) && room(tokens, splits));
    let (tokens, splits) = candidates
        .min_by_key(|&(tokens, splits)| cycles(tokens, splits))
        .unwrap_or((64, 1));
    Product::Wide { tokens, splits }
}

/// Rows of weights in a tile of include/stream.cuh.
const STREAM_ROWS: usize = 16;
/// Most tokens that linear_skinny.cu takes, in groups of what its blocks hold in registers.
const STREAM_TOKENS: usize = 64;
/// Widest row that its kernels norm for themselves, and the most tokens.
const NORM_WIDTH: usize = 2048;
const NORM_TOKENS: usize = 8;
/// Most tokens whose norm waits for its reader: the router takes it up to here.
const PENDING_TOKENS: usize = 128;

/// `StreamDepth` of include/stream.cuh.
pub(super) const fn stream_depth(tiles: usize) -> usize {
    if tiles == 1 { 6 } else { 7 }
}

/// Shared memory of `StreamShared<tiles>`: the lanes' queues and two sets of partial sums.
pub(super) const fn stream_shared_bytes(tiles: usize) -> usize {
    stream_depth(tiles) * 2 * 256 * 16 + 2 * 8 * tiles * 16 * 9 * 4
}

/// `SkinnyShared<tiles>` of linear_skinny.cu: room for a norm's weight and its sums of squares too.
const fn skinny_shared_bytes(tiles: usize) -> usize {
    stream_shared_bytes(tiles) + NORM_WIDTH * 2 + 8 * 8 * 4
}

/// Tiles of 8 tokens in a block of the smallest kernel for `tokens`.
pub(super) fn few_tiles(tokens: usize) -> Option<usize> {
    match tokens {
        0..=8 => Some(1),
        9..=16 => Some(2),
        17..=STREAM_TOKENS => Some(4),
        _ => None,
    }
}

/// Whether include/stream.cuh takes this inner dimension.
pub(super) fn streams(k: usize) -> bool {
    k.is_multiple_of(256)
}

fn choose(m: usize, n: usize, k: usize, multiprocessors: usize, has_wgmma: bool) -> Product {
    let is_wide = has_wgmma && m >= WIDE_TOKENS && (m > STREAM_TOKENS || n * k > WIDE_WEIGHT);
    if let (Some(tiles), true) = (few_tiles(m), !is_wide && streams(k) && n.is_multiple_of(STREAM_ROWS)) {
        return Product::Skinny { tiles };
    }
    if has_wgmma && m >= WIDE_TOKENS {
        return wide(m, n, k, multiprocessors);
    }
    let tiles = |t: Tile| n.div_ceil(t.bn) * m.div_ceil(t.bm);
    let tile = if m <= 32 {
        SMALL
    } else if m <= 192 || tiles(LARGE) < multiprocessors * 3 / 4 {
        MEDIUM
    } else {
        LARGE
    };
    // Too few tiles to fill the card: K is shared out, at least 256 of it to a block.
    let wanted = (multiprocessors * 2).div_ceil(tiles(tile));
    let room = SPLIT_PARTIAL_BYTES / (m * n * 4);
    let fits = tiles(tile) <= SPLIT_TILES;
    let splits = if tile == LARGE || !fits {
        1
    } else {
        wanted.min(k / 256).min(room).max(1)
    };
    Product::Tiled { tile, splits }
}

impl CudaBackend {
    fn choose(&self, m: usize, n: usize, k: usize) -> Product {
        choose(m, n, k, self.device.multiprocessors, self.has_wgmma)
    }

    /// The norm of `rows` rows at `norm.x`: left to its readers where a kernel for few tokens may be one.
    pub(super) fn norm(&mut self, norm: Norm, rows: usize, out: &mut CudaTensor) -> Result<()> {
        if rows <= PENDING_TOKENS && streams(out.cols) && out.cols <= NORM_WIDTH {
            out.value.set(Value::Normed(norm));
            return Ok(());
        }
        out.store();
        self.launch_norm(norm, rows, out)
    }

    /// Launches `<kind>[_norm]_<types>_<tiles>` of linear_skinny.cu; `more` follows the arguments that all have.
    #[expect(clippy::too_many_arguments, reason = "a kernel's arguments")]
    fn launch_skinny(
        &self,
        op: &'static str,
        kind: &str,
        types: &str,
        x: &CudaTensor,
        rows: usize,
        w: &CudaWeight,
        bias: Option<&CudaWeight>,
        out: Address,
        (n, blocks): (usize, usize),
        more: &[u64],
    ) -> Result<()> {
        let tiles = few_tiles(rows).unwrap_or(1);
        let (from, weight, eps, norm) = match x.value.get() {
            Value::Normed(norm) if rows <= NORM_TOKENS && w.cols <= NORM_WIDTH => {
                (norm.x, norm.weight, norm.eps, "_norm")
            }
            _ => {
                self.whole(op, x, rows)?;
                (x.address(), 0, 0.0, "")
            }
        };
        let bytes = self.device.exclusive(skinny_shared_bytes(tiles));
        let function = self.device.function(&format!("{kind}{norm}_{types}_{tiles}"), bytes)?;
        let mut args = vec![
            from.arg(),
            weight.arg(),
            eps.arg(),
            w.memory.address.arg(),
            bias.map_or(0, |b| b.memory.address).arg(),
            out.arg(),
            rows.arg(),
            n.arg(),
            w.cols.arg(),
        ];
        args.extend(more);
        let groups = rows.div_ceil(tiles * 8);
        let blocks = blocks.min(self.device.multiprocessors / groups);
        self.device.launch(function, [blocks, groups, 1], 256, bytes, &args)
    }

    /// `linear_residual`.
    pub(super) fn product_added(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        w: &CudaWeight,
        bias: Option<&CudaWeight>,
        residual: &CudaTensor,
        delta: &CudaTensor,
    ) -> Result<()> {
        let n = w.rows;
        if !matches!(self.choose(rows, n, w.cols), Product::Skinny { .. }) {
            return self.matrix_product(x, rows, w, bias, delta);
        }
        self.product_shape(x, rows, w, residual)?;
        self.whole("linear_residual", x, rows)?;
        self.whole("linear_residual", residual, rows)?;
        delta.value.set(Value::Added);
        let out = residual.address();
        self.launch_skinny(
            "linear_residual",
            "linear_add",
            self.suffix,
            x,
            rows,
            w,
            bias,
            out,
            (n, n / STREAM_ROWS),
            &[],
        )
    }

    /// `linear_swiglu`.
    pub(super) fn product_gated(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        w13: &CudaWeight,
        gate_up: &mut CudaTensor,
        out: &mut CudaTensor,
    ) -> Result<()> {
        let f = w13.rows / 2;
        let skinny = matches!(self.choose(rows, w13.rows, w13.cols), Product::Skinny { .. });
        if !skinny {
            self.matrix_product(x, rows, w13, None, gate_up)?;
            return self.swiglu(gate_up, rows, out);
        }
        need(
            "linear_swiglu",
            out.cols == f && rows <= out.rows && f.is_multiple_of(8),
            || format!("a width of {f} into [{}, {}]", out.rows, out.cols),
        )?;
        self.operand_shape(x, w13)?;
        out.store();
        self.launch_skinny(
            "linear_swiglu",
            "linear_swiglu",
            self.suffix,
            x,
            rows,
            w13,
            None,
            out.address(),
            (f, f / 8),
            &[],
        )
    }

    /// `linear_short_conv`.
    #[expect(clippy::too_many_arguments, reason = "the operands of the table")]
    pub(super) fn product_convolved(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        weights: ConvWeights<'_, CudaWeight>,
        batch: &CudaBatch,
        state: &mut CudaConvState,
        bcx: &mut CudaTensor,
        out: &mut CudaTensor,
    ) -> Result<()> {
        let (w, h) = (weights.in_proj, state.hidden);
        let decode = batch.tokens == batch.rows && rows == batch.rows;
        let skinny = matches!(self.choose(rows, w.rows, w.cols), Product::Skinny { .. });
        if !(decode && skinny && h.is_multiple_of(STREAM_ROWS)) {
            self.matrix_product(x, rows, w, weights.in_bias, bcx)?;
            return self.short_conv(bcx, weights.taps, weights.taps_bias, batch, state, out);
        }
        let taps = weights.taps;
        need(
            "linear_short_conv",
            w.rows == 3 * h
                && out.cols == h
                && rows <= out.rows
                && taps.dtype == self.dtype
                && taps.rows * taps.cols == h * state.taps,
            || format!("{} rows for {h} channels of {} taps", w.rows, state.taps),
        )?;
        self.operand_shape(x, w)?;
        out.store();
        let more = [
            taps.memory.address.arg(),
            weights.taps_bias.map_or(0, |b| b.memory.address).arg(),
            state.memory.address.arg(),
            batch.slots().arg(),
            batch.reset_conv().arg(),
            state.taps.arg(),
        ];
        let name = "linear_short_conv";
        let blocks = h / STREAM_ROWS;
        self.launch_skinny(
            name,
            name,
            self.suffix,
            x,
            rows,
            w,
            weights.in_bias,
            out.address(),
            (h, blocks),
            &more,
        )
    }

    fn operand_shape(&self, x: &CudaTensor, w: &CudaWeight) -> Result<()> {
        need(
            "linear",
            x.cols == w.cols && x.dtype == self.dtype && w.dtype == self.dtype,
            || format!("[.., {}] {} × [{}, {}]ᵀ {}", x.cols, x.dtype, w.rows, w.cols, w.dtype),
        )
    }

    fn product_shape(&self, x: &CudaTensor, rows: usize, w: &CudaWeight, out: &CudaTensor) -> Result<()> {
        let (n, k) = (w.rows, w.cols);
        need(
            "linear",
            x.cols == k && out.cols == n && rows <= out.rows.min(x.rows) && k.is_multiple_of(8) && n.is_multiple_of(8),
            || format!("[{rows}, {}] × [{n}, {k}]ᵀ into [{}, {}]", x.cols, out.rows, out.cols),
        )?;
        self.operand_shape(x, w)
    }

    pub(super) fn matrix_product(
        &mut self,
        x: &CudaTensor,
        rows: usize,
        w: &CudaWeight,
        bias: Option<&CudaWeight>,
        out: &CudaTensor,
    ) -> Result<()> {
        let (n, k) = (w.rows, w.cols);
        self.product_shape(x, rows, w, out)?;
        out.store();
        if rows == 0 {
            return Ok(());
        }
        let output = if out.dtype == DType::F32 { "float" } else { self.suffix };
        match self.choose(rows, n, k) {
            Product::Wide { tokens, splits } => {
                self.whole("linear", x, rows)?;
                let name = format!("gemm_wgmma_{}_{output}_{tokens}", self.suffix);
                let function = self.device.function(&name, WIDE_SHARED_BYTES)?;
                let maps = [w.expert_map(1)?, TensorMap::matrix(x.address(), rows, k, tokens / 4)?];
                let args = [
                    bias.map_or(0, |b| b.memory.address).arg(),
                    out.address().arg(),
                    self.split_partial.address.arg(),
                    self.split_arrived.address.arg(),
                    rows.arg(),
                    n.arg(),
                    k.arg(),
                    splits.arg(),
                ];
                let items = n.div_ceil(WIDE_ROWS) * rows.div_ceil(tokens) * splits;
                let grid = [items.min(self.device.multiprocessors), 1, 1];
                self.device
                    .launch_mapped(function, grid, WIDE_THREADS, WIDE_SHARED_BYTES, &maps, &args)
            }
            Product::Skinny { .. } => {
                let types = format!("{}_{output}", self.suffix);
                let out = out.address();
                self.launch_skinny(
                    "linear",
                    "linear_skinny",
                    &types,
                    x,
                    rows,
                    w,
                    bias,
                    out,
                    (n, n / STREAM_ROWS),
                    &[],
                )
            }
            Product::Tiled { tile, splits } => {
                self.whole("linear", x, rows)?;
                let (x, w, out) = (x.address().arg(), w.memory.address.arg(), out.address().arg());
                let bias = bias.map_or(0, |b| b.memory.address).arg();
                let (partial, arrived) = (self.split_partial.address.arg(), self.split_arrived.address.arg());
                let name = format!("gemm_{}_{output}_{}x{}", self.suffix, tile.bm, tile.bn);
                let function = self.device.function(&name, tile.shared_bytes())?;
                let grid = [n.div_ceil(tile.bn), rows.div_ceil(tile.bm), splits];
                let args = [x, w, bias, out, partial, arrived, rows.arg(), n.arg(), k.arg()];
                self.device
                    .launch(function, grid, tile.threads, tile.shared_bytes(), &args)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_of_the_8b_go_where_they_should() {
        assert_eq!(choose(1, 6144, 2048, 132, false), Product::Skinny { tiles: 1 });
        assert_eq!(choose(9, 6144, 2048, 132, false), Product::Skinny { tiles: 2 });
        assert_eq!(choose(32, 2048, 2048, 132, true), Product::Skinny { tiles: 4 });
        assert_eq!(
            choose(8192, 6144, 2048, 132, false),
            Product::Tiled { tile: LARGE, splits: 1 }
        );
        let wide = |m, n, k| choose(m, n, k, 132, true);
        assert_eq!(wide(64, 2048, 2048), Product::Skinny { tiles: 4 });
        assert!(matches!(wide(64, 128_000, 2048), Product::Wide { splits: 1, .. }));
        assert!(matches!(wide(33, 2048, 7168), Product::Wide { .. }));
        assert_eq!(wide(8192, 6144, 2048), Product::Wide { tokens: 256, splits: 1 });
        assert_eq!(wide(1024, 2048, 2048), Product::Wide { tokens: 128, splits: 1 });
        assert!(matches!(wide(128, 2048, 7168), Product::Wide { splits: 4.., .. }));
        // A K that no skinny kernel takes is a tile's, never refused.
        assert!(matches!(
            choose(1, 128, 96, 132, false),
            Product::Tiled { splits: 1, .. }
        ));
    }

    #[test]
    fn partial_sums_fit_their_buffer() {
        for m in 1..=512 {
            for n in [64, 2048, 6144, 14336, 128_000] {
                for k in [64, 2048, 7168] {
                    for has_wgmma in [false, true] {
                        let (bytes, splits) = match choose(m, n, k, 132, has_wgmma) {
                            Product::Skinny { .. } => continue,
                            Product::Tiled { splits, .. } => (splits * m * n * 4, splits),
                            Product::Wide { tokens, splits } => {
                                let tiles = n.div_ceil(WIDE_ROWS) * m.div_ceil(tokens);
                                assert!(splits == 1 || tiles * 2 <= SPLIT_TILES, "{m} {n} {k} {splits}");
                                assert!(splits <= k.div_ceil(64), "{m} {n} {k} {splits}: a part without a stage");
                                (splits * tiles * WIDE_ROWS * tokens * 4, splits)
                            }
                        };
                        assert!(splits == 1 || bytes <= SPLIT_PARTIAL_BYTES, "{m} {n} {k} {splits}");
                    }
                }
            }
        }
    }
}
