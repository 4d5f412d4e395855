//! Parameters as the CPU kernels read them.
//!
//! A matrix `[N, K]` is stored once, in *panels* of 16 output rows, so that one 512-bit load yields one k (or, in bf16, one
//! pair of k, as the dot-product instruction wants them) for 16 outputs, and a whole product streams memory in order:
//!
//! | dtype | panel layout |
//! |---|---|
//! | f32, f16 | `[K][16]` |
//! | bf16 | `[⌈K/2⌉][16][2]`, zero behind an odd K |
//!
//! Rows behind N in the last panel are zero. Experts follow each other, each with its own padding.

use std::sync::OnceLock;

use super::buffer::Buffer;
use super::pool::{Pool, Shards};
use super::simd::{self, Bf16, Element, F16};
use crate::backend::{BackendError, DType, HostTensor, Result};

/// Output rows in a panel.
pub const PANEL: usize = 16;

/// A parameter: a vector kept as f32, or the panels of one or more matrices.
pub struct CpuWeight {
    dtype: DType,
    experts: usize,
    /// N, of each expert.
    rows: usize,
    /// K; 1 for a vector.
    cols: usize,
    storage: Storage,
    /// `[K, N]` as f32, for the few elements of conv taps; made on first use.
    transposed: OnceLock<Vec<f32>>,
}

enum Storage {
    Vector(Buffer<f32>),
    Panels(Buffer<u8>),
}

fn fail(op: &'static str, message: String) -> BackendError {
    BackendError {
        op,
        message,
        fatal: false,
    }
}

/// Bytes of a panel of K inputs.
fn panel_bytes(dtype: DType, cols: usize) -> usize {
    let k = if dtype == DType::Bf16 {
        cols.next_multiple_of(2)
    } else {
        cols
    };
    PANEL * k * dtype.size_bytes()
}

impl CpuWeight {
    /// One parameter of one or more dimensions; the dimensions after the first count as one.
    pub fn single(pool: &mut Pool, host: HostTensor<'_>, dtype: DType) -> Result<Self> {
        if host.shape.len() != 1 {
            return Self::stacked(pool, "weight", &[vec![host]], dtype);
        }
        check_bytes("weight", &host)?;
        let mut values = Buffer::zeroed(host.shape[0])?;
        for (i, v) in values.iter_mut().enumerate() {
            *v = simd::round_to(dtype, simd::load(host.dtype, host.data, i));
        }
        Ok(Self {
            dtype,
            experts: 1,
            rows: host.shape[0],
            cols: 1,
            storage: Storage::Vector(values),
            transposed: OnceLock::new(),
        })
    }

    /// `experts[e]` lists the matrices of expert e to stack over their rows.
    ///
    /// # Errors
    /// Parts of different widths, experts of different heights, or data that does not fit its shape.
    pub fn stacked(pool: &mut Pool, op: &'static str, experts: &[Vec<HostTensor<'_>>], dtype: DType) -> Result<Self> {
        let dims = |t: &HostTensor<'_>| (t.shape[0], t.shape[1..].iter().product::<usize>());
        for part in experts.iter().flatten() {
            if part.shape.is_empty() {
                return Err(fail(op, "a scalar is no matrix".into()));
            }
            check_bytes(op, part)?;
        }
        let Some(first) = experts.first().and_then(|e| e.first()) else {
            return Err(fail(op, "no parts".into()));
        };
        let cols = dims(first).1;
        let height = |e: &Vec<HostTensor<'_>>| e.iter().map(|t| dims(t).0).sum::<usize>();
        let rows = height(&experts[0]);
        for expert in experts {
            if height(expert) != rows {
                return Err(fail(op, format!("experts of {rows} and of {} rows", height(expert))));
            }
            if let Some(odd) = expert.iter().find(|t| dims(t).1 != cols) {
                return Err(fail(op, format!("parts of width {cols} and {}", dims(odd).1)));
            }
        }

        let panels = rows.div_ceil(PANEL);
        let bytes = panel_bytes(dtype, cols);
        let mut data = Buffer::<u8>::zeroed(experts.len() * panels * bytes)?;
        let shards = Shards::new(&mut data);
        pool.run(experts.len() * panels, |task, _| {
            // SAFETY: one panel per task.
            let panel = unsafe { shards.slice(task * bytes, bytes) };
            let (expert, first) = (&experts[task / panels], task % panels * PANEL);
            let mut base = 0;
            for part in expert {
                let (n, _) = dims(part);
                let (from, to) = (first.max(base), (first + PANEL).min(base + n));
                for row in from..to.max(from) {
                    let row_bytes = cols * part.dtype.size_bytes();
                    let source = &part.data[(row - base) * row_bytes..][..row_bytes];
                    pack_row(dtype, part.dtype, source, cols, row - first, panel);
                }
                base += n;
            }
        });
        let storage = Storage::Panels(data);
        Ok(Self {
            dtype,
            experts: experts.len(),
            rows,
            cols,
            storage,
            transposed: OnceLock::new(),
        })
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn experts(&self) -> usize {
        self.experts
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Panels of one expert.
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Bytes from one panel to the next.
    pub fn panel_bytes(&self) -> usize {
        panel_bytes(self.dtype, self.cols)
    }

    /// All panels.
    ///
    /// # Errors
    /// The parameter is a vector.
    pub fn matrix(&self, op: &'static str) -> Result<&[u8]> {
        match &self.storage {
            Storage::Panels(data) => Ok(data),
            Storage::Vector(_) => Err(fail(op, "the weight is a vector, not a matrix".into())),
        }
    }

    /// The values of a vector of `len`.
    ///
    /// # Errors
    /// The parameter is a matrix or has another length.
    pub fn vector(&self, op: &'static str, len: usize) -> Result<&[f32]> {
        match &self.storage {
            Storage::Vector(values) if values.len() == len => Ok(values),
            Storage::Vector(values) => Err(fail(op, format!("a vector of {} where {len} belongs", values.len()))),
            Storage::Panels(_) => Err(fail(op, "the weight is a matrix, not a vector".into())),
        }
    }

    /// Row `row` of a single matrix as f32.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let Storage::Panels(data) = &self.storage else { return };
        let panel = &data[row / PANEL * self.panel_bytes()..][..self.panel_bytes()];
        let lane = row % PANEL;
        let half = |i: usize| u16::from_le_bytes([panel[2 * i], panel[2 * i + 1]]);
        match self.dtype {
            DType::Bf16 => {
                for (pair, out) in out.chunks_mut(2).enumerate() {
                    for (j, out) in out.iter_mut().enumerate() {
                        *out = Bf16(half((pair * PANEL + lane) * 2 + j)).to_f32();
                    }
                }
            }
            DType::F16 => out
                .iter_mut()
                .enumerate()
                .for_each(|(k, out)| *out = F16(half(k * PANEL + lane)).to_f32()),
            DType::F32 => out
                .iter_mut()
                .enumerate()
                .for_each(|(k, out)| *out = simd::load(DType::F32, panel, k * PANEL + lane)),
        }
    }

    /// `[K, N]` as f32; meant for matrices of a few columns.
    pub fn transposed(&self) -> &[f32] {
        self.transposed.get_or_init(|| {
            let mut all = vec![0.0; self.rows * self.cols];
            let mut row = vec![0.0; self.cols];
            for n in 0..self.rows {
                self.read_row(n, &mut row);
                for (k, &v) in row.iter().enumerate() {
                    all[k * self.rows + n] = v;
                }
            }
            all
        })
    }
}

fn check_bytes(op: &'static str, host: &HostTensor<'_>) -> Result<()> {
    let want = host
        .shape
        .iter()
        .try_fold(host.dtype.size_bytes(), |n, &d| n.checked_mul(d));
    if want == Some(host.data.len()) {
        return Ok(());
    }
    Err(fail(
        op,
        format!("{} bytes for shape {:?} of {}", host.data.len(), host.shape, host.dtype),
    ))
}

/// Writes one row of the checkpoint into lane `lane` of its panel.
fn pack_row(dtype: DType, from: DType, source: &[u8], cols: usize, lane: usize, panel: &mut [u8]) {
    if dtype == DType::Bf16 && from == DType::Bf16 {
        for (pair, bytes) in source.chunks(4).enumerate() {
            panel[(pair * PANEL + lane) * 4..][..bytes.len()].copy_from_slice(bytes);
        }
        return;
    }
    for k in 0..cols {
        let value = simd::load(from, source, k);
        match dtype {
            DType::Bf16 => {
                let at = (k / 2 * PANEL + lane) * 4 + k % 2 * 2;
                panel[at..at + 2].copy_from_slice(&Bf16::from_f32(value).0.to_le_bytes());
            }
            DType::F16 => {
                let at = (k * PANEL + lane) * 2;
                panel[at..at + 2].copy_from_slice(&F16::from_f32(value).0.to_le_bytes());
            }
            DType::F32 => {
                let at = (k * PANEL + lane) * 4;
                panel[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_from_panels_in_every_dtype() {
        let mut pool = Pool::new(2);
        let a: Vec<f32> = (0..19 * 5).map(|i| i as f32 * 0.5 - 7.0).collect();
        let b: Vec<f32> = (0..3 * 5).map(|i| -(i as f32)).collect();
        let bytes = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (da, db) = (bytes(&a), bytes(&b));
        let part = |shape, data| HostTensor {
            dtype: DType::F32,
            shape,
            data,
        };
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let parts = vec![part(&[19, 5], &da[..]), part(&[3, 5], &db[..])];
            let w = CpuWeight::stacked(&mut pool, "weight_rows", &[parts], dtype).unwrap();
            assert_eq!((w.rows(), w.cols(), w.panels()), (22, 5, 2));
            let mut row = [0.0; 5];
            for n in 0..22 {
                w.read_row(n, &mut row);
                let want = if n < 19 {
                    &a[n * 5..n * 5 + 5]
                } else {
                    &b[(n - 19) * 5..(n - 19) * 5 + 5]
                };
                assert_eq!(row, want, "{dtype} row {n}");
            }
            assert_eq!(w.transposed()[2 * 22 + 20], b[5 + 2]);
        }
    }

    #[test]
    fn mismatched_parts_are_refused() {
        let mut pool = Pool::new(1);
        let data = [0u8; 24];
        let t = |shape, n| HostTensor {
            dtype: DType::F32,
            shape,
            data: &data[..n],
        };
        let err = |parts: &[Vec<HostTensor<'_>>], pool: &mut Pool| {
            CpuWeight::stacked(pool, "weight_rows", parts, DType::F32)
                .err()
                .map(|e| e.to_string())
        };
        assert!(
            err(&[vec![t(&[2, 3], 24), t(&[2, 2], 16)]], &mut pool)
                .unwrap()
                .contains("width 3 and 2")
        );
        assert!(
            err(&[vec![t(&[2, 3], 24)], vec![t(&[1, 3], 12)]], &mut pool)
                .unwrap()
                .contains("2 and of 1 rows")
        );
        assert!(err(&[vec![t(&[2, 3], 20)]], &mut pool).unwrap().contains("20 bytes"));
    }
}
