//! Parameters on the device.

use super::driver::{Memory, TensorMap};
use super::{CudaBackend, linear, need};
use crate::backend::{DType, HostTensor, Result};

/// A parameter in the checkpoint's row-major layout, `[rows, cols]` or a vector.
pub struct CudaWeight {
    pub(super) memory: Memory,
    /// Product of all dimensions but the last.
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) dtype: DType,
}

impl CudaWeight {
    /// Tensor map of `experts` matrices `[N, K]`, in boxes of a weight tile.
    pub(super) fn expert_map(&self, experts: usize) -> Result<TensorMap> {
        let (n, k) = (self.rows / experts, self.cols);
        let strides = [2, k * 2, n * k * 2];
        TensorMap::new(
            self.memory.address,
            [k, n, experts],
            strides,
            [64, linear::WIDE_ROWS as u32, 1],
        )
    }

    /// Tensor map of `experts` matrices `[w1; w3]` of `[F, K]` each, in boxes that take turns between 8 rows of either.
    pub(super) fn gated_map(&self, experts: usize) -> Result<TensorMap> {
        let (f, k) = (self.rows / experts / 2, self.cols);
        let row = k * 2;
        let strides = [2, row, f * row, 8 * row, 2 * f * row];
        let boxes = [64, 8, 2, linear::WIDE_ROWS as u32 / 16, 1];
        TensorMap::new(self.memory.address, [k, 8, 2, f / 8, experts], strides, boxes)
    }
}

impl CudaBackend {
    /// `parts`, one below the other, as one weight of `shape`; converted to `dtype` where they have another.
    pub(super) fn upload_weight(
        &self,
        parts: &[HostTensor<'_>],
        shape: (usize, usize),
        dtype: DType,
    ) -> Result<CudaWeight> {
        let (rows, cols) = shape;
        let memory = Memory::new(&self.device, rows * cols * dtype.size_bytes(), "weight")?;
        let mut offset = 0;
        for part in parts {
            let elements: usize = part.shape.iter().product();
            if part.dtype == dtype {
                memory.upload(offset, part.data, "weight")?;
            } else {
                memory.upload(offset, &convert(part, dtype), "weight")?;
            }
            offset += elements * dtype.size_bytes();
        }
        need(
            "weight",
            offset == memory.bytes.min(rows * cols * dtype.size_bytes()),
            || format!("{offset} bytes for a weight of [{rows}, {cols}]"),
        )?;
        Ok(CudaWeight {
            memory,
            rows,
            cols,
            dtype,
        })
    }
}

/// Host conversion between storage types, through f32.
pub(super) fn convert(part: &HostTensor<'_>, dtype: DType) -> Vec<u8> {
    let size = part.dtype.size_bytes();
    let mut out = Vec::with_capacity(part.data.len() / size * dtype.size_bytes());
    for bytes in part.data.chunks_exact(size) {
        let value = match part.dtype {
            DType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
            DType::F16 => half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
            DType::Bf16 => half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        };
        match dtype {
            DType::F32 => out.extend_from_slice(&value.to_le_bytes()),
            DType::F16 => out.extend_from_slice(&half::f16::from_f32(value).to_le_bytes()),
            DType::Bf16 => out.extend_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
        }
    }
    out
}

/// The values of `bytes`, appended to `out`.
pub(super) fn decode_f32(dtype: DType, bytes: &[u8], out: &mut Vec<f32>) {
    match dtype {
        DType::F32 => out.extend(
            bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        ),
        DType::F16 => out.extend(
            bytes
                .chunks_exact(2)
                .map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()),
        ),
        DType::Bf16 => out.extend(
            bytes
                .chunks_exact(2)
                .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()),
        ),
    }
}
