//! Matrix products `out = x · wᵀ (+ bias)` over panels, from one decode row to a whole prefill.
//!
//! Cost: each weight byte crosses the memory bus once per 192 rows; 2·rows·K·N flops.

use super::kernels::{Kernel, MAX_MR, MAX_NR, Operand, Start, Tile, round_row};
use super::pool::{Pool, Shards};
use super::simd::{Bf16, Isa};
use super::weight::{CpuWeight, PANEL};
use crate::backend::{BackendError, DType, Result};

/// Token rows that share one pass over a panel group: their operand (768 KB in bf16 at K = 2048) stays in L2/L3.
const ROW_BLOCK: usize = 192;
/// k per pass when several row tiles share the panels: 4 panels of 256 k are 32 KB in bf16, the first tile brings them
/// into the cache for the others.
const K_BLOCK: usize = 256;
/// How far ahead of the reads each panel's stream is prefetched when each weight is used once.
const PREFETCH_BYTES: usize = 2048;

/// Token rows as a kernel reads them, possibly gathered.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    first: *const u8,
    stride_bytes: usize,
    element_bytes: usize,
    /// Row i of the product is row `index[i]` here.
    index: Option<&'a [u32]>,
}

// SAFETY: a shared read-only view.
unsafe impl Send for Rows<'_> {}
// SAFETY: as above.
unsafe impl Sync for Rows<'_> {}

impl<'a> Rows<'a> {
    pub fn gathered(self, index: &'a [u32]) -> Self {
        Self {
            index: Some(index),
            ..self
        }
    }

    /// The rows from `n` on.
    pub fn skip(self, n: usize) -> Self {
        match self.index {
            Some(index) => Self {
                index: Some(&index[n..]),
                ..self
            },
            None => Self {
                first: self.first.wrapping_add(n * self.stride_bytes),
                ..self
            },
        }
    }

    fn row(&self, i: usize) -> *const u8 {
        let row = self.index.map_or(i, |index| index[i] as usize);
        self.first.wrapping_add(row * self.stride_bytes)
    }
}

/// Room for operands in bf16; grows to the largest product and stays.
#[derive(Default)]
pub struct OperandScratch(Vec<Bf16>);

impl OperandScratch {
    /// Rows of `[rows, k]` f32 in the form that `kernel` takes.
    pub fn rows<'a>(
        &'a mut self,
        pool: &mut Pool,
        isa: Isa,
        kernel: &Kernel,
        x: &'a [f32],
        rows: usize,
        k: usize,
    ) -> Rows<'a> {
        match kernel.operand {
            Operand::F32 => Rows {
                first: x.as_ptr().cast(),
                stride_bytes: k * 4,
                element_bytes: 4,
                index: None,
            },
            Operand::Bf16 => {
                let stride = k.next_multiple_of(2);
                if self.0.len() < rows * stride {
                    self.0.resize(rows * stride, Bf16(0));
                }
                let shards = Shards::new(&mut self.0[..rows * stride]);
                for_rows(pool, rows, k, |row| {
                    // SAFETY: one row each.
                    round_row(isa, &x[row * k..][..k], unsafe { shards.slice(row * stride, stride) });
                });
                Rows {
                    first: self.0.as_ptr().cast(),
                    stride_bytes: stride * 2,
                    element_bytes: 2,
                    index: None,
                }
            }
        }
    }
}

/// Runs `job` for every row; on all threads once the rows carry some work.
pub fn for_rows(pool: &mut Pool, rows: usize, cols: usize, job: impl Fn(usize) + Sync) {
    const ELEMENTS_PER_TASK: usize = 16 * 1024;
    let per_task = (ELEMENTS_PER_TASK / cols.max(1)).max(1);
    pool.run(rows.div_ceil(per_task), |task, _| {
        (task * per_task..rows.min((task + 1) * per_task)).for_each(&job)
    });
}

/// One product, ready to be cut into blocks.
pub struct Product<'a> {
    kernel: Kernel,
    x: Rows<'a>,
    rows: usize,
    panels: &'a [u8],
    panel_bytes: usize,
    /// Bytes of one k of a panel.
    k_bytes: usize,
    cols: usize,
    k: usize,
    bias: Option<&'a [f32]>,
    out: *mut f32,
    out_stride: usize,
}

// SAFETY: blocks write disjoint parts of `out`.
unsafe impl Send for Product<'_> {}
// SAFETY: as above.
unsafe impl Sync for Product<'_> {}

impl<'a> Product<'a> {
    /// Rows `x[..rows]` times expert `expert` of `w`, to `out` `[rows, w.rows()]`.
    ///
    /// # Errors
    /// `w` is a vector.
    ///
    /// # Safety
    /// `x` has `rows` rows of `w.cols()`; `out` outlives the product and nobody else touches it.
    pub unsafe fn new(
        kernel: Kernel,
        x: Rows<'a>,
        rows: usize,
        w: &'a CpuWeight,
        expert: usize,
        bias: Option<&'a [f32]>,
        out: *mut f32,
    ) -> Result<Self> {
        let bytes = w.panels() * w.panel_bytes();
        Ok(Self {
            kernel,
            x,
            rows,
            panels: &w.matrix("linear")?[expert * bytes..][..bytes],
            panel_bytes: w.panel_bytes(),
            k_bytes: PANEL * w.dtype().size_bytes(),
            cols: w.rows(),
            k: w.cols(),
            bias,
            out,
            out_stride: w.rows(),
        })
    }

    fn panel_count(&self) -> usize {
        self.cols.div_ceil(PANEL)
    }

    /// Blocks that cover the product.
    pub fn blocks(&self) -> usize {
        self.rows.div_ceil(ROW_BLOCK) * self.panel_count().div_ceil(MAX_NR)
    }

    /// Computes block `block`.
    pub fn run_block(&self, block: usize) {
        let groups = self.panel_count().div_ceil(MAX_NR);
        let (row_block, group) = (block / groups, block % groups);
        let first_row = row_block * ROW_BLOCK;
        let rows = (self.rows - first_row).min(ROW_BLOCK);
        let mut panel = group * MAX_NR;
        let last_panel = (panel + MAX_NR).min(self.panel_count());
        while panel < last_panel {
            let left = last_panel - panel;
            let nr = [4, 2, 1]
                .into_iter()
                .find(|&n| n <= left && n <= self.kernel.max_nr)
                .unwrap_or(1);
            self.run_panels(first_row, rows, panel, nr);
            panel += nr;
        }
    }

    fn run_panels(&self, first_row: usize, rows: usize, panel: usize, nr: usize) {
        let tiles = rows.div_ceil(MAX_MR);
        let k_block = if tiles == 1 { self.k } else { K_BLOCK };
        let first_column = panel * PANEL;
        let mut tile = Tile {
            x: [std::ptr::null(); MAX_MR],
            w: [std::ptr::null(); MAX_NR],
            k: 0,
            out: [std::ptr::null_mut(); MAX_MR],
            start: self
                .bias
                .map_or(Start::Zero, |bias| Start::Bias(bias[first_column..].as_ptr())),
            last_columns: (self.cols - (panel + nr - 1) * PANEL).min(PANEL),
            prefetch_bytes: 0,
        };
        let mut k = 0;
        loop {
            tile.k = (self.k - k).min(k_block);
            for n in 0..nr {
                tile.w[n] = self.panels[(panel + n) * self.panel_bytes + k * self.k_bytes..].as_ptr();
            }
            for t in 0..tiles {
                // With one tile the loads run ahead of themselves; with several the first fetches the next k block's
                // weights while the others compute on this one's.
                tile.prefetch_bytes = match (tiles, t) {
                    (1, _) => PREFETCH_BYTES,
                    (_, 0) => k_block * self.k_bytes,
                    _ => 0,
                };
                // Tiles of even height: 7 rows are 4 + 3, not 6 + 1.
                let (from, to) = (rows * t / tiles, rows * (t + 1) / tiles);
                for m in 0..to - from {
                    let row = first_row + from + m;
                    tile.x[m] = self.x.row(row).wrapping_add(k * self.x.element_bytes);
                    tile.out[m] = self.out.wrapping_add(row * self.out_stride + first_column);
                }
                // SAFETY: rows, panels and k are inside the product; blocks are disjoint.
                unsafe { self.kernel.run(to - from, nr, &tile) };
            }
            tile.start = Start::Continue;
            k += tile.k;
            if k >= self.k {
                return;
            }
        }
    }
}

/// The checked operation.
#[expect(
    clippy::too_many_arguments,
    reason = "the operation's own arguments and the backend's parts"
)]
pub fn linear(
    pool: &mut Pool,
    isa: Isa,
    scratch: &mut OperandScratch,
    x: &[f32],
    rows: usize,
    w: &CpuWeight,
    bias: Option<&CpuWeight>,
    out: &mut [f32],
) -> Result<()> {
    const OP: &str = "linear";
    if w.experts() != 1 {
        return Err(BackendError {
            op: OP,
            message: format!("{} experts, not one matrix", w.experts()),
            fatal: false,
        });
    }
    let bias = bias.map(|bias| bias.vector(OP, w.rows())).transpose()?;
    let kernel = Kernel::choose(isa, w.dtype());
    let x = scratch.rows(pool, isa, &kernel, x, rows, w.cols());
    // SAFETY: `out` is ours for this call, and the caller checked the sizes of `x` and `out`.
    let product = unsafe { Product::new(kernel, x, rows, w, 0, bias, out.as_mut_ptr())? };
    pool.run(product.blocks(), |block, _| product.run_block(block));
    Ok(())
}

/// `out[t] = table[ids[t]]`.
///
/// # Errors
/// An id outside the table.
pub fn embed(pool: &mut Pool, table: &CpuWeight, ids: &[u32], out: &mut [f32]) -> Result<()> {
    table.matrix("embed")?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= table.rows()) {
        let message = format!("token id {id} is outside the table of {}", table.rows());
        return Err(BackendError {
            op: "embed",
            message,
            fatal: false,
        });
    }
    let width = table.cols();
    let shards = Shards::new(out);
    for_rows(pool, ids.len(), 4 * width, |t| {
        // SAFETY: one row each.
        table.read_row(ids[t] as usize, unsafe { shards.slice(t * width, width) });
    });
    Ok(())
}

/// For the start log.
pub fn describe(isa: Isa) -> String {
    let name = |dtype| Kernel::choose(isa, dtype).name;
    format!(
        "linear: {} / {} / {}",
        name(DType::Bf16),
        name(DType::F16),
        name(DType::F32)
    )
}
