//! Which matrix-product kernel takes which shape.

use super::driver::{Address, Arg};
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

/// Shared memory of `StreamShared<tiles>`: the lanes' queues and two sets of partial sums.
pub(super) const fn stream_shared_bytes(tiles: usize) -> usize {
    let depth = match tiles {
        1 => 12,
        2 => 10,
        _ => 16,
    };
    depth * 2 * 256 * 16 + 2 * 8 * tiles * 16 * 9 * 4
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

fn choose(m: usize, n: usize, k: usize, multiprocessors: usize) -> Product {
    if let (Some(tiles), true) = (few_tiles(m), streams(k) && n.is_multiple_of(STREAM_ROWS)) {
        return Product::Skinny { tiles };
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
        let bytes = skinny_shared_bytes(tiles);
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
        if !matches!(
            choose(rows, n, w.cols, self.device.multiprocessors),
            Product::Skinny { .. }
        ) {
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
        let skinny = matches!(
            choose(rows, w13.rows, w13.cols, self.device.multiprocessors),
            Product::Skinny { .. }
        );
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
        let skinny = matches!(
            choose(rows, w.rows, w.cols, self.device.multiprocessors),
            Product::Skinny { .. }
        );
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
        match choose(rows, n, k, self.device.multiprocessors) {
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
                let name = format!("gemm_{}_{output}_{}x{}", self.suffix, tile.bm, tile.bn);
                let function = self.device.function(&name, tile.shared_bytes())?;
                let grid = [n.div_ceil(tile.bn), rows.div_ceil(tile.bm), splits];
                let (partial, arrived) = (self.split_partial.address.arg(), self.split_arrived.address.arg());
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
        assert_eq!(choose(1, 6144, 2048, 132), Product::Skinny { tiles: 1 });
        assert_eq!(choose(9, 6144, 2048, 132), Product::Skinny { tiles: 2 });
        assert_eq!(choose(32, 2048, 2048, 132), Product::Skinny { tiles: 4 });
        assert_eq!(choose(8192, 6144, 2048, 132), Product::Tiled { tile: LARGE, splits: 1 });
        // A K that no skinny kernel takes is a tile's, never refused.
        assert!(matches!(choose(1, 128, 96, 132), Product::Tiled { splits: 1, .. }));
    }

    #[test]
    fn partial_sums_fit_their_buffer() {
        for m in 1..=512 {
            for n in [64, 2048, 6144, 14336, 128_000] {
                for k in [64, 2048, 7168] {
                    if let Product::Tiled { splits, .. } = choose(m, n, k, 132) {
                        assert!(
                            splits == 1 || splits * m * n * 4 <= SPLIT_PARTIAL_BYTES,
                            "{m} {n} {k} {splits}"
                        );
                    }
                }
            }
        }
    }
}
