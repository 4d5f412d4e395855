//! Random weights without a checkpoint (`--load-format dummy`): for benchmarks, and for trying a model's size.
//!
//! Matrices are normal with σ 0.02, taps with σ 0.3, norms are one and biases zero, so that activations stay finite and
//! experts are chosen about evenly. All numbers are windows of one table of random values, each parameter at its own
//! offset: memory bandwidth, not the generator, bounds the time, and no two layers or experts are equal.

use std::borrow::Cow;
use std::collections::HashMap;

use half::{bf16, f16};
use rayon::prelude::*;

use super::LoadError;
use super::lfm2::params::{Param, ParamKind};
use super::loader::{SourceTensor, TensorSource};
use crate::backend::DType;

/// Values in the table: prime, so that a matrix that repeats the table does not repeat a row.
const TABLE_LEN: usize = 8_388_593;
/// Matrices up to this many values are windows of the table, longer ones repeat it.
const WINDOW_LEN: usize = TABLE_LEN / 2;
/// Between the windows of consecutive parameters; coprime to the number of offsets.
const STRIDE: usize = 1_000_003;
const SIGMA: f32 = 0.02;
const TAP_SIGMA: f32 = 0.3;

/// The parameters of a model, made up.
pub struct Dummy {
    dtype: DType,
    /// `TABLE_LEN` values in `dtype`.
    table: Vec<u8>,
    /// Place of each parameter in the model's list, which decides its offset.
    order: HashMap<String, usize>,
    seed: u64,
}

impl Dummy {
    /// Prepares the table. The same seed gives the same model.
    pub fn new(params: &[Param], dtype: DType, seed: u64) -> Self {
        let mut table = vec![0; TABLE_LEN * dtype.size_bytes()];
        const CHUNK: usize = 1 << 14;
        table
            .par_chunks_mut(CHUNK * dtype.size_bytes())
            .enumerate()
            .for_each(|(chunk, bytes)| {
                let first = (chunk * CHUNK) as u64;
                for (i, out) in bytes.chunks_exact_mut(dtype.size_bytes()).enumerate() {
                    put(out, SIGMA * normal(seed, first + i as u64), dtype);
                }
            });
        let order = params
            .iter()
            .enumerate()
            .map(|(i, param)| (param.name.clone(), i))
            .collect();
        Self {
            dtype,
            table,
            order,
            seed,
        }
    }

    fn constant(&self, elements: usize, value: f32, dtype: DType) -> SourceTensor<'_> {
        let mut data = vec![0; elements * dtype.size_bytes()];
        for out in data.chunks_exact_mut(dtype.size_bytes()) {
            put(out, value, dtype);
        }
        SourceTensor {
            dtype,
            data: Cow::Owned(data),
        }
    }

    fn matrix(&self, place: usize, elements: usize) -> SourceTensor<'_> {
        let size = self.dtype.size_bytes();
        let offset = (place * STRIDE) % (TABLE_LEN - WINDOW_LEN) * size;
        let data = if elements <= WINDOW_LEN {
            Cow::Borrowed(&self.table[offset..offset + elements * size])
        } else {
            let mut data = Vec::with_capacity(elements * size);
            let mut from = offset;
            while data.len() < elements * size {
                let take = (self.table.len() - from).min(elements * size - data.len());
                data.extend_from_slice(&self.table[from..from + take]);
                from = 0;
            }
            Cow::Owned(data)
        };
        SourceTensor {
            dtype: self.dtype,
            data,
        }
    }

    fn taps(&self, place: usize, elements: usize) -> SourceTensor<'_> {
        let mut data = vec![0; elements * self.dtype.size_bytes()];
        // A stream of its own, far from the table's counters.
        let first = (place as u64 + 1) << 40;
        for (i, out) in data.chunks_exact_mut(self.dtype.size_bytes()).enumerate() {
            put(out, TAP_SIGMA * normal(self.seed, first + i as u64), self.dtype);
        }
        SourceTensor {
            dtype: self.dtype,
            data: Cow::Owned(data),
        }
    }
}

impl TensorSource for Dummy {
    fn tensor(&self, param: &Param) -> Result<SourceTensor<'_>, LoadError> {
        let Some(&place) = self.order.get(&param.name) else {
            return Err(LoadError::Tensors(format!(
                "{} is no parameter of the model",
                param.name
            )));
        };
        let elements = param.elements();
        Ok(match param.kind {
            ParamKind::Matrix => self.matrix(place, elements),
            ParamKind::Taps => self.taps(place, elements),
            ParamKind::Norm => self.constant(elements, 1.0, self.dtype),
            ParamKind::Bias => self.constant(elements, 0.0, self.dtype),
            ParamKind::ExpertBias => self.constant(elements, 0.0, DType::F32),
        })
    }
}

/// Nearly normal: the sum of four uniform 16-bit numbers of one hash, scaled to variance 1.
fn normal(seed: u64, counter: u64) -> f32 {
    let bits = mix(seed ^ mix(counter));
    let sum: u64 = (0..4).map(|i| bits >> (16 * i) & 0xffff).sum();
    // Each uniform on 0..65536 has mean 32767.5 and variance 65536² / 12.
    (sum as f32 - 4.0 * 32767.5) / (65536.0 / 3f32.sqrt())
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn put(out: &mut [u8], value: f32, dtype: DType) {
    match dtype {
        DType::F32 => out.copy_from_slice(&value.to_ne_bytes()),
        DType::F16 => out.copy_from_slice(&f16::from_f32(value).to_ne_bytes()),
        DType::Bf16 => out.copy_from_slice(&bf16::from_f32(value).to_ne_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn param(name: &str, shape: &[usize], kind: ParamKind) -> Param {
        Param {
            name: name.into(),
            shape: shape.into(),
            kind,
        }
    }

    fn values(tensor: &SourceTensor) -> Vec<f32> {
        tensor
            .data
            .chunks_exact(2)
            .map(|b| bf16::from_ne_bytes([b[0], b[1]]).to_f32())
            .collect()
    }

    fn mean_and_sigma(values: &[f32]) -> (f64, f64) {
        let n = values.len() as f64;
        let mean = values.iter().map(|&x| x as f64).sum::<f64>() / n;
        (
            mean,
            (values.iter().map(|&x| (x as f64 - mean).powi(2)).sum::<f64>() / n).sqrt(),
        )
    }

    #[test]
    fn statistics_and_seed() {
        let params = [
            param("m", &[500, 400], ParamKind::Matrix),
            param("t", &[20000, 1, 3], ParamKind::Taps),
            param("n", &[5], ParamKind::Norm),
            param("e", &[3], ParamKind::ExpertBias),
        ];
        let dummy = Dummy::new(&params, DType::Bf16, 7);
        for (i, want) in [(0, 0.02), (1, 0.3)] {
            let (mean, sigma) = mean_and_sigma(&values(&dummy.tensor(&params[i]).unwrap()));
            assert!(
                mean.abs() < 0.02 * want && (sigma / want - 1.0).abs() < 0.02,
                "mean {mean}, sigma {sigma}"
            );
        }
        assert_eq!(values(&dummy.tensor(&params[2]).unwrap()), [1.0; 5]);
        let bias = dummy.tensor(&params[3]).unwrap();
        assert_eq!((bias.dtype, &*bias.data), (DType::F32, &[0; 12][..]));
        let same = Dummy::new(&params, DType::Bf16, 7);
        let other = Dummy::new(&params, DType::Bf16, 8);
        let bytes = |dummy: &Dummy| dummy.tensor(&params[0]).unwrap().data.into_owned();
        assert_eq!(bytes(&dummy), bytes(&same));
        assert_ne!(bytes(&dummy), bytes(&other));
    }

    #[test]
    fn no_two_parameters_and_no_two_rows_are_equal() {
        let params: Vec<Param> = (0..3000)
            .map(|i| param(&format!("p{i}"), &[2, 64], ParamKind::Matrix))
            .collect();
        let dummy = Dummy::new(&params, DType::Bf16, 0);
        let distinct: HashSet<Vec<u8>> = params
            .iter()
            .map(|p| dummy.tensor(p).unwrap().data.into_owned())
            .collect();
        assert_eq!(distinct.len(), params.len());

        // Longer than the table: rows whose width divides a power of two must not come round to the same place.
        let long = [param("embed", &[12000, 1024], ParamKind::Matrix)];
        let dummy = Dummy::new(&long, DType::Bf16, 0);
        let tensor = dummy.tensor(&long[0]).unwrap();
        assert_eq!(tensor.data.len(), long[0].elements() * 2);
        let rows: HashSet<&[u8]> = tensor.data.chunks_exact(1024 * 2).collect();
        assert_eq!(rows.len(), 12000);
    }
}
