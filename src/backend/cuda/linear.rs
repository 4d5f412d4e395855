//! Which matrix-product kernel takes which shape.

use super::driver::Arg;
use super::{CudaBackend, CudaTensor, CudaWeight, SPLIT_PARTIAL_BYTES, SPLIT_TILES, need};
use crate::backend::{DType, Result};

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

/// Rows of weights that one item of include/stream.cuh holds, and its most inner elements.
pub(super) const STREAM_ROWS: usize = 16;
const STREAM_CHUNK: usize = 1024;

/// Shared memory of `StreamShared<tiles>`: three stages of padded rows, partial sums, barriers.
pub(super) const fn stream_shared_bytes(tiles: usize) -> usize {
    3 * STREAM_ROWS * (STREAM_CHUNK * 2 + 64) + 8 * tiles * 16 * 9 * 4 + 3 * 8
}

/// Inner elements of an item: the largest part of K that fits, in 32s. None: K is no multiple of 32.
pub(super) fn stream_chunk(k: usize) -> Option<usize> {
    (k.div_ceil(STREAM_CHUNK)..=k / 32)
        .find(|chunks| k.is_multiple_of(chunks * 32))
        .map(|chunks| k / chunks)
}

fn choose(m: usize, n: usize, k: usize, multiprocessors: usize) -> Product {
    if m <= 16 && k.is_multiple_of(256) && n.is_multiple_of(STREAM_ROWS) {
        return Product::Skinny { tiles: m.div_ceil(8) };
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
    /// Blocks and shared memory for `items` items of include/stream.cuh: a block per SM on sm_90 and later, one per item
    /// before it.
    pub(super) fn stream_launch(&self, items: usize, tiles: usize) -> (usize, usize) {
        if self.device.capability >= 90 {
            (items.min(self.device.multiprocessors), stream_shared_bytes(tiles))
        } else {
            (items, 0)
        }
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
        need(
            "linear",
            x.cols == k && out.cols == n && rows <= out.rows && k.is_multiple_of(8) && n.is_multiple_of(8),
            || format!("[{rows}, {}] × [{n}, {k}]ᵀ into [{}, {}]", x.cols, out.rows, out.cols),
        )?;
        need("linear", x.dtype == self.dtype && w.dtype == self.dtype, || {
            format!("{} × {}", x.dtype, w.dtype)
        })?;
        if rows == 0 {
            return Ok(());
        }
        let output = if out.dtype == DType::F32 { "float" } else { self.suffix };
        let (x, w, out) = (x.address().arg(), w.memory.address.arg(), out.address().arg());
        let bias = bias.map_or(0, |b| b.memory.address).arg();
        match choose(rows, n, k, self.device.multiprocessors) {
            Product::Skinny { tiles } => {
                let name = format!("linear_skinny_{}_{output}_{tiles}", self.suffix);
                let (blocks, shared_bytes) = self.stream_launch(n / STREAM_ROWS, tiles);
                let function = self.device.function(&name, shared_bytes)?;
                let chunk = stream_chunk(k).unwrap_or(k);
                let args = [x, w, bias, out, rows.arg(), n.arg(), k.arg(), chunk.arg()];
                self.device.launch(function, [blocks, 1, 1], 256, shared_bytes, &args)
            }
            Product::Tiled { tile, splits } => {
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
        assert_eq!(choose(32, 2048, 2048, 132), Product::Tiled { tile: SMALL, splits: 8 });
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
